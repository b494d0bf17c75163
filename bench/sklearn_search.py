"""HypergradientSearchCV against grid and random search of scikit-learn: loss reached, model fits, seconds.

    diabetes       Ridge (alpha), and kernel ridge (alpha, gamma)
    breast_cancer  logistic regression (C)
    digits         logistic regression, ten classes (C)

All stand behind a StandardScaler in a Pipeline and use the same five folds of three quarters of the rows; the
last quarter is the test part. Grids are logarithmic, of 2ᵏ + 1 points a parameter, within the bounds that all
ways have. Random search draws as many points log-uniformly; its curve is the mean over 200 orders of them.
A fit is one model on one fold. A hypergradient of the same fold is not counted as a fit; its time is counted.
Seconds are those of the search alone; of ours a first time, with compilation, and again.
Prints a Markdown table, keeps the curves in docs/results/scikit_learn.json, a line a problem, and draws
docs/scikit_learn.png of all that are kept: with --only the others stay as they were.

    python bench/sklearn_search.py [--quick] [--only digits] [--kinds each] [--folder docs]
    python bench/sklearn_search.py --draw      # the picture again, from what is kept
"""

import argparse
import itertools
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import run as bench
from kept_in import add_folder, kept_in
from scipy.stats import loguniform
from sklearn import datasets
from sklearn.base import is_classifier
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, mean_squared_error
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bilevel.sklearn import HypergradientSearchCV

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FOLDS = 5
KINDS = ("hypergradients", "again", "grid", "random", "each")
# What is drawn; one value a feature is another problem: its losses fall below 0 % of the best single value.
INKS = {"hypergradients": "#c2410c", "grid": "#334155", "random": "#94a3b8"}
EACH = "hypergradients, one a feature"


@dataclass(frozen=True)
class Setting:
    """A data set, a model, and the bounds of its parameters."""

    data: str
    model: Any
    bounds: dict[str, tuple[float, float]]
    finest: int  # points of the finest grid, 2ᵏ + 1
    per_feature_steps: int = 100


SETTINGS = {
    "diabetes, ridge": Setting("diabetes", Ridge(), {"alpha": (1e-3, 1e5)}, 33),
    "diabetes, kernel ridge": Setting(
        "diabetes", KernelRidge(kernel="rbf"), {"alpha": (1e-5, 1e2), "gamma": (1e-5, 1e1)}, 9
    ),
    "breast_cancer, logistic": Setting(
        "breast_cancer", LogisticRegression(max_iter=1000), {"C": (1e-4, 1e4)}, 33
    ),
    "digits, logistic": Setting("digits", LogisticRegression(max_iter=1000), {"C": (1e-4, 1e4)}, 17, 50),
}


class Outcome(NamedTuple):
    """What one way reached; the curve holds (fits, least validation loss so far)."""

    way: str
    loss: float
    test: float
    fits: int
    seconds: float
    curve: list[tuple[int, float]]


def load(setting: Setting) -> tuple:
    """x and y to search on, x and y to test on."""
    x, y = getattr(datasets, f"load_{setting.data}")(return_X_y=True)
    if isinstance(setting.model, KernelRidge):
        y = (y - y.mean()) / y.std()  # it has no intercept
    x, x_test, y, y_test = train_test_split(
        x, y, random_state=0, stratify=y if is_classifier(setting.model) else None
    )
    return x, y, x_test, y_test


def test_loss(model: Any, x: np.ndarray, y: np.ndarray) -> float:
    return (
        log_loss(y, model.predict_proba(x))
        if is_classifier(model)
        else mean_squared_error(y, model.predict(x))
    )


def hypergradients(setting: Setting, data: tuple, per_feature: bool, again: bool) -> Outcome:
    """Ours; `again` tells whether it is compiled."""
    x, y, *test = data
    pipe = make_pipeline(StandardScaler(), setting.model)
    step = pipe.steps[-1][0]
    search = HypergradientSearchCV(
        pipe,
        {f"{step}__{key}": value for key, value in setting.bounds.items()},
        cv=FOLDS,
        per_feature=per_feature,
        num_meta_steps=setting.per_feature_steps if per_feature else 50,
    ).fit(x, y)
    losses = np.minimum.accumulate([each["loss"] for each in search.history_])
    curve = [(each["num_fits"], loss) for each, loss in zip(search.history_, losses)]
    way = f"hypergradients{', one a feature' if per_feature else ''}{', again' if again else ''}"
    loss = test_loss(search.best_estimator_, *test)
    return Outcome(way, search.best_loss_, loss, search.num_fits_, search.history_[-1]["seconds"], curve)


def black_box(setting: Setting, data: tuple, kind: str, finest: int) -> Outcome:
    """Grid or random search of scikit-learn with as many points as the finest grid."""
    x, y, *test = data
    pipe = make_pipeline(StandardScaler(), setting.model)
    prefix = f"{pipe.steps[-1][0]}__"
    scoring = "neg_log_loss" if is_classifier(pipe) else "neg_mean_squared_error"
    common: dict[str, Any] = {"scoring": scoring, "cv": FOLDS, "refit": False}
    if kind == "grid":
        space = {prefix + key: np.geomspace(*pair, finest) for key, pair in setting.bounds.items()}
        search: Any = GridSearchCV(pipe, space, **common)
    else:
        space = {prefix + key: loguniform(*pair) for key, pair in setting.bounds.items()}
        count = finest ** len(space)
        search = RandomizedSearchCV(pipe, space, n_iter=count, random_state=0, **common)
    began = time.perf_counter()
    search.fit(x, y)
    seconds = time.perf_counter() - began
    losses = -search.cv_results_["mean_test_score"]
    model = pipe.set_params(**search.best_params_).fit(x, y)
    curve = (grid_curve if kind == "grid" else random_curve)(losses, finest)
    return Outcome(kind, losses.min(), test_loss(model, *test), FOLDS * len(losses), seconds, curve)


