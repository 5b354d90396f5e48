r"""Draw the noise schedules: their signal-to-noise ratios, and which slopes explode near t = 0.

    python -m papers.figures                  # schedules.png
    python -m papers.figures --out FILE.png

Three panels: log SNR of the tables; the SNR of Modified-NS over that of the originals (E-TSDM,
figure A9); dσ/dt of the continuous forms towards t = 0. It goes to infinity for the schedules that
E-TSDM is for (theorem 3.1).

Not here: the schedules themselves (schedules.py).
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from schedules import SCHEDULES, make_schedule
from support import files
from support.cli import flag, parse_into
from support.programs import run_main

# A marker stands for a family, a dashed line for its modified form: both work without colour.
STYLES = {"linear": "k-o", "linear-mns": "k--o", "quadratic": "C0-s", "quadratic-mns": "C0--s",
          "cosine": "C1-^", "cosine-mns": "C1--^", "cosine-shift": "C1:v",
          "zero-terminal-snr": "0.5", "edm": "C2-.x"}


@dataclass
class FiguresConfig:
    out: Path = flag(Path("schedules.png"), "the file to write")

    prog: ClassVar[str] = "papers.figures"
    usage: ClassVar[str] = "python -m papers.figures [--out FILE.png]"
    description: ClassVar[str] = ("Draw the schedules: log SNR over t, Modified-NS against the "
                                  "originals (figure A9 of E-TSDM), and the slope of sigma near 0.")

    def check(self):
        if not self.out.parent.is_dir():
            raise ValueError(f"--out {self.out}: there is no folder {self.out.parent}")


def plot_schedules(figure, T: int = 1000) -> None:
    """Draw the three panels on a matplotlib figure."""
    snr, ratio, slope = figure.subplots(1, 3)
    t = torch.arange(1, T + 1, dtype=torch.float64)
    near = torch.logspace(-4, 2, 121, dtype=torch.float64, requires_grad=True)
    for name in SCHEDULES:
        look = dict(lw=1.2, ms=4, label=name, markevery=0.12)
        if name != "edm":  # its t is a coordinate of noise levels, not a step: another axis
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
        rises = gradient > 0  # cosine-shift is constant below t = 0.7, where log SNR is cut at 15
        slope.plot(near.detach()[rises], gradient[rises], STYLES[name], **look)
    snr.set(xlabel="t (steps)", ylabel="log SNR = 2λ", title="Tables: signal-to-noise ratio")
    ratio.axhline(1, color="0.7", lw=0.6, zorder=0)
    ratio.set(xlabel="t (steps, log scale)", ylabel="SNR modified / SNR original (log scale)",
              xscale="log", yscale="log", title="Tables: Modified-NS against the originals")
    slope.set(xlabel="t (steps, log scale)", ylabel="dσ/dt (per step, log scale)", xscale="log",
              yscale="log", title="Continuous forms: dσ/dt towards t = 0")
    for axes in (snr, ratio, slope):
        axes.legend(fontsize=8)


def main(argv=None):
    config = parse_into(FiguresConfig, argv)
    figure = files.figure(figsize=(16, 5), layout="constrained")
    plot_schedules(figure)
    files.save_figure(config.out, figure, 100)
    print(f"figure: {config.out.resolve()}")


if __name__ == "__main__":
    run_main(main)
