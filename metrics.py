r"""Scores of images: FID, Inception Score, PSNR.

    FID    = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)   of Inception's pool3     Heusel et al. 2017
    IS     = exp E_x KL(p(y | x) ‖ p(y))              of Inception's classes   Salimans et al. 2016
    PSNR   = 10 log₁₀(255²/MSE) of each pair of images, in decibels

A score belongs to a network, a resizer and a number of images as much as to the images: FID falls
as N grows (the bias is about 1/N), and other weights give other values. So all of them are printed
with it, and there is no fallback: a distance in another network's features carries that file's
name.

What this file does not do: precision and recall, KID, CLIP scores; or choose the best of several
runs, as many published tables do.

    python metrics.py fid RUN                              # 10,000 new samples, its own data set
    python metrics.py fid samples/ cifar10 --json
    torchrun --nproc_per_node 8 metrics.py fid RUN cifar10 -n 50000
    python metrics.py stats cifar10 cifar10.npz      # once; then: metrics.py fid RUN cifar10.npz
    python -c "import metrics; print(metrics.frechet_distance([0], [[1]], [3], [[4]]))"

N images, D features of each, μ (D,) their mean, Σ (D, D) their covariance (divisor N − 1), pixels
uint8 0..255.
"""

import runtime  # isort: skip  (before torch: it sets OpenMP's spinning)

import argparse
import hashlib
import json
import logging
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from scipy.linalg.lapack import dpotrf, dpstrf, dsygst
from torch.export.passes import move_to_device_pass
from tqdm import tqdm

import data
import files
import inception
import samplers
import sampling
from sources import (Generated, Reconstructed, find_autoencoder, open_all, own_data,
                     read_statistics)

FEW = 10_000  # below so many images a score says more about N than about the images
INCEPTION = "Inception 2015-12-05"


# ------------------------------------------------------------------ formulas

