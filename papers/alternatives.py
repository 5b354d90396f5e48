r"""The alternatives in E-TSDM's comparison (remaps of time, DDPM-r), and SA-reuse, a cheaper SA-k.

A remap is an invertible time input f(t) that stretches small t (E-TSDM, tables A3 to A5):

    sqrt              f(t) = T √u,  u = t/T
    inverse-sigmoid   f(t) = T (1 + logit(m + (1 − 2m) u)/logit(1 − m))/2,  m = MARGIN

These tables have four strategies. Training draws t uniformly in t or in f(t) (--train-times remap).
Sampling takes equal steps in t or in f(t) (sample.py --spacing remap).

DDPM-r penalises the slope in t: one x_t, with two time inputs,

    L_slope = E‖net(x_t, f(t)) − net(x_t, f(t'))‖²/(t − t')²,   t' = t + 1          --lipschitz-reg

The paper names only K(t, t') as its penalty. The square, the mean over pixels and the weights are
not from the paper.

SA-reuse (not from a paper): L_simple also uses all k noise levels that SA-k computes for an image.

    python -m papers.alternatives --remap sqrt --train-times remap
    python -m papers.alternatives --lipschitz-reg 30
    python -m papers.alternatives --sa-k 2 --sa-reuse --batch-size 16

Not here: Modified-NS, which is a schedule (train.py --schedule linear-mns).

B images, k consecutive steps; t in [0, T]; c = f(t) the time input.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

import losses
import train
from config import Config
from schedules import add_noise, expand
from support.cli import flag, require
from support.programs import ignore_write_errors, run_main

REMAPS = ("sqrt", "inverse-sigmoid")
MARGIN = 1e-3  # inverse-sigmoid: distance of the ends of [0, T] from the poles of logit


# ------------------------------------------------------------------ remaps of time

def remap(t, name, T=1000):
    r"""An invertible f of [0, T] onto itself, steep at small t: t -> float64 of the same shape.

    inverse-sigmoid is the inverse of the logistic function, cut just before its poles. t > T
    (Heun's churn on EDM's schedule) counts as T. ValueError: unknown name.
    """
    u = torch.as_tensor(t, dtype=torch.float64) / T
    if name == "sqrt":
        return T * u.sqrt()
    if name == "inverse-sigmoid":
        logit = torch.logit(MARGIN + (1 - 2 * MARGIN) * u.clamp(max=1))
        return T * (1 + logit / math.log((1 - MARGIN) / MARGIN)) / 2
    raise ValueError(f"unknown remap {name!r}: choose from {' '.join(REMAPS)}")


def unremap(c, name, T=1000):
    """The inverse of remap: the t with time input c."""
    w = torch.as_tensor(c, dtype=torch.float64) / T
    if name == "sqrt":
        return T * w**2
    if name == "inverse-sigmoid":
        p = torch.sigmoid((2 * w - 1) * math.log((1 - MARGIN) / MARGIN))
        return T * (p - MARGIN) / (1 - 2 * MARGIN)
    raise ValueError(f"unknown remap {name!r}: choose from {' '.join(REMAPS)}")


def time_at_quantile(u, name, low, high, T=1000):
    """u in [0, 1], a number or a tensor -> t in [low, high] with f(t) = f(low) + u (f(high) −
    f(low)). If u is uniform, so is f(t)."""
    ends = remap(torch.tensor([low, high], dtype=torch.float64), name, T).tolist()
    u = torch.as_tensor(u, dtype=torch.float64)
    return unremap(ends[0] + u * (ends[1] - ends[0]), name, T)


def sampling_grid(name, points, t_start, t_end=1.0, T=1000):
    """Falling times from t_start to t_end, equal steps in f(t): float64 (points,)."""
    times = time_at_quantile(torch.linspace(1, 0, points, dtype=torch.float64), name, t_end,
                             t_start, T)
    times[-1], times[0] = t_end, t_start  # rounding must not move the ends
    return times


def extend(denoiser, settings, extra):
    """Add the time input and the grid of --spacing remap to a denoiser. denoiser.build_denoiser
    calls this for settings with a remap."""
    name, T = settings["remap"], settings["T"]
    denoiser = denoiser.replace(time_input=lambda t: remap(t, name, T))
    denoiser.sampling_grid = lambda points, t_start, t_end=1.0: sampling_grid(
        name, points, t_start, t_end, T)
    return denoiser


# ------------------------------------------------------------------ the losses

def adjacent_time(t, T):
    """t' of DDPM-r: t + 1, or t − 1 at the upper end. (B,) like t."""
    return torch.where(t + 1 <= T, t + 1, t - 1)


def regularized_loss(denoiser, x0, t, noises, space="eps"):
    """(L_simple, L_SA, L_slope), each (B,), from one forward pass. Its batch holds the k noise
    levels, then x_t again with the time input of t' (t − t' is 1 or −1)."""
    k, B = noises.shape[:2]
    ts, valid = losses.consecutive_times(t, k)
    repeated = x0.repeat(k, *[1] * (x0.dim() - 1))  # (k B, ...)
    xt = add_noise(denoiser.schedule, repeated, ts.flatten(), noises.flatten(0, 1))
    t_next = adjacent_time(t, denoiser.schedule.T)  # second time input of x_t
    out = denoiser.prediction_at(torch.cat([xt, xt[:B]]), torch.cat([ts.flatten(), t]),
                                 t_input=torch.cat([ts.flatten(), t_next]))
    slope = losses.mean_square(out[:B] - out[k * B:])
    x0_hat, eps_hat = (p.unflatten(0, (k, B))
                       for p in denoiser.to_x0_eps(xt, ts.flatten(), out[:k * B]))
    r = noises - eps_hat
    simple = losses.mean_square(
        losses.residual_in(space, denoiser, r[0], x0 - x0_hat[0], t))
    mask = expand(valid.flatten(), repeated).unflatten(0, (k, B))
    return simple, losses.mean_square((r * mask).sum(0) / k), slope


