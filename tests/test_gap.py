"""gap.py: the numbers it makes of a gap, the ideal of a finite set, the figures, the program.
(Theorems 1 and 2 themselves: test_theory.py.)"""

import csv
import math
import re

import numpy as np
import pytest
import torch
from conftest import TINY, refused
from PIL import Image
from torch.testing import assert_close

import denoiser as D
import gap
import samplers
import schedules
import toy
import train
from support.cli import parse_into

LINEAR = schedules.make_schedule("linear")


def test_weights_are_the_product_of_what_later_steps_let_through():
    """τ_t by running the recursion backwards: dG_1/de_t, for every t, with 1-based DDPM arrays."""
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    beta = np.concatenate([[0.0], beta])
    tau, through = np.zeros(1001), 1.0
    for t in range(2, 1001):
        tau[t] = through * beta[t] / math.sqrt((1 - beta[t]) * (1 - alpha_bar[t]))
        through *= math.sqrt(1 - beta[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
    assert_close(gap.gap_weights(LINEAR), torch.from_numpy(tau), rtol=1e-9, atol=0)
    # a figure to hold on to: at t = 2 nothing follows, τ_2 = β_2/√((1 − β_2)(1 − ᾱ_2))
    assert gap.gap_weights(LINEAR)[2].item() == pytest.approx(0.0080865, abs=1e-6)


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("continuous", [False, True])
def test_weights_of_every_schedule(name, continuous):
    schedule = schedules.make_schedule(name, continuous=continuous)
    tau = gap.gap_weights(schedule)
    assert tau.shape == (1001,) and tau.dtype == torch.float64
    assert (tau[:2] == 0).all() and (tau[2:1000] > 0).all()
    assert math.isinf(tau[1000]) == (schedule.alpha_bar(1000) == 0)


def test_ideal_of_images_is_a_mixture_of_points():
    g = torch.Generator().manual_seed(0)
    images = torch.rand((30, 1, 4, 4), generator=g, dtype=torch.float64) * 2 - 1
    points = toy.Mixture([1 / 30] * 30, images, [0.0] * 30)
    ideal = gap.ideal_of_images(images, LINEAR)
    for t in (1, 30.5, 400, 1000):
        xt = schedules.add_noise(LINEAR, images[:8], t, torch.randn(images[:8].shape, generator=g))
        expected, _ = points.posterior(xt, *LINEAR.alpha_sigma(t))
        assert_close(ideal(xt, t), expected, rtol=0, atol=1e-9)
        assert_close(ideal(xt.float(), t), expected, rtol=0, atol=1e-3)


def test_summary_is_what_its_words_say():
    g = torch.Generator().manual_seed(0)
    G = torch.randn((40, 3, 2, 2), generator=g, dtype=torch.float64) + 0.5
    drawn = gap.bootstrap_counts(40, count=4000)
    assert (drawn.sum(1) == 40).all()
    found = gap.summarize(gap.inner_products(G), drawn)
    flat = G.flatten(1).numpy()
    assert found["mean"] == pytest.approx(np.linalg.norm(flat.mean(0)))
    assert found["norm"] == pytest.approx(np.linalg.norm(flat, axis=1).mean())
    # unbiased: the squared mean less what the spread of 40 images adds to it
    unbiased = (flat.mean(0) ** 2).sum() - flat.var(0, ddof=1).sum() / 40
    assert found["systematic"] == pytest.approx(math.sqrt(unbiased))
    assert found["low"] < found["systematic"] < found["high"]
    # one bootstrap sample, by hand: the mean over pairs of different images
    which = torch.repeat_interleave(torch.arange(40), drawn[0].long()).tolist()
    pairs = [flat[i] @ flat[j] for i in which for j in which if i != j]
    assert found["boot"][0].item() == pytest.approx(math.sqrt(np.mean(pairs)))


@pytest.mark.parametrize("truth", [0.0, 1.0])
def test_intervals_cover_the_truth(truth):
    """95 % intervals of ‖E G‖ over 200 experiments, with the spread of images: few directions."""
    g = torch.Generator().manual_seed(1)
    drawn, hits = gap.bootstrap_counts(50, count=300), 0
    for _ in range(200):
        G = torch.randn((50, 6), generator=g, dtype=torch.float64) + truth
        found = gap.summarize(gap.inner_products(G), drawn)
        hits += found["low"] <= truth * math.sqrt(6) <= found["high"]
        assert found["mean"] > found["systematic"], "the spread of 50 images adds to the plain norm"
    print(f"\n{hits} of 200 intervals hold the true norm")
    assert hits >= 180


def test_a_coarser_grid_and_ddim_have_gaps_too():
    """The last G is the distance of the two runs for any grid and η: against samplers.sample."""
    mixture = toy.two_bumps((1, 2, 2))
    x0 = mixture.sample(5, torch.Generator().manual_seed(0))
    denoiser = D.Denoiser(toy.oracle(toy.one_gaussian((1, 2, 2)), LINEAR), LINEAR)

    def answer(x, c):  # of a network that knows x0
        a, s = (schedules.expand(v, x) for v in LINEAR.alpha_sigma(c))
        return (x - a * x0) / s

    knows = D.Denoiser(answer, LINEAR)
    times = schedules.time_grid(LINEAR, 23, "quadratic")
    for eta in (0.0, 0.4, 1.0):
        noise = samplers.SeededNoise(range(5))
        *_, (t, G, reducible) = gap.gap_along_run(denoiser, x0, noise, times, eta)
        assert t == 1 and reducible is None

        def run(model, eta=eta):
            noise = samplers.SeededNoise(range(5))
            xT = schedules.add_noise(LINEAR, x0, times[0], noise(x0.shape))
            arguments = dict(spacing=times, eta=eta, noise=noise, denoise_to_zero=False)
            return samplers.sample(model, xT, "ddim", **arguments)

        assert_close(G, run(denoiser) - run(knows), rtol=0, atol=1e-9)
        assert G.abs().max() > 0.01


def test_two_runs_are_compared_image_by_image():
    """Gaps with the same spread and known means, |m| and |m|/2: the interval of the difference
    contains the truth, and is narrower than either part's."""
    g = torch.Generator().manual_seed(0)
    spread = 10 * torch.randn(500, 30, generator=g, dtype=torch.float64)
    drawn, runs, boots = gap.bootstrap_counts(500), {}, {}
    for name, share in {"all": 1.0, "half": 0.5}.items():
        row = gap.summarize(gap.inner_products(spread + share), drawn)
        boots[name] = row.pop("boot")
        runs[name] = [dict(row, images="these", n=500)]
    other = dict(runs["half"][0], images="others")
    runs["elsewhere"], boots["elsewhere"] = [other], boots["half"]
    gap.add_reductions(runs, boots)
    end, truth = runs["half"][0], 0.5 * math.sqrt(30)
    assert end["less"] == pytest.approx(runs["all"][0]["systematic"] - end["systematic"])
    assert end["less_low"] < truth < end["less_high"] and end["less_low"] > 0
    assert end["less_high"] - end["less_low"] < 0.9 * (end["high"] - end["low"])
    assert runs["all"][0]["less"] == 0 and "less" not in other


# ---------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two small runs on a small set of images, without and with SA-2."""
    folder = tmp_path_factory.mktemp("gap")
    np.save(folder / "set.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("support.run.RunFolder.save_preview", lambda *inputs: None)
        for words in (["base"], ["sa2", "--sa-k", "2"]):
            train.main([*TINY, "--data", "set.npy", "--steps", "3", "--name", *words])
    return folder


@pytest.fixture
def runs(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


def measured(words, out="gap"):
    """The rows of gap.csv that the program writes."""
    gap.main([*words.split(), "--out", f"{out}.png"])
    with open(f"{out}.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_figure_4(runs, capsys):
    rows = measured("base sa2 -n 8 --steps 20 --ideal")
    out = capsys.readouterr().out
    assert re.search(r"^sa2 +8 .*\[.*reducible: systematic", out, re.M)
    assert Image.open("gap.png").size[0] > 800
    assert [r["run"] for r in rows] == ["base"] * 19 + ["sa2"] * 19
    assert [float(r["t"]) for r in rows[:19]] == pytest.approx(np.linspace(1000, 1, 20)[1:])
    for row in rows:
        values = {k: float(v) for k, v in row.items() if v and k not in ("run", "t", "images")}
        assert all(math.isfinite(v) for v in values.values())
        assert values["systematic"] <= values["mean"] <= values["norm"]
        assert values["low"] <= values["high"]
        assert values["reducible_mean"] <= values["reducible_norm"]
    less = float(rows[18]["systematic"]) - float(rows[-1]["systematic"])
    assert float(rows[-1]["less"]) == pytest.approx(less) and float(rows[18]["less"]) == 0
    assert f"{less:.3f} less than base" in out and not rows[17]["less"]
    again = measured("base -n 8 --steps 20", "again")
    before = [r["norm"] for r in rows if r["run"] == "base"]
    assert [r["norm"] for r in again] == before, "seeded: the same run has the same gap"
    assert "reducible_norm" not in again[0] and "tau" not in again[0]


@pytest.mark.slow
def test_the_weights_are_in_the_table_of_a_whole_run(runs):
    tau = gap.gap_weights(D.load_run("base").schedule)
    rows = measured("base -n 2")
    assert [float(r["tau"]) for r in rows] == pytest.approx(tau[1:1000].flip(0).tolist())


def test_seeds_share_no_noise(runs, monkeypatch):
    seen, real = [], samplers.SeededNoise
    monkeypatch.setattr(
        samplers, "SeededNoise", lambda seeds, *a: seen.append(list(seeds)) or real(seeds, *a)
    )
    monkeypatch.setattr(gap, "plot_gaps", lambda *a: None)
    monkeypatch.setattr(gap.measure, "save_measurement", lambda *a: None)
    for seed in "01":
        gap.main(["base", "-n", "2", "--steps", "2", "--seed", seed])
    assert seen == [[0, 1], [2**20, 2**20 + 1]]


@pytest.mark.slow
def test_a_run_named_twice_is_measured_twice(runs):
    rows = measured("base base base -n 6 --steps 3 --batch-size 4")
    assert [r["run"] for r in rows[::2]] == ["base", "base'", "base''"]
    # six images in batches of 4, and all at once: the same numbers up to rounding
    for a, b in zip(rows[:2], measured("base -n 6 --steps 3"), strict=True):
        assert float(a["norm"]) == pytest.approx(float(b["norm"]), rel=1e-4)


def test_flips_belong_to_the_ideal_of_a_run_that_flips(runs):
    config, d = parse_into(gap.GapConfig, ["base"]), D.load_run("base")
    plain, flipped = (
        gap.ideal_set(d.replace(settings={**d.settings, "flip": f}), config, "base") for f in (0, 1)
    )
    assert len(plain) == 40 and len(flipped) == 80
    assert_close(flipped[40:], plain.flip(-1), rtol=0, atol=0)


def test_a_set_that_is_gone_is_named(place, here):
    words = [str(place / "runs" / "base"), "-n", "2", "--steps", "2"]
    refused("base was trained on 'set.npy', .*--data", gap.main, words)
    gap.main([*words, "--ideal", "--data", str(place / "set.npy")])
