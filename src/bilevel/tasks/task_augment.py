"""Samplers that change the tasks of another sampler: their pictures, their labels, their classes.

What they fight is meta-overfitting: a learner that remembers the training tasks in place of learning to
learn from the support set. More, harder or mutually exclusive tasks leave less to remember.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.tree_util import Partial, all_leaves, register_dataclass

from bilevel.problem import Key, Task
from bilevel.tasks.augment import Operation, compose, require_probability
from bilevel.tasks.sampling import Sampler, batch


@register_dataclass
@dataclass(frozen=True)
class _Augmented:
    sample: Sampler
    change: Callable[[Task, Key], Task] = field(metadata={"static": True})

    def __call__(self, key: Key) -> Task:
        task_key, change_key = jax.random.split(key)
        return self.change(self.sample(task_key), change_key)


def changed(sample: Sampler, change: Callable[[Task, Key], Task]) -> Sampler:
    """A sampler whose tasks go through `change(task, key) -> task`.

    What comes back is a pytree, as the sampler was: the data of a `FewShot` stay an argument of compiled
    functions. `change` is part of the program: numbers inside it are constants.

    Raises:
        TypeError: when one of the two cannot be called.

    >>> from bilevel.tasks import sinusoid
    >>> halved = changed(sinusoid, lambda task, key: task._replace(query=task.support))
    >>> halved(jax.random.key(0)).query[0].shape
    (10, 1)
    """
    for name, function in (("sample", sample), ("change", change)):
        if not callable(function):
            raise TypeError(f"{name} must be a function, got {type(function).__name__}")
    return _Augmented(Partial(sample) if all_leaves([sample]) else sample, change)


def augmented(sample: Sampler, *operations: Operation, support: bool = True, query: bool = False) -> Sampler:
    """A sampler whose pictures go through operations; labels stay.

    Changes of the support make adaptation robust, changes of the query regularize the outer loss; Ni et
    al. find those of the query to matter most.

    Args:
        sample: `sample(key) -> Task` of `(x, y)` batches.
        operations: `operation(x, key) -> x`, for instance `partial(affine, shift=0.1)`.
        support: whether the support is changed.
        query: whether the query is changed.

    Returns:
        A sampler; batch it with `bl.tasks.batch`.

    Raises:
        ValueError: when there is nothing to do.
        TypeError: when `sample` or an operation cannot be called.

    Reference: Ni, Goldblum, Sharaf, Kong, Goldstein, Data augmentation for meta-learning, 2021.

    >>> from functools import partial
    >>> from bilevel.tasks import Glyphs
    >>> from bilevel.tasks.augment import affine, noise
    >>> sample = augmented(Glyphs(), partial(affine, rotation=0.3), partial(noise, strength=0.1))
    >>> jax.jit(sample)(jax.random.key(0)).support[0].shape
    (5, 28, 28, 1)
    """
    if not operations or not (support or query):
        raise ValueError(
            "augmented has nothing to do: give at least one operation, and set support or query to True"
        )
    operation = compose(*operations)

    def change(task: Task, key: Key) -> Task:
        support_key, query_key = jax.random.split(key)
        (sx, sy), (qx, qy) = task
        return Task(
            (operation(sx, support_key) if support else sx, sy),
            (operation(qx, query_key) if query else qx, qy),
        )

    return changed(sample, change)


def relabeled(sample: Sampler, ways: int) -> Sampler:
    """Tasks whose labels are renamed at random, support and query alike.

    With it no label belongs to an input for good, so what an input means can be read from the support
    alone: tasks are mutually exclusive. Samplers that draw the order of their classes at random, as all of
    this package do, have this already; data with fixed labels need it. Label −1 stays.

    Args:
        ways: labels are 0..ways-1.

    Raises:
        ValueError: when `ways` is below 2.

    Reference: Yin, Tucker, Zhou, Levine, Finn, Meta-learning without memorization, 2020; Rajendran, Irpan,
    Jang, Meta-learning requires meta-augmentation, 2020.

    >>> from bilevel.tasks import FewShot
    >>> sample = FewShot(jnp.ones((10, 4)), jnp.arange(10) % 5, ways=5, shots=1, queries=1)
    >>> sorted(jax.jit(relabeled(sample, 5))(jax.random.key(0)).support[1].tolist())
    [0, 1, 2, 3, 4]
    """
    _require_ways("relabeled", ways)

    def change(task: Task, key: Key) -> Task:
        names = jax.random.permutation(key, ways)

        def rename(part):
            x, y = part
            return x, jnp.where(y < 0, y, names[y].astype(y.dtype))

        return Task(rename(task.support), rename(task.query))

    return changed(sample, change)


def mislabeled(sample: Sampler, ways: int, probability: float) -> Sampler:
    """Tasks with wrong labels in the support: each is replaced, with a probability, by another one.

    The query keeps its labels: what is judged is how well a learner puts up with wrong ones. Label −1 stays.

    Args:
        ways: labels are 0..ways-1.
        probability: of a wrong label, a Python number.

    Raises:
        ValueError, TypeError: when `ways` is below 2, or for a probability that is none.

    >>> from bilevel.tasks import FewShot
    >>> sample = FewShot(jnp.ones((10, 4)), jnp.arange(10) % 5, ways=5, shots=1, queries=1)
    >>> (jax.jit(mislabeled(sample, 5, 1.0))(jax.random.key(0)).support[1] != jnp.arange(5)).tolist()
    [True, True, True, True, True]
    """
    _require_ways("mislabeled", ways)
    require_probability("mislabeled", probability)

    def change(task: Task, key: Key) -> Task:
        x, y = task.support
        wrong_key, which_key = jax.random.split(key)
        wrong = jax.random.bernoulli(wrong_key, probability, y.shape) & (y >= 0)
        other = (y + jax.random.randint(which_key, y.shape, 1, ways, y.dtype)) % ways
        return task._replace(support=(x, jnp.where(wrong, other, y)))

    return changed(sample, change)


def shifted_targets(sample: Sampler, scale: float) -> Sampler:
    """Regression tasks whose targets are all moved by one random number per task: y + scale · z.

    The input alone then says nothing about the height of the target, so the support has to be read.

    Args:
        scale: standard deviation of the shift.

    Reference: Rajendran, Irpan, Jang, Meta-learning requires meta-augmentation, 2020.

    >>> from bilevel.tasks import sinusoid
    >>> shifted_targets(sinusoid, 1.0)(jax.random.key(0)).query[1].shape
    (10, 1)
    """

    def change(task: Task, key: Key) -> Task:
        (sx, sy), (qx, qy) = task
        shift = scale * jax.random.normal(key, sy.shape[1:], sy.dtype)
        return Task((sx, sy + shift), (qx, qy + shift))

    return changed(sample, change)


def mixed_classes(sample: Sampler, alpha: float = 1.0) -> Sampler:
    """Tasks of new classes, each a mixture of two: λ_c x + (1 − λ_c) x′, λ_c ~ Beta(α, α).

    Two tasks are drawn and added picture by picture; every class has one λ for all its examples, so it is
    a class: what its examples share is the mixture. Ni et al. call this task augmentation by mixing.

    Args:
        sample: draws tasks whose labels stand in one order, as those of `FewShot` and `Glyphs` do.
        alpha: small values leave the classes nearly alone, 1 draws λ evenly.

    Raises:
        ValueError: when `alpha` is not above 0.

    Cost: that of two tasks.

    Reference: Ni, Goldblum, Sharaf, Kong, Goldstein, Data augmentation for meta-learning, 2021.

    >>> from bilevel.tasks import FewShot
    >>> sample = FewShot(jnp.ones((10, 4)), jnp.arange(10) % 5, ways=5, shots=1, queries=1)
    >>> jax.jit(mixed_classes(sample))(jax.random.key(0)).query[0].shape
    (5, 4)
    """
    _require_positive("mixed_classes", "alpha", alpha)

    def change(tasks: Task, key: Key) -> Task:
        def mix(part, weights):
            x, y = part
            weight = weights[jnp.maximum(y[0], 0)].reshape(-1, *[1] * (x.ndim - 2))
            # Where the labels of the two tasks differ there is no class to speak of: NaN, and not a guess.
            weight = jnp.where((y[0] == y[1]).reshape(weight.shape), weight, jnp.nan)
            return weight * x[0] + (1 - weight) * x[1], y[0]

        most = tasks.support[1].shape[1] + tasks.query[1].shape[1]  # no label is larger
        weights = jax.random.beta(key, alpha, alpha, (most,), tasks.support[0].dtype)
        return Task(mix(tasks.support, weights), mix(tasks.query, weights))

    return changed(batch(sample, 2), change)


def metamix(sample: Sampler, ways: int, alpha: float = 2.0) -> Sampler:
    """Tasks whose query is mixed with the support, labels too: λ (x_q, y_q) + (1 − λ) (x_s, y_s).

    Every query example gets one support example and its own λ ~ Beta(α, α), at least one half. A learner
    that remembers the query of a training task finds it changed every time. The query's labels become
    probabilities `[n, ways]`, which `cross_entropy` accepts.

    Args:
        ways: labels are 0..ways-1.
        alpha: of the Beta distribution.

    Raises:
        ValueError: when `ways` is below 2, or `alpha` not above 0.

    Reference: Yao, Huang, Zhang, Wei, Tian, Zou, Huang, Li, Improving generalization in meta-learning via
    task augmentation, 2021 (MetaMix, at the input).

    >>> from bilevel.tasks import FewShot
    >>> sample = FewShot(jnp.ones((10, 4)), jnp.arange(10) % 5, ways=5, shots=1, queries=1)
    >>> jax.jit(metamix(sample, 5))(jax.random.key(0)).query[1].shape
    (5, 5)
    """
    _require_ways("metamix", ways)
    _require_positive("metamix", "alpha", alpha)

    def change(task: Task, key: Key) -> Task:
        (sx, sy), (qx, qy) = task
        pick_key, weight_key = jax.random.split(key)
        # Padded support examples (label -1) are never the partner.
        partner = jax.random.categorical(pick_key, jnp.where(sy < 0, -jnp.inf, 0.0), shape=qy.shape)
        weight = jax.random.beta(weight_key, alpha, alpha, qy.shape, qx.dtype)
        weight = jnp.maximum(weight, 1 - weight)[:, None]
        labels = weight * jax.nn.one_hot(qy, ways) + (1 - weight) * jax.nn.one_hot(sy[partner], ways)
        labels = jnp.where(qy[:, None] < 0, 0.0, labels)  # a padded query example counts nowhere
        wide = weight.reshape(-1, *[1] * (qx.ndim - 1))
        return task._replace(query=(wide * qx + (1 - wide) * sx[partner], labels))

    return changed(sample, change)


def _require_ways(name: str, ways: int) -> None:
    if isinstance(ways, bool) or not isinstance(ways, int) or ways < 2:
        raise ValueError(f"{name}: ways must be a whole number of at least 2, got {ways!r}")


def _require_positive(name: str, what: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: {what} must be above 0, got {value}")
