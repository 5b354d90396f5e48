r"""Super-resolution: a diffusion model whose network also receives the enlarged small image.

    python -m papers.superres train --factor 4 --data photos/ --image-size 64 --preset celeba64
    python -m papers.superres enlarge RUN small/        # writes results and comparisons
    python -m papers.superres colour OUT/ OUT-original/       # how far the colours have drifted

E-TSDM's super-resolution goes from 64 to 256 pixels. The known image is the mean over each factor x
factor block. Bicubic interpolation enlarges it, and the network receives it as further input
channels. The objective of train.py and all samplers work without a change; this file adds only the
conditioning.

Not here: real degradations (blur, noise, compression). The small image is an exact block mean.

B images, C channels, H = W their side in pixels; images in [-1, 1].
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import hashlib
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import sample
import train
from config import Config
from denoiser import Pixels
from support import distributed, files
from support.cli import flag, parse_into
from support.image_folder import ImageFolder, check_image_flags
from support.images import grid
from support.programs import ignore_write_errors, run_main


class LowRes(Pixels):
    """Pixels; the mean over each factor x factor block is known."""

    def __init__(self, shape, factor):
        super().__init__(shape)
        self.factor = factor
        if factor < 2 or shape[-1] % factor:
            raise ValueError(f"--factor {factor} must be at least 2 and divide --image-size "
                             f"{shape[-1]}")

    def shrink(self, images):
        """(B, C, H, W) -> (B, C, H/factor, W/factor), rounded to 256 levels like a file."""
        return data.to_float(data.to_uint8(F.avg_pool2d(images.float(), self.factor)))

    def enlarge(self, small):
        """Enlarge small images by bicubic interpolation: the network's input, and its baseline."""
        # antialias=True gives the kernel of Pillow and MATLAB (a = -1/2)
        large = F.interpolate(small, scale_factor=self.factor, mode="bicubic", antialias=True)
        return large.clamp(-1, 1)

    def conditioning(self, images):
        return self.enlarge(self.shrink(images))


def extend(denoiser, settings, extra):
    """Add the small image. denoiser.build_denoiser calls this for settings with a factor."""
    return denoiser.replace(space=LowRes(denoiser.shape, settings["factor"]))


# ------------------------------------------------------------------ train

@dataclass
class SuperResConfig(Config):
    factor: int = flag(4, "side of the image over side of the known image",
                       group="super-resolution")

    unused: ClassVar[tuple] = ("init",)
    prog: ClassVar[str] = "papers.superres train"
    usage: ClassVar[str] = "python -m papers.superres train [flags]"
    description: ClassVar[str] = "Train a super-resolution model. The same command resumes it."
    examples: ClassVar[str] = """\
  python -m papers.superres train --factor 4 --data photos/ --image-size 64 --preset celeba64
      from 16 to 64 pixels; then: python -m papers.superres enlarge photos-celeba64-sr4 small/"""

    def check(self):
        super().check()
        LowRes((self.channels, self.image_size, self.image_size), self.factor)

    def network(self):
        return dict(super().network(), in_channels=2 * self.channels)  # x_t and the known image

    def name_parts(self):
        preset, *rest = super().name_parts()
        return [preset, f"sr{self.factor}", *rest]

    def next_command(self):
        return f"python -m papers.superres enlarge {shlex.quote(self.name)} IMAGES"


class SuperResObjective(train.DiffusionObjective):
    """DiffusionObjective with a preview in groups of three: bicubic, result, original."""

    def preview(self, net, images, **arguments):
        results, _ = super().preview(net, images, **arguments)
        bicubic = data.to_uint8(self.denoiser.space.conditioning(data.to_float(images)))
        return torch.stack([bicubic, results, images], dim=1).flatten(0, 1), 3


# ------------------------------------------------------------------ enlarge

@dataclass
class EnlargeConfig(sample.SampleConfig):
    low_res: str = flag("", "images to enlarge: a file, folder, zip or array. Images of at least "
                        "the run's full size are shrunk first, as in training", positional="IMAGES")
    num: int | None = flag(None, "number of images; under torchrun write -n", short="-n",
                           shown="all; 64 of shapes")

    unused: ClassVar[tuple] = ("npz",)
    prog: ClassVar[str] = "papers.superres enlarge"
    usage: ClassVar[str] = "python -m papers.superres enlarge RUN IMAGES [flags]"
    description: ClassVar[str] = ("Enlarge images. Also write bicubic enlargements and, if the "
                                  "images were shrunk, the originals.")
    examples: ClassVar[str] = """\
  python -m papers.superres enlarge photos-tiny-sr4 small/ --out large
      writes large/, and the bicubic enlargements to large-bicubic/"""

    def check(self):
        if not self.low_res:
            raise ValueError("IMAGES are missing: python -m papers.superres enlarge RUN IMAGES")
        super().check()


