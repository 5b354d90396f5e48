r"""From numbers to results/NAME.md, .csv and .png: a table, a figure, and how to make them again.

    write_page(name, experiment, plans, config)     # config: the flags of experiments.py

A page holds the paper's claim, our table (over several seeds: mean ± standard deviation), what the
numbers are, the figure, the command that makes the page, and those that trained its runs. A missing
number is a gap in the table. Figures can be read in black and white.

Not here: measuring, or judging; papers/results/README.md does that, by hand.

    python -m papers.experiments sa-figure1 --out mine/

plans: one for each data set and seed, of the same experiment e. found: {(data, row, column):
values}.
"""

import shlex
import shutil
from itertools import cycle, pairwise, product
from pathlib import Path

import numpy as np
from PIL import Image

from papers.plans import data_name, typed
from support import files

STYLES = ("o-", "s--", "^-.", "v:", "D-", "x--", "P-.", "*:")


# ------------------------------------------------------------------ the table

def gather(plans):
    """{(data, row, column): values over the seeds}, without missing numbers. ValueError: two
    networks of one name have scored the images, so that the numbers do not compare."""
    found, networks = {}, {}
    for plan in plans:
        for (row, column), key in plan.cells.items():
            if key in plan.numbers.rows:
                kept = plan.numbers.rows[key]
                found.setdefault((plan.data, row, column), []).append(float(kept["value"]))
                if network := kept.get("network"):
                    networks.setdefault((plan.data, kept["metric"]), set()).add(network)
    for (data, metric), several in networks.items():
        if len(several) > 1:
            raise ValueError(f"numbers of {data} called {metric} come from different networks. "
                             f"Delete {plans[0].numbers.path}, and they are measured again")
    return found


def format_values(values):
    """Mean ± standard deviation over the seeds, to three significant digits of the mean."""
    if not values:
        return ""
    mean = np.mean(values)
    digits = max(0, 2 - int(np.floor(np.log10(abs(mean) + 1e-12)))) if abs(mean) < 1e5 else 0
    text = f"{mean:.{min(digits, 4)}f}"
    return text + (f" ± {np.std(values, ddof=1):.{min(digits, 4)}f}" if len(values) > 1 else "")


