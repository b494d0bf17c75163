"""Multi-step outer loss (MAML++): every inner iterate is judged, not only the last."""

from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp

from bilevel.hypergrad.common import differentiate, outer_objective, split_keys
from bilevel.hypergrad.iterations.mixed import Mixed
from bilevel.hypergrad.iterations.unroll import Unroll
from bilevel.hypergrad.requirements import require_iterative
from bilevel.inner import unroll
from bilevel.problem import Hypergradient, InnerSolver, Problem


@dataclass(frozen=True)
class MultiStep:
    """Exact hypergradient of a weighted sum of the outer losses after each inner step.

        F(θ) = Σₖ wₖ f(φₖ, θ),  k = 1..K;   w moves linearly from 1/K each to (0, ..., 0, 1)

    Args:
        num_annealing_steps: outer steps until only the last iterate counts; 0 keeps all weights at 1/K.
        adjoint: `Mixed()` or `Unroll()`, how the steps are differentiated.

    Raises:
        TypeError: when the solver has no steps.
        ValueError: when it has fewer than 1, or `num_annealing_steps` is negative.

    Cost: that of `adjoint` plus K outer losses. Unbiased for F; F is the plain outer loss only after
    annealing (`stats["last_outer_loss"]` is the plain one throughout). State: the count of outer steps.

    Reference: Antoniou, Edwards, Storkey, How to train your MAML, 2019.

    >>> import bilevel as bl, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * params**2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=2)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> print(bl.hypergradient(problem, solver, MultiStep(), 8.0, task, key).grad)  # (1/2 + 1/4) / 2
    0.375
    """

    num_annealing_steps: int = 0
    adjoint: Unroll | Mixed = field(default_factory=Mixed)
    nests: ClassVar[bool] = True

    def __post_init__(self):
        if not isinstance(self.adjoint, Unroll | Mixed):
            raise TypeError(
                "MultiStep.adjoint must be bl.hypergrad.Mixed() or Unroll(), got "
                f"{type(self.adjoint).__name__}"
            )
        if self.num_annealing_steps < 0:
            raise ValueError(
                f"MultiStep.num_annealing_steps must be at least 0, got {self.num_annealing_steps}"
            )

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with at least one step."""
        if require_iterative(self, solver).num_steps < 1:
            raise ValueError("MultiStep needs an inner solver with num_steps of at least 1, got 0")

    def init(self, problem, solver, meta, task, key) -> jax.Array:
        """The count of outer steps, which the weights follow."""
        return jnp.int32(0)

    def weights(self, num_steps: int, count: jax.Array) -> jax.Array:
        """w at outer step `count`: `[num_steps]`, summing to 1."""
        even = jnp.full(num_steps, 1 / num_steps, float)
        if self.num_annealing_steps == 0:
            return even
        done = jnp.minimum(jnp.asarray(count, float) / self.num_annealing_steps, 1.0)
        return (1 - done) * even + done * jnp.zeros(num_steps).at[-1].set(1.0)

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, jax.Array]:
        """The hypergradient of the weighted sum, for one task."""
        inner_key, outer_key = split_keys(key)

        def objective(meta):
            last, losses = unroll(
                problem,
                solver,
                meta,
                task,
                inner_key,
                gradient=self.adjoint.gradient,
                checkpoint=self.adjoint.checkpoint,
                each=lambda params: problem.outer_loss(params, meta, task.query, outer_key),
            )
            value, stats = outer_objective(problem, last.params, meta, task, outer_key)
            weighted = jnp.vdot(self.weights(solver.num_steps, state).astype(losses.dtype), losses)
            return weighted, {"last_outer_loss": value, **stats}

        return differentiate(objective, meta), state + 1
