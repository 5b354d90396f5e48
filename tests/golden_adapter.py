"""The one place where the golden numbers touch the project: tests/golden_cases.py says what is
computed, this file by which functions. When these move or change their names, this file is
rewritten and tests/data/golden.json stays as it is.

float32 on the CPU. A run is a namespace: settings (as in golden_cases), model and images.
"""

import argparse
import copy
import importlib
import io
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import covariance
import data
import denoiser
import files
import gap
import lipschitz
import metrics
import runtime
import samplers
import schedules
import train
import unet

PROGRAMS = (
    "train sample metrics lipschitz gap covariance classifier benchmark experiments schedules"
).split()


# ------------------------------------------------------------------ training


def begin(case, base=None, checkpoint=None):
    """A run at its first step, or at a checkpoint's. base: the run that the case builds on."""
    s = {k: v for k, v in case.items() if k not in ("network", "base", "base_steps")}
    s["autoencoder" if s["task"] == "autoencoder" else "unet"] = case["network"]
    s.update({"latent": None, "from": None, "name": "golden"})
    dataset = data.load(s["data"], s["image_size"], s["channels"], s["seed"])
    with tempfile.TemporaryDirectory() as folder:
        if base:
            s["from" if s["head"] else "latent"] = folder
            if checkpoint is None:
                files.save_checkpoint(Path(folder) / "checkpoint.pt", contents(base))
        model = train.Model(s, torch.device("cpu"), checkpoint, dataset)
    model.net.train()
    if s["head"]:  # else torch crashes: GroupNorm's backward, channels last, frozen trunk
        model.net.second_head.register_forward_pre_hook(
            lambda layer, inputs: (inputs[0].contiguous(), *inputs[1:])
        )
    return SimpleNamespace(settings=s, model=model, dataset=dataset)


def contents(run):
    return dict(settings=run.settings, processes=1, dataset=len(run.dataset), **run.model.state())


