r"""Networks of other programs: converted once into an ordinary run.

    python -m papers.checkpoints lsun_bedroom.pt --preset adm256
    python sample.py lsun_bedroom --sampler ddpm --nfe 250

Reads the U-Nets without classes of OpenAI's guided-diffusion and improved-diffusion. They count
DDPM's steps 0..T-1, ours are 1..T: their networks receive t - 1 (denoiser.zero_based_time). Those
that learnt a variance (learn_sigma) have twice the outputs; the second half stays unused. Nothing
in a file is executed.

Not here: classifiers, upsamplers, class-conditional networks; SA-DPM's and diffusers' formats.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import config as configs
import unet
from support import checkpoint, files
from support.cli import flag, parse_into
from support.programs import run_main

RENAME = (("in_layers.0.", "norm1."), ("in_layers.2.", "conv1."), ("emb_layers.1.", "time."),
          ("out_layers.0.", "norm2."), ("out_layers.3.", "conv2."),
          ("skip_connection.", "skip."), ("proj_out.", "proj."), (".op.", ".conv."),
          ("out.0.", "out_norm."), ("out.2.", "out_conv."))


def convert(state_dict):
    """A state dict of another program -> (state dict of unet.UNet, what it is).

    Nothing is dropped or invented, so load_state_dict(strict=True) checks the rest. ValueError: not
    a U-Net that can be loaded.
    """
    if not isinstance(state_dict, dict) or not state_dict or not all(
            isinstance(k, str) and torch.is_tensor(v) for k, v in state_dict.items()):
        raise ValueError(f"not a state dict of a network: it holds "
                         f"{checkpoint.describe_checkpoint(state_dict)}")
    state_dict = {k.removeprefix("module."): v for k, v in state_dict.items()}  # from inside DDP
    if "input_blocks.0.0.weight" not in state_dict:
        raise ValueError("not a guided-diffusion U-Net: it has no input_blocks.0.0.weight, but "
                         + ", ".join(list(state_dict)[:3]))
    if any(k.startswith("label_emb") for k in state_dict):
        raise ValueError("a class-conditional network (label_emb): only others can be loaded")
    if "out.2.weight" not in state_dict:
        raise ValueError("it has no out.2.weight, like a classifier: only networks that draw "
                         "images can be loaded")
    ours = {}
    for key, value in state_dict.items():
        for theirs, name in RENAME:
            key = key.replace(theirs, name)
        # qkv and proj are 1-d convolutions there, 1x1 ones here
        ours[key] = value[..., None] if value.dim() == 3 else value
    return ours, "a U-Net of guided-diffusion"


@dataclass
class ImportConfig:
    file: str = flag("", "weights of OpenAI's guided-diffusion or improved-diffusion",
                     positional="FILE", group="checkpoint")
    preset: str = flag("adm256", "their size", choices=tuple(unet.PRESETS))
    schedule: str = flag("linear", "the noise schedule they were trained with",
                         choices=("linear", "cosine"))
    name: str = flag("", "folder under runs/", shown="the file's name")

    prog: ClassVar[str] = "papers.checkpoints"
    usage: ClassVar[str] = "python -m papers.checkpoints FILE [flags]"
    description: ClassVar[str] = "Convert the network of another program into a run."
    examples: ClassVar[str] = """\
  python -m papers.checkpoints lsun_bedroom.pt --preset adm256
  python sample.py lsun_bedroom --sampler ddpm --nfe 250"""

    def check(self):
        if not self.file:
            raise ValueError("FILE is missing: python -m papers.checkpoints FILE --preset adm256")
        if not Path(self.file).is_file():
            raise FileNotFoundError(f"FILE {self.file}: there is no such file")
        self.name = self.name or Path(self.file).stem
        if Path(self.name).name != self.name or self.name[0] == "." or not self.name.isprintable():
            raise ValueError(f"--name {self.name!r} must be a plain name: runs go to "
                             f"{checkpoint.RUNS}/NAME")


def import_run(file, preset, schedule, name):
    """Convert `file` into runs/NAME. ValueError, OSError: one line that begins with the file."""
    try:
        state = checkpoint.read_tensors(file)
        if isinstance(state, dict) and state.get("format") in checkpoint.FORMATS:
            raise ValueError("this is a run of train.py, which needs no conversion")
        state, kind = convert(state)
        first, last = state.get("input_blocks.0.0.weight"), state.get("out_conv.weight")
        if first.dim() != 4 or last is None or last.dim() != 4:
            raise ValueError("its first and last layers are not convolutions of images")
        channels, outputs = first.shape[1], last.shape[0]
        if channels not in (1, 3) or outputs not in (channels, 2 * channels):
            raise ValueError(f"{channels} channels in and {outputs} out: only networks that draw "
                             "images from noise can be loaded, not upsamplers")
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    size = dict(unet.PRESETS[preset], in_channels=channels, out_channels=outputs)
    net = unet.UNet(**size)
    checkpoint.load_weights(net, state, file, f"--preset {preset}")
    folder = checkpoint.RUNS / name
    if folder.exists():
        raise FileExistsError(f"--name {name}: {folder} exists already. Choose another name")
    side = size["image_size"]
    values = configs.Config(preset=preset, schedule=schedule, image_size=side, channels=channels,
                            name=name, dropout=size.get("dropout", 0.0), data="")
    settings = {**values.settings(), "unet": size, "imported": True}
    folder.mkdir(parents=True)
    checkpoint.save_checkpoint(folder / "checkpoint.pt", dict(
        settings=settings, net=state, ema=state, optimizer={}, step=0, skipped=0, processes=1,
        dataset=0, digest="", extra={}))
    files.write_text(folder / "config.json", checkpoint.to_json(settings))
    return kind


def main(argv=None):
    config = parse_into(ImportConfig, argv)
    kind = import_run(config.file, config.preset, config.schedule, config.name)
    print(f"{config.file}: {kind}, as {config.preset}\nrun: "
          f"{(checkpoint.RUNS / config.name).resolve()}\n"
          f"next: python sample.py {shlex.quote(config.name)} --sampler ddpm --nfe 250")


if __name__ == "__main__":
    run_main(main)
