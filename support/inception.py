r"""The network of FID and IS: Inception-v3 with the weights of TensorFlow's graph.

    uint8 (N, 3, H, W) -> /255 -> bilinear to 299x299 -> 2x − 1 -> stem -> 11 Mixed blocks
        -> mean over the 8x8 map: pool3 (N, 2048)              FID compares these
        -> pool3 Wᵀ: logits without bias (N, 1008)             IS turns these into probabilities

A score depends on this network as much as on the images: other weights, another pooling or another
resize change FID by more than the differences between papers. So all are those of pytorch-fid
(Seitzer 2020), a port of Google's inception-2015-12-05. The layers have the names of its weight
file. No other file can replace it. The graph is Inception-v3 (Szegedy et al., 2016) except for some
pools:

    block      map    pool branch
    5b 5c 5d   35x35  3x3 mean of the positions inside the map only: the border is not padded with 0
    6a         17x17  3x3 max, stride 2
    6b to 6e   17x17  as 5b
    7a         8x8    3x3 max, stride 2
    7b         8x8    as 5b
    7c         8x8    3x3 max, stride 1: unlike 7b, but all published scores use it

Not here: the scores (metrics.py); training; TensorFlow's resize and scaling (another grid, and
x/128 − 1), which change scores a little. TF32 can change FID by hundredths;
distributed.init(tf32=False) switches it off.

    python -c "from support.inception import Inception; print(Inception().Mixed_7c.plan)"

N images, H height, W width, C channels.
"""

import hashlib
import io

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from support import readers
from support.checkpoint import guess_file_type

NAME = "pt_inception-2015-12-05-6726825d.pth"  # 95,628,359 bytes
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAME}"
# The file's name contains its first 8 digits, as torch.hub requires.
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
NEEDED = f"FID and IS need the weights that were ported from TensorFlow, {URL}"


# ------------------------------------------------------------------ the network

class Conv(nn.Module):
    """Convolution, normalisation, ReLU: (N, c_in, H, W) -> (N, c_out, ., .)."""

    def __init__(self, c_in, c_out, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)

    def fold(self):
        """Move the normalisation, in eval mode a factor and an offset per channel, into the
        convolution."""
        self.conv, self.bn = fuse_conv_bn_eval(self.conv, self.bn), nn.Identity()


def mean_inside(x):
    """3x3 mean over positions inside the map: in a corner over 4, without 5 zeros."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def max_same(x):
    """3x3 maximum; the map keeps its size."""
    return F.max_pool2d(x, 3, stride=1, padding=1)


def max_halve(x):
    """3x3 maximum, stride 2: 35 -> 17 -> 8."""
    return F.max_pool2d(x, 3, stride=2)


# The branches of each kind of block. A branch is a chain of (channels, kernel), kernel k or
# (height, width). A list inside a chain is a fork: its layers read the same map, and their outputs
# are concatenated. The layers of branch5x5 are named branch5x5_1, branch5x5_2; a fork in third
# place has ..._3a, ..._3b; a single layer has no number. branch_pool begins with the block's pool.
WIDE, TALL = (1, 7), (7, 1)  # a 7x7 convolution in two steps
FORK = [(384, (1, 3)), (384, (3, 1))]


def block_a(pool):
    """5b, 5c, 5d: 35x35 -> 224 + pool channels, 35x35."""
    return {"branch1x1": [(64, 1)],
            "branch5x5": [(48, 1), (64, 5)],
            "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
            "branch_pool": [(pool, 1)]}


def block_c(c):
    """6b to 6e: 768 -> 768 channels, 17x17; c channels inside the 7x7 branches."""
    return {"branch1x1": [(192, 1)],
            "branch7x7": [(c, 1), (c, WIDE), (192, TALL)],
            "branch7x7dbl": [(c, 1), (c, TALL), (c, WIDE), (c, TALL), (192, WIDE)],
            "branch_pool": [(192, 1)]}


BLOCK_B = {"branch3x3": [(384, 3)],  # 6a: 288 -> 768 channels, 35x35 -> 17x17
           "branch3x3dbl": [(64, 1), (96, 3), (96, 3)],
           "branch_pool": []}
BLOCK_D = {"branch3x3": [(192, 1), (320, 3)],  # 7a: 768 -> 1280 channels, 17x17 -> 8x8
           "branch7x7x3": [(192, 1), (192, WIDE), (192, TALL), (192, 3)],
           "branch_pool": []}
BLOCK_E = {"branch1x1": [(320, 1)],  # 7b, 7c: -> 2048 channels, 8x8
           "branch3x3": [(384, 1), FORK],
           "branch3x3dbl": [(448, 1), (384, 3), FORK],
           "branch_pool": [(192, 1)]}


class Mixed(nn.Module):
    """Parallel branches, concatenated in the order of the table. stride 2: the last convolution of
    each branch halves the map, without padding; all others keep its size."""

    def __init__(self, c_in, branches, pool, stride=1):
        super().__init__()
        self.pool = pool
        self.plan = {branch: [] for branch in branches}  # names of layers, a list per step
        for branch, chain in branches.items():
            width = c_in
            for i, step in enumerate(chain, 1):
                layers = step if isinstance(step, list) else [step]
                number = f"_{i}" if len(chain) > 1 else ""
                names = [branch + number + fork for fork in ("ab" if len(layers) > 1 else [""])]
                s = stride if i == len(chain) else 1
                for name, (c_out, kernel) in zip(names, layers, strict=True):
                    padding = "same" if s == 1 else 0
                    self.add_module(name, Conv(width, c_out, kernel, s, padding))
                width = sum(c_out for c_out, _ in layers)
                self.plan[branch].append(names)

    def forward(self, x):
        out = []
        for branch, steps in self.plan.items():
            h = [self.pool(x) if branch == "branch_pool" else x]
            for names in steps:
                h = h[0] if len(h) == 1 else torch.cat(h, dim=1)
                h = [getattr(self, name)(h) for name in names]
            out += h
        return torch.cat(out, dim=1)


class Inception(nn.Module):
    r"""forward(images uint8 (N, 3, H, W)) -> (pool3 (N, 2048), logits without bias (N, 1008)).

    All computation, from the division by 255 on, is in the dtype of the weights: in float64 after
    net.double(). A new network has random weights; open_net() reads the real ones. It is in
    eval mode and without gradients.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3)
        self.Mixed_5b = Mixed(192, block_a(32), mean_inside)
        self.Mixed_5c = Mixed(256, block_a(64), mean_inside)
        self.Mixed_5d = Mixed(288, block_a(64), mean_inside)
        self.Mixed_6a = Mixed(288, BLOCK_B, max_halve, stride=2)
        self.Mixed_6b = Mixed(768, block_c(128), mean_inside)
        self.Mixed_6c = Mixed(768, block_c(160), mean_inside)
        self.Mixed_6d = Mixed(768, block_c(160), mean_inside)
        self.Mixed_6e = Mixed(768, block_c(192), mean_inside)
        self.Mixed_7a = Mixed(768, BLOCK_D, max_halve, stride=2)
        self.Mixed_7b = Mixed(1280, BLOCK_E, mean_inside)
        self.Mixed_7c = Mixed(2048, BLOCK_E, max_same)
        self.fc = nn.Linear(2048, 1008)  # 1000 classes and 8 unused outputs
        self.eval().requires_grad_(False)  # in train mode, results would depend on the batch
        self.to(memory_format=torch.channels_last)  # the same values, 1.5 times as fast on a CPU

    def fold(self):
        """Fold all normalisations -> self: the same function with a quarter of the passes over
        memory. The weights then have other names than in the file."""
        for layer in [m for m in self.modules() if isinstance(m, Conv)]:
            layer.fold()
        return self

    def forward(self, images):
        x = preprocess(images, self.fc.weight.dtype)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_halve(x)))  # (N, 192, 71, 71)
        x = max_halve(x)  # (N, 192, 35, 35)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = getattr(self, f"Mixed_{name}")(x)  # at last (N, 2048, 8, 8)
        with torch.autocast(x.device.type, enabled=False):  # features must not be bf16
            pool3 = x.mean(dim=(2, 3), dtype=self.fc.weight.dtype)
            # IS was first computed without the bias, and has been since then. fc.bias exists only
            # because the file contains it.
            return pool3, F.linear(pool3, self.fc.weight)


