"""Exact hypergradient: reverse mode through every inner step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

from bilevel.hypergrad.common import differentiate, outer_objective, split_keys
from bilevel.hypergrad.requirements import require_checkpoint, require_iterative
from bilevel.inner import unroll
from bilevel.inner.checkpointing import Checkpointing
from bilevel.linalg import reverse_gradient
from bilevel.problem import (
    Hypergradient,
    InnerSolver,
    IterativeSolver,
    Key,
    Meta,
    Params,
    Problem,
    Solution,
    Task,
)


@dataclass(frozen=True)
class Unroll:
    """Exact hypergradient by reverse mode through the inner loop, reverse over reverse.

        φₖ₊₁ = Φ(φₖ, θ),   λ_K = ∂φ f,   λₖ = (∂Φ/∂φ)ᵀ λₖ₊₁,   dF/dθ = ∂θ f + Σ (∂Φ/∂θ)ᵀ λₖ₊₁

    Args:
        checkpoint: what is kept for the backward pass. None keeps everything; an int n keeps every n-th
            inner state and recomputes the steps between; a policy of `bl.inner`: `Every`, `Sqrt`, `Tree`
            (long loops), `Offload`.

    A solver of closed form (`bl.inner.Ridge`, ...) has no steps: it is differentiated as it stands.

    Raises:
        TypeError: when the solver has neither steps nor a closed form.
        ValueError: when `checkpoint` is neither a positive whole number nor a policy.

    Cost: about 4 inner gradients a step in time; memory O(K (dim φ + activations of an inner gradient)),
    or that of the policy. Independent of dim θ. Unbiased: exact for the K steps run.

    Reference: Maclaurin, Duvenaud, Adams, 2015; Franceschi et al., 2017.

    >>> import bilevel as bl, jax, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * params**2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=3)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> print(bl.hypergradient(problem, solver, Unroll(), 8.0, task, key).grad)
    0.125
    """

    checkpoint: int | Checkpointing | None = None
    gradient: ClassVar = staticmethod(reverse_gradient)
    nests: ClassVar[bool] = True  # the estimate itself can be differentiated

    def __post_init__(self):
        require_checkpoint(self, self.checkpoint)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with steps, or one of closed form."""
        require_differentiable(self, solver)

    def init(self, problem, solver, meta, task, key) -> tuple[()]:
        """Stateless."""
        return ()

    def solve(self, problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key) -> Params:
        """The inner solution, differentiable in `meta` by this estimator: the way to nest levels."""
        return solve_through(problem, solver, meta, task, key, self.gradient, self.checkpoint).params

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, tuple[()]]:
        """The hypergradient of one task."""
        inner_key, outer_key = split_keys(key)

        def objective(meta):
            params, inner_stats = solve_through(
                problem, solver, meta, task, inner_key, self.gradient, self.checkpoint
            )
            value, stats = outer_objective(problem, params, meta, task, outer_key)
            return value, {**inner_stats, **stats}

        return differentiate(objective, meta), state


def require_differentiable(estimator: object, solver: InnerSolver) -> None:
    """Refuse a solver that reverse mode cannot go through: it has neither steps nor a closed form."""
    if not has_closed_form(solver):
        require_iterative(estimator, solver)


def has_closed_form(solver: InnerSolver) -> bool:
    """Whether plain differentiation of `solver.solve` is exact, as the solver declares."""
    return getattr(solver, "closed_form", False)


def solve_through(
    problem: Problem,
    solver: InnerSolver,
    meta: Meta,
    task: Task,
    key: Key,
    gradient: Callable,
    checkpoint: int | Checkpointing | None,
) -> Solution:
    """The inner solution and its stats, differentiable step by step or, in closed form, as it stands."""
    if has_closed_form(solver):
        return solver.solve(problem, meta, task, key)
    solver = cast(IterativeSolver, solver)  # `check` has made sure
    last, losses = unroll(problem, solver, meta, task, key, gradient=gradient, checkpoint=checkpoint)
    return Solution(last.params, {"inner_loss": losses[-1]} if solver.num_steps else {})
