r"""Score samples of the built-in shapes: the share of images that pass three tests.

    pure    for at least 95 % of the shape's inner pixels, the nearest palette colour is the same
    shape   the silhouette has an IoU of at least 0.85 with one of many drawn silhouettes
    clean   the outer ring of 2 pixels has a standard deviation of at most 6 grey levels
    good    all three

About 97 % of the real drawings are good; the limits above reject the rest. The built-in shapes show
within minutes whether training and sampling work. This program turns the look into a number.

    python -m papers.shapes_check runs/shapes-tiny-sa2/generated/FOLDER
    python -m papers.shapes_check shapes -n 512            # the drawings themselves

Not here: other data sets (metrics.py).

N images; pixels 0..255; IoU is intersection over union of two sets of pixels.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

import data
from support.cli import flag, parse_into
from support.programs import run_main

BACKGROUND = (236, 240, 241)
TEMPLATES = 4000


def nearest_colour(images):
    """uint8 (N, 3, H, W) -> index of the nearest colour (N, H, W); 0 is the background."""
    colours = torch.tensor([BACKGROUND, *data.SHAPE_COLOURS], dtype=torch.float32)  # (5, 3)
    difference = images[:, None].float() - colours[None, :, :, None, None]  # (N, 5, 3, H, W)
    return difference.square().sum(2).argmin(1)


def templates(size, n=TEMPLATES):
    """Silhouettes of n drawings, which training never uses: bool (n, size²)."""
    drawings = torch.stack([torch.from_numpy(data.draw_shape((10**6, i), size).copy())
                            for i in range(n)]).permute(0, 3, 1, 2)
    return (nearest_colour(drawings) > 0).flatten(1)


def judge(images, masks):
    """uint8 (N, 3, H, W), masks of templates() -> {name: bool (N,)}."""
    nearest = nearest_colour(images)
    shape = nearest > 0
    # Inner pixels: all 3x3 neighbours belong to the shape. At its edge, colours are mixed.
    inner = -F.max_pool2d(-shape[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0
    counts = torch.stack([((nearest == c) & inner).flatten(1).sum(1) for c in range(1, 5)], 1)
    pure = counts.amax(1) >= 0.95 * inner.flatten(1).sum(1).clamp(min=1)

    flat = shape.flatten(1).float()
    overlap = flat @ masks.float().T  # (N, templates)
    union = flat.sum(1, keepdim=True) + masks.sum(1).float() - overlap
    matches = (overlap / union).amax(1) >= 0.85

    ring = torch.ones(images.shape[-2:], dtype=torch.bool)
    ring[2:-2, 2:-2] = False
    clean = images[..., ring].float().std(2).mean(1) <= 6
    return dict(pure=pure, shape=matches, clean=clean, good=pure & matches & clean)


@dataclass
class CheckConfig:
    images: str = flag("", "folder, zip or .npz of images, or `shapes`", positional="IMAGES",
                       group="what")
    num: int = flag(512, "largest number of images", short="-n")

    prog: ClassVar[str] = "papers.shapes_check"
    usage: ClassVar[str] = "python -m papers.shapes_check IMAGES [flags]"
    description: ClassVar[str] = "Count how many images are a clean shape of one colour."
    examples: ClassVar[str] = """\
  python sample.py shapes-tiny-sa2 -n 512 --out samples
  python -m papers.shapes_check samples"""

    def check(self):
        if not self.images:
            raise ValueError("IMAGES is missing: name a folder of images")
        if self.num < 1:
            raise ValueError(f"--num must be at least 1, not {self.num}")


def main(argv=None):
    config = parse_into(CheckConfig, argv)
    dataset = data.load(config.images, None, 3)
    images = torch.stack([dataset[i] for i in range(min(config.num, len(dataset)))])
    found = judge(images, templates(images.shape[-1]))
    print(f"{len(images)} images: "
          + ", ".join(f"{name} {values.float().mean():.1%}" for name, values in found.items()))


if __name__ == "__main__":
    run_main(main)
