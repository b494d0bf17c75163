"""What every estimator does before and after its own part: keys, the outer loss, the stats."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bilevel.inner.checkpointing import Checkpointing
from bilevel.problem import (
    Hypergradient,
    InnerSolver,
    IterativeSolver,
    Key,
    Meta,
    Params,
    Problem,
    Scalar,
    Task,
)


def split_keys(key: Key) -> tuple[Key, Key]:
    """One key for the inner loop, one for the outer loss: every estimator sees the same randomness."""
    inner, outer = jax.random.split(key)
    return inner, outer


def outer_objective(
    problem: Problem, params: Params, meta: Meta, task: Task, key: Key
) -> tuple[Scalar, dict[str, Scalar]]:
    """The outer loss on the query batch, and the problem's metrics on both batches."""
    value = problem.outer_loss(params, meta, task.query, key)
    if jnp.shape(value) != ():
        raise ValueError(
            f"outer_loss must return a scalar, got shape {jnp.shape(value)}; take a mean or a sum"
        )
    return value, problem_metrics(problem, params, meta, task, key)


def problem_metrics(problem: Problem, params: Params, meta: Meta, task: Task, key: Key) -> dict[str, Scalar]:
    """`query_<name>` and `support_<name>` for each of `Problem.metrics`."""
    if problem.metrics is None:
        return {}
    params, meta = jax.lax.stop_gradient((params, meta))
    return {
        f"{part}_{name}": value
        for part, batch in (("query", task.query), ("support", task.support))
        for name, value in problem.metrics(params, meta, batch, key).items()
    }


def differentiate(objective: Callable, meta: Meta) -> Hypergradient:
    """Value and gradient of `objective(meta) -> (value, stats)` as a `Hypergradient`.

    Raises:
        TypeError: when a leaf of `meta` is not a float, so that it has no derivative.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(meta):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"meta{jax.tree_util.keystr(path)} is {dtype}, which has no derivative; meta holds what "
                "is learned: make it a float, or move it into a field or a closure"
            )
    (value, stats), grad = jax.value_and_grad(objective, has_aux=True)(meta)
    return Hypergradient(value, grad, {**stats, **gradient_stats(value, grad)})


def largest_elements(tree: Meta) -> jax.Array:
    """The largest absolute value of each leaf, `[num leaves]`: NaN or infinite if an element of it is.

    One pass answers both questions, whether a leaf is finite and whether it is all zero.

    >>> print(largest_elements([jnp.array([-2.0, 1.0]), jnp.array([0.0, jnp.nan])]))
    [ 2. nan]
    """
    return jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(tree)])


def gradient_stats(value: Scalar, grad: Meta) -> dict[str, Scalar]:
    """The `zero_leaves` and `finite` of a `Hypergradient`."""
    largest = largest_elements(grad)
    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(largest))
    return {
        "zero_leaves": jnp.sum(largest == 0, dtype=jnp.float32),
        "finite": finite.astype(jnp.float32),
    }


def require_iterative(estimator: object, solver: InnerSolver) -> IterativeSolver:
    """The solver, if it can be run step by step; refused otherwise."""
    if not isinstance(solver, IterativeSolver):
        raise TypeError(
            f"{type(estimator).__name__} differentiates through the steps of the inner solver, and "
            f"{type(solver).__name__} has no steps (num_steps, init, step); "
            "use bl.inner.Gradient(optimizer, num_steps), or keep this solver and differentiate its solution "
            "with bl.hypergrad.Implicit(bl.hypergrad.cg(10))"
        )
    return solver


def require_checkpoint(estimator: object, checkpoint: int | Checkpointing | None) -> None:
    """Refuse what is neither a positive number of steps nor a checkpointing policy."""
    if isinstance(checkpoint, int) and not isinstance(checkpoint, bool):
        allowed = checkpoint >= 1
    else:
        allowed = checkpoint is None or isinstance(checkpoint, Checkpointing)
    if not allowed or isinstance(checkpoint, type):
        raise ValueError(
            f"{type(estimator).__name__}.checkpoint must be None or a number of inner steps of at least 1, "
            f"or a policy such as bl.inner.Sqrt() or bl.inner.Tree(), got {checkpoint!r}"
        )
