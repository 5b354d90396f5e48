"""train.py in this process: gradients, the averaged weights, and what a run leaves. (Runs of every
program, resumed: test_systems.py.)"""

import csv
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATA, TINY, refused, run_program, saved, small
from PIL import Image
from torch.testing import assert_close

import denoiser as denoisers
import train
import unet
from config import Config
from support import checkpoint, distributed
from support.cli import parse_into

CPU = distributed.Distributed(0, 1, 0, torch.device("cpu"))
pytestmark = pytest.mark.usefixtures("here")


def rows(name="small"):
    with open(f"runs/{name}/log.csv", newline="") as f:
        return list(csv.DictReader(f))


def new_state(flags):
    config = parse_into(Config, [*TINY, *flags.split()])
    return config, train.TrainState(train.DiffusionObjective(config), config)


def random_images():
    return torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)


def step(config, state, images):
    return train.train_step(state, state.net, images, config, CPU, None)


def test_a_run_leaves_what_it_promises(capsys):
    found = small("--steps", "20", "--sa-k", "2", "--etsdm", "--save-every", "7")
    assert found["step"] == 20
    config = json.load(open("runs/small/config.json"))
    ran_on = config.pop("ran_on")
    assert config["sa_k"] == 2 and config["etsdm"] is True
    assert ran_on["torch"] == torch.__version__ and ran_on["processes"] == 1
    assert config == json.loads(json.dumps(found["settings"]))
    made = ["checkpoint.pt", "config.json", "log.csv", "loss.png", "samples"]
    assert sorted(os.listdir("runs/small")) == made
    assert os.listdir("runs/small/samples") == ["0000020.png"]
    assert [r["step"] for r in rows()] == ["10", "20"]
    row = {k: float(v) for k, v in rows()[-1].items()}
    assert math.isclose(row["loss"], row["simple"] + row["sa"], rel_tol=1e-4) and row["sa"] > 0
    out = capsys.readouterr().out
    assert "next: python sample.py small" in out and str(checkpoint.RUNS.resolve()) in out


def test_the_stream_of_images_continues_where_it_stopped(monkeypatch, no_grids):
    """5 images and batches of 4: epochs end inside batches."""
    images = np.broadcast_to(np.arange(5, dtype=np.uint8)[:, None, None, None], (5, 8, 8, 3))
    np.save("images.npy", images)
    seen, real = [], train.train_step

    def spy(state, model, images, *rest):
        seen.append(images[:, 0, 0, 0].tolist())
        return real(state, model, images, *rest)

    monkeypatch.setattr(train, "train_step", spy)
    small("--data", "images.npy", "--steps", "6")
    whole = list(seen)
    seen.clear()
    for steps in ("2", "6"):
        small("--data", "images.npy", "--steps", steps, name="parts")
    assert seen == whole
    flat = sum(whole, [])
    assert sorted(flat[:5]) == sorted(flat[5:10]) == [0, 1, 2, 3, 4]


def test_the_numbers_of_a_step_depend_on_seed_and_step_alone(monkeypatch):
    """What the objective draws, and which images are flipped."""
    config, state = new_state("--sa-k 3 --flip")
    seen, draw, loss = [], state.objective.draw, state.objective.loss
    monkeypatch.setattr(state.objective, "draw", lambda *a: seen.append(draw(*a)) or seen[-1])
    monkeypatch.setattr(
        state.objective, "loss", lambda m, x, d: seen[-1].update(x=x) or loss(m, x, d)
    )
    images = random_images()
    for state.step in (5, 6, 5):
        step(config, state, images)
    first, other, again = seen
    assert_close(again, first, rtol=0, atol=0)
    assert first["t"].shape == (4,) and first["noises"].shape == (4, 3, 3, 8, 8)  # (B, k, C, H, W)
    assert not torch.equal(first["noises"], other["noises"])


def test_half_of_the_images_are_flipped(monkeypatch):
    config, state = new_state("--flip")
    flipped, loss = [], state.objective.loss
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    images[..., 0] = 255  # a line on the left

    def spy(m, x, d):
        flipped.extend((x[:, 0, 0, 0] < 0).tolist())
        return loss(m, x, d)

    monkeypatch.setattr(state.objective, "loss", spy)
    for _ in range(16):
        step(config, state, images)
    assert 16 < sum(flipped) < 48
    config.flip = False
    flipped.clear()
    step(config, state, images)
    assert not any(flipped)


