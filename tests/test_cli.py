"""The two programs as a user starts them: the README's commands at their smallest, signals,
errors."""

import json
import os
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

import classifier
import covariance
import denoiser
import files
import gap
import lipschitz
import metrics
import runtime
import sample
import sampling
import train
import unet

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--image-size", "8", "--batch-size", "4", "--precision", "fp32"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "10000"}


def run(*words, cwd, program="train.py", check=True, **kwargs):
    done = subprocess.run(
        [sys.executable, str(ROOT / program), *words],
        cwd=cwd,
        env=ENV,
        text=True,
        capture_output=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
        **kwargs,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with one finished small run, made by the README's first command through torchrun."""
    folder = tmp_path_factory.mktemp("cli")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            str(ROOT / "train.py"),
            "--sa-k",
            "2",
            *TINY,
            "--steps",
            "3",
        ],
        cwd=folder,
        env=ENV,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "next: python sample.py shapes-tiny-sa2" in done.stdout
    return folder


def test_train_then_sample(trained):
    out = run("--num", "5", "--nfe", "4", cwd=trained, program="sample.py").stdout
    grid = Path(re.search(r"^grid: (.*)", out, re.M)[1])
    assert grid.is_absolute() and Image.open(grid).size == (16, 24)  # 2 columns, 3 rows of 8 x 8
    folder = grid.with_suffix("")  # the grid lies beside it: inside are the images of a set alone
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
        ["--nfe", "5"],
        ["--sampler", "ddpm", "--nfe", "6"],
        ["--sampler", "dpm-solver", "--nfe", "7", "--spacing", "logsnr"],
    ],
    ids=str,
)
def test_an_image_is_the_same_for_any_batch_size(inside, flags):
    whole = pngs(samples(inside / "a", "--num", "7", *flags))
    parts = pngs(samples(inside / "b", "--num", "7", "--batch-size", "2", *flags))
    assert np.abs(whole - parts).max() <= 1
    other = pngs(samples(inside / "c", "--num", "7", "--seed", "1", *flags))
    for i, picture in enumerate([*whole, *other]):  # of two seeds, all are different pictures
        for another in [*whole, *other][:i]:
            assert np.abs(picture - another).max() > 10


def test_bf16_pictures_are_near_the_float32_ones(inside):
    whole = pngs(samples(inside / "a", "--num", "6", "--nfe", "5"))
    half = pngs(samples(inside / "b", "--num", "6", "--nfe", "5", "--precision", "bf16"))
    assert np.abs(whole - half).mean() < 2
    assert '"bf16"' in (inside / "b" / "out" / "settings.json").read_text()
    samples(inside / "b", "--num", "2", "--nfe", "5")  # in float32 again: not to be mixed
    assert len(pngs(inside / "b" / "out")) == 2


def test_npz_holds_the_same_pictures(inside):
    pictures = pngs(samples(inside / "a", "--num", "3", "--nfe", "3"))
    archive = np.load(samples(inside / "b", "--num", "3", "--nfe", "3", "--npz") / "images.npz")[
        "arr_0"
    ]
    assert archive.dtype == np.uint8 and archive.shape == (3, 8, 8, 3)
    assert np.abs(archive.astype(int) - pictures).max() <= 1


def test_an_npz_goes_on_whatever_its_array_is_called(inside, capsys):
    """ADM's evaluator wants arr_0, the first array; it was `images` once."""
    words = ["--num", "3", "--nfe", "3", "--npz"]
    path = samples(inside, *words) / "images.npz"
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        pictures = archive["arr_0"]
    np.savez(path, images=pictures)
    samples(inside, *words)
    assert "3 of 3 images are there already" in capsys.readouterr().out
    assert np.array_equal(np.load(path)["arr_0"], pictures)


def test_pictures_of_other_seeds_than_today_are_made_again(inside, capsys):
    """Earlier versions gave image i seed + i; of seed 0 that is the same."""
    for seed, there in (("0", True), ("3", False)):
        out = samples(inside / seed, "--num", "2", "--nfe", "2", "--seed", seed)
        made = json.loads((out / "settings.json").read_text())
        made.pop("generator_seeds", None)
        (out / "settings.json").write_text(json.dumps(made))
        capsys.readouterr()
        samples(inside / seed, "--num", "2", "--nfe", "2", "--seed", seed)
        assert ("2 of 2 images are there already" in capsys.readouterr().out) == there


