r"""From numbers to results/NAME.md, .csv and .png: a table, a figure, and how to make them again.

    write_page(name, experiment, plans, config)     # config: the flags of experiments.py

A page holds the paper's claim, our table (over several seeds: mean ± standard deviation; in
brackets the paper's number), what the numbers are, what was not run, the figure, the command that
makes the page, and those that trained its runs. Figures can be read in black and white.

Not here: measuring, or judging; papers/results/README.md does that, by hand.

    python -m papers.experiments sa-figure1 --out mine/

plans: one for each data set and seed, of the same experiment e. found: {(data, row, column):
values}.
"""

import shlex
import shutil
from itertools import pairwise, product
from pathlib import Path

import numpy as np
from PIL import Image

from papers.plans import TESTED, data_name, own_side, typed
from samplers import SamplerConfig
from support import files

MARKERS = "oDs^v"  # of plain, E-TSDM, ...: what distinguishes the rows of a system


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


def shown(e, found):
    """-> (rows, columns) that have numbers."""
    rows, columns = ({key[i] for key in found} for i in (1, 2))
    return ([row for row in e.rows if row.label in rows], [c for c in e.columns if c in columns])


def markdown_table(e, data, found):
    """A Markdown table of what has numbers. The best of a column is not marked, since seeds differ.
    The paper's numbers stand in brackets."""
    rows, columns = shown(e, found)
    lines = [["", *columns], ["---"] * (1 + len(columns))]
    for row in rows:
        cells = [format_values(found.get((data, row.label, column), [])) for column in columns]
        papers = [f" [{x:.{3 if x < 2 else 2}f}]" if (x := e.paper.get((row.label, column))) else ""
                  for column in columns]
        lines.append([row.label, *(a + b for a, b in zip(cells, papers, strict=True))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_gaps(e, found):
    """What was not run: rows and columns without any number."""
    rows, columns = shown(e, found)
    gaps = {"rows": [row.label for row in e.rows if row not in rows],
            "columns": [c for c in e.columns if c not in columns]}
    text = "; ".join(f"the {kind} {', '.join(f'“{label}”' for label in labels)}"
                     for kind, labels in gaps.items() if labels)
    command = "The command below without `--rows` and `--columns` measures them."
    return f"**Not run:** {text}. {command}" if text else ""


# ------------------------------------------------------------------ the figure

def kind_of(row):
    """What distinguishes a row from others of its system: plain, E-TSDM, SA-2."""
    return row.label.split(", ")[-1] if row.system else ""


def look_of(kind, kinds):
    """The dots of a kind: hollow for the first, black for rows without a system."""
    i = kinds.index(kind) if kind else 0
    colour = f"C{i}" if kind else "k"
    return dict(ls="", marker=MARKERS[i], color=colour, ms=5, alpha=0.8,
                mfc="none" if kind and i == 0 else colour)


def plot_lines(axes, data, found, lines, kinds):
    """lines: {label: [(row, column), ...]}. Each is a horizontal line that joins the means of its
    cells; every seed is a dot."""
    ys = range(len(lines), 0, -1)
    for y, cells in zip(ys, lines.values(), strict=True):
        cells = [(row, found[data, row.label, column]) for row, column in cells
                 if (data, row.label, column) in found]
        axes.plot([np.mean(v) for _, v in cells], [y] * len(cells), "k-", lw=1, zorder=1)
        for row, values in cells:
            axes.plot(values, [y] * len(values), zorder=2, **look_of(kind_of(row), kinds))
    axes.set_yticks(ys, list(lines), fontsize="x-small")
    axes.set_ylim(0.4, len(lines) + 0.6)
    axes.grid(axis="y", color="0.9")


def lines_of(e, found):
    """-> {title of a panel: {label of a line: its (row, column)s}}. A panel for each column, or for
    each system if these are fewer."""
    rows, columns = shown(e, found)
    systems = {}
    for row in rows:
        systems.setdefault(row.system or row.label, []).append(row)
    cells = {(system, column): [(row, column) for row in several]
             for system, several in systems.items() for column in columns}
    if len(systems) < len(columns):
        return {system: {column: cells[system, column] for column in columns} for system in systems}
    return {column: {system: cells[system, column] for system in systems} for column in columns}


def scale_axis(axes, e):
    """An axis of distances: 5 % must look small, and 2 must be visible next to 300."""
    bottom, top = axes.dataLim.intervalx
    if e.score in ("fid", "colour") and np.isfinite(top):
        wide = top > 30 * bottom > 0
        axes.set(**{"xscale": "log"} if wide else {"xlim": (0, 1.05 * top or 1)})


def plot_table(figure, e, plans, found):
    """A row of panels for each data set: see lines_of()."""
    sets, panels = list(dict.fromkeys(plan.data for plan in plans)), lines_of(e, found)
    kinds = list(dict.fromkeys(kind_of(row) for row in shown(e, found)[0] if row.system))
    grid = figure.subplots(len(sets), len(panels), squeeze=False, sharey=True)
    for (data, (title, lines)), axes in zip(product(sets, panels.items()), grid.flat, strict=True):
        plot_lines(axes, data, found, lines, kinds)
        scale_axis(axes, e)
        axes.set_title((f"{data_name(data)}: " if len(sets) > 1 else "") + title, fontsize="small")
        axes.set_xlabel(metric_of(plan for plan in plans if plan.data == data), fontsize="x-small")
        axes.tick_params(axis="x", labelsize="x-small")
    dots = [grid[0, 0].plot([], [], label=kind, **look_of(kind, kinds))[0] for kind in kinds]
    if dots:
        figure.legend(handles=dots, fontsize="x-small", ncols=len(dots), loc="outside upper right")


def plot_samples(figure, e, plans, found):
    """Grids of samples, in the order of the table, for each data set one after the other."""
    rows, columns = shown(e, found)
    rows = [(plan, row) for plan in plans for row in rows]
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for ((plan, row), column), ax in zip(product(rows, columns), axes.flat, strict=True):
        path = Path(f"{plan.out(row, column)}.png")
        if path.exists():
            ax.imshow(np.asarray(Image.open(path)), cmap="gray", vmin=0, vmax=255,
                      interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        if (plan, row) == rows[0]:
            ax.set_title(f"{column} {e.axis}" * (e.axis == "network calls") or column,
                         fontsize="small")
        if column == columns[0]:
            ax.set_ylabel((f"{data_name(plan.data)}, " if len(plans) > 1 else "") + row.label,
                          fontsize="small")


def draw_figure(path, e, plans, found):
    """results/NAME.png: a panel per data set, or the figure of the experiment's program."""
    if e.program:
        with files.atomic_write(path) as temporary:
            shutil.copyfile(plans[0].picture(), temporary)
        return
    rows, columns = shown(e, found)
    first_seed = [plan for plan in plans if plan.seed == 0]
    if e.score == "picture":
        size = (2.2 * len(columns) + 1, 2.2 * len(rows) * len(first_seed))
        figure = files.figure(figsize=size, layout="constrained")
        plot_samples(figure, e, first_seed, found)
    else:
        panels = lines_of(e, found)
        high = 1.9 + 0.22 * max(map(len, panels.values()))
        figure = files.figure(figsize=(1.6 + 2.6 * len(panels), high * len(first_seed)),
                              layout="constrained")
        plot_table(figure, e, plans, found)
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


def describe_numbers(e, plans, config, sets, found):
    """What the numbers of a page are, and what its figure shows."""
    pictures = e.score == "picture"
    scored = [] if e.program or pictures else [
        metric_of(plan for plan in plans if plan.data == data) for data in sets]
    lines = [f"Columns: {e.axis}."] * (not e.program)
    counts = sorted({len(values) for values in found.values()})
    if plans[0].runs and not pictures:
        lines += ["One seed." if counts == [1] else
                  f"Mean ± standard deviation of {counts[-1]} seeds, each a separate training run"
                  + ("; numbers without ± are of one seed" if counts[0] == 1 else "")
                  + ("." if e.program else "; in the figure every seed is a dot.")]
    lines += ["In brackets: the paper's numbers, of its data and networks."] * bool(e.paper)
    if e.score in ("fid", "is") and scored:
        lines += [f"Measured with {', '.join(scored)}, on {plans[0].num_images:,} samples."]
    if e.score in ("psnr", "colour"):
        lines += [f"Mean over {plans[0].budget['enlarged']:,} images of "
                  + (f"{config.test}, shrunk and enlarged." if config.test else
                     "the training set, shrunk and enlarged.")]
    lines += [] if e.program else [describe_sampler(e)]
    side = None if own_side(e) else config.image_size
    lines += [f"Images of {side}×{side}."] * bool(side)
    lines += ["The networks sampled in bf16."] * (config.precision == "bf16" and not e.program)
    if e.program and plans[0].runs and len(plans) > 1:
        lines += [f"The figure shows {data_name(sets[0])}, seed 0."]
    lines += [e.figure] * bool(e.figure)
    return " ".join(line for line in lines if line)


def describe_sampler(e):
    """The sampler, if all rows and columns have the same one, so that no label names it."""
    flags = [["--sampler", SamplerConfig.sampler, *row.sample_flags, *more]
             for row in e.rows for more in e.columns.values()]
    names = {" ".join(w for flag, w in pairwise(words) if flag == "--sampler") for words in flags}
    if len(names) > 1:
        return ""
    name = names.pop().split()[-1]
    name = name.upper() if name in ("ddim", "ddpm") else name.capitalize()
    usual = "on" if name == "DDPM" else "off"  # what --clip auto is
    clips = {dict(pairwise(words)).get("--clip", usual) for words in flags}
    how = {"on": "clipped to [-1, 1]", "off": "not clipped"}[clips.pop()] if len(clips) == 1 else ""
    return f"Sampled with {name}" + f", x̂_0 {how}" * bool(how) + "."


def page_text(name, e, plans, config, found):
    """The text of results/NAME.md."""
    runs, sets = plans[0].runs, list(dict.fromkeys(plan.data for plan in plans))
    lines = [f"# {page_title(e, plans, config)}", "", f"*{name}.* The paper: {e.claim}.", ""]
    for data in sets if e.score != "picture" else ():
        lines += [f"## {data_name(data)}", ""] * (len(sets) > 1)
        lines += [markdown_table(e, data, found), ""]
    for words in (describe_numbers(e, plans, config, sets, found), describe_gaps(e, found)):
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
    if not found:
        raise ValueError(f"--page: {plans[0].numbers.path} has no number of {name}. Run it first")
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
    words += ["--precision", "bf16"] * (config.precision == "bf16")
    for flag in ("rows", "columns"):
        words += [f"--{flag}", *getattr(config, flag)] * bool(getattr(config, flag))
    for flag in ("image_size", "preset", "sa_weight", "test", "features", "inception"):
        given = getattr(config, flag)
        if given and (flag != "test" or name in TESTED):
            words += [f"--{flag.replace('_', '-')}", str(given)]
    return shlex.join(["python", "-m", "papers.experiments", name, *words, "--data", *config.data])
