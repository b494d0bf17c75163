"""The two losses of cross-validation, weighted by rows: a row of weight 0 plays no part."""

import jax
import jax.numpy as jnp
import optax


def squared_error(outputs: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    """Σᵢ wᵢ |outputᵢ − yᵢ|² / (t Σ wᵢ), for outputs and y `[n, t]`.

    >>> print(squared_error(jnp.array([[1.0], [3.0]]), jnp.zeros((2, 1)), jnp.array([1.0, 0.0])))
    1.0
    """
    return w @ jnp.mean((outputs - y) ** 2, 1) / w.sum()


def log_loss(logits: jax.Array, y: jax.Array, w: jax.Array) -> jax.Array:
    """Σᵢ wᵢ CEᵢ / Σ wᵢ, for logits and a code y `[n, t]`: t = 1 for two classes.

    >>> print(round(float(log_loss(jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.ones(1))), 4))
    0.6931
    """
    if y.shape[1] == 1:
        each = optax.sigmoid_binary_cross_entropy(logits, y)[:, 0]
    else:
        each = -jnp.sum(y * jax.nn.log_softmax(logits), 1)
    return w @ each / w.sum()
