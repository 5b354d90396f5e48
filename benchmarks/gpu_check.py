r"""One command on a CUDA machine: is everything right there, and how fast? -> DIR/gpu_check.json

    python -m benchmarks.gpu_check --out DIR               # under 8 minutes
    python -m benchmarks.gpu_check --out DIR --rehearse    # small, on a CPU

Each piece of work is a process with a time limit, and the JSON is written again after each: a check
that is cut short still has what it found. What compiles starts first, and waits for its turn while
correctness is checked, all at once. Then every side is measured alone.

    right      nets (float32, TF32, bf16 against float64), training steps and programs (GPU against
               CPU), train.py (same bits, resumed, compiled), NCCL, two processes on one GPU
    fast       ms, images/s, MFU, memory: ours eager and compiled, plain, diffusers if installed;
               each trick on and off: CUDA graphs, TF32 and bf16 for sampling, noise drawn ahead,
               lists of the average, checkpoints copied and written, data on the card or pinned

Never run on a GPU so far: only rehearsed. Not here: ratios on a CPU (__main__.py), or FID.

    python -c "from benchmarks import gpu_check; print(list(gpu_check.WORKERS))"

The peaks behind MFU are an H100's, dense: bf16 989, TF32 495, float32 67 TFLOP/s.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar
from unittest import mock

from support.cli import flag, parse_into

ROOT = Path(__file__).resolve().parents[1]
PEAK = dict(bf16=989e12, tf32=495e12, fp32=67e12)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


# ------------------------------------------------------------------ processes, which share a JSON

class Worker:
    """A process of this file. Its lines that begin with @@ are results."""

    def __init__(self, check, name, side=None, launch=(sys.executable,), device="", **environment):
        self.check, self.name, self.began, self.ended = check, name, time.time(), None
        self.log, self.lines = check.folder / f"{name.replace(' ', '_')}.log", queue.Queue()
        task = dict(worker=name, side=side, device=device, out=str(check.folder),
                    rehearse=check.rehearse)
        environment.update(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1", GPU_CHECK=json.dumps(task))
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*launch, "-m", "benchmarks.gpu_check"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=log, encoding="utf-8", start_new_session=True,
                env={**os.environ, **environment})
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            if line.startswith("@@"):
                self.lines.put(json.loads(line[2:]))
        self.ended = time.time()
        self.lines.put(None)

    def line(self, seconds):
        """The next result, or None: the process has ended, or takes too long."""
        try:
            return self.lines.get(timeout=max(0.1, seconds))
        except queue.Empty:
            return None

    def go(self, seconds):
        """Let a side that is ready measure."""
        with contextlib.suppress(BrokenPipeError):  # finish() sees that it has ended
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        self.finish(seconds)

    def finish(self, seconds):
        """Collect all its results; after so many seconds it is ended."""
        until, found = time.time() + seconds, {}
        while (line := self.line(until - time.time())) is not None:
            found.update(line)
        try:
            self.process.wait(max(0.1, min(3, until - time.time())))
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)  # its own group of processes
            self.process.wait()
            found["cut_off"] = True
        if self.process.returncode:
            found["log"] = self.log.read_text(encoding="utf-8", errors="replace")[-1500:]
        found.update(status=self.process.returncode,
                     seconds=round((self.ended or time.time()) - self.began, 1))
        self.check.keep(self.name, found)


class Check:
    """All results so far, and the time that is left."""

    def __init__(self, config):
        self.rehearse, self.out = config.rehearse, config.out
        self.budget = 1200 if config.rehearse else config.budget
        self.out.mkdir(parents=True, exist_ok=True)
        self.folder, self.began = Path(tempfile.mkdtemp(prefix="gpu-check-")), time.time()
        self.results, self.bad = {}, []

    def left(self):
        return self.budget - (time.time() - self.began)

    def keep(self, name, found):
        """Add a result, print a line, write the JSON."""
        self.results[name] = found
        bad = [k for k, v in found.items() if isinstance(v, dict) and v.get("ok") is False]
        self.bad += [f"{name}: {k}" for k in bad] or [name] * bool(found["status"])
        elapsed = round(time.time() - self.began)
        text = json.dumps(dict(elapsed=elapsed, bad=self.bad, results=self.results), indent=1)
        (self.out / "gpu_check.json").write_text(text + "\n", encoding="utf-8")
        print(f"[{elapsed:4} s] {name}: status {found['status']}, {found['seconds']} s"
              + ", NOT OK: " * bool(bad) + ", ".join(bad), flush=True)


def sides(rehearse):
    """(name, kind, preset, batch, options): those to measure eagerly, and those that compile."""
    small, large, B, b = ("tiny", "tiny", 8, 4) if rehearse else ("cifar10", "ffhq256", 128, 24)
    eager = [(f"plain fp32 {small}", "plain", small, B, dict(peak="fp32")),
             (f"eager bf16 {small}", "train", small, B, {})]
    compiled = [(f"sample {small}", "sample", small, 4 * B, {}),
                (f"small steps {small}", "graphs", small, B // 8, {})]
    if not rehearse:
        eager += [(f"plain fp32 {large}", "plain", large, 12, dict(peak="fp32")),
                  (f"eager bf16 {large}", "train", large, 16, {})]
        if importlib.util.find_spec("diffusers"):
            eager.append((f"diffusers fp32 {small}", "diffusers", small, B, dict(peak="fp32")))
        compiled += [(f"compiled bf16 {p}", "train", p, n, dict(compile=True))
                     for p, n in ((small, B), (large, b))]
    return eager, compiled


@dataclass
class GpuCheckConfig:
    out: Path = flag(Path("gpu-check"), "folder of gpu_check.json", metavar="DIR")
    budget: float = flag(450.0, "seconds in all")
    rehearse: bool = flag(False, "small, on a CPU, however long it takes")

    prog: ClassVar[str] = "benchmarks.gpu_check"
    usage: ClassVar[str] = "python -m benchmarks.gpu_check [flags]"
    description: ClassVar[str] = "Check everything on a CUDA machine, and measure it."
    examples: ClassVar[str] = """\
  python -m benchmarks.gpu_check --out gpu-check          # under 8 minutes
  python -m benchmarks.gpu_check --out try --rehearse     # small, on a CPU"""

    def check(self):
        if self.budget <= 0:
            raise ValueError(f"--budget must be above 0, not {self.budget:g}")


