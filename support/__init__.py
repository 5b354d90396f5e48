r"""Plumbing: processes, run folders, checkpoints, logs, image decoding. It contains no diffusion.

If a program imports this package before torch, two settings make training on CPUs faster:

  * OpenMP threads spin while they wait for work. This slows two processes on few cores by a factor
    of 2 to 5. A short spin is as fast for a single process and does not slow the other one. OpenMP
    reads the variable only once, when torch is imported.
  * glibc returns large freed blocks to the system, and each step must request new pages. Higher
    thresholds prevent this.

    python -c "import support, os; print(os.environ['GOMP_SPINCOUNT'])"

Not here: anything about noise, time or networks.
"""

import contextlib
import ctypes
import os

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries have no mallopt
    _libc = ctypes.CDLL(None)
    _libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
    _libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
