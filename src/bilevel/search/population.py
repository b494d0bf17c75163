"""Population-based training: members that train side by side, and copy the better ones on their way.

    population.json   what it is; lineage.jsonl   who copied whom, when, with which values
    members/00 ...    run folders; the best of them in the end is the result

Every worker does whatever is due next: train a member of the current round, or, when all are trained,
end the round. Each step can be repeated after a kill at any moment and depends on nothing but seed and
files, so a population that was killed ends with the bytes of one that was not.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import jax

from bilevel.recipes.run import write_text
from bilevel.search.locks import locked, try_lock
from bilevel.search.population_member import (
    Member,
    copy_member,
    member_folder,
    read_member,
    train_member,
    write_config,
    write_member,
)
from bilevel.search.population_rules import decide, first_hyperparameters
from bilevel.search.population_spec import LINEAGE, Population, read_lineage, read_population
from bilevel.search.space import apply_values, drawn_values

_POLL = 0.2


def train_population(folder: Path, asked: Callable[[], bool] = lambda: False) -> None:
    """Do what is due in a population until it is complete, or a signal asks to leave.

    Any number of processes that share the folder may do this at once.

    Args:
        folder: where population.json is.
        asked: whether to leave after the member that is being trained.
    """
    folder = Path(folder)
    population = read_population(folder)
    _keep_programs(folder)
    while not asked():
        with locked(folder / "locks" / "round"):
            if advance(folder, population):
                return
            claim = _claim(folder, population)
        if claim is None:
            time.sleep(_POLL)
            continue
        number, lock = claim
        with lock:  # closing it gives the member back, and so does dying
            here = member_folder(folder, number)
            member = read_member(here)
            assert member is not None
            begin, until = member.round_number * population.interval, population.until(member.round_number)
            if train_member(here, begin, until, population.objective, population.validation_tasks) is None:
                return


def advance(folder: Path, population: Population) -> bool:
    """Begin the first round, or end one that is trained and begin the next; whether there is nothing left.

    Called under the lock. What a killed worker left half done is done again.
    """
    while True:
        rows = read_lineage(folder)
        current = len(rows) // population.members
        if current == population.rounds:
            return True
        members = [_prepared(folder, population, i, current, rows) for i in range(population.members)]
        if any(member.value is None for member in members):
            return False
        values = [float(member.value) for member in members if member.value is not None]
        if not any(map(math.isfinite, values)):
            return True  # `outcome` says so
        _end_round(folder, population, members, values, rows)


def _prepared(
    folder: Path, population: Population, number: int, current: int, rows: list[dict[str, Any]]
) -> Member:
    """A member at the beginning of the current round, or as far in it as it has come."""
    here = member_folder(folder, number)
    member = read_member(here)
    if member is not None and member.round_number == current:
        return member
    space, recipe = population.build_space(), population.build_recipe()

    def recipe_with(hyperparameters: Mapping[str, Any]) -> Any:
        return apply_values(recipe, drawn_values(space, hyperparameters))

    command = f"{population.command}  # member {number}"
    if current == 0:
        held = first_hyperparameters(space, population.members, population.rules)[number]
        write_config(here, population.recipe, recipe_with(held), command)
    else:
        row = rows[(current - 1) * population.members + number]
        held = row["next"]
        if row["copied_from"] is not None:
            donor = member_folder(folder, row["copied_from"])
            copy_member(donor, here, row["step"], population.recipe, recipe_with(held), command)
    write_member(here, Member(current, held))
    return Member(current, held)


def _end_round(
    folder: Path,
    population: Population,
    members: list[Member],
    values: list[float],
    rows: list[dict[str, Any]],
) -> None:
    """Decide who copies whom, and write it down: from then on it is so."""
    current = members[0].round_number
    held = [member.hyperparameters for member in members]
    decisions = decide(population.build_space(), held, values, population.maximize, current, population.rules)
    last = current == population.rounds - 1
    for number, (member, made) in enumerate(zip(members, decisions, strict=True)):
        rows.append({
            "round": current,
            "step": population.until(current),
            "member": number,
            "value": member.value if member.value is not None and math.isfinite(member.value) else None,
            "hyperparameters": member.hyperparameters,
            "error": member.error,
            "copied_from": None if last else made.copied_from,
            "explored": {} if last else {name: list(pair) for name, pair in made.explored.items()},
            "next": None if last else made.hyperparameters,
        })  # fmt: skip
    write_text(folder / LINEAGE, "".join(json.dumps(row) + "\n" for row in rows))


def _claim(folder: Path, population: Population) -> tuple[int, IO[bytes]] | None:
    """A member that is to be trained and that no living worker trains, with the lock on it."""
    for number in range(population.members):
        member = read_member(member_folder(folder, number))
        if member is None or member.value is not None:
            continue
        lock = try_lock(folder / "locks" / f"member-{number:02d}")
        if lock is None:
            continue
        # It may have been finished between the first look and the lock.
        member = read_member(member_folder(folder, number))
        if member is not None and member.value is None:
            return number, lock
        lock.close()
    return None


def _keep_programs(folder: Path) -> None:
    """Let a member that goes on unchanged find the compiled program of its last round."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", str(folder / ".programs" / platform.node()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
