"""Reptile: the initialization moves towards where the inner loop ended."""

from dataclasses import dataclass

import jax

from bilevel.hypergrad.common import differentiate, outer_objective, split_keys
from bilevel.hypergrad.requirements import require_stepping
from bilevel.hypergrad.residuals import inner_product, warn_of_zero_leaves
from bilevel.inner import unroll
from bilevel.problem import Hypergradient, InnerSolver, Problem


@dataclass(frozen=True)
class Reptile:
    """The way from φ_K back to φ₀, as if it were a gradient. It never reads the query.

        grad = (dφ₀/dθ)ᵀ (φ₀ − φ_K)

    so that plain gradient descent of rate ε on θ = φ₀ is θ ← θ + ε (φ_K − θ), averaged over the tasks.
    `value` is the outer loss at φ_K, to be watched: its gradient is something else.

    Raises:
        TypeError, ValueError: when the solver has no steps, or none to take.

    Warns:
        FirstOrderWarning: naming each leaf of meta that does not reach φ₀: its gradient is exactly zero.

    Cost: one inner gradient a step in time; memory independent of K and of dim θ. As an estimate of dF/dθ it
    is biased: the sum of the inner gradients, of the order of the inner rate. The published protocol is Adam
    with β₁ = 0 inside and an outer rate that decays to 0.

    Reference: Nichol, Achiam, Schulman, On first-order meta-learning algorithms, 2018.

    >>> import bilevel as bl, jax, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * params**2,
    ...                      outer_loss=lambda params, meta, batch, key: params**2)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=3)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> print(bl.hypergradient(problem, solver, Reptile(), 8.0, task, key).grad)  # from 8 to 1
    7.0
    """

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with at least one step."""
        require_stepping(self, solver)

    def init(self, problem, solver, meta, task, key) -> tuple[()]:
        """Stateless."""
        return ()

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, tuple[()]]:
        """The direction of one task."""
        inner_key, outer_key = split_keys(key)
        init_key = jax.random.split(inner_key)[0]  # the one that `unroll` starts from
        fixed = jax.lax.stop_gradient(meta)
        last, losses = unroll(problem, solver, fixed, task, inner_key)
        last = jax.lax.stop_gradient(last.params)
        value, stats = outer_objective(problem, last, fixed, task, outer_key)
        stats = {"inner_loss": losses[-1], **stats}

        def objective(meta):
            start = problem.init(meta, init_key)
            way = jax.tree.map(lambda a, b: jax.lax.stop_gradient(a) - b, start, last)
            product = inner_product(way, start)
            # The value of the outer loss, with the gradient of the product.
            return value + (product - jax.lax.stop_gradient(product)).astype(value.dtype), stats

        warn_of_zero_leaves(
            self,
            problem.init,
            meta,
            init_key,
            because="Reptile moves the initialization only, and this does not reach it. Use "
            "bl.hypergrad.Mixed() or Unroll() to learn it",
        )
        return differentiate(objective, meta), state
