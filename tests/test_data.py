r"""Tests of data.py: each builds its small inputs in tmp_path, and states what would go wrong."""

import gzip
import hashlib
import io
import itertools
import json
import os
import pickle
import shutil
import signal
import struct
import tarfile
import threading
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import readers

import runtime
from conftest import DATA

ORIENTATION = 0x0112


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def hwc(tensor):
    return tensor.permute(1, 2, 0).numpy()


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def folder_of(path, count=6, size=8):
    """A folder of `count` different colour PNGs -> their arrays, in the order of their names."""
    path.mkdir(parents=True, exist_ok=True)
    arrays = [pixels(size, size, 3, seed=i) for i in range(count)]
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(path / f"{i:03}.png")
    return arrays


def one_line(info):
    assert "\n" not in str(info.value)
    return str(info.value)


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uint8_survives_the_trip_through_float(dtype):
    every = torch.arange(256, dtype=torch.uint8)
    x = data.to_float(every)
    assert x.dtype == torch.float32 and x[0] == -1 and x[255] == 1
    assert torch.equal(data.to_uint8(x.to(dtype)), every)


def test_to_uint8_rounds_half_up_and_clamps():
    x = torch.tensor([-9.0, -1, 0, 1, 9, float("inf"), 0.4 / 127.5, 0.6 / 127.5])
    # 0 lies half way between 127 and 128
    assert data.to_uint8(x).tolist() == [0, 0, 128, 255, 255, 255, 128, 128]
    levels = torch.tensor([10.49, 10.51]) / 127.5 - 1
    assert data.to_uint8(levels).tolist() == [10, 11]  # truncation would say 10, 10


# ------------------------------------------------------------------ one image


@pytest.mark.parametrize("shape,channels", [((16, 16, 3), 3), ((16, 16), 1)])
def test_image_of_the_right_size_keeps_every_bit(shape, channels):
    array = pixels(*shape)
    out = data.prepare(Image.fromarray(array), 16, channels)
    assert out.dtype == torch.uint8 and out.shape == (channels, 16, 16) and out.is_contiguous()
    assert np.array_equal(hwc(out), array.reshape(16, 16, channels))


# What a viewer must do, written with NumPy, for the eight values of the EXIF tag.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.transpose(1, 0, 2), 2),
    8: np.rot90,
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])  # Pillow turns a TIFF itself: not twice, then
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation, kind):
    array = pixels(8, 8, 3)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = Image.open(io.BytesIO(encode(Image.fromarray(array), kind, exif=exif)))
    assert np.array_equal(hwc(data.prepare(image, 8, 3)), UPRIGHT[orientation](array))


def sixteen_bit_images():
    levels = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    big = levels.astype(">u2").tobytes()
    yield "I;16", Image.frombytes("I;16", (16, 16), levels.tobytes())
    yield "I;16L", Image.frombytes("I;16L", (16, 16), levels.tobytes())
    yield "I;16B", Image.frombytes("I;16B", (16, 16), big)
    yield "png", Image.open(io.BytesIO(encode(Image.fromarray(levels))))
    yield "pgm", Image.open(io.BytesIO(b"P5 16 16 65535\n" + big))


@pytest.mark.parametrize("name", ["I;16", "I;16L", "I;16B", "png", "pgm"])
def test_sixteen_bit_gray_is_scaled(name):
    out = data.prepare(dict(sixteen_bit_images())[name], 16, 1)
    assert out.flatten().tolist() == list(range(256))


def test_sixteen_bit_gray_rounds():
    levels = np.array([[0, 128], [129, 65535]], dtype=np.uint16)
    assert data.prepare(Image.fromarray(levels), 2, 1).flatten().tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_modes_without_a_range_are_refused(dtype):
    with pytest.raises(ValueError, match="convert it") as info:
        data.prepare(Image.fromarray(np.zeros((4, 4), dtype)), 4, 3)
    one_line(info)


def test_alpha_is_composited_over_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 3] = [[0, 255], [51, 0]]  # 51/255 of black over white: 204
    image = Image.fromarray(rgba)
    expected = np.array([[255, 0], [204, 255]])
    palette = Image.new("P", (2, 2)).convert("PA")  # its only colour, 0, is black
    palette.putalpha(image.getchannel("A"))
    assert palette.mode == "PA"
    for source in (image, image.convert("LA"), palette):
        for channels in (1, 3):
            out = data.prepare(source, 2, channels).numpy()
            assert np.array_equal(out, np.stack([expected] * channels)), source.mode


def test_palette_with_transparency():
    image = Image.frombytes("P", (2, 2), bytes([0, 1, 2, 0]))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    content = encode(image, transparency=0)
    out = hwc(data.prepare(Image.open(io.BytesIO(content)), 2, 3))
    assert out.tolist() == [[[255] * 3, [0, 255, 0]], [[0, 0, 255], [255] * 3]]
    opaque = hwc(data.prepare(image, 2, 3))
    assert opaque[0, 0].tolist() == [255, 0, 0]  # without transparency, the entry is a colour


def test_gray_with_a_transparent_level():
    content = encode(Image.fromarray(np.array([[7, 9]] * 2, np.uint8)), transparency=7)
    assert data.prepare(Image.open(io.BytesIO(content)), 2, 1).tolist() == [[[255, 9]] * 2]


