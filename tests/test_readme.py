"""README.md's Python blocks run, and do what the text promises: a schedule, a loss, a sampler."""

import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import samplers
import schedules
import toy
from denoiser import Denoiser

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def names():
    """What the blocks define, all in one namespace."""
    found = {}
    for block in re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S
    ):
        exec(compile(block, "README.md", "exec"), found)
    return found


def test_the_schedule(names):
    schedule = schedules.Schedule("sigmoid", 1000, True, *names["sigmoid_form"](1000))
    t = torch.linspace(0, 1000, 401, dtype=torch.float64)
    ab = schedule.alpha_bar(t)
    assert ab[0] == 1 and (ab.diff() < 0).all() and 0 < ab[-1] < 0.01
    assert_close(schedule.t_of_lam(schedule.lam(t[1:])), t[1:], rtol=1e-9, atol=1e-7)
    # and it samples: 2,000 draws of a Gaussian keep mean and width
    denoiser = Denoiser(toy.oracle(toy.one_gaussian(), schedule), schedule)
    x = torch.randn(2000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = samplers.sample(denoiser, x, "ddim", 200)
    assert abs(x0.mean()) < 0.05 and abs(x0.std() - 0.5) < 0.03


def test_the_loss(names):
    schedule = schedules.make_schedule("linear")
    net = torch.nn.Conv2d(3, 3, 3, padding=1)
    denoiser = Denoiser(lambda x, c: 3 * net(x), schedule)
    g = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(5, 3, 4, 4, generator=g) for _ in range(2))
    t = torch.tensor([1, 50, 300, 700, 1000])
    loss = names["huber_loss"](denoiser, x0, t, noise)
    r = (denoiser.predict(schedules.add_noise(schedule, x0, t, noise), t)[1] - noise).abs()
    assert (r > 1).any() and (r < 1).any()
    by_hand = torch.where(r < 1, r**2 / 2, r - 0.5).mean((1, 2, 3))
    assert loss.shape == (5,)
    assert_close(loss, by_hand, rtol=1e-5, atol=1e-6)
    loss.mean().backward()
    assert net.weight.grad.abs().sum() > 0


def test_the_sampler(names):
    """Its error falls with the square of the number of steps; DDIM's does not."""
    schedule = schedules.make_schedule("linear", continuous=True)
    denoiser = Denoiser(toy.oracle(toy.two_bumps(), schedule), schedule)
    x = torch.linspace(-1.5, 1.5, 12, dtype=torch.float64)[:, None]
    exact = samplers.sample(denoiser, x, "dpm-solver", 1001, "logsnr")
    calls = torch.tensor([41, 81, 161, 321], dtype=torch.float64)
    errors = torch.stack([(names["adams"](denoiser, x, int(n)) - exact).abs().max() for n in calls])
    logs = calls.log() - calls.log().mean()
    assert abs(-(logs @ errors.log() / (logs @ logs)) - 2) < 0.25
    one = samplers.sample(denoiser, x, "ddim", 321, "logsnr")
    assert (one - exact).abs().max() > 5 * errors[-1]
    start = torch.randn(3, 1)  # single precision stays so
    assert names["adams"](denoiser, start, 5).dtype == torch.float32
