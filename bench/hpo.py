"""Hyperparameters by hypergradients and by black-box search, on four problems with real data.

    logistic-l2            650 penalties of a logistic regression on scikit-learn's digits
    schedules              learning rate and momentum at 5 knots each, over 2000 minibatch steps on MNIST
    layer-decay            a weight decay for each of 3 layers, 500 training pictures of MNIST
    augmentation-strength  7 strengths of random changes, 500 training pictures of MNIST

Every method trains the same inner problem from the same θ. Work is counted in gradients of the inner loss:
K for each black-box trial, and for each hypergradient what the docstring of its estimator says (`work`
below). The validation loss and the test accuracy of every θ are measured apart, from the same fresh random
starts for all methods; that measuring is counted nowhere. For a gradient method it is that of its current
θ, for black-box search that of the best trial so far. Prints Markdown tables, draws docs/hpo_*.png.

    BILEVEL_DATA=folder/of/mnist.npz python bench/hpo.py [--quick] [--only schedules] [--folder docs]
"""

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optuna
import run as bench
from hpo_problems import PROBLEMS, Problem, Search
from jax.flatten_util import ravel_pytree
from kept_in import add_folder, kept_in

import bilevel as bl
from bilevel.train.loop import HypergradientError

matplotlib.use("Agg")
import matplotlib.pyplot as plt

POINTS = 12  # places of a run where θ is measured
# Okabe and Ito: told apart with any kind of colour vision. Line styles tell them apart without colour.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INKS = ((BLUE, "-"), (ORANGE, "-."), (GREEN, "-"), (RED, "--"), (PURPLE, "-"), (SKY, "--"), (BLUE, ":"))
BLACK = (("black", "--"), ("dimgrey", ":"), ("darkgrey", "-."))


class Trace(NamedTuple):
    """How far a method has come: work, and the θ that it would hand over then."""

    work: list[int]
    thetas: list[np.ndarray]
    units: int  # outer steps or trials
    size: int  # of what it moves
    seconds: float
    said: str = ""


def work(recipe, size: int) -> int:
    """Gradients of the inner loss that one outer step costs, after the docstrings of the estimators."""
    K, name, settings = recipe.num_steps, recipe.estimator, recipe.settings
    depth = math.ceil(math.log(K, settings.checkpoint)) if settings.checkpoint else 0
    return {
        "mixed": (4 + depth) * K,
        "unroll": (4 + depth) * K,
        "truncated": K + 3 * settings.truncation,
        "forward": 3 * size * K,
        "implicit-cg": K + 2 * settings.linear_steps + 2,
        "implicit-neumann": K + 2 * settings.linear_steps + 2,
        "implicit-nystrom": K + 2 * settings.linear_steps + 2,
        "one-step": K + 3,
        "finite-difference": K + 7,
        "evolution": 2 * settings.num_pairs * K,
        "pes": 2 * settings.num_pairs * settings.truncation,
    }[name]


def places(count: int) -> list[int]:
    """Up to POINTS numbers of 1..count, the last among them, evenly on a log axis."""
    return sorted({round(x) for x in np.geomspace(1, count, POINTS)})


def descend(recipe, steps: int) -> Trace:
    """Run the recipe as `bilevel train` does, and keep θ on the way."""
    experiment = replace(recipe, num_meta_steps=steps).build()
    start = experiment.learner.init_meta(jax.random.key(recipe.seed))
    size = ravel_pytree(start)[0].size
    cost, kept, times, said = work(recipe, size), set(places(steps)), [], ""
    trace = Trace([0], [np.asarray(ravel_pytree(start)[0])], steps, size, 0.0)

    def note(state, values):
        times.append(1 / values["steps_per_second"])
        if int(state.step) in kept:
            trace.work.append(cost * int(state.step))
            trace.thetas.append(np.asarray(ravel_pytree(state.meta)[0]))

    state = bl.init_state(
        experiment.learner, experiment.optimizer, experiment.sample_tasks, jax.random.key(recipe.seed), start
    )
    try:
        bl.train(
            experiment.learner,
            experiment.optimizer,
            experiment.sample_tasks,
            state,
            steps,
            options=bl.Options(chunk_size=1, zero_leaves="allow"),
            on_chunk=[note],
        )
    except HypergradientError as error:
        said = f"stopped at outer step {len(times)}: {str(error).split('. ')[0]}"
    seconds = float(np.mean(times[1:] or times)) * len(times) if times else 0.0  # the first one compiles
    return trace._replace(seconds=seconds, said=said)


