"""The four problems of `hpo.py`: recipes on real data, what is changed in each way, what is searched."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import optuna

from bilevel.recipes.augmentation_strength import AugmentationStrength
from bilevel.recipes.estimators import Settings
from bilevel.recipes.layer_decay import LayerDecay
from bilevel.recipes.logistic_l2 import LogisticL2
from bilevel.recipes.schedules import Schedules


class Way(NamedTuple):
    """A hypergradient method: changes of the recipe, and how many outer steps it takes."""

    num_meta_steps: int
    changes: dict[str, Any]


class Search(NamedTuple):
    """A black-box search: Optuna's sampler, trials, and what of θ it sees.

    Args:
        tie: `tie(vector) -> θ` flattened: fewer numbers than θ has.
        start: the vector that gives the first θ; it is the first trial.
        low, high: bounds of each number.
    """

    sampler: Callable[[], optuna.samplers.BaseSampler]
    num_trials: int
    tie: Callable[[np.ndarray], np.ndarray]
    start: np.ndarray
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Problem:
    """One problem, and everything that is tried on it."""

    title: str
    recipe: Any
    ways: dict[str, Way]
    searches: dict[str, Search]
    num_starts: int = 3


def tpe():
    return optuna.samplers.TPESampler(seed=0)


def random():
    return optuna.samplers.RandomSampler(seed=0)


def whole(sampler, trials: int, start, low, high) -> Search:
    """A search that sees all of θ."""
    start = np.asarray(start, float)
    every = np.broadcast_to
    return Search(
        sampler, trials, lambda vector: vector, start, every(low, start.shape), every(high, start.shape)
    )


def logistic_l2() -> Problem:
    recipe = LogisticL2(learning_rate=0.2)
    features, classes = 65, 10
    first = math.log(recipe.penalty)
    bounds = (math.log(1e-6), math.log(10))

    def tied(sampler, trials, count):
        spread = lambda vector: np.repeat(vector, features * classes // count)  # noqa: E731
        return whole(sampler, trials, np.full(count, first), *bounds)._replace(tie=spread)

    ways = {
        "implicit, cg": {"estimator": "implicit-cg"},
        "implicit, Neumann": {"estimator": "implicit-neumann", "settings": Settings(step_size=0.2)},
        "implicit, Nystrom": {"estimator": "implicit-nystrom", "settings": Settings(damping=0.003)},
        "one step": {"estimator": "one-step", "settings": Settings(step_size=1.0)},
        "mixed": {"estimator": "mixed"},
        "truncated, 20 steps": {"estimator": "truncated", "settings": Settings(truncation=20)},
    }
    return Problem(
        "650 penalties, digits, K = 200",
        recipe,
        {name: Way(60, changes) for name, changes in ways.items()},
        {
            "TPE, one penalty": tied(tpe, 200, 1),
            "random, one penalty": tied(random, 200, 1),
            "TPE, 65 penalties": tied(tpe, 200, 65),
        },
        num_starts=1,  # it starts from zero
    )


def schedules(num_steps: int) -> Problem:
    recipe = Schedules(num_steps=num_steps)
    knots = recipe.num_knots
    odds = math.log(recipe.momentum / (1 - recipe.momentum))
    start = np.repeat([math.log(recipe.rate), odds], knots)
    low, high = np.repeat([math.log(1e-3), -2.0], knots), np.repeat([math.log(1.0), 4.0], knots)
    pes = {
        "estimator": "pes",
        "settings": Settings(truncation=100, sigma=0.1, num_pairs=4),
        "outer_batch": 250,
        "learning_rate": 0.03,
    }
    es = {
        "estimator": "evolution",
        "settings": Settings(sigma=0.1, num_pairs=4),
        "learning_rate": 0.3,
    }
    return Problem(
        f"10 numbers, MNIST, K = {num_steps}",
        recipe,
        {
            "mixed, tree of states": Way(24, {}),
            "forward": Way(12, {"estimator": "forward", "learning_rate": 0.4}),
            "truncated, 100 steps": Way(40, {"estimator": "truncated"}),
            "PES, windows of 100": Way(200, pes),
            "ES": Way(16, es),
        },
        {
            "TPE": whole(tpe, 100, start, low, high),
            "random": whole(random, 100, start, low, high),
        },
        num_starts=2,
    )


def layer_decay() -> Problem:
    recipe = LayerDecay(learning_rate=0.4)
    start = np.full(3, math.log(recipe.decay))
    bounds = (math.log(1e-5), math.log(0.3))
    return Problem(
        "3 decays, 500 pictures of MNIST, K = 200",
        recipe,
        {
            "mixed": Way(40, {}),
            "forward": Way(40, {"estimator": "forward"}),
            "truncated, 20 steps": Way(40, {"estimator": "truncated", "settings": Settings(truncation=20)}),
            "implicit, cg": Way(40, {"estimator": "implicit-cg"}),
            "implicit, Nystrom": Way(
                40, {"estimator": "implicit-nystrom", "settings": Settings(damping=0.03)}
            ),
            "one step": Way(40, {"estimator": "one-step", "settings": Settings(step_size=1.0)}),
        },
        {"TPE": whole(tpe, 120, start, *bounds), "random": whole(random, 120, start, *bounds)},
    )


def augmentation_strength() -> Problem:
    recipe = AugmentationStrength(learning_rate=0.06, num_steps=200, batch_size=32)
    start = np.full(7, math.log(recipe.strength))
    bounds = (math.log(0.003), math.log(0.6))
    return Problem(
        "7 strengths, 500 pictures of MNIST, K = 200",
        recipe,
        {
            "mixed": Way(30, {}),
            "forward": Way(30, {"estimator": "forward"}),
            "truncated, 20 steps": Way(60, {"estimator": "truncated", "settings": Settings(truncation=20)}),
            "finite difference": Way(60, {"estimator": "finite-difference"}),
            "ES": Way(20, {"estimator": "evolution", "settings": Settings(sigma=0.1, num_pairs=4)}),
        },
        {"TPE": whole(tpe, 120, start, *bounds), "random": whole(random, 120, start, *bounds)},
    )


# By name; the argument says whether it is to be quick.
PROBLEMS: dict[str, Callable[[bool], Problem]] = {
    "logistic-l2": lambda quick: logistic_l2(),
    "schedules": lambda quick: schedules(200 if quick else 2000),
    "layer-decay": lambda quick: layer_decay(),
    "augmentation-strength": lambda quick: augmentation_strength(),
}
