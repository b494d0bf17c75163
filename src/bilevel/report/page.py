"""The page: sections in the order a reader wants them, every foreign string escaped."""

import json
import shlex
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from bilevel.report.curves import adaptation, chance, end_of, inner_loop, key, training
from bilevel.report.html import document, section, table
from bilevel.report.learned import learned
from bilevel.report.numbers import count, duration, figure_name, measure
from bilevel.report.pictures import examples
from bilevel.report.protocol import calibration, overfitting, shots
from bilevel.report.runs import Curve, Run, number
from bilevel.report.style import CSS

TASKS_ALONE, TASKS_COMPARED = 4, 2


def render(runs: Sequence[Run]) -> str:
    """The whole HTML document about these runs."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = [
        section("Result", _result(runs), _intervals(runs)),
        section(*_adaptation(runs)),
        section("Learned", learned(runs), "What the meta-parameters themselves say."),
        section("Shots", shots(runs), "The same learner with other numbers of support examples a class."),
        section("Calibration", calibration(runs), "Whether an answer given with 80 % confidence is "
                 "right in 80 % of the cases, over all query examples."),
        section(*_overfitting(runs)),
        section("Meta-training", training(runs), "Means over each logged stretch of outer "
                 "steps; bands are 95 % confidence intervals."),
        section("Example tasks", _examples(runs), ""),
        section("Configuration", _config(runs), ""),
        section("Repeat", _repeat(runs), ""),
    ]  # fmt: skip
    return document(title, CSS, _header(runs, title), sections)


def _adaptation(runs: Sequence[Run]) -> tuple[str, str, str]:
    what = inner_loop(runs)
    lead = "Query figures on unseen tasks along adaptation, with 95 % confidence intervals over tasks."
    if what != "adaptation":
        lead = "Query figures along the training on the whole support."
    return what.capitalize(), adaptation(runs), lead


def _overfitting(runs: Sequence[Run]) -> tuple[str, str, str]:
    if inner_loop(runs) != "adaptation":  # there are no classes to overfit to, and no start
        return "The test", overfitting(runs), "What was checked of it."
    return (
        "Meta-overfitting",
        overfitting(runs),
        "How much worse unseen classes are than seen ones, and whether the start is made for a few steps.",
    )


def _header(runs: Sequence[Run], title: str) -> str:
    facts = ""
    if len(runs) == 1:
        recipe = runs[0].config.get("recipe")
        parts = [f"<span>{escape(str(recipe))}</span>"] if recipe is not None else []
        parts += [f"<span>{fact}</span>" for fact in _facts(runs[0])]
        facts = f'<p class="facts">{"".join(parts)}</p>' if parts else ""
    notes = "".join(_notes(run, len(runs) > 1) for run in runs)
    notes = f'<ul class="notes" aria-label="Notes">{notes}</ul>' if notes else ""
    kind = "Run report" if len(runs) == 1 else "Comparison"
    return f'<header><p class="kicker">bilevel · {kind}</p><h1>{escape(title)}</h1>{facts}{notes}</header>'


def _facts(run: Run) -> list[str]:
    facts = []
    steps, time = run.metrics.get("step"), run.metrics.get("time")
    if steps is not None and len(steps):
        facts.append(f"{count(steps[-1])} outer steps")
    if time is not None and len(time) and np.isfinite(time[-1]):
        facts.append(f"{duration(time[-1])} of training")
    return facts


def _notes(run: Run, named: bool) -> str:
    rows = []
    for note in run.notes:
        who = f"<b>{escape(run.name)}</b> " if named else ""
        fix = f" Make it with <code>{escape(note.command)}</code>." if note.command else ""
        rows.append(f"<li>{who}{escape(note.text)}{fix}</li>")
    return "".join(rows)


def _headline(runs: Sequence[Run]) -> str:
    """The figure that sums a run up: accuracy where there is one, else MSE, else the query loss."""
    names = [name for run in runs for name in run.curves]
    for name in ("query_accuracy", "query_mse", "query_loss"):
        if name in names:
            return name
    return next((name for name in names if name.startswith("query_")), "")


def _intervals(runs: Sequence[Run]) -> str:
    name = _headline(runs)
    if not name:
        return ""
    said = escape(figure_name(name))
    if not any(np.any(run.curves[name].half) for run in runs if name in run.curves):
        return f"{said}, of a single test set, which has no interval."
    what = "tasks" if inner_loop(runs) == "adaptation" else "trainings"
    return f"{said}, mean over {what} ± half-width of the 95 % confidence interval."


def _result(runs: Sequence[Run]) -> str:
    name = _headline(runs)
    if not name:
        fix = f"bilevel eval {shlex.quote(str(runs[0].folder))}"
        return f'<p class="empty">Not evaluated yet: run <code>{escape(fix)}</code>.</p>'
    return _result_alone(runs[0], name) if len(runs) == 1 else _result_compared(runs, name)


def _tasks(run: Run) -> str:
    tasks = number(run.evaluation.get("num_tasks"))
    split = run.evaluation.get("split")
    tasks_text = count(tasks) if np.isfinite(tasks) else "—"
    return tasks_text + (f" ({escape(str(split))})" if split is not None else "")


def _after(curve: Curve) -> str:
    steps = curve.steps[-1]
    if len(curve.steps) < 2:  # no steps were taken
        return ""
    return f"<small>({steps} step{'' if steps == 1 else 's'})</small>"


def _result_alone(run: Run, name: str) -> str:
    meta, scratch = run.curves[name], run.scratch.get(name)
    steps = meta.steps[-1]
    guess = chance(run, name)
    rows = []
    if np.isfinite(guess):
        rows.append(["Chance", measure(name, guess), measure(name, guess)])
    if scratch is not None:
        rows.append(["From scratch, on the support set", end_of(scratch, name, 0),
                     f"{end_of(scratch, name)} {_after(scratch)}"])  # fmt: skip
    rows.append(["<strong>Meta-learned</strong>", end_of(meta, name, 0),
                 f"<strong>{end_of(meta, name)}</strong> {_after(meta)}"])  # fmt: skip
    figures = table(["Start", f"Before {inner_loop([run])}", "After"], rows, "Result")
    protocol = run.evaluation.get("protocol")
    terms = [("Protocol", escape(str(protocol)) if protocol is not None else "—"),
             ("Tasks" if inner_loop([run]) == "adaptation" else "Trainings", _tasks(run))]  # fmt: skip
    seconds = number(run.evaluation.get("seconds"))
    if np.isfinite(seconds):
        terms.append(("Evaluated in", duration(seconds)))
    listed = "".join(f"<div><dt>{term}</dt><dd>{text}</dd></div>" for term, text in terms)
    value, half = end_of(meta, name), ""
    if "±" in value:
        value, _, half = value.partition(" ± ")
        half = f"<span>± {half}</span>"
    said = escape(figure_name(name)) + _taken(run, int(steps))
    hero = f'<p class="hero"><b>{value}</b>{half}<small>{said}</small></p>'
    return f'{hero}<div class="alone">{figures}</div><dl class="terms">{listed}</dl>'


def _taken(run: Run, steps: int) -> str:
    if not steps:
        return ""
    what = "adaptation" if inner_loop([run]) == "adaptation" else "inner"
    return f" after {steps} {what} step{'' if steps == 1 else 's'}"


def _result_compared(runs: Sequence[Run], name: str) -> str:
    rows = []
    for place, run in enumerate(runs):
        meta, protocol = run.curves.get(name), run.evaluation.get("protocol")
        steps = "—" if meta is None else str(meta.steps[-1])
        rows.append([
            f"{key(place)}<strong>{escape(run.name)}</strong>",
            f"<strong>{end_of(meta, name)}</strong>",
            end_of(meta, name, 0),
            end_of(run.scratch.get(name), name),
            measure(name, chance(run, name)) if np.isfinite(chance(run, name)) else "—",
            steps,
            _tasks(run),
            escape(str(protocol)) if protocol is not None else "—",
        ])  # fmt: skip
    head = ["Run", "After", "Before", "From scratch", "Chance", "Steps", "Tasks", "Protocol"]
    return f'<div class="compared">{table(head, rows, "Result of each run")}</div>'


def _examples(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return examples(runs[0], TASKS_ALONE, 3)
    parts = []
    for place, run in enumerate(runs):
        body = examples(run, TASKS_COMPARED, 4)
        if body:
            parts.append(f"<h3>{key(place)}{escape(run.name)}</h3>{body}")
    return "".join(parts)


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested config as `a.b.c` rows; what is not a mapping is shown as JSON, strings bare."""
    if isinstance(value, dict) and value:
        rows: dict[str, str] = {}
        for name, inner in value.items():
            rows.update(_flat(inner, f"{prefix}.{name}" if prefix else str(name)))
        return rows
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return {prefix: text} if prefix else {}


