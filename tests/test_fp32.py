"""Every program in float32, with its own networks and images, each in a separate process.

The other tests use images of 8 pixels, and a machine with bf16 units trains in bf16. A laptop does
neither: a kernel may crash there that no other test reaches.
"""

import numpy as np
import pytest
from conftest import together
from PIL import Image
from programs import find_program, main_of

FP32 = "--precision fp32"
TRAIN = f"{FP32} --steps 2 --batch-size 8"
FEW = "-n 2 --batch-size 2"
COMMANDS = f"""
train.py {TRAIN} --name base --sa-k 2 --etsdm
train.py {TRAIN} --name edm --schedule edm --recompute
papers.heads npr base {TRAIN} --name npr
papers.heads sn base {TRAIN} --name sn --head-size block
papers.autoencoder train {TRAIN} --name coder
papers.latents coder {TRAIN} --name latent
papers.superres train {TRAIN} --name large
papers.alternatives {TRAIN} --name regularized --lipschitz-reg 1 --recompute
papers.covariance base {FEW}
papers.classifier labelled --epochs 1
lipschitz.py base {FEW}
gap.py base --steps 10 {FEW}
sample.py base {FP32} --nfe 2 {FEW}
sample.py base {FP32} --nfe 2 --sampler ddpm --variance analytic {FEW}
sample.py npr {FP32} --nfe 2 --sampler ddpm --variance npr {FEW}
sample.py sn {FP32} --nfe 2 --sampler ddpm --variance sn {FEW}
sample.py latent {FP32} --nfe 2 {FEW}
sample.py edm {FP32} --nfe 3 --sampler heun {FEW}
papers.superres enlarge large shapes {FP32} --nfe 2 {FEW}
"""


@pytest.mark.slow
def test_every_program_runs_in_float32(tmp_path):
    for i in range(20):
        path = tmp_path / "labelled" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((32, 32, 3), 12 * i, np.uint8)).save(path)
    for line in COMMANDS.strip().splitlines():
        program, words = find_program(line.split())
        together(1, tmp_path, main_of, program, words)
