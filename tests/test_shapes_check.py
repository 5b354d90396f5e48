"""Tests of papers/shapes_check.py: drawings pass, and each fault fails its own test."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sample
import train
from papers import shapes_check


@pytest.fixture(scope="module")
def masks():
    return shapes_check.templates(32, 1000)


@pytest.fixture(scope="module")
def drawings():
    shapes = data.load("shapes", 32, 3, seed=9)
    return torch.stack([shapes[i] for i in range(64)])


def shares(images, masks):
    found = shapes_check.judge(images, masks)
    return {name: values.float().mean().item() for name, values in found.items()}


def test_drawings_are_good(drawings, masks):
    assert shares(drawings, masks)["good"] > 0.9


def test_two_colours_are_not_pure(drawings, masks):
    halves = drawings.clone()
    shape = shapes_check.nearest_colour(drawings) > 0
    for i, colour in enumerate(data.SHAPE_COLOURS):
        left = shape[i::4].clone()
        left[:, :, 16:] = False
        for channel, value in enumerate(colour):
            halves[i::4, channel][left] = value
    # A quarter gets its own colour again.
    assert shares(halves, masks)["pure"] < 0.4 and shares(halves, masks)["shape"] > 0.9


def test_a_blob_has_no_shape(drawings, masks):
    blobs = torch.tensor(shapes_check.BACKGROUND, dtype=torch.uint8)[None, :, None, None]
    blobs = blobs.repeat(4, 1, 32, 32)
    for i, colour in enumerate(data.SHAPE_COLOURS):
        blobs[i, :, 4:12, 3:29] = torch.tensor(colour, dtype=torch.uint8)[:, None, None]
    found = shares(blobs, masks)
    assert found["shape"] == 0 and found["pure"] == 1 and found["good"] == 0


def test_grain_is_not_clean(drawings, masks):
    noise = 12 * torch.randn(drawings.shape, generator=torch.Generator().manual_seed(0))
    grainy = (drawings + noise).clamp(0, 255).to(torch.uint8)
    found = shares(grainy, masks)
    assert found["clean"] < 0.1 and found["shape"] > 0.9


def test_an_empty_picture_is_not_good(masks):
    empty = torch.tensor(shapes_check.BACKGROUND, dtype=torch.uint8)[None, :, None, None]
    assert shares(empty.repeat(2, 1, 32, 32), masks)["good"] == 0


def test_the_program_counts(drawings, tmp_path, capsys):
    for i, image in enumerate(drawings[:20]):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0))).save(tmp_path / f"{i}.png")
    shapes_check.main([str(tmp_path)])
    assert capsys.readouterr().out.startswith("20 images: pure ")


@pytest.mark.slow
def test_the_first_run_looks_right(tmp_path, monkeypatch, capsys):
    """What a newcomer sees: the README's two commands, with more samples. 91 % here. FIRST_RUN: the
    folder of a run by the first of them, which .ci/run has made already."""
    monkeypatch.chdir(tmp_path)
    run = os.environ.get("FIRST_RUN")
    if not run:
        train.main(["--sa-k", "2"])
    sample.main([*[run] * bool(run), "-n", "512", "--out", "samples"])
    capsys.readouterr()
    shapes_check.main(["samples"])
    good = float(capsys.readouterr().out.split("good ")[1].rstrip("%\n"))
    assert good >= 90
