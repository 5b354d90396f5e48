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

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import samplers
from denoiser import load_run
from support import distributed, files, precision, rng
from support.cli import flag, flag_name, parse_into
from support.programs import run_main


@dataclass
class SampleConfig(samplers.SamplerConfig):  # --sampler, --nfe, --spacing, --eta, ...
    run: str | None = flag(None, "a name under runs/, a run folder, or a checkpoint (default: the "
                           "newest run)", positional="RUN", group="images")
    # -n too, since torchrun takes --num for the beginning of its own --numa-binding
    num: int = flag(64, "number of images; under torchrun write -n", short="-n")
    batch_size: int = flag(64, "images at a time, per process")
    seed: int = flag(0, "image i is a function of (seed, i)")
    out: Path | None = flag(None, "folder to write to", shown="generated/SAMPLER-NFE-STEP in the "
                            "run, and other flags")
    npz: bool = flag(False, "also pack the images into one .npz, arr_0 (N, H, W, C)")

    prog: ClassVar[str] = "sample.py"
    usage: ClassVar[str] = "python sample.py [RUN] [flags]"
    description: ClassVar[str] = "Make pictures with a trained run: numbered PNGs and a grid."
    examples: ClassVar[str] = """\
  python sample.py
      64 pictures from the newest run under runs/, by DDIM in 50 network calls
  python sample.py shapes-tiny-sa2 --sampler ddpm --nfe 200
      DDPM's ancestral sampling, 200 calls
  python sample.py shapes-tiny-sa2 --sampler dpm-solver --order 3 --nfe 20 --spacing logsnr
      the fast solver of E-TSDM's table 3
  python sample.py cifar10-cifar10-sa2 --precision bf16 --compile -n 10000
      fast: the compilation takes a minute or two, once; pictures move by part of a grey level
  torchrun --nproc_per_node 8 sample.py cifar10-cifar10-sa2 -n 50000 --npz --batch-size 500
      the images of an FID, on 8 GPUs
  python -m papers.covariance shapes-tiny-sa2 && python sample.py --variance analytic
      Analytic-DPM: the best variance of each reverse step"""

    def check(self):
        super().check()
        check_images(self)
        if self.run == "":
            raise ValueError("RUN is empty: leave it out for the newest run")


def check_images(config):
    """ValueError for --num, --batch-size or --seed out of range. metrics.py calls this too."""
    for name in ("num", "batch_size"):
        if getattr(config, name) is not None and getattr(config, name) < 1:
            raise ValueError(f"{flag_name(name)} must be at least 1, not {getattr(config, name)}")
        if (getattr(config, name) or 0) > rng.MAX_IMAGES:
            raise ValueError(f"{flag_name(name)} must be at most {rng.MAX_IMAGES:,}: a seed has no "
                             "more images. Another --seed has others")
    if not 0 <= config.seed < rng.MAX_SEEDS:
        raise ValueError(f"--seed must be from 0 to {rng.MAX_SEEDS - 1}, not {config.seed}")


def tag(config, step):
    """A folder's name for these flags: sampler, calls, step, and every flag that is not usual."""
    parts = [config.sampler, str(config.nfe), f"step{step}"]
    for f in fields(samplers.SamplerConfig):
        value = getattr(config, f.name)
        if f.name not in ("sampler", "nfe", "compile", "deterministic") and value != f.default:
            parts.append(f"{f.name.replace('_', '-')}-{value}")
    return "-".join(parts + [f"seed-{config.seed}"] * bool(config.seed))


def open_run(config, dist):
    """Load the run -> (its denoiser, ready to sample on our device, arguments of sample())."""
    denoiser = dist.main_first(lambda: load_run(config.run, config.weights))
    dist.print0(f"run: {denoiser.folder.resolve()}, step {denoiser.step}, {config.weights} weights")
    denoiser.hash = weights_hash(denoiser.net)
    denoiser.net = precision.for_inference(denoiser.net, dist.device, config.precision,
                                           config.compile)
    arguments = config.arguments(denoiser)
    for line in config.warnings(denoiser):
        dist.print0(f"note: {line}")
    return denoiser, arguments


def draw(denoiser, indices, seed, device, arguments):
    """Images `indices` of a sampling run: uint8 (b, C, H, W). metrics.py calls this too."""
    seeds = [rng.image_seed(seed, i) for i in indices]
    x0 = samplers.sample_from_seeds(denoiser, seeds, device, **arguments)
    return data.to_uint8(denoiser.decode(x0)).cpu()


