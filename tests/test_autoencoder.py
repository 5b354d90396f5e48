"""autoencoder.py against torch.distributions, against its own pieces, and on images to learn."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import refused, saved
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

import data
import metrics
from papers import autoencoder
from support.cli import parse_into

SMALL = dict(image_size=8, width=8, mult=(1, 2), latent_channels=2, norm_groups=4)


def small(seed=0, **changes):
    """A small float64 network whose zero-initialised layers got values: every path contributes."""
    torch.manual_seed(seed)
    net = autoencoder.Autoencoder(**{**SMALL, **changes})
    for p in net.parameters():
        if not p.any():
            p.data.normal_(0, 0.05)
    return net.double()


def inputs(net, n=4, size=8):
    g = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, size, size, generator=g, dtype=torch.float64) * 2 - 1
    return images, torch.randn(n, *net.latent_shape, generator=g, dtype=torch.float64)


class Fixed(nn.Module):
    """Answers what it was given: a network that is nothing but its mean and logvar."""

    def __init__(self, mean, logvar):
        super().__init__()
        self.mean, self.logvar = nn.Parameter(mean), nn.Parameter(logvar)

    def forward(self, images, noise):
        return torch.zeros_like(images), self.mean, self.logvar


def test_kl_is_that_of_torch_distributions_and_so_is_its_gradient():
    torch.manual_seed(0)
    net = Fixed(torch.randn(5, 2, 3, 3).double(), 3 * torch.randn(5, 2, 3, 3).double())
    images = torch.rand(5, 3, 6, 6).double()
    total, reconstruction, kl = autoencoder.loss(net, images, None, kl_weight=0.3)
    plain = kl_divergence(Normal(net.mean, torch.exp(net.logvar / 2)), Normal(0.0, 1.0))
    assert_close(kl, plain.mean((1, 2, 3)))
    assert_close(reconstruction, images.square().mean((1, 2, 3)))
    assert_close(total, reconstruction + 0.3 * kl)
    kl.sum().backward()  # per latent, of 18 of them: m and (exp(l) - 1)/2
    assert_close(net.mean.grad, net.mean.detach() / 18)
    assert_close(net.logvar.grad, (net.logvar.detach().exp() - 1) / 36)
    logvar = torch.full((1, 1, 2, 2), 1e-3)  # exp(l) - 1 - l in float32 has three digits left
    _, _, kl = autoencoder.loss(Fixed(logvar * 0, logvar), torch.zeros(1, 1, 4, 4), None)
    assert_close(kl.item(), (math.expm1(1e-3) - 1e-3) / 2, rtol=1e-3, atol=0)


# ---- the network


@pytest.mark.parametrize(
    "size, channels, mult, latent, shape",
    [
        (8, 1, (1,), 3, (3, 8, 8)),
        (8, 3, (1, 2), 2, (2, 4, 4)),
        (12, 3, (2, 1, 3), 5, (5, 3, 3)),
        (16, 1, (1, 1, 2, 2), 4, (4, 2, 2)),
    ],
)
@pytest.mark.parametrize("blocks", [1, 2])
def test_shapes(size, channels, mult, latent, shape, blocks):
    net = autoencoder.Autoencoder(size, channels, 8, mult, latent, blocks, norm_groups=4)
    assert net.latent_shape == shape and all(type(n) is int for n in net.latent_shape)
    images, noise = torch.rand(2, channels, size, size), torch.randn(2, *shape)
    mean, logvar = net.encode(images)
    assert mean.shape == logvar.shape == (2, *shape)
    assert net.decode(mean).shape == net(images, noise)[0].shape == images.shape
    for half in (net.encoder, net.decoder):
        count = sum(isinstance(m, autoencoder.Block) for m in half.modules())
        assert count == blocks * len(mult) + 2
    assert autoencoder.Autoencoder(32).latent_shape == (4, 8, 8)  # a quarter per side


@pytest.mark.parametrize(
    "sizes, words",
    [
        (dict(image_size=30), "30 cannot be halved 2 times: use a multiple of 4"),
        (dict(image_size=32, width=20), "20 channels times .* do not divide into 8 groups"),
        (dict(image_size=32, mult=(1, 0.5), width=24), "do not divide into 8 groups"),
    ],
)
def test_errors_are_one_line(sizes, words):
    refused(words, autoencoder.Autoencoder, **sizes)


def test_forward_decodes_mean_plus_std_times_noise():
    net = small()
    images, noise = inputs(net)
    mean, logvar = net.encode(images)
    assert logvar.std() > 0.01
    out, m, v = net(images, noise)
    assert_close((m, v), (mean, logvar), rtol=0, atol=0)
    assert_close(out, net.decode(mean + torch.exp(logvar / 2) * noise), rtol=0, atol=0)
    assert_close(net(images, 0 * noise)[0], net.decode(mean), rtol=0, atol=0)
    assert (out - net.decode(mean)).abs().max() > 1e-3


def test_log_variance_is_clamped():
    net = small()
    images, noise = inputs(net)
    with torch.no_grad():
        net.encoder[-1].bias[2:] = torch.tensor([500.0, -500.0])
    logvar = net.encode(images)[1]
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all()
    terms = autoencoder.loss(net.float(), images.float(), noise.float())
    assert all(x.isfinite().all() for x in terms)


def test_images_do_not_see_their_batch_mates():
    net = small()
    images, noise = inputs(net, 5)
    order = torch.tensor([3, 1, 4, 0, 2])
    whole = autoencoder.loss(net, images, noise)
    turned = autoencoder.loss(net, images[order], noise[order])
    alone = autoencoder.loss(net, images[:1], noise[:1])
    assert_close(turned, tuple(x[order] for x in whole))
    assert_close(alone, tuple(x[:1] for x in whole))


def test_every_pixel_reaches_every_latent():
    net = small(mult=(1, 1), image_size=16)
    images, _ = inputs(net, 1, size=16)
    other = images.clone()
    other[:, :, 0, 0] *= -1  # too far for the convolutions alone: attention carries it
    assert ((net.encode(images)[0] - net.encode(other)[0]).abs() > 0).all()


def test_training_is_one_call_of_the_module():
    """What DistributedDataParallel needs: it joins gradients of forward, and of nothing else.
    Every parameter takes part."""

    class Wrapper(nn.Module):  # knows neither encode nor decode, as DDP does not
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args):
            self.calls += 1
            return self.module(*args)

    net = Wrapper(small())
    autoencoder.loss(net, *inputs(net.module))[0].mean().backward()
    assert net.calls == 1 and all(p.grad.abs().max() > 0 for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_leaves_the_callers_precision(dtype):
    net = small().to(dtype)
    images, noise = (x.to(dtype) for x in inputs(net))
    expected = autoencoder.loss(net, images, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = autoencoder.loss(net, images, noise)
        outputs = net(images, noise)
    assert all(x.dtype == dtype for x in (*got, *outputs))
    assert_close(got, expected, rtol=0.05, atol=0.01)


def test_moments_are_those_of_all_latents_whatever_the_batches():
    net = small()
    images = inputs(net, 11)[0]
    z = net.encode(images)[0].detach().transpose(0, 1).flatten(1)
    expected = z.mean(1), z.std(1, correction=0)
    for sizes in ([11], [4, 4, 3], [1] * 11):
        assert_close(autoencoder.moments(net, iter(images.split(sizes))), expected)
    single = autoencoder.moments(net.float(), [images.float()])
    assert all(x.dtype == torch.float64 and not x.requires_grad for x in single)
    assert_close(single, expected, rtol=1e-4, atol=1e-5)
    refused("no images", autoencoder.moments, net, [])


# ---- it learns


def psnr(a, b):
    return 10 * torch.log10(4 / (a - b).square().mean()).item()  # the range of [-1, 1] is 2


@pytest.mark.slow
def test_on_shapes_it_has_not_seen_noise_costs_what_the_header_says():
    """And it learns more than a blur of as many numbers holds."""
    torch.manual_seed(0)
    net, weight, steps = autoencoder.Autoencoder(16, width=16, mult=(1, 2)), 4e-3, 600
    shapes = data.load("shapes", 16, 3)
    images = data.to_float(torch.stack([shapes[i] for i in range(512)]))
    side = math.ceil((math.prod(net.latent_shape) / 3) ** 0.5)
    g, optimizer = torch.Generator().manual_seed(0), torch.optim.Adam(net.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        x = images[64 + torch.randperm(448, generator=g)[:16]]
        noise = torch.randn(16, *net.latent_shape, generator=g)
        optimizer.zero_grad()
        autoencoder.loss(net, x, noise, weight)[0].mean().backward()
        optimizer.step()
    unseen, g = images[:64], torch.Generator().manual_seed(1)
    blurred = F.interpolate(F.adaptive_avg_pool2d(unseen, side), 16, mode="bicubic")
    with torch.no_grad():
        mean, logvar = net.encode(unseen)
        without = (net.decode(mean) - unseen).square().mean()
        noises = torch.randn(8, *mean.shape, generator=g)
        outs = torch.stack([net(unseen, noise)[0] for noise in noises])
        noisy = (outs - unseen).square().mean()
    expected = weight / 2 * (1 - logvar.exp()).mean()
    learnt, blur = psnr(net.decode(mean), unseen), psnr(blurred, unseen)
    std = autoencoder.moments(net, [unseen])[1].tolist()
    print(
        f"PSNR {learnt:.1f} dB, blurred {blur:.1f}; latent std {std}; noise costs "
        f"{noisy - without:.5f}, expected {expected:.5f}, of {noisy:.5f}"
    )
    assert learnt > blur + 3
    assert_close(noisy - without, expected, rtol=0.3, atol=0)
    assert all(0.1 < s < 1.5 for s in std)


# ---- the programs (resuming: test_systems.py; refusals: test_refusals.py)


def test_a_folder_without_a_name(here):
    config = autoencoder.ReconstructConfig(out=Path("."))
    assert config.originals() == here.with_name(f"{here.name}-original")


def test_reconstructions_and_their_psnr(runs, capsys):
    """Against encoding and decoding by hand."""
    autoencoder.main("reconstruct code shapes -n 5 --batch-size 2".split())
    command = capsys.readouterr().out.split("next: python metrics.py ")[1].split()
    assert command == ["psnr", "reconstructed", "reconstructed-original"]
    state = saved("code")
    net = autoencoder.Autoencoder(**state["settings"]["autoencoder"])
    net.load_state_dict(state["ema"])
    shapes = data.load("shapes", 16, 3)
    originals = torch.stack([shapes[i] for i in range(5)])
    back = data.to_uint8(net.eval().decode(net.encode(data.to_float(originals))[0]).detach())
    for name, images, off in (("reconstructed", back, 1), ("reconstructed-original", originals, 0)):
        written = data.load(name, None, 3)
        written = torch.stack([written[i] for i in range(5)])
        assert_close(written.int(), images.int(), rtol=0, atol=off)
    metrics.main(command)
    score = float(capsys.readouterr().out.split("PSNR ")[1].split(" dB")[0])
    assert score == pytest.approx(metrics.psnr(back, originals).mean().item(), abs=0.01)


def test_width_is_a_flag():
    words = ["--width", "64", "--image-size", "8"]
    net = autoencoder.Autoencoder(**parse_into(autoencoder.AutoencoderConfig, words).size())
    assert net.encoder[0].out_channels == 64
    refused("^--width must be a multiple of 8", autoencoder.main, ["train", "--width", "36"])
