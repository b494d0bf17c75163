"""Black-box search of everything, against black-box search of what is discrete with hypergradients inside.

    breast_cancer  a logistic regression on a table: inner rate and steps are searched, 62 penalties learned
    digits         the same on small pictures, 650 penalties
    mnist          the same on 3000 pictures of 14 x 14 pixels, 1970 penalties

The black box (Optuna's TPE) draws the discrete choices and all continuous hyperparameters, one training a
trial. The other way is `bilevel search --warm-start`: TPE draws the choices, the continuous ones are learned
for a few outer steps in each trial, from where the nearest trial ended. Work is counted in gradients of the
inner loss, as in bench/hpo.py. Both keep the trial whose validation loss was least; its validation loss and
test accuracy are measured apart on fresh random starts, the same for both, and counted nowhere.
Prints Markdown tables, keeps the curves in docs/results/both_at_once.json, a line a problem, and draws
docs/both_at_once.png of all that are kept: with --only the others stay as they were.

    BILEVEL_DATA=folder/of/mnist.npz python bench/both_at_once.py [--quick] [--only digits] [--folder docs]
    python bench/both_at_once.py --draw      # the picture again, from what is kept
"""

import argparse
import contextlib
import io
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optuna
import run as bench
from hpo import BLACK, INKS, outer_loss, work
from jax.flatten_util import ravel_pytree
from kept_in import add_folder, kept_in

from bilevel.recipes.logistic_l2 import LogisticL2
from bilevel.recipes.run import saved_recipe
from bilevel.search.commands import run_search
from bilevel.search.space import apply_values
from bilevel.search.spec import read_search, trial_folder
from bilevel.search.study import open_book
from bilevel.search.warm_start import read_meta
from bilevel.tasks.mnist import mnist

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter


@dataclass(frozen=True)
class Problem:
    """What is searched.

    Args:
        name: of the recipe.
        recipe: with the flags that both ways share.
        flags: the same flags, for `bilevel search`.
        choices: values of each discrete field.
        low, high: of each continuous hyperparameter, a logarithm.
        tied: for each black box, of how many numbers θ is made.
        outer_steps: of each trial of the other way.
        trials: of the other way.
        starts: fresh random starts that θ is measured on.
    """

    name: str
    recipe: Any
    flags: tuple[str, ...]
    choices: dict[str, tuple[Any, ...]]
    low: float
    high: float
    tied: tuple[int, ...]
    outer_steps: int
    trials: int
    starts: int


class Leader(NamedTuple):
    """The best trial so far: after how much work it was found, its choices and its θ."""

    work: int
    choices: dict[str, Any]
    theta: np.ndarray


class Trace(NamedTuple):
    """How a search went: its leaders, all its work, trials and seconds."""

    leaders: list[Leader]
    work: int
    trials: int
    seconds: float


