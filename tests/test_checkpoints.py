"""papers/checkpoints.py: reference numbers of the programs it reads, and files that are refused."""

import json
import sys

import conftest
import diffusers_numbers as hf
import fill
import pytest
import torch
from torch.testing import assert_close

import denoiser as D
import sample
import samplers
import schedules
import unet
from config import Config
from conftest import DATA
from papers import checkpoints, exports
from support import checkpoint
from test_unet import SMALL, awake

FIRST, LAST = "input_blocks.0.0.weight", "out.2.weight"


pytestmark = pytest.mark.usefixtures("here")


def refused(words, message):
    words = words.split() if isinstance(words, str) else words
    return str(conftest.refused(message, checkpoints.main, words))


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


THEIRS = """\
norm1. in_layers.0.|conv1. in_layers.2.|norm2. out_layers.0.|conv2. out_layers.3.
.time. .emb_layers.1.|.skip. .skip_connection.|.proj. .proj_out.|out_norm. out.0.|out_conv. out.2.\
"""


def to_guided_diffusion(state):
    """Our keys back into theirs: the inverse of the import, written separately."""
    theirs = {}
    for key, value in state.items():
        for pair in THEIRS.replace("\n", "|").split("|"):
            key = key.replace(*pair.split())
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
def test_a_file_becomes_a_run(gold, here, learn_sigma):
    """guided-diffusion's numbers by load_run: the network receives t - 1, and a learned variance is
    left out. Then sample.py draws with it."""
    state, numbers = dict(gold.state), gold.numbers
    if learn_sigma:  # three more outputs, behind
        for key in ("out.2.weight", "out.2.bias"):
            state[key] = torch.cat([state[key], torch.randn_like(state[key])])
    torch.save(state, "weights.pt")
    arguments = dict(image_size=16, head_channels=32)
    checkpoints.import_run("weights.pt", "imported", **arguments)
    d, t = D.load_run("imported"), torch.tensor(numbers["timesteps"]) + 1
    assert not d.net.training and d.shape == (3, 16, 16) and d.prediction == "eps"
    assert json.load(open("runs/imported/config.json"))["imported"] is True
    x0, eps = d.predict(gold.x, t)
    check_numbers(eps, numbers)
    xt = schedules.add_noise(schedules.make_schedule("linear"), x0, t, eps)
    assert_close(xt, gold.x.double(), rtol=1e-4, atol=1e-4, check_dtype=False)
    sample.main("imported --nfe 2 -n 2 --clip on --out drawn".split())
    assert len(list((here / "drawn").glob("*.png"))) == 2
    words = "weights.pt --name imported --image-size 16 --head-channels 32"
    refused(words, "^--name imported: runs/imported exists already")


def test_the_program(gold, here, capsys):
    torch.save(to_guided_diffusion(awake(unet.UNet(**unet.PRESETS["tiny"])).state_dict()), "own.pt")
    torch.save(gold.state, "my weights.pt")
    file = ["my weights.pt"]
    for words, message in (
        ("own.pt", "^own.pt: 12 input and 12 output"),  # in patches
        ([*file, "--head-channels", "48"], "^my weights.pt: its sizes do not fit: 64 chan"),
        ([*file, "--image-size", "15"], "^my weights.pt: its sizes do not fit: image siz"),
        ([*file, "--heads", "0"], "^--heads must be at least 1"),
        ([*file, "--name", "a/b"], "^--name 'a/b' must be a plain name"),
        ("none.pt", "^none.pt: no such file or folder"),
        ("", "^FILE_OR_FOLDER is missing"),
    ):
        refused(words, message)
    assert not (here / "runs").exists()
    checkpoints.main([*file, "--schedule", "cosine"])
    out = capsys.readouterr().out
    assert "827,491 parameters, attention with heads of 64 channels; cosine schedule" in out
    assert "next: python sample.py 'my weights' --sampler ddpm --nfe 250" in out
    assert D.load_run("my weights").schedule.name == "cosine"


def zeros(**sizes):
    """A state dict of zeros by first and last layer, or other keys: "8x3" is (8, 3)."""
    names = dict(first=FIRST, last=LAST)
    shapes = {k: [int(n) for n in size.split("x") if n] for k, size in sizes.items()}
    return {names.get(k, k): torch.zeros(shape) for k, shape in shapes.items()}


