"""Two gloo processes do what one does: gradients, shards, resuming, pictures."""

import contextlib
import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import files
import sample
import train

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "faulty_worker.py"
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}
TINY = ["--image-size", "8", "--batch-size", "4", "--precision", "fp32", "--sample-every", "1000"]


def torchrun(n, *words, cwd, check=True, options=()):
    """`torchrun --nproc_per_node n words`, on a free port of its own choosing."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(n),
            *options,
            *map(str, words),
        ],
        cwd=cwd,
        env=ENV,
        text=True,
        capture_output=True,
        timeout=150,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tmp_path):
    for n in (1, 2):
        torchrun(n, ROOT / "tests" / "distributed_worker.py", tmp_path, cwd=tmp_path)
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert_close(
        two["images"], one["images"], rtol=0, atol=0
    )  # shards: disjoint, complete, in order
    assert_close(
        two["gradient"], one["gradient"], rtol=0, atol=1e-5 * one["gradient"].abs().max().item()
    )
    assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run by one process, by two, and by two that stopped after 4 steps and went on."""
    folder = tmp_path_factory.mktemp("distributed")
    with contextlib.chdir(folder):
        train.main([*TINY, "--steps", "10", "--name", "by1"])
    torchrun(2, ROOT / "train.py", *TINY, "--steps", "10", "--name", "by2", cwd=folder)
    torchrun(2, ROOT / "train.py", *TINY, "--steps", "4", "--name", "resumed", cwd=folder)
    done = torchrun(2, ROOT / "train.py", *TINY, "--steps", "10", "--name", "resumed", cwd=folder)
    assert "from step 4" in done.stdout
    assert "batch: 4 = 2 at a time x 1 accumulated x 2 processes" in done.stdout
    assert done.stdout.count("done:") == 1, "rank 0 alone speaks"
    return folder


@pytest.mark.slow
def test_losses_are_the_same(runs):
    rows = []
    for n in (1, 2):
        with open(runs / "runs" / f"by{n}" / "log.csv", newline="") as f:
            rows.append(next(csv.DictReader(f)))
    for key in ("loss", "simple"):
        assert_close(float(rows[0][key]), float(rows[1][key]), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_resuming_with_two_processes_changes_nothing(runs):
    whole, parts = (
        files.load_checkpoint(runs / "runs" / name / "checkpoint.pt") for name in ("by2", "resumed")
    )
    for key in ("raw", "ema", "optimizer"):
        assert_close(parts[key], whole[key], rtol=0, atol=0)
    assert not any(k.startswith("module.") for k in whole["raw"]), "the bare module's names"


@pytest.mark.slow
def test_another_number_of_processes_goes_on(runs):
    done = torchrun(1, ROOT / "train.py", *TINY, "--steps", "12", "--name", "resumed", cwd=runs)
    assert "from step 10" in done.stdout
    assert files.load_checkpoint(runs / "runs" / "resumed" / "checkpoint.pt")["step"] == 12


def read_pictures(folder):
    if (folder / "images.npz").exists():
        return np.load(folder / "images.npz")["arr_0"].astype(int)
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob("0*.png"))])


@pytest.mark.slow
@pytest.mark.parametrize("n, kind", [(2, ""), (2, "--npz"), (4, "")])
def test_pictures_are_the_same(runs, n, kind, monkeypatch):
    # -n, because torchrun takes --num for an abbreviation of its own --numa-binding
    words = f"by1 -n 5 --nfe 4 --sampler ddpm --batch-size 2 {kind}".split()
    monkeypatch.chdir(runs)
    sample.main([*words, "--out", f"one{kind}"])
    torchrun(n, ROOT / "sample.py", *words, "--out", f"{n}{kind}", cwd=runs)
    one, two = read_pictures(runs / f"one{kind}"), read_pictures(runs / f"{n}{kind}")
    assert len(one) == 5 and one.std() > 10
    assert np.abs(one - two).max() <= 1


@pytest.mark.slow
def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    done = torchrun(2, ROOT / "train.py", "--batch-size", "3", cwd=tmp_path, check=False)
    assert done.returncode != 0
    assert "--batch-size 3 is global and must divide by the 2 processes" in done.stderr


