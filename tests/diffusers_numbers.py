"""What UNet2DModel and the schedulers of diffusers give: tests/data/unet_diffusers.json.

python tests/diffusers_numbers.py        # needs diffusers; writes the file anew

Weights, x_T and the noise of each step are made by formula (fill.py).
"""

import json
from pathlib import Path

import fill
import torch

PATH = Path(__file__).parent / "data" / "unet_diffusers.json"
# config.json as diffusers writes it, of google/ddpm-cifar10-32 but for the width; and a network in
# which everything is otherwise
GOOGLE = dict(_class_name="UNet2DModel", _diffusers_version="0.0.4", sample_size=32)
GOOGLE |= dict(
    in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=[32, 64, 64, 64]
)
GOOGLE |= dict(act_fn="silu", attention_head_dim=None, center_input_sample=False)
GOOGLE |= dict(norm_eps=1e-06, norm_num_groups=32, mid_block_scale_factor=1, downsample_padding=0)
GOOGLE |= dict(time_embedding_type="positional", flip_sin_to_cos=False, freq_shift=1)
GOOGLE["down_block_types"] = "DownBlock2D AttnDownBlock2D DownBlock2D DownBlock2D".split()
GOOGLE["up_block_types"] = "UpBlock2D UpBlock2D AttnUpBlock2D UpBlock2D".split()
OTHER = dict(_class_name="UNet2DModel", sample_size=16, in_channels=1, out_channels=1)
OTHER |= dict(
    block_out_channels=[16, 32], layers_per_block=1, resnet_time_scale_shift="scale_shift"
)
OTHER |= dict(down_block_types=["ResnetDownsampleBlock2D", "AttnDownBlock2D"])
OTHER |= dict(up_block_types=["AttnUpBlock2D", "ResnetUpsampleBlock2D"], downsample_type="resnet")
OTHER |= dict(upsample_type="resnet", norm_num_groups=8, attn_norm_num_groups=8)
SCHEDULER = dict(_class_name="DDPMScheduler", beta_schedule="linear", beta_start=0.0001)
SCHEDULER |= dict(beta_end=0.02, clip_sample=True, num_train_timesteps=1000, trained_betas=None)
SCHEDULER |= dict(variance_type="fixed_large")
CONFIGS = {"google": GOOGLE, "other": OTHER}
TIMESTEPS = [0, 1, 500, 999]


def weights(keys):
    return {k: torch.tensor(v).float() for k, v in fill.state(keys).items()}


def images(name, config, n=4):
    """Numbers in [-2, 2) in the shape of a batch."""
    shape = (n, config["in_channels"], config["sample_size"], config["sample_size"])
    return torch.tensor(4 * fill.fill(name, shape) - 2).float()


def noises(config):
    """A function that gives the noise of one step after the other, in any arguments."""
    count = iter(range(1000))
    return lambda *args, **others: images(f"noise-{next(count)}", config, 2)


def summary(x):
    x = x.detach().double().flatten()
    numbers = dict(first=x[:4].tolist(), last=x[-4:].tolist())
    return dict(numbers, mean=x.mean().item(), std=x.std(correction=0).item())


@torch.no_grad()
def compute(name):
    """The numbers of one network, by the installed diffusers."""
    from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
    from diffusers.schedulers import scheduling_ddpm

    config = CONFIGS[name]
    net = UNet2DModel.from_config(config).eval()
    keys = {k: list(v.shape) for k, v in net.state_dict().items()}
    net.load_state_dict(weights(keys))
    found = dict(keys=keys, params=sum(p.numel() for p in net.parameters()))
    found["output"] = summary(net(images("diffusers", config), torch.tensor(TIMESTEPS)).sample)
    ddpm = {k: v for k, v in SCHEDULER.items() if k != "_class_name"}
    ddim = DDIMScheduler.from_config({**ddpm, "clip_sample": False})
    schedulers = dict(ddim=ddim)
    for kind in ("fixed_small", "fixed_large"):
        schedulers[kind] = DDPMScheduler.from_config({**ddpm, "variance_type": kind})
    for kind, scheduler in schedulers.items():
        x = images("diffusers", config, 2)
        scheduler.set_timesteps(10)
        real, scheduling_ddpm.randn_tensor = scheduling_ddpm.randn_tensor, noises(config)
        try:
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t).sample, t, x).prev_sample
        finally:
            scheduling_ddpm.randn_tensor = real
        found[kind] = summary(x)
    return found


if __name__ == "__main__":
    PATH.write_text(json.dumps({name: compute(name) for name in CONFIGS}) + "\n", encoding="utf-8")
