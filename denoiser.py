r"""The Denoiser estimates x_0 and ε from x_t and t. Only this file converts between predictions.

    x_t = α x_0 + σ ε            v = α ε − σ x_0   (velocity, Salimans & Ho 2022)

    the network predicts    then x_0 is              and ε is
    ε  (eps)                (x_t − σ ε)/α            ε
    x_0  (x0)               x_0                      (x_t − α x_0)/σ
    v                       α x_t − σ v              σ x_t + α v
    F  (edm)                α d²/r² x_t + σ d/r F    σ/r² x_t − α d/r F

The last is EDM's preconditioning (Karras et al. 2022, table 1), with d the std of the data (0.5 for
pixels, 1 for latents) and r = √(σ² + α² d²) the std of x_t. The network receives x_t/r and, as its
time input, ln(σ/α)/4. Its input and its target then have unit variance at every t. For α = 1, as in
EDM, these are EDM's c_in, c_skip, c_out and c_noise; with (α, σ) they hold for every schedule.

A Denoiser joins a network, a schedule, a prediction type and a time input t -> c. Losses, samplers,
metrics and analysis use only `predict`, so each works with any combination: E-TSDM is one value of
`time_input`. A fifth part, `space`, defines what x_0 is: pixels, pixels next to a small image
(papers/superres.py), or latents (papers/latents.py).

Not here: noise, steps, or the network itself (unet.py).

    from denoiser import load_run
    x0, eps = load_run("runs/shapes-tiny-sa2").predict(x, t)

x (B, C, H, W), data in [-1, 1]; t in [0, T], a number or (B,); net(x, c) the raw network, c (B,).
"""

import copy
import importlib
import shlex
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import etsdm
import schedules
import unet
from config import PREDICTIONS
from schedules import Schedule, eps_from_x0, expand
from support import checkpoint

# Settings that name a part of papers/: its module's extend() adds it to the denoiser.
PARTS = {"remap": "papers.alternatives", "factor": "papers.superres", "latent": "papers.latents"}


class Pixels:
    """x_0 is the image itself: shape (C, H, W), values in [-1, 1]."""
    value_range, data_std = (-1.0, 1.0), 0.5  # EDM's std of images

    def __init__(self, shape: tuple[int, ...]):
        self.shape = tuple(shape)

    def encode(self, images: Tensor) -> Tensor:
        return images

    def decode(self, x0: Tensor) -> Tensor:
        return x0

    def conditioning(self, images: Tensor) -> Tensor | None:
        """What the network receives of the images in addition to x_t: nothing."""
        return None


