"""Tests of support/optimizers.py: Muon's update, its Adam, warm-up and decay, resuming."""

from types import SimpleNamespace

import pytest
import torch

import unet
from support.checkpoint import load_optimizer
from support.optimizers import Muon, make_optimizer, orthogonalize, set_learning_rate

SIZE = dict(image_size=8, channels=8, channel_mult=(1, 2), res_blocks=1, norm_groups=4)
SIZE |= dict(attention_resolutions=(), head_channels=None)


def config(**changes):
    usual = dict(optimizer="muon", lr=1e-3, muon_lr=0.02, muon_momentum=0.95, beta2=0.99)
    usual |= dict(adam_eps=1e-8, lr_decay="none", warmup=0)
    return SimpleNamespace(**{**usual, "images": 800, "batch_size": 8, **changes})


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8), (1, 1, 9)])
def test_the_update_keeps_singular_vectors_and_levels_singular_values(shape):
    torch.manual_seed(0)
    M = torch.randn(shape)
    U, s, V = torch.linalg.svd(M, full_matrices=False)
    inside = U.mT @ torch.stack(orthogonalize(M)) @ V.mT  # diagonal: the same singular vectors
    values = inside.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-4)
    kept = values[s > 0.05 * s.amax()]  # tiny singular values grow more slowly
    assert 0.6 < kept.min() and kept.max() < 1.25


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (12, 12)])
@pytest.mark.parametrize("rank", [12, 3])
def test_newton_schulz_is_its_polynomial_of_the_singular_values(shape, rank):
    """The textbook form, in float64: s ← a s + b s³ + c s⁵, five times. Ours multiplies only the
    small products XXᵀ, in float32. With few directions in M, the others stay at zero."""
    random = torch.Generator().manual_seed(1)
    M = torch.randn(shape[0], rank, generator=random) @ torch.randn(
        rank, shape[1], generator=random
    )
    U, s, V = torch.linalg.svd(M.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = (U * s) @ V
    torch.testing.assert_close(orthogonalize([M])[0].double(), expected, rtol=0, atol=1e-4)


def test_matrices_with_the_same_smaller_side_in_a_batch_are_as_one_at_a_time():
    random = torch.Generator().manual_seed(1)
    M = [torch.randn(s, generator=random) for s in ((12, 30), (40, 12), (12, 12), (12, 13))]
    for together, m in zip(orthogonalize(M), M, strict=True):
        torch.testing.assert_close(together, orthogonalize([m])[0], rtol=1e-4, atol=1e-5)


def test_the_size_of_a_gradient_does_not_matter_and_zero_stays_zero():
    """The last layer of each block starts at zero: in the first step no gradient passes it."""
    M = torch.randn(6, 9, generator=torch.Generator().manual_seed(1))
    zero, small, usual, large = orthogonalize([0 * M, 1e-4 * M, M, 1e6 * M])
    assert torch.equal(zero, torch.zeros(6, 9))
    torch.testing.assert_close(small, usual, rtol=0, atol=2e-3)  # 1e-7 guards the division
    torch.testing.assert_close(large, usual, rtol=0, atol=1e-4)


def test_muon_steps_by_its_formula():
    """Two steps of one kernel, written out: momentum, Nesterov, √(rows/columns)."""
    p = torch.nn.Parameter(torch.zeros(6, 2, 1, 1))
    optimizer, average, expected = Muon([p], [], lr=0.1, momentum=0.9), 0.0, torch.zeros(6, 2)
    for seed in range(2):
        g = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed))
        p.grad = g.reshape(6, 2, 1, 1).clone()
        optimizer.step()
        average = 0.9 * average + g
        expected = expected - 0.1 * 3**0.5 * orthogonalize([g + 0.9 * average])[0]
    torch.testing.assert_close(p.detach().reshape(6, 2), expected, rtol=1e-5, atol=1e-6)


def test_the_other_parameters_move_as_by_torch_adam():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 4), torch.nn.Linear(5, 4)
    theirs.load_state_dict(ours.state_dict())
    a = Muon([], ours.parameters(), adam_lr=1e-2, betas=(0.9, 0.99))
    b = torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=(0.9, 0.99))
    for _ in range(20):
        x = torch.randn(8, 5)
        for net, optimizer in ((ours, a), (theirs, b)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=1e-6, atol=1e-7)


def test_hidden_matrices_are_muons_and_edges_are_adams():
    net = unet.UNet(**SIZE)
    optimizer = make_optimizer(net, config())
    names = {p: k for k, p in net.named_parameters()}
    muon, adam = ([names[p] for p in g["params"]] for g in optimizer.param_groups)
    assert len(muon) + len(adam) == len(names)
    assert all(dict(net.named_parameters())[k].dim() > 1 for k in muon)
    assert {"input_blocks.0.0.weight", "out_conv.weight", "time_embed.0.weight"} <= set(adam)
    assert "input_blocks.1.0.conv1.weight" in muon and "input_blocks.1.0.time.weight" in muon


def train(net, optimizer, steps):
    for step in steps:
        g = torch.Generator().manual_seed(step)
        x, c = torch.randn(2, 3, 8, 8, generator=g), torch.rand(2, generator=g)
        optimizer.zero_grad()
        (net(x, c) - x).square().mean().backward()
        set_learning_rate(optimizer, config(lr_decay="linear"), step)
        optimizer.step()


def test_resuming_gives_the_same_bits():
    torch.manual_seed(0)
    whole, first, again = (unet.UNet(**SIZE) for _ in range(3))
    for net in (first, again):
        net.load_state_dict(whole.state_dict())
    a, b, c = (make_optimizer(net, config()) for net in (whole, first, again))
    train(whole, a, range(6))
    train(first, b, range(3))
    again.load_state_dict(first.state_dict())
    load_optimizer(c, b.state_dict(), "checkpoint")
    train(again, c, range(3, 6))
    for p, q in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("momentum", [0.95, 0.0])
def test_warm_up_and_decay(momentum):
    matrix, bias = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = Muon([matrix], [bias], momentum=0.5)

    def rates(step, **changes):
        set_learning_rate(optimizer, config(muon_momentum=momentum, **changes), step)
        assert [g["momentum"] for g in optimizer.param_groups] == [momentum, None]
        return [g["lr"] for g in optimizer.param_groups]

    assert rates(0, warmup=4) == [0.005, 0.00025] and rates(50, warmup=4) == [0.02, 0.001]
    assert rates(75, lr_decay="linear") == pytest.approx([0.005, 0.00025])
    assert rates(50, lr_decay="cosine") == pytest.approx([0.01, 0.0005])
    assert rates(100, lr_decay="linear") == [0, 0]
