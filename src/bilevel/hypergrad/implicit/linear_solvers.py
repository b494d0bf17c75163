"""Matrix-free solvers of the linear system of an implicit hypergradient: one value each, exchangeable.

    A q = b     with `A` known only by its products,  `b = ∂φ f`

`A` is the Hessian of the inner loss, ∇²φφ g (`system = "gradient"`, symmetric), or I − (∂Φ/∂φ)ᵀ for the
update Φ of an inner solver with steps (`system = "update"`, in general not symmetric).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from bilevel.hypergrad.requirements import require_count
from bilevel.problem import Key, Scalar

Vector = Any  # a tree like params
Info = dict[str, Scalar]


class LinearSolver(Protocol):
    """What `Implicit` asks of a linear solver. A frozen dataclass with these makes a new one."""

    @property
    def system(self) -> str:
        """ "gradient" or "update": which equations the inner solution is taken to solve."""
        ...

    def solve(self, matvec: Callable[[Vector], Vector], b: Vector, key: Key) -> tuple[Vector, Info]:
        """About A⁻¹ b, and scalars to report. Need not be differentiable."""
        ...

    @property
    def remedy(self) -> str:
        """What to do when the residual is too large."""
        ...

    def doubts(self, stats: Mapping[str, float]) -> list[str]:
        """Sentences on what else went wrong, given the figures of `solve`."""
        ...


def solve_scaled(
    solver: LinearSolver, matvec: Callable[[Vector], Vector], b: Vector, key: Key
) -> tuple[Vector, Info]:
    """`solver.solve` on b with a largest element of 1: the squares of small ones would vanish.

    >>> q, _ = solve_scaled(cg(1), lambda v: 2 * v, jnp.float32(1e-30), jax.random.key(0))
    >>> print(q)
    5e-31
    """
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0).astype(float) for x in jax.tree.leaves(b)]))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    q, info = solver.solve(matvec, jax.tree.map(lambda x: (x / scale).astype(x.dtype), b), key)
    return jax.tree.map(lambda x: (x * scale).astype(x.dtype), q), info


@dataclass(frozen=True)
class ConjugateGradient:
    """See `cg`."""

    num_steps: int

    def __post_init__(self):
        require_count("cg", num_steps=self.num_steps)

    def solve(self, matvec, b, key):
        """At most `num_steps` steps; fewer where the residual has vanished or curvature is not positive."""
        bb = inner_product(b, b)
        stop = jnp.finfo(bb.dtype).eps ** 2 * bb

        def unfinished(carry):
            step, _, _, _, rr, _, bent = carry
            return (step < self.num_steps) & ~(rr <= stop) & ~bent  # NaN goes on, into the answer

        def body(carry):
            step, x, r, p, rr, (low, high), _ = carry
            ap = matvec(p)
            pap = inner_product(p, ap)
            curvature = pap / inner_product(p, p)
            bent = pap <= 0
            alpha = jnp.where(bent, 0, rr / jnp.where(bent, 1, pap))
            x, r = add_scaled(x, alpha, p), add_scaled(r, -alpha, ap)
            new = inner_product(r, r)
            p = add_scaled(r, new / rr, p)
            seen = jnp.fmin(low, curvature), jnp.fmax(high, curvature)
            return step + 1, x, r, p, new, seen, bent

        none = jnp.asarray(jnp.nan, bb.dtype)
        zero = jax.tree.map(jnp.zeros_like, b)
        start = (jnp.int32(0), zero, b, b, bb, (none, none), jnp.zeros((), bool))
        _, x, _, _, _, (low, high), _ = jax.lax.while_loop(unfinished, body, start)
        return x, {"smallest_curvature": jnp.nan_to_num(low), "largest_curvature": jnp.nan_to_num(high)}

    @property
    def system(self) -> str:
        return "gradient"

    @property
    def remedy(self) -> str:
        return f"raise num_steps of cg, now {self.num_steps}, or better the conditioning (a proximal term)"

    def doubts(self, stats):
        low, high = stats.get("smallest_curvature", 0.0), stats.get("largest_curvature", 0.0)
        said = indefinite(low, max(abs(low), abs(high)), "cg stopped there: it needs a positive one")
        if not said and low <= 0 and stats.get("linear_residual", 0.0) > 1e-2:
            said.append(
                "cg stopped at a direction in which the inner Hessian has no positive curvature, so that "
                "more steps do not help; use bl.hypergrad.gmres(num_steps), or add a penalty to the inner "
                "loss"
            )
        return said


def cg(num_steps: int) -> ConjugateGradient:
    """Conjugate gradients, from zero.

        error in the norm of H after j steps ≤ 2 ((√κ − 1) / (√κ + 1))ʲ  of that at the start

    Args:
        num_steps: j, at least 1; p steps are exact but for rounding.

    Raises:
        ValueError: when `num_steps` is no positive whole number.

    Info: `smallest_curvature` and `largest_curvature`, of pᵀHp / pᵀp over the directions taken. It stops at
    a direction of curvature ≤ 0, where H is no inner product, and `doubts` tells.

    Cost: one Hessian-vector product a step; four vectors.

    Reference: Hestenes, Stiefel, 1952; Rajeswaran et al., iMAML, 2019.

    >>> matvec = lambda v: jnp.array([1.0, 4.0]) * v
    >>> print(cg(2).solve(matvec, jnp.array([1.0, 1.0]), jax.random.key(0))[0])
    [1.   0.25]
    """
    return ConjugateGradient(num_steps)


@dataclass(frozen=True)
class Direct:
    """See `direct`."""

    max_size: int = 2000
    system: str = "gradient"

    def __post_init__(self):
        require_count("direct", max_size=self.max_size)
        require_system("direct", self.system)

    def solve(self, matvec, b, key):
        """Builds the matrix, column by column, and factors it."""
        flat, unravel = ravel_pytree(b)
        if flat.size > self.max_size:
            raise ValueError(
                f"direct() would build a {flat.size} x {flat.size} matrix, above its max_size of "
                f"{self.max_size}; use bl.hypergrad.cg(num_steps), or raise max_size"
            )
        rows = jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])(jnp.eye(flat.size, dtype=flat.dtype))
        return unravel(jnp.linalg.solve(rows.T, flat)), {}

    @property
    def remedy(self) -> str:
        return "the inner Hessian is singular or nearly so: add a penalty to the inner loss"

    def doubts(self, stats):
        return []


def direct(max_size: int = 2000, *, system: str = "gradient") -> Direct:
    """Build the matrix and solve exactly: for small p.

    Args:
        max_size: the largest dim φ that it takes.
        system: "gradient", or "update" as in `fixed_point`.

    Raises:
        ValueError: for a larger dim φ, when it is used; for arguments out of range, at once.

    Cost: p Hessian-vector products, p² memory, p³ / 3 operations.

    >>> matvec = lambda v: jnp.array([[2.0, 1.0], [1.0, 3.0]]) @ v
    >>> print(direct().solve(matvec, jnp.array([3.0, 4.0]), jax.random.key(0))[0])
    [1. 1.]
    """
    return Direct(max_size, system)


def add_scaled(x: Vector, scale: float | jax.Array, y: Vector) -> Vector:
    """x + scale y, each leaf in its own dtype."""
    return jax.tree.map(lambda x, y: (x + scale * y).astype(x.dtype), x, y)


def inner_product(x: Vector, y: Vector) -> jax.Array:
    """⟨x, y⟩ over all leaves."""
    return jnp.asarray(optax.tree.vdot(x, y))


def indefinite(low: float, scale: float, consequence: str) -> list[str]:
    """The doubt about a Hessian with a negative eigenvalue, if `low` is one and no rounding."""
    if not low < -1e-5 * scale:  # rounding leaves about 1e-7 of the largest in float32
        return []
    return [
        f"the inner Hessian has a direction of negative curvature ({low:.3g}), so that params are at no "
        f"minimum of the inner loss; {consequence}. Take more inner steps, add a proximal term "
        "(bl.inner.proximal), or differentiate the steps that ran with bl.hypergrad.Mixed()"
    ]


def require_system(owner: str, value: object) -> None:
    """Refuse what is neither of the two systems."""
    if value not in ("gradient", "update"):
        raise ValueError(f'{owner}: system must be "gradient" or "update", got {value!r}')
