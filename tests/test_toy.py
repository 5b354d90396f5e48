"""toy.py: the oracle itself, against autograd and brute force."""

import pytest
import torch
from torch.testing import assert_close

import etsdm
import schedules
import toy

LINEAR = schedules.make_schedule("linear")


def log_density(mixture, x, alpha, sigma):
    """log q_t(x) from the mixture of Gaussians, for autograd."""
    flat, means = x.flatten(1), mixture.means.flatten(1)
    v = alpha**2 * mixture.stds**2 + sigma**2
    d = flat.shape[1]
    square = (flat[:, None] - alpha * means).square().sum(2)
    return torch.logsumexp(
        mixture.weights.log() - d / 2 * torch.log(2 * torch.pi * v) - square / (2 * v), 1
    )


@pytest.mark.parametrize("t", [1, 50, 400, 1000])
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 2, 2)])
def test_eps_is_minus_sigma_times_the_score(t, shape):
    mixture = toy.two_bumps(shape)
    alpha, sigma = LINEAR.alpha_sigma(t)
    x = torch.randn(6, *shape, dtype=torch.float64, requires_grad=True)
    (score,) = torch.autograd.grad(log_density(mixture, x, alpha, sigma).sum(), x)
    x0, eps = mixture.posterior(x.detach(), alpha, sigma)
    assert_close(eps, -sigma * score, rtol=1e-9, atol=1e-9)
    assert_close(alpha * x0 + sigma * eps, x.detach(), rtol=1e-9, atol=1e-9)  # the pair gives x_t


def test_moments_and_samples_agree():
    mixture = toy.two_bumps((2,))
    x = mixture.sample(400_000, torch.Generator().manual_seed(1))
    assert_close(x.mean(0), mixture.mean(), rtol=0, atol=3e-3)
    assert_close(x.var(0), mixture.variance(), rtol=0.01, atol=0)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_shared_oracle_is_the_average_over_the_sub_interval(prediction):
    mixture, width = toy.two_bumps(), 20
    plain = toy.oracle(mixture, LINEAR, prediction)
    net = toy.oracle(mixture, LINEAR, prediction, toy.shared_times(100, 5))
    x = torch.randn(4, 1, dtype=torch.float64)
    for t in (1, 19, 20, 99, 100, 700):
        c = etsdm.share_timesteps(torch.full((4,), float(t), dtype=torch.float64))
        times = range(max(int(c[0]), 1), int(c[0]) + width) if t < 100 else [t]
        expected = torch.stack([plain(x, torch.full((4,), float(u))) for u in times])
        if c[0] == 0:  # t = 0 is never trained on: its place among the twenty goes to t = 1
            expected = torch.cat([expected[:1], expected])
        assert_close(net(x, c), expected.mean(0), rtol=1e-10, atol=1e-12)
