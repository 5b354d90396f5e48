r"""Samplers: from noise x_T back to an image x_0, in `nfe` calls of the network.

    ddpm          ancestral sampling: draw x_next from q(x_next | x_t, x̂_0)       DDPM, algorithm 2
    ddim          the same with an adjustable share eta of fresh noise              DDIM, eq. 12
    dpm-solver    the probability-flow ODE, its linear part solved exactly: singlestep order 1, 2, 3
    dpm-solver++  the same for x_0 instead of ε; multistep order 2 (2M), which reuses the last call
    heun          the same ODE in x/a over s/a, corrected once a step; with churn    EDM, alg. 1, 2

All start from one identity. Given (x_0, ε) at time t, the noise-free move to another time is

    x_next = a_next x_0 + s_next ε                                         the DDIM step, order 1

DDPM and DDIM put fresh noise where some of ε was. The DPM solvers follow the same move as an ODE:
the probability-flow ODE of diffusion reads, in x/a and λ = log(a/s),

    d(x/a)/dλ = −exp(−λ) ε(x, λ)     =>     x_next = a_next (x/a − ∫ exp(−λ) ε dλ) up to λ_next

Were ε constant along the step, the integral would give the DDIM step. Expanding ε around the start
of the step instead leaves, beyond that, integrals of exp(−λ) times powers of λ: the (exp(h) − 1)
and ((exp(h) − 1)/h − 1) below, times differences of ε between points of the step. Heun's method
writes σ = exp(−λ), d(x/a)/dσ = ε, and takes the mean of ε at both ends of the step.

All make exactly nfe calls, but for heun, whose steps cost two: what that leaves over is not spent,
and said. All see only denoiser.predict(x, t) -> (x_0, ε) and the schedule, so each works with every
schedule, prediction type and time condition.

What this file does not do: loop over batches or write images (sample.py); say how wide the fresh
noise should be, beyond DDPM's two answers (covariance.py).

    x = samplers.sample(denoiser, torch.randn(16, 3, 32, 32), "dpm-solver", 20, "logsnr")

x (B, ...); t in [0, T], falling; a, s, λ = log(a/s), σ = s/a at a time; h the length of a step in
λ; x̂_0 the denoiser's x_0; β, β̃ of a step t -> t_next (schedules.py).
"""

import math
import warnings
from itertools import pairwise

import torch

from schedules import along, at, combine, match, noise_in, time_grid

SAMPLERS = ("ddpm", "ddim", "dpm-solver", "dpm-solver++", "heun")


@torch.no_grad()
def sample(denoiser, x, sampler="ddim", nfe=50, spacing="uniform", eta=0.0, order=3, t_end=1.0,
           final_denoise=True, clip=None, noise=None, variance=None, t_start=None, churn=0.0,
           churn_range=(0.0, math.inf), churn_noise=1.0):
    r"""Noise x (B, ...) at t = T -> x_0 (B, ...), with nfe network calls (heun: at most).

    x              standard normal noise times schedule.prior_std (from_seeds: start_std)
    spacing        uniform | quadratic | logsnr, from T to t_end; or a falling tensor of times,
                   which then stands for nfe, t_end and t_start too
    eta            ddim: share of DDPM's fresh noise, from 0 (none) to 1 (DDPM)
    order          dpm-solver: 1, 2 or 3 (dpm-solver++ is always 2M)
    t_end          the last time of the grid
    final_denoise  True: the last call gives x_0, seen from t_end. False: every call is a step, and
                   x at t_end is returned
    clip           (low, high): x̂_0 is kept within, and ε re-derived from it; None never clips
    noise          noise(shape) -> Gaussian like x; None draws from torch's global generator
    variance       of the fresh noise. "small" = η² β̃ (so is None), "large" = β (ddpm only), or a
                   callable (x, t, t_next) -> variance of x_next given x_t (ddpm and ddim)
    t_start        where to start instead of at T
    churn          heun: EDM's S_churn, how much noise is added and taken off again on the way,
                   where churn_range[0] <= σ <= churn_range[1] (S_min, S_max), times churn_noise

    UserWarning: heun cannot spend nfe. ValueError: an argument out of its range or without use for
    this sampler, or ε-prediction at ᾱ = 0, where it has no x_0.
    """
    schedule = denoiser.schedule
    check(sampler, nfe, eta, order, variance, churn, churn_range, churn_noise)
    given = isinstance(spacing, torch.Tensor)
    if given:
        times = falling(spacing, schedule.T)
    else:
        times, used = affordable(
            lambda points: time_grid(schedule, points, spacing, t_end, t_start),
            schedule, sampler, int(nfe), final_denoise)
        if used != nfe:
            warnings.warn(unspent(nfe, used), stacklevel=3)  # 3: past no_grad, the caller's line
    if times[0] > start_time(denoiser):
        raise ValueError(f"eps-prediction has no x_0 at t = {times[0]:g}, where alpha_bar = 0 in "
                         f"{schedule.name}: predict v or x0, or start lower (t_start)")

    if noise is None:
        def noise(shape):
            return torch.randn(shape, dtype=x.dtype, device=x.device)
    if sampler == "heun":
        gamma = min(churn / (len(times) - (not final_denoise) or 1), math.sqrt(2) - 1)
        stirred = dict(gamma=gamma, within=churn_range, scale=churn_noise, noise=noise)
        return heun(denoiser, x, times.tolist(), final_denoise, clip, stirred)
    if sampler in ("ddpm", "ddim"):
        times = times.tolist() + [0.0] * final_denoise
        eta = 1.0 if sampler == "ddpm" else eta
        return ancestral(denoiser, x, times, eta, variance, clip, noise)
    if sampler == "dpm-solver":
        equal = not given and spacing == "logsnr"
        times, orders = singlestep_plan(schedule, times, order, equal)
        x = dpm_solver(denoiser, x, times, orders, clip)
    else:
        x = dpm_solver_2m(denoiser, x, times, clip)
    return predict(denoiser, x, times[-1].item(), clip)[0] if final_denoise else x


