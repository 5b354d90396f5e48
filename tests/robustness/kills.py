"""Kill training, sampling and measuring at random moments, and see that nothing is lost.

    python tests/robustness/kills.py --kills 40     # minutes; test_kills.py is the short form
    python tests/robustness/kills.py --kills 200 --seed 7
    python tests/robustness/kills.py --threads      # a thread writes checkpoints, as on a GPU

Faults: SIGKILL, SIGTERM and SIGINT from outside at random times; from inside, the process kills
itself in the middle of writing a file, before the flush, before the rename and after it; and a disk
that takes no more bytes (a limit that the system enforces: write() fails, as on a full disk), for
one save or for good.

After each fault: the checkpoint can be read, is no older than the one before, and at most one
temporary file is left (of pictures, one for each of a batch: threads write them at the same time),
which the next start removes. At the end:
weights, average and optimizer bit for bit those of an undisturbed run; every picture whole, and
equal to that of an undisturbed call.

The programs run in processes of their own, which a server forks: it has imported torch already,
which takes longer than all else. The network is small, for the same reason.

Not here: power cuts. They also lose what the system has not written yet; that the bytes are flushed
before the rename is checked here only by their order.
"""

import argparse
import collections
import contextlib
import importlib
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

for folder in Path(__file__).resolve().parents[1:3]:  # of conftest.py, and of the project
    sys.path.insert(0, str(folder))

import conftest  # noqa: E402  (before torch)  # isort: skip
import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import unet  # noqa: E402
from support import checkpoint, files, programs  # noqa: E402
from support import run as run_folder  # noqa: E402

INSIDE = ("half", "flush", "rename", "renamed", "full", "full for good", "term while saving")
OUTSIDE = ("SIGKILL", "SIGTERM", "SIGINT")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "scipy.linalg", "matplotlib"])


# ------------------------------------------------------------------ the process that fails


def die():
    """As the kernel kills, or a cluster."""
    os.kill(os.getpid(), signal.SIGKILL)


def arm(kind, nth, pattern):
    """Prepare this process to fail at its nth write of a file that matches `pattern`."""
    real, seen = files.atomic_write, []

    @contextlib.contextmanager
    def spoilt(path, *rest, **more):
        """files.atomic_write, with one fault in it."""
        now = False
        if re.search(pattern, Path(path).name):
            seen.append(path)
            now = len(seen) == nth or kind == "full for good" and len(seen) >= nth
        if now and kind in ("half", "full", "full for good"):
            # bytes: somewhere inside a checkpoint, or inside a picture of 8 × 8
            limit = 1000 + nth * 997 % 9000 if "checkpoint" in pattern else 50 + nth * 37 % 150
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if now and kind == "flush":
            os.fsync = lambda f: die()
        if now and kind == "rename":
            os.replace = lambda a, b: die()
        if now and kind == "term while saving":
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            with real(path, *rest, **more) as temporary:
                yield temporary
        finally:
            if now and kind == "renamed":
                die()
            if now and kind == "full":
                resource.setrlimit(resource.RLIMIT_FSIZE, 2 * (resource.RLIM_INFINITY,))

    if kind in ("half", "full", "full for good"):  # the system's own way to stop a writer
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kind == "half" else signal.SIG_IGN)
    for module in list(sys.modules.values()):  # wherever it was imported to
        if getattr(module, "atomic_write", None) is real:
            module.atomic_write = spoilt


def victim(folder, program, kind, nth, pattern, threads, words):
    """Run a program of ours in this process, with a fault prepared, if there is a `kind`."""
    os.chdir(folder)
    with open("output.txt", "w") as log:  # on the full disk, too
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    sys.argv = [f"{program}.py", *words]
    module = importlib.import_module(program)
    unet.PRESETS["tiny"].update(conftest.NARROW)
    run_folder.in_thread = lambda device: threads
    if kind:
        arm(kind, nth, pattern)
    if program == "train":
        programs.ignore_write_errors()  # as its last lines do
    programs.run_main(module.main)


# ------------------------------------------------------------------ what makes it fail


