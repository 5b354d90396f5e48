"""Every flag: valid combinations train, sample and are measured; others end in one line, status 2;
none is accepted and then ignored.

hypothesis walks the combinations: a program that trains, flags of it and of the sampler, with
values that are usual, odd and wrong. Each is either carried through, or refused before anything is
written.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import denoiser
from conftest import ENV, ROOT
from programs import PROGRAMS, parse
from support import checkpoint
from support.cli import make_parser
from support.programs import run_main

BASE = "--batch-size 2 --steps 2 --name r".split()
# Programs that train, and the words each begins with. Those without --image-size take it, and the
# network or the latents, from a run of the fixture `place`.
TRAINING = {
    "train.py": "--image-size 8",
    "papers.alternatives": "--image-size 8",
    "papers.superres train": "--image-size 8",
    "papers.autoencoder train": "--image-size 8",
    "papers.heads": "npr base",
    "papers.latents": "code",
}
# How many combinations: CI walks more than a quick `pytest -q`.
QUICK = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
# WALK=1000 pytest -q -m slow -s tests/test_flags.py -k walk_through    # other ones, each time
WALK = os.environ.get("WALK")
LONG = settings(QUICK, max_examples=int(WALK or 100), derandomize=not WALK)


# ------------------------------------------------------------------ flags, each with its values

TRAIN = {
    "--sa-k": ["1", "2", "3", "0", "1001", "x"],
    "--sa-weight": ["1", "0.3", "0", "-1", "nan"],
    "--sa-reuse": None,
    "--etsdm": None,
    "--etsdm-interval": ["100", "50.5", "1000", "1001", "0", "nan"],
    "--etsdm-n": ["5", "1", "100", "0", "200"],
    "--remap": ["sqrt", "inverse-sigmoid", "log"],
    "--schedule": ["linear", "cosine", "zero-terminal-snr", "linear-mns", "edm", "none"],
    "--continuous": None,
    "--prediction": ["eps", "v", "x0", "edm", "score"],
    "--loss-space": ["eps", "v", "x0", "edm"],
    "--train-times": ["uniform", "remap", "lognormal"],
    "--lipschitz-reg": ["1", "0", "inf"],
    "--dropout": ["0", "0.3", "1"],
    "--flip": None,
    "--no-flip": None,
    "--channels": ["1", "3", "2"],
    "--microbatch": ["1", "5", "0"],
    "--recompute": None,
    "--precision": ["fp32", "bf16", "fp16"],
    "--deterministic": None,
    "--grad-clip": ["0", "1", "-1"],
    "--lr": ["0.001", "0", "nan"],
    "--ema": ["0", "0.9", "1"],
    "--warmup": ["0", "10", "-1"],
    "--seed": ["0", "7", "-1"],
    "--workers": ["0", "1", "-1"],
    "--skip-bad-images": None,
    "--factor": ["2", "4", "3"],
    "--downsamplings": ["1", "2", "9"],
    "--head-size": ["simple", "block", "large"],
    "--beta2": ["0.99", "0", "1"],
    "--kl-weight": ["0.001", "-1"],
    "--latent-channels": ["2", "0"],
    "--data": ["shapes", "images.npy", "nowhere", "page.zip"],
    "--sample-every": ["1", "0"],
    "--save-every": ["1", "0"],
}
SAMPLE = {
    "--sampler": ["ddpm", "ddim", "dpm-solver", "dpm-solver++", "heun", "euler"],
    "--nfe": ["1", "2", "3", "4", "0", "-5"],
    "--spacing": ["uniform", "quadratic", "logsnr", "leading", "remap"],
    "--eta": ["0", "0.5", "1", "2", "nan"],
    "--order": ["1", "2", "3", "4"],
    "--variance": ["small", "large", "analytic", "npr", "sn"],
    "--churn": ["0", "10", "-1"],
    "--churn-min": ["0.1"],
    "--churn-max": ["5", "-1"],
    "--churn-noise": ["1.003", "nan"],
    "--clip": ["auto", "on", "off"],
    "--precision": ["fp32", "bf16"],
    "--deterministic": None,
    "--weights": ["ema", "raw", "last"],
    "--seed": ["0", "3", "-1"],
}


def flags(table, most):
    """A strategy: up to `most` different flags of a table, each with a value."""
    one = st.sampled_from(sorted(table))
    names = st.lists(one, max_size=most, unique=True)

    def with_values(names):
        values = [st.just([n]) if table[n] is None else value_of(n) for n in names]
        return st.tuples(*values).map(lambda parts: [list(part) for part in parts])

    def value_of(name):
        # The first values are right somewhere: the walk is mostly among those.
        right = st.sampled_from(table[name][:3])
        return st.one_of(right, right, st.sampled_from(table[name])).map(lambda v: [name, v])

    return names.flatmap(with_values)


def combinations(most_of_training, most_of_sampling):
    """A strategy: (program, its flags, the sampler's flags). train.py comes more often."""

    def of(program):
        parser = make_parser(PROGRAMS[program])
        table = {k: v for k, v in TRAIN.items() if k in parser._option_string_actions}
        return st.tuples(
            st.just(program), flags(table, most_of_training), flags(SAMPLE, most_of_sampling)
        )

    return st.sampled_from(["train.py", "train.py", "train.py", *TRAINING]).flatmap(of)


def words(parts):
    return [word for part in parts for word in part]


class Network(torch.nn.Module):
    """Features of 8 x 8 images, for the metrics."""

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 4).flatten(1)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / "f.pt2"
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        Network(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=({0: batch},)
    )
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a denoiser and an autoencoder that others start from."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main_of("train.py", ["--image-size", "8", *BASE[:-1], "base"])
        main_of("papers.autoencoder train", ["--image-size", "8", *BASE[:-1], "code",
                                             "--downsamplings", "1"])  # fmt: skip
    return folder / "runs"


