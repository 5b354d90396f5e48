r"""The optimizers: Adam; and Muon, which orthogonalises the momentum of weight matrices.

    M ← μ M + G,   U = orthogonal factor of (G + μ M),   W ← W − lr √max(1, rows/columns) U

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". U has the singular
vectors of the momentum (with Nesterov's look ahead) and singular values of about 1, so that every
direction of a matrix learns at the same rate. A kernel is taken as the matrix (out, in·h·w).

The first and last layer and the time embedding (EDGES) are not hidden matrices: Adam moves them,
and all biases. The learning rate rises over `warmup` steps. It can fall to 0 at the end of the run.

Not here: gradients, or which optimizer a preset takes (config.py). torch.optim.Muon takes 2-D
parameters only.

    python -c "import torch, support.optimizers as o; print(o.orthogonalize([torch.eye(2)]))"

P matrices with the same smaller side n are orthogonalised in one batch.
"""

import math
from collections import defaultdict

import torch

EDGES = ("input_blocks.0.", "out_conv.", "time_embed.", "second_head.")  # of unet.UNet


def orthogonalize(matrices, steps=5):
    """P matrices (rows, columns) float32 whose smaller sides are all n -> list of the same with
    singular values between about 0.7 and 1.2.

    Newton-Schulz: X ← (a I + b XXᵀ + c (XXᵀ)²) X maps each singular value s to a s + b s³ + c s⁵
    and needs no SVD. These a, b, c lift small values as fast as they can. The brackets are
    polynomials of the first XXᵀ, so they commute. So all steps work on n × n matrices: A is the
    present XXᵀ, Q the product of the brackets, and X is multiplied only once.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = [M if len(M) <= M.shape[1] else M.mT for M in matrices]  # n rows
    A = torch.stack([x @ x.mT for x in X])  # (P, n, n)
    norm = A.diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None] + 1e-7  # of X
    A, one = A / norm**2, torch.eye(A.shape[1], device=A.device)  # singular values <= 1
    Q = bracket = a * one + b * A + c * A @ A
    for _ in range(steps - 1):
        A = bracket @ A @ bracket
        bracket = a * one + b * A + c * A @ A
        Q = bracket @ Q
    U = [q @ x for q, x in zip(Q / norm, X, strict=True)]
    return [u if u.shape == M.shape else u.mT for u, M in zip(U, matrices, strict=True)]


class Muon(torch.optim.Adam):
    """matrices: parameters of two and more dimensions, moved by Muon with rate lr; others: the
    rest, moved by Adam with adam_lr and betas."""

    def __init__(self, matrices, others, lr=0.02, momentum=0.95, adam_lr=2e-3, betas=(0.9, 0.99),
                 eps=1e-8):
        super().__init__([dict(params=list(matrices), lr=lr, momentum=momentum),
                          dict(params=list(others), lr=adam_lr, momentum=None)],
                         betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self):
        """Move all parameters once. The gradients of the matrices are gone afterwards."""
        matrices, _ = self.param_groups
        mu, batches = matrices["momentum"], defaultdict(list)  # one for each smaller side
        for p in matrices["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:  # Adam's load_state_dict() asks for a step
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
            self.state[p]["step"] += 1
            # M ← μ M + G; the update is G + μ M, Nesterov's look ahead
            average = self.state[p]["exp_avg"].mul_(mu).add_(p.grad)
            update = p.grad.add(average, alpha=mu).flatten(1)  # (rows, columns)
            batches[min(update.shape)].append((p, update))
            p.grad = None  # so that Adam leaves it alone
        for pairs in batches.values():
            for (p, M), u in zip(pairs, orthogonalize([M for _, M in pairs]), strict=True):
                scale = max(1, M.shape[0] / M.shape[1]) ** 0.5  # W ← W − lr √max(1, rows/columns) U
                p.sub_(u.reshape(p.shape), alpha=matrices["lr"] * scale)
        super().step()


def make_optimizer(net, config):
    """The optimizer of config.optimizer for those parameters of net that are trained."""
    named = {k: p for k, p in net.named_parameters() if p.requires_grad}
    betas = (0.9, config.beta2)
    if config.optimizer == "adam":
        return torch.optim.Adam(named.values(), config.lr, betas, config.adam_eps, fused=True)
    hidden = {k: p for k, p in named.items() if p.dim() > 1 and not k.startswith(EDGES)}
    return Muon(hidden.values(), [p for k, p in named.items() if k not in hidden],
                config.muon_lr, config.muon_momentum, config.lr, betas, config.adam_eps)


def rate_factor(config, step):
    """Warm-up and decay: the share of the learning rates at `step`. The decay ends at 0, after
    config.images // config.batch_size steps."""
    u = step / (config.images // config.batch_size)
    decay = dict(none=1.0, linear=1 - u, cosine=(1 + math.cos(math.pi * u)) / 2)[config.lr_decay]
    return decay * min(1.0, (step + 1) / max(config.warmup, 1))


def set_learning_rate(optimizer, config, step):
    """Give each group of parameters its learning rate at `step`, and Muon's its momentum: both may
    change when a run resumes."""
    factor = rate_factor(config, step)
    for group in optimizer.param_groups:
        group["lr"] = factor * config.lr
        if group.get("momentum") is not None:  # matrices
            group.update(lr=factor * config.muon_lr, momentum=config.muon_momentum)
