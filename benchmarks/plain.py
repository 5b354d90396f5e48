r"""The works that benchmarks measures, written plainly: what our own are compared with.

"Plain" is what a short program does that does nothing about speed: float32, NCHW, attention by
einsum, k passes for k noise levels, an optimizer and an average that walk over the parameters one
by one. Each function is make(...) -> work(), to be timed. If it stands for a fast form of ours, a
test proves that both give the same (tests/test_benchmark.py). diffusers' networks and schedulers
are here too, in case that library is installed; it is never needed.

Not here: measuring (worker.py). Nothing of this file runs in training or sampling.

    python -c "from benchmarks import plain; print(plain.training('tiny', 4)())"  # a step's loss

B images of a batch, k consecutive steps (SA-DPM). This file imports no support before torch.
"""

import copy
import importlib.util

import numpy as np
import scipy.linalg
import torch

import schedules
import unet

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# On GPUs, PyTorch rounds float32 convolutions to TF32 unless it is forbidden.
torch.backends.cudnn.allow_tf32 = False
PEER = importlib.util.find_spec("diffusers") is not None


def peer(name):
    """A class of diffusers. ValueError: the library is installed and fails to import."""
    try:
        import diffusers
        return getattr(diffusers, name)
    except Exception as error:  # it imports much, when asked for: any of that may not fit
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"diffusers fails to import ({why}): repair or uninstall it") from error


# ------------------------------------------------------------------ training

def attention(self, x):
    """unet.Attention.forward with the products written as einsum, as ADM has it."""
    B, C, H, W = x.shape
    q, k, v = self.qkv(self.norm(x)).reshape(B * self.heads, 3, -1, H * W).unbind(1)
    weight = torch.einsum("bct,bcs->bts", q, k) / q.shape[1] ** 0.5
    h = torch.einsum("bts,bcs->bct", weight.softmax(-1), v)
    return x + self.proj(h.reshape(B, C, H, W))


def build_network(preset, kind="ours"):
    """The network, written plainly: ours, or that of diffusers for cifar10."""
    unet.Attention.forward, unet.lay_out = attention, lambda h: h
    unet.GroupNorm = torch.nn.GroupNorm
    if kind == "ours":
        return unet.UNet(**unet.PRESETS[preset]).to(DEVICE)
    net = peer("UNet2DModel")(
        32, layers_per_block=2, block_out_channels=(128, 256, 256, 256), dropout=0.1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None, add_attention=True).to(DEVICE)
    net.forward = lambda x, t, forward=net.forward: forward(x, t, return_dict=False)[0]
    return net


def training(preset, batch, k=1, kind="ours"):
    """work(): one step as a short program has it; for k > 1, k passes, as SA-DPM's authors."""
    net = build_network(preset, kind).train()
    ema = copy.deepcopy(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4, foreach=False)
    alpha_bar = schedules.make_schedule("linear").alpha_bar(torch.arange(1001)).float().to(DEVICE)
    size = unet.PRESETS[preset]["image_size"]
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)

    def work():
        x0 = images.to(DEVICE).float() / 127.5 - 1
        t, residuals = torch.randint(k, 1001, (batch,), device=DEVICE), []
        for i in range(k):
            eps, ab = torch.randn_like(x0), alpha_bar[t - i][:, None, None, None]
            residuals.append(eps - net(ab.sqrt() * x0 + (1 - ab).sqrt() * eps, (t - i).float()))
        loss = residuals[0].square().mean()
        if k > 1:
            loss = loss + (sum(residuals) / k).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=False)
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(ema.parameters(), net.parameters(), strict=True):
                mine.mul_(0.9999).add_(theirs, alpha=0.0001)
        return loss.item()

    return work


# ------------------------------------------------------------------ sampling

RUNS = 20  # sampling runs in one turn: a single one would be over before the caches are warm


def constant(B):
    """(noise, a network that costs nothing): what is left is the sampler."""
    x, out = torch.randn(2, B, 3, 32, 32, device=DEVICE)
    return x, lambda *_: out


def inputs(preset, B):
    """A batch of noise of the preset's size, and its times."""
    size = unet.PRESETS[preset]["image_size"]
    x = torch.randn(B, 3, size, size, device=DEVICE)
    return x, torch.full((B,), 500.0, device=DEVICE)


def one_call(preset, B):
    """work(): one call of the network."""
    net, (x, c) = build_network(preset).eval(), inputs(preset, B)
    return torch.no_grad()(lambda: net(x, c))


def lean_ddim(B, nfe):
    """The least that DDIM can be: four passes over memory, every coefficient a constant."""
    x, net = constant(B)

    def work():
        xt = x
        for _ in range(nfe * RUNS):
            eps = net(xt, 0)
            xt = torch.sub(xt, eps, alpha=0.1).div_(0.9).mul_(0.95).add_(eps, alpha=0.2)
    return torch.no_grad()(work)


def peer_sampler(B, nfe, name, arguments):
    """work(): a scheduler of diffusers; its noise is given."""
    x, net = constant(B)
    scheduler = peer(name)(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, **arguments)
    import diffusers.schedulers.scheduling_ddpm as theirs
    theirs.randn_tensor = lambda *_, **__: net()

    def work():
        for _ in range(RUNS):
            scheduler.set_timesteps(nfe)
            xt = x
            for t in scheduler.timesteps:
                seen = scheduler.scale_model_input(xt, t)
                xt = scheduler.step(net(seen, t), t, xt).prev_sample
    return torch.no_grad()(work)


# ------------------------------------------------------------------ metrics

def statistics_of(n, D=2048):
    """μ, Σ, μ, Σ of two made-up sets of n vectors, with a spectrum that falls as real ones do."""
    g, sides = np.random.default_rng(0), []
    for scale in (1.0, 1.1):
        f = scale * g.standard_normal((n, D)) * np.arange(1, D + 1) ** -0.5
        sides += [f.mean(0), np.cov(f, rowvar=False)]
    return sides


def distance(n):
    """work(): the Fréchet distance by scipy's matrix square root, as pytorch-fid has it."""
    mu1, sigma1, mu2, sigma2 = statistics_of(n)

    def work():
        root = scipy.linalg.sqrtm(sigma1.dot(sigma2))
        if not np.isfinite(root).all():  # of singular products: pytorch-fid's way out
            more = 1e-6 * np.eye(len(sigma1))
            root = scipy.linalg.sqrtm((sigma1 + more) @ (sigma2 + more))
        return ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root.real)
    return work


def features(n):
    """work(): Inception's features of n images, normalisation by normalisation, in NCHW."""
    from support import inception  # after torch; the worker leaves out support's settings
    net = inception.Inception().to(DEVICE, memory_format=torch.contiguous_format)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, device=DEVICE)
    return torch.no_grad()(lambda: net(images))
