"""lipschitz.py: against closed forms on one Gaussian, against its promises on a real network, and
as a program."""

import contextlib
import csv
import io
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import etsdm
import lipschitz
from support import programs, rng
import schedules
import toy
import train
import unet
from denoiser import Denoiser, load_run

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


def mean_norm(schedule, t):
    """E‖x_t‖ of a Gaussian in DIM dimensions."""
    v = alpha_bar(schedule, t) * (STD**2 - 1) + 1
    return math.sqrt(2 * v) * math.exp(math.lgamma((DIM + 1) / 2) - math.lgamma(DIM / 2))


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("schedule, dt", [(LINEAR, 1), (LINEAR, 30), (CONTINUOUS, 0.25)])
def test_one_gaussian_has_a_closed_form(schedule, dt, prediction):
    ts = [0, 1, 10, 100, 500, 900]
    K = lipschitz.lipschitz_constants(
        oracle(schedule, prediction), gaussian_x0(4000), ts, dt=dt, batch_size=1000
    )
    f = [[factor(schedule, t + d, prediction) for d in (0, dt)] for t in ts]
    want = [abs(q - p) / dt * mean_norm(schedule, t) for t, (p, q) in zip(ts, f, strict=True)]
    assert K.shape == (6,) and K.dtype == torch.float64
    # 4000 norms of 16 dimensions: a standard error of 0.3 %. Drawn at t + 30, x would differ by 6 %
    assert_close(K, torch.tensor(want, dtype=torch.float64), rtol=0.012, atol=1e-12)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_dt_to_zero_gives_the_derivative(prediction):
    """Image by image: |dg/dt| ‖x_t‖, where the ideal answer is g(t) x."""
    d, seen = oracle(CONTINUOUS, prediction), []
    net = d.net
    d.net = lambda x, c: seen.append(x) or net(x, c)
    t = torch.tensor([5.0, 50.0, 400.0, 950.0], dtype=torch.float64, requires_grad=True)
    K = lipschitz.difference_quotients(d, gaussian_x0(6), t.detach(), dt=1e-4)
    ab = torch.exp(-(0.1 * t / 1000 + 19.9 * (t / 1000) ** 2 / 2))
    v = ab * STD**2 + 1 - ab
    g = {"eps": (1 - ab).sqrt() / v, "v": (ab * (1 - ab)).sqrt() * (1 - STD**2) / v}[prediction]
    (slope,) = torch.autograd.grad(g.sum(), t)
    norms = torch.stack([x.norm(dim=1) for x in seen[::2]])  # (t, image)
    assert_close(K, slope.abs()[:, None] * norms, rtol=1e-4, atol=0)


def test_near_zero_the_slope_is_singular_unless_the_schedule_is_modified():
    """ε* = s x/v and s ~ √t: K(0, dt) grows like dt^(−1/2); for linear-mns s ~ t, and it stays."""
    ratio = {}
    for name in ("linear", "linear-mns"):
        schedule = schedules.make_schedule(name, continuous=True)
        K = [
            lipschitz.lipschitz_constants(oracle(schedule), gaussian_x0(8), [0], dt=dt).item()
            for dt in (1e-2, 1e-4)
        ]
        ratio[name] = K[1] / K[0]
    assert_close(ratio, {"linear": 10.0, "linear-mns": 1.0}, rtol=0.01, atol=0)


def test_x_is_drawn_at_t_and_the_net_receives_t_and_t_plus_dt():
    seen = []

    def net(x, c):
        seen.append((x.clone(), c.clone()))
        return x * c.reshape(-1, 1)

    x0 = torch.zeros(5, 4000, dtype=torch.float64)
    d = Denoiser(net, LINEAR)
    rows = lipschitz.difference_quotients(d, x0, [400, 20], dt=3)
    (x, c), (x_same, c_next) = seen[0], seen[1]
    assert torch.equal(x, x_same) and c.tolist() == [400.0] * 5 and c_next.tolist() == [403.0] * 5
    assert_close(x.std().item(), math.sqrt(1 - alpha_bar(LINEAR, 400)), rtol=0.02, atol=0)
    assert seen[2][1][0] == 20 and len(seen) == 4
    assert_close(rows[0], x.norm(dim=1), rtol=1e-12, atol=0)  # |3 x|/3
    # one ε per image, at every t: curves are smooth, and independent of which t are asked for
    s = [math.sqrt(1 - alpha_bar(LINEAR, t)) for t in (400, 20)]
    assert_close(seen[0][0] / s[0], seen[2][0] / s[1], rtol=1e-9, atol=0)


