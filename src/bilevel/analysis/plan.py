"""`bl.plan`: which mode, which checkpoints and how many tasks side by side, for the memory there is."""

import itertools
import math
from dataclasses import dataclass

import jax

from bilevel.analysis.measure import one_line
from bilevel.analysis.memory import (
    Memory,
    compile_hypergradient,
    compiled_memory,
    format_memory,
    parse_memory,
)
from bilevel.hypergrad import Mixed, Unroll
from bilevel.inner.checkpointing import Every, Sqrt, Tree
from bilevel.problem import Estimator, InnerSolver, IterativeSolver, Learner, Meta, Problem, Task
from bilevel.train.step import num_tasks


@dataclass(frozen=True)
class Attempt:
    """One candidate: what it takes, or why it cannot run."""

    estimator: Estimator
    task_chunk: int
    memory: Memory | None
    refusal: str = ""


@dataclass(frozen=True)
class Plan:
    """How to take the exact hypergradient within a budget of memory.

    Args:
        estimator: for `bl.Learner(problem, solver, plan.estimator)`.
        task_chunk: for `bl.Options(task_chunk=plan.task_chunk)`.
        memory: what it takes; `memory.peak` is the prediction. An outer optimizer's state comes on top.
        budget: bytes allowed.
        attempts: everything that was compiled on the way, the chosen one last.
    """

    estimator: Estimator
    task_chunk: int
    memory: Memory
    budget: int
    attempts: tuple[Attempt, ...]

    def __str__(self):
        lines = [_line(attempt, self.budget) for attempt in self.attempts]
        return "\n".join(
            [
                f"{self.estimator}, task_chunk={self.task_chunk}: "
                f"{format_memory(self.memory.peak)} of {format_memory(self.budget)}",
                f"  {format_memory(self.memory.arguments)} of meta and tasks, "
                f"{format_memory(self.memory.temporary)} between, "
                f"{format_memory(self.memory.outputs)} of results",
                *lines,
            ]
        )


def plan(
    problem: Problem,
    solver: InnerSolver,
    meta: Meta,
    tasks: Task,
    memory: str | int = "8GiB",
    *,
    max_compilations: int = 12,
) -> Plan:
    """The fastest exact estimator that fits, found by compiling candidates, cheapest in time first.

        peak = arguments + outputs + temporary buffers,   as the compiler lays them out for the real shapes

    Candidates are `Mixed` (or `Unroll` where the inner loss holds a `jax.custom_vjp`): everything kept,
    inner gradients kept, √K checkpoints, a checkpoint at every step, a tree of checkpoints. They are
    combined with the divisors of the number of tasks. A CPU takes one task at a time, which is fastest there.

    Args:
        meta, tasks: arrays, or `jax.ShapeDtypeStruct`s: nothing is run. `tasks` has a leading `[num_tasks]`.
        memory: the budget, like "8GiB", "512MB", or bytes.
        max_compilations: candidates looked at, at most.

    Returns:
        A `Plan`; print it. The prediction holds within 25% of what is measured (bench/plan_grid.py).

    Raises:
        MemoryError: when nothing fits, with the least there is and what to change.
        ValueError, TypeError: when no exact estimator takes the solver, or `memory` cannot be read.

    Cost: one compilation a candidate; large problems take seconds to minutes each.

    >>> import bilevel as bl
    >>> learner = bl.maml(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, num_steps=5)
    >>> tasks = bl.tasks.batch(bl.tasks.sinusoid, 4)(jax.random.key(0))
    >>> chosen = plan(learner.problem, learner.solver, learner.init_meta(jax.random.key(0)), tasks, "1GiB")
    >>> chosen.estimator, chosen.task_chunk, chosen.memory.peak < 2**30
    (Mixed(checkpoint=None), 1, True)
    """
    budget = parse_memory(memory)
    attempts: list[Attempt] = []
    for estimator, chunk in itertools.islice(_candidates(solver, num_tasks(tasks)), 4 * max_compilations):
        if len(attempts) >= max_compilations:
            break
        if _hopeless(estimator, chunk, attempts):
            continue
        attempt = _attempt(problem, solver, estimator, meta, tasks, chunk)
        attempts.append(attempt)
        if attempt.memory is not None and attempt.memory.peak <= budget:
            return Plan(estimator, chunk, attempt.memory, budget, tuple(attempts))
    ran = [attempt for attempt in attempts if attempt.memory is not None]
    if not ran:
        raise ValueError(f"no exact estimator takes this problem and solver: {attempts[0].refusal}")
    least = min(ran, key=lambda attempt: attempt.memory.peak if attempt.memory else math.inf)
    assert least.memory is not None
    raise MemoryError(
        f"nothing fits in {format_memory(budget)}: the least is {format_memory(least.memory.peak)} with "
        f"{least.estimator} and task_chunk={least.task_chunk}, of which "
        f"{format_memory(least.memory.arguments)} are meta and tasks themselves. Allow more memory, take "
        "fewer inner steps or a smaller batch inside a task, or an estimator whose memory does not grow "
        "with the steps: bl.hypergrad.Truncated, Implicit, FirstOrder (bl.advise compares them)"
    )


