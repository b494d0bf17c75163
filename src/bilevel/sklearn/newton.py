"""A smooth convex inner problem solved to rounding: truncated Newton steps, from where the last one ended."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.scipy.sparse.linalg import cg

from bilevel.inner.solution import solution_keys
from bilevel.problem import Batch, Key, Meta, Params, Problem, Solution, Task

_SUFFICIENT, _SHRINK = 1e-4, 0.5  # of Armijo's rule


@dataclass(frozen=True)
class Newton:
    """Newton steps by conjugate gradients, shortened until the loss falls enough.

        d ≈ −(∇²g)⁻¹ ∇g with |∇²g d + ∇g| ≤ η |∇g|, η = min(0.1, √|∇g|);   φ ← φ + t d

    Args:
        start: `start(support) -> params`: it goes on from a solution for other meta-parameters, which a
            `problem.init` cannot know.
        tolerance: it ends where no element of ∇g is larger.
        max_steps: where it ends otherwise. That is never an error: it is told in stats.
        max_products: Hessian-vector products a step.

    Stats: `inner_loss`, `num_steps`, `converged`.

    Cost: a few steps of 1 gradient and at most `max_products` Hessian products. Use it with `Implicit(...)`.

    Reference: Nocedal, Wright, Numerical optimization, 2006, chapter 7.

    >>> problem = Problem(lambda meta, key: None,
    ...                   lambda params, meta, batch, key: jnp.cosh(params - meta), lambda *args: 0.0)
    >>> solver = Newton(lambda support: support, tolerance=1e-5)
    >>> print(solver.solve(problem, 3.0, Task(jnp.float32(0), None), jax.random.key(0)).params)
    3.0
    """

    start: Callable[[Batch], Params]
    tolerance: float = 1e-10
    max_steps: int = 100
    max_products: int = 200

    def solve(self, problem: Problem, meta: Meta, task: Task, key: Key) -> Solution:
        """Step until the gradient vanishes, or the loss no longer falls."""
        _, loss_key = solution_keys(key)

        def loss(params):
            return problem.inner_loss(params, meta, task.support, loss_key)

        def towards(params, grad):
            return cg(
                lambda v: jax.jvp(jax.grad(loss), (params,), (v,))[1],
                jax.tree.map(jnp.negative, grad),
                tol=cast(Any, jnp.minimum(0.1, jnp.sqrt(optax.tree.norm(grad)))),
                maxiter=self.max_products,
            )[0]

        def unfinished(at):
            # A gradient of NaN ends it.
            return (at.count < self.max_steps) & (_largest(at.grad) > self.tolerance) & ~at.stuck

        def body(at):
            # Written so that loss, gradient and Hessian stand here once: most of the time is compilation.
            params = jax.tree.map(lambda p, d: p + at.t * d, at.params, at.direction)
            value, grad = jax.value_and_grad(loss)(params)
            slope = jnp.asarray(optax.tree.vdot(at.grad, at.direction))
            rounding = 8 * jnp.finfo(value.dtype).eps * jnp.abs(at.value)
            first = at.count == 0
            # Near the solution the fall drowns in rounding: the full step is taken then.
            enough = value <= at.value + _SUFFICIENT * at.t * slope + rounding
            taken = first | enough | (at.t < 1e-10)
            better = (
                first | (value < at.value - rounding) | (optax.tree.norm(grad) < optax.tree.norm(at.grad))
            )
            ahead = jax.lax.cond(
                taken & (_largest(grad) > self.tolerance), towards, lambda *_: at.direction, params, grad
            )
            moved = _Point(at.count + 1, params, value, grad, ahead, jnp.ones_like(value), ~better)
            back = at._replace(count=at.count + 1, t=_SHRINK * at.t)
            return jax.tree.map(lambda a, b: jnp.where(taken, a, b), moved, back)

        params = jax.tree.map(jnp.asarray, self.start(task.support))
        nothing = jax.tree.map(jnp.zeros_like, params)
        one = jnp.ones((), jnp.result_type(*jax.tree.leaves(params)))
        unknown = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), params)
        start = _Point(jnp.int32(0), params, one, unknown, nothing, one, jnp.zeros((), bool))
        at = jax.lax.while_loop(unfinished, body, start)
        done = _largest(at.grad) <= self.tolerance  # False for NaN
        stats = {"inner_loss": at.value, "num_steps": at.count.astype(float), "converged": done.astype(float)}
        return Solution(at.params, stats)


@dataclass(frozen=True)
class ConjugateGradients:
    """A linear solver for `Implicit` that ends at a residual: `bl.hypergrad.cg` goes on to the last digit.

    Args:
        tolerance: of the residual, relative to the right side.
        max_products: where it ends otherwise.

    >>> q, _ = ConjugateGradients().solve(lambda v: 2 * v, jnp.ones(2), jax.random.key(0))
    >>> print(q)
    [0.5 0.5]
    """

    tolerance: float = 1e-9
    max_products: int = 1000
    system: str = "gradient"
    remedy: str = "the penalty is too weak for the features: they are collinear or separate the classes"

    def solve(self, matvec, b, key):
        """About A⁻¹ b."""
        return cg(matvec, b, tol=self.tolerance, maxiter=self.max_products)[0], {}

    def doubts(self, stats) -> list[str]:
        """None of its own: `Implicit` looks at the residual."""
        return []


class _Point(NamedTuple):
    """Where it is, and the step that is tried next, t `direction`."""

    count: jax.Array
    params: Params
    value: jax.Array
    grad: Params
    direction: Params
    t: jax.Array
    stuck: jax.Array


def _largest(tree):
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in jax.tree.leaves(tree)]))
