"""papers/covariance.py: exact answers on Gaussian data and on the toy mixture,
Γ, second heads, the program."""

import copy
import csv
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from test_samplers import toy_denoiser
from test_theory import mixture_cdf
from torch.testing import assert_close

import data
import denoiser as D
import etsdm
import gap
import samplers
import schedules
import toy
import train
from papers import covariance, superres
from support import rng

LINEAR = schedules.make_schedule("linear")
EVERY = [(name, continuous) for name in schedules.SCHEDULES for continuous in (False, True)]
# s, t, sigma2 of DDPM, of DDIM; x_0 ~ N(0, 0.25), exact Γ
TABLE = """\
1 112 0.09160883289 0.08688042455
445 556 0.6276283064 0.006854664723
889 1000 0.8795933283 3.582564485e-5
1 21 0.006053274001 0.004697106563
1 2 1.198768103e-4 2.331015069e-5"""
f64 = functools.partial(torch.tensor, dtype=torch.float64)


def var_eps_of_gaussian(schedule, t, var=0.25):
    """Var[ε | x_t] for x_0 ~ N(0, var): a² var/(a² var + s²)."""
    a, s = schedule.alpha_sigma(t)
    return a**2 * var / (a**2 * var + s**2)


def exact_var(mixture, x, a, s):
    """Var[ε | x_t] of each pixel of x: E[ε²] − E[ε]², from the moments of every single bump."""
    means, stds = mixture.means, mixture.stds
    v = a**2 * stds**2 + s**2
    off = x[:, None] - a * means  # (B, K, ...)
    log_r = mixture.weights.log() - off[0, 0].numel() / 2 * v.log()
    log_r = log_r - off.square().flatten(2).sum(2) / (2 * v)
    r = schedules.expand(log_r.softmax(1).flatten(), off.flatten(0, 1)).unflatten(0, off.shape[:2])
    per_bump = lambda c: c.reshape(1, -1, *[1] * (x.dim() - 1))  # noqa: E731
    mean = per_bump(s / v) * off
    second = mean**2 + per_bump(a**2 * stds**2 / v)
    return (r * second).sum(1) - (r * mean).sum(1) ** 2


def two_heads(mixture, schedule, kind, prediction="eps"):
    """A network whose second head is exact, as a denoiser that looks like a run's."""
    first = toy.oracle(mixture, schedule, prediction)
    eps = toy.oracle(mixture, schedule)

    def net(x, c):
        calls.append(c[0].item())
        a, s = schedule.alpha_sigma(c[0].item())
        var = exact_var(mixture, x.double(), a, s)
        h = var if kind == "npr" else var + eps(x, c).double() ** 2
        return torch.cat([first(x, c), h.to(x.dtype)], 1)

    calls = []
    denoiser = D.Denoiser(net, schedule, prediction)
    denoiser.folder, denoiser.settings = "nowhere", {"head": kind}
    return denoiser, calls


@pytest.mark.parametrize("row", TABLE.splitlines())
def test_reference_numbers(row):
    s, t, *expected = map(float, row.split())
    var_eps = var_eps_of_gaussian(LINEAR, t)
    for eta, number in zip((1.0, 0.0), expected, strict=True):
        got = covariance.reverse_variance(LINEAR, t, s, var_eps, eta)
        assert got.dtype == torch.float64 and got.shape == ()
        assert_close(got.item(), number, rtol=1e-9, atol=0)
    assert covariance.reverse_variance(LINEAR, t, s, 0) == LINEAR.step_variances(t, s)[1]


# ------------------------------------------------------------------ the variance of a step


