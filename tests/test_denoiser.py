"""denoiser.py: the conversions between eps, v and x0, and what the network is told."""

import pytest
import torch
from torch.testing import assert_close

import denoiser as D
import etsdm
import schedules

LINEAR = schedules.make_schedule("linear")


def f64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", schedules.NAMES)
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("prediction", D.PREDICTIONS)
def test_the_true_answer_comes_back(name, continuous, prediction):
    """A network that returns the true eps, v or x0 must give back exactly this (x0, eps)."""
    torch.manual_seed(0)
    schedule = schedules.make_schedule(name, continuous=continuous)
    x0, eps = f64(4, 3, 2, 2), f64(4, 3, 2, 2)
    for t in (1, 37.5, torch.tensor([1, 20, 500, 999]), 1000):
        if name == "zero-terminal-snr" and prediction == "eps" and isinstance(t, int) and t == 1000:
            continue
        a, s = schedule.coefficients(t)
        a, s = (c.reshape(-1, 1, 1, 1) if c.dim() else c for c in (a, s))
        truth = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[prediction]
        denoiser = D.Denoiser(lambda x, c, truth=truth: truth, schedule, prediction)
        got_x0, got_eps = denoiser.predict(a * x0 + s * eps, t)
        assert_close(got_x0, x0, rtol=1e-6, atol=1e-6)
        assert_close(got_eps, eps, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_is_told_the_condition_not_t(dtype):
    told = []

    def net(x, c):
        told.append(c)
        return x

    x = torch.randn(3, 1, 2, 2, dtype=dtype)
    condition = etsdm.make_condition(etsdm=True)
    denoiser = D.Denoiser(net, LINEAR, condition=condition)
    for t in (57, torch.tensor([3, 57, 570]), torch.tensor([3.5, 57.5, 570.5])):
        x0, eps = denoiser.predict(x, t)
        assert x0.dtype == eps.dtype == dtype
    assert all(c.dtype == dtype and c.shape == (3,) for c in told)
    assert told[0].tolist() == [40, 40, 40]
    assert told[1].tolist() == [0, 40, 570]
    assert told[2].tolist() == [0, 40, 570.5]


def test_coefficients_stay_those_of_t_under_sharing():
    """E-TSDM changes the condition alone: x0 = (x - s_t eps)/a_t with t's own a and s."""
    x, eps = f64(2, 1), f64(2, 1)
    shared = D.Denoiser(lambda x, c: eps, LINEAR, condition=etsdm.make_condition(etsdm=True))
    plain = D.Denoiser(lambda x, c: eps, LINEAR)
    assert_close(shared.predict(x, 57)[0], plain.predict(x, 57)[0], rtol=0, atol=0)


def test_conditions_are_never_half_precision():
    told = []
    denoiser = D.Denoiser(lambda x, c: (told.append(c), x)[1], LINEAR)
    x0, _ = denoiser.predict(torch.randn(2, 1, dtype=torch.bfloat16), 999)
    assert told[0].dtype == torch.float32 and told[0].tolist() == [999.0, 999.0]
    assert x0.dtype == torch.bfloat16


def test_half_precision_outputs_are_lifted():
    """Under autocast the net answers in bf16; x0 and eps are formed in x's precision."""
    x = torch.randn(2, 1)
    x0, eps = D.Denoiser(lambda x, c: x.bfloat16(), LINEAR).predict(x, 500)
    assert x0.dtype == eps.dtype == torch.float32


def test_imported_checkpoints_count_from_zero():
    told = []
    denoiser = D.Denoiser(lambda x, c: (told.append(c), x)[1], LINEAR, condition=D.zero_based)
    denoiser.predict(torch.randn(1, 1), 1000)
    denoiser.predict(torch.randn(1, 1), torch.tensor([1]))
    assert [c.item() for c in told] == [999, 0]


def test_unknown_prediction():
    with pytest.raises(ValueError, match="unknown prediction 'noise': choose from eps v x0"):
        D.Denoiser(None, LINEAR, "noise")
