r"""Convert the network of another program into a run.

    python -m papers.checkpoints celeba_sa/model_1175_ema.pth --name celeba_sa       # SA-DPM's
    python sample.py celeba_sa --spacing leading --nfe 10                             # their grid
    torchrun train.py --init celeba_sa --sa-k 2 ...                                   # fine-tuning
    python -m papers.checkpoints celeba_sa --to diffusers exported/

The kind of network and its sizes follow from the keys and shapes in the file:

    guided-diffusion, improved-diffusion   ADM's U-Net
    SA-DPM, DDIM                           their `Model`; DDIM's lists and SA-DPM's dicts too
    diffusers                              UNet2DModel: a folder, or its .safetensors or .bin, with
                                           config.json next to it

A network does not record its image size or number of attention heads. These are guessed from the
released networks: the second attention level from below (or the only one) is at 16 pixels.
--image-size, --heads and --head-channels replace the guess.

All these programs count DDPM's steps 0..T-1, this one 1..T: imported networks receive t - 1
(denoiser.py). Networks with a learned variance (learn_sigma) have twice as many outputs; the second
half stays unused. Nothing in a file is executed.

Not here: the way back (exports.py); classifiers, upsamplers, class-conditional networks, EDM's
pickles, Stable Diffusion.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

import config as configs
import unet
from papers import exports
from support import checkpoint, files
from support.cli import flag, flag_name, parse_into
from support.programs import run_main

GUIDED = "a U-Net of guided-diffusion or improved-diffusion"
DDIM = "the Model of SA-DPM or DDIM"
DIFFUSERS = "a UNet2DModel of diffusers"
# Their names -> those of unet.py
FROM_GUIDED = (("in_layers.0.", "norm1."), ("in_layers.2.", "conv1."), ("emb_layers.1.", "time."),
               ("out_layers.0.", "norm2."), ("out_layers.3.", "conv2."),
               ("skip_connection.", "skip."), ("proj_out.", "proj."), (".op.", ".conv."),
               ("out.0.", "out_norm."), ("out.2.", "out_conv."))
FROM_DDIM = (("temb.dense.0.", "time_embed.0."), ("temb.dense.1.", "time_embed.2."),
             ("conv_in.", "input_blocks.0.0."), ("norm_out.", "out_norm."),
             ("conv_out.", "out_conv."), ("mid.block_1.", "middle_block.0."),
             ("mid.attn_1.", "middle_block.1."), ("mid.block_2.", "middle_block.2."),
             ("temb_proj.", "time."), ("nin_shortcut.", "skip."), (".proj_out.", ".proj."))
# diffusers' names -> DDIM's. Attention layers have an old and a new set of names.
TO_DDIM = (("time_embedding.linear_1.", "temb.dense.0."), (".proj_attn.", ".proj_out."),
           ("time_embedding.linear_2.", "temb.dense.1."), (".to_out.0.", ".proj_out."),
           ("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2."),
           ("mid_block.attentions.0.", "mid.attn_1."), ("down_blocks.", "down."),
           ("up_blocks.", "up."), (".resnets.", ".block."), (".attentions.", ".attn."),
           (".downsamplers.0.", ".downsample."), (".upsamplers.0.", ".upsample."),
           ("time_emb_proj.", "temb_proj."), ("conv_shortcut.", "nin_shortcut."),
           ("group_norm.", "norm."), ("conv_norm_out.", "norm_out."), (".to_q.", ".q."),
           (".to_k.", ".k."), (".to_v.", ".v."), (".query.", ".q."), (".key.", ".k."),
           (".value.", ".v."))
OTHERS = {
    "label_emb": "a class-conditional network (label_emb), which cannot be loaded: use an "
                 "unconditional one",
    "class_embedding": "a class-conditional network (class_embedding), which cannot be loaded: "
                       "use an unconditional one",
    "transformer_blocks": "a network with cross-attention, like Stable Diffusion's, which cannot "
                          "be loaded: use an unconditional one",
    "model.diffusion_model.": "a latent diffusion model, like Stable Diffusion, which cannot be "
                              "loaded: use a network of pixels",
}


# ------------------------------------------------------------------ from their names to unet.py's
def convert(state_dict, head_channels=None):
    """A state dict of another program -> (state dict of unet.UNet, its kind).

    head_channels: channels per attention head of diffusers; None: a single head. Each tensor is
    kept, so load_state_dict(strict=True) checks the rest. ValueError: not a U-Net that can be
    loaded.
    """
    if not is_state(state_dict):
        raise ValueError(f"not a state dict of a network: it holds "
                         f"{checkpoint.describe_checkpoint(state_dict)}")
    state = {k.removeprefix("module."): v for k, v in state_dict.items()}  # DDP's prefix
    for word, text in OTHERS.items():
        if any(word in k for k in state):
            raise ValueError(text)
    if "temb.dense.0.weight" in state:
        return from_ddim(state), DDIM
    if "time_embedding.linear_1.weight" in state:
        state = rename(state, TO_DDIM)
        levels = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("down."))
        state = {re.sub(r"^up\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", k): v
                 for k, v in state.items()}  # up: diffusers counts from below, DDIM from above
        return from_ddim(state, head_channels), DIFFUSERS
    if "input_blocks.0.0.weight" not in state:
        raise ValueError("not a U-Net of guided-diffusion (no input_blocks.0.0.weight), SA-DPM or "
                         "diffusers: its layers are " + ", ".join(list(state)[:3]))
    if "out.2.weight" not in state:
        raise ValueError("it has no out.2.weight, like a classifier: use a network that generates "
                         "images")
    # qkv and proj are 1-d convolutions there and 1x1 convolutions here
    return {k: v[..., None] if v.dim() == 3 else v
            for k, v in rename(state, FROM_GUIDED).items()}, GUIDED


def is_state(content):
    """True for a dict {name: tensor}."""
    return isinstance(content, dict) and bool(content) and all(
        isinstance(k, str) and torch.is_tensor(v) for k, v in content.items())


def rename(state, pairs):
    """The same tensors under other names."""
    ours = {}
    for key, value in state.items():
        for theirs, name in pairs:
            key = key.replace(theirs, name)
        ours[key] = value
    return ours


def from_ddim(state, head_channels=None):
    """Rename DDIM's up.LEVEL.block.I... to output_blocks.STAGE.LAYER..., and join q, k and v into
    one layer."""
    levels = 1 + max((int(k.split(".")[1]) for k in state if k.startswith("down.")), default=0)
    blocks = sum(bool(re.fullmatch(r"down\.0\.block\.\d+\.conv1\.weight", k)) for k in state)

    def place(match):
        way, level, kind, i = match[1], int(match[2]), match[3], match[4]
        if way == "down":
            stage = 1 + level * (blocks + 1) + int(i or blocks)
            layer = int(kind == "attn")
        else:
            stage = (levels - 1 - level) * (blocks + 1) + int(i or blocks)
            layer = int(kind == "attn")
            if kind == "upsample":  # after the attention layer, if there is one
                layer = 1 + (f"up.{level}.attn.{blocks}.norm.weight" in state)
        return f"{'input' if way == 'down' else 'output'}_blocks.{stage}.{layer}."

    ours = {}
    pattern = r"^(down|up)\.(\d+)\.(block|attn|downsample|upsample)\.(?:(\d+)\.)?"
    for key, value in rename(state, FROM_DDIM).items():
        ours[re.sub(pattern, place, key)] = value
    for key in [k for k in ours if re.search(r"\.q\.(weight|bias)$", k)]:
        parts = [ours.pop(key.replace(".q.", f".{x}.")) for x in "qkv"]
        width, tail = len(parts[0]), parts[0].shape[1:2]
        parts = torch.stack([p.reshape(width // (head_channels or width), -1, *tail)
                             for p in parts], dim=1)  # (heads, 3, d, ...)
        ours[key.replace(".q.", ".qkv.")] = parts.reshape(3 * width, *tail)
    return {k: v[:, :, None, None] if re.search(r"\.(qkv|proj)\.weight$", k) and v.dim() == 2
            else v for k, v in ours.items()}


def size_of(state, image_size=None):
    """The arguments of unet.UNet that follow from its state dict. image_size: None guesses it."""
    channels, E = state["time_embed.0.weight"].shape[1], len(state["time_embed.0.weight"])
    ups = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("output_blocks."))
    # A level ends with a layer that doubles the size: a convolution, or a second residual block
    plain = [int(m[1]) for k in state if (m := re.match(r"output_blocks\.(\d+)\.\d\.conv\.w", k))]
    double = [int(m[1]) for k in state
              if (m := re.match(r"output_blocks\.(\d+)\.[12]\.norm1\.w", k))]
    per_level = 1 + min(plain + double, default=ups - 1)
    levels = ups // per_level
    firsts = [f"input_blocks.{1 + i * per_level}" for i in range(levels)]
    widths = [len(state[f"{first}.0.conv2.weight"]) for first in firsts]
    attention = [i for i, first in enumerate(firsts) if f"{first}.1.qkv.weight" in state]
    if image_size is None:
        if not attention:
            raise ValueError("its keys do not determine the image size: add --image-size")
        image_size = (16 if len(attention) == 1 else 8) << attention[-1]
    time = state["middle_block.0.time.weight"]
    return dict(image_size=image_size, in_channels=state["input_blocks.0.0.weight"].shape[1],
                out_channels=len(state["out_conv.weight"]), channels=channels,
                channel_mult=tuple(w // channels for w in widths), res_blocks=per_level - 1,
                attention_resolutions=tuple(image_size >> i for i in attention),
                time_channels=E, scale_shift=len(time) == 2 * widths[-1],
                resblock_updown=bool(double))


# ------------------------------------------------------------------ files
def read(path):
    """Read a file or folder -> (weights, their moving average, the config.json next to them or {},
    the diffusers scheduler's or {}). If only one set of weights exists, it serves as both."""
    if path.is_dir():
        names = [*(f"{folder}diffusion_pytorch_model.{ending}" for folder in ("unet/", "")
                   for ending in ("safetensors", "bin")), "checkpoint.pt"]
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise ValueError("neither this folder nor its unet/ has a "
                             "diffusion_pytorch_model.safetensors or .bin")
        path = found[0]
    content = read_safetensors(path) if path.suffix == ".safetensors" else read_file(path)
    if isinstance(content, dict) and content.get("format") in checkpoint.FORMATS:
        raise ValueError("this is a run of train.py, which needs no conversion")
    root = path.parent.parent if path.parent.name == "unet" else path.parent
    found = [p for p in (root / "scheduler_config.json", root / "scheduler/scheduler_config.json")
             if p.is_file()]
    return (*find_weights(content), read_json(path.parent / "config.json"),
            read_json(found[0]) if found else {})


def read_file(path):
    """Read a file of torch.save: only tensors and plain values."""
    try:
        return checkpoint.read_tensors(path)
    except ValueError as error:
        with open(path, "rb") as f:
            head = f.read(2)
        if head[:1] == b"\x80":
            raise ValueError("a pickle of Python objects, like EDM's networks: opening it would "
                             "execute its code") from error
        if head == b"PK":
            raise ValueError(f"{error}. If it is SA-DPM's ckpt_N.pth, use model_N_ema.pth"
                             ) from error
        raise


def read_safetensors(path):
    """Read {name: tensor} with the optional package safetensors."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError("safetensors is not installed: pip install safetensors") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"it is damaged, or not in the safetensors format ({error})") from error


def read_json(path):
    """The dict in a JSON file; {} if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path.name} next to it is not valid JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def find_weights(content):
    """(weights, moving average) in a checkpoint: a state dict, a dict of several, or DDIM's list
    [model, optimizer, epoch, step, average]."""
    parts = content
    if isinstance(content, list | tuple):
        parts = {"ema" if i == 4 else str(i): part for i, part in enumerate(content)}
    if not isinstance(parts, dict) or is_state(parts):
        return content, content
    states = {str(k): v for k, v in parts.items() if is_state(v)}
    averages = [v for k, v in states.items() if "ema" in k.lower()]
    weights = [v for k, v in states.items() if "ema" not in k.lower()]
    return (weights + averages + [content])[0], (averages + weights + [content])[0]


