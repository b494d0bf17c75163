"""The page of a population: what its members reached, which schedule was found, who copied whom."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from bilevel.report.curves import legend, panel
from bilevel.report.html import section, table
from bilevel.report.numbers import count, figure_name, is_percent, measure
from bilevel.report.plots import Frame, Line
from bilevel.report.runs import Note
from bilevel.report.search_data import Objective
from bilevel.report.search_parts import commands, document

_MOST_PANELS = 8
_MOST_ROUNDS = 60  # above this a lineage is a blot
_STEP_X, _STEP_Y, _LEFT, _TOP = 64, 26, 90, 18  # pixels of the lineage
_EMPTY = np.zeros(0)


@dataclass(frozen=True)
class Stage:
    """One member in one round.

    Args:
        value: what it reached, NaN where it failed.
        hyperparameters: it trained with.
        copied_from: the member whose state and hyperparameters it took after the round, or None.
        explored: `{name: (from, to)}` of what it then changed.
        error: why it failed, or "".
    """

    value: float
    hyperparameters: dict[str, Any]
    copied_from: int | None = None
    explored: dict[str, tuple[Any, Any]] | None = None
    error: str = ""


@dataclass(frozen=True)
class PopulationStory:
    """A population, as far as it has come.

    Args:
        name: a title.
        recipe: what is trained.
        objective: what members are compared by.
        steps: the outer step that each round ended at, `[rounds]`.
        stages: `[rounds][members]`.
        planned: how many rounds there shall be.
        folders: of the members, as the reader should type them.
        facts: further `(term, text)`.
        commands: `(what for, what to type)`.
        notes: what the reader should know.
    """

    name: str
    recipe: str
    objective: Objective
    steps: tuple[int, ...]
    stages: tuple[tuple[Stage, ...], ...]
    planned: int
    folders: tuple[str, ...]
    facts: tuple[tuple[str, str], ...] = ()
    commands: tuple[tuple[str, str], ...] = ()
    notes: tuple[Note, ...] = ()

    def best(self) -> int | None:
        """The best member after the newest round."""
        if not self.stages:
            return None
        best = None
        for member, stage in enumerate(self.stages[-1]):
            if math.isfinite(stage.value) and (
                best is None or self.objective.better(stage.value, self.stages[-1][best].value)
            ):
                best = member
        return best

    def ancestors(self) -> list[int]:
        """Which member held the best one's state in each round, `[rounds]`."""
        member, found = self.best(), []
        if member is None:
            return []
        for stages in reversed(self.stages):
            # What is copied after a round is what the donor had in it.
            copied = stages[member].copied_from if found else None
            member = member if copied is None else copied
            found.append(member)
        return found[::-1]


def render_population(story: PopulationStory) -> str:
    """The whole HTML document about a population.

    >>> page = render_population(
    ...     PopulationStory("mine", "protonet", Objective("query_loss"), (), (), 4, ("members/00",)))
    >>> "No round has ended yet" in page
    True
    """
    sections = [
        section("Result", _result(story), ""),
        section("Values", _values(story), "What each member reached in each round; the strong line is the "
                "history of the best member's state, through the members it was copied from."),
        section("Hyperparameters over time", _schedules(story), "The strong line is the schedule that the "
                "best member's state was trained with: that is what the population found."),
        section("Lineage", _lineage(story), "A row is a member, a column a round. A line between rows is a "
                "copy: the member it leads to goes on with the state of the one it comes from."),
        section("Copies", _copies(story), ""),
        section("Members", _members(story), ""),
        section("Go on", commands(story.commands), ""),
    ]  # fmt: skip
    done = f"{count(len(story.stages))} of {count(story.planned)} rounds"
    facts = [story.recipe, f"{len(story.folders)} members", done]
    return document("Population", story.name, facts, story.notes, sections)


def _names(story: PopulationStory) -> list[str]:
    return list(story.stages[0][0].hyperparameters) if story.stages else []


def shown(value: Any) -> str:
    """A hyperparameter in a table."""
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return escape(str(value))


