r"""Bad input never produces a wrong number: every file of a corpus is used rightly, or named.

bad_images.py writes the image files; zips and arrays are made here. What test_image_files.py and
test_readers.py refuse already is not repeated.
"""

import builtins
import contextlib
import gzip
import io
import os
import pickle
import re
import signal
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import bad_images
import numpy as np
import pytest
from conftest import peak_below
from image_writers import PICTURE, encode, hwc, idx, pixels, tar_of
from PIL import Image

import data
from support import image_files, readers
from support.images import prepare

SIDE = bad_images.SIDE
GOOD = encode(PICTURE)
pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow's, of files as bad as these


@contextlib.contextmanager
def in_time(seconds=20):
    """A file that is still being read after so long fails the test; most take a fraction of 1 s."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"still being read after {seconds} s"))
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def load(path, size=SIDE, channels=3, **options):
    with in_time():
        return data.load(path, size, channels, **options)


def refused(path, word="", function=load, **options):
    """The one line, naming the file, in which it is refused; any other exception is a failure."""
    with pytest.raises((ValueError, OSError)) as info:
        function(path, **options)
    message = str(info.value)
    assert len(message.splitlines()) == 1 and message.isprintable(), message
    message.encode()  # else print would stop
    assert readers.printable(str(path)) in message and re.search(word, message), message
    return message


def assert_is(image, array):
    assert np.array_equal(hwc(image), array)


# ------------------------------------------------------------------ files


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return folder, bad_images.make(folder)


@pytest.fixture(scope="module")
def outcomes(corpus):
    """{name: pixels, or why it is refused} of each file of a known suffix, loaded alone."""
    folder, expected = corpus
    found = {}
    for name in (n for n, e in expected.items() if e.what in ("used", "named", "either")):
        path = os.path.join(folder, name)
        try:
            found[name] = hwc(load(path)[0])
        except Exception:
            found[name] = refused(path, skip_bad=True).split(readers.printable(path))[-1]
    return found


def test_each_file_is_used_rightly_or_named(corpus, outcomes):
    """And named if it goes bad later (but rows are counted once, at the start)."""
    folder, expected = corpus
    kinds = Counter(expect.what for expect in expected.values())
    assert kinds == {"used": 75, "named": 42, "either": 10, "left out": 9, "hidden": 5}
    wrong = []
    for name, outcome in outcomes.items():
        expect = expected[name]
        if isinstance(outcome, str):
            if expect.what == "used" or expect.word not in outcome:
                wrong.append(f"{name!a}: {outcome}")
            if "missing" not in outcome:
                path = os.path.join(folder, name)
                with in_time():
                    refused(path, function=lambda path: image_files.Files([path], SIDE, 3)[0])
        elif expect.what == "named":
            wrong.append(f"{name!a}: used")
        elif np.abs(outcome - expect.pixels.astype(float)).max() > expect.tolerance:
            wrong.append(f"{name!a}: other pixels {outcome[0, :2]}, not {expect.pixels[0, :2]}")
    assert not wrong, "\n".join(wrong)


def test_none_of_a_folder_is_lost(corpus, outcomes):
    folder = corpus[0]
    bad = [name for name, outcome in outcomes.items() if isinstance(outcome, str)]
    message = refused(folder, "first|and [0-9]+ more")
    assert f"{len(bad)} of {len(outcomes)} images cannot be read: " in message
    assert f" and {len(bad) - 5} more; --skip-bad-images" in message
    for name in sorted(os.path.join(folder, name) for name in bad)[:5]:
        assert readers.printable(name) in message
    tail = f", {len(bad)} bad skipped, 9 other files left out (no suffix 3, .heic 2, .\\udcff\\n 1"
    for limit in (0, 2**30):
        d = load(folder, skip_bad=True, memory_limit=limit)
        assert len(d) == len(outcomes) - len(bad)
        assert d.summary.endswith(tail + ", ...)") and d.summary.isprintable()
        for path, image in zip(d.paths, d, strict=False):
            assert_is(image, outcomes[os.path.relpath(path, folder)])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "LZW", "PPM"])
def test_cut_anywhere(kind):
    """An error (that it is named, the corpus tests); or all the pixels, if little is cut."""

    def decoded(content):
        files = image_files.Files(["x"], SIDE, 3)
        files.content = lambda i: content
        return hwc(files.read(0, check=True)[2])

    lzw = ("TIFF", dict(compression="tiff_lzw")) if kind == "LZW" else (kind, {})
    content = encode(PICTURE, lzw[0], **lzw[1])
    whole = decoded(content)
    for at in range(0, len(content), 1 if len(content) < 300 else 7):
        with contextlib.suppress(Exception):
            found = decoded(content[:at])
            if at <= 0.7 * len(content) or not np.array_equal(found, whole):
                pytest.fail(f"cut at {at} of {len(content)}")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(GOOD)
    true_open = builtins.open

    def forbidding(path, *args, **options):
        if str(path).endswith("a.png"):
            raise PermissionError(13, "Permission denied", path)
        return true_open(path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", forbidding)
        assert "1 of 2 images" in refused(tmp_path, r"a\.png \(.*Permission denied")
        assert len(load(tmp_path, skip_bad=True)) == 1
    # the size in the header of a broken file does not count for the others
    (tmp_path / "a.png").write_bytes(encode(pixels(64, 64, 3))[:2000])
    d = load(tmp_path, size=None, skip_bad=True)
    assert d.images.shape == (1, 3, SIDE, SIDE) and "1 bad skipped" in d.summary


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000), (100, 30000)])
def test_long_images_need_little_memory(size, monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, s, *a: sizes.append(s) or resize(self, s, *a)
    )
    assert prepare(Image.new("RGB", size), 256, 3).shape == (3, 256, 256)
    assert sizes and max(map(max, sizes)) <= 8 * 256


def test_images_up_to_eight_to_one_keep_their_pixels():
    """And longer ones lose nothing but what the filter cannot reach."""
    for width, height, size in ((128, 16, 8), (16, 128, 32), (40, 30, 16), (640, 16, 8)):
        image, scale = Image.fromarray(pixels(height, width, 3)), size / min(width, height)
        sides = round(width * scale), round(height * scale)
        left, top = (sides[0] - size) // 2, (sides[1] - size) // 2
        large = image.resize(sides, Image.Resampling.LANCZOS)
        plain = large.crop((left, top, left + size, top + size))
        assert_is(prepare(image, size, 3), np.asarray(plain))


def test_other_sources_that_would_hang(tmp_path):
    """A pipe in place of a file, a folder's IDX file, a batch; and links without an end."""
    os.mkfifo(tmp_path / "pipe.zip")
    for path in (tmp_path / "pipe.zip", "/dev/zero"):
        refused(path, "neither a file nor a folder")
    (tmp_path / "idx").mkdir()
    os.mkfifo(tmp_path / "idx" / "train-images-idx3-ubyte")
    refused(tmp_path / "idx", "not a regular file")
    for i, make in enumerate((os.mkfifo, os.mkdir, lambda path: os.symlink(path, path))):
        folder = tmp_path / f"cifar{i}"
        folder.mkdir()
        make(folder / "data_batch_1")
        refused(folder, "data_batch_1: .*not a regular file")
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    refused(tmp_path / "loop", "no such file")


