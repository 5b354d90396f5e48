r"""Samplers: from noise x_T back to an image x_0, in `nfe` network calls.

    ddpm          ancestral sampling: draw x_next from q(x_next | x_t, x̂_0)       DDPM, algorithm 2
    ddim          the same with an adjustable share eta of fresh noise              DDIM, eq. 12
    dpm-solver    the probability-flow ODE, its linear part solved exactly: singlestep order 1, 2, 3
    dpm-solver++  the same for x_0 instead of ε; multistep order 2 (2M) reuses the previous call
    heun          the same ODE for x/α over σ/α, corrected each step; added noise    EDM, alg. 1, 2

All use one identity. Given (x_0, ε) at time t, the step to another time without fresh noise is

    x_next = α_next x_0 + σ_next ε                                         the DDIM step, order 1

DDPM and DDIM replace a part of ε by fresh noise. The DPM solvers read this step as the solution of

    d(x/α)/dλ = −exp(−λ) ε(x, λ),   λ = log(α/σ)                           the probability-flow ODE

for constant ε. Higher orders use differences of ε between points of the step: a Taylor series in λ.
Its integrals of exp(−λ) times powers of λ are the factors (exp(h) − 1), ((exp(h) − 1)/h − 1) below.

Samplers make nfe network calls. Only heun, with two per step, may leave one unused, and then warns.
Samplers use only denoiser.predict(x, t) -> (x_0, ε) and the schedule, so each works with every
schedule, prediction, time input. Not here: image files (support/), estimated variances (papers/).

    x = samplers.sample(denoiser, torch.randn(16, 3, 32, 32), "dpm-solver", 20, "logsnr")

x (B, ...); t in [0, T]; h the length of a step in λ; x̂_0 the denoiser's x_0. See schedules.py.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from schedules import SPACINGS, Schedule, eps_from_x0, expand, time_grid
from support.cli import device_flag, flag, flag_name
from support.rng import SeededNoise

SAMPLERS = ("ddpm", "ddim", "dpm-solver", "dpm-solver++", "heun")
ESTIMATED = ("analytic", "npr", "sn")  # variances that papers/covariance.py reads from a run
Clip = tuple[float, float] | None  # bounds of x̂_0
UNUSED_CALL = "heun takes two network calls per step: it makes {} of the {} calls"


@torch.no_grad()
def sample(denoiser, x: Tensor, sampler: str = "ddim", nfe: int = 50,
           spacing: str | Tensor = "uniform", eta: float = 0.0, order: int = 3, t_end: float = 1.0,
           denoise_to_zero: bool = True, clip: Clip = None,
           noise: Callable | None = None, variance: str | Callable | None = None,
           t_start: float | None = None, s_churn: float = 0.0, s_min: float = 0.0,
           s_max: float = math.inf, s_noise: float = 1.0) -> Tensor:
    r"""Sample: noise x (B, ...) -> x_0 (B, ...), with nfe network calls (heun: at most nfe).

    x                standard normal noise times initial_std()
    spacing          a name for schedules.time_grid, or the falling times (nfe then has no effect)
    eta              ddim: share of DDPM's fresh noise, from 0 (none) to 1 (DDPM)
    order            dpm-solver: 1, 2 or 3 (dpm-solver++ is always 2M)
    t_start, t_end   first and last time of the grid; t_start None: T
    denoise_to_zero  the last call predicts x_0 at t_end; False: it makes the step to t_end
    clip             (low, high): clamp x̂_0 and compute ε again from it; None never clips
    noise            noise(shape) -> Gaussian like x; None draws from torch's global generator
    variance         of the fresh noise: "small" = η² β̃ (as None), "large" = β (ddpm only), or a
                     function (x, t, t_next) -> variance of x_next given x_t (ddpm and ddim)
    s_churn, ...     heun: EDM's S_churn, S_min, S_max, S_noise; its σ is σ/α

    UserWarning: heun leaves a call unused. ValueError, which names the flag: an argument is out of
    range; eta, variance or s_churn has no effect on this sampler; or ε gives no x_0, at ᾱ = 0.
    """
    SamplerConfig(sampler=sampler, nfe=nfe, eta=eta, order=order, variance=variance, churn=s_churn,
                  churn_min=s_min, churn_max=s_max, churn_noise=s_noise).check()
    if isinstance(variance, str) and variance in ESTIMATED:
        raise ValueError(f"--variance {variance}: give a function of papers.covariance instead")
    schedule = denoiser.schedule
    times, calls = grid_for_nfe(schedule, sampler, nfe, spacing, t_end, t_start, denoise_to_zero)
    if calls != nfe:
        warnings.warn(UNUSED_CALL.format(calls, nfe), stacklevel=3)  # 3: the caller's line
    if times[0] > initial_time(denoiser) and schedule.alpha_bar(times[0]) == 0:
        raise ValueError(f"eps-prediction has no x_0 at t = {times[0]:g}, where alpha_bar = 0 in "
                         f"{schedule.name}: lower t_start, or predict v or x0")
    noise = noise or (lambda shape: torch.randn(shape, dtype=x.dtype, device=x.device))
    if sampler == "heun":
        times = times.tolist() + [0.0] * denoise_to_zero
        return heun(denoiser, x, times, clip, noise, s_churn, s_min, s_max, s_noise)
    if sampler in ("ddpm", "ddim"):
        eta = 1.0 if sampler == "ddpm" else eta
        x = ddim(denoiser, x, times.tolist(), eta, variance, clip, noise)
    elif sampler == "dpm-solver":
        times, orders = singlestep_plan(schedule, times, order, equal=spacing == "logsnr")
        x = dpm_solver(denoiser, x, times.tolist(), orders, clip)
    else:
        x = dpm_solver_2m(denoiser, x, times.tolist(), clip)
    return predict(denoiser, x, times[-1].item(), clip)[0] if denoise_to_zero else x


def predict(denoiser, x: Tensor, t: float, clip: Clip) -> tuple[Tensor, Tensor]:
    """denoiser.predict with x̂_0 clamped to clip. ε is recomputed, so that α x̂_0 + σ ε = x."""
    x0, eps = denoiser.predict(x, t)
    if clip is None:
        return x0, eps
    x0 = x0.clamp(*clip)
    return x0, eps_from_x0(denoiser.schedule, x, t, x0)


def ddim(denoiser, x: Tensor, times: list[float], eta: float, variance: str | Callable | None,
         clip: Clip, noise: Callable) -> Tensor:
    r"""DDIM eq. 12: x_next = α_next x_0 + √(σ_next² − η² β̃) ε + √var z; η = 1 is DDPM."""
    schedule = denoiser.schedule
    for t, t_next in pairwise(times):
        x0, eps = predict(denoiser, x, t, clip)
        alpha_next, sigma_next = schedule.alpha_sigma(t_next)
        beta, beta_tilde = schedule.step_variances(t, t_next)
        fresh = eta**2 * beta_tilde  # fresh noise replaces this part of ε's variance
        var = beta if variance == "large" else fresh
        if callable(variance):
            var = torch.as_tensor(variance(x, t, t_next), dtype=torch.float64)
        x = alpha_next * x0 + (sigma_next**2 - fresh).clamp(min=0).sqrt() * eps
        if callable(variance) or var > 0:
            x = x + expand(var.sqrt(), x) * noise(x.shape)
    return x


def dpm_solver(denoiser, x: Tensor, times: list[float], orders: list[int], clip: Clip) -> Tensor:
    """Singlestep DPM-Solver (Lu et al. 2022, algorithms 1 and 2) with singlestep_plan()'s updates.
    An update has length h in λ and inner points at λ + r1 h and λ + r2 h."""
    for order in orders:
        t, times = times[:order + 1], times[order:]  # start, inner points, end
        points = torch.tensor(t, dtype=torch.float64)
        (alpha, sigma), lam = denoiser.schedule.alpha_sigma(points), denoiser.schedule.lam(points)
        h = lam[-1] - lam[0]
        r1, r2 = (lam[1] - lam[0]) / h, (lam[min(2, order)] - lam[0]) / h
        x0, eps = predict(denoiser, x, t[0], clip)
        x = alpha[1] * x0 + sigma[1] * eps  # order 1
        if order > 1:
            d1 = predict(denoiser, x, t[1], clip)[1] - eps
            x = alpha[2] * x0 + sigma[2] * eps
        if order == 2:
            x = x - sigma[2] * torch.expm1(h) / (2 * r1) * d1
        if order == 3:
            x = x - sigma[2] * r2 / r1 * (torch.expm1(r2 * h) / (r2 * h) - 1) * d1
            d2 = predict(denoiser, x, t[2], clip)[1] - eps
            x = alpha[3] * x0 + sigma[3] * eps - sigma[3] / r2 * (torch.expm1(h) / h - 1) * d2
    return x


def dpm_solver_2m(denoiser, x: Tensor, times: list[float], clip: Clip) -> Tensor:
    """DPM-Solver++ 2M (Lu et al. 2023, algorithm 2): the previous step gives the slope of x_0. The
    first step has no slope and is order 1. With fewer than 10 steps, the last is also order 1: so
    long an extrapolation does more harm than good."""
    schedule, steps = denoiser.schedule, len(times) - 1
    x0_before, h_before = None, 0.0
    for i, (t, t_next) in enumerate(pairwise(times)):
        x0, eps = predict(denoiser, x, t, clip)
        alpha_next, sigma_next = schedule.alpha_sigma(t_next)
        h = schedule.lam(t_next) - schedule.lam(t)
        x = alpha_next * x0 + sigma_next * eps
        # A step of length 0 or infinite length (from ᾱ = 0) gives no slope.
        if 0 < h_before < math.inf and not (i == steps - 1 and steps < 10):
            x = x - alpha_next * torch.expm1(-h) / 2 * h / h_before * (x0 - x0_before)
        x0_before, h_before = x0, h
    return x


def heun(denoiser, x: Tensor, times: list[float], clip: Clip, noise: Callable, s_churn: float,
         s_min: float, s_max: float, s_noise: float) -> Tensor:
    """Heun's method for d(x/α)/d(σ/α) = ε: EDM's algorithm 2, for every schedule. The step to t = 0
    (it gives x_0) and a step from α = 0 are order 1."""
    schedule = denoiser.schedule
    gamma = min(s_churn / max(len(times) - 1, 1), math.sqrt(2) - 1)
    for t, t_next in pairwise(times):
        if gamma > 0:
            x, t = add_churn(schedule, x, t, gamma, s_min, s_max, s_noise, noise)
        x0, eps = predict(denoiser, x, t, clip)
        (alpha, sigma), (alpha_next, sigma_next) = map(schedule.alpha_sigma, (t, t_next))
        x = alpha_next * x0 + sigma_next * eps
        if t_next > 0 and alpha > 0:  # the mean of ε at both ends, times α_next Δ(σ/α)
            change = predict(denoiser, x, t_next, clip)[1] - eps
            x = x + alpha_next * (sigma_next / alpha_next - sigma / alpha) / 2 * change
    return x


def add_churn(schedule: Schedule, x: Tensor, t: float, gamma: float, s_min: float, s_max: float,
              s_noise: float, noise: Callable) -> tuple[Tensor, float]:
    """Raise σ/α to σ̂ = σ/α (1 + γ): x/α ← x/α + √(σ̂² − (σ/α)²) s_noise z -> (x, t̂). σ̂ cannot
    exceed the schedule's maximum. Only edm has none, and adds noise at t = T. z is drawn only if it
    is used. EDM's program draws it at every step, so equal seeds give other images there."""
    alpha, sigma = schedule.alpha_sigma(t)
    t_hat = schedule.t_of_lam(schedule.lam(t) - math.log1p(gamma)).item()
    alpha_hat, sigma_hat = schedule.alpha_sigma(t_hat)
    added = (sigma_hat / alpha_hat) ** 2 - (sigma / alpha) ** 2
    if alpha == 0 or added <= 0 or not s_min <= sigma / alpha <= s_max:
        return x, t
    return alpha_hat / alpha * x + alpha_hat * added.sqrt() * s_noise * noise(x.shape), t_hat


