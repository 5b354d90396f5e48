"""The first version's numbers, demanded of today's code: see golden_cases.py for what is computed,
make_golden.py for how the file is made, golden_adapter.py for the functions behind it."""

import argparse
import json

import pytest
import torch

import first_flags as moved
import golden_adapter as adapter
import golden_cases as cases
import make_golden
from programs import PROGRAMS, parse
from support.cli import make_parser

DATA = make_golden.HERE / "data"
GOLDEN = json.loads((DATA / "golden.json").read_text(encoding="utf-8"))
# The rest is slow: pytest -q -m slow tests/test_golden.py
QUICK = {"plain", "sa2-v"}


def case(name, run):
    return pytest.param(name, marks=() if run in QUICK else pytest.mark.slow)


def check(got, expected, key):
    """To 1e-5, and 3e-6 of the largest of the list for what is near zero.

    Other threads, other vector units or a formula written otherwise made up to 2e-6 of that.
    """
    got, expected = (torch.tensor(v, dtype=torch.float64) for v in (got, expected))
    atol = 3e-6 * expected.abs().max().item()
    torch.testing.assert_close(
        got, expected, rtol=1e-5, atol=atol, msg=lambda text: f"{key}: {text}"
    )


def check_all(got, expected):
    assert got.keys() == expected.keys()
    for key in expected:
        check(got[key], expected[key], key)


def test_the_file_has_these_cases():
    assert list(GOLDEN["training"]) == list(cases.TRAINING)
    assert list(GOLDEN["sampling"]) == list(cases.SAMPLING)


@pytest.mark.parametrize("name", [case(name, name) for name in cases.TRAINING])
def test_training(name):
    """Losses, gradient norms, and the weights at the end."""
    got, expected = make_golden.training(name), dict(GOLDEN["training"][name])
    if "slope" in expected:  # a difference of nearly equal numbers: known to three digits
        got["slope"], slope = [1e5 * v for v in got["slope"]], expected.pop("slope")
        torch.testing.assert_close(got.pop("slope"), [1e5 * v for v in slope], rtol=0, atol=1e-5)
    check_all(got, expected)


@pytest.mark.parametrize("name", [case(cases.RESUMED, cases.RESUMED), case("latent", "latent")])
def test_resuming_gives_the_same_bits(name):
    """Saved at step 10, opened, and trained to step 20; of latents, with no first stage around."""
    settings, (whole, rows) = cases.TRAINING[name], make_golden.trained(name)
    base = make_golden.base_of(settings)
    first = adapter.begin(settings, base)
    adapter.steps(first, cases.RESUME_AT)
    again = adapter.begin(settings, base, adapter.save(first))
    assert adapter.steps(again, cases.STEPS - cases.RESUME_AT) == rows[cases.RESUME_AT :]
    for got, expected in zip(adapter.weights(again), adapter.weights(whole), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", [case(name, c["run"]) for name, c in cases.SAMPLING.items()])
def test_sampling(name):
    check_all(make_golden.sampling(name), GOLDEN["sampling"][name])


def test_scores():
    check_all(make_golden.scores(), GOLDEN["scores"])


@pytest.mark.slow
def test_measurements():
    check_all(make_golden.measurements(), GOLDEN["measurements"])


def test_a_run_of_the_first_version_gives_its_samples():
    """data/first-version holds a checkpoint as the first version wrote it."""
    expected = json.loads((make_golden.FIRST_VERSION / "samples.json").read_text(encoding="utf-8"))
    check(adapter.samples_of(make_golden.FIRST_VERSION, 2).flatten(1).tolist(), expected, "samples")


def first_flags():
    for program, flags in json.loads((DATA / "flags.json").read_text(encoding="utf-8")).items():
        for flag in flags:
            yield pytest.param(program, flag, id=f"{program} {flag['flags'][0]}")


@pytest.mark.parametrize("program, flag", list(first_flags()))
def test_no_flag_of_the_first_version_is_lost(program, flag):
    """It is where first_flags.py says, takes values of the same type, and all choices it had."""
    name = flag["flags"][0]
    place = moved.today(program, flag["flags"][-1])
    if place is None:
        assert moved.LOST[program, name]
        return
    actions = make_parser(PROGRAMS[place[0]])._actions
    found = [a for a in actions if place[1] in (*a.option_strings, a.dest)]
    assert len(found) == 1, f"{place[0]} has no {place[1]}"
    (action,) = found
    if place[1] == flag["flags"][-1] and action.option_strings:  # with its short form, or --no-
        assert set(flag["flags"]) <= set(action.option_strings)
    if action.option_strings:  # a switch stays one
        switch = flag["type"] in ("flag", "BooleanOptional")
        assert switch == isinstance(action, argparse.BooleanOptionalAction)
    if flag["type"] in ("int", "float", "Path") and action.option_strings:
        assert action.type.__name__ == flag["type"]
    for choice in flag["choices"] or ():
        lost = (program, name, choice) in moved.LOST_VALUES
        if action.choices is None and not lost:  # the program checks it: this raises no error
            parse(place[0], [choice])
        assert action.choices is None or (choice in action.choices) != lost


def test_the_table_of_flags_names_flags():
    """Its keys are flags of the first version, and nothing is both moved and lost."""
    known = {(program, flag["flags"][0]) for program, flag in (p.values for p in first_flags())}
    assert known >= set(moved.MOVED) | set(moved.LOST)
    assert known >= {key[:2] for key in moved.LOST_VALUES}
    assert not set(moved.MOVED) & set(moved.LOST)
