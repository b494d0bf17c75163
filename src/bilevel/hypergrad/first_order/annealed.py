"""First-order hypergradients for a while, exact ones afterwards (MAML++'s derivative-order annealing)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel.hypergrad.doubts import doubts_of
from bilevel.hypergrad.requirements import require_iterative
from bilevel.inner import unroll
from bilevel.linalg import reverse_gradient
from bilevel.problem import Estimator, Hypergradient, InnerSolver, IterativeSolver, Problem, Solution


@dataclass(frozen=True)
class AnnealedOrder:
    """An estimator that takes the inner gradients as constants for its first outer steps.

        outer step t < num_steps:   ∇φ g(φₖ, θ) is a constant, and all else is differentiated
        from then on:               `then`

    Unlike `FirstOrder` this differentiates the optimizer's arithmetic, so that rates are learned from the
    first step: φₖ₊₁ = φₖ − α ∇g has the derivative −∇g in α. A leaf that acts inside the inner loss alone has
    a hypergradient of exactly zero until then.

    Args:
        then: an estimator that goes through the steps: `Mixed()`, `Unroll()`, `MultiStep(n)`.
        num_steps: outer steps of the first order.

    Raises:
        TypeError: when `then` is a class, or the solver has no steps.
        ValueError: when `num_steps` is negative.

    Cost: the first-order steps spare all second derivatives; two programs are compiled. With
    `task_chunk` > 1 both are run at every step, so nothing is spared: leave it at 1. Biased for the first
    `num_steps` outer steps, then as `then`. State: the count of outer steps, and that of `then`.

    Reference: Antoniou, Edwards, Storkey, How to train your MAML, 2019.

    >>> import bilevel as bl, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * params**2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=3)
    >>> annealed, task, key = AnnealedOrder(bl.hypergrad.Mixed(), 1), bl.Task(None, None), jax.random.key(0)
    >>> state = annealed.init(problem, solver, 8.0, task, key)
    >>> first, state = annealed.estimate(problem, solver, 8.0, task, state, key)
    >>> second, state = annealed.estimate(problem, solver, 8.0, task, state, key)
    >>> print(first.grad, second.grad)
    1.0 0.125
    """

    then: Estimator
    num_steps: int

    def __post_init__(self):
        if isinstance(self.then, type) or not isinstance(self.then, Estimator):
            raise TypeError(f"AnnealedOrder.then must be an estimator such as Mixed(), got {self.then!r}")
        if isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int) or self.num_steps < 0:
            raise ValueError(
                f"AnnealedOrder.num_steps must be a whole number of at least 0, got {self.num_steps!r}"
            )

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with steps that `then` accepts."""
        require_iterative(self, solver)
        self.then.check(problem, solver)

    def init(self, problem, solver, meta, task, key):
        """The count of outer steps, and the state of `then`."""
        return jnp.int32(0), self.then.init(problem, solver, meta, task, key)

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, tuple]:
        """The hypergradient of one task, of the order that is due."""
        count, inner = state

        def of(solver):
            return lambda inner: self.then.estimate(problem, solver, meta, task, inner, key)

        h, inner = jax.lax.cond(count < self.num_steps, of(_Detached(solver)), of(solver), inner)
        return h, (count + 1, inner)

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Those of `then`."""
        return doubts_of(self.then, stats)


@dataclass(frozen=True)
class _Detached:
    """The same inner solver; its gradients are constants to whoever differentiates its steps."""

    solver: IterativeSolver

    @property
    def num_steps(self) -> int:
        return self.solver.num_steps

    def init(self, problem, meta, task, key):
        return self.solver.init(problem, meta, task, key)

    def step(self, problem, meta, task, state, key, gradient: Callable = reverse_gradient):
        # How a gradient that is a constant would be differentiated does not matter: the plain one is used.
        def constant(loss):
            return lambda *args: jax.lax.stop_gradient(reverse_gradient(loss)(*jax.lax.stop_gradient(args)))

        return self.solver.step(problem, meta, task, state, key, constant)

    def solve(self, problem, meta, task, key) -> Solution:
        # By the steps above: the solver's own way would not be detached.
        state, losses = unroll(problem, self, meta, task, key)
        return Solution(state.params, {"inner_loss": losses[-1]} if self.num_steps else {})
