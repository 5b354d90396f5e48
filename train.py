r"""Train a diffusion model: DDPM's loss, SA-DPM's (--sa-k) and E-TSDM's shared timesteps (--etsdm).

    torchrun train.py --sa-k 2                        # built-in shapes, minutes on a laptop
    torchrun train.py --sa-k 2 --etsdm --data photos/ --image-size 64 --preset celeba64
    torchrun --nproc_per_node 8 train.py --preset cifar10 --data cifar10 --sa-k 2
    python train.py --schedule edm --etsdm            # one process needs no torchrun

The file reads from top to bottom: DiffusionObjective is what a step minimises, train_step() is the
step, train() repeats it, main() sets everything up. The same command again resumes a run.

Every random number of step n is a function of (seed, n). Every process draws them for the whole
global batch and keeps its own rows. So a resumed run uses the same numbers, and no random state is
saved. With another number of processes, only dropout uses other numbers.

Not here: the losses (losses.py), flags and presets (config.py), checkpoints, logs and processes
(support/), other objectives (papers/), optimizers (support/optimizers.py).

B images in the global batch, b in this process's share, k consecutive timesteps (SA-DPM).
"""

import support  # noqa: F401  (before torch: it sets how OpenMP waits)  # isort: skip

import contextlib
import copy
import math

import torch
from torch.nn.parallel import DistributedDataParallel

import data
import losses
import samplers
from config import Config
from denoiser import build_denoiser, load_run
from support import checkpoint, device, distributed, memory, precision, rng
from support.cli import parse_into
from support.optimizers import make_optimizer, set_learning_rate
from support.programs import StopSignal, ignore_write_errors, run_main
from support.run import RunFolder

MAX_NONFINITE_STEPS = 25  # in a row; then the run ends


# ------------------------------------------------------------------ the objective
class DiffusionObjective:
    """What a step minimises: L = L_simple + sa_weight · L_SA over k consecutive timesteps.

    The loop uses only the members of this class; papers/ has others. Checkpoints hold extra_state.
    """

    loss_names, warnings = ("simple", "sa"), ()

    def __init__(self, config, dataset=None, saved=None):
        self.config, self.extra_state = config, (saved or {}).get("extra", {})
        self.denoiser = build_denoiser(config.settings(), self.extra_state)
        self.net = self.denoiser.net
        self.net.recompute = config.recompute
        self.k = config.sa_k if config.sa_weight else 1  # weight 0 is plain DDPM
        schedule = self.denoiser.schedule
        self.t_range = losses.time_range(schedule, config.prediction)
        self.quantile = None  # uniform times
        if config.train_times == "lognormal":
            self.quantile = lambda u: losses.lognormal_times(u, schedule, *self.t_range)

    def draw(self, n: int, generator: torch.Generator, device_generator: torch.Generator) -> dict:
        """The random numbers of n images, one row each: {t (n,), noises (n, k, C, H, W)}. Times are
        drawn on the CPU, the same on all hardware, and stay there; noises come from the device."""
        t = losses.draw_timesteps(n, self.denoiser.schedule, *self.t_range, generator,
                                  self.quantile)
        noises = torch.randn(self.k, n, *self.denoiser.shape, generator=device_generator,
                             device=device_generator.device)
        return dict(t=t, noises=noises.transpose(0, 1))

    def loss(self, model, images: torch.Tensor, draws: dict) -> tuple[torch.Tensor, dict]:
        """images (b, C, H, W) in [-1, 1] -> loss (b,) and its terms {name: (b,)}."""
        x0, denoiser = self.denoiser.replace(net=model).encode(images)
        simple, sa = losses.sa_loss(denoiser, x0, draws["t"], draws["noises"].transpose(0, 1),
                                    self.config.loss_space)
        if self.k == 1:  # plain DDPM
            return simple, dict(simple=simple, sa=torch.zeros_like(sa))
        return simple + self.config.sa_weight * sa, dict(simple=simple, sa=sa)

    def preview(self, net, images: torch.Tensor, **arguments) -> tuple[torch.Tensor, int]:
        """DDIM samples in 25 calls, always from the same noise -> (uint8 (n, C, H, W), how many
        consecutive images form a group). images uint8 (n, C, H, W): input of conditional models."""
        denoiser = self.denoiser.replace(net=net).encode(data.to_float(images))[1]
        arguments = dict(nfe=25, t_start=samplers.initial_time(denoiser)) | arguments
        x0 = samplers.sample_from_seeds(denoiser, range(len(images)), images.device, **arguments)
        return data.to_uint8(denoiser.decode(x0)), 1


