"""Go on with a trial of a search for more outer steps, as a run of its own."""

import dataclasses
import shutil
from pathlib import Path

from optuna.trial import TrialState

import bilevel as bl
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.run import (
    fingerprint,
    read_config,
    saved_fingerprint,
    saved_recipe,
    saved_validation,
    train_recipe,
)
from bilevel.search.spec import read_search, trial_folder
from bilevel.search.study import best_trials, open_book
from bilevel.train.checkpoint import Checkpoints
from bilevel.train.early_stopping import BEST


def choose_trial(folder: Path, number: int | None) -> int:
    """The number of the trial to promote: the given one, else the best.

    Raises:
        ValueError: when there is no such trial, it waits, its run is not here, or there is no best one.
    """
    search = read_search(folder)
    book = open_book(search)
    if number is None:
        best = best_trials(book, search)
        if not best:
            raise ValueError(
                f"{folder} has no complete trial to promote; name one, like `promote {folder} 0`"
            )
        number = best[0].number
    trials = {trial.number: trial for trial in book.trials()}
    if number not in trials:
        raise ValueError(f"{folder} has no trial {number}; it has 0 to {len(trials) - 1}")
    if trials[number].state in (TrialState.WAITING, TrialState.RUNNING):
        raise ValueError(f"trial {number} of {folder} has not ended; finish the search first with --resume")
    run = trial_folder(folder, number)
    if Checkpoints(run / "checkpoints").latest() is None:
        raise ValueError(f"trial {number} has no checkpoint in {run}: it failed before, or ran elsewhere")
    return number


def promote(source: Path, folder: Path, num_meta_steps: int, command: str) -> tuple[bl.MetaState, str]:
    """Copy a run's newest state and its figures into a new folder, and train on from there.

    The new run has more outer steps than the old one, and is equal to it in everything else. Rates that
    follow a schedule over `num_meta_steps` follow the longer one from here on.

    Args:
        source: run folder of the trial, which is left as it is.
        folder: of the new run.
        num_meta_steps: outer steps in the end, those of the trial included.

    Returns:
        The last state, and the recipe's name.

    Raises:
        ValueError: when the trial has done so many steps already.
        FileExistsError: when the folder is in use.
    """
    old = saved_recipe(source)
    done = Checkpoints(source / "checkpoints").latest() or 0
    if num_meta_steps <= done:
        raise ValueError(
            f"{source} has {done} outer steps already; give --num-meta-steps a number above that, "
            "it counts from the beginning"
        )
    recipe = dataclasses.replace(old, num_meta_steps=num_meta_steps)
    name = str(read_config(source)["recipe"])

    def begin(experiment: Experiment, state: bl.MetaState) -> bl.MetaState:
        state, _ = Checkpoints(source / "checkpoints").restore(state, saved_fingerprint(source))
        if (source / "metrics.jsonl").is_file():  # the curve goes on
            shutil.copy(source / "metrics.jsonl", folder / "metrics.jsonl")
        if (source / BEST).is_dir():
            best, step = Checkpoints(source / BEST).restore(state, saved_fingerprint(source))
            Checkpoints(folder / BEST, keep=1).save(step, best, fingerprint(name, recipe))
        return state

    # More steps were asked for: they are not to end at once where patience had ended the trial.
    validation = dataclasses.replace(saved_validation(source), patience=0)
    state = train_recipe(name, recipe, folder, False, command, validation, begin=begin)
    return state, name
