r"""What a run is: one flat dataclass whose fields are the flags of train.py, and the presets.

    config = parse_into(Config, ["--preset", "cifar10", "--sa-k", "2"])
    config.settings()        # plain values: config.json and checkpoint.pt hold them

A preset only changes defaults: what the command line says always wins. Everything is checked once,
in check(), before anything is opened or built. The programs in papers/ subclass Config and add
their own fields.

Not here: parsing (support/cli.py), building networks (unet.py), reading images (data.py).

    python -c "import config; print(config.RECIPES['cifar10'])"
"""

import math
import shlex
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import ClassVar

import etsdm
import schedules
import unet
from support.checkpoint import RUNS
from support.cli import flag, flag_name

PREDICTIONS = ("eps", "v", "x0", "edm")
LOSS_SPACES = PREDICTIONS
TIME_DISTRIBUTIONS = ("uniform", "lognormal")

# How each preset is trained. The papers': SA-DPM's configuration files (epochs turned into images
# seen) and E-TSDM's table A1, which gives no length: 48 M is ours. loss_space None: that of the
# prediction.
PAPER = dict(schedule="linear", prediction="eps", loss_space="eps", lr=2e-4, beta2=0.999,
             ema=0.9999, grad_clip=1.0, warmup=0, flip=False, sample_every=5000, save_every=1000)
RECIPES = {
    # Ours, for minutes on a CPU. v-prediction, cosine schedule: eps on the linear one still gives
    # coloured fog after the same minutes (docs/lab-notebook.md).
    "tiny": dict(PAPER, batch_size=32, images=41_600, schedule="cosine", prediction="v",
                 loss_space=None, lr=2e-3, beta2=0.99, ema=0.995, warmup=100, sample_every=650,
                 save_every=200),
    "cifar10": dict(PAPER, batch_size=128, images=60_000_000),
    "celeba64": dict(PAPER, batch_size=128, images=195_000_000, flip=True),
    "celebahq256": dict(PAPER, batch_size=24, images=24_000_000, lr=2e-5, ema=0.999, grad_clip=0.0),
    "ffhq256": dict(PAPER, batch_size=96, images=48_000_000, lr=1e-4, grad_clip=0.0),
    "ffhq256-large": dict(PAPER, batch_size=64, images=48_000_000, lr=1e-4, grad_clip=0.0),
    "adm256": dict(PAPER, batch_size=256, images=128_000_000, lr=1e-4, grad_clip=0.0),
}


