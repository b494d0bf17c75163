"""stocBiO: several warm-started stochastic inner steps, then a stochastic Neumann series."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from bilevel.hypergrad.common import split_keys
from bilevel.hypergrad.requirements import (
    require_count,
    require_count_or_none,
    require_positive,
    require_stepping,
)
from bilevel.hypergrad.single_loop.minibatch import SERIES, entry, pick, pick_task, row_numbers
from bilevel.hypergrad.single_loop.warm_start import (
    Warm,
    implicit_hypergradient,
    inner_products,
    move_inner,
    outer_parts,
    warm_doubts,
    warm_start,
    warn_of_leaves_out_of_sight,
)
from bilevel.problem import Hypergradient, InnerSolver, Problem


@dataclass(frozen=True)
class StocBiO:
    """Warm-started inner steps, and a Neumann series with fresh rows in each factor.

        φ ← solver step on ∇φ gᵢ                                num_steps of the solver
        q = η Σₗ rₗ,  r₀ = ∂φ fⱼ,  rₗ₊₁ = (I − η ∇²φφ gᵢ) rₗ     l < num_neumann
        grad = ∂θ fⱼ − (∂θ∇φ gᵢ)ᵀ q                             fresh rows i each time that i appears

    Args:
        neumann_rate: η, below 2 / L with L the largest curvature of the inner loss.
        num_neumann: terms of the series.
        batch_size: as in `Soba`.
        tolerance: as in `Soba`.

    Raises:
        TypeError, ValueError: when the solver has no steps; when a field is out of range.

    Warns:
        FirstOrderWarning: naming each leaf of meta that enters neither loss: its gradient is exactly zero.

    Stats: as in `Soba`, at the new φ. The state's q is the last series, kept to be looked at and not used.

    Cost: num_steps gradients, 2 num_neumann + 2 more of a minibatch; memory of a few times dim φ, independent
    of dim θ. The series leaves a bias of (1 − ημ)^num_neumann that no number of calls removes, μ the least
    curvature (`AmIGO` removes it, by starting its q where the last one ended).

    Reference: Ji, Yang, Liang, Bilevel optimization: convergence analysis and enhanced design, 2021.

    >>> import bilevel as bl, jax.numpy as jnp, optax
    >>> problem = bl.Problem(init=lambda meta, key: jnp.zeros(2),
    ...                      inner_loss=lambda params, meta, batch, key: jnp.sum((params - meta) ** 2),
    ...                      outer_loss=lambda params, meta, batch, key: jnp.sum(params**2))
    >>> solver, task = bl.inner.Gradient(optax.sgd(0.3), num_steps=20), bl.Task(None, None)
    >>> meta, key = jnp.array([1.0, 2.0]), jax.random.key(0)
    >>> stocbio = StocBiO(neumann_rate=0.3, num_neumann=20)
    >>> state = stocbio.init(problem, solver, meta, task, key)
    >>> h, _ = stocbio.estimate(problem, solver, meta, task, state, key)
    >>> print(jnp.round(h.grad, 3))  # the inner solution is meta, so this is twice meta
    [2. 4.]
    """

    neumann_rate: float
    num_neumann: int = 10
    batch_size: int | None = None
    tolerance: float = 0.1
    settles: ClassVar[bool] = True  # right once its own inner parameters have settled

    def __post_init__(self):
        require_positive(self, neumann_rate=self.neumann_rate, tolerance=self.tolerance)
        require_count(self, num_neumann=self.num_neumann)
        require_count_or_none(self, batch_size=self.batch_size)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with at least one step."""
        require_stepping(self, solver)

    def init(self, problem, solver, meta, task, key) -> Warm:
        """φ₀."""
        noisy = self.batch_size is not None
        return warm_start(problem, solver, meta, task, key, self.neumann_rate, noisy)

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, Warm]:
        """One direction in θ at the φ that the steps of this call have reached."""
        inner_key, outer_key = split_keys(key)
        step_key, series_key = jax.random.split(inner_key)[1], jax.random.fold_in(inner_key, SERIES)
        moves = solver.num_steps
        numbers = row_numbers(task, self.batch_size, key, moves + self.num_neumann)
        moving, following = entry(numbers.support, slice(moves)), entry(numbers.support, slice(moves, -1))
        rows = pick_task(task, numbers, -1, 0)
        inner = move_inner(problem, solver, meta, task, state.inner, step_key, moving)
        direct, slope = outer_parts(problem, inner.params, meta, rows, outer_key)
        warn_of_leaves_out_of_sight(self, problem, inner.params, meta, rows, key)

        def term(carry, numbered):
            r, total = carry
            k_key, drawn = jax.random.fold_in(series_key, numbered[0]), pick(task.support, numbered[1])
            hessian_r = inner_products(problem, inner.params, meta, drawn, k_key, r).hessian_q
            r = jax.tree.map(lambda r, h: r - self.neumann_rate * h, r, hessian_r)
            return (r, jax.tree.map(lambda t, r: t + r, total, r)), None

        (_, total), _ = jax.lax.scan(term, (slope, slope), (jnp.arange(self.num_neumann - 1), following))
        q = jax.tree.map(lambda t: self.neumann_rate * t, total)
        products = inner_products(problem, inner.params, meta, rows.support, step_key, q)
        h, trail = implicit_hypergradient(direct, products, slope, q, state.trail)
        return h, Warm(inner, q, trail)

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Why the estimate may be wrong, given its stats."""
        return warm_doubts(
            stats,
            rate_name="neumann_rate",
            rate=self.neumann_rate,
            tolerance=self.tolerance,
            series="num_neumann",
        )
