"""papers/late.py: against closed forms and an ideal network, with faults put in by hand."""

import contextlib
import csv
import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused
from metrics_worker import export, maps
from PIL import Image
from torch.testing import assert_close

import etsdm
import schedules
import toy
import train
from denoiser import Denoiser
from papers import late
from support import rng

SHAPE, T_START = (1, 8, 8), 100
LINEAR = schedules.make_schedule("linear")
# A smooth component and a spiky one, both in a small part of the space, as images are.
WAVE = torch.linspace(0, 3, 8).sin()
MIXTURE = toy.Mixture(
    [0.4, 0.6],
    torch.stack([0.5 * WAVE.expand(SHAPE), -0.3 * (-1.0) ** torch.arange(8).expand(SHAPE)]),
    [0.2, 0.3],
)
X0 = MIXTURE.sample(400, rng.generator(3))
CHECKERS = 1.0 - 2.0 * ((torch.arange(8)[:, None] + torch.arange(8)) % 2)


def ideal(below=0, fault=0.0, schedule=LINEAR, times=None, time_input=None):
    """The exact network, which errs by `fault` for t < below."""
    net = toy.oracle(MIXTURE, schedule, times=times)

    def wrong(x, c):
        return net(x, c) + fault * (c < below).to(x)[:, None, None, None]

    return Denoiser(wrong, schedule, time_input=time_input)


def test_the_loss_of_a_gaussian_by_t():
    """x_0 ~ N(0, s²): ε is known from x_t up to a variance of α²s²/(α²s² + σ²)."""
    std, x0 = 0.5, 0.5 * torch.randn(2000, *SHAPE, generator=rng.generator(1)).double()
    d = Denoiser(toy.oracle(toy.one_gaussian(SHAPE, std), LINEAR), LINEAR)
    loss = late.loss_by_t(d, x0, [1, 2, 100, 101])
    for row, t in ((loss[0], 1), (loss[2], 100)):
        alpha, sigma = LINEAR.alpha_sigma(t)
        want = (alpha * std) ** 2 / ((alpha * std) ** 2 + sigma**2)
        error = row.std() / len(row) ** 0.5
        assert abs(row.mean() - want) < 4 * error and error < 0.01 * want


def test_a_fault_near_zero_is_found_there_and_in_its_size():
    edges = [1, 5, 20, 50, 1000]
    plain, wrong = (late.loss_by_t(ideal(20, fault), X0, edges) for fault in (0.0, 0.3))
    change = wrong - plain
    assert (change[2:] == 0).all(), "the same images, t and noise: nothing else differs"
    for row in change[:2]:  # E(r − δ)² − E r² = δ², since E r = 0 for the ideal network
        error = row.std() / len(row) ** 0.5
        assert abs(row.mean() - 0.3**2) < 4 * error < 0.03


def test_late_runs_of_the_ideal_network_have_no_excess():
    y, best = late.late_runs(ideal(), X0, T_START, sampler="ddpm", nfe=T_START)
    drawn, least = ((k - X0).square().flatten(1).mean(1) for k in (y, best))
    excess = late.jackknife(lambda i: drawn[i].mean() / least[i].mean(), len(X0))
    assert abs(excess[0] - 2) < 3 * late.standard_error(excess) < 0.08
    for a, b in zip(late.band_powers(y), late.band_powers(X0), strict=True):
        ratio = late.jackknife(lambda i, a=a, b=b: a[i].sum() / b[i].sum(), len(X0))
        assert abs(ratio[0] - 1) < 3 * late.standard_error(ratio) < 0.1


def test_late_runs_show_a_fault_near_zero_in_its_band():
    """Of the highest frequencies, for t < 20: they alone gain power."""
    runs = [
        late.late_runs(ideal(20, fault * CHECKERS), X0, T_START, sampler="ddim", nfe=20)[0]
        for fault in (0.0, 1.0)
    ]
    plain, wrong = (late.band_powers(y).mean(1) / late.band_powers(X0).mean(1) for y in runs)
    assert (wrong - plain)[:3].abs().max() < 1e-3
    assert wrong[3] > plain[3] + 0.03
    error = [(y - X0).square().mean() for y in runs]
    assert error[1] > error[0]


def test_the_price_of_sharing_is_paid_near_zero_alone():
    """E-TSDM's exact network answers with the average of a part: worse below 100, equal beyond."""
    shared = ideal(times=toy.shared_times(100, 5), time_input=etsdm.make_time_input(100, 5))
    edges = [1, 5, 20, 100, 300]
    change = late.loss_by_t(shared, X0, edges).mean(1) / late.loss_by_t(ideal(), X0, edges).mean(1)
    assert change[0] > 1.005 and change[1] > 1 and change[2] > 1 and abs(change[3] - 1) < 1e-9


