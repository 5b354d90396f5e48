r"""How fast this code is: ratios of two ways to do the same work, measured side by side.

    python benchmark.py train                # a training step, and the same net written plainly
    python benchmark.py sa sample            # SA-k's step; the cost of samplers
    python benchmark.py all                  # all parts, 40 minutes on 2 CPU cores

An absolute time says more about a machine than about a program, so none is asserted anywhere, and
each number below is a ratio: both sides run in the same minutes, taking turns, each in a process of
its own (the C library's memory settings belong to a process, and are part of what is compared).
The first turns are thrown away; medians of the others count. "Plain" is what a program does that
does nothing about speed: float32, NCHW, attention by einsum, an optimizer and an average that walk
over the parameters one by one, glibc's own memory settings. Where the library diffusers can be
imported, its networks and schedulers are measured too. It is never needed.

What this file does not do: judge the results, or measure their quality (metrics.py); but the part
`precision` trains the same run in float32 and bf16, and compares losses and pictures.

Several processes are started by the part that counts them (grow): it needs no torchrun.

B images of a batch, k consecutive steps (SA-DPM); rates in GFLOP/s count a multiplication and an
addition as two.
"""

import runtime  # isort: skip  (before torch: it sets OpenMP's spinning)

import argparse
import contextlib
import copy
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import data
import denoiser as denoisers
import files
import inception
import metrics
import plain
import samplers
import schedules
import settings
import sources
import train
import unet
from plain import DEVICE

HERE = Path(__file__).resolve().parent
ALONE = runtime.Processes(0, 1, 0, DEVICE)


# ------------------------------------------------------------------ measuring

def serve(pipe, make, arguments, tuned, threads):
    """The life of one side: make its work, then do it once for each word that comes."""
    if threads:
        torch.set_num_threads(threads)
    if tuned:
        runtime.keep_memory()
    wait = torch.cuda.synchronize if DEVICE.type == "cuda" else int
    try:
        work = make(*arguments)
        pipe.send(None)
        while pipe.recv():
            wait()
            began = time.perf_counter()
            work()
            wait()
            pipe.send(time.perf_counter() - began)
    except (EOFError, KeyboardInterrupt):
        pass  # the program has ended, and prints why
    except Exception as error:  # to be raised where it can be read
        with contextlib.suppress(OSError):
            pipe.send(str(error) if isinstance(error, ValueError) else repr(error))


class Side:
    """One side of a comparison: make(*arguments) -> work(), in a process of its own.

    tuned: with the memory settings of our programs. threads None: as many as the user set."""

    def __init__(self, make, *arguments, tuned=True, threads=None):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, make, arguments, tuned, threads), daemon=True)
        self.process.start()
        theirs.close()  # or the end of that process would not be heard
        self.hear()  # made, before the next side is: two at once would be in each other's way

    def hear(self):
        try:
            answer = self.pipe.recv()
        except EOFError:
            answer = "its process ended, perhaps for want of memory: try a smaller --batch-size"
        if isinstance(answer, str):
            raise ValueError(f"one side of the comparison failed: {answer}")
        return answer

    def time(self):
        """Seconds of one turn."""
        self.pipe.send(True)
        return self.hear()


def compare(sides, rounds=5, warm=2):
    """{name: median seconds} of sides {name: Side}, which take turns and are ended."""
    times = {name: [] for name in sides}
    for _ in range(warm + rounds):
        for name, side in sides.items():
            times[name].append(side.time())
    for side in sides.values():
        side.process.terminate()
    return {name: statistics.median(t[warm:]) for name, t in times.items()}


class Report:
    """Rows of a table, printed as they come, and kept for the JSON file."""

    def __init__(self):
        self.rows = []

    def part(self, name, words):
        self.name = name
        print(f"\n{name}: {words}", flush=True)

    def add(self, what, seconds, against=None, unit=1.0, note="", **more):
        """One row: seconds of this way and of the other, whose ratio is the result; per `unit`."""
        ratio = against / seconds if against else None
        shown = f"{ratio:9.2f} x" if ratio else " " * 11
        print(f"  {what:58}{show(seconds / unit)}{shown}  {note}".rstrip(), flush=True)
        self.rows.append(dict(part=self.name, what=what, seconds=seconds / unit, ratio=ratio,
                              note=note, **more))


