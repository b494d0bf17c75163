"""Hypergradient by forward mode: memory that does not grow with the number of inner steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel.hypergrad.common import as_floats, gradient_stats, noise_key, outer_objective, split_keys
from bilevel.hypergrad.iterations.pushforward import by_forward_mode
from bilevel.hypergrad.parts import apart, joined
from bilevel.hypergrad.requirements import require_count_or_none, require_iterative
from bilevel.problem import (
    Hypergradient,
    InnerSolver,
    IterativeSolver,
    Key,
    Meta,
    Params,
    Problem,
    Task,
)

_MANY = 100  # elements of meta, above which reverse mode is certain to be faster


@dataclass(frozen=True)
class Forward:
    """Hypergradient by forward mode, exact or along random directions.

        Zₖ = dφₖ/dθ,   Zₖ₊₁ = (∂Φ/∂φ) Zₖ + ∂Φ/∂θ,   dF/dθ = ∂θ f + Z_Kᵀ ∂φ f
        with n directions uᵢ of independent signs:   dF/dθ ≈ (1/n) Σᵢ ⟨dF/dθ, uᵢ⟩ uᵢ

    Takes any solver that JAX can push a tangent through: steps, closed forms and while loops.
    (`bl.inner.Converged` brings optimistix's own implicit rule along: exact where it has converged.)

    Args:
        num_directions: n; None takes every element of meta, which is exact.
        chunk: how many directions go side by side, dim φ numbers each; None takes all at once.

    Raises:
        TypeError: when the solver has no `solve`.
        ValueError: when `num_directions` or `chunk` is not a positive whole number.

    Stats: `meta_size` (dim θ), `directions` (n, or dim θ); with random directions `standard_error`, the
    2-norm of the estimate's standard deviation, √((dim θ − 1)/n · mean of squared slopes).

    Cost: n (or dim θ) forward derivatives, each of about 3 inner gradients a step, in time; memory
    O(chunk · dim φ + one inner gradient), independent of K. Unbiased: exact for the K steps run, or, with n
    random directions, with a variance of (dim θ − 1)/n · |dF/dθ|².

    Reference: Franceschi et al., 2017; for random directions Baydin et al., Gradients without
    backpropagation, 2022.

    >>> import bilevel as bl, jax, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: 0.5 * params**2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=3)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> print(bl.hypergradient(problem, solver, Forward(), 8.0, task, key).grad)
    0.125
    >>> print(Forward().trajectory(problem, solver, 8.0, task, key).grad)
    [0.5   0.25  0.125]
    """

    num_directions: int | None = None
    chunk: int | None = None
    nests: ClassVar[bool] = True

    def __post_init__(self):
        require_count_or_none(self, num_directions=self.num_directions, chunk=self.chunk)

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Takes every solver."""
        if not callable(getattr(solver, "solve", None)):
            raise TypeError(
                f"Forward needs an inner solver with a method solve, got {type(solver).__name__}; "
                "use bl.inner.Gradient(optimizer, num_steps)"
            )

    def init(self, problem, solver, meta, task, key) -> tuple[()]:
        """Stateless."""
        return ()

    def solve(self, problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key) -> Params:
        """The inner solution, differentiable in `meta` by forward mode: also where reverse mode asks."""
        return by_forward_mode(lambda meta: solver.solve(problem, meta, task, key).params)(meta)

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, tuple[()]]:
        """The hypergradient of one task."""
        inner_key, outer_key = split_keys(key)
        point, back = ravel_pytree(as_floats(meta))

        def objective(point):
            meta = back(point)
            params, inner_stats = solver.solve(problem, meta, task, inner_key)
            value, stats = outer_objective(problem, params, meta, task, outer_key)
            return value, {**inner_stats, **stats}

        directions = self._directions(point, noise_key(key))

        def slope(i):
            return jax.jvp(objective, (point,), (directions(i),), has_aux=True)

        count = self.num_directions or point.size
        value, slopes, stats = self._each(slope, jnp.arange(count))
        sizes = {"meta_size": jnp.float32(point.size), "directions": jnp.float32(count)}
        if self.num_directions is None:
            flat = slopes
        else:
            flat = _mean(lambda i: slopes[i] * directions(i), count)
            variance = (point.size - 1) / count * jnp.mean(slopes**2)
            sizes["standard_error"] = jnp.sqrt(variance)
        grad = back(flat.astype(point.dtype))
        return Hypergradient(value, grad, {**stats, **sizes, **gradient_stats(value, grad)}), state

    def trajectory(
        self, problem: Problem, solver: IterativeSolver, meta: Meta, task: Task, key: Key
    ) -> Hypergradient:
        """The exact hypergradient after each inner step, as the steps come (RTHO): one loop.

        Args:
            solver: one with steps; with none, the arrays are empty.

        Returns:
            A `Hypergradient` whose value, stats and leaves have a leading axis `[num_steps]`: entry k − 1 is
            that of a solver with k steps. `stats` holds `inner_loss`, where each step began.

        Raises:
            TypeError: when the solver has no steps.

        Cost: as `estimate` plus one outer gradient a step; memory O(dim φ · dim θ + K dim θ).
        """
        require_iterative(self, solver)
        inner_key, outer_key = split_keys(key)
        init_key, step_key = jax.random.split(inner_key)
        point, back = ravel_pytree(as_floats(meta))
        basis = jnp.eye(point.size, dtype=point.dtype)

        def start(point):
            return apart(solver.init(problem, back(point), task, init_key))

        def outer(params, meta):
            return outer_objective(problem, params, meta, task, outer_key)[0]

        def push(function, at, tangents):
            """Its value, the tangent of that for each direction, and what has no tangent."""

            def one(tangents):
                return jax.jvp(function, at, tangents, has_aux=True)

            return self._each(one, tangents)

        def body(carry, _):
            floats, columns, rest = carry

            def advance(point, floats):
                state, loss = solver.step(problem, back(point), task, joined(floats, rest), step_key)
                floats, rest_after = apart(state)
                return floats, (rest_after, loss)

            floats, columns, (rest, loss) = push(advance, (point, floats), (basis, columns))
            params = joined(floats, rest).params
            value, (slope, direct) = jax.value_and_grad(outer, argnums=(0, 1))(params, back(point))
            slopes = jax.vmap(lambda column: optax.tree.vdot(column.params, slope))(columns)
            return (floats, columns, rest), (value, ravel_pytree(direct)[0] + slopes, loss)

        begin = push(start, (point,), (basis,))
        values, slopes, losses = jax.lax.scan(body, begin, length=solver.num_steps)[1]
        return Hypergradient(values, jax.vmap(back)(slopes.astype(point.dtype)), {"inner_loss": losses})

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """What a user should hear about these stats."""
        size, directions = stats.get("meta_size", 0.0), stats.get("directions", 1.0)
        if stats.get("converged", 1.0) < 1:
            return [
                "Forward: the inner solver stopped before it had converged (inner_residual "
                f"{stats.get('inner_residual', float('nan')):.3g}), and its derivative is that of one that "
                "has; give it more max_steps, or run steps of bl.inner.Gradient(optimizer, num_steps)"
            ]
        if self.num_directions is None and size > _MANY:
            return [
                f"Forward differentiates the inner loop once for each of the {size:.0f} elements of meta; "
                "bl.hypergrad.Mixed() costs about 4 inner gradients a step whatever their number, and with "
                "checkpoint=bl.inner.Tree() its memory hardly grows with the steps"
            ]
        ratio = ((size - 1) / directions) ** 0.5 if size > 1 else 0.0
        if self.num_directions is not None and ratio > 1:
            return [
                f"{directions:.0f} random directions estimate {size:.0f} elements with a standard error "
                f"({stats['standard_error']:.3g}) of {ratio:.3g} times their norm; take more directions, "
                "average more tasks, or use bl.hypergrad.Mixed(), which is exact"
            ]
        return []

    def _directions(self, point: jax.Array, key: Key) -> Callable[[jax.Array], jax.Array]:
        """Direction i, made when it is asked for: none of them is stored."""
        if self.num_directions is None:
            return lambda i: jnp.zeros_like(point).at[i].set(1)
        return lambda i: jax.random.rademacher(jax.random.fold_in(key, i), point.shape, point.dtype)

    def _each(self, function: Callable, xs: Any) -> tuple:
        """`function` of each direction, `chunk` at a time: value, tangents `[count, ...]`, and the rest."""
        if self.chunk is None:
            return jax.vmap(function, out_axes=(None, 0, None))(xs)
        out = jax.lax.map(function, xs, batch_size=None if self.chunk == 1 else self.chunk)
        value, tangents, rest = out  # value and rest are the same for all directions
        value, rest = jax.tree.map(lambda leaf: leaf[0], (value, rest))
        return value, tangents, rest


def _mean(function: Callable, count: int):
    """The mean of `function(i)` over i < count, one at a time."""
    shape = jax.eval_shape(function, 0)
    total = jax.lax.fori_loop(
        0, count, lambda i, total: total + function(i), jnp.zeros(shape.shape, shape.dtype)
    )
    return total / count