def test_no_images_says_what_there_was(tmp_path):
    for name in ("a.heic", "b.avif", "c.jxl", "d.txt", "d"):
        (tmp_path / name).write_bytes(GOOD)
    refused(tmp_path, r"\.pgm\), 5 other files left out \(\.avif 1, \.heic 1, \.jxl 1, \.\.\.\)$")
    (tmp_path / "one\nline").mkdir()
    refused(tmp_path / "one\nline", "empty folder")
    refused(os.path.join(tmp_path, os.fsdecode(b"gone \xff")), "no such file")


# ------------------------------------------------------------------ zips


def zipped(path, *members, **options):
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in members:  # it warns of names given twice
            archive.writestr(name, content)
    return path


def patched(path, local, central, form, value):
    """Overwrite a field of the first member's two headers, at these offsets -> the path."""
    raw = bytearray(path.read_bytes())
    struct.pack_into(form, raw, local, value)
    struct.pack_into(form, raw, raw.index(b"PK\1\2") + central, value)
    path.write_bytes(raw)
    return path


def declaring(path, size):
    """Let the first member declare so many bytes."""
    return patched(path, 22, 24, "<I", size)


def test_names_that_lead_elsewhere_are_read_from_memory(tmp_path):
    names = ["../../x.png", "/abs/x.png", "C:\\x.png", "..\\x.png", "a/../b.png", "./c.png"]
    names += ["new\nline.png", "a/.../d.png"]
    (tmp_path / "deep" / "er").mkdir(parents=True)
    path = zipped(tmp_path / "deep" / "er" / "set.zip", *((name, GOOD) for name in names))
    before = sorted(tmp_path.rglob("*"))
    d = load(path)
    assert len(d) == 7 and "left out" not in d.summary  # "..." is hidden: it does not count
    for image in d.images:
        assert_is(image, PICTURE)
    assert sorted(tmp_path.rglob("*")) == before and not os.path.exists("/abs/x.png")


