"""SAMA: one step of the inner optimizer, adaptive or not, taken as the whole solution."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax

from bilevel.hypergrad.common import differentiate, gradient_stats, outer_objective, split_keys
from bilevel.hypergrad.first_order.differences import cross_difference, difference_doubts
from bilevel.hypergrad.requirements import require_positive, require_stepping
from bilevel.hypergrad.residuals import norm
from bilevel.hypergrad.single_loop.warm_start import given, warn_of_leaves_out_of_sight
from bilevel.inner import unroll
from bilevel.problem import Hypergradient, InnerSolver, Problem


@dataclass(frozen=True)
class Sama:
    """The hypergradient through one step of the solver's own optimizer, from first derivatives.

        φ_{K+1} = φ_K + u(∇φ g),   v = −(∂u/∂∇g)ᵀ ∂φ f,
        grad = ∂θ f − (∂θ g(φ + h v) − ∂θ g(φ − h v)) / 2h,   h = ε / ‖v‖

    u is the update that the optimizer would make next, in the state that K steps left it in; its Jacobian is
    taken by reverse mode, so that any optimizer of `bl.inner.Gradient` will do: the elementwise factors of
    Adam, a plain rate for SGD (then this is `FiniteDifference(rate)`).

    Args:
        epsilon: ε, how far φ is moved in all (2-norm over all leaves).
        tolerance: the difference_error that `doubts` speaks of.

    Raises:
        TypeError, ValueError: when the solver has no steps, or none to take; when a field is not positive.

    Warns:
        FirstOrderWarning: naming each leaf of meta that enters neither loss: its gradient is exactly zero.

    Stats: `inner_residual` ‖∇φ g(φ_K)‖; `difference_error`, the relative error of the difference as measured.

    Cost: K inner gradients, one optimizer update and seven more gradients; memory independent of K and of dim
    θ. Parameters keep their types: in bfloat16 ε must be large enough for φ to move at all, which
    `difference_error` tells. Biased: the error of the difference is O(ε²), that of one step in place of all
    is of order one.

    Reference: Choe, Mehta, Ahn, Neiswanger, Xie, Strubell, Xing, Making scalable meta learning practical,
    2023.

    >>> import bilevel as bl, jax, optax
    >>> problem = bl.Problem(init=lambda meta, key: 0.0 * meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * (params - meta) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: 0.5 * params**2)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=20)
    >>> h = bl.hypergradient(problem, solver, Sama(), 2.0, bl.Task(None, None), jax.random.key(0))
    >>> print(round(float(h.grad), 2))  # rate × ∂φ f = 0.5 × 2
    1.0
    """

    epsilon: float = 0.01
    tolerance: float = 0.02

    def __post_init__(self):
        require_positive(self, epsilon=self.epsilon, tolerance=self.tolerance)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with at least one step."""
        require_stepping(self, solver)

    def init(self, problem, solver, meta, task, key) -> tuple[()]:
        """Stateless."""
        return ()

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, tuple[()]]:
        """The hypergradient of one task."""
        inner_key, outer_key = split_keys(key)
        step_key = jax.random.split(inner_key)[1]
        fixed = jax.lax.stop_gradient(meta)
        last = jax.lax.stop_gradient(unroll(problem, solver, fixed, task, inner_key)[0])
        phi = last.params
        warn_of_leaves_out_of_sight(self, problem, phi, meta, task, key)
        direct = differentiate(lambda m: outer_objective(problem, phi, m, task, outer_key), meta)
        slope = jax.grad(problem.outer_loss)(phi, meta, task.query, outer_key)
        loss, gradient = jax.value_and_grad(problem.inner_loss)(phi, fixed, task.support, step_key)

        def next_params(gradient):
            return solver.step(problem, fixed, task, last, step_key, given(loss, gradient))[0].params

        (vector,) = jax.vjp(next_params, gradient)[1](slope)
        vector = jax.tree.map(lambda v: -v, vector)
        cross, stats = cross_difference(problem, phi, meta, task.support, step_key, vector, self.epsilon)
        grad = jax.tree.map(lambda d, c: d - c, direct.grad, cross)
        stats = {
            "inner_loss": loss,
            **direct.stats,
            **gradient_stats(direct.value, grad),
            "inner_residual": norm(gradient),
            **stats,
        }
        return Hypergradient(direct.value, grad, stats), state

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Why the estimate may be wrong, given its stats."""
        return difference_doubts(stats, self.tolerance)