def _result(story: PopulationStory) -> str:
    terms = "".join(f"<div><dt>{escape(t)}</dt><dd>{escape(text)}</dd></div>" for t, text in story.facts)
    terms = f'<dl class="terms">{terms}</dl>' if terms else ""
    best, name = story.best(), story.objective.name
    if best is None:
        why = "No round has ended yet." if not story.stages else "All members failed."
        return f'<p class="empty">{why}</p>{terms}'
    values = [stage.value for stage in story.stages[-1] if math.isfinite(stage.value)]
    worst = max(values) if not story.objective.maximize else min(values)
    first = [stage.value for stage in story.stages[0] if math.isfinite(stage.value)]
    start = ""
    if first:
        top = min(first) if not story.objective.maximize else max(first)
        start = f"; the best after the first round had {measure(name, top)}"
    return (
        f'<p class="hero"><b>{measure(name, story.stages[-1][best].value)}</b><small>'
        f"{escape(figure_name(name))} of member {best} at outer step {count(story.steps[-1])}; the worst "
        f"member has {measure(name, worst)}{start}</small></p>{terms}"
    )


def _values(story: PopulationStory) -> str:
    if not story.stages:
        return ""
    steps = np.array(story.steps, float)
    values = np.array([[stage.value for stage in stages] for stages in story.stages])  # [rounds, members]
    lines = [_thin(steps, column) for column in values.T]
    keys = [(Line(_EMPTY, _EMPTY, ink="s5", width=1.2), "a member")]
    if ancestors := story.ancestors():
        rounds = np.arange(len(ancestors))
        lines.append(Line(steps, values[rounds, ancestors], width=2.6, marker="o"))
        keys.append((Line(_EMPTY, _EMPTY, width=2.6), "history of the best"))
    name = story.objective.name
    label = f"{figure_name(name)} of {len(story.folders)} members against outer steps"
    body = panel(name, lines, Frame(label, "outer step", is_percent(name)))
    return f'{legend(keys)}<div class="panels">{body}</div>'


def _thin(x: np.ndarray, y: np.ndarray) -> Line:
    return Line(x, y, ink="s5", width=1.2, opacity=0.6, marker="o" if len(x) == 1 else "")


def _schedules(story: PopulationStory) -> str:
    if not story.stages:
        return ""
    ancestors, panels = story.ancestors(), []
    starts = [0, *story.steps[:-1]]
    for name in _names(story)[:_MOST_PANELS]:
        held = [[stage.hyperparameters[name] for stage in stages] for stages in story.stages]
        if any(isinstance(v, bool) or not isinstance(v, int | float) for row in held for v in row):
            continue  # choices have no order; the tables have them
        rows = np.array(held, float)
        # A stair: the value holds from the beginning of a round to its end.
        x = np.array([edge for pair in zip(starts, story.steps, strict=True) for edge in pair], float)
        lines = [_thin(x, np.repeat(column, 2)) for column in rows.T]
        if ancestors:
            lines.append(Line(x, np.repeat(rows[np.arange(len(ancestors)), ancestors], 2), width=2.6))
        panels.append(panel(name, lines, Frame(f"{name} of each member against outer steps", "outer step")))
    if not panels:
        return ""
    keys = [(Line(_EMPTY, _EMPTY, ink="s5", width=1.2), "a member"),
            (Line(_EMPTY, _EMPTY, width=2.6), "schedule of the best")]  # fmt: skip
    return f'{legend(keys)}<div class="panels">{"".join(panels)}</div>'


