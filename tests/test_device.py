"""--device: what it chooses, and every program on emulated GPUs, CUDA and Apple's."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import message_of
from emulated import OnGPU, emulated
from kills import read_pictures

import data
import emulated as emulation
import metrics
import sample
import train
import unet
from config import Config
from support import device, distributed, features, precision
from support.cli import parse_into
from support.image_files import Array

CPU = torch.device("cpu")
# Fewer layers than the preset `tiny`, whose name it takes: each call has its price here.
NETWORK = unet.PRESETS["tiny"] | dict(channels=8, channel_mult=(1, 2), norm_groups=4)
SMALL = "--image-size 16 --batch-size 4 --sample-every 9 --no-compile --precision fp32".split()
KINDS = pytest.mark.parametrize("kind", ["mps", "cuda"])


@pytest.mark.parametrize(
    "name, processes, message",
    [
        ("cuda", 1, "--device cuda: PyTorch sees no GPU"),
        ("mps", 1, "--device mps: PyTorch sees no Apple GPU"),
        ("mps", 2, "--device mps takes one process"),
    ],
)
def test_a_device_that_cannot_be_used(name, processes, message, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: processes > 1)
    with pytest.raises(ValueError) as info:
        device.choose_device(name, 0, processes)
    assert message_of(info).startswith(message)


def test_auto_never_chooses_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.choose_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device.choose_device("auto", 3) == torch.device("cuda", 1)
    assert device.choose_device("cpu", 3) == CPU


def test_mps_computes_in_float32():
    mps = torch.device("mps")
    assert precision.autocast_dtype("auto", mps) is None
    with pytest.raises(ValueError, match="--precision bf16 is for cuda and cpu"):
        precision.autocast_dtype("bf16", mps)


def test_the_emulated_device_refuses_float64():
    with emulated("mps"):
        x = torch.ones(2, device="mps")
        assert x.device.type == "mps" and (x + 1).device.type == "mps"
        for wrong in (x.double, lambda: torch.ones(2, dtype=torch.float64).to(x.device)):
            with pytest.raises(TypeError, match="float64"):
                wrong()
        with pytest.raises(AssertionError, match="must wait"):
            torch.ones(2).to("mps", non_blocking=True)
        with pytest.raises(AssertionError, match="two devices"):
            x + torch.ones(2)
        assert device.double(x).dtype == torch.float64 and device.double(x).device == CPU


def test_the_time_embedding_is_float32_on_mps():
    """Angles of up to 1000 radians, to 1e-4."""
    t = torch.tensor([0.0, 3.0, 999.0])
    with emulated("mps"):
        found = unet.timestep_embedding(t.to("mps"), 32).cpu()
    assert isinstance(found, torch.Tensor) and not isinstance(found, OnGPU)
    torch.testing.assert_close(
        found, unet.timestep_embedding(t, 32), rtol=0, atol=1e-4, check_dtype=False
    )


def run(program, words, kind="mps"):
    """A program on an emulated device."""
    with emulated(kind):
        importlib.import_module(program).main([*words.split(), "--device", kind])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a run that was trained on the emulated device."""
    folder = tmp_path_factory.mktemp("mps")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        np.save("few.npy", np.zeros((6, 16, 16, 3), np.uint8))
        patch.setattr("support.run.RunFolder.save_preview", lambda *inputs: None)  # seconds
        patch.setitem(unet.PRESETS, "tiny", NETWORK)
        run("train", f"{' '.join(SMALL)} --steps 1 --sa-k 2 --etsdm --flip --name plain")
        yield folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


def test_training_sampling_and_metrics_without_float64(here, monkeypatch, capsys):
    words = "plain -n 3 --batch-size 2 --nfe 3 --sampler ddpm".split()
    sample.main([*words, "--out", "cpu"])
    run("sample", " ".join([*words, "--out", "mps"]))
    assert np.abs(read_pictures(Path("cpu")) - read_pictures(Path("mps"))).max() <= 1
    means = lambda path, device: lambda images: images.mean((2, 3))  # noqa: E731
    monkeypatch.setattr(features, "open_exported", means)
    Path("means.pt2").touch()
    words = "fid plain shapes -n 5 --nfe 2 --batch-size 2 --features means.pt2 --json"
    capsys.readouterr()
    metrics.main(words.split())
    run("metrics", words)
    cpu, mps = (json.loads(x)["value"] for x in capsys.readouterr().out.splitlines() if x[0] == "{")
    assert mps == pytest.approx(cpu, rel=0.01)
    # A run goes on on another device.
    train.main([*SMALL, *"--steps 2 --sa-k 2 --etsdm --flip --name plain --device cpu".split()])


