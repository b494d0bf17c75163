"""Which estimator must give which answer on which problem. A new estimator is one row of `ESTIMATORS`."""

import warnings
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bilevel.hypergrad import (
    AmIGO,
    AnnealedOrder,
    EvolutionStrategies,
    FirstOrder,
    FirstOrderWarning,
    Forward,
    HypergradientWarning,
    Implicit,
    MaSoba,
    Mixed,
    MultiStep,
    Saba,
    Soba,
    StocBiO,
    Truncated,
    Unroll,
    bicgstab,
    cg,
    direct,
    gmres,
    neumann,
)
from bilevel.inner import Gradient, Sqrt, Tree
from bilevel.problem import Estimator, InnerSolver
from bilevel.testing.implicit_problems import IMPLICIT_PROBLEMS
from bilevel.testing.problems import Answer, Case, dead_relu, quadratic


class Row(NamedTuple):
    """An estimator and what it promises.

    Args:
        estimator: any.
        promises: "exact", "first_order" or "every_step" of a `Case`; "implicit" is `exact` of a case whose
            inner problem is solved; "expected" is `exact` in the mean over independent calls.
        solver: in place of the case's, for estimators that bring their own inner loop along.
        calls: how many calls, each with the state of the one before, until the promise holds.
        slow: its steps grow with the condition of the inner Hessian, so ill-conditioned cases are left out.
    """

    estimator: Estimator
    promises: str
    solver: Gradient | None = None
    calls: int = 1
    slow: bool = False


_STEP, _FIVE = Gradient(optax.sgd(0.2), 1), Gradient(optax.sgd(0.2), 5)

ESTIMATORS: dict[str, Row] = {
    "unroll": Row(Unroll(), "exact"),
    "unroll-checkpoint-1": Row(Unroll(checkpoint=1), "exact"),
    "unroll-checkpoint-3": Row(Unroll(checkpoint=3), "exact"),
    "mixed": Row(Mixed(), "exact"),
    "mixed-checkpoint-1": Row(Mixed(checkpoint=1), "exact"),
    "mixed-checkpoint-3": Row(Mixed(checkpoint=3), "exact"),
    "unroll-sqrt": Row(Unroll(checkpoint=Sqrt()), "exact"),
    "mixed-sqrt": Row(Mixed(checkpoint=Sqrt()), "exact"),
    "unroll-tree": Row(Unroll(checkpoint=Tree(2)), "exact"),
    "mixed-tree": Row(Mixed(checkpoint=Tree(2)), "exact"),
    "forward": Row(Forward(), "exact"),
    "forward-chunk-2": Row(Forward(chunk=2), "exact"),
    "truncated-nothing": Row(Truncated(20), "exact"),
    "implicit-cg": Row(Implicit(cg(60)), "implicit"),
    "implicit-gmres": Row(Implicit(gmres(20)), "implicit"),
    "implicit-bicgstab": Row(Implicit(bicgstab(60)), "implicit"),
    "implicit-direct": Row(Implicit(direct()), "implicit"),
    "implicit-neumann": Row(Implicit(neumann(4000, 0.2)), "implicit", slow=True),
    "soba": Row(Soba(0.2), "implicit", _STEP, calls=1000, slow=True),
    "saba": Row(Saba(0.2), "implicit", _STEP, calls=1000, slow=True),
    "ma-soba": Row(MaSoba(0.2), "implicit", _STEP, calls=1000, slow=True),
    "amigo": Row(AmIGO(0.2, linear_steps=5), "implicit", _FIVE, calls=300, slow=True),
    "stocbio": Row(StocBiO(0.2, num_neumann=3000), "implicit", _FIVE, calls=300, slow=True),
    "evolution-strategies": Row(EvolutionStrategies(sigma=0.3, num_pairs=2), "expected", calls=4000),
    "first-order": Row(FirstOrder(), "first_order"),
    "annealed-order": Row(AnnealedOrder(Mixed(), 0), "exact"),
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
    **IMPLICIT_PROBLEMS,
}


def applies(row: Row, case: Case) -> bool:
    """Whether the case has the answer that the row promises, and a solver that its estimator takes.

    >>> applies(ESTIMATORS["soba"], quadratic(num_steps=5)), applies(ESTIMATORS["mixed"], quadratic(5))
    (False, True)
    """
    answered = {
        "implicit": case.converged,
        "expected": case.quadratic,
        "exact": True,
    }.get(row.promises, getattr(case, row.promises, None) is not None)
    if not answered or (row.slow and case.condition > 1000):
        return False
    try:
        row.estimator.check(case.problem, row.solver or case.solver)
    except (TypeError, ValueError):
        return False
    return True


