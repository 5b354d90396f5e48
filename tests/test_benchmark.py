"""benchmarks/ measures what it promises, and its plain forms give what the fast ones give."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from conftest import ENV, ROOT, run_program
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import losses
import schedules
import unet
from benchmarks import __main__ as benchmark
from benchmarks import plain, worker
from denoiser import Denoiser
from support import memory
from support.cli import parse_into


@pytest.fixture
def plainly():
    """plain.build_network changes unet for its process: here, for a test."""
    before = unet.Attention.forward, unet.lay_out, unet.GroupNorm
    yield
    unet.Attention.forward, unet.lay_out, unet.GroupNorm = before


def test_the_plain_network_is_ours(plainly):
    torch.manual_seed(0)
    ours = unet.UNet(**unet.PRESETS["tiny"]).eval()
    for p in ours.parameters():
        p.data.normal_(0, 0.1)
    x, c = torch.randn(2, 3, 32, 32), torch.tensor([3.0, 700.0])
    expected = ours(x, c)
    net = plain.build_network("tiny").eval()
    net.load_state_dict(ours.state_dict())
    assert_close(net(x, c), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_the_plain_step_has_the_loss_of_sa(k, plainly, monkeypatch):
    """k passes, as in the authors' program, and our one pass: the same number from the same
    images and noises. The network answers at once, and has one weight that Adam moves."""

    class Net(torch.nn.Linear):
        def forward(self, x, c):
            return self.weight * x + c[:, None, None, None] / 1000

    net, drawn = Net(1, 1, bias=False), []
    monkeypatch.setattr(plain, "build_network", lambda *_: net)
    for name in ("randn_like", "randint"):
        real = getattr(torch, name)
        monkeypatch.setattr(
            torch, name, lambda *a, real=real, **w: (drawn.append(real(*a, **w)), drawn[-1])[1]
        )
    work = plain.training("tiny", 4, k)
    images, before = drawn.pop(), net.weight.item()
    loss = work()
    monkeypatch.undo()
    t, *noises = drawn
    after, net.weight.data = net.weight.item(), torch.tensor([[before]])
    denoiser = Denoiser(net, schedules.make_schedule("linear"))
    simple, sa = losses.sa_loss(denoiser, images.float() / 127.5 - 1, t, torch.stack(noises))
    assert loss == pytest.approx((simple + (sa if k > 1 else 0)).mean().item(), rel=1e-4)
    assert after != before


def test_sides_take_turns_and_medians_count():
    class Clock:
        def __init__(self, times):
            self.times = iter(times)

        def time(self):
            order.append(self)
            return next(self.times)

        def end(self):
            order.append("end")

    order = []
    a, b = Clock([9, 1, 5, 2]), Clock([9, 3, 4, 90])
    assert worker.compare({"a": a, "b": b}, rounds=3, warm=1) == {"a": 2, "b": 4}
    assert order == [a, b] * 4 + ["end", "end"]


WORKS = """
import os, sys, time

def nap(seconds):
    return lambda: time.sleep(seconds)

def settings(expected):
    assert ("GOMP_SPINCOUNT" in os.environ) == expected
    assert hasattr(sys.modules["support"], "os") == expected  # its __init__.py has run
    from support import inception  # plain or not, its modules are there
    print("no answer")
    return lambda: None

def vanish():
    os._exit(0)
