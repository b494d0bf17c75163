"""A search as an Optuna study: where it is stored, who proposes, who stops, what is proposed.

All trials are put into the storage as waiting ones at the start. A worker claims one by turning it into a
running one, which storages do for one process only: so there are never more trials than were asked for, none
is run twice, and any number of machines can claim.
"""

import fcntl
import hashlib
import importlib.util
import itertools
import os
import random
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend
from optuna.trial import FrozenTrial, TrialState

from bilevel.search.space import Choices, Numbers, Space, drawn_values
from bilevel.search.spec import Search

_REDUCTION = 3  # of ASHA and Hyperband: a third goes on
_MEDIAN_TRIALS = 5  # finished ones before the median stops any
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class Book(NamedTuple):
    """A study and its storage, which optuna keeps apart for what a worker does."""

    study: optuna.Study
    storage: BaseStorage

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """The trials in these states, or all; not copied: leave them as they are."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def id_of(self, number: int) -> int:
        """What the storage calls a trial."""
        study_id = self.storage.get_study_id_from_name(self.study.study_name)
        return self.storage.get_trial_id_from_study_id_trial_number(study_id, number)

    def take(self, number: int) -> bool:
        """Turn a waiting trial into a running one; False when another process was faster."""
        try:
            return self.storage.set_trial_state_values(self.id_of(number), state=TrialState.RUNNING)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False

    def set(self, number: int, **attributes: Any) -> None:
        """User attributes of a trial."""
        for name, value in attributes.items():
            self.storage.set_trial_user_attr(self.id_of(number), name, value)


class FlockedJournal:
    """What optuna's journal asks of a lock, with the kernel's: a dead holder holds nothing.

    Optuna's own lock is a file that a killed process leaves behind, which then stops all others for 30
    seconds. A process that dies while it writes may leave half a line, which nobody could read any more: the
    next holder cuts it off.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: Any = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._file = self._path.open("r+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        size = self._file.seek(0, os.SEEK_END)
        if size:
            self._file.seek(size - 1)
            if self._file.read(1) != b"\n":
                self._file.seek(0)
                self._file.truncate(self._file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Give it back."""
        self._file.close()


def open_storage(location: str) -> BaseStorage:
    """A storage by its journal file or its URL.

    Raises:
        ValueError: when the URL is none that Optuna knows, or nothing answers there.
        ImportError: when a library that the URL needs is not installed.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" not in location:
        path = Path(location)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        # A duck with acquire and release is all that the backend asks for.
        backend = JournalFileBackend(str(path), lock_obj=FlockedJournal(path))  # type: ignore[arg-type]
        return JournalStorage(backend)
    try:
        if location.startswith("redis"):
            return JournalStorage(JournalRedisBackend(location))
        wait = {"connect_args": {"timeout": 60}} if location.startswith("sqlite") else None
        return optuna.storages.get_storage(optuna.storages.RDBStorage(location, engine_kwargs=wait))
    except ImportError:
        raise
    except Exception as error:  # of whichever driver
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"no storage at {location}: {reason}; give a URL like sqlite:///file.db or "
            "postgresql://user@host/name, or leave --storage out for a file in the search folder"
        ) from error


def open_book(search: Search) -> Book:
    """The study of a search that `create_study` has made.

    Raises:
        ValueError: when the storage has none of that name.
    """
    storage = open_storage(search.storage)
    try:
        study = optuna.load_study(
            study_name=search.name, storage=storage, sampler=make_sampler(search), pruner=make_pruner(search)
        )
    except KeyError:
        raise ValueError(
            f"{search.storage} has no study {search.name}; where a search was cut off before its first "
            "trial, --resume makes it"
        ) from None
    return Book(study, storage)


def has_study(location: str, name: str) -> bool:
    """Whether a storage holds a study of that name."""
    return name in {study.study_name for study in optuna.get_all_study_summaries(open_storage(location))}


def create_study(search: Search) -> Book:
    """Make the study and all its trials, or what of them is not there yet.

    Repeating it after a kill adds only what is missing.
    """
    storage = open_storage(search.storage)
    optuna.create_study(
        storage=storage,
        study_name=search.name,
        directions=list(search.directions),
        load_if_exists=True,
    )
    book = open_book(search)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        book.study.set_metric_names(list(search.objectives))  # for optuna-dashboard
    grid = grid_of(search)
    for number in range(len(book.trials()), search.num_trials):
        if grid:
            book.study.enqueue_trial(grid[number])
        else:
            book.study.add_trial(optuna.create_trial(state=TrialState.WAITING))
    return book


def make_sampler(search: Search, number: int = 0, place: int = 0) -> optuna.samplers.BaseSampler:
    """The sampler, seeded by the search's seed, the trial's number and which of its values is drawn.

    With a stream for each value, a worker that is killed between two of them draws the second as it would
    have: the search of a single worker is the same whether it was killed or not.
    """
    digest = hashlib.sha256(f"{search.seed} {number} {place}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    samplers = optuna.samplers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if search.sampler in ("random", "grid"):  # a grid's trials have their values already
            return samplers.RandomSampler(seed=seed)
        if search.sampler == "gp":
            return samplers.GPSampler(seed=seed)
        if search.sampler == "cmaes":
            return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
        if search.sampler == "nsga2":
            return samplers.NSGAIISampler(seed=seed, population_size=search.population)
        return samplers.TPESampler(seed=seed)


def make_pruner(search: Search) -> optuna.pruners.BasePruner:
    """The pruner; its resource is the outer step."""
    least, most = search.min_steps, max(search.steps(), search.min_steps)
    if search.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=_MEDIAN_TRIALS, n_warmup_steps=least)
    if search.pruner == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=least, reduction_factor=_REDUCTION)
    if search.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=least, max_resource=most, reduction_factor=_REDUCTION
        )
    return optuna.pruners.NopPruner()


