r"""The forward process: how much signal and how much noise is in x_t, and when a sampler looks.

    x_t = a x_0 + s ε,   a = √ᾱ(t),   s = √(1 − ᾱ(t)),   ε ~ N(0, I)                    DDPM eq. 4

Papers: DDPM (linear), iDDPM (cosine), simple diffusion (cosine-shift), Lin et al. 2024 "Common
Diffusion Noise Schedules and Sample Steps are Flawed" (zero-terminal-snr), Karras et al. 2022 (edm,
where a = 1 and s = σ); and of E-TSDM the continuous forms and Modified-NS, the names that end in
-mns.

Time t is a real number in [0, T]: t = 0 is clean data, the integers 1..T are DDPM's steps, and
ᾱ(0) = 1 exactly, so no array of "previous" values exists anywhere. A schedule comes in two forms:

    discrete      a float64 table of log ᾱ over 0..T, read between integers by linear interpolation
    continuous    a closed form in u = t/T

Either way it is one object that holds log ᾱ as a function of t, and the inverse of that function.
The logarithm keeps both ends exact: 1 − ᾱ = −expm1(log ᾱ) has all its digits at t = 1e-9, and
log 0 = −∞ is a number. EDM's x is that of the same SNR divided by √ᾱ, and only coefficients() and
step_variances() know of it.

What this file does not do: choose what the network is told about t (etsdm.py), or take a step
backwards (samplers.py).

    python -c "import schedules; print(schedules.make_schedule('cosine').coefficients(500))"
    python schedules.py                   # E-TSDM's figure A9: their SNRs, and which s explode at 0

ᾱ (alpha_bar) signal power; a, s coefficients; λ (lam) = log(a/s), half the log signal-to-noise
ratio (SNR); β_t = 1 − ᾱ(t)/ᾱ(t−1); β̃ (beta_tilde) the variance of q(x_next | x_t, x_0). Everything
is float64 until it meets x.
"""

import argparse
import functools
import math
import os

import torch

NAMES = ("linear", "quadratic", "cosine", "cosine-shift", "zero-terminal-snr",
         "linear-mns", "quadratic-mns", "cosine-mns", "edm")
SPACINGS = ("uniform", "quadratic", "logsnr")
BETA_ENDS = (1e-4, 0.02)  # DDPM's β_1 and β_T at T = 1000; latent diffusion's: (0.0015, 0.0195)
SIGMAS = (0.002, 80.0)  # EDM's noise levels at t = 1 and t = T


class Schedule:
    """ᾱ and its relatives as functions of t in [0, T], a number or a tensor of any shape; they give
    float64 of that shape. (Made by make_schedule.)

    exploding   a = 1 and s = σ (edm) instead of a² + s² = 1: x, and with it a and s, are divided by
                √ᾱ. λ, its inverse and ᾱ = 1/(1 + σ²), that of the same SNR, do not change by that
    prior_std   what standard normal noise is multiplied by to be x_T: 1, or EDM's σ(T) = 80
    """

    def __init__(self, name, T, continuous, log_alpha_bar, inverse, exploding=False):
        self.name, self.T, self.continuous, self.exploding = name, T, continuous, exploding
        self._log_alpha_bar, self._inverse = log_alpha_bar, inverse
        self.prior_std = SIGMAS[1] if exploding else 1.0

    def log_alpha_bar(self, t):
        return self._log_alpha_bar(torch.as_tensor(t, dtype=torch.float64))

    def alpha_bar(self, t):
        return self.log_alpha_bar(t).exp()

    def coefficients(self, t):
        """(a, s) with x_t = a x_0 + s ε."""
        log_ab = self.log_alpha_bar(t)
        a, s = (log_ab / 2).exp(), (-torch.expm1(log_ab)).sqrt()
        return (torch.ones_like(a), s / a) if self.exploding else (a, s)

    def lam(self, t):
        """λ = log(a/s): +∞ at t = 0, −∞ where ᾱ = 0."""
        log_ab = self.log_alpha_bar(t)
        return (log_ab - torch.log(-torch.expm1(log_ab))) / 2

    def t_of_lam(self, lam):
        """The time at which log(a/s) = λ: there ᾱ = 1/(1 + exp(−2λ)), and log ᾱ has an inverse."""
        lam = torch.as_tensor(lam, dtype=torch.float64)
        return self._inverse(-torch.logaddexp(-2 * lam, torch.zeros_like(lam)))

    def step_variances(self, t, t_next):
        r"""(β, β̃) of a step t -> t_next < t, neighbours or not:

        β = Var q(x_t | x_next) = 1 − ᾱ_t/ᾱ_next
        β̃ = Var q(x_next | x_t, x_0) = β (1 − ᾱ_next)/(1 − ᾱ_t)

        Exploding: of x/√ᾱ, so that β = σ_t² − σ_next² and β̃ = β σ_next²/σ_t².
        """
        log_t, log_next = self.log_alpha_bar(t), self.log_alpha_bar(t_next)
        # Equal: no step, and where ᾱ = 0 at both ends the difference would be ∞ − ∞.
        beta = torch.where(log_t == log_next, 0.0, -torch.expm1(log_t - log_next))
        beta_tilde = beta * torch.expm1(log_next) / torch.expm1(log_t)
        if self.exploding:
            return beta / log_t.exp(), beta_tilde / log_next.exp()
        return beta, beta_tilde


