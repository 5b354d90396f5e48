"""tasks.py: denoisers, second heads and autoencoders in one training loop, and what they may not be
asked for."""

import csv
import os
import shutil

import pytest
import torch
from torch.testing import assert_close

import denoiser as D
import files
import losses
import sample
import tasks
import train

SMALL = ["--batch-size", "4", "--precision", "fp32"]
BASE = [*SMALL, "--image-size", "8", "--steps", "2"]
SHARED = [*BASE, "--name", "base", "--etsdm", "--schedule", "linear", "--dropout", "0.3"]
CODE = [*BASE, "--image-size", "16", "--task", "autoencoder", "--name", "code"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with two finished runs: base (E-TSDM, linear, with dropout), code (autoencoder)."""
    folder = tmp_path_factory.mktemp("tasks")
    before = os.getcwd()
    os.chdir(folder)
    try:
        for flags in (SHARED, CODE):
            train.main(flags)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """In a folder with those runs, to be changed at will."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)


def checkpoint(name):
    return files.load_checkpoint(f"runs/{name}/checkpoint.pt")


def rows(name):
    with open(f"runs/{name}/log.csv", newline="") as f:
        return list(csv.DictReader(f))


# ------------------------------------------------------------------ second heads


@pytest.mark.parametrize(
    "kind, size", [("npr", "simple"), pytest.param("sn", "block", marks=pytest.mark.slow)]
)
def test_a_head_is_trained_and_its_trunk_is_not(runs, kind, size):
    flags = [*SMALL, "--head", kind, "--from", "base", "--head-size", size, "--name", "head"]
    train.main([*flags, "--steps", "11"])
    base, head = checkpoint("base"), checkpoint("head")
    for weights in ("raw", "ema"):
        new = {k: v for k, v in head[weights].items() if k.startswith("second_head")}
        assert new and any(v.any() for k, v in new.items() if k.endswith("weight"))
        trunk = {k: v for k, v in head[weights].items() if k not in new}
        assert_close(trunk, base["ema"], rtol=0, atol=0)  # bit for bit what was sampled from
    assert len(head["optimizer"]["state"]) == len([k for k in new])  # nothing else is stepped
    assert rows("head")[-1][kind] and float(rows("head")[-1]["loss"]) > 0
    # everything else is the base's, and the trunk runs as in sampling, without dropout
    s = head["settings"]
    assert s["schedule"] == "linear" and s["etsdm"] is True and s["unet"]["dropout"] == 0
    assert s["head"] == kind and s["from"] == "base" and s["data"] == "shapes"
    # in two parts: the same, bit for bit
    train.main([*flags, "--steps", "4", "--name", "parts"])
    train.main([*flags, "--steps", "11", "--name", "parts"])
    for key in ("raw", "ema", "optimizer"):
        assert_close(checkpoint("parts")[key], head[key], rtol=0, atol=0)


@pytest.mark.slow
def test_a_head_serves_sampling_in_the_same_calls(runs, monkeypatch):
    train.main([*SMALL, "--head", "npr", "--from", "base", "--steps", "2", "--name", "head"])
    calls, forward = [], torch.nn.Module.__call__

    def counted(module, *args, **kwargs):
        calls.append(1) if type(module).__name__ == "UNet" else None
        return forward(module, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", counted)
    for sampler in ("ddpm", "ddim"):
        calls.clear()
        flags = ["--variance", "npr", "--sampler", sampler, "-n", "2", "--nfe", "7"]
        sample.main(["head", *flags, "--out", sampler])
        assert len(calls) == 7
    with pytest.raises(ValueError, match="--head sn --from"):
        sample.main(["head", "--variance", "sn"])
    with pytest.raises(ValueError, match="--head npr --from"):
        sample.main(["base", "--variance", "npr"])
    sample.main(["head", "-n", "1", "--nfe", "2"])  # and without it, it is the base
    sample.main(["base", "-n", "1", "--nfe", "2"])
    with open("runs/head/generated/ddim-2/000000.png", "rb") as a:
        with open("runs/base/generated/ddim-2/000000.png", "rb") as b:
            assert a.read() == b.read()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--head", "npr"], "needs --from RUN"),
        (["--from", "base"], "--from is for --head"),
        (["--head-size", "block"], "--head-size is for --head"),
        (["--head", "sn", "--from", "nowhere"], "no run nowhere"),
        (["--head", "sn", "--from", "code"], "--from code must be a denoiser without a head"),
        (["--head", "sn", "--from", "base", "--sa-k", "2"], "--sa-k cannot change with --head"),
        (["--head", "sn", "--from", "base", "--etsdm"], "--etsdm cannot change with --head"),
        (["--head", "sn", "--from", "base", "--image-size", "8"], "--image-size cannot change"),
        (["--task", "autoencoder", "--schedule", "linear"], "--schedule is no part of an autoenc"),
        (["--task", "autoencoder", "--sa-k", "2"], "--sa-k is no part"),
        (["--task", "autoencoder", "--halvings", "9"], "--halvings must be 1 to 5, not 9"),
        (["--task", "autoencoder", "--image-size", "30"], "cannot be halved"),
        (["--task", "autoencoder", "--kl-weight", "-1"], "--kl-weight must be 0 or more"),
        (["--halvings", "2"], "--halvings is for --task autoencoder"),
        (["--kl-weight", "0"], "--kl-weight is for --task autoencoder"),
        (["--factor", "2"], "--factor is for --task sr"),
        (["--task", "sr", "--factor", "3"], "--factor 3 must be at least 2 and divide the 32"),
        (["--task", "sr", "--latent", "code"], "--latent goes without --task"),
        (["--latent", "base"], "--latent base is not an autoencoder"),
        (["--lipschitz-reg", "0"], "--lipschitz-reg must be above 0"),
        (["--train-times", "remap"], "--remap tells: give that too"),
        (["--prediction", "edm", "--remap", "sqrt"], "--remap does not go"),
        (["--schedule", "edm", "--prediction", "v"], "goes with --prediction edm"),
        (["--schedule", "edm", "--continuous"], "continuous already"),
        (["--task", "autoencoder", "--latent-channels", "0"], "--latent-channels must be at least"),
        (
            ["--latent", "code", "--preset", "celeba64"],
            "--latent code: a side of 4 cannot.*halvings",
        ),
    ],
)
def test_what_does_not_go_together(runs, flags, words):
    with pytest.raises((ValueError, OSError), match=words) as caught:
        s = train.resolve(train.parse(flags))
        train.Model(s, torch.device("cpu"))
    assert "\n" not in str(caught.value) and str(caught.value).startswith("--")


