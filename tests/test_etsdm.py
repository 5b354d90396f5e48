"""etsdm.py against the paper's definition, written out a second time."""

from fractions import Fraction

import pytest
import torch
from conftest import refused
from torch.testing import assert_close

import etsdm
from etsdm import share_timesteps


def by_definition(t, interval, n):
    """f(t) = max{t_i : t_i <= t} for t < interval, else t; one number at a time, exact
    fractions."""
    if t >= interval:
        return float(t)
    starts = [Fraction(interval) * i / n for i in range(n)]
    return float(max(b for b in starts if b <= Fraction(t)))


@pytest.mark.parametrize(
    "interval, n", [(100, 5), (100, 1), (100, 100), (60, 7), (1000, 10), (100, 3)]
)
def test_integers_follow_the_definition(interval, n):
    c = share_timesteps(torch.arange(0, 1001), interval, n)
    expected = [by_definition(t, interval, n) for t in range(1001)]
    assert_close(c.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)
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
    assert_close(share_timesteps(bounds, 100, n), bounds, rtol=0, atol=0)  # it begins its part


def test_numbers_and_shapes():
    c = share_timesteps(57)
    assert c.dtype == torch.float64 and c.shape == () and c == 40
    assert share_timesteps(57.9) == 40
    t = torch.arange(24).reshape(2, 3, 4) * 10
    assert share_timesteps(t).shape == t.shape
    assert share_timesteps(t[..., ::2]).tolist() == share_timesteps(t)[..., ::2].tolist()

    assert etsdm.make_time_input()(torch.tensor([57, 570])).tolist() == [40, 570]
    assert etsdm.make_time_input(50, 2)(49.0) == 25


@pytest.mark.parametrize(
    "interval, n, words",
    [
        (2000, 5, "--etsdm-interval must be above 0 and at most 1000 timesteps, not 2000"),
        (-5, 1, "--etsdm-interval must be above 0"),
        (float("nan"), 1, "--etsdm-interval must be above 0"),
        (float("inf"), 1, "--etsdm-interval must be above 0"),
        (10, 11, "--etsdm-n must be a whole number from 1 to 10,"),
        (100, 0, "--etsdm-n must be a whole number"),
        (100, 2.5, "--etsdm-n must be a whole number"),
    ],
)
def test_errors_begin_with_the_flag(interval, n, words):
    refused(f"^{words}", etsdm.check_sharing, interval, n, 1000)
    etsdm.check_sharing(10, 10, 1000)


@pytest.mark.parametrize("interval, n", [(100, 0), (100, 2.5), (0, 1)])
def test_share_timesteps_rejects_what_it_cannot_share(interval, n):
    with pytest.raises(ValueError, match="interval > 0 and a whole number n >= 1"):
        share_timesteps(5, interval, n)
