"""F2SA: the penalty hypergradient in a single loop of stochastic first-order steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.hypergrad.common import differentiate, gradient_stats, outer_objective, split_keys
from bilevel.hypergrad.first_order.penalized import penalty_doubts
from bilevel.hypergrad.requirements import require_count_or_none, require_positive, require_single_step
from bilevel.hypergrad.residuals import cancellation, norm, ratio
from bilevel.hypergrad.single_loop.minibatch import pick_task, row_numbers
from bilevel.hypergrad.single_loop.warm_start import (
    Trail,
    follow,
    given,
    start_trail,
    warn_of_leaves_out_of_sight,
    without_noise,
)
from bilevel.problem import (
    Hypergradient,
    InnerSolver,
    InnerState,
    Key,
    Meta,
    Params,
    Problem,
    Scalar,
    Task,
)


class F2saState(NamedTuple):
    """Both inner loops, the count of calls, and the residuals of the calls before."""

    psi: InnerState
    phi: InnerState
    count: jax.Array
    trail: Trail


@dataclass(frozen=True)
class F2sa:
    """One warm-started step of ψ and of φ for each outer step; first derivatives only.

        ψ ← solver step on g,   φ ← solver step on g + f/λ,   λ = multiplier + growth t
        grad = ∂θ f(φ) + λ (∂θ g(φ) − ∂θ g(ψ))                 at the ψ and φ after their steps

    Args:
        multiplier: λ at the first call.
        growth: what λ gains with each call.
        batch_size: as in `Soba`. The paper draws rows for ψ and for φ apart; here they share them, which is
            unbiased as well and keeps λ from multiplying the noise of the difference.
        tolerance: the residual, without its noise, that `doubts` speaks of.
        rounding: the relative rounding error that `doubts` speaks of.

    Raises:
        TypeError, ValueError: when the solver has no steps or not exactly one; when a field is out of range.

    Warns:
        FirstOrderWarning: naming each leaf of meta that enters neither loss: its gradient is exactly zero.

    Stats: as in `Penalty` but for `penalty_residual`, of the rows drawn. `inner_loss` and the residuals are
    those of the steps, where the call began; the largest residual so far stands in for ‖∇φ g(φ₀)‖.
    `inner_drift` and `linear_drift` as in `Soba`.

    Cost: 3 gradients in φ and 3 in θ of a minibatch, those at ψ and φ side by side; memory of two inner
    states and two passes, independent of dim θ. Biased by O(1/λ), and while ψ and φ lag behind θ: the outer
    rate must fall as λ grows.

    Reference: Kwon, Kwon, Wright, Nowak, A fully first-order method for stochastic bilevel optimization,
    2023.

    >>> import bilevel as bl, jax, jax.numpy as jnp, optax
    >>> problem = bl.Problem(init=lambda meta, key: jnp.float32(0),
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * (params - meta) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: 0.5 * params**2)
    >>> solver, task = bl.inner.Gradient(optax.sgd(0.5), num_steps=1), bl.Task(None, None)
    >>> meta, key, f2sa = jnp.float32(2), jax.random.key(0), F2sa(99.0)
    >>> state = f2sa.init(problem, solver, meta, task, key)
    >>> step = jax.jit(lambda state: f2sa.estimate(problem, solver, meta, task, state, key))
    >>> for _ in range(30):
    ...     h, state = step(state)
    >>> print(round(float(h.grad), 2))  # λ θ / (λ + 1)
    1.98
    """

    multiplier: float
    growth: float = 0.0
    batch_size: int | None = None
    tolerance: float = 0.1
    rounding: float = 0.01
    settles: ClassVar[bool] = True  # right once its own inner parameters have settled

    def __post_init__(self):
        require_positive(self, multiplier=self.multiplier, tolerance=self.tolerance, rounding=self.rounding)
        if not 0 <= self.growth < float("inf"):
            raise ValueError(f"F2sa.growth must be a number of at least 0, got {self.growth!r}")
        require_count_or_none(self, batch_size=self.batch_size)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with one step."""
        require_single_step(self, solver)

    def init(self, problem, solver, meta, task, key) -> F2saState:
        """Both inner loops at φ₀."""
        init_key, step_key = jax.random.split(split_keys(key)[0])
        start = solver.init(problem, meta, task, init_key)
        gradient = jax.grad(problem.inner_loss)(start.params, meta, task.support, step_key)
        return F2saState(start, start, jnp.int32(0), start_trail(gradient, self.batch_size is not None))

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, F2saState]:
        """One direction in θ at the ψ and φ that this call's steps have reached."""
        inner_key, outer_key = split_keys(key)
        step_key = jax.random.split(inner_key)[1]
        multiplier = self.multiplier + self.growth * jnp.asarray(state.count, float)
        numbers = row_numbers(task, self.batch_size, key, 2, 2)
        rows, fresh = pick_task(task, numbers, 0, 0), pick_task(task, numbers, 1, 1)
        warn_of_leaves_out_of_sight(self, problem, state.psi.params, meta, rows, key)

        # The gradients that move ψ and φ say how far both have settled as well: no others are taken for that.
        gradient = jax.value_and_grad(problem.inner_loss)
        (psi_loss, at_psi), (phi_loss, at_phi) = _at_both(
            lambda params: gradient(params, meta, rows.support, step_key), state.psi.params, state.phi.params
        )
        slope = jax.grad(problem.outer_loss)(state.phi.params, meta, rows.query, outer_key)
        pulled = jax.tree.map(lambda g, s: g + s / multiplier.astype(s.dtype), at_phi, slope)
        psi, _ = solver.step(problem, meta, rows, state.psi, step_key, given(psi_loss, at_psi))
        phi, _ = solver.step(problem, meta, rows, state.phi, step_key, given(phi_loss, pulled))

        h = _direction(problem, psi.params, phi.params, multiplier, meta, fresh, (step_key, outer_key))
        mismatch = jax.tree.map(lambda p, g: multiplier.astype(p.dtype) * (p - g), pulled, at_psi)
        residuals, trail = follow(state.trail, at_psi, mismatch)
        stats = {
            "inner_loss": psi_loss,
            **h.stats,
            **residuals,
            "linear_residual": ratio(norm(mismatch), norm(slope)),
        }
        return h._replace(stats=stats), F2saState(psi, phi, state.count + 1, trail)

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Why the estimate may be wrong, given its stats."""
        return penalty_doubts(
            without_noise(stats),
            tolerance=self.tolerance,
            rounding=self.rounding,
            settle="carry the state through more calls, raise the inner rate, or lower the outer learning "
            "rate and the growth of the multiplier",
        )


def _direction(
    problem: Problem,
    psi: Params,
    phi: Params,
    multiplier: Scalar,
    meta: Meta,
    task: Task,
    keys: tuple[Key, Key],
) -> Hypergradient:
    """∂θ f(φ) + λ (∂θ g(φ) − ∂θ g(ψ)); the value is f(ψ). `keys` are those of g and of f."""
    inner_key, outer_key = keys
    value, stats = outer_objective(problem, psi, meta, task, outer_key)
    direct = differentiate(lambda m: (problem.outer_loss(phi, m, task.query, outer_key), {}), meta).grad
    slope = jax.grad(problem.inner_loss, argnums=1)
    at_psi, at_phi = _at_both(lambda params: slope(params, meta, task.support, inner_key), psi, phi)
    pull = jax.tree.map(lambda x, y: multiplier.astype(x.dtype) * (x - y), at_phi, at_psi)
    grad = jax.tree.map(lambda d, p: d + p, direct, pull)
    rounding = jnp.maximum(cancellation(phi, psi), cancellation(at_phi, at_psi))
    stats = {
        **stats,
        **gradient_stats(value, grad),
        "multiplier": multiplier,
        # What the difference contributes is what its rounding error is a part of.
        "rounding": rounding * ratio(norm(pull), norm(grad)),
    }
    return Hypergradient(value, grad, stats)


def _at_both(function: Callable[[Params], Any], psi: Params, phi: Params) -> tuple[Any, Any]:
    """`function` at ψ and at φ, side by side where they have matrices, whose products then share the rows.

    Two products of rows and a vector are faster one by one.
    """
    if all(jnp.ndim(leaf) < 2 for leaf in jax.tree.leaves(psi)):
        return function(psi), function(phi)
    both = jax.vmap(function)(jax.tree.map(lambda x, y: jnp.stack([x, y]), psi, phi))
    return jax.tree.map(lambda leaf: leaf[0], both), jax.tree.map(lambda leaf: leaf[1], both)