LDM = "model.diffusion_model.out.0.weight"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<html>not found</html>", "a web page"),
        (b"", "the file is empty"),
        (zeros(x="2"), "not a U-Net of guided-diffusion.*layers are x"),
        ({"step": 3}, "not a state dict of a network: it holds 1 entries: step"),
        (None, r"it lacks a layer of a U-Net \(at 'time_embed.0.weight'\)"),
        (zeros(first="1", **{"label_emb.weight": "1"}), "class-conditional"),
        (zeros(first="128x3x3x3", **{"out.2.qkv_proj.weight": "9"}), "classifier"),
        (zeros(first="", last=""), "its first and last layers are not convolutions"),
        (zeros(first="8x3x3x3", last="0"), "its first and last layers are not convolutions"),
        (zeros(first="1x0x3x3", last="3x1x3x3"), "0 input and 3 output"),
        (zeros(first="1x6x3x3", last="3x1x3x3"), "6 input.*upsampler"),
        (zeros(first="1x3x3x3", last="3x1x3x3") | {5: torch.zeros(())}, "not a state dict"),
        ({1: torch.zeros(2), (2, 3): torch.zeros(2)}, "not a state dict"),
        ({}, "not a state dict of a network"),
        ([torch.zeros(2)], "not a state dict of a network: it holds a list"),
        ({"format": checkpoint.FORMATS[-1]}, "a run of train.py, which needs no conversion"),
        (zeros(**{"temb.dense.0.weight": "8x4"}), "it lacks a layer of a U-Net"),
        (zeros(**{"temb.dense.0.weight": "8", "down.x.": "1"}), "invalid literal"),
        (zeros(**{"time_embedding.linear_1.weight": "8"}), "config.json is missing: put it next"),
        (zeros(**{"unet.transformer_blocks.0.weight": "8"}), "like Stable Diffusion's"),
        (zeros(**{LDM: "8"}), "a latent diffusion model"),
        ({"state_dict": zeros(**{LDM: "8"})}, "a latent diffusion model"),
        (b"\x80\x03ctorch_utils.persistence\n_reconstruct", "a pickle of Python objects, like EDM"),
        ({"args": torch.nn.Identity()}, "SA-DPM's ckpt_N.pth, use model_N_ema.pth"),
    ],
    ids=range(24),
)
def test_other_files_are_refused_in_one_line(here, content, words):
    path = here / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        if content is None:
            state = unet.UNet(16, channels=32, head_channels=None).state_dict()
            content = {FIRST: state[FIRST], LAST: state["out_conv.weight"]}
        torch.save(content, path)
    text = refused([str(path)], words)
    assert text.startswith(str(path)) and len(text) < 400 + len(str(path))
    assert not (here / "runs").exists()


# ------------------------------------------------------------------ SA-DPM's and DDIM's Model


@pytest.fixture
def sa():
    """SA-DPM's small reference network: its numbers, its state dict and what it was shown."""
    numbers = json.loads((DATA / "unet_sa_dpm.json").read_text(encoding="utf-8"))
    state = {k: torch.tensor(v).float() for k, v in fill.state(numbers["keys"]).items()}
    x = torch.tensor(4 * fill.fill("sa-dev", (4, 3, 16, 16)) - 2).float()
    return numbers, state, x


def test_sa_dpm_weights_give_its_output(sa):
    numbers, state, x = sa
    net, kind = checkpoints.convert({f"module.{k}": v for k, v in state.items()})
    size = dict(image_size=16, channels=32, channel_mult=(1, 2), res_blocks=1)
    module = unet.UNet(**{**unet.PRESETS["cifar10"], **size, "attention_resolutions": (8,)})
    assert sum(p.numel() for p in module.parameters()) == numbers["params"]
    module.load_state_dict(net, strict=True)
    check_numbers(module.eval()(x, torch.tensor(numbers["timesteps"])), numbers)
    assert "SA-DPM" in kind


