r"""How fast this code is: ratios of two ways to do the same work, measured side by side.

    python -m benchmarks train                # a training step, and the same net written plainly
    python -m benchmarks sa sample            # SA-k's step; the cost of samplers
    python -m benchmarks all                  # all parts, 40 minutes on 2 CPU cores

An absolute time describes a machine more than a program. So each number is a ratio: both sides run
in the same minutes, taking turns, each in its own process. The first turns are thrown away;
medians of the others count. "Plain" is defined in plain.py. If the library diffusers is installed,
its networks and schedulers are measured too.

Not here: judging the results, or the quality of images (metrics.py). But the part `precision`
trains the same run in float32 and bf16, and compares losses and pictures.

B images of a batch, k consecutive steps (SA-DPM); in GFLOP/s a multiplication and an addition count
as two.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import contextlib
import copy
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

import data
import metrics
import samplers
import schedules
import train
import unet
from benchmarks import plain
from benchmarks.plain import DEVICE
from benchmarks.worker import ROOT, Side, compare
from config import Config
from denoiser import Denoiser, load_run
from papers.alternatives import AlternativeConfig, AlternativeObjective
from support import distributed, files, inception
from support.cli import flag, flag_name, parse_into
from support.memory import step_bytes
from support.precision import autocast_dtype, for_inference, for_training, place, set_tf32
from support.programs import run_main

our_side = partial(Side, "benchmarks.__main__")
plain_side = partial(Side, "benchmarks.plain", tuned=False)


class Report:
    """Rows of a table, printed as they come, and kept for the JSON file."""

    def __init__(self):
        self.rows, self.machine = [], machine()

    def part(self, name, words):
        """Begin a part of the table."""
        self.name = name
        print(f"\n{name}: {words}", flush=True)

    def add(self, what, seconds, against=None, unit=1.0, note="", **more):
        """One row: seconds of this way and of the other, whose ratio is the result; per `unit`."""
        ratio, shown = against / seconds if against else None, seconds / unit * 1e6
        factor, name = next((f, n) for f, n in ((1e6, "s"), (1e3, "ms"), (1, "µs"))
                            if shown >= f or f == 1)
        print(f"  {what:58}{shown / factor:9.2f} {name:2}"
              + (f"{ratio:9.2f} x" if ratio else " " * 11) + f"  {note}".rstrip(), flush=True)
        self.rows.append(dict(part=self.name, what=what, seconds=seconds / unit, ratio=ratio,
                              note=note, **more))


# ------------------------------------------------------------------ the machine

def work_sizes(device):
    """Rows of a square matrix, images of a batch: enough work for the device. On an H100, a product
    of 2,048 rows takes 20 µs, as long as starting it and waiting for it."""
    return (8192, 256) if device.type == "cuda" else (2048, 16)


def machine():
    """What the hardware gives: no ratio below can be better than these GFLOP/s let it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        name = next((line.split(": ")[1] for line in text.splitlines()
                     if line.startswith("model name")), name)
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    found = dict(device=name, threads=torch.get_num_threads(), torch=torch.__version__)
    n, images = work_sizes(DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2, n, n, device=DEVICE).to(dtype)
        # the 3x3 convolution that most of the cifar10 network consists of
        layer = torch.nn.Conv2d(256, 256, 3, padding=1).to(DEVICE, dtype).requires_grad_(False)
        x = torch.randn(images, 256, 16, 16, device=DEVICE).to(dtype)
        for what, work, amount in (("product", partial(torch.mm, a, b), 2 * n**3),
                                   ("convolution", partial(layer, x), 2 * x.numel() * 256 * 9)):
            timer = Timer("work()", globals=dict(work=work), num_threads=found["threads"])
            seconds = timer.blocked_autorange(min_run_time=0.5).median
            found[f"{what} {str(dtype)[6:]}"] = round(amount / seconds / 1e9)
    print(", ".join(f"{k} {v}" for k, v in found.items()))
    return found


# ------------------------------------------------------------------ the works, by our code

