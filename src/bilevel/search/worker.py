"""A worker of a search: claim a trial, run it, tell, until all trials are done."""

import contextlib
import gc
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import jax
import optuna
from optuna.trial import FrozenTrial, TrialState

from bilevel.search.locks import locked, try_lock
from bilevel.search.population import train_population
from bilevel.search.population_spec import is_population
from bilevel.search.signals import signalled
from bilevel.search.spec import Search, read_search
from bilevel.search.study import Book, open_book
from bilevel.search.trial import run_trial

BEAT = 20.0  # seconds between heartbeats, where machines share a storage
_SILENCE = 4 * BEAT  # after so long without one, a worker of another machine is dead
_WAIT = 0.5  # seconds between looks for trials whose worker has died
_DEATHS = 3  # of workers at one point of one trial: then it is the trial's fault
_SAME = 5  # failures with one error and no success: then it is the search's fault
_COMPILED = 20  # trials between throwing away what was compiled for them
STOPPED = "stopped"  # study attribute: why the search was ended early
SESSION = "session"  # file in the folder that says which start of the search this is


class Claim(NamedTuple):
    """A trial that is ours as long as the lock is open."""

    trial: optuna.Trial
    lock: IO[bytes]


def log_path(folder: Path, index: int) -> Path:
    """Where a worker's output goes."""
    return Path(folder) / "logs" / f"worker-{index}.log"


def work(folder: Path, index: int) -> None:
    """Run trials of the search in a folder until all are done, or until asked to stop.

    It may be killed at any moment and started again: a trial whose worker has died is taken up again at its
    newest checkpoint, with the same number and values; one that is finished stays finished.

    Args:
        folder: of the search.
        index: which worker this is; names its log.

    Raises:
        FileNotFoundError, ValueError: when there is no search in the folder, or no study in its storage.
    """
    folder = Path(folder).resolve()
    if is_population(folder):
        with _output_to(log_path(folder, index)), signalled() as asked:
            train_population(folder, asked)
        return
    search = read_search(folder)
    space, count = search.build_space(), 0
    with _output_to(log_path(folder, index)), signalled() as asked:
        book = open_book(search)
        while not asked() and not book.study.user_attrs.get(STOPPED):
            claim = claim_trial(book, search, folder)
            if claim is None:
                if not book.trials(TrialState.WAITING, TrialState.RUNNING):
                    return
                time.sleep(_WAIT)  # others may die
                continue
            with claim.lock, _beating(book, claim.trial.number, not search.embedded(folder)):
                if not run_trial(book, search, space, claim.trial, folder, asked):
                    return
            _stop_if_hopeless(book)
            count += 1
            if count % _COMPILED == 0:  # programs of trials that will not come back
                jax.clear_caches()
                gc.collect()


def claim_trial(book: Book, search: Search, folder: Path) -> Claim | None:
    """A trial whose worker has died, else the next waiting one; None when there is neither.

    A trial is run under the lock of a file, which the kernel opens when the process ends in whatever way.
    Workers of other machines, which share only the storage, are dead when their heartbeat has stopped.
    """
    with locked(folder / "locks" / "claim"):
        for trial in book.trials(TrialState.RUNNING):
            if not (search.embedded(folder) or _ours_or_silent(trial, folder)):
                continue
            lock = try_lock(folder / "locks" / f"{trial.number:04d}")
            if lock is None:
                continue
            if _died_too_often(book, trial, folder):
                lock.close()
                continue
            return _claimed(book, trial, lock, folder)
        for trial in book.trials(TrialState.WAITING):
            if book.take(trial.number):
                lock = try_lock(folder / "locks" / f"{trial.number:04d}")
                assert lock is not None, "only workers that hold the claim lock take these"
                return _claimed(book, trial, lock, folder)
    return None


def _claimed(book: Book, trial: FrozenTrial, lock: IO[bytes], folder: Path) -> Claim:
    run = f"trials/{trial.number:04d}"
    book.set(trial.number, folder=run, place=_place(folder), pid=os.getpid(), heartbeat=time.time())
    return Claim(optuna.Trial(book.study, book.id_of(trial.number)), lock)


def _place(folder: Path) -> str:
    return f"{socket.gethostname()}:{folder}"


def _ours_or_silent(trial: FrozenTrial, folder: Path) -> bool:
    """Whether a running trial may be dead, for a storage that other folders use too."""
    if trial.user_attrs.get("place") == _place(folder):
        return True  # the lock will tell
    started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    return time.time() - trial.user_attrs.get("heartbeat", started) > _SILENCE


def _died_too_often(book: Book, trial: FrozenTrial, folder: Path) -> bool:
    """Count a death of a trial's worker; a trial that kills its workers is told as failed.

    Only deaths in this start of the search at the same report count: neither a search that is killed and
    resumed often nor a long trial on a machine that comes and goes is to blame.
    """
    session = folder / SESSION
    point = f"{session.read_text() if session.is_file() else ''} {trial.last_step}"
    deaths = [*trial.user_attrs.get("deaths", []), point]
    book.set(trial.number, deaths=deaths)
    if Counter(deaths)[point] < _DEATHS:
        return False
    where = "before its first report" if trial.last_step is None else f"after outer step {trial.last_step}"
    book.set(
        trial.number,
        error=f"its worker died {_DEATHS} times {where}: the process was killed, for memory perhaps, or "
        "crashed; see the logs",
    )
    book.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    return True


def _stop_if_hopeless(book: Book) -> None:
    """End the search when all trials so far have failed with the same error."""
    failed = book.trials(TrialState.FAIL)
    if len(failed) < _SAME or book.trials(TrialState.COMPLETE, TrialState.PRUNED):
        return
    errors = {re.sub(r"[-+.\d]+(e[-+]?\d+)?", "#", trial.user_attrs.get("error", "")) for trial in failed}
    if len(errors) == 1:
        example = failed[0].user_attrs.get("error", "")
        book.study.set_user_attr(STOPPED, f"all {len(failed)} trials failed with the same error: {example}")


@contextmanager
def _beating(book: Book, number: int, needed: bool) -> Iterator[None]:
    """Say now and then that the trial's worker lives, where only the storage can tell."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            with contextlib.suppress(Exception):  # the next one may get through
                book.set(number, heartbeat=time.time())

    thread = threading.Thread(target=beat, daemon=True)
    if needed:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send what trials print to a file: the terminal has one line a trial."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        yield


def _end_with(parent: int) -> None:
    """Ask this process to stop when the one that started it is gone."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WAIT)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _main(folder: str, index: str, workers: str, parent: str) -> int:
    """The process that `LocalLauncher` starts."""
    _end_with(int(parent))
    if hasattr(os, "sched_setaffinity"):  # its share of the cores, before JAX makes its threads
        cores = sorted(os.sched_getaffinity(0))
        share = cores[int(index) :: int(workers)] or cores
        os.sched_setaffinity(0, share)
    try:
        work(Path(folder), int(index))
    except KeyboardInterrupt:  # asked twice: the trial that was running is taken up again
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
