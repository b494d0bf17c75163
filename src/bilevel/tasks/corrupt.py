"""Labels made wrong, and classes made rare, on purpose: what cleaning and reweighting are measured on.

Everything here runs once, on the host, before training; a seed decides all of it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike


class Corrupted(NamedTuple):
    """Labels of which some are wrong.

    Args:
        labels: int32 [n].
        wrong: bool [n], where they differ from the true ones. Of replaced labels that happen to be right, it
            says that they are right.
    """

    labels: np.ndarray
    wrong: np.ndarray


def uniform_noise(
    labels: ArrayLike, share: float, seed: int, *, num_classes: int | None = None, always_wrong: bool = False
) -> Corrupted:
    """Replace a share of the labels by random ones.

    Args:
        labels: int [n], in 0..num_classes-1.
        share: of the rows, 0..1; round(share n) of them are drawn without repeats.
        num_classes: the largest label and one, when left out.
        always_wrong: draw among the other classes only. Else a replaced label is right with probability
            1 / num_classes, as in most published protocols: "50 %" are 45 % wrong labels of ten classes.

    Raises:
        TypeError, ValueError: when labels are not integers of [n] in range, or the share is not in 0..1.

    >>> noisy = uniform_noise(np.arange(1000) % 10, 0.5, seed=0)
    >>> 400 < noisy.wrong.sum() < 500
    np.True_
    >>> int(uniform_noise(np.arange(1000) % 10, 0.5, seed=0, always_wrong=True).wrong.sum())
    500
    """
    labels, num_classes = _checked(labels, num_classes)
    rng, rows = _drawn(len(labels), share, seed)
    if always_wrong:
        drawn = (labels[rows] + rng.integers(1, num_classes, len(rows))) % num_classes
    else:
        drawn = rng.integers(0, num_classes, len(rows))
    return _replaced(labels, rows, drawn)


def flip_noise(labels: ArrayLike, share: float, seed: int, *, to: Sequence[int] | None = None) -> Corrupted:
    """Turn a share of the labels into the one class that theirs is mistaken for.

    Args:
        labels: int [n].
        share: of the rows, 0..1; round(share n) of them are drawn without repeats.
        to: `to[c]` is what class c becomes, another class for each. Left out, the classes are put in a random
            ring, and each becomes the next.

    Raises:
        TypeError, ValueError: as `uniform_noise`; when `to` names a class as its own, or none of those there
            are.

    >>> flip_noise([0, 1, 2, 0], 1.0, seed=0, to=[1, 2, 0]).labels.tolist()
    [1, 2, 0, 1]
    """
    labels, num_classes = _checked(labels, None if to is None else len(to))
    rng, rows = _drawn(len(labels), share, seed)
    if to is None:
        ring = rng.permutation(num_classes)
        flipped = np.empty(num_classes, np.int32)
        flipped[ring] = np.roll(ring, -1)
    else:
        flipped = np.asarray(to)
        if flipped.min() < 0 or flipped.max() >= num_classes or (flipped == np.arange(num_classes)).any():
            raise ValueError(
                f"flip_noise needs `to` to name another class of 0..{num_classes - 1} for each, got {to}"
            )
    return _replaced(labels, rows, flipped[labels[rows]])


def long_tailed(labels: ArrayLike, factor: float, seed: int, *, largest: int | None = None) -> np.ndarray:
    """Rows of a set whose classes get rarer and rarer.

        n_c = n₀ · factor^(−c / (C−1))

    Args:
        labels: int [n]; classes are 0..C-1, and class 0 stays the largest.
        factor: how many times class 0 is as large as the last one, at least 1.
        largest: n₀; the smallest class of `labels` when left out.

    Returns:
        Rows int [m], in random order.

    Raises:
        TypeError, ValueError: when labels are no classes, there are too few examples, or the factor is
            below 1.

    Reference: Cui, Jia, Lin, Song, Belongie, Class-balanced loss, 2019.

    >>> rows = long_tailed(np.arange(1000) % 10, 10, seed=0)
    >>> np.bincount(np.arange(1000)[rows] % 10).tolist()
    [100, 77, 59, 46, 35, 27, 21, 16, 12, 10]
    """
    labels, num_classes = _checked(labels, None)
    counts = np.bincount(labels, minlength=num_classes)
    largest = int(counts.min()) if largest is None else largest
    if factor < 1 or largest < 1:
        raise ValueError(
            f"long_tailed needs a factor and a largest class of 1 or more, got {factor}, {largest}"
        )
    wanted = np.floor(largest * factor ** (-np.arange(num_classes) / (num_classes - 1)) + 1e-9).astype(int)
    return _rows_of(labels, dict(enumerate(np.maximum(wanted, 1).tolist())), seed)


def imbalanced_pair(
    labels: ArrayLike, pair: tuple[int, int], size: int, share: float, seed: int
) -> np.ndarray:
    """Rows of two classes, one of them rare.

    Args:
        labels: int [n].
        pair: the rare class and the common one.
        size: rows in all.
        share: of the common class, 0.5..1; at least one row of the rare class stays.

    Returns:
        Rows int [size], in random order.

    Raises:
        TypeError, ValueError: when labels are no classes, there are too few examples, or the share is out of
            range.

    Reference: Ren, Zeng, Yang, Urtasun, Learning to reweight examples, 2018.

    >>> rows = imbalanced_pair(np.arange(1000) % 10, (4, 9), 100, 0.95, seed=0)
    >>> np.bincount(np.arange(1000)[rows] % 10).tolist()
    [0, 0, 0, 0, 5, 0, 0, 0, 0, 95]
    """
    labels, _ = _checked(labels, None)
    if not 0.5 <= share < 1 or size < 2:
        raise ValueError(f"imbalanced_pair needs 0.5 <= share < 1 and 2 rows or more, got {share}, {size}")
    rare = max(1, round(size * (1 - share)))
    return _rows_of(labels, {pair[0]: rare, pair[1]: size - rare}, seed)


def _rows_of(labels: np.ndarray, wanted: dict[int, int], seed: int) -> np.ndarray:
    """So many rows of each class, drawn without repeats, in random order."""
    rng = np.random.default_rng(seed)
    parts = []
    for label, count in wanted.items():
        rows = np.flatnonzero(labels == label)
        if len(rows) < count:
            raise ValueError(f"class {label} has {len(rows)} examples, {count} are wanted; ask for fewer")
        parts.append(rng.permutation(rows)[:count])
    return rng.permutation(np.concatenate(parts))


def _drawn(size: int, share: float, seed: int) -> tuple[np.random.Generator, np.ndarray]:
    if not 0 <= share <= 1:
        raise ValueError(f"the share of corrupted labels must lie in 0..1, got {share}")
    rng = np.random.default_rng(seed)
    return rng, rng.permutation(size)[: round(share * size)]


def _replaced(labels: np.ndarray, rows: np.ndarray, drawn: np.ndarray) -> Corrupted:
    noisy = labels.copy()
    noisy[rows] = drawn
    return Corrupted(noisy, noisy != labels)


def _checked(labels: ArrayLike, num_classes: int | None) -> tuple[np.ndarray, int]:
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.ndim != 1 or not labels.size:
        raise ValueError(f"labels must have shape [n] with n >= 1, got {list(labels.shape)}")
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if labels.min() < 0 or labels.max() >= num_classes or num_classes < 2:
        raise ValueError(
            f"labels must lie in 0..num_classes-1 with two classes or more, got "
            f"{labels.min()}..{labels.max()} and {num_classes} classes"
        )
    return labels.astype(np.int32), num_classes
