"""What happens to long runs: full disks, damaged files, numbers that go wrong, signals at any time.

kills.py does the same to whole processes, from outside.
"""

import ast
import contextlib
import csv
import errno
import os
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NARROW, ROOT, TINY, assert_same, refused, run_program, saved, small
from image_writers import folder_of
from torch.testing import assert_close

import data
import denoiser
import losses
import sample
import train
import unet
from support import checkpoint, distributed, files, image_files
from support import run as run_folder

PATH = Path("runs/small/checkpoint.pt")
pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture(scope="module", autouse=True)
def wide():
    """The tests train a narrow network -> the sizes of the true one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(unet.PRESETS, "tiny", (size := unet.PRESETS["tiny"]) | NARROW)
        yield size


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The checkpoint of a run of one step."""
    folder = tmp_path_factory.mktemp("made")
    with contextlib.chdir(folder):
        small("--steps", "1")
    return folder / PATH


@pytest.fixture
def run(made):
    """The same, as runs/small here."""
    PATH.parent.mkdir(parents=True)
    return Path(shutil.copy(made, PATH.parent))


@pytest.fixture(params=[False, True], ids=["at once", "by a thread"])
def writer(request, monkeypatch):
    """Checkpoints are written at once, as on a CPU, or by a thread, as on a GPU."""
    monkeypatch.setattr(run_folder, "in_thread", lambda device: request.param)


def spoil(monkeypatch, change, calls=None):
    """Replace L_simple by change(L_simple) in these calls of the loss (1, 2, ...; None: all)."""
    real, seen = losses.sa_loss, []

    def spoilt(*args, **kwargs):
        seen.append(1)
        simple, sa = real(*args, **kwargs)
        return change(simple) if calls is None or len(seen) in calls else simple, sa

    monkeypatch.setattr(losses, "sa_loss", spoilt)


# ------------------------------------------------------------------ numbers


class InfiniteGradient(torch.autograd.Function):
    """x -> x, with a gradient of ∞."""

    forward = staticmethod(lambda ctx, x: x.clone())
    backward = staticmethod(lambda ctx, g: g * float("inf"))


FAULTS = {
    "loss": lambda x: x * float("nan"),
    "gradient": InfiniteGradient.apply,
    "overflow": lambda x: x + float("inf"),  # its gradient is finite
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    fault, precision, monkeypatch, no_grids, capsys
):
    spoil(monkeypatch, FAULTS[fault], {2, 3})
    found = small("--steps", "5", "--save-every", "1", "--precision", precision)
    assert found["skipped"] == 2 and found["step"] == 5
    assert "note: 2 of 5 steps were skipped" in capsys.readouterr().out
    states = found["optimizer"]["state"].values()
    assert all(map(checkpoint.all_finite, (found["net"], found["ema"], *states)))
    assert all(state["step"] == 3 for state in states)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_run_stops_if_no_step_is_finite(precision, monkeypatch, no_grids):
    words = ["--save-every", "2", "--precision", precision, "--steps"]
    monkeypatch.setattr(run_folder, "in_thread", lambda device: precision == "bf16")
    small(*words, "4")
    good = PATH.read_bytes()
    spoil(monkeypatch, FAULTS["overflow"])
    message = "^--lr: the last 25 losses or gradients were not finite, up to step 29; the last "
    refused(message + "checkpoint is of step 4, in .*--precision fp32", small, *words, "60")
    assert PATH.read_bytes() == good
    PATH.unlink()
    refused("there is no checkpoint in", small, *words, "60")
    assert not PATH.exists()


def test_weights_that_an_update_has_broken_are_not_saved(no_grids):
    """The loss of a step does not show what its own update does."""
    small("--steps", "2", "--grad-clip", "0")
    good = PATH.read_bytes()
    words = ["--steps", "3", "--lr", "1e308", "--grad-clip", "0"]
    refused("after step 3 .* not finite; .* of step 2,.*lower --lr", small, *words)
    assert PATH.read_bytes() == good


