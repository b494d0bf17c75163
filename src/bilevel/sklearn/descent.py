"""The outer loop: the mean validation loss of the folds, its hypergradient, L-BFGS-B on the logarithms."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from bilevel.inner import ClosedForm
from bilevel.problem import Estimator
from bilevel.sklearn.models import Model


@partial(jax.jit, static_argnums=(0, 1))
def _evaluate(model: Model, estimator: Estimator | None, theta: dict, task: Any) -> tuple:
    """Hypergradient of one fold, and where the next solution is to start from."""
    learner = model.learner(estimator)
    problem, solver, stats = learner.problem, learner.solver, {}
    key = jax.random.key(0, impl="unsafe_rbg")  # nothing is drawn from it; this kind compiles fastest
    start = None
    if model.warm:
        start, stats = solver.solve(problem, theta, task, key)
        task = _from(task, start)
        # The estimator is handed the solution: that it asks for no more `learner` has seen to.
        solver = ClosedForm(lambda meta, support, key: support.start)
    state = learner.estimator.init(problem, solver, theta, task, key)
    h, _ = learner.estimator.estimate(problem, solver, theta, task, state, key)
    return h._replace(stats={**h.stats, **stats}), start


def _from(task: Any, start: Any) -> Any:
    return task._replace(support=task.support._replace(start=start))


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
        tasks: one a fold, of equal shapes.

    Cost of a call: a fit and a hypergradient for each fold, one fold after another: side by side all of them
    would iterate as long as the slowest. In float64, whatever JAX is set to.
    """

    model: Model
    estimator: Estimator | None
    tasks: list[Any]
    history: list[Evaluation] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)

    def __call__(self, theta: Mapping[str, Any]) -> Evaluation:
        """Also appended to `history`."""
        with jax.enable_x64(True):
            theta = {name: jnp.asarray(value, jnp.float64) for name, value in theta.items()}
            found, starts = zip(*(_evaluate(self.model, self.estimator, theta, task) for task in self.tasks))
            losses = np.array([h.value for h in found])
            mean = {name: np.mean([h.grad[name] for h in found], 0) for name in theta}
            if self.model.warm and np.all(np.isfinite(losses)):
                self.tasks = [_from(task, start) for task, start in zip(self.tasks, starts)]
            doubts = self._doubts(
                {name: float(np.mean([h.stats[name] for h in found])) for name in found[0].stats}
            )
        params = {name: np.exp(np.asarray(value))[()] for name, value in theta.items()}
        evaluation = Evaluation(params, losses, mean, time.perf_counter() - self.began, doubts)
        self.history.append(evaluation)
        return evaluation

    def _doubts(self, figures: dict[str, float]) -> list[str]:
        ask = getattr(self.model.learner(self.estimator).estimator, "doubts", None)
        return [] if ask is None else ask(figures)


_ABOUT = (0.25, 0.5, 0.75)  # of the way from the lower to the upper bounds


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
        tolerance: it ends where moving any logarithm by 1 changes the loss by a smaller share of it. If that
            is so at the start already, three points within the bounds are tried first.

    Returns:
        Whether it ended by itself.

    Raises:
        FloatingPointError: when the loss at the start is not finite.
    """
    names = sorted(bounds)
    shapes = [np.shape(start[name]) for name in names]
    sizes = [int(np.prod(shape)) for shape in shapes]
    low, high = (np.repeat([bounds[name][i] for name in names], sizes) for i in (0, 1))
    left = num_meta_steps

    def evaluate(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal left
        if not left:
            raise _Spent
        left -= 1
        parts = [part.reshape(shape) for part, shape in zip(np.split(x, np.cumsum(sizes)[:-1]), shapes)]
        found = objective({**start, **dict(zip(names, parts))})
        gradient = np.concatenate([np.ravel(found.gradient[name]) for name in names])
        return (found.loss if np.all(np.isfinite(gradient)) else np.nan), gradient

    def go_down(x: np.ndarray, first: tuple[float, np.ndarray]) -> bool:
        """Whether there was anywhere to go."""
        loss, gradient = first
        blocked = np.clip(x - gradient, low, high) == x
        steepest = np.max(np.where(blocked, 0, np.abs(gradient)))
        if steepest <= tolerance * abs(loss):
            return False
        known = {x.tobytes(): first}

        def scaled(at: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope = known.pop(at.tobytes(), None) or evaluate(at)
            if not np.isfinite(value):  # a bad point: the line search goes back from it
                return 10 * abs(loss / steepest) + 1, np.zeros_like(at)
            return value / steepest, slope / steepest  # so that the first step is about an e-fold

        options = {"gtol": tolerance * abs(loss) / steepest, "ftol": 1e-2 * tolerance, "maxfun": 10**9}
        minimize(scaled, x, jac=True, method="L-BFGS-B", bounds=np.stack([low, high], 1), options=options)
        return True

    try:
        x = np.concatenate([np.ravel(start[name]) for name in names]).astype(np.float64)
        first = evaluate(x)
        _require_finite(first[0], objective.history[-1].params)
        if not go_down(
            x, first
        ):  # an optimum, or so weak or strong a penalty that nothing changes: look about
            points = [low + share * (high - low) for share in _ABOUT]
            found = [evaluate(point) for point in points]
            best = int(np.argmin([value if np.isfinite(value) else np.inf for value, _ in found]))
            if found[best][0] < first[0]:
                go_down(points[best], found[best])
    except _Spent:
        return False
    return True


def _require_finite(loss: float, params: dict) -> None:
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"the cross-validation loss or its gradient is not finite at the start, {params}: the model "
            "cannot be fitted there; scale the features (a StandardScaler before it), or start from "
            "a stronger penalty or a lower learning rate"
        )
