"""Several gloo processes do what one does: gradients, shards, resuming, pictures. Those of torchrun
where it is the point; elsewhere copies of one process that has imported everything."""

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, SMALL, TINY, assert_same, free_port, together, torchrun
from kills import read_pictures
from programs import main_of
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import data
import train
from config import Config
from support import distributed
from support.checkpoint import load_checkpoint
from support.cli import parse_into

TINY = [*TINY, "--optimizer", "muon"]  # its update, too, is the same on all processes
WORKER = ROOT / "tests" / "robustness" / "faulty_worker.py"
TRAIN = ROOT / "train.py"
pytestmark = pytest.mark.slow


def by(n, program, words, cwd):
    """A program of ours, by one process (this one) or by n."""
    if n == 1:
        with contextlib.chdir(cwd):
            return main_of(program, words)
    together(n, cwd, main_of, program, words)


def start(*words, cwd):
    """`torchrun words`, running."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *map(str, words)],
        cwd=cwd,
        env=ENV,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def checkpoint_of(folder, name):
    return load_checkpoint(folder / "runs" / name / "checkpoint.pt")


def first_row(folder, name):
    with open(folder / "runs" / name / "log.csv", newline="") as f:
        return next(csv.DictReader(f))


ONE_STEP = "--image-size 8 --batch-size 8 --sa-k 2 --etsdm --microbatch 3 --flip --grad-clip 0"


def one_step(path):
    """Save the batch, the gradient and the losses of one training step."""
    with distributed.init() as dist:
        config = parse_into(Config, ONE_STEP.split())
        torch.manual_seed(0)
        state = train.TrainState(train.DiffusionObjective(config), config)
        torch.nn.init.normal_(state.net.out_conv.weight, std=0.1)
        model = DistributedDataParallel(state.net) if dist.world_size > 1 else state.net
        images = next(data.batches(data.load("shapes", 8, 3), 8, 16, 0, dist.rank, dist.world_size))
        found = {}
        state.optimizer.step = lambda: found.update(
            gradient=torch.cat([p.grad.flatten() for p in state.net.parameters()])
        )
        found["values"] = train.train_step(state, model, images, config, dist, None)
        gathered = dist.gather(images)
        assert dist.broadcast(f"from rank {dist.rank}") == "from rank 0"
        last = dist.rank == dist.world_size - 1
        assert dist.any(last) and not dist.any(False) and dist.any(False, last) == [False, True]
        assert dist.on_main(lambda: dist.rank) == 0
        assert dist.main_first(lambda: dist.rank) == dist.rank
        if dist.is_main:
            torch.save({**found, "images": torch.cat(gathered)}, path)


def test_two_processes_have_the_gradient_of_one(tmp_path):
    """And shards that are disjoint, complete and in order."""
    for n in (1, 2):
        together(n, tmp_path, one_step, f"{n}.pt")
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2))
    assert_close(two["images"], one["images"], rtol=0, atol=0)
    atol = 1e-5 * one["gradient"].abs().max().item()
    assert_close(two["gradient"], one["gradient"], rtol=0, atol=atol)
    assert_close(two["values"], one["values"], rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run by one process, by two, and by two that stopped after 4 steps."""
    folder, tiny = tmp_path_factory.mktemp("distributed"), " ".join(TINY)
    for n in (1, 2):
        by(n, "train.py", f"{tiny} --steps 10 --name by{n}", folder)
    by(2, "train.py", f"{tiny} --steps 4 --name resumed", folder)
    done = torchrun(2, TRAIN, *TINY, "--steps", "10", "--name", "resumed", cwd=folder)
    assert "from step 4" in done.stdout
    assert done.stdout.count("done:") == 1, "only rank 0 prints"
    return folder


def test_resuming_with_two_processes_changes_nothing(runs, capsys):
    whole, parts = (checkpoint_of(runs, name) for name in ("by2", "resumed"))
    assert_same(parts, whole)
    assert not any(k.startswith("module.") for k in whole["net"]), "the bare module's names"
    # and with another number of processes it goes on
    by(1, "train.py", [*TINY, "--steps", "12", "--name", "resumed"], runs)
    assert "from step 10" in capsys.readouterr().out
    assert checkpoint_of(runs, "resumed")["step"] == 12


@pytest.mark.parametrize("n", [2, 4])
def test_pictures_are_the_same(runs, n):
    """Also with --npz, whose images are the PNGs, in their order."""
    words = "by1 -n 5 --nfe 4 --sampler ddpm --batch-size 2 --npz --out "
    by(1, "sample.py", words + f"one-for-{n}", runs)
    by(n, "sample.py", words + str(n), runs)
    one, two = read_pictures(runs / f"one-for-{n}"), read_pictures(runs / str(n))
    assert len(one) == 5 and one.std() > 10
    assert np.abs(one - two).max() <= 1
    np.testing.assert_array_equal(np.load(runs / f"{n}.npz")["arr_0"], two)


def error_line(done, program):
    """The one line of the program's own error. torchrun's report repeats it, after a timestamp."""
    lines = [x for x in done.stderr.splitlines() if re.search(rf"(^|\]){program}: error: ", x)]
    assert len(lines) == 1, done.stderr[-3000:]
    return lines[0]


