"""Minibatches of the whole classification problem: what a pretrained baseline is trained on."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import register_dataclass

from bilevel.problem import Key, Task
from bilevel.tasks.few_shot import FewShot
from bilevel.tasks.glyphs import SPLITS, STYLES, Glyphs


@register_dataclass
@dataclass(frozen=True)
class Minibatch:
    """Draw examples of all classes at once, with the number of their class as label.

    The class of each example is drawn evenly, so an example may come twice. The examples are the query; the
    support is one of them, which nobody reads.

    Args:
        source: a `FewShot` or a `Glyphs`; of its settings only the classes count.
        size: examples of a minibatch.

    Raises:
        ValueError: when `size` is below 1.
        TypeError: when it is asked for a task, or the number of classes, of a source that is neither.

    >>> import numpy as np
    >>> source = FewShot(np.zeros((30, 8, 8), np.uint8), np.arange(30) % 3, ways=2, shots=1, queries=1)
    >>> task = Minibatch(source, 16)(jax.random.key(0))
    >>> task.query[0].shape, sorted(set(task.query[1].tolist()))
    ((16, 8, 8, 1), [0, 1, 2])
    """

    source: Callable[[Key], Task]
    size: int = field(metadata={"static": True})

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"Minibatch.size must be at least 1, got {self.size}")

    @property
    def num_classes(self) -> int:
        """How many classes there are, rotated ones included."""
        return self._known().num_classes

    def __call__(self, key: Key) -> Task:
        """Draw one: (x [1, ...], y int32 [1]) as support, (x [size, ...], y int32 [size]) as query."""
        class_key, example_key = jax.random.split(key)
        labels = jax.random.randint(class_key, (self.size,), 0, self.num_classes)
        keys = jax.random.split(example_key, self.size)
        x = jax.vmap(lambda label, key: self._example(label, key))(labels, keys)
        return Task(support=(x[:1], labels[:1]), query=(x, labels))

    def _known(self) -> FewShot | Glyphs:
        if not isinstance(self.source, FewShot | Glyphs):
            raise TypeError(f"Minibatch needs a FewShot or a Glyphs, got {type(self.source).__name__}")
        return self.source

    def _example(self, label: jax.Array, key: Key) -> jax.Array:
        source = self._known()
        if isinstance(source, Glyphs):
            return STYLES[source.style](SPLITS[source.split][0] + label, key, source.size)
        turns, of_class = jnp.divmod(label, source.counts.shape[0])
        x = source.images[source.starts[of_class] + jax.random.randint(key, (), 0, source.counts[of_class])]
        if source.rotations:
            x = jax.lax.switch(turns, [partial(jnp.rot90, k=k) for k in range(4)], x)
        return x.astype(jnp.float32) / (255 if x.dtype == jnp.uint8 else 1)
