"""Every flag: valid combinations train, sample and are measured; others end in one line, status 2;
none is accepted and then ignored.

hypothesis walks the combinations: a program that trains, flags of it and of the sampler, with
values that are usual, odd and wrong. Each is either carried through, or refused before anything is
written.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENV, TINY, assert_same, saved
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from kills import export_features
from programs import PROGRAMS, main_of, parse
from torch.testing import assert_close

import denoiser
import unet
from support import checkpoint
from support import features as networks
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
# WALK=1000 pytest -q -m slow -s tests/test_flags.py -k walk_through    # other ones, each time
WALK = os.environ.get("WALK")
LONG = settings(
    max_examples=int(WALK or 100),
    derandomize=not WALK,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
# Twice as fast as the preset `tiny`, whose name it takes.
SMALLER = unet.PRESETS["tiny"] | dict(channels=8, channel_mult=(1, 2), norm_groups=4)


# ------------------------------------------------------------------ flags, each with its values


def table(text):
    """Flags, each with its values -> {flag: values}, no values for a switch."""
    rows = [row.split() for row in text.split("|")]
    return {flag: values for flag, *values in rows}


# The first values are right somewhere: the walk is mostly among those.
TRAIN = table("""
    --sa-k 1 2 3 0 1001 x | --sa-weight 1 0.3 0 -1 nan | --sa-reuse | --etsdm |
    --etsdm-interval 100 50.5 1000 1001 0 nan | --etsdm-n 5 1 100 0 200 |
    --remap sqrt inverse-sigmoid log |
    --schedule linear cosine zero-terminal-snr linear-mns edm none | --continuous |
    --prediction eps v x0 edm score | --loss-space eps v x0 edm |
    --train-times uniform remap lognormal | --lipschitz-reg 1 0 inf | --dropout 0 0.3 1 | --flip |
    --no-flip | --channels 1 3 2 | --microbatch 1 5 0 | --recompute | --precision fp32 bf16 fp16 |
    --deterministic | --grad-clip 0 1 -1 | --lr 0.001 0 nan | --ema 0 0.9 1 | --warmup 0 10 -1 |
    --seed 0 7 -1 | --workers 0 1 -1 | --skip-bad-images | --factor 2 4 3 | --downsamplings 1 2 9 |
    --head-size simple block large | --beta2 0.99 0 1 | --kl-weight 0.001 -1 |
    --latent-channels 2 0 | --data shapes images.npy nowhere page.zip | --sample-every 1 0 |
    --save-every 1 0 | --optimizer adam muon sgd | --muon-lr 0.1 0 | --muon-momentum 0 0.9 1 |
    --lr-decay none linear cosine
""")
SAMPLE = table("""
    --sampler ddpm ddim dpm-solver dpm-solver++ heun euler | --nfe 1 2 3 4 0 -5 |
    --spacing uniform quadratic logsnr leading remap | --eta 0 0.5 1 2 nan | --order 1 2 3 4 |
    --variance small large analytic npr sn | --churn 0 10 -1 | --churn-min 0.1 | --churn-max 5 -1 |
    --churn-noise 1.003 nan | --clip auto on off | --precision fp32 bf16 | --deterministic |
    --weights ema raw last | --seed 0 3 -1
""")
# What is the default, written out, changes nothing and is no contradiction.
DEFAULTS = table("""
    --sa-weight 1 | --etsdm-interval 100 | --etsdm-n 5 | --no-flip | --schedule cosine |
    --prediction v edm | --loss-space v edm eps x0 | --train-times uniform lognormal |
    --warmup 100 20 | --dropout 0 | --factor 4 | --downsamplings 2 | --beta2 0.99 |
    --head-size simple | --grad-clip 1 0 | --precision auto | --ema 0.995 0.99 |
    --lr 0.001 0.01 | --seed 0 | --sa-k 1 | --channels 3 | --data shapes | --optimizer muon adam |
    --lr-decay linear none | --muon-momentum 0.9
