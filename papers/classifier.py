r"""A small image classifier. Its features replace Inception's if those do not suit the images.

    x (N, 3, H, W) -> 4 convolutions, two with stride 2 -> mean over positions: features (N, 64)
        -> K classes, for training; exported only with --logits

FID uses a network that was trained on ImageNet at 299x299. For 16x16 images of clothes, or without
Inception's weights, a classifier of the same data is a better choice: its pooled features separate
the classes of this set. The Fréchet distance in these features is named FD(NAME.pt2), after the
file, and not FID. Compare values only if they use the same file.

Not here: a strong classifier. This is the smallest network with useful features. The program prints
its accuracy on held-out images.

    python -m papers.classifier fashion-mnist/ --image-size 16 --channels 1 --out fashion16.pt2
    python metrics.py fid RUN fashion-mnist/ --features fashion16.pt2
    python -c "from papers import classifier; print(classifier.Classifier(classes=10))"

N images, K classes; x float32 (N, 3, H, W) in [-1, 1], gray as three equal channels; labels (N,).
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from support import distributed, files, image_files, readers, rng
from support.cli import device_flag, flag, parse_into
from support.programs import run_main

FEATURES = 64
SHAPES = 10_000  # images taken from the endless set of drawings


class Classifier(nn.Module):
    """x (N, 3, H, W) -> logits (N, K); features(x) -> (N, 64)."""

    def __init__(self, classes):
        super().__init__()
        layers = []
        for c_in, c_out, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 1), (64, FEATURES, 2)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out),
                       nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.out = nn.Linear(FEATURES, classes)

    def features(self, x):
        return self.convolutions(x).mean((2, 3))

    def forward(self, x):
        return self.out(self.features(x))


class Features(nn.Module):
    """The part of the classifier that is exported for distances: all up to the pooled features."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, x):
        return self.classifier.features(x)


def load_labelled(source, size, channels, progress=False):
    """Load a labelled set -> (images uint8 (N, C, H, W), labels (N,) int64, class names).

    source: an IDX folder, an IDX file next to its labels, CIFAR-10, a folder or zip with one folder
    per class, or the built-in shapes. ValueError: images without labels.
    """
    dataset = data.load(source, size, channels, progress=progress)
    if isinstance(dataset, data.Shapes):
        chosen = [data.choose_shape((dataset.seed, i))[1:] for i in range(SHAPES)]
        labels = torch.tensor([int(kind * len(data.SHAPE_COLOURS) + colour)
                               for kind, colour in chosen])
        names = sorted(set(labels.tolist()))
        return torch.stack([dataset[i] for i in range(SHAPES)]), labels, names
    if not isinstance(dataset, image_files.Array):
        raise ValueError(f"{source} does not fit into memory: use fewer or smaller images")
    if dataset.paths:
        folders = [str(Path(path).parent) for path in dataset.paths]
        names = sorted(set(folders))
        labels = torch.tensor([names.index(folder) for folder in folders])
    else:
        path = readers.cifar_archive() if source == "cifar10" else source
        labels = torch.from_numpy(readers.read_labels(path)).long()
        names = [str(i) for i in range(max(labels.tolist(), default=-1) + 1)]
    if len(names) < 2 or len(labels) != len(dataset):
        raise ValueError(f"{source}: {len(dataset):,} images, {len(labels):,} labels and "
                         f"{len(names)} classes do not fit. Use a folder per class, IDX or "
                         "CIFAR-10 files")
    return dataset.images, labels, names


def to_network_input(images):
    """uint8 (N, C, H, W), C = 1 or 3 -> float32 (N, 3, H, W) in [-1, 1]."""
    return data.to_float(images).expand(-1, 3, -1, -1)


