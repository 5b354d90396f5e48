"""Watch an hour of training: are memory and open files flat, does it stay as fast?

    python tests/robustness/soak.py --minutes 60

One training process on the built-in shapes, with a checkpoint every 20 steps. Every few seconds its
memory (resident, without what it shares with others) and its open files are read from /proc, at
the end its throughput from its own count of processor time, since a machine that others use has
no steady clock. Memory is compared between the medians of two quarters, the second and the last:
the first has the growth of a start in it (allocator, caches, the plot).

Not here: machines without /proc (macOS).
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[2]
TRAIN = "--image-size 16 --batch-size 16 --steps 10000000 --name soak".split()
TRAIN += "--save-every 20 --sample-every 500".split()


def look(pid):
    """(seconds of processor time, private bytes, open files) of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    used = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    pages = Path(f"/proc/{pid}/statm").read_text().split()
    private = (int(pages[1]) - int(pages[2])) * os.sysconf("SC_PAGE_SIZE")
    return used, private, len(os.listdir(f"/proc/{pid}/fd"))


def steps_of(folder):
    """The last step in log.csv."""
    try:
        return int((folder / "log.csv").read_text().splitlines()[-1].split(",")[0])
    except (OSError, ValueError, IndexError):
        return 0


def soak(folder, minutes, every=5.0, steps=10**9, words=()):
    """Train in `folder` for so long, or so many steps -> rows (seconds, steps, processor seconds,
    bytes, files)."""
    command = [sys.executable, str(ROOT / "train.py"), *TRAIN, *words]
    environment, no = {**os.environ, "GOMP_SPINCOUNT": "10000"}, subprocess.DEVNULL
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=no, stderr=no)
    run, rows = Path(folder) / "runs" / "soak", []
    try:
        while not (run / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.2)
        began = time.time()
        while (now := time.time() - began) < 60 * minutes and process.poll() is None:
            rows.append((now, steps_of(run), *look(process.pid)))
            if rows[-1][1] - rows[0][1] >= steps:
                break
            time.sleep(every)
        died = process.poll()
    finally:
        process.terminate()
        process.wait(60)
    if died is not None:
        raise RuntimeError(f"the training ended by itself, status {died}")
    return rows


def report(rows):
    """What the four quarters show: a dict, every figure a ratio or a count."""
    n, steps = len(rows) // 4, rows[-1][1] - rows[0][1]
    quarters = [rows[i * n : (i + 1) * n + 1] for i in range(4)]
    memory, files = ([median(row[i] for row in part) for part in quarters] for i in (3, 4))
    rates = [
        [(part[-1][1] - part[0][1]) / (part[-1][i] - part[0][i]) for part in quarters]
        for i in (2, 0)  # steps a second: of the processor, of the clock
    ]
    return dict(
        steps=steps,
        checkpoints=steps // 20,
        memory_MB=[round(m / 1e6, 1) for m in memory],
        memory=memory[3] / memory[1],
        files=files,
        steps_per_processor_second=[round(rate, 3) for rate in rates[0]],
        throughput=rates[0][3] / rates[0][0],
        throughput_by_the_clock=rates[1][3] / rates[1][0],
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--folder", default=".", help="where runs/soak goes (default: here)")
    args = parser.parse_args()
    found = report(soak(args.folder, args.minutes))
    for name, value in found.items():
        print(f"{name:28}{value}")
    good = abs(found["memory"] - 1) < 0.02 and len(set(found["files"])) == 1
    good = good and found["throughput"] > 0.97
    print("memory and files flat, throughput steady" if good else "NOT FLAT")
    sys.exit(not good)


if __name__ == "__main__":
    main()
