"""Cross-validation losses and hypergradients against scikit-learn's own fits, refitted a little beside."""

import warnings

import jax
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.neural_network import MLPClassifier, MLPRegressor

import bilevel as bl
from bilevel.sklearn import HypergradientSearchCV, PerFeature
from bilevel.sklearn.descent import CrossValidation
from bilevel.sklearn.folds import make_folds, pad
from bilevel.sklearn.models import model_of

X, Y = (a[:61] for a in load_diabetes(return_X_y=True))
X, Y = 20 * X[:, :5], (Y - 150) / 70 + 1  # an intercept that is not zero
WEIGHTS = np.random.default_rng(0).uniform(0.5, 2, len(Y))
SPLITS = list(KFold(3).split(X))  # 40 or 41 rows to fit on: folds are padded
IRIS_X, IRIS_Y = (a[::3] for a in load_iris(return_X_y=True))
IRIS_SPLITS = list(StratifiedKFold(3, shuffle=True, random_state=0).split(IRIS_X, IRIS_Y))
BINARY = (IRIS_Y > 0).astype(int)
TIGHT = {"tol": 1e-12, "max_iter": 10_000, "solver": "newton-cg"}


def peer(estimator, x, y, splits, weights, **params):
    """The mean validation loss by scikit-learn's own fits."""
    losses = []
    for a, b in splits:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = clone(estimator).set_params(**params)
            model.fit(x[a], y[a], sample_weight=weights[a])
        if hasattr(model, "predict_proba"):
            losses.append(log_loss(y[b], model.predict_proba(x[b]), sample_weight=weights[b]))
        else:
            losses.append(mean_squared_error(y[b], model.predict(x[b]), sample_weight=weights[b]))
    return np.mean(losses)


def ours(estimator, x, y, splits, weights, theta, hypergradient=None, features=True):
    """The same, and its hypergradient, in one evaluation."""
    classes = np.unique(y) if hasattr(estimator, "predict_proba") else None
    folds = make_folds(
        None,
        x,
        y,
        classes=classes,
        sample_weight=weights,
        class_weight=getattr(estimator, "class_weight", None),
        splits=splits,
    )
    model = model_of(estimator, folds)
    padded = pad(folds, features)
    tasks = [model.task(fold, 0) for fold in padded]
    return CrossValidation(model, hypergradient, tasks)(theta)


def slopes(function, params, step):
    """Central differences in the logarithm of each parameter."""
    out = {}
    for name, value in params.items():
        ahead, behind = ({**params, name: value * np.exp(h)} for h in (step, -step))
        out[name] = (function(**ahead) - function(**behind)) / (2 * step)
    return out