@pytest.fixture
def place(runs, tmp_path, monkeypatch):
    """A folder with two runs, a set of images and a page; the global switches as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    shutil.copytree(runs, "runs")
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.save("images.npy", images)
    Path("page.zip").write_text("<html>", encoding="utf-8")
    yield tmp_path
    torch.use_deterministic_algorithms(False)


def main_of(program, argv):
    """Run a program of PROGRAMS in this process."""
    module, *command = program.removesuffix(".py").split()
    importlib.import_module(module).main([*command, *argv])


def outcome(program, argv, capsys):
    """(True, what it printed) or (False, the one line of its refusal)."""
    capsys.readouterr()
    try:
        run_main(lambda: main_of(program, argv))
    except SystemExit as end:
        text = capsys.readouterr().err
        assert end.code == 2, (argv, end.code, text)
        lines = [line for line in text.replace("\r", "\n").splitlines() if "error: " in line]
        assert len(lines) == 1 and "Traceback" not in text, (argv, text)
        return False, lines[0]
    return True, capsys.readouterr().out


def resolved(program, parts):
    """The settings that these flags mean, less the run's name."""
    config = parse(program, [*TRAINING[program].split(), *BASE, *words(parts)])
    return {k: v for k, v in config.settings().items() if k != "name"}


def without_effect(program, parts, printed):
    """Flags whose absence changes no setting, and of which no note says so."""
    idle = []
    for i, part in enumerate(parts):
        try:
            same = resolved(program, parts[:i] + parts[i + 1 :]) == resolved(program, parts)
        except (ValueError, OSError, SystemExit):
            continue  # without it the rest would not do: it matters
        usual = {"--seed": "0", "--sa-k": "1", "--channels": "3", "--data": "shapes"}
        if same and part[0] not in printed and usual.get(part[0]) != part[-1]:
            idle.append(part)
    return idle


# What is the default, written out, changes nothing and is no contradiction.
DEFAULTS = {
    ("--sa-weight", "1"), ("--etsdm-interval", "100"), ("--etsdm-n", "5"), ("--no-flip",),
    ("--schedule", "cosine"), ("--prediction", "v"), ("--loss-space", "v"), ("--warmup", "100"),
    ("--train-times", "uniform"), ("--dropout", "0"), ("--factor", "4"), ("--downsamplings", "2"),
    ("--beta2", "0.99"), ("--head-size", "simple"),
    ("--grad-clip", "1"), ("--precision", "auto"), ("--ema", "0.995"), ("--prediction", "edm"),
    ("--loss-space", "edm"), ("--train-times", "lognormal"), ("--loss-space", "eps"),
    ("--loss-space", "x0"), ("--grad-clip", "0"), ("--lr", "0.001"),
}  # fmt: skip