def make_schedule(name, T=1000, continuous=False, image_size=32, beta_ends=BETA_ENDS):
    r"""The Schedule of this name (NAMES). image_size (pixels) matters to cosine-shift only.

    beta_ends are β_1 and β_T at T = 1000, of the schedules made of betas; for another T both are
    scaled by 1000/T, so that as much noise has been added at T. Continuous forms use the rates
    1000 β. edm is continuous whatever was asked, and its noise levels are SIGMAS. ValueError:
    unknown name, T < 2, or a β >= 1 (too few steps for these ends).
    """
    if name not in NAMES:
        raise ValueError(f"unknown schedule {name!r}: choose from {' '.join(NAMES)}")
    if int(T) != T or T < 2:
        raise ValueError(f"T must be a whole number of steps, at least 2, not {T}")
    if not 0 < beta_ends[0] < beta_ends[1]:
        raise ValueError(f"beta must grow from above 0, not from {beta_ends[0]} to {beta_ends[1]}")
    T = int(T)
    if name == "edm":
        return Schedule(name, T, True, *edm_form(T), exploding=True)
    make = continuous_form if continuous else discrete_form
    return Schedule(name, T, continuous, *make(name, T, image_size, beta_ends))


# ------------------------------------------------------------------ discrete: a table over 0..T

def discrete_form(name, T, image_size, beta_ends):
    """(log ᾱ, its inverse), read from a table whose knots are the integers 0..T."""
    u = torch.arange(T + 1, dtype=torch.float64) / T  # t/T
    if name == "cosine-shift":
        return table(cosine_shift(u, image_size))
    if name in ("cosine", "cosine-mns"):
        log_ab = log_cosine(u, 0.0 if name == "cosine-mns" else 0.008)
        # iDDPM clips β at 0.999: without it ᾱ_T = 0.
        return table(accumulate((-torch.expm1(log_ab[1:] - log_ab[:-1])).clamp(max=0.999)))
    low, high = (b * 1000 / T for b in beta_ends)
    if name in ("linear", "zero-terminal-snr"):
        log_ab = accumulate(torch.linspace(low, high, T, dtype=torch.float64))
        return table(zero_terminal(log_ab) if name == "zero-terminal-snr" else log_ab)
    if name == "linear-mns":  # β_t = β_T t/T
        return table(accumulate(high * u[1:]))
    root = torch.linspace(math.sqrt(low), math.sqrt(high), T, dtype=torch.float64)
    log_ab = accumulate(root**2)  # quadratic
    if name == "quadratic":
        return table(log_ab)
    # quadratic-mns: β_t = β' (t/T)², with β' raised (to 0.0214810) until the SNR at T is unchanged.
    below, above = high, 1 - 1e-9
    for _ in range(200):  # bisection, to the last bit
        middle = (below + above) / 2
        enough = torch.log1p(-middle * u[1:] ** 2).sum() < log_ab[-1]
        below, above = (below, middle) if enough else (middle, above)
    return table(accumulate(above * u[1:] ** 2))


def accumulate(beta):
    """β_1..β_T -> log ᾱ over 0..T: a sum of log1p(−β), where a product would round to 1."""
    if beta.max() >= 1:
        raise ValueError(f"beta reaches {beta.max():.4g} with T = {len(beta)}, and must stay below "
                         "1: use a larger T")
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-beta).cumsum(0)])


def zero_terminal(log_ab):
    r"""a ← (a − a_T) a_1/(a_1 − a_T) over 1..T: a_1 stays, a_T becomes exactly 0 (Lin 2024)."""
    a = (log_ab / 2).exp()
    a = (a - a[-1]) * a[1] / (a[1] - a[-1])
    a[0] = 1.0
    return 2 * a.log()