def main(argv=None):
    config = parse_into(GpuCheckConfig, argv)
    check = Check(config)
    Worker(check, "env").finish(60)
    eager, compiled = sides(config.rehearse)
    few = dict(OMP_NUM_THREADS="2", TORCHINDUCTOR_COMPILE_THREADS="4")
    waiting = [Worker(check, name, side, **few) for name, *side in compiled]
    right = [Worker(check, "programs cpu", device="cpu", OMP_NUM_THREADS="2"),
             Worker(check, "programs gpu", device="auto"),
             *(Worker(check, name, OMP_NUM_THREADS="2") for name in ("nets", "steps", "trains")),
             Worker(check, "nccl", launch=[*TORCHRUN, "1"], OMP_NUM_THREADS="2")]
    for worker in right:
        worker.finish(min(600 if config.rehearse else 150, check.left()) - (
            time.time() - worker.began))
    Worker(check, "compare").finish(30)
    for worker in waiting[:]:
        if not worker.line(min(230, check.left()) - (time.time() - check.began)):
            worker.finish(0.1)  # it compiles for too long
            waiting.remove(worker)
    Worker(check, "ceilings").finish(40)
    Worker(check, "pieces").finish(40)
    for worker in waiting:
        worker.go(min(40, check.left()))
    for name, *side in eager:
        if check.left() > 25:
            worker = Worker(check, name, side)
            worker.go(40) if worker.line(40) else worker.finish(0.1)
    print(f"\n{'side':32}{'ms':>9}{'images/s':>10}{'MFU %':>7}{'GB':>7}")
    for name, r in check.results.items():
        if "images_s" in r:
            print(f"{name:32}{r['ms']:9.1f}{r['images_s']:10.1f}{100 * r['mfu']:7.1f}"
                  f"{r.get('GB', 0):7.1f}")
    print("not right: " + (", ".join(check.bad) or "nothing"))
    return bool(check.bad)


# ------------------------------------------------------------------ what the workers share

def say(**found):
    """Results, for the process that started us."""
    print("@@" + json.dumps(found, default=str), flush=True)


