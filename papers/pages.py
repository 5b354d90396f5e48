r"""From numbers to results/NAME.md, .csv and .png: a table, a figure, and how to make them again.

    write(name, experiment, plans, args)     # plans.py; args: the flags of experiments.py

A page holds what the paper says, our table (over several seeds: mean ± standard deviation), what
the numbers are and are not, the figure, the command that makes the page, and those that trained
its runs. What is missing is a gap in the table. Figures can be read in black and white.

What this file does not do: measure, or judge; results/README.md does that, by hand.

    python experiments.py sa-figure1 --out mine/

plans: one for each data set and seed, of the same experiment. found: {(data, row, column): values}.
"""

import shlex
import shutil
from itertools import cycle, pairwise, product
from pathlib import Path

import numpy as np
from PIL import Image

import files
from plans import stem

STYLES = ("o-", "s--", "^-.", "v:", "D-", "x--", "P-.", "*:")


# ------------------------------------------------------------------ the table

def gather(plans):
    """{(data, row, column): values over the seeds}; numbers that are missing are left out.
    ValueError: two networks of one name have looked at the images, so that they do not compare."""
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
            raise ValueError(f"numbers of {data} called {metric} come from different networks: "
                             f"delete {plans[0].numbers.path}, to have them measured again")
    return found


def shown(values):
    """Mean ± standard deviation over the seeds, to three significant digits of the mean."""
    if not values:
        return ""
    mean = np.mean(values)
    digits = max(0, 2 - int(np.floor(np.log10(abs(mean) + 1e-12)))) if abs(mean) < 1e5 else 0
    text = f"{mean:.{min(digits, 4)}f}"
    return text + (f" ± {np.std(values, ddof=1):.{min(digits, 4)}f}" if len(values) > 1 else "")


