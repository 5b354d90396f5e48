r"""How wide is the reverse Gaussian? The variance of ε given x_t, estimated in three ways.

A step from t to t_next needs x_0 and ε. The network gives their means given x_t, and their spread
is left out. Put ε = (x_t − a_t x_0)/s_t into the step, add its fresh noise, and x_next has

    mean      a_next x̂_0 + √(s_next² − η_σ²) ε_θ                the step that samplers.py takes
    variance  η_σ² + A² Cov0,   A = a_next − √(s_next² − η_σ²) a_t/s_t,   η_σ² = η² β̃
              Cov0 = Var[x_0 | x_t] = (s_t/a_t)² Var[ε | x_t]

"Small" takes Cov0 for 0: nearly right in a thousand steps, too narrow in ten. Estimates of
Var[ε | x_t], of Analytic-DPM (Bao et al., ICLR 2022) and of NPR- and SN-DPM (Bao et al., ICML 2022,
"Estimating the Optimal Covariance with Imperfect Mean"):

    analytic  1 − Γ_t,   Γ_t = E‖ε_θ(x_t, t)‖²/d      one number per t, from some training images
    npr       h(x_t, t), a second head trained on (ε − ε_θ)²          for each x_t and each pixel
    sn        h(x_t, t) − ε_θ², a second head trained on ε²                           likewise

All are the same, on average over x_t, for the ideal ε_θ; NPR's target also counts how far off a
real one is. Then the papers clip. Data in [low, high] have Cov0 <= ((high − low)/2)², which matters
near T, where (s/a)² magnifies an error of Γ 25,000 times. And the noise of the last step that adds
any, onto t = 1, must not show: on average E|σz| = σ √(2/π) <= 2 grey levels (DDPM) or 1 (DDIM).

Where x̂_0 is clipped, our samplers re-derive ε from it; the papers' DDIM keeps the network's ε.

What this file does not do: train the heads (losses.py, train.py --head), or take the step.

    python covariance.py RUN            # estimate Γ, once per checkpoint: analytic.npz, .csv, .png
    python -c "import covariance as c; print(c.bounded(c.schedules.make_schedule('edm'), 9, 5, 1))"

x (B, C, H, W); t, t_next times; a, s, β, β̃ as in schedules.py; Γ (T+1,); d numbers of an image;
ε_θ and x̂_0 what the network says, h its second answer; var_eps an estimate of Var[ε | x_t].
"""

import runtime  # isort: skip  (before torch: it sets OpenMP's spinning)

import argparse
import math
import shlex
from itertools import pairwise

import numpy as np
import torch
from tqdm import tqdm

import data
import denoiser as denoisers
import files
import schedules
from spaces import Pixels

KINDS = ("analytic", "npr", "sn")


# ------------------------------------------------------------------ the variance of a step

def reverse_variance(schedule, t, t_next, var_eps, eta=1.0):
    """Variance of x_next given x_t, unclipped: float64, as t or var_eps is a number or a tensor.

    Where ᾱ_t = 0, x_t says nothing of x_0: any var_eps but 0 makes it infinite (see bounded).
    """
    fresh, A, ratio = parts(schedule, t, t_next, eta)
    var_eps = torch.as_tensor(var_eps, dtype=torch.float64)
    return fresh + torch.where(var_eps == 0, 0.0, (A * ratio) ** 2 * var_eps)


def bounded(schedule, t, t_next, var_eps, eta=1.0, bounds=Pixels.bounds, levels=None):
    r"""The same with the papers' clips, element by element: 0 <= Cov0 <= ((high − low)/2)², and
    where t_next <= 1 no more noise than `levels` grey levels on average. t, t_next: numbers.

    bounds  (low, high) of the data, 255 grey levels apart; None: latents, which have no levels, and
            whose variance is 1 per channel: their Cov0 <= 1 too
    levels  None: 2 for η = 1, DDPM, and 1 below; 0 switches this clip off
    """
    fresh, A, ratio = parts(schedule, t, t_next, eta)
    width = 2.0 if bounds is None else bounds[1] - bounds[0]
    cov0 = ratio**2 * torch.as_tensor(var_eps, dtype=torch.float64)
    if math.isinf(ratio):  # ᾱ = 0: all that it can be
        cov0 = torch.full_like(cov0, math.inf)
    var = fresh + A**2 * cov0.clamp(0, (width / 2) ** 2)
    levels = 1 + (eta == 1) if levels is None else levels
    if bounds is not None and levels and t_next <= 1:
        var = var.clamp(max=(levels * width / 255 * math.sqrt(math.pi / 2)) ** 2)
    return var


