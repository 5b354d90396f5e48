r"""Files that are whole or absent: atomic writes, checkpoints, and what a file is that is neither.

    with atomic_write(path) as temporary: ...    it becomes `path` only if all went well
    save_checkpoint, load_checkpoint             tensors and plain values, with their checksums
    find_checkpoint("NAME")                      runs/NAME/checkpoint.pt

Files are written under a temporary name in the same folder, flushed to the disk and renamed, so
that a reader sees the old file or the new one and never half of one, whenever the machine goes
down. Nothing in a file is ever executed. What is wrong with one is said in one line, a ValueError
or an OSError.

What this file does not do: images (data.py), or a run's lock (runtime.Processes.hold).

    python -c "import files; print(files.describe({'weight': 1, 'bias': 2}))"
"""

import contextlib
import csv
import errno
import glob
import os
import platform
import shutil
import zipfile
from pathlib import Path

import torch

try:
    import fcntl
except ImportError:  # Windows, which has no such locks
    fcntl = None

RUNS = Path("runs")
FORMAT = "sa-etsdm run 1"  # written into each checkpoint; says what the file is, and which version
# What a checkpoint has at least.
ENTRIES = dict(settings=dict, raw=dict, ema=dict, optimizer=dict, step=int, skipped=int,
               processes=int, dataset=int)


@contextlib.contextmanager
def atomic_write(path, sweep=True):
    """with atomic_write(path) as temporary: write there; it becomes `path` only if the block ends
    without an error. sweep: first remove what killed processes left of the same; takes longer in
    folders of many files."""
    path = Path(path)
    here = f".{path.name}.{platform.node().replace('.', '-')}"  # machines may share the folder
    temporary = path.with_name(f"{here}.{os.getpid()}.tmp")
    for old in path.parent.glob(glob.escape(here) + ".*.tmp") if sweep else ():
        if not alive(old.name.split(".")[-2]):
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
            os.close(handle)  # which unlocks it


def alive(pid):
    """Is there a process of this number (a string) on this machine?"""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, ValueError):
        pass
    return True


def write_text(path, text):
    """A small text file, whole or not at all.

    Text is UTF-8 in every file, whatever the locale: "±" is not in each. surrogateescape keeps the
    bytes of a file name that is not valid text."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_csv(path, rows):
    """rows: dicts -> a CSV file, whose columns are all their keys in the order of appearance.

    surrogatepass: a file name that is not valid text is the same again when read."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_write(path) as temporary, open(
            temporary, "w", newline="", encoding="utf-8", errors="surrogatepass") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)


def figure(**how):
    """A new matplotlib figure, without pyplot: no display, no global state."""
    from matplotlib.figure import Figure  # here: --help need not wait a third of a second for it
    return Figure(**how)


def save_figure(path, figure, dpi=120):
    """A matplotlib figure -> a PNG file."""
    from matplotlib.text import Text  # here: as in figure()
    for text in figure.findobj(Text):  # a file name in another encoding than the locale's
        raw = text.get_text().encode("utf-8", "surrogateescape")
        text.set_text(raw.decode("utf-8", "replace"))
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def remove_leftovers(folder):
    """Delete the temporary files that a killed process left in this folder, which we hold."""
    for old in Path(folder).glob(".*.tmp"):
        old.unlink(missing_ok=True)


def check_space(folder, size):
    """OSError unless `size` bytes are free where this folder is, or will be."""
    folder = Path(folder).resolve()
    here = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(here).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are "
                      "free on the disk of", str(folder))


def size_of(thing):
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(thing, torch.Tensor):
        return thing.numel() * thing.element_size()
    parts = thing.values() if isinstance(thing, dict) else thing
    return sum(map(size_of, parts)) if isinstance(thing, dict | list | tuple) else 0


