"""The equations that an inner solution satisfies, and what is known of how well it does."""

from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from bilevel.hypergrad.common import largest_elements, outer_objective
from bilevel.hypergrad.implicit.implicit_function import frozen
from bilevel.hypergrad.parts import is_float
from bilevel.hypergrad.residuals import warn_of_zero_leaves
from bilevel.inner.gradient import unroll
from bilevel.inner.solution import solution_keys, solution_stats
from bilevel.linalg import mixed_gradient, reverse_gradient
from bilevel.problem import (
    InnerSolver,
    InnerState,
    IterativeSolver,
    Key,
    Meta,
    Params,
    Problem,
    Scalar,
    Solution,
    Task,
)


class InnerSystem(NamedTuple):
    """An inner solution, given, and the equations R(φ, θ, task) = 0 that it is taken to solve.

    Args:
        params: φ.
        start: φ₀, which tells the scale of φ.
        stats: what the solver said; for "update" also `inner_residual`, which is then not |R|.
        root: `root(params, meta, task, gradient) -> tree like params`; `gradient` as in `linalg`.
    """

    params: Params
    start: Params
    stats: dict[str, Scalar]
    root: Callable


def inner_system(
    problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key, system: str
) -> InnerSystem:
    """Solve the inner problem, and say which equations the result satisfies.

        system "gradient":  R = ∇φ g(φ, θ)         system "update":  R = φ − Φ(φ, θ)

    Raises:
        TypeError: for "update", when the solver has no steps or a state beside its parameters; when the
            inner loss holds a `jax.custom_vjp`, whose Hessian need not be symmetric.
    """
    init_key, loss_key = solution_keys(key)
    start = frozen(lambda meta: problem.init(meta, init_key), meta)
    if system == "update":
        solver = cast(IterativeSolver, solver)  # `require_solution` has seen to it
        state, losses = frozen(lambda meta, task: unroll(problem, solver, meta, task, key), meta, task)
        stats = solution_stats(problem, state.params, meta, task, loss_key)
        if solver.num_steps:
            stats["inner_loss"] = losses[-1]
        return InnerSystem(state.params, start, stats, _update_root(problem, solver, state, key))

    solution: Solution = frozen(lambda meta, task: solver.solve(problem, meta, task, key), meta, task)

    def root(params, meta, task, gradient=mixed_gradient):
        return gradient(problem.inner_loss)(params, meta, task.support, loss_key)[1]

    # The residual is measured below, by whoever solves the system, and not taken from the solver.
    stats = {name: value for name, value in solution.stats.items() if name != "inner_residual"}
    return InnerSystem(solution.params, start, stats, root)


def _update_root(problem: Problem, solver: IterativeSolver, state: InnerState, key: Key) -> Callable:
    others = [leaf for leaf in jax.tree.leaves(state._replace(params=())) if is_float(leaf)]
    if others:
        raise TypeError(
            f"the optimizer of {type(solver).__name__} carries {len(others)} arrays of floats from step to "
            "step (a momentum, moments), so that its update is no function of params alone; use an optimizer "
            "without state, or a linear solver of the inner gradient such as bl.hypergrad.cg(num_steps)"
        )
    _, step_key = jax.random.split(key)

    def root(params, meta, task, gradient=mixed_gradient):
        after, _ = solver.step(problem, meta, task, state._replace(params=params), step_key, gradient)
        return jax.tree.map(jnp.subtract, params, after.params)

    return root


def require_solution(estimator: object, solver: InnerSolver, system: str) -> None:
    """Refuse what cannot be solved, or has no update where the update is what is asked for."""
    name = type(estimator).__name__
    if not isinstance(solver, InnerSolver):
        raise TypeError(
            f"{name} needs an inner solver with a method solve(problem, meta, task, key), got "
            f"{type(solver).__name__}; use bl.inner.Gradient(optimizer, num_steps) or bl.inner.Converged(...)"
        )
    if system == "update" and not isinstance(solver, IterativeSolver):
        raise TypeError(
            f'{name} was given a linear solver of the inner update (fixed_point, or system="update"), and '
            f"{type(solver).__name__} has no steps; use one of the inner gradient, such as "
            "bl.hypergrad.cg(num_steps)"
        )


def inner_error(system: InnerSystem, residual: Scalar, q: Params, product: Params) -> Scalar:
    """How far φ is from the solution, relative to its size: an estimate that costs nothing.

        |R| · (|q| / |A q|) / max(|φ|, |φ − φ₀|)

    |A q| / |q| is the curvature that the outer gradient meets, between the extreme singular values of A
    however bad q is, so |R| |q| / |A q| is a distance. It does not change when the inner loss, the outer
    loss or the parameters are scaled. 0 where R is; infinite where R is not and q is zero, as after
    a divergence into a flat region.
    """
    scale = optax.tree.norm(system.params)
    # A formula may have been given an `init` of another shape, which nothing reads.
    if jax.tree.map(jnp.shape, system.start) == jax.tree.map(jnp.shape, system.params):
        moved = jax.tree.map(jnp.subtract, system.params, system.start)
        scale = jnp.maximum(scale, optax.tree.norm(moved))
    # Of a series that has diverged the squares would overflow.
    largest = jnp.max(largest_elements([q, product]))
    q, product = jax.tree.map(lambda leaf: leaf / largest, (q, product))
    stiffness = optax.tree.norm(product) * scale
    error = residual * optax.tree.norm(q) / stiffness
    error = jnp.where((largest > 0) & (stiffness > 0), error, jnp.inf)
    return jnp.where(residual == 0, 0.0, error)


def warn_of_zeros(name: str, problem: Problem, system: InnerSystem, meta: Meta, task: Task, key: Key) -> None:
    """Name the leaves of meta that reach neither the equations nor the outer loss: their gradient is zero."""

    def acting(meta, params):
        value, _ = outer_objective(problem, params, meta, task, key)
        # Plain reverse mode: what a custom rule reads cannot be told apart.
        return value, system.root(params, meta, task, reverse_gradient)

    warn_of_zero_leaves(
        name,
        acting,
        meta,
        system.params,
        because="a solution of the inner problem does not depend on where the solver started or how fast it "
        "went. To learn an initialization tie it to the solution with bl.inner.proximal(problem, strength), "
        "or use bl.hypergrad.Mixed() or Unroll()",
        stacklevel=5,
    )
