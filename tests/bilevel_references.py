"""Small problems whose implicit hypergradients are known in NumPy, for the tests of several estimators."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl


class Reference(NamedTuple):
    """A problem with the exact φ*(θ), q*(θ) = (∇²φφ g)⁻¹ ∂φ f and dF/dθ, and the same for a penalty."""

    problem: bl.Problem
    meta: dict
    task: bl.Task
    solution: object  # meta -> (params, q, grad)
    penalty: object  # (meta, multiplier) -> grad


def quadratic(seed=0) -> Reference:
    """g = ½ φᵀAφ − φᵀ(Bθ + b), f = ½ |φ − c|² + ½ |θ|² / 10, task (b, c)."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(4, 4))
    a = a @ a.T / 4 + 0.5 * np.eye(4)
    b = rng.normal(size=(4, 3))
    task = bl.Task(support=rng.normal(size=4), query=rng.normal(size=4))
    problem = bl.Problem(
        init=lambda meta, key: {"w": jnp.ones(4)},
        inner_loss=lambda params, meta, batch, key: (
            0.5 * params["w"] @ a @ params["w"] - params["w"] @ (b @ meta["theta"] + batch)
        ),
        outer_loss=lambda params, meta, batch, key: (
            0.5 * jnp.sum((params["w"] - batch) ** 2) + 0.05 * jnp.sum(meta["theta"] ** 2)
        ),
    )

    def solution(meta):
        theta = np.asarray(meta["theta"])
        w = np.linalg.solve(a, b @ theta + task.support)
        q = np.linalg.solve(a, w - task.query)
        return {"w": w}, {"w": q}, {"theta": b.T @ q + 0.1 * theta}

    def penalty(meta, multiplier):
        theta = np.asarray(meta["theta"])
        psi = np.linalg.solve(a, b @ theta + task.support)
        lifted = a + np.eye(4) / multiplier
        phi = np.linalg.solve(lifted, b @ theta + task.support + task.query / multiplier)
        return {"theta": 0.1 * theta - multiplier * b.T @ (phi - psi)}

    return Reference(problem, {"theta": rng.normal(size=3)}, task, solution, penalty)


def ridge(seed=0, rows=24) -> Reference:
    """Means of squared errors with a penalty for each feature, and a little decay of the penalties."""
    rng = np.random.default_rng(seed)
    x, noise = rng.normal(size=(2 * rows, 3)), 0.5 * rng.normal(size=2 * rows)
    y = x @ np.array([1.0, -0.5, 0.1]) + noise
    task = bl.Task((x[:rows], y[:rows]), (x[rows:], y[rows:]))

    def half_error(params, batch):
        x, y = batch
        return 0.5 * jnp.mean((x @ params - y) ** 2)

    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(3),
        inner_loss=lambda params, meta, batch, key: (
            half_error(params, batch) + 0.5 * jnp.sum(jnp.exp(meta["penalty"]) * params**2)
        ),
        outer_loss=lambda params, meta, batch, key: (
            half_error(params, batch) + 0.01 * jnp.sum(meta["penalty"] ** 2)
        ),
    )

    def normal(batch):
        x, y = batch
        return x.T @ x / len(y), x.T @ y / len(y)

    def solution(meta):
        s = np.asarray(meta["penalty"])
        (a, xy), (b, uv) = normal(task.support), normal(task.query)
        h = a + np.diag(np.exp(s))
        phi = np.linalg.solve(h, xy)
        q = np.linalg.solve(h, b @ phi - uv)
        return phi, q, {"penalty": -np.exp(s) * phi * q + 0.02 * s}

    def penalty(meta, multiplier):
        s = np.asarray(meta["penalty"])
        (a, xy), (b, uv) = normal(task.support), normal(task.query)
        h = a + np.diag(np.exp(s))
        psi = np.linalg.solve(h, xy)
        phi = np.linalg.solve(h + b / multiplier, xy + uv / multiplier)
        return {"penalty": 0.5 * multiplier * np.exp(s) * (phi**2 - psi**2) + 0.02 * s}

    return Reference(problem, {"penalty": rng.normal(size=3) - 1.0}, task, solution, penalty)


