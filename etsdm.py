r"""E-TSDM's shared time input: which time value the network receives.

    net(x_t, f(t))        f(t) is the time input; x_t itself, with α and σ, still belongs to t

Yang et al., ICLR 2024: at t = 0 the slope of the ideal network in t is infinite (theorem 3.1),
because ε*(x, t) = −σ · score(x, t) and dσ/dt → ∞. So [0, interval) is cut into n equal parts, and
the network receives the time at which the current part begins (algorithms A1, A2):

    f(t) = max{t_i : t_i <= t},  t_i = i · interval/n,   if t < interval;     f(t) = t  otherwise

     f(t)
      100 |          /
       80 |        __        interval = 100, n = 5: the network receives 0 for all t = 0..19, then
       60 |      __          20 for all t = 20..39, and so on. Inside a part the slope in t is
       40 |    __            exactly 0. The price is an error that falls like 1/n (theorem 4.1).
       20 |  __              Steps are 1..T, so the first part has 19 (programs from 0: 20).
        0 |__________ t

This module never touches x, and no sampler or loss depends on it: the time input is a part of the
Denoiser. Not here: the remaps that the paper compares with (papers/alternatives.py).

    python train.py --etsdm --etsdm-interval 100 --etsdm-n 5

t in [0, T]; interval the length of the shared range (t̃ in the paper); n the number of its parts.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def share_timesteps(t: Tensor | float, interval: float = 100, n: int = 5) -> Tensor:
    r"""E-TSDM's f(t): t, a number or a tensor of any shape -> tensor of the same shape.

    The result has t's dtype, but float64 for a plain number, and for integer t if a boundary is not
    an integer. ValueError: n < 1, or interval <= 0.
    """
    if n < 1 or int(n) != n or interval <= 0:
        raise ValueError("E-TSDM needs an interval > 0 and a whole number n >= 1, "
                         f"not interval={interval}, n={n}")
    if not isinstance(t, Tensor):
        t = torch.tensor(t, dtype=torch.float64)
    starts = torch.arange(int(n), dtype=torch.float64, device=t.device) * interval / n  # t_i
    if t.is_floating_point():
        starts = starts.to(t.dtype)  # compare in t's own precision, so that f(f(t)) = f(t)
    # Look the boundaries up: by rounding, floor(t n/interval) can be i − 1.
    i = torch.searchsorted(starts, t.to(starts.dtype).contiguous(), right=True) - 1
    shared = starts[i.clamp(min=0)]
    if not t.is_floating_point() and all(j * interval / n % 1 == 0 for j in range(int(n))):
        shared = shared.to(t.dtype)
    return torch.where(t < interval, shared, t.to(shared.dtype))


def make_time_input(interval: float = 100, n: int = 5) -> Callable[[Tensor], Tensor]:
    """The time input of an E-TSDM network: a function t -> f(t), for Denoiser(time_input=...)."""
    return lambda t: share_timesteps(t, interval, n)


def check_sharing(interval: float, n: int, T: int = 1000) -> None:
    """ValueError that begins with the flag: --etsdm-interval or --etsdm-n is out of range."""
    if not (math.isfinite(interval) and 0 < interval <= T):
        raise ValueError(f"--etsdm-interval must be above 0 and at most {T} timesteps, "
                         f"not {interval}")
    if int(n) != n or not 1 <= n <= interval:
        raise ValueError(f"--etsdm-n must be a whole number from 1 to {interval:g}, not {n}: each "
                         "part needs at least one timestep")
