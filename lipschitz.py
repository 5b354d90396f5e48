r"""How fast does a network's answer change with t alone? E-TSDM's Lipschitz constants, as curves.

    K(t, t') = E ‖net(x_t, f(t)) − net(x_t, f(t'))‖₂ / |t − t'|,  t' = t + dt              eq. 8

E-TSDM (Yang et al., ICLR 2024), figures 1b, A1, A2, A5, A7: x_t, drawn at t, stays, and the network
is told first t, then t'. The ideal ε has an infinite slope at t = 0 (theorem 3.1), and an ordinary
network tries to follow. Shared conditions, f(t) = f(t'), make K exactly 0 inside a sub-interval:
all change is left to the step onto the next. Figure 2 (--perturb) moves x_t instead, and asks how
far the predicted x_0 goes:  ‖x̂_0(x_t + scale z) − x̂_0(x_t)‖₂,  z ~ N(0, I).

What this file does not do: bound anything. K is a mean of difference quotients, over some images.

    python lipschitz.py NAME OTHER             # two runs under runs/: a picture, a .csv and a table

x_t = a x_0 + s ε, x0 (N, C, H, W) in [-1, 1]; f the time condition; net's raw output: ε, v or x_0.
"""

import runtime  # isort: skip  (before torch: it sets OpenMP's spinning)

import argparse
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import files
import losses
import sampling
import sources
from schedules import diffuse

