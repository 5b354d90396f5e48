"""lipschitz.py: against closed forms on one Gaussian, against its promises on a real network, and
as a program."""

import csv
import math
import re

import numpy as np
import pytest
import torch
from conftest import TINY, refused
from PIL import Image
from test_losses import small_net
from torch.testing import assert_close

import data
import etsdm
import lipschitz
import schedules
import toy
import train
from denoiser import Denoiser, load_run
from support import rng

STD, DIM = 0.5, 16
LINEAR = schedules.make_schedule("linear")
CONTINUOUS = schedules.make_schedule("linear", continuous=True)


def gaussian_x0(n, dim=DIM):
    return STD * torch.randn(n, dim, dtype=torch.float64, generator=rng.generator(7))


def oracle(schedule, prediction="eps", time_input=None):
    net = toy.oracle(toy.one_gaussian((DIM,), STD), schedule, prediction)
    return Denoiser(net, schedule, prediction, time_input)


def alpha_bar(schedule, t):
    """By the definitions: a product of 1 − β, and exp(−∫β)."""
    if schedule.continuous:
        u = t / 1000
        return math.exp(-(0.1 * u + 19.9 * u**2 / 2))
    return float(np.prod(1 - np.linspace(1e-4, 0.02, 1000)[: int(t)]))


def factor(schedule, t, prediction):
    """The ideal answer is this times x: for x_0 ~ N(0, σ²), x_t ~ N(0, v), v = a²σ² + s²."""
    ab = alpha_bar(schedule, t)
    a, s, v = math.sqrt(ab), math.sqrt(1 - ab), ab * STD**2 + 1 - ab
    return {"eps": s / v, "v": a * s * (1 - STD**2) / v}[prediction]


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize(
    "schedule, dt", [(LINEAR, 1), (LINEAR, 30), (CONTINUOUS, 0.25), (CONTINUOUS, 1e-4)]
)
def test_one_gaussian_has_a_closed_form(schedule, dt, prediction):
    """Image by image: |g(t + dt) − g(t)|/dt ‖x_t‖, where the ideal answer is g(t) x."""
    d, seen, ts = oracle(schedule, prediction), [], [0, 1, 10, 100, 500, 900]
    d.net = lambda x, c, net=d.net: seen.append(x) or net(x, c)
    K = lipschitz.difference_quotients(d, gaussian_x0(6), ts, dt=dt)
    change = [factor(schedule, t + dt, prediction) - factor(schedule, t, prediction) for t in ts]
    norms = torch.stack([x.norm(dim=1) for x in seen[::2]])  # (t, image)
    want = torch.tensor(change, dtype=torch.float64).abs()[:, None] / dt * norms
    assert_close(K, want, rtol=1e-4, atol=1e-12)


def test_near_zero_the_slope_is_singular_unless_the_schedule_is_modified():
    """ε* = s x/v and s ~ √t: K(0, dt) grows like dt^(−1/2); for linear-mns s ~ t, and it stays."""
    ratio = {}
    for name in ("linear", "linear-mns"):
        d = oracle(schedules.make_schedule(name, continuous=True))
        K = [lipschitz.lipschitz_constants(d, gaussian_x0(8), [0], dt=dt) for dt in (1e-2, 1e-4)]
        ratio[name] = (K[1] / K[0]).item()
    assert_close(ratio, {"linear": 10.0, "linear-mns": 1.0}, rtol=0.01, atol=0)


