r"""What a run is: one flat dataclass whose fields are the flags of train.py, and the presets.

    config = parse_into(Config, ["--preset", "cifar10", "--sa-k", "2"])
    config.settings()        # plain values: config.json and checkpoint.pt hold them

A preset only changes defaults: the command line always wins. check() runs once, before anything is
built. The programs in papers/ subclass Config and add their own fields.

Not here: parsing (support/cli.py), building networks (unet.py), reading images (data.py).

    python -c "import config; print(config.RECIPES['cifar10'])"
"""

import functools
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

import etsdm
import schedules
import unet
from support.cli import device_flag, flag, flag_name, require
from support.run import check_run_name, run_name, settings_of

PREDICTIONS = LOSS_SPACES = ("eps", "v", "x0", "edm")
INHERITED = ("image_size", "channels", "schedule", "continuous", "betas", "prediction", "dropout",
             "etsdm", "etsdm_interval", "etsdm_n")  # by --init; flags change all but the first two

# How each preset is trained: SA-DPM's configuration files (epochs as images), E-TSDM's table A1,
# which gives no length: 48 M is ours. SA-DPM's loss is a sum over C·H·W numbers and ours is their
# mean. So we divide its clip of 1 and Adam's ε of 1e-8 by C·H·W. All gradients exceed this clip.
PAPER = dict(schedule="linear", prediction="eps", lr=2e-4, beta2=0.999, ema=0.9999, grad_clip=1.0,
             sample_every=5000, save_every=1000, optimizer="adam", lr_decay="none")
LARGE = dict(PAPER, lr=1e-4, grad_clip=0.0, flip=True)  # flips are DDPM's, which E-TSDM follows
SUM = {n: dict(grad_clip=1 / n, adam_eps=1e-8 / n) for n in (3072, 12288)}
RECIPES = {
    # Ours, for two minutes on a CPU. In this time, eps on linear gives fog, Adam grainy shapes.
    "tiny": dict(PAPER, batch_size=24, images=14_880, schedule="cosine", prediction="v", ema=0.95,
                 optimizer="muon", muon_momentum=0.9, lr=1e-2, lr_decay="linear", beta2=0.99,
                 warmup=20, sample_every=620, save_every=310),
    "cifar10": dict(PAPER, batch_size=128, images=60_000_000, **SUM[3072]),
    "celeba64": dict(PAPER, batch_size=128, images=195_000_000, flip=True, **SUM[12288]),
    "celebahq256": dict(PAPER, batch_size=24, images=24_000_000, lr=2e-5, ema=0.999, grad_clip=0.0,
                        adam_eps=1e-8 / 196608),
    # microbatch: what an 80 GB card holds (python -m benchmarks memory), a divisor of the batch
    "ffhq256": dict(LARGE, batch_size=96, images=48_000_000, microbatch=24),
    "ffhq256-large": dict(LARGE, batch_size=64, images=48_000_000, microbatch=8),
    "adm256": dict(LARGE, flip=False, batch_size=256, images=128_000_000, microbatch=8),
}


by_preset = functools.partial(flag, shown="the preset's")  # which is in RECIPES or unet.PRESETS

