"""One member of a population: an ordinary run folder that is trained a round at a time, and copied.

members/03/config.json, checkpoints/, metrics.jsonl   as `bilevel train` leaves them
members/03/member.json                                which round it is in, with what, what it reached
members/03/train.log                                  what training printed
"""

import contextlib
import json
import math
import os
import shutil
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import bilevel as bl
from bilevel.recipes.config import to_fields
from bilevel.recipes.run import (
    eval_steps,
    fingerprint,
    first_state,
    saved_fingerprint,
    saved_recipe,
    write_text,
)
from bilevel.recipes.splits import validation_classes
from bilevel.sharding import make_devices
from bilevel.train.checkpoint import MANIFEST, Checkpoints
from bilevel.train.metrics import read_metrics

FILE = "member.json"
VALIDATION = "validation_"
_JUDGED = 4  # the value of a round is the mean over its last quarter


@dataclass(frozen=True)
class Member:
    """Where a member is.

    Args:
        round_number: the round it is in, from 0.
        hyperparameters: of this round, as they were drawn.
        value: what it reached in it; None while it trains, NaN where it failed.
        error: why it failed, or "".
    """

    round_number: int
    hyperparameters: dict[str, Any]
    value: float | None = None
    error: str = ""


def member_folder(folder: Path, number: int) -> Path:
    """Where a member is kept.

    >>> member_folder(Path("population"), 3).as_posix()
    'population/members/03'
    """
    return Path(folder) / "members" / f"{number:02d}"


def read_member(folder: Path) -> Member | None:
    """What member.json says; None for a member that has not begun."""
    path = folder / FILE
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["value"] is None and found["error"]:
        found["value"] = math.nan  # JSON has none
    return Member(**found)


def write_member(folder: Path, member: Member) -> None:
    """All of it or nothing."""
    found = asdict(member)
    if member.value is not None and not math.isfinite(member.value):
        found["value"] = None
    write_text(folder / FILE, json.dumps(found) + "\n")


def write_config(folder: Path, name: str, recipe: Any, command: str) -> None:
    """Make a folder the run folder of a recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "recipe": name,
        "fields": to_fields(recipe),
        "validation": {},
        "version": bl.__version__,
        "jax": jax.__version__,
        "command": command,
    }
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")


def train_member(
    folder: Path, begin: int, until: int, objective: str, validation_tasks: int
) -> Member | None:
    """Train a member to the end of its round and judge it; what it was interrupted in goes on.

    Args:
        folder: of the member.
        begin, until: outer steps at which its round begins and ends.
        objective: a column of the metrics, averaged over the last quarter of the round, or
            `validation_<figure>`, on validation tasks that are the same for all members and rounds.

    Returns:
        The member with its value, which is in its folder too; None when Ctrl-C or SIGTERM ended it, a
        checkpoint saved. Whatever training raises is the member's error, and its value NaN.
    """
    member = read_member(folder)
    assert member is not None
    try:
        with (folder / "train.log").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            value = _trained(folder, begin, until, objective, validation_tasks)
    except Exception as error:  # one member that fails does not end the others
        with (folder / "train.log").open("a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        message = " ".join(str(error).split())
        member = replace(member, value=math.nan, error=f"{type(error).__name__}: {message}")
    else:
        if value is None:
            return None
        problem = "" if math.isfinite(value) else f"{objective} is not finite"
        member = replace(member, value=value, error=problem)
    write_member(folder, member)
    return member


def _trained(folder: Path, begin: int, until: int, objective: str, validation_tasks: int) -> float | None:
    recipe = saved_recipe(folder)
    options = getattr(recipe, "loop", None) or bl.Options()
    if options.devices > 1:
        make_devices(options.devices)
    experiment = recipe.build()
    same = saved_fingerprint(folder)
    state = first_state(experiment, recipe.seed)
    resume = begin > 0 or Checkpoints(folder / "checkpoints").latest() is not None
    # Short enough that the last quarter of a round is whole chunks.
    chunk = min(options.chunk_size, max(1, (until - begin) // _JUDGED))
    state = bl.train(
        experiment.learner,
        experiment.optimizer,
        experiment.sample_tasks,
        state,
        until,  # schedules follow from the recipe's num_meta_steps, which all rounds share
        options=replace(options, chunk_size=chunk),
        run=bl.Run(folder, same, resume, title=folder.name),
    )
    if int(state.step) < until:
        return None
    if objective.startswith(VALIDATION):
        figures = bl.evaluate(
            experiment.learner,
            state.meta,
            validation_classes(experiment),
            jax.random.key(recipe.seed),
            num_tasks=validation_tasks,
            num_steps=eval_steps(experiment),
            task_chunk=options.task_chunk,
        ).curves
        name = f"query_{objective.removeprefix(VALIDATION)}"
        return float(_named(figures, name, objective).mean[-1])
    rows = read_metrics(folder / "metrics.jsonl")
    last = [row for row in rows if until - max(1, (until - begin) // _JUDGED) < row["step"] <= until]
    values = [_named(row, objective, objective) for row in last]
    return float(np.mean([math.nan if value is None else value for value in values]))


def _named(figures: Mapping[str, Any], name: str, said: str) -> Any:
    """A figure; a problem that gives the query loss no name of its own calls it the outer loss."""
    if name == "query_loss" and name not in figures:
        name = "outer_loss"
    if name not in figures:
        there = ", ".join(key for key in figures if not key.endswith("_ci95"))
        raise ValueError(f"there is no figure {said} to judge by; there are {there}")
    return figures[name]


def copy_member(donor: Path, target: Path, step: int, name: str, recipe: Any, command: str) -> None:
    """Make a member the run of another one, continued with other hyperparameters.

    Its state, metrics and TensorBoard files are the donor's: the folder holds the run that its parameters
    have behind them. Safe to repeat after a kill at any moment: the donor's checkpoint stays as it is until
    all copies of a round are made.

    Args:
        donor, target: folders of members.
        step: of the checkpoint.
        name, recipe: with the hyperparameters of the target from now on.
        command: kept in its config.json.
    """
    _copy_checkpoint(donor / "checkpoints", target / "checkpoints", step, fingerprint(name, recipe))
    for file in ("metrics.jsonl", "metrics.csv"):
        draft = target / f"{file}.unfinished"
        shutil.copyfile(donor / file, draft)
        os.replace(draft, target / file)
    if (donor / "tensorboard").is_dir():
        shutil.rmtree(target / "tensorboard", ignore_errors=True)
        shutil.copytree(donor / "tensorboard", target / "tensorboard")
    write_config(target, name, recipe, command)


def _copy_checkpoint(source: Path, target: Path, step: int, same: dict[str, Any]) -> None:
    """A checkpoint under another fingerprint; the manifest comes last, and makes it complete."""
    there, here = source / f"{step:08d}", target / f"{step:08d}"
    manifest = json.loads((there / MANIFEST).read_text(encoding="utf-8"))
    here.mkdir(parents=True, exist_ok=True)
    parts = {Path(name).parts[0] for name in manifest["files"]}
    for part in parts:
        shutil.rmtree(here / part, ignore_errors=True)
        shutil.copytree(there / part, here / part)
    write_text(here / MANIFEST, json.dumps(manifest | {"fingerprint": json.loads(json.dumps(same))}))
    for other in target.iterdir():  # they are of another run
        if other != here:
            shutil.rmtree(other, ignore_errors=True)
    for other in here.iterdir():
        if other.name not in parts and other.name != MANIFEST:
            shutil.rmtree(other, ignore_errors=True)