def search(problem: Problem, way: Search, count: int) -> Trace:
    """Optuna asks, the same inner training answers."""
    experiment = problem.recipe.build()
    learner, sample = experiment.learner, experiment.sample_tasks
    first = learner.init_meta(jax.random.key(problem.recipe.seed))
    back = ravel_pytree(first)[1]
    task = jax.tree.map(lambda leaf: leaf[0], sample(jax.random.key(0)))
    loss = jax.jit(lambda theta, task, key: outer_loss(learner, back(theta), task, key)[0])
    float(loss(jnp.asarray(way.tie(way.start)), task, jax.random.key(0)))  # compile
    study = optuna.create_study(sampler=way.sampler())
    names = [f"x{i:03}" for i in range(len(way.start))]
    study.enqueue_trial(dict(zip(names, map(float, way.start), strict=True)))
    begin, best = time.perf_counter(), math.inf
    trace = Trace([0], [way.tie(way.start)], count, len(names), 0.0)
    kept = set(places(count))
    leader = trace.thetas[0]
    for trial_number in range(1, count + 1):
        trial = study.ask()
        bounds = zip(names, way.low, way.high, strict=True)
        vector = np.array([trial.suggest_float(name, low, high) for name, low, high in bounds])
        theta = way.tie(vector)
        value = float(loss(jnp.asarray(theta), task, jax.random.key(trial_number)))
        study.tell(trial, value if math.isfinite(value) else 1e6)
        if value < best:
            best, leader = value, theta
        if trial_number in kept:
            trace.work.append(trial_number * problem.recipe.num_steps)
            trace.thetas.append(leader)
    return trace._replace(seconds=time.perf_counter() - begin)


def outer_loss(learner, meta, task, key):
    """Outer loss and accuracy after one inner training."""
    inner_key, outer_key = jax.random.split(key)
    params = learner.solver.solve(learner.problem, meta, task, inner_key).params
    figures = learner.problem.metrics(params, meta, task.query, outer_key)
    return figures["loss"], figures["accuracy"]


class Figures(NamedTuple):
    """What a θ reaches."""

    loss: float  # on validation data
    test_loss: float
    accuracy: float  # on test data, in percent


def judge(problem: Problem) -> Callable[[np.ndarray], Figures]:
    """θ, flattened, to what it reaches: means over fresh starts."""
    experiment = problem.recipe.build()
    learner = experiment.learner
    back = ravel_pytree(learner.init_meta(jax.random.key(0)))[1]
    task = jax.tree.map(lambda leaf: leaf[0], experiment.sample_tasks(jax.random.key(0)))
    test = experiment.sample_test(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1234), problem.num_starts)

    @jax.jit
    def measure(theta, task, test):
        def one(key):
            meta = back(theta)
            params = learner.solver.solve(learner.problem, meta, task, key).params
            on = lambda query: learner.problem.metrics(params, meta, query, key)  # noqa: E731
            return on(task.query)["loss"], on(test.query)["loss"], 100 * on(test.query)["accuracy"]

        return jax.tree.map(jnp.mean, jax.lax.map(one, keys))

    return lambda theta: Figures(*map(float, measure(jnp.asarray(theta, jnp.float32), task, test)))


