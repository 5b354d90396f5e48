"""papers/heads.py: the loss of second heads, and their training on the network of a run."""

import pytest
import torch
from torch.testing import assert_close

import denoiser as D
import schedules
import toy
import unet
from papers import heads
from test_losses import LINEAR, SIZE, Small, small_net

# ------------------------------------------------------------------ second heads


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
