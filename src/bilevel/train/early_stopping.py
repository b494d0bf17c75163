"""Validation on held-out classes while training, and stopping when it no longer gets better."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from bilevel.problem import Key, Learner, Task
from bilevel.train.checkpoint import Checkpoints
from bilevel.train.evaluate import evaluator
from bilevel.train.loop import Run
from bilevel.train.metrics import read_metrics
from bilevel.train.step import MetaState

PREFIX = "validation_"
BEST = "best"  # the folder of the best checkpoint, beside checkpoints/
_STREAM = 0x5A11D  # keys apart from those that training draws from


@dataclass(frozen=True)
class Validation:
    """How often a run is validated on held-out classes, and when it stops for it.

    Args:
        every: outer steps between validations, rounded up to whole chunks; 0 is never.
        patience: validations without a new best after which the run stops; 0 never stops.
        num_tasks: validation tasks, the same each time.
        num_steps: inner steps; those of the recipe's evaluation when left out.

    Raises:
        ValueError: for numbers out of range, or patience without validation.
    """

    every: int = 0
    patience: int = 0
    num_tasks: int = 200
    num_steps: int | None = None

    def __post_init__(self):
        for name, least in (("every", 0), ("patience", 0), ("num_tasks", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"validation.{name} must be at least {least}, got {getattr(self, name)}")
        if self.patience and not self.every:
            raise ValueError(
                f"validation.patience={self.patience} needs validations: set validation.every to a number of "
                "outer steps"
            )


class EarlyStopping:
    """An `on_chunk` callback of `bl.train` that validates, keeps the best state and asks to stop.

    It has no state that a resumed run would miss: the figures of earlier validations are read back from
    metrics.jsonl, which a resumed run has cut to the step it goes on from, and the tasks follow from the
    run's key. So a run that was killed and resumed stops at the same step, with the same bytes.

    Args:
        learner: what is trained.
        sample_validation: one task of classes that are neither trained on nor tested on.
        options: how often, and when to stop.
        run: the run's folder; the best state goes to `best/` in it. Without one nothing is kept.
        task_chunk: see `evaluate`.

    Raises:
        ValueError: when `options.every` is 0.

    Reference: Prechelt, Early stopping, but when?, 1998; Yin et al., Meta-learning without memorization,
    2020, for why training tasks do not tell.

    >>> import bilevel as bl, optax
    >>> learner = bl.maml(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, rates=0.01)
    >>> sample = bl.tasks.batch(bl.tasks.sinusoid, 4)
    >>> state = bl.init_state(learner, optax.adam(1e-3), sample, jax.random.key(0))
    >>> watch = EarlyStopping(learner, bl.tasks.sinusoid, Validation(every=2, num_tasks=4))
    >>> from bilevel.train.loop import Options, train
    >>> state = train(learner, optax.adam(1e-3), sample, state, 4, options=Options(2), on_chunk=[watch])
    >>> [step for step, _ in watch.history]
    [2, 4]
    """

    def __init__(
        self,
        learner: Learner,
        sample_validation: Callable[[Key], Task],
        options: Validation,
        *,
        run: Run | None = None,
        task_chunk: int = 1,
    ):
        if options.every < 1:
            raise ValueError("validation.every must be at least 1 for early stopping, got 0")
        self.options = options
        self.history: list[tuple[int, float]] | None = None
        self._judge = evaluator(
            learner,
            sample_validation,
            num_tasks=options.num_tasks,
            num_steps=options.num_steps,
            task_chunk=task_chunk,
        )
        self._run = run
        self._last = 0  # the step of the last chunk that was seen

    def __call__(self, state: MetaState, values: dict[str, float]) -> bool:
        """Validate where it is due, adding to the row of metrics; whether to stop."""
        step = int(state.step)
        if self.history is None:
            self.history, self._last = self._past(step)
        due = step // self.options.every > self._last // self.options.every
        self._last = step
        if not due:
            return False
        result = self._judge(state.meta, jax.random.fold_in(state.key, _STREAM))
        for name, curve in result.curves.items():
            figure = PREFIX + name.removeprefix("query_")
            if name.startswith("query_"):
                values[figure], values[f"{figure}_ci95"] = float(curve.mean[-1]), float(curve.ci95[-1])
        figure, value = _figure(values)
        self.history.append((step, value))
        if self._run is not None and best(self.history, figure)[0] == step:
            # One folder is enough: a run that is replayed after a kill finds the same best again.
            kept = Checkpoints(self._run.folder / BEST, keep=1)
            kept.save(step, state, self._run.fingerprint)
        return _exhausted(self.history, figure, self.options.patience)

    def _past(self, step: int) -> tuple[list[tuple[int, float]], int]:
        """The validations before a step, and the step of the last chunk before it."""
        rows = [] if self._run is None else _rows(self._run.folder, step - 1)
        return _history(rows), rows[-1]["step"] if rows else 0


def best(history: list[tuple[int, float]], figure: str) -> tuple[int, float]:
    """Step and figure of the best validation; the first one where several are equal.

    >>> best([(10, 0.5), (20, 0.7), (30, 0.7)], "validation_accuracy")
    (20, 0.7)
    """
    sign = -1.0 if figure.endswith("accuracy") else 1.0
    return min(history, key=lambda point: sign * point[1] if math.isfinite(point[1]) else math.inf)


def stopped_at(folder: Path, options: Validation, step: int) -> tuple[int, float] | None:
    """Step and figure of the best validation of a run that had stopped by `step`; None if it had not.

    Args:
        folder: the run's; its metrics.jsonl is read.
        step: outer steps done.
    """
    rows = _rows(folder, step)
    history = _history(rows)
    if not history:
        return None
    figure = _figure(next(filter(_validated, rows)))[0]
    return best(history, figure) if _exhausted(history, figure, options.patience) else None


def _exhausted(history: list[tuple[int, float]], figure: str, patience: int) -> bool:
    """Whether the last `patience` validations brought no new best."""
    if not patience:
        return False
    steps = [step for step, _ in history]
    return len(steps) - 1 - steps.index(best(history, figure)[0]) >= patience


def _rows(folder: Path, last: int) -> list[dict[str, Any]]:
    path = Path(folder) / "metrics.jsonl"
    return [row for row in read_metrics(path) if row["step"] <= last] if path.is_file() else []


def _history(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """Step and figure of each validation; null in the file was not finite."""
    found = [(row["step"], _figure(row)[1]) for row in rows if _validated(row)]
    return [(step, math.nan if value is None else value) for step, value in found]


def _validated(row: dict[str, Any]) -> bool:
    return f"{PREFIX}loss" in row


def _figure(row: dict[str, Any]) -> tuple[str, Any]:
    """The figure that decides: the accuracy where there is one, else the loss."""
    name = next(f"{PREFIX}{n}" for n in ("accuracy", "loss") if f"{PREFIX}{n}" in row)
    return name, row[name]