LOSSES = """
train --schedule edm --etsdm
train --continuous --prediction x0 --loss-space v --recompute
train --schedule zero-terminal-snr --microbatch 3 --data few.npy
papers.alternatives --sa-k 2 --sa-reuse --remap sqrt
papers.alternatives --lipschitz-reg 3 --sa-k 2
papers.superres train
papers.autoencoder train
""".strip().splitlines()
MEASUREMENTS = """
sample plain -n 2 --nfe 4 --sampler dpm-solver --spacing logsnr
sample plain -n 2 --nfe 4 --sampler dpm-solver++
sample plain -n 2 --nfe 4 --sampler heun --churn 2
lipschitz plain -n 2 --max-t 3
lipschitz plain -n 2 --perturb
gap plain -n 2 --steps 3 --ideal --data few.npy
papers.covariance plain -n 1 --batch-size 500
""".strip().splitlines()


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("command", LOSSES + MEASUREMENTS)
def test_every_loss_and_measurement(command, kind, here, no_grids, tmp_path):
    program, words = command.split(maxsplit=1)
    if command in LOSSES:
        words += f" {' '.join(SMALL)} --steps 1 --name {tmp_path.name}"
    elif program == "sample":
        words += f" --out {tmp_path}/out"
    run(program, words, kind)


@pytest.mark.slow
@KINDS
def test_heads_and_latents(kind, here):
    few = "--batch-size 4 --steps 1 --sample-every 1 --no-compile --precision fp32"
    run("papers.heads", f"sn plain {few} --name sn-{kind}", kind)
    run("sample", f"sn-{kind} -n 2 --nfe 3 --sampler ddpm --variance sn", kind)
    run("papers.autoencoder", f"train {few} --image-size 16 --name coder-{kind}", kind)
    run("papers.latents", f"coder-{kind} {few} --name latent-{kind}", kind)
    run("sample", f"latent-{kind} -n 2 --nfe 3", kind)
    run("papers.autoencoder", f"reconstruct coder-{kind} shapes -n 2 --out again-{kind}", kind)


def test_the_moments_of_features_are_taken_on_the_device_if_it_has_float64():
    f, one = torch.randn(20, 3), distributed.Distributed(0, 1, 0, CPU)
    sums = {kind: features.FeatureSums(3) for kind in ("cpu", "mps", "cuda")}
    sums["cpu"].add(f)
    mu, sigma = sums["cpu"].moments(one)
    np.testing.assert_allclose(mu, f.double().mean(0))
    for kind, home in (("mps", "cpu"), ("cuda", "cuda")):
        with emulated(kind):
            sums[kind].add(f.to(kind))
            assert sums[kind].outer.device.type == home
            found = sums[kind].moments(one)
        np.testing.assert_array_equal(found[0], mu)
        np.testing.assert_array_equal(found[1], sigma)


def test_images_in_memory_are_kept_on_the_card_if_they_fit():
    images = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
    for kind, free, home in (
        ("cuda", 10**9, "cuda"),
        ("cuda", images.nbytes, "cpu"),
        ("mps", 0, "cpu"),
    ):
        with emulated(kind), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
            stream = data.batches(Array(images), 4, 0, 0, device=torch.device(kind))
            batch = next(stream)
            assert batch.device.type == home
            expected = next(data.batches(Array(images), 4, 0, 0))
            torch.testing.assert_close(batch.cpu(), expected, rtol=0, atol=0)


def test_only_cuda_compiles_by_default_in_channels_last(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda net, dynamic: ("compiled", dynamic))
    for kind, flag, compiled in (
        ("cuda", None, True), ("cuda", False, False), ("mps", None, False), ("cpu", None, False),
        ("cpu", True, True),
    ):  # fmt: skip
        net = torch.nn.Conv2d(4, 8, 3)
        with emulated("mps" if kind == "mps" else "cuda"):
            precision.place(net, torch.device(kind), flag)
            found = precision.for_training(net, torch.device(kind), flag)
            last = net.weight.is_contiguous(memory_format=torch.channels_last)
        assert found == (("compiled", False) if compiled else net)
        assert last == (compiled and kind == "cuda"), "eager, and on a CPU, it only costs"


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_step_waits_for_the_gpu_once(optimizer, here):
    """.tolist(), .item() and blocking copies to the CPU stop the program until the GPU is done."""
    words = "--batch-size 4 --image-size 16 --flip --sa-k 2 --etsdm --precision fp32 --optimizer"
    config = parse_into(Config, [*words.split(), optimizer])
    images = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    with emulated("cuda"):
        objective = train.DiffusionObjective(config)
        precision.place(objective.net, torch.device("cuda", 0), False)
        state = train.TrainState(objective, config)
        one = distributed.Distributed(0, 1, 0, torch.device("cuda", 0))
        before = len(emulation.waits)
        train.train_step(state, state.net, images, config, one, None)
        assert len(emulation.waits) - before == 1, emulation.waits[before:]
