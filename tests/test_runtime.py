"""runtime.py: seeds, EMA, precision, and files that are whole or absent."""

import copy
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import files
import runtime

ROOT = Path(__file__).resolve().parents[1]


def test_generators_are_functions_of_their_key():
    draws = {
        key: torch.randn(50, generator=runtime.generator(*key))
        for key in [(0, 0), (0, 1), (1, 0), (1, 1), (0,), (2**40, 3)]
    }
    for key, values in draws.items():
        assert_close(torch.randn(50, generator=runtime.generator(*key)), values, rtol=0, atol=0)
        others = [v for k, v in draws.items() if k != key]
        assert all(abs(torch.corrcoef(torch.stack([values, v]))[0, 1]) < 0.6 for v in others)
    assert len({runtime.mix(seed, step) for seed in range(50) for step in range(200)}) == 10_000


def test_ema_warm_up_and_decay():
    """d = min(decay, (1 + n)/(10 + n)): by hand for two steps, then against a long plain loop."""
    net = torch.nn.Linear(3, 2)
    ema = copy.deepcopy(net)
    start = net.weight.detach().clone()
    expected = start.clone()
    for n in range(300):
        with torch.no_grad():
            net.weight.add_(torch.randn(2, 3))
        runtime.update_ema(ema, net, 0.9, n)
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * net.weight.detach()
        if n == 0:
            assert_close(ema.weight, 0.1 * start + 0.9 * net.weight, rtol=1e-6, atol=1e-6)
    assert_close(ema.weight, expected, rtol=1e-5, atol=1e-5)


def test_ema_follows_buffers_too():
    net = torch.nn.BatchNorm1d(2)
    ema = copy.deepcopy(net)
    net.running_mean.fill_(1.0)
    runtime.update_ema(ema, net, 0.5, 10**6)
    assert_close(ema.running_mean, torch.full((2,), 0.5))


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
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def whole(**more):
    """A checkpoint with all that one has, empty."""
    empty = {name: kind() for name, kind in files.ENTRIES.items()}
    return {**empty, **more}


@pytest.mark.slow
def test_a_kill_during_the_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    files.save_checkpoint(path, whole(step=1))
    code = (
        f"import sys, os, signal; sys.path.insert(0, {str(ROOT)!r})\n"
        "import files\n"
        f"with files.atomic_write({str(path)!r}) as t:\n"
        "    t.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code])
    assert done.returncode == -signal.SIGKILL
    assert files.load_checkpoint(path)["step"] == 1
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_checkpoint_round_trip(tmp_path):
    tensors = {"a": torch.randn(3), "b": torch.arange(4)}
    files.save_checkpoint(tmp_path / "c.pt", whole(step=7, raw=tensors, settings={"x": None}))
    back = files.load_checkpoint(tmp_path / "c.pt")
    assert back["step"] == 7 and back["settings"] == {"x": None}
    assert_close(back["raw"], tensors, rtol=0, atol=0)


class Trap:
    def __reduce__(self):
        return os.system, ("touch trapped",)


def foreign_files(folder):
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


def test_other_files_are_named_for_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, words in foreign_files(tmp_path).items():
        with pytest.raises(ValueError, match=words) as error:
            files.load_checkpoint(tmp_path / name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "trapped").exists(), "nothing in a file is ever executed"
    with pytest.raises(FileNotFoundError):
        files.load_checkpoint(tmp_path / "nowhere.pt")


def test_find_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="train one first"):
        files.find_checkpoint()
    for i, name in enumerate(("one", "two", "three")):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "checkpoint.pt").write_text("x")
        os.utime(folder / "checkpoint.pt", (100 - i, 100 - i))
    assert files.find_checkpoint().parent.name == "one"
    assert files.find_checkpoint("two").parent.name == "two"
    assert files.find_checkpoint(str(tmp_path / "runs" / "three")).parent.name == "three"
    assert files.find_checkpoint("runs/three/checkpoint.pt").name == "checkpoint.pt"
    with pytest.raises(
        FileNotFoundError, match="no run four; under runs/ there are: one three two"
    ):
        files.find_checkpoint("four")
    with pytest.raises(FileNotFoundError, match="is it a run folder"):
        files.find_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    "error, status",
    [(ValueError("two\nlines"), 2), (FileNotFoundError("no x"), 2), (KeyboardInterrupt(), 130)],
)
def test_programs_end_in_one_line(error, status, capsys, monkeypatch):
    monkeypatch.delenv("TRACEBACK", raising=False)

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        runtime.run_program(main)
    assert end.value.code == status
    text = capsys.readouterr().err
    assert text.count("\n") == (status == 2) and "Traceback" not in text


