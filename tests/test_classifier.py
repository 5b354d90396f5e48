"""papers/classifier.py: labels from each kind of set, training, and a file that gives the same
features without this code."""

import gzip
import json
import pickle
import struct
from functools import partial

import numpy as np
import pytest
import torch
from conftest import refused
from image_writers import cifar_files, idx, pixels, tar_of, write_folder, zip_of
from torch.testing import assert_close

import data
import metrics
from papers import classifier
from support import readers


def bars(n, size=8, seed=0, channels=1):
    """Noisy images uint8 (n, C, size, size): class 0 has a bright row, 1 a bright column, 2
    neither. Anywhere, so that no single pixel tells."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    images = rng.normal(80, 20, (n, channels, size, size))
    for image, label, place in zip(images, labels, rng.integers(1, size - 1, n), strict=True):
        if label < 2:
            image[(slice(None), place) if label == 0 else (..., place)] += 100
    return torch.from_numpy(images.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)


def idx_files(folder, images, labels, packed=True, name="train"):
    """An IDX pair: images (N, H, W) and labels (N,), as Fashion-MNIST has them."""
    folder.mkdir(exist_ok=True)
    pack, suffix = (gzip.compress, ".gz") if packed else (bytes, "")
    (folder / f"{name}-images-idx3-ubyte{suffix}").write_bytes(pack(idx(images)))
    raw = struct.pack(">2I", 0x801, len(labels)) + bytes(labels)
    (folder / f"{name}-labels-idx1-ubyte{suffix}").write_bytes(pack(raw))
    return folder / f"{name}-images-idx3-ubyte{suffix}"


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path, packed):
    images, labels = pixels(5, 8, 8), [3, 0, 9, 9, 1]
    path = idx_files(tmp_path / "set", images, labels, packed)
    idx_files(tmp_path / "set", images[:2], [7, 7], packed, "t10k")  # not for training
    for source in (path, path.parent):
        found, y, names = classifier.load_labelled(source, None, 1)
        assert np.array_equal(found[:, 0].numpy(), images)
        assert y.tolist() == labels and y.dtype == torch.int64 and len(names) == 10
    resized, y, _ = classifier.load_labelled(path, 4, 3)
    assert resized.shape == (5, 3, 4, 4) and y.tolist() == labels
    test = tmp_path / "set" / f"t10k-images-idx3-ubyte{'.gz' if packed else ''}"
    assert classifier.load_labelled(test, None, 1)[1].tolist() == [7, 7], "a file given by name"


def test_class_folders(tmp_path):
    """Labels in the order of the folders' names, also from a zip."""
    images = pixels(6, 8, 8, 3)
    for kind, some in (("wolf", [5, 0]), ("cat", [3, 1]), ("dog", [2]), ("dog/x", [4])):
        write_folder(tmp_path / "set" / kind, images[some])
    # sorted: cat/0 cat/1 dog/0 dog/x/0 wolf/0 wolf/1, and dog/x is a class of its own
    for source in (tmp_path / "set", zip_of(tmp_path / "set")):
        found, y, names = classifier.load_labelled(source, None, 3)
        assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), images[[3, 1, 2, 4, 5, 0]])
        assert y.tolist() == [0, 0, 1, 2, 3, 3]
        assert [name.split("/")[-1] for name in names] == ["cat", "dog", "x", "wolf"]