@pytest.mark.parametrize("flag", ["--from", "--latent"])
def test_a_run_whose_settings_lack_something_is_one_line(runs, flag):
    checkpoint = files.load_checkpoint("runs/base/checkpoint.pt")
    checkpoint["settings"] = {"task": None if flag == "--from" else "autoencoder"}
    os.makedirs("runs/old", exist_ok=True)
    files.save_checkpoint("runs/old/checkpoint.pt", checkpoint)
    words = ["--head", "npr"] * (flag == "--from") + [flag, "old"]
    with pytest.raises(ValueError, match=f"{flag} old: its settings lack"):
        train.resolve(train.parse(words))


# ------------------------------------------------------------------ the loop, whatever the task


@pytest.mark.parametrize(
    "flags, columns",
    [
        ([], ["simple", "sa"]),
        (["--lipschitz-reg", "5", "--sa-k", "2"], ["simple", "sa", "slope"]),
        (["--task", "autoencoder", "--image-size", "16"], ["reconstruction", "kl"]),
        (["--head", "npr", "--from", "base"], ["npr"]),
    ],
    ids=str,
)
def test_each_task_logs_its_terms_and_adds_up_microbatches(runs, flags, columns):
    own = [] if "--head" in flags else BASE
    s = train.resolve(train.parse([*SMALL, "--steps", "10", *own, *flags]))
    model = train.Model(s, torch.device("cpu"))
    assert list(model.task.columns) == columns
    for p in model.net.parameters():  # what starts at zero would hide the rest
        if not p.any():
            p.data.normal_(0, 0.1)
    _, numbers = train.draw(s, model.task, 0, torch.device("cpu"))
    images = torch.rand(4, 3, s["image_size"], s["image_size"]) * 2 - 1

    def gradient(micro):
        model.net.zero_grad()
        values = train.gradients(
            model.net, model.task, {**s, "microbatch": micro}, images, numbers, None
        )
        trained = [p for p in model.net.parameters() if p.requires_grad]
        return values, torch.cat([p.grad.flatten() for p in trained if p.grad is not None])

    (values, expected), (again, got) = gradient(None), gradient(3)
    assert len(values) == 1 + len(columns)
    assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert_close(again, values, rtol=1e-5, atol=1e-7)
    weights = dict(slope=5.0, kl=s["kl_weight"])  # the total is what the terms say
    total = sum(weights.get(c, 1.0) * v for c, v in zip(columns, values[1:], strict=True))
    assert_close(values[0], total, rtol=1e-4, atol=1e-6)
    shown, together = model.task.pictures(model.ema, (images * 127 + 128).to(torch.uint8))
    assert shown.dtype == torch.uint8 and len(shown) == 4 * together


