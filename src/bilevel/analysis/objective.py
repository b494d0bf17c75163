"""What is to be differentiated: the outer loss of what actually runs, over a batch of tasks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from bilevel.hypergrad.common import as_floats, split_keys
from bilevel.problem import InnerSolver, Key, Meta, Params, Problem, Scalar, Task
from bilevel.train.step import num_tasks


def objective(problem: Problem, solver: InnerSolver, tasks: Task) -> Callable[[Meta, Key], Scalar]:
    """The mean over the tasks of outer_loss(solver.solve(θ)), with the randomness the estimators see.

        F(θ) = (1/T) Σ outer_loss(solve(θ, support_t), θ, query_t)

    Args:
        tasks: leaves `[num_tasks, n, ...]`.

    Returns:
        `(meta, key) -> scalar`, traceable; it agrees with the value of `bl.mean_hypergradient`.
    """
    count = num_tasks(tasks)

    def of_task(meta, task, key):
        inner_key, outer_key = split_keys(key)
        params = solver.solve(problem, meta, task, inner_key).params
        return problem.outer_loss(params, meta, task.query, outer_key)

    def mean(meta, key):
        keys = jax.random.split(key, count)
        return jax.lax.map(lambda x: of_task(meta, *x), (tasks, keys)).mean()

    return mean


def is_formula(solver: InnerSolver) -> bool:
    """Whether the inner solution is computed at once: such a problem may have no start."""
    return getattr(solver, "closed_form", False)


def params_like(problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key) -> Params:
    """The shapes of what the inner loop adapts; nothing is run."""
    if is_formula(solver):
        return jax.eval_shape(lambda meta: solver.solve(problem, meta, task, key).params, meta)
    return jax.eval_shape(problem.init, meta, key)


def require_scalar_losses(problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key) -> None:
    """Refuse a meta without derivatives and losses that are no scalars, before anything is differentiated.

    Raises:
        TypeError: when a leaf of meta is not a float.
        ValueError: when a loss has a shape.
    """
    as_floats(in_arrays(meta))
    params = params_like(problem, solver, meta, task, key)
    for name, batch in (("inner_loss", task.support), ("outer_loss", task.query)):
        shape = jax.eval_shape(getattr(problem, name), params, meta, batch, key).shape
        if shape != ():
            raise ValueError(f"{name} must return a scalar, got shape {shape}; take a mean or a sum")


def first_tasks(tasks: Task, count: int) -> Task:
    """The first `count` tasks of a batch.

    >>> first_tasks(Task(jnp.ones((4, 3)), jnp.ones((4, 1))), 2).support.shape
    (2, 3)
    """
    return jax.tree.map(lambda leaf: leaf[:count], tasks)


def task_at(tasks: Task, place: int) -> Task:
    """One task of a batch, without the leading axis."""
    return jax.tree.map(lambda leaf: leaf[place], tasks)


def in_float64(tree):
    """Floats as float64, the rest as it is. Only under `jax.enable_x64`."""

    def cast(leaf):
        leaf = jnp.asarray(leaf)
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def in_arrays(tree):
    """The same tree with strongly typed arrays for leaves."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), tree)


def leaf_names(meta: Meta) -> list[str]:
    """`meta['init']['w']` for each leaf."""
    return [f"meta{jax.tree_util.keystr(path)}" for path, _ in jax.tree_util.tree_leaves_with_path(meta)]