def check(sampler, nfe, eta, order, variance, churn=0.0, churn_range=(0.0, math.inf),
          churn_noise=1.0):
    """Refuse, in one line each, what no sampler could do, and what this one would ignore."""
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}: choose from {' '.join(SAMPLERS)}")
    if int(nfe) != nfe or nfe < 1:
        raise ValueError(f"the number of network calls must be a whole number from 1 on, not {nfe}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 (DDIM) and 1 (DDPM), not {eta}")
    if order not in (1, 2, 3):
        raise ValueError(f"DPM-Solver has order 1, 2 or 3, not {order}")
    noisy = sampler in ("ddpm", "ddim")
    if (eta or variance is not None) and not noisy:
        raise ValueError(f"eta and variance belong to ddpm and ddim: {sampler} has no use for them")
    if variance == "large" and sampler != "ddpm":
        raise ValueError(f"variance 'large' is ddpm's: with {sampler} give a number by a callable")
    if not (variance in (None, "small", "large") or callable(variance)):
        raise ValueError(f"variance is small, large or a callable, not {variance!r}")
    if churn and sampler != "heun":
        raise ValueError(f"churn belongs to heun: {sampler} has no use for it")
    if not (0 <= churn < math.inf and 0 <= churn_noise < math.inf
            and 0 <= churn_range[0] <= churn_range[1]):
        raise ValueError(f"churn, its range and its noise must not be negative, and the range must "
                         f"rise: not {churn}, {tuple(churn_range)} and {churn_noise}")


def affordable(grid, schedule, sampler, nfe, final_denoise=True):
    """(times, calls): the longest grid(points) that nfe calls pay for, and how many it takes."""
    if sampler != "heun":
        return grid(nfe + (not final_denoise)), nfe
    points = (nfe - final_denoise) // 2 + 1
    while heun_calls(schedule, grid(points + 1), final_denoise) <= nfe:  # order 1 leaves some over
        points += 1
    times = grid(points)
    used = heun_calls(schedule, times, final_denoise)
    if used == 0:
        raise ValueError(f"a step of heun costs two calls, and there is {nfe}")
    return times, used


def unspent(nfe, used):
    """What is said of calls that heun cannot spend."""
    return f"heun's steps cost two calls each: it makes {used} of the {nfe} that were asked for"


def falling(times, T):
    """A grid of times, checked: float64 on the CPU, at least one, strictly falling, in (0, T]."""
    times = times.double().cpu()
    if times.dim() != 1 or len(times) == 0 or bool((times.diff() >= 0).any()):
        raise ValueError("a grid of times must be one falling sequence")
    if not 0 < times[-1] <= times[0] <= T:
        raise ValueError(f"a grid of times must lie above 0 and up to {T}, "
                         f"not from {times[0]:g} to {times[-1]:g}")
    return times


