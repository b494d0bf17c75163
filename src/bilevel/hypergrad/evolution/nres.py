"""Noise-reuse evolution strategies: as PES, with one perturbation for the whole life of a particle."""

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
class NRES:
    """Unbiased gradient of the mean outer loss along the inner loop; each life keeps its one noise.

        εᵢ ~ N(0, I) once a life,   g = 1/(2 N σ) Σᵢ (Lᵢ⁺ − Lᵢ⁻) εᵢ

    As `PES`, and for the same F(θ) = (1/K) Σₖ f(φₖ, θ), but a particle is moved by the same ε in all its
    windows. The noise that weighs a loss does not pile up with the windows before it: the variance of a call
    does not grow with the age of a particle, as that of PES does where losses forget old windows.

    Args:
        sigma, num_pairs, truncation, staggered, chunk: as in `PES`.

    Raises:
        TypeError: when the solver has no steps, or a leaf of meta is not a float.
        ValueError: when a field is not positive, or `truncation` exceeds `solver.num_steps`.

    Cost: that of `PES`. The mean of g over the calls of a life is unbiased for the gradient of F smoothed by
    σ, here with one ε for all steps as in `EvolutionStrategies`; bias O(σ²) against F. Within a life the
    errors of the calls are alike and do not average out: N pairs see N directions until lives end, so
    stagger them.

    State and stats: as in `PES`.

    Reference: Li et al., Noise-reuse in online evolution strategies, 2023; Vicol, Kolter, Swersky,
    Low-variance gradient estimation in unrolled computation graphs with ES-Single, 2023.

    >>> import bilevel as bl, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * params**2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=2)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> estimator = NRES(sigma=0.1, num_pairs=10_000, truncation=2)
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

        def remember(fresh, kept, newborn):
            kept = jax.tree.map(lambda new, old: jnp.where(newborn, new, old), fresh, kept)
            return kept, kept

        return advance(self, problem, solver, meta, task, state, key, remember)

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Says so when noise dominates, or only the first window was seen."""
        noise = noise_doubts(self, stats, "num_pairs", "take more pairs")
        return noise + window_doubts(self, stats)
