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
from conftest import ROOT, TINY, run_program
from PIL import Image
from torch.testing import assert_close

import data
import denoiser
import losses
import sample
import train
from support import checkpoint, distributed, files, image_files
from support import run as run_folder

PATH = Path("runs/small/checkpoint.pt")


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def small(*flags):
    train.main([*TINY, "--name", "small", *flags])
    return checkpoint.load_checkpoint(PATH)


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


@pytest.fixture
def no_grids(monkeypatch):
    """They take longer than the steps."""
    monkeypatch.setattr(run_folder.RunFolder, "save_preview", lambda *inputs: None)


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

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * float("inf")


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
    saved = small("--steps", "5", "--save-every", "1", "--precision", precision)
    assert saved["skipped"] == 2 and saved["step"] == 5
    assert "note: 2 of 5 steps were skipped" in capsys.readouterr().out
    states = saved["optimizer"]["state"].values()
    for tensors in (saved["net"], saved["ema"], *states):
        assert checkpoint.all_finite(tensors)
    assert all(state["step"] == 3 for state in states)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_run_stops_if_no_step_is_finite(precision, monkeypatch, no_grids):
    words = ["--save-every", "2", "--precision", precision, "--steps"]
    monkeypatch.setattr(run_folder, "in_thread", lambda device: precision == "bf16")
    small(*words, "4")
    good = PATH.read_bytes()
    spoil(monkeypatch, FAULTS["overflow"])
    with pytest.raises(
        ValueError,
        match="^--lr: the last 25 losses or gradients were not finite, up to step 29; the last "
        "checkpoint is of step 4, in .*--precision fp32",
    ):
        small(*words, "60")
    assert PATH.read_bytes() == good


def test_bad_steps_before_any_checkpoint_name_none(monkeypatch):
    spoil(monkeypatch, FAULTS["loss"])
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        small("--steps", "100")
    assert not PATH.exists()


def test_weights_that_an_update_has_broken_are_not_saved(no_grids):
    """The loss of a step does not show what its own update does."""
    small("--steps", "2", "--grad-clip", "0")
    good = PATH.read_bytes()
    with pytest.raises(ValueError, match="after step 3 .* not finite; .* of step 2,.*lower --lr"):
        small("--steps", "3", "--lr", "1e308", "--grad-clip", "0")
    assert PATH.read_bytes() == good


@pytest.mark.parametrize("part", ["ema", "optimizer"])
def test_numbers_that_are_not_finite_are_refused_in_a_file(part, run):
    saved = checkpoint.load_checkpoint(run)
    inner = saved[part] if part == "ema" else saved[part]["state"][0]
    next(v for v in inner.values() if v.dim()).view(-1)[0] = float("nan")
    checkpoint.save_checkpoint(run, saved)
    with pytest.raises(ValueError, match="^runs/small/checkpoint.pt.*not finite"):
        small("--steps", "2")
    if part == "ema":
        with pytest.raises(ValueError, match="weights that are not finite"):
            sample.main("small -n 1 --nfe 1".split())


def test_samples_that_are_not_finite_become_no_pictures(run):
    """As uint8 they would be black."""
    saved = checkpoint.load_checkpoint(run)
    for value in saved["ema"].values():
        value.mul_(1e30)
    checkpoint.save_checkpoint(run, saved)
    with pytest.raises(ValueError, match="samples are not finite"):
        sample.main("small -n 2 --nfe 3".split())
    assert not list(Path("runs/small").rglob("0*.png"))


# ------------------------------------------------------------------ disks


