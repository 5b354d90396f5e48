r"""The estimation gap: how far the errors of a sampling run have added up (SA-DPM, theorem 1).

One image x_0 and one set of noises, two reverse processes: the model's, which steps with its own
estimate x̂_0, and the true one, which knows x_0. A step t -> t_next of either is

    x_next = A x_0 + c x_t + std z,    c = √(σ_next² − std²)/σ_t,  A = α_next − c α_t,  std = η√β̃

so their difference G obeys, with e_t = ε_t − ε_θ(x_t, t), ε_t = (x_t − α_t x_0)/σ_t the noise that
really is in the model's x_t,

    G_next = c G_t + A (x̂_0 − x_0) = c G_t + A σ_t/α_t e_t,    G_T = 0     (theorem 1's recursion)
    G_1    = Σ_{t=2}^T τ_t e_t                                     (its closed form, for η = 1)

What G contains. Even the ideal network has a gap, since x_T does not determine x_0: ‖G‖ of one
image is mostly the distance from that image to the one that was generated instead. So this is
reported at every t:

    norm        mean_B ‖G‖: spread and all
    mean        ‖mean_B G‖, which figure 4 is about: the spread averages out, but only like 1/√B
    systematic  the same without what the spread still adds: an unbiased estimate of ‖E G‖², from
                products of different images only, with a 95 % interval (bootstrap over images).
                E G_t is the mean image of the model's runs less that of the true ones: all that a
                batch mean can see
    reducible   the same numbers for Σ τ_t (ε* − ε_θ) along the model's run: what training can
                change. It takes the ideal ε*, which is known for toy mixtures, and for a finite set
                of images as a whole (--ideal): the mean of its images, weighted by how well each
                explains x_t. (That network knows its images by heart. One that generalises differs
                from it, and so has a reducible gap too.)

The authors' released measurement differs in four ways. (1) Its coefficient of G_t has ᾱ_{t−2} where
the DDPM posterior has ᾱ_{t−1}: an index moved by one, it seems, which makes the gap about half as
large (test_theory.py compares both with two real runs). (2) The error of the first step is left
out. (3) The sign is the other one. (4) It returns the mean over the batch as a map, without a norm
or an interval, and so without a way to tell a gap from the spread of the batch.

Not here: training with what it measures (losses.py), or a bound: the chain of
theorem 2, ‖Σ w_t‖² <= N/k² Σ‖W_s‖² <= N Σ‖w_t‖², is walked through in tests/test_theory.py.

    python gap.py RUN [RUN ...]                  # figure 4: gap.png and gap.csv
    python gap.py --illustrate                   # figure 1: equal errors that add up, or cancel
    python -c "import gap, schedules; print(gap.gap_weights(schedules.make_schedule('linear'))[:5])"

x, G (B, C, H, W), ‖·‖ over C, H, W in pixels' units ([-1, 1]); t falls from T to 1; α, σ, β̃ as in
schedules.py; η share of DDPM's noise.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import lipschitz
import samplers
import schedules
import toy
from denoiser import Denoiser
from schedules import Schedule
from support import distributed, files, image_files, rng
from support.cli import device_flag, flag, flag_name, parse_into
from support.device import double
from support.programs import run_main

STYLES = ("k-", "C1--", "C0-.", "C2:", "C3-", "C4--", "C5-.")  # distinct without colour


# ------------------------------------------------------------------ theorem 1

def gap_weights(schedule: Schedule) -> Tensor:
    r"""τ_t for t = 0..T, (T+1,) float64, 0 for t < 2:

        τ_t = √ᾱ_{t−1} (1 − ᾱ_1)/(√ᾱ_1 (1 − ᾱ_{t−1})) · β_t/√((1 − β_t)(1 − ᾱ_t))

    The last factor is what e_t does to x_{t−1}; the first is how much of that the later steps pass
    on, the product of their c. (∞ at T where ᾱ_T = 0: there ε holds nothing about x_0.)
    """
    t = torch.arange(2, schedule.T + 1, dtype=torch.float64)
    (alpha, sigma), (alpha_1, sigma_1) = schedule.alpha_sigma(t - 1), schedule.alpha_sigma(1.0)
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    beta, _ = schedule.step_variances(t, t - 1)
    passed_on = alpha * sigma_1**2 / (alpha_1 * sigma**2)
    tau = passed_on * beta * alpha / (alpha_t * sigma_t)  # α_t/α_{t−1}: √(1 − β_t), 1 for edm
    return torch.cat([torch.zeros(2, dtype=torch.float64), tau])


def step_coefficients(schedule: Schedule, t, t_next, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""(η²β̃, A, σ_t/α_t) of a step. A is a small difference of two large numbers if the times are
    close; times its conjugate it is a sum. With r = √(σ_next² − η²β̃) and, for any schedule,
    β = σ_t² − (α_t/α_next)² σ_next²,

        A = (α_next² σ_t² − r² α_t²)/(σ_t (α_next σ_t + r α_t)),   numerator = α_next² β + η²β̃ α_t²
    """
    (alpha, sigma), (alpha_next, sigma_next) = (schedule.alpha_sigma(k) for k in (t, t_next))
    beta, beta_tilde = schedule.step_variances(t, t_next)
    fresh = eta**2 * beta_tilde
    r = (sigma_next**2 - fresh).clamp(min=0).sqrt()
    A = (alpha_next**2 * beta + fresh * alpha**2) / (sigma * (alpha_next * sigma + r * alpha))
    return fresh, A, sigma / alpha


