"""Run under torchrun by test_distributed.py: train.py in which one process fails.

torchrun --nproc_per_node 2 tests/robustness/faulty_worker.py die 1 7 --steps 10
    rank 1, at step 7; also: hang, refuse
"""

import os
import signal
import sys
import time
from datetime import timedelta

import train
from support import distributed, programs

real = train.train_step


def train_step(state, *inputs):
    """train.train_step, in which a process fails once: not again after a restart."""
    if starts == "0" and (state.step, os.environ["RANK"]) == (int(step), rank):
        if how == "refuse":
            raise ValueError("no good")
        os.kill(os.getpid(), signal.SIGKILL if how == "die" else signal.SIGSTOP)
    return real(state, *inputs)


if __name__ == "__main__":
    how, rank, step, *words = sys.argv[1:]
    starts, train.train_step = os.environ["TORCHELASTIC_RESTART_COUNT"], train_step
    if how == "hang":  # not shorter: a slow start on a busy machine is no death
        distributed.STEP_TIMEOUT = timedelta(seconds=20)
    if starts != "0" and os.environ["RANK"] == "0":
        time.sleep(3)  # the other must wait, and not use the address of the dead process
    sys.argv = ["train.py", *words]
    programs.run_main(train.main)
