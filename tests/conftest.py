"""Shared by the tests: where reference material may lie, and two shorthands."""

import os
import sys
from pathlib import Path

import pytest

# Programs under test run beside each other on few cores: no busy waiting, one thread each.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # reference numbers that only the maintainers have
sys.path.insert(0, str(ROOT))


@pytest.fixture
def shared():
    """The folder of reference material, or a visible skip."""
    if not SHARED.is_dir():
        pytest.skip(f"no reference material at {SHARED}")
    return SHARED
