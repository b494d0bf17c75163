"""MAML and the options people use with it, each a few lines over the nouns."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from bilevel.hypergrad import Mixed
from bilevel.inner import Gradient
from bilevel.nets import Net
from bilevel.problem import Estimator, Learner, Problem


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
    """A learned inner learning rate for every single parameter, Meta-SGD (Li et al., 2017)."""

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


def maml(
    net: Net,
    loss: Callable,
    *,
    num_steps: int = 1,
    rates: float | Fixed | PerParameter | PerLayerPerStep = 0.4,
    adapt: str = "all",
    estimator: Estimator | None = None,
) -> Learner:
    """Model-agnostic meta-learning: learn an initialization from which a few gradient steps suffice.

        min over θ  E[ loss(φ_K(θ), query) ],   φ₀ = θ["init"],   φₖ₊₁ = φₖ − α ∇loss(φₖ, support)

    Args:
        net: an init/apply pair.
        loss: `loss(outputs, targets) -> scalar` or `-> (scalar, {metric: scalar})`; batches are `(x, y)`.
        num_steps: K, inner steps in training.
        rates: the inner learning rate: a number, `PerParameter(rate)` for Meta-SGD, or
            `PerLayerPerStep(rate)` for the learned rates of MAML++.
        adapt: "all", or the name of the one top-level entry of the parameters that the inner loop
            adapts: "head" makes ANIL (Raghu et al., 2020).
        estimator: `Mixed()` by default; `FirstOrder()` makes FOMAML, `MultiStep(n)` the loss of MAML++.

    Returns:
        A `Learner` whose meta is `{"init": params}`, with `"rates"` beside it where they are learned.

    Raises:
        TypeError: when `rates` is none of these.
        KeyError: at `init_meta`, when `adapt` names no entry of the parameters.

    Cost: that of the estimator.

    Reference: Finn, Abbeel, Levine, 2017.

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

    def adapted(init):
        if adapt == "all":
            return init
        if adapt not in init:
            raise KeyError(f"maml(adapt={adapt!r}): the network's parameters have the entries {sorted(init)}")
        return {adapt: init[adapt]}

    def outputs(params, meta, x):
        # What is not adapted is read from meta, so no inner gradient is spent on it.
        return net.apply(params if adapt == "all" else {**meta["init"], **params}, x)

    def evaluate(params, meta, batch):
        x, y = batch
        result = loss(outputs(params, meta, x), y)
        return result if isinstance(result, tuple) else (result, {})

    def task_loss(params, meta, batch, key):
        return evaluate(params, meta, batch)[0]

    def init_meta(key):
        init = net.init(key)
        learned = rates.init(adapted(init), num_steps)
        return {"init": init} if learned is None else {"init": init, "rates": learned}

    problem = Problem(
        init=lambda meta, key: adapted(meta["init"]),
        inner_loss=task_loss,
        outer_loss=task_loss,
        metrics=lambda params, meta, batch, key: {
            "loss": task_loss(params, meta, batch, key),
            **evaluate(params, meta, batch)[1],
        },
    )
    solver = Gradient(lambda meta: rates.optimizer(meta.get("rates")), num_steps)
    return Learner(problem, solver, estimator or Mixed(), init_meta, outputs)
