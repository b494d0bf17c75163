"""DARTS: one step taken as the whole solution, and its second derivative by a finite difference."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax

from bilevel.hypergrad.common import differentiate, gradient_stats, outer_objective, split_keys
from bilevel.hypergrad.first_order.differences import cross_difference, difference_doubts
from bilevel.hypergrad.requirements import require_positive
from bilevel.hypergrad.residuals import norm
from bilevel.hypergrad.single_loop.warm_start import warn_of_leaves_out_of_sight
from bilevel.problem import Hypergradient, InnerSolver, Problem


@dataclass(frozen=True)
class FiniteDifference:
    """The hypergradient through one plain gradient step at the solution, from first derivatives.

        grad = ∂θ f − η (∂θ g(φ + h b) − ∂θ g(φ − h b)) / 2h,   b = ∂φ f,   h = ε / ‖b‖

    It approximates the implicit hypergradient with (∇²φφ g)⁻¹ replaced by η times the identity (T1-T2,
    `OneStep(η)`): the same to O(ε²). DARTS is this with a solver of one step of rate η, but for taking the
    second derivative where that step began.

    Args:
        step_size: η, the rate of the step that stands for the whole inner loop.
        epsilon: ε, how far φ is moved in all (2-norm over all leaves).
        tolerance: the difference_error that `doubts` speaks of.

    Raises:
        ValueError: when a field is not positive.

    Warns:
        FirstOrderWarning: naming each leaf of meta that enters neither loss: its gradient is exactly zero.

    Stats: `inner_residual` ‖∇φ g(φ)‖; `difference_error`, the relative error of the difference as measured.

    Cost: one inner solve and seven gradients; memory independent of K and of dim θ; any solver. Biased: the
    error of the difference is O(ε²) plus rounding of about 1e-7/ε in float32, and that of the identity is of
    order one: the length of the indirect part means little (its rate η is a tuning knob), its direction is
    right where ∇²φφ g is near a multiple of the identity.

    Reference: Liu, Simonyan, Yang, DARTS, 2019; Luketina, Berglund, Greff, Raiko, 2016.

    >>> import bilevel as bl, jax, optax
    >>> problem = bl.Problem(init=lambda meta, key: 0.0 * meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * (params - meta) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: 0.5 * params**2)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=20)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> h = bl.hypergradient(problem, solver, FiniteDifference(0.5), 2.0, task, key)
    >>> print(round(float(h.grad), 2))  # η ∂φ f = 0.5 × 2
    1.0
    """

    step_size: float
    epsilon: float = 0.01
    tolerance: float = 0.02

    def __post_init__(self):
        require_positive(self, step_size=self.step_size, epsilon=self.epsilon, tolerance=self.tolerance)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Any solver will do."""

    def init(self, problem, solver, meta, task, key) -> tuple[()]:
        """Stateless."""
        return ()

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, tuple[()]]:
        """The hypergradient of one task."""
        inner_key, outer_key = split_keys(key)
        step_key = jax.random.split(inner_key)[1]
        phi = jax.lax.stop_gradient(
            solver.solve(problem, jax.lax.stop_gradient(meta), task, inner_key).params
        )
        warn_of_leaves_out_of_sight(self, problem, phi, meta, task, key)
        direct = differentiate(lambda m: outer_objective(problem, phi, m, task, outer_key), meta)
        slope = jax.grad(problem.outer_loss)(phi, meta, task.query, outer_key)
        cross, stats = cross_difference(problem, phi, meta, task.support, step_key, slope, self.epsilon)
        grad = jax.tree.map(lambda d, c: d - self.step_size * c, direct.grad, cross)
        loss, residual = jax.value_and_grad(problem.inner_loss)(phi, meta, task.support, step_key)
        stats = {
            "inner_loss": loss,
            **direct.stats,
            **gradient_stats(direct.value, grad),
            "inner_residual": norm(residual),
            **stats,
        }
        return Hypergradient(direct.value, grad, stats), state

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Why the estimate may be wrong, given its stats."""
        return difference_doubts(stats, self.tolerance)
