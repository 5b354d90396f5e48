r"""Training losses: DDPM's simple loss, and SA-DPM's sequence-aware loss for any k.

    L = L_simple + weight · L_SA                                           SA-DPM, algorithm 2
    L_simple = E‖r_0‖²,   L_SA = E‖(1/k) Σ_{i<k} r_i‖²,   r_i = ε_i − ε_θ(x_{t−i}, t − i)

Why a second term: the error at the end of a sampling run is a weighted *sum* of the errors of its
steps, Σ_t τ_t r(t), with weights τ_t that follow from the schedule (theorem 1). L_simple makes
every r(t) small, but does not care whether neighbours add up or cancel; L_SA is about the sum of
k neighbours, and bounds the total more tightly (theorem 2).

The paper does not say that ε* is not where L_SA is least. The k noises are independent but x_0 is
the same, so the part of the error that x_0 causes adds up over the window, while the part that
noise causes averages out: the first counts k times as much. On Gaussian data the least value of
L belongs to the ideal network of data whose variance is (1 + weight)/(1 + weight/k) times as large,
4/3 for k = 2 and weight 1 (tests/test_theory.py), and samples of real runs vary more, too, by
nearly as much. DDIM in few steps, which spreads too little, gains by it (NOTES.md).

Two choices the code shows and the paper leaves open:

  * x_{t−i} has its own, independent noise ε_i: one image at k noise levels, not one trajectory.

  * Both losses are residuals of ε whatever the network predicts, because the theory is about ε.
    With v-prediction that is a² times the plain loss in v, and where a = 0 (t = T of
    zero-terminal-snr) nothing at all would be learnt. So L_simple can be measured in another space
    (`space`, train.py --loss-space); L_SA stays in ε.

What this file does not do: average over the batch, or know of precision, processes and EMA
(train.py).

    python train.py --sa-k 2 --sa-weight 1.0

B images, k consecutive steps; x0 in [-1, 1]; t (B,) in (0, T]; noises (k, B, ...); a loss is (B,),
the mean over C, H, W.
"""

import torch

from schedules import diffuse, match

SPACES = ("eps", "x0", "v")


def simple_loss(denoiser, x0, t, noise, space="eps"):
    """DDPM eq. 14: x0 (B, ...), t (B,), noise like x0 -> loss of each image (B,)."""
    return sa_loss(denoiser, x0, t, noise[None], space)[0]


def sa_loss(denoiser, x0, t, noises, space="eps"):
    r"""(L_simple (B,), L_SA (B,)) from ONE forward pass: the k noise levels lie on the batch axis.

    noises (k, B, ...): noises[0] belongs to t, and both losses share it. With k = 1, L_SA is
    L_simple in ε. Terms with t − i < 1 are left out of the sum; its divisor stays k.
    """
    k, B = noises.shape[:2]
    steps = torch.arange(k, device=t.device)[:, None]
    exists = t - steps >= 1  # (k, B)
    exists[0] = True  # real t below 1 (continuous time) is trained on; it has no predecessor
    ts = torch.where(exists, t - steps, t).flatten()  # a missing term fills its place, and counts 0

    repeated = x0.repeat(k, *[1] * (x0.dim() - 1))  # (k B, ...)
    xt = diffuse(denoiser.schedule, repeated, ts, noises.flatten(0, 1))
    x0_hat, eps_hat = (p.unflatten(0, (k, B)) for p in denoiser.predict(xt, ts))  # (k, B, ...)

    r = noises - eps_hat
    counts = match(exists.flatten(), repeated).unflatten(0, (k, B))  # (k, B, 1, 1, 1)
    window = (r * counts).sum(0) / k
    if space == "eps":
        plain = r[0]
    elif space == "x0":
        plain = x0 - x0_hat[0]
    elif space == "v":  # v = a ε − s x_0, and so is its residual
        a, s = (match(c, x0) for c in denoiser.schedule.coefficients(t))
        plain = a * r[0] - s * (x0 - x0_hat[0])
    else:
        raise ValueError(f"unknown loss space {space!r}: choose from {' '.join(SPACES)}")
    return plain.square().flatten(1).mean(1), window.square().flatten(1).mean(1)


def time_range(schedule, prediction):
    """(lowest, highest) t to train on: 1..T, or from T/1e5 in continuous time, since s = 0 at 0.

    Where ᾱ(T) = 0 there is no trace of x_0 in x_T, and no x_0 in ε: ε-prediction ends at T − 1.
    """
    skip = int(prediction == "eps" and schedule.alpha_bar(schedule.T) == 0)
    return (schedule.T / 1e5 if schedule.continuous else 1), schedule.T - skip


def draw_timesteps(n, schedule, low, high, generator=None):
    """n times uniform on low..high, antithetic: t and low + high − t come in pairs, which evens out
    the mix of noise levels in a batch. Integers (int64) on a discrete schedule, else float64."""
    half = (n + 1) // 2
    if schedule.continuous:
        t = low + (high - low) * torch.rand(half, dtype=torch.float64, generator=generator)
    else:
        t = torch.randint(int(low), int(high) + 1, (half,), generator=generator)
    return torch.stack([t, low + high - t], dim=1).flatten()[:n]
