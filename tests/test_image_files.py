"""image_files.py: folders and zips are found and checked whole, once; threads read ahead."""

import json
import os
import shutil
import signal
import threading
import time
import warnings
import zipfile
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import refused
from image_writers import encode, folder_of, hwc, pixels, zip_of
from PIL import Image

import data
from support import image_files, readers
from support.programs import StopSignal
from test_data import readers_alive, take


def test_folder_of_everything(tmp_path, tmp_path_factory):
    arrays = folder_of(tmp_path / "b deep" / "é ü 図")
    folder_of(elsewhere := tmp_path_factory.mktemp("elsewhere"), 2)
    (tmp_path / "link").symlink_to(elsewhere)
    Image.fromarray(arrays[0]).save(tmp_path / "A.PNG")
    Image.fromarray(pixels(9, 20)).save(tmp_path / "c.jpg")
    (tmp_path / "d.png").mkdir()  # a folder, whatever its name
    (tmp_path / "notes.txt").write_text("not an image")
    for hidden in (".hidden.png", ".git/x.png", "__MACOSX/x.png"):
        (tmp_path / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / hidden).write_bytes(b"broken, but never opened")
    (tmp_path / "b deep" / "loop").symlink_to(tmp_path)
    d = data.load(tmp_path, 8, 3)
    assert isinstance(d, image_files.Array) and len(d) == 10
    assert np.array_equal(hwc(d[0]), arrays[0])
    assert all(np.array_equal(hwc(d[1 + i]), array) for i, array in enumerate(arrays))
    assert d.summary == (
        "10 images (1 L, 9 RGB), 8x8 to 20x9 -> 3x8x8, in memory, 1 other file left out (.txt 1)"
    )


def test_a_set_over_the_memory_limit_is_streamed_and_equal(tmp_path):
    arrays = folder_of(tmp_path / "src")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.mkdir("x.png")
        archive.writestr("__MACOSX/._a.png", b"broken")
        for i, array in enumerate(arrays):
            archive.writestr(f"top/sub dir {i}/ö.png", encode(array))
    for source in (tmp_path / "src", tmp_path / "set.zip"):
        kept = data.load(source, 8, 3, memory_limit=6 * 3 * 8 * 8)
        streamed = data.load(source, 8, 3, memory_limit=6 * 3 * 8 * 8 - 1)
        assert isinstance(kept, image_files.Array) and isinstance(streamed, image_files.Files)
        assert streamed.summary.endswith("streamed") and len(streamed) == 6
        for i, array in enumerate(arrays):
            assert np.array_equal(hwc(kept[i]), array) and torch.equal(kept[i], streamed[i])


def test_contents_beyond_the_listed_formats_are_not_tried(tmp_path):
    # PCX stands for EPS here, which Pillow would hand to an interpreter of programs
    (tmp_path / "x.png").write_bytes(encode(Image.new("L", (8, 8)), "PCX"))
    refused("not an image of a known format", data.load, tmp_path, 8, 3)


@pytest.fixture
def decoded(monkeypatch):
    """The names of the files that were decoded, in any order; each call forgets the earlier."""
    names, true_read = [], image_files.Files.read

    def read(self, i, check=False):
        names.append(os.path.basename(self.paths[i]))
        return true_read(self, i, check)

    monkeypatch.setattr(image_files.Files, "read", read)

    def since():
        found = sorted(names)
        names.clear()
        return found

    return since


def streamed(source, **options):
    return data.load(source, 8, 3, memory_limit=0, **options)


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


def test_what_has_changed_is_decoded_again(tmp_path, decoded, monkeypatch):
    folder = tmp_path / "set"
    folder_of(folder)
    path = zip_of(folder)
    streamed(path)
    streamed(folder)
    os.utime(path, ns=(1, 1))
    decoded()
    assert len(streamed(path)) == len(decoded()) == 6
    os.utime(folder / "001.png", ns=(1, 1))  # touched
    Image.new("RGB", (8, 8)).save(folder / "002.png")  # another
    (folder / "003.png").rename(folder / "new.png")
    (folder / "004.png").unlink()
    assert len(streamed(folder)) == 5
    assert decoded() == ["001.png", "002.png", "new.png"]
    (folder / "000.png").write_bytes(b"broken")
    refused("1 of 5 images.*000.png", streamed, folder)
    assert decoded() == ["000.png"]
    kept = json.loads(Path(readers.index_path(folder)).read_text(encoding="utf-8"))
    assert len(kept["checked"]) == 5  # only what is there
    monkeypatch.setattr(image_files, "decoder", lambda: "another version of Pillow")
    streamed(path)
    assert len(decoded()) == 6


def test_a_bad_file_stays_bad_with_the_same_line(tmp_path, decoded):
    folder_of(tmp_path, 3)
    (tmp_path / "page.png").write_bytes(b"<html></html>")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere")
    first = str(refused("2 of 5 images", streamed, tmp_path))
    decoded()
    assert str(refused(None, streamed, tmp_path)) == first
    assert decoded() == ["dangling.png"]  # what cannot be asked for its age
    assert streamed(tmp_path, skip_bad=True).summary.endswith(", 2 bad skipped")


def test_an_error_of_the_system_is_not_remembered(tmp_path, monkeypatch):
    folder_of(tmp_path)
    for error in (OSError(5, "Input/output error"), MemoryError()):
        with monkeypatch.context() as patch:
            patch.setattr(readers, "content", Mock(side_effect=error))
            refused("6 of 6 images", streamed, tmp_path)
        assert len(streamed(tmp_path)) == 6
        os.remove(readers.index_path(tmp_path))


