"""Every flag: valid combinations train, sample and are measured; others end in one line, status 2;
none is accepted and then ignored.

hypothesis walks the combinations: of flags that any program of ours takes, with values that are
usual, odd and wrong. Each is either carried through, or refused before anything is written.
"""

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
import files
import metrics
import runtime
import sample
import sampling
import train

BASE = ["--image-size", "8", "--batch-size", "2", "--steps", "2", "--name", "r"]
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
    "--task": ["sr", "autoencoder", "video"],
    "--factor": ["2", "4", "3"],
    "--halvings": ["1", "2", "9"],
    "--kl-weight": ["0.001", "-1"],
    "--latent-channels": ["2", "0"],
    "--head": ["npr", "sn"],
    "--from": ["nobody"],
    "--latent": ["nobody"],
    "--data": ["shapes", "images.npy", "nowhere", "page.zip"],
    "--sample-every": ["1", "0"],
    "--save-every": ["1", "0"],
}
SAMPLE = {
    "--sampler": ["ddpm", "ddim", "dpm-solver", "dpm-solver++", "heun", "euler"],
    "--nfe": ["1", "2", "3", "4", "0", "-5"],
    "--spacing": ["uniform", "quadratic", "logsnr", "remap"],
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


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a set of images and a page that is none; the global switches as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.save("images.npy", images)
    Path("page.zip").write_text("<html>")
    yield tmp_path
    torch.use_deterministic_algorithms(False)


def outcome(program, argv, capsys):
    """(True, what it printed) or (False, the one line of its refusal)."""
    capsys.readouterr()
    try:
        runtime.run_program(lambda: program.main(argv))
    except SystemExit as end:
        text = capsys.readouterr().err
        assert end.code == 2, (argv, end.code, text)
        lines = [line for line in text.replace("\r", "\n").splitlines() if "error: " in line]
        assert len(lines) == 1 and "Traceback" not in text, (argv, text)
        return False, lines[0]
    return True, capsys.readouterr().out


def resolved(parts):
    """The settings that these flags of train.py mean, less their name."""
    s = train.resolve(train.parse([*BASE, *words(parts)]))
    return {k: v for k, v in s.items() if k != "name"}


def without_effect(parts, printed):
    """Flags whose absence changes no setting, and of which no note says so."""
    idle = []
    for i, part in enumerate(parts):
        try:
            same = resolved(parts[:i] + parts[i + 1 :]) == resolved(parts)
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
    ("--train-times", "uniform"), ("--dropout", "0"), ("--factor", "4"), ("--halvings", "2"),
    ("--grad-clip", "1"), ("--precision", "auto"), ("--ema", "0.995"), ("--prediction", "edm"),
    ("--loss-space", "edm"), ("--train-times", "lognormal"), ("--loss-space", "eps"),
    ("--loss-space", "x0"), ("--grad-clip", "0"), ("--lr", "0.001"),
}  # fmt: skip


def walk(training, drawing, features, capsys):
    """One combination, carried as far as it goes -> how far: 0 refused, 1 trained, 2 sampled."""
    for old in ("runs", "out", "out.png"):
        if os.path.isdir(old):
            shutil.rmtree(old)
        elif os.path.exists(old):
            os.remove(old)
    sys.argv = ["train.py"]
    good, printed = outcome(train, [*BASE, *words(training)], capsys)
    if not good:
        assert not os.path.exists("runs"), "refused, but something was written"
        named = ["error: --", "error: argument --", "nowhere", "page.zip"]  # the flag, or the file
        assert any(words in printed for words in named), printed
        return 0
    idle = [part for part in without_effect(training, printed) if tuple(part) not in DEFAULTS]
    assert not idle, f"{idle} of {training} has no effect, and nothing is said of it"
    checkpoint = files.load_checkpoint("runs/r/checkpoint.pt")
    assert checkpoint["step"] == 2
    finite = [v.isfinite().all() for v in checkpoint["raw"].values() if v.is_floating_point()]
    assert all(finite)
    task = checkpoint["settings"].get("task")
    if task == "autoencoder":
        size = ["--channels", str(checkpoint["settings"]["channels"])]
        code = ["psnr", "r", "images.npy", "--image-size", "8", *size]
        assert outcome(metrics, code, capsys)[0]
        return 2
    given = ["--low-res", "images.npy"] if task == "sr" else []
    argv = ["r", "-n", "3", "--out", "out", *given, *words(drawing)]
    good, printed = outcome(sample, argv, capsys)
    if not good:
        assert not os.path.exists("out"), "refused, but something was written"
        return 1
    assert len(list(Path("out").glob("0*.png"))) == 3 and os.path.exists("out.png")
    if task == "sr":
        return 2
    argv = ["fid", "r", "images.npy", "--features", str(features), "-n", "3", "--json"]
    good, printed = outcome(metrics, [*argv, *words(drawing)], capsys)
    assert good, printed
    found = json.loads(printed)
    assert np.isfinite(found["value"]) and found["value"] >= 0
    # nfe: what is printed with the score is what was asked for, or a warning says why not
    nfe = next((part[1] for part in drawing if part[0] == "--nfe"), "50")
    assert f"--nfe {nfe}" in found["sides"][0]["what"] or "heun" in str(found["warnings"])
    return 2


@pytest.mark.slow
def test_combinations_walk_through_or_are_refused(place, features, capsys):
    reached = [0, 0, 0]

    @LONG
    @given(flags(TRAIN, 4), flags(SAMPLE, 3))
    def go(training, drawing):
        note(f"{training} {drawing}")
        reached[walk(training, drawing, features, capsys)] += 1

    go()
    with capsys.disabled():
        print(f"\ncombinations refused, trained alone, carried through: {reached}")
    assert min(reached) > 5, f"the walk must see all three: {reached}"


