"""inception.py: reference numbers, every pool, and the errors about files of other contents."""

import copy
import functools
import hashlib
import io
import json
import zlib

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import fill
from conftest import DATA, refused
from support import inception

MIXED = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")


@functools.cache
def golden_weights():
    """Made by formula from each tensor's name, so that a wrong name gives wrong features. They are
    rounded to float32, as those behind the numbers were."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in inception.Inception().state_dict().items()}
    state = {key: torch.from_numpy(value) for key, value in fill.state(shapes).items()}
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


@functools.cache
def lively():
    """Random weights that keep the map's variance, so that all of it reaches the output. (PyTorch's
    own shrink it in each layer.)"""
    torch.manual_seed(0)
    net = inception.Inception()
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return net


def images(n, height=32, width=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (n, 3, height, width or height)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


@pytest.mark.parametrize(
    "name, dtype, rtol", [("A32", torch.float32, 1e-4), ("A64", torch.float64, 1e-9)]
)
def test_golden(name, dtype, rtol):
    net = inception.Inception().to(dtype)
    net.load_state_dict(golden_weights(), strict=True)
    gold = json.loads((DATA / "inception.json").read_text())[name]
    x = fill.image(name, gold["n"], gold["size"])
    assert x.sum() == gold["image_sum"]
    pool3, logits = net(torch.from_numpy(x).permute(0, 3, 1, 2))
    assert pool3.shape == (gold["n"], 2048) and logits.shape == (gold["n"], 1008)
    assert pool3.dtype == logits.dtype == dtype
    for key, got in {
        "pool3_first8": pool3[:, :8],
        "logits_nobias_first8": logits[:, :8],
        "pool3_mean": pool3.mean(1),
        "pool3_std": pool3.std(1),
    }.items():
        assert_close(got, torch.tensor(gold[key], dtype=dtype), rtol=rtol, atol=0, msg=key)


def test_names_shapes_and_counts():
    net = inception.Inception()
    state, count = net.state_dict(), sum(p.numel() for p in net.parameters())
    assert len(state) == 566 and count == 23_850_960
    assert count - sum(p.numel() for p in net.fc.parameters()) == 21_785_568
    # All of them at once. The golden numbers, made from names and shapes, vouch for this one.
    listing = "\n".join(sorted(f"{key} {tuple(value.shape)}" for key, value in state.items()))
    assert zlib.crc32(listing.encode()) == 3345377154


def neighbours(x):
    """The 3x3 neighbourhoods of x (N, C, H, W), as (9, N, C, H, W), and which of their positions
    are inside the map."""
    N, C, H, W = x.shape
    padded, inside = np.zeros((N, C, H + 2, W + 2)), np.zeros((H + 2, W + 2), bool)
    padded[:, :, 1:-1, 1:-1], inside[1:-1, 1:-1] = x, True
    parts = [np.s_[i : i + H, j : j + W] for i in range(3) for j in range(3)]
    values = np.stack([padded[:, :, *part] for part in parts])
    return values, np.stack([inside[part] for part in parts])[:, None, None]


@pytest.mark.parametrize("name", MIXED)
def test_the_shape_and_the_pool_of_every_block(name):
    """What branch_pool's convolution is given (or, if it has none, the block's last channels)
    against sums and counts in NumPy."""
    block = copy.deepcopy(lively().get_submodule(f"Mixed_{name}")).double()
    c_in = next(block.parameters()).shape[1]
    x = torch.randn(2, c_in, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x = x - 3  # negative: a maximum that saw the padding's zeros would return them
    side = {"5": 35, "6": 17, "7": 8}[name[0]]  # 6a and 7a halve the map
    side_in, half = {"6a": 35, "7a": 17}.get(name, side), name in ("6a", "7a")
    c_out = {"5b": 256, "5c": 288, "5d": 288, "7a": 1280, "7b": 2048, "7c": 2048}.get(name, 768)
    assert block(torch.zeros(1, c_in, side_in, side_in).double()).shape == (1, c_out, side, side)
    values, inside = neighbours(x.numpy())
    peak = np.where(inside, values, -np.inf).max(0)
    if half:
        got, expected = block(x)[:, -c_in:], peak[:, :, 1:-1:2, 1:-1:2]
    else:
        seen = []
        block.branch_pool.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        block(x)
        got = seen[0]
        expected = peak if name == "7c" else values.sum(0) / inside.sum(0)
        # ... and it is not the pool of torchvision's graph, which divides by 9 at the border too.
        plain = values.sum(0) / 9
        border = np.abs(got.numpy() - plain) > 1e-6
        border[:, :, 1:-1, 1:-1] ^= name == "7c"  # a maximum differs everywhere, a mean there only
        assert border[:, :, [0, -1]].all() and border[:, :, :, [0, -1]].all()
        assert not border[:, :, 1:-1, 1:-1].any()
    assert_close(got, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_an_image_does_not_depend_on_its_batch():
    net, x = lively(), images(3)
    pool3, logits = net(x)
    assert (pool3.std(0) > 1e-3 * pool3.mean(0)).float().mean() > 0.5  # the images differ
    alone, its_logits = net(x[1:2])
    assert_close(alone, pool3[1:2], rtol=1e-4, atol=1e-5)
    assert_close(its_logits, logits[1:2], rtol=1e-4, atol=1e-4)
    again, _ = net(x)
    assert torch.equal(again, pool3)  # nor on what it saw before


def test_logits_have_no_bias_and_nothing_has_a_gradient():
    net, x = inception.Inception(), images(1)
    net.fc.bias.fill_(1000.0)
    pool3, logits = net(x)
    assert not pool3.requires_grad and not logits.requires_grad
    assert_close(logits, pool3 @ net.fc.weight.T)
    net.fc.weight.mul_(2)
    assert_close(net(x)[1], 2 * logits)


def bilinear(line, size):
    """One axis of a bilinear resize without antialiasing: (..., H) -> (..., size)."""
    source = np.clip((np.arange(size) + 0.5) * line.shape[-1] / size - 0.5, 0, None)
    low = np.floor(source).astype(int)
    high, w = np.minimum(low + 1, line.shape[-1] - 1), source - low
    return line[..., low] * (1 - w) + line[..., high] * w


@pytest.mark.parametrize("height, width", [(5, 7), (32, 32), (299, 299), (640, 401)])
def test_preprocess(height, width):
    x = images(2, height, width)
    x[:, :, :2] = torch.tensor([0, 255]).view(2, 1, 1, 1)  # black and white stay
    expected = bilinear(x.numpy() / 255, 299).swapaxes(2, 3)
    expected = 2 * bilinear(expected, 299).swapaxes(2, 3) - 1
    got = inception.preprocess(x, torch.float64)
    assert_close(got, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    got = inception.preprocess(x)
    assert_close(got, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (2, 1, 8, 8), (3, 8, 8), (2, 3, 8, 8)])
def test_images_of_another_kind_are_refused(shape):
    x = torch.zeros(shape, dtype=torch.float32 if shape == (2, 3, 8, 8) else torch.uint8)
    message = str(refused("takes uint8 images", inception.preprocess, x))  # [0, 1] or [-1, 1]?
    assert str(shape) in message


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file that has the right keys, and its hash."""
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(lively().state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where the weights would be cached; nothing is there, and no network either."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(inception, "URL", (tmp_path / "no network").as_uri())
    return tmp_path / "cache" / "diffusion-data" / inception.NAME


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_the_published_hash_is_the_one_in_the_file_name():
    assert len(inception.SHA256) == 64 and int(inception.SHA256, 16)
    assert inception.NAME.endswith(f"-{inception.SHA256[:8]}.pth")
    assert inception.URL.startswith("https://") and inception.URL.endswith(inception.NAME)


def test_load_a_given_file(weights, cache):
    path, sha256 = weights
    net, reported = inception.open_net(path)
    assert reported == sha256 != inception.SHA256
    assert not cache.parent.exists()
    state, expected = net.state_dict(), lively().state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in state)
    assert not any(m.training for m in net.modules())
    x = images(1)
    assert torch.equal(net(x)[0], lively()(x)[0])  # all else is as in a network made anew
    assert not any(p.requires_grad for p in net.parameters())