class LowResInputs:
    """The images to enlarge, as the network receives them.

    Images of the run's small size stay unchanged. Images of at least the full size are originals:
    they are cropped to the full size and shrunk as in training, and the results can be compared
    with them. ValueError, OSError: images between these sizes, or unreadable images.
    """

    def __init__(self, source, denoiser):
        s, self.space = denoiser.settings, denoiser.space
        full, small = s["image_size"], s["image_size"] // s["factor"]
        try:
            # The small size first, because the reader pads IDX images up to the requested size.
            self.images = data.load(source, small, s["channels"])
            self.shrunk = source == "shapes" or self.images.sizes != {(small, small)}
            if self.shrunk:
                self.images = data.load(source, full, s["channels"])
        except (ValueError, OSError) as error:  # drop advice that is for train.py
            raise ValueError(f"IMAGES: {str(error).split('; --skip-bad-images')[0]}") from error
        least = min(self.images.sizes, key=min)
        if self.shrunk and min(least) < full:
            raise ValueError("IMAGES: {} has images of {}x{}. Give {}x{}, this run's small size, "
                             "or originals of at least {}x{}".format(source, *least, small, small,
                                                                     full, full))
        self.summary = self.images.summary + f", shrunk to {small}x{small}" * self.shrunk
        if self.shrunk and self.images.sizes != {(full, full)}:
            self.summary += "; larger images are cropped, and so are the originals for comparison"

    def conditioning(self, indices, device="cpu"):
        """The small images, enlarged: (b, C, H, W)."""
        images = data.to_float(torch.stack([self.images[i] for i in indices]).to(device))
        return self.space.conditioning(images) if self.shrunk else self.space.enlarge(images)

    def comparisons(self, indices):
        """{name: uint8 (b, C, H, W)}: bicubic and, if known, original."""
        found = dict(bicubic=data.to_uint8(self.conditioning(indices)))
        if self.shrunk:
            found["original"] = torch.stack([self.images[i] for i in indices])
        return found

    def digest(self):
        """A short hash of the pixels of the first images. It does not depend on --num."""
        digest = hashlib.sha256()
        for i in range(min(len(self.images), 1024)):
            digest.update(self.images[i].numpy().tobytes())
        return digest.hexdigest()[:16]


def write_comparisons(folder, inputs, num):
    """Fill OUT-bicubic/ and OUT-original/ with images of the same names as the results."""
    for i in range(num):
        for name, images in inputs.comparisons([i]).items():
            path = folder.beside(f"-{name}") / folder.path(i).name
            files.save_png(path, grid(images, 1), sweep=False)


def open_comparison_folders(folder, inputs):
    """Make the folders for comparisons, with the settings.json of the results. ValueError: such a
    folder holds something else."""
    settings = (folder.out / "settings.json").read_text(encoding="utf-8")
    for name in inputs.comparisons([0]):
        other = folder.beside(f"-{name}")
        note = other / "settings.json"
        if other.exists() and (not other.is_dir() or any(other.iterdir())) and (
                not note.is_file() or note.read_text(encoding="utf-8") != settings):
            raise ValueError(f"--out {folder.out}: its comparisons go to {other}, which holds "
                             "something else. Choose another folder")
        other.mkdir(parents=True, exist_ok=True)
        files.clean_stale(other)
        files.write_text(note, settings)


