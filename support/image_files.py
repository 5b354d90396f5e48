r"""Folders, zips and arrays of images: found, checked once, kept in memory or decoded on demand.

    open_path("photos/", None, 64, 3)     a data set: len(d), d[i] uint8 (C, H, W), d.summary
    in_threads(work, items, 2, 64)        work(item) in order, by threads that run ahead

A broken picture found after six hours is worse than a minute spent at the start, so every file is
decoded once. Streamed files that were checked before, and have not changed, are not decoded again.
Nothing in a file is executed. A data set's `digest` identifies its images, wherever they lie.

Not here: what a file's pixels mean (images.py), sets that are one array (readers.py), the order of
training (data.py).

    python -c "from support import image_files; print(image_files.SUFFIXES)"

N images, C channels, H height, W width.
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
from PIL import Image
from tqdm import tqdm

import support.images as images_module
from support import device as devices
from support import readers
from support.images import bare_png, missing_pixels, prepare
from support.readers import one_line, printable

# In any part of the name. "./" and "../", which a zip may hold, are not names and hide nothing.
HIDDEN = re.compile(r"(^|[\\/])(\.(?!\.?[\\/])|__MACOSX([\\/]|$))")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# The contents are held to the same list: Pillow would run Ghostscript on an EPS called cat.png.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_SIDE = 8192  # pixels; a batch of such images fills the memory of any machine
MAX_BYTES = 2**30  # of a file or member; larger ones are hardly images that Pillow would open


class Array:
    """Images in memory: one uint8 tensor (N, C, H, W); `paths` of the files they were, if any."""

    streamed = False

    def __init__(self, images, summary="", paths=(), sizes=()):
        self.images, self.summary, self.paths = images, summary, list(paths)
        self.sizes = set(sizes)  # (width, height) as on the disk

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

    streamed = True

    def __init__(self, paths, size, channels, archive=None, others=""):
        self.paths, self.size, self.channels = list(paths), size, channels
        self.archive, self.others, self._zip = archive, others, None
        self.summary = self.digest = ""
        # load_and_check has seen what Pillow warns of. Not catch_warnings around each image: it
        # swaps the filters of the whole process, and two threads would restore the wrong ones.
        warnings.filterwarnings("ignore", module="PIL")

    def __len__(self):
        return len(self.paths)

    def content(self, i):
        """The bytes of file i."""
        if self.archive is None:
            content = readers.content(self.paths[i], MAX_BYTES)
        else:
            if self._zip is None:  # two threads may both open it: one of the two is kept
                archive = zipfile.ZipFile(self.archive)
                self._zip = archive, Counter(member.filename for member in archive.infolist())
            archive, names = self._zip  # its members share the open file under a lock
            if names[self.paths[i]] > 1:  # a zip looks members up by name: one would be used twice
                raise ValueError(f"{names[self.paths[i]]} members of the zip have this name")
            if (size := archive.getinfo(self.paths[i]).file_size) > MAX_BYTES:
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
            raise ValueError(f"{printable(self.paths[i])}: {one_line(error)}") from error


def summary(modes, sizes, target, how, bad=0, others=""):
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


def load_and_check(files, listing, source, skip_bad, memory_limit, progress):
    """Decode every file once, before training -> Array if all fits `memory_limit`, else `files`.

    A broken picture found after six hours is worse than a minute spent here, and only a full
    decode finds the truncated ones: their headers are fine. Streamed files that an earlier scan of
    `source` has decoded, and that have not changed since, are not decoded again. ValueError names
    the first five bad files, unless `skip_bad`, which leaves them out and counts them in the
    summary. listing: (name, contents, time of the last change) of each file, as `stamps` has them.
    """
    own = files.size is None  # all are to have one size: that of the first that can be read
    if own:
        files.size = first_image_side(files)
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
            results = in_threads(attempt, todo, threads, 16 * threads)
            for i, (mode, size, image) in zip(todo, tqdm(
                    results, "checking images", len(todo), disable=not (progress and todo)),
                    strict=True):
                facts[i] = one_line(image) if mode is None else (mode, *size)
                if keep and mode is not None:
                    images[kept] = image
                    kept += 1
                if keys[i] and (mode is not None or is_permanent(image)):
                    known[keys[i]] = facts[i]
        finally:  # after a signal too: what was checked need not be checked again
            if todo and known:
                readers.remember(source, decoder(), known)
    good = [i for i, found in enumerate(facts) if not isinstance(found, str)]
    if len(good) < len(facts) and not (skip_bad and good):
        bad = [f"{printable(files.paths[i])} ({found})" for i, found in enumerate(facts)
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
    files.sizes, files.digest = sizes, fingerprint("{}\0{}".format(*listing[i]) for i in good)
    files.summary = summary(Counter(facts[i][0] for i in good), sizes, target,
                             "in memory" if keep else "streamed", len(facts) - len(good),
                             files.others)
    if not keep:
        return files
    whole = Array(images[:len(good)], files.summary, files.paths, sizes)
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
    code = [Path(path).read_text(encoding="utf-8") for path in (__file__, images_module.__file__)]
    return fingerprint([sys.version, PIL.__version__, PIL.__file__, *code])


def is_permanent(error):
    """Whether a file that gave this error will give it again. The system's own errors may pass:
    no memory, no permission, a disk that does not answer."""
    return not isinstance(error, MemoryError) and not getattr(error, "errno", None)


def first_image_side(files):
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
        raise ValueError(f"no images in {printable(root)} (looked, at any depth, for "
                         f"{' '.join(SUFFIXES)}){others}")
    return found


def skipped_note(names):
    """What find_images passes over, for the summary: ", 3 other files left out (.heic 2, .txt 1)".

    Telephones save .heic: without this, half of a folder could be missing unnoticed.
    """
    kinds = Counter(printable(os.path.splitext(name)[1].lower()[:12]) or "no suffix"
                    for name in names
                    if not name.lower().endswith(SUFFIXES) and not HIDDEN.search(name))
    if not kinds:
        return ""
    listing = [f"{kind} {count:,}" for kind, count in
               sorted(kinds.items(), key=lambda item: (-item[1], item[0]))]
    return (f", {kinds.total():,} other file{'s' * (kinds.total() > 1)} left out "
            f"({', '.join(listing[:3] + ['...'] * (len(listing) > 3))})")


def pair_name(path, source):
    """What a file of `source`, a folder, zip or image, is paired by: cat/1.png -> cat/1."""
    if os.path.isdir(source):
        path = os.path.relpath(path, source)
    elif path == source:  # an image by itself
        path = os.path.basename(path)
    return Path(path).with_suffix("").as_posix()


def runs_note(runs):
    """What walk passes over, for the summary: ", 2 folders of runs left out (runs, old/first)"."""
    some = ", ".join(map(printable, runs[:3])) + ", ..." * (len(runs) > 3)
    plural = "s" * (len(runs) > 1)
    return f", {len(runs):,} folder{plural} of runs left out ({some})" if runs else ""


def walk(root):
    """-> (names, runs) under a folder, relative to it: all files, and the folders of training runs,
    which are not searched: their pictures are results. Links are followed, each folder read once.
    """
    def stop(error):  # os.walk passes over unreadable folders in silence; we do not
        raise error

    if not os.listdir(root):
        raise ValueError(f"empty folder: {printable(root)}")
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


def resize_all(array, size, channels, progress):
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


def open_path(path, key, size, channels, skip_bad=False, memory_limit=2 * 2**30, progress=False):
    """Open a folder, zip, image or array -> Array or Files. The arguments are data.load's; key: of
    an .npz. The folders of training runs inside a folder are not part of it."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{printable(path)}: no such file or folder")
    options = dict(skip_bad=skip_bad, memory_limit=memory_limit, progress=progress)
    try:
        if os.path.isdir(path):
            if idx := readers.find_idx(path):
                path = idx
            elif not any(map(readers.CIFAR_BATCH.search, os.listdir(path))):
                return open_folder(path, size, channels, **options)
        elif not os.path.isfile(path):  # a named pipe: opening it would wait for ever
            raise ValueError("neither a file nor a folder")
        elif path.lower().endswith(SUFFIXES):
            return load_and_check(Files([path], size, channels), [("", *stamps([path])[0])], path,
                                  **options)
        elif zipfile.is_zipfile(path) and not path.lower().endswith(".npz"):
            return open_zip(path, size, channels, **options)
        array = readers.read_array(path, key, size or 0)
        if size is None:
            size, width = array.shape[1:3]
            if size != width:
                raise ValueError(f"the images are {width}x{size}, not square: give --image-size")
        images = resize_all(array, size, channels, progress)
    except Exception as error:  # gzip, tarfile, pickle, NumPy: each has its own family of errors
        if isinstance(error, OSError) and path in str(error):
            raise
        text = one_line(error)
        raise ValueError(text if printable(path) in text else f"{printable(path)}: {text}"
                         ) from error
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[array.shape[3]]
    sizes = {array.shape[2:0:-1]}
    return Array(images, summary({mode: len(array)}, sizes, images.shape[1:], "in memory"),
                 sizes=sizes)


