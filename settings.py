r"""The settings of a training run: flags and a preset's recipe become one flat dict.

    parse(argv) -> argparse.Namespace            None where the user said nothing
    resolve(args) -> {name: plain value}         the run: config.json and checkpoint.pt hold this

What a flag does not say, the preset's recipe does, so that `--preset cifar10` alone is SA-DPM's own
run. Nothing is accepted and then ignored: what would have no effect, or contradicts, is a
ValueError of one line.

What this file does not do: open images, build networks, or train (tasks.py, train.py).

    python -c "import settings; print(settings.RECIPES['cifar10'])"
    python -c "import settings; print(settings.resolve(settings.parse(['--sa-k', '2'])))"

s the dict of settings; a run is a folder runs/NAME.
"""

import argparse
import math
import os
from pathlib import Path

import autoencoder
import data
import denoiser as denoisers
import etsdm
import files
import losses
import schedules
import spaces
import unet

# How each preset is trained unless a flag says otherwise. The papers': SA-DPM's configuration files
# (epochs turned into images seen) and E-TSDM's table A1, which gives no length: 48 M is ours.
# loss_space None: that of the prediction.
PAPER = dict(schedule="linear", prediction="eps", loss_space="eps", lr=2e-4, beta2=0.999,
             ema=0.9999, grad_clip=1.0, warmup=0, flip=False, sample_every=5000, save_every=1000)
RECIPES = {
    # Ours, for minutes on a CPU. v-prediction, cosine schedule: eps on the linear one still gives
    # coloured fog after the same minutes (NOTES.md).
    "tiny": dict(PAPER, batch_size=32, images=41_600, schedule="cosine", prediction="v",
                 loss_space=None, lr=2e-3, beta2=0.99, ema=0.995, warmup=100,
                 sample_every=650, save_every=200),
    "cifar10": dict(PAPER, batch_size=128, images=60_000_000),
    "celeba64": dict(PAPER, batch_size=128, images=195_000_000, flip=True),
    "celebahq256": dict(PAPER, batch_size=24, images=24_000_000, lr=2e-5, ema=0.999, grad_clip=0.0),
    "ffhq256": dict(PAPER, batch_size=96, images=48_000_000, lr=1e-4, grad_clip=0.0),
    "ffhq256-large": dict(PAPER, batch_size=64, images=48_000_000, lr=1e-4, grad_clip=0.0),
    "adm256": dict(PAPER, batch_size=256, images=128_000_000, lr=1e-4, grad_clip=0.0),
    # Not presets: the first stage of latent diffusion (ours), and a second head, as NPR- and
    # SN-DPM's programs train it (500,000 steps) or, on a tiny trunk, a few minutes' worth.
    "autoencoder": dict(batch_size=64, images=256_000, lr=2e-3, beta2=0.99, ema=0.995,
                        grad_clip=1.0, warmup=100, flip=False, sample_every=1000, save_every=500),
    "head": dict(batch_size=128, images=64_000_000, lr=1e-4, beta2=0.999, ema=0.9999,
                 grad_clip=0.0, warmup=0, sample_every=5000, save_every=1000),
    "head of tiny": dict(batch_size=64, images=128_000, lr=1e-3, beta2=0.99, ema=0.995,
                         grad_clip=0.0, warmup=0, sample_every=1000, save_every=500),
}


