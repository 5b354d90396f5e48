r"""Checkpoints: tensors and plain values with their checksums; nothing in a file is ever executed.

    save_checkpoint, load_checkpoint        a dict <-> runs/NAME/checkpoint.pt
    snapshot                                a copy on the CPU, to write later
    load_weights, load_optimizer            strict, with errors of one line
    find_checkpoint("NAME")                 runs/NAME/checkpoint.pt

Not here: what a run holds (train.TrainState), or its folder (run.py).

    python -c "from support import checkpoint as c; print(c.describe_checkpoint({'weight': 1}))"
"""

import errno
import hashlib
import json
import zipfile
from pathlib import Path

import torch

from support.files import atomic_write, check_space

RUNS = Path("runs")
# Written into each checkpoint: what the file is, and which version. Runs of format 1 (before the
# programs of papers/ existed) open for sampling, and cannot be resumed.
FORMATS = ("sa-etsdm run 1", "sa-etsdm run 2")
# What a checkpoint has at least. Format 1 calls the weights "raw".
ENTRIES = dict(settings=dict, net=dict, ema=dict, optimizer=dict, step=int, skipped=int,
               processes=int)


def save_checkpoint(path, checkpoint):
    """A dict of tensors and plain values -> file. OSError: it could not be written, and the file
    is as it was."""
    check_space(Path(path).parent, count_bytes(checkpoint))
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        try:
            torch.save({"format": FORMATS[-1], **checkpoint}, f)
        except RuntimeError as error:  # torch's zip writer, if the disk is full or a quota used
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def snapshot(value):
    """A copy of a checkpoint's content on the CPU: it can be written while training goes on."""
    def copied(value):
        if isinstance(value, torch.Tensor):  # from a GPU: to pinned memory, without a wait for each
            out = value.to("cpu", non_blocking=value.is_cuda)
            return value.clone() if out is value else out
        if isinstance(value, dict):
            return {k: copied(v) for k, v in value.items()}
        return type(value)(map(copied, value)) if isinstance(value, list | tuple) else value

    found = copied(value)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found


def to_json(settings):
    """A run's settings as the text of its config.json."""
    return json.dumps(settings, indent=1) + "\n"


def count_bytes(value):
    """Bytes of all tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, dict) else value
    return sum(map(count_bytes, parts)) if isinstance(value, dict | list | tuple) else 0


def read_tensors(path):
    """What torch.save wrote, on the CPU: tensors and plain values, nothing that could run.
    ValueError, a few words: the file is something else, or damaged. OSError."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        damaged = None
        if zipfile.is_zipfile(path):  # all versions since 1.6; torch checks no checksums
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
    except MemoryError:
        raise
    except Exception as error:  # torch has many: a pickle refused, a zip cut short, not a zip
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # it seeks below 0 in some
            raise
        raise ValueError(guess_file_type(path)) from error
    if damaged:
        raise ValueError(f"it is damaged: {damaged} in it does not have its checksum, the disk or "
                         "a copy has changed it")
    return tensors


def load_checkpoint(path):
    """The dict that save_checkpoint wrote, on the CPU. ValueError in one line if the file is
    something else, or damaged."""
    try:
        checkpoint = read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a checkpoint of train.py ({error})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") not in FORMATS:
        raise ValueError(f"{path} is not a checkpoint of train.py: it holds "
                         f"{describe_checkpoint(checkpoint)}; give a folder under runs/")
    if "raw" in checkpoint:  # format 1
        checkpoint["net"] = checkpoint.pop("raw")
    if missing := [k for k in ENTRIES if not isinstance(checkpoint.get(k), ENTRIES[k])]:
        raise ValueError(f"{path} is not a complete checkpoint of train.py: its "
                         f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    return checkpoint


def load_weights(module, weights, path, what="its own settings"):
    """module.load_state_dict, strict. ValueError in one line if the weights do not fit, or are not
    finite."""
    try:
        module.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:  # the last two: odd keys
        first = str(error).splitlines()[:2][-1].strip()[:160]  # it names every missing key
        raise ValueError(f"{path} does not fit {what}: {first}") from error
    if not all_finite(module.state_dict()):
        raise ValueError(f"{path} holds weights that are not finite: that training has failed")


def load_optimizer(optimizer, state, path):
    """optimizer.load_state_dict. ValueError in one line if it does not fit, which PyTorch finds
    late or never: shapes, numbers that are not finite, missing entries."""
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
            # The fused Adam takes the weight's strides for its moments': a channels_last weight
            # with contiguous moments is updated wrongly on a CPU, and raises on CUDA.
            if name.startswith("exp_avg") and value.stride() != p.stride():
                optimizer.state[p][name] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        if not all_finite(optimizer.state[p]):
            raise ValueError(f"{path}: the optimizer's state holds values that are not finite")


def weights_hash(net):
    """A short hash of a network's weights. A new run of the same name has another hash."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def all_finite(tensors):
    """True if all numbers in a dict of tensors (and other values) are finite."""
    return all(bool(v.isfinite().all()) for v in tensors.values()
               if isinstance(v, torch.Tensor) and v.is_floating_point())


def guess_file_type(path):
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


def describe_checkpoint(content):
    """What a foreign checkpoint holds, in a few words."""
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    if str(content.get("format", "")).startswith(FORMATS[0].rsplit(" ", 1)[0]):
        return f"format {content['format']!r}, of another version of this program"
    if {"state", "param_groups"} <= content.keys():
        return "the state of an optimizer"
    some = ", ".join(map(str, list(content)[:3]))
    return f"{len(content)} entries" + f": {some}" * bool(some) + ", ..." * (len(content) > 3)


def find_checkpoint(run=None):
    """The checkpoint of a run: a folder, a name under runs/, a checkpoint file, or None for the
    newest run."""
    if not run:
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