def test_sampling_goes_on_where_it_stopped(inside, capsys):
    out = samples(inside, "--num", "6", "--nfe", "3")
    before = pngs(out)
    (out / "000004.png").unlink()
    stamp = (out / "000002.png").stat().st_mtime_ns
    samples(inside, "--num", "6", "--nfe", "3")
    assert "5 of 6 images are there already" in capsys.readouterr().out
    assert np.abs(pngs(out) - before).max() <= 1
    assert (out / "000002.png").stat().st_mtime_ns == stamp


def test_a_run_that_was_moved_keeps_its_pictures(inside, capsys):
    out = samples(inside, "--num", "3", "--nfe", "3")
    stamp = (out / "000002.png").stat().st_mtime_ns
    shutil.copytree("runs/shapes-tiny-sa2", inside / "elsewhere")
    sample.main([str(inside / "elsewhere"), "--num", "3", "--nfe", "3", "--out", str(out)])
    assert "3 of 3 images are there already" in capsys.readouterr().out
    assert (out / "000002.png").stat().st_mtime_ns == stamp


def test_other_settings_do_not_mix_with_old_pictures(inside):
    out = samples(inside, "--num", "6", "--nfe", "3")
    samples(inside, "--num", "2", "--nfe", "4")
    assert len(list(out.glob("0*.png"))) == 2


def test_a_folder_of_somebody_else_is_left_alone(inside):
    (inside / "out").mkdir()
    (inside / "out" / "000000.png").write_text("precious")
    with pytest.raises(ValueError, match="mix with what sample.py did not write, .*out: give an"):
        samples(inside, "--num", "2", "--nfe", "2")
    assert (inside / "out" / "000000.png").read_text() == "precious"
    (inside / "new.png").write_text("precious too")  # where the grid would go
    with pytest.raises(ValueError, match="did not write, .*new.png: give"):
        samples(inside, "--num", "2", "--nfe", "2", "--out", str(inside / "new"))
    assert (inside / "new.png").read_text() == "precious too" and not (inside / "new").exists()


def test_stochastic_samplers_are_clipped_by_default(inside):
    d = denoiser.load_run("shapes-tiny-sa2")
    for flags, clip in (
        (["--sampler", "ddpm"], (-1, 1)),
        ([], None),
        (["--eta", "0.5"], (-1, 1)),
        (["--sampler", "ddpm", "--clip", "off"], None),
        (["--clip", "on"], (-1, 1)),
    ):
        assert sampling.from_flags(sample.parse(flags), d)["clip"] == clip


def test_load_run_gives_what_the_run_describes(inside):
    ema, raw = (denoiser.load_run("runs/shapes-tiny-sa2", weights) for weights in ("ema", "raw"))
    assert ema.prediction == "v" and ema.schedule.name == "cosine" and ema.settings["sa_k"] == 2
    assert not ema.net.training and not any(p.requires_grad for p in ema.net.parameters())
    checkpoint = files.load_checkpoint(files.find_checkpoint())
    assert_close(ema.net.state_dict(), checkpoint["ema"], rtol=0, atol=0)
    assert_close(raw.net.state_dict(), checkpoint["raw"], rtol=0, atol=0)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(ema.net.parameters(), raw.net.parameters(), strict=True)
    )


@pytest.mark.parametrize("program", [train, sample, metrics, gap, lipschitz, classifier])
def test_help_teaches(program, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        program.parse(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    assert "examples" in text and "default" in text and f"{program.__name__}.py" in text
    assert all(len(line) <= 110 for line in text.splitlines())


@pytest.mark.slow
def test_help_needs_no_docstrings(tmp_path):
    """PYTHONOPTIMIZE=2 removes them. All programs in one process."""
    names = [p.stem for p in ROOT.glob("*.py") if "__main__" in p.read_text(encoding="utf-8")]
    assert {"train", "sample", "benchmark", "schedules"} <= set(names)
    code = f"""
import importlib, sys; sys.path[:0] = [{str(ROOT)!r}]
for name in {names}:
    module = importlib.import_module(name)
    try:
        (module.parse if hasattr(module, "parse") else module.main)(["--help"])
    except SystemExit as end:
        assert not end.code, name
        print("helped")
"""
    done = subprocess.run([sys.executable, "-c", code], env={**ENV, "PYTHONOPTIMIZE": "2"},
                          cwd=tmp_path, capture_output=True, encoding="utf-8")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("helped\n") == len(names)


COMPILE = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}]
import runtime, train, torch

