"""Denoisers, second heads, autoencoders, latents and the alternatives in one training loop."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, assert_same, saved
from programs import PROGRAMS, main_of, parse
from torch.testing import assert_close

import data
import denoiser as D
import losses
import sample
import train
from papers import alternatives, autoencoder, heads, latents, superres
from support import distributed, rng

OBJECTIVES = {  # name: program, objective, flags, terms of the loss
    "plain": ("train.py", train.DiffusionObjective, "--image-size 8", "simple sa"),
    "sa": ("train.py", train.DiffusionObjective, "--image-size 8 --sa-k 3 --flip", "simple sa"),
    "reg": (
        "papers.alternatives",
        alternatives.AlternativeObjective,
        "--image-size 8 --lipschitz-reg 5 --sa-k 2",
        "simple sa slope",
    ),
    "reuse": (
        "papers.alternatives",
        alternatives.AlternativeObjective,
        "--image-size 8 --sa-reuse --sa-k 2",
        "simple sa",
    ),
    "code": (
        "papers.autoencoder train",
        autoencoder.AutoencoderObjective,
        "--image-size 16",
        "reconstruction kl",
    ),
    "latent": ("papers.latents", latents.LatentObjective, "code", "simple sa"),
    "sr": ("papers.superres train", superres.SuperResObjective, "--image-size 16", "simple sa"),
    "head": ("papers.heads", heads.VarianceHeadObjective, "npr base", "npr"),
}


@pytest.fixture(scope="module")
def place(trained):
    """Inside the folder of trained runs, which stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        yield


def build(name):
    program, objective_class, flags, _ = OBJECTIVES[name]
    config = parse(program, [*flags.split(), *SMALL])
    dataset = data.load(config.data, config.image_size, config.channels, 0)
    torch.manual_seed(0)
    objective = objective_class(config, dataset, None)
    for p in objective.net.parameters():  # layers that start at zero would hide the others
        if not p.any():
            p.data.normal_(0, 0.1)
    return config, objective, torch.stack([dataset[i] for i in range(4)])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_each_objective_logs_its_terms_and_adds_up_microbatches(place, name):
    config, objective, images = build(name)
    columns = OBJECTIVES[name][3].split()
    assert list(objective.loss_names) == columns
    found = []
    with distributed.init() as dist:
        for config.microbatch in (None, 1, 3, 4, 100) if name == "sa" else (None, 3):
            state = train.TrainState(objective, config)
            weights = {k: v.clone() for k, v in state.net.state_dict().items()}
            values = train.train_step(state, state.net, images, config, dist, None)
            gradients = (p.grad for p in state.net.parameters())
            found.append((values, [g.clone() for g in gradients if g is not None]))
            state.net.load_state_dict(weights)
    (values, expected), *others = found
    assert len(values) == 1 + len(columns) + 1  # loss, terms, norm
    scale = max(g.abs().max().item() for g in expected)
    for again, got in others:
        assert_close(again, values, rtol=1e-4, atol=1e-6)
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
    _, objective, images = build("plain")
    draws = objective.draw(4, rng.generator(0), rng.generator(0))
    objective.loss(objective.net, data.to_float(images), draws)
    ((_, _, _, noises, space),) = seen
    assert noises.shape == (1, 4, 3, 8, 8) and space == "v"


SLOW = pytest.mark.slow
RESUMED = [  # program, flags, the run that it starts from
    ("train.py", "--image-size 8 --sa-k 3 --etsdm --dropout 0.2 --flip --optimizer muon", ""),
    pytest.param("train.py", "--image-size 8 --sa-k 2", "", marks=SLOW),
    pytest.param(
        "train.py", "--image-size 8 --continuous --prediction eps --precision bf16", "", marks=SLOW
    ),
    ("papers.alternatives", "--image-size 8 --remap sqrt --train-times remap", ""),
    ("papers.alternatives", "--image-size 8 --lipschitz-reg 3", ""),
    ("papers.alternatives", "--image-size 8 --sa-k 2 --sa-reuse", ""),
    ("papers.autoencoder train", "--image-size 16", ""),
    ("papers.latents", "code --etsdm --sa-k 2", "code"),
    ("papers.heads", "npr base --head-size simple", "base"),
    pytest.param("papers.heads", "sn base --head-size block --optimizer muon", "base", marks=SLOW),
]


@pytest.mark.parametrize("program, words, base", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    runs, no_grids, program, words, base
):
    """Without the folder of the run it started from: the checkpoint holds what it needs."""
    flags = [*SMALL, *words.split()]
    main_of(program, [*flags, "--steps", "11", "--name", "whole"])
    main_of(program, [*flags, "--steps", "4", "--name", "parts"])
    if base:
        shutil.rmtree(f"runs/{base}")
    main_of(program, [*flags, "--steps", "11", "--name", "parts"])
    assert_same(saved("parts"), saved("whole"))
    assert_close(saved("parts")["extra"], saved("whole")["extra"], rtol=0, atol=0)
    for name in ("whole", "parts"):  # a row is the mean of what one process saw: 1..10, and 5..10
        with open(f"runs/{name}/log.csv", newline="") as f:
            (row,) = csv.DictReader(f)
        assert row["step"] == "10" and float(row["loss"]) > 0
    assert ("slope" in row) == ("lipschitz" in words)
    if program in ("papers.alternatives", "papers.latents", "papers.heads"):
        grid = ["--spacing", "remap"] if "--remap" in words else []
        for sampler in ("ddim", "heun"):
            flags = ["--sampler", sampler, "--nfe", "5", "-n", "2", *grid, "--out", sampler]
            sample.main(["parts", *flags])
            assert len(list(Path(sampler).glob("*.png"))) == 2


def test_edm_runs_may_have_uniform_times():
    objective = train.DiffusionObjective(parse("train.py", "--schedule edm --train-times uniform"))
    assert objective.quantile is None and objective.denoiser.schedule.continuous


def test_names_distinguish_systems(place):
    flags = {
        "train.py": "|--schedule edm|--schedule linear-mns|--train-times lognormal",
        "papers.superres train": "|--factor 2",
        "papers.autoencoder train": "|--downsamplings 3",
        "papers.latents": "code|code --etsdm",
        "papers.heads": "npr base|sn base|npr base --head-size block",
        "papers.alternatives": "--lipschitz-reg 3|--remap sqrt|--remap sqrt --train-times remap"
        "|--sa-k 2 --sa-reuse",
    }
    assert set(flags) <= set(PROGRAMS)
    names = [parse(p, words).name for p, some in flags.items() for words in some.split("|")]
    assert len(set(names)) == len(names)
    assert {"shapes-tiny-sr4", "shapes-autoencoder", "code-tiny-latent", "base-npr"} <= set(names)


def test_the_space_and_time_input_of_each_run(place):
    spaces = dict(sr=superres.LowRes, latent=latents.Latents, plain=D.Pixels)
    assert all(type(D.load_run(name).space) is space for name, space in spaces.items())
    t = torch.tensor([57.0])
    sqrt = alternatives.remap(57.0, "sqrt").item()
    for name, expected in dict(plain=57.0, base=40.0, sr=40.0, latent=40.0, remap=sqrt).items():
        assert D.load_run(name).time_input_at(t).item() == pytest.approx(expected)
