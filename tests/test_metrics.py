"""metrics.py: the three scores against closed forms and independent arithmetic, sets of images, and
the program as it is used."""

import functools
import hashlib
import json
import math
import pickle
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import conftest
import metrics_worker
import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT, run_program, torchrun
from image_writers import pixels, write_folder, zip_of
from metrics_worker import Small, export, maps, means
from PIL import Image

import config
import data
import denoiser as denoisers
import metrics
import sample
from support import checkpoint, distributed, features, inception
from support.cli import parse_into

ALONE = distributed.Distributed(0, 1, 0, torch.device("cpu"))
close = functools.partial(pytest.approx, rel=1e-6)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def photos(n, size=8, channels=3, seed=0):
    """Random images uint8 (n, size, size, channels), without the last axis if they are gray."""
    return pixels(n, size, size, *[channels] * (channels > 1), seed=seed)


def nchw(array):
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def moments_of(x):
    return x.mean(0), np.cov(x, rowvar=False)


# ------------------------------------------------------------------ the Fréchet distance


@pytest.mark.parametrize("rank", [19, 39, 40])
def test_distance_of_a_set_from_itself_is_zero(rank):
    mu, sigma = moments_of(random(rank + 1 if rank < 40 else 300, 40) * 10 + 5)
    assert np.linalg.matrix_rank(sigma) == rank == len(metrics.square_root(sigma))
    assert 0 <= metrics.frechet_distance(mu, sigma, mu, sigma) <= 1e-9


def test_gaussians_of_known_mean_and_scale():
    """N(μ, Σ) against N(μ + d, c² Σ): ‖d‖² + (1 − c)² tr Σ."""
    assert metrics.frechet_distance([0], [[1]], [3], [[4]]) == close(9 + (2 - 1) ** 2)
    sigma, d = np.cov(random(90, 30), rowvar=False), random(30, seed=2)
    for c in (0.0, 0.5, 1.0, 3.0):
        exact = (d**2).sum() + (1 - c) ** 2 * np.trace(sigma)
        found = metrics.frechet_distance(np.ones(30), sigma, np.ones(30) + d, c**2 * sigma)
        assert found == close(exact, rel=1e-12)


def test_distance_is_that_of_the_matrix_square_root():
    (mu1, s1), (mu2, s2) = (
        moments_of(random(320, 64, seed=i) @ random(64, 64, seed=9 + i)) for i in (0, 1)
    )
    exact = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)
    assert metrics.frechet_distance(mu1, s1, mu2, s2) == close(exact, rel=1e-8)


SPECTRA = {
    "flat": lambda i: np.ones_like(i),
    "as of real features": lambda i: i**-2.0,
    "steep": lambda i: i**-4.0,
    "cut off": lambda i: np.where(i < 30, 1 / i, 0),
    "gone below rounding": lambda i: np.exp(-i / 3),
}


@pytest.mark.parametrize("one", SPECTRA)
@pytest.mark.parametrize("other", SPECTRA)
def test_distance_of_covariances_that_share_their_axes(one, other):
    """Σ₁ = Q a Qᵀ and Σ₂ = Q b Qᵀ have the distance Σ (√a − √b)², whatever their ranks."""
    i, zero, axes = np.arange(1, 301.0), np.zeros(300), np.linalg.qr(random(300, 300))[0]
    a, b = SPECTRA[one](i), 1.3 * SPECTRA[other](i[::-1] if other == "steep" else i)
    found = metrics.frechet_distance(zero, axes * a @ axes.T, zero, axes * b @ axes.T)
    assert abs(found - ((a**0.5 - b**0.5) ** 2).sum()) <= 1e-8 * (a.sum() + b.sum())


def distance_of_few(x, y):
    """The distance by the N x N Gram matrix alone: tr (Σ₁Σ₂)^½ is the nuclear norm of X Yᵀ."""
    a, b = ((v - v.mean(0)) / math.sqrt(len(v) - 1) for v in (x, y))
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * overlap


LARGE = pytest.param(300, 200, 2048, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "n, m, width", [(20, 20, 100), (20, 7, 100), (20, 400, 100), (2, 3, 100), LARGE]
)
def test_covariances_without_full_rank(n, m, width):
    x, y = random(n, width), random(m, width, seed=1) * 2 + 0.1
    start = time.time()
    found = metrics.frechet_distance(*moments_of(x), *moments_of(y))
    assert isinstance(found, float) and time.time() - start < 120
    assert found == close(distance_of_few(x, y), rel=1e-9)


def test_distance_is_symmetric_and_never_negative():
    for seed in range(20):
        x = random(12, 10, seed=seed)
        a, b = moments_of(x), moments_of(x + 1e-9 * random(12, 10, seed=99))
        assert metrics.frechet_distance(*a, *b) >= 0
        c = moments_of(random(30, 10, seed=seed + 50) * [*range(10)])
        there, back = metrics.frechet_distance(*a, *c), metrics.frechet_distance(*c, *a)
        assert there == close(back, rel=1e-12) and there > 1