@pytest.mark.slow
def test_weight_zero_is_the_plain_model(no_grids):
    """And computes nothing that it does not use."""
    plain = small("--steps", "10")["net"]
    assert float(rows()[0]["sa"]) == 0 < float(rows()[0]["simple"])
    zero = small("--steps", "10", "--sa-k", "3", "--sa-weight", "0", name="zero")["net"]
    assert_close(zero, plain, rtol=0, atol=0)
    assert new_state("--sa-k 3 --sa-weight 0")[1].objective.k == 1


def test_a_finished_run_prints_how_to_continue(capsys, no_grids):
    small("--steps", "2")
    capsys.readouterr()
    assert small("--steps", "2")["step"] == 2
    out = capsys.readouterr().out
    for words in ("finished, at step 2", "--images 16", "another --name", "sample.py small"):
        assert words in out
    os.rename("runs/small", "runs/renamed")
    assert small("--images", "16", name="renamed")["step"] == 4


def test_a_run_that_goes_on_prints_where_its_decay_stands(capsys, no_grids):
    """The learning rate was 0 at the end; with more images it is high again."""
    words = "--lr 0.01 --warmup 0 --lr-decay linear --steps".split()
    small(*words, "2")
    assert "learning rate" not in capsys.readouterr().out
    group = small(*words, "8")["optimizer"]["param_groups"][0]
    note = "note: the learning rate continues at 0.0075, 75% of --lr: its decay ends at step 8 now"
    assert note in capsys.readouterr().out
    assert group["lr"] == pytest.approx(0.01 / 8)  # of the last step, 7


@pytest.mark.slow
def test_other_settings_are_another_run(no_grids):
    small("--steps", "2")
    message = "^--name: .*other settings .sa_k was 1 and is now 2"
    refused(message, small, "--steps", "2", "--sa-k", "2")
    message = "ema was 0.95 and is now 0.5.*another --name"
    refused(message, small, "--steps", "2", "--ema", "0.5")
    # What the message about non-finite losses advises must be possible.
    assert small("--steps", "3", "--lr", "1e-4", "--grad-clip", "0.5")["step"] == 3


