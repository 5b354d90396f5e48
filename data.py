"""Images in (being written)."""
import math

import numpy as np
from PIL import Image, ImageDraw

SHAPE_COLOURS = ((214, 48, 49), (46, 160, 67), (39, 94, 214), (245, 166, 35))
SHAPE_NAMES = ("circle", "square", "triangle", "star")


def draw_shape(seed, size=32, channels=3):
    """One anti-aliased coloured shape on a plain light background -> uint8 (size, size, 3)."""
    rng = np.random.default_rng(seed)
    kind, colour = rng.integers(len(SHAPE_NAMES)), SHAPE_COLOURS[rng.integers(len(SHAPE_COLOURS))]
    big = 4 * size  # drawn four times too large, then averaged down: anti-aliasing
    radius = big * rng.uniform(0.28, 0.40)
    cx, cy = big * (0.5 + rng.uniform(-0.08, 0.08, 2))
    turn = rng.uniform(-0.25, 0.25)
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
