"""Which scikit-learn estimators have a differentiable twin, and what is refused."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neural_network import MLPClassifier, MLPRegressor

from bilevel.problem import Estimator, Learner, Task
from bilevel.sklearn.folds import Fold, rounded
from bilevel.sklearn.kernel import KernelRidgeModel
from bilevel.sklearn.linear import LogisticModel, RidgeModel
from bilevel.sklearn.mlp import ACTIVATIONS, MlpModel


class Model(Protocol):
    """A model of scikit-learn as an inner problem: a value, so that equal ones are compiled once.

    Args:
        names: the parameters that it can tune.
        per_feature: the one that may have a value for each feature.
        warm: whether its solver begins at `task.support.start`, and so goes on from the solution before.
    """

    names: ClassVar[tuple[str, ...]]
    per_feature: ClassVar[str | None]
    warm: ClassVar[bool]

    def learner(self, estimator: Estimator | None) -> Learner:
        """Problem, solver and estimator; `estimator` in place of the default."""
        ...

    def task(self, fold: Fold, seed: int) -> Task:
        """A fold as its inner problem reads it, arrays of NumPy."""
        ...


@dataclass(frozen=True)
class Parameter:
    """A parameter that is tuned on a logarithmic scale.

    Args:
        start: `start(estimator, num_features)`, where the search begins.
        low, high: where it stays unless `param_space` says otherwise.
    """

    start: Callable[[Any, int], float]
    low: float
    high: float


def _of(name: str) -> Callable[[Any, int], float]:
    return lambda estimator, num_features: getattr(estimator, name)


PARAMETERS: dict[type, dict[str, Parameter]] = {
    Ridge: {"alpha": Parameter(_of("alpha"), 1e-6, 1e6)},
    LogisticRegression: {"C": Parameter(_of("C"), 1e-6, 1e6)},
    KernelRidge: {
        "alpha": Parameter(_of("alpha"), 1e-8, 1e3),
        "gamma": Parameter(lambda e, d: 1 / d if e.gamma is None else e.gamma, 1e-6, 1e3),
    },
    MLPClassifier: {
        "alpha": Parameter(_of("alpha"), 1e-8, 1e3),
        "learning_rate_init": Parameter(_of("learning_rate_init"), 1e-5, 0.3),
    },
}
PARAMETERS[MLPRegressor] = PARAMETERS[MLPClassifier]


def parameters(estimator: Any) -> dict[str, Parameter]:
    """What can be tuned of an estimator.

    Raises:
        TypeError: when it has no differentiable twin.
        ValueError: when one of its settings has none.

    >>> list(parameters(Ridge()))
    ['alpha']
    """
    found = PARAMETERS.get(type(estimator))
    if found is None:
        raise TypeError(
            f"HypergradientSearchCV has no differentiable twin of {type(estimator).__name__}; it has "
            f"{', '.join(sorted(kind.__name__ for kind in PARAMETERS))}, alone or as the last step of a "
            "Pipeline. For other models use black-box search: bilevel search, or GridSearchCV"
        )
    for name, allowed, instead in _SETTINGS[type(estimator)]:
        value = getattr(estimator, name, None)
        if value not in allowed:
            raise ValueError(
                f"HypergradientSearchCV cannot differentiate {type(estimator).__name__}({name}={value!r}): "
                f"{instead}; use {name}={allowed[0]!r}, or black-box search such as GridSearchCV"
            )
    for name in found:
        value = getattr(estimator, name)
        if value is not None and np.ndim(value):
            raise ValueError(
                f"{type(estimator).__name__}.{name} must be one number, where the search begins, got "
                f"{value!r}; for one a feature use per_feature=True"
            )
    return found


_MLP = (
    ("solver", ("adam", "sgd"), "lbfgs stops by its own rule"),
    ("early_stopping", (False,), "a rule for stopping has no derivative"),
    ("learning_rate", ("constant",), "only the size of a constant rate is tuned"),
    ("warm_start", (False,), "each fold begins afresh"),
    ("loss", ("squared_error", "log_loss", None), "only these losses have a twin"),
)
_SETTINGS: dict[type, tuple[tuple[str, tuple, str], ...]] = {
    Ridge: (("positive", (False,), "a bound on the weights is not smooth"),),
    LogisticRegression: (
        ("penalty", ("deprecated", "l2"), "only the L2 penalty is smooth"),
        ("l1_ratio", (0.0, None), "only the L2 penalty is smooth"),
        ("dual", (False,), "the primal problem is the one that is solved"),
        ("solver", ("lbfgs", "newton-cg", "newton-cholesky", "sag", "saga"), "it penalizes the intercept"),
    ),
    KernelRidge: (("kernel", ("rbf",), "only this kernel has a twin"),),
    MLPClassifier: _MLP,
    MLPRegressor: _MLP,
}


def model_of(estimator: Any, folds: Sequence[Fold]) -> Model:
    """The twin of an estimator that `parameters` lets pass.

    >>> model_of(Ridge(), [])
    RidgeModel(fit_intercept=True)
    """
    if isinstance(estimator, Ridge):
        return RidgeModel(bool(estimator.fit_intercept))
    if isinstance(estimator, LogisticRegression):
        return LogisticModel(bool(estimator.fit_intercept))
    if isinstance(estimator, KernelRidge):
        return KernelRidgeModel()
    hidden = estimator.hidden_layer_sizes
    adam = estimator.solver == "adam"
    most = 200 if estimator.batch_size == "auto" else estimator.batch_size
    batches = [math.ceil(fold.size / min(most, fold.size)) for fold in folds]
    return MlpModel(
        hidden=tuple(int(n) for n in np.atleast_1d(hidden)),
        activation=_known(estimator.activation),
        solver=estimator.solver,
        moments=(estimator.beta_1, estimator.beta_2, estimator.epsilon)
        if adam
        else (estimator.momentum, float(estimator.nesterovs_momentum), 0.0),
        # Rounded up where it is the fold that ends it: one compilation for data sets of about one size.
        batch_size=min(most, rounded(max(fold.size for fold in folds), 64)),
        shuffle=bool(estimator.shuffle),
        max_iter=int(estimator.max_iter),
        num_steps=estimator.max_iter * max(batches),
        classifier=isinstance(estimator, MLPClassifier),
    )


def _known(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {list(ACTIVATIONS)}, got {activation!r}")
    return activation
