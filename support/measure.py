r"""Shared parts of programs that measure runs: flags, evaluation mode, a figure and its table.

    MeasureConfig              RUN ..., -n, --data, --batch-size, --seed, --weights, --out
    evaluating(net)            evaluation mode inside a with block
    plot_curve, near_zero_axes, percentile_rows
    summarize                  the mean of vectors, without their spread, and its interval
    save_measurement           the figure, and a .csv next to it

Not here: the measurements (lipschitz.py, gap.py), opening a run (denoiser.load_run).

    python -c "from support import measure; print(measure.percentile_rows)"
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from support import checkpoint, files
from support.cli import device_flag, flag, flag_name

LINES = ("k-", "C1--", "C0-.", "C2:", "C3-", "C4--", "C5-.")  # they also differ without colour
MARKERS = "os^DvPX"


@dataclass
class MeasureConfig:
    """The flags that lipschitz.py and gap.py have in common."""

    runs: tuple[str, ...] = flag((), "names under runs/, folders or checkpoints (default: the "
                                 "newest run); LABEL=RUN sets the run's name in the figure",
                                 positional="RUN", nargs="*", group="measurement")
    num: int = flag(64, "images; the noise of image i is a function of (seed, i); under torchrun "
                    "write -n", short="-n")
    data: str | None = flag(None, "images to measure on", shown="each run's own set")
    batch_size: int = flag(64, "images at a time")
    seed: int = flag(0, "seed for the choice of images and the noise")
    device: str = device_flag()
    weights: str = flag("ema", "averaged (ema) or last (raw) weights", choices=("ema", "raw"))
    out: Path | None = flag(None, "the figure; its .csv goes next to it",
                            shown="named after the measurement")
    least: ClassVar[dict] = dict(num=1, batch_size=1, seed=0)
    picture: ClassVar[str] = "measurement.png"

    def check(self):
        """ValueError, which begins with the flag: a value is out of range."""
        for name, least in self.least.items():
            values = np.atleast_1d(getattr(self, name))
            if name in self.given and not (np.isfinite(values) & (values >= least)).all():
                raise ValueError(f"{flag_name(name)} must be at least {least}, not "
                                 + " ".join(map(str, values)))
        self.out = self.out or Path(self.picture)
        if self.out.suffix != ".png" or not self.out.resolve().parent.is_dir():
            raise ValueError(f"--out {self.out} must be a .png file in an existing folder")

    def named_runs(self):
        """Yield (name, checkpoint) for each run, or the newest run; all names differ."""
        names = set()
        if any(not run.rpartition("=")[2] for run in self.runs):
            raise ValueError("RUN: a name is empty. Omit all names to use the newest run")
        for run in self.runs or [""]:
            label, equals, rest = run.partition("=")
            if not (equals and label) or os.path.exists(run):  # a path may contain a =
                label, rest = "", run
            path = checkpoint.find_checkpoint(rest).resolve()
            name = label or path.parent.name
            while name in names:  # the same run twice, or two runs of the same name
                name += "'"
            names.add(name)
            yield name, path


@contextlib.contextmanager
def evaluating(net):
    """Switch to evaluation mode and back, module by module, since a frozen part may be in it
    already. A plain function has no modules."""
    training = [m for m in getattr(net, "modules", list)() if m.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def plot_curve(axes, rows, keys, i, label, marker=False):
    """Draw the i-th of several curves. rows: dicts; keys: those of x, y and, for a shade, low and
    high. The edges of the shade are drawn like the line, since shades may overlap."""
    x, y, *shade = ([row[key] for row in rows] for key in keys)
    style = LINES[i % len(LINES)]
    (line,) = axes.plot(x, y, style + MARKERS[i % len(MARKERS)] * marker, ms=3, lw=1, label=label)
    if shade:
        axes.fill_between(x, *shade, color=line.get_color(), alpha=0.13, lw=0)
        axes.plot(x, shade[0], style, x, shade[1], style, lw=0.5)


def near_zero_axes(axes, rows, x, y, far):
    """Set scales for rows[x] and rows[y]: linear up to x = far, and near y = 0 (to show an exact
    0); else logarithmic."""
    least = min((row[y] for row in rows if row[y] > 0), default=1)
    ticks = [*np.linspace(0, far, 7), *(k for k in (2, 5, 20, 50, 200, 500, 1000) if k > far)]
    axes.set_xscale("symlog", linthresh=far, linscale=2)
    axes.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(least)), linscale=0.3)
    axes.set_xticks(ticks, [f"{k:g}" for k in ticks])
    axes.set(xlim=(0, 1.01 * max(row[x] for row in rows)))


def percentile_rows(name, values, **columns):
    """values (m, N) of N images -> m rows: dicts of the run's name, columns, mean, percentiles."""
    columns["mean"] = values.mean(1)
    columns |= zip(("p10", "p50", "p90"), np.percentile(values, (10, 50, 90), axis=1), strict=True)
    return [dict(zip(("run", *columns), (name, *row), strict=True))
            for row in zip(*columns.values(), strict=True)]


def inner_products(G):
    """G (B, ...) -> its inner products (B, B), which are sufficient for summarize()."""
    flat = G.flatten(1)
    return (flat @ flat.T).cpu()


def summarize(K, counts):
    """Inner products K (B, B), bootstrap counts (R, B) -> dict: mean, systematic with its interval
    low to high, norm, and boot, the R values of systematic."""
    B, diagonal = len(K), K.diagonal()
    pairs = K - torch.diag(diagonal)  # different images only: squares are mostly spread
    # Pairs of an image with its own copy in a bootstrap sample do not count either.
    boot = ((counts @ pairs) * counts).sum(1) / (B**2 - counts.square().sum(1)).clamp(min=1)
    boot = boot.clamp(min=0).sqrt()
    low, high = np.percentile(boot.numpy(), (2.5, 97.5))
    return dict(mean=K.sum().clamp(min=0).sqrt().item() / B,
                systematic=(pairs.sum() / (B * (B - 1))).clamp(min=0).sqrt().item(),
                low=low, high=high, norm=diagonal.clamp(min=0).sqrt().mean().item(), boot=boot)


def bootstrap_counts(B, count=500, seed=0):
    """How often each of B images occurs in each bootstrap sample: (count, B) float64. Equal for all
    runs, since they are compared image by image. ValueError: one image has no spread."""
    if B < 2:
        raise ValueError("--data: this measurement needs at least 2 images, not 1")
    counts = np.random.default_rng(seed).multinomial(B, np.full(B, 1 / B), size=count)
    return torch.from_numpy(counts).double()


def save_measurement(out, figure, rows):
    """Write the figure to `out` and rows (dicts) to a .csv next to it; print both paths."""
    files.save_figure(out, figure, 120)
    files.write_csv(out.with_suffix(".csv"), rows)
    print(f"figure: {out.resolve()}, numbers: {out.with_suffix('.csv').resolve()}")
