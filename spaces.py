r"""What x_0 is to the user: an image, an image that a small one is known of, or a latent.

    Pixels     x_0 is the image itself
    LowRes     super-resolution: the network also sees the small image, enlarged, beside x_t
    Latents    x_0 is what an autoencoder makes of the image, shifted and scaled to mean 0 and
               variance 1 per channel (latent diffusion, Rombach et al. 2022)

Each has the same parts, so neither the trainer nor a sampler asks which it is:

    shape               (C, H, W) of x_0              bounds       its range, or None if it has none
    encode, decode      images <-> x_0                given        what the network sees besides x_t
    data_std            its std, about (EDM)          show         what a training grid shows

E-TSDM is tried on all three (its super-resolution is from 64 to 256 pixels, its latent diffusion
LDM-4 on FFHQ): noise, time and sharing know nothing of spaces, and the other way round.

What this file does not do: the autoencoder itself (autoencoder.py); text or classes.

    python -c "import spaces; print(spaces.LowRes(3, 64, 4).shape)"
    python train.py --task sr --factor 4                python train.py --latent RUN

B images, C channels, H = W their side in pixels; images in [-1, 1].
"""

import torch
import torch.nn.functional as F

import autoencoder
import data
import files


class Pixels:
    """x_0 is the image: shape (C, H, W), in [-1, 1]."""

    bounds, data_std = (-1.0, 1.0), 0.5  # EDM's figure for images

    def __init__(self, channels, side):
        self.shape = (channels, side, side)

    def encode(self, images):
        return images

    def decode(self, x0):
        return x0

    def given(self, images):
        """What is known of the images (B, C, H, W) beforehand: nothing."""
        return None

    def show(self, samples, images):
        """A training grid: uint8 samples (n, C, H, W), and the images that they go with -> what to
        put side by side (n or more, C, H, W), and how many belong together."""
        return samples, 1


class LowRes(Pixels):
    """Super-resolution by a factor: pixels, of which the mean over each factor x factor block is
    known."""

    def __init__(self, channels, side, factor):
        super().__init__(channels, side)
        self.factor = factor
        if factor < 2 or side % factor:
            raise ValueError(f"--factor {factor} must be at least 2 and divide the {side} pixels")

    def shrink(self, images):
        """(B, C, H, W) -> (B, C, H/factor, W/factor), rounded to 256 levels as a file would be."""
        return data.to_float(data.to_uint8(F.avg_pool2d(images.float(), self.factor)))

    def enlarge(self, small):
        """The small images at full size, bicubic: what the network is given, and what it has to
        beat."""
        # antialias: the kernel of Pillow and MATLAB (a = -1/2), which keeps straight lines straight
        large = F.interpolate(small, scale_factor=self.factor, mode="bicubic", antialias=True)
        return large.clamp(-1, 1)

    def given(self, images):
        return self.enlarge(self.shrink(images))

    def show(self, samples, images):
        return torch.stack([data.to_uint8(self.given(data.to_float(images))), samples, images],
                           dim=1).flatten(0, 1), 3


class Latents:
    """x_0 is an autoencoder's mean, less its mean over the data, over its std, per channel."""

    bounds, data_std = None, 1.0  # a latent has no range to clip to

    def __init__(self, first_stage):
        self.net = autoencoder.Autoencoder(**first_stage["autoencoder"])
        files.load_weights(self.net, first_stage["weights"], "the first stage")
        self.net.eval().requires_grad_(False)
        self.shape = self.net.latent_shape
        self.mean, self.std = (first_stage[k].float()[:, None, None] for k in ("mean", "std"))

    @torch.no_grad()
    def encode(self, images):
        """The mean of q(z | image), not a draw from it: its std is a few hundredths of what the
        latents themselves vary by, and a mean needs no random numbers."""
        net = self.net.to(images.device)
        return (net.encode(images)[0].float() - self.mean.to(images)) / self.std.to(images)

    @torch.no_grad()
    def decode(self, x0):
        net = self.net.to(x0.device)
        return net.decode(x0.float() * self.std.to(x0.device) + self.mean.to(x0.device))

    def given(self, images):
        return None

    def show(self, samples, images):
        return samples, 1


def from_settings(s, first_stage=None):
    """The space of a run with settings s; first_stage: what first_stage_of returned."""
    if s.get("latent"):
        return Latents(first_stage)
    if s.get("task") == "sr":
        return LowRes(s["channels"], s["image_size"], s["factor"])
    return Pixels(s["channels"], s["image_size"])


def first_stage_of(run, batches):
    """The averaged weights of an autoencoder run, and the mean and std of its latents over some
    batches of images: all that a latent run has to keep of it, as a checkpoint's entry."""
    checkpoint = files.load_checkpoint(files.find_checkpoint(run))
    settings = checkpoint["settings"]
    net = autoencoder.Autoencoder(**settings["autoencoder"])
    files.load_weights(net, checkpoint["ema"], run)
    mean, std = autoencoder.moments(net.eval(), batches)
    std = torch.where(std > 0, std, 1.0)  # a channel that says nothing stays 0
    return dict(autoencoder=settings["autoencoder"], weights=checkpoint["ema"], mean=mean, std=std)
