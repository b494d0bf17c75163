"""The field's methods as thin compositions of a problem, a solver and an estimator."""

from bilevel.learners.losses import cross_entropy, mean_squared_error
from bilevel.learners.maml import Fixed, PerLayerPerStep, PerParameter, maml

__all__ = [
    "Fixed",
    "PerLayerPerStep",
    "PerParameter",
    "cross_entropy",
    "maml",
    "mean_squared_error",
]
