"""etsdm.py against the paper's definition, written out a second time."""

import pytest
import torch
from torch.testing import assert_close

import etsdm
from etsdm import make_condition, remap, share_timesteps, unremap


def by_definition(t, interval, n):
    """f(t) = max{t_i : t_i <= t} for t < interval, else t; one number at a time, exact
    fractions."""
    from fractions import Fraction

    if t >= interval:
        return float(t)
    starts = [Fraction(interval) * i / n for i in range(n)]
    return float(max(b for b in starts if b <= Fraction(t)))


@pytest.mark.parametrize(
    "interval, n", [(100, 5), (100, 1), (100, 100), (60, 7), (1000, 10), (100, 3)]
)
def test_integers_follow_the_definition(interval, n):
    t = torch.arange(0, 1001)
    c = share_timesteps(t, interval, n)
    assert_close(
        c.double(),
        torch.tensor([by_definition(int(v), interval, n) for v in t], dtype=torch.float64),
        rtol=1e-15,
        atol=0,
    )
    assert c.dtype == (torch.int64 if interval % n == 0 else torch.float64)


def test_the_defaults_are_the_papers():
    c = share_timesteps(torch.arange(0, 103))
    assert sorted(set(c.tolist())) == [0, 20, 40, 60, 80, 100, 101, 102]
    assert c[[19, 20, 99, 100]].tolist() == [0, 20, 80, 100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 5, 7, 11])
def test_real_times_boundaries_and_idempotence(dtype, n):
    t = torch.linspace(0, 120, 4801, dtype=dtype)
    c = share_timesteps(t, 100, n)
    assert c.dtype == dtype
    assert ((c <= t) & (t - c < 100 / n + 1e-4)).all()
    assert_close(share_timesteps(c, 100, n), c, rtol=0, atol=0)
    assert len(c[t < 100].unique()) == n
    bounds = (torch.arange(n, dtype=torch.float64) * 100 / n).to(dtype)
    assert_close(
        share_timesteps(bounds, 100, n), bounds, rtol=0, atol=0
    )  # a boundary begins its part


def test_numbers_and_shapes():
    c = share_timesteps(57)
    assert c.dtype == torch.float64 and c.shape == () and c == 40
    assert share_timesteps(57.9) == 40
    t = torch.arange(24).reshape(2, 3, 4) * 10
    assert share_timesteps(t).shape == t.shape
    assert share_timesteps(t[..., ::2]).tolist() == share_timesteps(t)[..., ::2].tolist()


@pytest.mark.parametrize("name", etsdm.REMAPS)
def test_remaps_are_invertible_and_stretch_small_t(name):
    t = torch.linspace(0, 1000, 2001, dtype=torch.float64)
    c = remap(t, name)
    assert_close(unremap(c, name), t, rtol=1e-10, atol=1e-9)
    assert (c.diff() > 0).all()
    assert_close(c[[0, -1]], t[[0, -1]], rtol=0, atol=1e-9)
    assert (c[1] - c[0]) / 0.5 > 20, "one step near 0 must move the condition by much more than one"


def test_remap_values():
    assert_close(remap(250.0, "sqrt").item(), 500.0)
    # inverse of the logistic function on [m, 1 - m], by numpy's formula
    import numpy as np

    m = etsdm.MARGIN
    p = m + (1 - 2 * m) * 0.25
    logit = np.log(p / (1 - p)) / np.log((1 - m) / m)
    assert_close(remap(250.0, "inverse-sigmoid").item(), 500 * (1 + logit))


@pytest.mark.parametrize("name", etsdm.REMAPS)
@pytest.mark.parametrize("low, high", [(0, 1000), (1, 1000), (0.01, 999)])
def test_remap_quantile_is_uniform_in_the_condition(name, low, high):
    u = torch.linspace(0, 1, 501, dtype=torch.float64)
    t = etsdm.remap_quantile(u, name, low, high)
    end = torch.tensor([low, high], dtype=torch.float64)
    assert_close(t[[0, -1]], end, rtol=1e-9, atol=1e-12)
    ends = remap(end, name)
    assert_close(remap(t, name), ends[0] + u * (ends[1] - ends[0]), rtol=1e-9, atol=1e-9)
    # as a distribution: the share of t below a time is the share of f(t) below its condition
    below = (etsdm.remap_quantile((u[1:] + u[:-1]) / 2, name, low, high) < 250).double().mean()
    share = (remap(250, name) - ends[0]) / (ends[1] - ends[0])
    assert_close(below, share, rtol=0, atol=2e-3)
    assert etsdm.remap_quantile(0.5, name, low, high).shape == ()


def test_beyond_T_a_condition_is_finite():
    """Heun's churn on EDM's schedule asks beyond T."""
    for name in etsdm.REMAPS:
        assert torch.isfinite(remap(torch.tensor([1000.0, 1070.0]), name)).all()


def test_make_condition():
    assert make_condition() is None
    assert make_condition(etsdm=True)(torch.tensor([57, 570])).tolist() == [40, 570]
    assert make_condition(etsdm=True, interval=50, n=2)(49.0) == 25
    assert_close(make_condition(remap_name="sqrt", T=100)(25.0).item(), 50.0)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(etsdm=True, remap_name="sqrt"), "alternatives"),
        (dict(remap_name="cube"), "unknown remap 'cube': choose from sqrt"),
        (dict(etsdm=True, interval=2000), "longer than the 1000 timesteps"),
        (dict(etsdm=True, interval=10, n=11), "shorter than a step"),
        (dict(etsdm=True, n=0), "--etsdm-n must be a whole number"),
        (dict(etsdm=True, interval=-5, n=1), "--etsdm-interval must be above 0"),
    ],
)
def test_contradictions_are_refused_in_one_line(kwargs, words):
    with pytest.raises(ValueError, match=words) as error:
        make_condition(**kwargs)
    assert "\n" not in str(error.value)
