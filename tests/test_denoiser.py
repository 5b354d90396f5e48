"""denoiser.py: the conversions between eps, v and x0, and what the network receives."""

import pytest
import torch
from torch.testing import assert_close

import config
import denoiser as D
import etsdm
import schedules
from papers import alternatives
from support.cli import parse_into

LINEAR = schedules.make_schedule("linear")


def f64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def spy(answer=lambda x, c: x):
    """(a network that gives this answer, the list of the (x, c) that it receives)."""
    seen = []
    return lambda x, c: (seen.append((x, c)), answer(x, c))[1], seen


@pytest.mark.parametrize("name", schedules.SCHEDULES)
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("prediction", config.PREDICTIONS)
def test_the_true_answer_comes_back(name, continuous, prediction):
    """A network that returns the true eps, v, x0 or F must give back exactly this (x0, eps)."""
    torch.manual_seed(0)
    schedule = schedules.make_schedule(name, continuous=continuous)
    x0, eps = f64(4, 3, 2, 2), f64(4, 3, 2, 2)
    for t in (1, 37.5, torch.tensor([1, 20, 500, 999]), 1000):
        if name == "zero-terminal-snr" and prediction == "eps" and isinstance(t, int) and t == 1000:
            continue
        alpha, sigma = (c.reshape(-1, 1, 1, 1) if c.dim() else c for c in schedule.alpha_sigma(t))
        xt = alpha * x0 + sigma * eps
        d, r = 0.5, (sigma**2 + (0.5 * alpha) ** 2) ** 0.5
        skip = alpha * d**2 / r**2 * xt  # of EDM: D = c_skip x + c_out F, so F is
        truth = dict(eps=eps, x0=x0, v=alpha * eps - sigma * x0, edm=(x0 - skip) * r / (sigma * d))
        truth = truth[prediction]
        denoiser = D.Denoiser(lambda x, c, truth=truth: truth, schedule, prediction)
        got_x0, got_eps = denoiser.predict(xt, t)
        assert_close(got_x0, x0, rtol=1e-6, atol=1e-6)
        assert_close(got_eps, eps, rtol=1e-6, atol=1e-6)


def test_pixels_are_themselves():
    space, x = D.Pixels((3, 8, 8)), torch.randn(2, 3, 8, 8)
    assert space.shape == (3, 8, 8) and space.value_range == (-1.0, 1.0)
    assert space.encode(x) is x and space.decode(x) is x and space.conditioning(x) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_network_receives_the_time_input_not_t(dtype):
    net, seen = spy()
    x = torch.randn(3, 1, 2, 2, dtype=dtype)
    denoiser = D.Denoiser(net, LINEAR, time_input=etsdm.make_time_input())
    for t in (57, torch.tensor([3, 57, 570]), torch.tensor([3.5, 57.5, 570.5])):
        x0, eps = denoiser.predict(x, t)
        assert x0.dtype == eps.dtype == seen[-1][1].dtype == dtype
    assert [c.tolist() for _, c in seen] == [[40, 40, 40], [0, 40, 570], [0, 40, 570.5]]


def test_coefficients_stay_those_of_t_under_sharing():
    """E-TSDM changes the time input alone: alpha and sigma in (x - sigma eps)/alpha are t's."""
    x, eps = f64(2, 1), f64(2, 1)
    shared = D.Denoiser(lambda x, c: eps, LINEAR, time_input=etsdm.make_time_input())
    plain = D.Denoiser(lambda x, c: eps, LINEAR)
    assert_close(shared.predict(x, 57)[0], plain.predict(x, 57)[0], rtol=0, atol=0)


def test_half_precision():
    """Times are never in it; under autocast the net answers in bf16, and x0 and eps are formed in
    x's precision."""
    net, seen = spy()
    x0, _ = D.Denoiser(net, LINEAR).predict(torch.randn(2, 1, dtype=torch.bfloat16), 999)
    c = seen[0][1]
    assert c.dtype == torch.float32 and c.tolist() == [999.0, 999.0]
    assert x0.dtype == torch.bfloat16
    x0, eps = D.Denoiser(lambda x, c: x.bfloat16(), LINEAR).predict(torch.randn(2, 1), 500)
    assert x0.dtype == eps.dtype == torch.float32


def test_imported_checkpoints_count_from_zero():
    net, seen = spy()
    for share in (None, etsdm.make_time_input(100, 5)):  # shares in their count
        denoiser = D.Denoiser(net, LINEAR, time_input=D.zero_based_time(1000, share))
        for t in (1000, torch.tensor([1]), 21, 40):
            denoiser.predict(torch.randn(1, 1), t)
    assert [c.item() for _, c in seen] == [999, 0, 20, 39] + [999, 0, 20, 20]


