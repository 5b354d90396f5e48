r"""Every table and figure of SA-DPM and E-TSDM, each by one command, at a budget one can afford.

    python experiments.py list                                # what there is, and what it costs
    python experiments.py sa-table1                           # cpu: about half an hour on two cores
    python experiments.py sa-table1 --seeds 3 --data fashion-mnist --channels 1
    python experiments.py etsdm-table2 --budget gpu --data cifar10
    python experiments.py sa-table1 --budget paper --dry-run  # the commands it would run

An experiment is a declaration, in declare() below: which runs to train, what to ask of each, what
the paper says. plans.py turns it into commands of the other programs, which you could type
yourself; jobs.py runs those that are missing, several at a time; and pages.py makes of the numbers
results/NAME.md, .csv and .png. The same command again goes on where it stopped. Runs are shared
between experiments. A number is kept in results/numbers.csv beside the command that made it: delete
its row, or the file, to have it measured again.

What this file does not do: choose the best of several runs, or call a distance FID that is none.
Without Inception's weights (metrics.py fetches them) the features are those of a small classifier
of the same set, which it trains, and the table's title says so.

A plan is one experiment on one data set, with one seed: a table of rows × columns.
"""

import runtime  # isort: skip  (before torch: it sets OpenMP's spinning)

import argparse
import shlex
from itertools import product
from pathlib import Path

import numpy as np

import inception
import jobs
import pages
import readers
import settings
from plans import BUDGETS, Experiment, Numbers, Plan, Row, operations, stem

RESULTS = Path("results")
KEPT = RESULTS / "cache"  # features, statistics, logs, pictures: what can be made again
SECONDS = 4e-4  # a forward pass of `tiny` for an image of 16×16 took, on one core of an AMD EPYC
TFLOPS = 100  # what a GPU is assumed to do per second: a third of an A100's rate in bf16


# ------------------------------------------------------------------ the experiments

ETSDM = ("--etsdm",)


def calls(*numbers):
    """Columns: numbers of network calls."""
    return {str(n): ("--nfe", str(n)) for n in numbers}


def named(sampler, *numbers):
    """Columns: a sampler, by its flags, and numbers of calls."""
    title, *flags = sampler
    return {f"{title}, {n}": (*flags, "--nfe", str(n)) for n in numbers}


DDIM, DDPM = ("DDIM", "--sampler", "ddim"), ("DDPM", "--sampler", "ddpm")
SOLVER = [(f"DPM-Solver-{k}", "--sampler", "dpm-solver", "--order", str(k), "--spacing", "logsnr")
          for k in (2, 3)]


