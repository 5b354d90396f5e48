r"""What an experiment is, and which commands of the other programs it takes.

    Experiment: rows (a run and how to use it) × columns, a score, what the paper says
    Plan(...).cells -> {(row, column): key of the number}, and the jobs that make them

Every number comes from a command that you could type: the command is the key under which it is
kept. Runs are named after budget, data set, flags, length and seed, so that two experiments which
want the same run share it.

What this file does not do: run anything (jobs.py), or know a paper (experiments.py).

    python experiments.py sa-table1 --dry-run        # shows what this file makes of a declaration

A run is a tuple of train.py's flags; a tuple within it is the run that it starts from. cost: passes
forward of one image of 16×16 through `tiny`, or as much arithmetic.
"""

import csv
import json
import math
import os
import shlex
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from PIL import Image

import benchmark
import files
import inception
import readers
import settings
from jobs import Job

# What every run of a budget has in common: flags of train.py for images, model and length; images
# that are scored, and enlarged; Γ's images. The papers' own settings are train.py's recipes.
BUDGETS = {
    "cpu": dict(image=("--image-size", "16"), model=("--schedule", "linear", "--prediction", "eps"),
                length=("--batch-size", "64", "--lr", "1e-3"), n=1000, enlarged=300, gamma=64,
                at_once=250),
    "gpu": dict(length=("--steps", "20000"), heads=("--steps", "20000"), n=10_000, enlarged=1000,
                gamma=1000, at_once=500),
    "paper": dict(n=50_000, enlarged=1000, gamma=50_000, at_once=500),
}


@dataclass(frozen=True)
class Row:
    """A line of the table: a run, and what is asked of it besides the column's flags."""
    label: str
    run: tuple | None = ()  # None: a figure without a network
    how: tuple = ()
    part: str = ""  # psnr: of the folder with this ending, instead of the results'


@dataclass(frozen=True)
class Experiment:
    """What to train, what to ask, what the paper says; experiments.declare() is full of them."""
    title: str
    claim: str  # what the paper says
    rows: tuple  # of Row
    columns: dict  # label -> flags; with a program: -> f(its CSV's rows of that run) -> value
    score: str = "fid"  # fid, is, psnr, picture
    program: tuple = ()  # instead of a score: a program that is given all the runs, and its flags
    steps: int = 2000  # at cpu
    preset: str = "cifar10"  # at paper
    many: int = 0  # images that are scored at paper, if not as many as usual
    axis: str = "network calls"
    split: tuple = ()  # a panel of the figure for the rows with each of these words
    figure: str = ""  # how to read it, where its labels do not say
    paper: dict = field(default_factory=dict)  # row's label -> what the paper has there