def weights_hash(net):
    """A short hash of a network's weights: a run made anew, of the same name, has another."""
    digest = hashlib.sha256()
    for tensor in net.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def sampling_record(config, denoiser, arguments):
    """All that the pictures depend on, as plain values: settings.json next to them."""
    record = dict(step=denoiser.step, weights=denoiser.weights, weights_hash=denoiser.hash,
                  seed=config.seed, precision=config.precision,
                  **{**arguments, "variance": config.variance})
    if digest := getattr(arguments["variance"], "digest", None):  # Γ, if it is estimated anew
        record["variance_digest"] = digest
    return json.loads(json.dumps(record, default=torch.Tensor.tolist))  # as it will be read back


def open_output_folder(out, record, dist):
    """Create and lock the folder, or continue in it if its images were made in the same way.
    ValueError: it holds other images, or other files."""
    note, grid = out / "settings.json", out.with_name(out.name + ".png")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: give a folder")
    if not note.exists() and (grid.exists() or out.exists() and any(out.iterdir())):
        raise ValueError(f"--out {out} (or {grid.name} next to it) was not written by this "
                         "program: choose a new folder")
    out.mkdir(parents=True, exist_ok=True)
    dist.lock(out)
    try:
        same = not note.exists() or json.loads(note.read_text(encoding="utf-8")) == record
    except ValueError:  # not JSON
        same = False
    if not same:
        raise ValueError(f"--out {out} holds images made in another way (see settings.json "
                         "there): choose another folder, or delete that one")
    files.clean_stale(out)
    files.write_text(note, json.dumps(record, indent=1) + "\n")


def png_path(out, i):
    return out / f"{i:06d}.png"


def write_missing(out, make_images, config, dist):
    """Write the images that are not there yet, divided among the processes. make_images: a list of
    indices -> uint8 (b, C, H, W)."""
    # Rank 0 lists them, once: another process might see what a third has just finished.
    missing = dist.broadcast([i for i in range(config.num) if not png_path(out, i).exists()])
    if len(missing) < config.num:
        dist.print0(f"{config.num - len(missing)} of {config.num} images exist already")
    mine = missing[dist.rank::dist.world_size]
    with tqdm(total=len(mine), unit="image", disable=not dist.is_main, dynamic_ncols=True) as bar:
        for start in range(0, len(mine), config.batch_size):
            batch = mine[start:start + config.batch_size]
            for i, image in zip(batch, make_images(batch), strict=True):
                files.save_png(png_path(out, i), data.grid(image[None], 1), sweep=False)
            bar.update(len(batch))
    dist.barrier()


def summarize(out, config):
    """Write the grid next to the folder, and the .npz; print where everything is."""
    if missing := sum(not png_path(out, i).exists() for i in range(config.num)):
        raise ValueError(f"--out {out}: {missing} of {config.num} images are missing. Do all "
                         "machines share that folder? The same command makes them")

    def read(n):  # what is on the disk, whoever made it: (n, H, W, C)
        images = np.stack([np.asarray(Image.open(png_path(out, i))) for i in range(n)])
        return images.reshape(*images.shape[:3], -1)

    first = torch.from_numpy(read(min(config.num, 64))).permute(0, 3, 1, 2)
    grid = out.with_name(out.name + ".png")
    files.save_png(grid, data.grid(first, max(1, round(len(first) ** 0.5))))
    # A colour cast over the whole set is the most common silent fault of a sampler.
    means = ", ".join(f"{m:.1f}" for m in first.double().mean((0, 2, 3)))
    print(f"{config.num} images; mean of each channel: {means} of 255\n"
          f"images: {out.resolve()}\ngrid: {grid.resolve()}")
    if config.npz:  # the key that ADM's evaluator reads
        files.save_npz(out.with_name(out.name + ".npz"), arr_0=read(config.num))
        print(f"npz: {out.with_name(out.name + '.npz').resolve()}")


def main(argv=None):
    config = parse_into(SampleConfig, argv)
    # tf32=False: a picture must not depend on how its batch was rounded
    with distributed.init(tf32=False, deterministic=config.deterministic) as dist:
        denoiser, arguments = open_run(config, dist)
        if denoiser.settings.get("factor"):
            raise ValueError(f"{denoiser.folder.name} enlarges images: python -m papers.superres "
                             f"enlarge {denoiser.folder.name} IMAGES")
        out = config.out or (denoiser.folder / "generated" / tag(config, denoiser.step))
        dist.on_main(open_output_folder, out, sampling_record(config, denoiser, arguments), dist)
        write_missing(out, lambda batch: draw(denoiser, batch, config.seed, dist.device, arguments),
                      config, dist)
        if dist.is_main:
            summarize(out, config)


if __name__ == "__main__":
    run_main(main)
