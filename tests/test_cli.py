"""The programs as a user starts them: the README's commands at their smallest, signals, errors."""

import importlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import denoiser
import sample
import train
from conftest import ENV, ROOT, TINY, message_of, run_program, torchrun
from programs import PROGRAMS, parse
from support import checkpoint
from support.cli import make_parser
from support.programs import run_main


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one finished small run, made by the README's first command through torchrun."""
    folder = tmp_path_factory.mktemp("cli")
    done = torchrun(1, ROOT / "train.py", "--sa-k", "2", *TINY, "--steps", "3", cwd=folder)
    assert "next: python sample.py shapes-tiny-sa2" in done.stdout
    return folder


def test_train_then_sample(trained):
    out = run_program(ROOT / "sample.py", "--num", "5", "--nfe", "4", cwd=trained).stdout
    grid = Path(re.search(r"^grid: (.*)", out, re.M)[1])
    assert grid.is_absolute() and Image.open(grid).size == (16, 24)  # 2 columns, 3 rows of 8 x 8
    folder = grid.with_suffix("")  # the grid lies next to it: inside are the images of a set alone
    assert sorted(p.name for p in folder.glob("*.png")) == [f"{i:06d}.png" for i in range(5)]
    assert len(re.search(r"mean of each channel: (.*) of 255", out)[1].split(", ")) == 3


def samples(folder, *words):
    """sample.py in this process -> its output folder."""
    out = folder / "out"
    sample.main(["shapes-tiny-sa2", "--out", str(out), *words])
    return out


@pytest.fixture
def inside(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(trained)
    return tmp_path


def pngs(folder):
    return np.stack([np.asarray(Image.open(p)).astype(int) for p in sorted(folder.glob("0*.png"))])


@pytest.mark.parametrize(
    "flags",
    [
        "--nfe 5",
        "--sampler ddpm --nfe 6",
        "--sampler dpm-solver --nfe 7 --spacing logsnr",
    ],
)
def test_an_image_is_the_same_for_any_batch_size(inside, flags):
    whole = pngs(samples(inside / "a", "--num", "7", *flags.split()))
    parts = pngs(samples(inside / "b", "--num", "7", "--batch-size", "2", *flags.split()))
    assert np.abs(whole - parts).max() <= 1
    other = pngs(samples(inside / "c", "--num", "7", "--seed", "1", *flags.split()))
    for i, picture in enumerate([*whole, *other]):  # of two seeds, all are different pictures
        for another in [*whole, *other][:i]:
            assert np.abs(picture - another).max() > 10


def test_bf16_pictures_are_near_the_float32_ones(inside):
    whole = pngs(samples(inside / "a", "--num", "6", "--nfe", "5"))
    half = pngs(samples(inside / "b", "--num", "6", "--nfe", "5", "--precision", "bf16"))
    assert np.abs(whole - half).mean() < 2
    note = inside / "b" / "out" / "settings.json"
    assert json.loads(note.read_text(encoding="utf-8"))["precision"] == "bf16"


def test_npz_holds_the_same_pictures(inside):
    """Packed at the end, next to the folder; ADM's evaluator reads arr_0."""
    out = samples(inside, "--num", "3", "--nfe", "3", "--npz")
    with np.load(out.with_name("out.npz")) as archive:
        assert archive.files == ["arr_0"] and archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], pngs(out)) and archive["arr_0"].shape[1:] == (
            8,
            8,
            3,
        )


def test_sampling_goes_on_where_it_stopped(inside, capsys):
    out = samples(inside, "--num", "6", "--nfe", "3")
    before = pngs(out)
    (out / "000004.png").unlink()
    stamp = (out / "000002.png").stat().st_mtime_ns
    samples(inside, "--num", "6", "--nfe", "3")
    assert "5 of 6 images exist already" in capsys.readouterr().out
    assert np.abs(pngs(out) - before).max() <= 1
    assert (out / "000002.png").stat().st_mtime_ns == stamp


