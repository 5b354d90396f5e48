r"""A run is a folder runs/NAME: locked, resumed, logged and saved, each by one line of the loop.

    run = RunFolder(name, dist, stop)
    saved = run.open(settings, may_change)     # the checkpoint to resume, or None
    run.create(settings, ...)                  # the folder and config.json, once nothing is wrong
    run.log(step, values, skipped)             # log.csv, every tenth step, and the progress bar
    run.save(state, final)                     # checkpoint.pt and loss.png
    run.save_preview(state, dataset)           # samples/STEP.png

A run of weeks does not end because a disk is full for an hour: what cannot be written gives a
warning, and the run goes on. Only the last checkpoint must be written. Rank 0 writes; the others
wait for it. On a GPU, training goes on while a thread of rank 0 writes a copy of the checkpoint.

Not here: what is trained (train.py), or the format of a checkpoint (checkpoint.py).

    python -c "from support import run; print(run.PLOT_POINTS)"
"""

import contextlib
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support import checkpoint, files
from support.images import grid
from support.optimizers import rate_factor

PLOT_POINTS = 500  # of a curve in loss.png: this many, to twice as many


def in_thread(device):
    """True if checkpoints are written by a thread. On a CPU it would take a core from training."""
    return device.type == "cuda"


class RunFolder:
    """The folder of one run. dist: distributed.Distributed; stop: programs.StopSignal.

    with RunFolder(...) as run: the folder stays locked until everything is written."""

    def __init__(self, name, dist, stop):
        self.folder, self.dist, self.stop = checkpoint.RUNS / name, dist, stop
        self.path = self.folder / "checkpoint.pt"
        self.saved_step, self.metadata = 0, {}
        self.writer, self.writing = ThreadPoolExecutor(1), None  # writing: (step, its Future)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.writer.shutdown()

    # ---- before training

    def open(self, settings, may_change):
        """Lock the folder -> its checkpoint, or None for a new run. ValueError: another run's."""
        if settings["batch_size"] % self.dist.world_size:
            raise ValueError(f"--batch-size {settings['batch_size']} is global and must be "
                             f"divisible by the {self.dist.world_size} processes")
        self.dist.on_main(self.claim)
        # Every process reads the checkpoint itself, to the CPU, before DDP exists: reading it on
        # one process and sending it round makes resumed runs hang.
        saved = checkpoint.load_checkpoint(self.path) if self.path.exists() else None
        if saved:
            if saved["format"] != checkpoint.FORMATS[-1]:
                raise ValueError(f"{self.folder} was trained by the first version of this program: "
                                 "it can be sampled, but not resumed. Give this run another --name")
            if missing := [k for k in ("dataset", "digest") if k not in saved]:
                raise ValueError(f"{self.path} is not a complete checkpoint of train.py: no "
                                 f"{missing[0]} in it. It can be sampled, but not resumed")
            refuse_other_settings(self.folder, saved["settings"], settings, may_change)
            self.saved_step = saved["step"]
        # This sum also waits: no process writes before all have read.
        if self.dist.any(self.saved_step != self.dist.broadcast(self.saved_step)):
            raise ValueError(f"{self.folder}: the processes see different checkpoints. All "
                             f"machines must share one folder {checkpoint.RUNS}/")
        return saved

    def claim(self):
        """Lock the folder, if it exists. ValueError: another process writes to it, or a file is in
        its place."""
        for place in (checkpoint.RUNS, self.folder, self.folder / "samples"):
            if place.exists() and not place.is_dir():
                raise ValueError(f"{place} should be a folder, and is a file: move it away")
        if self.folder.exists() and not self.dist.locks:
            self.dist.lock(self.folder, 20)  # seconds: a large process takes some to end

    def is_finished(self, saved, images, batch_size, next_command):
        """Print where the run stands. True: its checkpoint has seen all images."""
        total_steps, step = images // batch_size, saved["step"] if saved else 0
        self.dist.print0(f"run: {self.folder.resolve()}" + f", from step {step}" * bool(saved))
        if not saved or step < total_steps:
            return False
        seen = step * batch_size
        self.dist.print0(f"this run is finished, at step {step}. To train longer: --images "
                         f"{2 * seen} (at least {seen + batch_size}); to start again: another "
                         f"--name.\n"
                         f"next: {next_command}")
        return True

    def changes(self, saved, dataset, config):
        """Lines about what differs from the checkpoint, and makes the run continue differently."""
        lines = []
        if saved and saved["processes"] != self.dist.world_size and config.dropout:
            lines.append(f"{saved['processes']} processes before, {self.dist.world_size} now: "
                         "dropout uses other numbers from here on; all else stays the same")
        if saved and config.lr_decay != "none" and config.images != saved["settings"]["images"]:
            share = rate_factor(config, saved["step"])
            lines.append(f"the learning rate continues at {share * config.lr:.3g}, {share:.0%} of "
                         f"--lr: its decay ends at step {config.images // config.batch_size} now")
        if saved and config.init not in ("", saved["settings"].get("init")):
            lines.append(f"--init {config.init} has no effect: this run has weights. Another "
                         "--name starts a new run from it")
        if saved and saved["dataset"] != len(dataset):
            lines.append(f"{saved['dataset']:,} images before, {len(dataset):,} now: their order "
                         "changes from here on. Another --name keeps the two apart")
        elif saved and saved["digest"] != dataset.digest:
            lines.append("these are not the images from before, though as many: the run continues "
                         "with them. Another --name keeps the two apart")
        return lines

    def create(self, settings, state, optimizer, dataset):
        """Make the folder and its config.json: the settings, and the versions they ran with.

        state: what save() will get, for its size and step. optimizer: of what is trained. dataset:
        its length and digest are kept.
        """
        self.metadata = dict(settings=settings, processes=self.dist.world_size,
                             dataset=len(dataset), digest=dataset.digest)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.dist.on_main(self.make_folder, settings, state, checkpoint.count_bytes(trained))

    def make_folder(self, settings, state, trained_size):
        # The next checkpoint is written next to the last: there must be room for both.
        size, copies = checkpoint.count_bytes(state), 1 if self.path.exists() else 2
        if not state["step"]:  # Adam's two moments of what is trained come with the first step
            size += 2 * trained_size
        files.check_space(self.folder, size * copies)
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        self.claim()
        if state["step"] == 0 and self.path.exists():
            raise ValueError(f"{self.folder}: another process has started this run meanwhile. The "
                             "same command resumes it")
        for place in (self.folder, self.folder / "samples"):
            files.clean_stale(place)
        try:
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                                    encoding="utf-8", timeout=5,
                                    cwd=Path(__file__).parent).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            commit = ""
        ran_on = dict(torch=torch.__version__, numpy=np.__version__, commit=commit,
                      python=platform.python_version(), processes=self.dist.world_size,
                      device=self.dist.device.type, command=" ".join(sys.argv))
        files.write_text(self.folder / "config.json",
                         checkpoint.to_json({**settings, "ran_on": ran_on}))

    # ---- during training

    def start_log(self, step, total_steps, batch_size, loss_names):
        """Begin, or continue, log.csv and the progress bar at this step."""
        self.batch_size, self.first_step, self.began = batch_size, step, time.time()
        self.last_save = time.monotonic()
        self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True,
                        disable=not self.dist.is_main, mininterval=0.5)
        self.table = Log(self.folder, step, loss_names) if self.dist.is_main else None

    def log(self, step, values, skipped):
        """values: (loss, *terms, gradient norm) of this step."""
        if not self.dist.is_main:
            return
        self.attempt("log.csv", self.table.add, step, self.batch_size, values, skipped)
        rate = (step - self.first_step) * self.batch_size / (time.time() - self.began)
        self.bar.set_postfix_str(f"loss {values[0]:.4f}, {rate:.0f} images/s", refresh=False)
        self.bar.update()

    def is_late(self, minutes):
        """True if the last checkpoint, or the start, is so many minutes ago. 0: never."""
        return 0 < 60 * minutes <= time.monotonic() - self.last_save

    def save(self, state, final=False):
        """Write checkpoint.pt and loss.png. ValueError: weights that are not finite, which stay
        unsaved. OSError: the final checkpoint could not be written."""
        self.finish_writing()
        step, self.last_save = state["step"], time.monotonic()
        if step == self.saved_step:  # nothing new; or stopped before the first step
            return
        if not (checkpoint.all_finite(state["net"]) and checkpoint.all_finite(state["ema"])):
            raise ValueError(f"--lr: after step {step} the weights are not finite; "
                             f"{self.last_checkpoint()}. Try a lower --lr")
        content = {**self.metadata, **state}
        if in_thread(self.dist.device) and not final:
            self.writing = step, self.dist.is_main and self.writer.submit(
                self.write, checkpoint.snapshot(content))
        elif failed := self.dist.on_main(self.write, content):
            if final:
                raise OSError(f"{self.path}: step {step} could not be saved ({failed}); "
                              f"{self.last_checkpoint()}. Make room and run the same command again")
            return
        else:
            self.saved_step = step
        if self.dist.is_main:
            self.attempt("loss.png", self.table.plot, self.folder / "loss.png", final)

    def write(self, content):
        """Write checkpoint.pt on rank 0 -> None, or why it failed."""
        failed = self.attempt("checkpoint.pt", checkpoint.save_checkpoint, self.path, content)
        if not failed:
            self.bar.write(f"step {content['step']}: saved {self.path.resolve()}")
        return failed

    def finish_writing(self):
        """Wait for the thread that writes a checkpoint. All processes learn whether it failed."""
        if self.writing:
            (step, future), self.writing = self.writing, None
            if not self.dist.on_main(lambda: future.result()):
                self.saved_step = step

    def save_preview(self, state, dataset):
        """Write samples/STEP.png: samples of the averaged weights, which sample.py will use. A
        signal breaks it off; the other processes wait, however long it takes."""
        path = self.folder / "samples" / f"{state.step:07d}.png"

        def draw():
            side = 8 if dataset[0].shape[-1] <= 64 else 4
            images = torch.stack([dataset[i] for i in range(min(side**2, len(dataset)))])
            shown, group = state.objective.preview(state.ema, images.to(self.dist.device))
            files.save_png(path, grid(shown, max(1, round(len(shown) ** 0.5 / group)) * group))

        self.dist.on_main(lambda: self.stop.unless_requested(self.attempt, "a sample grid", draw))

    def attempt(self, what, work, *inputs):
        """work(*inputs) -> None. If the disk is full, or there is nothing to show: print a warning
        and return the reason."""
        try:
            work(*inputs)
        except (OSError, ValueError) as error:
            self.bar.write(f"warning: {what} was not written ({error})")
            return str(error)

    def last_checkpoint(self):
        """Which checkpoint exists, for a message. All processes must ask."""
        self.finish_writing()
        if not self.saved_step:
            return f"there is no checkpoint in {self.folder.resolve()}"
        return f"the last checkpoint is of step {self.saved_step}, in {self.folder.resolve()}"

    def print_end(self, step, skipped, next_command):
        """Print how training ended."""
        self.bar.close()
        if skipped:
            self.dist.print0(f"note: {skipped} of {step} steps were skipped: a loss or a gradient "
                             "was not finite")
        if step < self.bar.total:
            where = "before the first step"
            if step:
                where = f"at step {step} of {self.bar.total}, saved in {self.folder.resolve()}"
            self.dist.print0(f"stopped by {self.stop.requested or 'another process'} {where}. The "
                             "same command resumes it.")
        else:
            self.dist.print0(f"done: {self.folder.resolve()} has checkpoint.pt, log.csv, loss.png, "
                             f"samples/\nnext: {next_command}")


