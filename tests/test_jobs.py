"""support/jobs.py: order, places, failures and signals, with programs of a few lines."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ENV, refused

from support import jobs
from support.jobs import Job, Machine

NOTE = """
import os, sys, time
name, seconds, done = sys.argv[1:4]
with open("log", "a") as f: f.write(f"+{name} ")
time.sleep(float(seconds))
with open("log", "a") as f: f.write(f"-{name} ")
open(done, "w").write(os.environ["OMP_NUM_THREADS"])
print("first"); print(name)
"""
pytestmark = pytest.mark.usefixtures("here")


def make(name, seconds=0.0, **more):
    """A job that notes in `log` when it begins and ends."""
    Path("note.py").write_text(NOTE)
    done = Path(f"{name}.done").absolute()
    return Job(name, [[Path("note.py").absolute(), name, str(seconds), done]], done.exists, **more)


def script(name, code):
    """A job of these lines of Python, which is never done."""
    Path(f"{name}.py").write_text(code, encoding="utf-8")
    return Job(name, [[Path(f"{name}.py").absolute()]], lambda: False)


def run(*made, workers=2):
    return jobs.run_all(list(made), Machine(workers, gpus=[], logs=Path("logs")))


def log():
    return Path("log").read_text(encoding="utf-8").split()


def begun():
    return [word[1:] for word in log() if word[0] == "+"]


def test_causes_come_first_and_what_is_done_is_not_done_again():
    printed = []
    a, b = make("a", cost=1), make("b", cost=1, after=("a",), finish=printed.append)
    c = make("c", cost=5, after=("b",))
    assert run(a, b, c)
    assert log() == ["+a", "-a", "+b", "-b", "+c", "-c"]
    assert printed == ["first\nb\n"]
    assert not list(Path("logs").glob("*.out"))
    assert run(a, b, c) and len(log()) == 6  # nothing more
    Path("b.done").unlink()
    assert run(a, b, c) and len(log()) == 6  # c is done: b is not needed
    Path("c.done").unlink()
    assert run(a, b, c) and log()[6:] == ["+b", "-b", "+c", "-c"]


def test_no_more_at_a_time_than_there_are_places():
    assert run(*(make(name, 0.3) for name in "abcde"), workers=2)
    steps = [1 if word[0] == "+" else -1 for word in log()]
    assert len(steps) == 10 and {sum(steps[:i]) for i in range(11)} <= {0, 1, 2}


def test_the_longest_chain_goes_first():
    """`short` costs more than `root`, but `leaf` waits for `root`. Jobs that may reject their input
    go before both."""
    made = [make("short", cost=10), make("root", cost=1), make("leaf", cost=99, after=("root",))]
    assert jobs.chain_costs(made) == {"short": 10, "root": 100, "leaf": 99}
    assert run(*made, make("check", cost=1, early=True), workers=1)
    assert begun() == ["check", "root", "leaf", "short"]


def test_gpus_are_those_that_the_user_chose(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-8932f937")
    machine = Machine(gpus=jobs.visible_gpus(2))
    places = [machine.environment(place)["CUDA_VISIBLE_DEVICES"] for place in (0, 1)]
    assert machine.workers == 2 and places == ["2", "GPU-8932f937"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert jobs.visible_gpus(3) == ["0", "1", "2"] and jobs.visible_gpus(0) == []
    three = Machine(gpus=["0", "1", "2"])
    assert three.workers == 3 and three.environment(2)["CUDA_VISIBLE_DEVICES"] == "2"
    assert Machine(workers=6, gpus=["0", "1", "2"]).environment(4)["CUDA_VISIBLE_DEVICES"] == "1"


def test_shares_of_the_machine():
    machine = Machine(workers=2, gpus=[])
    machine.cores = 9
    assert machine.environment(1)["OMP_NUM_THREADS"] == "4"
    assert Machine(gpus=[]).workers == Machine(gpus=[]).cores


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "support.cli"],  # imports little
        pytest.param(["train.py", "--help"], marks=pytest.mark.slow),
        pytest.param(["-m", "papers.experiments", "--help"], marks=pytest.mark.slow),
    ],
)
def test_programs_run_in_the_users_folder_with_our_modules(words):
    """Top-level programs by name, others by -m. A module of the user's is not imported."""
    for name in ("data.py", "unet.py", "support.py", "papers.py"):
        Path(name).write_text("raise SystemExit('the wrong module')")
    printed = []
    assert run(Job("x", [words], lambda: len(printed) > 0, finish=printed.append))
    assert not words[-1] == "--help" or "usage: " in printed[0]


