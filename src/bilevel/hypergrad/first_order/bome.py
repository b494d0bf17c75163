"""BOME: the outer loss descends while a dynamic barrier lets the inner loss fall."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
import jax.numpy as jnp

from bilevel.hypergrad.common import differentiate, gradient_stats, outer_objective, split_keys
from bilevel.hypergrad.requirements import require_positive
from bilevel.hypergrad.residuals import doubt_above, inner_product, norm, ratio
from bilevel.hypergrad.single_loop.warm_start import warn_of_leaves_out_of_sight
from bilevel.problem import Hypergradient, InnerSolver, Key, Meta, Params, Problem, Task


@dataclass(frozen=True)
class Bome:
    """A joint descent direction of (φ, θ) for f under the constraint that g(φ) is as low as it gets.

        q(φ, θ) = g(φ, θ) − g(φ_K, θ),   φ_K = solver from φ, held fixed
        λ = max(0, (η ‖∇q‖² − ⟨∇f, ∇q⟩) / ‖∇q‖²),   ∇ over (φ, θ)
        grad = ∂θ f + λ ∂θ q,   φ ← φ − rate (∂φ f + λ ∂φ q)

    The state owns φ; the outer optimizer moves θ along `grad`, as it does for every estimator.

    Args:
        rate: of the step in φ.
        barrier: η, how firmly the constraint is pursued.
        tolerance: the residual that `doubts` speaks of.

    Raises:
        ValueError: when a field is not positive.

    Warns:
        FirstOrderWarning: naming each leaf of meta that enters neither loss: its gradient is exactly zero.

    Stats: `multiplier` λ; `constraint` q; `inner_residual` ‖∇φ g(φ)‖; `linear_residual`, how far φ is from
    stationary, ‖∂φ f + λ ∂φ q‖ / ‖∂φ f‖. `value` and metrics are at the φ that the call began with.

    Cost: one inner solve and five gradients; memory independent of K and of dim θ. First derivatives only.
    Biased: at a fixed θ with exact inner solutions it settles at the penalty hypergradient of
    λ = η (‖∂φ f‖² + ‖c‖²) / ⟨c, dF/dθ⟩, c = dF/dθ − ∂θ f, to first order in 1/λ; where there is no direct
    part that is η (1 + ‖∂φ f‖² / ‖dF/dθ‖²), so the bias vanishes where dF/dθ does. φ is left swinging by
    about `rate`.

    Reference: Liu, Ye, Wright, Stone, Liu, BOME! Bilevel optimization made easy, 2022.

    >>> import bilevel as bl, jax, jax.numpy as jnp, optax
    >>> problem = bl.Problem(init=lambda meta, key: jnp.float32(0),
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * (params - meta) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: 0.5 * (params - 1) ** 2)
    >>> solver, task = bl.inner.Gradient(optax.sgd(0.5), num_steps=20), bl.Task(None, None)
    >>> meta, key, bome = jnp.float32(3), jax.random.key(0), Bome(rate=0.05)
    >>> state = bome.init(problem, solver, meta, task, key)
    >>> step = jax.jit(lambda meta, state: bome.estimate(problem, solver, meta, task, state, key))
    >>> for _ in range(400):
    ...     h, state = step(meta, state)
    ...     meta = meta - 0.05 * h.grad
    >>> print(round(float(meta), 2))
    1.0
    """

    rate: float
    barrier: float = 0.5
    tolerance: float = 0.1
    settles: ClassVar[bool] = True  # right once its own inner parameters have settled
    rests: ClassVar[bool] = True  # where the constraint holds, a direction of exactly zero is its answer

    def __post_init__(self):
        require_positive(self, rate=self.rate, barrier=self.barrier, tolerance=self.tolerance)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Any solver will do."""

    def init(self, problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key) -> Params:
        """φ₀."""
        return problem.init(meta, jax.random.split(split_keys(key)[0])[0])

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, Params]:
        """The part of the direction in θ, and φ after its own step."""
        inner_key, outer_key = split_keys(key)
        step_key = jax.random.split(inner_key)[1]
        fixed, phi = jax.lax.stop_gradient((meta, state))
        warn_of_leaves_out_of_sight(self, problem, phi, meta, task, key)
        direct = differentiate(lambda m: outer_objective(problem, phi, m, task, outer_key), meta)
        slope = jax.grad(problem.outer_loss)(phi, meta, task.query, outer_key)

        from_phi = replace(problem, init=lambda meta, key: phi)
        settled = jax.lax.stop_gradient(solver.solve(from_phi, fixed, task, inner_key).params)
        inner = jax.value_and_grad(problem.inner_loss, argnums=(0, 1))
        loss, (phi_q, theta_phi) = inner(phi, meta, task.support, step_key)
        lowest, (_, theta_settled) = inner(settled, meta, task.support, step_key)
        theta_q = jax.tree.map(lambda a, b: a - b, theta_phi, theta_settled)

        squared = inner_product(phi_q, phi_q) + inner_product(theta_q, theta_q)
        along = inner_product(slope, phi_q) + inner_product(direct.grad, theta_q)
        multiplier = jnp.maximum(0.0, self.barrier - along / jnp.where(squared == 0, 1.0, squared))

        def descent(a, b):
            return jax.tree.map(lambda x, y: x + multiplier.astype(y.dtype) * y, a, b)

        grad, phi_direction = descent(direct.grad, theta_q), descent(slope, phi_q)
        stats = {
            "inner_loss": loss,
            **direct.stats,
            **gradient_stats(direct.value, grad),
            "multiplier": multiplier,
            "constraint": loss - lowest,
            "inner_residual": norm(phi_q),
            "linear_residual": ratio(norm(phi_direction), norm(slope)),
        }
        state = jax.tree.map(lambda p, d: p - self.rate * d, state, phi_direction)
        return Hypergradient(direct.value, grad, stats), state

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Why the estimate may be wrong, given its stats."""
        said = doubt_above(
            stats,
            "linear_residual",
            self.tolerance,
            "φ has not settled: carry the state through more calls, or lower rate, which φ swings by",
        )
        if not stats.get("constraint", 0.0) >= -1e-6 * abs(stats.get("inner_loss", 0.0)):
            said.append(
                f"the inner steps do not lower the inner loss: constraint is {stats['constraint']:.3g}, and "
                "must not be negative; lower the rate of the solver"
            )
        return said
