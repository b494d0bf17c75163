"""Problems with a known solution and a known implicit hypergradient, found in NumPy."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.inner.closed_form import ClosedForm
from bilevel.inner.ridge import Ridge
from bilevel.inner.solution import solution_keys, solution_stats
from bilevel.problem import Key, Meta, Problem, Solution, Task
from bilevel.testing.problems import Answer, Case


@dataclass(frozen=True)
class Newton:
    """`num_steps` Newton steps on params that are one vector: a solver that no one differentiates."""

    num_steps: int

    def solve(self, problem: Problem, meta: Meta, task: Task, key: Key) -> Solution:
        """From `init`, with full steps."""
        init_key, loss_key = solution_keys(key)

        def loss(params):
            return problem.inner_loss(params, meta, task.support, loss_key)

        def step(_, params):
            return params - jnp.linalg.solve(jax.hessian(loss)(params), jax.grad(loss)(params))

        params = jax.lax.fori_loop(0, self.num_steps, step, problem.init(meta, init_key))
        return Solution(params, solution_stats(problem, params, meta, task, loss_key))


def hessian_matrix(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """A symmetric positive definite matrix: "dense", "diagonal", or "ill-conditioned" (κ = 10⁴).

    >>> hessian_matrix("diagonal", 2, np.random.default_rng(0)).shape
    (2, 2)
    """
    if kind == "diagonal":
        return np.diag(rng.uniform(0.5, 3.0, size))
    factor = rng.normal(size=(size, size))
    if kind == "dense":
        return factor @ factor.T / size + 0.5 * np.eye(size)
    if kind == "ill-conditioned":
        basis = np.linalg.qr(factor)[0]
        return basis * np.geomspace(1e-3, 10.0, size) @ basis.T
    raise ValueError(f"kind must be dense, diagonal or ill-conditioned, got {kind!r}")


def implicit_quadratic(hessian: str = "dense", *, seed: int = 0) -> Case:
    """A quadratic, solved exactly; params and meta are nested, meta acts in every place it can.

        inner ½ φᵀAφ − φᵀ(Bθ + b),   outer ½ |φ − c − s|²,   φ₀ = init,   task (b, c)
        dF/dθ = Bᵀ A⁻¹ (φ* − c − s),   dF/ds = −(φ* − c − s),   dF/dinit = 0

    Args:
        hessian: kind of A, see `hessian_matrix`.
        seed: of the matrices.

    >>> sorted(implicit_quadratic().meta)
    ['init', 'inner', 'outer']
    """
    rng = np.random.default_rng(seed)
    size = 6
    a, b = hessian_matrix(hessian, size, rng), rng.normal(size=(size, 3))
    task = Task(support=rng.normal(size=size), query=rng.normal(size=size))
    meta = {
        "init": {"w": (rng.normal(size=4), None), "v": [rng.normal(size=(2, 1))]},
        "inner": {"theta": rng.normal(size=3)},
        "outer": [rng.normal(size=size)],
    }

    def flat(params):
        return jnp.concatenate([params["w"][0], params["v"][0].ravel()])

    def tree(vector):
        return {"w": (vector[:4], None), "v": [vector[4:].reshape(2, 1)]}

    def inner_loss(params, meta, batch, key):
        phi = flat(params)
        return 0.5 * phi @ a @ phi - phi @ (b @ meta["inner"]["theta"] + batch)

    def outer_loss(params, meta, batch, key):
        return 0.5 * jnp.sum((flat(params) - batch - meta["outer"][0]) ** 2)

    def formula(meta, support, key):
        return tree(jnp.linalg.solve(jnp.asarray(a), b @ meta["inner"]["theta"] + support))

    phi = np.linalg.solve(a, b @ meta["inner"]["theta"] + task.support)
    error = phi - task.query - meta["outer"][0]
    grad = {
        "init": jax.tree.map(np.zeros_like, meta["init"]),
        "inner": {"theta": b.T @ np.linalg.solve(a, error)},
        "outer": [-error],
    }
    problem = Problem(lambda meta, key: meta["init"], inner_loss, outer_loss)
    exact = Answer(float(0.5 * error @ error), grad)
    # Rounding grows with the condition.
    condition = float(np.linalg.cond(a))
    return Case(
        problem,
        ClosedForm(formula),
        meta,
        task,
        exact,
        tolerance=1e-14 * condition + 1e-12,
        converged=True,
        quadratic=True,
        condition=condition,
    )


def ridge_penalties(num_examples: int = 8, *, seed: int = 0) -> Case:
    """Ridge regression with a learned penalty for each of 5 features.

        φ* = A⁻¹ Xᵀy / n,  A = XᵀX / n + diag(e^θ),      dF/dθ = −e^θ ⊙ φ* ⊙ A⁻¹ X_vᵀ (X_v φ* − y_v) / m

    Args:
        num_examples: n; below 5 the solver takes its dual form.
        seed: of the data.

    >>> ridge_penalties().exact.grad.shape
    (5,)
    """
    rng = np.random.default_rng(seed)
    x, x_query = rng.normal(size=(num_examples, 5)), rng.normal(size=(7, 5))
    y, y_query = rng.normal(size=num_examples), rng.normal(size=7)
    theta = rng.uniform(-2, 0, size=5)

    ridge = Ridge(lambda meta, x: x, jnp.exp)
    problem = Problem(lambda meta, key: jnp.zeros(5), ridge.loss, ridge.error)
    a = x.T @ x / num_examples + np.diag(np.exp(theta))
    phi = np.linalg.solve(a, x.T @ y / num_examples)
    error = x_query @ phi - y_query
    grad = -np.exp(theta) * phi * np.linalg.solve(a, x_query.T @ error / 7)
    exact = Answer(float(error @ error / 14), grad)
    task = Task((x, y), (x_query, y_query))
    return Case(problem, ridge, theta, task, exact, tolerance=1e-11, converged=True)


def logistic(*, seed: int = 0) -> Case:
    """Logistic regression with learned penalties and example weights, solved by Newton steps.

        inner Σᵢ σ(wᵢ) log(1 + exp(−yᵢ xᵢᵀφ)) / n + ½ Σⱼ e^{ρⱼ} φⱼ²,   outer: the mean loss at temperature τ

    The answer is the implicit formula with the Hessian written out, in NumPy.

    >>> sorted(logistic().meta)
    ['log_penalty', 'temperature', 'weights']
    """
    rng = np.random.default_rng(seed)
    n, d = 12, 4
    x, x_query = rng.normal(size=(n, d)), rng.normal(size=(9, d))
    y, y_query = np.sign(rng.normal(size=n)), np.sign(rng.normal(size=9))
    meta = {
        "log_penalty": rng.uniform(-3, -1, size=d),
        "weights": rng.normal(size=n),
        "temperature": np.array(1.3),
    }

    def losses(params, batch):
        return jax.nn.softplus(-batch[1] * (batch[0] @ params))

    problem = Problem(
        init=lambda meta, key: jnp.zeros(d),
        inner_loss=lambda params, meta, batch, key: (
            jnp.mean(jax.nn.sigmoid(meta["weights"]) * losses(params, batch))
            + 0.5 * jnp.exp(meta["log_penalty"]) @ params**2
        ),
        outer_loss=lambda params, meta, batch, key: jnp.mean(losses(params / meta["temperature"], batch)),
    )

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    weight, penalty, tau = sigmoid(meta["weights"]), np.exp(meta["log_penalty"]), meta["temperature"]
    phi = np.zeros(d)
    for _ in range(30):
        s = sigmoid(-y * (x @ phi))
        gradient = -x.T @ (weight * y * s) / n + penalty * phi
        hessian = (x.T * (weight * s * (1 - s) / n)) @ x + np.diag(penalty)
        phi = phi - np.linalg.solve(hessian, gradient)
    margin = y_query * (x_query @ phi) / tau
    outer_grad = -x_query.T @ (y_query * sigmoid(-margin)) / 9 / tau
    q = np.linalg.solve(hessian, outer_grad)
    per_example = -(y * s)[:, None] * x / n  # gradient of each example's loss
    grad = {
        "log_penalty": -penalty * phi * q,
        "weights": -weight * (1 - weight) * (per_example @ q),
        "temperature": np.mean(sigmoid(-margin) * margin) / tau,
    }
    exact = Answer(float(np.mean(np.log1p(np.exp(-margin)))), grad)
    task = Task((x, y), (x_query, y_query))
    return Case(problem, Newton(30), meta, task, exact, tolerance=1e-10, converged=True)


IMPLICIT_PROBLEMS: dict[str, Callable[[], Case]] = {
    "implicit-quadratic": implicit_quadratic,
    "implicit-quadratic-diagonal": partial(implicit_quadratic, "diagonal"),
    "implicit-quadratic-ill-conditioned": partial(implicit_quadratic, "ill-conditioned"),
    "ridge-penalties": ridge_penalties,
    "ridge-penalties-dual": partial(ridge_penalties, 3),
    "logistic": logistic,
}
