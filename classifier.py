r"""A small image classifier whose features stand in for Inception's, where those say nothing.

    x (N, 3, H, W) -> 4 convolutions, twice halved -> mean over positions: features (N, 64)
        -> 10 or so classes: only trained on, not exported

FID sees images through a network trained on ImageNet at 299x299. On 16x16 pictures of clothes, or
without its weights, a classifier of that very data says more: its pooled features separate what
matters in that set. The Fréchet distance in them is named after the file, FD(NAME.pt2), and is
never called FID: values compare only with others by the same file.

What this file does not do: compete. It is the smallest network whose features are worth a distance,
and reports its accuracy on images that it has not seen, so that one can judge.

    python classifier.py fashion-mnist/ --image-size 16 --channels 1 --out fashion16.pt2
    python metrics.py fid RUN fashion-mnist/ --features fashion16.pt2
    python -c "import classifier; print(classifier.Classifier(classes=10))"

N images, K classes; x float32 (N, 3, H, W) in [-1, 1], gray as three equal channels; labels (N,).
"""

import runtime  # isort: skip  (before torch: it sets OpenMP's spinning)

import argparse
import shlex
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import files
import readers

FEATURES = 64
SHAPES = 10_000  # drawings, of the endless set


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
    """What is exported for distances: the classifier up to its pooled features."""

    def __init__(self, classifier):
        super().__init__()
        self.classifier = classifier

    def forward(self, x):
        return self.classifier.features(x)


def load_labelled(source, size, channels, progress=False):
    """-> (images uint8 (N, C, H, W), labels (N,) int64, names of the classes).

    source: an IDX folder or file with its labels beside it, CIFAR-10, a folder or zip with one
    folder for each class, or the built-in shapes. ValueError: images without labels.
    """
    dataset = data.load(source, size, channels, progress=progress)
    if isinstance(dataset, data.Shapes):
        labels = torch.tensor([dataset.label(i) for i in range(SHAPES)])
        names = sorted(set(labels.tolist()))
        return torch.stack([dataset[i] for i in range(SHAPES)]), labels, names
    if not isinstance(dataset, data.Array):
        raise ValueError(f"{source} does not fit into memory, or never ends: it has no labels here")
    if dataset.paths:
        folders = [str(Path(path).parent) for path in dataset.paths]
        names = sorted(set(folders))
        labels = torch.tensor([names.index(folder) for folder in folders])
    else:
        path = readers.cifar_archive() if source == "cifar10" else source
        labels = torch.from_numpy(readers.read_labels(path)).long()
        names = [str(i) for i in range(max(labels.tolist(), default=-1) + 1)]
    if len(names) < 2 or len(labels) != len(dataset):
        raise ValueError(f"{source}: {len(dataset):,} images with {len(labels):,} labels of "
                         f"{len(names)} classes cannot be learnt: images of a class belong in "
                         "a folder of their own, or the set into IDX files or CIFAR-10's archives")
    return dataset.images, labels, names


def train(images, labels, classes, epochs=5, batch=128, lr=2e-3, seed=0, device="cpu"):
    """A Classifier in eval mode, trained by Adam, whose learning rate falls to 0 like a cosine."""
    torch.manual_seed(seed)
    net = Classifier(classes).to(device)
    steps = epochs * max(len(images) // batch, 1)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    g = runtime.generator(seed)
    with tqdm(total=steps, desc="training", unit="step", dynamic_ncols=True) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=g)
            for chunk in order.split(batch)[:max(len(images) // batch, 1)]:
                x = data.to_float(images[chunk]).expand(-1, 3, -1, -1).to(device)
                loss = F.cross_entropy(net(x), labels[chunk].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                bar.update()
    return net.eval()


@torch.no_grad()
def accuracy(net, images, labels, batch=500):
    """Share of images, uint8 (N, C, H, W), whose class the network names."""
    device, right = next(net.parameters()).device, 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        x = data.to_float(x).expand(-1, 3, -1, -1).to(device)
        right += (net(x).argmax(1).cpu() == y).sum().item()
    return right / len(images)


def export(net, path, size, logits=False):
    """Its features, or logits, to a file that needs none of this code: batches and sides of any
    length."""
    x, net = torch.zeros(2, 3, size, size), net.cpu()
    program = torch.export.export((net if logits else Features(net)).eval(), (x,), dynamic_shapes=(
        {0: torch.export.Dim("N"), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},))
    with files.atomic_write(path) as temporary, open(temporary, "wb") as f:
        torch.export.save(program, f)


def parse(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="classifier.py", usage="python classifier.py DATA [flags]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Train a small classifier, and export its features for metrics.py --features.",
        epilog="""examples
  python classifier.py fashion-mnist/ --image-size 16 --channels 1 --out fashion16.pt2
      the folder with the IDX files; two minutes on a CPU core
  python classifier.py cifar10 --epochs 10 --out cifar10.pt2
  python classifier.py cifar10 --logits --out classes.pt2
      classes instead of features: for `metrics.py is RUN --features classes.pt2`, a score like
      Inception's in this set's own classes
  python classifier.py animals/ --image-size 64
      a folder with one folder for each class""")
    add = parser.add_argument
    add("data", metavar="DATA", help="labelled images: IDX, CIFAR-10, a folder of class folders, "
        "shapes")
    add("--image-size", type=int, help="side in pixels (default: the images' own)")
    add("--channels", type=int, default=3, choices=(1, 3), help="1: turned gray (default: 3)")
    add("--epochs", type=int, default=5, help="(default: 5)")
    add("--logits", action="store_true", help="export the classes, for metrics.py is, instead of "
        "the features")
    add("--seed", type=int, default=0, help="of weights and order (default: 0)")
    add("--out", type=Path, default=Path("classifier.pt2"), help="(default: classifier.pt2)")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        raise ValueError(f"--epochs must be at least 1, not {args.epochs}")
    if not 0 <= args.seed < 2**62:  # as of train.py
        raise ValueError(f"--seed must not be negative or beyond 2^62, and is {args.seed}")
    if args.out.suffix != ".pt2" or not args.out.resolve().parent.is_dir():
        raise ValueError(f"--out {args.out} must be a .pt2 in a folder that exists")
    return args


def main(argv=None):
    args = parse(argv)
    with runtime.setup(tf32=False) as process:
        if not process.first:  # minutes of work: one process does it
            return
        images, labels, names = load_labelled(args.data, args.image_size, args.channels, True)
        order = torch.randperm(len(images), generator=runtime.generator(args.seed, 1))
        held = max(len(images) // 10, 1)  # a random tenth is kept back, for the accuracy
        test, rest = order[:held], order[held:]
        net = train(images[rest], labels[rest], len(names), args.epochs, seed=args.seed,
                    device=process.device)
        share = accuracy(net, images[test], labels[test])
        export(net, args.out, images.shape[-1], args.logits)
        print(f"{len(rest):,} images of {len(names)} classes, {images.shape[-1]} pixels wide; "
              f"{share:.1%} of {held:,} held-out images are named right")
        what, use = ("classes", ["is", "RUN"]) if args.logits else (
            "features", ["fid", "RUN", args.data])
        command = shlex.join(["python", "metrics.py", *use, "--features", str(args.out)])
        print(f"{what}: {args.out.resolve()}\nnext: {command}")


if __name__ == "__main__":
    runtime.run_program(main)
