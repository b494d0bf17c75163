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

    Stats: `difference_error`, the larger of two measured figures: how far the difference with half the h is
    off this one, relative to it (three quarters of the O(ε²) error where the loss is smooth, 1 or more where
    rounding has eaten the difference), and which part of the move the precision of φ has lost.

    Cost: four gradients in θ. Error O(ε²) plus rounding of about machine epsilon / ε.
    """
    size = norm(vector)
    step = jnp.where(size == 0, 0.0, epsilon / jnp.where(size == 0, 1.0, size))

    def moved(step):
        return jax.tree.map(lambda p, v: p + step.astype(p.dtype) * v, params, vector)

    def slope(step):
        ahead, behind = (
            jax.grad(problem.inner_loss, argnums=1)(moved(s), meta, support, key) for s in (step, -step)
        )
        half = jnp.where(step == 0, 0.0, 0.5 / jnp.where(step == 0, 1.0, step))
        return jax.tree.map(lambda a, b: half.astype(a.dtype) * (a - b), ahead, behind)

    product, closer = slope(step), slope(0.5 * step)
    off = jax.tree.map(lambda a, b: a - b, product, closer)
    # A move below the last place of φ leaves a difference of exactly 0, which agrees with itself.
    lost = jax.tree.map(lambda a, p, v: (a - p) - step.astype(p.dtype) * v, moved(step), params, vector)
    error = jnp.maximum(ratio(norm(off), norm(product)), ratio(norm(lost), step * size))
    return product, {"difference_error": error}


def difference_doubts(stats: Mapping[str, float], limit: float) -> list[str]:
    """Whether the difference is still a derivative."""
    return doubt_above(
        stats,
        "difference_error",
        limit,
        "half the epsilon gives another hypergradient: raise epsilon if rounding is the cause (float32, "
        "bfloat16), lower it if the inner loss curves within it",
    )
