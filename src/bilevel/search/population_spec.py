"""What a population is, in one file that every worker reads: FOLDER/population.json."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax

from bilevel.recipes.config import find_recipe, from_fields
from bilevel.recipes.run import first_state, write_text
from bilevel.search import spec
from bilevel.search.population_member import member_folder, read_member
from bilevel.search.population_rules import Rules, ranking
from bilevel.search.space import Choices, Space, apply_values, parse_space

FILE = "population.json"
LINEAGE = "lineage.jsonl"
_SHARED = {
    "num_meta_steps": "schedules follow from it",
    "seed": "they see the same tasks, so that they can be compared",
    "loop": "it does not decide what is learned",
}


@dataclass(frozen=True)
class Population:
    """A population as its workers see it; JSON values only.

    Args:
        recipe: the recipe's name, or /path/to/file.py:Name.
        fields: the recipe's fields, as `bilevel.recipes.config.to_fields` writes them.
        space: what is searched, a text for each field: see `bilevel.search.space`.
        members: how many.
        interval: outer steps of a round.
        objective: what members are compared by: a column of the metrics, or `validation_<figure>`.
        direction: "minimize" or "maximize".
        quantile, resample, factors, seed: see `bilevel.search.population_rules.Rules`.
        validation_tasks: that `validation_<figure>` is a mean over.
        command: what was typed.

    Raises:
        ValueError: for numbers out of range.
    """

    recipe: str
    fields: dict[str, Any]
    space: dict[str, str]
    members: int = 8
    interval: int = 500
    objective: str = "query_loss"
    direction: str = "minimize"
    quantile: float = 0.25
    resample: float = 0.25
    factors: tuple[float, ...] = (0.8, 1.2)
    seed: int = 0
    validation_tasks: int = 200
    command: str = ""

    def __post_init__(self):
        if self.members < 2:
            raise ValueError(f"a population needs 2 members or more to copy each other, got {self.members}")
        if not self.space:
            raise ValueError("nothing is searched; name a field, like --space.learning-rate log:1e-4..1e-1")
        if self.direction not in ("minimize", "maximize"):
            raise ValueError(f"direction must be 'minimize' or 'maximize', got {self.direction!r}")
        if not 1 <= self.interval <= self.num_meta_steps:
            raise ValueError(
                f"interval must be 1 to num_meta_steps={self.num_meta_steps} outer steps, got {self.interval}"
            )
        self.rules  # noqa: B018  it refuses its numbers

    @property
    def num_meta_steps(self) -> int:
        """Of every member."""
        return int(self.fields["num_meta_steps"])

    @property
    def rules(self) -> Rules:
        """Who copies whom."""
        return Rules(self.quantile, self.resample, tuple(self.factors), self.seed)

    @property
    def rounds(self) -> int:
        """How many rounds there are; the last one may be shorter."""
        return math.ceil(self.num_meta_steps / self.interval)

    @property
    def maximize(self) -> bool:
        """Whether more is better."""
        return self.direction == "maximize"

    def until(self, round_number: int) -> int:
        """The outer step that a round ends at."""
        return min((round_number + 1) * self.interval, self.num_meta_steps)

    def build_recipe(self) -> Any:
        """The recipe that hyperparameters are put into."""
        return from_fields(find_recipe(self.recipe), self.fields)

    def build_space(self) -> Space:
        """The search space, by the dotted name of each field."""
        return parse_space(self.build_recipe(), self.space)


def is_population(folder: Path) -> bool:
    """Whether a search folder holds a population."""
    return (Path(folder) / FILE).is_file()


def is_search(folder: Path) -> bool:
    """Whether a folder holds a search or a population."""
    return (Path(folder) / spec.FILE).is_file() or is_population(folder)


def write_population(folder: Path, population: Population) -> None:
    """Put a population into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json.dumps(asdict(population), indent=2) + "\n")


def read_population(folder: Path) -> Population:
    """The population of a folder.

    Raises:
        FileNotFoundError: when the folder holds none.
        ValueError: when its population.json is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no population: it has no {FILE}; leave --resume out to begin one"
        )
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return Population(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error}); begin again in another --folder") from error


def read_lineage(folder: Path) -> list[dict[str, Any]]:
    """The rows of lineage.jsonl, one for each member and round that ended."""
    path = Path(folder) / LINEAGE
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    )


def check_space(population: Population) -> None:
    """Refuse fields whose values members could not exchange their states under.

    Raises:
        ValueError: for a field that all members share, or that changes the shape of the state at one end of
            its range or at one of its choices; says the first leaf that differs.
    """
    recipe, space = population.build_recipe(), population.build_space()
    for name in space:
        if why := _SHARED.get(name.split(".")[0]):
            raise ValueError(f"--space.{name}: all members of a population share it ({why}); leave it out")
    here = _shapes(recipe)
    for name, kind in space.items():
        for drawn in kind.drawn if isinstance(kind, Choices) else (kind.low, kind.high):
            value = kind.value(drawn)
            there = _shapes(apply_values(recipe, {name: value}))
            if difference := _first_difference(here, there):
                raise ValueError(
                    f"--space.{name}: members of a population copy each other's states, and at {value} the "
                    f"state has {difference}; search this field without --method pbt"
                )


def _shapes(recipe: Any) -> dict[str, str]:
    """Path, type and shape of every leaf of the state."""
    experiment = recipe.build()
    shapes = jax.eval_shape(lambda: first_state(experiment, recipe.seed))
    named = jax.tree_util.tree_leaves_with_path(shapes)
    sizes = {jax.tree_util.keystr(path).lstrip("."): leaf for path, leaf in named}
    return {path: f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]" for path, leaf in sizes.items()}


def _first_difference(here: Mapping[str, str], there: Mapping[str, str]) -> str | None:
    for path in {**here, **there}:
        if here.get(path) != there.get(path):
            return f"{there.get(path, 'no leaf')} at {path}, not {here.get(path, 'none')}"
    return None


@dataclass(frozen=True)
class Outcome:
    """How a population ended.

    Args:
        complete: whether all rounds are done.
        best: the member that is best after the newest round, or None before the first.
        value: that it reached.
        error: where all members failed, why.
    """

    complete: bool
    best: int | None = None
    value: float = math.nan
    error: str = ""


def outcome(folder: Path) -> Outcome:
    """What has come out so far."""
    population, rows = read_population(folder), read_lineage(folder)
    done = len(rows) // population.members
    members = [read_member(member_folder(folder, i)) for i in range(population.members)]
    errors = [m.error for m in members if m is not None and m.error and m.round_number == done]
    failed = errors[0] if len(errors) == population.members else ""
    if not rows:
        return Outcome(False, error=failed)
    values = [math.nan if row["value"] is None else row["value"] for row in rows[-population.members :]]
    best = ranking(values, population.maximize)[0]
    return Outcome(done == population.rounds, best, values[best], failed)