def declare(budget, weight=None):
    """{name: Experiment}. The cpu budget leaves out the longest columns. weight: SA's λ, if it is
    not to be train.py's default."""
    small, paper = budget == "cpu", budget == "paper"
    own = () if weight is None else ("--sa-weight", f"{weight:g}")
    both = {"base": (), "SA-2": ("--sa-k", "2", *own)}
    nfe = (10, 20, 50, 100) if small else (10, 25, 50, 100, 200, 1000)
    few = calls(20, 50)
    with_head = {"": lambda run: run, "A-": lambda run: run,
                 "NPR-": lambda run: ("--head", "npr", "--from", run),
                 "SN-": lambda run: ("--head", "sn", "--from", run)}
    variance = {"": (), "A-": ("--variance", "analytic"), "NPR-": ("--variance", "npr"),
                "SN-": ("--variance", "sn")}
    remaps = ("sqrt", "inverse-sigmoid")
    found = {}
    found["sa-table1"] = Experiment(
        "SA-2 and four reverse variances over network calls", steps=4000, split=("DDPM", "DDIM"),
        claim="SA-2 improves the FID of every system, most in few calls; Analytic-, NPR- and "
              "SN-DPM add to it",
        rows=tuple(Row(f"{v}{s[0]}, {name}", with_head[v](run), (*s[1:], *variance[v]))
                   for s in (DDPM, DDIM) for v in variance for name, run in both.items()),
        columns=calls(*nfe))
    found["sa-table2"] = Experiment(
        "SA-2 over network calls: the other score", steps=4000, score="is",
        claim="SA-2 improves the Inception Score too",
        rows=tuple(Row(f"{s[0]}, {name}", run, s[1:])
                   for s in (DDPM, DDIM) for name, run in both.items()),
        columns=calls(*nfe))
    found["sa-table3"] = Experiment(
        "SA-2 over network calls, on several data sets", steps=4000,
        claim="SA-2 is better for every number of steps, with DDPM and DDIM, on every data set",
        rows=found["sa-table2"].rows, columns=calls(10, 50, 200) if small else calls(*nfe))
    found["sa-table4"] = Experiment(
        "k consecutive steps × weight λ of the loss", steps=4000, axis="sampler, network calls",
        claim="SA-k improves on the plain model (k = 1); its ablation has k = 2 to 4 and several "
              "weights λ, on CIFAR-10",
        rows=(Row("k = 1"), *(
            Row(f"k = {k}, λ = {w:g}", ("--sa-k", str(k)) if w == 1 else
                ("--sa-k", str(k), "--sa-weight", str(w)))
            for k in (2, 3, 4) for w in ((0.1, 1) if small else (0.1, 0.5, 1))
            if not (small and k == 4 and w < 1))),
        columns={**named(DDPM, 10, 50), **named(DDIM, 10, 50)})
    found["sa-figure1"] = Experiment(
        "Errors of one size that add up, or cancel",
        claim="with equal errors at every step, one trajectory ends far from the true one, and "
              "another beside it",
        rows=tuple(Row(name, None) for name in ("errors add up", "errors cancel")),
        program=("gap.py", "--illustrate"),
        figure="One dimension, two bell curves, the exact network; errors of ±0.15 are put in by "
               "hand.",
        columns={"distance at the end": lambda rows: rows[-1]["gap"]})
    at_end = {"norm of the batch mean": "mean", "systematic part": "systematic",
              "its 95 %: from": "low", "to": "high", "less than base's": "less",
              "this 95 %: from": "less_low", "to:": "less_high", "mean of the norms": "norm"}
    found["sa-figure4"] = Experiment(
        "The gap along sampling", steps=4000,
        claim="at the last step SA-2's gap is about 1/2.5 of the base model's; SA-3 and SA-4 are "
              "beside them",
        rows=(Row("base"), *(Row(f"SA-{k}", ("--sa-k", str(k), *own)) for k in (2, 3, 4))),
        program=("gap.py", "-n", "4000", "--batch-size", "250",
                 *(("--steps", "50") if small else ())),
        figure="The gap is the distance between the network's run and one with the true noise, on "
               "the same images. The systematic part is the norm of the batch mean, less what "
               "chance leaves in it of so many images; its bands, 95 %, have edges like their "
               "lines, and overlap where they are darker. \"Less than base's\" compares image by "
               "image: chance leaves much the same in both, so that this is known better. On the "
               "right, theorem 1's weight τ_t of an error made at t.",
        columns={label: lambda rows, key=key: rows[-1][key] for label, key in at_end.items()})
    found["sa-samples"] = Experiment(
        "Samples from the same noise", steps=4000, score="picture",
        figure="16 samples each, of the same seeds; the CSV has their mean grey, of 255.",
        claim="SA-2's pictures are sharper and more complete, most in few calls",
        rows=tuple(Row(f"{s[0]}, {name}", run, s[1:])
                   for s in (DDIM, DDPM) for name, run in both.items()),
        columns=calls(10, 20, 50))
    pair = (Row("plain"), Row("E-TSDM", ETSDM))
    found["etsdm-figure1"] = Experiment(
        "The network's slope in t", steps=4000, preset="ffhq256",
        claim="K(t, t + 1) explodes near t = 0; under E-TSDM it is small there",
        rows=pair, program=("lipschitz.py", "-n", "64"),
        figure="K(t, t + 1) is how far the network's answer moves if it is told t + 1 instead of "
               "t, x_t held: mean of 64 images, and the middle 80 % of them. The lower axis is "
               "linear up to t = 120, then logarithmic; the other is logarithmic, with a 0.",
        columns={"largest below t = 100": lambda rows: max(r["mean"] for r in rows if r["t"] < 100),
                 "mean below t = 100": lambda rows: float(np.mean(
                     [r["mean"] for r in rows if r["t"] < 100])),
                 "K(500)": lambda rows: next(r["mean"] for r in rows if r["t"] == 500)})
    found["etsdm-figure2"] = Experiment(
        "How far the predicted x_0 moves when x_t, t = 100, is perturbed", steps=4000,
        claim="E-TSDM's prediction moves less", preset="ffhq256",
        rows=pair, program=("lipschitz.py", "--perturb", "-n", "256"),
        figure="L2 norm over an image, pixels in [-1, 1]: mean of 256 images, and the middle 80 % "
               "of them.",
        columns={f"noise of std {x:g}": lambda rows, x=x: next(
            r["mean"] for r in rows if r["scale"] == x) for x in (0.05, 0.1, 0.2, 0.3)})
    found["etsdm-figure3"] = Experiment(
        "E-TSDM and its alternatives", preset="ffhq256",
        claim="E-TSDM does better than DDPM-r, Modified-NS and remaps of time",
        rows=(*pair, Row("DDPM-r, 30", ("--lipschitz-reg", "30")),
              Row("DDPM-r, 300", ("--lipschitz-reg", "300")),
              Row("Modified-NS", ("--schedule", "linear-mns")),
              *(Row(f"{name}: trained in {'f(t)' if train else 't'}, sampled in "
                    f"{'f(t)' if use else 't'}", ("--remap", name, *train), use)
                for name in remaps for train in ((), ("--train-times", "remap"))
                for use in ((), ("--spacing", "remap")))),
        columns=few)
    found["etsdm-figure4"] = Experiment(
        "Data sets", preset="ffhq256", rows=pair, columns=calls(10, 20, 50),
        claim="E-TSDM is better on FFHQ, CelebA-HQ, AFHQ-Cat, AFHQ-Wild, LSUN-Church, LSUN-Cat")
    baselines = {"linear": (9.50, 9.53), "quadratic": (13.79, 14.26), "cosine": (27.17, 25.65),
                 "cosine-shift": (14.51, 12.80), "zero-terminal-snr": (11.66, 10.89)}
    # At t = T of zero-terminal-SNR nothing is left of x_0, and ε says nothing of it. The paper
    # predicts ε all the same; small networks need v there, and a clip for young ones.
    chosen = {name: ("--schedule", name) for name in baselines} | {
        "linear": (), "zero-terminal-snr": ("--schedule", "zero-terminal-snr", "--prediction",
                                            "eps" if paper else "v")}
    kinds = {"discrete": (), "continuous": ("--continuous",)}
    table2 = [(f"{name}, {kind}, {row.label}", name, kind, row)
              for name, kind, row in product(baselines, kinds, pair)]
    found["etsdm-table2"] = Experiment(
        "Noise schedules" + ("" if paper else "; zero-terminal-snr predicts v, the others ε"),
        claim="E-TSDM improves every schedule, discrete and continuous. Its plain networks' "
              "FID-10k, FFHQ at 256×256, are in the last column",
        preset="ffhq256", many=10_000,
        rows=tuple(Row(label, (*chosen[name], *kinds[kind], *row.run),
                       () if paper else ("--clip", "on"))
                   for label, name, kind, row in table2),
        columns=few, paper={label: f"{baselines[name][kind == 'continuous']:.2f}"
                            for label, name, kind, row in table2 if row.label == "plain"})
    found["etsdm-table3"] = Experiment(
        "Fast samplers", steps=4000, preset="ffhq256", axis="sampler, network calls",
        claim="E-TSDM lowers the FID of DDIM and DPM-Solver by over 33 %", rows=pair,
        columns={**named(SOLVER[1], 20, 50), **named(SOLVER[0], 20, 50), **named(DDIM, 50, 200)})
    shares = [(100, n) for n in (1, 2, 5, 10, 20)] + [(20 * n, n) for n in (1, 3, 10, 20)]
    found["etsdm-figure5"] = Experiment(
        "How far sharing reaches, and in how many parts", preset="ffhq256",
        claim="an interval of 100 in 5 parts is a good choice, and so is what lies around it",
        rows=(Row("none"), *(Row(f"[0, {t}), {n} part" + "s" * (n > 1), ETSDM if (t, n) == (100, 5)
                                 else (*ETSDM, "--etsdm-interval", str(t), "--etsdm-n", str(n)))
                             for t, n in shares)),
        columns=few)
    # One call from pure noise must give a picture; in minutes that takes v-prediction.
    fast = () if paper else ("--schedule", "cosine", "--prediction", "v")
    sr = ("--task", "sr", "--factor", "4", "--image-size", "256" if paper else "32", *fast)
    found["etsdm-sr"] = Experiment(
        "Super-resolution", preset="ffhq256", score="psnr", rows=(
            Row("plain", sr), Row("E-TSDM", (*sr, *ETSDM)), Row("bicubic", sr, part="-bicubic")),
        claim="PSNR 24.64 → 25.61 dB (FFHQ, 64 → 256)",
        columns=calls(20, 50) if paper else calls(1, 5, 20),
        paper={"plain": "24.64", "E-TSDM": "25.61"})
    v = ("--prediction", "v")
    found["etsdm-v"] = Experiment(
        "v-prediction", preset="ffhq256", columns=calls(10, 20, 50),
        rows=(Row("plain", v), Row("E-TSDM", (*v, *ETSDM))),
        claim="v-prediction has the same singularity, and E-TSDM helps it too")
    quick = fast if small else ()
    code = ("--task", "autoencoder", "--image-size", "256" if paper else "32")
    found["etsdm-ldm"] = Experiment(
        "Latent diffusion", preset="ffhq256", columns=calls(20, 50), steps=4000,
        rows=(Row("plain", ("--latent", code, *quick)),
              Row("E-TSDM", ("--latent", code, *ETSDM, *quick))),
        claim="FID-50k 4.98 → 4.61", paper={"plain": "4.98", "E-TSDM": "4.61"})
    edm = ("--schedule", "edm", "--prediction", "edm")
    if paper:  # EDM's recipe; but our network, no augmentation, and a constant decay of the average
        edm = (*edm, "--batch-size", "512", "--lr", "1e-3", "--warmup", "19531", "--images",
               "200000000", "--dropout", "0.13", "--ema", "0.9993", "--grad-clip", "0")
    found["etsdm-edm"] = Experiment(
        "EDM", rows=(Row("plain", edm, ("--sampler", "heun")),
                     Row("E-TSDM", (*edm, *ETSDM), ("--sampler", "heun"))),
        claim="CIFAR-10, 35 calls: 1.904 → 1.797", columns=calls(19, 35),
        paper={"plain": "1.904", "E-TSDM": "1.797"})
    return found