def test_a_run_that_was_moved_keeps_its_pictures(inside, capsys):
    out = samples(inside, "--num", "3", "--nfe", "3")
    stamp = (out / "000002.png").stat().st_mtime_ns
    shutil.copytree("runs/shapes-tiny-sa2", inside / "elsewhere")
    sample.main([str(inside / "elsewhere"), "--num", "3", "--nfe", "3", "--out", str(out)])
    assert "3 of 3 images exist already" in capsys.readouterr().out
    assert (out / "000002.png").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("flags", ["--nfe 4", "--seed 1", "--precision bf16", "--weights raw"])
def test_other_settings_do_not_mix_with_old_pictures(inside, flags):
    """And nothing is deleted."""
    out = samples(inside, "--num", "6", "--nfe", "3")
    before = {p: p.read_bytes() for p in out.iterdir()}
    with pytest.raises(ValueError) as info:
        samples(inside, "--num", "6", "--nfe", "3", *flags.split())
    assert message_of(info).startswith(f"--out {out} holds images made in another way")
    assert {p: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.slow
def test_the_default_folder_is_named_after_what_differs(inside, monkeypatch):
    """So plain commands never meet pictures of other settings, nor of an earlier step."""
    monkeypatch.chdir(inside)
    words = [*TINY, "--warmup", "0", "--name", "grows"]
    for steps in ("1", "2"):
        train.main([*words, "--steps", steps])
        sample.main(["-n", "2", "--nfe", "2"])
    for flags in ("--seed 3", "--sampler ddpm --variance large", "--weights raw --clip on"):
        sample.main(["-n", "2", "--nfe", "2", *flags.split()])
    assert {p.name for p in Path("runs/grows/generated").iterdir() if p.is_dir()} == {
        "ddim-2-step1",
        "ddim-2-step2",
        "ddim-2-step2-seed-3",
        "ddpm-2-step2-variance-large",
        "ddim-2-step2-clip-on-weights-raw",
    }


def test_a_folder_of_somebody_else_is_left_alone(inside):
    (inside / "out").mkdir()
    (inside / "out" / "000000.png").write_text("precious", encoding="utf-8")
    (inside / "new.png").write_text("precious too", encoding="utf-8")  # where the grid would go
    for name in ("out", "new"):
        with pytest.raises(ValueError, match=f"^--out .*{name}.* was not written by this program"):
            samples(inside, "--num", "2", "--nfe", "2", "--out", str(inside / name))
    assert (inside / "out" / "000000.png").read_text(encoding="utf-8") == "precious"
    assert (inside / "new.png").read_text(encoding="utf-8") == "precious too"
    assert not (inside / "new").exists()


def test_stochastic_samplers_are_clipped_by_default(inside):
    d = denoiser.load_run("shapes-tiny-sa2")
    for flags, clip in (
        ("--sampler ddpm", (-1, 1)),
        ("", None),
        ("--eta 0.5", (-1, 1)),
        ("--sampler ddpm --clip off", None),
        ("--clip on", (-1, 1)),
    ):
        assert parse("sample.py", flags).arguments(d)["clip"] == clip


def test_load_run_gives_what_the_run_describes(inside):
    ema, raw = (denoiser.load_run("runs/shapes-tiny-sa2", weights) for weights in ("ema", "raw"))
    assert ema.prediction == "v" and ema.schedule.name == "cosine" and ema.settings["sa_k"] == 2
    assert not ema.net.training and not any(p.requires_grad for p in ema.net.parameters())
    saved = checkpoint.load_checkpoint(checkpoint.find_checkpoint())
    assert_close(ema.net.state_dict(), saved["ema"], rtol=0, atol=0)
    assert_close(raw.net.state_dict(), saved["net"], rtol=0, atol=0)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(ema.net.parameters(), raw.net.parameters(), strict=True)
    )


# ------------------------------------------------------------------ help


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_teaches(program, monkeypatch):
    """Examples, defaults, a line for each flag, and the program as one types it."""
    monkeypatch.setenv("COLUMNS", "80")
    parser = make_parser(PROGRAMS[program])
    text = parser.format_help()
    assert "default" in text and program in text and PROGRAMS[program].description[:20] in text
    assert "examples" in text or program == "papers.figures"  # which has one flag
    assert all(action.help for action in parser._actions)
    assert all(len(line) <= 110 for line in text.splitlines())


