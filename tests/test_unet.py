"""unet.py against published parameter counts and a plainly written attention. (Reference outputs:
test_checkpoints.py.)"""

import pytest
import torch
from torch.testing import assert_close

import unet

SMALL = dict(
    image_size=16,
    channels=32,
    channel_mult=(1, 2),
    res_blocks=1,
    attention_resolutions=(8,),
    head_channels=32,
)


def awake(net, seed=0):
    """The zero-initialised layers get values, so that every path contributes."""
    g = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        if not p.any():
            p.data.normal_(0, 0.05, generator=g)
    return net.eval()


def sizes(**size):
    """(number of parameters, number of entries of the state)."""
    with torch.device("meta"):
        net = unet.UNet(**size)
    return sum(p.numel() for p in net.parameters()), len(net.state_dict())


def test_parameter_counts_of_the_papers():
    """Their numbers, from their settings."""
    counts = {name: sizes(**size) for name, size in unet.PRESETS.items()}
    # SA's state has 328: three 1x1 layers for q, k, v
    assert counts["cifar10"] == (35_746_307, 328 - 2 * 2 * 6)
    assert counts["celeba64"][0] == 78_700_803
    assert counts["celebahq256"][0] == 113_673_219
    assert counts["ffhq256"] == (138_286_467, 566)
    assert counts["ffhq256-large"][0] == 725_956_227
    text = unet.describe()
    assert all(name in text for name in unet.PRESETS) and "35,746,307" in text


def test_parameter_counts_of_variants():
    """E-TSDM's table: which settings give which count is how its misprint was resolved."""
    for changes, count in (
        (dict(scale_shift=False), 131_654_403),
        (dict(attention_resolutions=(16,)), 131_709_827),
        (dict(resblock_updown=False), 125_371_651),
        (dict(scale_shift=False, resblock_updown=False), 120_249_859),
    ):
        assert sizes(**unet.PRESETS["ffhq256"] | changes)[0] == count


