"""Reading run folders. Whatever is missing or damaged becomes a note, never a crash."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bilevel.errors import DAMAGED_ZIP

MARKS = ("config.json", "metrics.jsonl", "evaluation.json")  # one of them makes a run folder


class Note(NamedTuple):
    """Something the reader should know, and the command that would mend it (or "")."""

    text: str
    command: str = ""


class Curve(NamedTuple):
    """A figure against adaptation steps: mean over tasks, 95% half-width, and the steps; all `[points]`."""

    mean: np.ndarray
    half: np.ndarray
    steps: np.ndarray


@dataclass(frozen=True)
class Run:
    """One run folder, read.

    Args:
        folder: where it lies, as the caller spelled it.
        name: a short name, unique on the page.
        config: `config.json`, or `{}`.
        metrics: columns of `metrics.jsonl`, each `[points]`, sorted by step; absent values are NaN.
        evaluation: `evaluation.json`, or `{}`.
        curves: its curves of the meta-learned start, by name.
        scratch: its curves of a random start, by name.
        examples: arrays of `examples.npz`, or `{}`.
        notes: what is missing or damaged.
    """

    folder: Path
    name: str
    config: dict[str, Any]
    metrics: dict[str, np.ndarray]
    evaluation: dict[str, Any]
    curves: dict[str, Curve]
    scratch: dict[str, Curve]
    examples: dict[str, np.ndarray]
    notes: tuple[Note, ...]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read every folder, giving each a name that is unique among them.

    Raises:
        FileNotFoundError: where one does not exist or is no run folder.
    """
    names: list[str] = []
    for folder in folders:
        full = folder.absolute()
        same = [other for other in folders if other.absolute().name == full.name]
        name = full.name if len(same) == 1 else f"{full.parent.name}/{full.name}"
        names.append(f"{name} ({len(names) + 1})" if name in names else name)
    return [_read(folder, name) for folder, name in zip(folders, names, strict=True)]


def number(value: Any) -> float:
    """A float, or NaN for whatever is not one.

    >>> number("1.5"), number(None)
    (1.5, nan)
    """
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _read(folder: Path, name: str) -> Run:
    if not any((folder / mark).is_file() for mark in MARKS):
        why = "holds none of " + ", ".join(MARKS) if folder.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"expected a run folder, got {folder}, which {why}; make one with `bilevel train RECIPE`"
        )
    evaluate = f"bilevel eval {shlex.quote(str(folder))}"
    notes: list[Note] = []
    config = _read_json(folder / "config.json", notes, "bilevel train RECIPE")
    metrics = _read_metrics(folder / "metrics.jsonl", notes)
    evaluation = _read_json(folder / "evaluation.json", notes, evaluate)
    curves = curves_of(evaluation.get("curves"))
    drawn_without = evaluation.get("pictures") == "none"  # the recipe has no example tasks to draw
    if evaluation and not curves:
        notes.append(Note("evaluation.json holds no readable curves.", evaluate))
    return Run(
        folder=folder,
        name=name,
        config=config,
        metrics=metrics,
        evaluation=evaluation,
        curves=curves,
        scratch=curves_of(evaluation.get("scratch")),
        examples={} if drawn_without else _read_examples(folder / "examples.npz", notes, evaluate),
        notes=tuple(notes),
    )


def _read_json(path: Path, notes: list[Note], command: str) -> dict[str, Any]:
    if not path.is_file():
        notes.append(Note(f"{path.name} is missing.", command))
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        notes.append(Note(f"{path.name} is not readable JSON ({error}).", command))
        return {}
    if not isinstance(found, dict):
        kind = type(found).__name__
        notes.append(Note(f"{path.name} should hold an object, got {kind}.", command))
        return {}
    return found


