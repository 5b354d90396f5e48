r"""Train a diffusion model: DDPM's loss, SA-DPM's (--sa-k), E-TSDM's shared conditions (--etsdm), or both.

    torchrun train.py --sa-k 2                                # built-in shapes, minutes on a laptop
    torchrun train.py --sa-k 2 --etsdm --data photos/ --preset celeba64
    torchrun --nproc_per_node 8 train.py --preset cifar10 --data cifar10 --sa-k 2

Read it from the bottom: main() puts together the four objects (images, network, Denoiser, loss) and
loop() is the training loop. What this file does not do: sampling for its own sake (sample.py),
measuring (metrics.py), learning-rate decay (neither paper uses any).

Every random number of step n is a function of (seed, n): times, noises, flips and dropout. They are
drawn for the whole batch on every process, and each keeps its rows. So a resumed run, and a run on
another number of processes, sees the same numbers, and no random state needs saving.

k consecutive steps, B images of the global batch; a run is the folder runs/NAME.
"""

import runtime  # isort: skip  (before torch: it sets OpenMP's spinning)

import argparse
import copy
import csv
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.figure
import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import denoiser as denoisers
import etsdm
import losses
import samplers
import schedules
import unet



# How each preset is trained unless a flag says otherwise. The papers': SA-DPM's configs (epochs
# turned into images seen), E-TSDM's table A1 (whose length it does not give: 48 million is ours).
PLAIN = dict(schedule="linear", prediction="eps", loss_space="eps", lr=2e-4, beta2=0.999, ema=0.9999,
             grad_clip=1.0, warmup=0, flip=False, sample_every=5000, save_every=1000)
RECIPES = {
    # v-prediction, measured in v: after the same minutes eps gives coloured fog (NOTES.md).
    "tiny": dict(PLAIN, batch_size=32, images=64_000, schedule="cosine", prediction="v",
                 loss_space="v", lr=1e-3, beta2=0.99, ema=0.995, warmup=100, sample_every=500,
                 save_every=100),
    "cifar10": dict(PLAIN, batch_size=128, images=60_000_000),
    "celeba64": dict(PLAIN, batch_size=128, images=195_000_000, flip=True),
    "celebahq256": dict(PLAIN, batch_size=24, images=24_000_000, lr=2e-5, ema=0.999, grad_clip=0.0),
    "ffhq256": dict(PLAIN, batch_size=96, images=48_000_000, lr=1e-4, grad_clip=0.0),
    "ffhq256-large": dict(PLAIN, batch_size=64, images=48_000_000, lr=1e-4, grad_clip=0.0),
}
# Settings that may change when a run goes on; any other difference would make it another run.
MAY_CHANGE = ("images", "microbatch", "workers", "compile", "precision", "sample_every", "save_every")
BAD_STEPS = 25  # so many non-finite steps in a row end the run


# ------------------------------------------------------------------ settings