def parse(argv=None):
    """The command line. None means: as the preset's recipe has it."""
    parser = argparse.ArgumentParser(
        prog="train.py", usage="torchrun train.py [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a diffusion model on images. The same command again resumes the run.",
        epilog="""examples
  torchrun train.py --sa-k 2
      the built-in shapes: a tiny network, a few minutes on two CPU cores; then: python sample.py
  torchrun train.py --sa-k 2 --etsdm --data photos/ --image-size 64 --preset celeba64
      your own pictures (a folder or zip, searched recursively), both papers' methods together
  torchrun --nproc_per_node 8 train.py --preset cifar10 --data cifar10 --sa-k 2 --steps 400000
      the SA paper's CIFAR-10 model on 8 GPUs; --batch-size stays the global batch
  python train.py --schedule edm --etsdm
      EDM: its schedule, preconditioning, loss and noise levels; sample with --sampler heun
  python train.py --task sr --factor 4 --data photos/ --image-size 64 --preset celeba64
      super-resolution from 16 to 64 pixels; then: python sample.py RUN --low-res small/
  python train.py --task autoencoder --data photos/ --image-size 64
  python train.py --latent photos-autoencoder
      latent diffusion: the first stage, then a denoiser of its latents
  python train.py --head npr --from shapes-tiny-sa2
      NPR-DPM: learn how wide each reverse step should be, on a run that is finished

"preset's" below: python -c "import settings; print(settings.RECIPES)" shows each.""")

    # A flag without a default is decided by the preset's recipe, in resolve().
    add = parser.add_argument_group("images").add_argument
    add("--data", help="shapes (built in), cifar10, or a path: folder or zip of images, .npy, "
        ".npz[:KEY], MNIST-like IDX, CIFAR-10 archive (default: shapes)")
    add("--image-size", type=int, help="side in pixels, resized and cropped to (preset's)")
    add("--channels", type=int, choices=(1, 3), help="3 RGB, 1 true gray (default: 3)")
    add("--flip", action=argparse.BooleanOptionalAction, help="random horizontal flips (preset's)")
    add("--skip-bad-images", action="store_true", help="go on without files that cannot be read")
    add("--workers", type=int, help="threads that read images which do not fit in "
        "memory; 0: the trainer reads them itself (default: 2)")

    add = parser.add_argument_group("what is trained").add_argument
    add("--task", choices=("sr", "autoencoder"), help="sr: super-resolution; autoencoder: the "
        "first stage of latent diffusion (default: images from noise)")
    add("--factor", type=int, help="sr: how many times smaller the known image is (default: 4)")
    add("--latent", metavar="RUN", help="diffuse the latents of this autoencoder run")
    add("--halvings", type=int, help="autoencoder: the latents' side is the image's, halved so "
        "often (default: 2)")
    add("--latent-channels", type=int, help="autoencoder: numbers per latent position (default: 4)")
    add("--kl-weight", type=float, help="autoencoder: weight of the latents' distance from "
        "normal noise (default: 1e-4)")
    add("--head", choices=("npr", "sn"), help="a second head for the variance of each pixel, on "
        "the frozen network of --from")
    add("--from", metavar="RUN", help="head: the finished run to put it on")
    add("--head-size", choices=("simple", "block"), help="head: a convolution, or a residual "
        "block before it (default: simple)")

    add = parser.add_argument_group("model").add_argument
    add("--preset", choices=list(unet.PRESETS), help="network and recipe (default: tiny)")
    add("--schedule", choices=schedules.NAMES, metavar="NAME",
        help=f"noise schedule: {', '.join(schedules.NAMES)} (preset's)")
    add("--continuous", action="store_true", help="real-valued t, schedule in closed form")
    add("--prediction", choices=denoisers.PREDICTIONS, help="what the network predicts (preset's)")
    add("--etsdm", action="store_true", help="E-TSDM: share the time conditions near t = 0")
    add("--etsdm-interval", type=float, help="... below this t (default: 100)")
    add("--etsdm-n", type=int, help="... in this many equal parts (default: 5)")
    add("--remap", choices=etsdm.REMAPS, help="tell the network an invertible function of t")
    add("--dropout", type=float, help="(preset's)")

    add = parser.add_argument_group("loss").add_argument
    add("--sa-k", type=int, default=1, help="SA-DPM: train k consecutive steps together "
        "(default: 1, the plain loss)")
    add("--sa-weight", type=float, help="weight of the sequence-aware loss (default: 1)")
    add("--sa-reuse", action="store_true", default=None, help="... and let the plain loss use all "
        "k noise levels of an image: with a k-th of the batch a step costs what a plain one does")
    add("--loss-space", choices=losses.SPACES, help="where the plain loss is measured (preset's)")
    add("--train-times", choices=losses.TIMES, help="t is drawn uniformly, uniformly in the "
        "--remap, or log-normally in the noise level (default: uniform; lognormal for --schedule "
        "edm)")
    add("--lipschitz-reg", type=float, metavar="WEIGHT", help="DDPM-r: penalise the network's "
        "slope in t, squared and averaged over pixels, by e.g. 30; costs another forward pass")

    add = parser.add_argument_group("training").add_argument
    add("--batch-size", type=int, help="global: over all processes (preset's)")
    add("--microbatch", type=int, help="images per forward pass of a process; gradients add up")
    add("--recompute", action="store_true", default=None, help="activation checkpointing: a "
        "fraction of the memory, a third more time, the same gradients")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--images", type=int, help="train until this many were seen (preset's)")
    length.add_argument("--steps", type=int, help="the same as --images STEPS x BATCH_SIZE")
    add("--lr", type=float, help="Adam's learning rate (preset's)")
    add("--warmup", type=int, help="steps over which the learning rate rises from 0 (preset's)")
    add("--ema", type=float, help="decay of the averaged weights (preset's)")
    add("--grad-clip", type=float, help="largest gradient norm, 0 = no clipping (preset's)")
    add("--precision", default="auto", choices=("auto", "fp32", "bf16"),
        help="auto: bf16 where the hardware has units for it (default: auto)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--deterministic", action="store_true", default=None, help="the same bits again on GPUs "
        "too (CPUs give them anyhow), by slower algorithms")
    add("--seed", type=int, default=0, help="of weights, order of images and noise (default: 0)")

    add = parser.add_argument_group("run").add_argument
    add("--name", help="folder under runs/ (default: made of data, preset and methods)")
    add("--sample-every", type=int, help="steps between sample grids (preset's)")
    add("--save-every", type=int, help="steps between checkpoints (preset's)")
    return parser.parse_args(argv)


# Flags that say what a denoiser is; an autoencoder is none, and a head has that of its trunk.
DENOISER = ("preset", "latent", "factor", "schedule", "continuous", "prediction", "etsdm",
            "etsdm_interval", "etsdm_n", "remap", "dropout", "sa_k", "sa_weight", "sa_reuse",
            "loss_space", "train_times", "lipschitz_reg", "recompute")
CODER, HEAD = ("halvings", "latent_channels", "kl_weight"), ("from", "head_size")


def resolve(args):
    """Flags and recipe -> the flat dict of settings that is the run. ValueError: contradictions."""
    flags = vars(args)

    def refuse(names, why):
        if used := [n for n in names if flags[n] is not None and flags[n] is not False
                    and (n, flags[n]) != ("sa_k", 1)]:
            raise ValueError(f"--{used[0].replace('_', '-')} {why}")
    if args.task != "autoencoder":
        refuse(CODER, "is for --task autoencoder")
    if not args.head:
        refuse(HEAD, "is for --head npr or sn")
    if args.task != "sr":
        refuse(("factor",), "is for --task sr")
    # What the user said goes over the recipe; --steps and --dropout are folded into others.
    given = {k: v for k, v in flags.items() if v is not None and k not in ("steps", "dropout")}
    s = dict(dict.fromkeys(flags), T=1000, data="shapes", channels=3)
    if args.head:
        refuse((*DENOISER, "task", "image_size", "channels"), "cannot change with --head: a head "
               "serves the network that --from names, as it is")
        s = head_settings(args, s, {k: v for k, v in given.items() if k not in DENOISER})
    elif args.task == "autoencoder":
        refuse(DENOISER, "is no part of an autoencoder")
        s = autoencoder_settings(s, given)
    else:
        s = denoiser_settings(args, s, given)
    s = {k: v for k, v in s.items() if k not in ("steps", "dropout", *CODER[:2], "head_size")}
    s["workers"] = 2 if s["workers"] is None else s["workers"]
    if args.steps is not None:
        s["images"] = args.steps * s["batch_size"]
    refuse_contradictions(args, s)
    s["name"] = args.name or default_name(s)
    if Path(s["name"]).name != s["name"] or s["name"][0] == "." or not s["name"].isprintable():
        raise ValueError(f"--name {s['name']!r} must be a plain name: runs go to "
                         f"{files.RUNS}/NAME")
    return s


def denoiser_settings(args, s, given):
    """A denoiser of pixels or latents: its network by the preset, the rest by flags and recipe."""
    first = first_stage(args, s, given) if args.latent else None
    s |= dict(preset="tiny", etsdm_interval=100, etsdm_n=5, sa_weight=1.0)
    s |= RECIPES[args.preset or "tiny"] | given
    net = dict(unet.PRESETS[s["preset"]])
    net["image_size"] = s["image_size"] = s["image_size"] or net["image_size"]
    net["dropout"] = net.get("dropout", 0.0) if args.dropout is None else args.dropout
    net["in_channels"] = net["out_channels"] = s["channels"]
    if s["task"] == "sr":
        s["factor"] = 4 if s["factor"] is None else s["factor"]
        net["in_channels"] *= 2  # x_t, and the known image beside it
        spaces.LowRes(s["channels"], s["image_size"], s["factor"])  # what cannot be, fails here
    if first:
        c, side, _ = autoencoder.Autoencoder(**first["autoencoder"]).latent_shape
        net.update(image_size=side, in_channels=c, out_channels=c, patch=1)
    unit = net.get("patch", 1) * 2 ** (len(net["channel_mult"]) - 1)
    if net["image_size"] % unit:
        what, advice = f"--image-size {net['image_size']}", ""
        if first:
            what = f"--latent {args.latent}: a side of {net['image_size']}"
            advice = ". Train an autoencoder of larger images, or with fewer --halvings"
        raise ValueError(f"{what} cannot be halved as often as the preset {s['preset']} does: "
                         f"it takes multiples of {unit}{advice}")
    s["unet"] = net
    # Predictions and losses that follow from others, unless a flag says otherwise.
    edm = s["schedule"] == "edm"
    if args.prediction is None and (edm or s["schedule"] == "zero-terminal-snr"):
        s["prediction"] = "edm" if edm else "v"  # eps has no x_0 at t = T of zero-terminal-snr
    if args.loss_space is None:
        # The papers measure ε, and so do their presets. But ε's residual is a times v's: nothing
        # would be learnt where a = 0.
        own = (s["loss_space"] is None or s["prediction"] == "edm"
               or s["schedule"] == "zero-terminal-snr")
        s["loss_space"] = s["prediction"] if own else "eps"
    if s["train_times"] is None and edm:
        s["train_times"] = "lognormal"
    elif s["train_times"] == "uniform" and not edm:
        s["train_times"] = None
    return s


def settings_of(flag, run):
    """The settings of the run that a flag names. ValueError: there is none."""
    try:
        s = files.load_checkpoint(files.find_checkpoint(run))["settings"]
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag} {run}: {error}") from error
    needed = {"autoencoder"} if s.get("task") == "autoencoder" else {"preset", "unet"}
    if missing := needed - s.keys():
        raise ValueError(f"{flag} {run}: its settings lack {' '.join(sorted(missing))}")
    return s