def walk(program, training, drawing, features, capsys):
    """One combination, carried as far as it goes -> how far: 0 refused, 1 trained, 2 sampled."""
    for old in (Path("runs/r"), *Path(".").glob("out*")):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    sys.argv = ["train.py"]
    argv = [*TRAINING[program].split(), *BASE, *words(training)]
    good, printed = outcome(program, argv, capsys)
    if not good:
        assert not os.path.exists("runs/r"), "refused, but something was written"
        named = ["error: --", "error: argument --", "nowhere", "page.zip"]  # the flag, or the file
        assert any(words in printed for words in named), printed
        return 0
    idle = [p for p in without_effect(program, training, printed) if tuple(p) not in DEFAULTS]
    assert not idle, f"{idle} of {training} has no effect, and no note says so"
    saved = checkpoint.load_checkpoint("runs/r/checkpoint.pt")
    assert saved["step"] == 2
    assert all(v.isfinite().all() for v in saved["net"].values() if v.is_floating_point())
    if program == "papers.autoencoder train":
        good, printed = outcome(
            "papers.autoencoder reconstruct", ["r", "images.npy", "--out", "out"], capsys
        )
        assert good and len(list(Path("out").glob("0*.png"))) == 6, printed
        return 2
    drawer, given = "sample.py", ["r"]
    if program == "papers.superres train":
        drawer, given = "papers.superres enlarge", ["r", "images.npy"]
    good, printed = outcome(drawer, [*given, "-n", "3", "--out", "out", *words(drawing)], capsys)
    if not good:
        assert not list(Path(".").glob("out*")), "refused, but something was written"
        return 1
    assert len(list(Path("out").glob("0*.png"))) == 3
    if program == "papers.superres train":
        return 2
    assert os.path.exists("out.png")
    argv = ["fid", "r", "images.npy", "--features", str(features), "-n", "3", "--json"]
    good, printed = outcome("metrics.py", [*argv, *words(drawing)], capsys)
    assert good, printed
    found = json.loads(printed)
    assert np.isfinite(found["value"]) and found["value"] >= 0
    # nfe: what is printed with the score is what was asked for, or a warning says why not
    nfe = next((part[1] for part in drawing if part[0] == "--nfe"), "50")
    assert f"-{nfe}-step2" in found["sides"][0]["what"] or "heun" in str(found["warnings"])
    return 2


@pytest.mark.slow
def test_combinations_walk_through_or_are_refused(place, features, capsys):
    reached = [0, 0, 0]

    @LONG
    @given(combinations(4, 3))
    def go(parts):
        note(f"{parts}")
        reached[walk(*parts, features, capsys)] += 1

    go()
    with capsys.disabled():
        print(f"\ncombinations refused, trained alone, carried through: {reached}")
    assert min(reached) > 5, f"the walk must see all three: {reached}"


@pytest.mark.slow
@pytest.mark.parametrize("program", TRAINING)
def test_every_program_is_carried_through(program, place, features, capsys):
    assert walk(program, [], [["--nfe", "2"]], features, capsys) == 2


def test_a_few_combinations(place, features, capsys):
    @QUICK
    @given(combinations(2, 2))
    def go(parts):
        note(f"{parts}")
        walk(*parts, features, capsys)

    go()


# ------------------------------------------------------------------ what a flag is for


def weights_of(folder, extra, program="train.py"):
    """{net, ema: all weights in one vector} after three steps with these flags."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.rmtree("runs/w", ignore_errors=True)
        base = ["--image-size", "8", "--batch-size", "4", "--precision", "fp32", "--warmup", "0"]
        main_of(program, [*base, "--steps", "3", "--name", "w", *extra])
        saved = checkpoint.load_checkpoint("runs/w/checkpoint.pt")
    torch.use_deterministic_algorithms(False)
    return {k: torch.cat([v.flatten() for v in saved[k].values()]) for k in ("net", "ema")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Weights after three plain steps."""
    return weights_of(tmp_path_factory.mktemp("plain"), [])


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    [
        "--sa-k 2",
        "--sa-k 2 --sa-weight 0.3",
        "--sa-k 2 --sa-reuse",
        "--etsdm",
        "--etsdm --etsdm-interval 900",
        "--etsdm --etsdm-interval 900 --etsdm-n 2",
        "--remap sqrt",
        "--remap sqrt --train-times remap",
        "--remap inverse-sigmoid",
        "--schedule linear",
        "--continuous",
        "--prediction x0",
        "--loss-space x0",
        "--lipschitz-reg 30",
        "--dropout 0.3",
        "--flip",
        "--precision bf16",
        "--grad-clip 0.001",
        "--lr 0.0001",
        "--beta2 0.5",
        "--warmup 5",
        "--seed 3",
        "--batch-size 8",
        "--data images.npy",
        "--schedule edm",
        "--schedule zero-terminal-snr",
    ],
)
def test_a_flag_that_should_change_the_weights_does(extra, plain, place):
    """With each set apart from all before it that it extends."""
    given, program = extra.split(), "train.py"
    if {"--sa-reuse", "--remap", "--lipschitz-reg"} & set(given):
        program = "papers.alternatives"
    weights = weights_of(place, given, program)["net"]
    assert not torch.equal(weights, plain["net"])
    names = [i for i, word in enumerate(given) if word.startswith("--")]
    if len(names) > 1:
        without = weights_of(place, given[: names[-1]], program)["net"]
        assert not torch.equal(weights, without)