def parse(argv=None):
    parser = argparse.ArgumentParser(
        prog="train.py", formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a diffusion model on images. The same command again resumes the run.",
        epilog="""examples
  torchrun train.py --sa-k 2
      the built-in shapes: a tiny network, a few minutes on two CPU cores; then: python sample.py
  torchrun train.py --sa-k 2 --etsdm --data photos/ --image-size 64 --preset celeba64
      your own pictures (a folder or zip, searched recursively), both papers' methods together
  torchrun --nproc_per_node 8 train.py --preset cifar10 --data cifar10 --sa-k 2 --steps 400000
      the SA paper's CIFAR-10 model on 8 GPUs; --batch-size stays the global batch""")
    add = parser.add_argument
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--data", default="shapes", help="shapes (built in), cifar10, or a path: folder, zip, .npy, "
        ".npz[:KEY], MNIST-like IDX file or folder, CIFAR-10 archive (default: shapes)")
    add("--image-size", type=int, help="side in pixels; images are resized and cropped (default: the preset's)")
    add("--channels", type=int, default=3, choices=(1, 3), help="3 = RGB, 1 = true gray (default: 3)")
    add("--flip", action=argparse.BooleanOptionalAction, help="random horizontal flips (default: the preset's)")
    add("--skip-bad-images", action="store_true", help="go on without files that cannot be read")
    add("--workers", type=int, default=2, help="processes that read images when they do not fit in memory (default: 2)")

    add = parser.add_argument_group("model").add_argument
    add("--preset", default="tiny", choices=list(unet.PRESETS), help="network and recipe (default: tiny)")
    add("--schedule", choices=schedules.NAMES, help="noise schedule (default: the preset's)")
    add("--continuous", action="store_true", help="train on real-valued t, schedule in closed form")
    add("--prediction", choices=denoisers.PREDICTIONS, help="what the network predicts (default: the preset's)")
    add("--etsdm", action="store_true", help="E-TSDM: share timestep conditions near t = 0")
    add("--etsdm-interval", type=float, default=100, help="t below this are shared (default: 100)")
    add("--etsdm-n", type=int, default=5, help="in this many equal sub-intervals (default: 5)")
    add("--remap", choices=etsdm.REMAPS, help="tell the network an invertible function of t instead")
    add("--dropout", type=float, help="(default: the preset's)")

    add = parser.add_argument_group("loss").add_argument
    add("--sa-k", type=int, default=1, help="SA-DPM: train k consecutive steps together (default: 1, the plain loss)")
    add("--sa-weight", type=float, help="weight of the sequence-aware loss (default: 1)")
    add("--loss-space", choices=losses.SPACES, help="where the plain loss is measured (default: the preset's)")

    add = parser.add_argument_group("training").add_argument
    add("--batch-size", type=int, help="global: over all processes (default: the preset's)")
    add("--microbatch", type=int, help="images per forward pass of one process; the rest is accumulated")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--images", type=int, help="train until this many images were seen (default: the preset's)")
    length.add_argument("--steps", type=int, help="the same as --images steps x batch-size")
    add("--lr", type=float, help="Adam's learning rate (default: the preset's)")
    add("--warmup", type=int, help="steps over which the learning rate rises from 0 (default: the preset's)")
    add("--ema", type=float, help="decay of the averaged weights (default: the preset's)")
    add("--grad-clip", type=float, help="largest gradient norm; 0 = no clipping (default: the preset's)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"), help="auto: bf16 where the hardware has units for it")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--seed", type=int, default=0)

    add = parser.add_argument_group("run").add_argument
    add("--name", help="folder under runs/ (default: made of data, preset and methods)")
    add("--sample-every", type=int, help="steps between sample grids (default: the preset's)")
    add("--save-every", type=int, help="steps between checkpoints (default: the preset's)")
    return parser.parse_args(argv)


def resolve(args):
    """Flags + recipe -> the flat dict of settings that describes the run. ValueError if they contradict."""
    s = dict(RECIPES[args.preset])
    s.update({k: v for k, v in vars(args).items() if v is not None and k not in ("steps", "dropout")})
    net = dict(unet.PRESETS[args.preset], in_channels=args.channels, out_channels=args.channels)
    if args.image_size is not None:
        net["image_size"] = args.image_size
    if args.dropout is not None:
        net["dropout"] = args.dropout
    s.update(image_size=net["image_size"], unet=net, T=1000, remap=args.remap, microbatch=args.microbatch)
    if args.schedule == "zero-terminal-snr" or s["schedule"] == "zero-terminal-snr":
        s["prediction"] = args.prediction or "v"  # eps has no x_0 at T there
        if args.loss_space is None and s["prediction"] != "eps":
            s["loss_space"] = s["prediction"]  # eps's residual weighs t = T with a = 0: it would never be learnt
    elif args.prediction and args.loss_space is None:
        s["loss_space"] = "eps" if args.prediction == "eps" else s["loss_space"]
    if args.steps is not None:
        s["images"] = args.steps * s["batch_size"]
    if args.sa_k < 1:
        raise ValueError(f"--sa-k counts the step itself: at least 1, not {args.sa_k}")
    if args.sa_k > s["T"]:
        raise ValueError(f"--sa-k {args.sa_k} is more than the {s['T']} steps there are")
    if args.sa_k == 1 and args.sa_weight is not None:
        raise ValueError("--sa-weight weighs the loss that --sa-k 2 or more adds; with --sa-k 1 there is none")
    s["sa_weight"] = 1.0 if args.sa_weight is None else args.sa_weight
    for key in ("batch_size", "images", "lr", "sample_every", "save_every", "image_size", "etsdm_n"):
        if not s[key] > 0:
            raise ValueError(f"--{key.replace('_', '-')} must be above 0, not {s[key]}")
    for key, low, high in (("ema", 0, 1), ("beta2", 0, 1), ("sa_weight", 0, 1e9), ("grad_clip", 0, 1e9)):
        if not low <= s[key] <= high:
            raise ValueError(f"--{key.replace('_', '-')} must be between {low} and {high:g}, not {s[key]}")
    if s["images"] < s["batch_size"]:
        raise ValueError(f"--images {s['images']} is less than one batch of {s['batch_size']}")
    s["name"] = args.name or default_name(s)
    if Path(s["name"]).name != s["name"] or s["name"].startswith("."):
        raise ValueError(f"--name {s['name']!r} must be a plain folder name: runs go to {runtime.RUNS}/NAME")
    return s


