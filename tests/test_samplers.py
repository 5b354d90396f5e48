"""samplers.py on the toy mixture, whose ideal network is known, and against reference numbers."""

import argparse
import functools
import itertools
import math
import warnings

import covariance
import pytest
import torch
from torch.testing import assert_close

import denoiser as D
import etsdm
import samplers
import sampling
import schedules
import toy

# Half of the numbers of calls below are not to be spent by heun: what it says is tested once.
pytestmark = pytest.mark.filterwarnings("ignore:heun's steps cost two calls")

LINEAR = schedules.make_schedule("linear")
SPACINGS = ["uniform", "quadratic", "logsnr"]
ALL = [
    dict(sampler="ddpm"),
    dict(sampler="ddpm", variance="large"),
    dict(sampler="ddim"),
    dict(sampler="ddim", eta=0.5),
    dict(sampler="dpm-solver", order=1),
    dict(sampler="dpm-solver", order=2),
    dict(sampler="dpm-solver", order=3),
    dict(sampler="dpm-solver++"),
]
HEUN = dict(sampler="heun")
EDM = schedules.make_schedule("edm")


def toy_denoiser(mixture, schedule=LINEAR, prediction="eps", shared=False):
    times = toy.shared_times(100, 5, schedule.continuous) if shared else None
    make = edm_oracle if prediction == "edm" else toy.oracle
    return D.Denoiser(
        make(mixture, schedule, prediction, times),
        schedule,
        prediction,
        etsdm.make_condition(etsdm=shared),
    )


def edm_oracle(mixture, schedule, prediction, times):
    """The ideal F of EDM's preconditioning: shown x/r and told ln(sigma)/4."""

    def net(seen, c):
        t = schedule.t_of_lam(-4 * c.double())
        if times is not None:  # told a boundary, 1 for the first: name it exactly
            t = torch.where(t < 99, (t / 20).round() * 20, t)
        answers = []
        for time in [t] if times is None else times(t):
            a, s = (toy.like(k, seen) for k in schedule.coefficients(time))
            r = (s**2 + a**2 * 0.5**2).sqrt()
            x0 = mixture.posterior(seen * r, a, s)[0]
            skip = a * 0.5**2 / r
            answers.append((x0 - skip * seen) * r / (s * 0.5))
        return torch.stack(answers).mean(0)

    return net


def counted(denoiser):
    """(denoiser, list): the list receives the time of every network call."""
    calls, net = [], denoiser.net
    denoiser.net = lambda x, c: (calls.append(c[0].item()), net(x, c))[1]
    return denoiser, calls


ONE = torch.ones(1, 1, dtype=torch.float64)
# The authors' solver in float64: x_0 ~ N(0, 0.25), x_T = 1, t from 1000 to 1, in 10 and 12 steps.
GOLDEN = [
    (dict(sampler="dpm-solver", order=1, spacing="logsnr"), 0.3928415927, 0.4089247057),
    (dict(sampler="dpm-solver", order=1, spacing="uniform"), 0.3743365386, 0.3936437627),
    (dict(sampler="dpm-solver", order=2, spacing="logsnr"), 0.6375051560, 0.6065632703),
    (dict(sampler="dpm-solver", order=3, spacing="logsnr"), 0.5173934719, 0.5674205291),
    (dict(sampler="dpm-solver", order=3, spacing="uniform"), 0.4181992805, 0.4619463394),
    (dict(sampler="dpm-solver", order=3, spacing="quadratic"), 0.5100068633, 0.5221685951),
    (dict(sampler="dpm-solver++", spacing="logsnr"), 0.5166374092, 0.5144655654),
]


@pytest.mark.parametrize("kwargs, ten, twelve", GOLDEN)
@pytest.mark.parametrize("prediction", D.PREDICTIONS)
def test_dpm_solver_reference_numbers(kwargs, ten, twelve, prediction):
    denoiser = toy_denoiser(toy.one_gaussian(), prediction=prediction)
    for nfe, expected in ((10, ten), (12, twelve)):
        got = samplers.sample(denoiser, ONE, nfe=nfe, final_denoise=False, **kwargs).item()
        assert_close(got, expected, rtol=0, atol=1e-8)


def test_2m_ends_in_order_1_below_ten_steps():
    denoiser = toy_denoiser(toy.one_gaussian())
    got = samplers.sample(denoiser, ONE, "dpm-solver++", 9, "logsnr", final_denoise=False).item()
    assert_close(got, 0.5079454981, rtol=0, atol=1e-8)


def test_denoise_to_zero_reference_number_and_call_times():
    denoiser, calls = counted(toy_denoiser(toy.one_gaussian()))
    got = samplers.sample(denoiser, ONE, "dpm-solver", 11, "logsnr").item()
    assert_close(got, 0.5172124379, rtol=0, atol=1e-8)
    labels = torch.tensor(
        [
            999,
            915.848498,
            824.361112,
            721.563661,
            602.765122,
            462.027672,
            302.307847,
            160.134728,
            72.796112,
            30.144004,
            0,
        ],
        dtype=torch.float64,
    )
    assert_close(torch.tensor(calls, dtype=torch.float64) - 1, labels, rtol=0, atol=1e-6)


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
    got = samplers.sample(
        toy_denoiser(toy.one_gaussian()), ONE, nfe=len(grid), spacing=times
    ).item()
    assert_close(got, expected, rtol=0, atol=1e-8)


