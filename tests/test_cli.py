"""The programs as a user starts them: the README's commands at their smallest, help, errors.
(What is refused: test_refusals.py; signals: robustness/test_kills.py.)"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, TINY, refused, run_program, torchrun
from kills import read_pictures
from PIL import Image
from programs import PROGRAMS, parse
from torch.testing import assert_close

import denoiser
import sample
import train
from support import checkpoint
from support.cli import make_parser


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one finished small run, made by the README's first command through torchrun."""
    folder = tmp_path_factory.mktemp("cli")
    words = ["--sa-k", "2", *TINY, "--steps", "3", "--name", "sa2"]
    done = torchrun(1, ROOT / "train.py", *words, cwd=folder)
    assert "next: python sample.py sa2" in done.stdout
    return folder


def test_train_then_sample(trained):
    out = run_program(ROOT / "sample.py", "--num", "5", "--nfe", "4", cwd=trained).stdout
    grid = Path(re.search(r"^grid: (.*)", out, re.M)[1])
    assert grid.is_absolute() and Image.open(grid).size == (16, 24)  # 2 columns, 3 rows of 8 x 8
    folder = grid.with_suffix("")  # the grid lies next to it: inside are the images of a set alone
    assert sorted(p.name for p in folder.glob("*.png")) == [f"{i:06d}.png" for i in range(5)]
    assert len(re.search(r"mean of each channel: (.*) of 255", out)[1].split(", ")) == 3


def samples(out, words):
    """sample.py in this process -> its output folder."""
    sample.main(["sa2", "--out", str(out), *words.split()])
    return out


@pytest.fixture
def out(trained, tmp_path, monkeypatch):
    """A folder that is not yet there; the run is in the current one."""
    monkeypatch.chdir(trained)
    return tmp_path / "out"


@pytest.mark.parametrize(
    "flags", ["--sampler ddim --nfe 5", "--nfe 6", "--sampler dpm-solver --nfe 7 --spacing logsnr"]
)
def test_an_image_is_the_same_for_any_batch_size(out, flags):
    flags += " --num 7"
    whole = read_pictures(samples(out, flags))
    parts = read_pictures(samples(out.with_name("b"), flags + " --batch-size 2"))
    assert np.abs(whole - parts).max() <= 1
    other = read_pictures(samples(out.with_name("c"), flags + " --seed 1"))
    for i, picture in enumerate([*whole, *other]):  # of two seeds, all are different pictures
        for another in [*whole, *other][:i]:
            assert np.abs(picture - another).max() > 10


def test_bf16_pictures_are_near_the_float32_ones(out):
    whole = read_pictures(samples(out, "--num 6 --nfe 5 --sampler ddim"))
    half = samples(out.with_name("b"), "--num 6 --nfe 5 --sampler ddim --precision bf16")
    assert np.abs(whole - read_pictures(half)).mean() < 2
    assert json.loads((half / "settings.json").read_text("utf-8"))["precision"] == "bf16"


def test_npz_holds_the_same_pictures(out):
    """Packed at the end, next to the folder; ADM's evaluator reads arr_0."""
    samples(out, "--num 3 --nfe 3 --npz")
    with np.load(out.with_name("out.npz")) as archive:
        assert archive.files == ["arr_0"] and archive["arr_0"].dtype == np.uint8
        assert (
            archive["arr_0"].shape == (3, 8, 8, 3)
            and (archive["arr_0"] == read_pictures(out)).all()
        )


def test_sampling_goes_on_where_it_stopped(out, capsys, tmp_path):
    """Also if the run was moved meanwhile."""
    before = read_pictures(samples(out, "--num 6 --nfe 3"))
    (out / "000004.png").unlink()
    stamp = (out / "000002.png").stat().st_mtime_ns
    samples(out, "--num 6 --nfe 3")
    assert "5 of 6 images exist already" in capsys.readouterr().out
    assert np.abs(read_pictures(out) - before).max() <= 1
    shutil.copytree("runs/sa2", tmp_path / "elsewhere")
    sample.main([str(tmp_path / "elsewhere"), "--num", "6", "--nfe", "3", "--out", str(out)])
    assert "6 of 6 images exist already" in capsys.readouterr().out
    assert (out / "000002.png").stat().st_mtime_ns == stamp


def test_other_settings_do_not_mix_with_old_pictures(out):
    """And nothing is deleted."""
    samples(out, "--num 6 --nfe 3")
    before = {p: p.read_bytes() for p in out.iterdir()}
    for flags in ("--nfe 4", "--seed 1", "--precision bf16", "--weights raw"):
        message = f"^--out {out} holds images with other settings"
        refused(message, samples, out, "--num 6 --nfe 3 " + flags)
    assert {p: p.read_bytes() for p in out.iterdir()} == before


def test_a_folder_of_somebody_else_is_left_alone(out):
    out.mkdir()
    others = [out / "000000.png", out.with_name("new.png"), out.with_name("mine") / "photo.jpg"]
    others[2].parent.mkdir()
    for path in others:  # new.png: where the grid would go
        path.write_text("precious", encoding="utf-8")
    for name in ("out", "new", "mine"):
        message = f"^--out .*{name}.* was not written by this program"
        refused(message, samples, out.with_name(name), "--num 2 --nfe 2")
    assert all(path.read_text(encoding="utf-8") == "precious" for path in others)
    assert not out.with_name("new").exists()


