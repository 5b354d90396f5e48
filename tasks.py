r"""What is trained: a denoiser, a second head on a frozen one, or an autoencoder.

A task is what the training loop needs to know, and each of the three says it in its own way:

    net                           the module whose parameters are trained and averaged
    columns                       names of the terms of its loss, as log.csv has them
    draw(g, device_g, n)          the random numbers of n images: {name: (n, ...)}
    losses(net, images, numbers)  (loss (b,), {column: (b,)}) of float images (b, C, H, W)
    pictures(net, images)         a training grid: uint8 (n, C, H, W), and how many belong together
    extra                         what a checkpoint must hold besides the weights

So a new system is a new value here or in a loss, a schedule, a condition or a space, and the loop
stays as it is (train.py).

What this file does not do: step, save, or know of processes and precision (train.py).

    python train.py --sa-k 2                            Denoising
    python train.py --head npr --from RUN               Head
    python train.py --task autoencoder                  Coding

s the settings of the run; n images of the global batch, b of one forward pass; k consecutive steps.
"""

import shlex

import torch

import autoencoder
import covariance
import data
import denoiser as denoisers
import files
import losses
import samplers
import spaces
import unet


class Denoising:
    """A denoiser of images, of images beside small ones, or of latents: E‖ε − ε_θ‖² and its
    companions (losses.py)."""

    def __init__(self, s, extra):
        self.s, self.extra, self.net = s, extra, unet.UNet(**s["unet"])
        self.net.recompute = bool(s["recompute"])
        self.denoiser = denoisers.from_settings(s, self.net, extra.get("first_stage"))
        self.columns = ("simple", "sa") + ("slope",) * bool(s["lipschitz_reg"])
        schedule = self.denoiser.schedule
        self.range = losses.time_range(schedule, s["prediction"])
        self.quantile = losses.time_quantile(s["train_times"], schedule, *self.range, s["remap"])
        # weight 0 is the plain model: no second term to pay for
        self.k = s["sa_k"] if s["sa_weight"] else 1

    def draw(self, g, device_g, n):
        t = losses.draw_timesteps(n, self.denoiser.schedule, *self.range, g, self.quantile)
        noises = torch.randn(self.k, n, *self.denoiser.space.shape, generator=device_g,
                             device=device_g.device)
        return dict(t=t.to(device_g.device), noises=noises.transpose(0, 1))

    def losses(self, net, images, numbers):
        s = self.s
        x0, denoiser = self.denoiser.but(net=net).on(images)
        found = losses.terms(denoiser, x0, numbers["t"], numbers["noises"].transpose(0, 1),
                             s["loss_space"], bool(s["lipschitz_reg"]), bool(s["sa_reuse"]))
        found["sa"] = found["sa"] * (self.k > 1)  # k = 1 is the plain model: no second term
        loss = found["simple"] + s["sa_weight"] * found["sa"]
        if "slope" in found:
            loss = loss + s["lipschitz_reg"] * found["slope"]
        return loss, found

    def pictures(self, net, images, **how):
        """Samples by DDIM in 25 calls, always of the same noises, so that grids can be compared."""
        denoiser = self.denoiser.but(net=net).on(data.to_float(images))[1]
        x = samplers.from_seeds(denoiser, range(len(images)), denoiser.space.shape, images.device,
                                **{"nfe": 25, "t_start": samplers.start_time(denoiser), **how})
        return denoiser.space.show(data.to_uint8(denoiser.space.decode(x)), images)


class Head(Denoising):
    """A second head on the frozen network of a finished run: NPR- and SN-DPM (covariance.py)."""

    def __init__(self, s, extra):
        super().__init__(s, extra)
        self.columns = (s["head"],)
        self.net.requires_grad_(False)
        self.net.second_head.requires_grad_(True)
        if trunk := extra.pop("trunk", None):  # of a new run; else all comes from the checkpoint
            own = {f"second_head.{k}": v for k, v in self.net.second_head.state_dict().items()}
            files.load_weights(self.net, trunk | own, s["from"])

    def losses(self, net, images, numbers):
        x0, denoiser = self.denoiser.but(net=net).on(images)
        loss = losses.head_loss(denoiser, x0, numbers["t"], numbers["noises"][:, 0], self.s["head"])
        return loss, {self.s["head"]: loss}

    def pictures(self, net, images):
        """Samples by DDPM in 25 calls, each step as wide as the head says."""
        denoiser = self.denoiser.but(net=net)
        variance = covariance.of_head(denoiser, self.s["head"], eta=1.0)
        return super().pictures(denoiser.net, images, sampler="ddpm", variance=variance,
                                clip=denoiser.space.bounds)


class Coding:
    """An autoencoder, the first stage of latent diffusion."""

    columns = ("reconstruction", "kl")

    def __init__(self, s, extra):
        self.s, self.extra, self.net = s, extra, autoencoder.Autoencoder(**s["autoencoder"])

    def draw(self, g, device_g, n):
        return dict(noise=torch.randn(n, *self.net.latent_shape, generator=device_g,
                                      device=device_g.device))

    def losses(self, net, images, numbers):
        loss, *parts = autoencoder.loss(net, images, numbers["noise"], self.s["kl_weight"])
        return loss, dict(zip(self.columns, parts, strict=True))

    @torch.no_grad()
    def pictures(self, net, images):
        """Images, each beside its reconstruction."""
        decoded = net.decode(net.encode(data.to_float(images))[0])
        return torch.stack([images, data.to_uint8(decoded)], dim=1).flatten(0, 1), 2


def choose(s, checkpoint, dataset):
    """The task that settings s ask for; `extra` from the checkpoint, or made for a new run."""
    kind = Head if s["head"] else Coding if s["task"] == "autoencoder" else Denoising
    return kind(s, checkpoint.get("extra", {}) if checkpoint else extra_of(s, dataset))


def extra_of(s, dataset):
    """What a new run with settings s takes from another run, and keeps."""
    if s["head"]:
        base = files.load_checkpoint(files.find_checkpoint(s["from"]))  # as settings.py did
        return {**base.get("extra", {}), "trunk": base["ema"]}
    if s["latent"]:  # the moments of a thousand images or so; of fewer, if there are fewer
        n = min(1024, len(dataset))
        some = (torch.stack([dataset[i] for i in range(start, min(start + 64, n))])
                for start in range(0, n, 64))
        return dict(first_stage=spaces.first_stage_of(s["latent"], map(data.to_float, some)))
    return {}


def start_changed(task):
    """What to say if --from or --latent names other weights than a resumed run began with: it keeps
    its own, wherever the first run lies now. None if they are the same, or there are none."""
    flag = "from" if task.s["head"] else "latent"
    if not task.s[flag]:
        return None
    now = files.load_checkpoint(files.find_checkpoint(task.s[flag]))["ema"]
    kept = (task.net if flag == "from" else task.denoiser.space.net).state_dict()
    if all(name in kept and torch.equal(kept[name].cpu(), now[name]) for name in now):
        return None
    return (f"--{flag} {task.s[flag]} has other weights than this run began with, and it keeps "
            "those. Give another --name to start from the new ones")


def next_command(s):
    """What to do with the finished run."""
    if s["task"] == "autoencoder":
        return shlex.join(["python", "train.py", "--latent", s["name"]])
    how = ["--low-res", "IMAGES"] * (s["task"] == "sr")
    how += ["--variance", s["head"]] if s["head"] else []
    return shlex.join(["python", "sample.py", s["name"], *how])