@pytest.mark.parametrize("declared", [2**30 + 1, 3 * 2**30])
def test_a_member_that_declares_gigabytes_is_not_inflated(tmp_path, declared):
    path = declaring(zipped(tmp_path / "x.zip", ("x.png", GOOD), ("y.png", GOOD)), declared)
    refused(path, rf"1 of 2 images.*x\.png \({declared:,} bytes are too many")
    assert load(path, skip_bad=True).summary.endswith("1 bad skipped")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_of_another_size_than_it_declares(tmp_path, method):
    deflated = method == zipfile.ZIP_DEFLATED  # the others give all they have at once
    content = GOOD + bytes(2**26 if deflated else 2**22)
    path = declaring(zipped(tmp_path / "x.zip", ("x.png", content), compression=method), 1000)
    with peak_below(2**24 if deflated else 2**40):
        refused(path, r"x\.png \(Bad CRC")
    path = zipped(tmp_path / "less.zip", ("x.png", GOOD), compression=zipfile.ZIP_DEFLATED)
    assert_is(load(declaring(path, len(GOOD) + 1000))[0], PICTURE)
    refused(zipped(tmp_path / "none.zip", ("x.png", b"")), r"x\.png \(empty file\)")


@pytest.mark.parametrize(
    "local, central, form, value, word",
    [
        (6, 8, "<H", 1, "encrypted"),
        (8, 10, "<H", 97, "compression"),
        (14, 16, "<I", 12345, "CRC"),
        (0, 42, "<I", 2**31, "x.png"),  # the member would begin beyond the end
        (0, 4, "<I", 0, "x.png"),  # no header of a member
    ],
)
def test_members_that_cannot_be_read_are_named(tmp_path, local, central, form, value, word):
    path = zipped(tmp_path / "set.zip", ("x.png", GOOD), ("y.png", GOOD))
    patched(path, local, central, form, value)
    refused(path, rf"of 2 images cannot be read.*x\.png \(.*{word}" if word != "x.png" else word)
    assert len(load(path, skip_bad=True)) == 1


def test_nothing_in_a_zip_is_lost(tmp_path):
    """Nor read if it is cut short."""
    inner = zipped(tmp_path / "inner.zip", ("x.png", GOOD)).read_bytes()
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    first = pixels(SIDE, SIDE, 3)
    one, two = encode(first), encode(pixels(SIDE, SIDE, 3, seed=1))
    members = [("d.png", one), ("x.png", one), ("x.png", two), ("inner.zip", inner)]
    members += [("folder.png/", b""), ("__MACOSX/._d.png", b"?"), (link, b"d.png"), ("a.txt", b"")]
    path = zipped(tmp_path / "set.zip", *members)
    message = refused(path, r"3 of 4 images.*link\.png \(not an image")
    assert message.count("x.png (2 members of the zip have this name)") == 2
    d = load(path, skip_bad=True)
    assert d.paths == ["d.png"]
    assert_is(d[0], first)
    assert d.summary.endswith(", 3 bad skipped, 2 other files left out (.txt 1, .zip 1)")
    path = zipped(tmp_path / "nested.zip", ("inner.zip", inner))
    refused(path, r"no images in .*, 1 other file left out \(\.zip 1\)")
    raw = zipped(tmp_path / "cut.zip", *((f"{i}.png", GOOD) for i in range(5))).read_bytes()
    for part in (0.1, 0.5, 0.9, 0.99):
        (tmp_path / "cut.zip").write_bytes(raw[: int(len(raw) * part)])
        refused(tmp_path / "cut.zip")


