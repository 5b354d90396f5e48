r"""Train a diffusion model: DDPM's loss, SA-DPM's (--sa-k), E-TSDM's shared conditions (--etsdm).

    torchrun train.py --sa-k 2                        # built-in shapes, minutes on a laptop
    torchrun train.py --sa-k 2 --etsdm --data photos/ --image-size 64 --preset celeba64
    torchrun --nproc_per_node 8 train.py --preset cifar10 --data cifar10 --sa-k 2

Read main() first: it puts together images, network, Denoiser and loss; loop() then is the training
loop, and one_step() the step.

What this file does not do: sampling for its own sake (sample.py), measuring, or learning-rate decay
(neither paper uses any).

Every random number of step n is a function of (seed, n): times, noises, flips and dropout. They
are drawn for the whole global batch on every process, and each process keeps its rows. So a
resumed run, and a run on another number of processes, sees the same numbers, and there is no
random state to save (dropout alone depends on the number of processes).

k consecutive steps, B images of the global batch, b of this process; a run is a folder runs/NAME.
"""

import runtime  # isort: skip  (before torch: it sets OpenMP's spinning)

import argparse
import copy
import csv
import json
import math
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

# How each preset is trained unless a flag says otherwise. The papers': SA-DPM's configuration files
# (epochs turned into images seen) and E-TSDM's table A1, which gives no length: 48 M is ours.
# loss_space None: that of the prediction.
PAPER = dict(schedule="linear", prediction="eps", loss_space="eps", lr=2e-4, beta2=0.999,
             ema=0.9999, grad_clip=1.0, warmup=0, flip=False, sample_every=5000, save_every=1000)
RECIPES = {
    # Ours, for minutes on a CPU. v-prediction, cosine schedule: eps on the linear one still gives
    # coloured fog after the same minutes (NOTES.md).
    "tiny": dict(PAPER, batch_size=32, images=41_600, schedule="cosine", prediction="v",
                 loss_space=None, lr=2e-3, beta2=0.99, ema=0.995, warmup=100,
                 sample_every=650, save_every=200),
    "cifar10": dict(PAPER, batch_size=128, images=60_000_000),
    "celeba64": dict(PAPER, batch_size=128, images=195_000_000, flip=True),
    "celebahq256": dict(PAPER, batch_size=24, images=24_000_000, lr=2e-5, ema=0.999, grad_clip=0.0),
    "ffhq256": dict(PAPER, batch_size=96, images=48_000_000, lr=1e-4, grad_clip=0.0),
    "ffhq256-large": dict(PAPER, batch_size=64, images=48_000_000, lr=1e-4, grad_clip=0.0),
}
# What may change when a run goes on. Any other difference would make it another run.
MAY_CHANGE = ("images", "lr", "grad_clip", "microbatch", "workers", "compile", "precision",
              "sample_every", "save_every", "skip_bad_images")
BAD_STEPS = 25  # this many non-finite steps in a row end the run


# ------------------------------------------------------------------ settings

