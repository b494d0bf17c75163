"""Drawing at random what every task distribution needs: indices without repeats, and batches."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, all_leaves, register_dataclass

from bilevel.problem import Key, Task

Sampler = Callable[[Key], Task]


def choose(key: Key, total: int | jax.Array, count: int) -> jax.Array:
    """Draw `count` different integers of 0..total-1, in random order, in time free of `total`.

    Floyd's algorithm: the i-th draw is uniform over the first `total - count + i + 1` integers, and
    an integer that was drawn before is replaced by the newest one of that range, which cannot have
    been. This makes every subset equally likely; a shuffle makes every order so.

    Args:
        key: random key.
        total: how many integers there are; may be traced. It must be at least `count`.
        count: how many are drawn, static.

    Returns:
        int32 [count].

    >>> sorted(choose(jax.random.key(0), 5, 5).tolist())
    [0, 1, 2, 3, 4]
    """
    draw_key, shuffle_key = jax.random.split(key)
    newest = jnp.asarray(total, jnp.int32) - count + jnp.arange(count, dtype=jnp.int32)
    draws = jax.random.randint(draw_key, (count,), 0, newest + 1, jnp.int32)

    def add(i, chosen):
        repeated = jnp.any(chosen == draws[i])
        return chosen.at[i].set(jnp.where(repeated, newest[i], draws[i]))

    chosen = jax.lax.fori_loop(0, count, add, jnp.full(count, -1, jnp.int32))
    return jax.random.permutation(shuffle_key, chosen)


def classification(examples: jax.Array, shots: int) -> Task:
    """Make a task of the examples of its classes.

    Args:
        examples: [ways, shots + queries, ...], one row a class.
        shots: how many of each row are support; the rest are queries.

    Returns:
        Task of (x [ways * n, ...], y int32 [ways * n]) pairs, labelled 0..ways-1 by row.

    >>> task = classification(jnp.zeros((2, 3, 28, 28, 1)), shots=1)
    >>> task.support[1].tolist(), task.query[1].tolist()
    ([0, 1], [0, 0, 1, 1])
    """

    def label(x):
        y = jnp.repeat(jnp.arange(x.shape[0], dtype=jnp.int32), x.shape[1])
        return x.reshape(-1, *x.shape[2:]), y

    return Task(support=label(examples[:, :shots]), query=label(examples[:, shots:]))


@register_dataclass
@dataclass(frozen=True)
class _Batch:
    sample: Sampler
    num_tasks: int = field(metadata={"static": True})

    def __call__(self, key: Key) -> Task:
        return jax.vmap(self.sample)(jax.random.split(key, self.num_tasks))

    def rows(self, key: Key, rows: jax.Array) -> Task:
        """Those tasks of the batch alone, for a device that has no use for the others."""
        return jax.vmap(self.sample)(jax.random.split(key, self.num_tasks)[rows])


def batch(sample: Sampler, num_tasks: int) -> Sampler:
    """Turn a sampler of tasks into a sampler of batches of tasks.

    What comes back is a pytree and may be passed to a compiled function as an argument; the data of
    a `FewShot` is then an input of the program and not a constant inside it.

    Args:
        sample: `sample(key) -> Task` with leaves [n, ...].
        num_tasks: how many tasks a batch has.

    Returns:
        `sample_tasks(key) -> Task` with leaves [num_tasks, n, ...].

    Raises:
        TypeError: when `sample` cannot be called.
        ValueError: when `num_tasks` is below 1.

    >>> from bilevel.tasks import sinusoid
    >>> batch(sinusoid, 16)(jax.random.key(0)).support[0].shape
    (16, 10, 1)
    """
    if not callable(sample):
        raise TypeError(f"sample must be a function of a key, got {type(sample).__name__}")
    if num_tasks < 1:
        raise ValueError(f"num_tasks must be at least 1, got {num_tasks}")
    if all_leaves([sample]):  # a plain function: no arrays inside, so static
        sample = Partial(sample)
    return _Batch(sample, num_tasks)
