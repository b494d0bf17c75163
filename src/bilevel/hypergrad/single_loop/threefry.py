"""Random words in one pass, for loops so short that the generator is most of their time."""

import math

import jax
import jax.numpy as jnp

from bilevel.problem import Key

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def random_words(key: Key, stream: int, shape: tuple[int, ...]) -> jax.Array:
    """`jax.random.bits(jax.random.fold_in(key, stream), shape)`, uint32, to the bit.

    On a CPU JAX compiles the 20 rounds of Threefry into a loop, which costs more than a step on 16 rows.
    Written out they are one pass over the words.

    Args:
        key: of any generator; one that is not Threefry is asked as ever.
        stream: below 2³².
        shape: of the words, fewer than 2³² in all.

    Reference: Salmon, Moraes, Dror, Shaw, Parallel random numbers: as easy as 1, 2, 3, 2011.

    >>> key = jax.random.key(3)
    >>> bool((random_words(key, 7, (2, 3)) == jax.random.bits(jax.random.fold_in(key, 7), (2, 3))).all())
    True
    """
    if not (jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and jax.random.key_impl(key) == "threefry2x32"):
        return jax.random.bits(jax.random.fold_in(key, stream), shape, jnp.uint32)
    words = jax.random.key_data(key)
    count = math.prod(shape)
    folded = _block(words[0], words[1], jnp.uint32(0), jnp.uint32(stream))
    high, low = _block(*folded, jnp.zeros(count, jnp.uint32), jnp.arange(count, dtype=jnp.uint32))
    return (high ^ low).reshape(shape)


def _block(key0, key1, x0, x1):
    """Threefry-2x32 with 20 rounds of the counter (x0, x1)."""
    keys = key0, key1, key0 ^ key1 ^ jnp.uint32(_PARITY)
    x0, x1 = x0 + keys[0], x1 + keys[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << jnp.uint32(rotation)) | (x1 >> jnp.uint32(32 - rotation)))
        x0 = x0 + keys[(i + 1) % 3]
        x1 = x1 + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1
