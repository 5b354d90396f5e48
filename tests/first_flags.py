"""Where every flag of the first version is today: tests/data/flags.json holds them as they were.

from first_flags import today, LOST_VALUES

A flag keeps its name and its program's heir, unless MOVED or LOST says otherwise.
"""

HEIR = {
    "train": "train.py",
    "sample": "sample.py",
    "metrics": "metrics.py",
    "lipschitz": "lipschitz.py",
    "gap": "gap.py",
    "covariance": "papers.covariance",
    "classifier": "papers.classifier",
    "benchmark": "benchmarks",
    "experiments": "papers.experiments",
    "schedules": "papers.figures",
}
# (program, flag) of the first version: (program, flag) of today. No dashes: a positional argument.
MOVED = {
    ("train", "--factor"): ("papers.superres train", "--factor"),
    ("train", "--latent"): ("papers.latents", "latent"),
    ("train", "--halvings"): ("papers.autoencoder train", "--downsamplings"),
    ("train", "--latent-channels"): ("papers.autoencoder train", "--latent-channels"),
    ("train", "--kl-weight"): ("papers.autoencoder train", "--kl-weight"),
    ("train", "--head"): ("papers.heads", "head"),
    ("train", "--from"): ("papers.heads", "trunk"),
    ("train", "--head-size"): ("papers.heads", "--head-size"),
    ("train", "--remap"): ("papers.alternatives", "--remap"),
    ("train", "--train-times"): ("papers.alternatives", "--train-times"),  # remap; others: train.py
    ("train", "--sa-reuse"): ("papers.alternatives", "--sa-reuse"),
    ("train", "--lipschitz-reg"): ("papers.alternatives", "--lipschitz-reg"),
    ("gap", "--illustrate"): ("papers.figures", "figure"),  # illustration
    ("sample", "--low-res"): ("papers.superres enlarge", "low_res"),
    ("sample", "--guided-diffusion"): ("papers.checkpoints", "file"),
    ("sample", "--schedule"): ("papers.checkpoints", "--schedule"),
}
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