@dataclass
class Config:
    data: str = flag("shapes", "shapes (built in), cifar10, or a path: folder or zip of images, "
                     ".npy, .npz[:KEY], MNIST-like IDX, CIFAR-10 archive", group="images")
    image_size: int | None = flag(None, "side in pixels; images are resized and cropped",
                                  shown="the preset's")
    channels: int = flag(3, "3 RGB, 1 true gray", choices=(1, 3))
    flip: bool = flag(False, "random horizontal flips", shown="the preset's")
    skip_bad_images: bool = flag(False, "continue without files that cannot be read", resume=True)
    workers: int = flag(2, "threads that decode images which do not fit in memory", resume=True)

    preset: str = flag("tiny", "network and recipe", choices=tuple(unet.PRESETS), group="model")
    schedule: str = flag("linear", "noise schedule: " + ", ".join(schedules.SCHEDULES),
                         choices=schedules.SCHEDULES, metavar="NAME", shown="the preset's")
    continuous: bool = flag(False, "real-valued t, schedule in closed form")
    prediction: str = flag("eps", "what the network predicts", choices=PREDICTIONS,
                           shown="the preset's")
    etsdm: bool = flag(False, "E-TSDM: share the time input near t = 0")
    etsdm_interval: float = flag(100.0, "... below this t")
    etsdm_n: int = flag(5, "... in this many equal parts")
    dropout: float | None = flag(None, "share of activations set to 0 in training",
                                 shown="the preset's")

    sa_k: int = flag(1, "SA-DPM: train k consecutive steps together; 1 is the plain loss",
                     group="loss")
    sa_weight: float = flag(1.0, "SA-DPM: weight of the sequence-aware loss")
    loss_space: str | None = flag(None, "quantity that the plain loss measures",
                                  choices=LOSS_SPACES, shown="the preset's")
    train_times: str | None = flag(None, "distribution of t: uniform, or log-normal in the noise "
                                   "level", choices=TIME_DISTRIBUTIONS,
                                   shown="uniform; lognormal for --schedule edm")

    batch_size: int = flag(32, "global: over all processes", group="training",
                           shown="the preset's")
    microbatch: int | None = flag(None, "images per forward pass of a process; gradients add up",
                                  resume=True)
    recompute: bool = flag(False, "activation checkpointing: a fraction of the memory, a third "
                           "more time, the same gradients", resume=True)
    images: int = flag(41_600, "train until this many were seen", resume=True,
                       shown="the preset's")
    steps: int = flag(0, "the same as --images STEPS x BATCH_SIZE", resume=True)
    optimizer: str = flag("adam", "adam, as the papers; muon: orthogonalised momentum for weight "
                          "matrices, Adam for the rest", choices=("adam", "muon"))
    lr: float = flag(2e-4, "Adam's learning rate", resume=True, shown="the preset's")
    muon_lr: float = flag(0.02, "with --optimizer muon: the learning rate of matrices", resume=True)
    lr_decay: str = flag("none", "how the learning rates fall to 0 at the end of the run",
                         choices=("none", "linear", "cosine"))
    beta2: float = flag(0.999, "Adam's beta2", shown="the preset's")
    warmup: int = flag(0, "steps over which the learning rate rises from 0", shown="the preset's")
    ema: float = flag(0.9999, "decay of the averaged weights", shown="the preset's")
    grad_clip: float = flag(1.0, "largest gradient norm; 0: no clipping", resume=True,
                            shown="the preset's")
    precision: str = flag("auto", "auto: bf16 if the hardware has units for it",
                          choices=("auto", "fp32", "bf16"), resume=True)
    compile: bool = flag(False, "torch.compile the network", resume=True)
    deterministic: bool = flag(False, "the same bits again on GPUs too (CPUs give them always), "
                               "by slower algorithms", resume=True)
    seed: int = flag(0, "of weights, order of images and noise")

    name: str = flag("", "folder under runs/", group="run",
                     shown="made of data, preset and methods")
    sample_every: int = flag(5000, "steps between sample grids", resume=True,
                             shown="the preset's")
    save_every: int = flag(1000, "steps between checkpoints", resume=True, shown="the preset's")

    T: ClassVar[int] = 1000
    prog: ClassVar[str] = "train.py"
    usage: ClassVar[str] = "torchrun train.py [flags]"
    description: ClassVar[str] = ("Train a diffusion model on images. The same command again "
                                  "resumes the run.")
    examples: ClassVar[str] = """\
  torchrun train.py --sa-k 2
      the built-in shapes: a tiny network, a few minutes on two CPU cores; then: python sample.py
  torchrun train.py --sa-k 2 --etsdm --data photos/ --image-size 64 --preset celeba64
      your own pictures (a folder or zip, searched recursively), both papers' methods together
  torchrun --nproc_per_node 8 train.py --preset cifar10 --data cifar10 --sa-k 2 --steps 400000
      the SA paper's CIFAR-10 model on 8 GPUs; --batch-size stays the global batch
  python train.py --schedule edm --etsdm
      EDM: its schedule, preconditioning, loss and noise levels; sample with --sampler heun

Super-resolution, latent diffusion, variance heads and the alternatives to E-TSDM are programs of
papers/. The presets: python -c "import config; print(config.RECIPES)\""""

    @classmethod
    def recipe(cls, given):
        """The defaults that follow from the typed flags `given`: the preset's, and others'."""
        preset = given.get("preset", "tiny")
        net, values = unet.PRESETS[preset], dict(RECIPES[preset])
        values.update(image_size=net["image_size"], dropout=net.get("dropout", 0.0))
        schedule = given.get("schedule", values["schedule"])
        if schedule in ("edm", "zero-terminal-snr"):  # eps has no x_0 at t = T of the latter
            values["prediction"] = "edm" if schedule == "edm" else "v"
        prediction = given.get("prediction", values["prediction"])
        # The papers measure eps, and so do their presets. But eps's residual is alpha times v's:
        # nothing would be learnt where alpha = 0.
        if values["loss_space"] is None or prediction == "edm" or schedule == "zero-terminal-snr":
            values["loss_space"] = prediction
        values["train_times"] = "lognormal" if schedule == "edm" else "uniform"
        if given.get("steps", 0) > 0:
            values["images"] = given["steps"] * given.get("batch_size", values["batch_size"])
        return values

    def check(self):
        """Raise ValueError for values out of range, and for flags that contradict or would have no
        effect. Fill in the run's name."""
        if {"steps", "images"} <= self.given:
            raise ValueError("--steps and --images both set the length: give one")
        if "steps" in self.given and self.steps < 1:
            raise ValueError(f"--steps must be above 0, not {self.steps}")
        if "muon_lr" in self.given and self.optimizer != "muon":
            raise ValueError("--muon-lr has no effect without --optimizer muon")
        for name in ("batch_size", "images", "lr", "muon_lr", "sample_every", "save_every",
                     "image_size"):
            self.require(name, 0 < getattr(self, name) < math.inf, "must be above 0")
        for name in ("warmup", "workers", "seed", "grad_clip", "sa_weight"):
            self.require(name, 0 <= getattr(self, name) < math.inf, "must be 0 or more")
        self.require("image_size", self.image_size <= 8192, "must be at most 8192 pixels")
        self.check_divisible()
        self.require("seed", self.seed < 2**62, "must be below 2^62")
        self.require("ema", 0 <= self.ema < 1, "must be at least 0 and below 1")
        self.require("beta2", 0 <= self.beta2 < 1, "must be at least 0 and below 1")
        self.require("dropout", 0 <= (self.dropout or 0) < 1, "must be at least 0 and below 1")
        self.require("microbatch", (self.microbatch or 1) >= 1, "must be at least 1")
        self.require("images", self.images >= self.batch_size,
                     f"is less than one batch of {self.batch_size}")
        processes = os.environ.get("WORLD_SIZE", "1")  # torchrun's
        self.require("batch_size", not processes.isdecimal()
                     or self.batch_size % max(int(processes), 1) == 0,
                     f"is global and must be divisible by the {processes} processes")
        self.require("sa_k", 1 <= self.sa_k <= self.T, f"must be 1 to {self.T}")
        if self.sa_k == 1 and "sa_weight" in self.given:
            raise ValueError("--sa-weight requires --sa-k 2 or more")
        for name in ("etsdm_interval", "etsdm_n"):
            if name in self.given and not self.etsdm:
                raise ValueError(f"{flag_name(name)} has no effect without --etsdm")
        if self.etsdm:
            etsdm.check_sharing(self.etsdm_interval, self.etsdm_n, self.T)
        if self.schedule == "edm" and self.prediction != "edm":
            raise ValueError(f"--prediction {self.prediction} cannot go with --schedule edm, whose "
                             "x_t is up to 80 wide: leave it out")
        if self.schedule == "edm" and self.continuous:
            raise ValueError("--continuous has no effect with --schedule edm, which is continuous: "
                             "leave it out")
        self.name = self.name or self.default_name()
        if (Path(self.name).name != self.name or self.name[0] == "."
                or not self.name.isprintable()):
            raise ValueError(f"--name {self.name!r} must be a plain name: runs go to {RUNS}/NAME")

    def check_divisible(self):
        """ValueError if the network cannot halve the images as often as it must."""
        net = self.network()
        unit = net.get("patch", 1) * 2 ** (len(net["channel_mult"]) - 1)
        self.require("image_size", net["image_size"] % unit == 0,
                     f"must be a multiple of {unit} for --preset {self.preset}")

    def require(self, name, condition, text):
        """ValueError that begins with the flag, unless the condition holds."""
        if not condition:
            raise ValueError(f"{flag_name(name)} {text}, not {getattr(self, name)}")

    def network(self):
        """The arguments of unet.UNet."""
        return dict(unet.PRESETS[self.preset], image_size=self.image_size, dropout=self.dropout,
                    in_channels=self.channels, out_channels=self.channels)

    def settings(self):
        """The run as a flat dict of plain values. denoiser.build_denoiser() reads it back."""
        return {**asdict(self), "T": self.T, "unet": self.network()}

    def may_change(self):
        """Names of settings that may differ when a run is resumed. `data` is where the images
        lie; what they are is compared by their digest."""
        names = {f.name for f in fields(self) if f.metadata.get("resume")}
        return names | {"data", "name", "steps"}

    def name_parts(self):
        """What distinguishes a run at a glance, so that the same command finds it again."""
        recipe = RECIPES[self.preset]
        usual_times = "lognormal" if self.schedule == "edm" else "uniform"
        parts = [self.preset]
        parts += dict.fromkeys(  # edm is both
            getattr(self, k) for k in ("schedule", "prediction") if getattr(self, k) != recipe[k])
        parts += ["continuous"] * self.continuous + [f"sa{self.sa_k}"] * (self.sa_k > 1)
        parts += ["etsdm"] * self.etsdm
        parts += [self.optimizer] * (self.optimizer != "adam")
        parts += [f"{self.lr_decay}-decay"] * (self.lr_decay != "none")
        return parts + [f"{self.train_times}-times"] * (self.train_times != usual_times)

    def default_name(self):
        parts = [Path(self.data.split(":")[0]).stem.lstrip(".") or "images", *self.name_parts()]
        return "-".join([p for p in parts if p] + [f"seed{self.seed}"] * bool(self.seed))

    def next_command(self):
        """What to type after training."""
        return f"python sample.py {shlex.quote(self.name)}"

    def warnings(self, dataset, world_size):
        """Lines about settings that are valid but probably unintended."""
        b, steps = self.batch_size // world_size, self.images // self.batch_size
        lines = []
        if self.prediction == "eps" and self.schedule == "zero-terminal-snr":
            lines.append(f"--prediction eps has no x_0 at t = {self.T}, where alpha_bar = 0: "
                         f"training and sampling begin at t = {self.T - 1}")
        if self.sa_k > 1 and not self.sa_weight:
            lines.append(f"--sa-weight 0 leaves only the plain loss, whatever --sa-k {self.sa_k}")
        if self.etsdm and self.etsdm_n == self.etsdm_interval and not self.continuous:
            lines.append(f"--etsdm-n {self.etsdm_n} gives each timestep its own part: nothing is "
                         "shared")
        if self.microbatch and self.microbatch >= b:
            lines.append(f"--microbatch {self.microbatch} has no effect: a process has {b} images")
        if "images" in self.given and self.images % self.batch_size:
            lines.append(f"--images {self.images} are {steps} whole batches, "
                         f"{steps * self.batch_size} images")
        if self.warmup >= steps:
            lines.append(f"--warmup: the learning rate rises over {self.warmup} steps, and the run "
                         f"has {steps}")
        if "workers" in self.given and not dataset.streamed:
            lines.append("--workers has no effect: the images are in memory, or drawn")
        if self.skip_bad_images and not getattr(dataset, "paths", None):
            lines.append("--skip-bad-images has no effect: the images are not files")
        return lines