class Run:
    """One command, started again and again in one folder, with a fault each time."""

    def __init__(self, folder, program, words, pattern, dice, threads=False):
        self.folder, self.program, self.words = Path(folder), program, list(map(str, words))
        self.pattern, self.dice, self.faults = pattern, dice, collections.Counter()
        self.slowest, self.threads = 0.0, threads

    def start(self, kind=None, nth=1):
        """The process; with a fault of INSIDE in it, or none."""
        (self.folder / "output.txt").unlink(missing_ok=True)
        fault = kind, nth, self.pattern, self.threads
        process = SERVER.Process(
            target=victim, args=(self.folder, self.program, *fault, self.words)
        )
        process.start()
        return process

    def output(self):
        path = self.folder / "output.txt"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, process, words):
        """Until the process prints these words, or ends."""
        until = time.time() + 120
        while not re.search(words, self.output()) and process.is_alive():
            assert time.time() < until, f"no {words!r} in two minutes:\n{self.output()}"
            time.sleep(0.005)

    def end(self, process, seconds):
        """The exit status, as of subprocess: -9 after SIGKILL."""
        process.join(seconds)
        assert process.exitcode is not None, f"still there after {seconds} s:\n{self.output()}"
        return process.exitcode

    def outside(self, name, ready, most):
        """A signal up to `most` seconds after the process has printed `ready`, or before -> whether
        it came in time."""
        process = self.start()
        early = self.dice.random() < 0.1
        if early:
            time.sleep(self.dice.random())
        else:
            self.wait_for(process, ready)
            time.sleep(self.dice.random() * most)
        began = time.time()
        os.kill(process.pid, getattr(signal, name))
        status = self.end(process, 60)
        self.slowest = max(self.slowest, time.time() - began if name == "SIGTERM" else 0)
        return self.judge(name, status)

    def inside(self, kind, nth):
        """A fault of INSIDE at the nth write of such a file -> whether it came."""
        process = self.start(kind, nth)
        if kind == "full" and self.program == "train":  # it goes on, and saves again; then it dies
            self.wait_for(process, r"was not written(.|\n)*: saved")
            process.kill()
        return self.judge(kind, self.end(process, 300))

    def judge(self, kind, status):
        """Check how it ended -> False if it had finished before. AssertionError: a wrong end."""
        text = self.output()
        done = bool(re.search("done:|is finished|grid:|statistics in", text))
        training = self.program == "train" and "run:" in text  # from there on signals are expected
        if done:
            good = status == 0 or kind in OUTSIDE
        elif kind == "term while saving" or training and kind in ("SIGTERM", "SIGINT"):
            name = "SIGINT" if kind == "SIGINT" else "SIGTERM"
            good = status == 0 and f"stopped by {name}" in text and "The same command" in text
        elif kind == "full for good" or kind == "full" and self.program != "train":
            good = status == 2 and "Traceback" not in text
        elif kind in OUTSIDE:
            good = "stopped by" in text and status == 0
            good = good or status in (-getattr(signal, kind), 130, 1)
        else:
            good = status == -(signal.SIGXFSZ if kind == "half" else signal.SIGKILL)
        assert good, (kind, status, text[-2000:])
        self.faults[kind] += not done
        return not done

    def finish(self):
        """Run it to its end, unharmed."""
        assert self.end(self.start(), 600) == 0, self.output()
        assert not self.leftovers()

    def leftovers(self):
        return [p for p in self.folder.rglob("*") if p.name.endswith((".tmp", ".part"))]

    def attack(self, kinds, ready, most, check, left=1, writes=4):
        """One fault after the other; after each, check(kind, came), and at most `left` temporary
        files. Then to the end."""
        for kind in kinds:
            if kind in OUTSIDE:
                came = self.outside(kind, ready, most)
            else:
                came = self.inside(kind, self.dice.randint(1, writes))
            assert len(self.leftovers()) <= left, self.leftovers()
            check(kind, came)
        self.finish()