@dataclass
class Config:
    data: str = flag("shapes", "shapes (built in), cifar10, or a path: folder or zip of images, "
                     ".npy, .npz[:KEY], MNIST-like IDX, CIFAR-10 archive", group="images")
    image_size: int | None = by_preset(None, "side in pixels; images are resized and cropped",
                                       above=0, below=8193)
    channels: int = flag(3, "3: RGB; 1: one gray channel", choices=(1, 3))
    flip: bool = by_preset(False, "random horizontal flips")
    skip_bad_images: bool = flag(False, "continue without files that cannot be read", resume=True)
    workers: int = flag(2, "threads that decode images not kept in memory", resume=True, low=0)

    preset: str = flag("tiny", "network and recipe", choices=tuple(unet.PRESETS), group="model")
    init: str = flag("", "new run with the network and averaged weights of RUN; --preset: recipe",
                     metavar="RUN", resume=True)
    base: dict | None = None  # the settings of the --init run
    schedule: str = by_preset("linear", "noise schedule: " + ", ".join(schedules.SCHEDULES),
                              choices=schedules.SCHEDULES, metavar="NAME")
    continuous: bool = flag(False, "real-valued t, schedule in closed form")
    betas: tuple[float, float] | None = flag(None, "beta_1, beta_T", nargs=2, shown="1e-4 0.02")
    prediction: str = by_preset("eps", "network output (schedule edm: edm; zero-terminal-snr: v)",
                                choices=PREDICTIONS)
    etsdm: bool = flag(False, "E-TSDM: share the time input near t = 0")
    etsdm_interval: float = flag(100.0, "... below this t")
    etsdm_n: int = flag(5, "... in this many equal parts")
    dropout: float | None = by_preset(None, "share of activations set to 0 in training", low=0,
                                      below=1)

    sa_k: int = flag(1, "SA-DPM: train k consecutive steps together; 1 is the plain loss",
                     group="loss")
    sa_weight: float = flag(1.0, "SA-DPM: weight of the sequence-aware loss", low=0)
    loss_space: str | None = flag(None, "quantity that the plain loss measures",
                                  choices=LOSS_SPACES, shown="that of --prediction")
    train_times: str | None = flag(None, "distribution of t: uniform, or log-normal in the noise "
                                   "level", choices=("uniform", "lognormal"),
                                   shown="uniform; lognormal for --schedule edm")

    batch_size: int = by_preset(32, "global: over all processes", group="training", above=0)
    microbatch: int | None = flag(None, "images per forward pass of a process; gradients add up",
                                  resume=True, low=1, shown="the preset's / --sa-k, or all")
    recompute: bool = flag(False, "activation checkpointing: a fraction of the memory, a third "
                           "more time, the same gradients", resume=True)
    images: int = by_preset(41_600, "train until this many were seen", resume=True, above=0)
    steps: int = flag(0, "the same as --images STEPS x BATCH_SIZE", shown="--images", resume=True)
    optimizer: str = by_preset("adam", "adam, as in both papers; muon: orthogonalised momentum for "
                               "weight matrices, Adam for the rest", choices=("adam", "muon"))
    lr: float = by_preset(2e-4, "learning rate of Adam", resume=True, above=0)
    muon_lr: float = flag(0.02, "muon: learning rate of matrices", resume=True, above=0)
    muon_momentum: float = by_preset(0.95, "muon: matrices' momentum", resume=True, low=0, below=1)
    lr_decay: str = by_preset("none", "how the learning rates fall to 0 at the end of the run",
                              choices=("none", "linear", "cosine"))
    beta2: float = by_preset(0.999, "Adam's beta2", low=0, below=1)
    adam_eps: float = by_preset(1e-8, "Adam's epsilon", resume=True, above=0)
    warmup: int = by_preset(0, "steps over which the learning rate rises from 0", low=0)
    ema: float = by_preset(0.9999, "decay of the averaged weights", low=0, below=1)
    grad_clip: float = by_preset(1.0, "largest gradient norm; 0: no clipping", resume=True, low=0)
    precision: str = flag("auto", "auto: bf16 if the hardware has units for it",
                          choices=("auto", "fp32", "bf16"), resume=True)
    device: str = device_flag()
    compile: bool | None = flag(None, "torch.compile the network", resume=True, shown="for cuda")
    deterministic: bool = flag(False, "the same bits again on GPUs too (CPUs give them always), "
                               "by slower algorithms", resume=True)
    seed: int = flag(0, "of weights, order of images and noise", low=0, below=2**62)

    name: str = flag("", "folder under runs/", group="run",
                     shown="made of data, preset and methods")
    sample_every: int = by_preset(5000, "steps between sample grids", resume=True, above=0)
    save_every: int = by_preset(1000, "steps between checkpoints", resume=True, above=0)
    save_minutes: float = flag(10.0, "... or minutes, if they pass first", resume=True, low=0)

    T: ClassVar[int] = 1000
    prog: ClassVar[str] = "train.py"
    usage: ClassVar[str] = "torchrun train.py [flags]"
    description: ClassVar[str] = "Train a diffusion model. The same command again resumes the run."
    examples: ClassVar[str] = """\
  torchrun train.py --sa-k 2
      the built-in shapes: a tiny network, a few minutes on two CPU cores; then: python sample.py
  torchrun train.py --sa-k 2 --etsdm --data photos/ --image-size 64 --preset celeba64
      your own pictures (a folder or zip, searched recursively), both papers' methods together
  torchrun --nproc_per_node 8 train.py --preset cifar10 --data cifar10 --sa-k 2
      the SA paper's CIFAR-10 model on 8 GPUs; --batch-size stays the global batch

Super-resolution, latent diffusion, variance heads and the alternatives to E-TSDM are programs of
papers/."""

    @classmethod
    def recipe(cls, given: dict) -> dict:
        """Defaults that depend on the flags `given`: --preset, --init, --schedule and others."""
        base = settings_of(given["init"], "init") if given.get("init") else {}
        if any(base.get(k) for k in ("autoencoder", "factor", "latent", "remap", "head")):
            raise ValueError(f"--init {given['init']} is neither a model of train.py nor imported")
        preset = given.get("preset", base.get("preset", "tiny"))
        net, values = unet.PRESETS[preset], dict(RECIPES[preset])
        values.update(image_size=net["image_size"], dropout=net.get("dropout", 0.0), preset=preset)
        values.update({k: base[k] for k in INHERITED if k in base}, base=base or None)
        schedule = given.get("schedule", values["schedule"])
        if schedule in ("edm", "zero-terminal-snr") and not base:  # eps does not suit them
            values["prediction"] = "edm" if schedule == "edm" else "v"
        values["loss_space"] = given.get("prediction", values["prediction"])
        values["train_times"] = "lognormal" if schedule == "edm" else "uniform"
        if "microbatch" in values:  # one pass holds each image k times
            values["microbatch"] = max(1, values["microbatch"] // max(1, given.get("sa_k", 1)))
        if given.get("steps", 0) > 0:
            values["images"] = given["steps"] * given.get("batch_size", values["batch_size"])
        return values

    def check(self) -> None:
        """ValueError for flags that contradict or would have no effect. Fill in the run's name."""
        if {"steps", "images"} <= self.given:
            raise ValueError("--steps and --images both set the length: give one")
        require(self, "steps", "steps" not in self.given or self.steps > 0, "must be above 0")
        self.check_divisible()
        require(self, "images", self.images >= self.batch_size,
                f"must be at least one batch, --batch-size {self.batch_size}")
        require(self, "sa_k", 1 <= self.sa_k <= self.T, f"must be 1 to {self.T}")
        edm, adam = self.schedule == "edm", self.optimizer == "adam"
        for names, useless, why in (
                ("sa_weight", self.sa_k == 1, "requires --sa-k 2 or more"),
                ("etsdm_interval etsdm_n", not self.etsdm, "has no effect without --etsdm"),
                ("betas", self.schedule.startswith(("cos", "edm")), "needs another --schedule"),
                ("muon_lr muon_momentum", adam, "has no effect without --optimizer muon"),
                ("continuous", edm, "has no effect with --schedule edm, which is continuous"),
                ("image_size channels", self.init,
                 f"is that of --init {self.init}: leave it out")):
            if useless and (given := [name for name in names.split() if name in self.given]):
                raise ValueError(f"{flag_name(given[0])} {why}")
        if self.etsdm:
            etsdm.check_sharing(self.etsdm_interval, self.etsdm_n, self.T)
        if edm and self.prediction != "edm":
            raise ValueError(f"--prediction {self.prediction} cannot go with --schedule edm")
        self.name = self.name or self.default_name()
        check_run_name(self.name)

    def check_divisible(self) -> None:
        """ValueError if the network cannot halve the images as often as it must."""
        net = self.network()
        unit = net.get("patch", 1) * 2 ** (len(net["channel_mult"]) - 1)
        require(self, "image_size", net["image_size"] % unit == 0,
                f"must be a multiple of {unit} for --preset {self.preset}")

    def network(self) -> dict:
        """The arguments of unet.UNet."""
        if self.base:
            return dict(self.base["unet"], dropout=self.dropout)
        return dict(unet.PRESETS[self.preset], image_size=self.image_size, dropout=self.dropout,
                    in_channels=self.channels, out_channels=self.channels)

    def settings(self) -> dict:
        """The run as a flat dict of plain values. denoiser.build_denoiser() reads it back."""
        own, base = {**asdict(self), "T": self.T, "unet": self.network()}, self.base or {}
        del own["base"]
        return {**own, **{k: base[k] for k in ("T", "imported") if k in base}}

    def may_change(self) -> set[str]:
        """Names of settings that may differ when a run resumes. A digest identifies the images."""
        names = {f.name for f in fields(self) if f.metadata.get("resume")}
        return names | {"data", "name", "steps"}

    def name_parts(self) -> list[str]:
        """What distinguishes a run at a glance, so that the same command finds it again."""
        recipe = RECIPES[self.preset]
        usual_times = "lognormal" if self.schedule == "edm" else "uniform"
        parts = [self.preset] + [f"from-{run_name(self.init)}"] * bool(self.init)
        parts += dict.fromkeys(  # once, if both are edm
            getattr(self, k) for k in ("schedule", "prediction") if getattr(self, k) != recipe[k])
        parts += ["continuous"] * self.continuous + [f"sa{self.sa_k}"] * (self.sa_k > 1)
        parts += ["etsdm"] * self.etsdm + [self.optimizer] * (self.optimizer != recipe["optimizer"])
        parts += [f"{self.lr_decay}-decay"] * (self.lr_decay != recipe["lr_decay"])
        return parts + [f"{self.train_times}-times"] * (self.train_times != usual_times)

    def default_name(self) -> str:
        parts = [Path(self.data.split(":")[0]).stem.lstrip(".") or "images", *self.name_parts()]
        return "-".join([p for p in parts if p] + [f"seed{self.seed}"] * bool(self.seed))

    def next_command(self) -> str:
        """What to type after training."""
        return f"python sample.py {shlex.quote(self.name)}"

    def warnings(self, dataset, world_size: int) -> list[str]:
        """Lines about settings that are valid but probably unintended."""
        b, steps = self.batch_size // world_size, self.images // self.batch_size
        return [line for unusual, line in (
            (self.prediction == "eps" and self.schedule == "zero-terminal-snr",
             f"--prediction eps has no x_0 at t = {self.T}, where alpha_bar = 0: training and "
             f"sampling begin at t = {self.T - 1}"),
            (self.sa_k > 1 and not self.sa_weight,
             f"--sa-weight 0 leaves only the plain loss, also for --sa-k {self.sa_k}"),
            (self.etsdm and self.etsdm_n == self.etsdm_interval
             and not (self.continuous or self.schedule == "edm"),
             f"--etsdm-n {self.etsdm_n} gives each timestep its own part: nothing is shared"),
            ("microbatch" in self.given and self.microbatch >= b,
             f"--microbatch {self.microbatch} has no effect: a process has {b} images"),
            ("images" in self.given and self.images % self.batch_size,
             f"--images {self.images} are {steps} whole batches, {steps * self.batch_size} images"),
            (self.warmup >= steps,
             f"--warmup: the learning rate rises over {self.warmup} steps, the run has {steps}"),
            ("workers" in self.given and not dataset.streamed,
             "--workers has no effect: the images are in memory or generated"),
            (self.skip_bad_images and not getattr(dataset, "paths", None),
             "--skip-bad-images has no effect: the images are not files")) if unusual]