def gpu():
    """torch, and the device that is checked: the GPU, or in a rehearsal the CPU."""
    import support  # noqa: F401  (before torch)  # isort: skip
    import torch
    return torch, torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(torch, work, seconds=0.4):
    """The median seconds of work()."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else int
    times, until = [], time.time() + seconds
    while len(times) < 6 or time.time() < until and len(times) < 200:
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return sorted(times[1:])[len(times) // 2 - 1]


def randomize(torch, net):
    """No layer at zero: an output of zeros would agree with anything."""
    g = torch.Generator().manual_seed(0)
    for p in net.parameters():
        if p.dim() > 1 and p.std() < 0.01:
            p.data.copy_(torch.randn(p.shape, generator=g) * (0.5 / p[0].numel() ** 0.5))
    return net


def shell(*words):
    """A program of ours -> dict(ok, ...)."""
    began = time.time()
    done = subprocess.run(list(map(str, words)), capture_output=True, encoding="utf-8",
                          errors="replace")
    error = {} if done.returncode == 0 else dict(error=(done.stderr or done.stdout)[-500:])
    return dict(ok=done.returncode == 0, seconds=round(time.time() - began, 1), **error)


# ------------------------------------------------------------------ right?

def env(args):
    """Versions, and the card."""
    torch, d = gpu()
    found = dict(python=sys.version.split()[0], torch=torch.__version__, cores=os.cpu_count())
    if d.type == "cuda":
        p = torch.cuda.get_device_properties(0)
        found.update(card=p.name, GB=p.total_memory / 1e9, cuda=torch.version.cuda,
                     cudnn=torch.backends.cudnn.version(), nccl=str(torch.cuda.nccl.version()))
    say(**found)


def nets(args):
    """Output and gradient of each preset, at 64 pixels, against float64 on the same device."""
    torch, d = gpu()
    import copy

    import unet
    from support.precision import set_tf32
    limits = dict(fp32=1e-4, tf32=2e-2, bf16=8e-2)
    for name in ["tiny"] if args.rehearse else unet.PRESETS:
        size = dict(unet.PRESETS[name], dropout=0.0)
        side = min(size["image_size"], 64)
        levels = size.get("attention_resolutions", (16,))
        size["attention_resolutions"] = tuple(max(1, a * side // size["image_size"])
                                              for a in levels)
        torch.manual_seed(0)
        net = randomize(torch, unet.UNet(**{**size, "image_size": side})).to(d)
        x, c = torch.randn(2, 3, side, side).to(d), torch.tensor([3.0, 777.0]).to(d)

        def result(net, x, c, dtype=None):
            with torch.autocast(d.type, dtype, enabled=dtype is not None):
                out = net(x, c)
            grads = torch.autograd.grad(out.double().square().mean(), list(net.parameters()))
            return [torch.cat([v.detach().double().flatten() for v in vs]) for vs in ([out], grads)]

        exact, row = result(copy.deepcopy(net).double(), x.double(), c.double()), {}
        for kind, most in limits.items():
            for net.recompute in (False, True):
                set_tf32(kind != "fp32")
                got = result(net, x, c, torch.bfloat16 if kind == "bf16" else None)
                apart = max(float((a - b).norm() / b.norm())
                            for a, b in zip(got, exact, strict=True))
                row[f"{kind}, recompute {net.recompute}"] = apart
                row["ok"] = row.get("ok", True) and apart < most
        say(**{name: row})


LOSSES = ["", "--sa-k 2 --etsdm --flip", "--sa-k 3 --recompute --microbatch 3",
          "--schedule edm --etsdm", "--continuous --train-times lognormal",
          "--etsdm --etsdm-interval 90 --etsdm-n 7", "--schedule zero-terminal-snr",
          "--schedule cosine-shift --prediction x0 --loss-space v",
          "A --sa-k 2 --sa-reuse --remap sqrt", "A --lipschitz-reg 30 --sa-k 3", "S", "C"]


def steps(args):
    """Two training steps of every kind of loss, with the same numbers on GPU and CPU, float32."""
    torch, d = gpu()
    import train
    from config import Config
    from papers import alternatives, autoencoder, superres
    from support import distributed
    from support.cli import parse_into
    from support.precision import set_tf32
    set_tf32(False)
    kinds = dict(A=(alternatives.AlternativeConfig, alternatives.AlternativeObjective),
                 S=(superres.SuperResConfig, superres.SuperResObjective),
                 C=(autoencoder.AutoencoderConfig, autoencoder.AutoencoderObjective))
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    for flags in LOSSES[:3] if args.rehearse else LOSSES:
        config_class, objective_class = kinds.get(flags[:1], (Config, train.DiffusionObjective))
        config = parse_into(config_class, [*flags.lstrip("ASC").split(), "--batch-size", "8",
                                           "--image-size", "16"])
        seen = []
        for device in (torch.device("cpu"), d):
            torch.manual_seed(0)
            objective = objective_class(config)
            randomize(torch, objective.net).to(device).train()
            state, real = train.TrainState(objective, config), objective.draw

            def draw(n, g, _, real=real, device=device):  # the CPU's numbers on both
                return {k: v if k == "t" else v.to(device) for k, v in real(n, g, g).items()}
            objective.draw = draw
            one = distributed.Distributed(0, 1, 0, device)
            seen.append([v for _ in range(2) for v in train.train_step(
                state, state.net, images, config, one, None)])
        apart = max(abs(a - b) / (abs(a) + 1e-6) for a, b in zip(*seen, strict=True))
        say(**{flags or "plain": dict(ok=apart < 1e-3, apart=apart)})


# Adam, because Muon enlarges rounding; a constant rate, because a run is resumed with more steps.
SIZE = ("--image-size 16 --batch-size 16 --sample-every 99 --save-every 10 --optimizer adam "
        "--lr 2e-3 --lr-decay none").split()


def trains(args):
    """train.py: the same bits twice and resumed; compiled, recomputed, and on two processes as
    plainly; the classifier's export."""
    torch, d = gpu()
    from concurrent.futures import ThreadPoolExecutor

    from support.checkpoint import load_checkpoint
    os.chdir(args.out)

    def train(name, flags, steps=20, launch=(sys.executable,)):
        return shell(*launch, ROOT / "train.py", *SIZE, *flags.split(), "--steps", steps, "--name",
                     name)

    exact = "--deterministic --no-compile"
    jobs = dict(d1=lambda: train("d1", exact), d2=lambda: train("d2", exact),
                d3=lambda: (train("d3", exact, 10), train("d3", exact))[1],
                f1=lambda: train("f1", "--precision fp32 --sa-k 2 --no-compile"),
                f2=lambda: train("f2", "--precision fp32 --sa-k 2 --no-compile --recompute "
                                       "--microbatch 5"),
                two=lambda: train("two", "--precision fp32 --sa-k 2 --no-compile",
                                  launch=[*TORCHRUN, "2"]),
                classifier=lambda: shell(sys.executable, "-m", "papers.classifier", "shapes",
                                         "--image-size", 16, "--epochs", 1, "--out", "own.pt2"))
    if args.rehearse:
        del jobs["d2"], jobs["f2"]  # CPUs give the same bits always
    else:
        jobs.update(compiled=lambda: train("compiled", "--precision fp32 --sa-k 2 --compile"))
    with ThreadPoolExecutor(len(jobs) if d.type == "cuda" else 2) as pool:
        for name, found in zip(jobs, pool.map(lambda job: job(), jobs.values()), strict=True):
            say(**{name: found})
    for a, b, most in (("d1", "d2", 0), ("d1", "d3", 0), ("f1", "f2", 1e-3), ("f1", "two", 1e-3),
                       ("f1", "compiled", 1e-3)):
        if b in jobs:
            one, two = (load_checkpoint(Path("runs", n, "checkpoint.pt"))["net"] for n in (a, b))
            apart = max(float((one[k] - two[k]).abs().max()) for k in one)
            say(**{f"{a} and {b}": dict(ok=apart <= most, apart=apart)})


