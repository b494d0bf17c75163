"""Pairs of inner loops that live on between calls and are advanced a window of steps at a time.

A particle is an inner loop at θ + σε and one at θ − σε. Every call advances each by `truncation` steps; after
`num_steps` steps its life ends and the next call starts it anew. What tells PES from NRES is only which noise
moves a particle in a window, and which noise its difference of losses is multiplied with.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bilevel.hypergrad.common import (
    as_floats,
    gradient_stats,
    noise_key,
    outer_objective,
    problem_metrics,
    split_keys,
)
from bilevel.hypergrad.evolution.perturbation import (
    draw,
    error_stats,
    map_chunks,
    resolution,
    shift,
    unread,
)
from bilevel.hypergrad.requirements import require_count, require_count_or_none, require_positive
from bilevel.problem import Hypergradient, InnerSolver, InnerState, IterativeSolver, Key, Meta, Problem, Task


class Particles(NamedTuple):
    """The state of N particles.

    Args:
        inner: leaves `[N, 2, ...]`, the inner loops at θ + σε and at θ − σε.
        noise: leaves `[N, ...]`, what the estimator remembers of the noise of this life.
        window: int32 `[N]`, windows done in this life; at 0 the next call starts a new one.
        end: int32 `[N]`, windows in this life.
        key: `[N]`, the key that this life was started with.
    """

    inner: InnerState
    noise: Meta
    window: jax.Array
    end: jax.Array
    key: Key


def require_fields(estimator: Any) -> None:
    """Refuse sizes and counts that are not positive."""
    require_positive(estimator, sigma=estimator.sigma)
    require_count(estimator, num_pairs=estimator.num_pairs, truncation=estimator.truncation)
    require_count_or_none(estimator, chunk=estimator.chunk)


def require_steps(estimator: Any, solver: InnerSolver) -> None:
    """Refuse a solver that cannot be run a window at a time."""
    name = type(estimator).__name__
    if not isinstance(solver, IterativeSolver):
        raise TypeError(
            f"{name} runs the inner loop a few steps at a time, and {type(solver).__name__} has no steps "
            "(num_steps, init, step); use bl.hypergrad.EvolutionStrategies(...), which takes any solver, or "
            "bl.inner.Gradient(optimizer, num_steps)"
        )
    if solver.num_steps < estimator.truncation:
        raise ValueError(
            f"{name}.truncation={estimator.truncation} is longer than the inner loop of "
            f"num_steps={solver.num_steps}; use a truncation of at most num_steps"
        )


def num_windows(estimator: Any, solver: IterativeSolver) -> int:
    """Calls in a life: ⌈num_steps / truncation⌉. The last window may be shorter."""
    return -(-solver.num_steps // estimator.truncation)


def window_doubts(estimator: Any, stats: Mapping[str, float]) -> list[str]:
    """What to say when only the first window of the inner loop was seen."""
    windows = stats.get("num_windows", 1)
    if windows <= 1 or stats["window"] > 0:
        return []
    return [
        f"{type(estimator).__name__}: this hypergradient is that of the first of {windows:.0f} windows "
        f"alone, {estimator.truncation} inner steps. The mean over {windows:.0f} calls is that of the whole "
        "inner loop: hand the state from call to call, as bl.train does, or use truncation=num_steps"
    ]


def unborn(estimator, problem, solver, meta, task, key) -> Particles:
    """Particles that the first call starts; their inner states only fix shapes."""
    meta = as_floats(meta)
    count, windows = estimator.num_pairs, num_windows(estimator, solver)
    # A first life that is cut short spreads the particles over the windows; what it does cover is unbiased.
    end = windows - jnp.arange(count) * windows // count if estimator.staggered else jnp.full(count, windows)

    def repeat(leaf, *sizes):
        return jnp.broadcast_to(leaf, (*sizes, *jnp.shape(leaf)))

    return Particles(
        jax.tree.map(lambda leaf: repeat(leaf, count, 2), solver.init(problem, meta, task, key)),
        jax.tree.map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), meta),
        jnp.zeros(count, jnp.int32),
        end.astype(jnp.int32),
        repeat(key, count),
    )


def advance(
    estimator,
    problem: Problem,
    solver: IterativeSolver,
    meta: Meta,
    task: Task,
    state: Particles,
    key: Key,
    remember: Callable[[Meta, Meta, jax.Array], tuple[Meta, Meta]],
) -> tuple[Hypergradient, Particles]:
    """Every particle by one window, and the gradient of that window's losses.

        g = 1/(2 N σ) Σᵢ (Lᵢ⁺ − Lᵢ⁻) ξᵢ,   L = (n/K) Σ f(φₖ) over the steps of the window

    with n windows in K steps: the mean of L over a life is the mean of f over its steps.

    Args:
        estimator: has `sigma`, `num_pairs`, `truncation` and `chunk`.
        remember: `remember(fresh, noise, newborn) -> (ε, ξ)`: the noise that moves a particle in this window
            and the one that weighs its losses, which is kept as `Particles.noise`.
    """
    meta = as_floats(meta)
    count, sigma = estimator.num_pairs, estimator.sigma
    still = unread(lambda at: _whole_loss(problem, solver, at, task, key), meta)

    def particle(state, noise_key):
        newborn = state.window == 0
        life_key = jnp.where(newborn, key, state.key)
        moved, weight = remember(draw(noise_key, meta, still), state.noise, newborn)

        def side(sign, inner):
            at = shift(meta, sign * sigma, moved)
            return run_window(
                problem, solver, at, task, inner, state.window, life_key, truncation=estimator.truncation
            )

        sides = (jnp.array([1.0, -1.0]), state.inner)
        inner, losses, stats = map_chunks(lambda row: side(*row), sides, 1 if estimator.chunk == 1 else None)
        slope = (losses[0] - losses[1]) / (2 * sigma)
        gradient = jax.tree.map(lambda leaf: slope * leaf, weight)
        window = jnp.where(state.window + 1 >= state.end, 0, state.window + 1)
        end = jnp.where(window == 0, num_windows(estimator, solver), state.end)
        state = Particles(inner, weight, window, end, life_key)
        return state, (gradient, optax.tree.norm(gradient, squared=True), losses, stats)

    keys = jax.random.split(noise_key(key), count)
    after, out = map_chunks(lambda row: particle(*row), (state, keys), estimator.chunk)
    grad, squares, value, stats = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), out)
    value, stats = jax.tree.map(jnp.mean, (value, stats))
    error = error_stats(count * squares, grad, count)
    grad = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), grad, meta)
    stats = {
        **stats,
        "window": jnp.mean(state.window, dtype=value.dtype),
        "num_windows": jnp.asarray(num_windows(estimator, solver), value.dtype),
        **error,
        **resolution(meta, sigma),
        **gradient_stats(value, grad),
    }
    return Hypergradient(value, grad, stats), after


def run_window(
    problem, solver, at: Meta, task: Task, inner: InnerState, window, key: Key, *, truncation: int
):
    """One window of one inner loop: its next state, the window's loss L, and stats.

    Window 0 begins with a new inner loop. Keys are those of `inner.unroll`, so that a life at one θ is
    the same loop, step for step, as `solver.solve` with the key the life was started with.
    """
    inner_key, outer_key = split_keys(key)
    init_key, step_key = jax.random.split(inner_key)
    begun = solver.init(problem, at, task, init_key)
    inner = jax.tree.map(lambda new, old: jnp.where(window == 0, new, old), begun, inner)
    ragged = solver.num_steps % truncation != 0

    def body(carry, offset):
        inner, total, last_loss = carry
        after, inner_loss = solver.step(problem, at, task, inner, step_key)
        loss = outer_objective(problem, after.params, at, task, outer_key)[0]
        if ragged:  # the last window of a life ends early: what follows the horizon is not there
            there = window * truncation + offset < solver.num_steps
            after = jax.tree.map(lambda new, old: jnp.where(there, new, old), after, inner)
            loss, inner_loss = jnp.where(there, loss, 0.0), jnp.where(there, inner_loss, last_loss)
        return (after, total + loss, inner_loss), None

    shapes = jax.eval_shape(lambda: body((inner, 0.0, 0.0), 0)[0])
    zeros = (jnp.zeros((), shapes[1].dtype), jnp.zeros((), shapes[2].dtype))
    (inner, total, inner_loss), _ = jax.lax.scan(body, (inner, *zeros), jnp.arange(truncation))
    windows = -(-solver.num_steps // truncation)
    metrics = problem_metrics(problem, inner.params, at, task, outer_key)
    return inner, total * (windows / solver.num_steps), {"inner_loss": inner_loss, **metrics}


def _whole_loss(problem, solver, at, task, key):
    inner_key, outer_key = split_keys(key)
    params = solver.solve(problem, at, task, inner_key).params
    return outer_objective(problem, params, at, task, outer_key)[0]
