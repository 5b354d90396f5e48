r"""Train a diffusion model: DDPM's loss, SA-DPM's (--sa-k), E-TSDM's shared conditions (--etsdm).

    torchrun train.py --sa-k 2                        # built-in shapes, minutes on a laptop
    torchrun train.py --sa-k 2 --etsdm --data photos/ --image-size 64 --preset celeba64
    torchrun --nproc_per_node 8 train.py --preset cifar10 --data cifar10 --sa-k 2
    python train.py --schedule edm --etsdm            # EDM; --task sr, --latent, --head: see --help

Read main() first: it puts together images and task; loop() then is the training loop, and
one_step() the step. What is trained, and by which loss, is the task's affair (tasks.py).

What this file does not do: sampling for its own sake (sample.py), measuring, or learning-rate decay
(neither paper uses any).

Every random number of step n is a function of (seed, n): times, noises, flips and dropout. They
are drawn for the whole global batch on every process, and each process keeps its rows. So a
resumed run, and a run on another number of processes, sees the same numbers, and there is no
random state to save (dropout alone depends on the number of processes).

k consecutive steps, B images of the global batch, b of this process; a run is a folder runs/NAME.
"""

import runtime  # isort: skip  (before torch: it sets OpenMP's spinning)

import contextlib
import copy
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import files
import tasks
from settings import notes, parse, resolve

# What may change when a run goes on. Any other difference would make it another run. The first four
# are places: what lies there is compared, not the path (images_changed, tasks.start_changed).
MAY_CHANGE = ("name", "data", "from", "latent",
              "images", "lr", "grad_clip", "microbatch", "recompute", "workers", "compile",
              "precision", "deterministic", "sample_every", "save_every", "skip_bad_images")
BAD_STEPS = 25  # this many non-finite steps in a row end the run
POINTS = 500  # of a curve in loss.png: so many, to twice as many


# ------------------------------------------------------------------ the run folder

def open_run(s, process):
    """(folder, checkpoint or None) of the run that the settings name. ValueError: another run's."""
    folder = files.RUNS / s["name"]
    path = folder / "checkpoint.pt"
    process.first_does(claim, folder, process)
    # Every process reads the checkpoint itself, to the CPU, before DDP exists: reading on one and
    # sending it round is what hangs resumed runs elsewhere.
    checkpoint = files.load_checkpoint(path) if path.exists() else None
    if checkpoint:
        old = checkpoint["settings"]
        changed = [k for k in s if k not in MAY_CHANGE and old.get(k) != s[k]]
        if changed:
            said = ", ".join(f"{k} {str(old.get(k))[:60]} there, {str(s[k])[:60]} here"
                             for k in changed[:3])
            raise ValueError(f"{folder} is a run with other settings ({said}): give this one "
                             "another --name")
    step = checkpoint["step"] if checkpoint else 0
    if process.sum(abs(step - process.share(step)))[0]:  # also: nobody writes before all have read
        raise ValueError(f"the processes see different checkpoints of {folder}: all machines must "
                         f"share one folder {files.RUNS}/")
    return folder, checkpoint


def claim(folder, process):
    """Nobody else writes to this folder from here on, if there is one. ValueError: somebody does,
    or a file is in its place."""
    for place in (files.RUNS, folder, folder / "samples"):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} should be a folder, and is a file: move it away")
    if folder.exists() and not process.held:
        process.hold(folder, 20)  # seconds: a large process that was killed takes some to end


def make_folder(folder, s, process, model):
    """The folder, once nothing can be wrong with the input any more, and its config.json: the
    settings, and what they ran on."""
    # The next checkpoint is written beside the last: there must be room for both.
    files.check_space(folder, model.size() * (1 if (folder / "checkpoint.pt").exists() else 2))
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    claim(folder, process)
    if model.step == 0 and (folder / "checkpoint.pt").exists():
        raise ValueError(f"another process has begun {folder} meanwhile: run the same command "
                         "again to go on with it")
    for place in (folder, folder / "samples"):
        files.remove_leftovers(place)
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, timeout=5,
                                capture_output=True, encoding="utf-8").stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    about = dict(torch=torch.__version__, numpy=np.__version__, commit=commit,
                 python=platform.python_version(), processes=process.world,
                 device=process.device.type, command=" ".join(sys.argv))
    files.write_text(folder / "config.json", json.dumps({**s, "ran_on": about}, indent=1) + "\n")


