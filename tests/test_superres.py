"""papers/superres.py: what the network sees of the small image, and its programs."""

import json
import os
import shlex
import zipfile
from pathlib import Path

import numpy as np
import torch
from conftest import SMALL, refused
from PIL import Image
from torch.testing import assert_close

import data
import denoiser as D
import metrics
import sample
from papers import superres


def shapes(n, side=8, channels=3):
    images = data.load("shapes", side, channels)
    return torch.stack([images[i] for i in range(n)])


def picture(path):
    return torch.from_numpy(np.array(Image.open(path)))


def pictures(folder):
    """The PNGs of a folder, in the order of their names: (N, C, H, W)."""
    return torch.stack([picture(p) for p in sorted(Path(folder).glob("0*.png"))]).movedim(3, 1)


def enlarge(words, out="out"):
    superres.main(["enlarge", *words.split(), "--nfe", "2", "--out", out])


def folder(name, *sizes):
    Path(name).mkdir()
    for i, size in enumerate(sizes):
        Image.new("RGB", size, (40 * i, 90, 20)).save(f"{name}/{i}.png")
    return name


def test_shrinking_is_the_mean_over_blocks_as_in_pillow():
    pixels = shapes(3, 32)
    small = superres.LowRes((3, 32, 32), 4).shrink(data.to_float(pixels))
    assert small.shape == (3, 3, 8, 8)
    for image, ours in zip(pixels, data.to_uint8(small), strict=True):
        theirs = Image.fromarray(image.permute(1, 2, 0).numpy()).reduce(4)
        theirs = torch.from_numpy(np.array(theirs)).int()
        assert_close(ours.permute(1, 2, 0).int(), theirs, atol=1, rtol=0)
    rounded = data.to_float(data.to_uint8(small))  # 256 levels, as a file
    assert_close(rounded, small, rtol=0, atol=0)


def test_enlarging_is_bicubic_as_in_pillow():
    space, small = superres.LowRes((1, 32, 32), 4), data.to_float(shapes(4, 8, 1))
    for ours, image in zip(space.enlarge(small), small, strict=True):
        theirs = Image.fromarray(image[0].numpy()).resize((32, 32), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(theirs)).clamp(-1, 1)  # overshoot is cut
        assert_close(ours[0], expected, rtol=0, atol=1e-5)


def test_from_training_to_psnr(runs, capsys):
    words = ["train", "--image-size", "16", "--name", "sr", "--etsdm", "--sa-k", "2"]
    superres.main([*words, *SMALL, "--steps", "3"])  # resumes
    out = capsys.readouterr().out
    assert "next: python -m papers.superres enlarge sr IMAGES" in out and "from step 2" in out
    grid = Image.open("runs/sr/samples/0000003.png")
    assert grid.size[0] % (3 * 16) == 0  # bicubic, sample, original
    d = D.load_run("sr")
    assert d.settings["unet"]["in_channels"] == 6 and d.settings["factor"] == 4 and d.step == 3
    enlarge("sr shapes -n 2", "large")
    enlarge("sr shapes -n 3", "large")  # one more in the same folder
    out = capsys.readouterr().out
    assert "shrunk to 4x4" in out and "next: python metrics.py psnr large large-original" in out
    assert len(pictures("large")) == 3
    originals = shapes(3, 16)
    assert_close(pictures("large-original"), originals, rtol=0, atol=0)
    known = superres.LowRes((3, 16, 16), 4).conditioning(data.to_float(originals))
    assert_close(pictures("large-bicubic"), data.to_uint8(known), rtol=0, atol=0)
    metrics.main(["psnr", "large-bicubic", "large-original"])
    expected = metrics.psnr(data.to_uint8(known), originals).mean()
    assert f"PSNR {expected:.4f} dB" in capsys.readouterr().out
    # the same command again changes nothing, and says so
    before = {p: p.read_bytes() for p in Path(".").glob("large*/*.png")}
    enlarge("sr shapes -n 3", "large")
    assert "3 of 3 images exist already" in capsys.readouterr().out
    assert before == {p: p.read_bytes() for p in Path(".").glob("large*/*.png")}


