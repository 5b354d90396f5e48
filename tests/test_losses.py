"""losses.py against the sums written out one forward pass at a time."""

import pytest
import torch
from torch.testing import assert_close

import config
import denoiser as D
import etsdm
import losses
import schedules
import toy
import unet

LINEAR = schedules.make_schedule("linear")


SIZE = dict(image_size=8, channels=16, channel_mult=(1, 2), res_blocks=1, norm_groups=8)
SIZE |= dict(attention_resolutions=(4,), head_channels=None)


def small_net(seed=0, **changes):
    torch.manual_seed(seed)
    net = unet.UNet(**SIZE | changes)
    for p in net.parameters():  # the last layer starts at zero, and would hide everything before it
        if not p.any():
            p.data.normal_(0, 0.1)
    return net


class Small(torch.nn.Module):
    """An MLP of one coordinate and of the time, as log SNR; `outputs` numbers."""

    def __init__(self, outputs=1, width=64):
        super().__init__()
        linear, silu = torch.nn.Linear, torch.nn.SiLU
        layers = linear(3, width), silu(), linear(width, width), silu(), linear(width, outputs)
        self.layers = torch.nn.Sequential(*layers)

    def forward(self, x, c):
        lam = LINEAR.lam(c.double().clamp(min=1)).to(x)
        return self.layers(torch.cat([x, torch.stack([lam / 3, c / 1000], 1)], dim=1))


def by_hand(denoiser, x0, t, noises):
    """SA-DPM algorithm 2, k forward passes, one image at a time."""
    simple, sa = [], []
    k = len(noises)
    for b in range(len(x0)):
        total = 0
        for i in range(k):
            if i and t[b] - i < 1:
                continue
            a, s = LINEAR.alpha_sigma((t[b] - i).item())
            xt = a * x0[b] + s * noises[i, b]
            eps_hat = denoiser.predict(xt[None], t[b : b + 1] - i)[1][0]
            residual = noises[i, b] - eps_hat
            if i == 0:
                simple.append(residual.square().mean())
            total = total + residual
        sa.append((total / k).square().mean())
    return torch.stack(simple), torch.stack(sa)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("prediction", config.PREDICTIONS)
@pytest.mark.parametrize("shared", [False, True])
def test_one_pass_equals_k_passes_in_value_and_gradient(k, prediction, shared):
    net = small_net().double()
    denoiser = D.Denoiser(net, LINEAR, prediction, etsdm.make_time_input() if shared else None)
    torch.manual_seed(1)
    x0 = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    noises = torch.randn(k, 4, 3, 8, 8, dtype=torch.float64)
    t = torch.tensor([1, 2, 103, 1000])  # the first two have no full window
    parameters = list(net.parameters())

    def gradients(simple, sa):
        return torch.autograd.grad((simple + 0.7 * sa).mean(), parameters)

    got, expected = losses.sa_loss(denoiser, x0, t, noises), by_hand(denoiser, x0, t, noises)
    assert_close(got, expected, rtol=1e-9, atol=1e-12)
    for g, e in zip(gradients(*got), gradients(*expected), strict=True):
        assert_close(g, e, rtol=1e-5, atol=1e-9)


def test_k_of_one_is_the_plain_loss_and_missing_terms_keep_the_divisor():
    """At t = 1 only the step itself exists: L_SA = L_simple / k^2, not L_simple."""
    denoiser, noises = D.Denoiser(small_net(), LINEAR), torch.randn(3, 3, 3, 8, 8)
    x0, t = torch.randn(3, 3, 8, 8), torch.tensor([1, 30, 900])
    simple, sa = losses.sa_loss(denoiser, x0, t, noises[:1])
    assert_close(sa, simple, rtol=0, atol=0)
    assert_close(losses.simple_loss(denoiser, x0, t, noises[0]), simple, rtol=0, atol=0)
    simple, sa = losses.sa_loss(denoiser, x0, torch.ones(3, dtype=int), noises)
    assert_close(sa, simple / 9, rtol=1e-5, atol=1e-8)


def test_the_oracle_has_the_least_loss():
    """E||eps - eps_theta||^2 is least at the exact eps*, and there equals Var[eps | x_t]."""
    mixture = toy.one_gaussian((1,))
    g = torch.Generator().manual_seed(0)
    x0 = mixture.sample(100_000, g)
    noise = torch.randn(100_000, 1, dtype=torch.float64, generator=g)
    t = torch.full((100_000,), 300)
    exact = toy.oracle(mixture, LINEAR)
    best = losses.simple_loss(D.Denoiser(exact, LINEAR), x0, t, noise).mean()
    ab = LINEAR.alpha_bar(300)
    variance = 0.25 * ab / (0.25 * ab + 1 - ab)  # of a Gaussian pair
    assert_close(best, variance, rtol=0.02, atol=0)
    for scale in (0.95, 1.05):
        worse = D.Denoiser(lambda x, c, k=scale: k * exact(x, c), LINEAR)
        assert losses.simple_loss(worse, x0, t, noise).mean() > best