def show(seconds):
    """A time in the unit that suits it."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:9.2f} {unit:2}"
    return f"{seconds * 1e6:9.1f} µs"


# ------------------------------------------------------------------ the machine

def rate(make, *arguments):
    """GFLOP/s (or GB/s) of make(*arguments) -> (work, amount)."""
    work, amount = make(*arguments)
    wait = torch.cuda.synchronize if DEVICE.type == "cuda" else int
    times = []
    for _ in range(8):
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return amount / min(times) / 1e9


def product(dtype, n=2048):
    """A matrix product."""
    a, b = torch.randn(2, n, n, device=DEVICE).to(dtype)
    return lambda: a @ b, 2 * n**3


def convolution(dtype, n=16, c=256, side=16):
    """The 3x3 convolution that most of the cifar10 network consists of."""
    layer = torch.nn.Conv2d(c, c, 3, padding=1).to(DEVICE, dtype).requires_grad_(False)
    x = torch.randn(n, c, side, side, device=DEVICE).to(dtype)
    return lambda: layer(x), 2 * n * side**2 * c**2 * 9


def machine(report, args):
    """What the hardware gives: no ratio below can be better than these let it."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line for line in lines if line.startswith("model name")), f": {name}")
        name = name.split(": ")[1]
    if DEVICE.type == "cuda":
        name = torch.cuda.get_device_name()
    runtime.keep_memory()
    found = dict(device=name, threads=torch.get_num_threads(), torch=torch.__version__,
                 bf16_units=runtime.has_bf16_units(DEVICE))
    for what, make in (("product", product), ("convolution", convolution)):
        for dtype in (torch.float32, torch.bfloat16):
            found[f"{what} {str(dtype)[6:]}"] = round(rate(make, dtype))
    x = torch.randn(2**26, device=DEVICE)
    found["copy GB/s"] = round(rate(lambda: (lambda: x.clone(), 2 * x.nbytes)), 1)
    report.machine = found
    print(f"{name}, {found['threads']} threads, torch {found['torch']}\n  GFLOP/s in float32 and "
          f"bf16: matrix product {found['product float32']}, {found['product bfloat16']}; 3x3 "
          f"convolution {found['convolution float32']}, {found['convolution bfloat16']}; copy "
          f"{found['copy GB/s']} GB/s")


# ------------------------------------------------------------------ a training step

def our_training(preset, batch, flags):
    """work(): train.py's own step, with these flags."""
    runtime.setup()  # the GPU's rounding, as train.py has it
    s = settings.resolve(settings.parse(
        ["--preset", preset, "--batch-size", str(batch), "--images", str(batch), *flags]))
    model = train.Model(s, DEVICE)
    model.net.train()
    precision = runtime.choose_precision(s["precision"], DEVICE)
    images = torch.randint(0, 256, (batch, 3, *[s["image_size"]] * 2), dtype=torch.uint8)
    trained = torch.compile(model.net) if s["compile"] else model.net
    return lambda: train.one_step(model, trained, s, ALONE, images, precision)


def without_fusion():
    """`with` this, attention is the products that it consists of."""
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)


def flops(preset, batch):
    """Floating-point operations of a training step: forward and backward."""
    # The counter does not know the CPU's fused attention.
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, without_fusion():
        net, size = unet.UNet(**unet.PRESETS[preset]), unet.PRESETS[preset]["image_size"]
        net(torch.randn(batch, 3, size, size), torch.ones(batch)).sum().backward()
    return counter.get_total_flops()


def training(report, args):
    """A training step: network, loss, gradients, Adam, average."""
    preset, B = args.preset or "cifar10", args.batch_size or 16
    sides = {"plain, float32": Side(plain.training, preset, B, tuned=False)}
    if plain.PEER and preset == "cifar10":
        sides["diffusers' network in the plain loop, float32"] = Side(
            plain.training, preset, B, 1, "diffusers", tuned=False)
    sides["train.py --precision fp32"] = Side(our_training, preset, B, ["--precision", "fp32"])
    sides["train.py --precision bf16"] = Side(our_training, preset, B, ["--precision", "bf16"])
    if DEVICE.type == "cuda":
        sides["train.py --precision bf16 --compile"] = Side(
            our_training, preset, B, ["--precision", "bf16", "--compile"])
    times, total = compare(sides, args.rounds), flops(preset, B)
    report.part("train", f"a training step of {preset}, batch {B} ({total / 1e9:.0f} GFLOP)")
    for name, seconds in times.items():
        note = f"{B / seconds:.1f} images/s, {total / seconds / 1e9:.0f} GFLOP/s"
        if "bf16" in name and getattr(report, "machine", None):
            best = max(report.machine["product bfloat16"], report.machine["convolution bfloat16"])
            note += f", {total / seconds / 1e7 / best:.0f} % of the machine's bf16 rate"
        report.add(name, seconds, times["plain, float32"], note=note)


