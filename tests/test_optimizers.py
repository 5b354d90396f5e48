"""Tests of support/optimizers.py: Muon's update, its Adam, warm-up and decay, resuming."""

from types import SimpleNamespace

import pytest
import torch

import unet
from support.optimizers import Muon, make_optimizer, orthogonalize, set_learning_rate

SIZE = dict(image_size=8, channels=8, channel_mult=(1, 2), res_blocks=1, norm_groups=4)
SIZE |= dict(attention_resolutions=(), head_channels=None)


def config(**changes):
    usual = dict(optimizer="muon", lr=1e-3, muon_lr=0.02, beta2=0.99, lr_decay="none", warmup=0)
    usual["adam_eps"] = 1e-8
    return SimpleNamespace(**{**usual, "images": 800, "batch_size": 8, **changes})


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 40), (2, 40, 8), (1, 1, 9)])
def test_the_update_keeps_singular_vectors_and_levels_singular_values(shape):
    torch.manual_seed(0)
    M = torch.randn(shape)
    U, s, V = torch.linalg.svd(M, full_matrices=False)
    inside = U.mT @ orthogonalize(M) @ V.mT  # diagonal, if the singular vectors are the same
    values = inside.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inside, torch.diag_embed(values), rtol=0, atol=1e-4)
    kept = values[s > 0.05 * s.amax()]  # tiny singular values grow more slowly
    assert 0.6 < kept.min() and kept.max() < 1.25


def test_matrices_of_one_shape_in_a_batch_are_as_one_at_a_time():
    M = torch.randn(5, 12, 30, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([orthogonalize(m[None]) for m in M])
    torch.testing.assert_close(orthogonalize(M), alone, rtol=1e-4, atol=1e-5)


def test_muon_steps_by_its_formula():
    """Two steps of one kernel, written out: momentum, Nesterov, √(rows/columns)."""
    p = torch.nn.Parameter(torch.zeros(6, 2, 1, 1))
    optimizer, average, expected = Muon([p], [], lr=0.1, momentum=0.9), 0.0, torch.zeros(6, 2)
    for seed in range(2):
        g = torch.randn(6, 2, generator=torch.Generator().manual_seed(seed))
        p.grad = g.reshape(6, 2, 1, 1).clone()
        optimizer.step()
        average = 0.9 * average + g
        expected = expected - 0.1 * 3**0.5 * orthogonalize((g + 0.9 * average)[None])[0]
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


def test_warm_up_and_decay():
    optimizer = Muon([torch.nn.Parameter(torch.ones(2, 2))], [torch.nn.Parameter(torch.ones(2))])

    def rates(step, **changes):
        set_learning_rate(optimizer, config(**changes), step)
        return [g["lr"] for g in optimizer.param_groups]

    assert rates(0, warmup=4) == [0.005, 0.00025] and rates(50, warmup=4) == [0.02, 0.001]
    assert rates(75, lr_decay="linear") == pytest.approx([0.005, 0.00025])
    assert rates(50, lr_decay="cosine") == pytest.approx([0.01, 0.0005])
    assert rates(100, lr_decay="linear") == [0, 0]
