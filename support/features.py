r"""Comparison of images by features: networks, statistics of features, reports of scores.

    open_network(...)            Inception, or a network saved by torch.export.save
    FeatureSums                  mean and covariance of features, over batches and processes
    read_statistics(path)        an .npz of mu and sigma, in pytorch-fid's form
    report(...), print_report    a score with everything that it depends on

Not here: the scores (metrics.py), Inception's layers (inception.py).

    python -c "from support import features; print(features.INCEPTION)"

N images, D features of each, μ (D,) their mean, Σ (D, D) their covariance (divisor N − 1).
"""

import hashlib
import json
import logging
import math
import os
import shlex
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
from torch.export.passes import move_to_device_pass
from tqdm import tqdm

from support import checkpoint, inception, precision
from support.device import double

INCEPTION = "Inception 2015-12-05"


# ------------------------------------------------------------------ networks

@dataclass
class FeatureNetwork:
    """net(uint8 images (N, 3, H, W)) -> (features (N, D), logits), with the facts printed with a
    score. call: None if only the name is known, from a file of statistics."""

    call: Callable | None
    network: str | None
    sha256: str | None
    resize: str
    precision: str = "fp32"

    def __call__(self, images):
        return self.call(images)

    def name(self, published, other):
        """The name of a score: FID or IS only for Inception."""
        if self.network == INCEPTION:
            return published
        return f"{other}({self.network})" if self.network else other


def open_network(config, dist, sets):
    """Open the network of --features, else Inception (--inception, --precision, --compile), for
    these sets -> FeatureNetwork. ValueError: see check_sets()."""
    net = open_own(config, dist) if config.features else open_inception(config, dist)
    check_sets(sets, net, dist)
    return net


def open_inception(config, dist):
    """open_network() without --features."""
    net, digest = dist.main_first(lambda: inception.open_net(config.inception, dist.device))
    net = precision.for_inference(net.fold(), dist.device, config.precision, config.compile)
    return FeatureNetwork(net, INCEPTION, digest, "bilinear to 299x299 without antialiasing",
                          config.precision)


def open_own(config, dist):
    """open_network() with --features."""
    path = config.features
    digest = dist.on_main(lambda: hashlib.sha256(path.read_bytes()).hexdigest())
    net = dist.main_first(lambda: open_exported(path, dist.device))

    def call(images):
        out = net(images.float() / 127.5 - 1)
        if not isinstance(out, torch.Tensor) or out.dim() < 2 or len(out) != len(images):
            what = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(f"--features {path} must return one tensor (N, features) for N "
                             f"images; for {len(images)} it returned {what}")
        return out.flatten(1), out.flatten(1)  # the Inception Score uses them as logits

    # bf16 does not reach this network, and TF32 all of the program.
    rounds = "tf32" if config.precision == "tf32" else "fp32"
    return FeatureNetwork(call, path.name, digest, "none", rounds)


def check_sets(sets, net, dist):
    """Before anything is sampled, ValueError: too few images, statistics of another network, or a
    run in training that the processes opened at different steps."""
    for s in sets:
        if isinstance(s, Statistics):
            if s.sha256 and s.sha256 != net.sha256:
                raise ValueError(f"{s.source} has statistics of {s.network} (SHA-256 "
                                 f"{s.sha256[:12]}), not of {net.network} ({net.sha256[:12]}): "
                                 "they cannot be compared")
        elif s.n < 2:
            raise ValueError(f"{s.source}: a covariance needs at least 2 images, not {s.n}")
        elif run := getattr(s, "denoiser", None):
            if dist.any(run.hash != dist.broadcast(run.hash)):
                raise ValueError(f"{s.source} changed while it was read. Is it in training? Try "
                                 "again")