def parse(argv=None):
    """The command line. None means: as the preset's recipe has it."""
    parser = argparse.ArgumentParser(
        prog="train.py", usage="torchrun train.py [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a diffusion model on images. The same command again resumes the run.",
        epilog="""examples
  torchrun train.py --sa-k 2
      the built-in shapes: a tiny network, a few minutes on two CPU cores; then: python sample.py
  torchrun train.py --sa-k 2 --etsdm --data photos/ --image-size 64 --preset celeba64
      your own pictures (a folder or zip, searched recursively), both papers' methods together
  torchrun --nproc_per_node 8 train.py --preset cifar10 --data cifar10 --sa-k 2 --steps 400000
      the SA paper's CIFAR-10 model on 8 GPUs; --batch-size stays the global batch

"preset's" below: python -c "import train; print(train.RECIPES)" shows each.""")

    # A flag without a default is decided by the preset's recipe, in resolve().
    add = parser.add_argument_group("images").add_argument
    add("--data", default="shapes", help="shapes (built in), cifar10, or a path: folder or zip of "
        "images, .npy, .npz[:KEY], MNIST-like IDX, CIFAR-10 archive (default: shapes)")
    add("--image-size", type=int, help="side in pixels, resized and cropped to (preset's)")
    add("--channels", type=int, default=3, choices=(1, 3), help="3 RGB, 1 true gray (default: 3)")
    add("--flip", action=argparse.BooleanOptionalAction, help="random horizontal flips (preset's)")
    add("--skip-bad-images", action="store_true", help="go on without files that cannot be read")
    add("--workers", type=int, default=2, help="processes that read images which do not fit in "
        "memory (default: 2)")

    add = parser.add_argument_group("model").add_argument
    add("--preset", default="tiny", choices=list(unet.PRESETS),
        help="network and recipe (default: tiny)")
    add("--schedule", choices=schedules.NAMES, metavar="NAME",
        help=f"noise schedule: {', '.join(schedules.NAMES)} (preset's)")
    add("--continuous", action="store_true", help="real-valued t, schedule in closed form")
    add("--prediction", choices=denoisers.PREDICTIONS, help="what the network predicts (preset's)")
    add("--etsdm", action="store_true", help="E-TSDM: share the time conditions near t = 0")
    add("--etsdm-interval", type=float, help="... below this t (default: 100)")
    add("--etsdm-n", type=int, help="... in this many equal parts (default: 5)")
    add("--remap", choices=etsdm.REMAPS, help="tell the network an invertible function of t")
    add("--dropout", type=float, help="(preset's)")

    add = parser.add_argument_group("loss").add_argument
    add("--sa-k", type=int, default=1, help="SA-DPM: train k consecutive steps together "
        "(default: 1, the plain loss)")
    add("--sa-weight", type=float, help="weight of the sequence-aware loss (default: 1)")
    add("--loss-space", choices=losses.SPACES, help="where the plain loss is measured (preset's)")

    add = parser.add_argument_group("training").add_argument
    add("--batch-size", type=int, help="global: over all processes (preset's)")
    add("--microbatch", type=int, help="images per forward pass of a process; gradients add up")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--images", type=int, help="train until this many were seen (preset's)")
    length.add_argument("--steps", type=int, help="the same as --images STEPS x BATCH_SIZE")
    add("--lr", type=float, help="Adam's learning rate (preset's)")
    add("--warmup", type=int, help="steps over which the learning rate rises from 0 (preset's)")
    add("--ema", type=float, help="decay of the averaged weights (preset's)")
    add("--grad-clip", type=float, help="largest gradient norm, 0 = no clipping (preset's)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"),
        help="auto: bf16 where the hardware has units for it (default: auto)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--seed", type=int, default=0, help="of weights, order of images and noise (default: 0)")

    add = parser.add_argument_group("run").add_argument
    add("--name", help="folder under runs/ (default: made of data, preset and methods)")
    add("--sample-every", type=int, help="steps between sample grids (preset's)")
    add("--save-every", type=int, help="steps between checkpoints (preset's)")
    return parser.parse_args(argv)


def resolve(args):
    """Flags and recipe -> the flat dict of settings that is the run. ValueError: contradictions."""
    # What the user said goes over the recipe; --steps and --dropout are folded into others below.
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("steps", "dropout")}
    s = {**RECIPES[args.preset], "T": 1000, "microbatch": None, "remap": None,
         "etsdm_interval": 100, "etsdm_n": 5, "sa_weight": 1.0, **given}
    net = dict(unet.PRESETS[args.preset], in_channels=args.channels, out_channels=args.channels)
    net["image_size"] = s["image_size"] = s.get("image_size", net["image_size"])
    net["dropout"] = net.get("dropout", 0.0) if args.dropout is None else args.dropout
    s["unet"] = net
    if args.prediction is None and s["schedule"] == "zero-terminal-snr":
        s["prediction"] = "v"  # eps has no x_0 at t = T there
    if args.loss_space is None:
        # The papers measure ε, and so do their presets. But ε's residual is a times v's: nothing
        # would be learnt where a = 0.
        own = s["loss_space"] is None or s["schedule"] == "zero-terminal-snr"
        s["loss_space"] = s["prediction"] if own else "eps"
    if args.steps is not None:
        s["images"] = args.steps * s["batch_size"]
    refuse_contradictions(args, s)
    s["name"] = args.name or default_name(s)
    if Path(s["name"]).name != s["name"] or s["name"].startswith("."):
        raise ValueError(f"--name {s['name']!r} must be a plain name: runs go to "
                         f"{runtime.RUNS}/NAME")
    return s


