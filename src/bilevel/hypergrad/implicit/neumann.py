"""The two linear solvers that iterate x ← x + η (b − A x): Neumann series and the inner update itself."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bilevel.hypergrad.implicit.linear_solvers import Vector, add_scaled, inner_product
from bilevel.hypergrad.requirements import require_count, require_positive
from bilevel.problem import Scalar


@dataclass(frozen=True)
class Neumann:
    """See `neumann`."""

    num_steps: int
    step_size: float

    def __post_init__(self):
        require_count("neumann", num_steps=self.num_steps)
        require_positive("neumann", step_size=self.step_size)

    def solve(self, matvec, b, key):
        """The first `num_steps` terms."""
        x, largest = _richardson(matvec, b, self.step_size, self.num_steps)
        return x, {"largest_curvature": largest}

    @property
    def system(self) -> str:
        return "gradient"

    @property
    def remedy(self) -> str:
        return (
            f"raise num_steps of neumann, now {self.num_steps}, or its step_size, now {self.step_size:g}, "
            "towards 1 / the largest eigenvalue of the inner Hessian, or use cg"
        )

    def doubts(self, stats):
        largest = stats.get("largest_curvature", 0.0)
        if largest * self.step_size < 2:
            return []
        return [
            f"the Neumann series diverges: it needs step_size < 2/L, the inner Hessian has an eigenvalue of "
            f"at least {largest:.3g} and step_size is {self.step_size:g}; take at most {1 / largest:.2g}"
        ]


def neumann(num_steps: int, step_size: float) -> Neumann:
    """Neumann series; the same as differentiating `num_steps` gradient steps at the solution.

        q = η Σ_{i<j} (I − η H)ⁱ b,     relative residual ≤ max(|1 − η μ|, |1 − η L|)ʲ

    Args:
        num_steps: j terms, at least 1.
        step_size: η, below 2 / L.

    Raises:
        ValueError: when `num_steps` or `step_size` is not positive.

    Info: `largest_curvature`, a lower bound of L (0 with one term). With η ≥ 2 / L the series diverges; the
    residual and `doubts` tell, with the η to take.

    Cost: j − 1 Hessian-vector products; two vectors.

    Reference: Lorraine, Vicol, Duvenaud, 2020.

    >>> print(neumann(3, step_size=0.5).solve(lambda v: v, jnp.float32(1.0), jax.random.key(0))[0])
    0.875
    """
    return Neumann(num_steps, step_size)


@dataclass(frozen=True)
class FixedPoint:
    """See `fixed_point`."""

    num_steps: int

    def __post_init__(self):
        require_count("fixed_point", num_steps=self.num_steps)

    def solve(self, matvec, b, key):
        """v ← v + (b − A v), `num_steps` times from zero."""
        return _richardson(matvec, b, 1.0, self.num_steps)[0], {}

    @property
    def system(self) -> str:
        return "update"

    @property
    def remedy(self) -> str:
        return (
            f"raise num_steps of fixed_point, now {self.num_steps}; if the residual grows with it the inner "
            "update does not contract at the solution: lower the inner rate, or use gmres of the update"
        )

    def doubts(self, stats):
        return []


def fixed_point(num_steps: int) -> FixedPoint:
    """Iterate the transposed update of the inner solver itself, as reverse mode would at the solution.

        v ← (∂Φ/∂φ)ᵀ v + ∂φ f,     dF/dθ = ∂θ f + (∂Φ/∂θ)ᵀ v

    Right where the inner solver stops at a point that is a fixed point of its update Φ and not quite a
    minimum of the inner loss (weight decay in the optimizer), and for preconditioned updates.

    Args:
        num_steps: at least 1; each multiplies the error by the contraction rate of Φ.

    Raises:
        ValueError: when `num_steps` is no positive whole number. `Implicit` refuses inner solvers without
            steps, and optimizers with a state of their own (momentum, Adam).

    Cost: a vector-Jacobian product of one inner step for each; two vectors.

    Reference: Christianson, 1994; Grazzi et al., 2020.

    >>> print(fixed_point(4).solve(lambda v: 0.5 * v, jnp.float32(1.0), jax.random.key(0))[0])
    1.875
    """
    return FixedPoint(num_steps)


def _richardson(matvec, b, step_size, num_steps) -> tuple[Vector, Scalar]:
    """x ← x + η (b − A x) from zero, and the largest Rayleigh quotient of A along its residuals."""

    def body(_, carry):
        x, r, largest = carry
        ar = matvec(r)
        rayleigh = inner_product(r, ar) / inner_product(r, r)
        # Once a diverging series has overflowed the quotient says nothing.
        largest = jnp.where(jnp.isfinite(rayleigh), jnp.maximum(largest, rayleigh), largest)
        r = add_scaled(r, -step_size, ar)
        return add_scaled(x, step_size, r), r, largest

    x = add_scaled(jax.tree.map(jnp.zeros_like, b), step_size, b)
    start = (x, b, jnp.zeros_like(inner_product(b, b)))
    x, _, largest = jax.lax.fori_loop(0, num_steps - 1, body, start)
    return x, largest