def test_singlestep_plan_of_the_authors():
    grid = [schedules.time_grid(LINEAR, n + 1, "logsnr") for n in (10, 12)]
    times, orders = samplers.singlestep_plan(LINEAR, grid[0], 3, equal=True)
    assert orders == [3, 3, 3, 1]
    outer = times[[0, 3, 6, 9, 10]] / 1000
    assert_close(
        outer, torch.tensor([1, 0.722564, 0.303308, 0.031144, 0.001]).double(), rtol=0, atol=1e-6
    )
    times, orders = samplers.singlestep_plan(LINEAR, grid[1], 3, equal=True)
    assert orders == [3, 3, 3, 2, 1]
    outer = times[[0, 3, 6, 9, 11, 12]] / 1000
    assert_close(
        outer,
        torch.tensor([1, 0.785817, 0.493114, 0.13904, 0.017803, 0.001]).double(),
        rtol=0,
        atol=1e-6,
    )
    assert samplers.split_into_orders(3, 3) == [2, 1]
    assert samplers.split_into_orders(9, 2) == [2, 2, 2, 2, 1]
    assert all(sum(samplers.split_into_orders(n, o)) == n for n in range(60) for o in (1, 2, 3))


@pytest.mark.parametrize("kwargs", ALL, ids=str)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_exactly_nfe_calls_and_finite(kwargs, spacing):
    """Every NFE from 1 to 50, and T; schedules with and without signal at T; from T down to
    t_end."""
    net = lambda x, c: 0.4 * x  # noqa: E731  (any bounded answer: what is counted is calls)
    for schedule, prediction in (
        (LINEAR, "eps"),
        (schedules.make_schedule("zero-terminal-snr"), "v"),
        (schedules.make_schedule("cosine", continuous=True), "x0"),
    ):
        for nfe, final_denoise in (
            *((n, True) for n in (*range(1, 51), *[1000] * (schedule is LINEAR))),
            *((n, False) for n in (1, 2, 3, 5, 9, 10, 13, 50)),
        ):
            denoiser, calls = counted(D.Denoiser(net, schedule, prediction))
            x = torch.ones(2, 1, dtype=torch.float64)
            x = samplers.sample(
                denoiser, x, nfe=nfe, spacing=spacing, final_denoise=final_denoise, **kwargs
            )
            assert len(calls) == nfe and torch.isfinite(x).all(), (nfe, schedule.name)
            assert calls[0] == 1000 and min(calls) >= 1
            assert all(s > t for s, t in zip(calls, calls[1:], strict=False)), "times fall"
            if final_denoise and nfe > 1:
                assert calls[-1] == 1


@pytest.mark.parametrize("schedule", [LINEAR, EDM], ids=["linear", "edm"])
@pytest.mark.parametrize("kwargs", [*ALL, HEUN, dict(HEUN, churn=5.0)], ids=str)
def test_an_oracle_of_one_image_gives_it_back_exactly(kwargs, schedule):
    """If eps is exactly the noise of one x_0, every sampler must end on that x_0 (no noise of std
    0.01)."""
    x0 = torch.linspace(-0.9, 0.9, 12, dtype=torch.float64).reshape(1, 12)

    def net(x, c):
        a, s = schedule.coefficients(c[0].item())
        return (x - a * x0) / s

    for nfe in (1, 2, 3, 7, 13, 21, 40):
        x = schedule.prior_std * torch.randn(1, 12, dtype=torch.float64)
        out = samplers.sample(D.Denoiser(net, schedule), x, nfe=nfe, **kwargs)
        assert_close(out, x0, rtol=1e-9, atol=1e-9)


@functools.cache
def exact_flow(end):
    """The probability-flow ODE of the two bumps from x_T to t = end, by scipy at 1e-12 (an
    independent solver)."""
    from scipy.integrate import solve_ivp

    schedule = schedules.make_schedule("linear", continuous=True)
    denoiser = toy_denoiser(toy.two_bumps(), schedule)
    start, stop = float(schedule.lam(1000)), float(schedule.lam(end))

    def slope(lam, y):  # y = x/a moves along d y = eps d(s/a), s/a = e^-lam
        t = float(schedule.t_of_lam(lam))
        a = float(schedule.coefficients(t)[0])
        eps = denoiser.predict(torch.tensor(y * a)[:, None], t)[1][:, 0].numpy()
        return -math.exp(-lam) * eps

    x = torch.tensor([-1.3, -0.2, 0.4, 1.1], dtype=torch.float64)
    a0, a1 = (float(schedule.coefficients(t)[0]) for t in (1000, end))
    y = solve_ivp(
        slope, (start, stop), (x / a0).numpy(), rtol=1e-11, atol=1e-12, method="DOP853"
    ).y[:, -1]
    return denoiser, x[:, None], torch.tensor(y * a1)[:, None]


