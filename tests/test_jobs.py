"""support/jobs.py: order, places, failures and signals, with programs of a few lines."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import jobs
from support.jobs import Job, Machine

ROOT = Path(__file__).resolve().parents[1]
NOTE = """
import os, sys, time
name, seconds, done = sys.argv[1:4]
with open("log", "a") as f: f.write(f"+{name} ")
time.sleep(float(seconds))
with open("log", "a") as f: f.write(f"-{name} ")
open(done, "w").write(os.environ["OMP_NUM_THREADS"])
print("first"); print(name)
"""


@pytest.fixture
def make(tmp_path, monkeypatch):
    """make(name, seconds, **more) -> a job that notes when it begins and ends."""
    monkeypatch.chdir(tmp_path)
    Path("note.py").write_text(NOTE)

    def job(name, seconds=0.0, **more):
        done = tmp_path / f"{name}.done"
        return Job(name, [[tmp_path / "note.py", name, str(seconds), done]], done.exists, **more)

    return job


def run(*made, workers=2):
    return jobs.run_all(list(made), Machine(workers, gpus=[], logs=Path("logs")))


def log():
    return Path("log").read_text(encoding="utf-8").split()


def test_causes_come_first_and_what_is_done_is_not_done_again(make):
    printed = []
    a = make("a", cost=1)
    b = make("b", cost=1, after=("a",), finish=printed.append)
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


def test_no_more_at_a_time_than_there_are_places(make):
    assert run(*(make(name, 0.3) for name in "abcde"), workers=2)
    now = 0
    for word in log():
        now += 1 if word[0] == "+" else -1
        assert 0 <= now <= 2
    assert now == 0 and len(log()) == 10


def test_the_longest_chain_goes_first(make):
    """`short` costs more than `root`, but `leaf` waits for `root`."""
    made = [make("short", cost=10), make("root", cost=1), make("leaf", cost=99, after=("root",))]
    assert jobs.chain_costs(made) == {"short": 10, "root": 100, "leaf": 99}
    assert run(*made, workers=1)
    assert [word for word in log() if word[0] == "+"] == ["+root", "+leaf", "+short"]


def test_jobs_that_may_reject_their_input_go_before_long_ones(make):
    assert run(make("long", cost=9), make("check", cost=1, early=True), workers=1)
    assert [word for word in log() if word[0] == "+"] == ["+check", "+long"]


def test_gpus_are_those_that_the_user_chose(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, GPU-8932f937")
    machine = Machine(gpus=jobs.visible_gpus(2))
    places = [machine.environment(place)["CUDA_VISIBLE_DEVICES"] for place in (0, 1)]
    assert machine.workers == 2 and places == ["2", "GPU-8932f937"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert jobs.visible_gpus(3) == ["0", "1", "2"] and jobs.visible_gpus(0) == []


def test_shares_of_the_machine():
    machine = Machine(workers=2, gpus=[])
    machine.cores = 9
    assert machine.environment(1)["OMP_NUM_THREADS"] == "4"
    assert Machine(gpus=[]).workers == Machine(gpus=[]).cores
    machine = Machine(gpus=["0", "1", "2"])
    assert machine.workers == 3
    assert [machine.environment(i)["CUDA_VISIBLE_DEVICES"] for i in range(3)] == ["0", "1", "2"]
    assert Machine(workers=6, gpus=["0", "1", "2"]).environment(4)["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "support.cli"],  # imports little
        pytest.param(["train.py", "--help"], marks=pytest.mark.slow),
        pytest.param(["-m", "papers.experiments", "--help"], marks=pytest.mark.slow),
    ],
)
def test_programs_run_in_the_users_folder_with_our_modules(tmp_path, monkeypatch, words):
    """Top-level programs by name, others by -m. A module of the user's is not imported."""
    monkeypatch.chdir(tmp_path)
    for name in ("data.py", "unet.py", "support.py", "papers.py"):
        Path(name).write_text("raise SystemExit('the wrong module')")
    printed = []
    assert run(Job("x", [words], lambda: len(printed) > 0, finish=printed.append))
    assert not words[-1] == "--help" or "usage: " in printed[0]


