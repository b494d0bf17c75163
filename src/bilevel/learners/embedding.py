"""What learners that compare embeddings share: absent classes, the problem around a formula."""

from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

from bilevel.hypergrad import Unroll
from bilevel.inner import ClosedForm
from bilevel.learners.losses import cross_entropy
from bilevel.nets import Net
from bilevel.problem import Batch, Estimator, Key, Learner, Meta, Params, Problem, Scalar

# In place of minus infinity, which times the zero of a one-hot code is NaN.
ABSENT = -1e9

Embed = Callable[[Meta, jax.Array], jax.Array]


def embed_with(net: Net) -> Embed:
    """`embed(meta, x) -> [n, d]` of a network whose parameters are `meta["embed"]`."""
    return lambda meta, x: net.apply(meta["embed"], x)


def embed_noisily_with(net: Net) -> Callable[[Meta, jax.Array, Key], jax.Array]:
    """The same for the outer loss of training, with dropout and the like where the network has them."""
    noisy = getattr(net, "noisy", None)
    if noisy is None:
        return lambda meta, x, key: net.apply(meta["embed"], x)
    return lambda meta, x, key: noisy(meta["embed"], x, key)


def memberships(labels: jax.Array, ways: int, dtype: Any = jnp.float32) -> jax.Array:
    """Which example is of which class, `[n, ways]`; the row of a padded example (label −1) is zero.

    >>> print(memberships(jnp.array([1, 0, -1]), 2))
    [[0. 1.]
     [1. 0.]
     [0. 0.]]
    """
    return jax.nn.one_hot(labels, ways, dtype=dtype)


def class_means(features: jax.Array, labels: jax.Array, ways: int) -> tuple[jax.Array, jax.Array]:
    """The mean of each class, and whether the class has any example.

    Args:
        features: `[n, d]`.
        labels: int `[n]`; −1 counts nowhere.
        ways: number of classes.

    Returns:
        Means `[ways, d]`, zero for a class without an example, and `present [ways]` of ones and zeros.

    >>> means, present = class_means(jnp.array([[1.0], [3.0], [9.0]]), jnp.array([0, 0, -1]), 2)
    >>> print(means.ravel(), present)
    [2. 0.] [1. 0.]
    """
    members = memberships(labels, ways, features.dtype)
    counts = members.sum(0)
    return members.T @ features / jnp.maximum(counts, 1)[:, None], jnp.minimum(counts, 1)


def mask_absent(logits: jax.Array, present: jax.Array) -> jax.Array:
    """`logits [n, ways]` with classes that have no support out of reach."""
    return jnp.where(present > 0, logits, ABSENT)


def unit_rows(x: jax.Array) -> jax.Array:
    """Each row divided by its length; a row of zeros stays one, with a finite derivative.

    >>> print(unit_rows(jnp.array([[3.0, 4.0], [0.0, 0.0]])))
    [[0.6 0.8]
     [0.  0. ]]
    """
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-12))


def check_ways(learner: str, ways: int) -> None:
    """Refuse what is no number of classes."""
    if isinstance(ways, bool) or not isinstance(ways, int) or ways < 2:
        raise ValueError(f"{learner}: ways must be a whole number of at least 2, got {ways!r}")


def no_start(learner: str) -> Callable[[Meta, Key], NoReturn]:
    """The `init` of a problem whose solution is a formula: its shape is that of the support's."""

    def init(meta, key):
        raise ValueError(
            f"{learner} solves its inner problem by a formula and has no starting point; keep its own "
            "solver, with bl.hypergrad.Unroll(), Mixed() or Forward()"
        )

    return init


def closed_form_learner(
    name: str,
    init_meta: Callable[[Key], Meta],
    fit: Callable[[Meta, Batch], Params],
    inner_loss: Callable[[Params, Meta, Batch], Scalar],
    logits: Callable[[Params, Meta, jax.Array], jax.Array],
    noisy_logits: Callable[[Params, Meta, jax.Array, Key], jax.Array],
    loss: Callable = cross_entropy,
    estimator: Estimator | None = None,
) -> Learner:
    """A learner whose inner solution is a formula of the support.

    Args:
        name: in messages.
        fit: `fit(meta, support) -> params`, the solution.
        inner_loss: what it minimizes.
        logits: `logits(params, meta, x) -> [n, ways]`.
        noisy_logits: the same in the outer loss of training, with a key.
        loss: `loss(logits, labels) -> scalar` or `-> (scalar, {metric: scalar})`.
    """

    def judge(outputs, labels):
        result = loss(outputs, labels)
        return result if isinstance(result, tuple) else (result, {})

    def outer_loss(params, meta, batch, key):
        x, labels = batch
        return judge(noisy_logits(params, meta, x, key), labels)[0]

    def metrics(params, meta, batch, key):
        x, labels = batch
        value, figures = judge(logits(params, meta, x), labels)
        return {"loss": value, **figures}

    problem = Problem(
        init=no_start(name),
        inner_loss=lambda params, meta, batch, key: inner_loss(params, meta, batch),
        outer_loss=outer_loss,
        metrics=metrics,
    )
    solver = ClosedForm(lambda meta, support, key: fit(meta, support))
    return Learner(problem, solver, estimator or Unroll(), init_meta, logits)
