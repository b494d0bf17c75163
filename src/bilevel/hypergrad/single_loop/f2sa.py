"""F2SA: the penalty hypergradient in a single loop of stochastic first-order steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.hypergrad.common import split_keys
from bilevel.hypergrad.first_order.penalized import penalty_doubts, penalty_hypergradient, pulled, pulled_task
from bilevel.hypergrad.requirements import require_count_or_none, require_positive, require_single_step
from bilevel.hypergrad.single_loop.minibatch import draw_task
from bilevel.hypergrad.single_loop.warm_start import (
    Trail,
    follow,
    start_trail,
    warn_of_leaves_out_of_sight,
    without_noise,
)
from bilevel.problem import (
    Hypergradient,
    InnerSolver,
    InnerState,
    Problem,
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

    Stats: as in `Penalty` but for `penalty_residual`, of the rows drawn; the largest residual so far stands
    in for ‖∇φ g(φ₀)‖. `inner_drift` and `linear_drift` as in `Soba`.

    Cost: 7 gradients of a minibatch; memory of two inner states, independent of dim θ. Biased by O(1/λ), and
    while ψ and φ lag behind θ: the outer rate must fall as λ grows.

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
        rows = draw_task(task, self.batch_size, inner_key)
        warn_of_leaves_out_of_sight(self, problem, state.psi.params, meta, rows, key)

        psi, _ = solver.step(problem, meta, rows, state.psi, step_key)
        lifted = pulled(problem, multiplier, outer_key)
        phi, _ = solver.step(lifted, meta, pulled_task(rows), state.phi, step_key)
        fresh = draw_task(task, self.batch_size, step_key)
        h, residuals = penalty_hypergradient(
            problem, psi.params, phi.params, multiplier, meta, fresh, (step_key, outer_key)
        )
        stats, trail = follow(state.trail, *residuals)
        return h._replace(stats={**h.stats, **stats}), F2saState(psi, phi, state.count + 1, trail)

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Why the estimate may be wrong, given its stats."""
        return penalty_doubts(
            without_noise(stats),
            tolerance=self.tolerance,
            rounding=self.rounding,
            settle="carry the state through more calls, raise the inner rate, or lower the outer learning "
            "rate and the growth of the multiplier",
        )
