"""papers/checkpoints.py: reference numbers of the programs it reads, and files that are refused."""

import json

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
    state, numbers = dict(gold.state), gold.numbers
    if learn_sigma:  # three more outputs, behind
        for key in ("out.2.weight", "out.2.bias"):
            state[key] = torch.cat([state[key], torch.randn_like(state[key])])
    torch.save(state, "weights.pt")
    arguments = dict(image_size=16, head_channels=32)
    checkpoints.import_run("weights.pt", "imported", **arguments)
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
        checkpoints.import_run("weights.pt", "imported", **arguments)


def test_the_program(gold, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(to_guided_diffusion(awake(unet.UNet(**unet.PRESETS["tiny"])).state_dict()), "own.pt")
    with pytest.raises(ValueError, match="^own.pt: 12 channels in and 12 out"):  # in patches
        checkpoints.main(["own.pt"])
    torch.save(gold.state, "my weights.pt")
    for words, message in (
        (
            ["my weights.pt", "--head-channels", "48"],
            "^my weights.pt: its sizes do not fit: 64 chan",
        ),
        (
            ["my weights.pt", "--image-size", "15"],
            "^my weights.pt: its sizes do not fit: image siz",
        ),
        (["my weights.pt", "--heads", "0"], "^--heads must be at least 1"),
        (["my weights.pt", "--name", "a/b"], "^--name 'a/b' must be a plain name"),
        (["none.pt"], "^FILE none.pt: there is no such file"),
        ([], "^FILE_OR_FOLDER is missing"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            checkpoints.main(words)
    assert not (tmp_path / "runs").exists()
    checkpoints.main(["my weights.pt", "--schedule", "cosine"])
    out = capsys.readouterr().out
    assert "827,491 parameters, attention with heads of 64 channels; cosine schedule" in out
    assert "next: python sample.py 'my weights' --sampler ddpm --nfe 250" in out
    assert D.load_run("my weights").schedule.name == "cosine"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<html>not found</html>", "a web page"),
        (b"", "the file is empty"),
        ({"x": torch.zeros(2)}, "not a guided-diffusion U-Net.*but x"),
        ({"step": 3}, "not a state dict of a network: it holds 1 entries: step"),
        (None, r"it does not have all layers of a U-Net \(at 'time_embed.0.weight'\)"),
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
        ({"temb.dense.0.weight": torch.zeros(8, 4)}, "not have all layers of a U-Net"),
        ({"temb.dense.0.weight": torch.zeros(8), "down.x.": torch.zeros(1)}, "invalid literal"),
        ({"time_embedding.linear_1.weight": torch.zeros(8)}, "config.json must lie next to it"),
        ({"unet.transformer_blocks.0.weight": torch.zeros(8)}, "like Stable Diffusion's"),
        ({"model.diffusion_model.out.0.weight": torch.zeros(8)}, "a latent diffusion model"),
        ({"state_dict": {"model.diffusion_model.0": torch.zeros(8)}}, "a latent diffusion model"),
        (b"\x80\x03ctorch_utils.persistence\n_reconstruct", "a pickle of Python objects, as EDM's"),
        ({"args": torch.nn.Identity()}, "SA-DPM's ckpt_N.pth does: give its model_N_ema.pth"),
    ],
    ids=range(24),
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
        checkpoints.main([str(path)])
    text = str(caught.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 400 + len(str(path))
    assert not (tmp_path / "runs").exists()


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
def test_ddim_in_ten_calls_is_generalized_steps(sa, tmp_path, monkeypatch, eta):
    """--spacing leading: 901, 801, ..., 1, which they call 900, 800, ..., 0."""
    monkeypatch.chdir(tmp_path)
    _, state, x = sa
    torch.save(state, "model_1175_ema.pth")
    checkpoints.import_run("model_1175_ema.pth", "sa", image_size=16)
    d = D.load_run("sa")
    x, noise = x[:2], torch.randn(10, 2, 3, 16, 16)
    theirs = generalized_steps(lambda x, t: d.net(x, t), x, 10, eta, iter(noise).__next__)
    ours = iter(noise)
    x0 = samplers.sample(d, x, "ddim", 10, "leading", eta=eta, noise=lambda shape: next(ours))
    assert_close(x0, theirs, rtol=1e-4, atol=1e-4 * theirs.std().item())


def shifted(state, by):
    return {k: v + by for k, v in state.items()}


@pytest.mark.parametrize("kind", ["list", "list without average", "dict", "dict with average"])
def test_the_average_is_found(sa, tmp_path, monkeypatch, kind):
    """DDIM saves [model, optimizer, epoch, step, average], SA-DPM {"model_dict": ..., ...}."""
    monkeypatch.chdir(tmp_path)
    _, state, _ = sa
    weights = {f"module.{k}": v for k, v in state.items()}
    optimizer = {"state": {0: {"step": 1}}, "param_groups": []}
    average = shifted(state, 0.5)
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


@pytest.mark.parametrize(
    "size, heads",
    [
        (dict(unet.PRESETS["adm256"], out_channels=6), dict(head_channels=64)),
        # improved-diffusion's: CIFAR-10, ImageNet at 64 pixels, LSUN
        (
            dict(image_size=32, channel_mult=(1, 2, 2, 2), res_blocks=3, out_channels=6,
                 attention_resolutions=(16, 8), resblock_updown=False),
            dict(heads=4),
        ),
        (
            dict(image_size=64, channel_mult=(1, 2, 3, 4), res_blocks=3, out_channels=6,
                 attention_resolutions=(16, 8), resblock_updown=False),
            dict(heads=4),
        ),
        (
            dict(image_size=256, channel_mult=(1, 1, 2, 2, 4, 4), out_channels=6,
                 attention_resolutions=(16,), resblock_updown=False, scale_shift=False),
            dict(heads=1),
        ),
    ],
)  # fmt: skip
def test_sizes_of_openai_networks(size, heads):
    with torch.device("meta"):
        state = unet.UNet(**size).state_dict()
    found = checkpoints.network(state, checkpoints.GUIDED, None)
    assert found | size | heads == found


def test_four_thousand_steps_are_rescaled(gold, tmp_path, monkeypatch):
    """improved-diffusion's networks with T = 4000 receive (t - 1)/4."""
    monkeypatch.chdir(tmp_path)
    torch.save(gold.state, "w.pt")
    checkpoints.main("w.pt --steps 4000 --schedule cosine --image-size 16".split())
    d = D.load_run("w")
    assert d.schedule.T == 4000 and d.time_input_at(torch.tensor(4000)) == 999.75
    assert d.time_input_at(1) == 0


def test_a_level_without_attention_needs_the_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = unet.UNet(
        16, channels=32, channel_mult=(1, 1), attention_resolutions=(), head_channels=32
    )
    torch.save(to_guided_diffusion(net.state_dict()), "w.pt")
    with pytest.raises(ValueError, match="^w.pt: its keys do not give the image size: add --imag"):
        checkpoints.main(["w.pt"])
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
def test_diffusers_networks_and_samplers(tmp_path, monkeypatch, capsys, name, nested):
    """Output, DDIM, and DDPM with both variances, in 10 calls, against diffusers' own numbers."""
    monkeypatch.chdir(tmp_path)
    numbers = diffusers_folder(tmp_path / "hf", name, nested=nested)
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
    for kind, variance in (("fixed_small", "small"), ("fixed_large", "large")):
        x0 = samplers.sample(
            d, x, "ddpm", 10, "leading", clip=(-1, 1), variance=variance, noise=hf.noises(config)
        )
        check_summary(x0, numbers[kind])


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
    "config, scheduler, words",
    [
        (dict(_class_name="UNet2DConditionModel"), {}, "has _class_name 'UNet2DConditionModel'"),
        (
            dict(resnet_time_scale_shift="scale_shift"),
            {},
            "config.json has attn_norm_num_groups None",
        ),
        (dict(num_class_embeds=10), {}, "config.json has num_class_embeds 10"),
        (dict(time_embedding_type="fourier"), {}, "config.json has time_embedding_type 'fourier'"),
        (dict(sample_size=[32, 64]), {}, "only squares"),
        (dict(norm_num_groups=5), {}, "its sizes do not fit: .* do not divide into 5 groups"),
        ({}, dict(beta_end=0.012), "its scheduler has beta_end 0.012"),
        ({}, dict(beta_schedule="scaled_linear"), "its scheduler has scaled_linear betas"),
        ({}, dict(prediction_type="flow"), "and predicts flow"),
    ],
)
def test_other_diffusers_are_refused(tmp_path, monkeypatch, config, scheduler, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(hf.CONFIGS, "google", hf.GOOGLE | config)
    diffusers_folder(tmp_path / "hf", "google", hf.SCHEDULER | scheduler)
    with pytest.raises(ValueError, match=f"^hf: .*{words}"):
        checkpoints.main(["hf"])
    assert not (tmp_path / "runs").exists()


def test_damaged_or_missing_parts_of_diffusers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="^empty: no diffusion_pytorch_model.safetensors or .bin"):
        checkpoints.main(["empty"])
    diffusers_folder(tmp_path / "hf", "other")
    (tmp_path / "hf/config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="^hf: config.json next to it is damaged"):
        checkpoints.main(["hf"])
    (tmp_path / "w.safetensors").write_bytes(b"x" * 9)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ValueError, match="^w.safetensors: safetensors is needed .* pip install"):
        checkpoints.main(["w.safetensors"])


def test_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    monkeypatch.chdir(tmp_path)
    numbers = diffusers_folder(tmp_path / "hf", "other")
    (tmp_path / "hf/diffusion_pytorch_model.bin").unlink()
    path = tmp_path / "hf/diffusion_pytorch_model.safetensors"
    safetensors.save_file(hf.weights(numbers["keys"]), path)
    checkpoints.main(["hf"])
    checkpoints.main([str(path), "--name", "file"])
    for run in ("hf", "file"):
        x = hf.images("diffusers", hf.OTHER)
        eps = D.load_run(run).predict(x, torch.tensor(hf.TIMESTEPS) + 1)[1]
        check_summary(eps, numbers["output"])
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="it is damaged, or not in the safetensors format"):
        checkpoints.main(["hf", "--name", "cut"])


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
    state = net.state_dict()
    more = dict(optimizer={}, step=0, skipped=0, processes=1)
    checkpoint.save_checkpoint(
        folder / "checkpoint.pt", dict(settings=settings, net=state, ema=state, **more)
    )
    return net


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


@pytest.mark.parametrize("words, message", [
    ("run --to tensorflow out", "^--to tensorflow: only diffusers FOLDER can be written"),
    ("run --to diffusers out --name x", "^--name has no effect with --to"),
])  # fmt: skip
def test_flags_of_the_way_back(words, message):
    with pytest.raises(ValueError, match=message):
        checkpoints.main(words.split())


@pytest.mark.parametrize("size, settings, message", [
    ({}, dict(schedule="edm", prediction="edm"), "a run with edm has no counterpart"),
    ({}, dict(head="npr"), "a run with head has no counterpart"),
    (dict(channel_mult=(2, 2)), {}, "no UNet2DModel has these widths"),
    (dict(head_channels=None, heads=2), {}, "no UNet2DModel has these widths and heads"),
])  # fmt: skip
def test_runs_without_a_counterpart(tmp_path, monkeypatch, size, settings, message):
    monkeypatch.chdir(tmp_path)
    modules = __import__("sys").modules
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(modules, name, None)
    with pytest.raises(ValueError, match="^--to diffusers needs safetensors: pip install"):
        checkpoints.main("run --to diffusers out".split())
    fake = type("module", (), dict(save_file=None))
    monkeypatch.setitem(modules, "safetensors", fake)
    monkeypatch.setitem(modules, "safetensors.torch", fake)
    make_run("run", SMALL | size, settings)
    with pytest.raises(ValueError, match=f"^run: {message}"):
        checkpoints.main("run --to diffusers out".split())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_diffusers_draws_the_same_picture(tmp_path, monkeypatch, name):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    make_run(name, *WAYS[name])
    checkpoints.main([name, "--to", "diffusers", "out"])
    kind = diffusers.UNet2DModel
    if (tmp_path / "out/shared_unet.py").exists():
        assert name in ("etsdm", "etsdm-imported", "tiny")
        names = {}
        exec((tmp_path / "out/shared_unet.py").read_text(encoding="utf-8"), names)
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
            wanted = d.prediction_at(x, t.item() + 1)
            assert_close(output, wanted, rtol=1e-4, atol=1e-4)
            x = scheduler.step(output, t, x).prev_sample
    assert_close(x, ours, rtol=1e-4, atol=2e-4 * ours.std().item())
    if kind is diffusers.UNet2DModel:
        pipe = diffusers.DDIMPipeline.from_pretrained("out")
        assert pipe.unet.config.sample_size == d.shape[-1]
    with pytest.raises(FileExistsError, match="^--to diffusers out: it exists already"):
        checkpoints.main([name, "--to", "diffusers", "out"])


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
