"""Truncated hypergradient: only the last inner steps are differentiated."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.hypergrad.common import as_floats, gradient_stats, outer_objective, split_keys
from bilevel.hypergrad.iterations.mixed import Mixed
from bilevel.hypergrad.iterations.unroll import Unroll
from bilevel.hypergrad.parts import apart, joined
from bilevel.hypergrad.requirements import require_iterative
from bilevel.hypergrad.residuals import doubt_above, norm, ratio, warn_of_zero_leaves
from bilevel.inner.gradient import run_steps
from bilevel.problem import (
    Hypergradient,
    InnerSolver,
    InnerState,
    IterativeSolver,
    Key,
    Meta,
    Params,
    Problem,
    Task,
)

_OUT_OF_REACH = (
    "it reaches the outer loss only through the steps that are cut off, or through the initialization. Use "
    "bl.hypergrad.Mixed() or Unroll() to learn it"
)
_SHARE = 0.1  # of the adjoint that may be left where it is cut, before the user is told


@dataclass(frozen=True)
class Truncated:
    """Reverse mode through the last k of K inner steps; what came before counts as a constant.

        λ_K = ∂φ f,   λⱼ = (∂Φ/∂φ)ᵀ λⱼ₊₁,   dF/dθ ≈ ∂θ f + Σ_{j ≥ K−k} (∂Φ/∂θ)ᵀ λⱼ₊₁

    Args:
        num_steps: k, at least 1. From K on the result is exact.
        adjoint: `Mixed()` or `Unroll()`, how the k steps are differentiated, with its checkpointing.

    Raises:
        TypeError: when the solver has no steps, or `adjoint` is something else.
        ValueError: when `num_steps` is no positive whole number.

    Warns:
        FirstOrderWarning: naming each leaf of `meta` that only the cut steps or the initialization depend on:
            its gradient here is exactly zero.

    Stats: `truncated_steps` = K − k; `adjoint_share` = |λ_{K−k}| / |λ_K|, how much of the adjoint was left
    where it was cut: 0 when nothing was. With an optimizer that has a memory the larger of |λ_{K−k}| and
    |λ_{K−k−1}|: what is left may be in the memory, and shows in params one step further back.

    Cost: K inner gradients and about 3 more for each of the k steps (and for one more, where the optimizer
    has a memory); memory that of `adjoint` for k steps, independent of K and of dim θ. Biased: near a minimum
    with curvatures in [μ, L] the error falls like (1 − μ/L)ᵏ; on short horizons it may point the wrong way.

    Reference: Shaban, Cheng, Hatch, Boots, 2019; Wu, Ren, Liao, Grosse, 2018 (short-horizon bias).

    >>> import bilevel as bl, jax, optax
    >>> problem = bl.Problem(init=lambda meta, key: 8.0,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * (params - meta) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(0.75), num_steps=3)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> h = bl.hypergradient(problem, solver, Truncated(2), 0.0, task, key)
    >>> print(h.grad, h.stats["truncated_steps"], h.stats["adjoint_share"])  # exact: 0.984375
    0.9375 1.0 0.0625
    """

    num_steps: int
    adjoint: Unroll | Mixed = field(default_factory=Mixed)

    def __post_init__(self):
        k = self.num_steps
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"Truncated.num_steps must be a whole number of at least 1, got {k!r}")
        if not isinstance(self.adjoint, Unroll | Mixed):
            raise TypeError(f"Truncated.adjoint must be Mixed() or Unroll(), got {self.adjoint!r}")

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with steps."""
        require_iterative(self, solver)

    def init(self, problem, solver, meta, task, key) -> tuple[()]:
        """Stateless."""
        return ()

    def solve(self, problem: Problem, solver: IterativeSolver, meta: Meta, task: Task, key: Key) -> Params:
        """The inner solution, differentiable in `meta` through the last steps only."""
        start = self._start(problem, solver, meta, task, key)
        return self._finish(problem, solver, meta, task, start, key, self.adjoint)[0].params

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, tuple[()]]:
        """The truncated hypergradient of one task."""
        inner_key, outer_key = split_keys(key)
        meta = as_floats(meta)

        def from_start(meta, start, last, adjoint=self.adjoint):
            end, losses = self._finish(problem, solver, meta, task, start, inner_key, adjoint)
            params = optax.tree.add(end.params, last)
            value, stats = outer_objective(problem, params, meta, task, outer_key)
            return value, {"inner_loss": losses[-1], **stats} if solver.num_steps else stats

        def objective(meta, first, last, before):
            floats, rest = apart(self._start(problem, solver, meta, task, inner_key, before))
            return from_start(meta, joined(optax.tree.add(floats, first), rest), last)

        shapes = jax.eval_shape(lambda: self._start(problem, solver, meta, task, inner_key))
        blank = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        # Zeros that are added where the loop is cut and at its end: their gradients are the adjoints there.
        zeros, _ = apart(blank)
        cut = max(solver.num_steps - self.num_steps, 0)
        if cut:

            def reached(meta):  # in plain reverse: the trace of a mixed gradient mentions all of meta
                return from_start(meta, blank, zeros.params, Unroll())[0]

            warn_of_zero_leaves(self, reached, meta, because=_OUT_OF_REACH)
        remembers = len(jax.tree.leaves(zeros)) > len(jax.tree.leaves(zeros.params))
        before = zeros if cut and remembers else None
        run = jax.value_and_grad(objective, argnums=(0, 1, 2, 3), has_aux=True)
        (value, stats), (grad, first, last, before) = run(meta, zeros, zeros.params, before)
        left = norm(first.params)
        if before is not None:
            left = jnp.maximum(left, norm(before.params))
        share = ratio(left, norm(last)) if cut else jnp.float32(0)
        more = {"truncated_steps": jnp.float32(cut), "adjoint_share": share}
        return Hypergradient(value, grad, {**stats, **more, **gradient_stats(value, grad)}), state

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """What a user should hear about these stats."""
        return doubt_above(
            stats,
            "adjoint_share",
            _SHARE,
            f"Truncated({self.num_steps}) cut off {stats.get('truncated_steps', 0.0):.0f} inner steps while "
            "much of the adjoint was left, so the hypergradient may even point the wrong way; differentiate "
            "more steps, or all of them in little memory with bl.hypergrad.Mixed(checkpoint=bl.inner.Tree())",
        )

    def _start(self, problem, solver, meta, task, key, before: Any = None) -> InnerState:
        """The state where differentiation begins: a constant, unless it is the first one.

        `before` is zeros that are added to the floats one step earlier: their gradient is the adjoint there.
        """
        init_key, step_key = jax.random.split(key)
        cut = solver.num_steps - self.num_steps
        if cut <= 0:
            return solver.init(problem, meta, task, init_key)
        meta = jax.lax.stop_gradient(meta)
        state = solver.init(problem, meta, task, init_key)
        if before is None:
            return jax.lax.stop_gradient(run_steps(problem, solver, meta, task, state, step_key, cut)[0])
        state = jax.lax.stop_gradient(run_steps(problem, solver, meta, task, state, step_key, cut - 1)[0])
        floats, rest = apart(state)
        state = joined(optax.tree.add(floats, before), rest)
        return run_steps(problem, solver, meta, task, state, step_key, 1, gradient=self.adjoint.gradient)[0]

    def _finish(self, problem, solver, meta, task, start, key, adjoint) -> tuple[InnerState, jax.Array]:
        """The differentiated steps."""
        return run_steps(
            problem,
            solver,
            meta,
            task,
            start,
            jax.random.split(key)[1],
            min(self.num_steps, solver.num_steps),
            gradient=adjoint.gradient,
            checkpoint=adjoint.checkpoint,
        )