@pytest.mark.parametrize("binary", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar(tmp_path, monkeypatch, binary, packed):
    rows, labels = pixels(10, 3072), [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    source = tmp_path / "diffusion-data" / "cifar-10-python.tar.gz"  # or a folder of this name
    files = [*cifar_files(binary, rows, labels)][::-1]
    source.parent.mkdir()
    if packed:
        tar_of(source, [(f"cifar-10-batches/{name}", content) for name, content in files])
    else:
        source.mkdir()
        for name, content in files:
            (source / name).write_bytes(content)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for given in (source, "cifar10"):
        images, y, names = classifier.load_labelled(given, None, 3)
        assert np.array_equal(images.numpy(), rows.reshape(10, 3, 32, 32))
        assert y.tolist() == labels and len(names) == 10


def test_sets_without_labels(tmp_path):
    refuse = lambda match, source: refused(match, classifier.load_labelled, source, None, 3)  # noqa: E731
    images = pixels(3, 8, 8, 3)
    write_folder(tmp_path / "flat", images)
    np.save(tmp_path / "x.npy", images)
    np.savez(tmp_path / "x.npz", images=images)
    refuse("3 labels and 1 classes do not fit", tmp_path / "flat")
    for source in (tmp_path / "x.npy", tmp_path / "x.npz", f"{tmp_path / 'x.npz'}:images"):
        refuse("no labels next to", source)
    refuse("no such file", tmp_path / "none")

    path = idx_files(tmp_path / "set", pixels(4, 8, 8), [0, 1, 0, 1])
    labels = tmp_path / "set" / "train-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    raw = gzip.decompress(whole)
    broken = [gzip.compress(content) for content in (raw[:-1], raw[:6], raw + b"\0", b"")]
    for content in (*broken, whole[:-12], whole[:15], b"", b"<html>"):
        labels.write_bytes(content)
        refuse("train-labels", path)
    idx_files(tmp_path / "set", pixels(4, 8, 8), [0, 1, 0])
    refuse("4 images, 3 labels", path)
    idx_files(tmp_path / "set", pixels(4, 8, 8), [0, 0, 0, 0])
    refuse("1 classes do not fit", path)
    labels.unlink()
    refuse("no labels next to", path.parent)

    # Pickles that hold pixels alone can be trained on, but not by a classifier.
    (tmp_path / "cifar").mkdir()
    for i in range(1, 6):
        content = pickle.dumps({b"data": pixels(2, 3072, seed=i)})
        (tmp_path / "cifar" / f"data_batch_{i}").write_bytes(content)
    assert len(data.load(tmp_path / "cifar", 32, 3)) == 10
    refuse("10 images, 0 labels and 0 classes do not fit", tmp_path / "cifar")
    assert len(readers.read_labels(tmp_path / "cifar")) == 0


def test_drawings_are_their_own_labels(monkeypatch):
    """The label is found without drawing; colour and area of the drawing say the same."""
    monkeypatch.setattr(classifier, "SHAPES", 80)
    images, labels, names = classifier.load_labelled("shapes", 32, 3)
    assert images.shape == (80, 3, 32, 32) and set(labels.tolist()) == set(names)
    colours = torch.tensor(data.SHAPE_COLOURS).float()
    middle = images[:, :, 15:17, 15:17].float().mean((2, 3))  # (80, 3)
    assert_close(labels % len(colours), (middle[:, None] - colours).norm(dim=2).argmin(1))
    ground = images.float()[:, :, :1, :1]
    area = ((images - ground).abs().amax(1) > 20).float().mean((1, 2))
    kinds = labels // len(colours)
    square, star = (data.SHAPE_NAMES.index(name) for name in ("square", "star"))
    assert area[kinds == square].min() > area[kinds == star].max()


def test_features_are_64_means_of_what_the_last_layer_sees():
    net = classifier.Classifier(10).eval()
    x = torch.rand((3, 3, 13, 9), generator=torch.Generator().manual_seed(0)) * 2 - 1
    f = net.features(x)
    assert f.shape == (3, 64) and (f >= 0).all()
    assert_close(net(x), f @ net.out.weight.T + net.out.bias)
    assert net.convolutions(x).shape == (3, 64, 4, 3), "twice halved"
    assert classifier.Features(net)(x).equal(f)


@pytest.fixture(scope="module")
def trained():
    images, labels = bars(600)
    return classifier.fit(images, labels, 3, epochs=4, batch=50, seed=1)


def test_training_names_what_it_has_not_seen(trained):
    images, labels = bars(300, seed=99)
    assert not trained.training
    assert classifier.accuracy(trained, images, labels, batch=77) > 0.95
    assert classifier.accuracy(trained, images, (labels + 1) % 3) < 0.05
    untrained = classifier.Classifier(3).eval()
    assert classifier.accuracy(untrained, images, labels) < 0.7
    share = classifier.accuracy(trained, images[:7], labels[:7].roll(1))
    x = data.to_float(images[:7]).expand(-1, 3, -1, -1)
    assert share == (trained(x).argmax(1) == labels[:7].roll(1)).sum().item() / 7


def test_the_same_seed_gives_the_same_weights():
    images, labels = bars(120)

    def state(seed):
        torch.rand(3)  # whatever was drawn before
        return classifier.fit(images, labels, 3, epochs=2, batch=32, seed=seed).state_dict()

    one, again, other = state(0), state(0), state(5)
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not torch.equal(one["out.weight"], other["out.weight"])


def test_every_epoch_has_its_steps(monkeypatch):
    """Also where the bar is switched off (TQDM_DISABLE), and with fewer images than a batch."""
    monkeypatch.setattr(classifier, "tqdm", partial(classifier.tqdm, disable=True))
    for n, batch, steps in ((50, 16, 2 * 3), (10, 128, 2)):
        images, labels = bars(n)
        net = classifier.fit(images, labels, 3, epochs=2, batch=batch)
        assert net.convolutions[1].num_batches_tracked == steps


def test_the_exported_file_gives_the_same_features(trained, tmp_path):
    """For other batches and other sides than it was exported with."""
    path = tmp_path / "x.pt2"
    classifier.export(trained, path, 8)
    net = torch.export.load(path).module()
    for n, side in ((1, 8), (2, 8), (5, 8), (3, 12), (1, 32), (4, 9)):
        x = torch.rand((n, 3, side, side), generator=torch.Generator().manual_seed(n)) * 2 - 1
        with torch.no_grad():
            assert_close(net(x), trained.features(x), rtol=1e-5, atol=1e-6)
    assert list(tmp_path.iterdir()) == [path]
    classifier.export(trained, path, 8, logits=True)
    with torch.no_grad():
        assert_close(torch.export.load(path).module()(x), trained(x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_from_the_program_to_a_distance(tmp_path, monkeypatch, capsys):
    images, labels = bars(1000)
    idx_files(tmp_path / "set", images[:, 0].numpy(), labels.tolist())
    np.save(tmp_path / "same.npy", bars(200, seed=5)[0][:, 0].numpy())
    np.save(tmp_path / "noise.npy", pixels(200, 8, 8))
    monkeypatch.chdir(tmp_path)
    classifier.main("set --channels 1 --epochs 5 --out bars.pt2".split())
    out = capsys.readouterr().out
    assert "900 images of 3 classes, 8 pixels wide" in out and "of 100 held-out images" in out
    assert float(out.split("; ")[1].split("%")[0]) > 80
    assert f"features: {tmp_path / 'bars.pt2'}" in out
    assert "python metrics.py fid RUN set --features bars.pt2" in out
    distance = {}
    for name in ("same.npy", "noise.npy", "set"):
        metrics.main(["fid", name, "set", "--features", "bars.pt2", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert found["metric"] == "FD(bars.pt2)" and found["sides"][1]["n"] == 1000
        distance[name] = found["value"]
    assert distance["set"] <= 1e-9
    assert 20 * distance["same.npy"] < distance["noise.npy"]
