"""papers/latents.py: the space, and runs that are complete without their autoencoder."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import data
import denoiser as D
import lipschitz
import sample
import samplers
import schedules
from conftest import SMALL, refused, saved
from papers import autoencoder, covariance, latents
from support.cli import parse_into

CODE = ["train", "--image-size", "16", "--name", "code"]


def first_stage(std=(2.0, 0.5, 1.0, 3.0)):
    torch.manual_seed(0)
    size = dict(image_size=8, channels=3, width=16, mult=(1, 2), latent_channels=4)
    return dict(
        autoencoder=size,
        weights=autoencoder.Autoencoder(**size).state_dict(),
        mean=torch.arange(4.0).double(),
        std=torch.tensor(std).double(),
    )


def test_latents_are_the_encoders_mean_shifted_and_scaled():
    stage = first_stage()
    space, net = latents.Latents(stage), autoencoder.Autoencoder(**stage["autoencoder"])
    net.load_state_dict(stage["weights"])
    x = torch.randn(2, 3, 8, 8)
    z = net.encode(x)[0]
    mean, std = (stage[k].float()[None, :, None, None] for k in ("mean", "std"))
    assert space.shape == z.shape[1:] and space.value_range is None
    assert space.conditioning(x) is None
    assert_close(space.encode(x), (z - mean) / std)
    assert_close(space.decode(space.encode(x)), net.decode(z), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # does not reach what is stored
        assert space.encode(x).dtype == torch.float32


@pytest.fixture
def latent_run(runs):
    return D.load_run("latent")


def test_a_run_samples_without_its_autoencoder(latent_run):
    """The first stage lies in the run itself. (Resuming it: test_systems.py.)"""
    d = latent_run
    assert d.shape == (4, 4, 4) and d.settings["unet"]["image_size"] == 4
    assert d.settings["image_size"] == 16
    shutil.rmtree("runs/code")
    words = "latent -n 2 --nfe 2 --sampler ddpm --out out".split()
    sample.main(words)
    picture = np.array(Image.open("out/000001.png"))
    assert picture.shape == (16, 16, 3)
    # by hand: noise of seed 1 -> latent -> decoder; latents are never clipped
    d = D.load_run("latent")
    arguments = parse_into(sample.SampleConfig, words).arguments(d)
    assert arguments["clip"] is None
    z = samplers.sample_from_seeds(d, [0, 1], **arguments)
    ours = data.to_uint8(d.decode(z))[1].permute(1, 2, 0)
    assert_close(torch.from_numpy(picture).int(), ours.int(), rtol=0, atol=1)


def test_where_the_autoencoder_lies_makes_no_other_run(runs, capsys, no_grids):
    """And a changed autoencoder changes no run."""
    shutil.copytree("runs/code", "elsewhere/code")
    for steps, place in enumerate(("code", "./runs/code/checkpoint.pt", "elsewhere/code/"), 2):
        latents.main([place, *SMALL, "--steps", str(steps), "--name", "here"])
        assert saved("here")["step"] == steps
    assert "other weights" not in capsys.readouterr().out
    before = saved("here")["extra"]["first_stage"]
    autoencoder.main([*CODE, *SMALL, "--steps", "4"])
    latents.main(["code", *SMALL, "--steps", "5", "--name", "here"])
    assert "code has other weights than this run began with" in capsys.readouterr().out
    assert saved("here")["step"] == 5
    assert_close(saved("here")["extra"]["first_stage"], before, rtol=0, atol=0)


def test_latents_are_of_the_autoencoders_own_data(runs):
    np.save("pictures.npy", np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), np.uint8))
    words = ["train", "--image-size", "16", "--name", "mine", "--data", "pictures.npy"]
    autoencoder.main([*words, *SMALL])
    config = parse_into(latents.LatentConfig, ["mine"])
    assert config.data == "pictures.npy" and config.name == "mine-tiny-latent"
    config = parse_into(latents.LatentConfig, ["code", "--data", "pictures.npy"])
    assert config.data == "pictures.npy"


def test_the_noise_of_a_step_stays_within_unit_variance(latent_run):
    """A Γ that is off by a hundredth, times (sigma/alpha)^2 = 4e8 at T of the cosine schedule."""
    var_eps = covariance.variance_from_gamma(torch.full((1001,), 0.99, dtype=torch.float64))
    for eta in (0.0, 1.0):
        variance = covariance.step_variance(latent_run, var_eps, eta)
        assert 0 < float(variance(torch.zeros(1), 1000, 889)) < 1.01


def test_edms_unit_variance_holds_for_latents_too(latent_run):
    schedule, x0 = schedules.make_schedule("edm"), torch.randn(2000, 4, 4, 4, dtype=torch.float64)
    for space, scale in ((latent_run.space, 1.0), (D.Pixels((4, 4, 4)), 0.5)):
        d = D.Denoiser(lambda x, c: x, schedule, "edm", space=space)  # returns its input
        for t in (1.0, 300.0, 1000.0):
            xt = schedules.add_noise(schedule, scale * x0, t, torch.randn_like(x0))
            assert_close(d.network_output(xt, t).std().item(), 1.0, rtol=0, atol=0.02)


def test_latents_have_unit_variance_over_the_data(latent_run):
    shapes = data.load("shapes", 16, 3)
    images = torch.stack([shapes[i] for i in range(256)])
    x0, d = latent_run.encode(data.to_float(images))
    assert d.conditioning is None and x0.shape == (256, 4, 4, 4)
    assert_close(x0.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.1)
    assert_close(x0.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.1)


def test_measurements_are_of_latents(latent_run):
    config = parse_into(lipschitz.LipschitzConfig, ["latent", "-n", "3"])
    ((name, d, x0),) = lipschitz.open_runs(config, torch.device("cpu"))
    assert name == "latent" and x0.shape == (3, 4, 4, 4)
    assert math.isfinite(d.predict(x0, 5)[0].sum())


def test_a_name_with_a_space_is_quoted(runs):
    Path("runs/code").rename("runs/my code")
    refused("python -m papers.latents 'my code'", D.load_run, "my code")
