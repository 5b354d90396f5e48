"""kills.py in its short form: what a killed program leaves, and how it continues."""

import collections

import kills
import pytest

pytestmark = pytest.mark.slow
ONCE = [*kills.OUTSIDE, *kills.INSIDE]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with two runs, one of which was killed once in every way."""
    folder = tmp_path_factory.mktemp("kills")
    return folder, kills.kill_training(folder, len(ONCE), seed=1)


def test_training_survives_every_fault_bit_for_bit(killed):
    folder, plain = killed
    by_thread = kills.kill_training(folder, len(ONCE), seed=4, threads=True)  # as on a GPU
    for faults, slowest, _ in (plain, by_thread):
        assert faults == collections.Counter(ONCE)
        assert slowest < 30, "clusters kill after 30 seconds"


@pytest.mark.parametrize("seed", [2, 3])
def test_sampling_continues(killed, seed):
    assert kills.kill_sampling(killed[0], 3, seed).total() >= 2


def test_statistics_are_whole_or_absent(killed):
    assert kills.kill_statistics(killed[0], 3, seed=1).total() >= 2
