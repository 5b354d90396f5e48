r"""Each table and figure of SA-DPM and E-TSDM, by one command, at a budget that you choose.

    python -m papers.experiments list                         # the names, and their costs
    python -m papers.experiments sa-table1                    # cpu: half an hour on two cores
    python -m papers.experiments sa-table1 --seeds 3 --data fashion-mnist --channels 1
    python -m papers.experiments etsdm-table2 --budget gpu --data cifar10
    python -m papers.experiments sa-table1 --budget paper --dry-run   # prints the commands

An experiment is a declaration, in declare() below: which runs to train, what to measure, what the
paper says. plans.py turns it into commands of the other programs. support/jobs.py runs those that
are missing, several at a time, and pages.py makes results/NAME.md, .csv and .png of the numbers.
The same command goes on where it stopped. Experiments share runs. results/numbers.csv keeps each
number next to its command: delete a row, or the file, to measure again.

Not here: choosing the best of several runs. Without Inception's weights (metrics.py fetches them)
the distances are in the features of a small classifier of the same set, which is trained first; the
table's title then says so, and no distance is called FID.

A plan is one experiment on one data set, with one seed: a table of rows × columns.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import dataclasses
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import ClassVar

import numpy as np

import unet
from papers import pages
from papers.alternatives import REMAPS
from papers.plans import BUDGETS, SETS, Experiment, Numbers, Plan, Row
from papers.plans import TESTED, begins_with, data_name, forward_flops, own_side, typed
from support import inception, jobs, readers
from support.cli import flag, flag_name, parse_into
from support.programs import run_main

RESULTS = Path("results")
CACHE = RESULTS / "cache"  # features, statistics, logs, pictures: what can be made again
SECONDS = 4e-4  # a forward pass of `tiny` for an image of 16x16 took, on one core of an AMD EPYC
TFLOPS = 100  # what a GPU is assumed to do per second: a third of an A100's rate in bf16


# ------------------------------------------------------------------ the experiments

ETSDM = ("--etsdm",)
DDIM, DDPM = ("DDIM", "--sampler", "ddim"), ("DDPM", "--sampler", "ddpm")
SOLVER = [(f"DPM-Solver-{k}", "--sampler", "dpm-solver", "--order", str(k), "--spacing", "logsnr")
          for k in (2, 3)]
# E-TSDM's sampler in all but its fast-sampling table (eq. 10, algorithm A2): ancestral, each of the
# 1,000 steps, variance β_t ("large"); next to it the other usual choice ("small").
LARGE = "DDPM large, 1000"
FULL = {LARGE: ("--sampler", "ddpm", "--variance", "large", "--nfe", "1000"),
        "DDPM small, 1000": ("--sampler", "ddpm", "--variance", "small", "--nfe", "1000")}
# SA-DPM's own program: times 901, 801, ..., 1 for 10 calls, and x̂_0 as the network gives it. The
# estimated variances need a clip (papers/covariance.py).
SA_GRID, SA_PLAIN = ("--spacing", "leading"), ("--spacing", "leading", "--clip", "off")
LDM = ("--schedule", "quadratic", "--betas", "0.0015", "0.0195")
V = ("--prediction", "v")
REGULARIZED = ("papers.alternatives", "--lipschitz-reg", "30")
ASKS = dict(preset="ffhq256", axis="sampler, network calls")  # of most E-TSDM experiments


def calls(*numbers):
    """Columns: numbers of network calls."""
    return {str(n): ("--nfe", str(n)) for n in numbers}


def named(sampler, *numbers):
    """Columns: a sampler (title, flags) and numbers of calls."""
    title, *flags = sampler
    return {f"{title}, {n}": (*flags, "--nfe", str(n)) for n in numbers}


def pair(*run, name="", flags=()):
    """Rows: a run without and with E-TSDM. name: what distinguishes it from others of a table."""
    before = f"{name}, " if name else ""
    return tuple(Row(before + label, (*run, *more), flags, system=name or "E-TSDM")
                 for label, more in (("plain", ()), ("E-TSDM", ETSDM)))


def declare(budget, weight=None):
    """{name: Experiment}. The cpu budget leaves out the longest columns. weight: SA's λ; None:
    train.py's default."""
    return {**sa_experiments(budget, weight), **etsdm_slopes(budget == "paper"),
            **etsdm_tables(budget == "paper"), **etsdm_choices(budget == "paper"),
            **etsdm_tasks(budget)}