def our_training(preset, batch, flags, graphs=False):
    """work(): train.py's own step, with these flags. work.state: its train.TrainState."""
    set_tf32(True)
    kinds = ((AlternativeConfig, AlternativeObjective) if "--sa-reuse" in flags else
             (Config, train.DiffusionObjective))
    config = parse_into(kinds[0], ["--preset", preset, "--batch-size", str(batch), "--images",
                                   str(batch), *flags])
    objective = kinds[1](config)
    place(objective.net.train(), DEVICE, config.compile)
    state = train.TrainState(objective, config)
    dist = distributed.Distributed(0, 1, 0, DEVICE)
    dtype = autocast_dtype(config.precision, DEVICE)
    images = torch.randint(0, 256, (batch, 3, *[config.image_size] * 2), dtype=torch.uint8)
    model = for_training(state.net, DEVICE, config.compile, graphs)

    def work():
        return train.train_step(state, model, images, config, dist, dtype)
    work.state = state
    return work


def our_sampler(B, nfe, name, arguments):
    """work(): samplers.sample; DDPM's noise is given, since all programs draw it alike."""
    x, net = plain.constant(B)
    noise, denoiser = net(), Denoiser(net, schedules.make_schedule("linear"))
    return lambda: [samplers.sample(denoiser, x, name, nfe, noise=lambda shape: noise, **arguments)
                    for _ in range(plain.RUNS)]


def our_network(preset, B, precision="fp32", compiled=False, nfe=0):
    """work(): one call of the network as sample.py makes it; with nfe, DDIM in so many calls.
    work.net: the network, as a function."""
    set_tf32(precision == "tf32")
    net = for_inference(unet.UNet(**unet.PRESETS[preset]), DEVICE, precision, compiled)
    x, c = plain.inputs(preset, B)
    denoiser = Denoiser(net, schedules.make_schedule("linear"))

    def work():
        return samplers.sample(denoiser, x, "ddim", nfe) if nfe else net(x, c)
    work.net = net
    return work


def our_distance(n):
    """work(): metrics.py's Fréchet distance."""
    statistics = plain.statistics_of(n)
    return lambda: metrics.frechet_distance(*statistics)


def our_features(n, precision, compiled):
    """work(): Inception's features as metrics.py has them."""
    set_tf32(False)
    net = for_inference(inception.Inception().fold(), DEVICE, precision, compiled)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    return lambda: net(images)


# ------------------------------------------------------------------ a training step

def usual_batch():
    """Images of a batch: on a GPU, small batches measure only how fast kernels are started."""
    return 128 if DEVICE.type == "cuda" else 16


def flops(preset, batch):
    """Floating-point operations of a training step: forward and backward."""
    # The counter does not know the CPU's fused attention.
    with (FakeTensorMode(), FlopCounterMode(display=False) as counter,
          sdpa_kernel(SDPBackend.MATH)):
        net, size = unet.UNet(**unet.PRESETS[preset]), unet.PRESETS[preset]["image_size"]
        net(torch.randn(batch, 3, size, size), torch.ones(batch)).sum().backward()
    return counter.get_total_flops()


def training_step(report, config):
    """A training step: network, loss, gradients, Adam, average."""
    preset, B = config.preset or "cifar10", config.batch_size or usual_batch()
    sides = {"plain, float32": plain_side("training", preset, B)}
    if plain.PEER and preset == "cifar10":
        sides["diffusers' network in the plain loop, float32"] = plain_side(
            "training", preset, B, 1, "diffusers")
    ways = ["--precision fp32 --no-compile", "--precision bf16 --no-compile"]
    for flags in ways + ["--precision bf16"] * (DEVICE.type == "cuda"):
        sides[f"train.py {flags}"] = our_side("our_training", preset, B, flags.split())
    times, total = compare(sides, config.rounds), flops(preset, B)
    report.part("train", f"a training step of {preset}, batch {B} ({total / 1e9:.0f} GFLOP)")
    for name, seconds in times.items():
        note = f"{B / seconds:.1f} images/s, {total / seconds / 1e9:.0f} GFLOP/s"
        if "bf16" in name:
            best = max(report.machine["product bfloat16"], report.machine["convolution bfloat16"])
            note += f", {total / seconds / 1e7 / best:.0f} % of the machine's bf16 rate"
        report.add(name, seconds, times["plain, float32"], note=note)


