"""How well repeated estimates agree with what they estimate: cosine, error, bias with its interval, noise."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """Estimates against the truth.

    Args:
        cosine: of the mean estimate and the truth; NaN where one of them is zero.
        relative_error: ‖E[estimate] − truth‖ / ‖truth‖, with what noise adds to it taken off.
        length: ⟨E[estimate], truth⟩ / ‖truth‖², 1 when it is right.
        bias: `length − 1`, the bias along the truth.
        bias_ci95: half-width of its 95% interval; 0 for a deterministic estimator.
        noise: standard deviation of one estimate, √tr Cov / ‖truth‖.
        biased: whether the estimates deviate from the truth by more than chance (1% level, all tested
            directions together); for a deterministic estimator whether they deviate at all.
    """

    cosine: float
    relative_error: float
    length: float
    bias: float
    bias_ci95: float
    noise: float
    biased: bool


def agreement(estimates: np.ndarray, truth: np.ndarray, tests: np.ndarray | None = None) -> Agreement:
    """Compare estimates with the truth, repeat by repeat.

    Args:
        estimates: `[repeats, n]`, elements of gradients or their products with n directions.
        truth: `[repeats, n]` or `[1, n]`.
        tests: `[repeats, m]` deviations along further directions, which may betray a bias.

    >>> agreement(np.array([[2.0, 0.0]]), np.array([[4.0, 0.0]])).length
    0.5
    """
    repeats = len(estimates)
    deviations = estimates - truth
    mean, right, off = estimates.mean(0), truth.mean(0), deviations.mean(0)
    size, spread = float(right @ right), 0.0
    if repeats > 1:
        spread = float(deviations.var(0, ddof=1).sum())
    if size == 0:
        nan = float("nan")
        wrong = bool(np.any(mean != 0))
        return Agreement(nan, np.inf if wrong else 0.0, nan, nan, nan, np.inf if spread else 0.0, wrong)
    norms = np.sqrt(size * float(mean @ mean))
    along = deviations @ right / size
    half = student(0.95, repeats - 1) * along.std(ddof=1) / np.sqrt(repeats) if repeats > 1 else 0.0
    squared = max(float(off @ off) - spread / repeats, 0.0)
    columns = along[:, None] if tests is None else np.column_stack([along, tests])
    return Agreement(
        cosine=float(mean @ right / norms) if norms else float("nan"),
        relative_error=float(np.sqrt(squared / size)),
        length=float(1 + along.mean()),
        bias=float(along.mean()),
        bias_ci95=float(half),
        noise=float(np.sqrt(spread / size)),
        biased=_deviates(columns),
    )


def _deviates(columns: np.ndarray) -> bool:
    """Whether the mean of any column is off zero by more than chance."""
    repeats, count = columns.shape
    mean = np.abs(columns.mean(0))
    if repeats == 1:
        return bool(np.any(mean > 0))
    error = columns.std(0, ddof=1) / np.sqrt(repeats)
    return bool(np.any(mean > student(1 - 0.01 / count, repeats - 1) * error))


def student(probability: float, freedom: int) -> float:
    """The two-sided quantile of Student's t, by the expansion around the normal one.

    Accurate to 1% from 7 degrees of freedom on; below that it is a little too small.

    >>> round(student(0.95, 15), 2)  # 2.13 in tables
    2.13
    """
    z = NormalDist().inv_cdf((1 + probability) / 2)
    n = freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3
