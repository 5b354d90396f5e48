r"""The estimation gap: how the errors of a sampling run add up (SA-DPM, theorem 1).

Two reverse processes share one image x_0 and one set of noises. The model's process steps with its
own estimate x̂_0, the true process with x_0. A step t -> t_next of the true process is

    x_next = A x_0 + c x_t + std z,    c = √(σ_next² − std²)/σ_t,  A = α_next − c α_t,  std = η√β̃

The noise in the model's x_t is really ε_t = (x_t − α_t x_0)/σ_t. With the error e_t = ε_t −
ε_θ(x_t, t), the difference G of the two processes is

    G_next = c G_t + A (x̂_0 − x_0) = c G_t + A σ_t/α_t e_t,    G_T = 0     (theorem 1's recursion)
    G_1    = Σ_{t=2}^T τ_t e_t                                     (its closed form, for η = 1)

Even the ideal network has a gap, since x_T does not determine x_0: ‖G‖ of one image is mostly the
distance from this image to the generated one. So this is reported at every t:

    norm        mean_B ‖G‖: it includes the spread over images
    mean        ‖mean_B G‖, as in figure 4: the spread averages out, but only like 1/√B
    systematic  the same without the rest of the spread: an unbiased estimate of ‖E G‖², from
                products of different images only, with a 95 % interval (bootstrap over images)
    reducible   the same for Σ τ_t (ε* − ε_θ) along the model's run, the part that training can
                reduce. The ideal ε* is known for toy mixtures and for a finite set of images
                (--ideal). For these x̂_0 is the mean of the images, weighted by the likelihood of
                x_t. (This ideal network memorises the images. A network that generalises differs.)

The authors' released measurement has ᾱ_{t−2} in the coefficient of G_t; the DDPM posterior has
ᾱ_{t−1}. This makes their gap about half as large (test_theory.py compares both with two real runs).
It also omits the first step, has the opposite sign, and returns only a map, a mean over channels.

Not here: training; theorem 2, ‖Σ w_t‖² <= N/k² Σ‖W_s‖² <= N Σ‖w_t‖² (tests/test_theory.py).

    python gap.py RUN [RUN ...]                  # figure 4: gap.png and gap.csv
    python -c "import gap, schedules; print(gap.gap_weights(schedules.make_schedule('linear'))[:5])"

x, G (B, C, H, W), ‖·‖ over C, H, W in pixels' units ([-1, 1]); t falls from T to 1; α, σ, β̃ as in
schedules.py; η share of DDPM's noise.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import lipschitz
import samplers
import schedules
from denoiser import Denoiser
from schedules import Schedule
from support import distributed, files, image_files, measure, rng
from support.cli import flag, parse_into
from support.device import double
from support.image_folder import check_image_flags
from support.measure import bootstrap_counts, inner_products, summarize
from support.programs import run_main


def gap_weights(schedule: Schedule) -> Tensor:
    r"""τ_t for t = 0..T, (T+1,) float64, 0 for t < 2:

        τ_t = √ᾱ_{t−1} (1 − ᾱ_1)/(√ᾱ_1 (1 − ᾱ_{t−1})) · β_t/√((1 − β_t)(1 − ᾱ_t))

    The last factor is the effect of e_t on x_{t−1}. The first is the share that the later steps
    pass on, the product of their c. (∞ at T if ᾱ_T = 0: there ε does not depend on x_0.)
    """
    t = torch.arange(2, schedule.T + 1, dtype=torch.float64)
    (alpha, sigma), (alpha_1, sigma_1) = schedule.alpha_sigma(t - 1), schedule.alpha_sigma(1.0)
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    beta, _ = schedule.step_variances(t, t - 1)
    passed_on = alpha * sigma_1**2 / (alpha_1 * sigma**2)
    tau = passed_on * beta * alpha / (alpha_t * sigma_t)  # α_t/α_{t−1}: √(1 − β_t), 1 for edm
    return torch.cat([torch.zeros(2, dtype=torch.float64), tau])


def step_coefficients(schedule: Schedule, t: float, t_next: float, eta: float) -> tuple:
    """(η²β̃, A, σ_t/α_t) of a step. For close times A is a small difference of large numbers. So it
    is expanded by its conjugate: with r = √(σ_next² − η²β̃), A = (α_next² σ_t² − r² α_t²)/
    (σ_t (α_next σ_t + r α_t)), and the numerator is the sum α_next² β + η²β̃ α_t²."""
    (alpha, sigma), (alpha_next, sigma_next) = (schedule.alpha_sigma(k) for k in (t, t_next))
    beta, beta_tilde = schedule.step_variances(t, t_next)
    fresh = eta**2 * beta_tilde
    r = (sigma_next**2 - fresh).clamp(min=0).sqrt()
    A = (alpha_next**2 * beta + fresh * alpha**2) / (sigma * (alpha_next * sigma + r * alpha))
    return fresh, A, sigma / alpha


@torch.no_grad()
def gap_along_run(denoiser: Denoiser, x0: Tensor, noise: Callable, times: Tensor | None = None,
                  eta: float = 1.0, ideal: Callable | None = None, progress: str | None = None,
                  batch_size: int = 64) -> Iterator[tuple[float, Tensor, Tensor | None]]:
    """The gap along the model's own run from x_T ~ q(x_T | x0). Yield (t, G, reducible) for each t
    of the grid after the first; both (B, ...) float64.

    noise  noise(shape) -> Gaussian like x0, first for x_T, then for each step
    times  falling grid, default T..1; the step to t = 0 is not part of the theorem
    ideal  ideal(x, t) -> E[x_0 | x_t]; without it, `reducible` is None
    """
    schedule = denoiser.schedule
    start = samplers.initial_time(denoiser)
    times = schedules.time_grid(schedule, start, t_start=start) if times is None else times
    x = schedules.add_noise(schedule, x0, times[0], noise(x0.shape))
    G = torch.zeros_like(double(x0))
    reducible = None if ideal is None else G.clone()
    for t, t_next in pairwise(tqdm(times.tolist(), progress, disable=progress is None)):
        x0_hat = torch.cat([denoiser.predict(part, t)[0] for part in x.split(batch_size)])
        fresh, A, _ = step_coefficients(schedule, t, t_next, eta)
        (_, sigma), (_, sigma_next) = schedule.alpha_sigma(t), schedule.alpha_sigma(t_next)
        c = (sigma_next**2 - fresh).clamp(min=0).sqrt() / sigma
        # A (x̂_0 − x_0) is A σ/α e_t, but is finite for α = 0 too
        G = c * G + A * (double(x0_hat) - double(x0))
        if ideal is not None:
            reducible = c * reducible + A * (double(x0_hat) - double(ideal(x, t)))
        x = A * x0_hat + c * x + (fresh.sqrt() * noise(x.shape) if fresh > 0 else 0)
        yield t_next, G, reducible


def ideal_of_images(images: Tensor, schedule: Schedule) -> Callable:
    """ideal(x, t) if images (N, ...) are the whole distribution: the mean of the images, weighted
    by N(x; α x_0, σ² I)."""
    flat = double(images).flatten(1)  # (N, D)
    half = flat.square().sum(1) / 2

    def ideal(x, t):
        alpha, sigma = map(float, schedule.alpha_sigma(t))
        # −‖x − α x_0‖²/(2 σ²) without the constant ‖x‖²: needs one matrix product only
        log_weights = (alpha * double(x).flatten(1) @ flat.T - alpha**2 * half) / sigma**2
        return (log_weights.softmax(1) @ flat).reshape(x.shape)
    return ideal


def measure_gap(config, name: str, denoiser: Denoiser, x0: Tensor) -> tuple[list[dict], Tensor]:
    """Measure one run -> rows of the CSV (dicts, one per t), bootstrap values of the last t."""
    noise = samplers.SeededNoise([rng.image_seed(config.seed, i) for i in range(len(x0))],
                                 x0.device)
    start = samplers.initial_time(denoiser)
    if (config.steps or 0) > start and not denoiser.schedule.continuous:
        raise ValueError(f"--steps {config.steps}: {name} has only {start} discrete timesteps")
    times = schedules.time_grid(denoiser.schedule, config.steps or start, t_start=start)
    ideal = None if not config.ideal else ideal_of_images(
        ideal_set(denoiser, config, name).to(x0.device), denoiser.schedule)
    tau = gap_weights(denoiser.schedule) if config.eta == 1 and len(times) == start else None
    which = "x".join(map(str, (config.data or denoiser.settings["data"], *x0.shape[1:])))
    counts, rows, boot = bootstrap_counts(len(x0)), [], None
    for t, G, reducible in gap_along_run(denoiser, x0, noise, times, config.eta, ideal, name,
                                         config.batch_size):
        row = dict(run=name, t=t, images=which, n=len(x0), **summarize(inner_products(G), counts))
        boot = row.pop("boot")
        if tau is not None:  # theorem 1's weights belong to exactly this grid
            row["tau"] = tau[round(t)].item()
        if reducible is not None:
            part = summarize(inner_products(reducible), counts)
            row.update({f"reducible_{k}": v for k, v in part.items() if k != "boot"})
        rows.append(row)
    return rows, boot


def ideal_set(denoiser: Denoiser, config, name: str) -> Tensor:
    """The whole training set of a run, as x_0: (N, *shape). ValueError: the set is too large."""
    s = denoiser.settings
    source = config.data or data.require_local(s["data"], name)
    whole = lipschitz.load_images(source, s["image_size"], s["channels"], config.seed,
                                  skip_bad=True, progress=True)
    if not isinstance(whole, image_files.Array):
        raise ValueError(f"--ideal needs a set that fits into memory, not {source}")
    images = data.to_float(whole.images)
    images = torch.cat([images, images.flip(-1)]) if s["flip"] else images
    return torch.cat([denoiser.encode(part)[0] for part in images.split(256)])


PANELS = {"mean": "norm of the batch mean", "systematic": "systematic part, 95 %",
          "norm": "mean of the norms", "reducible_systematic": "reducible: systematic, 95 %",
          "reducible_norm": "reducible: mean of norms"}


def plot_gaps(runs: dict[str, list[dict]], weights: dict[str, Tensor]):
    """Plot figure 4: a panel per quantity, a line per run; t falls to the right, as in sampling.
    runs: {name: rows}; weights: {schedule: τ}."""
    keys = [key for key in PANELS if any(key in rows[0] for rows in runs.values())]
    figure = files.figure(figsize=(3.6 * (len(keys) + 1), 3.8), layout="constrained")
    *axes, last = figure.subplots(1, len(keys) + 1)
    for ax, key in zip(axes, keys, strict=True):
        ends = [key.replace("systematic", end) for end in ("low", "high")]
        for i, (name, rows) in enumerate(runs.items()):
            if key in rows[0]:
                measure.plot_curve(ax, rows, ["t", key, *ends * (key not in ends)], i, name)
        ax.set(title=PANELS[key], xlabel="t (sampling goes to the right)", ylim=(0, None),
               ylabel="gap ‖G‖₂ over an image, pixels in [-1, 1]")
    for i, (name, tau) in enumerate(weights.items()):
        rows = [dict(t=t, tau=value) for t, value in enumerate(tau.tolist())]
        measure.plot_curve(last, rows[2:], ("t", "tau"), i, name)
    last.set(title="weights of DDPM's T steps", xlabel="t (timesteps)", yscale="log",
             ylabel="τ_t, gap per unit of ε̂'s error")
    for ax in (*axes, last):
        ax.invert_xaxis()
    for ax in (axes[0], last):
        ax.legend(fontsize="small")
    return figure


def add_reductions(runs: dict[str, list[dict]], boots: dict[str, Tensor]) -> None:
    """Add to the last row of each run with the first run's images how much smaller its systematic
    part is than the first run's, with the 95 % interval. The images have the same random effect on
    both runs, so the difference is more certain than either part."""
    (first, rows), *_ = runs.items()
    for name, (*_, end) in runs.items():
        if end["images"] == rows[-1]["images"] and end["n"] == rows[-1]["n"]:
            low, high = np.percentile((boots[first] - boots[name]).numpy(), (2.5, 97.5))
            end.update(less=rows[-1]["systematic"] - end["systematic"], less_low=low,
                       less_high=high)


def table_of_ends(runs: dict[str, list[dict]]) -> str:
    """The last row of each run and the result of add_reductions() as lines of text."""
    first, *_ = runs
    lines = [f"{'at t = 1':24s} {'images':>6s} {'mean':>7s} {'systematic, 95 %':>22s} {'norm':>7s}"]
    for name, (*_, end) in runs.items():
        interval = "{systematic:.3f} [{low:.3f}, {high:.3f}]".format(**end)
        line = f"{{run:24s}} {end['n']:6d} {end['mean']:7.3f} {interval:>22s} {end['norm']:7.3f}"
        if "reducible_norm" in end:
            line += "   reducible: systematic {reducible_systematic:.3f}, norm {reducible_norm:.3f}"
        if name != first and "less" in end:
            line += "   {less:.3f} less than {first} [{less_low:.3f}, {less_high:.3f}]"
        lines.append(line.format(first=first, **end))
    return "\n".join(lines)


@dataclass
class GapConfig(measure.MeasureConfig):
    steps: int | None = flag(None, "points of the grid from T to 1", shown="T", low=2)
    eta: float = flag(1.0, "share of fresh noise: 1 is DDPM, 0 is DDIM")
    ideal: bool = flag(False, "take the run's whole data set as the truth: adds the reducible gap")
    prog: ClassVar[str] = "gap.py"
    usage: ClassVar[str] = "python gap.py [RUN ...] [flags]"
    description: ClassVar[str] = "Measure how errors add up in a sampling run: SA-DPM's theorem 1."
    examples: ClassVar[str] = """\
  python gap.py shapes-tiny shapes-tiny-sa2 -n 1000
      the gap along 1000 steps of DDPM, without and with SA-2: figure 4. (64 images are too few to
      distinguish good networks.) Figure 1: python -m papers.figures illustration
  python gap.py fashion-mnist-tiny fashion-mnist-tiny-sa2 --steps 100 --ideal
      also the gap to the ideal network of that data set, which training could remove"""
    least: ClassVar[dict] = measure.MeasureConfig.least | dict(num=2)
    picture: ClassVar[str] = "gap.png"

    def check(self) -> None:
        super().check()
        check_image_flags(self)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"--eta must be between 0 and 1, not {self.eta}")


def main(argv=None):
    config, runs, boots, weights = parse_into(GapConfig, argv), {}, {}, {}
    with distributed.init(tf32=False, device=config.device) as dist:
        if not dist.is_main:  # one process measures
            return
        for name, denoiser, x0 in lipschitz.open_runs(config, dist.device):
            runs[name], boots[name] = measure_gap(config, name, denoiser, x0)
            s = denoiser.settings
            kind = f"{s['schedule']}{', continuous' * s['continuous']}, {s['image_size']} pixels"
            weights[kind] = gap_weights(denoiser.schedule)
    add_reductions(runs, boots)
    print(table_of_ends(runs))
    measure.save_measurement(config.out, plot_gaps(runs, weights),
                             [row for rows in runs.values() for row in rows])


if __name__ == "__main__":
    run_main(main)
