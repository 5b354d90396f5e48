"""What is frozen in tests/data/golden.json: settings of small trainings and sampling runs, as data.

Every setting is written out and no preset is named, so that changing a preset changes nothing here.
Only tests/golden_adapter.py knows which of the project's functions compute the numbers.
"""

STEPS = 20
RESUME_AT = 10

# A U-Net of ADM's kind, as small as it gets with every part in use.
NETWORK = dict(
    image_size=16,
    in_channels=3,
    out_channels=3,
    channels=16,
    channel_mult=(1, 2),
    res_blocks=1,
    attention_resolutions=(8,),
    head_channels=8,
    dropout=0.0,
    time_channels=None,
    scale_shift=True,
    resblock_updown=True,
    norm_groups=8,
    patch=1,
    second_head=None,
)

PLAIN = dict(
    # images
    data="shapes",
    image_size=16,
    channels=3,
    flip=False,
    # the system: None (pixels), "sr" with its factor, or "autoencoder"; or on top of another case:
    # base (its name) after base_steps steps, as the first stage of latents or the trunk of a head
    task=None,
    factor=None,
    base=None,
    base_steps=None,
    head=None,
    # model
    T=1000,
    schedule="linear",
    continuous=False,
    prediction="eps",
    etsdm=False,
    etsdm_interval=100,
    etsdm_n=5,
    remap=None,
    network=NETWORK,
    # loss
    sa_k=1,
    sa_weight=1.0,
    sa_reuse=False,
    loss_space="eps",
    train_times=None,
    lipschitz_reg=None,
    kl_weight=None,
    # training
    batch_size=4,
    microbatch=None,
    recompute=False,
    lr=1e-3,
    beta2=0.99,
    warmup=10,
    ema=0.9,
    grad_clip=1.0,
    seed=0,
)

# A first stage: latents (4, 8, 8).
AUTOENCODER = dict(
    image_size=16,
    channels=3,
    width=8,
    mult=(1, 2),
    latent_channels=4,
    res_blocks=1,
    norm_groups=4,  # 2 channels each: alone in its group, a channel's bias has no effect
)

# {name: settings}
TRAINING = {
    "plain": PLAIN,
    "sa2": {**PLAIN, "sa_k": 2},
    "sa2-v": {**PLAIN, "sa_k": 2, "prediction": "v", "loss_space": "v", "grad_clip": 0.0},
    "sa3-etsdm": {**PLAIN, "sa_k": 3, "sa_weight": 0.5, "etsdm": True, "seed": 1},
    "continuous-v": {
        **PLAIN,
        "schedule": "cosine",
        "continuous": True,
        "prediction": "v",
        "loss_space": "v",
    },
    "edm": {
        **PLAIN,
        "schedule": "edm",
        "prediction": "edm",
        "loss_space": "edm",
        "train_times": "lognormal",
    },
    "zero-terminal-snr": {
        **PLAIN,
        "schedule": "zero-terminal-snr",
        "prediction": "v",
        "loss_space": "v",
        "grad_clip": 0.0,
    },
    "x0": {**PLAIN, "schedule": "cosine-shift", "prediction": "x0", "loss_space": "x0"},
    "sr2": {
        **PLAIN,
        "task": "sr",
        "factor": 2,
        "schedule": "cosine",
        "prediction": "v",
        "loss_space": "v",
        "network": {**NETWORK, "in_channels": 6},
    },
    "autoencoder": {
        **PLAIN,
        "task": "autoencoder",
        "network": AUTOENCODER,
        "kl_weight": 1e-4,
        # what a denoiser has, and an autoencoder has not
        **dict.fromkeys(("schedule", "prediction", "loss_space", "sa_weight"), None),
    },
    "latent": {
        **PLAIN,
        "base": "autoencoder",
        "base_steps": 5,
        "network": {**NETWORK, "image_size": 8, "in_channels": 4, "out_channels": 4},
    },
    "npr": {
        **PLAIN,
        "head": "npr",
        "base": "plain",
        "base_steps": 5,
        "sa_weight": 0.0,
        "grad_clip": 0.0,
        "network": {**NETWORK, "second_head": "simple"},
    },
    "sn": {
        **PLAIN,
        "head": "sn",
        "base": "plain",
        "base_steps": 5,
        "sa_weight": 0.0,
        "grad_clip": 0.0,
        "network": {**NETWORK, "second_head": "block"},
    },
    "ddpm-r": {**PLAIN, "lipschitz_reg": 1e5},
    "sa-reuse": {**PLAIN, "sa_k": 3, "sa_reuse": True},
    "remap": {**PLAIN, "remap": "sqrt", "train_times": "remap"},
    # The other kind of U-Net, SA-DPM's, with 2x2 patches.
    "dropout": {
        **PLAIN,
        "network": {
            **NETWORK,
            "dropout": 0.3,
            "patch": 2,
            "attention_resolutions": (),
            "head_channels": None,
            "scale_shift": False,
            "resblock_updown": False,
        },
    },
    "flip-microbatch": {**PLAIN, "flip": True, "microbatch": 3, "recompute": True},
}
RESUMED = "sa2-v"