def inception_outputs(net, images):
    """uint8 images (N, 3, H, W) -> (pool3 (N, 2048), logits without bias (N, 1008))."""
    return net(images)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    r"""‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½), from NumPy arrays (D,), (D, D) -> float, 0 or more.
    ValueError: shapes that do not fit, or a matrix that is no covariance.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(v, np.float64) for v in (mu1, sigma1, mu2, sigma2))
    if not mu1.shape == mu2.shape == sigma1.shape[:1] == sigma2.shape[:1]:
        raise ValueError(f"statistics of different sizes: means {mu1.shape} and {mu2.shape}, "
                         f"covariances {sigma1.shape} and {sigma2.shape}")
    R1, R2 = root(sigma1), root(sigma2)
    if len(R1) == len(R2) == len(mu1) > 256 and not np.tril(R1, -1).any():  # it saves seconds
        # Full rank: LᵀΣ₂L, with Σ₁ = LLᵀ, has the eigenvalues of Σ₁Σ₂; LAPACK's symmetric path to
        # them is the shortest. Rounding, 1e-16 of the largest, must not show under the root.
        values = np.linalg.eigvalsh(dsygst(sigma2.T, R1.T, itype=2, lower=1)[0])
        if values[0] > 1e-14 * values[-1]:
            return combined(mu1, np.trace(sigma1), mu2, np.trace(sigma2), np.sqrt(values).sum())
    return distance_of_roots(mu1, R1, mu2, R2)


def distance_of_roots(mu1, R1, mu2, R2):
    r"""The same from R (r, D), Σ = RᵀR: a Cholesky factor, or r centred feature vectors/√(n − 1).

    The eigenvalues of Σ₁Σ₂ are the squared singular values of R₁R₂ᵀ, so tr (Σ₁Σ₂)^½ is the sum of
    those. That stays real and accurate for covariances without full rank (N <= D), where a matrix
    square root of the non-symmetric Σ₁Σ₂ becomes complex or infinite, and is r₁ x r₂ small.
    """
    if not (np.isfinite(R1).all() and np.isfinite(R2).all()):
        raise ValueError("features with values that are not finite")
    overlap = np.linalg.svd(R1 @ R2.T, compute_uv=False).sum()
    return combined(mu1, (R1**2).sum(), mu2, (R2**2).sum(), overlap)


def combined(mu1, trace1, mu2, trace2, overlap):
    """The distance from its parts: overlap = tr (Σ₁Σ₂)^½."""
    if not (np.isfinite(mu1).all() and np.isfinite(mu2).all()):
        raise ValueError("a mean with values that are not finite")
    value = ((mu1 - mu2) ** 2).sum() + trace1 + trace2 - 2 * overlap
    return max(float(value), 0.0)  # rounding can give −1e-13


def root(sigma):
    """R (rank, D) with Σ = RᵀR, by Cholesky; with pivots where the rank is not full."""
    if sigma.ndim != 2 or sigma.shape[0] != sigma.shape[1] or not np.isfinite(sigma).all():
        raise ValueError(f"no covariance: an array {sigma.shape} with values that are not finite, "
                         "or not square")
    top = max(abs(sigma).max(), 1e-300)
    wrong = abs(sigma - sigma.T).max() > 1e-3 * top
    R, failed = dpotrf(sigma.T, lower=1, clean=1)  # .T: LAPACK counts columns first
    R = R.T
    if failed or R.diagonal().min() ** 2 <= 1e-10 * top:
        # What rounding left of zero eigenvalues would count with its square root: 1e-16 as 1e-8.
        nothing = len(sigma) * np.finfo(float).eps * top
        factor, order, rank, _ = dpstrf(sigma.T, tol=nothing, lower=1)
        R = np.empty((rank, len(sigma)))
        R[:, order - 1] = np.tril(factor[:, :rank]).T
        wrong = wrong or abs((sigma + sigma.T) / 2 - R.T @ R).max() > 5e-4 * top
    if wrong:
        raise ValueError("no covariance: it is not symmetric with eigenvalues of 0 or more")
    return R


def inception_score(logits, splits=10):
    """logits (N, classes) without bias -> (mean, std) over `splits` parts, shuffled with a fixed
    seed: files often lie sorted by class. ValueError: N < splits, or values that are not finite."""
    n = len(logits)
    if n < splits:
        raise ValueError(f"the Inception Score needs at least one image in each of its {splits} "
                         f"parts, and there are {n}")
    if not torch.isfinite(torch.as_tensor(logits)).all():
        raise ValueError("logits that are not finite have no Inception Score")
    order = np.random.RandomState(2020).permutation(n)
    log_p = torch.log_softmax(torch.as_tensor(logits, dtype=torch.float64)[order], 1)
    scores = []
    for i in range(splits):
        part = log_p[i * n // splits:(i + 1) * n // splits]
        marginal = part.logsumexp(0) - math.log(len(part))  # log p(y)
        divergence = (part.exp() * (part - marginal)).sum(1)  # KL(p(y | x) ‖ p(y)), Salimans 2016
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def psnr(a, b):
    """uint8 images (N, C, H, W), pair by pair -> (N,) float64 decibels, ∞ for equal ones."""
    mse = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / mse)


class Moments:
    """n, Σ f and Σ f fᵀ of feature vectors, in float64: sums do not care for batches or order.

    few: no more vectors than features will come. Then they are kept, too: they are a root of the
    covariance, and the fewer they are the sooner the distance is there (500: in 0.1 s)."""

    def __init__(self, features, few=False):
        self.n, self.sum = 0, torch.zeros(features, dtype=torch.float64)
        self.outer = torch.zeros(features, features, dtype=torch.float64)
        self.rows = [self.sum[None, :][:0]] if few else None

    def add(self, f):
        """f (b, D), of any dtype and device."""
        f = f.double().cpu()
        self.n += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f
        if self.rows is not None:
            self.rows.append(f)

    def result(self, process):
        """(μ, Σ) over all processes, NumPy float64."""
        n = process.sum(self.n)[0]
        total, outer = process.total(self.sum), process.total(self.outer)
        if n < 2:
            raise ValueError("a covariance takes at least 2 images")
        mean = total / n
        sigma = (outer - n * mean.outer(mean)) / (n - 1)
        # Of a feature that never changes, rounding leaves a "variance" of either sign. float32
        # features are not known to better than 1e-7 of their size.
        still = sigma.diagonal() <= 1e-12 * mean**2
        sigma[still] = sigma[:, still] = 0
        return mean.numpy(), sigma.numpy()

    def root(self, process):
        """R (n, D), NumPy, with Σ = RᵀR, on rank 0; None elsewhere, and where n is not small."""
        parts = process.gather(torch.cat(self.rows)) if self.rows is not None else None
        if parts is None:
            return None
        rows = torch.cat(parts)
        return ((rows - rows.mean(0)) / math.sqrt(len(rows) - 1)).numpy()


# ------------------------------------------------------------------ feature networks

def open_features(args, process):
    """-> (net, about): net(uint8 (N, 3, H, W)) -> (features (N, D), logits or None); about: name,
    sha256 and resize, to be printed."""
    if args.features is None:
        net, digest = process.first_then_all(
            lambda: inception.load(args.inception, process.device))
        net = runtime.for_inference(net.fold(), process.device, args.precision, args.compile)
        return net, dict(name="FID", network=INCEPTION, sha256=digest, precision=args.precision,
                         resize="bilinear to 299x299 without antialiasing")
    digest = process.first_does(lambda: hashlib.sha256(args.features.read_bytes()).hexdigest())
    net = process.first_then_all(lambda: open_exported(args.features, process.device))

    def call(images):
        out = net(data.to_float(images))
        if not isinstance(out, torch.Tensor) or out.dim() < 2 or len(out) != len(images):
            what = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(f"{args.features} must give one tensor (N, features) for N images; "
                             f"for {len(images)} it gave {what}")
        return out.flatten(1), out.flatten(1)  # of a file for the Inception Score: its logits

    kind = "IS" if args.metric == "is" else "FD"
    name = args.features.name
    return call, dict(name=f"{kind}({name})", network=name, sha256=digest, resize="none",
                      precision="fp32")


def open_exported(path, device):
    """A network saved by torch.export.save or torch.jit.save, as a function of float32 images
    (N, 3, H, W) in [-1, 1]."""
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # it warns by a traceback
    what = "it is cut short, a zip of something else, or of another version of PyTorch"
    try:
        if not zipfile.is_zipfile(path):
            what = files.what_is(path)
        with zipfile.ZipFile(path) as archive:
            script = any("/code/" in name for name in archive.namelist())
        if script:
            net = torch.jit.load(path, map_location=device).eval()
        else:
            program = torch.export.load(path)
            if device.type != "cpu":
                program = move_to_device_pass(program, str(device))
            net = program.module()
    except Exception as error:  # each format has its own family of errors
        if isinstance(error, OSError):
            raise
        raise ValueError(f"{path} is no network saved by torch.export.save or torch.jit.save: "
                         f"{what}") from error

    def call(images):
        try:
            with torch.no_grad():
                return net(images)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError, torch.jit.Error) as error:
            lines = str(error).strip().split("\n")
            why = lines[-1 if script else 0]  # TorchScript begins with a traceback of its own
            if why.startswith("Guard failed"):
                why += " (exported without a dynamic batch axis?)"
            raise ValueError(f"{path} does not take a batch of shape {tuple(images.shape)}: "
                             f"{why}") from error
    return call


# ------------------------------------------------------------------ what the program can do

def batches(side, args, process, name):
    """This process's images, (indices, uint8 (b, 3, H, W)); they are dealt out like cards."""
    mine = list(range(process.rank, side.n, process.world))
    bar = tqdm(desc=name, total=len(mine), unit="image", disable=not process.first,
               dynamic_ncols=True)
    for start in range(0, len(mine), args.batch_size):
        indices = mine[start:start + args.batch_size]
        images = side.batch(indices).to(process.device)
        yield indices, images.expand(-1, 3, -1, -1)  # gray is shown to the network as gray RGB
        bar.update(len(indices))
    bar.close()


