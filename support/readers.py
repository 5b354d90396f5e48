r"""Sets of images that are one array: CIFAR-10's archives, MNIST-like IDX files, .npy and .npz.

Each reader gives uint8 (N, H, W, C), 0..255, and names in one line what is wrong with a file. None
of them executes anything a file contains: CIFAR-10's pickles go through an unpickler that knows
only arrays, and NumPy's are read with allow_pickle=False.

Also what the cache folder keeps between starts: downloads, and which image files were checked.

Not here: test splits, resizing (data.py), or unpacking to the disk.

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
    """One line, fit for a user, that says what an exception says."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    # Spaces stay as they are: they may belong to a name.
    text = " ".join(line.strip() for line in str(error).strip().splitlines())
    return printable(text) or type(error).__name__


def printable(name):
    """A file's name as one line that can be printed: line breaks, control characters and bytes that
    are not UTF-8 (surrogates in Python, at which print stops) as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def content(path, limit):
    """The bytes of a regular file. ValueError: it is something else, or over `limit` bytes."""
    if not os.path.isfile(path):  # opening a named pipe would wait for ever
        raise ValueError("a broken link or not a regular file")
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise ValueError(f"{size:,} bytes are too many")
        return file.read()


def latin1(text, encoding):
    """codecs.encode, as far as pickles of arrays need it: others reach any codec installed."""
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"refused: the pickle asks for the codec {encoding}")
    return text.encode("latin1")


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickled NumPy arrays and refuses all else: a plain pickle.load may run any program."""

    # Named by what they are, since NumPy 2 moved numpy.core to numpy._core.
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
    """CIFAR-10 training images, from the archive or its folder -> uint8 (N, 32, 32, 3)."""
    rows = [images.reshape(-1, 3, 32, 32) for images, _ in cifar_batches(path)]
    return np.concatenate(rows).transpose(0, 2, 3, 1)


def cifar_batches(path):
    """The five training batches as pairs: images uint8 (N, 3072), labels int64 (N,).

    Both official forms, known by the names inside: data_batch_1 ... 5 (Python pickles) and
    data_batch_1.bin ... 5.bin. Four batches out of five would train silently on 40,000 images, so a
    missing one is an error; each may have any number of rows.
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
            while tar.fileobj.read(2**20):  # gzip compares its checksum at the very end only
                pass
    if missing := set("12345") - set(parts):
        raise ValueError(f"{path} has no CIFAR-10 data_batch_{min(missing)} "
                         "(an archive of image files: unpack it, or use a .zip)")
    for number, (binary, raw) in sorted(parts.items()):
        where = f"{path}: data_batch_{number}"
        if binary:  # each record: one byte of label, then 3072 of pixels
            if len(raw) % 3073:
                raise ValueError(f"{where}.bin is not made of records of 3073 bytes, or cut")
            rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
            batch, labels = rows[:, 1:], rows[:, 0]
        else:
            try:
                pickled = ArrayUnpickler(io.BytesIO(raw), encoding="bytes").load()
                if not isinstance(pickled, dict):
                    raise ValueError("a pickle, but of no dictionary")
                batch, labels = pickled.get(b"data"), np.asarray(pickled.get(b"labels", []))
            except Exception as error:  # a hostile pickle can raise nearly anything
                raise ValueError(f"{where}: {one_line(error)}") from error
        if not isinstance(batch, np.ndarray) or batch.dtype != np.uint8:
            raise ValueError(f"{where} holds no uint8 array")
        # A reshape would take any shape with the right number of bytes, and mix the rows up.
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
    """The IDX file of training images in a folder, or None. It may lie in a folder of the same
    name, as Kaggle's archives have it, and next to one."""
    def named(place):
        return [os.path.join(place, name) for name in sorted(os.listdir(place))
                if IDX_TRAIN.search(name)]

    found = named(folder)
    found += [inner for place in found if os.path.isdir(place) for inner in named(place)]
    # A pipe or a broken link is better than nothing: the reader names it.
    return min((path for path in found if not os.path.isdir(path)),
               key=lambda path: not os.path.isfile(path), default=None)


def labels_of(path):
    """Where the labels of an IDX file of images are: next to it, or as deep as it is."""
    def renamed(name):
        return name.replace("images", "labels").replace("idx3", "idx1")

    folder, name = os.path.split(path)
    deep = os.path.join(os.path.dirname(folder), renamed(os.path.basename(folder)), renamed(name))
    near = os.path.join(folder, renamed(name))
    return deep if not os.path.isfile(near) and os.path.isfile(deep) else near


