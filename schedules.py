r"""The forward process: how much signal and noise x_t holds, and the time grids of samplers.

    x_t = α x_0 + σ ε,   α = √ᾱ(t),   σ = √(1 − ᾱ(t)),   ε ~ N(0, I)                    DDPM eq. 4

Papers: DDPM (linear), iDDPM (cosine), simple diffusion (cosine-shift), Lin et al. 2024 "Common
Diffusion Noise Schedules and Sample Steps are Flawed" (zero-terminal-snr), Karras et al. 2022 (edm,
α = 1 and σ is its noise level), and E-TSDM (the continuous forms; Modified-NS, the names in -mns).

Time t is a real number in [0, T]. t = 0 is clean data, the integers 1..T are DDPM's steps, and
ᾱ(0) = 1 exactly, so no array of "previous" values is needed. A discrete schedule is a float64 table
of log ᾱ over 0..T, with linear interpolation between integers. A continuous schedule is a closed
form in u = t/T. The logarithm keeps both ends exact: 1 − ᾱ = −expm1(log ᾱ) has all its digits at
t = 1e-9, and log 0 is −∞. With edm, x_t is the usual x_t of the same SNR, divided by √ᾱ. Only
alpha_sigma(), step_variances() and samplers.initial_std() depend on this.

Not here: the network's time input (etsdm.py), reverse steps (samplers.py).

    python -c "import schedules; print(schedules.make_schedule('cosine').alpha_sigma(500))"
    python -m papers.figures schedules      # log SNR over t, and E-TSDM's figures A8, A9

ᾱ (alpha_bar) signal power; λ (lam) = log(α/σ), half the log signal-to-noise ratio (SNR);
β_t = 1 − ᾱ(t)/ᾱ(t−1); β̃ (beta_tilde) the variance of q(x_next | x_t, x_0). All values are float64
until they multiply x.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

SCHEDULES = ("linear", "quadratic", "cosine", "cosine-shift", "zero-terminal-snr",
             "linear-mns", "quadratic-mns", "cosine-mns", "edm")
SPACINGS = ("uniform", "quadratic", "logsnr", "leading")
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # EDM's noise levels at t = 1 and t = T
Form = tuple[Callable, Callable]  # (log ᾱ, its inverse), functions of a float64 tensor


class Schedule:
    """ᾱ and related quantities as functions of t in [0, T]. t is a number or a tensor of any shape;
    the result is float64 of that shape. make_schedule() builds a Schedule.

    variance_exploding   α = 1 (edm) instead of α² + σ² = 1: x, α and σ are divided by √ᾱ. λ, its
                         inverse and ᾱ = 1/(1 + σ²) depend only on the SNR and stay the same
    """

    def __init__(self, name, T, continuous, log_alpha_bar, inverse, variance_exploding=False):
        self.name, self.T, self.continuous = name, T, continuous
        self._log_alpha_bar, self._inverse = log_alpha_bar, inverse
        self.variance_exploding = variance_exploding

    def log_alpha_bar(self, t: Tensor | float) -> Tensor:
        return self._log_alpha_bar(torch.as_tensor(t, dtype=torch.float64))

    def alpha_bar(self, t: Tensor | float) -> Tensor:
        return self.log_alpha_bar(t).exp()

    def alpha_sigma(self, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """(α, σ) with x_t = α x_0 + σ ε."""
        log_ab = self.log_alpha_bar(t)
        alpha, sigma = (log_ab / 2).exp(), (-torch.expm1(log_ab)).sqrt()
        if self.variance_exploding:
            return torch.ones_like(alpha), sigma / alpha
        return alpha, sigma

    def lam(self, t: Tensor | float) -> Tensor:
        """λ = log(α/σ): +∞ at t = 0, −∞ if ᾱ = 0."""
        log_ab = self.log_alpha_bar(t)
        return (log_ab - torch.log(-torch.expm1(log_ab))) / 2

    def t_of_lam(self, lam: Tensor | float) -> Tensor:
        """The time at which log(α/σ) = λ. There ᾱ = 1/(1 + exp(−2λ)), and log ᾱ has an inverse."""
        lam = torch.as_tensor(lam, dtype=torch.float64)
        return self._inverse(-torch.logaddexp(-2 * lam, torch.zeros_like(lam)))

    def step_variances(self, t: Tensor | float, t_next: Tensor | float) -> tuple[Tensor, Tensor]:
        r"""(β, β̃) of a step t -> t_next < t of any length:

        β = Var q(x_t | x_next) = 1 − ᾱ_t/ᾱ_next                                    DDPM eq. 2
        β̃ = Var q(x_next | x_t, x_0) = β (1 − ᾱ_next)/(1 − ᾱ_t)                      DDPM eq. 7
        variance exploding, of x/√ᾱ: β = σ_t² − σ_next² and β̃ = β σ_next²/σ_t²
        """
        log_t, log_next = self.log_alpha_bar(t), self.log_alpha_bar(t_next)
        # Equal values: a step of length 0. If ᾱ = 0 at both ends, the difference would be ∞ − ∞.
        beta = torch.where(log_t == log_next, 0.0, -torch.expm1(log_t - log_next))
        beta_tilde = beta * torch.expm1(log_next) / torch.expm1(log_t)
        if self.variance_exploding:
            return beta / log_t.exp(), beta_tilde / log_next.exp()
        return beta, beta_tilde


def make_schedule(name: str, T: int = 1000, continuous: bool = False, image_size: int = 32,
                  betas: tuple[float, float] = (1e-4, 0.02)) -> Schedule:
    r"""Build the Schedule of this name (SCHEDULES). image_size (pixels) is for cosine-shift only.

    betas are β_1 and β_T at T = 1000, for the linear and quadratic families (latent diffusion's are
    0.0015 and 0.0195). For another T both are scaled by 1000/T, so that x_T stays equally noisy.
    Continuous forms use the rates 1000 β. edm is always continuous, from SIGMA_MIN to SIGMA_MAX.
    ValueError: unknown name, T < 2, betas that do not rise, or a β >= 1 (T is too small).
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: choose from {' '.join(SCHEDULES)}")
    if int(T) != T or T < 2:
        raise ValueError(f"T must be a whole number of steps, at least 2, not {T}")
    if not 0 < betas[0] < betas[1]:
        raise ValueError(f"--betas must rise and be above 0, not {betas[0]} and {betas[1]}")
    T = int(T)
    if name == "edm":
        return Schedule(name, T, True, *edm_form(T), variance_exploding=True)
    make = continuous_form if continuous else discrete_form
    return Schedule(name, T, continuous, *make(name, T, image_size, betas))


