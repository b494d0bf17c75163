"""Losses of the few-shot tasks, with the figures to watch beside them."""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy, and the accuracy, over the examples that have a label.

        −Σᵢ log softmax(logits)ᵢ[labelᵢ] / #{i: labelᵢ ≥ 0};   −Σᵢ Σ_c pᵢ_c log softmax(logits)ᵢ_c / Σ p

    An example of label −1, or of an all-zero row of probabilities, is padding and counts nowhere. The other
    examples pass their mean on as if it were not there. A logit of −inf is a class that is out of the game.

    Args:
        logits: `[n, ways]`.
        labels: int `[n]`, in 0..ways-1, or −1; or probabilities `[n, ways]`, as mixed examples have them.

    Raises:
        ValueError: when the shapes do not fit.

    A label below −1 or above ways-1 cannot raise inside a compiled function: loss and accuracy are NaN then,
    and so they are when no example has a label.

    >>> loss, metrics = cross_entropy(jnp.array([[5.0, 0.0], [5.0, 0.0]]), jnp.array([0, 1]))
    >>> print(round(float(loss), 3), metrics["accuracy"])
    2.507 0.5
    >>> loss, metrics = cross_entropy(jnp.array([[5.0, 0.0], [5.0, 0.0]]), jnp.array([0, -1]))
    >>> print(round(float(loss), 3), metrics["accuracy"])
    0.007 1.0
    """
    ways = logits.shape[-1]
    given = labels.shape == logits.shape and jnp.issubdtype(labels.dtype, jnp.floating)
    if not given and (labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer)):
        raise ValueError(
            f"cross_entropy expects labels int {list(logits.shape[:-1])} or float {list(logits.shape)} for "
            f"logits {list(logits.shape)}, got {labels.dtype} {list(labels.shape)}"
        )
    # A product with one-hot rows: its derivatives are elementwise, where those of a gather are scatters.
    target = labels if given else jax.nn.one_hot(labels, ways, dtype=logits.dtype)  # of -1: a row of zeros
    if not given:
        wrong = jnp.any((labels < -1) | (labels >= ways))
        target = jnp.where(wrong, jnp.nan, target)
    mass = jnp.sum(target, axis=-1)
    # Where nothing is expected nothing is multiplied: 0 * -inf of a class that is out would be NaN.
    logs = jnp.where(target == 0, 0, jax.nn.log_softmax(logits))
    total = jnp.sum(mass)
    right = jnp.argmax(logits, axis=-1) == (jnp.argmax(labels, axis=-1) if given else labels)
    accuracy = jnp.sum(mass * right.astype(logits.dtype)) / total
    return -jnp.sum(target * logs) / total, {"accuracy": accuracy}


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
