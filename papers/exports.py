r"""Export a run to diffusers: a UNet2DModel and a scheduler with the same noise schedule.

    python -m papers.checkpoints RUN --to diffusers exported/
    pipe = diffusers.DDIMPipeline.from_pretrained("exported")

The averaged weights are renamed, and q, k, v become three layers. diffusers counts DDPM's steps
from 0, the networks here receive t = 1..T. The first layer of the time embedding absorbs the
difference: cos and sin of (c + 1) w are a rotation of cos and sin of c w. UNet2DModel has neither
shared timesteps (E-TSDM) nor patches (--preset tiny). Such runs also get shared_unet.py, a subclass
with both.

Not here: reading such folders (checkpoints.py); EDM, latents, super-resolution, second heads.
"""

import json
import re

import torch

import unet
from denoiser import PARTS, load_run
from support import files

PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}
# unet.py's names -> diffusers', after the blocks are renamed
TO_DIFFUSERS = (("time_embed.0.", "time_embedding.linear_1."), ("out_norm.", "conv_norm_out."),
                ("time_embed.2.", "time_embedding.linear_2."), ("out_conv.", "conv_out."),
                ("middle_block.0.", "mid_block.resnets.0."), (".time.", ".time_emb_proj."),
                ("middle_block.1.", "mid_block.attentions.0."), (".skip.", ".conv_shortcut."),
                ("middle_block.2.", "mid_block.resnets.1."), (".norm.", ".group_norm."),
                (".proj.", ".to_out.0."))

# shared_unet.py, for an exported network that UNet2DModel alone cannot express
WRAPPER = '''\
"""{name} for diffusers: a UNet2DModel {what}.

    import torch
    from diffusers import DDIMScheduler
    from shared_unet import SharedUNet           # this file's folder must be on sys.path
    net = SharedUNet.from_pretrained("unet").eval()
    scheduler = DDIMScheduler.from_pretrained("scheduler")
    scheduler.set_timesteps(50)
    x = torch.randn(4, {channels}, {side}, {side})
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t).sample, t, x).prev_sample        # images in [-1, 1]

Timesteps count from 0, as diffusers counts them: 0 is the least noise.
"""

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput

INTERVAL, PARTS = {interval}, {n}  # E-TSDM: times below INTERVAL share PARTS values; 0: no sharing
SHIFT = {shift}  # 1: E-TSDM counts timesteps from 1
PATCH = {patch}  # PATCH x PATCH pixels become channels of the network


class SharedUNet(UNet2DModel):
    def forward(self, sample, timestep, *args, return_dict=True, **others):
        t = torch.as_tensor(timestep, device=sample.device) + SHIFT
        if INTERVAL:
            shared = torch.floor(t * PARTS / INTERVAL) * INTERVAL / PARTS
            t = torch.where(t < INTERVAL, shared, t)
        x = F.pixel_unshuffle(sample, PATCH)
        out = super().forward(x, t - SHIFT, *args, return_dict=False, **others)[0]
        out = F.pixel_shuffle(out, PATCH)
        return UNet2DOutput(sample=out) if return_dict else (out,)
'''


def export_diffusers(run, folder):
    """Write a run's averaged network as a folder of diffusers: unet/, scheduler/, model_index.json;
    and shared_unet.py for E-TSDM or patches. ValueError, in one line: diffusers cannot express it.
    """
    try:
        from safetensors.torch import save_file
    except ImportError as error:
        raise ValueError("--to diffusers needs safetensors: pip install safetensors") from error
    denoiser = load_run(run)
    settings, size = denoiser.settings, denoiser.settings["unet"]
    others = [key for key in (*PARTS, "head") if settings.get(key)]
    heads = {layer.heads for layer in denoiser.net.modules() if isinstance(layer, unet.Attention)}
    others += ["edm"] * (settings["prediction"] == "edm" or denoiser.schedule.variance_exploding)
    others += ["rescaled steps"] * (settings["T"] != 1000)
    if others:
        raise ValueError(f"{run}: a run with {others[0]} has no counterpart in diffusers")
    if size["channel_mult"][0] != 1 or not size.get("head_channels", 64) and heads != {1}:
        raise ValueError(f"{run}: no UNet2DModel has these widths and heads")
    if folder.exists():
        raise FileExistsError(f"--to diffusers {folder}: it exists already. Choose another folder")
    betas = schedule_betas(denoiser.schedule, settings.get("betas"))
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    state = to_diffusers(denoiser.net.state_dict(), size, settings.get("imported"))
    save_file(state, folder / "unet/diffusion_pytorch_model.safetensors")
    written = {"unet/config.json": unet_config(size, settings), "model_index.json": {
        "_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDIMScheduler"]}, "scheduler/scheduler_config.json": {
        "_class_name": "DDIMScheduler", "num_train_timesteps": settings["T"],
        "prediction_type": {v: k for k, v in PREDICTIONS.items()}[settings["prediction"]],
        "clip_sample": False, **betas}}
    patch = size.get("patch", 1)
    if settings["etsdm"] or patch > 1:
        del written["model_index.json"]  # a pipeline would load the network without the wrapper
        what = " and ".join(["with E-TSDM's shared timesteps"] * settings["etsdm"]
                            + [f"of {patch}x{patch} patches"] * (patch > 1))
        files.write_text(folder / "shared_unet.py", WRAPPER.format(
            name=denoiser.folder.name, what=what, channels=settings["channels"], patch=patch,
            side=size["image_size"], n=settings["etsdm_n"], shift=int(not settings.get("imported")),
            interval=settings["etsdm_interval"] if settings["etsdm"] else 0))
    for name, content in written.items():
        files.write_text(folder / name, json.dumps(content, indent=2) + "\n")


