r"""Scores of images: FID, Inception Score, PSNR.

    FID    = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)   of Inception's pool3     Heusel et al. 2017
    IS     = exp E_x KL(p(y | x) ‖ p(y))              of Inception's classes   Salimans et al. 2016
    PSNR   = 10 log₁₀(255²/MSE) of each pair of images, in decibels

A score depends on a network, a resizer and a number of images as much as on the images: FID falls
as N grows (the bias is about 1/N), and other weights give other values. So all of them are printed
with it, and there is no fallback: a distance in another network's features is named after its file,
FD(NAME), and never FID.

Not here: precision and recall, KID, CLIP scores; feature networks (support/features.py).

    python metrics.py fid RUN                              # 10,000 new samples, its own data set
    torchrun --nproc_per_node 8 metrics.py fid RUN cifar10 -n 50000
    python metrics.py stats cifar10 cifar10.npz      # once; then: metrics.py fid RUN cifar10.npz
    python -c "import metrics; print(metrics.frechet_distance([0], [[1]], [3], [[4]]))"

N images, D features of each, μ (D,) their mean, Σ (D, D) their covariance (divisor N − 1), pixels
uint8 0..255.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import json
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import data
import sample
import samplers
from support import checkpoint, distributed, features, files, image_files, inception
from support.cli import flag, flag_name, parse_into
from support.programs import run_main

MIN_IMAGES = 10_000  # with fewer a score depends on N more than on the images; default of --num


# ------------------------------------------------------------------ formulas

def frechet_distance(mu1, sigma1, mu2, sigma2) -> float:
    r"""‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of arrays (D,), (D, D); 0 or more.

    With Σ₁ = RᵀR, Σ₁Σ₂ has the eigenvalues of the symmetric R Σ₂ Rᵀ, which stays real and accurate
    at any rank. ValueError: shapes that do not fit, or a matrix that is not a covariance.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(v, np.float64) for v in (mu1, sigma1, mu2, sigma2))
    D = len(mu1)
    if not (mu1.shape == mu2.shape == (D,) and sigma1.shape == sigma2.shape == (D, D)):
        raise ValueError(f"statistics of different sizes: means {mu1.shape} and {mu2.shape}, "
                         f"covariances {sigma1.shape} and {sigma2.shape}")
    if not all(np.isfinite(v).all() for v in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics with values that are not finite")
    roots = []
    for sigma in (sigma1, sigma2):
        w, V = np.linalg.eigh(sigma)
        if w[0] < -1e-3 * w[-1] or abs(sigma - sigma.T).max() > 1e-3 * abs(sigma).max():
            raise ValueError("not a covariance: it is not symmetric with eigenvalues of 0 or more")
        # Rounding turns eigenvalues that are 0 into 1e-16 of the largest, whose root would count.
        w = np.where(w > D * np.finfo(float).eps * w[-1], w, 0)
        roots.append(np.sqrt(w)[:, None] * V.T)
    # tr (Σ₁Σ₂)^½ is the sum of the singular values of R₁R₂ᵀ.
    overlap = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    value = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap
    return max(float(value), 0.0)  # rounding can give −1e-13


def inception_score(logits, splits: int = 10) -> tuple[float, float]:
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


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """uint8 images (N, C, H, W), pair by pair -> (N,) float64 decibels, ∞ for equal ones."""
    mse = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / mse)


# ------------------------------------------------------------------ sets of images

class Generated:
    """Images of a run, made when asked for: image i is sample.py's image i of this seed."""

    names = ()

    def __init__(self, run, config, dist):
        self.seed, self.device = config.seed, dist.device
        self.denoiser, self.arguments = sample.open_run(run, config, dist.device)
        s = self.denoiser.settings
        if s.get("factor"):
            raise ValueError(f"{run} enlarges images: python -m papers.superres enlarge writes its "
                             "results, which psnr and fid take as a folder")
        self.n, self.shape = config.num or MIN_IMAGES, (s["channels"], *[s["image_size"]] * 2)
        self.data, self.notes = s["data"], config.warnings(self.denoiser)
        self.summary = (f"{self.n:,} images by {self.denoiser.folder.name} at step "
                        f"{self.denoiser.step}, {config.weights} weights, seed {config.seed}, "
                        f"{sample.tag(config, self.denoiser.step)}")

    def batch(self, indices):
        """-> uint8 (b, C, H, W): quantized, as files are."""
        return sample.draw(self.denoiser, indices, self.seed, self.device, self.arguments)


