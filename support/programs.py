r"""How programs start, stop and fail: signals, one-line errors, lost output.

    if __name__ == "__main__":
        run_main(main)          # ValueError and OSError end in one line and status 2

    with StopSignal() as stop:  # Ctrl-C, SIGTERM, SIGHUP: finish the step, save, end
        ...

Not here: what is saved (run.py), or how processes talk to each other (distributed.py).

    TRACEBACK=1 python train.py ...                      # shows where an error came from
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
    """A signal came when there was no step to finish."""


class StopSignal:
    """Inside `with StopSignal() as stop`, the signals raise Interrupted. After stop.gently = True
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
                print(f"stopped by {self.requested} before the first step. The same command "
                      "starts again.", flush=True)
            return True

    def handle(self, number, frame):
        if self.requested == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        if not self.gently:
            raise Interrupted(self.requested)

    def unless_requested(self, work, *inputs):
        """work(*inputs), or None if a signal has come, or comes meanwhile and breaks it off."""
        self.gently = False
        try:
            return None if self.requested else work(*inputs)
        except Interrupted:
            return None
        finally:
            self.gently = True


class IgnoreWriteErrors:
    """A text stream whose write errors (full disk, closed pipe or terminal) end no run."""

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
    """From here on, text that cannot be printed is lost and the program goes on. For programs
    whose results are files."""
    sys.stdout, sys.stderr = IgnoreWriteErrors(sys.stdout), IgnoreWriteErrors(sys.stderr)


def run_main(main):
    """Run main(). A bad argument or file ends in one line and exit status 2; TRACEBACK=1 shows
    where it came from."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a character that the terminal lacks ends no program
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
        # The process that failed prints its own line first. torchrun asks us to end meanwhile.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1)
        folder = attempt_folder()
        if not (folder and list(folder.glob("error-*"))):
            report_error("another process of this job has ended, or did not answer for "
                         f"{STEP_TIMEOUT.total_seconds() / 60:g} minutes. The same command goes on "
                         "from the last checkpoint")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def is_compile_failure(error):
    """True if this RuntimeError is one of torch.compile."""
    dynamo = sys.modules.get("torch._dynamo.exc")  # slow to import, and often not needed
    return dynamo is not None and isinstance(error, dynamo.TorchDynamoException)


def is_peer_failure(error):
    """True if this RuntimeError means that another process did not answer."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if re.search("invalid usage|Duplicate GPU|unhandled cuda error|CUDA error", str(error)):
        return False  # all processes are there: the GPU failed, or NCCL was asked the impossible
    return several and (isinstance(error, dist.DistError) or bool(re.search(
        "gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|[Tt]imed out", str(error))))


def attempt_folder():
    """The folder that the processes of this machine share, which torchrun makes anew at each
    start; None without torchrun."""
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")  # .../attempt_0/RANK/error.json
    return Path(report).parents[1] if report else None


def report_error(error):
    """Print one line on stderr and put it into torchrun's report. If several processes of one
    machine meet the same error, only the first prints it."""
    line = f"{Path(sys.argv[0]).name}: error: " + " ".join(str(error).splitlines())
    line = line.encode(errors="backslashreplace").decode()  # file names that are not text
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