def inference():
    layer = torch.nn.Linear(1, 1)
    runtime.for_inference(layer, torch.device("cpu"), compiled=True)(torch.zeros(1, 1))

for work in (inference, lambda: train.main(sys.argv[1:])):
    try:
        runtime.run_program(work)
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
        assert re.match(r"-c: error: --compile: torch.compile failed .* install a C\+\+", line)


@pytest.mark.parametrize(
    "program, words, message",
    [
        ("train.py", ["--data", "nowhere"], "no such file or folder"),
        ("train.py", ["--sa-weight", "1"], "there is none"),
        ("train.py", ["--batch-size", "x"], "invalid int value"),
        ("train.py", ["--preset", "huge"], "invalid choice"),
        ("train.py", ["--images", "100", "--steps", "2"], "not allowed with"),
        ("sample.py", [], "no run under .*train one first"),
        ("sample.py", ["nobody"], "no run nobody"),
        ("sample.py", ["--eta", "0.1", "--sampler", "ddpm"], "--eta belongs to ddim"),
        ("sample.py", ["--order", "2"], "--order belongs to dpm-solver"),
        ("sample.py", ["--variance", "large"], "--variance belongs to ddpm"),
        ("sample.py", ["--num", "0"], "at least 1"),
        ("sample.py", ["--seed", "-1"], "--seed must be from 0"),
        ("sample.py", ["page.pt"], "web page"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(
    program, words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    if words in (["--data", "nowhere"], []):  # two of them as a process of their own
        done = run(*words, cwd=tmp_path, program=program, check=False)
        status, text = done.returncode, done.stderr
    else:
        with pytest.raises(SystemExit) as end:
            runtime.run_program(
                lambda: {"train.py": train, "sample.py": sample}[program].main(words)
            )
        status, text = end.value.code, capsys.readouterr().err
    assert status == 2
    assert re.search(message, text.strip().splitlines()[-1]), text
    assert "Traceback" not in text
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    ],
    ids=lambda n: n.name,
)
def test_a_stopped_run_resumes_to_the_same_weights(number, tmp_path):
    """Stop it anyhow: the same command goes on, and ends bit for bit where an unstopped run
    ends."""
    words = [*TINY, "--steps", "20", "--save-every", "3", "--sample-every", "1000"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words, "--name", "stopped"],
        cwd=tmp_path,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # whoever runs the tests in the background has SIGINT ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    checkpoint = tmp_path / "runs" / "stopped" / "checkpoint.pt"
    until = time.time() + 60
    while not checkpoint.exists() and time.time() < until and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 0 and "Traceback" not in err, err
        assert f"stopped by {number.name} at step" in out and "same command" in out
    step = files.load_checkpoint(checkpoint)["step"]
    assert 0 < step < 20, "the signal must land inside the run"
    done = run(*words, "--name", "stopped", cwd=tmp_path)
    assert f"from step {step}" in done.stdout and "done:" in done.stdout
    os.chdir(tmp_path)
    train.main([*words, "--name", "whole"])
    whole = files.load_checkpoint(tmp_path / "runs" / "whole" / "checkpoint.pt")
    again = files.load_checkpoint(checkpoint)
    for key in ("raw", "ema", "optimizer"):
        assert_close(again[key], whole[key], rtol=0, atol=0)
    assert not list((tmp_path / "runs" / "stopped").rglob("*.tmp"))


def test_guided_diffusion_weights_through_sample_py(gold, tmp_path, monkeypatch, capsys):
    """The pictures are those of DDIM written out over the bare network, told t - 1."""
    size, state = gold.size, gold.state
    monkeypatch.setitem(unet.PRESETS, "gold", size)
    for key in ("out.2.weight", "out.2.bias"):  # a learn_sigma network
        state[key] = torch.cat([state[key], state[key] + 1])
    torch.save(state, tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    flags = "--guided-diffusion weights.pt --preset gold --nfe 5 -n 2 --npz --seed 3 --clip on"
    sample.main(flags.split())
    out = capsys.readouterr().out
    assert "weights.pt, as gold" in out and "generated/ddim-5" in out
    with np.load("generated/ddim-5/images.npz") as archive:
        images = torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2).int()

    net = unet.UNet(**size, out_channels=6).eval()
    net.load_state_dict(unet.from_guided_diffusion(state))
    beta = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    seeds = (3 * 2**20, 3 * 2**20 + 1)
    x = torch.stack([torch.randn(3, 16, 16, generator=torch.manual_seed(s)) for s in seeds])
    times = np.linspace(1000, 1, 5)
    log_ab = np.interp(times, np.arange(1001), np.log(alpha_bar))
    for i, t in enumerate(times):
        with torch.no_grad():
            eps = net(x, torch.full((2,), t - 1))[:, :3].double()
        ab, ab_next = np.exp(log_ab[i]), np.exp(log_ab[i + 1]) if i < 4 else 1.0
        x0 = ((x.double() - (1 - ab) ** 0.5 * eps) / ab**0.5).clamp(-1, 1)
        eps = (x.double() - ab**0.5 * x0) / (1 - ab) ** 0.5
        x = (ab_next**0.5 * x0 + (1 - ab_next) ** 0.5 * eps).float()
    expected = ((x.clamp(-1, 1) + 1) * 127.5).round().int()
    assert_close(images, expected, rtol=0, atol=1)
    assert 0.1 < ((expected > 0) & (expected < 255)).double().mean()  # not all saturated


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--guided-diffusion", "w.pt"], "goes with --preset"),
        (["--preset", "adm256"], "--guided-diffusion FILE goes with --preset"),
        (["run", "--guided-diffusion", "w.pt", "--preset", "adm256"], "and without a run"),
        (["--schedule", "cosine"], "a run knows its own"),
        (
            ["--guided-diffusion", "w", "--preset", "adm256", "--low-res", "x"],
            "leave out --npz and",
        ),
        (["--guided-diffusion", "w", "--preset", "adm256", "--weights", "raw"], "one set of weig"),
        (["--guided-diffusion", "w", "--preset", "adm256", "--variance", "sn"], "no second head"),
        (["--variance", "analytic", "--sampler", "heun"], "--variance"),
        (["--churn", "3"], "--churn"),
        (["--variance", "large"], "ddpm"),
    ],
)
def test_flags_of_sample_that_do_not_go_together(flags, words):
    with pytest.raises(ValueError, match=words):
        sample.parse(flags)