def predict(denoiser, x, t, clip):
    """denoiser.predict, with x̂_0 kept within clip. ε is then re-derived from the clipped x̂_0, so
    that the pair still explains x_t: for DDPM this is the posterior mean μ̃(x_t, clipped x̂_0).
    (Analytic-DPM's program keeps the network's ε in DDIM; its numbers differ a little.)"""
    x0, eps = denoiser.predict(x, t)
    if clip is None:
        return x0, eps
    x0 = x0.clamp(*clip)
    return x0, noise_in(denoiser.schedule, x, t, x0)


# ------------------------------------------------------------------ DDPM and DDIM

def ancestral(denoiser, x, times, eta, variance, clip, noise):
    r"""x_next = a_next x_0 + √(s_next² − η² β̃) ε + std z                DDIM eq. 12; η = 1 is DDPM

    `times` are those of the calls and, last, where to arrive: 0, or t_end. The step onto 0 is x_0
    itself, without noise.
    """
    a, s, _, betas, betas_tilde = along(denoiser.schedule, tuple(times))
    for i, (t, t_next) in enumerate(pairwise(times)):
        x0, eps = predict(denoiser, x, t, clip)
        replaced = eta**2 * betas_tilde[i]  # so much of ε's variance makes room for fresh noise
        mean = combine(a[i + 1], x0, math.sqrt(max(s[i + 1] ** 2 - replaced, 0.0)), eps)
        if t_next == 0:
            return mean  # = x0
        var = betas[i] if variance == "large" else replaced
        if callable(variance):
            var = variance(x, t, t_next)
        if isinstance(var, torch.Tensor) or var > 0:
            mean += root(var, x) * noise(x.shape)
        x = mean
    return x


def root(var, x):
    """√var, made to multiply x: var is a number or a tensor, 0-d, per image or per pixel."""
    if not isinstance(var, torch.Tensor):
        return math.sqrt(var)
    std = var.double().sqrt()
    return match(std, x) if std.dim() <= 1 else std.to(x)


# ------------------------------------------------------------------ DPM-Solver

def singlestep_plan(schedule, times, order, equal=False):
    r"""(times, orders): an update of order o goes o times further, and costs o calls.

    As many updates of full order as fit, then the rest, so that the orders sum to the steps of the
    grid. Their inner points are grid points; with `equal`, instead, updates are equally long in λ
    and so are their parts. Where ᾱ = 0, λ = −∞: only order 1 leads away from there.
    """
    steps = len(times) - 1
    without_signal = int((schedule.lam(times)[:-1] == -math.inf).sum())
    orders = [1] * without_signal + split_into_orders(steps - without_signal, order)
    if equal and steps:
        outer = time_grid(schedule, len(orders) + 1, "logsnr", times[-1].item(), times[0].item())
        parts = [outer[:1]]  # first the start, then each update's inner points and its end
        for t, t_next, o in zip(outer[:-1], outer[1:], orders, strict=True):
            inside = torch.arange(1, o, dtype=torch.float64) / o
            lam = torch.lerp(schedule.lam(t), schedule.lam(t_next), inside)
            parts += [schedule.t_of_lam(lam), t_next[None]]
        times = torch.cat(parts)
    return times, orders


def split_into_orders(steps, order):
    """The orders of singlestep updates, which sum to `steps`: 10 of order 3 are 3 + 3 + 3 + 1."""
    full, rest = divmod(steps, order)
    if order == 3 and rest == 0 and steps:
        return [3] * (full - 1) + [2, 1]  # DPM-Solver-fast keeps two short updates for the end
    return [order] * full + [rest] * (rest > 0)


def dpm_solver(denoiser, x, times, orders, clip):
    """Singlestep DPM-Solver from times[0] to times[-1] (Lu et al. 2022, algorithms 1 and 2)."""
    t, i = times.tolist(), 0
    a, s, lam, *_ = along(denoiser.schedule, tuple(t))
    for order in orders:
        inside = slice(i, i + order + 1)
        points = list(zip(t[inside], a[inside], s[inside], lam[inside], strict=True))
        if all(p[3] < q[3] for p, q in pairwise(points)):
            x = singlestep(denoiser, x, points, clip)
        else:  # λ stands still where log SNR is clipped: order 1 is the identity there
            for pair in pairwise(points):
                x = singlestep(denoiser, x, pair, clip)
        i += order
    return x