def default_name(s):
    """What distinguishes a run at a glance, so that the same command finds the same run again."""
    parts = [Path(s["data"].rsplit(":", 1)[0]).stem or "images", s["preset"]]
    recipe = RECIPES[s["preset"]]
    parts += [str(s[k]) for k in ("schedule", "prediction") if s[k] != recipe[k]]
    parts += ["continuous"] * s["continuous"] + [f"sa{s['sa_k']}"] * (s["sa_k"] > 1)
    parts += ["etsdm"] * s["etsdm"] + [str(s["remap"])] * bool(s["remap"])
    parts += [f"seed{s['seed']}"] * bool(s["seed"])
    return "-".join(parts)


# ------------------------------------------------------------------ the run folder

def open_run(s, process):
    """(folder, checkpoint or None) of the run these settings name. ValueError if it is another run."""
    folder = runtime.RUNS / s["name"]
    path = folder / "checkpoint.pt"
    if process.first:
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        runtime.remove_leftovers(folder)
        runtime.remove_leftovers(folder / "samples")
    process.barrier()
    # Every process reads it itself, to the CPU, before DDP exists: reading on one and sending is
    # what hangs resumed runs elsewhere.
    checkpoint = runtime.load_checkpoint(path) if path.exists() else None
    process.barrier()  # nobody writes a new one while another still looks
    if checkpoint:
        old = checkpoint["settings"]
        changed = [k for k in s if k not in MAY_CHANGE and old.get(k) != s[k]]
        if changed:
            said = ", ".join(f"{k} {old.get(k)} there, {s[k]} here" for k in changed[:3])
            raise ValueError(f"the run {folder} was trained with other settings ({said}): "
                             "give this one another --name, or delete that folder")
    return folder, checkpoint


def write_config(folder, s, process):
    """config.json: the settings, and what they ran on."""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5,
                                cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    about = dict(torch=torch.__version__, numpy=np.__version__, python=platform.python_version(), commit=commit,
                 processes=process.world, device=process.device.type, command=" ".join(sys.argv))
    runtime.write_text(folder / "config.json", json.dumps({**s, "versions": about}, indent=1) + "\n")


class Log:
    """log.csv: one row per `every` steps, with means over them."""

    COLUMNS = ("step", "images", "loss", "simple", "sa", "grad_norm", "skipped", "images_per_s")
    every = 10

    def __init__(self, folder, step):
        self.path, self.sums, self.since = folder / "log.csv", [], time.time()
        rows = []
        if self.path.exists():  # rows after the checkpoint will be made again
            with open(self.path, newline="") as f:
                rows = [r for r in csv.reader(f) if r and r[0].isdigit() and int(r[0]) <= step]
        lines = [",".join(r) for r in [self.COLUMNS, *rows]]
        runtime.write_text(self.path, "\n".join(lines) + "\n")

    def add(self, step, batch, values, skipped):
        """values: (loss, simple, sa, grad_norm) of one step."""
        self.sums.append(values)
        if step % self.every == 0:
            rate = len(self.sums) * batch / max(time.time() - self.since, 1e-9)
            means = np.mean(self.sums, axis=0)
            with open(self.path, "a", newline="") as f:
                csv.writer(f).writerow([step, step * batch, *(f"{m:.6g}" for m in means), skipped, f"{rate:.1f}"])
            self.sums, self.since = [], time.time()

    def plot(self, path):
        """loss.png from the rows so far: the simple loss and, where there is one, the sequence-aware one."""
        table = np.atleast_1d(np.genfromtxt(self.path, delimiter=",", names=True))
        if len(table) < 2:
            return
        figure = matplotlib.figure.Figure(figsize=(7, 4))  # no pyplot: no window system, no global state
        axes = figure.add_subplot()
        axes.plot(table["step"], table["simple"], color="black", lw=0.8, label="L_simple")
        if table["sa"].any():
            axes.plot(table["step"], table["sa"], color="black", lw=0.8, ls=":", label="L_SA")
        axes.set(xlabel="step", ylabel="loss (mean over pixels)", yscale="log")
        axes.legend()
        figure.tight_layout()
        with runtime.atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


