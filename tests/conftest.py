"""What several tests use: the environment of the programs, and reference numbers.

from conftest import ROOT, DATA, ENV, TINY, run_program, torchrun     # in tests/robustness/ too
"""

import contextlib
import importlib
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

# Programs under test run at the same time on few cores: no busy waiting, one thread each. OpenMP
# reads this once, when torch is first imported: nothing above may do that.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Most tests compare with a CPU's numbers. Those marked `cuda`: CUDA_TESTS=1 pytest -q -m cuda
if not os.environ.get("CUDA_TESTS"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["programs", "conftest"])
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"  # reference numbers: see the README.md there
sys.path.insert(0, str(ROOT))
# For programs that run in a temporary folder: `python -m papers...` finds the project.
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
# For runs of a few steps, which longer ones continue: no decay to the end of the first. (Muon and
# the decays: test_optimizers.py.)
ADAM = "--optimizer adam --lr 0.002 --lr-decay none".split()
# The flags of the smallest run that goes through everything.
TINY = "--image-size 8 --batch-size 4 --precision fp32 --sample-every 1000".split() + ADAM
# For unet.PRESETS["tiny"]: 13,508 weights instead of 1,147,276, a third of the time of a step.
NARROW = dict(channels=8, channel_mult=(1,))


def run_program(*words, cwd, status=0):
    """Run `python words...` in the folder cwd, e.g. ROOT / "train.py", or "-m", "papers.heads"
    -> the ended process, with .stdout and .stderr. status: what it must end with; None: anything.
    """
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env=ENV,
        capture_output=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert status in (None, done.returncode), f"{words}: {done.returncode}\n{done.stderr[-3000:]}"
    return done


def torchrun(n, *words, cwd, check=True, options=()):
    """`torchrun --nproc_per_node n words` in the folder cwd, on a free port of its choosing."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n, *options]
    return run_program(*launch, *words, cwd=cwd, status=0 if check else None)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def process_of(rank, n, port, cwd, function, *inputs):
    """What one of n processes does. Its surroundings are those that torchrun gives it."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.chdir(cwd)
    function(*inputs)


def together(n, cwd, function, *inputs):
    """Call a function in n processes that belong together, in the folder cwd. They are copies of
    one that has imported every program, which takes seconds."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        made = [
            FORKS.Process(target=process_of, args=(rank, n, port, cwd, function, *inputs))
            for rank in range(n)
        ]
        for one in made:
            one.start()
    for one in made:
        one.join(200)
        one.kill()
    assert [one.exitcode for one in made] == n * [0]


def message_of(info):
    """The message of an error that pytest.raises caught; it must be one line."""
    assert "\n" not in str(info.value)
    return str(info.value)


def refused(match, function, *inputs, **options):
    """function(...) must raise an error of one line that matches -> the error."""
    with pytest.raises((ValueError, OSError), match=match) as info:
        function(*inputs, **options)
    message_of(info)
    return info.value


def saved(name="small"):
    """The checkpoint of a run in this folder."""
    from support import checkpoint

    return checkpoint.load_checkpoint(f"runs/{name}/checkpoint.pt")


def small(*flags, name="small"):
    """Train the smallest run, in this folder -> its checkpoint."""
    import train

    train.main([*TINY, "--name", name, *flags])
    return saved(name)


def assert_same(one, two):
    """Two checkpoints have the same bits."""
    import torch

    for key in ("net", "ema", "optimizer"):
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=0)


@contextlib.contextmanager
def peak_below(size):
    """The memory that Python takes inside stays below so many bytes."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < size


def pytest_collection_modifyitems(items):
    if os.environ.get("CUDA_TESTS"):
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and CUDA_TESTS=1"))


@pytest.fixture(autouse=True)
def own_index(tmp_path_factory, monkeypatch):
    """What was checked is remembered here, not in the user's cache folder."""
    from support import readers

    real, folder = readers.index_path, tmp_path_factory.getbasetemp() / "checked"
    monkeypatch.setattr(
        readers, "index_path", lambda source: str(folder / os.path.basename(real(source)))
    )


@pytest.fixture
def here(tmp_path, monkeypatch):
    """In an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_grids(monkeypatch):
    """They take longer than the steps of a small run."""
    monkeypatch.setattr("support.run.RunFolder.save_preview", lambda *inputs: None)


@pytest.fixture
def gold():
    """guided-diffusion's small reference network: numbers (what it gave), size (arguments of
    unet.UNet), state (its weights, under its own names) and x (what it was shown)."""
    import fill
    import torch

    numbers = json.loads((DATA / "unet_guided_diffusion.json").read_text())
    names = dict(
        C="channels",
        mult="channel_mult",
        R="res_blocks",
        attn="attention_resolutions",
        hc="head_channels",
        ss="scale_shift",
        ud="resblock_updown",
    )
    size = {names.get(k, k): v for k, v in numbers["config"].items()}
    state = {k: torch.tensor(v).float() for k, v in fill.state(numbers["keys"]).items()}
    x = torch.tensor(4 * fill.fill("unet-dev", (2, 3, 16, 16)) - 2).float()
    return SimpleNamespace(numbers=numbers, size=size, state=state, x=x)


SMALL = "--batch-size 4 --precision fp32 --steps 2".split() + ADAM  # a training of a second
SYSTEMS = dict(  # finished runs of 2 steps, by the programs that make them; data: shapes
    plain=("train", "--image-size 8"),
    base=("train", "--image-size 8 --etsdm --schedule linear --dropout 0.3"),
    sr=("papers.superres", "train --image-size 16 --etsdm --sa-k 2"),
    code=("papers.autoencoder", "train --image-size 16"),
    latent=("papers.latents", "code --etsdm --sa-k 2"),
    remap=("papers.alternatives", "--image-size 8 --remap sqrt"),
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with the runs of SYSTEMS. Tests that change one use `runs`."""
    from support.run import RunFolder

    folder = tmp_path_factory.mktemp("systems")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(RunFolder, "save_preview", lambda *inputs: None)  # seconds each
        for name, (program, words) in SYSTEMS.items():
            importlib.import_module(program).main([*words.split(), *SMALL, "--name", name])
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """In a folder with copies of those runs, to be changed at will."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