def first_stage(args, s, given):
    """The settings of the autoencoder run that --latent names; s takes its images over."""
    first = settings_of("--latent", args.latent)
    if first.get("task") != "autoencoder":
        raise ValueError(f"--latent {args.latent} is not an autoencoder: python train.py --task "
                         "autoencoder trains one")
    if args.task or args.image_size or args.channels:
        raise ValueError("--latent goes without --task, --image-size and --channels: these are "
                         f"the autoencoder's, {first['image_size']} and {first['channels']}")
    given.update({k: first[k] for k in ("data", "image_size", "channels")
                  if k not in given})
    return first


def autoencoder_settings(s, given):
    """A first stage for latent diffusion."""
    s |= dict(image_size=32, kl_weight=1e-4) | RECIPES["autoencoder"] | given
    halvings = 2 if s["halvings"] is None else s["halvings"]
    if not 1 <= halvings <= 5:
        raise ValueError(f"--halvings must be 1 to 5, not {halvings}")
    size = dict(image_size=s["image_size"], channels=s["channels"], mult=(1,) + (2,) * halvings,
                latent_channels=4 if s["latent_channels"] is None else s["latent_channels"])
    if size["latent_channels"] < 1:
        raise ValueError(f"--latent-channels must be at least 1, not {size['latent_channels']}")
    if s["image_size"] % 2**halvings:
        raise ValueError(f"--image-size {s['image_size']} cannot be halved --halvings {halvings} "
                         f"times: use a multiple of {2**halvings}")
    s["autoencoder"] = size
    return s


