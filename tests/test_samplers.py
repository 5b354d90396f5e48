"""samplers.py on the toy mixture, whose ideal network is known, and against reference numbers."""

import functools
import math
import sys
import warnings
from dataclasses import dataclass
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import denoiser as D
import etsdm
import samplers
import schedules
import toy
from support.cli import parse_into

# Heun leaves a call unused in half of the tests below: its warning is tested once.
pytestmark = pytest.mark.filterwarnings("ignore:heun takes two network calls")

LINEAR, EDM = schedules.make_schedule("linear"), schedules.make_schedule("edm")
ZERO = schedules.make_schedule("zero-terminal-snr")
SPACINGS = ["uniform", "quadratic", "logsnr"]
ALL = [dict(sampler=name) for name in ("ddpm", "ddim", "dpm-solver++")]
ALL += [dict(sampler="ddpm", variance="large"), dict(sampler="ddim", eta=0.5)]
ALL += [dict(sampler="dpm-solver", order=order) for order in (1, 2, 3)]
HEUN = dict(sampler="heun")
CHURN = dict(HEUN, s_churn=5.0)

exactly = functools.partial(assert_close, rtol=0, atol=1e-8)
ones = functools.partial(torch.ones, dtype=torch.float64)
ONE = ones(1, 1)


def numbers(text):
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def toy_denoiser(mixture, schedule=LINEAR, prediction="eps", shared=False):
    times = toy.shared_times(100, 5, schedule.continuous) if shared else None
    make = edm_oracle if prediction == "edm" else toy.oracle
    time_input = etsdm.make_time_input() if shared else None
    return D.Denoiser(make(mixture, schedule, prediction, times), schedule, prediction, time_input)


def edm_oracle(mixture, schedule, prediction, times):
    """The ideal F of EDM's preconditioning: given x/r and ln(sigma)/4."""

    def net(scaled, c):
        t = schedule.t_of_lam(-4 * c.double())
        if times is not None:  # a boundary, 1 for the first: make it exact
            t = torch.where(t < 99, (t / 20).round() * 20, t)
        outputs = []
        for time in [t] if times is None else times(t):
            alpha, sigma = (schedules.expand(k, scaled) for k in schedule.alpha_sigma(time))
            r = (sigma**2 + alpha**2 * 0.5**2).sqrt()
            x0 = mixture.posterior(scaled * r, alpha, sigma)[0]
            outputs.append((x0 - alpha * 0.5**2 / r * scaled) * r / (sigma * 0.5))
        return torch.stack(outputs).mean(0)

    return net


def counted(denoiser):
    """(denoiser, list): the list receives the time of every network call."""
    calls, net = [], denoiser.net
    return denoiser.replace(net=lambda x, c: (calls.append(c[0].item()), net(x, c))[1]), calls


def bounded(schedule, prediction="eps"):
    """A network with some bounded output."""
    return D.Denoiser(lambda x, c: 0.4 * x, schedule, prediction)


# The authors' solver in float64: x_0 ~ N(0, 0.25), x_T = 1, t from 1000 to 1, in 10 and 12 steps.
GOLDEN = """\
dpm-solver 1 logsnr 0.3928415927 0.4089247057
dpm-solver 1 uniform 0.3743365386 0.3936437627
dpm-solver 2 logsnr 0.6375051560 0.6065632703
dpm-solver 3 logsnr 0.5173934719 0.5674205291
dpm-solver 3 uniform 0.4181992805 0.4619463394
dpm-solver 3 quadratic 0.5100068633 0.5221685951
dpm-solver++ 3 logsnr 0.5166374092 0.5144655654"""


@pytest.mark.parametrize("row", GOLDEN.splitlines())
@pytest.mark.parametrize("prediction", D.PREDICTIONS)
def test_dpm_solver_reference_numbers(row, prediction):
    denoiser = toy_denoiser(toy.one_gaussian(), prediction=prediction)
    sampler, order, spacing, *expected = row.split()
    kwargs = dict(spacing=spacing, order=int(order), denoise_to_zero=False)
    for nfe, number in zip((10, 12), expected, strict=True):
        exactly(samplers.sample(denoiser, ONE, sampler, nfe, **kwargs).item(), float(number))


