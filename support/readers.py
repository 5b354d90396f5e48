r"""Read sets of images that are one array: CIFAR-10's archives, MNIST-like IDX files, .npy, .npz.

Each reader returns uint8 (N, H, W, C), 0..255, and describes in one line what is wrong with a file.
Nothing in a file is executed: CIFAR-10's pickles go through an unpickler that accepts only arrays,
and NumPy's files are read with allow_pickle=False.

This file also manages the cache folder: downloads, and the list of checked image files.

Not here: test splits, resizing (support/images.py), unpacking to the disk.

    python -c "from support import readers as r; print(r.read_array('train-images.gz').shape)"

N images, H height, W width, C channels.
"""

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import struct
import tarfile
import urllib.request
import zipfile
import zlib

import numpy as np
from PIL import Image
from tqdm import tqdm

from support.files import atomic_write

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_SHA256 = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR_BATCH = re.compile(r"(?:^|/)data_batch_([1-5])(\.bin)?$")
BATCH = 2**30  # bytes; an official batch has 31 million
IDX_TRAIN = re.compile(r"^train-images.*idx3-ubyte(\.gz)?$")


def one_line(error):
    """The message of an exception as one printable line."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    # Spaces inside a line stay: they may belong to a name.
    text = " ".join(line.strip() for line in str(error).strip().splitlines())
    return printable(text) or type(error).__name__


def printable(name):
    """A file name as one printable line, with escapes for line breaks, control characters and bytes
    that are not UTF-8 (surrogates in Python, at which print fails)."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def content(path, limit):
    """Read a regular file. ValueError: it is not a regular file, or has over `limit` bytes."""
    if not os.path.isfile(path):  # opening a named pipe would never return
        raise ValueError("a broken link or not a regular file")
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise ValueError(f"{size:,} bytes are too many")
        return file.read()


def latin1(text, encoding):
    """codecs.encode for pickles of arrays. Other codecs than latin1 are refused."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"refused: the pickle asks for the codec {encoding}")
    return text.encode("latin1")


class ArrayUnpickler(pickle.Unpickler):
    """Unpickle only NumPy arrays and refuse all else: a plain pickle.load can run any code."""

    # Both names, since NumPy 2 moved numpy.core to numpy._core.
    reconstruct = np.empty(0).__reduce__()[0]
    allowed = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype,
               ("numpy.core.multiarray", "_reconstruct"): reconstruct,
               ("numpy._core.multiarray", "_reconstruct"): reconstruct,
               ("_codecs", "encode"): latin1}

    def find_class(self, module, name):
        if (module, name) not in self.allowed:
            raise ValueError(f"refused: the pickle asks for {module}.{name}, not only for arrays")
        return self.allowed[module, name]


def read_cifar(path):
    """Read CIFAR-10's training images from the archive or its folder -> uint8 (N, 32, 32, 3)."""
    rows = [images.reshape(-1, 3, 32, 32) for images, _ in cifar_batches(path)]
    return np.concatenate(rows).transpose(0, 2, 3, 1)