def real_net(dropout=0.0):
    torch.manual_seed(0)
    net = unet.UNet(
        8,
        1,
        1,
        channels=16,
        channel_mult=(1, 2),
        res_blocks=1,
        attention_resolutions=(),
        head_channels=None,
        norm_groups=8,
        dropout=dropout,
    )
    for p in net.parameters():  # layers that start at zero would answer zero
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return net


X0 = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3)) * 2 - 1


def share(t):
    return etsdm.share_timesteps(t, 100, 5)


@pytest.mark.slow
def test_zero_inside_sub_intervals_and_nowhere_else_discrete():
    ts = torch.tensor([0, 1, 2, 7, 18, 19, 20, 21, 39, 40, 59, 79, 80, 97, 98, 99, 100, 101, 900])
    d = Denoiser(real_net(), LINEAR, time_input=share)
    rows = lipschitz.difference_quotients(d, X0, ts, batch_size=2)  # and a last batch of one
    inside = (ts < 99) & (ts % 20 != 19)
    assert bool((rows[inside] == 0).all()) and bool((rows[~inside] > 0).all())
    plain = lipschitz.difference_quotients(Denoiser(d.net, LINEAR), X0, ts, batch_size=2)
    assert bool((plain > 0).all())
    assert_close(plain[-3:], rows[-3:], rtol=1e-6, atol=0)  # from 100 on they receive the same


def test_zero_inside_sub_intervals_of_an_edm_run_too():
    """x_t is scaled as at t while the time input is that of t + dt: nothing moves inside."""
    schedule = schedules.make_schedule("edm")
    net = torch.nn.Conv2d(1, 1, 3, padding=1)
    d = Denoiser(
        lambda x, c: net(x) * c[:, None, None, None],
        schedule,
        "edm",
        etsdm.make_time_input(),
    )
    x0 = torch.randn(3, 1, 4, 4)
    K = lipschitz.lipschitz_constants(d, x0, [1.5, 18.9, 19.5, 60, 90.25], dt=1)
    assert (K[[0, 1, 3, 4]] == 0).all() and K[2] > 0


def test_zero_inside_sub_intervals_and_nowhere_else_continuous():
    d = Denoiser(real_net(), CONTINUOUS, time_input=lambda t: etsdm.share_timesteps(t, 50, 4))
    ts = [0.3, 5.71, 12.24, 12.3, 12.49, 24.9, 37.6, 49.8, 49.99, 50.01, 73.33]
    K = lipschitz.lipschitz_constants(d, X0, ts, dt=0.25)
    across = [t < b <= t + 0.25 for t in ts for b in (12.5, 25, 37.5, 50)]
    across = np.array(across).reshape(-1, 4).any(1) | (np.array(ts) >= 50)
    assert across.sum() == 7
    assert bool((K[~torch.from_numpy(across)] == 0).all())
    assert bool((K[torch.from_numpy(across)] > 0).all())


def test_eval_mode_is_used_and_given_back():
    net = real_net(dropout=0.5).train()
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
    d, ts = Denoiser(real_net(), LINEAR), [0, 7, 300, 999]
    whole = lipschitz.difference_quotients(d, X0, ts, seed=1)
    assert_close(
        lipschitz.difference_quotients(d, X0, ts, seed=1, batch_size=2), whole, rtol=1e-3, atol=1e-8
    )
    assert_close(lipschitz.difference_quotients(d, X0, [300], seed=1)[0], whole[2], rtol=0, atol=0)
    assert_close(
        lipschitz.difference_quotients(d, X0[:3], ts, seed=1), whole[:, :3], rtol=1e-3, atol=1e-8
    )
    assert not torch.equal(lipschitz.difference_quotients(d, X0, ts, seed=2)[2], whole[2])
    assert_close(lipschitz.lipschitz_constants(d, X0, ts, seed=1), whole.mean(1))


@pytest.mark.parametrize("ts, dt", [([-1], 1), ([1000], 1), ([1], 0), ([1], -1), ([0], 1001)])
def test_times_out_of_range_are_refused(ts, dt):
    with pytest.raises(ValueError, match="dt must be above 0"):
        lipschitz.lipschitz_constants(oracle(LINEAR), gaussian_x0(2), ts, dt=dt)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("t", [100, 700])