def open_folder(path, size, channels, **options):
    """All images at any depth of a folder."""
    names, runs = walk(path)
    others = skipped_note(names) + runs_note(runs)
    names = find_images(names, path, others)
    paths = [os.path.join(path, name) for name in names]
    listing = [(name, *stamp) for name, stamp in zip(names, stamps(paths), strict=True)]
    return load_and_check(Files(paths, size, channels, others=others), listing, path, **options)


def open_zip(path, size, channels, **options):
    """All images of a zip."""
    (_, changed), = stamps([path])
    with zipfile.ZipFile(path) as archive:
        members = [m for m in archive.infolist() if not m.is_dir()]
    contents = {m.filename: f"{m.file_size} {m.CRC}" for m in members}
    others = skipped_note([m.filename for m in members])
    names = find_images([m.filename for m in members], path, others)
    listing = [(name, contents[name], changed) for name in names]
    return load_and_check(Files(names, size, channels, path, others), listing, path, **options)


def in_threads(work, items, threads, ahead):
    """work(item) for each item, in order, by `threads` threads that run up to `ahead` items ahead.

    An error of work() is raised here when its turn comes. Pillow releases the interpreter lock
    while it decodes, so the threads run in parallel. They are not an executor's: Python waits for
    those when a program ends, and a file on a dead network disk may never come.
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
        deadline = time.monotonic() + 1  # plenty for an image; a slower thread is left behind
        for thread in pool:
            if thread.is_alive():
                thread.join(max(0, deadline - time.monotonic()))

    pool = [threading.Thread(target=serve, daemon=True) for _ in range(threads)]
    # A daemon thread inside torch when Python ends aborts the program: status 134.
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


def stream(dataset, batches, threads, ahead, device="cpu"):
    """Yield the images of each batch, a list of indices: uint8 (b, C, H, W). Files are decoded by
    threads, up to `ahead` images ahead. For a GPU, a set in memory is kept on it if it fits; other
    batches are pinned, by a thread that makes the next while the GPU works."""
    if isinstance(dataset, Array):
        images = devices.keep_near(dataset.images, device)
        if images.is_cuda:
            yield from (devices.pick(images, indices) for indices in batches)
    made = stacked(dataset, batches, threads, ahead)
    if torch.device(device).type != "cuda":
        yield from made
    yield from in_threads(lambda _: next(made).pin_memory(), itertools.count(), 1, 1)


def stacked(dataset, batches, threads, ahead):
    """The images of each batch, on the CPU."""
    if isinstance(dataset, Array):
        yield from (dataset.images[indices] for indices in batches)
    batches, again = itertools.tee(batches)
    images = map(dataset.__getitem__, itertools.chain.from_iterable(batches))
    if threads and dataset.streamed:  # drawing shapes would only take a core from the network
        images = in_threads(dataset.__getitem__, itertools.chain.from_iterable(batches), threads,
                            ahead)
    for indices in again:
        yield torch.stack(list(itertools.islice(images, len(indices))))
