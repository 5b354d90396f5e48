r"""A Gaussian mixture whose ideal network is known exactly: the oracle of tests and theory.

    x_0 ~ Σ_k w_k N(μ_k, σ_k² I)    =>    x_t ~ Σ_k w_k N(a μ_k, v_k I),    v_k = a² σ_k² + s²

    r_k(x)   = w_k N(x; a μ_k, v_k I) / Σ_j (the same)             which bump x_t came from
    ε*(x, t) = E[ε | x_t]   = Σ_k r_k s (x − a μ_k)/v_k            = −s times the score
    x0*(x, t) = E[x_0 | x_t] = Σ_k r_k (μ_k + a σ_k² (x − a μ_k)/v_k)

oracle() makes of these a drop-in network net(x, c), so that a sampler, loss or analysis under test
runs on the one problem where the right answer is known. Under E-TSDM its answer is theorem 4.1's,
the average of ε* over a sub-interval. (A network trained there comes to a slightly better one: each
t' counts by how likely it is to have made this x, q_t'(x).)

What this file does not do: learn anything, or imitate images.

    python -c "import toy; print(toy.two_bumps().sample(5))"

x (B, ...); weights w (K,), means μ (K, ...), stds σ (K,); D dimensions of one x; a, s coefficients.
"""

import math

import torch


class Mixture:
    """weights (K,), means (K, ...), stds (K,): isotropic Gaussians; everything is kept in
    float64."""

    def __init__(self, weights, means, stds):
        self.weights, self.means, self.stds = (
            torch.as_tensor(v, dtype=torch.float64) for v in (weights, means, stds))
        self.weights = self.weights / self.weights.sum()

    def sample(self, n, generator=None):
        """n draws of x_0: (n, ...)."""
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        z = torch.randn((n, *self.means.shape[1:]), dtype=torch.float64, generator=generator)
        return self.means[k] + like(self.stds[k], z) * z

    def mean(self):
        return torch.tensordot(self.weights, self.means, 1)

    def variance(self):
        """Of each coordinate: E[σ² + μ²] − mean²."""
        square = torch.tensordot(self.weights, self.means**2, 1)
        return square + self.weights @ self.stds**2 - self.mean() ** 2

    def posterior(self, x, a, s):
        """(x0*, ε*), each like x (B, ...); a and s are scalars or (B,)."""
        flat, means = x.double().flatten(1), self.means.flatten(1)  # (B, D), (K, D)
        a, s = (torch.as_tensor(c, dtype=torch.float64).reshape(-1, 1) for c in (a, s))
        v = a**2 * self.stds**2 + s**2  # (B or 1, K)
        off = flat[:, None] - a[:, :, None] * means  # x − a μ_k: (B, K, D)
        log_r = self.weights.log() - flat.shape[1] / 2 * v.log() - off.square().sum(2) / (2 * v)
        r = log_r.softmax(1)[:, :, None]  # (B, K, 1)
        x0 = (r * (means + (a * self.stds**2 / v)[:, :, None] * off)).sum(1)
        eps = (r * (s / v)[:, :, None] * off).sum(1)
        return x0.reshape(x.shape), eps.reshape(x.shape)


def like(coefficient, x):
    """One number per row, (B,), shaped to multiply x (B, ...)."""
    return coefficient.reshape(-1, *[1] * (x.dim() - 1))


def two_bumps(shape=(1,)):
    """An uneven pair, far enough apart to be two things and near enough to interact."""
    ones = torch.ones(shape, dtype=torch.float64)
    return Mixture([0.3, 0.7], torch.stack([-0.6 * ones, 0.4 * ones]), [0.15, 0.25])


def one_gaussian(shape=(1,), std=0.5):
    """x_0 ~ N(0, std²): every formula has one line."""
    return Mixture([1.0], torch.zeros(1, *shape, dtype=torch.float64), [std])


def oracle(mixture, schedule, prediction="eps", times=None):
    r"""The ideal network net(x (B, ...), c (B,)) -> like x, for eps, v or x0 prediction.

    times(c) lists the times that condition c may stand for, each (B,): the answer is the average
    over them. None: c is t. shared_times() lists E-TSDM's; a remap's inverse gives one:
    times=lambda c: [unremap(c, "sqrt")].
    """
    def net(x, c):
        t = torch.stack([c.double()] if times is None else times(c.double()))  # (m, B)
        a, s = schedule.coefficients(t.flatten())
        x0, eps = mixture.posterior(x.repeat(len(t), *[1] * (x.dim() - 1)), a, s)  # (m B, ...)
        velocity = like(a, eps) * eps - like(s, x0) * x0
        answer = {"eps": eps, "x0": x0, "v": velocity}[prediction]
        return answer.unflatten(0, t.shape).mean(0).to(x.dtype)
    return net


def shared_times(interval, n, continuous=False):
    """times(c) for E-TSDM: the times of the part that begins at c, its integers (1 for 0) or, in
    continuous time, 16 midpoints."""
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
