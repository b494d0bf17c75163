"""The baseline without meta-learning: every task is learned from nothing."""

from collections.abc import Callable
from dataclasses import replace

import optax

from bilevel.hypergrad import Unroll
from bilevel.inner import Gradient
from bilevel.learners.maml import maml
from bilevel.nets import Net
from bilevel.problem import Learner


def from_scratch(
    net: Net, loss: Callable, optimizer: optax.GradientTransformation, num_steps: int
) -> Learner:
    """A fresh random model, trained on the support of each task alone.

        φ₀ ~ net.init(key),   φₖ₊₁ = φₖ + optimizer(∇loss(φₖ, support))

    Args:
        net: an init/apply pair.
        loss: `loss(outputs, targets) -> scalar` or `-> (scalar, {metric: scalar})`; batches are `(x, y)`.
        optimizer: of the inner loop.
        num_steps: inner steps.

    Returns:
        A `Learner` with nothing to learn: its meta is `{}`. It is for `bl.evaluate` and `bl.adapt`.

    Cost: `num_steps` gradients a task.

    >>> import bilevel as bl, jax
    >>> learner = from_scratch(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, optax.adam(1e-2), 3)
    >>> params = bl.adapt(learner, {}, bl.tasks.sinusoid(jax.random.key(0)), jax.random.key(1))
    >>> sorted(params)
    ['head', 'hidden_0']
    """
    learner = maml(net, loss)
    problem = replace(learner.problem, init=lambda meta, key: net.init(key))
    solver = Gradient(optimizer, num_steps)
    return Learner(problem, solver, Unroll(), init_meta=None, predict=learner.predict)
