"""What is different on a GPU, tested without one. Tests marked `cuda` need one."""

import copy
import json
import os
import runpy
import subprocess
import sys
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import ENV, ROOT, run_program
from emulated import emulated, waits
from programs import main_of, parse
from torch.testing import assert_close

import train
from benchmarks import __main__ as benchmark
from benchmarks import gpu_check, plain
from benchmarks.__main__ import memory_of
from config import RECIPES
from support import checkpoint, distributed, image_files, memory, precision, programs, rng

CPU = torch.device("cpu")


# ------------------------------------------------------------------ processes


@pytest.mark.parametrize("processes, gpus, backend", [(2, 1, "gloo"), (2, 2, "cpu:gloo,cuda:nccl")])
def test_processes_that_share_a_gpu_use_gloo(processes, gpus, backend, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert distributed.choose_backend(torch.device("cuda", 0)) == backend
    assert distributed.choose_backend(CPU) == "gloo"


def test_nccls_watchdog_ends_a_process_that_waits_in_vain(monkeypatch):
    """A process that waits for a GPU runs no Python: NCCL must know how long is too long."""
    calls = []
    for name, value in dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "rendezvous", lambda *a, **b: iter([(dist.HashStore(),)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **b: calls.append((a, b)))
    monkeypatch.setattr(dist, "new_group", lambda **b: calls.append(b))
    with emulated("cuda"):
        distributed.init(timeout=distributed.STEP_TIMEOUT)
    (backend,), words = calls[0]
    assert backend == "cpu:gloo,cuda:nccl" and words["timeout"] == timedelta(minutes=10)
    assert calls[1] == dict(backend="gloo", timeout=distributed.LONG_TIMEOUT)


@pytest.mark.parametrize(
    "text, lost",
    [
        ("NCCL error: ncclInvalidUsage: invalid usage. Duplicate GPU detected : rank 1", False),
        ("NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)", False),
        ("CUDA error: no kernel image is available for execution on the device", False),
        ("[Rank 1] Watchdog caught collective operation timeout: NCCL timed out", True),
        ("Connection closed by peer [127.0.0.1]:1234", True),
    ],
)
def test_an_error_of_the_gpu_is_not_a_lost_process(text, lost, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert programs.is_peer_failure(dist.DistBackendError(text)) is lost


# ------------------------------------------------------------------ static shapes, layouts


@pytest.mark.parametrize(
    "words, parts",
    [
        ("--batch-size 10 --microbatch 6", [5, 5]),
        ("--batch-size 8 --microbatch 3", [3, 3, 2]),
        ("--batch-size 8", [8]),
    ],
)
def test_microbatches_are_of_one_size_if_they_can(words, parts, monkeypatch):
    config = parse("train.py", f"--image-size 8 --precision fp32 --steps 1 {words}")
    objective = train.DiffusionObjective(config)
    state, seen, loss = train.TrainState(objective, config), [], objective.loss
    monkeypatch.setattr(
        objective, "loss", lambda net, x, draws: (seen.append(len(x)), loss(net, x, draws))[1]
    )
    images = torch.zeros(config.batch_size, 3, 8, 8, dtype=torch.uint8)
    one = distributed.Distributed(0, 1, 0, CPU)
    train.train_step(state, state.net, images, config, one, None)
    assert seen == parts


def test_a_compiled_network_sees_one_batch_size(monkeypatch):
    sizes = []

    class Net(torch.nn.Module):
        def forward(self, x, c):
            sizes.append(len(x))
            return x + c[:, None], c

    def compiled(net, dynamic, options):
        assert dynamic is False, "a second batch size must not make a graph of symbolic size"
        return net

    monkeypatch.setattr(torch, "compile", compiled)
    x, c = torch.randn(4, 3), torch.arange(4.0)
    call, eager = (precision.for_inference(Net(), CPU, compiled=flag) for flag in (True, False))
    for n in (4, 3, 1):
        assert_close(call(x[:n], c[:n].clone()), eager(x[:n], c[:n]), rtol=0, atol=0)
    assert sizes == [4, 4, 4, 3, 4, 1]


@pytest.mark.parametrize("layouts", [("contiguous", "channels_last"), ("channels_last",) * 2])
def test_moments_take_the_layout_of_their_weights(layouts):
    """Else the fused Adam gives other weights, without an error."""

    def make(layout):
        torch.manual_seed(0)
        net = torch.nn.Conv2d(8, 8, 3)
        if layout == "channels_last":
            net.to(memory_format=torch.channels_last)
        return net, torch.optim.Adam(net.parameters(), lr=0.1, fused=True)

    def step(net, optimizer):
        g = torch.Generator().manual_seed(1)
        for p in net.parameters():
            grad = torch.randn(p.shape, generator=g)
            p.grad = torch.empty_like(p).copy_(grad)
        optimizer.step()

    net, optimizer = make(layouts[0])
    step(net, optimizer)
    other, resumed = make(layouts[1])
    other.load_state_dict(net.state_dict())
    checkpoint.load_optimizer(resumed, copy.deepcopy(optimizer.state_dict()), "a file")
    step(net, optimizer)
    step(other, resumed)
    assert_close(other.weight, net.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "words, world_size, suits",
    [
        ("--batch-size 64", 1, True),
        ("--batch-size 128", 1, False),
        ("--batch-size 64", 2, False),  # DDP
        ("--batch-size 64 --sa-k 2", 1, False),
        ("--batch-size 32 --microbatch 16", 1, False),  # gradients of two passes add up
        ("--batch-size 32 --microbatch 32", 1, True),
        ("--batch-size 8 --image-size 256", 1, False),
    ],
)
def test_cuda_graphs_are_for_small_steps_of_one_pass(words, world_size, suits, monkeypatch):
    config = parse("train.py", words)
    assert precision.suits_graphs(config, world_size) is suits
    seen = []
    monkeypatch.setattr(torch, "compile", lambda net, **options: seen.append(options))
    for device in (torch.device("cuda"), CPU):
        precision.for_training(None, device, True, suits)
    mode = dict(mode="reduce-overhead") if suits else {}
    assert seen == [dict(dynamic=False, **mode), dict(dynamic=False)]


# ------------------------------------------------------------------ what the GPU need not wait for


def test_noise_is_drawn_ahead_by_a_thread_and_stays_the_same():
    usual, ahead = (rng.SeededNoise([3, 4], ahead=flag) for flag in (False, True))
    for _ in range(4):
        assert_close(ahead((2, 1, 4)), usual((2, 1, 4)), rtol=0, atol=0)
        assert ahead.next.result().shape == (2, 1, 4), "the next one is made before it is asked for"
    assert usual.next is None
    with emulated("cuda"):
        noise = rng.SeededNoise([3, 4], "cuda")((2, 1, 4))
        assert noise.device.type == "cuda"
    assert_close(noise.held, rng.SeededNoise([3, 4])((2, 1, 4)), rtol=0, atol=0)


def test_the_next_batch_is_made_before_it_is_asked_for():
    made, second = [], threading.Event()

    class Drawn:
        streamed = False

        def __getitem__(self, i):
            made.append(threading.current_thread())
            if i == 3:
                second.set()
            return torch.full((3, 2, 2), i, dtype=torch.uint8)

    with emulated("cuda"):
        stream = image_files.stream(Drawn(), iter([[0, 1], [2, 3], [4, 5]]), 0, 0, "cuda")
        first = next(stream)
        assert second.wait(10), "a thread makes the second batch meanwhile"
        assert first[:, 0, 0, 0].tolist() == [0, 1]
        assert next(stream)[:, 0, 0, 0].tolist() == [2, 3]
        stream.close()
    assert threading.current_thread() not in made


def test_a_snapshot_does_not_change_with_the_training():
    weight, buffer = torch.randn(3, 2), torch.ones(2)
    state = dict(net=dict(w=weight), extra=[buffer, (1, buffer)], step=3)
    with emulated("cuda"):
        state["average"] = weight.to("cuda")
        before = len(waits)
        copied = checkpoint.snapshot(state)
        assert len(waits) == before, "each copy is queued, and all are waited for at once"
        state["average"].zero_()
    kept = weight.clone()
    weight.zero_(), buffer.zero_()
    assert copied["average"].device == CPU and copied["step"] == 3
    assert_close(copied["average"], copied["net"]["w"], rtol=0, atol=0)
    assert_close(copied["net"]["w"], kept, rtol=0, atol=0)
    assert copied["extra"][0].tolist() == copied["extra"][1][1].tolist() == [1, 1]


# ------------------------------------------------------------------ precision


def test_bf16_needs_units_for_it(monkeypatch):
    """PyTorch also accepts bf16 on older GPUs, which emulate it slowly."""
    cuda = torch.device("cuda", 0)
    with emulated("cuda"):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
        assert precision.autocast_dtype("auto", cuda) == torch.bfloat16
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation
        )
        assert precision.autocast_dtype("auto", cuda) is None
        with pytest.raises(ValueError, match="^--precision bf16: this GPU has no units for it"):
            precision.autocast_dtype("bf16", cuda)


@pytest.mark.parametrize(
    "program, words",
    [("sample.py", "run"), ("metrics.py", "fid run"), ("papers.superres enlarge", "run shapes")],
)
def test_tf32_is_a_choice_for_sampling(program, words, monkeypatch, here):
    class Enough(Exception):
        pass

    def init(tf32, *others, **more):
        seen.append(tf32)
        raise Enough

    seen = []
    monkeypatch.setattr(distributed, "init", init)
    for precise in ("tf32", "fp32", "bf16"):
        with pytest.raises(Enough):
            main_of(program, f"{words} --precision {precise}")
    assert seen == [True, False, False]
    assert precision.autocast_dtype("tf32", torch.device("cuda")) is None
    with pytest.raises(ValueError, match="^--precision tf32 is for GPUs"):
        precision.autocast_dtype("tf32", CPU)


def test_the_benchmark_gives_a_gpu_enough_work(monkeypatch):
    """20 µs of work would measure how long a GPU takes to start."""
    rows, images = benchmark.work_sizes(torch.device("cuda"))
    assert 2 * rows**3 > 1e12 and 2 * images * 256**2 * 16**2 * 9 > 7e10  # > 0.1 ms on an H100
    assert benchmark.usual_batch() == 16
    monkeypatch.setattr(benchmark, "DEVICE", torch.device("cuda"))
    assert benchmark.usual_batch() == 128


# ------------------------------------------------------------------ the benchmark


def test_plain_float32_is_float32_on_a_gpu():
    """cuDNN rounds convolutions to 10 bits unless it may not."""
    torch.backends.cudnn.allow_tf32 = True
    runpy.run_path(plain.__file__)
    assert torch.backends.cudnn.allow_tf32 is False


# ------------------------------------------------------------------ memory


class Card(distributed.Distributed):
    """The process of a GPU, for memory.notes."""

    def __init__(self, world_size=1, rank=0):
        super().__init__(rank, world_size, 0, torch.device("cuda", 0))


def notes(words, card, monkeypatch, **process):
    """memory.notes on a card of so many GB, if a step takes 2 GB and 1 more per map."""
    config = parse("train.py", f"{words} --precision fp32")
    monkeypatch.setattr(memory, "step_bytes", lambda make, shape, n, *rest: (2 + n) * 1e9)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, card * 1e9))
    return memory.notes(None, config, Card(**process))