def fit(images, labels, classes, epochs=5, batch=128, lr=2e-3, seed=0, device="cpu"):
    """Train a Classifier with Adam and a cosine learning rate -> the network in eval mode."""
    torch.manual_seed(seed)
    net = Classifier(classes).to(device)
    steps = epochs * max(len(images) // batch, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    g = rng.generator(seed)
    with tqdm(total=steps, desc="training", unit="step", dynamic_ncols=True) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=g)
            for chunk in order.split(batch)[:max(len(images) // batch, 1)]:
                logits = net(to_network_input(images[chunk]).to(device))
                loss = F.cross_entropy(logits, labels[chunk].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                bar.update()
    return net.eval()


@torch.no_grad()
def accuracy(net, images, labels, batch=500):
    """Share of the images, uint8 (N, C, H, W), that the network classifies correctly."""
    device, correct = next(net.parameters()).device, 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        predicted = net(to_network_input(x).to(device)).argmax(1).cpu()
        correct += (predicted == y).sum().item()
    return correct / len(images)


def export(net, path, size, logits=False):
    """Export features or logits with torch.export, for any batch size and image size. The file
    works without this code."""
    x, net = torch.zeros(2, 3, size, size), net.cpu()
    program = torch.export.export((net if logits else Features(net)).eval(), (x,), dynamic_shapes=(
        {0: torch.export.Dim("N"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},))
    with files.atomic_write(path) as temporary, open(temporary, "wb") as f:
        torch.export.save(program, f)


@dataclass
class ClassifierConfig:
    data: str = flag("", "labelled images: IDX, CIFAR-10, a folder of class folders, shapes",
                     positional="DATA", group="images")
    image_size: int | None = flag(None, "side in pixels", shown="the images' own")
    channels: int = flag(3, "1: convert to gray", choices=(1, 3))
    epochs: int = flag(5, "passes over the images", group="training")
    device: str = device_flag()
    logits: bool = flag(False, "export class logits (for metrics.py is) instead of features")
    seed: int = flag(0, "seed of the weights and the order")
    out: Path = flag(Path("classifier.pt2"), "the file to write")

    prog: ClassVar[str] = "papers.classifier"
    usage: ClassVar[str] = "python -m papers.classifier DATA [flags]"
    description: ClassVar[str] = ("Train a small classifier and export its features for "
                                  "metrics.py --features.")
    examples: ClassVar[str] = """\
  python -m papers.classifier fashion-mnist/ --image-size 16 --channels 1 --out fashion16.pt2
      a folder with the IDX files; two minutes on a CPU core
  python -m papers.classifier cifar10 --epochs 10 --out cifar10.pt2
  python -m papers.classifier cifar10 --logits --out classes.pt2
      logits for `metrics.py is RUN --features classes.pt2`: an Inception Score in the classes of
      this set
  python -m papers.classifier animals/ --image-size 64
      a folder with one folder per class"""

    def check(self):
        if not self.data:
            raise ValueError("DATA is missing: python -m papers.classifier DATA")
        if self.epochs < 1:
            raise ValueError(f"--epochs must be at least 1, not {self.epochs}")
        if not 0 <= self.seed < 2**62:  # as in train.py
            raise ValueError(f"--seed must be 0 or more and below 2^62, not {self.seed}")
        if self.out.suffix != ".pt2" or not self.out.resolve().parent.is_dir():
            raise ValueError(f"--out {self.out} must be a .pt2 file in an existing folder")


def main(argv=None):
    config = parse_into(ClassifierConfig, argv)
    with distributed.init(tf32=False, device=config.device) as dist:
        if not dist.is_main:  # takes minutes: one process is enough
            return
        images, labels, names = load_labelled(config.data, config.image_size, config.channels, True)
        order = torch.randperm(len(images), generator=rng.generator(config.seed, 1))
        held_out = max(len(images) // 10, 1)  # a random tenth, for the accuracy
        test, rest = order[:held_out], order[held_out:]
        net = fit(images[rest], labels[rest], len(names), config.epochs, seed=config.seed,
                  device=dist.device)
        share = accuracy(net, images[test], labels[test])
        export(net, config.out, images.shape[-1], config.logits)
        print(f"{len(rest):,} images of {len(names)} classes, {images.shape[-1]} pixels wide; "
              f"{share:.1%} of {held_out:,} held-out images are classified correctly")
        what, use = ("classes", ["is", "RUN"]) if config.logits else (
            "features", ["fid", "RUN", config.data])
        command = shlex.join(["python", "metrics.py", *use, "--features", str(config.out)])
        print(f"{what}: {config.out.resolve()}\nnext: {command}")


if __name__ == "__main__":
    run_main(main)
