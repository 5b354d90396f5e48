r"""Draw figures that need no run: the noise schedules, and errors that add up or cancel.

    python -m papers.figures schedules        # schedules.png
    python -m papers.figures illustration     # illustration.png and .csv: SA-DPM's figure 1

The schedules have four panels: log SNR of the tables; the SNR of Modified-NS divided by that of the
originals, and the log SNR under a uniform f(t) of each remap (E-TSDM, figures A8 and A9); dσ/dt of
the continuous forms near t = 0. It goes to infinity for the schedules that theorem 3.1 names.

The illustration shows DDIM in one dimension with two networks. Both have errors of the same size at
each step. The errors of one have the same sign, those of the other alternate.

Not here: the schedules themselves (schedules.py), the gap of real runs (gap.py).
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import samplers
import toy
from denoiser import Denoiser
from papers.alternatives import REMAPS, unremap
from schedules import SCHEDULES, make_schedule
from support import files, measure
from support.cli import flag, parse_into
from support.programs import run_main

# Markers show the family, dashed lines the modified form: both are visible without colour.
STYLES = {"linear": "k-o", "linear-mns": "k--o", "quadratic": "C0-s", "quadratic-mns": "C0--s",
          "cosine": "C1-^", "cosine-mns": "C1--^", "cosine-shift": "C1:v",
          "zero-terminal-snr": "0.5", "edm": "C2-.x"}


@dataclass
class FiguresConfig:
    figure: str = flag("", "schedules: log SNR over t, Modified-NS against the originals (figure "
                       "A9 of E-TSDM), the slope of sigma near t = 0; illustration: errors that "
                       "add up or cancel (figure 1 of SA-DPM)",
                       choices=("schedules", "illustration"), positional="FIGURE")
    out: Path | None = flag(None, "the file to write", shown="FIGURE.png")

    prog: ClassVar[str] = "papers.figures"
    usage: ClassVar[str] = "python -m papers.figures FIGURE [--out FILE.png]"
    description: ClassVar[str] = "Draw a figure that needs no run."

    def check(self):
        self.out = self.out or Path(f"{self.figure}.png")
        if self.out.suffix != ".png" or not self.out.parent.is_dir():
            raise ValueError(f"--out {self.out} must be a .png file in an existing folder")


def plot_schedules(figure, T: int = 1000) -> None:
    """Draw the four panels on a matplotlib figure."""
    snr, ratio, remaps, slope = figure.subplots(1, 4)
    t = torch.arange(1, T + 1, dtype=torch.float64)
    near = torch.logspace(-4, 2, 121, dtype=torch.float64, requires_grad=True)
    for name in SCHEDULES:
        look = dict(lw=1.2, ms=4, label=name, markevery=0.12)
        if name != "edm":  # edm's t is a coordinate of noise levels, which needs another axis
            log_snr = 2 * make_schedule(name, T).lam(t)
            finite = log_snr.isfinite()
            snr.plot(t[finite], log_snr[finite], STYLES[name], **look)
        if name.endswith("-mns"):
            plain = make_schedule(name.removesuffix("-mns"), T)
            log_ratio = 2 * (make_schedule(name, T).lam(t) - plain.lam(t))
            ratio.plot(t, log_ratio.exp(), STYLES[name],
                       **look | dict(label=f"{name} / {plain.name}"))
        sigma = make_schedule(name, T, continuous=True).alpha_sigma(near)[1]
        gradient = torch.autograd.grad(sigma.sum(), near)[0]
        rises = gradient > 0  # cosine-shift is constant below t = 0.7: its log SNR is cut at 15
        slope.plot(near.detach()[rises], gradient[rises], STYLES[name], **look)
    for name, style in zip(("f(t) = t", *REMAPS), ("k-", "C0--", "C1-."), strict=True):
        times = unremap(t, name, T) if name in REMAPS else t
        remaps.plot(t, 2 * make_schedule("linear", T).lam(times), style, lw=1.2, label=name)
    remaps.set(xlabel="f(t), uniform in training or sampling", ylabel="log SNR = 2λ at that t",
               title="Remaps of the linear schedule")
    snr.set(xlabel="t (steps)", ylabel="log SNR = 2λ", title="Tables: signal-to-noise ratio")
    ratio.axhline(1, color="0.7", lw=0.6, zorder=0)
    ratio.set(xlabel="t (steps, log scale)", ylabel="SNR modified / SNR original (log scale)",
              xscale="log", yscale="log", title="Tables: Modified-NS against the originals")
    slope.set(xlabel="t (steps, log scale)", ylabel="dσ/dt (per step, log scale)", xscale="log",
              yscale="log", title="Continuous forms: dσ/dt towards t = 0")
    for axes in (snr, ratio, remaps, slope):
        axes.legend(fontsize=8)


def plot_illustration(figure, nfe=50, size=0.15):
    """Draw SA-DPM's figure 1 in one dimension -> rows of the .csv."""
    schedule, mixture = make_schedule("linear"), toy.two_bumps()
    exact, x_T = toy.oracle(mixture, schedule), torch.tensor([[0.4]], dtype=torch.float64)
    signs = {"ideal network": lambda i: 0, "errors add up": lambda i: 1,
             "errors cancel": lambda i: (-1) ** i}
    (left, right), rows = figure.subplots(1, 2), []
    for i, (name, sign) in enumerate(signs.items()):
        calls = []

        def net(x, c, sign=sign, calls=calls):
            calls.append((float(c[0]), x.item()))
            return exact(x, c) + size * sign(len(calls))
        end = samplers.sample(Denoiser(net, schedule), x_T, nfe=nfe)
        path = [*calls, (0.0, end.item())]
        ideal = rows[:len(path)] or [dict(x=x) for _, x in path]  # the first run is the ideal one
        rows += [dict(run=name, t=t, x=x, gap=abs(x - other["x"]))
                 for (t, x), other in zip(path, ideal, strict=True)]
        for axes, key in ((left, "x"), (right, "gap")):
            measure.plot_curve(axes, rows[-len(path):], ("t", key), i, name)
        print(f"{name}: at t = 0, {rows[-1]['gap']:.4f} from the ideal run")
    left.set(xlabel="t (sampling goes to the right)", ylabel="x_t (units of the data)",
             title=f"three runs of DDIM, {nfe} steps; each ε off by 0 or ±{size}")
    right.set(xlabel="t (timesteps)", ylabel="distance from the ideal run",
              title="gap")
    for axes in (left, right):
        axes.invert_xaxis()
        axes.legend()
    return rows


def main(argv=None):
    config = parse_into(FiguresConfig, argv)
    if config.figure == "illustration":
        figure = files.figure(figsize=(10, 3.8), layout="constrained")
        measure.save_measurement(config.out, figure, plot_illustration(figure))
    else:
        figure = files.figure(figsize=(21, 5), layout="constrained")
        plot_schedules(figure)
        files.save_figure(config.out, figure, 100)
        print(f"figure: {config.out.resolve()}")


if __name__ == "__main__":
    run_main(main)