def sa_experiments(budget, weight):
    """Of SA-DPM. Its README names the grid, no clip, and 10,000 images for CelebA-HQ."""
    small = budget == "cpu"
    lam = () if weight is None else ("--sa-weight", f"{weight:g}")
    both = {"base": (), "SA-2": ("--sa-k", "2", *lam)}
    nfe = (10, 20, 50, 100) if small else (10, 25, 50, 100, 200, 1000)
    with_head = {"": lambda run: run, "A-": lambda run: run,
                 "NPR-": lambda run: ("papers.heads", "npr", run),
                 "SN-": lambda run: ("papers.heads", "sn", run)}
    variance = {"": SA_PLAIN, "A-": (*SA_GRID, "--variance", "analytic"),
                "NPR-": (*SA_GRID, "--variance", "npr"), "SN-": (*SA_GRID, "--variance", "sn")}
    rows = tuple(Row(f"{v}{s[0]}, {name}", with_head[v](run), (*s[1:], *variance[v]),
                     system=f"{v}{s[0]}")
                 for s in (DDPM, DDIM) for v in variance for name, run in both.items())
    plain = tuple(row for row in rows if row.system in ("DDPM", "DDIM"))
    found = {}
    found["sa-table1"] = Experiment(
        "SA-2 and four reverse variances over network calls", rows=rows,
        claim="SA-2 improves the FID of every system, most in few calls; Analytic-, NPR- and "
              "SN-DPM add to it", columns=calls(*nfe))
    found["sa-steps"] = Experiment(
        "50 and 100 calls against 1,000", rows=plain, columns=calls(50, 100, 1000),
        claim="50 or 100 timesteps are sufficient for SA-2 to reach a similar FID as prior methods "
              "with 1,000")
    found["sa-table2"] = Experiment(
        "SA-2 over network calls: the other score", score="is", rows=rows,
        claim="SA-2 improves the Inception Score too, also with Analytic-, NPR- and SN-DPM",
        columns=calls(*nfe))
    found["sa-table3"] = Experiment(
        "SA-2 over network calls, on several data sets", rows=plain,
        claim="SA-2 is better for every number of steps, with DDPM and DDIM, on every data set",
        columns=calls(10, 50, 200) if small else calls(*nfe))
    weights = (0.1, 1, 4) if small else (0.1, 0.5, 1, 2, 4, 8)
    found["sa-table4"] = Experiment(
        "k consecutive steps × weight λ of the loss, DDPM",
        claim="SA-k improves on the plain model (k = 1) for k = 2 to 4 and several weights λ, on "
              "CIFAR-10; much higher weights are slightly worse at 1,000 steps and significantly "
              "better at few", figure="The weights above 1 are ours: the paper's are not known.",
        rows=(Row("k = 1", (), plain[0].sample_flags), *(
            Row(f"k = {k}, λ = {w:g}", ("--sa-k", str(k)) if w == 1 else
                ("--sa-k", str(k), "--sa-weight", str(w)), plain[0].sample_flags)
            for k in (2, 3, 4) for w in weights if not (small and k > 2 and w != 1))),
        columns=calls(10, 50, 1000) if small else calls(*nfe))
    found["sa-figure1"] = Experiment(
        "Errors of one size that add up, or cancel",
        claim="with equal errors at every step, one trajectory ends far from the true one, and "
              "another next to it",
        rows=tuple(Row(name, None) for name in ("errors add up", "errors cancel")),
        program=("papers.figures", "illustration"),
        figure="One dimension, two bell curves, the exact network; errors of ±0.15 are added by "
               "hand.",
        columns={"distance at the end": lambda rows: rows[-1]["gap"]})
    at_end = {"norm of the batch mean": "mean", "systematic part": "systematic",
              "its 95 %: from": "low", "to": "high", "less than base's": "less",
              "this 95 %: from": "less_low", "to:": "less_high", "mean of the norms": "norm"}
    found["sa-figure4"] = Experiment(
        "The gap along sampling",
        claim="at the last step SA-2's gap is about 1/2.5 of the base model's; more consecutive "
              "steps give a smaller gap",
        rows=(Row("base"), *(Row(f"SA-{k}", ("--sa-k", str(k), *lam)) for k in (2, 3, 4))),
        program=("gap.py", "-n", "4000", "--batch-size", "250",
                 *(("--steps", "50") if small else ())),
        figure="The gap is the distance between the network's run and one with the true noise, on "
               "the same images. The systematic part is the norm of the batch mean, minus the "
               "share that chance adds for so many images; its bands are 95 % intervals, edged "
               "like their lines, and darker where they overlap. \"Less than base's\" compares "
               "image by image: chance adds much the same to both, so this is known better. "
               "Right: theorem 1's weight τ_t of an error made at t" + (
                   ", if all 1,000 steps are taken: this run has 50." if small else "."),
        columns={label: lambda rows, key=key: rows[-1][key] for label, key in at_end.items()})
    found["sa-samples"] = Experiment(
        "Samples from the same noise", score="picture",
        figure="16 samples each, of the same seeds; the CSV has their mean grey level, 0 to 255.",
        claim="figures 2 and 3 show samples of both models; their text compares nothing",
        rows=plain[2:] + plain[:2], columns=calls(10, 20, 50))
    return found