def test_cmyk_one_bit_and_gray():
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))  # no cyan: red
    assert hwc(data.prepare(cmyk, 4, 3))[0, 0].tolist() == [255, 0, 0]
    jpeg = Image.open(io.BytesIO(encode(cmyk, "JPEG", quality=100)))
    assert np.abs(hwc(data.prepare(jpeg, 4, 3))[0, 0].astype(int) - [255, 0, 0]).max() <= 3
    bits = Image.fromarray(np.array([[0, 255], [255, 0]], np.uint8)).convert("1")
    assert data.prepare(bits, 2, 1).flatten().tolist() == [0, 255, 255, 0]
    gray = Image.fromarray(pixels(4, 4))
    three = data.prepare(gray, 4, 3)
    assert torch.equal(three[0], three[1]) and torch.equal(three[0], three[2])
    colour = Image.fromarray(pixels(4, 4, 3))
    assert np.array_equal(data.prepare(colour, 4, 1)[0].numpy(), np.asarray(colour.convert("L")))


def test_of_an_animation_the_first_frame():
    frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
    for kind in ("GIF", "PNG"):
        content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
        assert (data.prepare(Image.open(io.BytesIO(content)), 4, 1) == 10).all(), kind


@pytest.mark.parametrize("transpose", [False, True])
def test_centre_crop(transpose):
    array = pixels(8, 14, 3)
    middle = array[:, 3:11]
    if transpose:
        array, middle = array.transpose(1, 0, 2), middle.transpose(1, 0, 2)
    assert np.array_equal(hwc(data.prepare(Image.fromarray(array.copy()), 8, 3)), middle)


def test_resize_takes_the_shortest_side_and_does_not_stretch():
    array = np.zeros((40, 80), np.uint8)
    array[:, 20:60] = 255  # the central square, which alone should be left
    assert (data.prepare(Image.fromarray(array), 20, 1) > 235).all()  # else black bars
    assert data.prepare(Image.fromarray(pixels(7, 5)), 16, 1).shape == (1, 16, 16)  # enlarged


def test_shrinking_is_antialiased():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    small = data.prepare(Image.fromarray(board), 8, 1).float()
    # every eighth pixel of the chessboard, taken as it is, would be all black
    assert (small - 127.5).abs().max() < 12


# ------------------------------------------------------------------ data sets from files


def test_folder_of_everything(tmp_path):
    arrays = folder_of(tmp_path / "b deep" / "é ü 図")
    Image.fromarray(arrays[0]).save(tmp_path / "A.PNG")
    Image.fromarray(pixels(9, 20)).save(tmp_path / "c.jpg")
    (tmp_path / "d.png").mkdir()  # a folder, whatever its name
    (tmp_path / "notes.txt").write_text("not an image")
    for hidden in (".hidden.png", ".git/x.png", "__MACOSX/x.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"broken, but never opened")
    (tmp_path / "b deep" / "loop").symlink_to(tmp_path)
    d = data.load(tmp_path, 8, 3)
    assert isinstance(d, data.Array) and len(d) == 8
    assert np.array_equal(hwc(d[0]), arrays[0])
    assert all(np.array_equal(hwc(d[1 + i]), array) for i, array in enumerate(arrays))
    assert d.summary == (
        "8 images (1 L, 7 RGB), 8x8 to 20x9 -> 3x8x8, in memory, 1 other file left out (.txt 1)"
    )


def test_a_linked_folder_is_followed(tmp_path):
    folder_of(tmp_path / "elsewhere")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "elsewhere")
    assert len(data.load(tmp_path / "set", 8, 3)) == 6


def test_a_set_over_the_memory_limit_is_streamed_and_equal(tmp_path):
    folder_of(tmp_path)
    kept = data.load(tmp_path, 8, 3, memory_limit=6 * 3 * 8 * 8)
    streamed = data.load(tmp_path, 8, 3, memory_limit=6 * 3 * 8 * 8 - 1)
    assert isinstance(kept, data.Array) and isinstance(streamed, data.Files)
    assert all(torch.equal(kept[i], streamed[i]) for i in range(6))
    assert streamed.summary.endswith("streamed")


@pytest.mark.parametrize("limit", [0, 2**30])
def test_zip(tmp_path, limit):
    arrays = folder_of(tmp_path / "src")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.mkdir("x.png")
        archive.writestr("__MACOSX/._a.png", b"broken")
        for i, array in enumerate(arrays):
            archive.writestr(f"top/sub dir {i}/ö.png", encode(Image.fromarray(array)))
    d = data.load(tmp_path / "set.zip", 8, 3, memory_limit=limit)
    assert isinstance(d, data.Array) == bool(limit) and len(d) == 6
    assert all(np.array_equal(hwc(d[i]), array) for i, array in enumerate(arrays))


def broken_files(path):
    """Seven files that all say .png, and a reason that each must be named with."""
    good = encode(Image.fromarray(pixels(64, 64, 3)))
    bomb = bytearray(good)
    bomb[16:24] = struct.pack(">2I", 60000, 60000)
    broken = {
        "a-truncated": good[: len(good) // 2],
        "b-empty": b"",
        "c-html": b"<html></html>",
        "d-bomb": bytes(bomb),
        "e-eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "f-float": encode(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF"),
    }
    for name, content in broken.items():
        (path / f"{name}.png").write_bytes(content)
    (path / "g-dangling.png").symlink_to(path / "nowhere")
    return 7


def test_broken_images_stop_with_a_list(tmp_path):
    folder_of(tmp_path, 3)
    count = broken_files(tmp_path)
    with pytest.raises(ValueError) as info:
        data.load(tmp_path, 8, 3)
    message = one_line(info)
    assert f"{count} of {count + 3} images" in message and "and 2 more" in message
    assert "--skip-bad-images" in message and "b-empty.png (empty file)" in message
    assert "c-html.png (not an image of a known format)" in message
    assert sum(f"/{letter}-" in message for letter in "abcdefg") == 5


