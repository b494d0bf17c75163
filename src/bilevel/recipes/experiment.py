"""What a recipe is, and what it builds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import optax

from bilevel.problem import Key, Learner, Meta, Task


@dataclass(frozen=True)
class Experiment:
    """All parts of a run, put together.

    Args:
        learner: problem, solver, estimator, with `init_meta` and, for pictures, `predict`.
        optimizer: of the outer loop.
        sample_tasks: batches of training tasks.
        sample_test: one task of unseen classes or functions.
        protocol: in words, what the figures are measured on.
        eval_steps: inner steps at evaluation.
        eval_tasks: test tasks.
        sample_seen: one task of training classes, of the size of a test task: the gap to `sample_test` is
            meta-overfitting. Left out, it is derived from `sample_tasks` where its sampler allows.
        sample_validation: one task of classes neither trained on nor tested on, for early stopping.
        test_shots: `test_shots(shots) -> sampler`, test tasks with other support sizes. Left out, it is
            derived from `sample_test` where that has a field `shots`.
        other_tests: the same with something changed, named in words, to show what depends on it.
        scratch: a learner that starts from a random model for every task: the baseline without
            meta-learning. Its meta is empty.
        chance: what guessing reaches, by name of the figure.
        pictures: how the report draws a task.
        meta_figures: `meta_figures(meta) -> {name: number}`, what the meta-parameters themselves say, such as
            the F1 of the corruption that was found.
        meta_lines: `meta_lines(meta) -> {name: array [n]}`, what was learned as curves, such as a schedule
            over the inner steps.
        meta_pictures: `meta_pictures(meta) -> {caption: array [n, height, width] of 0..1}`, such as distilled
            images.
    """

    learner: Learner
    optimizer: optax.GradientTransformation
    sample_tasks: Callable[[Key], Task]
    sample_test: Callable[[Key], Task]
    protocol: str
    eval_steps: int
    eval_tasks: int = 1000
    other_tests: dict[str, Callable[[Key], Task]] = field(default_factory=dict)
    scratch: Learner | None = None
    chance: dict[str, float] = field(default_factory=dict)
    pictures: Literal["classification", "regression", "none"] = "none"
    sample_seen: Callable[[Key], Task] | None = None
    sample_validation: Callable[[Key], Task] | None = None
    test_shots: Callable[[int], Callable[[Key], Task]] | None = None
    meta_figures: Callable[[Meta], dict[str, Any]] | None = None
    meta_lines: Callable[[Meta], dict[str, Any]] | None = None
    meta_pictures: Callable[[Meta], dict[str, Any]] | None = None


class Recipe(Protocol):
    """A frozen dataclass whose fields are the flags of `bilevel train`.

    Besides `num_meta_steps` and `seed` it may have any fields; `loop`, a `bl.Options`, is used where there
    is one.
    """

    @property
    def num_meta_steps(self) -> int: ...

    @property
    def seed(self) -> int: ...

    def build(self) -> Experiment:
        """Put the experiment together; data is read here."""
        ...