def open_exported(path, device):
    """Open a network saved by torch.export.save -> a function of float32 images (N, 3, H, W) in
    [-1, 1]. Such a file can run code."""
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # its warnings are tracebacks
    reason = "it is cut short, another kind of zip, or from another version of PyTorch"
    try:
        if not zipfile.is_zipfile(path):
            reason = checkpoint.guess_file_type(path)
        program = torch.export.load(path)
        if device.type != "cpu":
            program = move_to_device_pass(program, str(device))
        net = program.module()
    except Exception as error:  # torch.export and zipfile raise many kinds
        if isinstance(error, OSError):
            raise
        raise ValueError(f"--features {path} is not a network saved by torch.export.save: {reason}"
                         ) from error

    def call(images):
        try:
            with torch.no_grad():
                return net(images)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            why = str(error).strip().split("\n")[0]
            if "size()[0]" in why:
                why += " (exported without a dynamic batch axis?)"
            elif why.startswith("Guard failed"):
                why += " (exported for other images: --image-size, --channels?)"
            raise ValueError(f"--features {path} does not take a batch of shape "
                             f"{tuple(images.shape)}: {why}") from error
    return call


# ------------------------------------------------------------------ statistics

class FeatureSums:
    """n, Σ f and Σ f fᵀ of feature vectors, in float64, so that batches and order do not matter."""

    def __init__(self, width):
        self.n, self.sum = 0, torch.zeros(width, dtype=torch.float64)
        self.outer = torch.zeros(width, width, dtype=torch.float64)

    def add(self, f):
        """Add f (b, D), of any dtype and device."""
        f = double(f)  # the sums stay on f's device
        self.sum, self.outer = self.sum.to(f.device), self.outer.to(f.device)
        self.n += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f

    def moments(self, dist):
        """(μ, Σ) over all processes, NumPy float64. ValueError: fewer than two images."""
        n = dist.all_reduce(torch.tensor(self.n)).item()
        total, outer = (dist.all_reduce(v.cpu()) for v in (self.sum, self.outer))
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {n}")
        mean = total / n
        sigma = (outer - n * mean.outer(mean)) / (n - 1)
        # For a constant feature, rounding gives a "variance" of either sign. float32 features are
        # exact only to 1e-7 of their size.
        constant = sigma.diagonal() <= 1e-12 * mean**2
        sigma[constant] = sigma[:, constant] = 0
        return mean.numpy(), sigma.numpy()


@dataclass
class Statistics:
    """μ and Σ of the features of n images, with the facts they depend on (None: not in the file).
    Reports also need source, shape, summary and notes, as for sets of images."""

    source: str
    mu: np.ndarray
    sigma: np.ndarray
    n: int | None = None
    size: int | None = None
    network: str | None = None
    sha256: str | None = None
    precision: str = "fp32"
    shape: ClassVar = None
    summary: ClassVar[str] = "statistics from a file"
    notes: ClassVar[tuple] = ()

    def arrays(self):
        """The entries of the .npz: all known values."""
        return {f.name: getattr(self, f.name) for f in fields(self)[1:]
                if getattr(self, f.name) is not None}


def image_batches(images, batch_size, dist, label):
    """Yield every world_size-th image of a set, in batches: (indices, uint8 (b, 3, H, W))."""
    mine = list(range(dist.rank, images.n, dist.world_size))
    with tqdm(desc=label, total=len(mine), unit="image", disable=not dist.is_main,
              dynamic_ncols=True) as bar:
        for start in range(0, len(mine), batch_size):
            indices = mine[start:start + batch_size]
            yield indices, images.batch(indices).to(dist.device).expand(-1, 3, -1, -1)
            bar.update(len(indices))


def statistics(images, net, batch_size, dist):
    """Statistics of a set of images over all processes; those of a file stay unchanged."""
    if isinstance(images, Statistics):
        return images
    sums = None
    for _, batch in image_batches(images, batch_size, dist, images.source):
        f = net(batch)[0]
        sums = sums or FeatureSums(f.shape[1])
        sums.add(f)
    # A process without images joins the sums too, and needs their length.
    width = dist.broadcast(sums and len(sums.sum))
    mu, sigma = (sums or FeatureSums(width)).moments(dist)
    return Statistics(images.source, mu, sigma, images.n, images.shape[1], net.network, net.sha256,
                      net.precision)


