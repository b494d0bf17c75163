"""Means over tasks and their 95% confidence intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NORMAL_95 = 1.96  # of the field's tables; with 600 tasks Student's t is 1.964


class Curve(NamedTuple):
    """A figure along adaptation, over tasks.

    Args:
        mean: `[points]`.
        ci95: half-width of the 95% confidence interval of the mean, `[points]`.
    """

    mean: np.ndarray
    ci95: np.ndarray

    def as_json(self, steps: Sequence[int] | None = None) -> dict[str, list]:
        """Plain lists, with the inner steps after which the points are where they are given."""
        found: dict[str, list] = {"mean": self.mean.tolist(), "ci95": self.ci95.tolist()}
        return found if steps is None else found | {"steps": list(steps)}


def interval(values: np.ndarray) -> Curve:
    """The mean over tasks and the half-width of its 95% confidence interval.

        mean ± 1.96 · std / √num_tasks

    The tasks are the independent draws; the query examples of a task are not, so they never count one by
    one. An interval of the spread over seeds (several trainings) is another thing, and wider.

    Args:
        values: `[num_tasks, ...]`.

    Raises:
        ValueError: for fewer than 2 tasks, which have no spread.

    Biased: near 0% and 100% the interval is too short, and of width 0 where all tasks are right; see
    `all_right`.

    >>> mean, half = interval(np.array([1.0, 2.0, 3.0, 2.0]))
    >>> print(mean, half.round(3))
    2.0 0.8
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        raise ValueError(f"num_tasks must be at least 2 for a confidence interval, got {len(values)}")
    with np.errstate(invalid="ignore", over="ignore"):  # a task that diverged: `diverged` says so in words
        half = NORMAL_95 * values.std(0, ddof=1) / math.sqrt(len(values))
        return Curve(values.mean(0), half)


def all_right(values: np.ndarray) -> str | None:
    """What to say of an accuracy that is 1 on every task, where ± 0 would be a false promise.

        P(another task is not all right) ≤ 3 / num_tasks    with 95% confidence ("rule of three")

    Args:
        values: `[num_tasks]`, accuracies.

    Reference: Hanley, Lippman-Hand, 1983.

    >>> all_right(np.ones(600))
    'all 600 tasks are wholly right, so ± 0 says too much: up to 0.50 % of tasks may have a mistake'
    """
    if len(values) == 0 or not (values == 1).all():
        return None
    return (
        f"all {len(values)} tasks are wholly right, so ± 0 says too much: up to {300 / len(values):.2f} % "
        "of tasks may have a mistake"
    )


def diverged(losses: np.ndarray, steps: Sequence[int] | None = None) -> str | None:
    """What to say where the losses of some tasks are not finite, and so no mean over tasks is.

    Args:
        losses: `[num_tasks, points]`, along adaptation.
        steps: after which inner steps the points are; 0, 1, 2, ... when left out.

    >>> print(diverged(np.array([[1.0, 0.5, np.inf], [1.0, 0.6, 0.4]])))
    the inner loop diverges on 1 of 2 tasks, from step 2 on: no mean is finite there; take fewer steps or a
    lower rate
    """
    wrong = ~np.isfinite(losses)
    if not wrong.any():
        return None
    place = int(np.argmax(wrong.any(0)))
    first = place if steps is None else steps[place]
    return (
        f"the inner loop diverges on {int(wrong.any(1).sum())} of {len(losses)} tasks, from step {first} on: "
        "no mean is finite there; take fewer steps or a lower rate"
    )


def independent_difference(a: np.ndarray, b: np.ndarray) -> Curve:
    """mean(a) − mean(b) for figures of different tasks, whose variances add.

        √(h_a² + h_b²)

    Args:
        a: `[num_tasks, ...]`.
        b: `[another num_tasks, ...]`.

    >>> mean, half = independent_difference(np.array([1.0, 3.0]), np.array([0.0, 2.0]))
    >>> print(mean, half.round(2))
    1.0 2.77
    """
    (mean_a, half_a), (mean_b, half_b) = interval(a), interval(b)
    return Curve(mean_a - mean_b, np.hypot(half_a, half_b))
