"""Where every flag of the first version is today: tests/data/flags.json holds them as they were.

from first_flags import today, LOST_VALUES

A flag keeps its name and its program's heir, unless MOVED or LOST says otherwise.
"""

import re

HEIR = {p: f"{p}.py" for p in ("train", "sample", "metrics", "lipschitz", "gap")}
HEIR |= {p: f"papers.{p}" for p in ("covariance", "classifier", "experiments")}
HEIR |= dict(benchmark="benchmarks", schedules="papers.figures")
# A program of the first version, its flag, the program of today, and, if it is not the same, the
# flag of today. No dashes: a positional argument.
TABLE = """
train  --factor            papers.superres train
train  --latent            papers.latents  latent
train  --halvings          papers.autoencoder train  --downsamplings
train  --latent-channels   papers.autoencoder train
train  --kl-weight         papers.autoencoder train
train  --head              papers.heads  head
train  --from              papers.heads  trunk
train  --head-size         papers.heads
train  --remap             papers.alternatives
train  --train-times       papers.alternatives
train  --sa-reuse          papers.alternatives
train  --lipschitz-reg     papers.alternatives
gap  --illustrate          papers.figures  figure
sample  --low-res          papers.superres enlarge  low_res
sample  --guided-diffusion  papers.checkpoints  file
sample  --schedule         papers.checkpoints
"""
ROWS = [re.split("  +", row) for row in TABLE.strip().splitlines()]
MOVED = {(row[0], row[1]): (row[2], row[-1] if len(row) > 3 else row[1]) for row in ROWS}
LOST = {
    ("sample", "--preset"): "papers.checkpoints works the sizes out from the keys",
    ("train", "--task"): "each task is a program: papers.superres train, papers.autoencoder train",
}
# (program, flag, value): why there is no such value any more.
LOST_VALUES = {
    ("benchmark", "parts", "start"): "a command's start is not worth a part; its number is in docs",
    ("benchmark", "parts", "data"): "waiting for images is not worth a part; its number is in docs",
    ("metrics", "--features", "TorchScript"): "torch.jit is deprecated: torch.export's .pt2 stays",
    ("metrics", "images", "an autoencoder"): "papers.autoencoder reconstruct, then psnr of folders",
}


def today(program, flag):
    """(program, flag) of the first version -> those of today, or None if LOST has the reason."""
    if (program, flag) in LOST:
        return None
    return MOVED.get((program, flag), (HEIR[program], flag))