@torch.no_grad()
def generalized_steps(net, x, n, eta, noise):
    """SA-DPM's and DDIM's sampler, from its arithmetic: steps counted from 0, a cumulative product
    that begins with 1, and no clipping."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    products = torch.cat([torch.ones(1), (1 - betas).cumprod(0)])  # at i + 1: that of step i
    times = range(0, 1000, 1000 // n)
    for i, j in zip(reversed(times), reversed([-1, *times[:-1]]), strict=True):
        a, a_next = products[i + 1], products[j + 1]
        et = net(x, torch.full((len(x),), float(i)))
        x0 = (x - et * (1 - a).sqrt()) / a.sqrt()
        c1 = eta * ((1 - a / a_next) * (1 - a_next) / (1 - a)).sqrt()
        x = a_next.sqrt() * x0 + c1 * noise() + ((1 - a_next) - c1**2).sqrt() * et
    return x


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_in_ten_calls_is_generalized_steps(sa, eta):
    """--spacing leading: 901, 801, ..., 1, which they call 900, 800, ..., 0."""
    _, state, x = sa
    torch.save(state, "model_1175_ema.pth")
    checkpoints.import_run("model_1175_ema.pth", "sa", image_size=16)
    d = D.load_run("sa")
    x, noise = x[:2], torch.randn(10, 2, 3, 16, 16)
    theirs = generalized_steps(lambda x, t: d.net(x, t), x, 10, eta, iter(noise).__next__)
    ours = iter(noise)
    x0 = samplers.sample(d, x, "ddim", 10, "leading", eta=eta, noise=lambda shape: next(ours))
    assert_close(x0, theirs, rtol=1e-4, atol=1e-4 * theirs.std().item())


@pytest.mark.parametrize("kind", ["list", "list without average", "dict", "dict with average"])
def test_the_average_is_found(sa, kind):
    """DDIM saves [model, optimizer, epoch, step, average], SA-DPM {"model_dict": ..., ...}."""
    _, state, _ = sa
    weights = {f"module.{k}": v for k, v in state.items()}
    average = {k: v + 0.5 for k, v in state.items()}
    optimizer = {"state": {0: {"step": 1}}, "param_groups": []}
    content = {
        "list": [weights, optimizer, 3, 9, average],
        "list without average": [weights, optimizer, 3, 9],
        "dict": {"model_dict": weights, "optimizer": optimizer, "epoch": 3},
        "dict with average": {"ema": average, "model": weights},
    }[kind]
    torch.save(content, "ckpt.pth")
    checkpoints.import_run("ckpt.pth", "sa", image_size=16)
    change = 0.5 if kind in ("list", "dict with average") else 0.0
    for which, by in (("raw", 0.0), ("ema", change)):
        bias = D.load_run("sa", which).net.input_blocks[0][0].bias
        assert_close(bias.data, state["conv_in.bias"] + by)


# ------------------------------------------------------------------ sizes from keys


@pytest.mark.parametrize("preset", ["cifar10", "celeba64", "celebahq256"])
def test_sizes_of_sa_dpm_networks(preset):
    size = unet.PRESETS[preset]
    with torch.device("meta"):
        state = unet.UNet(**size).state_dict()
    found = checkpoints.network(state, checkpoints.DDIM, None)
    assert found | size == found and found["image_size"] == size["image_size"]


def improved(image_size, channel_mult, attention, heads, **more):
    """improved-diffusion's networks, with learned variances."""
    size = dict(image_size=image_size, channel_mult=channel_mult, attention_resolutions=attention)
    return size | dict(out_channels=6, resblock_updown=False) | more, dict(heads=heads)


@pytest.mark.parametrize(
    "size, heads",
    [
        (dict(unet.PRESETS["adm256"], out_channels=6), dict(head_channels=64)),
        improved(32, (1, 2, 2, 2), (16, 8), 4, res_blocks=3),  # CIFAR-10
        improved(64, (1, 2, 3, 4), (16, 8), 4, res_blocks=3),  # ImageNet at 64 pixels
        improved(256, (1, 1, 2, 2, 4, 4), (16,), 1, scale_shift=False),  # LSUN
    ],
)
def test_sizes_of_openai_networks(size, heads):
    with torch.device("meta"):
        state = unet.UNet(**size).state_dict()
    found = checkpoints.network(state, checkpoints.GUIDED, None)
    assert found | size | heads == found


def test_four_thousand_steps_are_rescaled(gold):
    """improved-diffusion's networks with T = 4000 receive (t - 1)/4."""
    torch.save(gold.state, "w.pt")
    checkpoints.main("w.pt --steps 4000 --schedule cosine --image-size 16".split())
    d = D.load_run("w")
    assert d.schedule.T == 4000 and d.time_input_at(torch.tensor(4000)) == 999.75
    assert d.time_input_at(1) == 0