def full(paper, *numbers):
    """Columns: DDPM in 1,000 calls; below the paper budget also what table 3 asks."""
    return FULL | ({} if paper else named(DDIM, *numbers))


def latent_run(paper):
    """A run on latents, with the autoencoder that it starts from."""
    code = ("papers.autoencoder", "train", "--image-size", "256" if paper else "32")
    if paper:  # LDM-4: 64×64×3 latents of a wider autoencoder. The length is ours
        code = (*code, "--width", "128", "--latent-channels", "3", "--batch-size", "16",
                "--images", "4000000", "--lr", "1e-4")
    return ("papers.latents", code, *LDM)


def etsdm_slopes(paper):
    """Of E-TSDM: the network's slope in t, and how far its prediction moves."""
    found = {}
    slope = dict(
        preset="ffhq256", program=("lipschitz.py", "-n", "64"),
        figure="K(t, t + 1) is how far the network's output moves if its time input is that of "
               "t + 1 instead of t, with the same x_t: mean of 64 images, and the middle 80 % of "
               "them. The lower axis is linear up to t = 120, then logarithmic; the other is "
               "logarithmic, with a 0.",
        columns={"largest below t = 100": lambda rows: max(r["mean"] for r in rows if r["t"] < 100),
                 "mean below t = 100": lambda rows: float(np.mean(
                     [r["mean"] for r in rows if r["t"] < 100])),
                 "K(500)": lambda rows: next(r["mean"] for r in rows if r["t"] == 500)})
    found["etsdm-figure1"] = Experiment(
        "The network's slope in t", rows=pair(), **slope,
        claim="K(t, t + 1) explodes near t = 0; under E-TSDM it is small there, and at the "
              "boundaries of parts comparable to the baseline's")
    for name, rows, claim in (
            ("continuous", pair("--continuous"), "figure A1: the same in continuous time"),
            ("quadratic", pair("--schedule", "quadratic"),
             "figure A2f: the same with the quadratic schedule"),
            ("v", pair(*V), "figure A5: the same for v-prediction"),
            ("ddpm-r", (*pair(), Row("DDPM-r", REGULARIZED)), "figure A7: the penalty lowers K"),
            ("cosine-shift", pair("--schedule", "cosine-shift"), "figure A7: K is large near t = 0 "
             "for cosine-shift too. (In our form of it dα/dt(0) = 0, and theorem 3.1 predicts no "
             "singularity)"),
            ("latents", pair(*latent_run(paper)), "figure A10: the same for latent diffusion")):
        found[f"etsdm-slope-{name}"] = Experiment(
            f"The network's slope in t: {name}", rows=rows, claim=claim, **slope)
    found["etsdm-figure2"] = Experiment(
        "How far the predicted x_0 moves when x_t, t = 100, is perturbed",
        claim="E-TSDM's prediction moves less", preset="ffhq256",
        rows=pair(), program=("lipschitz.py", "--perturb", "-n", "256"),
        figure="L2 norm over an image, pixels in [-1, 1]: mean of 256 images, and the middle 80 % "
               "of them.",
        columns={f"noise of std {x:g}": lambda rows, x=x: next(
            r["mean"] for r in rows if r["scale"] == x) for x in (0.05, 0.1, 0.2, 0.3)})
    return found


