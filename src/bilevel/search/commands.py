"""`bilevel search`: flags to a search in a folder, run to its end, resumed, promoted."""

import contextlib
import dataclasses
import json
import shlex
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from optuna.exceptions import StorageInternalError

from bilevel.recipes.config import find_recipe, first_difference, to_fields
from bilevel.search.display import summary, watching
from bilevel.search.flags import absolute, parse, split_space, value_of
from bilevel.search.local import Launcher, LocalLauncher
from bilevel.search.locks import try_lock
from bilevel.search.promote import choose_trial, promote
from bilevel.search.signals import terminable
from bilevel.search.space import parse_space
from bilevel.search.spec import (
    FILE,
    JOURNAL,
    Direction,
    Pruner,
    Sampler,
    Search,
    read_search,
    trial_folder,
    write_search,
)
from bilevel.search.study import FINISHED, check_libraries, create_study, grid_of, has_study, open_book
from bilevel.search.trial import SECONDS
from bilevel.search.worker import SESSION, STOPPED
from bilevel.train.early_stopping import Validation

_USAGE = """\
usage: bilevel search RECIPE --space.FIELD SPEC [--space.FIELD SPEC ...] [flags]
       bilevel search RECIPE --folder FOLDER --resume
       bilevel search promote FOLDER [TRIAL] --num-meta-steps N

FIELD is any field of the recipe, also a nested one: --space.maml.rate. SPEC is one of
  log:1e-3..1  float:0..1  float:0..1:0.25  int:1..10  int:log:16..256  int:8..64:8  conv4|resnet12

All flags of `bilevel train RECIPE` hold for every trial; `bilevel search RECIPE --help` lists these and more.
"""
_INTERRUPTED = 130
_TRIALS = 50  # where --num-trials is left out


@dataclasses.dataclass(frozen=True)
class Flags:
    """The flags of a search beside those of its recipe; None is the default, or what a resumed one has."""

    num_trials: int | None = None
    """Trials in the end; 50, or all points of a grid. More on --resume make the search go on."""
    sampler: Sampler | None = None
    """Who proposes; auto is tpe, or nsga2 for several objectives."""
    pruner: Pruner | None = None
    """Who stops hopeless trials at the figures they report; none."""
    objective: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A column of the runs' metrics, or seconds; repeat it for several. query_loss, or validation_loss."""
    direction: tyro.conf.UseAppendAction[tuple[Direction, ...]] = ()
    """For each objective; from its name when left out: losses and seconds down, accuracies up."""
    min_steps: int | None = None
    """Outer steps before any trial is stopped; a tenth of --num-meta-steps."""
    average: int | None = None
    """How many of the last figures of a run, one a chunk or a validation, its value is the mean of; 1."""
    grid_points: int | None = None
    """Values of a range on a grid; 5."""
    warm_start: bool = False
    """Begin each trial with the meta-parameters of the nearest finished one."""
    storage: str | None = None
    """A journal file, or the URL of an Optuna storage that many machines reach; a file in the folder."""
    study: str | None = None
    """The study's name in the storage; the recipe's."""
    launcher: Literal["local", "ray"] = "local"
    """Where the workers run."""
    address: str | None = None
    """Of a Ray cluster; one on this machine is started when left out."""
    workers: int = 1
    """How many trials run at once."""


def run_search(words: list[str]) -> int:
    """Run one `bilevel search` command; returns the exit status.

    Raises:
        ValueError, TypeError, OSError, ImportError: what the user can mend, in one line each.
    """
    if words[:1] == ["promote"]:
        return _promote(words[1:])
    if not words or words[0].startswith("-"):
        print(_USAGE, end="")
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    name, rest = words[0], words[1:]
    specs, rest = split_space(rest)
    folder = Path(value_of(rest, "--folder") or Path("runs") / f"search-{name.rpartition(':')[2]}")
    saved = read_search(folder) if "--resume" in rest and (folder / FILE).is_file() else None
    parsed = _parse(name, saved, folder, rest)
    _check_words(parsed, specs, rest, saved)
    search = _make(name, parsed, specs, saved)
    check_libraries(search)
    if saved is None:
        _check_new(folder, search, parsed.resume)
    elif difference := first_difference(_identity(saved), _identity(search)):
        raise ValueError(
            f"{folder} holds another search: {difference}; leave the flag out, or take another --folder"
        )
    return _run(search, folder, parsed.flags, _again(name, folder, parsed.flags))