# ------------------------------------------------------------------ the program

def hours(todo, budget):
    """Of one GPU, or of one core, for jobs that are not done."""
    passes = sum(job.cost for job in todo)
    if budget == "cpu":
        return passes * SECONDS / 3600
    return passes * operations("tiny") / 4 / TFLOPS / 3600e12


def plan_all(names, experiments, args):
    """-> ({name: its Plans}, {name of a job: Job})."""
    todo, numbers, found = {}, Numbers(RESULTS / "numbers.csv"), {}
    for name in names:
        found[name] = [Plan(name, experiments[name], args, data, seed, todo, numbers, KEPT)
                       for data in args.data for seed in range(args.seeds)]
        for plan in found[name]:
            plan.cells  # noqa: B018  (this makes the jobs)
    return found, todo


def show(args):
    """The list: what there is, and what each would cost from nothing."""
    print(f"{'':14s}  cpu, minutes on 2 cores   gpu, hours   paper, GPU hours at {TFLOPS} TFLOP/s")
    for name, e in declare("cpu").items():
        cost = []
        for budget in BUDGETS:
            args.budget = budget
            _, todo = plan_all([name], declare(budget), args)
            cost.append(hours(todo.values(), budget))
        print(f"{name:14s}  {cost[0] * 30:8.0f}  {cost[1]:8.1f} {cost[2]:8.0f}   {e.title}")


