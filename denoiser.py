r"""The Denoiser: given x_t and t, what are x_0 and ε? The only place that converts between them.

    x_t = a x_0 + s ε            v = a ε − s x_0   (velocity, Salimans & Ho 2022)

    the network predicts    then x_0 is          and ε is
    ε  (eps)                (x_t − s ε)/a        ε
    x_0  (x0)               x_0                  (x_t − a x_0)/s
    v                       a x_t − s v          s x_t + a v
    F  (edm)                a d²/r² x_t + s d/r F        s/r² x_t − a d/r F

The last is EDM's preconditioning (Karras et al. 2022, table 1), d the std of the data (0.5 for
pixels, 1 for latents) and r = √(s² + a² d²) that of x_t: the network is shown x_t/r and told
ln(σ)/4, σ = s/a, and both its input and what it has to say have unit variance at every t. In EDM's
own coordinates, a = 1, s = σ, these are its c_in, c_skip, c_out and c_noise; in (a, s) they serve
every schedule.

A Denoiser is four things: a network, a schedule, a prediction type and a time condition. Losses,
samplers, metrics and analysis see only `predict`, so each works with any combination of the four:
E-TSDM is a value of `condition`, and nothing outside this file ever asks for it. A fifth, `space`,
says what x_0 is to the user: pixels, pixels beside a small image, or latents (spaces.py).

What this file does not do: draw noise, take steps, or define a network.

    from denoiser import load_run
    x0, eps = load_run("runs/shapes-tiny-sa2").predict(x, t)

x (B, C, H, W), where data are in [-1, 1]; t in [0, T], a number or (B,); net(x, c) the raw network.
"""

import copy
import functools
import shlex
from pathlib import Path

import torch

import etsdm
import files
import schedules
import spaces
import unet
from schedules import at, combine, match, noise_in, scales, solve

PREDICTIONS = ("eps", "v", "x0", "edm")


class Denoiser:
    """net: a Module or any callable net(x (B, ...), c (B,)) -> like x, or longer (second heads and
    learned variances come behind the prediction). condition: a pure function t -> c, whose answers
    to numbers are kept, or None for c = t."""

    def __init__(self, net, schedule, prediction="eps", condition=None, space=None):
        if prediction not in PREDICTIONS:
            raise ValueError(f"unknown prediction {prediction!r}: choose from "
                             + " ".join(PREDICTIONS))
        self.net, self.schedule, self.space = net, schedule, space
        self.prediction, self.condition = prediction, condition
        self.given = None  # (B, ...): what the network sees beside x, as further channels
        self.data_std = (spaces.Pixels if space is None else space).data_std  # d above

    def but(self, **changes):
        """This denoiser with some of its parts replaced, e.g. .but(net=another)."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def on(self, images):
        """Images (B, C, H, W) in [-1, 1] -> (their x_0, this denoiser, given what it may see of
        them)."""
        if self.space is None:
            return images, self
        return self.space.encode(images), self.but(given=self.space.given(images))

    def outputs(self, x, t, told=None):
        """All that the network says of x_t, told f(t): (B, C or more, ...), in x's precision
        whatever autocast made of it. told: another time, whose f it is told instead; x_t is shown
        as at t."""
        told = t if told is None else told
        seen = x / match(self.spread(t), x) if self.prediction == "edm" else x
        if self.given is not None:  # in the same order, as often as x_0 was repeated (SA-k)
            repeats = len(x) // len(self.given)
            beside = self.given.repeat(repeats, *[1] * (self.given.dim() - 1))
            seen = torch.cat([seen, beside.to(x.dtype)], dim=1)
        # x's precision, but never half: bf16 has no 999.
        dtype = x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32
        how = self.condition, self.schedule, self.prediction
        if type(told) is float:
            c = torch.full(x.shape[:1], number_told(told, *how), dtype=dtype, device=x.device)
        else:
            c = what_is_told(told, *how).to(x.device, dtype).expand(len(x))
        out = self.net(seen, c)
        return out if out.dtype is x.dtype else out.to(x.dtype)

    def spread(self, t):
        """r = √(s² + a² d²), the std of x_t: a number, or float64 of t's shape."""
        a, s = at(self.schedule, t) if type(t) is float else self.schedule.coefficients(t)
        return (s**2 + a**2 * self.data_std**2) ** 0.5

    def output(self, x, t, told=None):
        """The network's prediction at x_t, told f(t), or f(told): like x (B, C, ...)."""
        out = self.outputs(x, t, told)
        return out if out.shape == x.shape else out[:, :x.shape[1]]

    def explain(self, x, t, out):
        """x_t and the prediction `out` -> (x0, ε), all of one shape: the table above."""
        a, s = scales(self.schedule, t, x)
        if self.prediction == "eps":
            return solve(x, s, out, a), out
        if self.prediction == "x0":
            return out, noise_in(self.schedule, x, t, out)
        if self.prediction == "v":
            power = a**2 + s**2  # 1, but for the edm schedule
            return combine(a / power, x, -s / power, out), combine(s / power, x, a / power, out)
        d, r = self.data_std, match(self.spread(t), x)
        return (combine(a * d**2 / r**2, x, s * d / r, out),
                combine(s / r**2, x, -a * d / r, out))

    def predict(self, x, t):
        """x_t (B, ...), t a number or (B,) -> (x0, ε), both like x. From ε-prediction x0 is not to
        be had where ᾱ = 0: it comes out infinite or NaN."""
        return self.explain(x, t, self.output(x, t))


