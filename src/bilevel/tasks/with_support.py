"""Tasks whose query batch begins with the support, for norms that look at the support only."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.tree_util import Partial, all_leaves, register_dataclass

from bilevel.problem import Key, Task
from bilevel.tasks.sampling import Sampler


@register_dataclass
@dataclass(frozen=True)
class _WithSupport:
    sample: Sampler

    def __call__(self, key: Key) -> Task:
        (x, y), (query_x, query_y) = self.sample(key)
        if not jnp.issubdtype(y.dtype, jnp.integer):
            raise TypeError(f"with_support needs whole-numbered labels, got {y.dtype}")
        unlabelled = jnp.full_like(y, -1)
        query = jnp.concatenate([x, query_x]), jnp.concatenate([unlabelled, query_y])
        return Task((x, y), query)


def with_support(sample: Sampler) -> Sampler:
    """The same tasks, with the support in front of the query batch, where it has no labels.

        query ← (support x, query x) with labels (−1, ..., −1, query y)

    Loss and accuracy do not count a label of −1. A network with `SupportNorm(ways * shots)` finds in every
    batch the support to normalize by: an answer then depends on no other query, in training as in the test.

    Args:
        sample: `sample(key) -> Task` of `(x, y)` batches with whole-numbered labels, the support of one size.

    Returns:
        A sampler; the task of a key is that of `sample`.

    Raises:
        TypeError: when `sample` cannot be called; when a task is drawn, for labels that are no integers.

    Cost: the outer loss passes the support through the network again.

    >>> import jax
    >>> from bilevel.tasks import Glyphs
    >>> sample = jax.jit(with_support(Glyphs(ways=2, shots=1, queries=2, size=8)))
    >>> sample(jax.random.key(0)).query[1].tolist()
    [-1, -1, 0, 0, 1, 1]
    """
    if not callable(sample):
        raise TypeError(f"with_support: sample must be a function, got {type(sample).__name__}")
    return _WithSupport(Partial(sample) if all_leaves([sample]) else sample)