def test_a_level_without_attention_needs_the_size():
    size = dict(channel_mult=(1, 1), attention_resolutions=(), head_channels=32)
    torch.save(to_guided_diffusion(unet.UNet(16, channels=32, **size).state_dict()), "w.pt")
    refused("w.pt", "^w.pt: its keys do not determine the image size: add")
    checkpoints.main(["w.pt", "--image-size", "16", "--heads", "2"])
    assert D.load_run("w").net.middle_block[1].heads == 2


# ------------------------------------------------------------------ diffusers


def diffusers_folder(folder, name, scheduler=hf.SCHEDULER, nested=False):
    """A folder as save_pretrained writes it, with .bin instead of .safetensors."""
    unet_folder = folder / "unet" if nested else folder
    unet_folder.mkdir(parents=True)
    numbers = json.loads(hf.PATH.read_text(encoding="utf-8"))[name]
    torch.save(hf.weights(numbers["keys"]), unet_folder / "diffusion_pytorch_model.bin")
    (unet_folder / "config.json").write_text(json.dumps(hf.CONFIGS[name]), encoding="utf-8")
    place = folder / ("scheduler/scheduler_config.json" if nested else "scheduler_config.json")
    place.parent.mkdir(exist_ok=True)
    place.write_text(json.dumps(scheduler), encoding="utf-8")
    return numbers


