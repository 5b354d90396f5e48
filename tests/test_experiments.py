"""papers/experiments.py and plans.py: every declaration at every budget becomes commands that the
programs accept; a small one is run, interrupted and resumed; and pages are written from numbers."""

import csv
import dataclasses
import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, refused
from PIL import Image
from programs import PROGRAMS, find_program, main_of, parse

from config import Config
from papers import experiments, heads, latents, pages, plans
from papers.plans import Experiment, Numbers, Row

NAMES = (
    "sa-table1 sa-steps sa-table2 sa-table3 sa-table4 sa-figure1 sa-figure4 sa-samples "
    "etsdm-table1 etsdm-figure1 etsdm-slope-continuous etsdm-slope-quadratic etsdm-slope-v "
    "etsdm-slope-ddpm-r etsdm-slope-cosine-shift etsdm-slope-latents etsdm-figure2 etsdm-figure3 "
    "etsdm-figure4 etsdm-table2 etsdm-table3 etsdm-figure5 etsdm-samples etsdm-sr etsdm-colour "
    "etsdm-sr-pictures etsdm-v etsdm-ldm etsdm-edm"
).split()
# What E-TSDM's paper measures by ancestral sampling, each of the 1,000 steps.
FULL_LENGTH = "table1 table2 figure3 figure4 figure5 samples sr colour sr-pictures v".split()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def options(words):
    """The parsed flags of experiments.py."""
    return parse("papers.experiments", words)


def planned(words, names=()):
    """-> ({name: plans}, {name of a job: job}) of a command line, for the experiment that it begins
    with, or for several."""
    config = options(words)
    declared = experiments.declare(config.budget, config.sa_weight)
    return experiments.plan_all(names or [config.name], declared, config)


def plan_of(words):
    """The first plan of a command line."""
    return next(iter(planned(words)[0].values()))[0]


def settings_of(words, run=None):
    """The settings of a run in it, by default of the first row's."""
    plan = plan_of(words)
    return plan.config(plan.e.rows[0].run if run is None else run)


def scored_images(words):
    """The number of images of every command that measures FIDs, as typed."""
    commands = [words for job in planned(words)[1].values() for words in job.commands]
    found = {words[words.index("-n") + 1] for words in commands if "fid" in words}
    assert found
    return found


def program_of(job):
    return find_program(job.commands[0])[0]


def is_training(job):
    return issubclass(PROGRAMS[program_of(job)], Config)


# ------------------------------------------------------------------ declarations


@pytest.mark.parametrize("budget", plans.BUDGETS)
def test_every_name_is_declared_in_every_budget(budget):
    found = experiments.declare(budget)
    assert sorted(found) == sorted(NAMES)
    for e in found.values():
        labels = [row.label for row in e.rows]
        assert len(set(labels)) == len(labels)
        assert set(e.paper) <= {(label, column) for label in labels for column in e.columns}
        assert e.title and e.claim and e.columns


@pytest.mark.parametrize("budget", plans.BUDGETS)
def test_claims_are_asked_of_their_own_sampler(budget):
    """E-TSDM's are about DDPM in 1,000 calls with the variance β_t, which comes first; SA-DPM's
    about its program's grid, without a clip unless the variance is estimated."""
    found = experiments.declare(budget)
    for name in FULL_LENGTH:
        first, second = list(found[f"etsdm-{name}"].columns.values())[:2]
        assert first == ("--sampler", "ddpm", "--variance", "large", "--nfe", "1000")
        assert second == ("--sampler", "ddpm", "--variance", "small", "--nfe", "1000")
        assert not any("--sampler" in row.sample_flags for row in found[f"etsdm-{name}"].rows)
    for name in ("sa-table1", "sa-steps", "sa-table2", "sa-table3", "sa-table4"):
        for row in found[name].rows:
            assert row.sample_flags[row.sample_flags.index("--spacing") + 1] == "leading"
            assert ("off" in row.sample_flags) != ("--variance" in row.sample_flags)