@pytest.mark.parametrize(
    "program, flags, words",
    [
        ("train.py", "--batch-size 3", "3 is global and must be divisible by the 2 processes"),
        ("sample.py", "nobody", "no run nobody"),  # rank 0 alone finds it
        ("train.py", "--lr -1", "--lr must be above 0"),  # before the processes meet
        ("train.py", "--data nowhere", "nowhere"),
    ],
)
def test_a_job_of_two_prints_an_error_once(program, flags, words, tmp_path):
    done = torchrun(2, ROOT / program, *flags.split(), cwd=tmp_path, check=False)
    assert done.returncode != 0 and words in error_line(done, program)
    assert "Connection closed" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_sigterm_to_torchrun_saves_and_resumes(tmp_path):
    """torchrun passes the signal on; both processes stop after the same step, and can resume."""
    words = [TRAIN, *TINY, "--save-every", "2", "--name", "stopped", "--steps"]
    process = start("--standalone", "--nproc_per_node", 2, *words, 300, cwd=tmp_path)
    path, until = tmp_path / "runs" / "stopped" / "checkpoint.pt", time.time() + 60
    while not path.exists() and time.time() < until and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert "stopped by SIGTERM at step" in out
    step = load_checkpoint(path)["step"]
    assert 0 < step < 300
    done = torchrun(2, *words, step + 2, cwd=tmp_path)
    assert f"from step {step}" in done.stdout and load_checkpoint(path)["step"] == step + 2


def test_every_objective_under_two_processes(runs):
    """A plain run, a head (whose trunk is frozen), an autoencoder, its latents, super-resolution:
    the losses of one process, a Γ bit for bit, and pictures within one grey level."""
    small, names = " ".join(["", *SMALL, "--steps 10 --name "]), ["by"]
    for name, program, words in (
        ("head", "papers.heads", "npr by1"),
        ("code", "papers.autoencoder train", "--image-size 16"),
        ("sr", "papers.superres train", "--factor 2 --image-size 8"),
        ("latent", "papers.latents", "code1"),
    ):
        names.append(name)
        for n in (1, 2):
            by(n, program, words + small + f"{name}{n}", runs)
    for name in names:
        one, two = (first_row(runs, f"{name}{n}") for n in (1, 2))
        same = [k for k in one if k not in ("images_per_s", "grad_norm")]
        numbers = [[float(row[k]) for k in same] for row in (one, two)]
        rtol = 1e-4 if name == "by" else 2e-3
        assert_close(*numbers, rtol=rtol, atol=1e-7, msg=f"{name}: {numbers}")
    gammas = []
    for n in (1, 2):
        by(n, "papers.superres enlarge", f"sr1 shapes -n 3 --nfe 2 --out sr-by-{n}", runs)
        by(n, "papers.covariance", "by1 -n 4", runs)
        gammas.append(np.load(runs / "runs" / "by1" / "analytic.npz")["gamma"])
    one, two = (read_pictures(runs / f"sr-by-{n}") for n in (1, 2))
    assert len(one) == 3 and np.abs(one - two).max() <= 1
    np.testing.assert_array_equal(*gammas)


def log_losses(path, words):
    """train.py, which writes down the losses of every step."""
    real, seen = train.train_step, []

    def train_step(*inputs):
        values = real(*inputs)
        seen.append(values[:-1])
        return values

    train.train_step = train_step
    train.main(words)
    if os.environ["RANK"] == "0":
        path.write_text(json.dumps(seen))


def test_one_two_and_four_processes_train_the_same(tmp_path):
    """Losses step by step."""
    words = [*TINY, "--batch-size", "8", "--sa-k", "2", "--etsdm", "--save-every", "100"]
    for n in (1, 2, 4):
        flags = [*words, "--steps", "6", "--name", f"by{n}"]
        together(n, tmp_path, log_losses, tmp_path / f"{n}.json", flags)
    one, two, four = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2, 4))
    assert len(one) == 6
    for other in (two, four):
        # The first step is the same computation up to rounding. Adam divides by the gradient's
        # size, and so turns the rounding of tiny gradients into steps of full length.
        assert_close(other[0], one[0], rtol=1e-5, atol=1e-7)
        assert_close(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how, rank", [("die", 0), ("die", 1), ("hang", 1), ("refuse", 1)])
def test_a_process_that_fails_ends_the_others_with_one_line(how, rank, tmp_path):
    """Killed, stopped for longer than the timeout, or with an error that the others do not see."""
    began = time.time()
    words = [*TINY, "--steps", "12", "--save-every", "3", "--name", "lost"]
    done = torchrun(2, WORKER, how, rank, 7, *words, cwd=tmp_path, check=False)
    assert done.returncode != 0 and time.time() - began < 100
    expected = "no good" if how == "refuse" else "another process of this job has ended"
    assert expected in error_line(done, "train.py")
    assert "RuntimeError" not in done.stderr and "gloo" not in done.stderr
    assert checkpoint_of(tmp_path, "lost")["step"] == 6


def test_torchrun_restarts_a_dead_process(runs):
    """--max-restarts: from the last checkpoint, to the weights of a run in which none died."""
    words = [*TINY, "--steps", "10", "--save-every", "3", "--name", "back"]
    options = ["--max-restarts", "3"]
    done = torchrun(2, WORKER, "die", 1, 7, *words, cwd=runs, options=options)
    assert "from step 6" in done.stdout and done.stdout.count("done:") == 1
    assert_same(*(checkpoint_of(runs, name) for name in ("back", "by2")))
    assert not list((runs / "runs").rglob("*.tmp"))


def test_two_machines(runs):
    """The README's two commands, as two torchrun agents on this machine: the run of two."""
    address = ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    words = [*address, TRAIN, *TINY, "--steps", "10", "--name", "machines"]
    agents = [start("--nnodes", 2, "--node_rank", n, *words, cwd=runs) for n in (0, 1)]
    outs = [agent.communicate(timeout=150) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outs
    assert sum(out.count("done:") for out, _ in outs) == 1, "only rank 0 prints"
    assert_same(*(checkpoint_of(runs, name) for name in ("by2", "machines")))
