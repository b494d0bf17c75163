"""The sections on the protocol: shots, calibration, meta-overfitting, specialization, validation."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from bilevel.report.curves import inner_loop, key, legend, panel, series
from bilevel.report.numbers import figure_name, is_percent, measure
from bilevel.report.plots import Frame, Line, draw
from bilevel.report.runs import Curve, Run, curves_of, number


def shots(runs: Sequence[Run]) -> str:
    """The headline figure against the number of support examples, for runs judged on several."""
    found = [_by_shots(run) for run in runs]
    name = next((name for curves in found for name in curves), "")
    if not name:
        return ""
    lines, spoken = [], []
    for place, (run, curves) in enumerate(zip(runs, found, strict=True)):
        if name not in curves:
            continue
        sizes, curve = curves[name]
        tag = str(place + 1) if len(runs) > 1 else ""
        lines.append(Line(sizes, curve.mean, curve.half, ink=series(place), marker="o", tag=tag))
        said = ", ".join(
            f"{measure(name, m, h)} with {n:g}" for n, m, h in zip(sizes, curve.mean, curve.half, strict=True)
        )
        spoken.append(f"{run.name}: {said}")
    label = f"{figure_name(name)} against shots. {'; '.join(spoken)}"
    frame = Frame(label, "support examples a class", percent=is_percent(name))
    return f'<div class="panels">{panel(name, lines, frame)}</div>'


def _by_shots(run: Run) -> dict[str, tuple[np.ndarray, Curve]]:
    """For each query figure: the support sizes, and the last point of each of their curves."""
    found = run.evaluation.get("shots")
    by_size = {}
    for size, curves in found.items() if isinstance(found, dict) else ():
        if np.isfinite(number(size)):
            by_size[number(size)] = curves_of(curves)
    sizes = sorted(by_size)
    out = {}
    for name in ("query_accuracy", "query_loss"):
        if sizes and all(name in by_size[size] for size in sizes):
            ends = [by_size[size][name] for size in sizes]
            mean, half = (np.array([getattr(end, part)[-1] for end in ends]) for part in ("mean", "half"))
            out[name] = (np.array(sizes), Curve(mean, half, np.array(sizes)))
    return out


def calibration(runs: Sequence[Run]) -> str:
    """Reliability diagrams: accuracy against confidence, before and after adaptation."""
    parts = []
    for place, run in enumerate(runs):
        found = run.evaluation.get("calibration")
        if not isinstance(found, dict):
            continue
        lines = [Line(np.array([0.0, 1.0]), np.array([0.0, 1.0]), ink="muted", dash="dotted", width=1.1)]
        # Before adaptation one line, where after it too, is drawn only where the solver has steps.
        many = isinstance(found.get("ece"), list) and len(found["ece"]) > 1
        for when, ink, dash in (("before", "muted", "dashed"), ("after", series(place), "solid")):
            points = _diagram(found.get(when))
            if points is not None and (many or when == "after"):
                lines.append(Line(*points, ink=ink, dash=dash, marker="o"))
        if len(lines) == 1:
            continue
        said = _ece(found, inner_loop([run]))
        label = f"Reliability of {run.name}: share of right answers against confidence. {said}"
        frame = Frame(label, "confidence", percent=True, whole=False)
        title = f"{key(place)}{escape(run.name)}" if len(runs) > 1 else "Reliability"
        parts.append(
            f"<figure><figcaption><h3>{title}</h3><small>{escape(said)}</small></figcaption>"
            f"{draw(lines, frame)}</figure>"
        )
    if not parts:
        return ""
    empty = np.zeros(0)
    ink = "s0" if len(runs) == 1 else "muted"
    styles = [
        (Line(empty, empty, ink=ink, marker="o"), f"share right after {inner_loop(runs)}"),
        (Line(empty, empty, ink="muted", dash="dashed", marker="o"), "before"),
        (Line(empty, empty, ink="muted", dash="dotted", width=1.1), "perfectly calibrated"),
    ]
    return f'{legend(styles)}<div class="panels">{"".join(parts)}</div>'


def _diagram(found: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Confidence and accuracy of the bins that hold something."""
    if not isinstance(found, dict):
        return None
    confidence, accuracy = found.get("confidence"), found.get("accuracy")
    if not isinstance(confidence, list) or not isinstance(accuracy, list) or len(confidence) != len(accuracy):
        return None
    x, y = ([number(v) for v in column] for column in (confidence, accuracy))
    filled = np.isfinite(x) & np.isfinite(y)
    return (np.array(x)[filled], np.array(y)[filled]) if filled.any() else None


