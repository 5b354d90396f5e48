"""Run under torchrun by test_distributed.py: train.py in which one process fails, or which writes
down its losses.

    torchrun --nproc_per_node 2 tests/robustness/faulty_worker.py die 1 7 --steps 10
        rank 1, at step 7; also: hang, refuse
    torchrun --nproc_per_node 2 tests/robustness/faulty_worker.py log losses.json --steps 10
"""

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import train
from support import distributed, programs

real, seen = train.train_step, []


def train_step(state, *inputs):
    """train.train_step, in which a process fails once (not again after a restart), or whose losses
    are kept."""
    if how != "log" and starts == "0" and (state.step, os.environ["RANK"]) == (int(step), rank):
        if how == "refuse":
            raise ValueError("no good")
        os.kill(os.getpid(), signal.SIGKILL if how == "die" else signal.SIGSTOP)
    values = real(state, *inputs)
    seen.append(values[:-1])
    return values


if __name__ == "__main__":
    how, *words = sys.argv[1:]
    rank, step = (words.pop(0), words.pop(0)) if how != "log" else (None, None)
    out = words.pop(0) if how == "log" else None
    starts, train.train_step = os.environ["TORCHELASTIC_RESTART_COUNT"], train_step
    if how == "hang":  # not shorter: a slow start on a busy machine is no death
        distributed.STEP_TIMEOUT = timedelta(seconds=20)
    if starts != "0" and os.environ["RANK"] == "0":
        time.sleep(3)  # the other must wait, and not use the address of the dead process
    sys.argv = ["train.py", *words]
    programs.run_main(train.main)
    if how == "log" and os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps(seen))
