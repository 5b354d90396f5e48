r"""Measure E-TSDM where it should help: the loss near t = 0, and the last steps of sampling.

E-TSDM (ICLR 2024) changes the time input below t = 100, and its paper reports the FID of whole
runs. Larger t determine most of a sampling run and of its spread. Here networks are compared at
small t, with the same images, times and noises, so that these cancel:

    loss    E‖ε − ε_θ(x_t, t)‖²/D, t uniform in a bin                                DDPM, eq. 14
    late    x_s ~ q(x_s | x_0), s = --t-start; a sampler walks from s to 0 and draws y

If network and sampler are exact, y is a draw of q(x_0 | x_s), as x_0 is. Then

    error   E‖y − x_0‖²/D is twice `best`, the error of E[x_0 | x_s], which one network call gives
    power   y and x_0 have the same power spectrum: a ratio of 1 in each band of frequencies
    FD      the features of y and of x_0 (--features) have a Fréchet distance of 0, up to chance

The error alone is not sufficient, because a blurred y has a smaller error. Power and FD notice it.

Not here: whole runs (metrics.py), the slope in t (lipschitz.py).

    python -m papers.late A B --data t10k-images-idx3-ubyte.gz -n 1000   # B against A: late.png

x0, y (N, C, H, W) in [-1, 1], D = C H W. ± is one standard error over the images, by the jackknife.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from tqdm import tqdm

import lipschitz
import samplers
from losses import mean_square, simple_loss, time_range
from metrics import frechet_distance
from schedules import add_noise
from support import distributed, features, files, measure, rng
from support.cli import flag, parse_into, require
from support.device import double
from support.programs import run_main

BANDS = (0, 0.25, 0.5, 0.75, 1)  # edges, in shares of the highest frequency of rows and columns
PARTS = 20  # of the jackknife


@torch.no_grad()
def loss_by_t(denoiser, x0, edges, seed=0, batch_size=64, label=None):
    """‖ε − ε̂‖²/D of each image at one t of each bin [low, high): (bins, N) float64. t and ε are
    functions of (seed, i, bin); t is an integer unless the schedule is continuous."""
    found = torch.empty(len(edges) - 1, len(x0), dtype=torch.float64)
    with measure.evaluating(denoiser.net):
        for j, (low, high) in enumerate(pairwise(tqdm(edges, label, disable=label is None))):
            streams = [rng.generator(seed, i, j) for i in range(len(x0))]
            u = torch.cat([torch.rand(1, dtype=torch.float64, generator=g) for g in streams])
            t = low + (high - low) * u
            t = t if denoiser.schedule.continuous else t.floor().long()
            noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in streams]).to(x0)
            for rows in torch.arange(len(x0)).split(batch_size):
                found[j, rows] = double(simple_loss(denoiser, x0[rows], t[rows], noise[rows])).cpu()
    return found


@torch.no_grad()
def late_runs(denoiser, x0, t_start=200, seed=0, batch_size=64, **sampling):
    """Sample from x_s ~ q(x_s | x_0), s = t_start, to t = 0 -> (y, x̂_0 at x_s), each like x0. The
    noises of image i are functions of (seed, i). sampling: arguments of samplers.sample()."""
    pairs = []
    with measure.evaluating(denoiser.net):
        for rows in torch.arange(len(x0)).split(batch_size):
            noise = samplers.SeededNoise([rng.image_seed(seed, i) for i in rows], x0.device)
            x = add_noise(denoiser.schedule, x0[rows], t_start, noise(x0[rows].shape).to(x0))
            y = samplers.sample(denoiser, x, t_start=t_start, noise=noise, **sampling)
            pairs.append((y, denoiser.predict(x, t_start)[0]))
    return tuple(map(torch.cat, zip(*pairs, strict=True)))


def band_powers(x):
    """Power of each image in each band of BANDS (the last includes its upper edge): (bands, N)."""
    power = torch.fft.fft2(double(x), norm="ortho").abs().square().sum(1)  # over channels
    rows, columns = (torch.fft.fftfreq(n, device=power.device).abs() * 2 for n in x.shape[-2:])
    f = torch.maximum(rows[:, None], columns)
    return torch.stack([power[:, (f >= low) & (f < high + (high == 1))].sum(1)
                        for low, high in pairwise(BANDS)]).cpu()


def jackknife(statistic, n):
    """Values of statistic(indices of images): for all n, then without each part: (1 + parts,)."""
    part = np.random.default_rng(0).permutation(n) % min(PARTS, n)
    kept = [np.arange(n), *(np.flatnonzero(part != k) for k in range(part.max() + 1))]
    return np.array([float(statistic(torch.from_numpy(k))) for k in kept])


def standard_error(values):
    """The standard error from the values of jackknife()."""
    return np.sqrt((len(values) - 2) * values[1:].var())


def measure_late(config, name, denoiser, x0, net):
    """Measure one run -> {(measure, low, high): jackknife values}."""
    low, high = time_range(denoiser.schedule, denoiser.prediction)
    if len(x0) < 4:
        raise ValueError(f"--data must have 4 images or more, not {len(x0)}")
    require(config, "t_start", config.t_start <= high, f"must be at most {high} for {name}")
    if any(t % 1 for t in config.edges) and not denoiser.schedule.continuous:
        raise ValueError(f"--edges must be whole numbers: {name} is not a --continuous run")
    if config.clip and denoiser.value_range is None:
        raise ValueError("--clip has no effect on latents, which have no range: leave it out")
    edges = [low, *(t for t in config.edges if low < t < high), high]
    how, N, late = dict(seed=config.seed, batch_size=config.batch_size), len(x0), config.t_start
    loss = loss_by_t(denoiser, x0, edges, label=name, **how)
    found = {("loss", *pair): jackknife(lambda i, row=row: row[i].mean(), N)
             for pair, row in zip(pairwise(edges), loss, strict=True)}

    y, best = late_runs(denoiser, x0, late, sampler=config.sampler, nfe=config.nfe or late,
                        variance=config.variance, **how,
                        clip=denoiser.value_range if config.clip else None)
    if not y.isfinite().all():
        raise ValueError(f"{name}: the late runs are not finite: try --clip, or other --weights")
    for key, answer in (("error", y), ("best", best)):
        square = mean_square(double(answer) - double(x0)).cpu()
        found[key, 0, late] = jackknife(lambda i, square=square: square[i].mean(), N)
    for pair, a, b in zip(pairwise(BANDS), band_powers(y), band_powers(x0), strict=True):
        found["power", *pair] = jackknife(lambda i, a=a, b=b: a[i].sum() / b[i].sum(), N)
    if net is not None:
        f, g = (torch.cat([double(net(denoiser.decode(part).expand(-1, 3, -1, -1).clamp(-1, 1)))
                           for part in x.split(config.batch_size)]).flatten(1).cpu()
                for x in (y, x0))
        found["FD", 0, late] = jackknife(lambda i: frechet_distance(
            f[i].mean(0), f[i].T.cov(), g[i].mean(0), g[i].T.cov()), N)
    return found


def make_rows(runs):
    """{run: result of measure_late()} -> rows of the table. change: from the first run, in percent.
    Its standard error is that of paired values, since all runs share images and noises."""
    rows, first = [], next(iter(runs.values()))
    for name, found in runs.items():
        for key, values in found.items():
            row = dict(zip(("run", "measure", "low", "high"), (name, *key), strict=True),
                       value=values[0], se=standard_error(values))
            if found is not first and key in first:
                change = 100 * (values / first[key] - 1)
                row |= dict(change=change[0], change_se=standard_error(change))
            rows.append(row)
    return rows


def plot_rows(rows, runs, title):
    """Plot the loss relative to the first run, and the spectrum of the late runs. Bars: ± 2
    standard errors; for all runs except the first, those of the difference from the first."""
    figure = files.figure(figsize=(11, 4), layout="constrained")
    first, panels = next(iter(runs)), figure.subplots(1, 2)
    for ax, what, value, line in zip(panels, ("loss", "power"), ("change", "value"), (0, 1),
                                     strict=True):
        for i, name in enumerate(runs):
            own = [r for r in rows if (r["run"], r["measure"]) == (name, what) and value in r]
            bars = [2 * (r["change_se"] * (r["value"] / 100 if what == "power" else 1)
                         if "change" in r else r["se"]) for r in own]
            style = measure.LINES[i % len(measure.LINES)] + measure.MARKERS[i % 7]
            if own:
                ax.errorbar(range(len(own)), [r[value] for r in own], bars, fmt=style, ms=3, lw=1,
                            capsize=2, label=name)
                ax.set_xticks(range(len(own)), ["{low:g}–{high:g}".format(**r) for r in own])
                ax.legend(fontsize="small")
        ax.axhline(line, color="0.7", lw=0.8, zorder=0)
    panels[0].set(xlabel="t (timesteps)", ylabel=f"loss against that of {first}, %")
    panels[0].tick_params("x", rotation=45)
    panels[1].set(xlabel="frequency/highest", ylabel="power of y/power of x_0", title=title)
    return figure


@dataclass
class LateConfig(measure.MeasureConfig):
    edges: tuple[float, ...] = flag((2, 5, 10, 20, 40, 60, 80, 100, 200, 400, 700), "t between the "
                                    "bins of the loss", nargs="+", group="measures")
    t_start: int = flag(200, "the t at which the late part begins", low=1)
    sampler: str = flag("ddpm", "sampler of the late part", choices=samplers.SAMPLERS)
    nfe: int | None = flag(None, "network calls of the late part", shown="every t", low=1)
    variance: str | None = flag(None, "ddpm: of the fresh noise", choices=("small", "large"),
                                shown="small")
    clip: bool = flag(False, "keep the predicted x_0 in the data's range")
    features: Path | None = flag(None, "a network for FD. Such a file can run code: use only files "
                                 "that you trust")
    prog: ClassVar[str] = "python -m papers.late"
    usage: ClassVar[str] = "python -m papers.late [RUN ...] [flags]"
    description: ClassVar[str] = "Measure the loss by t and the errors of the last sampling steps."
    examples: ClassVar[str] = """\
  python -m papers.late A B --data t10k-images-idx3-ubyte.gz -n 1000
      compares B with A at small t, on images that were not used in training
  python -m papers.late A B --sampler ddim --nfe 20
      the last 20 of 100 calls of DDIM"""
    picture: ClassVar[str] = "late.png"
    least: ClassVar[dict] = measure.MeasureConfig.least | dict(num=4, edges=0)

    def check(self):
        super().check()
        if any(a >= b for a, b in pairwise(self.edges)):
            raise ValueError("--edges must rise, not " + " ".join(map(str, self.edges)))


def main(argv=None):
    config, runs, images = parse_into(LateConfig, argv), {}, None
    with distributed.init(tf32=False, device=config.device) as dist:
        if not dist.is_main:  # one process measures
            return
        net = features.open_exported(config.features, dist.device) if config.features else None
        for name, denoiser, x0 in lipschitz.open_runs(config, dist.device):
            images = images if runs else x0
            if not torch.equal(x0, images):
                raise ValueError(f"{name} has other images than {next(iter(runs))}: give --data")
            runs[name] = measure_late(config, name, denoiser, x0, net)
    rows = make_rows(runs)
    for row in rows:
        text = "{run:24s} {measure:5s} {low:6g} to {high:4g}: {value:.4g} ± {se:.2g}"
        text += "   {change:+.2f} ± {change_se:.2f} %" * ("change" in row)
        print(text.format(**row))
    title = f"late part: {config.sampler} from t = {config.t_start}"
    measure.save_measurement(config.out, plot_rows(rows, runs, title), rows)


if __name__ == "__main__":
    run_main(main)