def singlestep(denoiser, x, points, clip):
    r"""One update over points (t, a, s, λ), whose order, up to 3, is the number of points less one.

    h is its length in λ; x_0 and e = ε at its start, a and s at the point that is reached; e_1 and
    e_2 at λ + r1 h and λ + r2 h, themselves reached by order 1 and 2:
        order 1:  x = a x_0 + s e
        order 2:  x = a x_0 + s e − s (exp(h) − 1)/(2 r1) (e_1 − e)
        to e_2:   x = a x_0 + s e − s r2/r1 ((exp(r2 h) − 1)/(r2 h) − 1) (e_1 − e)
        order 3:  x = a x_0 + s e − s/r2 ((exp(h) − 1)/h − 1) (e_2 − e)
    """
    times, a, s, lam = zip(*points, strict=True)
    x0, eps = predict(denoiser, x, times[0], clip)
    u = combine(a[1], x0, s[1], eps)  # order 1: to the first inner point, or all the way
    if len(points) == 2:
        return u
    h = lam[-1] - lam[0]
    r1 = (lam[1] - lam[0]) / h
    d1 = predict(denoiser, u, times[1], clip)[1] - eps
    if len(points) == 3:
        return combine(a[2], x0, s[2], eps).sub_(d1, alpha=s[2] * math.expm1(h) / (2 * r1))
    r2 = (lam[2] - lam[0]) / h
    u = combine(a[2], x0, s[2], eps).sub_(
        d1, alpha=s[2] * r2 / r1 * (math.expm1(r2 * h) / (r2 * h) - 1))
    d2 = predict(denoiser, u, times[2], clip)[1] - eps
    return combine(a[3], x0, s[3], eps).sub_(d2, alpha=s[3] / r2 * (math.expm1(h) / h - 1))


def dpm_solver_2m(denoiser, x, times, clip):
    r"""DPM-Solver++ 2M (Lu et al. 2023, algorithm 2): the slope of x_0 comes from the step before.

        x = a x_0 + s ε − a (exp(−h) − 1)/2 · (x_0 − x_0 before) h/(h before)

    The first step has none before it and is order 1. So is the last of fewer than 10 steps, where
    extrapolating so far does more harm than good.
    """
    t = times.tolist()
    a, s, lam, *_ = along(denoiser.schedule, tuple(t))
    steps, before, h_before = len(t) - 1, None, 0.0
    for i in range(steps):
        x0, eps = predict(denoiser, x, t[i], clip)
        h = lam[i + 1] - lam[i]
        x = combine(a[i + 1], x0, s[i + 1], eps)
        # No slope from a step of no length, or of infinite length (from ᾱ = 0).
        if 0 < h_before < math.inf and not (i == steps - 1 and steps < 10):
            x.sub_(x0 - before, alpha=a[i + 1] * math.expm1(-h) / 2 * h / h_before)
        before, h_before = x0, h
    return x


# ------------------------------------------------------------------ Heun's method

def heun_calls(schedule, times, final_denoise=True):
    """Calls that heun makes on this grid: two a step, one where no signal is left (λ = −∞; there
    σ = ∞, and the step is order 1), and one for x_0 at the end: N points cost 2N − 1."""
    first_order = int((schedule.lam(times)[:-1] == -math.inf).sum())
    return 2 * (len(times) - 1) - first_order + final_denoise


def heun(denoiser, x, times, final_denoise, clip, stirred):
    r"""The flow d(x/a)/dσ = ε, σ = s/a, by Heun's method: EDM's algorithm 2, for every schedule.

        x_next = a_next x_0 + s_next ε,   and, with ε' predicted at the point so reached,
        x_next ← x_next + a_next (σ_next − σ)/2 (ε' − ε)

    EDM's last step, to σ = 0, is order 1: x_0 itself.
    """
    for t, t_next in pairwise([*times, None]):
        if t_next is None and not final_denoise:
            return x
        x, t = stir(denoiser.schedule, x, t, **stirred)
        x0, eps = predict(denoiser, x, t, clip)
        if t_next is None:
            return x0
        (a, s), (a_next, s_next) = (at(denoiser.schedule, k) for k in (t, t_next))
        x = combine(a_next, x0, s_next, eps)
        if a > 0:
            slope = predict(denoiser, x, t_next, clip)[1] - eps
            x = x.add(slope, alpha=(s_next - a_next * s / a) / 2)