def test_bugs_keep_their_traceback():
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        runtime.run_program(main)


def test_stop_collects_signals_and_restores_handlers():
    before = signal.getsignal(signal.SIGTERM)
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    with runtime.Stop() as stop:
        assert stop.asked == ""
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before
    signal.signal(signal.SIGINT, outside)


def test_an_ignored_signal_stays_ignored():
    """nohup and background jobs rely on it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runtime.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.asked == ""
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_precision():
    cpu = torch.device("cpu")
    assert runtime.choose_precision("fp32", cpu) is None
    assert runtime.choose_precision("bf16", cpu) == torch.bfloat16
    auto = runtime.choose_precision("auto", cpu)
    assert (auto == torch.bfloat16) == runtime.has_bf16_units(cpu)


def test_one_process_needs_no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with runtime.setup() as process:
        assert (process.rank, process.world, process.first) == (0, 1, True)
        assert process.sum(1.5, True) == (1.5, True)
        assert process.share("x") == "x" and process.gather("y") == ["y"]
        process.barrier()
        assert process.first_does(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            process.first_does(lambda: 1 / 0)


def test_a_network_made_for_inference_gives_what_autocast_gives():
    torch.manual_seed(0)
    make = lambda: torch.nn.Sequential(  # noqa: E731
        torch.nn.Conv2d(3, 8, 3), torch.nn.Dropout(0.5), torch.nn.SiLU(), torch.nn.Conv2d(8, 2, 1)
    )
    plain, x = make().eval(), torch.randn(2, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = plain(x)
    for precision in ("fp32", "bf16"):
        net = make()
        net.load_state_dict(plain.state_dict())
        out = runtime.for_inference(net, torch.device("cpu"), precision)(x)
        assert not out.requires_grad and not net.training
        same = expected if precision == "bf16" else plain(x).detach()
        torch.testing.assert_close(out, same, rtol=0, atol=0)
    assert expected.dtype == torch.bfloat16


class AddOne(torch.nn.Module):
    """A network to export."""

    def forward(self, x):
        return x + 1


@pytest.mark.parametrize("tf32", [False, True])
def test_a_network_is_exported_after_the_setup_for_a_gpu(tf32, monkeypatch, recwarn):
    """torch.export reads the old switch of TF32, and raises if it disagrees with the new ones."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    try:
        with runtime.setup(tf32=tf32) as process:
            assert process.device == torch.device("cuda:0")
        for kind in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
            assert (kind.fp32_precision == "tf32") == tf32
        assert (torch.get_float32_matmul_precision() == "high") == tf32
        monkeypatch.undo()  # the rest runs on a CPU
        torch.export.export(AddOne(), (torch.zeros(2),))
        assert not [w for w in recwarn if "tf32" in str(w.message).lower()]
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True


def test_a_file_name_that_is_not_text_is_named_under_torchrun(tmp_path, monkeypatch, capsys):
    """Its bytes come as surrogates, which no encoding takes."""
    (tmp_path / "0").mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    runtime.complain(ValueError("d\udcff.npy: empty"))
    assert "udcff.npy: empty" in (tmp_path / "0" / "error.json").read_text(encoding="utf-8")
    runtime.complain(ValueError("d\udcff.npy: empty"))  # from another process: already said
    assert capsys.readouterr().err.count("empty") == 1


@pytest.mark.parametrize("key", [5, ("a", "b")])
def test_weights_under_odd_keys_are_one_line(key):
    with pytest.raises(ValueError, match="^a.pt does not fit") as error:
        files.load_weights(torch.nn.Linear(1, 1), {key: torch.zeros(())}, "a.pt")
    assert "\n" not in str(error.value)