def test_load_the_format_of_before_2020(weights, cache, tmp_path):
    """In which the published file is, as it is older than the present one."""
    state = {key: value.contiguous() for key, value in lively().state_dict().items()}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert (tmp_path / "old.pth").read_bytes()[:2] != b"PK"
    net, _ = inception.open_net(str(tmp_path / "old.pth"))
    assert torch.equal(net.fc.weight, lively().fc.weight)


def test_download_once_then_the_cache(weights, cache, monkeypatch):
    path, sha256 = weights
    monkeypatch.setattr(inception, "URL", path.as_uri())
    monkeypatch.setattr(inception, "SHA256", sha256)
    net, reported = inception.open_net()
    assert reported == sha256 and torch.equal(net.fc.weight, lively().fc.weight)
    assert [p.name for p in cache.parent.iterdir()] == [inception.NAME]
    monkeypatch.setattr(inception, "URL", "http://127.0.0.1:9/gone")
    assert inception.open_net()[1] == sha256


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "file:///none/such.pth"])
def test_no_network(cache, monkeypatch, url):
    monkeypatch.setattr(inception, "URL", url)
    message = str(refused(None, inception.open_net))
    assert f"cannot download {url} (" in message and inception.SHA256 in message
    assert str(cache) in message and "--inception" in message and "--data" not in message
    assert "()" not in message and "None" not in message  # it says why
    assert not any(cache.parent.iterdir())


