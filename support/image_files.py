r"""Find, check and load the images of folders, zips and arrays.

    open_path("photos/", None, 64, 3)     a data set: len(d), d[i] uint8 (C, H, W), d.summary
    in_threads(work, items, 2, 64)        work(item) in order, by threads that work in advance

Each file is decoded once at the start: this takes a minute, and a broken image cannot stop a run
after six hours. Streamed files that were checked before and have not changed are not decoded again.
Nothing in a file is executed. A data set's `digest` identifies its images in any place.

Not here: the pixels of one file (images.py), sets that are one array (readers.py), the order of
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

# A hidden part of a path. "./" and "../" in a zip's names are not hidden.
HIDDEN = re.compile(r"(^|[\\/])(\.(?!\.?[\\/])|__MACOSX([\\/]|$))")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# The contents must have one of these formats: Pillow would run Ghostscript on an EPS "cat.png".
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
MAX_SIDE = 8192  # pixels; a batch of such images fills the memory of any machine
MAX_BYTES = 2**30  # of a file or member; Pillow would hardly open a larger one


class Array:
    """Images in memory: one uint8 tensor (N, C, H, W); `paths`: their files, if they had any."""

    streamed = False

    def __init__(self, images, summary="", paths=(), sizes=()):
        self.images, self.summary, self.paths = images, summary, list(paths)
        self.sizes = set(sizes)  # (width, height) as on the disk

    @cached_property
    def digest(self):
        """A short hash of the pixels. load_and_check replaces it by a hash of the file list."""
        found = hashlib.sha256(str(tuple(self.images.shape)).encode())  # a gigabyte takes a second
        found.update(np.ascontiguousarray(self.images))
        return found.hexdigest()[:16]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


class Files:
    """Image files, read on request; with `archive`, paths are members of that zip.

    Several threads may read at the same time. ValueError names a file that has become unreadable.
    """

    streamed = True

    def __init__(self, paths, size, channels, archive=None, others=""):
        self.paths, self.size, self.channels = list(paths), size, channels
        self.archive, self.others, self._zip = archive, others, None
        self.summary = self.digest = ""
        # load_and_check has seen Pillow's warnings. catch_warnings around each image would change
        # the filters of the whole process, and two threads would restore the wrong ones.
        warnings.filterwarnings("ignore", module="PIL")

    def __len__(self):
        return len(self.paths)

    def content(self, i):
        """The bytes of file i."""
        if self.archive is None:
            content = readers.content(self.paths[i], MAX_BYTES)
        else:
            if self._zip is None:  # if two threads open it at once, one of the two is kept
                archive = zipfile.ZipFile(self.archive)
                self._zip = archive, Counter(member.filename for member in archive.infolist())
            archive, names = self._zip  # its members share the open file under a lock
            if names[self.paths[i]] > 1:  # zipfile finds members by name: one would be used twice
                raise ValueError(f"{names[self.paths[i]]} members of the zip have this name")
            if (size := archive.getinfo(self.paths[i]).file_size) > MAX_BYTES:
                raise ValueError(f"{size:,} bytes are too many for an image")
            # In pieces: a single read() inflates 2 GiB of a member that declares 1 KiB.
            with archive.open(self.paths[i]) as file:
                content = b"".join(iter(lambda: file.read(2**16), b""))
        if not content:
            raise ValueError("empty file")
        return content

    def read(self, i, check=False):
        """Decode file i -> (Pillow mode, (width, height), uint8 tensor). Pillow may raise any
        exception. The mode ends with "*" if the file has 16 bits and is nearly black."""
        content = bare_png(self.content(i))
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            if check and image.format == "PNG" and (missing := missing_pixels(content)):
                raise ValueError(f"{missing:,} bytes of pixels are missing")
            deep = image.format in ("PNG", "TIFF", "PPM") and ";16" in str(image.tile)
            prepared = prepare(image, self.size, self.channels)
            # Cameras with 12 bits write 0..4095 into 16 bits, which become levels 0..16 of 255. The
            # file does not record the 12 bits, so the pixels stay; the summary counts such files.
            dark = deep and 0 < prepared.max() <= 16
            return image.mode + "*" * dark, image.size, prepared

    def __getitem__(self, i):
        try:
            return self.read(i)[2]
        except Exception as error:  # the file was whole when it was checked, but has changed
            raise ValueError(f"{printable(self.paths[i])}: {one_line(error)}") from error


def summary(modes, sizes, target, how, bad=0, others=""):
    """One line about a set: `modes` {mode of Files.read: count}, `sizes` (width, height), `target`
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

    Only a full decode finds truncated files, whose headers are valid. Streamed files that an
    earlier check of `source` has decoded, and that have not changed, are not decoded again.
    ValueError names the first five bad files. With `skip_bad`, bad files are left out and counted
    in the summary. listing: (name, contents, time of the last change) of each file, as in stamps().
    """
    own = files.size is None  # then all must have the size of the first readable image
    if own:
        files.size = first_image_side(files)
    target = (files.channels, files.size, files.size)
    keep = len(files) * math.prod(target) <= memory_limit
    # Filled in place: stacking a list of tensors would need the memory twice.
    images, kept = torch.empty(len(files) if keep else 0, *target, dtype=torch.uint8), 0
    keys = [None if keep or changed is None else fingerprint([f"{name}\0{contents}\0{changed}"])
            for name, contents, changed in listing]
    known = {} if keep else readers.recall(source, decoder())
    # For each file: (Pillow mode, width, height), or a string that explains why it is unreadable.
    known = {key: known[key] for key in keys if key in known}
    facts = [known.get(key) for key in keys]
    todo = [i for i, found in enumerate(facts) if found is None]

    def attempt(i):
        try:
            mode, size, image = files.read(i, check=True)
            return mode, size, image if keep else None
        except Exception as error:  # a malicious file can make Pillow raise nearly anything
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
        finally:  # also after a signal, so that checked files are not checked again
            if todo and known:
                readers.remember(source, decoder(), known)
    good = [i for i, found in enumerate(facts) if not isinstance(found, str)]
    if len(good) < len(facts) and not (skip_bad and good):
        bad = [f"{printable(files.paths[i])} ({found})" for i, found in enumerate(facts)
               if isinstance(found, str)]
        more = f" and {len(bad) - 5:,} more" if len(bad) > 5 else ""
        raise ValueError(f"{len(bad):,} of {len(files):,} images cannot be read: "
                         f"{', '.join(bad[:5])}{more}; "
                         + ("--skip-bad-images skips them" if good else "no others are left"))
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
    """A short hash of strings, which may be file names with bytes that are not UTF-8."""
    found = hashlib.sha256()
    for line in lines:
        found.update(line.replace(os.sep, "/").encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()[:16]


def stamps(paths):
    """[(bytes, time of the last change)] of files; (None, None) if a file does not exist."""
    def stamp(path):
        try:
            status = os.stat(path)
        except OSError:
            return None, None
        return status.st_size, status.st_mtime_ns

    # Many at a time: a network file system needs a millisecond per file.
    parts = [paths[i:i + 1000] for i in range(0, len(paths), 1000)]
    with ThreadPoolExecutor(16) as pool:
        return [found for part in pool.map(lambda part: list(map(stamp, part)), parts)
                for found in part]


@lru_cache(maxsize=1)
def decoder():
    """A hash of Pillow's version and the code here, which decide whether a file can be read."""
    code = [Path(path).read_text(encoding="utf-8") for path in (__file__, images_module.__file__)]
    return fingerprint([sys.version, PIL.__version__, PIL.__file__, *code])