def test_comments_prefixes_and_a_zip_behind_an_image(tmp_path):
    path = zipped(tmp_path / "set.zip", ("x.png", GOOD))
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"a comment\n" * 999
    assert len(load(path)) == 1
    raw = path.read_bytes()
    path.write_bytes(b"#!/bin/sh\nexit\n" + raw)
    assert_is(load(path)[0], PICTURE)
    first = pixels(SIDE, SIDE, 3)
    (tmp_path / "photo.png").write_bytes(encode(first) + raw)  # an image, whatever hides behind
    assert_is(load(tmp_path / "photo.png")[0], first)


# ------------------------------------------------------------------ IDX


SOME = pixels(3, 8, 8)
IDX = {
    "empty": b"",
    "magic alone": b"\0\0\x08\x03",
    "header alone": idx(SOME)[:16],
    "one byte short": idx(SOME)[:-1],
    "one byte long": idx(SOME) + b"\0",
    "an image long": idx(SOME) + bytes(64),
    "other magic": idx(SOME, 0x12340803),
    "floats": idx(SOME, 0xD03),
    "labels": struct.pack(">2I", 0x801, 3) + b"\0\1\2",
    "four axes": struct.pack(">5I", 0x804, 1, 3, 8, 8) + SOME.tobytes(),
    "no images": idx(SOME[:0]),
    "no height": idx(SOME[:, :0]),
    "2^31 images": struct.pack(">4I", 0x803, 2**31, 28, 28) + bytes(999),
    "largest": struct.pack(">4I", 0x803, *[2**32 - 1] * 3),
    "little endian": struct.pack("<4I", 0x803, 3, 8, 8) + SOME.tobytes(),
}


