"""Reptile: many plain steps on a task, and the initialization moves towards where they end."""

from collections.abc import Callable
from dataclasses import replace

import jax
import optax

from bilevel import hypergrad
from bilevel.inner import Gradient
from bilevel.learners.supervised import supervised
from bilevel.nets import Net
from bilevel.problem import Batch, Key, Learner
from bilevel.tasks.sampling import choose


def reptile(
    net: Net,
    loss: Callable,
    *,
    num_steps: int = 5,
    batch_size: int | None = None,
    rate: float = 1e-3,
    optimizer: optax.GradientTransformation | None = None,
) -> Learner:
    """Move the initialization towards what training on a task makes of it.

        θ ← θ + ε · mean over tasks of (φ_K − θ),   φ₀ = θ["init"],   φₖ₊₁ = Adam(∇loss(φₖ, minibatch k))

    The outer optimizer is `optax.sgd(ε)`, with ε decaying to 0; the estimator's gradient is θ − φ_K. The
    query is only looked at. So give training tasks whose support holds all the examples there are of a class
    (10 on Omniglot, 15 on mini-ImageNet), and test tasks with the shots that are asked for.

    Args:
        net: an init/apply pair.
        loss: `loss(outputs, targets) -> scalar` or `-> (scalar, {metric: scalar})`; batches are `(x, y)`.
        num_steps: K, inner steps in training. Evaluation takes many more, 50 in the paper.
        batch_size: examples of an inner step, drawn without repeats from the support for each step anew; all
            of it when None, or where the support has no more.
        rate: of the inner Adam. The second moment starts anew with each task, where the published code
            carries it from one task to the next.
        optimizer: another inner optimizer, in place of Adam with β₁ = 0.

    Returns:
        A `Learner` whose meta is `{"init": params}`.

    Raises:
        ValueError: when `batch_size` or `num_steps` is below 1.
        TypeError: when `optimizer` is none of optax.

    Cost: K inner gradients; memory independent of K. Biased as a gradient of the query loss, and not meant as
    one: to leading order it descends the task's loss and raises the agreement of its minibatch gradients.

    Reference: Nichol, Achiam, Schulman, On first-order meta-learning algorithms, 2018.

    >>> import bilevel as bl
    >>> learner = reptile(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, batch_size=5)
    >>> sorted(learner.init_meta(jax.random.key(0)))
    ['init']
    """
    if batch_size is not None and (
        isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
    ):
        raise ValueError(f"reptile's batch_size must be None or at least 1, got {batch_size!r}")
    problem, predict = supervised(
        net, loss, lambda meta, key: meta["init"], lambda params, meta, x: (params, x)
    )
    if batch_size is not None:
        whole = problem.inner_loss

        def inner_loss(params, meta, batch, key):
            return whole(params, meta, minibatch(batch, batch_size, key), key)

        problem = replace(problem, inner_loss=inner_loss)
    # A momentum would carry the direction of one minibatch into the next, and with few steps dominate them.
    solver = Gradient(optimizer or optax.adam(rate, b1=0.0), num_steps)
    return Learner(problem, solver, hypergrad.Reptile(), lambda key: {"init": net.init(key)}, predict)


def minibatch(batch: Batch, size: int, key: Key) -> Batch:
    """`size` examples of a batch, drawn without repeats; the batch itself where it has no more.

    Args:
        batch: leaves `[n, ...]`.

    >>> x, y = minibatch((jax.numpy.arange(10), jax.numpy.arange(10)), 3, jax.random.key(0))
    >>> x.shape, bool((x == y).all())
    ((3,), True)
    """
    count = len(jax.tree.leaves(batch)[0])
    if size >= count:
        return batch
    rows = choose(key, count, size)
    return jax.tree.map(lambda leaf: leaf[rows], batch)