# ------------------------------------------------------------------ discrete: a table over 0..T

def discrete_form(name: str, T: int, image_size: int, betas: tuple) -> Form:
    """(log ᾱ, its inverse), read from a table whose knots are the integers 0..T."""
    u = torch.arange(T + 1, dtype=torch.float64) / T  # t/T
    low, high = (b * 1000 / T for b in betas)
    if name == "cosine-shift":
        log_ab = cosine_shift(u, image_size)
    elif name in ("cosine", "cosine-mns"):
        log_ab = log_cosine(u, 0.0 if name == "cosine-mns" else 0.008)
        # iDDPM clips β at 0.999: without it ᾱ_T = 0.
        log_ab = log_product((-torch.expm1(log_ab[1:] - log_ab[:-1])).clamp(max=0.999))
    elif name in ("linear", "zero-terminal-snr"):
        log_ab = log_product(torch.linspace(low, high, T, dtype=torch.float64))
        log_ab = zero_terminal(log_ab) if name == "zero-terminal-snr" else log_ab
    elif name == "linear-mns":  # β_t = β_T t/T; the paper's begins with β_1 = 0
        log_ab = log_product(high * u[1:])
    else:
        root = torch.linspace(math.sqrt(low), math.sqrt(high), T, dtype=torch.float64)
        log_ab = log_product(root**2)
    if name == "quadratic-mns":  # β_t = β' (t/T)², β' raised (to 0.0214810) to keep the SNR at T
        below, above = high, 1 - 1e-9
        for _ in range(200):  # bisection, to the last bit
            middle = (below + above) / 2
            enough = torch.log1p(-middle * u[1:] ** 2).sum() < log_ab[-1]
            below, above = (below, middle) if enough else (middle, above)
        log_ab = log_product(above * u[1:] ** 2)
    return interpolated(log_ab)


def log_product(beta: Tensor) -> Tensor:
    """β_1..β_T -> log ᾱ over 0..T. A sum of log1p(−β) keeps the digits that 1 − β rounds away."""
    if beta.max() >= 1:
        raise ValueError(f"--betas: beta reaches {beta.max():.4g} with T = {len(beta)}, and must "
                         "stay below 1: lower the second value, or use a larger T")
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-beta).cumsum(0)])


def zero_terminal(log_ab: Tensor) -> Tensor:
    r"""α ← (α − α_T) α_1/(α_1 − α_T) over 1..T: α_1 stays, α_T becomes exactly 0 (Lin 2024)."""
    alpha = (log_ab / 2).exp()
    alpha = (alpha - alpha[-1]) * alpha[1] / (alpha[1] - alpha[-1])
    alpha[0] = 1.0
    return 2 * alpha.log()


