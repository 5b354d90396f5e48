r"""Three estimates of Var[ε | x_t], which gives the variance of a reverse step.

A step from t to t_next needs x_0 and ε. The network gives only their means given x_t, without their
variance. With ε = (x_t − α_t x_0)/σ_t in the step, and with its fresh noise, x_next has

    mean      α_next x̂_0 + √(σ_next² − η²β̃) ε_θ                 the step of samplers.py
    variance  η²β̃ + A² Cov0,   A = α_next − √(σ_next² − η²β̃) α_t/σ_t
              Cov0 = Var[x_0 | x_t] = (σ_t/α_t)² Var[ε | x_t]

--variance small sets Cov0 = 0: nearly right in 1000 steps, too small in 10. Analytic-DPM (Bao et
al., ICLR 2022), NPR- and SN-DPM (Bao et al., ICML 2022, "Estimating the Optimal Covariance with
Imperfect Mean") estimate Var[ε | x_t]:

    analytic  1 − Γ_t,   Γ_t = E‖ε_θ(x_t, t)‖²/d      one number per t, from some training images
    npr       h(x_t, t), a second head trained on (ε − ε_θ)²          for each x_t and each pixel
    sn        h(x_t, t) − ε_θ², a second head trained on ε²           for each x_t and each pixel

For the ideal ε_θ, all three agree on average over x_t. For a trained ε_θ, NPR's target also
contains the error of ε_θ. The papers clip in two ways. Data in [low, high] have Cov0 <= ((high −
low)/2)². This matters near T, where (σ/α)² magnifies an error of Γ 25,000 times. And the noise of
the last step with noise, the step to t = 1, must stay invisible: E|std z| = std √(2/π) is at most
2 grey levels (DDPM) or 1 (DDIM).

If x̂_0 is clipped, the samplers here recompute ε from it; the papers' DDIM keeps the network's ε.

Not here: training of the heads (heads.py), the step itself (samplers.py).

    python -m papers.covariance RUN     # estimate Γ, once per checkpoint: analytic.npz, .csv, .png
    python sample.py RUN --sampler ddpm --variance analytic --nfe 25

x (B, C, H, W); t, t_next times; α, σ, β, β̃ as in schedules.py; Γ (T+1,); d numbers of an image;
ε_θ and x̂_0 from the network, h its second head; var_eps an estimate of Var[ε | x_t].
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import hashlib
import math
import shlex
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from tqdm import tqdm

import data
import schedules
from denoiser import Pixels, load_run
from gap import step_coefficients
from support import checkpoint, distributed, files, rng
from support.cli import device_flag, flag, parse_into
from support.device import double
from support.programs import run_main

KINDS = ("analytic", "npr", "sn")


# ------------------------------------------------------------------ the variance of a step

def reverse_variance(schedule, t, t_next, var_eps, eta=1.0):
    """Variance of x_next given x_t, without clips: float64; t and var_eps are numbers or tensors.

    If ᾱ_t = 0, x_t holds no x_0: the variance is infinite unless var_eps is 0. clipped_variance is
    always finite.
    """
    fresh, A, ratio = step_coefficients(schedule, t, t_next, eta)
    var_eps = torch.as_tensor(var_eps, dtype=torch.float64)
    return fresh + torch.where(var_eps == 0, 0.0, (A * ratio) ** 2 * var_eps)


def clipped_variance(schedule, t, t_next, var_eps, eta=1.0, value_range=Pixels.value_range,
                     max_grey_levels=None):
    r"""The same with the papers' clips, element by element: 0 <= Cov0 <= ((high − low)/2)²; if
    t_next <= 1, at most max_grey_levels of noise on average. t, t_next: numbers.

    value_range      (low, high) of the data, 255 grey levels apart. None: latents. They have no
                     grey levels, and variance 1 per channel, so Cov0 <= 1 too
    max_grey_levels  None: 2 for η = 1 (DDPM), else 1; 0 switches this clip off
    """
    fresh, A, ratio = step_coefficients(schedule, t, t_next, eta)
    width = 2.0 if value_range is None else value_range[1] - value_range[0]
    cov0 = ratio**2 * torch.as_tensor(var_eps, dtype=torch.float64)
    if math.isinf(ratio):  # ᾱ = 0: the largest possible
        cov0 = torch.full_like(cov0, math.inf)
    variance = fresh + A**2 * cov0.clamp(0, (width / 2) ** 2)
    levels = 1 + (eta == 1) if max_grey_levels is None else max_grey_levels
    if value_range is not None and levels and t_next <= 1:
        variance = variance.clamp(max=(levels * width / 255 * math.sqrt(math.pi / 2)) ** 2)
    return variance


# ------------------------------------------------------------------ Var[ε | x_t]: a number per t

@torch.no_grad()
def gamma(denoiser, x0, seed=0, batch=256, label=None, ts=None):
    r"""Γ_t = E‖ε_θ(x_t, t)‖²/d at t = 1..T: (T+1,) float64 on the CPU, Γ_0 = 0. This sets the
    network to eval mode.

    x0     images (M, C, H, W) in [-1, 1]; the noise is a function of the seed, t and the index of
           the image
    batch  number of x_t per network call; they may have several t
    label  text of a progress bar
    ts     some of 1..T (the rest stay 0): the results of parts can be added
    """
    schedule, total = denoiser.schedule, torch.zeros(denoiser.schedule.T + 1, dtype=torch.float64)
    ts = torch.tensor(list(range(1, schedule.T + 1) if ts is None else ts))
    noises = {t: rng.generator(seed, t) for t in ts.tolist()}
    getattr(denoiser.net, "eval", lambda: None)()
    bar = tqdm(total=len(ts) * len(x0), desc=label, disable=not label, dynamic_ncols=True)
    for images in x0.split(batch):
        encoded, seen = denoiser.encode(images)  # once for all t, since an encoder may be slow
        for some in ts.split(max(1, batch // len(images))):  # as many t as fit into a batch
            t = some.repeat_interleave(len(images))
            noise = torch.stack([torch.randn(encoded.shape[1:], generator=noises[i])
                                 for i in t.tolist()]).to(encoded)
            repeated = encoded.repeat(len(some), *[1] * (encoded.dim() - 1))
            xt = schedules.add_noise(schedule, repeated, t, noise)
            eps = seen.predict(xt, t)[1]
            total.index_add_(0, t, double(eps).square().flatten(1).mean(1).cpu())
            bar.update(len(t))
    bar.close()
    return total / len(x0)


def variance_from_gamma(values):
    """Γ (T+1,) -> var_eps(x, t) = 1 − Γ_t, kept in [0, 1]; linear between the integers."""
    def var_eps(x, t):
        i = min(int(t), len(values) - 2)
        return (1 - torch.lerp(values[i], values[i + 1], float(t) - i)).clamp(0, 1)
    return var_eps


# ------------------------------------------------------------------ Var[ε | x_t]: a second head

class CachedOutput(torch.nn.Module):
    """A network that keeps its last output. A single call then gives a sampler x_0, ε and the
    variance of the step."""

    def __init__(self, net):
        super().__init__()
        self.net, self.out = net, None

    def forward(self, x, c):
        self.out = self.net(x, c)
        return self.out


def variance_from_head(denoiser, kind):
    """var_eps(x, t) like x, from h of the network's last call, which must have been at (x, t). This
    replaces denoiser.net by a CachedOutput."""
    denoiser.net = cached = CachedOutput(denoiser.net)

    def var_eps(x, t):
        prediction, h = cached.out.to(x.dtype).split(x.shape[1], dim=1)
        if kind == "npr":
            return double(h)
        # SN needs the network's ε_θ; a sampler that clips x̂_0 recomputes ε.
        return double(h) - double(denoiser.to_x0_eps(x, t, prediction)[1]) ** 2
    return var_eps


# ------------------------------------------------------------------ for the samplers

def step_variance(denoiser, var_eps, eta, max_grey_levels=None):
    """variance(x, t, t_next) for samplers.sample: clipped, from an estimate var_eps(x, t)."""
    value_range = denoiser.space.value_range

    def variance(x, t, t_next):
        return clipped_variance(denoiser.schedule, t, t_next, var_eps(x, t), eta, value_range,
                                max_grey_levels)
    return variance


def variance_from_run(denoiser, kind, ddpm, eta=0.0, max_grey_levels=None):
    """variance(x, t, t_next) for samplers.sample, from a run that load_run opened.

    kind: analytic (reads analytic.npz), npr or sn (a run of papers.heads). ddpm: True sets η = 1,
    False uses eta. ValueError, FileNotFoundError: one line that names the command to run first.
    """
    if kind not in KINDS or getattr(denoiser, "folder", None) is None:
        raise ValueError(f"--variance {kind}: it must be one of {' '.join(KINDS)}, and load_run "
                         "must have opened the run")
    eta = 1.0 if ddpm else eta
    if kind == "analytic":
        values = read_gamma(denoiser)
        variance = step_variance(denoiser, variance_from_gamma(values), eta, max_grey_levels)
        variance.digest = hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
        return variance
    s, run = denoiser.settings, denoiser.folder
    if s.get("head") != kind:  # if it has another kind, train the new head on the same trunk
        has = f"an {s['head']}" if s.get("head") else "no second"
        trunk = s.get("trunk") or s.get("from") if s.get("head") else run
        raise ValueError(f"--variance {kind}: {run} has {has} head. Train one with  python -m "
                         f"papers.heads {kind} {shlex.quote(str(trunk))}")
    return step_variance(denoiser, variance_from_head(denoiser, kind), eta, max_grey_levels)


def read_gamma(denoiser):
    """Read Γ (T+1,) from the run's analytic.npz. FileNotFoundError: it does not exist. ValueError:
    it belongs to other weights."""
    path, run = denoiser.folder / "analytic.npz", denoiser.folder
    command = (f"python -m papers.covariance {shlex.quote(str(run))}"
               + " --weights raw" * (denoiser.weights == "raw"))
    if not path.is_file():
        raise FileNotFoundError(f"--variance analytic: {run} has no Γ. Estimate it with  {command}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            values = torch.from_numpy(archive["gamma"]).double()
            step, weights = archive["step"].item(), archive["weights"].item()
        if values.shape != (denoiser.schedule.T + 1,) or not values.isfinite().all():
            raise ValueError("another T, or a network whose output was not finite")
    except Exception as error:  # of zip, NumPy, or a missing entry
        raise ValueError(f"{path} is not a Γ of this run: run  {command}  again") from error
    if (step, weights) != (denoiser.step, denoiser.weights):
        raise ValueError(f"{path} belongs to step {step}, {weights} weights, not to step "
                         f"{denoiser.step}, {denoiser.weights}: run  {command}  again")
    return values


# ------------------------------------------------------------------ the program

@dataclass
class CovarianceConfig:
    runs: tuple[str, ...] = flag((), "names under runs/, run folders, or checkpoints (default: the "
                                 "newest run)", positional="RUN", nargs="*", group="measurement")
    num: int = flag(128, "images, each at every t = 1..T; under torchrun write -n", short="-n")
    data: str | None = flag(None, "the images", shown="the run's training set")
    batch_size: int = flag(64, "images at a time, per process")
    device: str = device_flag()
    seed: int = flag(0, "seed for the choice of images and the noise")
    weights: str = flag("ema", "averaged (ema) or last (raw) weights", choices=("ema", "raw"))

    prog: ClassVar[str] = "papers.covariance"
    usage: ClassVar[str] = "python -m papers.covariance [RUN ...] [flags]"
    description: ClassVar[str] = """\