def test_torch_on_a_full_disk_is_an_oserror(tmp_path):
    """A limit that the system enforces: torch's writer makes a RuntimeError of it."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save_checkpoint(path, {"step": 1})
    before = path.read_bytes()
    code = f"""if True:
        import resource, signal, torch
        from support import checkpoint
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            checkpoint.save_checkpoint({str(path)!r}, dict(net=torch.zeros(100_000)))
        except OSError as error:
            print(error.errno)
    """
    done = run_program("-c", code, cwd=tmp_path)
    assert done.stdout.strip() == str(errno.EFBIG), done.stderr
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


def full(monkeypatch, until=10**9):
    """From the second check of the disk to this one, it has no room -> the list of checks."""
    calls = []

    def no_room(folder, size):
        calls.append(size)
        if 1 < len(calls) <= until:  # the first is at the start
            raise OSError(errno.ENOSPC, "No space left on device")

    for module in (files, checkpoint):
        monkeypatch.setattr(module, "check_space", no_room)
    return calls


def test_a_full_disk_does_not_end_a_run(monkeypatch, capsys, no_grids, writer):
    calls = full(monkeypatch, until=3)
    assert small("--steps", "8", "--save-every", "2")["step"] == 8
    assert len(calls) == 1 + 4
    text = capsys.readouterr()
    assert (text.out + text.err).count("warning: checkpoint.pt was not written") == 2


def test_a_disk_that_stays_full_ends_it_with_the_last_checkpoint(monkeypatch, no_grids, writer):
    small("--steps", "2")
    full(monkeypatch)
    with pytest.raises(
        OSError,
        match="^runs/small/checkpoint.pt: step 6 could not be saved.*last checkpoint is of step 2,"
        ".*Make room",
    ):
        small("--steps", "6", "--save-every", "2")
    assert checkpoint.load_checkpoint(PATH)["step"] == 2


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
    assert later and [saved["step"] for saved in seen] == [2, 4, 5]
    monkeypatch.undo()
    monkeypatch.setattr(run_folder.RunFolder, "save_preview", lambda *inputs: None)
    train.main([*TINY, "--name", "two", "--steps", "2"])
    two = checkpoint.load_checkpoint("runs/two/checkpoint.pt")
    for part in ("net", "ema", "optimizer"):
        assert_close(seen[0][part], two[part], rtol=0, atol=0)


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
    assert held == [3] and checkpoint.load_checkpoint(PATH)["step"] == 3


@pytest.mark.parametrize("minutes, count", [("1e-9", 3), ("0", 1), ("60", 1)])
def test_a_checkpoint_is_also_written_after_so_many_minutes(minutes, count, capsys, no_grids):
    small("--steps", "3", "--save-every", "99", "--save-minutes", minutes)
    text = capsys.readouterr()
    assert (text.out + text.err).count(": saved ") == count


def test_the_start_checks_that_two_checkpoints_fit(monkeypatch):
    """The new one is written next to the old one: 18 MB each."""
    usage = type("Usage", (), dict(free=30_000_000))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="36.* MB are needed and 30.0 MB are free") as error:
        small("--steps", "2")
    assert "\n" not in str(error.value) and not os.path.exists("runs")


def test_the_size_of_a_checkpoint_is_known_before_the_first(monkeypatch, no_grids):
    """Before Adam has made its moments."""
    asked = []
    monkeypatch.setattr(files, "check_space", lambda folder, size: asked.append(size))
    small("--steps", "1")
    assert abs(asked[0] / 2 / os.path.getsize(PATH) - 1) < 0.03


def test_a_log_row_that_did_not_fit_is_removed():
    log = run_folder.Log(Path("."), 0, ["simple"])
    log.add(10, 4, (1.0, 1.0, 0.5), 0)
    whole = Path("log.csv").read_text()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, before[1]))
        with pytest.raises(OSError):
            log.add(20, 4, (2.0, 2.0, 0.5), 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert Path("log.csv").read_text() == whole
    log.add(30, 4, (4.0, 4.0, 0.5), 0)
    with open("log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert [r["step"] for r in rows] == ["10", "30"] and float(rows[1]["loss"]) == 3


# ------------------------------------------------------------------ files


def test_one_flipped_bit_is_found(run, no_grids):
    """torch.load would accept it: it does not compare the checksums that torch.save writes."""
    good = run.read_bytes()
    for place in (len(good) // 5, len(good) // 2, 4 * len(good) // 5):
        bad = bytearray(good)
        bad[place] ^= 4
        run.write_bytes(bad)
        with pytest.raises(ValueError, match="is damaged: .* does not have its checksum"):
            small("--steps", "2")
    run.write_bytes(good)
    assert small("--steps", "2")["step"] == 2


def test_a_checkpoint_cut_anywhere_is_one_line(run):
    good = run.read_bytes()
    for share in (0, 1e-5, 0.001, 0.3, 0.7, 0.999, 0.99999):
        run.write_bytes(good[: int(share * len(good))])
        with pytest.raises(ValueError, match="not a checkpoint of train.py") as error:
            checkpoint.load_checkpoint(run)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [*checkpoint.ENTRIES, "settings.T", "settings.unet"])
def test_a_checkpoint_with_a_missing_entry_is_one_line(key, run):
    saved = checkpoint.load_checkpoint(run)
    *outer, name = key.split(".")
    del (saved[outer[0]] if outer else saved)[name]
    checkpoint.save_checkpoint(run, saved)
    for use in (lambda: small("--steps", "2"), lambda: denoiser.load_run("small")):
        with pytest.raises(ValueError) as error:
            use()
        assert "\n" not in str(error.value)
        assert name in str(error.value) or key == "settings.unet"  # "is an autoencoder"


@pytest.mark.parametrize("damage", ["shape", "empty"])
def test_optimizer_states_that_do_not_fit_are_refused(damage, run):
    saved = checkpoint.load_checkpoint(run)
    if damage == "shape":
        saved["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    else:
        saved["optimizer"] = {}
    checkpoint.save_checkpoint(run, saved)
    words = r"optimizer's exp_avg is \(3,\), the weight" if damage == "shape" else "no state of"
    with pytest.raises(ValueError, match=f"^runs/small/checkpoint.pt .*{words}"):
        small("--steps", "2")


def test_only_tensors_are_ever_unpickled():
    """Each torch.load has weights_only=True, and no np.load has allow_pickle=True."""
    found = 0
    for path in ROOT.glob("**/*.py"):
        if "tests" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            words = {k.arg: ast.unparse(k.value) for k in getattr(node, "keywords", [])}
            if name == "torch.load":
                assert words.get("weights_only") == "True", path
            if name == "np.load":
                assert words.get("allow_pickle", "False") == "False", path
            found += name in ("torch.load", "np.load")
            assert name not in ("pickle.load", "pickle.loads"), path
    assert found >= 3


# ------------------------------------------------------------------ signals, and who may write

NEVER = """
import os, signal, sys, threading, time
from support import image_files, programs