def refuse_contradictions(args, s):
    """Nothing is accepted and then ignored: one line that says which flags do not go together."""
    if not 1 <= s["sa_k"] <= s["T"]:
        raise ValueError(f"--sa-k counts the step itself: 1 to {s['T']}, not {s['sa_k']}")
    if s["sa_k"] == 1 and args.sa_weight is not None:
        raise ValueError("--sa-weight weighs the loss that --sa-k 2 adds: with k = 1 there is none")
    if not args.etsdm and (args.etsdm_interval is not None or args.etsdm_n is not None):
        raise ValueError("--etsdm-interval and --etsdm-n shape what --etsdm does: give that too")
    for key in ("batch_size", "images", "lr", "sample_every", "save_every", "image_size"):
        if not 0 < s[key] < math.inf:
            raise ValueError(f"--{key.replace('_', '-')} must be above 0, not {s[key]}")
    for key in ("warmup", "workers", "seed", "grad_clip", "sa_weight"):
        if not 0 <= s[key] < math.inf:
            raise ValueError(f"--{key.replace('_', '-')} must be 0 or more, not {s[key]}")
    if not 0 <= s["ema"] < 1 or not 0 <= s["unet"]["dropout"] < 1:
        raise ValueError("--ema and --dropout must be at least 0 and below 1")
    if s["microbatch"] is not None and s["microbatch"] < 1:
        raise ValueError(f"--microbatch must be at least 1, not {s['microbatch']}")
    if s["images"] < s["batch_size"]:
        raise ValueError(f"--images {s['images']} is less than one batch of {s['batch_size']}")
    etsdm.make_condition(s["etsdm"], s["etsdm_interval"], s["etsdm_n"], s["remap"], s["T"])


def default_name(s):
    """What distinguishes a run at a glance, so that the same command finds the same run again."""
    parts = [Path(s["data"].split(":")[0]).stem or "images", s["preset"]]
    parts += [s[k] for k in ("schedule", "prediction") if s[k] != RECIPES[s["preset"]][k]]
    parts += ["continuous"] * s["continuous"] + [f"sa{s['sa_k']}"] * (s["sa_k"] > 1)
    parts += ["etsdm"] * s["etsdm"] + [s["remap"]] * bool(s["remap"])
    return "-".join(parts + [f"seed{s['seed']}"] * bool(s["seed"]))


# ------------------------------------------------------------------ the run folder

def open_run(s, process):
    """(folder, checkpoint or None) of the run that the settings name. ValueError: another run's."""
    folder = runtime.RUNS / s["name"]
    path = folder / "checkpoint.pt"
    # Every process reads the checkpoint itself, to the CPU, before DDP exists: reading on one and
    # sending it round is what hangs resumed runs elsewhere.
    checkpoint = runtime.load_checkpoint(path) if path.exists() else None
    if checkpoint:
        old = checkpoint["settings"]
        changed = [k for k in s if k not in MAY_CHANGE and old.get(k) != s[k]]
        if changed:
            said = ", ".join(f"{k} {old.get(k)} there, {s[k]} here" for k in changed[:3])
            raise ValueError(f"{folder} is a run with other settings ({said}): give this one "
                             "another --name, or delete that folder")
    step = checkpoint["step"] if checkpoint else 0
    if process.sum(abs(step - process.share(step)))[0]:  # also: nobody writes before all have read
        raise ValueError(f"the processes see different checkpoints of {folder}: all machines must "
                         f"share one folder {runtime.RUNS}/")
    return folder, checkpoint


def make_folder(folder, s, process):
    """The folder, once nothing can be wrong with the input any more, and its config.json: the
    settings, and what they ran on."""
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    for place in (folder, folder / "samples"):
        runtime.remove_leftovers(place)
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                                timeout=5, cwd=Path(__file__).parent).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    about = dict(torch=torch.__version__, numpy=np.__version__, commit=commit,
                 python=platform.python_version(), processes=process.world,
                 device=process.device.type, command=" ".join(sys.argv))
    runtime.write_text(folder / "config.json", json.dumps({**s, "ran_on": about}, indent=1) + "\n")