def head_settings(args, s, given):
    """A second head: every setting of the model is that of the run it is put on."""
    run = vars(args)["from"]  # a word of Python: args.from is no name
    if run is None:
        raise ValueError("--head needs --from RUN, the run whose variance it learns")
    base = settings_of("--from", run)
    if base.get("task") == "autoencoder" or base.get("head"):
        raise ValueError(f"--from {run} must be a denoiser without a head")
    recipe = RECIPES["head of tiny" if base["preset"] == "tiny" else "head"]
    net = dict(base["unet"], second_head=args.head_size or "simple", dropout=0.0)
    # Its own loss has one term, over all t alike, as in both papers' programs.
    plain = dict(sa_k=1, sa_weight=0.0, sa_reuse=None, lipschitz_reg=None, train_times=None,
                 microbatch=None, recompute=None)
    return s | base | recipe | plain | given | {"unet": net}


def refuse_contradictions(args, s):
    """Nothing is accepted and then ignored: one line that says which flags do not go together."""
    if not 1 <= s["sa_k"] <= s["T"]:
        raise ValueError(f"--sa-k counts the step itself: 1 to {s['T']}, not {s['sa_k']}")
    if s["sa_k"] == 1 and args.sa_weight is not None:
        raise ValueError("--sa-weight weighs the loss that --sa-k 2 adds: with k = 1 there is none")
    if s["sa_reuse"] and (s["sa_k"] == 1 or not s["sa_weight"]):
        raise ValueError("--sa-reuse uses the k noise levels of --sa-k 2: with k = 1, or "
                         "--sa-weight 0, there is one")
    if not args.etsdm and (args.etsdm_interval is not None or args.etsdm_n is not None):
        raise ValueError("--etsdm-interval and --etsdm-n shape what --etsdm does: give that too")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps must be above 0, not {args.steps}")
    if s["seed"] >= 2**62:
        raise ValueError(f"--seed must be below 2^62, not {s['seed']}")
    for key in ("batch_size", "images", "lr", "sample_every", "save_every", "image_size"):
        if not 0 < s[key] < math.inf:
            raise ValueError(f"--{key.replace('_', '-')} must be above 0, not {s[key]}")
    if s["image_size"] > data.LARGEST_SIDE:
        raise ValueError(f"--image-size must be at most {data.LARGEST_SIDE}, not "
                         f"{s['image_size']}")
    for key in ("warmup", "workers", "seed", "grad_clip", "sa_weight", "kl_weight"):
        if not 0 <= (s[key] or 0) < math.inf:
            raise ValueError(f"--{key.replace('_', '-')} must be 0 or more, not {s[key]}")
    if args.lipschitz_reg is not None and not 0 < args.lipschitz_reg < math.inf:
        raise ValueError(f"--lipschitz-reg must be above 0, not {args.lipschitz_reg}")
    for key, value in (("ema", s["ema"]), ("dropout", args.dropout or 0)):
        if not 0 <= value < 1:
            raise ValueError(f"--{key} must be at least 0 and below 1, not {value}")
    if s["microbatch"] is not None and s["microbatch"] < 1:
        raise ValueError(f"--microbatch must be at least 1, not {s['microbatch']}")
    if s["images"] < s["batch_size"]:
        raise ValueError(f"--images {s['images']} is less than one batch of {s['batch_size']}")
    if s["train_times"] == "remap" and not s["remap"]:
        raise ValueError("--train-times remap is uniform in what --remap tells: give that too")
    if s["schedule"] == "edm" and s["prediction"] != "edm":
        raise ValueError("--schedule edm goes with --prediction edm, which scales x_t for the "
                         "network: bare, it is up to 80 wide")
    if s["schedule"] == "edm" and args.continuous:
        raise ValueError("--schedule edm is continuous already: leave out --continuous")
    if s["prediction"] == "edm" and s["remap"]:
        raise ValueError("--remap does not go with --prediction edm, which gives the network "
                         "ln(σ)/4")
    if s["task"] != "autoencoder":
        etsdm.make_condition(s["etsdm"], s["etsdm_interval"], s["etsdm_n"], s["remap"], s["T"])