def refuse_other_settings(folder, old, new, may_change):
    """ValueError if a run's settings differ from those asked for. Those in may_change may."""
    old, new = (json.loads(checkpoint.to_json(settings)) for settings in (old, new))  # no tuples
    changed = [k for k in {**new, **old} if k not in may_change and old.get(k) != new.get(k)]
    if changed:
        text = ", ".join(f"{k} was {str(old.get(k))[:60]} and is now {str(new.get(k))[:60]}"
                         for k in changed[:3])
        raise ValueError(f"--name: {folder} is a run with other settings ({text}). Give this one "
                         "another --name")


class Log:
    """log.csv: every tenth step a row with the means over the ten; and its picture, loss.png.

    loss_names: the terms of the loss. If a write fails, rows are kept and averaged into the next.
    """

    def __init__(self, folder, step, loss_names):
        self.path, self.rows, self.since = folder / "log.csv", [], time.time()
        self.points, self.stride, self.pending = [], 1, []  # of loss.png
        self.loss_names, self.plotted = loss_names, 0.0  # when loss.png was drawn
        self.columns = ["step", "images", "loss", *loss_names, "grad_norm", "skipped",
                        "images_per_s"]
        lines = []
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        # Rows after `step` belong to steps that will be made again.
        kept = [x for x in lines if self.is_row(x) and int(x.split(",")[0]) <= step]
        files.write_text(self.path, "".join(x + "\n" for x in [",".join(self.columns), *kept]))
        for line in kept:
            self.add_point(line)

    def is_row(self, line):
        """False for what a power cut can leave."""
        row = line.split(",")
        return len(row) == len(self.columns) and row[0].isdecimal() and all(
            re.fullmatch(r"[-+.0-9e]+|inf|nan", word) for word in row)

    def add_point(self, line):
        """A row for the plot. Long runs keep means of `stride` neighbours, so that neither memory
        nor time grows with the run."""
        self.pending.append([float(word) for word in line.split(",")])
        if len(self.pending) == self.stride:
            self.points.append(np.mean(self.pending, axis=0))
            self.pending = []
        if len(self.points) == 2 * PLOT_POINTS:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2],
                                                       strict=True)]
            self.stride *= 2

    def add(self, step, batch_size, values, skipped):
        """values: (loss, *terms, gradient norm) of this step."""
        if math.isfinite(sum(values)):
            self.rows.append(values)
        if step % 10 or not self.rows:
            return
        rate = len(self.rows) * batch_size / max(time.time() - self.since, 1e-9)
        means = [f"{m:.6g}" for m in np.mean(self.rows, axis=0)]
        row = ",".join(map(str, [step, step * batch_size, *means, skipped, f"{rate:.1f}"]))
        length = 0
        try:
            with open(self.path, "a", encoding="utf-8") as f:
                length = f.tell()
                if length == 0:  # the file was deleted meanwhile
                    row = ",".join(self.columns) + "\n" + row
                f.write(row + "\n")
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, length)  # part of a row may have been written
            raise
        self.rows, self.since = [], time.time()
        self.add_point(row.splitlines()[-1])

    def plot(self, path, now=True):
        """The terms of the loss over the steps. Unless `now`, at most once a minute: drawing takes
        the time of several steps."""
        if not now and time.time() - self.plotted < 60:
            return
        rows = self.points + ([np.mean(self.pending, axis=0)] if self.pending else [])
        if len(rows) < 2:
            return
        self.plotted = time.time()
        table = dict(zip(self.columns, np.stack(rows).T, strict=True))
        figure = files.figure(figsize=(7, 4))
        axes = figure.add_subplot()
        for name, style in zip(self.loss_names, ("k-", "k:", "k--"), strict=False):
            if table[name].any():
                label = dict(sa="L_SA").get(name, f"L_{name}")
                axes.plot(table["step"], table[name], style, lw=0.8, label=label)
        axes.set(xlabel="step", ylabel="loss, mean over pixels", yscale="log")
        axes.legend()
        figure.tight_layout()
        files.save_figure(path, figure)


