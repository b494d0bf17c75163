"""The two sections of curves: against adaptation steps, and against outer steps."""

import math
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from bilevel.report.numbers import count, figure_name, is_percent, measure
from bilevel.report.plots import MAX_POINTS, SERIES, Frame, Line, draw, swatch
from bilevel.report.runs import Curve, Run, number

MAX_PANELS = 12


def chance(run: Run, name: str) -> float:
    """What guessing reaches in this figure, or NaN."""
    found = run.evaluation.get("chance")
    found = found if isinstance(found, dict) else {}
    return number(found.get(name, found.get(name.removeprefix("query_"))))


def adapts(run: Run) -> bool:
    """Whether a learned start is adapted to tasks; older evaluations do not say, and mostly are."""
    return run.evaluation.get("adapts") is not False


def inner_loop(runs: Sequence[Run]) -> str:
    """What the inner loop is to these runs, in a word or two."""
    return "adaptation" if any(map(adapts, runs)) else "inner training"


def end_of(curve: Curve | None, name: str, place: int = -1) -> str:
    """A curve's last value in writing, or the one at `place`."""
    return "—" if curve is None else measure(name, curve.mean[place], half_of(curve, place))


def half_of(curve: Curve, place: int = -1) -> float:
    """The half-width there; NaN where all are 0, of a single test set, which has no interval."""
    return float(curve.half[place]) if np.any(curve.half) else math.nan


def series(place: int) -> str:
    """The colour of the run at that place."""
    return SERIES[place % len(SERIES)]


def key(place: int) -> str:
    """The numbered mark by which a run is recognised all over a comparison."""
    return f'<i class="key" style="background:var(--{series(place)})">{place + 1}</i>'


def legend(entries: Sequence[tuple[Line, str]]) -> str:
    """Keys of lines, in HTML."""
    items = "".join(f"<li>{swatch(line)}{escape(text)}</li>" for line, text in entries)
    return f'<ul class="legend">{items}</ul>'


def _run_legend(runs: Sequence[Run], styles: Sequence[tuple[Line, str]]) -> str:
    items = "".join(f"<li>{key(place)}{escape(run.name)}</li>" for place, run in enumerate(runs))
    return f'<ul class="legend">{items}</ul>' + legend(styles)


def panel(name: str, lines: Sequence[Line], frame: Frame, note: str = "") -> str:
    """One plot under its title."""
    bad = sum(int((~np.isfinite(line.y)).sum()) for line in lines)
    if bad:
        note += f" {bad} value{'s' if bad > 1 else ''} not finite, left out."
    note = f"<small>{note.strip()}</small>" if note.strip() else ""
    return (
        f"<figure><figcaption><h3>{escape(figure_name(name))}</h3>{note}</figcaption>"
        f"{draw(lines, frame)}</figure>"
    )


def _ordered(names: Iterable[str]) -> list[str]:
    """Accuracy and loss first, the others by name."""
    first = ("query_accuracy", "query_loss", "accuracy", "loss")
    found = set(names)
    return [name for name in first if name in found] + sorted(found.difference(first))


