"""tests/torture.py in its short form: what a killed program leaves, and how it goes on."""

import collections

import pytest
import torture


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with two runs, one of which was killed once in every way."""
    folder = tmp_path_factory.mktemp("torture")
    kinds = len(torture.OUTSIDE) + len(torture.INSIDE)
    return folder, *torture.torture_training(folder, kinds, seed=1)


@pytest.mark.slow
def test_training_survives_every_fault_bit_for_bit(killed):
    _, faults, slowest, _ = killed
    once = [*torture.OUTSIDE, *torture.INSIDE]
    assert faults == collections.Counter(once)
    assert slowest < 30, "clusters kill after 30 seconds"


@pytest.mark.slow
@pytest.mark.parametrize("npz", [False, True], ids=["png", "npz"])
def test_sampling_goes_on(killed, npz):
    assert torture.torture_sampling(killed[0], 3, seed=2 + npz, npz=npz).total() >= 2


@pytest.mark.slow
def test_statistics_are_whole_or_absent(killed):
    assert torture.torture_statistics(killed[0], 3, seed=1).total() >= 2
