"""Tensors made by formula from a name, the same on every machine and with every library version.

fill(name, shape) hashes crc32(name) and the index of an element to a float64 in [0, 1). image()
gives smooth uint8 images, so that resizing matters. state() fills a state dict. The numbers in
tests/data were computed from such weights and images: do not change the formulas.
"""

import math
import zlib

import numpy as np


def fill(name, shape):
    n = int(np.prod(shape)) if len(shape) else 1
    z = np.arange(n, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()))
    for _ in range(2):
        z = ((z ^ (z >> np.uint64(16))) * np.uint64(0x45D9F3B)) & np.uint64(0xFFFFFFFF)
    z = z ^ (z >> np.uint64(16))
    return (z.astype(np.float64) / 2.0**32).reshape(shape)


def weight(name, shape):
    """Weights that keep activations of order one.

    Convolutions and linear layers: uniform with variance 2/fan_in. Scales of normalisations:
    [0.5, 1.5). Biases and running means: [-0.1, 0.1). Running variances: [0.5, 1.5).
    """
    u = fill(name, shape)
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    if name.endswith("running_var"):
        return 0.5 + u
    if len(shape) <= 1:
        return 0.5 + u if name.endswith("weight") else 0.2 * (u - 0.5)
    return (2 * u - 1) * math.sqrt(6.0 / np.prod(shape[1:]))


def state(shapes):
    """{key: shape} -> {key: array}."""
    return {k: weight(k, tuple(s)) for k, s in shapes.items()}


def image(name, n, size):
    """uint8 (n, size, size, 3): three waves per channel with hashed frequencies and phases."""
    p = fill(name, (n, 3, 3, 3))
    y, x = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size), indexing="ij")
    out = np.zeros((n, size, size, 3))
    for i in range(n):
        for c in range(3):
            for w in range(3):
                fx, fy, ph = p[i, c, w]
                out[i, :, :, c] += np.sin(2 * np.pi * (4 * fx * x + 4 * fy * y + ph))
    return np.clip(np.rint(127.5 + 40.0 * out), 0, 255).astype(np.uint8)