def _config(runs: Sequence[Run]) -> str:
    if not any(run.config for run in runs):
        return ""
    configs: list[dict[str, str]] = []
    for run in runs:
        top = {name: run.config[name] for name in ("recipe", "version", "jax") if name in run.config}
        configs.append({**_flat(top), **_flat(run.config.get("fields"))})
    rows = []
    for field in dict.fromkeys(field for config in configs for field in config):
        cells = [config.get(field, "—") for config in configs]
        differ = len(set(cells)) > 1
        mark = ' <span class="differs" title="differs between the runs">≠</span>' if differ else ""
        name = {"version": "bilevel version", "jax": "jax version"}.get(field, field)
        shown = [f"<strong>{escape(cell)}</strong>" if differ else escape(cell) for cell in cells]
        rows.append([f"{escape(name)}{mark}", *shown])
    heads = [escape(run.name) for run in runs] if len(runs) > 1 else ["Value"]
    return f'<div class="config">{table(["Field", *heads], rows, "Configuration")}</div>'


def _repeat(runs: Sequence[Run]) -> str:
    parts = []
    for place, run in enumerate(runs):
        command = run.config.get("command")
        if command is None:
            continue
        name = f"<h3>{key(place)}{escape(run.name)}</h3>" if len(runs) > 1 else ""
        parts.append(f'{name}<pre tabindex="0"><code>{escape(str(command))}</code></pre>')
    return "".join(parts)
