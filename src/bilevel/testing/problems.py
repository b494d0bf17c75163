"""Problems whose hypergradients are known without differentiating anything in JAX."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.inner import Gradient
from bilevel.problem import InnerSolver, Meta, Problem, Task
from bilevel.testing.finite_differences import gradient_by_differences


class Answer(NamedTuple):
    """What an estimator must find: the outer loss, and a tree like `meta`, in float64."""

    value: float
    grad: Meta


@dataclass(frozen=True)
class Case:
    """A problem with its answers. Arrays are NumPy's, float64: JAX keeps that only under x64.

    Args:
        problem: what is learnt.
        solver: how its inner problem is solved.
        meta: where the hypergradient is asked for.
        task: the one task.
        exact: of the outer loss after the last step.
        first_order: the same with dφ_K/dφ₀ taken as the identity and no other path through the steps.
        every_step: of the mean of the outer losses after each step; None where there is no step.
        tolerance: how far, relative to the largest element, `exact` itself may be off.
        converged: whether the solver ends at the minimum, so that implicit estimators are exact too.
        quadratic: whether the outer loss after the solve is quadratic in meta, so that central differences of
            any step, and with them evolution strategies of any σ, are unbiased.
        condition: of the inner Hessian, about.
    """

    problem: Problem
    solver: InnerSolver
    meta: Meta
    task: Task
    exact: Answer
    first_order: Answer | None = None
    every_step: Answer | None = None
    tolerance: float = 1e-10
    converged: bool = False
    quadratic: bool = False
    condition: float = 10.0


def quadratic(num_steps: int, *, optimizer: str = "sgd", seed: int = 0) -> Case:
    """Gradient descent on a quadratic: a linear recursion, so everything has a closed form.

        inner  ½ φᵀAφ − φᵀ(Bθ + b),   outer  ½ |φ − c|²,   φ₀ = init,   task (b, c)
        vₖ₊₁ = μ vₖ + Aφₖ − Bθ − b,   φₖ₊₁ = φₖ − αₖ vₖ₊₁

    The Jacobian of φₖ in each leaf of meta follows from the derivative of the recursion, in NumPy.

    Args:
        num_steps: K.
        optimizer: "sgd" (α = exp(log_rate)), "momentum" (μ learned too) or "schedule"
            (αₖ = exp(log_rate − decay k), both learned).
        seed: of the matrices.

    Raises:
        ValueError: for another optimizer.

    >>> case = quadratic(num_steps=3)
    >>> sorted(case.meta), case.exact.grad["init"].shape
    (['init', 'log_rate', 'theta'], (4,))
    """
    if optimizer not in ("sgd", "momentum", "schedule"):
        raise ValueError(f"optimizer must be sgd, momentum or schedule, got {optimizer!r}")
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(4, 4))
    a = a @ a.T / 4 + 0.5 * np.eye(4)
    b = rng.normal(size=(4, 3))
    task = Task(support=rng.normal(size=4), query=rng.normal(size=4))
    meta = {"init": rng.normal(size=4), "theta": rng.normal(size=3), "log_rate": np.log(0.2)}
    if optimizer == "momentum":
        meta["momentum"] = np.array(0.6)
    if optimizer == "schedule":
        meta["decay"] = np.array(0.1)
    meta = {name: np.asarray(leaf) for name, leaf in meta.items()}

    problem = Problem(
        init=lambda meta, key: meta["init"],
        inner_loss=lambda params, meta, batch, key: (
            0.5 * params @ a @ params - params @ (b @ meta["theta"] + batch)
        ),
        outer_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - batch) ** 2),
    )
    points = _descend(a, b, meta, task, num_steps)
    answers = [_answer(phi, jacobian, task) for phi, jacobian in points]
    return Case(
        problem,
        Gradient(_OPTIMIZERS[optimizer], num_steps),
        meta,
        task,
        exact=answers[-1],
        first_order=_answer(points[-1][0], points[0][1], task),
        every_step=_mean(answers[1:]) if num_steps else None,
    )


_OPTIMIZERS: dict[str, Callable[[Meta], optax.GradientTransformation]] = {
    "sgd": lambda meta: optax.sgd(jnp.exp(meta["log_rate"])),
    "momentum": lambda meta: optax.sgd(jnp.exp(meta["log_rate"]), meta["momentum"]),
    "schedule": lambda meta: optax.sgd(lambda k: jnp.exp(meta["log_rate"] - meta["decay"] * k)),
}


def _descend(a, b, meta, task, num_steps) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """φ₀..φ_K, each with its Jacobian in every leaf of meta: `[4, size of the leaf]`."""
    sizes = {name: leaf.size for name, leaf in meta.items()}
    phi, velocity = meta["init"], np.zeros(4)
    d_phi = {name: np.zeros((4, size)) for name, size in sizes.items()}
    d_phi["init"] = np.eye(4)
    d_velocity = {name: np.zeros((4, size)) for name, size in sizes.items()}
    mu, decay = meta.get("momentum", 0.0), meta.get("decay", 0.0)
    points = [(phi, d_phi)]
    for k in range(num_steps):
        rate = np.exp(meta["log_rate"] - decay * k)
        d_velocity = {name: mu * d_velocity[name] + a @ d_phi[name] for name in sizes}
        d_velocity["theta"] = d_velocity["theta"] - b
        if "momentum" in sizes:
            d_velocity["momentum"] = d_velocity["momentum"] + velocity[:, None]
        velocity = mu * velocity + a @ phi - b @ meta["theta"] - task.support
        d_phi = {name: d_phi[name] - rate * d_velocity[name] for name in sizes}
        d_phi["log_rate"] = d_phi["log_rate"] - rate * velocity[:, None]
        if "decay" in sizes:
            d_phi["decay"] = d_phi["decay"] + k * rate * velocity[:, None]
        phi = phi - rate * velocity
        points.append((phi, d_phi))
    return points


def _answer(phi, jacobian, task) -> Answer:
    error = phi - task.query
    shapes = {"log_rate": (), "momentum": (), "decay": ()}
    grad = {name: (j.T @ error).reshape(shapes.get(name, -1)) for name, j in jacobian.items()}
    return Answer(float(0.5 * error @ error), grad)


def _mean(answers: list[Answer]) -> Answer:
    grads = [answer.grad for answer in answers]
    return Answer(
        float(np.mean([answer.value for answer in answers])),
        {name: np.mean([grad[name] for grad in grads], axis=0) for name in grads[0]},
    )


def dead_relu(num_steps: int, *, optimizer: str = "adam", seed: int = 0) -> Case:
    """A ReLU regression network in which some gradients are exactly zero at every step.

    One of its four hidden units is off for every input, and one leaf, "unused", is never read: their
    second moments stay 0, where the derivative of a square root is infinite. The answer is found by
    central differences (to about 1e-8); the elements of the dead unit and of "unused" are 0.

    Args:
        num_steps: K.
        optimizer: "sgd", "momentum", "adam", or "rates" (Adam with a learned rate and ε).
        seed: of the weights and the data.

    Raises:
        ValueError: for another optimizer.

    >>> sorted(dead_relu(num_steps=1, optimizer="sgd").meta["init"])
    ['head', 'hidden', 'unused']
    """
    optimizers = {
        "sgd": optax.sgd(0.05),
        "momentum": optax.sgd(0.03, momentum=0.8, nesterov=True),
        "adam": optax.adam(0.02),
        "rates": lambda meta: optax.adam(jnp.exp(meta["log_rate"]), eps=jnp.exp(meta["log_eps"])),
    }
    if optimizer not in optimizers:
        raise ValueError(f"optimizer must be one of {sorted(optimizers)}, got {optimizer!r}")
    rng = np.random.default_rng(seed)
    x, targets = rng.uniform(-1, 1, size=(2, 6, 3)), rng.normal(size=(2, 6))
    x[..., -1] = 1.0
    hidden = rng.normal(size=(3, 4))
    hidden[-1, 2] = -20.0  # this unit stays off however far the others move
    init = {
        "hidden": hidden,
        "head": rng.normal(size=4),
        "unused": rng.normal(size=3),
    }
    meta = {"init": init, "ridge": np.array(0.3)}
    if optimizer == "rates":
        meta |= {"log_rate": np.log(np.array(0.02)), "log_eps": np.log(np.array(1e-2))}
    task = Task(support=(x[0], targets[0]), query=(x[1], targets[1]))

    def mean_error(params, batch):
        x, y = batch
        hidden = jax.nn.relu(x @ params["hidden"])
        return jnp.mean((hidden @ params["head"] - y) ** 2)

    problem = Problem(
        init=lambda meta, key: meta["init"],
        # The dead unit's own head weight is left out of the penalty: its gradient is zero as well.
        inner_loss=lambda params, meta, batch, key: (
            mean_error(params, batch) + meta["ridge"] * jnp.sum(params["head"][:2] ** 2)
        ),
        outer_loss=lambda params, meta, batch, key: mean_error(params, batch),
    )
    solver = Gradient(optimizers[optimizer], num_steps)

    def value(meta):  # forward only: nothing of an estimator is in it
        key = jax.random.key(0)
        return problem.outer_loss(solver.solve(problem, meta, task, key).params, meta, task.query, key)

    exact = Answer(*gradient_by_differences(value, meta))
    return Case(problem, solver, meta, task, exact, tolerance=1e-6)
