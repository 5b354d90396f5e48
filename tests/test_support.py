"""support/: random numbers, precision, processes, signals, and files that are whole or absent."""

import os
import pickle
import platform
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT, run_program
from torch.testing import assert_close

from support import checkpoint, distributed, files, precision, programs, rng

CPU = torch.device("cpu")


# ------------------------------------------------------------------ random numbers


def test_generators_are_functions_of_their_key():
    draws = {
        key: torch.randn(50, generator=rng.generator(*key))
        for key in [(0, 0), (0, 1), (1, 0), (1, 1), (0,), (2**40, 3)]
    }
    for key, values in draws.items():
        assert_close(torch.randn(50, generator=rng.generator(*key)), values, rtol=0, atol=0)
        others = [v for k, v in draws.items() if k != key]
        assert all(abs(torch.corrcoef(torch.stack([values, v]))[0, 1]) < 0.6 for v in others)
    assert len({rng.hash_ints(seed, step) for seed in range(50) for step in range(200)}) == 10_000


def test_seeds_share_no_image():
    """torch's CPU generator uses 32 bits of its seed. Seed 0 gives i itself, as it always did."""
    assert [rng.image_seed(0, i) for i in (0, 1, 99)] == [0, 1, 99]
    last = rng.image_seed(rng.MAX_SEEDS - 1, rng.MAX_IMAGES - 1)
    assert last == 2**32 - 1 and rng.image_seed(1, 0) == rng.image_seed(0, rng.MAX_IMAGES - 1) + 1


# ------------------------------------------------------------------ precision


def test_autocast_dtype():
    assert precision.autocast_dtype("fp32", CPU) is None
    assert precision.autocast_dtype("bf16", CPU) == torch.bfloat16
    auto = precision.autocast_dtype("auto", CPU)
    assert (auto == torch.bfloat16) == precision.has_bf16_units(CPU)


def test_a_network_made_for_inference_gives_what_autocast_gives():
    torch.manual_seed(0)
    layers = lambda: (  # noqa: E731
        torch.nn.Conv2d(3, 8, 3), torch.nn.Dropout(0.5), torch.nn.SiLU(), torch.nn.Conv2d(8, 2, 1)
    )  # fmt: skip
    plain, x = torch.nn.Sequential(*layers()).eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = plain(x)
    for name, same in (("fp32", plain(x).detach()), ("bf16", expected)):
        net = torch.nn.Sequential(*layers())
        net.load_state_dict(plain.state_dict())
        out = precision.for_inference(net, CPU, name)(x)
        assert not out.requires_grad and not net.training
        assert_close(out, same, rtol=0, atol=0)
    assert expected.dtype == torch.bfloat16


class AddOne(torch.nn.Module):
    """A network to export."""

    def forward(self, x):
        return x + 1


@pytest.mark.parametrize("tf32", [False, True])
def test_a_network_is_exported_after_init_for_a_gpu(tf32, monkeypatch, recwarn):
    """torch.export reads the old switch of TF32, and raises if it disagrees with the new ones."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    try:
        with distributed.init(tf32=tf32) as dist:
            assert dist.device == torch.device("cuda:0")
        for kind in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            assert (kind.fp32_precision == "tf32") == tf32
        assert (torch.get_float32_matmul_precision() == "high") == tf32
        monkeypatch.undo()  # the rest runs on a CPU
        torch.export.export(AddOne(), (torch.zeros(2),))
        assert not [w for w in recwarn if "tf32" in str(w.message).lower()]
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True


# ------------------------------------------------------------------ processes


def test_one_process_needs_no_torchrun(monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with distributed.init() as dist:
        assert (dist.rank, dist.world_size, dist.is_main) == (0, 1, True)
        assert dist.all_reduce(torch.tensor(1.5)).item() == 1.5
        assert dist.any("x") is True and dist.any("") is False
        assert dist.any("", 1, None) == [False, True, False]
        assert dist.broadcast("x") == "x" and dist.gather("y") == ["y"]
        dist.barrier()
        dist.print0("hello")
        assert dist.on_main(lambda: 7) == dist.main_first(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            dist.on_main(lambda: 1 / 0)
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize(
    "names", [dict(RANK="1"), dict(RANK="3", WORLD_SIZE="1"), dict(WORLD_SIZE="abc")]
)
def test_the_environment_of_a_half_started_job_is_named(names, monkeypatch):
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="^RANK=.*in the environment do not fit.*torchrun"):
        distributed.init()


def test_one_process_at_a_time_writes_to_a_folder(tmp_path):
    one, two = (distributed.Distributed(0, 1, 0, CPU) for _ in range(2))
    with one:
        one.lock(tmp_path)
        with two, pytest.raises(ValueError, match="another process is writing to"):
            two.lock(tmp_path, seconds=0.3)
        threading.Timer(0.5, lambda: one.__exit__()).start()
        with two:
            two.lock(tmp_path, seconds=10)  # it waits for one that is ending
    with one:
        one.lock(tmp_path)


def test_support_comes_before_torch(tmp_path):
    """It sets how OpenMP waits, which has no effect after torch is imported."""
    code = (
        "import os, sys; del os.environ['GOMP_SPINCOUNT']; import support\n"
        "print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"
    )
    assert run_program("-c", code, cwd=tmp_path).stdout == "10000 False\n"


def test_no_port_is_written_down():
    """torchrun's --standalone finds a free one; two jobs on a machine must not meet."""
    for path in ROOT.glob("**/*.py"):
        if "tests" not in path.relative_to(ROOT).parts:
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"master_port[ =]+[0-9]|MASTER_PORT|localhost:[0-9]|29500", text)