def test_a_run_has_the_betas_that_were_asked_for():
    """Latent diffusion's, with its quadratic schedule; runs without the setting have DDPM's."""
    words = "--schedule quadratic --betas 0.0015 0.0195"
    settings = parse_into(config.Config, words.split()).settings()
    schedule = D.build_denoiser(settings).schedule
    assert_close(1 - schedule.alpha_bar(1), f64(()).fill_(0.0015))
    assert_close(1 - schedule.alpha_bar(1000) / schedule.alpha_bar(999), f64(()).fill_(0.0195))
    del settings["betas"]
    assert_close(1 - D.build_denoiser(settings).schedule.alpha_bar(1), f64(()).fill_(1e-4))


def test_unknown_prediction():
    with pytest.raises(ValueError, match="unknown prediction 'noise': use eps v x0"):
        D.Denoiser(None, LINEAR, "noise")


def test_edm_is_its_own_formulas():
    """Karras et al. 2022, table 1, in its own coordinates: the network's input, its time
    input, and x0 from its output."""
    schedule, (net, seen) = schedules.make_schedule("edm"), spy(lambda x, c: torch.sin(x))
    denoiser = D.Denoiser(net, schedule, "edm")
    x = f64(5, 3, 4, 4) * 10
    sigma = torch.tensor([0.002, 0.05, 1.0, 20.0, 80.0], dtype=torch.float64)
    x0, eps = denoiser.predict(x, schedule.t_of_lam(-sigma.log()))
    sigma = sigma[:, None, None, None]
    c_in, c_noise = (sigma**2 + 0.25) ** -0.5, sigma.log().flatten() / 4
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25).sqrt()
    assert_close(seen[0][0], c_in * x, rtol=1e-9, atol=0)
    assert_close(seen[0][1], c_noise, rtol=1e-9, atol=1e-12)
    assert_close(x0, c_skip * x + c_out * torch.sin(c_in * x), rtol=1e-9, atol=1e-12)
    assert_close(eps, (x - x0) / sigma, rtol=1e-7, atol=1e-9)


def test_edm_shares_times_in_its_grids_coordinate():
    schedule, (net, seen) = schedules.make_schedule("edm"), spy()
    shared = D.Denoiser(net, schedule, "edm", etsdm.make_time_input())
    x = f64(6, 2)
    shared.predict(x, torch.tensor([0.0, 0.3, 19.5, 20.0, 39.9, 100.0], dtype=torch.float64))
    sigma = schedule.alpha_sigma(torch.tensor([1.0, 1.0, 1.0, 20.0, 20.0, 100.0]))[1]
    assert_close(seen[0][1], sigma.log() / 4, rtol=1e-12, atol=0)
    # every schedule, also where there is no signal at all: the time input stays finite
    for name in schedules.SCHEDULES:
        d = D.Denoiser(net, schedules.make_schedule(name), "edm")
        x0, eps = d.predict(x, 1000)
        assert all(v.isfinite().all() for v in (x0, eps, seen[-1][1]))


def test_further_outputs_stand_behind_the_prediction():
    """Learned variances (guided-diffusion) and second heads (NPR-, SN-DPM)."""
    d = D.Denoiser(lambda x, c: torch.cat([x, x + 1], dim=1), LINEAR)
    x = f64(2, 3, 4, 4)
    assert_close(d.prediction_at(x, 5), x)
    assert_close(d.network_output(x, 5)[:, 3:], x + 1)
    assert_close(d.predict(x, 5)[1], x)


def test_conditioning_is_repeated_as_often_as_x():
    (net, seen), known = spy(lambda x, c: x[:, :3]), f64(2, 3, 4, 4)
    bare = D.Denoiser(net, LINEAR)
    d, x = bare.replace(conditioning=known), f64(6, 3, 4, 4)
    d.predict(x, 7)
    assert_close(seen[0][0], torch.cat([x, known.repeat(3, 1, 1, 1)], dim=1))
    assert bare.conditioning is None  # replace() leaves the denoiser it came from as it was
    x0, encoded = bare.encode(x)
    assert x0 is x and vars(encoded) == vars(bare)


@pytest.mark.parametrize("prediction", config.PREDICTIONS)
@pytest.mark.parametrize("remap", [None, "sqrt", "etsdm"])
def test_a_number_is_what_a_tensor_of_it_is(prediction, remap):
    """Sampling gives numbers, and training tensors."""
    if prediction == "edm" and remap == "sqrt":
        pytest.skip("the time input of edm is a noise level")
    time_input = {"etsdm": etsdm.make_time_input(), None: None}.get(
        remap, lambda t: alternatives.remap(t, remap)
    )
    (net, seen), x = spy(lambda x, c: x.sin() + c[:, None]), f64(3, 4)
    for schedule in (LINEAR, schedules.make_schedule("edm")):
        denoiser = D.Denoiser(net, schedule, prediction, time_input)
        for t in (73.25, 999.0):
            assert_close(denoiser.predict(x, t), denoiser.predict(x, torch.full((3,), t)))
            assert_close(seen[-2][1], seen[-1][1].contiguous())
    # another time input is another answer
    before = seen[-1][1]
    denoiser.replace(time_input=lambda t: t * 0 + 5).predict(x, 999.0)
    assert prediction == "edm" or not torch.equal(seen[-1][1], before)