def step(schedule: Schedule, t: float, t_next: float,
         eta: float = 1.0) -> tuple[float, float, float]:
    """(A, c, std) of x_next = A x_0 + c x_t + std z; η = 1 is DDPM, 0 DDIM."""
    fresh, A, _ = step_coefficients(schedule, t, t_next, eta)
    sigma, sigma_next = (schedule.alpha_sigma(k)[1] for k in (t, t_next))
    c = (sigma_next**2 - fresh).clamp(min=0).sqrt() / sigma
    return float(A), float(c), float(fresh.sqrt())


@torch.no_grad()
def gap_along_run(denoiser, x0, noise, times=None, eta=1.0, ideal=None, progress=None,
                  batch_size=64):
    """The gap along the model's own run, from x_T ~ q(x_T | x0): yields, for each t of the grid
    after the first, (t, G, reducible), each (B, ...) float64.

    noise     noise(shape) -> Gaussian like x0: first that of x_T, then that of each step
    times     falling grid, T..1 unless given; the step onto t = 0 is not part of the theorem
    ideal     ideal(x, t) -> E[x_0 | x_t], for `reducible`, which is else None
    progress  label of a progress bar; batch_size: images that the network sees at a time
    """
    schedule = denoiser.schedule
    if times is None:
        start = samplers.initial_time(denoiser)
        times = schedules.time_grid(schedule, start, t_start=start)
    x = schedules.add_noise(schedule, x0, times[0], noise(x0.shape))
    G = torch.zeros_like(double(x0))
    reducible = None if ideal is None else G.clone()
    for t, t_next in pairwise(tqdm(times.tolist(), progress, disable=progress is None,
                                   dynamic_ncols=True, unit="step")):
        x0_hat = torch.cat([denoiser.predict(part, t)[0] for part in x.split(batch_size)])
        A, c, std = step(schedule, t, t_next, eta)
        # A (x̂_0 − x_0) is A σ/α e_t, and has a value where α = 0 too
        G = c * G + A * (double(x0_hat) - double(x0))
        if ideal is not None:
            reducible = c * reducible + A * (double(x0_hat) - double(ideal(x, t)))
        x = A * x0_hat + c * x
        x = x + std * noise(x.shape) if std else x
        yield t_next, G, reducible


def ideal_of_images(images, schedule):
    """ideal(x, t) of a finite set, images (N, ...) as its whole distribution: the mean of the
    images, weighted by N(x; α x_0, σ² I)."""
    flat = double(images).flatten(1)  # (N, D); half the squared norms once:
    half = flat.square().sum(1) / 2

    def ideal(x, t):
        alpha, sigma = map(float, schedule.alpha_sigma(t))
        # −‖x − α x_0‖²/(2 σ²) without the ‖x‖² that all of them share: one matrix product
        log_weights = (alpha * double(x).flatten(1) @ flat.T - alpha**2 * half) / sigma**2
        return (log_weights.softmax(1) @ flat).reshape(x.shape)
    return ideal


# ------------------------------------------------------------------ numbers about G