@pytest.mark.parametrize(
    "words, card, advice",
    [
        ("--batch-size 32", 34, None),
        ("--batch-size 32", 33.5, "--microbatch 16 fits"),
        ("--batch-size 32", 13, "--microbatch 11 fits"),  # 3 parts of 11, 11, 10
        ("--batch-size 32 --microbatch 8", 10, None),
        ("--batch-size 32 --microbatch 8", 9, "--microbatch 7 fits"),
        ("--batch-size 32 --sa-k 2", 13, "--microbatch 5 fits"),
        ("--batch-size 32", 2.5, "--recompute takes less"),
        ("--batch-size 32 --recompute", 2.5, "a larger GPU is needed"),
    ],
)
def test_a_step_that_does_not_fit_the_card_gives_a_note(words, card, advice, monkeypatch):
    found = notes(words, card, monkeypatch)
    assert len(found) == bool(advice)
    if advice:
        assert found[0].endswith(f"this GPU has {card:.0f}. If memory runs out: {advice}")


def test_the_note_on_memory_counts_the_images_of_a_process(monkeypatch):
    assert notes("--batch-size 32", 20, monkeypatch, world_size=2) == []
    assert notes("--batch-size 64", 20, monkeypatch, world_size=2)[0].startswith("32 images")
    assert notes("--batch-size 64", 20, monkeypatch, world_size=2, rank=1) == [], "one prints it"