def test_a_plain_run_pays_for_nothing_it_does_not_use(monkeypatch):
    seen = []
    good = losses.terms
    monkeypatch.setattr(losses, "terms", lambda *a, **k: seen.append((a, k)) or good(*a, **k))
    s = train.resolve(train.parse(BASE))
    model = train.Model(s, torch.device("cpu"))
    _, numbers = train.draw(s, model.task, 0, torch.device("cpu"))
    train.gradients(model.net, model.task, s, torch.zeros(4, 3, 8, 8), numbers, None)
    _, x0, t, noises, space, slope, reuse = seen[0][0]
    assert noises.shape == (1, 4, 3, 8, 8) and space == "v" and not slope and not reuse


def test_edm_runs_follow_edm_unless_told_otherwise():
    s = train.resolve(train.parse(["--schedule", "edm", "--etsdm"]))
    assert (s["prediction"], s["loss_space"], s["train_times"]) == ("edm", "edm", "lognormal")
    assert s["name"] == "shapes-tiny-edm-etsdm"
    # on other schedules its times would leave out the noise that sampling starts from
    s = train.resolve(train.parse(["--preset", "cifar10", "--prediction", "edm"]))
    assert (s["schedule"], s["loss_space"], s["train_times"]) == ("linear", "edm", None)
    s = train.resolve(train.parse(["--schedule", "edm", "--train-times", "uniform"]))
    task = tasks.choose(s, {"extra": {}}, None)
    assert task.quantile is None and task.denoiser.schedule.continuous
    for flags in ([], ["--train-times", "uniform"]):
        assert train.resolve(train.parse(flags))["train_times"] is None


def test_names_say_which_system():
    flags = [
        [],
        ["--schedule", "edm"],
        ["--task", "sr"],
        ["--task", "sr", "--factor", "2"],
        ["--task", "autoencoder"],
        ["--lipschitz-reg", "3"],
        ["--remap", "sqrt"],
        ["--remap", "sqrt", "--train-times", "remap"],
        ["--schedule", "linear-mns"],
        ["--train-times", "lognormal"],
        ["--task", "autoencoder", "--halvings", "3"],
    ]
    names = [train.resolve(train.parse(f))["name"] for f in flags]
    assert len(set(names)) == len(names) and names[2] == "shapes-tiny-sr4"


def test_runs_of_before_these_flags_still_resume(runs):
    """A checkpoint that lacks their settings is one in which they were off."""
    old = checkpoint("base")
    new = "task factor latent head from head_size lipschitz_reg train_times kl_weight".split()
    old["settings"] = {k: v for k, v in old["settings"].items() if k not in new}
    del old["extra"]
    files.save_checkpoint("runs/base/checkpoint.pt", old)
    assert D.load_run("base").space.shape == (3, 8, 8)
    train.main([*SHARED, "--steps", "3"])
    assert checkpoint("base")["step"] == 3