class Never(image_files.Files):
    def __getitem__(self, i):  # a file on a disk that does not answer
        time.sleep(100 if i % 2 else 0)
        return super().__getitem__(i)

def main():
    how, last = sys.argv[1:]
    images = Never([f"images/{i}.png" for i in range(9)], 8, 3)
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
    "how, status",
    [
        ("error", 2),
        pytest.param("signal", 0, marks=pytest.mark.slow),
        pytest.param("end", 0, marks=pytest.mark.slow),
    ],
)
def test_no_program_waits_at_its_end_for_a_file_that_never_comes(how, status, tmp_path):
    """Python would wait for the threads of an executor, and torchrun for the program."""
    os.mkdir("images")
    for i in range(8):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(f"images/{i}.png")
    last = 8 if how == "error" else 4  # images/8.png does not exist
    done = run_program("-c", NEVER, how, last, cwd=tmp_path, status=status)
    assert "Traceback" not in done.stderr
    assert how != "error" or re.search("error: images/8.png: ", done.stderr)


def send_when(ready):
    """SIGTERM to this process, shortly after ready() -> the thread that sends it."""

    def send():
        until = time.time() + 30
        while not ready() and time.time() < until:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("before", [0, 3])
def test_a_signal_breaks_off_the_wait_for_images_and_the_run_is_saved(
    before, monkeypatch, capsys, no_grids
):
    """All batches after the first `before` wait for a file that never comes."""
    os.mkdir("images")
    for i in range(24):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(f"images/{i:02}.png")
    real, load, calls = image_files.Files.__getitem__, data.load, []

    def slow(self, i):
        calls.append(i)
        if len(calls) > before * 4:
            threading.Event().wait(30)
        return real(self, i)

    monkeypatch.setattr(data, "load", lambda *a, **k: load(*a, **k, memory_limit=0))
    monkeypatch.setattr(image_files.Files, "__getitem__", slow)
    sender = send_when(lambda: len(calls) > before * 4 + 1)
    began = time.time()
    train.main([*TINY, "--name", "small", "--data", "images", "--steps", "50"])
    sender.join()
    assert time.time() - began < 20
    where = f"at step {before} of 50, saved in" if before else "before the first step. The same"
    assert f"stopped by SIGTERM {where}" in capsys.readouterr().out
    assert PATH.exists() == bool(before)
    assert not before or checkpoint.load_checkpoint(PATH)["step"] == before


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
    lock = distributed.Distributed.lock
    monkeypatch.setattr(
        distributed.Distributed, "lock", lambda self, folder, seconds=0: lock(self, folder, 0.1)
    )
    before = run.read_bytes()
    with distributed.Distributed(0, 1, 0, torch.device("cpu")) as first:
        first.lock(Path("runs/small"))
        with pytest.raises(ValueError, match="^runs/small: another process is writing to it"):
            small("--steps", "2")
    assert run.read_bytes() == before


