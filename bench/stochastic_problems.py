"""The problems of `bench/stochastic.py`: data, both losses, and the value function to high precision.

    h(θ) = f(φ*(θ)),   φ*(θ) = argmin over φ of g(φ, θ),   dh/dθ by the implicit function theorem

Rows beyond a whole number of batches are left out, so that SABA can cut the sets into batches.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import stochastic_reference as reference

import bilevel as bl

DECAY = 0.2  # of data cleaning, as published


class Work(NamedTuple):
    """One problem.

    Args:
        title: for tables and pictures.
        problem, task, meta: as bilevel sees it, and where θ starts.
        arrays, oracles: as the reference sees it.
        value: `value(θ, φ₀) -> (h, dh/dθ, φ*)` in float64, the inner problem solved from φ₀.
        rates: the inner rates of the grid, also of the linear system.
        outer_rates: the outer rates of the grid.
        seconds: of a run in the full benchmark.
    """

    title: str
    problem: bl.Problem
    task: bl.Task
    meta: np.ndarray
    arrays: reference.Arrays
    oracles: reference.Oracles
    value: Callable
    batch_size: int
    rates: tuple[float, ...]
    outer_rates: tuple[float, ...]
    seconds: float


# Logistic regression with a penalty for each feature


@jax.custom_jvp
def softplus(z):
    """log(1 + eᶻ), with a derivative of one exponential."""
    return jnp.logaddexp(z, 0.0)


softplus.defjvp(lambda z, t: (softplus(*z), jax.nn.sigmoid(*z) * t[0]))


def logistic_loss(params, meta, batch, key):
    x, y = batch
    return jnp.mean(softplus(-y * (x @ params)))


def penalized_loss(params, meta, batch, key):
    return logistic_loss(params, meta, batch, key) + 0.5 * jnp.sum(jnp.exp(meta) * params**2)


@jax.jit
def _solved_logistic(meta, params, support, query):
    """Newton's method to the end, and a direct solve: h, dh/dθ, φ*."""

    def gradient(params):
        return jax.grad(penalized_loss)(params, meta, support, None)

    def hessian(params):
        x, y = support
        s = jax.nn.sigmoid(y * (x @ params))
        return (x * (s * (1 - s))[:, None]).T @ x / len(x) + jnp.diag(jnp.exp(meta))

    def body(carry):
        params, g, i = carry
        params = params - jnp.linalg.solve(hessian(params), g)
        return params, gradient(params), i + 1

    def unfinished(carry):
        return (jnp.linalg.norm(carry[1]) > 1e-13) & (carry[2] < 30)

    params, _, _ = jax.lax.while_loop(unfinished, body, (params, gradient(params), 0))
    h, slope = jax.value_and_grad(logistic_loss)(params, meta, query, None)
    q = jnp.linalg.solve(hessian(params), slope)
    return h, -jnp.exp(meta) * params * q, params


def logistic_value(support, query) -> Callable:
    """`Work.value` of these data, which the compiled call takes as arguments."""
    return lambda meta, params: _solved_logistic(meta, params, support, query)


def logistic(title, support, query, batch_size, rates, outer_rates, seconds) -> Work:
    """The work for two parts (x [n, p], y ±1 [n])."""
    x, y = whole_batches(support, batch_size)
    query_x, query_y = whole_batches(query, batch_size)
    features = x.shape[1]
    problem = bl.Problem(lambda meta, key: jnp.zeros(features), penalized_loss, logistic_loss)
    task = bl.Task((jnp.asarray(x), jnp.asarray(y)), (jnp.asarray(query_x), jnp.asarray(query_y)))
    return Work(
        f"{title}, {len(x)} and {len(query_x)} rows of {features}",
        problem,
        task,
        np.zeros(features),
        reference.Arrays(x, y, query_x, query_y),
        reference.LOGISTIC,
        logistic_value(*task),
        batch_size,
        rates,
        outer_rates,
        seconds,
    )


