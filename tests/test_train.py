"""train.py in this process: gradients, resuming, and what a run leaves."""

import copy
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
from conftest import DATA, TINY, run_program
from PIL import Image
from torch.testing import assert_close

import denoiser as denoisers
import train
import unet
from config import Config
from support import checkpoint, distributed, run
from support.cli import parse_into

CPU = distributed.Distributed(0, 1, 0, torch.device("cpu"))


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_grids(monkeypatch):
    """They take longer than the steps."""
    monkeypatch.setattr(run.RunFolder, "save_preview", lambda *inputs: None)


def small(*flags, name="small"):
    """Train the smallest run -> its checkpoint."""
    train.main([*TINY, "--name", name, *flags])
    return checkpoint.load_checkpoint(f"runs/{name}/checkpoint.pt")


def rows(name="small"):
    with open(f"runs/{name}/log.csv", newline="") as f:
        return list(csv.DictReader(f))


def new_state(*flags):
    config = parse_into(Config, [*TINY, *flags])
    return config, train.TrainState(train.DiffusionObjective(config), config)


def assert_same(got, expected):
    for key in ("net", "ema", "optimizer"):
        assert_close(got[key], expected[key], rtol=0, atol=0)


def test_a_run_leaves_what_it_promises(capsys):
    saved = small("--steps", "20", "--sa-k", "2", "--etsdm", "--save-every", "7")
    assert saved["step"] == 20
    config = json.load(open("runs/small/config.json"))
    ran_on = config.pop("ran_on")
    assert config["sa_k"] == 2 and config["etsdm"] is True
    assert ran_on["torch"] == torch.__version__ and ran_on["processes"] == 1
    assert config == json.loads(json.dumps(saved["settings"]))
    made = ["checkpoint.pt", "config.json", "log.csv", "loss.png", "samples"]
    assert sorted(os.listdir("runs/small")) == made
    assert os.listdir("runs/small/samples") == ["0000020.png"]
    assert [r["step"] for r in rows()] == ["10", "20"]
    row = rows()[-1]
    assert math.isclose(float(row["loss"]), float(row["simple"]) + float(row["sa"]), rel_tol=1e-4)
    out = capsys.readouterr().out
    assert "next: python sample.py small" in out and str(checkpoint.RUNS.resolve()) in out