def preprocess(images, dtype=torch.float32):
    r"""uint8 (N, 3, H, W) -> (N, 3, 299, 299) in [−1, 1], of `dtype`.

    Bilinear without antialiasing, even for shrinking: smoother images would get other scores.
    ValueError: floats, which may mean [0, 1] or [−1, 1], or images that are not RGB.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError("Inception takes uint8 images (N, 3, H, W) in 0..255, not "
                         f"{images.dtype} {tuple(images.shape)} (gray: repeat the channel)")
    x = images.to(dtype) / 255
    return 2 * F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) - 1


# ------------------------------------------------------------------ the weights

def open_net(path=None, device="cpu"):
    """Load the network with its weights -> (net, SHA-256 of the file in hex).

    path None: the file in the cache folder, which is downloaded (96 MB) if necessary and must have
    the right SHA-256. A given file may have another (it may have been saved again), so print the
    hash with the score. OSError, ValueError: no such file, no network, or other contents.
    """
    where = cached_weights() if path is None else path
    with open(where, "rb") as file:
        raw = file.read()  # read once, so that the hash belongs to the loaded bytes
    sha256 = hashlib.sha256(raw).hexdigest()
    if path is None and sha256 != SHA256:
        raise ValueError(f"{where} has SHA-256 {sha256}, not {SHA256}: delete it to download again")
    try:
        weights = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, for pickles and damaged files
        raise ValueError(f"{where} does not hold weights ({guess_file_type(where)}): {NEEDED}"
                         ) from error
    with torch.device("meta"):  # skip the random weights
        net = Inception()
    if wrong := misfit(weights, net.state_dict()):
        raise ValueError(f"{where} is not the Inception of FID ({wrong}): {NEEDED}")
    net.to_empty(device=device).load_state_dict(weights)
    return net, sha256


def cached_weights():
    """Path of the weights in the cache folder; this downloads them if necessary."""
    return readers.cached(NAME, URL, SHA256, instead="give its path to --inception")


def misfit(weights, ours):
    """Describe briefly how loaded weights differ from the network's; None if they fit."""
    if not isinstance(weights, dict):
        return f"it holds a {type(weights).__name__}"
    shapes = {key: getattr(value, "shape", None) for key, value in weights.items()}
    if shapes.get("fc.weight") == (1000, 2048):
        return "1000 classes, not 1008: other weights, which give other scores"
    if unlike := [key for key in ours if shapes.get(key) != ours[key].shape]:
        return (f"{len(unlike)} of {len(ours)} tensors, first {unlike[0]}, are missing or have "
                "another shape")
    if extra := [str(key) for key in shapes if key not in ours]:
        return f"it also holds {extra[0]}"
    return None