class Stored:
    """A folder, zip, array or data set. size None: the images' own; channels None: 3."""

    notes = ()

    def __init__(self, source, size, channels, config, progress):
        self.images = data.load(source, size, channels or 3, skip_bad=config.skip_bad_images,
                                progress=progress)
        endless = len(self.images) >= data.INFINITE
        self.n = (config.num or MIN_IMAGES) if endless else len(self.images)
        self.summary, self.shape = self.images.summary, tuple(self.images[0].shape)
        paths = getattr(self.images, "paths", [])
        base = source if os.path.isdir(source) else ""
        self.names = [Path(os.path.relpath(p, base) if base else p).with_suffix("").as_posix()
                      if p != source else Path(p).stem for p in paths]

    def batch(self, indices):
        """-> uint8 (b, C, H, W)."""
        threads = min(8, os.cpu_count() or 1)  # decoding takes time
        return torch.stack(list(image_files.in_threads(self.images.__getitem__, indices, threads,
                                                       len(indices))))


def find_run(source):
    """The checkpoint that `source` names, or None if it names images. FileNotFoundError: neither
    exists."""
    if source in data.BUILT_IN or ".npz:" in source:
        return None
    if os.path.isfile(source) and not source.endswith(".pt"):
        return None
    if os.path.isdir(source) and not os.path.isfile(os.path.join(source, "checkpoint.pt")):
        return None
    if os.path.exists(source) or (checkpoint.RUNS / source / "checkpoint.pt").is_file():
        return checkpoint.find_checkpoint(source)
    names = sorted(p.parent.name for p in checkpoint.RUNS.glob("*/checkpoint.pt"))
    raise FileNotFoundError(f"{source} is not a file, folder, data set "
                            f"({' '.join(data.BUILT_IN)}) or run; under {checkpoint.RUNS}/ there "
                            f"are: {' '.join(names) or 'none'}")


def open_sides(sources, config, dist):
    """One Generated, Stored or dict of statistics for each source; all images of one shape: the
    run's if there is one, else --image-size and --channels, else the images' own if they agree. A
    distance between images that were resized differently measures the resizers."""
    sides = [features.read_statistics(s) if config.metric == "fid" else None for s in sources]
    runs = [None if side else find_run(s) for s, side in zip(sources, sides, strict=True)]
    config.refuse_unused(any(runs), [s for s, side in zip(sources, sides, strict=True)
                                     if side is None])
    sides = [Generated(run, config, dist) if run else side
             for run, side in zip(runs, sides, strict=True)]
    made = [side.shape for side in sides if isinstance(side, Generated)]
    size, channels = config.image_size, config.channels
    if made:
        for name, own, k in (("image_size", size, 1), ("channels", channels, 0)):
            if own not in (None, made[0][k]):
                raise ValueError(f"{flag_name(name)}: leave it out, the run's images are "
                                 + "x".join(map(str, made[0])))
        channels, size, _ = made[0]
    sides = [Stored(source, size, channels, config, dist.is_main) if side is None else side
             for source, side in zip(sources, sides, strict=True)]
    shapes = {side.shape for side in sides if not isinstance(side, dict)}
    if len(shapes) > 1:
        raise ValueError(f"{' and '.join(sources)}: images of different shapes do not compare ("
                         + " and ".join("x".join(map(str, s)) for s in sorted(shapes))
                         + "): give --image-size, or --channels")
    return sides


def batches(side, config, dist, label):
    """Yield this process's images: (indices, uint8 (b, 3, H, W)); dealt out like cards."""
    mine = list(range(dist.rank, side.n, dist.world_size))
    with tqdm(desc=label, total=len(mine), unit="image", disable=not dist.is_main,
              dynamic_ncols=True) as bar:
        for start in range(0, len(mine), config.batch_size):
            indices = mine[start:start + config.batch_size]
            yield indices, side.batch(indices).to(dist.device).expand(-1, 3, -1, -1)
            bar.update(len(indices))


# ------------------------------------------------------------------ the four programs

