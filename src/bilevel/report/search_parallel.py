"""Parallel coordinates: one axis a field, one line a trial."""

import math
from html import escape
from typing import Any, NamedTuple

import numpy as np

from bilevel.report.curves import legend
from bilevel.report.numbers import count, figure_name, is_percent, measure
from bilevel.report.plots import Line
from bilevel.report.search_data import Search
from bilevel.report.search_plots import MOST_LINES, some

_MOST_AXES = 8
_WIDE = 30.0  # ratio above which values are drawn on a logarithmic scale
_WIDTH, _GAP, _TOP, _HEIGHT, _LEFT = 760, 240, 34, 250, 40  # pixels
_EMPTY = np.zeros(0)


class _Axis(NamedTuple):
    """One axis of parallel coordinates: its name, where a value lies in 0..1, and its marks."""

    name: str
    places: dict[int, float]  # by trial number
    ticks: list[tuple[float, str]]


def parallel(search: Search) -> str:
    """Parallel coordinates of the finished trials; the last axis is the value."""
    ranked = search.ranked()
    names = search.parameters()[:_MOST_AXES]
    if not names or not ranked:
        return ""
    best = ranked[: max(1, len(ranked) // 10)]
    best = best[:MOST_LINES]
    shown = [trial.number for trial in best + some(ranked[len(best) :], MOST_LINES)]
    axes = [
        _axis(name, {t.number: t.params[name] for t in ranked if name in t.params}, name in search.log_scale)
        for name in names
    ]
    objective = search.objectives[0].name
    values = {trial.number: trial.values[0] for trial in ranked}
    low = min(values.values())
    log = low > 0 and max(values.values()) / low > _WIDE and not is_percent(objective)
    axes.append(_axis(figure_name(objective), values, log, objective))
    said = []
    if len(shown) < len(ranked):
        said.append(f"{count(len(shown))} of {count(len(ranked))} finished trials are drawn.")
    if left := len(search.parameters()) - len(names):
        said.append(f"{count(left)} more fields, which mattered less, are left out.")
    note = f'<p class="lead">{" ".join(said)}</p>' if said else ""
    which = f"the best {count(len(best))}" if len(best) > 1 else "the best"
    keys = [(Line(_EMPTY, _EMPTY, width=2.4), which), (Line(_EMPTY, _EMPTY, ink="s5", width=1.2), "others")]
    return legend(keys) + note + _picture(axes, shown, {trial.number for trial in best}, ranked[0].number)


def _axis(name: str, values: dict[int, Any], log: bool, measured: str = "") -> _Axis:
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values.values())
    if not numbers or not values:
        options = sorted({str(value) for value in values.values()})
        share = {option: (i + 0.5) / len(options) for i, option in enumerate(options)}
        return _Axis(name, {n: share[str(v)] for n, v in values.items()}, [(p, o) for o, p in share.items()])
    low, high = float(min(values.values())), float(max(values.values()))
    log = log and low > 0
    scale = math.log if log else float
    span = scale(high) - scale(low)
    whole = all(isinstance(value, int) for value in values.values())

    def write(value: float) -> str:
        if measured:
            return measure(measured, value)
        return f"{value:.0f}" if whole else f"{value:.3g}".replace("-", "−")

    places = {n: (scale(v) - scale(low)) / span if span else 0.5 for n, v in values.items()}
    if not span:
        return _Axis(name, places, [(0.5, write(low))])
    middle = math.exp((scale(low) + scale(high)) / 2) if log else (low + high) / 2
    return _Axis(name, places, [(0.0, write(low)), (0.5, write(middle)), (1.0, write(high))])


def _picture(axes: list[_Axis], numbers: list[int], best: set[int], first: int) -> str:
    """The lines, the best on top, then the axes."""
    order = sorted(numbers, key=lambda number: (number == first, number in best))
    gap = min(_GAP, max(_WIDTH // (len(axes) - 1), 130))
    places = [_LEFT + i * gap for i in range(len(axes))]
    lines = "".join(_line(axes, places, number, number in best, number == first) for number in order)
    marks = "".join(
        _marks(axis, x, x == places[0], x == places[-1]) for axis, x in zip(axes, places, strict=True)
    )
    width = places[-1] + 90
    label = f"Parallel coordinates of {len(numbers)} trials over {', '.join(axis.name for axis in axes)}"
    return (
        f'<figure class="wide" style="max-width:{width}px"><svg class="plot" '
        f'viewBox="0 0 {width} {_TOP + _HEIGHT + 16}" role="img" aria-label="{escape(label)}">'
        f"{lines}{marks}</svg></figure>"
    )


def _line(axes: list[_Axis], places: list[int], number: int, best: bool, first: bool) -> str:
    parts, pen = [], "M"
    for axis, x in zip(axes, places, strict=True):
        if number not in axis.places:
            pen = "M"  # a field that this trial did not have
            continue
        parts.append(f"{pen}{x} {_TOP + _HEIGHT * (1 - axis.places[number]):.1f}")
        pen = "L"
    ink, weight, opacity = ("s0", 1.6, 0.9) if best else ("s5", 1.0, 0.35)
    return (
        f'<path d="{"".join(parts)}" fill="none" stroke="var(--{ink})" '
        f'stroke-width="{3.0 if first else weight}" opacity="{opacity}"/>'
    )


def _marks(axis: _Axis, x: int, first: bool, last: bool) -> str:
    """The axis itself, its name and its ticks."""
    anchor, shift = ("start", -30) if first else ("end", 60) if last else ("middle", 0)
    name = axis.name if len(axis.name) <= 22 else f"…{axis.name[-21:]}"
    marks = [
        f'<path d="M{x} {_TOP}V{_TOP + _HEIGHT}" stroke="var(--muted)" stroke-width="1"/>',
        f'<text x="{x + shift}" y="{_TOP - 16}" fill="var(--ink)" text-anchor="{anchor}" '
        f'font-weight="600">{escape(name)}</text>',
    ]
    for height, text in axis.ticks:
        text = text if len(text) <= 14 else f"{text[:13]}…"
        marks.append(
            f'<text x="{x + 6}" y="{_TOP + _HEIGHT * (1 - height) + 4:.1f}" fill="var(--muted)" '
            f'paint-order="stroke" stroke="var(--paper)" stroke-width="4">{escape(text)}</text>'
        )
    return "".join(marks)