def what_is_told(t, condition, schedule, prediction):
    """f(t) of a network with this condition: t a number or (B,) -> a tensor of its shape."""
    t = torch.as_tensor(t, dtype=None if torch.is_tensor(t) else torch.float64)
    c = t if condition is None else condition(t)
    if prediction == "edm":
        # What is shared is t, the coordinate of EDM's own grid of noise levels. ln 0 is no number:
        # a part that begins at t = 0 is told the level of t = 1, the grid's last.
        lam = schedule.lam(torch.where(c > 0, c.double(), 1.0))
        c = -lam.clamp(min=-10.0) / 4  # ln(σ)/4; the bound is for ᾱ = 0, where σ = ∞
    return c


@functools.lru_cache(maxsize=8192)
def number_told(t, condition, schedule, prediction):
    """The same for a number, as a number, and kept, as schedules.at keeps coefficients."""
    return float(what_is_told(t, condition, schedule, prediction))


def zero_based(t):
    """The condition of imported checkpoints: guided-diffusion, SA-DPM and most others count DDPM's
    steps 0..T-1, ours are 1..T, so their networks are told t - 1."""
    return t - 1


def from_settings(settings, net=None, first_stage=None):
    """The Denoiser that settings (the flat dict of config.json) describe, which it then carries as
    .settings. net=None builds its U-Net; first_stage: the checkpoint's, of latent runs."""
    schedule = schedules.make_schedule(settings["schedule"], settings["T"], settings["continuous"],
                                       settings["unet"]["image_size"])
    condition = etsdm.make_condition(settings["etsdm"], settings["etsdm_interval"],
                                     settings["etsdm_n"], settings["remap"], settings["T"])
    if settings.get("imported"):
        condition = zero_based
    net = unet.UNet(**settings["unet"]) if net is None else net
    space = spaces.from_settings(settings, first_stage)
    denoiser = Denoiser(net, schedule, settings["prediction"], condition, space)
    denoiser.settings = settings
    return denoiser


def load_run(run, weights="ema"):
    """Open a run folder (or its checkpoint.pt) -> Denoiser in eval mode, on the CPU, its settings
    in .settings, and .folder, .step, .weights.

    weights: "ema" (what the papers sample from) or "raw". ValueError or OSError, one line each, if
    it is no run, or one that makes no pictures.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights are ema or raw, not {weights!r}")
    path = files.find_checkpoint(run)
    checkpoint = files.load_checkpoint(path)
    if checkpoint["settings"].get("task") == "autoencoder":
        command = shlex.join(["python", "train.py", "--latent", path.parent.name])
        raise ValueError(f"{path.parent} is an autoencoder, which draws nothing by itself: train a "
                         f"model of its latents, {command}")
    try:
        denoiser = from_settings(checkpoint["settings"],
                                 first_stage=checkpoint.get("extra", {}).get("first_stage"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"the settings in {path} do not describe a model of this version "
                         f"({error})") from error
    files.load_weights(denoiser.net, checkpoint[weights], path)
    denoiser.folder, denoiser.step, denoiser.weights = path.parent, checkpoint["step"], weights
    denoiser.net.eval().requires_grad_(False)
    return denoiser


def load_guided_diffusion(path, preset, schedule="linear"):
    """A checkpoint of OpenAI's guided-diffusion, of the size `preset` -> Denoiser, as load_run.

    Those that learnt a variance too (learn_sigma) have twice the outputs: `output` leaves theirs
    out. ValueError, OSError: one line.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        state = files.read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{path} holds no weights ({error})") from error
    if isinstance(state, dict) and state.get("format") == files.FORMAT:
        raise ValueError(f"{path} is a run of train.py: give it as RUN")
    tensors = isinstance(state, dict) and all(torch.is_tensor(v) for v in state.values())
    if not tensors or not state:
        raise ValueError(f"{path} is no state dict of a network: it holds "
                         f"{files.describe(state)}")
    try:
        state = unet.from_guided_diffusion(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    channels, outputs = state["input_blocks.0.0.weight"].shape[1], len(state["out_conv.weight"])
    if channels not in (1, 3) or outputs not in (channels, 2 * channels):
        raise ValueError(f"{path} has {channels} channels in and {outputs} out: only networks that "
                         "draw images from noise can be loaded, no upsamplers")
    size = dict(unet.PRESETS[preset], in_channels=channels, out_channels=outputs)
    net = unet.UNet(**size)
    files.load_weights(net, state, path, f"the preset {preset}")
    side = size["image_size"]
    denoiser = from_settings(dict(
        schedule=schedule, T=1000, continuous=False, image_size=side, channels=channels,
        prediction="eps", etsdm=False, etsdm_interval=100, etsdm_n=5, remap=None, unet=size,
        imported=True, data=None), net)
    denoiser.folder, denoiser.step, denoiser.weights = Path(path).resolve().parent, None, "imported"
    denoiser.net.eval().requires_grad_(False)
    return denoiser
