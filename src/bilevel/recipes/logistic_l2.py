"""A penalty for each parameter of a logistic regression (Bengio, 2000; Pedregosa, 2016)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.problem import Learner, Meta, Problem, Task
from bilevel.recipes.estimators import Name, Settings
from bilevel.recipes.experiment import Experiment
from bilevel.tasks.fixed import Fixed
from bilevel.tasks.newsgroups import newsgroups
from bilevel.tasks.tabular import Tabular, tabular

Penalties = Literal["per-parameter", "per-feature", "one"]
MOMENTUM = 0.9


def penalized(num_features: int, num_classes: int) -> tuple[Problem, Callable]:
    """Multinomial logistic regression with penalties that are learned.

        inner = CE(xW + b, y) + ½ Σ e^θ φ²,   φ = (W, b) [num_features + 1, num_classes],   outer = CE

    θ = meta["log_penalty"] is [num_features + 1, num_classes] or broadcasts to it; the last row of φ, the
    biases, is penalized too, so that the inner problem has exactly one solution.

    Returns:
        The problem, and `predict(params, meta, x) -> logits [n, num_classes]`.

    >>> problem, predict = penalized(4, 3)
    >>> predict(problem.init(None, jax.random.key(0)), None, jnp.ones((2, 4))).shape
    (2, 3)
    """

    def predict(params, meta, x):
        return x @ params[:-1] + params[-1]

    def metrics(params, meta, batch, key):
        x, y = batch
        loss, figures = bl.learners.cross_entropy(predict(params, meta, x), y)
        return {"loss": loss, **figures}

    def outer_loss(params, meta, batch, key):
        return metrics(params, meta, batch, key)["loss"]

    def inner_loss(params, meta, batch, key):
        penalty = 0.5 * jnp.sum(jnp.exp(meta["log_penalty"]) * params**2)
        return outer_loss(params, meta, batch, key) + penalty

    shape = (num_features + 1, num_classes)
    return Problem(lambda meta, key: jnp.zeros(shape), inner_loss, outer_loss, metrics), predict


def descent(rate: float, num_steps: int) -> bl.inner.Gradient:
    """Heavy ball whose step is shorter for a parameter that is penalized more, so that none diverges.

        φ ← φ + rate / (1 + rate e^θ) · v,   v ← 0.9 v − ∇φ inner

    >>> descent(0.1, 20).num_steps
    20
    """

    def optimizer(meta: Meta) -> optax.GradientTransformation:
        size = rate / (1 + rate * jnp.exp(meta["log_penalty"]))
        shorten = optax.stateless(lambda updates, params: jax.tree.map(lambda leaf: -size * leaf, updates))
        return optax.chain(optax.trace(MOMENTUM), shorten)

    return bl.inner.Gradient(optimizer, num_steps)


@dataclass(frozen=True)
class LogisticL2:
    """Learn how strongly each weight of a logistic regression is pulled to zero, on validation rows."""

    num_meta_steps: int = 100
    """Outer steps."""
    seed: int = 0
    """All randomness of the run but the split follows from it."""
    data: str = "digits"
    """breast_cancer, digits, iris, wine, newsgroups, or the path of a .csv file with a header line."""
    target: str | None = None
    """The target's column of a .csv file; the last one when left out."""
    split_seed: int = 0
    """Which rows are support, validation and test."""
    penalties: Penalties = "per-parameter"
    """How many are learned: one for each weight and bias, one for each feature and one for the biases, or one
    in all."""
    penalty: float = 0.01
    """Where each of them starts."""
    solver: Literal["gradient", "converged"] = "gradient"
    """A fixed number of gradient steps, or L-BFGS to a tolerance, which has no steps to differentiate."""
    num_steps: int = 200
    """Inner steps of the gradient solver; at most so many of L-BFGS."""
    rate: float = 0.2
    """Inner learning rate of the gradient solver."""
    tolerance: float = 1e-4
    """Of L-BFGS."""
    estimator: Name = "implicit-cg"
    """How the hypergradient is obtained."""
    settings: Settings = field(default_factory=Settings)
    learning_rate: float = 0.1
    """Of the outer Adam."""
    messages: Path | None = None
    """A folder with 20 newsgroups, else BILEVEL_DATA and scikit-learn's cache are tried."""
    download: bool = False
    """Let scikit-learn get 20 newsgroups into its cache when nothing is found."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=10, checkpoint_every=100))

    def __post_init__(self):
        if not self.penalty > 0:
            raise ValueError(f"penalty must be positive, got {self.penalty}; θ is its logarithm")

    def read(self) -> Tabular:
        """The rows.

        Raises:
            ValueError: when they are those of a regression, or there is no such table.
        """
        if self.data == "newsgroups":
            return newsgroups(self.messages, self.download, self.split_seed)
        found = tabular(self.data, self.split_seed, target=self.target)
        if not found.classes:
            raise ValueError(
                f"{self.data} is a regression, expected classes; take digits, or a target of text or whole "
                "numbers"
            )
        return found

    def build(self) -> Experiment:
        """Read the rows and put the experiment together."""
        data = self.read()
        num_features, num_classes = len(data.features), len(data.classes)
        problem, predict = penalized(num_features, num_classes)
        shape = {
            "per-parameter": (num_features + 1, num_classes),
            "per-feature": (num_features + 1, 1),
            "one": (1, 1),
        }[self.penalties]
        learner = Learner(
            problem,
            self._solver(),
            self.settings.estimator(self.estimator),
            lambda key: {"log_penalty": jnp.full(shape, math.log(self.penalty), float)},
            predict,
        )
        sample = Fixed(Task(data.support, data.validation))
        sizes = " / ".join(str(len(part[1])) for part in data[:3])
        return Experiment(
            learner=learner,
            optimizer=optax.adam(self.learning_rate),
            sample_tasks=bl.tasks.batch(sample, 1),
            sample_test=Fixed(Task(data.support, data.test)),
            protocol=f"{self.data}, {sizes} rows of support / validation / test; the test ones judge",
            eval_steps=self.num_steps,
            eval_tasks=2,
            chance={"accuracy": float(np.bincount(data.test[1]).max() / len(data.test[1]))},
            meta_figures=_figures,
            meta_lines=_lines,
        )

    def _solver(self):
        if self.solver == "gradient":
            return descent(self.rate, self.num_steps)
        import optimistix

        return bl.inner.Converged(optimistix.LBFGS(self.tolerance, self.tolerance), self.num_steps)


def _figures(meta: Meta) -> dict[str, float]:
    penalty = np.exp(np.asarray(meta["log_penalty"], np.float64))
    low, middle, high = np.quantile(penalty, [0.05, 0.5, 0.95])
    return {"penalties": penalty.size, "5 % below": low, "median penalty": middle, "5 % above": high}


def _lines(meta: Meta) -> dict[str, jax.Array]:
    logs = jnp.log10(jnp.e) * meta["log_penalty"]
    if logs.size == 1:
        return {}
    lines = {"log10 penalty, from least to most": jnp.sort(logs.ravel())}
    return lines | {"log10 penalty of each feature, the biases last (mean over classes)": logs.mean(1)}
