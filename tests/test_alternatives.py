"""papers/alternatives.py: remaps of time, DDPM-r and SA-reuse."""

import math

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
    """Against two forward passes of their own, differentiated by autograd in float64."""
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


def test_the_slope_costs_one_forward_pass_and_leaves_the_other_terms_alone():
    calls, x0 = [], torch.randn(4, 2)
    d = D.Denoiser(lambda x, c: calls.append(len(x)) or torch.sin(x) + c[:, None], LINEAR)
    t, noises = torch.tensor([1, 2, 500, 1000]), torch.randn(2, 4, 2)
    plain = losses.sa_loss(d, x0, t, noises)
    *terms, slope = alternatives.regularized_loss(d, x0, t, noises)
    assert calls == [8, 12]  # the levels of L_SA share one pass, and the slope goes with them
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


@pytest.mark.parametrize("name", alternatives.REMAPS)
def test_remaps_are_invertible_and_stretch_small_t(name):
    t = torch.linspace(0, 1000, 2001, dtype=torch.float64)
    c = alternatives.remap(t, name)
    assert_close(alternatives.unremap(c, name), t, rtol=1e-10, atol=1e-9)
    assert (c.diff() > 0).all()
    assert_close(c[[0, -1]], t[[0, -1]], rtol=0, atol=1e-9)
    assert (c[1] - c[0]) / 0.5 > 20, "a step near 0 must move the time input by much more"
    # Heun's churn on EDM's schedule goes beyond T
    assert torch.isfinite(alternatives.remap(torch.tensor([1000.0, 1070.0]), name)).all()


def test_remap_values():
    assert_close(alternatives.remap(250.0, "sqrt").item(), 500.0)
    assert_close(alternatives.remap(25.0, "sqrt", T=100).item(), 50.0)
    m = alternatives.MARGIN  # inverse of the logistic function on [m, 1 - m]
    p = m + (1 - 2 * m) * 0.25
    logit = math.log(p / (1 - p)) / math.log((1 - m) / m)
    assert_close(alternatives.remap(250.0, "inverse-sigmoid").item(), 500 * (1 + logit))
    for f in (alternatives.remap, alternatives.unremap):
        with pytest.raises(ValueError, match="unknown remap 'cube': choose from sqrt"):
            f(1.0, "cube")


@pytest.mark.parametrize("name", alternatives.REMAPS)
@pytest.mark.parametrize("low, high", [(0, 1000), (1, 1000), (0.01, 999)])
def test_quantiles_are_uniform_in_the_remap(name, low, high):
    u = torch.linspace(0, 1, 501, dtype=torch.float64)
    t = alternatives.time_at_quantile(u, name, low, high)
    end = torch.tensor([low, high], dtype=torch.float64)
    assert_close(t[[0, -1]], end, rtol=1e-9, atol=1e-12)
    ends = alternatives.remap(end, name)
    c = ends[0] + u * (ends[1] - ends[0])
    assert_close(alternatives.remap(t, name), c, rtol=1e-9, atol=1e-9)
    # as a distribution: the share of t below a time is the share of f(t) below its time input
    middle = alternatives.time_at_quantile((u[1:] + u[:-1]) / 2, name, low, high)
    share = (alternatives.remap(250, name) - ends[0]) / (ends[1] - ends[0])
    assert_close((middle < 250).double().mean(), share, rtol=0, atol=2e-3)
    assert alternatives.time_at_quantile(0.5, name, low, high).shape == ()


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
