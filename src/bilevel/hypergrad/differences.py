"""The product of a mixed second derivative with a vector, by a central difference in φ."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from bilevel.hypergrad.residuals import doubt_above, norm, ratio
from bilevel.problem import Batch, Key, Meta, Params, Problem, Scalar


def cross_difference(
    problem: Problem, params: Params, meta: Meta, support: Batch, key: Key, vector: Params, epsilon: float
) -> tuple[Meta, dict[str, Scalar]]:
    """(∂θ∇φ g)ᵀ v from first derivatives.

        (∂θ g(φ + h v) − ∂θ g(φ − h v)) / 2h,   h = ε / ‖v‖

    Stats: `asymmetry`, how much the forward and the backward half of the difference disagree, relative to the
    whole. It is O(ε) where the loss is smooth, and 1 or more where rounding has eaten the difference.

    Cost: three gradients in θ. Error O(ε²) plus rounding of about machine epsilon / ε.
    """
    size = norm(vector)
    step = jnp.where(size == 0, 0.0, epsilon / jnp.where(size == 0, 1.0, size))

    def at(sign):
        moved = jax.tree.map(lambda p, v: p + (sign * step).astype(p.dtype) * v, params, vector)
        return jax.grad(problem.inner_loss, argnums=1)(moved, meta, support, key)

    ahead, here, behind = (
        at(1.0),
        jax.grad(problem.inner_loss, argnums=1)(params, meta, support, key),
        at(-1.0),
    )
    half = jnp.where(step == 0, 0.0, 0.5 / jnp.where(step == 0, 1.0, step))
    product = jax.tree.map(lambda a, b: half.astype(a.dtype) * (a - b), ahead, behind)
    bent = jax.tree.map(lambda a, h, b: a - 2 * h + b, ahead, here, behind)
    whole = jax.tree.map(lambda a, b: a - b, ahead, behind)
    return product, {"asymmetry": ratio(norm(bent), norm(whole))}


def difference_doubts(stats: Mapping[str, float], limit: float) -> list[str]:
    """Whether the difference is still a derivative."""
    return doubt_above(
        stats,
        "asymmetry",
        limit,
        "the two halves of the finite difference disagree: raise epsilon if rounding is the cause (float32, "
        "bfloat16), lower it if the inner loss curves within it",
    )
