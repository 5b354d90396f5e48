"""Denoisers, second heads, autoencoders, latents and the alternatives in one training loop."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import data
import denoiser as D
import losses
import sample
import train
from config import Config
from conftest import SMALL
from papers import alternatives, autoencoder, heads, latents, superres
from support import checkpoint, distributed, rng
from support.cli import parse_into

BASE = [*SMALL, "--image-size", "8"]
PROGRAMS = {  # name: config class, objective, flags, terms of the loss
    "plain": (Config, train.DiffusionObjective, BASE, ["simple", "sa"]),
    "sa": (Config, train.DiffusionObjective, [*BASE, "--sa-k", "3"], ["simple", "sa"]),
    "reg": (
        alternatives.AlternativeConfig,
        alternatives.AlternativeObjective,
        [*BASE, "--lipschitz-reg", "5", "--sa-k", "2"],
        ["simple", "sa", "slope"],
    ),
    "reuse": (
        alternatives.AlternativeConfig,
        alternatives.AlternativeObjective,
        [*BASE, "--sa-reuse", "--sa-k", "2"],
        ["simple", "sa"],
    ),
    "code": (
        autoencoder.AutoencoderConfig,
        autoencoder.AutoencoderObjective,
        [*SMALL, "--image-size", "16"],
        ["reconstruction", "kl"],
    ),
    "latent": (latents.LatentConfig, latents.LatentObjective, ["code", *SMALL], ["simple", "sa"]),
    "sr": (
        superres.SuperResConfig,
        superres.SuperResObjective,
        [*SMALL, "--image-size", "16"],
        ["simple", "sa"],
    ),
    "head": (heads.HeadConfig, heads.VarianceHeadObjective, ["npr", "base", *SMALL], ["npr"]),
}


@pytest.fixture(scope="module")
def place(trained):
    """Inside the folder of trained runs, which stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        yield


def build(name):
    config_class, objective_class, flags, _ = PROGRAMS[name]
    config = parse_into(config_class, flags)
    dataset = data.load(config.data, config.image_size, config.channels, 0)
    torch.manual_seed(0)
    objective = objective_class(config, dataset, None)
    for p in objective.net.parameters():  # layers that start at zero would hide the others
        if not p.any():
            p.data.normal_(0, 0.1)
    images = torch.stack([dataset[i] for i in range(4)])
    return config, objective, images


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_objective_logs_its_terms_and_adds_up_microbatches(place, name):
    config, objective, images = build(name)
    columns = PROGRAMS[name][3]
    assert list(objective.loss_names) == columns
    with distributed.init() as dist:
        found = []
        for config.microbatch in (None, 3):
            state = train.TrainState(objective, config)
            weights = {k: v.clone() for k, v in state.net.state_dict().items()}
            values = train.train_step(state, state.net, images, config, dist, None)
            parameters = state.net.parameters()
            found.append((values, [p.grad.clone() for p in parameters if p.grad is not None]))
            state.net.load_state_dict(weights)
    (values, expected), (again, got) = found
    assert len(values) == 1 + len(columns) + 1  # loss, terms, norm
    assert_close(again, values, rtol=1e-4, atol=1e-6)
    scale = max(g.abs().max().item() for g in expected)
    assert_close(got, expected, rtol=0, atol=1e-5 * scale)
    # the total is the weighted sum of the terms
    weights = dict(slope=5.0, kl=getattr(config, "kl_weight", 0))
    total = sum(weights.get(c, 1.0) * v for c, v in zip(columns, values[1:], strict=False))
    assert_close(values[0], total, rtol=1e-4, atol=1e-6)
    shown, group = objective.preview(state.ema, images)
    assert shown.dtype == torch.uint8 and len(shown) == 4 * group


def test_a_plain_run_computes_nothing_it_does_not_use(place, monkeypatch):
    seen, real = [], losses.sa_loss
    monkeypatch.setattr(losses, "sa_loss", lambda *a: seen.append(a) or real(*a))
    config, objective, images = build("plain")
    draws = objective.draw(4, rng.generator(0), rng.generator(0))
    objective.loss(objective.net, data.to_float(images), draws)
    ((_, x0, t, noises, space),) = seen
    assert noises.shape == (1, 4, 3, 8, 8) and space == "v"