def parse(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="experiments.py", usage="python experiments.py NAME [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Repeat a table or figure of the two papers: train, measure, write "
                    "results/NAME.md, .csv and .png.\nThe same command again goes on.",
        epilog="""examples
  python experiments.py list
      all names, and what they cost
  python experiments.py sa-figure1
      seconds; the others take about half an hour on two cores
  python experiments.py sa-table1 --seeds 3 --data fashion-mnist --channels 1
  python experiments.py etsdm-figure4 --data shapes fashion-mnist photos/
      several data sets, one table each
  python experiments.py all --budget gpu --data cifar10
  python experiments.py etsdm-table2 --budget paper --data ffhq256/ --dry-run
      the papers' own settings: the commands, and an estimate of the GPU hours
  python experiments.py sa-table3 --budget paper --data hq/ --preset celebahq256 --sa-weight 0.1
      as SA-DPM's authors train on CelebA-HQ (--preset celeba64 for CelebA 64; there with
      --sa-weight 0.5 for FFHQ 64, 0.2 for AFHQ 64)

Runs are trained under runs/, and shared between experiments; results/numbers.csv keeps every number
beside its command.""")
    add = parser.add_argument
    add("name", metavar="NAME", choices=["list", "all", *declare("cpu")],
        help="list, all, or " + ", ".join(declare("cpu")))
    add("--budget", default="cpu", choices=list(BUDGETS), help="cpu: 16x16, a tiny network, "
        "minutes; gpu: the cifar10 preset, 20,000 steps; paper: the papers' own (default: cpu)")
    add("--seeds", type=int, default=1, help="training runs of each kind (default: 1)")
    add("--data", nargs="+", help="images, as train.py takes them; several sets are done in turn "
        "(default: shapes; gpu and paper: cifar10)")
    add("--channels", type=int, choices=(1, 3), help="1: true gray (default: 3)")
    add("--preset", choices=[p for p in settings.unet.PRESETS if p != "tiny"], help="paper: the "
        "network and its recipe (default: cifar10 for SA-DPM and EDM, else ffhq256)")
    add("--sa-weight", type=float, help="paper: λ of SA-k (default: 1; sa-table4 has its own)")
    add("--test", metavar="DATA", help="etsdm-sr: originals, to shrink and enlarge "
        "(default: those of --data)")
    add("--out", metavar="DIR", type=Path, default=RESULTS, help="where the page goes; one of the "
        "same name is replaced (default: results)")
    add("--inception", metavar="PATH", help="Inception's weights (default: from the cache folder)")
    add("--features", metavar="FILE", help="a network of your own for the distances; sets "
        "without labels need it, or Inception's weights")
    add("--workers", type=int, default=0, help="commands at a time (default: one per GPU or core)")
    add("--dry-run", action="store_true", help="print the commands that are left, and stop")
    args = parser.parse_args(argv)
    if args.seeds < 1 or args.workers < 0:
        raise ValueError("--seeds must be at least 1, and --workers not negative")
    if args.features and args.inception:
        raise ValueError("--features replaces Inception: give it or --inception, not both")
    if args.test and args.name not in ("etsdm-sr", "all"):
        raise ValueError("--test names the images of etsdm-sr: it has no use here")
    if args.budget != "paper" and (args.preset or args.sa_weight is not None):
        raise ValueError("--preset and --sa-weight go with --budget paper: the other budgets have "
                         "one network, and λ 1")
    if args.sa_weight is not None and not args.sa_weight > 0:
        raise ValueError("--sa-weight must be above 0: the base model beside SA-2 has none")
    if args.budget == "paper" and args.name == "all":
        raise ValueError("at the paper budget each experiment has images and a network of its own: "
                         "name one experiment (see list)")
    for flag in ("features", "inception"):
        if (path := getattr(args, flag)) and not Path(path).is_file():
            raise ValueError(f"--{flag} {path}: there is no such file")
    if not args.data and args.budget == "paper" and args.name != "list" and (
            args.preset or declare("paper")[args.name].preset) != "cifar10":
        raise ValueError(f"{args.name} at the paper budget is about images of its own: "
                         "name them with --data, a folder or zip")
    args.data = args.data or ["shapes" if args.budget == "cpu" else "cifar10"]
    if len({stem(data) for data in args.data}) < len(args.data):
        raise ValueError("--data: runs are called after their data, so each set needs a name of "
                         "its own")
    return args