def adaptation(runs: Sequence[Run]) -> str:
    """Query figures against inner steps, from scratch beside meta-learned; "" where no run takes any."""
    names = _ordered(name for run in runs for name in run.curves if name.startswith("query_"))
    if all(len(curve.steps) < 2 for run in runs for curve in run.curves.values()):
        return ""
    step = "adaptation step" if inner_loop(runs) == "adaptation" else "inner step"
    panels = []
    levels = []
    for name in names[:MAX_PANELS]:
        lines = []
        for place, run in enumerate(runs):
            tag = str(place + 1) if len(runs) > 1 else ""
            if name in run.scratch:
                ink = series(place) if tag else "muted"
                lines.append(_against_steps(run.scratch[name], ink, "dashed", "s", ""))
            if name in run.curves:
                lines.append(_against_steps(run.curves[name], series(place), "solid", "o", tag))
        found = {chance(run, name) for run in runs}
        found = {level for level in found if np.isfinite(level)}
        level = found.pop() if len(found) == 1 else None  # several protocols have several chances
        levels.append(level)
        spoken = "; ".join(
            f"{run.name}: {end_of(run.curves[name], name, 0)} before, "
            f"{end_of(run.curves[name], name)} after"
            for run in runs if name in run.curves
        )  # fmt: skip
        label = f"{figure_name(name)} against {step}s. {spoken}"
        frame = Frame(label, step, percent=is_percent(name), level=level)
        panels.append(panel(name, lines, frame))
    if not panels:
        return ""
    empty = np.zeros(0)
    alone = len(runs) == 1
    styles = [(Line(empty, empty, ink="s0" if alone else "muted", marker="o"), "meta-learned")]
    if any(run.scratch for run in runs):
        styles.append((Line(empty, empty, ink="muted", dash="dashed", marker="s"), "from scratch"))
    if any(level is not None for level in levels):
        styles.append((Line(empty, empty, ink="muted", dash="dotted", width=1.1), "chance"))
    keys = legend(styles) if alone else _run_legend(runs, styles)
    return f'{keys}<div class="panels">{"".join(panels)}</div>'


def _against_steps(curve: Curve, ink: str, dash: str, marker: str, tag: str) -> Line:
    marker = marker if len(curve.steps) <= 40 else ""
    return Line(curve.steps, curve.mean, curve.half, ink=ink, dash=dash, marker=marker, tag=tag)


def training(runs: Sequence[Run]) -> str:
    """Support and query figures against outer steps."""
    sides = ("support_", "query_", "validation_")
    bases = _ordered(
        column.removeprefix(side)
        for run in runs for column in run.metrics for side in sides
        if column.startswith(side) and not column.endswith("_ci95")
    )  # fmt: skip
    panels, supports, validated = [], False, False
    for base in bases[:MAX_PANELS]:
        lines = []
        for place, run in enumerate(runs):
            tag = str(place + 1) if len(runs) > 1 else ""
            ink = series(place) if tag else "muted"
            found = _against_outer(run, f"support_{base}", ink, "dashed", "")
            supports = supports or bool(found)
            lines += found + _against_outer(run, f"query_{base}", series(place), "solid", tag)
            ink = series(place) if tag else "ink"
            found = _against_outer(run, f"validation_{base}", ink, "dotted", "")
            validated = validated or bool(found)
            lines += found
        longest = max((len(line.y) for line in lines), default=0)
        note = f"{count(longest)} points, drawn as means of neighbours." if longest > MAX_POINTS else ""
        label = f"{figure_name(base)} against outer steps, {' and '.join(run.name for run in runs)}"
        panels.append(panel(base, lines, Frame(label, "outer step", is_percent(base)), note))
    if not panels:
        return ""
    empty = np.zeros(0)
    alone = len(runs) == 1
    styles = [(Line(empty, empty, ink="s0" if alone else "muted"), f"query, after {inner_loop(runs)}")]
    if supports:
        styles.append((Line(empty, empty, ink="muted", dash="dashed", width=1.3), "support"))
    if validated:
        ink = "ink" if alone else "muted"
        styles.append((Line(empty, empty, ink=ink, dash="dotted", width=1.3), "query, validation classes"))
    keys = legend(styles) if alone else _run_legend(runs, styles)
    return f'{keys}<div class="panels">{"".join(panels)}</div>'


def _against_outer(run: Run, name: str, ink: str, dash: str, tag: str) -> list[Line]:
    if name not in run.metrics:
        return []
    width = 1.8 if dash == "solid" else 1.3
    here = slice(None)
    if dash == "dotted":  # measured now and then: the rows between have none, and leave no gap
        here = np.isfinite(run.metrics[name])
    half = run.metrics.get(f"{name}_ci95")
    half, steps = None if half is None else half[here], run.metrics["step"][here]
    return [Line(steps, run.metrics[name][here], half, ink=ink, dash=dash, width=width, tag=tag)]
