"""papers/heads.py: the loss of second heads, and their training on the network of a run."""

import csv
import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import denoiser as D
import sample
import schedules
import toy
import unet
from conftest import SMALL
from papers import heads, superres
from support import checkpoint
from support.cli import parse_into
from support.run import RunFolder
from test_losses import LINEAR, SIZE, Small, small_net


def load(name):
    return checkpoint.load_checkpoint(f"runs/{name}/checkpoint.pt")


def exact_moments(mixture, x, a, s):
    """E[eps | x_t] and Var[eps | x_t] of a one-dimensional mixture, by quadrature over x_0."""
    grid = torch.linspace(-3, 3, 20_001, dtype=torch.float64)
    prior = sum(
        w / v * torch.exp(-((grid - m) ** 2) / (2 * v**2))
        for w, m, v in zip(
            mixture.weights, mixture.means.flatten(), mixture.stds.flatten(), strict=True
        )
    )
    weight = prior * torch.exp(-((x - a * grid) ** 2) / (2 * s**2))  # (B, 20001)
    weight = weight / weight.sum(1, keepdim=True)
    eps = (x - a * grid) / s
    mean = (weight * eps).sum(1, keepdim=True)
    return mean, (weight * (eps - mean) ** 2).sum(1, keepdim=True)


class TwoHeads(torch.nn.Module):
    """The exact network of the mixture as a frozen trunk, and an MLP as its second head."""

    def __init__(self, mixture):
        super().__init__()
        self.trunk, self.head = toy.oracle(mixture, LINEAR), Small()

    def forward(self, x, c):
        return torch.cat([self.trunk(x, c), self.head(x, c)], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npr", "sn"])
def test_a_head_learns_the_exact_variance(kind):
    """NPR's h, and SN's h - eps^2, approach Var[eps | x_t], which the mixture has exactly; SN's
    less closely, since it is a difference of two larger numbers."""
    torch.manual_seed(0)
    mixture = toy.two_bumps()
    net = TwoHeads(mixture)
    d = D.Denoiser(net, LINEAR)
    optimizer = torch.optim.Adam(net.head.parameters(), 3e-2)
    g = torch.Generator().manual_seed(1)
    steps = {"npr": 400, "sn": 1600}[kind]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / steps)
        x0, t = mixture.sample(1024, g).float(), torch.tensor([100, 300]).repeat(512)
        loss = heads.head_loss(d, x0, t, torch.randn(1024, 1, generator=g), kind).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for t in (100, 300):
        a, s = LINEAR.alpha_sigma(t)
        x = schedules.add_noise(
            LINEAR, mixture.sample(400, g).float(), t, torch.randn(400, 1, generator=g)
        )
        eps, exact = exact_moments(mixture, x.double(), a, s)
        h = d.network_output(x, t)[:, 1:].double().detach()
        learned = h if kind == "npr" else h - eps**2
        error = (learned - exact).abs().mean() / exact.mean()
        assert error < {"npr": 0.1, "sn": 0.25}[kind], f"t = {t}: {error:.3f}"
        if kind == "sn":
            assert_close(h.mean(), (exact + eps**2).mean(), rtol=0.05, atol=0)
        elif t == 100:  # far nearer than the best single number, Analytic-DPM's
            assert error < 0.2 * (exact.mean() - exact).abs().mean() / exact.mean()


def test_a_head_leaves_the_trunk_alone():
    net = small_net()
    net_and_head = unet.UNet(**{**SIZE, "second_head": "block"})
    missing, unknown = net_and_head.load_state_dict(net.state_dict(), strict=False)
    assert not unknown and all(k.startswith("second_head") for k in missing)
    d = D.Denoiser(net_and_head, LINEAR)
    x0, noise = torch.randn(2, 2, 3, 8, 8)
    heads.head_loss(d, x0, torch.tensor([5, 900]), noise, "npr").sum().backward()
    # the target is a number: no gradient comes to what the prediction alone is made of
    grads = {
        n: p.grad.abs().max() for n, p in net_and_head.named_parameters() if p.grad is not None
    }
    assert grads["out_conv.weight"] == grads["out_norm.weight"] == 0
    assert max(g for n, g in grads.items() if n.startswith("second_head")) > 0
    x, c = torch.randn(2, 3, 8, 8), torch.tensor([5.0, 900.0])
    assert_close(net_and_head(x, c)[:, :3], net(x, c), rtol=0, atol=0)
    assert_close(net_and_head(x, c)[:, 3:], torch.zeros(2, 3, 8, 8), rtol=0, atol=0)  # starts at 0