def statistics(side, net, config, dist, source):
    """dict(mu, sigma, n, ...) of one side, from its images or as a file gave it."""
    if isinstance(side, dict):
        if str(side.get("sha256", net.sha256)) != net.sha256:
            raise ValueError(f"{source} has statistics of {side.get('network')} (SHA-256 "
                             f"{str(side['sha256'])[:12]}), and this is {net.network} "
                             f"({net.sha256[:12]}): they do not compare")
        return side
    if side.n < 2:
        raise ValueError(f"{source}: a covariance needs at least 2 images, not {side.n}")
    found = None
    for _, images in batches(side, config, dist, source):
        f = net(images)[0]
        found = found or features.FeatureStatistics(f.shape[1])
        found.add(f)
    # A process without images takes part in the sums too, and must know their length.
    width = dist.broadcast(found and len(found.sum))
    mu, sigma = (found or features.FeatureStatistics(width)).result(dist)
    return dict(mu=mu, sigma=sigma, n=side.n, size=side.shape[1], network=net.network,
                sha256=net.sha256, precision=net.precision)


def fid(sources, sides, config, dist):
    """The Fréchet distance of two sides -> a report."""
    if all(isinstance(side, dict) for side in sides):  # no images, so no network
        known = {str(s["sha256"]): str(s.get("network")) for s in sides if "sha256" in s}
        digest, network = next(iter(known.items()), (None, None))
        if len(known) > 1:
            raise ValueError(f"{' and '.join(sources)}: statistics of two networks do not compare")
        net = features.FeatureNetwork(None, network, digest, "as in the files")
    else:
        net = config.open_network(dist)
    both = [statistics(side, net, config, dist, source)
            for side, source in zip(sides, sources, strict=True)]
    try:
        value = dist.on_main(lambda: frechet_distance(*(s[k] for s in both
                                                        for k in ("mu", "sigma"))))
    except ValueError as error:
        raise ValueError(f"{' and '.join(sources)}: {error}") from error
    counts = [int(s["n"]) if "n" in s else None for s in both]
    warnings = warn_network(net, [str(s.get("precision", "fp32")) for s in both])
    D = len(both[0]["mu"])
    for source, n in zip(sources, counts, strict=True):
        if n is None:
            warnings.append(f"{source} has no record of its image count or network")
        elif n < MIN_IMAGES:
            warnings.append(f"{n:,} images of {source}: under {MIN_IMAGES:,} the value is too "
                            "high, by an amount that depends on N: compare only with the same N")
        if n is not None and n <= D:
            warnings.append(f"{n:,} images of {source} in {D} dimensions: the covariance does not "
                            "have full rank")
    sizes = sorted({int(s["size"]) for s in both if "size" in s})
    if len(sizes) > 1:
        warnings.append(f"images of {' and '.join(map(str, sizes))} pixels are compared")
    name = {features.INCEPTION: "FID", None: "FD"}.get(net.network, f"FD({net.network})")
    return report(name, value, f"{value:.4f}", net, sources, sides, counts, warnings)


def score(sources, sides, config, dist):
    """The Inception Score of one side -> a report."""
    side, net = sides[0], config.open_network(dist)
    mine = [(indices, net(images)[1].cpu())
            for indices, images in batches(side, config, dist, sources[0])]
    parts, value = dist.gather(mine), None

    def calculate():  # back into the order of the images: the split must not depend on processes
        order = [i for part in parts for indices, _ in part for i in indices]
        logits = torch.cat([rows for part in parts for _, rows in part])
        return inception_score(logits[torch.tensor(order).argsort()])
    try:
        value = dist.on_main(calculate)
    except ValueError as error:
        raise ValueError(f"{sources[0]}: {error}") from error
    warnings = warn_network(net, [net.precision])
    if side.n < MIN_IMAGES:
        warnings.append(f"{side.n:,} images: under {MIN_IMAGES:,} the value is too low")
    name = "IS" if net.is_inception else f"IS({net.network})"
    return report(name, value[0], "{:.4f} ± {:.4f}".format(*value), net, sources, sides, [side.n],
                  warnings, std=value[1])


