"""spaces.py: pixels, small images beside them, latents; and the runs that are made of them."""

import math
import os
import shlex
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from papers import autoencoder
from papers import covariance
import data
import denoiser as D
import files
import metrics
import sample
import samplers
import sampling
import schedules
import sources
import spaces
import train

SMALL = ["--batch-size", "4", "--precision", "fp32", "--steps", "2"]
SR = ["--image-size", "16", "--task", "sr", "--name", "sr", "--etsdm", "--sa-k", "2"]
CODE = ["--task", "autoencoder", "--image-size", "16", "--name", "code"]
LATENT = ["--latent", "code", "--name", "latent", "--etsdm", "--sa-k", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with four small finished runs: plain, sr, code (an autoencoder), latent."""
    folder = tmp_path_factory.mktemp("spaces")
    before = os.getcwd()
    os.chdir(folder)
    try:
        train.main([*SMALL, "--image-size", "8", "--name", "plain"])
        train.main([*SMALL, *SR])
        train.main([*SMALL, *CODE])
        train.main([*SMALL, *LATENT])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """In a folder with those runs, to be changed at will."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)


def images(n, side=8, channels=3):
    shapes = data.load("shapes", side, channels)
    return torch.stack([shapes[i] for i in range(n)])


def test_pixels_are_themselves():
    space, x = D.Pixels(3, 8), torch.randn(2, 3, 8, 8)
    assert space.shape == (3, 8, 8) and space.value_range == (-1.0, 1.0)
    assert space.encode(x) is x and space.decode(x) is x and space.given(x) is None


def test_shrinking_is_the_mean_over_blocks_as_pillow_has_it():
    pixels = images(3, 32)
    small = superres.LowRes(3, 32, 4).shrink(data.to_float(pixels))
    assert small.shape == (3, 3, 8, 8)
    for image, ours in zip(pixels, data.to_uint8(small), strict=True):
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).reduce(4)
        assert_close(
            ours.permute(1, 2, 0).int(), torch.from_numpy(np.array(theirs)).int(), atol=1, rtol=0
        )
    assert_close(
        data.to_float(data.to_uint8(small)), small, rtol=0, atol=0
    )  # 256 levels, as a file


