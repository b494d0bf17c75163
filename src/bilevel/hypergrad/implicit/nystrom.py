"""Nyström approximation of the inner Hessian: a few columns, then solves by Woodbury's identity."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from bilevel.hypergrad.implicit.linear_solvers import indefinite
from bilevel.hypergrad.requirements import require_count, require_positive


@dataclass(frozen=True)
class Nystrom:
    """See `nystrom`."""

    rank: int
    rho: float

    def __post_init__(self):
        require_count("nystrom", rank=self.rank)
        require_positive("nystrom", rho=self.rho)

    def solve(self, matvec, b, key):
        """q = (U Σ² Uᵀ + ρ I)⁻¹ b, with U Σ the factor of the approximation."""
        flat, unravel = ravel_pytree(b)
        if self.rank > flat.size:
            raise ValueError(
                f"nystrom: rank must be at most dim params, {flat.size}, got {self.rank}; "
                "use bl.hypergrad.direct() for so few parameters"
            )
        chosen = jax.random.choice(key, flat.size, (self.rank,), replace=False)
        units = jnp.zeros((self.rank, flat.size), flat.dtype).at[jnp.arange(self.rank), chosen].set(1)
        columns = jax.vmap(lambda e: ravel_pytree(matvec(unravel(e)))[0])(units).T  # C, [p, rank]
        core = columns[chosen]
        eigenvalues, vectors = jnp.linalg.eigh((core + core.T) / 2)  # W, [rank, rank]
        floor = self.rank * jnp.finfo(flat.dtype).eps * jnp.max(jnp.abs(eigenvalues))
        kept = eigenvalues > floor
        root = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, eigenvalues, 1)), 0)
        # By singular values, not by the inverse of W + CᵀC/ρ, which loses all digits where ρ is small.
        u, sigma, _ = jnp.linalg.svd(columns @ vectors * root, full_matrices=False)
        inside = u.T @ flat
        outside = flat - u @ inside
        outside = outside - u @ (u.T @ outside)  # again: rounding would be divided by ρ
        x = u @ (inside / (sigma**2 + self.rho)) + outside / self.rho
        x = jnp.where(jnp.all(jnp.isfinite(core)), x, jnp.nan)
        # W is a part of H: if it has a negative eigenvalue so has H.
        info = {"smallest_curvature": eigenvalues[0], "largest_curvature": eigenvalues[-1]}
        return unravel(x), info

    @property
    def system(self) -> str:
        return "gradient"

    @property
    def remedy(self) -> str:
        return (
            f"raise rank of nystrom, now {self.rank}, or bring rho, now {self.rho:g}, below the smallest "
            "eigenvalue that matters, or use cg"
        )

    def doubts(self, stats):
        low, high = stats.get("smallest_curvature", 0.0), stats.get("largest_curvature", 0.0)
        return indefinite(low, max(abs(low), abs(high)), "nystrom drops it")


def nystrom(rank: int, rho: float) -> Nystrom:
    """Low-rank approximation of H from `rank` of its columns, drawn by the key.

        H ≈ C W⁺ Cᵀ,  C = H[:, chosen],  W = H[chosen, chosen],      q = (C W⁺ Cᵀ + ρ I)⁻¹ b

    Args:
        rank: how many columns, at most dim φ.
        rho: ρ, which stands for every direction that the columns leave out.

    Raises:
        ValueError: for arguments out of range, at once; for a rank above dim φ, when it is used.

    Info: `smallest_curvature`, `largest_curvature`, the extreme eigenvalues of W. With all columns what
    remains is the ρ: a relative error of at most ρ / (μ + ρ).

    Cost: `rank` Hessian-vector products side by side, p · rank memory, p · rank² operations.

    Reference: Hataya, Yamada, 2023.

    >>> matvec = lambda v: jnp.array([1.0, 4.0]) * v
    >>> q, _ = nystrom(2, rho=1e-6).solve(matvec, jnp.array([1.0, 1.0]), jax.random.key(0))
    >>> print(jnp.round(q, 4))
    [1.   0.25]
    """
    return Nystrom(rank, rho)