# ------------------------------------------------------------------ how programs start and end


@pytest.mark.parametrize(
    "error, status",
    [(ValueError("two\nlines"), 2), (FileNotFoundError("no x"), 2), (KeyboardInterrupt(), 130)],
)
def test_programs_end_in_one_line(error, status, capsys, monkeypatch):
    monkeypatch.delenv("TRACEBACK", raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        programs.run_main(main)
    assert end.value.code == status
    text = capsys.readouterr().err
    assert text.count("\n") == (status == 2) and "Traceback" not in text


def test_bugs_keep_their_traceback():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        programs.run_main(main)


def test_traceback_1_shows_where_an_error_came_from(monkeypatch):
    def main():
        raise ValueError("bad flag")

    monkeypatch.setenv("TRACEBACK", "1")
    with pytest.raises(ValueError):
        programs.run_main(main)


def test_stop_collects_signals_and_restores_handlers():
    before = signal.getsignal(signal.SIGTERM)
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with programs.StopSignal() as stop:
            stop.gently = True
            assert stop.requested == ""
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested == "SIGTERM"
            os.kill(os.getpid(), signal.SIGINT)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == before
    finally:
        signal.signal(signal.SIGINT, outside)


def test_work_that_a_signal_breaks_off_leaves_the_loop_running():
    with programs.StopSignal() as stop:
        stop.gently = True
        assert stop.unless_requested(lambda a: a + 1, 2) == 3
        assert stop.unless_requested(os.kill, os.getpid(), signal.SIGTERM) is None
        assert stop.requested == "SIGTERM" and stop.gently
        assert stop.unless_requested(lambda: "not called") is None


def test_a_signal_before_the_first_step_ends_in_one_line(capsys):
    with programs.StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal did not come")
    assert stop.requested == "SIGTERM"
    assert capsys.readouterr().out.startswith("stopped by SIGTERM before the first step. The same")


def test_an_ignored_signal_stays_ignored():
    """nohup and background jobs rely on it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with programs.StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested == ""
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_lost_output_ends_no_program():
    read, write = os.pipe()
    stream = programs.IgnoreWriteErrors(os.fdopen(write, "w", buffering=1))
    os.close(read)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    assert stream.write("nobody hears this\n") == 18
    stream.flush()
    assert stream.encoding


def test_a_file_name_that_is_not_text_is_named_under_torchrun(tmp_path, monkeypatch, capsys):
    """Its bytes come as surrogates, which no encoding takes. A second process prints nothing."""
    (tmp_path / "0").mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    for _ in range(2):
        programs.report_error(ValueError("d\udcff.npy: empty"))
    assert "udcff.npy: empty" in (tmp_path / "0" / "error.json").read_text(encoding="utf-8")
    assert capsys.readouterr().err.count("empty") == 1


# ------------------------------------------------------------------ files


def test_atomic_write_is_all_or_nothing(tmp_path):
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(OSError, match="disk full"), files.atomic_write(path) as temporary:
        temporary.write_text("half of the n")
        raise OSError("disk full")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    files.write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".checkpoint.pt.123.tmp").write_text("half")
    (tmp_path / "checkpoint.pt").write_text("whole")
    files.clean_stale(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_the_next_write_removes_what_dead_writers_left_of_the_same_file(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True)  # fmt: skip
    here, dead, alive = platform.node().replace(".", "-"), done.stdout.strip(), os.getppid()
    ours = f".a.npz.{here}.{dead}.tmp"
    others = [f".a.npz.{here}.{alive}.tmp", f".b.npz.{here}.{dead}.tmp", f".a.npz.far.{dead}.tmp"]
    for name in (ours, *others):
        (tmp_path / name).write_text("half")
    files.write_text(tmp_path / "a.npz", "whole")
    assert set(os.listdir(tmp_path)) == {"a.npz", *others}


@pytest.mark.slow
def test_a_kill_during_the_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save_checkpoint(path, whole(step=1))
    code = (
        "import os, signal; from support import files\n"
        f"with files.atomic_write({str(path)!r}) as t:\n"
        "    t.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    run_program("-c", code, cwd=tmp_path, status=-signal.SIGKILL)
    assert checkpoint.load_checkpoint(path)["step"] == 1
    files.clean_stale(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


# ------------------------------------------------------------------ checkpoints


def whole(**more):
    """A checkpoint with all entries, empty."""
    empty = {name: kind() for name, kind in checkpoint.ENTRIES.items()}
    return {**empty, **more}


def test_checkpoint_round_trip(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.arange(4)}
    saved = whole(step=7, net=tensors, settings={"x": None})
    checkpoint.save_checkpoint(tmp_path / "c.pt", saved)
    back = checkpoint.load_checkpoint(tmp_path / "c.pt")
    assert back["step"] == 7 and back["settings"] == {"x": None}
    assert_close(back["net"], tensors, rtol=0, atol=0)


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def foreign_files(folder):
    """Write files that are not checkpoints -> {name: what their error must contain}."""
    net = torch.nn.Linear(2, 2)
    torch.save(torch.optim.Adam(net.parameters()).state_dict(), folder / "optimizer.pt")
    torch.save(net.state_dict(), folder / "weights.pt")
    torch.save({"format": "sa-etsdm run 99"}, folder / "newer.pt")
    torch.save([1, 2], folder / "list.pt")
    (folder / "page.pt").write_text("<!DOCTYPE html><html>404</html>")
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("hello")
    torch.save({"x": torch.zeros(1000)}, folder / "whole.pt")
    (folder / "cut.pt").write_bytes((folder / "whole.pt").read_bytes()[:900])
    with open(folder / "trap.pt", "wb") as f:
        pickle.dump(Trap(), f)
    return {
        "optimizer.pt": "state of an optimizer",
        "weights.pt": "2 entries: weight, bias",
        "newer.pt": "another version",
        "list.pt": "a list",
        "page.pt": "web page",
        "empty.pt": "empty",
        "text.pt": "first bytes",
        "cut.pt": "cut short",
        "trap.pt": "not a checkpoint",
    }


def test_other_files_are_described(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, words in foreign_files(tmp_path).items():
        with pytest.raises(ValueError, match=words) as error:
            checkpoint.load_checkpoint(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name)) and "\n" not in str(error.value)
    assert not (tmp_path / "trapped").exists(), "nothing in a file is ever executed"
    with pytest.raises(FileNotFoundError):
        checkpoint.load_checkpoint(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("key", [5, ("a", "b")])
def test_weights_under_odd_keys_are_one_line(key):
    with pytest.raises(ValueError, match="^a.pt does not fit") as error:
        checkpoint.load_weights(torch.nn.Linear(1, 1), {key: torch.zeros(())}, "a.pt")
    assert "\n" not in str(error.value)


def test_find_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="train one first"):
        checkpoint.find_checkpoint()
    for i, name in enumerate(("one", "two", "three")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "checkpoint.pt").write_text("x")
        os.utime(folder / "checkpoint.pt", (100 - i, 100 - i))
    assert checkpoint.find_checkpoint().parent.name == "one"
    assert checkpoint.find_checkpoint("two").parent.name == "two"
    assert checkpoint.find_checkpoint(str(tmp_path / "runs" / "three")).parent.name == "three"
    assert checkpoint.find_checkpoint("runs/three/checkpoint.pt").name == "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="no run four; under runs/ .*: one three two"):
        checkpoint.find_checkpoint("four")
    with pytest.raises(FileNotFoundError, match="is it a run folder"):
        checkpoint.find_checkpoint(str(tmp_path))
