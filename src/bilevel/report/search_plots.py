"""The pictures of a search but for parallel coordinates: history, trade-off, importances, pruned trials."""

import math
from html import escape

import numpy as np

from bilevel.report.curves import legend, panel
from bilevel.report.numbers import count, figure_name, is_percent
from bilevel.report.plots import Frame, Line
from bilevel.report.search_data import Objective, Search, SearchTrial

MOST_LINES = 200  # above this a picture of lines is a blot
_EMPTY = np.zeros(0)
_DOT = Line(_EMPTY, _EMPTY, dash="none", marker="o", ink="s5")
_BEST = Line(_EMPTY, _EMPTY)


def history(search: Search) -> str:
    """The value of each trial, and the best so far, for each objective."""
    panels, pruned = [], False
    for place, objective in enumerate(search.objectives):
        done = [trial for trial in search.of("finished") if len(trial.values) > place]
        if not done:
            continue
        x = np.array([float(trial.number) for trial in done])
        y = np.array([trial.values[place] for trial in done])
        lines = [Line(x, y, ink="s5", dash="none", marker="o", opacity=0.75), _best_so_far(objective, x, y)]
        cut = [t for t in search.of("pruned") if t.reported] if place == 0 else []
        if cut:
            pruned = True
            last = np.array([trial.reported[max(trial.reported)] for trial in cut])
            lines.insert(0, Line(np.array([float(t.number) for t in cut]), last, ink="s1", dash="none",
                                 marker="s", opacity=0.6))  # fmt: skip
        label = f"{figure_name(objective.name)} of {len(done)} finished trials in the order of starting"
        panels.append(panel(objective.name, lines, Frame(label, "trial", is_percent(objective.name))))
    if not panels:
        return ""
    keys = [(_DOT, "finished"), (_BEST, "best so far")]
    if pruned:
        keys.insert(1, (Line(_EMPTY, _EMPTY, dash="none", marker="s", ink="s1"), "pruned, last report"))
    return f'{legend(keys)}<div class="panels">{"".join(panels)}</div>'


def _best_so_far(objective: Objective, x: np.ndarray, y: np.ndarray) -> Line:
    """A staircase."""
    order = np.argsort(x, kind="stable")
    worst = -np.inf if objective.maximize else np.inf
    known = np.where(np.isfinite(y[order]), y[order], worst)
    best = (np.maximum if objective.maximize else np.minimum).accumulate(known)
    steps, stairs = np.repeat(x[order], 2)[1:], np.repeat(best, 2)[:-1]
    there = np.isfinite(stairs)  # until the first number there is no best
    return Line(steps[there], stairs[there])


def front(search: Search) -> str:
    """Two objectives against each other, and the trials that none dominates."""
    if len(search.objectives) != 2:
        return ""
    good = [t for t in search.of("finished") if len(t.values) == 2 and all(map(math.isfinite, t.values))]
    if not good:
        return ""
    best = sorted(search.not_dominated(), key=lambda trial: trial.values)
    first, second = search.objectives
    x, y = (np.array([trial.values[i] for trial in good]) for i in range(2))
    bx, by = (np.array([trial.values[i] for trial in best]) for i in range(2))
    lines = [Line(x, y, ink="s5", dash="none", marker="o", opacity=0.7), Line(bx, by, marker="o")]
    label = f"{figure_name(second.name)} against {figure_name(first.name)}, {len(best)} trials on the front"
    frame = Frame(label, figure_name(first.name), is_percent(second.name), whole=False)
    keys = legend([(_DOT, "finished"), (Line(_EMPTY, _EMPTY, marker="o"), "not dominated")])
    return f'{keys}<div class="panels">{panel(second.name, lines, frame)}</div>'


def bars(shares: dict[str, float]) -> str:
    """Shares of one, the largest first."""
    rows = []
    for name, share in sorted(shares.items(), key=lambda item: -item[1]):
        if not math.isfinite(share):
            continue
        width = 100 * min(max(share, 0.0), 1.0)
        rows.append(
            f'<dt>{escape(name)}</dt><dd><span class="bar" style="width:{width:.1f}%"></span></dd>'
            f"<dd>{width:.0f} %</dd>"
        )
    return f'<dl class="bars">{"".join(rows)}</dl>' if rows else ""


def pruned_and_finished(search: Search) -> str:
    """What trials reported on their way, by how they ended."""
    told = [trial for trial in search.trials if trial.reported]
    if not any(len(trial.reported) > 1 for trial in told) or not any(t.outcome == "pruned" for t in told):
        return ""
    ranked = search.ranked()
    shown = some(told, MOST_LINES)
    lines = [_course(t, "s5", 0.55) for t in shown if t.outcome == "finished" and t not in ranked[:1]]
    lines += [_course(t, "s1", 0.7, "dashed") for t in shown if t.outcome == "pruned"]
    keys = [(Line(_EMPTY, _EMPTY, ink="s5"), "finished"),
            (Line(_EMPTY, _EMPTY, ink="s1", dash="dashed"), "pruned")]  # fmt: skip
    if ranked and ranked[0].reported:
        lines.append(_course(ranked[0], "s0", 1.0, width=2.6))
        keys.append((Line(_EMPTY, _EMPTY, width=2.6), "the best"))
    name = search.objectives[0].name
    pruned = sum(trial.outcome == "pruned" for trial in told)
    label = f"{figure_name(name)} of {len(told)} trials against outer steps, {pruned} of them pruned"
    note = f"{count(len(shown))} of {count(len(told))} trials." if len(shown) < len(told) else ""
    body = panel(name, lines, Frame(label, "outer step", is_percent(name)), note)
    return f'{legend(keys)}<div class="panels">{body}</div>'


def _course(trial: SearchTrial, ink: str, opacity: float, dash: str = "solid", width: float = 1.2) -> Line:
    steps = sorted(trial.reported)
    x, y = np.array(steps, float), np.array([trial.reported[step] for step in steps], float)
    marker = "o" if len(steps) == 1 else ""
    return Line(x, y, ink=ink, opacity=opacity, dash=dash, width=width, marker=marker)


def some(trials: list[SearchTrial], most: int) -> list[SearchTrial]:
    """All of them, or that many evenly spread."""
    if len(trials) <= most:
        return trials
    places = np.unique(np.linspace(0, len(trials) - 1, most).astype(int))
    return [trials[place] for place in places]
