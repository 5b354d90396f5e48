"""support/: random numbers, precision, processes, signals, and files that are whole or absent."""

import copy
import io
import os
import pickle
import platform
import re
import signal
import threading
from pathlib import Path

import pytest
import torch
from conftest import ROOT, refused, run_program
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


def test_a_network_made_for_inference_gives_what_autocast_gives():
    auto = precision.autocast_dtype("auto", CPU)
    assert (auto == torch.bfloat16) == precision.has_bf16_units(CPU)
    torch.manual_seed(0)
    first, last = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 2, 1)
    plain = torch.nn.Sequential(first, torch.nn.Dropout(0.5), torch.nn.SiLU(), last)
    x = torch.randn(2, 3, 8, 8)
    for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
        assert precision.autocast_dtype(name, CPU) == dtype
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bool(dtype)):
            expected = plain.eval()(x)
        net = copy.deepcopy(plain).train()
        out = precision.for_inference(net, CPU, name)(x)
        assert not out.requires_grad and not net.training
        assert out.dtype == (dtype or torch.float32)
        assert_close(out, expected, rtol=0, atol=0)


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


@pytest.mark.parametrize("names", ["RANK=1", "RANK=3 WORLD_SIZE=1", "WORLD_SIZE=abc"])
def test_the_environment_of_a_half_started_job_is_named(names, monkeypatch):
    for name in names.split():
        monkeypatch.setenv(*name.split("="))
    refused("^RANK=.*in the environment do not fit.*torchrun", distributed.init)


def test_one_process_at_a_time_writes_to_a_folder(tmp_path):
    one, two = (distributed.Distributed(0, 1, 0, CPU) for _ in range(2))
    with one:
        one.lock(tmp_path)
        with two:
            refused("another process is writing to", two.lock, tmp_path, seconds=0.3)
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


