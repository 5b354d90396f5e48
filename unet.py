r"""The network: the U-Net of ADM ("Diffusion Models Beat GANs", Dhariwal & Nichol 2021).

    net(x, c):   noisy images x (B, C, H, W), time input c (B,)   ->   prediction (B, C_out, H, W)

c is the time input (etsdm.py): a real number in [0, T]. The network never learns which noise
schedule it serves. For three levels it looks like this:

    conv  [Res Res] down  [Res Res] down  [Res Res]                        conv
      |     |   |    |      |   |    |      |   |   \                        ^
      |     |   |    |      |   |    |      |   |    [Res Attention Res]      |
      v     v   v    v      v   v    v      v   v   /  the middle             |
    a stack of skips; on the way up each [Res] takes one off and concatenates it

Two families of sizes are in PRESETS. SA-DPM's: plain convolutions resample, the time embedding is
added, attention has one head. E-TSDM's, ADM proper: BigGAN residual blocks resample, the time
embedding scales and shifts the normalised map, heads have 64 channels.

Not here: class labels, and guided-diffusion's "new attention order" (no released weights use it).
SA-DPM's own network differs from its preset here in ways that no count of parameters shows: sin
before cos, GroupNorm eps 1e-6, one-sided padding in front of a strided convolution, and no layers
that start at zero.

    python -c "import unet; print(unet.describe())"        # the presets, with parameter counts

B images, C channels, H, W pixels, E width of the time embedding, N = H W positions, d channels of
one attention head.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# The sizes of the two papers, as arguments of UNet. The counts of parameters are exact, and tested.
SA = dict(head_channels=None, dropout=0.1, scale_shift=False, resblock_updown=False)
ADM = dict(image_size=256, attention_resolutions=(32, 16, 8))
PRESETS = {
    # Ours, for minutes on a CPU: 32x32 pixels are a 16x16 core of 2x2 patches, with attention in
    # the middle only, and 8 groups: one channel per group (32 of 32) is slow.
    "tiny": dict(image_size=32, channels=32, channel_mult=(1, 2, 2), res_blocks=1, patch=2,
                 norm_groups=8, attention_resolutions=(), head_channels=None,
                 resblock_updown=False),                                                 # 1,147,276
    # SA-DPM's configuration files
    "cifar10": dict(SA, image_size=32, channel_mult=(1, 2, 2, 2)),                      # 35,746,307
    "celeba64": dict(SA, image_size=64, channel_mult=(1, 2, 2, 2, 4)),                  # 78,700,803
    "celebahq256": dict(SA, image_size=256, channel_mult=(1, 1, 2, 2, 4, 4),
                        dropout=0.0),                                                  # 113,673,219
    # E-TSDM's table A1. Its "131M" and "692M" are these counts over 2^20, cut off; and attention
    # at "32, 64, 8" must be at 32, 16, 8: of the sets it could be, this alone gives both counts.
    "ffhq256": dict(ADM, channel_mult=(1, 1, 2, 2, 4, 4), time_channels=512),          # 138,286,467
    "ffhq256-large": dict(ADM, channel_mult=(1, 1, 2, 4, 6, 8), res_blocks=4,
                          time_channels=2048),                                         # 725,956,227
    # OpenAI's released 256-pixel networks without classes (LSUN, ImageNet), for
    # papers/checkpoints.py. Theirs have 3 more outputs, for a learned variance: 552,814,086.
    "adm256": dict(ADM, channels=256, channel_mult=(1, 1, 2, 2, 4, 4)),                # 552,807,171
}


class UNet(nn.Module):
    r"""forward(x (B, in_channels, H, W), c (B,)) -> (B, out_channels, H, W).

    image_size             side in pixels; the attention resolutions refer to it
    channels               width of level 0; channel_mult: that of each level, as its multiple
    res_blocks             residual blocks per level on the way down; one more on the way up
    attention_resolutions  sides of the feature maps, in patches, that get self-attention
    head_channels          channels of one attention head; None: a single head
    time_channels          width E of the time embedding; None: 4 channels
    scale_shift            the embedding scales and shifts the normalised map; False: is added
    resblock_updown        residual blocks resample; False: plain convolutions do
    norm_groups            groups of GroupNorm; they must divide every width
    patch                  p x p pixels become channels before the first convolution, and back after
                           the last (SA and ADM: 1)
    second_head            None, or "simple" or "block": another out_channels, behind the others,
                           from a second output layer on the same last map (papers/heads.py)

    ValueError: a size that cannot be halved often enough, widths that do not divide.
    """

    # No hidden matrices: what support/optimizers.py leaves to Adam.
    edge_layers = ("input_blocks.0.", "out_conv.", "time_embed.", "second_head.")

    def __init__(self, image_size, in_channels=3, out_channels=3, channels=128,
                 channel_mult=(1, 2, 2, 2), res_blocks=2, attention_resolutions=(16,),
                 head_channels=64, dropout=0.0, time_channels=None, scale_shift=True,
                 resblock_updown=True, norm_groups=32, patch=1, second_head=None):
        super().__init__()
        if second_head not in (None, "simple", "block"):
            raise ValueError(f"a second head is simple or block, not {second_head!r}")
        levels = len(channel_mult)
        unit = patch * 2 ** (levels - 1)
        if image_size % unit:
            raise ValueError(f"image size {image_size} cannot be halved {levels - 1} times"
                             + f" after {patch}x{patch} patches" * (patch > 1)
                             + f": use a multiple of {unit}")
        if any(channels * m % norm_groups for m in channel_mult):
            raise ValueError(f"{channels} channels times {channel_mult} do not divide into "
                             f"{norm_groups} groups")
        E = time_channels or 4 * channels
        self.channels, self.patch = channels, patch
        self.recompute = False  # True: keep only each stage's input, and compute the rest again
        self.time_embed = nn.Sequential(nn.Linear(channels, E), nn.SiLU(), nn.Linear(E, E))

        def res(c_in, c_out, resample=None):
            return ResBlock(c_in, c_out, E, dropout, scale_shift, norm_groups, resample)

        def attention(width, level):  # a list, empty for levels without attention
            here = image_size // patch >> level in attention_resolutions
            return [Attention(width, head_channels, norm_groups)] if here else []

        # ---- down: every stage's output goes on the stack of skips
        width = channels * channel_mult[0]
        first = nn.Conv2d(in_channels * patch**2, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([Stage([first])])
        skips = [width]
        for level, mult in enumerate(channel_mult):
            for _ in range(res_blocks):
                before, width = width, channels * mult
                self.input_blocks.append(Stage([res(before, width), *attention(width, level)]))
                skips.append(width)
            if level < levels - 1:
                down = res(width, width, "down") if resblock_updown else Downsample(width)
                self.input_blocks.append(Stage([down]))
                skips.append(width)

        # ---- middle: attention always
        self.middle_block = Stage([res(width, width), Attention(width, head_channels, norm_groups),
                                   res(width, width)])

        # ---- up: one block more than on the way down, because the downsampled map was kept too
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(res_blocks + 1):
                joined, width = width + skips.pop(), channels * mult
                stage = [res(joined, width), *attention(width, level)]
                if level and i == res_blocks:
                    stage.append(res(width, width, "up") if resblock_updown else Upsample(width))
                self.output_blocks.append(Stage(stage))
        self.out_norm = nn.GroupNorm(norm_groups, width)
        self.out_conv = zero(nn.Conv2d(width, out_channels * patch**2, 3, padding=1))
        self.second_head = None
        if second_head:  # NPR- and SN-DPM's: the same output again, or with a residual block first
            self.second_head = Stage([res(width, width)] * (second_head == "block") + [
                nn.GroupNorm(norm_groups, width), nn.SiLU(),
                zero(nn.Conv2d(width, out_channels * patch**2, 3, padding=1))])

    def forward(self, x, c):
        # Time is embedded in full precision even under bf16 autocast: bf16 rounds 999 to 1000.
        with torch.autocast(x.device.type, enabled=False):
            dtype = self.time_embed[0].weight.dtype
            emb = self.time_embed(timestep_embedding(c, self.channels, dtype))  # (B, E)
        h, skips = lay_out(F.pixel_unshuffle(x, self.patch)), []
        for stage in self.input_blocks:
            h = self.run(stage, emb, h)
            skips.append(h)
        h = self.run(self.middle_block, emb, h)
        for stage in self.output_blocks:
            h = self.run(stage, emb, h, skips.pop())
        out = F.pixel_shuffle(self.out_conv(F.silu(self.out_norm(h))), self.patch)
        if self.second_head is None:
            return out
        # Contiguous, because GroupNorm's backward pass on a CPU crashes for a channels_last input
        # that needs no gradient: here the output of a frozen trunk (PyTorch 2.11 to 2.13).
        h = self.second_head(h.contiguous(), emb)
        return torch.cat([out, F.pixel_shuffle(h, self.patch)], dim=1)

    def run(self, stage, emb, *maps):
        """A stage of concatenated maps (B, ., H, W). With `recompute`, backward() gets its inner
        maps by running it once more: a third more work for a fraction of the memory."""
        if not (self.recompute and torch.is_grad_enabled()):
            return stage(torch.cat(maps, dim=1) if len(maps) > 1 else maps[0], emb)
        return checkpoint(lambda *maps: stage(torch.cat(maps, dim=1), emb), *maps,
                          use_reentrant=False)


def lay_out(h: torch.Tensor) -> torch.Tensor:
    """Channels last in memory, if that is faster: it is for a CPU's float32 convolutions, and the
    layers keep the layout. The normalisation of bf16 gets slower."""
    if h.is_cuda or torch.is_autocast_enabled("cpu"):
        return h
    return h.contiguous(memory_format=torch.channels_last)


class Stage(nn.ModuleList):
    """Layers applied one after the other; the residual blocks among them also see the time
    embedding."""

    def forward(self, h, emb):
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return h


class ResBlock(nn.Module):
    r"""skip(x) + conv2(SiLU(norm2(h, time))),   h = conv1(SiLU(norm1(x))).

    resample: "down" (2x2 average) or "up" (nearest) acts on both branches, in the first between
    activation and convolution (BigGAN): no weights are spent on it. None: neither.
    """

    def __init__(self, c_in, c_out, time_channels, dropout, scale_shift, norm_groups,
                 resample=None):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(norm_groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_channels, 2 * c_out if scale_shift else c_out)
        self.norm2 = nn.GroupNorm(norm_groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))  # the block starts as its skip
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.resample = {None: nn.Identity(), "down": nn.AvgPool2d(2),
                         "up": nn.Upsample(scale_factor=2)}[resample]

    def forward(self, x, emb):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        time = self.time(F.silu(emb))[:, :, None, None]  # (B, c_out or 2 c_out, 1, 1)
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        return self.skip(self.resample(x)) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Self-attention over the N = H W positions, added to its input."""

    def __init__(self, width, head_channels, norm_groups):
        super().__init__()
        if head_channels and width % head_channels:
            raise ValueError(f"{width} channels do not divide into attention heads of "
                             f"{head_channels}")
        self.heads = width // head_channels if head_channels else 1
        self.norm = nn.GroupNorm(norm_groups, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = zero(nn.Conv2d(width, width, 1))

    def forward(self, x):
        B, C, H, W = x.shape
        # Channels lie as [head][q, k, v][d], as in ADM's weights. One contiguous() for all three:
        # on strided inputs scaled_dot_product_attention silently takes a slow path.
        qkv = self.qkv(self.norm(x)).reshape(B, self.heads, 3, C // self.heads, H * W)
        q, k, v = qkv.permute(2, 0, 1, 4, 3).contiguous()  # each (B, heads, N, d)
        # The fused kernel never holds the N x N products; but on CPUs its bf16 form is 2 to 3 times
        # slower than the two products themselves.
        plain = q.dtype == torch.bfloat16 and not q.is_cuda
        h = (attend if plain else F.scaled_dot_product_attention)(q, k, v)
        return x + self.proj(h.transpose(2, 3).reshape(B, C, H, W))


def attend(q, k, v):
    """softmax(q kᵀ/√d) v, each (B, heads, N, d)."""
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3) @ v


class Downsample(nn.Module):
    """Strided 3x3 convolution: H, W -> H/2, W/2."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3x3 convolution: H, W -> 2H, 2W."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def zero(layer: nn.Module) -> nn.Module:
    """Start a layer at zero, so that the block it ends contributes nothing at first."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def timestep_embedding(c, dim, dtype=torch.float32):
    r"""[cos(c w_j) | sin(c w_j)], w_j = 10000^(−j/half), j < half = dim/2: c (B,) -> (B, dim).

    Angles are formed in float64: c w_0 reaches 1000 radians, where float32 keeps four decimals.
    """
    half = dim // 2
    j = torch.arange(half, dtype=torch.float64, device=c.device)
    w = torch.exp(-math.log(10000) / half * j)
    angle = c.double()[:, None] * w
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, dim % 2)).to(dtype)


def describe():
    """One line per preset: name, image side, parameters."""
    with torch.device("meta"):
        nets = {name: UNet(**size) for name, size in PRESETS.items()}
    return "\n".join(f"{name:14}{PRESETS[name]['image_size']:4} px "
                     f"{sum(p.numel() for p in net.parameters()):12,} parameters"
                     for name, net in nets.items())