# ------------------------------------------------------------------ the program


@pytest.fixture
def no_grids(monkeypatch):
    """Without previews: seconds each."""
    monkeypatch.setattr(RunFolder, "save_preview", lambda *inputs: None)


@pytest.mark.parametrize(
    "kind, size", [("npr", "simple"), pytest.param("sn", "block", marks=pytest.mark.slow)]
)
def test_a_head_is_trained_and_its_trunk_is_not(runs, no_grids, kind, size):
    flags = [kind, "base", *SMALL, "--head-size", size]
    heads.main([*flags, "--steps", "11", "--name", "head"])
    base, head = load("base"), load("head")
    for weights in ("net", "ema"):
        new = {k: v for k, v in head[weights].items() if k.startswith("second_head")}
        assert new and any(v.any() for k, v in new.items() if k.endswith("weight"))
        trunk = {k: v for k, v in head[weights].items() if k not in new}
        assert_close(trunk, base["ema"], rtol=0, atol=0)  # the bits that were sampled from
    assert len(head["optimizer"]["state"]) == len(new)  # nothing else is updated
    with open("runs/head/log.csv", newline="") as f:
        last = list(csv.DictReader(f))[-1]
    assert last[kind] and float(last["loss"]) > 0
    # everything else is the base's, and the trunk runs as in sampling, without dropout
    s = head["settings"]
    assert s["schedule"] == "linear" and s["etsdm"] is True and s["unet"]["dropout"] == 0
    assert s["head"] == kind and s["trunk"] == "base" and s["data"] == "shapes"
    # in two parts: the same, bit for bit; the second without the trunk's folder
    heads.main([*flags, "--steps", "4", "--name", "parts"])
    shutil.rmtree("runs/base")
    heads.main([*flags, "--steps", "11", "--name", "parts"])
    for key in ("net", "ema", "optimizer"):
        assert_close(load("parts")[key], head[key], rtol=0, atol=0)


def test_a_head_serves_sampling_in_the_same_calls(runs, no_grids, monkeypatch):
    heads.main(["npr", "base", *SMALL, "--name", "head"])
    calls, forward = [], unet.UNet.forward
    monkeypatch.setattr(unet.UNet, "forward", lambda *a: calls.append(1) or forward(*a))
    for sampler in ("ddpm", "ddim"):
        calls.clear()
        flags = ["--variance", "npr", "--sampler", sampler, "-n", "2", "--nfe", "7"]
        sample.main(["head", *flags, "--out", sampler])
        assert len(calls) == 7
    with pytest.raises(ValueError, match="^--variance sn: .* -m papers.heads sn base"):
        sample.main(["head", "--variance", "sn"])
    Path("runs/base").rename("runs/my base")
    with pytest.raises(ValueError, match="^--variance npr: .* -m papers.heads npr '.*my base'"):
        sample.main(["my base", "--variance", "npr"])
    for name in ("head", "my base"):  # without the variance, it is the base
        sample.main([name, "-n", "1", "--nfe", "2", "--out", f"of {name}"])
    assert Path("of head/000000.png").read_bytes() == Path("of my base/000000.png").read_bytes()


@pytest.mark.parametrize("trunk", ["latent", "remap", "sr"])
def test_a_head_on_every_kind_of_run(runs, trunk):
    """Trained, with its preview, and used."""
    heads.main(["npr", trunk, *SMALL])
    name = f"{trunk}-npr"
    assert Path(f"runs/{name}/samples/0000002.png").exists()
    d = D.load_run(name)
    base = D.load_run(trunk)
    assert type(d.space) is type(base.space) and d.shape == base.shape
    assert d.time_input(300.0) == base.time_input(300.0)
    flags = "-n 2 --nfe 2 --sampler ddpm --variance npr --out out".split()
    if trunk == "sr":
        superres.main(["enlarge", name, "shapes", *flags])
    else:
        sample.main([name, *flags, *["--spacing", "remap"] * (trunk == "remap")])
    assert len(list(Path("out").glob("*.png"))) == 2


