"""Run under torchrun by test_distributed.py: train.py in which one process fails, or which writes
down what it sees.

    torchrun --nproc_per_node 2 tests/faulty_worker.py die 1 7 --steps 10       rank 1, at step 7
    torchrun --nproc_per_node 2 tests/faulty_worker.py hang 1 7 --steps 10
    torchrun --nproc_per_node 2 tests/faulty_worker.py refuse 0 7 --steps 10
    torchrun --nproc_per_node 2 tests/faulty_worker.py log losses.json --steps 10
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import runtime  # isort: skip
import train

real, seen = train.one_step, []


def failing(how, rank, step):
    """train.one_step, in which a process fails once: not again after a restart."""

    def one_step(model, *inputs):
        first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if first and model.step == step and int(os.environ["RANK"]) == rank:
            if how == "refuse":
                raise ValueError("no good")
            os.kill(os.getpid(), signal.SIGKILL if how == "die" else signal.SIGSTOP)
        return real(model, *inputs)

    return one_step


def logging(*inputs):
    """train.one_step, whose losses are kept."""
    seen.append(real(*inputs)[:-1])
    return (*seen[-1], 0.0)


if __name__ == "__main__":
    how, *words = sys.argv[1:]
    if how == "log":
        out = words.pop(0)
        train.one_step = logging
    else:
        train.one_step = failing(how, int(words.pop(0)), int(words.pop(0)))
    if how == "hang":  # else a busy machine's slow start would count as a death
        runtime.TIMEOUT = timedelta(seconds=20)
    if os.environ["TORCHELASTIC_RESTART_COUNT"] != "0" and os.environ["RANK"] == "0":
        time.sleep(3)  # the other must wait, and not take the address of the one that has died
    sys.argv = ["train.py", *words]
    runtime.run_program(train.main)
    if how == "log" and os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(seen))