def table(e, data, found):
    """The rows of a Markdown table; the best of a column is not marked, since seeds differ."""
    paper = ["the paper, its data and network"] if e.paper else []
    lines = [["", *e.columns, *paper]]
    lines.append(["---"] * len(lines[0]))
    for row in e.rows:
        cells = [shown(found.get((data, row.label, column), [])) for column in e.columns]
        lines.append([row.label, *cells, *([e.paper.get(row.label, "")] if paper else [])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ------------------------------------------------------------------ the figure

def spans(cells):
    """Values of each seed, cell by cell -> their means, and how far down and up they reach."""
    mean = np.array([np.mean(c) for c in cells])
    return mean, np.array([[m - min(c), max(c) - m] for m, c in zip(mean, cells, strict=True)]).T


def curves(axes, e, data, found, rows):
    """Lines over numbers of calls, or points beside each other over named columns."""
    numeric = all(label.isdecimal() for label in e.columns)
    xs = np.array([float(c) for c in e.columns] if numeric else range(len(e.columns)))
    for i, (row, style) in enumerate(zip(rows, cycle(STYLES), strict=False)):
        mean, reach = spans([found.get((data, row.label, c), [np.nan]) for c in e.columns])
        reach = reach if reach.any() else None
        aside = 0 if numeric else 0.4 * (i / max(len(rows) - 1, 1) - 0.5)
        axes.errorbar(xs + aside, mean, reach, fmt=style if numeric else style[0], ms=4, lw=1,
                      capsize=2, label=row.label)
    if numeric:
        axes.set_xscale("log")
    scale(axes, "y", e)
    axes.set_xticks(xs, list(e.columns), rotation=0 if numeric else 30,
                    ha="center" if numeric else "right")
    axes.xaxis.minorticks_off()
    axes.set(xlabel=e.axis)
    beside(axes)


def dots(axes, e, data, found, rows):
    """A line for each row, a point on it for each column: for many systems and few columns."""
    ys = np.arange(len(rows))[::-1]
    for i, (column, style) in enumerate(zip(e.columns, cycle(STYLES), strict=False)):
        mean, reach = spans([found.get((data, row.label, column), [np.nan]) for row in rows])
        reach = reach if reach.any() else None
        aside = 0.3 * (i / max(len(e.columns) - 1, 1) - 0.5)  # equal values hide nothing
        axes.errorbar(mean, ys - aside, xerr=reach, fmt=style[0], ms=5, mfc="none", lw=1, capsize=2,
                      label=column)
    axes.set_yticks(ys, [row.label for row in rows], fontsize="x-small")
    axes.grid(axis="y", color="0.9")
    scale(axes, "x", e)
    beside(axes, e.axis)


def scale(axes, side, e):
    """Of an axis of distances: 5 % is to look like little, and 2 to show beside 300."""
    bottom, top = getattr(axes.dataLim, f"interval{side}")
    if e.score == "fid" and np.isfinite(top):
        wide = top > 30 * bottom > 0
        axes.set(**{f"{side}scale": "log"} if wide else {f"{side}lim": (0, 1.05 * top)})


def beside(axes, title=None):
    """The legend, where no curve can be."""
    axes.legend(fontsize="x-small", title=title, title_fontsize="x-small", loc="upper left",
                bbox_to_anchor=(1, 1), borderaxespad=0.3)


def montage(figure, e, plans):
    """Grids of samples in the order of the table, each under the flags that made it."""
    plan = plans[0]
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


def draw(path, e, plans, found):
    """results/NAME.png: a panel per data set, or what the experiment's program has drawn."""
    if e.program:
        with files.atomic_write(path) as temporary:
            shutil.copyfile(plans[0].picture(), temporary)
        return
    sets = list(dict.fromkeys(plan.data for plan in plans))
    if e.score == "picture":
        size = (2.2 * len(e.columns) + 1, 2.2 * len(e.rows))
        figure = files.figure(figsize=size, layout="constrained")
        montage(figure, e, plans)
    else:
        kinds, few = e.split or ("",), len(e.rows) <= 2 * len(e.columns)
        high = 4 if few or e.split else 1 + 0.25 * len(e.rows)
        figure = files.figure(figsize=(6.5 * len(sets) * len(kinds), high), layout="constrained")
        panels = figure.subplots(1, len(sets) * len(kinds), squeeze=False)[0]
        for (data, kind), axes in zip(product(sets, kinds), panels, strict=True):
            rows = [row for row in e.rows if kind in row.label]
            axes.set(title=f"{stem(data)} {kind}".strip())
            metric = metric_of(plan for plan in plans if plan.data == data)
            if few or e.split:
                curves(axes, e, data, found, rows)
                axes.set(ylabel=metric)
            else:
                dots(axes, e, data, found, rows)
                axes.set(xlabel=metric)
    files.save_figure(path, figure, 100)


# ------------------------------------------------------------------ the page

def metric_of(plans):
    """What the numbers are, as the program that measured them called it, and their unit."""
    for plan in plans:
        for key in plan.cells.values():
            if key in plan.numbers.rows:
                metric = plan.numbers.rows[key]["metric"]
                return metric + ", dB" * (metric == "PSNR")
    return ""


def title(e, plans, args):
    """The title, and what its numbers are: a stand-in for Inception says that it is one."""
    words, score = metric_of(plans), {"fid": "FD", "is": "IS"}.get(e.score, "")
    if words.startswith(("FD(", "IS(")):
        words = (f"{score} in {Path(args.features).name}" if args.features and score == "FD" else
                 f"{score} in a small classifier's " + ("features" if score == "FD" else "classes"))
        words += ": no FID" if score == "FD" else ": not Inception's"
    words = "pictures" if e.score == "picture" else words
    return e.title + f" ({words})" * (not e.program)


def about(e, plans, args, sets):
    """What the numbers of a page are, and what its figure shows."""
    pictures = e.score == "picture"
    scored = [] if e.program or pictures else [
        metric_of(plan for plan in plans if plan.data == data) for data in sets]
    lines = [f"Columns: {e.axis}."] * (not e.program)
    if plans[0].runs and not pictures:
        lines += ["One seed." if args.seeds == 1 else f"Mean ± standard deviation of {args.seeds} "
                  "seeds, each a training run of its own" + (
                      "." if e.program else "; in the figure, from the lowest to the highest.")]
    if e.score in ("fid", "is") and scored:
        lines += [f"Measured with {', '.join(scored)}, on {plans[0].n:,} samples."]
    if e.score == "psnr":
        lines += [f"Mean over {plans[0].b['enlarged']:,} images of "
                  + (f"{args.test}, shrunk and enlarged." if args.test else
                     "the set that the networks are trained on, shrunk and enlarged.")]
    lines += [] if e.program else [how_sampled(e)]
    if (e.program or pictures) and plans[0].runs and len(plans) > 1:
        lines += [f"The figure shows {stem(sets[0])}, seed 0."]
    lines += [e.figure] * bool(e.figure)
    return " ".join(line for line in lines if line)


def how_sampled(e):
    """The sampler, if all rows and columns have the same: then no label says it."""
    flags = [["--sampler", "ddim", *row.how, *more]
             for row in e.rows for more in e.columns.values()]
    names = {" ".join(w for flag, w in pairwise(words) if flag == "--sampler") for words in flags}
    if len(names) > 1:
        return ""
    name = names.pop().split()[-1]
    name = name.upper() if name in ("ddim", "ddpm") else name.capitalize()
    clipped = all("--clip" in words for words in flags)
    return f"Sampled with {name}" + (", x̂_0 clipped to [-1, 1]." if clipped else ".")


def page(name, e, plans, args, found):
    """The text of results/NAME.md."""
    runs, sets = plans[0].runs, list(dict.fromkeys(plan.data for plan in plans))
    lines = [f"# {title(e, plans, args)}", "", f"*{name}.* The paper: {e.claim}.", ""]
    for data in sets if e.score != "picture" else ():
        lines += [f"## {stem(data)}", ""] * (len(sets) > 1)
        lines += [table(e, data, found), ""]
    words = about(e, plans, args, sets)
    lines += [words, ""] * bool(words)
    lines += [f"![{e.title}]({name}.png)", "", f"`{command(name, args)}` makes this page. The "
              f"command behind each {'picture' if e.score == 'picture' else 'number'} is in "
              f"[{name}.csv]({name}.csv)."]
    if runs:
        trained = [shlex.join(["python", *words]) for run in runs
                   for words in plans[0].jobs[run].commands]
        lines += ["", "The runs, of the first data set and seed:", "", "```", *trained, "```"]
    return "\n".join([*lines, ""])


def write(name, e, plans, args):
    """results/NAME.md, .csv and .png, of the numbers that are there."""
    found, numbers = gather(plans), plans[0].numbers.rows
    args.out.mkdir(parents=True, exist_ok=True)
    files.write_text(args.out / f"{name}.md", page(name, e, plans, args, found))
    files.write_csv(args.out / f"{name}.csv", [
        {**numbers[key], "row": row, "column": column} for plan in plans
        for (row, column), key in plan.cells.items() if key in numbers])
    draw(args.out / f"{name}.png", e, plans, found)
    if e.score != "picture":
        print(table(e, plans[0].data, found), end="\n\n")
    print(f"in {(args.out / f'{name}.md').resolve()}")


def command(name, args):
    """What to type to have the same again."""
    words = ["--budget", args.budget] * (args.budget != "cpu")
    words += ["--seeds", str(args.seeds)] * (args.seeds > 1)
    for flag in ("preset", "sa_weight", "channels", "test", "features", "inception"):
        given = getattr(args, flag)
        if given and (flag != "test" or name == "etsdm-sr"):
            words += [f"--{flag.replace('_', '-')}", str(given)]
    return shlex.join(["python", "experiments.py", name, *words, "--data", *args.data])
