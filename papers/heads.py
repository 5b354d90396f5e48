r"""NPR- and SN-DPM: train a second head that learns a variance, on the frozen network of a run.

    npr:  ‖(ε − ε_θ)² − h‖²        sn:  ‖ε² − h‖²              squares are element by element

The conditional mean minimises the squared error: h = E[(ε − ε_θ)² | x_t], or E[ε² | x_t] (Bao et
al., ICML 2022). covariance.py computes the variance of each reverse step from h.

    python -m papers.heads npr shapes-tiny-sa2
    python sample.py shapes-tiny-sa2-npr --sampler ddpm --variance npr --nfe 25

Not here: the use of h (covariance.py), the layers of the head (unet.py, second_head).

B images; x0 in [-1, 1]; t (B,) in [1, T]; h like ε.
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

from dataclasses import dataclass
from typing import ClassVar

import losses
import train
from config import Config
from papers import covariance
from papers.autoencoder import DENOISER_FIELDS
from schedules import add_noise
from support import checkpoint
from support.cli import flag
from support.programs import ignore_write_errors, run_main
from support.run import run_name, settings_of, weights_changed

# As in NPR- and SN-DPM's programs (500,000 steps); a tiny trunk needs some minutes.
RECIPE = dict(batch_size=128, images=64_000_000, lr=1e-4, beta2=0.999, ema=0.9999, grad_clip=0.0,
              warmup=0, sample_every=5000, save_every=1000)
TINY_RECIPE = dict(batch_size=64, images=128_000, lr=1e-3, beta2=0.99, ema=0.995, grad_clip=0.0,
                   warmup=0, sample_every=1000, save_every=500)
# The head's loss has one term, with uniform t, as in both papers' programs.
PLAIN = dict(sa_k=1, sa_weight=0.0, train_times="uniform", recompute=False, dropout=0.0,
             init="", optimizer="adam", lr_decay="none")


def head_loss(denoiser, x0, t, noise, kind):
    """The loss above: x0 (B, ...), t (B,), noise like x0 -> (B,). Gradients reach only h."""
    xt = add_noise(denoiser.schedule, x0, t, noise)
    prediction, h = denoiser.network_output(xt, t).split(x0.shape[1], dim=1)
    eps_hat = denoiser.to_x0_eps(xt, t, prediction)[1].detach()
    target = (noise - eps_hat if kind == "npr" else noise).square()
    return losses.mean_square(target - h)


@dataclass
class HeadConfig(Config):
    head: str = flag("", "what the head learns", choices=("npr", "sn"), positional="KIND",
                     group="variance head")
    trunk: str = flag("", "the finished run that gets the head", positional="RUN")
    head_size: str = flag("simple", "a convolution (simple), or a residual block and a convolution",
                          choices=("simple", "block"))
    base: dict | None = None  # settings of the trunk

    unused: ClassVar[tuple] = (*DENOISER_FIELDS, "image_size", "channels")
    prog: ClassVar[str] = "papers.heads"
    usage: ClassVar[str] = "python -m papers.heads {npr,sn} RUN [flags]"
    description: ClassVar[str] = ("Train a second head for the variance of each pixel, on the "
                                  "frozen network of a finished run. The same command resumes it.")
    examples: ClassVar[str] = """\
  python -m papers.heads npr shapes-tiny-sa2
  python sample.py shapes-tiny-sa2-npr --sampler ddpm --variance npr --nfe 25"""

    @classmethod
    def recipe(cls, given):
        if not (given.get("head") and given.get("trunk")):
            raise ValueError("KIND and RUN are both needed: python -m papers.heads npr RUN")
        base = settings_of(given["trunk"], "trunk")
        if "unet" not in base:
            raise ValueError(f"{given['trunk']} is an autoencoder: a head needs a denoiser")
        if base.get("imported") and base["unet"]["out_channels"] != base["channels"]:
            raise ValueError(f"{given['trunk']} has a learned variance: it cannot get a second "
                             "head. Use another run")
        if base.get("head") and base.get("trunk") != given["trunk"]:
            raise ValueError(f"{given['trunk']} has a second head already: give the run it was "
                             f"trained on, {base.get('trunk') or base.get('from')}")
        fields = {k: base[k] for k in (*cls.unused, "data", "flip") if base.get(k) is not None}
        recipe = TINY_RECIPE if base["preset"] == "tiny" else RECIPE
        values = {**super().recipe({}), **fields, **recipe, **PLAIN, "base": base}
        if given.get("steps", 0) > 0:
            values["images"] = given["steps"] * given.get("batch_size", values["batch_size"])
        return values

    def check_divisible(self):  # the trunk exists
        if not self.data:
            raise ValueError("--data is needed: the trunk's images are not known")

    def network(self):
        return dict(self.base["unet"], second_head=self.head_size, dropout=0.0)

    def settings(self):
        own = {k: v for k, v in super().settings().items() if k not in ("base", "head_size")}
        return {**self.base, **own}

    def may_change(self):  # the trunk's weights are in the checkpoint
        return super().may_change() | {"trunk"}

    def default_name(self):
        parts = [run_name(self.trunk), self.head] + ["block"] * (self.head_size == "block")
        return "-".join(parts + [f"seed{self.seed}"] * bool(self.seed))

    def next_command(self):
        return f"{super().next_command()} --sampler ddpm --variance {self.head}"


class VarianceHeadObjective(train.DiffusionObjective):
    """Train only the second head. All other weights come from the trunk and stay fixed."""

    def __init__(self, config, dataset, saved):
        trunk = None
        if saved is None:
            base = checkpoint.load_checkpoint(checkpoint.find_checkpoint(config.trunk))
            saved, trunk = dict(extra=base.get("extra", {})), base["ema"]
        super().__init__(config, dataset, saved)
        self.loss_names = (config.head,)
        self.net.requires_grad_(False)
        self.net.second_head.requires_grad_(True)
        if trunk:  # a new run
            own = {f"second_head.{k}": v for k, v in self.net.second_head.state_dict().items()}
            checkpoint.load_weights(self.net, trunk | own, config.trunk)
        else:
            self.warnings = weights_changed(config.trunk, saved["net"])

    def loss(self, model, images, draws):
        x0, denoiser = self.denoiser.replace(net=model).encode(images)
        loss = head_loss(denoiser, x0, draws["t"], draws["noises"][:, 0], self.config.head)
        return loss, {self.config.head: loss}

    def preview(self, net, images):
        """Samples by DDPM in 25 calls, with the head's variance in each step."""
        denoiser = self.denoiser.replace(net=net)
        var_eps = covariance.variance_from_head(denoiser, self.config.head)
        return super().preview(denoiser.net, images, sampler="ddpm",
                               variance=covariance.step_variance(denoiser, var_eps, eta=1.0),
                               clip=denoiser.space.value_range)


def main(argv=None):
    train.main(argv, VarianceHeadObjective, HeadConfig)


if __name__ == "__main__":
    ignore_write_errors()
    run_main(main)
