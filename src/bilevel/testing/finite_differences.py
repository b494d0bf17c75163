"""Central differences in float64: the reference that knows nothing of automatic differentiation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def gradient_by_differences(function: Callable, at: Any, step: float = 1e-5) -> tuple[float, Any]:
    """Value and gradient of a scalar function of a pytree, one element at a time.

        ∂ᵢF ≈ (F(x + h eᵢ) − F(x − h eᵢ)) / 2h

    Args:
        function: `function(tree) -> scalar`; it is compiled and run in float64, two calls an element.
        at: the point, any tree of floats.
        step: h. The error is about h² |F'''| / 6 + 1e-16 |F| / h.

    Returns:
        A float, and a tree like `at` of NumPy arrays.

    >>> value, gradient = gradient_by_differences(lambda x: x["a"] * x["b"] ** 2, {"a": 2.0, "b": 3.0})
    >>> value, round(float(gradient["a"]), 6), round(float(gradient["b"]), 6)
    (18.0, 9.0, 12.0)
    """
    with jax.enable_x64(True):
        point, unravel = ravel_pytree(_float64(at))
        flat = jax.jit(lambda x: function(unravel(x)))
        value = flat(point)
        _require_scalar(value)
        slopes = [
            (flat(point.at[i].add(step)) - flat(point.at[i].add(-step))) / (2 * step)
            for i in range(point.size)
        ]
        gradient = unravel(jnp.stack(slopes))
        return float(value), jax.tree.map(np.asarray, gradient)


def assert_derivative(
    function: Callable,
    gradient: Any,
    at: Any,
    *,
    num_directions: int = 3,
    step: float = 1e-5,
    tolerance: float = 1e-6,
) -> None:
    """Hold a gradient against central differences along random directions.

        ⟨∇F, u⟩ ≈ (F(x + h u) − F(x − h u)) / 2h

    Args:
        function: `function(tree) -> scalar`, called in float64 twice a direction; compile it yourself.
        gradient: what is claimed, a tree like `at`.
        at: the point, any tree of floats.
        num_directions: how many u, each with elements uniform in [−1, 1].
        step: h.
        tolerance: relative to the sum of the magnitudes of the products in ⟨∇F, u⟩.

    Raises:
        AssertionError: naming the direction, what was claimed and what was measured.

    >>> assert_derivative(lambda x: x**3, gradient=12.0, at=2.0)
    >>> assert_derivative(lambda x: x**3, gradient=13.0, at=2.0)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: along direction 0 the gradient claims a slope of ..., central differences measure ...
    """
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        point, unravel = ravel_pytree(_float64(at))
        claimed_gradient = np.asarray(ravel_pytree(_float64(gradient))[0])
        if claimed_gradient.shape != point.shape:
            raise AssertionError(
                f"the gradient must have the {point.size} elements of the point it is taken at, "
                f"got {claimed_gradient.size}"
            )

        def flat(x):
            value = function(unravel(x))
            _require_scalar(value)
            return float(value)

        for i in range(num_directions):
            direction = rng.uniform(-1, 1, size=point.size)
            ahead, behind = flat(point + step * direction), flat(point - step * direction)
            measured = (ahead - behind) / (2 * step)
            claimed = float(claimed_gradient @ direction)
            scale = float(np.abs(claimed_gradient * direction).sum())
            if not abs(claimed - measured) <= tolerance * max(scale, abs(measured)) + 1e-9:
                raise AssertionError(
                    f"along direction {i} the gradient claims a slope of {claimed:.10g}, central "
                    f"differences measure {measured:.10g} (tolerance {tolerance:g})"
                )


def _float64(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def _require_scalar(value):
    if jnp.shape(value) != ():
        raise ValueError(f"the function must return a scalar, got shape {jnp.shape(value)}")
