r"""Images to be measured, from anything: files, a data set, statistics, a run sampled on the fly.

    open_all(["RUN", "cifar10"], ...) -> [Generated, Stored]     what metrics.py compares

All sides of a comparison get one size and one number of channels: those of the run, if there is
one, since that is what it was trained on; else what --image-size and --channels say; else the
images' own, if they agree. A distance between images that were resized differently measures the
resizers.

What this file does not do: features, scores (metrics.py), or reading of files (data.py).

    python metrics.py fid RUN cifar10 -n 50000
    python metrics.py fid samples.zip statistics.npz
    python metrics.py psnr AUTOENCODER_RUN cifar10

C channels, H = W the side in pixels; images uint8 (b, C, H, W).
"""

import argparse
import os
import shlex
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import autoencoder
import data
import denoiser as denoisers
import files
import runtime
import samplers
import sampling

NUM = 10_000  # images of a run, or of a set without end, unless --num says otherwise
SETS = ("shapes", "cifar10")  # names that data.load knows


class Generated:
    """Images of a run, made when asked for: image i is sample.py's of (seed, i)."""

    def __init__(self, run, args, device):
        path = files.find_checkpoint(run)
        self.denoiser, self.device = denoisers.load_run(path, args.weights), device
        self.denoiser.net = runtime.for_inference(self.denoiser.net, device, args.precision,
                                                  args.compile)
        self.settings = self.denoiser.settings
        self.n, self.seed = args.num or NUM, args.seed
        self.shape = (self.settings["channels"], *[self.settings["image_size"]] * 2)
        refuse_given(self.denoiser, path.parent.name)
        self.arguments = sampling.from_flags(args, self.denoiser)
        self.notes = sampling.notes(args, self.denoiser)
        flags = ("spacing", "eta", "order", "variance", "clip", "churn", "churn_min", "churn_max",
                 "churn_noise", "precision")
        how = f"{args.sampler} --nfe {self.arguments['nfe']} " + " ".join(
            f"--{k.replace('_', '-')} {v}" for k in flags
            if (v := getattr(args, k)) not in (None, "auto", "fp32"))
        start = self.arguments["t_start"]  # below T for ε-prediction where ᾱ(T) = 0
        how += f", from t = {start}" if start < self.settings["T"] else ""
        self.summary = (f"{self.n:,} images by {path.parent.name} at step {self.denoiser.step}, "
                        f"{args.weights} weights, seed {args.seed}, {how}")

    def batch(self, indices):
        """-> uint8 (b, C, H, W): quantized, as files are."""
        seeds, space = samplers.image_seeds(self.seed, indices), self.denoiser.space
        x = samplers.from_seeds(self.denoiser, seeds, space.shape, self.device, **self.arguments)
        return data.to_uint8(space.decode(x))


class Stored:
    """A folder, zip, array or data set. size None: the images' own; channels None: 3."""

    def __init__(self, source, size, channels, args, progress):
        self.set = data.load(source, size, channels or 3, skip_bad=args.skip_bad_images,
                             progress=progress)
        endless = len(self.set) >= data.ENDLESS
        self.n = (args.num or NUM) if endless else len(self.set)
        self.paths, self.summary = getattr(self.set, "paths", []), self.set.summary
        self.names = [name_of(path, source) for path in self.paths]
        self.shape = tuple(self.set[0].shape)

    def batch(self, indices):
        """-> uint8 (b, C, H, W)."""
        if isinstance(self.set, data.Array):
            return self.set.images[indices]
        threads = min(8, os.cpu_count() or 1)  # decoding takes time
        return torch.stack(list(data.in_threads(self.set.__getitem__, indices, threads,
                                                len(indices))))


def name_of(path, source):
    """What a file of `source`, a folder, zip or image, is paired by: cat/1.png -> cat/1."""
    if os.path.isdir(source):
        path = os.path.relpath(path, source)
    elif path == source:  # an image by itself
        path = os.path.basename(path)
    return Path(path).with_suffix("").as_posix()


class Reconstructed:
    """Images of another side, there and back through the autoencoder of a run."""

    def __init__(self, path, side, args, device):
        checkpoint = files.load_checkpoint(path)
        size = checkpoint["settings"]["autoencoder"]
        if side.shape != (size["channels"], *[size["image_size"]] * 2):
            raise ValueError(f"{path.parent.name} encodes images of {size['image_size']} pixels in "
                             f"{size['channels']} channels, and these are "
                             + "x".join(map(str, side.shape)) + ": give --image-size, --channels")
        self.net = autoencoder.Autoencoder(**size)
        files.load_weights(self.net, checkpoint[args.weights], path)
        self.net.to(device).eval()
        self.side, self.device = side, device
        self.n, self.shape, self.names = side.n, side.shape, []
        self.summary = (f"reconstructions by {path.parent.name} at step {checkpoint['step']}, from "
                        + "x".join(map(str, self.net.latent_shape)) + " latents")

    @torch.no_grad()
    def batch(self, indices):
        """-> uint8 (b, C, H, W)."""
        images = data.to_float(self.side.batch(indices).to(self.device))
        return data.to_uint8(self.net.decode(self.net.encode(images)[0]))