def statistics(side, net, about, args, process, name):
    """dict(mu, sigma, n, ...) of one side, from its images or as a file gave it."""
    if isinstance(side, dict):
        theirs = str(side.get("sha256", about["sha256"]))
        if theirs != str(about["sha256"]):
            raise ValueError(f"{name} has statistics of {side.get('network')} (SHA-256 "
                             f"{theirs[:12]}), and this is {about['network']} "
                             f"({about['sha256'][:12]}): they do not compare")
        return side
    if side.n < 2:
        raise ValueError(f"{name}: a covariance takes at least 2 images, not {side.n}")
    moments = None
    for _, images in batches(side, args, process, name):
        features = net(images)[0]
        moments = moments or Moments(features.shape[1], side.n <= features.shape[1])
        moments.add(features)
    # A process without an image takes part in the sums all the same, and must know their length.
    width = process.share(moments and len(moments.sum))
    moments = moments or Moments(width, side.n <= width)
    mu, sigma = moments.result(process)
    return dict(mu=mu, sigma=sigma, root=moments.root(process), n=side.n, size=side.shape[1],
                network=about["network"], sha256=about["sha256"], precision=about["precision"])


def distance(one, other):
    """The Fréchet distance of two dicts of statistics; by their roots where images were few."""
    if one.get("root") is None and other.get("root") is None:
        return frechet_distance(one["mu"], one["sigma"], other["mu"], other["sigma"])
    if one["mu"].shape != other["mu"].shape:
        raise ValueError(f"statistics of different sizes: means {one['mu'].shape} and "
                         f"{other['mu'].shape}")
    roots = [root(s["sigma"]) if s.get("root") is None else s["root"] for s in (one, other)]
    return distance_of_roots(one["mu"], roots[0], other["mu"], roots[1])


