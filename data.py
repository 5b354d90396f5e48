r"""Images in: pixels in [-1, 1], the built-in shapes, and batches in a fixed order.

An image is a uint8 tensor (C, H, W), 0..255, with H = W = size and C = 1 or 3, until train.py calls
to_float. The order of the images is a pure function of the position in the stream (batch_indices),
so that a resumed run continues with the right image.

Not here: flips (train.py); files, zips and arrays (support/image_files.py); colour, cropping and
resizing (support/images.py).

    python -c "import data; print(data.load('shapes', 32, 3).summary)"
    python -c "import data; print(data.batch_indices(n=10, start=8, batch=4, seed=0))"

N images, C channels, H height, W width, n = len(data set).
"""

import itertools
import math
import os
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from support import image_files, readers
from support.image_files import MAX_SIDE
from support.images import prepare

BUILT_IN = ("shapes", "cifar10")
INFINITE = 2**31  # a set of this size or more is not permuted: no image repeats anyway
PREFETCH = 4  # batches that threads decode in advance


def to_float(u8: Tensor) -> Tensor:
    """uint8 0..255, any shape -> float32 in [-1, 1]: 0 is -1, 255 is exactly +1."""
    return u8.float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float, any shape, clamped to [-1, 1] -> uint8: the exact inverse of to_float."""
    # Round half up: truncation would darken by half a level. bfloat16 keeps few levels near 128.
    return (x.float().clamp(-1, 1) * 127.5 + 128).floor().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------ the built-in shapes

SHAPE_COLOURS = ((214, 48, 49), (46, 160, 67), (39, 94, 214), (245, 166, 35))
SHAPE_NAMES = ("circle", "square", "triangle", "star")


def choose_shape(seed: int | tuple) -> tuple[np.random.Generator, int, int]:
    """Draw shape and colour -> (generator for the rest, index of the name, of the colour)."""
    rng = np.random.default_rng(seed)
    return rng, rng.integers(len(SHAPE_NAMES)), rng.integers(len(SHAPE_COLOURS))


def draw_shape(seed: int | tuple, size: int = 32) -> np.ndarray:
    """Draw an anti-aliased coloured shape on a plain light background -> uint8 (size, size, 3)."""
    rng, kind, colour = choose_shape(seed)
    colour, big = SHAPE_COLOURS[colour], 4 * size  # drawn 4 times as large, then averaged
    radius = big * rng.uniform(0.32, 0.40)
    cx, cy = big * (0.5 + rng.uniform(-0.05, 0.05, 2))
    turn = rng.uniform(-0.12, 0.12)
    image = Image.new("RGB", (big, big), (236, 240, 241))
    draw = ImageDraw.Draw(image)
    if kind == 0:
        draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=colour)
    else:
        corners = {1: 4, 2: 3, 3: 10}[kind]
        radii = [radius * (0.45 if kind == 3 and i % 2 else 1.1) for i in range(corners)]
        start = turn - math.pi / 2 + (math.pi / 4 if kind == 1 else 0)
        draw.polygon([(cx + r * math.cos(start + 2 * math.pi * i / corners),
                       cy + r * math.sin(start + 2 * math.pi * i / corners))
                      for i, r in enumerate(radii)], fill=colour)
    return np.asarray(image.reduce(4))


class Shapes:
    """Endless drawings, made on request: image i depends only on (seed, i)."""

    streamed = False

    def __init__(self, size: int, channels: int, seed: int = 0):
        self.size, self.channels, self.seed = size, channels, seed
        self.summary = f"endless shapes -> {channels}x{size}x{size}, drawn on the fly, seed {seed}"
        self.digest, self.sizes = f"shapes, seed {seed}", {(size, size)}

    def __len__(self):
        return INFINITE

    def __getitem__(self, i):
        drawing = Image.fromarray(draw_shape((self.seed, int(i)), self.size))
        return prepare(drawing, self.size, self.channels)


# ------------------------------------------------------------------ data sets

def load(source: str, size: int | None, channels: int, seed: int = 0, skip_bad: bool = False,
         memory_limit: int = 2 * 2**30, progress: bool = False):
    """Open a data set: len(d), d[i] uint8 (channels, size, size), d.summary in one line, d.digest.

    source        "shapes", "cifar10" (downloaded), or a path: a folder or .zip of images, an image,
                  .npy, .npz or FILE.npz:KEY, an IDX file or folder, CIFAR-10's archive or folder
    size          side in pixels; None: the images' own, if all are squares of one size
    skip_bad      leave broken image files out instead of stopping
    memory_limit  keep prepared images in memory if all together need at most this many bytes
    ValueError or OSError, in one line: what is wrong with the source.
    """
    if channels not in (1, 3) or size is not None and not 1 <= size <= MAX_SIDE:
        raise ValueError(f"--image-size must be from 1 to {MAX_SIDE:,}, not {size}, and --channels "
                         f"1 or 3, not {channels}")
    if source == "shapes":
        dataset = Shapes(size or 32, channels, seed)
    else:
        path = readers.cifar_archive() if source == "cifar10" else str(source)
        path, key = readers.split_key(path)
        dataset = image_files.open_path(path, key, size, channels, skip_bad, memory_limit, progress)
    if source in BUILT_IN and os.path.exists(source):
        dataset.summary += f"; built in: for the folder {source}, give ./{source}"
    return dataset


def require_local(source: str, run: str) -> str:
    """`source`, the data set of a run, if it exists here; else FileNotFoundError."""
    if source not in BUILT_IN and not os.path.exists(readers.split_key(source)[0]):
        raise FileNotFoundError(f"{run} was trained on {source!r}, which does not exist here: give "
                                "the images with --data, or to fid as B")
    return source


# ------------------------------------------------------------------ the order of training

@lru_cache(maxsize=2)  # two, because a batch may span two epochs
def permutation(n: int, epoch: int, seed: int) -> np.ndarray:
    """The order of the images in this epoch: int64 (n,)."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_indices(n: int, start: int, batch: int, seed: int) -> np.ndarray:
    """Image indices at stream positions start .. start + batch - 1: int64 (batch,).

    Position p is in epoch p // n. Each epoch visits every image once, in another order. In an
    endless set (n >= 2^31), position p is image p. (NumPy does not guarantee that default_rng's
    streams stay the same, but so far they have.)
    """
    positions = np.arange(start, start + batch, dtype=np.int64)
    if n >= INFINITE:
        return positions
    indices = np.empty_like(positions)
    for epoch in range(start // n, (start + batch - 1) // n + 1):
        here = positions // n == epoch
        indices[here] = permutation(n, epoch, seed)[positions[here] % n]
    return indices


def batches(dataset, batch: int, start: int, seed: int, rank: int = 0, world_size: int = 1,
            workers: int = 0, device: torch.device | str = "cpu") -> Iterator[Tensor]:
    """Endless uint8 tensors (batch // world_size, C, H, W) from stream position `start` on.

    `batch` is the global batch size; process `rank` gets a contiguous part of the global batch.
    `start` counts images: completed steps times `batch`. ValueError: batch > len(dataset), or
    world_size does not divide batch.
    """
    n, share = len(dataset), batch // world_size
    if batch > n:
        raise ValueError(f"--batch-size {batch} is more than the {n} images: use a smaller batch")
    if batch < 1 or batch % world_size:
        raise ValueError(f"--batch-size {batch} must be divisible by the {world_size} processes")

    def indices():
        for position in itertools.count(start, batch):
            yield batch_indices(n, position, batch, seed)[rank * share:(rank + 1) * share].tolist()

    return image_files.stream(dataset, indices(), workers, PREFETCH * share, device)