class Log:
    """log.csv: every tenth step a row, with the means over the ten; and its picture, loss.png.

    terms: names of what the loss is made of. On a full disk rows wait, and later ones average over
    more steps."""

    def __init__(self, folder, step, terms):
        self.path, self.rows, self.since = folder / "log.csv", [], time.time()
        self.points, self.each, self.waiting = [], 1, []  # of loss.png
        self.terms, self.drawn = terms, 0.0  # when loss.png was drawn
        self.columns = ["step", "images", "loss", *terms, "grad_norm", "skipped", "images_per_s"]
        lines = []
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        # later ones will be made again
        kept = [x for x in lines if self.whole(x) and int(x.split(",")[0]) <= step]
        files.write_text(self.path, "".join(x + "\n" for x in [",".join(self.columns), *kept]))
        for line in kept:
            self.point(line)

    def whole(self, line):
        """Whether it is a row. A power cut can leave others."""
        row = line.split(",")
        return len(row) == len(self.columns) and row[0].isdecimal() and all(
            re.fullmatch(r"[-+.0-9e]+|inf|nan", word) for word in row)

    def point(self, line):
        """A row for the plot. Of many, it keeps the means of `each` neighbours: neither its memory
        nor its time grows with the run."""
        self.waiting.append([float(word) for word in line.split(",")])
        if len(self.waiting) == self.each:
            self.points.append(np.mean(self.waiting, axis=0))
            self.waiting = []
        if len(self.points) == 2 * POINTS:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2],
                                                       strict=True)]
            self.each *= 2

    def add(self, step, batch, values, skipped):
        """values: (loss, *terms, grad_norm) of this step."""
        if math.isfinite(sum(values)):
            self.rows.append(values)
        if step % 10 == 0 and self.rows:
            rate = len(self.rows) * batch / max(time.time() - self.since, 1e-9)
            means = [f"{m:.6g}" for m in np.mean(self.rows, axis=0)]
            row = ",".join(map(str, [step, step * batch, *means, skipped, f"{rate:.1f}"]))
            whole = 0
            try:
                with open(self.path, "a", encoding="utf-8") as f:
                    whole = f.tell()
                    if whole == 0:  # somebody has deleted it
                        row = ",".join(self.columns) + "\n" + row
                    f.write(row + "\n")
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self.path, whole)  # part of a row may have been written
                raise
            self.rows, self.since = [], time.time()
            self.point(row.splitlines()[-1])

    def plot(self, path, now=True):
        """The terms of the loss over the steps, readable in black and white; unless `now`, at most
        once a minute: it takes the time of several steps."""
        if not now and time.time() - self.drawn < 60:
            return
        rows = self.points + ([np.mean(self.waiting, axis=0)] if self.waiting else [])
        if len(rows) < 2:
            return
        self.drawn = time.time()
        table = dict(zip(self.columns, np.stack(rows).T, strict=True))
        figure = files.figure(figsize=(7, 4))
        axes = figure.add_subplot()
        for term, style in zip(self.terms, ("k-", "k:", "k--"), strict=False):
            if table[term].any():
                label = dict(sa="L_SA").get(term, f"L_{term}")
                axes.plot(table["step"], table[term], style, lw=0.8, label=label)
        axes.set(xlabel="step", ylabel="loss, mean over pixels", yscale="log")
        axes.legend()
        figure.tight_layout()
        files.save_figure(path, figure)


# ------------------------------------------------------------------ training