def inner_products(G):
    """G (B, ...) -> its inner products (B, B): all that the numbers below need."""
    flat = G.flatten(1)
    return (flat @ flat.T).cpu()


def summarize(K, counts):
    """Inner products K (B, B), bootstrap counts (R, B) -> dict: mean, systematic with its interval
    low to high, norm, and boot, the R values of systematic."""
    B, diagonal = len(K), K.diagonal()
    pairs = K - torch.diag(diagonal)  # of different images: one's own square is mostly spread
    # an image counts twice makes a pair with itself, which does not count either
    boot = ((counts @ pairs) * counts).sum(1) / (B**2 - counts.square().sum(1)).clamp(min=1)
    boot = boot.clamp(min=0).sqrt()
    low, high = np.percentile(boot.numpy(), (2.5, 97.5))
    return dict(mean=K.sum().clamp(min=0).sqrt().item() / B,
                systematic=(pairs.sum() / (B * (B - 1))).clamp(min=0).sqrt().item(),
                low=low, high=high, norm=diagonal.clamp(min=0).sqrt().mean().item(), boot=boot)


def bootstrap_counts(B, count=500, seed=0):
    """How often each of B images is counts in each bootstrap sample: (count, B) float64. The same
    for all runs: they are compared image by image."""
    counts = np.random.default_rng(seed).multinomial(B, np.full(B, 1 / B), size=count)
    return torch.from_numpy(counts).double()


# ------------------------------------------------------------------ the program

def measure(denoiser, x0, config, name):
    """One run -> rows of the CSV (dicts, one per t), and the bootstrap values at the end."""
    noise = samplers.SeededNoise([rng.image_seed(config.seed, i) for i in range(len(x0))],
                                 x0.device)
    start = samplers.initial_time(denoiser)
    if (config.steps or 0) > start and not denoiser.schedule.continuous:
        raise ValueError(f"--steps {config.steps}: {name} knows the {start} whole t alone")
    times = schedules.time_grid(denoiser.schedule, config.steps or start, t_start=start)
    ideal = None
    if config.ideal:
        whole = ideal_set(denoiser, config, name).to(x0.device)
        ideal = ideal_of_images(whole, denoiser.schedule)
    which = "x".join(map(str, (config.data or denoiser.settings["data"], *x0.shape[1:])))
    counts, rows, boot = bootstrap_counts(len(x0)), [], None
    tau = gap_weights(denoiser.schedule) if config.eta == 1 and len(times) == start else None
    for t, G, reducible in gap_along_run(denoiser, x0, noise, times, config.eta, ideal, name,
                                         config.batch_size):
        row = dict(run=name, t=t, images=which, n=len(x0), **summarize(inner_products(G), counts))
        boot = row.pop("boot")
        if tau is not None:  # theorem 1's weights belong to this very grid
            row["tau"] = tau[round(t)].item()
        if reducible is not None:
            part = summarize(inner_products(reducible), counts)
            row.update({f"reducible_{k}": v for k, v in part.items() if k != "boot"})
        rows.append(row)
    return rows, boot


def ideal_set(denoiser, config, name):
    """The whole set that a run was trained on, as what is diffused: float32 (N, *space.shape).
    ValueError: it has no end."""
    s = denoiser.settings
    source = config.data or data.require_local(s["data"], name)
    whole = lipschitz.images_of(source, s["image_size"], s["channels"], config.seed)
    if not isinstance(whole, image_files.Array):
        raise ValueError(f"--ideal takes a set that fits into memory, not {source}")
    images = data.to_float(whole.images)
    images = torch.cat([images, images.flip(-1)]) if s["flip"] else images
    return torch.cat([denoiser.encode(part)[0] for part in images.split(256)])


