"""Sparse input made dense, and not in silence."""

import warnings
from typing import Any

LARGE = 32 * 2**20  # bytes from which on the user is told


def dense(X: Any) -> Any:
    """X as it is, or without its sparsity.

    Warns:
        UserWarning: naming the size, when that is 32 MiB or more.

    >>> dense([[1.0]])
    [[1.0]]
    """
    if not hasattr(X, "toarray"):
        return X
    size = 8 * X.shape[0] * X.shape[1]
    if size >= LARGE:
        warnings.warn(
            f"HypergradientSearchCV makes sparse input of shape {X.shape} dense, {size / 2**20:.0f} MiB for "
            "each fold; to use less, select features first (SelectKBest) or take fewer folds",
            UserWarning,
            stacklevel=2,
        )
    return X.toarray()
