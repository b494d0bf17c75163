"""Meta-Weight-Net on MNIST with noisy or imbalanced labels (Shu et al., 2019)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.learners.meta_weight_net import example_weights, meta_weight_net
from bilevel.learners.weighted import plain_training
from bilevel.recipes.experiment import Experiment
from bilevel.tasks.corrupt import flip_noise, long_tailed, uniform_noise
from bilevel.tasks.mnist import mnist
from bilevel.tasks.rows import Rows

LARGEST_LOSS, _POINTS = 10.0, 101


@dataclass(frozen=True)
class MetaWeightNet:
    """Learn how much an example should count given its loss, while the classifier trains on wrong labels."""

    num_meta_steps: int = 3000
    """Steps of the classifier and of the weight network."""
    seed: int = 0
    """Which examples, which labels are corrupted, and all other randomness."""
    weighting: Literal["learned", "plain"] = "learned"
    """Learned weights; or equal ones, to compare."""
    bias: Literal["uniform", "flip", "imbalance"] = "uniform"
    """What is wrong with the training examples: random labels, labels of one other class for each class, or
    classes that get rarer and rarer."""
    num_train: int = 10_000
    """Training examples; with imbalance what is left of them."""
    num_clean: int = 1000
    """Clean balanced examples."""
    share: float = 0.6
    """Of the labels, those that are replaced."""
    imbalance: float = 100.0
    """How many times the largest class is as large as the smallest."""
    batch_size: int = 100
    """Training examples, and clean ones, of a step."""
    hidden: tuple[int, ...] = (300,)
    """Widths of the classifier's hidden layers."""
    units: int = 100
    """Hidden units of the weight network."""
    learning_rate: float = 0.05
    """Of the classifier's SGD with momentum, at the start; it falls to 0 along a cosine."""
    weight_learning_rate: float = 1e-4
    """Of the weight network's Adam; from 1e-3 on it may end with all weights at 1."""
    decay: float = 5e-4
    """Weight decay of the classifier."""
    data: Path | None = None
    """mnist.npz, or a folder with it or the official files; else BILEVEL_DATA and the cache are tried."""
    download: bool = False
    """Get the official files into the cache folder when no data is found."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100))

    def build(self) -> Experiment:
        """Put the experiment together."""
        train, clean, test = self._data()
        net = bl.nets.mlp([784, *self.hidden, 10])
        learned = self.weighting == "learned"
        learner = (
            meta_weight_net(net, self.learning_rate, hidden=self.units) if learned else plain_training(net)
        )
        rows = Rows(bl.Task(train, clean), self.batch_size, self.batch_size)
        return Experiment(
            learner=learner,
            optimizer=self._optimizer(),
            sample_tasks=bl.tasks.batch(rows, 1),
            sample_test=bl.tasks.Fixed(bl.Task(clean, test)),
            protocol=(
                f"MNIST, {len(train[1])} training examples with {self._in_words()}; {self.num_clean} clean "
                "ones, never trained on; 10 000 test images"
            ),
            eval_steps=0,
            eval_tasks=2,
            chance={"accuracy": 0.1},
            meta_lines=_weight_curve if learned else None,
        )

    def _in_words(self) -> str:
        if self.bias == "imbalance":
            return f"classes of which the largest is {self.imbalance:g} times the smallest"
        return f"{100 * self.share:g} % of the labels replaced ({self.bias})"

    def _optimizer(self) -> optax.GradientTransformation:
        schedule = optax.cosine_decay_schedule(self.learning_rate, self.num_meta_steps)
        model = optax.chain(optax.add_decayed_weights(self.decay), optax.sgd(schedule, momentum=0.9))
        parts: dict[Any, optax.GradientTransformation] = {
            "model": model,
            "weights": optax.adam(self.weight_learning_rate),
        }
        return optax.multi_transform(parts, lambda meta: {name: name for name in meta})

    def _data(self) -> tuple[tuple, tuple, tuple]:
        """(x, labels) to train on, clean, and of the test."""
        digits = mnist(self.data, self.download)
        rng = np.random.default_rng(self.seed)
        rows = rng.permutation(len(digits.train_images))
        clean = _balanced(digits.train_labels, rows, self.num_clean)
        rows = rows[~np.isin(rows, clean)]
        if self.num_train > len(rows):
            raise ValueError(
                f"num_train must be at most {len(rows)} beside the clean examples, got {self.num_train}"
            )
        rows = rows[: self.num_train]
        labels = digits.train_labels[rows]
        if self.bias == "imbalance":
            kept = long_tailed(labels, self.imbalance, self.seed)
            rows, labels = rows[kept], labels[kept]
        else:
            corrupt = uniform_noise if self.bias == "uniform" else flip_noise
            labels = corrupt(labels, self.share, self.seed).labels

        def flat(images):
            return images.reshape(len(images), -1).astype(np.float32) / 255

        return (
            (flat(digits.train_images[rows]), labels),
            (flat(digits.train_images[clean]), digits.train_labels[clean]),
            (flat(digits.test_images), digits.test_labels),
        )


def _balanced(labels: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """The first rows of each class in this order, `count` in all."""
    if count < 10 or count % 10:
        raise ValueError(f"num_clean must be a multiple of 10, as many of each class, got {count}")
    return np.concatenate([order[labels[order] == label][: count // 10] for label in range(10)])


def _weight_curve(meta: dict) -> dict[str, np.ndarray]:
    losses = jnp.linspace(0.0, LARGEST_LOSS, _POINTS)
    return {
        f"weight of an example by its loss, 0 to {LARGEST_LOSS:g}": np.asarray(example_weights(meta, losses))
    }