def test_a_few_combinations(place, features, capsys):
    @QUICK
    @given(flags(TRAIN, 2), flags(SAMPLE, 2))
    def go(training, drawing):
        note(f"{training} {drawing}")
        walk(training, drawing, features, capsys)

    go()


# ------------------------------------------------------------------ what a flag is for


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Weights after three plain steps."""
    return weights_of(tmp_path_factory.mktemp("plain"), [])


def weights_of(folder, extra):
    before = os.getcwd()
    os.chdir(folder)
    try:
        base = ["--image-size", "8", "--batch-size", "4", "--precision", "fp32", "--warmup", "0"]
        train.main([*base, "--steps", "3", "--name", "w", *extra])
        checkpoint = files.load_checkpoint("runs/w/checkpoint.pt")
    finally:
        os.chdir(before)
        torch.use_deterministic_algorithms(False)
    return {k: torch.cat([v.flatten() for v in checkpoint[k].values()]) for k in ("raw", "ema")}


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
    given = extra.split()
    assert not torch.equal(weights_of(place, given)["raw"], plain["raw"])
    if len(given) > 2 and given[0] in ("--sa-k", "--etsdm", "--remap"):
        less = given[:1] if given[0] == "--etsdm" else given[:2]
        if len(given) == 5:
            less = given[:3]
        shutil.rmtree("runs")
        without = weights_of(place, less)["raw"]
        shutil.rmtree("runs")
        assert not torch.equal(weights_of(place, given)["raw"], without)


@pytest.mark.slow
def test_the_average_follows_its_flag(plain, place):
    got = weights_of(place, ["--ema", "0.05"])
    assert_close(got["raw"], plain["raw"], rtol=0, atol=0)
    assert not torch.equal(got["ema"], plain["ema"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra",
    ["--save-every 1", "--sample-every 1", "--workers 0", "--deterministic", "--recompute"],
)
def test_a_flag_that_should_not_change_the_weights_does_not(extra, plain, place):
    assert_close(weights_of(place, extra.split()), plain, rtol=0, atol=1e-7)


# ------------------------------------------------------------------ notes on what is unusual


@pytest.mark.parametrize(
    "extra, words",
    [
        ("--schedule zero-terminal-snr --prediction eps", "begin at t = 999"),
        ("--sa-k 2 --sa-weight 0", "leaves the plain loss alone"),
        ("--etsdm --etsdm-n 100", "nothing is shared"),
        ("--microbatch 2", "it has no effect"),
        ("--warmup 10", "the run has 2"),
        ("--workers 3", "--workers has no effect"),
        ("--skip-bad-images", "--skip-bad-images has no effect"),
    ],
)
def test_training_says_what_hardly_can_be_meant(extra, words, place, capsys):
    good, printed = outcome(train, [*BASE, *extra.split()], capsys)
    assert good and any(x.startswith("note: ") and words in x for x in printed.splitlines()), (
        printed
    )


@pytest.mark.parametrize(
    "extra, words",
    [
        ("--sampler dpm-solver --nfe 2", "with 2 it is order 1"),
        ("--sampler dpm-solver --nfe 3 --order 3", "order 3 takes 4 calls"),
        ("--sampler heun --nfe 4", "it makes 3 of the 4"),
        ("--nfe 1 --eta 0.5", "--eta 0.5 has no effect"),
        ("--nfe 1 --spacing logsnr --sampler ddpm --variance large", "makes no step"),
    ],
)
def test_sampling_says_what_hardly_can_be_meant(extra, words, place, capsys):
    train.main([*BASE, "--warmup", "0"])
    good, printed = outcome(sample, ["r", "-n", "2", "--out", "o", *extra.split()], capsys)
    assert good and words in printed, printed
    assert len(list(Path("o").glob("0*.png"))) == 2


def test_ordinary_commands_have_no_notes(place, capsys):
    good, printed = outcome(train, [*BASE, "--warmup", "0"], capsys)
    assert good and "note:" not in printed
    good, printed = outcome(sample, ["r", "-n", "2", "--nfe", "4"], capsys)
    assert good and "note:" not in printed
    assert (
        sampling.notes(
            sample.parse(["--sampler", "dpm-solver", "--nfe", "4"]), denoiser.load_run("r")
        )
        == []
    )


# ------------------------------------------------------------------ the same again


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_command_gives_the_same_bits(threads, features, tmp_path):
    """Train, sample and measure twice, as separate processes: checkpoint, PNGs and score."""
    root = Path(__file__).resolve().parents[1]
    found = []
    for i in (1, 2):
        folder = tmp_path / str(i)
        folder.mkdir()

        def run(program, *argv, folder=folder):
            done = subprocess.run(
                [sys.executable, str(root / f"{program}.py"), *argv],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        run("train", "--image-size", "8", "--batch-size", "8", "--steps", "12", "--name", "r",
            "--sa-k", "2", "--etsdm", "--dropout", "0.1")  # fmt: skip
        run("sample", "r", "-n", "8", "--sampler", "ddpm", "--nfe", "5", "--out", "o")
        score = run("metrics", "fid", "r", "shapes", "-n", "60", "--nfe", "2", "--features",
                    str(features), "--json")  # fmt: skip
        pictures = [p.read_bytes() for p in sorted((folder / "o").glob("0*.png"))]
        checkpoint = files.load_checkpoint(folder / "runs/r/checkpoint.pt")
        found.append((checkpoint, pictures, json.loads(score)["value"]))
    (one, pictures, score), (two, others, again) = found
    for part in ("raw", "ema", "optimizer"):
        assert_close(two[part], one[part], rtol=0, atol=0)
    assert pictures == others and len(pictures) == 8
    assert score == again > 0