def nccl(args):
    """The process group of support/distributed.py with one process, and DDP's gradient."""
    torch, d = gpu()
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    import unet
    from support.distributed import choose_backend
    if d.type == "cuda":
        torch.cuda.set_device(0)
    dist.init_process_group(choose_backend(d))
    numbers, got = torch.tensor([1.0, 2.0], dtype=torch.float64), [None]
    dist.all_reduce(numbers)  # on the CPU, by gloo
    dist.gather_object("a string", got, dst=0)
    net = randomize(torch, unet.UNet(**unet.PRESETS["tiny"])).to(d)
    x, c = torch.randn(4, 3, 32, 32, device=d), torch.full((4,), 9.0, device=d)

    def gradient(model):
        net.zero_grad()
        model(x, c).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()]).clone()

    bare = gradient(net)
    devices = [d] if d.type == "cuda" else None
    apart = float((gradient(DistributedDataParallel(net, devices)) - bare).norm() / bare.norm())
    right = numbers.tolist() == [1, 2] and got == ["a string"] and apart < 1e-4
    say(**{choose_backend(d): dict(ok=right, gradient_apart=apart)})
    dist.destroy_process_group()


# name: module and flags; each runs on GPU and CPU, from the same checkpoints
PROGRAMS = {
    "ddim": "sample plain --nfe 5", "ddpm": "sample plain --nfe 5 --sampler ddpm",
    "solver": "sample plain --nfe 6 --sampler dpm-solver --spacing logsnr",
    "2m": "sample plain --nfe 5 --sampler dpm-solver++",
    "heun": "sample edm --nfe 9 --sampler heun --churn 3",
    "sn": "sample sn --nfe 5 --sampler ddpm --variance sn", "latent": "sample latent --nfe 4",
    "superres": "papers.superres enlarge super shapes --nfe 3",
    "lipschitz": "lipschitz plain edm --max-t 40", "perturb": "lipschitz plain --perturb",
    "gap": "gap plain --steps 20", "covariance": "papers.covariance plain --batch-size 500",
    "fid": "metrics fid plain shapes --nfe 4 --features own.pt2 --json"}
