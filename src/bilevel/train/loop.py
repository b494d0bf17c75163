"""The outer loop: chunks of outer steps in one compiled call, checkpoints, signals, and no silence."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bilevel.hypergrad.doubts import Doubter
from bilevel.problem import Key, Learner, Task
from bilevel.sharding import AXIS, Shard, tasks_mesh
from bilevel.train.arrays import split_arrays
from bilevel.train.checkpoint import Checkpoints
from bilevel.train.display import progress
from bilevel.train.metrics import MetricsWriter, read_metrics
from bilevel.train.step import MetaState, Metrics, meta_step, num_tasks, step_keys

OnChunk = Callable[[MetaState, dict[str, float]], bool | None]


class HypergradientError(FloatingPointError):
    """A hypergradient that is not finite, or a leaf of it that is exactly zero all the time."""


@dataclass(frozen=True)
class Options:
    """How an outer loop runs; none of it changes what is computed, but for the order of sums.

    Args:
        chunk_size: outer steps in one compiled call; metrics and signals are looked at between calls.
        task_chunk: tasks computed side by side; see `mean_hypergradient`.
        devices: over how many the tasks of a step are spread. On a CPU two of them use two cores better
            than one does, see `bilevel.sharding.tasks_mesh`; sums are rounded in another order.
        checkpoint_every: outer steps between checkpoints, rounded up to whole chunks.
        keep_checkpoints: how many of the newest checkpoints stay.
        zero_leaves: what a meta leaf with an all-zero hypergradient does: "stop" or "allow".
    """

    chunk_size: int = 100
    task_chunk: int = 1
    devices: int = 1
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    zero_leaves: Literal["stop", "allow"] = "stop"

    def __post_init__(self):
        for name in ("chunk_size", "task_chunk", "devices", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.zero_leaves not in ("stop", "allow"):
            raise ValueError(f"zero_leaves must be 'stop' or 'allow', got {self.zero_leaves!r}")


@dataclass(frozen=True)
class Run:
    """Where an outer loop keeps what must outlive the process.

    Args:
        folder: metrics.jsonl, metrics.csv, tensorboard/ and checkpoints/ go here.
        fingerprint: what must be equal for a checkpoint to be continued, for instance the recipe.
        resume: go on from the newest checkpoint in the folder.
        title: what the progress display calls the run.
    """

    folder: Path
    fingerprint: dict[str, Any]
    resume: bool = False
    title: str = "training"


def train(
    learner: Learner,
    optimizer: optax.GradientTransformation,
    sample_tasks: Callable[[Key], Task],
    state: MetaState,
    num_meta_steps: int,
    *,
    options: Options | None = None,
    run: Run | None = None,
    on_chunk: Sequence[OnChunk] = (),
) -> MetaState:
    """Run the outer loop until `num_meta_steps` outer steps are done.

    Args:
        sample_tasks: `sample_tasks(key) -> Task`, leaves `[num_tasks, n, ...]`; traced once, called on the
            device with a key that depends on the step alone. A pytree with arrays in it (`FewShot`) is
            passed to the compiled call as an argument.
        state: from `init_state`; it counts the steps already done.
        options: chunking and checkpoints.
        run: a folder for checkpoints and metrics; without one nothing is written and nothing is shown.
        on_chunk: called with the state and the mean metrics after every chunk; True asks the run to stop,
            and figures put into the metrics are written too.

    Returns:
        The last state. Its `step` is below `num_meta_steps` when SIGTERM or Ctrl-C asked the run to
        leave: then the current chunk is finished and a checkpoint is written first.

    Raises:
        HypergradientError: when a hypergradient is not finite, or a leaf of it is exactly zero at every
            step of a chunk. The last good state is checkpointed first.

    Warns:
        HypergradientWarning: once for each kind of doubt that the mean figures over a chunk raise.

    >>> import bilevel as bl
    >>> learner = bl.maml(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, rates=0.01)
    >>> sample = bl.tasks.batch(bl.tasks.sinusoid, 4)
    >>> state = bl.init_state(learner, optax.adam(1e-3), sample, jax.random.key(0))
    >>> int(train(learner, optax.adam(1e-3), sample, state, 5).step)
    5
    """
    if num_meta_steps < 0:
        raise ValueError(f"num_meta_steps must be at least 0, got {num_meta_steps}")
    options = options or Options()
    with ExitStack() as stack:
        checkpoints = writer = display = None
        if run is not None:
            checkpoints = Checkpoints(run.folder / "checkpoints", keep=options.keep_checkpoints)
            if run.resume and checkpoints.latest() is not None:
                state, _ = checkpoints.restore(state, run.fingerprint)
            done = int(state.step)
            writer = stack.enter_context(MetricsWriter(run.folder, done if run.resume else None))
            display = stack.enter_context(progress(run.title, num_meta_steps, done))
        stop_asked = stack.enter_context(_signals())
        if hasattr(sample_tasks, "expecting"):  # tasks of the host, made ahead of time
            steps = jnp.arange(int(state.step), num_meta_steps)
            keys = jax.vmap(lambda step: _task_key(state.key, step))(steps)
            stack.enter_context(sample_tasks.expecting(keys))
        chunk = _compile(learner, optimizer, sample_tasks, state, options)
        doubter = Doubter(learner.estimator)
        allowed = options.zero_leaves == "allow" or getattr(learner.estimator, "rests", False)
        saved = int(state.step)
        begin = time.perf_counter() - (_seconds_before(run) if run else 0.0)
        enough = False  # a callback has asked to stop
        while int(state.step) < num_meta_steps and not (enough or stop_asked()):
            started, first = time.perf_counter(), int(state.step)
            state, log, finite = _advance(chunk, state, min(options.chunk_size, num_meta_steps - first))
            done = int(state.step)
            problem = (
                _complain_zero(state, log, done - first, allowed)
                if finite
                else _complain_not_finite(state, log, done - first)
            )
            if done > first:
                values = _summary(log, done - first)
                doubter(values)
                values["steps_per_second"] = (done - first) / (time.perf_counter() - started)
                for callback in on_chunk:
                    enough = bool(callback(state, values)) or enough
                if writer is not None and display is not None:
                    writer.write(done, time.perf_counter() - begin, values)
                    display.update(done, values)
            ended = done >= num_meta_steps or problem is not None or enough or stop_asked()
            due = ended or done - saved >= options.checkpoint_every
            if checkpoints is not None and run is not None and done > saved and due:
                checkpoints.save(done, state, run.fingerprint)
                saved = done
            if problem is not None:
                raise HypergradientError(problem)
    return state


def _advance(chunk, state, num_steps):
    """`chunk(state, num_steps)`, and the last good state where one of the steps is not finite.

    That state is computed again from the start of the chunk, to the bit. To choose between the old and the
    new state at each step would read and write all of it, tables of `Saba` and all, for what happens once.
    """
    moved, log, finite = chunk(state, num_steps)
    good = finite
    while not good:  # once, unless the device sums in another order each time
        moved, _, good = chunk(state, int(moved.step) - int(state.step) - 1)
    return moved, log, finite


def _compile(learner, optimizer, sample_tasks, state, options):
    """`(state, n) -> (state, log, finite)`: n outer steps, or fewer: one that is not finite is the last.

    The number of steps is an operand, so that one compiled program serves full and partial chunks and a
    resumed run repeats the interrupted one bit for bit.
    """
    arrays, merge = split_arrays(sample_tasks)
    count = num_tasks(jax.eval_shape(sample_tasks, state.key))
    shard = _shard(count, state, options)

    def step(arrays, state, keys):
        sample_key, task_keys = keys
        tasks = _draw(merge(arrays), sample_key, shard)
        return meta_step(
            learner, optimizer, state, tasks, keys=task_keys, task_chunk=options.task_chunk, shard=shard
        )

    def run(arrays, state, num_steps):
        # All keys of the chunk at once: one by one they are a twelfth of a step of `Saba`.
        numbers = state.step + jnp.arange(options.chunk_size, dtype=state.step.dtype)
        keys = jax.vmap(lambda t: (_task_key(state.key, t), step_keys(state.key, t, count)))(numbers)
        first = jax.tree.map(lambda leaf: leaf[0], keys)
        shapes = jax.eval_shape(step, arrays, state, first)[1]
        log = jax.tree.map(lambda s: jnp.zeros((options.chunk_size, *s.shape), s.dtype), shapes)

        def unfinished(carry):
            i, good, _, _ = carry
            return (i < num_steps) & good

        def body(carry):
            i, _, state, log = carry
            state, metrics = step(arrays, state, jax.tree.map(lambda leaf: leaf[i], keys))
            log = jax.tree.map(lambda rows, row: rows.at[i].set(row), log, metrics)
            return i + 1, metrics.finite.all(), state, log

        _, good, state, log = jax.lax.while_loop(unfinished, body, (0, True, state, log))
        return state, log, good

    if shard is None:
        compiled = jax.jit(run)
        return lambda state, num_steps: compiled(arrays, state, num_steps)
    # All is whole on each device but the estimator's state, which stays with its tasks.
    mesh: Mesh = tasks_mesh(shard.devices)
    places: Any = (P(AXIS) if name == "estimator_state" else P() for name in MetaState._fields)
    specs = MetaState(*places)
    run = jax.shard_map(
        run, mesh=mesh, in_specs=(P(), specs, P()), out_specs=(specs, P(), P()), check_vma=False
    )
    compiled, first = jax.jit(run), mesh.devices[0]
    whole, places = NamedSharding(mesh, P()), jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    arrays = jax.device_put(arrays, whole)

    def spread(state, num_steps):
        # What others see lies on one device: they would compute everything on each of them else.
        return jax.device_put(compiled(arrays, jax.device_put(state, places), num_steps), first)

    return spread


def _shard(count: int, state: MetaState, options: Options) -> Shard | None:
    """Which tasks each device gets; None where there is one device.

    Raises:
        ValueError: when there are not so many devices, or the estimator's state cannot be spread evenly.
    """
    if options.devices == 1:
        return None
    tasks_mesh(options.devices)
    if options.devices > count:
        raise ValueError(f"devices={options.devices} for the {count} tasks of a step; take fewer devices")
    if count % options.devices and jax.tree.leaves(state.estimator_state):
        raise ValueError(
            f"an estimator with a state for each task needs a number of tasks that devices={options.devices} "
            f"divides, got {count}"
        )
    return Shard(options.devices, count)


def _task_key(key: Key, step: jax.Array) -> Key:
    """A stream of its own, apart from the one that meta_step draws from."""
    return jax.random.fold_in(jax.random.fold_in(key, 0x7A5C), step)


def _draw(sample_tasks, key, shard):
    """The tasks of a step, or those of this device."""
    if shard is None:
        return sample_tasks(key)
    rows, _ = shard.rows()
    if hasattr(sample_tasks, "rows"):
        return sample_tasks.rows(key, rows)
    return jax.tree.map(lambda leaf: leaf[rows], sample_tasks(key))


def _seconds_before(run: Run) -> float:
    """The training time that a resumed run has behind it."""
    rows = read_metrics(run.folder / "metrics.jsonl")
    return rows[-1]["time"] if rows else 0.0


def _summary(log: Metrics, count: int) -> dict[str, float]:
    """Means over the steps of a chunk, with the 95% half-width of losses and accuracies."""
    out = {}
    for name, rows in log.scalars.items():
        rows = np.asarray(rows, np.float64)[:count]
        out[name] = float(rows.mean())
        if count > 1 and name.startswith(("query_", "support_", "outer_", "inner_")):
            out[f"{name}_ci95"] = float(1.96 * rows.std(ddof=1) / count**0.5)
    return out


def _leaf_names(state: MetaState) -> list[str]:
    named = jax.tree_util.tree_leaves_with_path(state.meta)
    return [f"meta{jax.tree_util.keystr(path)}" for path, _ in named]


def _complain_not_finite(state: MetaState, log: Metrics, count: int) -> str:
    """Which leaf, and what to do; the row after the `count` good ones is the bad step."""
    names = [*_leaf_names(state), "the outer loss"]
    bad = [n for n, ok in zip(names, np.asarray(log.finite)[count], strict=True) if not ok]
    return (
        f"the hypergradient of outer step {int(state.step)} is not finite: {_listed(bad)}. The step was not "
        "taken, meta is the last good one. The inner or the outer loop diverges, or a loss divides by zero: "
        "lower the inner rate or the outer learning rate, put optax.clip_by_global_norm before the outer "
        "optimizer, or find the operation with JAX_DEBUG_NANS=1"
    )


def _complain_zero(state: MetaState, log: Metrics, count: int, allowed: bool) -> str | None:
    """Which leaf got nothing at every one of the last `count` steps, if any did."""
    nonzero = np.any(np.asarray(log.nonzero)[:count], axis=0)
    if allowed or nonzero.all():
        return None
    bad = [n for n, ok in zip(_leaf_names(state), nonzero, strict=True) if not ok]
    return (
        f"the hypergradient is exactly zero at each of the last {count} outer steps: {_listed(bad)}. Such a "
        "leaf never learns. Either the outer loss does not depend on it, or the estimator drops the way it "
        "does (FirstOrder does for what acts only through the inner loop: use Mixed() or Unroll()). Take it "
        "out of meta, or set zero_leaves='allow' if this is meant"
    )


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextmanager
def _signals() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGTERM or Ctrl-C into a question the loop asks; a second one acts as usual."""
    asked = threading.Event()
    previous = {}

    def ask(number, frame):
        asked.set()
        for each, handler in previous.items():
            signal.signal(each, handler)

    # Python allows handlers in the main thread only; elsewhere the process's own handling stays.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
