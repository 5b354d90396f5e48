r"""Random generators that are functions of integers, so that checkpoints need no random state.

    generator(seed, step)      the generator of one training step
    image_seed(seed, i)        the seed of image i of a sampling run; no two seeds share an image
    SeededNoise(seeds)         noise for a batch of images, each from its own seed

Not here: the use of the numbers.

    python -c "from support import rng; print(rng.hash_ints(0, 1), rng.hash_ints(1, 0))"
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from support.device import move, pinned


def generator(*key, device="cpu"):
    """A torch.Generator seeded by integers, e.g. (seed, step)."""
    return torch.Generator(device).manual_seed(hash_ints(*key))


def hash_ints(*key):
    """Mix integers into one 63-bit integer, with splitmix64's finaliser after each.

    So (0, 1), (1, 0) and adjacent seeds give unrelated streams.
    """
    z, mask = 0, 2**64 - 1
    for word in key:
        z = (z + word + 0x9E3779B97F4A7C15) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
    return z >> 1


MAX_SEEDS, MAX_IMAGES = 2**12, 2**20


def image_seed(seed, i):
    """The generator seed of image i; i itself for seed 0. Seeds below MAX_SEEDS share no image
    among their first MAX_IMAGES.

    torch's CPU generator uses only the low 32 bits of its seed: (seed << 32) + i would give all
    seeds the same images.
    """
    return seed * MAX_IMAGES + i


class SeededNoise:
    """noise(shape) -> (B, ...) float32, where image i depends on its own seed alone. It is drawn on
    the CPU, so that a seed gives the same noise on every device.

    ahead, the default for a GPU: a thread draws the next noise while the GPU works. Then every call
    must ask for the same shape."""

    def __init__(self, seeds: Sequence[int], device="cpu", ahead=None):
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.device = torch.device(device)
        ahead = self.device.type == "cuda" if ahead is None else ahead
        self.pool, self.next = ThreadPoolExecutor(1) if ahead else None, None

    def draw(self, shape):
        """The next noise of every image, in memory that a GPU reads without a wait."""
        noise = torch.stack([torch.randn(shape[1:], generator=g) for g in self.generators])
        return pinned(noise, self.device)

    def __call__(self, shape) -> Tensor:
        if shape[0] != len(self.generators):
            raise ValueError(f"{shape[0]} images, but {len(self.generators)} seeds")
        noise = self.next.result() if self.next else self.draw(shape)
        self.next = self.pool.submit(self.draw, shape) if self.pool else None
        return move(noise, self.device)
