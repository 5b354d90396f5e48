r"""A Gaussian mixture whose ideal network is known exactly: the oracle of the tests, the theory
and the tutorial.

    x_0 ~ sum_k w_k N(mu_k, sigma_k^2 I)   =>   x_t ~ sum_k w_k N(a mu_k, v_k I),   v_k = a^2 sigma_k^2 + s^2

    responsibility  r_k(x) = w_k N(x; a mu_k, v_k I) / sum_j (the same)
    eps*(x, t) = E[eps | x_t]  = sum_k r_k s (x - a mu_k)/v_k                    ( = -s times the score )
    x0*(x, t)  = E[x_0 | x_t]  = sum_k r_k (mu_k + a sigma_k^2 (x - a mu_k)/v_k)

oracle() dresses these up as a drop-in network net(x, c), so that a sampler, loss or analysis under
test runs on the one problem where the right answer is known. With E-TSDM the best a network can do
is the average over a sub-interval (E-TSDM, theorem 4.1), and that is what the oracle then returns.

What this file does not do: learn, or imitate images.

    python -c "import toy; print(toy.two_bumps().sample(5))"

x (B, ...) float64; w (K,), mu (K, ...), sigma (K,); D dimensions of one x; a, s schedule
coefficients.
"""

import math

import torch


class Mixture:
    """weights (K,), means (K, ...), stds (K,): isotropic Gaussians; everything is kept in
    float64."""

    def __init__(self, weights, means, stds):
        self.weights, self.means, self.stds = (torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, stds))
        self.weights = self.weights / self.weights.sum()

    def sample(self, n, generator=None):
        """n draws of x_0: (n, ...)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        noise = torch.randn((n, *self.means.shape[1:]), dtype=torch.float64, generator=generator)
        return self.means[k] + self.stds[k].reshape(-1, *[1] * (noise.dim() - 1)) * noise

    def mean(self):
        return torch.tensordot(self.weights, self.means, 1)

    def variance(self):
        """Per coordinate: E[sigma^2 + mu^2] - mean^2."""
        square = torch.tensordot(self.weights, self.means**2, 1) + (self.weights * self.stds**2).sum()
        return square - self.mean() ** 2

    def posterior(self, x, a, s):
        """(x0*, eps*), each like x (B, ...); a and s are scalars or (B,)."""
        flat, means = x.double().flatten(1), self.means.flatten(1)  # (B, D), (K, D)
        a, s = (torch.as_tensor(c, dtype=torch.float64).reshape(-1, 1) for c in (a, s))  # (B or 1, 1)
        v = a**2 * self.stds**2 + s**2  # (B or 1, K)
        off = flat[:, None] - a[:, :, None] * means  # x - a mu_k: (B, K, D)
        log_r = self.weights.log() - flat.shape[1] / 2 * v.log() - off.square().sum(2) / (2 * v)
        r = log_r.softmax(1)[:, :, None]  # (B, K, 1)
        x0 = (r * (means + (a * self.stds**2 / v)[:, :, None] * off)).sum(1)
        eps = (r * (s / v)[:, :, None] * off).sum(1)
        return x0.reshape(x.shape), eps.reshape(x.shape)


def two_bumps(shape=(1,)):
    """An uneven pair, far enough apart to be two things and near enough to interact."""
    ones = torch.ones(shape, dtype=torch.float64)
    return Mixture([0.3, 0.7], torch.stack([-0.6 * ones, 0.4 * ones]), [0.15, 0.25])


def one_gaussian(shape=(1,), std=0.5):
    """x_0 ~ N(0, std^2): every formula has one line."""
    return Mixture([1.0], torch.zeros(1, *shape, dtype=torch.float64), [std])


def oracle(mixture, schedule, prediction="eps", times=None):
    r"""The ideal network net(x (B, ...), c (B,)) -> like x, for eps, v or x0 prediction.

    times(c) lists the times that condition c may stand for, each (B,): the answer is the average
    over them. None: c is t. shared_times() lists E-TSDM's; a remap's inverse gives one:
    times=lambda c: [unremap(c, "sqrt")].
    """
    def net(x, c):
        total = torch.zeros_like(x, dtype=torch.float64)
        candidates = [c.double()] if times is None else times(c.double())
        for t in candidates:
            a, s = schedule.coefficients(t)
            x0, eps = mixture.posterior(x, a, s)
            a, s = (k.reshape(-1, *[1] * (x.dim() - 1)) for k in (a, s))
            total += {"eps": eps, "x0": x0, "v": a * eps - s * x0}[prediction]
        return (total / len(candidates)).to(x.dtype)
    return net


def shared_times(interval, n, continuous=False):
    """times(c) for E-TSDM: the times of the sub-interval that begins at c (its integers from 1 on,
    or 32 midpoints)."""
    width = interval / n
    if continuous:
        offsets = (torch.arange(32, dtype=torch.float64) + 0.5) / 32 * width
    else:
        offsets = torch.arange(math.ceil(width), dtype=torch.float64)
    return lambda c: [torch.where(c < interval, (c + o).clamp(min=0 if continuous else 1), c) for o in offsets]