Estimate Γ_t = E‖ε_θ(x_t, t)‖²/d of trained runs, for Analytic-DPM's reverse variance.
One estimate per checkpoint serves any number of steps."""
    examples: ClassVar[str] = """\
  python -m papers.covariance shapes-tiny-sa2
      128 images at 1000 noise levels, minutes on a CPU: writes analytic.npz, .csv and .png in the
      run's folder
  python sample.py shapes-tiny-sa2 --sampler ddpm --variance analytic --nfe 25
      then sample with this variance
  torchrun --nproc_per_node 8 -m papers.covariance cifar10-cifar10-sa2 -n 10000
      the papers used 1,000 (LSUN) to 50,000 images (CIFAR-10)

Γ depends on the weights: after more training, estimate it again."""

    def check(self):
        for name, least in (("num", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not "
                                 f"{getattr(self, name)}")


def estimate(run, config, dist):
    """Estimate Γ of one run and write analytic.npz, .csv and .png in its folder."""
    path = dist.on_main(checkpoint.find_checkpoint, run)
    denoiser = load_run(path, config.weights)
    s, out, name = denoiser.settings, path.parent.resolve() / "analytic.npz", path.parent.name
    source = config.data or data.require_local(s["data"], name)
    dataset = dist.main_first(lambda: data.load(
        source, s["image_size"], s["channels"], config.seed, skip_bad=True, progress=dist.is_main))
    n = min(config.num, len(dataset))
    dist.print0(f"{name}, step {denoiser.step}, {config.weights} weights: {n} of "
                f"{dataset.summary}")
    x0 = data.to_float(next(data.batches(dataset, n, 0, config.seed))).to(dist.device)
    if s["flip"]:  # half of them, as in training
        x0[::2] = x0[::2].flip(-1)
    denoiser.net.to(dist.device)
    # Each process takes some of the t and leaves the others 0, so the sum over processes is Γ.
    mine = range(1 + dist.rank, denoiser.schedule.T + 1, dist.world_size)
    values = dist.all_reduce(gamma(denoiser, x0, config.seed, config.batch_size,
                                   name if dist.is_main else None, mine))
    if dist.is_main:
        files.save_npz(out, gamma=values.numpy(), n=n, seed=config.seed, step=denoiser.step,
                       weights=config.weights)
        files.write_csv(out.with_suffix(".csv"),
                        [dict(t=t, gamma=value) for t, value in enumerate(values.tolist())])
        plot_variances(out.with_suffix(".png"), denoiser, values)
        print(f"Γ: {out} (.csv and .png next to it)\nnext: python sample.py "
              f"{shlex.quote(str(path.parent))} --sampler ddpm --variance analytic --nfe 25")


def plot_variances(path, denoiser, values, points=50):
    """Plot Γ_t and the resulting std of the steps of a coarse grid; t falls to the right, as in
    sampling."""
    schedule, var_eps = denoiser.schedule, variance_from_gamma(values)
    figure = files.figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(1, color="0.7", lw=0.8)
    left.plot(range(1, len(values)), values[1:], "k", lw=1.2)
    left.set(xlabel="t (sampling goes to the right)", ylabel="Γ_t = E‖ε_θ(x_t, t)‖²/d",
             title=path.parent.name, ylim=(0, None))
    times = schedules.time_grid(schedule, points).tolist()
    for label, style, eta, small in (("DDPM, analytic", "k-o", 1.0, False),
                                     ("DDPM, small: √β̃", "C0--", 1.0, True),
                                     ("DDIM, analytic (small: 0)", "C1-.s", 0.0, False)):
        variance = [reverse_variance(schedule, t, t_next, 0, eta) if small else
                    clipped_variance(schedule, t, t_next, var_eps(None, t), eta,
                                     denoiser.space.value_range)
                    for t, t_next in pairwise(times)]
        right.plot(times[:-1], torch.stack(variance).sqrt(), style, ms=3, lw=1.2, label=label)
    right.set(xlabel="t at the start of the step", ylabel="std of the fresh noise", yscale="log",
              title=f"{points - 1} steps from t = {schedule.T} to 1")
    right.legend()
    for ax in (left, right):
        ax.invert_xaxis()
    files.save_figure(path, figure, 110)


def main(argv=None):
    config = parse_into(CovarianceConfig, argv)
    with distributed.init(tf32=False, device=config.device) as dist:
        for run in config.runs or [None]:
            estimate(run, config, dist)


if __name__ == "__main__":
    run_main(main)