def plot(path, runs, weights):
    """Figure 4: a panel for each quantity, a line for each run; t falls to the right, as in
    sampling. runs: {name: rows}; weights: {schedule: τ}."""
    panels = [("mean", "norm of the batch mean"), ("systematic", "systematic part, 95 %"),
              ("norm", "mean of the norms")]
    if any("reducible_norm" in rows[0] for rows in runs.values()):
        panels += [("reducible_systematic", "reducible: systematic"),
                   ("reducible_norm", "reducible: mean of norms")]
    figure = files.figure(figsize=(3.6 * (len(panels) + 1), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels) + 1)
    for ax, (key, title) in zip(axes, panels, strict=False):
        for (name, rows), style in zip(runs.items(), cycle(STYLES), strict=False):
            if key not in rows[0]:
                continue
            t = [row["t"] for row in rows]
            (line,) = ax.plot(t, [row[key] for row in rows], style, lw=1.2, label=name)
            if key.endswith("systematic"):
                bounds = [[row[key.replace("systematic", end)] for row in rows]
                          for end in ("low", "high")]
                ax.fill_between(t, *bounds, color=line.get_color(), alpha=0.12, lw=0)
                for bound in bounds:  # bands that overlap need edges, each like its line
                    ax.plot(t, bound, style, lw=0.5)
        ax.set(title=title, xlabel="t (sampling goes to the right)", ylim=(0, None),
               ylabel="gap ‖G‖₂ over an image, pixels in [-1, 1]")
    axes[0].legend(fontsize="small")
    for (name, tau), style in zip(weights.items(), cycle(STYLES), strict=False):
        axes[-1].plot(range(2, len(tau)), tau[2:], style, lw=1.2, label=name)
    axes[-1].set(title="weights of DDPM's T steps", xlabel="t (timesteps)",
                 ylabel="τ_t, gap per unit of ε̂'s error", yscale="log")
    axes[-1].legend(fontsize="small")
    for ax in axes:
        ax.invert_xaxis()
    files.save_figure(path, figure, 110)


def add_reductions(runs, boots):
    """Into the last row of each run that saw the first one's images: by how much its systematic
    part is less than the first one's, and the 95 % interval. What the images leave by chance, they
    leave in both: the difference is known better than either part."""
    (first, rows), *_ = runs.items()
    for name, (*_, end) in runs.items():
        if end["images"] == rows[-1]["images"] and end["n"] == rows[-1]["n"]:
            low, high = np.percentile((boots[first] - boots[name]).numpy(), (2.5, 97.5))
            end.update(less=rows[-1]["systematic"] - end["systematic"], less_low=low,
                       less_high=high)


def table_of_ends(runs):
    """The end of each run, and what add_reductions() found."""
    first = next(iter(runs))
    lines = [f"{'at t = 1':24s} {'images':>6s} {'mean':>7s} {'systematic, 95 %':>22s} {'norm':>7s}"]
    for name, rows in runs.items():
        end = rows[-1]
        interval = f"{end['systematic']:.3f} [{end['low']:.3f}, {end['high']:.3f}]"
        line = f"{name:24s} {end['n']:6d} {end['mean']:7.3f} {interval:>22s} {end['norm']:7.3f}"
        if "reducible_norm" in end:
            line += (f"   reducible: systematic {end['reducible_systematic']:.3f}, "
                     f"norm {end['reducible_norm']:.3f}")
        if name != first and "less" in end:
            line += (f"   {first} has {end['less']:.3f} more "
                     f"[{end['less_low']:.3f}, {end['less_high']:.3f}]")
        lines.append(line)
    return "\n".join(lines)


def illustrate(path, nfe=50, size=0.15):
    """Figure 1 in one dimension: two networks that are wrong by the same amount at every step, one
    always to the same side, one by turns."""
    schedule, mixture = schedules.make_schedule("linear"), toy.two_bumps()
    exact, x_T = toy.oracle(mixture, schedule), torch.tensor([[0.4]], dtype=torch.float64)
    figure = files.figure(figsize=(10, 3.8), layout="constrained")
    (left, right), rows, right_path = figure.subplots(1, 2), [], None
    for (name, sign), style in zip({"ideal network": lambda i: 0, "errors add up": lambda i: 1,
                                    "errors cancel": lambda i: (-1) ** i}.items(), STYLES,
                                   strict=False):
        seen = []

        def net(x, c, sign=sign, seen=seen):
            seen.append((float(c[0]), x.item()))
            return exact(x, c) + size * sign(len(seen))
        end = samplers.sample(Denoiser(net, schedule), x_T, nfe=nfe)
        t, x = np.array([*seen, (0.0, end.item())]).T
        right_path = x if right_path is None else right_path  # the first is the ideal one
        left.plot(t, x, style, label=name)
        right.plot(t, abs(x - right_path), style, label=name)
        rows += [dict(run=name, t=a, x=b, gap=abs(b - c))
                 for a, b, c in zip(t, x, right_path, strict=True)]
        print(f"{name}: at t = 0, {rows[-1]['gap']:.4f} from the ideal run")
    left.set(xlabel="t (sampling goes to the right)", ylabel="x_t (units of the data)",
             title=f"three runs of DDIM, {nfe} steps; each ε off by 0 or ±{size}")
    right.set(xlabel="t (timesteps)", ylabel="distance from the ideal run (units of the data)",
              title="gap")
    for ax in (left, right):
        ax.invert_xaxis()
        ax.legend()
    files.save_figure(path, figure, 110)
    files.write_csv(path.with_suffix(".csv"), rows)