def assert_row(row: Row, case: Case) -> None:
    """Hold a row of the table to its promise on a case, in float64 and under `jit`.

    Raises:
        AssertionError: naming the leaf that is off, and by how much.
        ValueError: when the case has no such answer.

    >>> assert_row(ESTIMATORS["mixed"], quadratic(num_steps=5))
    """
    if row.promises == "expected":
        assert_expected(row.estimator, case, row.calls)
    else:
        assert_matches(row.estimator, case, row.promises, solver=row.solver, calls=row.calls)


def assert_matches(
    estimator: Estimator,
    case: Case,
    promises: str = "exact",
    *,
    solver: InnerSolver | None = None,
    calls: int = 1,
) -> None:
    """Hold an estimator to the answer of a case, in float64 and under `jit`.

    Args:
        estimator: any estimator that takes the solver.
        case: see `quadratic` and `dead_relu`.
        promises: which answer of the case: "exact", "implicit", "first_order" or "every_step".
        solver: in place of the case's.
        calls: the last of so many is held to it, each with the state of the one before.

    Raises:
        AssertionError: naming the leaf that is off, and by how much.
        ValueError: when the case has no such answer.

    >>> assert_matches(Unroll(), quadratic(num_steps=5))
    >>> assert_matches(FirstOrder(), quadratic(num_steps=5))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    AssertionError: FirstOrder: grad['init'] is off by ... of its largest element ...
    """
    implicit = promises == "implicit"
    expected: Answer | None = case.exact if implicit and case.converged else getattr(case, promises, None)
    if expected is None:
        raise ValueError(f"this case has no {promises!r} answer; ask for 'exact'")
    name, used = type(estimator).__name__, solver or case.solver

    @jax.jit
    def run(meta, task):
        def call(state, key):
            h, state = estimator.estimate(case.problem, used, meta, task, state, key)
            return state, h

        keys = jax.random.split(jax.random.key(0), calls)
        state = estimator.init(case.problem, used, meta, task, jax.random.key(1))
        if calls == 1:  # a loop around it would be compiled beside it
            return call(state, keys[0])[1]
        _, found = jax.lax.scan(call, state, keys[(np.arange(calls) + 1) % calls])
        return jax.tree.map(lambda leaf: leaf[-1], found)

    got = _in_float64(run, case)
    # An iteration ends at the solution up to the rounding of its residual.
    tolerance = max(case.tolerance, 1e-8) if implicit else case.tolerance
    assert_close(f"{name}: value", got.value, expected.value, tolerance)
    assert_trees_close(f"{name}: grad", got.grad, expected.grad, tolerance)


def assert_expected(estimator: Estimator, case: Case, calls: int) -> None:
    """Hold the mean of independent calls of a stochastic estimator to `case.exact`.

    Every element must lie within the half-width of a 99.9% interval for all of them together.

    Args:
        estimator: unbiased on this case.
        case: see `implicit_quadratic`.
        calls: how many.

    Raises:
        AssertionError: naming the leaf, how far its mean is off and the half-width.

    >>> from bilevel.hypergrad import EvolutionStrategies
    >>> assert_expected(EvolutionStrategies(sigma=0.1, num_pairs=4), PROBLEMS["implicit-quadratic"](), 500)
    """

    @jax.jit
    def run(meta, task):
        def call(key):
            state = estimator.init(case.problem, case.solver, meta, task, key)
            return estimator.estimate(case.problem, case.solver, meta, task, state, key)[0].grad

        return jax.lax.map(call, jax.random.split(jax.random.key(0), calls), batch_size=100)

    grads = _in_float64(run, case)
    quantile = NormalDist().inv_cdf(1 - 0.0005 / sum(np.size(g) for g in jax.tree.leaves(case.exact.grad)))
    named = jax.tree_util.tree_leaves_with_path(grads)
    for (path, samples), exact in zip(named, jax.tree.leaves(case.exact.grad), strict=True):
        error = np.abs(samples.mean(0) - exact)
        half_width = quantile * samples.std(0, ddof=1) / calls**0.5 + 1e-12
        if not np.all(error <= half_width):
            worst = np.argmax(error / half_width)
            raise AssertionError(
                f"{type(estimator).__name__}: the mean of grad{jax.tree_util.keystr(path)} is off by "
                f"{error.ravel()[worst]:.3g}, beyond the 99.9% interval of ±{half_width.ravel()[worst]:.3g}"
            )


def _in_float64(run: Callable, case: Case):
    """`run(meta, task)` in float64, without the warnings that a table of estimators is bound to cause."""
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore", FirstOrderWarning)
        warnings.simplefilter("ignore", HypergradientWarning)
        return jax.tree.map(np.asarray, run(*jax.tree.map(jnp.asarray, (case.meta, case.task))))


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
