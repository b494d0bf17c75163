"""One outer step: the mean hypergradient over a batch of tasks, and an optax update of meta."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.hypergrad.common import gradient_stats, largest_elements
from bilevel.problem import EstimatorState, Hypergradient, Key, Learner, Meta, Scalar, Task
from bilevel.sharding import Shard, sum_over_devices


class MetaState(NamedTuple):
    """The whole outer loop: nothing else is needed to resume exactly.

    Args:
        meta: θ.
        opt_state: of the outer optimizer.
        estimator_state: of the estimator, with a leading `[num_tasks]` axis: each task slot owns one.
        key: the run's key; step t uses `fold_in(key, t)`.
        step: int32, outer steps done.
    """

    meta: Meta
    opt_state: optax.OptState
    estimator_state: EstimatorState
    key: Key
    step: jax.Array


class Metrics(NamedTuple):
    """What one outer step reports.

    Args:
        scalars: means over the tasks of `outer_loss` and the estimator's stats; of the mean gradient,
            `grad_norm`, `zero_leaves` and `finite`.
        nonzero: bool `[num meta leaves]`, whether a leaf of the hypergradient has any nonzero element.
        finite: bool `[num meta leaves + 1]`, whether each leaf, and last the outer loss, is finite.
    """

    scalars: dict[str, Scalar]
    nonzero: jax.Array
    finite: jax.Array


def init_state(
    learner: Learner,
    optimizer: optax.GradientTransformation,
    sample_tasks,
    key: Key,
    meta: Meta | None = None,
) -> MetaState:
    """Where an outer loop starts.

    Args:
        sample_tasks: `sample_tasks(key) -> Task` with a leading `[num_tasks]` axis.
        meta: the first θ; `learner.init_meta(key)` when left out.

    Raises:
        ValueError: when there is neither a `meta` nor a `learner.init_meta`.
    """
    run_key, meta_key, task_key = jax.random.split(key, 3)
    if meta is None:
        if learner.init_meta is None:
            raise ValueError("this learner has no init_meta, so there is nothing to start from: pass meta=")
        meta = learner.init_meta(meta_key)
    # Python's own numbers leave a weak type behind, with which the loop would be compiled a second time.
    start: Any = jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, jnp.asarray(leaf).dtype), meta)
    tasks = sample_tasks(task_key)
    keys = jax.random.split(task_key, num_tasks(tasks))
    estimator_state = jax.vmap(
        lambda task, key: learner.estimator.init(learner.problem, learner.solver, start, task, key)
    )(tasks, keys)
    return MetaState(start, optimizer.init(start), estimator_state, run_key, jnp.int32(0))


def num_tasks(tasks: Task) -> int:
    """The length of the leading axis that all leaves of a batch of tasks share.

    Raises:
        ValueError: when they share none.
    """
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(tasks)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "every leaf of a batch of tasks needs the same leading [num_tasks] axis, got leading sizes "
            f"{sorted(sizes)}; make one with bl.tasks.batch(sample, num_tasks)"
        )
    return sizes.pop()[0]


def mean_hypergradient(
    learner: Learner,
    meta: Meta,
    tasks: Task,
    estimator_state: EstimatorState,
    key: Key,
    task_chunk: int = 1,
    shard: Shard | None = None,
) -> tuple[Hypergradient, EstimatorState]:
    """The hypergradient averaged over a batch of tasks, `task_chunk` of them at a time.

        (1/T) Σ dF_t/dθ

    Args:
        tasks: leaves `[num_tasks, n, ...]`.
        estimator_state: leaves `[num_tasks, ...]`.
        key: one, which is split for the tasks, or those of all tasks, `[num_tasks]`.
        task_chunk: how many tasks are computed side by side. On a CPU 1 keeps the working set in cache; an
            accelerator wants many. Memory grows with it, time per task falls where the device is idle.
        shard: inside `jax.shard_map`, which tasks of the whole batch these are; see `bilevel.sharding`.

    Raises:
        ValueError: when `task_chunk` does not divide the number of tasks.
    """
    count = num_tasks(tasks)
    if task_chunk < 1 or count % task_chunk:
        here = " on a device" if shard is not None else ""
        raise ValueError(
            f"task_chunk must be at least 1 and divide the {count} tasks of a batch{here}, got {task_chunk}"
        )
    total_count, counted = count if shard is None else shard.num_tasks, None
    keys = key if _one_each(key) else jax.random.split(key, total_count)
    if shard is not None:
        rows, counted = shard.rows()
        keys = keys[rows]

    def one(task, state, key):
        return learner.estimator.estimate(learner.problem, learner.solver, meta, task, state, key)

    def body(total, chunk):
        *chunk, weights = chunk
        if task_chunk == 1:
            h, state = one(*jax.tree.map(lambda leaf: leaf[0], chunk))
            h, state = jax.tree.map(lambda leaf: leaf[None], (h, state))
        else:
            h, state = jax.vmap(one)(*chunk)
        summed = jax.tree.map(lambda a, b: _sum(b.astype(a.dtype), weights), total, h.grad)
        return jax.tree.map(jnp.add, total, summed), (h.value, h.stats, state)

    chunks = jax.tree.map(
        lambda leaf: leaf.reshape(count // task_chunk, task_chunk, *leaf.shape[1:]),
        (tasks, estimator_state, keys, counted),
    )
    # In float32 or wider: a long sum in bfloat16 stops growing.
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(jnp.shape(leaf), jnp.promote_types(jnp.result_type(leaf), jnp.float32)), meta
    )
    total, (values, stats, states) = jax.lax.scan(body, zeros, chunks)
    states = jax.tree.map(lambda leaf: leaf.reshape(count, *leaf.shape[2:]), states)
    if shard is None:
        value, stats = jax.tree.map(jnp.mean, (values, stats))
    else:
        figures = jax.tree.map(lambda leaf: _sum(leaf.reshape(count), counted), (values, stats))
        total, figures = sum_over_devices((total, figures))
        value, stats = jax.tree.map(lambda leaf: leaf / total_count, figures)
    grad = jax.tree.map(lambda leaf, like: (leaf / total_count).astype(jnp.result_type(like)), total, meta)
    # A mean is not finite if any of its parts is not: the compiler drops the passes over every part.
    return Hypergradient(value, grad, {**stats, **gradient_stats(value, grad)}), states


def _one_each(key: Key) -> bool:
    """Whether it is many keys; one of JAX's old ones is words [2]."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim == (1 if typed else 2)


