"""Every program in float32, with its own networks and images, each in a process of its own.

The other tests use images of 8 pixels, and a machine with bf16 units trains in bf16. A laptop does
neither: a kernel may crash there that no other test reaches.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TRAIN = "train.py --precision fp32 --steps 2 --batch-size 8 "
FEW = " -n 2 --batch-size 2"
COMMANDS = f"""
{TRAIN} --name base --sa-k 2 --etsdm
{TRAIN} --name npr --head npr --from base
{TRAIN} --name sn --head sn --from base --head-size block
{TRAIN} --name coder --task autoencoder
{TRAIN} --name latent --latent coder
{TRAIN} --name large --task sr
{TRAIN} --name edm --schedule edm --lipschitz-reg 1 --recompute
covariance.py base {FEW}
lipschitz.py base {FEW}
gap.py base --steps 10 {FEW}
classifier.py labelled --epochs 1
sample.py base --precision fp32 --nfe 2 {FEW}
sample.py base --precision fp32 --nfe 2 --sampler ddpm --variance analytic {FEW}
sample.py npr --precision fp32 --nfe 2 --sampler ddpm --variance npr {FEW}
sample.py sn --precision fp32 --nfe 2 --sampler ddpm --variance sn {FEW}
sample.py latent --precision fp32 --nfe 2 {FEW}
sample.py large --precision fp32 --nfe 2 --low-res shapes {FEW}
sample.py edm --precision fp32 --nfe 3 --sampler heun {FEW}
"""


@pytest.mark.slow
def test_every_program_runs_in_float32(tmp_path):
    for i in range(20):
        path = tmp_path / "labelled" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 12 * i, np.uint8)).save(path)
    for line in COMMANDS.strip().splitlines():
        program, *words = line.split()
        done = subprocess.run(
            [sys.executable, str(ROOT / program), *words],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            encoding="utf-8",
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{line}: status {done.returncode}\n{done.stderr}"