# ------------------------------------------------------------------ config files of diffusers
# unet.UNet supports only these values of UNet2DModel's settings.
ONLY = dict(_class_name="UNet2DModel", act_fn="silu", time_embedding_type="positional",
            center_input_sample=False, class_embed_type=None, num_class_embeds=None,
            mid_block_scale_factor=1, add_attention=True, mid_block_type="UNetMidBlock2D")


def diffusers_network(config):
    """config.json of a UNet2DModel -> arguments of unet.UNet that do not follow from weights."""
    if not config:
        raise ValueError("config.json is missing: put it next to the weights")
    groups = config.get("norm_num_groups", 32)
    # Without this entry and with scale_shift, diffusers' middle attention has no normalisation.
    shifts = config.get("resnet_time_scale_shift") == "scale_shift"
    middle = config.get("attn_norm_num_groups") or (None if shifts else groups)
    refuse_others(config | dict(attn_norm_num_groups=middle),
                  ONLY | dict(attn_norm_num_groups=groups), "config.json")
    if not isinstance(config.get("sample_size"), int | None):
        raise ValueError(f"config.json has sample_size {config['sample_size']}: only square images "
                         "can be converted")
    return dict(sin_first=not config.get("flip_sin_to_cos", True),
                freq_shift=config.get("freq_shift", 0), norm_eps=config.get("norm_eps", 1e-5),
                pad_end=config.get("downsample_padding", 1) == 0,
                norm_groups=groups,
                head_channels=config.get("attention_head_dim", 8),
                dropout=config.get("dropout", 0.0))


