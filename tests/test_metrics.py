"""metrics.py: the three scores against closed forms and independent arithmetic, and the program as
one uses it."""

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
from metrics_worker import Small
from PIL import Image
from test_distributed import torchrun
from test_sources import folder_of, make_run, pixels

import inception
import metrics
import runtime
import sources

ROOT = Path(__file__).resolve().parents[1]
ALONE = runtime.Processes(0, 1, 0, torch.device("cpu"))


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def moments_of(x):
    return x.mean(0), np.cov(x, rowvar=False)


# ------------------------------------------------------------------ the Fréchet distance


def test_distance_of_a_set_from_itself_is_zero():
    for n in (20, 40, 300):  # of rank 19, 39, 40
        mu, sigma = moments_of(random(n, 40) * 10 + 5)
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
    i = np.arange(1, 301.0)  # 300: full ranks take the way by eigenvalues
    axes = np.linalg.qr(random(300, 300))[0]
    a, b = SPECTRA[one](i), 1.3 * SPECTRA[other](i[::-1] if other == "steep" else i)
    s1, s2 = (axes * a) @ axes.T, (axes * b) @ axes.T
    zero = np.zeros(300)
    exact = ((a**0.5 - b**0.5) ** 2).sum()
    # 1e-8 is what is left of eigenvalues that rounding has drowned
    assert metrics.frechet_distance(zero, s1, zero, s2) == pytest.approx(exact, rel=3e-8)


def test_pivots_that_begin_in_place_are_no_triangle():
    """The first pivot is the first axis, the others are not where they were: R[1, 0] is 0, and R
    is no triangle all the same."""
    i = np.arange(1, 301.0)
    axes = np.linalg.qr(random(300, 300))[0]
    s1 = np.diag(np.concatenate([[9.0], (i**-4.0)[:0:-1]]))  # falls to 1e-10: pivoted, full rank
    s2 = (axes * (1 + 1 / i)) @ axes.T
    assert len(metrics.root(s1)) == 300 and np.tril(metrics.root(s1), -1).any()
    assert metrics.root(s1)[1, 0] == 0
    root = scipy.linalg.sqrtm(s1 @ s2).real
    exact = np.trace(s1 + s2 - 2 * root)
    zero = np.zeros(300)
    assert metrics.frechet_distance(zero, s1, zero, s2) == pytest.approx(exact, rel=1e-8)


@pytest.mark.parametrize("parts", [1, 2])
def test_few_vectors_are_a_root_of_their_covariance(parts):
    x = random(9, 12) * [*range(12)] + 5  # the first feature never changes
    moments = metrics.Moments(12, few=True)
    for chunk in np.array_split(x, parts):
        moments.add(torch.from_numpy(chunk))
    alone = metrics.runtime.Processes(0, 1, 0, torch.device("cpu"))
    mu, sigma = moments.result(alone)
    root = moments.root(alone)
    np.testing.assert_allclose(root.T @ root, sigma, atol=1e-12 * sigma.max())
    y = moments_of(random(40, 12, seed=1))
    few = dict(mu=mu, sigma=sigma, root=root)
    many = dict(mu=y[0], sigma=y[1], root=None)
    whole = metrics.frechet_distance(mu, sigma, *y)
    assert metrics.distance(few, many) == pytest.approx(whole, rel=1e-9)
    assert metrics.distance(few, few) == pytest.approx(0, abs=1e-9)
    assert metrics.Moments(12).root(alone) is None
    with pytest.raises(ValueError, match="different sizes"):
        metrics.distance(few, dict(mu=np.zeros(3), sigma=np.eye(3)))
    with pytest.raises(ValueError, match="a mean with values that are not finite"):
        metrics.distance(few, many | dict(mu=y[0] * np.nan))
    with pytest.raises(ValueError, match="features with values that are not finite"):
        metrics.distance(few | dict(root=root * np.inf), many)


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
def test_what_is_no_mean_and_covariance_is_refused(mu1, sigma1, mu2, sigma2):
    with pytest.raises(ValueError) as info:
        metrics.frechet_distance(mu1, sigma1, mu2, sigma2)
    assert "\n" not in str(info.value)


@pytest.mark.slow
def test_distance_of_2048_features():
    x, y = random(300, 2048), random(200, 2048, seed=1)
    start = time.time()
    found = metrics.frechet_distance(*moments_of(x), *moments_of(y))
    assert found == pytest.approx(distance_of_few(x, y), rel=1e-9) and time.time() - start < 60