def compare_pairs(sources, sides, config, dist):
    """The mean PSNR of pairs -> a report."""
    a, b = sides
    for source, side in zip(sources, sides, strict=True):
        if isinstance(side, Generated):
            raise ValueError(f"{source} is a run, whose images have no partners: psnr compares two "
                             "sets")
    if a.n != b.n:
        raise ValueError(f"{' and '.join(sources)}: psnr compares pairs, and there are {a.n:,} "
                         f"images and {b.n:,}")
    for one, two in zip(a.names, b.names, strict=False):
        if one != two:
            raise ValueError(f"{sources[0]} and {sources[1]}: {one} and {two} are not a pair. psnr "
                             "pairs files by folder and name")
    total, equal = 0.0, 0
    for indices, images in batches(a, config, dist, "psnr"):
        decibels = psnr(images[:, :a.shape[0]].cpu(), b.batch(indices))  # gray as gray
        total, equal = total + decibels.sum().item(), equal + int(decibels.isinf().sum())
    total, equal = dist.all_reduce(torch.tensor([total, equal], dtype=torch.float64)).tolist()
    warnings = [f"{int(equal):,} pairs are equal: infinitely many decibels"] * (equal > 0)
    net = features.FeatureNetwork(None, None, None, "none")
    return report("PSNR", total / a.n, f"{total / a.n:.4f} dB", net, sources, sides, [a.n, b.n],
                  warnings)


def save_statistics(sources, sides, config, dist):
    """stats A OUT.npz: μ and Σ in pytorch-fid's form, and where they come from -> a report."""
    net = config.open_network(dist)
    found = statistics(sides[0], net, config, dist, sources[0])
    dist.on_main(lambda: files.save_npz(config.out, **found))
    return report("statistics", None, f"in {config.out.resolve()}", net, sources, sides,
                  [found["n"]], [])


def warn_network(net, precisions):
    """Warnings about other weights than Inception's published file, and about bf16."""
    found = []
    if net.is_inception and net.sha256 != inception.SHA256:
        found.append(f"these weights are not the published file ({inception.SHA256[:12]}...): "
                     "compare only with scores by the same ones")
    if any(kind != "fp32" for kind in precisions):
        found.append("features in bf16" + " on one side only" * (len(set(precisions)) > 1)
                     + ": compare only with scores of the same precision")
    return found


def report(name, value, text, net, sources, sides, counts, warnings, **more):
    """One dict, for --json and for print_report."""
    rows = [dict(source=str(source), n=n, shape=None if isinstance(side, dict) else
                 list(side.shape), what="statistics from a file" if isinstance(side, dict) else
                 side.summary) for source, side, n in zip(sources, sides, counts, strict=True)]
    notes = [note for side in sides if not isinstance(side, dict) for note in side.notes]
    return dict(metric=name, value=value, text=text, network=net.network, sha256=net.sha256,
                resize=net.resize, sides=rows, warnings=warnings + notes, **more)


def print_report(r):
    """The score with everything it depends on in one line; then the sides, and warnings."""
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


