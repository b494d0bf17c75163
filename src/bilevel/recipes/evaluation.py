"""Judge a run by the protocol: unseen classes, seen classes, shots, calibration, specialization."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import IterativeSolver, Meta
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.learned import learned, save_pictures
from bilevel.recipes.run import (
    eval_steps,
    first_state,
    read_config,
    saved_fingerprint,
    saved_recipe,
    write_text,
)
from bilevel.recipes.splits import Sampler, has_tasks, seen_classes, unseen, with_shots
from bilevel.train.along import along_adaptation, shown_steps, with_num_steps
from bilevel.train.checkpoint import Checkpoints
from bilevel.train.early_stopping import BEST
from bilevel.train.evaluate import Evaluation, evaluate
from bilevel.train.intervals import Curve, all_right, diverged, independent_difference, interval
from bilevel.train.specialization import specialization
from bilevel.train.transduction import in_words, transduction

PER_TASK = "per_task.npz"
_PICTURED_TASKS = 4
_FEW = 200  # tasks of what is shown beside the result, and costs more a task than it does


@dataclass(frozen=True)
class Trained:
    """A run read back.

    Args:
        folder: where it is.
        experiment: what its recipe builds.
        meta: of the checkpoint.
        meta_step: outer steps behind it.
        checkpoint: which one it is, in words.
        task_chunk: tasks side by side, as in training.
    """

    folder: Path
    experiment: Experiment
    meta: Meta
    meta_step: int
    checkpoint: str
    task_chunk: int


class Asked(NamedTuple):
    """What a run is judged by.

    Args:
        num_tasks: test tasks.
        num_steps: inner steps; None for a learner without.
        seed: of the test tasks.
        every: as in `evaluate`.
    """

    num_tasks: int
    num_steps: int | None
    seed: int
    every: int | None = None


def read_trained(folder: Path, checkpoint: Literal["auto", "best", "newest"] = "auto") -> Trained:
    """A run's experiment with its checkpoint: the best on validation classes where there is one.

    Raises:
        FileNotFoundError: when the folder is no run, or has no such checkpoint yet.
    """
    name = read_config(folder)["recipe"]
    recipe = saved_recipe(folder)
    best, newest = Checkpoints(folder / BEST), Checkpoints(folder / "checkpoints")
    if checkpoint == "best" and best.latest() is None:
        raise FileNotFoundError(
            f"{folder} has no best checkpoint: it was trained without --validation.every; "
            "leave --checkpoint out to take the newest"
        )
    chosen = newest if checkpoint == "newest" or best.latest() is None else best
    if chosen.latest() is None:
        raise FileNotFoundError(
            f"{folder} has no checkpoint yet; train it with `bilevel train {name} --folder {folder} --resume`"
        )
    experiment = recipe.build()
    state, step = chosen.restore(first_state(experiment, recipe.seed), saved_fingerprint(folder))
    words = "best on validation classes" if chosen is best else "newest"
    chunk = getattr(getattr(recipe, "loop", None), "task_chunk", 1)
    return Trained(folder, experiment, state.meta, step, words, chunk)


def evaluate_run(
    folder: Path,
    num_tasks: int | None = None,
    num_steps: int | None = None,
    seed: int = 1,
    *,
    every: int | None = None,
    shots: Sequence[int] = (),
    checkpoint: Literal["auto", "best", "newest"] = "auto",
) -> dict[str, Any]:
    """Judge a run on fresh test tasks; writes evaluation.json, per_task.npz and examples.npz.

    Args:
        num_tasks: test tasks; the recipe's own number when left out.
        num_steps: inner steps; the recipe's own number when left out.
        seed: of the test tasks.
        every: judge after each such number of inner steps; for about 20 points when left out.
        shots: support sizes to judge on as well.
        checkpoint: which one; the best on validation classes where the run has one.

    Returns:
        What evaluation.json holds.

    Raises:
        FileNotFoundError: when the folder is no run, or has no checkpoint yet.
        ValueError: for shots that the recipe's classes do not have, or `every` with a learner without steps.
    """
    run = read_trained(folder, checkpoint)
    experiment = run.experiment
    asked = Asked(
        experiment.eval_tasks if num_tasks is None else num_tasks,
        eval_steps(experiment, num_steps),
        seed,
        every,
    )
    other_shots = {str(n): with_shots(experiment, n) for n in shots}  # refused before the minutes, not after
    begin = time.perf_counter()
    new, why = unseen(experiment)
    main = judge(run, experiment.sample_test, asked)
    result = main.as_json() | {
        "meta_step": run.meta_step,
        "checkpoint": run.checkpoint,
        "seed": seed,
        "split": "SEEN" if new is False else "test",
        "unseen": why,
        "chance": experiment.chance,
        "protocol": experiment.protocol,
        "tasks": describe_tasks(experiment.sample_test),
        "pictures": experiment.pictures,
        "adapts": has_tasks(experiment),
    }
    result |= _beside(run, other_shots, asked)
    result |= _overfitting(run, main, asked)
    result["learned"] = learned(experiment, run.meta)
    result["notes"] = _notes(main)
    result["seconds"] = round(time.perf_counter() - begin, 2)
    write_text(folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
    save_per_task(folder / PER_TASK, run, main, seed)
    _save_examples(run, asked)
    save_pictures(folder, experiment, run.meta)
    return result


def judge(run: Trained, sample: Sampler, asked: Asked) -> Evaluation:
    """A run on the tasks of a sampler."""
    return evaluate(
        run.experiment.learner,
        run.meta,
        sample,
        jax.random.key(asked.seed),
        num_tasks=asked.num_tasks,
        num_steps=asked.num_steps,
        every=asked.every,
        task_chunk=run.task_chunk,
    )


def describe_tasks(sample: Sampler) -> dict[str, Any]:
    """What two samplers must share for their tasks to be the same: shapes, and the sampler in words."""
    shapes = jax.eval_shape(sample, jax.random.key(0))
    named = jax.tree_util.tree_leaves_with_path(shapes)
    return {
        "sampler": getattr(sample, "__name__", None) or re.sub(" at 0x[0-9a-f]+", "", repr(sample)),
        "shapes": {jax.tree_util.keystr(path).lstrip("."): list(leaf.shape) for path, leaf in named},
    }


def save_per_task(path: Path, run: Trained, result: Evaluation, seed: int) -> None:
    """What `bilevel compare` reads: the figures of each task, and which tasks they were."""
    kept = {
        name: values.astype(np.float32)
        for name, values in result.per_task.items()
        if name.startswith("query_")
    }
    about = {"seed": seed, "meta_step": run.meta_step, "num_steps": result.num_steps, "steps": result.steps}
    draft = path.with_name(f"{path.stem}.tmp.npz")  # savez adds the ending itself
    np.savez_compressed(draft, allow_pickle=False, sketch=result.sketch, **about, **kept)
    draft.replace(path)


def _beside(run: Trained, shots: dict[str, Sampler], asked: Asked) -> dict[str, Any]:
    """The same learner under other conditions, and the baseline without meta-learning."""
    experiment = run.experiment
    scratch = None
    if experiment.scratch is not None:
        # The baseline takes many steps a task; fewer tasks give it an interval that is narrow enough.
        scratch = evaluate(
            experiment.scratch,
            {},
            experiment.sample_test,
            jax.random.key(asked.seed),
            num_tasks=min(asked.num_tasks, _FEW),
        )

    def curves(sample: Sampler) -> dict[str, Any]:
        return judge(run, sample, asked).as_json()["curves"]

    return {
        "other_tests": {name: curves(sample) for name, sample in experiment.other_tests.items()},
        "shots": {name: curves(sample) for name, sample in shots.items()},
        "scratch": None if scratch is None else scratch.as_json()["curves"],
        "scratch_num_tasks": None if scratch is None else scratch.num_tasks,
    }


def _overfitting(run: Trained, main: Evaluation, asked: Asked) -> dict[str, Any]:
    """Seen against unseen classes, support against query, and how specialized the start is.

    With one data set nothing starts from what was learned, and the support may be corrupted on purpose or
    made up: these figures would say nothing.
    """
    key = jax.random.key(asked.seed)
    found: dict[str, Any] = {"seen": None, "gaps": {}, "specialization": None}
    name = "accuracy" if "query_accuracy" in main.per_task else "loss"
    adapts = has_tasks(run.experiment)
    if adapts and f"support_{name}" in main.per_task:
        gap = interval(main.per_task[f"support_{name}"] - main.per_task[f"query_{name}"])
        found["gaps"][f"support minus query {name}"] = _last(gap)
    sample = seen_classes(run.experiment)
    if sample is not None:
        seen = judge(run, sample, asked)
        found["seen"] = seen.as_json()["curves"]
        gap = independent_difference(seen.per_task[f"query_{name}"], main.per_task[f"query_{name}"])
        found["gaps"][f"seen minus unseen {name}"] = _last(gap)
    if adapts and isinstance(run.experiment.learner.solver, IterativeSolver) and main.num_steps > 0:
        found["specialization"] = specialization(
            run.experiment.learner,
            run.meta,
            run.experiment.sample_test,
            key,
            num_tasks=min(asked.num_tasks, _FEW),
            num_steps=main.num_steps,
            every=asked.every,
            task_chunk=run.task_chunk,
        ).as_json()
    change = transduction(run.experiment.learner, run.meta, run.experiment.sample_test, key)
    return found | {"batch_statistics": in_words(change), "transduction": change}


def _last(curve: Curve) -> dict[str, float]:
    return {"mean": float(curve.mean[-1]), "ci95": float(curve.ci95[-1])}


def _notes(result: Evaluation) -> list[str]:
    """What a reader must know before believing the headline."""
    accuracy = result.per_task.get("query_accuracy")
    said = (
        diverged(result.per_task["query_loss"], result.steps),
        None if accuracy is None else all_right(accuracy[:, -1]),
    )
    return [note for note in said if note is not None]


def _save_examples(run: Trained, asked: Asked) -> None:
    """A few test tasks with the model's answers along adaptation, for the report."""
    experiment, key = run.experiment, jax.random.key(asked.seed)
    learner = with_num_steps(experiment.learner, asked.num_steps)
    predict = learner.predict
    if experiment.pictures == "none" or predict is None:
        return
    keys = jax.random.split(jax.random.fold_in(key, 1), _PICTURED_TASKS)
    tasks = jax.vmap(experiment.sample_test)(keys)
    (support_x, support_y), (x, y) = tasks
    if experiment.pictures == "regression":  # in order, the query points trace the curve behind the task
        order = jnp.argsort(x[..., 0], axis=1)
        x, y = jnp.take_along_axis(x, order[..., None], 1), jnp.take_along_axis(y, order[..., None], 1)

    num_steps = learner.solver.num_steps if isinstance(learner.solver, IterativeSolver) else 0
    shown = shown_steps(num_steps, asked.every)

    def answers(meta, task, x, key):
        return along_adaptation(learner, meta, task, key, lambda params: predict(params, meta, x), shown)

    # [tasks, points, n, ...]
    found = jax.jit(jax.vmap(answers, (None, 0, 0, 0)))(run.meta, tasks, x, keys)
    arrays = {"support_x": support_x, "support_y": support_y}
    if experiment.pictures == "classification":
        odds = jax.nn.softmax(found)
        arrays |= {"query_x": x, "query_y": y, "before": odds[:, 0], "after": odds[:, -1]}
    else:
        arrays |= {
            "grid": x[..., 0],
            "truth": y[..., 0],
            "steps": found[..., 0].swapaxes(0, 1),
            "shown": shown,
        }
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    np.savez_compressed(run.folder / "examples.npz", allow_pickle=False, **arrays)