def gather_logits(images, net, batch_size, dist):
    """The logits of all images in order, on rank 0; None on other ranks."""
    parts = dist.gather([(indices, net(batch)[1].cpu()) for indices, batch in
                         image_batches(images, batch_size, dist, images.source)])
    if parts is None:
        return None
    order = [i for part in parts for indices, _ in part for i in indices]
    return torch.cat([rows for part in parts for _, rows in part])[torch.tensor(order).argsort()]


def read_statistics(source):
    """Read an .npz of statistics -> Statistics; None for any other source. ValueError: the file is
    damaged or a pickle."""
    refuse_pickle(str(source))
    if not str(source).endswith(".npz") or not os.path.isfile(source):
        return None
    try:
        with np.load(source, allow_pickle=False) as archive:
            if not {"mu", "sigma"} <= set(archive.files):
                return None
            known = {f.name for f in fields(Statistics)[1:]}
            found = {k: archive[k] for k in archive.files if k in known}
            mu, sigma = found.pop("mu"), found.pop("sigma")
            found = {k: v.item() for k, v in found.items()}
    except Exception as error:  # of zip, zlib, NumPy
        raise ValueError(f"{source} is not a readable .npz file "
                         f"({checkpoint.guess_file_type(source)})") from error
    if not mu.dtype.kind == sigma.dtype.kind == "f" or sigma.shape != (*mu.shape, *mu.shape):
        raise ValueError(f"{source}: mu {mu.dtype} {mu.shape} and sigma {sigma.dtype} "
                         f"{sigma.shape} are not a mean (D,) and a covariance (D, D)")
    return Statistics(source, mu, sigma, **found)


def network_of(files, dist):
    """The network that files of statistics name. Without images it need not run. ValueError: the
    files name different ones."""
    known = [(f.network, f.sha256) for f in files if f.sha256] or [(None, None)]
    net = FeatureNetwork(None, *known[0], "as in the files")
    check_sets(files, net, dist)
    return net


def check_output(path):
    """ValueError, FileNotFoundError: statistics may not be written to this file."""
    if path.suffix != ".npz":
        raise ValueError(f"{path}: the name of a file of statistics must end with .npz")
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder: {path.resolve().parent}")
    if path.exists() and read_statistics(path) is None:
        raise ValueError(f"{path} exists but does not hold statistics: give another name")


def check_network_flags(config):
    """ValueError, FileNotFoundError: --features or --inception does not fit the score, or both are
    given."""
    for name, path in (("--features", config.features), ("--inception", config.inception)):
        if path and config.metric == "psnr":
            raise ValueError(f"{name} has no effect: psnr compares pixels")
        if path and not path.is_file():
            raise FileNotFoundError(f"{name}: no such file: {path}")
    if config.features and config.inception:
        raise ValueError("--features replaces Inception: do not give --inception as well")


def check_pairs(a, b):
    """ValueError: the images of two sets are not pairs, by number or by name."""
    for s in (a, b):
        if s.names is None:
            raise ValueError(f"{s.source} is a run, whose images have no pairs: give psnr two sets")
    where = f"{a.source} and {b.source}"
    if a.n != b.n:
        raise ValueError(f"{where}: psnr needs pairs, but these are {a.n:,} and {b.n:,} images")
    for one, other in zip(a.names, b.names, strict=False):
        if one != other:
            raise ValueError(f"{where}: {one} and {other} are not a pair. psnr pairs files by "
                             "folder and name")


def on_main(dist, sets, work, *inputs):
    """dist.on_main, but an error message begins with the sources."""
    try:
        return dist.on_main(work, *inputs)
    except ValueError as error:
        raise ValueError(f"{' and '.join(s.source for s in sets)}: {error}") from error


