"""3x3 convolution and 2x2 pooling as copies, products and selections.

XLA's own convolution is slow on a CPU when each task has its own weights, and its second derivatives
are slower still. Here a convolution is a copy of the 3x3 neighbourhoods (`patches`) and one matrix
product, whose derivatives of any order are again copies and matrix products. Pooling selects: the
derivative of a selection is a selection too.
"""

import jax
import jax.numpy as jnp

KERNEL = 3


def patches(x: jax.Array, stride: int = 1) -> jax.Array:
    """3x3 neighbourhoods with a border of one zero: `[n, h, w, c] -> [n, ⌈h/s⌉, ⌈w/s⌉, 9c]`.

    >>> patches(jnp.ones((2, 6, 5, 3)), stride=2).shape
    (2, 3, 3, 27)
    """
    height, width, channels = x.shape[1:]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [
        x[:, i : i + height : stride, j : j + width : stride, :] for i in range(KERNEL) for j in range(KERNEL)
    ]
    # The same memory as a concatenation of channels, written more than twice as fast on a CPU.
    stacked = jnp.stack(taps, axis=3)
    return stacked.reshape(*stacked.shape[:3], KERNEL**2 * channels)


def quarter_patches(x: jax.Array) -> jax.Array:
    """The neighbourhoods of `patches(x)` by their place in each 2x2 window: `[4, n, h/2, w/2, 9c]`.

    With the four places in front, pooling compares whole arrays. Height and width must be even.

    >>> quarter_patches(jnp.ones((2, 6, 4, 3))).shape
    (4, 2, 3, 2, 27)
    """
    height, width, channels = x.shape[1:]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    cuts = [[x[:, i : i + height - 1 : 2, j : j + width - 1 : 2, :] for j in range(4)] for i in range(4)]
    quarters = [
        jnp.stack([cuts[a + i][b + j] for i in range(KERNEL) for j in range(KERNEL)], axis=3)
        for a in range(2)
        for b in range(2)
    ]
    stacked = jnp.stack(quarters)
    return stacked.reshape(*stacked.shape[:4], KERNEL**2 * channels)


def largest_of_quarters(y: jax.Array) -> jax.Array:
    """The largest of four arrays: `[4, ...] -> [...]`; of equal ones the first counts."""
    a, b, c, d = (jax.lax.index_in_dim(y, i, keepdims=False) for i in range(4))
    return _larger(_larger(a, b), _larger(c, d))


def max_pool(y: jax.Array) -> jax.Array:
    """2x2 max pooling; an odd last row or column is dropped: `[n, h, w, c] -> [n, h//2, w//2, c]`.

    >>> print(max_pool(jnp.arange(9.0).reshape(1, 3, 3, 1)).ravel())
    [4.]
    """
    n, height, width, channels = y.shape
    y = y[:, : height // 2 * 2, : width // 2 * 2]
    y = y.reshape(n, height // 2, 2, width // 2, 2 * channels)
    y = _larger(y[:, :, 0], y[:, :, 1])
    return _larger(y[..., :channels], y[..., channels:])


def product(x: jax.Array, w: jax.Array, compute_dtype: str = "float32") -> jax.Array:
    """`x [..., k], w [filters, k] -> x wᵀ`; with this layout no derivative transposes the large factor."""
    side = 1
    if x.shape[-1] < w.shape[0]:
        # Where x is the narrow side, as in a first block, the gradient of w has too few columns to be fast.
        # Behind a barrier XLA computes it the other way about, [k, filters]: a quarter of the time.
        w, side = jax.lax.optimization_barrier(w.T), 0
    dims = (((x.ndim - 1,), (side,)), ((), ()))
    if compute_dtype == "float32":
        return jax.lax.dot_general(x, w, dims)
    x, w, result = x.astype(compute_dtype), w.astype(compute_dtype), x.dtype
    return jax.lax.dot_general(x, w, dims, preferred_element_type=result)


def _larger(a: jax.Array, b: jax.Array) -> jax.Array:
    # Not jnp.max: its derivative asks which elements equal the maximum. In a compiled conv4 on a CPU that
    # slope was off by a tenth in float64, where this one agrees with the difference quotient.
    return jnp.where(a >= b, a, b)