def diffusers_schedule(scheduler):
    """scheduler_config.json -> (schedule, prediction type, variance of DDPM)."""
    refuse_others(scheduler, dict(trained_betas=None, rescale_betas_zero_snr=False,
                                  num_train_timesteps=1000), "its scheduler")
    name = scheduler.get("beta_schedule", "linear")
    if name == "linear":
        refuse_others(scheduler, dict(beta_start=1e-4, beta_end=0.02), "its scheduler")
    prediction = scheduler.get("prediction_type", "epsilon")
    if name not in exports.SCHEDULES or prediction not in exports.PREDICTIONS:
        raise ValueError(f"its scheduler has {name} betas and predicts {prediction}: only "
                         + " ".join([*exports.SCHEDULES, "and", *exports.PREDICTIONS])
                         + " can be converted")
    large = scheduler.get("variance_type") == "fixed_large"
    return exports.SCHEDULES[name], exports.PREDICTIONS[prediction], "large" if large else "small"


def refuse_others(config, only, where):
    """ValueError if config has an entry that differs from `only`."""
    for key, value in only.items():
        if config.get(key, value) != value:
            raise ValueError(f"{where} has {key} {config[key]!r}: only {value!r} can be converted")


# ------------------------------------------------------------------ a run
def import_run(source, name, schedule=None, steps=None, image_size=None, heads=None,
               head_channels=None):
    """Convert a file or folder into runs/NAME -> (lines that describe it, "small" or "large").
    ValueError, OSError: one line that begins with the source or a flag."""
    folder = checkpoint.RUNS / name
    if folder.exists():
        raise FileExistsError(f"--name {name}: {folder} exists already. Choose another name")
    prediction, variance = "eps", "small"
    try:
        weights, average, config, scheduler = read(Path(source))
        known = {}
        if is_state(weights) and any("time_embedding.linear_1." in k for k in weights):
            known = diffusers_network(config)
            image_size = image_size or config.get("sample_size")
            if scheduler and (schedule or steps):
                raise ValueError("its scheduler_config.json records the schedule and the steps: "
                                 f"leave out {'--schedule' if schedule else '--steps'}")
            if scheduler:
                schedule, prediction, variance = diffusers_schedule(scheduler)
        net, kind = convert(weights, known.get("head_channels"))
        ema, _ = convert(average, known.get("head_channels"))
        size = network(net, kind, image_size) | known
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if heads or head_channels:
        if kind != GUIDED or heads and head_channels:
            raise ValueError("--heads or --head-channels: give one, and only for guided- or "
                             "improved-diffusion")
        size.update(heads=heads or 1, head_channels=head_channels)
    try:
        module = unet.UNet(**size)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{source}: its sizes do not fit: {error}") from error
    for state in (ema, net):
        checkpoint.load_weights(module, state, source, "the sizes that its keys show")
    schedule = schedule or "linear"
    values = configs.Config(
        preset=preset_of(size), schedule=schedule, prediction=prediction, name=name, data="",
        image_size=size["image_size"], channels=size["in_channels"], dropout=size["dropout"])
    settings = {**values.settings(), "unet": size, "imported": True, "T": steps or 1000}
    folder.mkdir(parents=True)
    checkpoint.save_checkpoint(folder / "checkpoint.pt", dict(
        settings=settings, net=net, ema=ema, optimizer={}, step=0, skipped=0, processes=1,
        dataset=0, digest="", extra={}))
    files.write_text(folder / "config.json", checkpoint.to_json(settings))
    count = sum(p.numel() for p in module.parameters())
    attention = (f"heads of {size['head_channels']} channels" if size["head_channels"]
                 else f"{size['heads']} heads" if size.get("heads", 1) > 1 else "one head")
    side = size["image_size"]
    return [f"{source}: {kind}", f"{side}x{side}, {count:,} parameters, attention with {attention}"
            f"; {schedule} schedule, predicts {prediction}"], variance


