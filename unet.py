r"""The network: the U-Net of ADM ("Diffusion Models Beat GANs", Dhariwal & Nichol 2021).

    net(x, c):   noisy images x (B, C, H, W), time input c (B,)   ->   prediction (B, C_out, H, W)

c is a real number (etsdm.py). The network does not depend on the noise schedule. With three levels
it is

    conv  [Res Res] down  [Res Res] down  [Res Res]                        conv
      |     |   |    |      |   |    |      |   |    [Res Attention Res]      ^
      v     v   v    v      v   v    v      v   v   /  the middle             |
    a stack of skips; on the way up, each [Res] pops one and concatenates it

PRESETS has two families of sizes. E-TSDM's is ADM: BigGAN residual blocks resample, the time
embedding scales and shifts the normalised map, attention heads have 64 channels. SA-DPM's is DDPM's
network in its authors' version: plain convolutions resample, the time embedding is added, there is
one attention head, and there are details that parameter counts do not show (DDPM below).

Not here: class labels, and guided-diffusion's "new attention order" (no released weights use it).

    python -c "import unet; print(unet.describe())"        # the presets, with parameter counts

B images, E width of the time embedding, N = H W positions, d channels of one attention head.
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.precision import GroupNorm

# The papers' sizes, as arguments of UNet: SA-DPM's configuration files, E-TSDM's table A1. The
# parameter counts are exact.
DDPM = dict(sin_first=True, freq_shift=1, norm_eps=1e-6, pad_end=True, zero_init=False)
SA = dict(DDPM, head_channels=None, dropout=0.1, scale_shift=False, resblock_updown=False)
ADM = dict(image_size=256, attention_resolutions=(32, 16, 8))
PRESETS = {
    # For minutes of training on a CPU: 2x2 patches; 8 groups, as one channel per group is slow.
    "tiny": dict(image_size=32, channels=32, channel_mult=(1, 2, 2), res_blocks=1, patch=2,
                 norm_groups=8, attention_resolutions=(), head_channels=None,
                 resblock_updown=False),                                                 # 1,147,276
    "cifar10": dict(SA, image_size=32, channel_mult=(1, 2, 2, 2)),                      # 35,746,307
    "celeba64": dict(SA, image_size=64, channel_mult=(1, 2, 2, 2, 4)),                  # 78,700,803
    "celebahq256": dict(SA, image_size=256, channel_mult=(1, 1, 2, 2, 4, 4),
                        dropout=0.0),                                                  # 113,673,219
    # Table A1's "131M" and "692M" are these counts over 2^20, cut off. Its attention at "32, 64, 8"
    # must mean 32, 16, 8: of all candidate sets, only this one gives both counts.
    "ffhq256": dict(ADM, channel_mult=(1, 1, 2, 2, 4, 4), time_channels=512),          # 138,286,467
    "ffhq256-large": dict(ADM, channel_mult=(1, 1, 2, 4, 6, 8), res_blocks=4,
                          time_channels=2048),                                         # 725,956,227
    # OpenAI's 256-pixel network without classes. The released weights (papers/checkpoints.py) have
    # 3 more outputs for a learned variance: 552,814,086 parameters.
    "adm256": dict(ADM, channels=256, channel_mult=(1, 1, 2, 2, 4, 4)),                # 552,807,171
}


class UNet(nn.Module):
    r"""forward(x (B, in_channels, H, W), c (B,)) -> (B, out_channels, H, W), H = W = image_size.

    channels, channel_mult a level's width is channels times its multiple
    res_blocks             residual blocks per level on the way down; one more on the way up
    attention_resolutions  sides of the feature maps, in patches, that get self-attention
    head_channels          channels of one attention head; None: `heads` heads of any width
    time_channels          width E of the time embedding; None: 4 times `channels`
    scale_shift            the embedding scales and shifts the normalised map; False: it is added
    resblock_updown        residual blocks resample; False: plain convolutions do
    norm_groups, norm_eps  of GroupNorm; the groups must divide every width
    patch                  p x p pixels become channels, and back after the last convolution
    second_head            None, "simple" or "block": out_channels more, after the first ones, from
                           a second output layer on the same last map (papers/heads.py)
    sin_first, freq_shift  of timestep_embedding
    pad_end                a strided convolution pads the right and lower edge only
    zero_init              the last layer of each block and of the network starts at zero

    ValueError: image_size cannot be halved often enough; groups or heads do not divide a width."""

    def __init__(self, image_size, in_channels=3, out_channels=3, channels=128,
                 channel_mult=(1, 2, 2, 2), res_blocks=2, attention_resolutions=(16,),
                 head_channels=64, dropout=0.0, time_channels=None, scale_shift=True,
                 resblock_updown=True, norm_groups=32, patch=1, second_head=None, heads=1,
                 sin_first=False, freq_shift=0, norm_eps=1e-5, pad_end=False, zero_init=True):
        super().__init__()
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
        self.patch, self.embedding = patch, (channels, sin_first, freq_shift)
        self.recompute = False  # True: backward() recomputes all but the inputs of the stages
        self.time_embed = nn.Sequential(nn.Linear(channels, E), nn.SiLU(), nn.Linear(E, E))

        def res(c_in, c_out, resample=None):
            return ResBlock(c_in, c_out, E, dropout, scale_shift, norm_groups, resample)

        def attention(width, level=None):  # a list, empty without attention; None: the middle
            here = level is None or image_size // patch >> level in attention_resolutions
            return [Attention(width, head_channels, norm_groups, heads)] if here else []

        # ---- down: the output of each stage is pushed on the stack of skips
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
                down = res(width, width, "down") if resblock_updown else downsample(width, pad_end)
                self.input_blocks.append(Stage([down]))
                skips.append(width)

        # ---- middle: attention always
        self.middle_block = Stage([res(width, width), *attention(width), res(width, width)])

        # ---- up: one block more than down, since the stack also holds the downsampled map
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(res_blocks + 1):
                joined, width = width + skips.pop(), channels * mult
                stage = [res(joined, width), *attention(width, level)]
                if level and i == res_blocks:
                    stage.append(res(width, width, "up") if resblock_updown else upsample(width))
                self.output_blocks.append(Stage(stage))
        self.out_norm = GroupNorm(norm_groups, width)
        self.out_conv = zero(nn.Conv2d(width, out_channels * patch**2, 3, padding=1))
        self.second_head = None
        if second_head:  # for NPR- and SN-DPM: another output layer, or a residual block and one
            self.second_head = Stage([res(width, width)] * (second_head == "block") + [
                GroupNorm(norm_groups, width), nn.SiLU(),
                zero(nn.Conv2d(width, out_channels * patch**2, 3, padding=1))])
        for name, layer in self.named_modules():
            if isinstance(layer, GroupNorm):
                layer.eps = norm_eps
            if not zero_init and name.split(".")[-1] in ("conv2", "proj", "out_conv"):
                layer.reset_parameters()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        # Time is embedded in full precision even under bf16 autocast: bf16 rounds 999 to 1000.
        with torch.autocast(x.device.type, enabled=False):
            emb = timestep_embedding(c, *self.embedding).to(self.time_embed[0].weight.dtype)
            emb = self.time_embed(emb)  # (B, E)
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
        # Contiguous: on CPUs GroupNorm's backward pass crashes on a channels_last input that does
        # not require a gradient, here the output of a frozen trunk (PyTorch 2.11 to 2.13).
        h = self.second_head(h.contiguous(), emb)
        return torch.cat([out, F.pixel_shuffle(h, self.patch)], dim=1)

    def run(self, stage: "Stage", emb: Tensor, *maps: Tensor) -> Tensor:
        """Run a stage on concatenated maps. With `recompute`, backward() runs the stage again to
        get its inner maps: a third more work for a fraction of the memory."""
        if not (self.recompute and torch.is_grad_enabled()):
            return stage(torch.cat(maps, dim=1) if len(maps) > 1 else maps[0], emb)
        return checkpoint(lambda *m: stage(torch.cat(m, dim=1), emb), *maps, use_reentrant=False)


def lay_out(h: Tensor) -> Tensor:
    """On CPUs, put channels last in memory: convolutions are faster, and all layers keep it."""
    return h.contiguous(memory_format=torch.channels_last) if h.device.type == "cpu" else h


class Stage(nn.ModuleList):
    """Layers in sequence. The residual blocks among them also receive the time embedding."""

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            h = layer(h, emb) if isinstance(layer, ResBlock) else layer(h)
        return h


class ResBlock(nn.Module):
    r"""skip(x) + conv2(SiLU(norm2(h, time))),   h = conv1(SiLU(norm1(x))).

    resample: "down" (2x2 average) or "up" (nearest) acts on both branches, without weights. In h it
    lies between activation and convolution (BigGAN). None: the size stays."""

    def __init__(self, c_in, c_out, time_channels, dropout, scale_shift, norm_groups, resample):
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = GroupNorm(norm_groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(time_channels, 2 * c_out if scale_shift else c_out)
        self.norm2 = GroupNorm(norm_groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))  # the block starts as its skip
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.resample = {None: nn.Identity(), "down": nn.AvgPool2d(2),
                         "up": nn.Upsample(scale_factor=2)}[resample]

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
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

    def __init__(self, width, head_channels, norm_groups, heads=1):
        super().__init__()
        if width % (head_channels or heads):
            raise ValueError(f"{width} channels do not divide into attention heads"
                             + f" of {head_channels}" * bool(head_channels))
        self.heads = width // head_channels if head_channels else heads
        self.norm = GroupNorm(norm_groups, width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = zero(nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        # Channels are ordered [head][q, k, v][d], as in ADM. One contiguous() for all three: on
        # strided inputs scaled_dot_product_attention takes a slow path without a warning.
        qkv = self.qkv(self.norm(x)).reshape(B, self.heads, 3, C // self.heads, H * W)
        q, k, v = qkv.permute(2, 0, 1, 4, 3).contiguous()  # each (B, heads, N, d)
        # The fused kernel never stores the N x N products, but on CPUs its bf16 form is slower.
        plain = q.dtype == torch.bfloat16 and not q.is_cuda
        h = (attend if plain else F.scaled_dot_product_attention)(q, k, v)
        return x + self.proj(h.transpose(2, 3).reshape(B, C, H, W))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) v, each (B, heads, N, d)."""
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3) @ v


