"""One trial: a checkpointed run in a folder of its own, whose figures go to the study."""

import math
import shlex
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optuna
from optuna.trial import TrialState

import bilevel as bl
from bilevel.recipes.config import find_recipe
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.run import stopped_early, train_recipe
from bilevel.search.flags import to_flags
from bilevel.search.space import Space, apply_values
from bilevel.search.spec import Search, trial_folder
from bilevel.search.study import Book, draw
from bilevel.search.warm_start import begin_near, keep_meta, neighbours
from bilevel.train.checkpoint import Checkpoints
from bilevel.train.early_stopping import Validation
from bilevel.train.metrics import read_metrics

SECONDS = "seconds"  # an objective that is no column of the metrics: how long the run trained
_REPORTS = 50  # at most so many figures of a run go to the study
_LONGEST = 600  # characters of an error's message


def run_trial(
    book: Book,
    search: Search,
    space: Space,
    trial: optuna.Trial,
    folder: Path,
    asked: Callable[[], bool] = lambda: False,
) -> bool:
    """Run a trial to its end, or go on with it, and tell the study.

    Whatever it raises is the trial's failure, not the search's: the study keeps the message.

    Args:
        trial: a running one that nobody else works on.
        folder: of the search.
        asked: whether the worker is to stop; the run then leaves after its chunk.

    Returns:
        False when the run was asked to stop before its end: it stays a running trial, with a checkpoint.
    """
    began, before = time.perf_counter(), trial.user_attrs.get("seconds", 0.0)
    try:
        state, values = _outcome(book, search, space, trial, folder, asked)
    except Exception as error:
        traceback.print_exc()  # into the worker's log
        # What is interrupted may come out as an error of any kind, which is not the trial's.
        state, values = TrialState.RUNNING if asked() else TrialState.FAIL, None
        if state == TrialState.FAIL:
            book.set(trial.number, error=describe(error))
    book.set(trial.number, seconds=round(before + time.perf_counter() - began, 3))
    if state != TrialState.RUNNING:
        book.study.tell(trial.number, values, state, skip_if_finished=True)
    return state != TrialState.RUNNING


def _outcome(
    book: Book,
    search: Search,
    space: Space,
    trial: optuna.Trial,
    folder: Path,
    asked: Callable[[], bool],
) -> tuple[TrialState, list[float] | None]:
    """The state that a trial comes to, and the values of one that is complete."""
    run = trial_folder(folder, trial.number)
    recipe = apply_values(search.build_recipe(), draw(book, search, space, trial))
    resume = (run / "config.json").is_file()
    if not resume and run.exists():  # killed before it had begun
        shutil.rmtree(run)
    watch = Reporter(book, search, trial, run, recipe.num_meta_steps)
    if resume and watch.was_stopped():
        return TrialState.PRUNED, None

    def begin(experiment: Experiment, state: bl.MetaState) -> bl.MetaState:
        nearest = neighbours(book, folder, space, trial)
        state, origin = begin_near(nearest, folder, experiment, state, jax.random.key(recipe.seed))
        book.set(trial.number, warm_start=origin)
        return state

    validation = search.build_validation()
    command = [
        *("bilevel", "train", search.recipe),
        *to_flags(recipe, find_recipe(search.recipe)()),
        *to_flags(validation, Validation(), "--validation."),
    ]
    end = train_recipe(
        search.recipe,
        recipe,
        run,
        resume,
        shlex.join([*command, "--folder", str(run)]),
        validation,
        on_chunk=[watch, lambda state, values: asked()],
        begin=begin if search.warm_start else None,
    )
    book.set(trial.number, steps=int(end.step))
    ended = int(end.step) >= recipe.num_meta_steps or stopped_early(run) is not None
    if not (ended or watch.pruned):
        return TrialState.RUNNING, None
    if search.warm_start:
        keep_meta(run, end)
    if watch.pruned:
        return TrialState.PRUNED, None
    return TrialState.COMPLETE, objective_values(run, search)


class Reporter:
    """An `on_chunk` callback of `bl.train` that reports to the study and asks it whether to stop.

    What was reported before a kill stays: a resumed run that repeats those steps neither reports nor asks
    again, so it is stopped where an undisturbed one is.
    """

    def __init__(self, book: Book, search: Search, trial: optuna.Trial, run: Path, total: int):
        self.pruned = False
        self._name, self._average = search.objectives[0], search.average
        # Optuna knows no intermediate values of several objectives.
        self._active = len(search.objectives) == 1 and self._name != SECONDS
        self._trial, self._run = trial, run
        self._known = sorted(book.storage.get_trial(book.id_of(trial.number)).intermediate_values)
        self._apart, self._total = max(1, total // _REPORTS), total
        self._figures: list[float] | None = None

    def was_stopped(self) -> bool:
        """Whether a run that is taken up again had come to the point where the pruner stops it."""
        reached = Checkpoints(self._run / "checkpoints").latest()
        return reached is not None and self._known[-1:] == [reached] and self._asks(reached)

    def __call__(self, state: bl.MetaState, values: dict[str, float]) -> bool:
        """Report where a report is due; whether the run shall stop."""
        step, figure = int(state.step), figure_of(values, self._name)
        if not self._active or figure is None:
            return False
        if self._figures is None:
            past = [figure_of(row, self._name) for row in _rows(self._run) if row["step"] < step]
            self._figures = [each for each in past if each is not None]
        self._figures.append(figure)
        if step in self._known[:-1]:
            return False
        if step not in self._known:
            if self._known and step - self._known[-1] < self._apart and step < self._total:
                return False
            recent = self._figures[-self._average :]
            self._trial.report(sum(recent) / len(recent), step)
            self._known.append(step)
        self.pruned = self._asks(step)
        return self.pruned

    def _asks(self, step: int) -> bool:
        return step < self._total and self._trial.should_prune()


def objective_values(run: Path, search: Search) -> list[float]:
    """What a finished run is judged by: the mean of the last figures of each objective.

    Raises:
        ValueError: when the metrics have no such column.
        FloatingPointError: when a figure is not finite.
    """
    rows, values = _rows(run), []
    for name in search.objectives:
        found = [figure_of(row, name) for row in rows]
        recent = [each for each in found if each is not None][-search.average :]
        if not recent:
            there = sorted({column for row in rows for column in row} - {"step", "time"})
            raise ValueError(f"the metrics of the run have no {name}; there are {', '.join(there)}")
        if not math.isfinite(value := sum(recent) / len(recent)):
            raise FloatingPointError(f"{name} is not finite at the end of the run: it diverges")
        values.append(value)
    return values


def figure_of(row: dict[str, Any], name: str) -> float | None:
    """The figure of an objective in a row of metrics; None where the row has none.

    >>> figure_of({"step": 4, "outer_loss": 0.5}, "query_loss")
    0.5
    """
    # A problem that is not one of the learners' has only the loss that the outer loop sees.
    usual = {SECONDS: "time", "query_loss": "query_loss" if "query_loss" in row else "outer_loss"}
    name = usual.get(name, name)
    return math.nan if name in row and row[name] is None else row.get(name)


def describe(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())[:_LONGEST]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return read_metrics(path) if path.is_file() else []