def check_libraries(search: Search) -> None:
    """Refuse a sampler whose library is missing.

    Raises:
        ImportError: naming what to install.
    """
    needs = {"gp": ("torch", "scipy"), "cmaes": ("cmaes",)}
    for library in needs.get(search.sampler, ()):
        if importlib.util.find_spec(library) is None:
            raise ImportError(
                f"--sampler {search.sampler} needs {library}: pip install {library}, or take --sampler tpe"
            )


def draw(book: Book, search: Search, space: Space, trial: optuna.Trial) -> dict[str, Any]:
    """The values of a trial: those it has already, and what the sampler proposes for the others."""
    study = book.study
    if set(space) <= set(trial.params):
        return drawn_values(space, trial.params)
    study.sampler = make_sampler(search, trial.number)
    trial.relative_params  # noqa: B018  drawn together, before the first is written
    for place, (name, kind) in enumerate(space.items(), start=1):
        study.sampler = make_sampler(search, trial.number, place)
        if isinstance(kind, Choices):
            trial.suggest_categorical(name, kind.drawn)
        elif kind.whole:
            low, high, step = int(kind.low), int(kind.high), int(kind.step or 1)
            trial.suggest_int(name, low, high, log=kind.log, step=step)
        else:
            trial.suggest_float(name, kind.low, kind.high, log=kind.log, step=kind.step)
    return drawn_values(space, trial.params)


def grid_of(search: Search) -> list[dict[str, Any]]:
    """All points of the grid, in an order that spreads the first of them; empty for other samplers."""
    if search.sampler != "grid":
        return []
    space = search.build_space()
    axes = [_axis(kind, search.grid_points) for kind in space.values()]
    points = [dict(zip(space, point, strict=True)) for point in itertools.product(*axes)]
    random.Random(search.seed).shuffle(points)
    return points


def _axis(kind: Numbers | Choices, points: int) -> Sequence[Any]:
    return kind.drawn if isinstance(kind, Choices) else kind.grid(points)


def best_trials(book: Book, search: Search) -> list[FrozenTrial]:
    """The best finished trial, or, of several objectives, all that no other one beats."""
    if not book.trials(TrialState.COMPLETE):
        return []
    return [book.study.best_trial] if len(search.objectives) == 1 else book.study.best_trials