@pytest.mark.parametrize("name", ["linear", "zero-terminal-snr"])
def test_loss_spaces_are_the_plain_residuals(name):
    """v = a eps - s x0: its loss is a^-2 times eps's, and it still learns where a = 0."""
    schedule = schedules.make_schedule(name)
    out = torch.randn(3, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    denoiser = D.Denoiser(lambda x, c: out, schedule, "v")
    x0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([5, 400, 1000])
    a, s = (c[:, None, None, None] for c in schedule.alpha_sigma(t))
    in_v = losses.simple_loss(denoiser, x0, t, noise, "v")
    assert_close(in_v, (a * noise - s * x0 - out).square().mean((1, 2, 3)), rtol=1e-9, atol=1e-12)
    in_eps = losses.simple_loss(denoiser, x0, t, noise, "eps")
    assert_close(in_eps, a.flatten() ** 2 * in_v, rtol=1e-8, atol=1e-12)
    in_x0 = losses.simple_loss(denoiser, x0, t, noise, "x0")
    assert_close(in_x0, s.flatten() ** 2 * in_v, rtol=1e-8, atol=1e-12)
    (gradient,) = torch.autograd.grad(in_v[2], out)
    assert gradient[2].abs().max() > 0.01


def test_unknown_space():
    d, x = D.Denoiser(lambda x, c: x, LINEAR), torch.randn(1, 2)
    with pytest.raises(ValueError, match="unknown loss space 'u'"):
        losses.simple_loss(d, x, torch.tensor([3]), x, "u")


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_timesteps_are_antithetic(n):
    g = torch.Generator().manual_seed(n)
    t = losses.draw_timesteps(n, LINEAR, 1, 1000, g)
    assert t.dtype == torch.int64 and t.shape == (n,) and (t >= 1).all() and (t <= 1000).all()
    pairs = n // 2 * 2
    assert (t[0:pairs:2] + t[1:pairs:2] == 1001).all()


def test_timesteps_are_uniform_and_reach_both_ends():
    t = losses.draw_timesteps(400_000, LINEAR, 1, 1000, torch.Generator().manual_seed(0))
    counts = torch.bincount(t, minlength=1001)[1:].double()
    assert counts.min() > 0
    # antithetic: half as many independent draws, each twice
    chi2 = ((counts - 400) ** 2 / 400).sum() / 2
    assert abs(chi2 - 499.5) < 5 * (2 * 499.5) ** 0.5
    schedule = schedules.make_schedule("linear", continuous=True)
    low, high = losses.time_range(schedule, "eps")
    real = losses.draw_timesteps(100_000, schedule, low, high, torch.Generator().manual_seed(0))
    assert real.dtype == torch.float64 and (real >= 0.01).all() and (real <= 1000).all()
    assert_close(real[0::2] + real[1::2], torch.full((50_000,), 1000.01, dtype=torch.float64))
    assert abs(real.mean() - 500) < 1 and len(real.unique()) == 100_000


def test_eps_prediction_skips_the_step_without_signal():
    zero = schedules.make_schedule("zero-terminal-snr")
    assert losses.time_range(zero, "eps") == (1, 999)
    assert losses.time_range(zero, "v") == (1, 1000)
    assert losses.time_range(LINEAR, "eps") == (1, 1000)


# ------------------------------------------------------------------ EDM


def test_edms_loss_is_its_weighted_one():
    """weight (sigma^2 + d^2)/(sigma d)^2 times the squared error of D: table 1 and equation 8."""
    schedule = schedules.make_schedule("edm")
    d = D.Denoiser(lambda x, c: torch.sin(x) * c[:, None, None, None], schedule, "edm")
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64)
    t = torch.tensor([2.0, 50.3, 300.0, 700.0, 999.0], dtype=torch.float64)
    sigma = schedule.alpha_sigma(t)[1][:, None, None, None]
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    guess = d.predict(x0 + sigma * noise, t)[0]
    expected = (weight * (guess - x0) ** 2).mean((1, 2, 3))
    assert_close(losses.simple_loss(d, x0, t, noise, "edm"), expected, rtol=1e-9, atol=0)
    # it is the plain loss of the raw network, whose target F has unit variance
    xt, v = x0 + sigma * noise, sigma**2 + 0.25
    target = (x0 - 0.25 / v * xt) / (sigma * 0.5 / v.sqrt())
    raw = (d.prediction_at(xt, t) - target).square().mean((1, 2, 3))
    assert_close(expected, raw, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", ["edm", "linear"])
def test_log_normal_times(name):
    schedule = schedules.make_schedule(name)
    low, high = losses.time_range(schedule, "edm")
    quantile = lambda u: losses.lognormal_times(u, schedule, low, high)  # noqa: E731
    g = torch.Generator().manual_seed(0)
    t = losses.draw_timesteps(100_001, schedule, low, high, g, quantile)
    assert t.shape == (100_001,) and (t >= low).all() and (t <= high).all()
    assert t.is_floating_point() == schedule.continuous
    ln_sigma = -schedule.lam(t)
    if name == "linear":  # the table ends at sigma = 0.01: what would be less is cut off there
        ln_sigma = ln_sigma[t > 1]
        assert 0.99 < len(ln_sigma) / len(t) < 1
    assert_close(ln_sigma.mean().item(), -1.2, rtol=0, atol=0.03)
    assert_close(ln_sigma.std().item(), 1.2, rtol=0, atol=0.03)
    if name == "edm":  # antithetic: mirrored in ln sigma
        pairs = -schedule.lam(t)[:100_000].unflatten(0, (-1, 2))
        inside = (pairs > -7).all(1) & (pairs < 4).all(1)
        total = pairs[inside].sum(1)
        assert_close(total, torch.full_like(total, -2.4), rtol=0, atol=1e-6)
