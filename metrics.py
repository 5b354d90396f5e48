r"""Scores of images: FID, Inception Score, PSNR.

    FID    = ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½)   of Inception's pool3     Heusel et al. 2017
    IS     = exp E_x KL(p(y | x) ‖ p(y))              of Inception's classes   Salimans et al. 2016
    PSNR   = 10 log₁₀(255²/MSE) of each pair of images, in decibels

A score depends on the network, the resizer and the number of images as much as on the images: FID
falls as N grows (its bias falls like 1/N), and other weights give other values. So all three are
printed with the score. Only the published Inception network gives an "FID"; with another network
the distance is named FD(NAME), after its file.

Not here: KID, CLIP scores, precision and recall; feature networks (support/features.py).

    python metrics.py fid RUN                           # 10,000 new samples against its data set
    torchrun --nproc_per_node 8 metrics.py fid RUN cifar10 -n 50000
    python metrics.py stats cifar10 cifar10.npz      # once; then: metrics.py fid RUN cifar10.npz
    python -c "import metrics; print(metrics.frechet_distance([0], [[1]], [3], [[4]]))"

N images, D features of each, μ (D,) their mean, Σ (D, D) their covariance (divisor N − 1), pixels
uint8 0..255.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

import data
import sample
import samplers
from support import checkpoint, distributed, features, files, image_files, image_folder, inception
from support.cli import flag, flag_name, parse_into
from support.programs import run_main

MIN_IMAGES = 10_000  # with fewer, a score depends more on N than on the images; default of --num


# ------------------------------------------------------------------ formulas
def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray,
                     sigma2: np.ndarray) -> float:
    r"""‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁Σ₂)^½) of arrays (D,), (D, D); at least 0.

    With Σ = RᵀR, tr (Σ₁Σ₂)^½ is the sum of the singular values of R₁R₂ᵀ. Unlike a matrix square
    root of Σ₁Σ₂, this is real and accurate at any rank. ValueError: the shapes do not fit, or a
    matrix is not a covariance.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(v, np.float64) for v in (mu1, sigma1, mu2, sigma2))
    D = mu1.size
    if not (mu1.shape == mu2.shape == (D,) and sigma1.shape == sigma2.shape == (D, D)):
        raise ValueError(f"statistics of different sizes: means {mu1.shape} and {mu2.shape}, "
                         f"covariances {sigma1.shape} and {sigma2.shape}")
    if not all(np.isfinite(v).all() for v in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("statistics with values that are not finite")
    overlap = np.linalg.svd(square_root(sigma1) @ square_root(sigma2).T, compute_uv=False).sum()
    value = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap
    return max(float(value), 0.0)  # rounding can give −1e-13


def square_root(sigma: np.ndarray) -> np.ndarray:
    """R (rank, D) with Σ = RᵀR. ValueError: Σ is not a covariance."""
    w, V = np.linalg.eigh(sigma)
    if w[0] < -1e-3 * w[-1] or abs(sigma - sigma.T).max() > 1e-3 * abs(sigma).max():
        raise ValueError("not a covariance: it is not symmetric with eigenvalues of 0 or more")
    # Rounding turns eigenvalues of 0 into 1e-16 of the largest; their roots would change the sum.
    keep = w > len(w) * np.finfo(float).eps * w[-1]
    return np.sqrt(w[keep])[:, None] * V.T[keep]


def inception_score(logits: Tensor | np.ndarray, splits: int = 10) -> tuple[float, float]:
    """logits (N, classes) without bias -> (mean, std) over `splits` parts. A fixed seed shuffles
    the images: files are often sorted by class. ValueError: N < splits, or values not finite."""
    n = len(logits)
    if n < splits:
        raise ValueError(f"the Inception Score needs at least one image in each of its {splits} "
                         f"parts, not {n} images")
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
    """Pairs of uint8 images (N, C, H, W) -> (N,) float64 decibels, ∞ for equal images."""
    mse = (a.double() - b.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255.0**2 / mse)


# ------------------------------------------------------------------ sets of images
class Generated:
    """Images of a run, sampled on request: image i is sample.py's image i of this seed."""
    names = None  # psnr cannot pair them

    def __init__(self, source: str, path: Path, config, device):
        self.denoiser, self.arguments = sample.open_run(path, config, device)
        s = self.denoiser.settings
        if s.get("factor"):
            raise ValueError(f"{source} is a super-resolution run: enlarge images with python -m "
                             "papers.superres enlarge, then score that folder")
        self.source, self.seed, self.device = source, config.seed, device
        self.n, self.shape = config.num or MIN_IMAGES, (s["channels"], *[s["image_size"]] * 2)
        self.notes = config.warnings(self.denoiser)
        self.summary = (f"{self.n:,} images by {self.denoiser.folder.name}, {config.weights} "
                        f"weights, seed {config.seed}, {sample.tag(config, self.denoiser.step)}")

    def batch(self, indices: list[int]) -> Tensor:
        """uint8 (b, C, H, W): quantised, like image files."""
        return sample.draw(self.denoiser, indices, self.seed, self.device, self.arguments)


class Stored:
    """Images of a folder, zip, array or data set. size None: the images' own; channels None: 3."""

    notes = ()

    def __init__(self, source: str, size, channels, config, progress: bool):
        self.source = source
        self.images = data.load(source, size, channels or 3, skip_bad=config.skip_bad_images,
                                progress=progress)
        endless = len(self.images) >= data.INFINITE
        self.n = (config.num or MIN_IMAGES) if endless else len(self.images)
        self.summary, self.shape = self.images.summary, tuple(self.images[0].shape)
        self.names = [image_files.pair_name(path, source)  # psnr pairs files by these
                      for path in getattr(self.images, "paths", [])]

    def batch(self, indices: list[int]) -> Tensor:
        """uint8 (b, C, H, W)."""
        return torch.stack(list(image_files.in_threads(self.images.__getitem__, indices, 8, 64)
                                if self.images.streamed else map(self.images.__getitem__, indices)))


def find_run(source: str) -> Path | None:
    """The checkpoint of a run, or None if `source` names images. FileNotFoundError: neither."""
    path = Path(source)
    if (source in data.BUILT_IN or ".npz:" in source or path.is_file() and path.suffix != ".pt"
            or path.is_dir() and not (path / "checkpoint.pt").is_file()):
        return None
    try:
        return checkpoint.find_checkpoint(source)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{source} is not a file, folder or data set "
                                f"({' '.join(data.BUILT_IN)}): {error}") from error