def is_permanent(error):
    """True if the file will give this error again. Errors of the system (memory, permission, a
    disk that does not answer) may disappear."""
    return not isinstance(error, MemoryError) and not getattr(error, "errno", None)


def first_image_side(files):
    """The shorter side of the first readable image, in pixels; 1 if all are unreadable."""
    files.size = 1
    for i in range(len(files)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return min(files.read(i, check=True)[1])
        except Exception:  # load_and_check names bad files
            continue
    return 1


def find_images(names, root, others):
    """The image files among `names` (relative to `root`), sorted. ValueError: there are none;
    `others` describes the files that exist.

    Neither a folder nor a zip guarantees an order, and image i must stay the same when training
    resumes. Hidden files and macOS's additions to a zip are left out. Duplicate names in a zip stay
    duplicate; load_and_check reports them.
    """
    found = sorted(name for name in names
                   if name.lower().endswith(SUFFIXES) and not HIDDEN.search(name))
    if not found:
        raise ValueError(f"no images in {printable(root)} (looked, at any depth, for "
                         f"{' '.join(SUFFIXES)}){others}")
    return found


def skipped_note(names):
    """A note for the summary on other files: ", 3 other files left out (.heic 2, .txt 1)".

    Phones save .heic: without this note, half of a folder could be left out unnoticed.
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
    """The name by which psnr pairs a file of `source` (a folder, zip or image): cat/1.png -> cat/1.
    """
    if os.path.isdir(source):
        path = os.path.relpath(path, source)
    elif path == source:  # an image by itself
        path = os.path.basename(path)
    return Path(path).with_suffix("").as_posix()


def runs_note(runs):
    """A note for the summary on runs: ", 2 folders of runs left out (runs, old/first)"."""
    some = ", ".join(map(printable, runs[:3])) + ", ..." * (len(runs) > 3)
    plural = "s" * (len(runs) > 1)
    return f", {len(runs):,} folder{plural} of runs left out ({some})" if runs else ""


def walk(root):
    """(names, runs) under a folder, relative to it: all files, and the folders of training runs.
    Those are not searched, since their images are results. Links are followed, each folder once."""
    def stop(error):  # os.walk would skip unreadable folders silently
        raise error

    if not os.listdir(root):
        raise ValueError(f"empty folder: {printable(root)}")
    seen, found, runs = set(), [], []
    for folder, below, names in os.walk(root, onerror=stop, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link back up
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
    """True for the folder of a run of train.py, or a folder `runs` that contains runs."""
    def is_run(path):
        return all(os.path.isfile(os.path.join(path, name))
                   for name in ("config.json", "checkpoint.pt"))

    return is_run(folder) or os.path.basename(folder) == "runs" and any(
        is_run(os.path.join(folder, name)) for name in os.listdir(folder))


def resize_all(array, size, channels, progress):
    """uint8 (N, H, W, 1, 3 or 4) -> uint8 tensor (N, channels, size, size), with `prepare`.

    An array of the right shape is only copied, so that published sets keep every bit.
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
    """Open a folder, zip, image or array -> Array or Files. The arguments are those of data.load;
    key: the array of an .npz. Folders of training runs inside a folder are left out."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"{printable(path)}: no such file or folder")
    options = dict(skip_bad=skip_bad, memory_limit=memory_limit, progress=progress)
    try:
        if os.path.isdir(path):
            if idx := readers.find_idx(path):
                path = idx
            elif not any(map(readers.CIFAR_BATCH.search, os.listdir(path))):
                return open_folder(path, size, channels, **options)
        elif not os.path.isfile(path):  # opening a named pipe would never return
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
    except Exception as error:  # gzip, tarfile, pickle, NumPy: each has other kinds of errors
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
    """work(item) for each item, in order. `threads` threads work up to `ahead` items in advance.

    An error of work() is raised here in its turn. Pillow releases the interpreter lock while it
    decodes, so the threads run in parallel. An executor would not do: Python waits for its threads
    at the end of a program, and a read from a dead network disk may never return.
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
        for _ in pool:  # wake threads that wait
            todo.put((None, None))
        deadline = time.monotonic() + 1  # enough for an image; do not wait for slower threads
        for thread in pool:
            if thread.is_alive():
                thread.join(max(0, deadline - time.monotonic()))

    pool = [threading.Thread(target=serve, daemon=True) for _ in range(threads)]
    # If Python ends while a daemon thread is inside torch, the program aborts with status 134.
    atexit.register(end)
    try:
        for thread in pool:
            thread.start()
        for item in items:
            results.append(Future())
            todo.put((results[-1], item))
            if len(results) > ahead:
                yield results.popleft().result()  # a signal's exception ends this wait
        while results:
            yield results.popleft().result()
    finally:
        atexit.unregister(end)
        end()


def stream(dataset, batches, threads, ahead, device="cpu"):
    """Yield the images of each batch (a list of indices): uint8 (b, C, H, W). Threads decode files
    up to `ahead` images in advance. For a GPU, a set in memory moves to it if it fits; otherwise a
    thread makes and pins the next batch meanwhile. `batches` is an iterator without an end."""
    if isinstance(dataset, Array):
        images = devices.keep_near(dataset.images, device)
        if images.is_cuda:
            yield from (devices.pick(images, indices) for indices in batches)
            return
    made = stacked(dataset, batches, threads, ahead)
    if torch.device(device).type != "cuda":
        yield from made
    else:
        yield from in_threads(lambda _: next(made).pin_memory(), itertools.count(), 1, 1)


def stacked(dataset, batches, threads, ahead):
    """The images of each batch, on the CPU."""
    if isinstance(dataset, Array):
        yield from (dataset.images[indices] for indices in batches)
    batches, again = itertools.tee(batches)
    images = map(dataset.__getitem__, itertools.chain.from_iterable(batches))
    if threads and dataset.streamed:  # threads that draw shapes would take a core from training
        images = in_threads(dataset.__getitem__, itertools.chain.from_iterable(batches), threads,
                            ahead)
    for indices in again:
        yield torch.stack(list(itertools.islice(images, len(indices))))
