"""Evolution strategies: the hypergradient from values alone, for inner loops that have no derivative."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from bilevel.hypergrad.common import as_floats, gradient_stats, noise_key, outer_objective, split_keys
from bilevel.hypergrad.evolution.perturbation import (
    draw,
    error_stats,
    map_chunks,
    noise_doubts,
    resolution,
    shift,
    sum_chunks,
    unread,
)
from bilevel.hypergrad.requirements import require_count, require_count_or_none, require_positive
from bilevel.problem import Hypergradient, InnerSolver, Key, Meta, Problem, Task


@dataclass(frozen=True)
class EvolutionStrategies:
    """Gradient of the smoothed outer loss, from pairs of whole inner solves on either side of θ.

        g = 1/(2 N σ) Σᵢ (F(θ + σ εᵢ) − F(θ − σ εᵢ)) εᵢ,   εᵢ ~ N(0, I)

    Only values are used: the inner loop may hold rounding, argmax, `while_loop` or a callback. All 2N
    solves share one inner and one outer key, the ones every other estimator would use, so that what is
    compared differs in θ alone.

    Args:
        sigma: σ, one for all leaves; scale meta so that it suits them all.
        num_pairs: N.
        chunk: how many pairs run side by side; None for all. 1 also does without `vmap`.

    Raises:
        TypeError: when the solver has no `solve`, or a leaf of meta is not a float.
        ValueError: when `sigma` or a count is not positive.

    Cost: 2N inner solves, forward only; memory of `chunk` pairs, independent of K. The error grows with
    dim θ: E|g − ∇F_σ|² ≈ (dim θ + 1) |∇F|² / N. Unbiased for F_σ(θ) = E F(θ + σε); against ∇F the bias is
    O(σ²), none where F is quadratic. A leaf that nothing reads gets exactly zero.

    `value` is the mean of the 2N losses, an estimate of F_σ(θ); problem's and solver's stats are means too.
    `stats["standard_error"]` is the error of g as a multiple of its length (from two pairs on),
    `stats["resolution"]` the spacing of the numbers near θ as a multiple of σ.

    Reference: Nesterov, Spokoiny, 2017; Salimans et al., 2017.

    >>> import bilevel as bl, jax, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * params**2,
    ...                      outer_loss=lambda params, meta, batch, key: jnp.round(params / 4))
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=1)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> estimator = EvolutionStrategies(sigma=8.0, num_pairs=4000)
    >>> print(jnp.round(bl.hypergradient(problem, solver, estimator, 8.0, task, key).grad, 1))
    0.1
    """

    sigma: float
    num_pairs: int
    chunk: int | None = None

    def __post_init__(self):
        require_positive(self, sigma=self.sigma)
        require_count(self, num_pairs=self.num_pairs)
        require_count_or_none(self, chunk=self.chunk)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs nothing but `solve`."""
        if not isinstance(solver, InnerSolver):
            raise TypeError(
                f"{type(self).__name__} needs a solver with solve(problem, meta, task, key), and "
                f"{type(solver).__name__} has none; use bl.inner.Gradient(optimizer, num_steps)"
            )

    def init(self, problem, solver, meta, task, key) -> tuple[()]:
        """Stateless."""
        return ()

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, tuple[()]]:
        """The smoothed hypergradient of one task."""
        return antithetic(self, problem, solver, meta, task, key, draw), state

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Says so when noise dominates."""
        return noise_doubts(self, stats, "num_pairs", "take more pairs")


def antithetic(
    estimator, problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key, sample: Callable
) -> Hypergradient:
    """The mean over `num_pairs` of (F(θ + σε) − F(θ − σε)) ε / 2σ, with its stats.

    Args:
        estimator: has `sigma`, `num_pairs` and `chunk`.
        sample: `sample(key, meta, still) -> ε`, a tree like meta, zero in the leaves named in `still`.
    """
    meta = as_floats(meta)
    inner_key, outer_key = split_keys(key)
    sigma, count, chunk = estimator.sigma, estimator.num_pairs, estimator.chunk

    def value(at):
        solution = solver.solve(problem, at, task, inner_key)
        value, stats = outer_objective(problem, solution.params, at, task, outer_key)
        return value, {**solution.stats, **stats}

    still = unread(lambda at: value(at)[0], meta)

    def pair(pair_key):
        noise = sample(pair_key, meta, still)
        # Both sides in one trace: the inner loop is compiled once.
        values, stats = map_chunks(
            lambda sign: value(shift(meta, sign * sigma, noise)),
            jnp.array([1.0, -1.0]),
            1 if chunk == 1 else None,
        )
        slope = (values[0] - values[1]) / (2 * sigma)
        gradient = jax.tree.map(lambda leaf: slope * leaf, noise)
        means = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), (values, stats))
        return gradient, optax.tree.norm(gradient, squared=True), means

    keys = jax.random.split(noise_key(key), count)
    total = sum_chunks(pair, keys, chunk)
    grad, _, (loss, stats) = jax.tree.map(lambda leaf: leaf / count, total)
    error = error_stats(total[1], grad, count)
    grad = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), grad, meta)
    stats = {**stats, **error, **resolution(meta, sigma), **gradient_stats(loss, grad)}
    return Hypergradient(loss, grad, stats)
