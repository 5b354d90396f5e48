r"""A folder of numbered PNGs. Several processes fill it, and an interrupted program continues it.

    folder = ImageFolder(out, dist)
    folder.open(record)                            # settings.json: all that the images depend on
    folder.fill(num, make_images, batch_size)      # writes the missing images
    folder.summarize(num, npz=True)                # a grid, and an .npz for evaluators

It never deletes an image, and it refuses a folder of images with other settings.

Not here: sampling (sample.py), reading sets of images (image_files.py).

    python -c "from support.image_folder import ImageFolder; print(ImageFolder('a', None).path(3))"
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from support import files, rng
from support.cli import flag_name
from support.image_files import MAX_SIDE
from support.images import grid


def check_image_flags(config):
    """ValueError: --num, --batch-size, --seed or --image-size is out of range."""
    for name, low, high in (("num", 1, rng.MAX_IMAGES), ("batch_size", 1, rng.MAX_IMAGES),
                            ("image_size", 1, MAX_SIDE), ("seed", 0, rng.MAX_SEEDS - 1)):
        value = getattr(config, name, None)
        if value is not None and not low <= value <= high:
            raise ValueError(f"{flag_name(name)} must be from {low} to {high}, not {value}")


class ImageFolder:
    """out: its path; dist: distributed.Distributed. The grid and the .npz go next to it."""

    def __init__(self, out, dist):
        out = Path(out)
        self.out, self.dist = out if out.name not in ("", "..") else out.resolve(), dist

    def path(self, i):
        return self.out / f"{i:06d}.png"

    def beside(self, suffix):
        """A path next to the folder. Inside the folder are only images of the set."""
        return self.out.with_name(self.out.name + suffix)

    def open(self, record, npz=False):
        """Create and lock the folder, or continue in it if its images have the same record.
        ValueError: it holds other images or other files. Rank 0 only."""
        out, note = self.out, self.out / "settings.json"
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file: give a folder")
        # Hidden files do not count: a killed process leaves one.
        if not note.exists() and (self.beside(".png").exists() or any(out.glob("[!.]*"))):
            raise ValueError(f"--out {out} (or {out.name}.png next to it) was not written by this "
                             "program: choose another folder")
        if npz and self.beside(".npz").exists() and not is_packed(self.beside(".npz")):
            raise ValueError(f"--npz would replace {self.beside('.npz')}, which is not a pack of "
                             "images: choose another --out")
        record = json.loads(json.dumps(record, default=torch.Tensor.tolist))  # to compare as JSON
        out.mkdir(parents=True, exist_ok=True)
        self.dist.lock(out)
        try:
            same = not note.exists() or json.loads(note.read_text(encoding="utf-8")) == record
        except ValueError:  # not JSON
            same = False
        if not same:
            raise ValueError(f"--out {out} holds images with other settings (see its settings.json"
                             "): choose another folder, or delete this one")
        files.clean_stale(out)
        files.write_text(note, json.dumps(record, indent=1) + "\n")

    def fill(self, num, make_images, batch_size):
        """Write the missing images below num, divided among the processes. make_images: a list of
        indices -> uint8 (b, C, H, W)."""
        # Only rank 0 lists them: images finished meanwhile would make the lists differ.
        missing = self.dist.broadcast([i for i in range(num) if not self.path(i).exists()])
        if len(missing) < num:
            self.dist.print0(f"{num - len(missing)} of {num} images exist already")
        mine = missing[self.dist.rank::self.dist.world_size]
        with (ThreadPoolExecutor(8) as pool,  # an image of 256 pixels takes 10 ms
              tqdm(total=len(mine), unit="image", disable=not self.dist.is_main,
                   dynamic_ncols=True) as bar):
            for start in range(0, len(mine), batch_size):
                batch = mine[start:start + batch_size]
                list(pool.map(self.write, batch, make_images(batch)))
                bar.update(len(batch))
        self.dist.barrier()

    def write(self, i, image):
        """Write one image, uint8 (C, H, W)."""
        files.save_png(self.path(i), grid(image[None], 1), sweep=False)

    def read(self, n):
        """Read images 0 to n - 1, of all processes: uint8 (n, H, W, C)."""
        images = np.stack([np.asarray(Image.open(self.path(i))) for i in range(n)])
        return images.reshape(*images.shape[:3], -1)

    def summarize(self, num, npz=False):
        """Write the grid and the .npz, and print all paths. ValueError: images are missing. Rank 0
        only."""
        if missing := sum(not self.path(i).exists() for i in range(num)):
            raise ValueError(f"--out {self.out}: {missing} of {num} images are missing. Do all "
                             "machines share this folder? Run the same command to add them")
        first = torch.from_numpy(self.read(min(num, 64))).permute(0, 3, 1, 2)
        files.save_png(self.beside(".png"), grid(first, max(1, round(len(first) ** 0.5))))
        # A colour cast of all images is the most common fault of samplers, and gives no error.
        means = ", ".join(f"{m:.1f}" for m in first.double().mean((0, 2, 3)))
        print(f"{num} images; mean of each channel: {means} of 255\n"
              f"images: {self.out.resolve()}\ngrid: {self.beside('.png').resolve()}")
        if (more := len(list(self.out.glob("[0-9]*.png"))) - num) > 0:
            print(f"note: the folder holds {more} more images from an earlier call")
        if npz:  # arr_0: the key that ADM's evaluator reads
            # All existing images from 0 on, so that a smaller --num does not shrink a pack.
            count = next(i for i in range(num, 2**31) if not self.path(i).exists())
            files.save_npz(self.beside(".npz"), arr_0=self.read(count))
            print(f"npz: {self.beside('.npz').resolve()}")


def is_packed(path):
    """True if an .npz holds only arr_0, as summarize() writes it."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive.files == ["arr_0"]
    except Exception:  # of zip, zlib, NumPy
        return False
