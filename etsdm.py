r"""Time conditions: what the network is told about t. E-TSDM's shared timesteps, and the remaps it
is compared with.

    net(x_t, f(t)),   f a *time condition*; the noise level in x_t and every schedule coefficient stay those of t.

E-TSDM (Yang et al., ICLR 2024): near t = 0 the slope of the ideal network in t is infinite
(theorem 3.1), because eps*(x, t) = -s score(x, t) and ds/dt -> infinity. So on [0, interval) time
is cut into n equal sub-intervals and the network is told only where the present one begins
(algorithms A1, A2):

    f(t) = max{ t_i : t_i <= t },  t_i = i interval/n,   for t < interval;      f(t) = t  from there on

          f(t)                       interval = 100, n = 5: all of t = 0..19 is called 0, all of 20..39 is called 20
      100 |            /             Inside a sub-interval the network's slope in t is exactly 0; the price is an
       80 |       ____/              error that falls like 1/n (theorem 4.1).
       40 |   ____
        0 |___________ t

A remap is the alternative the paper tries instead (tables A3 to A5): an invertible f that
stretches small t.

What this file does not do: it never sees x, and no sampler knows that it exists: a condition lives
in the Denoiser.

    python train.py --etsdm                       python train.py --remap sqrt

t in [0, T], c = f(t) the condition, interval the length of the shared range (the paper's t with a
tilde), n its parts.
"""

import math

import torch

REMAPS = ("sqrt", "inverse-sigmoid")
MARGIN = 1e-3  # inverse-sigmoid: how close to the poles of logit the ends of [0, T] are mapped from


def share_timesteps(t, interval=100, n=5):
    r"""E-TSDM's f(t): t, a number or tensor of any shape -> tensor of the same shape.

    Keeps t's dtype, except that integer t with non-integer boundaries gives float64 (as does a
    plain number). ValueError: n < 1 or interval <= 0.
    """
    if n < 1 or int(n) != n or interval <= 0:
        raise ValueError(f"E-TSDM needs interval > 0 and a whole number n >= 1, not interval={interval}, n={n}")
    t = torch.as_tensor(t) if isinstance(t, torch.Tensor) else torch.tensor(t, dtype=torch.float64)
    starts = torch.arange(int(n), dtype=torch.float64, device=t.device) * interval / n
    if t.is_floating_point():
        starts = starts.to(t.dtype)  # compare in t's own precision, so that f(f(t)) = f(t)
    # Look boundaries up instead of computing floor(t n/interval): the division can land one ulp
    # short of i.
    shared = starts[(torch.searchsorted(starts, t.to(starts.dtype).contiguous(), right=True) - 1).clamp(min=0)]
    if not t.is_floating_point() and bool((starts == starts.floor()).all()):
        shared = shared.to(t.dtype)
    return torch.where(t < interval, shared, t.to(shared.dtype))


def remap(t, name, T=1000):
    r"""An invertible f of [0, T] onto itself that is steep where t is small: t -> float64 tensor
    of the same shape.

    sqrt: f(t) = T sqrt(t/T).   inverse-sigmoid: T (logit(m + (1 - 2m) t/T) + L)/(2L), L = logit(1 - m), m = MARGIN:
    the logistic function's inverse, cut just before its poles. ValueError: unknown name.
    """
    u = torch.as_tensor(t, dtype=torch.float64) / T
    if name == "sqrt":
        return T * u.sqrt()
    if name == "inverse-sigmoid":
        return T * (1 + torch.logit(MARGIN + (1 - 2 * MARGIN) * u) / math.log((1 - MARGIN) / MARGIN)) / 2
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


def make_condition(etsdm=False, interval=100, n=5, remap_name=None, T=1000):
    """The condition that a run's settings ask for: a function t -> c, or None for t itself.

    ValueError where the settings contradict: both at once, an interval beyond T, sub-intervals
    shorter than one step.
    """
    if etsdm and remap_name:
        raise ValueError("--etsdm and --remap are alternatives: both say what the network is told about t")
    if remap_name:
        remap(0.0, remap_name, T)  # an unknown name should fail here, not at the first step
        return lambda t: remap(t, remap_name, T)
    if not etsdm:
        return None
    if interval > T:
        raise ValueError(f"--etsdm-interval {interval} is longer than the {T} timesteps there are")
    if n > interval:
        raise ValueError(f"--etsdm-n {n} cuts {interval} timesteps into parts shorter than a step, which share nothing")
    share_timesteps(0.0, interval, n)
    return lambda t: share_timesteps(t, interval, n)
