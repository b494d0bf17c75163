"""MA-SOBA: SOBA with a moving average of the direction in meta."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.hypergrad.common import gradient_stats
from bilevel.hypergrad.requirements import require_count_or_none, require_positive, require_single_step
from bilevel.hypergrad.single_loop.soba import Soba
from bilevel.hypergrad.single_loop.warm_start import Warm
from bilevel.problem import Hypergradient, InnerSolver, Meta, Problem


class MaSobaState(NamedTuple):
    """SOBA's state, the sum h of past directions, and how much weight it holds."""

    warm: Warm
    average: Meta
    weight: jax.Array


@dataclass(frozen=True)
class MaSoba:
    """SOBA whose direction in θ is an exponential moving average.

        h ← (1 − β) h + β d,   w ← (1 − β) w + β,   grad = h / w,   d the direction of SOBA

    The paper starts from h = 0 and steps along h. Here h is divided by the weight w that it holds, so that
    the first directions are not too short; after 1/β calls the two agree.

    Args:
        linear_rate: ρ of the linear system, as in `Soba`.
        average_rate: β in (0, 1]; 1 is `Soba`.
        batch_size: as in `Soba`.
        tolerance: as in `Soba`.

    Raises:
        TypeError, ValueError: when the solver has no steps or not exactly one; when a field is out of range.

    Warns:
        FirstOrderWarning: naming each leaf of meta that enters neither loss: its gradient is exactly zero.

    Stats: those of `Soba`.

    Cost: that of `Soba`, plus one copy of θ. Biased while the state lags behind θ; at (φ*, q*) unbiased, with
    about β/2 of the variance of `Soba`.

    Reference: Chen, Kim, Balasubramanian, Optimal algorithms for stochastic bilevel optimization under
    relaxed smoothness conditions, 2023.

    >>> import bilevel as bl, jax.numpy as jnp, optax
    >>> problem = bl.Problem(init=lambda meta, key: jnp.zeros(2),
    ...                      inner_loss=lambda params, meta, batch, key: jnp.sum((params - meta) ** 2),
    ...                      outer_loss=lambda params, meta, batch, key: jnp.sum(params**2))
    >>> solver, task = bl.inner.Gradient(optax.sgd(0.3), num_steps=1), bl.Task(None, None)
    >>> meta, key, ma_soba = jnp.array([1.0, 2.0]), jax.random.key(0), MaSoba(linear_rate=0.3)
    >>> state = ma_soba.init(problem, solver, meta, task, key)
    >>> step = jax.jit(lambda state: ma_soba.estimate(problem, solver, meta, task, state, key))
    >>> for _ in range(150):
    ...     h, state = step(state)
    >>> print(jnp.round(h.grad, 3))  # the inner solution is meta, so this is twice meta
    [2. 4.]
    """

    linear_rate: float
    average_rate: float = 0.1
    batch_size: int | None = None
    tolerance: float = 0.1
    settles: ClassVar[bool] = True  # right once its own inner parameters have settled

    def __post_init__(self):
        if not 0 < self.average_rate <= 1:
            raise ValueError(f"MaSoba.average_rate must be above 0 and at most 1, got {self.average_rate!r}")
        require_positive(self, linear_rate=self.linear_rate, tolerance=self.tolerance)
        require_count_or_none(self, batch_size=self.batch_size)

    def _soba(self) -> Soba:
        return Soba(self.linear_rate, self.batch_size, self.tolerance)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with one step."""
        require_single_step(self, solver)

    def init(self, problem, solver, meta, task, key) -> MaSobaState:
        """SOBA's state and an empty average."""
        warm = self._soba().init(problem, solver, meta, task, key)
        return MaSobaState(warm, jax.tree.map(jnp.zeros_like, meta), jnp.zeros((), float))

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, MaSobaState]:
        """The averaged direction, and the state after a step of φ and of q."""
        h, warm = self._soba().estimate(problem, solver, meta, task, state.warm, key)
        keep = 1 - self.average_rate
        average = jax.tree.map(lambda a, d: keep * a + self.average_rate * d, state.average, h.grad)
        weight = keep * state.weight + self.average_rate
        grad = jax.tree.map(lambda a: a / weight.astype(a.dtype), average)
        stats = {**h.stats, **gradient_stats(h.value, grad)}
        return Hypergradient(h.value, grad, stats), MaSobaState(warm, average, weight)

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Why the estimate may be wrong, given its stats."""
        return self._soba().doubts(stats)
