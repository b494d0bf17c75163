"""The nouns: what a bilevel problem is, before anything is said about how it is solved.

    min over meta  E over tasks [ outer_loss(params*(meta), meta, query) ]
    with           params*(meta) = what an inner solver makes of inner_loss(params, meta, support)

Everything here is a value without behaviour. `meta`, `params` and batches are any pytree of arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

# Pytrees cannot be spelled in Python's type system; these names say which tree is meant.
Meta = Any  # theta: everything the outer loop learns
Params = Any  # phi: what the inner loop adapts
Batch = Any  # leaves [n, ...]
InnerState = Any
EstimatorState = Any
Key = jax.Array
Scalar = jax.Array
Loss = Callable[[Params, Meta, Batch, Key], Scalar]


class Task(NamedTuple):
    """One task: leaves `[n, ...]`; a batch of tasks adds a leading `[num_tasks]` axis.

    Args:
        support: what `inner_loss` reads.
        query: what `outer_loss` reads.

    >>> task = Task(support=(jax.numpy.ones((10, 1)), jax.numpy.ones((10, 1))), query=None)
    >>> task.support[0].shape
    (10, 1)
    """

    support: Batch
    query: Batch


@dataclass(frozen=True)
class Problem:
    """An inner and an outer problem, stated once for every solver and estimator.

    Args:
        init: `init(meta, key) -> params`, where the inner loop starts, φ₀(θ).
        inner_loss: `inner_loss(params, meta, support, key) -> scalar`, what the inner loop minimizes.
        outer_loss: `outer_loss(params, meta, query, key) -> scalar`, how good the solution is.
        metrics: `metrics(params, meta, batch, key) -> {name: scalar}`, optional figures to watch
            (accuracy, ...); they are never differentiated.

    Raises:
        TypeError: when one of them cannot be called.

    >>> Problem(init=lambda meta, key: meta,
    ...         inner_loss=lambda params, meta, batch, key: (params - batch) ** 2,
    ...         outer_loss=lambda params, meta, batch, key: (params - batch) ** 2).metrics is None
    True
    """

    init: Callable[[Meta, Key], Params]
    inner_loss: Loss
    outer_loss: Loss
    metrics: Callable[[Params, Meta, Batch, Key], dict[str, Scalar]] | None = None

    def __post_init__(self):
        for name in ("init", "inner_loss", "outer_loss"):
            if not callable(getattr(self, name)):
                raise TypeError(
                    f"Problem.{name} must be a function, got {type(getattr(self, name)).__name__}"
                )
        if self.metrics is not None and not callable(self.metrics):
            raise TypeError(f"Problem.metrics must be a function or None, got {type(self.metrics).__name__}")


class Solution(NamedTuple):
    """What an inner solver reached.

    Args:
        params: φ*, or the last iterate φ_K.
        stats: scalars about the solve, for instance `inner_loss` at the last point it was evaluated.
    """

    params: Params
    stats: dict[str, Scalar]


class Hypergradient(NamedTuple):
    """The outer loss and its gradient with respect to `meta`.

    Args:
        value: outer loss at the inner solution.
        grad: a tree like `meta`.
        stats: scalars that say how far to trust it: `inner_loss`, `zero_leaves` (how many leaves of
            `grad` are exactly zero), `finite` (1.0 when value and every leaf are finite), and
            `query_<name>` for each of `Problem.metrics`.
    """

    value: Scalar
    grad: Meta
    stats: dict[str, Scalar]


@runtime_checkable
class InnerSolver(Protocol):
    """How the inner problem is solved."""

    def solve(self, problem: Problem, meta: Meta, task: Task, key: Key) -> Solution:
        """Run the whole inner loop on `task.support`."""
        ...


@runtime_checkable
class IterativeSolver(InnerSolver, Protocol):
    """An inner solver that can be run a step at a time, which unrolling and evaluation curves need.

    `gradient(loss)` turns a loss into a function that returns its value and its gradient with
    respect to its first argument; estimators swap it to choose how that gradient is differentiated.
    """

    @property
    def num_steps(self) -> int: ...

    def init(self, problem: Problem, meta: Meta, task: Task, key: Key) -> InnerState: ...

    def step(
        self,
        problem: Problem,
        meta: Meta,
        task: Task,
        state: InnerState,
        key: Key,
        gradient: Callable = ...,
    ) -> tuple[InnerState, Scalar]:
        """One inner step: the next state, and the inner loss where the step began."""
        ...


@runtime_checkable
class Estimator(Protocol):
    """How the hypergradient is obtained. Stateless estimators carry `()`."""

    def init(
        self, problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key
    ) -> EstimatorState: ...

    def estimate(
        self,
        problem: Problem,
        solver: InnerSolver,
        meta: Meta,
        task: Task,
        state: EstimatorState,
        key: Key,
    ) -> tuple[Hypergradient, EstimatorState]: ...

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Refuse an illegal triple with a `ValueError` or `TypeError` that names the remedy."""
        ...


@dataclass(frozen=True)
class Learner:
    """Every method of the field: a problem, a way to solve it, a way to differentiate the solution.

    Args:
        problem: what is learnt.
        solver: how the inner problem is solved.
        estimator: how the hypergradient is obtained.
        init_meta: optional `init_meta(key) -> meta`, where the outer loop starts.
        predict: optional `predict(params, meta, x) -> outputs`, what an adapted model answers.

    Raises:
        ValueError, TypeError: where `estimator.check(problem, solver)` refuses the combination.

    >>> import bilevel as bl, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: (params - batch) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: (params - batch) ** 2)
    >>> bl.Learner(problem, bl.inner.Gradient(optax.sgd(0.1), num_steps=3), bl.hypergrad.Mixed())
    ... # doctest: +ELLIPSIS
    Learner(...)
    """

    problem: Problem
    solver: InnerSolver
    estimator: Estimator
    init_meta: Callable[[Key], Meta] | None = None
    predict: Callable[[Params, Meta, Any], Any] | None = None

    def __post_init__(self):
        for name in ("solver", "estimator"):
            if isinstance(getattr(self, name), type):
                raise TypeError(
                    f"Learner.{name} must be a value, got the class {getattr(self, name).__name__}; "
                    f"write {getattr(self, name).__name__}(...)"
                )
        self.estimator.check(self.problem, self.solver)
