"""Whether a learner's answer to one query example depends on the others: the hidden part of a protocol."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import Key, Learner, Meta, Task
from bilevel.train.evaluate import adapt, over_tasks

_ROUNDING = 1e-3  # of the spread of the outputs


def transduction(
    learner: Learner,
    meta: Meta,
    sample_task: Callable[[Key], Task],
    key: Key,
    *,
    num_tasks: int = 4,
) -> float | None:
    """How much an answer changes when the other query examples do, in units of the answers' spread.

        max |predict(x)[i] − predict(x')[i]| / std(predict(x)),   x' = x with half of its queries replaced

    Batch norm on the statistics of the query batch does this: the figures then depend on how many query
    examples there are and on their classes being balanced, and must not be compared with those of
    learners that see one example at a time. Measured, not taken from the net's name.

    Args:
        sample_task: one task; only the inputs of its query are changed.

    Returns:
        0.0 when no answer changes; None when it cannot be told: the learner has no `predict`, or a task
        has a single query example.

    Reference: Nichol, Achiam, Schulman, 2018, section 6.1; Bronskill et al., TaskNorm, 2020.

    >>> import bilevel as bl
    >>> learner = bl.maml(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, rates=0.01)
    >>> transduction(learner, learner.init_meta(jax.random.key(0)), bl.tasks.sinusoid, jax.random.key(1))
    0.0
    """
    if learner.predict is None or jax.eval_shape(sample_task, key).query[0].shape[0] < 2:
        return None
    predict = learner.predict

    def change(meta: Meta, task: Task, key: Key) -> jax.Array:
        params = adapt(learner, meta, task, key)
        x = task.query[0]
        asked = _asked(task.query)
        rank, half = jnp.cumsum(asked), asked.sum() // 2
        replaced = (asked & (rank > half)).reshape(-1, *[1] * (x.ndim - 1))
        before, after = predict(params, meta, x), predict(params, meta, jnp.where(replaced, x[:1], x))
        changed = jnp.abs(before - after).reshape(len(x), -1).max(1)
        return jnp.max(jnp.where(asked & (rank <= half), changed, 0)) / jnp.maximum(before.std(), 1e-30)

    changes = np.concatenate(list(over_tasks(change, sample_task, num_tasks)(meta, key)))
    worst = float(changes.max())
    return 0.0 if worst < _ROUNDING else worst


def _asked(query: tuple) -> jax.Array:
    """Which rows are queries: those without a label are the support in front of them (`with_support`)."""
    labels = query[1] if len(query) == 2 and isinstance(query[1], jax.Array) else None
    if labels is None or labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        return jnp.ones(query[0].shape[0], bool)
    return labels >= 0


def in_words(change: float | None) -> str:
    """What `transduction` found, for a protocol.

    >>> in_words(0.0)
    'inductive: no answer depends on the other query examples'
    """
    if change is None:
        return "not measured: the learner has no predict, or a task has one query example"
    if change == 0:
        return "inductive: no answer depends on the other query examples"
    return (
        f"transductive: an answer changes by up to {change:.2g} standard deviations with the other query "
        "examples (batch statistics)"
    )
