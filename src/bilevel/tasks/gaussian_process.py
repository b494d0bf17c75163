"""Functions drawn from Gaussian processes: regression tasks whose best possible answer is known."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.tree_util import register_static

from bilevel.problem import Key, Task
from bilevel.tasks.harmonics import require_counts, require_range

_ROOT3, _ROOT5 = 3**0.5, 5**0.5

# Correlation as a function of the distance in length scales.
_STATIONARY: dict[str, Callable[[jax.Array], jax.Array]] = {
    "rbf": lambda r: jnp.exp(-0.5 * r**2),
    "matern12": lambda r: jnp.exp(-r),
    "matern32": lambda r: (1 + _ROOT3 * r) * jnp.exp(-_ROOT3 * r),
    "matern52": lambda r: (1 + _ROOT5 * r + 5 / 3 * r**2) * jnp.exp(-_ROOT5 * r),
}
KERNELS = (*_STATIONARY, "periodic")


def covariance(
    kernel: str, a: jax.Array, b: jax.Array, length_scale: jax.Array | float, period: jax.Array | float = 1.0
) -> jax.Array:
    """Correlations of a process of variance one between two sets of points.

        rbf         exp(−r²/2),                  r = |a − b| / length_scale
        matern12    exp(−r);   matern32    (1 + √3 r) exp(−√3 r);   matern52   (1 + √5 r + 5r²/3) exp(−√5 r)
        periodic    exp(−2 Σ sin²(π (a − b) / period) / length_scale²)

    Args:
        kernel: its name.
        a: [n, d].
        b: [m, d].
        length_scale: how far the process remembers.
        period: of "periodic".

    Returns:
        [n, m].

    >>> print(round(float(covariance("rbf", jnp.zeros((1, 1)), jnp.ones((1, 1)), 1.0)[0, 0]), 4))
    0.6065
    """
    difference = a[:, None, :] - b[None, :, :]
    if kernel == "periodic":
        return jnp.exp(-2 * jnp.sum(jnp.sin(jnp.pi * difference / period) ** 2, axis=-1) / length_scale**2)
    return _STATIONARY[kernel](jnp.sqrt(jnp.sum(difference**2, axis=-1)) / length_scale)


@register_static
@dataclass(frozen=True)
class GaussianProcess:
    """Draw regression tasks: the values of one random function at random points.

        f ~ GP(0, s² k),   y = f(x) + noise·ε,   x uniform in [-2, 2]^dimensions

    Length scale, height s (and period) are drawn anew for every task, uniformly from their ranges. Support
    and query are values of one function, with independent noise.

    Args:
        kernel: "rbf", "matern12", "matern32", "matern52" or "periodic".
        shots: support points.
        queries: query points.
        length_scale: lowest and highest.
        height: lowest and highest s.
        period: lowest and highest, for "periodic".
        noise: standard deviation of the noise.
        dimensions: of x.

    Raises:
        ValueError: for an unknown kernel, or a number or range that makes no sense.

    Cost: one Cholesky factorization of (shots + queries)². A jitter of 1e-5 s² on the diagonal keeps it
    positive in float32; what it adds is noise of standard deviation 0.003 s.

    Reference: Garnelo et al., Neural processes, 2018; Kim et al., Attentive neural processes, 2019.

    >>> x, y = jax.jit(GaussianProcess("matern52", shots=5, queries=20))(jax.random.key(0)).query
    >>> x.shape, y.shape
    ((20, 1), (20, 1))
    """

    kernel: str = "rbf"
    shots: int = 10
    queries: int = 10
    length_scale: tuple[float, float] = (0.1, 0.6)
    height: tuple[float, float] = (0.1, 1.0)
    period: tuple[float, float] = (0.5, 2.0)
    noise: float = 0.02
    dimensions: int = 1

    def __post_init__(self):
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {self.kernel!r}")
        require_counts("GaussianProcess", shots=self.shots, queries=self.queries, dimensions=self.dimensions)
        for what in ("length_scale", "height", "period"):
            require_range("GaussianProcess", what, getattr(self, what))
        if self.noise < 0:
            raise ValueError(f"GaussianProcess: noise must be at least 0, got {self.noise}")

    def __call__(self, key: Key) -> Task:
        """Draw a task: (x float32 [n, dimensions], y float32 [n, 1]) twice."""
        scale_key, x_key, value_key, noise_key = jax.random.split(key, 4)
        parts = jax.random.uniform(scale_key, (3,), jnp.float32)
        ranges = (self.length_scale, self.height, self.period)
        length_scale, height, period = (
            low + (high - low) * part for (low, high), part in zip(ranges, parts, strict=True)
        )
        total = self.shots + self.queries
        x = jax.random.uniform(x_key, (total, self.dimensions), jnp.float32, -2.0, 2.0)
        k = covariance(self.kernel, x, x, length_scale, period)
        root = jnp.linalg.cholesky(k + 1e-5 * jnp.eye(total, dtype=jnp.float32))
        y = height * (root @ jax.random.normal(value_key, (total, 1), jnp.float32))
        y = y + self.noise * jax.random.normal(noise_key, (total, 1), jnp.float32)
        n = self.shots
        return Task(support=(x[:n], y[:n]), query=(x[n:], y[n:]))
