"""Multilayer perceptron."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from bilevel.nets.dense import dense
from bilevel.nets.net import Net
from bilevel.nets.noise import dropout as drop
from bilevel.nets.noise import require_rate


def mlp(sizes: Sequence[int], activation: Callable = jax.nn.relu, *, dropout: float = 0.0) -> Net:
    """A perceptron with the given layer widths.

        x ← activation(x W + b) for each layer but the last, which is linear

    Args:
        sizes: widths from input to output, at least two; `[1, 40, 40, 1]` has two hidden layers.
        activation: between layers.
        dropout: share of each hidden layer's outputs that `noisy` drops.

    Returns:
        A `Net`: `x [n, sizes[0]] -> [n, sizes[-1]]`. Weights start He-normal, biases at zero. Its
        parameters are `{"hidden_0": ..., "head": ...}`, each `{"w", "b"}`.

    Raises:
        ValueError: for fewer than two sizes, one below 1, or a dropout outside [0, 1).

    >>> net = mlp([1, 40, 40, 1])
    >>> net.apply(net.init(jax.random.key(0)), jnp.ones((10, 1))).shape
    (10, 1)
    """
    sizes = tuple(sizes)
    if len(sizes) < 2 or any(size < 1 for size in sizes):
        raise ValueError(f"mlp needs at least an input and an output width, each at least 1, got {sizes}")
    require_rate("mlp", dropout=dropout)
    names = [*(f"hidden_{i}" for i in range(len(sizes) - 2)), "head"]

    def init(key):
        keys = jax.random.split(key, len(names))
        return {
            name: {
                "w": jax.random.normal(k, (fan_in, fan_out)) * (2 / fan_in) ** 0.5,
                "b": jnp.zeros(fan_out),
            }
            for name, k, fan_in, fan_out in zip(names, keys, sizes[:-1], sizes[1:], strict=True)
        }

    def forward(params, x, key=None):
        for i, name in enumerate(names):
            x = dense(x, params[name]["w"]) + params[name]["b"]
            if name != "head":
                x = activation(x)
                if key is not None:
                    x = drop(x, dropout, jax.random.fold_in(key, i))
        return x

    return Net(init, lambda params, x: forward(params, x), forward if dropout else None)