def test_output_of_any_bytes_is_read(make, tmp_path, monkeypatch):
    """UTF-8 in and out, whatever the locale; other bytes do not end the program."""
    for name, value in dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0").items():
        monkeypatch.setenv(name, value)
    bad = tmp_path / "bad.py"
    bad.write_text("import sys; sys.stdout.buffer.write(b'\\xff\\n'); print('Γ')", encoding="utf-8")
    job = make("a")
    printed = []
    job.commands, job.finish = [[bad], *job.commands], printed.append
    assert run(job) and printed == ["first\na\n"]
    assert Path("logs/a.log").read_text(encoding="utf-8").startswith("\ufffd\nΓ\n")


def test_a_failure_is_one_line_and_ends_the_others(make, tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text(
        "import sys, time; print('hello'); time.sleep(0.5); sys.exit('bad.py: no such thing')"
    )
    slow = make("slow", 60)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^broken failed \(bad.py: no such thing\). Its output"):
        run(slow, Job("broken", [[bad]], lambda: False), make("late", after=("broken",)))
    assert time.monotonic() - began < 30
    assert log() == ["+slow"] and not Path("slow.done").exists()
    assert Path("logs/broken.log").read_text(encoding="utf-8").split("\n") == [
        "bad.py: no such thing",
        "hello",
        "",
    ]


def test_the_first_of_two_commands_fails(make, tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import sys; print('only this'); sys.exit(3)")
    job = make("two")
    job.commands.insert(0, [bad])
    with pytest.raises(ValueError, match=r"two failed \(only this\)"):
        run(job)
    assert not Path("log").exists()


def test_a_program_that_the_system_kills(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.py"
    bad.write_text("import os; print('50% done', flush=True); os.kill(os.getpid(), 9)")
    with pytest.raises(ValueError, match=r"big failed \(killed by SIGKILL; is there enough memory"):
        run(Job("big", [[bad]], lambda: False))


def test_a_program_that_ends_well_before_it_is_done(tmp_path, make):
    """train.py, stopped by a signal from elsewhere, exits with 0."""
    job = make("a")
    job.done = lambda: False
    with pytest.raises(ValueError, match="a ended early: run the same command to continue"):
        run(job)


RUNNER = """
import sys; sys.path.insert(0, {root!r})
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
def test_a_signal_reaches_the_programs_as_sigterm(tmp_path, number):
    (tmp_path / "runner.py").write_text(RUNNER.format(root=str(ROOT)))
    (tmp_path / "child.py").write_text(CHILD)
    # A job in the background inherits an ignored SIGINT, which the runner would respect.
    process = subprocess.Popen(
        [sys.executable, "runner.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    late = time.monotonic() + 60
    while len(list(tmp_path.glob("*.began"))) < 2:
        assert time.monotonic() < late and process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, number)
    assert process.communicate(timeout=30)[0].strip() == "not all"
    assert process.returncode == 0
    assert len(list(tmp_path.glob("*.saved"))) == 2


def test_a_program_that_ignores_sigterm_is_killed(make, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "STOP_TIMEOUT", 0.5)
    (tmp_path / "deaf.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open('deaf.began', 'w').close()\ntime.sleep(60)"
    )
    (tmp_path / "bad.py").write_text(
        "import os, sys, time\n"
        "while not os.path.exists('deaf.began'): time.sleep(0.05)\n"
        "sys.exit(1)"
    )
    began = time.monotonic()
    with pytest.raises(ValueError, match="bad failed"):
        run(
            Job("deaf", [[tmp_path / "deaf.py"]], lambda: False),
            Job("bad", [[tmp_path / "bad.py"]], lambda: False),
        )
    assert time.monotonic() - began < 30