# ------------------------------------------------------------------ moments


def accumulate(f, batch, process=ALONE):
    found = metrics.Moments(f.shape[1])
    for part in f.split(batch):
        found.add(part)
    return found.result(process)


def test_moments_are_those_of_numpy_whatever_batch_and_order():
    x = random(101, 9) * np.arange(1, 10) + 100
    mean, cov = x.mean(0), np.cov(x, rowvar=False)
    for batch in (1, 7, 101):
        for rows in (x, x[::-1], x[np.random.default_rng(0).permutation(101)]):
            mu, sigma = accumulate(torch.from_numpy(rows.copy()), batch)
            assert mu.dtype == sigma.dtype == np.float64
            np.testing.assert_allclose(mu, mean, rtol=1e-13)
            np.testing.assert_allclose(sigma, cov, rtol=0, atol=1e-9 * cov.max())


def test_float32_features_are_summed_in_float64():
    """Mean 300, deviation 0.1: float32 sums of squares would lose the covariance altogether."""
    f = torch.from_numpy(300 + 0.1 * random(1000, 4)).float()
    mu, sigma = accumulate(f, 64)
    exact = np.cov(f.double().numpy(), rowvar=False)
    np.testing.assert_allclose(sigma, exact, rtol=0, atol=1e-6 * exact.max())


class Merged:
    """What two processes with these moments see of each other."""

    def __init__(self, *all_moments):
        self.all = all_moments

    def sum(self, n):
        return (sum(m.n for m in self.all),)

    def total(self, tensor):
        parts = [m.sum if tensor.dim() == 1 else m.outer for m in self.all]
        return sum(parts)


def test_moments_of_several_processes_add_up():
    x = random(31, 4)
    parts = [metrics.Moments(4) for _ in range(3)]
    parts[0].add(torch.from_numpy(x[:20]))
    parts[2].add(torch.from_numpy(x[20:]))  # the second has no image
    for part in parts:
        mu, sigma = part.result(Merged(*parts))
        np.testing.assert_allclose(mu, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-11)


@pytest.mark.parametrize("n", [2, 7, 1000])
def test_a_set_of_equal_images_has_covariance_zero(n):
    """A collapsed model is scored, too: what rounding leaves of its covariance is no error."""
    for seed in range(10):
        f = torch.from_numpy(abs(random(1, 128, seed=seed)) * 10).float()
        mu, sigma = accumulate(f.expand(n, -1), 7)
        assert not sigma.any()
        np.testing.assert_allclose(mu, f[0].double(), rtol=1e-13)
        other = moments_of(random(200, 128))
        exact = ((mu - other[0]) ** 2).sum() + np.trace(other[1])
        assert metrics.frechet_distance(mu, sigma, *other) == pytest.approx(exact, rel=1e-12)


def test_a_small_covariance_is_not_taken_for_none():
    f = 1 + 1e-4 * random(500, 6)
    _, sigma = accumulate(torch.from_numpy(f), 64)
    np.testing.assert_allclose(sigma, np.cov(f, rowvar=False), rtol=0, atol=1e-6 * 1e-8)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="at least 2 images"):
        accumulate(torch.zeros(1, 3), 1)


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


class Means(torch.nn.Module):
    """The mean of each channel: (N, 3)."""

    def forward(self, x):
        return x.mean((2, 3))