@pytest.mark.slow
def test_the_default_folder_is_named_after_what_differs(here):
    """So plain commands never meet pictures of other settings, nor of an earlier step."""
    for steps in ("1", "2"):
        train.main([*TINY, "--warmup", "0", "--name", "grows", "--steps", steps])
        sample.main(["-n", "2", "--nfe", "2"])
    for flags in ("--seed 3", "--variance large", "--weights raw --clip on"):
        sample.main(["-n", "2", "--nfe", "2", *flags.split()])
    expected = "ddpm-2-step1 ddpm-2-step2 ddpm-2-step2-seed-3 ddpm-2-step2-variance-large "
    expected += "ddpm-2-step2-clip-on-weights-raw"
    folders = (p for p in Path("runs/grows/generated").iterdir() if p.is_dir())
    assert {p.name for p in folders} == set(expected.split())


def test_stochastic_samplers_are_clipped_by_default(out):
    d = denoiser.load_run("sa2")
    for flags in ("", "--sampler ddim --eta 0.5", "--sampler ddim --clip on"):
        assert parse("sample.py", flags).arguments(d)["clip"] == (-1, 1)
    for flags in ("--sampler ddim", "--clip off"):
        assert parse("sample.py", flags).arguments(d)["clip"] is None


def test_load_run_gives_what_the_run_describes(out):
    ema, raw = (denoiser.load_run("runs/sa2", weights) for weights in ("ema", "raw"))
    assert ema.prediction == "v" and ema.schedule.name == "cosine" and ema.settings["sa_k"] == 2
    assert not ema.net.training and not any(p.requires_grad for p in ema.net.parameters())
    found = checkpoint.load_checkpoint(checkpoint.find_checkpoint())
    assert_close(ema.net.state_dict(), found["ema"], rtol=0, atol=0)
    assert_close(raw.net.state_dict(), found["net"], rtol=0, atol=0)
    assert not torch.equal(ema.net.out_conv.bias, raw.net.out_conv.bias)


# ------------------------------------------------------------------ help


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_teaches(program, monkeypatch):
    """Examples, defaults, a line for each flag, and the program as one types it."""
    monkeypatch.setenv("COLUMNS", "80")
    parser = make_parser(PROGRAMS[program])
    text = parser.format_help()
    assert "default" in text and program in text
    assert PROGRAMS[program].description[:20] in text
    assert "examples" in text or program == "papers.figures"  # which has one flag
    assert all(action.help for action in parser._actions)
    assert all(len(line) <= 110 for line in text.splitlines())


def run_code(code, *words, cwd, **environment):
    """`python -c code words` with other environment variables -> the ended process."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n{code}", *words],
        cwd=cwd,
        env=ENV | environment,
        capture_output=True,
        encoding="utf-8",
    )


HELP = """
import importlib
for name in sys.argv[1:]:
    module, *words = name.split()
    try:
        importlib.import_module(module).main([*words, "--help"])
    except SystemExit as end:
        assert not end.code, name
    print("helped")
"""


@pytest.mark.slow
def test_help_needs_no_docstrings(tmp_path):
    """PYTHONOPTIMIZE=2 removes them. All programs in one process."""
    names = [*PROGRAMS, "papers.superres", "papers.autoencoder"]
    names = [{"benchmarks": "benchmarks.__main__"}.get(n, n.replace(".py", "")) for n in names]
    done = run_code(HELP, *names, cwd=tmp_path, PYTHONOPTIMIZE="2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("helped\n") == len(names)


# ------------------------------------------------------------------ errors


COMPILE = """
import train, torch
from support import precision, programs

def inference():
    layer = torch.nn.Linear(1, 1)
    precision.for_inference(layer, torch.device("cpu"), compiled=True)(torch.zeros(1, 1))

for work in (inference, lambda: train.main(sys.argv[1:])):
    try:
        programs.run_main(work)
    except SystemExit as end:
        print("status", end.code)
"""


@pytest.mark.slow
def test_compile_without_a_compiler_is_one_line(tmp_path):
    """In training, and as sample.py and metrics.py compile: in one process, since torch.compile
    takes long to start."""
    done = run_code(COMPILE, *TINY, "--steps", "1", "--compile", cwd=tmp_path, CXX="/nonexistent")
    assert done.stdout.count("status 2") == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 2
    for line in lines:
        assert re.match(r"-c: error: --compile: torch.compile failed .* Install a C\+\+", line)


def test_an_error_is_one_line_and_status_2(tmp_path):
    """Of the programs themselves, in a folder of their own."""
    for words, message in (
        ([ROOT / "train.py", "--lr", "-1"], "train.py: error: --lr must be above 0"),
        ([ROOT / "sample.py"], "sample.py: error: no run under"),
    ):
        done = run_program(*words, cwd=tmp_path, status=2)
        assert done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "runs").exists()