def find_autoencoder(source):
    """The checkpoint of the autoencoder run that `source` names, or None."""
    path = find_run(source)
    task = files.load_checkpoint(path)["settings"].get("task") if path else None
    return path if task == "autoencoder" else None


def read_statistics(source):
    """What an .npz of statistics holds, as a dict: mu, sigma and, if metrics.py wrote it, n,
    network, sha256 and size. None for anything else. ValueError: they are in a pickle."""
    refuse_pickle(str(source))
    if not str(source).endswith(".npz") or not os.path.isfile(source):
        return None
    try:
        with np.load(source, allow_pickle=False) as archive:
            if not {"mu", "sigma"} <= set(archive.files):
                return None
            wanted = ("mu", "sigma", "n", "network", "sha256", "size", "precision")
            found = {k: archive[k] for k in archive.files if k in wanted}
    except Exception as error:  # of zip, zlib, NumPy
        raise ValueError(f"{source} is no readable .npz file ({files.what_is(source)})"
                         ) from error
    mu, sigma = found["mu"], found["sigma"]
    if not mu.dtype.kind == sigma.dtype.kind == "f" or sigma.shape != (*mu.shape, *mu.shape):
        raise ValueError(f"{source}: mu {mu.dtype} {mu.shape} and sigma {sigma.dtype} "
                         f"{sigma.shape} are no mean (D,) and covariance (D, D)")
    return found


def refuse_pickle(source):
    """ValueError for statistics as SA-DPM (.npy) and EDM2 (.pkl) have them: dicts in a pickle."""
    if not source.endswith((".npy", ".pkl")) or not os.path.isfile(source):
        return
    with open(source, "rb") as file:
        if source.endswith(".npy") and b"'descr': '|O'" not in file.read(128):
            return  # an array of numbers
    found = ("np.load(a, allow_pickle=True).item()" if source.endswith(".npy") else
             "pickle.load(open(a, 'rb'))['fid']")
    program = (f"import pickle, sys, numpy as np; a, b = sys.argv[1:]; s = {found}; "
               "np.savez(b, mu=s['mu'], sigma=s['sigma'])")
    command = shlex.join(["python", "-c", program, source, source[:-4] + ".npz"])
    raise ValueError(f"{source} is a pickle, and opening one can run a program. If you trust it, "
                     f"convert it to an .npz with mu and sigma:  {command}")


def find_run(source):
    """The checkpoint that `source` names, or None if it names images. FileNotFoundError: neither
    exists."""
    if source in SETS or ".npz:" in source:
        return None
    if os.path.isfile(source) and not source.endswith(".pt"):
        return None
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "checkpoint.pt")):
        return None
    if os.path.exists(source) or (files.RUNS / source / "checkpoint.pt").is_file():
        return files.find_checkpoint(source)
    names = sorted(p.parent.name for p in files.RUNS.glob("*/checkpoint.pt"))
    raise FileNotFoundError(f"{source} is no file, folder, data set ({' '.join(SETS)}) or run; "
                            f"under {files.RUNS}/ there are: {' '.join(names) or 'none'}")


def open_all(sources, args, process, may_be_statistics=False):
    """One Generated, Stored or dict of statistics for each source; all images of one shape.

    args: num, seed, image_size, channels, skip_bad_images, and sampling.add_flags'. ValueError,
    OSError: one line.
    """
    sides = [read_statistics(s) if may_be_statistics else None for s in sources]
    # Runs before sets: they say what the others are to be brought to.
    runs = [None if side else find_run(s) for s, side in zip(sources, sides, strict=True)]
    sides = [Generated(run, args, process.device) if run else side
             for run, side in zip(runs, sides, strict=True)]
    made = [side.shape for side in sides if isinstance(side, Generated)]
    refuse_unused(args, made, [s for s, side in zip(sources, sides, strict=True) if not side])
    size, channels = args.image_size, args.channels
    if made:
        if len(set(made)) > 1:
            raise ValueError(f"{' and '.join(sources)}: runs of different shapes do not compare: "
                             + " and ".join("x".join(map(str, shape)) for shape in made))
        if size not in (None, made[0][1]) or channels not in (None, made[0][0]):
            given = "--channels" if size in (None, made[0][1]) else "--image-size"
            raise ValueError("{}: leave it out, the run's images are {}x{}x{}".format(
                given, *made[0]))
        channels, size, _ = made[0]

    sides = [side or Stored(source, size, channels, args, process.first)
             for source, side in zip(sources, sides, strict=True)]
    shapes = {side.shape for side in sides if not isinstance(side, dict)}
    if len(shapes) > 1:
        raise ValueError(f"{' and '.join(sources)}: images of different shapes do not compare ("
                         + " and ".join("x".join(map(str, s)) for s in sorted(shapes))
                         + "): give --image-size, or --channels")
    return sides


