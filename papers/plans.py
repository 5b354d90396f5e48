r"""What an experiment is, and which commands of the other programs it needs.

    Experiment: rows (a run and how to use it) × columns, a score, what the paper says
    Plan(...).cells -> {(row, column): key of the number}, and the jobs that make them

Every number comes from a command that you could type, and is kept under that command. A run's name
is made of budget, data set, flags, length and seed, so that experiments share runs.

Not here: running anything (support/jobs.py), or a paper's tables (experiments.py).

    python -m papers.experiments sa-table1 --dry-run    # prints what this file makes of it

A run is a tuple: a program of papers/ (none: train.py) and its arguments. A tuple within it is the
run that it starts from. cost: forward passes of one image of 16x16 through `tiny`, or as much
arithmetic.
"""

import csv
import dataclasses
import json
import math
import os
import shlex
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import unet
from config import RECIPES, Config
from papers import heads
from papers.alternatives import AlternativeConfig
from papers.autoencoder import AutoencoderConfig
from papers.superres import SuperResConfig
from support import checkpoint, files, inception, readers
from support.checkpoint import RUNS
from support.cli import parse_into
from support.jobs import Job

# What every run of a budget has in common: flags for images, model and length; images scored,
# enlarged, and for Γ. The papers' own settings are the presets' recipes. The gpu budget has
# SA-DPM's network for both papers. Training is in bf16 if the hardware has it; the papers' in fp32.
BUDGETS = {
    "cpu": dict(image=("--image-size", "16"), model=("--schedule", "linear", "--prediction", "eps"),
                length=("--batch-size", "64", "--lr", "1e-3", "--optimizer", "muon",
                        "--muon-momentum", "0.95", "--lr-decay", "linear", "--ema", "0.99"),
                tag="-muon", n=1000, enlarged=300, gamma=64, batch_size=250),
    "gpu": dict(length=("--steps", "20000"), heads=("--steps", "20000"), n=10_000, enlarged=1000,
                gamma=1000, batch_size=500),
    "paper": dict(n=50_000, enlarged=1000, gamma=50_000, batch_size=500),
}
TESTED = ("etsdm-sr", "etsdm-colour", "etsdm-sr-pictures")  # they take --test
# What --precision bf16 adds to every command that samples. On a CPU with matrix units (AMX) this is
# more than twice as fast. Distances changed by 0.3 and 0.02 % (docs/lab-notebook.md).
FAST = ("--precision", "bf16", "--compile")
# SA-DPM's sets that have the network of another preset: (preset, flags), from its configuration
# files, where epochs are counted: 1,500 of 70,000 images, 2,000 of 15,803.
SETS = {"ffhq64": ("celeba64", "--batch-size", "256", "--images", "105000000"),
        "afhq64": ("celeba64", "--batch-size", "128", "--images", "31606000")}
# Programs whose runs start from no other run. The configs of papers.latents and papers.heads open
# the run that they start from, which may not exist yet: see Plan.config.
CONFIGS = {"train.py": Config, "papers.superres": SuperResConfig,
           "papers.autoencoder": AutoencoderConfig, "papers.alternatives": AlternativeConfig}


@dataclass(frozen=True)
class Row:
    """A line of the table: a run, and its sampling flags besides the column's."""
    label: str
    run: tuple | None = ()  # None: a figure without a network
    sample_flags: tuple = ()
    part: str = ""  # enlarged images: of the folder with this ending, instead of the results'
    system: str = ""  # rows of one system, such as plain and E-TSDM, are one line of the figure


@dataclass(frozen=True)
class Experiment:
    """What to train, what to measure, what the paper says; experiments.declare() has them all."""
    title: str
    claim: str  # what the paper says
    rows: tuple  # of Row
    columns: dict  # label -> flags; with a program: -> f(its CSV's rows of that run) -> value
    score: str = "fid"  # fid, is, psnr, colour, picture
    program: tuple = ()  # instead of a score: a program that receives all the runs, and its flags
    steps: int = 2000  # at cpu, the same for all, so that they share runs
    preset: str = "cifar10"  # at paper
    num_images: int = 0  # that are scored at paper, if not as many as usual
    axis: str = "network calls"
    figure: str = ""  # how to read it, if its labels are not enough
    paper: dict = field(default_factory=dict)  # (row's label, column's label) -> the paper's number