class Model:
    """What a checkpoint holds: the weights, their average, the optimizer, and how far they are."""

    def __init__(self, s, device, checkpoint=None, dataset=None):
        torch.manual_seed(s["seed"])  # the same start on every process, before DDP compares them
        self.task = tasks.choose(s, checkpoint, dataset)
        self.net = self.task.net.to(device)
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=s["lr"], betas=(0.9, s["beta2"]), fused=True)
        self.step = self.skipped = 0
        if checkpoint:
            files.load_weights(self.net, checkpoint["raw"], s["name"])
            files.load_weights(self.ema, checkpoint["ema"], s["name"])
            files.load_moments(self.optimizer, checkpoint["optimizer"], s["name"])
            self.step, self.skipped = checkpoint["step"], checkpoint["skipped"]

    def size(self):
        """Bytes of a checkpoint: the weights, their average, and Adam's two moments of what is
        trained."""
        moments = 2 * [p for p in self.net.parameters() if p.requires_grad]
        return files.size_of([self.net.state_dict(), self.ema.state_dict(), moments])

    def state(self):
        """From the bare modules: names that DDP or compile prefixed would fit nowhere else."""
        return dict(raw=self.net.state_dict(), ema=self.ema.state_dict(), step=self.step,
                    optimizer=self.optimizer.state_dict(), skipped=self.skipped,
                    extra=self.task.extra)


def draw(s, task, step, device):
    """The random numbers of one step, for the whole global batch: flips (B,) or None, and the
    task's own, {name: (B, ...)}."""
    g = runtime.generator(s["seed"], step)
    flips = (torch.rand(s["batch_size"], generator=g) < 0.5).to(device) if s["flip"] else None
    # Large noises are made where they are needed; small numbers on the CPU, alike everywhere.
    other = g if device.type == "cpu" else runtime.generator(s["seed"], step, device=device)
    return flips, task.draw(g, other, s["batch_size"])


def gradients(trained, task, s, images, numbers, precision):
    """Forward and backward over this process's images (b, C, H, W), float, microbatch by
    microbatch; returns the means [loss, *task.columns].

    Each part counts by its share of b, and DDP averages over processes that have b images each:
    the gradient is that of the mean over the global batch.
    """
    micro, totals = min(s["microbatch"] or len(images), len(images)), 0.0
    for start in range(0, len(images), micro):
        part = slice(start, start + micro)
        share = len(images[part]) / len(images)
        # DDP sends gradients round in backward(): once is enough, with the last part.
        accumulating = isinstance(trained, DistributedDataParallel) and start + micro < len(images)
        with trained.no_sync() if accumulating else runtime.nothing():
            with torch.autocast(images.device.type, precision, enabled=precision is not None):
                loss, terms = task.losses(trained, images[part],
                                          {k: v[part] for k, v in numbers.items()})
            means = [v.mean() for v in (loss, *(terms[name] for name in task.columns))]
            (means[0] * share).backward()
        totals = totals + share * torch.stack(means).detach()
    return totals.double().tolist()


