"""MAML and the options people use with it, each a few lines over the nouns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.hypergrad import Mixed
from bilevel.inner import Gradient
from bilevel.learners.supervised import supervised
from bilevel.nets import Net
from bilevel.problem import Estimator, Learner, Params


@dataclass(frozen=True)
class Fixed:
    """One inner learning rate, not learned."""

    value: float

    def init(self, params, num_steps):
        """Nothing to learn."""
        return None

    def optimizer(self, rates) -> optax.GradientTransformation:
        """Plain gradient descent."""
        return optax.sgd(self.value)


@dataclass(frozen=True)
class PerParameter:
    """A learned inner learning rate for every single parameter, Meta-SGD (Li et al., 2017).

    As in the paper the rates are free to fall below zero: together they are the direction of the step, which
    then leaves that of the gradient and may climb along some parameters. It is only trained for the steps of
    training; further ones may diverge. `rate_figures` says how many are negative.
    """

    value: float

    def init(self, params, num_steps):
        """All rates start at `value`: a tree like `params`."""
        return jax.tree.map(lambda leaf: jnp.full_like(leaf, self.value), params)

    def optimizer(self, rates) -> optax.GradientTransformation:
        """φ ← φ − α ⊙ ∇g."""
        return _descent(lambda step: rates)


@dataclass(frozen=True)
class PerLayerPerStep:
    """A learned inner learning rate for every leaf and inner step, MAML++ (Antoniou et al., 2019)."""

    value: float

    def init(self, params, num_steps):
        """All rates start at `value`: one vector `[num_steps]` per leaf of `params`."""
        return jax.tree.map(lambda leaf: jnp.full((num_steps,), self.value, leaf.dtype), params)

    def optimizer(self, rates) -> optax.GradientTransformation:
        """φ ← φ − αₖ ∇g; steps beyond those learned for use the last rate."""
        return _descent(lambda step: jax.tree.map(lambda rate: rate[jnp.minimum(step, len(rate) - 1)], rates))


def _descent(rates_at: Callable) -> optax.GradientTransformation:
    """Gradient descent with a tree of rates that may depend on the step."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda rate, g: -rate * g, rates_at(state), updates), state + 1

    return optax.GradientTransformation(lambda params: jnp.int32(0), update)


@dataclass(frozen=True)
class AllBut:
    """Every top-level entry of the parameters but one: `maml(adapt=AllBut("head"))` makes BOIL."""

    name: str


def maml(
    net: Net,
    loss: Callable,
    *,
    num_steps: int = 1,
    rates: float | Fixed | PerParameter | PerLayerPerStep = 0.4,
    adapt: str | AllBut = "all",
    clip: float | None = None,
    estimator: Estimator | None = None,
) -> Learner:
    """Model-agnostic meta-learning: learn an initialization from which a few gradient steps suffice.

        min over θ  E[ loss(φ_K(θ), query) ],   φ₀ = θ["init"],   φₖ₊₁ = φₖ − α ∇loss(φₖ, support)

    Its relatives are options. FOMAML, `estimator=FirstOrder()`: the gradient at φ_K is taken as that at φ₀,
    which spares all second derivatives; it cannot learn rates, and says so. Meta-SGD,
    `rates=PerParameter(α)`: a learned rate for every parameter, started at α. ANIL, `adapt="head"`: the inner
    loop trains the head alone, on features that only the outer loop learns; its inner steps cost almost
    nothing beyond one pass through the body. BOIL, `adapt=AllBut("head")` or `boil`: the opposite.

    Args:
        net: an init/apply pair.
        loss: `loss(outputs, targets) -> scalar` or `-> (scalar, {metric: scalar})`; batches are `(x, y)`.
        num_steps: K, inner steps in training.
        rates: the inner learning rate: a number, `PerParameter(rate)` for Meta-SGD, or
            `PerLayerPerStep(rate)` for the learned rates of MAML++.
        adapt: what the inner loop adapts: "all", the name of one top-level entry of the parameters, or
            `AllBut(name)`.
        clip: the largest norm of an inner gradient, over all that is adapted; a longer one is scaled to it
            before the rates multiply it, in training and after. Learned rates over several steps may need it.
        estimator: `Mixed()` by default; `FirstOrder()` makes FOMAML, `MultiStep(n)` the loss of MAML++.

    Returns:
        A `Learner` whose meta is `{"init": params}`, with `"rates"` beside it where they are learned.

    Raises:
        TypeError: when `rates` or `adapt` is none of these.
        ValueError: when `clip` is not above 0.
        KeyError: at `init_meta`, when `adapt` names no entry of the parameters.

    Cost: that of the estimator. Exact with `Mixed()`; biased with `FirstOrder()`.

    Reference: Finn, Abbeel, Levine, 2017 (MAML, FOMAML); Li, Zhou, Chen, Li, Meta-SGD, 2017; Raghu, Raghu,
    Bengio, Vinyals, Rapid learning or feature reuse? (ANIL), 2020.

    >>> import bilevel as bl
    >>> net = bl.nets.mlp([1, 40, 40, 1])
    >>> learner = maml(net, bl.learners.mean_squared_error, num_steps=5, rates=PerParameter(0.01))
    >>> sorted(learner.init_meta(jax.random.key(0)))
    ['init', 'rates']
    """
    if isinstance(rates, int | float) and not isinstance(rates, bool):
        rates = Fixed(float(rates))
    if not isinstance(rates, Fixed | PerParameter | PerLayerPerStep):
        raise TypeError(
            f"maml's rates must be a number, PerParameter(rate) or PerLayerPerStep(rate), got {rates!r}"
        )
    if not isinstance(adapt, str | AllBut):
        raise TypeError(f'maml\'s adapt must be "all", the name of an entry or AllBut(name), got {adapt!r}')

    if clip is not None and not clip > 0:
        raise ValueError(f"maml's clip must be above 0, or None for no clipping, got {clip}")

    def init_meta(key):
        init = net.init(key)
        learned = rates.init(adapted(init, adapt), num_steps)
        return {"init": init} if learned is None else {"init": init, "rates": learned}

    problem, predict = supervised(
        net,
        loss,
        init=lambda meta, key: adapted(meta["init"], adapt),
        # What is not adapted is read from meta, so no inner gradient is spent on it.
        assemble=lambda params, meta, x: (params if adapt == "all" else {**meta["init"], **params}, x),
    )

    def optimizer(meta):
        descent = rates.optimizer(meta.get("rates"))
        return descent if clip is None else optax.chain(optax.clip_by_global_norm(clip), descent)

    # With ANIL the body is passed through once, whatever K is; where all is adapted nothing could be spared.
    solver = Gradient(optimizer, num_steps, hoist=adapt != "all")
    return Learner(problem, solver, estimator or Mixed(), init_meta, predict)


