"""What a network is here: an init/apply pair. Any pair of functions of these shapes will do."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from bilevel.problem import Key, Params


class Net(NamedTuple):
    """A network as pure functions.

    Args:
        init: `init(key) -> params`.
        apply: `apply(params, x) -> outputs`, with `x` of shape `[n, ...]`.
        noisy: `noisy(params, x, key) -> outputs` with dropout and the like, None where there is none.
            Learners use it in the outer loss of training only; figures come from `apply`.
        transductive: whether the outputs of one example depend on the others of its batch, as with batch
            norm on the current batch. An evaluation protocol has to say so.
        whole: whether a batch must not be cut in pieces, as with batch norm on the batch or on its support.

    >>> net = Net(init=lambda key: jax.random.normal(key, (3,)), apply=lambda params, x: x @ params)
    >>> net.apply(net.init(jax.random.key(0)), jax.numpy.ones((5, 3))).shape
    (5,)
    """

    init: Callable[[Key], Params]
    apply: Callable[[Params, jax.Array], jax.Array]
    noisy: Callable[[Params, jax.Array, Key], jax.Array] | None = None
    transductive: bool = False
    whole: bool = False
