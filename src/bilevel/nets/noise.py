"""Noise for training: dropout of single values, and of whole patches of a picture (DropBlock)."""

from functools import reduce

import jax
import jax.numpy as jnp

from bilevel.problem import Key


def dropout(x: jax.Array, rate: float, key: Key) -> jax.Array:
    """Each value is 0 with probability `rate`, else divided by 1 − rate.

    Reference: Srivastava et al., 2014.

    >>> sorted(set(dropout(jnp.ones(100), 0.5, jax.random.key(0)).tolist()))
    [0.0, 2.0]
    """
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def drop_block(x: jax.Array, rate: float, size: int, key: Key) -> jax.Array:
    """Whole squares of each channel's picture are 0, so that a share of about `rate` of it is.

        y = x ⊙ m · |m| / Σ m,   m = 0 within a square around each of the centres drawn with probability
        rate / size² · h w / ((h − size + 1) (w − size + 1))

    Args:
        x: `[n, h, w, c]`; a square larger than the picture is cut to it.
        size: side of the squares in pixels.

    Reference: Ghiasi, Lin, Le, 2018.

    >>> drop_block(jnp.ones((2, 8, 8, 3)), 0.1, 3, jax.random.key(0)).shape
    (2, 8, 8, 3)
    """
    height, width = x.shape[1:3]
    size = min(size, height, width)
    places = (height - size + 1) * (width - size + 1)
    chance = min(rate / size**2 * height * width / places, 1.0)
    corners = jax.random.bernoulli(
        key, chance, (x.shape[0], height - size + 1, width - size + 1, x.shape[3])
    ).astype(x.dtype)
    grown = jnp.pad(corners, ((0, 0), (size - 1, size - 1), (size - 1, size - 1), (0, 0)))
    # A pixel is dropped when any of the squares that could cover it was drawn.
    rows = reduce(jnp.add, [grown[:, i : i + height] for i in range(size)])
    hits = reduce(jnp.add, [rows[:, :, j : j + width] for j in range(size)])
    kept = (hits == 0).astype(x.dtype)
    return x * kept * (kept.size / jnp.maximum(kept.sum(), 1))


def require_rate(owner: str, **rates: float) -> None:
    """Refuse what is no share of values to drop.

    >>> require_rate("mlp", dropout=1.5)
    Traceback (most recent call last):
    ValueError: mlp.dropout must be at least 0 and below 1, got 1.5
    """
    for name, rate in rates.items():
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise ValueError(f"{owner}.{name} must be at least 0 and below 1, got {rate!r}")
