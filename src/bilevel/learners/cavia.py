"""CAVIA: a few context parameters are adapted, the network is shared by all tasks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.hypergrad import Mixed
from bilevel.inner import Gradient
from bilevel.learners.supervised import supervised
from bilevel.nets import Net
from bilevel.problem import Estimator, Key, Learner, Params


@dataclass(frozen=True)
class InputContext:
    """Context that stands beside the inputs: x becomes (x, φ).

    Args:
        size: number of context parameters; the network reads inputs that are wider by as many.
    """

    size: int

    def __post_init__(self):
        _require_size(self, self.size)

    def init(self, net_params: Params, key: Key) -> dict[str, Any]:
        """Nothing to learn beside the network."""
        return {}

    def assemble(self, params, meta, x):
        """The network as it is, on wider inputs."""
        if x.ndim != 2:
            raise ValueError(
                f"InputContext stands beside inputs [n, d], got {x.shape}; for pictures use "
                'FilmContext(size, layer="block_2")'
            )
        context = jnp.broadcast_to(params.astype(x.dtype), (len(x), self.size))
        return meta["net"], jnp.concatenate([x, context], axis=1)


@dataclass(frozen=True)
class FilmContext:
    """Context that scales and shifts the features of a layer (FiLM), before its activation.

        h ← (1 + U φ) ⊙ h + V φ

    At φ = 0, where a task starts, the network is unchanged. The published code learns constants in place of
    the 1, which a normalized layer has already.

    Args:
        size: number of context parameters.
        layer: top-level entry of the network's parameters: `{"scale", "bias", ...}` of a normalized layer, or
            `{"w": [fan_in, fan_out], "b"}`, a dense one. The factors are applied to these, so that any
            network will do.
    """

    size: int
    layer: str

    def __post_init__(self):
        _require_size(self, self.size)

    def init(self, net_params: Params, key: Key) -> dict[str, Any]:
        """U and V, `[features, size]` each, normal with variance 1/size."""
        if self.layer not in net_params:
            raise KeyError(
                f"FilmContext(layer={self.layer!r}): the network's parameters have the entries "
                f"{sorted(net_params)}"
            )
        names = set(net_params[self.layer])
        if not ({"scale", "bias"} <= names or {"w", "b"} <= names):
            raise KeyError(
                f'FilmContext needs a layer with "scale" and "bias" or with "w" and "b", and {self.layer} '
                f"has {sorted(names)}"
            )
        bias = net_params[self.layer]["bias" if "scale" in names else "b"]
        u_key, v_key = jax.random.split(key)
        shape, unit = (len(bias), self.size), self.size**-0.5
        film = {
            "u": unit * jax.random.normal(u_key, shape, bias.dtype),
            "v": unit * jax.random.normal(v_key, shape, bias.dtype),
        }
        return {"film": film}

    def assemble(self, params, meta, x):
        """The network with one layer scaled and shifted, on the same inputs."""
        factor, shift = 1 + meta["film"]["u"] @ params, meta["film"]["v"] @ params
        layer = dict(meta["net"][self.layer])
        weight, bias = ("scale", "bias") if "scale" in layer else ("w", "b")
        layer[weight] = layer[weight] * factor  # over the last axis: the features
        layer[bias] = layer[bias] * factor + shift
        return {**meta["net"], self.layer: layer}, x


def cavia(
    net: Net,
    loss: Callable,
    *,
    context: InputContext | FilmContext,
    num_steps: int = 1,
    rate: float = 1.0,
    estimator: Estimator | None = None,
) -> Learner:
    """Adapt a small context, and learn a network that listens to it.

        φ₀ = 0,   φₖ₊₁ = φₖ − α ∇φ loss(net(x, φₖ; θ), y) on the support;   θ descends the loss on the query

    Few numbers are adapted, so a large rate does no harm, the support overfits less, and what was found for a
    task can be read: on sinusoids, amplitude and phase.

    Args:
        net: an init/apply pair, its inputs wider by the context with `InputContext`.
        loss: `loss(outputs, targets) -> scalar` or `-> (scalar, {metric: scalar})`; batches are `(x, y)`.
        context: `InputContext(size)`, for inputs `[n, d]`, or `FilmContext(size, layer)`.
        num_steps: K, inner steps in training.
        rate: α.
        estimator: `Mixed()` by default. With `FirstOrder()` the network learns only what it makes of a
            context given to it, not how a context is found.

    Returns:
        A `Learner` whose meta is `{"net": params}`, and `"film"` beside it with `FilmContext`; params are the
        context `[size]`.

    Raises:
        TypeError: when `context` is neither.
        KeyError: at `init_meta`, when the layer of a `FilmContext` is none of the network's.
        ValueError: for a context smaller than 1; for inputs that an `InputContext` cannot stand beside.

    Cost: that of the estimator; the inner gradient has only `size` elements, but passes the layers behind the
    context. Exact with `Mixed()`.

    Reference: Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson, Fast context adaptation via meta-learning, 2019.

    >>> import bilevel as bl
    >>> net = bl.nets.mlp([1 + 5, 40, 40, 1])
    >>> learner = cavia(net, bl.learners.mean_squared_error, context=InputContext(5))
    >>> learner.problem.init(learner.init_meta(jax.random.key(0)), None).shape
    (5,)
    """
    if not isinstance(context, InputContext | FilmContext):
        raise TypeError(
            f"cavia's context must be InputContext(size) or FilmContext(size, layer), got {context!r}"
        )

    def init_meta(key):
        net_params = net.init(key)
        return {"net": net_params, **context.init(net_params, jax.random.fold_in(key, 1))}

    def start(meta, key):
        return jnp.zeros(context.size, jax.tree.leaves(meta["net"])[0].dtype)

    problem, predict = supervised(net, loss, start, context.assemble)
    solver = Gradient(optax.sgd(rate), num_steps, hoist=True)  # what comes before the context
    return Learner(problem, solver, estimator or Mixed(), init_meta, predict)


def _require_size(owner: object, size: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{type(owner).__name__}.size must be a whole number of at least 1, got {size!r}")