def table(log_ab):
    """(log ᾱ, its inverse) from the values log_ab (T+1,) at 0..T, by linear interpolation."""
    copies = {}  # one per device: fetching the table from the CPU would stall a GPU every step

    def on(device):
        if device not in copies:
            copies[device] = log_ab.to(device)
        return copies[device]

    def forward(t):
        values = on(t.device)
        i = t.floor().long().clamp(0, len(values) - 1)
        low, high = values[i], values[(i + 1).clamp(max=len(values) - 1)]
        f = t - i
        return torch.where(f > 0, low + f * (high - low), low)  # never 0 · (−∞)

    def inverse(y):
        values = on(y.device)
        i = (torch.searchsorted(-values, -y.contiguous(), right=True) - 1).clamp(0, len(values) - 2)
        low, high = values[i], values[i + 1]
        f = ((y - low) / (high - low)).nan_to_num(1.0)  # −∞/−∞: ᾱ = 0 is t = T
        return i + f.clamp(0, 1)

    return forward, inverse


# ------------------------------------------------------------------ continuous: functions of t/T

def continuous_form(name, T, image_size, beta_ends):
    """(log ᾱ, its inverse) in closed form, as functions of t; β's rates are per unit of u."""
    low, high = (1000 * b for b in beta_ends)
    if name in ("linear", "zero-terminal-snr"):
        slope = high - low
        form = (lambda u: -(low * u + slope * u**2 / 2),  # the root below: without cancellation
                lambda y: -2 * y / (low + (low**2 - 2 * slope * y).sqrt()))
        if name == "zero-terminal-snr":
            form = zero_terminal_continuous(*form)
    elif name == "linear-mns":
        form = lambda u: -high * u**2 / 2, lambda y: (-2 * y / high).sqrt()
    elif name == "quadratic":  # ∫ (p + q u)² du
        p, q = math.sqrt(low), math.sqrt(high) - math.sqrt(low)
        form = (lambda u: -u * (p**2 + p * q * u + q**2 * u**2 / 3),
                lambda y: _cube_root_difference(p, -3 * q * y) / q)
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


def _cube_root_difference(p, d):
    """∛(p³ + d) − p, without cancellation at small d."""
    root = (p**3 + d) ** (1 / 3)
    return d / (root**2 + root * p + p**2)


def log_cosine(u, offset):
    r"""log f(u)/f(0), f(u) = cos²((u + offset)/(1 + offset) π/2); iDDPM has offset 0.008."""
    angle = (u + offset) / (1 + offset) * math.pi / 2
    start = offset / (1 + offset) * math.pi / 2
    # log cos² two ways: each keeps its digits at one end, where cos is near 1 or near 0.
    log_cos = torch.where(angle < 1, torch.log1p(-angle.sin() ** 2), 2 * angle.cos().abs().log())
    return log_cos - math.log1p(-math.sin(start) ** 2)


def cosine_continuous(offset, floor=-20.0):
    """(log ᾱ, inverse) of iDDPM's formula; log SNR stays above `floor`, since cos reaches 0."""
    least = -math.log1p(math.exp(-floor))  # log ᾱ where log SNR = floor
    start = math.log1p(-math.sin(offset / (1 + offset) * math.pi / 2) ** 2)

    def inverse(y):
        y = y + start  # log cos²(angle)
        # acos would lose half the digits near u = 0
        angle = torch.atan2((-torch.expm1(y)).sqrt(), (y / 2).exp())
        return angle * 2 / math.pi * (1 + offset) - offset

    return lambda u: log_cosine(u, offset).clamp(min=least), inverse


def cosine_shift(u, image_size, limit=15.0):
    r"""log SNR = −2 log tan(πu/2) + 2 log(64/image_size), within ±limit; ᾱ(0) = 1 all the same.

    Neighbouring pixels of a large image average noise away, so it needs more (simple diffusion,
    Hoogeboom 2023); a side of 64 gives the plain cosine.
    """
    log_snr = -2 * torch.log(torch.tan(math.pi * u / 2).abs()) + 2 * math.log(64 / image_size)
    log_ab = -torch.logaddexp(-log_snr.clamp(-limit, limit), torch.zeros_like(u))
    return torch.where(u > 0, log_ab, torch.zeros_like(u))