STYLES = ("k-o", "C1--s", "C0-.^", "C2:D", "C3-v", "C4--P", "C5-.X")  # told apart without colour
SCALES = (0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


def lipschitz_constants(denoiser, x0, ts, dt=1, seed=0, batch_size=64):
    """Equation 8 at each t of ts: (len(ts),) float64, the mean over the images of slopes()."""
    return slopes(denoiser, x0, ts, dt, seed, batch_size).mean(1)


def slopes(denoiser, x0, ts, dt=1, seed=0, batch_size=64, label=None):
    r"""‖net(x_t, f(t)) − net(x_t, f(t + dt))‖₂/dt of each image: (len(ts), N) float64, on the CPU.

    x_t is drawn at t. 1/dt magnifies a float32 network's rounding, 1e-6 of its output or so.
    label: of a progress bar. ValueError: dt <= 0; t or t + dt not in [0, T]; dt lost in float32.
    """
    T, ts = denoiser.schedule.T, [float(t) for t in ts]
    if not (ts and dt > 0 and 0 <= min(ts) <= max(ts) <= T - dt):
        raise ValueError(f"dt must be above 0, and t from 0 to T - dt = {T - dt:g}")
    last = torch.tensor([max(ts) + dt, max(ts)], dtype=torch.float64).to(x0.dtype).double()
    if abs((last[0] - last[1]).item() / dt - 1) > 0.02:  # the network is told t in x's precision
        raise ValueError(f"--dt {dt:g} is lost in the rounding of t = {max(ts):g}: use a larger "
                         "one or a smaller --max-t")

    def answers(x0, eps, z, t):
        # Two calls also where f(t) = f(t'): the 0 is measured, not assumed. Of one shape, which is
        # what makes it exact: in one batch of 2 B, kernels may round rows j and B + j differently.
        xt = diffuse(denoiser.schedule, x0, t, eps)
        return denoiser.output(xt, t), denoiser.output(xt, t, told=t + dt)
    return distances(answers, denoiser.net, x0, ts, seed, batch_size, label) / dt  # eq. 8


def displacements(denoiser, x0, scales=SCALES, t=100, seed=0, batch_size=64, label=None):
    """‖x̂_0(x_t + scale z) − x̂_0(x_t)‖₂ per image: (len(scales), N). ValueError: t not in (0, T)."""
    if not 0 < t < denoiser.schedule.T:  # at T there may be no signal, and no x̂_0 from ε
        raise ValueError(f"t must be above 0 and below {denoiser.schedule.T}, and is {t:g}")

    def answers(x0, eps, z, scale):
        xt = diffuse(denoiser.schedule, x0, t, eps)
        return denoiser.predict(xt, t)[0], denoiser.predict(xt + scale * z, t)[0]  # figure 2
    return distances(answers, denoiser.net, x0, scales, seed, batch_size, label)


@torch.no_grad()
def distances(answers, net, x0, values, seed, batch_size, label):
    r"""‖p − q‖₂, (p, q) = answers(x_0, ε, z, value), of each value and image; net in eval mode.

    ε and z of image i depend on (seed, i) alone: runs are paired, batch sizes do not matter.
    """
    out = torch.empty(len(values), len(x0), dtype=torch.float64)
    noise = torch.stack([torch.randn((2, *x0.shape[1:]), generator=runtime.generator(seed, i))
                         for i in range(len(x0))], 1).to(x0)  # ε and z: (2, N, ...)
    # Module by module, since a frozen part may be in eval mode for good; a plain function has none.
    training = [m for m in getattr(net, "modules", list)() if m.training]
    try:
        for m in training:
            m.training = False
        for i, value in enumerate(tqdm(values, label, disable=label is None)):
            for start in range(0, len(x0), batch_size):
                rows = slice(start, start + batch_size)
                p, q = answers(x0[rows], *noise[:, rows], value)
                out[i, rows] = (p.double() - q.double()).flatten(1).norm(dim=1)
    finally:
        for m in training:
            m.training = True
    return out


def parse(argv=None):
    """The command line; ValueError for flags that the chosen test would ignore."""
    parser = argparse.ArgumentParser(
        prog="lipschitz.py", usage="python lipschitz.py [RUN ...] [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="How much a network's answer changes with t alone: curves, as PNG and CSV.",
        epilog="""examples
  python lipschitz.py A B -n 256             K(t, t + 1) without and with E-TSDM: figure 1b
  python lipschitz.py A --dt 0.01 --max-t 9  a --continuous run, close to its singularity
  python lipschitz.py A B --perturb          how far the predicted x_0 moves with x_t: figure 2""")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="names under runs/, folders or checkpoints "
        "(newest); LABEL=RUN says what to call it")
    add("-n", "--num", type=int, default=64, help="images; under torchrun write -n (default: 64)")
    add("--data", help="images to measure on (default: what each run was trained on)")
    add("--dt", type=float, default=1.0, help="t' - t, in timesteps (default: 1)")
    add("--max-t", type=float, default=np.inf, help="the largest t (default: T - dt)")
    add("--perturb", action="store_true", help="move x_t instead of t")
    add("--t", type=float, default=100.0, help="perturb: at this t (default: 100)")
    add("--scales", type=float, nargs="+", default=SCALES, help="perturb: std of noise (0 to 0.3)")
    add("--batch-size", type=int, default=64, help="images at a time (default: 64)")
    add("--seed", type=int, default=0, help="of the choice of images and the noise (default: 0)")
    add("--weights", default="ema", choices=("ema", "raw"), help="averaged or last (default: ema)")
    add("--out", type=Path, help="the picture; .csv beside it (default: lipschitz or perturb.png)")
    args = parser.parse_args(argv)
    unused = ("dt", "max_t") if args.perturb else ("t", "scales")
    for flag in unused:
        if getattr(args, flag) != parser.get_default(flag):
            raise ValueError(f"{sampling.flag(flag)} goes "
                             + ("without --perturb" if args.perturb else "with --perturb"))
    sampling.check_counts(args, num=1, batch_size=1, seed=0)
    if not 0 < args.dt < np.inf:
        raise ValueError(f"--dt must be above 0, and a number: not {args.dt}")
    if not args.max_t >= 0:
        raise ValueError(f"--max-t must not be negative, and a number: not {args.max_t}")
    if not all(0 <= scale < np.inf for scale in args.scales):
        raise ValueError(f"--scales must not be negative, and numbers: not {args.scales}")
    args.out = args.out or Path("perturb.png" if args.perturb else "lipschitz.png")
    if args.out.suffix != ".png" or not args.out.resolve().parent.is_dir():
        raise ValueError(f"--out {args.out} must be a .png in a folder that exists")
    return args