@pytest.mark.parametrize(
    "words, message",
    [
        ("npr", "KIND and RUN are both needed"),
        ("sn nowhere", "no run nowhere"),
        ("sn code", "code is an autoencoder: a head needs a denoiser"),
        ("sn base --batch-size 0", "--batch-size must be above 0"),
    ],
)
def test_what_is_refused(runs, words, message):
    with pytest.raises((ValueError, OSError), match=f"^{message}") as caught:
        heads.main(words.split())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", ["--sa-k 2", "--etsdm", "--image-size 8", "--schedule linear"])
def test_flags_of_the_trunk_are_no_flags_here(runs, words):
    with pytest.raises(SystemExit):
        heads.main(["sn", "base", *words.split()])


def test_a_run_without_settings_of_a_network_is_refused_in_one_line(runs):
    saved = load("base")
    saved["settings"] = {"name": "old"}
    Path("runs/old").mkdir()
    checkpoint.save_checkpoint("runs/old/checkpoint.pt", saved)
    with pytest.raises(ValueError, match="^old: its settings describe no network"):
        heads.main(["npr", "old"])


def test_a_head_on_a_head_is_refused(runs, no_grids):
    heads.main(["npr", "base", *SMALL])
    with pytest.raises(ValueError, match="^base-npr has a second head already: .* base$"):
        heads.main(["sn", "base-npr"])


def test_the_trunk_is_that_of_the_folder_that_was_named(runs, no_grids):
    """Of two runs of one name, elsewhere/base and runs/base, the given one."""
    shutil.copytree("runs/base", "elsewhere/base")
    other = load("base")
    other["ema"] = {k: v + 1 for k, v in other["ema"].items()}
    checkpoint.save_checkpoint("elsewhere/base/checkpoint.pt", other)
    heads.main(["npr", "elsewhere/base", *SMALL])
    kept = load("base-npr")
    ours = {k: kept["ema"][k] for k in other["ema"]}
    assert_close(ours, other["ema"], rtol=0, atol=0)


def test_where_the_trunk_lies_makes_no_other_run(runs, no_grids, capsys):
    """Its weights are in the checkpoint: the same ones in another place are silent, and others
    change nothing."""
    shutil.copytree("runs/base", "elsewhere/base")
    places = ["base", "./runs/base/checkpoint.pt", "elsewhere/base/"]
    for step, place in enumerate(places, 1):
        heads.main(["npr", place, *SMALL, "--steps", str(step)])
        assert load("base-npr")["step"] == step
    assert "other weights" not in capsys.readouterr().out
    other, before = load("base"), load("base-npr")["net"]
    other["ema"] = {k: v + 1 for k, v in other["ema"].items()}
    checkpoint.save_checkpoint("elsewhere/base/checkpoint.pt", other)
    heads.main(["npr", "elsewhere/base", *SMALL, "--steps", "4"])
    text = "elsewhere/base has other weights than this run began with"
    assert text in capsys.readouterr().out
    now = load("base-npr")["net"]
    for k in other["ema"]:
        assert_close(now[k], before[k], rtol=0, atol=0)


def test_the_previews_show_the_head(runs):
    """They change as it learns, though the trunk does not."""
    flags = "--lr 0.05 --sample-every 4 --steps 8 --name head".split()
    heads.main(["npr", "base", *SMALL, *flags])
    grids = [Path(f"runs/head/samples/{i:07d}.png").read_bytes() for i in (4, 8)]
    assert grids[0] != grids[1]


def test_a_head_sees_all_noise_levels_alike(runs, no_grids):
    import train

    train.main(["--image-size", "8", "--schedule", "edm", *SMALL, "--name", "edm"])
    config = parse_into(heads.HeadConfig, ["sn", "edm"])
    assert load("edm")["settings"]["train_times"] == "lognormal"
    assert config.train_times == "uniform"
    assert config.name == "edm-sn" and config.prediction == "edm"
    command = parse_into(heads.HeadConfig, ["sn", "edm", "--name", "my run"]).next_command()
    assert command == "python sample.py 'my run' --sampler ddpm --variance sn"