@pytest.mark.slow
def test_train_prints_the_note_on_memory(monkeypatch, here, no_grids, capsys):
    """By the calculation itself, with the network that is trained."""
    words = "--image-size 16 --batch-size 4 --no-compile --precision fp32 --steps 1".split()
    with emulated("cuda"):
        for free, count in ((10**9, 0), (10**7, 1)):
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
            train.main([*words, "--device", "cuda", "--name", f"with-{free}"])
            out = capsys.readouterr().out
            assert out.count("If memory runs out: --recompute takes less") == count


# GB of weights and so on, GB per image: benchmarks/'s calculation for bf16 in eager mode
NEEDS = {"ffhq256": (2.5, 2.60), "ffhq256-large": (13.1, 4.31), "adm256": (10.0, 5.20)}


@pytest.mark.parametrize("preset", NEEDS)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_preset_fits_80_gb(preset, k):
    config = parse("train.py", f"--preset {preset} --sa-k {k}")
    fixed, each = NEEDS[preset]
    assert fixed + each * k * config.microbatch < 78
    assert RECIPES[preset]["batch_size"] % config.microbatch == 0
    assert parse("train.py", f"--preset {preset} --microbatch 5").microbatch == 5


@pytest.mark.slow
def test_the_calculation_has_cudas_autocast_rules():
    """GroupNorm in float32: with the CPU's rules, 16 images of ffhq256 would need 26 GB."""
    one, four = (memory_of("ffhq256", micro, False) / 1e9 for micro in (1, 4))
    fixed, each = NEEDS["ffhq256"]
    assert (four - one) / 3 == pytest.approx(each, rel=0.02)
    assert one == pytest.approx(fixed + each, rel=0.02)
    assert torch.nn.GroupNorm.forward.__name__ == "forward", (
        "the calculation leaves no change behind"
    )


