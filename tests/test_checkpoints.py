"""papers/checkpoints.py: guided-diffusion's reference numbers, and files that are refused."""

import json

import pytest
import torch
from torch.testing import assert_close

import denoiser as D
import sample
import schedules
import unet
from papers import checkpoints
from support import checkpoint
from test_unet import SMALL, awake

FIRST, LAST = "input_blocks.0.0.weight", "out.2.weight"


def check_numbers(out, numbers):
    """The output of the reference network (2, 3, 16, 16), against guided-diffusion's own."""
    out = out.detach().flatten()
    for got, expected in ((out[:8], numbers["first8"]), (out[-8:], numbers["last8"])):
        assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert_close(out.mean().item(), numbers["mean"], rtol=1e-4, atol=1e-6)
    assert_close(out.std(correction=0).item(), numbers["std"], rtol=1e-3, atol=0)


def test_guided_diffusion_weights_give_its_output(gold):
    net, numbers = unet.UNet(**gold.size), gold.numbers
    assert sum(p.numel() for p in net.parameters()) == numbers["params"]
    state, kind = checkpoints.convert(gold.state)
    net.load_state_dict(state, strict=True)
    check_numbers(net.eval()(gold.x, torch.tensor(numbers["timesteps"])), numbers)
    assert "guided-diffusion" in kind


def to_guided_diffusion(state):
    """Our keys back into theirs: the inverse of the import, written separately."""
    pairs = [
        ("norm1.", "in_layers.0."),
        ("conv1.", "in_layers.2."),
        ("norm2.", "out_layers.0."),
        ("conv2.", "out_layers.3."),
        (".time.", ".emb_layers.1."),
        (".skip.", ".skip_connection."),
        (".proj.", ".proj_out."),
        ("out_norm.", "out.0."),
        ("out_conv.", "out.2."),
    ]
    theirs = {}
    for key, value in state.items():
        for ours, name in pairs:
            key = key.replace(ours, name)
        if key.startswith("input_blocks") and key.split(".")[2] == "0" and ".conv." in key:
            key = key.replace(".conv.", ".op.")  # a strided convolution
        if key.endswith(("qkv.weight", "proj_out.weight")):
            value = value[..., 0]
        theirs["module." + key] = value
    return theirs


@pytest.mark.parametrize("updown", [True, False])
def test_conversion_and_back_is_strict(updown):
    net = awake(unet.UNet(**SMALL, resblock_updown=updown))
    again = unet.UNet(**SMALL, resblock_updown=updown).eval()
    state, _ = checkpoints.convert(to_guided_diffusion(net.state_dict()))
    again.load_state_dict(state, strict=True)
    x, c = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    assert_close(again(x, c), net(x, c), rtol=0, atol=0)


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_file_becomes_a_run(gold, tmp_path, monkeypatch, capsys, learn_sigma):
    """guided-diffusion's numbers by load_run: the network receives t - 1, and a learned variance is
    left out. Then sample.py draws with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(unet.PRESETS, "gold", gold.size)
    state, numbers = dict(gold.state), gold.numbers
    if learn_sigma:  # three more outputs, behind
        for key in ("out.2.weight", "out.2.bias"):
            state[key] = torch.cat([state[key], torch.randn_like(state[key])])
    torch.save(state, "weights.pt")
    checkpoints.import_run("weights.pt", "gold", "linear", "imported")
    d = D.load_run("imported")
    assert not d.net.training and d.shape == (3, 16, 16) and d.prediction == "eps"
    assert json.load(open("runs/imported/config.json"))["imported"] is True
    x0, eps = d.predict(gold.x, torch.tensor(numbers["timesteps"]) + 1)
    check_numbers(eps, numbers)
    t = torch.tensor(numbers["timesteps"]) + 1
    alpha, sigma = (
        k[:, None, None, None] for k in schedules.make_schedule("linear").alpha_sigma(t)
    )
    assert_close(alpha * x0 + sigma * eps, gold.x.double(), rtol=1e-4, atol=1e-4)
    sample.main("imported --nfe 2 -n 2 --clip on --out drawn".split())
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2
    with pytest.raises(FileExistsError, match="^--name imported: runs/imported exists already"):
        checkpoints.import_run("weights.pt", "gold", "linear", "imported")


def test_the_program(gold, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(to_guided_diffusion(awake(unet.UNet(**unet.PRESETS["tiny"])).state_dict()), "own.pt")
    with pytest.raises(ValueError, match="^own.pt: 12 channels in and 12 out"):  # in patches
        checkpoints.main(["own.pt", "--preset", "tiny"])
    torch.save(gold.state, "my weights.pt")
    for words, message in (
        (["my weights.pt", "--preset", "tiny"], "^my weights.pt does not fit --preset tiny: "),
        (["my weights.pt", "--name", "a/b"], "^--name 'a/b' must be a plain name"),
        (["none.pt"], "^FILE none.pt: there is no such file"),
        ([], "^FILE is missing"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            checkpoints.main(words)
    assert not (tmp_path / "runs").exists()
    monkeypatch.setitem(unet.PRESETS, "tiny", gold.size)
    checkpoints.main(["my weights.pt", "--preset", "tiny", "--schedule", "cosine"])
    out = capsys.readouterr().out
    assert "next: python sample.py 'my weights' --sampler ddpm --nfe 250" in out
    assert D.load_run("my weights").schedule.name == "cosine"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<html>not found</html>", "a web page"),
        (b"", "the file is empty"),
        ({"x": torch.zeros(2)}, "not a guided-diffusion U-Net.*but x"),
        ({"step": 3}, "not a state dict of a network: it holds 1 entries: step"),
        (None, "does not fit --preset cifar10"),
        ({FIRST: torch.zeros(1), "label_emb.weight": torch.zeros(1)}, "class-conditional"),
        ({FIRST: torch.zeros(128, 3, 3, 3), "out.2.qkv_proj.weight": torch.zeros(9)}, "classifier"),
        (
            {FIRST: torch.tensor(1.0), LAST: torch.tensor(1.0)},
            "its first and last layers are not convolutions",
        ),
        (
            {FIRST: torch.zeros(8, 3, 3, 3), LAST: torch.zeros(0)},
            "its first and last layers are not convolutions",
        ),
        ({FIRST: torch.zeros(1, 0, 3, 3), LAST: torch.zeros(3, 1, 3, 3)}, "0 channels in"),
        ({FIRST: torch.zeros(1, 6, 3, 3), LAST: torch.zeros(3, 1, 3, 3)}, "6 channels in.*upsampl"),
        (
            {FIRST: torch.zeros(1, 3, 3, 3), LAST: torch.zeros(3, 1, 3, 3), 5: torch.zeros(())},
            "not a state dict",
        ),
        ({1: torch.zeros(2), (2, 3): torch.zeros(2)}, "not a state dict"),
        ({}, "not a state dict of a network"),
        ([torch.zeros(2)], "not a state dict of a network: it holds a list"),
        ("run", "a run of train.py, which needs no conversion"),
    ],
    ids=range(16),
)
def test_other_files_are_refused_in_one_line(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        state = unet.UNet(16, channels=32, head_channels=None).state_dict()
        torch.save({FIRST: state[FIRST], LAST: state["out_conv.weight"]}, path)
    elif content == "run":
        torch.save({"format": checkpoint.FORMATS[-1]}, path)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=words) as caught:
        checkpoints.main([str(path), "--preset", "cifar10"])
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 400 + len(str(path))
    assert not (tmp_path / "runs").exists()
