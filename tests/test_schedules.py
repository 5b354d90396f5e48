"""schedules.py against closed forms, second derivations and known numbers."""

import math
from functools import partial

import pytest
import torch
from conftest import refused
from torch.testing import assert_close

import samplers
import schedules
from schedules import make_schedule

near = partial(assert_close, rtol=1e-9, atol=0)
everywhere = pytest.mark.parametrize("name", schedules.SCHEDULES)
both = pytest.mark.parametrize("continuous", [False, True])


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@everywhere
@both
@pytest.mark.parametrize("T", [20, 1000])
def test_every_schedule_is_a_schedule(name, continuous, T):
    if T == 20 and not continuous and name.startswith(("linear", "quadratic", "zero-terminal")):
        refused("beta reaches .*larger T", make_schedule, name, T)  # 0.02 * 1000/20 = 1
        return
    s = make_schedule(name, T, continuous)
    t = torch.linspace(0, T, 4 * T + 1, dtype=torch.float64)
    ab = s.alpha_bar(t)
    assert ab.dtype == torch.float64
    assert ab[0] == 1.0, "alpha_bar(0) is exactly 1"
    assert (ab.diff() <= 0).all() and (ab >= 0).all()
    alpha, sigma = s.alpha_sigma(t)
    if name == "edm":  # dividing x by the root of α² + σ² makes it variance preserving
        assert (alpha == 1).all() and s.continuous and abs(samplers.initial_std(s) - 80) < 1e-12
        scale = (1 + sigma**2).sqrt()
        alpha, sigma = alpha / scale, sigma / scale
    else:
        assert s.continuous == continuous and samplers.initial_std(s) == 1
    assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=0, atol=1e-15)
    near(alpha, ab.sqrt(), rtol=1e-12)
    inner = (ab > 0) & (t > 0)
    assert_close(s.lam(t[inner]), torch.log(alpha[inner] / sigma[inner]), rtol=1e-9, atol=1e-9)
    assert s.lam(0.0) == math.inf
    assert (float(ab[-1]) == 0) == (name == "zero-terminal-snr")


@everywhere
@both
def test_t_of_lam_inverts_lam(name, continuous):
    s = make_schedule(name, continuous=continuous)
    t = torch.linspace(3, 998, 400, dtype=torch.float64)
    assert_close(s.t_of_lam(s.lam(t)), t, rtol=1e-9, atol=1e-7)
    assert s.t_of_lam(math.inf) == 0
    if name == "zero-terminal-snr":
        assert s.t_of_lam(-math.inf) == 1000


def test_known_numbers():
    """Re-derived by several programs: DDPM's linear schedule, T = 1000; cosine's tail is clipped,
    and its continuous form has a floor; neither is zero."""
    s, t = make_schedule("linear"), f64(1, 2, 500, 1000)
    near(s.alpha_bar(t), f64(0.9999, 0.99978009207, 0.078587242882, 4.0358297654e-5))
    near(s.step_variances(2, 1)[1].item(), 5.4531876613e-5)
    near(s.lam(t), f64(4.6051201835, 4.2110408383, -1.2308493579, -5.0588365917))
    near(s.t_of_lam(0.0).item() / 1000, 0.2590927982)  # DPM-Solver's: its time is t/1000
    near(s.log_alpha_bar(500.5).item() / 2, -1.2743006744)
    s = make_schedule("cosine")
    near(1 / s.alpha_sigma(1000)[0].item(), 20291.0, rtol=1e-4)
    near(s.lam(1000).item(), -9.918, rtol=1e-4)
    near(s.alpha_bar(1).item(), 0.9999587, rtol=1e-6)
    near(2 * make_schedule("cosine", continuous=True).lam(1000).item(), -20.0)


