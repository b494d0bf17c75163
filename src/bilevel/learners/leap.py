"""Leap: the initialization moves so that the ways of training on tasks become shorter."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel.hypergrad.common import differentiate, outer_objective, split_keys
from bilevel.hypergrad.requirements import require_stepping
from bilevel.hypergrad.residuals import inner_product, norm, warn_of_zero_leaves
from bilevel.inner.gradient import run_steps
from bilevel.problem import Hypergradient, InnerSolver, Problem


@dataclass(frozen=True)
class Leap:
    """The slope of the length of the way down, as if it were a gradient. It never reads the query.

        length = Σₖ |(φₖ₊₁ − φₖ, fₖ₊₁ − fₖ)|,   fₖ = inner_loss(φₖ)
        grad = (dφ₀/dθ)ᵀ Σₖ (φₖ − φₖ₊₁ + |fₖ₊₁ − fₖ| ∇fₖ) / |(φₖ₊₁ − φₖ, fₖ₊₁ − fₖ)|

    Each φₖ is pulled to where φₖ₊₁ was, and dφₖ/dφ₀ is taken as the identity. The absolute value is the
    paper's stabilizer: a step that raised the loss is not to be repeated. `value` is the outer loss at φ_K,
    to be watched: its gradient is something else.

    Raises:
        TypeError, ValueError: when the solver has no steps, or none to take.

    Warns:
        FirstOrderWarning: naming each leaf of meta that does not reach φ₀: its gradient is exactly zero.

    Cost: two inner gradients a step in time; memory O(K dim φ). Biased as an estimate of dF/dθ, which it is
    not meant to be.

    Reference: Flennerhag, Moreno, Lawrence, Damianou, Transferring knowledge across learning processes, 2019.

    >>> import bilevel as bl, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.75 * params,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(1.0), num_steps=2)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> h = bl.hypergradient(problem, solver, Leap(), 8.0, task, key)
    >>> round(float(h.grad), 4)  # twice (0.75 + 0.75³) / 0.9375
    2.5
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
        init_key, step_key = jax.random.split(inner_key)  # as `unroll` splits it
        fixed = jax.lax.stop_gradient(meta)
        first = solver.init(problem, fixed, task, init_key)

        def loss_at(params, step):
            return problem.inner_loss(params, fixed, task.support, jax.random.fold_in(step_key, step))

        last, after = run_steps(
            problem, solver, fixed, task, first, step_key, solver.num_steps, each=lambda params: params
        )
        points = jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b]), first.params, after)
        losses, slopes = jax.lax.map(
            lambda at: jax.value_and_grad(loss_at)(*at), (points, jnp.arange(solver.num_steps + 1))
        )

        def pull(k):
            step = jax.tree.map(lambda p: p[k + 1] - p[k], points)
            fall = jnp.abs(losses[k + 1] - losses[k])
            length = jnp.sqrt(norm(step) ** 2 + fall**2)
            scale = jnp.where(
                length > 0, 1 / jnp.where(length > 0, length, 1), 0
            )  # a minimum has no direction
            return jax.tree.map(lambda d, g: scale * (fall * g[k] - d), step, slopes)

        pulls = jax.tree.map(lambda p: p.sum(0), jax.vmap(pull)(jnp.arange(solver.num_steps)))
        pulls = jax.lax.stop_gradient(pulls)
        value, stats = outer_objective(problem, last.params, fixed, task, outer_key)
        stats = {"inner_loss": losses[-2], **stats}

        def objective(meta):
            product = inner_product(pulls, problem.init(meta, init_key))
            # The value of the outer loss, with the gradient of the product.
            return value + (product - jax.lax.stop_gradient(product)).astype(value.dtype), stats

        warn_of_zero_leaves(
            self,
            problem.init,
            meta,
            init_key,
            because="Leap moves the initialization only, and this does not reach it. Use "
            "bl.hypergrad.Mixed() or Unroll() to learn it",
        )
        return differentiate(objective, meta), state