class Log:
    """log.csv: every tenth step a row, with the means over the ten; and its picture, loss.png."""

    COLUMNS = ("step", "images", "loss", "simple", "sa", "grad_norm", "skipped", "images_per_s")

    def __init__(self, folder, step):
        self.path, self.rows, self.since = folder / "log.csv", [], time.time()
        kept = []
        if self.path.exists():  # rows after the checkpoint's step will be made again
            with open(self.path, newline="") as f:
                kept = [r for r in csv.reader(f) if len(r) == len(self.COLUMNS)
                        and r[0].isdigit() and int(r[0]) <= step]
        runtime.write_text(self.path, "".join(",".join(r) + "\n" for r in [self.COLUMNS, *kept]))

    def add(self, step, batch, values, skipped):
        """values: (loss, simple, sa, grad_norm) of this step."""
        if math.isfinite(sum(values)):
            self.rows.append(values)
        if step % 10 == 0 and self.rows:
            rate = len(self.rows) * batch / max(time.time() - self.since, 1e-9)
            means = [f"{m:.6g}" for m in np.mean(self.rows, axis=0)]
            with open(self.path, "a") as f:
                f.write(",".join(map(str, [step, step * batch, *means, skipped, f"{rate:.1f}"])))
                f.write("\n")
            self.rows, self.since = [], time.time()

    def plot(self, path):
        """Both losses over the steps, readable in black and white."""
        table = np.atleast_1d(np.genfromtxt(self.path, delimiter=",", names=True))
        if len(table) < 2:
            return
        figure = matplotlib.figure.Figure(figsize=(7, 4))  # no pyplot: no display, no global state
        axes = figure.add_subplot()
        axes.plot(table["step"], table["simple"], "k-", lw=0.8, label="L_simple")
        if table["sa"].any():
            axes.plot(table["step"], table["sa"], "k:", lw=0.8, label="L_SA")
        axes.set(xlabel="step", ylabel="loss, mean over pixels", yscale="log")
        axes.legend()
        figure.tight_layout()
        runtime.save_figure(path, figure)


# ------------------------------------------------------------------ training