def one_step(model, trained, s, process, images, precision):
    """Draw, forward, backward, update; or, where a number is not finite, no update, and counted.
    Returns (loss, *terms, gradient norm), means over all processes."""
    b = s["batch_size"] // process.world
    mine = slice(process.rank * b, (process.rank + 1) * b)
    flips, numbers = draw(s, model.task, model.step, process.device)
    images = data.to_float(images.to(process.device, non_blocking=True))
    if flips is not None:
        images = torch.where(flips[mine, None, None, None], images.flip(-1), images)
    torch.manual_seed(runtime.mix(s["seed"], model.step, process.rank))  # dropout

    model.optimizer.zero_grad(set_to_none=True)
    values = gradients(trained, model.task, s, images, {k: v[mine] for k, v in numbers.items()},
                       precision)
    values = [v / process.world for v in process.sum(*values)]
    norm = float(torch.nn.utils.clip_grad_norm_(model.net.parameters(), s["grad_clip"] or math.inf))
    # The same on all processes, since DDP has averaged. A loss can overflow where its gradient,
    # twice the residual, does not: both count.
    if all(map(math.isfinite, (*values, norm))):
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
    micro = min(s["microbatch"] or b, b)
    process.say(f"network: {sum(p.numel() for p in model.net.parameters()):,} parameters, "
                f"{'bf16' if precision else 'fp32'} on {process.device.type}\n"
                f"batch: {s['batch_size']} = {micro} at a time x {-(-b // micro)} accumulated x "
                f"{process.world} processes; steps {model.step} to {total}")
    log = Log(folder, model.step, model.task.columns) if process.first else None
    stream = data.batches(dataset, s["batch_size"], model.step * s["batch_size"], s["seed"],
                          process.rank, process.world, s["workers"])
    bar = tqdm(total=total, initial=model.step, unit="step", disable=not process.first,
               dynamic_ncols=True, mininterval=0.5)
    # model.step alone says where the run is: the stream of images begins there, and the random
    # numbers of a step follow from it. That is all that resuming takes.
    model.net.train()
    stop.gently = True  # from here on there is something to save
    bad, saved, began, begun_at = 0, model.step, time.time(), model.step
    while model.step < total:
        # A signal breaks off the wait for images: a file on a dead disk may never come.
        images = unless_stopped(stop, next, stream)
        asked, = process.sum(images is None)  # all stop at the same step
        if not asked:
            values = one_step(model, trained, s, process, images, precision)
            bad = 0 if all(map(math.isfinite, values)) else bad + 1
        done = asked or model.step == total
        if process.first and not asked:
            attempt(bar, "log.csv", log.add, model.step, s["batch_size"], values, model.skipped)
            rate = (model.step - begun_at) * s["batch_size"] / (time.time() - began)
            bar.set_postfix_str(f"loss {values[0]:.4f}, {rate:.0f} images/s", refresh=False)
            bar.update()
        if bad == BAD_STEPS:
            bar.close()
            raise ValueError(f"the last {bad} losses or gradients were not finite, up to step "
                             f"{model.step}; "
                             f"{kept(folder, saved)}: try --precision fp32, a lower --lr, or "
                             "--grad-clip 1")
        # A checkpoint is not made of a step that went wrong: the one before is the better place to
        # go back to.
        if ((model.step % s["save_every"] == 0 and not bad) or done) and saved < model.step:
            # ... nor of weights that an update has broken: the loss of its step says nothing of it.
            if not (files.finite(model.net.state_dict()) and files.finite(model.ema.state_dict())):
                bar.close()
                raise ValueError(f"after step {model.step} weights are not finite; "
                                 f"{kept(folder, saved)}: try a lower --lr")
            failed = process.first_does(attempt, bar, "checkpoint.pt", save, folder, s, process,
                                        dataset, model)
            if failed and done:
                bar.close()
                raise OSError(f"step {model.step} could not be saved ({failed}); "
                              f"{kept(folder, saved)}: make room and run the same command again")
            saved = saved if failed else model.step
            if process.first and not failed:
                bar.write(f"step {model.step}: saved {(folder / 'checkpoint.pt').resolve()}")
                attempt(bar, "loss.png", log.plot, folder / "loss.png", done)
        # Grids come from the averaged weights: those are what sample.py will use. The others wait
        # for rank 0, however long a grid takes.
        if not asked and (model.step % s["sample_every"] == 0 or done):
            path = folder / "samples" / f"{model.step:07d}.png"
            process.first_does(unless_stopped, stop, attempt, bar, "a sample grid", picture, model,
                               dataset, path, process.device)
        if asked:
            break
    bar.close()


def unless_stopped(stop, work, *inputs):
    """work(*inputs), or None if a signal has come or breaks it off: the loop will stop and save."""
    stop.gently = False
    try:
        return None if stop.asked else work(*inputs)
    except runtime.Interrupted:
        return None
    finally:
        stop.gently = True