def _ece(found: dict[str, Any], what: str) -> str:
    values = found.get("ece")
    ends = [number(v) for v in values] if isinstance(values, list) and values else [float("nan")]
    text = f"expected calibration error {100 * ends[-1]:.1f} %"
    if len(ends) > 1:
        text += f" after {what}, {100 * ends[0]:.1f} % before"
    bins, answers = number(found.get("num_bins")), number(found.get("num_examples"))
    return f"{text}; {bins:g} bins, {answers:,.0f} answers."


def overfitting(runs: Sequence[Run]) -> str:
    """Gaps between seen and unseen classes, support and query; what adaptation does to the parameters."""
    parts = []
    for place, run in enumerate(runs):
        rows = "".join(f"<li>{escape(text)}</li>" for text in _facts(run))
        plots = "".join(_plots(run, series(place)))
        if not rows and not plots:
            continue
        name = f"<h3>{key(place)}{escape(run.name)}</h3>" if len(runs) > 1 else ""
        listed = f'<ul class="lead">{rows}</ul>' if rows else ""
        parts.append(f'{name}{listed}<div class="panels">{plots}</div>')
    return "".join(parts)


def _facts(run: Run) -> list[str]:
    """Sentences that evaluation.json holds, and its gaps."""
    found = run.evaluation
    facts = [str(found[name]) for name in ("unseen", "batch_statistics") if isinstance(found.get(name), str)]
    gaps = found.get("gaps")
    for name, value in gaps.items() if isinstance(gaps, dict) else ():
        if isinstance(value, dict):
            points = str(name).endswith("accuracy")
            mean, half = ((100 if points else 1) * number(value.get(part)) for part in ("mean", "ci95"))
            facts.append(f"{name}: {mean:+.2f} ± {half:.2f}{' points' if points else ''}".replace("-", "−"))
    special = found.get("specialization")
    if isinstance(special, dict) and isinstance(special.get("reading"), str):
        facts.append(special["reading"])
    notes = found.get("notes")
    return facts + (list(map(str, notes)) if isinstance(notes, list) else [])


def _plots(run: Run, ink: str) -> list[str]:
    """Losses along and beyond the steps of adaptation, and how far each part of the parameters moves."""
    special = run.evaluation.get("specialization")
    if not isinstance(special, dict):
        return []
    losses = curves_of({name: special.get(name) for name in ("query_loss", "support_loss")})
    plots = []
    if losses:
        lines = [
            Line(c.steps, c.mean, c.half, ink=ink if name == "query_loss" else "muted",
                 dash="solid" if name == "query_loss" else "dashed")
            for name, c in losses.items()
        ]  # fmt: skip
        label = f"Losses of {run.name} along adaptation and beyond its {special.get('num_steps')} steps"
        note = "Query, and support dashed."
        plots.append(panel("loss along and beyond adaptation", lines, Frame(label, "adaptation step"), note))
    moved = curves_of(special.get("moved"))
    if moved:
        lines = [
            Line(c.steps, c.mean, c.half, ink=series(i), tag=str(i + 1)) for i, c in enumerate(moved.values())
        ]
        label = f"How far each part of the parameters of {run.name} moves"
        named = ", ".join(f"{i + 1} {name}" for i, name in enumerate(moved))
        frame = Frame(label, "adaptation step", auto_log=False)
        plots.append(panel("distance moved", lines, frame, escape(f"‖φₖ − φ₀‖ / ‖φ₀‖ of {named}.")))
    return plots
