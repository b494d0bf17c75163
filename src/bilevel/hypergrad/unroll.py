"""Exact hypergradient: reverse mode through every inner step."""

from dataclasses import dataclass
from typing import ClassVar

from bilevel.hypergrad.common import (
    differentiate,
    outer_objective,
    require_checkpoint,
    require_iterative,
    split_keys,
)
from bilevel.inner import unroll
from bilevel.linalg import reverse_gradient
from bilevel.problem import Hypergradient, InnerSolver, IterativeSolver, Key, Meta, Params, Problem, Task


@dataclass(frozen=True)
class Unroll:
    """Exact hypergradient by reverse mode through the inner loop, reverse over reverse.

        φₖ₊₁ = Φ(φₖ, θ),   λ_K = ∂φ f,   λₖ = (∂Φ/∂φ)ᵀ λₖ₊₁,   dF/dθ = ∂θ f + Σ (∂Φ/∂θ)ᵀ λₖ₊₁

    Args:
        checkpoint: keep only every `checkpoint`-th inner state and recompute the steps between;
            1 recomputes each step, about √K costs the least memory. None keeps everything.

    Raises:
        TypeError: when the solver has no steps.
        ValueError: when `checkpoint` is not a positive whole number.

    Cost: about 4 inner gradients a step in time; memory O(K (dim φ + activations of an inner gradient)),
    or O((K/s + s) ...) with `checkpoint=s`. Independent of dim θ. Unbiased: exact for the K steps run.

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

    checkpoint: int | None = None
    gradient: ClassVar = staticmethod(reverse_gradient)

    def __post_init__(self):
        require_checkpoint(self, self.checkpoint)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with steps."""
        require_iterative(self, solver)

    def init(self, problem, solver, meta, task, key) -> tuple[()]:
        """Stateless."""
        return ()

    def solve(self, problem: Problem, solver: IterativeSolver, meta: Meta, task: Task, key: Key) -> Params:
        """The inner solution, differentiable in `meta` by this estimator: the way to nest levels."""
        return unroll(problem, solver, meta, task, key, gradient=self.gradient, checkpoint=self.checkpoint)[
            0
        ].params

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, tuple[()]]:
        """The hypergradient of one task."""
        inner_key, outer_key = split_keys(key)

        def objective(meta):
            last, losses = unroll(
                problem,
                solver,
                meta,
                task,
                inner_key,
                gradient=self.gradient,
                checkpoint=self.checkpoint,
            )
            value, stats = outer_objective(problem, last.params, meta, task, outer_key)
            return value, {"inner_loss": losses[-1], **stats} if solver.num_steps else stats

        return differentiate(objective, meta), state
