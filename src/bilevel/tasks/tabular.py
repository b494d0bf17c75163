"""Tables: scikit-learn's bundled sets, a CSV file or arrays, in support, validation and test parts."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

BUNDLED = ("breast_cancer", "diabetes", "digits", "iris", "wine")
SHARES = (0.5, 0.25, 0.25)  # of support, validation and test


class Tabular(NamedTuple):
    """A table in three parts, standardized by the support alone.

    Args:
        support: (x float32 [n, num_features], y [n]); y is int32, 0..num_classes-1, or, of a regression,
            float32 in standard deviations of the support's targets.
        validation: the same of other rows.
        test: the same of other rows.
        features: the names of the columns of x.
        classes: the names of the classes, empty for a regression.
    """

    support: tuple[np.ndarray, np.ndarray]
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    features: tuple[str, ...]
    classes: tuple[str, ...]


def tabular(
    name: str | os.PathLike,
    seed: int = 0,
    *,
    target: str | None = None,
    shares: tuple[float, float, float] = SHARES,
) -> Tabular:
    """One of scikit-learn's bundled sets, or a CSV file with a header line.

    Args:
        name: "breast_cancer", "diabetes" (a regression), "digits", "iris", "wine", or the path of a file
            that ends in .csv. Its columns are numbers; its target is text or whole numbers (classes), or
            other numbers (a regression).
        seed: of the split.
        target: the target's column in a CSV file; the last one when left out.
        shares: how much of the rows is support, validation and test.

    Returns:
        A `Tabular`, see `divide`.

    Raises:
        ValueError: for an unknown name, a damaged file, or a table too small to divide.
        FileNotFoundError: when there is no such file.
        ImportError: when scikit-learn is missing.

    >>> data = tabular("iris")
    >>> data.support[0].shape, data.validation[0].shape, data.classes
    ((75, 4), (37, 4), ('setosa', 'versicolor', 'virginica'))
    """
    if str(name).endswith(".csv"):
        x, y, features = _read_csv(Path(name).expanduser(), target)
        return divide(x, y, seed, shares=shares, features=features)
    if name not in BUNDLED:
        raise ValueError(
            f"there is no table {str(name)!r}; there are {', '.join(BUNDLED)}, and the path of a .csv file"
        )
    if target is not None:
        raise ValueError(f"target is for a .csv file, {name} has one of its own; leave it out")
    bunch = getattr(_sklearn()[0], f"load_{name}")()
    names = {"features": bunch.feature_names, "classes": [str(c) for c in bunch.get("target_names", ())]}
    return divide(bunch.data, bunch.target, seed, shares=shares, **names)


def divide(
    x: ArrayLike,
    y: ArrayLike,
    seed: int = 0,
    *,
    shares: tuple[float, float, float] = SHARES,
    features: Sequence[str] = (),
    classes: Sequence[str] = (),
) -> Tabular:
    """Arrays of your own in three parts, with the shares of the classes kept in each.

        x ← (x − mean of the support) / standard deviation of the support

    A column that is constant in the support becomes zero there. So do the targets of a regression.

    Args:
        x: numbers [n, num_features].
        y: [n]; text and whole numbers are classes, other numbers a regression.
        seed: of the split.
        shares: how much of the rows is support, validation and test: positive, with a sum of 1.
        features: names of the columns.
        classes: names of the classes, in the order of their sorted labels.

    Raises:
        TypeError: when `x` holds no numbers.
        ValueError: for wrong shapes, figures that are not finite, or a class of fewer than 4 rows.

    >>> data = divide(np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2)
    >>> len(data.support[1]), len(data.validation[1]), len(data.test[1]), data.classes
    (20, 10, 10, ('0', '1'))
    """
    x, y, found = _checked(np.asarray(x), np.asarray(y), shares)
    classes = tuple(classes) or found
    _, select = _sklearn()
    first, later = np.arange(len(x)), None
    try:
        first, later = select.train_test_split(
            first, train_size=shares[0], stratify=y if classes else None, random_state=seed
        )
        second, third = select.train_test_split(
            later,
            train_size=shares[1] / (shares[1] + shares[2]),
            stratify=y[later] if classes else None,
            random_state=seed,
        )
    except ValueError as error:
        raise ValueError(f"{len(x)} rows cannot be divided by {shares} ({error}); give more rows") from error
    x = _standardized(x, first).astype(np.float32)
    y = y.astype(np.int32) if classes else _standardized(y, first).astype(np.float32)
    names = tuple(map(str, features)) or tuple(f"x{i}" for i in range(x.shape[1]))
    if len(names) != x.shape[1]:
        raise ValueError(f"features must name the {x.shape[1]} columns of x, got {len(names)} names")
    support, validation, test = ((x[rows], y[rows]) for rows in (first, second, third))
    return Tabular(support, validation, test, names, classes)


def _standardized(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """In units of the spread of some rows; a column that is constant there is only moved."""
    spread = values[rows].std(0)
    return (values - values[rows].mean(0)) / np.where(spread > 0, spread, 1.0)


def _checked(x: np.ndarray, y: np.ndarray, shares) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Rows that can be divided: x and y as floats or codes, and the labels where they are classes."""
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares must be three positive numbers with a sum of 1, got {shares}")
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"expected x [n, num_features] and y [n], got {x.shape} and {y.shape}")
    if not (np.issubdtype(x.dtype, np.number) or x.dtype == bool) or np.iscomplexobj(x):
        raise TypeError(f"x must hold numbers, got {x.dtype}; turn categories into columns of 0 and 1")
    x = x.astype(np.float64)
    if not np.isfinite(x).all():
        row, column = np.argwhere(~np.isfinite(x))[0]
        raise ValueError(f"x[{row}, {column}] is {x[row, column]}; fill in or leave out what is missing")
    if np.issubdtype(y.dtype, np.floating):
        if not np.isfinite(y).all():
            raise ValueError(f"y[{np.argmax(~np.isfinite(y))}] is not finite; leave such rows out")
        return x, y.astype(np.float64), ()
    labels, codes, counts = np.unique(y, return_inverse=True, return_counts=True)
    if len(labels) < 2 or counts.min() < 4:
        raise ValueError(
            f"expected at least 2 classes of at least 4 rows each, got {len(labels)} classes with as few as "
            f"{counts.min()} (class {labels[counts.argmin()]}); leave rare classes out, or give y as floats "
            "if it is no class"
        )
    return x, codes, tuple(map(str, labels))


