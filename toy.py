r"""A Gaussian mixture whose ideal network is known exactly: the oracle of tests and theory.

    x_0 ~ Σ_k w_k N(μ_k, s_k² I)    =>    x_t ~ Σ_k w_k N(α μ_k, v_k I),    v_k = α² s_k² + σ²

    r_k(x)    = w_k N(x; α μ_k, v_k I) / Σ_j (the same for j)       posterior of the component k
    ε*(x, t)  = E[ε | x_t]   = Σ_k r_k σ (x − α μ_k)/v_k           = −σ times the score
    x0*(x, t) = E[x_0 | x_t] = Σ_k r_k (μ_k + α s_k² (x − α μ_k)/v_k)

oracle() turns these into a network net(x, c). Any sampler, loss or analysis can then be tested on
a problem with a known answer. Under E-TSDM the oracle is theorem 4.1's network, the average of ε*
over a sub-interval. (A trained network is slightly better: it weights each t' by q_t'(x), the
density of this x at t'.)

Not here: training, or images.

    python -c "import toy; print(toy.two_bumps().sample(5))"

x (B, ...); weights w (K,), means μ (K, ...), stds s (K,); D numbers in one x; α, σ of schedules.py.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from schedules import Schedule, expand


class Mixture:
    """weights (K,), means (K, ...), stds (K,): isotropic Gaussians, all in float64."""

    def __init__(self, weights: Tensor | Sequence, means: Tensor | Sequence,
                 stds: Tensor | Sequence):
        self.weights, self.means, self.stds = (
            torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, stds))
        self.weights = self.weights / self.weights.sum()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n draws of x_0: (n, ...)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn((n, *self.means.shape[1:]), dtype=torch.float64, generator=generator)
        return self.means[k] + expand(self.stds[k], z) * z

    def mean(self) -> Tensor:
        return torch.tensordot(self.weights, self.means, 1)

    def variance(self) -> Tensor:
        """Variance of each coordinate: E[s² + μ²] − mean²."""
        square = torch.tensordot(self.weights, self.means**2, 1)
        return square + self.weights @ self.stds**2 - self.mean() ** 2

    def posterior(self, x: Tensor, alpha: Tensor | float,
                  sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """(x0*, ε*), each float64 and like x (B, ...). alpha and sigma are scalars or (B,)."""
        flat, means = x.double().flatten(1), self.means.flatten(1)  # (B, D), (K, D)
        alpha, sigma = (torch.as_tensor(c, dtype=torch.float64).reshape(-1, 1)
                        for c in (alpha, sigma))
        v = alpha**2 * self.stds**2 + sigma**2  # (B or 1, K)
        off = flat[:, None] - alpha[:, :, None] * means  # x − α μ_k: (B, K, D)
        log_r = self.weights.log() - flat.shape[1] / 2 * v.log() - off.square().sum(2) / (2 * v)
        r = log_r.softmax(1)[:, :, None]  # (B, K, 1)
        x0 = (r * (means + (alpha * self.stds**2 / v)[:, :, None] * off)).sum(1)
        eps = (r * (sigma / v)[:, :, None] * off).sum(1)
        return x0.reshape(x.shape), eps.reshape(x.shape)


def two_bumps(shape: tuple[int, ...] = (1,)) -> Mixture:
    """Two unequal components, far enough apart to differ and near enough to interact."""
    ones = torch.ones(shape, dtype=torch.float64)
    return Mixture([0.3, 0.7], torch.stack([-0.6 * ones, 0.4 * ones]), [0.15, 0.25])


def one_gaussian(shape: tuple[int, ...] = (1,), std: float = 0.5) -> Mixture:
    """x_0 ~ N(0, std²): each formula is then one line."""
    return Mixture([1.0], torch.zeros(1, *shape, dtype=torch.float64), [std])


def oracle(mixture: Mixture, schedule: Schedule, prediction: str = "eps",
           times: Callable | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    r"""The ideal network net(x (B, ...), c (B,)) -> like x, for eps, v or x0 prediction.

    times(c) lists all times that share the time input c, each (B,); the result is the average over
    them. None: c is t. For E-TSDM use shared_times(), for a remap its inverse,
    times=lambda c: [unremap(c, "sqrt")].
    """
    def net(x, c):
        t = torch.stack([c.double()] if times is None else times(c.double()))  # (m, B)
        alpha, sigma = schedule.alpha_sigma(t.flatten())
        repeated = x.repeat(len(t), *[1] * (x.dim() - 1))  # (m B, ...)
        x0, eps = mixture.posterior(repeated, alpha, sigma)
        velocity = expand(alpha, eps) * eps - expand(sigma, x0) * x0
        output = {"eps": eps, "x0": x0, "v": velocity}[prediction]
        return output.unflatten(0, t.shape).mean(0).to(x.dtype)
    return net


def shared_times(interval: float, n: int,
                 continuous: bool = False) -> Callable[[Tensor], list[Tensor]]:
    """times(c) for E-TSDM: the times of the sub-interval that begins at c. These are c, c + 1, ...
    (1 replaces 0, so the first part has it twice) or, in continuous time, 16 midpoints."""
    width = interval / n
    if continuous:
        offsets = (torch.arange(16, dtype=torch.float64) + 0.5) / 16 * width
    else:
        offsets = torch.arange(math.ceil(width), dtype=torch.float64)
    low = 0 if continuous else 1

    def times(c):
        if bool((c >= interval).all()):
            return [c]
        return [torch.where(c < interval, (c + o).clamp(min=low), c) for o in offsets]
    return times
