"""What a search says: a line for each trial that ends, and the best at the end."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from bilevel.search.spec import Search, trial_folder
from bilevel.search.study import FINISHED, Book, best_trials, open_book

_EVERY = 0.5  # seconds between looks at the study


@contextmanager
def watching(search: Search, say: Callable[[str], None]) -> Iterator[None]:
    """Say each trial that ends meanwhile; those that had ended before are not said again.

    The study is watched and not the workers, so that it is the same whoever runs them, and where.
    """
    book, done = open_book(search), threading.Event()
    said = {trial.number for trial in book.trials(*FINISHED)}

    def look() -> None:
        for trial in book.trials(*FINISHED):
            if trial.number not in said:
                said.add(trial.number)
                say(line(book, search, trial))

    def watch() -> None:
        while not done.wait(_EVERY):
            with contextlib.suppress(Exception):  # a storage that is busy is looked at again
                look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()


def line(book: Book, search: Search, trial: FrozenTrial) -> str:
    """One trial that has ended, in a line."""
    took = f"{trial.user_attrs.get('seconds', 0):.3g} s"
    ended, width = len(book.trials(*FINISHED)), len(str(search.num_trials))
    head = f"{ended:>{width}}/{search.num_trials}  trial {trial.number:>{width}}"
    if trial.state == TrialState.FAIL:
        return f"{head}  failed: {trial.user_attrs.get('error', 'without a message')}  {said(trial)}"
    if trial.state == TrialState.PRUNED:
        return f"{head}  stopped at outer step {trial.last_step}  {said(trial)}  {took}"
    best = "  best" if any(trial.number == each.number for each in best_trials(book, search)) else ""
    return f"{head}  {figures(search, trial)}  {said(trial)}  {took}{best}"


def figures(search: Search, trial: FrozenTrial) -> str:
    """The values of a complete trial."""
    return ", ".join(f"{n} {v:.5g}" for n, v in zip(search.objectives, trial.values, strict=True))


def said(trial: FrozenTrial) -> str:
    """The point of the search space, as flags would say it."""
    return " ".join(f"{name.replace('_', '-')}={_short(value)}" for name, value in trial.params.items())


def summary(book: Book, search: Search, folder: Path) -> str:
    """How the search has ended: the best, where it is, and what to do with it."""
    counts = {state: len(book.trials(state)) for state in FINISHED}
    lines = [
        f"{sum(counts.values())} trials: {counts[TrialState.COMPLETE]} complete, "
        f"{counts[TrialState.PRUNED]} stopped early, {counts[TrialState.FAIL]} failed"
    ]
    best = best_trials(book, search)
    if not best:
        return f"{lines[0]}; none is complete, so there is no best one; next: bilevel report {folder}"
    if len(best) > 1:
        lines.append("no trial beats these in every objective:")
    for trial in best:
        lines.append(f"  trial {trial.number}: {figures(search, trial)}  with {said(trial)}")
        lines.append(f"    in {trial_folder(folder, trial.number)}")
    number = best[0].number
    lines.append(
        f"next: bilevel eval {trial_folder(folder, number)}, bilevel report {folder}, "
        f"bilevel search promote {folder} {number} --num-meta-steps {2 * search.steps()}"
    )
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