def etsdm_tables(paper):
    """Of E-TSDM: schedules, alternatives, data sets. Each is asked of its claim's own sampler, DDPM
    in 1,000 calls, first."""
    found = {}
    found["etsdm-table1"] = Experiment(
        "FFHQ, to be compared with other methods", **ASKS, columns=FULL,
        claim="E-TSDM's large network reaches the state of the art of diffusion models on FFHQ at "
              "256×256. We do not have the table's numbers",
        rows=pair() + (Row("E-TSDM, large", (*ETSDM, "--preset", "ffhq256-large"),
                          system="E-TSDM"),) * paper)
    modified = {"linear": 8.67, "quadratic": 17.48, "cosine": 26.84}
    by_schedule = {"linear": (9.50, 9.53), "quadratic": (13.79, 14.26), "cosine": (27.17, 25.65),
                   "cosine-shift": (14.51, 12.80), "zero-terminal-snr": (11.66, 10.89)}
    schedule = {name: ("--schedule", name) if name != "linear" else () for name in by_schedule}
    found["etsdm-figure3"] = Experiment(
        "E-TSDM and its alternatives", **ASKS, columns=full(paper, 20, 50), num_images=10_000,
        claim="E-TSDM does better than DDPM-r, Modified-NS and remaps of time (FID-10k, FFHQ; "
              "remaps have 9.43, 9.33, 83.71, 468.90 and others, whose strategies we cannot tell "
              "apart)",
        rows=(*pair(), Row("DDPM-r, 30", REGULARIZED),
              Row("DDPM-r, 300", ("papers.alternatives", "--lipschitz-reg", "300")),
              *(Row(f"{name}, {label}", run, system=f"{name}: Modified-NS")
                for name in modified for label, run in (
                    *((("plain", schedule[name]),) if name != "linear" else ()),
                    ("Modified-NS", ("--schedule", f"{name}-mns")))),
              *(Row(f"{name}: trained in {'f(t)' if train else 't'}, sampled in "
                    f"{'f(t)' if use else 't'}",
                    ("papers.alternatives", "--remap", name, *train), use)
                for name in REMAPS for train in ((), ("--train-times", "remap"))
                for use in ((), ("--spacing", "remap")))),
        paper={("plain", LARGE): 9.50, ("DDPM-r, 30", LARGE): 9.18,
               ("quadratic, plain", LARGE): 13.79, ("cosine, plain", LARGE): 27.17,
               **{(f"{name}, Modified-NS", LARGE): x for name, x in modified.items()}})
    found["etsdm-figure4"] = Experiment(
        "Data sets", **ASKS, rows=pair(), columns=full(paper, 10, 20, 50),
        claim="E-TSDM is better on FFHQ, CelebA-HQ, AFHQ-Cat, AFHQ-Wild, LSUN-Church, LSUN-Cat")
    # At t = T of zero-terminal-SNR nothing is left of x_0, and ε does not determine it. The paper
    # predicts ε all the same. Small networks need v there.
    schedule["zero-terminal-snr"] += ("--prediction", "eps") if paper else V
    kinds = {"discrete": (), "continuous": ("--continuous",)}
    found["etsdm-table2"] = Experiment(
        "Noise schedules" + ("" if paper else "; zero-terminal-snr predicts v, the others ε"),
        claim="E-TSDM improves every schedule, discrete and continuous (FID-10k, FFHQ)",
        **ASKS, num_images=10_000, columns=full(paper, 20, 50),
        rows=sum((pair(*schedule[name], *kinds[kind], name=f"{name}, {kind}")
                  for name, kind in product(by_schedule, kinds)), ()),
        paper={(f"{name}, {kind}, plain", LARGE): by_schedule[name][i]
               for name in by_schedule for i, kind in enumerate(kinds)})
    return found