def test_perturbation_of_a_linear_oracle(prediction, t):
    """x̂_0 = a σ²/v · x_t: it moves by that times scale · ‖z‖, E‖z‖ a constant of the dimension."""
    scales = [0, 0.01, 0.1, 0.3]
    moved = lipschitz.displacements(
        oracle(LINEAR, prediction), gaussian_x0(4000), scales, t=t, batch_size=1500
    )
    ab = alpha_bar(LINEAR, t)
    per_z = math.sqrt(ab) * STD**2 / (ab * STD**2 + 1 - ab)
    z = moved[2] / (0.1 * per_z)  # ‖z‖ of each image
    assert bool((moved[0] == 0).all())
    for scale, row in zip(scales, moved, strict=True):
        assert_close(row, scale * per_z * z, rtol=1e-9, atol=1e-12)
    assert_close(z.square().mean().item(), float(DIM), rtol=0.03, atol=0)
    assert_close(z.square().var().item(), 2.0 * DIM, rtol=0.15, atol=0)  # χ²
    with pytest.raises(ValueError, match="above 0 and below 1000"):
        lipschitz.displacements(oracle(LINEAR), gaussian_x0(2), scales, t=1000)


# ------------------------------------------------------------------ the program


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a baseline, one with E-TSDM, and a continuous one of another size."""
    folder = tmp_path_factory.mktemp("lipschitz")
    tiny = ["--image-size", "8", "--batch-size", "4", "--precision", "fp32", "--steps", "3"]
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        train.main([*tiny, "--name", "base"])
        train.main(
            [*tiny, "--name", "shared", "--etsdm", "--etsdm-interval", "20", "--etsdm-n", "4"]
        )
        train.main([*tiny, "--name", "real", "--etsdm", "--continuous", "--channels", "1"])
    return folder


def table(path):
    with open(path) as f:
        rows = list(csv.DictReader(f))
    return rows, {name: [r for r in rows if r["run"] == name] for name in {r["run"] for r in rows}}


def test_program_two_runs_one_picture(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    out = tmp_path / "k.png"
    lipschitz.main(["base", "runs/shared", "-n", "3", "--max-t", "25", "--out", str(out)])
    text = capsys.readouterr().out
    assert Image.open(out).size[0] > 800 and str(out) in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["k.csv", "k.png"]  # and no temporaries
    rows, runs = table(tmp_path / "k.csv")
    assert list(rows[0]) == ["run", "t", "dt", "mean", "p10", "p50", "p90"]
    ts = [float(r["t"]) for r in runs["base"]]
    assert ts == list(range(1, 26)), "a table's run was trained from t = 1 on"
    assert [float(r["t"]) for r in runs["shared"]] == ts
    assert all(float(r["p10"]) <= float(r["p50"]) <= float(r["p90"]) for r in rows)
    nonzero = [float(r["t"]) for r in runs["shared"] if float(r["mean"]) > 0]
    assert nonzero[:5] == [4, 9, 14, 19, 20]
    assert "exactly 0 at 15 of 15 t" in text and "0 of 0 t" in text
    shared = [float(r["mean"]) for r in runs["shared"]]
    top = max(range(25), key=shared.__getitem__)
    assert f"largest below 100: {shared[top]:.3g} at {ts[top]:g};" in text and "K(1) = " in text


def test_program_measures_what_the_function_does(trained, tmp_path, monkeypatch):
    """From the run's own images, in the order of the seed."""
    monkeypatch.chdir(trained)
    lipschitz.main(["base", "-n", "3", "--max-t", "5", "--seed", "4", "--out", f"{tmp_path}/a.png"])
    images = data.load("shapes", 8, 3, seed=4)
    x0 = torch.stack([images[i] for i in range(3)]) / 127.5 - 1
    rows = lipschitz.difference_quotients(load_run("base"), x0, range(1, 6), seed=4)
    got = [[float(r[k]) for k in ("mean", "p50")] for r in table(tmp_path / "a.csv")[0]]
    want = torch.stack([rows.mean(1), rows.median(1).values], 1)
    assert_close(torch.tensor(got, dtype=torch.float64), want, rtol=1e-4, atol=1e-9)


@pytest.mark.slow
def test_program_fractions_of_a_step(trained, tmp_path, monkeypatch, capsys):
    """--dt 0.25 of a continuous run: the steps onto the edges are there, the zeros are exact."""
    monkeypatch.chdir(trained)
    words = ["real", "-n", "1", "--dt", "0.25", "--max-t", "110", "--out", f"{tmp_path}/a.png"]
    lipschitz.main(words)
    rows, _ = table(tmp_path / "a.csv")
    ts = [float(r["t"]) for r in rows]
    assert {i / 4 for i in range(121)} <= set(ts) and ts[-1] == 110
    assert all(t * 8 == int(t * 8) for t in ts)
    nonzero = [t for t, r in zip(ts, rows, strict=True) if float(r["mean"]) > 0 and t < 100]
    # half a dt before each edge; and 19.75, since 19.75 + 0.25 reaches 20
    assert {19.75, 19.875, 39.875, 59.875, 79.875, 99.875} <= set(nonzero)
    assert all(-t % 20 <= 0.25 for t in nonzero)
    count = re.search(r"exactly 0 at (\d+) of (\d+) t", capsys.readouterr().out)
    assert count[1] == count[2] and int(count[1]) > 100