@pytest.mark.parametrize("name, continuous", EVERY)
def test_every_digit_of_the_coefficient(name, continuous):
    """Two other ways to write it, which lose no digits either: c = ᾱ_s β²/β̄_t² for DDPM, and
    s_next² (exp(h) − 1)², h the step in λ, for DDIM."""
    schedule = schedules.make_schedule(name, continuous=continuous)
    for t, t_next in ((2, 1), (50, 49), (500, 499), (999, 998), (700, 20), (3, 0)):
        (a, s), (a_next, s_next) = schedule.alpha_sigma(t), schedule.alpha_sigma(t_next)
        beta, beta_tilde = schedule.step_variances(t, t_next)
        A = a_next * beta / s**2
        assert_close(gap.step_coefficients(schedule, t, t_next, 1.0)[1], A, rtol=1e-12, atol=0)
        got = covariance.reverse_variance(schedule, t, t_next, 0.3)
        assert_close(got, beta_tilde + A**2 * (s / a) ** 2 * 0.3, rtol=1e-12, atol=0)
        if t_next:
            h = schedule.lam(t_next) - schedule.lam(t)
            got = covariance.reverse_variance(schedule, t, t_next, 1.0, eta=0.0)
            assert_close(got, (s_next * torch.expm1(h)) ** 2, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name, continuous", EVERY)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_it_is_the_variance_by_bayes(name, continuous, eta):
    """Gaussian data: DDPM's is Var[x_next | x_t] of the forward process itself; any η's is that of
    x_next = A x_0 + (a multiple of x_t) + η_σ z."""
    schedule = schedules.make_schedule(name, continuous=continuous)
    for t, t_next in ((999, 998), (999, 300), (300, 299), (80, 1), (7, 0)):
        (a, s), (a_next, s_next) = schedule.alpha_sigma(t), schedule.alpha_sigma(t_next)
        var_eps = var_eps_of_gaussian(schedule, t)
        got = covariance.reverse_variance(schedule, t, t_next, var_eps, eta)
        here, there = 0.25 * a**2 + s**2, 0.25 * a_next**2 + s_next**2
        fresh = eta**2 * schedule.step_variances(t, t_next)[1]
        A = a_next - (s_next**2 - fresh).clamp(min=0).sqrt() * a / s
        cov0 = 0.25 * s**2 / here
        assert_close(got, fresh + A**2 * cov0, rtol=1e-6, atol=1e-15)
        if eta == 1:
            both = a / a_next * there  # Cov[x_t, x_next]
            assert_close(got, there - both**2 / here, rtol=1e-9, atol=1e-13 * float(there))


def test_numbers_and_tensors_of_any_shape():
    var = torch.rand(2, 3, 4, 4)
    got = covariance.reverse_variance(LINEAR, 300, 200, var, 0.5)
    assert got.shape == var.shape and got.dtype == torch.float64
    one = covariance.reverse_variance(LINEAR, 300, 200, var[1, 2, 3, 0].item(), 0.5)
    assert_close(got[1, 2, 3, 0], one, rtol=1e-12, atol=0)
    ts = torch.tensor([2.0, 300.0, 1000.0])
    got = covariance.reverse_variance(LINEAR, ts, ts - 1, 0.2)
    expected = [covariance.reverse_variance(LINEAR, t, t - 1, 0.2) for t in ts.tolist()]
    assert_close(got, torch.stack(expected), rtol=1e-12, atol=0)


def authors_grid(steps):
    return f64([float(round(1 + k * 999 / (steps - 1))) for k in range(steps)][::-1])


@pytest.mark.parametrize(
    "steps, small, large",
    [(10, 0.104222, 0.358521), (50, 0.196420, 0.267883), (1000, 0.246125, 0.250752)],
)
def test_the_variance_of_the_whole_chain(steps, small, large):
    """x_0 ~ N(0, 0.25): the sampler is linear. Row j of the batch gets the j-th noise, 1, and no
    other, and the squares add up to the variance exactly: 0.249900 in any number of steps."""
    var_eps = covariance.variance_from_gamma(1 - var_eps_of_gaussian(LINEAR, torch.arange(1001)))
    best = lambda x, t, to: covariance.reverse_variance(LINEAR, t, to, var_eps(x, t))  # noqa: E731
    denoiser = D.Denoiser(toy.oracle(toy.one_gaussian(), LINEAR), LINEAR)
    for variance, expected in ((best, 0.249900), ("small", small), ("large", large)):
        unit = iter(torch.eye(steps, dtype=torch.float64)[:, :, None])
        how = dict(spacing=authors_grid(steps), noise=lambda shape, unit=unit: next(unit))
        x = samplers.sample(denoiser, next(unit), "ddpm", variance=variance, **how)
        assert x.square().sum().item() == pytest.approx(expected, abs=1e-6)


# ------------------------------------------------------------------ the clips


def test_the_last_noise_is_kept_below_grey_levels():
    for eta, std in ((0.0, 9.8299e-3), (0.5, 9.8299e-3), (1.0, 1.96598e-2)):
        var = covariance.clipped_variance(LINEAR, 200, 1, 0.9, eta)
        assert var.sqrt().item() == pytest.approx(std, rel=1e-4)
        free = covariance.clipped_variance(LINEAR, 200, 1, 0.9, eta, max_grey_levels=0)
        assert_close(free, covariance.reverse_variance(LINEAR, 200, 1, 0.9, eta))
        # not one step earlier, and never more than it was
        assert covariance.clipped_variance(LINEAR, 200, 1.5, 0.9, eta) > 0.01
        assert covariance.clipped_variance(LINEAR, 200, 1, 0.9, eta, None) == free
        tiny = covariance.clipped_variance(LINEAR, 1.1, 1, 1e-9, eta)
        assert_close(tiny, covariance.reverse_variance(LINEAR, 1.1, 1, 1e-9, eta))
    one = covariance.clipped_variance(LINEAR, 200, 1, 0.9, 1.0, max_grey_levels=1)
    assert one.item() == pytest.approx(9.6627e-5, rel=1e-4)
    # data in [0, 1] have grey levels half as wide
    half = covariance.clipped_variance(LINEAR, 200, 1, 0.9, 1.0, (0.0, 1.0)).sqrt()
    assert half.item() == pytest.approx(9.8299e-3, rel=1e-4)


def test_cov0_is_clipped_pixel_by_pixel():
    a, s = LINEAR.alpha_sigma(700)
    most = float((a / s) ** 2)  # the Var[ε | x_t] at which Cov0 is 1
    var, kept = f64([-0.3, 0, most / 2, most, 2 * most, 50]), f64([0, 0, most / 2, *[most] * 3])
    for eta in (0.0, 0.5, 1.0):
        got = covariance.clipped_variance(LINEAR, 700, 600, var.reshape(1, 1, 2, 3), eta)
        expected = covariance.reverse_variance(LINEAR, 700, 600, kept, eta)
        assert_close(got.flatten(), expected, rtol=1e-12, atol=0)
        fresh, A, _ = gap.step_coefficients(LINEAR, 700, 600, eta)
        assert_close(got.flatten()[-1], fresh + A**2, rtol=1e-12, atol=0)
        # latents: their variance is 1, and so is the most that x_t can leave open of it
        latents = covariance.clipped_variance(LINEAR, 700, 600, var, eta, None)
        assert_close(latents, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name, continuous", EVERY)
def test_finite_everywhere(name, continuous):
    """With and without signal at T; down to 0; for estimates that are far off."""
    schedule = schedules.make_schedule(name, continuous=continuous)
    var = torch.tensor([0.0, 1e-9, 0.5, 1.0, 7.0, -0.2])
    for spacing in ("uniform", "logsnr"):
        times = schedules.time_grid(schedule, 8, spacing).tolist() + [0.0]
        ways = itertools.product(itertools.pairwise(times), (0.0, 0.5, 1.0), ((-1.0, 1.0), None))
        for (t, t_next), eta, value_range in ways:
            got = covariance.clipped_variance(schedule, t, t_next, var, eta, value_range)
            assert torch.isfinite(got).all() and (got >= 0).all()
            fresh = eta**2 * schedule.step_variances(t, t_next)[1]
            assert (got >= fresh).all() or t_next <= 1


def test_without_signal_cov0_is_all_that_it_can_be():
    schedule = schedules.make_schedule("zero-terminal-snr")
    fresh, A, ratio = gap.step_coefficients(schedule, 1000, 600, 0.0)
    assert math.isinf(ratio) and A == schedule.alpha_sigma(600)[0]
    for value_range, cov0 in (((-1, 1), 1), ((0, 1), 0.25), (None, 1)):
        var = f64([[0.0, 0.3]])
        got = covariance.clipped_variance(schedule, 1000, 600, var, 0.0, value_range)
        assert_close(got, (cov0 * A**2).expand(1, 2), rtol=1e-12, atol=0)
    small = schedule.step_variances(1000, 600)[1]
    assert covariance.reverse_variance(schedule, 1000, 600, 0.0) == small
    assert covariance.reverse_variance(schedule, 1000, 600, 0.1) == math.inf


# ------------------------------------------------------------------ Γ


def test_gamma_of_a_gaussian():
    """Γ_t = β̄/(0.25 ᾱ + β̄), within 5 standard errors: ε* is Gaussian of that variance."""
    n, d, ts = 2000, 8, [1, 20, 200, 500, 900, 1000]
    for prediction in ("eps", "v", "edm"):
        schedule, std = LINEAR, 0.5
        if prediction == "edm":  # a std that is not EDM's own: there is something left to say
            schedule, std = schedules.make_schedule("edm"), 0.8
        mixture = toy.one_gaussian((d,), std)
        x0 = mixture.sample(n, torch.Generator().manual_seed(0))
        got = covariance.gamma(toy_denoiser(mixture, schedule, prediction), x0, ts=ts, batch=1000)
        expected = 1 - var_eps_of_gaussian(schedule, torch.tensor(ts), std**2)
        assert got.shape == (1001,) and got.dtype == torch.float64
        assert (got[ts] - expected).abs().max() < 5 * math.sqrt(2 / (n * d))
        assert_close(got[ts], expected, rtol=5 * math.sqrt(2 / (n * d)), atol=0)
        assert got.count_nonzero() == len(ts)


@pytest.mark.parametrize("t", [5, 60, 300, 800])
def test_one_minus_gamma_is_the_mean_variance(t):
    """On the two bumps, by quadrature over x_t: 1 − E ε*² = E Var[ε | x_t]; and by gamma()."""
    mixture = toy.two_bumps()
    a, s = LINEAR.alpha_sigma(t)
    x = torch.linspace(-12, 12, 40001, dtype=torch.float64)[:, None]
    v = a**2 * mixture.stds**2 + s**2
    off = x - a * mixture.means.flatten()
    bumps = torch.exp(-(off**2) / (2 * v)) / (2 * torch.pi * v).sqrt()
    q = (mixture.weights * bumps).sum(1) * (x[1, 0] - x[0, 0])
    assert q.sum().item() == pytest.approx(1, abs=1e-12)
    gamma = q @ mixture.posterior(x, a, s)[1].square().flatten()
    mean_var = q @ exact_var(mixture, x, a, s).flatten()
    assert_close(1 - gamma, mean_var, rtol=1e-9, atol=1e-12)
    denoiser = D.Denoiser(toy.oracle(mixture, LINEAR), LINEAR)
    x0 = mixture.sample(20_000, torch.Generator().manual_seed(0))
    got = covariance.gamma(denoiser, x0, ts=[t], batch=20_000)[t]
    assert abs(got - gamma) < 5 * math.sqrt(3 / 20_000)


def small_run(**changes):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.Dropout(0.5))
    schedule = schedules.make_schedule("cosine", T=40, **changes)
    return D.Denoiser(lambda x, c: net(x) * c[:, None, None, None] / 40, schedule, "v"), net


def noise_of(t, count, *shape):
    """What gamma() adds at t: one generator for (seed, t), image by image."""
    g = rng.generator(0, t)
    return torch.stack([torch.randn(shape, generator=g) for _ in range(count)])


def test_gamma_is_a_function_of_the_seed_and_not_of_the_batch():
    denoiser, net = small_run()
    net.eval()
    x0 = torch.rand(11, 2, 4, 4) * 2 - 1
    whole = covariance.gamma(denoiser, x0)
    for batch in (1, 3, 11, 40):
        assert_close(covariance.gamma(denoiser, x0, batch=batch), whole, rtol=1e-6, atol=1e-6)
    assert (covariance.gamma(denoiser, x0) == whole).all()
    assert (covariance.gamma(denoiser, x0, seed=1)[1:] != whole[1:]).all()
    parts = [covariance.gamma(denoiser, x0, ts=range(1 + i, 41, 3)) for i in range(3)]
    assert_close(sum(parts), whole, rtol=1e-6, atol=1e-6)
    xt = schedules.add_noise(denoiser.schedule, x0, 17, noise_of(17, 11, 2, 4, 4))
    eps = denoiser.predict(xt, 17)[1]  # written out for one t
    assert_close(whole[17], eps.double().square().mean(), rtol=1e-6, atol=0)


def test_gamma_switches_dropout_off_and_uses_shared_times():
    class Spy(torch.nn.Dropout):
        def forward(self, x, c):
            inputs.extend(c.tolist())
            return super().forward(x)

    inputs, x0 = [], torch.zeros(3, 1, 2, 2)
    denoiser = D.Denoiser(Spy(0.9), LINEAR, time_input=etsdm.make_time_input())
    got = covariance.gamma(denoiser, x0, ts=[57])
    expected = (1 - LINEAR.alpha_bar(57)) * noise_of(57, 3, 1, 2, 2).square().mean()
    assert_close(got[57], expected, rtol=1e-6, atol=0)
    assert inputs == [40.0] * 3


@pytest.mark.parametrize("batch", [2, 5, 16])
def test_gamma_of_super_resolution_gives_each_image_its_own(batch):
    """The known image next to x_t belongs to the same image, also with several t at a time."""
    space = superres.LowRes((1, 4, 4), 2)
    images = torch.linspace(-0.9, 0.9, 5).reshape(5, 1, 1, 1).expand(5, 1, 4, 4).contiguous()
    schedule = schedules.make_schedule("cosine", T=10)

    def net(seen, c):  # flat images: x_0 is the known image
        x, known = seen.split(1, 1)
        a, s = (schedules.expand(k, x) for k in schedule.alpha_sigma(c))
        return (x - a * known) / s

    got = covariance.gamma(D.Denoiser(net, schedule, space=space), images, batch=batch)
    for t in (3, 10):  # to the rounding of the known image, half a grey level
        expected = noise_of(t, 5, 1, 4, 4).square().mean().item()
        assert got[t].item() == pytest.approx(expected, rel=0.05)


def test_gamma_between_the_integers():
    var_eps = covariance.variance_from_gamma(f64([0.0, 0.4, 0.8, 1.25]))
    expected = {0.5: 0.8, 1: 0.6, 1.25: 0.5, 2: 0.2, 2.5: 0.0, 3: 0.0}
    assert {t: var_eps(None, t).item() for t in expected} == pytest.approx(expected)


# ------------------------------------------------------------------ second heads


def slowly(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), slowly("ddim", 0.5)])
def test_exact_heads_sample_the_right_distribution(sampler, eta):
    """Ten steps on the two bumps: NPR's and SN's heads, when exact, are one and the same, and
    better than any number without x_t; Γ has the right variance too. Exactly nfe calls."""
    mixture, n, nfe = toy.two_bumps(), 8000, 10
    noises = torch.randn(nfe, n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times, out = authors_grid(nfe), {}

    def run(denoiser, variance):
        some = iter(noises)
        how = dict(spacing=times, eta=eta, variance=variance, noise=lambda shape: next(some))
        return samplers.sample(denoiser, next(some), sampler, **how)

    for kind in ("npr", "sn"):
        denoiser, calls = two_heads(mixture, LINEAR, kind)
        how = (denoiser, kind, sampler == "ddpm", eta)
        out[kind] = run(denoiser, covariance.variance_from_run(*how, max_grey_levels=0))
        assert calls == times.tolist()
    plain = D.Denoiser(toy.oracle(mixture, LINEAR), LINEAR)
    x0 = mixture.sample(4000, torch.Generator().manual_seed(1))
    gamma = covariance.gamma(plain, x0, ts=times.long().tolist(), batch=4000)
    var_eps, share = covariance.variance_from_gamma(gamma), 1.0 if sampler == "ddpm" else eta
    out["analytic"] = run(plain, covariance.step_variance(plain, var_eps, share, 0))
    rough = ["small"] + ["large"] * (sampler == "ddpm")
    out.update({kind: run(plain, kind) for kind in rough})
    assert_close(out["npr"], out["sn"], rtol=1e-6, atol=1e-6)
    ratio = {k: (x.var() / mixture.variance()).item() for k, x in out.items()}
    cdf = mixture_cdf(mixture)
    distance = {k: stats.kstest(x.flatten().numpy(), cdf).statistic for k, x in out.items()}
    print(f"\n{sampler} eta {eta}: variance {ratio}\n    KS {distance}")
    assert abs(ratio["npr"] - 1) < 0.05 and abs(ratio["analytic"] - 1) < 0.05
    for kind in rough:
        assert abs(ratio[kind] - 1) > 0.15
        assert distance["npr"] < 0.75 * distance[kind] and distance["npr"] < distance["analytic"]


@pytest.mark.parametrize("kind", ["npr", "sn"])
@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_heads_under_every_prediction_and_clip(kind, prediction):
    """SN subtracts the network's own ε_θ, converted from what it predicts, whether or not the
    sampler then clips x̂_0. Several channels; float32."""
    schedule, mixture = schedules.make_schedule("cosine"), toy.two_bumps((3, 2, 2))
    denoiser, calls = two_heads(mixture, schedule, kind, prediction)
    variance = covariance.variance_from_run(denoiser, kind, ddpm=False, eta=0.3)
    x = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for clip in (None, (-0.1, 0.1)):
        samplers.predict(denoiser, x, 400.0, clip)
        exact = exact_var(mixture, x.double(), *schedule.alpha_sigma(400))
        expected = covariance.clipped_variance(schedule, 400, 300, exact, 0.3)
        assert_close(variance(x, 400.0, 300.0), expected, rtol=1e-4, atol=1e-5)
    assert len(calls) == 2, "the variance makes no call of its own"


def test_a_network_that_caches_is_still_a_module():
    net = torch.nn.Conv2d(1, 2, 3, padding=1)
    cached = covariance.CachedOutput(net)
    cached.double().eval().requires_grad_(False)
    assert net.weight.dtype == torch.float64 and not net.training and not net.weight.requires_grad


QUICK = {"linear", "zero-terminal-snr", "edm"}  # with signal at T, without, and another x


NAMES = [n if n in QUICK else slowly(n) for n in schedules.SCHEDULES]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), slowly("ddim", 0.0), slowly("ddim", 0.7)])
def test_samples_are_right_with_every_schedule(name, sampler, eta):
    """With signal at T and without, and on EDM's noise levels: the variance of 30 steps, with the
    clips; in exactly so many calls."""
    schedule, mixture = schedules.make_schedule(name), toy.two_bumps((2,))
    denoiser, calls = two_heads(mixture, schedule, "sn", "v" if name != "edm" else "eps")
    variance = covariance.variance_from_run(denoiser, "sn", sampler == "ddpm", eta)
    g = torch.Generator().manual_seed(0)
    noise = lambda shape: torch.randn(shape, dtype=torch.float64, generator=g)  # noqa: E731
    a, s = schedule.alpha_sigma(1000)
    x = a * mixture.sample(3000, g) + s * noise((3000, 2))
    x = samplers.sample(denoiser, x, sampler, 30, eta=eta, variance=variance, noise=noise)
    assert len(calls) == 30
    ratio = x.var(0).mean() / mixture.variance().mean()
    print(f"\n{name} {sampler} {eta}: {ratio:.3f}")
    assert abs(ratio - 1) < 0.13  # the last noise is clipped: up to 9 % are missing