def main(argv=None):
    args = parse(argv)
    if args.name == "list":
        return show(args)
    experiments = declare(args.budget, args.sa_weight)
    names = list(experiments) if args.name == "all" else [args.name]
    found, todo = plan_all(names, experiments, args)
    left = jobs.needed(list(todo.values()))
    if args.dry_run:
        for job in left:
            print(*(shlex.join(["python", *words]) for words in job.commands), sep="\n")
    estimate = hours(left, args.budget)
    print(f"{len(left)} of {len(todo)} commands are left, about "
          f"{estimate:,.{0 if estimate >= 10 else 1}f} hours of one "
          + ("core" if args.budget == "cpu" else f"GPU at {TFLOPS} TFLOP/s"))
    if "classifier.py" in (job.commands[0][0] for job in left) and args.budget != "cpu":
        print(f"Inception's weights are not in {readers.cache_path(inception.NAME)}: the distances "
              "will be in a small classifier's features, no FID. metrics.py fetches them")
    if args.dry_run:
        return
    KEPT.mkdir(parents=True, exist_ok=True)
    whole = False
    try:
        whole = jobs.run_all(list(todo.values()), jobs.Machine(args.workers, logs=KEPT / "logs"))
    finally:  # what is complete has its page, whatever became of the rest
        for name in names:
            if all(key in plan.numbers.rows for plan in found[name] for key in plan.cells.values()):
                pages.write(name, experiments[name], found[name], args)
    if not whole:
        print("stopped: run the same command to go on")


if __name__ == "__main__":
    runtime.run_program(main)
