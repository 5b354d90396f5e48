"""config.py: presets, names, which flags contradict, and which may change on resume."""

import pytest

from config import Config
from papers.alternatives import AlternativeConfig
from papers.autoencoder import AutoencoderConfig
from papers.heads import HeadConfig
from papers.latents import LatentConfig
from papers.superres import SuperResConfig
from support.cli import parse_into


def parse(words, cls=Config):
    return parse_into(cls, words.split())


def test_recipes_are_the_papers():
    config = parse("--preset cifar10 --sa-k 2")
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
        dropout=0.1,
    )
    assert {k: getattr(config, k) for k in expected} == expected
    assert config.settings()["unet"]["dropout"] == 0.1
    config = parse("--preset ffhq256 --etsdm")
    assert (config.batch_size, config.lr, config.grad_clip) == (96, 1e-4, 0)
    assert (config.etsdm_interval, config.etsdm_n) == (100, 5)


def test_the_command_line_wins_over_a_preset():
    assert parse("").flip is False and parse("--preset celeba64").flip is True
    assert parse("--preset celeba64 --no-flip").flip is False
    assert parse("--preset cifar10 --steps 10").images == 1280


@pytest.mark.parametrize(
    "flags, prediction, space, times",
    [
        ("--preset cifar10 --schedule zero-terminal-snr", "v", "v", "uniform"),
        ("--schedule zero-terminal-snr --prediction eps", "eps", "eps", "uniform"),
        ("--preset cifar10 --prediction x0", "x0", "eps", "uniform"),
        ("--prediction x0", "x0", "x0", "uniform"),
        ("--preset cifar10 --schedule edm", "edm", "edm", "lognormal"),
    ],
)
def test_a_schedule_chooses_the_prediction_unless_one_is_given(flags, prediction, space, times):
    config = parse(flags)
    assert (config.prediction, config.loss_space, config.train_times) == (prediction, space, times)


def test_names_distinguish_runs():
    flags = [
        *("", "--sa-k 2", "--etsdm", "--sa-k 2 --etsdm", "--continuous", "--schedule linear"),
        *("--prediction eps", "--seed 3", "--preset cifar10", "--schedule edm"),
        *("--schedule edm --train-times uniform", "--data some/photos.zip", "--data a.npz:train_x"),
    ]
    names = [parse(f).name for f in flags]
    names += [parse(f, AlternativeConfig).name for f in ("--remap sqrt", "--lipschitz-reg 3")]
    names += [parse("", SuperResConfig).name, parse("", AutoencoderConfig).name]
    assert len(set(names)) == len(names)
    assert names[:2] == ["shapes-tiny", "shapes-tiny-sa2"] and "a-tiny" in names
    for path in ("photos", "photos/", "./photos", "a/photos", "photos/.", ".photos", "photos.zip"):
        assert parse(f"--data {path}").name == "photos-tiny"
    assert parse("--data ..").name == "images-tiny"


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--sa-k 0", "--sa-k must be 1 to 1000, not 0"),
        ("--sa-weight 0.5", "--sa-weight requires --sa-k 2"),
        ("--etsdm-n 4", "--etsdm-n has no effect without --etsdm"),
        ("--etsdm --etsdm-interval 1500", "--etsdm-interval"),
        ("--etsdm --etsdm-interval 10 --etsdm-n 20", "--etsdm-"),
        ("--etsdm --etsdm-interval nan", "--etsdm-interval"),
        ("--etsdm --etsdm-interval 0", "--etsdm-interval"),
        ("--etsdm --etsdm-n 0", "--etsdm-n"),
        ("--batch-size 0", "--batch-size must be above 0"),
        ("--images 3", "--images is less than one batch"),
        ("--steps 3 --images 96", "--steps and --images"),
        ("--steps 0", "--steps must be above 0"),
        ("--lr -1", "--lr must be above 0"),
        ("--lr inf", "--lr must be above 0"),
        ("--lr nan", "--lr must be above 0"),
        ("--ema 1.5", "--ema must be at least 0 and below 1"),
        ("--dropout 1", "--dropout must be at least 0 and below 1"),
        ("--image-size 9000", "--image-size must be above 0 and below 8193"),
        ("--image-size 36", "--image-size must be a multiple of 8"),
        ("--microbatch 0", "--microbatch must be at least 1"),
        ("--grad-clip -1", "--grad-clip must be 0 or more"),
        ("--schedule edm --prediction v", "--prediction v cannot go with --schedule edm"),
        ("--schedule edm --continuous", "--continuous has no effect with --schedule edm"),
        ("--name a/b", "--name 'a/b' must be a plain name"),
        ("--name ..", "--name '..' must be a plain name"),
    ],
)
def test_contradictions(flags, words):
    with pytest.raises(ValueError) as error:
        parse(flags)
    assert str(error.value).startswith(words) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags, cls, words",
    [
        ("--etsdm --remap sqrt", AlternativeConfig, "--remap and --etsdm are alternatives"),
        ("--sa-reuse", AlternativeConfig, "--sa-reuse needs --sa-k 2"),
        ("--sa-reuse --sa-k 2 --sa-weight 0", AlternativeConfig, "--sa-reuse needs"),
        ("--prediction edm --remap sqrt", AlternativeConfig, "--remap cannot go with edm"),
        ("--image-size 36", SuperResConfig, "--image-size must be a multiple"),
        ("--image-size 30", AutoencoderConfig, "--image-size must be a multiple of 4"),
        ("npr nobody", HeadConfig, "no run nobody"),
        ("nobody", LatentConfig, "no run nobody"),
    ],
)
def test_contradictions_in_papers(flags, cls, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=words) as error:
        parse(flags, cls)
    assert "\n" not in str(error.value)


def test_what_may_change_on_resume():
    """How fast, how long, how often and where; never what is learnt, except for the learning rate
    and clipping, which the message about failed steps advises to change."""
    assert parse("").may_change() == set(
        "data name init steps images lr muon_lr grad_clip microbatch recompute precision device "
        "compile deterministic workers skip_bad_images sample_every save_every save_minutes".split()
    )
