r"""Two ways to do the same work, timed side by side: each in a process that does nothing else.

    side = Side("benchmarks.plain", "training", "tiny", 4, tuned=False)
    compare({"plain": side, "ours": another})         # {name: median seconds}; the sides take turns

The settings of support/__init__.py (OpenMP's spin count, glibc's thresholds) belong to a process.
A tuned side imports support before torch, as our programs do. A plain side never runs that file.

Not here: the works themselves (plain.py, __main__.py).

    python -c "from benchmarks.worker import Side; print(Side('time', 'localtime').process.pid)"
"""

import contextlib
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Side:
    """One side of a comparison: module.make(*arguments) -> work(), in its own process.

    tuned: with support's settings. threads None: as many as the user set. The arguments are plain
    values. ValueError: the work could not be made, or failed."""

    def __init__(self, module, make, *arguments, tuned=True, threads=None):
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
        if not tuned:
            environment.pop("GOMP_SPINCOUNT", None)  # support has set it in this process
        task = json.dumps([module, make, arguments, tuned, threads])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", task], env=environment, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.answer()  # made, before the next side is: two at once would disturb each other

    def answer(self):
        """The worker's next line, a number."""
        line = self.process.stdout.readline()
        value = json.loads(line) if line else (
            "its process ended, perhaps out of memory: try a smaller --batch-size")
        if isinstance(value, str):
            raise ValueError(f"one side of the comparison failed: {value}")
        return value

    def time(self):
        """Seconds of one turn."""
        with contextlib.suppress(BrokenPipeError):  # answer() finds that it has ended
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        return self.answer()

    def end(self):
        """The worker ends when its input does."""
        self.process.communicate()


def compare(sides, rounds=5, warm=2):
    """{name: median seconds} of sides {name: Side}, which take turns, and then end."""
    times = {name: [] for name in sides}
    for _ in range(warm + rounds):
        for name, side in sides.items():
            times[name].append(side.time())
    for side in sides.values():
        side.end()
    return {name: statistics.median(values[warm:]) for name, values in times.items()}


def serve(module, make, arguments, tuned, threads):
    """The worker: make the work, then do it once for each line of input, and print the seconds."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started us
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is not an answer

    def answer(value):
        print(json.dumps(value), file=answers, flush=True)
    try:
        if tuned:
            importlib.import_module("support")
        else:  # support's modules, without the settings in its __init__.py
            package = types.ModuleType("support")
            package.__path__ = [str(ROOT / "support")]
            sys.modules["support"] = package
        import torch
        if threads:
            torch.set_num_threads(threads)
        wait = torch.cuda.synchronize if torch.cuda.is_available() else int
        work = getattr(importlib.import_module(module), make)(*arguments)
        answer(0)
        for _ in sys.stdin:
            wait()
            began = time.perf_counter()
            work()
            wait()
            answer(time.perf_counter() - began)
    except Exception as error:
        with contextlib.suppress(OSError):  # the program has ended, and prints why
            answer(str(error) if isinstance(error, ValueError) else repr(error))


if __name__ == "__main__":
    serve(*json.loads(sys.argv[1]))