def test_x_is_drawn_at_t_and_the_net_receives_t_and_t_plus_dt():
    seen, x0 = [], torch.zeros(5, 4000, dtype=torch.float64)
    d = Denoiser(lambda x, c: seen.append((x.clone(), c.clone())) or x * c[:, None], LINEAR)
    rows = lipschitz.difference_quotients(d, x0, [400, 20], dt=3)
    (x, c), (x_same, c_next) = seen[0], seen[1]
    assert torch.equal(x, x_same) and c.tolist() == [400.0] * 5 and c_next.tolist() == [403.0] * 5
    assert_close(x.std().item(), math.sqrt(1 - alpha_bar(LINEAR, 400)), rtol=0.02, atol=0)
    assert seen[2][1][0] == 20 and len(seen) == 4
    assert_close(rows[0], x.norm(dim=1), rtol=1e-12, atol=0)  # |3 x|/3
    # one ε per image, at every t: curves are smooth, and independent of which t are asked for
    s = [math.sqrt(1 - alpha_bar(LINEAR, t)) for t in (400, 20)]
    assert_close(seen[0][0] / s[0], seen[2][0] / s[1], rtol=1e-9, atol=0)


X0 = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1


def share(t):
    return etsdm.share_timesteps(t, 100, 5)


@pytest.mark.slow
def test_zero_inside_sub_intervals_and_nowhere_else_discrete():
    ts = torch.tensor([0, 1, 2, 7, 18, 19, 20, 21, 39, 40, 59, 79, 80, 97, 98, 99, 100, 101, 900])
    d = Denoiser(small_net(), LINEAR, time_input=share)
    rows = lipschitz.difference_quotients(d, X0, ts, batch_size=2)  # and a last batch of one
    inside = (ts < 99) & (ts % 20 != 19)
    assert bool((rows[inside] == 0).all()) and bool((rows[~inside] > 0).all())
    plain = lipschitz.difference_quotients(Denoiser(d.net, LINEAR), X0, ts, batch_size=2)
    assert bool((plain > 0).all())
    assert_close(plain[-3:], rows[-3:], rtol=1e-6, atol=0)  # from 100 on they receive the same


def test_zero_inside_sub_intervals_of_an_edm_run_too():
    """x_t is scaled as at t while the time input is that of t + dt: nothing moves inside."""
    schedule, net = schedules.make_schedule("edm"), torch.nn.Conv2d(1, 1, 3, padding=1)
    share = etsdm.make_time_input()
    d = Denoiser(lambda x, c: net(x) * c[:, None, None, None], schedule, "edm", share)
    K = lipschitz.lipschitz_constants(d, torch.randn(3, 1, 4, 4), [1.5, 18.9, 19.5, 60, 90.25])
    assert (K[[0, 1, 3, 4]] == 0).all() and K[2] > 0


def test_zero_inside_sub_intervals_and_nowhere_else_continuous():
    d = Denoiser(small_net(), CONTINUOUS, time_input=lambda t: etsdm.share_timesteps(t, 50, 4))
    ts = [0.3, 5.71, 12.24, 12.3, 12.49, 24.9, 37.6, 49.8, 49.99, 50.01, 73.33]
    K = lipschitz.lipschitz_constants(d, X0, ts, dt=0.25)
    across = [t >= 50 or any(t < b <= t + 0.25 for b in (12.5, 25, 37.5, 50)) for t in ts]
    assert sum(across) == 7 and ((K > 0) == torch.tensor(across)).all()


def test_eval_mode_is_used_and_given_back():
    net = small_net(dropout=0.5).train()
    net.middle_block.eval()  # a frozen part
    before = [m.training for m in net.modules()]
    d = Denoiser(net, LINEAR, time_input=share)
    assert lipschitz.lipschitz_constants(d, X0, [3]).item() == 0  # dropout would show
    assert [m.training for m in net.modules()] == before
    d.net.forward = lambda x, c: 1 / 0
    with pytest.raises(ZeroDivisionError):
        lipschitz.lipschitz_constants(d, X0, [3])
    assert [m.training for m in net.modules()] == before


