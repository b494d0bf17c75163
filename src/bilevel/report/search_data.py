"""A search as plain values: what the page about it is drawn from."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from bilevel.report.runs import Note

Outcome = Literal["finished", "pruned", "failed", "running", "waiting"]


@dataclass(frozen=True)
class Objective:
    """What is searched for.

    Args:
        name: a column of the runs' metrics, such as `query_loss`.
        maximize: whether more is better.
    """

    name: str
    maximize: bool = False

    def better(self, a: float, b: float) -> bool:
        """Whether `a` is better than `b`; what is no number is worse than any number.

        >>> Objective("query_loss").better(0.1, 0.2), Objective("query_loss").better(math.nan, 0.2)
        (True, False)
        """
        if math.isnan(a) or math.isnan(b):
            return math.isnan(b) and not math.isnan(a)
        return a > b if self.maximize else a < b


@dataclass(frozen=True)
class SearchTrial:
    """One trial.

    Args:
        number: its place in the order of starting.
        outcome: how far it came.
        params: what was chosen for it, by the name of the field.
        values: one for each objective; empty where there is none yet.
        reported: `{outer step: figure}` on the way, of the first objective.
        seconds: it took, or NaN.
        error: why it failed, or "".
        folder: of its run, as the reader should type it, or "".
    """

    number: int
    outcome: Outcome
    params: dict[str, Any]
    values: tuple[float, ...] = ()
    reported: dict[int, float] = field(default_factory=dict)
    seconds: float = math.nan
    error: str = ""
    folder: str = ""


@dataclass(frozen=True)
class Search:
    """A search, as far as it has come.

    Args:
        name: a title.
        recipe: what is searched over.
        objectives: one or more.
        trials: in the order of their numbers.
        planned: how many trials there shall be, or None where it is not known.
        importances: `{parameter: share}` of the first objective, summing to one; empty where not known.
        log_scale: parameters that are searched on a logarithmic scale.
        facts: further `(term, text)` about the search.
        commands: `(what for, what to type)`.
        notes: what the reader should know.
    """

    name: str
    recipe: str
    objectives: tuple[Objective, ...]
    trials: tuple[SearchTrial, ...]
    planned: int | None = None
    importances: dict[str, float] = field(default_factory=dict)
    log_scale: frozenset[str] = frozenset()
    facts: tuple[tuple[str, str], ...] = ()
    commands: tuple[tuple[str, str], ...] = ()
    notes: tuple[Note, ...] = ()

    def of(self, outcome: Outcome) -> list[SearchTrial]:
        """The trials that ended in this way."""
        return [trial for trial in self.trials if trial.outcome == outcome]

    def ranked(self) -> list[SearchTrial]:
        """Finished trials with a number for the first objective, the best first."""
        sign = -1 if self.objectives[0].maximize else 1
        good = [trial for trial in self.of("finished") if trial.values and math.isfinite(trial.values[0])]
        return sorted(good, key=lambda trial: (sign * trial.values[0], trial.number))

    def not_dominated(self) -> list[SearchTrial]:
        """Finished trials of which no other is as good in every objective and better in one."""
        signs = [-1 if objective.maximize else 1 for objective in self.objectives]
        good = [t for t in self.of("finished") if t.values and all(map(math.isfinite, t.values))]
        costs = [tuple(s * v for s, v in zip(signs, trial.values, strict=True)) for trial in good]

        def dominated(cost: tuple[float, ...]) -> bool:
            return any(o != cost and all(a <= b for a, b in zip(o, cost, strict=True)) for o in costs)

        return [trial for trial, cost in zip(good, costs, strict=True) if not dominated(cost)]

    def parameters(self) -> list[str]:
        """The names of what was chosen, the most important first."""
        names = list(dict.fromkeys(name for trial in self.trials for name in trial.params))
        return sorted(names, key=lambda name: (-self.importances.get(name, 0.0), names.index(name)))