# ------------------------------------------------------------------ training

def draw(s, schedule, step, shape, device):
    """The random numbers of one step, for the whole global batch: t (B,), noises (k, B, C, H, W), flips (B,)."""
    B = s["batch_size"]
    g = runtime.generator(s["seed"], step)
    low, high = losses.time_range(schedule, s["prediction"])
    t = losses.draw_timesteps(B, schedule, low, high, g).to(device)
    flips = torch.rand(B, generator=g) < 0.5 if s["flip"] else None
    on_device = g if device.type == "cpu" else runtime.generator(s["seed"], step, device=device)
    noises = torch.randn((s["sa_k"] if s["sa_weight"] else 1, B, *shape), generator=on_device, device=device)
    return t, noises, flips


def accumulate_gradients(net, denoiser, s, x0, t, noises, precision):
    """Forward and backward over this process's images (b, C, H, W), microbatch by microbatch.

    Returns (loss, simple, sa) means; the gradients are those of the mean over all images, since DDP averages over
    processes and each part is weighted by its share.
    """
    micro = min(s["microbatch"] or len(x0), len(x0))
    totals = torch.zeros(3, dtype=torch.float64)
    for i in range(0, len(x0), micro):
        part = slice(i, i + micro)
        last = i + micro >= len(x0)
        wait = net.no_sync() if isinstance(net, DistributedDataParallel) and not last else runtime.nothing()
        with wait:
            with torch.autocast(x0.device.type, precision, enabled=precision is not None):
                simple, sa = losses.sa_loss(denoiser, x0[part], t[part], noises[:, part], s["loss_space"])
            simple, sa = simple.mean(), sa.mean()
            loss = simple + s["sa_weight"] * sa if len(noises) > 1 else simple  # k = 1: the plain model
            share = len(x0[part]) / len(x0)
            (loss * share).backward()
        totals += share * torch.stack([loss, simple, sa]).detach().double().cpu()
    return totals.tolist()