def compare(name: str, problem: Problem, folder: Path, fewer: int) -> None:
    """Everything on one problem: a table and a picture."""
    traces = {}
    for label, way in problem.ways.items():
        begin = time.perf_counter()
        traces[label] = descend(replace(problem.recipe, **way.changes), max(2, way.num_meta_steps // fewer))
        print(f"{name}: {label}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    for label, way in problem.searches.items():
        begin = time.perf_counter()
        traces[label] = search(problem, way, max(3, way.num_trials // fewer))
        print(f"{name}: {label}: {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    measure = judge(problem)
    found = {label: [measure(theta) for theta in trace.thetas] for label, trace in traces.items()}
    rival = next(iter(problem.searches))
    mark = found[rival][-1].loss
    print(f"\n### {name}: {problem.title}\n")
    print(
        "| method | numbers it moves | outer steps or trials | work | seconds | validation loss "
        f"| test loss | test accuracy % | work until at the loss of {rival} |\n|{'---|' * 9}"
    )
    first = found[rival][0]
    print(f"| start | | 0 | 0 | | {first.loss:.4f} | {first.test_loss:.4f} | {first.accuracy:.2f} | |")
    for label, trace in traces.items():
        last = found[label][-1]
        reached = [w for w, at in zip(trace.work, found[label], strict=True) if at.loss <= mark]
        least = f"{reached[0]:,} (1/{traces[rival].work[-1] / max(reached[0], 1):.3g})" if reached else "not"
        cells = (label, trace.size, trace.units, f"{trace.work[-1]:,}", f"{trace.seconds:.1f}")
        figures = (f"{last.loss:.4f}", f"{last.test_loss:.4f}", f"{last.accuracy:.2f}", least)
        print(f"| {' | '.join(map(str, cells + figures))} |", flush=True)
    for label, trace in traces.items():
        if trace.said:
            print(f"\n{label} {trace.said}")
    draw(name, problem, traces, found, folder)


def draw(name: str, problem: Problem, traces, found, folder: Path) -> None:
    """Validation loss against work, both axes logarithmic."""
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    inks = [*INKS[: len(problem.ways)], *BLACK[: len(problem.searches)]]
    for (label, trace), (colour, style) in zip(traces.items(), inks, strict=True):
        line = [at.loss for at in found[label]][1:]
        marker = "o" if label in problem.ways else "s"
        axis.plot(trace.work[1:], line, style, color=colour, label=label, lw=1.8, marker=marker, ms=3.5)
    start = next(iter(found.values()))[0].loss
    axis.axhline(start, color="grey", lw=0.8)
    axis.annotate("start", (0.005, start), xycoords=("axes fraction", "data"), va="bottom", color="dimgrey")
    values = [at.loss for rows in found.values() for at in rows if math.isfinite(at.loss)]
    axis.set(
        title=f"{name}: {problem.title}",
        xlabel="work: gradients of the inner loss",
        ylabel="validation loss",
        xscale="log",
        yscale="log",
        ylim=(0.97 * min(values), 1.15 * start),
    )
    axis.xaxis.set_minor_formatter("")
    axis.yaxis.set_major_formatter("{x:.3g}")
    axis.yaxis.set_minor_formatter("{x:.3g}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6, which="both")
    axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(folder / f"hpo_{name.replace('-', '_')}.png", dpi=130, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Prints the tables and draws the pictures."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="a tenth of the outer steps and trials")
    options.add_argument("--only", nargs="*", choices=tuple(PROBLEMS), default=tuple(PROBLEMS))
    add_folder(options)
    args = options.parse_args()
    folder = kept_in(args)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore")  # the estimators say where they are biased; the tables show it
    print(f"Machine: {bench.machine()}")
    for name in args.only:
        begin = time.perf_counter()
        compare(name, PROBLEMS[name](args.quick), folder, 10 if args.quick else 1)
        print(f"\n{time.perf_counter() - begin:.0f} s with compilation and measuring", flush=True)


if __name__ == "__main__":
    main()
