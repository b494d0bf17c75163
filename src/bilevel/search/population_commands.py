"""`bilevel search RECIPE --method pbt`: flags to a population in a folder, run to its end, resumed."""

import contextlib
import dataclasses
import json
import math
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from bilevel.recipes.config import find_recipe, first_difference, to_fields
from bilevel.search.flags import absolute, parse, split_space, value_of
from bilevel.search.local import LocalLauncher
from bilevel.search.locks import try_lock
from bilevel.search.population_member import VALIDATION, member_folder
from bilevel.search.population_rules import ranking
from bilevel.search.population_spec import (
    FILE,
    Population,
    check_space,
    outcome,
    read_lineage,
    read_population,
    write_population,
)
from bilevel.search.ray_workers import RayLauncher
from bilevel.search.signals import terminable

_USAGE = """\
usage: bilevel search RECIPE --method pbt --space.FIELD SPEC [--space.FIELD SPEC ...] [flags]
       bilevel search RECIPE --method pbt --folder FOLDER --resume

All flags of `bilevel train RECIPE` hold for every member; `bilevel search --help` says what SPEC is.
"""
_INTERRUPTED = 130
_ROUNDS = 10  # where --interval is left out
_POLL = 0.5


@dataclasses.dataclass(frozen=True)
class PopulationFlags:
    """The flags of a population; None is the default, or what a resumed one has."""

    population: int | None = None
    """Members; 8."""
    interval: int | None = None
    """Outer steps of a round, after which worse members copy better ones; a tenth of --num-meta-steps."""
    objective: str | None = None
    """A column of the metrics, over the last quarter of a round, or validation_loss; query_loss."""
    direction: Literal["minimize", "maximize"] | None = None
    """From the objective's name when left out: losses down, accuracies up."""
    quantile: float | None = None
    """Share of the members that copy, and that are copied; 0.25."""
    resample: float | None = None
    """Chance that a copied hyperparameter is drawn anew and not perturbed; 0.25."""
    factors: tuple[float, ...] | None = None
    """By one of which it is multiplied else; 0.8 1.2."""
    validation_tasks: int | None = None
    """That validation_loss is a mean over; 200."""
    launcher: Literal["local", "ray"] = "local"
    """Where the workers run."""
    address: str | None = None
    """Of a Ray cluster; one on this machine is started when left out."""
    workers: int = 1
    """How many members train at once."""


def run_population(words: list[str]) -> int:
    """Run `bilevel search RECIPE --method pbt ...`; returns the exit status.

    Args:
        words: all after `search`; `--method pbt` may be among them or not.

    Raises:
        ValueError, TypeError, OSError, ImportError: what the user can mend, in one line each.
    """
    words = _without_method(words)
    if not words or words[0].startswith("-"):
        print(_USAGE, end="")
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    name, rest = words[0], words[1:]
    specs, rest = split_space(rest)
    folder = Path(value_of(rest, "--folder") or Path("runs") / f"population-{name.rpartition(':')[2]}")
    saved = read_population(folder) if "--resume" in rest else None
    parsed = _parse(name, saved, folder, rest)
    command = shlex.join(["bilevel", "search", name, "--method", "pbt", *words[1:]])
    population = _make(name, parsed, specs, saved, command)
    _check_folder(folder, population, saved)
    if saved is None:
        check_space(population)
    again = shlex.join(["bilevel", "search", name, "--method", "pbt", "--folder", str(folder), "--resume"])
    return _run(population, folder, parsed.flags, again)


def _without_method(words: list[str]) -> list[str]:
    """The words without `--method pbt`.

    >>> _without_method(["maml-sinusoid", "--method", "pbt", "--seed", "3", "--method=pbt"])
    ['maml-sinusoid', '--seed', '3']
    """
    kept, left = [], iter(words)
    for word in left:
        if word == "--method":
            next(left, None)
        elif not word.startswith("--method="):
            kept.append(word)
    return kept


def _parse(name: str, saved: Population | None, folder: Path, words: list[str]) -> Any:
    """All flags: the recipe's fields, the population's, and where it is kept."""
    cls = find_recipe(name)
    if saved is not None and saved.recipe != absolute(name):
        raise ValueError(
            f"{folder} holds a population of {saved.recipe}, not of {name}; take another --folder"
        )
    own = {f.name for f in dataclasses.fields(PopulationFlags)} | {"folder", "resume", "space", "method"}
    if clash := sorted(own & {f.name for f in dataclasses.fields(cls)}):
        raise ValueError(f"{name} has a field {clash[0]}, which is a flag of the search; rename the field")
    recipe = cls() if saved is None else saved.build_recipe()
    help_folder, help_resume = "Where the population is kept.", "Go on with the population there."
    fields: list[Any] = [
        ("recipe", Annotated[cls, tyro.conf.arg(name="")], dataclasses.field(default=recipe)),
        (
            "flags",
            Annotated[PopulationFlags, tyro.conf.arg(name="")],
            dataclasses.field(default=PopulationFlags()),
        ),
        ("folder", Annotated[Path, tyro.conf.arg(help=help_folder)], dataclasses.field(default=folder)),
        ("resume", Annotated[bool, tyro.conf.arg(help=help_resume)], dataclasses.field(default=False)),
    ]
    made = dataclasses.make_dataclass("Population", fields, frozen=True)
    return parse(f"bilevel search {name} --method pbt", made, words, _USAGE)


