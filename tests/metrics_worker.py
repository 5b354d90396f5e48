"""metrics.py with a small network in Inception's place, for test_metrics.py, also under torchrun.

python metrics_worker.py '[["fid", "a", "b"], ["is", "a"]]'     one call after the other, as --json
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import inception  # noqa: E402
import metrics  # noqa: E402
import runtime  # noqa: E402


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


if __name__ == "__main__":
    inception.load, inception.SHA256 = load, "5" * 64
    with runtime.setup(tf32=False) as process:  # once: a group cannot be left and joined again
        runtime.setup = lambda **how: contextlib.nullcontext(process)
        for words in json.loads(sys.argv[1]):
            metrics.main(words)
