r"""Run many commands that depend on each other, as many at a time as the machine has room for.

    run_all(jobs, Machine())       # what is done, or led to what is done, is not done again

experiments.py makes a list of jobs, and this file does them: those first whose results others wait
for longest. Each has a GPU of its own, or a share of the cores. A job that fails ends it all with
the job's own last words; a signal ends it after the programs have saved what they have. Either way
the same command goes on.

What this file does not do: several machines, or guesses at what is done. A job says so itself.

    python -c "import jobs; print(jobs.Machine())"

cost: passes of one image through the network; only its proportions matter here.
"""

import runtime  # isort: skip  (before torch: it sets OpenMP's spinning)

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

HERE = Path(__file__).resolve().parent
PATIENCE = 60  # seconds that programs have to save what they have


@dataclass
class Job:
    """Commands that run one after the other, each a list of words after `python`."""
    name: str
    commands: list
    done: Callable  # () -> bool
    cost: float = 0.0
    after: tuple = ()  # names of jobs
    early: bool = False  # short, and may refuse what it is given: before the long ones
    finish: Callable = lambda text: None  # what the last command printed -> nothing
    progress: Callable = lambda: 0.0  # part of it that is done


@dataclass
class Machine:
    """How many jobs may run at a time, and where their words go."""
    workers: int = 0  # 0: one for each GPU, or else for each core
    gpus: list = field(default_factory=lambda: visible(torch.cuda.device_count()))
    logs: Path = Path("logs")

    def __post_init__(self):
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (
            os.cpu_count() or 1)
        self.workers = self.workers or len(self.gpus) or self.cores

    def environment(self, place):
        """Of the program in this place: its GPU, or its share of the cores."""
        share = dict(OMP_NUM_THREADS=str(max(1, self.cores // self.workers)))
        if self.gpus:
            share = dict(CUDA_VISIBLE_DEVICES=self.gpus[place % len(self.gpus)])
        return {**os.environ, **share, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}


def visible(count):
    """Names of so many GPUs: those that this program itself was given, if somebody chose."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [name.strip() for name in given][:count] if any(given) else list(map(str, range(count)))


class Running:
    """A job whose commands run, in a place; its words go to a file."""

    def __init__(self, job, place, machine):
        self.job, self.place, self.left = job, place, list(job.commands)
        self.environment, self.log = machine.environment(place), machine.logs / f"{job.name}.log"
        machine.logs.mkdir(parents=True, exist_ok=True)
        self.log.write_text("", encoding="utf-8")
        self.next()

    def next(self):
        """Start the next command, in a session of its own: a Ctrl-C is ours to hand on."""
        program, *words = self.left.pop(0)
        self.out = self.log.with_suffix(f".{os.getpid()}.out")  # two of us may run side by side
        with open(self.out, "wb") as out, open(self.log, "ab") as log:
            self.process = subprocess.Popen([sys.executable, HERE / program, *words], stdout=out,
                                            stderr=log, env=self.environment,
                                            start_new_session=True)

    def over(self):
        """Whether all its commands have ended. ValueError: one has failed."""
        status = self.process.poll()
        if status is None:
            return False
        text, errors = (path.read_text(encoding="utf-8", errors="replace")
                        for path in (self.out, self.log))
        self.out.unlink()
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(text)
        if status:
            words = (errors.strip() or text.strip() or f"status {status}").split("\n")[-1]
            if status < 0:
                words = f"killed by {signal.Signals(-status).name}; is there enough memory?"
            raise ValueError(f"{self.job.name} failed ({words}); its words are in {self.log}")
        if self.left:
            self.next()
            return False
        self.job.finish(text)
        if not self.job.done():  # someone has asked train.py itself to stop
            raise ValueError(f"{self.job.name} ended early: run the same command to go on")
        return True

    def send(self, number):
        """A signal, to the program and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def stop_all(running):
    """End them as gently as a cluster would: train.py saves first."""
    for one in running:
        one.send(signal.SIGTERM)
    late = time.monotonic() + PATIENCE
    for one in running:
        try:
            one.process.wait(max(0, late - time.monotonic()))
        except subprocess.TimeoutExpired:
            one.send(signal.SIGKILL)
            one.process.wait()
        one.out.unlink(missing_ok=True)


def needed(jobs):
    """Those that are not done and that somebody waits for: what a finished job came from may be
    gone. `jobs` has causes first."""
    wanted = {job.name for job in jobs} - {name for job in jobs for name in job.after}
    found = []
    for job in reversed(jobs):
        if job.name in wanted and not job.done():
            found.append(job)
            wanted.update(job.after)
    return found[::-1]


def order(jobs):
    """{name: cost of the longest chain of jobs that begins with it}; `jobs` has causes first."""
    chain = {}
    for job in reversed(jobs):
        behind = [chain[j.name] for j in jobs if job.name in j.after]
        chain[job.name] = job.cost + max(behind, default=0)
    return chain


def run_all(jobs, machine):
    """Do what is not done -> whether all is: a signal ends it early. ValueError: a job failed."""
    todo = {job.name: job for job in needed(jobs)}
    chain, running, free, past = order(jobs), [], list(range(machine.workers)), 0.0
    before = {job.name: job.cost * job.progress() for job in todo.values()}  # by an earlier call
    bar = tqdm(total=sum(job.cost for job in todo.values()) or 1, smoothing=0, dynamic_ncols=True,
               initial=sum(before.values()),
               bar_format="{percentage:3.0f}% {elapsed}, {remaining} left{postfix}",
               mininterval=1 if sys.stderr.isatty() else 60, disable=not todo)
    with runtime.Stop() as stop, bar:
        stop.gently = True  # a signal only sets stop.asked; a second Ctrl-C means now
        try:
            while (todo or running) and not stop.asked:
                for one in [one for one in running if one.over()]:
                    running.remove(one)
                    free.append(one.place)
                    past += one.job.cost
                busy = {*todo, *(one.job.name for one in running)}
                ready = [job for job in todo.values() if not busy.intersection(job.after)]
                ready.sort(key=lambda job: (not job.early, -chain[job.name]))
                for job in ready[:len(free)]:
                    running.append(Running(todo.pop(job.name), free.pop(0), machine))
                now = sum(one.job.cost * one.job.progress() for one in running)
                bar.set_postfix_str(", ".join(one.job.name for one in running)[:100], False)
                bar.update(past + now + sum(before[name] for name in todo) - bar.n)
                time.sleep(0.2)
        finally:
            stop_all(running)
    return not (todo or running)
