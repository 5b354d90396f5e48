"""metrics.py: the three scores against closed forms and independent arithmetic, sets of images, and
the program as it is used."""

import functools
import hashlib
import json
import math
import os
import pickle
import re
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import metrics_worker
import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT, message_of, run_program, torchrun
from image_writers import pixels, write_folder, zip_of
from metrics_worker import Maps, Means, Small, export
from PIL import Image

import data
import denoiser as denoisers
import metrics
import sample
from support import checkpoint, distributed, features, inception
from support.cli import parse_into
from support.programs import run_main

ALONE = distributed.Distributed(0, 1, 0, torch.device("cpu"))


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def photos(n, size=8, channels=3, seed=0):
    """Random images uint8 (n, size, size, channels), without the last axis if they are gray."""
    return pixels(n, size, size, *[channels] * (channels > 1), seed=seed)


def moments_of(x):
    return x.mean(0), np.cov(x, rowvar=False)


# ------------------------------------------------------------------ the Fréchet distance


@pytest.mark.parametrize("rank", [19, 39, 40])
def test_distance_of_a_set_from_itself_is_zero(rank):
    mu, sigma = moments_of(random(rank + 1 if rank < 40 else 300, 40) * 10 + 5)
    assert np.linalg.matrix_rank(sigma) == rank == len(metrics.square_root(sigma))
    assert 0 <= metrics.frechet_distance(mu, sigma, mu, sigma) <= 1e-9


def test_distance_in_one_dimension():
    assert metrics.frechet_distance([0], [[1]], [3], [[4]]) == pytest.approx(9 + (2 - 1) ** 2)
    assert metrics.frechet_distance([0], [[0]], [0], [[4]]) == pytest.approx(4)


def test_commuting_covariances():
    """(√a − √b)² for each shared axis, whatever the axes."""
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0.1, 5, (2, 12))
    a[3] = b[5] = 0
    mu1, mu2 = rng.normal(size=(2, 12))
    exact = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    q = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    for axes in (np.eye(12), q):
        found = metrics.frechet_distance(mu1, axes * a @ axes.T, mu2, axes * b @ axes.T)
        assert found == pytest.approx(exact, rel=1e-12)


def test_gaussians_of_known_mean_and_scale():
    """N(μ, Σ) against N(μ + d, c² Σ): ‖d‖² + (1 − c)² tr Σ."""
    sigma, d = np.cov(random(90, 30), rowvar=False), random(30, seed=2)
    for c in (0.0, 0.5, 1.0, 3.0):
        exact = (d**2).sum() + (1 - c) ** 2 * np.trace(sigma)
        found = metrics.frechet_distance(np.ones(30), sigma, np.ones(30) + d, c**2 * sigma)
        assert found == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("d", [2, 64])
def test_distance_is_that_of_the_matrix_square_root(d):
    (mu1, s1), (mu2, s2) = (
        moments_of(random(5 * d, d, seed=i) @ random(d, d, seed=9 + i)) for i in (0, 1)
    )
    root = scipy.linalg.sqrtm(s1 @ s2).real
    exact = ((mu1 - mu2) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert metrics.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(exact, rel=1e-8)


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
    i = np.arange(1, 301.0)
    axes = np.linalg.qr(random(300, 300))[0]
    a, b = SPECTRA[one](i), 1.3 * SPECTRA[other](i[::-1] if other == "steep" else i)
    s1, s2 = (axes * a) @ axes.T, (axes * b) @ axes.T
    zero = np.zeros(300)
    exact = ((a**0.5 - b**0.5) ** 2).sum()
    found = metrics.frechet_distance(zero, s1, zero, s2)
    assert abs(found - exact) <= 1e-8 * (a.sum() + b.sum())


@pytest.mark.parametrize("rank", [7, 64])
def test_distance_along_a_linear_map(rank):
    """x -> A x, with A symmetric and positive, carries N(0, Σ) to N(0, A Σ A) at the least cost:
    tr((1 − A) Σ (1 − A)). Their covariances do not commute."""
    x = random(rank, 64)
    sigma, A = x.T @ x, np.eye(64) + 0.05 * np.corrcoef(random(64, 200, seed=1))
    exact, zero = np.trace((np.eye(64) - A) @ sigma @ (np.eye(64) - A)), np.zeros(64)
    found = metrics.frechet_distance(zero, sigma, zero, A @ sigma @ A)
    assert found == pytest.approx(exact, rel=1e-9)


def distance_of_few(x, y):
    """The distance by the N x N Gram matrix alone: tr (Σ₁Σ₂)^½ is the nuclear norm of X Yᵀ."""
    a, b = ((v - v.mean(0)) / math.sqrt(len(v) - 1) for v in (x, y))
    overlap = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + (a**2).sum() + (b**2).sum() - 2 * overlap


@pytest.mark.parametrize("n, m", [(20, 20), (20, 7), (20, 400), (2, 3)])
def test_covariances_without_full_rank(n, m):
    x, y = random(n, 100), random(m, 100, seed=1) * 2 + 0.1
    found = metrics.frechet_distance(*moments_of(x), *moments_of(y))
    assert isinstance(found, float) and found == pytest.approx(distance_of_few(x, y), rel=1e-9)


def test_distance_is_symmetric_and_never_negative():
    for seed in range(20):
        x = random(12, 10, seed=seed)
        a, b = moments_of(x), moments_of(x + 1e-9 * random(12, 10, seed=99))
        assert metrics.frechet_distance(*a, *b) >= 0
        c = moments_of(random(30, 10, seed=seed + 50) * [*range(10)])
        there, back = metrics.frechet_distance(*a, *c), metrics.frechet_distance(*c, *a)
        assert there == pytest.approx(back, rel=1e-12) and there > 1


def test_rounding_in_a_file_is_forgiven():
    """float32 statistics, as some tools write them, are neither quite symmetric nor quite
    positive."""
    x, y = random(40, 60), random(50, 60, seed=1) + 1
    exact = distance_of_few(x, y)
    rounded = [v.astype(np.float32) for v in (*moments_of(x), *moments_of(y))]
    rounded[1] += (1e-7 * random(60, 60)).astype(np.float32)
    assert metrics.frechet_distance(*rounded) == pytest.approx(exact, rel=1e-2)


EYE = np.eye(3)


@pytest.mark.parametrize(
    "mu1, sigma1, mu2, sigma2",
    [
        (np.zeros(3), EYE * np.nan, np.zeros(3), EYE),
        (np.zeros(3), EYE, np.zeros(3), np.diag([1, 1, np.inf])),
        (np.full(3, np.nan), EYE, np.zeros(3), EYE),
        (np.zeros(3), EYE, np.array([0, np.inf, 0]), EYE),
        (np.zeros(3), np.ones((3, 2)), np.zeros(3), EYE),
        (np.zeros(3), np.ones(3), np.zeros(3), EYE),
        (np.zeros(3), np.diag([1, 1, -1]), np.zeros(3), EYE),
        (np.zeros(3), EYE, np.zeros(3), -EYE),
        (np.zeros(3), EYE, np.zeros(3), EYE + np.triu(np.ones((3, 3)), 1)),
        (np.zeros(2), np.eye(2), np.zeros(3), EYE),
        (np.zeros(3), np.eye(2), np.zeros(3), np.eye(2)),
        (np.zeros((1, 3)), EYE, np.zeros((1, 3)), EYE),
        (np.array(["a"]), [[1]], [0], [[1]]),
    ],
)
def test_arrays_that_are_not_mean_and_covariance_are_refused(mu1, sigma1, mu2, sigma2):
    with pytest.raises(ValueError) as info:
        metrics.frechet_distance(mu1, sigma1, mu2, sigma2)
    message_of(info)


@pytest.mark.slow
def test_distance_of_2048_features():
    x, y = random(300, 2048), random(200, 2048, seed=1)
    start = time.time()
    found = metrics.frechet_distance(*moments_of(x), *moments_of(y))
    assert found == pytest.approx(distance_of_few(x, y), rel=1e-9) and time.time() - start < 120


# ------------------------------------------------------------------ the Inception Score


def score_by_hand(p):
    """exp of the mean KL divergence of the rows of p from their mean."""
    kl = (p * np.log(p / p.mean(0))).sum(1)
    return math.exp(kl.mean())


def test_score_of_two_images_by_hand():
    """p = (0.8, 0.2) and (0.4, 0.6), mean (0.6, 0.4):
    KL = 0.8 ln(4/3) + 0.2 ln(1/2) and 0.4 ln(2/3) + 0.6 ln(3/2)."""
    kl = [
        0.8 * math.log(4 / 3) + 0.2 * math.log(1 / 2),
        0.4 * math.log(2 / 3) + 0.6 * math.log(3 / 2),
    ]
    p = torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=torch.float64)
    logits = p.log() + 7  # a shift does not matter
    mean, std = metrics.inception_score(logits, splits=1)
    assert mean == pytest.approx(math.exp(sum(kl) / 2), rel=1e-12) and std == 0


