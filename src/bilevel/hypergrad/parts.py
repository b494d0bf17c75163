"""The floats of a state and the rest of it, such as counts of steps, which have no tangent."""

from typing import Any

import jax
import jax.numpy as jnp


def apart(tree: Any) -> tuple[Any, Any]:
    """The floats of a tree, and the rest of it; None stands where a leaf is in the other.

    >>> floats, rest = apart({"params": jnp.ones(2), "step": 3})
    >>> floats["step"], rest
    (None, {'params': None, 'step': 3})
    """
    floats = jax.tree.map(lambda leaf: leaf if is_float(leaf) else None, tree)
    return floats, jax.tree.map(lambda leaf: None if is_float(leaf) else leaf, tree)


def joined(floats: Any, rest: Any) -> Any:
    """The tree that was taken `apart`."""
    return jax.tree.map(lambda a, b: b if a is None else a, floats, rest, is_leaf=lambda leaf: leaf is None)


def is_float(leaf: Any) -> bool:
    """Whether derivatives exist for it."""
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jnp.issubdtype(dtype, jnp.floating)
