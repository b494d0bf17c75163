"""AmIGO: several warm-started stochastic steps of the inner problem, then of the linear system."""

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
    linear_step,
    move_inner,
    outer_parts,
    warm_doubts,
    warm_start,
    warn_of_leaves_out_of_sight,
)
from bilevel.problem import Hypergradient, InnerSolver, Problem


@dataclass(frozen=True)
class AmIGO:
    """Warm-started inner and linear solves, a few stochastic steps of each for an outer step.

        φ ← solver step on ∇φ gᵢ                    num_steps of the solver, fresh rows i each time
        q ← q − ρ (∇²φφ gᵢ q − ∂φ fⱼ)               linear_steps times, fresh rows i, one j
        grad = ∂θ fⱼ − (∂θ∇φ gᵢ)ᵀ q                 at the new φ and q, fresh rows i

    Args:
        linear_rate: ρ, below 2 / L with L the largest curvature of the inner loss.
        linear_steps: steps of the linear system for each call.
        batch_size: as in `Soba`.
        tolerance: as in `Soba`.

    Raises:
        TypeError, ValueError: when the solver has no steps; when a field is out of range.

    Warns:
        FirstOrderWarning: naming each leaf of meta that enters neither loss: its gradient is exactly zero.

    Stats: as in `Soba`, at the new φ and q.

    Cost: num_steps gradients, 2 linear_steps + 4 more of a minibatch; memory of a few times dim φ,
    independent of dim θ. The bias falls geometrically in num_steps and linear_steps, down to the noise of the
    rows.

    Reference: Arbel, Mairal, Amortized implicit differentiation for stochastic bilevel optimization, 2022.

    >>> import bilevel as bl, jax.numpy as jnp, optax
    >>> problem = bl.Problem(init=lambda meta, key: jnp.zeros(2),
    ...                      inner_loss=lambda params, meta, batch, key: jnp.sum((params - meta) ** 2),
    ...                      outer_loss=lambda params, meta, batch, key: jnp.sum(params**2))
    >>> solver, task = bl.inner.Gradient(optax.sgd(0.3), num_steps=10), bl.Task(None, None)
    >>> meta, key, amigo = jnp.array([1.0, 2.0]), jax.random.key(0), AmIGO(linear_rate=0.3, linear_steps=10)
    >>> state = amigo.init(problem, solver, meta, task, key)
    >>> step = jax.jit(lambda state: amigo.estimate(problem, solver, meta, task, state, key))
    >>> for _ in range(2):
    ...     h, state = step(state)
    >>> print(jnp.round(h.grad, 3))  # the inner solution is meta, so this is twice meta
    [2. 4.]
    """

    linear_rate: float
    linear_steps: int = 10
    batch_size: int | None = None
    tolerance: float = 0.1
    settles: ClassVar[bool] = True  # right once its own inner parameters have settled

    def __post_init__(self):
        require_positive(self, linear_rate=self.linear_rate, tolerance=self.tolerance)
        require_count(self, linear_steps=self.linear_steps)
        require_count_or_none(self, batch_size=self.batch_size)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with at least one step."""
        require_stepping(self, solver)

    def init(self, problem, solver, meta, task, key) -> Warm:
        """φ₀ and a q that is one step away from 0."""
        noisy = self.batch_size is not None
        return warm_start(problem, solver, meta, task, key, self.linear_rate, noisy)

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, Warm]:
        """One direction in θ at the φ and q that the steps of this call have reached."""
        inner_key, outer_key = split_keys(key)
        step_key, series_key = jax.random.split(inner_key)[1], jax.random.fold_in(inner_key, SERIES)
        moves = solver.num_steps
        numbers = row_numbers(task, self.batch_size, key, moves + self.linear_steps + 1)
        moving, following = entry(numbers.support, slice(moves)), entry(numbers.support, slice(moves, -1))
        rows = pick_task(task, numbers, -1, 0)
        inner = move_inner(problem, solver, meta, task, state.inner, step_key, moving)
        direct, slope = outer_parts(problem, inner.params, meta, rows, outer_key)
        warn_of_leaves_out_of_sight(self, problem, inner.params, meta, rows, key)

        def linear(q, term):
            k_key, drawn = jax.random.fold_in(series_key, term[0]), pick(task.support, term[1])
            products = inner_products(problem, inner.params, meta, drawn, k_key, q)
            return linear_step(q, products.hessian_q, slope, self.linear_rate), None

        q, _ = jax.lax.scan(linear, state.q, (jnp.arange(self.linear_steps), following))
        products = inner_products(problem, inner.params, meta, rows.support, step_key, q)
        h, trail = implicit_hypergradient(direct, products, slope, q, state.trail)
        return h, Warm(inner, q, trail)

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Why the estimate may be wrong, given its stats."""
        return warm_doubts(
            stats,
            rate_name="linear_rate",
            rate=self.linear_rate,
            tolerance=self.tolerance,
        )