def test_output_of_any_bytes_is_read(monkeypatch):
    """UTF-8 in and out, whatever the locale; other bytes do not end the program."""
    for name, value in dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0").items():
        monkeypatch.setenv(name, value)
    bad = script("bad", "import sys; sys.stdout.buffer.write(b'\\xff\\n'); print('Γ')")
    job, printed = make("a"), []
    job.commands, job.finish = bad.commands + job.commands, printed.append
    assert run(job) and printed == ["first\na\n"]
    assert Path("logs/a.log").read_text(encoding="utf-8").startswith("\ufffd\nΓ\n")


def test_a_failure_is_one_line_and_ends_the_others():
    code = "import sys, time; print('hello'); time.sleep(0.5); sys.exit('bad.py: no such thing')"
    made = make("slow", 60), script("broken", code), make("late", after=("broken",))
    began = time.monotonic()
    refused(r"^broken failed \(bad.py: no such thing\). Its output", run, *made)
    assert time.monotonic() - began < 30
    assert log() == ["+slow"] and not Path("slow.done").exists()
    text = Path("logs/broken.log").read_text(encoding="utf-8")
    assert text == "bad.py: no such thing\nhello\n"


ENDS = {  # a program's code: the error
    "import sys; print('only this'); sys.exit(3)": r"x failed \(only this\)",
    "import os; print('50% done', flush=True); os.kill(os.getpid(), 9)": (
        r"x failed \(killed by SIGKILL; is there enough memory"
    ),
    # train.py, stopped by a signal from elsewhere, exits with 0
    "": "x ended early: run the same command to continue",
}


@pytest.mark.parametrize("code", ENDS)
def test_how_a_program_ended_is_said(code):
    """If it is the first of two commands, the second does not begin."""
    job = script("x", code)
    job.commands += make("second").commands if code else []
    refused(ENDS[code], run, job)
    assert not Path("log").exists()


RUNNER = """
from support import jobs
from pathlib import Path
both = [jobs.Job(n, [[Path("child.py").resolve(), n]], Path(n).exists) for n in ("one", "two")]
print("all" if jobs.run_all(both, jobs.Machine(2, gpus=[], logs=Path("logs"))) else "not all")
"""
CHILD = """
import signal, sys, time
def saved(number, frame):
    open(sys.argv[1] + ".saved", "w").close(); sys.exit()
signal.signal(signal.SIGTERM, saved)
open(sys.argv[1] + ".began", "w").close()
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_programs_as_sigterm(number):
    Path("child.py").write_text(CHILD)
    # A job in the background inherits an ignored SIGINT, which the runner would respect.
    process = subprocess.Popen(
        [sys.executable, "-c", RUNNER],
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    late = time.monotonic() + 60
    while len(list(Path(".").glob("*.began"))) < 2:
        assert time.monotonic() < late and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert process.communicate(timeout=30)[0].strip() == "not all"
    assert process.returncode == 0
    assert len(list(Path(".").glob("*.saved"))) == 2


def test_a_program_that_ignores_sigterm_is_killed(monkeypatch):
    monkeypatch.setattr(jobs, "STOP_TIMEOUT", 0.5)
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); open('began', 'w').close()"
    wait = "while not os.path.exists('began'): time.sleep(0.05)"
    made = (
        script("deaf", f"import signal, time\n{deaf}\ntime.sleep(60)"),
        script("bad", f"import os, sys, time\n{wait}\nsys.exit(1)"),
    )
    began = time.monotonic()
    refused("bad failed", run, *made)
    assert time.monotonic() - began < 30