def interpolated(log_ab: Tensor) -> Form:
    """(log ᾱ, its inverse) from the values log_ab (T+1,) at 0..T, by linear interpolation."""
    table_on = functools.cache(log_ab.to)  # one copy per device: a copy per step stalls a GPU

    def forward(t):
        table = table_on(t.device)
        i = t.floor().long().clamp(0, len(table) - 1)
        low, high = table[i], table[(i + 1).clamp(max=len(table) - 1)]
        f = t - i
        return torch.where(f > 0, low + f * (high - low), low)  # never 0 · (−∞)

    def inverse(y):
        table = table_on(y.device)
        i = (torch.searchsorted(-table, -y.contiguous(), right=True) - 1).clamp(0, len(table) - 2)
        low, high = table[i], table[i + 1]
        f = ((y - low) / (high - low)).nan_to_num(1.0)  # −∞/−∞: ᾱ = 0 is t = T
        return i + f.clamp(0, 1)
    return forward, inverse


# ------------------------------------------------------------------ continuous: functions of t/T

def continuous_form(name: str, T: int, image_size: int, betas: tuple) -> Form:
    """(log ᾱ, its inverse) in closed form, as functions of t. β's rates are per unit of u = t/T."""
    low, high = (1000 * b for b in betas)
    if name in ("linear", "zero-terminal-snr"):
        slope = high - low
        line = form = (lambda u: -(low * u + slope * u**2 / 2),
                       lambda y: -2 * y / (low + (low**2 - 2 * slope * y).sqrt()))
        if name == "zero-terminal-snr":  # α ← (α − α(T))/(1 − α(T)); expm1 is exact near t = 0
            keep = 1 - math.exp(-(low + slope / 2) / 2)
            form = (lambda u: 2 * torch.log1p((torch.expm1(line[0](u) / 2) / keep).clamp(min=-1)),
                    lambda y: line[1](2 * torch.log1p(torch.expm1(y / 2) * keep)))
    elif name == "linear-mns":
        form = lambda u: -high * u**2 / 2, lambda y: (-2 * y / high).sqrt()
    elif name == "quadratic":  # ∫ (p + q u)² du
        p, q = math.sqrt(low), math.sqrt(high) - math.sqrt(low)
        form = (lambda u: -u * (p**2 + p * q * u + q**2 * u**2 / 3),
                lambda y: p / q * torch.expm1(torch.log1p(-3 * q * y / p**3) / 3))
    elif name == "quadratic-mns":  # the β_max that gives the same SNR at T
        high = low + math.sqrt(low * high) + high
        form = lambda u: -high / 3 * u**3, lambda y: (-3 * y / high) ** (1 / 3)
    elif name == "cosine-shift":
        shift = 2 * math.log(64 / image_size)
        form = (lambda u: cosine_shift(u, image_size), lambda y: 2 / math.pi * torch.atan(
            torch.exp((shift - (y - torch.log(-torch.expm1(y)))) / 2)))  # y − log(1 − e^y): log SNR
    else:
        form = cosine_continuous(0.0 if name == "cosine-mns" else 0.008)
    return lambda t: form[0](t / T), lambda y: (form[1](y) * T).clamp(0, T)


def log_cosine(u: Tensor, offset: float) -> Tensor:
    r"""log f(u)/f(0), f(u) = cos²((u + offset)/(1 + offset) π/2); iDDPM has offset 0.008."""
    angle = (u + offset) / (1 + offset) * math.pi / 2
    start = offset / (1 + offset) * math.pi / 2
    # Two forms of log cos²: the first is accurate for cos near 1, the second for cos near 0.
    log_cos = torch.where(angle < 1, torch.log1p(-angle.sin() ** 2), 2 * angle.cos().abs().log())
    return log_cos - math.log1p(-math.sin(start) ** 2)


def cosine_continuous(offset: float, floor: float = -20.0) -> Form:
    """(log ᾱ, inverse) of iDDPM's formula. log SNR stays above `floor`, since cos reaches 0."""
    lowest = -math.log1p(math.exp(-floor))  # log ᾱ at log SNR = floor
    start = math.log1p(-math.sin(offset / (1 + offset) * math.pi / 2) ** 2)

    def inverse(y):
        y = y + start  # log cos²(angle)
        # acos would lose half the digits near u = 0
        angle = torch.atan2((-torch.expm1(y)).sqrt(), (y / 2).exp())
        return angle * 2 / math.pi * (1 + offset) - offset

    return lambda u: log_cosine(u, offset).clamp(min=lowest), inverse


def cosine_shift(u: Tensor, image_size: int, limit: float = 15.0) -> Tensor:
    """log SNR = −2 log tan(πu/2) + 2 log(64/image_size), within ±limit; ᾱ(0) is still 1 (Hoogeboom
    2023, who maps t to a range of angles instead of this limit). A large image needs more noise,
    because neighbouring pixels are alike and average it away."""
    log_snr = -2 * torch.log(torch.tan(math.pi * u / 2).abs()) + 2 * math.log(64 / image_size)
    log_ab = -torch.logaddexp(-log_snr.clamp(-limit, limit), torch.zeros_like(u))
    return torch.where(u > 0, log_ab, torch.zeros_like(u))


