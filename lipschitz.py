r"""E-TSDM's Lipschitz constants: curves of how fast a network's output changes with t alone.

    K(t, t') = E ‖net(x_t, f(t)) − net(x_t, f(t'))‖₂ / |t − t'|,  t' = t + dt              eq. 8

E-TSDM (ICLR 2024), figures 1b, A1, A2, A5, A7: x_t is drawn at t and stays fixed. The network's
time input is first that of t, then that of t'. The ideal ε has an infinite slope at t = 0 (theorem
3.1). Shared time inputs, f(t) = f(t'), make K exactly 0 inside a sub-interval. Figure 2 (--perturb)
moves x_t instead and measures ‖x̂_0(x_t + scale z) − x̂_0(x_t)‖₂, z ~ N(0, I).

Not here: a bound. K is a mean of difference quotients, over some images.

    python lipschitz.py NAME OTHER             # two runs under runs/ -> a figure, a .csv, a table

x_t = α x_0 + σ ε, x0 (N, C, H, W) in [-1, 1]; f the time input; net's raw output: ε, v or x_0.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import losses
from denoiser import Denoiser, load_run
from schedules import add_noise
from support import distributed, files, measure, rng
from support.cli import flag, flag_name, parse_into
from support.device import double
from support.programs import run_main

load_images = lru_cache(maxsize=2)(data.load)  # several runs are measured on the same images

def lipschitz_constants(denoiser: Denoiser, x0: Tensor, ts: list, dt: float = 1, **how) -> Tensor:
    """Equation 8 at each t of ts: (len(ts),) float64, means over the images. how: of distances()"""
    return difference_quotients(denoiser, x0, ts, dt, **how).mean(1)


def difference_quotients(denoiser: Denoiser, x0: Tensor, ts: list, dt: float = 1, **how) -> Tensor:
    """‖net(x_t, f(t)) − net(x_t, f(t + dt))‖₂/dt of each image: (len(ts), N) float64. A small dt
    magnifies rounding errors. ValueError: t + dt rounds to t, or t or t + dt is not in [0, T]."""
    T, ts = denoiser.schedule.T, [float(t) for t in ts]
    if not (ts and dt > 0 and 0 <= min(ts) <= max(ts) <= T - dt):
        raise ValueError(f"--dt must be above 0, and t from 0 to T - dt = {T - dt:g}")
    last = torch.tensor([max(ts), max(ts) + dt], dtype=torch.float64).to(x0.dtype).double()
    if abs(last.diff().item() / dt - 1) > 0.02:  # the network's time input has x's dtype
        raise ValueError(f"--dt {dt:g} is lost in rounding at t = {max(ts):g}: lower --max-t")

    def outputs(x0, eps, z, t):
        # Two calls even if f(t) = f(t'), so that the 0 is measured, not assumed. Equal shapes make
        # it exact: in one batch of 2 B, kernels may round rows j and B + j differently.
        xt = add_noise(denoiser.schedule, x0, t, eps)
        return denoiser.prediction_at(xt, t), denoiser.prediction_at(xt, t, t_input=t + dt)
    return distances(outputs, denoiser.net, x0, ts, **how) / dt


def displacements(denoiser: Denoiser, x0: Tensor, scales: list, t: float = 100, **how) -> Tensor:
    """‖x̂_0(x_t + scale z) − x̂_0(x_t)‖₂ per image: (len(scales), N). ValueError: t not in (0, T)."""
    if not 0 < t < denoiser.schedule.T:  # at T, α may be 0: ε then gives no x̂_0
        raise ValueError(f"--t must be above 0 and below {denoiser.schedule.T}, not {t:g}")
    def outputs(x0, eps, z, scale):
        xt = add_noise(denoiser.schedule, x0, t, eps)
        return denoiser.predict(xt, t)[0], denoiser.predict(xt + scale * z, t)[0]
    return distances(outputs, denoiser.net, x0, scales, **how)


@torch.no_grad()
def distances(outputs: Callable, net: Callable, x0: Tensor, values: list, seed: int = 0,
              batch_size: int = 64, label: str | None = None) -> Tensor:
    """‖p − q‖₂ for each value and image, (p, q) = outputs(x_0, ε, z, value); net in eval mode. ε
    and z of image i depend only on (seed, i): the same for all runs and batch sizes."""
    found = torch.empty(len(values), len(x0), dtype=torch.float64)
    noise = torch.stack([torch.randn((2, *x0.shape[1:]), generator=rng.generator(seed, i))
                         for i in range(len(x0))], 1).to(x0)  # ε and z: (2, N, ...)
    with measure.evaluating(net):
        for i, value in enumerate(tqdm(values, label, disable=label is None)):
            for rows in torch.arange(len(x0)).split(batch_size):
                p, q = outputs(x0[rows], *noise[:, rows], value)
                found[i, rows] = (double(p) - double(q)).flatten(1).norm(dim=1).cpu()
    return found


def open_runs(config: measure.MeasureConfig, device: torch.device) -> Iterator[tuple]:
    """Yield (name, denoiser, x0) for each run. x0, float32 (num, *shape): the first config.num of
    the images (config.data, else the run's own), or their latents, in the order of config.seed."""
    for name, path in config.named_runs():
        denoiser = load_run(path, config.weights)
        s = denoiser.settings
        if s.get("factor"):
            raise ValueError(f"{name} is a super-resolution run, which this program cannot measure")
        dataset = load_images(config.data or data.require_local(s["data"], name), s["image_size"],
                              s["channels"], config.seed, skip_bad=True, progress=True)
        images = next(data.batches(dataset, min(config.num, len(dataset)), 0, config.seed))
        print(f"{name}: {len(images)} of {dataset.summary}", flush=True)
        denoiser.net.to(device)
        yield name, denoiser, denoiser.encode(data.to_float(images).to(device))[0]


@dataclass
class LipschitzConfig(measure.MeasureConfig):
    dt: float = flag(1.0, "t' - t, in timesteps")
    max_t: float = flag(np.inf, "the largest t", shown="T - dt")
    perturb: bool = flag(False, "move x_t instead of t")
    t: float = flag(100.0, "with --perturb: the timestep")
    scales: tuple[float, ...] = flag((0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
                                     "with --perturb: stds of the added noise", nargs="+")
    prog: ClassVar[str] = "lipschitz.py"
    usage: ClassVar[str] = "python lipschitz.py [RUN ...] [flags]"
    description: ClassVar[str] = "How much a network's output changes with t alone, as PNG and CSV."
    examples: ClassVar[str] = """\
  python lipschitz.py A B -n 256             K(t, t + 1) without and with E-TSDM: figure 1b
  python lipschitz.py A --dt 0.01 --max-t 9  a --continuous run, close to the singularity at 0
  python lipschitz.py A B --perturb          how far the predicted x_0 moves with x_t: figure 2"""
    least: ClassVar[dict] = measure.MeasureConfig.least | dict(dt=1e-9, max_t=0, scales=0)

    def check(self) -> None:
        if bad := {*(("dt", "max_t") if self.perturb else ("t", "scales"))} & self.given:
            raise ValueError(f"{flag_name(min(bad))} requires --{'no-' * self.perturb}perturb")
        self.picture = "perturb.png" if self.perturb else "lipschitz.png"
        super().check()


def measure_slope(config: LipschitzConfig, name: str, denoiser: Denoiser, x0: Tensor) -> tuple:
    """Measure a run and print a line -> rows of the table, edges of the run's sub-intervals."""
    s, dt, time = denoiser.settings, config.dt, "t" if config.perturb else "dt"
    how = dict(seed=config.seed, batch_size=config.batch_size, label=name)
    if getattr(config, time) % 1 and not denoiser.schedule.continuous:
        raise ValueError(f"--{time} must be a whole number: {name} is not a --continuous run")
    if config.perturb:
        k = displacements(denoiser, x0, config.scales, config.t, **how).numpy()
        print(f"{name}:  ", "; ".join(map("{:g}: {:.3g}".format, config.scales, k.mean(1))))
        return measure.percentile_rows(name, k, t=[config.t] * len(k), scale=config.scales), []
    # Trained times (discrete: from 1 on): dense up to 120 dt, then even in log t, and each edge.
    edges = np.linspace(0, s["etsdm_interval"], s["etsdm_n"] + 1) if s["etsdm"] else np.zeros(0)
    low, high = losses.time_range(denoiser.schedule, denoiser.prediction)
    low *= not denoiser.schedule.continuous
    last = min(high - dt, config.max_t) // dt * dt
    if last < low:
        raise ValueError(f"--max-t {config.max_t:g} and --dt {dt:g} leave no t from {low:g} on")
    across = edges - dt / 2 if dt % 1 else dt * (np.ceil(edges / dt) - 1)
    steps = [*range(121), *np.geomspace(120, max(last / dt, 120), 40).round()]
    xs = np.unique(np.clip([*dt * np.array(steps), 100, 500, *across], low, last))
    k = difference_quotients(denoiser, x0, xs, dt, **how).numpy()
    rows = measure.percentile_rows(name, k, t=xs, dt=[dt] * len(k))
    f = denoiser.time_input or float
    top = max(rows, key=lambda row: row["mean"] * (row["t"] < 100))
    shared = [row["mean"] == 0 for row in rows if f(row["t"]) == f(row["t"] + dt)]
    print(f"{name}: ", *("K({t:g}) = {mean:.3g};".format(**row) for row in rows
                         if row["t"] in (low, 100, 500)),
          "largest below 100: {mean:.3g} at {t:g};".format(**top),
          f"exactly 0 at {sum(shared)} of {len(shared)} t inside sub-intervals")
    return rows, edges


def write_curves(config: LipschitzConfig, curves: dict[str, tuple]) -> None:
    """Write the .csv and the figure: lines are means, shades the middle 80 % of the images."""
    axes = files.figure(figsize=(7.5, 4.5), layout="constrained").add_subplot()
    all_rows = [row for rows, _ in curves.values() for row in rows]
    for i, (name, (rows, edges)) in enumerate(curves.items()):
        keys = ("scale" if config.perturb else "t", "mean", "p10", "p90")
        measure.plot_curve(axes, rows, keys, i, name, marker=True)
        axes.vlines(edges, 0, 1, "0.8", lw=0.6, zorder=0, transform=axes.get_xaxis_transform())
    axes.set(xlim=(0, None), ylim=(0, None), ylabel="movement of the predicted x_0 (L2 norm)",
             xlabel=f"std of the noise added to x_t, t = {config.t:g} (pixels are in [-1, 1])")
    if not config.perturb:
        measure.near_zero_axes(axes, all_rows, "t", "mean", far=120 * config.dt)
        axes.set(xlabel="t (timesteps)", ylabel=f"K(t, t + {config.dt:g}): L2 change per timestep")
    axes.legend()
    measure.save_measurement(config.out, axes.figure, all_rows)


def main(argv=None):
    config = parse_into(LipschitzConfig, argv)
    with distributed.init(tf32=False, device=config.device) as dist:
        if dist.is_main:  # only one process measures
            write_curves(config, {name: measure_slope(config, name, *run)
                                  for name, *run in open_runs(config, dist.device)})


if __name__ == "__main__":
    run_main(main)