def open_sets(sources: list[str], config, dist) -> list:
    """Open each source as Generated, Stored or features.Statistics; for a single run, its data set
    too. All images get one shape: a run's, else --image-size and --channels, else the images' own
    if they agree. (Images resized in different ways would measure the resizers.)"""
    sets = [features.read_statistics(s) if config.metric == "fid" else None for s in sources]
    runs = [None if known else find_run(s) for s, known in zip(sources, sets, strict=True)]
    if config.metric == "fid" and len(sources) == 1:
        if not runs[0]:
            raise ValueError(f"{sources[0]} is not a run: name the images to compare it with")
        settings = checkpoint.load_checkpoint(runs[0])["settings"]
        sources = [*sources, data.require_local(settings["data"], sources[0])]
        sets, runs = [None, None], [*runs, None]
    config.refuse_unused(any(runs), [s for s, *other in zip(sources, sets, runs, strict=True)
                                     if other == [None, None]])
    size, channels = config.image_size, config.channels
    for i, run in enumerate(runs):
        if run:
            sets[i] = Generated(sources[i], run, config, dist.device)
            for name, own in (("image_size", sets[i].shape[1]), ("channels", sets[i].shape[0])):
                if getattr(config, name) not in (None, own):
                    raise ValueError(f"{flag_name(name)} does not fit the run's images, "
                                     + "x".join(map(str, sets[i].shape)) + ": leave it out")
            channels, size, _ = sets[i].shape
    for i, source in enumerate(sources):
        sets[i] = sets[i] or Stored(source, size, channels, config, dist.is_main)
    shapes = sorted({s.shape for s in sets if s.shape})
    if len(shapes) > 1:
        raise ValueError(f"{' and '.join(sources)}: images of different shapes cannot be compared ("
                         + " and ".join("x".join(map(str, s)) for s in shapes)
                         + ")" + ": give --image-size, or --channels" * (not all(runs)))
    return sets