def etsdm_choices(paper):
    """Of E-TSDM: fast samplers, the shared interval and its parts, samples."""
    found = {}
    fast = {**named(SOLVER[1], 20, 50), **named(SOLVER[0], 20, 50), **named(DDIM, 50, 200)}
    found["etsdm-table3"] = Experiment(
        "Fast samplers", **ASKS, rows=pair(), columns=fast,
        figure="DPM-Solver is singlestep, uniform in log SNR, and spends one of its calls on x_0 "
               "at t = 1.",
        claim="E-TSDM lowers the FID of DDIM and DPM-Solver by over 33 %, more for a higher order; "
              "the baseline's FID rises with the number of calls, E-TSDM's does not",
        paper={("plain", column): x for column, x in zip(
            fast, (21.91, 24.48, 22.21, 24.80, 21.80, 23.16), strict=True)})
    shares = [(100, n) for n in (1, 2, 5, 10, 20, 50, 100)] + [(20 * n, n) for n in (1, 3, 10, 20)]
    found["etsdm-figure5"] = Experiment(
        "How far sharing reaches, and in how many parts", **ASKS, columns=full(paper, 20, 50),
        claim="an interval of 100 in 5 parts is a good choice, and so is what lies around it; FID "
              "worsens for a large interval, and significantly for many parts",
        figure="[0, 100) in 100 parts shares nothing.",
        rows=(Row("none"), *(Row(f"[0, {t}), {n} part" + "s" * (n > 1), ETSDM if (t, n) == (100, 5)
                                 else (*ETSDM, "--etsdm-interval", str(t), "--etsdm-n", str(n)))
                             for t, n in shares)))
    found["etsdm-samples"] = Experiment(
        "Samples of both networks, from the same noise", **ASKS, rows=pair(), columns=FULL,
        score="picture", figure="16 samples each; the CSV has their mean grey level, 0 to 255.",
        claim="figures A13 to A17 show samples of E-TSDM on five data sets")
    return found