@pytest.mark.parametrize(
    "program, words, begins",
    [
        (sample, "-n 0", "--num must be at least 1, not 0"),
        (sample, "--batch-size 0", "--batch-size must be at least 1"),
        (sample, "--nfe 0", "--nfe must be at least 1"),
        (sample, "--seed 4096", "--seed must be from 0 to 4095"),
        (metrics, "fid a b -n 0", "--num must be at least 1"),
        (metrics, "fid a b --batch-size 0", "--batch-size must be at least 1"),
        (metrics, "fid a b --image-size 0", "--image-size must be at least 1"),
        (metrics, "fid a b --image-size 90000", "--image-size must be at most 8192"),
        (metrics, "fid a b --seed 4096", "--seed must be from 0"),
        (metrics, "psnr a b --features x.pt2", "--features has no use: psnr compares pixels"),
        (metrics, "fid a b --inception none", "--inception: no such file: none"),
        (gap, "-n 1", "--num must be at least 2"),
        (gap, "--batch-size 0", "--batch-size must be at least 1"),
        (gap, "--seed -1", "--seed must be from 0"),
        (gap, "--eta nan", "--eta must be between 0 and 1"),
        (lipschitz, "-n 0", "--num must be at least 1"),
        (lipschitz, "--batch-size 0", "--batch-size must be at least 1"),
        (lipschitz, "--seed -1", "--seed must be at least 0"),
        (lipschitz, "--dt nan", "--dt must be above 0"),
        (lipschitz, "--dt inf", "--dt must be above 0, and a number"),
        (lipschitz, "--max-t nan", "--max-t must not be negative"),
        (lipschitz, "--perturb --scales 0 -1", "--scales must not be negative"),
        (lipschitz, "--t 50", "--t goes with --perturb"),
        (lipschitz, "--perturb --dt 2", "--dt goes without --perturb"),
        (covariance, "-n 0", "--num must be at least 1"),
        (covariance, "--batch-size 0", "--batch-size must be at least 1"),
        (covariance, "--seed -1", "--seed must be at least 0"),
        (classifier, "set --epochs 0", "--epochs must be at least 1"),
        (classifier, f"set --seed {2**64}", "--seed must not be negative or beyond 2^62"),
    ],
)  # fmt: skip
def test_a_refusal_begins_with_its_flag(program, words, begins):
    with pytest.raises((ValueError, OSError)) as caught:
        program.parse(words.split())
    assert str(caught.value).startswith(begins) and "\n" not in str(caught.value)