def measure(args, name, d, x0):
    """One run -> t or scales (m,), numbers (m, N), edges of sub-intervals in t, words about it."""
    s, dt, how = d.settings, args.dt, (args.seed, args.batch_size, name)
    flag = "t" if args.perturb else "dt"
    if getattr(args, flag) % 1 and not s["continuous"]:
        raise ValueError(f"--{flag} {getattr(args, flag):g}: {name} knows whole t only, a fraction "
                         "needs --continuous runs")
    if args.perturb:
        if not 0 < args.t < d.schedule.T:
            raise ValueError(f"--t must be above 0 and below {d.schedule.T}, not {args.t:g}")
        k = displacements(d, x0, args.scales, args.t, *how).numpy()
        return args.scales, k, [], map("{:g}: {:.3g}".format, args.scales, k.mean(1))
    edges = np.linspace(0, s["etsdm_interval"], s["etsdm_n"] + 1) if s["etsdm"] else np.zeros(0)
    # Only times that were trained on: a table's begin at 1. Dense up to 120 dt, evenly in log t
    # from there; and the step across each edge.
    low, high = losses.time_range(d.schedule, d.prediction)
    low = 0 if s["continuous"] else low
    last = min(high - dt, args.max_t) // dt * dt
    across = edges - dt / 2 if dt % 1 else dt * (np.ceil(edges / dt) - 1)
    far = np.geomspace(120, max(last / dt, 120), 40).round()
    xs = np.unique(np.clip([*dt * np.arange(121), *dt * far, 100, 500, *across], low, last))
    if last < low:
        raise ValueError(f"--max-t {args.max_t:g} and --dt {dt:g} leave no t from {low:g} on")
    k, f = slopes(d, x0, xs, dt, *how).numpy(), d.condition or float
    mean, shared = k.mean(1), [bool(f(t) == f(t + dt)) for t in xs]
    return xs, k, edges, [
        *(f"K({t:g}) = {m:.3g}" for t, m in zip(xs, mean, strict=True) if t in (low, 100, 500)),
        "largest below 100: {:.3g} at {:g}".format(*max(zip(mean * (xs < 100), xs, strict=True))),
        f"exactly 0 at {(mean[shared] == 0).sum()} of {sum(shared)} t inside sub-intervals"]


def write(args, curves):
    """The .csv, and the picture: means as lines, the middle 80 % of the images as shades."""
    axes = files.figure(figsize=(7.5, 4.5), layout="constrained").add_subplot()
    rows = []
    for i, (name, (xs, k, edges, _)) in enumerate(curves.items()):
        mean, (p10, p50, p90) = k.mean(1), np.percentile(k, (10, 50, 90), axis=1)
        (line,) = axes.plot(xs, mean, STYLES[i % len(STYLES)], ms=3, lw=1, label=name)
        axes.fill_between(xs, p10, p90, color=line.get_color(), alpha=0.15, lw=0)
        axes.vlines(edges, 0, 1, "0.8", lw=0.6, zorder=0, transform=axes.get_xaxis_transform())
        for x, *row in zip(xs, mean, p10, p50, p90, strict=True):
            at = dict(t=args.t, scale=x) if args.perturb else dict(t=x, dt=args.dt)
            rows.append(dict(run=name, **at, **dict(zip(("mean", "p10", "p50", "p90"), row,
                                                         strict=True))))
    axes.set(xlim=(0, None), ylim=(0, None), ylabel="movement of the predicted x_0 (L2 norm)",
             xlabel=f"std of the noise added to x_t, t = {args.t:g} (pixels are in [-1, 1])")
    if not args.perturb:  # symlog: linear up to t = 120 dt = far, and down to an exact 0
        far = 120 * args.dt
        ticks = [*np.linspace(0, far, 7), *(t for t in (2, 5, 20, 50, 200, 500, 1000) if t > far)]
        least = min((row["mean"] for row in rows if row["mean"] > 0), default=1)
        axes.set_xscale("symlog", linthresh=far, linscale=2)
        axes.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(least)), linscale=0.3)
        axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axes.set(xlim=(0, max(row["t"] for row in rows) + 2 * args.dt), xlabel="t (timesteps)",
                 ylabel=f"K(t, t + {args.dt:g}): output's L2 change per timestep")
    axes.legend()
    files.save_figure(args.out, axes.figure, 150)
    files.write_csv(args.out.with_suffix(".csv"), rows)


def main(argv=None):
    args, curves = parse(argv), {}
    with runtime.setup(tf32=False) as process:
        if not process.first:  # one process does it all
            return
        for name, denoiser, x0 in sources.opened(args, process.device):
            curves[name] = measure(args, name, denoiser, x0)
    write(args, curves)
    print(*(f"{name}:  {';  '.join(words)}" for name, (*_, words) in curves.items()), sep="\n")
    print(f"picture: {args.out.resolve()}, numbers: {args.out.with_suffix('.csv').resolve()}")


if __name__ == "__main__":
    runtime.run_program(main)
