"""Linear solvers for systems that are indefinite or not symmetric, of jax.scipy."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.sparse import linalg as sparse

from bilevel.hypergrad.implicit.linear_solvers import require_system
from bilevel.hypergrad.requirements import require_count


@dataclass(frozen=True)
class Krylov:
    """See `gmres` and `bicgstab`."""

    method: str
    num_steps: int
    restart: int | None = None
    system: str = "gradient"

    def __post_init__(self):
        require_count(self.method, num_steps=self.num_steps)
        if self.restart is not None:
            require_count(self.method, restart=self.restart)
        require_system(self.method, self.system)

    def solve(self, matvec, b, key):
        """Through jax.scipy, with the number of steps as the only limit but rounding."""
        flat, unravel = ravel_pytree(b)  # of one dtype: the basis is one array

        def product(vector):
            return ravel_pytree(matvec(unravel(vector)))[0]

        tolerance = 10 * float(jnp.finfo(flat.dtype).eps)
        if self.method == "gmres":
            restart = min(self.restart or self.num_steps, self.num_steps)
            cycles = -(-self.num_steps // restart)
            x, _ = sparse.gmres(
                product, flat, tol=tolerance, restart=restart, maxiter=cycles, solve_method="incremental"
            )
        else:
            x, _ = sparse.bicgstab(product, flat, tol=tolerance, maxiter=self.num_steps)
        # Both answer zero to a right-hand side that is not finite.
        return unravel(jnp.where(jnp.all(jnp.isfinite(flat)), x, jnp.nan)), {}

    @property
    def remedy(self) -> str:
        return f"raise num_steps of {self.method}, now {self.num_steps}" + (
            f", or its restart, now {self.restart}" if self.restart else ""
        )

    def doubts(self, stats):
        return []


def gmres(num_steps: int, restart: int | None = None, *, system: str = "gradient") -> Krylov:
    """Generalized minimal residual, for systems that are indefinite or not symmetric.

        q minimizes |A q − b| over span(b, Ab, ..., Aʲ⁻¹b)

    Args:
        num_steps: j, at least 1.
        restart: keep only this many vectors, then start again from what was reached; None keeps all j.
        system: "gradient", or "update" as in `fixed_point`.

    Raises:
        ValueError: for arguments out of range.

    Cost: a product a step; j (or `restart`) vectors.

    Reference: Saad, Schultz, 1986.

    >>> import jax
    >>> matvec = lambda v: jnp.array([[1.0, 2.0], [-2.0, 1.0]]) @ v
    >>> q, _ = gmres(2).solve(matvec, jnp.array([5.0, 0.0]), jax.random.key(0))
    >>> print(jnp.round(q, 4))
    [1. 2.]
    """
    return Krylov("gmres", num_steps, restart, system)


def bicgstab(num_steps: int, *, system: str = "gradient") -> Krylov:
    """Stabilized bi-conjugate gradients, for systems that are not symmetric, in constant memory.

    Args:
        num_steps: at least 1; the residual need not fall at every one.
        system: "gradient", or "update" as in `fixed_point`.

    Raises:
        ValueError: for arguments out of range.

    Cost: two products a step; eight vectors.

    Reference: van der Vorst, 1992.

    >>> import jax
    >>> matvec = lambda v: jnp.array([[3.0, 1.0], [-1.0, 2.0]]) @ v
    >>> q, _ = bicgstab(2).solve(matvec, jnp.array([5.0, 3.0]), jax.random.key(0))
    >>> print(jnp.round(q, 4))
    [1. 2.]
    """
    return Krylov("bicgstab", num_steps, None, system)