def _make(
    name: str, parsed: Any, specs: dict[str, str], saved: Population | None, command: str
) -> Population:
    """The population that the flags describe; what they leave out is as it was, or the default."""
    flags, recipe = parsed.flags, parsed.recipe
    base = dataclasses.asdict(saved) if saved is not None else {}
    if flags.workers < 1:
        raise ValueError(f"--workers must be at least 1, got {flags.workers}")
    if flags.address and flags.launcher != "ray":
        raise ValueError(f"--address {flags.address} is of a Ray cluster; add --launcher ray")

    def given(flag: str, usual: Any) -> Any:
        value = getattr(flags, flag.replace("members", "population"))
        return base.get(flag, usual) if value is None else value

    objective = given("objective", "query_loss")
    direction = flags.direction or (base.get("direction") if flags.objective is None else None)
    return Population(
        recipe=absolute(name),
        fields=to_fields(recipe),
        # In the old order where it is the same: the lineage is written in it.
        space=base["space"] if base and specs in ({}, base["space"]) else specs,
        members=given("members", 8),
        interval=given("interval", max(1, recipe.num_meta_steps // _ROUNDS)),
        objective=objective,
        direction=direction or _direction(objective),
        quantile=given("quantile", 0.25),
        resample=given("resample", 0.25),
        factors=tuple(given("factors", (0.8, 1.2))),
        seed=recipe.seed,
        validation_tasks=given("validation_tasks", 200),
        command=base.get("command", command),
    )


def _direction(objective: str) -> str:
    """What a figure's name means.

    >>> _direction("validation_accuracy"), _direction("query_loss")
    ('maximize', 'minimize')
    """
    words = set(objective.removeprefix(VALIDATION).lower().split("_"))
    if words & {"accuracy", "f1", "auc", "reward"}:
        return "maximize"
    if words & {"loss", "error", "mse", "residual"}:
        return "minimize"
    raise ValueError(f"is {objective} to be small or large? add --direction minimize or maximize")


def _check_folder(folder: Path, population: Population, saved: Population | None) -> None:
    """Refuse a folder that this population may not write to."""
    if saved is not None:
        there, here = (json.loads(json.dumps(dataclasses.asdict(p))) for p in (saved, population))
        for each in (there, here):
            each["fields"].pop("loop", None)
        if difference := first_difference(there, here):
            raise ValueError(
                f"{folder} holds another population: {difference}; leave the flag out, or take another "
                "--folder"
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "go on with --resume" if (folder / FILE).is_file() else "remove it"
        raise FileExistsError(f"{folder} is in use already; {what}, or take another --folder")


def _run(population: Population, folder: Path, flags: PopulationFlags, again: str) -> int:
    launcher = LocalLauncher() if flags.launcher == "local" else RayLauncher(flags.address)
    lock = try_lock(folder / "locks" / "driver")
    if lock is None:
        raise ValueError(f"another `bilevel search` works on {folder}; wait for it, or stop it")
    with lock:
        write_population(folder, population)
        print(
            f"{population.members} members, {population.rounds} rounds of {population.interval} outer steps, "
            f"{flags.workers} at once, in {folder}",
            flush=True,
        )
        with _watching(folder, population), terminable(), contextlib.suppress(KeyboardInterrupt):
            launcher.run(folder, flags.workers)
    found = outcome(folder)
    if found.error:
        raise ValueError(f"all {population.members} members failed: {found.error}")
    if not found.complete:
        print(f"stopped; go on with: {again}")
        return _INTERRUPTED
    assert found.best is not None
    rows = read_lineage(folder)[-population.members :]
    chosen = ", ".join(f"{name} {value}" for name, value in rows[found.best]["hyperparameters"].items())
    best = member_folder(folder, found.best)
    print(
        f"best {population.objective} {found.value:.6g}: member {found.best}, in the end with {chosen}\n"
        f"its run is {best}; next: bilevel eval {best}, or bilevel report {folder}"
    )
    return 0


@contextmanager
def _watching(folder: Path, population: Population) -> Iterator[None]:
    """Print each round when it has ended."""
    done, ended = threading.Event(), len(read_lineage(folder))
    out = sys.stdout  # while a member trains in this process, what is printed goes to its log

    def show() -> None:
        nonlocal ended
        rows = read_lineage(folder)
        for first in range(ended, len(rows), population.members):
            print(said(population, rows[first : first + population.members]), file=out, flush=True)
        ended = len(rows)

    thread = threading.Thread(target=_every(show, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        show()


def _every(call: Callable[[], None], done: threading.Event) -> Callable[[], None]:
    def loop() -> None:
        while not done.wait(_POLL):
            call()

    return loop


def said(population: Population, rows: list[dict[str, Any]]) -> str:
    """A round that has ended, in one line."""
    values = [math.nan if row["value"] is None else row["value"] for row in rows]
    best = ranking(values, population.maximize)[0]
    copied = [row for row in rows if row["copied_from"] is not None]
    failed = sum(bool(row["error"]) for row in rows)
    parts = [
        f"round {rows[0]['round'] + 1}/{population.rounds}, outer step {rows[0]['step']}",
        f"best {population.objective} {values[best]:.4g} (member {best})",
        *([f"{failed} failed"] if failed else []),
        *([", ".join(f"{row['member']} copied {row['copied_from']}" for row in copied)] if copied else []),
    ]
    return "; ".join(parts)
