"""The penalty (value-function) hypergradient: two inner solves, no second derivative."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel.hypergrad.common import split_keys
from bilevel.hypergrad.first_order.penalized import penalty_doubts, penalty_hypergradient, pulled, pulled_task
from bilevel.hypergrad.requirements import require_positive
from bilevel.hypergrad.residuals import norm, ratio
from bilevel.hypergrad.single_loop.warm_start import warn_of_leaves_out_of_sight
from bilevel.problem import Hypergradient, InnerSolver, Problem


@dataclass(frozen=True)
class Penalty:
    """What the inner loss would pay for a solution that suits the outer loss, differentiated in θ.

        ψ = solve(g),   φ = solve(g + f/λ),   λ = multiplier + growth t
        grad = ∂θ f(φ) + λ (∂θ g(φ) − ∂θ g(ψ))

    Both solves start from the same φ₀ with the same randomness: where they stop early their errors are alike
    and cancel, while a start of one from the end of the other would leave an error that λ multiplies.

    Args:
        multiplier: λ at the first call.
        growth: what λ gains with each call (each outer step).
        tolerance: the residual that `doubts` speaks of.
        rounding: the relative rounding error that `doubts` speaks of.

    Raises:
        TypeError: when the solver is a closed form: it would solve its own problem, not g + f/λ.
        ValueError: when a field is out of range.

    Warns:
        FirstOrderWarning: naming each leaf of meta that enters neither loss: its gradient is exactly zero.

    Stats: `multiplier`; `inner_residual` ‖∇φ g(ψ)‖ and `inner_residual_share`, the same over ‖∇φ g(φ₀)‖;
    `penalty_residual` ‖∇φ (g + f/λ)(φ)‖; `linear_residual`, how far φ − ψ is from what the formula needs;
    `rounding`, the relative error to be expected of the subtractions.

    Cost: two inner solves and five gradients; memory independent of K and of dim θ. First derivatives only,
    and any solver. Biased: the bias is O(1/λ), and float32 loses it again to cancellation, about in
    proportion to λ. State: the number of calls.

    Reference: Kwon, Kwon, Wright, Nowak, A fully first-order method for stochastic bilevel optimization,
    2023.

    >>> import bilevel as bl, jax, optax
    >>> problem = bl.Problem(init=lambda meta, key: 0.0 * meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * (params - meta) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: 0.5 * params**2)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=40)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> for multiplier in (9.0, 99.0):  # φ = λ θ / (λ + 1), and the exact hypergradient is 2
    ...     h = bl.hypergradient(problem, solver, Penalty(multiplier), 2.0, task, key)
    ...     print(round(float(h.grad), 3))
    1.8
    1.98
    """

    multiplier: float
    growth: float = 0.0
    tolerance: float = 0.1
    rounding: float = 0.01

    def __post_init__(self):
        require_positive(self, multiplier=self.multiplier, tolerance=self.tolerance, rounding=self.rounding)
        if not 0 <= self.growth < float("inf"):
            raise ValueError(f"Penalty.growth must be a number of at least 0, got {self.growth!r}")

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver that minimizes whatever inner loss it is given."""
        if getattr(solver, "closed_form", False):
            raise TypeError(
                f"Penalty solves inner_loss + outer_loss/multiplier, and {type(solver).__name__} solves a "
                "problem of its own; use bl.hypergrad.Mixed() or Unroll(), which are exact for it, or "
                "bl.inner.Gradient(optimizer, num_steps)"
            )

    def init(self, problem, solver, meta, task, key) -> jax.Array:
        """The count of calls, which λ follows."""
        return jnp.int32(0)

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, jax.Array]:
        """The hypergradient of one task."""
        inner_key, outer_key = split_keys(key)
        init_key, step_key = jax.random.split(inner_key)
        multiplier = self.multiplier + self.growth * jnp.asarray(state, float)
        fixed = jax.lax.stop_gradient(meta)
        warn_of_leaves_out_of_sight(self, problem, problem.init(fixed, init_key), meta, task, key)

        lifted, lifted_task = pulled(problem, multiplier, outer_key), pulled_task(task)
        psi, phi = jax.lax.stop_gradient(
            (
                solver.solve(problem, fixed, task, inner_key).params,
                solver.solve(lifted, fixed, lifted_task, inner_key).params,
            )
        )
        h, _ = penalty_hypergradient(problem, psi, phi, multiplier, meta, task, (step_key, outer_key))

        start = problem.init(fixed, init_key)
        at_start = norm(jax.grad(problem.inner_loss)(start, fixed, task.support, step_key))
        at_phi = jax.grad(lifted.inner_loss)(phi, fixed, lifted_task.support, step_key)
        stats = {
            **h.stats,
            "inner_residual_share": ratio(h.stats["inner_residual"], at_start),
            "penalty_residual": norm(at_phi),
        }
        return h._replace(stats=stats), state + 1

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Why the estimate may be wrong, given its stats."""
        return penalty_doubts(
            stats,
            tolerance=self.tolerance,
            rounding=self.rounding,
            settle="raise the solver's num_steps or its rate, or use bl.hypergrad.Mixed(), which is exact "
            "for the steps that are run",
        )