def raiser(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, status",
    [(ValueError("two\nlines"), 2), (FileNotFoundError("no x"), 2), (KeyboardInterrupt(), 130)],
)
def test_programs_end_in_one_line(error, status, capsys, monkeypatch):
    """TRACEBACK=1 shows where an error came from; bugs always do."""
    monkeypatch.delenv("TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        programs.run_main(raiser(error))
    assert end.value.code == status
    text = capsys.readouterr().err
    assert text.count("\n") == (status == 2) and "Traceback" not in text
    with pytest.raises(KeyError):
        programs.run_main(raiser(KeyError("a bug")))
    monkeypatch.setenv("TRACEBACK", "1")
    if status == 2:
        with pytest.raises(type(error)):
            programs.run_main(raiser(error))


@pytest.fixture
def handlers():
    """Signals are treated as before, after the test."""
    before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def kill_me(name):
    os.kill(os.getpid(), getattr(signal, name))


def test_stop_collects_signals_and_restores_handlers(handlers):
    """An ignored signal stays ignored: nohup and background jobs rely on it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with programs.StopSignal() as stop:
        stop.gently = True
        kill_me("SIGHUP")
        assert stop.requested == ""
        kill_me("SIGTERM")
        assert stop.requested == "SIGTERM"
        kill_me("SIGINT")
        with pytest.raises(KeyboardInterrupt):
            kill_me("SIGINT")
    assert signal.getsignal(signal.SIGTERM) == handlers[signal.SIGTERM]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_work_that_a_signal_breaks_off_leaves_the_loop_running():
    with programs.StopSignal() as stop:
        stop.gently = True
        assert stop.unless_requested(lambda a: a + 1, 2) == 3
        assert stop.unless_requested(kill_me, "SIGTERM") is None
        assert stop.requested == "SIGTERM" and stop.gently
        assert stop.unless_requested(lambda: "not called") is None


def test_a_signal_before_the_first_step_ends_in_one_line(capsys):
    with programs.StopSignal() as stop:
        kill_me("SIGTERM")
        raise AssertionError("the signal did not come")
    assert stop.requested == "SIGTERM"
    assert capsys.readouterr().out.startswith(
        "stopped by SIGTERM before the first step. Run the same"
    )


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
    (tmp_path / ".a.txt.123.tmp").write_text("half")  # of a killed process
    files.clean_stale(tmp_path)
    files.write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_the_next_write_removes_what_dead_writers_left_of_the_same_file(tmp_path):
    done = run_program("-c", "import os; print(os.getpid())", cwd=tmp_path)
    here, dead, alive = platform.node().replace(".", "-"), done.stdout.strip(), os.getppid()
    ours = f".a.npz.{here}.{dead}.tmp"
    others = [f".a.npz.{here}.{alive}.tmp", f".b.npz.{here}.{dead}.tmp", f".a.npz.far.{dead}.tmp"]
    for name in (ours, *others):
        (tmp_path / name).write_text("half")
    files.write_text(tmp_path / "a.npz", "whole")
    assert set(os.listdir(tmp_path)) == {"a.npz", *others}


def test_checkpoint_round_trip(tmp_path):
    """With all entries, most of them empty."""
    tensors = {"a": torch.randn(3), "b": torch.arange(4)}
    whole = {name: kind() for name, kind in checkpoint.ENTRIES.items()}
    whole |= dict(step=7, net=tensors, settings={"x": None})
    checkpoint.save_checkpoint(tmp_path / "c.pt", whole)
    back = checkpoint.load_checkpoint(tmp_path / "c.pt")
    assert back["step"] == 7 and back["settings"] == {"x": None}
    assert_close(back["net"], tensors, rtol=0, atol=0)


# ------------------------------------------------------------------ checkpoints


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def torch_bytes(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


LAYER = torch.nn.Linear(2, 2)
FOREIGN = {  # what the error must contain: a file that is not a checkpoint
    "state of an optimizer": torch_bytes(torch.optim.Adam(LAYER.parameters()).state_dict()),
    "2 entries: weight, bias": torch_bytes(LAYER.state_dict()),
    "another version": torch_bytes({"format": "sa-etsdm run 99"}),
    "a list": torch_bytes([1, 2]),
    "cut short": torch_bytes({"x": torch.zeros(1000)})[:900],
    "web page": b"<!DOCTYPE html><html>404</html>",
    "empty": b"",
    "first bytes": b"hello",
    "not a checkpoint": pickle.dumps(Trap(), 2),
}


@pytest.mark.parametrize("words", FOREIGN)
def test_other_files_are_described(words, here):
    Path("x.pt").write_bytes(FOREIGN[words])
    refused(f"^x.pt.*{words}", checkpoint.load_checkpoint, "x.pt")
    assert not Path("trapped").exists(), "nothing in a file is ever executed"
    with pytest.raises(FileNotFoundError):
        checkpoint.load_checkpoint("nowhere.pt")


@pytest.mark.parametrize("key", [5, ("a", "b")])
def test_weights_under_odd_keys_are_one_line(key):
    weights = {key: torch.zeros(())}
    refused("^a.pt does not fit", checkpoint.load_weights, torch.nn.Linear(1, 1), weights, "a.pt")


def test_find_checkpoint(here):
    refused("train one first", checkpoint.find_checkpoint)
    for i, name in enumerate(("one", "two", "three")):
        path = Path(f"runs/{name}/checkpoint.pt")
        path.parent.mkdir(parents=True)
        path.write_text("x")
        os.utime(path, (100 - i, 100 - i))
    for given, found in {
        None: "one",
        "two": "two",
        str(here / "runs" / "three"): "three",
        "runs/three/checkpoint.pt": "three",
    }.items():
        assert checkpoint.find_checkpoint(given).resolve() == here / f"runs/{found}/checkpoint.pt"
    refused("no run four; under runs/ .*: one three two", checkpoint.find_checkpoint, "four")
    refused("is it a run folder", checkpoint.find_checkpoint, str(here))
