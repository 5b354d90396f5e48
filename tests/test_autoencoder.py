"""autoencoder.py against torch.distributions, against its own pieces, and on images to learn."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from papers import autoencoder
from support import checkpoint
from support.cli import parse_into
import data
import metrics
from conftest import SMALL as FLAGS

SMALL = dict(image_size=8, width=8, mult=(1, 2), latent_channels=2, norm_groups=4)


def small(seed=0, **changes):
    """A small float64 network whose zero-initialised layers got values: every path contributes."""
    torch.manual_seed(seed)
    net = autoencoder.Autoencoder(**{**SMALL, **changes})
    for p in net.parameters():
        if not p.any():
            p.data.normal_(0, 0.05)
    return net.double()


def inputs(net, n=4, seed=0, channels=3, size=8):
    g = torch.Generator().manual_seed(seed)
    images = torch.rand(n, channels, size, size, generator=g, dtype=torch.float64) * 2 - 1
    return images, torch.randn(n, *net.latent_shape, generator=g, dtype=torch.float64)


class Fixed(nn.Module):
    """Answers what it was given: a network that is nothing but its mean and logvar."""

    def __init__(self, mean, logvar):
        super().__init__()
        self.mean, self.logvar = nn.Parameter(mean), nn.Parameter(logvar)

    def forward(self, images, noise):
        return torch.zeros_like(images), self.mean, self.logvar


# ---- the loss


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


def test_kl_keeps_its_digits_near_the_prior():
    logvar = torch.full((1, 1, 2, 2), 1e-3)  # exp(l) - 1 - l in float32 has three digits left
    _, _, kl = autoencoder.loss(Fixed(logvar * 0, logvar), torch.zeros(1, 1, 4, 4), None)
    assert_close(kl.item(), (math.expm1(1e-3) - 1e-3) / 2, rtol=1e-3, atol=0)


def test_gradients_of_a_whole_network_are_those_of_finite_differences():
    net = small()
    images, noise = inputs(net, 2)
    parameters = list(net.parameters())
    total = autoencoder.loss(net, images, noise, kl_weight=0.1)[0].sum()
    gradients = torch.autograd.grad(total, parameters)
    assert all(g.abs().max() > 0 for g in gradients), "every parameter takes part"
    directions = [torch.randn_like(p) for p in parameters]
    ends = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
            ends.append(autoencoder.loss(net, images, noise, kl_weight=0.1)[0].sum())
            for p, d in zip(parameters, directions, strict=True):
                p -= step * d
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    assert_close((ends[0] - ends[1]) / 2e-5, expected, rtol=1e-6, atol=1e-8)


def test_where_the_log_variance_is_least_noise_costs_what_the_header_says():
    # A linear decoder: the error that noise adds is known, and logvar can be put where L is least.
    torch.manual_seed(0)
    D, pixels, weight = 6, 20, 0.02
    mean = torch.randn(1, D).double()
    logvar = torch.zeros(1, D, dtype=torch.float64, requires_grad=True)
    decoder = torch.randn(pixels, D).double() * torch.tensor([0.01, 0.03, 0.1, 0.3, 1, 3.0])
    slope = decoder.square().sum(0) / pixels  # a_i: error per variance
    for _ in range(200):  # a s + weight/(2 D) (s - log s) is least where s = q/(a + q)
        logvar.grad = None
        added = (slope * logvar.exp()).sum()
        kl = (mean.square() + torch.expm1(logvar) - logvar).mean() / 2
        (added + weight * kl).backward()
        logvar.data -= logvar.grad / (slope * logvar.exp() + weight / (2 * D) * logvar.exp()).data
    assert_close(added.item(), weight / 2 * (1 - logvar.exp()).mean().item())
    assert added < weight / 2


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
    assert net.decode(mean).shape == images.shape
    assert net(images, noise)[0].shape == images.shape
    blocks_of = [
        sum(isinstance(m, autoencoder.ResBlock) for m in half.modules())
        for half in (net.encoder, net.decoder)
    ]
    assert blocks_of == [blocks * len(mult) + 2] * 2


def test_defaults_are_a_quarter_per_side():
    assert autoencoder.Autoencoder(32).latent_shape == (4, 8, 8)


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(image_size=30), "30 cannot be halved 2 times: use a multiple of 4"),
        (dict(image_size=32, width=20), "20 channels times .* do not divide into 8 groups"),
        (dict(image_size=32, mult=(1, 0.5), width=24), "do not divide into 8 groups"),
    ],
)
def test_errors_are_one_line(kwargs, words):
    with pytest.raises(ValueError, match=words) as error:
        autoencoder.Autoencoder(**kwargs)
    assert "\n" not in str(error.value)


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
    assert all(
        x.isfinite().all() for x in autoencoder.loss(net.float(), images.float(), noise.float())
    )


def test_images_do_not_see_their_batch_mates():
    net = small()
    images, noise = inputs(net, 5)
    order = torch.tensor([3, 1, 4, 0, 2])
    whole = autoencoder.loss(net, images, noise)
    for part, turned, alone in zip(
        whole,
        autoencoder.loss(net, images[order], noise[order]),
        autoencoder.loss(net, images[:1], noise[:1]),
        strict=True,
    ):
        assert_close(turned, part[order])
        assert_close(alone, part[:1])


def test_attention_is_softmax_of_products():
    torch.manual_seed(0)
    layer = autoencoder.Attention(8, None, 4).double()
    nn.init.normal_(layer.proj.weight)
    x = torch.randn(2, 8, 3, 3).double()
    flat = layer.qkv(layer.norm(x)).flatten(2)  # (B, 3 C, N)
    q, k, v = flat[:, :8], flat[:, 8:16], flat[:, 16:]
    weights = torch.softmax(torch.einsum("bcn,bcm->bnm", q, k) / 8**0.5, dim=2)
    h = torch.einsum("bnm,bcm->bcn", weights, v).reshape(x.shape)
    assert_close(layer(x), x + layer.proj(h))


def test_every_pixel_reaches_every_latent():
    net = small(mult=(1, 1), image_size=16)
    images, _ = inputs(net, 1, size=16)
    other = images.clone()
    other[:, :, 0, 0] *= -1  # too far for the convolutions alone: attention carries it
    changed = (net.encode(images)[0] - net.encode(other)[0]).abs()
    assert (changed > 0).all()


def test_training_is_one_call_of_the_module():
    """What DistributedDataParallel needs: it joins gradients of forward, and of nothing else."""

    class Wrapper(nn.Module):  # knows neither encode nor decode, as DDP does not
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, *args):
            self.calls += 1
            return self.module(*args)

    net = Wrapper(small())
    images, noise = inputs(net.module)
    autoencoder.loss(net, images, noise)[0].mean().backward()
    assert net.calls == 1 and all(p.grad is not None for p in net.parameters())


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


# ---- moments


def test_moments_are_those_of_all_latents_whatever_the_batches():
    net = small()
    images = inputs(net, 11)[0]
    z = net.encode(images)[0].detach().transpose(0, 1).flatten(1)
    expected = z.mean(1), z.std(1, correction=0)
    for sizes in ([11], [4, 4, 3], [1] * 11):
        got = autoencoder.moments(net, iter(images.split(sizes)))
        assert_close(got, expected)
    single = autoencoder.moments(net.float(), [images.float()])
    assert all(x.dtype == torch.float64 and not x.requires_grad for x in single)
    assert_close(single, expected, rtol=1e-4, atol=1e-5)
    shift, scale = (x[:, None, None] for x in expected)
    normal = (net.double().encode(images)[0] - shift) / scale
    assert_close(normal.mean((0, 2, 3)), torch.zeros(2).double(), rtol=0, atol=1e-9)
    assert_close(normal.square().mean((0, 2, 3)), torch.ones(2).double())


def test_moments_of_nothing():
    with pytest.raises(ValueError, match="no images"):
        autoencoder.moments(small(), [])


# ---- it learns


def psnr(a, b):
    return 10 * torch.log10(4 / (a - b).square().mean()).item()  # the range of [-1, 1] is 2


def train(net, images, steps, kl_weight=1e-4, lr=2e-3, batch=4):
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        x = images[torch.randperm(len(images), generator=g)[:batch]]
        noise = torch.randn(len(x), *net.latent_shape, generator=g)
        optimizer.zero_grad()
        autoencoder.loss(net, x, noise, kl_weight)[0].mean().backward()
        optimizer.step()


def shapes_and_blurred(n, numbers):
    """n shapes of 16x16, and the same averaged to 3 x side x side >= numbers, and enlarged."""
    shapes = data.load("shapes", 16, 3)
    images = data.to_float(torch.stack([shapes[i] for i in range(n)]))
    side = math.ceil((numbers / 3) ** 0.5)
    return images, F.interpolate(F.adaptive_avg_pool2d(images, side), 16, mode="bicubic")


@pytest.mark.slow
def test_it_learns_more_than_a_blur_of_as_many_numbers_holds():
    torch.manual_seed(0)
    net = autoencoder.Autoencoder(16, width=16, mult=(1, 2), latent_channels=1)
    images, blurred = shapes_and_blurred(4, math.prod(net.latent_shape))
    train(net, images, 120)
    with torch.no_grad():
        learnt = psnr(net.decode(net.encode(images)[0]), images)
    assert learnt > psnr(blurred, images) + 2, (learnt, psnr(blurred, images))


@pytest.mark.slow
def test_on_shapes_it_has_not_seen_noise_costs_what_the_header_says():
    torch.manual_seed(0)
    net, weight = autoencoder.Autoencoder(16, width=16, mult=(1, 2)), 4e-3
    images, blurred = shapes_and_blurred(512, math.prod(net.latent_shape))
    train(net, images[64:], 600, weight, batch=16)
    unseen, g = images[:64], torch.Generator().manual_seed(1)
    with torch.no_grad():
        mean, logvar = net.encode(unseen)
        without = (net.decode(mean) - unseen).square().mean()
        noises = torch.randn(8, *mean.shape, generator=g)
        outs = torch.stack([net(unseen, noise)[0] for noise in noises])
        noisy = (outs - unseen).square().mean()
    expected = weight / 2 * (1 - logvar.exp()).mean()
    learnt, blur = psnr(net.decode(mean), unseen), psnr(blurred[:64], unseen)
    std = autoencoder.moments(net, [unseen])[1].tolist()
    print(
        f"PSNR {learnt:.1f} dB, blurred {blur:.1f}; latent std {std}; noise costs "
        f"{noisy - without:.5f}, expected {expected:.5f}, of {noisy:.5f}"
    )
    assert learnt > blur + 3
    assert_close(noisy - without, expected, rtol=0.3, atol=0)
    assert all(0.1 < s < 1.5 for s in std)


# ---- the programs


def test_it_trains_in_two_parts_as_in_one(runs):
    words = ["train", "--image-size", "16", *FLAGS]
    autoencoder.main([*words, "--steps", "5", "--name", "whole"])
    autoencoder.main([*words, "--steps", "3", "--name", "parts"])
    autoencoder.main([*words, "--steps", "5", "--name", "parts"])
    whole, parts = (
        checkpoint.load_checkpoint(f"runs/{name}/checkpoint.pt") for name in ("whole", "parts")
    )
    for key in ("net", "ema", "optimizer"):
        assert_close(parts[key], whole[key], rtol=0, atol=0)
    assert Path("runs/whole/samples/0000005.png").exists()


def test_reconstructions_and_their_psnr(runs, capsys):
    """Against encoding and decoding by hand."""
    autoencoder.main("reconstruct code shapes -n 5 --batch-size 2".split())
    command = capsys.readouterr().out.split("next: python metrics.py ")[1].split()
    assert command == ["psnr", "reconstructed", "reconstructed-original"]
    state = checkpoint.load_checkpoint("runs/code/checkpoint.pt")
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
    expected = metrics.psnr(back, originals).mean()
    assert float(capsys.readouterr().out.split("PSNR ")[1].split(" dB")[0]) == pytest.approx(
        expected.item(), abs=0.01
    )


def test_what_the_programs_refuse(runs):
    Path("full").mkdir()
    Path("full/mine.txt").write_text("kept")
    for words, message in (
        ("reconstruct code", "RUN and IMAGES are both needed"),
        ("reconstruct code shapes -n 0", "--num must be at least 1, not 0"),
        ("reconstruct code shapes --out full", "--out full: full exists already"),
        ("reconstruct plain shapes", "plain is not an autoencoder"),
        ("reconstruct none shapes", "no run none"),
        ("reconstruct latent shapes", "latent is not an autoencoder"),
        ("train --downsamplings 9", "--downsamplings must be 1 to 5, not 9"),
        ("train --image-size 30", "--image-size must be a multiple of 4 for --downsamplings 2"),
        ("train --kl-weight -1", "--kl-weight must be 0 or more"),
        ("train --latent-channels 0", "--latent-channels must be at least 1"),
        ("paint", "paint: the programs are train and reconstruct"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=f"^{message}") as caught:
            autoencoder.main(words.split())
        assert "\n" not in str(caught.value)
    for words in ("train --schedule linear", "train --sa-k 2", "train --etsdm"):
        with pytest.raises(SystemExit):  # they are not flags of this program
            autoencoder.main(words.split())
    assert Path("full/mine.txt").read_text() == "kept"


def test_width_is_a_flag():
    config = parse_into(autoencoder.AutoencoderConfig, ["--width", "64", "--image-size", "8"])
    net = autoencoder.Autoencoder(**config.size())
    assert net.encoder[0].out_channels == 64
    with pytest.raises(ValueError, match="^--width must be a multiple of 8, not 36"):
        parse_into(autoencoder.AutoencoderConfig, ["--width", "36"])
