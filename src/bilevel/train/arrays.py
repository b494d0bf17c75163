"""Pass a task sampler's arrays to a compiled call as arguments, not as constants inside the program."""

from collections.abc import Callable

import jax
import numpy as np


def split_arrays(sample: Callable) -> tuple[list[jax.Array], Callable[[list], Callable]]:
    """The arrays in a sampler, and the function that puts them (or tracers for them) back.

    A sampler that is a registered pytree (`FewShot`) keeps its data set in its leaves; a plain function is
    a leaf itself and has none.

    >>> arrays, merge = split_arrays(lambda key: key)
    >>> arrays, merge(arrays)(3)
    ([], 3)
    """
    leaves, tree = jax.tree.flatten(sample)
    is_array = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]

    def merge(arrays):
        rest = iter(arrays)
        filled = [next(rest) if a else leaf for leaf, a in zip(leaves, is_array, strict=True)]
        return jax.tree.unflatten(tree, filled)

    return [leaf for leaf, a in zip(leaves, is_array, strict=True) if a], merge