def cifar_batches(path):
    """Yield the five training batches as pairs: images uint8 (N, 3072), labels int64 (N,).

    Both official forms are read: data_batch_1 ... 5 (Python pickles) and data_batch_1.bin ...
    5.bin. A missing batch is an error, since training on 40,000 images would go unnoticed. A batch
    may have any number of rows.
    """
    parts = {}

    def add(match, raw):
        if match[1] in parts:
            raise ValueError(f"{path} has data_batch_{match[1]} more than once")
        parts[match[1]] = (match[2], raw)

    if os.path.isdir(path):
        for name in os.listdir(path):
            if match := CIFAR_BATCH.search(name):
                try:
                    add(match, content(os.path.join(path, name), BATCH))
                except ValueError as error:
                    raise ValueError(f"{os.path.join(path, name)}: {error}") from error
    else:
        with tarfile.open(path) as tar:  # nothing is unpacked to disk
            for member in tar:
                if (match := CIFAR_BATCH.search(member.name)) and member.isfile():
                    if member.size > BATCH:
                        raise ValueError(f"{path}: {member.name} declares {member.size:,} bytes")
                    add(match, tar.extractfile(member).read())
            while tar.fileobj.read(2**20):  # gzip compares its checksum only at the end
                pass
    if missing := set("12345") - set(parts):
        raise ValueError(f"{path} has no CIFAR-10 data_batch_{min(missing)} "
                         "(if it is an archive of image files, unpack it or use a .zip)")
    for number, (binary, raw) in sorted(parts.items()):
        where = f"{path}: data_batch_{number}"
        if binary:  # a record has 1 byte of label, then 3072 of pixels
            if len(raw) % 3073:
                raise ValueError(f"{where}.bin has other records than 3073 bytes, or is truncated")
            rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
            batch, labels = rows[:, 1:], rows[:, 0]
        else:
            try:
                pickled = ArrayUnpickler(io.BytesIO(raw), encoding="bytes").load()
                if not isinstance(pickled, dict):
                    raise ValueError("a pickle, but not of a dictionary")
                batch, labels = pickled.get(b"data"), np.asarray(pickled.get(b"labels", []))
            except Exception as error:  # a malicious pickle can raise nearly anything
                raise ValueError(f"{where}: {one_line(error)}") from error
        if not isinstance(batch, np.ndarray) or batch.dtype != np.uint8:
            raise ValueError(f"{where} does not hold a uint8 array")
        # A reshape would accept any shape with the right number of bytes, and mix up the rows.
        if batch.ndim != 2 or batch.shape[1] != 3072:
            raise ValueError(f"{where} holds an array of shape {batch.shape}, not (N, 3072)")
        if labels.size and (labels.dtype.kind not in "iu" or labels.shape != (len(batch),)):
            raise ValueError(f"{where} has {len(batch)} images, but its labels are "
                             f"{labels.dtype} {labels.shape}")
        yield batch, labels.astype(np.int64)


def split_key(source):
    """FILE.npz:KEY -> (FILE.npz, KEY); any other path -> (path, None)."""
    path, npz, key = source.rpartition(".npz:")
    return (path + ".npz", key) if npz and not os.path.exists(source) else (source, None)


def find_idx(folder):
    """The IDX file of training images in a folder, or None. As in Kaggle's archives, it may lie in
    a folder of the same name, or next to such a folder."""
    def named(place):
        return [os.path.join(place, name) for name in sorted(os.listdir(place))
                if IDX_TRAIN.search(name)]

    found = named(folder)
    found += [inner for place in found if os.path.isdir(place) for inner in named(place)]
    # If there is only a pipe or a broken link, the reader names it.
    return min((path for path in found if not os.path.isdir(path)),
               key=lambda path: not os.path.isfile(path), default=None)


def labels_of(path):
    """Path of the labels of an IDX file of images: next to it, or in a folder like its folder."""
    def renamed(name):
        return name.replace("images", "labels").replace("idx3", "idx1")

    folder, name = os.path.split(path)
    deep = os.path.join(os.path.dirname(folder), renamed(os.path.basename(folder)), renamed(name))
    near = os.path.join(folder, renamed(name))
    return deep if not os.path.isfile(near) and os.path.isfile(deep) else near


def read_labels(path):
    """Read the labels of a training set -> int64 (N,): those next to an IDX file or in its folder,
    or those of CIFAR-10's archive or folder of pickles. ValueError: there are none."""
    if os.path.isdir(path) and not any(map(CIFAR_BATCH.search, os.listdir(path))):
        path = find_idx(path) or path
    where = labels_of(path)
    if "idx3" in os.path.basename(path) and os.path.isfile(where):
        try:
            with (gzip.open if where.endswith(".gz") else open)(where, "rb") as file:
                raw = file.read()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{where}: {one_line(error)}") from error
        if raw[:4] != b"\0\0\x08\x01" or len(raw) - 8 != int.from_bytes(raw[4:8], "big"):
            raise ValueError(f"{where} is not an IDX file of labels, or is truncated")
        return np.frombuffer(raw, np.uint8, offset=8).astype(np.int64)
    if os.path.isdir(path) or os.path.isfile(path) and tarfile.is_tarfile(path):
        try:
            return np.concatenate([labels for _, labels in cifar_batches(path)])
        except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error) as error:
            raise ValueError(f"{path}: {one_line(error)}") from error
    raise ValueError(f"{path} has no labels next to it: give an IDX file or CIFAR-10's archive")


