"""config.py: presets, names, and which flags may change on resume. (What is refused:
test_refusals.py.)"""

import pytest
from programs import parse


def test_recipes_are_the_papers():
    config = parse("train.py", "--preset cifar10 --sa-k 2")
    expected = dict(batch_size=128, lr=2e-4, ema=0.9999, grad_clip=1 / 3072, flip=False)
    expected |= dict(image_size=32, adam_eps=1e-8 / 3072)
    expected |= dict(schedule="linear", prediction="eps", loss_space="eps", images=1200 * 50_000)
    expected |= dict(sa_weight=1.0, dropout=0.1)
    assert {k: getattr(config, k) for k in expected} == expected
    assert config.settings()["unet"]["dropout"] == 0.1
    config = parse("train.py", "--preset ffhq256 --etsdm")
    assert (config.batch_size, config.lr, config.grad_clip, config.flip) == (96, 1e-4, 0, True)
    assert (config.etsdm_interval, config.etsdm_n) == (100, 5)


def test_the_command_line_wins_over_a_preset():
    assert [parse("train.py", f"--preset {p}").flip for p in ("tiny", "celeba64")] == [False, True]
    assert parse("train.py", "--preset celeba64 --no-flip").flip is False
    assert parse("train.py", "--preset cifar10 --steps 10").images == 1280


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--preset cifar10 --schedule zero-terminal-snr", "v v uniform"),
        ("--schedule zero-terminal-snr --prediction eps", "eps eps uniform"),
        ("--preset cifar10 --prediction v", "v v uniform"),
        ("--preset cifar10 --prediction v --loss-space eps", "v eps uniform"),
        ("--prediction x0", "x0 x0 uniform"),
        ("--preset cifar10 --schedule edm", "edm edm lognormal"),
        ("--schedule edm --train-times uniform", "edm edm uniform"),
        # on other schedules EDM's times would leave out the noise that sampling starts from
        ("--preset cifar10 --prediction edm", "edm edm uniform"),
    ],
)
def test_a_schedule_chooses_the_prediction_unless_one_is_given(flags, expected):
    config = parse("train.py", flags)
    assert [config.prediction, config.loss_space, config.train_times] == expected.split()


def test_names_distinguish_runs():
    """Those of the programs in papers/: test_systems.py."""
    flags = "|--sa-k 2|--etsdm|--sa-k 2 --etsdm|--continuous|--schedule linear|--prediction eps"
    flags += "|--seed 3|--preset cifar10|--schedule edm|--schedule edm --train-times uniform"
    flags += "|--data some/photos.zip|--data a.npz:train_x|--schedule edm --etsdm"
    names = [parse("train.py", f).name for f in flags.split("|")]
    assert len(set(names)) == len(names)
    assert names[:2] == ["shapes-tiny", "shapes-tiny-sa2"] and "a-tiny" in names
    assert names[-1] == "shapes-tiny-edm-etsdm"
    for path in ("photos", "photos/", "./photos", "a/photos", "photos/.", ".photos", "photos.zip"):
        assert parse("train.py", f"--data {path}").name == "photos-tiny"
    assert parse("train.py", "--data ..").name == "images-tiny"


def test_what_may_change_on_resume():
    """How fast, how long, how often and where; never what is learnt, except for the learning rate
    and clipping, which the message about failed steps advises to change."""
    assert parse("train.py", "").may_change() == set(
        "data name init steps images lr adam_eps muon_lr muon_momentum grad_clip microbatch "
        "recompute precision device compile deterministic workers skip_bad_images sample_every "
        "save_every save_minutes".split()
    )
