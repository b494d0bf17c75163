"""Rows of a task: drawn at random, or cut into fixed batches."""

from typing import Any

import jax
import jax.numpy as jnp

from bilevel.hypergrad.single_loop.threefry import random_words
from bilevel.problem import Batch, Key, Task

SERIES = 0x5E41  # the terms of a linear solve are a stream of their own as well
_ROWS = 0x0B47  # which rows are drawn is a stream of its own, apart from the randomness of the losses


def num_rows(batch: Batch, batch_size: int, part: str) -> int | None:
    """The length of the leading axis that all leaves of a batch share; None for a batch without leaves.

    Raises:
        ValueError: when they share none, or there are fewer rows than `batch_size`.
    """
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if not sizes:
        return None
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            f"batch_size={batch_size} takes rows of task.{part}, whose leaves must share their leading axis; "
            f"got leading sizes {sorted(sizes)}. Give every leaf one row per example, or use batch_size=None"
        )
    (rows,) = sizes.pop()
    if rows < batch_size:
        raise ValueError(
            f"batch_size must be at most the {rows} rows of task.{part}, got {batch_size}; "
            "use batch_size=None for all of them"
        )
    return rows


def row_numbers(task: Task, batch_size: int | None, key: Key, count: int = 1, query_count: int = 1) -> Task:
    """Which rows each minibatch of a call takes: `count` of the support and `query_count` of the query.

    With replacement the draws are independent: the mean over them is unbiased with a variance that is
    exactly proportional to 1 / batch_size, and the cost does not grow with the number of rows. They are
    uniform to within the number of rows over 2³².

    Returns:
        int32 support `[count, batch_size]` and query `[query_count, batch_size]`; None for a part that is
        taken whole.

    >>> row_numbers(Task(jnp.ones(5), None), 2, jax.random.key(0), count=3).support.shape
    (3, 2)
    """
    if batch_size is None:
        return Task(None, None)
    # One call for all of them: on small batches a call of the generator costs as much as the products.
    bits = random_words(key, _ROWS, (count + query_count, batch_size))

    def below(bits, batch, part):
        rows = num_rows(batch, batch_size, part)
        return None if rows is None else (bits % jnp.uint32(rows)).astype(jnp.int32)

    return Task(below(bits[:count], task.support, "support"), below(bits[count:], task.query, "query"))


def pick(batch: Batch, numbers: jax.Array | None) -> Batch:
    """The rows of a batch with these numbers; all of them, in order, for None.

    >>> pick((jnp.ones((5, 3)), jnp.ones(5)), jnp.array([4, 0]))[0].shape
    (2, 3)
    """
    if numbers is None:
        return batch
    return jax.tree.map(lambda leaf: jnp.asarray(leaf).at[numbers].get(mode="promise_in_bounds"), batch)


def draw_task(task: Task, batch_size: int | None, key: Key) -> Task:
    """Independent rows of support and query, drawn uniformly and with replacement."""
    numbers = row_numbers(task, batch_size, key)
    return pick_task(task, numbers, 0, 0)


def pick_task(task: Task, numbers: Task, support: int, query: int) -> Task:
    """The support with the row numbers at one place of what `row_numbers` returned, the query at another."""
    return Task(
        pick(task.support, entry(numbers.support, support)), pick(task.query, entry(numbers.query, query))
    )


def entry(numbers: jax.Array | None, index: int | slice) -> jax.Array | None:
    """`numbers[index]`, where there are any."""
    return None if numbers is None else numbers[index]


def cut(batch: Batch, batch_size: int | None, part: str) -> tuple[Batch, int]:
    """All rows cut, in order, into fixed batches: leaves `[num_batches, batch_size, ...]`, and num_batches.

    Raises:
        ValueError: when `batch_size` does not divide the number of rows: a shorter last batch would be
            counted as if it were full.

    >>> cut(jnp.arange(6), 2, "support")[0].shape
    (3, 2)
    """
    rows = None if batch_size is None else num_rows(batch, batch_size, part)
    if batch_size is None or rows is None:
        return jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], batch), 1
    if rows % batch_size:
        near = [size for size in range(1, rows + 1) if rows % size == 0]
        near = sorted(near, key=lambda size: abs(size - batch_size))[:2]
        raise ValueError(
            f"batch_size must divide the {rows} rows of task.{part}, got {batch_size}; use "
            f"{' or '.join(map(str, near))}, or leave {rows % batch_size} rows out of the task"
        )
    count = rows // batch_size
    return jax.tree.map(lambda leaf: jnp.reshape(leaf, (count, batch_size, *leaf.shape[1:])), batch), count


def batch_numbers(counts: tuple[int, ...], key: Key) -> tuple[jax.Array, ...]:
    """A number below each of the counts, uniform as in `row_numbers`.

    >>> [int(number) for number in batch_numbers((1, 1), jax.random.key(0))]
    [0, 0]
    """
    bits = random_words(key, _ROWS, (len(counts),))
    return tuple((bits[i] % jnp.uint32(n)).astype(jnp.int32) for i, n in enumerate(counts))


def take(batches: Batch, index: jax.Array) -> Batch:
    """Batch number `index` of what `cut` returned."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), batches)


def checksum(batch: Any) -> jax.Array:
    """A sum over the bits of a batch, each weighed by its place, uint32: equal for equal batches.

    >>> bool(checksum(jnp.array([1.0, 2.0])) == checksum(jnp.array([1.0, 2.0 + 1e-6])))
    False
    """
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(batch):
        leaf = jnp.asarray(leaf)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            bits = jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32  # float64 becomes two of them
            leaf = jax.lax.bitcast_convert_type(leaf, bits)
        bits = leaf.astype(jnp.uint32).ravel()
        places = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1  # odd: no bit is lost
        total = 31 * total + jnp.sum(places * bits, dtype=jnp.uint32)
    return total