def fid(sources, sides, args, process):
    """The Fréchet distance of two sides -> what is to be reported."""
    if all(isinstance(side, dict) for side in sides):  # no image to be looked at, or by what
        said = {str(s["sha256"]): str(s.get("network")) for s in sides if "sha256" in s}
        digest, network = next(iter(said.items()), (None, None))
        name = {INCEPTION: "FID", None: "FD"}.get(network, f"FD({network})")
        net, about = None, dict(name=name, network=network, sha256=digest, resize="as in the files")
    else:
        net, about = open_features(args, process)
    both = [statistics(side, net, about, args, process, name)
            for side, name in zip(sides, sources, strict=True)]
    try:
        value = process.first_does(distance, *both)
    except ValueError as error:
        raise ValueError(f"{' and '.join(map(str, sources))}: {error}") from error
    features = len(both[0]["mu"])
    counts = [int(s["n"]) if "n" in s else None for s in both]
    warnings = other_weights(about) + rounded([s.get("precision", "fp32") for s in both])
    for source, n in zip(sources, counts, strict=True):
        if n is None:
            warnings.append(f"{source} does not say of how many images it is, nor by which network")
        elif n < FEW:
            warnings.append(f"{n:,} images of {source}: under {FEW:,} the value is too high, by an "
                            "amount that depends on N: compare only with the same N")
        if n is not None and n <= features:
            warnings.append(f"{n:,} images of {source} in {features} dimensions: the covariance "
                            "has no full rank")
    sizes = {int(s["size"]) for s in both if "size" in s}
    if len(sizes) > 1:
        warnings.append(f"images of {' and '.join(map(str, sorted(sizes)))} pixels are compared")
    return report(about, value, f"{value:.4f}", sources, sides, counts, warnings)


def score(sources, sides, args, process):
    """The Inception Score of one side -> what is to be reported."""
    if sides[0].n < 10:
        raise ValueError(f"{sources[0]}: the Inception Score takes at least 10 images, not "
                         f"{sides[0].n}")
    net, about = open_features(args, process)
    mine = [(indices, net(images)[1].cpu())
            for indices, images in batches(sides[0], args, process, sources[0])]
    parts = process.gather(mine)
    value = None
    if process.first:  # back into the order of the images: the split must not depend on processes
        order = [i for part in parts for indices, _ in part for i in indices]
        logits = torch.cat([rows for part in parts for _, rows in part])
        try:
            value = inception_score(logits[torch.tensor(order).argsort()])
        except ValueError as error:
            raise ValueError(f"{sources[0]}: {error}") from error
    mean, std = process.share(value)
    warnings = other_weights(about) + rounded([about["precision"]])
    if sides[0].n < FEW:
        warnings.append(f"{sides[0].n:,} images: under {FEW:,} the value is too low")
    about = about if args.features else {**about, "name": "IS"}
    return report(about, mean, f"{mean:.4f} ± {std:.4f}", sources, sides,
                  [sides[0].n], warnings, std=std)