@pytest.mark.slow
def test_the_average_follows_its_flag(plain, place):
    got = weights_of(place, ["--ema", "0.05"])
    assert_close(got["net"], plain["net"], rtol=0, atol=0)
    assert not torch.equal(got["ema"], plain["ema"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    ["--save-every 1", "--sample-every 1", "--workers 0", "--deterministic", "--recompute"],
)
def test_a_flag_that_should_not_change_the_weights_does_not(extra, plain, place):
    # Recomputed gradients differ by rounding (test_unet.py: to 1e-13 in float64). Adam divides by a
    # gradient's size, so this shows where it is almost 0: 3e-7 was seen, in 4 of 1.1 million.
    atol = 1e-6 if extra == "--recompute" else 0
    assert_close(weights_of(place, extra.split()), plain, rtol=0, atol=atol)


# ------------------------------------------------------------------ notes on what is unusual


SMALL = ["--image-size", "8", *BASE]


@pytest.mark.parametrize(
    "extra, words",
    [
        ("--schedule zero-terminal-snr --prediction eps", "begin at t = 999"),
        ("--sa-k 2 --sa-weight 0", "leaves only the plain loss"),
        ("--etsdm --etsdm-n 100", "nothing is shared"),
        ("--microbatch 2", "--microbatch 2 has no effect"),
        ("--warmup 10", "the run has 2"),
        ("--workers 3", "--workers has no effect"),
        ("--skip-bad-images", "--skip-bad-images has no effect"),
    ],
)
def test_training_warns_of_what_hardly_can_be_meant(extra, words, place, capsys):
    good, printed = outcome("train.py", [*SMALL, *extra.split()], capsys)
    assert good and any(x.startswith("note: ") and words in x for x in printed.splitlines()), (
        printed
    )


@pytest.mark.parametrize(
    "extra, words",
    [
        ("--sampler dpm-solver --nfe 2", "with --nfe 2 it is order 1"),
        ("--sampler dpm-solver --nfe 3 --order 3", "--order 3 needs 4 calls"),
        ("--sampler heun --nfe 4", "it makes 3 of the 4 calls"),
        ("--nfe 1 --eta 0.5", "--eta has no effect"),
        ("--nfe 1 --spacing logsnr --sampler ddpm --variance large", "--variance has no effect"),
    ],
)
def test_sampling_warns_of_what_hardly_can_be_meant(extra, words, place, capsys):
    good, printed = outcome("sample.py", ["base", "-n", "2", "--out", "o", *extra.split()], capsys)
    assert good and words in printed, printed
    assert len(list(Path("o").glob("0*.png"))) == 2


def test_ordinary_commands_have_no_notes(place, capsys):
    good, printed = outcome("train.py", [*SMALL, "--warmup", "0"], capsys)
    assert good and "note:" not in printed
    good, printed = outcome("sample.py", ["r", "-n", "2", "--nfe", "4"], capsys)
    assert good and "note:" not in printed
    config = parse("sample.py", "--sampler dpm-solver --nfe 4")
    assert config.warnings(denoiser.load_run("r")) == []


# ------------------------------------------------------------------ the same again


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_command_gives_the_same_bits(threads, features, tmp_path):
    """Train, sample and measure twice, as separate processes: checkpoint, PNGs and score."""
    found = []
    for i in (1, 2):
        folder = tmp_path / str(i)
        folder.mkdir()

        def run(command, folder=folder):
            program, *argv = command.split()
            done = subprocess.run([sys.executable, str(ROOT / program), *argv], cwd=folder,
                                  env={**ENV, "OMP_NUM_THREADS": str(threads)},
                                  capture_output=True, encoding="utf-8")  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout

        run("train.py --image-size 8 --batch-size 8 --steps 12 --name r --sa-k 2 --etsdm "
            "--dropout 0.1")  # fmt: skip
        run("sample.py r -n 8 --sampler ddpm --nfe 5 --out o")
        score = run(f"metrics.py fid r shapes -n 60 --nfe 2 --features {features} --json")
        pictures = [p.read_bytes() for p in sorted((folder / "o").glob("0*.png"))]
        saved = checkpoint.load_checkpoint(folder / "runs/r/checkpoint.pt")
        found.append((saved, pictures, json.loads(score)["value"]))
    (one, pictures, score), (two, others, again) = found
    for part in ("net", "ema", "optimizer"):
        assert_close(two[part], one[part], rtol=0, atol=0)
    assert pictures == others and len(pictures) == 8
    assert score == again > 0