@pytest.mark.slow
def test_an_error_that_rank_0_finds_is_said_once(tmp_path):
    done = torchrun(2, ROOT / "sample.py", "nobody", cwd=tmp_path, check=False)
    assert done.returncode != 0
    lines = [x for x in done.stderr.splitlines() if x.startswith("sample.py: error: ")]
    assert len(lines) == 1 and "no run nobody" in lines[0]  # and once in torchrun's report
    assert "Connection closed" not in done.stderr


WAITING = f"""
import os, signal, sys, threading, time; sys.path.insert(0, {str(ROOT)!r})
import runtime
with runtime.Stop(), runtime.setup() as process:
    began = time.time()
    if not process.first:
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        process.first_does(time.sleep, 10)
    finally:
        print("rank", process.rank, "after", int(time.time() - began), flush=True)
"""


@pytest.mark.slow
def test_a_signal_is_heard_while_rank_0_works(tmp_path):
    """Inside a wait of gloo, Python would act on it only when rank 0 is ready: after hours."""
    (tmp_path / "waiting.py").write_text(WAITING)
    done = torchrun(2, "waiting.py", cwd=tmp_path, check=False)
    after = dict(re.findall(r"rank (\d) after (\d+)", done.stdout))
    assert int(after["1"]) < 5 <= int(after["0"]), done.stdout + done.stderr


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_resumes(tmp_path):
    """torchrun passes the signal on; both processes stop after the same step, and can go on."""
    words = [*TINY, "--steps", "300", "--save-every", "2", "--name", "stopped"]
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        + [str(ROOT / "train.py"), *words],
        cwd=tmp_path,
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    checkpoint = tmp_path / "runs" / "stopped" / "checkpoint.pt"
    until = time.time() + 60
    while not checkpoint.exists() and time.time() < until and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM at step" in out
    step = files.load_checkpoint(checkpoint)["step"]
    assert 0 < step < 300
    words[words.index("--steps") + 1] = str(step + 2)
    assert f"from step {step}" in torchrun(2, ROOT / "train.py", *words, cwd=tmp_path).stdout
    assert files.load_checkpoint(checkpoint)["step"] == step + 2


@pytest.mark.slow
def test_every_task_under_two_processes(runs):
    """A head (whose trunk is frozen), an autoencoder, its latents, super-resolution: the losses of
    one process, a Γ bit for bit, and pictures within one grey level."""
    small = ["--batch-size", "4", "--precision", "fp32", "--steps", "10"]
    code = ["--task", "autoencoder", "--image-size", "16"]
    sr = ["--task", "sr", "--factor", "2", "--image-size", "8", "--lipschitz-reg", "2"]
    tasks = dict(head=["--head", "npr", "--from", "by1"], code=code, sr=sr)
    tasks["latent"] = ["--latent", "code1"]
    for name, flags in tasks.items():
        with contextlib.chdir(runs):
            train.main([*small, *flags, "--name", f"{name}1"])
        torchrun(2, ROOT / "train.py", *small, *flags, "--name", f"{name}2", cwd=runs)
        rows = []
        for n in (1, 2):
            with open(runs / "runs" / f"{name}{n}" / "log.csv", newline="") as f:
                rows.append(next(csv.DictReader(f)))
        same = [k for k in rows[0] if k not in ("images_per_s", "grad_norm")]
        numbers = [[float(row[k]) for k in same] for row in rows]
        assert_close(numbers[0], numbers[1], rtol=2e-3, atol=1e-7, msg=f"{name}: {numbers}")
    with contextlib.chdir(runs):
        sample.main("sr1 --low-res shapes -n 3 --nfe 2 --out one-sr".split())
    words = "sr1 --low-res shapes -n 3 --nfe 2 --out two-sr".split()
    torchrun(2, ROOT / "sample.py", *words, cwd=runs)
    one, two = read_pictures(runs / "one-sr"), read_pictures(runs / "two-sr")
    assert len(one) == 3 and np.abs(one - two).max() <= 1
    gammas = []
    for n in (1, 2):
        torchrun(n, ROOT / "covariance.py", "by1", "-n", "4", cwd=runs)
        gammas.append(np.load(runs / "runs" / "by1" / "analytic.npz")["gamma"])
    np.testing.assert_array_equal(*gammas)