def photos(path, count=5):
    os.makedirs(path, exist_ok=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(f"{path}/{i}.png")


def test_the_same_images_in_another_place_are_the_same_run(capsys, no_grids):
    photos("photos")
    small("--data", "photos", "--steps", "1")
    os.mkdir("elsewhere")
    places = ["photos/", "./photos", os.path.abspath("photos"), "elsewhere/moved"]
    for steps, place in enumerate(places, 2):
        if "moved" in place:
            os.rename("photos", place)
        assert small("--data", place, "--steps", str(steps))["step"] == steps
    assert "before" not in capsys.readouterr().out
    assert json.load(open("runs/small/config.json", encoding="utf-8"))["data"] == places[-1]


def test_other_images_are_a_note_and_another_shape_is_refused(capsys, no_grids):
    photos("photos")
    small("--data", "photos", "--steps", "1")
    with open("photos/0.png", "ab") as f:
        f.write(b" ")  # the same picture, but other bytes
    small("--data", "photos", "--steps", "2")
    out = capsys.readouterr().out
    assert out.count("note: these are not the images from before, though as many") == 1
    photos("photos", 6)
    small("--data", "photos", "--steps", "3")
    assert "note: 5 images before, 6 now" in capsys.readouterr().out
    for flags in (["--image-size", "16"], ["--channels", "1"]):
        message = r"other settings \(.*\)\. Give this one another"
        refused(message, small, "--data", "photos", "--steps", "4", *flags)
    words = ["--data", "photos", "--batch-size", "9"]
    refused("^--batch-size 9 is more than the 6 images", small, *words, name="other")
    assert not os.path.exists("runs/other")


def test_a_run_of_the_first_version_opens_for_sampling_and_is_not_resumed():
    """One line, before anything in its folder changes."""
    shutil.copytree(DATA / "first-version", "runs/first-version")
    before = sorted((p.name, p.read_bytes()) for p in (DATA / "first-version").iterdir())
    denoiser = denoisers.load_run("first-version")
    assert denoiser.step == 20 and denoisers.load_run("first-version", "raw").weights == "raw"
    x0, eps = denoiser.predict(torch.randn(2, 3, 16, 16), 500)
    assert x0.isfinite().all() and eps.isfinite().all()
    words = "--image-size 16 --batch-size 4 --sa-k 2 --etsdm --steps 30 --name first-version"
    refused("trained by the first version.*another --name", train.main, words.split())
    after = sorted((p.name, p.read_bytes()) for p in Path("runs/first-version").iterdir())
    assert after == before


def test_the_preview_shows_the_averaged_weights(monkeypatch):
    shown = []

    def preview(self, net, images):
        shown.append(net)
        return images, 1

    monkeypatch.setattr(train.DiffusionObjective, "preview", preview)
    found = small("--steps", "3")
    assert_close(shown[0].state_dict(), found["ema"], rtol=0, atol=0)
    assert not shown[0].training


def test_notes_when_something_else_changed(capsys, no_grids):
    found = small("--steps", "2", "--dropout", "0.1")
    checkpoint.save_checkpoint("runs/small/checkpoint.pt", {**found, "processes": 2, "dataset": 5})
    small("--steps", "3", "--dropout", "0.1")
    out = capsys.readouterr().out
    assert "2 processes before, 1 now: dropout uses other numbers" in out
    assert "5 images before, 2,147,483,648 now" in out


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compile_trains_the_same_and_saves_bare_names(monkeypatch, no_grids):
    size = dict(unet.PRESETS["tiny"], channels=8, channel_mult=(1,))  # minutes less to compile
    monkeypatch.setitem(unet.PRESETS, "tiny", size)
    plain, compiled = small("--steps", "2"), small("--steps", "2", "--compile", name="compiled")
    assert compiled["net"].keys() == plain["net"].keys()
    assert_close(compiled["ema"], plain["ema"], rtol=1e-3, atol=1e-3)


def test_the_learning_rate_warms_up():
    config, state = new_state("--warmup 4 --lr 0.01")
    rates = []
    for _ in range(6):
        step(config, state, random_images())
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert_close(torch.tensor(rates), 0.01 * torch.tensor([0.25, 0.5, 0.75, 1, 1, 1]))


def test_ema_warms_up_and_decays():
    """d = min(decay, (1 + n)/(10 + n)): the first step by hand, then a long plain loop. Every
    floating-point number of the network is averaged, buffers too."""
    net = torch.nn.BatchNorm1d(3)
    state = train.TrainState(SimpleNamespace(net=net), parse_into(Config, TINY))
    net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})  # as from a checkpoint
    start = state.ema.weight.detach().clone()
    expected = start.clone()
    for n in range(300):
        with torch.no_grad():
            net.weight.add_(torch.randn(3))
        net.running_mean.copy_(net.weight.detach() - 1)  # it begins at 0, the weight at 1
        train.update_ema(state.averages, state.values, 0.9, n)
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * net.weight.detach()
        if n == 0:
            first = 0.1 * start + 0.9 * net.weight
            assert_close(state.ema.weight, first, rtol=1e-6, atol=1e-6)
    assert_close(state.ema.weight, expected, rtol=1e-5, atol=1e-5)
    assert_close(state.ema.running_mean, expected - 1, rtol=1e-5, atol=1e-5)
    assert_close([state.ema.bias, state.ema.running_var], [net.bias, net.running_var])
    assert state.ema.num_batches_tracked == 0, "a count is no average"


NO_PAPERS = """
import sys
import sample, train
train.main(sys.argv[1:])
sample.main("-n 2 --nfe 2".split())
loaded = [name for name in sys.modules if name.split(".")[0] == "papers"]
assert not loaded, loaded
"""


@pytest.mark.slow
def test_training_and_sampling_import_nothing_of_papers(here):
    """After `torchrun train.py --sa-k 2` and `python sample.py`."""
    words = [*TINY, "--sa-k", "2", "--steps", "2", "--name", "sa2"]
    run_program("-c", NO_PAPERS, *words, cwd=here)
    assert saved("sa2")["step"] == 2