@dataclass
class MetricsConfig(samplers.SamplerConfig):
    metric: str = flag("", "what to calculate", choices=("fid", "is", "psnr", "stats"),
                       positional="METRIC", group="what")
    images: tuple[str, ...] = flag((), "what to score (fid: a run alone is compared with its own "
                                   "data set; stats: and the .npz to write)", positional="A [B]",
                                   nargs="+")
    inception: Path | None = flag(None, f"file of Inception's weights, {inception.NAME}",
                                  shown="from the cache folder, else downloaded, 96 MB",
                                  group="features")
    features: Path | None = flag(None, "another network instead of Inception; such a file can run "
                                 "programs: give only one that you trust")
    num: int | None = flag(None, "images of a run or of shapes; a set on disk is used whole",
                           short="-n", shown=f"{MIN_IMAGES}", group="images")
    image_size: int | None = flag(None, "resize and crop sets to this side",
                                  shown="the run's, else their own")
    channels: int | None = flag(None, "1: sets turned gray", choices=(1, 3), shown="the run's, "
                                "else 3")
    skip_bad_images: bool = flag(False, "continue without files that cannot be read")
    batch_size: int = flag(64, "images at a time, per process")
    seed: int = flag(0, "of a run's images; image i is a function of (seed, i)")
    json: bool = flag(False, "print one JSON object instead")

    prog: ClassVar[str] = "metrics.py"
    usage: ClassVar[str] = "python metrics.py {fid,is,psnr,stats} A [B] [flags]"
    description: ClassVar[str] = """\
Score images. A and B are each a folder, zip or array of images, a data set (shapes, cifar10),
an .npz of statistics (mu, sigma; fid only), or a run, which is sampled on the fly."""
    examples: ClassVar[str] = """\
  python metrics.py fid shapes-tiny-sa2
      the FID of 10,000 samples of a run from the data set it was trained on
  torchrun --nproc_per_node 8 metrics.py fid my-run cifar10 -n 50000 --sampler ddpm --nfe 1000
      as papers do it: 50,000 samples against the training set
  python metrics.py stats cifar10 cifar10.npz && python metrics.py fid samples/ cifar10.npz
      statistics of a set once, used many times (in pytorch-fid's form)
  python metrics.py is samples/
  python metrics.py psnr enlarged/ originals/
      pairs of images, matched by folder and file name
  python metrics.py fid my-run --features classifier.pt2
      a distance in the features of your own network: float32 (N, 3, H, W) in [-1, 1] ->
      (N, D), saved by torch.export.save; never called FID. `is` takes the D numbers as logits"""

    def check(self):
        super().check()
        sample.check_images(self)
        wanted, words = {"fid": ((1, 2), "A or A B"), "is": ((1,), "A alone"),
                         "psnr": ((2,), "A B"), "stats": ((2,), "A OUT.npz")}[self.metric]
        if len(self.images) not in wanted:
            raise ValueError(f"{self.metric} takes {words}, not {len(self.images)} names: "
                             + " ".join(self.images))
        for name in ("features", "inception"):
            if self.metric == "psnr" and getattr(self, name):
                raise ValueError(f"--{name} has no effect: psnr compares pixels")
            if (path := getattr(self, name)) and not path.is_file():
                raise FileNotFoundError(f"--{name}: no such file: {path}")
        if self.features and self.inception:
            raise ValueError("--features replaces Inception: give it or --inception, not both")
        self.sources, self.out = list(self.images), None
        if self.metric == "stats":
            self.out = Path(self.sources.pop())
            if self.out.suffix != ".npz":
                raise ValueError(f"{self.out}: statistics go to a file named .npz")
            if not self.out.resolve().parent.is_dir():
                raise FileNotFoundError(f"{self.out}: no such folder: {self.out.resolve().parent}")
            if self.out.exists() and features.read_statistics(self.out) is None:
                raise ValueError(f"{self.out} exists and holds no statistics: give another name")

    def refuse_unused(self, sampled, stored):
        """ValueError for sampling flags if nothing is sampled, and flags of sets without a set."""
        names = {f.name for f in fields(samplers.SamplerConfig)} | {"seed"}
        if stored and self.metric != "psnr" and not self.features:  # Inception is a network, too
            names -= {"precision", "compile", "deterministic"}
        if not sampled and (unused := sorted(names & self.given)):
            raise ValueError(f"{flag_name(unused[0])} is for sampling a run, and there is none")
        if self.skip_bad_images and all(source in data.BUILT_IN for source in stored):
            raise ValueError("--skip-bad-images is for folders and zips of images: there is none")
        if self.num and not sampled and "shapes" not in stored:
            raise ValueError("--num is for a run or for shapes: sets on disk are used whole")

    def open_network(self, dist):
        return features.open_network(self.features, self.inception, dist, self.precision,
                                     self.compile)


def own_data(source):
    """The data set that the run `source` was trained on. ValueError: it is not a run."""
    path = find_run(source)
    if path is None:
        raise ValueError(f"{source} is not a run: name the images to compare it with")
    return data.require_local(checkpoint.load_checkpoint(path)["settings"]["data"], source)


def main(argv=None):
    config = parse_into(MetricsConfig, argv)
    # tf32=False: rounding to 10 bits moves FID by hundredths
    with distributed.init(tf32=False, deterministic=config.deterministic) as dist:
        if config.metric == "fid" and len(config.sources) == 1:
            config.sources.append(dist.on_main(own_data, config.sources[0]))
        sides = dist.main_first(lambda: open_sides(config.sources, config, dist))
        work = dict(fid=fid, psnr=compare_pairs, stats=save_statistics) | {"is": score}
        result = work[config.metric](config.sources, sides, config, dist)
        if dist.is_main and config.json:
            print(json.dumps({k: None if v in (math.inf, -math.inf) else v
                              for k, v in result.items()}))
        elif dist.is_main:
            print_report(result)


if __name__ == "__main__":
    run_main(main)
