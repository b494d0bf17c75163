"""The inner loop watched: figures of the parameters along its steps, every one or some of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.hypergrad.common import split_keys
from bilevel.hypergrad.first_order.first_order import FirstOrder
from bilevel.inner import unroll
from bilevel.problem import IterativeSolver, Key, Learner, Meta, Params, Task

_POINTS = 20  # of a curve, about


def shown_steps(num_steps: int, every: int | None = None) -> tuple[int, ...]:
    """The inner steps after which adaptation is looked at: 0, 1, each `every`-th and the last.

    Args:
        num_steps: K.
        every: the smallest of 1, 2, 5, 10, 20, ... that leaves 20 of K steps, when left out.

    Raises:
        ValueError: for `every` below 1.

    >>> shown_steps(3), shown_steps(50, every=20)
    ((0, 1, 2, 3), (0, 1, 20, 40, 50))
    >>> len(shown_steps(2000))
    22
    """
    if every is not None and every < 1:
        raise ValueError(f"every must be at least 1, got {every}; leave it out for about {_POINTS} points")
    rounded = (digit * 10**power for power in range(30) for digit in (1, 2, 5))
    stride = next(n for n in rounded if num_steps <= _POINTS * n) if every is None else every
    return tuple(sorted({0, min(1, num_steps), *range(0, num_steps, stride), num_steps}))


def steps_of(learner: Learner, every: int | None) -> tuple[int, ...]:
    """The steps a learner is judged after; without steps there is one point."""
    if isinstance(learner.solver, IterativeSolver):
        return shown_steps(learner.solver.num_steps, every)
    if every is not None:
        raise ValueError(
            f"{type(learner.solver).__name__} has no steps to judge every {every}; leave every out"
        )
    return (0,)


def with_num_steps(learner: Learner, num_steps: int | None) -> Learner:
    """The same learner with another number of inner steps, to adapt with: its estimator is put aside.

    Single-loop estimators refuse a solver of more than one step, and nothing is differentiated here.
    """
    if num_steps is None:
        return learner
    if not isinstance(learner.solver, IterativeSolver):
        raise ValueError(f"{type(learner.solver).__name__} has no num_steps to set; leave num_steps out")
    solver = dataclasses.replace(learner.solver, num_steps=num_steps)  # type: ignore[type-var]
    return dataclasses.replace(learner, solver=solver, estimator=FirstOrder())


def along_adaptation(
    learner: Learner,
    meta: Meta,
    task: Task,
    key: Key,
    read: Callable[[Params], Any],
    steps: Sequence[int] | None = None,
) -> Any:
    """`read(params)` after each of `steps` inner steps, stacked: leaves `[points, ...]`.

    A solver without steps gives the solution alone: `[1, ...]`.

    Args:
        steps: ascending, from 0 to K; all of them when left out.
    """
    problem, solver = learner.problem, learner.solver
    inner_key, _ = split_keys(key)
    if not isinstance(solver, IterativeSolver):
        return jax.tree.map(
            lambda leaf: leaf[None], read(solver.solve(problem, meta, task, inner_key).params)
        )
    init_key, step_key = jax.random.split(inner_key)  # as in `unroll`
    before = read(problem.init(meta, init_key))
    if steps is None or len(steps) == solver.num_steps + 1:
        _, after = unroll(problem, solver, meta, task, inner_key, each=read)
    else:

        def stretch(state, length):
            # Nothing is differentiated here, so the length may be an operand: one loop for all stretches.
            def step(_, state):
                return solver.step(problem, meta, task, state, step_key)[0]

            state = jax.lax.fori_loop(0, length, step, state)
            return state, read(state.params)

        start = solver.init(problem, meta, task, init_key)
        _, after = jax.lax.scan(stretch, start, np.diff(np.asarray(steps)).astype(np.int32))
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), before, after)
