"""What a network is here: an init/apply pair. Any pair of functions of these shapes will do."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from bilevel.problem import Key, Params


class Net(NamedTuple):
    """A network as two pure functions.

    Args:
        init: `init(key) -> params`.
        apply: `apply(params, x) -> outputs`, with `x` of shape `[n, ...]`.

    >>> net = Net(init=lambda key: jax.random.normal(key, (3,)), apply=lambda params, x: x @ params)
    >>> net.apply(net.init(jax.random.key(0)), jax.numpy.ones((5, 3))).shape
    (5,)
    """

    init: Callable[[Key], Params]
    apply: Callable[[Params, jax.Array], jax.Array]
