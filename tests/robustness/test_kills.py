"""kills.py in its short form: what a killed program leaves, and how it continues."""

import collections

import kills
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with two runs, one of which was killed once in every way."""
    folder = tmp_path_factory.mktemp("kills")
    count = len(kills.OUTSIDE) + len(kills.INSIDE)
    return folder, *kills.kill_training(folder, count, seed=1)


def test_training_survives_every_fault_bit_for_bit(killed):
    _, faults, slowest, _ = killed
    once = [*kills.OUTSIDE, *kills.INSIDE]
    assert faults == collections.Counter(once)
    assert slowest < 30, "clusters kill after 30 seconds"


def test_training_survives_while_a_thread_writes_checkpoints(tmp_path):
    """As on a GPU."""
    count = len(kills.OUTSIDE) + len(kills.INSIDE)
    faults, slowest, _ = kills.kill_training(tmp_path, count, seed=4, threads=True)
    assert faults.total() == count and slowest < 30


@pytest.mark.parametrize("seed", [2, 3])
def test_sampling_continues(killed, seed, tmp_path):
    (tmp_path / "runs").symlink_to(killed[0] / "runs")
    assert kills.kill_sampling(tmp_path, 3, seed).total() >= 2


def test_statistics_are_whole_or_absent(killed):
    assert kills.kill_statistics(killed[0], 3, seed=1).total() >= 2