def edm_form(T: int, rho: float = 7) -> Form:
    r"""(log ᾱ, inverse) of EDM, ᾱ = 1/(1 + σ²): t is the coordinate of its grid of noise levels.

        σ(t) = (σ_min^(1/7) + (t − 1)/(T − 1) (σ_max^(1/7) − σ_min^(1/7)))^7     t >= 1
        σ(t) = σ_min t                                                            t < 1

    So equal steps in t from T to 1, then 0, are EDM's grid (eq. 5). Heun's churn goes beyond T.
    """
    low, high = SIGMA_MIN ** (1 / rho), SIGMA_MAX ** (1 / rho)

    def forward(t):
        root = low + (t - 1) / (T - 1) * (high - low)
        return -torch.log1p(torch.where(t < 1, SIGMA_MIN * t, root**rho) ** 2)

    def inverse(y):
        sigma = torch.expm1(-y).sqrt()
        return torch.where(sigma < SIGMA_MIN, sigma / SIGMA_MIN,
                           1 + (T - 1) * (sigma ** (1 / rho) - low) / (high - low))

    return forward, inverse


# ------------------------------------------------------------------ using a schedule

def expand(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shape a coefficient (B,) or (B, ...) to multiply x (B, ...), in x's dtype and on its device.
    A 0-d coefficient stays as it is: PyTorch then keeps x's dtype and device."""
    if coefficient.dim() == 0:
        return coefficient
    return coefficient.to(x, non_blocking=x.is_cuda)[(..., *[None] * (x.dim() - coefficient.dim()))]


def add_noise(schedule: Schedule, x0: Tensor, t: Tensor | float, eps: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_0), DDPM eq. 4: x0 (B, ...), t a number or (B,), eps like x0 -> like x0."""
    alpha, sigma = (expand(c, x0) for c in schedule.alpha_sigma(t))
    return alpha * x0 + sigma * eps


def eps_from_x0(schedule: Schedule, xt: Tensor, t: Tensor | float, x0: Tensor) -> Tensor:
    """The ε that x_t (B, ...) holds if its image is x0: (x_t − α x_0)/σ. t a number or (B,)."""
    alpha, sigma = (expand(c, xt) for c in schedule.alpha_sigma(t))
    return (xt - alpha * x0) / sigma


def time_grid(schedule: Schedule, points: int, spacing: str = "uniform", t_end: float = 1.0,
              t_start: float | None = None) -> Tensor:
    r"""Return `points` strictly falling times (float64) from t_start (default T) to t_end.

    uniform, quadratic   equal steps in t or √t. Times stay real: rounding could repeat a time
    logsnr               equal steps in λ. If ᾱ(t_start) = 0, λ is −∞: they begin at λ(T − 1)
    leading              1 + (T // points) i, the grid of DDIM's and SA-DPM's programs: 901, 801,
                         ..., 1 for 10 points. It picks from the steps t_end, t_end + 1, ...,
                         t_start, in continuous time too, and ends below t_start

    A single point is t_start; leading rejects it, since its point would be t_end. ValueError: times
    out of order or range, or more leading points than steps.
    """
    t_start = schedule.T if t_start is None else t_start
    if points < 1:
        raise ValueError(f"a grid needs at least one point, not {points}")
    if not 0 < t_end < t_start <= schedule.T:
        raise ValueError(f"times must satisfy 0 < t_end < t_start <= {schedule.T}, "
                         f"not {t_end} and {t_start}")
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: choose from {' '.join(SPACINGS)}")
    if spacing == "leading":
        steps = int(t_start - t_end) + 1
        if not 1 < points <= steps:
            raise ValueError(f"--spacing leading takes from 2 to {steps} points, not {points}: use "
                             "another spacing")
        return t_end + steps // points * torch.arange(points, dtype=torch.float64).flip(0)
    if points == 1:
        return torch.tensor([t_start], dtype=torch.float64)
    if spacing == "uniform":
        grid = torch.linspace(t_start, t_end, points, dtype=torch.float64)
    elif spacing == "quadratic":
        grid = torch.linspace(t_start**0.5, t_end**0.5, points, dtype=torch.float64) ** 2
    else:
        skip = int(schedule.alpha_bar(t_start) == 0)
        first = schedule.lam(min(t_start, schedule.T - 1) if skip else t_start)
        lam = torch.linspace(float(first), float(schedule.lam(t_end)), points - skip,
                             dtype=torch.float64)
        grid = torch.cat([torch.zeros(skip, dtype=torch.float64), schedule.t_of_lam(lam)])
    grid[0], grid[-1] = t_start, t_end  # rounding must not move the ends
    return grid
