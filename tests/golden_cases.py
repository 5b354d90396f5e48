"""What is frozen in tests/data/golden.json: settings of small trainings and sampling runs, as data.

Every setting is written out and no preset is named, so that changing a preset changes nothing here.
Only tests/golden_adapter.py knows which of the project's functions compute the numbers.
"""

STEPS = 20
RESUME_AT = 10

# A U-Net of ADM's kind, as small as it gets with every part in use.
NETWORK = dict(image_size=16, in_channels=3, out_channels=3, channels=16, channel_mult=(1, 2))
NETWORK |= dict(res_blocks=1, attention_resolutions=(8,), head_channels=8, norm_groups=8, patch=1)
NETWORK |= dict(scale_shift=True, resblock_updown=True, dropout=0.0)
NETWORK |= dict(time_channels=None, second_head=None)

PLAIN = dict(data="shapes", image_size=16, channels=3, flip=False)
# The system: None (pixels), "sr" with its factor, or "autoencoder"; or on top of another case:
# base (its name) after base_steps steps, as the first stage of latents or the trunk of a head.
PLAIN |= dict(task=None, factor=None, base=None, base_steps=None, head=None)
PLAIN |= dict(T=1000, schedule="linear", continuous=False, prediction="eps", remap=None)
PLAIN |= dict(etsdm=False, etsdm_interval=100, etsdm_n=5, network=NETWORK)
PLAIN |= dict(sa_k=1, sa_weight=1.0, sa_reuse=False, lipschitz_reg=None, kl_weight=None)
PLAIN |= dict(loss_space="eps", train_times=None)
PLAIN |= dict(batch_size=4, microbatch=None, recompute=False, lr=1e-3, beta2=0.99, warmup=10)
PLAIN |= dict(ema=0.9, grad_clip=1.0, seed=0)

# A first stage: latents (4, 8, 8). Groups of 2 channels: alone in its group, a channel's bias has
# no effect.
AUTOENCODER = dict(image_size=16, channels=3, width=8, mult=(1, 2), latent_channels=4)
AUTOENCODER |= dict(res_blocks=1, norm_groups=4)
# What a denoiser has, and an autoencoder has not.
NO_DENOISER = dict.fromkeys(("schedule", "prediction", "loss_space", "sa_weight"), None)
# The other kind of U-Net, SA-DPM's, with 2x2 patches.
PATCHES = dict(dropout=0.3, patch=2, attention_resolutions=(), head_channels=None)
PATCHES |= dict(scale_shift=False, resblock_updown=False)


def train(*spaces, network=None, **changes):
    """PLAIN with changes; spaces: of the prediction and the loss, if they are another."""
    for space in spaces:
        changes |= dict(prediction=space, loss_space=space)
    return PLAIN | changes | dict(network=NETWORK | (network or {}))


def head(kind, size):
    more = dict(base="plain", base_steps=5, sa_weight=0.0, grad_clip=0.0)
    return train(head=kind, network=dict(second_head=size), **more)


IN_LATENTS = dict(image_size=8, in_channels=4, out_channels=4)
# {name: settings}
TRAINING = {
    "plain": PLAIN,
    "sa2": train(sa_k=2),
    "sa2-v": train("v", sa_k=2, grad_clip=0.0),
    "sa3-etsdm": train(sa_k=3, sa_weight=0.5, etsdm=True, seed=1),
    "continuous-v": train("v", schedule="cosine", continuous=True),
    "edm": train("edm", schedule="edm", train_times="lognormal"),
    "zero-terminal-snr": train("v", schedule="zero-terminal-snr", grad_clip=0.0),
    "x0": train("x0", schedule="cosine-shift"),
    "sr2": train("v", task="sr", factor=2, schedule="cosine", network=dict(in_channels=6)),
    "autoencoder": PLAIN
    | dict(task="autoencoder", network=AUTOENCODER, kl_weight=1e-4)
    | NO_DENOISER,
    "latent": train(base="autoencoder", base_steps=5, network=IN_LATENTS),
    "npr": head("npr", "simple"),
    "sn": head("sn", "block"),
    "ddpm-r": train(lipschitz_reg=1e5),
    "sa-reuse": train(sa_k=3, sa_reuse=True),
    "remap": train(remap="sqrt", train_times="remap"),
    "dropout": train(network=PATCHES),
    "flip-microbatch": train(flip=True, microbatch=3, recompute=True),
}
RESUMED = "sa2-v"

