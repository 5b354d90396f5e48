"""denoiser.py: the conversions between eps, v and x0, and what the network is told."""

import pytest
import torch
from torch.testing import assert_close

import denoiser as D
import etsdm
import schedules
import unet

LINEAR = schedules.make_schedule("linear")


def f64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", schedules.NAMES)
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("prediction", D.PREDICTIONS)
def test_the_true_answer_comes_back(name, continuous, prediction):
    """A network that returns the true eps, v, x0 or F must give back exactly this (x0, eps)."""
    torch.manual_seed(0)
    schedule = schedules.make_schedule(name, continuous=continuous)
    x0, eps = f64(4, 3, 2, 2), f64(4, 3, 2, 2)
    for t in (1, 37.5, torch.tensor([1, 20, 500, 999]), 1000):
        if name == "zero-terminal-snr" and prediction == "eps" and isinstance(t, int) and t == 1000:
            continue
        a, s = schedule.coefficients(t)
        a, s = (c.reshape(-1, 1, 1, 1) if c.dim() else c for c in (a, s))
        d, r = 0.5, (s**2 + (0.5 * a) ** 2) ** 0.5
        skip = a * d**2 / r**2 * (a * x0 + s * eps)  # of EDM: D = c_skip x + c_out F, so F is
        truth = {"eps": eps, "x0": x0, "v": a * eps - s * x0, "edm": (x0 - skip) * r / (s * d)}
        truth = truth[prediction]
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


def test_edm_is_its_own_formulas():
    """Karras et al. 2022, table 1, in its own coordinates: what the network is shown, what it is
    told, and what is made of its answer."""
    schedule, seen = schedules.make_schedule("edm"), []

    def net(x, c):
        seen.append((x, c))
        return torch.sin(x)

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


def test_edm_shares_conditions_in_its_grids_coordinate():
    schedule, told = schedules.make_schedule("edm"), []

    def net(x, c):
        told.append(c)
        return x

    shared = D.Denoiser(net, schedule, "edm", etsdm.make_condition(etsdm=True))
    x = f64(6, 2)
    shared.predict(x, torch.tensor([0.0, 0.3, 19.5, 20.0, 39.9, 100.0], dtype=torch.float64))
    sigma = schedule.coefficients(torch.tensor([1.0, 1.0, 1.0, 20.0, 20.0, 100.0]))[1]
    assert_close(told[0], sigma.log() / 4, rtol=1e-12, atol=0)
    # every schedule, also where there is no signal at all: what is told stays finite
    for name in schedules.NAMES:
        d = D.Denoiser(net, schedules.make_schedule(name), "edm")
        x0, eps = d.predict(x, 1000)
        assert x0.isfinite().all() and eps.isfinite().all() and told[-1].isfinite().all()


def test_further_outputs_stand_behind_the_prediction():
    """Learned variances (guided-diffusion) and second heads (NPR-, SN-DPM)."""
    d = D.Denoiser(lambda x, c: torch.cat([x, x + 1], dim=1), LINEAR)
    x = f64(2, 3, 4, 4)
    assert_close(d.output(x, 5), x)
    assert_close(d.outputs(x, 5)[:, 3:], x + 1)
    assert_close(d.predict(x, 5)[1], x)


def test_what_is_given_is_seen_beside_x_as_often_as_x_repeats():
    seen = []

    def net(x, c):
        seen.append(x)
        return x[:, :3]

    given = f64(2, 3, 4, 4)
    bare = D.Denoiser(net, LINEAR)
    d, x = bare.but(given=given), f64(6, 3, 4, 4)
    d.predict(x, 7)
    assert_close(seen[0], torch.cat([x, given.repeat(3, 1, 1, 1)], dim=1))
    assert bare.given is None  # but() leaves the denoiser it came from as it was
    assert bare.on(x) == (x, bare)