class Trainings:
    """One problem with its compiled trainings."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.trained = cache(self._trained)

    def parts(self, choices: tuple[tuple[str, Any], ...]):
        """The recipe with these choices, its experiment, its first θ flattened, and back."""
        recipe = apply_values(self.problem.recipe, dict(choices))
        experiment = recipe.build()
        theta, back = ravel_pytree(experiment.learner.init_meta(jax.random.key(recipe.seed)))
        return recipe, experiment, theta, back

    def _trained(self, choices: tuple[tuple[str, Any], ...]) -> tuple[Callable, Callable, int, int]:
        """Loss after one training; measured loss and accuracy; inner steps; numbers in θ."""
        recipe, experiment, theta, back = self.parts(choices)
        learner = experiment.learner
        task = jax.tree.map(lambda leaf: leaf[0], experiment.sample_tasks(jax.random.key(0)))
        test = experiment.sample_test(jax.random.key(0))
        loss = jax.jit(lambda theta, key: outer_loss(learner, back(theta), task, key)[0])
        keys = jax.random.split(jax.random.key(1234), self.problem.starts)

        @jax.jit
        def measure(theta):
            def one(key):
                params = learner.solver.solve(learner.problem, back(theta), task, key).params
                on = lambda query: learner.problem.metrics(params, back(theta), query, key)  # noqa: E731
                return on(task.query)["loss"], on(test.query)["accuracy"]

            return jax.tree.map(jnp.mean, jax.lax.map(one, keys))

        return loss, measure, recipe.num_steps, theta.size

    def measure(self, leader: Leader) -> tuple[float, float]:
        """Validation loss and test accuracy in percent, on fresh starts."""
        loss, accuracy = self.trained(tuple(leader.choices.items()))[1](
            jnp.asarray(leader.theta, jnp.float32)
        )
        return float(loss), 100 * float(accuracy)

    def black_box(self, numbers: int, trials: int, seed: int) -> Trace:
        """TPE over the choices and `numbers` continuous hyperparameters."""
        problem, leaders, best, spent = self.problem, [], math.inf, 0
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        begin = time.perf_counter()
        for number in range(trials):
            trial = study.ask()
            choices = {
                name: values[trial.suggest_categorical(name, range(len(values)))]
                for name, values in problem.choices.items()
            }
            vector = [trial.suggest_float(f"x{i:03}", problem.low, problem.high) for i in range(numbers)]
            loss, _, steps, size = self.trained(tuple(choices.items()))
            theta = np.repeat(vector, size // numbers)
            value = float(loss(jnp.asarray(theta, jnp.float32), jax.random.key(number)))
            study.tell(trial, value if math.isfinite(value) else 1e6)
            spent += steps
            if value < best:
                best = value
                leaders.append(Leader(spent, choices, theta))
        return Trace(leaders, spent, trials, time.perf_counter() - begin)

    def both(self, trials: int, seed: int) -> Trace:
        """`bilevel search --warm-start`."""
        problem, leaders, best, spent = self.problem, [], math.inf, 0
        folder = Path(tempfile.mkdtemp()) / "search"
        texts = {name: "|".join(map(_text, values)) for name, values in problem.choices.items()}
        words = [problem.name, *problem.flags, "--folder", str(folder), "--warm-start"]
        words += [word for name, text in texts.items() for word in (f"--space.{name}", text)]
        words += ["--num-meta-steps", str(problem.outer_steps), "--num-trials", str(trials)]
        begin = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            run_search([*words, "--seed", str(seed), "--loop.chunk-size", "1"])
        seconds = time.perf_counter() - begin
        for trial in open_book(read_search(folder)).trials():
            run = trial_folder(folder, trial.number)
            recipe = saved_recipe(run)
            choices = {name: getattr(recipe, name) for name in problem.choices}
            _, experiment, theta, _ = self.parts(tuple(choices.items()))
            spent += work(recipe, theta.size) * trial.user_attrs.get("steps", 0)
            if trial.value is not None and trial.value < best:
                best = trial.value
                meta = read_meta(run, experiment.learner.init_meta(jax.random.key(recipe.seed)))
                leaders.append(Leader(spent, choices, np.asarray(ravel_pytree(meta)[0])))
        return Trace(leaders, spent, trials, seconds)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def logistic(data: str, features: int) -> Problem:
    return Problem(
        name="logistic-l2",
        recipe=LogisticL2(learning_rate=0.7, data=data),
        flags=("--learning-rate", "0.7", "--data", data),
        choices={"rate": (0.05, 0.1, 0.2, 0.4), "num_steps": (50, 100, 200)},
        low=math.log(1e-6),
        high=math.log(10),
        tied=(1, features + 1),
        outer_steps=4,
        trials=8,
        starts=1,  # it starts from zero
    )


def breast_cancer() -> Problem:
    """Stopping early matters here: exact hypergradients, few and long steps. One of seven settings tried."""
    problem = logistic("breast_cancer", 30)
    return replace(
        problem,
        recipe=replace(problem.recipe, learning_rate=1.0, estimator="mixed"),
        flags=("--learning-rate", "1.0", "--data", "breast_cancer", "--estimator", "mixed"),
        outer_steps=3,
        trials=4,
    )


def mnist_table() -> str:
    """3000 pictures of MNIST, halved in size, as a table that the recipe reads."""
    digits = mnist()
    rows = np.random.default_rng(0).permutation(len(digits.train_images))[:3000]
    pixels = digits.train_images[rows].reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(len(rows), -1)
    path = Path(tempfile.mkdtemp()) / "mnist.csv"
    names = ",".join(f"p{i}" for i in range(pixels.shape[1]))
    table = np.column_stack([pixels / 255, digits.train_labels[rows]])
    np.savetxt(
        path,
        table,
        fmt=["%.4f"] * pixels.shape[1] + ["%d"],
        delimiter=",",
        header=f"{names},digit",
        comments="",
    )
    return str(path)


PROBLEMS = {
    "breast_cancer": breast_cancer,
    "digits": lambda: logistic("digits", 64),
    "mnist": lambda: logistic(mnist_table(), 196),
}


def compare(title: str, problem: Problem, quick: bool, seed: int) -> dict[str, tuple[Trace, list]]:
    """Both ways on one problem: a table, and what the picture shows."""
    tried, found = Trainings(problem), {}
    for numbers in problem.tied:
        label = f"TPE over choices and {numbers} number{'s' if numbers > 1 else ''}"
        found[label] = tried.black_box(numbers, 10 if quick else 300, seed)
    found["TPE over choices, hypergradients inside"] = tried.both(2 if quick else problem.trials, seed)
    measured = {
        label: (trace, [tried.measure(each) for each in trace.leaders]) for label, trace in found.items()
    }
    rivals = list(measured)[:-1]
    rival = min(rivals, key=lambda label: measured[label][1][-1][0])
    mark, whole = measured[rival][1][-1][0], found[rival].work
    print(f"\n### {title}\n")
    print("| search | trials | work | seconds | validation loss | test accuracy % | work until at the mark |")
    print("|---|---|---|---|---|---|---|")
    for label, (trace, figures) in measured.items():
        loss, accuracy = figures[-1]
        at = [leader.work for leader, (value, _) in zip(trace.leaders, figures, strict=True) if value <= mark]
        least = f"{at[0]:,} (1/{whole / at[0]:.3g})" if at else "not"
        cells = [label, str(trace.trials), f"{trace.work:,}", f"{trace.seconds:.1f}"]
        print(f"| {' | '.join([*cells, f'{loss:.4f}', f'{accuracy:.2f}', least])} |")
    print(
        f"\nThe mark is {mark:.4f}, what the better black box had found in the end with {whole:,} gradients."
    )
    return measured


def keep(title: str, measured: dict[str, tuple[Trace, list]], path: Path) -> None:
    """What the picture shows of one problem, in place of what was kept of it."""
    kept = read(path)
    kept[title] = {
        label: {
            "work": [*(leader.work for leader in trace.leaders), trace.work],
            "loss": [round(loss, 5) for loss, _ in figures],
        }
        for label, (trace, figures) in measured.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(kept[name])}" for name in PROBLEMS if name in kept)
    path.write_text(f"{{\n{lines}\n}}\n")


def read(path: Path) -> dict[str, dict[str, dict[str, list]]]:
    """By problem and by search: the work when each leader was found and at the end, its measured loss."""
    return json.loads(path.read_text()) if path.exists() else {}


def draw(kept: dict[str, dict[str, dict[str, list]]], folder: Path) -> None:
    """Validation loss of the best trial so far against work."""
    figure, axes = plt.subplots(1, len(kept), figsize=(5.5 * len(kept), 4.2), squeeze=False)
    for axis, (title, searches) in zip(axes[0], kept.items(), strict=True):
        for (label, curve), ink in zip(searches.items(), [*BLACK[:2], INKS[0]], strict=True):
            at, losses = curve["work"], [*curve["loss"], curve["loss"][-1]]
            axis.step(at, losses, ink[1], where="post", color=ink[0], label=label, lw=1.8)
            axis.plot(at[:-1], losses[:-1], "o", color=ink[0], ms=3.5)
        axis.set(title=title, xlabel="work: gradients of the inner loss", ylabel="validation loss")
        axis.set(xscale="log", yscale="log")
        axis.yaxis.set_major_formatter("{x:.3g}")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6, which="both")
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "both_at_once.png", dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a few trials, to see that it runs")
    parser.add_argument("--only", choices=tuple(PROBLEMS))
    parser.add_argument("--draw", action="store_true", help="the picture only, from what is kept")
    parser.add_argument("--seed", type=int, default=0)
    add_folder(parser)
    args = parser.parse_args()
    folder = kept_in(args)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kept = folder / "results" / "both_at_once.json"
    if not args.draw:
        print(f"Machine: {bench.machine()}")
        for name, make in PROBLEMS.items():
            if args.only in (None, name):
                keep(name, compare(name, make(), args.quick, args.seed), kept)
    draw(read(kept), folder)


if __name__ == "__main__":
    main()
