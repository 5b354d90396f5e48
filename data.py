r"""Images in: from files of almost any kind to batches of uint8 tensors in a fixed order.

Every picture ends as a uint8 tensor (C, H, W), 0..255, with H = W = size, C = 1 or 3, and stays
uint8 until the trainer calls `to_float`. Pictures are checked once, at the start (`load`), and
the order of training is a pure function of the position in the stream (`batch_indices`). A data
set's `digest` says which images it has, wherever they lie.

What this file does not do: labels, or augmentation (the trainer flips). What a file's pixels mean
is pictures.py's affair; sets that are one array (CIFAR-10, IDX, NumPy) are opened by readers.py.

N images, C channels, H height, W width, n = len(data set), e = epoch.

    python -c "import data; print(data.load('shapes', 32, 3).summary)"
    python -c "import data; print(data.load('photos.zip', 64, 3, progress=True).summary)"
    python -c "import data; print(data.batch_indices(n=10, start=8, batch=4, seed=0))"
"""
import atexit
import hashlib
import io
import itertools
import math
import os
import queue
import re
import sys
import threading
import time
import warnings
import zipfile
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import pictures
import readers
from pictures import bare_png, missing_pixels, prepare
from readers import reason, shown

# In any part of the name; "./" and "../", which a zip may hold, are no names and hide nothing.
HIDDEN = re.compile(r"(^|[\\/])(\.(?!\.?[\\/])|__MACOSX([\\/]|$))")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# The contents are held to the same list: Pillow would run Ghostscript on an EPS called cat.png.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
LARGEST = 2**30  # bytes of a file or member: beyond are hardly images that Pillow would open
LARGEST_SIDE = 8192  # pixels; a batch of such images fills the memory of any machine
AHEAD = 4  # batches that threads decode before the trainer asks for them
ENDLESS = 2**31  # this many images or more: too many to permute, never seen twice anyway


# ------------------------------------------------------------------ pixels and numbers

def to_float(u8):
    """uint8 0..255, any shape -> float32 in [-1, 1]: 0 is -1, 255 is exactly +1."""
    return u8.float() / 127.5 - 1


def to_uint8(x):
    """Float in [-1, 1], any shape -> uint8, the exact inverse of `to_float`; outside is clamped.

    (x + 1) * 127.5 is rounded, half up: floor(x * 127.5 + 128). A bare .to(uint8) would truncate
    instead, and darken every image by half a level on average.
    """
    # .float() first: in bfloat16 the +128 would leave only every other level.
    return (x.float().clamp(-1, 1) * 127.5 + 128).floor().clamp(0, 255).to(torch.uint8)


# ------------------------------------------------------------------ one image

