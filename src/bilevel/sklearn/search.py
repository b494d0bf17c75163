"""Cross-validated hyperparameters by hypergradients, as an estimator of scikit-learn."""

import time
import warnings
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, MetaEstimatorMixin, clone, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import check_scoring
from sklearn.model_selection import ShuffleSplit, StratifiedShuffleSplit, check_cv
from sklearn.pipeline import Pipeline
from sklearn.utils import check_random_state, get_tags
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from bilevel.sklearn.dense import dense
from bilevel.sklearn.descent import CrossValidation, Evaluation, descend
from bilevel.sklearn.folds import make_folds, pad
from bilevel.sklearn.models import model_of, parameters
from bilevel.sklearn.options import Space, read_space, require_options
from bilevel.sklearn.per_feature import PerFeature


def _with(estimator: Any, params: dict[str, Any]) -> Any:
    """A copy with these parameters."""
    copy: Any = clone(estimator)
    return copy.set_params(**params)


def _fitted_has(name: str):
    """The method is there if the estimator has it, before and after `fit`."""

    def check(self):
        return hasattr(self.best_estimator_ if hasattr(self, "best_estimator_") else self.estimator, name)

    return available_if(check)


class HypergradientSearchCV(MetaEstimatorMixin, BaseEstimator):  # scikit-learn's protocol is inheritance
    """Tune the continuous hyperparameters of a model by gradients of its cross-validation loss.

        min over θ  F(θ) = (1/folds) Σ_f loss_f(φ_f*(θ), validation part),   φ_f*(θ) = fit(θ, training part)

    θ are logarithms and dF/dθ is exact: a dozen evaluations find what a grid brackets, and a penalty for each
    feature, where no grid can go, costs little more than one for all.

    Args:
        estimator: `Ridge` (alpha), `LogisticRegression` (C; L2 penalty), `KernelRidge(kernel="rbf")` (alpha,
            gamma), `MLPClassifier`, `MLPRegressor` (alpha, learning_rate_init), or a Pipeline that ends in
            one; its own values are where the search begins.
        param_space: which parameters are tuned and where: names, or {name: (low, high)}; all of them within
            wide bounds when left out. In a Pipeline `step__name`.
        cv: folds, a splitter or splits as for GridSearchCV; or a share in (0, 1) that is held out.
        num_meta_steps: evaluations of the cross-validation loss at most, for each start.
        num_starts: starts beside the estimator's own values are drawn from the bounds.
        tol: it ends where moving any logarithm by 1 changes the loss by less than this share.
        per_feature: one alpha, C or gamma for each feature that the model sees.
        hypergradient: an estimator of `bl.hypergrad` in place of the model's own (formula and implicit
            derivative are exact; `Mixed` for MLPs).
        scoring: what `score` returns, as for GridSearchCV. The search minimizes the log loss or the mean
            squared error whatever it is.
        refit: fit `best_estimator_` on all examples.
        random_state: for held-out shares, further starts, and MLPs that have none of their own.

    Attributes:
        best_params_, best_loss_, best_score_: found; the score is minus the loss.
        best_estimator_: scikit-learn's own model with these parameters, fitted on all examples; with
            per_feature a `PerFeature` around it.
        cv_results_: every evaluation, in the columns of GridSearchCV; history_: the same, with hypergradients
            and seconds.
        n_splits_, num_fits_, refit_time_, converged_, classes_, n_features_in_, feature_names_in_.

    Raises:
        TypeError: when the estimator has no differentiable twin.
        ValueError: when one of its settings has none; for arguments out of range; when a fold lacks a class.
        FloatingPointError: when the loss at the start is not finite.

    Warns:
        ConvergenceWarning: when a model is not fitted to its optimum, or the evaluations run out.

    Cost: an evaluation is a fit of each fold, and a half to three times that for its derivative. All in
    float64; JAX's own setting is left as it is.

    Reference: Pedregosa, Hyperparameter optimization with approximate gradient, 2016.

    >>> from sklearn.linear_model import Ridge
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(40, 3)); y = X @ [1.0, 2.0, 0.0] + 3 * rng.normal(size=40)
    >>> search = HypergradientSearchCV(Ridge()).fit(X, y)
    >>> round(search.best_params_["alpha"], 2), search.best_estimator_
    (5.06, Ridge(alpha=...))
    """

    def __init__(
        self,
        estimator: Any,
        param_space: Any = None,
        *,
        cv: Any = 5,
        num_meta_steps=50,
        num_starts=1,
        tol=1e-4,
        per_feature=False,
        hypergradient: Any = None,
        scoring: Any = None,
        refit=True,
        random_state=None,
    ):
        self.estimator = estimator
        self.param_space = param_space
        self.cv = cv
        self.num_meta_steps = num_meta_steps
        self.num_starts = num_starts
        self.tol = tol
        self.per_feature = per_feature
        self.hypergradient = hypergradient
        self.scoring = scoring
        self.refit = refit
        self.random_state = random_state

    def fit(self, X, y=None, sample_weight=None, groups=None):
        """Search, then fit the best model on all examples.

        Args:
            X: `[n, d]`, or what the first step of a Pipeline takes.
            y: `[n]`, or `[n, t]` for regression.
            sample_weight: `[n]`, of fits and of validation losses.
            groups: `[n]`, for splitters such as GroupKFold.
        """
        require_options(self)
        transform, model, prefix = self._parts()
        space = read_space(self.param_space, parameters(model), prefix)
        X_read, y_read, classes = self._validated(X, y, transform)
        weights = _check_sample_weight(sample_weight, np.empty((len(y_read), 0)), ensure_non_negative=True)
        rng = check_random_state(self.random_state)
        splits = self._splits(X_read, y_read, groups, rng)
        folds = make_folds(
            transform,
            X_read,
            y_read,
            classes=classes,
            sample_weight=weights,
            class_weight=getattr(model, "class_weight", None),
            splits=splits,
        )
        objective = self._objective(model, folds, space, rng)
        self.converged_ = self._search(objective, space, model, folds[0].support.x.shape[1], rng)
        self._keep(objective.history, space, len(folds))
        self._warn(objective.history[self.best_index_])
        if self.refit:
            self._refit(X, y, sample_weight, prefix)
        return self

    def _parts(self) -> tuple[Any, Any, str]:
        """The steps before the model, the model, and what its parameters are prefixed with."""
        if not isinstance(self.estimator, Pipeline):
            return None, self.estimator, ""
        name, model = self.estimator.steps[-1]
        return (self.estimator[:-1] if len(self.estimator.steps) > 1 else None), model, f"{name}__"

    def _validated(self, X, y, transform) -> tuple[Any, Any, Any]:
        """X to be split, y, and the classes of a classifier."""
        if transform is None:
            # Everything that scikit-learn asks of input; the model itself is fitted on X as given.
            X_read, y = validate_data(
                self, X, y, accept_sparse=("csr", "csc"), multi_output=True, y_numeric=not is_classifier(self)
            )
            X_read = dense(X_read)
        else:
            if y is None:
                raise ValueError("HypergradientSearchCV requires y to be passed, but the target y is None")
            validate_data(self, X, skip_check_array=True)
            check_consistent_length(X, y)
            X_read, y = X, np.asarray(y)
        y, classes = np.asarray(y), None
        if is_classifier(self):
            y = column_or_1d(y, warn=True)
            check_classification_targets(y)
            self.classes_ = classes = np.unique(y)
            if len(classes) < 2:
                raise ValueError(
                    f"a classifier needs examples of at least 2 classes, got only one class: {classes[0]!r}"
                )
        elif y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        return X_read, y, classes

    def _splits(self, X, y, groups, rng):
        if isinstance(self.cv, float):
            kind = StratifiedShuffleSplit if is_classifier(self) else ShuffleSplit
            cv = kind(1, test_size=self.cv, random_state=rng.randint(2**31 - 1))
        else:
            cv: Any = check_cv(self.cv, y, classifier=is_classifier(self))
        rows = np.arange(len(y))  # splits may come as masks
        splits = [(rows[a], rows[b]) for a, b in cv.split(X, y, groups)]
        self.n_splits_ = len(splits)
        return splits

    def _objective(self, model, folds, space: Space, rng) -> CrossValidation:
        twin = model_of(model, folds)
        if self.per_feature and twin.per_feature is None:
            raise ValueError(
                f"per_feature=True: {type(model).__name__} has no parameter with a value for each feature; "
                "Ridge, LogisticRegression and KernelRidge have"
            )
        if self.per_feature and twin.per_feature not in space.bounds:
            raise ValueError(
                f"per_feature=True learns a value of {space.prefix}{twin.per_feature} for each feature, "
                "which param_space leaves out; add it, or leave param_space out"
            )
        own = getattr(model, "random_state", None)
        seed = int(own) if isinstance(own, int | np.integer) else rng.randint(2**31 - 1)
        padded = pad(folds, features=not self.per_feature)
        return CrossValidation(twin, self.hypergradient, [twin.task(fold, seed) for fold in padded])

    def _search(self, objective, space: Space, model, num_features: int, rng) -> bool:
        """Whether every descent ended by itself; the evaluations are in the objective's history."""
        wide = objective.model.per_feature if self.per_feature else None
        with np.errstate(divide="ignore"):  # a penalty of 0 that is not tuned
            own = {
                name: np.log(parameter.start(model, num_features))
                for name, parameter in parameters(model).items()
            }
        ended = []
        for number in range(self.num_starts):
            start = dict(own)
            for name, (low, high) in space.bounds.items():
                at = rng.uniform(low, high) if number else np.clip(own[name], low, high)
                start[name] = np.full(num_features, at) if name == wide else at
            ended.append(
                descend(
                    objective, start, space.bounds, num_meta_steps=self.num_meta_steps, tolerance=self.tol
                )
            )
        return all(ended)

    def _keep(self, history: list[Evaluation], space: Space, num_folds: int) -> None:
        names = list(space.bounds)
        named = [{space.prefix + name: each.params[name] for name in names} for each in history]
        losses = np.array([each.losses for each in history])  # [evaluations, folds]
        mean = losses.mean(1)
        self.best_index_ = int(np.nanargmin(mean))
        self.best_params_ = {
            name: value if np.ndim(value) else float(value) for name, value in named[self.best_index_].items()
        }
        self.best_loss_ = float(mean[self.best_index_])
        self.best_score_ = -self.best_loss_
        self.num_fits_ = len(history) * num_folds
        order = np.argsort(np.argsort(np.nan_to_num(mean, nan=np.inf), kind="stable"), kind="stable")
        self.cv_results_ = {
            "params": named,
            **{f"param_{name}": [each[name] for each in named] for name in named[0]},
            **{f"split{i}_test_score": -losses[:, i] for i in range(num_folds)},
            "mean_test_score": -mean,
            "std_test_score": losses.std(1),
            "rank_test_score": (1 + order).astype(np.int32),
        }
        self.history_ = [
            {
                "params": params,
                "loss": each.loss,
                "gradient": {space.prefix + name: each.gradient[name] for name in names},
                "seconds": each.seconds,
                "num_fits": (i + 1) * num_folds,
            }
            for i, (params, each) in enumerate(zip(named, history))
        ]

    def _warn(self, best: Evaluation) -> None:
        if best.doubts:
            warnings.warn(
                f"HypergradientSearchCV: at the best parameters {best.params} a model is not fitted to its "
                "optimum, so that loss and hypergradient are inexact; scale the features (StandardScaler "
                f"before it in a Pipeline) or set a stronger least penalty in param_space. "
                f"{' '.join(best.doubts)}",
                ConvergenceWarning,
                stacklevel=3,
            )
        if not self.converged_:
            warnings.warn(
                f"HypergradientSearchCV: not converged in num_meta_steps={self.num_meta_steps} evaluations; "
                f"raise num_meta_steps, or tol={self.tol:g}",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _refit(self, X, y, sample_weight, prefix: str) -> None:
        if self.per_feature:
            _, model, _ = self._parts()
            wide = {name.removeprefix(prefix): value for name, value in self.best_params_.items()}
            (values,) = (value for value in wide.values() if np.ndim(value))
            rest = {name: value for name, value in wide.items() if not np.ndim(value)}
            each = PerFeature(_with(model, rest), values)
            best: Any = _with(self.estimator, {prefix[:-2]: each}) if prefix else each
        else:
            best = _with(self.estimator, self.best_params_)
        weights = {} if sample_weight is None else {f"{prefix}sample_weight": sample_weight}
        began = time.perf_counter()
        self.best_estimator_ = best.fit(X, y, **weights)
        self.refit_time_ = time.perf_counter() - began
        if not hasattr(self, "n_features_in_") and hasattr(best, "n_features_in_"):
            self.n_features_in_ = best.n_features_in_

    def _best(self):
        check_is_fitted(self)
        if not self.refit:
            raise AttributeError(
                "this HypergradientSearchCV was made with refit=False, so that it has no model to ask; set "
                "refit=True, or fit one with best_params_"
            )
        return self.best_estimator_

    @_fitted_has("predict")
    def predict(self, X):
        """As `best_estimator_`."""
        return self._best().predict(X)

    @_fitted_has("predict_proba")
    def predict_proba(self, X):
        """As `best_estimator_`."""
        return self._best().predict_proba(X)

    @_fitted_has("predict_log_proba")
    def predict_log_proba(self, X):
        """As `best_estimator_`."""
        return self._best().predict_log_proba(X)

    @_fitted_has("decision_function")
    def decision_function(self, X):
        """As `best_estimator_`."""
        return self._best().decision_function(X)

    def score(self, X, y, sample_weight=None):
        """`scoring` of `best_estimator_`; its own score, accuracy or R², when left out."""
        weights = {} if sample_weight is None else {"sample_weight": sample_weight}
        if self.scoring is None:
            return self._best().score(X, y, **weights)
        scorer: Any = check_scoring(self._best(), scoring=self.scoring)
        return scorer(self._best(), X, y, **weights)

    def __sklearn_tags__(self):
        tags, inner = super().__sklearn_tags__(), get_tags(self.estimator)
        tags.estimator_type, tags.target_tags = inner.estimator_type, inner.target_tags
        tags.classifier_tags, tags.regressor_tags = inner.classifier_tags, inner.regressor_tags
        if tags.classifier_tags is not None:
            tags.classifier_tags.multi_label = tags.target_tags.multi_output = False
        tags.input_tags = inner.input_tags
        return tags
