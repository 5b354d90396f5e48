r"""Make pictures with a trained run.

    python sample.py                                     # newest run -> numbered PNGs and a grid
    python sample.py NAME --sampler dpm-solver --nfe 20 --spacing logsnr
    torchrun --nproc_per_node 8 sample.py NAME -n 50000 --npz

Everything about the model (size, schedule, prediction, time input) comes from the checkpoint. Image
i is a function of (seed, i) alone: all its noise comes from its own generator. So it is the same
picture (within one grey level) for any batch size and any number of processes, and an interrupted
call can simply be repeated.

Not here: the samplers and their flags (samplers.py), scores (metrics.py), super-resolution
(papers/superres.py), networks of other programs (papers/checkpoints.py).

C, H, W as the run was trained; pixels are written as uint8 = round((x + 1) 127.5).
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from torch import Tensor

import data
import samplers
from denoiser import Denoiser, load_run
from support import distributed, precision, rng
from support.checkpoint import find_checkpoint, weights_hash
from support.cli import flag, parse_into
from support.image_folder import ImageFolder, check_image_flags
from support.programs import run_main


@dataclass
class SampleConfig(samplers.SamplerConfig):  # --sampler, --nfe, --spacing, --eta, ...
    run: str | None = flag(None, "a name under runs/, a run folder, or a checkpoint (default: the "
                           "newest run)", positional="RUN", group="images")
    # -n too, since torchrun takes --num as an abbreviation of its --numa-binding
    num: int = flag(64, "number of images; under torchrun write -n", short="-n")
    batch_size: int = flag(64, "images at a time, per process")
    seed: int = flag(0, "image i is a function of (seed, i)")
    out: Path | None = flag(None, "folder to write to", shown="generated/SAMPLER-NFE-STEP-FLAGS "
                            "in the run's folder")
    npz: bool = flag(False, "also pack the images into one .npz, arr_0 (N, H, W, C)")

    prog: ClassVar[str] = "sample.py"
    usage: ClassVar[str] = "python sample.py [RUN] [flags]"
    description: ClassVar[str] = "Make pictures with a trained run: numbered PNGs and a grid."
    examples: ClassVar[str] = """\
  python sample.py
      64 pictures from the newest run under runs/, by DDPM in 50 network calls
  python sample.py shapes-tiny-sa2 --sampler ddim --nfe 20
      DDIM: no fresh noise, so a picture changes little with the number of calls
  python sample.py shapes-tiny-sa2 --sampler dpm-solver --order 3 --nfe 20 --spacing logsnr
      the fast solver of E-TSDM's table 3
  python sample.py cifar10-cifar10-sa2 --precision bf16 --compile -n 10000
      fast: the compilation takes a minute or two, once; pixels change by part of a grey level
  torchrun --nproc_per_node 8 sample.py cifar10-cifar10-sa2 -n 50000 --npz --batch-size 500
      the images of an FID, on 8 GPUs
  python -m papers.covariance shapes-tiny-sa2 && python sample.py --variance analytic
      Analytic-DPM: the best variance of each reverse step"""

    def check(self) -> None:
        super().check()
        check_image_flags(self)
        if self.run == "":
            raise ValueError("RUN is empty: leave it out for the newest run")


def tag(config: samplers.SamplerConfig, step: int) -> str:
    """A folder's name for these flags: sampler, calls, step, and every flag that is not usual."""
    parts = [config.sampler, str(config.nfe), f"step{step}"]
    for f in fields(samplers.SamplerConfig):
        value = getattr(config, f.name)
        if f.name not in "sampler nfe device compile deterministic".split() and value != f.default:
            parts.append(f"{f.name.replace('_', '-')}-{value}")
    return "-".join(parts + [f"seed-{config.seed}"] * bool(config.seed))


def open_run(run: str | Path, config: samplers.SamplerConfig, device) -> tuple:
    """Load a run -> (its denoiser, ready to sample on the device; the arguments of sample())."""
    denoiser = load_run(run, config.weights)
    denoiser.hash = weights_hash(denoiser.net)
    denoiser.net = precision.for_inference(denoiser.net, device, config.precision, config.compile)
    return denoiser, config.arguments(denoiser)


def open_and_print(config: samplers.SamplerConfig, dist) -> tuple:
    """open_run of config.run on every process; rank 0 prints which run it is, and warnings."""
    path = dist.on_main(find_checkpoint, config.run)  # the newest run: the same for all
    denoiser, arguments = dist.main_first(lambda: open_run(path, config, dist.device))
    if dist.any(denoiser.hash != dist.broadcast(denoiser.hash)):
        raise ValueError(f"{path} changed while it was read. Is it in training? Try again")
    dist.print0(f"run: {denoiser.folder.resolve()}, step {denoiser.step}, {config.weights} weights")
    for line in config.warnings(denoiser):
        dist.print0(f"note: {line}")
    return denoiser, arguments


def draw(denoiser: Denoiser, indices: list[int], seed: int, device, arguments: dict) -> Tensor:
    """Images `indices` of a sampling run: uint8 (b, C, H, W). metrics.py calls this too."""
    seeds = [rng.image_seed(seed, i) for i in indices]
    x0 = samplers.sample_from_seeds(denoiser, seeds, device, **arguments)
    return data.to_uint8(denoiser.decode(x0)).cpu()


def sampling_record(config: SampleConfig, denoiser: Denoiser, arguments: dict) -> dict:
    """All that the pictures depend on: settings.json next to them."""
    record = dict(step=denoiser.step, weights=denoiser.weights, weights_hash=denoiser.hash,
                  seed=config.seed, precision=config.precision,
                  **{**arguments, "variance": config.variance})
    if digest := getattr(arguments["variance"], "digest", None):  # of papers/covariance.py's Γ
        record["variance_digest"] = digest
    return record


def main(argv=None):
    config = parse_into(SampleConfig, argv)
    tf32 = config.precision == "tf32"  # else full float32: a picture does not depend on its batch
    with distributed.init(tf32, config.deterministic, device=config.device) as dist:
        denoiser, arguments = open_and_print(config, dist)
        if denoiser.settings.get("factor"):
            name = denoiser.folder.name
            raise ValueError(f"{name} enlarges images: python -m papers.superres enlarge "
                             f"{shlex.quote(name)} IMAGES")
        out = config.out or (denoiser.folder / "generated" / tag(config, denoiser.step))
        folder = ImageFolder(out, dist)
        dist.on_main(folder.open, sampling_record(config, denoiser, arguments), config.npz)
        folder.fill(config.num, lambda batch: draw(denoiser, batch, config.seed, dist.device,
                                                   arguments), config.batch_size)
        if dist.is_main:
            folder.summarize(config.num, config.npz)


if __name__ == "__main__":
    run_main(main)
