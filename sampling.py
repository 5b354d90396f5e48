r"""Which sampler the command line asks for: the flags that sample.py and metrics.py share.

    add_flags(parser), check_flags(args)         the flags; what is wrong with them, in one line
    from_flags(args, denoiser) -> dict           the arguments of samplers.sample that they mean
    notes(args, denoiser) -> [str]               what the program should say about it, once

What this file does not do: take a step (samplers.py).

    python sample.py RUN --sampler dpm-solver --order 3 --nfe 20 --spacing logsnr
    python sample.py RUN --variance analytic --nfe 10               python sample.py --help
"""

import math

import torch

import covariance
import etsdm
import samplers
from schedules import SPACINGS, time_grid
from spaces import Pixels


MOST = 100_000  # network calls per image that anybody may mean


def add_flags(parser):
    """The command-line flags, for an argparse parser or group, that choose a sampler."""
    add = parser.add_argument
    add("--sampler", default="ddim", choices=samplers.SAMPLERS, help="(default: ddim)")
    add("--nfe", type=int, default=50, help="network calls per image (default: 50); heun: 2N - 1 "
        "for N steps")
    add("--spacing", default="uniform", choices=(*SPACINGS, "remap"),
        help="where between T and t = 1 the calls are (default: uniform; remap: uniform in what "
        "the network of a --remap run is told)")
    add("--eta", type=float, help="ddim: share of fresh noise, 0 to 1 (default: 0)")
    add("--order", type=int, choices=(1, 2, 3), help="dpm-solver: its order (default: 3)")
    add("--variance", choices=("small", "large", *covariance.KINDS), help="of the fresh noise: "
        "small or large for ddpm (default: small); for ddpm and ddim analytic (covariance.py), or "
        "npr or sn of a run with such a head")
    add("--churn", type=float, help="heun: noise added and removed on the way, EDM's S_churn "
        "(default: 0)")
    add("--churn-min", type=float, help="... from this noise level s/a on (default: 0)")
    add("--churn-max", type=float, help="... and up to this one (default: no limit)")
    add("--churn-noise", type=float, help="... times this, EDM's S_noise (default: 1)")
    add("--clip", default="auto", choices=("auto", "on", "off"), help="keep the predicted x_0 in "
        "the data's range (auto: for ddpm, and ddim with fresh noise)")
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="of the networks: bf16 is "
        "faster where the hardware has units for it, and rounds (default: fp32)")
    add("--compile", action="store_true", help="torch.compile the networks: a minute at the start")
    add("--deterministic", action="store_true", help="the same bits again on GPUs too (CPUs give "
        "them anyhow), by slower algorithms")
    add("--weights", default="ema", choices=("ema", "raw"), help="averaged or last weights")


def check_flags(args):
    """ValueError for flags of add_flags that are wrong, or that their sampler would ignore."""
    if args.eta is not None and args.sampler != "ddim":
        raise ValueError(f"--eta belongs to ddim, not to {args.sampler}")
    if args.order is not None and args.sampler != "dpm-solver":
        raise ValueError(f"--order belongs to dpm-solver; {args.sampler} has a fixed one")
    if args.variance in ("small", "large") and args.sampler != "ddpm":
        raise ValueError(f"--variance belongs to ddpm where it is {args.variance}, not to "
                         f"{args.sampler}")
    if args.variance in covariance.KINDS and args.sampler not in ("ddpm", "ddim"):
        raise ValueError(f"--variance {args.variance} belongs to ddpm and ddim, not to "
                         f"{args.sampler}")
    check_counts(args, nfe=1)
    if args.nfe > MOST:
        raise ValueError(f"--nfe {args.nfe} is more than {MOST:,}: DDPM has 1,000 steps")
    if args.eta is not None and not 0 <= args.eta <= 1:
        raise ValueError(f"--eta must be between 0 (DDIM) and 1 (DDPM), not {args.eta}")
    churned = [k for k in ("churn", "churn_min", "churn_max", "churn_noise")
               if getattr(args, k) is not None]
    if churned and args.sampler != "heun":
        raise ValueError(f"{flag(churned[0])} belongs to heun, not to {args.sampler}")
    if churned and not args.churn:
        raise ValueError(f"{flag(churned[-1])} has no use without --churn above 0")
    for name in churned:
        if not 0 <= (value := getattr(args, name)) or value == math.inf and name != "churn_max":
            raise ValueError(f"{flag(name)} must not be negative, and a number: not {value}")
    if (args.churn_min or 0) > (math.inf if args.churn_max is None else args.churn_max):
        raise ValueError(f"--churn-min {args.churn_min} must not be above --churn-max "
                         f"{args.churn_max}")