def test_imported_weights_through_the_path_of_sample_py(gold, tmp_path, monkeypatch):
    """guided-diffusion's numbers, by load_guided_diffusion: told t - 1, and with a learned variance
    left out."""
    monkeypatch.setitem(unet.PRESETS, "gold", gold.size)
    state, x, numbers = gold.state, gold.x, gold.numbers
    torch.save(state, tmp_path / "plain.pt")
    for key in ("out.2.weight", "out.2.bias"):  # learn_sigma: three more outputs, behind
        state[key] = torch.cat([state[key], torch.randn_like(state[key])])
    torch.save(state, tmp_path / "learn_sigma.pt")
    for name in ("plain.pt", "learn_sigma.pt"):
        d = D.load_guided_diffusion(tmp_path / name, "gold")
        assert not d.net.training and d.space.shape == (3, 16, 16) and d.prediction == "eps"
        x0, eps = d.predict(x, torch.tensor(numbers["timesteps"]) + 1)
        flat = eps.flatten()
        for got, expected in ((flat[:8], numbers["first8"]), (flat[-8:], numbers["last8"])):
            assert_close(got, torch.tensor(expected), rtol=1e-4, atol=1e-5)
        a, s = (k[:, None, None, None] for k in LINEAR.coefficients(torch.tensor([11, 501])))
        assert_close(a * x0 + s * eps, x.double(), rtol=1e-4, atol=1e-4)


FIRST, LAST = "input_blocks.0.0.weight", "out.2.weight"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<html>not found</html>", "a web page"),
        ({"x": torch.zeros(2)}, "not a guided-diffusion U-Net"),
        ({"step": 3}, "no state dict of a network: it holds 1 entries: step"),
        (None, "does not fit the preset cifar10"),
        ({FIRST: torch.zeros(128, 3, 3, 3), "out.2.qkv_proj.weight": torch.zeros(9)}, "classifier"),
        ({FIRST: torch.tensor(1.0), LAST: torch.tensor(1.0)}, "its .* is not a convolution's"),
        ({FIRST: torch.zeros(8, 3, 3, 3), LAST: torch.zeros(0)}, "its .* is not a convolution's"),
        ({FIRST: torch.zeros(1, 0, 3, 3), LAST: torch.zeros(3, 1, 3, 3)}, "has 0 channels in"),
        (
            {FIRST: torch.zeros(1, 3, 3, 3), LAST: torch.zeros(3, 1, 3, 3), 5: torch.zeros(())},
            "fit",
        ),
        ({1: torch.zeros(2), (2, 3): torch.zeros(2)}, "weights.pt: not a guided-diffusion U-Net"),
        ({}, "no state dict of a network"),
        ([torch.zeros(2)], "no state dict of a network: it holds a list"),
    ],
)
def test_files_that_are_no_such_weights(tmp_path, content, words):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is None:
        state = unet.UNet(16, channels=32, head_channels=None).state_dict()
        theirs = {"input_blocks.0.0.weight": state["input_blocks.0.0.weight"]}
        torch.save({**theirs, "out.2.weight": state["out_conv.weight"]}, path)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=words) as caught:
        D.load_guided_diffusion(path, "cifar10")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("prediction", D.PREDICTIONS)
@pytest.mark.parametrize("remap", [None, "sqrt", "etsdm"])
def test_a_number_is_what_a_tensor_of_it_is(prediction, remap):
    """Numbers are looked up, tensors computed: sampling and training must agree on both."""
    if prediction == "edm" and remap == "sqrt":
        pytest.skip("edm tells noise levels")
    condition = etsdm.make_condition(
        remap == "etsdm", remap_name=remap if remap == "sqrt" else None
    )
    told = []

    def net(x, c):
        told.append(c)
        return x.sin() + c[:, None]

    x = f64(3, 4)
    for schedule in (LINEAR, schedules.make_schedule("edm")):
        denoiser = D.Denoiser(net, schedule, prediction, condition)
        for t in (73.25, 999.0):
            for one, many in zip(
                denoiser.predict(x, t), denoiser.predict(x, torch.full((3,), t)), strict=True
            ):
                assert_close(one, many)
            assert_close(told[-2], told[-1].contiguous())
    # another condition on the same network is another answer, whatever is kept
    before = told[-1]
    denoiser.but(condition=lambda t: t * 0 + 5).predict(x, 999.0)
    assert prediction == "edm" or not torch.equal(told[-1], before)
