"""Six stochastic bilevel methods written straight down in numpy, compiled by numba.

What `bench/stochastic.py` holds bilevel's estimators against: the same algorithms, batch sizes, steps and
start, as plain loops over minibatches with the derivatives of the two problems worked out by hand. A method
takes the row numbers of every batch as arguments, so that both can be given the same ones.

A problem is five functions of one batch (`Oracles`); parameters w are `[p]` or `[classes, p]`, θ is `[m]`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np


class Oracles(NamedTuple):
    """The derivatives of one problem on a batch.

    Args:
        gradient: `(X, y, rows, w, θ) -> ∇w g`.
        products: `(X, y, rows, w, θ, v) -> (∇w g, ∇²ww g v, (∂θ∇w g)ᵀ v)`.
        theta: `(X, y, rows, w, θ) -> ∂θ g`.
        slope: `(X, y, rows, w) -> ∂w f`; neither problem's outer loss holds θ.
    """

    gradient: Callable
    products: Callable
    theta: Callable
    slope: Callable


class Arrays(NamedTuple):
    """Both data sets."""

    x: np.ndarray
    y: np.ndarray
    query_x: np.ndarray
    query_y: np.ndarray


# One penalty a feature: g = mean log(1 + exp(−y x·w)) + ½ Σ exp(θₖ) wₖ²,  f = mean log(1 + exp(−y x·w))


@numba.njit
def logistic_slope(x, y, rows, w):
    x, y = x[rows], y[rows]
    return x.T @ (-y / (1 + np.exp(y * (x @ w)))) / len(rows)


@numba.njit
def logistic_gradient(x, y, rows, w, theta):
    return logistic_slope(x, y, rows, w) + np.exp(theta) * w


@numba.njit
def logistic_products(x, y, rows, w, theta, v):
    x, y = x[rows], y[rows]
    s = 1 / (1 + np.exp(y * (x @ w)))
    penalty = np.exp(theta)
    gradient = x.T @ (-y * s) / len(rows) + penalty * w
    hessian = x.T @ (s * (1 - s) * (x @ v)) / len(rows) + penalty * v
    return gradient, hessian, penalty * w * v


@numba.njit
def logistic_theta(x, y, rows, w, theta):
    return 0.5 * np.exp(theta) * w * w


# One weight an example: g = mean σ(θᵢ) CE(w xᵢ, yᵢ) + decay |w|²,  f = mean CE(w xⱼ, yⱼ)


@numba.njit
def softmax(z):
    out = np.empty_like(z)
    for i in range(z.shape[0]):
        e = np.exp(z[i] - z[i].max())
        out[i] = e / e.sum()
    return out


@numba.njit
def sigmoid(t):
    return 1 / (1 + np.exp(-t))


@numba.njit
def softmax_slope(x, y, rows, w):
    x = x[rows]
    p = softmax(x @ w.T)
    for i in range(len(rows)):
        p[i, y[rows[i]]] -= 1
    return p.T @ x / x.dtype.type(len(rows))


def cleaning(decay: float) -> Oracles:
    """The derivatives of data cleaning with this weight decay."""

    @numba.njit
    def gradient(x, y, rows, w, theta):
        x = x[rows]
        p = softmax(x @ w.T)
        for i in range(len(rows)):
            p[i, y[rows[i]]] -= 1
            p[i] *= sigmoid(theta[rows[i]]) / len(rows)
        return p.T @ x + w.dtype.type(2 * decay) * w

    @numba.njit
    def products(x, y, rows, w, theta, v):
        x = x[rows]
        p = softmax(x @ w.T)
        u = x @ v.T
        cross = np.zeros_like(theta)
        for i in range(len(rows)):
            weight = sigmoid(theta[rows[i]]) / len(rows)
            pu = p[i] * u[i]
            curved = pu - p[i] * pu.sum()
            p[i, y[rows[i]]] -= 1
            cross[rows[i]] += weight * (1 - sigmoid(theta[rows[i]])) * (p[i] * u[i]).sum()
            p[i] *= weight
            u[i] = weight * curved
        decays = w.dtype.type(2 * decay)
        return p.T @ x + decays * w, u.T @ x + decays * v, cross

    @numba.njit
    def theta_gradient(x, y, rows, w, theta):
        z = x[rows] @ w.T
        out = np.zeros_like(theta)
        for i in range(len(rows)):
            weight = sigmoid(theta[rows[i]])
            top = z[i].max()
            loss = top + np.log(np.exp(z[i] - top).sum()) - z[i, y[rows[i]]]
            out[rows[i]] += weight * (1 - weight) * loss / len(rows)
        return out

    return Oracles(gradient, products, theta_gradient, softmax_slope)


LOGISTIC = Oracles(logistic_gradient, logistic_products, logistic_theta, logistic_slope)


# The methods. `state` is (θ, φ, q, ...), changed in place; rows are [steps, draws, batch].
# `rate` is the inner one, also of the linear system, `outer` that of θ.


@numba.njit
def soba(oracles, arrays, state, rows, query_rows, rate, outer):
    theta, w, q = state
    for t in range(len(rows)):
        gradient, hessian, cross = oracles[1](arrays[0], arrays[1], rows[t, 0], w, theta, q)
        slope = oracles[3](arrays[2], arrays[3], query_rows[t, 0], w)
        theta += outer * cross
        w -= rate * gradient
        q -= rate * (hessian - slope)


@numba.njit
def ma_soba(oracles, arrays, state, rows, query_rows, rate, outer):
    theta, w, q, average, weight = state  # weight [1]
    for t in range(len(rows)):
        gradient, hessian, cross = oracles[1](arrays[0], arrays[1], rows[t, 0], w, theta, q)
        slope = oracles[3](arrays[2], arrays[3], query_rows[t, 0], w)
        average *= 0.9
        average -= 0.1 * cross
        weight[0] = 0.9 * weight[0] + 0.1
        theta -= (outer / weight[0]) * average
        w -= rate * gradient
        q -= rate * (hessian - slope)


@numba.njit
def saba(oracles, arrays, state, batches, query_batches, rate, outer):
    """`batches`, `query_batches`: the number of the batch at each step `[steps]`."""
    theta, w, q, gradients, hessians, crosses, slopes, mean_g, mean_h, mean_c, mean_s = state
    size = len(arrays[0]) // len(gradients)
    for t in range(len(batches)):
        i, j = batches[t], query_batches[t]
        rows = np.arange(i * size, (i + 1) * size)
        query_rows = np.arange(j * size, (j + 1) * size)
        gradient, hessian, cross = oracles[1](arrays[0], arrays[1], rows, w, theta, q)
        slope = oracles[3](arrays[2], arrays[3], query_rows, w)
        change_g, change_h = gradient - gradients[i], hessian - hessians[i]
        change_c, change_s = cross - crosses[i], slope - slopes[j]
        gradients[i], hessians[i], crosses[i], slopes[j] = gradient, hessian, cross, slope
        theta += outer * (change_c + mean_c)
        w -= rate * (change_g + mean_g)
        q -= rate * (change_h + mean_h - change_s - mean_s)
        mean_g += change_g / w.dtype.type(len(gradients))
        mean_h += change_h / w.dtype.type(len(gradients))
        mean_c += change_c / w.dtype.type(len(gradients))
        mean_s += change_s / w.dtype.type(len(slopes))


@numba.njit
def amigo(oracles, arrays, state, rows, query_rows, rate, outer):
    """Ten inner steps, ten of the linear system: rows [steps, 21, batch]."""
    theta, w, q = state
    for t in range(len(rows)):
        for k in range(10):
            w -= rate * oracles[0](arrays[0], arrays[1], rows[t, k], w, theta)
        slope = oracles[3](arrays[2], arrays[3], query_rows[t, 0], w)
        for k in range(10, 20):
            q -= rate * (oracles[1](arrays[0], arrays[1], rows[t, k], w, theta, q)[1] - slope)
        theta += outer * oracles[1](arrays[0], arrays[1], rows[t, 20], w, theta, q)[2]


@numba.njit
def stocbio(oracles, arrays, state, rows, query_rows, rate, outer):
    """Ten inner steps, ten terms of the series: rows [steps, 20, batch]."""
    theta, w, _ = state
    for t in range(len(rows)):
        for k in range(10):
            w -= rate * oracles[0](arrays[0], arrays[1], rows[t, k], w, theta)
        slope = oracles[3](arrays[2], arrays[3], query_rows[t, 0], w)
        r, total = slope.copy(), slope.copy()
        for k in range(10, 19):
            r -= rate * oracles[1](arrays[0], arrays[1], rows[t, k], w, theta, r)[1]
            total += r
        q = rate * total
        theta += outer * oracles[1](arrays[0], arrays[1], rows[t, 19], w, theta, q)[2]


@numba.njit
def f2sa(oracles, arrays, state, rows, query_rows, rate, outer):
    """ψ and φ share the first rows; the second are those of the direction: rows [steps, 2, batch]."""
    theta, psi, phi, schedule = state  # schedule: the multiplier and its growth [2]
    for t in range(len(rows)):
        multiplier = psi.dtype.type(schedule[0])
        slope = oracles[3](arrays[2], arrays[3], query_rows[t, 0], phi)
        psi -= rate * oracles[0](arrays[0], arrays[1], rows[t, 0], psi, theta)
        phi -= rate * (oracles[0](arrays[0], arrays[1], rows[t, 0], phi, theta) + slope / multiplier)
        pull = oracles[2](arrays[0], arrays[1], rows[t, 1], phi, theta)
        pull -= oracles[2](arrays[0], arrays[1], rows[t, 1], psi, theta)
        theta -= outer * multiplier * pull
        schedule[0] += schedule[1]


class Method(NamedTuple):
    """A method, and how many batches of support and query a step draws; 0 is the number of a fixed batch."""

    run: Any
    draws: int
    query_draws: int


METHODS = {
    "SOBA": Method(soba, 1, 1),
    "SABA": Method(saba, 0, 0),
    "MA-SOBA": Method(ma_soba, 1, 1),
    "AmIGO": Method(amigo, 21, 1),
    "stocBiO": Method(stocbio, 20, 1),
    "F2SA": Method(f2sa, 2, 1),
}


def draw(method: Method, arrays: Arrays, batch_size: int, num_steps: int, rng: np.random.Generator):
    """Row numbers for `num_steps` steps, uniformly and with replacement."""
    counts = [len(part) for part in (arrays.x, arrays.query_x)]
    if not method.draws:
        return tuple(rng.integers(0, n // batch_size, num_steps) for n in counts)
    draws = zip(counts, (method.draws, method.query_draws), strict=True)
    return tuple(rng.integers(0, n, (num_steps, d, batch_size)) for n, d in draws)