# ------------------------------------------------------------------ the tests themselves


def test_tests_do_not_use_a_gpu():
    if not os.environ.get("CUDA_TESTS"):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
        assert ENV["CUDA_VISIBLE_DEVICES"] == ""


# ------------------------------------------------------------------ the check of a GPU


def check_a_gpu(folder, *flags):
    """What the program prints."""
    words = [sys.executable, "-m", "benchmarks.gpu_check", "--out", folder, *flags]
    return subprocess.run(
        words, cwd=folder, env=ENV, capture_output=True, encoding="utf-8", timeout=1300
    ).stdout


def test_a_bad_flag_of_the_gpu_check_is_one_line():
    done = run_program("-m", "benchmarks.gpu_check", "--budget", "0", cwd=ROOT, status=2)
    assert "error: --budget must be above 0" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_gpu_check_rehearsed_on_a_cpu(tmp_path):
    """Every worker but the compiled sides, GPU and CPU being the same: all must be right."""
    assert "not right: nothing" in check_a_gpu(tmp_path, "--rehearse")
    found = json.loads((tmp_path / "gpu_check.json").read_text(encoding="utf-8"))["results"]
    assert set(gpu_check.WORKERS) <= set(found)
    assert set(gpu_check.PROGRAMS) <= set(found["programs gpu"])
    for side in ("plain fp32 tiny", "eager bf16 tiny", "sample tiny"):
        assert found[side]["images_s"] > 0 and 0 < found[side]["mfu"] < 1
    graphs, calls = (found[f"{name} tiny"]["ms of a call"] for name in ("small steps", "sample"))
    assert len(graphs) == 2 and len(calls) == 4, "two precisions, and noise by two ways"
    pieces = found["pieces"]["ms"]
    assert len(pieces) == 6 and all(v > 0 for v in (pieces | graphs | calls).values())


@pytest.mark.cuda
def test_the_gpu_check(tmp_path):
    """On a GPU: 8 minutes."""
    assert "not right: nothing" in check_a_gpu(tmp_path)
