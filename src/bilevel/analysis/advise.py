"""`bl.advise`: bias, noise, time and memory of every estimator on your own problem, and which one to take."""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from bilevel.analysis.candidates import candidates
from bilevel.analysis.compare import compare
from bilevel.analysis.measure import one_line, reference
from bilevel.analysis.memory import (
    Memory,
    compile_hypergradient,
    compiled_memory,
    format_memory,
    parse_memory,
)
from bilevel.analysis.objective import first_tasks, in_arrays, in_float64, require_scalar_losses, task_at
from bilevel.hypergrad.requirements import require_count, require_positive
from bilevel.problem import Estimator, InnerSolver, Key, Learner, Meta, Problem, Task
from bilevel.train.step import num_tasks as count_tasks

# Estimators this near to exact are equally good: then the fastest is recommended.
GOOD_ERROR = 1e-3


@dataclass(frozen=True)
class Trial:
    """One estimator, measured.

    Args:
        name, estimator: which.
        error: √(bias² + noise²) of one call, relative to the true gradient's norm; NaN where unknown.
        bias: ‖E[estimate] − truth‖, relative. `noise`: √tr Cov, relative. `cosine`: with the truth.
        seconds: of one compiled hypergradient over the whole batch, the fastest of a few.
        memory: what that takes, as the compiler says.
        failure: why it could not be measured; "" where it could.
    """

    name: str
    estimator: Estimator
    error: float = math.nan
    bias: float = math.nan
    noise: float = math.nan
    cosine: float = math.nan
    seconds: float = math.nan
    memory: Memory | None = None
    failure: str = ""