class Numbers:
    """Results, row by row in a CSV: what each command has given."""

    def __init__(self, path):
        self.path = path
        self.rows = self.read()

    def read(self):
        return {row["command"]: row for row in read_csv(self.path)} if self.path.exists() else {}

    def add(self, command, **row):
        """Keep a number, and those that another process has added meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(self.path.parent):
            self.rows = {**self.read(), command: {**row, "command": command}}
            files.write_csv(self.path, self.rows.values())


class Plan:
    """An experiment at a budget, on a data set, with a seed. jobs: {name: Job}, shared by plans.

    e is the Experiment, options an experiments.ExperimentsConfig, cache the folder for what can be
    made again.
    """

    def __init__(self, label, e, options, data, seed, jobs, numbers, cache):
        self.label, self.e, self.options, self.data, self.seed = label, e, options, data, seed
        self.jobs, self.numbers, self.cache = jobs, numbers, cache
        self.runs = []  # jobs that train its runs
        b = self.budget = BUDGETS[options.budget]
        self.gray = ("--channels", "1") if options.channels == 1 else ()
        side = options.image_size
        self.data_name = data_name(data) + "-gray" * bool(self.gray) + f"-{side}" * bool(side)
        paper = options.budget == "paper"
        self.recipe = options.preset or e.preset if paper else "cifar10"
        if options.budget == "cpu":
            self.recipe = "tiny"
        self.preset, *length = SETS.get(self.recipe, (self.recipe,))
        self.num_images = (e.num_images if paper else 0) or b["n"]
        if paper and self.preset == "celebahq256":  # SA-DPM's authors score so many
            self.num_images = 10_000
        self.model = b.get("model", ("--preset", self.preset))
        size = ("--image-size", str(side)) if side else b.get("image", ())
        self.image = ("--data", data, *self.gray, *size)
        self.length = (*b.get("length", ()), *length)
        self.batch_size = b["batch_size"]
        if unet.PRESETS[self.preset]["image_size"] == 256:  # fits into 80 GB
            self.batch_size = 64
            if "microbatch" not in RECIPES[self.preset]:
                self.length = (*self.length, "--microbatch", "16")

    def add(self, name, *commands, **more):
        """Add a job, unless another experiment has added it -> its name."""
        commands = [[str(word) for word in command] for command in commands]
        self.jobs.setdefault(name, Job(name, commands, **more))
        return name

    # -------------------------------------------------------------- runs

    def slug(self, run):
        """What distinguishes this run from others of the same budget, data and length."""
        words = [self.slug(w) if isinstance(w, tuple) else w.removeprefix("papers.").lstrip("-")
                 for w in run]
        return "-".join(words) or "plain"

    def name(self, run):
        """Its folder under runs/."""
        preset = [self.recipe] * (self.options.budget == "paper")  # elsewhere there is only one
        words = [self.options.budget + self.budget.get("tag", ""), *preset, self.data_name]
        return "-".join([*words, self.slug(run), *self.steps(run)[1:], f"seed{self.seed}"])

    def steps(self, run):
        """How long it is trained, if not as long as the recipe says."""
        if self.options.budget == "cpu":
            return "--steps", "2000" if "papers.autoencoder" in run else str(self.e.steps)
        return ()

    def args(self, run):
        """-> (program, its arguments). A run that starts from another has that one's images."""
        program, own = split_program(run)
        own = [self.name(w) if isinstance(w, tuple) else w for w in own]
        length = (*self.length, *self.steps(run))
        flags = {"papers.heads": self.budget.get("heads", ()),
                 "papers.latents": (*self.model, *length),
                 "papers.autoencoder": (*self.image, *self.steps(run))}.get(
                     program, (*self.image, *self.model, *length))
        # Positional arguments come first: `train`, or the run that this one starts from.
        first = next((i for i, w in enumerate(own) if w.startswith("-")), len(own))
        return program, [*own[:first], *flags, *own[first:], "--seed", str(self.seed), "--name",
                         self.name(run)]

    def config(self, run):
        """The settings of a run, as far as they are known before the run it starts from exists."""
        program, args = self.args(run)
        start = start_of(run)
        if program == "papers.heads":
            recipe = heads.TINY_RECIPE if self.options.budget == "cpu" else heads.RECIPE
            steps = int(self.budget.get("heads", ("--steps", 0))[1])
            images = steps * recipe["batch_size"] or recipe["images"]
            return dataclasses.replace(self.config(start), batch_size=recipe["batch_size"],
                                       images=images)
        if program == "papers.latents":  # the flags of train.py, and the autoencoder's images
            side = self.config(start).image_size
            return parse(Config, *args[1:], "--image-size", str(side))
        return parse(CONFIGS[program], *args[args[0] == "train":])

    def train(self, run):
        """Add the job that trains a run -> its name."""
        name, (program, args), config = self.name(run), self.args(run), self.config(run)
        batch, images, folder = config.batch_size, config.images, RUNS / name

        def images_seen():
            """Of log.csv's last whole row."""
            try:
                with open(folder / "log.csv", "rb") as f:
                    f.seek(max(0, f.seek(0, 2) - 1000))
                    return float(f.read().split(b"\n")[-2].split(b",")[1])
            except (OSError, IndexError, ValueError):
                return 0.0

        def done():
            path = folder / "checkpoint.pt"
            return path.exists() and (
                checkpoint.load_checkpoint(path)["step"] + 1) * batch > images

        self.refuse_name_clash(recorded_settings(folder).get("data"))
        start = start_of(run)
        before = () if start is None else (self.train(start),)
        self.runs += [name] * (name not in self.runs)
        passes = {"papers.heads": 1, "papers.autoencoder": 5}.get(  # 5: its own network
            program, 3 * config.sa_k * (2 if getattr(config, "lipschitz_reg", 0) else 1))
        return self.add(name, command(program, *args), done=done, after=before,
                        cost=passes * images * self.relative_cost(run),
                        progress=lambda: min(1.0, images_seen() / images))

    def relative_cost(self, run):
        """How much more an image costs than one of 16x16 in `tiny`."""
        config = self.config(run)
        preset = self.preset if "papers.autoencoder" in run else config.preset
        area = (config.image_size / unet.PRESETS[preset]["image_size"]) ** 2
        area /= 16 if "papers.latents" in run else 1
        return area * forward_flops(preset) / (forward_flops("tiny") / 4)  # tiny has 32x32

    # -------------------------------------------------------------- measurements

    def gamma(self, run):
        """Add the job that estimates Analytic-DPM's Γ of a run -> its name."""
        name, n = self.train(run), self.budget["gamma"]
        path, trained = (RUNS / name / x for x in ("analytic.npz", "checkpoint.pt"))
        return self.add(f"{name}-gamma", command("papers.covariance", name, "-n", n), after=(name,),
                        done=lambda: is_newer(path, trained),
                        cost=1000 * n * self.relative_cost(run))

    def feature_network(self, side, kind="features"):
        """The network that scores images -> (flags that choose it, names of jobs)."""
        for flag in ("features", "inception"):
            given = getattr(self.options, flag)
            if given and not (flag == "features" and kind == "classes"):
                return [f"--{flag}", str(given)], ()
        if Path(readers.cache_path(inception.NAME)).exists():
            return [], ()
        path = self.cache / f"{self.data_name}-{side}-{kind}.pt2"
        logits = ["--logits"] * (kind == "classes")
        job = self.add(path.stem, command("papers.classifier", self.data, "--image-size", side,
                                          "--out", path, *self.gray, *logits),
                       done=path.exists, early=True, cost=4e5 * (side / 16) ** 2)
        return ["--features", str(path)], (job,)

    def reference(self, side):
        """-> (file of statistics of the data set, flags, names of jobs)."""
        flags, before = self.feature_network(side)
        network = Path(flags[-1]).name if flags else "inception"
        path = self.cache / f"{self.data_name}-{side}-{network}.npz"
        words = ["stats", self.data, path, "--image-size", side, *self.gray, *flags]
        words += ["-n", 10_000] * (self.data == "shapes")
        statistics = self.add(
            f"{path.stem}-statistics", command("metrics.py", *words), after=before,
            cost=3e4 * (side / 16) ** 2,
            done=lambda: is_newer(path, Path(flags[-1])) if flags else path.exists())
        return path, flags, (*before, statistics)

    def flags(self, row, column):
        """How this cell's images are sampled."""
        fast = FAST if self.options.precision == "bf16" else ()
        return [*row.sample_flags, *self.e.columns[column], *fast]

    def out(self, row, column):
        """The folder of this cell's images; their grid has the same name with .png."""
        parts = [self.name(row.run), *(f.lstrip("-") for f in self.flags(row, column))]
        if split_program(row.run)[0] == "papers.superres":
            parts += [data_name(self.options.test)] if self.options.test else []
            parts += ["picture"] * (self.e.score == "picture")  # of fewer images: another folder
        return self.cache / "-".join(parts)

    def commands(self, row, column, flags, name, side):
        """-> (commands whose last one prints the number, names of jobs that come before)."""
        e, out = self.e, self.out(row, column)
        if split_program(row.run)[0] == "papers.superres":
            n = 16 if e.score == "picture" else self.budget["enlarged"]
            enlarge = command("papers.superres", "enlarge", name, self.options.test or self.data,
                              "-n", n, "--out", out, *flags)
            compare = {"psnr": ["metrics.py", "psnr"], "colour": ["papers.superres", "colour"]}
            return [enlarge, *(command(*words, f"{out}{row.part}", f"{out}-original", "--json")
                               for score, words in compare.items() if score == e.score)], ()
        if e.score == "picture":
            return [command("sample.py", name, "-n", 16, "--out", out, *flags)], ()
        if e.score == "is":
            words, (network, before) = ["is", name], self.feature_network(side, "classes")
        else:
            path, network, before = self.reference(side)
            words = ["fid", name, path]
        sampling = ["-n", self.num_images, "--batch-size", self.batch_size, *flags]
        return [command("metrics.py", *words, *sampling, *network, "--json")], before

    def cell(self, row, column):
        """Add the job of this cell's number -> the number's key."""
        name, flags = self.train(row.run), self.flags(row, column)
        nfe = int(flags[flags.index("--nfe") + 1])
        commands, before = self.commands(row, column, flags, name, self.config(row.run).image_size)
        key = " && ".join(map(typed, commands))
        before = (name, *before, *([self.gamma(row.run)] if "analytic" in flags else []))
        n = {"psnr": self.budget["enlarged"], "colour": self.budget["enlarged"],
             "picture": 16}.get(self.e.score, self.num_images)
        other = [f"of-{self.num_images}"] * (self.num_images != self.budget["n"])
        job = "-".join([self.e.score, name, *(flag.lstrip("-") for flag in flags), *other])
        filled = job.replace("colour-", "psnr-", 1)
        if row.part or filled != job and filled in self.jobs:  # a folder that another job fills
            before, n = (*before, job if row.part else filled), 0
        grid = Path(f"{self.out(row, column)}.png") if self.e.score == "picture" else None

        def finish(text):
            found = read_score(text) if grid is None else dict(
                metric="mean grey", value=np.asarray(Image.open(grid)).mean())
            self.numbers.add(key, data=self.data, seed=self.seed, row=row.label, column=column,
                             **found)
        self.refuse_name_clash(self.numbers.rows.get(key, {}).get("data"))
        self.add(job + row.part, *commands, after=before, finish=finish,
                 cost=n * nfe * self.relative_cost(row.run),
                 done=lambda: key in self.numbers.rows and (grid is None or grid.exists()))
        return key

    def refuse_name_clash(self, other):
        """ValueError: a run or number of this name exists, of the data set `other`. Runs are named
        after the last part of the data's path."""
        if other and not (other == self.data
                          or os.path.realpath(other) == os.path.realpath(self.data)):
            raise ValueError(f"--data {self.data}: its runs or numbers would have the names of "
                             f"those of {other}. Work in another folder, or rename one of the two")

    @cached_property
    def cells(self):
        """{(row's label, column's label): key of the number}. Adds all jobs."""
        if self.e.program:
            return self.figure()
        return {(row.label, column): self.cell(row, column)
                for row in self.e.rows if begins_with(row.label, self.options.rows)
                for column in self.e.columns if begins_with(column, self.options.columns)}

    def picture(self):
        """The figure that this experiment's program draws, with its CSV next to it."""
        return self.cache / (f"{self.options.budget}-{self.data_name}-{self.label}"
                             f"-seed{self.seed}.png")

    def figure(self):
        """cells for a program that receives all runs at once: its CSV has the numbers."""
        e, path = self.e, self.picture()
        names = {row.label: self.train(row.run) for row in e.rows if row.run is not None}
        program, *flags = e.program
        words = command(program, *(f"{label}={name}" for label, name in names.items()), *flags,
                        "--out", path)
        keys = {(row.label, column): f"{typed(words)} # {row.label}: {column}"
                for row in e.rows for column in e.columns}

        def finish(text):
            found = [{k: to_number(v) for k, v in row.items()}
                     for row in read_csv(path.with_suffix(".csv"))]
            for (label, column), key in keys.items():
                value = e.columns[column]([row for row in found if row["run"] == label])
                self.numbers.add(key, data=self.data, seed=self.seed, row=label, column=column,
                                 metric=column, value=value)
        for key in keys.values():
            self.refuse_name_clash(self.numbers.rows.get(key, {}).get("data"))
        n = int(flags[flags.index("-n") + 1]) if "-n" in flags else 64
        steps = 999 if program == "gap.py" and "--steps" not in flags else 50
        self.add(path.stem, words, finish=finish, after=tuple(names.values()),
                 cost=sum(n * 3 * steps * self.relative_cost(row.run)
                          for row in e.rows if row.run is not None),
                 done=lambda: path.exists() and all(k in self.numbers.rows for k in keys.values()))
        return keys