@dataclass
class GapConfig:
    runs: tuple[str, ...] = flag((), "names under runs/, run folders, or checkpoints (default: the "
                                 "newest run); LABEL=RUN gives it a name in the figure",
                                 positional="RUN", nargs="*", group="measurement")
    illustrate: bool = flag(False, "draw figure 1 of the paper, in one dimension")
    num: int = flag(64, "images, each with its own noises; a thousand are needed to distinguish "
                    "good networks", short="-n")
    steps: int | None = flag(None, "N points of the grid from T to 1, N - 1 steps", shown="T")
    eta: float = flag(1.0, "share of fresh noise: 1 DDPM, 0 DDIM")
    ideal: bool = flag(False, "take the run's whole data set as the truth: adds the reducible gap "
                       "(time grows with its number of images)")
    data: str | None = flag(None, "images to start from", shown="the run's own set")
    batch_size: int = flag(64, "images at a time")
    device: str = device_flag()
    seed: int = flag(0, "of the choice of images; the noise of image i is a function of (seed, i)")
    weights: str = flag("ema", "averaged or last weights", choices=("ema", "raw"))
    out: Path | None = flag(None, "the figure; its .csv goes next to it",
                            shown="gap.png or illustration.png")

    prog: ClassVar[str] = "gap.py"
    usage: ClassVar[str] = "python gap.py [RUN ...] [flags]"
    description: ClassVar[str] = ("Measure how the errors of a sampling run add up: theorem 1 of "
                                  "SA-DPM.")
    examples: ClassVar[str] = """\
  python gap.py shapes-tiny shapes-tiny-sa2 -n 1000
      the gap along 1000 steps of DDPM, without and with SA-2: figure 4, as gap.png and gap.csv
  python gap.py fashion-mnist-tiny fashion-mnist-tiny-sa2 --steps 100 --ideal
      also what training could remove: the gap from the ideal network of that set of images
  python gap.py --illustrate
      figure 1: errors of one size at every step, that add up or cancel"""

    def check(self):
        if self.illustrate and (unused := sorted(self.given - {"illustrate", "out"})):
            raise ValueError(f"{flag_name(unused[0])} has no effect with --illustrate, which "
                             "measures no run")
        for name, least in (("num", 2), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{flag_name(name)} must be at least {least}, not "
                                 f"{getattr(self, name)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"--eta must be between 0 and 1, not {self.eta}")
        if self.steps is not None and self.steps < 2:
            raise ValueError(f"--steps must be at least 2, not {self.steps}")
        self.out = self.out or Path("illustration.png" if self.illustrate else "gap.png")
        lipschitz.check_figure(self.out)


def main(argv=None):
    config = parse_into(GapConfig, argv)
    if config.illustrate:
        illustrate(config.out)
    with distributed.init(tf32=False, device=config.device) as dist:
        if not dist.is_main:  # nothing to share out: one process measures
            return
        runs, boots, weights = {}, {}, {}
        opened = [] if config.illustrate else lipschitz.open_runs(config, dist.device)
        for name, denoiser, x0 in opened:
            runs[name], boots[name] = measure(denoiser, x0, config, name)
            s = denoiser.settings
            kind = f"{s['schedule']}{', continuous' * s['continuous']}, {s['image_size']} pixels"
            weights[kind] = gap_weights(denoiser.schedule)
    if runs:
        add_reductions(runs, boots)
        plot(config.out, runs, weights)
        files.write_csv(config.out.with_suffix(".csv"), [r for rows in runs.values() for r in rows])
        print(table_of_ends(runs))
    print(f"figure: {config.out.resolve()}\n"
          f"numbers: {config.out.with_suffix('.csv').resolve()}")


if __name__ == "__main__":
    run_main(main)