def test_colour_bias(here, capsys):
    """The mean over images and channels of how far each mean colour moved, without its sign."""
    rng = np.random.default_rng(0)
    for name in ("out", "out-original"):
        Path(name).mkdir()
    for i, shift in enumerate([(3, -2, 0), (-1, 0, 6)]):
        image = rng.integers(20, 200, (8, 8, 3))
        noise = rng.permutation(np.arange(64) % 2 * 2 - 1).reshape(8, 8, 1)  # mean 0
        Image.fromarray(image.astype(np.uint8)).save(f"out-original/{i}.png")
        Image.fromarray((image + noise + shift).astype(np.uint8)).save(f"out/{i}.png")
    superres.main(["colour", "out", "out-original"])
    assert f"colour bias {12 / 6:.3f} of 255 levels | 2 pairs" in capsys.readouterr().out
    superres.main(["colour", "out", "out-original", "--json"])
    assert json.loads(capsys.readouterr().out) == {"metric": "colour bias", "value": 2.0}
    Image.new("RGB", (4, 4)).save("out/1.png")
    refused(
        "^RESULTS out: 1.png has another shape", superres.main, ["colour", "out", "out-original"]
    )
    Path("out/1.png").unlink()
    refused("^RESULTS out: it must hold PNGs", superres.main, ["colour", "out", "out-original"])
    refused("^RESULTS ORIGINALS: give two folders, not 1", superres.main, ["colour", "out"])


def test_small_images_are_enlarged_as_they_are(here, capsys):
    superres.main(["train", *SMALL, "--image-size", "16", "--name", "sr", "--channels", "1"])
    gray = shapes(2, 4, 1)
    Path("small").mkdir()
    for i, image in enumerate(gray):
        Image.fromarray(image[0].numpy()).save(f"small/{i}.png")
    enlarge("sr small --batch-size 1", "two")
    assert "shrunk" not in capsys.readouterr().out and not Path("two-original").exists()
    enlarge("sr small/0.png", "one")
    assert "1 images" in capsys.readouterr().out
    first = picture("one/000000.png")
    assert_close(first, picture("two/000000.png"), rtol=0, atol=0)
    # the network sees it: another image and the same noise give another picture
    enlarge("sr small/1.png", "other")
    assert (picture("other/000000.png") != first).any()
    # other contents under the same name: pictures of two kinds do not mix
    Image.fromarray(255 - gray[1, 0].numpy()).save("small/1.png")
    refused("^--out two holds images with other settings", enlarge, "sr small", "two")


def test_which_images_can_be_enlarged(runs, capsys):
    """Images of the small size, 4x4, or of the full one, 16x16, and more; nothing between."""
    np.save("square.npy", np.zeros((2, 12, 12, 3), np.uint8))
    np.save("wide.npy", np.zeros((2, 16, 8, 3), np.uint8))
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.write(f"{folder('unpacked', (30, 9))}/0.png", "0.png")
    denoiser = D.load_run("sr")
    for source, size in {
        folder("middle", (12, 12)): "12x12",
        folder("wide", (16, 8)): "16x8",
        folder("narrow", (4, 8)): "4x8",
        folder("mixed", (20, 20), (4, 4)): "4x4",
        "square.npy": "12x12",
        "wide.npy": "8x16",
        "x.zip": "30x9",
    }.items():
        message = f"^IMAGES: {source} has images of {size}. Give 4x4, this run's small size, or "
        refused(message + "originals of at least 16x16$", superres.LowResInputs, source, denoiser)
    enlarge("sr " + folder("right", (16, 16)))
    assert "cropped" not in capsys.readouterr().out
    enlarge("sr " + folder("large", (16, 16), (20, 17)), "other")  # one is not square
    assert "larger images are cropped" in capsys.readouterr().out
    assert picture("other-original/000001.png").shape == (16, 16, 3)


def test_comparisons_of_other_results_do_not_mix(runs):
    folder("photos-original", *[(20, 20)] * 3)  # their place, full of the user's own pictures
    message = "^--out .*: its comparisons go to photos-original, which holds something else"
    refused(message, enlarge, "sr photos-original", "photos")
    assert sorted(os.listdir("photos-original")) == ["0.png", "1.png", "2.png"]
    enlarge("sr shapes -n 2")
    note = json.loads(Path("out-bicubic/settings.json").read_text())
    assert note["low_res"] == json.loads(Path("out/settings.json").read_text())["low_res"]
    Path("out").rename("elsewhere")  # the comparisons stay
    Path("out.png").unlink()
    message = "its comparisons go to out-bicubic, which holds"
    refused(message, enlarge, "sr shapes -n 1 --seed 1")


def test_printed_commands_can_be_pasted(runs, capsys):
    enlarge("sr shapes -n 1", "my out")
    command = capsys.readouterr().out.split("next: ")[1].strip()
    assert shlex.split(command) == ["python", "metrics.py", "psnr", "my out", "my out-original"]
    Path("runs/sr").rename("runs/my sr")
    refused("superres enlarge 'my sr' IMAGES", sample.main, ["my sr"])
    config = superres.SuperResConfig(name="my run")
    assert config.next_command() == "python -m papers.superres enlarge 'my run' IMAGES"
