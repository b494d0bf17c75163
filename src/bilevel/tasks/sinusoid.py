"""Sine waves of random amplitude and phase: the regression tasks of MAML (Finn et al., 2017)."""

import jax
import jax.numpy as jnp

from bilevel.problem import Key, Task


def sinusoid(key: Key, shots: int = 10, queries: int = 10) -> Task:
    """Draw one regression task, y = a sin(x - phase).

    a is uniform in [0.1, 5], phase in [0, π] and x in [-5, 5], one wave for support and query.

    Args:
        key: random key.
        shots: number of support points.
        queries: number of query points.

    Returns:
        Task of (x, y) pairs: float32 [shots, 1] in the support, float32 [queries, 1] in the query.

    Raises:
        ValueError: when `shots` or `queries` is below 1.

    >>> x, y = sinusoid(jax.random.key(0), shots=5).support
    >>> x.shape, y.shape
    ((5, 1), (5, 1))
    """
    for name, count in (("shots", shots), ("queries", queries)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    amplitude_key, phase_key, x_key = jax.random.split(key, 3)
    amplitude = jax.random.uniform(amplitude_key, (), jnp.float32, 0.1, 5.0)
    phase = jax.random.uniform(phase_key, (), jnp.float32, 0.0, jnp.pi)
    x = jax.random.uniform(x_key, (shots + queries, 1), jnp.float32, -5.0, 5.0)
    y = amplitude * jnp.sin(x - phase)
    return Task(support=(x[:shots], y[:shots]), query=(x[shots:], y[shots:]))