# ------------------------------------------------------------------ a run's estimates


@pytest.fixture(scope="module")
def estimated(tmp_path_factory):
    """A small run on a small set of images, with flips, and its Γ."""
    folder = tmp_path_factory.mktemp("covariance")
    np.save(folder / "set.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = "--data set.npy --image-size 8 --batch-size 4 --flip --precision fp32 --steps 2"
        train.main(["--name", "base", *flags.split()])
        covariance.main(["base", "-n", "2", "--batch-size", "500"])
    return folder


def test_the_program(estimated, monkeypatch):
    monkeypatch.chdir(estimated)
    with np.load("runs/base/analytic.npz") as found:
        assert found["gamma"].shape == (1001,) and found["gamma"].dtype == np.float64
        assert found["gamma"][0] == 0 and (found["gamma"][1:] > 0).all()
        assert (found["n"], found["seed"], found["step"], found["weights"]) == (2, 0, 2, "ema")
        gamma = torch.from_numpy(found["gamma"])
    with open("runs/base/analytic.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [float(row["gamma"]) for row in rows] == gamma.tolist()
    assert Image.open("runs/base/analytic.png").size[0] > 800
    # the numbers are gamma()'s, of the first images of the set, every second one mirrored
    denoiser = D.load_run("base")
    x0 = data.to_float(next(data.batches(data.load("set.npy", 8, 3), 2, 0, 0)))
    again = covariance.gamma(denoiser, torch.stack([x0[0].flip(-1), x0[1]]), ts=[1, 500])
    assert_close(again[[1, 500]], gamma[[1, 500]], rtol=1e-4, atol=0)
    # and samples with them take exactly nfe calls
    variance = covariance.variance_from_run(denoiser, "analytic", True)
    calls, net = [], denoiser.net
    denoiser.net = lambda x, c: (calls.append(c), net(x, c))[1]
    x = samplers.sample_from_seeds(denoiser, [0], sampler="ddpm", nfe=5, variance=variance)
    assert torch.isfinite(x).all() and len(calls) == 5
    var = 1 - gamma[700].clamp(max=1)
    expected = covariance.clipped_variance(denoiser.schedule, 700, 600, var)
    assert_close(variance(x, 700.0, 600.0), expected, rtol=1e-12, atol=0)


def test_errors_of_a_run_say_what_to_do(estimated, monkeypatch, tmp_path):
    monkeypatch.chdir(estimated)
    denoiser, path = D.load_run("base"), tmp_path / "analytic.npz"

    def refused(*parts, kind="analytic", folder=tmp_path, error=ValueError, **changes):
        other = copy.copy(denoiser)
        vars(other).update(folder=folder, **changes)
        with pytest.raises(error) as caught:
            covariance.variance_from_run(other, kind, True)
        assert all(part in str(caught.value) for part in parts), caught.value

    start = f"--variance analytic: {tmp_path} has no Γ"
    refused(start, "python -m papers.covariance", error=FileNotFoundError)
    path.write_bytes((estimated / "runs/base/analytic.npz").read_bytes())
    covariance.variance_from_run(denoiser.replace(folder=tmp_path), "analytic", True)
    refused("belongs to step 2, ema weights, not to step 4000", "again", step=4000)
    refused("--weights raw", weights="raw")
    for broken in (path.read_bytes()[:200], b"", b"text"):
        path.write_bytes(broken)
        refused("is not a Γ of this run: run  python -m papers.covariance")
    for arrays in (dict(mu=np.zeros(3)), dict(gamma=np.zeros(12), step=2, weights="ema")):
        np.savez(path, **arrays)
        refused("is not a Γ of this run")
    run = denoiser.folder
    refused("python -m papers.heads npr runs/base", kind="npr", folder=run)
    settings = dict(denoiser.settings, head="npr", trunk="first")
    refused("has an npr head", "papers.heads sn first", kind="sn", folder=run, settings=settings)
    refused("load_run must have opened", kind="best")
    refused("load_run must have opened", folder=None)
