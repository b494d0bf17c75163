"""A recipe in a run folder: train it, resume it."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax

import bilevel as bl
from bilevel.problem import IterativeSolver
from bilevel.recipes.config import find_recipe, first_difference, from_fields, to_fields
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.splits import validation_classes
from bilevel.sharding import make_devices
from bilevel.train.checkpoint import Checkpoints
from bilevel.train.early_stopping import EarlyStopping, Validation, stopped_at
from bilevel.train.loop import OnChunk


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
        # As a recipe: fields that this version has and that one had not are at their defaults there.
        there = {"recipe": saved["recipe"], "fields": _identity(saved_recipe(folder))}
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


def saved_validation(folder: Path) -> Validation:
    """How a run was started to be validated; never, for a run that says nothing of it."""
    return Validation(**read_config(folder).get("validation", {}))


def train_recipe(
    name: str,
    recipe: Any,
    folder: Path,
    resume: bool,
    command: str,
    validation: Validation | None = None,
    on_chunk: Sequence[OnChunk] = (),
    begin: Callable[[Experiment, bl.MetaState], bl.MetaState] | None = None,
) -> bl.MetaState:
    """Run a recipe's outer loop in a folder; the resolved configuration is saved beside it.

    Args:
        name: the recipe's name, or path/to/file.py:Name.
        command: what to type to repeat the run.
        validation: whether to validate on held-out classes on the way, and when to stop for it; on a resume
            as it was when left out, and nothing else.
        on_chunk: more callbacks of `bl.train`; they see the figures of the validation too.
        begin: where a new run starts, from the experiment and where it would start by itself. The state is
            the first checkpoint, written before anything else: a run killed at once goes on from it too.

    Raises:
        What `check_folder`, the recipe's `build` and `bl.train` raise; OSError when the folder cannot be
        written. Nothing is left behind by a run that could not be built.
    """
    check_folder(name, recipe, folder, resume)
    saved = saved_validation(folder) if resume else Validation()
    validation = validation or saved
    if resume and (difference := first_difference(asdict(saved), asdict(validation), "validation.")):
        raise ValueError(
            f"{folder} was started with another validation: {difference}; leave the flag out, or take "
            "another --folder"
        )
    options = getattr(recipe, "loop", None) or bl.Options()
    if options.devices > 1:
        make_devices(options.devices)  # before the first array is made
    experiment = recipe.build()
    state = first_state(experiment, recipe.seed)
    same = saved_fingerprint(folder) if resume else fingerprint(name, recipe)
    run = bl.Run(folder, same, resume or begin is not None, title=Path(name).name)
    watch = None
    if validation.every:
        watch = EarlyStopping(
            experiment.learner,
            validation_classes(experiment),
            replace(validation, num_steps=eval_steps(experiment, validation.num_steps)),
            run=run,
            task_chunk=options.task_chunk,
        )
    if not resume:
        folder.mkdir(parents=True, exist_ok=True)
        if begin is not None:
            state = begin(experiment, state)
            Checkpoints(folder / "checkpoints").save(int(state.step), state, same)
        config = {
            "recipe": name,
            "fields": to_fields(recipe),
            "validation": asdict(validation),
            "version": bl.__version__,
            "jax": jax.__version__,
            "command": command,
        }
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    elif watch is not None and stopped_early(folder):  # it stays as it is
        return Checkpoints(folder / "checkpoints").restore(state, run.fingerprint)[0]
    return bl.train(
        experiment.learner,
        experiment.optimizer,
        experiment.sample_tasks,
        state,
        recipe.num_meta_steps,
        options=options,
        run=run,
        on_chunk=[*([] if watch is None else [watch]), *on_chunk],
    )


def stopped_early(folder: Path) -> tuple[int, float] | None:
    """Step and figure of the best validation of a run that stopped for it; None for any other run."""
    validation = saved_validation(folder)
    step = Checkpoints(folder / "checkpoints").latest() if validation.patience else None
    return None if step is None else stopped_at(folder, validation, step)


def eval_steps(experiment: Experiment, num_steps: int | None = None) -> int | None:
    """Inner steps at evaluation; None for a solver that has none to set."""
    if not isinstance(experiment.learner.solver, IterativeSolver):
        return num_steps  # refused by name where it is set
    return experiment.eval_steps if num_steps is None else num_steps


def first_state(experiment: Experiment, seed: int) -> bl.MetaState:
    """Where the run begins, and the shape of its checkpoints."""
    return bl.init_state(
        experiment.learner, experiment.optimizer, experiment.sample_tasks, jax.random.key(seed)
    )


def fingerprint(name: str, recipe: Any) -> dict[str, Any]:
    """What must be equal for a checkpoint to be of this run."""
    return {"recipe": name, **_identity(recipe)}


def saved_fingerprint(folder: Path) -> dict[str, Any]:
    """The fingerprint of the run in a folder, also where its recipe has got new fields since."""
    saved = read_config(folder)
    return {"recipe": saved["recipe"], **_without_loop(saved["fields"])}


def _identity(recipe: Any) -> dict[str, Any]:
    """The fields that decide what is computed."""
    return _without_loop(to_fields(recipe))


def _without_loop(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "loop"}


def write_text(path: Path, text: str) -> None:
    """Write all of it or nothing, whenever the process dies."""
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(text)
    os.replace(draft, path)