def _read_metrics(path: Path, notes: list[Note]) -> dict[str, np.ndarray]:
    if not path.is_file():
        why = f"{path.name} is missing, so there are no curves of meta-training."
        notes.append(Note(why, "bilevel train RECIPE"))
        return {}
    # A resumed run logs some steps again: the later line is the one that counts.
    points: dict[float, dict[str, Any]] = {}
    skipped = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            point = json.loads(line)
        except (ValueError, RecursionError):
            point = None
        step = number(point.get("step")) if isinstance(point, dict) else math.nan
        if isinstance(point, dict) and math.isfinite(step):
            points[step] = point
        else:
            skipped += 1
    if skipped:
        lines = "1 unreadable line" if skipped == 1 else f"{skipped} unreadable lines"
        notes.append(Note(f"Skipped {lines} of {path.name} (a run cut short leaves half a line)."))
    if not points:
        notes.append(Note(f"{path.name} holds no points yet."))
    rows = [points[step] for step in sorted(points)]
    columns = sorted({key for row in rows for key in row})
    return {key: np.array([number(row.get(key)) for row in rows]) for key in columns}


def curves_of(found: Any) -> dict[str, Curve]:
    """The curves in a part of evaluation.json; what is none is left out."""
    curves = {}
    for name, parts in found.items() if isinstance(found, dict) else ():
        mean = parts.get("mean") if isinstance(parts, dict) else None
        if not isinstance(mean, list) or not mean:
            continue
        half = parts.get("ci95")
        half = half if isinstance(half, list) and len(half) == len(mean) else [None] * len(mean)
        curves[name] = Curve(
            np.array([number(value) for value in mean]),
            np.array([number(value) for value in half]),
            _steps(parts.get("steps"), len(mean)),
        )
    return curves


def _steps(found: Any, points: int) -> np.ndarray:
    """The step of each point; where the file does not say, as older ones do not, there is one for each."""
    steps = np.array([number(value) for value in found]) if isinstance(found, list) else np.zeros(0)
    if len(steps) != points or not (np.isfinite(steps).all() and (np.diff(steps) > 0).all()):
        return np.arange(points)
    return steps.astype(int)


def _read_examples(path: Path, notes: list[Note], command: str) -> dict[str, np.ndarray]:
    if not path.is_file():
        notes.append(Note(f"{path.name} is missing, so there are no example tasks.", command))
        return {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            examples = {key: arrays[key] for key in arrays.files}
    except (*DAMAGED_ZIP, OSError, ValueError, AttributeError) as error:
        notes.append(Note(f"{path.name} is not readable ({type(error).__name__}).", command))
        return {}
    wrong = _wrong_shapes(examples)
    if wrong:
        notes.append(Note(f"{path.name} cannot be drawn: {wrong}.", command))
        return {}
    return examples


def _wrong_shapes(examples: dict[str, np.ndarray]) -> str:
    """Why the arrays are neither kind of examples the report draws, or ""."""
    shapes = {key: array.shape for key, array in examples.items()}
    if any(array.dtype.kind not in "biuf" for array in examples.values()):
        return "expected arrays of numbers"
    if {"support_x", "support_y", "query_x", "query_y", "before", "after"} <= shapes.keys():
        support, query = shapes["support_x"], shapes["query_x"]
        good = (
            len(support) == len(query) == 5
            and shapes["support_y"] == support[:2]
            and shapes["query_y"] == query[:2]
            and shapes["before"] == shapes["after"]
            and len(shapes["after"]) == 3
            and shapes["after"][:2] == query[:2]
            and support[0] == query[0]
            and 0 not in (*support, *query, *shapes["after"])
        )
        return "" if good else f"classification arrays do not fit together, got {shapes}"
    if {"support_x", "support_y", "grid", "steps"} <= shapes.keys():
        steps, support = shapes["steps"], shapes["support_x"]
        good = (
            len(steps) == 3
            and shapes["grid"] == steps[1:]
            and len(support) == 3
            and support[0] == steps[1]
            and support[2] == 1
            and shapes["support_y"] == support
            and shapes.get("truth", steps[1:]) == steps[1:]
            and shapes.get("shown", steps[:1]) == steps[:1]
            and 0 not in (*steps, *support)
        )
        return "" if good else f"regression arrays do not fit together, got {shapes}"
    return f"expected classification or regression arrays, got {sorted(shapes)}"