def zero_terminal_continuous(forward, inverse):
    """a ← (a − a(T))/(1 − a(T)) of another continuous schedule; expm1 and log1p keep the digits
    near t = 0."""
    end = math.exp(float(forward(torch.ones((), dtype=torch.float64))) / 2)  # a(T)
    return (lambda u: 2 * torch.log1p((torch.expm1(forward(u) / 2) / (1 - end)).clamp(min=-1)),
            lambda y: inverse(2 * torch.log1p(torch.expm1(y / 2) * (1 - end))))


def edm_form(T, rho=7):
    r"""(log ᾱ, inverse) of EDM, ᾱ = 1/(1 + σ²): t is the coordinate of its grid of noise levels.

        σ(t) = (σ_min^(1/7) + (t − 1)/(T − 1) (σ_max^(1/7) − σ_min^(1/7)))^7     t >= 1
        σ(t) = σ_min t                                                            t < 1

    So equal steps in t from T to 1, then 0, are EDM's grid (eq. 5); and σ(0) = 0, where its own
    coordinate would end at σ_min. Beyond T the formula goes on: Heun's churn may ask there.
    """
    low, high = (sigma ** (1 / rho) for sigma in SIGMAS)

    def forward(t):
        root = low + (t - 1) / (T - 1) * (high - low)
        return -torch.log1p(torch.where(t < 1, SIGMAS[0] * t, root**rho) ** 2)

    def inverse(y):
        sigma = torch.expm1(-y).sqrt()
        return torch.where(sigma < SIGMAS[0], sigma / SIGMAS[0],
                           1 + (T - 1) * (sigma ** (1 / rho) - low) / (high - low))

    return forward, inverse


# ------------------------------------------------------------------ using a schedule

def match(coefficient, x):
    """A coefficient, a number, 0-d or (B,), made to multiply x (B, ...) in x's own dtype."""
    if type(coefficient) is float or coefficient.dim() == 0:
        return coefficient  # neither changes the dtype of x, wherever it lives
    return coefficient.to(x).reshape(-1, *[1] * (x.dim() - 1))


@functools.lru_cache(maxsize=8192)
def at(schedule, t):
    """(a, s) at the number t, as numbers. They are kept: samplers come to the same few times with
    every batch, and one entry of a table takes longer to look up than a step of DDIM."""
    return tuple(map(float, schedule.coefficients(t)))


@functools.lru_cache(maxsize=64)
def along(schedule, times):
    """Over a falling tuple of times -> tuples: a, s and λ at each, β and β̃ of each step. Kept, too:
    a sampler walks one grid with every batch."""
    grid = torch.tensor(times, dtype=torch.float64)
    columns = (*schedule.coefficients(grid), schedule.lam(grid),
               *schedule.step_variances(grid[:-1], grid[1:]))
    return tuple(tuple(column.tolist()) for column in columns)


def scales(schedule, t, x):
    """(a, s) at t, a number or (B,), made to multiply x (B, ...)."""
    if type(t) is float:
        return at(schedule, t)
    return tuple(match(k, x) for k in schedule.coefficients(t))


def combine(a, x, s, y):
    """a x + s y, both of one shape; with numbers, in two passes over memory instead of three."""
    return (a * x).add_(y, alpha=s) if type(s) is float else a * x + s * y


def solve(x, s, y, a):
    """The z of x = a z + s y: (x − s y)/a."""
    return torch.sub(x, y, alpha=s).div_(a) if type(s) is float else (x - s * y) / a


def diffuse(schedule, x0, t, eps):
    """x_t ~ q(x_t | x_0): x0 (B, ...), t a number or (B,), noise eps like x0 -> x_t like x0."""
    a, s = scales(schedule, t, x0)
    return combine(a, x0, s, eps)


def noise_in(schedule, xt, t, x0):
    """The ε that x_t (B, ...) must hold if its image is x0: (x_t − a x_0)/s."""
    a, s = scales(schedule, t, xt)
    return solve(xt, a, x0, s)