def broken_gzips():
    """Cut, and with flipped bits."""
    whole = gzip.compress(idx(pixels(30, 8, 8)), 0)
    n = len(whole)
    for at in (3, 9, 12, 20, n // 2, n - 8, n - 1):
        yield f"cut at {at}", whole[:at]
    for at in (2, 12, n // 2, n - 6, n - 2):
        yield f"flipped at {at}", whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]


IDX |= {f"{name}, gz": gzip.compress(content) for name, content in IDX.items()}
IDX |= dict(broken_gzips())


@pytest.mark.parametrize("name", IDX)
def test_idx_files_that_lie(tmp_path, name):
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(IDX[name])
    for size in (8, None, 32):
        refused(path, size=size)
        refused(tmp_path, size=size)


# ------------------------------------------------------------------ NumPy


def npy(header, body=b""):
    """A .npy of version 1 by hand."""
    header = header.encode() if isinstance(header, str) else header
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + body


def described(shape, body=b"", descr="|u1"):
    return npy(repr({"descr": descr, "fortran_order": False, "shape": shape}) + "\n", body)


NPY = {
    "10^12 elements": described((10**12, 1, 1), bytes(99)),
    "10^15 elements": described((10**9, 1000, 1000), bytes(99)),
    "2^64 elements": described((2**32, 2**32, 1), bytes(99)),
    "beyond int64": described((2**70, 8, 8), bytes(99)),
    "one short": described((3, 8, 8), bytes(191)),
    "one long": described((3, 8, 8), bytes(193)),
    "two arrays": described((3, 8, 8), bytes(192)) * 2,
    "negative": described((-1, 8, 8), bytes(192)),
    "no tuple": described("text"),
    "no header": npy(""),
    "no dictionary": npy("[1, 2]\n"),
    "no Python": npy("{'descr': \n"),
    "a call": npy("__import__('os').system('touch owned')\n"),
    "bytes": npy(b"\xff\xfe\0\n"),
    "deep": npy("(" * 9000 + "\n"),
    "an unknown type": described((3, 8, 8), descr="zz9"),
    "objects": described((3,), pickle.dumps([1, 2, 3]), descr="|O"),
    "version 9": b"\x93NUMPY\x09\0" + bytes(99),
    "magic alone": b"\x93NUMPY",
}


def saved(text):
    """`np.save` of zeros of a shape and type."""
    (shape, _, kind), file = text.partition(" "), io.BytesIO()
    np.save(file, np.zeros([int(n) for n in shape.split(",") if n], kind or "u1"))
    return file.getvalue()


# The fifth is one image, which would pass for 28 of 24x3.
SHAPES = "8,8|8||2,3,8,8,3|28,24,3|3,8,8 i1|3,8,8 u2|3,8,8 ?|3,8,8 S1|3,8,8 u1,u1|3,0,8|3,8,8,0"
NPY |= {f"shape {text}": saved(text) for text in SHAPES.split("|")}


@pytest.mark.parametrize("name", NPY)
def test_npy_files_that_lie(here, name):
    Path("x.npy").write_bytes(NPY[name])
    zipped(here / "x.npz", ("x.npy", NPY[name]))
    for size in (8, None):
        refused(here / "x.npy", size=size)
        refused(here / "x.npz", size=size)
        refused("x.npz", function=lambda path, size=size: load(f"{path}:x", size=size))
    assert sorted(os.listdir()) == ["x.npy", "x.npz"], "nothing in a file is executed"


def test_npz_archives(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=pixels(30, 8, 8))
    raw = path.read_bytes()
    for at in (4, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:at])
        refused(path, size=8)
    broken = bytearray(raw)
    broken[len(raw) // 2] ^= 1
    path.write_bytes(broken)
    refused(path, "CRC", size=8)
    array, notes = ("x.npy", described((3, 8, 8), SOME.tobytes())), ("notes.txt", b"no array")
    refused(zipped(path, array, array), "same name", size=8)
    refused(zipped(path, notes), "from none", size=8)
    zipped(path, notes, array)
    np.save(tmp_path / "f.npy", np.asfortranarray(SOME))  # columns first: NumPy puts it right
    for name in ("x.npz", "f.npy"):
        images = load(tmp_path / name, size=8, channels=1).images
        assert np.array_equal(images[:, 0].numpy(), SOME)
    np.save(tmp_path / "g.npy", pixels(5, 4, 4))  # small, but squares: no image of 4 channels
    assert len(load(tmp_path / "g.npy", size=4, channels=1)) == 5


# ------------------------------------------------------------------ CIFAR-10

ROWS = pixels(2, 3072)
FINE = pickle.dumps({b"data": ROWS, b"labels": [3, 5]})


class Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


BATCHES = {  # name: what is pickled
    "3071 columns": {b"data": ROWS[:, 1:]},
    "one axis": {b"data": ROWS.reshape(-1)},
    "three columns": {b"data": ROWS.reshape(-1, 3)},  # as many bytes as two images
    "images": {b"data": ROWS.reshape(2, 32, 32, 3)},
    "floats": {b"data": ROWS / 255},
    "objects": {b"data": np.full((2, 3072), 7, object)},
    "no data": {b"labels": [3, 5]},
    "text keys": {"data": ROWS},
    "a list of rows": {b"data": ROWS.tolist()},
    "one label": {b"data": ROWS, b"labels": [3]},
    "labels of text": {b"data": ROWS, b"labels": ["a", "b"]},
    "labels of halves": {b"data": ROWS, b"labels": [0.5, 1.5]},
    "ragged labels": {b"data": ROWS, b"labels": [[1, 2], [3]]},
    "None": None,
}
PICKLES = {  # name: bytes
    "other codec": b"c_codecs\nencode\n(X\1\0\0\0aX\5\0\0\0rot13tR.",
    "recursion": b"(" * 10**5 + b".",
    "huge bytes": b"\x80\4\x8e" + struct.pack("<Q", 2**60) + b"x.",
    "huge frame": b"\x80\4\x95" + struct.pack("<Q", 2**60) + b"N.",
    "empty": b"",
    "stop": b".",
    "persistent": b"Psomewhere\n.",
    "extension": b"\x80\2\x82\1.",
    "huge array": b"cnumpy\nndarray\n((I1000000000\nI1000000000\ntcnumpy\ndtype\n(X\2\0\0\0u1tRtR.",
    "text": b"<!DOCTYPE html>",
}
BAD_BATCHES = {name: pickle.dumps(value) for name, value in BATCHES.items()} | PICKLES


def folder_of_batches(folder, content):
    """Five batches, the fourth of them with this content."""
    folder.mkdir(exist_ok=True)
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(content if i == 4 else FINE)
    return folder


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_batches_that_are_not_what_they_should_be(tmp_path, name):
    folder = folder_of_batches(tmp_path / "set", BAD_BATCHES[name])
    refused(folder, "data_batch_4", size=32)
    refused(folder, "data_batch_4", readers.read_labels)


CALLS = [(os.system, "touch owned"), (eval, "open('owned', 'w')"), (open, "owned", "w")]
CALLS += [(np.lib.format.open_memmap, "owned", "w+", "u1", (1,)), (np.load, "owned")]
CALLS += [(getattr, os, "system"), (bytearray, 10**9)]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call[0].__name__)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_no_pickle_runs_anything(here, call, protocol):
    try:
        content = pickle.dumps({b"data": Calls(*call)}, protocol)
    except Exception:  # a module is an argument
        content = b"cbuiltins\ngetattr\n(cos\nX\x06\0\0\0systemtR."
    folder = folder_of_batches(here / "set", content)
    refused(folder, "refused: the pickle asks for", size=32)
    refused(folder, "refused: the pickle asks for", readers.read_labels)
    assert not Path("owned").exists()