def attempt(bar, what, work, *inputs):
    """work(*inputs) -> None; if the disk does not take it, or there is nothing to show, a warning
    and the reason, a string. A run of weeks does not end because a disk is full for an hour."""
    try:
        work(*inputs)
    except (OSError, ValueError) as error:
        bar.write(f"warning: {what} was not written ({error})")
        return str(error)


def kept(folder, step):
    """What there is to go back to, in words."""
    have = f"the last checkpoint is of step {step}" if step else "there is no checkpoint"
    return f"{have} in {folder.resolve()}"


def save(folder, s, process, dataset, model):
    """checkpoint.pt: all that it takes to go on, or to sample."""
    files.save_checkpoint(folder / "checkpoint.pt", {
        "settings": s, "processes": process.world, "dataset": len(dataset),
        "digest": dataset.digest, **model.state()})


def images_changed(checkpoint, dataset):
    """What to say if these are not the images that the run has seen so far; else None. Where they
    lie does not matter."""
    before, now = checkpoint["dataset"], len(dataset)
    if before != now:
        return (f"{before:,} images before, {now:,} now: their order changes from here on. Give "
                "another --name to keep the two apart")
    if checkpoint.get("digest", dataset.digest) != dataset.digest:  # older checkpoints have none
        return ("these images are not those of before, though as many: the run goes on with them. "
                "Give another --name to keep the two apart")
    return None


def picture(model, dataset, path, device):
    """The task's grid from the averaged weights, always of the same noises and images."""
    side = 8 if dataset[0].shape[-1] <= 64 else 4
    images = torch.stack([dataset[i] for i in range(min(side**2, len(dataset)))]).to(device)
    shown, together = model.task.pictures(model.ema, images)
    columns = max(1, round(len(shown)**0.5 / together)) * together
    with files.atomic_write(path) as temporary:
        data.grid(shown, columns).save(temporary, format="png")


def main(argv=None):
    args = parse(argv)
    s = resolve(args)
    with (runtime.Stop() as stop,
          runtime.setup(deterministic=s["deterministic"], timeout=runtime.TIMEOUT) as process):
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
                        f"To use it: {tasks.next_command(s)}")
            return
        dropout = s.get("unet", {}).get("dropout")
        if checkpoint and checkpoint["processes"] != process.world and dropout:
            process.say(f"note: {checkpoint['processes']} processes before, {process.world} now: "
                        "dropout draws other numbers from here on; all else stays the same")
        # ---- the images
        dataset = process.first_then_all(lambda: data.load(
            s["data"], s["image_size"], s["channels"], s["seed"], s["skip_bad_images"],
            progress=process.first))
        process.say(f"data: {dataset.summary}")
        if checkpoint and process.first and (note := images_changed(checkpoint, dataset)):
            process.say(f"note: {note}")
        for note in notes(args, s, dataset, process.world):
            process.say(f"note: {note}")
        # ---- the network, and training
        model = Model(s, process.device, checkpoint, dataset)
        if checkpoint and process.first and (note := tasks.start_changed(model.task)):
            process.say(f"note: {note}")
        checkpoint = None  # on large networks it is gigabytes
        process.first_does(make_folder, folder, s, process, model)
        loop(s, process, folder, dataset, model, stop)
        if model.skipped:
            process.say(f"note: {model.skipped} of {model.step} steps were skipped: a loss or a "
                        "gradient was not finite")
        if model.step < total:
            where = (f"at step {model.step} of {total}, saved in {folder.resolve()}"
                     if model.step else "before the first step")
            process.say(f"stopped by {stop.asked or 'another process'} {where}. Run the same "
                        "command to go on.")
        else:
            process.say(f"done: {folder.resolve()} has checkpoint.pt, log.csv, loss.png, samples/\n"
                        f"next: {tasks.next_command(s)}")


if __name__ == "__main__":
    runtime.forgive_output()
    runtime.run_program(main)
