"""`bl.check`: is this estimator right on my problem, and what should I know about it?"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bilevel.analysis.check_report import CheckReport
from bilevel.analysis.compare import Comparison, compare
from bilevel.analysis.measure import estimates, one_line
from bilevel.analysis.objective import (
    first_tasks,
    in_arrays,
    in_float64,
    objective,
    require_scalar_losses,
    task_at,
)
from bilevel.analysis.second_order import Finding, find_operations
from bilevel.analysis.tracing import count_traces, impure_functions
from bilevel.analysis.verdict import judge
from bilevel.hypergrad.requirements import require_count, require_positive
from bilevel.problem import Estimator, InnerSolver, Key, Learner, Meta, Problem, Task
from bilevel.train.step import num_tasks as count_tasks


def check(
    problem: Problem,
    solver: InnerSolver,
    estimator: Estimator,
    meta: Meta,
    tasks: Task,
    key: Key,
    *,
    num_tasks: int = 2,
    repeats: int = 16,
    warmup: int = 100,
    tolerance: float = 1e-3,
) -> CheckReport:
    """Hold an estimator, on your own problem, against finite differences and the exact unroll.

        ⟨ĝ, u⟩  against  (F(θ + h u) − F(θ − h u)) / 2h,   F(θ) = mean over tasks of outer_loss(solve(θ))

    F is the outer loss of what actually runs, in float64. Each slope is measured with several h: where they
    disagree, or where the loss has a kink, the differences are called unreliable, not the estimator wrong.
    An estimator that is random is called again and again with independent keys.

    Args:
        meta: where to look, any tree of floats.
        tasks: a batch, leaves `[num_tasks, n, ...]`.
        num_tasks: how many of them are used.
        repeats: calls of a random estimator; its bias is known to about noise / √repeats.
        warmup: calls before the one that counts, at the same meta, for an estimator with a state.
        tolerance: the relative error up to which a hypergradient is trusted without a condition.

    Returns:
        A `CheckReport`; print it, or read `trust`, `verdict` and the figures. It is returned for a problem
        that cannot run as well: what fails is the verdict then.

    Cost: 11 inner solves a direction, at most 30 directions, and `repeats` calls of the estimator; four
    compilations. Memory is that of the estimator and of the exact unroll, in float64.

    >>> import bilevel as bl, jax.numpy as jnp, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta["init"],
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * (params - batch) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: 0.5 * (params - batch) ** 2)
    >>> solver = bl.inner.Gradient(lambda meta: optax.sgd(meta["rate"]), num_steps=3)
    >>> meta = {"init": jnp.float32(4.0), "rate": jnp.float32(0.5)}
    >>> tasks, key = bl.Task(jnp.array([0.0, 1.0]), jnp.array([1.0, 2.0])), jax.random.key(0)
    >>> print(check(problem, solver, bl.hypergrad.Mixed(), meta, tasks, key).verdict)
    Trust it.
    >>> print(check(problem, solver, bl.hypergrad.FirstOrder(), meta, tasks, key).trust)
    no
    """
    require_count("check", num_tasks=num_tasks, repeats=repeats)
    require_positive("check", tolerance=tolerance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what they say is in the report, once
        return _check(problem, solver, estimator, meta, tasks, key, num_tasks, repeats, warmup, tolerance)


def _check(
    problem, solver, estimator, meta, tasks, key, num_tasks, repeats, warmup, tolerance
) -> CheckReport:
    name = repr(estimator)
    try:
        learner = Learner(problem, solver, estimator)
    except Exception as error:
        return _failed(name, f"it refuses this problem ({one_line(error)})")
    try:
        given = count_tasks(tasks)
        tasks = first_tasks(tasks, num_tasks)
        task = task_at(tasks, 0)
        require_scalar_losses(problem, solver, meta, task, key)
    except Exception as error:
        return _failed(name, f"the problem itself cannot run ({one_line(error)})")
    with jax.enable_x64(True):
        operations = _or(
            lambda: find_operations(problem, solver, in_float64(meta), in_float64(task), key), ()
        )
    traces = _trace_faults(learner, meta, task, key)
    try:
        with jax.enable_x64(True):
            jax.eval_shape(objective(problem, solver, in_float64(tasks)), in_float64(meta), key)
        wide, notes = True, (f"on {min(num_tasks, given)} of the {given} tasks that are given",)
    except Exception as error:
        wide, notes = (
            False,
            (f"it does not run in float64, so all is in its own precision: {one_line(error)}",),
        )
    try:
        jax.eval_shape(objective(problem, solver, in_arrays(tasks)), in_arrays(meta), key)
    except Exception as error:
        reason = f"the problem itself cannot run ({one_line(error)})"
        return _failed(name, reason, operations, traces, notes)
    with jax.enable_x64(wide):
        cast = in_float64 if wide else in_arrays
        try:
            found = _compare(learner, cast(meta), cast(tasks), key, repeats, warmup, tolerance)
        except Exception as error:
            blocking = [str(op) for op in operations if op.kind in ("no derivative", "own rule")]
            because = f", because of {'; '.join(blocking)}" if blocking else ""
            return _failed(name, f"it cannot run ({one_line(error)}){because}", operations, traces, notes)
        comparison, moved = found
    if moved:
        notes += ("the outer loss has a kink exactly at this meta, so all was compared a step of 1e-3 away",)
    narrow = _own_precision(learner, meta, tasks, key, comparison) if wide and not moved else float("nan")
    return _report(learner, comparison, operations, traces, notes, narrow, tolerance, wide)


def _compare(learner, meta, tasks, key, repeats, warmup, tolerance) -> tuple[Comparison, bool]:
    """At meta, or beside it where the loss has a kink that the estimator could be blamed for."""
    here = compare(learner, meta, tasks, key, repeats, warmup)
    if not here.reference.kinks or here.agreement.relative_error <= tolerance:
        return here, False
    leaves, tree = jax.tree.flatten(meta)
    keys = jax.random.split(jax.random.fold_in(key, 3), len(leaves))
    beside = [leaf + 1e-3 * jax.random.normal(k, leaf.shape, leaf.dtype) for leaf, k in zip(leaves, keys)]
    there = compare(learner, jax.tree.unflatten(tree, beside), tasks, key, repeats, warmup)
    return (there, True) if there.reference.kinks < here.reference.kinks else (here, False)


def _own_precision(learner, meta, tasks, key, comparison) -> float:
    """How far the hypergradient in the user's precision is from float64's: the same call, twice."""
    if comparison.reference.draws or len(comparison.estimates.grads) > 1 or comparison.estimates.stateful:
        return float("nan")  # random numbers of another precision are other numbers
    try:
        found = estimates(learner, in_arrays(meta), in_arrays(tasks), key[None], 0).grads[0]
    except Exception:
        return float("nan")
    wide = comparison.estimates.grads[0]
    size = np.linalg.norm(wide)
    return float(np.linalg.norm(found - wide) / size) if size else float("nan")


def _trace_faults(learner, meta, task, key) -> tuple[str, ...]:
    impure = _or(lambda: impure_functions(learner.problem, learner.solver, meta, task, key), [])
    said = [
        f"{name} is not the same each time it is traced: it reads something that changes between calls "
        "(NumPy's random numbers, a counter); take randomness from `key`"
        for name in impure
    ]
    return (*said, *_or(lambda: count_traces(learner, meta, task, key), []))


def _not_finite(stats: dict[str, float]) -> list[str]:
    return [
        f"stats[{name!r}] is {value}: a part of the problem is not finite here"
        for name, value in stats.items()
        if not np.isfinite(value)
    ]


def _report(learner, comparison, operations, traces, notes, narrow, tolerance, wide) -> CheckReport:
    ref, found, agreed = comparison.reference, comparison.estimates, comparison.agreement
    speak: Callable[[dict[str, float]], list[str]] = getattr(learner.estimator, "doubts", lambda stats: [])
    if ref.kinks:
        notes += (f"the outer loss has a kink here, along {ref.kinks} of {len(ref.slopes)} directions: "
                  "there any estimator gives one of two slopes",)  # fmt: skip
    if found.stateful:
        notes += ("its state was warmed up by calls at this meta first: see the argument warmup",)
    figures: dict[str, Any] = {
        "estimator": repr(learner.estimator),
        "compared_with": ref.source,
        "value": ref.value,
        "cosine": agreed.cosine,
        "relative_error": agreed.relative_error,
        "length": agreed.length,
        "bias": agreed.bias,
        "bias_ci95": agreed.bias_ci95,
        "noise": agreed.noise,
        "repeats": len(found.grads),
        "reliable": int(ref.reliable.sum()),
        "directions": len(ref.slopes),
        "kinks": ref.kinks,
        "float32_error": narrow,
        "leaves": comparison.leaves,
        "stats": found.stats,
        "doubts": (*_or(lambda: speak(found.stats), []), *_not_finite(found.stats)),
        "operations": tuple(operations),
        "traces": traces,
        "notes": (*notes, *ref.notes),
    }
    trust, reasons = judge(comparison, figures, max(tolerance, 0.0 if wide else 3e-2))
    return CheckReport(trust, tuple(reasons), **figures)


def _failed(
    estimator: str,
    reason: str,
    operations: tuple[Finding, ...] = (),
    traces: tuple[str, ...] = (),
    notes: tuple[str, ...] = (),
) -> CheckReport:
    return CheckReport("no", (reason,), estimator, operations=operations, traces=traces, notes=notes)


def _or(function: Callable, otherwise: Any) -> Any:
    """A part of the check that may not run on a broken problem: its absence is no verdict."""
    try:
        return function()
    except Exception:
        return otherwise
