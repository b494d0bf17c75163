"""The rules of population-based training, without any training: who copies whom, and what is tried next.

All of it follows from the seed, the round and the values: it replays.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bilevel.search.space import Choices, Numbers, Space

_START, _NEXT = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Rules:
    """How a population learns from itself.

    Args:
        quantile: share of the members that copies, and share that is copied from.
        resample: chance that a copied hyperparameter is drawn anew in place of being perturbed.
        factors: by one of which it is multiplied otherwise.
        seed: of all that is random.

    Raises:
        ValueError: for a quantile outside (0, 0.5], a chance outside [0, 1], or factors that are no factors.
    """

    quantile: float = 0.25
    resample: float = 0.25
    factors: tuple[float, ...] = (0.8, 1.2)
    seed: int = 0

    def __post_init__(self):
        if not 0 < self.quantile <= 0.5:
            raise ValueError(
                f"quantile must be in (0, 0.5], so that no member copies itself, got {self.quantile}"
            )
        if not 0 <= self.resample <= 1:
            raise ValueError(f"resample is a chance in [0, 1], got {self.resample}")
        if not self.factors or not all(math.isfinite(f) and f > 0 for f in self.factors):
            raise ValueError(f"factors must be positive numbers such as 0.8 and 1.2, got {self.factors}")


@dataclass(frozen=True)
class Decision:
    """What happens to a member between two rounds.

    Args:
        copied_from: the member whose checkpoint and hyperparameters it takes, or None.
        hyperparameters: of its next round.
        explored: `{name: (from, to)}` of what was changed after copying.
    """

    copied_from: int | None
    hyperparameters: dict[str, Any]
    explored: dict[str, tuple[Any, Any]]


def from_unit(kind: Numbers | Choices, place: float) -> Any:
    """What is drawn at `place` in [0, 1) of a range, or of the list of choices.

    >>> from_unit(Numbers(1e-4, 1.0, log=True), 0.5)
    0.01
    >>> from_unit(Numbers(1, 4, whole=True), 0.99), from_unit(Choices(("a", "b"), ("a", "b")), 0.6)
    (4, 'b')
    """
    if isinstance(kind, Choices):
        return kind.drawn[int(place * len(kind.drawn))]
    # Half a step around each number of a grid is its share.
    margin = (kind.step or (1 if kind.whole else 0)) / 2
    low, high = kind.low - margin, kind.high + margin
    if kind.log:
        return _inside(kind, math.exp(math.log(low) + place * (math.log(high) - math.log(low))))
    return _inside(kind, low + place * (high - low))


def perturb(kind: Numbers | Choices, drawn: Any, factor: float) -> Any:
    """A value times a factor, kept in its range; one on a grid moves by one step at least.

        h ← clip(factor · h, low, high), or h / factor where h is at that end already

    Choices have no order, so they stay: they change by being drawn anew.

    >>> perturb(Numbers(0.0, 1.0), 0.5, 1.2), perturb(Numbers(1, 9, whole=True), 2, 1.2)
    (0.6, 3)
    """
    if isinstance(kind, Choices):
        return drawn
    step = kind.step or (1 if kind.whole else 0)
    for each in (factor, 1 / factor):
        moved = _inside(kind, drawn * each)
        if moved == drawn:
            up = (each > 1) == (drawn >= 0)
            moved = _inside(kind, drawn + (step if up else -step))
        if moved != drawn:
            return moved
    return drawn


def _inside(kind: Numbers, value: float) -> Any:
    """The nearest value that the range has; floats keep 12 digits, so that they stay readable."""
    step = kind.step or (1 if kind.whole else None)
    value = min(max(value, kind.low), kind.high)
    if step is not None:
        value = kind.low + round((value - kind.low) / step) * step
        value = value if value <= kind.high else value - step
    return int(value) if kind.whole else min(max(float(f"{value:.12g}"), kind.low), kind.high)


def first_hyperparameters(space: Space, population: int, rules: Rules) -> list[dict[str, Any]]:
    """Where the members begin: a Latin hypercube, so that few members cover every range.

    >>> found = first_hyperparameters({"rate": Numbers(0.0, 1.0)}, 4, Rules())
    >>> sorted(int(4 * each["rate"]) for each in found)
    [0, 1, 2, 3]
    """
    rng = np.random.default_rng([rules.seed, _START])
    columns = {
        name: [from_unit(kind, (slot + rng.random()) / population) for slot in rng.permutation(population)]
        for name, kind in sorted(space.items())
    }
    return [{name: columns[name][i] for name in space} for i in range(population)]


def ranking(values: Sequence[float], maximize: bool) -> list[int]:
    """Members from the best to the worst; what is no number is worse than any number.

    >>> ranking([0.3, float("nan"), 0.1], maximize=False)
    [2, 0, 1]
    """
    sign = -1.0 if maximize else 1.0
    cost = [sign * value if math.isfinite(value) else math.inf for value in values]
    return sorted(range(len(values)), key=lambda member: (cost[member], member))


def decide(
    space: Space,
    hyperparameters: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    maximize: bool,
    round_number: int,
    rules: Rules,
) -> list[Decision]:
    """What happens after a round: the worst quarter copies one of the best quarter, and explores.

    Args:
        hyperparameters: of each member in this round.
        values: what each reached; one that failed has NaN, and copies whatever its place.
        maximize: whether more is better.
        round_number: the round that ended, from 0.

    Reference: Jaderberg et al., Population based training of neural networks, 2017 (truncation
    selection; explore by perturbing or resampling).

    >>> space = {"rate": Numbers(0.0, 1.0)}
    >>> held = [{"rate": r} for r in (0.1, 0.2, 0.3, 0.4)]
    >>> made = decide(space, held, [4.0, 1.0, 2.0, 3.0], False, 0, Rules(resample=0.0, factors=(1.2,)))
    >>> made[0].copied_from, made[0].hyperparameters, made[3].copied_from
    (1, {'rate': 0.24}, None)
    """
    order = ranking(values, maximize)
    good = [member for member in order if math.isfinite(values[member])]
    share = max(1, round(rules.quantile * len(order)))
    best = good[:share]
    worst = {m for m in order[-share:] if m not in best} | {m for m in order if m not in good}
    decisions = []
    for member, held in enumerate(hyperparameters):
        if member not in worst or not best:
            decisions.append(Decision(None, dict(held), {}))
            continue
        rng = np.random.default_rng([rules.seed, _NEXT, round_number, member])
        donor = best[int(rng.integers(len(best)))]
        taken, found = hyperparameters[donor], {}
        for name, kind in sorted(space.items()):
            anew, place, factor = rng.random(), rng.random(), rng.choice(rules.factors)
            if anew < rules.resample:
                found[name] = from_unit(kind, place)
            else:
                found[name] = perturb(kind, taken[name], float(factor))
        if all(found[name] == taken[name] for name in space):  # a twin would learn nothing new
            name = sorted(space)[int(rng.integers(len(space)))]
            found[name] = from_unit(space[name], rng.random())
        explored = {name: (taken[name], found[name]) for name in space if found[name] != taken[name]}
        decisions.append(Decision(donor, {name: found[name] for name in space}, explored))
    return decisions