def _again(name: str, folder: Path, flags: Flags) -> str:
    """The command that goes on."""
    words = ["bilevel", "search", name, "--folder", str(folder), "--resume"]
    usual = Flags()
    for flag in ("launcher", "address", "workers"):  # how it runs is not kept in the folder
        if (value := getattr(flags, flag)) != getattr(usual, flag):
            words += [f"--{flag}", str(value)]
    return shlex.join(words)


def _parse(name: str, saved: Search | None, folder: Path, words: list[str]) -> Any:
    """All flags: the recipe's fields, validation, the search's, and where it is kept."""
    cls = find_recipe(name)
    if saved is not None and saved.recipe != absolute(name):
        raise ValueError(f"{folder} holds a search of {saved.recipe}, not of {name}; take another --folder")
    own = {f.name for f in dataclasses.fields(Flags)} | {"folder", "resume", "validation", "space"}
    if clash := sorted(own & {f.name for f in dataclasses.fields(cls)}):
        raise ValueError(f"{name} has a field {clash[0]}, which is a flag of the search; rename the field")
    recipe = cls() if saved is None else saved.build_recipe()
    validation = Validation() if saved is None else saved.build_validation()
    flags = Flags(warm_start=saved is not None and saved.warm_start)
    help_folder, help_resume = "Where the search is kept.", "Go on with the search there."
    fields: list[Any] = [
        ("recipe", Annotated[cls, tyro.conf.arg(name="")], dataclasses.field(default=recipe)),
        ("validation", Validation, dataclasses.field(default=validation)),
        ("flags", Annotated[Flags, tyro.conf.arg(name="")], dataclasses.field(default=flags)),
        ("folder", Annotated[Path, tyro.conf.arg(help=help_folder)], dataclasses.field(default=folder)),
        ("resume", Annotated[bool, tyro.conf.arg(help=help_resume)], dataclasses.field(default=False)),
    ]
    made = dataclasses.make_dataclass("Search", fields, frozen=True)
    return parse(f"bilevel search {name}", made, words, _USAGE)