CHECKED = '{"a": ["RGB", 8]} | {"a": "two\\nlines"} | {"a": null} | []'.split(" | ")
DAMAGED = [b"", b"\xff\x00", b"[]", b"[" * 10**5, b'{"decoder": 1}']
DAMAGED += [f'{{"decoder": "HERE", "checked": {content}}}'.encode() for content in CHECKED]


@pytest.mark.parametrize("content", DAMAGED, ids=lambda content: str(content[:50]))
def test_a_damaged_or_foreign_index_is_written_anew(tmp_path, decoded, content):
    folder_of(tmp_path)
    path = Path(readers.index_path(tmp_path))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content.replace(b"HERE", image_files.decoder().encode()))
    first = streamed(tmp_path)
    assert len(decoded()) == 6
    assert same_set(first, streamed(tmp_path)) and decoded() == []


def test_a_cache_folder_that_cannot_be_written_costs_time_alone(tmp_path, decoded, monkeypatch):
    folder_of(tmp_path / "set")
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(readers, "index_path", lambda source: str(tmp_path / "file" / "x.json"))
    assert same_set(streamed(tmp_path / "set"), streamed(tmp_path / "set"))
    assert len(decoded()) == 12


def test_a_signal_during_the_check_does_not_wait_for_the_rest(tmp_path, decoded, monkeypatch):
    """And what was checked until then stays checked."""
    folder_of(tmp_path, 200)
    read, seen = image_files.Files.read, []

    def slow(self, i, check=False):
        seen.append(i)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return read(self, i, check)

    with monkeypatch.context() as patch, StopSignal() as stop:
        patch.setattr(image_files.Files, "read", slow)
        streamed(tmp_path)
    assert stop.requested == "SIGTERM"
    count = len(decoded())
    assert count < 100 and len(streamed(tmp_path)) == 200
    assert 200 - count <= len(decoded()) < 200


def test_the_digest_is_of_the_images_and_not_of_their_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digest = lambda *source, **how: data.load(*source, *[8, 3][len(source) - 1 :], **how).digest  # noqa: E731
    folder_of(tmp_path / "set" / "deep")
    zip_of(tmp_path / "set" / "deep").rename("set.zip")
    np.save("set.npy", pixels(5, 8, 8, 3))
    Image.new("RGB", (8, 8)).save("one.png")
    os.mkdir("elsewhere")
    for name in ("set", "set.zip", "set.npy", "one.png"):
        before = digest(name)
        assert len(before) == 16
        for other in (f"./{name}", f"{name}/" if name == "set" else name, tmp_path / name):
            assert digest(other) == before
        assert digest(name, memory_limit=0) == before  # streamed or in memory
        moved = shutil.move(name, "elsewhere/renamed" + Path(name).suffix)
        assert digest(moved) == before
    moved, deep = "elsewhere/renamed", tmp_path / "elsewhere/renamed/deep"
    (deep / "000.png").touch()
    seen = [digest(moved)]
    (deep / "000.png").rename(deep / "a.png")
    seen.append(digest(moved))
    (deep / "a.png").write_bytes((deep / "a.png").read_bytes() + b" ")
    seen.append(digest(moved))
    (deep / "b.png").write_bytes(b"broken")
    assert digest(moved, skip_bad=True) == seen[-1]  # it is not read
    (deep / "a.png").unlink()
    seen.append(digest(moved, skip_bad=True))
    assert len(set(seen)) == 4
    changed = pixels(5, 8, 8, 3)
    changed[4, 7, 7, 2] ^= 1
    np.save("changed.npy", changed)
    np.save("split.npy", pixels(5, 8, 8, 3).reshape(20, 4, 4, 3))
    found = [digest(f"{name}.npy", None) for name in ("elsewhere/renamed", "changed", "split")]
    assert len(set(found)) == 3
    assert digest("shapes") == digest("shapes", 16, 1) != digest("shapes", seed=1)
    zips = set()
    for level in (1, 2):  # one other byte
        with zipfile.ZipFile("set.zip", "w") as archive:
            archive.writestr("a.bmp", encode(np.full((8, 8), level, np.uint8), "BMP"))
        zips.add(digest("set.zip"))
    assert len(zips) == 2


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
    why = r"no images in .*, 1 folder of runs left out \(runs\)"
    refused(why, data.load, tmp_path / "only", 8, 3)


def test_pillow_warnings_do_not_leak(tmp_path, monkeypatch):
    folder_of(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # 64 pixels: Pillow warns, no more
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(data.load(tmp_path, 8, 3)) == 6
        assert data.load(tmp_path, 8, 3, memory_limit=0)[0].shape == (3, 8, 8)


def test_four_threads_read_one_zip(tmp_path):
    """Through one open file: each member is read under a lock, at its place."""
    arrays = [pixels(40, 40, 3, seed=i) for i in range(30)]
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "set.zip", "w", kind) as archive:
            for i, array in enumerate(arrays):
                archive.writestr(f"{i:02}.bmp", encode(array, "BMP"))
        d = data.load(tmp_path / "set.zip", 40, 3, memory_limit=0)
        d._zip = None  # the threads open it, all at the same time
        images = image_files.in_threads(d.__getitem__, list(range(30)) * 10, 4, 50)
        for i, image in enumerate(images):
            assert np.array_equal(hwc(image), arrays[i % 30])


def test_threads_leave_the_filters_of_warnings_as_they_were(tmp_path):
    """catch_warnings swaps them for the whole process: of two threads, the later puts back what it
    found, which was the other's "ignore"."""
    folder_of(tmp_path, 10)
    d = data.load(tmp_path, 8, 3, memory_limit=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        d = image_files.Files(d.paths, 8, 3)
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