def time_grid(schedule, points, spacing="uniform", t_end=1.0, t_start=None):
    r"""`points` strictly falling times, float64: from t_start (T unless given) to t_end. A single
    point is t_start.

    spacing: equal steps in t (uniform), in √t (quadratic) or in λ (logsnr). Times are real-valued:
    rounding to integers is how other programs come to repeat or skip one. Where ᾱ(t_start) = 0, λ
    is −∞ there, and the logsnr grid places its other points from λ(T − 1) on.
    """
    t_start = schedule.T if t_start is None else t_start
    if points < 1:
        raise ValueError(f"a grid needs at least one point, not {points}")
    if not 0 < t_end < t_start <= schedule.T:
        raise ValueError(f"times must satisfy 0 < t_end < t_start <= {schedule.T}, "
                         f"not {t_end} and {t_start}")
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing {spacing!r}: choose from {' '.join(SPACINGS)}")
    if points == 1:
        return torch.tensor([t_start], dtype=torch.float64)
    if spacing == "uniform":
        grid = torch.linspace(t_start, t_end, points, dtype=torch.float64)
    elif spacing == "quadratic":
        grid = torch.linspace(t_start**0.5, t_end**0.5, points, dtype=torch.float64) ** 2
    else:
        skip = int(schedule.alpha_bar(t_start) == 0)  # λ = −∞ there: the others begin at T − 1
        first = schedule.lam(min(t_start, schedule.T - 1) if skip else t_start)
        lam = torch.linspace(float(first), float(schedule.lam(t_end)), points - skip,
                             dtype=torch.float64)
        grid = torch.cat([torch.zeros(skip, dtype=torch.float64), schedule.t_of_lam(lam)])
    grid[0], grid[-1] = t_start, t_end  # rounding must not move the ends
    return grid


# ------------------------------------------------------------------ a look at them

# A marker says which family, a line whether it was modified: both without colour.
STYLES = {"linear": "k-o", "linear-mns": "k--o", "quadratic": "C0-s", "quadratic-mns": "C0--s",
          "cosine": "C1-^", "cosine-mns": "C1--^", "cosine-shift": "C1:v",
          "zero-terminal-snr": "0.5", "edm": "C2-.x"}


def draw(figure, T=1000):
    """Three panels on a matplotlib figure: log SNR of the tables, SNR of Modified-NS against the
    originals (E-TSDM, figure A9), and ds/dt of the continuous forms towards t = 0."""
    snr, ratio, slope = figure.subplots(1, 3)
    t = torch.arange(1, T + 1, dtype=torch.float64)
    near = torch.logspace(-4, 2, 121, dtype=torch.float64, requires_grad=True)
    for name in NAMES:
        look = dict(lw=1.2, ms=4, label=name, markevery=0.12)
        if name != "edm":  # its t is no step of diffusion: another axis
            log_snr = 2 * make_schedule(name, T).lam(t)
            shown = log_snr.isfinite()
            snr.plot(t[shown], log_snr[shown], STYLES[name], **look)
        if name.endswith("-mns"):
            plain = make_schedule(name.removesuffix("-mns"), T)
            log_ratio = 2 * (make_schedule(name, T).lam(t) - plain.lam(t))
            ratio.plot(t, log_ratio.exp(), STYLES[name],
                       **look | dict(label=f"{name} / {plain.name}"))
        s = make_schedule(name, T, continuous=True).coefficients(near)[1]
        ds = torch.autograd.grad(s.sum(), near)[0]
        shown = ds > 0  # cosine-shift stands still below t = 0.7, where log SNR is cut at 15
        slope.plot(near.detach()[shown], ds[shown], STYLES[name], **look)
    snr.set(xlabel="t (steps)", ylabel="log SNR = 2λ", title="Tables: signal-to-noise ratio")
    ratio.axhline(1, color="0.7", lw=0.6, zorder=0)
    ratio.set(xlabel="t (steps, log scale)", ylabel="SNR modified / SNR original (log scale)",
              xscale="log", yscale="log", title="Tables: Modified-NS against the originals")
    slope.set(xlabel="t (steps, log scale)", ylabel="ds/dt (per step, log scale)", xscale="log",
              yscale="log", title="Continuous forms: ds/dt towards t = 0")
    for axes in (snr, ratio, slope):
        axes.legend(fontsize=8)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="schedules.py", usage="python schedules.py [--out FILE.png]",
        description="Draw the schedules: log SNR over t, Modified-NS against the originals (figure "
        "A9 of E-TSDM), and ds/dt near t = 0, which goes to infinity for those that E-TSDM is for.")
    parser.add_argument("--out", default="schedules.png", help="(default: schedules.png)")
    args = parser.parse_args(argv)
    from matplotlib.figure import Figure  # the one place that needs it: the rest is for everybody
    figure = Figure(figsize=(16, 5), layout="constrained")
    draw(figure)
    temporary = f"{args.out}.{os.getpid()}.tmp"  # a reader never sees half a file
    try:
        figure.savefig(temporary, format="png", dpi=100)
        os.replace(temporary, args.out)
    except OSError as error:
        parser.error(f"--out {args.out}: {error.strerror}")
    print(f"figure: {os.path.abspath(args.out)}")


if __name__ == "__main__":
    main()
