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
import statistics
import subprocess
import sys
import time
from pathlib import Path

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
        rows = (folder / "log.csv").read_text().splitlines()
        return int(rows[-1].split(",")[0])
    except (OSError, ValueError, IndexError):
        return 0


def soak(folder, minutes, every=5.0, flags=()):
    """Train in `folder` for so long -> rows (seconds, steps, processor seconds, bytes, files)."""
    environment = {**os.environ, "GOMP_SPINCOUNT": "10000"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *TRAIN, *flags],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    run, rows = Path(folder) / "runs" / "soak", []
    try:
        while not (run / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.2)
        began = time.time()
        while time.time() - began < 60 * minutes and process.poll() is None:
            rows.append((time.time() - began, steps_of(run), *look(process.pid)))
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
    n = len(rows) // 4
    quarters = [rows[i * n : (i + 1) * n + 1] for i in range(4)]

    def rate(part, column):
        return (part[-1][1] - part[0][1]) / (part[-1][column] - part[0][column])

    middle = [statistics.median(row[3] for row in part) for part in quarters]
    files = [statistics.median(row[4] for row in part) for part in quarters]
    return dict(
        steps=rows[-1][1] - rows[0][1],
        checkpoints=(rows[-1][1] - rows[0][1]) // 20,
        memory_MB=[round(m / 1e6, 1) for m in middle],
        memory=middle[3] / middle[1],
        files=files,
        steps_per_processor_second=[round(rate(part, 2), 3) for part in quarters],
        throughput=rate(quarters[3], 2) / rate(quarters[0], 2),
        throughput_by_the_clock=rate(quarters[3], 0) / rate(quarters[0], 0),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--folder", default=".", help="where runs/soak goes (default: here)")
    args = parser.parse_args()
    found = report(soak(args.folder, args.minutes))
    for name, value in found.items():
        print(f"{name:28}{value}")
    flat = abs(found["memory"] - 1) < 0.02 and len(set(found["files"])) == 1
    steady = found["throughput"] > 0.97
    print("memory and files flat, throughput steady" if flat and steady else "NOT FLAT")
    sys.exit(not (flat and steady))


if __name__ == "__main__":
    main()