def settings_of(run, key):
    """The settings of the run that another starts from. If its folder was deleted: those that a run
    which started from it recorded in its config.json, under `key`. ValueError, OSError."""
    try:
        settings = checkpoint.load_checkpoint(checkpoint.find_checkpoint(run))["settings"]
        if not {"autoencoder", "unet"} & settings.keys():
            raise ValueError(f"{run}: its settings describe no network")
        return settings
    except FileNotFoundError:
        for path in sorted(checkpoint.RUNS.glob("*/config.json")):
            with contextlib.suppress(OSError, ValueError):
                settings = json.loads(path.read_text(encoding="utf-8"))
                if settings.get(key) == run:
                    return {k: v for k, v in settings.items() if k != "ran_on"}
        raise


def check_run_name(name):
    """ValueError for a --name that would lead out of runs/, or is hidden."""
    if Path(name).name != name or name[0] == "." or not name.isprintable():
        raise ValueError(f"--name {name!r} must be a plain name: runs go to {checkpoint.RUNS}/NAME")


def run_name(run):
    """The name of a run, however the path of its folder or checkpoint is written."""
    try:
        run = checkpoint.find_checkpoint(run)
    except FileNotFoundError:  # it was deleted
        pass
    path = Path(os.path.abspath(run))
    return path.parent.name if path.name == "checkpoint.pt" else path.name


def weights_changed(run, kept):
    """A line, in a list, if `run` has other averaged weights than `kept`, which a run that started
    from it holds; else an empty list."""
    try:
        now = checkpoint.load_checkpoint(checkpoint.find_checkpoint(run))["ema"]
    except FileNotFoundError:
        return []
    if all(name in kept and torch.equal(kept[name].cpu(), now[name]) for name in now):
        return []
    return [f"{run} has other weights than this run began with, and it keeps those. Another --name "
            "starts from the new ones"]