def save(run):
    """A checkpoint, through a file and back."""
    file = io.BytesIO()
    torch.save(contents(run), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def steps(run, n):
    """n steps -> [(loss, *terms, gradient norm)]."""
    s, model = run.settings, run.model
    process = runtime.Processes(0, 1, 0, torch.device("cpu"))
    stream = data.batches(run.dataset, s["batch_size"], model.step * s["batch_size"], s["seed"])
    return [train.one_step(model, model.net, s, process, next(stream), None) for _ in range(n)]


def names(run):
    """What the numbers of a step are called."""
    return ["loss", *run.model.task.columns, "grad_norm"]


def weights(run):
    """(the weights, their average), each one float64 vector."""
    vectors = []
    for net in (run.model.net, run.model.ema):
        # The bias of attention's keys has no effect: its gradient is rounding, and Adam makes
        # whole steps of that.
        kept = [v for k, v in net.state_dict().items() if not k.endswith("qkv.bias")]
        vectors.append(torch.cat([v.double().flatten() for v in kept]))
    return vectors


# ------------------------------------------------------------------ sampling


def opened(run):
    """The denoiser of a run's averaged weights."""
    first_stage = run.model.task.extra.get("first_stage")
    return denoiser.from_settings(run.settings, run.model.ema, first_stage)


def photos(n=8):
    """Images (n, 3, 16, 16) in [-1, 1] that no run has seen."""
    shapes = data.load("shapes", 16, 3, seed=77)
    return data.to_float(torch.stack([shapes[i] for i in range(n)]))


def draw(run, case, n, gamma=None):
    """n images (n, C, H, W) of seeds 0 to n - 1. gamma: {t: Γ}, for the analytic variance."""
    d = opened(run)
    kind = case["variance"]
    eta = 1.0 if case["sampler"] == "ddpm" else case["eta"]
    if kind == "analytic":
        table = torch.zeros(d.schedule.T + 1, dtype=torch.float64)
        table[list(gamma)] = torch.tensor(list(gamma.values()), dtype=torch.float64)
        kind = covariance.of_step(d, covariance.of_gamma(table), eta)
    elif kind in ("npr", "sn"):
        kind = covariance.of_head(d, kind, eta)
    spacing = case["spacing"]
    arguments = dict(
        sampler=case["sampler"],
        nfe=case["nfe"],
        spacing=torch.tensor(spacing) if isinstance(spacing, list) else spacing,
        eta=case["eta"],
        order=case["order"],
        t_end=case["t_end"],
        t_start=case["t_start"],
        final_denoise=case["denoise_to_zero"],
        clip=case["clip"],
        variance=kind,
        churn=case["s_churn"],
        churn_range=(case["s_min"], case["s_max"]),
        churn_noise=case["s_noise"],
    )
    given = d.space.given(photos(n))  # None, except for super-resolution
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # heun must spend all of nfe
        x = samplers.from_seeds(d.but(given=given), range(n), d.space.shape, **arguments)
    return d.space.decode(x)


# ------------------------------------------------------------------ measurements


def frechet_distance(mu1, sigma1, mu2, sigma2):
    return metrics.frechet_distance(mu1, sigma1, mu2, sigma2)


def inception_score(logits):
    return metrics.inception_score(logits)


def psnr(a, b):
    return metrics.psnr(a, b).tolist()


def lipschitz_constants(run, ts, dt):
    """In float64: the differences are small."""
    d, x0 = opened(run), photos().double()
    d = d.but(net=copy.deepcopy(d.net).double())
    return lipschitz.lipschitz_constants(d, x0, ts, dt, seed=0).tolist()


def displacements(run, scales, t):
    return lipschitz.displacements(opened(run), photos(), scales, t, seed=0).mean(1).tolist()


def gap_weights(name, continuous):
    return gap.gap_weights(schedules.make_schedule(name, continuous=continuous)).tolist()


def gaps(run, points, eta):
    """[[t, mean, systematic, low, high, norm]] along a run of DDPM (eta = 1) or DDIM (0)."""
    d, x0 = opened(run), photos()
    times = schedules.time_grid(d.schedule, points)
    noise, drawn = samplers.SeededNoise(range(len(x0))), gap.resamples(len(x0))
    rows = []
    for t, G, _ in gap.gap_along_run(d, x0, noise, times, eta):
        found = gap.summarize(gap.gram(G), drawn)
        rows.append([t, *(float(found[k]) for k in ("mean", "systematic", "low", "high", "norm"))])
    return rows


def gamma(run, ts):
    """{t: Γ}, the mean square of the predicted noise."""
    values = covariance.gamma(opened(run), photos(), seed=0, ts=ts)
    return {t: values[t].item() for t in ts}


# ------------------------------------------------------------------ flags


class Found(Exception):
    """Carries a parser out of the program that made it."""


def flags(program):
    """[{flags, type, default, choices, nargs}] of a program's command line."""

    def catch(parser, argv=None):
        raise Found(parser)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, name, catch)
        with pytest.raises(Found) as found:
            importlib.import_module(program).main([])
    (parser,) = found.value.args
    return [flag(action) for action in parser._actions if action.dest != "help"]


def flag(action):
    kind = type(action).__name__.strip("_").removesuffix("Action")
    kind = {"Store": getattr(action.type, "__name__", "str"), "StoreTrue": "flag"}.get(kind, kind)
    default = action.default
    if not isinstance(default, str | int | float | bool | None):
        default = list(default) if isinstance(default, list | tuple) else str(default)
    return dict(
        flags=action.option_strings or [action.dest],
        type=kind,
        default=default,
        choices=None if action.choices is None else list(action.choices),
        nargs=action.nargs,
    )


# ------------------------------------------------------------------ the kept run


def make_run(flags, network):
    """runs/NAME in the current folder, by train.py with a preset of this size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(unet.PRESETS, "tiny", network)
        train.main(flags)


def samples_of(folder, n):
    """n samples by DDIM in 10 calls, of a run folder."""
    d = denoiser.load_run(folder)
    return samplers.from_seeds(d, range(n), d.space.shape, nfe=10)