@pytest.mark.parametrize(
    "kwargs, order, nfes",
    [
        (dict(sampler="ddim", spacing="logsnr"), 1, (64, 128, 256, 512)),
        (dict(sampler="dpm-solver", order=1, spacing="logsnr"), 1, (64, 128, 256, 512)),
        (dict(sampler="dpm-solver", order=2, spacing="logsnr"), 2, (64, 128, 256, 512)),
        (
            dict(sampler="dpm-solver", order=3, spacing="logsnr"),
            3,
            (62, 125, 248, 500),
        ),  # = 2 (mod 3)
        (dict(sampler="dpm-solver++", spacing="logsnr"), 2, (64, 128, 256, 512)),
        (dict(sampler="heun", spacing="logsnr"), 2, (64, 128, 256, 512)),
    ],
    ids=str,
)
def test_convergence_orders(kwargs, order, nfes):
    """Error against nfe on log-log axes falls with the solver's order; fitted slope over three
    halvings."""
    denoiser, x, exact = exact_flow(1.0)
    errors = torch.tensor(
        [
            (samplers.sample(denoiser, x, nfe=n, final_denoise=False, **kwargs) - exact).abs().max()
            for n in nfes
        ],
        dtype=torch.float64,
    )
    logs = torch.tensor(nfes, dtype=torch.float64).log()
    logs = logs - logs.mean()
    slope = -(logs @ errors.log() / (logs @ logs)).item()
    print(f"\n{kwargs}: errors {[f'{e:.2e}' for e in errors]}, slope {slope:.2f}")
    assert abs(slope - order) < 0.25


def test_order_one_is_ddim():
    denoiser = toy_denoiser(toy.two_bumps())
    x = torch.randn(5, 1, dtype=torch.float64)
    for spacing in SPACINGS:
        one = samplers.sample(denoiser, x, "dpm-solver", 12, spacing, order=1, final_denoise=False)
        ddim = samplers.sample(denoiser, x, "ddim", 12, spacing, final_denoise=False)
        assert_close(one, ddim, rtol=1e-12, atol=1e-12)


def test_ddpm_is_the_posterior_written_out():
    """One ancestral step against mu_tilde and beta_tilde as DDPM prints them."""
    mixture, nfe = toy.two_bumps((3,)), 1000
    denoiser = toy_denoiser(mixture)
    x = torch.randn(4, 3, dtype=torch.float64)
    z = torch.randn(4, 3, dtype=torch.float64)
    ab = LINEAR.alpha_bar(torch.arange(1001))
    beta = 1 - ab[1000] / ab[999]
    x0 = mixture.posterior(x, ab[1000].sqrt(), (1 - ab[1000]).sqrt())[0]
    mean = (ab[999].sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - ab[999]) * x) / (1 - ab[1000])
    seen = []
    spy = D.Denoiser(lambda x, c: (seen.append(x), denoiser.net(x, c))[1], LINEAR)
    for variance, std in (
        ("small", (beta * (1 - ab[999]) / (1 - ab[1000])).sqrt()),
        ("large", beta.sqrt()),
    ):
        seen.clear()
        samplers.sample(spy, x, "ddpm", nfe, noise=lambda shape: z, variance=variance)
        assert_close(seen[1], mean + std * z, rtol=1e-9, atol=1e-9)


def test_clipping_keeps_the_pair_consistent():
    """The clipped x0 gives DDPM's mean with that x0, and nothing leaves the range at the end."""
    wild = D.Denoiser(lambda x, c: -x, LINEAR)  # asks for x_0 far outside
    x = torch.randn(8, 4, dtype=torch.float64)
    assert samplers.sample(wild, x, nfe=10).abs().max() > 1
    for kwargs in (*ALL, HEUN):
        out = samplers.sample(wild, x, nfe=10, clip=(-1.0, 1.0), **kwargs)
        assert out.abs().max() <= 1
    x0, eps = samplers.predict(wild, x, 300, (-1.0, 1.0))
    a, s = LINEAR.coefficients(300)
    assert_close(a * x0 + s * eps, x, rtol=1e-12, atol=1e-12)


def test_variance_as_a_function():
    """A callable sees x_t and both times; its number replaces the spread of the step, not its
    mean."""
    denoiser, asked = toy_denoiser(toy.one_gaussian()), []

    def variance(x, t, t_next):
        asked.append((t, t_next))
        return torch.tensor(0.04, dtype=torch.float64)

    ones = functools.partial(torch.ones, dtype=torch.float64)
    x = torch.zeros(1, 1, dtype=torch.float64)
    out = samplers.sample(
        denoiser, x, "ddpm", spacing=torch.tensor([1000.0, 500.0]), noise=ones, variance=variance
    )
    assert asked == [(1000.0, 500.0)]  # the step onto 0 adds no noise and asks nobody
    a, s = LINEAR.coefficients(500)
    expected = toy.one_gaussian().posterior(torch.full((1, 1), 0.2, dtype=torch.float64), a, s)[0]
    assert_close(out, expected, rtol=1e-9, atol=1e-12)