def _check_words(parsed: Any, specs: dict[str, str], words: list[str], saved: Search | None) -> None:
    """Refuse flags that say nothing or contradict one another."""
    if not specs and saved is None:
        raise ValueError(
            "there is nothing to search; give a field and its range, like --space.seed int:1..10, "
            "see `bilevel search --help`"
        )
    for field in specs if saved is None else saved.space:
        flags = {f"--{field}", f"--{field.replace('_', '-')}"}
        if any(word.partition("=")[0] in flags for word in words):
            raise ValueError(f"{field} is searched and also set by a flag; leave one of them out")
    flags = parsed.flags
    for name in ("num_trials", "min_steps", "average", "grid_points", "workers"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if flags.address and flags.launcher != "ray":
        raise ValueError(f"--address {flags.address} is of a Ray cluster; add --launcher ray")


def _make(name: str, parsed: Any, specs: dict[str, str], saved: Search | None) -> Search:
    """The search that the flags describe; what they leave out is as it was, or the default."""
    flags, recipe = parsed.flags, parsed.recipe
    base = dataclasses.asdict(saved) if saved is not None else {}
    usual = "validation_loss" if parsed.validation.every else "query_loss"
    objectives = flags.objective or base.get("objectives") or (usual,)
    if len(set(objectives)) < len(objectives):
        raise ValueError("an objective is named twice; leave one out")
    if not parsed.validation.every and (late := [n for n in objectives if n.startswith("validation_")]):
        raise ValueError(f"--objective {late[0]} needs validations: add --validation.every N, outer steps")
    directions = flags.direction or (() if flags.objective else base.get("directions"))
    several = len(objectives) > 1
    sampler = flags.sampler or base.get("sampler") or "auto"
    sampler = ("nsga2" if several else "tpe") if sampler == "auto" else sampler
    pruner = flags.pruner or base.get("pruner") or "none"
    if several and sampler == "cmaes":
        raise ValueError("cmaes knows one objective; take --sampler nsga2, tpe, gp or random for several")
    if pruner != "none" and (several or objectives[0] == SECONDS):
        raise ValueError(f"--pruner {pruner} needs one objective that runs report as they go; leave it out")
    steps = recipe.num_meta_steps
    least = flags.min_steps or base.get("min_steps") or max(1, steps // 10)
    if least > steps:
        raise ValueError(f"--min-steps {least} is more than the {steps} outer steps of a trial")
    search = Search(
        recipe=absolute(name),
        fields=to_fields(recipe),
        space=specs or base.get("space", {}),
        objectives=tuple(objectives),
        directions=_directions(tuple(objectives), directions),
        num_trials=flags.num_trials or base.get("num_trials", _TRIALS),
        storage=_location(flags.storage, parsed.folder) if flags.storage else base.get("storage", ""),
        name=flags.study or base.get("name") or name.rpartition(":")[2],
        sampler=sampler,
        pruner=pruner,
        seed=recipe.seed,
        min_steps=least,
        average=flags.average or base.get("average", 1),
        grid_points=flags.grid_points or base.get("grid_points", 5),
        population=base.get("population") or min(50, max(4, (flags.num_trials or _TRIALS) // 5)),
        warm_start=flags.warm_start,
        validation=dataclasses.asdict(parsed.validation),
    )
    if not search.storage:
        search = dataclasses.replace(search, storage=str(parsed.folder.resolve() / JOURNAL))
    space = parse_space(recipe, search.space)
    order = space if saved is None or set(space) != set(saved.space) else saved.space
    search = dataclasses.replace(search, space={field: search.space[field] for field in order})
    if sampler == "grid":
        size = len(grid_of(search))
        if (flags.num_trials or 0) > size:
            raise ValueError(f"the grid has {size} points, fewer than --num-trials {flags.num_trials}")
        search = dataclasses.replace(search, num_trials=flags.num_trials or base.get("num_trials", size))
    if saved is not None and search.num_trials < saved.num_trials:
        raise ValueError(f"the search has {saved.num_trials} trials already; --num-trials can only grow")
    return search


def _directions(objectives: tuple[str, ...], given: Any) -> tuple[Direction, ...]:
    """The given directions, or those that the names mean.

    >>> _directions(("query_accuracy", "seconds"), ())
    ('maximize', 'minimize')
    """
    if given:
        if len(given) != len(objectives):
            raise ValueError(f"there are {len(objectives)} objectives and {len(given)} times --direction")
        return tuple(given)
    found: list[Direction] = []
    for name in objectives:
        words = name.lower().split("_")
        if {"accuracy", "f1", "auc", "reward"} & set(words):
            found.append("maximize")
        elif {"loss", "error", "seconds", "time", "residual"} & set(words):
            found.append("minimize")
        else:
            raise ValueError(f"is {name} to be small or large? add --direction minimize or maximize")
    return tuple(found)


def _location(storage: str, folder: Path) -> str:
    """A storage's path or URL, the same from every working folder."""
    if "://" not in storage:
        return str(Path(storage).resolve())
    scheme, _, rest = storage.partition(":///")
    if scheme.startswith("sqlite") and rest and not rest.startswith("/"):
        return f"{scheme}:///{Path(rest).resolve()}"
    return storage


def _identity(search: Search) -> dict[str, Any]:
    """What may not change when a search is resumed."""
    fields = json.loads(json.dumps(dataclasses.asdict(search)))
    fields.pop("num_trials")
    fields["fields"].pop("loop", None)
    return fields


def _check_new(folder: Path, search: Search, resume: bool) -> None:
    """Refuse a folder or a study that is there already, or is not where it should be."""
    used = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    shared = not search.embedded(folder) and has_study(search.storage, search.name)
    if resume and not shared:
        raise FileNotFoundError(
            f"{folder} holds no search: it has no {FILE}; leave --resume out to start one"
        )
    if used:
        what = "go on with --resume" if (folder / FILE).is_file() else "remove it"
        raise FileExistsError(f"{folder} is in use already; {what}, or take another --folder")
    if shared and not resume:
        raise FileExistsError(
            f"{search.storage} holds a study {search.name} already; add --resume to work on it from here, "
            "or take another --study"
        )
    if shared:
        known = open_book(search).study.user_attrs.get("search")
        if known is not None and (difference := first_difference(known, _shared(search))):
            raise ValueError(
                f"the study {search.name} in the storage is of another search: {difference}; "
                "repeat its flags, or take another --study"
            )


def _shared(search: Search) -> dict[str, Any]:
    """What must be equal on all machines that work on a study; their paths may differ."""
    fields = _identity(search) | {"num_trials": search.num_trials, "recipe": Path(search.recipe).name}
    del fields["storage"]
    return fields


def _run(search: Search, folder: Path, flags: Flags, again: str) -> int:
    launcher = _launcher(flags)
    lock = try_lock(folder / "locks" / "driver")
    if lock is None:
        raise ValueError(f"another `bilevel search` works on {folder}; wait for it, or stop it")
    with lock:
        write_search(folder, search)
        (folder / SESSION).write_text(uuid.uuid4().hex)
        book = create_study(search)
        book.study.set_user_attr("search", _shared(search))
        if book.study.user_attrs.get(STOPPED):
            book.study.set_user_attr(STOPPED, "")
        left = search.num_trials - len(book.trials(*FINISHED))
        print(
            f"{left} of {search.num_trials} trials to run, {flags.workers} at once, in {folder}", flush=True
        )
        out = sys.stdout  # a worker inside this process sends what it prints elsewhere
        with (
            watching(search, lambda text: print(text, file=out, flush=True)),
            terminable(),
            contextlib.suppress(KeyboardInterrupt),  # what is unfinished is counted below
            _storage_in_words(search, again),
        ):
            if left:
                launcher.run(folder, flags.workers)
        if reason := book.study.user_attrs.get(STOPPED):
            raise ValueError(
                f"the search has ended early: {reason}; mend it, then go on with --resume (what has failed "
                "stays so), or start in another --folder"
            )
        finished = len(book.trials(*FINISHED))
        if finished < search.num_trials:
            print(f"stopped after {finished} of {search.num_trials} trials; go on with: {again}")
            return _INTERRUPTED
        print(summary(book, search, folder))
    return 0


def _launcher(flags: Flags) -> Launcher:
    if flags.launcher == "local":
        return LocalLauncher()
    from bilevel.search.ray_workers import RayLauncher  # ray takes seconds to import

    return RayLauncher(flags.address)


@contextmanager
def _storage_in_words(search: Search, again: str) -> Iterator[None]:
    """A storage that fails in the middle is nothing that a traceback explains."""
    try:
        yield
    except StorageInternalError as error:
        reason = " ".join(str(error).split())[:200]
        raise ConnectionError(f"{search.storage} fails: {reason}; when it works again: {again}") from error


@dataclasses.dataclass(frozen=True)
class _Promote:
    search: tyro.conf.Positional[Path]
    """The search's folder."""
    num_meta_steps: int
    """Outer steps in the end, those of the trial included."""
    trial: tyro.conf.Positional[int | None] = None
    """The trial's number; the best one when left out."""
    folder: Path | None = None
    """Where the new run is kept; FOLDER/promoted/TRIAL-N when left out."""


def _promote(words: list[str]) -> int:
    parsed = parse("bilevel search promote", _Promote, words, "Go on with a trial for more outer steps.")
    number = choose_trial(parsed.search, parsed.trial)
    steps = parsed.num_meta_steps
    folder = parsed.folder or parsed.search / "promoted" / f"{number:04d}-{steps}"
    command = shlex.join(["bilevel", "search", "promote", *words])
    state, name = promote(trial_folder(parsed.search, number), folder, steps, command)
    if int(state.step) < steps:
        again = shlex.join(["bilevel", "train", name, "--folder", str(folder), "--resume"])
        print(f"stopped at outer step {int(state.step)}, checkpoint saved; go on with: {again}")
        return _INTERRUPTED
    print(f"done: {int(state.step)} outer steps in {folder}; next: bilevel eval {folder}")
    return 0