DDIM = dict(
    run="sa2-v",  # of TRAINING, after STEPS steps, its averaged weights
    sampler="ddim",
    nfe=10,
    spacing="uniform",  # or a list of times
    eta=0.0,
    order=3,
    t_end=1.0,
    t_start=None,
    denoise_to_zero=True,
    clip=None,
    variance=None,  # small, large, analytic (of GAMMA_TIMES), npr or sn
    s_churn=0.0,
    s_min=0.0,
    s_max=float("inf"),
    s_noise=1.0,
)
DDPM = {**DDIM, "run": "plain", "sampler": "ddpm", "variance": "small", "clip": (-1.0, 1.0)}
SOLVER = {**DDIM, "sampler": "dpm-solver"}

# {name: arguments}, of 8 images with seeds 0 to 7
SAMPLES = 8
SAMPLING = {
    "ddpm-small": DDPM,
    "ddpm-large": {**DDPM, "variance": "large"},
    "ddpm-unclipped": {**DDPM, "clip": None, "run": "continuous-v"},
    "ddim": DDIM,
    "ddim-eps": {**DDIM, "run": "plain"},
    "ddim-eta": {**DDIM, "eta": 0.5, "clip": (-1.0, 1.0)},
    "ddim-one-call": {**DDIM, "nfe": 1, "run": "continuous-v"},
    "ddim-quadratic": {**DDIM, "spacing": "quadratic"},
    "ddim-t-end": {**DDIM, "t_end": 10.0, "denoise_to_zero": False, "t_start": 900.0},
    "ddim-grid": {**DDIM, "spacing": [1000.0, 700.5, 401.25, 120.0, 33.3, 2.0]},
    "ddim-analytic": {**DDIM, "run": "plain", "variance": "analytic", "clip": (-1.0, 1.0)},
    "ddpm-analytic": {**DDPM, "variance": "analytic"},
    "ddpm-npr": {**DDPM, "variance": "npr", "run": "npr"},
    "ddim-sn": {**DDIM, "variance": "sn", "run": "sn", "eta": 0.5, "clip": (-1.0, 1.0)},
    "ddpm-latent": {**DDPM, "run": "latent", "clip": None},
    "ddim-sr2": {**DDIM, "run": "sr2"},
    "ddim-etsdm": {**DDIM, "run": "sa3-etsdm"},
    "ddim-zero-terminal-snr": {**DDIM, "run": "zero-terminal-snr"},
    "ddim-remap": {**DDIM, "run": "remap"},
    "ddim-x0": {**DDIM, "run": "x0"},
    **{
        f"dpm-solver-{order}-{spacing}": {**SOLVER, "order": order, "spacing": spacing}
        for order in (1, 2, 3)
        for spacing in ("uniform", "logsnr")
    },
    "dpm-solver-3-etsdm": {**SOLVER, "spacing": "logsnr", "run": "sa3-etsdm"},
    "dpm-solver-2-continuous": {**SOLVER, "order": 2, "t_start": 950.0, "run": "continuous-v"},
    "dpm-solver++": {**DDIM, "sampler": "dpm-solver++"},
    "dpm-solver++-long": {**DDIM, "sampler": "dpm-solver++", "nfe": 13, "run": "continuous-v"},
    "dpm-solver++-zero-terminal-snr": {
        **DDIM,
        "sampler": "dpm-solver++",
        "run": "zero-terminal-snr",
    },
    "heun": {**DDIM, "sampler": "heun", "nfe": 11},
    "heun-edm": {**DDIM, "sampler": "heun", "nfe": 11, "run": "edm"},
    "heun-edm-churn": {
        **DDIM,
        "sampler": "heun",
        "nfe": 11,
        "run": "edm",
        "s_churn": 4.0,
        "s_min": 0.05,
        "s_max": 50.0,
        "s_noise": 1.003,
    },
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