def test_weights_of_another_hash(weights, cache, monkeypatch, tmp_path):
    """A page that was downloaded; and a cached file, though its keys fit: other weights, other
    scores."""
    page = put(tmp_path / "page", b"<html>Please log in</html>")
    monkeypatch.setattr(inception, "URL", page.as_uri())
    digest = hashlib.sha256(page.read_bytes()).hexdigest()
    refused(f"its SHA-256 is {digest}", inception.open_net)
    assert not any(cache.parent.iterdir())
    cache.symlink_to(weights[0])
    message = str(refused("delete it", inception.open_net))
    assert str(cache) in message and weights[1] in message and inception.SHA256 in message
    assert cache.exists()  # it is the user's to delete


def fall_back(cache, weights, monkeypatch):
    """Put the right file in the cache: what load(path) would find, if it looked there."""
    cache.parent.mkdir(parents=True)
    cache.symlink_to(weights[0])
    monkeypatch.setattr(inception, "SHA256", weights[1])


def saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def tiny(**changes):
    """All the keys, each with a tensor of the right shape that takes no space; then the changes."""
    state = {k: torch.zeros(()).expand(v.shape) for k, v in lively().state_dict().items()}
    for key, value in changes.items():
        key = key.replace("__", ".")
        state.pop(key, None)
        if value is not None:
            state[key] = value
    return state


def some(*shape):
    return torch.zeros(1).expand(shape)


FOREIGN = {
    "the file is empty": lambda: b"",
    "it is a web page": lambda: b"\n<!DOCTYPE html>",
    "it is cut short": lambda: saved(tiny())[:-2000],
    "holds more than tensors": lambda: saved({"fc.weight": print}),  # a program
    "its first bytes are b'version '": lambda: b"version https://git-lfs",
    "it holds a list": lambda: saved([1, 2]),
    "566 of 566 tensors, first Conv2d_1a_3x3.conv.weight": lambda: saved({"net": {}, 3: some(1)}),
    "1000 classes, not 1008": lambda: saved(tiny(fc__weight=some(1000, 2048))),  # ImageNet's
    "1 of 566 tensors, first Mixed_7c.branch_pool.bn.bias": lambda: saved(
        tiny(Mixed_7c__branch_pool__bn__bias=None)
    ),
    "1 of 566 tensors, first Mixed_6b.branch7x7_2.conv.weight": lambda: saved(
        tiny(Mixed_6b__branch7x7_2__conv__weight=some(128, 128, 7, 1))
    ),
    "1 of 566 tensors, first fc.bias": lambda: saved(tiny(fc__bias=3)),
    "it also holds AuxLogits.fc.bias": lambda: saved(tiny(AuxLogits__fc__bias=some(3))),
}


@pytest.mark.parametrize("words", FOREIGN)
def test_a_given_file_that_is_something_else(words, weights, cache, monkeypatch, tmp_path):
    fall_back(cache, weights, monkeypatch)
    wrong = put(tmp_path / "wrong.pth", FOREIGN[words]())
    message = str(refused(None, inception.open_net, wrong))
    assert str(wrong) in message and words in message
    assert "ported from TensorFlow" in message and "mseitzer/pytorch-fid" in message


@pytest.mark.parametrize("path", ["none.pth", "", "."])
def test_a_given_path_that_is_no_file(path, weights, cache, tmp_path, monkeypatch):
    fall_back(cache, weights, monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError):
        inception.open_net(path)


@pytest.mark.slow
def test_folded_normalisation_is_the_normalisation():
    x = images(2)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        net = copy.deepcopy(lively()).to(dtype)
        plain, folded = net(x), net.fold()
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in folded.modules())
        for got, expected in zip(folded(x), plain, strict=True):
            assert got.dtype == dtype
            assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max())