def test_rounding_in_a_file_is_forgiven():
    """float32 statistics of other tools are neither quite symmetric nor quite positive."""
    x, y = random(40, 60), random(50, 60, seed=1) + 1
    rounded = [v.astype(np.float32) for v in (*moments_of(x), *moments_of(y))]
    rounded[1] += (1e-7 * random(60, 60)).astype(np.float32)
    assert metrics.frechet_distance(*rounded) == close(distance_of_few(x, y), rel=1e-2)


def test_arrays_that_are_not_mean_and_covariance_are_refused():
    mu, eye = np.zeros(3), np.eye(3)
    skew = eye + np.triu(np.ones((3, 3)), 1)
    bad = [np.diag([1, 1, x]) for x in (np.inf, np.nan, -1)]
    for sigma in (*bad, -eye, skew, np.ones((3, 2)), np.ones(3), np.eye(2)):
        for pair in ((mu, sigma, mu, eye), (mu, eye, mu, sigma), (mu, sigma, mu, sigma)):
            conftest.refused(None, metrics.frechet_distance, *pair)
    for other in (mu + np.nan, np.array([0, np.inf, 0]), mu[:2], mu[None], np.array(["a"] * 3)):
        conftest.refused(None, metrics.frechet_distance, other, eye, mu, eye)


# ------------------------------------------------------------------ the Inception Score