def refuse_pickle(source):
    """ValueError for statistics in a pickle, as SA-DPM (.npy) and EDM2 (.pkl) write them."""
    if not source.endswith((".npy", ".pkl")) or not os.path.isfile(source):
        return
    with open(source, "rb") as file:
        if source.endswith(".npy") and b"'descr': '|O'" not in file.read(128):
            return  # an array of numbers
    content = ("np.load(a, allow_pickle=True).item()" if source.endswith(".npy") else
               "pickle.load(open(a, 'rb'))['fid']")
    program = (f"import pickle, sys, numpy as np; a, b = sys.argv[1:]; s = {content}; "
               "np.savez(b, mu=s['mu'], sigma=s['sigma'])")
    command = shlex.join(["python", "-c", program, source, source[:-4] + ".npz"])
    raise ValueError(f"{source} is a pickle, and a pickle can run code. If you trust it, convert "
                     f"it to an .npz of mu and sigma:  {command}")


# ------------------------------------------------------------------ reports

def warn_statistics(both, few):
    """Warnings about a distance of these Statistics; few: the smallest N without a warning."""
    found = []
    for s in both:
        if s.n is None:
            found.append(f"{s.source} has no record of its image count or network")
        elif s.n < few:
            found.append(f"{s.n:,} images of {s.source}: under {few:,} the value is too high, by "
                         "an amount that depends on N. Compare only with the same N")
        if s.n is not None and s.n <= len(s.mu):
            found.append(f"{s.n:,} images of {s.source} in {len(s.mu)} dimensions: the covariance "
                         "does not have full rank")
    sizes = sorted({s.size for s in both if s.size is not None})
    if len(sizes) > 1:
        found.append(f"the images have different sizes: {' and '.join(map(str, sizes))} pixels")
    return found


def warn_network(net, precisions):
    """Warnings about weights other than Inception's published file, and about precision."""
    found = []
    if net.network == INCEPTION and net.sha256 != inception.SHA256:
        found.append(f"these weights are not the published file ({inception.SHA256[:12]}...): "
                     "compare only with scores by the same weights")
    if any(kind != "fp32" for kind in precisions):
        names = " and ".join(sorted({*precisions} - {"fp32"}))
        found.append(f"features in {names}" + " on one side only" * (len(set(precisions)) > 1)
                     + ": compare only with scores of the same precision")
    return found


def report(name, value, text, net, sets, warnings, **more):
    """A score as a dict. sets: objects with source, n, shape, summary and notes; net: None if the
    score uses no network."""
    net = net or FeatureNetwork(None, None, None, "none")
    sides = [dict(source=str(s.source), n=s.n, shape=s.shape and list(s.shape), what=s.summary)
             for s in sets]
    return dict(metric=name, value=value, text=text, network=net.network, sha256=net.sha256,
                resize=net.resize, sides=sides,
                warnings=warnings + [note for s in sets for note in s.notes], **more)


def print_report(r, as_json=False):
    """Print the score with everything it depends on in one line; then the sides and warnings."""
    if as_json:
        print(json.dumps({k: None if v in (math.inf, -math.inf) else v for k, v in r.items()}))
        return
    counts = " against ".join("?" if s["n"] is None else f"{s['n']:,}" for s in r["sides"])
    shape = next((s["shape"] for s in r["sides"] if s["shape"]), None)
    parts = [f"{r['metric']} {r['text']}", f"{counts} images"]
    parts += [f"{shape[1]}x{shape[2]}, resize: {r['resize']}"] if shape else []
    parts += [f"{r['network']}, SHA-256 {r['sha256'][:12]}"] if r["network"] else []
    print(" | ".join(parts))
    for letter, s in zip("AB", r["sides"], strict=False):
        print(f"  {letter}: {s['source']}: {s['what']}")
    for warning in r["warnings"]:
        print(f"  warning: {warning}")