def notes(args, s, dataset, world):
    """What works, but hardly as meant: a list of lines. dataset: what data.load gave."""
    b, steps = s["batch_size"] // world, s["images"] // s["batch_size"]
    found = []
    if s["prediction"] == "eps" and s["schedule"] == "zero-terminal-snr":
        found.append(f"eps-prediction knows no x_0 at t = {s['T']}, where alpha_bar = 0: training "
                     f"and sampling begin at t = {s['T'] - 1}")
    if s["sa_k"] and s["sa_k"] > 1 and not s["sa_weight"]:
        found.append(f"--sa-weight 0 leaves the plain loss alone, whatever --sa-k {s['sa_k']}")
    if s["etsdm"] and s["etsdm_n"] == s["etsdm_interval"] and not s["continuous"]:
        found.append(f"--etsdm-n {s['etsdm_n']} makes each timestep a part of its own: nothing is "
                     "shared")
    if s["microbatch"] and s["microbatch"] >= b:
        found.append(f"--microbatch {s['microbatch']} is no less than the {b} images of a process: "
                     "it has no effect")
    if args.images is not None and args.images % s["batch_size"]:
        found.append(f"--images {args.images} are {steps} whole batches, {steps * s['batch_size']} "
                     "images")
    if s["warmup"] >= steps:
        found.append(f"the learning rate rises over {s['warmup']} steps, and the run has {steps}")
    if args.workers is not None and not isinstance(dataset, data.Files):
        found.append("--workers has no effect: the images are in memory, or drawn")
    if args.skip_bad_images and not getattr(dataset, "paths", None):
        found.append("--skip-bad-images has no effect: the images are not files")
    return found