def least_price(std, D, times=range(1, 20), N=4000):
    """By how much, relative to its loss, the best network pays at t = 1 to 4 for one time input for
    all `times`: it then weighs each t' by how likely it is to have made this x. x_0 ~ N(0, std²) in
    D dimensions, where ε* = g x and only |x|² matters. -> (that price, a plain average's)."""
    alpha, sigma = LINEAR.alpha_sigma(torch.tensor(list(times)))
    v = (alpha * std) ** 2 + sigma**2
    g, loss, best, average = sigma / v, 0.0, 0.0, 0.0
    for i in range(4):
        square = v[i] * torch.from_numpy(np.random.default_rng(i).chisquare(D, (N, 1)))
        w = (-square / (2 * v) - D / 2 * v.log()).softmax(1)
        best += (((w @ g - g[i]) ** 2) * square[:, 0]).mean() / D
        average += (g.mean() - g[i]) ** 2 * v[i]
        loss += (alpha[i] * std) ** 2 / v[i]
    return best / loss, average / loss


def test_the_least_price_of_sharing_falls_with_the_number_of_pixels():
    """In many pixels x_t itself shows its noise level, and the time input hardly matters."""
    prices = [least_price(0.1, D) for D in (16, 64, 1024)]
    print("\nbest, average:", *("{:.4f} {:.4f};".format(*p) for p in prices))
    (few, average), (some, _), (many, same) = prices
    assert average > few > some > 5 * many > 0 and average == same


def test_the_same_for_any_batch_size_and_any_choice_of_bins():
    d = ideal()
    whole = late.loss_by_t(d, X0[:7], [1, 20, 100])
    assert_close(late.loss_by_t(d, X0[:7], [1, 20, 100], batch_size=2), whole)
    assert_close(late.loss_by_t(d, X0[:3], [1, 20]), whole[:1, :3])
    assert not torch.equal(late.loss_by_t(d, X0[:7], [1, 20], seed=1)[0], whole[0])
    y, _ = late.late_runs(d, X0[:5], 50, sampler="ddpm", nfe=50)
    assert_close(late.late_runs(d, X0[:5], 50, batch_size=2, sampler="ddpm", nfe=50)[0], y)


def test_times_are_whole_unless_the_schedule_is_continuous():
    for schedule, whole in ((LINEAR, True), (schedules.make_schedule("linear", 1000, True), False)):
        seen = []
        late.loss_by_t(
            Denoiser(lambda x, c, seen=seen: seen.append(c) or x, schedule), X0, [1, 3, 10]
        )
        times = torch.cat(seen).double().reshape(2, -1)
        assert bool((times == times.floor()).all()) == whole
        assert times[0].min() >= 1 and times[0].max() < 3 <= times[1].min() < times[1].max() < 10


@pytest.mark.parametrize("k, band", [(0, 0), (1, 1), (2, 2), (3, 3), (4, 3)])
def test_band_powers_of_waves(k, band):
    wave = (2 * np.pi * k * torch.arange(8) / 8).cos()
    for x in (wave.expand(1, 2, 8, 8), wave[:, None].expand(1, 2, 8, 8)):
        power = late.band_powers(x)[:, 0]
        assert_close(power.sum(), x.double().square().sum())  # Parseval
        assert power[band] > 0.999 * power.sum()


def test_the_jackknife_of_a_mean_is_its_standard_error():
    x = torch.randn(late.PARTS, generator=rng.generator(5), dtype=torch.float64)
    values = late.jackknife(lambda i: x[i].mean(), len(x))
    assert values[0] == x.mean() and len(values) == 1 + len(x)
    assert late.standard_error(values) == pytest.approx(x.std().item() / len(x) ** 0.5)


