r"""Run many commands that depend on each other, in parallel on one machine.

    run_all(jobs, Machine())       # leaves out finished jobs, and jobs that only these need

papers/experiments.py makes a list of jobs. This file runs them, the longest dependency chain first,
each on one GPU or on a share of the cores. If a job fails, its last line is printed and all others
end. After a signal, the programs save their work and end. The same command continues both times.

Not here: several machines; the decision whether a job is done (its done()).

    python -c "from support import jobs; print(jobs.Machine())"

cost: passes of one image through the network; only ratios of costs matter here.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from support.programs import StopSignal

ROOT = Path(__file__).resolve().parents[1]  # where the programs are
STOP_TIMEOUT = 60  # seconds that programs have to save their work


@dataclass
class Job:
    """Commands that run in sequence. Each is a list of words after `python`: train.py ..., or
    -m papers.NAME ...."""
    name: str
    commands: list
    done: Callable  # () -> bool
    cost: float = 0.0
    after: tuple = ()  # names of jobs
    early: bool = False  # short, and may reject its input, so it runs before the long jobs
    finish: Callable = lambda text: None  # receives the output of the last command
    progress: Callable = lambda: 0.0  # the finished fraction


@dataclass
class Machine:
    """The number of jobs that run at a time, and the folder of their output."""
    workers: int = 0  # 0: one per GPU, or per core if there is no GPU
    gpus: list = field(default_factory=lambda: visible_gpus(torch.cuda.device_count()))
    logs: Path = Path("logs")

    def __post_init__(self):
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (
            os.cpu_count() or 1)
        self.workers = self.workers or len(self.gpus) or self.cores

    def environment(self, place):
        """Environment of the program in this place: its GPU or share of cores, and PYTHONPATH."""
        share = dict(OMP_NUM_THREADS=str(max(1, self.cores // self.workers)))
        if self.gpus:
            share = dict(CUDA_VISIBLE_DEVICES=self.gpus[place % len(self.gpus)])
        # PYTHONSAFEPATH: a data.py or papers/ in the user's folder must not replace this project's.
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**os.environ, **share, "PYTHONPATH": path, "PYTHONSAFEPATH": "1",
                "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def visible_gpus(count):
    """Names of `count` GPUs: those of CUDA_VISIBLE_DEVICES if it is set."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [name.strip() for name in given][:count] if any(given) else list(map(str, range(count)))


class Running:
    """A running job. Its output goes to a file."""

    def __init__(self, job, place, machine):
        self.job, self.place, self.left = job, place, list(job.commands)
        self.environment, self.log = machine.environment(place), machine.logs / f"{job.name}.log"
        machine.logs.mkdir(parents=True, exist_ok=True)
        self.log.write_text("", encoding="utf-8")
        self.start_next()

    def start_next(self):
        """Start the next command in a new session, so that Ctrl-C reaches only this program."""
        program, *args = self.left.pop(0)
        words = [program, *args] if program == "-m" else [str(ROOT / program), *args]
        self.out = self.log.with_suffix(f".{os.getpid()}.out")  # two experiments may run at once
        with open(self.out, "wb") as out, open(self.log, "ab") as log:
            self.process = subprocess.Popen([sys.executable, *words], stdout=out, stderr=log,
                                            env=self.environment, start_new_session=True)

    def poll(self):
        """True if all commands of the job have ended. ValueError: a command has failed."""
        status = self.process.poll()
        if status is None:
            return False
        text, errors = (path.read_text(encoding="utf-8", errors="replace")
                        for path in (self.out, self.log))
        self.out.unlink()
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(text)
        if status:
            reason = (errors.strip() or text.strip() or f"status {status}").split("\n")[-1]
            if status < 0:
                reason = f"killed by {signal.Signals(-status).name}; is there enough memory?"
            raise ValueError(f"{self.job.name} failed ({reason}). Its output is in {self.log}")
        if self.left:
            self.start_next()
            return False
        self.job.finish(text)
        if not self.job.done():  # train.py received a signal from elsewhere
            raise ValueError(f"{self.job.name} ended early: run the same command to continue")
        return True

    def send(self, number):
        """Send a signal to the program and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def stop_all(running):
    """End all jobs. SIGTERM comes first, so that train.py can save."""
    for one in running:
        one.send(signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT
    for one in running:
        try:
            one.process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.send(signal.SIGKILL)
            one.process.wait()
        one.out.unlink(missing_ok=True)


def needed(jobs):
    """The unfinished jobs that the user or another unfinished job needs. (The inputs of a finished
    job may be deleted.) `jobs` lists each job after its dependencies."""
    wanted = {job.name for job in jobs} - {name for job in jobs for name in job.after}
    found = []
    for job in reversed(jobs):
        if job.name in wanted and not job.done():
            found.append(job)
            wanted.update(job.after)
    return found[::-1]


def chain_costs(jobs):
    """{name: cost of the longest chain of jobs from this one on}; `jobs` as in needed()."""
    chain = {}
    for job in reversed(jobs):
        behind = [chain[j.name] for j in jobs if job.name in j.after]
        chain[job.name] = job.cost + max(behind, default=0)
    return chain


def run_all(jobs, machine):
    """Run all unfinished jobs -> True if all are done, False after a signal. ValueError: a job
    failed."""
    todo = {job.name: job for job in needed(jobs)}
    chain, running, free, done_cost = chain_costs(jobs), [], list(range(machine.workers)), 0.0
    before = {job.name: job.cost * job.progress() for job in todo.values()}  # from earlier calls
    bar = tqdm(total=sum(job.cost for job in todo.values()) or 1, smoothing=0, dynamic_ncols=True,
               initial=sum(before.values()),
               bar_format="{percentage:3.0f}% {elapsed}, {remaining} left{postfix}",
               mininterval=1 if sys.stderr.isatty() else 60, disable=not todo)
    with StopSignal() as stop, bar:
        stop.gently = True  # a signal only sets stop.requested; a second Ctrl-C ends at once
        try:
            while (todo or running) and not stop.requested:
                for one in [one for one in running if one.poll()]:
                    running.remove(one)
                    free.append(one.place)
                    done_cost += one.job.cost
                busy = {*todo, *(one.job.name for one in running)}
                ready = [job for job in todo.values() if not busy.intersection(job.after)]
                ready.sort(key=lambda job: (not job.early, -chain[job.name]))
                for job in ready[:len(free)]:
                    running.append(Running(todo.pop(job.name), free.pop(0), machine))
                now = sum(one.job.cost * one.job.progress() for one in running)
                bar.set_postfix_str(", ".join(one.job.name for one in running)[:100], False)
                bar.update(done_cost + now + sum(before[name] for name in todo) - bar.n)
                time.sleep(0.2)
        finally:
            stop_all(running)
    return not (todo or running)