def test_program_perturbs(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [str(trained / "runs" / name) for name in ("base", "shared")]
    lipschitz.main([*runs, "--perturb", "--num", "4", "--t", "50", "--scales", "0", "0.1", "0.2"])
    assert Image.open(tmp_path / "perturb.png").size[0] > 800
    rows, _ = table(tmp_path / "perturb.csv")
    assert list(rows[0]) == ["run", "t", "scale", "mean", "p10", "p50", "p90"]
    assert len(rows) == 6 and {float(r["t"]) for r in rows} == {50.0}
    for i in (0, 3):
        low, middle, high = (float(r["mean"]) for r in rows[i : i + 3])
        assert low == 0 < middle < high
    assert "0.1: " in capsys.readouterr().out


def test_program_default_run_and_same_names(trained, tmp_path, monkeypatch, capsys):
    """Without a RUN the newest; the same run twice keeps its two curves apart."""
    monkeypatch.chdir(trained)
    lipschitz.main(["-n", "2", "--max-t", "2", "--out", f"{tmp_path}/a.png"])
    assert capsys.readouterr().out.startswith("real: 2 of")
    lipschitz.main(["base", "base", "-n", "2", "--max-t", "2", "--out", f"{tmp_path}/b.png"])
    assert len(table(tmp_path / "b.csv")[1]) == 2


def test_only_zeros_can_be_drawn(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    lipschitz.main(["shared", "-n", "2", "--max-t", "3", "--out", f"{tmp_path}/a.png"])
    assert Image.open(tmp_path / "a.png").size[0] > 800


def test_help_teaches(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lipschitz.py"])
    with pytest.raises(SystemExit):
        lipschitz.main(["--help"])
    text = capsys.readouterr().out
    assert "examples" in text and "default" in text and "lipschitz.py" in text
    assert all(len(line) <= 110 for line in text.splitlines())


@pytest.mark.parametrize(
    "words, message",
    [
        (["none"], "no run none"),
        (["base", "--data", "nowhere"], "error: nowhere: no such file or folder"),
        (["base", "--t", "50"], "error: --t requires --perturb"),
        (["base", "--perturb", "--dt", "2"], "error: --dt requires --no-perturb"),
        (["base", "--perturb", "--t", "1000"], "error: --t must be above 0 and below 1000"),
        (["base", "--perturb", "--t", "9.5"], "error: --t must be a whole number: base is not"),
        (["base", "--dt", "0.5"], "error: --dt must be a whole number: base is not"),
        (["base", "--dt", "0"], "error: --dt must be at least 1e-09"),
        (["base", "--dt", "2000"], "leave no t from 1 on"),
        (["base", "--max-t", "0.5"], "leave no t from 1 on"),
        (["base", "-n", "0"], "error: --num must be at least 1"),
        (["base", "--seed", "-1"], "error: --seed must be at least 0"),
        (["base", "--out", "x.pdf"], "must be a .png"),
        (["base", "--out", "nowhere/x.png"], "in an existing folder"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_wrong_input_is_one_line_and_status_2(words, message, trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    before = set(Path(trained).rglob("*"))
    with pytest.raises(SystemExit) as end:
        programs.run_main(lambda: lipschitz.main(words))
    text = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and "error: " in text and re.search(message, text), text
    assert set(Path(trained).rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("dt", [0.03, 0.07, 0.3, 1.5])
def test_the_step_across_each_edge_is_measured(trained, tmp_path, monkeypatch, dt):
    """Whatever dt: for each edge some measured pair (t, t + dt) lies on both sides of it."""
    monkeypatch.chdir(trained)
    out = tmp_path / "a.png"
    lipschitz.main(["real", "-n", "1", "--dt", str(dt), "--max-t", "110", "--out", str(out)])
    rows, _ = table(tmp_path / "a.csv")
    pairs = [(float(r["t"]), float(r["mean"])) for r in rows]
    for edge in (20, 40, 60, 80, 100):
        assert any(t < edge <= t + dt and k > 0 for t, k in pairs), edge


@pytest.mark.slow
def test_a_dt_that_float32_loses_is_refused(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    words = ["real", "-n", "1", "--out", f"{tmp_path}/a.png", "--dt"]
    with pytest.raises(ValueError, match="^--dt 1e-05 is lost in rounding at t = .*--max-t"):
        lipschitz.main([*words, "1e-5"])
    lipschitz.main([*words, "1e-5", "--max-t", "0.01"])