def refuse_unused(args, made, stored):
    """ValueError for flags about sampling where nothing is sampled."""
    plain = argparse.ArgumentParser()
    sampling.add_flags(plain)
    unused = [k for k, v in vars(plain.parse_args([])).items() if getattr(args, k) != v]
    if stored and args.metric != "psnr" and not args.features:  # Inception is a network, too
        unused = [k for k in unused if k not in ("precision", "compile", "deterministic")]
    unused += ["seed"] * bool(args.seed)
    if not made and unused:
        raise ValueError(f"{sampling.flag(unused[0])} is for sampling a run, and there is none")
    if args.skip_bad_images and all(source in SETS for source in stored):
        raise ValueError("--skip-bad-images is for folders and zips of images, and there is none")
    if args.num and not made and "shapes" not in stored:
        raise ValueError("--num is for a run or for shapes: sets on disk are used whole")


def own_data(source):
    """The data set that the run `source` was trained on. ValueError: it is no run."""
    run = find_run(source)
    if run is None:
        raise ValueError(f"{source} is no run: say what to compare it with")
    return here(files.load_checkpoint(run)["settings"]["data"], source)


@lru_cache(maxsize=2)
def images_of(source, size, channels, seed):
    """A data set, kept: several runs are measured on the same images. Broken files are left out;
    the summary counts them."""
    return data.load(source, size, channels, seed, skip_bad=True, progress=True)


def opened(args, device):
    """Yields (name, denoiser, x0) for each of args.runs, or the newest: what gap.py and
    lipschitz.py measure.

    x0, float32 (num, *space.shape): the first args.num images in the order of args.seed, of
    args.data or of what the run was trained on; all of them, if there are fewer. Of a latent run,
    their latents. ValueError, OSError: one line.
    """
    names = set()
    for run in args.runs or [None]:
        label, run = labelled(run)
        path = files.find_checkpoint(run).resolve()
        denoiser, name = denoisers.load_run(path, args.weights), label or path.parent.name
        while name in names:  # the same run twice, or two of one name
            name += "'"
        names.add(name)
        s = denoiser.settings
        refuse_given(denoiser, name)
        dataset = images_of(data_of(args, s, name), s["image_size"], s["channels"], args.seed)
        num = min(args.num, len(dataset))
        x0 = data.to_float(next(data.batches(dataset, num, 0, args.seed)))
        print(f"{name}: {num} of {dataset.summary}", flush=True)
        denoiser.net.to(device)
        yield name, denoiser, denoiser.space.encode(x0.to(device))


def labelled(run):
    """LABEL=RUN -> (label, run); a run alone, or a path that has a = in it -> (None, run)."""
    label, equals, rest = (run or "").partition("=")
    return (label, rest) if equals and label and not os.path.exists(run) else (None, run)


def refuse_given(denoiser, name):
    """ValueError for a run that cannot draw without being given a small image."""
    if denoiser.settings.get("task") == "sr":
        command = shlex.join(["python", "sample.py", name, "--low-res", "IMAGES"])
        raise ValueError(f"{name} enlarges images: {command} writes what it makes of them, which "
                         "psnr and fid take as a folder")


def data_of(args, settings, run):
    """--data, or the set that a run was trained on. FileNotFoundError: there is no such set."""
    if args.data and not there(args.data):
        raise FileNotFoundError(f"--data: no such file or folder: {args.data}")
    return args.data or here(settings["data"], run)


def there(source):
    """Is there such a set: a built-in one, a file, a folder or FILE.npz:KEY?"""
    path = source.replace(".npz:", ".npz\0").split("\0")[0]
    return source in SETS or os.path.exists(source) or os.path.exists(path)


def here(source, run):
    """`source`, the set that a run says it was trained on, if it is to be found from here; else
    FileNotFoundError."""
    if not there(source):
        raise FileNotFoundError(f"{run} was trained on {source}, which is not to be found from "
                                "this folder: say where the images are (--data; for fid, as B)")
    return source