def parts(schedule, t, t_next, eta):
    r"""(η_σ², A, s_t/a_t) of a step. A is a small difference of two large numbers if the times are
    close; times its conjugate it is a sum. With r = √(s_next² − η_σ²) and, for any schedule,
    β = s_t² − (a_t/a_next)² s_next²,

        A = (a_next² s_t² − r² a_t²)/(s_t (a_next s_t + r a_t)),   numerator = a_next² β + η_σ² a_t²
    """
    (a, s), (a_next, s_next) = schedule.coefficients(t), schedule.coefficients(t_next)
    beta, beta_tilde = schedule.step_variances(t, t_next)
    fresh = eta**2 * beta_tilde
    r = (s_next**2 - fresh).clamp(min=0).sqrt()
    return fresh, (a_next**2 * beta + fresh * a**2) / (s * (a_next * s + r * a)), s / a


# ------------------------------------------------------------------ Var[ε | x_t]: a number per t

@torch.no_grad()
def gamma(denoiser, x0, seed=0, batch=256, progress=False, ts=None):
    r"""Γ_t = E‖ε_θ(x_t, t)‖²/d at t = 1..T: (T+1,) float64 on the CPU, Γ_0 = 0. Puts the network
    into eval mode.

    x0        images (M, C, H, W) in [-1, 1], each with a noise of its own at each t: a function of
              seed, t and the image's place among the M
    batch     how many x_t the network sees at a time, of one t or of several
    progress  label of a progress bar
    ts        some of 1..T (the rest stay 0): parts add up to the whole
    """
    schedule, total = denoiser.schedule, torch.zeros(denoiser.schedule.T + 1, dtype=torch.float64)
    ts = torch.tensor(list(range(1, schedule.T + 1) if ts is None else ts))
    noises = {t: runtime.generator(seed, t) for t in ts.tolist()}
    getattr(denoiser.net, "eval", lambda: None)()
    bar = tqdm(total=len(ts) * len(x0), desc=progress or None, disable=not progress,
               dynamic_ncols=True)
    for images in x0.split(batch):
        inside, told = denoiser.on(images)  # once for all t: an encoder may be slow
        for some in ts.split(max(1, batch // len(images))):  # so many t fit beside each other
            t = some.repeat_interleave(len(images))
            noise = torch.stack([torch.randn(inside.shape[1:], generator=noises[i])
                                 for i in t.tolist()]).to(inside)
            start = inside.repeat(len(some), *[1] * (inside.dim() - 1))
            xt = schedules.diffuse(schedule, start, t.to(start.device), noise)
            eps = told.predict(xt, t.to(start.device))[1]
            total.index_add_(0, t, eps.double().square().flatten(1).mean(1).cpu())
            bar.update(len(t))
    bar.close()
    return total / len(x0)


def of_gamma(values):
    """Γ (T+1,) -> var_eps(x, t) = 1 − Γ_t, kept in [0, 1]; linear between the integers."""
    def var_eps(x, t):
        i = min(int(t), len(values) - 2)
        return (1 - torch.lerp(values[i], values[i + 1], float(t) - i)).clamp(0, 1)
    return var_eps


# ------------------------------------------------------------------ Var[ε | x_t]: a second head

class Remembering(torch.nn.Module):
    """A network that keeps its last answer: one call gives a sampler its x_0 and ε, and then the
    variance of the same step."""

    def __init__(self, net):
        super().__init__()
        self.net, self.out = net, None

    def forward(self, x, c):
        self.out = self.net(x, c)
        return self.out


def of_second_head(denoiser, kind):
    """var_eps(x, t) like x, from h of the network's last call, which must be that at (x, t). From
    here on denoiser.net is Remembering."""
    denoiser.net = memory = Remembering(denoiser.net)

    def var_eps(x, t):
        prediction, h = memory.out.to(x.dtype).split(x.shape[1], dim=1)
        if kind == "npr":
            return h
        # The network's own ε_θ: a sampler that clips x̂_0 re-derives another.
        return h.double() - denoiser.explain(x, t, prediction)[1].double() ** 2
    return var_eps


# ------------------------------------------------------------------ for the samplers

def from_run(denoiser, kind, ddpm, eta=0.0, levels=None):
    """variance(x, t, t_next) for samplers.sample, of a run that load_run opened.

    kind: analytic (reads analytic.npz), npr or sn (a run of train.py --head). ddpm: η = 1, else
    DDIM's eta. levels: bounded()'s. ValueError, FileNotFoundError: one line that says what to run.
    """
    if kind not in KINDS or getattr(denoiser, "folder", None) is None:
        raise ValueError(f"variance {kind!r} must be one of {' '.join(KINDS)}, and the denoiser "
                         "a run's, opened by load_run")
    eta = 1.0 if ddpm else eta
    if kind == "analytic":
        return of_step(denoiser, of_gamma(read_gamma(denoiser)), eta, levels)
    s, run = denoiser.settings, denoiser.folder
    if s.get("head") != kind:  # of another kind: put the new one on the same network
        has, base = (f"an {s['head']}", s["from"]) if s.get("head") else ("no second", run)
        command = shlex.join(["python", "train.py", "--head", kind, "--from", str(base)])
        raise ValueError(f"--variance {kind}: {run} has {has} head: train one with  {command}")
    return of_head(denoiser, kind, eta, levels)


def of_head(denoiser, kind, eta, levels=None):
    """variance(x, t, t_next) by a network's second head; from here on denoiser.net remembers."""
    return of_step(denoiser, of_second_head(denoiser, kind), eta, levels)


def of_step(denoiser, var_eps, eta, levels=None):
    """variance(x, t, t_next), clipped, of an estimate var_eps(x, t)."""
    bounds = bounds_of(denoiser)
    return lambda x, t, t_next: bounded(denoiser.schedule, t, t_next, var_eps(x, t), eta, bounds,
                                        levels)


def bounds_of(denoiser):
    """(low, high) of what is diffused, or None."""
    return (denoiser.space or Pixels).bounds


def read_gamma(denoiser):
    """Γ (T+1,) from the run's analytic.npz. FileNotFoundError, ValueError: there is none, or it is
    of other weights than these."""
    path, run = denoiser.folder / "analytic.npz", denoiser.folder
    raw = ["--weights", "raw"] * (denoiser.weights == "raw")
    command = shlex.join(["python", "covariance.py", str(run), *raw])
    if not path.is_file():
        raise FileNotFoundError(f"--variance analytic: no Γ for {run}: estimate it first with  "
                                f"{command}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            values = torch.from_numpy(archive["gamma"]).double()
            step, weights = archive["step"].item(), archive["weights"].item()
        if values.shape != (denoiser.schedule.T + 1,) or not values.isfinite().all():
            raise ValueError("another T, or a network that had gone wrong")
    except Exception as error:  # of zip, NumPy, or an entry that is not there
        raise ValueError(f"{path} is no Γ of this run: run  {command}  again") from error
    if (step, weights) != (denoiser.step, denoiser.weights):
        raise ValueError(f"{path} is of step {step}, {weights} weights; the run is at "
                         f"{denoiser.step}, {denoiser.weights}: run  {command}  again")
    return values


# ------------------------------------------------------------------ the program

def estimate(run, args, process):
    """Γ of one run -> analytic.npz, .csv and .png in its folder."""
    path = process.first_does(files.find_checkpoint, run)
    denoiser = denoisers.load_run(path, args.weights)
    s, out, name = denoiser.settings, path.parent.resolve() / "analytic.npz", path.parent.name
    try:
        dataset = process.first_then_all(lambda: data.load(
            args.data or s["data"], s["image_size"], s["channels"], args.seed, skip_bad=True,
            progress=process.first))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--data: {error}") from error
    n = min(args.num, len(dataset))
    process.say(f"{name}, step {denoiser.step}, {args.weights} weights: {n} of {dataset.summary}")
    x0 = data.to_float(next(data.batches(dataset, n, 0, args.seed))).to(process.device)
    if s["flip"]:  # half of them, as in training
        x0[::2] = x0[::2].flip(-1)
    denoiser.net.to(process.device)
    # Each process takes some of the t; the others' stay 0, so the sum is the whole.
    mine = range(1 + process.rank, denoiser.schedule.T + 1, process.world)
    values = process.total(gamma(denoiser, x0, args.seed, args.batch_size, process.first and name,
                                 mine))
    if process.first:
        with files.atomic_write(out) as temporary, open(temporary, "wb") as f:
            np.savez(f, gamma=values.numpy(), n=n, seed=args.seed, step=denoiser.step,
                     weights=args.weights)
        files.write_csv(out.with_suffix(".csv"),
                          [dict(t=t, gamma=value) for t, value in enumerate(values.tolist())])
        draw(out.with_suffix(".png"), denoiser, values)
        command = shlex.join(["python", "sample.py", str(path.parent), *(
            "--sampler ddpm --variance analytic --nfe 25".split())])
        print(f"Γ: {out} (.csv and .png beside it)\nnext: {command}")


def draw(path, denoiser, values, points=50):
    """Γ_t, and the std that it gives the steps of a coarse grid; t falls to the right, as in
    sampling."""
    schedule, var_eps, bounds = denoiser.schedule, of_gamma(values), bounds_of(denoiser)
    figure = files.figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.axhline(1, color="0.7", lw=0.8)
    left.plot(range(1, len(values)), values[1:], "k", lw=1.2)
    left.set(xlabel="t (sampling goes to the right)", ylabel="Γ_t = E‖ε_θ(x_t, t)‖²/d",
             title=path.parent.name, ylim=(0, None))
    times = schedules.time_grid(schedule, points).tolist()
    for label, style, eta, known in (("DDPM, analytic", "k-o", 1.0, False),
                                     ("DDPM, small: √β̃", "C0--", 1.0, True),
                                     ("DDIM, analytic (small: 0)", "C1-.s", 0.0, False)):
        var = [reverse_variance(schedule, t, to, 0, eta) if known else
               bounded(schedule, t, to, var_eps(None, t), eta, bounds) for t, to in pairwise(times)]
        right.plot(times[:-1], torch.stack(var).sqrt(), style, ms=3, lw=1.2, label=label)
    right.set(xlabel="t where the step begins", ylabel="std of the fresh noise", yscale="log",
              title=f"{points - 1} steps from t = {schedule.T} to 1")
    right.legend()
    for ax in (left, right):
        ax.invert_xaxis()
    files.save_figure(path, figure, 110)


def parse(argv=None):
    """The command line; ValueError for numbers out of range."""
    parser = argparse.ArgumentParser(
        prog="covariance.py", usage="python covariance.py [RUN ...] [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Estimate Γ_t = E‖ε_θ(x_t, t)‖²/d of trained runs, for Analytic-DPM's reverse "
        "variance:\nonce per checkpoint, for any number of steps.",
        epilog="""examples
  python covariance.py shapes-tiny-sa2
      128 images at 1000 noise levels, minutes on a CPU: analytic.npz, .csv and .png in its folder
  python sample.py shapes-tiny-sa2 --sampler ddpm --variance analytic --nfe 25
      then sample with it
  torchrun --nproc_per_node 8 covariance.py cifar10-cifar10-sa2 -n 10000
      the papers took 1,000 (LSUN) to 50,000 images (CIFAR-10)

Γ belongs to the weights it was measured on: train on, and it has to be estimated again.""")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="names under runs/, run folders, or checkpoints "
        "(default: the newest run)")
    add("-n", "--num", type=int, default=128, help="images, each at every t = 1..T; under torchrun "
        "write -n (default: 128)")
    add("--data", help="where the images are (default: where the run's own data set was)")
    add("--batch-size", type=int, default=64, help="images at a time, per process (default: 64)")
    add("--seed", type=int, default=0, help="of the choice of images and the noise (default: 0)")
    add("--weights", default="ema", choices=("ema", "raw"), help="averaged or last (default: ema)")
    args = parser.parse_args(argv)
    for flag, value, least in (("num", args.num, 1), ("batch-size", args.batch_size, 1),
                               ("seed", args.seed, 0)):
        if value < least:
            raise ValueError(f"--{flag} must be at least {least}, not {value}")
    return args


def main(argv=None):
    args = parse(argv)
    with runtime.setup(tf32=False) as process:
        for run in args.runs or [None]:
            estimate(run, args, process)


if __name__ == "__main__":
    runtime.run_program(main)
