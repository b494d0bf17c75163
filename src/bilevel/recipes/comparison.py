"""Runs compared pairwise on the same test tasks."""

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from bilevel.errors import DAMAGED_ZIP
from bilevel.recipes.config import first_difference
from bilevel.recipes.evaluation import PER_TASK, Asked, Trained, describe_tasks, judge, read_trained
from bilevel.recipes.run import eval_steps, write_text
from bilevel.train.compare import Paired, paired, same_tasks, winner
from bilevel.train.intervals import interval


class Judged(NamedTuple):
    """A run on the tasks of the comparison.

    Args:
        name: how it is called there.
        figures: the last point of each query figure, `[num_tasks]`.
        sketch: of each task.
        tasks: what the sampler says of itself.
        num_steps: inner steps it took.
        stored: whether it was read from `per_task.npz`.
    """

    name: str
    figures: dict[str, np.ndarray]
    sketch: np.ndarray
    tasks: dict[str, Any]
    num_steps: int
    stored: bool


def compare_runs(
    folders: Sequence[Path],
    num_tasks: int | None = None,
    seed: int = 1,
    *,
    checkpoint: Literal["auto", "best", "newest"] = "auto",
    out: Path | None = None,
) -> dict[str, Any]:
    """Compare every two runs on the same tasks; writes compare.json and compare.md.

    What `bilevel eval` stored of each task is used where it is of these tasks and of this checkpoint;
    other runs are judged anew, and their folders are left as they are.

    Args:
        folders: two or more run folders.
        num_tasks: test tasks; the smallest number among the recipes when left out.
        seed: of the test tasks.
        checkpoint: which one of each run.
        out: folder to write to; the first run's when left out.

    Returns:
        What compare.json holds; `text` is the table with the verdicts, in Markdown.

    Raises:
        ValueError: for fewer than two runs, or when their test tasks are not the same, naming the difference.
        FileNotFoundError: for a folder that is no run, or has no checkpoint.
    """
    if len(folders) < 2:
        raise ValueError(f"expected two or more run folders to compare, got {len(folders)}")
    runs = [read_trained(Path(folder), checkpoint) for folder in folders]
    names = _names(folders)
    _refuse_other_tasks(names, [describe_tasks(run.experiment.sample_test) for run in runs])
    count = num_tasks or min(run.experiment.eval_tasks for run in runs)
    judged = [_judged(name, run, count, seed) for name, run in zip(names, runs, strict=True)]
    for other in judged[1:]:
        task = same_tasks(judged[0].sketch, other.sketch)
        if task is not None:
            raise ValueError(
                f"{judged[0].name} and {other.name} are not tested on the same tasks: task {task} differs "
                f"already, although both draw {_sampler(other.tasks)}; their data or the versions that drew "
                "them differ. Run `bilevel eval` on both again"
            )
    figure = "query_accuracy" if all("query_accuracy" in j.figures for j in judged) else "query_loss"
    pairs = {
        (a.name, b.name): paired(a.figures[figure], b.figures[figure])
        for a, b in itertools.combinations(judged, 2)
    }
    result = _as_json(judged, pairs, figure, seed)
    target = Path(folders[0]) if out is None else Path(out)
    target.mkdir(parents=True, exist_ok=True)
    write_text(target / "compare.json", json.dumps(result, indent=2) + "\n")
    write_text(target / "compare.md", result["text"] + "\n")
    return result


def _names(folders: Sequence[Path]) -> list[str]:
    """Short and unique."""
    last = [Path(folder).resolve().name for folder in folders]
    return [
        name if last.count(name) == 1 else str(folder)
        for name, folder in zip(last, folders, strict=True)
    ]  # fmt: skip


def _sampler(tasks: dict[str, Any]) -> str:
    return str(tasks["sampler"])


def _refuse_other_tasks(names: Sequence[str], tasks: Sequence[dict[str, Any]]) -> None:
    for name, other in zip(names[1:], tasks[1:], strict=True):
        # The shapes say it most plainly; the sampler's own words say the rest.
        for part in ("shapes", "sampler"):
            difference = first_difference({part: tasks[0][part]}, {part: other[part]})
            if difference:
                said = difference.replace(" there and ", f" for {names[0]} and ").removesuffix(" here")
                raise ValueError(
                    f"{names[0]} and {name} have different test tasks, so a difference would say nothing: "
                    f"{said} for {name}"
                )


