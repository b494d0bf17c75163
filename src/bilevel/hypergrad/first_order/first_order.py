"""First-order hypergradient: the inner steps are taken as the identity."""

from dataclasses import dataclass

import jax

from bilevel.hypergrad.common import differentiate, outer_objective, split_keys
from bilevel.hypergrad.requirements import require_iterative
from bilevel.hypergrad.residuals import warn_of_zero_leaves
from bilevel.inner import unroll
from bilevel.problem import Hypergradient, InnerSolver, Problem


@dataclass(frozen=True)
class FirstOrder:
    """First-order hypergradient (FOMAML): dφ_K/dφ₀ is taken as the identity.

        dF/dθ ≈ ∂θ f(φ_K, θ) + (dφ₀/dθ)ᵀ ∂φ f(φ_K, θ)

    Raises:
        TypeError: when the solver has no steps.

    Warns:
        FirstOrderWarning: once per trace, naming each leaf of `meta` that reaches the outer loss only
            through the inner loop (rates, regularizers): its gradient here is exactly zero.

    Cost: one inner gradient a step in time; memory independent of K. Biased: it drops every second
    derivative of the inner loss.

    Reference: Finn, Abbeel, Levine, 2017; Nichol, Achiam, Schulman, 2018.

    >>> import bilevel as bl, jax, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * params**2,
    ...                      outer_loss=lambda params, meta, batch, key: params**2)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=3)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> print(bl.hypergradient(problem, solver, FirstOrder(), 8.0, task, key).grad)
    2.0
    """

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with steps."""
        require_iterative(self, solver)

    def init(self, problem, solver, meta, task, key) -> tuple[()]:
        """Stateless."""
        return ()

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, tuple[()]]:
        """The first-order hypergradient of one task."""
        inner_key, outer_key = split_keys(key)
        init_key = jax.random.split(inner_key)[0]  # the one that `unroll` starts from
        last, losses = unroll(problem, solver, jax.lax.stop_gradient(meta), task, inner_key)
        last = jax.lax.stop_gradient(last)

        def objective(meta):
            start = problem.init(meta, init_key)
            # The value of φ_K, moved by θ as φ₀ is.
            params = jax.tree.map(
                lambda end, begin: end + (begin - jax.lax.stop_gradient(begin)), last.params, start
            )
            value, stats = outer_objective(problem, params, meta, task, outer_key)
            return value, {"inner_loss": losses[-1], **stats} if solver.num_steps else stats

        def direct(meta, params):
            moved = jax.tree.map(lambda a, b: a + b, problem.init(meta, init_key), params)
            return problem.outer_loss(moved, meta, task.query, outer_key)

        warn_of_zero_leaves(
            self,
            direct,
            meta,
            last.params,
            because="it reaches the outer loss only through the inner loop, whose derivative is dropped. Use "
            "bl.hypergrad.Mixed() or Unroll() to learn it",
        )
        return differentiate(objective, meta), state