# ------------------------------------------------------------------ the four programs
def fid(sets, config, dist) -> dict:
    """The Fréchet distance of two sets -> a report."""
    known = all(isinstance(s, features.Statistics) for s in sets)
    net = features.network_of(sets, dist) if known else features.open_network(config, dist, sets)
    a, b = both = [features.statistics(s, net, config.batch_size, dist) for s in sets]
    value = features.on_main(dist, sets, frechet_distance, a.mu, a.sigma, b.mu, b.sigma)
    warnings = features.warn_network(net, [s.precision for s in both])
    warnings += features.warn_statistics(both, MIN_IMAGES)
    return features.report(net.name("FID", "FD"), value, f"{value:.4f}", net, sets, warnings)


def score(sets, config, dist) -> dict:
    """The Inception Score of one set -> a report."""
    images = sets[0]  # too few are refused here, not after they were sampled
    features.on_main(dist, sets, inception_score, torch.zeros(images.n, 1))
    net = features.open_network(config, dist, sets)
    logits = features.gather_logits(images, net, config.batch_size, dist)  # on rank 0, in order
    mean, std = features.on_main(dist, sets, inception_score, logits)
    warnings = features.warn_network(net, [net.precision])
    if images.n < MIN_IMAGES:
        warnings.append(f"{images.n:,} images: under {MIN_IMAGES:,} the value is too low")
    text = f"{mean:.4f} ± {std:.4f}"
    return features.report(net.name("IS", "IS"), mean, text, net, sets, warnings, std=std)


def compare_pairs(sets, config, dist) -> dict:
    """The mean PSNR of pairs -> a report."""
    a, b = sets
    features.check_pairs(a, b)
    total = torch.zeros(2, dtype=torch.float64)
    for indices, batch in features.image_batches(a, config.batch_size, dist, "psnr"):
        decibels = psnr(batch[:, :a.shape[0]].cpu(), b.batch(indices))  # [:1] of gray images
        total += torch.stack([decibels.sum(), decibels.isinf().sum()])
    mean, equal = (dist.all_reduce(total) / torch.tensor([a.n, 1])).tolist()
    warnings = [f"{equal:,.0f} pairs are equal: their PSNR is infinite"] * (equal > 0)
    return features.report("PSNR", mean, f"{mean:.4f} dB", None, sets, warnings)


def save_statistics(sets, config, dist) -> dict:
    """stats A OUT.npz: save μ and Σ in pytorch-fid's form, with their settings -> a report."""
    net = features.open_network(config, dist, sets)
    found = features.statistics(sets[0], net, config.batch_size, dist)
    dist.on_main(lambda: files.save_npz(config.out, **found.arrays()))
    return features.report("statistics", None, f"in {config.out.resolve()}", net, sets, [])


