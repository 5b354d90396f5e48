"""papers/alternatives.py: remaps of time, DDPM-r and SA-reuse."""

import pytest
import torch
from torch.testing import assert_close

import config
import denoiser as D
import etsdm
import lipschitz
import losses
import schedules
import toy
from papers import alternatives
from test_losses import LINEAR, Small, small_net

# ------------------------------------------------------------------ DDPM-r


@pytest.mark.parametrize("k, shared", [(1, False), (1, True), (3, False)])
def test_the_slope_is_a_finite_difference_in_value_and_gradient(k, shared):
    """Against two forward passes of their own, differentiated by autograd in float64; and against a
    difference quotient of the loss along a random direction of the weights."""
    net = small_net().double()
    denoiser = D.Denoiser(net, LINEAR, "v", etsdm.make_time_input() if shared else None)
    torch.manual_seed(2)
    x0, t = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([19, 400, 1000])
    noises = torch.randn(k, 3, 3, 8, 8, dtype=torch.float64)

    def ours():
        return alternatives.regularized_loss(denoiser, x0, t, noises)[2].sum()

    def by_hand():
        xt = schedules.add_noise(LINEAR, x0, t, noises[0])
        # x_t is held; only the time input moves, and at T it moves down
        other = denoiser.prediction_at(xt, torch.tensor([20, 401, 999]))
        return (denoiser.prediction_at(xt, t) - other).square().mean((1, 2, 3)).sum()

    weights = list(net.parameters())
    assert_close(ours(), by_hand(), rtol=1e-10, atol=0)
    gradient = torch.autograd.grad(ours(), weights, allow_unused=True)
    expected = torch.autograd.grad(by_hand(), weights, allow_unused=True)
    for g, e in zip(gradient, expected, strict=True):
        assert (g is None) == (e is None)
        if g is not None:
            assert_close(g, e, rtol=1e-8, atol=1e-12)
    direction = [torch.randn_like(w) for w in weights]
    along = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True) if g is not None)
    values = []
    for h in (1e-6, -2e-6):
        with torch.no_grad():
            for w, d in zip(weights, direction, strict=True):
                w += h * d
            values.append(ours().item())
    assert_close((values[0] - values[1]) / 2e-6, along.item(), rtol=1e-4, atol=1e-8)


def test_the_slope_costs_one_forward_pass_and_leaves_the_other_terms_alone():
    calls = []

    def net(x, c):
        calls.append(len(x))
        return torch.sin(x) + c[:, None]

    d, x0 = D.Denoiser(net, LINEAR), torch.randn(4, 2)
    t, noises = torch.tensor([1, 2, 500, 1000]), torch.randn(2, 4, 2)
    plain = losses.sa_loss(d, x0, t, noises)
    *terms, slope = alternatives.regularized_loss(d, x0, t, noises)
    assert calls == [8, 12]
    assert_close(tuple(terms), plain)
    assert_close(slope, torch.ones(4), rtol=1e-3, atol=0)  # (c + 1 - c)^2, in float32


@pytest.mark.slow
def test_the_penalty_shrinks_the_lipschitz_constants():
    mixture, found = toy.two_bumps(), {}
    for weight in (0.0, 3000.0):
        torch.manual_seed(0)
        net = Small()
        d, optimizer = D.Denoiser(net, LINEAR), torch.optim.Adam(net.parameters(), 3e-3)
        g = torch.Generator().manual_seed(1)
        for _ in range(250):
            x0 = mixture.sample(128, g).float()
            t = losses.draw_timesteps(128, LINEAR, 1, 1000, g)
            noises = torch.randn(1, 128, 1, generator=g)
            simple, _, slope = alternatives.regularized_loss(d, x0, t, noises)
            loss = simple.mean() + weight * slope.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ts = torch.tensor([1, 2, 5, 10, 20, 50])
        x0 = mixture.sample(200, torch.Generator().manual_seed(2)).float()
        found[weight] = lipschitz.lipschitz_constants(d, x0, ts)
    assert (found[3000.0] < 0.65 * found[0.0])[:4].all()


# ------------------------------------------------------------------ remaps


@pytest.mark.parametrize("remap", alternatives.REMAPS)
@pytest.mark.parametrize("continuous", [False, True])
def test_times_that_are_uniform_in_the_remap(remap, continuous):
    schedule = schedules.make_schedule("linear", continuous=continuous)
    low, high = losses.time_range(schedule, "eps")
    quantile = lambda u: alternatives.time_at_quantile(u, remap, low, high)  # noqa: E731
    g = torch.Generator().manual_seed(0)
    t = losses.draw_timesteps(50_000, schedule, low, high, g, quantile)
    assert t.dtype == (torch.float64 if continuous else torch.int64)
    assert (t >= low).all() and (t <= high).all()
    ends = alternatives.remap(torch.tensor([float(low), high]), remap)
    c = (alternatives.remap(t.double(), remap) - ends[0]) / (ends[1] - ends[0])
    for q in (0.25, 0.5, 0.75):  # small t come in steps of whole numbers
        assert_close(c.quantile(q).item(), q, rtol=0, atol=0.02)


# ------------------------------------------------------------------ SA-reuse


@pytest.mark.parametrize("space", config.LOSS_SPACES)
def test_reuse_is_the_mean_of_the_plain_loss_over_all_levels(space):
    torch.manual_seed(3)
    denoiser = D.Denoiser(small_net(), LINEAR, "v")
    x0, t = torch.randn(3, 3, 8, 8), torch.tensor([900, 2, 1])
    noises = torch.randn(3, 3, 3, 8, 8)
    simple, sa = alternatives.reuse_loss(denoiser, x0, t, noises, space)
    for b in range(3):
        levels = [i for i in range(3) if t[b] - i >= 1]  # at t = 2 two exist, at t = 1 one
        alone = [
            losses.simple_loss(denoiser, x0[b : b + 1], t[b : b + 1] - i, noises[i, b][None], space)
            for i in levels
        ]
        assert_close(simple[b], torch.stack(alone).mean())
    without = losses.sa_loss(denoiser, x0, t, noises, space)
    assert_close(sa, without[1], rtol=0, atol=0)
    assert (simple != without[0])[:2].all()