@pytest.mark.parametrize(
    "name", ["linear", "quadratic", "cosine", "linear-mns", "zero-terminal-snr"]
)
def test_discrete_tables_by_plain_products(name):
    """alpha_bar as a running product of 1 - beta, the way the papers write it."""
    T = 1000
    if name in ("linear", "zero-terminal-snr"):
        beta = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
    elif name == "quadratic":
        beta = torch.linspace(1e-2, 0.02**0.5, T, dtype=torch.float64) ** 2
    elif name == "linear-mns":
        beta = 0.02 * torch.arange(1, T + 1, dtype=torch.float64) / T
    else:
        f = [math.cos((i / T + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(T + 1)]
        beta = f64(*[min(1 - f[i] / f[i - 1], 0.999) for i in range(1, T + 1)])
    ab = torch.cumprod(1 - beta, 0)
    if name == "zero-terminal-snr":
        root = ab.sqrt()
        ab = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    s = make_schedule(name)
    assert_close(s.alpha_bar(torch.arange(1, T + 1)), ab, rtol=1e-11, atol=1e-18)


@pytest.mark.parametrize("name", ["linear", "quadratic", "linear-mns", "quadratic-mns"])
def test_continuous_forms_by_quadrature(name):
    """log alpha_bar = -integral of beta(u): midpoint rule with a million points."""
    s, n = make_schedule(name, continuous=True), 1_000_000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 0.7
    root = 0.1**0.5 + (20**0.5 - 0.1**0.5) * u
    end = make_schedule("quadratic", continuous=True).log_alpha_bar(1000)
    beta = {"linear": 0.1 + 19.9 * u, "quadratic": root**2, "linear-mns": 20 * u}
    beta["quadratic-mns"] = -3 * end * u**2
    near(s.log_alpha_bar(700.0), -beta[name].mean() * 0.7)


def test_continuous_zero_terminal_is_the_shifted_linear():
    s, lin = (make_schedule(n, continuous=True) for n in ("zero-terminal-snr", "linear"))
    t = f64(1e-3, 1, 300, 999)
    alpha, end = lin.alpha_sigma(t)[0], lin.alpha_sigma(1000)[0]
    near(s.alpha_sigma(t)[0], (alpha - end) / (1 - end), rtol=1e-11)
    assert s.alpha_bar(1000) == 0


@both
def test_cosine_shift_formula_and_limits(continuous):
    for d in (16, 64, 256):
        s = make_schedule("cosine-shift", continuous=continuous, image_size=d)
        tangent = (math.pi / 2 * f64(0.25, 0.5, 0.9)).tan()
        near(s.lam(f64(250, 500, 900)), (64 / d / tangent).log(), rtol=1e-10, atol=1e-10)
        near(2 * s.lam(1000).item(), -15.0)
        assert s.lam(1e-6 if continuous else 1) <= 7.5 + 1e-9


# EDM's noise levels for 18 steps, from its own program.
EDM_18 = """80 57.585985 40.785574 28.374585 19.352453 12.910082 8.4009353 5.3151945 3.2568215
1.9233398 1.0881706 0.58534812 0.29644228 0.13951647 0.059947311 0.022934518 0.00752802 0.002"""


def test_edms_noise_levels():
    s = make_schedule("edm")
    sigma = s.alpha_sigma(schedules.time_grid(s, 18))[1]
    near(sigma, f64(*map(float, EDM_18.split())), rtol=5e-8)  # eight digits are printed
    # below t = 1 a straight line to sigma(0) = 0; beyond T the formula goes on
    near(s.alpha_sigma(f64(0, 1e-9, 0.5, 1))[1], 0.002 * f64(0, 1e-9, 0.5, 1))
    root = 80 ** (1 / 7) + (80 ** (1 / 7) - 0.002 ** (1 / 7)) * 50 / 999
    near(s.alpha_sigma(1050)[1].item(), root**7, rtol=1e-12)
    # lam and its inverse keep their digits
    t = torch.cat([torch.logspace(-9, 0, 40), torch.linspace(1, 1100, 999)]).double()
    sigma = s.alpha_sigma(t)[1]
    near(s.lam(t), -sigma.log(), rtol=0, atol=4e-15)
    near(s.alpha_bar(t), 1 / (1 + sigma**2), rtol=1e-14)
    near(s.t_of_lam(s.lam(t)), t, rtol=4e-14)
    # beta = the variance that is added, beta_tilde = EDM's ancestral share of sigma_next
    (_, high), (_, low) = s.alpha_sigma(640.0), s.alpha_sigma(31.5)
    beta, beta_tilde = s.step_variances(640.0, 31.5)
    near(beta, high**2 - low**2, rtol=1e-13)
    near(beta_tilde, low**2 * (high**2 - low**2) / high**2, rtol=1e-13)


@both
def test_modified_ns_matches_the_snr_at_T_and_is_flat_at_0(continuous):
    plain, flat = (make_schedule(n, continuous=continuous) for n in ("quadratic", "quadratic-mns"))
    near(plain.lam(1000), flat.lam(1000))
    if not continuous:
        beta_T = 1 - (flat.log_alpha_bar(1000) - flat.log_alpha_bar(999)).exp()
        assert_close(beta_T.item(), 0.0214810, rtol=0, atol=5e-8)


@pytest.mark.parametrize("name", ["linear", "quadratic", "cosine"])
def test_modified_ns_has_no_slope_at_zero(name):
    """dα/dt(0) = 0, by differences that shrink: of the originals they do not."""
    t = f64(1e-4, 1e-2)
    for which, flat in ((name, False), (name + "-mns", True)):
        s = make_schedule(which, continuous=True)
        slope = -torch.expm1(s.log_alpha_bar(t) / 2) / t  # (1 - α)/t, with its digits
        assert (slope[0] < 0.02 * slope[1]) == flat
        assert flat or abs(slope[0] / slope[1] - 1) < 0.02


def test_modified_ns_snr_against_the_originals():
    """Figure A9: far more signal near t = 0; the ratio falls to about 1 at T and never below."""
    t = torch.arange(1, 1001, dtype=torch.float64)
    ratios = {}
    for name in ("linear", "quadratic", "cosine"):
        plain, flat = make_schedule(name), make_schedule(name + "-mns")
        ratios[name] = ratio = (2 * (flat.lam(t) - plain.lam(t))).exp()
        assert (ratio.diff()[:400] < 0).all() and (ratio > 1 - 1e-9).all()
        assert ratio[0] > 4.9 and ratio[399:].max() < 1.5
    near(ratios["linear"][0].item(), 1e-4 / 2e-5, rtol=1e-3)  # beta_1 of both
    near(ratios["quadratic"][0].item(), 1e-4 / 0.0214810e-6, rtol=1e-3)
    near(ratios["quadratic"][-1].item(), 1.0)  # matched
    # linear-mns keeps β_T alone: its β sum to 10.01, not 10.05, and a little more signal is left
    near(ratios["linear"][-1].item(), 1.041, rtol=1e-3)


def test_digits_survive_near_zero():
    """1 - alpha_bar at t = 1e-9 is 1e-13 of beta's rate: a plain 1 - cumprod has no digit left
    there."""
    s = make_schedule("linear", continuous=True)
    near(s.alpha_sigma(1e-9)[1].item() ** 2, 0.1 * 1e-12, rtol=1e-8)


@everywhere
@both
def test_step_variances_are_bayes(name, continuous):
    """beta_tilde from the precision of q(x_next | x_t, x_0) = q(x_t | x_next) q(x_next | x_0)."""
    s = make_schedule(name, continuous=continuous)
    for t, t_next in ((999, 998), (700.5, 200), (40, 3)):
        beta, beta_tilde = s.step_variances(t, t_next)
        (alpha_t, sigma_t), (alpha, sigma) = s.alpha_sigma(t), s.alpha_sigma(t_next)
        k = alpha_t / alpha  # q(x_t | x_next) = N(k x_next, beta)
        assert_close(beta, sigma_t**2 - k**2 * sigma**2, rtol=1e-6, atol=1e-12)
        precision = k**2 / beta + 1 / sigma**2
        assert_close(beta_tilde, 1 / precision, rtol=1e-6, atol=1e-12)
    assert s.step_variances(5.0, 0.0)[1] == 0
    if name == "zero-terminal-snr":
        beta, beta_tilde = s.step_variances(1000, 999)
        assert beta == 1 and 0 < beta_tilde <= 1


@both
def test_numbers_and_tensors_of_any_shape(continuous):
    s = make_schedule("linear", continuous=continuous)
    t = torch.arange(1, 7)
    expected = s.alpha_bar(t)
    assert torch.equal(s.alpha_bar(t.reshape(2, 3)), expected.reshape(2, 3))
    assert torch.equal(s.alpha_bar(t.float()), expected) and s.alpha_bar(3) == expected[2]
    near(s.t_of_lam(s.lam(t.reshape(2, 3))), t.reshape(2, 3).double(), atol=1e-9)
    if not continuous:  # linear in log ᾱ between the integers
        low, high = s.log_alpha_bar(41), s.log_alpha_bar(42)
        near(s.log_alpha_bar(41.25), 0.75 * low + 0.25 * high, rtol=1e-14)


def test_add_noise_has_the_right_moments():
    s = make_schedule("linear")
    g = torch.Generator().manual_seed(0)
    x0 = torch.full((2, 200_000), 0.7)
    xt = schedules.add_noise(s, x0, torch.tensor([100, 800]), torch.randn(x0.shape, generator=g))
    assert xt.dtype == torch.float32
    alpha, sigma = s.alpha_sigma(torch.tensor([100, 800]))
    assert_close(xt.double().mean(1), 0.7 * alpha, rtol=0, atol=0.01)
    near(xt.double().std(1), sigma, rtol=0.01)


@everywhere
@both
@pytest.mark.parametrize("spacing", ["uniform", "quadratic", "logsnr"])
def test_grids_fall_strictly_from_T_to_the_end(name, continuous, spacing):
    s = make_schedule(name, continuous=continuous)
    for points in (1, 2, 3, 7, 13, 21, 1000):
        grid = schedules.time_grid(s, points, spacing)
        assert len(grid) == points and grid.dtype == torch.float64
        assert grid[0] == 1000 and (points == 1 or grid[-1] == 1)
        assert (grid.diff() < 0).all()
    if spacing == "uniform":
        near(grid, torch.arange(1000, 0, -1).double(), rtol=1e-12)
    if spacing == "logsnr":
        grid = schedules.time_grid(s, 21, spacing)
        signal = grid[s.alpha_bar(grid) > 0]
        steps = s.lam(signal).diff()
        near(steps, steps.mean().expand_as(steps), rtol=1e-6, atol=1e-8)
        if name == "zero-terminal-snr" and not continuous:
            assert len(signal) == 20 and abs(grid[1] - 999) < 1e-6


@pytest.mark.parametrize(
    "words, call",
    [
        ("unknown schedule 'lineer': choose from linear", partial(make_schedule, "lineer")),
        ("T must be", partial(make_schedule, "linear", T=0)),
        ("--betas must rise", partial(make_schedule, "linear", betas=(0.02, 1e-4))),
        ("at least one point", lambda: schedules.time_grid(make_schedule("linear"), 0)),
        ("unknown spacing", lambda: schedules.time_grid(make_schedule("linear"), 5, "karras")),
        ("times must satisfy", lambda: schedules.time_grid(make_schedule("linear"), 5, t_end=0)),
    ],
)
def test_errors_say_what_is_wrong(words, call):
    refused(words, call)


@pytest.mark.parametrize("name", ["linear", "edm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("t", [37.0, 37, torch.tensor([37, 37]), torch.tensor([36.5, 37.5])])
def test_coefficients_are_float64_and_x_keeps_its_dtype(name, dtype, t):
    schedule = make_schedule(name)
    alpha, sigma = schedule.alpha_sigma(t)
    assert alpha.dtype == sigma.dtype == torch.float64
    x0, eps = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    xt = schedules.add_noise(schedule, x0, t, eps)
    back = schedules.eps_from_x0(schedule, xt, t, x0)
    assert xt.dtype == back.dtype == dtype
    if dtype == torch.float64:
        column = [c.reshape(-1, 1, 1, 1) for c in (alpha, sigma)]
        near(xt, column[0] * x0 + column[1] * eps, rtol=1e-15)
        assert_close(back, eps, rtol=1e-9, atol=1e-9)


def test_expand():
    x = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    for shape, expanded in (((), ()), ((2,), (2, 1, 1, 1)), ((2, 3, 4, 4), (2, 3, 4, 4))):
        c = schedules.expand(torch.ones(shape, dtype=torch.float64), x)
        assert c.shape == expanded and (c * x).shape == x.shape and (c * x).dtype == x.dtype


@everywhere
@both
def test_leading_grid_is_that_of_ddims_program(name, continuous):
    s = make_schedule(name, continuous=continuous)
    grid = schedules.time_grid(s, 10, "leading")
    assert grid.dtype == torch.float64
    assert grid.tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    for points in (2, 3, 7, 50, 501, 999, 1000):
        steps = range(1, 1 + 1000 // points * points, 1000 // points)
        assert schedules.time_grid(s, points, "leading").tolist() == list(steps)[::-1]
    # other ends: the steps t_end, t_end + 1, ..., t_start take the place of 1..T
    assert schedules.time_grid(s, 3, "leading", t_start=999).tolist() == [667, 334, 1]
    assert schedules.time_grid(s, 2, "leading", t_end=11, t_start=20).tolist() == [16, 11]
    assert schedules.time_grid(s, 2, "leading", t_end=0.5).tolist() == [500.5, 0.5]
    for points, t_start in ((1, None), (1001, None), (1000, 999)):
        why = "--spacing leading takes from 2 to"
        refused(why, schedules.time_grid, s, points, "leading", t_start=t_start)