def sequence_aware(report, args):
    """SA-k's step: one pass over k noise levels against k passes."""
    preset, B = args.preset or "cifar10", args.batch_size or 12  # which 2, 3 and 4 divide
    report.part("sa", f"a step of SA-k, {preset}, batch {B}, against k passes in plain float32")
    for k in (2, 3, 4):
        ours = ["--precision", "bf16"], ["--precision", "bf16", "--sa-k", str(k)]
        times = compare({"plain": Side(plain.training, preset, B, k, tuned=False),
                         "one": Side(our_training, preset, B, ours[0]),
                         "ours": Side(our_training, preset, B, ours[1]),
                         "micro": Side(our_training, preset, B, [*ours[1], "--microbatch",
                                                                 str(max(1, B // k))]),
                         "reuse": Side(our_training, preset, max(1, B // k),
                                       [*ours[1], "--sa-reuse"])}, args.rounds)
        base, one = times["plain"], times["one"]
        for name, what in (("ours", f"train.py --sa-k {k}"),
                           ("micro", f"train.py --sa-k {k} --microbatch {max(1, B // k)}"),
                           ("reuse", f"train.py --sa-k {k} --sa-reuse, batch {max(1, B // k)}")):
            same = name != "reuse"  # a k-th of the images: not the work of k passes over all
            report.add(what, times[name], base if same else None,
                       note=f"{times[name] / one:.2f} of our plain steps")


# ------------------------------------------------------------------ sampling

def our_sampler(B, nfe, sampler, arguments):
    """work(): samplers.sample; DDPM's noise is given, since all programs draw it alike."""
    x, net = plain.constant(B)
    noise = net()
    denoiser = denoisers.Denoiser(net, schedules.make_schedule("linear"))
    return lambda: [samplers.sample(denoiser, x, sampler, nfe, noise=lambda shape: noise,
                                    **arguments) for _ in range(plain.RUNS)]


# name: our arguments, diffusers' scheduler and its arguments
SHARED = {
    "ddim": ({}, "DDIMScheduler", dict(clip_sample=False)),
    "ddpm": ({}, "DDPMScheduler", dict(clip_sample=False)),
    "dpm-solver": (dict(order=3), "DPMSolverSinglestepScheduler",
                   dict(solver_order=3, lower_order_final=True, algorithm_type="dpmsolver++")),
    "dpm-solver++": ({}, "DPMSolverMultistepScheduler", {}),
    "heun": ({}, "HeunDiscreteScheduler", {}),
}


def one_call(preset, B, precision, compiled, written_plainly):
    """work(): one call of the network, plainly or as sample.py makes it."""
    torch.manual_seed(0)
    if not written_plainly:
        runtime.setup(tf32=False)  # as sample.py has it
    net = plain.network(preset) if written_plainly else unet.UNet(**unet.PRESETS[preset])
    net = runtime.for_inference(net, DEVICE, precision, compiled)
    size = unet.PRESETS[preset]["image_size"]
    x, c = torch.randn(B, 3, size, size, device=DEVICE), torch.full((B,), 500.0, device=DEVICE)
    return lambda: net(x, c)


def ddim_run(preset, B, nfe):
    """work(): DDIM with the network, in float32."""
    runtime.setup(tf32=False)
    net = runtime.for_inference(unet.UNet(**unet.PRESETS[preset]), DEVICE)
    denoiser = denoisers.Denoiser(net, schedules.make_schedule("linear"))
    size = unet.PRESETS[preset]["image_size"]
    x = torch.randn(B, 3, size, size, device=DEVICE)
    return lambda: samplers.sample(denoiser, x, "ddim", nfe)


def sampling(report, args):
    """Samplers: what they cost beside the network, and what the network costs."""
    B, nfe = 16, 49  # 49: what Heun can spend
    report.part("sample", f"per step, {B} images of 3x32x32, 1 thread, a network that costs "
                "nothing; x against diffusers")
    lean = Side(plain.lean_ddim, B, nfe, threads=1)
    for name, (ours, theirs, their_arguments) in SHARED.items():
        sides = {"ours": Side(our_sampler, B, nfe, name, ours, threads=1)}
        if name == "ddim":
            sides["lean"] = lean
        if plain.PEER:
            steps = (nfe + 1) // 2 if name == "heun" else nfe
            sides["theirs"] = Side(plain.peer_sampler, B, steps, theirs, their_arguments,
                                   threads=1)
        times = compare(sides, 9)
        if "lean" in times:
            report.add("four passes over memory, the least that DDIM can be", times["lean"],
                       unit=nfe * plain.RUNS)
        report.add(name, times["ours"], times.get("theirs"), unit=nfe * plain.RUNS)

    preset, B = args.preset or "cifar10", args.batch_size or 16
    calls = 3
    times = compare({"bare": Side(one_call, preset, B, "fp32", False, False),
                     "ddim": Side(ddim_run, preset, B, calls),
                     "plain": Side(one_call, preset, B, "fp32", False, True, tuned=False),
                     "bf16": Side(one_call, preset, B, "bf16", False, False)}, args.rounds)
    report.part("sample", f"per network call of {preset}, batch {B}; x against plain float32")
    bare, base = times["bare"], times["plain"]

    def speed(seconds):
        return f"DDIM-50: {B / seconds / 50:.2f} images/s"
    report.add("plain, float32", base, base, note=speed(base))
    report.add("samplers.sample, DDIM, float32", times["ddim"], calls * base, unit=calls,
               note=f"{100 * (times['ddim'] / calls / bare - 1):+.1f} % against the bare calls")
    report.add("sample.py --precision bf16", times["bf16"], base, note=speed(times["bf16"]))
    if args.compile:
        for precision in ("fp32", "bf16"):
            times = compare({"plain": Side(one_call, preset, B, "fp32", False, True, tuned=False),
                             "ours": Side(one_call, preset, B, precision, True, False)},
                            args.rounds)
            report.add(f"sample.py --precision {precision} --compile", times["ours"],
                       times["plain"], note=speed(times["ours"]))


# ------------------------------------------------------------------ metrics

def our_distance(n, from_features):
    """work(): metrics' distance, of Σ or, as where images are few, of the features themselves."""
    sides = plain.statistics_of(n)
    alone, stored = runtime.Processes(0, 1, 0, torch.device("cpu")), []
    for f, mu, sigma in sides:
        moments = metrics.Moments(f.shape[1], few=from_features)
        moments.add(torch.from_numpy(f))
        stored.append(dict(mu=mu, sigma=sigma, root=moments.root(alone)))
    return lambda: metrics.distance(*stored)


def our_features(n, precision, compiled):
    """work(): Inception's features as metrics.py has them."""
    runtime.setup(tf32=False)  # as metrics.py has it
    net = inception.Inception().fold()
    net = runtime.for_inference(net, DEVICE, precision, compiled)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    return lambda: net(images)


def measuring(report, args):
    """The Fréchet distance and Inception's features."""
    report.part("fid", "the Fréchet distance in 2048 dimensions, against scipy.linalg.sqrtm")
    for n, kinds in ((4096, (False,)), (500, (False, True))):
        sides = {"scipy": Side(plain.distance, n, tuned=False)}
        sides |= {kind: Side(our_distance, n, kind) for kind in kinds}
        exact = plain.distance(n)()
        times = compare(sides, max(1, args.rounds // 2), warm=1)
        for kind in kinds:
            found = our_distance(n, kind)()
            report.add(f"{n} vectors a side" + ", from the vectors" * kind, times[kind],
                       times["scipy"], note=f"{abs(found / exact - 1):.0e} from scipy's")
    report.part("fid", "Inception's features of 32 images, against float32, NCHW, unfolded")
    kinds = {"metrics.py": ("fp32", False), "--precision bf16": ("bf16", False)}
    if args.compile:
        kinds |= {"--compile": ("fp32", True), "--precision bf16 --compile": ("bf16", True)}
    for name, kind in kinds.items():
        times = compare({"plain": Side(plain.features, 32, tuned=False),
                         "ours": Side(our_features, 32, *kind)}, args.rounds)
        report.add(name, times["ours"], times["plain"],
                   note=f"{32 / times['ours']:.1f} images/s")


# ------------------------------------------------------------------ starting, data

def starting(report, args):
    """From the command to its first word."""
    report.part("start", "seconds to the end of a command; x against import torch")
    commands = {"import torch": ["-c", "import torch"]}
    commands |= {f"{p}.py --help": [str(HERE / f"{p}.py"), "--help"]
                 for p in ("sample", "train", "metrics")}
    if plain.PEER:
        commands["import diffusers' U-Net and a scheduler"] = [
            "-c", "from diffusers import UNet2DModel, DDIMScheduler"]
    times = {name: [] for name in commands}
    for _ in range(args.rounds + 1):
        for name, words in commands.items():
            began = time.perf_counter()
            done = subprocess.run([sys.executable, *words], stdout=subprocess.DEVNULL,
                                  stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
            times[name].append(time.perf_counter() - began)
            if done.returncode:
                raise ValueError(f"{name} failed: {(done.stderr.splitlines() or [''])[-1]}")
    medians = {name: statistics.median(t[1:]) for name, t in times.items()}
    for name, seconds in medians.items():
        report.add(name, seconds, medians["import torch"],
                   note=f"{seconds / medians['import torch']:.2f} of import torch")


def loading(report, args):
    """The network waiting for images: built-in shapes, an array, a folder of 20,000 PNGs."""
    B, n, turns = args.batch_size or 32, 20_000, 40
    step = compare({"step": Side(our_training, "tiny", B, ["--precision", "auto"])}, 10)["step"]
    report.part("data", f"a batch of {B} images of 32x32, against a training step of tiny")
    report.add("the training step", step, note=f"{B / step:.0f} images/s")
    with tempfile.TemporaryDirectory() as folder:
        noise = torch.randint(0, 256, (n, 32, 32, 3), dtype=torch.uint8).numpy()
        for i in range(n):
            Image.fromarray(noise[i]).save(f"{folder}/{i:06d}.png")
        sets = {"shapes (drawn)": (data.load("shapes", 32, 3), 0),
                "an array in memory": (data.Array(torch.from_numpy(noise).permute(0, 3, 1, 2)), 0),
                f"a folder of {n:,} PNGs, streamed by 2 threads": (
                    data.load(folder, 32, 3, memory_limit=0), 2)}
        for name, (dataset, workers) in sets.items():
            stream = data.batches(dataset, B, 0, 0, workers=workers)
            for _ in range(10):
                next(stream)
            began = time.perf_counter()
            for _ in range(turns):
                next(stream)
            seconds = (time.perf_counter() - began) / turns
            report.add(name, seconds, step, note=f"{100 * seconds / step:.1f} % of the step, "
                       f"{B / seconds:.0f} images/s")


# ------------------------------------------------------------------ memory

class Peak(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were at once."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.most = weakref.WeakKeyDictionary(), 0, 0

    def count(self, tensor):
        storage = tensor.untyped_storage()
        if storage not in self.seen:
            size = storage.nbytes()
            self.seen[storage], self.now = size, self.now + size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, size)

    def gone(self, size):
        self.now -= size

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        out = function(*arguments, **(keywords or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return out


def memory_of(preset, micro, recompute):
    """Bytes of a training step in bf16, by calculation: shapes alone go through the network.

    Weights, their average, Adam's two moments and gradients are 20 bytes a parameter; on top comes
    the most that forward and backward hold at once, gradients included."""
    size = unet.PRESETS[preset]
    with FakeTensorMode(allow_non_fake_inputs=True):
        with DEVICE:
            net = unet.UNet(**size)
            x = torch.empty(micro, 3, *[size["image_size"]] * 2)
        net.recompute = recompute
        c, parameters = x.new_ones(micro), sum(p.numel() for p in net.parameters())
        with Peak() as peak:
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = net(x, c).float().square().mean()
            loss.backward()
    return 16 * parameters + peak.most


def memory(report, args):
    """Whether a network fits: by calculation, which no card is needed for."""
    report.part("memory", "GB of a training step in bf16, calculated from shapes: weights, "
                "average, Adam, gradients and what forward and backward hold at most")
    for preset in [args.preset] if args.preset else ["cifar10", "ffhq256", "ffhq256-large"]:
        for micro in (1, 4, 16):
            usual, less = (memory_of(preset, micro, flag) / 1e9 for flag in (False, True))
            print(f"  {preset:16} --microbatch {micro:2}: {usual:7.2f} GB, {less:7.2f} with "
                  "--recompute", flush=True)
            report.rows.append(dict(part="memory", what=preset, microbatch=micro, GB=usual,
                                    GB_recompute=less))


# ------------------------------------------------------------------ whole runs

def trained(folder, name, *flags, processes=1, threads=None):
    """The columns of log.csv of a run of train.py, in a process of its own, under `folder`."""
    environment = dict(os.environ, **{"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node", str(processes), str(HERE / "train.py"), "--name", name,
               *map(str, flags)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True,
                          encoding="utf-8", errors="replace")
    if done.returncode:
        raise ValueError(f"{' '.join(command[3:])} failed: {done.stderr.strip()[-300:]}")
    return np.genfromtxt(Path(folder, "runs", name, "log.csv"), delimiter=",", names=True,
                         encoding="utf-8")


def growing(report, args):
    """What a step costs as it grows; efficiency 1 would be: in proportion."""
    report.part("grow", "a training step of tiny as it grows, from train.py's own log.csv")
    usual = dict(batch_size=args.batch_size or 32, image_size=32, sa_k=1)
    threads = torch.get_num_threads()
    cases = [dict(batch_size=b) for b in (8, 16, 64, 128)]
    cases += [dict(image_size=s) for s in (16, 64)] + [dict(sa_k=k) for k in (2, 3, 4)]
    cases += [dict(threads=1), dict(threads=1, processes=2)]
    with tempfile.TemporaryDirectory() as folder:
        def step(processes=1, threads=None, **changed):
            flags = [w for k, v in (usual | changed).items()
                     for w in (f"--{k.replace('_', '-')}", v)]
            log = trained(folder, f"run{len(os.listdir(folder))}{len(report.rows)}", *flags,
                          "--steps", 60, "--sample-every", 1000, processes=processes,
                          threads=threads)
            return (usual | changed)["batch_size"] / np.median(log["images_per_s"][2:])

        base = step()
        report.add(f"batch {usual['batch_size']}, 32x32, k = 1, {threads} threads", base)
        alone = base
        for case in cases:
            seconds = step(**case)
            work = (case.get("batch_size", usual["batch_size"]) / usual["batch_size"]
                    * (case.get("image_size", 32) / 32) ** 2 * case.get("sa_k", 1))
            if "threads" in case:  # processes are compared with one of as many threads
                alone = seconds if "processes" not in case else alone
                efficiency = alone / seconds / case.get("processes", 1)
            else:
                efficiency = base * work / seconds
            report.add(", ".join(f"{k} {v}" for k, v in case.items()).replace("_", " "), seconds,
                       note=f"efficiency {efficiency:.2f}", efficiency=efficiency)


def precision(report, args):
    """The same runs in float32 and bf16: their losses, and pictures of the same seeds."""
    report.part("precision", f"tiny, {args.steps} steps, two seeds; figure: {args.figure}")
    source = args.data or "shapes"  # the runs are made in another folder
    source = source if source in sources.SETS else str(Path(source).resolve())
    figure = files.figure(figsize=(7, 4))
    axes, last = figure.add_subplot(), {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in (0, 1):
            for kind, style in (("fp32", "k-"), ("bf16", "C1--")):
                log = trained(folder, f"{kind}-{seed}", "--steps", args.steps, "--seed", seed,
                              "--precision", kind, "--sample-every", args.steps,
                              "--data", source)
                smooth = np.convolve(log["loss"], np.ones(10) / 10, "valid")
                axes.plot(log["step"][9:], smooth, style, lw=1, alpha=1 - seed / 2,
                          label=f"{kind}, seed {seed}")
                last[kind, seed] = log["loss"][-len(log) // 4:].mean()
        denoiser = denoisers.load_run(Path(folder, "runs", "fp32-0"))
    net, pictures = denoiser.net, []
    for kind in ("fp32", "bf16"):
        one = denoiser.but(net=runtime.for_inference(copy.deepcopy(net), DEVICE, kind))
        x = samplers.from_seeds(one, range(64), one.space.shape, DEVICE, nfe=50)
        pictures.append(data.to_uint8(x).double())
    apart = (pictures[0] - pictures[1]).abs().mean().item()
    axes.set(xlabel="step", ylabel="loss, mean of 100 steps", yscale="log")
    axes.legend()
    figure.tight_layout()
    files.save_figure(args.figure, figure)
    for seed in (0, 1):
        print(f"  seed {seed}: mean loss of the last quarter {last['fp32', seed]:.5f} in float32, "
              f"{last['bf16', seed]:.5f} in bf16")
    print(f"  64 pictures by DDIM-50 from the same seeds: {apart:.2f} grey levels apart on average")
    report.rows.append(dict(part="precision", grey_levels=apart,
                            losses={f"{k} {s}": v for (k, s), v in last.items()}))


# ------------------------------------------------------------------ the program

PARTS = {"train": training, "sa": sequence_aware, "sample": sampling, "fid": measuring,
         "start": starting, "data": loading, "memory": memory, "grow": growing,
         "precision": precision}


USED_BY = dict(preset=("train", "sa", "sample", "memory"),
               batch_size=("train", "sa", "sample", "data", "grow"),
               rounds=("train", "sa", "sample", "fid", "start"), compile=("sample", "fid"),
               data=("precision",), steps=("precision",), figure=("precision",))


def parse(argv=None):
    """The command line; ValueError for numbers that measure nothing."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py", usage="python benchmark.py {train,sa,sample,...,all} [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Speed as ratios: two ways to do the same work, side by side on this machine.",
        epilog="parts\n" + "\n".join(f"  {name:10} {(part.__doc__ or name).splitlines()[0]}"
                                      for name, part in PARTS.items()) + """

examples
  python benchmark.py train
  python benchmark.py train --preset ffhq256 --batch-size 1
  OMP_NUM_THREADS=1 python benchmark.py sample --compile
  python benchmark.py all --json speed.json
An idle machine gives better numbers; OMP_NUM_THREADS chooses the threads.""")
    add = parser.add_argument
    add("parts", nargs="+", metavar="PART", choices=(*PARTS, "all"), help=" ".join((*PARTS, "all")))
    add("--preset", choices=list(unet.PRESETS), help="train, sa, sample, memory: the network "
        "(default: cifar10; memory: three)")
    add("--batch-size", type=int, help="images of a batch (default: 16; sa: 12; data, grow: 32)")
    add("--rounds", type=int, help="turns of each side that count (default: 5)")
    add("--compile", action="store_true", help="sample, fid: torch.compile too: minutes more")
    add("--data", help="precision: images to train on (default: shapes)")
    add("--steps", type=int, help="precision: of each run (default: 2000)")
    add("--figure", type=Path, help="precision: (default: precision.png)")
    add("--json", type=Path, default=Path("benchmark.json"), help="(default: benchmark.json)")
    args = parser.parse_args(argv)
    if "all" in args.parts:
        args.parts = list(PARTS)
    for flag, parts in USED_BY.items():
        if getattr(args, flag) and not set(parts) & set(args.parts):
            raise ValueError(f"--{flag.replace('_', '-')} is for {', '.join(parts)}")
    low = dict(rounds=1, steps=200, batch_size=1)
    if any(getattr(args, k) is not None and getattr(args, k) < v for k, v in low.items()):
        raise ValueError("--rounds and --batch-size must be at least 1, --steps 200")
    args.rounds, args.steps = args.rounds or 5, args.steps or 2000
    args.figure = args.figure or Path("precision.png")
    for path in (args.json, args.figure):
        if not path.resolve().parent.is_dir():
            raise FileNotFoundError(f"no such folder: {path.resolve().parent}")
    return args


def main(argv=None):
    args = parse(argv)
    report = Report()
    machine(report, args)
    for name in args.parts:
        PARTS[name](report, args)
        files.write_text(args.json, json.dumps(dict(machine=report.machine, rows=report.rows),
                                                 indent=1) + "\n")
    print(f"\nfigures: {args.json.resolve()}")


if __name__ == "__main__":
    runtime.run_program(main)
