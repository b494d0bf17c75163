"""Minibatches of one data set: a task of its own at each outer step."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from bilevel.problem import Batch, Key, Task


@register_dataclass
@dataclass(frozen=True)
class Rows:
    """Draw rows of the support and of the query of one data set, uniformly, with replacement.

    What online methods train on: the model sees other rows at each outer step, and so does what judges it.

    Args:
        task: leaves [n, ...], those of support of one n and those of query of another.
        support: rows of the support in a task.
        query: rows of the query in a task.

    Raises:
        ValueError: when a number of rows is below 1.

    >>> sample = Rows(Task(support=jnp.zeros((8, 3)), query=jnp.ones((4, 3))), support=5, query=2)
    >>> task = sample(jax.random.key(0))
    >>> task.support.shape, task.query.shape
    ((5, 3), (2, 3))
    """

    task: Task
    support: int = field(metadata={"static": True})
    query: int = field(metadata={"static": True})

    def __post_init__(self):
        if self.support < 1 or self.query < 1:
            raise ValueError(f"Rows needs support and query of 1 or more, got {self.support}, {self.query}")

    def __call__(self, key: Key) -> Task:
        """Draw one: leaves [support, ...] and [query, ...]."""
        support_key, query_key = jax.random.split(key)
        return Task(
            _draw(self.task.support, self.support, support_key), _draw(self.task.query, self.query, query_key)
        )


def _draw(batch: Batch, count: int, key: Key) -> Batch:
    total = jnp.shape(jax.tree.leaves(batch)[0])[0]
    rows = jax.random.randint(key, (count,), 0, total)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[rows], batch)
