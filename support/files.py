r"""Files that are complete or absent: written under a temporary name, flushed, then renamed.

    with atomic_write(path) as temporary: ...    it becomes `path` only if all went well
    write_text, write_csv, save_png, save_npz, save_figure

A reader sees the old file or the new one and never half of one, whenever the machine goes down.

Not here: checkpoints (checkpoint.py), or reading images (image_files.py).

    python -c "from support import files; print(files.pid_exists('1'))"
"""

import contextlib
import csv
import errno
import glob
import os
import platform
import shutil
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None


@contextlib.contextmanager
def atomic_write(path, sweep=True):
    """with atomic_write(path) as temporary: write to it; it becomes `path` only if the block ends
    without an error. sweep: first remove what killed processes left of the same file; it takes
    longer in folders of many files."""
    path = Path(path)
    here = f".{path.name}.{platform.node().replace('.', '-')}"  # machines may share the folder
    temporary = path.with_name(f"{here}.{os.getpid()}.tmp")
    for old in path.parent.glob(glob.escape(here) + ".*.tmp") if sweep else ():
        if not pid_exists(old.name.split(".")[-2]):
            old.unlink(missing_ok=True)
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())  # the bytes before the name: a rename can reach the disk first
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder):
    """One process at a time between reading a file of this folder and writing it again."""
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        if fcntl:
            os.close(handle)  # this also unlocks it


def pid_exists(pid):
    """True if a process of this number (a string) runs on this machine."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        pass
    return True


def clean_stale(folder):
    """Delete the temporary files that a killed process left in this folder, which we have
    locked."""
    for old in Path(folder).glob(".*.tmp"):
        old.unlink(missing_ok=True)


def write_text(path, text):
    """Write a small UTF-8 text file, whatever the locale. surrogateescape keeps the bytes of a file
    name that is not valid text."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_csv(path, rows):
    """rows: dicts -> a CSV file whose columns are all their keys in the order of appearance.
    surrogatepass: a file name that is not valid text is the same again when read."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_write(path) as temporary, open(temporary, "w", newline="", encoding="utf-8",
                                               errors="surrogatepass") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)


def save_png(path, image, sweep=True):
    """Write a PIL image as PNG."""
    with atomic_write(path, sweep) as temporary:
        image.save(temporary, format="png")


def save_npz(path, **arrays):
    """Write NumPy arrays as .npz."""
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        np.savez(f, **arrays)


def figure(**arguments):
    """A new matplotlib figure, without pyplot: no display, no global state."""
    from matplotlib.figure import Figure  # here, since --help need not wait for matplotlib
    return Figure(**arguments)


def save_figure(path, figure, dpi=120):
    """Write a matplotlib figure as PNG."""
    from matplotlib.text import Text  # here, as in figure()
    for text in figure.findobj(Text):  # a file name in another encoding than the locale's
        raw = text.get_text().encode("utf-8", "surrogateescape")
        text.set_text(raw.decode("utf-8", "replace"))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def check_space(folder, size):
    """Raise OSError unless `size` bytes are free where this folder is, or will be."""
    folder = Path(folder).resolve()
    here = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(here).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are "
                      "free on the disk of", str(folder))