# ------------------------------------------------------------------ the program


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run, an exported network, and the run again with other settings: shared
    times, parts of one timestep, other images."""
    folder = tmp_path_factory.mktemp("late")
    tiny = "--image-size 8 --batch-size 4 --precision fp32 --steps 3 --lr 0.05 --warmup 0".split()
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        train.main([*tiny, "--schedule", "linear", "--prediction", "eps", "--name", "a"])
        np.save("other.npy", np.zeros((6, 8, 8, 3), np.uint8))
        for name, settings in (
            ("b", dict(etsdm=True)),
            ("c", dict(etsdm=True, etsdm_n=100)),
            ("d", dict(data="other.npy")),
        ):
            saved = torch.load("runs/a/checkpoint.pt", weights_only=True)
            saved["settings"] |= settings
            Path("runs", name).mkdir()
            torch.save(saved, f"runs/{name}/checkpoint.pt")
        export("pool.pt2", maps, dynamic="N")
    return folder


def test_program(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    out = tmp_path / "k.png"
    words = "-n 6 --edges 5 100 --t-start 8 --variance large --clip --features pool.pt2"
    late.main(["a", "b", "c", *words.split(), "--out", str(out)])
    text = capsys.readouterr().out
    assert Image.open(out).size[0] > 800 and str(out) in text
    with open(tmp_path / "k.csv") as f:
        rows = list(csv.DictReader(f))
    keys = [(r["measure"], float(r["low"]), float(r["high"])) for r in rows if r["run"] == "b"]
    assert keys[:3] == [("loss", 1, 5), ("loss", 5, 100), ("loss", 100, 1000)]
    assert [k[0] for k in keys[3:]] == ["error", "best", *["power"] * 4, "FD"]
    assert all(r["change"] == "" for r in rows if r["run"] == "a")
    # parts of one timestep: f(t) = t, and the same weights give the same numbers
    assert {float(r["change"]) for r in rows if r["run"] == "c"} == {0.0}
    changes = {(r["measure"], r["low"]): float(r["change"]) for r in rows if r["run"] == "b"}
    assert changes["loss", "5.0"] != 0 != changes["best", "0"] and changes["loss", "100.0"] == 0


@pytest.mark.parametrize(
    "words, message",
    [
        ("none", "no run none"),
        ("a d", "d has other images than a: give --data"),
        ("a --edges 5 3", "--edges must rise, not 5.0 3.0"),
        ("a --edges -1", "--edges must be at least 0"),
        ("a --t-start 0", "--t-start must be at least 1"),
        ("a -n 3", "--num must be at least 4"),
        ("a --sampler ddim --variance large -n 4", "--variance has no effect on ddim"),
        ("a --features a.pt2", "a.pt2"),
        ("a --out x.pdf", "must be a .png"),
    ],
)
def test_wrong_input_is_one_line(words, message, trained, monkeypatch):
    monkeypatch.chdir(trained)
    refused(message, late.main, words.split())


# ------------------------------------------------------------------ small networks, trained here

D, WIDTH, SEEDS, SHARED = 16, 64, 4, (None, 5)  # SHARED: n of E-TSDM on [0, 100), None: plain
POINTS = toy.Mixture(
    [1.0] * 8, torch.randn(8, D, dtype=torch.float64, generator=rng.generator(11)) / 2, [0.05] * 8
)


def noisy(n, low, high, generator):
    """-> (x_t, t, α, σ, ε) of n points, t from low to high - 1."""
    x0, t = POINTS.sample(n, generator), torch.randint(low, high, (n,), generator=generator)
    alpha, sigma = LINEAR.alpha_sigma(t)
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    return alpha[:, None] * x0 + sigma[:, None] * eps, t, alpha, sigma, eps


def answers(weights, x, t, slower):
    """All networks at once, ε̂ (len(SHARED) SEEDS, n, D): multilayer perceptrons of x and of the
    time input's sinusoids as in unet.py, whose frequencies are divided by `slower`."""
    c = [t if n is None else etsdm.share_timesteps(t, 100, n) for n in SHARED]
    angle = torch.stack(c).float()[..., None] * 10000 ** (-torch.arange(16) / 16.0) / slower
    h = torch.cat([x.float().expand(len(c), *x.shape), angle.cos(), angle.sin()], -1)
    h = h.repeat_interleave(SEEDS, 0)
    for i in range(0, len(weights), 2):
        h = torch.baddbmm(weights[i + 1], h, weights[i])
        h = torch.nn.functional.silu(h) if i < len(weights) - 2 else h
    return h


def train_perceptrons(steps, slower):
    """-> averaged weights. All networks see the same points, t and noises."""
    generator, weights = torch.Generator().manual_seed(0), []
    sizes = [D + 32, WIDTH, WIDTH, D]
    for a, b in itertools.pairwise(sizes):
        w = torch.randn(SEEDS, a, b, generator=generator) / a**0.5 * (0.1 if b == D else 1)
        weights += [w.repeat(len(SHARED), 1, 1), torch.zeros(len(SHARED) * SEEDS, 1, b)]
    weights = [w.requires_grad_() for w in weights]
    averages, adam = [w.detach().clone() for w in weights], torch.optim.Adam(weights, lr=2e-3)
    for i in range(1, steps + 1):
        x, t, _, _, eps = noisy(128, 1, 1001, rng.generator(5, i))
        loss = (answers(weights, x, t, slower) - eps.float()).square().mean((1, 2)).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        for average, w in zip(averages, weights, strict=True):
            average.lerp_(w.detach(), 1 - min(0.995, i / (i + 10)))
    return averages


@pytest.mark.slow
@pytest.mark.parametrize("slower", [1, 50])
def test_what_sharing_changes_in_a_small_network(slower):
    """E‖ε̂ − ε*‖² of E-TSDM against plain networks, ε* exact: below t = 5 a few percent less with
    the sinusoids of unet.py, nothing with slower ones, which hold the slope in t down anyway."""
    weights, change = train_perceptrons(1000, slower), {}
    for low, high in ((1, 5), (5, 20), (20, 100), (100, 1001)):
        x, t, alpha, sigma, _ = noisy(1024, low, high, rng.generator(99, low))
        error = answers(weights, x, t, slower) - POINTS.posterior(x, alpha, sigma)[1].float()
        plain, shared = error.square().mean((1, 2)).reshape(len(SHARED), SEEDS)
        ratio = 100 * (shared / plain - 1)
        change[low] = ratio.mean().item()
        print(f"\nfrequencies / {slower}, t = {low} to {high - 1}: plain {plain.mean():.4f}, "
              f"E-TSDM {change[low]:+.1f} % (std {ratio.std():.1f})", end="")  # fmt: skip
    assert -5 < change[1] < -1 if slower == 1 else abs(change[1]) < 1
    assert abs(change[5]) < 1 and abs(change[20]) < 1 and abs(change[100]) < 3