class Maps(torch.nn.Module):
    """Means of the four quarters: (N, 3, 2, 2), to be flattened."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 4, stride=4, bias=False)
        self.conv.weight.data[:] = torch.eye(3)[:, :, None, None] / 16

    def forward(self, x):
        return self.conv(x)


def export(path, net, size=8, dynamic=True):
    x = torch.zeros(4, 3, size, size)
    shapes = ({0: torch.export.Dim("N")},) if dynamic else None
    torch.export.save(torch.export.export(net.eval(), (x,), dynamic_shapes=shapes), path)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with sets, a run and feature networks."""
    folder = tmp_path_factory.mktemp("metrics")
    folder_of(folder / "a", pixels(9))
    folder_of(folder / "b", pixels(12, seed=1) // 2)
    make_run(folder, "mine")
    make_run(folder, "gray", channels=1)
    torch.jit.script(Means()).save(folder / "means.pt")
    export(folder / "maps.pt2", Maps())
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
            runtime.run_program(lambda: metrics.main(words_of(words)))
        said = capsys.readouterr()
        lines = less_progress_bars(said.err)
        assert info.value.code == 2 and len(lines) == 1, said.err
        assert lines[0].startswith("metrics.py: error: ") and "Traceback" not in said.err
        assert not said.out
        return lines[0]

    return run


def to_rgb(array):
    return array.astype(np.float32) / np.float32(127.5) - 1


def test_features_of_another_network(here, measure, call):
    a, b = to_rgb(pixels(9)), to_rgb(pixels(12, seed=1) // 2)
    exact = distance_of_few(a.mean((1, 2), dtype=float), b.mean((1, 2), dtype=float))
    found = measure("fid a b --features means.pt")
    assert found["value"] == pytest.approx(exact, rel=1e-5)
    digest = hashlib.sha256((here / "means.pt").read_bytes()).hexdigest()
    assert found["metric"] == "FD(means.pt)" and found["sha256"] == digest
    assert found["network"] == "means.pt" and found["resize"] == "none"
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
    assert "9 images of a in 12 dimensions: the covariance has no full rank" in warnings[1]


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
    words = "--features means.pt -n 6 --nfe 2"
    alone, named = measure("fid mine", words), measure("fid mine shapes", words)
    assert alone == named and alone["value"] > 0.01
    assert [side["source"] for side in alone["sides"]] == ["mine", "shapes"]
    assert alone["sides"][0]["shape"] == alone["sides"][1]["shape"] == [3, 8, 8]
    assert "6 images by mine at step 7, ema weights" in alone["sides"][0]["what"]
    raw = measure("fid mine", words, "--weights raw")
    assert raw["value"] != alone["value"]


def test_a_gray_run_is_compared_in_gray(here, measure):
    """Against a colour set, turned gray; the network is shown three equal channels."""
    found = measure("fid gray a --features means.pt -n 5 --nfe 2")
    assert [side["shape"] for side in found["sides"]] == [[1, 8, 8]] * 2
    gray = [np.asarray(Image.open(p).convert("L")) for p in sorted((here / "a").iterdir())]
    np.save("gray.npy", np.stack(gray)[..., None].repeat(3, 3))
    as_colour = measure("fid a gray.npy --features means.pt --channels 1")
    assert as_colour["value"] <= 1e-9


def test_black_images_are_scored(here, measure):
    np.save("black.npy", np.zeros((5, 8, 8, 3), np.uint8))
    a = to_rgb(pixels(9)).mean((1, 2), dtype=float)
    exact = ((a.mean(0) + 1) ** 2).sum() + np.cov(a, rowvar=False).trace()
    found = measure("fid black.npy a --features means.pt")["value"]
    assert found == pytest.approx(exact, rel=1e-5)


# ------------------------------------------------------------------ statistics


def test_statistics_take_the_place_of_their_images(here, measure, call, monkeypatch):
    direct = measure("fid a b --features maps.pt2")
    out = call("stats a a.npz --features maps.pt2")
    digest = direct["sha256"]
    assert f"statistics in {here / 'a.npz'} | 9 images" in out and "FID" not in out
    with np.load("a.npz") as file:
        rows = to_rgb(pixels(9)).reshape(-1, 2, 4, 2, 4, 3).mean((2, 4), dtype=float)
        rows = rows.transpose(0, 3, 1, 2).reshape(-1, 12)
        assert file["mu"].dtype == file["sigma"].dtype == np.float64
        np.testing.assert_allclose(file["mu"], rows.mean(0), atol=1e-7)
        np.testing.assert_allclose(file["sigma"], np.cov(rows, rowvar=False), atol=1e-7)
        assert int(file["n"]) == 9 and str(file["sha256"]) == digest
    found = measure("fid a.npz b --features maps.pt2")
    assert found["value"] == pytest.approx(direct["value"], rel=1e-9)
    assert [side["n"] for side in found["sides"]] == [9, 12]

    call("stats b b.npz --features maps.pt2")
    monkeypatch.setattr(metrics, "open_features", None)  # two files need no network
    found = measure("fid a.npz b.npz")
    assert found["value"] == pytest.approx(direct["value"], rel=1e-9)
    assert found["metric"] == "FD(maps.pt2)" and found["sha256"] == digest
    assert "FID" not in call("fid a.npz b.npz")


def test_statistics_of_other_tools(here, measure, call, small):
    """pytorch-fid's and EDM's files are mu and sigma alone; an image reference may hold both."""
    f = Small()(torch.from_numpy(pixels(12, seed=1) // 2).permute(0, 3, 1, 2))[0].double().numpy()
    mu, sigma = moments_of(f)
    np.savez("theirs.npz", mu=mu, sigma=sigma)
    direct = measure("fid a b")
    found = measure("fid a theirs.npz")
    assert found["value"] == pytest.approx(direct["value"], rel=1e-6)
    assert found["metric"] == "FID" and [side["n"] for side in found["sides"]] == [9, None]
    assert any("theirs.npz does not say of how many images" in w for w in found["warnings"])
    assert "9 against ? images" in call("fid a theirs.npz")

    np.savez("both.npz", arr_0=pixels(12) // 4, mu=mu, sigma=sigma)
    assert measure("fid a both.npz")["value"] == found["value"], "statistics, for fid"
    scored = measure("is both.npz")
    assert scored["sides"][0]["n"] == 12 and scored["value"] > 1, "images, for is"
    np.save("quarter.npy", pixels(12) // 4 + 1)
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
    call("stats a means.npz --features means.pt")
    call("stats a small.npz")
    message = refused("fid maps.npz b --features means.pt")
    assert "maps.npz has statistics of maps.pt2" in message and "this is means.pt" in message
    assert "do not compare" in refused("fid maps.npz b")
    message = refused("fid maps.npz means.npz")
    assert "maps.pt2" in message and "means.pt" in message and "do not compare" in message
    assert "do not compare" in refused("fid small.npz means.npz")
    # another file's weights under the same name are another network
    with np.load("maps.npz") as file:
        np.savez("other.npz", **{**file, "sha256": "0" * 64})
    assert "do not compare" in refused("fid other.npz maps.npz")
    assert "do not compare" in refused("fid other.npz b --features maps.pt2")
    np.savez("three.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert "error: three.npz and maps.npz: statistics of different sizes" in refused(
        "fid three.npz maps.npz"
    )
    np.savez("bad.npz", mu=np.zeros(12), sigma=-np.eye(12))
    assert "error: bad.npz and maps.npz: no covariance" in refused("fid bad.npz maps.npz")
    assert "is no run" in refused("fid maps.npz")


def test_pickled_statistics_are_refused_with_the_way_out(here, measure, refused):
    """SA-DPM's .npy and EDM2's .pkl are dicts in a pickle. The command that is printed works."""
    numbers = dict(mu=np.arange(3.0), sigma=np.eye(3))
    np.savez("plain.npz", **numbers)
    np.save("it's theirs.npy", numbers)
    Path("edm2.pkl").write_bytes(pickle.dumps(dict(num_images=9, fid=numbers)))
    for name in ("it's theirs", "edm2"):
        source = next(p for p in os.listdir() if p.startswith(name) and p[-4:] != ".npz")
        message = refused("fid", Path(source), "plain.npz")
        assert f"error: {source} is a pickle, and opening one can run a program" in message
        python, *words = shlex.split(message.split("sigma:  ")[1])
        assert python == "python"
        subprocess.run([sys.executable, *words], check=True, cwd=here)
        assert measure("fid", Path(f"{name}.npz"), "plain.npz")["value"] <= 1e-9
    np.save("images.npy", pixels(4))
    assert sources.read_statistics("images.npy") is None, "an array is no pickle"


def test_statistics_of_other_sizes_are_pointed_out(here, measure, call):
    call("stats a a12.npz --features means.pt --image-size 12")
    found = measure("fid a12.npz b --features means.pt")
    assert "images of 8 and 12 pixels are compared" in found["warnings"]


def test_where_statistics_may_go(here, call, refused):
    words = "--features means.pt"
    np.savez("images.npz", pixels(3))
    before = (here / "images.npz").read_bytes()
    assert "images.npz exists and holds no statistics" in refused("stats a images.npz", words)
    assert (here / "images.npz").read_bytes() == before
    assert "exists and holds no statistics" in refused("stats a b", words)
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
        "weights.pt": "zip of something else",
        "cut.pt2": "cut short",
        "half.pt2": "cut short",
        "runs/mine/checkpoint.pt": "zip of something else",
    }.items():
        message = refused("fid a b --features", name)
        assert f"{name} is no network saved by torch.export.save or torch.jit.save" in message
        assert words in message
    assert "no such file: none.pt2" in refused("fid a b --features none.pt2")
    assert "no such file: runs" in refused("fid a b --features runs")


def test_a_static_export_is_explained(here, refused):
    export(here / "static.pt2", Means(), dynamic=False)
    message = refused("fid a b --features static.pt2")
    assert "static.pt2 does not take a batch of shape (9, 3, 8, 8)" in message
    assert "without a dynamic batch axis" in message


class Pair(torch.nn.Module):
    def forward(self, x):
        return x, x


class Scalar(torch.nn.Module):
    def forward(self, x):
        return x.mean()


class NotFinite(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3)) / 0


class Gray(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)

    def forward(self, x):
        return self.conv(x).mean((2, 3))


class Refuses(torch.nn.Module):
    def forward(self, x):
        if x.size(0) > 2:
            raise ValueError("at most two at a time")
        return x.mean((2, 3))


@pytest.mark.parametrize(
    "net, words",
    [
        (Pair, "must give one tensor (N, features) for N images; for 9 it gave tuple"),
        (Scalar, "for 9 it gave ()"),
        (NotFinite, "not finite"),
        (Gray, "expected input[9, 3, 8, 8] to have 1 channels"),
        (Refuses, "at most two at a time"),
    ],
)
def test_networks_that_give_no_features(here, refused, net, words):
    torch.jit.script(net()).save("strange.pt")
    assert words in refused("fid a b --features strange.pt")


@pytest.mark.parametrize("name", ["means.pt", "maps.pt2"])
def test_networks_go_to_the_device(here, name, monkeypatch):
    """On a GPU the file's tensors must move along; "meta" stands in for one, and forgives a weight
    that stayed behind."""
    move, moved = metrics.move_to_device_pass, []
    monkeypatch.setattr(
        metrics, "move_to_device_pass", lambda *args: moved.append(args[1]) or move(*args)
    )
    net = metrics.open_exported(here / name, torch.device("meta"))
    assert net(torch.zeros(3, 3, 8, 8, device="meta")).device.type == "meta"
    assert moved == ["meta"] * name.endswith(".pt2")


# ------------------------------------------------------------------ FID and IS


def test_fid_of_a_network_that_looks_like_the_published_one(here, measure, call, small):
    f = [
        Small()(torch.from_numpy(x).permute(0, 3, 1, 2))[0].double().numpy()
        for x in (pixels(9), pixels(12, seed=1) // 2)
    ]
    found = measure("fid a b")
    assert found["value"] == pytest.approx(distance_of_few(*f), rel=1e-9)
    assert found["metric"] == "FID" and found["network"] == metrics.INCEPTION
    assert not any("published" in w for w in found["warnings"])
    assert call("fid a b").startswith(
        f"FID {found['value']:.4f} | 9 against 12 images | 8x8, "
        "resize: bilinear to 299x299 without antialiasing | "
        "Inception 2015-12-05, SHA-256 555555555555\n"
    )


def test_is_puts_the_logits_into_the_order_of_the_images(here, measure, call, small):
    logits = Small()(torch.from_numpy(pixels(12, seed=1) // 2).permute(0, 3, 1, 2))[1].numpy()
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
    x = torch.from_numpy(pixels(12, seed=1) // 2).permute(0, 3, 1, 2)
    logits = (x.float() / 127.5 - 1).mean((2, 3))
    mean, std = metrics.inception_score(logits.numpy())
    found = measure("is b --features means.pt")
    assert found["metric"] == "IS(means.pt)"
    assert found["value"] == pytest.approx(mean, rel=1e-5)
    assert found["std"] == pytest.approx(std, rel=1e-3)


def test_is_refuses(here, refused, small):
    assert "at least 10 images, not 9" in refused("is a")
    assert "is takes A alone" in refused("is a b")


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
    return pixels(3), pixels(2, seed=1)


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
    monkeypatch.setattr(metrics, "distance", lambda *a: seen.append(a[0]) or 1.5)
    np.save("few.npy", few()[0])
    np.save("fewer.npy", few()[1])
    out = call("fid few.npy fewer.npy --inception", path)
    first, *rest = out.splitlines()
    check_inception_line(first, "1.5000", sha256)
    assert f"these weights are not the published file ({inception.SHA256[:12]}...)" in out
    assert "3 images of few.npy: under 10,000" in out
    assert "3 images of few.npy in 2048 dimensions: the covariance has no full rank" in out
    net = inception.load(path)[0]
    pool3 = net(torch.from_numpy(few()[0]).permute(0, 3, 1, 2))[0].double().numpy()
    mu, sigma = moments_of(pool3)
    np.testing.assert_allclose(seen[0]["mu"], mu, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(seen[0]["sigma"], sigma, atol=1e-3 * abs(sigma).max())
    assert seen[0]["root"].shape == (3, 2048)


@pytest.mark.slow
def test_bf16_features_are_near_and_say_what_they_are(here, measure, call, refused, weights):
    path, _ = weights
    np.save("few.npy", few()[0])
    np.save("fewer.npy", few()[1])
    call("stats few.npy half.npz --precision bf16 --inception", path)
    net = inception.load(path)[0]
    exact = net(torch.from_numpy(few()[0]).permute(0, 3, 1, 2))[0].double().numpy().mean(0)
    with np.load("half.npz") as archive:
        assert archive["precision"].item() == "bf16" and "root" not in archive.files
        mu = archive["mu"]
    assert 0 < abs(mu - exact).max() < 0.02 * abs(exact).max()
    found = measure("fid fewer.npy half.npz --inception", path)
    assert any("bf16 on one side alone" in w for w in found["warnings"])
    for words in ("psnr few.npy few.npy", "fid half.npz half.npz"):
        assert "there is none" in refused(f"{words} --precision bf16")


@pytest.mark.slow
def test_inception_by_path_to_the_end(here, measure, call, weights):
    path, sha256 = weights
    np.save("few.npy", few()[0])
    np.save("fewer.npy", few()[1])
    net = inception.load(path)[0]
    pool3 = [net(torch.from_numpy(x).permute(0, 3, 1, 2))[0].double().numpy() for x in few()]
    found = measure("fid few.npy fewer.npy --inception", path)
    assert found["value"] == pytest.approx(distance_of_few(*pool3), rel=1e-3)
    np.save("ten.npy", pixels(10))
    assert measure("is ten.npy --inception", path)["value"] == 1.0  # one image in each part


def test_without_weights_and_without_network(here, tmp_path, refused, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(inception, "URL", (tmp_path / "no network").as_uri())
    for words in ("fid a b", "is b", "stats a new.npz"):
        message = refused(words)
        assert inception.URL in message and inception.SHA256 in message
        assert str(tmp_path / "diffusion-data" / inception.NAME) in message
    assert not (here / "new.npz").exists()
    # a wrong file in the cache is no substitute
    (tmp_path / "diffusion-data" / inception.NAME).write_bytes(b"something else")
    assert inception.SHA256 in refused("fid a b")


def test_a_wrong_inception_file(here, refused):
    (here / "page.pth").write_text("<html>")
    assert "web page" in refused("fid a b --inception page.pth")
    assert "no such file" in refused("fid a b --inception none.pth")
    assert "not both" in refused("fid a b --inception page.pth --features means.pt")


# ------------------------------------------------------------------ pairs


def test_psnr_of_pairs(here, measure, call):
    errors = np.array([1, 2, 3, 4])
    array = pixels(4) // 2
    folder_of(here / "first", array)
    folder_of(here / "second", array + errors.astype(np.uint8)[:, None, None, None])
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
            folder_of(here / name / kind, pixels(2, seed=i))
    assert measure("psnr one two")["text"] == "inf dB"
    message = refused("psnr one three")
    assert "error: one/dog/000.png and three/emu/000.png are no pair: psnr pairs" in message
    with zipfile.ZipFile("one.zip", "w") as archive:
        for path in (here / "one").rglob("*.png"):
            archive.write(path, path.relative_to(here / "one"))
    assert measure("psnr one.zip two")["text"] == "inf dB"
    assert "error: dog/000.png and three/emu/000.png" in refused("psnr one.zip three")
    assert measure("psnr one/cat/000.png two/cat/000.png")["text"] == "inf dB"


def test_psnr_of_equal_pairs(here, measure, call):
    array = pixels(3)
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
    array = pixels(3, channels=1) // 2
    np.save("one.npy", array)
    np.save("two.npy", array + np.uint8(5))
    for channels in ("", "--channels 1"):
        found = measure("psnr one.npy two.npy", channels)["value"]
        assert found == pytest.approx(20 * math.log10(255 / 5), rel=1e-12)


def test_psnr_refuses(here, refused):
    folder_of(here / "nine", pixels(9))
    Path("nine/004.png").rename("nine/004b.png")
    assert "a/004.png and nine/004b.png are no pair" in refused("psnr a nine")
    assert "error: a and b: psnr compares pairs, and there are 9 images and 12" in refused(
        "psnr a b"
    )
    for words in ("psnr mine a", "psnr a mine"):
        assert "error: mine is a run, whose images have no partners" in refused(
            words, "-n 9 --nfe 1"
        )
    assert "psnr takes A B" in refused("psnr a")
    np.savez("s.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert "s.npz" in refused("psnr s.npz a")
    assert "--features has no use" in refused("psnr a a --features means.pt")


# ------------------------------------------------------------------ the command line


@pytest.mark.parametrize(
    "words, said",
    [
        ("fid nothing a", "nothing is no file, folder, data set (shapes cifar10) or run"),
        ("fid a", "a is no run: say what to compare it with"),
        ("fid a b mine", "fid takes A or A B, not 3 names"),
        ("fid a b -n 0", "at least 1"),
        ("fid a b --batch-size 0", "at least 1"),
        ("fid mine --seed -1", "--seed"),
        ("fid mine --eta 0.5 --sampler ddpm", "--eta belongs to ddim"),
        ("fid mine --nfe 0", "error: --nfe must be at least 1, not 0"),
        ("fid mine a --image-size 9", "error: --image-size: leave it out"),
        ("fid a mixed.npy", "error: a and mixed.npy: images of different shapes"),
    ],
)
def test_what_is_refused_in_one_line(here, refused, words, said):
    np.save("mixed.npy", pixels(3, 12))
    assert said in refused(words, "--features means.pt")


def test_one_image_is_refused(here, refused):
    np.save("one.npy", pixels(1))
    message = refused("fid one.npy a --features means.pt")
    assert "error: one.npy: a covariance takes at least 2 images" in message


def program(*words, cwd):
    return subprocess.run(
        [sys.executable, str(ROOT / "metrics.py"), *words],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


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


def test_an_error_of_the_program(here):
    check_error(program("fid", "nothing", "a", "--json", cwd=here), "nothing is no file")


@pytest.mark.slow
def test_an_error_of_the_program_that_torch_logs(here):
    torch.save({"weight": torch.zeros(3)}, here / "weights.pt")  # torch.export logs a traceback
    done = program("fid", "a", "b", "--features", "weights.pt", cwd=here)
    check_error(done, "weights.pt is no network")
    for name in ("cut.pt2", "half.pt2"):
        whole = (here / "maps.pt2").read_bytes()
        (here / name).write_bytes(whole[: len(whole) // 2 if name == "half.pt2" else -500])
        check_error(program("fid", "a", "b", "--features", name, cwd=here), name)


# ------------------------------------------------------------------ several processes


CALLS = [
    "fid odd other",
    "fid odd pair --batch-size 2",
    "fid mine shapes -n 5 --nfe 2 --sampler ddpm --batch-size 2",
    "fid odd other --features means.pt",
    "is odd --batch-size 3",
    "psnr odd shifted",
    "psnr one shifted-one",  # fewer images than processes
    "stats odd odd.npz",
    "fid odd.npz pair",
]


@pytest.mark.parametrize("n", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_processes_share_the_work_and_agree(here, n, measure, small, monkeypatch):
    array = pixels(13) // 2
    np.save("odd.npy", array)
    np.save("other.npy", pixels(7, seed=1) // 2)
    np.save("pair.npy", pixels(2, seed=2))
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
    assert len(many) == len(ones), "rank 0 alone speaks"
    for one, other in zip(ones, many, strict=True):
        if one["value"] is not None:
            assert other["value"] == pytest.approx(one["value"], rel=1e-6)
            assert one["value"] > 1e-5
        assert other["sides"] == one["sides"]
    assert many[4]["std"] == pytest.approx(ones[4]["std"], rel=1e-6)


@pytest.mark.slow
def test_an_error_is_said_by_one_process(here):
    (here / "page.pt").write_text("<html>")
    for words in (["nothing", "a"], ["a", "b", "--features", "page.pt"]):
        done = torchrun(2, ROOT / "metrics.py", "fid", *words, cwd=here, check=False)
        said = [x for x in done.stderr.splitlines() if x.startswith("metrics.py: error: ")]
        assert done.returncode != 0 and len(said) == 1
        assert "Connection closed" not in done.stderr
