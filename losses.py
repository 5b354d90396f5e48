r"""Training losses: DDPM's simple loss, and SA-DPM's sequence-aware loss for any k.

    L = L_simple + weight L_SA                                                          SA-DPM, algorithm 2
    L_simple = E || r_0 ||^2,    L_SA = E || (1/k) sum_{i<k} r_i ||^2,    r_i = eps_i - eps_theta(x_{t-i}, t - i)

Why a second term: the error at the end of a sampling run is the *sum* of the steps' errors, sum_t
tau_t e_t (theorem 1, gap.py). L_simple makes each e_t small but does not care whether neighbours
add up or cancel; L_SA penalises the sum of k neighbours, which bounds the total more tightly
(theorem 2).

Two choices that the code shows and the paper leaves open:
  * x_{t-i} uses its own independent noise eps_i: it is one image at k noise levels, not one
  trajectory. * Both losses are residuals of eps whatever the network predicts, because the theory
  is about eps. With
    v-prediction that weighs the plain v-loss by a^2 and leaves nothing at all to learn where a = 0
    (t = T of zero-terminal-snr); so the *plain* loss can be measured in another space (`space`,
    --loss-space).

What this file does not do: average over the batch, or know about EMA, processes and precision
(train.py).

    torchrun train.py --sa-k 2 --sa-weight 1.0

B images, k consecutive steps; x0 in [-1, 1]; t (B,) in (0, T]; noises (k, B, ...); losses (B,),
mean over C, H, W.
"""

import torch

from schedules import diffuse, match

SPACES = ("eps", "x0", "v")


def simple_loss(denoiser, x0, t, noise, space="eps"):
    """DDPM eq. 14, per image: x0 (B, ...), t (B,), noise like x0 -> (B,)."""
    return sa_loss(denoiser, x0, t, noise[None], space)[0]


def sa_loss(denoiser, x0, t, noises, space="eps"):
    r"""(L_simple (B,), L_SA (B,)), from ONE forward pass over the k noise levels laid along the
    batch axis.

    noises (k, B, ...): noises[0] belongs to t and is shared by both losses. k = 1 gives L_SA =
    L_simple (in eps). Terms with t - i < 1 are left out of the sum, and its divisor stays k.
    """
    k, B = noises.shape[:2]
    steps = torch.arange(k, device=t.device)[:, None]
    exists = t - steps >= 1  # (k, B)
    exists[0] = True  # real t below 1 (continuous time) is trained on too; it only has no predecessor
    ts = torch.where(exists, t - steps, t)  # a missing term still fills its place in the batch, then counts 0

    xt = diffuse(denoiser.schedule, x0.repeat(k, *[1] * (x0.dim() - 1)), ts.flatten(), noises.flatten(0, 1))
    x0_hat, eps_hat = (p.unflatten(0, (k, B)) for p in denoiser.predict(xt, ts.flatten()))  # (k, B, ...)

    r = noises - eps_hat
    window = (r * match(exists.flatten(), r.flatten(0, 1)).unflatten(0, (k, B))).sum(0) / k
    if space == "eps":
        plain = r[0]
    elif space == "x0":
        plain = x0 - x0_hat[0]
    elif space == "v":  # v = a eps - s x0, so its residual is the same combination of theirs
        a, s = (match(c, x0) for c in denoiser.schedule.coefficients(t))
        plain = a * r[0] - s * (x0 - x0_hat[0])
    else:
        raise ValueError(f"unknown loss space {space!r}: choose from {' '.join(SPACES)}")
    return plain.square().flatten(1).mean(1), window.square().flatten(1).mean(1)


def time_range(schedule, prediction):
    """(lowest, highest) t to train on. Discrete: 1..T. Continuous: from T/1e5 on, since s = 0 at t
    = 0.

    Where alpha_bar(T) = 0, x_T holds no trace of x_0 and eps-prediction has nothing to say about
    it: T - 1 is the end.
    """
    blind = prediction == "eps" and bool(schedule.alpha_bar(schedule.T) == 0)
    return (schedule.T / 1e5 if schedule.continuous else 1), schedule.T - blind


def draw_timesteps(n, schedule, low, high, generator=None):
    """n times uniform on low..high, antithetic: t and low + high - t come in pairs, which halves
    the loss's variance over t. Integers (int64) on a discrete schedule, real (float64) on a
    continuous one."""
    half = (n + 1) // 2
    if schedule.continuous:
        t = low + (high - low) * torch.rand(half, dtype=torch.float64, generator=generator)
    else:
        t = torch.randint(int(low), int(high) + 1, (half,), generator=generator)
    return torch.stack([t, low + high - t], dim=1).flatten()[:n]
