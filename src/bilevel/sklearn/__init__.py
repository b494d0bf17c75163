"""The door for users of scikit-learn: hyperparameters by hypergradients behind `fit` and `predict`."""

from bilevel.sklearn.per_feature import PerFeature
from bilevel.sklearn.search import HypergradientSearchCV

__all__ = ["HypergradientSearchCV", "PerFeature"]