def enlarge(argv=None):
    """The program `enlarge`."""
    config = parse_into(EnlargeConfig, argv)
    tf32 = config.precision == "tf32"
    with distributed.init(tf32, config.deterministic, device=config.device) as dist:
        denoiser, arguments = sample.open_and_print(config, dist)
        if not denoiser.settings.get("factor"):
            raise ValueError(f"{denoiser.folder.name} is not a super-resolution run: give a run of "
                             "python -m papers.superres train")
        inputs = dist.main_first(lambda: LowResInputs(config.low_res, denoiser))
        total = len(inputs.images)
        config.num = min(config.num or (64 if total >= data.INFINITE else total), total)
        dist.print0(f"images to enlarge: {config.num} of {inputs.summary}")
        tag = f"{sample.tag(config, denoiser.step)}-{Path(config.low_res).stem}"
        folder = ImageFolder(config.out or denoiser.folder / "generated" / tag, dist)
        check_image_flags(config)
        record = {**sample.sampling_record(config, denoiser, arguments),
                  "low_res": dist.on_main(inputs.digest)}

        def prepare():
            folder.open(record)
            open_comparison_folders(folder, inputs)

        def make_images(indices):
            seen = denoiser.replace(conditioning=inputs.conditioning(indices, dist.device))
            return sample.draw(seen, indices, config.seed, dist.device, arguments)

        dist.on_main(prepare)
        folder.fill(config.num, make_images, config.batch_size)
        if dist.is_main:
            folder.summarize(config.num)
            write_comparisons(folder, inputs, config.num)
            write_grid(folder, inputs, config.num)
            if inputs.shrunk:
                print(f"next: python metrics.py psnr {shlex.quote(str(folder.out))} "
                      f"{shlex.quote(str(folder.beside('-original')))}")


def write_grid(folder, inputs, num):
    """Write a grid next to the folder: bicubic, result and, if known, original, side by side."""
    n = min(num, 64)
    results = torch.from_numpy(folder.read(n)).permute(0, 3, 1, 2)
    found = inputs.comparisons(range(n))
    parts = [found["bicubic"], results] + ([found["original"]] if inputs.shrunk else [])
    columns = len(parts) * -(-max(1, round(n**0.5)) // 2)
    files.save_png(folder.beside(".png"), grid(torch.stack(parts, dim=1).flatten(0, 1), columns))


# ------------------------------------------------------------------ colour

@dataclass
class ColourConfig:
    images: tuple[str, ...] = flag((), "the folder of enlarged images, and that of the originals",
                                   positional="RESULTS ORIGINALS", nargs="+")
    json: bool = flag(False, "print one JSON object (default: a line of text)")

    prog: ClassVar[str] = "papers.superres colour"
    usage: ClassVar[str] = "python -m papers.superres colour RESULTS ORIGINALS [--json]"
    description: ClassVar[str] = ("Measure the difference of mean colours between enlarged images "
                                  "and originals, the bias in E-TSDM's section 5.5.")
    examples: ClassVar[str] = """\
  python -m papers.superres enlarge RUN photos/ --out large/
  python -m papers.superres colour large/ large-original/"""

    def check(self):
        if len(self.images) != 2:
            raise ValueError(f"RESULTS ORIGINALS: give two folders, not {len(self.images)}")


def colour_bias(results, originals):
    """Two folders of PNGs with equal names -> (mean over images and channels of |mean over pixels
    of result − original|, number of images), in levels of 0 to 255. The small image determines the
    mean over pixels, so a good result keeps it. ValueError: the PNGs are not pairs."""
    names = sorted(path.name for path in Path(results).glob("*.png"))
    if not names or names != sorted(path.name for path in Path(originals).glob("*.png")):
        raise ValueError(f"RESULTS {results}: it must hold PNGs with the same names as {originals}")
    shifts = []
    for name in names:
        a, b = (np.asarray(Image.open(Path(x) / name), float) for x in (results, originals))
        if a.shape != b.shape:
            raise ValueError(f"RESULTS {results}: {name} has another shape than in {originals}")
        shifts.append((a - b).mean((0, 1)))
    return float(np.abs(shifts).mean()), len(names)


def colour(argv=None):
    """The program `colour`."""
    config = parse_into(ColourConfig, argv)
    value, n = colour_bias(*config.images)
    print(json.dumps(dict(metric="colour bias", value=value)) if config.json else
          f"colour bias {value:.3f} of 255 levels | {n:,} pairs of images")


def main(argv=None):
    command, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if command == "train":
        train.main(rest, SuperResObjective, SuperResConfig)
    elif command == "enlarge":
        enlarge(rest)
    elif command == "colour":
        colour(rest)
    elif command in ("-h", "--help"):
        print("python -m papers.superres train [flags]\n"
              "python -m papers.superres enlarge RUN IMAGES [flags]\n"
              "python -m papers.superres colour RESULTS ORIGINALS\n\nEach has --help.")
    else:
        raise ValueError(f"{command}: the programs are train, enlarge and colour")


if __name__ == "__main__":
    ignore_write_errors()
    run_main(main)