def read_labels(path):
    """Labels of a training set: an IDX images file or folder, with labels next to it, or CIFAR-10's
    archive or folder of pickles -> int64 (N,). ValueError: there are none."""
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
            raise ValueError(f"{where} is not an IDX file of labels, or is cut")
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
    if 0 in (count, height, width):  # a border would make black images out of none
        raise ValueError(f"no images in {path}: {count} of {width}x{height}")
    if len(raw) != 16 + count * height * width:
        raise ValueError(f"{path} should hold {count} images of {width}x{height}, is cut or broken")
    images = np.frombuffer(raw, np.uint8, offset=16).reshape(count, height, width, 1)
    if max(height, width) <= size:  # 28 -> 32 by a border: digits keep their exact pixels
        down, right = size - height, size - width
        images = np.pad(images, ((0, 0), (down // 2, down - down // 2),
                                 (right // 2, right - right // 2), (0, 0)))
    return images


def read_npy(file):
    """The array of an open .npy file, or of a member of .npz, which must end with it."""
    array = np.lib.format.read_array(file, allow_pickle=False)  # a pickle could run any program
    if file.read(1):  # np.load would silently leave the rest of the images out
        raise ValueError(f"there is more in it than the array {array.shape} of its header")
    return array


def choose(archive, path, key):
    """The array `key` of an open .npz, or its only one that can be images."""
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
        raise ValueError(f"{path}: name one array as {path}:KEY, of {listing or 'none'}")
    return arrays[choices[0]]


def read_numpy(path, key):
    """A .npy file, or one array of a .npz (`key`, or the only one) -> uint8 (N, H, W, C).

    Floats are refused, not guessed at: they may mean [0, 1], [-1, 1] or [0, 255].
    """
    with open(path, "rb") as file:
        if not file.peek(2).startswith(b"PK"):
            array = read_npy(file)
        else:
            with zipfile.ZipFile(file) as archive:
                array = choose(archive, path, key)
    if array.dtype != np.uint8:
        raise ValueError(f"{path}: {array.dtype} is not uint8; save 0..255, for floats in [0, 1] "
                         "as (x * 255).round().astype('uint8')")
    if array.ndim == 3 and array.shape[2] in (1, 3, 4) and array.shape[1] != array.shape[2]:
        raise ValueError(f"{path}: {array.shape} looks like one image (H,W,C): save image[None]")
    if array.ndim == 3:
        return array[..., None]
    if array.ndim == 4 and array.shape[3] in (1, 3, 4):
        return array
    if array.ndim == 4 and array.shape[1] in (1, 3, 4):
        return array.transpose(0, 2, 3, 1)
    raise ValueError(f"{path}: {array.shape} is none of (N,H,W), (N,H,W,C), (N,C,H,W), C = 1, 3, 4")


def read_array(path, key=None, size=0):
    """A file or folder that is one array of images, known by its first bytes -> (N, H, W, C)."""
    if os.path.isdir(path):
        return read_cifar(path)
    if not os.path.isfile(path):  # opening a named pipe would wait for ever
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
                     "folder or .zip of images, .npy, .npz, IDX, or a CIFAR-10 archive")


def download(url, path, sha256, instead="give the path of a copy"):
    """Fetch `url` to `path`: all of it and with the right SHA-256 (hex), or nothing and OSError.

    The error says where to put the file by hand, since clusters often have no network. Several
    processes may do this at once: each writes another file, and the last to finish wins.
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
    except Exception as error:  # OSError mostly, but a cut reply is an HTTPException
        raise OSError(f"cannot download {url} ({one_line(error)}): put the file with SHA-256 "
                      f"{sha256} at {path}, or {instead}") from error


def cache_path(name):
    """Where a download of this name is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(cache, "diffusion-data", name)


def cached(name, url, sha256, **more):
    """Path of the file `name` in the cache folder; downloaded from `url` if it is not there."""
    path = cache_path(name)
    if not os.path.exists(path):
        download(url, path, sha256, **more)
    return path


def cifar_archive():
    """Path of the CIFAR-10 archive in the cache folder (170 MB)."""
    return cached("cifar-10-python.tar.gz", CIFAR_URL, CIFAR_SHA256)


# ------------------------------------------------------------------ what was checked before

INDEXES = 50  # so many are kept; that of a million files has 39 MB


def index_path(source):
    """Where it is remembered which files of a folder or zip were checked."""
    name = hashlib.sha256(os.path.realpath(source).encode("utf-8", "surrogatepass")).hexdigest()
    return cache_path(f"checked/{name[:16]}.json")


def recall(source, decoder):
    """What `remember` was given for this source and decoder: {key: facts}. {} if there is nothing,
    or anything else."""
    try:
        found = json.loads(content(index_path(source), 2**30))
        if found["decoder"] == decoder and all(map(is_facts, found["checked"].values())):
            return found["checked"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError):
        pass  # damaged or foreign: it will be written anew
    return {}


def is_facts(value):
    """[mode, width, height], or a reason in one line why a file cannot be read."""
    if isinstance(value, list) and list(map(type, value)) == [str, int, int]:
        value = value[0]
    return isinstance(value, str) and value.isprintable()


def remember(source, decoder, checked):
    """Keep {key: facts} for the next start. A cache folder that takes no file costs only time."""
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
