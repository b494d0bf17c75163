"""A few examples of each class as support, and as query a batch of all examples, or a whole test set."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_dataclass
from jax.typing import ArrayLike

from bilevel.problem import Key, Task
from bilevel.tasks.sampling import choose


@register_dataclass
@dataclass(frozen=True)
class FewBesideMany:
    """Tasks of one data set; made by `few_beside_many`. Labels keep their meaning from task to task.

    A pytree: a compiled call takes the examples as an argument, pictures of integers as uint8.

    Args:
        images: `[N, ...]`, sorted by class; uint8 is shown as 0..1, floats as they are.
        labels: int32 `[N]`.
        starts, counts: int32 `[classes]`, where each class begins and how many examples it has.
        test: (images, labels), the query in place of drawn ones; None to draw.
        shots: support examples of each class.
        size: query examples that are drawn, with repeats.
    """

    images: jax.Array = field(repr=False)
    labels: jax.Array = field(repr=False)
    starts: jax.Array = field(repr=False)
    counts: jax.Array = field(repr=False)
    test: tuple[jax.Array, jax.Array] | None = field(repr=False)
    shots: int = field(metadata={"static": True})
    size: int = field(metadata={"static": True})

    def __call__(self, key: Key) -> Task:
        """Draw one: x [classes * shots, ...] with y as support, x [size or all, ...] with y as query."""
        few_key, many_key = jax.random.split(key)
        keys = jax.random.split(few_key, self.counts.shape[0])
        picks = jax.vmap(choose, (0, 0, None))(keys, self.counts, self.shots)
        few = (self.starts[:, None] + picks).ravel()
        if self.test is None:
            rows = jax.random.randint(many_key, (self.size,), 0, self.images.shape[0])
            query = _shown(self.images[rows]), self.labels[rows]
        else:
            query = _shown(self.test[0]), self.test[1]
        return Task(support=(_shown(self.images[few]), self.labels[few]), query=query)


def few_beside_many(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    shots: int,
    size: int = 0,
    test: tuple[ArrayLike, ArrayLike] | None = None,
) -> FewBesideMany:
    """A sampler of tasks whose support is a few examples of each class of a data set.

    Args:
        images: `[N, ...]`, integers in 0..255 or floats.
        labels: integers `[N]`, 0..classes-1.
        shots: support examples of each class, without repeats.
        size: query examples, drawn from all N with repeats.
        test: (images, labels) `[M, ...]` that are the query of every task, in place of drawn ones.

    Raises:
        ValueError: when lengths or labels do not fit, a class has fewer than `shots` examples, or it is not
            said what the query is: either `size` or `test`.

    >>> images, labels = np.zeros((30, 8, 8), np.uint8), np.arange(30) % 3
    >>> task = few_beside_many(images, labels, shots=2, size=16)(jax.random.key(0))
    >>> task.support[1].tolist(), task.query[0].shape
    ([0, 0, 1, 1, 2, 2], (16, 8, 8))
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(
            f"images and labels must have one length of at least 1, got {len(images)}, {len(labels)}"
        )
    if (size > 0) == (test is not None):
        raise ValueError(f"the query is either size=... examples or test=(images, labels), got size={size}")
    order = np.argsort(labels, kind="stable")
    classes, starts, counts = np.unique(labels[order], return_index=True, return_counts=True)
    if classes.tolist() != list(range(len(classes))):
        raise ValueError(f"labels must be 0..classes-1 with none left out, got {classes.tolist()[:12]}")
    if not 1 <= shots <= counts.min():
        raise ValueError(
            f"shots must lie in 1..{counts.min()}, the examples of the smallest class, got {shots}"
        )
    whole = None if test is None else (_stored(test[0]), jnp.asarray(test[1], jnp.int32))
    y, first, number = (jnp.asarray(array, jnp.int32) for array in (labels[order], starts, counts))
    return FewBesideMany(_stored(images[order]), y, first, number, whole, shots, size)


def _stored(images: ArrayLike) -> jax.Array:
    images = np.asarray(images)
    return jnp.asarray(images.astype(np.uint8) if np.issubdtype(images.dtype, np.integer) else images)


def _shown(images: jax.Array) -> jax.Array:
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images
