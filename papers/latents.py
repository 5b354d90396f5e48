r"""Latent diffusion on the latents of papers/autoencoder.py (Rombach et al. 2022).

    python -m papers.autoencoder train --data photos/ --image-size 64
    python -m papers.latents photos-autoencoder          # then: python sample.py

x_0 is the autoencoder's mean for an image, shifted and scaled to mean 0 and variance 1 per channel.
The objective, the samplers and E-TSDM are the same as for pixels. The checkpoint also holds the
autoencoder, so that a latent run does not need the autoencoder's folder. E-TSDM's paper uses LDM-4
on FFHQ.

Not here: the autoencoder, its loss and its moments (autoencoder.py); text or classes.

B images, C channels, H = W their side in pixels; images in [-1, 1]; latents (B, c, h, w).
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import data
import train
from config import Config
from papers import autoencoder
from support import checkpoint
from support.cli import flag
from support.programs import ignore_write_errors, run_main
from support.run import run_name, settings_of, weights_changed


class Latents:
    """x_0 is (z − mean)/std, per channel: z an autoencoder's mean, mean and std over the data."""

    value_range, data_std = None, 1.0  # latents have no range to clip to

    def __init__(self, first_stage):
        self.net = autoencoder.Autoencoder(**first_stage["autoencoder"])
        checkpoint.load_weights(self.net, first_stage["weights"], "the first stage")
        self.net.eval().requires_grad_(False)
        self.shape = self.net.latent_shape
        self.mean, self.std = (first_stage[k].float()[:, None, None] for k in ("mean", "std"))

    @torch.no_grad()
    def encode(self, images):
        """The mean of q(z | image), not a sample: the std of q is a few hundredths of the std of
        the latents, and a mean needs no random numbers."""
        net = self.net.to(images.device)
        return (net.encode(images)[0].float() - self.mean.to(images)) / self.std.to(images)

    @torch.no_grad()
    def decode(self, x0):
        net = self.net.to(x0.device)
        return net.decode(x0.float() * self.std.to(x0.device) + self.mean.to(x0.device))

    def conditioning(self, images):
        return None


def extend(denoiser, settings, extra):
    """Add the space of latents. denoiser.build_denoiser calls this for settings with a latent."""
    return denoiser.replace(space=Latents(extra["first_stage"]))


def first_stage_of(run, batches):
    """All that a latent run keeps of an autoencoder run, as an entry of the checkpoint: the
    averaged weights, and the mean and std of the latents over batches of images."""
    saved = checkpoint.load_checkpoint(checkpoint.find_checkpoint(run))
    settings = saved["settings"]
    net = autoencoder.Autoencoder(**settings["autoencoder"])
    checkpoint.load_weights(net, saved["ema"], run)
    mean, std = autoencoder.moments(net.eval(), batches)
    std = torch.where(std > 0, std, 1.0)  # a constant channel becomes 0
    return dict(autoencoder=settings["autoencoder"], weights=saved["ema"], mean=mean, std=std)


@dataclass
class LatentConfig(Config):
    latent: str = flag("", "the autoencoder: a run of python -m papers.autoencoder train",
                       positional="AUTOENCODER", group="latent diffusion")
    autoencoder: dict | None = None  # arguments of Autoencoder, from the autoencoder's run

    unused: ClassVar[tuple] = ("image_size", "channels", "init")
    prog: ClassVar[str] = "papers.latents"
    usage: ClassVar[str] = "python -m papers.latents AUTOENCODER [flags]"
    description: ClassVar[str] = ("Train a diffusion model on the latents of an autoencoder. The "
                                  "same command resumes it.")
    examples: ClassVar[str] = """\
  python -m papers.autoencoder train --data photos/ --image-size 64
  python -m papers.latents photos-autoencoder --etsdm
  python sample.py photos-tiny-latent-etsdm"""

    @classmethod
    def recipe(cls, given):
        if not given.get("latent"):
            raise ValueError("AUTOENCODER is missing: python -m papers.latents AUTOENCODER")
        first = settings_of(given["latent"], "latent")
        # A latent run holds an autoencoder too, but may replace only the one it was made from.
        if not first.get("autoencoder") or first.get("latent", given["latent"]) != given["latent"]:
            raise ValueError(f"{given['latent']} is not an autoencoder: python -m "
                             "papers.autoencoder train makes one")
        own = {k: first[k] for k in ("data", "image_size", "channels", "autoencoder")}
        return {**super().recipe(given), **own}

    def check_divisible(self):
        _, side, _ = self.latent_shape()
        unit = 2 ** (len(self.network()["channel_mult"]) - 1)
        if side % unit:
            raise ValueError(f"--preset {self.preset} needs latents whose side {unit} divides, not "
                             f"{side}x{side}: use an autoencoder with fewer --downsamplings")

    def latent_shape(self):
        return autoencoder.Autoencoder(**self.autoencoder).latent_shape

    def network(self):
        c, side, _ = self.latent_shape()
        return dict(super().network(), image_size=side, in_channels=c, out_channels=c, patch=1)

    def may_change(self):  # the checkpoint holds the autoencoder's weights, so its path may change
        return super().may_change() | {"latent"}

    def default_name(self):
        # The data's name if the autoencoder has its default name, else the autoencoder's.
        stem, name = Path(self.data.split(":")[0]).stem.lstrip("."), run_name(self.latent)
        head = stem if name == f"{stem}-autoencoder" else name
        preset, *rest = self.name_parts()
        return "-".join([head, preset, "latent", *rest] + [f"seed{self.seed}"] * bool(self.seed))


class LatentObjective(train.DiffusionObjective):
    """DiffusionObjective on latents. A new run stores the first stage, with its moments over the
    first 1024 images."""

    def __init__(self, config, dataset, saved):
        if saved is None:
            n = min(1024, len(dataset))
            some = (torch.stack([dataset[i] for i in range(start, min(start + 64, n))])
                    for start in range(0, n, 64))
            first_stage = first_stage_of(config.latent, map(data.to_float, some))
            saved = dict(extra=dict(first_stage=first_stage))
        super().__init__(config, dataset, saved)
        self.warnings = weights_changed(config.latent, self.denoiser.space.net.state_dict())


def main(argv=None):
    train.main(argv, LatentObjective, LatentConfig)


if __name__ == "__main__":
    ignore_write_errors()
    run_main(main)