def preset_of(size):
    """The preset that gives train.py --init its recipe."""
    side = size["image_size"]
    return "cifar10" if side <= 32 else "celeba64" if side <= 64 else "celebahq256"


def network(state, kind, image_size):
    """All arguments of unet.UNet: some follow from the keys, the rest from the kind."""
    try:
        first, last = state["input_blocks.0.0.weight"], state["out_conv.weight"]
        if first.dim() != 4 or last.dim() != 4:
            raise ValueError("its first and last layers are not convolutions of images")
        channels, outputs = first.shape[1], last.shape[0]
        if channels not in (1, 3) or outputs not in (channels, 2 * channels):
            raise ValueError(f"{channels} input and {outputs} output channels, like an upsampler: "
                             "use a network that generates images from noise")
        size = size_of(state, image_size)
    except (KeyError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"it lacks a layer of a U-Net (at {error})") from error
    size.update(head_channels=None, dropout=0.0)
    if kind == DDIM:
        size.update(unet.DDPM, dropout=unet.PRESETS[preset_of(size)]["dropout"])
    # guided-diffusion has heads of 64 channels; improved-diffusion 4 heads, and 1 for LSUN
    if kind == GUIDED:
        size.update(dict(head_channels=64) if size["resblock_updown"] else
                    dict(heads=4 if size["scale_shift"] else 1))
    return size


