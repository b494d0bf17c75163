"""Evaluation on fresh tasks: means with 95% confidence intervals, after 0..K adaptation steps."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.hypergrad.common import problem_metrics, split_keys
from bilevel.inner import unroll
from bilevel.problem import IterativeSolver, Key, Learner, Meta, Params, Task
from bilevel.train.arrays import split_arrays


class Curve(NamedTuple):
    """A figure after 0..K adaptation steps, over tasks.

    Args:
        mean: `[K+1]`.
        ci95: half-width of the 95% confidence interval of the mean, `[K+1]`.
    """

    mean: np.ndarray
    ci95: np.ndarray


class Evaluation(NamedTuple):
    """What `evaluate` found.

    Args:
        curves: a `Curve` for `query_loss` and each metric; one point per adaptation step, the first before.
        num_tasks: tasks it is a mean over.
        num_steps: K.
    """

    curves: dict[str, Curve]
    num_tasks: int
    num_steps: int

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers."""
        curves = {
            name: {"mean": curve.mean.tolist(), "ci95": curve.ci95.tolist()}
            for name, curve in self.curves.items()
        }
        return {"num_tasks": self.num_tasks, "num_steps": self.num_steps, "curves": curves}


def adapt(learner: Learner, meta: Meta, task: Task, key: Key, num_steps: int | None = None) -> Params:
    """What the learned learner makes of a task's support batch.

    Args:
        task: only its `support` is read.
        num_steps: inner steps, instead of those of training.

    Raises:
        ValueError: for `num_steps` with a solver that has none.

    >>> import bilevel as bl
    >>> learner = bl.maml(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, rates=0.01)
    >>> task = bl.tasks.sinusoid(jax.random.key(0))
    >>> params = adapt(learner, learner.init_meta(jax.random.key(1)), task, jax.random.key(2), num_steps=3)
    >>> learner.predict(params, None, task.query[0]).shape
    (10, 1)
    """
    learner = with_num_steps(learner, num_steps)
    return learner.solver.solve(learner.problem, meta, task, key).params


def with_num_steps(learner: Learner, num_steps: int | None) -> Learner:
    """The same learner with another number of inner steps."""
    if num_steps is None:
        return learner
    if not isinstance(learner.solver, IterativeSolver):
        raise ValueError(f"{type(learner.solver).__name__} has no num_steps to set; leave num_steps out")
    solver = dataclasses.replace(learner.solver, num_steps=num_steps)  # type: ignore[type-var]
    return dataclasses.replace(learner, solver=solver)


def evaluate(
    learner: Learner,
    meta: Meta,
    sample_task: Callable[[Key], Task],
    key: Key,
    *,
    num_tasks: int = 1000,
    num_steps: int | None = None,
) -> Evaluation:
    """Adapt to fresh tasks and judge on their query batches.

        mean over tasks ± 1.96 · std / √num_tasks,  after 0..K inner steps

    Args:
        sample_task: `sample_task(key) -> Task`, one task, for instance of classes never seen in training.
        num_tasks: how many tasks.
        num_steps: K; the solver's own when left out.

    Returns:
        An `Evaluation` with `query_loss`, and `query_<metric>`, `support_<metric>` for each of the
        problem's metrics. With a solver that has no steps the curves have one point.

    Raises:
        ValueError: when `num_tasks` is below 2, too few for an interval.

    >>> import bilevel as bl
    >>> learner = bl.maml(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, rates=0.01)
    >>> meta = learner.init_meta(jax.random.key(1))
    >>> result = evaluate(learner, meta, bl.tasks.sinusoid, jax.random.key(2), num_tasks=20, num_steps=3)
    >>> result.curves["query_loss"].mean.shape
    (4,)
    """
    if num_tasks < 2:
        raise ValueError(f"num_tasks must be at least 2 for a confidence interval, got {num_tasks}")
    learner = with_num_steps(learner, num_steps)

    @jax.jit
    def run(meta, arrays, keys):
        return jax.lax.map(lambda key: _curves(learner, meta, merge(arrays), key), keys)

    arrays, merge = split_arrays(sample_task)
    rows = run(meta, arrays, jax.random.split(key, num_tasks))
    curves = {}
    for name, values in rows.items():
        values = np.asarray(values, np.float64)
        half = 1.96 * values.std(0, ddof=1) / math.sqrt(num_tasks)
        curves[name] = Curve(values.mean(0), half)
    return Evaluation(curves, num_tasks, len(next(iter(curves.values())).mean) - 1)


def _curves(learner: Learner, meta: Meta, sample: Callable, key: Key) -> dict[str, jax.Array]:
    """The figures of one task before and after each inner step: `[K+1]` each."""
    task_key, key = jax.random.split(key)
    task, outer_key = sample(task_key), split_keys(key)[1]

    def figures(params):
        loss = learner.problem.outer_loss(params, meta, task.query, outer_key)
        return {"query_loss": loss, **problem_metrics(learner.problem, params, meta, task, outer_key)}

    return along_adaptation(learner, meta, task, key, figures)


def along_adaptation(
    learner: Learner, meta: Meta, task: Task, key: Key, read: Callable[[Params], Any]
) -> Any:
    """`read(params)` before and after each inner step, stacked: leaves `[K+1, ...]`.

    A solver without steps gives the solution alone: `[1, ...]`.
    """
    problem, solver = learner.problem, learner.solver
    inner_key, _ = split_keys(key)
    if not isinstance(solver, IterativeSolver):
        return jax.tree.map(
            lambda leaf: leaf[None], read(solver.solve(problem, meta, task, inner_key).params)
        )
    before = read(problem.init(meta, jax.random.split(inner_key)[0]))  # the key that `unroll` starts from
    _, after = unroll(problem, solver, meta, task, inner_key, each=read)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), before, after)
