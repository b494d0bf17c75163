"""The door for scikit-learn: its own checks, pipelines, input of all kinds, what is refused and found."""

import pickle
import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.feature_selection import SelectKBest, f_regression
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from bilevel.sklearn import HypergradientSearchCV, PerFeature
from bilevel.sklearn import dense as dense_module

X, Y = (a[:90] for a in load_diabetes(return_X_y=True))
X = 20 * X[:, :5]
CANCER_X, CANCER_Y = (a[::4] for a in load_breast_cancer(return_X_y=True))
CANCER_X = StandardScaler().fit_transform(CANCER_X)
IRIS_X, IRIS_Y = (a[::3] for a in load_iris(return_X_y=True))


# Full batches of small networks: few steps, and data sets of about one size are compiled once.
SMALL = {"hidden_layer_sizes": (8,), "max_iter": 30, "learning_rate_init": 0.1}


# All of scikit-learn's checks, without an exception.
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks(
    [
        HypergradientSearchCV(Ridge(), cv=3, num_meta_steps=3),
        HypergradientSearchCV(LogisticRegression(), cv=3, num_meta_steps=2),
        HypergradientSearchCV(KernelRidge(kernel="rbf"), cv=3, num_meta_steps=2),
        HypergradientSearchCV(MLPClassifier(**SMALL, random_state=0), cv=3, num_meta_steps=2),
        HypergradientSearchCV(MLPRegressor(**SMALL, random_state=0), cv=3, num_meta_steps=2),
        PerFeature(Ridge()),
        PerFeature(LogisticRegression()),
        PerFeature(KernelRidge(kernel="rbf")),
    ]
)
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize(
    "estimator, x, y, scoring, name",
    [
        (Ridge(), X, Y, "neg_mean_squared_error", "alpha"),
        (LogisticRegression(tol=1e-8, solver="newton-cholesky"), CANCER_X, CANCER_Y, "neg_log_loss", "C"),
    ],
    ids=["ridge", "logistic"],
)
def test_it_finds_the_best_of_a_fine_grid(estimator, x, y, scoring, name):
    search = HypergradientSearchCV(estimator, cv=3, tol=1e-6).fit(x, y)
    best = search.best_params_[name]
    grid = {name: best * np.exp([-4, -2, -1, -0.3, -0.1, -0.03, 0, 0.03, 0.1, 0.3, 1, 2, 4])}
    peer = GridSearchCV(estimator, grid, scoring=scoring, cv=3).fit(x, y)
    assert search.best_score_ >= peer.best_score_ - 1e-7 * abs(peer.best_score_)
    assert peer.best_params_[name] == pytest.approx(best)
    np.testing.assert_allclose(search.best_estimator_.predict(x), peer.predict(x), rtol=1e-2)
    assert search.n_splits_ == 3 and search.converged_


def test_results_are_those_of_the_evaluations():
    search = HypergradientSearchCV(Ridge(), cv=3).fit(X, Y)
    results, history = search.cv_results_, search.history_
    splits = np.stack([results[f"split{i}_test_score"] for i in range(3)])
    np.testing.assert_allclose(splits.mean(0), results["mean_test_score"])
    assert results["rank_test_score"][search.best_index_] == 1
    assert results["params"][search.best_index_] == search.best_params_
    assert len(history) == len(results["params"]) and history[-1]["num_fits"] == search.num_fits_
    assert search.best_loss_ == min(each["loss"] for each in history) == -search.best_score_
    assert abs(history[search.best_index_]["gradient"]["alpha"]) < abs(history[0]["gradient"]["alpha"])


def test_clone_pickle_and_nested_cross_validation():
    search = HypergradientSearchCV(Ridge(), {"alpha": (0.1, 10)}, cv=3, per_feature=True, num_meta_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = clone(search).fit(X, Y)
        assert np.all(np.isfinite(cross_val_score(search, X, Y, cv=2)))
    again = pickle.loads(pickle.dumps(fitted))
    np.testing.assert_array_equal(again.predict(X), fitted.predict(X))
    # `PerFeature` is the model whose penalty is diag(alpha).
    centred = X - X.mean(0)
    weights = np.linalg.solve(centred.T @ centred + np.diag(fitted.best_params_["alpha"]), centred.T @ Y)
    np.testing.assert_allclose(fitted.best_estimator_.coef_, weights, rtol=1e-8)
    np.testing.assert_allclose(
        fitted.predict(X), X @ fitted.best_estimator_.coef_ + again.best_estimator_.intercept_
    )
    assert np.all(abs(np.log10(fitted.best_params_["alpha"])) < 1 + 1e-9)


def test_steps_of_a_pipeline_see_the_training_part_only():
    # Features picked by their correlation with y on all rows would look good on noise; GridSearchCV refits.
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 300)), rng.normal(size=60)
    pipe = make_pipeline(SelectKBest(f_regression, k=5), StandardScaler(), Ridge())
    search = HypergradientSearchCV(pipe, cv=3).fit(x, y)
    assert set(search.best_params_) == {"ridge__alpha"}
    honest = GridSearchCV(
        pipe, {"ridge__alpha": [search.best_params_["ridge__alpha"]]}, cv=3, scoring="neg_mean_squared_error"
    )
    np.testing.assert_allclose(search.best_score_, honest.fit(x, y).best_score_, rtol=1e-9)
    picked = StandardScaler().fit_transform(SelectKBest(f_regression, k=5).fit_transform(x, y))
    leaked = HypergradientSearchCV(Ridge(), cv=3).fit(picked, y)
    assert leaked.best_loss_ < 0.8 * search.best_loss_
    assert search.n_features_in_ == 300 and hasattr(search.best_estimator_[-1], "coef_")


