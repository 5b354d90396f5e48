"""Make tests/data/golden.json: what the first version computed.

    python tests/make_golden.py            # writes golden.json

tests/test_golden.py demands these numbers, so a new file is a new promise: write one only if the
numbers are meant to change, and say why in the commit.
"""

import functools
import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":  # pytest has conftest.py for this
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(HERE.parent), str(HERE)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import golden_adapter as adapter  # noqa: E402
import golden_cases as cases  # noqa: E402
from fill import fill  # noqa: E402

PIXELS = 16  # of each sample
FIRST_VERSION = HERE / "data" / "first-version"


@functools.cache
def trained(name, steps=cases.STEPS):
    """(the run of a case after so many steps, the numbers of each step)."""
    case = cases.TRAINING[name]
    run = adapter.begin(case, base_of(case))
    return run, adapter.steps(run, steps)


def base_of(case):
    return trained(case["base"], case["base_steps"])[0] if case["base"] else None


def training(name):
    """{loss, each of its terms, grad_norm: one number per step; weights, ema: some sums and
    values}."""
    run, rows = trained(name)
    columns = zip(adapter.names(run), zip(*rows, strict=True), strict=True)
    sums = zip(("weights", "ema"), map(checksums, adapter.weights(run)), strict=True)
    return {key: list(values) for key, values in (*columns, *sums)}


def checksums(w):
    """A vector -> [its sum, sum of magnitudes and sum of squares, and 20 of its values]."""
    places = (fill("weights", (20,)) * len(w)).astype(int).tolist()
    return [w.sum().item(), w.abs().sum().item(), w.square().sum().item(), *w[places].tolist()]


def sampling(name):
    """{mean, std: of each image; pixels: 16 of each}."""
    case = cases.SAMPLING[name]
    gamma = gammas() if case["variance"] == "analytic" else None
    x = adapter.draw(trained(case["run"])[0], case, cases.SAMPLES, gamma).double().flatten(1)
    places = (fill("pixels", (PIXELS,)) * x.shape[1]).astype(int).tolist()
    return dict(mean=x.mean(1).tolist(), std=x.std(1).tolist(), pixels=x[:, places].tolist())


@functools.cache
def gammas():
    return adapter.gamma(trained("plain")[0], cases.GAMMA_TIMES)


def scores():
    """Fréchet distances, Inception Score and PSNR of images and logits made by formula."""
    images = [torch.tensor(256 * fill(n, (40, 3, 8, 8))).to(torch.uint8) for n in ("one", "two")]
    images[1] = images[1] // 2 + images[0] // 4  # so that they resemble each other

    def features(u8, n, d):
        mixed = fill("features", (192, d)) - 0.5
        return np.tanh((u8[:n].double().flatten(1).numpy() / 127.5 - 1) @ mixed)

    distances = []
    for n, d in ((40, 24), (12, 24), (40, 1)):  # full rank, too few images, one feature
        stats = []
        for u8 in images:
            f = features(u8, n, d)
            stats += [f.mean(0), np.atleast_2d(np.cov(f, rowvar=False))]
        distances.append(adapter.frechet_distance(*stats))
    logits = torch.tensor(8 * fill("logits", (50, 10)))
    return dict(
        frechet_distance=distances,
        inception_score=[*adapter.inception_score(logits), *adapter.inception_score(logits / 4)],
        psnr=adapter.psnr(*(u8[:6] for u8 in images)).tolist(),
    )


def measurements():
    """Both papers' diagnoses of the trained runs."""
    found = {}
    for name, case in cases.LIPSCHITZ.items():
        run = trained(case["run"])[0]
        found[f"lipschitz {name}"] = adapter.lipschitz_constants(run, case["ts"], case["dt"])
    case = cases.PERTURBED
    run = trained(case["run"])[0]
    found["displacements"] = adapter.displacements(run, case["scales"], case["t"])
    for name, continuous in cases.WEIGHT_SCHEDULES:
        tau = adapter.gap_weights(name, continuous)
        found[f"gap weights {name}"] = [sum(tau), *tau[:5], *tau[5::199]]
    for name, case in cases.GAPS.items():
        run = trained(case["run"])[0]
        found[f"gap {name}"] = adapter.gaps(run, case["points"], case["eta"])
    found["gamma"] = list(gammas().values())
    return found


def numbers():
    return dict(
        training={name: training(name) for name in cases.TRAINING},
        sampling={name: sampling(name) for name in cases.SAMPLING},
        scores=scores(),
        measurements=measurements(),
    )


def rounded(value):
    """Nine digits: float32 has seven."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.9g}")


def write_numbers():
    lines = []
    for section, found in rounded(numbers()).items():
        inside = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()]
        lines.append(f' "{section}": {{\n' + ",\n".join(inside) + "\n }")
    path = HERE / "data" / "golden.json"
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    write_numbers()