def _judged(name: str, run: Trained, count: int, seed: int) -> Judged:
    steps = eval_steps(run.experiment)
    tasks = describe_tasks(run.experiment.sample_test)
    found = _stored(run, count, steps, seed)
    if found is not None:
        return Judged(name, tasks=tasks, stored=True, **found)
    result = judge(run, run.experiment.sample_test, Asked(count, steps, seed))
    figures = {n: values[:, -1] for n, values in result.per_task.items() if n.startswith("query_")}
    return Judged(name, figures, result.sketch, tasks, result.num_steps, stored=False)


def _stored(run: Trained, count: int, steps: int | None, seed: int) -> dict[str, Any] | None:
    """What `bilevel eval` kept of the first `count` tasks; None where it is of something else."""
    path = run.folder / PER_TASK
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (*DAMAGED_ZIP, OSError, ValueError):
        return None  # damaged: the run is judged anew
    about = {name: int(arrays.pop(name)) for name in ("seed", "meta_step", "num_steps")}
    wanted = {"seed": seed, "meta_step": run.meta_step}
    if steps is not None:
        wanted["num_steps"] = steps
    if len(arrays["sketch"]) < count or any(about[name] != value for name, value in wanted.items()):
        return None
    sketch = arrays.pop("sketch")[:count]
    arrays.pop("steps", None)  # of the points of the curves
    figures = {name: values[:count, -1] for name, values in arrays.items()}
    return {"figures": figures, "sketch": sketch, "num_steps": about["num_steps"]}


def _as_json(
    judged: Sequence[Judged], pairs: dict[tuple[str, str], Paired], figure: str, seed: int
) -> dict[str, Any]:
    said = figure.removeprefix("query_")
    rows = []
    for run in judged:
        mean, half = interval(run.figures[figure])
        rows.append(
            {"run": run.name, "mean": float(mean), "ci95": float(half), "num_steps": run.num_steps,
             "stored": run.stored}
        )  # fmt: skip
    verdicts = [winner(a, b, found, said) for (a, b), found in pairs.items()]
    return {
        "figure": figure,
        "num_tasks": len(judged[0].sketch),
        "seed": seed,
        "tasks": judged[0].tasks,
        "runs": rows,
        "pairs": [{"a": a, "b": b, **found.as_json()} for (a, b), found in pairs.items()],
        "verdicts": verdicts,
        "text": _table(rows, pairs, verdicts, said, len(judged[0].sketch)),
    }


def _table(
    rows: Sequence[dict[str, Any]],
    pairs: dict[tuple[str, str], Paired],
    verdicts: Sequence[str],
    figure: str,
    num_tasks: int,
) -> str:
    """Markdown: each run, each pair, and the verdicts."""
    scale, unit, digits = (100, " %", 2) if figure == "accuracy" else (1, "", 4)

    def plus_minus(mean: float, half: float, sign: str = "") -> str:
        width = f" ± {scale * half:.{digits}f}" if half else ""  # one test set has no interval
        return f"{scale * mean:{sign}.{digits}f}{width}"

    lines = [
        f"The same {num_tasks} test tasks, {figure} with 95% intervals.",
        "",
        f"| run | {figure} | steps |",
    ]
    lines.append("|---|---|---|")
    lines += [f"| {r['run']} | {plus_minus(r['mean'], r['ci95'])}{unit} | {r['num_steps']} |" for r in rows]
    lines += ["", "| pair | difference, paired t | bootstrap | had the tasks differed |", "|---|---|---|---|"]
    for (a, b), found in pairs.items():
        low, high = (scale * end for end in found.bootstrap)
        lines.append(
            f"| {a} − {b} | {plus_minus(found.difference, found.ci95, '+')} | "
            f"{low:+.{digits}f} to {high:+.{digits}f} | ± {scale * found.unpaired_ci95:.{digits}f} |"
        )
    if len(pairs) > 2:
        verdicts = [
            *verdicts,
            f"Of {len(pairs)} pairs one in twenty would be decided by chance alone if all runs were equal.",
        ]
    return "\n".join([*lines, "", *verdicts])
