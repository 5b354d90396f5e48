"""What happens to long runs: full disks, damaged files, numbers that go wrong, signals at any time.

tests/torture.py does the same to whole processes, from outside.
"""

import ast
import contextlib
import csv
import errno
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soak
import torch
from PIL import Image
from test_train import SMALL
from torch.testing import assert_close

import data
import denoiser
import files
import losses
import runtime
import sample
import train

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def small(*flags):
    train.main([*SMALL, *flags])
    return files.load_checkpoint("runs/small/checkpoint.pt")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The checkpoint of a run of one step."""
    folder = tmp_path_factory.mktemp("made")
    with contextlib.chdir(folder):
        small("--steps", "1")
    return folder / "runs" / "small" / "checkpoint.pt"


@pytest.fixture
def run(made):
    """The same, as runs/small here."""
    os.makedirs("runs/small")
    return Path(shutil.copy(made, "runs/small"))


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ["loss", "gradient", "overflow"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(what, precision, monkeypatch):
    """A loss that is NaN; a finite loss with an infinite gradient; and a loss that overflows while
    its gradient does not, which a check of the gradient alone would let through."""
    real, calls = losses.terms, []

    class Finite(torch.autograd.Function):
        """Forward: +∞ (overflow) or x (gradient). Backward: the gradient as it is, or ∞."""

        @staticmethod
        def forward(ctx, x):
            return x + float("inf") if what == "overflow" else x.clone()

        @staticmethod
        def backward(ctx, g):
            return g if what == "overflow" else g * float("inf")

    def spoilt(*args, **kwargs):
        calls.append(1)
        found = real(*args, **kwargs)
        if len(calls) in (2, 3):
            nan = found["simple"] * float("nan")
            found["simple"] = nan if what == "loss" else Finite.apply(found["simple"])
        return found

    monkeypatch.setattr(losses, "terms", spoilt)
    checkpoint = small("--steps", "5", "--save-every", "1", "--precision", precision)
    assert checkpoint["skipped"] == 2 and checkpoint["step"] == 5
    for part in ("raw", "ema"):
        assert all(v.isfinite().all() for v in checkpoint[part].values())
    moments = [v for state in checkpoint["optimizer"]["state"].values() for v in state.values()]
    assert all(v.isfinite().all() for v in moments if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_run_stops_when_no_step_is_finite(precision, monkeypatch):
    words = ["--steps", "60", "--save-every", "2", "--precision", precision]
    small(*words[:1], "4", *words[2:])
    real = losses.terms
    monkeypatch.setattr(
        losses, "terms", lambda *a, **k: {n: v * float("inf") for n, v in real(*a, **k).items()}
    )
    with pytest.raises(
        ValueError, match="up to step 29; the last checkpoint is of step 4 in .*: try --precision"
    ):
        small(*words)
    assert files.load_checkpoint("runs/small/checkpoint.pt")["step"] == 4


def test_weights_that_an_update_has_broken_are_not_saved(monkeypatch, capsys):
    """The loss of a step says nothing of the update that follows it."""
    small("--steps", "2", "--grad-clip", "0")
    good = Path("runs/small/checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match="after step 3 .* not finite; .* of step 2 .*lower --lr"):
        small("--steps", "3", "--lr", "1e308", "--grad-clip", "0")
    assert Path("runs/small/checkpoint.pt").read_bytes() == good


def test_skipped_steps_are_told_at_the_end(monkeypatch, capsys):
    real, calls = losses.terms, []

    def once(*args, **kwargs):
        calls.append(1)
        nan = float("nan") if len(calls) == 2 else 1.0
        return {n: v * nan for n, v in real(*args, **kwargs).items()}

    monkeypatch.setattr(losses, "terms", once)
    small("--steps", "3")
    assert "note: 1 of 3 steps were skipped" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["ema", "optimizer"])
def test_numbers_that_are_not_finite_do_not_come_back_from_a_file(part, run):
    checkpoint = files.load_checkpoint(run)
    inner = checkpoint[part] if part == "ema" else checkpoint[part]["state"][0]
    next(v for v in inner.values() if v.dim()).view(-1)[0] = float("nan")
    files.save_checkpoint(run, checkpoint)
    with pytest.raises(ValueError, match="not finite"):
        small("--steps", "2")
    if part == "ema":
        with pytest.raises(ValueError, match="weights that are not finite"):
            sample.main("small -n 1 --nfe 1".split())


def test_samples_that_are_not_finite_are_no_pictures(run):
    """As uint8 they would be black."""
    with pytest.raises(ValueError, match="the samples are not finite"):
        sample.main("small -n 2 --nfe 3 --sampler heun --churn 1 --churn-noise 1e300".split())
    assert not list(Path("runs/small").rglob("0*.png"))


# ------------------------------------------------------------------ disks


def test_torch_on_a_full_disk_is_an_oserror(tmp_path):
    """A limit that the system enforces: torch's writer makes a RuntimeError of it, ours not."""
    path = tmp_path / "checkpoint.pt"
    files.save_checkpoint(path, {"step": 1})
    before = path.read_bytes()
    code = f"""if True:
        import resource, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        import files, torch
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            files.save_checkpoint({str(path)!r}, dict(raw=torch.zeros(100_000)))
        except OSError as error:
            print(error.errno)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(errno.EFBIG), done.stderr
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


def full(monkeypatch, until=10**9):
    """Checkpoints up to this call find a disk without room -> the list of calls."""
    calls, real = [], files.check_space

    def no_room(folder, size):
        calls.append(size)
        if 1 < len(calls) <= until:  # the first is the question at the start
            raise OSError(errno.ENOSPC, "No space left on device")
        real(folder, size)

    monkeypatch.setattr(files, "check_space", no_room)
    return calls


def test_a_full_disk_does_not_end_a_run(monkeypatch, capsys):
    calls = full(monkeypatch, until=3)
    assert small("--steps", "8", "--save-every", "2")["step"] == 8
    assert len(calls) == 1 + 4
    text = capsys.readouterr()
    assert (text.out + text.err).count("warning: checkpoint.pt was not written") == 2


def test_a_disk_that_stays_full_ends_it_with_what_there_is(monkeypatch):
    small("--steps", "2")
    full(monkeypatch)
    with pytest.raises(
        OSError, match="step 6 could not be saved.*last checkpoint is of step 2.*make room"
    ):
        small("--steps", "6", "--save-every", "2")
    assert files.load_checkpoint("runs/small/checkpoint.pt")["step"] == 2


def test_room_for_checkpoints_is_asked_for_at_the_start(monkeypatch):
    class Usage:
        free = 30_000_000  # a checkpoint of tiny has 18 MB, and there are two while one is written

    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(OSError, match="36.7 MB are needed and 30.0 MB are free") as error:
        small("--steps", "2")
    assert "\n" not in str(error.value) and not os.path.exists("runs")


def test_the_size_of_a_checkpoint_is_foreseen(run):
    checkpoint = files.load_checkpoint(run)
    s = checkpoint["settings"]
    foreseen = train.Model(s, torch.device("cpu")).size()
    assert abs(foreseen - files.size_of(checkpoint)) < 2000
    assert abs(foreseen / os.path.getsize("runs/small/checkpoint.pt") - 1) < 0.03


def test_a_log_row_that_did_not_fit_is_taken_back(monkeypatch):
    log = train.Log(Path("."), 0, ["simple"])
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


def test_words_are_lost_rather_than_a_run():
    read, write = os.pipe()
    stream = runtime.Forgiving(os.fdopen(write, "w", buffering=1))
    os.close(read)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    assert stream.write("nobody hears this\n") == 18
    stream.flush()
    assert stream.encoding


# ------------------------------------------------------------------ files


def test_one_flipped_bit_is_found(run):
    """torch.load would take it: it does not read the checksums that torch.save writes."""
    path = run
    good = path.read_bytes()
    for place in (len(good) // 5, len(good) // 2, 4 * len(good) // 5):
        bad = bytearray(good)
        bad[place] ^= 4
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="is damaged: .* does not have its checksum"):
            small("--steps", "2")
    path.write_bytes(good)
    assert small("--steps", "2")["step"] == 2


def test_a_checkpoint_cut_anywhere_is_one_line(run):
    path = run
    good = path.read_bytes()
    for share in (0, 1e-5, 0.001, 0.3, 0.7, 0.999, 0.99999):
        path.write_bytes(good[: int(share * len(good))])
        with pytest.raises(ValueError, match="not a checkpoint of train.py") as error:
            files.load_checkpoint(path)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", [*files.ENTRIES, "settings.T", "settings.unet", "settings.task"])
def test_a_checkpoint_that_lacks_something_is_one_line(key, run):
    checkpoint = files.load_checkpoint(run)
    *outer, name = key.split(".")
    part = checkpoint[outer[0]] if outer else checkpoint
    del part[name]
    files.save_checkpoint("runs/small/checkpoint.pt", checkpoint)
    for use in (lambda: train.main([*SMALL, "--steps", "1"]), lambda: denoiser.load_run("small")):
        try:
            use()
        except (ValueError, OSError) as error:
            assert "\n" not in str(error) and name in str(error)
        else:
            assert key == "settings.task" or use.__code__.co_names[0] == "train", key


def test_weights_and_moments_of_another_shape_are_refused(run):
    checkpoint = files.load_checkpoint(run)
    checkpoint["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    files.save_checkpoint("runs/small/checkpoint.pt", checkpoint)
    with pytest.raises(ValueError, match=r"optimizer's exp_avg is \(3,\), the weight"):
        small("--steps", "2")


def test_nothing_but_tensors_is_ever_unpickled():
    """Each torch.load of ours says weights_only=True, and each np.load allow_pickle=False."""
    found = 0
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
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


def test_a_signal_before_the_first_step_ends_in_one_line(capsys):
    with runtime.Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        raise AssertionError("the signal did not come")
    assert stop.asked == "SIGTERM"
    assert capsys.readouterr().out.startswith("stopped by SIGTERM before the first step. Run the")


NEVER = f"""
import os, signal, sys, threading, time; sys.path.insert(0, {str(ROOT)!r})
import runtime, data

