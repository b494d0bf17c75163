"""Run an estimator and its references on the user's own problem, and put the figures together."""

import warnings
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from bilevel.analysis.differences import Slope, curve, directions, slope
from bilevel.analysis.objective import objective, task_at
from bilevel.analysis.second_order import draws_randomness
from bilevel.hypergrad import Mixed, Unroll
from bilevel.problem import Estimator, InnerSolver, IterativeSolver, Key, Learner, Meta, Problem, Task
from bilevel.train.step import mean_hypergradient, num_tasks


@dataclass(frozen=True)
class Estimates:
    """What repeated calls returned.

    Args:
        values: `[repeats]`, outer losses.
        grads: `[repeats, n]`, flattened.
        stats: the means of the stats, by name.
        stateful: whether the estimator carries a state from call to call.
        warnings: what it said while it was traced.
    """

    values: np.ndarray
    grads: np.ndarray
    stats: dict[str, float]
    stateful: bool
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Reference:
    """The truth, as far as it can be known.

    Args:
        value: the outer loss at the first key.
        names: of each direction: "" for one that moves all of meta, else the leaf's path.
        moves: `[directions, n]`.
        slopes: of each direction, at the first key.
        vector: the gradient `[n]` at the first key, or None where only slopes are known.
        exact: the estimator the vector comes from; None when it comes from differences.
        source: in words, what the estimates are compared with.
        draws: whether the problem itself draws random numbers.
        notes: what went wrong on the way.
    """

    value: float
    names: tuple[str, ...]
    moves: np.ndarray
    slopes: tuple[Slope, ...]
    vector: np.ndarray | None
    exact: Estimator | None
    source: str
    draws: bool
    notes: tuple[str, ...]

    @property
    def reliable(self) -> np.ndarray:
        """`[directions]`, whose slopes can be used."""
        return np.array([s.reliable for s in self.slopes])

    @property
    def kinks(self) -> int:
        """How many directions have two slopes."""
        return sum(s.kink for s in self.slopes)


def estimates(learner: Learner, meta: Meta, tasks: Task, keys: jax.Array, warmup: int) -> Estimates:
    """Call an estimator once with each key, on the same batch.

    Args:
        keys: `[repeats]`.
        warmup: calls before the one that counts, for an estimator with a state.
    """
    count = num_tasks(tasks)
    first = jax.eval_shape(
        lambda meta, task, key: learner.estimator.init(learner.problem, learner.solver, meta, task, key),
        meta, task_at(tasks, 0), keys[0],
    )  # fmt: skip
    stateful = bool(jax.tree.leaves(first))

    def run(key):
        init_key, warm_key = jax.random.split(jax.random.fold_in(key, 1))
        state = jax.vmap(
            lambda task, key: learner.estimator.init(learner.problem, learner.solver, meta, task, key)
        )(tasks, jax.random.split(init_key, count))
        if stateful and warmup:

            def call(state, k):
                return mean_hypergradient(learner, meta, tasks, state, jax.random.fold_in(warm_key, k))[1]

            state = jax.lax.fori_loop(0, warmup, lambda k, state: call(state, k), state)
        return mean_hypergradient(learner, meta, tasks, state, key)[0]

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        h = jax.jit(lambda keys: jax.lax.map(run, keys))(keys)
    grads = np.stack([_flat(jax.tree.map(lambda leaf, r=r: leaf[r], h.grad)) for r in range(len(keys))])
    stats = {name: float(np.mean(value)) for name, value in h.stats.items()}
    messages = dict.fromkeys(str(w.message) for w in said if issubclass(w.category, UserWarning))
    return Estimates(np.asarray(h.value, np.float64), grads, stats, stateful, tuple(messages))


