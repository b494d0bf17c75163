"""`bilevel check RECIPE` and `bilevel advise RECIPE`: the same questions, asked of a recipe's experiment."""

from collections.abc import Callable
from typing import Any

import jax

from bilevel.analysis.advise import Advice, Trial, advise
from bilevel.analysis.check import check
from bilevel.analysis.check_report import CheckReport
from bilevel.problem import Key, Learner, Meta, Task


def run_check(
    experiment: Any, *, seed: int = 0, num_tasks: int = 2, repeats: int = 16, tolerance: float = 1e-3
) -> CheckReport:
    """Check a recipe's own estimator where its training starts.

    Args:
        experiment: what a recipe's `build()` returns: `learner` and `sample_tasks` are read.
        seed: of the first meta and of the tasks.

    Raises:
        ValueError: when the learner has no `init_meta`.
    """
    learner, meta, tasks, key = _start(experiment, seed)
    return check(
        learner.problem, learner.solver, learner.estimator, meta, tasks, key,
        num_tasks=num_tasks, repeats=repeats, tolerance=tolerance,
    )  # fmt: skip


def run_advise(
    experiment: Any,
    *,
    seed: int = 0,
    memory: str | None = None,
    seconds: float | None = None,
    num_tasks: int = 2,
    repeats: int = 16,
    task_chunk: int = 1,
    on_trial: Callable[[Trial], None] | None = None,
) -> Advice:
    """Compare the estimators on a recipe's problem, where its training starts.

    Args:
        experiment: what a recipe's `build()` returns.
        memory, seconds, on_trial: see `bl.advise`.

    Raises:
        ValueError: when the learner has no `init_meta`, or `memory` cannot be read.
    """
    learner, meta, tasks, key = _start(experiment, seed)
    return advise(
        learner.problem, learner.solver, meta, tasks, key,
        memory=memory, seconds=seconds, num_tasks=num_tasks, repeats=repeats, task_chunk=task_chunk,
        on_trial=on_trial,
    )  # fmt: skip


def _start(experiment: Any, seed: int) -> tuple[Learner, Meta, Task, Key]:
    learner: Learner = experiment.learner
    if learner.init_meta is None:
        raise ValueError("this recipe's learner has no init_meta, so there is no meta to look at")
    meta_key, task_key, key = jax.random.split(jax.random.key(seed), 3)
    return learner, learner.init_meta(meta_key), experiment.sample_tasks(task_key), key