def reuse_loss(denoiser, x0, t, noises, space="eps"):
    """losses.sa_loss with L_simple as the mean over all k noise levels, which L_SA needs anyway."""
    k, B = noises.shape[:2]
    ts, valid = losses.consecutive_times(t, k)
    repeated = x0.repeat(k, *[1] * (x0.dim() - 1))  # (k B, ...)
    xt = add_noise(denoiser.schedule, repeated, ts.flatten(), noises.flatten(0, 1))
    x0_hat, eps_hat = denoiser.predict(xt, ts.flatten())
    r = noises.flatten(0, 1) - eps_hat  # (k B, ...)
    each = losses.mean_square(losses.residual_in(space, denoiser, r, repeated - x0_hat,
                                                 ts.flatten())).unflatten(0, (k, B))
    mask = expand(valid.flatten(), repeated)
    sa = losses.mean_square((r * mask).unflatten(0, (k, B)).sum(0) / k)
    valid = valid.to(each.device)
    return (each * valid).sum(0) / valid.sum(0), sa


@dataclass
class AlternativeConfig(Config):
    remap: str | None = flag(None, "give the network an invertible function of t", choices=REMAPS,
                             group="alternatives")
    lipschitz_reg: float = flag(0.0, "DDPM-r: weight of the squared slope in t, a mean over "
                                "pixels, e.g. 30; needs another forward pass", metavar="WEIGHT")
    sa_reuse: bool = flag(False, "the plain loss uses all k noise levels of --sa-k; with 1/k of "
                          "the batch size, a step costs as much as a plain step")
    # Config has this flag too; here it has one more choice.
    train_times: str | None = flag(None, "distribution of t: uniform in t, uniform in the --remap, "
                                   "or log-normal in the noise level",
                                   choices=("uniform", "lognormal", "remap"),
                                   shown="uniform; lognormal for --schedule edm")

    unused: ClassVar[tuple] = ("init",)
    prog: ClassVar[str] = "papers.alternatives"
    usage: ClassVar[str] = "python -m papers.alternatives [flags]"
    description: ClassVar[str] = "Train the alternatives in E-TSDM's comparison, or SA-reuse."
    examples: ClassVar[str] = """\
  python -m papers.alternatives --remap sqrt --train-times remap
      then: python sample.py --spacing remap
  python -m papers.alternatives --lipschitz-reg 30
  python -m papers.alternatives --sa-k 2 --sa-reuse --batch-size 16"""

    def check(self):
        super().check()
        require(self, "lipschitz_reg", 0 <= self.lipschitz_reg < math.inf, "must be 0 or more")
        if "lipschitz_reg" in self.given and not self.lipschitz_reg:
            raise ValueError("--lipschitz-reg must be above 0: leave it out for the plain loss")
        if self.remap and self.etsdm:
            raise ValueError("--remap and --etsdm are alternatives: both define the time input")
        if self.remap and self.prediction == "edm":
            raise ValueError("--remap does not work with edm prediction (time input ln(σ)/4): "
                             "choose another --prediction")
        if self.train_times == "remap" and not self.remap:
            raise ValueError("--train-times remap needs --remap: add it")
        if self.sa_reuse and (self.sa_k == 1 or not self.sa_weight):
            raise ValueError("--sa-reuse needs --sa-k 2 or more, and --sa-weight above 0")
        if self.sa_reuse and self.lipschitz_reg:
            raise ValueError("--sa-reuse and --lipschitz-reg: choose one")

    def name_parts(self):
        parts = super().name_parts()
        times = [p for p in parts if p.endswith("-times")]
        return ([p for p in parts if p not in times] + ["reuse"] * self.sa_reuse
                + [self.remap or ""] + ["reg"] * bool(self.lipschitz_reg) + times)


class AlternativeObjective(train.DiffusionObjective):
    """DiffusionObjective with the losses above."""

    def __init__(self, config, dataset=None, saved=None):
        super().__init__(config, dataset, saved)
        if config.lipschitz_reg:
            self.loss_names = ("simple", "sa", "slope")
        if config.train_times == "remap":
            self.quantile = lambda u: time_at_quantile(u, config.remap, *self.t_range, config.T)

    def loss(self, model, images, draws):
        if not (self.config.lipschitz_reg or self.config.sa_reuse):
            return super().loss(model, images, draws)
        x0, denoiser = self.denoiser.replace(net=model).encode(images)
        arguments = (denoiser, x0, draws["t"], draws["noises"].transpose(0, 1),
                     self.config.loss_space)
        if self.config.sa_reuse:
            simple, sa = reuse_loss(*arguments)
            return simple + self.config.sa_weight * sa, dict(simple=simple, sa=sa)
        simple, sa, slope = regularized_loss(*arguments)
        sa = sa * (self.k > 1)  # k = 1 is plain DDPM
        loss = simple + self.config.sa_weight * sa + self.config.lipschitz_reg * slope
        return loss, dict(simple=simple, sa=sa, slope=slope)


def main(argv=None):
    train.main(argv, AlternativeObjective, AlternativeConfig)


if __name__ == "__main__":
    ignore_write_errors()
    run_main(main)