class Never(data.Files):
    def __getitem__(self, i):  # a file on a disk that does not answer
        time.sleep(100 if i % 2 else 0)
        return super().__getitem__(i)

def main():
    images = Never([f"images/{{i}}.png" for i in range(8)], 8, 3)
    with runtime.Stop():
        if "signal" in sys.argv:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        for image in data.in_threads(images.__getitem__, [0, 2, 8, 1] + 1000 * [1], 3, 1000):
            if "end" in sys.argv:
                break

runtime.run_program(main)
"""


@pytest.mark.parametrize(
    "how, status",
    [
        ("error", 2),
        pytest.param("signal", 0, marks=pytest.mark.slow),
        pytest.param("end", 0, marks=pytest.mark.slow),
    ],
)
def test_no_program_waits_at_its_end_for_a_file_that_never_comes(how, status):
    """Python would wait for the threads of an executor, and torchrun for the program."""
    os.mkdir("images")
    for i in range(8 + (how != "error")):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(f"images/{i}.png")
    code = NEVER.replace("[0, 2, 8, 1]", "[0, 2, 4, 1]") if how != "error" else NEVER
    code = code.replace("range(8)", "range(9)")
    found = subprocess.run(
        [sys.executable, "-c", code, how], capture_output=True, text=True, timeout=60
    )
    assert found.returncode == status and "Traceback" not in found.stderr, found.stderr
    assert how != "error" or re.search("error: images/8.png: ", found.stderr)


@pytest.mark.parametrize("before", [0, 3])
def test_a_signal_breaks_off_the_wait_for_images_and_the_run_is_saved(before, monkeypatch, capsys):
    """All but so many batches wait for a file that never comes."""
    os.mkdir("images")
    for i in range(24):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(f"images/{i:02}.png")
    real, load, calls = data.Files.__getitem__, data.load, []

    def slow(self, i):
        calls.append(i)
        if len(calls) > before * 4:
            threading.Event().wait(30)
        return real(self, i)

    monkeypatch.setattr(data, "load", lambda *a, **k: load(*a, **k, memory_limit=0))
    monkeypatch.setattr(data.Files, "__getitem__", slow)
    monkeypatch.setattr(train, "picture", lambda *inputs: None)
    tell = threading.Thread(target=send_when, args=(lambda: len(calls) > before * 4 + 1,))
    tell.start()
    began = time.time()
    words = ["--data", "images", "--image-size", "8", "--batch-size", "4", "--workers", "2"]
    train.main([*SMALL, *words, "--steps", "50"])
    tell.join()
    assert time.time() - began < 20
    said = f"at step {before} of 50, saved in" if before else "before the first step. Run the same"
    assert f"stopped by SIGTERM {said}" in capsys.readouterr().out
    path = Path("runs/small/checkpoint.pt")
    assert files.load_checkpoint(path)["step"] == before if before else not path.exists()


def send_when(ready, number=signal.SIGTERM):
    """A signal to this process, shortly after ready()."""
    until = time.time() + 30
    while not ready() and time.time() < until:
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(os.getpid(), number)


def test_one_process_at_a_time_writes_to_a_folder(tmp_path):
    one, two = (runtime.Processes(0, 1, 0, torch.device("cpu")) for _ in range(2))
    with one:
        one.hold(tmp_path)
        with two, pytest.raises(ValueError, match="another process is writing to"):
            two.hold(tmp_path, seconds=0.3)
        threading.Timer(0.5, lambda: one.__exit__()).start()
        with two:
            two.hold(tmp_path, seconds=10)  # it waits for one that is ending
    with one:
        one.hold(tmp_path)


def test_a_run_that_somebody_else_has_begun_meanwhile_is_not_begun_again(monkeypatch, made):
    """Both found no run; one of them took long to look through its images."""
    real = data.load

    def slow(*args, **kwargs):
        os.makedirs("runs/small")
        shutil.copy(made, "runs/small")
        return real(*args, **kwargs)

    monkeypatch.setattr(data, "load", slow)
    before = made.read_bytes()
    with pytest.raises(ValueError, match="another process has begun .* meanwhile"):
        small("--steps", "9")
    assert Path("runs/small/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("place", ["runs", "runs/small", "runs/small/samples"])
def test_a_file_in_the_place_of_a_folder_is_named_first(place, monkeypatch):
    monkeypatch.setattr(data, "load", None)  # that would take long
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    Path(place).write_text("in the way")
    with pytest.raises(ValueError, match=f"{place} should be a folder, and is a file"):
        small("--steps", "2")


def test_a_signal_breaks_a_grid_off_and_the_run_is_saved(monkeypatch, capsys):
    def slow(*inputs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(train, "picture", slow)
    began = time.time()
    assert small("--steps", "50", "--sample-every", "2", "--save-every", "50")["step"] == 2
    assert time.time() - began < 20 and "stopped by SIGTERM at step 2" in capsys.readouterr().out


@pytest.mark.slow
def test_bad_lines_in_the_log_end_nothing():
    small("--steps", "20")
    with open("runs/small/log.csv", "ab") as f:
        f.write(b"1,2\n30,x,1,1,1,1,1,1\n\0\0\0\0\n\xff\n")
    small("--steps", "40", "--save-every", "10")
    with open("runs/small/log.csv", newline="") as f:
        assert [r["step"] for r in csv.DictReader(f)] == ["10", "20", "30", "40"]
    os.remove("runs/small/log.csv")
    log = train.Log(Path("runs/small"), 0, ["simple", "sa"])
    os.remove("runs/small/log.csv")
    log.add(10, 4, (1.0, 1.0, 0.0, 0.5), 0)
    lines = Path("runs/small/log.csv").read_text().splitlines()
    assert len(lines) == 2 and lines[0].startswith("step,") and log.whole(lines[1])


def test_the_plot_of_a_long_run_is_of_all_its_steps_and_stays_small(tmp_path):
    log, n = train.Log(tmp_path, 0, ["simple"]), 10 * train.POINTS + 7
    losses = np.random.default_rng(0).random(n) + 1
    for i, loss in enumerate(losses):
        log.add(10 * (i + 1), 4, (loss, loss, 0.5), 0)
    assert train.POINTS <= len(log.points) < 2 * train.POINTS and log.each == 8
    groups = [losses[i : i + 8].mean() for i in range(0, n - 7, 8)]
    assert_close(np.array([p[2] for p in log.points]), np.array(groups), rtol=1e-5, atol=0)
    assert len(log.waiting) == n % 8 > 0, "the last few are drawn, too"
    again = train.Log(tmp_path, 10 * n, ["simple"])  # resumed
    assert_close(np.stack(again.points), np.stack(log.points))
    again.plot(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").exists()


def test_pictures_of_a_run_made_anew_are_not_those_of_the_old(run, capsys):
    """Same name, same step, same flags: other weights."""
    sample.main("small -n 2 --nfe 2 --out o".split())
    old = Path("o/000000.png").read_bytes()
    checkpoint = files.load_checkpoint(run)
    checkpoint["ema"]["out_conv.bias"] += 0.3
    files.save_checkpoint(run, checkpoint)
    capsys.readouterr()
    sample.main("small -n 2 --nfe 2 --out o".split())
    assert "already" not in capsys.readouterr().out and Path("o/000000.png").read_bytes() != old


def test_the_environment_of_a_half_started_job_is_named(monkeypatch):
    for names in (dict(RANK="1"), dict(RANK="3", WORLD_SIZE="1"), dict(WORLD_SIZE="abc")):
        with monkeypatch.context() as m:
            for name, value in names.items():
                m.setenv(name, value)
            with pytest.raises(ValueError, match="in the environment do not fit.*torchrun"):
                runtime.setup()


def test_what_killed_writers_left_is_swept(tmp_path):
    """Of the same file, and of processes that are no more."""
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True).stdout.strip()  # fmt: skip
    here, alive = platform.node().replace(".", "-"), os.getppid()
    ours = f".a.npz.{here}.{gone}.tmp"
    others = [f".a.npz.{here}.{alive}.tmp", f".b.npz.{here}.{gone}.tmp", f".a.npz.far.{gone}.tmp"]
    for name in (ours, *others):
        (tmp_path / name).write_text("half")
    files.write_text(tmp_path / "a.npz", "whole")
    assert set(os.listdir(tmp_path)) == {"a.npz", *others}


def test_an_npz_goes_on_from_its_parts(run, capsys):
    words = "small -n 10 --nfe 2 --npz --batch-size 3 --sampler ddpm --out o".split()
    sample.main(words)
    whole = np.load("o/images.npz")["arr_0"].astype(int)
    os.remove("o/images.npz")
    sample.write_npz(Path("o/part-000004.npz"), arr_0=whole[[4, 7]].astype(np.uint8),
                     indices=[4, 7])  # fmt: skip
    capsys.readouterr()
    sample.main(words)
    assert "2 of 10 images are there already" in capsys.readouterr().out
    again = np.load("o/images.npz")["arr_0"].astype(int)
    assert abs(again - whole).max() <= 1 and not list(Path("o").glob("part-*"))
    sample.main([*words[:2], "12", *words[3:]])  # more of the same
    assert "10 of 12 images are there already" in capsys.readouterr().out
    assert len(np.load("o/images.npz")["arr_0"]) == 12
    sample.main(words)  # fewer: the rest stays
    assert "made 2 more like these" in capsys.readouterr().out
    assert len(np.load("o/images.npz")["arr_0"]) == 12
    Path("o/part-000000.npz").write_bytes(b"PK nonsense")
    with pytest.raises(ValueError, match="part-000000.npz is damaged: delete it"):
        sample.main(words)


@pytest.mark.slow
def test_memory_and_files_stay_flat(tmp_path):
    """tests/soak.py for less than a minute; the whole hour is in NOTES.md."""
    found = soak.report(soak.soak(tmp_path, minutes=0.75, every=0.5))
    assert found["checkpoints"] >= 5
    assert found["memory"] < 1.05
    assert len(set(found["files"])) == 1