def grid_for_nfe(schedule: Schedule, sampler: str, nfe: int, spacing: str | Tensor | Callable,
                 t_end: float = 1.0, t_start: float | None = None,
                 denoise_to_zero: bool = True) -> tuple[Tensor, int]:
    """(times, calls): the longest time grid that nfe network calls allow, and the calls it uses.
    spacing: a name, a function (points, t_start, t_end) -> times, or times (calls is then nfe)."""
    def grid(points):
        if callable(spacing):
            return spacing(points, schedule.T if t_start is None else t_start, t_end)
        return time_grid(schedule, points, spacing, t_end, t_start)

    def heun_calls(times):  # two per step, one for a step from ᾱ = 0, one for x_0
        no_signal = int((schedule.lam(times)[:-1] == -math.inf).sum())
        return 2 * (len(times) - 1) - no_signal + denoise_to_zero

    if isinstance(spacing, Tensor):
        return check_time_grid(spacing, schedule.T), nfe
    if sampler != "heun":
        return grid(int(nfe) + (not denoise_to_zero)), nfe
    times = grid((int(nfe) - denoise_to_zero) // 2 + 1)
    while schedule.lam(times[0]) == -math.inf and heun_calls(grid(len(times) + 1)) <= nfe:
        times = grid(len(times) + 1)
    if heun_calls(times) == 0:
        raise ValueError(f"--nfe {nfe} is too small for heun, which needs two calls: use 2")
    return times, heun_calls(times)


def check_time_grid(times: Tensor, T: int) -> Tensor:
    """Check a grid -> float64 on the CPU. ValueError: not strictly falling times in (0, T]."""
    times = times.double().cpu()
    if times.dim() != 1 or not len(times) or (times.diff() >= 0).any() or not (
            0 < times[-1] <= times[0] <= T):
        raise ValueError(f"the times of a grid must fall strictly and lie in (0, {T}]")
    return times


def singlestep_plan(schedule: Schedule, times: Tensor, order: int,
                    equal: bool = False) -> tuple[Tensor, list[int]]:
    """(times, orders) for dpm_solver(): an update of order o spans o steps and costs o calls.

    As many updates of full order as fit, then the rest: 10 steps are 3 + 3 + 3 + 1 (9: 3 + 3 + 2 +
    1). Inner points are grid points. With `equal`, times are new: updates, and parts of one, are
    equally long in λ.
    An update in which λ stands still (ᾱ = 0, clipped log SNR) becomes steps of order 1.
    """
    no_signal = int((schedule.lam(times)[:-1] == -math.inf).sum())
    full, rest = divmod(len(times) - 1 - no_signal, order)
    orders = [1] * no_signal + [order] * full + [rest] * (rest > 0)
    if order == 3 and full and not rest:
        orders[-1:] = [2, 1]  # as DPM-Solver-fast does
    if equal and orders:
        outer = time_grid(schedule, len(orders) + 1, "logsnr", times[-1].item(), times[0].item())
        parts = [outer[:1]]  # the start, then the inner points and the end of each update
        for t, t_next, o in zip(outer[:-1], outer[1:], orders, strict=True):
            lam = torch.lerp(schedule.lam(t), schedule.lam(t_next), torch.arange(1, o).double() / o)
            parts += [schedule.t_of_lam(lam), t_next[None]]
        times = torch.cat(parts)
    moves = (schedule.lam(times).diff() > 0).split(orders)
    return times, [o for m in moves for o in ([len(m)] if m.all() else [1] * len(m))]


def sample_from_seeds(denoiser, seeds: Sequence[int], device: torch.device | str = "cpu",
                      **arguments) -> Tensor:
    """Sample one x_0 per seed, a function of that seed alone -> (B, *denoiser.shape). arguments:
    those of sample(). ValueError: the result is not finite (the images would look black)."""
    noise = SeededNoise(seeds, device)  # it gives x first, then the noise that samplers add
    x = initial_std(denoiser.schedule, **arguments) * noise((len(seeds), *denoiser.shape))
    x = sample(denoiser, x, noise=noise, **arguments)
    if not x.isfinite().all():
        raise ValueError("the samples are not finite: try other --weights, or another --sampler")
    return x


def initial_std(schedule: Schedule, sampler: str = "ddim", nfe: int = 50,
                spacing: str | Tensor = "uniform", t_end: float = 1.0,
                t_start: float | None = None, denoise_to_zero: bool = True, **others) -> float:
    """The std of x at the first time of sample() with these arguments: about 1; σ with edm."""
    times, _ = grid_for_nfe(schedule, sampler, nfe, spacing, t_end, t_start, denoise_to_zero)
    return schedule.alpha_sigma(times[0])[1].item() if schedule.variance_exploding else 1.0


def initial_time(denoiser) -> int:
    """The largest t to start from: T, or T − 1 if ᾱ(T) = 0 and ε-prediction gives no x_0 there."""
    T, needs_signal = denoiser.schedule.T, getattr(denoiser, "prediction", None) == "eps"
    return T - int(needs_signal and denoiser.schedule.alpha_bar(T) == 0)


@dataclass
class SamplerConfig:
    """The flags of sample.py and metrics.py that choose a sampler. (sample() defaults to ddim.)"""

    sampler: str = flag("ddpm", "ddpm removes noise that a briefly trained network leaves; ddim "
                        "does not, but suits few calls", choices=SAMPLERS, group="sampling")
    nfe: int = flag(50, "network calls per image; heun: 2N - 1 for N steps")
    spacing: str = flag("uniform", "times of the calls; remap: uniform in f(t) of a --remap run",
                        choices=(*SPACINGS, "remap"))
    eta: float = flag(0.0, "ddim: share of fresh noise, 0 to 1")
    order: int = flag(3, "dpm-solver: its order", choices=(1, 2, 3))
    variance: str | None = flag(None, "of the fresh noise; large: ddpm only; analytic: from "
                                "papers.covariance; npr, sn: from the run's second head",
                                choices=("small", "large", *ESTIMATED), shown="small")
    churn: float = flag(0.0, "heun: noise that is added and removed again, EDM's S_churn")
    churn_min: float = flag(0.0, "heun: churn only above this noise level")
    churn_max: float = flag(math.inf, "heun: churn only below this noise level", shown="no limit")
    churn_noise: float = flag(1.0, "heun: factor of the churn noise, EDM's S_noise")
    clip: str = flag("auto", "keep the predicted x_0 in the data's range; auto: for ddpm, and ddim "
                     "with fresh noise", choices=("auto", "on", "off"))
    precision: str = flag("fp32", "of the networks; tf32 (on GPUs) and bf16 are faster, and round",
                          ("fp32", "tf32", "bf16"))
    device: str = device_flag()
    compile: bool = flag(False, "torch.compile the networks: takes a minute at the start")
    deterministic: bool = flag(False, "repeat results bit for bit on GPUs too, but more slowly")
    weights: str = flag("ema", "averaged (ema) or last (raw) weights", choices=("ema", "raw"))
    given: ClassVar[frozenset] = frozenset()  # flags on the command line: support.cli sets it

    def check(self) -> None:
        """ValueError that begins with the flag: out of range, or without effect."""
        churn = ("churn", "churn_min", "churn_max", "churn_noise")
        used = {"ddpm": ("variance",), "ddim": ("eta", "variance" * (self.variance != "large")),
                "dpm-solver": ("order",), "dpm-solver++": (), "heun": churn}.get(self.sampler)
        if used is None:
            raise ValueError(f"--sampler must be one of {' '.join(SAMPLERS)}, not {self.sampler!r}")
        if not (callable(self.variance) or self.variance in (None, "small", "large", *ESTIMATED)):
            raise ValueError(f"--variance {self.variance!r}: use small, large or a function")
        for name, low, high in (("nfe", 1, 100_000), ("order", 1, 3), ("eta", 0, 1),
                                ("churn", 0, 1e9), ("churn_min", 0, 1e9), ("churn_noise", 0, 1e9),
                                ("churn_max", self.churn_min, math.inf)):
            value = getattr(self, name)
            if not low <= value <= high or name in ("nfe", "order") and value != int(value):
                raise ValueError(f"{flag_name(name)} must be from {low:g} to {high:g}, not {value}")
        changed = {name for name in ("eta", "variance", "churn") if getattr(self, name)}
        for name in ("eta", "order", "variance", *churn):
            if name in self.given | changed and name not in used:
                raise ValueError(f"{flag_name(name)} has no effect on {self.sampler}: leave it out")
            if name in self.given and name in churn and not self.churn:
                raise ValueError(f"{flag_name(name)} has no effect without --churn above 0")

    def grid(self, denoiser) -> tuple[Tensor, int]:
        """(times, network calls) for this run."""
        spacing = self.spacing
        if spacing == "remap" and (spacing := getattr(denoiser, "sampling_grid", None)) is None:
            raise ValueError("--spacing remap needs a run of --remap: choose another spacing")
        return grid_for_nfe(denoiser.schedule, self.sampler, self.nfe, spacing,
                            t_start=initial_time(denoiser))

    def arguments(self, denoiser) -> dict:
        """The arguments of sample(). It makes the grid again. ValueError: flags that do not fit."""
        (times, nfe), variance = self.grid(denoiser), self.variance
        # Fresh noise at every step also moves x̂_0 out of the data's range: without the clip, the
        # colours of all images can drift. EDM's churn settings were tuned without a clip.
        noisy = self.sampler == "ddpm" or self.eta > 0 or variance not in (None, "small")
        clip = denoiser.value_range if self.clip == "on" or self.clip == "auto" and noisy else None
        if self.clip == "on" and clip is None:
            raise ValueError("--clip on: latents have no range to clip to; use --clip off")
        if variance in ESTIMATED:
            variance = importlib.import_module("papers.covariance").variance_from_run(
                denoiser, variance, self.sampler == "ddpm", self.eta)
        return dict(sampler=self.sampler, nfe=nfe, eta=self.eta, order=self.order, clip=clip,
                    variance=variance, spacing=times if self.spacing == "remap" else self.spacing,
                    t_start=initial_time(denoiser), s_churn=self.churn, s_min=self.churn_min,
                    s_max=self.churn_max, s_noise=self.churn_noise)

    def warnings(self, denoiser) -> list[str]:
        """Lines about what one may not expect of these flags."""
        (times, calls), steps = self.grid(denoiser), self.nfe - 1
        lines = [UNUSED_CALL.format(calls, self.nfe)] * (calls != self.nfe)
        if (start := initial_time(denoiser)) < denoiser.schedule.T:
            lines.append(f"sampling begins at t = {start}: at T, eps gives no x_0")
        if steps == 0:
            lines += [f"{flag_name(name)} has no effect: a single network call makes no step"
                      for name in ("spacing", "eta", "order", "variance") if name in self.given]
        elif self.sampler == "dpm-solver":
            top = max(singlestep_plan(denoiser.schedule, times, self.order)[1])
            lines += [f"--order {self.order} needs more calls: with --nfe {self.nfe} the highest "
                      f"order is {top}"] * (top < self.order)
        return lines