class Denoiser:
    """net: a Module or any callable net(x (B, C, ...), c (B,)) -> (B, C or more, ...); the channels
    of a second head or learned variance come last. time_input: a function t -> c, None for c = t"""

    def __init__(self, net: Callable, schedule: Schedule, prediction: str = "eps",
                 time_input: Callable | None = None, space=None):
        if prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {prediction!r}: use {' '.join(PREDICTIONS)}")
        self.net, self.schedule, self.prediction = net, schedule, prediction
        self.time_input, self.space = time_input, space or Pixels(())
        self.conditioning = None  # (B, ...): further input channels of the network

    data_std = property(lambda self: self.space.data_std)  # d above
    shape = property(lambda self: self.space.shape)  # (C, H, W) of x_0
    value_range = property(lambda self: self.space.value_range)  # (low, high) of x_0, or None

    def replace(self, **parts) -> "Denoiser":
        """A copy with some parts replaced, e.g. .replace(net=another)."""
        other = copy.copy(self)
        vars(other).update(parts)
        return other

    def encode(self, images: Tensor) -> tuple[Tensor, "Denoiser"]:
        """Images (B, C, H, W) in [-1, 1] -> (their x_0, this denoiser with its conditioning)."""
        return self.space.encode(images), self.replace(conditioning=self.space.conditioning(images))

    def decode(self, x0: Tensor) -> Tensor:
        """x_0 -> images (B, C, H, W), roughly in [-1, 1]."""
        return self.space.decode(x0)

    def marginal_std(self, t: Tensor | float) -> Tensor:
        """r = √(σ² + α² d²), the std of x_t: float64 of t's shape."""
        alpha, sigma = self.schedule.alpha_sigma(t)
        return (sigma**2 + alpha**2 * self.data_std**2).sqrt()

    def time_input_at(self, t: Tensor | float) -> Tensor:
        """The network's time input at t, a number or (B,): a tensor of t's shape."""
        t = torch.as_tensor(t, dtype=None if torch.is_tensor(t) else torch.float64)
        c = t if self.time_input is None else self.time_input(t)
        if self.prediction == "edm":
            # E-TSDM shares t, the coordinate of EDM's grid of noise levels. At t = 0, ln σ does not
            # exist, so the sub-interval from 0 on gets the level of t = 1, the last of the grid.
            lam = self.schedule.lam(torch.where(c > 0, c.double(), 1.0))
            c = -lam.clamp(min=-10.0) / 4  # ln(σ/α)/4; the clamp is for alpha_bar = 0
        return c

    def network_output(self, x: Tensor, t: Tensor | float,
                       t_input: Tensor | float | None = None) -> Tensor:
        """Raw network output at x_t: (B, C or more, ...), in x's dtype even under autocast.

        t_input: a time that replaces t in the time input only; x_t is still scaled for t. This
        measures the slope in t alone.
        """
        net_input = x / expand(self.marginal_std(t), x) if self.prediction == "edm" else x
        if self.conditioning is not None:  # SA-k repeats the batch: repeat this in the same order
            times = len(x) // len(self.conditioning)
            repeated = self.conditioning.repeat(times, *[1] * (self.conditioning.dim() - 1))
            net_input = torch.cat([net_input, repeated.to(x.dtype)], dim=1)
        dtype = torch.promote_types(x.dtype, torch.float32)  # bf16 would round t = 999 to 1000
        c = self.time_input_at(t if t_input is None else t_input)
        c = c.to(x.device, dtype, non_blocking=x.is_cuda).expand(len(x))
        return self.net(net_input, c).to(x.dtype)

    def prediction_at(self, x: Tensor, t: Tensor | float,
                      t_input: Tensor | float | None = None) -> Tensor:
        """The network's prediction at x_t, without the output of a second head: like x."""
        return self.network_output(x, t, t_input)[:, :x.shape[1]]

    def to_x0_eps(self, x: Tensor, t: Tensor | float, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and the network's prediction -> (x0, eps), all of one shape: the table above."""
        alpha, sigma = (expand(k, x) for k in self.schedule.alpha_sigma(t))
        if self.prediction == "eps":
            return (x - sigma * prediction) / alpha, prediction
        if self.prediction == "x0":
            return prediction, eps_from_x0(self.schedule, x, t, prediction)
        if self.prediction == "v":
            power = alpha**2 + sigma**2  # 1, except for the edm schedule
            return ((alpha * x - sigma * prediction) / power,
                    (sigma * x + alpha * prediction) / power)
        d, r = self.data_std, expand(self.marginal_std(t), x)
        return (alpha * d**2 / r**2 * x + sigma * d / r * prediction,
                sigma / r**2 * x - alpha * d / r * prediction)

    def predict(self, x: Tensor, t: Tensor | float) -> tuple[Tensor, Tensor]:
        """x_t (B, ...), t a number or (B,) -> (x0, eps), both like x. With eps-prediction, x0 is
        infinite or NaN if alpha_bar = 0: x_t then holds no x_0."""
        return self.to_x0_eps(x, t, self.prediction_at(x, t))


def zero_based_time(T: int = 1000, share: Callable | None = None) -> Callable[[Tensor], Tensor]:
    """The time input of imported networks: t - 1, in thousandths of T. Their programs count DDPM's
    steps 0..T-1, this one 1..T. share: E-TSDM's f, applied to their count."""
    return lambda t: (share(t - 1) if share else t - 1) * (1000 / T)


def build_denoiser(settings: dict, extra: dict | None = None) -> Denoiser:
    """The Denoiser that a run's settings describe, with a new U-Net; settings are attached.

    settings: Config.settings(), as in config.json. extra: further contents of a checkpoint (latent
    diffusion's first stage). KeyError, ValueError, TypeError: they do not describe a denoiser.
    """
    schedule = schedules.make_schedule(settings["schedule"], settings["T"], settings["continuous"],
                                       settings["unet"]["image_size"],
                                       settings.get("betas") or (1e-4, 0.02))
    time_input = None
    if settings["etsdm"]:
        time_input = etsdm.make_time_input(settings["etsdm_interval"], settings["etsdm_n"])
    if settings.get("imported"):
        time_input = zero_based_time(settings["T"], time_input)
    net = unet.UNet(**settings["unet"])
    space = Pixels((settings["channels"], settings["image_size"], settings["image_size"]))
    denoiser = Denoiser(net, schedule, settings["prediction"], time_input, space)
    for key, module in PARTS.items():
        if settings.get(key):
            denoiser = importlib.import_module(module).extend(denoiser, settings, extra or {})
    denoiser.settings = settings
    return denoiser


def load_run(run: str | Path | None, weights: str = "ema") -> Denoiser:
    """Open a run folder, its checkpoint.pt, a name under runs/, or None for the newest run.

    weights: "ema" (averaged; the papers sample from these) or "raw" (the last ones). -> Denoiser in
    eval mode on the CPU, with .settings, .folder, .step, .weights. ValueError, OSError, in one
    line: this is not a run, or the run cannot generate images.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights are ema or raw, not {weights!r}")
    path = checkpoint.find_checkpoint(run)
    saved = checkpoint.load_checkpoint(path)
    if "unet" not in saved["settings"]:
        name = shlex.quote(path.parent.name)
        raise ValueError(f"{path.parent} is an autoencoder and cannot generate images: train a "
                         f"model of its latents, python -m papers.latents {name}")
    try:
        denoiser = build_denoiser(saved["settings"], saved.get("extra", {}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: the settings do not describe a model of this version "
                         f"({error})") from error
    checkpoint.load_weights(denoiser.net, saved["ema" if weights == "ema" else "net"], path)
    denoiser.folder, denoiser.step, denoiser.weights = path.parent, saved["step"], weights
    denoiser.net.eval().requires_grad_(False)
    return denoiser
