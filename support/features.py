r"""What images are compared by: feature networks, and files of feature statistics.

    open_network(...)            Inception, or a network saved by torch.export.save
    FeatureStatistics            mean and covariance of features, over batches and processes
    read_statistics(path)        an .npz of mu and sigma, in pytorch-fid's form

Not here: the scores (metrics.py), or Inception's layers (inception.py).

    python -c "from support import features; print(features.INCEPTION)"

N images, D features of each, μ (D,) their mean, Σ (D, D) their covariance (divisor N − 1).
"""

import hashlib
import logging
import os
import shlex
import zipfile

import numpy as np
import torch
from torch.export.passes import move_to_device_pass

from support import checkpoint, inception, precision

INCEPTION = "Inception 2015-12-05"


class FeatureNetwork:
    """net(uint8 images (N, 3, H, W)) -> (features (N, D), logits); and what to print with a score:
    network, sha256, resize, precision."""

    def __init__(self, call, network, sha256, resize, precision="fp32"):
        self.call, self.network, self.sha256 = call, network, sha256
        self.resize, self.precision = resize, precision

    def __call__(self, images):
        return self.call(images)

    @property
    def is_inception(self):
        return self.network == INCEPTION


def open_network(features, weights, dist, precision_name="fp32", compiled=False):
    """-> FeatureNetwork. features: a file of an exported network, or None for Inception with the
    file `weights` (None: from the cache folder, else downloaded)."""
    if features is None:
        net, digest = dist.main_first(lambda: inception.load(weights, dist.device))
        net = precision.for_inference(net.fold(), dist.device, precision_name, compiled)
        return FeatureNetwork(net, INCEPTION, digest, "bilinear to 299x299 without antialiasing",
                              precision_name)
    digest = dist.on_main(lambda: hashlib.sha256(features.read_bytes()).hexdigest())
    net = dist.main_first(lambda: open_exported(features, dist.device))

    def call(images):
        out = net(images.float() / 127.5 - 1)
        if not isinstance(out, torch.Tensor) or out.dim() < 2 or len(out) != len(images):
            what = tuple(out.shape) if isinstance(out, torch.Tensor) else type(out).__name__
            raise ValueError(f"--features {features} must give one tensor (N, features) for N "
                             f"images; for {len(images)} it gave {what}")
        return out.flatten(1), out.flatten(1)  # for the Inception Score they are logits

    return FeatureNetwork(call, features.name, digest, "none")


def open_exported(path, device):
    """A network saved by torch.export.save, as a function of float32 images (N, 3, H, W) in
    [-1, 1]. Such a file can run programs."""
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # it warns by a traceback
    reason = "it is cut short, a zip of something else, or of another version of PyTorch"
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
            if why.startswith("Guard failed"):
                why += " (exported without a dynamic batch axis?)"
            raise ValueError(f"--features {path} does not take a batch of shape "
                             f"{tuple(images.shape)}: {why}") from error
    return call


class FeatureStatistics:
    """n, Σ f and Σ f fᵀ of feature vectors in float64: sums do not depend on batches or order."""

    def __init__(self, width):
        self.n, self.sum = 0, torch.zeros(width, dtype=torch.float64)
        self.outer = torch.zeros(width, width, dtype=torch.float64)

    def add(self, f):
        """f (b, D), of any dtype and device."""
        f = f.double().cpu()
        self.n += len(f)
        self.sum += f.sum(0)
        self.outer += f.T @ f

    def result(self, dist):
        """(μ, Σ) over all processes, NumPy float64. ValueError: fewer than two images."""
        n = dist.all_reduce(torch.tensor(float(self.n))).item()
        total, outer = dist.all_reduce(self.sum), dist.all_reduce(self.outer)
        if n < 2:
            raise ValueError("a covariance needs at least 2 images")
        mean = total / n
        sigma = (outer - n * mean.outer(mean)) / (n - 1)
        # Of a feature that never changes, rounding leaves a "variance" of either sign. float32
        # features are not known to better than 1e-7 of their size.
        constant = sigma.diagonal() <= 1e-12 * mean**2
        sigma[constant] = sigma[:, constant] = 0
        return mean.numpy(), sigma.numpy()


def read_statistics(source):
    """An .npz of statistics as a dict: mu, sigma and, if metrics.py wrote it, n, network, sha256,
    size, precision. None for anything else. ValueError: damaged, or inside a pickle."""
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
        raise ValueError(f"{source} is not a readable .npz file "
                         f"({checkpoint.guess_file_type(source)})") from error
    mu, sigma = found["mu"], found["sigma"]
    if not mu.dtype.kind == sigma.dtype.kind == "f" or sigma.shape != (*mu.shape, *mu.shape):
        raise ValueError(f"{source}: mu {mu.dtype} {mu.shape} and sigma {sigma.dtype} "
                         f"{sigma.shape} are not a mean (D,) and a covariance (D, D)")
    return found


def refuse_pickle(source):
    """ValueError for statistics as SA-DPM (.npy) and EDM2 (.pkl) write them: dicts in a pickle."""
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
    raise ValueError(f"{source} is a pickle, and opening one can run a program. If you trust it, "
                     f"convert it to an .npz of mu and sigma:  {command}")