@pytest.mark.parametrize(
    "words", ["--remap sqrt --train-times remap", "--lipschitz-reg 3", "--sa-k 2 --sa-reuse"]
)
def test_alternatives_train_resume_and_sample(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    flags = [*words.split(), *BASE, "--name"]
    alternatives.main([*flags, "whole", "--steps", "3"])
    monkeypatch.setattr("support.run.RunFolder.save_preview", lambda *a: None)
    alternatives.main([*flags, "parts", "--steps", "2"])
    alternatives.main([*flags, "parts", "--steps", "3"])
    whole, parts = (
        checkpoint.load_checkpoint(f"runs/{name}/checkpoint.pt") for name in ("whole", "parts")
    )
    for key in ("net", "ema", "optimizer"):
        assert_close(parts[key], whole[key], rtol=0, atol=0)
    grid = ["--spacing", "remap"] if "--remap" in words else []
    for sampler in ("ddim", "heun"):
        out = f"out-{sampler}"
        sample.main(["whole", "--sampler", sampler, "--nfe", "5", "-n", "2", *grid, "--out", out])
        assert len(list(Path(out).glob("*.png"))) == 2
    columns = Path("runs/whole/log.csv").read_text().splitlines()[0].split(",")
    assert ("slope" in columns) == ("lipschitz" in words)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--lipschitz-reg 0", "--lipschitz-reg must be above 0"),
        ("--lipschitz-reg -1", "--lipschitz-reg must be 0 or more"),
        ("--train-times remap", "--train-times remap needs --remap"),
        ("--prediction edm --remap sqrt", "--remap does not work with edm"),
        ("--remap sqrt --etsdm", "--remap and --etsdm are alternatives"),
        ("--sa-reuse", "--sa-reuse needs --sa-k 2"),
        ("--sa-reuse --sa-k 2 --sa-weight 0", "--sa-reuse needs --sa-k 2"),
        ("--sa-reuse --sa-k 2 --lipschitz-reg 3", "--sa-reuse and --lipschitz-reg: choose one"),
        ("--schedule edm --prediction v", "--prediction v cannot go with --schedule edm"),
        ("--schedule edm --continuous", "--continuous has no effect with --schedule edm"),
        ("--image-size 30", "--image-size must be a multiple of"),
    ],
)
def test_contradictions_are_refused_before_a_folder_is_made(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        alternatives.main([*SMALL, *words.split()])
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_edm_runs_follow_edm_unless_a_flag_differs():
    config = parse_into(Config, ["--schedule", "edm", "--etsdm"])
    assert (config.prediction, config.loss_space, config.train_times) == ("edm", "edm", "lognormal")
    assert config.name == "shapes-tiny-edm-etsdm"
    # on other schedules its times would leave out the noise that sampling starts from
    config = parse_into(Config, ["--preset", "cifar10", "--prediction", "edm"])
    assert (config.schedule, config.loss_space, config.train_times) == ("linear", "edm", "uniform")
    config = parse_into(Config, ["--schedule", "edm", "--train-times", "uniform"])
    objective = train.DiffusionObjective(config)
    assert objective.quantile is None and objective.denoiser.schedule.continuous


def test_names_distinguish_systems(place):
    flags = {
        Config: ["", "--schedule edm", "--schedule linear-mns", "--train-times lognormal"],
        superres.SuperResConfig: ["", "--factor 2"],
        autoencoder.AutoencoderConfig: ["", "--downsamplings 3"],
        latents.LatentConfig: ["code", "code --etsdm"],
        heads.HeadConfig: ["npr base", "sn base", "npr base --head-size block"],
        alternatives.AlternativeConfig: [
            "--lipschitz-reg 3",
            "--remap sqrt",
            "--remap sqrt --train-times remap",
            "--sa-k 2 --sa-reuse",
        ],
    }
    names = [parse_into(c, f.split()).name for c, some in flags.items() for f in some]
    assert len(set(names)) == len(names)
    assert {"shapes-tiny-sr4", "shapes-autoencoder", "code-tiny-latent", "base-npr"} <= set(names)


def test_the_space_and_time_input_of_each_run(place):
    assert type(D.load_run("sr").space) is superres.LowRes
    assert type(D.load_run("latent").space) is latents.Latents
    assert type(D.load_run("plain").space) is D.Pixels
    t = torch.tensor([57.0])
    for name, expected in dict(plain=57.0, base=40.0, sr=40.0, latent=40.0).items():
        assert D.load_run(name).time_input_at(t).item() == expected
    sqrt = D.load_run("remap").time_input_at(t).item()
    assert sqrt == pytest.approx(alternatives.remap(57.0, "sqrt").item())