@pytest.mark.parametrize(
    "flags",
    [
        "--sa-k 3 --etsdm --dropout 0.2 --flip",
        pytest.param("--sa-k 2", marks=pytest.mark.slow),
        pytest.param("--continuous --prediction eps --precision bf16", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(flags, no_grids):
    whole = small(*flags.split(), "--steps", "11")
    for steps in ("4", "11"):
        parts = small(*flags.split(), "--steps", steps, name="parts")
    assert_same(parts, whole)
    # The row at step 10 is the mean of what one process saw: steps 5..10, and 1..10.
    assert [r["step"] for r in rows("parts")] == [r["step"] for r in rows()] == ["10"]


def test_the_stream_of_images_continues_where_it_stopped(monkeypatch, no_grids):
    """5 images and batches of 4: epochs end inside batches."""
    images = np.broadcast_to(np.arange(5, dtype=np.uint8)[:, None, None, None], (5, 8, 8, 3))
    np.save("images.npy", images)
    seen, step = [], train.train_step

    def spy(state, model, images, *rest):
        seen.append(images[:, 0, 0, 0].tolist())
        return step(state, model, images, *rest)

    monkeypatch.setattr(train, "train_step", spy)
    small("--data", "images.npy", "--steps", "6")
    whole = list(seen)
    seen.clear()
    for steps in ("2", "6"):
        small("--data", "images.npy", "--steps", steps, name="parts")
    assert seen == whole
    flat = sum(whole, [])
    assert sorted(flat[:5]) == sorted(flat[5:10]) == [0, 1, 2, 3, 4]


def one_gradient(config, state, images):
    """(loss, terms, norm) and gradient of one step, which changes no weight."""
    found = {}
    state.optimizer.step = lambda: found.update(
        gradient=torch.cat([p.grad.flatten() for p in state.net.parameters()])
    )
    state.step = 0
    return train.train_step(state, state.net, images, config, CPU, None), found["gradient"]


@pytest.mark.parametrize("micro", [1, 3, 4, 100])
def test_microbatches_add_up_to_the_whole_gradient(micro):
    config, state = new_state("--sa-k", "2", "--flip", "--grad-clip", "0")
    torch.nn.init.normal_(state.net.out_conv.weight, std=0.1)
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    values, expected = one_gradient(config, state, images)
    config.microbatch = micro
    got_values, got = one_gradient(config, state, images)
    assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert_close(got_values, values, rtol=1e-5, atol=1e-7)


def test_the_numbers_of_a_step_depend_on_seed_and_step_alone(monkeypatch):
    """What the objective draws, and which images are flipped."""
    config, state = new_state("--sa-k", "3", "--flip")
    seen, draw, loss = [], state.objective.draw, state.objective.loss
    monkeypatch.setattr(state.objective, "draw", lambda *a: seen.append(draw(*a)) or seen[-1])
    monkeypatch.setattr(
        state.objective, "loss", lambda m, x, d: seen[-1].update(x=x) or loss(m, x, d)
    )
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    for step in (5, 6, 5):
        state.step = step
        train.train_step(state, state.net, images, config, CPU, None)
    first, other, again = seen
    assert_close(again, first, rtol=0, atol=0)
    assert first["t"].shape == (4,) and first["noises"].shape == (4, 3, 3, 8, 8)  # (B, k, C, H, W)
    assert not torch.equal(first["noises"], other["noises"])
    config, state = new_state("--sa-k", "3", "--sa-weight", "0")  # plain DDPM
    assert state.objective.k == 1


def test_half_of_the_images_are_flipped(monkeypatch):
    config, state = new_state("--flip")
    flipped, loss = [], state.objective.loss
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    images[..., 0] = 255  # a line on the left
    monkeypatch.setattr(
        state.objective,
        "loss",
        lambda m, x, d: flipped.extend((x[:, 0, 0, 0] < 0).tolist()) or loss(m, x, d),
    )
    for _ in range(16):
        train.train_step(state, state.net, images, config, CPU, None)
    assert 16 < sum(flipped) < 48
    config.flip = False
    flipped.clear()
    train.train_step(state, state.net, images, config, CPU, None)
    assert not any(flipped)


@pytest.mark.slow
def test_weight_zero_is_the_plain_model():
    plain = small("--steps", "3")["net"]
    zero = small("--steps", "3", "--sa-k", "3", "--sa-weight", "0", name="zero")["net"]
    assert_close(zero, plain, rtol=0, atol=0)


def test_a_finished_run_prints_how_to_continue(capsys, no_grids):
    small("--steps", "2")
    capsys.readouterr()
    assert small("--steps", "2")["step"] == 2
    out = capsys.readouterr().out
    for words in ("finished, at step 2", "--images 16", "another --name", "sample.py small"):
        assert words in out
    assert small("--images", "16")["step"] == 4


@pytest.mark.slow
def test_other_settings_are_another_run(no_grids):
    small("--steps", "2")
    with pytest.raises(ValueError, match="^--name: .*other settings .sa_k was 1 and is now 2"):
        small("--steps", "2", "--sa-k", "2")
    with pytest.raises(ValueError, match="ema was 0.995 and is now 0.5.*another --name"):
        small("--steps", "2", "--ema", "0.5")
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
    for step, place in enumerate(places, 2):
        if "moved" in place:
            os.rename("photos", place)
        assert small("--data", place, "--steps", str(step))["step"] == step
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
        with pytest.raises(ValueError, match=r"other settings \(.*\)\. Give this one another"):
            small("--data", "photos", "--steps", "4", *flags)


def test_a_run_under_another_name_resumes(no_grids):
    small("--steps", "1")
    os.rename("runs/small", "runs/renamed")
    assert small("--steps", "2", name="renamed")["step"] == 2


def test_a_run_of_the_first_version_opens_for_sampling_and_is_not_resumed():
    """One line, before anything in its folder changes."""
    shutil.copytree(DATA / "first-version", "runs/first-version")
    before = sorted((p.name, p.read_bytes()) for p in (DATA / "first-version").iterdir())
    denoiser = denoisers.load_run("first-version")
    assert denoiser.step == 20 and denoisers.load_run("first-version", "raw").weights == "raw"
    x0, eps = denoiser.predict(torch.randn(2, 3, 16, 16), 500)
    assert x0.isfinite().all() and eps.isfinite().all()
    words = "--image-size 16 --batch-size 4 --sa-k 2 --etsdm --steps 30"
    with pytest.raises(ValueError, match="trained by the first version.*another --name") as error:
        train.main([*words.split(), "--name", "first-version"])
    assert "\n" not in str(error.value)
    after = sorted((p.name, p.read_bytes()) for p in Path("runs/first-version").iterdir())
    assert after == before


def test_a_plain_run_logs_no_second_loss(no_grids):
    small("--steps", "10")
    assert float(rows()[0]["sa"]) == 0 and float(rows()[0]["simple"]) > 0


def test_the_preview_shows_the_averaged_weights(monkeypatch):
    shown = []

    def preview(self, net, images):
        shown.append(net)
        return images, 1

    monkeypatch.setattr(train.DiffusionObjective, "preview", preview)
    saved = small("--steps", "3")
    assert_close(shown[0].state_dict(), saved["ema"], rtol=0, atol=0)
    assert not shown[0].training


def test_notes_when_something_else_changed(capsys, no_grids):
    saved = small("--steps", "2", "--dropout", "0.1")
    checkpoint.save_checkpoint("runs/small/checkpoint.pt", {**saved, "processes": 2, "dataset": 5})
    small("--steps", "3", "--dropout", "0.1")
    out = capsys.readouterr().out
    assert "2 processes before, 1 now: dropout uses other numbers" in out
    assert "5 images before, 2,147,483,648 now" in out


def test_weights_of_another_network_are_refused(no_grids):
    saved = small("--steps", "2")
    saved["net"].pop("out_conv.bias")
    checkpoint.save_checkpoint("runs/small/checkpoint.pt", saved)
    for use in (lambda: small("--steps", "3"), lambda: denoisers.load_run("small", "raw")):
        with pytest.raises(ValueError, match="does not fit its own settings.*out_conv.bias"):
            use()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compile_trains_the_same_and_saves_bare_names(monkeypatch, no_grids):
    size = dict(unet.PRESETS["tiny"], channels=8, channel_mult=(1,))  # minutes less to compile
    monkeypatch.setitem(unet.PRESETS, "tiny", size)
    plain, compiled = small("--steps", "2"), small("--steps", "2", "--compile", name="compiled")
    assert compiled["net"].keys() == plain["net"].keys()
    assert_close(compiled["ema"], plain["ema"], rtol=1e-3, atol=1e-3)


def test_the_learning_rate_warms_up():
    config, state = new_state("--warmup", "4", "--lr", "0.01")
    rates = []
    for _ in range(6):
        train.train_step(
            state, state.net, torch.zeros(4, 3, 8, 8, dtype=torch.uint8), config, CPU, None
        )
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert_close(torch.tensor(rates), 0.01 * torch.tensor([0.25, 0.5, 0.75, 1, 1, 1]))


def floats(net):
    return [v for v in net.state_dict().values() if v.is_floating_point()]


def test_ema_warms_up_and_decays():
    """d = min(decay, (1 + n)/(10 + n)): the first step by hand, then a long plain loop."""
    net = torch.nn.Linear(3, 2)
    ema = copy.deepcopy(net)
    start = net.weight.detach().clone()
    expected = start.clone()
    for n in range(300):
        with torch.no_grad():
            net.weight.add_(torch.randn(2, 3))
        train.update_ema(floats(ema), floats(net), 0.9, n)
        d = min(0.9, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * net.weight.detach()
        if n == 0:
            assert_close(ema.weight, 0.1 * start + 0.9 * net.weight, rtol=1e-6, atol=1e-6)
    assert_close(ema.weight, expected, rtol=1e-5, atol=1e-5)


def test_the_average_has_every_floating_point_number_of_the_network():
    """Buffers too; and the lists stay those of the network when a checkpoint is loaded."""
    config, _ = new_state()
    net = torch.nn.BatchNorm1d(2)
    state = train.TrainState(SimpleNamespace(net=net), config)
    assert len(state.averages) == len(state.values) == 4  # two weights, a mean, a variance
    net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()})
    train.update_ema(state.averages, state.values, 0.5, 10**6)
    assert_close(state.ema.running_mean, torch.full((2,), 0.5))
    assert_close(state.ema.weight.data, torch.full((2,), 1.5))
    assert state.ema.num_batches_tracked == 0, "a count is no average"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--image-size 30", "^--image-size must be a multiple"),
        ("--data nowhere", "nowhere"),
        ("--data few.npy --batch-size 9", "^--batch-size 9 is more than the 5 images"),
    ],
)
def test_bad_input_ends_before_training(flags, words):
    np.save("few.npy", np.zeros((5, 8, 8, 3), dtype=np.uint8))
    with pytest.raises((ValueError, OSError), match=words) as error:
        small("--steps", "1", *flags.split())
    assert "\n" not in str(error.value)


NO_PAPERS = """
import sys
import {program}
{program}.main(sys.argv[1:])
loaded = [name for name in sys.modules if name.split(".")[0] == "papers"]
assert not loaded, loaded
"""


@pytest.mark.slow
def test_training_and_sampling_import_nothing_of_papers(tmp_path):
    """After `torchrun train.py --sa-k 2` and `python sample.py`."""
    for program, words in (("train", [*TINY, "--sa-k", "2", "--steps", "2"]),
                           ("sample", ["-n", "2", "--nfe", "2"])):  # fmt: skip
        run_program("-c", NO_PAPERS.format(program=program), *words, cwd=tmp_path)