@dataclass(frozen=True)
class Advice:
    """What `bl.advise` found; print it.

    Args:
        trials: best first.
        recommended: the one to take, or None where none fits.
        reason: in words.
        compared_with: what the errors were taken against.
        notes: what else was seen.
    """

    trials: tuple[Trial, ...]
    recommended: Trial | None
    reason: str
    compared_with: str
    notes: tuple[str, ...] = ()

    def __str__(self):
        heads = ("estimator", "bias", "noise", "cosine", "ms", "memory")
        rows = [heads, *(_cells(trial) for trial in self.trials if not trial.failure)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        table = [
            "  " + row[0].ljust(widths[0]) + "".join(f"  {c:>{w}}" for c, w in zip(row[1:], widths[1:]))
            for row in rows
        ]
        failed = [f"  {t.name}: {t.failure}" for t in self.trials if t.failure]
        return "\n".join(
            [f"  errors relative to {self.compared_with}", *table, *failed, *self.notes, self.reason]
        )


def advise(
    problem: Problem,
    solver: InnerSolver,
    meta: Meta,
    tasks: Task,
    key: Key,
    *,
    memory: str | int | None = None,
    seconds: float | None = None,
    estimators: Mapping[str, Estimator] | None = None,
    task_chunk: int = 1,
    num_tasks: int = 2,
    repeats: int = 16,
    on_trial: Callable[[Trial], None] | None = None,
) -> Advice:
    """Run every estimator that applies on your own problem, and recommend one.

        error² = ‖E[ĝ] − g‖² + tr Cov ĝ,   relative to ‖g‖²

    Errors are measured in float64 against what `bl.check` compares with, time and memory in the precision of
    `meta` on the whole batch. Among the estimators within both budgets the one with the least error is
    recommended; among those with an error below 0.1% the fastest.

    Args:
        tasks: a batch as in training, leaves `[num_tasks, n, ...]`.
        memory: at most this much, like "8GiB", for the hypergradient of a batch.
        seconds: at most this long, for the hypergradient of a batch.
        estimators: what to compare, by name; left out, all of `bl.hypergrad` that take the problem.
        task_chunk: as in `bl.Options`.
        num_tasks: how many of the tasks the errors are measured on.
        repeats: calls of a random estimator.
        on_trial: called with each `Trial` as it ends, for those who wait.

    Raises:
        ValueError: when `memory` cannot be read, or the problem itself cannot run.

    Cost: two compilations an estimator, and a few calls of each: a minute or so on a small problem.

    >>> import bilevel as bl, jax.numpy as jnp, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * (params - batch) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: 0.5 * (params - batch) ** 2)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=3)
    >>> tasks = bl.Task(jnp.zeros(2), jnp.ones(2))
    >>> choice = {"mixed": bl.hypergrad.Mixed(), "first": bl.hypergrad.FirstOrder()}
    >>> advice = advise(problem, solver, jnp.float32(4.0), tasks, jax.random.key(0), estimators=choice)
    >>> advice.recommended.name, advice.trials[1].name, round(advice.trials[1].bias, 3)
    ('mixed', 'first', 7.0)
    """
    budget = None if memory is None else parse_memory(memory)
    require_count("advise", num_tasks=num_tasks, repeats=repeats, task_chunk=task_chunk)
    if seconds is not None:
        require_positive("advise", seconds=seconds)
    meta, tasks = in_arrays(meta), in_arrays(tasks)
    try:
        require_scalar_losses(problem, solver, meta, task_at(tasks, 0), key)
    except Exception as error:
        raise ValueError(f"the problem itself cannot run ({one_line(error)}); bl.check says more") from error
    some = first_tasks(tasks, num_tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the table says it
        if estimators is None:
            estimators = candidates(problem, solver, meta, task_at(tasks, 0), key)
        try:
            with jax.enable_x64(True):
                ref = reference(problem, solver, in_float64(meta), in_float64(some), key)
            wide = True
        except Exception:
            wide = False
            try:
                ref = reference(problem, solver, meta, some, key)
            except Exception as error:
                raise ValueError(
                    f"the problem itself cannot run ({one_line(error)}); bl.check says more"
                ) from error
        if not math.isfinite(ref.value):
            raise ValueError(f"the outer loss itself is {ref.value} here: there is nothing to compare")
        trials = []
        for name, estimator in estimators.items():
            trials.append(
                _try(name, estimator, problem, solver, meta, tasks, some, key, ref, wide, repeats, task_chunk)
            )
            if on_trial is not None:
                on_trial(trials[-1])
    trials.sort(key=lambda t: (bool(t.failure), not t.error <= GOOD_ERROR, t.seconds if t.error <= GOOD_ERROR
                               else t.error if math.isfinite(t.error) else math.inf))  # fmt: skip
    recommended, reason = _recommend(trials, budget, seconds)
    return Advice(tuple(trials), recommended, reason, ref.source, ref.notes)


def _try(
    name, estimator, problem, solver, meta, tasks, some, key, ref, wide, repeats, task_chunk
) -> Trial:  # fmt: skip
    try:
        learner = Learner(problem, solver, estimator)
        with jax.enable_x64(wide):
            cast = in_float64 if wide else in_arrays
            agreed = compare(learner, cast(meta), cast(some), key, repeats, 100, ref).agreement
        compiled = compile_hypergradient(learner, meta, tasks, task_chunk)
        took = _seconds(learner, compiled, meta, tasks, key)
        try:
            memory = compiled_memory(compiled)
        except NotImplementedError:
            memory = None
    except Exception as error:
        return Trial(name, estimator, failure=one_line(error, 160))
    error = math.hypot(agreed.relative_error, agreed.noise)
    return Trial(
        name, estimator, error, agreed.relative_error, agreed.noise, agreed.cosine, took, memory
    )  # fmt: skip


def _seconds(learner, compiled, meta, tasks, key, enough: float = 0.3) -> float:
    """The fastest of a few calls: what else the machine does only adds."""
    states = jax.vmap(
        lambda task, key: learner.estimator.init(learner.problem, learner.solver, meta, task, key)
    )(tasks, jax.random.split(key, count_tasks(tasks)))
    fastest, spent = math.inf, 0.0
    for call in range(20):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(meta, tasks, states, key))
        took = time.perf_counter() - begin
        spent += took
        if call:  # the first one touches its memory for the first time
            fastest = min(fastest, took)
        if call and spent > enough:
            break
    return fastest


def _recommend(
    trials: list[Trial], budget: int | None, seconds: float | None
) -> tuple[Trial | None, str]:  # fmt: skip
    """The best of those within the budgets, and why."""
    ran = [t for t in trials if not t.failure and math.isfinite(t.error)]
    if not ran:
        return None, "No estimator could be measured; bl.check on one of them says why."

    def fits(trial: Trial) -> bool:
        small = budget is None or (trial.memory is not None and trial.memory.peak <= budget)
        return small and (seconds is None or trial.seconds <= seconds)

    allowed = [t for t in ran if fits(t)]
    limits = " and ".join(
        ([format_memory(budget)] if budget else []) + ([f"{seconds:g} s"] if seconds else [])
    )
    if not allowed:
        sized = [t for t in ran if t.memory is not None]
        small = min(sized, key=lambda t: t.memory.peak if t.memory else 0) if sized else None
        fast = min(ran, key=lambda t: t.seconds)
        least = (
            f"the smallest is {small.name} with {format_memory(small.memory.peak)}, "
            if small and small.memory
            else ""
        )
        return None, (
            f"None fits in {limits}: {least}the fastest {fast.name} with {1e3 * fast.seconds:.3g} ms. "
            "Take fewer inner steps or a smaller batch, or allow more."
        )
    best = allowed[0]
    exact = best.error <= GOOD_ERROR
    within = f" within {limits}" if limits else ""
    reason = f"Take {best.name}, {best.estimator}: "
    if exact:
        reason += f"the fastest of those that are right to {100 * GOOD_ERROR:g}%{within}"
    else:
        reason += (
            f"the least error{within}, {100 * best.error:.2g}% of the gradient (bias {100 * best.bias:.2g}%, "
            f"noise {100 * best.noise:.2g}%, cosine {best.cosine:.3g})"
        )
        if limits and ran[0].error <= GOOD_ERROR:
            reason += f"; {ran[0].name} is right, and over the budget"
    return best, reason + "."


def _cells(trial: Trial) -> tuple[str, ...]:
    memory = "?" if trial.memory is None else format_memory(trial.memory.peak)
    return (
        trial.name,
        f"{trial.bias:.2g}",
        f"{trial.noise:.2g}",
        f"{trial.cosine:.4f}",
        f"{1e3 * trial.seconds:.3g}",
        memory,
    )
