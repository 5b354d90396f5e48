"""The one place where the golden numbers touch the project: tests/golden_cases.py says what is
computed, this file by which functions. When these move or change their names, this file is
rewritten and tests/data/golden.json stays as it is.

float32 on the CPU. A run is a namespace: config, state (train.TrainState) and images.
"""

import copy
import io
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import denoiser
import gap
import lipschitz
import metrics
import samplers
import schedules
import train
from papers import alternatives, autoencoder, covariance, heads, latents
from support import checkpoint, distributed

# ------------------------------------------------------------------ training

OPTIMIZER = dict(optimizer="adam", lr_decay="none", images=10**6, adam_eps=1e-8)


class CaseConfig(SimpleNamespace):
    """The part of config.Config that objectives and train_step use, from a case's settings."""

    def settings(self):
        return self.all

    def size(self):
        return self.all["autoencoder"]


def begin(case, base=None, saved=None):
    """A run at its first step, or at a checkpoint's. base: the run that the case builds on."""
    s = {k: v for k, v in case.items() if k not in ("network", "base", "base_steps")}
    s["autoencoder" if s["task"] == "autoencoder" else "unet"] = case["network"]
    s["latent"] = None
    make = train.DiffusionObjective
    if s["task"] == "autoencoder":
        make = autoencoder.AutoencoderObjective
    elif s["head"]:
        make = heads.VarianceHeadObjective
    elif base:
        make = latents.LatentObjective
    elif s["remap"] or s["lipschitz_reg"] or s["sa_reuse"]:
        make = alternatives.AlternativeObjective
    dataset = data.load(s["data"], s["image_size"], s["channels"], s["seed"])
    torch.manual_seed(s["seed"])
    with tempfile.TemporaryDirectory() as folder:
        if base:
            s["trunk" if s["head"] else "latent"] = folder
            if saved is None:
                checkpoint.save_checkpoint(Path(folder) / "checkpoint.pt", contents(base))
        config = CaseConfig(**s, **OPTIMIZER, all=s)
        state = train.TrainState(make(config, dataset, saved), config)
    if saved:
        state.load_state_dict(saved, "golden")
    state.net.train()
    return SimpleNamespace(config=config, state=state, dataset=dataset)


def contents(run):
    data = dict(processes=1, dataset=len(run.dataset), digest=run.dataset.digest)
    return dict(settings=run.config.settings(), **data, **run.state.state_dict())


def save(run):
    """A checkpoint, through a file and back."""
    file = io.BytesIO()
    torch.save(contents(run), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def steps(run, n):
    """n steps -> [(loss, *terms, gradient norm)]."""
    config, state = run.config, run.state
    dist = distributed.Distributed(0, 1, 0, torch.device("cpu"))
    size = config.batch_size
    stream = data.batches(run.dataset, size, state.step * size, config.seed)
    return [train.train_step(state, state.net, next(stream), config, dist, None) for _ in range(n)]


def names(run):
    """What the numbers of a step are called."""
    return ["loss", *run.state.objective.loss_names, "grad_norm"]


def weights(run):
    """(the weights, their average), each one float64 vector."""
    vectors = []
    for net in (run.state.net, run.state.ema):
        # The bias of attention's keys has no effect: its gradient is rounding, and Adam makes
        # whole steps of that.
        kept = [v for k, v in net.state_dict().items() if not k.endswith("qkv.bias")]
        vectors.append(torch.cat([v.double().flatten() for v in kept]))
    return vectors


# ------------------------------------------------------------------ sampling


def opened(run):
    """The denoiser of a run's averaged weights."""
    d = denoiser.build_denoiser(run.config.settings(), run.state.objective.extra_state)
    return d.replace(net=run.state.ema)


def photos(n=8):
    """Images (n, 3, 16, 16) in [-1, 1] that no run has seen."""
    shapes = data.load("shapes", 16, 3, seed=77)
    return data.to_float(torch.stack([shapes[i] for i in range(n)]))


def draw(run, case, n, gamma=None):
    """n images (n, C, H, W) of seeds 0 to n - 1. gamma: {t: Γ}, for the analytic variance."""
    d = opened(run)
    arguments = {k: v for k, v in case.items() if k != "run"}
    kind = case["variance"]
    eta = 1.0 if case["sampler"] == "ddpm" else case["eta"]
    if kind == "analytic":
        table = torch.zeros(d.schedule.T + 1, dtype=torch.float64)
        table[list(gamma)] = torch.tensor(list(gamma.values()), dtype=torch.float64)
        kind = covariance.step_variance(d, covariance.variance_from_gamma(table), eta)
    elif kind in ("npr", "sn"):
        kind = covariance.step_variance(d, covariance.variance_from_head(d, kind), eta)
    if isinstance(case["spacing"], list):
        arguments["spacing"] = torch.tensor(case["spacing"])
    d = d.replace(conditioning=d.space.conditioning(photos(n)))  # only super-resolution has one
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # heun must spend all of nfe
        x = samplers.sample_from_seeds(d, range(n), **{**arguments, "variance": kind})
    return d.decode(x)


# ------------------------------------------------------------------ measurements


frechet_distance = metrics.frechet_distance
inception_score = metrics.inception_score
psnr = metrics.psnr


def lipschitz_constants(run, ts, dt):
    """In float64: the differences are small."""
    d, x0 = opened(run), photos().double()
    d = d.replace(net=copy.deepcopy(d.net).double())
    return lipschitz.lipschitz_constants(d, x0, ts, dt, seed=0).tolist()


def displacements(run, scales, t):
    return lipschitz.displacements(opened(run), photos(), scales, t, seed=0).mean(1).tolist()


def gap_weights(name, continuous):
    return gap.gap_weights(schedules.make_schedule(name, continuous=continuous)).tolist()


def gaps(run, points, eta):
    """[[t, mean, systematic, low, high, norm]] along a run of DDPM (eta = 1) or DDIM (0)."""
    d, x0 = opened(run), photos()
    times = schedules.time_grid(d.schedule, points)
    noise, counts = samplers.SeededNoise(range(len(x0))), gap.bootstrap_counts(len(x0))
    rows = []
    for t, G, _ in gap.gap_along_run(d, x0, noise, times, eta):
        found = gap.summarize(gap.inner_products(G), counts)
        rows.append([t, *(float(found[k]) for k in ("mean", "systematic", "low", "high", "norm"))])
    return rows


def gamma(run, ts):
    """{t: Γ}, the mean square of the predicted noise."""
    values = covariance.gamma(opened(run), photos(), seed=0, ts=ts)
    return {t: values[t].item() for t in ts}


# ------------------------------------------------------------------ the kept run


def samples_of(folder, n):
    """n samples by DDIM in 10 calls, of a run folder."""
    return samplers.sample_from_seeds(denoiser.load_run(folder), range(n), nfe=10)