def sequence_aware(report, config):
    """SA-k's step: one pass over k noise levels against k passes."""
    preset, B = config.preset or "cifar10", config.batch_size or 12  # which 2, 3 and 4 divide
    report.part("sa", f"a step of SA-k, {preset}, batch {B}, against k passes in plain float32")
    for k in (2, 3, 4):
        usual, share = ["--precision", "bf16"], max(1, B // k)
        sa = [*usual, "--sa-k", str(k)]
        ways = {f"train.py --sa-k {k}": (B, sa),
                f"train.py --sa-k {k} --microbatch {share}": (B, [*sa, "--microbatch", str(share)]),
                f"papers.alternatives --sa-k {k} --sa-reuse, batch {share}": (
                    share, [*sa, "--sa-reuse"])}
        sides = {name: our_side("our_training", preset, *way) for name, way in ways.items()}
        times = compare({"plain": plain_side("training", preset, B, k),
                         "one": our_side("our_training", preset, B, usual)} | sides, config.rounds)
        for name in ways:
            same = "reuse" not in name  # a k-th of the images: not the work of k passes over all
            report.add(name, times[name], times["plain"] if same else None,
                       note=f"{times[name] / times['one']:.2f} of our plain steps")


# ------------------------------------------------------------------ sampling

# name: our arguments, diffusers' scheduler and its arguments
SHARED = {
    "ddim": ({}, "DDIMScheduler", dict(clip_sample=False)),
    "ddpm": ({}, "DDPMScheduler", dict(clip_sample=False)),
    "dpm-solver": (dict(order=3), "DPMSolverSinglestepScheduler",
                   dict(solver_order=3, lower_order_final=True, algorithm_type="dpmsolver++")),
    "dpm-solver++": ({}, "DPMSolverMultistepScheduler", {}),
    "heun": ({}, "HeunDiscreteScheduler", {}),
}


def sampling(report, config):
    """Samplers: what they cost next to the network, and what the network costs."""
    B, nfe, unit = 16, 49, 49 * plain.RUNS  # 49: an odd number, which Heun can spend
    report.part("sample", f"per step, {B} images of 3x32x32, 1 thread, a network that costs "
                "nothing; x against diffusers")
    for name, (arguments, theirs, their_arguments) in SHARED.items():
        sides = {"ours": our_side("our_sampler", B, nfe, name, arguments, threads=1)}
        if name == "ddim":
            sides["lean"] = plain_side("lean_ddim", B, nfe, threads=1)
        if plain.PEER:
            steps = (nfe + 1) // 2 if name == "heun" else nfe
            sides["theirs"] = plain_side("peer_sampler", B, steps, theirs, their_arguments,
                                         threads=1)
        times = compare(sides, config.rounds)
        if "lean" in times:
            report.add("four passes over memory, the least that DDIM can be", times["lean"],
                       unit=unit)
        report.add(name, times["ours"], times.get("theirs"), unit=unit)

    preset, B, calls = config.preset or "cifar10", config.batch_size or usual_batch(), 3
    report.part("sample", f"per network call of {preset}, batch {B}; x against plain float32")
    sides = dict(plain=plain_side("one_call", preset, B), bare=our_side("our_network", preset, B),
                 ddim=our_side("our_network", preset, B, "fp32", False, calls),
                 bf16=our_side("our_network", preset, B, "bf16"))
    if config.compile:
        sides |= {f"{kind} --compile": our_side("our_network", preset, B, kind, True)
                  for kind in ("fp32", "bf16")}
    times = compare(sides, config.rounds)
    slower = 100 * (times["ddim"] / calls / times["bare"] - 1)
    report.add("samplers.sample, DDIM, float32", times.pop("ddim"), calls * times["plain"],
               unit=calls, note=f"{slower:+.1f} % against the bare calls")
    names = {"plain": "plain, float32", "bare": "sample.py --precision fp32"}
    for kind, seconds in times.items():
        report.add(names.get(kind, f"sample.py --precision {kind}"), seconds, times["plain"],
                   note=f"DDIM-50: {B / seconds / 50:.2f} images/s")


# ------------------------------------------------------------------ metrics

def measuring(report, config):
    """The Fréchet distance and Inception's features."""
    report.part("fid", "the Fréchet distance in 2048 dimensions, against scipy.linalg.sqrtm")
    for n in (4096, 500):
        times = compare({"scipy": plain_side("distance", n), "ours": our_side("our_distance", n)},
                        max(1, config.rounds // 2), warm=1)
        error = abs(our_distance(n)() / plain.distance(n)() - 1)
        report.add(f"{n} vectors a side", times["ours"], times["scipy"],
                   note=f"{error:.0e} from scipy's")
    report.part("fid", "Inception's features of 32 images, against float32, NCHW, unfolded")
    kinds = {"metrics.py": ("fp32", False), "--precision bf16": ("bf16", False)}
    if config.compile:
        kinds |= {"--compile": ("fp32", True), "--precision bf16 --compile": ("bf16", True)}
    sides = {name: our_side("our_features", 32, *kind) for name, kind in kinds.items()}
    times = compare({"plain": plain_side("features", 32)} | sides, config.rounds)
    for name in kinds:
        report.add(name, times[name], times["plain"], note=f"{32 / times[name]:.1f} images/s")


# ------------------------------------------------------------------ memory

def memory_of(preset, micro, recompute):
    """Bytes of a training step of a preset, by calculation."""
    size = unet.PRESETS[preset]
    return step_bytes(lambda: unet.UNet(**size), (3, *[size["image_size"]] * 2), micro, recompute)


def memory(report, config):
    """Whether a network fits: by calculation, which needs no GPU."""
    report.part("memory", "GB of a training step on a GPU, eager, bf16, calculated from "
                "shapes: weights, average, Adam, gradients, and the most of forward and backward")
    for preset in [config.preset] if config.preset else [*unet.PRESETS][1:]:
        for micro in (1, 4, 16):
            usual, less = (memory_of(preset, micro, flag) / 1e9 for flag in (False, True))
            print(f"  {preset:16} --microbatch {micro:2}: {usual:7.2f} GB, {less:7.2f} with "
                  "--recompute", flush=True)
            report.rows.append(dict(part="memory", what=preset, microbatch=micro, GB=usual,
                                    GB_recompute=less))


# ------------------------------------------------------------------ whole runs

def trained(folder, name, *flags, processes=1, threads=None):
    """The columns of log.csv of a run of train.py, in its own process, under `folder`."""
    environment = dict(os.environ, **{"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", str(processes), str(ROOT / "train.py"), "--name", name,
               *map(str, flags)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True,
                          encoding="utf-8", errors="replace")
    if done.returncode:
        raise ValueError(f"{' '.join(command[3:])} failed: {done.stderr.strip()[-300:]}")
    return np.genfromtxt(Path(folder, "runs", name, "log.csv"), delimiter=",", names=True,
                         encoding="utf-8")


def growing(report, config):
    """What a step costs as it grows; efficiency 1 would be: in proportion."""
    report.part("grow", "a training step of tiny as it grows, from train.py's own log.csv")
    usual = dict(batch_size=config.batch_size or 32, image_size=32, sa_k=1)
    cases = [dict(batch_size=b) for b in (8, 16, 64, 128)]
    cases += [dict(image_size=s) for s in (16, 64)] + [dict(sa_k=k) for k in (2, 3, 4)]
    cases += [dict(threads=1), dict(threads=1, processes=2)]
    with tempfile.TemporaryDirectory() as folder:
        def step(processes=1, threads=None, **changed):
            flags = [w for k, v in (usual | changed).items() for w in (flag_name(k), v)]
            log = trained(folder, f"run{len(report.rows)}", *flags, "--steps", 60,
                          "--sample-every", 1000, processes=processes, threads=threads)
            return (usual | changed)["batch_size"] / np.median(log["images_per_s"][2:])

        base = alone = step()
        report.add(f"batch {usual['batch_size']}, 32x32, k = 1, {torch.get_num_threads()} threads",
                   base)
        for case in cases:
            seconds = step(**case)
            work = (case.get("batch_size", usual["batch_size"]) / usual["batch_size"]
                    * (case.get("image_size", 32) / 32) ** 2 * case.get("sa_k", 1))
            efficiency = base * work / seconds
            if "threads" in case:  # processes are compared with one of as many threads
                alone = seconds if "processes" not in case else alone
                efficiency = alone / seconds / case.get("processes", 1)
            report.add(", ".join(f"{k} {v}" for k, v in case.items()).replace("_", " "), seconds,
                       note=f"efficiency {efficiency:.2f}", efficiency=efficiency)


def bf16_quality(report, config):
    """The same runs in float32 and bf16: their losses, and pictures of the same seeds."""
    report.part("precision", f"tiny, {config.steps} steps, two seeds; figure: {config.figure}")
    source = config.data  # the runs are made in another folder
    source = source if source in data.BUILT_IN else str(Path(source).resolve())
    figure = files.figure(figsize=(7, 4))
    axes, last = figure.add_subplot(), {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in (0, 1):
            for kind, style in (("fp32", "k-"), ("bf16", "C1--")):
                log = trained(folder, f"{kind}-{seed}", "--steps", config.steps, "--seed", seed,
                              "--precision", kind, "--sample-every", config.steps,
                              "--data", source)
                smooth = np.convolve(log["loss"], np.ones(10) / 10, "valid")
                axes.plot(log["step"][9:], smooth, style, lw=1, alpha=1 - seed / 2,
                          label=f"{kind}, seed {seed}")
                last[f"{kind} {seed}"] = log["loss"][-len(log) // 4:].mean()
        denoiser = load_run(Path(folder, "runs", "fp32-0"))
    pictures = []
    for kind in ("fp32", "bf16"):
        net = for_inference(copy.deepcopy(denoiser.net), DEVICE, kind)
        x = samplers.sample_from_seeds(denoiser.replace(net=net), range(64), DEVICE, nfe=50)
        pictures.append(data.to_uint8(x).double())
    apart = (pictures[0] - pictures[1]).abs().mean().item()
    axes.set(xlabel="step", ylabel="loss, mean of 100 steps", yscale="log")
    axes.legend()
    files.save_figure(config.figure, figure)
    for name, loss in last.items():
        print(f"  {name}: mean loss of the last quarter {loss:.5f}")
    print(f"  64 pictures by DDIM-50 from the same seeds: {apart:.2f} grey levels apart on average")
    report.rows.append(dict(part="precision", grey_levels=apart, losses=last))


# ------------------------------------------------------------------ the program

PARTS = {"train": training_step, "sa": sequence_aware, "sample": sampling, "fid": measuring,
         "memory": memory, "grow": growing, "precision": bf16_quality}
USED_BY = dict(preset=("train", "sa", "sample", "memory"),
               batch_size=("train", "sa", "sample", "grow"),
               rounds=("train", "sa", "sample", "fid"), compile=("sample", "fid"),
               data=("precision",), steps=("precision",), figure=("precision",))


@dataclass
class BenchmarkConfig:
    parts: tuple[str, ...] = flag((), " ".join((*PARTS, "all")), positional="PART", nargs="+",
                                  choices=(*PARTS, "all"))
    preset: str | None = flag(None, "train, sa, sample, memory: the network",
                              choices=tuple(unet.PRESETS), shown="cifar10; memory: all but tiny")
    batch_size: int | None = flag(None, "images of a batch", shown="16, on CUDA 128; sa: 12; grow: "
                                  "32")
    rounds: int = flag(5, "turns of each side that count")
    compile: bool = flag(False, "sample, fid: torch.compile too: minutes more")
    data: str = flag("shapes", "precision: images to train on")
    steps: int = flag(2000, "precision: of each run")
    figure: Path = flag(Path("precision.png"), "precision: where to draw the losses")
    json: Path = flag(Path("benchmark.json"), "where to write all numbers")

    prog: ClassVar[str] = "benchmarks"
    usage: ClassVar[str] = "python -m benchmarks {train,sa,sample,...,all} [flags]"
    description: ClassVar[str] = ("Speed as ratios: two ways to do the same work, side by side on "
                                  "this machine.")
    examples: ClassVar[str] = """\
  python -m benchmarks train
  python -m benchmarks train --preset ffhq256 --batch-size 1
  OMP_NUM_THREADS=1 python -m benchmarks sample --compile
  python -m benchmarks all --json speed.json
An idle machine gives better numbers; OMP_NUM_THREADS chooses the threads."""

    def check(self):
        """ValueError, FileNotFoundError: flags without effect, numbers that measure nothing."""
        if "all" in self.parts:
            self.parts = tuple(PARTS)
        for name, parts in USED_BY.items():
            if name in self.given and not set(parts) & set(self.parts):
                raise ValueError(f"{flag_name(name)} is for {', '.join(parts)}: leave it out")
        for name, low in dict(rounds=1, batch_size=1, steps=200).items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise ValueError(f"{flag_name(name)} must be at least {low}, not "
                                 f"{getattr(self, name)}")
        for name in ("json", "figure"):
            if not (folder := getattr(self, name).resolve().parent).is_dir():
                raise FileNotFoundError(f"{flag_name(name)}: no such folder: {folder}")


def main(argv=None):
    config = parse_into(BenchmarkConfig, argv)
    report = Report()
    for name in config.parts:
        PARTS[name](report, config)
        files.write_text(config.json, json.dumps(dict(machine=report.machine, rows=report.rows),
                                                 indent=1) + "\n")
    print(f"\nfigures: {config.json.resolve()}")


if __name__ == "__main__":
    run_main(main)
