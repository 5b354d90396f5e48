"""Every program of the project: what one types, and the dataclass of its flags.

from programs import PROGRAMS, find_program, main_of, parse
"""

import importlib

import config
import gap
import lipschitz
import metrics
import sample
from benchmarks.__main__ import BenchmarkConfig
from benchmarks.gpu_check import GpuCheckConfig
from papers import (
    alternatives,
    autoencoder,
    checkpoints,
    classifier,
    covariance,
    experiments,
    figures,
    heads,
    late,
    latents,
    shapes_check,
    superres,
)
from support.cli import parse_into

PROGRAMS = {
    "train.py": config.Config,
    "sample.py": sample.SampleConfig,
    "metrics.py": metrics.MetricsConfig,
    "lipschitz.py": lipschitz.LipschitzConfig,
    "gap.py": gap.GapConfig,
    "papers.alternatives": alternatives.AlternativeConfig,
    "papers.autoencoder train": autoencoder.AutoencoderConfig,
    "papers.autoencoder reconstruct": autoencoder.ReconstructConfig,
    "papers.checkpoints": checkpoints.ImportConfig,
    "papers.classifier": classifier.ClassifierConfig,
    "papers.covariance": covariance.CovarianceConfig,
    "papers.experiments": experiments.ExperimentsConfig,
    "papers.figures": figures.FiguresConfig,
    "papers.heads": heads.HeadConfig,
    "papers.late": late.LateConfig,
    "papers.latents": latents.LatentConfig,
    "papers.shapes_check": shapes_check.CheckConfig,
    "papers.superres train": superres.SuperResConfig,
    "papers.superres enlarge": superres.EnlargeConfig,
    "papers.superres colour": superres.ColourConfig,
    "benchmarks": BenchmarkConfig,
    "benchmarks.gpu_check": GpuCheckConfig,
}
# Their parsers open the run or the file that they start from: it must exist.
OPEN_A_RUN = {"papers.heads", "papers.latents", "papers.checkpoints"}


def parse(program, words):
    """The config of a program, from the words behind its name."""
    return parse_into(PROGRAMS[program], words.split() if isinstance(words, str) else words)


def main_of(program, words):
    """Run a program in this process."""
    module, *command = program.removesuffix(".py").split()
    module = {"benchmarks": "benchmarks.__main__"}.get(module, module)
    words = words.split() if isinstance(words, str) else words
    return importlib.import_module(module).main([*command, *words])


def find_program(words):
    """The words of a command -> (program, the words behind its name), or None."""
    for i in range(len(words)):
        for length in (2, 1):  # "papers.superres train" before "papers.superres"
            if (name := " ".join(words[i : i + length])) in PROGRAMS:
                return name, words[i + length :]
    return None