def markdown_table(e, data, found):
    """A Markdown table. The best of a column is not marked, since seeds differ."""
    paper = ["the paper, its data and network"] if e.paper else []
    lines = [["", *e.columns, *paper]]
    lines.append(["---"] * len(lines[0]))
    for row in e.rows:
        cells = [format_values(found.get((data, row.label, column), [])) for column in e.columns]
        lines.append([row.label, *cells, *([e.paper.get(row.label, "")] if paper else [])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ------------------------------------------------------------------ the figure

def mean_and_range(cells):
    """Values of each seed, cell by cell -> their means, and how far down and up they reach."""
    mean = np.array([np.mean(c) for c in cells])
    return mean, np.array([[m - min(c), max(c) - m] for m, c in zip(mean, cells, strict=True)]).T


def plot_curves(axes, e, data, found, rows):
    """Lines over numbers of calls, or points over named columns."""
    numeric = all(label.isdecimal() for label in e.columns)
    xs = np.array([float(c) for c in e.columns] if numeric else range(len(e.columns)))
    for i, (row, style) in enumerate(zip(rows, cycle(STYLES), strict=False)):
        mean, reach = mean_and_range([found.get((data, row.label, c), [np.nan]) for c in e.columns])
        reach = reach if reach.any() else None
        shift = 0 if numeric else 0.4 * (i / max(len(rows) - 1, 1) - 0.5)
        axes.errorbar(xs + shift, mean, reach, fmt=style if numeric else style[0], ms=4, lw=1,
                      capsize=2, label=row.label)
    if numeric:
        axes.set_xscale("log")
    scale_axis(axes, "y", e)
    axes.set_xticks(xs, list(e.columns), rotation=0 if numeric else 30,
                    ha="center" if numeric else "right")
    axes.xaxis.minorticks_off()
    axes.set(xlabel=e.axis)
    add_legend(axes)


def plot_dots(axes, e, data, found, rows):
    """A line for each row, a point on it for each column: for many systems and few columns."""
    ys = np.arange(len(rows))[::-1]
    for i, (column, style) in enumerate(zip(e.columns, cycle(STYLES), strict=False)):
        mean, reach = mean_and_range([found.get((data, row.label, column), [np.nan])
                                      for row in rows])
        reach = reach if reach.any() else None
        shift = 0.3 * (i / max(len(e.columns) - 1, 1) - 0.5)  # equal values hide nothing
        axes.errorbar(mean, ys - shift, xerr=reach, fmt=style[0], ms=5, mfc="none", lw=1, capsize=2,
                      label=column)
    axes.set_yticks(ys, [row.label for row in rows], fontsize="x-small")
    axes.grid(axis="y", color="0.9")
    scale_axis(axes, "x", e)
    add_legend(axes, e.axis)


def scale_axis(axes, side, e):
    """An axis of distances: 5 % must look small, and 2 must be visible next to 300."""
    bottom, top = getattr(axes.dataLim, f"interval{side}")
    if e.score == "fid" and np.isfinite(top):
        wide = top > 30 * bottom > 0
        axes.set(**{f"{side}scale": "log"} if wide else {f"{side}lim": (0, 1.05 * top)})


def add_legend(axes, title=None):
    """The legend, outside of the axes, where it hides nothing."""
    axes.legend(fontsize="x-small", title=title, title_fontsize="x-small", loc="upper left",
                bbox_to_anchor=(1, 1), borderaxespad=0.3)


def plot_samples(figure, e, plan):
    """Grids of samples, in the order of the table."""
    axes = figure.subplots(len(e.rows), len(e.columns), squeeze=False)
    for (row, column), ax in zip(product(e.rows, e.columns), axes.flat, strict=True):
        path = Path(f"{plan.out(row, column)}.png")
        if path.exists():
            ax.imshow(np.asarray(Image.open(path)), cmap="gray", vmin=0, vmax=255,
                      interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        if row is e.rows[0]:
            ax.set_title(f"{column} {e.axis}", fontsize="small")
        if column == next(iter(e.columns)):
            ax.set_ylabel(row.label, fontsize="small")


def draw_figure(path, e, plans, found):
    """results/NAME.png: a panel per data set, or the figure of the experiment's program."""
    if e.program:
        with files.atomic_write(path) as temporary:
            shutil.copyfile(plans[0].picture(), temporary)
        return
    sets = list(dict.fromkeys(plan.data for plan in plans))
    if e.score == "picture":
        size = (2.2 * len(e.columns) + 1, 2.2 * len(e.rows))
        figure = files.figure(figsize=size, layout="constrained")
        plot_samples(figure, e, plans[0])
    else:
        kinds, few = e.split or ("",), len(e.rows) <= 2 * len(e.columns)
        high = 4 if few or e.split else 1 + 0.25 * len(e.rows)
        figure = files.figure(figsize=(6.5 * len(sets) * len(kinds), high), layout="constrained")
        panels = figure.subplots(1, len(sets) * len(kinds), squeeze=False)[0]
        for (data, kind), axes in zip(product(sets, kinds), panels, strict=True):
            rows = [row for row in e.rows if kind in row.label]
            axes.set(title=f"{data_name(data)} {kind}".strip())
            metric = metric_of(plan for plan in plans if plan.data == data)
            if few or e.split:
                plot_curves(axes, e, data, found, rows)
                axes.set(ylabel=metric)
            else:
                plot_dots(axes, e, data, found, rows)
                axes.set(xlabel=metric)
    files.save_figure(path, figure, 100)


# ------------------------------------------------------------------ the page

def metric_of(plans):
    """The name of the numbers, from the program that measured them, and their unit."""
    for plan in plans:
        for key in plan.cells.values():
            if key in plan.numbers.rows:
                metric = plan.numbers.rows[key]["metric"]
                return metric + ", dB" * (metric == "PSNR")
    return ""


def page_title(e, plans, config):
    """The title, and what its numbers are: another network than Inception is named."""
    words, score = metric_of(plans), {"fid": "FD", "is": "IS"}.get(e.score, "")
    if words.startswith(("FD(", "IS(")):
        network = "a small classifier's " + ("features" if score == "FD" else "classes")
        if config.features and score == "FD":
            network = Path(config.features).name
        words = f"{score} in {network}, not " + ("FID" if score == "FD" else "Inception's")
    words = "pictures" if e.score == "picture" else words
    return e.title + f" ({words})" * (not e.program)


def describe_numbers(e, plans, config, sets):
    """What the numbers of a page are, and what its figure shows."""
    pictures = e.score == "picture"
    scored = [] if e.program or pictures else [
        metric_of(plan for plan in plans if plan.data == data) for data in sets]
    lines = [f"Columns: {e.axis}."] * (not e.program)
    if plans[0].runs and not pictures:
        lines += ["One seed." if config.seeds == 1 else
                  f"Mean ± standard deviation of {config.seeds} seeds, each a separate training run"
                  + ("." if e.program else "; the figure shows the range from lowest to highest.")]
    if e.score in ("fid", "is") and scored:
        lines += [f"Measured with {', '.join(scored)}, on {plans[0].num_images:,} samples."]
    if e.score == "psnr":
        lines += [f"Mean over {plans[0].budget['enlarged']:,} images of "
                  + (f"{config.test}, shrunk and enlarged." if config.test else
                     "the training set, shrunk and enlarged.")]
    lines += [] if e.program else [describe_sampler(e)]
    if (e.program or pictures) and plans[0].runs and len(plans) > 1:
        lines += [f"The figure shows {data_name(sets[0])}, seed 0."]
    lines += [e.figure] * bool(e.figure)
    return " ".join(line for line in lines if line)


def describe_sampler(e):
    """The sampler, if all rows and columns have the same one, so that no label names it."""
    flags = [["--sampler", "ddim", *row.sample_flags, *more]
             for row in e.rows for more in e.columns.values()]
    names = {" ".join(w for flag, w in pairwise(words) if flag == "--sampler") for words in flags}
    if len(names) > 1:
        return ""
    name = names.pop().split()[-1]
    name = name.upper() if name in ("ddim", "ddpm") else name.capitalize()
    clipped = all("--clip" in words for words in flags)
    return f"Sampled with {name}" + (", x̂_0 clipped to [-1, 1]." if clipped else ".")


def page_text(name, e, plans, config, found):
    """The text of results/NAME.md."""
    runs, sets = plans[0].runs, list(dict.fromkeys(plan.data for plan in plans))
    lines = [f"# {page_title(e, plans, config)}", "", f"*{name}.* The paper: {e.claim}.", ""]
    for data in sets if e.score != "picture" else ():
        lines += [f"## {data_name(data)}", ""] * (len(sets) > 1)
        lines += [markdown_table(e, data, found), ""]
    words = describe_numbers(e, plans, config, sets)
    lines += [words, ""] * bool(words)
    lines += [f"![{e.title}]({name}.png)", "", f"`{page_command(name, config)}` makes this page. "
              f"The command behind each {'picture' if e.score == 'picture' else 'number'} is in "
              f"[{name}.csv]({name}.csv)."]
    if runs:
        trained = [typed(words) for run in runs for words in plans[0].jobs[run].commands]
        lines += ["", "The runs, of the first data set and seed:", "", "```", *trained, "```"]
    return "\n".join([*lines, ""])


def write_page(name, e, plans, config):
    """Write results/NAME.md, .csv and .png, with the numbers that exist."""
    found, numbers = gather(plans), plans[0].numbers.rows
    config.out.mkdir(parents=True, exist_ok=True)
    files.write_text(config.out / f"{name}.md", page_text(name, e, plans, config, found))
    files.write_csv(config.out / f"{name}.csv", [
        {**numbers[key], "row": row, "column": column} for plan in plans
        for (row, column), key in plan.cells.items() if key in numbers])
    draw_figure(config.out / f"{name}.png", e, plans, found)
    if e.score != "picture":
        print(markdown_table(e, plans[0].data, found), end="\n\n")
    print(f"in {(config.out / f'{name}.md').resolve()}")


def page_command(name, config):
    """The command that makes this page."""
    words = ["--budget", config.budget] * (config.budget != "cpu")
    words += ["--seeds", str(config.seeds)] * (config.seeds > 1)
    words += ["--channels", "1"] * (config.channels == 1)
    for flag in ("preset", "sa_weight", "test", "features", "inception"):
        given = getattr(config, flag)
        if given and (flag != "test" or name == "etsdm-sr"):
            words += [f"--{flag.replace('_', '-')}", str(given)]
    return shlex.join(["python", "-m", "papers.experiments", name, *words, "--data", *config.data])
