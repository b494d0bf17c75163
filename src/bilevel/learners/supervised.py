"""The problem that every learner of labelled batches states: fit a network's outputs to the targets."""

from collections.abc import Callable

import jax

from bilevel.nets import Net
from bilevel.problem import Meta, Params, Problem

# What a network is called with, made of what is adapted and what is learned.
Assemble = Callable[[Params, Meta, jax.Array], tuple[Params, jax.Array]]


def supervised(net: Net, loss: Callable, init: Callable, assemble: Assemble) -> tuple[Problem, Callable]:
    """Inner and outer loss of a network that is put together from params and meta.

        inner = outer = loss(net.apply(*assemble(φ, θ, x)), y)

    A network with noise (dropout, DropBlock) is noisy in the outer loss only; metrics and predictions are
    those of `net.apply`.

    Args:
        net: an init/apply pair.
        loss: `loss(outputs, targets) -> scalar` or `-> (scalar, {metric: scalar})`; batches are `(x, y)`.
        init: `init(meta, key) -> params`.
        assemble: `assemble(params, meta, x) -> (the network's parameters, its inputs)`.

    Returns:
        The problem, and `predict(params, meta, x) -> outputs`.

    >>> import bilevel as bl
    >>> net = bl.nets.mlp([1, 8, 1])
    >>> problem, predict = supervised(
    ...     net, bl.learners.mean_squared_error, lambda meta, key: meta, lambda params, meta, x: (params, x))
    >>> predict(net.init(jax.random.key(0)), None, jax.numpy.ones((3, 1))).shape
    (3, 1)
    """
    noisy = net.noisy

    def predict(params, meta, x):
        return net.apply(*assemble(params, meta, x))

    def judged(outputs, targets):
        result = loss(outputs, targets)
        return result if isinstance(result, tuple) else (result, {})

    def inner_loss(params, meta, batch, key):
        x, y = batch
        return judged(predict(params, meta, x), y)[0]

    def outer_loss(params, meta, batch, key):
        x, y = batch
        assert noisy is not None
        return judged(noisy(*assemble(params, meta, x), key), y)[0]

    def metrics(params, meta, batch, key):
        x, y = batch
        value, figures = judged(predict(params, meta, x), y)
        return {"loss": value, **figures}

    problem = Problem(init, inner_loss, inner_loss if noisy is None else outer_loss, metrics)
    return problem, predict