# ------------------------------------------------------------------ flags
@dataclass
class MetricsConfig(samplers.SamplerConfig):
    metric: str = flag("", "what to calculate", choices=("fid", "is", "psnr", "stats"),
                       positional="METRIC", group="what")
    images: tuple[str, ...] = flag((), "what to score (fid: a single run is compared with its own "
                                   "data set; stats: B is the .npz to write)", positional="A [B]",
                                   nargs="+")
    inception: Path | None = flag(None, f"file of Inception's weights, {inception.NAME}",
                                  shown="from the cache folder, else downloaded, 96 MB",
                                  group="features")
    features: Path | None = flag(None, "a network that replaces Inception. Such a file can run "
                                 "code: use only files that you trust")
    num: int | None = flag(None, "images of a run or of shapes; a set on disk is used whole",
                           short="-n", shown=f"{MIN_IMAGES}", group="images")
    image_size: int | None = flag(None, "resize and crop sets to this side", shown="the run's, "
                                  "else their own")
    channels: int | None = flag(None, "1: convert to gray", (1, 3), shown="the run's, else 3")
    skip_bad_images: bool = flag(False, "skip files that cannot be read")
    batch_size: int = flag(64, "images at a time, per process")
    seed: int = flag(0, "of a run's images; image i is a function of (seed, i)")
    json: bool = flag(False, "print one JSON object instead of text")

    prog: ClassVar[str] = "metrics.py"
    usage: ClassVar[str] = "python metrics.py {fid,is,psnr,stats} A [B] [flags]"
    description: ClassVar[str] = """\
Score images. A and B are each a folder, zip or array of images, a data set (shapes, cifar10),
an .npz of statistics (mu, sigma; fid only), or a run, which is sampled on the fly."""
    examples: ClassVar[str] = """\
  python metrics.py fid shapes-tiny-sa2
      the FID of 10,000 samples of a run against its training set
  torchrun --nproc_per_node 8 metrics.py fid my-run cifar10 -n 50000 --sampler ddpm --nfe 1000
      as in papers: 50,000 samples against the training set
  python metrics.py stats cifar10 cifar10.npz && python metrics.py fid samples/ cifar10.npz
      compute the statistics of a set once, use them many times (in pytorch-fid's form)
  python metrics.py is samples/
  python metrics.py psnr enlarged/ originals/
      pairs of images, matched by folder and file name
  python metrics.py fid my-run --features classifier.pt2
      a distance in the features of your own network, reported as FD and not as FID: float32
      (N, 3, H, W) in [-1, 1] -> (N, D), saved by torch.export.save. `is` takes the D as logits"""

    def check(self) -> None:
        super().check()
        image_folder.check_image_flags(self)
        wanted = {"fid": "A or A B", "is": "A", "psnr": "A B", "stats": "A OUT.npz"}[self.metric]
        if len(self.images) not in {len(way.split()) for way in wanted.split(" or ")}:
            raise ValueError(f"{self.metric} takes {wanted}, not {len(self.images)} names: "
                             + " ".join(self.images))
        features.check_network_flags(self)
        self.sources, self.out = list(self.images), None
        if self.metric == "stats":
            self.out = Path(self.sources.pop())
            features.check_output(self.out)

    def refuse_unused(self, sampled: bool, stored: list[str]) -> None:
        """ValueError: sampling flags if nothing is sampled, or flags of sets without a set."""
        names = {f.name for f in fields(samplers.SamplerConfig)} - {"device"} | {"seed"}
        if stored and self.metric != "psnr" and not self.features:  # these also apply to Inception
            names -= {"precision", "compile", "deterministic"}
        if not stored:
            names |= {"batch_size", "channels", "features", "image_size", "inception"}
        if not sampled and (unused := sorted(names & self.given)):
            raise ValueError(f"{flag_name(unused[0])} is only for "
                             + ("sampling a run" if stored else "images") + ": leave it out")
        if self.skip_bad_images and all(source in data.BUILT_IN for source in stored):
            raise ValueError("--skip-bad-images is only for folders and zips: leave it out")
        if self.num and not sampled and "shapes" not in stored:
            raise ValueError("--num is only for a run or shapes: other sets are used whole")


def main(argv=None):
    config = parse_into(MetricsConfig, argv)
    tf32 = config.precision == "tf32"  # on request only: with its 10 bits FID moves by hundredths
    with distributed.init(tf32, config.deterministic, device=config.device) as dist:
        sets = dist.main_first(lambda: open_sets(config.sources, config, dist))
        score_of = {"fid": fid, "is": score, "psnr": compare_pairs, "stats": save_statistics}
        report = score_of[config.metric](sets, config, dist)
        if dist.is_main:
            features.print_report(report, config.json)


if __name__ == "__main__":
    run_main(main)