MLP = {"hidden_layer_sizes": (5,), "activation": "tanh", "max_iter": 3, "batch_size": 16, "random_state": 0}
CASES = {
    "ridge": (Ridge(), X, Y, SPLITS, {"alpha": 3.0}, 1e-4, 1e-7),
    "ridge, no intercept": (Ridge(fit_intercept=False), X, Y, SPLITS, {"alpha": 3.0}, 1e-4, 1e-7),
    "ridge, two targets": (Ridge(), X, np.stack([Y, X[:, 0] ** 2], 1), SPLITS, {"alpha": 3.0}, 1e-4, 1e-7),
    "ridge, more features than rows": (
        Ridge(),
        np.cos(X @ np.arange(400).reshape(5, 80)),
        Y,
        SPLITS,
        {"alpha": 3.0},
        1e-4,
        1e-7,
    ),
    "kernel ridge": (KernelRidge(kernel="rbf"), X, Y, SPLITS, {"alpha": 0.3, "gamma": 0.2}, 1e-4, 1e-6),
    "logistic": (LogisticRegression(**TIGHT), IRIS_X, BINARY, IRIS_SPLITS, {"C": 2.0}, 1e-3, 1e-5),
    "logistic, three classes, balanced": (
        LogisticRegression(**TIGHT, class_weight="balanced"),
        IRIS_X,
        IRIS_Y,
        IRIS_SPLITS,
        {"C": 2.0},
        1e-3,
        1e-5,
    ),
    "logistic, no intercept": (
        LogisticRegression(**TIGHT, fit_intercept=False),
        IRIS_X,
        BINARY,
        IRIS_SPLITS,
        {"C": 2.0},
        1e-3,
        1e-5,
    ),
    "classifying mlp, adam": (
        # Where scikit-learn adds epsilon, before the bias correction, is not where optax does.
        MLPClassifier(**MLP, epsilon=1e-12),
        IRIS_X,
        IRIS_Y,
        IRIS_SPLITS,
        {"alpha": 0.5, "learning_rate_init": 0.02},
        1e-4,
        1e-5,
    ),
    "regressing mlp, momentum": (
        MLPRegressor(**MLP, solver="sgd"),
        X,
        Y,
        SPLITS,
        {"alpha": 0.5, "learning_rate_init": 0.02},
        1e-3,
        1e-5,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_hypergradient_are_those_of_scikit_learn(name):
    estimator, x, y, splits, params, step, tolerance = CASES[name]
    weights = np.resize(WEIGHTS, len(y))
    found = ours(estimator, x, y, splits, weights, {k: np.log(v) for k, v in params.items()})

    def refitted(**params):
        return peer(estimator, x, y, splits, weights, **params)

    np.testing.assert_allclose(found.loss, refitted(**params), rtol=1e-6 if "mlp" in name else 1e-8)
    measured = slopes(refitted, params, step)
    assert set(found.gradient) == set(measured)
    for parameter, slope in measured.items():
        np.testing.assert_allclose(found.gradient[parameter], slope, rtol=tolerance, atol=1e-8)


@pytest.mark.parametrize(
    "estimator, x, y, splits, name",
    [
        (Ridge(), X, Y, SPLITS, "alpha"),
        (LogisticRegression(**TIGHT), IRIS_X, BINARY, IRIS_SPLITS, "C"),
        (KernelRidge(kernel="rbf", alpha=0.3), X, Y, SPLITS, "gamma"),
    ],
    ids=["ridge", "logistic", "kernel ridge"],
)
def test_hypergradients_of_each_feature_are_those_of_scikit_learn(estimator, x, y, splits, name):
    values = np.linspace(0.5, 2.0, x.shape[1])
    theta = {name: np.log(values), **({"alpha": np.log(0.3)} if name == "gamma" else {})}
    found = ours(estimator, x, y, splits, np.ones(len(y)), theta, features=False)
    for j in (0, x.shape[1] - 1):

        def refitted(value, j=j):
            each = np.where(np.arange(len(values)) == j, value, values)
            return peer(PerFeature(estimator), x, y, splits, np.ones(len(y)), values=each)

        measured = slopes(refitted, {"value": values[j]}, 1e-3)["value"]
        np.testing.assert_allclose(found.gradient[name][j], measured, rtol=1e-4, atol=1e-7)


def test_ridge_hypergradient_is_the_closed_form():
    a, b = SPLITS[0]
    theta = np.linspace(-1, 1, X.shape[1])
    found = ours(
        Ridge(fit_intercept=False), X, Y, [(a, b)], np.ones(len(Y)), {"alpha": theta}, features=False
    )
    system = X[a].T @ X[a] + np.diag(np.exp(theta))
    params = np.linalg.solve(system, X[a].T @ Y[a])
    outer = 2 * X[b].T @ (X[b] @ params - Y[b]) / len(b)
    np.testing.assert_allclose(
        found.gradient["alpha"], -np.exp(theta) * params * np.linalg.solve(system, outer), rtol=1e-9
    )


def test_padding_changes_nothing():
    folds = make_folds(
        None,
        IRIS_X,
        BINARY,
        classes=np.array([0, 1]),
        sample_weight=np.ones(len(BINARY)),
        class_weight=None,
        splits=IRIS_SPLITS[:1],
    )
    for estimator in (LogisticRegression(), KernelRidge(kernel="rbf")):
        model = model_of(estimator, folds)
        theta = {name: -0.3 for name in model.names}
        plain, padded = (
            CrossValidation(model, None, [model.task(fold, 0) for fold in some])(theta)
            for some in (folds, pad(folds, features=True))
        )
        np.testing.assert_allclose(plain.loss, padded.loss, rtol=1e-12)
        for name in model.names:
            np.testing.assert_allclose(plain.gradient[name], padded.gradient[name], rtol=1e-8)


def test_a_fold_with_fewer_minibatches_takes_no_step_more():
    # 16 and 17 rows in batches of 16: one step a pass and two.
    splits = [(np.arange(16), np.arange(40, 50)), (np.arange(17), np.arange(40, 50))]
    estimator = MLPRegressor(**MLP)
    theta = {"alpha": 0.0, "learning_rate_init": np.log(0.02)}
    both = ours(estimator, X, Y, splits, np.ones(len(Y)), theta)
    alone = peer(estimator, X, Y, splits[:1], np.ones(len(Y)), alpha=1.0, learning_rate_init=0.02)
    np.testing.assert_allclose(both.losses[0], alone, rtol=1e-6)
    assert np.isfinite(both.gradient["alpha"])


def test_another_estimator_of_the_hypergradient_agrees():
    arguments = (LogisticRegression(), IRIS_X, BINARY, IRIS_SPLITS, np.ones(len(BINARY)), {"C": 0.5})
    own = ours(*arguments)
    direct = ours(*arguments, hypergradient=bl.hypergrad.Implicit(bl.hypergrad.direct()))
    np.testing.assert_allclose(own.gradient["C"], direct.gradient["C"], rtol=1e-8)
    with pytest.raises(TypeError, match="steps"):
        ours(*arguments, hypergradient=bl.hypergrad.Mixed())


def test_it_runs_in_float64_and_leaves_jax_as_it_was():
    assert not jax.config.jax_enable_x64
    search = HypergradientSearchCV(Ridge(), cv=3).fit(X, Y)
    assert not jax.config.jax_enable_x64
    loss = peer(Ridge(), X, Y, SPLITS, np.ones(len(Y)), **search.best_params_)
    np.testing.assert_allclose(search.best_loss_, loss, rtol=1e-10)
