"""Hyper-data-cleaning on MNIST: a weight for each training example, half of whose labels are random."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.learners.pretraining import TrainedBy
from bilevel.problem import Estimator, Learner
from bilevel.recipes.experiment import Experiment
from bilevel.tasks.corrupt import flip_noise, uniform_noise
from bilevel.tasks.mnist import mnist

_NUM_CLASSES, _PIXELS = 10, 784


class Cleaning(NamedTuple):
    """The data of the protocol.

    Args:
        train: x float32 [n, 784] of 0..1, noisy labels int32 [n], row numbers int32 [n].
        clean: the same without row numbers, of other training images, with true labels.
        test: the same, of the test images.
        wrong: bool [n], which labels of `train` are wrong.
    """

    train: tuple[np.ndarray, np.ndarray, np.ndarray]
    clean: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    wrong: np.ndarray


def cleaning_data(
    num_train: int,
    num_clean: int,
    share: float,
    seed: int,
    *,
    noise: Literal["uniform", "flip"] = "uniform",
    data: Path | None = None,
    download: bool = False,
) -> Cleaning:
    """Draw the examples from MNIST and corrupt the labels of those to train on.

    Raises:
        ValueError: when more are asked for than there are.
        What `mnist` raises.
    """
    digits = mnist(data, download)
    if num_train + num_clean > len(digits.train_images) or min(num_train, num_clean) < 1:
        raise ValueError(
            f"num_train + num_clean must be at most {len(digits.train_images)}, and each at least 1, "
            f"got {num_train} + {num_clean}"
        )
    rows = np.random.default_rng(seed).permutation(len(digits.train_images))[: num_train + num_clean]
    x, y = flat(digits.train_images[rows]), digits.train_labels[rows]
    corrupt = uniform_noise if noise == "uniform" else flip_noise
    noisy = corrupt(y[:num_train], share, seed)
    return Cleaning(
        (x[:num_train], noisy.labels, np.arange(num_train, dtype=np.int32)),
        (x[num_train:], y[num_train:]),
        (flat(digits.test_images), digits.test_labels),
        noisy.wrong,
    )


def flat(images: np.ndarray) -> np.ndarray:
    """Pictures as rows of 0..1."""
    return images.reshape(len(images), -1).astype(np.float32) / 255


def classifier(hidden: tuple[int, ...]) -> bl.nets.Net:
    """A perceptron of MNIST; a linear one, a convex problem, starts at zero."""
    net = bl.nets.mlp([_PIXELS, *hidden, _NUM_CLASSES])
    return net if hidden else net._replace(init=lambda key: jax.tree.map(jnp.zeros_like, net.init(key)))


def in_words(hidden: tuple[int, ...]) -> str:
    """What `classifier` makes.

    >>> in_words(()), in_words((300,))
    ('linear classifier', 'perceptron 784-300-10')
    """
    sizes = "-".join(map(str, (_PIXELS, *hidden, _NUM_CLASSES)))
    return f"perceptron {sizes}" if hidden else "linear classifier"


def weighted_learner(
    net: bl.nets.Net, num_train: int, decay: float, solver: bl.inner.Gradient, estimator: Estimator
) -> Learner:
    """A classifier trained on weighted examples, and the weights learned for what it does on clean ones.

        min over θ  CE(φ*(θ), clean)   with   φ*(θ) = argmin (1/n) Σ σ(θᵢ) CE(φ; xᵢ, yᵢ) + decay/2 |φ|²

    Args:
        net: `x [n, ...] -> logits [n, classes]`.
        num_train: examples with a weight; a support batch is (x, y, row numbers).
        decay: keeps the inner problem strongly convex in its linear part.
        solver, estimator: any that go together.

    Returns:
        A `Learner` whose meta is θ `[num_train]`, all 0 at first: every weight 1/2.

    Cost: that of the estimator; θ enters the inner loss only, so first-order estimators get nothing.

    Reference: Franceschi, Donini, Frasconi, Pontil, Forward and reverse gradient-based hyperparameter
    optimization, 2017.

    >>> estimator = bl.hypergrad.AmIGO(0.1)
    >>> solver = bl.inner.Gradient(optax.sgd(0.1), 10)
    >>> learner = weighted_learner(bl.nets.mlp([4, 2]), 8, 1e-3, solver, estimator)
    >>> learner.init_meta(jax.random.key(0)).shape
    (8,)
    """

    def cross_entropy(params, batch):
        x, y, *_ = batch
        return optax.softmax_cross_entropy_with_integer_labels(net.apply(params, x), y)

    def inner_loss(params, meta, batch, key):
        weights = jax.nn.sigmoid(meta[batch[2]])
        ridge = 0.5 * decay * optax.tree.norm(params, squared=True)
        return jnp.mean(weights * cross_entropy(params, batch)) + ridge

    def outer_loss(params, meta, batch, key):
        return jnp.mean(cross_entropy(params, batch))

    def metrics(params, meta, batch, key):
        x, y, *_ = batch
        right = jnp.argmax(net.apply(params, x), axis=-1) == y
        return {"loss": outer_loss(params, meta, batch, key), "accuracy": jnp.mean(right)}

    problem = bl.Problem(lambda meta, key: net.init(key), inner_loss, outer_loss, metrics)
    return Learner(
        problem,
        solver,
        estimator,
        init_meta=lambda key: jnp.zeros(num_train),
        predict=lambda params, meta, x: net.apply(params, x),
    )


def found_corruption(wrong: np.ndarray) -> Callable[[jax.Array], dict[str, Any]]:
    """Figures of θ `[n]`: an example counts as found wrong where σ(θᵢ) < 1/2, and is so where `wrong` says.

    >>> found_corruption(np.array([True, True, False]))(jnp.array([-1.0, 1.0, 1.0]))["precision"]
    1.0
    """

    def figures(meta):
        found = np.asarray(meta) < 0
        hits = int(np.sum(found & wrong))
        return {
            "F1 of the found corruption": 2 * hits / max(1, int(found.sum() + wrong.sum())),
            "precision": hits / max(1, int(found.sum())),
            "recall": hits / max(1, int(wrong.sum())),
            "share of wrong labels": float(wrong.mean()),
        }

    return figures


@dataclass(frozen=True)
class HyperCleaning:
    """Find the wrong labels: learn a weight for each of 5000 examples from 5000 clean ones."""

    num_meta_steps: int = 500
    """Outer steps."""
    seed: int = 0
    """Which examples, which labels are corrupted, and all other randomness."""
    estimator: Literal["amigo", "saba", "soba", "ma-soba", "f2sa", "bome", "implicit-cg", "mixed"] = "amigo"
    """How the hypergradient is obtained; single loops carry the classifier along, others train it anew."""
    hidden: tuple[int, ...] = ()
    """Widths of hidden layers: none is a linear softmax classifier; 300 is the published perceptron."""
    num_train: int = 5000
    """Examples with weights."""
    num_clean: int = 5000
    """Clean examples."""
    share: float = 0.5
    """Of the labels, those that are replaced."""
    noise: Literal["uniform", "flip"] = "uniform"
    """By random labels, some of which are right; or by one wrong class for each class."""
    rate: float = 0.1
    """Of the inner steps."""
    decay: float = 1e-3
    """Of the classifier's weights."""
    batch_size: int = 500
    """Rows drawn by a single loop."""
    learning_rate: float = 0.05
    """Of the outer Adam."""
    eval_steps: int = 300
    """Inner steps at evaluation, on all weighted examples."""
    eval_tasks: int = 2
    """Classifiers that are trained and tested; linear ones start alike."""
    data: Path | None = None
    """mnist.npz, or a folder with it or the official files; else BILEVEL_DATA and the cache are tried."""
    download: bool = False
    """Get the official files into the cache folder when no data is found."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=25, checkpoint_every=250))

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
        solver, estimator = self._way()
        learner = weighted_learner(classifier(self.hidden), self.num_train, self.decay, solver, estimator)
        if solver.num_steps == 1:  # a single loop: tested by a classifier that is trained to the end
            learner = replace(learner, solver=self._descent(self.eval_steps), estimator=TrainedBy(learner))
        return Experiment(
            learner=learner,
            optimizer=optax.adam(self.learning_rate),
            sample_tasks=bl.tasks.batch(bl.tasks.Fixed(bl.Task(data.train, data.clean)), 1),
            sample_test=bl.tasks.Fixed(bl.Task(data.train, data.test)),
            protocol=(
                f"MNIST, {self.num_train} training examples, {100 * self.share:g} % of whose labels are "
                f"replaced ({self.noise}), {self.num_clean} clean ones, 10 000 test images; a "
                f"{in_words(self.hidden)} is trained by {self.eval_steps} steps on the weighted examples "
                "and tested"
            ),
            eval_steps=self.eval_steps,
            eval_tasks=self.eval_tasks,
            chance={"accuracy": 1 / _NUM_CLASSES},
            meta_figures=found_corruption(data.wrong),
        )

    def _descent(self, num_steps: int) -> bl.inner.Gradient:
        return bl.inner.Gradient(optax.sgd(self.rate, momentum=0.9), num_steps)

    def _way(self) -> tuple[bl.inner.Gradient, Estimator]:
        hg, size = bl.hypergrad, self.batch_size
        num_steps, estimator = {
            "amigo": lambda: (10, hg.AmIGO(0.1, linear_steps=10, batch_size=size)),
            "saba": lambda: (1, hg.Saba(0.1, batch_size=size)),
            "soba": lambda: (1, hg.Soba(0.1, batch_size=size)),
            "ma-soba": lambda: (1, hg.MaSoba(0.1, batch_size=size)),
            "f2sa": lambda: (1, hg.F2sa(10.0, batch_size=size)),
            "bome": lambda: (1, hg.Bome(0.1)),
            "implicit-cg": lambda: (100, hg.Implicit(hg.cg(20))),
            "mixed": lambda: (50, hg.Mixed()),
        }[self.estimator]()
        return self._descent(num_steps), estimator
