"""The page of a search: one self-contained HTML file; what is shown comes as plain values.

`bilevel.search.report` reads a study or a population into these values: only `search` knows Optuna.
"""

import math
from collections.abc import Sequence
from html import escape

from bilevel.report.html import section, table
from bilevel.report.numbers import count, duration, figure_name, measure
from bilevel.report.search_data import Search, SearchTrial
from bilevel.report.search_parallel import parallel
from bilevel.report.search_parts import commands, document
from bilevel.report.search_plots import bars, front, history, pruned_and_finished

_MOST_ROWS = 2000
_FEWEST = 4  # finished trials below which importances say nothing


def render_search(search: Search) -> str:
    """The whole HTML document about a search.

    >>> from bilevel.report.search_data import Objective
    >>> page = render_search(Search("mine", "protonet", (Objective("query_loss"),), ()))
    >>> "No trial has begun yet" in page
    True
    """
    several = len(search.objectives) > 1
    sections = [
        section("Result", _result(search), _tally(search)),
        section("Trade-off", front(search) if several else "", "Each point is a finished trial; on the "
                "line none is as good in both figures and better in one."),
        section("History", history(search), "The value of each finished trial, and the best so far."),
        section("What mattered", bars(search.importances) if _told(search) else "",
                f"Share of each field in what makes a trial one of the best, by PED-ANOVA over "
                f"{count(len(search.ranked()))} finished trials. With a few dozen trials it is a hint."),
        section("Choices and values", parallel(search), "A line is a trial; it crosses an axis at what "
                "was chosen for that field, and the last one at the value it reached."),
        section("Pruned against finished", pruned_and_finished(search), "What trials reported on their "
                "way: a pruned one was ended early because others were better at the same outer step."),
        section("Trials", _trials(search), ""),
        section("Go on", commands(search.commands), ""),
    ]  # fmt: skip
    facts = [search.recipe, f"{count(len(search.trials))} trials", *_time(search)]
    return document("Search", search.name, facts, search.notes, sections)


def _told(search: Search) -> bool:
    """Whether importances say something."""
    return len(search.importances) > 1 and len(search.ranked()) >= _FEWEST


def _time(search: Search) -> list[str]:
    spent = sum(trial.seconds for trial in search.trials if math.isfinite(trial.seconds))
    return [f"{duration(spent)} of trials"] if spent else []


def _tally(search: Search) -> str:
    """How many trials ended how."""
    if not search.trials:
        return ""
    counts = {outcome: len(search.of(outcome)) for outcome in ("finished", "pruned", "failed", "running")}
    parts = [f"{count(number)} {outcome}" for outcome, number in counts.items() if number]
    planned = f" of {count(search.planned)} planned" if search.planned is not None else ""
    return escape(f"{', '.join(parts)}{planned}.")


def _result(search: Search) -> str:
    terms = "".join(f"<div><dt>{escape(t)}</dt><dd>{escape(text)}</dd></div>" for t, text in search.facts)
    terms = f'<dl class="terms">{terms}</dl>' if terms else ""
    if not search.trials:
        return f'<p class="empty">No trial has begun yet.</p>{terms}'
    ranked, objective = search.ranked(), search.objectives[0]
    if not ranked:
        why = "all trials failed" if len(search.of("failed")) == len(search.trials) else "none has finished"
        return f'<p class="empty">There is no best trial: {why}.</p>{_errors(search)}{terms}'
    if len(search.objectives) > 1:
        found = len(search.not_dominated())
        said = f"{count(found)} trial{'s' if found > 1 else ''} that no other is better than in everything"
        hero = f'<p class="hero"><b>{count(found)}</b><small>{said}</small></p>'
        return hero + _best_table(search, search.not_dominated()) + terms
    best, name = ranked[0], objective.name
    hero = (
        f'<p class="hero"><b>{measure(name, best.values[0])}</b>'
        f"<small>{escape(figure_name(name))} of trial {best.number}, the "
        f"{'largest' if objective.maximize else 'smallest'} of {count(len(ranked))}</small></p>"
    )
    return hero + _best_table(search, ranked[:5]) + _errors(search) + terms


def _errors(search: Search) -> str:
    """The errors there are, each once."""
    failed = search.of("failed")
    if not failed:
        return ""
    messages: dict[str, list[int]] = {}
    for trial in failed:
        messages.setdefault(trial.error or "no reason recorded", []).append(trial.number)
    rows = []
    for message, numbers in sorted(messages.items(), key=lambda item: -len(item[1]))[:5]:
        more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
        which = ", ".join(map(str, numbers[:3])) + more
        rows.append(f"<li>trial{'s' if len(numbers) > 1 else ''} {which}: {escape(message)}</li>")
    return f'<ul class="notes" aria-label="Errors">{"".join(rows)}</ul>'


def _best_table(search: Search, trials: Sequence[SearchTrial]) -> str:
    names = search.parameters()
    head = ["Trial", *(escape(figure_name(o.name)) for o in search.objectives), *map(escape, names)]
    rows = [
        [f"<strong>{trial.number}</strong>", *_figures(search, trial), *(chosen(trial, n) for n in names)]
        for trial in trials[:20]
    ]
    return table(head, rows, "The best trials")


def _figures(search: Search, trial: SearchTrial) -> list[str]:
    """The values in writing; a pruned trial's is the last it reported."""
    if trial.values:
        return [measure(o.name, v) for o, v in zip(search.objectives, trial.values, strict=True)]
    last = "—"
    if trial.reported and trial.outcome in ("pruned", "running"):
        last = measure(search.objectives[0].name, trial.reported[max(trial.reported)])
        last = f"<small>{last} at {count(max(trial.reported))}</small>"
    return [last, *["—"] * (len(search.objectives) - 1)]


def chosen(trial: SearchTrial, name: str) -> str:
    """What a trial was given for a field, in a table."""
    if name not in trial.params:
        return "—"
    value = trial.params[name]
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return escape(str(value))


def _trials(search: Search) -> str:
    if not search.trials:
        return ""
    names, ranked = search.parameters(), search.ranked()
    places = {trial.number: place for place, trial in enumerate(ranked)}
    shown = sorted(search.trials, key=lambda t: (places.get(t.number, len(places)), t.number))[:_MOST_ROWS]
    failed = any(trial.error for trial in search.trials)
    head = ["Trial", "Outcome", *(escape(figure_name(o.name)) for o in search.objectives)]
    head += [*map(escape, names), "Time", "Folder", *(["Error"] if failed else [])]
    rows = []
    for trial in shown:
        time = duration(trial.seconds) if math.isfinite(trial.seconds) else "—"
        row = [str(trial.number), f'<span class="{trial.outcome}">{trial.outcome}</span>']
        row += [*_figures(search, trial), *(chosen(trial, name) for name in names), time]
        row += [f"<code>{escape(trial.folder)}</code>" if trial.folder else "—"]
        rows.append(row + ([f'<span class="error">{escape(trial.error)}</span>'] if failed else []))
    left = len(search.trials) - len(shown)
    note = f"{count(left)} more trials are left out." if left else ""
    note = f'<p class="lead">The best first. {note}</p>'
    return f'{note}<div class="trials">{table(head, rows, "All trials")}</div>'
