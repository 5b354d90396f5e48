r"""One program, one or many processes: who am I, and how do we agree?

    torchrun --nproc_per_node 4 train.py     sets RANK, WORLD_SIZE, LOCAL_RANK; init() reads them
    python train.py                          no such variables: one process, and the same code

Numbers and flags travel as CPU tensors over gloo, gradients over NCCL if they are on GPUs. If one
process dies, the others find out. On CPUs (gloo): at once if the system closes its connections,
else after STEP_TIMEOUT. They then print one line, and torchrun ends or restarts all of them. A
process that waits for a GPU (NCCL) notices nothing: torchrun ends it, or NCCL's watchdog does after
STEP_TIMEOUT.

Not here: gradients (DistributedDataParallel averages them), or what the processes do.

    python -c "from support import distributed as d; print(d.init().world_size)"
"""

import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from support.device import choose_device
from support.precision import set_tf32

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None

STEP_TIMEOUT = timedelta(minutes=10)  # for training: a process that is silent for longer is dead
LONG_TIMEOUT = timedelta(days=7)  # for work on one process that takes as long as it takes


class Distributed:
    """rank, world_size (number of processes), local_rank, device.

    with init() as dist: the process group is left, and locks are released, on every way out."""

    def __init__(self, rank, world_size, local_rank, device, slow_group=None):
        self.rank, self.world_size, self.local_rank = rank, world_size, local_rank
        self.device, self.slow_group, self.locks = device, slow_group, []

    def __enter__(self):
        return self

    def __exit__(self, *exc):  # after errors too, or the other processes would wait
        for handle in self.locks:
            os.close(handle)
        self.locks = []
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self):
        return self.rank == 0

    def print0(self, *words):
        """Print on rank 0 only."""
        if self.is_main:
            print(*words, flush=True)

    def all_reduce(self, tensor):
        """The sum of a CPU tensor over all processes. gloo: it never waits for a GPU's queue."""
        if self.world_size > 1:
            tensor = tensor.clone()
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags):
        """True on every process if the flag is set on one of them. Several flags: a list."""
        sums = self.all_reduce(torch.tensor([float(bool(flag)) for flag in flags])).tolist()
        return list(map(bool, sums)) if len(flags) > 1 else bool(sums[0])

    def barrier(self):
        """Wait for all processes, however long it takes. It polls, because Python handles a signal
        only between two of its lines, not inside a wait of gloo."""
        if self.world_size > 1:
            work = dist.barrier(self.slow_group, async_op=True)
            while not work.is_completed():
                time.sleep(0.01)
            work.wait()  # raises what went wrong

    def broadcast(self, value):
        """Rank 0's value (any plain object) on every process, however long rank 0 takes."""
        if self.world_size == 1:
            return value
        self.barrier()
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.slow_group, device=torch.device("cpu"))
        return box[0]

    def gather(self, value):
        """Every process's value (any plain object) as a list on rank 0; None elsewhere."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size if self.is_main else None
        dist.gather_object(value, values, dst=0)
        return values

    def on_main(self, work, *inputs):
        """Run work(*inputs) on rank 0 only -> its result on every process. If it fails, rank 0
        raises the error and the others exit with status 2."""
        value = error = None
        if self.is_main:
            try:
                value = work(*inputs)
            except (ValueError, OSError) as e:
                error = e
        value, failed = self.broadcast((value, error is not None))
        if error:
            raise error
        if failed:
            sys.exit(2)
        return value

    def main_first(self, work):
        """Run work() on every process, on rank 0 before the others: a download happens once, and
        an error is printed once. The result does not travel: every process has its own."""
        results = []

        def run():
            results.append(work())

        self.on_main(run)
        if not self.is_main:
            run()
        self.barrier()  # in the slow group: the next collective call may have a short timeout
        return results[0]

    def lock(self, folder, seconds=2):
        """No other process writes to this folder until we end: rank 0 locks it, and the system
        unlocks it if we die. Waits `seconds` for a program that is just ending. ValueError:
        another program holds the lock."""
        if not self.is_main or fcntl is None:
            return
        handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + seconds
        self.locks.append(handle)
        while True:
            try:
                return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(f"{folder}: another process is writing to it. Stop it, or let "
                                     "it finish") from None
                time.sleep(0.2)
            except OSError:  # a file system without locks
                return


def init(tf32=True, deterministic=False, timeout=LONG_TIMEOUT, device="auto"):
    """Join the other processes if torchrun started us, and choose the device -> Distributed.

    tf32           let GPUs round float32 products to 10 bits; False if digits count
    deterministic  use only algorithms that give the same bits again, slower on GPUs
    timeout        how long a collective call may take; STEP_TIMEOUT in training
    device         auto, cuda, mps or cpu: --device
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over all new tensors
    defaults = dict(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    values = {name: os.environ.get(name, default) for name, default in defaults.items()}
    if not all(map(str.isdecimal, values.values())) or int(values["RANK"]) >= int(
            values["WORLD_SIZE"]):
        raise ValueError(" ".join(f"{k}={v}" for k, v in values.items()) + " in the environment do "
                         "not fit together: start with torchrun, or unset them")
    rank, world_size, local_rank = map(int, values.values())
    device = choose_device(device, local_rank, world_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        set_tf32(tf32)
    slow_group = None
    if world_size > 1:
        # torchrun's store outlives a restart, with the addresses of the dead processes in it
        # (PyTorch 2.13, issue 135712). A prefix for each attempt keeps them apart.
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(choose_backend(device), timeout=timeout, store=store, rank=rank,
                                world_size=world_size)
        slow_group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)
    return Distributed(rank, world_size, local_rank, device, slow_group)


def choose_backend(device):
    """The backend of init_process_group. NCCL rejects two processes on one GPU; gloo copies through
    the CPU, and takes any number."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this machine: torchrun's
    alone = device.type == "cuda" and here <= torch.cuda.device_count()
    return "cpu:gloo,cuda:nccl" if alone else "gloo"