def schedule_betas(schedule, ends=None):
    """The noise schedule, as entries of scheduler_config.json. ends: --betas, if given."""
    ratio = schedule.alpha_bar(torch.arange(1, schedule.T + 1).double())
    ratio[1:] = ratio[1:] / ratio[:-1].clone()
    known = {v: k for k, v in SCHEDULES.items()}.get(schedule.name)
    if known and not ends and schedule.T == 1000 and not schedule.continuous:
        return dict(beta_schedule=known, beta_start=1e-4, beta_end=0.02)
    return dict(trained_betas=(1 - ratio).tolist())


def unet_config(size, settings):
    """config.json of a UNet2DModel."""
    full, levels = {"norm_groups": 32, "norm_eps": 1e-5, **size}, len(size["channel_mult"])
    patch, updown = full.get("patch", 1), full.get("resblock_updown", True)
    side, kinds = full["image_size"] // patch, ("ResnetDownsample", "ResnetUpsample")
    down, up = kinds if updown else ("Down", "Up")
    here = [side >> i in full.get("attention_resolutions", (16,)) for i in range(levels)]
    widths = [full.get("channels", 128) * m for m in full["channel_mult"]]
    inner = "resnet" if updown else "conv"
    return dict(
        _class_name="UNet2DModel", sample_size=side, in_channels=settings["channels"] * patch**2,
        out_channels=settings["channels"] * patch**2, layers_per_block=full.get("res_blocks", 2),
        block_out_channels=widths, time_embedding_dim=full.get("time_channels"),
        down_block_types=[("AttnDown" if a else down) + "Block2D" for a in here],
        up_block_types=[("AttnUp" if a else up) + "Block2D" for a in reversed(here)],
        downsample_type=inner, upsample_type=inner, freq_shift=full.get("freq_shift", 0),
        flip_sin_to_cos=not full.get("sin_first", False), attention_head_dim=full.get(
            "head_channels", 64), norm_num_groups=full["norm_groups"], norm_eps=full["norm_eps"],
        attn_norm_num_groups=full["norm_groups"], dropout=full.get("dropout", 0.0),
        downsample_padding=int(not full.get("pad_end", False)), resnet_time_scale_shift=(
            "scale_shift" if full.get("scale_shift", True) else "default"))


def to_diffusers(state, size, imported):
    """The inverse of convert(): our state dict -> UNet2DModel's."""
    per_level, theirs = size.get("res_blocks", 2) + 1, {}
    channels = size["in_channels"] * size.get("patch", 1) ** 2  # without learned variances
    state = {k: v[:channels] if k.startswith("out_conv.") else v for k, v in state.items()}
    if not imported:
        state["time_embed.0.weight"] = shift_count(state["time_embed.0.weight"], size)
    for key, value in state.items():
        if match := re.match(r"(in|out)put_blocks\.(\d+)\.(\d)\.", key):
            way, stage, layer = match[1], int(match[2]), int(match[3])
            level, i = divmod(stage - (way == "in"), per_level)
            rest = key[match.end():]
            if stage == 0 and way == "in":
                key = f"conv_in.{rest}"
            else:
                kind = "attentions" if rest.startswith(("norm.", "qkv.", "proj.")) else "resnets"
                place = f"{kind}.{i}."
                if way == "in" and i == per_level - 1:
                    place = "downsamplers.0."
                if way == "out" and layer and kind == "resnets":
                    place = "upsamplers.0."
                key = f"{'down' if way == 'in' else 'up'}_blocks.{level}.{place}{rest}"
        for ours, name in TO_DIFFUSERS:
            key = key.replace(ours, name)
        if ".qkv." in key:
            width = len(value) // 3
            heads = width // (size.get("head_channels", 64) or width)
            parts = value.reshape(heads, 3, width // heads, -1).unbind(dim=1)
            shape = (width, width)[:value.dim() - 2] if value.dim() == 4 else (width,)
            for name, part in zip("qkv", parts, strict=True):
                theirs[key.replace(".qkv.", f".to_{name}.")] = part.reshape(shape).contiguous()
        else:
            flat = ".to_out." in key and value.dim() == 4
            theirs[key] = (value[:, :, 0, 0] if flat else value).contiguous()
    return theirs


def shift_count(weight, size):
    """Change the first layer of the time embedding so that input t - 1 gives the old output for t:
    cos and sin of (c + 1) w are those of c w, rotated by w."""
    first, second = weight.double().chunk(2, dim=1)
    angle = unet.timestep_embedding(torch.ones(1), weight.shape[1], size.get("sin_first", False),
                                    size.get("freq_shift", 0))[0]
    one, two = angle.chunk(2)
    if size.get("sin_first", False):  # [sin | cos]
        parts = first * two - second * one, first * one + second * two
    else:
        parts = first * one + second * two, second * one - first * two
    return torch.cat(parts, dim=1).to(weight.dtype)