def test_score_is_shuffled_with_seed_2020_and_cut_into_equal_parts():
    p = np.random.default_rng(3).dirichlet(np.ones(6), 47)
    order = np.random.RandomState(2020).permutation(47)
    # 47 = 4 + 5 + 5 + 4 + 5 + 5 + 4 + 5 + 5 + 5: each begins at the floor of i 47 / 10
    cuts = [0, 4, 9, 14, 18, 23, 28, 32, 37, 42, 47]
    parts = [score_by_hand(p[order][a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    mean, std = metrics.inception_score(torch.from_numpy(np.log(p)))
    assert mean == pytest.approx(np.mean(parts), rel=1e-12)
    assert std == pytest.approx(np.std(parts), rel=1e-9) and std > 0.01  # ddof 0
    assert metrics.inception_score(torch.from_numpy(np.log(p))) == (mean, std)
    three = metrics.inception_score(torch.from_numpy(np.log(p)), splits=3)[0]
    assert three == pytest.approx(
        np.mean([score_by_hand(p[order][a:b]) for a, b in ((0, 15), (15, 31), (31, 47))])
    )


def test_score_of_images_that_look_alike_is_one():
    logits = torch.from_numpy(random(1, 1008)).float().expand(40, -1)
    mean, std = metrics.inception_score(logits)
    assert mean == pytest.approx(1, abs=1e-12) and std == pytest.approx(0, abs=1e-12)


def test_score_of_separate_classes_is_their_number():
    """Sorted by class, as files lie: unshuffled parts would hold one class each and score 1."""
    logits = 60 * torch.eye(10).repeat_interleave(200, 0)
    mean, std = metrics.inception_score(logits)
    # in 200 draws each share is off by about 0.02, which costs 10 (1 - 10/2 0.02²/0.1 ...)
    assert 9.5 < mean < 10 and 0 < std < 0.2
    assert metrics.inception_score(logits, splits=1)[0] == pytest.approx(10, rel=1e-12)


def test_scores_that_cannot_be():
    with pytest.raises(ValueError, match="at least one image in each of its 10 parts"):
        metrics.inception_score(torch.zeros(9, 5))
    assert metrics.inception_score(torch.zeros(10, 5)) == (1, 0)
    with pytest.raises(ValueError, match="not finite"):
        metrics.inception_score(torch.full((20, 5), math.nan))


# ------------------------------------------------------------------ PSNR


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_of_known_errors(channels):
    a = torch.full((4, channels, 6, 5), 100, dtype=torch.uint8)
    b = a + torch.tensor([1, 5, 155, 0], dtype=torch.uint8).view(4, 1, 1, 1)
    found = metrics.psnr(a, b)
    assert found.dtype == torch.float64 and found.shape == (4,)
    for got, error in zip(found[:3], (1, 5, 155), strict=True):
        assert got.item() == pytest.approx(20 * math.log10(255 / error), rel=1e-12)
    assert found[0].item() == pytest.approx(48.1308036, abs=1e-6)
    assert found[3] == math.inf
    assert torch.equal(metrics.psnr(b, a), found), "uint8 differences must not wrap around"
    c = a[:1].clone()
    c[0, 0, 0, 0] = 0  # one value of 30 or 90 is off by 100
    mse = 100**2 / (30 * channels)
    assert metrics.psnr(a[:1], c).item() == pytest.approx(10 * math.log10(255**2 / mse))


# ------------------------------------------------------------------ the program


def make_run(folder, name="run", channels=3, size=8, seed=0, **more):
    """runs/NAME/checkpoint.pt of a small untrained network whose images differ, EMA and raw
    likewise."""
    unet = dict(
        image_size=size, channels=8, channel_mult=(1,), res_blocks=1, patch=1, norm_groups=4,
        attention_resolutions=(), head_channels=None, resblock_updown=False, in_channels=channels,
        out_channels=channels, dropout=0.0,
    )  # fmt: skip
    settings = dict(
        schedule="cosine", T=1000, continuous=False, image_size=size, channels=channels, unet=unet,
        etsdm=False, etsdm_interval=100, etsdm_n=5, remap=None, prediction="v", data="shapes",
        seed=seed,
    ) | more  # fmt: skip
    net = denoisers.build_denoiser(settings).net
    weights = {}
    for kind, key in (("ema", seed), ("net", seed + 100)):
        torch.manual_seed(key)
        weights[kind] = {k: v + 0.1 * torch.randn(v.shape) for k, v in net.state_dict().items()}
    path = folder / "runs" / name
    path.mkdir(parents=True)
    checkpoint.save_checkpoint(
        path / "checkpoint.pt",
        {
            **{name: kind() for name, kind in checkpoint.ENTRIES.items()},
            **dict(settings=settings, step=7, **weights),
        },
    )
    return path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with sets, a run and feature networks."""
    folder = tmp_path_factory.mktemp("metrics")
    write_folder(folder / "a", photos(9))
    write_folder(folder / "b", photos(12, seed=1) // 2)
    make_run(folder, "mine")
    make_run(folder, "gray", channels=1)
    export(folder / "means.pt2", Means())
    export(folder / "maps.pt2", Maps(), dynamic="N")
    return folder


@pytest.fixture
def here(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return workplace


@pytest.fixture
def small(monkeypatch):
    """A small network in Inception's place, as if it were the published file."""
    monkeypatch.setattr(inception, "load", metrics_worker.load)
    monkeypatch.setattr(inception, "SHA256", "5" * 64)


def words_of(words):
    return [str(w) for part in words for w in (part.split() if isinstance(part, str) else [part])]


@pytest.fixture
def call(capsys):
    """call("fid a b", ...) -> what the program prints."""

    def run(*words):
        capsys.readouterr()
        metrics.main(words_of(words))
        return capsys.readouterr().out

    return run


@pytest.fixture
def measure(call):
    """measure("fid a b") -> the dict that --json prints."""
    return lambda *words: json.loads(call(*words, "--json"))


def less_progress_bars(text):
    lines = text.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and not re.search(r"\d/\d+ \[", line)]


@pytest.fixture
def refused(capsys, monkeypatch):
    """refused("fid a b") -> the one line of error, after exit status 2."""
    monkeypatch.delenv("TRACEBACK", raising=False)

    def run(*words):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["metrics.py"])
        with pytest.raises(SystemExit) as info:
            run_main(lambda: metrics.main(words_of(words)))
        printed = capsys.readouterr()
        lines = less_progress_bars(printed.err)
        assert info.value.code == 2 and len(lines) == 1, printed.err
        assert lines[0].startswith("metrics.py: error: ") and "Traceback" not in printed.err
        assert not printed.out
        return lines[0]

    return run


def to_rgb(array):
    return array.astype(np.float32) / np.float32(127.5) - 1


def test_features_of_another_network(here, measure, call):
    a, b = to_rgb(photos(9)), to_rgb(photos(12, seed=1) // 2)
    exact = distance_of_few(a.mean((1, 2), dtype=float), b.mean((1, 2), dtype=float))
    found = measure("fid a b --features means.pt2")
    assert found["value"] == pytest.approx(exact, rel=1e-5)
    digest = hashlib.sha256((here / "means.pt2").read_bytes()).hexdigest()
    assert found["metric"] == "FD(means.pt2)" and found["sha256"] == digest
    assert found["network"] == "means.pt2" and found["resize"] == "none"
    assert [side["n"] for side in found["sides"]] == [9, 12]
    assert [side["shape"] for side in found["sides"]] == [[3, 8, 8]] * 2

    quarters = [
        v.reshape(-1, 2, 4, 2, 4, 3).mean((2, 4), dtype=float).reshape(-1, 12) for v in (a, b)
    ]
    exact = distance_of_few(*quarters)
    assert measure("fid a b --features maps.pt2")["value"] == pytest.approx(exact, rel=1e-5)
    out = call("fid a b --features maps.pt2")
    first, *rest = out.splitlines()
    digest = hashlib.sha256((here / "maps.pt2").read_bytes()).hexdigest()
    assert first == (
        f"FD(maps.pt2) {exact:.4f} | 9 against 12 images | 8x8, resize: none | "
        f"maps.pt2, SHA-256 {digest[:12]}"
    )
    assert "FID" not in out and "Inception" not in out
    warnings = [line for line in rest if "warning: " in line]
    assert ["under 10,000" in line for line in warnings].count(True) == 2
    assert "9 images of a in 12 dimensions: the covariance does not have full rank" in warnings[1]


def test_batch_size_and_order_of_flags_do_not_matter(here, measure):
    whole = measure("fid a b --features maps.pt2")
    for words in (
        "fid a b --features maps.pt2 --batch-size 1",
        "fid a --batch-size 5 --features maps.pt2 b",
        "--features maps.pt2 fid a b",
    ):
        found = measure(words)
        assert found.pop("value") == pytest.approx(whole["value"], rel=1e-6)
        assert found == {k: v for k, v in whole.items() if k not in ("value",)} or (
            found["text"] == whole["text"]
        )
    assert measure("fid b a --features maps.pt2")["value"] == pytest.approx(whole["value"])
    assert measure("fid a a --features maps.pt2")["value"] <= 1e-9


def test_a_run_alone_is_compared_with_its_own_data(here, measure):
    words = "--features means.pt2 -n 6 --nfe 2"
    alone, named = measure("fid mine", words), measure("fid mine shapes", words)
    assert alone == named and alone["value"] > 0.01
    assert [side["source"] for side in alone["sides"]] == ["mine", "shapes"]
    assert alone["sides"][0]["shape"] == alone["sides"][1]["shape"] == [3, 8, 8]
    assert "6 images by mine, ema weights, seed 0, ddim-2-step7" == alone["sides"][0]["what"]
    raw = measure("fid mine", words, "--weights raw")
    assert raw["value"] != alone["value"]


def test_a_gray_run_is_compared_in_gray(here, measure):
    """Against a colour set, turned gray; the network is shown three equal channels."""
    found = measure("fid gray a --features means.pt2 -n 5 --nfe 2")
    assert [side["shape"] for side in found["sides"]] == [[1, 8, 8]] * 2
    gray = [np.asarray(Image.open(p).convert("L")) for p in sorted((here / "a").iterdir())]
    np.save("gray.npy", np.stack(gray)[..., None].repeat(3, 3))
    as_colour = measure("fid a gray.npy --features means.pt2 --channels 1")
    assert as_colour["value"] <= 1e-9


def test_black_images_are_scored(here, measure):
    np.save("black.npy", np.zeros((5, 8, 8, 3), np.uint8))
    a = to_rgb(photos(9)).mean((1, 2), dtype=float)
    exact = ((a.mean(0) + 1) ** 2).sum() + np.cov(a, rowvar=False).trace()
    found = measure("fid black.npy a --features means.pt2")["value"]
    assert found == pytest.approx(exact, rel=1e-5)


# ------------------------------------------------------------------ statistics


def test_statistics_take_the_place_of_their_images(here, measure, call, monkeypatch):
    direct = measure("fid a b --features maps.pt2")
    out = call("stats a a.npz --features maps.pt2")
    digest = direct["sha256"]
    assert f"statistics in {here / 'a.npz'} | 9 images" in out and "FID" not in out
    with np.load("a.npz") as file:
        rows = to_rgb(photos(9)).reshape(-1, 2, 4, 2, 4, 3).mean((2, 4), dtype=float)
        rows = rows.transpose(0, 3, 1, 2).reshape(-1, 12)
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        np.testing.assert_allclose(file["mu"], rows.mean(0), atol=1e-7)
        np.testing.assert_allclose(file["sigma"], np.cov(rows, rowvar=False), atol=1e-7)
        assert int(file["n"]) == 9 and str(file["sha256"]) == digest
    found = measure("fid a.npz b --features maps.pt2")
    assert found["value"] == pytest.approx(direct["value"], rel=1e-9)
    assert [side["n"] for side in found["sides"]] == [9, 12]

    call("stats b b.npz --features maps.pt2")
    monkeypatch.setattr(features, "open_network", None)  # two files need no network
    found = measure("fid a.npz b.npz")
    assert found["value"] == pytest.approx(direct["value"], rel=1e-9)
    assert found["metric"] == "FD(maps.pt2)" and found["sha256"] == digest
    assert "FID" not in call("fid a.npz b.npz")


def test_statistics_of_other_tools(here, measure, call, small):
    """pytorch-fid's and EDM's files are mu and sigma alone; an image reference may hold both."""
    f = Small()(torch.from_numpy(photos(12, seed=1) // 2).permute(0, 3, 1, 2))[0].double().numpy()
    mu, sigma = moments_of(f)
    np.savez("theirs.npz", mu=mu, sigma=sigma)
    direct = measure("fid a b")
    found = measure("fid a theirs.npz")
    assert found["value"] == pytest.approx(direct["value"], rel=1e-6)
    assert found["metric"] == "FID" and [side["n"] for side in found["sides"]] == [9, None]
    assert any("theirs.npz has no record of its image count" in w for w in found["warnings"])
    assert "9 against ? images" in call("fid a theirs.npz")

    np.savez("both.npz", arr_0=photos(12) // 4, mu=mu, sigma=sigma)
    assert measure("fid a both.npz")["value"] == found["value"], "statistics, for fid"
    scored = measure("is both.npz")
    assert scored["sides"][0]["n"] == 12 and scored["value"] > 1, "images, for is"
    np.save("quarter.npy", photos(12) // 4 + 1)
    decibels = measure("psnr both.npz quarter.npy")["value"]
    assert decibels == pytest.approx(48.1308036, abs=1e-6), "images, for psnr"

    neither = measure("fid theirs.npz theirs.npz")
    assert neither["metric"] == "FD" and neither["network"] is None and neither["value"] <= 1e-9
    assert "None" not in call("fid theirs.npz theirs.npz")
    metrics.main(["stats", "a", "ours.npz"])
    one = measure("fid ours.npz theirs.npz")
    assert one["metric"] == "FID" and one["value"] == pytest.approx(found["value"], rel=1e-6)


def test_statistics_that_do_not_compare(here, call, refused, small):
    call("stats a maps.npz --features maps.pt2")
    call("stats a means.npz --features means.pt2")
    call("stats a small.npz")
    message = refused("fid maps.npz b --features means.pt2")
    assert "maps.npz has statistics of maps.pt2" in message and "this is means.pt2" in message
    assert "cannot be compared" in refused("fid maps.npz b")
    message = refused("fid maps.npz means.npz")
    assert "maps.pt2" in message and "means.pt2" in message and "cannot be compared" in message
    assert "cannot be compared" in refused("fid small.npz means.npz")
    # another file's weights under the same name are another network
    with np.load("maps.npz") as file:
        np.savez("other.npz", **{**file, "sha256": "0" * 64})
    assert "cannot be compared" in refused("fid other.npz maps.npz")
    assert "cannot be compared" in refused("fid other.npz b --features maps.pt2")
    np.savez("three.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert "error: three.npz and maps.npz: statistics of different sizes" in refused(
        "fid three.npz maps.npz"
    )
    np.savez("bad.npz", mu=np.zeros(12), sigma=-np.eye(12))
    assert "error: bad.npz and maps.npz: not a covariance" in refused("fid bad.npz maps.npz")
    assert "error: maps.npz is not a run: name the images to compare it with" in refused(
        "fid maps.npz"
    )


def test_pickled_statistics_are_refused_with_the_way_out(here, measure, refused):
    """SA-DPM's .npy and EDM2's .pkl are dicts in a pickle. The command that is printed works."""
    numbers = dict(mu=np.arange(3.0), sigma=np.eye(3))
    np.savez("plain.npz", **numbers)
    np.save("it's theirs.npy", numbers)
    Path("edm2.pkl").write_bytes(pickle.dumps(dict(num_images=9, fid=numbers)))
    for name in ("it's theirs", "edm2"):
        source = next(p for p in os.listdir() if p.startswith(name) and p[-4:] != ".npz")
        message = refused("fid", Path(source), "plain.npz")
        assert f"error: {source} is a pickle, and a pickle can run code" in message
        python, *words = shlex.split(message.split("sigma:  ")[1])
        assert python == "python"
        subprocess.run([sys.executable, *words], check=True, cwd=here)
        assert measure("fid", Path(f"{name}.npz"), "plain.npz")["value"] <= 1e-9
    np.save("images.npy", photos(4))
    assert features.read_statistics("images.npy") is None, "an array of numbers is not a pickle"


def test_statistics_of_other_sizes_are_pointed_out(here, measure, call):
    call("stats a a12.npz --features means.pt2 --image-size 12")
    found = measure("fid a12.npz b --features means.pt2")
    assert "the images have different sizes: 8 and 12 pixels" in found["warnings"]


def test_where_statistics_may_go(here, call, refused):
    words = "--features means.pt2"
    np.savez("images.npz", photos(3))
    before = (here / "images.npz").read_bytes()
    assert "images.npz exists but does not hold statistics" in refused("stats a images.npz", words)
    assert (here / "images.npz").read_bytes() == before
    for name in ("out", "out.npy", "out.npz.bak"):
        assert ".npz" in refused(f"stats a {name}", words)
        assert not (here / name).exists()
    assert "no such folder" in refused("stats a nowhere/out.npz", words)
    assert "stats takes A OUT.npz" in refused("stats a", words)
    call("stats a again.npz", words)
    first = (here / "again.npz").stat().st_ino
    call("stats b again.npz", words)  # statistics may be replaced
    assert (here / "again.npz").stat().st_ino != first and int(np.load("again.npz")["n"]) == 12
    assert not [p for p in here.iterdir() if p.suffix == ".tmp"]


# ------------------------------------------------------------------ feature files


def test_feature_files_that_are_something_else(here, refused):
    (here / "page.pt2").write_text("<!doctype html><html>404</html>")
    (here / "noise.pt2").write_bytes(bytes(range(200)))
    (here / "empty.pt").touch()
    torch.save({"weight": torch.zeros(3)}, here / "weights.pt")
    whole = (here / "maps.pt2").read_bytes()
    (here / "cut.pt2").write_bytes(whole[:-500])
    (here / "half.pt2").write_bytes(whole[: len(whole) // 2])
    for name, words in {
        "page.pt2": "web page",
        "noise.pt2": "first bytes",
        "empty.pt": "empty",
        "weights.pt": "another kind of zip",
        "cut.pt2": "cut short",
        "half.pt2": "cut short",
        "runs/mine/checkpoint.pt": "another kind of zip",
    }.items():
        message = refused("fid a b --features", name)
        assert f"{name} is not a network saved by torch.export.save" in message
        assert words in message
    assert "--features: no such file: none.pt2" in refused("fid a b --features none.pt2")
    assert "--features: no such file: runs" in refused("fid a b --features runs")


class Pair(torch.nn.Module):
    def forward(self, x):
        return x, x


class Scalar(torch.nn.Module):
    def forward(self, x):
        return x.mean()


class NotFinite(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) / 0


@pytest.mark.parametrize(
    "net, how, words",
    [
        (Pair, {}, "must return one tensor (N, features) for N images; for 9 it returned tuple"),
        (Scalar, {}, "for 9 it returned ()"),
        (NotFinite, {}, "a and b: statistics with values that are not finite"),
        (Means, dict(channels=1), "(exported for other images: --image-size, --channels?)"),
        (Means, dict(size=16, dynamic="N"), "(exported for other images: "),
        (Means, dict(dynamic="HW"), "(exported without a dynamic batch axis?)"),
    ],
)
def test_networks_that_give_no_features(here, refused, net, how, words):
    export("strange.pt2", net(), **how)
    message = refused("fid a b --features strange.pt2")
    assert words in message
    if "exported" in words:
        assert "strange.pt2 does not take a batch of shape (9, 3, 8, 8): Guard failed" in message


# ------------------------------------------------------------------ FID and IS


def test_fid_of_a_network_that_looks_like_the_published_one(here, measure, call, small):
    f = [
        Small()(torch.from_numpy(x).permute(0, 3, 1, 2))[0].double().numpy()
        for x in (photos(9), photos(12, seed=1) // 2)
    ]
    found = measure("fid a b")
    assert found["value"] == pytest.approx(distance_of_few(*f), rel=1e-9)
    assert found["metric"] == "FID" and found["network"] == features.INCEPTION
    assert not any("published" in w for w in found["warnings"])
    assert call("fid a b").startswith(
        f"FID {found['value']:.4f} | 9 against 12 images | 8x8, "
        "resize: bilinear to 299x299 without antialiasing | "
        "Inception 2015-12-05, SHA-256 555555555555\n"
    )


def test_is_puts_the_logits_into_the_order_of_the_images(here, measure, call, small):
    logits = Small()(torch.from_numpy(photos(12, seed=1) // 2).permute(0, 3, 1, 2))[1].numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.random.RandomState(2020).permutation(12)
    cuts = [12 * i // 10 for i in range(11)]
    parts = [score_by_hand(p[order][a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    for batch in (1, 5, 64):
        found = measure("is b --batch-size", batch)
        assert found["value"] == pytest.approx(np.mean(parts), rel=1e-9) and np.std(parts) > 1e-3
        assert found["std"] == pytest.approx(np.std(parts), rel=1e-9)
    assert found["metric"] == "IS" and any("under 10,000" in w for w in found["warnings"])
    out = call("is b")
    assert out.startswith(f"IS {np.mean(parts):.4f} ± {np.std(parts):.4f} | 12 images | 8x8, ")


def test_is_of_a_classifier_of_ones_own(here, measure):
    """Its outputs are logits: the score is that of those classes, and bears the file's name."""
    x = torch.from_numpy(photos(12, seed=1) // 2).permute(0, 3, 1, 2)
    logits = (x.float() / 127.5 - 1).mean((2, 3))
    mean, std = metrics.inception_score(logits.numpy())
    found = measure("is b --features means.pt2")
    assert found["metric"] == "IS(means.pt2)"
    assert found["value"] == pytest.approx(mean, rel=1e-5)
    assert found["std"] == pytest.approx(std, rel=1e-3)


def test_is_refuses(here, refused, small):
    message = "error: a: the Inception Score needs at least one image in each of its 10 parts"
    assert message in refused("is a")
    assert "is takes A, not 2 names" in refused("is a b")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of Inception's form with random weights -> its path and SHA-256."""
    torch.manual_seed(0)
    net = inception.Inception()
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.save(net.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def few():
    return photos(3), photos(2, seed=1)


def check_inception_line(line, value, sha256):
    assert line == (
        f"FID {value} | 3 against 2 images | 8x8, resize: bilinear to 299x299 without "
        f"antialiasing | Inception 2015-12-05, SHA-256 {sha256[:12]}"
    )


@pytest.mark.slow
def test_inception_by_path(here, call, weights, monkeypatch):
    """The whole way, but for the distance in 2048 dimensions, which alone takes seconds."""
    path, sha256 = weights
    seen = []
    monkeypatch.setattr(metrics, "frechet_distance", lambda *a: seen.extend(a) or 1.5)
    np.save("few.npy", few()[0])
    np.save("fewer.npy", few()[1])
    out = call("fid few.npy fewer.npy --inception", path)
    first, *rest = out.splitlines()
    check_inception_line(first, "1.5000", sha256)
    assert f"these weights are not the published file ({inception.SHA256[:12]}...)" in out
    assert "3 images of few.npy: under 10,000" in out
    assert "3 images of few.npy in 2048 dimensions: the covariance does not have full rank" in out
    net = inception.load(path)[0]
    pool3 = net(torch.from_numpy(few()[0]).permute(0, 3, 1, 2))[0].double().numpy()
    mu, sigma = moments_of(pool3)
    np.testing.assert_allclose(seen[0], mu, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(seen[1], sigma, atol=1e-3 * abs(sigma).max())


@pytest.mark.slow
def test_bf16_features_are_near_and_say_what_they_are(here, measure, call, refused, weights):
    path, _ = weights
    np.save("few.npy", few()[0])
    np.save("fewer.npy", few()[1])
    call("stats few.npy half.npz --precision bf16 --inception", path)
    net = inception.load(path)[0]
    exact = net(torch.from_numpy(few()[0]).permute(0, 3, 1, 2))[0].double().numpy().mean(0)
    with np.load("half.npz") as archive:
        assert archive["precision"].item() == "bf16"
        mu = archive["mu"]
    assert 0 < abs(mu - exact).max() < 0.02 * abs(exact).max()
    found = measure("fid fewer.npy half.npz --inception", path)
    assert any("bf16 on one side only" in w for w in found["warnings"])
    for words in ("psnr few.npy few.npy", "fid half.npz half.npz"):
        assert "leave it out" in refused(f"{words} --precision bf16")


@pytest.mark.slow
def test_inception_by_path_to_the_end(here, measure, call, weights):
    path, sha256 = weights
    np.save("few.npy", few()[0])
    np.save("fewer.npy", few()[1])
    net = inception.load(path)[0]
    pool3 = [net(torch.from_numpy(x).permute(0, 3, 1, 2))[0].double().numpy() for x in few()]
    found = measure("fid few.npy fewer.npy --inception", path)
    assert found["value"] == pytest.approx(distance_of_few(*pool3), rel=1e-3)
    np.save("ten.npy", photos(10))
    assert measure("is ten.npy --inception", path)["value"] == 1.0  # one image in each part


def test_without_weights_and_without_network(here, tmp_path, refused, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "URL", (tmp_path / "no network").as_uri())
    for words in ("fid a b", "is b", "stats a new.npz"):
        message = refused(words)
        assert inception.URL in message and inception.SHA256 in message
        assert str(tmp_path / "diffusion-data" / inception.NAME) in message
    assert not (here / "new.npz").exists()
    # a wrong file in the cache is not accepted
    (tmp_path / "diffusion-data" / inception.NAME).write_bytes(b"something else")
    assert inception.SHA256 in refused("fid a b")


def test_a_wrong_inception_file(here, refused):
    (here / "page.pth").write_text("<html>")
    assert "web page" in refused("fid a b --inception page.pth")
    assert "no such file" in refused("fid a b --inception none.pth")
    assert "do not give --inception" in refused("fid a b --inception page.pth --features means.pt2")


# ------------------------------------------------------------------ pairs


def test_psnr_of_pairs(here, measure, call):
    errors = np.array([1, 2, 3, 4])
    array = photos(4) // 2
    write_folder(here / "first", array)
    write_folder(here / "second", array + errors.astype(np.uint8)[:, None, None, None])
    exact = np.mean(20 * np.log10(255 / errors))
    found = measure("psnr first second --batch-size 3")
    assert found["metric"] == "PSNR" and found["value"] == pytest.approx(exact, rel=1e-12)
    assert found["network"] is None and found["sha256"] is None and found["resize"] == "none"
    assert call("psnr first second").startswith(
        f"PSNR {exact:.4f} dB | 4 against 4 images | 8x8, resize: none\n"
    )
    # one suffix or another: the name counts
    (here / "third").mkdir()
    for i, image in enumerate(array):
        Image.fromarray(image).save(here / "third" / f"{i:03}.bmp")
    assert measure("psnr third second")["value"] == pytest.approx(exact, rel=1e-12)
    assert measure("psnr third second --channels 1")["value"] == pytest.approx(exact, abs=0.2)


def test_psnr_pairs_by_folder_too(here, measure, refused):
    """cat/000 is not compared with dog/000, which looks the same by name."""
    for name, kinds in {"one": "cat dog", "two": "cat dog", "three": "cat emu"}.items():
        for i, kind in enumerate(kinds.split()):
            write_folder(here / name / kind, photos(2, seed=i))
    assert measure("psnr one two")["text"] == "inf dB"
    message = refused("psnr one three")
    assert (
        "error: one and three: dog/000 and emu/000 are not a pair. psnr pairs files by folder"
        in message
    )
    with zipfile.ZipFile("one.zip", "w") as archive:
        for path in (here / "one").rglob("*.png"):
            archive.write(path, path.relative_to(here / "one"))
    assert measure("psnr one.zip two")["text"] == "inf dB"
    assert "error: one.zip and three: dog/000 and emu/000 are not a pair" in refused(
        "psnr one.zip three"
    )
    assert measure("psnr one/cat/000.png two/cat/000.png")["text"] == "inf dB"


def test_psnr_of_equal_pairs(here, measure, call):
    array = photos(3)
    other = array.copy()
    other[1] ^= 1  # one of three pairs differs, by 1 everywhere
    np.save("one.npy", array)
    np.save("two.npy", other)
    text = call("psnr one.npy two.npy --json")
    assert "Infinity" not in text and "NaN" not in text
    found = json.loads(text)
    assert found["value"] is None and found["text"] == "inf dB"
    assert any("2 pairs are equal" in w for w in found["warnings"])
    assert call("psnr one.npy two.npy").startswith("PSNR inf dB")


def test_psnr_of_gray_images(here, measure):
    array = photos(3, channels=1) // 2
    np.save("one.npy", array)
    np.save("two.npy", array + np.uint8(5))
    for channels in ("", "--channels 1"):
        found = measure("psnr one.npy two.npy", channels)["value"]
        assert found == pytest.approx(20 * math.log10(255 / 5), rel=1e-12)


def test_psnr_refuses(here, refused):
    write_folder(here / "nine", photos(9))
    Path("nine/004.png").rename("nine/004b.png")
    assert "error: a and nine: 004 and 004b are not a pair" in refused("psnr a nine")
    assert "error: a and b: psnr needs pairs, but these are 9 and 12 images" in refused("psnr a b")
    for words in ("psnr mine a", "psnr a mine"):
        assert "error: mine is a run, whose images have no pairs" in refused(words, "-n 9 --nfe 1")
    assert "psnr takes A B" in refused("psnr a")
    np.savez("s.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert "s.npz" in refused("psnr s.npz a")
    assert "error: --features has no effect" in refused("psnr a a --features means.pt2")


# ------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    "words, message",
    [
        ("fid nothing a", "error: nothing is not a file, folder or data set (shapes cifar10)"),
        ("fid a", "error: a is not a run: name the images to compare it with"),
        ("fid a b mine", "fid takes A or A B, not 3 names"),
        ("fid a b -n 0", "error: --num must be from 1"),
        ("fid a b --batch-size 0", "error: --batch-size must be from 1"),
        ("fid a b --image-size 0", "error: --image-size must be"),
        ("fid a b --image-size 9000", "error: --image-size must be"),
        ("fid mine --seed -1", "error: --seed"),
        ("fid mine --eta 0.5 --sampler ddpm", "error: --eta has no effect on ddpm"),
        ("fid mine --nfe 0", "error: --nfe must be from 1 to 100000, not 0"),
        ("fid mine a --image-size 9", "error: --image-size does not fit the run's images, 3x8x8"),
        ("fid a mixed.npy", "error: a and mixed.npy: images of different shapes"),
    ],
)
def test_what_is_refused_in_one_line(here, refused, words, message):
    np.save("mixed.npy", photos(3, 12))
    assert message in refused(words, "--features means.pt2")


@pytest.mark.parametrize("words, missing", [("", "METRIC, A [B]"), ("is", "A [B]")])
def test_missing_words_are_named(words, missing, capsys):
    with pytest.raises(SystemExit) as info:
        metrics.main(words.split())
    assert info.value.code == 2
    assert capsys.readouterr().err.endswith(f"arguments are required: {missing}\n")


def test_one_image_is_refused(here, refused):
    np.save("one.npy", photos(1))
    message = refused("fid one.npy a --features means.pt2")
    assert "error: one.npy: a covariance needs at least 2 images, not 1" in message


def program(*words, cwd, status=0):
    return run_program(ROOT / "metrics.py", *words, cwd=cwd, status=status)


@pytest.mark.slow
def test_json_is_all_that_the_program_prints(here):
    done = program("fid", "a", "b", "--features", "maps.pt2", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # one object, and nothing else
    assert done.stdout.count("\n") == 1 and done.stdout.startswith("{")
    assert found["metric"] == "FD(maps.pt2)" and found["warnings"]
    assert "FID" not in done.stdout + done.stderr


def check_error(done, words):
    assert done.returncode == 2 and not done.stdout
    (line,) = less_progress_bars(done.stderr)
    assert line.startswith(f"metrics.py: error: {words}")


@pytest.mark.slow
def test_an_error_of_the_program_is_one_line(here):
    check_error(program("fid", "nothing", "a", "--json", cwd=here, status=2), "nothing is not a")
    torch.save({"weight": torch.zeros(3)}, here / "weights.pt")  # torch.export logs a traceback
    done = program("fid", "a", "b", "--features", "weights.pt", cwd=here, status=2)
    check_error(done, "--features weights.pt is not a network")
    for name in ("cut.pt2", "half.pt2"):
        whole = (here / "maps.pt2").read_bytes()
        (here / name).write_bytes(whole[: len(whole) // 2 if name == "half.pt2" else -500])
        done = program("fid", "a", "b", "--features", name, cwd=here, status=2)
        check_error(done, f"--features {name}")


# ------------------------------------------------------------------ several processes


CALLS = [
    "fid odd other",
    "fid odd pair --batch-size 2",
    "fid mine shapes -n 5 --nfe 2 --sampler ddpm --batch-size 2",
    "fid odd other --features means.pt2",
    "is odd --batch-size 3",
    "psnr odd shifted",
    "psnr one shifted-one",  # fewer images than processes
    "stats odd odd.npz",
    "fid odd.npz pair",
]


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3, 4])
def test_processes_share_the_work_and_agree(here, n, measure, small, monkeypatch):
    array = photos(13) // 2
    np.save("odd.npy", array)
    np.save("other.npy", photos(7, seed=1) // 2)
    np.save("pair.npy", photos(2, seed=2))
    np.save("shifted.npy", array + np.arange(1, 14, dtype=np.uint8)[:, None, None, None])
    np.save("one.npy", array[:1])
    np.save("shifted-one.npy", array[:1] + np.uint8(3))
    calls = [
        [f"{w}.npy" if (here / f"{w}.npy").exists() else w for w in line.split()] for line in CALLS
    ]
    ones = [measure(*words) for words in calls]
    done = torchrun(
        n,
        ROOT / "tests" / "metrics_worker.py",
        json.dumps([[*words, "--json"] for words in calls]),
        cwd=here,
    )
    many = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(many) == len(ones), "only rank 0 prints"
    for one, other in zip(ones, many, strict=True):
        if one["value"] is not None:
            assert other["value"] == pytest.approx(one["value"], rel=1e-6)
            assert one["value"] > 1e-5
        assert other["sides"] == one["sides"]
    assert many[4]["std"] == pytest.approx(ones[4]["std"], rel=1e-6)


@pytest.mark.slow
def test_an_error_is_printed_by_one_process(here):
    (here / "page.pt").write_text("<html>")
    for words in (["nothing", "a"], ["a", "b", "--features", "page.pt"]):
        done = torchrun(2, ROOT / "metrics.py", "fid", *words, cwd=here, check=False)
        lines = [x for x in done.stderr.splitlines() if x.startswith("metrics.py: error: ")]
        assert done.returncode != 0 and len(lines) == 1
        assert "Connection closed" not in done.stderr


# ------------------------------------------------------------------ sets of images


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def open_sets(*words, metric="fid"):
    config = parse_into(metrics.MetricsConfig, [metric, *map(str, words)])
    return metrics.open_sets(config.sources, config, ALONE)


def open_one(*words):
    return open_sets(*words, metric="is")[0]


def pictures(images, *indices):
    """uint8 (n, H, W, C), all of them or those asked for."""
    return images.batch(list(indices or range(images.n))).permute(0, 2, 3, 1).numpy()


def not_open(*words):
    """The error of a set alone, or of two."""
    for metric in ("is", "fid"):
        with pytest.raises((ValueError, OSError)) as info:
            open_sets(*words, metric=metric)
        if not str(info.value).startswith("is takes"):
            return message_of(info)


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_stored_images_keep_every_bit_and_their_own_size(tmp_path, kind):
    array = photos(5, 12)
    source = write_folder(tmp_path / "folder", array)
    if kind == "zip":
        source = zip_of(source)
    elif kind == "npz":
        np.savez(tmp_path / "x.npz", images=array, other=array[:1])
        source = f"{tmp_path}/x.npz:images"
    side = open_one(source)
    assert side.n == 5 and side.shape == (3, 12, 12) and "5 images" in side.summary
    assert np.array_equal(pictures(side), array)
    assert np.array_equal(pictures(side, 3, 0), array[[3, 0]])
    assert side.names == ([] if kind == "npz" else [f"{i:03}" for i in range(5)])


def test_streamed_files_are_the_same(empty, monkeypatch):
    """A set beyond the memory limit is read when asked for, by threads."""
    write_folder(empty / "set", photos(9))
    load = data.load
    monkeypatch.setattr(data, "load", lambda *a, **k: load(*a, **k, memory_limit=0))
    side = open_one("set")
    assert "streamed" in side.summary
    assert np.array_equal(pictures(side, 8, 2, 4), photos(9)[[8, 2, 4]])


def test_shapes_are_endless_and_num_says_how_many(empty):
    side = open_one("shapes", "--image-size", "16")
    assert side.n == 10_000 and side.shape == (3, 16, 16)
    side = open_one("shapes", "-n", "4", "--image-size", "16")
    assert side.n == 4
    drawn = [data.draw_shape((0, i), 16) for i in range(4)]
    assert np.array_equal(pictures(side), np.stack(drawn))
    write_folder(empty / "set", photos(3))
    assert open_one("set").n == 3
    assert "other sets are used whole" in not_open("set", "-n", "2")
    assert [s.n for s in open_sets("set", "shapes", "-n", "2", "--image-size", "8")] == [3, 2]


def test_sizes(empty):
    write_folder(empty / "small", photos(2, 8))
    write_folder(empty / "large", photos(2, 12))
    write_folder(empty / "mixed", [photos(1, size)[0] for size in (8, 9, 10)])
    write_folder(empty / "oblong", photos(2, 8)[:, :6])
    message = not_open("small", "large")
    assert "3x8x8 and 3x12x12" in message and "--image-size" in message
    message = not_open("mixed")
    assert "mixed" in message and "8x8 9x9 10x10" in message and "--image-size" in message
    assert "8x6" in not_open("oblong")
    assert "--image-size" in not_open("oblong")
    for side in open_sets("small", "large", "--image-size", "10"):
        assert side.shape == (3, 10, 10)
    assert open_one("mixed", "--image-size", "6", "--channels", "1").shape == (1, 6, 6)


def test_names_that_are_nothing(empty):
    make_run(empty, "mine")
    message = not_open("myne")
    assert message == (
        "myne is not a file, folder or data set (shapes cifar10): no run myne; under runs/ there "
        "are: mine"
    )
    assert "nothing.zip" in not_open("nothing.zip")
    (empty / "empty").mkdir()
    assert "empty folder" in not_open("empty")
    (empty / "runs" / "half").mkdir()
    assert "half is not a file" in not_open("half"), "a run that never saved"


def test_bad_images_are_named_or_left_out(empty):
    write_folder(empty / "set", photos(3))
    (empty / "set" / "001.png").write_text("<html>")
    assert "001.png" in not_open("set") and "--skip-bad-images" in not_open("set")
    side = open_one("set", "--skip-bad-images")
    assert side.n == 2 and np.array_equal(pictures(side), photos(3)[[0, 2]])


def test_a_run_by_name_folder_and_checkpoint(empty):
    path = make_run(empty, "mine")
    for source in ("mine", "runs/mine", path / "checkpoint.pt"):
        side = open_one(source, "-n", "6", "--nfe", "2")
        assert side.n == 6 and side.shape == (3, 8, 8)
        assert side.summary == "6 images by mine, ema weights, seed 0, ddim-2-step7"
    assert open_one("mine").n == 10_000
    words = "--sampler dpm-solver --order 2 --spacing logsnr --weights raw --seed 3 --clip on"
    side = open_one("mine", *words.split())
    for part in ("raw weights, seed 3, dpm-solver", "order-2", "spacing-logsnr", "clip-on"):
        assert part in side.summary


def test_a_run_that_cannot_start_at_the_end_says_where_it_starts(empty):
    make_run(empty, "mine", prediction="eps", schedule="zero-terminal-snr")
    assert open_one("mine").summary.endswith("ddim-50-step7, from t = 999")


def test_a_folder_of_images_comes_before_a_run_of_its_name(empty):
    make_run(empty, "both")
    assert isinstance(open_one("both", "-n", "1"), metrics.Generated)
    write_folder(empty / "both", photos(3))
    side = open_one("both")
    assert isinstance(side, metrics.Stored) and side.n == 3
    assert isinstance(open_one("runs/both", "-n", "1"), metrics.Generated)


@pytest.mark.parametrize(
    "words", ["--nfe 3", "--nfe 4 --sampler ddpm --weights raw", "--nfe 3 --eta 0.5 --clip off"]
)
def test_images_of_a_run_are_those_of_sample(empty, words):
    make_run(empty, "mine")
    sample.main(f"mine --num 5 --seed 11 --out out {words}".split())
    files = np.stack([np.asarray(Image.open(p)) for p in sorted((empty / "out").glob("0*.png"))])
    side = open_one("mine", "-n", "5", "--seed", "11", *words.split())
    ours = side.batch([0, 1, 2, 3, 4])
    assert ours.dtype == torch.uint8 and ours.shape == (5, 3, 8, 8)
    assert files.std() > 20 and not np.array_equal(files[0], files[1])
    assert np.abs(pictures(side).astype(int) - files).max() <= 1
    # alone, or in another order, they are the same
    assert np.abs(pictures(side, 3, 1).astype(int) - files[[3, 1]]).max() <= 1


def test_sets_are_brought_to_the_shape_of_the_run(empty):
    make_run(empty, "gray", channels=1, size=8)
    make_run(empty, "colour", channels=3, size=12)
    array = photos(3, 16)
    write_folder(empty / "set", array)
    generated, stored = open_sets("gray", "set", "-n", "2", "--nfe", "1")
    assert generated.shape == stored.shape == (1, 8, 8)
    assert stored.batch([1]).shape == generated.batch([1]).shape == (1, 1, 8, 8)
    by_pillow = Image.fromarray(array[1]).resize((8, 8), Image.Resampling.LANCZOS)
    by_pillow = np.asarray(by_pillow.convert("L")).astype(int)
    assert np.abs(pictures(stored, 1)[0, :, :, 0].astype(int) - by_pillow).max() <= 2
    assert [side.shape for side in open_sets("set", "colour")] == [(3, 12, 12)] * 2
    assert "1x8x8 and 3x12x12" in not_open("gray", "colour")
    for flag, value in (("--image-size", "16"), ("--channels", "3")):
        message = not_open("gray", "set", flag, value)
        assert message == f"{flag} does not fit the run's images, 1x8x8: leave it out"
    open_sets("gray", "set", "--image-size", "8", "--channels", "1")  # says what is so anyway


def test_a_run_alone_brings_its_data(empty):
    make_run(empty, "mine")
    assert [side.source for side in open_sets("mine", "-n", "2")] == ["mine", "shapes"]
    write_folder(empty / "set", photos(2))
    np.savez("s.npz", mu=np.zeros(2), sigma=np.eye(2))
    for other in ("set", "s.npz", "shapes"):
        with pytest.raises(ValueError, match=f"^{other} is not a run: name the images to compare"):
            open_sets(other)
    make_run(empty, "moved", data="nowhere")
    with pytest.raises(FileNotFoundError, match="^moved was trained on 'nowhere', which does not"):
        open_sets("moved")


def test_files_that_are_not_runs(empty):
    torch.save({"a": torch.zeros(2)}, "x.pt")
    assert "x.pt is not a checkpoint of train.py" in not_open("x.pt")
    Path("page.pt").write_text("<html>")
    assert "web page" in not_open("page.pt")
    Path("x.txt").write_text("hello")
    assert "x.txt is not a data set of a known kind" in not_open("x.txt")


def test_flags_about_sampling_need_a_run(empty):
    write_folder(empty / "set", photos(3))
    for words in (["--nfe", "7"], ["--seed", "1"], ["--weights", "raw"], ["--sampler", "ddpm"]):
        assert f"{words[0]} is only for sampling a run" in not_open("set", *words)
