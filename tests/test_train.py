"""train.py in this process: settings, gradients, resuming, and steps that go wrong."""

import csv
import json
import math
import os
import shutil

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import denoiser as denoisers
import files
import losses
import runtime
import train

# The smallest run that goes through everything.
SMALL = [
    "--image-size",
    "8",
    "--batch-size",
    "4",
    "--name",
    "small",
    "--precision",
    "fp32",
    "--sample-every",
    "1000",
]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def small(*flags):
    train.main([*SMALL, *flags])
    return files.load_checkpoint("runs/small/checkpoint.pt")


def rows():
    with open("runs/small/log.csv", newline="") as f:
        return list(csv.DictReader(f))


def test_a_run_leaves_what_it_promises(capsys):
    checkpoint = small("--steps", "20", "--sa-k", "2", "--etsdm", "--save-every", "7")
    assert checkpoint["step"] == 20
    config = json.load(open("runs/small/config.json"))
    assert (
        config["sa_k"] == 2
        and config["etsdm"] is True
        and config["ran_on"]["torch"] == torch.__version__
    )
    assert {k: v for k, v in config.items() if k != "ran_on"} == json.loads(
        json.dumps(checkpoint["settings"])
    )
    assert sorted(os.listdir("runs/small")) == [
        "checkpoint.pt",
        "config.json",
        "log.csv",
        "loss.png",
        "samples",
    ]
    assert os.listdir("runs/small/samples") == ["0000020.png"]
    assert [r["step"] for r in rows()] == ["10", "20"]
    row = rows()[-1]
    assert math.isclose(float(row["loss"]), float(row["simple"]) + float(row["sa"]), rel_tol=1e-4)
    out = capsys.readouterr().out
    assert "next: python sample.py small" in out and str(files.RUNS.resolve()) in out
    assert "batch: 4 = 4 at a time x 1 accumulated x 1 processes" in out


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("--sa-k", "2"), marks=pytest.mark.slow),
        ("--sa-k", "3", "--etsdm", "--dropout", "0.2", "--flip"),
        pytest.param(
            ("--continuous", "--prediction", "eps", "--precision", "bf16"), marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_n_steps_equal_k_and_the_rest_bit_for_bit(flags):
    whole = small(*flags, "--steps", "11")
    log = [r["loss"] for r in rows()]
    train.main([*SMALL, *flags, "--steps", "4", "--name", "parts"])
    train.main([*SMALL, *flags, "--steps", "11", "--name", "parts"])
    parts = files.load_checkpoint("runs/parts/checkpoint.pt")
    for key in ("raw", "ema", "optimizer"):
        assert_close(parts[key], whole[key], rtol=0, atol=0)
    with open("runs/parts/log.csv", newline="") as f:
        # the row at step 10 averages what this process saw: steps 5..10 there, 1..10 in the whole
        assert [r["step"] for r in csv.DictReader(f)] == ["10"] and len(log) == 1


def test_the_stream_of_images_goes_on_where_it_stopped(monkeypatch):
    """Position in the epoch: 5 images, batch 4, so that epochs end inside batches."""
    import numpy as np

    np.save(
        "images.npy",
        np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(8, 1).repeat(8, 2).repeat(3, 3),
    )
    seen, step = [], train.one_step

    def spy(*args):
        seen.append(args[4][:, 0, 0, 0].tolist())
        return step(*args)

    monkeypatch.setattr(train, "one_step", spy)
    small("--data", "images.npy", "--steps", "6")
    whole = list(seen)
    seen.clear()
    train.main([*SMALL, "--data", "images.npy", "--steps", "2", "--name", "parts"])
    train.main([*SMALL, "--data", "images.npy", "--steps", "6", "--name", "parts"])
    assert seen == whole
    flat = sum(whole, [])
    assert sorted(flat[:5]) == sorted(flat[5:10]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("micro", [1, 3, 4, 100])
def test_microbatches_add_up_to_the_whole_gradient(micro):
    s = train.resolve(train.parse([*SMALL, "--sa-k", "2"]))
    model = train.Model(s, torch.device("cpu"))
    torch.nn.init.normal_(model.net.out_conv.weight, std=0.1)
    _, numbers = train.draw(s, model.task, 0, torch.device("cpu"))
    x0 = torch.randn(4, 3, 8, 8)

    def gradient(microbatch):
        model.net.zero_grad()
        values = train.gradients(
            model.net, model.task, {**s, "microbatch": microbatch}, x0, numbers, None
        )
        return values, torch.cat([p.grad.flatten() for p in model.net.parameters()])

    (values, expected), (got_values, got) = gradient(None), gradient(micro)
    assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert_close(got_values, values, rtol=1e-5, atol=1e-7)


def test_the_numbers_of_a_step_depend_on_seed_and_step_alone():
    s = train.resolve(train.parse([*SMALL, "--sa-k", "3", "--flip"]))
    task = train.Model(s, torch.device("cpu")).task
    (flips, one), (same, again) = (train.draw(s, task, 5, torch.device("cpu")) for _ in range(2))
    assert_close(flips, same, rtol=0, atol=0)
    assert_close(one, again, rtol=0, atol=0)
    assert one["t"].shape == (4,) and one["noises"].shape == (4, 3, 3, 8, 8)  # (B, k, C, H, W)
    other = train.draw(s, task, 6, torch.device("cpu"))[1]
    assert not torch.equal(one["noises"], other["noises"])
    plain = train.Model({**s, "sa_weight": 0.0}, torch.device("cpu")).task
    assert train.draw(s, plain, 5, torch.device("cpu"))[1]["noises"].shape[1] == 1


@pytest.mark.slow
def test_weight_zero_is_the_plain_model():
    plain = small("--steps", "3")["raw"]
    train.main([*SMALL, "--steps", "3", "--sa-k", "3", "--sa-weight", "0", "--name", "zero"])
    assert_close(files.load_checkpoint("runs/zero/checkpoint.pt")["raw"], plain, rtol=0, atol=0)


def test_a_finished_run_says_so(capsys):
    small("--steps", "2")
    before = capsys.readouterr()
    checkpoint = small("--steps", "2")
    out = capsys.readouterr().out
    assert (
        "finished" in out
        and "--images 16" in out
        and "another --name" in out
        and "sample.py small" in out
    )
    assert checkpoint["step"] == 2 and before
    assert small("--images", "16")["step"] == 4


@pytest.mark.slow
def test_other_settings_are_another_run():
    small("--steps", "2")
    with pytest.raises(
        ValueError, match=r"other settings \(.*sa_k 1 there, 2 here.*another --name"
    ):
        small("--steps", "2", "--sa-k", "2")
    with pytest.raises(ValueError, match="ema 0.995 there, 0.5 here"):
        small("--steps", "2", "--ema", "0.5")
    # what the message about non-finite losses advises must be possible
    assert small("--steps", "3", "--lr", "1e-4", "--grad-clip", "0.5")["step"] == 3


@pytest.fixture
def no_grids(monkeypatch):
    """They take longer than the steps."""
    monkeypatch.setattr(train, "picture", lambda *inputs: None)


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
        f.write(b" ")  # the same picture, but who knows
    small("--data", "photos", "--steps", "2")
    out = capsys.readouterr().out
    assert (
        out.count("note: these images are not those of before, though as many: the run goes") == 1
    )
    photos("photos", 6)
    small("--data", "photos", "--steps", "3")
    assert "note: 5 images before, 6 now" in capsys.readouterr().out
    for flags in (["--image-size", "16"], ["--channels", "1"]):
        with pytest.raises(ValueError, match=r"other settings \(.*: give this one another --name$"):
            small("--data", "photos", "--steps", "4", *flags)


def test_a_checkpoint_that_knows_only_the_number_of_its_images_goes_on(capsys, no_grids):
    checkpoint = small("--steps", "1")
    del checkpoint["digest"]
    files.save_checkpoint("runs/small/checkpoint.pt", checkpoint)
    assert small("--steps", "2")["digest"] == "shapes, seed 0"
    assert "before" not in capsys.readouterr().out


def test_a_run_under_another_name_goes_on(no_grids):
    small("--steps", "1")
    os.rename("runs/small", "runs/renamed")
    train.main([*SMALL, "--name", "renamed", "--steps", "2"])
    assert files.load_checkpoint("runs/renamed/checkpoint.pt")["step"] == 2


def spoil(monkeypatch, factor):
    """From here on every loss is multiplied by this."""
    good = losses.terms
    monkeypatch.setattr(
        losses, "terms", lambda *a, **k: {n: v * factor for n, v in good(*a, **k).items()}
    )


def test_non_finite_steps_are_skipped_and_counted(monkeypatch):
    good, calls = losses.terms, []

    def sometimes(*args, **kwargs):
        calls.append(1)
        found = good(*args, **kwargs)
        if len(calls) in (2, 3):
            found["simple"] = found["simple"] * float("nan")
        return found

    monkeypatch.setattr(losses, "terms", sometimes)
    checkpoint = small("--steps", "5")
    assert checkpoint["skipped"] == 2 and checkpoint["step"] == 5
    assert all(torch.isfinite(v).all() for v in checkpoint["raw"].values())


@pytest.mark.slow
def test_too_many_non_finite_steps_stop_the_run(monkeypatch):
    small("--steps", "2")
    good = files.load_checkpoint("runs/small/checkpoint.pt")["raw"]
    spoil(monkeypatch, float("nan"))
    with pytest.raises(
        ValueError,
        match="last 25 losses or gradients were not finite, up to step 27; the last checkpoint is "
        "of step 2 .*--precision fp32",
    ):
        small("--steps", "100", "--save-every", "1")
    assert_close(files.load_checkpoint("runs/small/checkpoint.pt")["raw"], good, rtol=0, atol=0)


def test_a_nan_never_reaches_the_weights(monkeypatch):
    spoil(monkeypatch, float("inf"))
    s = train.resolve(train.parse(SMALL))
    model = train.Model(s, torch.device("cpu"))
    before = {k: v.clone() for k, v in model.net.state_dict().items()}
    with runtime.setup() as process:
        train.one_step(
            model, model.net, s, process, torch.zeros(4, 3, 8, 8, dtype=torch.uint8), None
        )
    assert_close(model.net.state_dict(), before, rtol=0, atol=0)
    assert model.skipped == 1 and not model.optimizer.state


def test_bad_steps_before_any_checkpoint_do_not_name_one(monkeypatch):
    spoil(monkeypatch, float("nan"))
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        small("--steps", "100")
    assert not os.path.exists("runs/small/checkpoint.pt")


def test_a_plain_run_logs_no_second_loss():
    small("--steps", "10")
    assert float(rows()[0]["sa"]) == 0 and float(rows()[0]["simple"]) > 0


@pytest.mark.slow
def test_a_torn_log_row_is_dropped():
    small("--steps", "20")
    with open("runs/small/log.csv") as f:
        text = f.read()
    with open("runs/small/log.csv", "w") as f:
        f.write(text[: text.index("20,80") + 1])  # cut in the middle of the second row
    small("--steps", "40")
    assert [r["step"] for r in rows()] == ["10", "30", "40"]


def test_training_grids_show_the_average(monkeypatch):
    shown = []
    monkeypatch.setattr(train, "picture", lambda model, *rest: shown.append(model.ema))
    checkpoint = small("--steps", "3")
    assert_close(shown[0].state_dict(), checkpoint["ema"], rtol=0, atol=0)
    assert not shown[0].training


def test_notes_when_something_else_changed(capsys):
    checkpoint = small("--steps", "2", "--dropout", "0.1")
    path = "runs/small/checkpoint.pt"
    files.save_checkpoint(path, {**checkpoint, "processes": 2, "dataset": 5})
    small("--steps", "3", "--dropout", "0.1")
    out = capsys.readouterr().out
    assert "2 processes before, 1 now: dropout draws other numbers" in out
    assert "5 images before, 2,147,483,648 now" in out


def test_weights_that_are_not_this_networks_are_refused():
    checkpoint = small("--steps", "2")
    checkpoint["raw"].pop("out_conv.bias")
    files.save_checkpoint("runs/small/checkpoint.pt", checkpoint)
    with pytest.raises(ValueError, match="does not fit its own settings.*out_conv.bias"):
        small("--steps", "3")
    with pytest.raises(ValueError, match="does not fit its own settings.*out_conv.bias"):
        denoisers.load_run("small", "raw")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compile_trains_the_same_and_saves_bare_names():
    plain = small("--steps", "2")
    train.main([*SMALL, "--steps", "2", "--compile", "--name", "compiled"])
    compiled = files.load_checkpoint("runs/compiled/checkpoint.pt")
    assert compiled["raw"].keys() == plain["raw"].keys()
    assert_close(compiled["ema"], plain["ema"], rtol=1e-3, atol=1e-3)


def test_the_learning_rate_warms_up():
    s = train.resolve(train.parse([*SMALL, "--warmup", "4", "--lr", "0.01"]))
    model = train.Model(s, torch.device("cpu"))
    rates = []
    with runtime.setup() as process:
        for _ in range(6):
            train.one_step(
                model,
                model.net,
                s,
                process,
                torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
                None,
            )
            rates.append(model.optimizer.param_groups[0]["lr"])
    assert_close(torch.tensor(rates), 0.01 * torch.tensor([0.25, 0.5, 0.75, 1, 1, 1]))


def test_flips_are_off_unless_asked_for():
    s = train.resolve(train.parse([]))
    assert s["flip"] is False
    task = train.Model(s, torch.device("cpu")).task
    assert train.draw(s, task, 0, torch.device("cpu"))[0] is None
    assert train.resolve(train.parse(["--preset", "celeba64"]))["flip"] is True
    assert train.resolve(train.parse(["--preset", "celeba64", "--no-flip"]))["flip"] is False


def test_recipes_are_the_papers():
    s = train.resolve(train.parse(["--preset", "cifar10", "--sa-k", "2"]))
    expected = dict(
        batch_size=128,
        lr=2e-4,
        ema=0.9999,
        grad_clip=1.0,
        schedule="linear",
        prediction="eps",
        loss_space="eps",
        flip=False,
        images=1200 * 50_000,
        image_size=32,
        sa_weight=1.0,
    )
    assert {k: s[k] for k in expected} == expected and s["unet"]["dropout"] == 0.1
    s = train.resolve(train.parse(["--preset", "ffhq256", "--etsdm"]))
    assert (s["batch_size"], s["lr"], s["grad_clip"], s["etsdm_interval"], s["etsdm_n"]) == (
        96,
        1e-4,
        0,
        100,
        5,
    )


def test_zero_terminal_snr_predicts_v_unless_told_otherwise():
    s = train.resolve(train.parse(["--preset", "cifar10", "--schedule", "zero-terminal-snr"]))
    assert (s["prediction"], s["loss_space"]) == ("v", "v")
    s = train.resolve(train.parse(["--schedule", "zero-terminal-snr", "--prediction", "eps"]))
    assert (s["prediction"], s["loss_space"]) == ("eps", "eps")


def test_names_tell_runs_apart():
    flags = [
        [],
        ["--sa-k", "2"],
        ["--etsdm"],
        ["--sa-k", "2", "--etsdm"],
        ["--remap", "sqrt"],
        ["--continuous"],
        ["--schedule", "linear"],
        ["--prediction", "eps"],
        ["--seed", "3"],
        ["--preset", "cifar10"],
        ["--data", "some/photos.zip"],
        ["--data", "a.npz:train_x"],
    ]
    names = [train.resolve(train.parse(f))["name"] for f in flags]
    assert len(set(names)) == len(names)
    for path in ("photos", "photos/", "./photos", "a/photos", "photos/.", ".photos", "photos.zip"):
        assert train.resolve(train.parse(["--data", path]))["name"] == "photos-tiny"
    assert train.resolve(train.parse(["--data", ".."]))["name"] == "images-tiny"
    assert names[0] == "shapes-tiny" and names[1] == "shapes-tiny-sa2" and names[-1] == "a-tiny"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--sa-k", "0"], "1 to 1000, not 0"),
        (["--sa-weight", "0.5"], "with k = 1 there is none"),
        (["--sa-reuse"], "with k = 1"),
        (["--sa-reuse", "--sa-k", "2", "--sa-weight", "0"], "--sa-weight 0"),
        (["--recompute", "--task", "autoencoder"], "--recompute is no part"),
        (["--etsdm-n", "4"], "shape what --etsdm does"),
        (["--etsdm", "--remap", "sqrt"], "alternatives"),
        (["--etsdm", "--etsdm-interval", "1500"], "longer than the 1000 timesteps"),
        (["--etsdm", "--etsdm-interval", "10", "--etsdm-n", "20"], "shorter than a step"),
        (["--batch-size", "0"], "--batch-size must be above 0"),
        (["--images", "3"], "less than one batch"),
        (["--lr", "-1"], "--lr must be above 0"),
        (["--lr", "inf"], "--lr must be above 0"),
        (["--etsdm", "--etsdm-interval", "nan"], "must be a number of timesteps"),
        (["--lr", "nan"], "--lr must be above 0"),
        (["--ema", "1.5"], "--ema must be at least 0 and below 1"),
        (["--dropout", "1"], "--dropout must be at least 0 and below 1"),
        (["--etsdm", "--etsdm-n", "0"], "--etsdm-n must be a whole number"),
        (["--etsdm", "--etsdm-interval", "0"], "--etsdm-interval must be above 0"),
        (["--image-size", "9000"], "--image-size must be at most 8192"),
        (["--image-size", "36"], "--image-size 36 cannot be halved"),
        (["--task", "sr", "--image-size", "36"], "--image-size 36 cannot be halved"),
        (["--task", "autoencoder", "--image-size", "30"], "--image-size 30 cannot be halved"),
        (["--head", "npr", "--from", "nobody"], "--from nobody: no run"),
        (["--latent", "nobody"], "--latent nobody: no run"),
        (["--prediction", "edm", "--remap", "sqrt"], "--remap does not go with"),
        (["--microbatch", "0"], "at least 1"),
        (["--grad-clip", "-1"], "0 or more"),
        (["--name", "a/b"], "plain name"),
        (["--name", ".."], "plain name"),
    ],
)
def test_contradictions(flags, words):
    with pytest.raises(ValueError, match=words) as error:
        train.resolve(train.parse(flags))
    assert "\n" not in str(error.value) and str(error.value).startswith("--")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--image-size", "30"], "cannot be halved"),
        (["--data", "nowhere"], "no such file or folder"),
        (["--data", "few.npy", "--batch-size", "9"], "9.*5|5.*9"),
    ],
)
def test_bad_input_stops_before_training(flags, words):
    import numpy as np

    np.save("few.npy", np.zeros((5, 8, 8, 3), dtype=np.uint8))
    with pytest.raises((ValueError, OSError), match=words):
        small("--steps", "1", *flags)