TRAINED = {"plain": "train --sa-k 2 --etsdm", "edm": "train --schedule edm --etsdm",
           "super": "papers.superres train", "coder": "papers.autoencoder train",
           "sn": "papers.heads sn plain", "latent": "papers.latents coder"}


def call(words):
    """A program's main(), in this process -> what it printed."""
    module, *words = map(str, words)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        importlib.import_module(module).main(words)
    return out.getvalue()


def programs(args):
    """All programs in float32. The CPU's process trains the runs, and the other waits for them."""
    torch, d = gpu()
    import shutil

    from support.checkpoint import load_checkpoint, save_checkpoint
    here, made = Path(args.out, args.device), Path(args.out, "made")
    if args.device == "cpu":
        here.mkdir()
        os.chdir(here)
        few = "--batch-size 8 --steps 4 --sample-every 9 --precision fp32 --device cpu".split()
        for name, words in TRAINED.items():
            size = [] if name in ("sn", "latent") else ["--image-size", "16"]
            call([*words.split(), *few, *size, "--name", name])
            path = Path("runs", name, "checkpoint.pt")
            saved = load_checkpoint(path)
            for v in (v for k in ("net", "ema") for v in saved[k].values()):
                if v.dim() > 1 and v.std() < 0.01:  # after four steps, still near zero
                    g = torch.Generator().manual_seed(v.numel())
                    v.copy_(torch.randn(v.shape, generator=g) * (0.5 / v[0].numel() ** 0.5))
            save_checkpoint(path, {k: v for k, v in saved.items() if k != "format"})
        call("papers.classifier shapes --image-size 16 --epochs 1 --device cpu "
             "--out own.pt2".split())
        shutil.copytree(here, made.with_suffix(".part"))
        made.with_suffix(".part").rename(made)
    else:
        while not made.exists():
            time.sleep(0.5)
        shutil.copytree(made, here)
        os.chdir(here)
    for name, text in PROGRAMS.items():
        words = [*text.split(), "-n", 40 if name == "fid" else 4, "--device", args.device]
        if name not in ("covariance", "fid"):
            suffix = ".png" if text.startswith(("lip", "gap")) else ""
            words += ["--out", name + suffix]
        try:
            out, found = call(words), dict(ok=True)
            if name == "fid":
                found["value"] = json.loads(out.splitlines()[-1])["value"]
        except (Exception, SystemExit) as error:
            found = dict(ok=False, error=f"{type(error).__name__}: {str(error)[:300]}")
        say(**{name: found})
        if name == "fid":
            Path("fid.json").write_text(json.dumps(found), encoding="utf-8")