@pytest.mark.parametrize("head_channels", [None, 16])
def test_attention_is_the_formula(head_channels):
    """softmax(q kT / sqrt d) v with explicit loops over heads, from the [head][q, k, v][d]
    layout."""
    torch.manual_seed(0)
    layer = awake(unet.Attention(32, head_channels, 8)).double()
    x = torch.randn(2, 32, 3, 5, dtype=torch.float64)
    qkv = torch.nn.functional.conv2d(layer.norm(x), layer.qkv.weight, layer.qkv.bias).flatten(2)
    d = head_channels or 32
    out = torch.zeros(2, 32, 15, dtype=torch.float64)
    for head in range(32 // d):
        q, k, v = (qkv[:, 3 * d * head + d * i : 3 * d * head + d * (i + 1)] for i in range(3))
        weight = torch.softmax(q.transpose(1, 2) @ k / d**0.5, dim=2)  # (B, N query, N key)
        out[:, d * head : d * (head + 1)] = v @ weight.transpose(1, 2)
    out = torch.einsum("oc,bcn->bon", layer.proj.weight[:, :, 0, 0], out) + layer.proj.bias[:, None]
    assert_close(layer(x), x + out.reshape(x.shape), rtol=1e-12, atol=1e-12)


def test_timestep_embedding():
    emb = unet.timestep_embedding(torch.tensor([0.0, 999.0, 12.5]), 8)
    w = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    for row, c in zip(emb, (0.0, 999.0, 12.5), strict=True):
        assert_close(row, torch.cat([torch.cos(c * w), torch.sin(c * w)]), rtol=1e-12, atol=1e-12)
    assert unet.timestep_embedding(torch.tensor([1.0]), 7).shape == (1, 7)


@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("updown", [True, False])
@pytest.mark.parametrize("patch", [1, 2])
def test_every_kind_runs_backwards_and_starts_at_zero(scale_shift, updown, patch):
    kind = dict(scale_shift=scale_shift, resblock_updown=updown, patch=patch, dropout=0.1)
    kind |= dict(in_channels=1, out_channels=2, attention_resolutions=(8 // patch,))
    net = unet.UNet(**SMALL | kind)
    x = torch.randn(2, 1, 16, 16)
    out = net(x, torch.tensor([1.0, 2.0]))
    assert out.shape == (2, 2, 16, 16)
    assert not out.any(), "the last layer starts at zero"
    out.sum().backward()
    out = awake(net)(x, torch.tensor([1.0, 2.0]))
    out.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())


def test_images_do_not_see_their_batch_mates():
    torch.manual_seed(0)
    net = awake(unet.UNet(**SMALL))
    x, c = torch.randn(5, 3, 16, 16), torch.tensor([1.0, 5.0, 50.0, 500.0, 1000.0])
    whole = net(x, c)
    for i in range(5):
        assert_close(net(x[i : i + 1], c[i : i + 1]), whole[i : i + 1], rtol=1e-4, atol=1e-5)


def test_under_autocast_maps_are_normalised_in_float32_with_channels_last():
    """Convolutions run in bf16, GroupNorm in float32, and no layer gives up the layout."""
    net, seen = unet.UNet(**unet.PRESETS["tiny"]), []
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.GroupNorm):
            layer.register_forward_hook(lambda layer, _, out: seen.append((layer, out)))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 3, 32, 32), torch.tensor([3.0, 700.0]))
    for layer, out in seen:
        norm = isinstance(layer, torch.nn.GroupNorm)
        assert out.dtype == (torch.float32 if norm else torch.bfloat16)
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_bf16_autocast_distinguishes_999_from_1000():
    """Under autocast the time embedding stays float32: bf16 rounds 999 and 1001 to 1000."""
    torch.manual_seed(0)
    net = awake(unet.UNet(**SMALL))
    seen = []
    net.input_blocks[1][0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with torch.autocast("cpu", torch.bfloat16):
        net(torch.randn(2, 3, 16, 16), torch.tensor([999.0, 1000.0]))
    expected = net.time_embed(unet.timestep_embedding(torch.tensor([999.0, 1000.0]), 32).float())
    assert seen[0].dtype == torch.float32
    assert_close(seen[0], expected, rtol=1e-5, atol=1e-6)
    assert (seen[0][0] - seen[0][1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "sizes, words",
    [
        (dict(image_size=18, channel_mult=(1, 2, 2)), "halved 2 times: use a multiple of 4"),
        (dict(image_size=16, channels=20), "do not divide into 32 groups"),
        (dict(image_size=16, channels=96, head_channels=64), "attention heads of 64"),
    ],
)
def test_impossible_sizes_are_refused(sizes, words):
    with pytest.raises(ValueError, match=words):
        unet.UNet(attention_resolutions=(16,), **sizes)


def test_the_products_are_the_fused_attention():
    q, k, v = torch.randn(3, 2, 2, 9, 8, dtype=torch.float64)
    assert_close(unet.attend(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("updown", [False, True])
def test_recomputing_gives_the_same_gradients_for_less_memory(updown):
    """They differ by rounding alone: float64."""
    torch.manual_seed(0)
    net = awake(unet.UNet(**SMALL, dropout=0.3, resblock_updown=updown, second_head="block"))
    net.double().train()
    x, c = torch.randn(2, 3, 16, 16).double(), torch.tensor([3.0, 700.0]).double()
    found = []
    for net.recompute in (False, True):
        held = []  # bytes that wait for backward()
        torch.manual_seed(1)  # dropout: the second pass must drop the same
        net.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, held=held: (held.append(t.nbytes), t)[1], lambda t: t
        ):
            out = net(x, c)
        out.square().mean().backward()
        found.append((out.detach(), [p.grad.clone() for p in net.parameters()], sum(held)))
    (out, gradients, held), (out2, gradients2, held2) = found
    assert_close(out, out2, rtol=0, atol=1e-13)
    for one, two in zip(gradients, gradients2, strict=True):
        assert_close(one, two, rtol=0, atol=1e-13 * max(1.0, one.abs().max().item()))
    assert held2 < held / 2
