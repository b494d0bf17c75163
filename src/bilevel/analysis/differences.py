"""Central differences that say how far they can be trusted themselves.

A difference has an error of its own: too long a step bends, too short a step rounds, and at a kink there
are two slopes. So each slope is measured with several steps, and what they disagree on is kept with it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

STEPS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


class Slope(NamedTuple):
    """The derivative along one direction.

    Args:
        value: of the two neighbouring steps that agree best, the shorter one's.
        uncertainty: what those two disagree by, plus rounding.
        low, high: the slopes on either side, which differ at a kink.
        kink: whether they differ however short the step is.
        reliable: whether `uncertainty` is small enough to judge anything by.
    """

    value: float
    uncertainty: float
    low: float
    high: float
    kink: bool
    reliable: bool


def curve(function: Callable, at: Any, direction: Any, *rest: Any) -> jax.Array:
    """`function(at + t direction, *rest)` at t = 0, and at ±h for each of `STEPS`: `[1 + 2 len(STEPS)]`.

    Traceable; points are visited one after another, so that memory does not grow.
    """
    steps = jnp.asarray([0.0, *STEPS, *(-h for h in STEPS)], _dtype(at))

    def value(t):
        moved = jax.tree.map(lambda a, u: a + (t * u).astype(jnp.result_type(a)), at, direction)
        return function(moved, *rest)

    return jax.lax.map(value, steps)


def slope(values: np.ndarray, epsilon: float = 2.3e-16, tolerance: float = 0.02) -> Slope:
    """Read a slope off a curve.

        D(h) = (F(h) − F(−h)) / 2h

    Args:
        values: what `curve` returns.
        epsilon: of the arithmetic the curve was computed in.
        tolerance: relative uncertainty up to which a slope is reliable.

    >>> at = np.array([0.0, *STEPS, *(-h for h in STEPS)])
    >>> round(slope(np.sin(at)).value, 9), slope(np.sin(at)).kink, slope(np.abs(at)).kink
    (1.0, False, True)
    """
    middle, ahead, behind = values[0], *np.split(np.asarray(values[1:], np.float64), 2)
    steps = np.array(STEPS)
    if not np.all(np.isfinite(values)):
        return Slope(np.nan, np.inf, -np.inf, np.inf, False, False)
    forward, backward = (ahead - middle) / steps, (middle - behind) / steps
    central = (forward + backward) / 2
    rounding = 4 * epsilon * np.max(np.abs(values)) / steps[1:]
    disagreement = np.abs(np.diff(central)) + rounding
    i = int(np.argmin(disagreement))
    value, uncertainty = central[i + 1], disagreement[i]
    # Where the function is smooth the two sides close up as fast as the step shrinks.
    gaps = np.abs(forward - backward)[i : i + 2]
    size = max(abs(forward[i + 1]), abs(backward[i + 1]))
    kink = bool(gaps[1] > 0.02 * size + 10 * rounding[i] and gaps[1] > 0.5 * gaps[0])
    sides = (forward[i + 1], backward[i + 1]) if kink else (value, value)
    smallest = 1e3 * epsilon / STEPS[3] * np.max(np.abs(values)) + 1e-12
    reliable = bool(uncertainty <= max(tolerance * size, smallest))
    return Slope(float(value), float(uncertainty), float(min(sides)), float(max(sides)), kink, reliable)


def directions(
    key: jax.Array, at: Any, count: int = 6, max_elements: int = 24, max_leaves: int = 24
) -> tuple[list[str], list[Any]]:
    """Directions to look along, and what each is of: every element, or random ones.

    Up to `max_elements` elements each gets its own. Otherwise the first `count` ("") move all of `at`; after
    them each leaf gets one of its own, named by its path, up to `max_leaves`: a short leaf cannot hide
    behind a long one. Lengths follow the size of the elements.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(at)
    scales = [jnp.maximum(jnp.sqrt(jnp.mean(jnp.square(leaf))), 0.1) for _, leaf in leaves]
    zeros = [jnp.zeros_like(leaf) for _, leaf in leaves]
    names, found = [], []

    def add(name, parts):
        names.append(name)
        found.append(jax.tree.unflatten(tree, parts))

    if sum(leaf.size for _, leaf in leaves) <= max_elements:
        for i, (path, leaf) in enumerate(leaves):
            for j in range(leaf.size):
                unit = jnp.zeros(leaf.size, leaf.dtype).at[j].set(scales[i]).reshape(leaf.shape)
                add(jax.tree_util.keystr(path), [*zeros[:i], unit, *zeros[i + 1 :]])
        return names, found
    for r in range(count):
        keys = jax.random.split(jax.random.fold_in(key, r), len(leaves))
        add("", [s * jax.random.normal(k, leaf.shape, leaf.dtype)
                 for k, s, (_, leaf) in zip(keys, scales, leaves)])  # fmt: skip
    for i, (path, leaf) in enumerate(leaves[:max_leaves]):
        noise = jax.random.normal(jax.random.fold_in(key, count + i), leaf.shape, leaf.dtype)
        add(jax.tree_util.keystr(path), [*zeros[:i], scales[i] * noise, *zeros[i + 1 :]])
    return names, found


def _dtype(tree: Any):
    return jnp.result_type(*jax.tree.leaves(tree), jnp.float32)
