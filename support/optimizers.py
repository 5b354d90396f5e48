r"""The optimizers: Adam; and Muon, which orthogonalises the momentum of weight matrices.

    M ← μ M + G,   U = orthogonal factor of (G + μ M),   W ← W − lr √max(1, rows/columns) U

Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks". U has the singular
vectors of the momentum (with Nesterov's look ahead) and singular values of about 1, so that every
direction of a matrix learns at the same rate. A kernel is taken as the matrix (out, in·h·w).

The first and last layer and the time embedding (EDGES) are not hidden matrices: Adam moves them,
and all biases. The learning rate rises over `warmup` steps. It can fall to 0 at the end of the run.

Not here: gradients, or which optimizer a preset takes (config.py). torch.optim.Muon takes 2-D
parameters only.

    python -c "import torch, support.optimizers as o; print(o.orthogonalize(torch.eye(2)[None]))"

P matrices of one shape are orthogonalised in one batch.
"""

import math
from collections import defaultdict

import torch

EDGES = ("input_blocks.0.", "out_conv.", "time_embed.", "second_head.")  # of unet.UNet


def orthogonalize(matrices, steps=5):
    """(P, rows, columns) float32 -> the same with singular values between about 0.7 and 1.2.

    Newton-Schulz: X ← a X + (b XXᵀ + c (XXᵀ)²) X maps each singular value s to a s + b s³ + c s⁵
    and needs no SVD. These a, b, c lift small values as fast as they can.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)  # singular values <= 1
    if tall := X.shape[1] > X.shape[2]:
        X = X.mT  # the smaller XXᵀ
    for _ in range(steps):
        A = X @ X.mT  # then X ← a X + (b A + c A²) X, each sum of products in one call
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if tall else X


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
        shapes = defaultdict(list)
        for p in matrices["params"]:
            if p.grad is None:
                continue
            if not self.state[p]:  # Adam's load_state_dict() asks for a step
                self.state[p].update(step=torch.zeros(()), exp_avg=torch.zeros_like(p))
            self.state[p]["step"] += 1
            # M ← μ M + G; the update is G + μ M, Nesterov's look ahead
            average = self.state[p]["exp_avg"].mul_(matrices["momentum"]).add_(p.grad)
            update = p.grad.add(average, alpha=matrices["momentum"])
            shapes[len(p), p[0].numel()].append((p, update))
            p.grad = None  # so that Adam leaves it alone
        for (rows, columns), pairs in shapes.items():
            X = orthogonalize(torch.stack([u.reshape(rows, columns) for _, u in pairs]))
            for (p, _), u in zip(pairs, X, strict=True):  # W ← W − lr √max(1, rows/columns) U
                p.sub_(u.reshape(p.shape), alpha=matrices["lr"] * max(1, rows / columns) ** 0.5)
        super().step()


def make_optimizer(net, config):
    """The optimizer of config.optimizer for those parameters of net that are trained."""
    named = {k: p for k, p in net.named_parameters() if p.requires_grad}
    betas = (0.9, config.beta2)
    if config.optimizer == "adam":
        return torch.optim.Adam(named.values(), config.lr, betas, config.adam_eps, fused=True)
    hidden = {k: p for k, p in named.items() if p.dim() > 1 and not k.startswith(EDGES)}
    return Muon(hidden.values(), [p for k, p in named.items() if k not in hidden],
                config.muon_lr, adam_lr=config.lr, betas=betas, eps=config.adam_eps)


def rate_factor(config, step):
    """Warm-up and decay: the share of the learning rates at `step`. The decay ends at 0, after
    config.images // config.batch_size steps."""
    u = step / (config.images // config.batch_size)
    decay = dict(none=1.0, linear=1 - u, cosine=(1 + math.cos(math.pi * u)) / 2)[config.lr_decay]
    return decay * min(1.0, (step + 1) / max(config.warmup, 1))


def set_learning_rate(optimizer, config, step):
    """Give each group of parameters its learning rate at `step`."""
    factor = rate_factor(config, step)
    for group in optimizer.param_groups:
        group["lr"] = factor * (config.muon_lr if group.get("momentum") else config.lr)
