"""Persistent evolution strategies: unbiased hypergradients from short windows of a long inner loop."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel.hypergrad.evolution.particles import (
    Particles,
    advance,
    num_windows,
    require_fields,
    require_steps,
    unborn,
    window_doubts,
)
from bilevel.hypergrad.evolution.perturbation import noise_doubts
from bilevel.problem import Hypergradient, InnerSolver, Problem


@dataclass(frozen=True)
class PES:
    """Unbiased gradient of the mean outer loss along the inner loop, a window of steps at a call.

        εᵢ ~ N(0, I) anew in each window,   ξᵢ ← ξᵢ + εᵢ,   g = 1/(2 N σ) Σᵢ (Lᵢ⁺ − Lᵢ⁻) ξᵢ

    Each of N particles is an inner loop at θ + σε and one at θ − σε that live on between calls. ξ is the sum
    of all noise of a life, so a loss is credited to the windows before its own too: what plain truncation
    forgets. After `solver.num_steps` steps a life ends, with its ξ, and the next call begins a new one.

        F(θ) = (1/K) Σₖ f(φₖ, θ), k = 1..K;   L = (n/K) Σ f(φₖ) in a window;   n = ⌈K / truncation⌉ windows

    The mean of g over the n calls of a life is unbiased for the gradient of F, smoothed by σ: the same F as
    `MultiStep()`, not the loss of the last iterate alone. A single call from a fresh state sees the first
    window only. If θ moves between calls, the past of a particle is that of older θ: keep outer steps small.

    Args:
        sigma: σ, one for all leaves.
        num_pairs: N.
        truncation: inner steps a call, at most `solver.num_steps`; the last window of a life may be shorter.
        staggered: spread the particles over the windows, by cutting first lives short, so that later
            calls see all windows at once; otherwise all particles walk in step.
        chunk: how many particles run side by side; None for all.

    Raises:
        TypeError: when the solver has no steps, or a leaf of meta is not a float.
        ValueError: when a field is not positive, or `truncation` exceeds `solver.num_steps`.

    Cost: 2N · truncation inner steps a call, forward only, and 2N starts; memory 2N inner states, independent
    of K. The variance of a call falls as 1/N and grows with dim θ and the windows a particle has lived, about
    (t dim θ + 1) |∇L|² / N at the t-th where losses forget older windows. Unbiased for the smoothed F, bias
    O(σ²) against F.

    State: `Particles`. A life keeps the key it began with; step k draws from it as `solver.solve` would.
    When the task changes between calls the particles go on with the new batch, as online training does.
    `value` and the other stats are means over the particles at their moved θ; `stats["window"]` is the mean
    index of the window, of `stats["num_windows"]`; `stats["standard_error"]` the error of g as a multiple
    of its length.

    Reference: Vicol, Metz, Sohl-Dickstein, Unbiased gradient estimation in unrolled computation graphs with
    persistent evolution strategies, 2021.

    >>> import bilevel as bl, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * params**2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=2)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> estimator = PES(sigma=0.1, num_pairs=10_000, truncation=2)
    >>> h = bl.hypergradient(problem, solver, estimator, 8.0, task, key)
    >>> print(jnp.round(h.grad, 1))  # (1/2 + 1/4) / 2 = 0.375
    0.4
    """

    sigma: float
    num_pairs: int
    truncation: int
    staggered: bool = False
    chunk: int | None = None

    __post_init__ = require_fields
    num_windows = num_windows  # of a solver: how many calls make a life
    init = unborn

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with steps, at least `truncation` of them."""
        require_steps(self, solver)

    def estimate(self, problem, solver, meta, task, state: Particles, key) -> tuple[Hypergradient, Particles]:
        """The gradient of one window's losses, and the particles after it."""

        def remember(fresh, total, newborn):
            total = jax.tree.map(lambda new, old: new + jnp.where(newborn, 0.0, old), fresh, total)
            return fresh, total

        return advance(self, problem, solver, meta, task, state, key, remember)

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Says so when noise dominates, or only the first window was seen."""
        noise = noise_doubts(self, stats, "num_pairs", "take more pairs or a longer truncation")
        return noise + window_doubts(self, stats)