def test_pickles_of_every_protocol_are_read(tmp_path):
    for protocol in range(5):  # 5 keeps arrays otherwise; the official files have 2
        content = pickle.dumps({b"data": ROWS, b"labels": [3, 5]}, protocol)
        folder = folder_of_batches(tmp_path / "set", content)
        assert np.array_equal(load(folder, size=32).images[6:8].reshape(2, 3072).numpy(), ROWS)
        assert readers.read_labels(folder).tolist() == [3, 5] * 5


FIVE = [(f"cifar/data_batch_{i}", FINE) for i in range(1, 6)]


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "FIFOTYPE", "DIRTYPE"])
def test_tars_with_something_else_of_that_name(tmp_path, kind):
    odd = tarfile.TarInfo("cifar/data_batch_1")
    odd.type, odd.linkname = getattr(tarfile, kind), "/etc/passwd"
    path = tar_of(tmp_path / "x.tar.gz", [odd, *FIVE[1:]])
    refused(path, "no CIFAR-10 data_batch_1", size=32)
    refused(path, "no CIFAR-10 data_batch_1", readers.read_labels)


def test_tars_that_are_cut_double_or_huge(tmp_path):
    path, flat = tar_of(tmp_path / "x.tar.gz", FIVE), tar_of(tmp_path / "x.tar", FIVE, "w")
    assert len(load(path, size=32)) == 10
    raw = path.read_bytes()
    for part in (0.05, 0.5, 0.9, 0.999):
        path.write_bytes(raw[: int(len(raw) * part)])
        refused(path, size=32)
        refused(path, function=readers.read_labels)
    raw = flat.read_bytes()
    for at in (100, 600, len(raw) // 2):
        flat.write_bytes(raw[:at])
        refused(flat, size=32)
    refused(tar_of(path, [*FIVE, ("other/data_batch_2", FINE)]), "data_batch_2 more than once")
    info = tarfile.TarInfo("cifar/data_batch_1")
    info.size = 2**40
    flat.write_bytes(info.tobuf() + bytes(2000))
    refused(flat, "declares 1,099,511,627,776 bytes")
    refused(tar_of(path, [("../../data_batch_1", FINE), *FIVE[1:4]]), "no CIFAR-10 data_batch_5")
    path.write_bytes(gzip.compress(zlib.compress(b"no tar")))
    refused(path)


def test_binary_batches_of_another_length(tmp_path):
    batches = [tmp_path / f"data_batch_{i}.bin" for i in range(1, 6)]
    for batch in batches:
        batch.write_bytes(bytes(3073 * 2))
    batches[2].write_bytes(bytes(3073 * 2 - 1))
    refused(tmp_path, r"data_batch_3\.bin has other records", size=32)
    batches[2].write_bytes(bytes(3073))
    assert len(load(tmp_path, size=32)) == 9
    (tmp_path / "data_batch_3").write_bytes(FINE)
    refused(tmp_path, "data_batch_3 more than once", size=32)
    (tmp_path / "data_batch_3").unlink()
    for batch in batches:
        batch.write_bytes(b"")
    refused(tmp_path, "no images", size=32)