def test_the_trunk_is_that_of_the_folder_that_was_named(runs):
    """Of two runs of one name, elsewhere/base and runs/base, the one that --from says."""
    shutil.copytree("runs", "elsewhere")
    other = checkpoint("base")
    other["ema"] = {k: v + 1 for k, v in other["ema"].items()}
    files.save_checkpoint("elsewhere/base/checkpoint.pt", other)
    flags = [*SMALL, "--head", "npr", "--from", "elsewhere/base", "--steps", "1"]
    train.main(flags)
    head = checkpoint("base-npr")["ema"]
    assert_close({k: head[k] for k in other["ema"]}, other["ema"], rtol=0, atol=0)


@pytest.mark.parametrize("flags", [["--head", "npr", "--from"], ["--latent"]], ids=str)
def test_where_the_first_run_lies_makes_no_other_run(runs, capsys, monkeypatch, flags):
    """Its weights are in the checkpoint: the same ones in another place are silent."""
    monkeypatch.setattr(train, "picture", lambda *inputs: None)
    first, name = ("base", "base-npr") if "--head" in flags else ("code", "code-tiny-latent")
    shutil.copytree("runs", "elsewhere")
    places = [first, f"./runs/{first}/checkpoint.pt", f"elsewhere/{first}/"]
    for step, place in enumerate(places, 1):
        train.main([*SMALL, *flags, place, "--steps", str(step)])
        assert checkpoint(name)["step"] == step
    assert "other weights" not in capsys.readouterr().out
    other, kept = checkpoint(first), checkpoint(name)
    other["ema"] = {k: v + 1 for k, v in other["ema"].items()}
    files.save_checkpoint(f"elsewhere/{first}/checkpoint.pt", other)
    train.main([*SMALL, *flags, f"elsewhere/{first}", "--steps", "4"])
    out = capsys.readouterr().out
    assert f"note: {flags[-1]} elsewhere/{first} has other weights than this run began with" in out
    if "--latent" in flags:
        kept, now = (c["extra"]["first_stage"]["weights"] for c in (kept, checkpoint(name)))
    else:
        kept, now = (
            {k: v for k, v in c["raw"].items() if "second_head" not in k}
            for c in (kept, checkpoint(name))
        )
    assert_close(now, kept, rtol=0, atol=0)


def test_the_grids_of_a_head_show_the_head(runs):
    """They change as it learns, though the trunk does not."""
    flags = ["--head", "npr", "--from", "base", "--lr", "0.05", "--sample-every", "4"]
    train.main([*SMALL, *flags, "--steps", "8", "--name", "head"])
    grids = [open(f"runs/head/samples/{i:07d}.png", "rb").read() for i in (4, 8)]
    assert grids[0] != grids[1]


def test_a_wrong_size_leaves_no_folder(runs):
    for flags in (["--task", "sr", "--factor", "3"], ["--image-size", "30"]):
        with pytest.raises(ValueError):
            train.main([*SMALL, "--steps", "1", "--name", "wrong", *flags])
        assert not os.path.exists("runs/wrong")


def test_a_second_head_never_looks_at_few_noise_levels_alone(runs):
    train.main([*BASE, "--schedule", "edm", "--name", "edm"])
    s = train.resolve(train.parse(["--head", "sn", "--from", "edm"]))
    assert checkpoint("edm")["settings"]["train_times"] == "lognormal" and s["train_times"] is None
    assert s["name"] == "edm-sn" and s["prediction"] == "edm"


def test_the_next_command_can_be_pasted():
    s = dict(task=None, head="npr", name="my run")
    assert tasks.next_command(s) == "python sample.py 'my run' --variance npr"
    assert tasks.next_command(s | dict(head=None)) == "python sample.py 'my run'"
    s = dict(task="sr", head=None, name="my run")
    assert tasks.next_command(s) == "python sample.py 'my run' --low-res IMAGES"
    s = dict(task="autoencoder", head=None, name="my run")
    assert tasks.next_command(s) == "python train.py --latent 'my run'"
