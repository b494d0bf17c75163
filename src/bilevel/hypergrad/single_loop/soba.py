"""SOBA: inner parameters, linear system and meta move together, one stochastic step each."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax

from bilevel.hypergrad.common import split_keys
from bilevel.hypergrad.requirements import require_count_or_none, require_positive, require_single_step
from bilevel.hypergrad.single_loop.minibatch import draw_task
from bilevel.hypergrad.single_loop.warm_start import (
    Warm,
    given,
    implicit_hypergradient,
    inner_products,
    linear_step,
    outer_parts,
    warm_doubts,
    warm_start,
    warn_of_leaves_out_of_sight,
)
from bilevel.problem import Hypergradient, InnerSolver, Problem


@dataclass(frozen=True)
class Soba:
    """One warm-started step of the inner problem and of the linear system for each outer step.

        grad = ∂θ fⱼ − (∂θ∇φ gᵢ)ᵀ q,   φ ← solver step on ∇φ gᵢ,   q ← q − ρ (∇²φφ gᵢ q − ∂φ fⱼ)

    All three are evaluated at the same (φ, q, θ), on rows i of the support and j of the query that are
    drawn uniformly, with replacement, at each call. The outer optimizer takes the step in θ.

    Args:
        linear_rate: ρ, below 2 / L with L the largest curvature of the inner loss.
        batch_size: rows drawn from each of support and query, along the leading axis of every leaf; both
            losses must be means over rows. None takes all of them. A row that has a meta-variable of its
            own (example weights) carries its index in the batch.
        tolerance: the residual, without its noise, that `doubts` speaks of.

    Raises:
        TypeError, ValueError: when the solver has no steps or not exactly one; when a field is out of range.

    Warns:
        FirstOrderWarning: naming each leaf of meta that enters neither loss: its gradient is exactly zero.

    Stats: `inner_residual` ‖∇φ gᵢ‖, `inner_residual_share` the same over the largest seen so far,
    `linear_residual` ‖∇²φφ gᵢ q − ∂φ fⱼ‖ / ‖∂φ fⱼ‖, `curvature` ⟨q, ∇²φφ gᵢ q⟩ / ⟨q, q⟩. They, `value` and
    the problem's metrics are those of the rows drawn, at the φ that the call began with, and so are noisy.
    On minibatches `inner_drift` and `linear_drift` are the cosines between the residuals of successive calls:
    their mean is near 1 for a bias, and at or below 0 when only noise is left, which `doubts` takes out.

    Cost: about 4 gradients of a minibatch; memory of a few times dim φ. Nothing grows with the number of
    inner steps already taken, nor with dim θ. Biased while φ and q lag behind θ: not to be used in a single
    call. At (φ*, q*) unbiased, with a variance proportional to 1 / batch_size.

    Reference: Dagréou, Ablin, Vaiter, Moreau, A framework for bilevel optimization, 2022.

    >>> import bilevel as bl, jax.numpy as jnp, optax
    >>> problem = bl.Problem(init=lambda meta, key: jnp.zeros(2),
    ...                      inner_loss=lambda params, meta, batch, key: jnp.sum((params - meta) ** 2),
    ...                      outer_loss=lambda params, meta, batch, key: jnp.sum(params**2))
    >>> solver, task = bl.inner.Gradient(optax.sgd(0.3), num_steps=1), bl.Task(None, None)
    >>> meta, key, soba = jnp.array([1.0, 2.0]), jax.random.key(0), Soba(linear_rate=0.3)
    >>> state = soba.init(problem, solver, meta, task, key)
    >>> step = jax.jit(lambda state: soba.estimate(problem, solver, meta, task, state, key))
    >>> for _ in range(30):
    ...     h, state = step(state)
    >>> print(jnp.round(h.grad, 3))  # the inner solution is meta, so this is twice meta
    [2. 4.]
    """

    linear_rate: float
    batch_size: int | None = None
    tolerance: float = 0.1
    settles: ClassVar[bool] = True  # right once its own inner parameters have settled

    def __post_init__(self):
        require_positive(self, linear_rate=self.linear_rate, tolerance=self.tolerance)
        require_count_or_none(self, batch_size=self.batch_size)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with one step."""
        require_single_step(self, solver)

    def init(self, problem, solver, meta, task, key) -> Warm:
        """φ₀ and a q that is one step away from 0."""
        noisy = self.batch_size is not None
        return warm_start(problem, solver, meta, task, key, self.linear_rate, noisy)

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, Warm]:
        """One direction in θ, and the state after a step of φ and of q."""
        inner_key, outer_key = split_keys(key)
        step_key = jax.random.split(inner_key)[1]
        params, rows = state.inner.params, draw_task(task, self.batch_size, key)
        direct, slope = outer_parts(problem, params, meta, rows, outer_key)
        warn_of_leaves_out_of_sight(self, problem, params, meta, rows, key)
        products = inner_products(problem, params, meta, rows.support, step_key, state.q)
        h, trail = implicit_hypergradient(direct, products, slope, state.q, state.trail)
        inner, _ = solver.step(
            problem, meta, rows, state.inner, step_key, given(products.loss, products.gradient)
        )
        q = linear_step(state.q, products.hessian_q, slope, self.linear_rate)
        return h, Warm(inner, q, trail)

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Why the estimate may be wrong, given its stats."""
        return warm_doubts(
            stats,
            rate_name="linear_rate",
            rate=self.linear_rate,
            tolerance=self.tolerance,
        )