HELP = f"""
import importlib, sys; sys.path[:0] = [{str(ROOT)!r}]
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
    names = [{"benchmarks": "benchmarks.__main__"}.get(name, name.replace(".py", ""))
             for name in (*PROGRAMS, "papers.superres", "papers.autoencoder")]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", HELP, *names], cwd=tmp_path, encoding="utf-8",
                          env={**ENV, "PYTHONOPTIMIZE": "2"}, capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("helped\n") == len(names)


# ------------------------------------------------------------------ errors


COMPILE = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}]
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
    words = [*TINY, "--steps", "1", "--compile"]
    done = subprocess.run([sys.executable, "-c", COMPILE, *words], cwd=tmp_path, encoding="utf-8",
                          env={**ENV, "CXX": "/nonexistent"}, capture_output=True)  # fmt: skip
    assert done.stdout.count("status 2") == 2, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert len(lines) == 2
    for line in lines:
        assert re.match(r"-c: error: --compile: torch.compile failed .* Install a C\+\+", line)


def test_an_error_is_one_line_and_status_2(tmp_path):
    """Of the programs themselves, in a folder of their own."""
    for words, message in (
        ([ROOT / "train.py", "--data", "nowhere"], "train.py: error: nowhere: no such file"),
        ([ROOT / "sample.py"], "sample.py: error: no run under"),
    ):
        done = run_program(*words, cwd=tmp_path, status=2)
        assert done.stderr.strip().splitlines()[-1].startswith(message), done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "program, words, message",
    [
        ("train", "--batch-size x", "argument --batch-size: invalid int value"),
        ("train", "--preset huge", "argument --preset: invalid choice"),
        ("train", "--images 100 --steps 2", "--steps and --images both set the length"),
        ("sample", "nobody", "no run nobody"),
        ("sample", "page.pt", "page.pt .*web page"),
        ("papers.superres", "video", "video: the programs are train and enlarge"),
        ("papers.autoencoder", "draw", "draw: the programs are train and reconstruct"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    program, words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.pt").write_text("<html>not found</html>", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        run_main(lambda: importlib.import_module(program).main(words.split()))
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and re.search(f"error: {message}", line), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "program, words, begins",
    [
        ("train.py", "--sa-weight 1", "--sa-weight requires --sa-k 2 or more"),
        ("train.py", "--etsdm --etsdm-n 0", "--etsdm-n "),
        ("train.py", "--etsdm --etsdm-interval 0", "--etsdm-interval "),
        ("train.py", "--etsdm-n 3", "--etsdm-n has no effect without --etsdm"),
        ("train.py", "--steps 0", "--steps must be above 0, not 0"),
        ("train.py", "--lr nan", "--lr must be above 0, not nan"),
        ("train.py", "--image-size 90000", "--image-size must be above 0 and below 8193"),
        ("train.py", "--sa-k 1001", "--sa-k must be 1 to 1000"),
        ("train.py", "--schedule edm --prediction v", "--prediction v cannot go with"),
        ("train.py", "--schedule edm --continuous", "--continuous has no effect"),
        ("train.py", "--name a/b", "--name 'a/b' must be a plain name"),
        ("papers.alternatives", "--remap sqrt --etsdm", "--remap and --etsdm are alternatives"),
        ("papers.alternatives", "--train-times remap", "--train-times remap needs --remap"),
        ("papers.alternatives", "--sa-reuse", "--sa-reuse needs --sa-k 2"),
        ("papers.alternatives", "--lipschitz-reg inf", "--lipschitz-reg must be 0 or more"),
        ("papers.superres train", "--factor 3", "--factor 3 must be at least 2 and divide"),
        ("papers.autoencoder train", "--downsamplings 9", "--downsamplings "),
        ("papers.heads", "npr", "KIND and RUN are both needed"),
        ("sample.py", "-n 0", "--num must be from 1 to 1048576, not 0"),
        ("sample.py", "--batch-size 0", "--batch-size must be from 1"),
        ("sample.py", "--nfe 0", "--nfe must be from 1"),
        ("sample.py", "--seed -1", "--seed must be from 0"),
        ("sample.py", "--eta 0.1 --sampler ddpm", "--eta has no effect on ddpm"),
        ("sample.py", "--order 2", "--order has no effect on ddim"),
        ("sample.py", "--variance large", "--variance has no effect on ddim"),
        ("sample.py", "--variance analytic --sampler heun", "--variance has no effect on heun"),
        ("sample.py", "--churn 3", "--churn has no effect on ddim"),
        ("sample.py", "--sampler heun --churn-min 1", "--churn-min has no effect without --churn"),
        ("metrics.py", "fid a b -n 0", "--num must be from 1"),
        ("metrics.py", "fid a b --batch-size 0", "--batch-size must be from 1"),
        ("metrics.py", "fid a b --image-size 0", "--image-size must be"),
        ("metrics.py", "fid a b --image-size 90000", "--image-size must be"),
        ("metrics.py", "fid a b --seed -1", "--seed must be from 0"),
        ("metrics.py", "psnr a b --features x.pt2", "--features has no effect: psnr compares"),
        ("metrics.py", "fid a b --inception none", "--inception"),
        ("gap.py", "-n 1", "--num must be at least 2"),
        ("gap.py", "--batch-size 0", "--batch-size must be at least 1"),
        ("gap.py", "--seed -1", "--seed must be at least 0"),
        ("gap.py", "--eta nan", "--eta must be between 0 and 1"),
        ("lipschitz.py", "-n 0", "--num must be at least 1"),
        ("lipschitz.py", "--batch-size 0", "--batch-size must be at least 1"),
        ("lipschitz.py", "--seed -1", "--seed must be at least 0"),
        ("lipschitz.py", "--dt nan", "--dt must be at least 1e-09, not nan"),
        ("lipschitz.py", "--dt inf", "--dt must be at least 1e-09, not inf"),
        ("lipschitz.py", "--max-t nan", "--max-t must"),
        ("lipschitz.py", "--perturb --scales 0 -1", "--scales must be at least 0, not 0.0 -1.0"),
        ("lipschitz.py", "--t 50", "--t "),
        ("lipschitz.py", "--perturb --dt 2", "--dt "),
        ("papers.covariance", "-n 0", "--num must be at least 1"),
        ("papers.covariance", "--batch-size 0", "--batch-size must be at least 1"),
        ("papers.covariance", "--seed -1", "--seed must be"),
        ("papers.classifier", "set --epochs 0", "--epochs must be at least 1"),
        ("papers.classifier", f"set --seed {2**64}", "--seed must be"),
        ("papers.experiments", "none", "there is no experiment none"),
    ],
)  # fmt: skip
def test_a_refusal_begins_with_its_flag(program, words, begins):
    with pytest.raises((ValueError, OSError)) as info:
        parse(program, words)
    assert message_of(info).startswith(begins)


# ------------------------------------------------------------------ signals


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGKILL"])
def test_a_stopped_run_resumes_to_the_same_weights(name, tmp_path, monkeypatch):
    """Stop it anyhow: the same command goes on, and ends bit for bit where an unstopped run
    ends."""
    words = [*TINY, "--steps", "20", "--save-every", "3"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words, "--name", "stopped"],
        cwd=tmp_path,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        # whoever runs the tests in the background has SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    path = tmp_path / "runs" / "stopped" / "checkpoint.pt"
    until = time.time() + 60
    while not path.exists() and time.time() < until and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    if name == "SIGKILL":
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 0 and "Traceback" not in err, err
        assert f"stopped by {name} at step" in out and "same command" in out
    step = checkpoint.load_checkpoint(path)["step"]
    assert 0 < step < 20, "the signal must land inside the run"
    done = run_program(ROOT / "train.py", *words, "--name", "stopped", cwd=tmp_path)
    assert f"from step {step}" in done.stdout and "done:" in done.stdout
    monkeypatch.chdir(tmp_path)
    train.main([*words, "--name", "whole"])
    whole = checkpoint.load_checkpoint(tmp_path / "runs" / "whole" / "checkpoint.pt")
    again = checkpoint.load_checkpoint(path)
    for key in ("net", "ema", "optimizer"):
        assert_close(again[key], whole[key], rtol=0, atol=0)
    assert not list((tmp_path / "runs" / "stopped").rglob("*.tmp"))
