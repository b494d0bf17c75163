"""Sums of two sine waves, the second twice as fast: the regression tasks of Lacoste et al. (2018)."""

import jax
import jax.numpy as jnp

from bilevel.problem import Key, Task


def harmonics(
    key: Key,
    shots: int = 10,
    queries: int = 10,
    *,
    noise: float = 0.1,
    frequency: tuple[float, float] = (5.0, 7.0),
) -> Task:
    """Draw one regression task, y = a₁ sin(ωx + b₁) + a₂ sin(2ωx + b₂) + noise·ε.

    a₁, a₂ and ε are standard normal, b₁ and b₂ uniform in [0, 2π], ω uniform in `frequency`; x is normal
    with standard deviation 1 about a centre that is uniform in [-4, 4]. Harder than one sinusoid: the tasks
    lie on no small manifold, and every task shows another piece of the line.

    Args:
        key: random key.
        shots: number of support points.
        queries: number of query points, at the same centre.
        noise: standard deviation of the noise, in support and query.
        frequency: lowest and highest ω.

    Returns:
        Task of (x, y) pairs: float32 [shots, 1] in the support, float32 [queries, 1] in the query.

    Raises:
        ValueError: when `shots` or `queries` is below 1, `noise` below 0, or the frequencies are no range.

    Reference: Lacoste, Oreshkin, Chung, Boquet, Rostamzadeh, Krueger, Uncertainty in multitask transfer
    learning, 2018.

    >>> x, y = harmonics(jax.random.key(0), shots=5).support
    >>> x.shape, y.shape
    ((5, 1), (5, 1))
    """
    require_counts("harmonics", shots=shots, queries=queries)
    if noise < 0:
        raise ValueError(f"harmonics: noise must be at least 0, got {noise}")
    require_range("harmonics", "frequency", frequency)
    wave_key, height_key, x_key, noise_key = jax.random.split(key, 4)
    omega, centre, first, second = jax.random.uniform(wave_key, (4,), jnp.float32)
    omega = frequency[0] + (frequency[1] - frequency[0]) * omega
    heights = jax.random.normal(height_key, (2,), jnp.float32)
    total = shots + queries
    x = 8 * centre - 4 + jax.random.normal(x_key, (total, 1), jnp.float32)
    waves = heights[0] * jnp.sin(omega * x + 2 * jnp.pi * first)
    waves = waves + heights[1] * jnp.sin(2 * omega * x + 2 * jnp.pi * second)
    y = waves + noise * jax.random.normal(noise_key, (total, 1), jnp.float32)
    return Task(support=(x[:shots], y[:shots]), query=(x[shots:], y[shots:]))


def require_counts(name: str, **counts: int) -> None:
    """Refuse numbers of points below 1."""
    for what, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}: {what} must be a whole number of at least 1, got {count!r}")


def require_range(name: str, what: str, bounds: tuple[float, float]) -> None:
    """Refuse what is no pair of positive numbers, the lower first."""
    if len(bounds) != 2 or not 0 < bounds[0] <= bounds[1]:
        raise ValueError(f"{name}: {what} must be (lowest, highest), both above 0, got {bounds}")
