r"""Start, stop and failure of programs: signals, one-line errors, lost output.

    if __name__ == "__main__":
        run_main(main)          # ValueError and OSError end in one line and status 2

    with StopSignal() as stop:  # Ctrl-C, SIGTERM, SIGHUP: finish the step, save, end
        ...

Not here: saving (run.py), communication between processes (distributed.py).

    TRACEBACK=1 python train.py ...                      # shows the source of an error
    python -c "from support.programs import StopSignal; print(StopSignal.SIGNALS)"
"""

import contextlib
import hashlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from support.distributed import STEP_TIMEOUT


class Interrupted(KeyboardInterrupt):
    """A signal came while no step was running."""


class StopSignal:
    """Inside `with StopSignal() as stop`, the signals raise Interrupted. With stop.gently = True
    they only set stop.requested to the signal's name, so that a loop can finish its step and save.
    A second Ctrl-C ends the program at once."""

    SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]

    def __enter__(self):
        self.requested, self.gently = "", False
        # A signal that is ignored stays ignored: nohup relies on it.
        caught = [n for n in self.SIGNALS if signal.getsignal(n) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.handle) for number in caught}
        return self

    def __exit__(self, kind, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if kind is Interrupted:
            if os.environ.get("RANK", "0") == "0":
                print(f"stopped by {self.requested} before the first step. Run the same command "
                      "to start again.", flush=True)
            return True

    def handle(self, number, frame):
        if self.requested == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        if not self.gently:
            raise Interrupted(self.requested)

    def unless_requested(self, work, *inputs):
        """work(*inputs), or None if a signal came before or interrupts the work."""
        self.gently = False
        try:
            return None if self.requested else work(*inputs)
        except Interrupted:
            return None
        finally:
            self.gently = True


class IgnoreWriteErrors:
    """A text stream that ignores write errors (full disk, closed pipe), so that they end no run."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, words):
        with contextlib.suppress(OSError):
            self.stream.write(words)
        return len(words)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def ignore_write_errors():
    """From now on, the program continues if text cannot be printed. For programs whose results are
    files."""
    sys.stdout, sys.stderr = IgnoreWriteErrors(sys.stdout), IgnoreWriteErrors(sys.stderr)


def run_main(main):
    """Run main(). A bad argument or file gives one line and exit status 2, or a traceback with
    TRACEBACK=1."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may lack a character
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        report_error(error)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
                "can't allocate memory" in str(error)):
            report_error(f"out of memory ({(str(error).splitlines() or [''])[0]}): try a smaller "
                         "--batch-size or, in train.py, --microbatch or --recompute")
            sys.exit(2)
        if is_compile_failure(error) and not os.environ.get("TRACEBACK"):
            report_error(f"--compile: torch.compile failed ({str(error).strip().splitlines()[0]}). "
                         "Install a C++ compiler, or use --no-compile")
            sys.exit(2)
        if os.environ.get("TRACEBACK") or not is_peer_failure(error):
            raise
        # Let the failed process print its line first, although torchrun asks this one to end.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1)
        folder = attempt_folder()
        if not (folder and list(folder.glob("error-*"))):
            report_error("another process of this job has ended, or did not answer for "
                         f"{STEP_TIMEOUT.total_seconds() / 60:g} minutes. Run the same command to "
                         "continue from the last checkpoint")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def is_compile_failure(error):
    """True if this RuntimeError comes from torch.compile."""
    dynamo = sys.modules.get("torch._dynamo.exc")  # not imported here, since that is slow
    return dynamo is not None and isinstance(error, dynamo.TorchDynamoException)


def is_peer_failure(error):
    """True if this RuntimeError means that another process did not answer."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if re.search("invalid usage|Duplicate GPU|unhandled cuda error|CUDA error", str(error)):
        return False  # all processes run, but the GPU failed or NCCL got an impossible request
    return several and (isinstance(error, dist.DistError) or bool(re.search(
        "gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|[Tt]imed out", str(error))))


def attempt_folder():
    """The folder that the processes of this machine share; torchrun makes a new one at each start.
    None without torchrun."""
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_0/RANK/error.json
    return Path(report).parents[1] if report else None


def report_error(error):
    """Print one line on stderr and write it to torchrun's report. If several processes of a machine
    have the same error, only the first prints it."""
    line = f"{Path(sys.argv[0]).name}: error: " + " ".join(str(error).splitlines())
    line = line.encode(errors="backslashreplace").decode()  # a file name may be invalid UTF-8
    if folder := attempt_folder():
        try:
            mark = hashlib.sha256(line.encode()).hexdigest()[:16]
            (folder / f"error-{mark}").touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:
            pass
        stamp = dict(timestamp=str(int(time.time())))
        with contextlib.suppress(OSError):
            Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(
                json.dumps(dict(message=dict(message=line, extraInfo=stamp))), encoding="utf-8")
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # so that the error has its own line
    print(line, file=sys.stderr, flush=True)