def run_name(run):
    """The name of a run, however the path of its folder or checkpoint is written."""
    path = Path(os.path.abspath(files.find_checkpoint(run)))
    return path.parent.name if path.name == "checkpoint.pt" else path.name


def default_name(s):
    """What distinguishes a run at a glance, so that the same command finds the same run again."""
    parts = [Path(s["data"].split(":")[0]).stem.lstrip(".") or "images"]
    if s["head"]:
        parts = [run_name(s["from"]), s["head"]]
        parts += ["block"] * (s["unet"]["second_head"] == "block")
    elif s["task"] == "autoencoder":
        halvings = len(s["autoencoder"]["mult"]) - 1
        parts += ["autoencoder"] + [f"{halvings}-halvings"] * (halvings != 2)
    else:
        if s["latent"]:  # of an autoencoder with a name of its own: that; else of the data
            name = run_name(s["latent"])
            parts = parts if name == f"{parts[0]}-autoencoder" else [name]
        parts += [s["preset"], s["latent"] and "latent"]
        parts += [s["task"] and f"{s['task']}{s['factor']}"]
        parts += dict.fromkeys(  # edm is both
            s[k] for k in ("schedule", "prediction") if s[k] != RECIPES[s["preset"]][k])
        parts += ["continuous"] * s["continuous"] + [f"sa{s['sa_k']}"] * (s["sa_k"] > 1)
        parts += ["reuse"] * bool(s["sa_reuse"])
        parts += ["etsdm"] * s["etsdm"] + [s["remap"]] * bool(s["remap"])
        parts += ["reg"] * bool(s["lipschitz_reg"])
        usual = "lognormal" if s["schedule"] == "edm" else None
        parts += [f"{s['train_times']}-times"] * (s["train_times"] != usual)
    return "-".join([p for p in parts if p] + [f"seed{s['seed']}"] * bool(s["seed"]))