def test_reference_numbers_of_few_steps_and_of_the_call_that_gives_x0():
    denoiser, calls = counted(toy_denoiser(toy.one_gaussian()))
    got = samplers.sample(denoiser, ONE, "dpm-solver++", 9, "logsnr", denoise_to_zero=False)
    exactly(got.item(), 0.5079454981)  # below ten steps, 2M ends in order 1
    calls.clear()
    got = samplers.sample(denoiser, ONE, "dpm-solver", 11, "logsnr").item()
    exactly(got, 0.5172124379)
    labels = "999 915.848498 824.361112 721.563661 602.765122 462.027672 302.307847 160.134728"
    expected = numbers(labels + " 72.796112 30.144004 0")
    assert_close(torch.tensor(calls).double() - 1, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "grid, expected",
    [
        ([round(1 + k * 999 / 9) for k in range(10)], 0.3616117227),
        ([round(1 + k * 999 / 49) for k in range(50)], 0.4719151076),
        (list(range(1, 1001)), 0.4984952830),
        (list(range(1, 1001, 100)), 0.3741284938),
        (list(range(1, 1001, 20)), 0.4724391130),
    ],
)
def test_ddim_reference_numbers_on_given_grids(grid, expected):
    times = torch.tensor(grid[::-1], dtype=torch.float64)
    exactly(samplers.sample(toy_denoiser(toy.one_gaussian()), ONE, spacing=times).item(), expected)


def test_singlestep_plan_of_the_authors():
    for steps, orders, ends, expected in (
        (10, [3, 3, 3, 1], [0, 3, 6, 9, 10], "1 0.722564 0.303308 0.031144 0.001"),
        (12, [3, 3, 3, 2, 1], [0, 3, 6, 9, 11, 12], "1 0.785817 0.493114 0.13904 0.017803 0.001"),
    ):
        grid = schedules.time_grid(LINEAR, steps + 1, "logsnr")
        times, found = samplers.singlestep_plan(LINEAR, grid, 3, equal=True)
        assert found == orders
        assert_close(times[ends] / 1000, numbers(expected), rtol=0, atol=1e-6)
    for steps, order, expected in ((3, 3, [2, 1]), (9, 2, [2, 2, 2, 2, 1]), (0, 3, [])):
        grid = schedules.time_grid(LINEAR, steps + 1)
        assert samplers.singlestep_plan(LINEAR, grid, order) == (grid, expected)
    for steps, order in product(range(60), (1, 2, 3)):
        grid = schedules.time_grid(LINEAR, steps + 1)
        assert sum(samplers.singlestep_plan(LINEAR, grid, order)[1]) == steps


@pytest.mark.parametrize("kwargs", ALL, ids=str)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_exactly_nfe_calls_and_finite(kwargs, spacing):
    """Every NFE from 1 to 25; schedules with and without signal at T; from T down to t_end. About T
    and beyond it, too. A zero-terminal table has no signal between T - 1 and T, and the clipped log
    SNR of cosine-shift stands still at t = 1 and 2: such steps have no length, but are calls."""
    cosine = schedules.make_schedule("cosine", continuous=True)
    short = schedules.make_schedule("zero-terminal-snr", T=40)
    flat = schedules.make_schedule("cosine-shift", T=100, image_size=1)
    assert flat.lam(1) == flat.lam(2)
    kinds = ((LINEAR, "eps"), (ZERO, "v"), (cosine, "x0"), (short, "v"), (flat, "eps"))
    for schedule, prediction in kinds:
        every = [*range(1, 14), 21, 50]
        if schedule is LINEAR:
            every += [*range(14, 26), *[1000] * (spacing == "uniform")]
        if schedule in (short, flat):
            every = [schedule.T + more for more in (-1, 0, 1, 3)]
        for nfe, final in [(n, True) for n in every] + [(n, False) for n in (1, 2, 3, 5, 10, 50)]:
            denoiser, calls = counted(bounded(schedule, prediction))
            x = samplers.sample(
                denoiser, ones(2, 1), nfe=nfe, spacing=spacing, denoise_to_zero=final, **kwargs
            )
            assert len(calls) == nfe and torch.isfinite(x).all(), (nfe, schedule.name)
            assert calls[0] == schedule.T and (
                calls[-1] == 1 if final and nfe > 1 else calls[-1] > 1
            )
            assert all(s > t for s, t in pairwise(calls)), "times fall"


@pytest.mark.parametrize("schedule", [LINEAR, EDM], ids=["linear", "edm"])
@pytest.mark.parametrize("kwargs", [*ALL, HEUN, CHURN], ids=str)
def test_an_oracle_of_one_image_gives_it_back_exactly(kwargs, schedule):
    """If eps is exactly the noise of one x_0, every sampler must end on that x_0 (no noise of std
    0.01). All that it uses of a denoiser is predict() and the schedule."""
    x0 = torch.linspace(-0.9, 0.9, 12, dtype=torch.float64).reshape(1, 12)

    def predict(x, t):
        alpha, sigma = schedule.alpha_sigma(t)
        return x0.expand_as(x), (x - alpha * x0) / sigma

    bare = SimpleNamespace(schedule=schedule, predict=predict)
    for nfe in (1, 2, 3, 7, 13, 21, 40):
        out = samplers.sample(
            bare, samplers.initial_std(schedule) * normal(1, 12), nfe=nfe, **kwargs
        )
        assert_close(out, x0, rtol=1e-9, atol=1e-9)