def whole_batches(part, batch_size):
    """Without the rows of a last batch that is not full, each array as its own contiguous copy."""
    count = len(part[0]) // batch_size * batch_size
    return tuple(np.ascontiguousarray(leaf[:count]) for leaf in part)


def ijcnn1_like(quick: bool) -> Work:
    """A set of the size and kind of IJCNN1: 22 features, ten of them a phase, a tenth of the labels +1."""
    rng = np.random.default_rng(0)
    sizes = (4000, 8000) if quick else (49_990, 91_701)
    weights = rng.standard_normal(22) * np.where(rng.random(22) < 0.5, 3.0, 0.1)
    mixing = np.linalg.qr(rng.standard_normal((12, 12)))[0] * np.geomspace(1.0, 0.03, 12)

    def part(n):
        phase = np.eye(10)[rng.integers(0, 10, n)]
        x = np.concatenate([phase, rng.standard_normal((n, 12)) @ mixing.T], axis=1)
        score = x @ weights
        margin = score - np.quantile(score, 0.9) + 0.5 * rng.logistic(size=n)
        return x, np.where(margin > 0, 1.0, -1.0)

    support, query = (part(n) for n in sizes)
    return logistic("Like IJCNN1 (procedural)", support, query, 64, (0.1, 0.4, 1.6), (0.3, 3.0, 30.0), 3.0)


def ijcnn1(path: Path, test_path: Path) -> Work:
    """The real set, from files in LIBSVM's format."""
    from sklearn.datasets import load_svmlight_file

    parts: list[Any] = []
    for each in (path, test_path):
        if not each.exists():
            raise FileNotFoundError(f"no LIBSVM file {each}; get ijcnn1 from the LIBSVM data page")
        x, y = load_svmlight_file(str(each), n_features=22)
        parts.append((x.toarray(), np.where(y > 0, 1.0, -1.0)))
    return logistic("IJCNN1", parts[0], parts[1], 64, (0.1, 0.4, 1.6), (0.3, 3.0, 30.0), 3.0)


def noisy_query() -> Work:
    """Query labels with 0.3 of the signal: they ask for smaller weights, so that each best penalty is finite.

    On the other sets h falls for ever as θ → ±∞: a feature that helps wants no penalty, one that misleads
    wants all of it.
    """
    rng = np.random.default_rng(0)
    weights = rng.uniform(0.7, 0.9, 20) * rng.choice([-1.0, 1.0], 20)

    def part(n, signal):
        x = rng.standard_normal((n, 20))
        return x, np.where(rng.random(n) < 1 / (1 + np.exp(-signal * (x @ weights))), 1.0, -1.0)

    title = "Noisier query (procedural)"
    rates, outer_rates = (0.003, 0.01, 0.03, 0.1), (0.1, 0.3, 1.0, 3.0, 30.0)
    return logistic(title, part(4096, 1.0), part(4096, 0.3), 16, rates, outer_rates, 0.5)


def bundled(name: str) -> Work:
    """A set of scikit-learn, standardized: breast cancer, or even against odd digits."""
    import sklearn.datasets

    data = getattr(sklearn.datasets, f"load_{name}")()
    y = np.where(data.target if name == "breast_cancer" else data.target % 2, 1.0, -1.0)
    order = np.random.default_rng(0).permutation(len(y))
    half = len(y) // 2
    x = data.data[order].astype(float)
    x = (x - x[:half].mean(0)) / np.maximum(x[:half].std(0), 1e-6)
    x, y = np.clip(x, -5, 5), y[order]
    parts = (x[:half], y[:half]), (x[half:], y[half:])
    return logistic(name.replace("_", " "), *parts, 16, (0.01, 0.04, 0.16), (0.3, 3.0, 30.0), 1.0)


# Data cleaning


