"""The outer loop: the mean validation loss of the folds, its hypergradient, and L-BFGS-B on the logarithms."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from bilevel.hypergrad.common import split_keys
from bilevel.inner import ClosedForm
from bilevel.problem import Estimator
from bilevel.sklearn.models import Model


@partial(jax.jit, static_argnums=(0, 1))
def _evaluate(model: Model, estimator: Estimator | None, theta: dict, tasks: Any) -> tuple:
    """Loss and hypergradient of each fold, one after another; the tasks, where they go on from."""
    learner, key = model.learner(estimator), jax.random.key(0)
    warm: Callable | None = getattr(model, "warm", None)

    def one(task):
        problem, solver, stats = learner.problem, learner.solver, {}
        if warm is not None:
            inner_key, _ = split_keys(key)
            found = solver.solve(problem, theta, task, inner_key)
            task, stats = warm(task, found.params), found.stats
            # The estimator is handed the solution: `learner` has seen to it that it asks for no more.
            solver = ClosedForm(lambda meta, support, key: support.start)
        state = learner.estimator.init(problem, solver, theta, task, key)
        h, _ = learner.estimator.estimate(problem, solver, theta, task, state, key)
        return h.value, h.grad, {**h.stats, **stats}, task

    return jax.lax.map(one, tasks)


@dataclass
class Evaluation:
    """The cross-validation loss at one point.

    Args:
        params: the hyperparameters, as scikit-learn names them; a value, or one for each feature.
        losses: of each fold.
        gradient: of their mean, in the logarithm of each parameter.
        seconds: since the search began, compilation included.
        doubts: what the estimator has to say against it.
    """

    params: dict[str, Any]
    losses: np.ndarray
    gradient: dict[str, np.ndarray]
    seconds: float
    doubts: list[str]

    @property
    def loss(self) -> float:
        return float(np.mean(self.losses))


@dataclass
class CrossValidation:
    """The mean validation loss over folds as a function of the logarithms of the hyperparameters.

        F(θ) = (1 / folds) Σ_f outer_loss(φ_f*(θ), query_f),   dF/dθ by the model's hypergradient

    Args:
        model: the inner problem.
        estimator: in place of the model's own; None for that.
        tasks: leaves `[folds, ...]` of NumPy.

    Cost of a call: a fit and a hypergradient for each fold. In float64, whatever JAX is set to.
    """

    model: Model
    estimator: Estimator | None
    tasks: Any
    history: list[Evaluation] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def __call__(self, theta: Mapping[str, Any]) -> Evaluation:
        """Also appended to `history`."""
        with jax.enable_x64(True):
            theta = {name: jnp.asarray(value, jnp.float64) for name, value in theta.items()}
            values, grads, stats, tasks = _evaluate(self.model, self.estimator, theta, self.tasks)
            mean = {name: np.mean(np.asarray(grad), 0) for name, grad in grads.items()}
            figures = {name: float(np.mean(np.asarray(value))) for name, value in stats.items()}
            losses = np.asarray(values)
            if hasattr(self.model, "warm") and np.all(np.isfinite(losses)):
                self.tasks = tasks
            doubts = self._doubts(figures)
        params = {name: np.exp(np.asarray(value))[()] for name, value in theta.items()}
        found = Evaluation(params, losses, mean, time.perf_counter() - self.began, doubts)
        self.history.append(found)
        return found

    def _doubts(self, figures: dict[str, float]) -> list[str]:
        ask = getattr(self.model.learner(self.estimator).estimator, "doubts", None)
        return [] if ask is None else ask(figures)


class _Spent(Exception):
    """No evaluation is left."""


def descend(
    objective: CrossValidation,
    start: Mapping[str, np.ndarray],
    bounds: Mapping[str, tuple[float, float]],
    *,
    num_meta_steps: int,
    tolerance: float,
) -> bool:
    """L-BFGS-B from a start; what it saw is in `objective.history`.

    Args:
        start: logarithms, every parameter of the model.
        bounds: of the logarithms; a parameter without bounds stays at its start.
        num_meta_steps: evaluations at most.
        tolerance: it ends where moving any logarithm by 1 changes the loss by a smaller share of it.

    Returns:
        Whether it ended by itself.

    Raises:
        FloatingPointError: when the loss at the start is not finite.
    """
    names = sorted(bounds)
    shapes = [np.shape(start[name]) for name in names]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
    seen: list[float] = []

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        if len(seen) >= num_meta_steps:
            raise _Spent
        parts = [part.reshape(shape) for part, shape in zip(np.split(x, ends), shapes)]
        found = objective({**start, **dict(zip(names, parts))})
        gradient = _flat(found.gradient[name] for name in names)
        good = bool(np.isfinite(found.loss) and np.all(np.isfinite(gradient)))
        if not seen and not good:
            raise FloatingPointError(
                f"the cross-validation loss or its gradient is not finite at the start, {found.params}: the "
                "model cannot be fitted there; scale the features (StandardScaler before it in a Pipeline), or "
                "start from a stronger penalty or a lower learning rate"
            )
        seen.append(found.loss)
        scale = abs(seen[0]) or 1.0
        # A point that cannot be evaluated is a bad one: the line search goes back from it.
        return (found.loss / scale, gradient / scale) if good else (1e6, np.zeros_like(x))

    x = _flat(start[name] for name in names)
    box = [bounds[name] for name, shape in zip(names, shapes) for _ in range(int(np.prod(shape)))]
    options = {"maxfun": 10**9, "maxiter": num_meta_steps, "gtol": tolerance, "ftol": 1e-2 * tolerance}
    try:
        minimize(value_and_gradient, x, jac=True, method="L-BFGS-B", bounds=box, options=options)
    except _Spent:
        return False
    return True


def _flat(parts: Any) -> np.ndarray:
    return np.concatenate([np.ravel(part) for part in parts]).astype(np.float64)


def stack(tasks: Sequence[Any]) -> Any:
    """Tasks of one shape with a leading `[folds]` axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *tasks)
