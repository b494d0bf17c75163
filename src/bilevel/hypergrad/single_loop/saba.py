"""SABA: SOBA with SAGA tables, so that its noise vanishes at the solution."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from bilevel.hypergrad.common import split_keys
from bilevel.hypergrad.requirements import require_count_or_none, require_positive, require_single_step
from bilevel.hypergrad.residuals import doubt_above
from bilevel.hypergrad.single_loop.minibatch import batch_numbers, cut, take
from bilevel.hypergrad.single_loop.saga import Table, look_up, make_table
from bilevel.hypergrad.single_loop.warm_start import (
    Warm,
    given,
    implicit_hypergradient,
    inner_products,
    linear_step,
    outer_parts,
    warm_doubts,
    warm_start,
    warn_of_leaves_out_of_sight,
)
from bilevel.problem import Hypergradient, InnerSolver, Key, Problem, Task


class SabaState(NamedTuple):
    """SOBA's state, and a table for each of support and query."""

    warm: Warm
    support: Table  # of (∇φ gᵢ, ∇²φφ gᵢ q, (∂θ∇φ gᵢ)ᵀ q)
    query: Table  # of (∂φ fⱼ, ∂θ fⱼ)


@dataclass(frozen=True)
class Saba:
    """SOBA with variance reduction: each of its five terms is corrected by a SAGA table.

        x̂ᵢ = xᵢ − tableᵢ + mean(table),   tableᵢ ← xᵢ,
        for x = ∇φ g, ∇²φφ g q, (∂θ∇φ g)ᵀ q over batches i of the support,
        and ∂φ f, ∂θ f over batches j of the query

    and with these grad = ∂θ f − (∂θ∇φ g)ᵀ q, φ ← solver step on ∇φ g, q ← q − ρ (∇²φφ g q − ∂φ f).

    Args:
        linear_rate: ρ, as in `Soba`.
        batch_size: rows in a batch. Support and query are cut once, in order, into batches of this size,
            which must divide both; shuffle the rows beforehand if their order means anything. None is one
            batch.
        tolerance: as in `Soba`; the corrected terms are taken to be free of noise.

    Raises:
        TypeError, ValueError: when the solver has no steps or not exactly one; when a field is out of range;
            when `batch_size` does not divide the rows.

    Warns:
        FirstOrderWarning: naming each leaf of meta that enters neither loss: its gradient is exactly zero.

    Stats: those of `Soba`, of the corrected terms; `task_changed` is 1 when the batch is not the one its row
    in the table was made from. The tables belong to one task: a stream of new tasks needs `Soba`.

    Cost: that of `Soba` in time; memory (n / batch_size) × (3 dim φ + 2 dim θ), and one full pass at the
    start. Biased while the state lags behind θ. At a fixed θ it converges to the exact hypergradient with a
    constant rate, where `Soba` keeps fluctuating.

    Reference: Dagréou, Ablin, Vaiter, Moreau, A framework for bilevel optimization, 2022.

    >>> import bilevel as bl, jax.numpy as jnp, optax
    >>> problem = bl.Problem(init=lambda meta, key: jnp.zeros(()),
    ...                      inner_loss=lambda params, meta, x, key: jnp.mean((params - meta * x) ** 2),
    ...                      outer_loss=lambda params, meta, x, key: jnp.mean((params - x) ** 2))
    >>> solver = bl.inner.Gradient(optax.sgd(0.1), num_steps=1)
    >>> task, meta, key = bl.Task(jnp.arange(4.0), jnp.arange(4.0)), jnp.float32(2.0), jax.random.key(0)
    >>> saba = Saba(linear_rate=0.1, batch_size=1)
    >>> step = jax.jit(lambda state, key: saba.estimate(problem, solver, meta, task, state, key))
    >>> state = saba.init(problem, solver, meta, task, key)
    >>> for i in range(300):
    ...     h, state = step(state, jax.random.key(i))
    >>> print(round(float(h.grad), 3))  # φ* = 1.5 θ, so 2 (3 − 1.5) 1.5
    4.5
    """

    linear_rate: float
    batch_size: int | None = None
    tolerance: float = 0.1
    settles: ClassVar[bool] = True  # right once its own inner parameters have settled

    def __post_init__(self):
        require_positive(self, linear_rate=self.linear_rate, tolerance=self.tolerance)
        require_count_or_none(self, batch_size=self.batch_size)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver with one step."""
        require_single_step(self, solver)

    def init(self, problem, solver, meta, task, key) -> SabaState:
        """φ₀, a q that is one step away from 0, and tables filled in one full pass."""
        inner_key, outer_key = split_keys(key)
        step_key = jax.random.split(inner_key)[1]
        warm = warm_start(problem, solver, meta, task, key, self.linear_rate, noisy=False)
        params = warm.inner.params

        def inner_row(batch):
            return inner_products(problem, params, meta, batch, step_key, warm.q)[1:]

        def outer_row(batch):
            direct, slope = outer_parts(problem, params, meta, Task(task.support, batch), outer_key)
            return slope, direct.grad

        query = make_table(outer_row, cut(task.query, self.batch_size, "query")[0])
        support = make_table(inner_row, cut(task.support, self.batch_size, "support")[0])
        return SabaState(warm, support, query)

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, SabaState]:
        """One direction in θ, and the state after a step of φ, of q and of the tables."""
        inner_key, outer_key = split_keys(key)
        step_key = jax.random.split(inner_key)[1]
        warm, params = state.warm, state.warm.inner.params
        i, j, rows = self._draw(task, key)

        direct, slope = outer_parts(problem, params, meta, rows, outer_key)
        warn_of_leaves_out_of_sight(self, problem, params, meta, rows, key)
        products = inner_products(problem, params, meta, rows.support, step_key, warm.q)
        reduced, support, support_changed = look_up(state.support, i, products[1:], rows.support)
        (slope, direct_grad), query, query_changed = look_up(state.query, j, (slope, direct.grad), rows.query)
        products = products._replace(gradient=reduced[0], hessian_q=reduced[1], cross_q=reduced[2])

        h, trail = implicit_hypergradient(
            direct._replace(grad=direct_grad), products, slope, warm.q, warm.trail
        )
        h.stats["task_changed"] = (support_changed | query_changed).astype(jnp.float32)
        inner, _ = solver.step(
            problem, meta, rows, warm.inner, step_key, given(products.loss, products.gradient)
        )
        q = linear_step(warm.q, products.hessian_q, slope, self.linear_rate)
        return h, SabaState(Warm(inner, q, trail), support, query)

    def _draw(self, task: Task, key: Key) -> tuple[jax.Array, jax.Array, Task]:
        support, num_support = cut(task.support, self.batch_size, "support")
        query, num_query = cut(task.query, self.batch_size, "query")
        i, j = batch_numbers((num_support, num_query), key)
        return i, j, Task(take(support, i), take(query, j))

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Why the estimate may be wrong, given its stats."""
        changed = doubt_above(
            stats,
            "task_changed",
            0.0,
            "the SAGA tables were made from other data: Saba needs the same task at every call; use "
            "bl.hypergrad.Soba for a stream of tasks",
        )
        return changed + warm_doubts(
            stats,
            rate_name="linear_rate",
            rate=self.linear_rate,
            tolerance=self.tolerance,
        )