def test_samples_that_are_not_finite_become_no_pictures(run):
    """As uint8 they would be black."""
    found = checkpoint.load_checkpoint(run)
    for value in found["ema"].values():
        value.mul_(1e30)
    checkpoint.save_checkpoint(run, found)
    refused("samples are not finite", sample.main, "small -n 2 --nfe 3".split())
    assert not list(Path("runs/small").rglob("0*.png"))


# ------------------------------------------------------------------ disks


@contextlib.contextmanager
def full_disk(size):
    """No file grows beyond this size: a limit that the system enforces."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_torch_on_a_full_disk_is_an_oserror(run):
    """torch's writer makes a RuntimeError of it."""
    before = run.read_bytes()
    with full_disk(50_000), pytest.raises(OSError) as info:
        checkpoint.save_checkpoint(run, dict(net=torch.zeros(100_000)))
    assert info.value.errno == errno.EFBIG
    assert os.listdir(run.parent) == ["checkpoint.pt"] and run.read_bytes() == before


@pytest.mark.parametrize("until", [3, 10**9])
def test_a_full_disk_ends_a_run_only_if_it_stays_full(until, writer, monkeypatch, capsys, no_grids):
    """From the second check of its room (the first is at the start) to this one."""
    small("--steps", "2")
    calls = []

    def no_room(folder, size):
        calls.append(size)
        if 1 < len(calls) <= until:
            raise OSError(errno.ENOSPC, "No space left on device")

    for module in (files, checkpoint):
        monkeypatch.setattr(module, "check_space", no_room)
    words = ["--steps", "10", "--save-every", "2"]
    if until == 3:
        assert small(*words)["step"] == 10 and len(calls) == 1 + 4
        text = capsys.readouterr()
        assert (text.out + text.err).count("warning: checkpoint.pt was not written") == 2
    else:
        last = "^runs/small/checkpoint.pt: step 10 could not be saved.*last checkpoint is of step "
        assert isinstance(refused(last + "2,.*Make room", small, *words), OSError)
        assert saved()["step"] == 2


def test_training_goes_on_while_a_thread_writes(monkeypatch, no_grids):
    """The file holds the step at which it was saved, not the one at which it was written."""
    monkeypatch.setattr(run_folder, "in_thread", lambda device: True)
    save, log, later, seen = checkpoint.save_checkpoint, run_folder.RunFolder.log, [], []

    def slow(path, content):
        until = time.time() + 30
        while content["step"] == 2 and not later and time.time() < until:
            time.sleep(0.01)
        save(path, content)
        seen.append(checkpoint.load_checkpoint(path))

    def count(self, step, *others):
        later.extend([step] * (step == 4))
        log(self, step, *others)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    monkeypatch.setattr(run_folder.RunFolder, "log", count)
    small("--steps", "5", "--save-every", "2")
    assert later and [found["step"] for found in seen] == [2, 4, 5]
    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    assert_same(seen[0], small("--steps", "2", name="two"))


def test_a_failing_run_waits_for_the_thread_and_keeps_its_lock(monkeypatch, no_grids):
    monkeypatch.setattr(run_folder, "in_thread", lambda device: True)
    save, held = checkpoint.save_checkpoint, []

    def slow(path, content):
        time.sleep(0.5)
        with distributed.Distributed(0, 1, 0, torch.device("cpu")) as other:
            with pytest.raises(ValueError, match="another process is writing to it"):
                other.lock(path.parent, 0)
        held.append(content["step"])
        save(path, content)

    def broken(value):
        raise OSError("broken")

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow)
    spoil(monkeypatch, broken, {4})
    with pytest.raises(OSError, match="broken"):
        small("--steps", "9", "--save-every", "3")
    assert held == [3] and saved()["step"] == 3


@pytest.mark.parametrize("minutes, count", [("1e-9", 3), ("0", 1), ("60", 1)])
def test_a_checkpoint_is_also_written_after_so_many_minutes(minutes, count, capsys, no_grids):
    small("--steps", "3", "--save-every", "99", "--save-minutes", minutes)
    text = capsys.readouterr()
    assert (text.out + text.err).count(": saved ") == count