class Numbers:
    """Results, row by row in a CSV: what a command has given, once and for all."""

    def __init__(self, path):
        self.path = path
        self.rows = self.read()

    def read(self):
        if not self.path.exists():
            return {}
        with open(self.path, newline="", encoding="utf-8", errors="surrogatepass") as f:
            return {row["command"]: row for row in csv.DictReader(f)}

    def add(self, command, **row):
        """Keep a number; and those that somebody else has put there meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(self.path.parent):
            self.rows = {**self.read(), command: {**row, "command": command}}
            files.write_csv(self.path, self.rows.values())


class Plan:
    """An experiment at a budget, on a data set, with a seed. jobs: {name: Job}, shared by many."""

    def __init__(self, label, e, args, data, seed, jobs, numbers, kept):
        self.label, self.e, self.args, self.data, self.seed = label, e, args, data, seed
        self.jobs, self.numbers, self.kept = jobs, numbers, kept
        self.runs = []  # jobs that train its runs
        b = self.b = BUDGETS[args.budget]
        gray = ("--channels", "1") if args.channels == 1 else ()
        small = args.budget == "cpu"
        self.gray, self.stem = gray, stem(data) + "-gray" * bool(gray)
        paper = args.budget == "paper"
        self.preset = "tiny" if small else (args.preset or e.preset) if paper else "cifar10"
        self.n = (e.many if paper else 0) or b["n"]
        self.model = b.get("model", ("--preset", self.preset))
        self.image = ("--data", data, *gray, *b.get("image", ()))
        self.length = b.get("length", ())
        self.at_once = b["at_once"]
        if settings.unet.PRESETS[self.preset]["image_size"] == 256:  # into 80 GB
            self.at_once, self.length = 64, (*self.length, "--microbatch", "16")

    def add(self, name, *commands, **more):
        """A job, unless another experiment has it already -> its name."""
        words = [[str(word) for word in command] for command in commands]
        self.jobs.setdefault(name, Job(name, words, **more))
        return name

    # -------------------------------------------------------------- runs

    def slug(self, run):
        """What distinguishes this run from others of the same budget, data and length."""
        words = [self.slug(w) if isinstance(w, tuple) else w.lstrip("-") for w in run]
        return "-".join(words) or "plain"

    def name(self, run):
        """Its folder under runs/."""
        preset = [self.preset] * (self.args.budget == "paper")  # elsewhere there is only one
        words = [self.args.budget, *preset, self.stem, self.slug(run), *self.steps(run)[1:]]
        return "-".join([*words, f"seed{self.seed}"])

    def steps(self, run):
        """How long it is trained, if not as long as the recipe says."""
        if self.args.budget == "cpu":
            return "--steps", "2000" if "autoencoder" in run else str(self.e.steps)
        return ()

    def words(self, run):
        """train.py's flags. Where a run starts from another, that one knows the rest."""
        own = [self.name(w) if isinstance(w, tuple) else w for w in run]
        flags = [*self.image, *self.model, *self.length, *self.steps(run)]
        if "--head" in own:
            flags = self.b.get("heads", ())
        elif "--latent" in own:
            flags = [*self.model, *self.length, *self.steps(run)]
        elif "autoencoder" in own:
            flags = [*self.image, *self.steps(run)]
        return [*flags, *own, "--seed", str(self.seed), "--name", self.name(run)]

    def train(self, run):
        """-> the name of the run; its job is there from now on."""
        name, words = self.name(run), self.words(run)
        args = parsed(*words)
        recipe = args.preset or "tiny"
        if args.head:
            recipe = "head of tiny" if self.args.budget == "cpu" else "head"
        recipe = settings.RECIPES["autoencoder" if args.task == "autoencoder" else recipe]
        batch = args.batch_size or recipe["batch_size"]
        images = args.steps * batch if args.steps else args.images or recipe["images"]
        passes = 1 if args.head else 3 * (args.sa_k or 1) * (2 if args.lipschitz_reg else 1)
        passes = 5 if args.task == "autoencoder" else passes  # its own network
        folder = files.RUNS / name

        def seen():
            """Images so far: of log.csv's last whole row."""
            try:
                with open(folder / "log.csv", "rb") as f:
                    f.seek(max(0, f.seek(0, 2) - 1000))
                    return float(f.read().split(b"\n")[-2].split(b",")[1])
            except (OSError, IndexError, ValueError):
                return 0.0

        def done():
            path = folder / "checkpoint.pt"
            return path.exists() and (files.load_checkpoint(path)["step"] + 1) * batch > images

        other = recorded(folder).get("data")
        if other and not same(other, self.data):
            self.clash(other)
        before = tuple(self.train(w) for w in run if isinstance(w, tuple))
        self.runs += [name] * (name not in self.runs)
        return self.add(name, ["train.py", *words], done=done, after=before,
                        cost=passes * images * self.area(run),
                        progress=lambda: min(1.0, seen() / images))

    def side(self, run):
        """Pixels of an image's side."""
        for start in (w for w in run if isinstance(w, tuple)):
            return self.side(start)
        args = parsed(*self.words(run))
        return args.image_size or settings.unet.PRESETS[args.preset or "tiny"]["image_size"]

    def area(self, run):
        """How much more an image costs than one of 16×16 in `tiny`."""
        usual = settings.unet.PRESETS[self.preset]["image_size"]
        more = (self.side(run) / usual) ** 2 / (16 if "--latent" in run else 1)
        return more * operations(self.preset) / (operations("tiny") / 4)  # tiny's is 32×32

    # -------------------------------------------------------------- what is asked of them

    def gamma(self, run):
        """Γ of Analytic-DPM for a run -> the job's name."""
        name, n = self.train(run), self.b["gamma"]
        path, trained = (files.RUNS / name / x for x in ("analytic.npz", "checkpoint.pt"))
        return self.add(f"{name}-gamma", ["covariance.py", name, "-n", n], after=(name,),
                        done=lambda: newer(path, trained), cost=1000 * n * self.area(run))

    def eyes(self, side, kind="features"):
        """The network that looks at images -> (flags that choose it, names of jobs)."""
        for flag in ("features", "inception"):
            given = getattr(self.args, flag)
            if given and not (flag == "features" and kind == "classes"):
                return [f"--{flag}", given], ()
        if Path(readers.cache_path(inception.NAME)).exists():
            return [], ()
        path = self.kept / f"{self.stem}-{side}-{kind}.pt2"
        words = ["classifier.py", self.data, "--image-size", side, "--out", path, *self.gray]
        words += ["--logits"] * (kind == "classes")
        return ["--features", path], (self.add(path.stem, words, done=path.exists, early=True,
                                               cost=4e5 * (side / 16) ** 2),)

    def reference(self, side):
        """-> (statistics of the data set, flags, names of jobs)."""
        flags, before = self.eyes(side)
        eyes = Path(flags[-1]).name if flags else "inception"
        path = self.kept / f"{self.stem}-{side}-{eyes}.npz"
        words = ["metrics.py", "stats", self.data, path, "--image-size", side, *self.gray, *flags]
        words += ["-n", 10_000] * (self.data == "shapes")
        statistics = self.add(
            f"{path.stem}-statistics", words, after=before, cost=3e4 * (side / 16) ** 2,
            done=lambda: newer(path, Path(flags[-1])) if flags else path.exists())
        return path, flags, (*before, statistics)

    def out(self, row, column):
        """The folder of this cell's pictures; their grid has the same name with .png."""
        flags = (*row.how, *self.e.columns[column])
        return self.kept / "-".join([self.name(row.run), *(f.lstrip("-") for f in flags)])

    def commands(self, row, column, flags, name, side):
        """-> (commands whose last one prints the number, names of jobs, how to read it)."""
        e, b, out = self.e, self.b, self.out(row, column)
        many = ["-n", self.n, "--batch-size", self.at_once, *flags]
        if e.score == "picture":
            def grey(text):
                return dict(metric="mean grey", value=np.asarray(Image.open(f"{out}.png")).mean())
            return [["sample.py", name, "-n", 16, "--out", out, *flags]], (), grey  # its grid
        if e.score == "psnr":
            known = ["--low-res", self.args.test or self.data, "-n", b["enlarged"]]
            pairs = [f"{out}{row.part}", f"{out}-original"]
            return [["sample.py", name, *known, "--out", out, *flags],
                    ["metrics.py", "psnr", *pairs, "--json"]], (), read
        if e.score == "is":
            given, before = self.eyes(side, "classes")
            return [["metrics.py", "is", name, *many, *given, "--json"]], before, read
        path, given, before = self.reference(side)
        return [["metrics.py", "fid", name, path, *many, *given, "--json"]], before, read

    def cell(self, row, column):
        """-> the key of this cell's number; its job is there from now on."""
        name, flags = self.train(row.run), [*row.how, *self.e.columns[column]]
        calls = int(flags[flags.index("--nfe") + 1])
        side = self.side(row.run)
        commands, before, reading = self.commands(row, column, flags, name, side)
        commands = [[str(word) for word in command] for command in commands]
        key = " && ".join(shlex.join(["python", *command]) for command in commands)
        before = (name, *before, *([self.gamma(row.run)] if "analytic" in flags else []))
        n = self.b["enlarged"] if self.e.score == "psnr" else self.n
        other = [f"of-{self.n}"] * (self.n != self.b["n"])  # one experiment's own number
        job = "-".join([self.e.score, name, *(flag.lstrip("-") for flag in flags), *other])
        if row.part:  # of a folder that another job fills
            before, n = (*before, job), 0

        def finish(text):
            self.numbers.add(key, data=self.data, seed=self.seed, row=row.label, column=column,
                             **reading(text))
        drawn = Path(f"{self.out(row, column)}.png")
        self.check(key)
        self.add(job + row.part, *commands, after=before, finish=finish, cost=n * calls
                 * self.area(row.run), done=lambda: key in self.numbers.rows
                 and (self.e.score != "picture" or drawn.exists()))
        return key

    def check(self, key):
        """ValueError: this number is known, of other data of the same name."""
        kept = self.numbers.rows.get(key)
        if kept and not same(kept["data"], self.data):
            self.clash(kept["data"])

    def clash(self, other):
        """Runs are called after the last part of the data's path."""
        raise ValueError(f"runs or numbers of {other} have the names that those of {self.data} "
                         "would have: work in another folder, or call one of the two otherwise")

    @cached_property
    def cells(self):
        """{(row's label, column's label): key of the number}; all jobs are there from now on."""
        if self.e.program:
            return self.figure()
        return {(row.label, column): self.cell(row, column)
                for row in self.e.rows for column in self.e.columns}

    def picture(self):
        """Where a program of this experiment draws, with its CSV beside it."""
        return self.kept / f"{self.args.budget}-{self.stem}-{self.label}-seed{self.seed}.png"

    def figure(self):
        """The same for a program that takes all runs at once: its numbers are read from its CSV."""
        e, path = self.e, self.picture()
        names = {row.label: self.train(row.run) for row in e.rows if row.run is not None}
        program, *flags = e.program
        command = [program, *(f"{label}={name}" for label, name in names.items()), *flags,
                   "--out", str(path)]
        typed = shlex.join(["python", *command])
        keys = {(row.label, column): f"{typed} # {row.label}: {column}"
                for row in e.rows for column in e.columns}

        def finish(text):
            with open(path.with_suffix(".csv"), newline="", encoding="utf-8",
                      errors="surrogatepass") as f:
                found = [{k: number(v) for k, v in row.items()} for row in csv.DictReader(f)]
            for (label, column), key in keys.items():
                value = e.columns[column]([row for row in found if row["run"] == label])
                self.numbers.add(key, data=self.data, seed=self.seed, row=label, column=column,
                                 metric=column, value=value)
        for key in keys.values():
            self.check(key)
        n = int(flags[flags.index("-n") + 1]) if "-n" in flags else 64
        steps = 999 if program == "gap.py" and "--steps" not in flags else 50
        self.add(path.stem, command, finish=finish, after=tuple(names.values()),
                 cost=sum(n * 3 * steps * self.area(row.run) for row in e.rows if row.run),
                 done=lambda: path.exists() and all(k in self.numbers.rows for k in keys.values()))
        return keys


def stem(data):
    """What a data set is called in the names of runs: the last part of its path."""
    return Path(data.split(":")[0]).stem


def same(data, other):
    """Whether two words for data mean the same."""
    return data == other or os.path.realpath(data) == os.path.realpath(other)


@cache
def operations(preset):
    """Of a pass forward for one image of the preset's size."""
    return benchmark.flops(preset, 1) / 3


@cache
def parsed(*words):
    """train.py's view of its flags."""
    return settings.parse(list(words))


def number(text):
    """A number, if it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def read(text):
    """What metrics.py --json has printed -> metric and value."""
    found = json.loads(text.strip().split("\n")[-1])
    value = math.inf if found["value"] is None else found["value"]  # two equal pictures' PSNR
    return dict(metric=found["metric"], value=value, network=found.get("sha256") or "")


def newer(path, other):
    """Whether both files are there, and the first was made after the second."""
    return path.exists() and other.exists() and path.stat().st_mtime >= other.stat().st_mtime


def recorded(folder):
    """config.json of a run, if there is one."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
