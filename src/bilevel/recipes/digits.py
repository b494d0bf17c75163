"""MNIST as the one data set of a recipe: support, validation and test pictures, and a classifier of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import optax

import bilevel as bl
from bilevel.problem import Learner, Loss, Problem, Task
from bilevel.recipes.experiment import Experiment
from bilevel.tasks.fixed import Fixed
from bilevel.tasks.mnist import mnist

Batch = tuple[np.ndarray, np.ndarray]
NUM_CLASSES = 10
_JUDGED = 10_000  # pictures that a figure is the mean over, at most


class Parts(NamedTuple):
    """Pictures float32 [n, side, side, 1] in 0..1 and labels int32 [n] of each part."""

    support: Batch
    validation: Batch
    test: Batch


@dataclass(frozen=True)
class Digits:
    """How much of MNIST is for what."""

    num_support: int = 500
    """Training pictures that the inner loop trains on."""
    num_validation: int = 5000
    """Training pictures that the outer loss is measured on."""
    num_test: int = 10_000
    """Test pictures, at most 10 000."""
    pool: Literal[1, 2, 4] = 2
    """Side of the squares of pixels that are averaged to one: 1 keeps 28 x 28, 2 makes 14 x 14."""
    split_seed: int = 0
    """Which training pictures are support, and which validation."""
    data: Path | None = None
    """mnist.npz or a folder with it or the official files, else BILEVEL_DATA and the cache are tried."""
    download: bool = False
    """Get the official files into the cache folder when no data is found."""

    def __post_init__(self):
        if min(self.num_support, self.num_validation, self.num_test) < 1:
            raise ValueError(
                f"expected at least 1 picture in each part, got num_support={self.num_support}, "
                f"num_validation={self.num_validation}, num_test={self.num_test}"
            )
        if self.num_support + self.num_validation > 60_000:
            raise ValueError(
                f"MNIST has 60000 training pictures, got num_support={self.num_support} and "
                f"num_validation={self.num_validation}; take fewer of either"
            )

    @property
    def side(self) -> int:
        """Of a picture, in pixels."""
        return 28 // self.pool

    def read(self) -> Parts:
        """The pictures; the parts have none in common."""
        found = mnist(self.data, self.download)
        rows = np.random.default_rng(self.split_seed).permutation(len(found.train_images))
        first, second = np.split(rows[: self.num_support + self.num_validation], [self.num_support])
        test = slice(self.num_test)
        return Parts(
            (pooled(found.train_images[first], self.pool), found.train_labels[first]),
            (pooled(found.train_images[second], self.pool), found.train_labels[second]),
            (pooled(found.test_images[test], self.pool), found.test_labels[test]),
        )

    def experiment(
        self,
        learner: Learner,
        optimizer: optax.GradientTransformation,
        *,
        eval_steps: int,
        **more: Any,
    ) -> Experiment:
        """The experiment of a learner on these pictures; `more` are further fields of `Experiment`."""
        parts = self.read()
        sample = Fixed(Task(parts.support, parts.validation))
        return Experiment(
            learner=learner,
            optimizer=optimizer,
            sample_tasks=bl.tasks.batch(sample, 1),
            sample_test=Fixed(Task(parts.support, parts.test)),
            protocol=(
                f"MNIST {self.side} x {self.side}: trained on {self.num_support} pictures, θ chosen on "
                f"{self.num_validation} others, judged on {len(parts.test[1])} test pictures; ± over random "
                "starts, not over pictures"
            ),
            eval_steps=eval_steps,
            eval_tasks=2,
            chance={"accuracy": 1 / NUM_CLASSES},
            **more,
        )


def pooled(images: np.ndarray, pool: int) -> np.ndarray:
    """Bytes [n, height, width] as floats in 0..1, squares of pixels averaged: [n, height / pool, ..., 1].

    >>> pooled(np.full((1, 28, 28), 255, np.uint8), 2).shape
    (1, 14, 14, 1)
    """
    n, height, width = images.shape
    squares = images.reshape(n, height // pool, pool, width // pool, pool).astype(np.float32)
    return squares.mean((2, 4))[..., None] / 255


def perceptron(side: int, hidden: tuple[int, ...]) -> bl.nets.Net:
    """An MLP that takes pictures.

    >>> net = perceptron(14, (8,))
    >>> net.apply(net.init(jax.random.key(0)), jax.numpy.ones((3, 14, 14, 1))).shape
    (3, 10)
    """
    net = bl.nets.mlp([side * side, *hidden, NUM_CLASSES])
    return bl.nets.Net(net.init, lambda params, x: net.apply(params, x.reshape(len(x), -1)))


def drawn(batch: tuple[jax.Array, jax.Array], size: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A minibatch of `size` examples that the key draws, with replacement; 0 takes all.

    >>> drawn((jax.numpy.ones((9, 4)), jax.numpy.arange(9)), 3, jax.random.key(0))[0].shape
    (3, 4)
    """
    x, y = batch
    if not size:
        return x, y
    rows = jax.random.randint(key, (size,), 0, len(x))
    return x[rows], y[rows]


def classifier(net: bl.nets.Net, inner_loss: Loss, outer_batch: int = 0) -> tuple[Problem, Callable]:
    """A classifier trained by `inner_loss` from a random start, judged by its cross-entropy.

        outer = CE(φ; query)

    Args:
        net: pictures to logits.
        inner_loss: as of a `Problem`.
        outer_batch: pictures that the outer loss draws each time it is asked; 0 takes the whole query. The
            figures (loss, accuracy) are always of the first 10 000.

    Returns:
        The problem, and `predict(params, meta, x) -> logits`.

    >>> problem, predict = classifier(perceptron(14, ()), lambda params, meta, batch, key: 0.0)
    >>> problem.init(None, jax.random.key(0))["head"]["w"].shape
    (196, 10)
    """

    def outer_loss(params, meta, batch, key):
        x, y = drawn(batch, outer_batch, key)
        return bl.learners.cross_entropy(net.apply(params, x), y)[0]

    def metrics(params, meta, batch, key):
        x, y = batch
        loss, figures = bl.learners.cross_entropy(net.apply(params, x[:_JUDGED]), y[:_JUDGED])
        return {"loss": loss, **figures}

    problem = Problem(lambda meta, key: net.init(key), inner_loss, outer_loss, metrics)
    return problem, lambda params, meta, x: net.apply(params, x)
