r"""Training losses: DDPM's, SA-DPM's for any k, DDPM-r's penalty, NPR- and SN-DPM's, EDM's.

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

E-TSDM compares itself with a penalty on the slope in t, DDPM-r: one x_t, said to be at two times,

    L_slope = E‖net(x_t, f(t)) − net(x_t, f(t'))‖²/(t − t')²,   t' = t + 1          --lipschitz-reg

Two choices the code shows and the paper leaves open:

  * x_{t−i} has its own, independent noise ε_i: one image at k noise levels, not one trajectory.

  * Both losses are residuals of ε whatever the network predicts, because the theory is about ε.
    With v-prediction that is a² times the plain loss in v, and where a = 0 (t = T of
    zero-terminal-snr) nothing at all would be learnt. So L_simple can be measured in another space
    (`space`, train.py --loss-space); L_SA stays in ε.

What this file does not do: average over the batch, or know of precision, processes and EMA
(train.py).

    python train.py --sa-k 2 --sa-weight 1.0              python train.py --lipschitz-reg 30

B images, k consecutive steps; x0 in [-1, 1]; t (B,) in (0, T]; noises (k, B, ...); a loss is (B,),
the mean over C, H, W.
"""

import torch

import etsdm
from schedules import diffuse, match

SPACES = ("eps", "x0", "v", "edm")
TIMES = ("uniform", "remap", "lognormal")


def simple_loss(denoiser, x0, t, noise, space="eps"):
    """DDPM eq. 14: x0 (B, ...), t (B,), noise like x0 -> loss of each image (B,)."""
    return terms(denoiser, x0, t, noise[None], space)["simple"]


def sa_loss(denoiser, x0, t, noises, space="eps"):
    """(L_simple (B,), L_SA (B,)) from one forward pass; noises (k, B, ...): noises[0] belongs to
    t, and both losses share it."""
    both = terms(denoiser, x0, t, noises, space)
    return both["simple"], both["sa"]


def terms(denoiser, x0, t, noises, space="eps", slope=False, reuse=False):
    r"""{"simple", "sa" and, if asked for, "slope"}, each (B,), from ONE forward pass: the k noise
    levels lie on the batch axis, and behind them, for the slope, x_t once more at another time.

    With k = 1, L_SA is L_simple in ε. Terms with t − i < 1 are left out of the sum; its divisor
    stays k. reuse: L_simple is the mean over all k noise levels, which have been computed anyhow,
    instead of the first alone: k times the noise levels from one image, at no cost.
    """
    k, B = noises.shape[:2]
    steps = torch.arange(k, device=t.device)[:, None]
    exists = t - steps >= 1  # (k, B)
    exists[0] = True  # real t below 1 (continuous time) is trained on; it has no predecessor
    ts = torch.where(exists, t - steps, t).flatten()  # a missing term fills its place, and counts 0

    repeated = x0.repeat(k, *[1] * (x0.dim() - 1))  # (k B, ...)
    xt = diffuse(denoiser.schedule, repeated, ts, noises.flatten(0, 1))
    said = neighbour(t, denoiser.schedule.T)[:B * slope]  # times that x_t is said to have, too
    out = denoiser.output(torch.cat([xt, xt[:len(said)]]), torch.cat([ts, t[:len(said)]]),
                          told=torch.cat([ts, said]))
    x0_hat, eps_hat = (p.unflatten(0, (k, B))
                       for p in denoiser.explain(xt, ts, out[:k * B]))  # (k, B, ...)

    r = noises - eps_hat
    counts = match(exists.flatten(), repeated).unflatten(0, (k, B))  # (k, B, 1, 1, 1)
    found = {"sa": mean_square((r * counts).sum(0) / k)}
    if slope:  # (t − t')² = 1
        found["slope"] = mean_square(out[:B] - out[k * B:])

    n = k if reuse else 1  # noise levels that L_simple counts
    simple = residual(denoiser, r[:n].flatten(0, 1), (x0 - x0_hat[:n]).flatten(0, 1), ts[:n * B],
                      space)
    simple = mean_square(simple).unflatten(0, (n, B)) * exists[:n]
    return {"simple": simple.sum(0) / exists[:n].sum(0), **found}


def mean_square(r):
    """(B, ...) -> (B,): the mean of the squares over C, H, W."""
    return r.square().flatten(1).mean(1)


def residual(denoiser, eps, x0, t, space):
    """The residuals of ε and x_0, (B, ...), as that of another quantity: `space`, of SPACES."""
    if space in ("eps", "x0"):
        return eps if space == "eps" else x0
    a, s = denoiser.schedule.coefficients(t)
    if space == "v":  # v = a ε − s x_0, and so is its residual
        return match(a, x0) * eps - match(s, x0) * x0
    if space == "edm":  # F's: x_0's times r/(s d), whose square is EDM's weight (σ² + d²)/(σ d)²
        return match(denoiser.spread(t) / (s * denoiser.data_std), x0) * x0
    raise ValueError(f"unknown loss space {space!r}: choose from {' '.join(SPACES)}")


def neighbour(t, T):
    """t' of DDPM-r: t + 1, or t − 1 at the upper end. (B,) like t."""
    return torch.where(t + 1 <= T, t + 1, t - 1)


def head_loss(denoiser, x0, t, noise, kind):
    r"""NPR- and SN-DPM: a second head h, behind the prediction, learns a variance   -> (B,)

        npr:  ‖(ε − ε_θ)² − h‖²        sn:  ‖ε² − h‖²          squares are element by element

    The squared error is least at the conditional mean: h = E[(ε − ε_θ)² | x_t], or E[ε² | x_t].
    Only h is told of the loss: ε_θ is a number here.
    """
    xt = diffuse(denoiser.schedule, x0, t, noise)
    prediction, h = denoiser.outputs(xt, t).split(x0.shape[1], dim=1)
    eps_hat = denoiser.explain(xt, t, prediction)[1].detach()
    target = {"npr": noise - eps_hat, "sn": noise}[kind].square()
    return (target - h).square().flatten(1).mean(1)


def time_range(schedule, prediction):
    """(lowest, highest) t to train on: 1..T, or from T/1e5 in continuous time, since s = 0 at 0.

    Where ᾱ(T) = 0 there is no trace of x_0 in x_T, and no x_0 in ε: ε-prediction ends at T − 1.
    """
    skip = int(prediction == "eps" and schedule.alpha_bar(schedule.T) == 0)
    return (schedule.T / 1e5 if schedule.continuous else 1), schedule.T - skip


def time_quantile(times, schedule, low, high, remap=None):
    r"""u in [0, 1] -> t, of the distribution that t is drawn from in training (inverse of its
    distribution function); None: uniform.

        remap       uniform in what the network is told, c = f(t)       E-TSDM, tables A3 to A5
        lognormal   ln σ ~ N(−1.2, 1.2²), σ = s/a                       EDM, table 1
    """
    if times == "remap":
        return lambda u: etsdm.remap_quantile(u, remap, low, high, schedule.T)
    if times == "lognormal":
        return lambda u: schedule.t_of_lam(1.2 - 1.2 * torch.special.ndtri(u)).clamp(low, high)
    return None


def draw_timesteps(n, schedule, low, high, generator=None, quantile=None):
    """n times on low..high, uniform or from `quantile`, antithetic: u and 1 − u (t and
    low + high − t) come in pairs, which evens out the mix of noise levels in a batch. Integers
    (int64) on a discrete schedule, else float64."""
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