def loop(s, process, folder, dataset, checkpoint):
    """Train until s["images"] were seen or somebody asks to stop; returns the step reached."""
    shape = (s["channels"], s["image_size"], s["image_size"])
    local = s["batch_size"] // process.world
    rows = slice(process.rank * local, (process.rank + 1) * local)
    total = s["images"] // s["batch_size"]
    precision = runtime.choose_precision(s["precision"], process.device)

    # ---- the four objects, and the averaged copy
    torch.manual_seed(s["seed"])
    net = unet.UNet(**s["unet"]).to(process.device)
    ema = copy.deepcopy(net).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(net.parameters(), lr=s["lr"], betas=(0.9, s["beta2"]), fused=True)
    step, skipped = 0, 0
    if checkpoint:
        net.load_state_dict(checkpoint["raw"])
        ema.load_state_dict(checkpoint["ema"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        step, skipped = checkpoint["step"], checkpoint["skipped"]
    trained = torch.compile(net) if s["compile"] else net
    if process.world > 1:
        trained = DistributedDataParallel(trained, [process.device] if process.device.type == "cuda" else None)
    denoiser, ema_denoiser = (denoisers.from_settings(s, n) for n in (trained, ema))

    def save():
        if process.first:
            runtime.save_checkpoint(folder / "checkpoint.pt", dict(
                settings=s, step=step, skipped=skipped, raw=net.state_dict(), ema=ema.state_dict(),
                optimizer=optimizer.state_dict()))
            log.plot(folder / "loss.png")

    process.say(f"network: {sum(p.numel() for p in net.parameters()):,} parameters in "
                f"{'bf16' if precision else 'fp32'} on {process.world} x {process.device.type}")
    micro = min(s["microbatch"] or local, local)
    process.say(f"batch: {s['batch_size']} = {micro} per pass x {process.world} processes x {-(-local // micro)} "
                f"accumulated; steps {step} to {total}")
    log = Log(folder, step) if process.first else None
    stop, bad = runtime.Stop(), 0
    images = data.batches(dataset, s["batch_size"], step * s["batch_size"], s["seed"], process.rank, process.world,
                          s["workers"])
    bar = tqdm(total=total, initial=step, unit="step", disable=not process.first, dynamic_ncols=True, mininterval=0.5)
    net.train()
    saved = step
    while step < total:
        t, noises, flips = draw(s, denoiser.schedule, step, shape, process.device)
        x0 = data.to_float(next(images)).to(process.device)
        if flips is not None:
            x0 = torch.where(flips[rows, None, None, None].to(x0.device), x0.flip(-1), x0)
        torch.manual_seed(runtime.mix(s["seed"], step, process.rank))  # for dropout

        optimizer.zero_grad(set_to_none=True)
        values = accumulate_gradients(trained, denoiser, s, x0, t[rows], noises[:, rows], precision)
        norm = float(torch.nn.utils.clip_grad_norm_(net.parameters(), s["grad_clip"] or float("inf")))
        if norm == norm and norm != float("inf"):  # DDP has averaged: all processes see the same norm
            for group in optimizer.param_groups:
                group["lr"] = s["lr"] * min(1.0, (step + 1) / max(s["warmup"], 1))
            optimizer.step()
            runtime.update_ema(ema, net, s["ema"], step - skipped)
            bad = 0
        else:
            skipped, bad = skipped + 1, bad + 1
        step += 1

        *sums, asked = process.sum(*values, bool(stop.asked))  # everyone stops at the same step
        values = [v / process.world for v in sums]
        if process.first:
            log.add(step, s["batch_size"], (*values, norm), skipped)
            bar.set_postfix_str(f"loss {values[0]:.4f}, {rate(bar, s):.0f} images/s", refresh=False)
            bar.update()
        if bad >= BAD_STEPS:
            bar.close()
            raise ValueError(f"the last {bad} losses were not finite, up to step {step}; the last good checkpoint is of step {saved} in "
                             f"{folder.resolve()}. Try --precision fp32, a lower --lr, or --grad-clip 1")
        if process.first and (step % s["sample_every"] == 0 or step == total):
            sample_grid(ema_denoiser, shape, folder / "samples" / f"{step:07d}.png", process.device)
        if step % s["save_every"] == 0 or step == total or asked:
            save()
            saved = step
        if asked:
            break
    bar.close()
    if asked_to_stop := stop.asked or (step < total):
        process.say(f"stopped by {asked_to_stop if stop.asked else 'another process'} at step {step} of {total}, saved. "
                    "Run the same command again to go on.")
    return step


def rate(bar, s):
    """Images per second since the bar started."""
    done = bar.n + 1 - bar.initial
    return done * s["batch_size"] / max(time.time() - bar.start_t, 1e-9)


def sample_grid(denoiser, shape, path, device):
    """A grid from the averaged weights, always from the same noise, so that grids of a run can be compared."""
    side = 8 if shape[1] <= 64 else 4
    noise = samplers.SeededNoise(range(side * side), device)
    images = samplers.sample(denoiser, noise((side * side, *shape)), nfe=25, t_start=samplers.start_time(denoiser))
    with runtime.atomic_write(path) as temporary:
        data.grid(data.to_uint8(images), columns=side).save(temporary, format="png")


def main():
    args = parse()
    with runtime.setup() as process:
        runtime.keep_memory()
        s = resolve(args)
        if s["batch_size"] % process.world:
            raise ValueError(f"--batch-size {s['batch_size']} is global and must divide by the {process.world} processes")
        folder, checkpoint = open_run(s, process)
        process.say(f"run: {folder.resolve()}" + (f", at step {checkpoint['step']}" if checkpoint else ""))
        total = s["images"] // s["batch_size"]
        if checkpoint and checkpoint["step"] >= total:
            process.say(f"this run is finished ({checkpoint['step']} steps). To go on: --images "
                        f"{2 * checkpoint['step'] * s['batch_size']} (or more); to start afresh: another --name. "
                        f"To see it: python sample.py {s['name']}")
            return
        if not process.first:  # rank 0 first: a download or a scan happens once
            process.barrier()
        dataset = data.load(s["data"], s["image_size"], s["channels"], s["seed"], s["skip_bad_images"],
                            progress=process.first)
        if process.first:
            process.barrier()
        process.say(f"data: {dataset.summary}")
        if process.first:
            write_config(folder, s, process)
        if loop(s, process, folder, dataset, checkpoint) >= total:
            process.say(f"done: {folder.resolve()} holds checkpoint.pt, log.csv, loss.png and samples/\n"
                        f"next: python sample.py {s['name']}")


if __name__ == "__main__":
    runtime.run_program(main)
