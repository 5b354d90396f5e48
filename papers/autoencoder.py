r"""The first stage of latent diffusion: a KL autoencoder ("High-Resolution Image Synthesis with
Latent Diffusion Models", Rombach et al. 2022).

    (m, l) = encode(x),   z = m + exp(l/2) n,  n ~ N(0, I),   x̂ = decode(z)
    L = mean (x̂ − x)² + kl_weight · mean (m² + exp(l) − 1 − l)/2

The encoder turns an image into latents z, which are fewer numbers. Diffusion on latents costs less
per step, and the decoder turns samples into images. The first mean is over all values of an image,
the second over all its latents, so that kl_weight has the same meaning at every size. The second is
the KL divergence of N(m, exp(l)) from N(0, I) per latent, in nats. It keeps latents near zero and
near each other. Diffusion gives the decoder latents that belong to no image. The noise n trains the
decoder for this: all points around a latent decode to the same image.

The cost of kl_weight is known. To first order, the noise of latent i of D adds a_i exp(l_i) to the
squared error. L is minimal in l_i if this term is kl_weight/2 · (1 − exp(l_i))/D. Summed over i,

    error with noise − error without  =  kl_weight/2 · mean (1 − exp(l))  <=  kl_weight/2.

Not here: the perceptual (LPIPS) and patch-GAN terms of the paper's loss, which need further
networks. Squared error alone gives the mean of all images with the same latents: edges are right,
and texture too fine for the latents is blurred. Also not here: the paper's other autoencoder (VQ),
and a tanh at the end, so outputs can leave [−1, 1].

    python -m papers.autoencoder train --data photos/ --image-size 64
    python -m papers.autoencoder reconstruct RUN photos/    # next: metrics.py psnr
    python -m papers.latents RUN                                # diffusion on its latents
    python -c "from papers import autoencoder; print(autoencoder.Autoencoder(32).latent_shape)"

B images x (B, C, H, W) in [−1, 1]; latents (B, c, h, w), D = c h w of them; m mean, l log variance.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import train
from config import Config
from support import checkpoint, distributed, files
from support.cli import device_flag, flag, parse_into, require
from support.device import double
from support.images import grid
from support.programs import ignore_write_errors, run_main
from unet import Attention, zero


class Autoencoder(nn.Module):
    r"""forward(images (B, C, H, W), noise (B, c, h, w)) -> (reconstruction, mean, logvar).

    image_size       side in pixels; each level after the first halves it
    channels         C: 3, or 1 for gray
    width, mult      a level's width is `width` times its entry of mult
    latent_channels  c; the latents of one image are latent_shape = (c, h, w)
    res_blocks       residual blocks per level, in the encoder and in the decoder
    norm_groups      groups of GroupNorm; they must divide every width

    ValueError: image_size cannot be halved often enough, or norm_groups does not divide a width.
    """

    def __init__(self, image_size, channels=3, width=32, mult=(1, 2, 2), latent_channels=4,
                 res_blocks=1, norm_groups=8):
        super().__init__()
        halvings = len(mult) - 1
        if image_size % 2**halvings:
            raise ValueError(f"image size {image_size} cannot be halved {halvings} times: "
                             f"use a multiple of {2**halvings}")
        widths = [width * m for m in mult]
        if any(w % norm_groups for w in widths):
            raise ValueError(f"{width} channels times {tuple(mult)} do not divide into "
                             f"{norm_groups} groups")
        self.latent_shape = (latent_channels, image_size >> halvings, image_size >> halvings)

        def res(c_in, c_out):
            return Block(c_in, c_out, norm_groups)

        def middle(w):  # attention on the smallest map, where it costs least
            return [res(w, w), Attention(w, None, norm_groups), res(w, w)]

        def last(w, c_out):
            return [nn.GroupNorm(norm_groups, w), nn.SiLU(), conv(w, c_out)]

        # 2x2 averages halve the map: they have the same centre as nearest-neighbour doubling. A
        # strided 3x3 convolution is centred on one of the four pixels, for any padding. It shifts
        # the map by half a pixel per level, and the decoder has to shift it back.
        encoder, w = [conv(channels, widths[0])], widths[0]
        for level, wider in enumerate(widths):
            encoder += [nn.AvgPool2d(2)] * (level > 0)
            for _ in range(res_blocks):
                encoder.append(res(w, wider))
                w = wider
        self.encoder = nn.Sequential(*encoder, *middle(w), *last(w, 2 * latent_channels))

        w = widths[-1]
        decoder = [conv(latent_channels, w), *middle(w)]
        for level, narrower in reversed(list(enumerate(widths))):
            if level < halvings:  # this convolution also narrows: else it would cost the most
                decoder += [nn.Upsample(scale_factor=2), conv(w, narrower)]
                w = narrower
            decoder += [res(w, w) for _ in range(res_blocks)]
        self.decoder = nn.Sequential(*decoder, *last(w, channels))

    def encode(self, images):
        """images (B, C, H, W) in [-1, 1] -> (mean, logvar), each (B, c, h, w)."""
        # Undo autocast's lower precision: exp and the KL need that of the images.
        mean, logvar = self.encoder(images).to(images.dtype).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)  # exp stays finite in float32, even for a bad network

    def decode(self, z):
        """z (B, c, h, w) -> images (B, C, H, W), roughly in [-1, 1]."""
        return self.decoder(z).to(z.dtype)

    def forward(self, images, noise):
        # One call for all of training: DistributedDataParallel only hooks into forward().
        mean, logvar = self.encode(images)
        return self.decode(mean + torch.exp(logvar / 2) * noise), mean, logvar


def loss(net, images, noise, kl_weight=1e-4):
    """images (B, C, H, W), noise (B, c, h, w) -> (loss, reconstruction, kl), each (B,):
    loss = reconstruction + kl_weight · kl; squared error per value, nats per latent.

    The error is squared, not absolute, because the cost of kl_weight is then known (above). The
    paper sums the KL over the latents, with weight 1e-6. Here, in short runs on CIFAR-10, latents
    had std 1.0 to 1.3 and noise of std 0.03 to 0.04 at weight 1e-4. At 1e-3 these were 0.8 to 1.0
    and 0.07 to 0.11, with equally sharp images. At 1e-2, two of four channels were nearly empty
    (std 0.4, noise 0.8).
    """
    out, mean, logvar = net(images, noise)
    reconstruction = (out - images).square().flatten(1).mean(1)
    # expm1: for small l, exp(l) − 1 − l is near l²/2, which the rounding of exp(l) would hide
    kl = (mean.square() + torch.expm1(logvar) - logvar).flatten(1).mean(1) / 2
    return reconstruction + kl_weight * kl, reconstruction, kl


@torch.no_grad()
def moments(net, images_iterable):
    """(mean (c,), std (c,)) of the latent means of batches of images (B, C, H, W), float64 on the
    CPU. Diffusion learns (z − mean)/std.

    The noise schedule assumes data of variance 1. The paper divides all channels by one number,
    from the first batch. Here each channel has its mean and std, since channels differ: noise would
    cover a channel of small std at nearly all t, and a channel of large std at hardly any t. The
    disadvantage: a channel that the KL term has emptied counts as much as any other; kl_weight has
    to prevent that.
    """
    n = total = squares = 0
    device = next(net.parameters()).device
    for images in images_iterable:
        z = double(net.encode(images.to(device))[0]).transpose(0, 1).flatten(1)  # (c, B h w)
        n, total, squares = n + z.shape[1], total + z.sum(1), squares + z.square().sum(1)
    if not n:
        raise ValueError("no images: the moments of the latents need at least one")
    mean = total / n
    return mean.cpu(), (squares / n - mean.square()).clamp(min=0).sqrt().cpu()


# ---- layers

class Block(nn.Module):
    """skip(x) + conv2(SiLU(norm2(h))),   h = conv1(SiLU(norm1(x))): unet.py's, without time."""

    def __init__(self, c_in, c_out, norm_groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(norm_groups, c_in), conv(c_in, c_out)
        self.norm2, self.conv2 = nn.GroupNorm(norm_groups, c_out), zero(conv(c_out, c_out))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


def conv(c_in, c_out):
    """3x3, the same size out as in."""
    return nn.Conv2d(c_in, c_out, 3, padding=1)


# ------------------------------------------------------------------ train

DENOISER_FIELDS = ("preset", "schedule", "continuous", "betas", "prediction", "etsdm",
                   "etsdm_interval", "etsdm_n", "dropout", "sa_k", "sa_weight", "loss_space",
                   "train_times", "recompute", "init")
RECIPE = dict(batch_size=64, images=256_000, lr=2e-3, beta2=0.99, ema=0.995, grad_clip=1.0,
              warmup=100, flip=False, sample_every=1000, save_every=500, optimizer="adam",
              lr_decay="none")


@dataclass
class AutoencoderConfig(Config):
    downsamplings: int = flag(2, "how often the side of the latents is halved",
                              group="autoencoder")
    latent_channels: int = flag(4, "values per latent position")
    width: int = flag(32, "channels at the size of the images: a multiple of 8")
    kl_weight: float = flag(1e-4, "weight of the KL divergence of the latents from N(0, 1)")

    unused: ClassVar[tuple] = DENOISER_FIELDS
    prog: ClassVar[str] = "papers.autoencoder train"
    usage: ClassVar[str] = "python -m papers.autoencoder train [flags]"
    description: ClassVar[str] = ("Train an autoencoder, the first stage of latent diffusion. The "
                                  "same command resumes it.")
    examples: ClassVar[str] = """\
  python -m papers.autoencoder train --data photos/ --image-size 64
  python -m papers.latents photos-autoencoder"""

    @classmethod
    def recipe(cls, given):
        values = {**super().recipe(given), **RECIPE, "image_size": 32}
        if given.get("steps", 0) > 0:
            values["images"] = given["steps"] * given.get("batch_size", values["batch_size"])
        return values

    def check(self):
        super().check()
        require(self, "latent_channels", self.latent_channels >= 1, "must be at least 1")
        require(self, "width", self.width > 0 and self.width % 8 == 0, "must be a multiple of 8")
        require(self, "kl_weight", 0 <= self.kl_weight < float("inf"), "must be 0 or more")

    def check_divisible(self):
        require(self, "downsamplings", 1 <= self.downsamplings <= 5, "must be 1 to 5")
        unit = 2**self.downsamplings
        require(self, "image_size", self.image_size % unit == 0,
                f"must be a multiple of {unit} for --downsamplings {self.downsamplings}")

    def size(self):
        """The arguments of Autoencoder."""
        return dict(image_size=self.image_size, channels=self.channels, width=self.width,
                    mult=(1,) + (2,) * self.downsamplings, latent_channels=self.latent_channels)

    def settings(self):
        kept = {k: v for k, v in super().settings().items()
                if k not in DENOISER_FIELDS and k != "unet"}
        return {**kept, "autoencoder": self.size()}

    def name_parts(self):
        extra = [f"{self.downsamplings}-downsamplings"] * (self.downsamplings != 2)
        return ["autoencoder", *extra]

    def next_command(self):
        return f"python -m papers.latents {shlex.quote(self.name)}"


class AutoencoderObjective:
    """The autoencoder's loss, in the form that train.py's loop needs."""

    loss_names, warnings = ("reconstruction", "kl"), ()

    def __init__(self, config, dataset=None, saved=None):
        self.config, self.extra_state = config, (saved or {}).get("extra", {})
        self.net = Autoencoder(**config.size())

    def draw(self, n, generator, device_generator):
        """Noise for the latents of n images."""
        return dict(noise=torch.randn(n, *self.net.latent_shape, generator=device_generator,
                                      device=device_generator.device))

    def loss(self, model, images, draws):
        total, *parts = loss(model, images, draws["noise"], self.config.kl_weight)
        return total, dict(zip(self.loss_names, parts, strict=True))

    @torch.no_grad()
    def preview(self, net, images):
        """Images, each next to its reconstruction."""
        decoded = net.decode(net.encode(data.to_float(images))[0])
        return torch.stack([images, data.to_uint8(decoded)], dim=1).flatten(0, 1), 2


# ------------------------------------------------------------------ reconstruct

@dataclass
class ReconstructConfig:
    run: str = flag("", "a run of python -m papers.autoencoder train", positional="RUN",
                    group="images")
    images: str = flag("", "folder, zip or array of images, or a data set", positional="IMAGES")
    num: int = flag(1000, "largest number of images", short="-n")
    batch_size: int = flag(64, "images at a time")
    device: str = device_flag()
    weights: str = flag("ema", "averaged (ema) or last (raw) weights", choices=("ema", "raw"))
    out: Path = flag(Path("reconstructed"), "output folder; the originals go to OUT-original")

    prog: ClassVar[str] = "papers.autoencoder reconstruct"
    usage: ClassVar[str] = "python -m papers.autoencoder reconstruct RUN IMAGES [flags]"
    description: ClassVar[str] = "Write an autoencoder's reconstructions of images, and the images."
    examples: ClassVar[str] = """\
  python -m papers.autoencoder reconstruct fashion-autoencoder test-images/
  python metrics.py psnr reconstructed/ reconstructed-original/"""

    def check(self):
        if not (self.run and self.images):
            raise ValueError("RUN and IMAGES are both needed: python -m papers.autoencoder "
                             "reconstruct RUN IMAGES")
        for name in ("num", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not "
                                 f"{getattr(self, name)}")
        for folder in (self.out, self.originals()):
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ValueError(f"--out {self.out}: {folder} exists already. Choose a new folder")

    def originals(self):
        out = self.out if self.out.name else self.out.resolve()  # . has no name
        return out.with_name(f"{out.name}-original")


@torch.no_grad()
def reconstruct(argv=None):
    """The program `reconstruct`."""
    config = parse_into(ReconstructConfig, argv)
    with distributed.init(tf32=False, device=config.device) as dist:
        if not dist.is_main:  # takes seconds: one process is enough
            return
        path = checkpoint.find_checkpoint(config.run)
        saved = checkpoint.load_checkpoint(path)
        size = saved["settings"].get("autoencoder")
        if not size or "unet" in saved["settings"]:
            raise ValueError(f"{config.run} is not an autoencoder run: python -m "
                             "papers.autoencoder train makes one")
        net = Autoencoder(**size)
        checkpoint.load_weights(net, saved["ema" if config.weights == "ema" else "net"], path)
        net.to(dist.device).eval()
        dataset = data.load(config.images, size["image_size"], size["channels"], progress=True)
        n = min(config.num, len(dataset))
        for folder in (config.out, config.originals()):
            folder.mkdir(parents=True, exist_ok=True)
        with tqdm(total=n, unit="image", dynamic_ncols=True) as bar:
            for start in range(0, n, config.batch_size):
                indices = range(start, min(start + config.batch_size, n))
                images = torch.stack([dataset[i] for i in indices])
                x = data.to_float(images.to(dist.device))
                decoded = data.to_uint8(net.decode(net.encode(x)[0])).cpu()
                for i, image, original in zip(indices, decoded, images, strict=True):
                    for folder, picture in ((config.out, image), (config.originals(), original)):
                        files.save_png(folder / f"{i:06d}.png", grid(picture[None], 1), False)
                bar.update(len(indices))
        print(f"{n} images of {dataset.summary}\nreconstructions: {config.out.resolve()}\n"
              f"next: python metrics.py psnr {shlex.quote(str(config.out))} "
              f"{shlex.quote(str(config.originals()))}")


def main(argv=None):
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if command == "train":
        train.main(rest, AutoencoderObjective, AutoencoderConfig)
    elif command == "reconstruct":
        reconstruct(rest)
    elif command in ("-h", "--help"):
        print("python -m papers.autoencoder train [flags]\n"
              "python -m papers.autoencoder reconstruct RUN IMAGES [flags]\n\nEach has --help.")
    else:
        raise ValueError(f"{command}: the programs are train and reconstruct")


if __name__ == "__main__":
    ignore_write_errors()
    run_main(main)