def test_published_numbers_stand_at_their_sampler():
    found = experiments.declare("paper")
    assert found["etsdm-table2"].paper["linear, discrete, plain", "DDPM large, 1000"] == 9.50
    assert found["etsdm-table3"].paper["plain", "DDIM, 50"] == 21.80
    assert found["etsdm-table3"].paper["plain", "DDIM, 200"] == 23.16
    text = pages.markdown_table(found["etsdm-sr"], "a", {("a", "plain", "DDPM large, 1000"): [20]})
    assert "| plain | 20.0 [24.64] |" in text


@pytest.mark.parametrize("budget", plans.BUDGETS)
def test_programs_accept_every_command(here, budget, monkeypatch):
    """Each command line goes through the parser of its program. Runs that others start from
    are trained earlier, and a plan knows the same of a run as its program does."""
    found, todo = planned(f"sa-table1 --budget {budget} --data shapes", NAMES)
    experiments.CACHE.mkdir(parents=True)  # as main() does
    trained = {}
    for module in (heads, latents):
        monkeypatch.setattr(module, "settings_of", lambda run, key: trained[run])
    for job in todo.values():
        assert set(job.after) <= set(todo)
        for words in job.commands:
            program, rest = find_program(words)
            config = parse(program, rest)
            if isinstance(config, Config):
                trained[config.name] = config.settings()
            elif program == "papers.classifier":  # metrics.py looks whether it is there
                config.out.touch()
            elif not {"stats", "psnr", "colour", "illustration"} & {*words}:
                assert {word.split("=")[-1] for word in words} & set(trained), words
    # Causes stand before their effects: jobs.chain_costs() relies on it.
    place = {name: i for i, name in enumerate(todo)}
    assert all(place[cause] < place[name] for name, job in todo.items() for cause in job.after)
    checked = set()
    for plan in (plan for several in found.values() for plan in several):
        for row in (row for row in plan.e.rows if row.run is not None):
            known, real = plan.config(row.run), trained[plan.name(row.run)]
            for key in ("image_size", "batch_size", "images", "sa_k"):
                if not (key == "sa_k" and "head" in real):
                    assert getattr(known, key) == real[key]
            checked.add(plans.split_program(row.run)[0])
    assert checked == {f"papers.{n}" for n in "alternatives heads latents superres".split()} | {
        "train.py"
    }


@pytest.mark.parametrize("budget", ["cpu", "paper"])
def test_no_two_commands_share_a_name(here, monkeypatch, budget):
    """Jobs are shared by name: the same name must mean the same commands. At the paper budget the
    experiments have networks of their own."""
    seen, add = {}, plans.Plan.add

    def noting(self, name, *commands, **more):
        words = [[str(word) for word in command] for command in commands]
        assert seen.setdefault(name, words) == words
        return add(self, name, *commands, **more)

    monkeypatch.setattr(plans.Plan, "add", noting)
    planned(f"sa-table1 --budget {budget} --data shapes fashion --seeds 2", NAMES)
    assert len(seen) > 500


def test_experiments_share_their_runs(here):
    _, one = planned("sa-table1")
    _, both = planned("all", ["sa-table1", "sa-table3"])
    trained = [name for name, job in both.items() if is_training(job)]
    assert set(trained) <= set(one)
    # and FIDs: sa-table3 asks the same systems for one more column only
    assert len(both) - len(one) == 4


def test_another_image_size_has_runs_and_statistics_of_its_own(here):
    (here / "a.pt2").touch()
    usual, large = (
        planned(f"etsdm-figure4 --data a/ --features a.pt2 {more}")[1]
        for more in ("", "--image-size 32")
    )
    assert len(usual) == len(large) and not set(usual) & set(large)
    parsed = [parse(*find_program(job.commands[0])) for job in large.values() if is_training(job)]
    assert [c.image_size for c in parsed] == [32, 32]
    assert any("stats" in job.commands[0] and "32" in job.commands[0] for job in large.values())


