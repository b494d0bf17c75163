"""Learning to reweight on MNIST, 4 against 9, one of which is rare (Ren, Zeng, Yang, Urtasun, 2018)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.learners.learning_to_reweight import learning_to_reweight
from bilevel.learners.weighted import class_weights, plain_training
from bilevel.recipes.experiment import Experiment
from bilevel.tasks.corrupt import imbalanced_pair
from bilevel.tasks.mnist import mnist
from bilevel.tasks.rows import Rows

RARE, COMMON = 4, 9


@dataclass(frozen=True)
class Reweight:
    """Tell 4 from 9 where nearly all training examples are a 9: weights from a few balanced clean ones."""

    num_meta_steps: int = 1000
    """Steps of the classifier."""
    seed: int = 0
    """Which examples, and all other randomness."""
    weighting: Literal["learned", "plain", "proportion", "resample"] = "learned"
    """Weights learned at every step; or, to compare: equal ones, the inverse of the class frequencies, or
    classes drawn evenly."""
    num_train: int = 5000
    """Training examples."""
    share: float = 0.99
    """Of the training examples, those of the common class."""
    num_clean: int = 10
    """Balanced clean examples; only learned weights look at them."""
    batch_size: int = 100
    """Training examples of a step."""
    filters: int = 16
    """Width of conv4, which has layer norm; 0 for the perceptron 784-100-2."""
    learning_rate: float = 0.05
    """Of the classifier's SGD with momentum, at the start; it falls to 0 along a cosine."""
    data: Path | None = None
    """mnist.npz, or a folder with it or the official files; else BILEVEL_DATA and the cache are tried."""
    download: bool = False
    """Get the official files into the cache folder when no data is found."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, zero_leaves="allow"))

    def build(self) -> Experiment:
        """Put the experiment together."""
        train, clean, test = self._data()
        net = self._net()
        if self.weighting == "learned":
            learner = learning_to_reweight(net)
        elif self.weighting == "proportion":
            learner = plain_training(net, class_weights(jnp.asarray(1 / np.bincount(train[1], minlength=2))))
        else:
            learner = plain_training(net)
        if self.weighting == "resample":
            train = _evenly(train)
        rows = Rows(bl.Task(train, clean), self.batch_size, self.num_clean)
        schedule = optax.cosine_decay_schedule(self.learning_rate, self.num_meta_steps)
        return Experiment(
            learner=learner,
            optimizer=optax.sgd(schedule, momentum=0.9),
            sample_tasks=bl.tasks.batch(rows, 1),
            sample_test=bl.tasks.Fixed(bl.Task(clean, test)),
            protocol=(
                f"MNIST, {RARE} against {COMMON}: {self.num_train} training examples, {100 * self.share:g} % "
                f"of them {COMMON}; {self.num_clean} balanced clean ones, never trained on; all "
                f"{len(test[1])} test images of the two"
            ),
            eval_steps=0,
            eval_tasks=2,
            chance={"accuracy": 0.5},
        )

    def _net(self) -> bl.nets.Net:
        if not self.filters:
            return bl.nets.mlp([784, 100, 2])
        net = bl.nets.conv4(2, self.filters, norm="layer")
        return net._replace(apply=lambda params, x: net.apply(params, x.reshape(-1, 28, 28, 1)))

    def _data(self) -> tuple[tuple, tuple, tuple]:
        """(x, 0 for the rare class and 1 for the common one), to train on, clean, and of the test."""
        digits = mnist(self.data, self.download)
        labels = digits.train_labels
        rows = imbalanced_pair(labels, (RARE, COMMON), self.num_train, self.share, self.seed)
        kept = labels.copy()
        kept[rows] = -1  # the clean ones are others
        clean = np.concatenate(
            [
                np.random.default_rng([self.seed, label]).permutation(np.flatnonzero(kept == label))[:count]
                for label, count in (
                    (RARE, self.num_clean // 2),
                    (COMMON, self.num_clean - self.num_clean // 2),
                )
            ]
        )
        of_pair = np.isin(digits.test_labels, (RARE, COMMON))

        def part(images, labels):
            x = images.reshape(len(images), -1).astype(np.float32) / 255
            return x, (labels == COMMON).astype(np.int32)

        return (
            part(digits.train_images[rows], labels[rows]),
            part(digits.train_images[clean], labels[clean]),
            part(digits.test_images[of_pair], digits.test_labels[of_pair]),
        )


def _evenly(train: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the rare class repeated until there are as many as of the common one."""
    x, y = train
    rare, common = np.flatnonzero(y == 0), np.flatnonzero(y == 1)
    rows = np.concatenate([common, np.resize(rare, len(common))])
    return x[rows], y[rows]