def test_the_start_checks_that_two_checkpoints_fit(wide, monkeypatch, no_grids):
    """The new one is written next to the old one: 18 MB each. Known before Adam has its moments."""
    monkeypatch.setitem(unet.PRESETS, "tiny", wide)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "check_space", lambda folder, size: asked.append(size))
        small("--steps", "1")
    assert abs(asked[0] / 2 / os.path.getsize(PATH) - 1) < 0.03
    shutil.rmtree("runs")
    usage = type("Usage", (), dict(free=30_000_000))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    refused("36.* MB are needed and 30.0 MB are free", small, "--steps", "2")
    assert not os.path.exists("runs")


# ------------------------------------------------------------------ files


def test_a_checkpoint_cut_anywhere_or_with_a_flipped_bit_is_one_line(run, no_grids):
    """torch.load would accept the bit: it does not compare the checksums that torch.save writes."""
    good, found = run.read_bytes(), saved()
    for share in (0, 1e-5, 0.001, 0.3, 0.7, 0.999, 0.99999):
        run.write_bytes(good[: int(share * len(good))])
        refused("not a checkpoint of train.py", checkpoint.load_checkpoint, run)
    adam = found["optimizer"]["state"][0]["exp_avg"]
    for tensor in (found["net"]["out_conv.bias"], found["ema"]["out_conv.bias"], adam):
        place = good.index(tensor.numpy().tobytes())
        run.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        refused("is damaged: .* does not have its checksum", small, "--steps", "2")
    run.write_bytes(good)
    assert small("--steps", "2")["step"] == 2


