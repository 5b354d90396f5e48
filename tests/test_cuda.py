"""What is different on a GPU, tested without one. Tests marked `cuda` need one."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from conftest import ENV
from torch.testing import assert_close

from benchmarks import gpu_check
from benchmarks.__main__ import memory_of
from config import RECIPES, Config
from support import checkpoint, distributed, precision, programs
from support.cli import parse_into

CPU = torch.device("cpu")


# ------------------------------------------------------------------ processes


@pytest.mark.parametrize("processes, gpus, backend", [(2, 1, "gloo"), (2, 2, "cpu:gloo,cuda:nccl")])
def test_processes_that_share_a_gpu_use_gloo(processes, gpus, backend, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert distributed.choose_backend(torch.device("cuda", 0)) == backend
    assert distributed.choose_backend(CPU) == "gloo"


@pytest.mark.parametrize(
    "text, lost",
    [
        ("NCCL error: ncclInvalidUsage: invalid usage. Duplicate GPU detected : rank 1", False),
        ("NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)", False),
        ("CUDA error: no kernel image is available for execution on the device", False),
        ("[Rank 1] Watchdog caught collective operation timeout: NCCL timed out", True),
        ("Connection closed by peer [127.0.0.1]:1234", True),
    ],
)
def test_an_error_of_the_gpu_is_not_a_lost_process(text, lost, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert programs.is_peer_failure(dist.DistBackendError(text)) is lost


# ------------------------------------------------------------------ static shapes, layouts


@pytest.mark.parametrize("b, micro, parts", [(10, 6, [5, 5]), (8, 3, [3, 3, 2]), (8, None, [8])])
def test_microbatches_are_of_one_size_if_they_can(b, micro, parts, monkeypatch):
    import train

    words = ["--image-size", "8", "--batch-size", str(b), "--precision", "fp32", "--steps", "1"]
    config = parse_into(Config, [*words, *(["--microbatch", str(micro)] if micro else [])])
    objective = train.DiffusionObjective(config)
    state, seen = train.TrainState(objective, config), []
    real = objective.loss

    def loss(model, images, draws):
        seen.append(len(images))
        return real(model, images, draws)

    monkeypatch.setattr(objective, "loss", loss)
    images = torch.zeros(b, 3, 8, 8, dtype=torch.uint8)
    one = distributed.Distributed(0, 1, 0, CPU)
    train.train_step(state, state.net, images, config, one, None)
    assert seen == parts


def test_a_compiled_network_sees_one_batch_size(monkeypatch):
    sizes = []

    class Net(torch.nn.Module):
        def forward(self, x, c):
            sizes.append(len(x))
            return x + c[:, None], c

    def compiled(net, dynamic, options):
        assert dynamic is False, "a second batch size must not make a graph of symbolic size"
        return net

    monkeypatch.setattr(torch, "compile", compiled)
    x, c = torch.randn(4, 3), torch.arange(4.0)
    call, eager = (precision.for_inference(Net(), CPU, compiled=flag) for flag in (True, False))
    for n in (4, 3, 1):
        assert_close(call(x[:n], c[:n].clone()), eager(x[:n], c[:n]), rtol=0, atol=0)
    assert sizes == [4, 4, 4, 3, 4, 1]


@pytest.mark.parametrize("layouts", [("contiguous", "channels_last"), ("channels_last",) * 2])
def test_moments_take_the_layout_of_their_weights(layouts):
    """Else the fused Adam gives other weights, without an error."""

    def make(layout):
        torch.manual_seed(0)
        net = torch.nn.Conv2d(8, 8, 3)
        if layout == "channels_last":
            net.to(memory_format=torch.channels_last)
        return net, torch.optim.Adam(net.parameters(), lr=0.1, fused=True)

    def step(net, optimizer):
        g = torch.Generator().manual_seed(1)
        for p in net.parameters():
            grad = torch.randn(p.shape, generator=g)
            p.grad = torch.empty_like(p).copy_(grad)
        optimizer.step()

    net, optimizer = make(layouts[0])
    step(net, optimizer)
    other, resumed = make(layouts[1])
    other.load_state_dict(net.state_dict())
    checkpoint.load_optimizer(resumed, copy.deepcopy(optimizer.state_dict()), "a file")
    step(net, optimizer)
    step(other, resumed)
    assert_close(other.weight, net.weight, rtol=0, atol=1e-6)


# ------------------------------------------------------------------ memory


# GB of weights and so on, GB per image: benchmarks/'s calculation for bf16 in eager mode
NEEDS = {"ffhq256": (2.5, 2.60), "ffhq256-large": (13.1, 4.31), "adm256": (10.0, 5.20)}


@pytest.mark.parametrize("preset", NEEDS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_preset_fits_80_gb(preset, k):
    config = parse_into(Config, ["--preset", preset, "--sa-k", str(k)])
    fixed, each = NEEDS[preset]
    assert fixed + each * k * config.microbatch < 78
    assert RECIPES[preset]["batch_size"] % config.microbatch == 0
    assert parse_into(Config, ["--preset", preset, "--microbatch", "5"]).microbatch == 5


@pytest.mark.slow
def test_the_calculation_has_cudas_autocast_rules():
    """GroupNorm in float32: with the CPU's rules, 16 images of ffhq256 would need 26 GB."""
    one, four = (memory_of("ffhq256", micro, False) / 1e9 for micro in (1, 4))
    fixed, each = NEEDS["ffhq256"]
    assert (four - one) / 3 == pytest.approx(each, rel=0.02)
    assert one == pytest.approx(fixed + each, rel=0.02)
    assert torch.nn.GroupNorm.forward.__name__ == "forward", (
        "the calculation leaves no change behind"
    )


# ------------------------------------------------------------------ the tests themselves


def test_tests_do_not_use_a_gpu():
    if not os.environ.get("CUDA_TESTS"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
        assert ENV["CUDA_VISIBLE_DEVICES"] == ""


# ------------------------------------------------------------------ the check of a GPU


def check_a_gpu(folder, *flags):
    """What the program prints."""
    words = [sys.executable, "-m", "benchmarks.gpu_check", "--out", folder, *flags]
    return subprocess.run(
        words, cwd=folder, env=ENV, capture_output=True, encoding="utf-8", timeout=1300
    ).stdout


@pytest.mark.slow
def test_the_gpu_check_rehearsed_on_a_cpu(tmp_path):
    """Every worker but the compiled sides, GPU and CPU being the same: all must be right."""
    assert "not right: nothing" in check_a_gpu(tmp_path, "--rehearse")
    found = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))["results"]
    assert set(gpu_check.WORKERS) <= set(found)
    assert set(gpu_check.PROGRAMS) <= set(found["programs gpu"])
    for side in ("plain fp32 tiny", "eager bf16 tiny", "sample tiny"):
        assert found[side]["images_s"] > 0 and 0 < found[side]["mfu"] < 1


@pytest.mark.cuda
def test_the_gpu_check(tmp_path):
    """On a GPU: 8 minutes."""
    assert "not right: nothing" in check_a_gpu(tmp_path)
