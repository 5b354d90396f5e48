"""metrics.py with a small network in Inception's place, for test_metrics.py, also under torchrun.

python metrics_worker.py '[["fid", "a", "b"], ["is", "a"]]'     one call after the other, as --json
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import metrics  # noqa: E402
from support import distributed, inception  # noqa: E402


class Small(torch.nn.Module):
    """uint8 (N, 3, H, W) -> (features (N, 5), logits (N, 7)), of the images' first moments."""

    def fold(self):
        return self

    def forward(self, images):
        x = images.double().flatten(2) / 255  # (N, 3, H W)
        half = x.shape[2] // 2
        features = torch.cat([x.mean(2), x[:, :2, :half].square().mean(2)], 1)
        mix = torch.arange(35, dtype=torch.float64).sin().view(5, 7)
        return features.float(), 3 * (200 * features @ mix).sin()  # unlike classes


def load(path=None, device="cpu"):
    return Small().to(device), "5" * 64


def means(x):
    """The mean of each channel: (N, 3)."""
    return x.mean((2, 3))


def maps(x):
    """Means of the four quarters of images of 8x8: (N, 3, 2, 2), to be flattened."""
    return torch.nn.functional.avg_pool2d(x, 4)


def export(path, forward, size=8, channels=3, dynamic="NHW"):
    """Save a network for images of this size; the axes in `dynamic` may have any length."""
    net = type("Net", (torch.nn.Module,), dict(forward=staticmethod(forward)))()
    axes = {axis: torch.export.Dim(n) for axis, n in ((0, "N"), (2, "H"), (3, "W")) if n in dynamic}
    images = torch.zeros(4, channels, size, size)
    torch.export.save(torch.export.export(net, (images,), dynamic_shapes=(axes,)), path)


if __name__ == "__main__":
    inception.open_net, inception.SHA256 = load, "5" * 64
    with distributed.init(tf32=False) as dist:  # once: a group cannot be left and joined again
        distributed.init = lambda *_, **__: contextlib.nullcontext(dist)
        for words in json.loads(sys.argv[1]):
            metrics.main(words)
