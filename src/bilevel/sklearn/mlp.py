"""Multilayer perceptrons as inner problems: scikit-learn's start, minibatches and optimizer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.utils import check_random_state, gen_batches, shuffle

from bilevel import hypergrad, inner
from bilevel.inner.gradient import GradientState, unroll
from bilevel.linalg import reverse_gradient
from bilevel.problem import Estimator, Learner, Problem, Solution, Task
from bilevel.sklearn.folds import Fold
from bilevel.sklearn.losses import log_loss, squared_error

ACTIVATIONS = {
    "identity": lambda x: x,
    "logistic": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
}


class Rows(NamedTuple):
    """The support of a fold.

    Args:
        x, y, w: `[n, d]`, `[n, t]`, `[n]`.
        order: int32 `[num_steps, batch_size]`, the rows of each minibatch; -1 where there is none.
        start: the first weights, (w, b) of each layer.
    """

    x: Any
    y: Any
    w: Any
    order: Any
    start: Any


@dataclass(frozen=True)
class Minibatches:
    """Steps of an optimizer, each on the rows that the task names for it, from the weights it names.

    Args:
        steps: the optimizer and the number of steps.

    A step without rows changes nothing: folds of different size have different numbers of steps.

    >>> Minibatches(inner.Gradient(optax.sgd(0.1), 5)).num_steps
    5
    """

    steps: inner.Gradient

    @property
    def num_steps(self) -> int:
        return self.steps.num_steps

    def init(self, problem, meta, task, key) -> GradientState:
        """The start of the task, and the optimizer's first state."""
        return self.steps.init(replace(problem, init=lambda meta, key: task.support.start), meta, task, key)

    def step(self, problem, meta, task, state, key, gradient: Callable = reverse_gradient):
        """One step on one minibatch."""
        rows = task.support.order[state.step]
        there = rows >= 0
        x, y, w, *rest = task.support
        some = jnp.any(there)
        # Where there is no row the step is computed all the same, and dropped: it must not be NaN.
        batch = Rows(x[rows], y[rows], jnp.where(there, w[rows], ~some), *rest)
        after, loss = self.steps.step(problem, meta, task._replace(support=batch), state, key, gradient)
        kept = jax.tree.map(lambda new, old: jnp.where(some, new, old), after, state)
        return kept._replace(step=state.step + 1), loss

    def solve(self, problem, meta, task, key) -> Solution:
        """All steps."""
        return Solution(unroll(problem, self, meta, task, key)[0].params, {})


@dataclass(frozen=True)
class MlpModel:
    """`sklearn.neural_network.MLPClassifier` or `MLPRegressor`, trained by the same steps.

        φ_{k+1} = optimizer(∇φ [ Σ_{i in batch k} wᵢ lossᵢ + α/2 |W|² ] / Σ_{i in batch k} wᵢ)

    The start and the minibatches are those that scikit-learn draws from the same seed. All `max_iter` passes
    are made: its rule for stopping early has no derivative. ε of adam is added after the bias correction, as
    in optax; scikit-learn adds it before.

    Cost: about 4 trainings a fold; memory √K states of the network. Exact for the steps run.

    >>> MlpModel((8,), "relu", "adam", (0.9, 0.999, 1e-8), 20, True, 5, 30, True).names
    ('alpha', 'learning_rate_init')
    """

    hidden: tuple[int, ...]
    activation: str
    solver: str
    moments: tuple[float, float, float]  # of adam: β₁, β₂, ε; of sgd: momentum, nesterov, not used
    batch_size: int
    shuffle: bool
    max_iter: int
    num_steps: int
    classifier: bool
    names: ClassVar[tuple[str, ...]] = ("alpha", "learning_rate_init")
    per_feature: ClassVar[str | None] = None
    warm: ClassVar[bool] = False

    def learner(self, estimator: Estimator | None) -> Learner:
        """The bilevel problem."""
        loss = log_loss if self.classifier else squared_error
        activation, (a, b, c) = ACTIVATIONS[self.activation], self.moments

        def outputs(params, x):
            for w, bias in params[:-1]:
                x = activation(x @ w + bias)
            return x @ params[-1][0] + params[-1][1]

        def inner_loss(params, meta, rows, key):
            # scikit-learn descends along half the squared error, summed over the targets.
            fit = loss(outputs(params, rows.x), rows.y, rows.w)
            fit = fit if self.classifier else 0.5 * rows.y.shape[1] * fit
            squares = sum(jnp.sum(w**2) for w, _ in params)
            return fit + 0.5 * jnp.exp(meta["alpha"]) * squares / rows.w.sum()

        def outer_loss(params, meta, batch, key):
            x, y, w = batch
            return loss(outputs(params, x), y, w)

        def optimizer(meta):
            rate = jnp.exp(meta["learning_rate_init"])
            if self.solver == "adam":
                return optax.adam(rate, a, b, c)
            return optax.sgd(rate, a or None, nesterov=bool(b))

        # Short trainings keep every state: what checkpoints save in memory they cost in compilation.
        keep = inner.Sqrt() if self.num_steps > 500 else None
        problem = Problem(lambda meta, key: (), inner_loss, outer_loss)
        solver = Minibatches(inner.Gradient(optimizer, self.num_steps))
        return Learner(problem, solver, estimator or hypergrad.Mixed(keep))

    def task(self, fold: Fold, seed: int) -> Task:
        """Draws what scikit-learn draws, in its order."""
        (x, y, w), query, count, width = fold
        rng = check_random_state(seed)
        sizes, start = [width, *self.hidden, y.shape[1]], []
        for ins, outs in pairwise(sizes):
            bound = np.sqrt((2.0 if self.activation == "logistic" else 6.0) / (ins + outs))
            start.append((rng.uniform(-bound, bound, (ins, outs)), rng.uniform(-bound, bound, outs)))
        # The weights of a feature of padding, zero throughout, are zero and stay so: nothing pulls at them.
        start[0] = (np.pad(start[0][0], [(0, x.shape[1] - width), (0, 0)]), start[0][1])
        return Task(Rows(x, y, w, self._order(rng, count), tuple(start)), query)

    def _order(self, rng, count: int) -> np.ndarray:
        size = min(self.batch_size, count)
        rows, order = np.arange(count), []
        for _ in range(self.max_iter):
            rows = np.asarray(shuffle(rows, random_state=rng)) if self.shuffle else rows
            order += [rows[part] for part in gen_batches(count, size)]
        filled = np.full((self.num_steps, self.batch_size), -1, np.int32)
        for number, batch in enumerate(order):
            filled[number, : len(batch)] = batch
        return filled