def grid_curve(losses: np.ndarray, finest: int) -> list[tuple[int, float]]:
    """The least loss of every coarser grid within the finest."""
    dims = round(np.log(len(losses)) / np.log(finest))
    table, found = losses.reshape([finest] * dims), []
    for stride in (2**k for k in itertools.count()):
        if stride > (finest - 1) // 2:
            return found[::-1]
        part = table[(slice(None, None, stride),) * dims]
        found.append((FOLDS * part.size, float(part.min())))
    return found


def random_curve(losses: np.ndarray, finest: int) -> list[tuple[int, float]]:
    rng = np.random.default_rng(0)
    best = np.mean([np.minimum.accumulate(rng.permutation(losses)) for _ in range(200)], 0)
    return [(FOLDS * (i + 1), float(loss)) for i, loss in enumerate(best)]


def keep(name: str, outcomes: list[Outcome], path: Path) -> None:
    """The curves of one problem, in place of what was kept of the same ways."""
    kept = read(path)
    kept[name] = kept.get(name, {}) | {
        each.way: [[fits, float(f"{loss:.8g}")] for fits, loss in each.curve]
        for each in outcomes
        if each.way in (*INKS, EACH)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(kept[key])}" for key in SETTINGS if key in kept)
    path.write_text(f"{{\n{lines}\n}}\n")


def read(path: Path) -> dict[str, dict[str, list]]:
    """By problem and way: (fits, least validation loss so far)."""
    return json.loads(path.read_text()) if path.exists() else {}


def draw(kept: dict[str, dict[str, list]], path: Path) -> None:
    """Above: the share by which the validation loss exceeds the best with one value for all features.
    Below: the same losses as they are, with those of one value a feature. Problems with all ways alone."""
    kept = {name: curves for name, curves in kept.items() if {*INKS, EACH} <= set(curves)}
    if not kept:
        return
    fig, axes = plt.subplots(
        2, len(kept), figsize=(3.3 * len(kept), 5.6), squeeze=False, layout="constrained"
    )
    for (above, below), (name, curves) in zip(axes.T, kept.items(), strict=True):
        best = min(loss for way in INKS for _, loss in curves[way])
        for way, ink in INKS.items():
            fits, losses = np.transpose(curves[way])
            share = 100 * np.maximum(losses / best - 1, 1e-6)
            above.plot(fits, share, marker="o", ms=3, color=ink, label=way)
            below.plot(fits, losses, marker="o", ms=3, color=ink)
        fits, losses = np.transpose(curves[EACH])
        below.plot(fits, losses, "--", color="#c2410c", label="one value a feature")
        above.set(xscale="log", yscale="log", title=name)
        above.set_ylim(bottom=5e-5)
        start, least = curves["hypergradients"][0][1], min(best, losses.min())
        below.set(xscale="log", xlabel="models fitted")
        below.set_ylim(least - 0.05 * (start - least), start + 0.1 * (start - least))
        for axis in (above, below):
            axis.set_xticks(
                [5, 10, 20, 50, 100, 200, 400], labels=["5", "10", "20", "50", "100", "200", "400"]
            )
            axis.minorticks_off()
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("validation loss above the best, %")
    axes[1, 0].set_ylabel("validation loss")
    axes[0, 0].legend(frameon=False)
    axes[1, 0].legend(frameon=False)
    fig.savefig(path, dpi=130)


def measure(name: str, setting: Setting, kinds: tuple[str, ...], quick: bool) -> list[Outcome]:
    """These ways on one problem, and their rows of the table."""
    data, finest, found = load(setting), 5 if quick else setting.finest, []
    if quick:
        setting = Setting(setting.data, setting.model, setting.bounds, 5, 5)
    for kind in kinds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind in ("grid", "random"):
                one = black_box(setting, data, kind, finest)
            else:
                one = hypergradients(setting, data, kind == "each", kind == "again")
        found.append(one)
        print(
            f"| {name} | {one.way} | {one.loss:.5g} | {one.test:.5g} | {one.fits} | {one.seconds:.2f} |",
            flush=True,
        )
    return found


def main() -> None:
    """Prints the table and draws the picture."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="grids of 5 points, 5 evaluations a feature")
    options.add_argument(
        "--only", nargs="*", default=tuple(SETTINGS), help="settings that contain one of these"
    )
    options.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS, help="ways; each: one a feature")
    options.add_argument("--draw", action="store_true", help="the picture only, from what is kept")
    add_folder(options)
    args = options.parse_args()
    folder = kept_in(args)
    kept = folder / "results" / "scikit_learn.json"
    if not args.draw:
        print(f"Machine: {bench.machine()}\n")
        print("| problem | way | validation loss | test loss | fits | seconds |")
        print("|---|---|---|---|---|---|")
        for name, setting in SETTINGS.items():
            if any(part in name for part in args.only):
                keep(name, measure(name, setting, tuple(args.kinds), args.quick), kept)
    draw(read(kept), folder / "scikit_learn.png")


if __name__ == "__main__":
    main()