def _candidates(solver: InnerSolver, tasks: int):
    """Estimators and chunks, the fastest expected combination first."""
    steps = solver.num_steps if isinstance(solver, IterativeSolver) else 0
    # Relative time, roughly: one more run of the inner loop is about a third.
    ways = [(1.0, None), (1.05, Every(1, keep_gradients=True)), (1.3, Sqrt()), (1.31, Every(1))]
    if steps > 64:  # below, √K states are as few
        branching = max(8, math.ceil(steps ** (1 / 3)))  # a smaller one is slow to compile
        ways.append((1.0 + 0.33 * math.ceil(math.log(steps, branching)), Tree(branching)))
    ways = ways if steps > 1 else ways[:1]
    on_cpu = jax.default_backend() == "cpu"
    divisors = [d for d in range(tasks, 0, -1) if tasks % d == 0]
    spread = divisors[:: max(1, len(divisors) // 5)]
    chunks = [1] if on_cpu else spread + [1] * (spread[-1] != 1)
    # On an accelerator half the tasks side by side cost about a fifth more, as long as it is not full.
    slow = {chunk: 1.0 + 0.2 * math.log2(tasks / chunk) * (not on_cpu) for chunk in chunks}
    ranked = sorted(
        ((time * slow[chunk], place, kind(way), chunk)
         for place, kind in enumerate((Mixed, Unroll)) for time, way in ways for chunk in chunks),
        key=lambda item: item[:2],
    )  # fmt: skip
    for kind in (Mixed, Unroll):  # Unroll is there for what Mixed refuses
        yield from ((estimator, chunk) for _, _, estimator, chunk in ranked if isinstance(estimator, kind))


def _hopeless(estimator: Estimator, chunk: int, attempts: list[Attempt]) -> bool:
    """Whether something that takes less has failed already."""
    for other in attempts:
        if type(other.estimator) is type(estimator) and other.refusal:
            return True
        if other.estimator == estimator and other.task_chunk <= chunk:
            return True
        # Where Mixed runs, Unroll takes more, or less by a few states at most.
        if isinstance(estimator, Unroll) and isinstance(other.estimator, Mixed) and not other.refusal:
            return True
    return False


def _attempt(problem, solver, estimator, meta, tasks, chunk) -> Attempt:
    try:
        learner = Learner(problem, solver, estimator)
        memory = compiled_memory(compile_hypergradient(learner, meta, tasks, chunk))
    except (TypeError, ValueError) as error:
        return Attempt(estimator, chunk, None, one_line(error))
    return Attempt(estimator, chunk, memory)


def _line(attempt: Attempt, budget: int) -> str:
    name = f"  tried {attempt.estimator}, task_chunk={attempt.task_chunk}"
    if attempt.memory is None:
        return f"{name}: {attempt.refusal}"
    verdict = "fits" if attempt.memory.peak <= budget else "too much"
    return f"{name}: {format_memory(attempt.memory.peak)}, {verdict}"