def kill_training(folder, kills, seed, threads=False):
    """-> (faults by kind, seconds that the slowest SIGTERM took, steps). threads: a thread writes
    the checkpoints of the run that is killed."""
    steps, dice = 20 * kills + 40, random.Random(seed)
    words = [*conftest.TINY, "--steps", steps, "--save-every", 3, "--sa-k", 2, "--name"]
    names = "whole", "killed-by-thread" if threads else "killed"
    whole, path = (Path(folder) / "runs" / name / "checkpoint.pt" for name in names)
    if not whole.exists():
        Run(folder, "train", [*words, names[0]], "", dice).finish()
    run = Run(folder, "train", [*words, names[1]], r"^checkpoint\.pt$", dice, threads)
    seen = []

    def check(kind, came):
        if path.exists():
            seen.append(checkpoint.load_checkpoint(path)["step"])
        assert seen == sorted(seen), (kind, seen)
        assert came, "finished before it could be killed: give it more steps"

    run.attack(([*OUTSIDE, *INSIDE] * (1 + kills // 10))[:kills], "step/s", 0.15, check)
    one, two = map(checkpoint.load_checkpoint, (whole, path))
    assert one["step"] == two["step"] == steps and one["skipped"] == two["skipped"] == 0
    conftest.assert_same(one, two)
    rows = (path.parent / "log.csv").read_text().splitlines()
    assert len({row.count(",") for row in rows}) == 1, "torn rows"
    return run.faults, run.slowest, steps


def read_pictures(folder):
    """All images of a folder, every byte read: (N, H, W, C)."""
    paths = sorted(folder.glob("[0-9]*.png"))
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in paths])


def kill_sampling(folder, kills, seed):
    """sample.py --npz of the run that kill_training left -> faults by kind."""
    dice, batch, name = random.Random(seed), 3, f"cut{seed}"
    words = ["killed", "-n", 40 * kills, "--nfe", 20, "--batch-size", batch, "--sampler", "ddpm"]
    words += ["--npz", "--out"]
    Run(folder, "sample", [*words, "whole"], "", dice).finish()
    run = Run(folder, "sample", [*words, name], r"^(\d+|cut\d+)\.(png|npz)$|^settings", dice)
    out, seen = run.folder / name, []

    def check(kind, came):
        paths = list(out.glob("[0-9]*.png"))
        seen.append(len(paths))
        assert seen == sorted(seen)
        for path in paths:
            Image.open(path).load()  # raises if it is cut

    kinds = (*OUTSIDE, "half", "flush", "rename", "renamed", "full")
    kinds = [kinds[(i * 3 + seed) % len(kinds)] for i in range(kills)]
    run.attack(kinds, "run:", 0.15, check, left=batch)  # a thread for each picture of a batch
    whole, cut = read_pictures(run.folder / "whole"), read_pictures(out)
    assert whole.shape == cut.shape and abs(whole - cut).max() <= 1
    with np.load(run.folder / f"{name}.npz") as packed:
        np.testing.assert_array_equal(packed["arr_0"], cut)
    return run.faults


def export_features(path):
    """A file for --features: of images of 8 × 8."""
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 12, 3, stride=2), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1)
    network = torch.nn.Sequential(
        *layers, torch.nn.Flatten()
    ).eval()  # without weights of Inception
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    zeros = (torch.zeros(2, 3, 8, 8),)
    torch.export.save(torch.export.export(network, zeros, dynamic_shapes=sizes), path)


def kill_statistics(folder, kills, seed):
    """metrics.py stats -> faults by kind."""
    dice = random.Random(seed)
    export_features(Path(folder) / "features.pt2")
    words = ["-n", 3000, "--image-size", 8, "--features", "features.pt2"]
    Run(folder, "metrics", ["stats", "shapes", "statistics.npz", *words], "", dice).finish()
    run = Run(folder, "metrics", ["stats", "shapes", "killed.npz", *words], r"killed\.npz", dice)

    def check(*how):
        """The statistics are absent, or whole: those of an unkilled call."""
        if how and not (run.folder / "killed.npz").exists():
            return
        with (
            np.load(run.folder / "statistics.npz") as one,
            np.load(run.folder / "killed.npz") as two,
        ):
            assert one.files == two.files
            for name in one.files:
                np.testing.assert_array_equal(one[name], two[name])

    kinds = ("half", "SIGKILL", "rename", "full", "SIGTERM", "flush", "renamed")
    kinds = [kinds[i % len(kinds)] for i in range(kills)]
    run.attack(kinds, "shapes", 0.5, check, writes=1)
    check()
    return run.faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="of the training (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", action="store_true", help="threads write checkpoints")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faults, slowest, steps = kill_training(folder, args.kills, args.seed, args.threads)
        print(f"training, {steps} steps: {faults.total()} faults survived, {dict(faults)}")
        print(f"  weights bit for bit; the slowest SIGTERM took {slowest:.1f} s")
        faults = kill_sampling(folder, max(args.kills // 4, 2), args.seed)
        print(f"sampling: {faults.total()} survived, {dict(faults)}")
        faults = kill_statistics(folder, max(args.kills // 4, 2), args.seed)
        print(f"statistics: {faults.total()} survived, {dict(faults)}", flush=True)


if __name__ == "__main__":
    main()