# ------------------------------------------------------------------ one step
class TrainState:
    """Everything a checkpoint holds: weights, their moving average, optimizer, step counters."""

    def __init__(self, objective, config):
        self.objective, self.net = objective, objective.net
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        self.averages, self.values = ([v for v in net.state_dict().values()
                                       if v.is_floating_point()] for net in (self.ema, self.net))
        self.optimizer = make_optimizer(self.net, config)
        self.step = self.skipped = 0

    def state_dict(self) -> dict:
        """The weights of the bare network: DDP and torch.compile put a prefix before each name."""
        return dict(net=self.net.state_dict(), ema=self.ema.state_dict(), step=self.step,
                    optimizer=self.optimizer.state_dict(), skipped=self.skipped,
                    extra=self.objective.extra_state)

    def load_state_dict(self, saved: dict, path) -> None:
        checkpoint.load_weights(self.net, saved["net"], path)
        checkpoint.load_weights(self.ema, saved["ema"], path)
        checkpoint.load_optimizer(self.optimizer, saved["optimizer"], path)
        self.step, self.skipped = saved["step"], saved["skipped"]


def train_step(state: TrainState, model, images: torch.Tensor, config: Config, dist,
               amp_dtype: torch.dtype | None) -> tuple[float, ...]:
    """One update on this process's images, uint8 (b, C, H, W) -> (loss, *terms, gradient norm),
    means over all processes. `model` is state.net, perhaps inside DDP or torch.compile."""
    objective, b = state.objective, len(images)

    # 1. The random numbers of the whole global batch; this process keeps its rows.
    rows = slice(dist.rank * b, (dist.rank + 1) * b)
    generator = rng.generator(config.seed, state.step)
    on_device = generator if dist.device.type == "cpu" else rng.generator(
        config.seed, state.step, device=dist.device)
    images = data.to_float(device.move(images, dist.device))
    if config.flip:
        flip = torch.rand(config.batch_size, generator=generator) < 0.5
        flip = device.move(flip[rows], dist.device)
        images = torch.where(flip[:, None, None, None], images.flip(-1), images)
    draws = {name: value[rows] for name, value in objective.draw(
        config.batch_size, generator, on_device).items()}
    torch.manual_seed(rng.hash_ints(config.seed, state.step, dist.rank))  # dropout

    # 2. Forward and backward, `microbatch` images at a time; gradients add up in .grad. Each part
    # is weighted by its share of b. DDP averages over processes, which have b images each. So the
    # gradient is that of the mean loss of the global batch.
    state.optimizer.zero_grad(set_to_none=True)
    parts = math.ceil(b / (config.microbatch or b))
    micro, means = math.ceil(b / parts), 0.0  # at most two sizes: torch.compile makes code for each
    for start in range(0, b, micro):
        part = slice(start, start + micro)
        share = len(images[part]) / b
        # DDP exchanges gradients in backward(): once is enough, with the last part.
        wait = start + micro < b and isinstance(model, DistributedDataParallel)
        with model.no_sync() if wait else contextlib.nullcontext():
            with torch.autocast(dist.device.type, amp_dtype, enabled=amp_dtype is not None):
                loss, terms = objective.loss(model, images[part],
                                             {k: v[part] for k, v in draws.items()})
            values = torch.stack([v.mean() for v in (loss, *map(terms.get, objective.loss_names))])
            (values[0] * share).backward()
        means = means + share * values.detach()
    norm = torch.nn.utils.clip_grad_norm_(state.net.parameters(), config.grad_clip or math.inf)
    values = torch.cat([means, norm[None].to(means)]).cpu().double()  # the one wait for a GPU
    means, norm = (dist.all_reduce(values[:-1]) / dist.world_size).tolist(), values[-1].item()

    # 3. Update, or skip the step if a number is not finite: all processes see the same averages. A
    # loss, which is a square, can overflow even if its gradient, which is linear, does not.
    if all(map(math.isfinite, (*means, norm))):
        set_learning_rate(state.optimizer, config, state.step)  # warm-up and decay
        state.optimizer.step()
        update_ema(state.averages, state.values, config.ema, state.step - state.skipped)
    else:
        state.skipped += 1
    state.step += 1
    return *means, norm


