r"""Atomic writes: each file gets a temporary name, is flushed, and is then renamed.

    with atomic_write(path) as temporary: ...    it becomes `path` only if the block succeeds
    write_text, write_csv, save_png, save_npz, save_figure

A reader sees the whole old file or the whole new file, even after a crash of the machine.

Not here: checkpoints (checkpoint.py), reading images (image_files.py).

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
except ImportError:  # Windows has no flock
    fcntl = None


@contextlib.contextmanager
def atomic_write(path, sweep=True):
    """with atomic_write(path) as temporary: write to it; it becomes `path` only if the block ends
    without an error. sweep: first delete temporary files that killed processes left; this is slow
    in folders of many files."""
    path = Path(path)
    here = f".{path.name}.{platform.node().replace('.', '-')}"  # machines may share the folder
    temporary = path.with_name(f"{here}.{os.getpid()}.tmp")
    for old in path.parent.glob(glob.escape(here) + ".*.tmp") if sweep else ():
        if not pid_exists(old.name.split(".")[-2]):
            old.unlink(missing_ok=True)
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())  # else the rename can reach the disk before the bytes
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder):
    """Let only one process at a time read a file of this folder and write it again."""
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
    """True if a process with this number (a string) runs on this machine."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        pass
    return True


def clean_stale(folder):
    """Delete the temporary files of killed processes in this folder, which this process has
    locked."""
    for old in Path(folder).glob(".*.tmp"):
        old.unlink(missing_ok=True)


def write_text(path, text):
    """Write a small text file, in UTF-8 for any locale. surrogateescape keeps the bytes of a file
    name that is not valid text."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_csv(path, rows):
    """Write dicts as the rows of a CSV file. The columns are all keys in order of appearance.
    surrogatepass keeps a file name that is not valid text."""
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
    from matplotlib.figure import Figure  # imported here, so that --help is fast
    return Figure(**arguments)


def save_figure(path, figure, dpi=120):
    """Write a matplotlib figure as PNG."""
    from matplotlib.text import Text  # here, as in figure()
    for text in figure.findobj(Text):  # a file name may be invalid UTF-8
        raw = text.get_text().encode("utf-8", "surrogateescape")
        text.set_text(raw.decode("utf-8", "replace"))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def check_space(folder, size):
    """Raise OSError unless the disk of this folder (which need not exist) has `size` bytes free."""
    folder = Path(folder).resolve()
    here = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(here).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are "
                      "free on the disk of", str(folder))
