"""What every estimator does before and after its own part: keys, the outer loss, the stats."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bilevel.problem import (
    Hypergradient,
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


def noise_key(key: Key) -> Key:
    """A key for the estimator's own randomness, apart from the two of `split_keys`."""
    return jax.random.fold_in(key, 2)


def as_floats(meta: Meta) -> Meta:
    """Meta as arrays.

    Raises:
        TypeError: when a leaf is not a float, so that it cannot be perturbed.
        ValueError: when there is no leaf.
    """
    if not jax.tree.leaves(meta):
        raise ValueError(f"meta has no arrays in it, so there is nothing to learn; got {meta!r}")

    def convert(path, leaf):
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"meta{jax.tree_util.keystr(path)} is {dtype}, which cannot be moved a little; meta holds "
                "what is learned: make it a float, or move it into a field or a closure"
            )
        return jnp.asarray(leaf, dtype)

    return jax.tree_util.tree_map_with_path(convert, meta)


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
    as_floats(meta)
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
