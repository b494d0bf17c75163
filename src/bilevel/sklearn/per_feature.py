"""One penalty or length scale a feature, with the models of scikit-learn."""

from typing import Any, cast

import numpy as np
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils import get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted, validate_data


def _has(name: str):
    return available_if(lambda self: hasattr(self.estimator, name))


class PerFeature(MetaEstimatorMixin, BaseEstimator):  # scikit-learn's protocol is inheritance
    """A model of scikit-learn whose penalty or kernel has a value for each feature.

        penalty αⱼ on xⱼ  =  penalty ᾱ on √(ᾱ/αⱼ) xⱼ        γⱼ (xⱼ − x'ⱼ)² = γ̄ (√(γⱼ/γ̄) xⱼ − √(γⱼ/γ̄) x'ⱼ)²

    Args:
        estimator: `Ridge`, `LogisticRegression` or `KernelRidge(kernel="rbf")`; its own alpha, C or gamma is
            not read.
        values: αⱼ, Cⱼ or γⱼ, positive `[d]` or a scalar; ᾱ is their geometric mean.

    Attributes:
        estimator_: the model on scaled features; `feature_scale_` `[d]` the factors.
        coef_, intercept_: of a linear model, for the features as they are.

    Raises:
        TypeError: for another estimator.
        ValueError: when a value is not positive, or their number is wrong.

    >>> import numpy as np
    >>> X, y = np.eye(2), np.array([1.0, 1.0])
    >>> model = PerFeature(Ridge(fit_intercept=False), values=[1.0, 3.0]).fit(X, y)
    >>> model.coef_.round(4), model.predict(X).round(4)  # 1 / (1 + alpha)
    (array([0.5 , 0.25]), array([0.5 , 0.25]))
    """

    def __init__(self, estimator: Any, values: Any = 1.0):
        self.estimator = estimator
        self.values = values

    def fit(self, X, y=None, sample_weight=None):
        """Fit a clone of the estimator on the scaled features."""
        name = _NAMES.get(type(self.estimator))
        if name is None:
            raise TypeError(
                f"PerFeature takes {', '.join(kind.__name__ for kind in _NAMES)}, got "
                f"{type(self.estimator).__name__}"
            )
        X = cast(Any, validate_data(self, X, accept_sparse=("csr", "csc"), dtype="numeric"))
        values = np.asarray(self.values, np.float64)
        if values.shape not in ((), (X.shape[1],)) or not np.all((values > 0) & np.isfinite(values)):
            raise ValueError(
                f"PerFeature.values must be positive, one or one for each of the {X.shape[1]} features, "
                f"got shape {values.shape}"
            )
        level = float(np.exp(np.mean(np.log(values))))
        power = -0.5 if name == "alpha" else 0.5
        self.feature_scale_ = np.broadcast_to((values / level) ** power, X.shape[1]).copy()
        copy: Any = clone(self.estimator)
        self.estimator_ = copy.set_params(**{name: level})
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        self.estimator_.fit(self._scaled(X), y, **weights)
        return self

    def _scaled(self, X):
        return (
            X * self.feature_scale_ if not hasattr(X, "multiply") else X.multiply(self.feature_scale_).tocsr()
        )

    def _ask(self, name: str, X, *args, **kwargs):
        check_is_fitted(self)
        X = self._scaled(validate_data(self, X, accept_sparse=("csr", "csc"), reset=False))
        return getattr(self.estimator_, name)(X, *args, **kwargs)

    @_has("predict")
    def predict(self, X):
        """As the estimator's."""
        return self._ask("predict", X)

    @_has("predict_proba")
    def predict_proba(self, X):
        """As the estimator's."""
        return self._ask("predict_proba", X)

    @_has("predict_log_proba")
    def predict_log_proba(self, X):
        """As the estimator's."""
        return self._ask("predict_log_proba", X)

    @_has("decision_function")
    def decision_function(self, X):
        """As the estimator's."""
        return self._ask("decision_function", X)

    def score(self, X, y, sample_weight=None):
        """As the estimator's: accuracy or R²."""
        return self._ask("score", X, y, sample_weight=sample_weight)

    @property
    def coef_(self):
        """Weights of the features as they are."""
        return self.estimator_.coef_ * self.feature_scale_

    @property
    def intercept_(self):
        """That of the estimator."""
        return self.estimator_.intercept_

    @property
    def classes_(self):
        """That of the estimator."""
        return self.estimator_.classes_

    def __sklearn_tags__(self):
        tags, own = get_tags(self.estimator), super().__sklearn_tags__()
        own.estimator_type, own.target_tags = tags.estimator_type, tags.target_tags
        own.classifier_tags, own.regressor_tags = tags.classifier_tags, tags.regressor_tags
        own.input_tags.sparse = tags.input_tags.sparse
        return own


_NAMES = {Ridge: "alpha", LogisticRegression: "C", KernelRidge: "gamma"}
