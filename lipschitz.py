r"""How fast does a network's output change with t alone? E-TSDM's Lipschitz constants, as curves.

    K(t, t') = E ‖net(x_t, f(t)) − net(x_t, f(t'))‖₂ / |t − t'|,  t' = t + dt              eq. 8

E-TSDM (Yang et al., ICLR 2024), figures 1b, A1, A2, A5, A7: x_t, drawn at t, is fixed, and the
network receives first t, then t' as its time input. The ideal ε has an infinite slope at t = 0
(theorem 3.1), and an ordinary network tries to follow. Shared time inputs, f(t) = f(t'), make K
exactly 0 inside a sub-interval: all change is left to the step onto the next. Figure 2 (--perturb)
moves x_t instead, and measures how far the predicted x_0 moves:

    ‖x̂_0(x_t + scale z) − x̂_0(x_t)‖₂,  z ~ N(0, I)

Not here: a bound. K is a mean of difference quotients, over some images.

    python lipschitz.py NAME OTHER             # two runs under runs/: a picture, a .csv and a table

x_t = α x_0 + σ ε, x0 (N, C, H, W) in [-1, 1]; f the time input; net's raw output: ε, v or x_0.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import losses
from denoiser import Denoiser, load_run
from schedules import add_noise
from support import checkpoint, distributed, files, rng
from support.cli import device_flag, flag, flag_name, parse_into
from support.device import double
from support.programs import run_main

STYLES = ("k-o", "C1--s", "C0-.^", "C2:D", "C3-v", "C4--P", "C5-.X")  # distinct without colour


def lipschitz_constants(denoiser: Denoiser, x0: Tensor, ts, dt: float = 1, seed: int = 0,
                        batch_size: int = 64) -> Tensor:
    """Equation 8 at each t of ts: (len(ts),) float64, the mean over the images of
    difference_quotients()."""
    return difference_quotients(denoiser, x0, ts, dt, seed, batch_size).mean(1)


def difference_quotients(denoiser: Denoiser, x0: Tensor, ts, dt: float = 1, seed: int = 0,
                         batch_size: int = 64, label: str | None = None) -> Tensor:
    r"""‖net(x_t, f(t)) − net(x_t, f(t + dt))‖₂/dt of each image: (len(ts), N) float64, on the CPU.

    x_t is drawn at t. 1/dt magnifies a float32 network's rounding, 1e-6 of its output or so.
    label: of a progress bar. ValueError: dt <= 0; t or t + dt not in [0, T]; dt lost in float32.
    """
    T, ts = denoiser.schedule.T, [float(t) for t in ts]
    if not (ts and dt > 0 and 0 <= min(ts) <= max(ts) <= T - dt):
        raise ValueError(f"--dt must be above 0, and t from 0 to T - dt = {T - dt:g}")
    last = torch.tensor([max(ts) + dt, max(ts)], dtype=torch.float64).to(x0.dtype).double()
    if abs((last[0] - last[1]).item() / dt - 1) > 0.02:  # the network's time input has x's dtype
        raise ValueError(f"--dt {dt:g} is lost in the rounding of t = {max(ts):g}: use a larger "
                         "--dt or a smaller --max-t")

    def outputs(x0, eps, z, t):
        # Two calls also where f(t) = f(t'): the 0 is measured, not assumed. Of one shape, which is
        # what makes it exact: in one batch of 2 B, kernels may round rows j and B + j differently.
        xt = add_noise(denoiser.schedule, x0, t, eps)
        return denoiser.prediction_at(xt, t), denoiser.prediction_at(xt, t, t_input=t + dt)
    return distances(outputs, denoiser.net, x0, ts, seed, batch_size, label) / dt  # eq. 8


def displacements(denoiser: Denoiser, x0: Tensor, scales, t: float = 100, seed: int = 0,
                  batch_size: int = 64, label: str | None = None) -> Tensor:
    """‖x̂_0(x_t + scale z) − x̂_0(x_t)‖₂ per image: (len(scales), N). ValueError: t not in (0, T)."""
    if not 0 < t < denoiser.schedule.T:  # at T there may be no signal, and no x̂_0 from ε
        raise ValueError(f"--t must be above 0 and below {denoiser.schedule.T}, not {t:g}")

    def outputs(x0, eps, z, scale):
        xt = add_noise(denoiser.schedule, x0, t, eps)
        return denoiser.predict(xt, t)[0], denoiser.predict(xt + scale * z, t)[0]  # figure 2
    return distances(outputs, denoiser.net, x0, scales, seed, batch_size, label)


@torch.no_grad()
def distances(outputs, net, x0: Tensor, values, seed: int, batch_size: int,
              label: str | None) -> Tensor:
    r"""‖p − q‖₂, (p, q) = outputs(x_0, ε, z, value), of each value and image; net in eval mode.

    ε and z of image i depend on (seed, i) alone: runs are paired, batch sizes do not matter.
    """
    found = torch.empty(len(values), len(x0), dtype=torch.float64)
    noise = torch.stack([torch.randn((2, *x0.shape[1:]), generator=rng.generator(seed, i))
                         for i in range(len(x0))], 1).to(x0)  # ε and z: (2, N, ...)
    # Module by module, since a frozen part may stay in eval mode; a plain function has none.
    training = [m for m in getattr(net, "modules", list)() if m.training]
    try:
        for m in training:
            m.training = False
        for i, value in enumerate(tqdm(values, label, disable=label is None)):
            for start in range(0, len(x0), batch_size):
                rows = slice(start, start + batch_size)
                p, q = outputs(x0[rows], *noise[:, rows], value)
                found[i, rows] = (double(p) - double(q)).flatten(1).norm(dim=1)
    finally:
        for m in training:
            m.training = True
    return found


# ------------------------------------------------------------------ runs, and images for them

def open_runs(config, device) -> Iterator[tuple[str, Denoiser, Tensor]]:
    """Yield (name, denoiser, x0) for each of config.runs, or the newest. gap.py uses this too.

    x0, float32 (num, *shape): the first config.num images in the order of config.seed, of
    config.data or of the run's own set; all of them, if there are fewer. Of a latent run, their
    latents. ValueError, OSError: one line.
    """
    names = set()
    for run in config.runs or [None]:
        label, run = split_label(run)
        path = checkpoint.find_checkpoint(run).resolve()
        denoiser, name = load_run(path, config.weights), label or path.parent.name
        while name in names:  # the same run twice, or two of one name
            name += "'"
        names.add(name)
        s = denoiser.settings
        if s.get("factor"):
            raise ValueError(f"{name} enlarges images, and draws nothing from noise alone")
        dataset = images_of(config.data or data.require_local(s["data"], name), s["image_size"],
                            s["channels"], config.seed)
        num = min(config.num, len(dataset))
        x0 = data.to_float(next(data.batches(dataset, num, 0, config.seed)))
        print(f"{name}: {num} of {dataset.summary}", flush=True)
        denoiser.net.to(device)
        yield name, denoiser, denoiser.encode(x0.to(device))[0]


@lru_cache(maxsize=2)
def images_of(source: str, size: int, channels: int, seed: int):
    """A data set, kept: several runs are measured on the same images. Broken files are left out;
    the summary counts them."""
    return data.load(source, size, channels, seed, skip_bad=True, progress=True)


def split_label(run: str | None) -> tuple[str | None, str | None]:
    """LABEL=RUN -> (label, run); a run alone, or a path that contains a = -> (None, run)."""
    label, equals, rest = (run or "").partition("=")
    return (label, rest) if equals and label and not os.path.exists(run) else (None, run)


# ------------------------------------------------------------------ the program

@dataclass
class LipschitzConfig:
    runs: tuple[str, ...] = flag((), "names under runs/, folders or checkpoints (default: the "
                                 "newest run); LABEL=RUN gives it a name in the figure",
                                 positional="RUN", nargs="*", group="measurement")
    num: int = flag(64, "images; under torchrun write -n", short="-n")
    data: str | None = flag(None, "images to measure on", shown="each run's own set")
    dt: float = flag(1.0, "t' - t, in timesteps")
    max_t: float = flag(np.inf, "the largest t", shown="T - dt")
    perturb: bool = flag(False, "move x_t instead of t")
    t: float = flag(100.0, "with --perturb: at this t")
    scales: tuple[float, ...] = flag((0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
                                     "with --perturb: std of the noise", nargs="+")
    batch_size: int = flag(64, "images at a time")
    device: str = device_flag()
    seed: int = flag(0, "of the choice of images and the noise")
    weights: str = flag("ema", "averaged or last weights", choices=("ema", "raw"))
    out: Path | None = flag(None, "the picture; its .csv goes next to it",
                            shown="lipschitz.png or perturb.png")

    prog: ClassVar[str] = "lipschitz.py"
    usage: ClassVar[str] = "python lipschitz.py [RUN ...] [flags]"
    description: ClassVar[str] = ("How much a network's output changes with t alone: curves, as "
                                  "PNG and CSV.")
    examples: ClassVar[str] = """\
  python lipschitz.py A B -n 256             K(t, t + 1) without and with E-TSDM: figure 1b
  python lipschitz.py A --dt 0.01 --max-t 9  a --continuous run, close to its singularity
  python lipschitz.py A B --perturb          how far the predicted x_0 moves with x_t: figure 2"""

    def check(self):
        for name in ("dt", "max_t") if self.perturb else ("t", "scales"):
            if name in self.given:
                raise ValueError(f"{flag_name(name)} has no effect "
                                 f"{'with' if self.perturb else 'without'} --perturb")
        for name, least in (("num", 1), ("batch_size", 1), ("seed", 0), ("max_t", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{flag_name(name)} must be at least {least}, not "
                                 f"{getattr(self, name)}")
        if not self.dt > 0:
            raise ValueError(f"--dt must be above 0, not {self.dt:g}")
        self.out = self.out or Path("perturb.png" if self.perturb else "lipschitz.png")
        check_figure(self.out)


def check_figure(out: Path) -> None:
    """ValueError unless --out names a .png in a folder that exists."""
    if out.suffix != ".png" or not out.resolve().parent.is_dir():
        raise ValueError(f"--out {out} must be a .png in a folder that exists")


def measure(config, name, denoiser, x0):
    """One run -> t or scales (m,), numbers (m, N), edges of sub-intervals in t, a line of text."""
    s, dt, how = denoiser.settings, config.dt, (config.seed, config.batch_size, name)
    if (config.t if config.perturb else dt) % 1 and not s["continuous"]:
        raise ValueError(f"--{'t' if config.perturb else 'dt'}: {name} has whole timesteps only; a "
                         "fraction needs --continuous runs")
    if config.perturb:
        k = displacements(denoiser, x0, config.scales, config.t, *how).numpy()
        return config.scales, k, [], map("{:g}: {:.3g}".format, config.scales, k.mean(1))
    edges = np.linspace(0, s["etsdm_interval"], s["etsdm_n"] + 1) if s["etsdm"] else np.zeros(0)
    # Only times that were trained on: a table's begin at 1. Dense up to 120 dt, evenly in log t
    # from there; and the step across each edge.
    low, high = losses.time_range(denoiser.schedule, denoiser.prediction)
    low = 0 if s["continuous"] else low
    last = min(high - dt, config.max_t) // dt * dt
    across = edges - dt / 2 if dt % 1 else dt * (np.ceil(edges / dt) - 1)
    far = np.geomspace(120, max(last / dt, 120), 40).round()
    xs = np.unique(np.clip([*dt * np.arange(121), *dt * far, 100, 500, *across], low, last))
    if last < low:
        raise ValueError(f"--max-t {config.max_t:g} and --dt {dt:g} leave no t from {low:g} on")
    k = difference_quotients(denoiser, x0, xs, dt, *how).numpy()
    f = denoiser.time_input or float
    mean, shared = k.mean(1), [bool(f(t) == f(t + dt)) for t in xs]
    return xs, k, edges, [
        *(f"K({t:g}) = {m:.3g}" for t, m in zip(xs, mean, strict=True) if t in (low, 100, 500)),
        "largest below 100: {:.3g} at {:g}".format(*max(zip(mean * (xs < 100), xs, strict=True))),
        f"exactly 0 at {(mean[shared] == 0).sum()} of {sum(shared)} t inside sub-intervals"]


def write(config, curves):
    """The .csv, and the picture: means as lines, the middle 80 % of the images as shades."""
    axes = files.figure(figsize=(7.5, 4.5), layout="constrained").add_subplot()
    rows = []
    for i, (name, (xs, k, edges, _)) in enumerate(curves.items()):
        mean, (p10, p50, p90) = k.mean(1), np.percentile(k, (10, 50, 90), axis=1)
        (line,) = axes.plot(xs, mean, STYLES[i % len(STYLES)], ms=3, lw=1, label=name)
        axes.fill_between(xs, p10, p90, color=line.get_color(), alpha=0.15, lw=0)
        axes.vlines(edges, 0, 1, "0.8", lw=0.6, zorder=0, transform=axes.get_xaxis_transform())
        for x, *row in zip(xs, mean, p10, p50, p90, strict=True):
            at = dict(t=config.t, scale=x) if config.perturb else dict(t=x, dt=config.dt)
            rows.append(dict(run=name, **at, **dict(zip(("mean", "p10", "p50", "p90"), row,
                                                         strict=True))))
    axes.set(xlim=(0, None), ylim=(0, None), ylabel="movement of the predicted x_0 (L2 norm)",
             xlabel=f"std of the noise added to x_t, t = {config.t:g} (pixels are in [-1, 1])")
    if not config.perturb:  # symlog: linear up to t = 120 dt = far, and down to an exact 0
        far = 120 * config.dt
        ticks = [*np.linspace(0, far, 7), *(t for t in (2, 5, 20, 50, 200, 500, 1000) if t > far)]
        least = min((row["mean"] for row in rows if row["mean"] > 0), default=1)
        axes.set_xscale("symlog", linthresh=far, linscale=2)
        axes.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(least)), linscale=0.3)
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.set(xlim=(0, max(row["t"] for row in rows) + 2 * config.dt), xlabel="t (timesteps)",
                 ylabel=f"K(t, t + {config.dt:g}): output's L2 change per timestep")
    axes.legend()
    files.save_figure(config.out, axes.figure, 150)
    files.write_csv(config.out.with_suffix(".csv"), rows)


def main(argv=None):
    config, curves = parse_into(LipschitzConfig, argv), {}
    with distributed.init(tf32=False, device=config.device) as dist:
        if not dist.is_main:  # one process does it all
            return
        for name, denoiser, x0 in open_runs(config, dist.device):
            curves[name] = measure(config, name, denoiser, x0)
    write(config, curves)
    print(*(f"{name}:  {';  '.join(words)}" for name, (*_, words) in curves.items()), sep="\n")
    print(f"picture: {config.out.resolve()}, numbers: {config.out.with_suffix('.csv').resolve()}")


if __name__ == "__main__":
    run_main(main)
