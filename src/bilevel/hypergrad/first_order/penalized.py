"""The value-function idea that Penalty, F2SA and BOME share: pull φ by the outer loss, and compare.

ψ ≈ argmin g,   φ ≈ argmin g + f/λ,   λ (∂θ g(φ) − ∂θ g(ψ)) → −(∂θ∇φ g)ᵀ (∇²φφ g)⁻¹ ∂φ f   as λ → ∞
"""

from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp

from bilevel.hypergrad.common import differentiate, gradient_stats, outer_objective
from bilevel.hypergrad.residuals import cancellation, doubt_above, norm, ratio
from bilevel.problem import Hypergradient, Key, Meta, Params, Problem, Scalar, Task


def pulled(problem: Problem, multiplier: Scalar, outer_key: Key) -> Problem:
    """The problem whose inner loss is g + f/λ; its support is (support, query): see `pulled_task`."""

    def inner_loss(params, meta, batch, key):
        support, query = batch
        inner = problem.inner_loss(params, meta, support, key)
        outer = problem.outer_loss(params, meta, query, outer_key)
        return inner + outer / multiplier.astype(outer.dtype)

    return replace(problem, inner_loss=inner_loss)


def pulled_task(task: Task) -> Task:
    """What `pulled(problem)` reads."""
    return Task(support=(task.support, task.query), query=task.query)


def penalty_hypergradient(
    problem: Problem,
    psi: Params,
    phi: Params,
    multiplier: Scalar,
    meta: Meta,
    task: Task,
    keys: tuple[Key, Key],
) -> tuple[Hypergradient, tuple[Params, Params]]:
    """∂θ f(φ) + λ (∂θ g(φ) − ∂θ g(ψ)); the value is f(ψ). `keys` are those of g and of f.

    Beside it the two residual vectors, ∇φ g(ψ) and λ (∇φ g(φ) − ∇φ g(ψ)) + ∂φ f(φ).

    Stats: `multiplier`; `inner_residual` ‖∇φ g(ψ)‖; `linear_residual`, how far φ − ψ is from solving
    λ ∇²φφ g (φ − ψ) = −∂φ f, ‖λ (∇φ g(φ) − ∇φ g(ψ)) + ∂φ f(φ)‖ / ‖∂φ f(φ)‖; `rounding`, the relative error
    that cancellation in φ − ψ and in the difference of the gradients must be expected to leave.
    """
    inner_key, outer_key = keys
    value, stats = outer_objective(problem, psi, meta, task, outer_key)
    direct = differentiate(lambda m: (problem.outer_loss(phi, m, task.query, outer_key), {}), meta)
    slope = jax.grad(problem.outer_loss)(phi, meta, task.query, outer_key)

    def gradients(params):
        return jax.value_and_grad(problem.inner_loss, argnums=(0, 1))(params, meta, task.support, inner_key)

    (_, (at_phi, theta_phi)), (loss, (at_psi, theta_psi)) = gradients(phi), gradients(psi)

    def scaled(a, b):
        return jax.tree.map(lambda x, y: multiplier.astype(x.dtype) * (x - y), a, b)

    pull = scaled(theta_phi, theta_psi)
    grad = jax.tree.map(lambda d, p: d + p, direct.grad, pull)
    mismatch = jax.tree.map(lambda h, s: h + s, scaled(at_phi, at_psi), slope)
    rounding = jnp.maximum(cancellation(phi, psi), cancellation(theta_phi, theta_psi))
    stats = {
        "inner_loss": loss,
        **stats,
        **gradient_stats(value, grad),
        "multiplier": multiplier,
        "inner_residual": norm(at_psi),
        "linear_residual": ratio(norm(mismatch), norm(slope)),
        # What the difference contributes is what its rounding error is a part of.
        "rounding": rounding * ratio(norm(pull), norm(grad)),
    }
    return Hypergradient(value, grad, stats), (at_psi, mismatch)


def penalty_doubts(
    stats: Mapping[str, float], *, tolerance: float, rounding: float, settle: str
) -> list[str]:
    """Why a penalty hypergradient may be wrong. `settle` says how its two solves get closer."""
    return [
        *doubt_above(
            stats,
            "inner_residual_share",
            tolerance,
            f"the inner parameters have not settled: {settle}",
        ),
        *doubt_above(
            stats,
            "linear_residual",
            tolerance,
            f"the two inner solutions are not the distance apart that the multiplier calls for: {settle}",
        ),
        *doubt_above(
            stats,
            "rounding",
            rounding,
            "the two inner solutions are too close for this precision, and their difference is rounding "
            "error: lower the multiplier, or use float64",
        ),
    ]