def etsdm_tasks(budget):
    """Of E-TSDM: super-resolution, v, latents, EDM."""
    small, paper, found = budget == "cpu", budget == "paper", {}
    # In minutes a network of ε on the linear schedule learns too little: cosine and v instead.
    easy = ("--schedule", "cosine", *V) if small else ()
    large = ("papers.superres", "train", "--factor", "4", "--image-size", "256" if paper else "32",
             *easy)
    enlarged = dict(ASKS, rows=pair(*large), columns=full(paper, 1, 5, 20))
    bicubic = Row("bicubic", large, part="-bicubic")
    found["etsdm-sr"] = Experiment(
        "Super-resolution", **enlarged | dict(rows=pair(*large) + (bicubic,)), score="psnr",
        claim="PSNR 24.64 → 25.61 dB (FFHQ, 64 → 256)",
        figure="Small images are means over blocks; PSNR is the mean over images of each one's.",
        paper={("plain", LARGE): 24.64, ("E-TSDM", LARGE): 25.61})
    found["etsdm-colour"] = Experiment(
        "Super-resolution: how far colours drift", **enlarged, score="colour",
        claim="the baseline's enlarged images have a colour bias (section 5.5)",
        figure="For each image and channel the mean over pixels of result minus original, without "
               "its sign, in levels of 0 to 255; the mean of these.")
    found["etsdm-sr-pictures"] = Experiment(
        "Super-resolution: pictures", **enlarged, score="picture",
        claim="figure A12 shows enlarged images of both networks",
        figure="In groups of three: bicubic, result, original.")
    found["etsdm-v"] = Experiment(
        "v-prediction", **ASKS, num_images=10_000, rows=pair(*V), columns=full(paper, 10, 20, 50),
        claim="v-prediction has the same singularity, and E-TSDM helps it too (table A2 prints "
              "FID-10k of 10.85 and 18.40; of which networks, we cannot tell)")
    found["etsdm-ldm"] = Experiment(
        "Latent diffusion, LDM's quadratic schedule", preset="ffhq256",
        rows=pair(*latent_run(paper)), axis="sampler, network calls",
        columns=named(DDIM, 200) if paper else named(DDIM, 20, 50, 200),
        claim="FID-50k 4.98 → 4.61 (LDM-4, FFHQ)",
        figure="The autoencoder has a KL penalty and no discriminator, not LDM's VQ. E-TSDM has 5 "
               "parts; the paper may have another number.",
        paper={("plain", "DDIM, 200"): 4.98, ("E-TSDM", "DDIM, 200"): 4.61})
    edm = ("--schedule", "edm", "--prediction", "edm")
    if paper:  # EDM's recipe, with our network, no augmentation and a constant decay of the average
        edm = (*edm, "--batch-size", "512", "--lr", "1e-3", "--warmup", "19531", "--images",
               "200000000", "--dropout", "0.13", "--ema", "0.9993", "--grad-clip", "0",
               "--adam-eps", "1e-8")
    found["etsdm-edm"] = Experiment(
        "EDM", rows=pair(*edm, flags=("--sampler", "heun")), columns=calls(19, 35),
        claim="CIFAR-10, 35 calls: 1.904 → 1.797",
        figure="E-TSDM shares below t = 100 of EDM's grid: σ < 0.0165, two of Heun's 18 steps in "
               "35 calls. The paper does not say what it shared." + (
                   " The network is SA-DPM's, without EDM's augmentation." if paper else ""),
        paper={("plain", "35"): 1.904, ("E-TSDM", "35"): 1.797})
    return found


# ------------------------------------------------------------------ the program