def test_the_paper_budget_is_the_papers_recipe(here):
    c = settings_of("sa-table1 --budget paper --data cifar10", ("--sa-k", "2"))
    assert (c.preset, c.batch_size, c.lr, c.sa_k) == ("cifar10", 128, 2e-4, 2)
    assert (c.schedule, c.prediction, c.images) == ("linear", "eps", 60_000_000)
    table2 = "etsdm-table2 --budget paper --data ffhq/"
    assert scored_images(table2) == {"10000"}  # FID-10k
    todo = planned(table2)[1].values()
    assert not any("v" in words for job in todo for words in job.commands)  # ε, as the paper has it
    assert scored_images("sa-table3 --budget paper --data cifar10") == {"50000"}
    c = settings_of("etsdm-edm --budget paper --data cifar10")
    assert (c.batch_size, c.lr, c.images, c.dropout) == (512, 1e-3, 200_000_000, 0.13)
    assert c.warmup * c.batch_size == pytest.approx(10_000_000, rel=1e-4)
    assert c.ema == pytest.approx(0.5 ** (512 / 500_000), abs=1e-5) and c.grad_clip == 0


def test_settings_that_were_wrong(here):
    """LDM's schedule and images, v's own loss at every budget, and SA-DPM's sets at 64 pixels."""
    for budget in plans.BUDGETS:
        c = settings_of(f"etsdm-ldm --budget {budget} --data shapes")
        assert (c.schedule, c.betas, c.prediction) == ("quadratic", (0.0015, 0.0195), "eps")
        assert settings_of(f"etsdm-v --budget {budget} --data shapes").loss_space == "v"
    words = "etsdm-ldm --budget paper --data x/ --preset celeba64"
    assert settings_of(words).image_size == 256  # those of its autoencoder
    for name, batch, images in (("ffhq64", 256, 105_000_000), ("afhq64", 128, 31_606_000)):
        plan = plan_of(f"sa-table3 --budget paper --data {name}/ --preset {name}")
        c = plan.config(("--sa-k", "2"))
        assert (c.preset, c.batch_size, c.images) == ("celeba64", batch, images)
        assert name in plan.name(()) and c.grad_clip == pytest.approx(1 / (3 * 64 * 64))


def test_other_sets_of_the_paper_have_their_own_network_and_weight(here):
    words = "sa-table3 --budget paper --data hq/ --preset celebahq256 --sa-weight 0.1"
    assert scored_images(words) == {"10000"}
    trained = [job.commands[0] for job in planned(words)[1].values() if is_training(job)]
    parsed = [parse(*find_program(words)) for words in trained]
    assert [(c.preset, c.image_size, c.batch_size) for c in parsed] == [
        ("celebahq256", 256, 24)
    ] * 2
    assert [(c.sa_k, c.sa_weight) for c in parsed] == [(1, 1.0), (2, 0.1)]
    assert all("--microbatch" in words for words in trained)
    assert pages.page_command("sa-table3", options(words)) == (
        "python -m papers.experiments sa-table3 --budget paper --preset celebahq256 "
        "--sa-weight 0.1 --data hq/"
    )