def read_idx(raw, path, size=0):
    """The bytes of an IDX file of images -> uint8 (N, H, W, 1), padded with zeros up to `size`.

    IDX: bytes 0 0 8 3 (unsigned bytes, 3 axes), then N, H, W big-endian, then the pixels.
    """
    count, height, width = struct.unpack(">3I", raw[4:16])
    if 0 in (count, height, width):  # the border below would make black images
        raise ValueError(f"no images in {path}: {count} of {width}x{height}")
    if len(raw) != 16 + count * height * width:
        raise ValueError(f"{path} should hold {count} images of {width}x{height}, but is truncated "
                         "or damaged")
    images = np.frombuffer(raw, np.uint8, offset=16).reshape(count, height, width, 1)
    if max(height, width) <= size:  # 28 -> 32 by a border: digits keep their exact pixels
        down, right = size - height, size - width
        images = np.pad(images, ((0, 0), (down // 2, down - down // 2),
                                 (right // 2, right - right // 2), (0, 0)))
    return images


def read_npy(file):
    """Read the array of an open .npy file or .npz member. ValueError: bytes follow the array."""
    array = np.lib.format.read_array(file, allow_pickle=False)  # a pickle could run any code
    if file.read(1):  # np.load would silently ignore these images
        raise ValueError(f"trailing bytes after the array of shape {array.shape}")
    return array


def choose(archive, path, key):
    """The array `key` of an open .npz, or the only array that can be images."""
    names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
    if len(names) != len(set(names)):
        raise ValueError(f"{path}: two arrays in it have the same name")

    def read(name):
        with archive.open(name + ".npy") as file:
            return read_npy(file)

    arrays = {name: read(name) for name in names if key in (None, name)}
    likely = [k for k, a in arrays.items() if a.dtype == np.uint8 and a.ndim in (3, 4)]
    choices = likely or list(arrays)
    if len(choices) != 1:
        arrays = {name: read(name) for name in names}
        listing = ", ".join(f"{k} {a.dtype} {a.shape}" for k, a in arrays.items())
        raise ValueError(f"{path}: choose one array with {path}:KEY, from {listing or 'none'}")
    return arrays[choices[0]]


def read_numpy(path, key):
    """Read a .npy file, or one array of a .npz (`key`, or the only one) -> uint8 (N, H, W, C).

    Floats are refused, since they may mean [0, 1], [-1, 1] or [0, 255].
    """
    with open(path, "rb") as file:
        if not file.peek(2).startswith(b"PK"):
            array = read_npy(file)
        else:
            with zipfile.ZipFile(file) as archive:
                array = choose(archive, path, key)
    if array.dtype != np.uint8:
        raise ValueError(f"{path}: {array.dtype} is not uint8. Save 0..255; for floats in [0, 1] "
                         "use (x * 255).round().astype('uint8')")
    if array.ndim == 3 and array.shape[2] in (1, 3, 4) and array.shape[1] != array.shape[2]:
        raise ValueError(f"{path}: {array.shape} looks like one image (H,W,C): save image[None]")
    if array.ndim == 3:
        return array[..., None]
    if array.ndim == 4 and array.shape[3] in (1, 3, 4):
        return array
    if array.ndim == 4 and array.shape[1] in (1, 3, 4):
        return array.transpose(0, 2, 3, 1)
    raise ValueError(f"{path}: {array.shape} must be (N,H,W), (N,H,W,C) or (N,C,H,W), C = 1, 3, 4")


def read_array(path, key=None, size=0):
    """Read a file or folder that is one array of images -> (N, H, W, C). The first bytes determine
    its kind."""
    if os.path.isdir(path):
        return read_cifar(path)
    if not os.path.isfile(path):  # opening a named pipe would never return
        raise ValueError(f"{path}: a broken link or not a regular file")
    with open(path, "rb") as file:
        raw = file.read(8)
    zipped = raw[:2] == b"\x1f\x8b"
    if zipped:
        with gzip.open(path) as file:
            raw = file.read(8)
    if raw[:4] == b"\0\0\x08\x03":
        with (gzip.open if zipped else open)(path, "rb") as file:
            return read_idx(file.read(), path, size)
    if raw[:6] == b"\x93NUMPY" or raw[:2] == b"PK":
        return read_numpy(path, key)
    if tarfile.is_tarfile(path):
        return read_cifar(path)
    raise ValueError(f"{path} is not a data set of a known kind (it begins with {raw}): give a "
                     "folder or .zip of images, .npy, .npz, IDX or CIFAR-10")


def download(url, path, sha256, instead="give the path of a copy"):
    """Download `url` to `path`. OSError: it failed, or the file has another SHA-256 (hex).

    The error names the place for a copy, since clusters often have no network. Several processes
    may download at once: each writes a temporary file, and the last one replaces the others.
    """
    digest = hashlib.sha256()
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with (urllib.request.urlopen(url, timeout=60) as reply, atomic_write(path) as part,
              open(part, "wb") as file):
            total = int(reply.headers.get("Content-Length") or 0) or None
            with tqdm(desc=os.path.basename(path), total=total, unit="B", unit_scale=True) as bar:
                while chunk := reply.read(2**20):
                    file.write(chunk)
                    digest.update(chunk)
                    bar.update(len(chunk))
            if digest.hexdigest() != sha256:
                raise OSError(f"its SHA-256 is {digest.hexdigest()}")
    except Exception as error:  # mostly OSError, but a truncated reply is an HTTPException
        raise OSError(f"cannot download {url} ({one_line(error)}): put the file with SHA-256 "
                      f"{sha256} at {path}, or {instead}") from error


def cache_path(name):
    """Path of the download of this name."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "diffusion-data", name)


def cached(name, url, sha256, **more):
    """Path of the file `name` in the cache folder; this downloads it from `url` if necessary."""
    path = cache_path(name)
    if not os.path.exists(path):
        download(url, path, sha256, **more)
    return path


def cifar_archive():
    """Path of the CIFAR-10 archive in the cache folder (170 MB)."""
    return cached("cifar-10-python.tar.gz", CIFAR_URL, CIFAR_SHA256)


# ------------------------------------------------------------------ files that were checked before

INDEXES = 50  # the number that is kept; a million files need 39 MB


def index_path(source):
    """Path of the list of checked files of a folder or zip."""
    name = hashlib.sha256(os.path.realpath(source).encode("utf-8", "surrogatepass")).hexdigest()
    return cache_path(f"checked/{name[:16]}.json")


def recall(source, decoder):
    """Read {key: facts} that `remember` wrote for this source and decoder; {} if there are none."""
    try:
        found = json.loads(content(index_path(source), 2**30))
        if found["decoder"] == decoder and all(map(is_facts, found["checked"].values())):
            return found["checked"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
        pass  # damaged or foreign: `remember` will replace it
    return {}


def is_facts(value):
    """True for [mode, width, height], or for one line that explains why a file is unreadable."""
    if isinstance(value, list) and list(map(type, value)) == [str, int, int]:
        value = value[0]
    return isinstance(value, str) and value.isprintable()


def remember(source, decoder, checked):
    """Store {key: facts} for the next start. Without a writable cache folder, that is only slower.
    """
    path = index_path(source)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with atomic_write(path) as part, open(part, "w", encoding="utf-8") as file:
            json.dump(dict(decoder=decoder, source=printable(os.path.realpath(source)),
                           checked=checked), file)
        old = sorted((entry for entry in os.scandir(os.path.dirname(path))
                      if entry.name.endswith(".json")), key=lambda entry: entry.stat().st_mtime)
        for entry in old[:-INDEXES]:
            os.unlink(entry.path)
    except OSError:
        pass