def test_the_same_for_any_batch_size_and_any_choice_of_t():
    d, ts = Denoiser(small_net(), LINEAR), [0, 7, 300, 999]

    def quotients(x0=X0, ts=ts, seed=1, **size):
        return lipschitz.difference_quotients(d, x0, ts, seed=seed, **size)

    whole = quotients()
    assert_close(quotients(batch_size=2), whole, rtol=1e-3, atol=1e-8)
    assert_close(quotients(ts=[300])[0], whole[2], rtol=0, atol=0)
    assert_close(quotients(X0[:3]), whole[:, :3], rtol=1e-3, atol=1e-8)
    assert not torch.equal(quotients(seed=2)[2], whole[2])
    assert_close(lipschitz.lipschitz_constants(d, X0, ts, seed=1), whole.mean(1))


@pytest.mark.parametrize("ts, dt", [([-1], 1), ([1000], 1), ([1], 0), ([1], -1), ([0], 1001)])
def test_times_out_of_range_are_refused(ts, dt):
    d, x0 = oracle(LINEAR), gaussian_x0(2)
    refused("dt must be above 0", lipschitz.lipschitz_constants, d, x0, ts, dt=dt)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("t", [100, 700])
def test_perturbation_of_a_linear_oracle(prediction, t):
    """x̂_0 = a σ²/v · x_t: it moves by that times scale · ‖z‖, E‖z‖ a constant of the dimension."""
    scales = [0, 0.01, 0.1, 0.3]
    d, x0 = oracle(LINEAR, prediction), gaussian_x0(4000)
    moved = lipschitz.displacements(d, x0, scales, t=t, batch_size=1500)
    ab = alpha_bar(LINEAR, t)
    per_z = math.sqrt(ab) * STD**2 / (ab * STD**2 + 1 - ab)
    z = moved[2] / (0.1 * per_z)  # ‖z‖ of each image
    assert bool((moved[0] == 0).all())
    for scale, row in zip(scales, moved, strict=True):
        assert_close(row, scale * per_z * z, rtol=1e-9, atol=1e-12)
    assert_close(z.square().mean().item(), float(DIM), rtol=0.03, atol=0)
    assert_close(z.square().var().item(), 2.0 * DIM, rtol=0.15, atol=0)  # χ²
    refused("above 0 and below 1000", lipschitz.displacements, d, x0, scales, t=1000)


