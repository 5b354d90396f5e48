r"""Plumbing: processes, run folders, checkpoints, logs, image decoding. No diffusion in here.

Importing this package, before torch, also sets two things that make training on CPUs fast:

  * OpenMP threads spin while they wait for work. Two busy processes on few cores lose a factor of
    2 to 5 by that. A short spin is as fast alone and does not disturb the other process. OpenMP
    reads the variable once, when torch is imported.
  * glibc returns large freed blocks to the system, and every step then pays for fresh pages.

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