def _lineage(story: PopulationStory) -> str:
    """Members as rows, rounds as columns, copies as arrows."""
    rounds, members = len(story.stages), len(story.folders)
    if not 1 < rounds <= _MOST_ROUNDS:
        return ""
    ancestors = story.ancestors()
    parts = []
    for r, stages in enumerate(story.stages):
        for m, stage in enumerate(stages):
            strong = bool(ancestors) and ancestors[r] == m
            if r + 1 < rounds and stage.copied_from is None:
                parts.append(_edge(r, m, m, strong and ancestors[r + 1] == m, ""))
            elif r + 1 < rounds:
                used = bool(ancestors) and ancestors[r + 1] == m and ancestors[r] == stage.copied_from
                parts.append(_edge(r, stage.copied_from or 0, m, used, "copy"))
    for r, stages in enumerate(story.stages):
        for m, stage in enumerate(stages):
            strong = bool(ancestors) and ancestors[r] == m
            ink = "bad" if stage.error else "s0" if strong else "s5"
            x, y = _at(r, m)
            parts.append(f'<circle cx="{x}" cy="{y}" r="{6 if strong else 4}" fill="var(--{ink})"/>')
    for m in range(members):
        parts.append(_text(_LEFT - 18, _at(0, m)[1] + 4, f"member {m}", "end"))
    every = max(1, rounds // 12)
    for r in range(0, rounds, every):
        parts.append(_text(_at(r, 0)[0], _TOP + members * _STEP_Y + 8, count(story.steps[r]), "middle"))
    width, height = _LEFT + (rounds - 1) * _STEP_X + 40, _TOP + members * _STEP_Y + 16
    label = f"Lineage of {members} members over {rounds} rounds"
    entries = [(Line(_EMPTY, _EMPTY, width=2.6, marker="o"), "history of the best"),
               (Line(_EMPTY, _EMPTY, ink="s1", dash="dashed", width=1.4), "copied")]  # fmt: skip
    if any(stage.error for stages in story.stages for stage in stages):
        entries.append((Line(_EMPTY, _EMPTY, ink="bad", dash="none", marker="o"), "failed"))
    return (
        f'{legend(entries)}<div class="scroll" tabindex="0" role="region" aria-label="Lineage"><svg '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg></div>'
    )


def _at(round_number: int, member: int) -> tuple[int, int]:
    return _LEFT + round_number * _STEP_X, _TOP + member * _STEP_Y


def _edge(round_number: int, source: int, target: int, strong: bool, kind: str) -> str:
    (x0, y0), (x1, y1) = _at(round_number, source), _at(round_number + 1, target)
    ink, width = ("s0", 2.6) if strong else ("s1", 1.4) if kind else ("rule", 1.4)
    dash = ' stroke-dasharray="5 3"' if kind and not strong else ""
    middle = (x0 + x1) / 2
    return (
        f'<path d="M{x0} {y0}C{middle} {y0} {middle} {y1} {x1} {y1}" fill="none" stroke="var(--{ink})" '
        f'stroke-width="{width}"{dash}/>'
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    style = f'fill="var(--muted)" font-size="12" text-anchor="{anchor}"'
    return f'<text x="{x}" y="{y}" {style}>{escape(text)}</text>'


def _copies(story: PopulationStory) -> str:
    rows = []
    for step, stages in zip(story.steps, story.stages, strict=True):
        for member, stage in enumerate(stages):
            if stage.copied_from is None:
                continue
            changed = [f"{escape(n)} {shown(a)} → {shown(b)}" for n, (a, b) in (stage.explored or {}).items()]
            theirs = measure(story.objective.name, stages[stage.copied_from].value)
            own = "failed" if stage.error else measure(story.objective.name, stage.value)
            rows.append([count(step), str(member), own, str(stage.copied_from), theirs,
                         "; ".join(changed) or "nothing"])  # fmt: skip
    if not rows:
        return ""
    head = ["Outer step", "Member", "had", "copied", "which had", "and changed"]
    return f'<div class="trials">{table(head, rows, "Copies")}</div>'


def _members(story: PopulationStory) -> str:
    if not story.stages:
        return ""
    names, rows = _names(story), []
    for member, stage in enumerate(story.stages[-1]):
        value = f'<span class="failed">{escape(stage.error)}</span>' if stage.error else ""
        value = value or measure(story.objective.name, stage.value)
        held = [shown(stage.hyperparameters[name]) for name in names]
        rows.append([str(member), value, *held, f"<code>{escape(story.folders[member])}</code>"])
    head: Sequence[str] = ["Member", escape(figure_name(story.objective.name)), *map(escape, names), "Run"]
    note = '<p class="lead">After the newest round; each is an ordinary run folder.</p>'
    return note + table(head, rows, "Members")
