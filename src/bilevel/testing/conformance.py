"""Which estimator must give which answer on which problem. A new estimator is one row of `ESTIMATORS`."""

import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.hypergrad import (
    FirstOrder,
    FirstOrderWarning,
    Mixed,
    MultiStep,
    Unroll,
    hypergradient,
)
from bilevel.problem import Estimator
from bilevel.testing.problems import Answer, Case, dead_relu, quadratic


class Row(NamedTuple):
    """An estimator and the answer it promises: "exact", "first_order" or "every_step" of a `Case`."""

    estimator: Estimator
    promises: str


ESTIMATORS: dict[str, Row] = {
    "unroll": Row(Unroll(), "exact"),
    "unroll-checkpoint-1": Row(Unroll(checkpoint=1), "exact"),
    "unroll-checkpoint-3": Row(Unroll(checkpoint=3), "exact"),
    "mixed": Row(Mixed(), "exact"),
    "mixed-checkpoint-1": Row(Mixed(checkpoint=1), "exact"),
    "mixed-checkpoint-3": Row(Mixed(checkpoint=3), "exact"),
    "first-order": Row(FirstOrder(), "first_order"),
    "multi-step": Row(MultiStep(), "every_step"),
    "multi-step-unroll": Row(MultiStep(adjoint=Unroll(checkpoint=3)), "every_step"),
}

# Made when asked for: some answers take a while to compute.
PROBLEMS: dict[str, Callable[[], Case]] = {
    **{
        f"quadratic-{optimizer}-{num_steps}": partial(quadratic, num_steps, optimizer=optimizer)
        for optimizer in ("sgd", "momentum", "schedule")
        for num_steps in (1, 5, 20)
    },
    **{
        f"dead-relu-{optimizer}-{num_steps}": partial(dead_relu, num_steps, optimizer=optimizer)
        for optimizer in ("sgd", "momentum", "adam", "rates")
        for num_steps in (1, 5, 20)
    },
}


def assert_matches(estimator: Estimator, case: Case, promises: str = "exact") -> None:
    """Hold an estimator to the answer of a case, in float64 and under `jit`.

    Args:
        estimator: any estimator that takes the case's solver.
        case: see `quadratic` and `dead_relu`.
        promises: which answer of the case: "exact", "first_order" or "every_step".

    Raises:
        AssertionError: naming the leaf that is off, and by how much.
        ValueError: when the case has no such answer.

    >>> assert_matches(Unroll(), quadratic(num_steps=5))
    >>> assert_matches(FirstOrder(), quadratic(num_steps=5))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: FirstOrder: grad['init'] is off by ... of its largest element ...
    """
    expected: Answer | None = getattr(case, promises)
    if expected is None:
        raise ValueError(f"this case has no {promises!r} answer; ask for 'exact'")
    name = type(estimator).__name__
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore", FirstOrderWarning)
        meta, task = jax.tree.map(jnp.asarray, (case.meta, case.task))

        @jax.jit
        def run(meta, task):
            key = jax.random.key(0)
            return hypergradient(case.problem, case.solver, estimator, meta, task, key)

        got = jax.tree.map(np.asarray, run(meta, task))
    assert_close(f"{name}: value", got.value, expected.value, case.tolerance)
    assert_trees_close(f"{name}: grad", got.grad, expected.grad, case.tolerance)


def assert_trees_close(name: str, got, expected, tolerance: float) -> None:
    """Every leaf is within `tolerance` of the largest element of the expected leaf.

    >>> assert_trees_close("grad", {"a": 1.0}, {"a": 2.0}, 1e-6)
    Traceback (most recent call last):
    AssertionError: grad['a'] is off by 0.5 of its largest element 2 (tolerance 1e-06)
    """
    got_leaves, got_tree = jax.tree.flatten(got)
    expected_leaves, expected_tree = jax.tree_util.tree_flatten_with_path(expected)
    if got_tree != expected_tree:
        raise AssertionError(f"{name} must have the structure {expected_tree}, got {got_tree}")
    for leaf, (path, expected_leaf) in zip(got_leaves, expected_leaves, strict=True):
        assert_close(f"{name}{jax.tree_util.keystr(path)}", leaf, expected_leaf, tolerance)


def assert_close(name: str, got, expected, tolerance: float) -> None:
    """As `assert_trees_close`, for one array.

    >>> assert_close("value", 1.0, 1.0 + 1e-12, 1e-10)
    """
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.shape != expected.shape:
        raise AssertionError(f"{name} must have shape {expected.shape}, got {got.shape}")
    if not np.all(np.isfinite(got)):
        raise AssertionError(f"{name} is not finite: {got}")
    largest = np.max(np.abs(expected), initial=0.0)
    error = np.max(np.abs(got - expected), initial=0.0)
    # Where the exact leaf is zero, rounding of about 1e-9 is what differences in float64 leave.
    if error > tolerance * max(largest, 1e-3):
        off = f"{error / largest:.3g} of its largest element {largest:.6g}" if largest else f"{error}"
        raise AssertionError(f"{name} is off by {off} (tolerance {tolerance:g})")