@dataclass
class ImportConfig:
    file: str = flag("", "weights of another program, or a folder of diffusers; with --to, a run",
                     positional="FILE_OR_FOLDER", group="checkpoint")
    name: str = flag("", "folder under runs/", shown="the file's name")
    schedule: str | None = flag(None, "noise schedule of the training; a diffusers folder records "
                                "it", choices=("linear", "cosine"), shown="linear")
    steps: int | None = flag(None, "number T of DDPM steps in training (improved-diffusion: 4000)",
                             shown="1000")
    image_size: int | None = flag(None, "side in pixels", shown="from the attention levels")
    heads: int | None = flag(None, "attention heads per layer", shown="the program's default")
    head_channels: int | None = flag(None, "channels per attention head, instead of --heads",
                                     shown="the program's default")
    to: tuple[str, ...] = flag((), "the other direction: write a run as a folder of diffusers",
                               nargs=2, metavar=("diffusers", "FOLDER"))

    prog: ClassVar[str] = "papers.checkpoints"
    usage: ClassVar[str] = "python -m papers.checkpoints FILE_OR_FOLDER [flags]"
    description: ClassVar[str] = "Convert the network of another program into a run."
    examples: ClassVar[str] = """\
  python -m papers.checkpoints celeba_sa/model_1175_ema.pth --name celeba_sa
  python sample.py celeba_sa --spacing leading --nfe 10
  python -m papers.checkpoints celeba_sa --to diffusers exported/"""

    def check(self):
        if not self.file:
            raise ValueError("FILE_OR_FOLDER is missing: python -m papers.checkpoints weights.pt")
        if self.to:
            if self.to[0] != "diffusers":
                raise ValueError(f"--to {self.to[0]}: only diffusers FOLDER can be written")
            if others := sorted(self.given - {"file", "to"}):
                raise ValueError(f"{flag_name(others[0])} has no effect with --to: leave it out")
            return
        if not Path(self.file).exists():
            raise FileNotFoundError(f"{self.file}: no such file or folder")
        path = Path(self.file).resolve()
        self.name = self.name or (path.name if path.is_dir() else path.stem)
        if Path(self.name).name != self.name or self.name[0] == "." or not self.name.isprintable():
            raise ValueError(f"--name {self.name!r} must be a plain name: the run goes to "
                             f"{checkpoint.RUNS}/NAME")
        for name, low in (("steps", 2), ("image_size", 1), ("heads", 1), ("head_channels", 1)):
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise ValueError(f"{flag_name(name)} must be at least {low}, not "
                                 f"{getattr(self, name)}")


def main(argv=None):
    config = parse_into(ImportConfig, argv)
    if config.to:
        folder = Path(config.to[1])
        exports.export_diffusers(config.file, folder)
        print(f"written: {folder.resolve()}")
        return
    lines, variance = import_run(config.file, config.name, config.schedule, config.steps,
                                 config.image_size, config.heads, config.head_channels)
    large = " --variance large" * (variance == "large")
    print(*lines, f"run: {(checkpoint.RUNS / config.name).resolve()}",
          f"next: python sample.py {shlex.quote(config.name)} --sampler ddpm --nfe 250{large}",
          sep="\n")


if __name__ == "__main__":
    run_main(main)