def flag(name):
    """churn_min -> --churn-min."""
    return "--" + name.replace("_", "-")


def check_counts(args, **least):
    """ValueError for a whole number of these flags that is less than its least."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise ValueError(f"{flag(name)} must be at least {low}, not {value}")


def churn_of(args):
    """The arguments of sample() about churn."""
    low, high, scale = (default if value is None else value for value, default in (
        (args.churn_min, 0.0), (args.churn_max, math.inf), (args.churn_noise, 1.0)))
    return dict(churn=args.churn or 0.0, churn_range=(low, high), churn_noise=scale)


def from_flags(args, denoiser):
    """The arguments of sample() that the flags ask for. ValueError: flags that this run has no
    answer to."""
    times, used = grid_from_flags(args, denoiser)
    arguments = dict(sampler=args.sampler, nfe=used, spacing=args.spacing, eta=args.eta or 0.0,
                     order=args.order or 3, clip=clip_from_flags(args, denoiser),
                     variance=args.variance, t_start=samplers.start_time(denoiser))
    if args.spacing == "remap":
        arguments["spacing"] = times
    if args.variance in covariance.KINDS:
        arguments["variance"] = covariance.from_run(denoiser, args.variance, args.sampler == "ddpm",
                                                    arguments["eta"])
    return arguments | (churn_of(args) if args.churn else {})


def grid_from_flags(args, denoiser):
    """(times, calls) that the flags --sampler --nfe --spacing mean for this run."""
    schedule, start = denoiser.schedule, samplers.start_time(denoiser)

    def grid(points):
        if args.spacing == "remap":
            return remap_grid(denoiser, points, start)
        return time_grid(schedule, points, args.spacing, t_start=start)

    return samplers.affordable(grid, schedule, args.sampler, args.nfe)


def remap_grid(denoiser, points, t_start, t_end=1.0):
    """Falling times from t_start to t_end, equal steps in what the network is told. ValueError: a
    run that was trained without a remap."""
    name = getattr(denoiser, "settings", {}).get("remap")
    if not name:
        raise ValueError("--spacing remap is for runs trained with --remap, and this one was not")
    u = torch.linspace(1, 0, points, dtype=torch.float64)
    times = etsdm.remap_quantile(u, name, t_end, t_start, denoiser.schedule.T)
    times[-1], times[0] = t_end, t_start  # rounding must not move the ends
    return times


def clip_from_flags(args, denoiser):
    """The range that --clip keeps x̂_0 within, or None."""
    bounds = (getattr(denoiser, "space", None) or Pixels).bounds  # None: latents
    if args.clip == "on" and bounds is None:
        raise ValueError("--clip on: latents have no bounds")
    # Fresh noise at every step also spreads what lies outside the data's range: without the clip
    # the colours of a whole set can drift. A noise-free path has no such source; and churn, which
    # has, is not clipped in EDM, whose published settings were found without.
    noisy = args.sampler == "ddpm" or bool(args.eta) or args.variance is not None
    return bounds if args.clip == "on" or (args.clip == "auto" and noisy) else None


def notes(args, denoiser):
    """What works, but hardly as meant: a list of lines, to be said once."""
    found, used = [], grid_from_flags(args, denoiser)[1]
    if used != args.nfe:
        found.append(samplers.unspent(args.nfe, used))
    steps, order = args.nfe - 1, args.order or 3
    if steps == 0:  # x_0 as seen from T: nothing that is about steps, or between them, matters
        idle = [f"--{name} {value}" for name in ("spacing", "eta", "order", "variance")
                if (value := getattr(args, name)) not in (None, "uniform", 0.0)]
        if idle:
            found.append(f"one network call makes no step: {', '.join(idle)} has no effect")
    elif args.sampler == "dpm-solver" and steps < order:
        found.append(f"order {order} takes {order + 1} calls, the last of them for x_0: with "
                     f"{args.nfe} it is order {steps}")
    return found