# ------------------------------------------------------------------ commands, files, costs

def split_program(run):
    """A run -> (program, its arguments)."""
    return (run[0], run[1:]) if run and run[0].startswith("papers.") else ("train.py", run)


def start_of(run):
    """The run that this one starts from, or None."""
    return next((word for word in run if isinstance(word, tuple)), None)


def own_side(e):
    """True if an experiment sets the side of its images itself."""
    return any("--image-size" in str(row.run) for row in e.rows)


def command(program, *args):
    """The words after `python`."""
    return [*(["-m"] * program.startswith("papers.")), program, *map(str, args)]


def typed(words):
    """A command as it is typed."""
    return shlex.join(["python", *words])


def begins_with(label, words):
    """True if a label, or a part of it after a comma, begins with one of these words; if there are
    none, always."""
    return not words or any(f", {word}" in f", {label}" for word in words)


def data_name(data):
    """A data set's part of the names of runs: the last part of its path."""
    return Path(data.split(":")[0]).stem


@cache
def parse(config_class, *args):
    """parse_into, once for each command line."""
    return parse_into(config_class, args)


@cache
def forward_flops(preset):
    """Floating-point operations of a forward pass for one image of the preset's size."""
    size = unet.PRESETS[preset]["image_size"]
    # Without fused attention, which the counter does not know on CPUs.
    with (FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad(),
          sdpa_kernel(SDPBackend.MATH)):
        unet.UNet(**unet.PRESETS[preset])(torch.empty(1, 3, size, size), torch.empty(1))
    return counter.get_total_flops()


def read_csv(path):
    """The rows of a CSV file, as dicts."""
    with open(path, newline="", encoding="utf-8", errors="surrogatepass") as f:
        return list(csv.DictReader(f))


def to_number(text):
    """float(text), or the text if it is not a number."""
    try:
        return float(text)
    except ValueError:
        return text


def read_score(text):
    """The output of metrics.py --json -> metric, value and network."""
    found = json.loads(text.strip().split("\n")[-1])
    value = math.inf if found["value"] is None else found["value"]  # PSNR of equal images
    return dict(metric=found["metric"], value=value, network=found.get("sha256") or "")


def is_newer(path, other):
    """True if both files exist and the first was made after the second."""
    return path.exists() and other.exists() and path.stat().st_mtime >= other.stat().st_mtime


def recorded_settings(folder):
    """config.json of a run, if there is one."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
