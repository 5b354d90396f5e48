r"""The optimizers: Adam; and Muon, orthogonalised momentum for weight matrices.

    M ← μ M + G,   U = orthogonal factor of (G + μ M),   W ← W − lr √max(1, rows/columns) U

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". U replaces all
singular values of the momentum (with Nesterov's look ahead) by about 1, so that every direction of
a matrix learns at the same rate. Five Newton-Schulz steps, p(X) = a X + (b XXᵀ + c (XXᵀ)²) X, get
there without an SVD: the singular values end between about 0.7 and 1.2. A kernel is taken as the
matrix (out, in·h·w).

First and last layers and the time embedding are not hidden matrices: Adam moves them, and all
biases. The learning rate rises over `warmup` steps, and can fall to 0 at the end of the run.

Not here: gradients, or which optimizer a preset takes (config.py). torch.optim.Muon takes 2-D
parameters only.

    python -c "import torch, support.optimizers as o; print(o.orthogonalize(torch.eye(2)[None]))"

P matrices of one shape are orthogonalised in one batch.
"""

import math
from collections import defaultdict

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c: the steepest slope at 0 that still converges


def orthogonalize(matrices, steps=5):
    """(P, rows, columns) float32 -> the same with singular values of about 1."""
    a, b, c = COEFFICIENTS
    X = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values <= 1
    if wide := X.shape[1] > X.shape[2]:
        X = X.mT  # the smaller XXᵀ
    for _ in range(steps):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return X.mT if wide else X


class Muon(torch.optim.Optimizer):
    """matrices: parameters of two and more dimensions, moved by Muon with rate lr; others: the
    rest, moved by Adam with adam_lr and betas."""

    def __init__(self, matrices, others, lr=0.02, momentum=0.95, adam_lr=2e-3, betas=(0.9, 0.99)):
        super().__init__([dict(params=list(matrices), lr=lr, muon=True),
                          dict(params=list(others), lr=adam_lr, muon=False)],
                         dict(momentum=momentum, betas=betas, eps=1e-8, step=0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] += 1
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                (self.muon if group["muon"] else self.adam)(params, group)

    def moments(self, params, *names):
        """The moving averages of these names, which start at 0: a list for each."""
        for p in params:
            for name in names:
                self.state[p].setdefault(name, torch.zeros_like(p))
        return [[self.state[p][name] for p in params] for name in names]

    def muon(self, params, group):
        grads, (averages,) = [p.grad for p in params], self.moments(params, "exp_avg")
        torch._foreach_mul_(averages, group["momentum"])
        torch._foreach_add_(averages, grads)
        updates = torch._foreach_add(grads, averages, alpha=group["momentum"])  # Nesterov
        shapes = defaultdict(list)
        for p, update in zip(params, updates, strict=True):
            shapes[len(p), p[0].numel()].append((p, update))
        for (rows, columns), pairs in shapes.items():
            X = orthogonalize(torch.stack([u.reshape(rows, columns).float() for _, u in pairs]))
            for (p, _), u in zip(pairs, X, strict=True):
                p.add_(u.reshape(p.shape), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def adam(self, params, group):
        """Kingma & Ba 2015, algorithm 1."""
        (beta1, beta2), t, grads = group["betas"], group["step"], [p.grad for p in params]
        first, second = self.moments(params, "exp_avg", "exp_avg_sq")
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        scales = torch._foreach_sqrt(torch._foreach_div(second, 1 - beta2**t))
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_addcdiv_(params, first, scales, -group["lr"] / (1 - beta1**t))


# ------------------------------------------------------------------ for the training loop

def make_optimizer(net, config):
    """The optimizer of config.optimizer for the parameters of net that are trained."""
    named = {k: p for k, p in net.named_parameters() if p.requires_grad}
    betas = (0.9, config.beta2)
    if config.optimizer == "adam":
        return torch.optim.Adam(named.values(), lr=config.lr, betas=betas, fused=True)
    edges = getattr(net, "edge_layers", ())
    hidden = {k for k, p in named.items() if p.dim() > 1 and not k.startswith(edges)}
    return Muon([p for k, p in named.items() if k in hidden],
                [p for k, p in named.items() if k not in hidden],
                lr=config.muon_lr, adam_lr=config.lr, betas=betas)


def set_learning_rate(optimizer, config, step):
    """Warm-up and decay: the rates of `step`, of config.images // config.batch_size steps."""
    u = step / (config.images // config.batch_size)
    decay = dict(none=1.0, linear=1 - u, cosine=(1 + math.cos(math.pi * u)) / 2)[config.lr_decay]
    factor = decay * min(1.0, (step + 1) / max(config.warmup, 1))
    for group in optimizer.param_groups:
        group["lr"] = factor * (config.muon_lr if group.get("muon") else config.lr)
