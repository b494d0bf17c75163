"""A search folder as a page: the study or the population read into plain values, and drawn."""

import math
import shlex
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from bilevel.recipes.run import write_text
from bilevel.report.runs import Note
from bilevel.report.search import render_search
from bilevel.report.search_data import Objective, Outcome, Search, SearchTrial
from bilevel.report.search_population import PopulationStory, Stage, render_population
from bilevel.search import spec
from bilevel.search.population_member import member_folder
from bilevel.search.population_spec import is_population, read_lineage, read_population
from bilevel.search.space import Numbers
from bilevel.search.study import Book, open_book

_OUTCOMES: dict[TrialState, Outcome] = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_DEFAULT = "report.html"


def search_report(folder: Path, output: Path | None = None) -> Path:
    """Write one self-contained HTML page about a search or a population.

    It may be running: the page shows what there is.

    Args:
        folder: of the search, as `bilevel search` leaves it.
        output: where to write; a folder means `report.html` inside it. Default: in the search folder.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: when the folder holds no search.
        ValueError: when its files are damaged, or its storage does not answer.

    >>> search_report(Path("no-such-search"))
    Traceback (most recent call last):
        ...
    FileNotFoundError: no-such-search holds no search: it has no search.json; make one with `bilevel search`
    """
    folder = Path(folder)
    output = folder if output is None else Path(output)
    output = output / _DEFAULT if output.is_dir() else output
    if is_population(folder):
        page = render_population(read_story(folder))
    else:
        page = render_search(read_study(folder))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, page)
    return output


def read_study(folder: Path) -> Search:
    """What the page about a search shows."""
    search = spec.read_search(folder)
    book = open_book(search)
    objectives = tuple(
        Objective(name, direction == "maximize")
        for name, direction in zip(search.objectives, search.directions, strict=True)
    )
    trials = tuple(_trial(trial, folder) for trial in book.trials() if trial.state != TrialState.WAITING)
    space = search.build_space()
    log = frozenset(name for name, kind in space.items() if isinstance(kind, Numbers) and kind.log)
    facts = [("Sampler", search.sampler), ("Pruner", search.pruner), ("Seed", str(search.seed))]
    facts += [("Warm starts", "from the nearest finished trial")] if search.warm_start else []
    facts += [("Storage", search.storage if "@" not in search.storage else "a server")]
    return Search(
        name=folder.resolve().name,
        recipe=Path(search.recipe).name,
        objectives=objectives,
        trials=trials,
        planned=search.num_trials,
        importances=importances(book.study),
        log_scale=log,
        facts=tuple(facts),
        commands=tuple(_study_commands(folder, search, trials)),
        notes=tuple(_study_notes(book)),
    )


def _trial(trial: FrozenTrial, folder: Path) -> SearchTrial:
    run = spec.trial_folder(folder, trial.number)
    return SearchTrial(
        number=trial.number,
        outcome=_OUTCOMES[trial.state],
        params=dict(trial.params),
        values=tuple(trial.values or ()) if trial.state == TrialState.COMPLETE else (),
        reported={step: float(value) for step, value in trial.intermediate_values.items()},
        seconds=float(trial.user_attrs.get("seconds", math.nan)),
        error=str(trial.user_attrs.get("error", "")),
        folder=str(run) if run.is_dir() else "",
    )


def importances(study: optuna.Study) -> dict[str, float]:
    """Share of each parameter in what makes a trial one of the best, by PED-ANOVA; {} where it is not known.

    Of several objectives: in what brings a trial to the front.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = optuna.importance.get_param_importances(study)
    except (ValueError, RuntimeError, ZeroDivisionError, IndexError):  # too few trials, or all alike
        return {}
    return {name: float(share) for name, share in found.items() if math.isfinite(share)}


def _study_commands(folder: Path, search: spec.Search, trials: tuple[SearchTrial, ...]):
    yield (
        "Go on with it, or with more trials",
        _typed(
            "bilevel search", search.recipe, "--folder", folder, "--resume", "--num-trials", search.num_trials
        ),
    )
    best = [trial for trial in trials if trial.outcome == "finished"]
    if best:
        yield (
            "Train the best trial for longer",
            _typed("bilevel search promote", folder, "--num-meta-steps", 2 * search.steps()),
        )
    if "@" not in search.storage:  # a URL with a password is not shown
        yield "Look into it in a browser", _typed("optuna-dashboard", search.storage)


def _study_notes(book: Book):
    if reason := book.study.user_attrs.get("stopped"):
        yield Note(f"The search has ended early: {reason}.")


def read_story(folder: Path) -> PopulationStory:
    """What the page about a population shows."""
    population, rows = read_population(folder), read_lineage(folder)
    rounds = [rows[i : i + population.members] for i in range(0, len(rows), population.members)]
    folders = tuple(str(member_folder(folder, i)) for i in range(population.members))
    facts = [
        ("Round", f"{population.interval} outer steps"),
        ("Copies", f"the worst {population.quantile:.0%} copy one of the best {population.quantile:.0%}"),
        ("Seed", str(population.seed)),
        ("Searched", ", ".join(f"{name} {text}" for name, text in population.space.items())),
    ]
    story = PopulationStory(
        name=folder.resolve().name,
        recipe=Path(population.recipe).name,
        objective=Objective(population.objective, population.maximize),
        steps=tuple(stages[0]["step"] for stages in rounds),
        stages=tuple(tuple(map(_stage, stages)) for stages in rounds),
        planned=population.rounds,
        folders=folders,
        facts=tuple(facts),
    )
    commands = [("Repeat", population.command)] if population.command else []
    resume = _typed("bilevel search", population.recipe, "--method pbt --folder", folder, "--resume")
    commands += [("Go on with it", resume)] if len(rounds) < population.rounds else []
    if (best := story.best()) is not None:
        commands.append(("Judge the best member", _typed("bilevel eval", folders[best])))
    return PopulationStory(**{**vars(story), "commands": tuple(commands)})


def _stage(row: dict[str, Any]) -> Stage:
    return Stage(
        value=math.nan if row["value"] is None else float(row["value"]),
        hyperparameters=row["hyperparameters"],
        copied_from=row["copied_from"],
        explored={name: (before, after) for name, (before, after) in row["explored"].items()},
        error=row["error"],
    )


def _typed(command: str, *words: Any) -> str:
    """A command line; the first part is typed as it stands, and so are flags."""
    rest = [str(word) for word in words]
    return " ".join([command, *(word if word.startswith("--") else shlex.quote(word) for word in rest)])
