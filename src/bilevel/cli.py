"""The command line: bilevel train | search | eval | compare | convert | check | report | recipes | ..."""

import contextlib
import dataclasses
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro

import bilevel as bl
from bilevel.analysis.commands import run_advise, run_check
from bilevel.recipes.comparison import compare_runs
from bilevel.recipes.config import RECIPES, find_recipe
from bilevel.recipes.evaluation import evaluate_run
from bilevel.recipes.run import (
    read_config,
    saved_recipe,
    saved_validation,
    stopped_early,
    train_recipe,
)
from bilevel.recipes.summary import summary
from bilevel.search.flags import parse, value_of
from bilevel.search.population_spec import is_search
from bilevel.sharding import make_devices
from bilevel.tasks.convert import Dataset, Layout, convert
from bilevel.tasks.pictures import Fit
from bilevel.train.early_stopping import Validation

_USAGE = """\
bilevel: learn how to learn

  bilevel train RECIPE [flags]   meta-train; `bilevel train RECIPE --help` lists every flag
  bilevel search RECIPE [flags]  tune any of its fields: --space.FIELD log:1e-3..1, many runs, one study
  bilevel eval RUN [flags]       judge a run on fresh tasks of unseen classes
  bilevel compare RUN RUN...     who is better on the same tasks, with a paired interval
  bilevel convert FILES FOLDER   store pictures of any common form, once, to train on them
  bilevel check RECIPE [flags]   is the recipe's hypergradient right? finite differences, in plain words
  bilevel advise RECIPE [flags]  which estimator to take: error, time and memory of each
  bilevel report RUN...          one HTML page about a run, comparing several, or about a search
  bilevel recipes                the recipes there are
  bilevel demo                   train, evaluate and report maml-glyphs in a few minutes

RECIPE is a name, or path/to/file.py:Name. RUN is a folder that train made.
Before the command, --traceback shows where an error came from.
"""
# What a user can cause is answered in one line; anything else is our fault and keeps its traceback.
_EXPECTED = (OSError, ValueError, TypeError, KeyError, ImportError, bl.HypergradientError)
_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    show_traceback = words[:1] == ["--traceback"]
    words = words[show_traceback:]
    command, rest = (words[0], words[1:]) if words else ("--help", [])
    if command in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0
    if command == "--version":
        print(bl.__version__)
        return 0
    if command not in _COMMANDS:
        return _fail(f"there is no command {command!r}; `bilevel --help` lists them")
    try:
        return _COMMANDS[command](rest)
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED)
    except _EXPECTED as error:
        if show_traceback:
            traceback.print_exc()
        return _fail(_in_words(error))


def _in_words(error: BaseException) -> str:
    """An exception's message, without what only Python's own types put around it."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, KeyError) and error.args:
        text = str(error.args[0])
    return " ".join(text.split()) or type(error).__name__


def _fail(message: str, status: int = 2) -> int:
    print(f"bilevel: {message}", file=sys.stderr)
    return status


def _train(words: list[str]) -> int:
    if not words or words[0].startswith("-"):
        print("usage: bilevel train RECIPE [flags]\n")
        _recipes([])
        return 0 if words[:1] in (["-h"], ["--help"]) else 2
    name, flags = words[0], words[1:]
    cls = find_recipe(name)
    default_folder = Path("runs") / name.rpartition(":")[2]
    recipe, validation = cls(), Validation()
    if "--resume" in flags and (folder := Path(value_of(flags, "--folder") or default_folder)).is_dir():
        if (there := read_config(folder)["recipe"]) != name:
            raise ValueError(f"{folder} holds a run of {there}, not of {name}; take another --folder")
        # Flags left out keep the values the run was started with.
        recipe, validation = saved_recipe(folder), saved_validation(folder)
    parsed = parse(
        f"bilevel train {name}",
        _arguments(cls, recipe, default_folder, validation),
        flags,
        cls.__doc__,
    )
    recipe, folder = parsed.recipe, parsed.folder
    command = shlex.join(["bilevel", "train", *words])
    state = train_recipe(name, recipe, folder, parsed.resume, command, parsed.validation)
    again = f"bilevel train {name} --folder {folder} --resume"
    if best := stopped_early(folder):
        print(
            f"stopped at outer step {int(state.step)}: no validation was better than {best[1]:.4g} at step "
            f"{best[0]}, which is kept in {folder / 'best'}; next: bilevel eval {folder}"
        )
        return 0
    if int(state.step) < recipe.num_meta_steps:
        print(f"stopped at outer step {int(state.step)}, checkpoint saved; go on with: {again}")
        return _INTERRUPTED
    print(f"done: {int(state.step)} outer steps in {folder}; next: bilevel eval {folder}")
    return 0


def _arguments(cls: type, recipe: Any, folder: Path, validation: Validation) -> type:
    """The flags of `bilevel train`: the recipe's fields, validation, and where to run."""
    return dataclasses.make_dataclass(
        "Train",
        [
            ("recipe", Annotated[cls, tyro.conf.arg(name="")], dataclasses.field(default=recipe)),
            ("validation", Validation, dataclasses.field(default=validation)),
            (
                "folder",
                Annotated[Path, tyro.conf.arg(help="Where the run is kept.")],
                dataclasses.field(default=folder),
            ),
            (
                "resume",
                Annotated[bool, tyro.conf.arg(help="Go on from the newest checkpoint there.")],
                dataclasses.field(default=False),
            ),
        ],
        frozen=True,
    )


