"""Losses of the few-shot tasks, with the figures to watch beside them."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy, and the accuracy.

        −(1/n) Σ log softmax(logits)[label]

    Args:
        logits: `[n, ways]`.
        labels: int `[n]`, in 0..ways-1.

    >>> loss, metrics = cross_entropy(jnp.array([[5.0, 0.0], [5.0, 0.0]]), jnp.array([0, 1]))
    >>> print(round(float(loss), 3), metrics["accuracy"])
    2.507 0.5
    """
    # A product with one-hot rows: its derivatives are elementwise, where those of a gather are scatters.
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    loss = -jnp.mean(jnp.sum(one_hot * jax.nn.log_softmax(logits), axis=-1))
    accuracy = jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype))
    return loss, {"accuracy": accuracy}


def mean_squared_error(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """(1/n) Σ (output − target)².

    Args:
        outputs, targets: `[n, ...]`, of the same shape.

    Raises:
        ValueError: when the shapes differ (they would broadcast to something else than was meant).

    >>> print(mean_squared_error(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0])))
    2.0
    """
    if outputs.shape != targets.shape:
        raise ValueError(
            f"outputs and targets must have the same shape, got {outputs.shape} and {targets.shape}"
        )
    return jnp.mean((outputs - targets) ** 2)