@pytest.mark.slow
def test_one_two_and_four_processes_train_the_same(tmp_path):
    """Losses step by step."""
    words = [*TINY, "--batch-size", "8", "--sa-k", "2", "--etsdm", "--save-every", "100"]
    for n in (1, 2, 4):
        out = [tmp_path / f"{n}.json", *words, "--steps", "6", "--name", f"by{n}"]
        torchrun(n, WORKER, "log", *out, cwd=tmp_path)
    one, two, four = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2, 4))
    assert len(one) == 6
    for other in (two, four):
        # The first step is the same computation up to rounding. Adam divides by the gradient's
        # size, and so turns the rounding of tiny gradients into steps of full length.
        assert_close(other[0], one[0], rtol=1e-5, atol=1e-7)
        assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("how, rank", [("die", 0), ("die", 1), ("hang", 1), ("refuse", 1)])
def test_a_process_that_fails_takes_the_others_down_with_one_line(how, rank, tmp_path):
    """Killed, stopped for longer than the timeout, or with an error of its own."""
    began = time.time()
    words = [*TINY, "--steps", "12", "--save-every", "3", "--name", "lost"]
    done = torchrun(2, WORKER, how, rank, 7, *words, cwd=tmp_path, check=False)
    assert done.returncode != 0 and time.time() - began < 100
    lines = [x for x in done.stderr.splitlines() if re.search(r"(^|\])train\.py: error: ", x)]
    assert len(lines) == 1, done.stderr[-3000:]
    expected = "no good" if how == "refuse" else "another process of this job has ended"
    assert expected in lines[0]
    assert "RuntimeError" not in done.stderr and "gloo" not in done.stderr
    assert files.load_checkpoint(tmp_path / "runs/lost/checkpoint.pt")["step"] == 6


@pytest.mark.slow
def test_torchrun_brings_a_dead_process_back(tmp_path):
    """--max-restarts: from the last checkpoint, to the weights of a run in which nobody died."""
    words = [*TINY, "--steps", "10", "--save-every", "3"]
    restarts = ["--max-restarts", "3"]
    done = torchrun(
        2, WORKER, "die", 1, 7, *words, "--name", "back", cwd=tmp_path, options=restarts
    )
    assert "from step 6" in done.stdout and done.stdout.count("done:") == 1
    torchrun(2, ROOT / "train.py", *words, "--name", "whole", cwd=tmp_path)
    back, whole = (
        files.load_checkpoint(tmp_path / "runs" / name / "checkpoint.pt")
        for name in ("back", "whole")
    )
    for key in ("raw", "ema", "optimizer"):
        assert_close(back[key], whole[key], rtol=0, atol=0)
    assert not list((tmp_path / "runs").rglob("*.tmp"))


@pytest.mark.slow
def test_two_machines(runs):
    """The README's two commands, as two torchrun agents on this one: the run of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(n)]
            + ["--master_addr", "127.0.0.1", "--master_port", str(port)]
            + [str(ROOT / "train.py"), *TINY, "--steps", "10", "--name", "machines"],
            cwd=runs,
            env=ENV,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for n in (0, 1)
    ]
    outs = [agent.communicate(timeout=150) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outs
    assert sum(out.count("done:") for out, _ in outs) == 1, "rank 0 alone speaks"
    one, two = (
        files.load_checkpoint(runs / "runs" / name / "checkpoint.pt")
        for name in ("by2", "machines")
    )
    assert_close(two["raw"], one["raw"], rtol=0, atol=0)


@pytest.mark.slow
def test_what_all_processes_find_is_said_once(tmp_path):
    """A wrong flag, which each of them sees before it knows the others."""
    done = torchrun(2, ROOT / "train.py", "--lr", "-1", cwd=tmp_path, check=False)
    lines = [x for x in done.stderr.splitlines() if x.startswith("train.py: error: ")]
    assert len(lines) == 1 and "--lr must be above 0" in lines[0]
    assert not (tmp_path / "runs").exists()


def test_no_port_is_written_down():
    """torchrun's --standalone finds a free one; two jobs on a machine must not meet."""
    for path in ROOT.glob("*.py"):
        assert not re.search(
            r"master_port[ =]+[0-9]|MASTER_PORT|localhost:[0-9]|29500", path.read_text()
        )
