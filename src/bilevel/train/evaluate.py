"""Evaluation on fresh tasks: means with 95% confidence intervals, after 0..K adaptation steps."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.hypergrad.common import problem_metrics, split_keys
from bilevel.problem import Key, Learner, Meta, Params, Task
from bilevel.train.along import along_adaptation, steps_of, with_num_steps
from bilevel.train.arrays import split_arrays
from bilevel.train.calibration import NUM_BINS, Calibration, calibration, tally
from bilevel.train.intervals import Curve, interval

_CHUNK = 500  # tasks in one compiled call


class Evaluation(NamedTuple):
    """What `evaluate` found.

    Args:
        curves: a `Curve` for `query_loss` and each metric, a point for each of `steps`.
        num_tasks: tasks it is a mean over.
        num_steps: K.
        steps: after which inner steps the points are, from 0, before adaptation, to K.
        per_task: what the curves are means of, `[num_tasks, points]` each.
        sketch: a few numbers a task, `[num_tasks, leaves, 2]`, by which two evaluations can see whether
            they were on the same tasks; see `sketch`.
        calibration: of classifiers with `predict`; None for others.
    """

    curves: dict[str, Curve]
    num_tasks: int
    num_steps: int
    steps: tuple[int, ...]
    per_task: dict[str, np.ndarray]
    sketch: np.ndarray
    calibration: Calibration | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain lists and numbers, without what is kept for each task."""
        return {
            "num_tasks": self.num_tasks,
            "num_steps": self.num_steps,
            "curves": {name: curve.as_json(self.steps) for name, curve in self.curves.items()},
            "calibration": None if self.calibration is None else self.calibration.as_json(),
        }


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


def evaluate(
    learner: Learner,
    meta: Meta,
    sample_task: Callable[[Key], Task],
    key: Key,
    *,
    num_tasks: int = 1000,
    num_steps: int | None = None,
    every: int | None = None,
    task_chunk: int = 1,
    chunk_size: int = _CHUNK,
) -> Evaluation:
    """Adapt to fresh tasks and judge on their query batches.

        mean over tasks ± 1.96 · std / √num_tasks,  after 0..K inner steps

    The i-th task depends on `key`, i and the sampler alone: neither on the learner nor on `num_tasks`. So
    two learners with one key are judged on the same tasks, and their difference has a narrower interval
    (`paired`).

    Args:
        sample_task: `sample_task(key) -> Task`, one task, for instance of classes never seen in training.
        num_tasks: how many tasks.
        num_steps: K; the solver's own when left out.
        every: judge after 0, 1, every `every`-th and the last step; for about 20 points when left out, for
            judging costs a pass over the query, and K may be thousands. The last point does not depend on it.
        task_chunk: tasks computed side by side: 1 on a CPU, many on an accelerator. It changes rounding.
        chunk_size: tasks in one compiled call; memory on the device grows with it, the numbers do not
            change by a bit.

    Returns:
        An `Evaluation` with `query_loss`, and `query_<metric>`, `support_<metric>` for each of the
        problem's metrics. With a solver that has no steps the curves have one point. Where there is an
        accuracy and `learner.predict`, the calibration of the answers too.

    Raises:
        ValueError: when `num_tasks` is below 2, too few for an interval, a chunk or `every` below 1, or
            `num_steps` or `every` is given with a solver that has no steps.

    Cost: K inner steps and about 20 passes over the query, a task.

    >>> import bilevel as bl
    >>> learner = bl.maml(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, rates=0.01)
    >>> meta = learner.init_meta(jax.random.key(1))
    >>> result = evaluate(learner, meta, bl.tasks.sinusoid, jax.random.key(2), num_tasks=20, num_steps=3)
    >>> result.curves["query_loss"].mean.shape
    (4,)
    """
    judge = evaluator(
        learner,
        sample_task,
        num_tasks=num_tasks,
        num_steps=num_steps,
        every=every,
        task_chunk=task_chunk,
        chunk_size=chunk_size,
    )
    return judge(meta, key)


def evaluator(
    learner: Learner,
    sample_task: Callable[[Key], Task],
    *,
    num_tasks: int = 1000,
    num_steps: int | None = None,
    every: int | None = None,
    task_chunk: int = 1,
    chunk_size: int = _CHUNK,
) -> Callable[[Meta, Key], Evaluation]:
    """`evaluate` for many metas: `judge(meta, key)`, compiled once."""
    if num_tasks < 2:
        raise ValueError(f"num_tasks must be at least 2 for a confidence interval, got {num_tasks}")
    learner = with_num_steps(learner, num_steps)
    steps = steps_of(learner, every)
    run = over_tasks(
        lambda meta, task, key: (_curves(learner, meta, task, key, steps), sketch(task)),
        sample_task,
        num_tasks,
        task_chunk=task_chunk,
        chunk_size=chunk_size,
    )

    def judge(meta: Meta, key: Key) -> Evaluation:
        rows, sketches, bins = [], [], 0.0
        for row, drawn in run(meta, key):
            if "bins" in row:  # summed task by task, in one order whatever the chunks
                bins = np.add.accumulate([bins + np.zeros(row["bins"].shape[1:]), *row.pop("bins")])[-1]
            rows.append(row)
            sketches.append(drawn)
        per_task = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        judged = {name: interval(per_task.pop(name)) for name in ("nll", "brier") if name in per_task}
        return Evaluation(
            curves={name: interval(values) for name, values in per_task.items()},
            num_tasks=num_tasks,
            num_steps=steps[-1],
            steps=steps,
            per_task=per_task,
            sketch=np.concatenate(sketches),
            calibration=calibration(np.asarray(bins), **judged) if judged else None,
        )

    return judge