def step_keys(key: Key, step: jax.Array, count: int) -> Key:
    """The keys `[count]` of the tasks of an outer step, from the run's key."""
    return jax.random.split(jax.random.fold_in(key, step), count)


def _sum(rows: jax.Array, counted: jax.Array | None) -> jax.Array:
    """The sum of the rows `[n, ...]` that count."""
    if counted is not None:
        rows = jnp.where(counted.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)
    return rows.sum(0)


def meta_step(
    learner: Learner,
    optimizer: optax.GradientTransformation,
    state: MetaState,
    tasks: Task,
    *,
    keys: Key | None = None,
    task_chunk: int = 1,
    shard: Shard | None = None,
) -> tuple[MetaState, Metrics]:
    """One outer step on a batch of tasks.

        θ ← θ + optimizer((1/T) Σ dF_t/dθ)

    Args:
        tasks: leaves `[num_tasks, n, ...]`.
        keys: `step_keys` of this step, where they have been drawn ahead.
        task_chunk, shard: see `mean_hypergradient`.

    Returns:
        The next state and what happened. Pure and traceable.

    >>> import bilevel as bl
    >>> net = bl.nets.mlp([1, 8, 1])
    >>> learner = bl.maml(net, bl.learners.mean_squared_error, rates=0.01)
    >>> sample = bl.tasks.batch(bl.tasks.sinusoid, 4)
    >>> optimizer = optax.adam(1e-3)
    >>> state = init_state(learner, optimizer, sample, jax.random.key(0))
    >>> state, metrics = meta_step(learner, optimizer, state, sample(jax.random.key(1)))
    >>> int(state.step), bool(metrics.finite.all())
    (1, True)
    """
    key = jax.random.fold_in(state.key, state.step) if keys is None else keys
    h, estimator_state = mean_hypergradient(
        learner, state.meta, tasks, state.estimator_state, key, task_chunk, shard
    )
    updates, opt_state = optimizer.update(h.grad, state.opt_state, state.meta)
    meta = optax.apply_updates(state.meta, updates)
    largest = largest_elements(h.grad)
    metrics = Metrics(
        scalars={"outer_loss": h.value, **h.stats, "grad_norm": optax.tree.norm(h.grad)},
        nonzero=largest != 0,
        finite=jnp.isfinite(jnp.append(largest, h.value)),
    )
    return MetaState(meta, opt_state, estimator_state, state.key, state.step + 1), metrics