@pytest.mark.parametrize("limit", [0, 2**30])
def test_skip_bad_goes_on_and_counts(tmp_path, limit, recwarn):
    arrays = folder_of(tmp_path, 3)
    count = broken_files(tmp_path)
    d = data.load(tmp_path, 8, 3, skip_bad=True, memory_limit=limit)
    assert len(d) == 3 and d.summary.endswith(f", {count} bad skipped")
    assert all(np.array_equal(hwc(d[i]), array) for i, array in enumerate(arrays))
    assert not len(recwarn)


def test_contents_beyond_the_listed_formats_are_not_tried(tmp_path):
    # PCX stands for EPS here, which Pillow would hand to an interpreter of programs
    (tmp_path / "x.png").write_bytes(encode(Image.new("L", (8, 8)), "PCX"))
    with pytest.raises(ValueError, match="not an image of a known format"):
        data.load(tmp_path, 8, 3)


def test_nothing_left_is_an_error_even_with_skip_bad(tmp_path):
    broken_files(tmp_path)
    with pytest.raises(ValueError, match="none is left") as info:
        data.load(tmp_path, 8, 3, skip_bad=True)
    one_line(info)


def test_a_file_that_vanishes_later_is_named(tmp_path):
    folder_of(tmp_path)
    d = data.load(tmp_path, 8, 3, memory_limit=0)
    (tmp_path / "002.png").unlink()
    with pytest.raises(ValueError, match="002.png") as info:
        d[2]
    one_line(info)