def test_a_run_that_another_process_started_meanwhile_is_not_started_again(monkeypatch, made):
    """Both found no run; one of them took long to read its images."""
    real = data.load

    def slow(*args, **kwargs):
        PATH.parent.mkdir(parents=True)
        shutil.copy(made, PATH)
        return real(*args, **kwargs)

    monkeypatch.setattr(data, "load", slow)
    with pytest.raises(ValueError, match="another process has started this run meanwhile"):
        small("--steps", "9")
    assert PATH.read_bytes() == made.read_bytes()


@pytest.mark.parametrize("place", ["runs", "runs/small", "runs/small/samples"])
def test_a_file_in_the_place_of_a_folder_is_named_first(place, monkeypatch):
    monkeypatch.setattr(data, "load", None)  # that would take long
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_text("in the way")
    with pytest.raises(ValueError, match=f"{place} should be a folder, and is a file"):
        small("--steps", "2")


# ------------------------------------------------------------------ the log


def test_bad_lines_in_the_log_end_nothing():
    """Torn rows, foreign bytes, and a file that disappears."""
    log = run_folder.Log(Path("."), 0, ["simple", "sa"])
    for step in (10, 20, 30):
        log.add(step, 4, (1.0, 1.0, 0.0, 0.5), 0)
    text = Path("log.csv").read_bytes()
    torn = text[: text.index(b"\n20,") + 4]
    Path("log.csv").write_bytes(torn + b"\n1,2\n25,x,1,1,1,1,1,1\n\0\0\0\0\n\xff\n")
    log = run_folder.Log(Path("."), 20, ["simple", "sa"])
    log.add(30, 4, (1.0, 1.0, 0.0, 0.5), 0)
    with open("log.csv", newline="") as f:
        assert [r["step"] for r in csv.DictReader(f)] == ["10", "30"]
    os.remove("log.csv")
    log.add(40, 4, (1.0, 1.0, 0.0, 0.5), 0)
    lines = Path("log.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith("step,") and log.is_row(lines[1])


def test_rows_after_the_checkpoint_are_dropped(run, no_grids):
    """These steps are made again."""
    log = run_folder.Log(Path("runs/small"), 0, ["simple", "sa"])
    log.add(10, 4, (1.0, 1.0, 0.0, 0.5), 0)
    small("--steps", "2")
    assert len(Path("runs/small/log.csv").read_text().splitlines()) == 1


def test_the_plot_of_a_long_run_shows_all_its_steps_and_stays_small(tmp_path):
    points = run_folder.PLOT_POINTS
    log, n = run_folder.Log(tmp_path, 0, ["simple"]), 10 * points + 7
    values = np.random.default_rng(0).random(n) + 1
    for i, loss in enumerate(values):
        log.add(10 * (i + 1), 4, (loss, loss, 0.5), 0)
    assert points <= len(log.points) < 2 * points and log.stride == 8
    groups = [values[i : i + 8].mean() for i in range(0, n - 7, 8)]
    assert_close(np.array([p[2] for p in log.points]), np.array(groups), rtol=1e-5, atol=0)
    assert len(log.pending) == n % 8 > 0, "the last few are drawn, too"
    again = run_folder.Log(tmp_path, 10 * n, ["simple"])  # resumed
    assert_close(np.stack(again.points), np.stack(log.points))
    again.plot(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


# ------------------------------------------------------------------ sampling


def test_pictures_of_a_run_made_anew_are_not_mixed_with_those_of_the_old(run):
    """Same name, same step, same flags: other weights. sample.py refuses, and deletes nothing."""
    words = "small -n 2 --nfe 2 --out o".split()
    sample.main(words)
    old = Path("o/000000.png").read_bytes()
    saved = checkpoint.load_checkpoint(run)
    saved["ema"]["out_conv.bias"] += 0.3
    checkpoint.save_checkpoint(run, saved)
    with pytest.raises(ValueError, match="^--out o holds images made in another way"):
        sample.main(words)
    assert Path("o/000000.png").read_bytes() == old


def test_a_kill_before_the_first_picture_does_not_block_the_folder(run):
    """What it leaves is hidden; a folder with other files stays refused."""
    os.mkdir("o")
    Path("o/.settings.json.here.1.tmp").write_text("half")
    sample.main("small -n 1 --nfe 1 --out o".split())
    assert sorted(os.listdir("o")) == ["000000.png", "settings.json"]
    os.mkdir("mine")
    Path("mine/photo.jpg").write_text("mine")
    with pytest.raises(ValueError, match="^--out mine .*was not written by this program"):
        sample.main("small -n 1 --nfe 1 --out mine".split())
    assert os.listdir("mine") == ["photo.jpg"]


# ------------------------------------------------------------------ runs that start from runs

BASES = [
    ("papers.autoencoder train --downsamplings 1", "papers.latents base", 2),
    ("train", "papers.heads npr base", 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("base, words, minimum", BASES, ids=["latents", "heads"])
def test_a_run_resumes_without_the_run_it_started_from(base, words, minimum, tmp_path):
    """Bit for bit as if the folder were there: the checkpoint holds what it needs."""

    def program(line, *flags):
        name, *rest = line.split()
        start = [ROOT / "train.py"] if name == "train" else ["-m", name]
        run_program(*start, *rest, *flags, cwd=tmp_path)

    flags = "--batch-size 4 --precision fp32 --sample-every 1000 --name".split()
    program(base, "--image-size", "8" if minimum == 1 else "16", *flags, "base", "--steps", "2")
    program(words, *flags, "whole", "--steps", "4")
    program(words, *flags, "parts", "--steps", "2")
    shutil.rmtree("runs/base")
    program(words, *flags, "parts", "--steps", "4")
    one, two = (checkpoint.load_checkpoint(f"runs/{n}/checkpoint.pt") for n in ("whole", "parts"))
    for key in ("net", "ema", "optimizer", "extra"):
        assert_close(two[key], one[key], rtol=0, atol=0)
    run_program(ROOT / "sample.py", "parts", "-n", "2", "--nfe", "2", cwd=tmp_path)


@pytest.mark.slow
def test_memory_and_files_stay_flat(tmp_path):
    """soak.py for less than a minute; the whole hour is in docs/lab-notebook.md."""
    import soak

    found = soak.report(soak.soak(tmp_path, minutes=0.75, every=0.5))
    assert found["checkpoints"] >= 5
    assert found["memory"] < 1.05
    assert len(set(found["files"])) == 1