def compare(sources, sides, args, process):
    """The mean PSNR of pairs -> what is to be reported."""
    a, b = sides
    for source, side in zip(sources, sides, strict=True):
        if isinstance(side, Generated):
            raise ValueError(f"{source} is a run, whose images have no partners: psnr compares two "
                             "sets")
    if a.n != b.n:
        raise ValueError(f"{sources[0]} and {sources[1]}: psnr compares pairs, and there are "
                         f"{a.n:,} images and {b.n:,}")
    for i, (one, two) in enumerate(zip(a.names, b.names, strict=False)):
        if one != two:
            raise ValueError(f"{a.paths[i]} and {b.paths[i]} are no pair: psnr pairs files by "
                             "folder and name")
    total = equal = 0.0
    for indices, images in batches(a, args, process, "psnr"):
        images = images[:, :a.shape[0]].cpu()  # gray as gray, which has the same mean square
        decibels = psnr(images, b.batch(indices))
        total, equal = total + decibels.sum().item(), equal + decibels.isinf().sum().item()
    total, equal = process.sum(total, equal)
    mean = total / a.n
    warnings = [f"{int(equal):,} pairs are equal, which is infinitely many decibels"] * (equal > 0)
    about = dict(name="PSNR", network=None, sha256=None, resize="none")
    return report(about, mean, f"{mean:.4f} dB", sources, sides, [a.n, b.n], warnings)


def other_weights(about):
    """A warning, as a list, if these are Inception's with another file's hash."""
    if about["network"] != INCEPTION or about["sha256"] == inception.SHA256:
        return []
    return [f"these weights are not the published file ({inception.SHA256[:12]}...): compare "
            "only with scores by the same ones"]


def rounded(kinds):
    """A warning, as a list, if features were computed in bf16."""
    if all(str(kind) == "fp32" for kind in kinds):
        return []
    return ["features in bf16" + " on one side alone" * (len(set(map(str, kinds))) > 1)
            + ": compare only with scores of the same precision (README: how far apart they are)"]


def report(about, value, text, sources, sides, counts, warnings, **more):
    """One dict, for --json and for print_report. value None: text says it all."""
    described = []
    warnings = warnings + [note for side in sides for note in getattr(side, "notes", [])]
    for source, side, n in zip(sources, sides, counts, strict=True):
        stored = isinstance(side, dict)
        described.append(dict(source=str(source), n=n, shape=None if stored else list(side.shape),
                              what="statistics from a file" if stored else side.summary))
    return dict(metric=about["name"], value=value, text=text, network=about["network"],
                sha256=about["sha256"], resize=about["resize"], sides=described,
                warnings=warnings, **more)


def print_report(r):
    """The score with all that it belongs to on one line; then what the sides are, and warnings."""
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


def save_statistics(sources, sides, args, process):
    """stats A OUT.npz: μ and Σ in pytorch-fid's form, and what they are of."""
    if args.out.exists() and (args.out.suffix != ".npz" or read_statistics(args.out) is None):
        raise ValueError(f"{args.out} exists and holds no statistics: give another name")
    if args.out.suffix != ".npz":
        raise ValueError(f"{args.out}: statistics go to a file named .npz")
    if not args.out.resolve().parent.is_dir():
        raise FileNotFoundError(f"{args.out}: no such folder: {args.out.resolve().parent}")
    net, about = open_features(args, process)
    found = statistics(sides[0], net, about, args, process, sources[0])

    def save():
        with files.atomic_write(args.out) as temporary, open(temporary, "wb") as f:
            np.savez(f, **{k: v for k, v in found.items() if k != "root"})

    process.first_does(save)
    return report({**about, "name": "statistics"}, None, f"in {args.out.resolve()}", sources, sides,
                  [found["n"]], [])