def rate_figures(meta: Any) -> dict[str, float]:
    """What the learned inner rates came to: nothing where none are learned.

    Args:
        meta: of `maml`, learned rates under "rates".

    Returns:
        The share of rates below zero, the smallest, the median and the largest.

    >>> meta = {"init": 0.0, "rates": {"w": jnp.array([-0.1, 0.2, 0.3, 0.4])}}
    >>> rate_figures(meta)["share of inner rates below 0"]
    0.25
    >>> rate_figures({"init": 0.0})
    {}
    """
    leaves = [np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(meta.get("rates"))]
    if not leaves:
        return {}
    rates = np.concatenate(leaves)
    return {
        "share of inner rates below 0": float((rates < 0).mean()),
        "smallest inner rate": float(rates.min()),
        "median inner rate": float(np.median(rates)),
        "largest inner rate": float(rates.max()),
    }


def boil(net: Net, loss: Callable, *, head: str = "head", **options: Any) -> Learner:
    """Body only update in the inner loop: the head keeps what the outer loop gave it.

        φ₀ = θ["init"] without its head,   φₖ₊₁ = φₖ − α ∇φ loss(φₖ and the head of θ, support)

    The features must move to meet a fixed head, where MAML reuses features and moves the head.

    Args:
        net, loss: as in `maml`.
        head: the top-level entry of the parameters that the inner loop leaves alone.
        options: the other arguments of `maml`.

    Returns:
        A `Learner`; meta is that of `maml`. The head is still learned, by the outer loop: a rate of 0 in the
        outer optimizer freezes it as in the paper's ablation.

    Raises:
        KeyError: at `init_meta`, when the parameters have no entry `head`.

    Cost: that of `maml`. Exact with `Mixed()`.

    Reference: Oh, Yoo, Kim, Yun, BOIL: towards representation change for few-shot learning, 2021.

    >>> import bilevel as bl
    >>> learner = boil(bl.nets.mlp([1, 8, 8, 1]), bl.learners.mean_squared_error, rates=0.01)
    >>> sorted(learner.problem.init(learner.init_meta(jax.random.key(0)), None))
    ['hidden_0', 'hidden_1']
    """
    return maml(net, loss, adapt=AllBut(head), **options)


def adapted(init: Params, adapt: str | AllBut) -> Params:
    """The part of the parameters that the inner loop adapts."""
    if adapt == "all":
        return init
    name = adapt.name if isinstance(adapt, AllBut) else adapt
    if name not in init:
        raise KeyError(f"maml(adapt={adapt!r}): the network's parameters have the entries {sorted(init)}")
    if isinstance(adapt, AllBut):
        return {entry: init[entry] for entry in init if entry != name}
    return {name: init[name]}