def cross_entropy(params, x, y):
    """Of each example `[n]`. A row of φ a class: with a column a class its gradient takes twice as long."""
    scores = x @ params.T
    # A mask, not an index: its derivative is a product, that of an index a scatter.
    right = y[:, None] == jnp.arange(scores.shape[1])
    return jax.nn.logsumexp(scores, axis=1) - jnp.sum(jnp.where(right, scores, 0), 1)


def weighted_loss(params, meta, batch, key):
    x, y, rows = batch
    weights = jax.nn.sigmoid(meta.at[rows].get(mode="promise_in_bounds"))
    return jnp.mean(weights * cross_entropy(params, x, y)) + DECAY * jnp.sum(params**2)


def clean_loss(params, meta, batch, key):
    return jnp.mean(cross_entropy(params, *batch))


_inner_of_all = jax.jit(jax.value_and_grad(weighted_loss))


@jax.jit
def _finish_cleaning(params, meta, support, query):
    """h and dh/dθ at φ*, by conjugate gradients."""
    h, slope = jax.value_and_grad(clean_loss)(params, meta, query, None)

    def gradient(params, meta):
        return jax.grad(weighted_loss)(params, meta, support, None)

    def product(v):
        return jax.jvp(lambda params: gradient(params, meta), (params,), (v,))[1]

    q, _ = jax.scipy.sparse.linalg.cg(product, slope, tol=1e-8)
    return h, -jax.vjp(lambda meta: gradient(params, meta), meta)[1](q)[0]


def cleaning_value(support, query) -> Callable:
    """L-BFGS to the end in float64, and conjugate gradients."""
    wide = lambda batch: tuple(  # noqa: E731
        leaf.astype(float) if leaf.dtype == jnp.float32 else leaf for leaf in batch
    )
    support, query = wide(support), wide(query)

    def value(meta, params):
        meta = jnp.asarray(meta, float)
        shape = params.shape

        def flat(w):
            loss, grad = _inner_of_all(jnp.asarray(w.reshape(shape)), meta, support, None)
            return float(loss), np.ravel(grad)

        options = {"maxiter": 500, "gtol": 1e-9, "ftol": 0.0}
        solved = scipy.optimize.minimize(flat, np.ravel(params), jac=True, method="L-BFGS-B", options=options)
        params = jnp.asarray(solved.x.reshape(shape))
        return *_finish_cleaning(params, meta, support, query), params

    return value


def cleaning(data: Path, num_train: int, num_clean: int) -> Work:
    """MNIST with half of its labels drawn anew, standardized as published; float32."""
    with np.load(data / "mnist.npz") as file:
        images, labels = file["train_images"], file["train_labels"].astype(np.int32)
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(images))[: num_train + num_clean]
    x, y = images[rows].reshape(len(rows), -1).astype(np.float32), labels[rows]
    mean, deviation = x[:num_train].mean(0), x[:num_train].std(0)
    x = (x - mean) / np.where(deviation == 0, 1, deviation)
    noisy = np.where(rng.random(num_train) < 0.5, rng.integers(0, 10, num_train), y[:num_train])
    batch = 64
    x_in, y_in = whole_batches((x[:num_train], noisy.astype(np.int32)), batch)
    x_out, y_out = whole_batches((x[num_train:], y[num_train:]), batch)
    task = bl.Task(
        (jnp.asarray(x_in), jnp.asarray(y_in), jnp.arange(len(x_in), dtype=jnp.int32)),
        (jnp.asarray(x_out), jnp.asarray(y_out)),
    )
    problem = bl.Problem(
        lambda meta, key: jnp.zeros((10, x.shape[1]), jnp.float32), weighted_loss, clean_loss
    )
    return Work(
        f"Data cleaning, {len(x_in)} and {len(x_out)} images of MNIST",
        problem,
        task,
        np.full(len(x_in), -2.0, np.float32),
        reference.Arrays(x_in, y_in, x_out, y_out),
        reference.cleaning(DECAY),
        cleaning_value(*task),
        batch,
        (0.01, 0.03, 0.1),
        (300.0, 3000.0, 30000.0),
        6.0,
    )