@functools.cache
def exact_flow():
    """The probability-flow ODE of the two bumps from x_T to t = 1, by scipy at 1e-12 (an
    independent solver)."""
    from scipy.integrate import solve_ivp

    schedule = schedules.make_schedule("linear", continuous=True)
    denoiser = toy_denoiser(toy.two_bumps(), schedule)
    start, stop = float(schedule.lam(1000)), float(schedule.lam(1))

    def slope(lam, y):  # y = x/α moves along dy = eps d(σ/α), σ/α = e^-lam
        t = float(schedule.t_of_lam(lam))
        alpha = float(schedule.alpha_sigma(t)[0])
        eps = denoiser.predict(torch.tensor(y * alpha)[:, None], t)[1][:, 0].numpy()
        return -math.exp(-lam) * eps

    x = numbers("-1.3 -0.2 0.4 1.1")
    alpha_0, alpha_1 = (float(schedule.alpha_sigma(t)[0]) for t in (1000, 1))
    how = dict(rtol=1e-11, atol=1e-12, method="DOP853")
    y = solve_ivp(slope, (start, stop), (x / alpha_0).numpy(), **how).y[:, -1]
    return denoiser, x[:, None], torch.tensor(y * alpha_1)[:, None]


@pytest.mark.parametrize(
    "sampler, order", [*product(["dpm-solver"], (1, 2, 3)), ("dpm-solver++", 2), ("heun", 2)]
)
def test_convergence_orders(sampler, order):
    """Error against nfe on log-log axes falls with the solver's order; fitted slope over three
    halvings."""
    denoiser, x, exact = exact_flow()
    nfes = (62, 125, 248, 500) if order == 3 else (64, 128, 256, 512)  # order 3: = 2 (mod 3)
    kwargs = dict(spacing="logsnr", order=order, denoise_to_zero=False)
    outs = [samplers.sample(denoiser, x, sampler, n, **kwargs) for n in nfes]
    errors = torch.stack([(out - exact).abs().max() for out in outs])
    logs = torch.tensor(nfes, dtype=torch.float64).log()
    logs = logs - logs.mean()
    slope = -(logs @ errors.log() / (logs @ logs)).item()
    print(f"\n{sampler}: errors {[f'{e:.2e}' for e in errors]}, slope {slope:.2f}")
    assert abs(slope - order) < 0.25


def test_order_one_is_ddim():
    denoiser, x = toy_denoiser(toy.two_bumps()), normal(5, 1)
    for spacing in SPACINGS:
        kwargs = dict(nfe=12, spacing=spacing, denoise_to_zero=False)
        one = samplers.sample(denoiser, x, "dpm-solver", order=1, **kwargs)
        assert_close(one, samplers.sample(denoiser, x, "ddim", **kwargs), rtol=1e-12, atol=1e-12)


def test_ddpm_is_the_posterior_written_out():
    """One ancestral step against mu_tilde and beta_tilde as DDPM prints them."""
    mixture, x, z = toy.two_bumps((3,)), normal(4, 3), normal(4, 3, seed=1)
    net, ab = toy_denoiser(mixture).net, LINEAR.alpha_bar(torch.arange(1001))
    first = torch.tensor([1000.0, 999.0])
    beta = 1 - ab[1000] / ab[999]
    x0 = mixture.posterior(x, ab[1000].sqrt(), (1 - ab[1000]).sqrt())[0]
    mean = (ab[999].sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - ab[999]) * x) / (1 - ab[1000])
    small = beta * (1 - ab[999]) / (1 - ab[1000])
    for kwargs, var in (
        (dict(sampler="ddpm"), small),
        (dict(sampler="ddpm", variance="small"), small),
        (dict(sampler="ddim", eta=1, variance="small"), small),
        (dict(sampler="ddpm", variance="large"), beta),
    ):
        seen = []
        spy = D.Denoiser(lambda x, c, seen=seen: (seen.append(x), net(x, c))[1], LINEAR)
        samplers.sample(spy, x, spacing=first, noise=lambda shape: z, **kwargs)
        assert_close(seen[1], mean + var.sqrt() * z, rtol=1e-9, atol=1e-9)


def test_clipping_keeps_the_pair_consistent():
    """The clipped x0 gives DDPM's mean with that x0, and nothing leaves the range at the end."""
    wild = D.Denoiser(lambda x, c: -x, LINEAR)  # its x_0 is far outside
    x = normal(8, 4)
    assert samplers.sample(wild, x, nfe=10).abs().max() > 1
    for kwargs in (*ALL, HEUN):
        out = samplers.sample(wild, x, nfe=10, clip=(-1.0, 1.0), **kwargs)
        assert out.abs().max() <= 1
    x0, eps = samplers.predict(wild, x, 300, (-1.0, 1.0))
    alpha, sigma = LINEAR.alpha_sigma(300)
    assert_close(alpha * x0 + sigma * eps, x, rtol=1e-12, atol=1e-12)