@dataclasses.dataclass(frozen=True)
class _Eval:
    run: tyro.conf.Positional[Path]
    """The run's folder."""
    num_tasks: int | None = None
    """Test tasks; the recipe's own number when left out."""
    num_steps: int | None = None
    """Inner steps; the recipe's own number when left out."""
    seed: int = 1
    """Of the test tasks."""
    every: int | None = None
    """Judge after each such number of inner steps; for about 20 points when left out."""
    shots: tuple[int, ...] = ()
    """Support sizes to judge on as well, like 1 5 10."""
    checkpoint: Literal["auto", "best", "newest"] = "auto"
    """auto is the best on validation classes where the run has one, else the newest."""


def _eval(words: list[str]) -> int:
    parsed = parse("bilevel eval", _Eval, words, "Judge a run on fresh tasks of unseen classes.")
    result = evaluate_run(
        parsed.run,
        parsed.num_tasks,
        parsed.num_steps,
        parsed.seed,
        every=parsed.every,
        shots=parsed.shots,
        checkpoint=parsed.checkpoint,
    )
    print(summary(result))
    print(f"written to {parsed.run / 'evaluation.json'}; next: bilevel report {parsed.run}")
    return 0


@dataclasses.dataclass(frozen=True)
class _Compare:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Two or more run folders with the same test tasks."""
    num_tasks: int | None = None
    """Test tasks; the smallest number among the recipes when left out."""
    seed: int = 1
    """Of the test tasks."""
    checkpoint: Literal["auto", "best", "newest"] = "auto"
    """auto is the best on validation classes where a run has one, else the newest."""
    out: Path | None = None
    """Folder for compare.json and compare.md; the first run's when left out."""


def _compare(words: list[str]) -> int:
    parsed = parse("bilevel compare", _Compare, words, "Who is better on the same tasks?")
    result = compare_runs(
        parsed.runs, parsed.num_tasks, parsed.seed, checkpoint=parsed.checkpoint, out=parsed.out
    )
    print(result["text"])
    print(f"written to {(parsed.out or parsed.runs[0]) / 'compare.json'} and compare.md")
    return 0


@dataclasses.dataclass(frozen=True)
class _Check:
    recipe: tyro.conf.Positional[str]
    """A recipe's name, or path/to/file.py:Name."""
    num_tasks: int = 2
    """Tasks the comparison is made on."""
    repeats: int = 16
    """Calls of an estimator that is random."""
    tolerance: float = 1e-3
    """The relative error up to which it is trusted."""
    seed: int = 0
    """Of the first meta and of the tasks."""


def _check(words: list[str]) -> int:
    parsed = parse("bilevel check", _Check, words, "Hold a recipe's hypergradient against differences.")
    report = run_check(
        find_recipe(parsed.recipe)().build(),
        seed=parsed.seed,
        num_tasks=parsed.num_tasks,
        repeats=parsed.repeats,
        tolerance=parsed.tolerance,
    )
    print(report)
    return int(report.trust == "no")


@dataclasses.dataclass(frozen=True)
class _Advise:
    recipe: tyro.conf.Positional[str]
    """A recipe's name, or path/to/file.py:Name."""
    memory: str | None = None
    """At most this much for a batch, like 8GiB."""
    seconds: float | None = None
    """At most this long for a batch."""
    num_tasks: int = 2
    """Tasks the errors are measured on."""
    repeats: int = 16
    """Calls of an estimator that is random."""
    task_chunk: int = 1
    """Tasks computed side by side."""
    seed: int = 0
    """Of the first meta and of the tasks."""
    out: Path | None = None
    """Where to draw error against cost, an HTML page; not drawn when left out."""


def _advise(words: list[str]) -> int:
    parsed = parse("bilevel advise", _Advise, words, "Compare the estimators on a recipe's problem.")
    flags = dataclasses.asdict(parsed)
    name, out = flags.pop("recipe"), flags.pop("out")
    if out is not None:  # before the minutes of measuring, not after
        out.parent.mkdir(parents=True, exist_ok=True)
    tried = []

    def say(trial):  # all of them take minutes
        tried.append(trial)
        took = trial.failure or f"{1e3 * trial.seconds:.3g} ms"
        print(f"{len(tried):3}  {trial.name}: {took}", file=sys.stderr, flush=True)

    advice = run_advise(find_recipe(name)().build(), **flags, on_trial=say)
    print(advice)
    if out is not None:
        from bilevel.report.advice import write_advice  # matplotlib takes a second to import

        print(f"drawn in {write_advice(advice, out, Path(name).name)}")
    return int(advice.recommended is None)


