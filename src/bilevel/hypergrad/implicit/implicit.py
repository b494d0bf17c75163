"""Implicit hypergradient: only the solution is differentiated, never the way to it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from bilevel.hypergrad.common import differentiate, outer_objective, split_keys
from bilevel.hypergrad.implicit.implicit_function import implicit_function
from bilevel.hypergrad.implicit.inner_system import inner_error, inner_system, require_solution, warn_of_zeros
from bilevel.hypergrad.implicit.linear_solvers import LinearSolver, cg, inner_product, solve_scaled
from bilevel.hypergrad.requirements import require_positive
from bilevel.hypergrad.residuals import norm
from bilevel.problem import Hypergradient, InnerSolver, Key, Meta, Params, Problem, Task


@dataclass(frozen=True)
class Implicit:
    """Implicit hypergradient: exact at a minimum of the inner loss, however it was found.

        dF/dθ = ∂θ f − (∂θ ∇φ g)ᵀ q,     ∇²φφ g · q = ∂φ f

    Only products with the Hessian are formed. The steps of the solver are not differentiated, so any
    solver will do, and memory does not grow with them.

        |error| ≤ c₁ |φ − φ*| + c₂ |∇²φφ g q − ∂φ f|

    Args:
        linear_solver: how q is found: `cg`, `neumann`, `gmres`, `bicgstab`, `direct`, `nystrom`,
            `fixed_point`.
        inner_tolerance: `doubts` speaks when `stats["inner_error"]` is larger.
        linear_tolerance: `doubts` speaks when `stats["linear_residual"]` is larger.

    Stats: `inner_residual` = |∇φ g(φ)|; `inner_error`, an estimate of |φ − φ*| relative to |φ| which does
    not change when the losses or the parameters are scaled (see `inner_system.inner_error`);
    `linear_residual` = |A q − b| / |b|; those of the linear solver.

    Raises:
        TypeError: when the solver has no `solve`; with a linear solver of the update, when it has no
            steps or its optimizer has a state; when the inner loss holds a `jax.custom_vjp`.
        ValueError: when a tolerance is not positive.

    Warns:
        FirstOrderWarning: once per trace, naming each leaf of `meta` that acts only through the start or
            the rates of the solver: a solution does not depend on them, so its hypergradient is zero.
            `bl.inner.proximal(problem, strength)` ties the start to the solution; this is iMAML.

    Cost: the inner solve, the linear solver's products of about 2 inner gradients each, and two more.
    Independent of K in memory and of dim θ. Biased by what `stats` report; where the solution is not finite
    so is the hypergradient, never zero.

    Reference: Bengio, 2000; Pedregosa, 2016; Rajeswaran et al., iMAML, 2019; Lorraine et al., 2020.

    >>> import bilevel as bl, optax
    >>> problem = bl.Problem(init=lambda meta, key: jnp.float32(0.0),
    ...                      inner_loss=lambda params, meta, batch, key: (params - 3 * meta) ** 2,
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(0.5), num_steps=1)
    >>> task, key = bl.Task(None, None), jax.random.key(0)
    >>> h = bl.hypergradient(problem, solver, Implicit(cg(1)), 1.0, task, key)
    >>> print(h.grad, h.stats["inner_residual"], h.stats["linear_residual"])
    3.0 0.0 0.0
    """

    linear_solver: LinearSolver = field(default_factory=lambda: cg(10))
    inner_tolerance: float = 1e-2
    linear_tolerance: float = 1e-2

    def __post_init__(self):
        for name in ("inner_tolerance", "linear_tolerance"):
            require_positive(self, **{name: getattr(self, name)})
        if not hasattr(self.linear_solver, "solve") or not hasattr(self.linear_solver, "system"):
            raise TypeError(
                "Implicit.linear_solver must be a linear solver such as bl.hypergrad.cg(num_steps=10), "
                f"got {self.linear_solver!r}"
            )

    def check(self, problem: Problem, solver: InnerSolver) -> None:
        """Needs a solver, and one with steps where the linear solver is one of the update."""
        require_solution(self, solver, self.linear_solver.system)

    def init(self, problem, solver, meta, task, key) -> tuple[()]:
        """Stateless."""
        return ()

    def solve(self, problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key) -> Params:
        """The inner solution, differentiable in `meta`, data and closures, to any order, in both modes.

        Each derivative takes a linear solve. An inexact one gives reverse and forward mode answers that
        differ by as much as its residual.
        """
        system = inner_system(problem, solver, meta, task, key, self.linear_solver.system)
        return implicit_function(
            system.root, system.params, (meta, task), self.linear_solver, _linear_key(key)
        )

    def estimate(self, problem, solver, meta, task, state, key) -> tuple[Hypergradient, tuple[()]]:
        """The hypergradient of one task."""
        return implicit_hypergradient(
            type(self).__name__, problem, solver, self.linear_solver, meta, task, key
        ), state

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """What the figures give reason to doubt, with the remedy; empty when nothing."""
        said = inner_doubts("Implicit", stats, self.inner_tolerance)
        if not stats["linear_residual"] <= self.linear_tolerance:
            said.append(
                f"Implicit: the linear system is solved to a relative residual of "
                f"{stats['linear_residual']:.2g} only (linear_tolerance is {self.linear_tolerance:g}): "
                f"{self.linear_solver.remedy}"
            )
        return said + [f"Implicit: {doubt}" for doubt in self.linear_solver.doubts(dict(stats))]


def _linear_key(key: Key) -> Key:
    return jax.random.split(key, 3)[2]  # the first two start the inner loop


def implicit_hypergradient(
    name: str,
    problem: Problem,
    solver: InnerSolver,
    linear_solver: LinearSolver,
    meta: Meta,
    task: Task,
    key: Key,
) -> Hypergradient:
    """The hypergradient by one adjoint solve, with its residuals in `stats`."""
    inner_key, outer_key = split_keys(key)
    meta, task = jax.tree.map(jnp.asarray, (meta, task))
    system = inner_system(problem, solver, meta, task, inner_key, linear_solver.system)
    warn_of_zeros(name, problem, system, meta, task, outer_key)

    def outer(params):
        return outer_objective(problem, params, meta, task, outer_key)[0]

    def root(params):
        return system.root(params, meta, task)

    transposed = _transposed_product(root, system.params, symmetric=linear_solver.system == "gradient")
    b = jax.grad(outer)(system.params)
    q, info = solve_scaled(linear_solver, transposed, b, _linear_key(inner_key))
    size, residual = norm(b), norm(root(system.params))
    product = transposed(q)
    left = norm(jax.tree.map(jnp.subtract, product, b))
    usable = jnp.isfinite(residual) & jnp.isfinite(size)
    stats = {
        "inner_residual": residual,
        **system.stats,
        "inner_error": inner_error(system, residual, q, product),
        "linear_residual": jnp.where(size == 0, 0.0, left / size),
        **info,
    }

    def objective(meta):
        value, more = outer_objective(problem, system.params, meta, task, outer_key)
        pulled = inner_product(q, system.root(system.params, meta, task))
        # Adds nothing to the value, and −(∂θ R)ᵀ q to the gradient.
        return value - (pulled - jax.lax.stop_gradient(pulled)), {**more, **stats}

    h = differentiate(objective, meta)
    # A solver that stops at once on NaN answers zero: an unusable solution must not look like a flat one.
    grad = jax.tree.map(lambda leaf: jnp.where(usable, leaf, jnp.nan), h.grad)
    return h._replace(grad=grad, stats={**h.stats, "finite": h.stats["finite"] * usable})


def _transposed_product(root: Callable, at: Params, symmetric: bool) -> Callable[[Params], Params]:
    """v ↦ (∂R)ᵀ v."""
    if symmetric:  # forward over reverse: nothing is kept
        return lambda vector: jax.jvp(root, (at,), (vector,))[1]
    pullback = jax.vjp(root, at)[1]
    return lambda vector: pullback(vector)[0]


def inner_doubts(name: str, stats: Mapping[str, float], tolerance: float) -> list[str]:
    """Doubts about the inner solution itself."""
    residual, error = stats["inner_residual"], stats["inner_error"]
    if not stats["finite"] >= 1:  # a mean over tasks
        return [
            f"{name}: the inner solution or what follows from it is not finite in {1 - stats['finite']:.0%} "
            f"of the tasks (inner_residual {residual:.3g}), so there is no hypergradient: the inner solver "
            "diverged. Lower its step size, or use bl.inner.Converged(...)"
        ]
    said = []
    if not stats.get("converged", 1.0) >= 1:
        said.append(
            f"{name}: the inner solver did not converge in {stats['num_steps']:.4g} steps (it did in "
            f"{stats['converged']:.0%} of the tasks; inner_residual {residual:.3g}). Raise max_steps of "
            "bl.inner.Converged, loosen the tolerance of its minimizer, or take another minimizer"
        )
    if not error <= tolerance:
        said.append(
            f"{name}: the inner problem is not solved: the remaining inner gradient of norm {residual:.3g} "
            f"stands for a relative error of about {error:.2g} in params (inner_tolerance is {tolerance:g}). "
            "Take more inner steps, use bl.inner.Converged(...), or differentiate the steps that ran with "
            "bl.hypergrad.Mixed()"
        )
    return said
