"""A model that is trained on weighted examples while the weights are learned: no inner loop to the end.

The model is a part of meta, "model", so that a run's checkpoints, evaluation and report are those of the
model; evaluation takes 0 inner steps, which leave it as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.hypergrad import Mixed
from bilevel.hypergrad.common import gradient_stats, split_keys
from bilevel.hypergrad.doubts import doubts_of
from bilevel.inner import Gradient
from bilevel.nets import Net
from bilevel.problem import Estimator, Hypergradient, InnerSolver, Key, Learner, Meta, Problem, Task

# weigh(meta, losses [n], labels [n]) -> weights [n], which sum to about 1
Weigh = Callable[[Meta, jax.Array, jax.Array], jax.Array]


def weighted_problem(net: Net, weigh: Weigh) -> Problem:
    """One look ahead: what a step on weighted examples does to the loss on clean ones.

        inner_loss = Σ wᵢ CE(φ; xᵢ, yᵢ),   outer_loss = mean CE(φ; clean),   φ starts at the model

    Args:
        net: `x [n, ...] -> logits [n, classes]`; batches are (x, labels).
        weigh: the weights, made of losses that pass no gradient on to the model.

    >>> net = Net(init=lambda key: jnp.zeros((3, 2)), apply=lambda params, x: x @ params)
    >>> problem = weighted_problem(net, equal_weights)
    >>> batch = (jnp.ones((4, 3)), jnp.array([0, 1, 0, 1]))
    >>> print(round(float(problem.inner_loss(jnp.zeros((3, 2)), {}, batch, None)), 4))
    0.6931
    """

    def cross_entropy(params, batch):
        x, y = batch
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y)

    def inner_loss(params, meta, batch, key):
        losses = cross_entropy(params, batch)
        return jnp.sum(weigh(meta, jax.lax.stop_gradient(losses), batch[1]) * losses)

    def outer_loss(params, meta, batch, key):
        return jnp.mean(cross_entropy(params, batch))

    def metrics(params, meta, batch, key):
        x, y = batch
        right = jnp.argmax(net.apply(params, x), axis=-1) == y
        return {"loss": outer_loss(params, meta, batch, key), "accuracy": jnp.mean(right)}

    return Problem(lambda meta, key: meta["model"], inner_loss, outer_loss, metrics)


def equal_weights(meta: Meta, losses: jax.Array, labels: jax.Array) -> jax.Array:
    """1/n each: plain training."""
    return jnp.full(losses.shape, 1 / losses.size)


def class_weights(of_class: jax.Array) -> Weigh:
    """Fixed weights of the classes, such as the inverse of their frequencies, scaled to sum to 1.

    >>> weigh = class_weights(jnp.array([3.0, 1.0]))
    >>> print(weigh({}, jnp.zeros(4), jnp.array([0, 1, 1, 1])))
    [0.5        0.16666667 0.16666667 0.16666667]
    """

    def weigh(meta, losses, labels):
        weights = jnp.asarray(of_class)[labels]
        return weights / jnp.sum(weights)

    return weigh


@dataclass(frozen=True)
class Online:
    """Move the model by its own weighted loss, and the rest of meta by the hypergradient of one step of it.

        grad of "model" = ∇φ inner_loss(φ),   grad of the rest = dF/dθ at φ − rate ∇φ inner_loss(φ, θ)

    The outer optimizer takes both steps, at its own rate for each. Both use the weights of before the step;
    published algorithms move the model by those of after it.

    Args:
        estimator: of the hypergradient through the look ahead.

    Raises:
        TypeError: when meta is no dict with a "model".

    Cost: that of the estimator on one step, and a gradient. Exact for the one step looked ahead, so it sees
    no further: what helps only later has no say.

    >>> Online().init(None, None, {"model": 0.0}, None, None)
    ()
    """

    estimator: Estimator = field(default_factory=Mixed)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """What the estimator asks for."""
        self.estimator.check(problem, solver)

    def init(self, problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key) -> Any:
        """The state of the estimator; the model is in meta."""
        require_model(self, meta)
        return self.estimator.init(problem, solver, meta, task, key)

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, Any]:
        """The direction of the model and of what weighs its examples."""
        h, state = self.estimator.estimate(problem, solver, meta, task, state, key)
        return with_model_step(h, problem, meta, task, key), state

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Those of the estimator."""
        return doubts_of(self.estimator, stats)


def with_model_step(h: Hypergradient, problem: Problem, meta: Meta, task: Task, key: Key) -> Hypergradient:
    """The same with the gradient of the inner loss for meta["model"]."""
    step_key = jax.random.split(split_keys(key)[0])[1]
    loss, grad = jax.value_and_grad(problem.inner_loss)(meta["model"], meta, task.support, step_key)
    grad = {**h.grad, "model": grad}
    stats = {**h.stats, "inner_loss": loss, **gradient_stats(h.value, grad)}
    return Hypergradient(h.value, grad, stats)


def require_model(owner: object, meta: Meta) -> None:
    """Refuse a meta without a model in it."""
    if not isinstance(meta, dict) or "model" not in meta:
        raise TypeError(
            f'{type(owner).__name__} trains meta["model"], so meta must be a dict with it, got '
            f"{type(meta).__name__}; make one with the learner's init_meta"
        )


def plain_training(net: Net, weigh: Weigh = equal_weights) -> Learner:
    """The baseline: the same model and batches, with weights that are fixed.

    Returns:
        A `Learner` whose meta is {"model": ...}; its hypergradient is the gradient of the weighted loss.

    Cost: a gradient. Exact.

    >>> import bilevel as bl
    >>> sorted(plain_training(bl.nets.mlp([4, 2])).init_meta(jax.random.key(0)))
    ['model']
    """
    return Learner(
        weighted_problem(net, weigh),
        Gradient(optax.sgd(0.0), 0),
        Online(),
        init_meta=lambda key: {"model": net.init(key)},
        predict=lambda params, meta, x: net.apply(params, x),
    )
