"""One data set as the only task: what hyperparameter optimization has in place of a task distribution."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from bilevel.problem import Key, Task


@register_dataclass
@dataclass(frozen=True)
class Fixed:
    """Give the same task whatever the key.

    A pytree: a compiled call takes the data set as an argument. A minibatch of it is drawn where it is
    used, in the losses, from the key that they are given.

    Args:
        task: support is what the inner loop trains on, query what the outer loss is measured on; leaves
            [n, ...].

    Raises:
        TypeError: when it is no `Task`.

    >>> import bilevel as bl
    >>> sample = Fixed(Task(support=jnp.zeros((8, 3)), query=jnp.ones((4, 3))))
    >>> bl.tasks.batch(sample, 1)(jax.random.key(0)).query.shape
    (1, 4, 3)
    """

    task: Task

    def __post_init__(self):
        if not isinstance(self.task, Task) and isinstance(self.task, tuple | dict | jax.Array):
            raise TypeError(f"Fixed needs a bl.Task(support, query), got {type(self.task).__name__}")

    def __call__(self, key: Key) -> Task:
        """The task."""
        return jax.tree.map(jnp.asarray, self.task)
