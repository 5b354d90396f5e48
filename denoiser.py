r"""The Denoiser: given x_t and t, what are x_0 and ε? The only place that converts between them.

    x_t = a x_0 + s ε            v = a ε − s x_0   (velocity, Salimans & Ho 2022)

    the network predicts    then x_0 is          and ε is
    ε  (eps)                (x_t − s ε)/a        ε
    x_0  (x0)               x_0                  (x_t − a x_0)/s
    v                       a x_t − s v          s x_t + a v

A Denoiser is four things: a network, a schedule, a prediction type and a time condition. Losses,
samplers, metrics and analysis see only `predict`, so each works with any combination of the four:
E-TSDM is a value of `condition`, and nothing outside this file ever asks for it.

What this file does not do: draw noise, take steps, or define a network.

    from denoiser import load_run
    x0, eps = load_run("runs/shapes-tiny-sa2").predict(x, t)

x (B, C, H, W), where data are in [-1, 1]; t in [0, T], a number or (B,); net(x, c) the raw network.
"""

import torch

import etsdm
import runtime
import schedules
import unet
from schedules import match

PREDICTIONS = ("eps", "v", "x0")


class Denoiser:
    """net: a Module or any callable net(x (B, ...), c (B,)) -> like x. condition: t -> c, or None
    for c = t."""

    def __init__(self, net, schedule, prediction="eps", condition=None):
        if prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {prediction!r}: choose from "
                             + " ".join(PREDICTIONS))
        self.net, self.schedule = net, schedule
        self.prediction, self.condition = prediction, condition

    def output(self, x, t):
        """The raw network's answer, told f(t): (B, ...) like x, and in x's precision whatever
        autocast made of it."""
        t = torch.as_tensor(t, dtype=torch.float64) if not isinstance(t, torch.Tensor) else t
        c = t if self.condition is None else self.condition(t)
        # x's precision, but never half: bf16 has no 999.
        dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        return self.net(x, c.to(x.device, dtype).expand(len(x))).to(x.dtype)

    def predict(self, x, t):
        """x_t (B, ...), t a number or (B,) -> (x0, ε), both like x. From ε-prediction x0 is not to
        be had where ᾱ = 0: it comes out infinite or NaN."""
        out = self.output(x, t)
        a, s = (match(k, x) for k in self.schedule.coefficients(t))
        if self.prediction == "eps":
            return (x - s * out) / a, out
        if self.prediction == "x0":
            return out, (x - a * out) / s
        return a * x - s * out, s * x + a * out  # v


def zero_based(t):
    """The condition of imported checkpoints: guided-diffusion, SA-DPM and most others count DDPM's
    steps 0..T-1, ours are 1..T, so their networks are told t - 1."""
    return t - 1


def from_settings(settings, net=None):
    """The Denoiser that settings (the flat dict of config.json) describe, which it then carries as
    .settings. net=None builds its U-Net."""
    schedule = schedules.make_schedule(settings["schedule"], settings["T"], settings["continuous"],
                                       settings["image_size"])
    condition = etsdm.make_condition(settings["etsdm"], settings["etsdm_interval"],
                                     settings["etsdm_n"], settings["remap"], settings["T"])
    net = unet.UNet(**settings["unet"]) if net is None else net
    denoiser = Denoiser(net, schedule, settings["prediction"], condition)
    denoiser.settings = settings
    return denoiser


def load_run(run, weights="ema"):
    """Open a run folder (or its checkpoint.pt) -> Denoiser in eval mode, on the CPU, its settings
    in .settings.

    weights: "ema" (what the papers sample from) or "raw". ValueError or OSError, one line each, if
    it is no run.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights are ema or raw, not {weights!r}")
    path = runtime.find_checkpoint(run)
    checkpoint = runtime.load_checkpoint(path)
    denoiser = from_settings(checkpoint["settings"])
    runtime.load_weights(denoiser.net, checkpoint[weights], path)
    denoiser.step = checkpoint["step"]
    denoiser.net.eval().requires_grad_(False)
    return denoiser