class Model:
    """What a checkpoint holds: the weights, their average, the optimizer, and how far they are."""

    def __init__(self, s, device, checkpoint=None):
        torch.manual_seed(s["seed"])  # the same start on every process, before DDP compares them
        self.net = unet.UNet(**s["unet"]).to(device)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=s["lr"],
                                          betas=(0.9, s["beta2"]), fused=True)
        self.step = self.skipped = 0
        if checkpoint:
            runtime.load_weights(self.net, checkpoint["raw"], s["name"])
            runtime.load_weights(self.ema, checkpoint["ema"], s["name"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.step, self.skipped = checkpoint["step"], checkpoint["skipped"]

    def state(self):
        """From the bare modules: names that DDP or compile prefixed would fit nowhere else."""
        return dict(raw=self.net.state_dict(), ema=self.ema.state_dict(), step=self.step,
                    optimizer=self.optimizer.state_dict(), skipped=self.skipped)


def draw(s, schedule, step, device):
    """The random numbers of one step, for the whole global batch: t (B,), noises (k, B, C, H, W),
    flips (B,) or None."""
    # The order of the draws is part of what a run is: a new one goes to the end.
    g = runtime.generator(s["seed"], step)
    low, high = losses.time_range(schedule, s["prediction"])
    t = losses.draw_timesteps(s["batch_size"], schedule, low, high, g).to(device)
    flips = (torch.rand(s["batch_size"], generator=g) < 0.5).to(device) if s["flip"] else None
    if device.type != "cpu":
        g = runtime.generator(s["seed"], step, device=device)
    k = s["sa_k"] if s["sa_weight"] else 1  # weight 0 is the plain model: no second term to pay for
    noises = torch.randn(k, s["batch_size"], s["channels"], s["image_size"], s["image_size"],
                         generator=g, device=device)
    return t, noises, flips


def gradients(trained, denoiser, s, x0, t, noises, precision):
    """Forward and backward over this process's images x0 (b, C, H, W), microbatch by microbatch;
    returns the means [loss, simple, sa].

    Each part counts by its share of b, and DDP averages over processes that have b images each:
    the gradient is that of the mean over the global batch.
    """
    micro, totals = min(s["microbatch"] or len(x0), len(x0)), 0.0
    for start in range(0, len(x0), micro):
        part = slice(start, start + micro)
        share = len(x0[part]) / len(x0)
        # DDP sends gradients round in backward(): once is enough, with the last part.
        accumulating = isinstance(trained, DistributedDataParallel) and start + micro < len(x0)
        with trained.no_sync() if accumulating else runtime.nothing():
            with torch.autocast(x0.device.type, precision, enabled=precision is not None):
                simple, sa = losses.sa_loss(denoiser, x0[part], t[part], noises[:, part],
                                            s["loss_space"])
            # k = 1 is the plain model: there is no second term
            simple, sa = simple.mean(), sa.mean() * (len(noises) > 1)
            loss = simple + s["sa_weight"] * sa
            (loss * share).backward()
        totals = totals + share * torch.stack([loss, simple, sa]).detach()
    return totals.double().tolist()


def one_step(model, trained, denoiser, s, process, images, precision):
    """Draw, forward, backward, update. Returns (loss, simple, sa, gradient norm) of this
    process."""
    b = s["batch_size"] // process.world
    mine = slice(process.rank * b, (process.rank + 1) * b)
    t, noises, flips = draw(s, denoiser.schedule, model.step, process.device)
    x0 = data.to_float(images.to(process.device, non_blocking=True))
    if flips is not None:
        x0 = torch.where(flips[mine, None, None, None], x0.flip(-1), x0)
    torch.manual_seed(runtime.mix(s["seed"], model.step, process.rank))  # dropout

    model.optimizer.zero_grad(set_to_none=True)
    values = gradients(trained, denoiser, s, x0, t[mine], noises[:, mine], precision)
    norm = float(torch.nn.utils.clip_grad_norm_(model.net.parameters(), s["grad_clip"] or math.inf))
    if math.isfinite(norm):  # the same on all processes, since DDP has averaged
        for group in model.optimizer.param_groups:
            group["lr"] = s["lr"] * min(1.0, (model.step + 1) / max(s["warmup"], 1))
        model.optimizer.step()
        runtime.update_ema(model.ema, model.net, s["ema"], model.step - model.skipped)
    else:
        model.skipped += 1
    model.step += 1
    return *values, norm


def loop(s, process, folder, dataset, model, stop):
    """Train until s["images"] were seen, or somebody asks to stop."""
    b, total = s["batch_size"] // process.world, s["images"] // s["batch_size"]
    precision = runtime.choose_precision(s["precision"], process.device)
    # `trained` is the network as the loss calls it, perhaps wrapped; model.net stays the bare one,
    # with the same parameters, for the optimizer, the average and the checkpoint.
    trained = torch.compile(model.net) if s["compile"] else model.net
    if process.world > 1:
        trained = DistributedDataParallel(
            trained, [process.device] if process.device.type == "cuda" else None,
            gradient_as_bucket_view=True)  # no second copy of the gradients
    denoiser = denoisers.from_settings(s, trained)
    averaged = denoisers.from_settings(s, model.ema)
    micro = min(s["microbatch"] or b, b)
    process.say(f"network: {sum(p.numel() for p in model.net.parameters()):,} parameters, "
                f"{'bf16' if precision else 'fp32'} on {process.device.type}\n"
                f"batch: {s['batch_size']} = {micro} at a time x {-(-b // micro)} accumulated x "
                f"{process.world} processes; steps {model.step} to {total}")
    log = Log(folder, model.step) if process.first else None
    stream = data.batches(dataset, s["batch_size"], model.step * s["batch_size"], s["seed"],
                          process.rank, process.world, s["workers"])
    bar = tqdm(total=total, initial=model.step, unit="step", disable=not process.first,
               dynamic_ncols=True, mininterval=0.5)
    # model.step alone says where the run is: the stream of images begins there, and the random
    # numbers of a step follow from it. That is all that resuming takes.
    model.net.train()
    bad, saved, began, first = 0, model.step, time.time(), model.step
    while model.step < total:
        values = one_step(model, trained, denoiser, s, process, next(stream), precision)
        bad = 0 if math.isfinite(values[-1]) else bad + 1
        *sums, asked = process.sum(*values[:-1], bool(stop.asked))  # all stop at the same step
        if process.first:
            means = [v / process.world for v in sums]
            log.add(model.step, s["batch_size"], (*means, values[-1]), model.skipped)
            rate = (model.step - first) * s["batch_size"] / (time.time() - began)
            bar.set_postfix_str(f"loss {means[0]:.4f}, {rate:.0f} images/s", refresh=False)
            bar.update()
        if bad == BAD_STEPS:
            bar.close()
            kept = f"the last checkpoint is of step {saved}" if saved else "there is no checkpoint"
            raise ValueError(f"the last {bad} losses were not finite, up to step {model.step}; "
                             f"{kept} in {folder.resolve()}: try --precision fp32, a lower --lr, "
                             "or --grad-clip 1")
        # Grids come from the averaged weights: those are what sample.py will use. A checkpoint is
        # not made of a step that went wrong: the one before is the better place to go back to.
        done = asked or model.step == total
        if process.first and (model.step % s["sample_every"] == 0 or model.step == total):
            picture(averaged, s, folder / "samples" / f"{model.step:07d}.png", process.device)
        if (model.step % s["save_every"] == 0 and not bad) or done:
            if process.first:
                runtime.save_checkpoint(folder / "checkpoint.pt", {
                    "settings": s, "processes": process.world, "dataset": len(dataset),
                    **model.state()})
                log.plot(folder / "loss.png")
                bar.write(f"step {model.step}: saved {(folder / 'checkpoint.pt').resolve()}")
            saved = model.step
        if done:
            break
    bar.close()


def picture(denoiser, s, path, device):
    """A grid from the averaged weights, always of the same noise, so that grids can be compared."""
    side = 8 if s["image_size"] <= 64 else 4
    noise = samplers.SeededNoise(range(side**2), device)
    x = noise((side**2, s["channels"], s["image_size"], s["image_size"]))
    x = samplers.sample(denoiser, x, nfe=25, t_start=samplers.start_time(denoiser))
    with runtime.atomic_write(path) as temporary:
        data.grid(data.to_uint8(x), columns=side).save(temporary, format="png")


def main(argv=None):
    args = parse(argv)
    s = resolve(args)
    with runtime.setup() as process, runtime.Stop() as stop:
        runtime.keep_memory()
        if s["batch_size"] % process.world:
            raise ValueError(f"--batch-size {s['batch_size']} is global and must divide by the "
                             f"{process.world} processes")
        # ---- the run: new, to be resumed, or finished
        folder, checkpoint = open_run(s, process)
        total = s["images"] // s["batch_size"]
        process.say(f"run: {folder.resolve()}"
                    + (f", from step {checkpoint['step']}" if checkpoint else ""))
        if checkpoint and checkpoint["step"] >= total:
            seen = checkpoint["step"] * s["batch_size"]
            process.say(f"this run is finished, at step {checkpoint['step']}. To go on: --images "
                        f"{2 * seen} (any number above {seen}); to start afresh: another --name. "
                        f"To see it: python sample.py {s['name']}")
            return
        if checkpoint and checkpoint["processes"] != process.world and s["unet"]["dropout"]:
            process.say(f"note: {checkpoint['processes']} processes before, {process.world} now: "
                        "dropout draws other numbers from here on; all else stays the same")
        if s["prediction"] == "eps" and s["schedule"] == "zero-terminal-snr":
            process.say(f"note: eps-prediction knows no x_0 at t = {s['T']}, where alpha_bar = 0: "
                        f"training and sampling begin at t = {s['T'] - 1}")
        # ---- the images
        dataset = process.first_then_all(lambda: data.load(
            s["data"], s["image_size"], s["channels"], s["seed"], s["skip_bad_images"],
            progress=process.first))
        process.say(f"data: {dataset.summary}")
        if checkpoint and checkpoint["dataset"] != len(dataset):
            process.say(f"note: {checkpoint['dataset']:,} images before, {len(dataset):,} now: "
                        "their order changes from here on")
        if process.first:
            make_folder(folder, s, process)
        # ---- the network, and training
        model = Model(s, process.device, checkpoint)
        checkpoint = None  # on large networks it is gigabytes
        loop(s, process, folder, dataset, model, stop)
        if model.step < total:
            process.say(f"stopped by {stop.asked or 'another process'} at step {model.step} of "
                        f"{total}, saved in {folder.resolve()}. Run the same command to go on.")
        else:
            process.say(f"done: {folder.resolve()} has checkpoint.pt, log.csv, loss.png, samples/\n"
                        f"next: python sample.py {s['name']}")


if __name__ == "__main__":
    runtime.run_program(main)