DAMAGES = {  # name: (what is done to a checkpoint, the error, whether sampling meets it too)
    "a weight less": (
        lambda c: c["net"].pop("out_conv.bias"),
        "own settings.*out_conv.bias",
        "raw",
    ),
    "nan in ema": (lambda c: c["ema"]["out_conv.bias"].fill_(np.nan), "are not finite", "ema"),
    "nan in Adam": (lambda c: c["optimizer"]["state"][0]["exp_avg"].fill_(np.nan), "finite", ""),
    "shape in Adam": (
        lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        r"optimizer's exp_avg is \(3,\), the weight",
        "",
    ),
    "no Adam": (lambda c: c.update(optimizer={}), "no state of", ""),
    "settings.T": (lambda c: c["settings"].pop("T"), "T", "ema"),
    "settings.unet": (lambda c: c["settings"].pop("unet"), ".", "ema"),  # "is an autoencoder"
    **{key: (lambda c, key=key: c.pop(key), key, "ema") for key in checkpoint.ENTRIES},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_checkpoint_with_other_contents_is_one_line(name, run):
    damage, message, sampled = DAMAGES[name]
    found = checkpoint.load_checkpoint(run)
    damage(found)
    checkpoint.save_checkpoint(run, found)
    start = "" if "settings" in name or name in checkpoint.ENTRIES else "^runs/small/checkpoint.pt"
    refused(f"{start}.*{message}", small, "--steps", "2")
    if sampled:
        refused(message, denoiser.load_run, "small", sampled)


def test_only_tensors_are_ever_unpickled():
    """Each torch.load has weights_only=True, and no np.load has allow_pickle=True."""
    found = 0
    for path in ROOT.glob("**/*.py"):
        text = path.read_text(encoding="utf-8")
        if "tests" in path.relative_to(ROOT).parts or ".load" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            words = {k.arg: ast.unparse(k.value) for k in getattr(node, "keywords", [])}
            assert name != "torch.load" or words.get("weights_only") == "True", path
            assert name != "np.load" or words.get("allow_pickle", "False") == "False", path
            assert name not in ("pickle.load", "pickle.loads"), path
            found += name in ("torch.load", "np.load")
    assert found >= 3


# ------------------------------------------------------------------ signals, and who may write

NEVER = """
import os, signal, sys, threading, time
from support import image_files, programs

class Never(image_files.Files):
    def __getitem__(self, i):  # a file on a disk that does not answer
        time.sleep(1000 if i % 2 else 0)
        return super().__getitem__(i)

def main():
    how, last = sys.argv[1:]
    images = Never([f"images/{i:03}.png" for i in range(9)], 8, 3)
    with programs.StopSignal():
        if how == "signal":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        order = [0, 2, int(last), 1] + 1000 * [1]
        for image in image_files.in_threads(images.__getitem__, order, 3, 1000):
            if how == "end":
                break

programs.run_main(main)
"""


@pytest.mark.parametrize(
    "how", ["error", *(pytest.param(how, marks=pytest.mark.slow) for how in ("signal", "end"))]
)
def test_no_program_waits_at_its_end_for_a_file_that_never_comes(how, here):
    """Python would wait for the threads of an executor, and torchrun for the program."""
    folder_of(here / "images", 8)
    last, status = (8, 2) if how == "error" else (4, 0)  # images/008.png does not exist
    done = run_program("-c", NEVER, how, last, cwd=here, status=status)
    assert "Traceback" not in done.stderr
    assert how != "error" or re.search("error: images/008.png: ", done.stderr)


@pytest.mark.parametrize("before", [0, 3])
def test_a_signal_breaks_off_the_wait_for_images_and_the_run_is_saved(
    before, here, monkeypatch, capsys, no_grids
):
    """All batches after the first `before` wait for a file that never comes."""
    folder_of(here / "images", 24)
    real, load, step = image_files.Files.__getitem__, data.load, train.train_step
    first, waiting, steps = data.batch_indices(24, 0, before * 4, seed=0), [], []

    def slow(self, i):
        if i not in first:
            waiting.append(i)
            threading.Event().wait(30)
        return real(self, i)

    def send():
        until = time.time() + 30
        while (len(waiting) < 2 or len(steps) < before) and time.time() < until:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(data, "load", lambda *a, **k: load(*a, **k, memory_limit=0))
    monkeypatch.setattr(image_files.Files, "__getitem__", slow)
    monkeypatch.setattr(train, "train_step", lambda *a: (step(*a), steps.append(1))[0])
    sender, began = threading.Thread(target=send), time.time()
    sender.start()
    train.main([*TINY, "--name", "small", "--data", "images", "--steps", "50"])
    sender.join()
    assert time.time() - began < 25
    where = f"at step {before} of 50, saved in" if before else "before the first step. The same"
    assert f"stopped by SIGTERM {where}" in capsys.readouterr().out
    assert PATH.exists() == bool(before)
    assert not before or saved()["step"] == before


def test_a_signal_breaks_a_sample_grid_off_and_the_run_is_saved(monkeypatch, capsys):
    def slow(*inputs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(train.DiffusionObjective, "preview", slow)
    began = time.time()
    assert small("--steps", "50", "--sample-every", "2", "--save-every", "50")["step"] == 2
    assert time.time() - began < 20 and "stopped by SIGTERM at step 2" in capsys.readouterr().out
    assert not os.listdir("runs/small/samples")


def test_a_second_program_does_not_write_to_the_same_run(run, monkeypatch):
    """It ends in one line, and the first can finish."""
    lock, before = distributed.Distributed.lock, run.read_bytes()
    monkeypatch.setattr(
        distributed.Distributed, "lock", lambda self, folder, seconds=0: lock(self, folder, 0.1)
    )
    with distributed.Distributed(0, 1, 0, torch.device("cpu")) as first:
        first.lock(Path("runs/small"))
        refused("^runs/small: another process is writing to it", small, "--steps", "2")
    assert run.read_bytes() == before


def test_a_run_that_another_process_started_meanwhile_is_not_started_again(monkeypatch, made):
    """Both found no run; one of them took long to read its images."""
    real = data.load

    def slow(*args, **kwargs):
        PATH.parent.mkdir(parents=True)
        shutil.copy(made, PATH)
        return real(*args, **kwargs)

    monkeypatch.setattr(data, "load", slow)
    refused("another process has started this run meanwhile", small, "--steps", "9")
    assert PATH.read_bytes() == made.read_bytes()


@pytest.mark.parametrize("place", ["runs", "runs/small", "runs/small/samples"])
def test_a_file_in_the_place_of_a_folder_is_named_first(place, monkeypatch):
    monkeypatch.setattr(data, "load", None)  # that would take long
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_text("in the way")
    refused(f"{place} should be a folder, and is a file", small, "--steps", "2")


# ------------------------------------------------------------------ the log


def logged(*columns, step=0):
    """(the log of this folder, a function that adds a row)."""
    log = run_folder.Log(Path("."), step, columns)
    return log, lambda step, loss=1.0: log.add(step, 4, (loss, *(loss for _ in columns), 0.5), 0)


def test_a_log_row_that_did_not_fit_is_removed():
    add = logged("simple")[1]
    add(10)
    whole = Path("log.csv").read_text()
    with full_disk(len(whole) + 5), pytest.raises(OSError):
        add(20, loss=2.0)
    assert Path("log.csv").read_text() == whole
    add(30, loss=4.0)
    with open("log.csv", newline="") as f:
        assert [(r["step"], float(r["loss"])) for r in csv.DictReader(f)] == [("10", 1), ("30", 3)]


def test_bad_lines_in_the_log_end_nothing():
    """Torn rows, foreign bytes, and a file that disappears."""
    for step in (10, 20, 30):
        logged("simple", "sa", step=step)[1](step)
    text = Path("log.csv").read_bytes()
    torn = text[: text.index(b"\n20,") + 4]
    Path("log.csv").write_bytes(torn + b"\n1,2\n25,x,1,1,1,1,1,1\n\0\0\0\0\n\xff\n")
    log, add = logged("simple", "sa", step=20)
    add(30)
    lines = Path("log.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step", "10", "30"]
    os.remove("log.csv")
    add(40)
    lines = Path("log.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith("step,") and log.is_row(lines[1])


def test_rows_after_the_checkpoint_are_dropped(run, no_grids):
    """These steps are made again."""
    with contextlib.chdir("runs/small"):
        logged("simple", "sa")[1](10)
    small("--steps", "2")
    assert len(Path("runs/small/log.csv").read_text().splitlines()) == 1


def test_the_plot_of_a_long_run_shows_all_its_steps_and_stays_small(here, monkeypatch):
    monkeypatch.setattr(run_folder, "PLOT_POINTS", points := 50)
    log, n = run_folder.Log(here, 0, ["simple"]), 10 * points + 7
    values = np.random.default_rng(0).random(n) + 1
    for i, loss in enumerate(values):
        log.add(10 * (i + 1), 4, (loss, loss, 0.5), 0)
    assert points <= len(log.points) < 2 * points and log.stride == 8
    groups = [values[i : i + 8].mean() for i in range(0, n - 7, 8)]
    assert_close(np.array([p[2] for p in log.points]), np.array(groups), rtol=1e-5, atol=0)
    assert len(log.pending) == n % 8 > 0, "the last few are drawn, too"
    again = run_folder.Log(here, 10 * n, ["simple"])  # resumed
    assert_close(np.stack(again.points), np.stack(log.points))
    again.plot(here / "loss.png")
    assert (here / "loss.png").exists()


# ------------------------------------------------------------------ sampling


def test_pictures_of_a_run_made_anew_are_not_mixed_with_those_of_the_old(run):
    """Same name, same step, same flags: other weights. sample.py refuses, and deletes nothing."""
    words = "small -n 2 --nfe 2 --out o".split()
    sample.main(words)
    old = Path("o/000000.png").read_bytes()
    found = checkpoint.load_checkpoint(run)
    found["ema"]["out_conv.bias"] += 0.3
    checkpoint.save_checkpoint(run, found)
    refused("^--out o holds images with other settings", sample.main, words)
    assert Path("o/000000.png").read_bytes() == old


def test_a_kill_before_the_first_picture_does_not_block_the_folder(run):
    """What it leaves is hidden; a folder with other files stays refused."""
    os.mkdir("o")
    Path("o/.settings.json.here.1.tmp").write_text("half")
    sample.main("small -n 1 --nfe 1 --out o".split())
    assert sorted(os.listdir("o")) == ["000000.png", "settings.json"]


@pytest.mark.slow
def test_memory_and_files_stay_flat(tmp_path):
    """soak.py for a minute or less; the whole hour is in docs/lab-notebook.md."""
    import soak

    words = "--image-size 8 --batch-size 4".split()
    found = soak.report(soak.soak(tmp_path, minutes=9, every=0.2, steps=400, words=words))
    assert found["checkpoints"] >= 20
    assert found["memory"] < 1.05
    assert len(set(found["files"])) == 1
