"""train.py --init: a new run that starts from the network and weights of another."""

import shutil

import pytest
import torch
from torch.testing import assert_close

import denoiser as D
import train
from config import Config
from conftest import SMALL
from papers import checkpoints, covariance
from programs import parse
from support.cli import parse_into
from test_checkpoints import sa  # noqa: F401  (a fixture)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("no_grids")]


def test_a_run_starts_from_the_average_of_another(runs):
    """Two steps with a learning rate that changes nothing leave the weights as they were."""
    still = "--lr 1e-30 --sa-k 2".split()
    train.main([*SMALL, "--init", "base", "--name", "new", *still])
    new, base = D.load_run("new"), D.load_run("base")
    assert new.step == 2 and new.settings["unet"] == base.settings["unet"]
    for key in ("schedule", "prediction", "etsdm", "dropout", "image_size"):
        assert new.settings[key] == base.settings[key]
    x = torch.randn(2, *new.shape)
    assert_close(new.predict(x, 30)[1], base.predict(x, 30)[1], rtol=1e-5, atol=1e-5)
    shutil.rmtree("runs/base")  # it can be resumed without the other
    train.main([*SMALL, "--steps", "4", *still, "--init", "base", "--name", "new"])
    assert D.load_run("new").step == 4


def test_a_run_that_has_weights_keeps_them(runs, capsys):
    """A note if --init is another one when it is resumed."""
    train.main([*SMALL, "--init", "base", "--name", "kept"])
    shutil.copytree("runs/base", "runs/other")
    for init, noted in (("base", False), ("other", True)):
        capsys.readouterr()
        steps = str(D.load_run("kept").step + 1)
        train.main([*SMALL, "--steps", steps, "--init", init, "--name", "kept"])
        assert ("--init other has no effect" in capsys.readouterr().out) == noted


def test_imported_networks_keep_their_count(sa, here):  # noqa: F811
    """They count from 0: with E-TSDM the time input is f(t - 1)."""
    torch.save(sa[1], "model_ema.pth")
    checkpoints.import_run("model_ema.pth", "sa", image_size=16)
    train.main([*SMALL, "--init", "sa", "--etsdm", "--sa-k", "2", "--name", "tuned"])
    d = D.load_run("tuned")
    assert d.settings["imported"] and d.net.input_blocks[1][0].norm1.eps == 1e-6
    assert d.time_input_at(torch.tensor([1.0, 21.0, 40.0, 1000.0])).tolist() == [0, 20, 20, 999]
    with pytest.raises(ValueError, match="^--data is needed"):  # the file names no images
        parse("papers.heads", "npr sa")
    with pytest.raises(OSError, match="^sa was trained on"):
        covariance.main(["sa", "-n", "2"])
    train.main([*SMALL, "--init", "sa", "--name", "plain"])
    assert D.load_run("plain").time_input_at(1000.0) == 999


def test_the_flags_of_init(runs):
    config = parse_into(Config, ["--init", "base", "--no-etsdm", "--dropout", "0"])
    assert config.network() == D.load_run("base").settings["unet"] | dict(dropout=0.0)
    assert not config.etsdm and config.name == "shapes-tiny-from-base-linear"