def save_checkpoint(path, checkpoint):
    """checkpoint: a dict of tensors and plain values -> file, atomically. OSError: it could not be
    written, and the file is as it was."""
    check_space(Path(path).parent, size_of(checkpoint))
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        try:
            torch.save({"format": FORMAT, **checkpoint}, f)
        except RuntimeError as error:  # torch's zip writer, when the disk is full or a quota used
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def read_tensors(path):
    """What torch.save wrote, on the CPU: tensors and plain values, nothing that could run.
    ValueError, a few words: the file is something else, or not what was written. OSError."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        damaged = None
        if zipfile.is_zipfile(path):  # as all versions since 1.6 write; torch reads no checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
    except MemoryError:
        raise
    except Exception as error:  # torch has many kinds: a pickle refused, a zip cut short, no zip
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # it seeks below 0 in some
            raise
        raise ValueError(what_is(path)) from error
    if damaged:
        raise ValueError(f"it is damaged: {damaged} in it does not have its checksum, the disk or "
                         "a copy has changed it")
    return tensors


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU. ValueError in one line if the file is
    something else, or not what was written."""
    try:
        checkpoint = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a checkpoint of train.py ({error})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path} is not a checkpoint of train.py: it holds "
                         f"{describe(checkpoint)}; give a folder under runs/")
    if missing := [k for k in ENTRIES if not isinstance(checkpoint.get(k), ENTRIES[k])]:
        raise ValueError(f"{path} is not a whole checkpoint of train.py: its "
                         f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    return checkpoint


def load_weights(module, weights, path, what="its own settings"):
    """module.load_state_dict, strict; ValueError in one line where a checkpoint does not fit, or
    holds what is no number."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:  # the last two: of odd keys
        first = str(error).splitlines()[:2][-1].strip()[:160]  # it names every key that is missing
        raise ValueError(f"{path} does not fit {what}: {first}") from error
    if not finite(module.state_dict()):
        raise ValueError(f"{path} holds weights that are not finite: that training has failed")


def load_moments(optimizer, state, path):
    """optimizer.load_state_dict; ValueError in one line where it does not fit, which PyTorch finds
    late or never: shapes, numbers that are not finite, entries that are missing."""
    wanted = {k for group in optimizer.param_groups for k in group}
    try:
        optimizer.load_state_dict(state)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has no state of this optimizer (at {error})") from error
    if missing := wanted - {k for group in optimizer.param_groups for k in group}:
        raise ValueError(f"{path} has no state of this optimizer: no {' '.join(sorted(missing))}")
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        for name, value in optimizer.state[p].items():
            if name.startswith("exp_avg") and value.shape != p.shape:
                raise ValueError(f"{path} does not fit its own settings: the optimizer's {name} is "
                                 f"{tuple(value.shape)}, the weight {tuple(p.shape)}")
        if not finite(optimizer.state[p]):
            raise ValueError(f"{path}: the optimizer's state holds values that are not finite")


def finite(tensors):
    """Are all numbers finite, of a dict of tensors (and other things)?"""
    return all(bool(v.isfinite().all()) for v in tensors.values()
               if isinstance(v, torch.Tensor) and v.is_floating_point())


def what_is(path):
    """A few words on what a file that does not load looks like."""
    with open(path, "rb") as f:
        head = f.read(512)
    if not head:
        return "the file is empty"
    if head.lstrip()[:1] == b"<":
        return "it is a web page: the download went wrong"
    if head[:2] == b"PK":
        return "it is cut short, or holds more than tensors and plain values"
    return "its first bytes are " + repr(head[:8])


def describe(thing):
    """What a foreign checkpoint holds, in a few words."""
    if not isinstance(thing, dict):
        return f"a {type(thing).__name__}"
    if str(thing.get("format", "")).startswith(FORMAT.rsplit(" ", 1)[0]):
        return f"format {thing['format']!r}, of another version of this program"
    if {"state", "param_groups"} <= thing.keys():
        return "the state of an optimizer"
    some = ", ".join(map(str, list(thing)[:3]))
    return f"{len(thing)} entries" + f": {some}" * bool(some) + ", ..." * (len(thing) > 3)


def find_checkpoint(run=None):
    """The checkpoint of a run: a folder, a name under runs/, a checkpoint file, or None for the
    newest run."""
    if run is None:
        found = sorted(RUNS.glob("*/checkpoint.pt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise FileNotFoundError(f"no run under {RUNS.resolve()}: train one first, "
                                    "e.g. torchrun train.py --sa-k 2")
        return found[-1]
    for path in (Path(run), RUNS / run):
        if path.is_file():
            return path
        if (path / "checkpoint.pt").is_file():
            return path / "checkpoint.pt"
    if Path(run).is_dir():
        raise FileNotFoundError(f"{run} has no checkpoint.pt: is it a run folder?")
    names = sorted(p.parent.name for p in RUNS.glob("*/checkpoint.pt"))
    raise FileNotFoundError(f"no run {run}; under {RUNS}/ there are: {' '.join(names) or 'none'}")
