"""Cross-validation folds as the tasks of one bilevel problem: padded to one length, exact by weights."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.utils import _safe_indexing
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.validation import check_array

from bilevel.sklearn.dense import dense


class Part(NamedTuple):
    """Rows of a fold; a row of padding has zeros throughout, and weight 0.

    Args:
        x: float64 `[n, d]`.
        y: float64 `[n, t]`: targets; 0 or 1 `[n, 1]` for two classes, a one-hot code for more.
        w: float64 `[n]`, how much each row counts.
    """

    x: Any
    y: Any
    w: Any


class Fold(NamedTuple):
    """What a model is fitted on, and what judges it.

    Args:
        size, width: the rows of the support and the features, without padding.
    """

    support: Part
    query: Part
    size: int
    width: int


def targets(y: np.ndarray, classes: np.ndarray | None) -> np.ndarray:
    """y as float64 `[n, t]`.

    >>> targets(np.array(["b", "a"]), np.array(["a", "b"])).ravel()
    array([1., 0.])
    """
    if classes is None:
        return np.asarray(y, np.float64).reshape(len(y), -1)
    code = np.eye(len(classes))[np.searchsorted(classes, y)]
    return code[:, 1:] if len(classes) == 2 else code


def make_folds(
    transform: Any,
    X: Any,
    y: np.ndarray,
    *,
    classes: np.ndarray | None,
    sample_weight: np.ndarray,
    class_weight: Any,
    splits: Sequence[tuple[np.ndarray, np.ndarray]],
) -> list[Fold]:
    """The parts of each fold.

    Args:
        transform: a Pipeline without its last step, cloned and fitted on the support of each fold alone, so
            that nothing of the query leaks into it; None for none.
        X: whatever `transform` takes, or an array; rows are examples.
        y: `[n]` or `[n, t]`.
        classes: sorted labels of a classifier, None for regression.
        sample_weight: `[n]`.
        class_weight: that of the classifier, applied to its support only.
        splits: rows of support and query, one pair a fold.

    Raises:
        ValueError: when a class is missing from a support, when a part of a fold has no weight, when the
            transform gives folds of different widths.
    """
    code, found = targets(y, classes), []
    for number, (support, query) in enumerate(splits):
        a, b = _safe_indexing(X, support), _safe_indexing(X, query)
        if transform is not None:
            fold_transform: Any = clone(transform)
            a, b = fold_transform.fit_transform(a, y[support]), fold_transform.transform(b)
        weights = np.asarray(sample_weight[support], np.float64)
        _require_weight(number, weights, sample_weight[query])
        if classes is not None:
            _require_classes(number, classes, y[support][weights > 0])
            weights = weights * _of_classes(class_weight, classes, y[support], weights)
        fitted = Part(_floats(a), code[support], weights)
        judged = Part(_floats(b), code[query], np.asarray(sample_weight[query], np.float64))
        found.append(Fold(fitted, judged, *fitted.x.shape))
    widths = {fold.support.x.shape[1] for fold in found}
    if len(widths) > 1:
        raise ValueError(
            f"the steps before the model give {sorted(widths)} features, a different number in different "
            "folds; fix it before the search, for instance with OneHotEncoder(categories=...)"
        )
    return found


def pad(folds: Sequence[Fold], features: bool) -> list[Fold]:
    """The same folds with parts of one length each; what is added has weight 0.

    Lengths are rounded up to one of few, so that folds of folds and data sets of about one size are compiled
    once.

    Args:
        features: round their number up too, with features that are zero throughout.

    >>> part = lambda n: Part(np.ones((n, 2)), np.ones((n, 1)), np.ones(n))
    >>> longer, shorter = pad([Fold(part(3), part(1), 3, 2), Fold(part(2), part(2), 2, 2)], features=True)
    >>> shorter.support.x.shape, shorter.support.w.sum(), longer.query.w.sum()
    ((64, 16), np.float64(2.0), np.float64(1.0))
    """
    rows = rounded(max(len(fold.support.w) for fold in folds), 64)
    query_rows = rounded(max(len(fold.query.w) for fold in folds), 64)
    width = folds[0].support.x.shape[1]
    wider = rounded(width, 16) - width if features else 0

    def longer(part: Part, rows: int) -> Part:
        more = rows - len(part.w)
        x = np.pad(part.x, [(0, more), (0, wider)])
        return Part(x, np.pad(part.y, [(0, more), (0, 0)]), np.pad(part.w, (0, more)))

    return [Fold(longer(f.support, rows), longer(f.query, query_rows), f.size, f.width) for f in folds]


def rounded(count: int, least: int) -> int:
    """Up to a multiple of `least` or of about an eighth of it, whichever is more.

    >>> rounded(65, 64), rounded(1000, 64)
    (128, 1024)
    """
    step = max(least, 2 ** (count.bit_length() - 4) if count >= 16 else 1)
    return -(-count // step) * step


def center(part: Part, fit_intercept: bool, scale: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The weighted mean of each feature `[d]`, and its standard deviation or 1.

    A penalty leaves the intercept alone, so that moving the features changes nothing but the intercept.
    Without one the mean is 0; a feature that is constant has scale 1.
    """
    share = part.w / part.w.sum()
    mean = share @ part.x if fit_intercept else np.zeros(part.x.shape[1])
    if not scale:
        return mean, np.ones_like(mean)
    spread = np.sqrt(share @ (part.x - mean) ** 2)
    size = np.max(np.abs(part.x), axis=0, initial=0)
    return mean, np.where(spread > 1e-12 * size, spread, 1.0)


def _floats(x: Any) -> np.ndarray:
    return np.asarray(check_array(dense(x), dtype="float64"))


def _of_classes(class_weight: Any, classes: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weight `[n]` that each row has for its class."""
    if class_weight is None:
        return np.ones(len(y))
    each = compute_class_weight(class_weight, classes=classes, y=y, sample_weight=weights)
    return each[np.searchsorted(classes, y)]


def _require_weight(number: int, *parts: np.ndarray) -> None:
    for name, weights in zip(("training", "validation"), parts):
        if not np.sum(weights) > 0:
            raise ValueError(
                f"sample_weight is 0 throughout the {name} part of fold {number}; use fewer folds, or cv= an "
                "iterable of splits"
            )


def _require_classes(number: int, classes: np.ndarray, present: np.ndarray) -> None:
    missing = np.setdiff1d(classes, present)
    if len(missing):
        raise ValueError(
            f"the training part of fold {number} has no example of class {missing[0]!r}, so that no "
            "probability of it can be fitted; use fewer folds, more examples of that class, or leave it out"
        )