def _read_csv(path: Path, target: str | None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a table with a header line")
    with path.open(newline="", encoding="utf-8-sig") as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    if len(header) < 2 or not rows:
        raise ValueError(f"{path} must have a header line of at least 2 columns, and rows below it")
    if target is not None and target not in header:
        raise ValueError(f"{path} has no column {target!r}; it has {', '.join(header)}")
    place = len(header) - 1 if target is None else header.index(target)
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise ValueError(f"row {number} of {path} has {len(row)} columns, expected {len(header)}")
    names = tuple(name for i, name in enumerate(header) if i != place)
    x = np.empty((len(rows), len(names)))
    for number, row in enumerate(rows, 2):
        for i, cell in enumerate(c for j, c in enumerate(row) if j != place):
            try:
                x[number - 2, i] = float(cell)
            except ValueError as error:
                raise ValueError(
                    f"row {number} of {path}: {names[i]} is {cell!r}, expected a number; fill in what is "
                    "missing and turn categories into columns of 0 and 1"
                ) from error
    return x, _as_targets([row[place].strip() for row in rows]), names


def _as_targets(cells: list[str]) -> np.ndarray:
    """Whole numbers or text, which are classes, or floats."""
    for kind in (int, float):
        try:
            return np.array([kind(cell) for cell in cells])
        except ValueError:
            pass
    return np.array(cells)


def _sklearn():
    """scikit-learn's sets and splits; here and not above, so that `import bilevel` stays light."""
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise ImportError("tables need scikit-learn: pip install scikit-learn") from error
    return datasets, model_selection
