"""Influence of training examples on MNIST: which of them harm, and whether these are the mislabelled ones."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.analysis.influence import precision_at, weighted_rows
from bilevel.problem import Learner
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.hyper_cleaning import Cleaning, classifier, cleaning_data, in_words

_COUNTS = (10, 50, 100, 200, 500)
_PICTURED = 20


@dataclass(frozen=True)
class Influence:
    """Rank training examples by what they do to the loss on clean ones: one hypergradient at equal weights.

    The weights start at 1 and take one step against the hypergradient with rate 1, so that meta is one less
    the influence of each example.
    """

    num_meta_steps: int = 1
    """Outer steps; the influence is the first."""
    seed: int = 0
    """Which examples, which labels are wrong, and all other randomness."""
    hidden: tuple[int, ...] = ()
    """Widths of hidden layers: none is a linear softmax classifier."""
    num_train: int = 5000
    """Training examples."""
    num_clean: int = 5000
    """Clean examples, on which the loss is measured."""
    share: float = 0.1
    """Of the labels, those that are replaced."""
    noise: Literal["uniform", "flip"] = "uniform"
    """By random labels, some of which are right; or by one wrong class for each class."""
    decay: float = 1e-2
    """Of the classifier's weights: the smaller, the longer its training and the linear solve."""
    num_steps: int = 300
    """Steps that train the classifier."""
    linear_steps: int = 50
    """Steps of conjugate gradients."""
    data: Path | None = None
    """mnist.npz, or a folder with it or the official files; else BILEVEL_DATA and the cache are tried."""
    download: bool = False
    """Get the official files into the cache folder when no data is found."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=1))

    def build(self) -> Experiment:
        """Put the experiment together."""
        data = cleaning_data(
            self.num_train,
            self.num_clean,
            self.share,
            self.seed,
            noise=self.noise,
            data=self.data,
            download=self.download,
        )
        train = data.train[:2]
        return Experiment(
            learner=self._learner(),
            optimizer=optax.sgd(1.0),
            sample_tasks=bl.tasks.batch(bl.tasks.Fixed(bl.Task(train, data.clean)), 1),
            sample_test=bl.tasks.Fixed(bl.Task(train, data.test)),
            protocol=(
                f"MNIST, {self.num_train} training examples, {100 * self.share:g} % of whose labels are "
                f"replaced ({self.noise}); a {in_words(self.hidden)}; its loss on {self.num_clean} clean "
                "ones, differentiated in the weight of each training example"
            ),
            eval_steps=self.num_steps,
            eval_tasks=2,
            chance={"accuracy": 0.1},
            meta_figures=_figures(data),
            meta_pictures=_pictures(data),
        )

    def _learner(self) -> Learner:
        net = classifier(self.hidden)

        def cross_entropy(params, batch):
            x, y = batch
            logits = net.apply(params, x)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return jnp.mean(losses), jnp.mean(jnp.argmax(logits, axis=-1) == y)

        def inner_loss(params, meta, batch, key):
            return cross_entropy(params, batch)[0] + 0.5 * self.decay * optax.tree.norm(params, squared=True)

        def metrics(params, meta, batch, key):
            loss, accuracy = cross_entropy(params, batch)
            return {"loss": loss, "accuracy": accuracy}

        plain = bl.Problem(
            init=lambda meta, key: net.init(key),
            inner_loss=inner_loss,
            outer_loss=lambda params, meta, batch, key: cross_entropy(params, batch)[0],
            metrics=metrics,
        )
        return Learner(
            weighted_rows(plain, ()),
            bl.inner.Gradient(optax.sgd(0.1, momentum=0.9), self.num_steps),
            bl.hypergrad.Implicit(bl.hypergrad.cg(self.linear_steps)),
            init_meta=lambda key: jnp.ones(self.num_train),
            predict=lambda params, meta, x: net.apply(params, x),
        )


def _figures(data: Cleaning) -> Callable[[jax.Array], dict[str, Any]]:
    def figures(meta):
        counts = sorted({*(n for n in _COUNTS if n <= len(data.wrong)), int(data.wrong.sum())} - {0})
        precision = precision_at(1 - np.asarray(meta), data.wrong, tuple(counts))
        named = {f"wrong labels among the {n} most harmful": value for n, value in precision.items()}
        return {**named, "share of wrong labels": float(data.wrong.mean())}

    return figures


def _pictures(data: Cleaning) -> Callable[[jax.Array], dict[str, Any]]:
    def pictures(meta):
        order = np.argsort(np.asarray(meta), kind="stable")
        images, labels = data.train[0].reshape(-1, 28, 28), data.train[1]
        shown = {"most harmful": order[:_PICTURED], "most useful": order[::-1][:_PICTURED]}
        return {
            f"{name}, labelled {' '.join(map(str, labels[rows]))}": images[rows]
            for name, rows in shown.items()
        }

    return pictures