def grid(images, columns):
    """uint8 images (N, C, H, W) side by side, row by row -> one PIL image; empty places are
    white."""
    n, c, h, w = images.shape
    sheet = torch.full((-(-n // columns), columns, c, h, w), 255, dtype=torch.uint8)
    sheet.flatten(0, 1)[:n] = images.cpu()
    pixels = sheet.permute(0, 3, 1, 4, 2).reshape(-1, columns * w, c)  # (rows H, columns W, C)
    return Image.fromarray(pixels.squeeze(2).numpy() if c == 1 else pixels.numpy())


SHAPE_COLOURS = ((214, 48, 49), (46, 160, 67), (39, 94, 214), (245, 166, 35))
SHAPE_NAMES = ("circle", "square", "triangle", "star")


def draw_shape(seed, size=32):
    """One anti-aliased coloured shape on a plain light background -> uint8 (size, size, 3)."""
    rng, kind, colour = choose_shape(seed)
    colour = SHAPE_COLOURS[colour]
    big = 4 * size  # drawn four times too large, then averaged down: anti-aliasing
    radius = big * rng.uniform(0.32, 0.40)
    cx, cy = big * (0.5 + rng.uniform(-0.05, 0.05, 2))
    turn = rng.uniform(-0.12, 0.12)
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


# ------------------------------------------------------------------ data sets

def choose_shape(seed):
    """-> (generator of the rest, index of the name, index of the colour)."""
    rng = np.random.default_rng(seed)
    return rng, rng.integers(len(SHAPE_NAMES)), rng.integers(len(SHAPE_COLOURS))


class Shapes:
    """Endless drawings, none ever stored: image i depends on (seed, i) and on nothing else."""

    def __init__(self, size, channels, seed=0):
        self.size, self.channels, self.seed = size, channels, seed
        self.summary = f"endless shapes -> {channels}x{size}x{size}, drawn on the fly, seed {seed}"
        self.digest = f"shapes, seed {seed}"

    def __len__(self):
        return ENDLESS

    def __getitem__(self, i):
        drawing = Image.fromarray(draw_shape((self.seed, int(i)), self.size))
        return prepare(drawing, self.size, self.channels)

    def label(self, i):
        """One of 16 classes: which shape, in which colour."""
        _, kind, colour = choose_shape((self.seed, int(i)))
        return int(kind * len(SHAPE_COLOURS) + colour)


class Array:
    """Images in memory: one uint8 tensor (N, C, H, W); `paths` of the files they were, if any."""

    def __init__(self, images, summary="", paths=()):
        self.images, self.summary, self.paths = images, summary, list(paths)

    @cached_property
    def digest(self):
        """A short hash of the pixels. `scan` puts that of the listing in its place."""
        found = hashlib.sha256(str(tuple(self.images.shape)).encode())  # a gigabyte takes a second
        found.update(np.ascontiguousarray(self.images))
        return found.hexdigest()[:16]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


class Files:
    """Image files read when asked for; paths are members of the zip `archive` if one is given.

    Several threads may read at the same time. ValueError names a file that has gone bad.
    """

    def __init__(self, paths, size, channels, archive=None, others=""):
        self.paths, self.size, self.channels = list(paths), size, channels
        self.archive, self.others, self._zip = archive, others, None
        self.summary = self.digest = ""
        # What Pillow warns of, the scan has looked at. Not a catch_warnings around each image: it
        # swaps the filters of the whole process, and of two threads the later puts back the wrong.
        warnings.filterwarnings("ignore", module="PIL")

    def __len__(self):
        return len(self.paths)

    def content(self, i):
        """The bytes of file i."""
        if self.archive is None:
            content = readers.content(self.paths[i], LARGEST)
        else:
            if self._zip is None:  # two threads may both open it: one of the two is kept
                archive = zipfile.ZipFile(self.archive)
                self._zip = archive, Counter(member.filename for member in archive.infolist())
            archive, names = self._zip  # its members share the open file under a lock
            if names[self.paths[i]] > 1:  # a zip looks members up by name: one would be used twice
                raise ValueError(f"{names[self.paths[i]]} members of the zip have this name")
            if (size := archive.getinfo(self.paths[i]).file_size) > LARGEST:
                raise ValueError(f"{size:,} bytes are too many for an image")
            # In pieces: asked for all, zipfile inflates 2 GiB of a member that declares 1 KiB.
            with archive.open(self.paths[i]) as file:
                content = b"".join(iter(lambda: file.read(2**16), b""))
        if not content:
            raise ValueError("empty file")
        return content

    def read(self, i, check=False):
        """-> (Pillow mode, (width, height), uint8 tensor); any exception that Pillow can raise.

        The mode ends with "*" if the file has 16 bits and is nearly black.
        """
        content = bare_png(self.content(i))
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if check and image.format == "PNG" and (missing := missing_pixels(content)):
                raise ValueError(f"{missing:,} bytes of pixels are missing")
            deep = image.format in ("PNG", "TIFF", "PPM") and ";16" in str(image.tile)
            prepared = prepare(image, self.size, self.channels)
            # Cameras of 12 bits write 0..4095 into 16, which are levels 0..16 of 255. The file
            # does not say that it has 12, so the pixels stay; the summary counts such files.
            dark = deep and 0 < prepared.max() <= 16
            return image.mode + "*" * dark, image.size, prepared

    def __getitem__(self, i):
        try:
            return self.read(i)[2]
        except Exception as error:  # the scan has seen this file whole: it has changed since
            raise ValueError(f"{shown(self.paths[i])}: {reason(error)}") from error


def describe(modes, sizes, target, how, bad=0, others=""):
    """The summary: `modes` {mode, as of Files.read: count}, `sizes` of (width, height), `target`
    (C, H, W)."""
    small, large = (f(sizes, key=math.prod) for f in (min, max))
    span = "{}x{}".format(*small) + (" to {}x{}".format(*large) if large != small else "")
    merged = Counter()
    for mode, count in modes.items():
        merged[mode.rstrip("*")] += count
    kinds = ", ".join(f"{count:,} {mode}" for mode, count in sorted(merged.items()))
    notes = f", {bad:,} bad skipped" if bad else ""
    if dark := sum(count for mode, count in modes.items() if mode.endswith("*")):
        notes += f", {dark:,} of them 16-bit and nearly black (12-bit values? multiply them by 16)"
    return (f"{sum(modes.values()):,} images ({kinds}), {span} -> "
            f"{'x'.join(map(str, target))}, {how}{notes}{others}")


def scan(files, listing, source, skip_bad, memory_limit, progress):
    """Decode every file once, before training -> Array if all fits `memory_limit`, else `files`.

    A broken picture found after six hours is worse than a minute spent here, and only a full
    decode finds the truncated ones: their headers are fine. Streamed files that an earlier scan of
    `source` has decoded, and that have not changed since, are not decoded again. ValueError names
    the first five bad files, unless `skip_bad`, which leaves them out and counts them in the
    summary. listing: (name, contents, time of the last change) of each file, as `stamps` has them.
    """
    own = files.size is None  # all are to have one size: that of the first that can be read
    if own:
        files.size = first_side(files)
    target = (files.channels, files.size, files.size)
    keep = len(files) * math.prod(target) <= memory_limit
    # Filled in place: a list of tensors, stacked at the end, would need the memory twice.
    images, kept = torch.empty(len(files) if keep else 0, *target, dtype=torch.uint8), 0
    keys = [None if keep or changed is None else fingerprint([f"{name}\0{contents}\0{changed}"])
            for name, contents, changed in listing]
    known = {} if keep else readers.recall(source, decoder())
    # Of each file (Pillow mode, width, height), or the reason, a string, why it cannot be read.
    known = {key: known[key] for key in keys if key in known}
    facts = [known.get(key) for key in keys]
    todo = [i for i, found in enumerate(facts) if found is None]

    def attempt(i):
        try:
            mode, size, image = files.read(i, check=True)
            return mode, size, image if keep else None
        except Exception as error:  # a hostile file can make Pillow raise nearly anything
            return None, None, error

    threads = min(16, os.cpu_count() or 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            every = tqdm(in_threads(attempt, todo, threads, 16 * threads), "checking images",
                         len(todo), disable=not (progress and todo))
            for i, (mode, size, image) in zip(todo, every, strict=True):
                facts[i] = reason(image) if mode is None else (mode, *size)
                if keep and mode is not None:
                    images[kept] = image
                    kept += 1
                if keys[i] and (mode is not None or lasting(image)):
                    known[keys[i]] = facts[i]
        finally:  # after a signal, too: what is checked stays checked
            if todo and known:
                readers.remember(source, decoder(), known)
    good = [i for i, found in enumerate(facts) if not isinstance(found, str)]
    if len(good) < len(facts) and not (skip_bad and good):
        bad = [f"{shown(files.paths[i])} ({found})" for i, found in enumerate(facts)
               if isinstance(found, str)]
        more = f" and {len(bad) - 5:,} more" if len(bad) > 5 else ""
        raise ValueError(f"{len(bad):,} of {len(files):,} images cannot be read: "
                         f"{', '.join(bad[:5])}{more}; "
                         + ("--skip-bad-images goes on without them" if good else "none is left"))
    sizes = {tuple(facts[i][1:]) for i in good}
    if own and sizes != {(files.size, files.size)}:
        raise ValueError("the images are not squares of one size ("
                         + " ".join("{}x{}".format(*s) for s in sorted(sizes)[:5])
                         + (" ..." if len(sizes) > 5 else "") + "): give --image-size")
    files.paths = [files.paths[i] for i in good]
    files.digest = fingerprint("{}\0{}".format(*listing[i]) for i in good)
    files.summary = describe(Counter(facts[i][0] for i in good), sizes, target,
                             "in memory" if keep else "streamed", len(facts) - len(good),
                             files.others)
    if not keep:
        return files
    whole = Array(images[:len(good)], files.summary, files.paths)
    whole.digest = files.digest
    return whole


def fingerprint(lines):
    """A short hash of strings; names may hold bytes that are not UTF-8."""
    found = hashlib.sha256()
    for line in lines:
        found.update(line.replace(os.sep, "/").encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()[:16]


def stamps(paths):
    """[(bytes, time of the last change)] of files; (None, None) of those that are not there."""
    def stamp(path):
        try:
            status = os.stat(path)
        except OSError:
            return None, None
        return status.st_size, status.st_mtime_ns

    # Many at a time: a network file system answers one question in a millisecond.
    parts = [paths[i:i + 1000] for i in range(0, len(paths), 1000)]
    with ThreadPoolExecutor(16) as pool:
        return [found for part in pool.map(lambda part: list(map(stamp, part)), parts)
                for found in part]


@lru_cache(maxsize=1)
def decoder():
    """A hash of all that decides whether a file can be read: Pillow and the code that calls it."""
    code = [Path(module).read_text(encoding="utf-8") for module in (__file__, pictures.__file__)]
    return fingerprint([sys.version, PIL.__version__, PIL.__file__, *code])


def lasting(error):
    """Whether a file that gave this error will give it again. The system's own errors may pass:
    no memory, no permission, a disk that does not answer."""
    return not isinstance(error, MemoryError) and not getattr(error, "errno", None)


def first_side(files):
    """The shorter side of the first image that can be read, in pixels; 1 if none can."""
    files.size = 1
    for i in range(len(files)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return min(files.read(i, check=True)[1])
        except Exception:  # a bad file: the scan, which follows, will name it
            continue
    return 1


def find_images(names, root, others):
    """The image files among `names` (relative to `root`), in the order of their names. ValueError:
    there are none; it says with `others` what there is.

    Sorted, since neither a folder nor a zip promises an order, and image number i must stay the
    same image when training resumes. Hidden files do not count, nor what macOS adds to a zip.
    Names that a zip has twice stay twice, and the scan says so.
    """
    found = sorted(name for name in names
                   if name.lower().endswith(SUFFIXES) and not HIDDEN.search(name))
    if not found:
        raise ValueError(f"no images in {shown(root)} (looked, at any depth, for "
                         f"{' '.join(SUFFIXES)}){others}")
    return found


def left_out(names):
    """What find_images passes over, for the summary: ", 3 other files left out (.heic 2, .txt 1)".

    Telephones save .heic: without this, half of a folder could be missing unnoticed.
    """
    kinds = Counter(shown(os.path.splitext(name)[1].lower()[:12]) or "no suffix" for name in names
                    if not name.lower().endswith(SUFFIXES) and not HIDDEN.search(name))
    if not kinds:
        return ""
    listing = [f"{kind} {count:,}" for kind, count in
               sorted(kinds.items(), key=lambda item: (-item[1], item[0]))]
    return (f", {kinds.total():,} other file{'s' * (kinds.total() > 1)} left out "
            f"({', '.join(listing[:3] + ['...'] * (len(listing) > 3))})")


def left_out_runs(runs):
    """What walk passes over, for the summary: ", 2 folders of runs left out (runs, old/first)"."""
    some = ", ".join(map(shown, runs[:3])) + ", ..." * (len(runs) > 3)
    plural = "s" * (len(runs) > 1)
    return f", {len(runs):,} folder{plural} of runs left out ({some})" if runs else ""


def walk(root):
    """-> (names, runs) under a folder, relative to it: all files, and the folders of training runs,
    which are not searched: their pictures are results. Links are followed, each folder read once.
    """
    def stop(error):  # os.walk passes over unreadable folders in silence; we do not
        raise error

    if not os.listdir(root):
        raise ValueError(f"empty folder: {shown(root)}")
    seen, found, runs = set(), [], []
    for folder, below, names in os.walk(root, onerror=stop, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back up: never the same folder twice
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        here = os.path.relpath(folder, root).removeprefix(os.curdir)
        if here and holds_runs(folder):
            below.clear()
            runs.append(here)
            continue
        below[:] = sorted(name for name in below if not name.startswith("."))
        found += [os.path.join(here, name) for name in names]
    return found, runs


def holds_runs(folder):
    """Is this the folder of a run of train.py, or a `runs` with such folders in it?"""
    def is_run(path):
        return all(os.path.isfile(os.path.join(path, name))
                   for name in ("config.json", "checkpoint.pt"))

    return is_run(folder) or os.path.basename(folder) == "runs" and any(
        is_run(os.path.join(folder, name)) for name in os.listdir(folder))


def fit(array, size, channels, progress):
    """uint8 (N, H, W, 1, 3 or 4) -> uint8 tensor (N, channels, size, size), as by `prepare`.

    An array of the right shape already is only copied, so published sets keep every bit.
    """
    if 0 in array.shape:
        raise ValueError(f"no images in an array of shape {array.shape}")
    if array.shape[1:] == (size, size, channels):
        return torch.from_numpy(np.array(array.transpose(0, 3, 1, 2), order="C"))
    images = torch.empty(len(array), channels, size, size, dtype=torch.uint8)
    for i, pixels in enumerate(tqdm(array, "resizing images", disable=not progress)):
        pixels = np.ascontiguousarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])
        images[i] = prepare(Image.fromarray(pixels), size, channels)
    return images


def load(source, size, channels, seed=0, skip_bad=False, memory_limit=2 * 2**30, progress=False):
    """-> a data set: len(d), d[i] uint8 tensor (channels, size, size), d.summary in one line.

    source        "shapes", "cifar10" (downloaded), or a path: a folder or .zip of images or one
                  image, .npy, .npz or FILE.npz:KEY, an IDX file or folder, CIFAR-10's archives or
                  folder
    size          side in pixels, to be resized and cropped to; None: the images' own, if all are
                  squares of one size
    skip_bad      leave broken image files out instead of stopping
    memory_limit  bytes of prepared images up to which files are kept in memory

    The folders of training runs inside a folder are not part of it.
    All that is wrong with the source is a ValueError or OSError of one line.
    """
    if channels not in (1, 3) or size is not None and size < 1:
        raise ValueError(f"channels is 1 or 3 and size at least 1, not {channels} and {size}")
    if size is not None and size > LARGEST_SIDE:
        raise ValueError(f"{size} pixels a side are too many: {LARGEST_SIDE} at most")
    hides = (f"; the set of this name is built in: for the folder {source}, give ./{source}"
             if source in ("shapes", "cifar10") and os.path.exists(source) else "")
    if source == "shapes":
        drawings = Shapes(size or 32, channels, seed)
        drawings.summary += hides
        return drawings
    path, key = readers.cifar_archive() if source == "cifar10" else str(source), None
    if ".npz:" in path and not os.path.exists(path):
        path, key = path.rsplit(".npz:", 1)
        path += ".npz"
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file or folder: {shown(path)}")
    try:
        if os.path.isdir(path):
            if idx := readers.find_idx(path):
                path = idx
            elif not any(map(readers.CIFAR_BATCH.search, os.listdir(path))):
                names, runs = walk(path)
                others = left_out(names) + left_out_runs(runs)
                names = find_images(names, path, others)
                paths = [os.path.join(path, name) for name in names]
                listing = [(name, *stamp) for name, stamp in zip(names, stamps(paths), strict=True)]
                return scan(Files(paths, size, channels, others=others), listing, path, skip_bad,
                            memory_limit, progress)
        elif not os.path.isfile(path):  # a named pipe: opening it would wait for ever
            raise ValueError("neither a file nor a folder")
        elif path.lower().endswith(SUFFIXES):
            return scan(Files([path], size, channels), [("", *stamps([path])[0])], path, skip_bad,
                        memory_limit, progress)
        elif zipfile.is_zipfile(path) and not path.lower().endswith(".npz"):
            (_, changed), = stamps([path])
            with zipfile.ZipFile(path) as archive:
                members = [m for m in archive.infolist() if not m.is_dir()]
            contents = {m.filename: f"{m.file_size} {m.CRC}" for m in members}
            names = [m.filename for m in members]
            others = left_out(names)
            names = find_images(names, path, others)
            listing = [(name, contents[name], changed) for name in names]
            return scan(Files(names, size, channels, path, others), listing, path, skip_bad,
                        memory_limit, progress)
        array = readers.read_array(path, key, size or 0)
        if size is None:
            size, width = array.shape[1:3]
            if size != width:
                raise ValueError(f"the images are {width}x{size}, no squares: give --image-size")
        images = fit(array, size, channels, progress)
    except Exception as error:  # gzip, tarfile, pickle, NumPy: each has its own family of errors
        if isinstance(error, OSError) and path in str(error):
            raise
        text = reason(error)
        raise ValueError(text if shown(path) in text else f"{shown(path)}: {text}") from error
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[array.shape[3]]
    return Array(images, describe({mode: len(array)}, {array.shape[2:0:-1]}, images.shape[1:],
                                  "in memory") + hides)


# ------------------------------------------------------------------ the order of training

@lru_cache(maxsize=2)  # two, because a batch may straddle the end of an epoch
def permutation(n, epoch, seed):
    """The order of epoch `epoch`: int64 (n,), read-only because it is shared."""
    order = np.random.default_rng((seed, epoch)).permutation(n)
    order.flags.writeable = False
    return order


def batch_indices(n, start, batch, seed):
    """Image indices at stream positions start .. start + batch - 1: int64 (batch,).

    Position p is in epoch e = p // n, which visits every image once in an order of its own; an
    endless set (n >= 2^31) is simply counted through. A function of the position and of no hidden
    state: training that resumes at position p sees exactly what it would have seen uninterrupted.
    (For one version of NumPy: it keeps default_rng's streams stable, but does not promise to.)
    """
    positions = np.arange(start, start + batch, dtype=np.int64)
    if n >= ENDLESS:
        return positions
    indices = np.empty_like(positions)
    for epoch in range(start // n, (start + batch - 1) // n + 1):
        here = positions // n == epoch
        indices[here] = permutation(n, epoch, seed)[positions[here] % n]
    return indices


def in_threads(work, items, threads, ahead):
    """work(item) for each item, in order, by `threads` threads that run up to `ahead` items ahead.

    An error of work() is raised here when its turn comes. Pillow lets go of the interpreter lock
    while it decodes, so the threads do run in parallel. They are not an executor's: Python waits
    for those when a program ends, and a file on a dead network disk may never come.
    """
    todo, results, ended = queue.SimpleQueue(), deque(), False

    def serve():
        while True:
            future, item = todo.get()
            if ended:
                return
            try:
                future.set_result(work(item))
            except BaseException as error:
                future.set_exception(error)

    def end():
        nonlocal ended
        ended = True
        for _ in pool:  # wake those that wait
            todo.put((None, None))
        until = time.monotonic() + 1  # plenty for an image; who needs longer is left behind
        for thread in pool:
            if thread.is_alive():
                thread.join(max(0, until - time.monotonic()))

    pool = [threading.Thread(target=serve, daemon=True) for _ in range(threads)]
    # A daemon thread inside of torch when Python ends aborts the program: status 134.
    atexit.register(end)
    try:
        for thread in pool:
            thread.start()
        for item in items:
            results.append(Future())
            todo.put((results[-1], item))
            if len(results) > ahead:
                yield results.popleft().result()  # a signal's exception breaks this wait off
        while results:
            yield results.popleft().result()
    finally:
        atexit.unregister(end)
        end()


def batches(dataset, batch, start, seed, rank=0, world=1, workers=0):
    """Endless iterator of uint8 tensors (batch // world, C, H, W) from stream position `start` on.

    `batch` is the global one; process `rank` of `world` takes its contiguous part, so that the
    parts, put together, are the batch that one process would have had. `start` counts images:
    steps done times `batch`. ValueError if batch > len(dataset), or world does not divide it.
    """
    n = len(dataset)
    if batch > n:
        raise ValueError(f"--batch-size {batch} is more than the {n} images: use a smaller one")
    if batch < 1 or batch % world:
        raise ValueError(f"a batch of {batch} cannot be shared equally by {world} processes")

    def indices():
        share = batch // world
        for position in itertools.count(start, batch):
            whole = batch_indices(n, position, batch, seed)
            yield whole[rank * share:(rank + 1) * share].tolist()

    if isinstance(dataset, Array):  # a gather is faster than any thread could help
        return (dataset.images[i] for i in indices())
    share, each = batch // world, itertools.chain.from_iterable(indices())
    # Drawing a batch of shapes takes milliseconds, and would take a core from the network.
    if not workers or isinstance(dataset, Shapes):
        images = map(dataset.__getitem__, each)
    else:
        images = in_threads(dataset.__getitem__, each, workers, AHEAD * share)
    return (torch.stack(list(itertools.islice(images, share))) for _ in itertools.count())