@dataclass
class ExperimentsConfig:
    name: str = flag("", "list, all, or " + ", ".join(declare("cpu")), positional="NAME",
                     group="experiment")
    budget: str = flag("cpu", "cpu: 16x16, a tiny network; gpu: the cifar10 preset, 20,000 steps; "
                       "paper: the papers' own", choices=tuple(BUDGETS))
    rows: tuple[str, ...] = flag((), "only rows whose name, or a part of it after a comma, begins "
                                 "so; the page names the rest", nargs="+", metavar="WORD")
    columns: tuple[str, ...] = flag((), "the same for columns", nargs="+", metavar="WORD")
    seeds: int = flag(1, "training runs of each kind")
    data: tuple[str, ...] = flag((), "images, as train.py takes them; several sets are done in "
                                 "turn", nargs="+", shown="shapes; gpu and paper: cifar10")
    channels: int = flag(3, "1: true gray", choices=(1, 3))
    image_size: int | None = flag(None, "cpu: side of the images in pixels", above=0, shown="16")
    preset: str | None = flag(None, "paper: the network and its recipe", shown="cifar10 for SA-DPM "
                              "and EDM, else ffhq256",
                              choices=(*(p for p in unet.PRESETS if p != "tiny"), *SETS))
    sa_weight: float | None = flag(None, "paper: the weight λ of SA-k; sa-table4 has its own",
                                   shown="1")
    test: str | None = flag(None, "super-resolution: originals to enlarge", metavar="DATA",
                            shown="those of --data")
    out: Path = flag(RESULTS, "where the page goes; it replaces one of the same name",
                     metavar="DIR")
    inception: Path | None = flag(None, "Inception's weights", shown="from the cache folder")
    features: Path | None = flag(None, "your own network for the distances; sets without labels "
                                 "need it, or Inception's weights")
    precision: str = flag("fp32", "of sampling; bf16 also compiles the networks, and is twice as "
                          "fast on CPUs with AMX", choices=("fp32", "bf16"))
    workers: int = flag(0, "commands at a time", shown="one per GPU or core")
    page: bool = flag(False, "run nothing: write the page of the numbers that there are")
    dry_run: bool = flag(False, "print the commands that are left, and stop")

    prog: ClassVar[str] = "papers.experiments"
    usage: ClassVar[str] = "python -m papers.experiments NAME [flags]"
    description: ClassVar[str] = """\
Repeat a table or figure of the two papers: train, measure, write results/NAME.md, .csv and .png.
The same command goes on. Runs are trained under runs/ and shared between experiments;
results/numbers.csv keeps each number next to its command."""
    examples: ClassVar[str] = """\
  python -m papers.experiments list
      all names, and their costs
  python -m papers.experiments sa-figure1
      seconds; list prints what the others take
  python -m papers.experiments sa-table1 --seeds 3 --data fashion-mnist --channels 1
  python -m papers.experiments etsdm-figure4 --data shapes fashion-mnist photos/
      several data sets, one table each
  python -m papers.experiments etsdm-table2 --rows linear cosine, --seeds 3
      some rows only
  python -m papers.experiments all --budget gpu --data cifar10
  python -m papers.experiments etsdm-table2 --budget paper --data ffhq256/ --dry-run
      the papers' own settings: the commands, and an estimate of the GPU hours
  python -m papers.experiments sa-table3 --budget paper --data hq/ --preset celebahq256 \
      --sa-weight 0.1
      as SA-DPM's authors train on CelebA-HQ (--preset celeba64 for CelebA 64; ffhq64 with
      --sa-weight 0.5, afhq64 with 0.2)"""

    def check(self):
        paper = self.budget == "paper"
        names = ("list", "all", *declare("cpu"))
        if self.name not in names:
            raise ValueError((f"there is no experiment {self.name}" if self.name else
                              "NAME is missing") + f": choose from {' '.join(names)}")
        if self.seeds < 1 or self.workers < 0:
            raise ValueError("--seeds must be at least 1, and --workers not negative")
        if self.features and self.inception:
            raise ValueError("--features replaces Inception: give it or --inception, not both")
        if self.test and self.name not in (*TESTED, "all"):
            raise ValueError(f"--test names the images of {', '.join(TESTED)}: leave it out")
        if self.image_size and self.budget != "cpu":
            raise ValueError("--image-size goes with --budget cpu only: presets have a size")
        if not paper and (self.preset or self.sa_weight is not None):
            raise ValueError("--preset and --sa-weight go with --budget paper only")
        if self.sa_weight is not None and not self.sa_weight > 0:
            raise ValueError("--sa-weight must be above 0: 0 is the base model")
        if paper and self.name == "all":
            raise ValueError("--budget paper: images and networks differ. Name one experiment")
        for name in ("features", "inception"):
            if (path := getattr(self, name)) and not path.is_file():
                raise ValueError(f"--{name} {path}: no such file")
        if not self.data and paper and self.name != "list" and (
                self.preset or declare("paper")[self.name].preset) != "cifar10":
            raise ValueError(f"--data: at the paper budget {self.name} needs images of the size of "
                             "its preset. Name a folder or zip")
        self.data = self.data or ("shapes" if self.budget == "cpu" else "cifar10",)
        if len({data_name(data) for data in self.data}) < len(self.data):
            raise ValueError("--data: runs are named after the last part of their set's path, so "
                             "each set needs a different one")
        if self.name in names[2:]:
            e = declare(self.budget)[self.name]
            for flag_, useless in (
                    ("image_size", own_side(e)), ("features", e.score == "is"),
                    ("sa_weight", self.name.startswith(("etsdm", "sa-table4"))),
                    ("rows", e.program), ("columns", e.program)):
                if useless and getattr(self, flag_):
                    raise ValueError(f"{flag_name(flag_)} has no effect here: leave it out")
            for flag_, labels in (("rows", [row.label for row in e.rows]), ("columns", e.columns)):
                for word in getattr(self, flag_):
                    if not any(begins_with(label, [word]) for label in labels):
                        raise ValueError(f"--{flag_} {word}: choose from {'; '.join(labels)}")