def test_enlarging_is_bicubic_as_pillow_has_it():
    space, small = superres.LowRes(1, 32, 4), data.to_float(images(4, 8, 1))
    for ours, one in zip(space.enlarge(small), small, strict=True):
        theirs = Image.fromarray(one[0].numpy()).resize((32, 32), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(theirs)).clamp(-1, 1)  # overshoot is cut
        assert_close(ours[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("factor", [1, 3])
def test_factors_that_cannot_be(factor):
    with pytest.raises(ValueError, match=f"--factor {factor} must be at least 2 and divide the 8"):
        superres.LowRes(3, 8, factor)


def first_stage(std=(2.0, 0.5, 1.0, 3.0)):
    torch.manual_seed(0)
    size = dict(image_size=8, channels=3, width=16, mult=(1, 2), latent_channels=4)
    net = autoencoder.Autoencoder(**size)
    return dict(
        autoencoder=size,
        weights=net.state_dict(),
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
    assert space.shape == z.shape[1:] and space.value_range is None and space.given(x) is None
    assert_close(space.encode(x), (z - mean) / std)
    assert_close(space.decode(space.encode(x)), net.decode(z), rtol=1e-4, atol=1e-5)


def test_autocast_does_not_reach_what_is_stored():
    with torch.autocast("cpu", torch.bfloat16):
        assert latents.Latents(first_stage()).encode(torch.randn(2, 3, 8, 8)).dtype == torch.float32


# ------------------------------------------------------------------ super-resolution


def test_a_super_resolution_run_from_training_to_psnr(runs, capsys):
    train.main([*SMALL, *SR, "--steps", "3"])
    assert "next: python sample.py sr --low-res IMAGES" in capsys.readouterr().out
    grid = Image.open("runs/sr/samples/0000003.png")
    assert grid.size[0] % (3 * 16) == 0  # bicubic, sample, original
    d = D.load_run("sr")
    assert d.settings["unet"]["in_channels"] == 6 and d.settings["factor"] == 4
    sample.main(["sr", "--low-res", "shapes", "-n", "3", "--nfe", "2", "--out", "large"])
    out = capsys.readouterr().out
    assert "shrunk to 4x4" in out and "next: python metrics.py psnr" in out
    names = [f"{i:06d}.png" for i in range(3)]
    for folder in ("large", "large-bicubic", "large-original"):
        assert sorted(p.name for p in Path(folder).glob("*.png")) == names
    originals = images(3, 16)
    for i, name in enumerate(names):
        theirs = torch.from_numpy(np.array(Image.open(f"large-original/{name}"))).permute(2, 0, 1)
        assert_close(theirs, originals[i], rtol=0, atol=0)
    given = data.to_uint8(superres.LowRes(3, 16, 4).given(data.to_float(originals)))
    theirs = np.stack([np.array(Image.open(f"large-bicubic/{name}")) for name in names])
    assert_close(torch.from_numpy(theirs).permute(0, 3, 1, 2), given, rtol=0, atol=0)
    metrics.main(["psnr", "large-bicubic", "large-original"])
    expected = metrics.psnr(given, originals).mean()
    assert f"PSNR {expected:.4f} dB" in capsys.readouterr().out


@pytest.mark.slow
def test_small_images_are_enlarged_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main([*SMALL, "--image-size", "16", "--task", "sr", "--name", "sr", "--channels", "1"])
    gray = images(2, 4, 1)
    Path("small").mkdir()
    for i, image in enumerate(gray):
        Image.fromarray(image[0].numpy()).save(f"small/{i}.png")
    flags = ["--nfe", "2", "--batch-size", "1"]
    sample.main(["sr", "--low-res", "small", "--out", "two", *flags])
    assert "shrunk" not in capsys.readouterr().out and not Path("two-original").exists()
    sample.main(["sr", "--low-res", "small/0.png", "--out", "one", *flags])
    assert "1 images" in capsys.readouterr().out
    one, two = (np.array(Image.open(f"{folder}/000000.png")) for folder in ("one", "two"))
    assert_close(torch.from_numpy(one), torch.from_numpy(two), rtol=0, atol=0)
    # the network has looked at it: with another image next to the same noise, another picture
    sample.main(["sr", "--low-res", "small/1.png", "--out", "other", *flags])
    assert (np.array(Image.open("other/000000.png")) != one).any()
    two = np.array(Image.open("two/000001.png"))
    # other contents under the same name: nothing old stays
    Image.fromarray(255 - gray[1, 0].numpy()).save("small/1.png")
    sample.main(["sr", "--low-res", "small", "--out", "two", *flags])
    assert (np.array(Image.open("two/000001.png")) != two).any()
    # a folder that held more: partners of pictures that are gone do not stay
    Image.fromarray(gray[0, 0].numpy()).save("two-bicubic/000009.png")
    sample.main(["sr", "--low-res", "small", "--out", "two", *flags])
    assert not Path("two-bicubic/000009.png").exists()


def test_what_low_res_takes(runs, capsys):
    """Images of the small size, 4x4, or of the full one, 16x16, and more; nothing between."""
    flags = ["--nfe", "1", "--out", "out", "--low-res"]

    def folder(name, *sizes):
        Path(name).mkdir()
        for i, size in enumerate(sizes):
            Image.new("RGB", size, (40 * i, 90, 20)).save(f"{name}/{i}.png")
        return name

    denoiser = D.load_run("sr")
    np.save("square.npy", np.zeros((2, 12, 12, 3), np.uint8))
    np.save("wide.npy", np.zeros((2, 16, 8, 3), np.uint8))
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.write(f"{folder('unpacked', (30, 9))}/0.png", "0.png")
    for source, size in {
        folder("middle", (12, 12)): "12x12",
        folder("wide", (16, 8)): "16x8",
        folder("narrow", (4, 8)): "4x8",
        folder("mixed", (20, 20), (4, 4)): "4x4",
        "square.npy": "12x12",
        "wide.npy": "8x16",
        "x.zip": "30x9",
    }.items():
        with pytest.raises(ValueError) as caught:
            sample.Known(source, denoiser)
        assert str(caught.value) == (
            f"--low-res {source} has images of {size}: give 4x4, this run's small size, or "
            "originals of at least 16x16"
        )
    with pytest.raises(ValueError, match="^--low-res: no such file or folder: nowhere"):
        sample.main(["sr", *flags, "nowhere"])
    assert not Path("out").exists()
    capsys.readouterr()
    sample.main(["sr", *flags, folder("right", (16, 16))])
    assert "note:" not in capsys.readouterr().out
    sample.main(["sr", *flags, folder("large", (16, 16), (20, 17))])
    out = capsys.readouterr().out
    assert "note: images of other sizes than 16x16 are resized and cropped" in out


def test_commands_that_are_printed_can_be_pasted(runs, capsys, monkeypatch):
    sample.main(["sr", "--low-res", "shapes", "-n", "1", "--nfe", "1", "--out", "my out"])
    command = capsys.readouterr().out.split("next: ")[1].strip()
    here = Path.cwd()
    words = ["python", "metrics.py", "psnr", f"{here}/my out", f"{here}/my out-original"]
    assert shlex.split(command) == words
    Path("runs/sr").rename("runs/my sr")
    with pytest.raises(ValueError, match="python sample.py 'my sr' --low-res IMAGES writes"):
        metrics.main(["fid", "my sr", "shapes", "-n", "4", "--features", __file__])
    Path("runs/code").rename("runs/my code")
    with pytest.raises(ValueError, match="python train.py --latent 'my code'"):
        D.load_run("my code")
    Path("runs/plain").rename("runs/my plain")
    with pytest.raises(ValueError, match="train.py --head npr --from '.*my plain'"):
        sample.main(["my plain", "--variance", "npr"])
    monkeypatch.setattr(covariance, "gamma", lambda *a: torch.zeros(1001, dtype=torch.float64))
    covariance.main(["my plain", "-n", "1"])
    command = capsys.readouterr().out.split("next: ")[1]
    assert shlex.split(command)[:4] == ["python", "sample.py", "runs/my plain", "--sampler"]
    Path("runs/my plain/analytic.npz").unlink()
    with pytest.raises(FileNotFoundError, match="^--variance analytic: .* covariance.py '.*plain'"):
        sample.main(["my plain", "--variance", "analytic"])


def test_whom_low_res_is_for(runs):
    Path("photos-original").mkdir()  # where comparisons would go, were they not the user's own
    for i in range(3):
        Image.new("RGB", (20, 20)).save(f"photos-original/{i}.png")
    for words, flags in (
        ("say which, with --low-res IMAGES", ["sr"]),
        ("was not trained to enlarge images", ["plain", "--low-res", "shapes"]),
        ("leave out --npz", ["sr", "--low-res", "shapes", "--npz"]),
        ("holds something else", ["sr", "--low-res", "photos-original", "--out", "photos"]),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            sample.main(flags)
        assert "\n" not in str(caught.value)
    assert sorted(os.listdir("photos-original")) == ["0.png", "1.png", "2.png"]
    with pytest.raises(ValueError, match="sr enlarges images: python sample.py sr --low-res"):
        metrics.main(["fid", "sr", "shapes", "-n", "4", "--features", __file__])


# ------------------------------------------------------------------ latents


@pytest.fixture
def latent_run(runs):
    return D.load_run("latent")


def test_a_latent_run_needs_nothing_but_its_checkpoint(latent_run, capsys):
    d = latent_run
    assert d.space.shape == (4, 4, 4) and d.settings["unet"]["image_size"] == 4
    assert d.settings["image_size"] == 16
    Path("runs/code/checkpoint.pt").unlink()  # the first stage lies in the run itself
    sample.main(["latent", "-n", "2", "--nfe", "2", "--sampler", "ddpm"])
    picture = np.array(Image.open("runs/latent/generated/ddpm-2/000001.png"))
    assert picture.shape == (16, 16, 3)
    # by hand: noise of seed 1 -> latent -> decoder; latents are never clipped
    args = sample.parse(["--nfe", "2", "--sampler", "ddpm"])
    arguments = sampling.from_flags(args, d)
    assert arguments["clip"] is None
    z = samplers.sample_from_seeds(d, [0, 1], d.space.shape, **arguments)
    assert_close(
        torch.from_numpy(picture).permute(2, 0, 1).int(),
        data.to_uint8(d.space.decode(z))[1].int(),
        rtol=0,
        atol=1,
    )
    with pytest.raises(ValueError, match="latents have no value_range"):
        sample.main(["latent", "--clip", "on"])


def test_latents_are_of_the_autoencoders_own_data(runs):
    np.save("pictures.npy", np.random.default_rng(0).integers(0, 255, (9, 16, 16, 3), np.uint8))
    flags = ["--task", "autoencoder", "--image-size", "16", "--name", "mine", "--data"]
    train.main([*SMALL, *flags, "pictures.npy"])
    s = train.resolve(train.parse(["--latent", "mine"]))
    assert s["data"] == "pictures.npy" and s["name"] == "mine-tiny-latent"
    s = train.resolve(train.parse(["--latent", "code", "--data", "pictures.npy"]))
    assert s["data"] == "pictures.npy"


def test_the_noise_of_a_latent_step_stays_within_unit_variance(latent_run):
    """A Γ that is off by a hundredth, times (s/a)^2 = 4e8 at T of the cosine schedule."""
    gamma = torch.full((1001,), 0.99, dtype=torch.float64)
    for eta in (0.0, 1.0):
        variance = covariance.step_variance(latent_run, covariance.variance_from_gamma(gamma), eta)
        assert 0 < float(variance(torch.zeros(1), 1000, 889)) < 1.01


def test_edms_unit_variance_holds_for_latents_too(latent_run):
    schedule, x0 = schedules.make_schedule("edm"), torch.randn(2000, 4, 4, 4, dtype=torch.float64)
    for space, scale in ((latent_run.space, 1.0), (D.Pixels(4, 4), 0.5)):
        d = D.Denoiser(lambda x, c: x, schedule, "edm", space=space)  # says what it sees
        for t in (1.0, 300.0, 1000.0):
            seen = d.prediction_at(schedules.add_noise(schedule, scale * x0, t, torch.randn_like(x0)), t)
            assert_close(seen.std().item(), 1.0, rtol=0, atol=0.02)


def test_latents_have_unit_variance_over_the_data(latent_run):
    x0, d = latent_run.encode(data.to_float(images(256, 16)))
    assert d.given is None and x0.shape == (256, 4, 4, 4)
    assert_close(x0.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.1)
    assert_close(x0.std((0, 2, 3)), torch.ones(4), rtol=0, atol=0.1)


def test_a_latent_run_resumes_with_the_first_stage_it_began_with(latent_run):
    before = files.load_checkpoint("runs/latent/checkpoint.pt")["extra"]["first_stage"]
    train.main([*SMALL, *CODE, "--steps", "4"])
    train.main([*SMALL, *LATENT, "--steps", "3"])
    after = files.load_checkpoint("runs/latent/checkpoint.pt")
    assert after["step"] == 3
    assert_close(after["extra"]["first_stage"], before, rtol=0, atol=0)


def test_analysis_measures_latents(latent_run):
    args = type("Args", (), dict(runs=["latent"], weights="ema", data=None, num=3, seed=0))
    ((name, d, x0),) = sources.opened(args, torch.device("cpu"))
    assert name == "latent" and x0.shape == (3, 4, 4, 4)
    assert math.isfinite(d.predict(x0, 5)[0].sum())


def test_an_autoencoder_draws_nothing_by_itself(runs):
    with pytest.raises(ValueError, match="code is an autoencoder.*train.py --latent code"):
        sample.main(["code"])
    with pytest.raises(ValueError, match="plain is not an autoencoder"):
        train.main([*SMALL, "--latent", "plain"])
    with pytest.raises(ValueError, match="without --task, --image-size and --channels"):
        train.main([*SMALL, "--latent", "code", "--image-size", "16"])


def test_reconstructions_have_a_psnr(runs, capsys):
    """psnr AUTOENCODER_RUN IMAGES: against encoding and decoding by hand."""
    metrics.main("psnr code shapes -n 5 --image-size 16 --batch-size 2".split())
    out = capsys.readouterr().out
    assert "reconstructions by code at step 2, from 4x4x4 latents" in out
    state = files.load_checkpoint("runs/code/checkpoint.pt")
    net = autoencoder.Autoencoder(**state["settings"]["autoencoder"])
    net.load_state_dict(state["ema"])
    originals = images(5, 16)
    back = data.to_uint8(net.eval().decode(net.encode(data.to_float(originals))[0]).detach())
    expected = metrics.psnr(back, originals).mean()
    assert float(out.split("PSNR ")[1].split(" dB")[0]) == pytest.approx(expected.item(), abs=0.01)
    with pytest.raises(ValueError, match="encodes images of 16 pixels in 3 channels.*3x8x8"):
        metrics.main("psnr code shapes -n 5 --image-size 8".split())
    with pytest.raises(ValueError, match="code is an autoencoder"):
        metrics.main(["fid", "code", "shapes", "--features", __file__])
