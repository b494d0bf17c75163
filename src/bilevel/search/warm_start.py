"""Begin a trial where its nearest finished neighbour ended.

What is learned by hypergradients inside a trial changes little from one point of the search to the next: with
the neighbour's meta-parameters a trial needs few outer steps of its own.
"""

from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

import bilevel as bl
from bilevel.problem import Key
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.run import saved_fingerprint
from bilevel.search.space import Space, distance
from bilevel.search.spec import trial_folder
from bilevel.search.study import Book
from bilevel.train.checkpoint import Checkpoints

META = "meta"  # in the run of a finished trial, beside its checkpoints


def keep_meta(run: Path, state: bl.MetaState) -> None:
    """Keep what a finished trial learned, without the rest of its state."""
    Checkpoints(run / META, keep=1).save(int(state.step), state.meta, saved_fingerprint(run))


def begin_near(
    nearest: list[FrozenTrial], folder: Path, experiment: Experiment, state: bl.MetaState, key: Key
) -> tuple[bl.MetaState, int | None]:
    """The state a trial begins with, and the number of the trial whose meta-parameters it has.

    Args:
        nearest: from `neighbours`.
        state: where it would begin by itself; kept when no neighbour's meta-parameters have the same tree,
            shapes and dtypes.
        key: what `state` was made with.
    """
    for each in nearest:
        meta = read_meta(trial_folder(folder, each.number), state.meta)
        if meta is not None:
            learner, optimizer, sample = experiment.learner, experiment.optimizer, experiment.sample_tasks
            return bl.init_state(learner, optimizer, sample, key, meta), each.number
    return state, None


def neighbours(book: Book, folder: Path, space: Space, trial: optuna.Trial) -> list[FrozenTrial]:
    """Finished trials whose runs are in this folder, the nearest first, then the older."""
    done = [
        each
        for each in book.trials(TrialState.COMPLETE, TrialState.PRUNED)
        if set(space) <= set(each.params) and (trial_folder(folder, each.number) / META).is_dir()
    ]
    return sorted(done, key=lambda each: (distance(space, trial.params, each.params), each.number))


def read_meta(run: Path, template: Any) -> Any | None:
    """The meta-parameters a trial ended with; None where their tree or a shape is another one."""
    try:
        return Checkpoints(run / META).restore(template, saved_fingerprint(run))[0]
    except (ValueError, FileNotFoundError):
        return None