def plan_all(names, experiments, config):
    """-> ({name: its Plans}, {name of a job: Job})."""
    todo, numbers, found = {}, Numbers(RESULTS / "numbers.csv"), {}
    for name in names:
        found[name] = [Plan(name, experiments[name], config, data, seed, todo, numbers, CACHE)
                       for data in config.data for seed in range(config.seeds)]
        for plan in found[name]:
            plan.cells  # noqa: B018  (this makes the jobs)
    return found, todo


def measured(plans):
    """Whether each number of these plans is known."""
    return [key in plan.numbers.rows for plan in plans for key in plan.cells.values()]


def hours(todo, budget):
    """Of one GPU, or of one core, for jobs that are not done."""
    passes = sum(job.cost for job in todo)
    if budget == "cpu":
        return passes * SECONDS / 3600
    return passes * forward_flops("tiny") / 4 / TFLOPS / 3600e12


def print_list(config):
    """All names, and what each would cost from the start."""
    print(f"{'':14s}  cpu, minutes on 2 cores   gpu, hours   paper, GPU hours at {TFLOPS} TFLOP/s")
    for name, e in declare("cpu").items():
        cost = []
        for budget in BUDGETS:
            _, todo = plan_all([name], declare(budget), dataclasses.replace(config, budget=budget))
            cost.append(hours(todo.values(), budget))
        print(f"{name:14s}  {cost[0] * 30:8.0f}  {cost[1]:8.1f} {cost[2]:8.0f}   {e.title}")


def main(argv=None):
    config = parse_into(ExperimentsConfig, argv)
    if config.name == "list":
        return print_list(config)
    experiments = declare(config.budget, config.sa_weight)
    names = list(experiments) if config.name == "all" else [config.name]
    found, todo = plan_all(names, experiments, config)
    if config.page:
        for name in names:
            if config.name != "all" or any(measured(found[name])):
                pages.write_page(name, experiments[name], found[name], config)
        return
    left = jobs.needed(list(todo.values()))
    if config.dry_run:
        for job in left:
            print(*map(typed, job.commands), sep="\n")
    estimate = hours(left, config.budget)
    print(f"{len(left)} of {len(todo)} commands are left, about "
          f"{estimate:,.{0 if estimate >= 10 else 1}f} hours of one "
          + ("core" if config.budget == "cpu" else f"GPU at {TFLOPS} TFLOP/s"))
    if config.budget != "cpu" and any("papers.classifier" in job.commands[0] for job in left):
        print(f"Inception's weights are not in {readers.cache_path(inception.NAME)}: the distances "
              "will be in a small classifier's features, not FID. metrics.py fetches the weights")
    if config.dry_run:
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    complete = False
    try:
        complete = jobs.run_all(list(todo.values()),
                                jobs.Machine(config.workers, logs=CACHE / "logs"))
    finally:  # what is complete gets its page, even if the rest failed
        for name in names:
            if (known := measured(found[name])) and all(known):
                pages.write_page(name, experiments[name], found[name], config)
    if not complete:
        print("stopped: run the same command to go on")


if __name__ == "__main__":
    run_main(main)