def compare_devices(args):
    """Pictures within a grey level; curves within 2 %, exact zeros in the same places."""
    import numpy as np
    from PIL import Image
    cpu, other = (Path(args.out, k) for k in ("cpu", "auto"))

    def numbers(path):
        words = path.read_text(encoding="utf-8").replace("\n", ",").split(",")
        found = []
        for word in words:
            try:
                found.append(float(word))
            except ValueError:
                continue
        return np.array(found)

    for name, text in PROGRAMS.items():
        try:
            if (cpu / name).is_dir():
                a, b = (np.stack([np.asarray(Image.open(p), int) for p in sorted(
                    (f / name).glob("0*.png"))]) for f in (cpu, other))
                found = dict(ok=bool(abs(a - b).max() <= 1), grey_levels=int(abs(a - b).max()))
            elif name == "fid":
                a, b = (json.loads((f / "fid.json").read_text(encoding="utf-8"))["value"]
                        for f in (cpu, other))
                found = dict(ok=abs(a - b) < 2e-3 * a, cpu=a, gpu=b)
            else:
                file = "runs/plain/analytic.csv" if name == "covariance" else f"{name}.csv"
                a, b = numbers(cpu / file), numbers(other / file)
                apart = float((abs(a - b) / np.maximum(abs(a), 1e-3)).max())
                same = bool(((a == 0) == (b == 0)).all())
                found = dict(ok=apart < 2e-2 and same, apart=apart, same_zeros=same)
        except (OSError, ValueError, KeyError) as error:
            found = dict(ok=False, error=f"{text}: {str(error)[:200]}")
        say(**{name: found})


# ------------------------------------------------------------------ fast?

def ceilings(args):
    """What the card gives: matrix products, a copy, convolutions by layout."""
    torch, d = gpu()
    from support.precision import set_tf32
    n, found = 512 if args.rehearse else 8192, {}
    for kind in PEAK:
        set_tf32(kind != "fp32")
        dtype = torch.bfloat16 if kind == "bf16" else torch.float32
        a, b = torch.randn(2, n, n, device=d).to(dtype)
        found[f"product {kind}, TFLOP/s"] = 2e-12 * n**3 / timed(torch, lambda a=a, b=b: a @ b)
    x = torch.randn(2**20 if args.rehearse else 2**29, device=d)
    found["copy, GB/s"] = 2e-9 * x.nbytes / timed(torch, x.clone)
    del x
    for c, side, B in [(32, 16, 2)] if args.rehearse else [(256, 16, 128), (128, 256, 24)]:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(B, c, side, side, device=d, dtype=torch.bfloat16)
            x = x.to(memory_format=layout).requires_grad_()
            conv = torch.nn.Conv2d(c, c, 3, padding=1).to(d, torch.bfloat16, memory_format=layout)

            def work(conv=conv, x=x):
                return torch.autograd.grad(conv(x).sum(), (x, conv.weight))
            key = f"convolution {c}x{side}x{side}, {B} images, {layout}, TFLOP/s"
            found[key] = 6e-12 * B * side**2 * c**2 * 9 / timed(torch, work)
    say(**found)