@dataclasses.dataclass(frozen=True)
class _Report:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders: one page about one, or comparing several."""
    out: Path | None = None
    """Where to write; report.html in the first run folder when left out."""


def _report(words: list[str]) -> int:
    from bilevel.report import write_report  # matplotlib takes a second to import

    parsed = parse("bilevel report", _Report, words, "Write one self-contained HTML page.")
    searches = [folder for folder in parsed.runs if is_search(folder)]
    if not searches:
        print(write_report(parsed.runs, parsed.out))
        return 0
    if len(parsed.runs) > 1:
        raise ValueError(f"{searches[0]} is a search: a page is about one search, or about runs")
    with _extra("search"):
        from bilevel.search.report import search_report

    print(search_report(searches[0], parsed.out or searches[0] / "report.html"))
    return 0


def _search(words: list[str]) -> int:
    with _extra("search"):
        from bilevel.search.commands import run_search
        from bilevel.search.population_commands import run_population
    method = value_of(words, "--method")
    if method is None:
        return run_search(words)
    if method != "pbt":
        raise ValueError(f"--method is pbt, a population, or left out for a search; got {method}")
    return run_population(words)


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Say which extra of the package brings a library that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f'{error.name} is missing: pip install "bilevel[{name}]"') from error


def _recipes(words: list[str]) -> int:
    if words:
        return _fail(f"recipes takes no flags, got {' '.join(words)}")
    width = max(map(len, RECIPES))
    for name, cls in RECIPES.items():
        print(f"{name:<{width}}  {(cls.__doc__ or '').strip().splitlines()[0]}")
    print(f"{'FILE.py:Name':<{width}}  a recipe of your own")
    return 0


@dataclasses.dataclass(frozen=True)
class _Convert:
    source: tyro.conf.Positional[Path]
    """Files that you have: docs/data.md says which."""
    folder: tyro.conf.Positional[Path]
    """Where the stored set shall be."""
    dataset: Dataset = "auto"
    """Which benchmark it is, where the files do not say."""
    splits: str | None = None
    """Which class goes where: a JSON file, a folder of train.csv or train.txt and so on, or 64/16/20."""
    size: int | None = None
    """Side of the pictures."""
    fit: Fit = "stretch"
    """How a picture that is not square becomes so."""
    channels: Literal[1, 3] | None = None
    """1 for grey, 3 for colour."""
    label: str | None = None
    """The column of labels of a Hugging Face data set that has several."""
    partial: bool = False
    """Take a benchmark that is not complete."""
    replace: bool = False
    """Put it in place of a stored set that is already there."""


def _convert(words: list[str]) -> int:
    parsed = parse("bilevel convert", _Convert, words, "Store pictures of any common form, once.")
    flags = dataclasses.asdict(parsed)
    source, folder = flags.pop("source"), flags.pop("folder")
    layout = Layout(**{name: flags.pop(name) for name in ("size", "fit", "channels")})

    def show(done: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {total} pictures", end="\r", file=sys.stderr)

    print(convert(source, folder, layout, on_progress=show, **flags).summary())
    print(f"stored in {folder}; train on it with --task.dataset stored --task.data {folder}")
    return 0


@dataclasses.dataclass(frozen=True)
class _Demo:
    folder: Path = Path("runs/demo")
    """Where the run is kept; a second demo goes on with it."""


def _demo(words: list[str]) -> int:
    from bilevel.report import write_report

    folder = parse("bilevel demo", _Demo, words, "Train, evaluate and report maml-glyphs.").folder
    name = "maml-glyphs"
    resume = (folder / "config.json").exists()
    recipe = saved_recipe(folder) if resume else RECIPES[name]()
    if not resume:  # two devices of a CPU use its cores better; where there is one GPU, that one
        make_devices(2)
        loop = dataclasses.replace(recipe.loop, devices=min(2, jax.device_count()))
        recipe = dataclasses.replace(recipe, loop=loop)
    state = train_recipe(name, recipe, folder, resume, f"bilevel train {name} --folder {folder}")
    if int(state.step) < recipe.num_meta_steps:
        print("stopped, checkpoint saved; the same command goes on from here")
        return _INTERRUPTED
    print(summary(evaluate_run(folder)))
    print(f"report: {write_report([folder])}")
    return 0


_COMMANDS = {
    "train": _train,
    "search": _search,
    "eval": _eval,
    "compare": _compare,
    "convert": _convert,
    "check": _check,
    "advise": _advise,
    "report": _report,
    "recipes": _recipes,
    "demo": _demo,
}

if __name__ == "__main__":
    sys.exit(main())