""")


def flags(table, most):
    """A strategy: up to `most` different flags of a table, each with a value."""

    def with_value(name):
        values = table[name]
        if not values:
            return st.just([name])
        right = st.sampled_from(values[:3])
        return st.one_of(right, right, st.sampled_from(values)).map(lambda v: [name, v])

    names = st.lists(st.sampled_from(sorted(table)), max_size=most, unique=True)
    return names.flatmap(lambda names: st.tuples(*map(with_value, names)).map(list))


@st.composite
def combinations(draw):
    """A strategy: (program, its flags, the sampler's flags). train.py comes more often."""
    program = draw(st.sampled_from(["train.py", "train.py", "train.py", *TRAINING]))
    known = make_parser(PROGRAMS[program])._option_string_actions
    some = draw(flags({k: v for k, v in TRAIN.items() if k in known}, 4))
    return program, some, draw(flags(SAMPLE, 3))


def words(parts):
    return [word for part in parts for word in part]


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A network for --features. To open one takes longer than its use: here it happens once."""
    path = tmp_path_factory.mktemp("features") / "f.pt2"
    export_features(path)
    with pytest.MonkeyPatch.context() as patch:
        opened = functools.cache(networks.open_exported)
        patch.setattr(networks, "open_exported", opened)
        yield path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a denoiser and an autoencoder that others start from."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(unet.PRESETS, "tiny", SMALLER)
        small = ["--image-size", "8", *BASE[:-1]]
        main_of("train.py", [*small, "base"])
        main_of("papers.autoencoder train", [*small, "code", "--downsamplings", "1"])
    return folder / "runs"


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def place(runs, here, monkeypatch):
    """A folder with two runs, a set of images and a page; the global switches as they were."""
    monkeypatch.setitem(unet.PRESETS, "tiny", SMALLER)
    monkeypatch.delenv("TRACEBACK", raising=False)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    shutil.copytree(runs, "runs")
    np.save("images.npy", IMAGES)
    Path("page.zip").write_text("<html>", encoding="utf-8")
    yield here
    torch.use_deterministic_algorithms(False)


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


def without_effect(program, parts, printed):
    """Flags whose absence changes no setting, and of which no note says so."""

    def resolved(parts):  # the settings that these flags mean, less the run's name
        config = parse(program, [*TRAINING[program].split(), *BASE, *words(parts)])
        return {**config.settings(), "name": None}

    idle = []
    for i, part in enumerate(parts):
        try:
            same = resolved(parts[:i] + parts[i + 1 :]) == resolved(parts)
        except (ValueError, OSError, SystemExit):
            continue  # without it the rest would not do: it matters
        usual = part[0] in DEFAULTS and part[1:] in ([], *([v] for v in DEFAULTS[part[0]]))
        undone = part[0].replace("--", "--no-", 1) in [later[0] for later in parts[i:]]  # --flip
        if same and part[0] not in printed and not usual and not undone:
            idle.append(part)
    return idle


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
    idle = without_effect(program, training, printed)
    assert not idle, f"{idle} of {training} has no effect, and no note says so"
    found = saved("r")
    assert found["step"] == 2 and checkpoint.all_finite(found["net"])
    if program == "papers.autoencoder train":
        argv = ["r", "images.npy", "--out", "out"]
        good, printed = outcome("papers.autoencoder reconstruct", argv, capsys)
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
    score = json.loads(printed)
    assert np.isfinite(score["value"]) and score["value"] >= 0
    # nfe: what is printed with the score is what was asked for, or a warning says why not
    nfe = next((part[1] for part in drawing if part[0] == "--nfe"), "50")
    assert f"-{nfe}-step2" in score["sides"][0]["what"] or "heun" in str(score["warnings"])
    return 2


@pytest.mark.slow
def test_combinations_walk_through_or_are_refused(place, features, capsys):
    reached = [0, 0, 0]

    @LONG
    @given(combinations())
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
    @settings(LONG, max_examples=6, derandomize=True)
    @given(combinations())
    def go(parts):
        note(f"{parts}")
        walk(*parts, features, capsys)

    go()


# ------------------------------------------------------------------ what a flag is for


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A function: flags -> {net, ema: all weights in one vector} after three steps with them."""
    folder = tmp_path_factory.mktemp("weights")
    np.save(folder / "images.npy", IMAGES)

    @functools.cache
    def of(flags, program="train.py"):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            if "--sample-every" not in flags:  # it takes longer than the steps
                patch.setattr("support.run.RunFolder.save_preview", lambda *inputs: None)
            shutil.rmtree("runs", ignore_errors=True)
            main_of(program, [*TINY, *"--warmup 0 --steps 3 --name w".split(), *flags.split()])
            found = saved("w")
        torch.use_deterministic_algorithms(False)
        return {k: torch.cat([v.flatten() for v in found[k].values()]) for k in ("net", "ema")}

    return of


CHANGES = """--sa-k 2 | --sa-k 2 --sa-weight 0.3 | --sa-k 2 --sa-reuse | --etsdm
    | --etsdm --etsdm-interval 900 | --etsdm --etsdm-interval 900 --etsdm-n 2 | --remap sqrt
    | --remap sqrt --train-times remap | --remap inverse-sigmoid | --schedule linear | --continuous
    | --prediction x0 | --loss-space x0 | --lipschitz-reg 30 | --dropout 0.3 | --flip
    | --precision bf16 | --grad-clip 0.001 | --lr 0.0001 | --beta2 0.5 | --warmup 5 | --seed 3
    | --batch-size 8 | --data images.npy | --schedule edm | --schedule zero-terminal-snr
    | --optimizer muon | --optimizer muon --muon-lr 0.1 | --optimizer muon --muon-momentum 0.5
    | --lr-decay cosine"""


@pytest.mark.slow
@pytest.mark.parametrize("extra", [extra.strip() for extra in CHANGES.split("|")])
def test_a_flag_that_should_change_the_weights_does(extra, weights):
    """With each set apart from all before it that it extends."""
    other = any(flag in extra for flag in ("--sa-reuse", "--remap", "--lipschitz-reg"))
    program = "papers.alternatives" if other else "train.py"
    found = weights(extra, program)["net"]
    assert not torch.equal(found, weights("")["net"])
    if " --" in extra:
        assert not torch.equal(found, weights(extra[: extra.rindex(" --")], program)["net"])


@pytest.mark.slow
def test_the_average_follows_its_flag(weights):
    got, plain = weights("--ema 0.05"), weights("")
    assert_close(got["net"], plain["net"], rtol=0, atol=0)
    assert not torch.equal(got["ema"], plain["ema"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", ["--save-every 1", "--sample-every 1", "--workers 0", "--deterministic", "--recompute"]
)
def test_a_flag_that_should_not_change_the_weights_does_not(extra, weights):
    got, plain = weights(extra), weights("")
    if extra != "--recompute":
        assert_close(got, plain, rtol=0, atol=0)
    for key, found in got.items():
        # Recomputed gradients differ by rounding (test_unet.py: to 1e-13 in float64). Adam divides
        # by a gradient's size, so it shows where that is almost 0: in 4 of 1.1 million, by 3e-7.
        off = (found - plain[key]).abs()
        assert off.max() <= 1e-6 and (off > 1e-7).sum() <= 20


# ------------------------------------------------------------------ notes on what is unusual


SMALL = ["--image-size", "8", *BASE]
NOTES = {  # of training; of sampling, the flags begin with --sampler or --nfe
    "--schedule zero-terminal-snr --prediction eps": "begin at t = 999",
    "--sa-k 2 --sa-weight 0": "leaves only the plain loss",
    "--etsdm --etsdm-n 100": "nothing is shared",
    "--microbatch 2": "--microbatch 2 has no effect",
    "--warmup 10": "the run has 2",
    "--workers 3": "--workers has no effect",
    "--skip-bad-images": "--skip-bad-images has no effect",
    "--sampler dpm-solver --nfe 2": "with --nfe 2 the highest order is 1",
    "--sampler dpm-solver --nfe 3 --order 3": "--order 3 needs more calls",
    "--sampler dpm-solver --nfe 4": "with --nfe 4 the highest order is 2",
    "--sampler heun --nfe 4": "it makes 3 of the 4 calls",
    "--nfe 1 --sampler ddim --eta 0.5": "--eta has no effect",
    "--nfe 1 --spacing logsnr --variance large": "--variance has no effect",
}


@pytest.mark.parametrize("extra", NOTES)
def test_a_note_on_what_hardly_can_be_meant(extra, place, capsys):
    sampling = extra.startswith(("--sampler", "--nfe"))
    program, start = ("sample.py", "base -n 2 --out o".split()) if sampling else ("train.py", SMALL)
    good, printed = outcome(program, [*start, *extra.split()], capsys)
    lines = [x for x in printed.splitlines() if sampling or x.startswith("note: ")]
    assert good and any(NOTES[extra] in x for x in lines), printed
    assert not sampling or len(list(Path("o").glob("0*.png"))) == 2


def test_ordinary_commands_have_no_notes(place, capsys):
    for program, argv in (
        ("train.py", [*SMALL, "--warmup", "0"]),
        ("sample.py", "r -n 2 --nfe 4".split()),
    ):
        good, printed = outcome(program, argv, capsys)
        assert good and "note:" not in printed
    config = parse("sample.py", "--sampler dpm-solver --nfe 5")
    assert config.warnings(denoiser.load_run("r")) == []


# ------------------------------------------------------------------ the same again


ALL_THREE = """
import sys
import metrics, sample, train
from support.run import RunFolder

RunFolder.save_preview = lambda *inputs: None  # longer than the steps
flags = "--image-size 8 --batch-size 8 --steps 12 --name r --sa-k 2 --etsdm --dropout 0.1"
train.main(flags.split())
sample.main("r -n 8 --sampler ddpm --nfe 5 --out o".split())
metrics.main([*"fid r shapes -n 60 --nfe 2 --json --features".split(), sys.argv[1]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("threads", ["1", "2"])
def test_the_same_command_gives_the_same_bits(threads, features, tmp_path):
    """Train, sample and measure in two separate processes: checkpoint, PNGs and score."""
    found = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        folder.mkdir()
        done = subprocess.run(
            [sys.executable, "-c", ALL_THREE, features],
            cwd=folder,
            env=ENV | {"OMP_NUM_THREADS": threads},
            capture_output=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stderr
        pictures = [p.read_bytes() for p in sorted((folder / "o").glob("0*.png"))]
        kept = checkpoint.load_checkpoint(folder / "runs/r/checkpoint.pt")
        found.append((kept, pictures, json.loads(done.stdout.splitlines()[-1])["value"]))
    (one, pictures, score), (two, others, again) = found
    assert_same(two, one)
    assert pictures == others and len(pictures) == 8
    assert score == again > 0