def stir(schedule, x, t, gamma, within, scale, noise):
    r"""Churn: up from σ to σ̂ = σ (1 + γ) by fresh noise, x/a ← x/a + √(σ̂² − σ²) scale z -> (x, t̂).

    γ is min(churn/N, √2 − 1), N the number of steps with the one to σ = 0. What σ̂ is, the schedule
    has the last word on: those that end at T (all but edm) add nothing there. Noise is drawn where
    some is added, alone: EDM's own loop draws it at every step, so seeds do not compare.
    """
    a, s = at(schedule, t)
    if gamma == 0 or a == 0 or not within[0] <= s / a <= within[1]:
        return x, t
    higher = float(schedule.t_of_lam(-math.log(s / a * (1 + gamma))))
    a_hat, s_hat = at(schedule, higher)
    if s_hat / a_hat <= s / a:
        return x, t
    added = math.sqrt((s_hat / a_hat) ** 2 - (s / a) ** 2)
    return a_hat / a * x + a_hat * added * scale * noise(x.shape), higher


# ------------------------------------------------------------------ starting

# torch's generator on the CPU reads 32 bits of its seed, and no more: (1 << 32) + i is i to it.
SEEDS, IMAGES = 2**12, 2**20


def check_seed(seed, num=None):
    """ValueError for a --seed, or a --num of its images, that would share images with another."""
    if not 0 <= seed < SEEDS:
        raise ValueError(f"--seed must be from 0 to {SEEDS - 1}, not {seed}")
    if (num or 0) > IMAGES:
        raise ValueError(f"--num must be at most {IMAGES}, not {num}: a seed has no more images, "
                         "take the others from the next")


def image_seeds(seed, images):
    """The seed of each image's generator: image i is a function of (seed, i).

    Each seed has its own IMAGES. With seed + i, seeds 0 and 1 would have all images but one in
    common.
    """
    return [seed * IMAGES + i for i in images]


class SeededNoise:
    """noise(shape) that depends, for each image, on its own seed alone: one generator per image.

    Always drawn on the CPU, so that the same seed is the same noise on every device.
    """

    def __init__(self, seeds, device="cpu"):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.device = device

    def __call__(self, shape):
        """(B, ...) float32 noise, image by image; B must be the number of seeds."""
        if shape[0] != len(self.generators):
            raise ValueError(f"{shape[0]} images, but {len(self.generators)} seeds")
        draws = [torch.randn(shape[1:], generator=g) for g in self.generators]
        return torch.stack(draws).to(self.device)


def from_seeds(denoiser, seeds, shape, device="cpu", **arguments):
    """One image per seed, a function of that seed alone: (B, *shape). arguments: those of
    sample(). ValueError: what came out is not finite, and would be seen as black pictures."""
    # The first draw of each generator is x_T; samplers that add noise go on drawing from it.
    noise = SeededNoise(seeds, device)
    x = start_std(denoiser.schedule, **arguments) * noise((len(seeds), *shape))
    x = sample(denoiser, x, noise=noise, **arguments)
    if not x.isfinite().all():
        raise ValueError("the samples are not finite numbers: the weights, or the sampler's "
                         "settings, are beyond what the arithmetic can do")
    return x


def start_std(schedule, spacing=None, t_start=None, **others):
    """What standard normal noise is multiplied by to stand for x where sample() starts with these
    arguments: prior_std at T."""
    # Below T, too, x_t must look to the network as in training. VP's is about 1 wide at every t; in
    # EDM's coordinates it is σ(t) wide, and 80 would be noise that no network has seen there.
    if not schedule.exploding:
        return schedule.prior_std
    t_start = spacing[0] if isinstance(spacing, torch.Tensor) else t_start
    return schedule.prior_std if t_start is None else float(schedule.coefficients(t_start)[1])


def start_time(denoiser):
    """Where sampling can start: T, or T − 1 for ε-prediction with ᾱ(T) = 0, since it has no x_0."""
    T = denoiser.schedule.T
    needs_signal = getattr(denoiser, "prediction", None) == "eps"
    return T - 1 if needs_signal and at(denoiser.schedule, float(T))[0] == 0 else T
