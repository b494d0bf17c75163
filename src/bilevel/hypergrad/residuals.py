"""Norms and ratios that say how far an estimate is to be trusted, and the sentences made of them."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bilevel.dependence import unused_leaves
from bilevel.hypergrad.doubts import FirstOrderWarning
from bilevel.hypergrad.requirements import name_of
from bilevel.problem import Meta, Scalar

# What an estimator that never looks at the way to the solution says of the leaves it cannot see.
OUT_OF_SIGHT = (
    "it enters neither inner_loss nor outer_loss, only the way to the inner solution (init, optimizer), "
    "which this estimator does not differentiate. Use bl.hypergrad.Mixed() or Unroll() to learn it"
)


def norm(tree: Any) -> Scalar:
    """The 2-norm over all leaves, accumulated in float32 or wider whatever their type.

    >>> print(norm({"a": jnp.array([3.0]), "b": jnp.bfloat16(4.0)}))
    5.0
    """
    return jnp.sqrt(inner_product(tree, tree))


def inner_product(a: Any, b: Any) -> Scalar:
    """Σ aᵢ bᵢ over all leaves, accumulated in float32 or wider.

    >>> print(inner_product([1.0, 2.0], [3.0, 4.0]))
    11.0
    """
    wide = [
        jnp.vdot(_widen(x), _widen(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    ]
    return sum(wide, jnp.float32(0))


def _widen(x):
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def ratio(a: Scalar, b: Scalar) -> Scalar:
    """a / b, and 0 where both are 0: nothing of nothing is missing.

    >>> print(ratio(jnp.float32(0), jnp.float32(0)), ratio(jnp.float32(1), jnp.float32(0)))
    0.0 inf
    """
    none = b == 0
    return jnp.where(none, jnp.where(a == 0, 0.0, jnp.inf), a / jnp.where(none, 1.0, b))


def cancellation(a: Any, b: Any) -> Scalar:
    """The relative rounding error of a − b when each is known to one unit in its last place.

        ε (‖a‖ + ‖b‖) / ‖a − b‖,   ε the machine epsilon of the coarsest leaf

    >>> print(cancellation(jnp.float32(1.0), jnp.float32(1.0 + 2**-20)))
    0.25000012
    """
    difference = jax.tree.map(lambda x, y: x - y, a, b)
    unit = max((float(jnp.finfo(jnp.result_type(x)).eps) for x in jax.tree.leaves(a)), default=0.0)
    return ratio(unit * (norm(a) + norm(b)), norm(difference))


def warn_of_zero_leaves(
    owner: object,
    function: Callable,
    meta: Meta,
    *rest: Any,
    because: str = OUT_OF_SIGHT,
    stacklevel: int = 4,
) -> None:
    """Name each leaf of meta that `function(meta, *rest)` cannot depend on, so that it gets exactly zero.

    Warns:
        FirstOrderWarning: at trace time.
    """
    if unused := unused_leaves(function, meta, *rest):
        names = ", ".join(f"meta{name}" for name in unused)
        warnings.warn(
            f"{name_of(owner)} gives {names} a hypergradient of exactly zero: {because}",
            FirstOrderWarning,
            stacklevel=stacklevel,
        )


def doubt_above(stats: Mapping[str, float], name: str, limit: float, sentence: str) -> list[str]:
    """`sentence`, with the figure and its limit, when `stats[name]` is above it or is not a number.

    >>> doubt_above({"linear_residual": 0.5}, "linear_residual", 0.1, "q is not solved for")
    ['q is not solved for: linear_residual is 0.5, above 0.1']
    >>> doubt_above({"linear_residual": 0.05}, "linear_residual", 0.1, "q is not solved for")
    []
    """
    value = stats.get(name)
    if value is None or value <= limit:
        return []
    return [f"{sentence}: {name} is {value:.3g}, above {limit:.3g}"]