def test_the_last_step_adds_no_noise():
    shapes = []

    def noise(shape):
        shapes.append(shape)
        return torch.randn(shape, dtype=torch.float64)

    for nfe in (1, 2, 9):
        shapes.clear()
        samplers.sample(
            toy_denoiser(toy.two_bumps()), torch.randn(3, 1).double(), "ddpm", nfe, noise=noise
        )
        assert len(shapes) == nfe - 1


def test_x_keeps_its_precision_and_is_not_changed():
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(3, 1, dtype=dtype)
        before = x.clone()
        for kwargs in (*ALL, HEUN, dict(HEUN, churn=5.0)):
            assert samplers.sample(toy_denoiser(toy.two_bumps()), x, nfe=5, **kwargs).dtype == dtype
        assert_close(x, before, rtol=0, atol=0)


# ------------------------------------------------------------------ the whole product

QUICK, CHURNED = dict(sampler="ddim"), dict(churn=10.0, churn_range=(0.01, 50.0))
FAST = [dict(sampler=s, spacing="logsnr") for s in ("dpm-solver", "dpm-solver++", "heun")]
PRODUCT = [
    pytest.param(
        *(name, continuous, prediction, shared, kwargs),
        marks=[pytest.mark.slow]
        * (kwargs != QUICK or (prediction == "edm" and name not in ("linear", "edm"))),
        id=f"{kwargs['sampler']}{'-churned' * ('churn' in kwargs)}-{name}-"
        f"{'continuous' if continuous else 'discrete'}-{prediction}{'-shared' * shared}",
    )
    for kwargs in (QUICK, *FAST, dict(FAST[2], **CHURNED), dict(sampler="ddpm"))
    for name in schedules.NAMES
    for continuous in ((True,) if name == "edm" else (False, True))
    for prediction in D.PREDICTIONS
    for shared in (False, True)
    if "churn" not in kwargs or name in ("linear", "edm")  # the others add noise the same way
]


@pytest.mark.parametrize("name, continuous, prediction, shared, kwargs", PRODUCT)
def test_moments_over_the_whole_product(name, continuous, prediction, shared, kwargs):
    """Any schedule x prediction x sharing (x sampler): the sampled mean and variance are right."""
    schedule = schedules.make_schedule(name, continuous=continuous)
    mixture = toy.two_bumps()
    denoiser = toy_denoiser(mixture, schedule, prediction, shared)
    start = samplers.start_time(denoiser)
    std = mixture.variance().sqrt()
    a, s = (float(c) for c in schedule.coefficients(start))  # some schedules leave signal at T
    noisy = kwargs["sampler"] == "ddpm" or "churn" in kwargs
    n = 3000 if noisy else 200
    # An even sample of x_T: its image under a noise-free sampler carries no luck.
    x = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)[:, None]
    x = a * mixture.mean() + (a**2 * mixture.variance() + s**2).sqrt() * x
    g = torch.Generator().manual_seed(0)
    if noisy:
        kwargs = dict(kwargs, noise=lambda shape: torch.randn(shape, dtype=x.dtype, generator=g))
    out = samplers.sample(denoiser, x, nfe=200, t_start=start, **kwargs)
    # ddpm's fresh noise makes it a sample of 3,000: three standard errors more
    assert abs(out.mean() - mixture.mean()) < (0.02 + noisy * 3 / n**0.5) * std
    ratio = out.var() / mixture.variance()
    assert abs(ratio - 1) < 0.05 + noisy * 3 * (2 / n) ** 0.5, ratio


