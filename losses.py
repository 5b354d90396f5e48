r"""Training losses: DDPM's, SA-DPM's for any k, EDM's.

    L = L_simple + weight · L_SA                                           SA-DPM, algorithm 2
    L_simple = E‖r_0‖²,   L_SA = E‖(1/k) Σ_{i<k} r_i‖²,   r_i = ε_i − ε_θ(x_{t−i}, t − i)

Why a second term: the error at the end of a sampling run is a weighted *sum* of the errors of its
steps: Σ_t w_t for t = 2..T, with w_t = τ_t e_t, e_t the error of ε_θ, and τ_t a weight that follows
from the schedule (theorem 1, gap.py). L_simple makes each error small, but neighbours may still add
up. Theorem 2 bounds the sum by windows of k neighbours, and this is tighter than N Σ_t ‖w_t‖²:

    ‖Σ_t w_t‖² <= (N/k²) Σ_s ‖w_s + … + w_{s−k+1}‖² <= N Σ_t ‖w_t‖²,   N = T + k − 2 windows

L_SA follows this idea, but it is not that bound: it has no τ_t, its noises are independent, its x_t
come from x_0 and not from sampling, and it cuts windows at the low end (tutorial.ipynb, chapter 4).

The ideal network ε* does not minimise L_SA. The paper does not mention this. The k noises are
independent, but x_0 is the same. So the part of r_i from x_0 adds up over the k steps, and its part
from ε_i averages out: in L_SA, the first counts k times as much as the second. On Gaussian data,
the network that minimises L is the ideal network for data whose variance is larger by the factor
(1 + weight)/(1 + weight/k): 4/3 for k = 2 and weight 1 (tests/test_theory.py). The variance of
samples of trained runs is also larger, by nearly this factor. DDIM in few steps gives too small a
variance, so it gains from this (docs/lab-notebook.md).

Two choices that the paper leaves open:

  * Each x_{t−i} has its own noise ε_i: k noisy copies of an image, not k points of a trajectory.

  * L_SA is a residual of ε for every prediction type, because the theory is about ε. L_simple in ε
    is α² times the loss in v for v-prediction: if α = 0 (t = T of zero-terminal-snr), the network
    learns nothing at that t. So train.py measures L_simple in the space of the prediction, unless
    --loss-space (here `space`) names another.

Not here: the mean over a batch, precision, processes (train.py); losses of networks with a second
output (papers/heads.py); the variants DDPM-r and SA-reuse (papers/alternatives.py).

    python train.py --sa-k 2 --sa-weight 1.0

B images, k consecutive steps; x0 in [-1, 1]; t (B,) in (0, T], may stay on the CPU; noises (k, B,
...); a loss is (B,), the mean over C, H, W.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from config import LOSS_SPACES
from denoiser import Denoiser
from schedules import Schedule, add_noise, expand


def simple_loss(denoiser: Denoiser, x0: Tensor, t: Tensor, noise: Tensor,
                space: str = "eps") -> Tensor:
    """DDPM eq. 14: x0 (B, ...), t (B,), noise like x0 -> loss of each image (B,)."""
    xt = add_noise(denoiser.schedule, x0, t, noise)
    x0_hat, eps_hat = denoiser.predict(xt, t)
    return mean_square(residual_in(space, denoiser, noise - eps_hat, x0 - x0_hat, t))


def sa_loss(denoiser: Denoiser, x0: Tensor, t: Tensor, noises: Tensor,
            space: str = "eps") -> tuple[Tensor, Tensor]:
    """SA-DPM, algorithm 2 -> (L_simple (B,), L_SA (B,)), from one forward pass over k B images.

    noises (k, B, ...): noises[0] belongs to t, and both losses use it. The sum omits terms with
    t − i < 1; the divisor stays k. With k = 1, L_SA is L_simple in ε.
    """
    k, B = noises.shape[:2]
    ts, valid = consecutive_times(t, k)  # (k, B): t, t − 1, ...
    repeated = x0.repeat(k, *[1] * (x0.dim() - 1))  # (k B, ...)
    xt = add_noise(denoiser.schedule, repeated, ts.flatten(), noises.flatten(0, 1))
    x0_hat, eps_hat = (p.unflatten(0, (k, B)) for p in denoiser.predict(xt, ts.flatten()))

    r = noises - eps_hat  # (k, B, ...)
    simple = mean_square(residual_in(space, denoiser, r[0], x0 - x0_hat[0], t))
    mask = expand(valid.flatten(), repeated).unflatten(0, (k, B))  # (k, B, 1, 1, 1)
    sa = mean_square((r * mask).sum(0) / k)
    return simple, sa


def consecutive_times(t: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """t (B,) -> (times t − i (k, B), valid (k, B)). If t − i < 1, such a step does not exist: the
    time is then t, and valid is False."""
    times = t - torch.arange(k, device=t.device)[:, None]
    valid = times >= 1
    valid[0] = True  # a continuous t may be below 1: then only t itself counts
    return torch.where(valid, times, t), valid


def mean_square(r: Tensor) -> Tensor:
    """(B, ...) -> (B,): the mean of the squares over C, H, W."""
    return r.square().flatten(1).mean(1)


def residual_in(space: str, denoiser: Denoiser, eps: Tensor, x0: Tensor, t: Tensor) -> Tensor:
    """Residuals of ε and x_0, (B, ...) -> the residual in one of LOSS_SPACES, (B, ...)."""
    if space in ("eps", "x0"):
        return eps if space == "eps" else x0
    alpha, sigma = denoiser.schedule.alpha_sigma(t)
    if space == "v":  # v = α ε − σ x_0; the residuals obey the same formula
        return expand(alpha, x0) * eps - expand(sigma, x0) * x0
    if space == "edm":  # EDM's F; factor² = (s² + d²)/(s d)²: EDM's weight, s = σ/α, d = data_std
        return expand(denoiser.marginal_std(t) / (sigma * denoiser.data_std), x0) * x0
    raise ValueError(f"unknown loss space {space!r}: choose from {' '.join(LOSS_SPACES)}")


def time_range(schedule: Schedule, prediction: str) -> tuple[float, int]:
    """(lowest, highest) t to train on: 1..T. Continuous time begins at T/1e5, since σ = 0 at t = 0.

    If ᾱ(T) = 0, ε at T does not determine x_0: eps-prediction then ends at T − 1.
    """
    skip = int(prediction == "eps" and schedule.alpha_bar(schedule.T) == 0)
    return (schedule.T / 1e5 if schedule.continuous else 1), schedule.T - skip


def lognormal_times(u: Tensor, schedule: Schedule, low: float, high: float) -> Tensor:
    """EDM, table 1: u uniform on [0, 1] -> t with ln(σ/α) ~ N(−1.2, 1.2²), within [low, high]."""
    return schedule.t_of_lam(1.2 - 1.2 * torch.special.ndtri(u)).clamp(low, high)


def draw_timesteps(n: int, schedule: Schedule, low: float, high: float,
                   generator: torch.Generator | None = None,
                   quantile: Callable | None = None) -> Tensor:
    """Draw n values of t in low..high, uniform or by `quantile` (u in [0, 1] -> t), antithetic:
    u and 1 − u (t and low + high − t) form a pair, so that noise levels vary less between batches.
    Integers (int64) on a discrete schedule, else float64."""
    half = (n + 1) // 2
    if quantile is not None:
        u = torch.rand(half, dtype=torch.float64, generator=generator)
        t = quantile(torch.stack([u, 1 - u], dim=1).flatten()[:n])
        return t if schedule.continuous else t.round().long()
    if schedule.continuous:
        t = low + (high - low) * torch.rand(half, dtype=torch.float64, generator=generator)
    else:
        t = torch.randint(int(low), int(high) + 1, (half,), generator=generator)
    return torch.stack([t, low + high - t], dim=1).flatten()[:n]