def downsample(width: int, pad_end: bool) -> nn.Module:
    """Strided 3x3 convolution: H, W -> H/2, W/2. pad_end: pad only the right and lower edge."""
    pad = nn.ZeroPad2d((0, 1, 0, 1)) if pad_end else nn.Identity()
    conv = nn.Conv2d(width, width, 3, stride=2, padding=0 if pad_end else 1)
    return nn.Sequential(OrderedDict(pad=pad, conv=conv))


def upsample(width: int) -> nn.Module:
    """Nearest-neighbour doubling, then a 3x3 convolution: H, W -> 2H, 2W."""
    conv = nn.Conv2d(width, width, 3, padding=1)
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2), conv=conv))


def zero(layer: nn.Module) -> nn.Module:
    """Set a layer to zero, so that its block contributes nothing at the start of training."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def timestep_embedding(c: Tensor, dim: int, sin_first: bool = False, freq_shift: int = 0) -> Tensor:
    r"""c (B,) -> [cos(c w_j) | sin(c w_j)] (B, dim), or [sin | cos] with sin_first; w_j =
    10000^(−j/(half − freq_shift)), j < half = dim/2. In float64 (except on mps, which lacks it):
    angles reach 1000 radians, where float32 keeps only four decimals."""
    half, exact = dim // 2, torch.float32 if c.device.type == "mps" else torch.float64
    j = torch.arange(half, dtype=exact, device=c.device)
    w = torch.exp(-math.log(10000) / (half - freq_shift) * j)
    angle = c.to(exact)[:, None] * w
    parts = (angle.sin(), angle.cos()) if sin_first else (angle.cos(), angle.sin())
    return F.pad(torch.cat(parts, dim=1), (0, dim % 2))


def describe() -> str:
    """One line per preset: name, image side, parameters."""
    with torch.device("meta"):
        return "\n".join(f"{name:14}{size['image_size']:4} px "
                         f"{sum(p.numel() for p in UNet(**size).parameters()):12,} parameters"
                         for name, size in PRESETS.items())