"""


@pytest.fixture
def works(here, monkeypatch):
    Path("works.py").write_text(WORKS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(here))


@pytest.mark.slow
def test_a_side_is_a_process_that_is_timed_or_says_what_failed(works):
    side = worker.Side("works", "nap", 0.05, threads=1)
    assert 0.05 <= side.time() < 5 and side.process.poll() is None
    side.end()
    assert side.process.returncode == 0
    with pytest.raises(ValueError, match="one side of the comparison failed: .*nowhere"):
        worker.Side("benchmarks.plain", "training", "nowhere", 4)
    with pytest.raises(ValueError, match="its process ended, perhaps out of memory"):
        worker.Side("works", "vanish")
    for tuned in (True, False):  # the plain side has no settings of ours
        side = worker.Side("works", "settings", tuned, tuned=tuned)
        assert side.time() >= 0
        side.end()


def test_the_peak_is_what_lived_at_once():
    with FakeTensorMode(), memory.Peak() as peak:
        a = torch.empty(1000)  # 4,000 bytes
        b = a + 1
        del a
        c = b.double()  # 8,000
        view = c[10:]  # nothing new
        del b, c
    assert peak.most == 12_000 and peak.now == 8_000 and len(view) == 990


@pytest.mark.slow
def test_memory_by_calculation():
    parameters = 1_147_276
    usual, less = (benchmark.memory_of("tiny", 16, flag) for flag in (False, True))
    assert 20 * parameters < less < usual - 2e6
    double = benchmark.memory_of("tiny", 32, False)
    assert 1.5 < (double - 16 * parameters) / (usual - 16 * parameters) < 2.1
    assert benchmark.memory_of("ffhq256-large", 1, False) < 40e9, "the largest preset"


def test_operations_of_a_step():
    """Forward 1, backward 2 (less the first layer's input gradient), by the layers' shapes."""
    net = unet.UNet(**unet.PRESETS["tiny"])
    total = 0

    def count(layer, inputs, out):
        nonlocal total
        if isinstance(layer, torch.nn.Conv2d):
            total += 2 * out.numel() * layer.weight[0].numel()

    for layer in net.modules():
        layer.register_forward_hook(count)
    net(torch.randn(2, 3, 32, 32), torch.ones(2))
    assert benchmark.flops("tiny", 2) == pytest.approx(3 * total, rel=0.05)


def results(words):
    """The program's results, as its JSON file has them."""
    benchmark.main([*words.split(), "--json", "out.json"])
    return json.loads(Path("out.json").read_text(encoding="utf-8"))


@pytest.fixture
def unmeasured(here, monkeypatch):
    """In an empty folder, and no time spent on the machine's rates."""
    monkeypatch.setattr(benchmark, "machine", lambda: {})


@pytest.mark.slow
def test_a_part_prints_a_table_and_writes_json(unmeasured, capsys):
    rows = results("memory --preset tiny")["rows"]
    assert [r["microbatch"] for r in rows] == [1, 4, 16]
    assert all(r["GB_recompute"] < r["GB"] for r in rows)
    assert "with --recompute" in capsys.readouterr().out


def test_all_means_every_part():
    assert parse_into(benchmark.BenchmarkConfig, ["all"]).parts == tuple(benchmark.PARTS)


@pytest.mark.slow
def test_a_run_of_two_processes_is_measured(tmp_path):
    flags = ["--image-size", "8", "--batch-size", "4", "--steps", "20"]
    log = benchmark.trained(tmp_path, "two", *flags, processes=2, threads=1)
    assert log["step"].tolist() == [10, 20] and (log["images_per_s"] > 0).all()


class Here:
    """A side in this process: starting one takes longer than its work."""

    def __init__(self, make, *arguments, threads=None):
        self.work = getattr(benchmark, make)(*json.loads(json.dumps(arguments)))

    def time(self):
        began = time.perf_counter()
        self.work()
        return time.perf_counter() - began

    def end(self):
        pass


@pytest.mark.slow
def test_comparisons_run_at_their_smallest(here, monkeypatch):
    """The plain sides in processes, which they change."""
    monkeypatch.setattr(benchmark, "our_side", Here)
    found = results("train sa sample --preset tiny --batch-size 4 --rounds 1")
    assert {r["part"] for r in found["rows"]} == {"train", "sa", "sample"}
    assert all(r["ratio"] is None or r["ratio"] > 0 for r in found["rows"])
    assert found["machine"]["product float32"] > 0


@pytest.mark.slow
def test_bf16_and_float32_runs_are_compared(unmeasured, monkeypatch):
    real, small = benchmark.trained, ("--image-size", "8", "--batch-size", "4")
    monkeypatch.setattr(benchmark, "trained", lambda *words: real(*words, *small))
    row = results("precision --steps 200 --data shapes")["rows"][0]
    assert row["grey_levels"] < 2 and Path("precision.png").exists()
    for seed in (0, 1):
        losses = [row["losses"][f"{kind} {seed}"] for kind in ("bf16", "fp32")]
        assert losses[0] == pytest.approx(losses[1], rel=0.1)


TWO_SIDES = """
from benchmarks import __main__ as benchmark, plain
from benchmarks.worker import Side, compare
from support.programs import run_main

def main():
    assert plain.PEER
    compare(dict(lean=Side("benchmarks.plain", "lean_ddim", 1, 2),
                 theirs=Side("benchmarks.plain", "peer_sampler", 1, 2, "DDIMScheduler", {})))

run_main(main)
"""


@pytest.mark.slow
def test_a_peer_that_fails_to_import_is_one_line(here, monkeypatch):
    """And the processes of the sides before it end without a word."""
    Path("diffusers.py").write_text("from numpy import no_such_name", encoding="utf-8")
    monkeypatch.setitem(ENV, "PYTHONPATH", os.pathsep.join([str(here), str(ROOT)]))
    done = run_program("-c", TWO_SIDES, cwd=here, status=2)
    (line,) = done.stderr.strip().splitlines()
    assert "diffusers fails to import (ImportError: cannot import name 'no_such_name'" in line