@pytest.mark.parametrize("remap", etsdm.REMAPS)
def test_remapped_conditions_sample_the_same(remap):
    """A network that is told f(t), and knows it, samples as one that is told t."""
    mixture, x = toy.two_bumps(), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    net = toy.oracle(mixture, LINEAR, times=lambda c: [etsdm.unremap(c, remap)])
    told = D.Denoiser(net, LINEAR, condition=etsdm.make_condition(remap_name=remap))
    for kwargs in (dict(sampler="ddim"), dict(sampler="dpm-solver"), dict(sampler="dpm-solver++")):
        expected = samplers.sample(toy_denoiser(mixture), x, nfe=20, **kwargs)
        assert_close(samplers.sample(told, x, nfe=20, **kwargs), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kwargs", [*ALL, HEUN, dict(HEUN, churn=5.0)], ids=str)
def test_samplers_need_predict_and_schedule_alone(kwargs):
    class Bare:
        schedule = LINEAR
        predict = staticmethod(toy_denoiser(toy.two_bumps()).predict)

    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    assert torch.isfinite(samplers.sample(Bare, x, nfe=5, **kwargs)).all()


@pytest.mark.parametrize("kwargs", ALL, ids=str)
@pytest.mark.parametrize("final_denoise", [True, False])
def test_a_given_grid_is_where_the_calls_are(kwargs, final_denoise):
    grid = torch.tensor([900.0, 640.5, 300.0, 120.0, 7.0], dtype=torch.float64)
    denoiser, calls = counted(toy_denoiser(toy.two_bumps()))
    samplers.sample(denoiser, ONE, spacing=grid, final_denoise=final_denoise, **kwargs)
    assert calls == grid.tolist()[: 5 if final_denoise else 4]


@pytest.mark.parametrize("kwargs", ALL, ids=str)
@pytest.mark.parametrize("nfe", [1000, 1003])
def test_more_calls_than_steps_where_no_signal_is_left(kwargs, nfe):
    """Between T - 1 and T a zero-terminal table has no signal: steps of no length, still calls."""
    denoiser, calls = counted(
        toy_denoiser(toy.two_bumps(), schedules.make_schedule("zero-terminal-snr"), "v")
    )
    out = samplers.sample(denoiser, ONE, nfe=nfe, **kwargs)
    assert len(calls) == nfe and torch.isfinite(out).all()


def test_small_is_what_ddim_does_anyway():
    denoiser, ones = (
        toy_denoiser(toy.two_bumps()),
        functools.partial(torch.ones, dtype=torch.float64),
    )
    outs = [
        samplers.sample(denoiser, ONE, nfe=6, eta=0.7, noise=ones, variance=v)
        for v in (None, "small")
    ]
    assert_close(outs[0], outs[1], rtol=0, atol=0)


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
    got = samplers.sample(denoiser, 80 * ONE, "heun", nfe=2 * points - 1).item()
    assert_close(got, heun, rtol=0, atol=1e-9)
    assert len(calls) == 2 * points - 1
    got = samplers.sample(denoiser, 80 * ONE, "ddim", points).item()
    assert_close(got, euler, rtol=0, atol=1e-9)
    exact = 80 * 0.5 / math.sqrt(80**2 + 0.25)
    assert_close(exact, 0.4999902347, rtol=0, atol=1e-10)
    got = samplers.sample(denoiser, 80 * ONE, "heun", 199, "logsnr", final_denoise=False).item()
    end = 80 * math.sqrt((0.002**2 + 0.25) / (80**2 + 0.25))
    assert_close(got, end, rtol=2e-3, atol=0)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    "name, prediction, odd", [("edm", "x0", 1), ("cosine", "eps", 1), ("zero-terminal-snr", "v", 0)]
)
def test_heun_makes_two_calls_a_step(name, prediction, odd, spacing):
    """At both ends of each step, and x_0 at the end: an odd number; an even one (odd = 0) where
    alpha_bar(T) = 0, since the first step is order 1. A call that is left over is not made."""
    schedule = schedules.make_schedule(name)
    for nfe, final in (
        *((n, True) for n in (*range(1, 10), 30)),
        *((n, False) for n in range(2, 8)),
    ):
        denoiser, calls = counted(D.Denoiser(lambda x, c: 0.4 * x, schedule, prediction))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out = samplers.sample(denoiser, ONE, "heun", nfe, spacing, final_denoise=final)
        assert torch.isfinite(out).all()
        left = 0 if nfe == 1 else (nfe - final - 1 + odd) % 2
        grid = schedules.time_grid(schedule, (nfe - left - final + 2 - odd) // 2 + 1, spacing)
        grid = grid[:1] if nfe == 1 else grid
        expected = [t for pair in itertools.pairwise(grid.tolist()) for t in pair]
        del expected[1 : 2 - odd]
        assert calls == expected + grid[-1:].tolist() * final
        assert len(calls) == nfe - left and len(said) == left
        if said:
            assert f"makes {nfe - 1} of the {nfe}" in str(said[0].message)
            assert said[0].filename == __file__, "and it is the caller who is told"


def test_heun_on_a_given_grid():
    """Its length decides, whatever nfe is, and nothing is to be said."""
    grid = torch.tensor([900.0, 640.5, 300.0, 7.0], dtype=torch.float64)
    denoiser, calls = counted(toy_denoiser(toy.two_bumps()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        samplers.sample(denoiser, ONE, "heun", nfe=50, spacing=grid)
    assert calls == [900.0, 640.5, 640.5, 300.0, 300.0, 7.0, 7.0]
    assert samplers.heun_calls(LINEAR, grid) == 7


@pytest.mark.parametrize("nfe", [210, 213])
def test_heun_where_several_times_have_no_signal(nfe):
    """Between T - 1 and T a zero-terminal table has none: each step from there costs one call."""
    schedule = schedules.make_schedule("zero-terminal-snr", T=40)
    denoiser, calls = counted(D.Denoiser(lambda x, c: 0.4 * x, schedule, "v"))
    out = samplers.sample(denoiser, ONE, "heun", nfe)
    assert nfe - 1 <= len(calls) <= nfe and torch.isfinite(out).all()
    assert calls[0] == 40 and calls[1] > calls[2] > 39 and calls[-1] == 1


def edm_loop(x0_of, x, levels, churn, low, high, scale, draws):
    """EDM's algorithm 2 over noise levels that end in 0, as its paper writes it; noise is taken
    where some is added."""
    n = len(levels) - 1
    for i in range(n):
        sigma, after = levels[i], levels[i + 1]
        gamma = min(churn / n, 2**0.5 - 1) if low <= sigma <= high else 0
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
    """Against the loop above, with the same noise; other schedules in x/a over s/a, on their own
    noise levels. Where the range reaches T only edm can go higher: the others leave T out."""
    schedule, mixture, points = schedules.make_schedule(name, continuous=True), toy.two_bumps(), 18
    times = schedules.time_grid(schedule, points, "logsnr")
    (a, s), g = schedule.coefficients(times), torch.Generator().manual_seed(0)
    noises = torch.randn((points, 5, 1), dtype=torch.float64, generator=g)
    x = schedule.prior_std * torch.randn((5, 1), dtype=torch.float64, generator=g)
    levels = [*(s / a).tolist(), 0.0]
    low, high = 0.05, 100.0 if name == "edm" else levels[1] * 1.001

    def x0_of(x, sigma):
        return mixture.posterior(x, 1.0, sigma)[0]

    draws, used = iter(noises), []
    expected = edm_loop(x0_of, x / a[0], levels, churn, low, high, 1.003, draws)
    ours = iter(noises)
    got = samplers.sample(
        toy_denoiser(mixture, schedule, "x0"),
        x,
        "heun",
        spacing=times,
        noise=lambda shape: (used.append(shape), next(ours))[1],
        churn=churn,
        churn_range=(low, high),
        churn_noise=1.003,
    )
    assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert len(used) == bool(churn) * sum(low <= k <= high for k in levels[:-1])


@pytest.mark.parametrize("schedule", [EDM, LINEAR], ids=["edm", "linear"])
def test_churn_keeps_the_distribution(schedule):
    """Noise is added and taken off again: mean and variance stay those of the data."""
    mixture, n = toy.two_bumps(), 3000
    g = torch.Generator().manual_seed(0)
    noise = lambda shape: torch.randn(shape, dtype=torch.float64, generator=g)  # noqa: E731
    a, s = schedule.coefficients(1000)
    x = a * mixture.sample(n, g) + s * noise((n, 1))
    denoiser = toy_denoiser(mixture, schedule)
    out = samplers.sample(denoiser, x, "heun", 99, "logsnr", noise=noise, churn=15.0)
    std = mixture.variance().sqrt()
    assert abs(out.mean() - mixture.mean()) < 3 / n**0.5 * std
    assert abs(out.var() / std**2 - 1) < 0.03 + 3 * (2 / n) ** 0.5
    again = samplers.sample(denoiser, x, "heun", 99, "logsnr")
    assert (out - again).std() > 0.5 * std, "and much of x_T is forgotten"


def test_churn_never_leaves_a_table():
    """A table ends at T: from there there is no higher noise level, and none is added."""
    denoiser, calls = counted(toy_denoiser(toy.two_bumps()))
    drawn = []
    noise = lambda shape: (drawn.append(shape), torch.ones(shape).double())[1]  # noqa: E731
    samplers.sample(denoiser, ONE, "heun", 9, noise=noise, churn=2.0)
    assert max(calls) == 1000 and len(drawn) == 4
    denoiser, calls = counted(toy_denoiser(toy.two_bumps(), EDM))
    samplers.sample(denoiser, 80 * ONE, "heun", 9, noise=noise, churn=2.0)
    assert_close(EDM.coefficients(calls[0])[1].item(), 80 * 1.4, rtol=1e-12, atol=0)


def test_starting_noise_is_as_wide_as_the_schedule_says():
    seen = []
    for schedule, start, std in (
        (LINEAR, None, 1.0),
        (LINEAR, 400.0, 1.0),
        (EDM, None, 80.0),
        (EDM, 1000, 80.0),
        (EDM, 400.0, EDM.coefficients(400.0)[1].item()),
    ):
        denoiser = D.Denoiser(lambda x, c: (seen.append(x), x)[1], schedule, "x0")
        for arguments in (
            dict(nfe=1, t_start=start),
            dict(spacing=torch.tensor([start or 1000.0, 2.0]), nfe=2),
        ):
            seen.clear()
            samplers.from_seeds(denoiser, [3, 4], (1, 4), **arguments)
            assert_close(seen[0], std * samplers.SeededNoise([3, 4])((2, 1, 4)))


# ------------------------------------------------------------------ the programs' flags


def flags(*words):
    """The parsed command line; refused as a program would."""
    parser = argparse.ArgumentParser()
    sampling.add_flags(parser)
    args = parser.parse_args(words)
    sampling.check_flags(args)
    return args


def run_of(schedule=LINEAR, **settings):
    denoiser = toy_denoiser(toy.two_bumps(), schedule)
    denoiser.settings = dict(remap=None) | settings
    return denoiser


def test_flags_become_arguments_that_sample_takes():
    denoiser = run_of()
    for words, expected in (
        ([], dict(sampler="ddim", nfe=50, spacing="uniform", eta=0.0, clip=None, variance=None)),
        (["--sampler", "ddpm", "--variance", "large"], dict(variance="large", clip=(-1.0, 1.0))),
        (["--sampler", "heun", "--nfe", "20"], dict(nfe=19, clip=None)),
        (
            ["--sampler", "heun", "--churn", "9", "--churn-min", "0.05", "--churn-noise", "1.003"],
            dict(nfe=49, churn=9.0, churn_range=(0.05, math.inf), churn_noise=1.003),
        ),
    ):
        arguments = sampling.from_flags(flags(*words), denoiser)
        assert expected.items() <= arguments.items()
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # what heun cannot spend is said once, by notes()
            samplers.from_seeds(denoiser, [0], (1,), **arguments)
    (line,) = sampling.notes(flags("--sampler", "heun", "--nfe", "20"), denoiser)
    assert line.startswith("heun's steps cost two calls each: it makes 19 of the 20")
    assert sampling.notes(flags("--sampler", "heun", "--nfe", "19"), denoiser) == []
    assert sampling.notes(flags("--nfe", "20"), denoiser) == []


@pytest.mark.parametrize("sampler", ["ddim", "dpm-solver", "heun"])
@pytest.mark.parametrize("name", etsdm.REMAPS)
def test_remap_spacing_is_even_in_what_the_network_is_told(name, sampler):
    denoiser = run_of(remap=name)
    words = ["--sampler", sampler, "--spacing", "remap", "--nfe", "20"]
    arguments = sampling.from_flags(flags(*words), denoiser)
    grid = arguments["spacing"]
    assert grid.dtype == torch.float64 and len(grid) == (10 if sampler == "heun" else 20)
    assert grid[0] == 1000 and grid[-1] == 1
    steps = etsdm.remap(grid, name).diff()
    assert_close(steps, steps.mean().expand_as(steps), rtol=1e-9, atol=0)
    if name == "sqrt":
        same = schedules.time_grid(LINEAR, len(grid), "quadratic")
        assert_close(grid, same, rtol=1e-12, atol=0)
    assert len(sampling.notes(flags(*words), denoiser)) == (sampler == "heun")
    denoiser, calls = counted(denoiser)
    samplers.from_seeds(denoiser, [0], (1,), **arguments)
    assert len(calls) == arguments["nfe"]
    with pytest.raises(ValueError, match="--spacing remap is for runs trained with --remap"):
        sampling.from_flags(flags(*words), run_of())


@pytest.mark.parametrize("kind", covariance.KINDS)
def test_learnt_variances_come_from_the_run(kind, monkeypatch):
    asked = []

    def from_run(denoiser, kind, ddpm, eta):
        asked.append((kind, ddpm, eta))
        return lambda x, t, t_next: 0.01

    monkeypatch.setattr(covariance, "from_run", from_run)
    for words in (["--sampler", "ddpm"], [], ["--eta", "0.5"]):
        arguments = sampling.from_flags(flags(*words, "--nfe", "3", "--variance", kind), run_of())
        assert arguments["clip"] == (-1.0, 1.0), "they add noise"
        samplers.from_seeds(run_of(), [0], (1,), **arguments)
    assert asked == [(kind, True, 0.0), (kind, False, 0.0), (kind, False, 0.5)]


def test_clipping_knows_the_bounds_of_the_space():
    denoiser = run_of()
    for bounds, auto in (((-1.0, 1.0), (-1.0, 1.0)), ((0.0, 2.0), (0.0, 2.0)), (None, None)):
        denoiser.space = argparse.Namespace(bounds=bounds)
        for words, clip in ((["--sampler", "ddpm"], auto), (["--eta", "1"], auto), ([], None)):
            assert sampling.from_flags(flags(*words), denoiser)["clip"] == clip
    with pytest.raises(ValueError, match="--clip on: latents have no bounds"):
        sampling.from_flags(flags("--clip", "on"), denoiser)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--churn", "5"], "--churn belongs to heun, not to ddim"),
        (["--sampler", "ddpm", "--churn-min", "5"], "--churn-min belongs to heun, not to ddpm"),
        (["--sampler", "heun", "--churn-max", "5"], "--churn-max has no use without --churn"),
        (["--sampler", "heun", "--churn", "-1"], "^--churn must not be negative"),
        (["--sampler", "heun", "--churn", "nan"], "^--churn must not be negative, and a number"),
        (["--sampler", "heun", "--churn", "inf"], "^--churn must not be negative, and a number"),
        (
            ["--sampler", "heun", "--churn", "1", "--churn-min", "-1"],
            "^--churn-min must not be negative",
        ),
        (
            ["--sampler", "heun", "--churn", "1", "--churn-noise", "nan"],
            "^--churn-noise must not be negative",
        ),
        (
            ["--sampler", "heun", "--churn", "1", "--churn-min", "5", "--churn-max", "3"],
            "^--churn-min 5.0 must not be above --churn-max 3.0",
        ),
        (["--nfe", "0"], "^--nfe must be at least 1, not 0"),
        (["--eta", "2"], "^--eta must be between 0"),
        (["--eta", "nan"], "^--eta must be between 0"),
        (["--sampler", "heun", "--eta", "1"], "--eta belongs to ddim, not to heun"),
        (["--sampler", "heun", "--order", "2"], "heun has a fixed one"),
        (["--sampler", "heun", "--variance", "sn"], "--variance sn belongs to ddpm and ddim"),
        (["--variance", "large"], "belongs to ddpm where it is large, not to ddim"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(words, message):
    with pytest.raises(ValueError, match=message) as error:
        flags(*words)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------ seeds and refusals


def test_one_seed_is_one_noise_whatever_the_batch():
    whole = samplers.SeededNoise(range(5))
    first, again = whole((5, 3, 4, 4)), whole((5, 3, 4, 4))
    assert not torch.equal(first, again), "the second draw is fresh"
    for i in range(5):
        one = samplers.SeededNoise([i])
        assert_close(one((1, 3, 4, 4))[0], first[i], rtol=0, atol=0)
        assert_close(one((1, 3, 4, 4))[0], again[i], rtol=0, atol=0)
    with pytest.raises(ValueError, match="3 images, but 5 seeds"):
        whole((3, 1))


def test_seeds_share_no_image():
    """Seed 0 is as it always was; the others begin 2^20 further on."""
    for i, noise in enumerate(samplers.SeededNoise(samplers.image_seeds(0, range(4)))((4, 3, 2))):
        literal = torch.randn(3, 2, generator=torch.Generator().manual_seed(i))
        assert_close(noise, literal, rtol=0, atol=0)
    last = samplers.IMAGES - 1
    some = [(0, 0), (0, 1), (0, last), (1, 0), (1, 1), (1, last), (2, 0), (4095, 0), (4095, last)]
    seeds = [samplers.image_seeds(seed, [i])[0] for seed, i in some]
    # The noise itself: torch's generator on the CPU forgets all but 32 bits of its seed.
    noises = samplers.SeededNoise(seeds)((len(some), 100))
    assert torch.cdist(noises, noises).add(torch.eye(len(some)) * 99).min() > 5
    sets = [set(samplers.image_seeds(seed, range(50_000))) for seed in (0, 1, 2)]
    assert len(set.union(*sets)) == 150_000 and max(seeds) == 2**32 - 1
    samplers.check_seed(4095, 2**20)
    for seed in (-1, 4096):
        with pytest.raises(ValueError, match=f"^--seed must be from 0 to 4095, not {seed}"):
            samplers.check_seed(seed)
    with pytest.raises(ValueError, match="^--num must be at most 1048576, not 1048577"):
        samplers.check_seed(0, 2**20 + 1)


def test_start_time():
    zero = schedules.make_schedule("zero-terminal-snr")
    assert samplers.start_time(D.Denoiser(None, zero, "eps")) == 999
    assert samplers.start_time(D.Denoiser(None, zero, "v")) == 1000
    assert samplers.start_time(D.Denoiser(None, LINEAR, "eps")) == 1000


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(sampler="euler"), "unknown sampler 'euler': choose from ddpm ddim"),
        (dict(nfe=0), "whole number from 1 on, not 0"),
        (dict(nfe=2.5), "whole number"),
        (dict(eta=1.5), "eta must be between 0"),
        (dict(order=4), "order 1, 2 or 3, not 4"),
        (dict(variance="large"), "variance 'large' is ddpm's"),
        (dict(variance="tiny"), "small, large or a callable, not 'tiny'"),
        (dict(sampler="dpm-solver", eta=0.5), "ddpm and ddim: dpm-solver has no use"),
        (
            dict(sampler="dpm-solver++", variance=lambda x, t, t_next: 0.0),
            r"dpm-solver\+\+ has no use",
        ),
        (dict(sampler="ddim", churn=1.0), "churn belongs to heun: ddim has no use for it"),
        (dict(sampler="heun", churn=-1.0), "must not be negative"),
        (dict(sampler="heun", churn=1.0, churn_range=(3.0, 1.0)), "the range must rise"),
        (dict(sampler="heun", nfe=1, final_denoise=False), "costs two calls, and there is 1"),
        (dict(nfe=1, spacing="karras"), "unknown spacing"),
        (dict(nfe=1, sampler="dpm-solver", t_end=-3), "times must satisfy"),
        (dict(spacing=torch.tensor([1500.0, 5.0])), "above 0 and up to 1000"),
        (dict(spacing=torch.tensor([15.0, 0.0])), "above 0 and up to 1000"),
        (dict(spacing="karras"), "unknown spacing"),
        (dict(spacing=torch.tensor([3.0, 5.0])), "one falling sequence"),
        (dict(t_end=0.0), "times must satisfy"),
    ],
)
def test_refusals(kwargs, words):
    with pytest.raises(ValueError, match=words):
        samplers.sample(toy_denoiser(toy.one_gaussian()), ONE, **kwargs)


def test_eps_at_no_signal_is_refused():
    zero = schedules.make_schedule("zero-terminal-snr")
    with pytest.raises(ValueError, match="eps-prediction has no x_0 at t = 1000"):
        samplers.sample(toy_denoiser(toy.one_gaussian(), zero), ONE)
    out = samplers.sample(toy_denoiser(toy.one_gaussian(), zero), ONE, t_start=999)
    assert torch.isfinite(out).all()
