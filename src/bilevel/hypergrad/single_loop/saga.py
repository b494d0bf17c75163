"""SAGA: a table of the last value for each batch, which takes the noise out of the next one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.hypergrad.single_loop.minibatch import checksum


class Table(NamedTuple):
    """The last value seen for each of the fixed batches.

    Args:
        rows: leaves `[num_batches, ...]`.
        mean: their mean.
        checksums: `[num_batches]`, of the data that each row was made from.
    """

    rows: Any
    mean: Any
    checksums: jax.Array


def make_table(function, batches) -> Table:
    """The table of `function(batch)` for batches with leaves `[num_batches, ...]`: one full pass.

    >>> print(make_table(lambda batch: batch.sum(), jnp.arange(6.0).reshape(3, 2)).mean)
    5.0
    """
    count = jax.tree.leaves(batches)[0].shape[0] if jax.tree.leaves(batches) else 1
    # The index stands in for a batch without leaves, which could not be mapped over.
    rows, checksums = jax.lax.map(
        lambda pair: (function(pair[1]), checksum(pair[1])), (jnp.arange(count), batches)
    )
    return Table(rows, jax.tree.map(lambda leaf: jnp.mean(leaf, 0), rows), checksums)


def look_up(table: Table, index: jax.Array, value: Any, batch: Any) -> tuple[Any, Table, jax.Array]:
    """The variance-reduced value, the table that remembers `value`, and whether its data has changed.

        reduced = value − rowᵢ + mean,   rowᵢ ← value,   mean ← mean + (value − rowᵢ) / num_batches

    Unbiased over a uniform i, with a variance that vanishes when the values stop moving.
    """
    count = table.checksums.shape[0]
    row, place = _read(table.rows, index)
    change = jax.tree.map(lambda new, old: new - old, value, row)
    reduced = jax.tree.map(lambda c, m: c + m, change, table.mean)
    rows = jax.tree.map(
        lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, place, 0), table.rows, value
    )
    mean = jax.tree.map(lambda m, c: m + c / count, table.mean, change)
    changed = table.checksums[index] != checksum(batch)
    return reduced, Table(rows, mean, table.checksums), changed


def _read(rows, index):
    """Row `index`, and the index again, which is not known before the row has been read.

    The compiler writes a row in place only where every read of it must come first. It copies the whole table
    otherwise, and it sees through `optimization_barrier`; it does not see through a condition.
    """

    def read():
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), rows
        ), index

    def never():
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), rows), jnp.zeros_like(index)

    return jax.lax.cond(index >= 0, read, never)
