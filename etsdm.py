r"""Time conditions: what the network is told about t. E-TSDM's shared timesteps, and the remaps.

    net(x_t, f(t)):   f is the time condition; the noise in x_t, and a and s, stay those of t itself

E-TSDM (Yang et al., ICLR 2024): near t = 0 the slope of the ideal network in t is infinite (theorem
3.1), because ε*(x, t) = −s score(x, t) and ds/dt → ∞. So [0, interval) is cut into n equal parts,
and the network is told only where the present part begins (algorithms A1, A2):

    f(t) = max{t_i : t_i <= t},  t_i = i · interval/n,   for t < interval;     f(t) = t  beyond it

     f(t)
      100 |          /
       80 |        __        interval = 100, n = 5: the network is told 0 for all of t = 0..19, then
       60 |      __          20 for all of t = 20..39, and so on. Inside a part its slope in t is
       40 |    __            exactly 0; the price is an error that falls like 1/n (theorem 4.1).
       20 |  __
        0 |__________ t

A remap is an alternative that the paper compares with (tables A3 to A5): tell the network an
invertible f(t) that stretches small t. Those tables have four strategies: training draws t, and
sampling steps through t, equally either in t or in f(t); remap_quantile() is what both ask.

What this file does not do: see x. And no sampler or loss knows of it: a condition is a value that
lives in the Denoiser.

    python train.py --etsdm                  python train.py --remap sqrt

t in [0, T]; c = f(t) the condition; interval the length of the shared range (t̃ in the paper), n the
number of its parts.
"""

import math

import torch

REMAPS = ("sqrt", "inverse-sigmoid")
MARGIN = 1e-3  # inverse-sigmoid: how near to the poles of logit the ends of [0, T] come


def share_timesteps(t, interval=100, n=5):
    r"""E-TSDM's f(t): t, a number or a tensor -> tensor of the same shape.

    Keeps t's dtype, except that integer t with boundaries that are no integers gives float64, as a
    plain number does. ValueError: n < 1, or interval <= 0.
    """
    if n < 1 or int(n) != n or interval <= 0:
        raise ValueError("E-TSDM needs an interval > 0 and a whole number n >= 1, "
                         f"not interval={interval}, n={n}")
    if not isinstance(t, torch.Tensor):
        t = torch.tensor(t, dtype=torch.float64)
    starts = torch.arange(int(n), dtype=torch.float64, device=t.device) * interval / n
    if t.is_floating_point():
        starts = starts.to(t.dtype)  # compare in t's own precision, so that f(f(t)) = f(t)
    # Boundaries are looked up, not computed as floor(t n/interval): that can land one short of i.
    i = torch.searchsorted(starts, t.to(starts.dtype).contiguous(), right=True) - 1
    shared = starts[i.clamp(min=0)]
    if not t.is_floating_point() and all(j * interval / n % 1 == 0 for j in range(int(n))):
        shared = shared.to(t.dtype)
    return torch.where(t < interval, shared, t.to(shared.dtype))


def remap(t, name, T=1000):
    r"""An invertible f of [0, T] onto itself, steep at small t: t -> float64 of the same shape.

    sqrt              T √u,  u = t/T
    inverse-sigmoid   T (1 + logit(m + (1 − 2m) u)/logit(1 − m))/2,  m = MARGIN: the inverse of the
                      logistic function, cut just before its poles; t beyond T (Heun's churn on
                      EDM's schedule) counts as T
    ValueError: unknown name.
    """
    u = torch.as_tensor(t, dtype=torch.float64) / T
    if name == "sqrt":
        return T * u.sqrt()
    if name == "inverse-sigmoid":
        logit = torch.logit(MARGIN + (1 - 2 * MARGIN) * u.clamp(max=1))
        return T * (1 + logit / math.log((1 - MARGIN) / MARGIN)) / 2
    raise ValueError(f"unknown remap {name!r}: choose from {' '.join(REMAPS)}")


def unremap(c, name, T=1000):
    """The inverse of remap: the t for which the network is told c."""
    w = torch.as_tensor(c, dtype=torch.float64) / T
    if name == "sqrt":
        return T * w**2
    if name == "inverse-sigmoid":
        p = torch.sigmoid((2 * w - 1) * math.log((1 - MARGIN) / MARGIN))
        return T * (p - MARGIN) / (1 - 2 * MARGIN)
    raise ValueError(f"unknown remap {name!r}: choose from {' '.join(REMAPS)}")


def remap_quantile(u, name, low, high, T=1000):
    """u in [0, 1], a number or a tensor -> the t, from low to high, at the fraction u of the way
    from f(low) to f(high): uniform u give t with f(t) uniform, equal steps in u equal steps in
    f(t)."""
    ends = remap(torch.tensor([low, high], dtype=torch.float64), name, T).tolist()
    u = torch.as_tensor(u, dtype=torch.float64)
    return unremap(ends[0] + u * (ends[1] - ends[0]), name, T)


def make_condition(etsdm=False, interval=100, n=5, remap_name=None, T=1000):
    """The condition that a run's settings ask for: a function t -> c, or None for t itself.

    ValueError where they contradict: both at once, an interval beyond T, parts below one step.
    """
    if etsdm and remap_name:
        raise ValueError("--etsdm and --remap are alternatives: both say what the network is told")
    if remap_name:
        remap(0.0, remap_name, T)  # an unknown name should fail here, not at the first step
        return lambda t: remap(t, remap_name, T)
    if not etsdm:
        return None
    if not math.isfinite(interval):
        raise ValueError(f"--etsdm-interval must be a number of timesteps, not {interval}")
    if interval <= 0:
        raise ValueError(f"--etsdm-interval must be above 0, not {interval:g}")
    if n < 1 or int(n) != n:
        raise ValueError(f"--etsdm-n must be a whole number of parts, at least 1, not {n}")
    if interval > T:
        raise ValueError(f"--etsdm-interval {interval:g} is longer than the {T} timesteps")
    if n > interval:
        raise ValueError(f"--etsdm-n {n} cuts {interval:g} timesteps into parts shorter than a "
                         "step, which share nothing")
    return lambda t: share_timesteps(t, interval, n)
