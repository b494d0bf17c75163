"""What the recipes on sinusoids share: the tasks, and what is reported."""

from functools import partial
from typing import Any

import optax

import bilevel as bl
from bilevel.problem import Learner
from bilevel.recipes.experiment import Experiment


def sinusoid_experiment(
    learner: Learner,
    optimizer: optax.GradientTransformation,
    *,
    shots: int,
    queries: int,
    num_tasks: int,
    eval_steps: int,
    eval_tasks: int,
    train_shots: int | None = None,
    hidden: tuple[int, ...] = (40, 40),
    **more: Any,
) -> Experiment:
    """Regression of y = a sin(x − b) from a few points.

    Args:
        shots: support points of a test task.
        queries: query points of a task in training.
        num_tasks: of an outer step.
        eval_steps: inner steps at evaluation.
        eval_tasks: test tasks.
        train_shots: support points of a training task; `shots` when None.
        hidden: widths of the random start that is trained on a test task's support for comparison.
        more: further fields of `Experiment`.
    """
    sample = partial(bl.tasks.sinusoid, shots=train_shots or shots, queries=queries)
    net, loss = bl.nets.mlp([1, *hidden, 1]), bl.learners.mean_squared_error
    fields = {
        "sample_tasks": bl.tasks.batch(sample, num_tasks),
        # Many query points measure the error over the whole interval, not at ten places.
        "sample_test": partial(bl.tasks.sinusoid, shots=shots, queries=100),
        "protocol": f"{shots} points of a new sinusoid, mean squared error at 100 others",
        "eval_steps": eval_steps,
        "eval_tasks": eval_tasks,
        "scratch": bl.learners.from_scratch(net, loss, optax.adam(1e-2), 50),
        "pictures": "regression",
    }
    return Experiment(learner, optimizer, **(fields | more))
