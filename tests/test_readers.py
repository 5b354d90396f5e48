"""readers.py: sets that are one array, read exactly or refused; downloads, the index of checks."""

import gzip
import hashlib
import os
import struct
import warnings

import numpy as np
import pytest
import torch
from conftest import DATA, refused
from image_writers import cifar_files, hwc, idx, pixels, tar_of
from PIL import Image

import data
from support import readers
from support.images import prepare


NAMES = "x.idx3-ubyte x-ubyte.gz f/train-images-idx3-ubyte.gz f/train-images.idx3-ubyte"


@pytest.mark.parametrize("name", NAMES.split())
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
    assert torch.equal(resized[4], prepare(Image.fromarray(array[4]), 14, 1))


@pytest.mark.parametrize("layout", ["next to it", "inside", "a pipe", "a broken link"])
def test_a_folder_named_like_the_idx_file_hides_nothing(tmp_path, layout):
    """Kaggle's archives: the folder train-images-idx3-ubyte, and the file train-images.idx3-ubyte,
    or the file in the folder."""
    array, labels = pixels(5, 28, 28), struct.pack(">2I", 0x801, 5) + bytes([1, 2, 3, 4, 5])
    for name, content in (("images-idx3", idx(array)), ("labels-idx1", labels)):
        place = tmp_path / f"train-{name}-ubyte"
        if layout == "a pipe":
            os.mkfifo(place)
        elif layout == "a broken link":
            place.symlink_to("nowhere")
        else:
            place.mkdir()
        beside = tmp_path / f"train-{name.replace('-', '.')}-ubyte"
        (place / place.name if layout == "inside" else beside).write_bytes(content)
    assert np.array_equal(data.load(tmp_path, 28, 1).images[:, 0].numpy(), array)
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
    assert torch.equal(other[2], prepare(image, 8, 4 - c))
    assert "4 images" in same.summary and "8x8" in same.summary


def test_npy_with_alpha_and_another_size(tmp_path):
    array = pixels(3, 10, 14, 4)
    np.save(tmp_path / "x.npy", array)
    d = data.load(tmp_path / "x.npy", 8, 3)
    assert torch.equal(d[1], prepare(Image.fromarray(array[1]), 8, 3))
    assert "14x10 -> 3x8x8" in d.summary


def test_npz_keys(tmp_path):
    """As a partial CIFAR-10 comes: images and labels of two parts, and the images' places."""
    one, two = pixels(3, 8, 8, 3), pixels(5, 8, 8)
    np.savez(tmp_path / "one.npz", x=one, labels=np.arange(3))
    np.savez(tmp_path / "two.npz", a=one, b=two, f=np.zeros(3), labels=pixels(8))
    assert np.array_equal(hwc(data.load(tmp_path / "one.npz", 8, 3)[2]), one[2])
    d = data.load(f"{tmp_path}/two.npz:b", 8, 1)
    assert len(d) == 5 and np.array_equal(d[4][0].numpy(), two[4])
    for source in (f"{tmp_path}/two.npz", f"{tmp_path}/two.npz:c"):
        message = str(refused("two.npz:KEY", data.load, source, 8, 3))
        assert "a uint8 (3, 8, 8, 3), b uint8 (5, 8, 8), f float64 (3,)" in message


def test_an_array_of_floats_is_refused_with_the_way_out(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((3, 8, 8), np.float32))
    refused("float32 is not uint8.*astype", data.load, tmp_path / "x.npy", 8, 3)


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar(tmp_path, binary, packed):
    rows = pixels(10, 3072)
    source = tmp_path / ("anything.bin" if packed else "folder")
    if packed:
        members = [*cifar_files(binary, rows)][::-1]  # the order is by number
        tar_of(source, [(f"cifar-10-batches/{name}", content) for name, content in members])
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
        refused("no CIFAR-10 data_batch_3", data.load, source, 32, 3)


def test_a_damaged_archive_is_noticed_by_its_checksum(tmp_path):
    raw = tar_of(tmp_path / "x.tar", cifar_files(True, pixels(10, 3072)), "w").read_bytes()
    packed = bytearray(gzip.compress(raw, 0))  # stored, so that a pixel is a byte
    packed[len(packed) // 2] ^= 1
    (tmp_path / "x.tar.gz").write_bytes(packed)
    refused("CRC", data.load, tmp_path / "x.tar.gz", 32, 3)


def test_download(tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "new folder" / "file.tar.gz"
    source.write_bytes(b"content" * 1000)
    right = hashlib.sha256(source.read_bytes()).hexdigest()
    none = (tmp_path / "none").as_uri()
    for url in (source.as_uri(), none, "http://127.0.0.1:9/x", "nonsense"):
        sha256 = right if url != source.as_uri() else "0" * 64
        message = str(refused(None, readers.download, url, str(target), sha256))
        assert url in message and sha256 in message and str(target) in message
        assert not list(target.parent.iterdir())
    readers.download(source.as_uri(), str(target), right)
    assert [p.name for p in target.parent.iterdir()] == ["file.tar.gz"]
    assert target.read_bytes() == source.read_bytes()


def test_cifar10_by_name_uses_the_cache_and_else_says_where_to_put_it(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(readers, "CIFAR_URL", (tmp_path / "no network").as_uri())
    message = str(refused("put the file with SHA-256", data.load, "cifar10", 32, 3))
    path = tmp_path / "diffusion-data" / "cifar-10-python.tar.gz"
    assert str(path) in message and readers.CIFAR_SHA256 in message
    tar_of(path, cifar_files(False, pixels(10, 3072)))
    assert len(data.load("cifar10", 32, 3)) == 10


def test_real_fashion_mnist():
    """Its first 64 images, in the files as published: see data/README.md."""
    d = data.load(DATA / "fashion-mnist", 32, 1)
    assert d.images.shape == (64, 1, 32, 32) and d.images[:, :, :2].max() == 0
    raw = gzip.open(DATA / "fashion-mnist" / "train-images-idx3-ubyte.gz").read()
    assert raw[16:] == d.images[:, 0, 2:30, 2:30].numpy().tobytes()


def test_the_number_of_indexes_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "INDEXES", 2)
    place = lambda source: str(tmp_path / "checked" / f"{source}.json")  # noqa: E731
    monkeypatch.setattr(readers, "index_path", place)
    for i in range(4):
        readers.remember(str(i), "x", {})
        os.utime(readers.index_path(str(i)), (i, i))
    readers.remember("4", "x", {})
    assert sorted(os.listdir(tmp_path / "checked")) == ["3.json", "4.json"]