def over_tasks(
    figures: Callable[[Meta, Task, Key], Any],
    sample_task: Callable[[Key], Task],
    num_tasks: int,
    *,
    task_chunk: int = 1,
    chunk_size: int = _CHUNK,
) -> Callable[[Meta, Key], Iterator[Any]]:
    """`figures(meta, task, key)` of fresh tasks, compiled once.

    Args:
        figures: traceable; what is measured on one task.
        task_chunk, chunk_size: as in `evaluate`.

    Returns:
        `run(meta, key)`, which yields a chunk at a time: trees of NumPy arrays `[tasks, ...]`.

    Raises:
        ValueError: for a chunk below 1.
    """
    for name, value in (("task_chunk", task_chunk), ("chunk_size", chunk_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    arrays, merge = split_arrays(sample_task)
    groups = math.ceil(min(chunk_size, num_tasks) / task_chunk)
    size = groups * task_chunk

    def one(meta, arrays, key):
        task_key, key = jax.random.split(key)
        return figures(meta, merge(arrays)(task_key), key)

    def side_by_side(meta, arrays, keys):
        if task_chunk == 1:
            return jax.tree.map(lambda leaf: leaf[None], one(meta, arrays, keys[0]))
        return jax.vmap(one, (None, None, 0))(meta, arrays, keys)

    @jax.jit
    def chunk(meta, arrays, keys, count):
        keys = keys.reshape(groups, task_chunk, *keys.shape[1:])
        shapes = jax.eval_shape(side_by_side, meta, arrays, keys[0])
        out = jax.tree.map(lambda s: jnp.zeros((groups, *s.shape), s.dtype), shapes)

        def body(i, out):
            row = side_by_side(meta, arrays, keys[i])
            return jax.tree.map(lambda rows, row: rows.at[i].set(row), out, row)

        # The count is an operand, as in `train`: one program for full and partial chunks, and a chunk of
        # one task is not compiled into something else than a loop, which would round differently.
        out = jax.lax.fori_loop(0, count, body, out)
        return jax.tree.map(lambda leaf: leaf.reshape(size, *leaf.shape[2:]), out)

    def run(meta: Meta, key: Key) -> Iterator[Any]:
        keys = jax.random.split(key, num_tasks)
        padded = jnp.concatenate([keys, jnp.broadcast_to(keys[-1:], (size, *keys.shape[1:]))])
        for start in range(0, num_tasks, size):
            here = min(size, num_tasks - start)
            rows = chunk(meta, arrays, padded[start : start + size], math.ceil(here / task_chunk))
            yield jax.tree.map(lambda leaf, here=here: np.asarray(leaf)[:here], rows)

    return run


def sketch(task: Task) -> jax.Array:
    """Two numbers for each array of a task: a projection on a fixed direction, and the norm.

        ⟨x/‖x‖, w⟩ and ‖x‖,   w_i = cos(i²)

    Rounding moves them by less than 1e-3, another task by more; `compare` tells tasks apart by them.

    Returns:
        float32 `[leaves, 2]`.

    >>> sketch(Task((jnp.ones((2, 3)), jnp.array([0, 1])), (jnp.ones((2, 3)), jnp.array([1, 0])))).shape
    (4, 2)
    """

    def numbers(leaf):
        flat = jnp.ravel(jnp.asarray(leaf)).astype(jnp.float32)
        weights = jnp.cos((jnp.arange(flat.size, dtype=jnp.float32) % 1024) ** 2)
        norm = jnp.sqrt(jnp.sum(flat**2))
        return jnp.stack([flat @ weights / jnp.maximum(norm, 1e-30), norm])

    return jnp.stack([numbers(leaf) for leaf in jax.tree.leaves(task)])


def _curves(
    learner: Learner, meta: Meta, task: Task, key: Key, steps: tuple[int, ...]
) -> dict[str, jax.Array]:
    """The figures of one task after each of `steps`: `[points, ...]` each."""
    outer_key = split_keys(key)[1]

    def figures(params):
        loss = learner.problem.outer_loss(params, meta, task.query, outer_key)
        found = {"query_loss": loss, **problem_metrics(learner.problem, params, meta, task, outer_key)}
        if learner.predict is None or "query_accuracy" not in found:
            return found
        x, labels = task.query
        logits = learner.predict(params, meta, x)  # the compiler sees that the metrics computed them too
        whole = jnp.issubdtype(jnp.result_type(labels), jnp.integer)
        if whole and (jnp.ndim(labels), jnp.ndim(logits)) == (1, 2):
            found |= tally(logits, labels, NUM_BINS)
        return found

    return along_adaptation(learner, meta, task, key, figures, steps)
