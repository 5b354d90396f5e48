"""papers/heads.py: the loss of second heads, and their training on the network of a run. (Resuming
one: test_systems.py.)"""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, TINY, refused, saved
from programs import parse
from test_covariance import exact_var
from test_losses import LINEAR, SIZE, Small, small_net
from torch.testing import assert_close

import denoiser as D
import sample
import schedules
import toy
import train
import unet
from papers import heads, superres
from support import checkpoint


def write(name, found):
    checkpoint.save_checkpoint(f"{name}/checkpoint.pt", found)


def plus_one(weights):
    return {k: v + 1 for k, v in weights.items()}


class TwoHeads(torch.nn.Module):
    """The exact network of the mixture as a frozen trunk, and an MLP as its second head."""

    def __init__(self, mixture):
        super().__init__()
        self.trunk, self.head = toy.oracle(mixture, LINEAR), Small()

    def forward(self, x, c):
        return torch.cat([self.trunk(x, c), self.head(x, c)], dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind, steps, most", [("npr", 400, 0.1), ("sn", 1600, 0.25)])
def test_a_head_learns_the_exact_variance(kind, steps, most):
    """NPR's h, and SN's h - eps^2, approach Var[eps | x_t], which the mixture has exactly; SN's
    less closely, since it is a difference of two larger numbers."""
    torch.manual_seed(0)
    mixture = toy.two_bumps()
    net = TwoHeads(mixture)
    d = D.Denoiser(net, LINEAR)
    optimizer = torch.optim.Adam(net.head.parameters(), 3e-2)
    g = torch.Generator().manual_seed(1)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-2 * (1 - step / steps)
        x0, t = mixture.sample(1024, g).float(), torch.tensor([100, 300]).repeat(512)
        loss = heads.head_loss(d, x0, t, torch.randn(1024, 1, generator=g), kind).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for t in (100, 300):
        x0, noise = mixture.sample(400, g).float(), torch.randn(400, 1, generator=g)
        x = schedules.add_noise(LINEAR, x0, t, noise)
        eps = mixture.posterior(x, *LINEAR.alpha_sigma(t))[1]
        exact = exact_var(mixture, x.double(), *LINEAR.alpha_sigma(t))
        h = d.network_output(x, t)[:, 1:].double().detach()
        learned = h if kind == "npr" else h - eps**2
        error = (learned - exact).abs().mean() / exact.mean()
        assert error < most, f"t = {t}: {error:.3f}"
        if kind == "sn":
            assert_close(h.mean(), (exact + eps**2).mean(), rtol=0.05, atol=0)
        elif t == 100:  # far nearer than the best single number, Analytic-DPM's
            assert error < 0.2 * (exact.mean() - exact).abs().mean() / exact.mean()


def test_a_head_leaves_the_trunk_alone():
    net, both = small_net(), unet.UNet(**{**SIZE, "second_head": "block"})
    missing, unknown = both.load_state_dict(net.state_dict(), strict=False)
    assert not unknown and all(k.startswith("second_head") for k in missing)
    x0, noise = torch.randn(2, 2, 3, 8, 8)
    d, t = D.Denoiser(both, LINEAR), torch.tensor([5, 900])
    heads.head_loss(d, x0, t, noise, "npr").sum().backward()
    # the target is a number: no gradient comes to what the prediction alone is made of
    grads = {n: p.grad.abs().max() for n, p in both.named_parameters() if p.grad is not None}
    assert grads["out_conv.weight"] == grads["out_norm.weight"] == 0
    assert max(g for n, g in grads.items() if n.startswith("second_head")) > 0
    out = both(x0, t.float())
    assert_close(out[:, :3], net(x0, t.float()), rtol=0, atol=0)
    assert_close(out[:, 3:], torch.zeros(2, 3, 8, 8), rtol=0, atol=0)  # starts at 0


# ------------------------------------------------------------------ the program


@pytest.mark.parametrize(
    "kind, size", [("npr", "simple"), pytest.param("sn", "block", marks=pytest.mark.slow)]
)
def test_a_head_is_trained_and_its_trunk_is_not(runs, no_grids, kind, size):
    heads.main([kind, "base", *SMALL, "--head-size", size, "--name", "head"])
    base, head = saved("base"), saved("head")
    for weights in ("net", "ema"):
        new = {k: v for k, v in head[weights].items() if k.startswith("second_head")}
        assert new and any(v.any() for k, v in new.items() if k.endswith("weight"))
        trunk = {k: v for k, v in head[weights].items() if k not in new}
        assert_close(trunk, base["ema"], rtol=0, atol=0)  # the bits that were sampled from
    assert len(head["optimizer"]["state"]) == len(new)  # nothing else is updated
    # everything else is the base's, and the trunk runs as in sampling, without dropout
    s = head["settings"]
    assert s["schedule"] == "linear" and s["etsdm"] is True and s["unet"]["dropout"] == 0
    assert s["head"] == kind and s["trunk"] == "base" and s["data"] == "shapes"
    message = "^head has a second head already: .* base$"
    refused(message, heads.main, ["sn" if kind == "npr" else "npr", "head"])


def test_a_head_serves_sampling_in_the_same_calls(runs, no_grids, monkeypatch):
    heads.main(["npr", "base", *SMALL, "--name", "head"])
    calls, forward = [], unet.UNet.forward
    monkeypatch.setattr(unet.UNet, "forward", lambda *a: calls.append(1) or forward(*a))
    for sampler in ("ddpm", "ddim"):
        calls.clear()
        flags = ["--variance", "npr", "--sampler", sampler, "-n", "2", "--nfe", "7"]
        sample.main(["head", *flags, "--out", sampler])
        assert len(calls) == 7
    message = "^--variance sn: .* -m papers.heads sn base"
    refused(message, sample.main, ["head", "--variance", "sn"])
    Path("runs/base").rename("runs/my base")
    message = "^--variance npr: .* -m papers.heads npr '.*my base'"
    refused(message, sample.main, ["my base", "--variance", "npr"])
    for name in ("head", "my base"):  # without the variance, it is the base
        sample.main([name, "-n", "1", "--nfe", "2", "--out", f"of {name}"])
    assert Path("of head/000000.png").read_bytes() == Path("of my base/000000.png").read_bytes()


@pytest.mark.parametrize("trunk", ["latent", "remap", "sr"])
def test_a_head_on_every_kind_of_run(runs, trunk):
    """Trained, with its preview, and used."""
    heads.main(["npr", trunk, *SMALL])
    name = f"{trunk}-npr"
    assert Path(f"runs/{name}/samples/0000002.png").exists()
    d, base = D.load_run(name), D.load_run(trunk)
    assert type(d.space) is type(base.space) and d.shape == base.shape
    assert d.time_input(300.0) == base.time_input(300.0)
    flags = "-n 2 --nfe 2 --sampler ddpm --variance npr --out out".split()
    if trunk == "sr":
        superres.main(["enlarge", name, "shapes", *flags])
    else:
        sample.main([name, *flags, *["--spacing", "remap"] * (trunk == "remap")])
    assert len(list(Path("out").glob("*.png"))) == 2


def test_a_run_without_settings_of_a_network_is_refused_in_one_line(runs):
    Path("runs/old").mkdir()
    write("runs/old", saved("base") | dict(settings={"name": "old"}))
    refused("^old: its settings describe no network", heads.main, ["npr", "old"])


def test_where_the_trunk_lies_makes_no_other_run(runs, no_grids, capsys):
    """Its weights are in the checkpoint: the same ones in another place are silent, and others
    change nothing. A new run takes those of the folder that was named."""
    shutil.copytree("runs/base", "elsewhere/base")
    places = ["base", "./runs/base/checkpoint.pt", "elsewhere/base/"]
    for step, place in enumerate(places, 1):
        heads.main(["npr", place, *SMALL, "--steps", str(step)])
        assert saved("base-npr")["step"] == step
    assert "other weights" not in capsys.readouterr().out
    other, before = plus_one(saved("base")["ema"]), saved("base-npr")["net"]
    write("elsewhere/base", saved("base") | dict(ema=other))
    heads.main(["npr", "elsewhere/base", *SMALL, "--steps", "4"])
    text = "elsewhere/base has other weights than this run began with"
    assert text in capsys.readouterr().out
    heads.main(["npr", "elsewhere/base", *SMALL, "--name", "new"])
    now, new = saved("base-npr")["net"], saved("new")["ema"]
    for k in other:
        assert torch.equal(now[k], before[k]) and torch.equal(new[k], other[k])


def test_the_previews_show_the_head(runs):
    """They change as it learns, though the trunk does not."""
    flags = "--lr 0.05 --sample-every 4 --steps 8 --name head".split()
    heads.main(["npr", "base", *SMALL, *flags])
    grids = [Path(f"runs/head/samples/{i:07d}.png").read_bytes() for i in (4, 8)]
    assert grids[0] != grids[1]


def test_a_head_sees_all_noise_levels_alike(here, no_grids):
    train.main([*TINY, "--schedule", "edm", "--steps", "1", "--name", "edm"])
    config = parse("papers.heads", "sn edm")
    assert saved("edm")["settings"]["train_times"] == "lognormal"
    assert config.train_times == "uniform"
    assert config.name == "edm-sn" and config.prediction == "edm"
    command = parse("papers.heads", ["sn", "edm", "--name", "my run"]).next_command()
    assert command == "python sample.py 'my run' --sampler ddpm --variance sn"
