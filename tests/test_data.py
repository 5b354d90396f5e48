"""data.py: pixels and numbers, the built-in shapes, an order that depends on positions alone."""

import shutil
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from conftest import refused
from image_writers import cifar_files, folder_of, hwc, pixels, zip_of
from PIL import Image

import data
from support import image_files, readers


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
    assert d.summary.endswith(f"; built in: for the folder {name}, give ./{name}")
    own = data.load(f"./{name}", 8, 3)
    assert len(own) == 6 and "built in" not in own.summary
    shutil.rmtree(tmp_path / name)
    assert "built in" not in data.load(name, 8, 3).summary


def test_wrong_sources_are_named_in_one_line(tmp_path):
    for name in ("empty", "text only"):
        (tmp_path / name).mkdir()
    for name, content in {
        "text only/a.txt": b"a",
        "page.zip": b"<!DOCTYPE html>",
        "page.npz": b"<!DOCTYPE html>",
        "page.npy": b"<!DOCTYPE html>",
        "cifar-10-python.tar.gz": b"<!DOCTYPE html>",
        "nothing": b"",
        "empty.zip": b"PK\5\6" + bytes(18),
    }.items():
        (tmp_path / name).write_bytes(content)
    with tarfile.open(tmp_path / "other.tar", "w") as tar:
        tar.add(tmp_path / "nothing", "nothing")
    expected = {"empty": "empty folder", "text only": r"no images in .*\.webp"}
    expected |= {"page.zip": "DOCTYP", "empty.zip": "no images in", "other.tar": "data_batch_1"}
    for path in sorted(tmp_path.iterdir()):
        assert str(path) in str(refused(expected.get(path.name), data.load, path, 8, 3))
    refused("absent: no such file or folder", data.load, tmp_path / "absent", 8, 3)
    refused("channels", data.load, "shapes", 8, 4)


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
    levels = torch.arange(n, dtype=torch.uint8)
    return image_files.Array(levels.reshape(n, 1, 1, 1).expand(n, 1, 2, 2))


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
        source = zip_of(tmp_path / "set") if kind == "zip" else tmp_path / "set"
        d = data.load(source, 8, 3, memory_limit=0)
    before = torch.get_rng_state()
    plain = take(data.batches(d, 4, 4, seed=7, rank=1, world_size=2), 8)
    workers = take(data.batches(d, 4, 4, seed=7, rank=1, world_size=2, workers=2), 8)
    assert plain.shape == (8, 2, 3, 8, 8) and torch.equal(plain, workers)
    assert torch.equal(before, torch.get_rng_state())  # the noise of training stays the same


def counted(count=40, bad=None):
    """A data set that is read -> (data set, list of what was read)."""
    d, seen = image_files.Files([f"{i}.png" for i in range(count)], 2, 1), []

    def read(i, check=False):
        seen.append(i)
        if i == bad:
            raise OSError("it has\ngone bad")
        return "L", (2, 2), torch.full((1, 2, 2), i % 256, dtype=torch.uint8)

    d.read = read
    return d, seen


def readers_alive(before):
    """How many of our threads are left, after a moment."""
    until = time.time() + 5
    while threading.active_count() > before and time.time() < until:
        time.sleep(0.01)
    return threading.active_count() - before


def test_threads_read_four_batches_ahead_and_no_more():
    (d, seen), before = counted(1000), threading.active_count()
    stream = data.batches(d, 10, 0, 0, workers=3)
    assert not seen, "nothing begins before the first batch is asked for"
    for n in (1, 2):
        next(stream)
        until = time.time() + 5
        while len(seen) < 10 * (n + data.PREFETCH) and time.time() < until:
            time.sleep(0.01)
        time.sleep(0.05)
        assert len(seen) == 10 * (n + data.PREFETCH)
    stream.close()
    assert readers_alive(before) == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_has_gone_bad_is_one_line(workers):
    (d, _), before = counted(bad=7), threading.active_count()
    stream = data.batches(d, 4, 0, 0, workers=workers)
    with pytest.raises(ValueError, match="^7.png: it has gone bad$"):
        take(stream, 10)
    assert readers_alive(before) == 0


def test_an_array_needs_no_workers():
    with_workers = take(data.batches(numbered(), 4, 0, 0, workers=2), 3)
    assert torch.equal(with_workers, take(data.batches(numbered(), 4, 0, 0), 3))


def test_impossible_batches_are_refused_at_the_call():
    refused("^--batch-size 25 is more than the 24 images", data.batches, numbered(), 25, 0, 0)
    for batch, world in ((8, 3), (0, 1)):
        match = f"^--batch-size {batch} must be divisible by the {world} processes"
        refused(match, data.batches, numbered(), batch, 0, 0, world_size=world)


def test_shapes_depend_on_seed_and_index_alone():
    a, b = data.Shapes(16, 3, seed=1), data.Shapes(16, 3, seed=2)
    assert len(a) == 2**31 and a[7].shape == (3, 16, 16) and a[7].dtype == torch.uint8
    assert torch.equal(a[7], data.Shapes(16, 3, seed=1)[7])
    assert not torch.equal(a[7], a[8]) and not torch.equal(a[7], b[7])
    assert np.array_equal(hwc(a[7]), data.draw_shape((1, 7), 16))
    gray = np.asarray(Image.fromarray(hwc(a[7])).convert("L"))
    assert np.array_equal(data.Shapes(16, 1, seed=1)[7][0].numpy(), gray)
