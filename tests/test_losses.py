"""Cross-entropy leaves padding out, in value and in derivative, and says when a label is none."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bilevel.learners import cross_entropy
from bilevel.testing import assert_derivative

LOGITS = jax.random.normal(jax.random.key(0), (6, 4))
LABELS = jnp.array([0, 3, 1, 1, 2, 0])


def test_without_padding_it_is_the_mean_that_optax_takes():
    loss, metrics = cross_entropy(LOGITS, LABELS)
    expected = optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(LOGITS.argmax(1) == LABELS))


def test_an_example_of_label_minus_one_counts_nowhere(x64):
    logits, keep = jnp.asarray(LOGITS, float), np.array([True, True, False, True, False, True])
    padded = jnp.where(keep, LABELS, -1)

    def loss(logits, labels):
        return cross_entropy(logits, labels)[0]

    value, metrics = cross_entropy(logits, padded)
    expected, expected_metrics = cross_entropy(logits[keep], LABELS[keep])
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(metrics["accuracy"], expected_metrics["accuracy"], rtol=1e-12)
    grad = jax.grad(loss)(logits, padded)
    assert (grad[~keep] == 0).all() and (grad[keep] != 0).all()
    np.testing.assert_allclose(grad[keep], jax.grad(loss)(logits[keep], LABELS[keep]), rtol=1e-12)
    wild = jnp.where(keep[:, None], logits, 1e6 * logits)  # whatever a network makes of padding
    assert loss(wild, padded) == value


def test_second_derivatives_agree_with_differences(x64):
    logits, labels = jnp.asarray(LOGITS, float), jnp.where(jnp.arange(6) % 3 == 1, -1, LABELS)
    weights = jax.random.normal(jax.random.key(1), logits.shape, float)

    def slope(logits):
        return jnp.vdot(weights, jax.grad(lambda logits: cross_entropy(logits, labels)[0])(logits))

    assert_derivative(slope, jax.grad(slope)(logits), logits)


def test_probabilities_as_labels():
    one_hot = jax.nn.one_hot(LABELS, 4)
    hard, soft = cross_entropy(LOGITS, LABELS), cross_entropy(LOGITS, one_hot)
    np.testing.assert_allclose(soft[0], hard[0], rtol=1e-6)
    np.testing.assert_allclose(soft[1]["accuracy"], hard[1]["accuracy"])
    mixed = 0.7 * one_hot + 0.3 * one_hot[::-1]
    expected = optax.softmax_cross_entropy(LOGITS, mixed).mean()
    np.testing.assert_allclose(cross_entropy(LOGITS, mixed)[0], expected, rtol=1e-6)
    padded = mixed.at[4:].set(0)
    expected = optax.softmax_cross_entropy(LOGITS[:4], mixed[:4]).mean()
    np.testing.assert_allclose(cross_entropy(LOGITS, padded)[0], expected, rtol=1e-6)


def test_a_class_of_logit_minus_infinity_is_out_of_the_game():
    logits = LOGITS.at[:, 3].set(-jnp.inf)
    labels = jnp.array([0, 2, 1, 1, 2, 0])
    loss, _ = cross_entropy(logits, labels)
    np.testing.assert_allclose(loss, cross_entropy(LOGITS[:, :3], labels)[0], rtol=1e-6)
    grad = jax.grad(lambda logits: cross_entropy(logits, labels)[0])(logits)
    assert jnp.isfinite(grad).all() and (grad[:, 3] == 0).all()
    assert cross_entropy(logits, labels.at[0].set(3))[0] == jnp.inf  # the true class may not be out


@pytest.mark.parametrize("labels", [LABELS.at[2].set(4), LABELS.at[2].set(-2), jnp.full(6, -1)])
def test_a_label_that_is_none_is_not_overlooked(labels):
    loss, metrics = jax.jit(cross_entropy)(LOGITS, labels)
    assert jnp.isnan(loss) and jnp.isnan(metrics["accuracy"])


@pytest.mark.parametrize("labels", [LABELS[:5], LABELS[:, None], LABELS.astype(float), LOGITS[:, :3]])
def test_shapes_that_do_not_fit_are_named(labels):
    with pytest.raises(ValueError, match=r"labels int \[6\] or float \[6, 4\] for logits \[6, 4\], got"):
        cross_entropy(LOGITS, labels)
