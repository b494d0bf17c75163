"""A recipe in a run folder: train it, resume it, evaluate it."""

import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
from bilevel.problem import Key, Meta
from bilevel.recipes.config import find_recipe, first_difference, from_fields, to_fields
from bilevel.recipes.experiment import Experiment
from bilevel.train.checkpoint import Checkpoints
from bilevel.train.evaluate import along_adaptation, with_num_steps

_PICTURED_TASKS = 4


def check_folder(name: str, recipe: Any, folder: Path, resume: bool) -> None:
    """Refuse a folder that this run may not write to, before any work is done.

    Raises:
        FileExistsError: when something is there already and `resume` is not set.
        FileNotFoundError: when no run is there and it is.
        ValueError: when the run there is of another recipe or configuration.
    """
    if resume:
        saved = read_config(folder)
        here = {"recipe": name, "fields": _identity(recipe)}
        there = {"recipe": saved["recipe"], "fields": _without_loop(saved["fields"])}
        if difference := first_difference(there, here):
            raise ValueError(
                f"{folder} holds another run: {difference}; leave the flag out, or take another --folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} is in use already; go on with --resume, take another --folder, or remove it"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a run.

    Raises:
        FileNotFoundError: when the folder is no run.
        ValueError: when its config.json is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} is no run folder: it has no config.json; make one with `bilevel train RECIPE`"
        )
    try:
        config = json.loads(path.read_text())
        if missing := {"recipe", "fields"} - set(config):
            raise ValueError(f"no {min(missing)}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); train again in another --folder") from error
    return config


def saved_recipe(folder: Path) -> Any:
    """The recipe of a run, with the fields it was started with."""
    config = read_config(folder)
    return from_fields(find_recipe(config["recipe"]), config["fields"])


def train_recipe(name: str, recipe: Any, folder: Path, resume: bool, command: str) -> bl.MetaState:
    """Run a recipe's outer loop in a folder; the resolved configuration is saved beside it.

    Args:
        name: the recipe's name, or path/to/file.py:Name.
        command: what to type to repeat the run.

    Raises:
        What `check_folder`, the recipe's `build` and `bl.train` raise; OSError when the folder cannot be
        written. Nothing is left behind by a run that could not be built.
    """
    check_folder(name, recipe, folder, resume)
    experiment = recipe.build()
    state = _first_state(experiment, recipe.seed)
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "recipe": name,
            "fields": to_fields(recipe),
            "version": bl.__version__,
            "jax": jax.__version__,
            "command": command,
        }
        _write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return bl.train(
        experiment.learner,
        experiment.optimizer,
        experiment.sample_tasks,
        state,
        recipe.num_meta_steps,
        options=getattr(recipe, "loop", None),
        run=bl.Run(folder, _fingerprint(name, recipe), resume, title=Path(name).name),
    )


def evaluate_run(
    folder: Path, num_tasks: int | None = None, num_steps: int | None = None, seed: int = 1
) -> dict[str, Any]:
    """Judge a run's newest checkpoint on fresh test tasks; writes evaluation.json and examples.npz.

    Args:
        num_tasks: test tasks; the recipe's own number when left out.
        num_steps: inner steps; the recipe's own number when left out.
        seed: of the test tasks.

    Returns:
        What evaluation.json holds.

    Raises:
        FileNotFoundError: when the folder is no run, or has no checkpoint yet.
    """
    name = read_config(folder)["recipe"]
    recipe = saved_recipe(folder)
    checkpoints = Checkpoints(folder / "checkpoints")
    if checkpoints.latest() is None:
        raise FileNotFoundError(
            f"{folder} has no checkpoint yet; train it with `bilevel train {name} --folder {folder} --resume`"
        )
    experiment = recipe.build()
    state = _first_state(experiment, recipe.seed)
    state, step = checkpoints.restore(state, _fingerprint(name, recipe))
    begin = time.perf_counter()
    key = jax.random.key(seed)
    count = experiment.eval_tasks if num_tasks is None else num_tasks
    steps = experiment.eval_steps if num_steps is None else num_steps
    sample = experiment.sample_test
    result = bl.evaluate(
        experiment.learner, state.meta, sample, key, num_tasks=count, num_steps=steps
    ).as_json()
    scratch = None
    if experiment.scratch is not None:
        # The baseline takes many steps a task; fewer tasks give it an interval that is narrow enough.
        few = min(count, 200)
        scratch = bl.evaluate(experiment.scratch, {}, sample, key, num_tasks=few).as_json()
    others = {
        name: bl.evaluate(
            experiment.learner, state.meta, other, key, num_tasks=count, num_steps=steps
        ).as_json()["curves"]
        for name, other in experiment.other_tests.items()
    }
    result |= {
        "seconds": round(time.perf_counter() - begin, 2),
        "meta_step": step,
        "seed": seed,
        "split": "test",
        "chance": experiment.chance,
        "protocol": experiment.protocol,
        "other_tests": others,
        "scratch": None if scratch is None else scratch["curves"],
        "scratch_num_tasks": None if scratch is None else scratch["num_tasks"],
    }
    _write(folder / "evaluation.json", json.dumps(result, indent=2) + "\n")
    _save_examples(folder, experiment, state.meta, steps, key)
    return result


def _first_state(experiment: Experiment, seed: int) -> bl.MetaState:
    return bl.init_state(
        experiment.learner, experiment.optimizer, experiment.sample_tasks, jax.random.key(seed)
    )


def _fingerprint(name: str, recipe: Any) -> dict[str, Any]:
    return {"recipe": name, **_identity(recipe)}


def _identity(recipe: Any) -> dict[str, Any]:
    """The fields that decide what is computed."""
    return _without_loop(to_fields(recipe))


def _without_loop(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "loop"}


def _write(path: Path, text: str) -> None:
    """All of it or nothing, whenever the process dies."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    os.replace(draft, path)


def _save_examples(folder: Path, experiment: Experiment, meta: Meta, steps: int, key: Key) -> None:
    """A few test tasks with the model's answers along adaptation, for the report."""
    learner = with_num_steps(experiment.learner, steps)
    predict = learner.predict
    if experiment.pictures == "none" or predict is None:
        return
    keys = jax.random.split(jax.random.fold_in(key, 1), _PICTURED_TASKS)
    tasks = jax.vmap(experiment.sample_test)(keys)
    (support_x, support_y), (x, y) = tasks
    if experiment.pictures == "regression":  # in order, the query points trace the curve behind the task
        order = jnp.argsort(x[..., 0], axis=1)
        x, y = jnp.take_along_axis(x, order[..., None], 1), jnp.take_along_axis(y, order[..., None], 1)

    def answers(meta, task, x, key):
        return along_adaptation(learner, meta, task, key, lambda params: predict(params, meta, x))

    found = jax.jit(jax.vmap(answers, (None, 0, 0, 0)))(meta, tasks, x, keys)  # [tasks, steps + 1, n, ...]
    arrays = {"support_x": support_x, "support_y": support_y}
    if experiment.pictures == "classification":
        odds = jax.nn.softmax(found)
        arrays |= {"query_x": x, "query_y": y, "before": odds[:, 0], "after": odds[:, -1]}
    else:
        arrays |= {"grid": x[..., 0], "truth": y[..., 0], "steps": found[..., 0].swapaxes(0, 1)}
    arrays = {name: np.asarray(array) for name, array in arrays.items()}
    np.savez_compressed(folder / "examples.npz", allow_pickle=False, **arrays)