# run: of TRAINING, after STEPS steps, its averaged weights. spacing: or a list of times.
# variance: small, large, analytic (of GAMMA_TIMES), npr or sn.
DDIM = dict(run="sa2-v", sampler="ddim", nfe=10, spacing="uniform", eta=0.0, order=3)
DDIM |= dict(t_end=1.0, t_start=None, denoise_to_zero=True, clip=None, variance=None)
DDIM |= dict(s_churn=0.0, s_min=0.0, s_max=float("inf"), s_noise=1.0)
CLIP = dict(clip=(-1.0, 1.0))
DDPM = DDIM | CLIP | dict(run="plain", sampler="ddpm", variance="small")
GRID = [1000.0, 700.5, 401.25, 120.0, 33.3, 2.0]
CHURN = dict(s_churn=4.0, s_min=0.05, s_max=50.0, s_noise=1.003)


def ddim(run="sa2-v", **changes):
    return DDIM | changes | dict(run=run)


def solver(order=3, spacing="uniform", **changes):
    return ddim(sampler="dpm-solver", order=order, spacing=spacing, **changes)


def plus(**changes):
    return ddim(sampler="dpm-solver++", **changes)


def heun(**changes):
    return ddim(sampler="heun", nfe=11, **changes)


# {name: arguments}, of 8 images with seeds 0 to 7
SAMPLES = 8
SAMPLING = {
    "ddpm-small": DDPM,
    "ddpm-large": DDPM | dict(variance="large"),
    "ddpm-unclipped": DDPM | dict(clip=None, run="continuous-v"),
    "ddim": DDIM,
    "ddim-eps": ddim("plain"),
    "ddim-eta": ddim(eta=0.5, **CLIP),
    "ddim-one-call": ddim("continuous-v", nfe=1),
    "ddim-quadratic": ddim(spacing="quadratic"),
    "ddim-t-end": ddim(t_end=10.0, denoise_to_zero=False, t_start=900.0),
    "ddim-grid": ddim(spacing=GRID),
    "ddim-analytic": ddim("plain", variance="analytic", **CLIP),
    "ddpm-analytic": DDPM | dict(variance="analytic"),
    "ddpm-npr": DDPM | dict(variance="npr", run="npr"),
    "ddim-sn": ddim("sn", variance="sn", eta=0.5, **CLIP),
    "ddpm-latent": DDPM | dict(run="latent", clip=None),
    "ddim-sr2": ddim("sr2"),
    "ddim-etsdm": ddim("sa3-etsdm"),
    "ddim-zero-terminal-snr": ddim("zero-terminal-snr"),
    "ddim-remap": ddim("remap"),
    "ddim-x0": ddim("x0"),
    **{f"dpm-solver-{n}-{s}": solver(n, s) for n in (1, 2, 3) for s in ("uniform", "logsnr")},
    "dpm-solver-3-etsdm": solver(3, "logsnr", run="sa3-etsdm"),
    "dpm-solver-2-continuous": solver(2, t_start=950.0, run="continuous-v"),
    "dpm-solver++": plus(),
    "dpm-solver++-long": plus(nfe=13, run="continuous-v"),
    "dpm-solver++-zero-terminal-snr": plus(run="zero-terminal-snr"),
    "heun": heun(),
    "heun-edm": heun(run="edm"),
    "heun-edm-churn": heun(run="edm", **CHURN),
}

# The measurements: of the same runs, on 8 of the built-in shapes.
GAMMA_TIMES = [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]  # those of ddim, nfe = 10
LIPSCHITZ = {
    "plain": dict(run="plain", ts=[0, 1, 19, 20, 99, 100, 500, 900], dt=20),
    "etsdm": dict(run="sa3-etsdm", ts=[0, 1, 19, 20, 99, 100, 500, 900], dt=20),
    "continuous": dict(run="continuous-v", ts=[0, 0.5, 10, 250.25], dt=5.5),
    "edm": dict(run="edm", ts=[1, 10, 250, 900], dt=20),
}
PERTURBED = dict(run="plain", scales=[0, 0.1, 0.3], t=100)
WEIGHT_SCHEDULES = [("linear", False), ("cosine", False), ("cosine-mns", True), ("edm", True)]
GAPS = {
    "ddpm": dict(run="plain", points=12, eta=1.0),
    "ddim": dict(run="continuous-v", points=12, eta=0.0),
    "edm": dict(run="edm", points=12, eta=1.0),
}