# ------------------------------------------------------------------ what was checked before


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that were decoded, in any order; each call forgets the earlier."""
    names, true_read = [], data.Files.read

    def read(self, i, check=False):
        names.append(os.path.basename(self.paths[i]))
        return true_read(self, i, check)

    monkeypatch.setattr(data.Files, "read", read)

    def since():
        found = sorted(names)
        names.clear()
        return found

    return since


def streamed(source, **options):
    return data.load(source, 8, 3, memory_limit=0, **options)


def zip_of(folder):
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return path


def same_set(one, other):
    return (one.paths, one.summary, one.digest) == (other.paths, other.summary, other.digest)


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_what_was_checked_is_not_decoded_again(tmp_path, decoded, kind):
    folder_of(tmp_path / "set")
    Image.new("L", (20, 9)).save(tmp_path / "set" / "gray.png")
    source = tmp_path / "set" if kind == "folder" else zip_of(tmp_path / "set")
    first = streamed(source)
    assert len(decoded()) == 7
    again = streamed(source)
    assert decoded() == [] and same_set(first, again)
    assert "1 L, 6 RGB), 8x8 to 20x9" in again.summary and torch.equal(first[3], again[3])


def test_what_has_changed_is_decoded_again(tmp_path, decoded):
    folder_of(tmp_path / "set")
    streamed(tmp_path / "set")
    os.utime(tmp_path / "set" / "001.png", ns=(1, 1))  # touched
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "002.png")  # another
    (tmp_path / "set" / "003.png").rename(tmp_path / "set" / "new.png")
    (tmp_path / "set" / "004.png").unlink()
    decoded()
    assert len(streamed(tmp_path / "set")) == 5
    assert decoded() == ["001.png", "002.png", "new.png"]
    (tmp_path / "set" / "000.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="1 of 5 images.*000.png"):
        streamed(tmp_path / "set")
    assert decoded() == ["000.png"]
    # only what is there is kept
    kept = json.loads(Path(readers.index_path(tmp_path / "set")).read_text(encoding="utf-8"))
    assert len(kept["checked"]) == 5


def test_a_changed_zip_is_decoded_again(tmp_path, decoded):
    folder_of(tmp_path / "set")
    path = zip_of(tmp_path / "set")
    streamed(path)
    decoded()
    os.utime(path, ns=(1, 1))
    assert len(streamed(path)) == len(decoded()) == 6


def test_a_bad_file_stays_bad_with_the_same_line(tmp_path, decoded):
    folder_of(tmp_path, 3)
    broken_files(tmp_path)
    with pytest.raises(ValueError) as first:
        streamed(tmp_path)
    decoded()
    with pytest.raises(ValueError) as again:
        streamed(tmp_path)
    assert decoded() == ["g-dangling.png"]  # what cannot be asked for its age
    assert one_line(first) == one_line(again)
    assert streamed(tmp_path, skip_bad=True).summary.endswith(", 7 bad skipped")


def test_an_error_of_the_system_is_not_remembered(tmp_path, monkeypatch):
    folder_of(tmp_path)
    for error in (OSError(5, "Input/output error"), MemoryError()):

        def failing(path, limit, error=error):
            raise error

        with monkeypatch.context() as patch, pytest.raises(ValueError, match="6 of 6 images"):
            patch.setattr(readers, "content", failing)
            streamed(tmp_path)
        assert len(streamed(tmp_path)) == 6
        os.remove(readers.index_path(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[]",
        b"[" * 10**5,
        b'{"decoder": 1}',
        b'{"decoder": "HERE", "checked": []}',
        b'{"decoder": "HERE", "checked": {"a": ["RGB", 8]}}',
        b'{"decoder": "HERE", "checked": {"a": "two\\nlines"}}',
        b'{"decoder": "HERE", "checked": {"a": null}}',
    ],
    ids=lambda content: str(content[:50]),
)
def test_a_damaged_or_foreign_index_is_written_anew(tmp_path, decoded, content):
    folder_of(tmp_path)
    path = Path(readers.index_path(tmp_path))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.replace(b"HERE", data.decoder().encode()))
    first = streamed(tmp_path)
    assert len(decoded()) == 6
    assert same_set(first, streamed(tmp_path)) and decoded() == []


def test_other_code_checks_again(tmp_path, decoded, monkeypatch):
    folder_of(tmp_path)
    streamed(tmp_path)
    decoded()
    monkeypatch.setattr(data, "decoder", lambda: "another version of Pillow")
    streamed(tmp_path)
    assert len(decoded()) == 6


def test_a_cache_folder_that_cannot_be_written_costs_time_alone(tmp_path, decoded, monkeypatch):
    folder_of(tmp_path / "set")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(readers, "index_path", lambda source: str(tmp_path / "file" / "x.json"))
    assert same_set(streamed(tmp_path / "set"), streamed(tmp_path / "set"))
    assert len(decoded()) == 12


def test_the_number_of_indexes_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "INDEXES", 2)
    monkeypatch.setattr(
        readers, "index_path", lambda source: str(tmp_path / "checked" / f"{source}.json")
    )
    for i in range(4):
        readers.remember(str(i), "x", {})
        os.utime(readers.index_path(str(i)), (i, i))
    readers.remember("4", "x", {})
    assert sorted(os.listdir(tmp_path / "checked")) == ["3.json", "4.json"]


def test_a_signal_during_the_check_does_not_wait_for_the_rest(tmp_path, decoded, monkeypatch):
    """And what was checked until then stays checked."""
    folder_of(tmp_path, 200)
    slow_read = data.Files.read
    monkeypatch.setattr(
        data.Files, "read", lambda *a, **k: (time.sleep(0.01), slow_read(*a, **k))[1]
    )

    def stopped(results, *rest, **options):
        yield from itertools.islice(results, 5)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "tqdm", stopped)
        streamed(tmp_path)
    assert 5 <= len(decoded()) < 100
    assert len(streamed(tmp_path)) == 200 and len(decoded()) == 195


# ------------------------------------------------------------------ which images these are


def test_the_digest_is_of_the_images_and_not_of_their_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "set" / "deep")
    zip_of(tmp_path / "set" / "deep").rename("set.zip")
    np.save("set.npy", pixels(5, 8, 8, 3))
    Image.new("RGB", (8, 8)).save("one.png")
    os.mkdir("elsewhere")
    for name in ("set", "set.zip", "set.npy", "one.png"):
        before = data.load(name, 8, 3).digest
        assert len(before) == 16
        for other in (f"./{name}", f"{name}/" if name == "set" else name, tmp_path / name):
            assert data.load(other, 8, 3).digest == before
        assert data.load(name, 8, 3, memory_limit=0).digest == before  # streamed or in memory
        moved = shutil.move(name, "elsewhere/renamed" + Path(name).suffix)
        assert data.load(moved, 8, 3).digest == before
    (tmp_path / "elsewhere/renamed/deep/000.png").touch()
    set_, deep = "elsewhere/renamed", tmp_path / "elsewhere/renamed/deep"
    seen = [data.load(set_, 8, 3).digest]
    (deep / "000.png").rename(deep / "a.png")
    seen.append(data.load(set_, 8, 3).digest)
    (deep / "a.png").write_bytes((deep / "a.png").read_bytes() + b" ")
    seen.append(data.load(set_, 8, 3).digest)
    (deep / "b.png").write_bytes(b"broken")
    assert data.load(set_, 8, 3, skip_bad=True).digest == seen[-1]  # it is not read
    (deep / "a.png").unlink()
    seen.append(data.load(set_, 8, 3, skip_bad=True).digest)
    assert len(set(seen)) == 4
    changed = pixels(5, 8, 8, 3)
    changed[4, 7, 7, 2] ^= 1
    np.save("changed.npy", changed)
    np.save("split.npy", pixels(5, 8, 8, 3).reshape(20, 4, 4, 3))
    found = [
        data.load(f"{n}.npy", None, 3).digest for n in ("elsewhere/renamed", "changed", "split")
    ]
    assert len(set(found)) == 3
    assert data.load("shapes", 8, 3).digest == data.load("shapes", 16, 1).digest
    assert data.load("shapes", 8, 3).digest != data.load("shapes", 8, 3, seed=1).digest


def test_a_zip_with_one_other_byte_is_another_set(tmp_path):
    digests = set()
    for level in (1, 2):
        image = np.full((8, 8), level, np.uint8)
        with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
            archive.writestr("a.bmp", encode(Image.fromarray(image), "BMP"))
        digests.add(data.load(tmp_path / "set.zip", 8, 3).digest)
    assert len(digests) == 2


# ------------------------------------------------------------------ what is not the set


def test_runs_inside_the_folder_are_never_read(tmp_path):
    folder_of(tmp_path / "photos")
    for run in ("runs/first", "old"):
        folder_of(tmp_path / run / "samples")
        folder_of(tmp_path / run / "generated" / "ddim-50")
        for name in ("config.json", "checkpoint.pt"):
            (tmp_path / run / name).write_text("{}")
    folder_of(tmp_path / "runs", 1)  # next to the runs: a figure
    d = data.load(tmp_path, 8, 3)
    assert len(d) == 6 and d.summary.endswith(", 2 folders of runs left out (old, runs)")
    # one that is named is read
    assert len(data.load(tmp_path / "runs" / "first" / "samples", 8, 3)) == 6
    # a class of this name is not a run
    folder_of(tmp_path / "sports" / "runs", 2)
    assert len(data.load(tmp_path, 8, 3)) == 8
    (tmp_path / "only" / "runs").mkdir(parents=True)
    shutil.move(tmp_path / "runs" / "first", tmp_path / "only" / "runs" / "first")
    with pytest.raises(ValueError, match=r"no images in .*, 1 folder of runs left out \(runs\)"):
        data.load(tmp_path / "only", 8, 3)


@pytest.mark.parametrize("name", ["shapes", "cifar10"])
def test_a_folder_named_like_a_built_in_set_is_mentioned(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / name)
    (tmp_path / "c").mkdir()
    for batch, content in cifar_files(True, pixels(10, 3072)):
        (tmp_path / "c" / batch).write_bytes(content)
    monkeypatch.setattr(readers, "cifar_archive", lambda: "c")
    d = data.load(name, 8, 3)
    assert len(d) != 6
    assert d.summary.endswith(
        f"; the set of this name is built in: for the folder {name}, give ./{name}"
    )
    own = data.load(f"./{name}", 8, 3)
    assert len(own) == 6 and "built in" not in own.summary
    shutil.rmtree(tmp_path / name)
    assert "built in" not in data.load(name, 8, 3).summary


def test_pillow_warnings_do_not_leak(tmp_path, monkeypatch):
    folder_of(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # 64 pixels: Pillow warns, no more
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.load(tmp_path, 8, 3)) == 6
        assert data.load(tmp_path, 8, 3, memory_limit=0)[0].shape == (3, 8, 8)


def test_wrong_sources_are_named_in_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text only").mkdir()
    (tmp_path / "text only" / "a.txt").write_text("a")
    for name in ("page.zip", "page.npz", "page.npy", "cifar-10-python.tar.gz", "nothing"):
        (tmp_path / name).write_text("<!DOCTYPE html>" if name != "nothing" else "")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(pixels(999).tobytes())[:100])
    (tmp_path / "idx.gz").write_bytes(gzip.compress(idx(pixels(3, 8, 8)))[:100])
    (tmp_path / "idx").write_bytes(idx(pixels(3, 8, 8))[:-1])
    (tmp_path / "short-idx").write_bytes(b"\0\0\x08\x03\0\0")
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01\0v\0{'descr'")
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04....")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(tmp_path / "nothing", "nothing")
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*absent"):
        data.load(tmp_path / "absent", 8, 3)
    expected = {
        "empty": "empty folder",
        "text only": r"no images in .*\.webp",
        "page.zip": "DOCTYP",
        "empty.zip": "no images in",
        "other.tar": "data_batch_1",
    }
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises((ValueError, OSError), match=expected.get(path.name)) as info:
            data.load(path, 8, 3)
        assert str(path) in one_line(info)
    with pytest.raises(ValueError, match="channels"):
        data.load("shapes", 8, 4)


# ------------------------------------------------------------------ arrays


def idx(array):
    return struct.pack(">4I", 0x803, *array.shape) + array.tobytes()


@pytest.mark.parametrize(
    "name",
    ["x.idx3-ubyte", "x-ubyte.gz", "f/train-images-idx3-ubyte.gz", "f/train-images.idx3-ubyte"],
)
def test_idx_is_padded_exactly(tmp_path, name):
    array = pixels(5, 28, 28)
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(idx(array)) if name.endswith("gz") else idx(array))
    (path.parent / "t10k-images-idx3-ubyte").write_bytes(idx(array[:1]))  # not for training
    source = path.parent if name.startswith("f/") else path
    d = data.load(source, 32, 1)
    assert d.images.shape == (5, 1, 32, 32)
    assert np.array_equal(d.images[:, 0, 2:30, 2:30].numpy(), array)
    assert d.images.long().sum() == array.sum(dtype=int)  # the border is black
    three = data.load(source, 32, 3).images
    assert all(torch.equal(three[:, c : c + 1], d.images) for c in range(3))
    same = data.load(source, 28, 1).images
    assert np.array_equal(same[:, 0].numpy(), array)
    resized = data.load(source, 14, 1)
    assert torch.equal(resized[4], data.prepare(Image.fromarray(array[4]), 14, 1))


@pytest.mark.parametrize("layout", ["next to it", "inside", "a pipe", "a broken link"])
def test_a_folder_named_like_the_idx_file_hides_nothing(tmp_path, layout):
    """Kaggle's archives: the folder train-images-idx3-ubyte, and the file train-images.idx3-ubyte,
    or the file in the folder."""
    array, labels = pixels(5, 28, 28), struct.pack(">2I", 0x801, 5) + bytes([1, 2, 3, 4, 5])
    for kind, content in (("images", idx(array)), ("labels", labels)):
        number = "3" if kind == "images" else "1"
        place = tmp_path / f"train-{kind}-idx{number}-ubyte"
        if layout == "a pipe":
            os.mkfifo(place)
        elif layout == "a broken link":
            place.symlink_to("nowhere")
        else:
            place.mkdir()
        inside = place / place.name
        beside = tmp_path / f"train-{kind}.idx{number}-ubyte"
        (inside if layout == "inside" else beside).write_bytes(content)
    d = data.load(tmp_path, 28, 1)
    assert np.array_equal(d.images[:, 0].numpy(), array)
    assert readers.read_labels(tmp_path).tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "shape", [(4, 8, 8), (4, 8, 8, 1), (4, 1, 8, 8), (4, 8, 8, 3), (4, 3, 8, 8)]
)
def test_npy_layouts(tmp_path, shape):
    array = pixels(*shape)
    np.save(tmp_path / "x.npy", array)
    c = 3 if 3 in shape else 1
    last = array.transpose(0, 2, 3, 1) if shape[1] == c else array.reshape(4, 8, 8, c)
    same = data.load(tmp_path / "x.npy", 8, c)
    assert np.array_equal(same.images.numpy(), last.transpose(0, 3, 1, 2))
    other = data.load(tmp_path / "x.npy", 8, 4 - c)
    image = Image.fromarray(last[2].squeeze(2) if c == 1 else last[2])
    assert torch.equal(other[2], data.prepare(image, 8, 4 - c))
    assert "4 images" in same.summary and "8x8" in same.summary


def test_npy_with_alpha_and_another_size(tmp_path):
    array = pixels(3, 10, 14, 4)
    np.save(tmp_path / "x.npy", array)
    d = data.load(tmp_path / "x.npy", 8, 3)
    assert torch.equal(d[1], data.prepare(Image.fromarray(array[1]), 8, 3))
    assert "14x10 -> 3x8x8" in d.summary


def test_npz_keys(tmp_path):
    one, two = pixels(3, 8, 8, 3), pixels(5, 8, 8)
    np.savez(tmp_path / "one.npz", x=one, labels=np.arange(3))
    np.savez(tmp_path / "two.npz", a=one, b=two, f=np.zeros(3))
    assert len(data.load(tmp_path / "one.npz", 8, 3)) == 3
    assert len(data.load(f"{tmp_path}/two.npz:b", 8, 3)) == 5
    for source in (f"{tmp_path}/two.npz", f"{tmp_path}/two.npz:c"):
        with pytest.raises(ValueError, match="two.npz:KEY") as info:
            data.load(source, 8, 3)
        assert "a uint8 (3, 8, 8, 3), b uint8 (5, 8, 8), f float64 (3,)" in one_line(info)


@pytest.mark.parametrize(
    "array,match",
    [
        (np.zeros((3, 8, 8), np.float32), "float32 is not uint8.*astype"),
        (np.zeros((3, 8, 8, 7), np.uint8), "none of"),
        (np.zeros((0, 8, 8), np.uint8), "no images"),
        (np.array([{}], dtype=object), "allow_pickle"),
    ],
)
def test_unfit_arrays_are_refused(tmp_path, array, match):
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", key=array)
    for name in ("x.npy", "x.npz", "x.npz:key"):
        with pytest.raises(ValueError, match=match) as info:
            data.load(tmp_path / name, 8, 3)
        one_line(info)


# ------------------------------------------------------------------ CIFAR-10


# A batch as Python 2 wrote it: protocol 2, byte strings, numpy.core. Row 0 is 0 1 2 ... 255 0 ...
def cifar_pickle(rows):
    def text(s):
        return b"U" + bytes([len(s)]) + s

    return (
        b"\x80\x02}(" + text(b"data") + b"cnumpy.core.multiarray\n_reconstruct\n"
        b"cnumpy\nndarray\nK\0\x85"
        + text(b"b")
        + b"\x87R(K\x01K"
        + bytes([len(rows)])
        + b"M\0\x0c\x86cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\0K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNN"
        + b"J\xff\xff\xff\xff" * 2
        + b"K\0tb\x89"
        + b"T"
        + struct.pack("<I", rows.size)
        + rows.tobytes()
        + b"tb"
        + text(b"labels")
        + b"]u."
    )


def cifar_files(binary, rows):
    for i in range(5):
        part = rows[2 * i : 2 * i + 2]
        if binary:
            yield f"data_batch_{i + 1}.bin", b"".join(b"\x07" + row.tobytes() for row in part)
        else:
            yield f"data_batch_{i + 1}", cifar_pickle(part) if i else pickle.dumps({b"data": part})


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar(tmp_path, binary, packed):
    rows = pixels(10, 3072)
    source = tmp_path / ("anything.bin" if packed else "folder")
    if packed:
        with tarfile.open(source, "w:gz") as tar:
            for name, content in [*cifar_files(binary, rows)][::-1]:  # the order is by number
                info = tarfile.TarInfo(f"cifar-10-batches/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    else:
        source.mkdir()
        for name, content in cifar_files(binary, rows):
            (source / name).write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy.core is deprecated, but of no interest to the user
        d = data.load(source, 32, 3)
    assert np.array_equal(d.images.numpy(), rows.reshape(10, 3, 32, 32))
    assert d.summary == "10 images (10 RGB), 32x32 -> 3x32x32, in memory"
    if not packed:
        (source / ("data_batch_3.bin" if binary else "data_batch_3")).unlink()
        with pytest.raises(ValueError, match="no CIFAR-10 data_batch_3"):
            data.load(source, 32, 3)


def test_a_damaged_archive_is_noticed_by_its_checksum(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in cifar_files(True, pixels(10, 3072)):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    packed = bytearray(gzip.compress(buffer.getvalue(), 0))  # stored, so that a pixel is a byte
    packed[len(packed) // 2] ^= 1
    (tmp_path / "x.tar.gz").write_bytes(packed)
    with pytest.raises(ValueError, match="CRC"):
        data.load(tmp_path / "x.tar.gz", 32, 3)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("content", ["evil", "list", "text", "cut"])
def test_pickles_that_are_not_arrays_are_refused(tmp_path, content):
    payload = {
        "evil": pickle.dumps({b"data": Evil(tmp_path / "owned")}),
        "list": pickle.dumps([1]),
        "text": pickle.dumps({b"data": "text"}),
        "cut": cifar_pickle(pixels(2, 3072))[:500],
    }[content]
    for i in range(5):
        (tmp_path / f"data_batch_{i + 1}").write_bytes(payload)
    match = "refused: the pickle asks for posix.system" if content == "evil" else None
    with pytest.raises(ValueError, match=match) as info:
        data.load(tmp_path, 32, 3)
    one_line(info)
    assert not (tmp_path / "owned").exists()


def test_download(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "new folder" / "file.tar.gz"
    source.write_bytes(b"content" * 1000)
    right = hashlib.sha256(source.read_bytes()).hexdigest()
    for url, sha256 in (
        (source.as_uri(), "0" * 64),
        ((tmp_path / "none").as_uri(), right),
        ("http://127.0.0.1:9/x", right),
        ("nonsense", right),
    ):
        with pytest.raises(OSError) as info:
            readers.download(url, str(target), sha256)
        message = one_line(info)
        assert url in message and sha256 in message and str(target) in message
        assert not list(target.parent.iterdir())
    readers.download(source.as_uri(), str(target), right)
    assert [p.name for p in target.parent.iterdir()] == ["file.tar.gz"]
    assert target.read_bytes() == source.read_bytes()


def test_cifar10_by_name_uses_the_cache_and_else_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(readers, "CIFAR_URL", (tmp_path / "no network").as_uri())
    with pytest.raises(OSError, match="put the file with SHA-256") as info:
        data.load("cifar10", 32, 3)
    path = tmp_path / "diffusion-data" / "cifar-10-python.tar.gz"
    assert str(path) in one_line(info) and readers.CIFAR_SHA256 in str(info.value)
    rows = pixels(10, 3072)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in cifar_files(False, rows):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert len(data.load("cifar10", 32, 3)) == 10


# ------------------------------------------------------------------ the order


def test_every_epoch_is_a_permutation_of_its_own():
    n = 23
    epochs = data.batch_indices(n, 0, 4 * n, seed=1).reshape(4, n)
    assert (np.sort(epochs) == np.arange(n)).all()
    assert len({tuple(e) for e in epochs}) == 4
    assert not np.array_equal(epochs[0], data.batch_indices(n, 0, n, seed=2))
    assert epochs.dtype == np.int64


def test_order_depends_on_the_position_alone():
    whole = data.batch_indices(10, 0, 100, seed=3)
    for start, batch in ((0, 7), (7, 7), (96, 4), (13, 40), (9, 2)):
        assert np.array_equal(data.batch_indices(10, start, batch, 3), whole[start : start + batch])
    assert data.batch_indices(2**31, 5, 3, 0).tolist() == [5, 6, 7]  # endless: counted through


def numbered(n=24):
    return data.Array(torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1).expand(n, 1, 2, 2))


def take(iterator, count):
    return torch.stack([next(iterator) for _ in range(count)])


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_each_batch_in_order(world):
    alone = take(data.batches(numbered(), 8, 0, seed=5), 6)
    parts = [take(data.batches(numbered(), 8, 0, 5, rank, world), 6) for rank in range(world)]
    assert torch.equal(torch.cat(parts, dim=1), alone)
    for epoch in alone.reshape(2, 24, -1)[..., 0]:  # disjoint and complete
        assert sorted(epoch.tolist()) == list(range(24))


def test_resuming_equals_the_tail():
    d = numbered(10)  # 4 does not divide 10: batches straddle the epochs
    whole = take(data.batches(d, 4, 0, seed=6), 9)
    assert torch.equal(take(data.batches(d, 4, 5 * 4, seed=6), 4), whole[5:])


@pytest.mark.parametrize("kind", ["files", "zip", "shapes"])
def test_workers_give_the_same_batches(tmp_path, kind):
    if kind == "shapes":
        d = data.load("shapes", 8, 3, seed=4)
    else:
        folder_of(tmp_path / "set", 10)
        source = tmp_path / "set"
        if kind == "zip":
            source = tmp_path / "set.zip"
            with zipfile.ZipFile(source, "w") as archive:
                for path in sorted((tmp_path / "set").iterdir()):
                    archive.write(path, path.name)
        d = data.load(source, 8, 3, memory_limit=0)
    before = torch.get_rng_state()
    plain = take(data.batches(d, 4, 4, seed=7, rank=1, world=2), 8)
    workers = take(data.batches(d, 4, 4, seed=7, rank=1, world=2, workers=2), 8)
    assert plain.shape == (8, 2, 3, 8, 8) and torch.equal(plain, workers)
    assert torch.equal(before, torch.get_rng_state())  # the noise of training stays the same


def counted(count=40, bad=None, slow=None):
    """A data set that is read -> (data set, list of what was read)."""
    d, seen = data.Files([f"{i}.png" for i in range(count)], 2, 1), []

    def read(i, check=False):
        seen.append(i)
        if i == bad:
            raise OSError("it has\ngone bad")
        if i == slow:
            time.sleep(60)
        return "L", (2, 2), torch.full((1, 2, 2), i % 256, dtype=torch.uint8)

    d.read = read
    return d, seen


def readers_alive(before, stuck=0):
    """How many of our threads are left, after a moment."""
    until = time.time() + 5
    while threading.active_count() > before + stuck and time.time() < until:
        time.sleep(0.01)
    return threading.active_count() - before


def test_threads_read_four_batches_ahead_and_no_more():
    (d, seen), before = counted(1000), threading.active_count()
    stream = data.batches(d, 10, 0, 0, workers=3)
    assert not seen, "nothing begins before the first batch is asked for"
    for n in (1, 2):
        next(stream)
        until = time.time() + 5
        while len(seen) < 10 * (n + data.AHEAD) and time.time() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(seen) == 10 * (n + data.AHEAD)
    stream.close()
    assert readers_alive(before) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_has_gone_bad_is_one_line(workers):
    (d, _), before = counted(bad=7), threading.active_count()
    stream = data.batches(d, 4, 0, 0, workers=workers)
    with pytest.raises(ValueError, match="^7.png: it has gone bad$"):
        take(stream, 10)
    assert readers_alive(before) == 0


def test_a_signal_breaks_off_the_wait_for_a_file_that_never_comes(monkeypatch):
    """... and the other threads stop, although thousands of images are wanted."""
    (d, _), before = counted(slow=3), threading.active_count()

    def stop(number, frame):
        raise InterruptedError

    handler, began = signal.signal(signal.SIGALRM, stop), time.time()
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(InterruptedError):
            take(data.batches(d, 4, 0, 0, workers=2), 10)
    finally:
        signal.signal(signal.SIGALRM, handler)
    assert time.time() - began < 5
    assert readers_alive(before, stuck=1) == 1, "the one that sleeps, which no program waits for"
    assert [t.daemon for t in threading.enumerate()].count(True) >= 1


def test_four_threads_read_one_zip(tmp_path):
    """Through one open file: each member is read under a lock, at its place."""
    arrays = [pixels(40, 40, 3, seed=i) for i in range(30)]
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "set.zip", "w", kind) as archive:
            for i, array in enumerate(arrays):
                archive.writestr(f"{i:02}.bmp", encode(Image.fromarray(array), "BMP"))
        d = data.load(tmp_path / "set.zip", 40, 3, memory_limit=0)
        d._zip = None  # the threads open it, all at the same time
        for i, image in enumerate(data.in_threads(d.__getitem__, list(range(30)) * 10, 4, 50)):
            assert np.array_equal(hwc(image), arrays[i % 30])


def test_threads_leave_the_filters_of_warnings_as_they_were(tmp_path):
    """catch_warnings swaps them for the whole process: of two threads, the later puts back what it
    found, which was the other's "ignore"."""
    folder_of(tmp_path, 10)
    d = data.load(tmp_path, 8, 3, memory_limit=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        d = data.Files(d.paths, 8, 3)
        before, real = list(warnings.filters), d.read

        def read(i):
            time.sleep(0.001 * (i % 3))
            warnings.warn_explicit("odd EXIF", UserWarning, "x.py", 1, "PIL.Image")
            return real(i)

        d.read = read
        stream, alive = data.batches(d, 5, 0, 0, workers=4), threading.active_count()
        take(stream, 20)
        stream.close()
        assert readers_alive(alive) == 0 and list(warnings.filters) == before


def test_a_signal_ends_the_scan_of_many_images(monkeypatch):
    seen = []

    def read(self, i, check=False):
        seen.append(i)
        time.sleep(0.02)

    monkeypatch.setattr(data.Files, "read", read)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    began = time.time()
    with runtime.Stop() as stop:
        many = data.Files(["x.png"] * 100_000, 2, 1)
        data.scan(many, [("x.png", "", None)] * 100_000, "x", False, 0, False)
    assert stop.asked == "SIGTERM" and time.time() - began < 5 and len(seen) < 5000


def test_an_array_needs_no_workers():
    assert torch.equal(
        take(data.batches(numbered(), 4, 0, 0, workers=2), 3),
        take(data.batches(numbered(), 4, 0, 0), 3),
    )


def test_impossible_batches_are_refused_at_the_call():
    with pytest.raises(ValueError, match="25.*24"):
        data.batches(numbered(24), 25, 0, 0)
    for batch, world in ((8, 3), (0, 1)):
        with pytest.raises(ValueError, match=f"batch of {batch} cannot be shared"):
            data.batches(numbered(24), batch, 0, 0, world=world)


def test_shapes_depend_on_seed_and_index_alone():
    a, b = data.Shapes(16, 3, seed=1), data.Shapes(16, 3, seed=2)
    assert len(a) == 2**31 and a[7].shape == (3, 16, 16) and a[7].dtype == torch.uint8
    assert torch.equal(a[7], data.Shapes(16, 3, seed=1)[7])
    assert not torch.equal(a[7], a[8]) and not torch.equal(a[7], b[7])
    assert np.array_equal(hwc(a[7]), data.draw_shape((1, 7), 16))
    gray = np.asarray(Image.fromarray(hwc(a[7])).convert("L"))
    assert np.array_equal(data.Shapes(16, 1, seed=1)[7][0].numpy(), gray)


# ------------------------------------------------------------------ real data


def test_real_fashion_mnist():
    """Its first 64 images, in the files as published: see data/README.md."""
    d = data.load(DATA / "fashion-mnist", 32, 1)
    assert d.images.shape == (64, 1, 32, 32) and d.images[:, :, :2].max() == 0
    raw = gzip.open(DATA / "fashion-mnist" / "train-images-idx3-ubyte.gz").read()
    assert raw[16:] == d.images[:, 0, 2:30, 2:30].numpy().tobytes()


def test_npz_of_several_arrays(tmp_path):
    """As a partial CIFAR-10 comes: images and labels of two parts, and the images' places."""
    path, images = tmp_path / "partial.npz", pixels(12, 32, 32, 3)
    labels, places = pixels(20), np.arange(8)
    np.savez(path, train_x=pixels(8, 32, 32, 3), train_index=places, test_x=images, labels=labels)
    with pytest.raises(ValueError, match="train_x uint8"):
        data.load(path, 32, 3)
    d = data.load(f"{path}:test_x", 32, 3)
    assert np.array_equal(hwc(d[9]), images[9]) and len(d) == 12
