"""What a search is, in one file that every worker reads: FOLDER/search.json."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bilevel.recipes.config import find_recipe, from_fields
from bilevel.recipes.run import write_text
from bilevel.search.space import Choices, Numbers, parse_space
from bilevel.train.early_stopping import Validation

FILE = "search.json"
JOURNAL = "journal.log"  # the storage inside the search folder
Sampler = Literal["auto", "random", "tpe", "gp", "cmaes", "nsga2", "grid"]
Pruner = Literal["none", "median", "asha", "hyperband"]
Direction = Literal["minimize", "maximize"]


@dataclass(frozen=True)
class Search:
    """A search as its workers see it; JSON values only, so that it is the same on every machine.

    Args:
        recipe: the recipe's name, or /path/to/file.py:Name.
        fields: the recipe's fields, as `bilevel.recipes.config.to_fields` writes them.
        space: what is searched, a text for each field: see `bilevel.search.space`.
        objectives: columns of a run's metrics, or "seconds".
        directions: one of "minimize" and "maximize" for each objective.
        num_trials: how many trials there shall be in the end.
        storage: path of a journal file, or the URL of an Optuna storage.
        name: of the study in the storage.
        sampler: who proposes.
        pruner: who stops hopeless trials.
        seed: the proposals follow from it and the number of the trial.
        min_steps: outer steps that no trial is stopped before.
        average: how many of the last figures of a run its value is the mean of.
        grid_points: values of a range on a grid.
        population: of NSGA-II.
        warm_start: whether a trial begins where the nearest finished one ended.
        validation: fields of `bilevel.train.early_stopping.Validation`.
    """

    recipe: str
    fields: dict[str, Any]
    space: dict[str, str]
    objectives: tuple[str, ...]
    directions: tuple[Direction, ...]
    num_trials: int
    storage: str
    name: str
    sampler: Sampler = "tpe"
    pruner: Pruner = "none"
    seed: int = 0
    min_steps: int = 1
    average: int = 1
    grid_points: int = 5
    population: int = 10
    warm_start: bool = False
    validation: dict[str, Any] = field(default_factory=dict)

    def build_recipe(self) -> Any:
        """The recipe that the values of a trial are put into."""
        return from_fields(find_recipe(self.recipe), self.fields)

    def build_space(self) -> dict[str, Numbers | Choices]:
        """The search space, by the dotted name of each field."""
        return parse_space(self.build_recipe(), self.space)

    def build_validation(self) -> Validation:
        """How each run is validated on its way."""
        return Validation(**self.validation)

    def steps(self) -> int:
        """Outer steps of a run, where they are not searched themselves."""
        return int(self.fields["num_meta_steps"])

    def embedded(self, folder: Path) -> bool:
        """Whether the storage is the file in the search's folder, which only its workers use."""
        return self.storage == str(Path(folder).resolve() / JOURNAL)


def write_search(folder: Path, search: Search) -> None:
    """Put a search into its folder, all of it or nothing; the folder may be moved later."""
    folder.mkdir(parents=True, exist_ok=True)
    values = dataclasses.asdict(search)
    if search.embedded(folder):
        values["storage"] = JOURNAL
    write_text(folder / FILE, json.dumps(values, indent=2) + "\n")


def read_search(folder: Path) -> Search:
    """The search of a folder.

    Raises:
        FileNotFoundError: when the folder holds none.
        ValueError: when its search.json is damaged.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no search: it has no {FILE}; make one with `bilevel search`")
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        search = Search(**values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); search again in another --folder") from error
    inside = str(Path(folder).resolve() / JOURNAL)
    return dataclasses.replace(search, storage=inside) if search.storage == JOURNAL else search


def trial_folder(folder: Path, number: int) -> Path:
    """Where the run of a trial is kept.

    >>> trial_folder(Path("search"), 7).as_posix()
    'search/trials/0007'
    """
    return Path(folder) / "trials" / f"{number:04d}"