def parse(argv=None):
    """The command line; ValueError for what does not go together."""
    parser = argparse.ArgumentParser(
        prog="metrics.py", usage="python metrics.py {fid,is,psnr,stats} A [B] [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Score images. A and B are each a folder, zip or array of images, a data set "
                    "(shapes, cifar10),\nan .npz of statistics (mu, sigma; fid only), or a run, "
                    "which is sampled on the fly.",
        epilog="""examples
  python metrics.py fid shapes-tiny-sa2
      the FID of 10,000 samples of a run from the data set it was trained on
  torchrun --nproc_per_node 8 metrics.py fid my-run cifar10 -n 50000 --sampler ddpm --nfe 1000
      as papers do it: 50,000 samples against the training set
  python metrics.py stats cifar10 cifar10.npz && python metrics.py fid samples/ cifar10.npz
      statistics of a set once, used many times (in pytorch-fid's form)
  python metrics.py is samples/
  python metrics.py psnr enlarged/ originals/
      pairs of images, matched by folder and file name
  python metrics.py psnr fashion-autoencoder test-images/ --image-size 32 --channels 1
      images that an autoencoder has not seen, against what it makes of them
  python metrics.py fid my-run --features classifier.pt2
      a distance in the features of your own network: float32 (N, 3, H, W) in [-1, 1] ->
      (N, D), saved by torch.export.save or torch.jit.save; never called FID. `is` takes the D
      numbers as logits of classes""")
    parser.add_argument("metric", choices=("fid", "is", "psnr", "stats"))
    parser.add_argument("images", nargs="+", metavar="A [B]",
                        help="what to score (fid: a run alone is compared with its own data set; "
                        "stats: the .npz to write)")
    add = parser.add_argument_group("features").add_argument
    add("--inception", type=Path, metavar="PATH", help=f"file of Inception's weights, "
        f"{inception.NAME} (default: from the cache folder, else downloaded, 96 MB)")
    add("--features", type=Path, metavar="FILE", help="another network instead of Inception; such "
        "a file can run programs: give only one you trust")
    add = parser.add_argument_group("images").add_argument
    # -n too, since torchrun takes --num for the beginning of its own --numa-binding
    add("-n", "--num", type=int, help="images of a run or of shapes (default: 10000); a set on "
        "disk is always used whole")
    add("--image-size", type=int, help="resize and crop sets to this side (default: the run's, "
        "else their own)")
    add("--channels", type=int, choices=(1, 3), help="1: sets turned gray (default: the run's, "
        "else 3)")
    add("--skip-bad-images", action="store_true", help="go on without files that cannot be read")
    add("--batch-size", type=int, default=64, help="images at a time, per process (default: 64)")
    sampling.add_flags(parser.add_argument_group("sampling, for a run"))
    parser.add_argument("--seed", type=int, default=0, help="image i of a run is a function "
                        "of (seed, i): seeds share no image (default: 0)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    args = parser.parse_intermixed_args(argv)  # flags between A and B too
    sampling.check_flags(args)
    wanted, words = {"fid": ((1, 2), "A or A B"), "is": ((1,), "A alone"), "psnr": ((2,), "A B"),
                     "stats": ((2,), "A OUT.npz")}[args.metric]
    if len(args.images) not in wanted:
        raise ValueError(f"{args.metric} takes {words}, not {len(args.images)} names: "
                         + " ".join(args.images))
    for flag in ("features", "inception"):
        if args.metric == "psnr" and getattr(args, flag):
            raise ValueError(f"--{flag} has no use: psnr compares pixels")
    if args.features and args.inception:
        raise ValueError("--features replaces Inception: give it or --inception, not both")
    for flag in ("features", "inception"):
        if (path := getattr(args, flag)) and not path.is_file():
            raise FileNotFoundError(f"--{flag}: no such file: {path}")
    args.out = Path(args.images.pop()) if args.metric == "stats" else None
    sampling.check_counts(args, num=1, batch_size=1, image_size=1)
    samplers.check_seed(args.seed, args.num)
    if args.image_size and args.image_size > data.LARGEST_SIDE:
        raise ValueError(f"--image-size must be at most {data.LARGEST_SIDE}, not {args.image_size}")
    return args


def open_sides(names, args, process):
    """What is to be measured; for psnr, an autoencoder run is its reconstructions of the other."""
    code = find_autoencoder(names[0]) if args.metric == "psnr" else None
    if code is None:
        return open_all(names, args, process, may_be_statistics=args.metric == "fid")
    weights, args.weights = args.weights, "ema"  # a flag about sampling, which here has a use
    images = open_all(names[1:], args, process)[0]
    args.weights = weights
    return [Reconstructed(code, images, args, process.device), images]


def main(argv=None):
    args = parse(argv)
    # tf32=False: rounding to 10 bits moves FID by hundredths
    with runtime.setup(tf32=False, deterministic=args.deterministic) as process:
        runtime.keep_memory()
        names = list(args.images)
        if args.metric == "fid" and len(names) == 1:
            names.append(process.first_does(own_data, names[0]))
        sides = process.first_then_all(lambda: open_sides(names, args, process))
        what = {"fid": fid, "is": score, "psnr": compare, "stats": save_statistics}[args.metric]
        result = what(names, sides, args, process)
        if process.first and args.json:
            print(json.dumps({k: None if v in (math.inf, -math.inf) else v
                              for k, v in result.items()}))
        elif process.first:
            print_report(result)


if __name__ == "__main__":
    runtime.run_program(main)