def reference(problem: Problem, solver: InnerSolver, meta: Meta, tasks: Task, key: Key) -> Reference:
    """Measure slopes by differences, and the exact gradient where the inner loop can be unrolled.

    The exact gradient counts only when it agrees with the differences.
    """
    function = objective(problem, solver, tasks)
    draws = draws_randomness(function, meta, key)
    names, moves = directions(jax.random.fold_in(key, 2), meta)
    epsilon = float(jnp.finfo(_flat_dtype(meta)).eps)
    compiled = jax.jit(lambda meta, move, key: curve(function, meta, move, key))
    curves = [np.asarray(compiled(meta, move, key), np.float64) for move in moves]
    slopes = tuple(slope(values, epsilon) for values in curves)
    flat_moves = np.stack([_flat(move) for move in moves])
    value = float(curves[0][0])
    notes: list[str] = []
    vector = exact = None
    source = f"finite differences along {len(moves)} directions"
    if not any(name == "" for name in names) and all(s.reliable and not s.kink for s in slopes):
        vector = np.array([s.value for s in slopes]) / flat_moves.sum(1)
        source = "finite differences of every element"
    candidate, found, note = _unrolled(problem, solver, meta, tasks, key)
    notes += [note] if note else []
    if found is not None:
        verified = _verified(found, flat_moves, slopes, 1e-4 if epsilon < 1e-10 else 3e-2)
        if verified is not False:
            vector, exact = found, candidate
            source = f"the exact unroll, itself held against {source}" if verified else "the exact unroll"
        else:
            notes.append(
                "the exact unroll disagrees with the differences: a derivative rule in the problem is not "
                "the derivative of its value, or the loss is not smooth here"
            )
    return Reference(
        value, tuple(names), flat_moves, slopes, vector, exact, source, draws, tuple(notes)
    )  # fmt: skip


def _unrolled(problem, solver, meta, tasks, key):
    """The exact gradient by the first way that runs: (estimator, gradient, why none)."""
    steps = solver.num_steps if isinstance(solver, IterativeSolver) else 0
    checkpoint = int(np.sqrt(steps)) if steps > 50 else None
    said = ""
    for estimator in (Mixed(checkpoint), Unroll(checkpoint)):
        try:
            learner = Learner(problem, solver, estimator)
            return estimator, estimates(learner, meta, tasks, key[None], 0).grads[0], ""
        except Exception as error:
            said = f"no exact unroll to compare with: {one_line(error)}"
    return None, None, said


def _verified(vector, moves, slopes, tolerance) -> bool | None:
    """Whether a gradient agrees with every slope that can be relied on; None where there is none."""
    checked = 0
    for move, s in zip(moves, slopes, strict=True):
        if s.reliable and not s.kink:
            scale = max(abs(s.value), float(np.linalg.norm(vector * move)))
            if not abs(vector @ move - s.value) <= tolerance * scale + 3 * s.uncertainty:
                return False
            checked += 1
    return True if checked else None


def truths(
    ref: Reference, problem: Problem, solver: InnerSolver, meta: Meta, tasks: Task, keys: jax.Array
) -> tuple[np.ndarray | None, np.ndarray]:
    """Gradients `[repeats or 1, n]` (or None) and slopes `[repeats or 1, directions]` at each key."""
    slopes = np.array([[s.value for s in ref.slopes]])
    if not ref.draws or len(keys) == 1:
        return None if ref.vector is None else ref.vector[None], slopes
    if ref.exact is not None:
        vectors = estimates(Learner(problem, solver, ref.exact), meta, tasks, keys, 0).grads
        return vectors, vectors @ ref.moves.T
    function = objective(problem, solver, tasks)
    compiled = jax.jit(
        lambda meta, moves, key: jax.lax.map(lambda move: curve(function, meta, move, key), moves)
    )
    unravel = ravel_pytree(meta)[1]
    moves = jax.vmap(unravel)(jnp.asarray(ref.moves, _flat_dtype(meta)))
    rows = [[slope(np.asarray(c)).value for c in compiled(meta, moves, key)] for key in keys]
    slopes = np.array(rows)
    return None if ref.vector is None else slopes / ref.moves.sum(1), slopes


def one_line(error: BaseException, limit: int = 300) -> str:
    """An exception as one line of text."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:limit]}{'…' if len(text) > limit else ''}"


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def _flat_dtype(tree: Any):
    return jnp.result_type(*jax.tree.leaves(tree))