@pytest.mark.slow
def test_the_cpu_budget_is_at_most_three_hours(here, capsys):
    """By the estimate that `list` prints, on two cores."""
    experiments.main(["list"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(experiments.declare("cpu"))
    assert all(0 <= float(line.split()[1]) <= 180 for line in lines)
    assert all(float(line.split()[3]) > 0 for line in lines if "figure1 " not in line)


def test_some_rows_and_columns_only(here):
    """The commands of a part are those of the whole."""
    words = "etsdm-table2 --data shapes"
    some = f"{words} --rows cosine, linear --columns 1000"
    whole, part = planned(words), planned(some)
    assert set(part[1]) < set(whole[1])
    cells = part[0]["etsdm-table2"][0].cells
    assert {column for _, column in cells} == set(experiments.FULL) and len(cells) == 16
    assert cells.items() <= whole[0]["etsdm-table2"][0].cells.items()


def test_pictures_and_scores_have_their_own_folders(here):
    """Both enlarge, and could do so at once."""
    found = experiments.plan_all(
        names := ["etsdm-sr", "etsdm-sr-pictures"],
        experiments.declare("cpu"),
        options(f"{names[0]} --data shapes"),
    )[0]
    psnr, picture = (found[name][0] for name in names)
    rows, columns = psnr.e.rows[:2], psnr.e.columns
    outs = [
        {plan.out(row, column) for row in rows for column in columns} for plan in (psnr, picture)
    ]
    assert not outs[0] & outs[1]


# ------------------------------------------------------------------ numbers


def test_numbers_are_kept_beside_their_commands(here):
    a, b = Numbers(Path("results/numbers.csv")), Numbers(Path("results/numbers.csv"))
    a.add("python a.py --x 'y z'", value=1.25, row="r", column="10")
    b.add("python b.py", value=2.0, row="s", column="10")  # another program, meanwhile
    a.add("python a.py --x 'y z'", value=1.5, row="r", column="10")
    again = Numbers(Path("results/numbers.csv")).rows
    assert {key: row["value"] for key, row in again.items()} == {
        "python a.py --x 'y z'": "1.5",
        "python b.py": "2.0",
    }


def add_numbers(name):
    kept = Numbers(Path("results/numbers.csv"))
    for i in range(40):
        kept.add(f"python {name}.py {i}", value=i)


def test_two_programs_that_add_numbers_lose_none(here):
    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=add_numbers, args=(name,)) for name in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert len(Numbers(Path("results/numbers.csv")).rows) == 80


@pytest.mark.parametrize(
    "values, text",
    [
        ([], ""),
        ([1.23456], "1.23"),
        ([0.0123456], "0.0123"),
        ([123.456], "123"),
        ([1.0, 2.0, 3.0], "2.00 ± 1.00"),
        ([0.0], "0.0000"),
        ([float("nan")], "nan"),
    ],
)
def test_format_values(values, text):
    assert pages.format_values(values) == text


SMALL = Experiment(
    "A title", "a claim", rows=(Row("one"), Row("two", ("--etsdm",))),
    columns=experiments.named(experiments.DDPM, 5, 9), steps=6, paper={("two", "DDPM, 9"): 9.87},
)  # fmt: skip
CPU = dict(plans.BUDGETS["cpu"], image=("--image-size", "8"), n=12)
CPU["length"] = ("--batch-size", "4", "--lr", "1e-2")


@pytest.fixture
def small(here, monkeypatch):
    """One experiment of two runs and two columns, at 8×8."""
    monkeypatch.setattr(experiments, "declare", lambda budget, weight=None: {"small": SMALL})
    monkeypatch.setitem(plans.BUDGETS, "cpu", CPU)
    Path("net.pt2").touch()
    return here


def test_a_page_of_what_there_is(small, capsys):
    """A missing number is a gap, not a failure; the spread is that of the seeds."""
    args = options("small --seeds 2 --features net.pt2")
    made = experiments.plan_all(["small"], {"small": SMALL}, args)[0]["small"]
    numbers = made[0].numbers
    for plan, value in zip(made, (1.0, 2.0), strict=True):
        for (row, column), key in plan.cells.items():
            if (row, column) != ("two", "DDPM, 9"):
                numbers.add(key, data="shapes", seed=plan.seed, row=row, column=column,
                            metric="FD(net.pt2)", value=value)  # fmt: skip
    pages.write_page("small", SMALL, made, args)
    text = Path("results/small.md").read_text(encoding="utf-8")
    assert text.startswith("# A title (FD in net.pt2, not FID)\n")
    assert "Measured with FD(net.pt2), on 12 samples." in text
    assert "| one | 1.50 ± 0.71 | 1.50 ± 0.71 |" in text and "Not run" not in text
    assert "| two | 1.50 ± 0.71 |  [9.87] |" in text and "In brackets: the paper's" in text
    assert "`python -m papers.experiments small --seeds 2 --features net.pt2 --data shapes`" in text
    with open("results/small.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 6 and all(row["command"].startswith("python metrics.py") for row in rows)
    assert np.asarray(Image.open("results/small.png")).std() > 5
    assert "1.50 ± 0.71" in capsys.readouterr().out
    args = options("small --features net.pt2 --out elsewhere/mine")
    pages.write_page("small", SMALL, made[:1], args)  # does not touch the page above
    assert "| one | 1.00 | 1.00 |" in Path("elsewhere/mine/small.md").read_text(encoding="utf-8")
    assert Path("results/small.md").read_text(encoding="utf-8") == text


def numbered(e, words="small --features net.pt2", metric="FD(net.pt2)"):
    """Plans of an experiment whose every cell has a number, and the arguments."""
    args = options(words)
    made = experiments.plan_all(["small"], {"small": e}, args)[0]["small"]
    for plan in made:
        for i, ((row, column), key) in enumerate(plan.cells.items()):
            plan.numbers.add(key, data=plan.data, seed=plan.seed, row=row, column=column,
                             metric=metric, value=float(i))  # fmt: skip
    return made, args


BEFORE = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import support, test_experiments as t
from papers import experiments, pages, plans
from support.programs import run_main
experiments.declare = lambda budget, weight=None: dict(small=t.SMALL)
plans.BUDGETS["cpu"] = t.CPU
"""
WRITE = """
def main():
    made, args = t.numbered(t.SMALL, "small --seeds 2 --features net.pt2")
    pages.write_page("small", t.SMALL, made, args)

run_main(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_a_page_is_written_whatever_the_locale(here, encoding):
    """In another process, whose locale has no "±"; with cp1252, as on Windows, its terminal has."""
    Path("net.pt2").touch()
    env = {**ENV, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if encoding != "ascii":
        env["PYTHONIOENCODING"] = encoding
    words = [sys.executable, "-c", BEFORE + WRITE]
    done = subprocess.run(words, cwd=here, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert (b" \\xb1 0.0" if encoding == "ascii" else b" \xb1 0.0") in done.stdout
    assert " \u00b1 0.0" in Path("results/small.md").read_text(encoding="utf-8")


def test_grids_of_samples_lie_side_by_side(small):
    e = dataclasses.replace(SMALL, score="picture", paper={})
    made, args = numbered(e, metric="mean grey")
    colours = {}
    for i, (row, column) in enumerate(made[0].cells):
        row = next(r for r in e.rows if r.label == row)
        path = Path(f"{made[0].out(row, column)}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        colours[path] = (30 + 50 * i, 0, 200 - 50 * i)
        Image.new("RGB", (40, 40), colours[path]).save(path)
    pages.write_page("small", e, made, args)
    drawn = np.asarray(Image.open("results/small.png").convert("RGB"))
    for colour in colours.values():
        assert (drawn == colour).all(2).sum() > 5000
    text = Path("results/small.md").read_text(encoding="utf-8")
    assert text.startswith("# A title (pictures)\n") and "| one |" not in text
    assert "seed" not in text.split("![")[0] and "Measured" not in text


def test_a_page_names_what_was_not_run(small, capsys):
    """--page writes the page of what there is. Rows and columns without numbers are left out."""
    words = "small --features net.pt2 --page".split()
    refused("^--page: .* has no number of small", experiments.main, words)
    numbered(SMALL, "small --features net.pt2 --rows two --columns 9 --seeds 2")
    experiments.main(words)
    text = Path("results/small.md").read_text(encoding="utf-8")
    assert "**Not run:** the rows “one”; the columns “DDPM, 5”. The command below" in text
    assert "| two | 0.0000 [9.87] |" in text and "| one |" not in text
    assert "One seed." in text and "| two |" in capsys.readouterr().out
    rows = plans.read_csv("results/small.csv")
    assert [(row["row"], row["column"]) for row in rows] == [("two", "DDPM, 9")]


def test_sampling_in_bf16_is_part_of_the_command(small):
    """So numbers of two precisions are never mixed, and the page names its own."""
    words = "small --features net.pt2 --precision bf16 --rows two --columns 9"
    numbered(SMALL, words)
    commands = list(plans.read_csv("results/numbers.csv"))
    assert all("--precision bf16 --compile" in row["command"] for row in commands) and commands
    other = words.replace("--precision bf16", "--page").split()
    refused("^--page: .* has no number of small", experiments.main, other)
    experiments.main(f"{words} --page".split())
    text = Path("results/small.md").read_text(encoding="utf-8")
    assert "sampled in bf16" in text and "--precision bf16" in text


PAIR = experiments.pair("--lr", "2e-3", name="fast") + experiments.pair(name="slow")


@pytest.mark.parametrize(
    "more, panels, lines",
    [
        (dict(columns=experiments.calls(5, 7, 9)), ["one", "two"], ["5", "7", "9"]),
        ({}, ["DDPM, 5", "DDPM, 9"], ["one", "two"]),
        (dict(rows=PAIR), ["DDPM, 5", "DDPM, 9"], ["fast", "slow"]),
    ],
)
def test_figures(small, more, panels, lines, monkeypatch):
    """A panel for each column, or for each system if these are fewer. Every seed is a dot."""
    kept = []
    monkeypatch.setattr(pages.files, "save_figure", lambda path, figure, dpi: kept.append(figure))
    e = dataclasses.replace(SMALL, paper={}, **more)
    made, args = numbered(e, "small --seeds 3 --features net.pt2")
    pages.write_page("small", e, made, args)
    (figure,) = kept
    assert [axes.get_title() for axes in figure.axes] == panels
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == lines
    dots = [len(line.get_xdata()) for line in figure.axes[1].lines if line.get_marker() != "None"]
    rows = len(e.rows) if more.get("rows") else 3 if more else 2  # of the second panel
    assert dots == [3] * rows
    assert all(axes.get_xlabel() == "FD(net.pt2)" for axes in figure.axes)


def test_plain_and_method_stand_in_one_line(small):
    """They differ in their look, and a line joins their means."""
    e = dataclasses.replace(SMALL, rows=PAIR)
    found = {("a", row.label, "DDPM, 5"): [i, i + 1] for i, row in enumerate(PAIR)}
    axes = pages.files.figure().subplots()
    pages.plot_lines(axes, "a", found, pages.lines_of(e, found)["DDPM, 5"], ["plain", "E-TSDM"])
    join, plain, method = axes.lines[:3]
    assert list(join.get_xdata()) == [0.5, 1.5] and join.get_linestyle() == "-"
    assert list(plain.get_xdata()) == [0, 1] and list(method.get_xdata()) == [1, 2]
    assert {*plain.get_ydata()} == {*method.get_ydata()} == {2}
    assert plain.get_markerfacecolor() == "none" and plain.get_marker() != method.get_marker()
    assert {*axes.lines[3].get_ydata()} == {1}


def test_a_page_of_a_program_shows_its_figure(small):
    e = dataclasses.replace(
        SMALL, paper={}, program=("gap.py", "-n", "7"), columns={"gap": len}, figure="Look here."
    )
    made, args = numbered(e)
    made[0].picture().parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (30, 20), 77).save(made[0].picture())
    pages.write_page("small", e, made, args)
    text = Path("results/small.md").read_text(encoding="utf-8")
    assert "One seed. Look here." in text and "| one | 0.0000 |" in text
    assert "Sampled with" not in text and "Columns" not in text
    assert Image.open("results/small.png").getpixel((3, 3)) == 77


@pytest.mark.parametrize(
    "values, scale", [([2.0, 2.1], "linear"), ([2.0, 300.0], "log"), ([], "linear")]
)
def test_a_few_per_cent_look_like_little(values, scale):
    axes = pages.files.figure().subplots()
    axes.plot(values, [1] * len(values), "o")
    pages.scale_axis(axes, SMALL)
    assert axes.get_xscale() == scale
    if values and scale == "linear":
        assert axes.get_xlim() == (0, pytest.approx(1.05 * max(values)))


@pytest.mark.parametrize(
    "flags, columns, text",
    [
        ((), experiments.calls(5), "Sampled with DDPM, x̂_0 clipped to [-1, 1]."),
        (("--clip", "off"), experiments.calls(5), "Sampled with DDPM, x̂_0 not clipped."),
        (("--clip", "on"), experiments.calls(5), "Sampled with DDPM, x̂_0 clipped to [-1, 1]."),
        (("--sampler", "heun"), experiments.calls(5), "Sampled with Heun, x̂_0 not clipped."),
        ((), experiments.named(experiments.DDPM, 5) | experiments.named(experiments.DDIM, 5), ""),
    ],
)
def test_pages_name_the_sampler(flags, columns, text):
    rows = (Row("one", (), flags), Row("two", ("--etsdm",), flags))
    assert pages.describe_sampler(dataclasses.replace(SMALL, rows=rows, columns=columns)) == text


def test_data_of_the_same_name_are_not_taken_for_each_other(small):
    """Neither their numbers nor their runs."""
    numbered(SMALL, "small --features net.pt2 --data a/train")
    message = "^--data {}/train: its runs or numbers would have the names of those of a/train"
    refused(message.format("b"), planned, "small --features net.pt2 --data b/train")
    planned("small --features net.pt2 --data ./a/../a/train")
    Path("results/numbers.csv").unlink()
    folder = Path("runs") / plan_of("small --features net.pt2 --data a/train").runs[0]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"data": "a/train"}')
    refused(message.format("c"), planned, "small --features net.pt2 --data c/train")


def test_numbers_of_two_networks_do_not_share_a_page(small):
    made, _ = numbered(SMALL)
    for i, key in enumerate(made[0].cells.values()):
        row = made[0].numbers.rows[key]
        made[0].numbers.add(key, **{k: row[k] for k in ("data", "metric", "value")},
                            network="abc" if i else "def")  # fmt: skip
    refused("come from different networks. Delete .*numbers.csv", pages.gather, made)


def test_what_is_complete_has_its_page_though_another_fails(small, monkeypatch, capsys):
    """all: two experiments, of which one has its numbers and the other's job fails."""
    both = {"small": SMALL, "other": dataclasses.replace(SMALL, rows=(Row("x", ("--lr", "5")),))}
    monkeypatch.setattr(experiments, "declare", lambda budget, weight=None: both)
    numbered(SMALL)

    def fail(todo, machine):
        raise ValueError("a job failed")

    monkeypatch.setattr(experiments.jobs, "run_all", fail)
    with pytest.raises(ValueError, match="a job failed"):
        experiments.main("all --features net.pt2".split())
    assert Path("results/small.md").exists() and not Path("results/other.md").exists()
    assert "stopped" not in capsys.readouterr().out


def test_a_lost_picture_is_drawn_again(small):
    made, _ = numbered(dataclasses.replace(SMALL, score="picture"), metric="mean grey")
    drawn = [job for job in made[0].jobs.values() if job.commands[0][0] == "sample.py"]
    assert len(drawn) == 4 and not any(job.done() for job in drawn)
    for (row, column), job in zip(made[0].cells, drawn, strict=True):
        row = next(r for r in SMALL.rows if r.label == row)
        path = Path(f"{made[0].out(row, column)}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert job.done()


def test_equal_pictures_have_an_infinite_psnr():
    found = plans.read_score('words\n{"metric": "PSNR", "value": null}')
    assert found == dict(metric="PSNR", value=float("inf"), network="")
    assert pages.format_values([found["value"]]) == "inf"


def test_dry_run_changes_nothing(small, capsys):
    experiments.main("small --dry-run --features net.pt2".split())
    out = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("python train.py") for line in out) == 2
    assert sum(line.startswith("python metrics.py fid") for line in out) == 4
    assert "7 of 7 commands are left" in out[-1] and list(Path().iterdir()) == [Path("net.pt2")]


# ------------------------------------------------------------------ the whole way


def start():
    """The program of a small experiment."""
    words = [sys.executable, "-c", BEFORE + "run_main(experiments.main)"]
    words += "small --features means.pt2 --workers 2".split()
    return subprocess.Popen(words, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)  # fmt: skip


class Means(torch.nn.Module):
    """Features of images."""

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x[:, :, ::2, ::3].std((2, 3))], 1)


@pytest.mark.slow
def test_an_interrupted_experiment_goes_on_to_the_same_numbers(small, monkeypatch, capsys):
    """SIGTERM as soon as the first number is there, then the same command. The numbers are those of
    its commands one after the other."""
    program = torch.export.export(
        Means(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("N")},)
    )
    torch.export.save(program, "means.pt2")
    process, numbers = start(), Path("results/numbers.csv").resolve()
    late = time.monotonic() + 240
    while not numbers.exists():
        assert time.monotonic() < late and process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert "stopped: run the same command to go on" in process.communicate(timeout=90)[0]
    before = Numbers(numbers).rows
    assert 1 <= len(before) < 4
    process = start()
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert f"in {Path('results/small.md').resolve()}" in out
    found = Numbers(numbers).rows
    assert len({row["value"] for row in found.values()}) == 4  # four systems, four numbers
    assert {k: found[k] for k in before} == before
    assert not [p for p in small.rglob("*") if p.suffix in (".tmp", ".out")]
    # Once more: nothing is left to do.
    assert "0 of 7 commands are left" in start().communicate(timeout=60)[0]

    Path("whole").mkdir()
    shutil.copy("means.pt2", "whole")
    monkeypatch.chdir("whole")
    experiments.CACHE.mkdir(parents=True)
    for job in planned("small --features means.pt2")[1].values():
        capsys.readouterr()
        main_of(*find_program(job.commands[0]))
        job.finish(capsys.readouterr().out)
    assert Numbers(Path("results/numbers.csv")).rows == found


# ------------------------------------------------------------------ what is committed

RESULTS = ROOT / "papers" / "results"


def committed(path):
    """The CSV of a page -> (its rows, {(data, row, column): values})."""
    rows, found = plans.read_csv(path.with_suffix(".csv")), {}
    for row in rows:
        found.setdefault((row["data"], row["row"], row["column"]), []).append(float(row["value"]))
    return rows, found


@pytest.mark.parametrize("name", NAMES)
def test_committed_pages_show_the_numbers_beside_them(name):
    """The table of papers/results/NAME.md is that of NAME.csv in today's declaration, and names
    what was not run; each number's command names one of our programs; README.md explains the page,
    or lists the experiment as not run."""
    e, readme = experiments.declare("cpu")[name], (RESULTS / "README.md").read_text("utf-8")
    if not (RESULTS / f"{name}.md").exists():
        assert name in readme[readme.index("## Not run") :]
        return
    page = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
    rows, found = committed(RESULTS / name)
    cells = {(row.label, column) for row in e.rows for column in e.columns}
    assert found and {key[1:] for key in found} <= cells
    assert page.startswith(f"# {e.title}") and e.claim in page
    assert pages.describe_gaps(e, found) in page
    for data in {row["data"] for row in rows} if e.score != "picture" else ():
        assert pages.markdown_table(e, data, found) in page
    with Image.open(RESULTS / f"{name}.png") as picture:
        assert min(picture.size) > 200
    assert f"]({name}.md)" in readme


@pytest.mark.parametrize("path", sorted((RESULTS / "earlier").glob("*.md")), ids=lambda p: p.stem)
def test_earlier_pages_show_the_numbers_beside_them(path):
    """Pages whose samplers were not those of the claims: kept, and not judged by."""
    page, (rows, found) = path.read_text(encoding="utf-8"), committed(path)
    if "mean grey" not in {row["metric"] for row in rows}:
        assert all(f"| {pages.format_values(values)} |" in page for values in found.values())
    assert f"](earlier/{path.name})" in (RESULTS / "README.md").read_text(encoding="utf-8")
