"""Runs compared on the same tasks: the paired difference, and who wins in words."""

from typing import Any, NamedTuple

import numpy as np

_RESAMPLES = 2000
_BATCH = 50  # resamples at a time, so that 10 000 tasks need megabytes


class Paired(NamedTuple):
    """The difference of two runs on the same tasks.

    Args:
        difference: mean of a − b over tasks.
        ci95: half-width of its 95% interval by Student's t.
        bootstrap: the 95% percentile interval by resampling tasks, `(low, high)`.
        unpaired_ci95: the half-width that the two intervals would give had the tasks differed.
        num_tasks: tasks.
        ties: share of tasks with exactly the same figure.
    """

    difference: float
    ci95: float
    bootstrap: tuple[float, float]
    unpaired_ci95: float
    num_tasks: int
    ties: float

    @property
    def decided(self) -> bool:
        """Whether zero lies outside both intervals; never where all tasks differ alike and there is none."""
        low, high = self.bootstrap
        return self.ci95 > 0 and abs(self.difference) > self.ci95 and (low > 0 or high < 0)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**self._asdict(), "bootstrap": list(self.bootstrap), "decided": self.decided}


def paired(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Paired:
    """How much better a is than b on the same tasks.

        d_i = a_i − b_i,   mean(d) ± t · std(d) / √n

    Tasks differ in difficulty, which both runs meet alike and which cancels in d: the interval is narrower
    than that of two separate evaluations by √(1 − correlation).

    Args:
        a, b: `[num_tasks]`, a figure of each task, in one order.
        seed: of the bootstrap.

    Raises:
        ValueError: for different lengths, fewer than 2 tasks, or a figure that is not finite.

    Biased: no; the bootstrap is a little short for few tasks. Neither knows of the spread over training
    seeds: that needs several runs of each method.

    Reference: Efron, Tibshirani, 1993; Dror et al., The hitchhiker's guide to testing significance, 2018.

    >>> same = paired(np.array([0.2, 0.4, 0.9]), np.array([0.2, 0.4, 0.9]))
    >>> same.difference, same.ci95, same.bootstrap, same.ties
    (0.0, 0.0, (0.0, 0.0), 1.0)
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(
            f"a and b must be figures of the same 2 or more tasks, got shapes {a.shape} and {b.shape}"
        )
    for name, values in (("a", a), ("b", b)):
        if not np.isfinite(values).all():
            bad = int(np.argmin(np.isfinite(values)))
            raise ValueError(f"{name} must be finite on every task, got {values[bad]} on task {bad}")
    difference = a - b
    count = len(a)
    if not np.any(difference != difference[0]):  # no spread: nothing to estimate, and 0/0 in a t-test
        mean = float(difference[0])
        half, low, high = 0.0, mean, mean
    else:
        from scipy import stats  # takes a second to import

        half = float(stats.t.ppf(0.975, count - 1) * difference.std(ddof=1) / count**0.5)
        mean = float(difference.mean())
        found = stats.bootstrap(
            (difference,), np.mean, n_resamples=_RESAMPLES, batch=_BATCH, method="percentile",
            rng=np.random.default_rng(seed),
        )  # fmt: skip
        low, high = (float(end) for end in found.confidence_interval)
    unpaired = 1.96 * float(np.sqrt((a.var(ddof=1) + b.var(ddof=1)) / count))
    return Paired(mean, half, (low, high), unpaired, count, float((difference == 0).mean()))


def same_tasks(there: np.ndarray, here: np.ndarray) -> int | None:
    """The first task in which two evaluations differ, None when they are on the same tasks.

    Args:
        there, here: `sketch` of each task, `[num_tasks, leaves, 2]`; the shorter one says how many count.

    >>> sketches = np.ones((5, 4, 2))
    >>> same_tasks(sketches, sketches[:3]), same_tasks(sketches, sketches + np.arange(5)[:, None, None])
    (None, 1)
    """
    if there.shape[1:] != here.shape[1:]:
        return 0
    count = min(len(there), len(here))
    projection = np.abs(there[:count, :, 0] - here[:count, :, 0]) > 1e-3
    norm = np.abs(there[:count, :, 1] - here[:count, :, 1]) > 1e-3 * (1e-6 + np.abs(here[:count, :, 1]))
    different = (projection | norm).any(1)
    return int(np.argmax(different)) if different.any() else None


def winner(name_a: str, name_b: str, found: Paired, figure: str) -> str:
    """Who wins, in words.

    >>> print(winner("A", "B", Paired(0.021, 0.004, (0.017, 0.025), 0.01, 600, 0.1), "accuracy"))
    A is better than B: accuracy 2.10 ± 0.40 points higher on the same 600 tasks.
    >>> print(winner("A", "B", Paired(0.0, 0.0, (0.0, 0.0), 0.01, 600, 1.0), "accuracy"))
    A and B are equal on every one of the 600 tasks.
    >>> one = Paired(0.0001, 0.0, (0.0001, 0.0001), 0.0, 2, 0.0)
    >>> one.decided, winner("A", "B", one, "accuracy").split(" on ")[0]
    (False, 'no winner is named: A minus B is +0.01 points in accuracy')
    """
    tasks = f"the same {found.num_tasks} tasks"
    if found.ties == 1:
        return f"{name_a} and {name_b} are equal on every one of the {found.num_tasks} tasks."
    percent = figure.endswith("accuracy")
    if found.ci95 == 0:  # one test set, judged more than once
        size = f"{100 * found.difference:+.2f} points" if percent else f"{found.difference:+.4g}"
        return (
            f"no winner is named: {name_a} minus {name_b} is {size} in {figure} on each of {tasks}, "
            "which says nothing of another test set or another seed; train several seeds of each."
        )
    size, half = (100 * v if percent else v for v in (abs(found.difference), found.ci95))
    text = f"{size:.2f} ± {half:.2f} points" if percent else f"{size:.4g} ± {half:.2g}"
    if not found.decided:
        return (
            f"no winner: {name_a} and {name_b} differ by {text} in {figure} on {tasks}, "
            "which may be chance; more tasks would narrow it."
        )
    higher = found.difference > 0
    better, worse = (name_a, name_b) if higher == percent else (name_b, name_a)
    return f"{better} is better than {worse}: {figure} {text} {'higher' if percent else 'lower'} on {tasks}."