def test_variance_as_a_function():
    """A function receives x_t and both times. It gives the variance of the step: a number, one per
    image or one per pixel."""
    denoiser, asked, grid = toy_denoiser(toy.one_gaussian()), [], torch.tensor([1000.0, 500.0])
    variance = lambda x, t, t_next: (asked.append((t, t_next)), torch.tensor(0.04).double())[1]  # noqa: E731
    kwargs = dict(spacing=grid, noise=ones, variance=variance)
    out = samplers.sample(denoiser, 0 * ONE, "ddpm", **kwargs)
    assert asked == [(1000.0, 500.0)]  # the step onto 0 adds no noise
    expected = toy.one_gaussian().posterior(0.2 * ONE, *LINEAR.alpha_sigma(500))[0]
    assert_close(out, expected, rtol=1e-9, atol=1e-8)
    black, x = D.Denoiser(lambda x, c: 0 * x, LINEAR, "x0"), torch.zeros(2, 3, 1, 1)
    for var in (torch.tensor([0.04, 0.25]), torch.rand(2, 3, 1, 1)):
        kwargs |= dict(noise=torch.ones, variance=lambda x, t, t_next, var=var: var)
        out = samplers.sample(black, x, "ddpm", denoise_to_zero=False, **kwargs)
        assert_close(out, var.sqrt().reshape(2, -1, 1, 1).expand(2, 3, 1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("prediction", D.PREDICTIONS)
def test_x_keeps_its_precision_and_is_not_changed(dtype, prediction):
    """The network receives x in x's dtype and c of shape (B,), float32 at least, in every sampler
    and in every one of its calls."""
    c_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def net(x, c):
        assert x.dtype == dtype and c.dtype == c_dtype and c.shape == (3,)
        return 0.4 * x

    x = torch.randn(3, 2, 4, 4).to(dtype)
    before = x.clone()
    per_pixel = dict(sampler="ddpm", variance=lambda x, t, t_next: 1e-3 * x.double() ** 2)
    per_image = dict(sampler="ddim", variance=lambda x, t, t_next: torch.full((3,), 1e-3).double())
    number = dict(sampler="ddim", variance=lambda x, t, t_next: 1e-3)
    for schedule in (LINEAR, EDM):
        denoiser = D.Denoiser(net, schedule, prediction)
        for kwargs in (*ALL, HEUN, CHURN, per_pixel, per_image, number):
            for extra in (dict(), dict(spacing="logsnr", clip=(-1.0, 1.0))):
                out = samplers.sample(denoiser, x, nfe=5, **kwargs, **extra)
                assert out.dtype == dtype and out.shape == x.shape
    assert torch.equal(x, before)


# ------------------------------------------------------------------ the whole product

QUICK = dict(sampler="ddim")
FAST = [dict(sampler=s, spacing="logsnr") for s in ("dpm-solver", "dpm-solver++", "heun")]
CHURNED = dict(FAST[2], s_churn=10.0, s_min=0.01, s_max=50.0)


def cases_of_the_product():
    for kwargs in (QUICK, *FAST, CHURNED, dict(sampler="ddpm")):
        for case in product(schedules.SCHEDULES, (False, True), D.PREDICTIONS, (False, True)):
            name, continuous, prediction, shared = case
            if name == "edm" and not continuous:
                continue
            if kwargs == CHURNED and name not in ("linear", "edm"):
                continue  # they add noise the same way
            slow = kwargs != QUICK or prediction == "edm" and name not in ("linear", "edm")
            words = [kwargs["sampler"] + "-churned" * (kwargs == CHURNED), name]
            words += ["continuous" if continuous else "discrete", prediction, *["shared"] * shared]
            yield pytest.param(*case, kwargs, id="-".join(words), marks=[pytest.mark.slow] * slow)


@pytest.mark.parametrize("name, continuous, prediction, shared, kwargs", [*cases_of_the_product()])
def test_moments_over_the_whole_product(name, continuous, prediction, shared, kwargs):
    """Any schedule x prediction x sharing x sampler: the sampled mean and variance are right, with
    few calls for the two solvers of high order."""
    schedule = schedules.make_schedule(name, continuous=continuous)
    mixture = toy.two_bumps()
    denoiser = toy_denoiser(mixture, schedule, prediction, shared)
    start, std = samplers.initial_time(denoiser), mixture.variance().sqrt()
    alpha, sigma = (float(c) for c in schedule.alpha_sigma(start))  # some leave signal at T
    noisy = kwargs["sampler"] == "ddpm" or "s_churn" in kwargs
    n = 3000 if noisy else 200
    # An even sample of x_T: its image under a noise-free sampler carries no luck.
    x = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    x = alpha * mixture.mean() + (alpha**2 * mixture.variance() + sigma**2).sqrt() * x
    if noisy:
        g = torch.Generator().manual_seed(0)
        kwargs = dict(kwargs, noise=lambda shape: torch.randn(shape, dtype=x.dtype, generator=g))
    nfe = {"dpm-solver": 40, "dpm-solver++": 40, "heun": 100}.get(kwargs["sampler"], 200)
    out = samplers.sample(denoiser, x, nfe=nfe, t_start=start, **kwargs)
    # ddpm's fresh noise makes it a sample of 3,000: three standard errors more
    assert abs(out.mean() - mixture.mean()) < (0.02 + noisy * 3 / n**0.5) * std
    ratio = out.var() / mixture.variance()
    assert abs(ratio - 1) < 0.05 + noisy * 3 * (2 / n) ** 0.5, ratio


@pytest.mark.parametrize("kwargs", [*ALL, HEUN, CHURN], ids=str)
def test_samplers_need_predict_and_schedule_alone(kwargs):
    bare = SimpleNamespace(schedule=LINEAR, predict=toy_denoiser(toy.two_bumps()).predict)
    assert torch.isfinite(samplers.sample(bare, normal(9, 1), nfe=5, **kwargs)).all()


@pytest.mark.parametrize("kwargs", [*ALL, HEUN], ids=str)
def test_a_given_grid_and_the_leading_one_are_where_the_calls_are(kwargs):
    """The length of a given grid counts, whatever nfe is, without a warning. Leading: SA-DPM's and
    DDIM's steps 901, 801, ..., 1, which do not start at T."""
    grid = torch.tensor([900.0, 640.5, 300.0, 120.0, 7.0], dtype=torch.float64)
    denoiser, calls = counted(toy_denoiser(toy.two_bumps()))
    every = grid.tolist() if kwargs != HEUN else grid.repeat_interleave(2)[1:].tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for final in (True, False):
            calls.clear()
            samplers.sample(denoiser, ONE, spacing=grid, denoise_to_zero=final, **kwargs)
            assert calls == every[: len(every) - (not final)]
    calls.clear()
    nfe = 19 if kwargs == HEUN else 10
    samplers.sample(denoiser, ONE, nfe=nfe, spacing="leading", **kwargs)
    assert sorted(set(calls)) == list(range(1, 1000, 100)) and len(calls) == nfe
    with pytest.raises(ValueError, match="--spacing leading takes from 2 to 1000 points, not 1"):
        samplers.sample(denoiser, ONE, nfe=1, spacing="leading", **kwargs)


@pytest.mark.parametrize("kwargs", ALL, ids=str)
def test_more_calls_than_steps_where_no_signal_is_left(kwargs):
    """Between T - 1 and T a zero-terminal table has no signal: steps of no length, still calls."""
    denoiser, calls = counted(toy_denoiser(toy.two_bumps(), ZERO, "v"))
    out = samplers.sample(denoiser, ONE, nfe=1003, **kwargs)
    assert len(calls) == 1003 and torch.isfinite(out).all()


# ------------------------------------------------------------------ Heun's method and EDM


@pytest.mark.parametrize(
    "points, heun, euler",
    [
        (10, 0.6097980007, 0.3652130651),
        (18, 0.5276246370, 0.4230314364),
        (40, 0.5048768645, 0.4648507745),
    ],
)
def test_heun_reference_numbers(points, heun, euler):
    """EDM's sampler on x_0 ~ N(0, 0.25) from x_T = 80: its exact flow scales x like
    √(σ² + 0.25)."""
    denoiser, calls = counted(toy_denoiser(toy.one_gaussian(), EDM))
    exactly(samplers.sample(denoiser, 80 * ONE, "heun", nfe=2 * points - 1).item(), heun)
    assert len(calls) == 2 * points - 1
    exactly(samplers.sample(denoiser, 80 * ONE, "ddim", points).item(), euler)
    got = samplers.sample(denoiser, 80 * ONE, "heun", 199, "logsnr", denoise_to_zero=False).item()
    end = 80 * math.sqrt((0.002**2 + 0.25) / (80**2 + 0.25))
    assert_close(got, end, rtol=2e-3, atol=0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "name, prediction, odd", [("edm", "x0", 1), ("cosine", "eps", 1), ("zero-terminal-snr", "v", 0)]
)
def test_heun_makes_two_calls_a_step(name, prediction, odd, spacing):
    """At both ends of each step, and x_0 at the end: an odd number; an even one (odd = 0) if
    alpha_bar(T) = 0, since the first step is order 1. A call that is left over is not made."""
    schedule = schedules.make_schedule(name)
    cases = [(n, True) for n in (*range(1, 10), 30)] + [(n, False) for n in range(2, 8)]
    for nfe, final in cases:
        denoiser, calls = counted(bounded(schedule, prediction))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            out = samplers.sample(denoiser, ONE, "heun", nfe, spacing, denoise_to_zero=final)
        assert torch.isfinite(out).all()
        left = 0 if nfe == 1 else (nfe - final - 1 + odd) % 2
        grid = schedules.time_grid(schedule, (nfe - left - final + 2 - odd) // 2 + 1, spacing)
        grid = grid[:1] if nfe == 1 else grid
        expected = [t for pair in pairwise(grid.tolist()) for t in pair]
        del expected[1 : 2 - odd]
        assert calls == expected + grid[-1:].tolist() * final
        assert len(calls) == nfe - left and len(caught) == left
        if caught:
            assert f"makes {nfe - 1} of the {nfe} calls" in str(caught[0].message)
            assert caught[0].filename == __file__, "the warning is about the caller's line"


@pytest.mark.parametrize("nfe", [210, 213])
def test_heun_where_several_times_have_no_signal(nfe):
    """Between T - 1 and T a zero-terminal table has none: each step from there costs one call."""
    schedule = schedules.make_schedule("zero-terminal-snr", T=40)
    denoiser, calls = counted(bounded(schedule, "v"))
    out = samplers.sample(denoiser, ONE, "heun", nfe)
    assert nfe - 1 <= len(calls) <= nfe and torch.isfinite(out).all()
    assert calls[0] == 40 and calls[1] > calls[2] > 39 and calls[-1] == 1


def edm_loop(x0_of, x, levels, churn, low, high, scale, draws):
    """EDM's algorithm 2 over noise levels that end in 0, as its paper writes it; noise is taken
    only if some is added."""
    for sigma, after in pairwise(levels):
        gamma = min(churn / (len(levels) - 1), 2**0.5 - 1) if low <= sigma <= high else 0
        risen = sigma * (1 + gamma)
        if gamma:
            x = x + (risen**2 - sigma**2) ** 0.5 * scale * next(draws)
        d = (x - x0_of(x, risen)) / risen
        moved = x + (after - risen) * d
        if after:
            d = d / 2 + (moved - x0_of(moved, after)) / after / 2
            moved = x + (after - risen) * d
        x = moved
    return x


@pytest.mark.parametrize("name", ["edm", "linear-mns", "cosine"])
@pytest.mark.parametrize("churn", [0.0, 4.0, 1000.0])
def test_heun_is_edms_algorithm(name, churn):
    """Against the loop above, with the same noise; other schedules in x/α over σ/α, on their own
    noise levels. At T only edm can go higher: the range of the others leaves T out."""
    schedule, mixture, points = schedules.make_schedule(name, continuous=True), toy.two_bumps(), 18
    times = schedules.time_grid(schedule, points, "logsnr")
    (alpha, sigma), noises = schedule.alpha_sigma(times), normal(points, 5, 1)
    x = samplers.initial_std(schedule) * normal(5, 1, seed=1)
    levels = [*(sigma / alpha).tolist(), 0.0]
    low, high = 0.05, 100.0 if name == "edm" else levels[1] * 1.001

    def x0_of(x, sigma):
        return mixture.posterior(x, 1.0, sigma)[0]

    expected = edm_loop(x0_of, x / alpha[0], levels, churn, low, high, 1.003, iter(noises))
    ours, used = iter(noises), []
    kwargs = dict(s_churn=churn, s_min=low, s_max=high, s_noise=1.003, spacing=times)
    kwargs["noise"] = lambda shape: (used.append(shape), next(ours))[1]
    got = samplers.sample(toy_denoiser(mixture, schedule, "x0"), x, "heun", **kwargs)
    assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert len(used) == bool(churn) * sum(low <= k <= high for k in levels[:-1])


def test_churn_never_leaves_a_table():
    """A table ends at T: from there there is no higher noise level, and none is added."""
    denoiser, calls = counted(toy_denoiser(toy.two_bumps()))
    drawn = []
    noise = lambda shape: (drawn.append(shape), ones(shape))[1]  # noqa: E731
    samplers.sample(denoiser, ONE, "heun", 9, noise=noise, s_churn=2.0)
    assert max(calls) == 1000 and len(drawn) == 4
    denoiser, calls = counted(toy_denoiser(toy.two_bumps(), EDM))
    samplers.sample(denoiser, 80 * ONE, "heun", 9, noise=noise, s_churn=2.0)
    assert_close(EDM.alpha_sigma(calls[0])[1].item(), 80 * 1.4, rtol=1e-12, atol=0)


def test_x_starts_with_the_std_of_its_first_time():
    def starts(schedule, std, **arguments):
        inputs = []
        denoiser = D.Denoiser(lambda x, c: (inputs.append(x), x)[1], schedule, "x0")
        denoiser.space = D.Pixels((1, 4))
        samplers.sample_from_seeds(denoiser, [3, 4], **arguments)
        assert_close(inputs[0], std * samplers.SeededNoise([3, 4])((2, 1, 4)))

    for arguments in (dict(), dict(t_start=400.0), dict(spacing="leading")):
        starts(LINEAR, 1.0, **arguments)
    sigma = {t: EDM.alpha_sigma(t)[1].item() for t in (400, 801, 901)}
    starts(EDM, 80.0)
    starts(EDM, sigma[400], t_start=400.0)
    starts(EDM, 80.0, spacing=torch.tensor([1000.0, 2.0]))
    starts(EDM, sigma[400], spacing=torch.tensor([400.0, 2.0]))
    starts(EDM, sigma[901], spacing="leading", nfe=10)
    starts(EDM, sigma[901], spacing="leading", nfe=9, denoise_to_zero=False)
    starts(EDM, sigma[801], spacing="leading", nfe=9, sampler="heun")


# ------------------------------------------------------------------ the flags


@dataclass
class Flags(samplers.SamplerConfig):
    prog = "program"
    description = "A program with a sampler."


def flags(words):
    """The parsed command line; refused as a program would."""
    return parse_into(Flags, words.split())


def run_of(schedule=LINEAR):
    denoiser = toy_denoiser(toy.two_bumps(), schedule)
    denoiser.space = D.Pixels((1,))
    return denoiser


def test_flags_become_arguments_that_sample_takes():
    first = dict(sampler="ddpm", nfe=50, spacing="uniform", eta=0.0, clip=(-1.0, 1.0))
    churn = "--sampler heun --churn 9 --churn-min 0.05 --churn-noise 1.003"
    for words, expected in {
        "": first,
        "--sampler ddim": dict(sampler="ddim", clip=None, variance=None),
        "--variance large": dict(variance="large", clip=(-1.0, 1.0)),
        "--sampler heun --nfe 20": dict(nfe=19, clip=None),
        "--spacing leading --nfe 20": dict(nfe=20, spacing="leading"),
        churn: dict(nfe=49, s_churn=9.0, s_min=0.05, s_max=math.inf, s_noise=1.003),
    }.items():
        arguments = flags(words).arguments(run_of())
        assert expected.items() <= arguments.items()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the program prints .warnings() once
            samplers.sample_from_seeds(run_of(), [0], **arguments)


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver", "heun"])
def test_remap_spacing_is_the_denoisers_own_grid(sampler):
    """papers.alternatives attaches the function sampling_grid(points, t_start, t_end)."""
    denoiser, config = run_of(), flags(f"--sampler {sampler} --spacing remap --nfe 20")
    with pytest.raises(ValueError, match="^--spacing remap needs a run of --remap"):
        config.arguments(denoiser)
    denoiser.sampling_grid = lambda points, t_start, t_end: (
        torch.linspace(t_start**0.5, t_end**0.5, points, dtype=torch.float64) ** 2
    )
    arguments = config.arguments(denoiser)
    points = 10 if sampler == "heun" else 20
    assert_close(arguments["spacing"], schedules.time_grid(LINEAR, points, "quadratic"))
    assert len(config.warnings(denoiser)) == (sampler == "heun")
    spy, calls = counted(denoiser)
    samplers.sample_from_seeds(spy, [0], **arguments)
    assert len(calls) == arguments["nfe"]


@pytest.mark.parametrize("kind", samplers.ESTIMATED)
def test_estimated_variances_come_from_the_run(kind, monkeypatch):
    asked = []
    give = lambda run, *how: (asked.append(how), lambda x, t, t_next: 0.01)[1]  # noqa: E731
    module = SimpleNamespace(variance_from_run=give)
    monkeypatch.setitem(sys.modules, "papers.covariance", module)
    for words in ("", "--sampler ddim", "--sampler ddim --eta 0.5"):
        arguments = flags(f"{words} --nfe 3 --variance {kind}").arguments(run_of())
        assert arguments["clip"] == (-1.0, 1.0), "they add noise"
        samplers.sample_from_seeds(run_of(), [0], **arguments)
    assert asked == [(kind, True, 0.0), (kind, False, 0.0), (kind, False, 0.5)]
    with pytest.raises(ValueError, match=f"^--variance {kind}: give a function"):
        samplers.sample(run_of(), torch.zeros(1, 1), "ddpm", variance=kind)


def test_clip_is_the_value_range():
    for value_range in ((-1.0, 1.0), (0.0, 2.0), None):
        denoiser = SimpleNamespace(value_range=value_range, schedule=LINEAR)
        for words, clip in {
            "": True,
            "--sampler ddim --eta 1": True,
            "--sampler ddim": False,
            "--sampler ddim --variance small": False,  # no fresh noise: as without the flag
        }.items():
            assert flags(words).arguments(denoiser)["clip"] == (value_range if clip else None)
            assert flags(f"{words} --clip off").arguments(denoiser)["clip"] is None
        if value_range:
            assert flags("--sampler ddim --clip on").arguments(denoiser)["clip"] == value_range
    with pytest.raises(ValueError, match="--clip on: latents have no range"):
        flags("--clip on").arguments(denoiser)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--nfe 100001", "--nfe must be from 1 to 100000"),
        ("--eta 1.5", "--eta must be from 0 to 1, not 1.5"),
        ("--eta nan", "--eta must be from 0 to 1, not nan"),
        ("--sampler ddpm --churn-min 5", "--churn-min has no effect on ddpm"),
        ("--sampler heun --churn-max 5", "--churn-max has no effect without --churn above 0"),
        ("--sampler heun --churn 0", "--churn has no effect without --churn above 0"),
        ("--sampler heun --churn -1", "--churn must be from 0"),
        ("--sampler heun --churn 1 --churn-min 3 --churn-max 1", "--churn-max must be from 3"),
        ("--sampler heun --eta 1", "--eta has no effect on heun"),
        ("--sampler ddpm --eta 0", "--eta has no effect on ddpm"),
        ("--sampler heun --order 3", "--order has no effect on heun"),
        ("--sampler heun --variance sn", "--variance has no effect on heun"),
        ("--sampler dpm-solver --variance small", "--variance has no effect on dpm-solver"),
    ],
)
def test_refusals_begin_with_their_flag(words, message):
    with pytest.raises(ValueError) as error:
        flags(words)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


# ------------------------------------------------------------------ seeds and refusals


def test_one_seed_is_one_noise_whatever_the_batch():
    whole = samplers.SeededNoise(range(5))
    draws = [whole((5, 3, 4, 4)) for _ in range(2)]
    assert not torch.equal(*draws), "the second draw is fresh"
    for i in range(5):
        one = samplers.SeededNoise([i])
        for draw in draws:
            assert torch.equal(one((1, 3, 4, 4))[0], draw[i])
    with pytest.raises(ValueError, match="3 images, but 5 seeds"):
        whole((3, 1))


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(sampler="euler"), "--sampler must be one of ddpm ddim"),
        (dict(nfe=2.5), "--nfe must be from 1 to 100000, not 2.5"),
        (dict(order=4), "--order must be from 1 to 3, not 4"),
        (dict(variance="large"), "--variance has no effect on ddim"),
        (dict(variance="tiny"), "--variance 'tiny': use small, large or a function"),
        (dict(sampler="dpm-solver", eta=0.5), "--eta has no effect on dpm-solver"),
        (dict(sampler="dpm-solver", variance=max), "--variance has no effect on dpm-solver"),
        (dict(s_churn=1.0), "--churn has no effect on ddim"),
        (dict(sampler="heun", s_churn=-1.0), "--churn must be from 0"),
        (dict(sampler="heun", s_churn=1.0, s_min=3.0, s_max=1.0), "--churn-max must be from 3"),
        (dict(sampler="heun", nfe=1, denoise_to_zero=False), "nfe 1 is too small for heun"),
        (dict(nfe=1, spacing="karras"), "unknown spacing"),
        (dict(nfe=1, sampler="dpm-solver", t_end=-3), "times must satisfy"),
        (dict(spacing=torch.tensor([1500.0, 5.0])), r"must fall strictly and lie in \(0, 1000\]"),
        (dict(spacing=torch.tensor([15.0, 0.0])), r"must fall strictly and lie in \(0, 1000\]"),
        (dict(spacing=torch.tensor([3.0, 5.0])), "must fall strictly"),
        (dict(t_end=0.0), "times must satisfy"),
    ],
)
def test_refusals(kwargs, words):
    with pytest.raises(ValueError, match=words):
        samplers.sample(toy_denoiser(toy.one_gaussian()), ONE, **kwargs)


def test_eps_at_no_signal_is_refused():
    """eps-prediction has no x_0 there: it starts a step lower."""
    for schedule, prediction, start in (
        (ZERO, "eps", 999),
        (ZERO, "v", 1000),
        (LINEAR, "eps", 1000),
    ):
        assert samplers.initial_time(D.Denoiser(None, schedule, prediction)) == start
    denoiser = toy_denoiser(toy.one_gaussian(), ZERO)
    with pytest.raises(ValueError, match="eps-prediction has no x_0 at t = 1000"):
        samplers.sample(denoiser, ONE)
    assert torch.isfinite(samplers.sample(denoiser, ONE, t_start=999)).all()