def score_by_hand(p, splits=10):
    """(mean, std) of exp(KL divergence of the rows of p from their mean) over shuffled parts."""
    n, p = len(p), p[np.random.RandomState(2020).permutation(len(p))]
    parts = [p[n * i // splits : n * (i + 1) // splits] for i in range(splits)]
    scores = [math.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in parts]
    return np.mean(scores), np.std(scores)  # ddof 0


@pytest.mark.parametrize("splits", [1, 3, 10])
def test_score_is_shuffled_with_seed_2020_and_cut_into_equal_parts(splits):
    p = np.random.default_rng(3).dirichlet(np.ones(6), 47)  # parts of 4 and 5 images
    logits = torch.from_numpy(np.log(p) + 7)  # a shift does not matter
    mean, std = metrics.inception_score(logits, splits=splits)
    assert (mean, std) == close(score_by_hand(p, splits), rel=1e-9)
    assert std > 0.01 or splits == 1
    assert metrics.inception_score(logits, splits=splits) == (mean, std)


def test_scores_of_known_images():
    alike = torch.from_numpy(random(1, 1008)).float().expand(40, -1)
    assert metrics.inception_score(alike) == close((1, 0), abs=1e-12)
    # Sorted by class, as files lie: unshuffled parts would hold one class each and score 1.
    logits = 60 * torch.eye(10).repeat_interleave(200, 0)
    mean, std = metrics.inception_score(logits)
    # in 200 draws each share is off by about 0.02, which costs 10 (1 - 10/2 0.02²/0.1 ...)
    assert 9.5 < mean < 10 and 0 < std < 0.2
    assert metrics.inception_score(logits, splits=1)[0] == close(10, rel=1e-12)
    assert metrics.inception_score(torch.zeros(10, 5)) == (1, 0)
    why = "at least one image in each of its 10 parts"
    conftest.refused(why, metrics.inception_score, torch.zeros(9, 5))
    conftest.refused("not finite", metrics.inception_score, torch.full((20, 5), math.nan))


# ------------------------------------------------------------------ PSNR


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_of_known_errors(channels):
    a = torch.full((5, channels, 6, 5), 100, dtype=torch.uint8)
    b = a + torch.tensor([1, 5, 155, 0, 0], dtype=torch.uint8).view(5, 1, 1, 1)
    b[4, 0, 0, 0] = 0  # one value of 30 or 90 is off by 100
    errors = np.array([1, 25, 155**2, 0, 100**2 / (30 * channels)])
    found = metrics.psnr(a, b)
    assert found.dtype == torch.float64 and found[0].item() == close(48.1308036, abs=1e-6)
    with np.errstate(divide="ignore"):
        assert found.tolist() == close([*10 * np.log10(255**2 / errors)], rel=1e-12)
    assert torch.equal(metrics.psnr(b, a), found), "uint8 differences must not wrap around"


# ------------------------------------------------------------------ the program


def make_run(folder, name="run", flags="", **more):
    """runs/NAME/checkpoint.pt of a small untrained network whose images differ, EMA and raw
    likewise."""
    settings = parse_into(config.Config, f"--image-size 8 {flags}".split()).settings() | more
    settings["unet"] |= dict(channels=8, channel_mult=(1,), patch=1, norm_groups=4)
    net = denoisers.build_denoiser(settings).net
    weights = {}
    for kind, key in (("ema", 0), ("net", 100)):
        torch.manual_seed(key)
        weights[kind] = {k: v + 0.1 * torch.randn(v.shape) for k, v in net.state_dict().items()}
    path = folder / "runs" / name
    path.mkdir(parents=True)
    entries = {name: kind() for name, kind in checkpoint.ENTRIES.items()}
    saved = dict(entries, settings=settings, step=7, **weights)
    checkpoint.save_checkpoint(path / "checkpoint.pt", saved)
    return path


def photos_b():
    return photos(12, seed=1) // 2


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with sets, runs and feature networks."""
    folder = tmp_path_factory.mktemp("metrics")
    write_folder(folder / "a", photos(9))
    write_folder(folder / "b", photos_b())
    make_run(folder, "mine")
    make_run(folder, "gray", "--channels 1")
    make_run(folder, "moved", data="nowhere")
    (folder / "runs" / "half").mkdir()  # a run that never saved
    for name, size in (("nine", 8), ("mixed", 12), ("bad", 8)):
        write_folder(folder / name, photos(9, size))
    (folder / "nine" / "004.png").rename(folder / "nine" / "004b.png")
    (folder / "mixed" / "000.png").write_bytes((folder / "a" / "000.png").read_bytes())
    (folder / "bad" / "001.png").write_text("<html>")
    np.save(folder / "large.npy", photos(3, 12))
    np.save(folder / "lone.npy", photos(1))
    np.save(folder / "oblong.npy", photos(2)[:, :6])
    np.savez(folder / "s.npz", mu=np.zeros(2), sigma=np.eye(2))
    export(folder / "means.pt2", means)
    export(folder / "maps.pt2", maps, dynamic="N")
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return workplace


@pytest.fixture
def small(monkeypatch):
    """A small network in Inception's place, as if it were the published file."""
    monkeypatch.setattr(inception, "open_net", metrics_worker.load)
    monkeypatch.setattr(inception, "SHA256", "5" * 64)


@pytest.fixture
def call(capsys):
    """call("fid a b", ...) -> what the program prints."""

    def run(*words):
        capsys.readouterr()
        metrics.main(" ".join(map(str, words)).split())
        return capsys.readouterr().out

    return run


@pytest.fixture
def measure(call):
    """measure("fid a b") -> the dict that --json prints."""
    return lambda *words: json.loads(call(*words, "--json"))


def refused(words, *parts):
    """The one line of error of "fid a b", which has these parts."""
    line = str(conftest.refused(None, metrics.main, words.split()))
    assert all(part in line for part in parts), line
    return line


def quarters(array):
    """What maps() makes of uint8 images (N, 8, 8, 3): (N, 12)."""
    x = array.astype(np.float32) / np.float32(127.5) - 1
    x = x.reshape(-1, 2, 4, 2, 4, 3).mean((2, 4), dtype=float)
    return x.transpose(0, 3, 1, 2).reshape(-1, 12)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_features_of_another_network(here, measure, call):
    averages = (quarters(x).reshape(-1, 3, 4).mean(2) for x in (photos(9), photos_b()))
    found, digest = measure("fid a b --features means.pt2"), sha256("means.pt2")
    assert found["value"] == close(distance_of_few(*averages), rel=1e-5)
    expected = dict(metric="FD(means.pt2)", sha256=digest, network="means.pt2", resize="none")
    assert found | expected == found
    assert [(s["n"], s["shape"]) for s in found["sides"]] == [(9, [3, 8, 8]), (12, [3, 8, 8])]

    exact = distance_of_few(quarters(photos(9)), quarters(photos_b()))
    whole = measure("fid a b --features maps.pt2")
    assert whole["value"] == close(exact, rel=1e-5)
    for words in ("fid a --batch-size 5 --features maps.pt2 b", "fid b a --features maps.pt2"):
        assert measure(words)["value"] == close(whole["value"])
    assert measure("--features maps.pt2 fid a a --batch-size 1")["value"] <= 1e-9
    out = call("fid a b --features maps.pt2")
    assert out.startswith(
        f"FD(maps.pt2) {exact:.4f} | 9 against 12 images | 8x8, resize: none | "
        f"maps.pt2, SHA-256 {sha256('maps.pt2')[:12]}\n"
    )
    assert "FID" not in out and "Inception" not in out and out.count("under 10,000") == 2
    assert "9 images of a in 12 dimensions: the covariance does not have full rank" in out


def test_a_run_alone_is_compared_with_its_own_data(here, measure):
    words = "--features means.pt2 -n 6 --nfe 2"
    alone, named = measure("fid mine", words), measure("fid mine shapes", words)
    assert alone == named and alone["value"] > 0.01
    assert [(s["source"], s["shape"]) for s in alone["sides"]] == [
        ("mine", [3, 8, 8]),
        ("shapes", [3, 8, 8]),
    ]
    assert "6 images by mine, ema weights, seed 0, ddpm-2-step7" == alone["sides"][0]["what"]
    assert measure("fid mine", words, "--weights raw")["value"] != alone["value"]


def test_a_gray_run_is_compared_in_gray(here, measure):
    """Against a colour set, turned gray; the network is shown three equal channels."""
    same = "--image-size 8 --channels 1"  # says what is so anyway
    found = measure("fid gray a --features means.pt2 -n 5 --nfe 2", same)
    assert [side["shape"] for side in found["sides"]] == [[1, 8, 8]] * 2
    gray = [np.asarray(Image.open(p).convert("L")) for p in sorted((here / "a").iterdir())]
    np.save("gray.npy", np.stack(gray)[..., None].repeat(3, 3))
    as_colour = measure("fid a gray.npy --features means.pt2 --channels 1")
    assert as_colour["value"] <= 1e-9


# ------------------------------------------------------------------ statistics


def test_statistics_take_the_place_of_their_images(here, measure, call, monkeypatch):
    direct = measure("fid a b --features maps.pt2")
    out = call("stats a a.npz --features maps.pt2")
    assert f"statistics in {here / 'a.npz'} | 9 images" in out and "FID" not in out
    with np.load("a.npz") as file:
        mu, sigma = moments_of(quarters(photos(9)))
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        np.testing.assert_allclose(file["mu"], mu, atol=1e-7)
        np.testing.assert_allclose(file["sigma"], sigma, atol=1e-7)
        assert int(file["n"]) == 9 and str(file["sha256"]) == direct["sha256"]
    found = measure("fid a.npz b --features maps.pt2")
    assert found["value"] == close(direct["value"], rel=1e-9)
    assert [side["n"] for side in found["sides"]] == [9, 12]

    call("stats b b.npz --features maps.pt2")
    monkeypatch.setattr(features, "open_network", None)  # two files need no network
    found = measure("fid a.npz b.npz")
    assert found["value"] == close(direct["value"], rel=1e-9)
    assert found["metric"] == "FD(maps.pt2)" and found["sha256"] == direct["sha256"]
    assert "FID" not in call("fid a.npz b.npz")


def test_statistics_of_other_tools(here, measure, call, small):
    """pytorch-fid's and EDM's files are mu and sigma alone; an image reference may hold both."""
    mu, sigma = moments_of(Small()(nchw(photos_b()))[0].double().numpy())
    np.savez("theirs.npz", mu=mu, sigma=sigma)
    found = measure("fid a theirs.npz")
    assert found["value"] == close(measure("fid a b")["value"])
    assert found["metric"] == "FID" and [side["n"] for side in found["sides"]] == [9, None]
    assert any("theirs.npz has no record of its image count" in w for w in found["warnings"])
    assert "9 against ? images" in call("fid a theirs.npz")

    np.savez("both.npz", arr_0=photos(12) // 4, mu=mu, sigma=sigma)
    assert measure("fid a both.npz")["value"] == found["value"], "statistics, for fid"
    scored = measure("is both.npz")
    assert scored["sides"][0]["n"] == 12 and scored["value"] > 1, "images, for is"
    np.save("quarter.npy", photos(12) // 4 + 1)
    decibels = measure("psnr both.npz quarter.npy")["value"]
    assert decibels == close(48.1308036, abs=1e-6), "images, for psnr"

    neither = measure("fid theirs.npz theirs.npz")
    assert neither["metric"] == "FD" and neither["network"] is None and neither["value"] <= 1e-9
    assert "None" not in call("fid theirs.npz theirs.npz")
    metrics.main(["stats", "a", "ours.npz"])
    one = measure("fid ours.npz theirs.npz")
    assert one["metric"] == "FID" and one["value"] == close(found["value"])


def test_statistics_that_do_not_compare(here, call, measure, small):
    call("stats a maps.npz --features maps.pt2")
    call("stats a means.npz --features means.pt2 --image-size 12")
    call("stats a small.npz")
    with np.load("maps.npz") as file:  # other weights under the same name are another network
        np.savez("other.npz", **{**file, "sha256": "0" * 64})
    np.savez("three.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez("bad.npz", mu=np.zeros(12), sigma=-np.eye(12))
    where = "maps.npz has statistics of maps.pt2", "not of means.pt2"
    refused("fid maps.npz b --features means.pt2", *where, "cannot be compared")
    refused("fid maps.npz means.npz", "maps.pt2", "means.pt2", "cannot be compared")
    for words in ("maps.npz b", "small.npz means.npz", "other.npz maps.npz"):
        refused(f"fid {words}", "cannot be compared")
    refused("fid other.npz b --features maps.pt2", "cannot be compared")
    refused("fid three.npz maps.npz", "three.npz and maps.npz: statistics of different sizes")
    refused("fid bad.npz maps.npz", "bad.npz and maps.npz: not a covariance")
    found = measure("fid means.npz b --features means.pt2")
    assert "the images have different sizes: 8 and 12 pixels" in found["warnings"]


def test_pickled_statistics_are_refused_with_the_way_out(here, measure):
    """SA-DPM's .npy and EDM2's .pkl are dicts in a pickle. The command that is printed works."""
    numbers = dict(mu=np.arange(3.0), sigma=np.eye(3))
    np.savez("plain.npz", **numbers)
    np.save("it's.npy", numbers)
    Path("edm2.pkl").write_bytes(pickle.dumps(dict(num_images=9, fid=numbers)))
    for source in ("it's.npy", "edm2.pkl"):
        why = f"{source} is a pickle, and a pickle can run code"
        python, *words = shlex.split(refused(f"fid {source} plain.npz", why).split("sigma:  ")[1])
        assert python == "python"
        subprocess.run([sys.executable, *words], check=True, cwd=here)
        assert measure(f"fid {source[:-4]}.npz plain.npz")["value"] <= 1e-9
    np.save("images.npy", photos(4))
    assert features.read_statistics("images.npy") is None, "an array of numbers is not a pickle"


def test_where_statistics_may_go(here, call):
    np.savez("images.npz", photos(3))
    before = sha256("images.npz")
    for words, part in {
        "a images.npz": "images.npz exists but does not hold statistics",
        "a out": ".npz",
        "a out.npz.bak": ".npz",
        "a nowhere/out.npz": "no such folder",
        "a": "stats takes A OUT.npz",
    }.items():
        refused(f"stats {words} --features means.pt2", part)
    assert sha256("images.npz") == before and not [*here.glob("out*")]
    call("stats a again.npz --features means.pt2")
    call("stats b again.npz --features means.pt2")  # statistics may be replaced
    assert int(np.load("again.npz")["n"]) == 12 and not [*here.glob("*.tmp")]


# ------------------------------------------------------------------ feature files


def cut_networks(here):
    whole = (here / "maps.pt2").read_bytes()
    (here / "cut.pt2").write_bytes(whole[:-500])
    (here / "half.pt2").write_bytes(whole[: len(whole) // 2])
    torch.save({"weight": torch.zeros(3)}, here / "weights.pt")


def test_feature_files_that_are_something_else(here):
    cut_networks(here)
    (here / "page.pt2").write_text("<!doctype html><html>404</html>")
    (here / "noise.pt2").write_bytes(bytes(range(200)))
    (here / "empty.pt").touch()
    for name, part in {
        "page.pt2": "web page",
        "noise.pt2": "first bytes",
        "empty.pt": "empty",
        "weights.pt": "another kind of zip",
        "cut.pt2": "cut short",
        "half.pt2": "cut short",
        "runs/mine/checkpoint.pt": "another kind of zip",
    }.items():
        why = f"{name} is not a network saved by torch.export.save"
        refused(f"fid a b --features {name}", why, part)
    for name in ("none.pt2", "runs"):
        refused(f"fid a b --features {name}", f"--features: no such file: {name}")


@pytest.mark.parametrize(
    "net, how, words",
    [
        (lambda x: (x, x), {}, "must return one tensor (N, features) for N images; for 9 it "),
        (lambda x: x.mean(), {}, "for 9 it returned ()"),
        (lambda x: x.mean((2, 3)) / 0, {}, "a and b: statistics with values that are not finite"),
        (means, dict(channels=1), "(exported for other images: --image-size, --channels?)"),
        (means, dict(size=16, dynamic="N"), "(exported for other images: "),
        (means, dict(dynamic="HW"), "(exported without a dynamic batch axis?)"),
    ],
)
def test_networks_that_give_no_features(here, net, how, words):
    export("strange.pt2", net, **how)
    message = refused("fid a b --features strange.pt2", words)
    if "exported" in words:
        assert "strange.pt2 does not take a batch of shape (9, 3, 8, 8): Guard failed" in message


# ------------------------------------------------------------------ FID and IS


def test_fid_of_a_network_that_looks_like_the_published_one(here, measure, call, small):
    f = [Small()(nchw(x))[0].double().numpy() for x in (photos(9), photos_b())]
    found = measure("fid a b")
    assert found["value"] == close(distance_of_few(*f), rel=1e-9)
    assert found["metric"] == "FID" and found["network"] == features.INCEPTION
    assert not any("published" in w for w in found["warnings"])
    assert call("fid a b").startswith(
        f"FID {found['value']:.4f} | 9 against 12 images | 8x8, "
        "resize: bilinear to 299x299 without antialiasing | "
        "Inception 2015-12-05, SHA-256 555555555555\n"
    )


def test_is_puts_the_logits_into_the_order_of_the_images(here, measure, call, small):
    mean, std = score_by_hand(Small()(nchw(photos_b()))[1].softmax(1).numpy())
    for batch in (1, 5, 64):
        found = measure("is b --batch-size", batch)
        assert (found["value"], found["std"]) == close((mean, std), rel=1e-9) and std > 1e-3
    assert found["metric"] == "IS" and any("under 10,000" in w for w in found["warnings"])
    assert call("is b").startswith(f"IS {mean:.4f} ± {std:.4f} | 12 images | 8x8, ")
    refused("is a", "a: the Inception Score needs at least one image in each of its 10 parts")
    refused("is a b", "is takes A, not 2 names")


def test_is_of_a_classifier_of_ones_own(here, measure):
    """Its outputs are logits: the score is that of those classes, and bears the file's name."""
    logits = (nchw(photos_b()).float() / 127.5 - 1).mean((2, 3))
    found = measure("is b --features means.pt2")
    exact = metrics.inception_score(logits.numpy())
    assert found["metric"] == "IS(means.pt2)"
    assert (found["value"], found["std"]) == close(exact, rel=1e-3)


@pytest.fixture(scope="module")
def weights(workplace):
    """A file of Inception's form with random weights; and few.npy, fewer.npy."""
    torch.manual_seed(0)
    torch.save(inception.Inception().state_dict(), workplace / "random.pth")
    np.save(workplace / "few.npy", photos(3))
    np.save(workplace / "fewer.npy", photos(2, seed=1))
    net = inception.open_net(workplace / "random.pth")[0]
    return [net(nchw(x))[0].double().numpy() for x in (photos(3), photos(2, seed=1))]


@pytest.mark.slow
def test_inception_by_path(here, measure, call, weights):
    out = call("fid few.npy fewer.npy --inception random.pth")
    value, digest = float(out.split()[1]), sha256("random.pth")
    assert value == close(distance_of_few(*weights), rel=1e-3)
    assert out.startswith(
        f"FID {value:.4f} | 3 against 2 images | 8x8, resize: bilinear to 299x299 without "
        f"antialiasing | Inception 2015-12-05, SHA-256 {digest[:12]}\n"
    )
    assert f"these weights are not the published file ({inception.SHA256[:12]}...)" in out
    assert "3 images of few.npy: under 10,000" in out
    assert "3 images of few.npy in 2048 dimensions: the covariance does not have full rank" in out
    np.save("ten.npy", photos(10))
    assert measure("is ten.npy --inception random.pth")["value"] == 1.0  # one image in each part


def test_what_does_not_fit_is_refused_before_sampling(here, monkeypatch):
    """Statistics of another network; a run in training that processes opened at different steps."""
    monkeypatch.setattr(metrics.Generated, "batch", lambda *a: pytest.fail("sampled already"))
    of = dict(mu=np.zeros(192), sigma=np.eye(192), network="other.pt2", sha256="b" * 64)
    np.savez("other.npz", **of)
    words = "-n 2 --nfe 1 --features means.pt2"
    refused(f"fid mine other.npz {words}", "other.npz has statistics of other.pt2")
    refused(f"fid mine lone.npy {words}", "lone.npy: a covariance needs at least 2 images")
    real = distributed.Distributed.broadcast

    def other(self, value):
        return "hash of rank 0" if isinstance(value, str) else real(self, value)

    monkeypatch.setattr(distributed.Distributed, "broadcast", other)
    refused(f"fid mine a {words}", "mine changed while it was read. Is it in training? Try again")


@pytest.mark.parametrize("precisions, text", [("tf32 tf32", "tf32:"), ("tf32 fp32", "tf32 on one")])
def test_precisions_are_named(precisions, text):
    net = features.FeatureNetwork(None, "net.pt2", "a" * 64, "none", "tf32")
    (line,) = features.warn_network(net, precisions.split())
    assert line.startswith(f"features in {text}")


@pytest.mark.slow
def test_bf16_features_are_near_and_say_what_they_are(here, measure, call, weights):
    call("stats few.npy half.npz --precision bf16 --inception random.pth")
    exact = weights[0].mean(0)
    with np.load("half.npz") as archive:
        assert archive["precision"].item() == "bf16"
        assert 0 < abs(archive["mu"] - exact).max() < 0.02 * abs(exact).max()
    found = measure("fid fewer.npy half.npz --inception random.pth")
    assert any("bf16 on one side only" in w for w in found["warnings"])
    for words in ("psnr few.npy few.npy", "fid half.npz half.npz"):
        refused(f"{words} --precision bf16", "--precision is only for")


def test_without_weights_and_without_network(here, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "URL", (tmp_path / "no network").as_uri())
    cached = tmp_path / "diffusion-data" / inception.NAME
    for words in ("fid a b", "is b", "stats a new.npz"):
        refused(words, inception.URL, inception.SHA256, str(cached))
    assert not (here / "new.npz").exists()
    cached.write_bytes(b"something else")  # a wrong file in the cache is not accepted
    refused("fid a b", inception.SHA256)
    (here / "page.pth").write_text("<html>")
    refused("fid a b --inception page.pth", "web page")
    refused("fid a b --inception none.pth", "no such file")
    refused("fid a b --inception page.pth --features means.pt2", "--features replaces Inception")


# ------------------------------------------------------------------ pairs


def test_psnr_of_pairs(here, measure, call):
    errors, array = np.arange(1, 5, dtype=np.uint8), photos(4) // 2
    write_folder(here / "first", array)
    write_folder(here / "second", array + errors[:, None, None, None])
    exact = np.mean(20 * np.log10(255 / errors))
    found = measure("psnr first second --batch-size 3")
    assert found["metric"] == "PSNR" and found["value"] == close(exact, rel=1e-12)
    assert found["network"] is None and found["sha256"] is None and found["resize"] == "none"
    line = f"PSNR {exact:.4f} dB | 4 against 4 images | 8x8, resize: none\n"
    assert call("psnr first second").startswith(line)
    (here / "third").mkdir()
    for i, image in enumerate(array):  # one suffix or another: the name counts
        Image.fromarray(image).save(here / "third" / f"{i:03}.bmp")
    assert measure("psnr third second")["value"] == close(exact, rel=1e-12)
    assert measure("psnr third second --channels 1")["value"] == close(exact, abs=0.2)
    gray = photos(3, channels=1) // 2
    np.save("one.npy", gray)
    np.save("two.npy", gray + np.uint8(5))
    for channels in ("", "--channels 1"):
        found = measure("psnr one.npy two.npy", channels)["value"]
        assert found == close(20 * math.log10(255 / 5), rel=1e-12)


def test_psnr_pairs_by_folder_too(here, measure):
    """cat/000 is not compared with dog/000, which looks the same by name."""
    for name, kinds in {"one": "cat dog", "two": "cat dog", "three": "cat emu"}.items():
        for i, kind in enumerate(kinds.split()):
            write_folder(here / name / kind, photos(2, seed=i))
    zip_of(here / "one")
    for source in ("one", "one.zip"):
        assert measure(f"psnr {source} two")["text"] == "inf dB"
        why = f"{source} and three: dog/000 and emu/000 are not a pair. psnr pairs files by folder"
        refused(f"psnr {source} three", why)
    assert measure("psnr one/cat/000.png two/cat/000.png")["text"] == "inf dB"


def test_psnr_of_equal_pairs(here, measure, call):
    array = photos(3)
    np.save("one.npy", array)
    array[1] ^= 1  # one of three pairs differs, by 1 everywhere
    np.save("two.npy", array)
    text = call("psnr one.npy two.npy --json")
    assert "Infinity" not in text and "NaN" not in text
    found = json.loads(text)
    assert found["value"] is None and found["text"] == "inf dB"
    assert any("2 pairs are equal" in w for w in found["warnings"])


# ------------------------------------------------------------------ the command line

SHAPES = "images of different shapes cannot be compared"
REFUSED = {  # `+` stands for --features means.pt2
    "fid nothing a +": "nothing is not a file, folder or data set (shapes cifar10): no run",
    "fid half a +": "half is not a file",
    "fid a +": "a is not a run: name the images to compare it with",
    "fid s.npz +": "s.npz is not a run: name the images to compare it with",
    "fid shapes +": "shapes is not a run: name the images to compare it with",
    "fid moved +": "moved was trained on 'nowhere', which does not",
    "fid a b mine": "fid takes A or A B, not 3 names",
    "fid mine a --image-size 9 +": "--image-size does not fit the run's images, 3x8x8",
    "fid gray a --channels 3 +": "--channels does not fit the run's images, 1x8x8: leave it out",
    "fid a large.npy +": f"a and large.npy: {SHAPES} (3x8x8 and 3x12x12): give --image-size",
    "fid gray mine +": f"gray and mine: {SHAPES} (1x8x8 and 3x8x8)",
    "is mixed +": "mixed: the images are not squares of one size (8x8 12x12): give --image-size",
    "is oblong.npy +": "oblong.npy: the images are 8x6, not square: give --image-size",
    "is bad +": "1 of 9 images cannot be read: bad/001.png",
    "fid lone.npy a +": "lone.npy: a covariance needs at least 2 images, not 1",
    "psnr a nine": "a and nine: 004 and 004b are not a pair",
    "psnr a b": "a and b: psnr needs pairs, but these are 9 and 12 images",
    "psnr mine a -n 9 --nfe 1": "mine is a run, whose images have no pairs",
    "psnr a mine -n 9 --nfe 1": "mine is a run, whose images have no pairs",
    "psnr a": "psnr takes A B",
    "psnr s.npz a": "s.npz",
    "is a --nfe 7 +": "--nfe is only for sampling a run",
    "is a --seed 1 +": "--seed is only for sampling a run",
    "is a --weights raw +": "--weights is only for sampling a run",
    "is a --sampler ddpm +": "--sampler is only for sampling a run",
    "fid s.npz s.npz +": "--features is only for images",
    "fid s.npz s.npz --image-size 7": "--image-size is only for images",
    "fid s.npz s.npz --batch-size 3": "--batch-size is only for images",
    "fid a b -n 2 +": "--num is only for a run or shapes: other sets are used whole",
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused_in_one_line(here, words):
    line = refused(words.replace("+", "--features means.pt2"))
    assert line.startswith(REFUSED[words])


@pytest.mark.parametrize("words, missing", [("", "METRIC, A [B]"), ("is", "A [B]")])
def test_missing_words_are_named(words, missing, capsys):
    with pytest.raises(SystemExit) as info:
        metrics.main(words.split())
    assert info.value.code == 2
    assert capsys.readouterr().err.endswith(f"arguments are required: {missing}\n")


@pytest.mark.slow
def test_the_program_prints_one_json_object_or_one_line_of_error(here):
    def program(words, status):
        return run_program(ROOT / "metrics.py", *words.split(), cwd=here, status=status)

    done = program("fid a b --features maps.pt2 --json", 0)
    found = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1 and done.stdout.startswith("{")
    assert found["metric"] == "FD(maps.pt2)" and found["warnings"]
    assert "FID" not in done.stdout + done.stderr
    cut_networks(here)  # torch.export logs a traceback
    for words, error in {
        "nothing a --json": "nothing is not a",
        "a b --features weights.pt": "--features weights.pt is not a network",
        "a b --features cut.pt2": "--features cut.pt2",
        "a b --features half.pt2": "--features half.pt2",
    }.items():
        done = program(f"fid {words}", 2)
        lines = [line for line in re.split("[\r\n]+", done.stderr) if line.strip()]
        (line,) = [line for line in lines if not re.search(r"\d/\d+ \[", line)]  # progress bars
        assert line.startswith(f"metrics.py: error: {error}") and not done.stdout


# ------------------------------------------------------------------ several processes


CALLS = """\
fid odd.npy other.npy
fid odd.npy pair.npy --batch-size 2
fid mine shapes -n 5 --nfe 2 --sampler ddpm --batch-size 2
fid odd.npy other.npy --features means.pt2
is odd.npy --batch-size 3
psnr odd.npy shifted.npy
psnr one.npy shifted-one.npy
stats odd.npy odd.npz
fid odd.npz pair.npy""".splitlines()  # one.npy: fewer images than processes


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4])
def test_processes_share_the_work_and_agree(here, n, measure, small):
    array = photos(13) // 2
    shifted = array + np.arange(1, 14, dtype=np.uint8)[:, None, None, None]
    for name, images in (("odd", array), ("shifted", shifted)):
        np.save(f"{name}.npy", images)
        np.save("one.npy" if name == "odd" else "shifted-one.npy", images[:1])
    np.save("other.npy", photos(7, seed=1) // 2)
    np.save("pair.npy", photos(2, seed=2))
    ones = [measure(words) for words in CALLS]
    calls = json.dumps([[*words.split(), "--json"] for words in CALLS])
    done = torchrun(n, ROOT / "tests" / "metrics_worker.py", calls, cwd=here)
    many = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(many) == len(ones), "only rank 0 prints"
    for one, other in zip(ones, many, strict=True):
        if one["value"] is not None:
            assert other["value"] == close(one["value"]) and one["value"] > 1e-5
        assert other["sides"] == one["sides"]
    assert many[4]["std"] == close(ones[4]["std"])


@pytest.mark.slow
def test_an_error_is_printed_by_one_process(here):
    (here / "page.pt").write_text("<html>")
    for words in ("nothing a", "a b --features page.pt"):
        done = torchrun(2, ROOT / "metrics.py", "fid", *words.split(), cwd=here, check=False)
        lines = [x for x in done.stderr.splitlines() if x.startswith("metrics.py: error: ")]
        assert done.returncode != 0 and len(lines) == 1
        assert "Connection closed" not in done.stderr


# ------------------------------------------------------------------ sets of images


def open_sets(words, metric="fid"):
    found = parse_into(metrics.MetricsConfig, [metric, *words.split()])
    return metrics.open_sets(found.sources, found, ALONE)


def open_one(words):
    return open_sets(words, metric="is")[0]


def pictures(images, *indices):
    """uint8 (n, H, W, C), all of them or those asked for."""
    return images.batch(list(indices or range(images.n))).permute(0, 2, 3, 1).numpy()


def test_stored_images(here, monkeypatch):
    side = open_one("a")
    assert side.n == 9 and side.names == [f"{i:03}" for i in range(9)]
    assert np.array_equal(pictures(side), photos(9))
    side = open_one("bad --skip-bad-images")
    assert side.n == 8 and np.array_equal(pictures(side), photos(9)[[0, *range(2, 9)]])
    assert open_one("mixed --image-size 6 --channels 1").shape == (1, 6, 6)
    assert [s.shape for s in open_sets("a large.npy --image-size 10")] == [(3, 10, 10)] * 2
    # a set beyond the memory limit is read when asked for, by threads
    monkeypatch.setattr(data, "load", functools.partial(data.load, memory_limit=0))
    side = open_one("a")
    assert "streamed" in side.summary
    assert np.array_equal(pictures(side, 8, 2, 4), photos(9)[[8, 2, 4]])


def test_shapes_are_endless_and_num_says_how_many(here):
    assert open_one("shapes --image-size 16").n == 10_000
    side = open_one("shapes -n 4 --image-size 16")
    drawn = [data.draw_shape((0, i), 16) for i in range(4)]
    assert side.n == 4 and np.array_equal(pictures(side), np.stack(drawn))
    assert [s.n for s in open_sets("a shapes -n 2 --image-size 8")] == [9, 2]


def test_a_run_by_name_folder_and_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path, "mine")
    for source in ("mine", "runs/mine", "runs/mine/checkpoint.pt"):
        side = open_one(f"{source} -n 6 --nfe 2")
        assert side.n == 6 and side.shape == (3, 8, 8)
        assert side.summary == "6 images by mine, ema weights, seed 0, ddpm-2-step7"
    assert open_one("mine").n == 10_000
    words = "--sampler dpm-solver --order 2 --spacing logsnr --weights raw --seed 3 --clip on"
    side = open_one(f"mine {words}")
    for part in ("raw weights, seed 3, dpm-solver", "order-2", "spacing-logsnr", "clip-on"):
        assert part in side.summary
    make_run(tmp_path, "late", "--prediction eps --schedule zero-terminal-snr")  # has no x_0 at T
    assert [n.split(":")[0] for n in open_one("late").notes] == ["sampling begins at t = 999"]
    write_folder(tmp_path / "mine", photos(3))  # a folder of images comes before a run of its name
    assert isinstance(open_one("mine"), metrics.Stored) and open_one("mine").n == 3
    assert isinstance(open_one("runs/mine -n 1"), metrics.Generated)


@pytest.mark.parametrize(
    "words", ["ddim --nfe 3", "ddpm --nfe 4 --weights raw", "ddim --nfe 3 --eta 0.5 --clip off"]
)
def test_images_of_a_run_are_those_of_sample(here, tmp_path, words):
    sample.main(f"mine --num 5 --seed 11 --out {tmp_path} --sampler {words}".split())
    files = np.stack([np.asarray(Image.open(p)) for p in sorted(tmp_path.glob("0*.png"))])
    side = open_one(f"mine -n 5 --seed 11 --sampler {words}")
    assert pictures(side).dtype == np.uint8 and pictures(side).shape == (5, 8, 8, 3)
    assert files.std() > 20 and not np.array_equal(files[0], files[1])
    for order in ([0, 1, 2, 3, 4], [3, 1]):  # alone, or in another order, they are the same
        assert np.abs(pictures(side, *order).astype(int) - files[order]).max() <= 1