def test_a_pipeline_with_a_penalty_for_each_feature():
    pipe = make_pipeline(StandardScaler(), Ridge())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search = HypergradientSearchCV(pipe, cv=3, per_feature=True, num_meta_steps=5).fit(X, Y)
    assert isinstance(search.best_estimator_[-1], PerFeature)
    assert search.best_params_["ridge__alpha"].shape == (5,)


def test_a_penalty_for_each_feature_is_better_where_some_are_noise():
    x, y = load_breast_cancer(return_X_y=True)
    rng = np.random.default_rng(0)
    x = StandardScaler().fit_transform(np.hstack([x[:, :4], rng.normal(size=(len(x), 12))]))
    one = HypergradientSearchCV(LogisticRegression(), cv=3).fit(x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        each = HypergradientSearchCV(LogisticRegression(), cv=3, per_feature=True, num_meta_steps=30).fit(
            x, y
        )
    assert each.best_loss_ < one.best_loss_
    assert np.median(each.best_params_["C"][4:]) < 0.1 * np.max(each.best_params_["C"][:4])


def test_pandas_input_keeps_its_names():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(X, columns=list("abcde"))
    search = HypergradientSearchCV(Ridge(), cv=3).fit(frame, pandas.Series(Y))
    assert list(search.feature_names_in_) == list(search.best_estimator_.feature_names_in_) == list("abcde")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search.predict(frame)


def test_sparse_input_is_made_dense_and_its_size_told(monkeypatch):
    sparse = pytest.importorskip("scipy.sparse")
    plain = HypergradientSearchCV(Ridge(), cv=3).fit(X, Y)
    monkeypatch.setattr(dense_module, "LARGE", 100)
    with pytest.warns(UserWarning, match="dense.*MiB"):
        given = HypergradientSearchCV(Ridge(), cv=3).fit(sparse.csr_array(X), Y)
    np.testing.assert_allclose(given.best_loss_, plain.best_loss_, rtol=1e-12)


def test_weights_are_those_of_repeated_rows():
    weights = np.resize([1, 2, 0, 3], len(Y))
    rows = np.repeat(np.arange(len(Y)), weights)
    half = np.arange(len(Y)) % 2 == 0
    weighted = HypergradientSearchCV(Ridge(), cv=[(half, ~half)]).fit(X, Y, sample_weight=weights)
    repeated = HypergradientSearchCV(Ridge(), cv=[(half[rows], ~half[rows])]).fit(X[rows], Y[rows])
    np.testing.assert_allclose(weighted.best_params_["alpha"], repeated.best_params_["alpha"], rtol=1e-5)
    np.testing.assert_allclose(weighted.predict(X), repeated.predict(X), rtol=1e-5)


def test_constant_features_and_labels_that_are_words():
    x = np.hstack([IRIS_X, np.ones((len(IRIS_X), 1))])
    words = np.array(["setosa", "versicolor", "virginica"])[IRIS_Y]
    search = HypergradientSearchCV(LogisticRegression(), cv=3, num_meta_steps=20).fit(x, words)
    assert list(search.classes_) == ["setosa", "versicolor", "virginica"]
    assert search.score(x, words) > 0.9 and search.predict_proba(x).shape == (len(x), 3)


def test_splitters_groups_shares_and_scores():
    groups = np.arange(len(Y)) % 4
    assert HypergradientSearchCV(Ridge(), cv=GroupKFold(4)).fit(X, Y, groups=groups).n_splits_ == 4
    share = HypergradientSearchCV(Ridge(), cv=0.25, random_state=0, scoring="neg_mean_absolute_error").fit(
        X, Y
    )
    assert share.n_splits_ == 1 and share.score(X, Y) < 0
    unfitted = HypergradientSearchCV(Ridge(), cv=3, refit=False).fit(X, Y)
    with pytest.raises(AttributeError, match="refit=True"):
        unfitted.predict(X)


def test_a_flat_start_is_left_and_further_starts_are_drawn():
    # With alpha = 1e6 nothing is fitted, and the loss hardly changes.
    far = HypergradientSearchCV(Ridge(alpha=1e6), cv=3).fit(X, Y)
    near = HypergradientSearchCV(Ridge(), cv=3).fit(X, Y)
    np.testing.assert_allclose(far.best_loss_, near.best_loss_, rtol=5e-3)
    one = HypergradientSearchCV(KernelRidge(kernel="rbf", gamma=10.0), cv=2, num_meta_steps=12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        few = clone(one).set_params(num_starts=3, random_state=0).fit(X, Y)
        one.fit(X, Y)
    assert few.best_loss_ <= one.best_loss_ and len(few.history_) > len(one.history_)


def test_an_mlp_learns_its_rate():
    mlp = MLPClassifier((8,), max_iter=10, learning_rate_init=1e-3, batch_size=10, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search = HypergradientSearchCV(mlp, ["learning_rate_init"], cv=0.3, num_meta_steps=8, random_state=0)
        search.fit(StandardScaler().fit_transform(IRIS_X), IRIS_Y)
    assert search.best_loss_ < 0.7 * search.history_[0]["loss"]
    assert search.best_params_["learning_rate_init"] > 1e-3


REFUSED = {
    "forest": (
        HypergradientSearchCV(RandomForestClassifier()),
        TypeError,
        "no differentiable twin.*bilevel search",
    ),
    "l1": (HypergradientSearchCV(LogisticRegression(l1_ratio=1.0)), ValueError, "l1_ratio"),
    "liblinear": (HypergradientSearchCV(LogisticRegression(solver="liblinear")), ValueError, "intercept"),
    "linear kernel": (HypergradientSearchCV(KernelRidge()), ValueError, "kernel='rbf'"),
    "early stopping": (
        HypergradientSearchCV(MLPClassifier(early_stopping=True)),
        ValueError,
        "early_stopping",
    ),
    "mlp per feature": (HypergradientSearchCV(MLPClassifier(), per_feature=True), ValueError, "each feature"),
    "name": (HypergradientSearchCV(Ridge(), ["C"]), ValueError, "param_space must name"),
    "bounds": (HypergradientSearchCV(Ridge(), {"alpha": (1, 0.1)}), ValueError, "low < high"),
    "steps": (HypergradientSearchCV(Ridge(), num_meta_steps=0), ValueError, "num_meta_steps"),
    "share": (HypergradientSearchCV(Ridge(), cv=2.0), ValueError, "between 0 and 1"),
    "folds": (HypergradientSearchCV(Ridge(), cv=1000), ValueError, "n_splits=1000"),
    "estimator": (HypergradientSearchCV(Ridge(), hypergradient=3), TypeError, "bl.hypergrad"),
    "alpha for each target": (HypergradientSearchCV(Ridge(alpha=[1.0, 2.0])), ValueError, "one number"),
    "alpha in an array": (HypergradientSearchCV(Ridge(alpha=np.ones(2))), ValueError, "one number"),
    "per feature of what is not tuned": (
        HypergradientSearchCV(KernelRidge(kernel="rbf"), ["alpha"], per_feature=True),
        ValueError,
        "gamma for each feature, which param_space leaves out",
    ),
    "per feature": (PerFeature(Ridge(), values=[1.0]), ValueError, "each of the 4 features"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    search, error, match = REFUSED[name]
    with pytest.raises(error, match=match) as caught:
        search.fit(IRIS_X, IRIS_Y)
    assert "\n" not in str(caught.value)


def test_a_class_that_a_fold_lacks_is_refused():
    y = np.where(np.arange(len(IRIS_Y)) == 0, "rare", "usual")
    y[1::2] = "other"
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=r"fold 0 has no example of class .*rare"),
    ):
        warnings.simplefilter("ignore")
        HypergradientSearchCV(LogisticRegression(), cv=3).fit(IRIS_X, y)
    with pytest.raises(ValueError, match="only one class"):
        HypergradientSearchCV(LogisticRegression()).fit(IRIS_X, np.zeros(len(IRIS_X)))


def test_running_out_of_evaluations_is_told():
    with pytest.warns(ConvergenceWarning, match="num_meta_steps=2"):
        search = HypergradientSearchCV(Ridge(alpha=30), cv=3, num_meta_steps=2).fit(X, Y)
    assert not search.converged_ and len(search.history_) == 2