def check_summary(x, numbers, scale=1.0):
    found = hf.summary(x)
    for key in ("first", "last", "mean", "std"):
        wanted = torch.tensor(numbers[key])
        assert_close(torch.tensor(found[key]), wanted, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("name, nested", [("google", False), ("other", True)])
def test_diffusers_networks_and_samplers(here, capsys, name, nested):
    """Output, DDIM, and DDPM with both variances, in 10 calls, against diffusers' own numbers."""
    numbers = diffusers_folder(here / "hf", name, nested=nested)
    checkpoints.main(["hf"])
    out = capsys.readouterr().out
    assert "a UNet2DModel of diffusers" in out and "--nfe 250 --variance large" in out
    d, config = D.load_run("hf"), hf.CONFIGS[name]
    assert sum(p.numel() for p in d.net.parameters()) == numbers["params"]
    assert d.shape == (config["in_channels"], config["sample_size"], config["sample_size"])
    eps = d.predict(hf.images("diffusers", config), torch.tensor(hf.TIMESTEPS) + 1)[1]
    check_summary(eps, numbers["output"])
    x = hf.images("diffusers", config, 2)
    x0 = samplers.sample(d, x, "ddim", 10, "leading")
    check_summary(x0, numbers["ddim"], numbers["ddim"]["std"])
    for variance in ("small", "large"):
        how = dict(clip=(-1, 1), variance=variance, noise=hf.noises(config))
        x0 = samplers.sample(d, x, "ddpm", 10, "leading", **how)
        check_summary(x0, numbers[f"fixed_{variance}"])


def test_old_names_of_attention_in_diffusers():
    keys = json.loads(hf.PATH.read_text(encoding="utf-8"))["google"]["keys"]
    new, old = hf.weights(keys), {}
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for key, tensor in new.items():
        for now, before in names.items():
            key = key.replace(f".{now}.", f".{before}.")
        old[key] = tensor
    assert not set(old) >= set(new)
    (new, _), (old, _) = checkpoints.convert(new), checkpoints.convert(old)
    assert new.keys() == old.keys() and all(torch.equal(new[k], old[k]) for k in new)


@pytest.mark.slow
@pytest.mark.parametrize("name", hf.CONFIGS)
def test_the_installed_diffusers_gives_these_numbers(name):
    pytest.importorskip("diffusers")
    numbers = json.loads(hf.PATH.read_text(encoding="utf-8"))[name]
    found = hf.compute(name)
    assert found["keys"] == numbers["keys"]
    for key in ("output", "ddim", "fixed_small", "fixed_large"):
        for part, value in numbers[key].items():
            assert_close(torch.tensor(found[key][part]), torch.tensor(value), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "words, config, scheduler",
    [
        ("has _class_name 'UNet2DX'", dict(_class_name="UNet2DX"), {}),
        ("has attn_norm_num_groups None", dict(resnet_time_scale_shift="scale_shift"), {}),
        ("config.json has num_class_embeds 10", dict(num_class_embeds=10), {}),
        ("has time_embedding_type 'fourier'", dict(time_embedding_type="fourier"), {}),
        ("only square images", dict(sample_size=[32, 64]), {}),
        ("its sizes do not fit: .* do not divide into 5 groups", dict(norm_num_groups=5), {}),
        ("its scheduler has beta_end 0.012", {}, dict(beta_end=0.012)),
        ("its scheduler has scaled_linear betas", {}, dict(beta_schedule="scaled_linear")),
        ("and predicts flow", {}, dict(prediction_type="flow")),
    ],
)
def test_other_diffusers_are_refused(here, monkeypatch, words, config, scheduler):
    monkeypatch.setitem(hf.CONFIGS, "google", hf.GOOGLE | config)
    diffusers_folder(here / "hf", "google", hf.SCHEDULER | scheduler)
    refused("hf", f"^hf: .*{words}")
    assert not (here / "runs").exists()


@pytest.mark.parametrize("words", ["--schedule cosine", "--steps 500", "--heads 2"])
def test_what_diffusers_records_is_not_replaced(here, words):
    diffusers_folder(here / "hf", "google")
    refused(f"hf {words}", rf"^(hf: .*leave out )?{words.split()[0]}\b")
    assert not (here / "runs").exists()


def test_damaged_or_missing_parts_of_diffusers(here, monkeypatch):
    (here / "empty").mkdir()
    refused("empty", "^empty: neither this folder nor its unet/ has a diff")
    diffusers_folder(here / "hf", "other")
    (here / "hf/config.json").write_text("{", encoding="utf-8")
    refused("hf", "^hf: config.json next to it is not valid")
    (here / "w.safetensors").write_bytes(b"x" * 9)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused("w.safetensors", "^w.safetensors: safetensors is not installed.*pip install")


def test_safetensors(here):
    safetensors = pytest.importorskip("safetensors.torch")
    numbers = diffusers_folder(here / "hf", "other")
    (here / "hf/diffusion_pytorch_model.bin").unlink()
    path = here / "hf/diffusion_pytorch_model.safetensors"
    safetensors.save_file(hf.weights(numbers["keys"]), path)
    checkpoints.main(["hf"])
    checkpoints.main([str(path), "--name", "file"])
    x = hf.images("diffusers", hf.OTHER)
    for run in ("hf", "file"):
        eps = D.load_run(run).predict(x, torch.tensor(hf.TIMESTEPS) + 1)[1]
        check_summary(eps, numbers["output"])
    path.write_bytes(path.read_bytes()[:1000])
    refused("hf --name cut", "it is damaged, or not in the safetensors format")


# ------------------------------------------------------------------ the way back

WAYS = {
    "adm": (SMALL, {}),
    "plain": (SMALL | dict(resblock_updown=False, scale_shift=False, head_channels=None), {}),
    "sa": ({**unet.PRESETS["cifar10"], **SMALL, "head_channels": None, "dropout": 0.0}, {}),
    "v": (SMALL, dict(prediction="v", schedule="cosine")),
    "x0": (SMALL | dict(time_channels=64), dict(prediction="x0", schedule="quadratic")),
    "imported": (SMALL, dict(imported=True)),
    "learned": (SMALL | dict(out_channels=6), dict(imported=True)),
    "etsdm": (SMALL, dict(etsdm=True)),
    "etsdm-imported": (SMALL, dict(etsdm=True, etsdm_interval=90.0, etsdm_n=4, imported=True)),
    "tiny": ({**unet.PRESETS["tiny"], "channels": 16, "image_size": 16}, dict(prediction="v")),
}


def make_run(name, size, settings):
    """A run folder without training."""
    net = awake(unet.UNet(**size))
    size = dict(in_channels=3, out_channels=3) | size
    config = Config(name=name, image_size=size["image_size"], dropout=0.0)
    settings = {**config.settings(), "unet": size, **settings}
    folder = checkpoint.RUNS / name
    folder.mkdir(parents=True)
    saved = dict(settings=settings, net=net.state_dict(), ema=net.state_dict())
    saved |= dict(optimizer={}, step=0, skipped=0, processes=1)
    checkpoint.save_checkpoint(folder / "checkpoint.pt", saved)


@pytest.mark.parametrize("name", [name for name in WAYS if name not in ("tiny", "learned")])
def test_to_diffusers_and_back_is_the_same_network(name):
    size = dict(in_channels=3, out_channels=3) | WAYS[name][0]
    net = awake(unet.UNet(**size))
    theirs = exports.to_diffusers(net.state_dict(), size, imported=True)
    again, kind = checkpoints.convert(theirs, size["head_channels"])
    assert kind == checkpoints.DIFFUSERS and again.keys() == net.state_dict().keys()
    assert all(torch.equal(again[k], v) for k, v in net.state_dict().items())
    known = checkpoints.diffusers_network(exports.unet_config(size, dict(channels=3)))
    found = checkpoints.network(again, kind, size["image_size"]) | known
    assert found | {k: v for k, v in size.items() if k != "zero_init"} == found


@pytest.mark.parametrize("sin_first, freq_shift", [(False, 0), (True, 1)])
def test_the_count_moves_into_the_first_layer(sin_first, freq_shift):
    weight, t = torch.randn(8, 32), torch.tensor([1.0, 30.0, 1000.0])
    size = dict(sin_first=sin_first, freq_shift=freq_shift)
    shifted = exports.shift_count(weight, size)
    one, two = (unet.timestep_embedding(c, 32, **size) for c in (t, t - 1))
    assert_close(two @ shifted.double().T, one @ weight.double().T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "message, size, settings",
    [
        ("a run with edm has no counterpart", {}, dict(schedule="edm", prediction="edm")),
        ("a run with head has no counterpart", {}, dict(head="npr")),
        ("no UNet2DModel has these widths", dict(channel_mult=(2, 2)), {}),
        ("no UNet2DModel has these widths and heads", dict(head_channels=None, heads=2), {}),
    ],
)
def test_runs_without_a_counterpart(here, monkeypatch, message, size, settings):
    refused("run --to tensorflow out", "^--to tensorflow: only diffusers FOLDER can be written")
    refused("run --to diffusers out --name x", "^--name has no effect with --to")
    for module in (None, type("module", (), dict(save_file=None))):
        for name in ("safetensors", "safetensors.torch"):
            monkeypatch.setitem(sys.modules, name, module)
        if module is None:
            refused("run --to diffusers out", "^--to diffusers needs safetensors: pip install")
    make_run("run", SMALL | size, settings)
    refused("run --to diffusers out", f"^run: {message}")
    assert not (here / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_diffusers_draws_the_same_picture(here, name):
    diffusers = pytest.importorskip("diffusers")
    make_run(name, *WAYS[name])
    checkpoints.main([name, "--to", "diffusers", "out"])
    kind = diffusers.UNet2DModel
    if (here / "out/shared_unet.py").exists():
        assert name in ("etsdm", "etsdm-imported", "tiny")
        names = {}
        exec((here / "out/shared_unet.py").read_text(encoding="utf-8"), names)
        kind = names["SharedUNet"]
    net = kind.from_pretrained("out/unet").eval()
    scheduler = diffusers.DDIMScheduler.from_pretrained("out/scheduler")
    d = D.load_run(name)
    x = torch.randn(2, *d.shape, generator=torch.Generator().manual_seed(0))
    ours = samplers.sample(d, x, "ddim", 10, "leading")
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = net(x, t).sample
            assert_close(output, d.prediction_at(x, t.item() + 1), rtol=1e-4, atol=1e-4)
            x = scheduler.step(output, t, x).prev_sample
    assert_close(x, ours, rtol=1e-4, atol=2e-4 * ours.std().item())
    if kind is diffusers.UNet2DModel:
        pipe = diffusers.DDIMPipeline.from_pretrained("out")
        assert pipe.unet.config.sample_size == d.shape[-1]
    refused([name, "--to", "diffusers", "out"], "^--to diffusers out: it exists already")


def test_other_betas_are_written_out():
    """diffusers has no quadratic schedule, and other ends than DDPM's are not assumed."""
    ends = (0.0015, 0.0195)
    for name, given in (("linear", ends), ("quadratic", None), ("quadratic", ends)):
        schedule = schedules.make_schedule(name, betas=given or (1e-4, 0.02))
        written = exports.schedule_betas(schedule, given)
        assert list(written) == ["trained_betas"] and len(written["trained_betas"]) == 1000
        first, last = written["trained_betas"][0], written["trained_betas"][-1]
        assert (first, last) == pytest.approx(given or (1e-4, 0.02), rel=1e-9)
    assert exports.schedule_betas(schedules.make_schedule("linear"))["beta_end"] == 0.02