def side(args):
    """One side: made, then measured when a line arrives on stdin."""
    torch, d = gpu()
    import unet
    from benchmarks import __main__ as ours
    from benchmarks import plain
    from support.precision import set_tf32
    kind, preset, B, how = args.side
    peak, total = PEAK[how.get("peak", "bf16")], ours.flops(preset, 1) * B
    size = unet.PRESETS[preset]["image_size"]
    began, calls = time.time(), {}
    if kind == "sample":
        calls = {f"{p}{', compiled' * c}": ours.our_network(preset, B, p, c)
                 for p, c in (("fp32", False), ("tf32", False), ("bf16", False), ("bf16", True))
                 if not (c and args.rehearse or p == "tf32" and d.type == "cpu")}
        work = calls["bf16"]
        calls.update(noise_calls(calls["bf16"].net, size, B, d))
        total /= 3
    elif kind in ("train", "graphs"):
        usual = ["--precision", "bf16", "--microbatch", str(B)]
        compiled = how.get("compile") or kind == "graphs" and not args.rehearse
        flags = [*usual, "--compile" if compiled else "--no-compile"]
        work = ours.our_training(preset, B, flags)
        if kind == "graphs":
            calls = {"no graphs": work, "CUDA graphs": ours.our_training(preset, B, flags, True)}
            calls["CUDA graphs"](), calls["CUDA graphs"]()
    else:
        set_tf32(how.get("peak") != "fp32")  # plain code has TF32 in convolutions by default
        work = plain.training(preset, B, 1, "diffusers" if kind == "diffusers" else "ours")
    for _ in range(2):
        work()
    say(ready=True, prepared_s=round(time.time() - began, 1), pixels=size)
    sys.stdin.readline()
    if d.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = timed(torch, work, 1 if args.rehearse else 6)
    found = dict(ms=1e3 * seconds, images_s=B / seconds, mfu=total / seconds / peak)
    if d.type == "cuda":
        found["GB"] = torch.cuda.max_memory_allocated() / 1e9
        if kind == "train":  # the table of docs/presets.md: for eager mode
            found["GB calculated, eager"] = ours.memory_of(preset, B, False) / 1e9
    if calls:
        found["ms of a call"] = {}
        for name, call in calls.items():
            set_tf32(kind == "graphs" or name == "tf32")
            found["ms of a call"][name] = 1e3 * timed(torch, call, 0.5)
    say(**found)


def noise_calls(net, size, B, device):
    """DDPM in 5 calls of a network, its noise drawn ahead by a thread or when it is needed."""
    import samplers
    import schedules
    from denoiser import Denoiser
    from support.rng import SeededNoise
    denoiser = Denoiser(net, schedules.make_schedule("linear"))

    def work(ahead):
        noise = SeededNoise(range(B), device, ahead)
        samplers.sample(denoiser, noise((B, 3, size, size)), "ddpm", 5, noise=noise)
    return {f"DDPM-5, noise {'drawn ahead' if flag else 'drawn on demand'}": partial(work, flag)
            for flag in (True, False)}


def pieces(args):
    """Milliseconds for which the program is busy with a part of the loop, by two ways each."""
    torch, d = gpu()
    import tempfile

    import data
    import train
    from benchmarks import __main__ as ours
    from support import checkpoint, device
    from support.image_files import Array
    preset = "tiny" if args.rehearse else "cifar10"
    work = ours.our_training(preset, 8, ["--no-compile", "--precision", "fp32"])
    work()
    state, found = work.state, {}

    def busy(call, times=7):
        """The median until the program may go on; the GPU may still work."""
        taken = []
        for _ in range(times):
            if d.type == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - began))
        return sorted(taken)[times // 2]

    def from_state_dicts():
        averages, values = state.ema.state_dict(), state.net.state_dict()
        torch._foreach_lerp_(list(averages.values()), list(values.values()), 0.1)

    found["average, kept lists"] = busy(lambda: train.update_ema(state.averages, state.values, 0.9,
                                                                     1))
    with torch.no_grad():
        found["average, two state dicts"] = busy(from_state_dicts)
    with tempfile.TemporaryDirectory() as folder:
        found["checkpoint, copied for a thread"] = busy(
            lambda: checkpoint.snapshot(state.state_dict()), 3)
        found["checkpoint, written"] = busy(lambda: checkpoint.save_checkpoint(
            Path(folder, "checkpoint.pt"), state.state_dict()), 3)
    images = Array(torch.zeros(20_000, 3, 32, 32, dtype=torch.uint8))
    for name, keep in (("on the card", device.keep_near), ("pinned", lambda images, _: images)):
        with mock.patch.object(device, "keep_near", keep):
            stream = data.batches(images, 128, 0, 0, device=d)
            next(stream)
        found[f"next batch, {name}"] = busy(lambda stream=stream: next(stream))
    say(ms=found)


WORKERS = {"env": env, "nets": nets, "steps": steps, "trains": trains, "nccl": nccl,
           "compare": compare_devices, "ceilings": ceilings, "pieces": pieces,
           "programs cpu": programs, "programs gpu": programs}


if __name__ == "__main__":
    if task := os.environ.pop("GPU_CHECK", None):
        args = types.SimpleNamespace(**json.loads(task))
        (side if args.side else WORKERS[args.worker])(args)
    else:
        from support.programs import run_main
        run_main(lambda: sys.exit(main()))