def weighted(seed=0, rows=24) -> Reference:
    """Ridge regression on rows of three kinds, with a learned weight exp(θ) for each kind."""
    rng = np.random.default_rng(seed)
    x, kind = rng.normal(size=(2 * rows, 3)), rng.integers(0, 3, size=2 * rows)
    y = x @ np.array([1.0, -0.5, 0.1]) + np.array([0.1, 0.5, 2.0])[kind] * rng.normal(size=2 * rows)
    task = bl.Task((x[:rows], y[:rows], kind[:rows]), (x[rows:], y[rows:], kind[rows:]))

    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(3),
        inner_loss=lambda params, meta, batch, key: (
            0.5 * jnp.mean(jnp.exp(meta["weight"])[batch[2]] * (batch[0] @ params - batch[1]) ** 2)
            + 0.1 * jnp.sum(params**2)
        ),
        outer_loss=lambda params, meta, batch, key: 0.5 * jnp.mean((batch[0] @ params - batch[1]) ** 2),
    )

    def solve(meta, multiplier=np.inf):
        w = np.exp(np.asarray(meta["weight"]))[task.support[2]][:, None] / rows
        (x, y, _), (u, v, _) = task
        h = x.T @ (w * x) + 0.2 * np.eye(3)
        phi = np.linalg.solve(
            h + u.T @ u / rows / multiplier, x.T @ (w[:, 0] * y) + u.T @ v / rows / multiplier
        )
        return phi, h, u.T @ (u @ phi - v) / rows

    def by_kind(meta, values):
        kinds = np.eye(3)[task.support[2]]
        return np.exp(np.asarray(meta["weight"])) * (kinds.T @ values) / rows

    def solution(meta):
        phi, h, slope = solve(meta)
        q = np.linalg.solve(h, slope)
        x, y, _ = task.support
        return phi, q, {"weight": -by_kind(meta, (x @ phi - y) * (x @ q))}

    def penalty(meta, multiplier):
        psi, phi = solve(meta)[0], solve(meta, multiplier)[0]
        x, y, _ = task.support
        return {"weight": 0.5 * multiplier * by_kind(meta, (x @ phi - y) ** 2 - (x @ psi - y) ** 2)}

    return Reference(problem, {"weight": 0.3 * rng.normal(size=3)}, task, solution, penalty)


def logistic(seed=0, rows=16) -> Reference:
    """Logistic regression with a penalty for each feature: not quadratic, solved by Newton's method."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * rows, 3))
    y = np.sign(x @ np.array([2.0, -1.0, 0.0]) + rng.normal(size=2 * rows))
    task = bl.Task((x[:rows], y[:rows]), (x[rows:], y[rows:]))

    def mean_loss(params, batch):
        x, y = batch
        return jnp.mean(jnp.logaddexp(0.0, -y * (x @ params)))

    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(3),
        inner_loss=lambda params, meta, batch, key: (
            mean_loss(params, batch) + 0.5 * jnp.sum(jnp.exp(meta["penalty"]) * params**2)
        ),
        outer_loss=lambda params, meta, batch, key: mean_loss(params, batch),
    )

    def gradient_and_hessian(phi, batch):
        x, y = batch
        p = 1 / (1 + np.exp(y * (x @ phi)))
        return -x.T @ (p * y) / len(y), (x.T * (p * (1 - p))) @ x / len(y)

    def newton(meta, multiplier=np.inf):
        s, phi = np.exp(np.asarray(meta["penalty"])), np.zeros(3)
        for _ in range(50):
            g, h = gradient_and_hessian(phi, task.support)
            slope, curve = gradient_and_hessian(phi, task.query)
            phi = phi - np.linalg.solve(h + np.diag(s) + curve / multiplier, g + s * phi + slope / multiplier)
        return phi, h + np.diag(s), slope

    def solution(meta):
        phi, h, slope = newton(meta)
        q = np.linalg.solve(h, slope)
        return phi, q, {"penalty": -np.exp(meta["penalty"]) * phi * q}

    def penalty(meta, multiplier):
        psi, phi = newton(meta)[0], newton(meta, multiplier)[0]
        return {"penalty": 0.5 * multiplier * np.exp(meta["penalty"]) * (phi**2 - psi**2)}

    return Reference(problem, {"penalty": rng.normal(size=3) - 1.0}, task, solution, penalty)


REFERENCES = {"quadratic": quadratic, "ridge": ridge, "weighted": weighted, "logistic": logistic}


def as_arrays(reference):
    """Meta and task on the device."""
    return jax.tree.map(jnp.asarray, (reference.meta, reference.task))


def repeat(estimator, solver, reference, calls, *, meta=None, state=None, seed=0):
    """Call an estimator again and again at one θ: the stacked hypergradients, and the last state."""
    start, task = as_arrays(reference)
    meta = start if meta is None else meta

    @jax.jit
    def run(meta, task, state, key):
        def body(state, key):
            h, state = estimator.estimate(reference.problem, solver, meta, task, state, key)
            return state, h

        init_key, key = jax.random.split(key)
        if state is None:
            state = estimator.init(reference.problem, solver, meta, task, init_key)
        return jax.lax.scan(body, state, jax.random.split(key, calls))

    state, h = run(meta, task, state, jax.random.key(seed))
    return h, state


def last(tree):
    """The last row of what `repeat` stacked."""
    return jax.tree.map(lambda leaf: np.asarray(leaf[-1]), tree)


def floats(stats):
    """Stats as `doubts` takes them."""
    return {name: float(value) for name, value in stats.items()}