# ------------------------------------------------------------------ the program


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with EDM, a baseline, one with E-TSDM, and a continuous one of another size."""
    folder = tmp_path_factory.mktemp("lipschitz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("support.run.RunFolder.save_preview", lambda *inputs: None)
        for words in (
            "edm --schedule edm",
            "base",
            "shared --etsdm --etsdm-interval 20 --etsdm-n 4",
            "real --etsdm --continuous --channels 1",
        ):
            train.main([*TINY, "--steps", "3", "--name", *words.split()])
    return folder


@pytest.fixture
def measure(trained, tmp_path, monkeypatch):
    """measure(words) runs the program there, and gives the rows of its table."""
    monkeypatch.chdir(trained)

    def program(words, out="k"):
        lipschitz.main([*words.split(), "--out", f"{tmp_path}/{out}.png"])
        assert Image.open(tmp_path / f"{out}.png").size[0] > 800
        # the table next to it; no temporary files
        assert {p.suffix for p in tmp_path.iterdir()} == {".csv", ".png"}
        with open(tmp_path / f"{out}.csv", newline="") as f:
            return list(csv.DictReader(f))

    return program


def column(rows, name="mean", **which):
    """Numbers of a column, of the rows in which the others are these."""
    return [float(r[name]) for r in rows if all(r[k] == v for k, v in which.items())]


def test_program_two_runs_one_picture(measure, tmp_path, capsys):
    rows = measure("base runs/shared -n 3 --max-t 25")
    text = capsys.readouterr().out
    assert str(tmp_path / "k.png") in text
    assert list(rows[0]) == ["run", "t", "dt", "mean", "p10", "p50", "p90"]
    ts = list(range(1, 26))
    for run in ("base", "shared"):
        assert column(rows, "t", run=run) == ts, "a table's run was trained from t = 1 on"
    assert all(float(r["p10"]) <= float(r["p50"]) <= float(r["p90"]) for r in rows)
    shared = column(rows, run="shared")
    assert [t for t, k in zip(ts, shared, strict=True) if k > 0][:5] == [4, 9, 14, 19, 20]
    assert "exactly 0 at 15 of 15 t" in text and "0 of 0 t" in text
    largest = f"largest below 100: {max(shared):.3g} at {ts[shared.index(max(shared))]:g};"
    assert largest in text and "K(1) = " in text


def test_program_measures_what_the_function_does(measure):
    """From the run's own images, in the order of the seed."""
    rows = measure("base -n 3 --max-t 5 --seed 4")
    images = data.load("shapes", 8, 3, seed=4)
    x0 = torch.stack([images[i] for i in range(3)]) / 127.5 - 1
    K = lipschitz.difference_quotients(load_run("base"), x0, range(1, 6), seed=4)
    for name, want in dict(mean=K.mean(1), p50=K.median(1).values).items():
        got = torch.tensor(column(rows, name), dtype=torch.float64)
        assert_close(got, want, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
def test_program_fractions_of_a_step(measure, capsys):
    """--dt 0.25 of a continuous run: the steps onto the edges are there, the zeros are exact."""
    rows = measure("real -n 1 --dt 0.25 --max-t 110")
    ts = column(rows, "t")
    assert {i / 4 for i in range(121)} <= set(ts) and ts[-1] == 110
    assert all(t * 8 == int(t * 8) for t in ts)
    nonzero = [t for t, k in zip(ts, column(rows), strict=True) if k > 0 and t < 100]
    # half a dt before each edge; and 19.75, since 19.75 + 0.25 reaches 20
    assert {19.75, 19.875, 39.875, 59.875, 79.875, 99.875} <= set(nonzero)
    assert all(-t % 20 <= 0.25 for t in nonzero)
    count = re.search(r"exactly 0 at (\d+) of (\d+) t", capsys.readouterr().out)
    assert count[1] == count[2] and int(count[1]) > 100


def test_the_time_of_edm_is_real(measure):
    """As with --continuous, which that schedule refuses."""
    assert column(measure("edm -n 1 --dt 0.5 --max-t 2"), "t") == [0, 0.5, 1, 1.5, 2]


def test_program_perturbs(measure, capsys):
    rows = measure("base shared --perturb --num 4 --t 50 --scales 0 0.1 0.2")
    assert list(rows[0]) == ["run", "t", "scale", "mean", "p10", "p50", "p90"]
    assert column(rows, "t") == [50.0] * 6
    for run in ("base", "shared"):
        low, middle, high = column(rows, run=run)
        assert low == 0 < middle < high
    assert "0.1: " in capsys.readouterr().out


def test_program_default_run_and_same_names(measure, capsys):
    """Without a RUN the newest; the same run twice keeps its two curves apart; only zeros can be
    drawn."""
    measure("-n 2 --max-t 2")
    assert capsys.readouterr().out.startswith("real: 2 of")
    assert len({r["run"] for r in measure("base base -n 2 --max-t 2")}) == 2
    assert not any(column(measure("shared -n 2 --max-t 3")))


@pytest.mark.slow
@pytest.mark.parametrize("dt", [0.03, 0.07, 0.3, 1.5])
def test_the_step_across_each_edge_is_measured(measure, dt):
    """Whatever dt: for each edge some measured pair (t, t + dt) lies on both sides of it."""
    rows = measure(f"real -n 1 --dt {dt} --max-t 110")
    pairs = list(zip(column(rows, "t"), column(rows), strict=True))
    for edge in (20, 40, 60, 80, 100):
        assert any(t < edge <= t + dt and k > 0 for t, k in pairs), edge


@pytest.mark.slow
def test_a_dt_that_float32_loses_is_refused(measure):
    refused("^--dt 1e-05 is lost in rounding at t = .*--max-t", measure, "real -n 1 --dt 1e-5")
    measure("real -n 1 --dt 1e-5 --max-t 0.01")