@torch.no_grad()
def update_ema(averages: list, values: list, decay: float, updates: int) -> None:
    """average ← d average + (1 − d) value,  d = min(decay, (1 + n)/(10 + n)) after n updates.
    Neither paper has this warm-up of d. Without it, after a thousand steps at decay 0.9999, 90 % of
    the average is still the random start."""
    torch._foreach_lerp_(averages, values, 1 - min(decay, (1 + updates) / (10 + updates)))


# ------------------------------------------------------------------ the loop
def train(state: TrainState, batches, dataset, config: Config, run: RunFolder, dist, stop) -> None:
    """Train until the network has seen config.images images, or a signal asks to stop."""
    total_steps = config.images // config.batch_size
    amp_dtype = precision.autocast_dtype(config.precision, dist.device)
    # state.net stays the bare network, for the optimizer, the average and the checkpoint.
    model = precision.for_training(state.net, dist.device, config.compile,
                                   precision.suits_graphs(config, dist.world_size))
    if dist.world_size > 1:
        devices = [dist.device] if dist.device.type == "cuda" else None
        model = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    state.net.train()

    run.start_log(state.step, total_steps, config.batch_size, state.objective.loss_names)
    stop.gently = True  # from here on there is something to save
    nonfinite = 0
    while state.step < total_steps:
        # None: a signal came. Then all processes stop at this step.
        images = stop.unless_requested(next, batches)
        ended, late = dist.any(images is None, run.is_late(config.save_minutes))
        if ended:
            run.save(state.state_dict(), final=True)
            break
        values = train_step(state, model, images, config, dist, amp_dtype)
        run.log(state.step, values, state.skipped)

        nonfinite = 0 if all(map(math.isfinite, values)) else nonfinite + 1
        if nonfinite == MAX_NONFINITE_STEPS:
            raise ValueError(f"--lr: the last {nonfinite} losses or gradients were not finite, up "
                             f"to step {state.step}; {run.last_checkpoint()}. Try a lower --lr, "
                             "--grad-clip 1, or --precision fp32")

        # After a bad step no checkpoint is made, except at the end of the run.
        done = state.step == total_steps
        if done or not nonfinite and (late or state.step % config.save_every == 0):
            run.save(state.state_dict(), final=done)
        if done or state.step % config.sample_every == 0:
            run.save_preview(state, dataset)


def main(argv=None, make_objective=DiffusionObjective, config_class=Config):
    """The program. papers/ calls it with other objectives, whose configs add flags."""
    config = parse_into(config_class, argv)
    with (StopSignal() as stop, distributed.init(
            deterministic=config.deterministic, timeout=distributed.STEP_TIMEOUT,
            device=config.device) as dist, RunFolder(config.name, dist, stop) as run):
        saved = run.open(config.settings(), config.may_change())  # None: a new run
        if run.is_finished(saved, config.images, config.batch_size, config.next_command()):
            return

        # The images; then the network, with the same initial weights on every process.
        dataset = dist.main_first(lambda: data.load(
            config.data, config.image_size, config.channels, config.seed, config.skip_bad_images,
            progress=dist.is_main))
        torch.manual_seed(config.seed)
        objective = make_objective(config, dataset, saved)
        precision.place(objective.net, dist.device, config.compile)
        state = TrainState(objective, config)
        if saved:
            state.load_state_dict(saved, run.path)
        elif config.init:
            weights = load_run(config.init).net.state_dict()
            state.net.load_state_dict(weights)
            state.ema.load_state_dict(weights)
        dist.print0(f"data: {dataset.summary}\nnetwork: "
                    f"{sum(p.numel() for p in state.net.parameters()):,} parameters")
        for line in (*config.warnings(dataset, dist.world_size), *objective.warnings,
                     *run.changes(saved, dataset, config), *memory.notes(state.net, config, dist)):
            dist.print0(f"note: {line}")
        # The endless stream of images begins where the checkpoint stopped: only the step is needed.
        batches = data.batches(dataset, config.batch_size, state.step * config.batch_size,
                               config.seed, dist.rank, dist.world_size, config.workers, dist.device)
        del saved  # gigabytes, for large networks
        run.create(config.settings(), state.state_dict(), state.optimizer, dataset)
        train(state, batches, dataset, config, run, dist, stop)
        run.print_end(state.step, state.skipped, config.next_command())


if __name__ == "__main__":
    ignore_write_errors()
    run_main(main)
