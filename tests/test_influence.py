"""Influence of single examples against closed forms, retraining and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.analysis.influence import influence, precision_at, weighted_rows
from bilevel.hypergrad import HypergradientWarning, Implicit, cg, direct

DECAY, ROWS = 0.05, 60


def losses(params, x, y):
    return jnp.logaddexp(0.0, -y * (x @ params["w"] + params["b"]))


def inner_loss(params, meta, batch, key):
    ridge = 0.5 * meta["decay"] * (params["w"] @ params["w"] + params["b"] ** 2)
    return jnp.mean(losses(params, *batch)) + ridge


PROBLEM = bl.Problem(
    init=lambda meta, key: {"w": jnp.zeros(3, float), "b": jnp.zeros((), float)},
    inner_loss=inner_loss,
    outer_loss=lambda params, meta, batch, key: jnp.mean(losses(params, *batch)),
)
SOLVER = bl.inner.Gradient(optax.sgd(1.0, momentum=0.5), num_steps=400)


def logistic(rows=ROWS, seed=0):
    rng = np.random.default_rng(seed)
    w = np.array([1.0, -2.0, 0.5])

    def part(n):
        x = rng.normal(size=(n, 3))
        y = np.where(x @ w + 0.5 * rng.normal(size=n) > 0, 1.0, -1.0)
        return x, y

    (x, y), query = part(rows), part(40)
    wrong = np.arange(rows) < 4
    return bl.Task((x, np.where(wrong, -y, y)), query), wrong


def retrained(task, weights, decay=DECAY):
    """The outer loss of the classifier that Newton finds for these weights of the row losses, in NumPy."""
    x, y = task.support
    z = np.concatenate([x, np.ones((len(x), 1))], 1)
    phi = np.zeros(z.shape[1])
    for _ in range(50):
        margin = y * (z @ phi)
        p = 1 / (1 + np.exp(margin))
        slope = -(weights * p * y) @ z / len(x) + decay * weights.mean() * phi
        hessian = (z.T * (weights * p * (1 - p))) @ z / len(x) + decay * weights.mean() * np.eye(len(phi))
        phi -= np.linalg.solve(hessian, slope)
    assert np.abs(slope).max() < 1e-13
    qx, qy = task.query
    return np.mean(np.logaddexp(0, -qy * (qx @ phi[:-1] + phi[-1])))


@pytest.fixture
def found(x64):
    task, wrong = logistic()
    meta = {"decay": jnp.float64(DECAY)}
    return (
        influence(PROBLEM, SOLVER, meta, task, jax.random.key(0), estimator=Implicit(direct())),
        task,
        wrong,
    )


def test_scores_are_finite_differences_of_retraining(found):
    result, task, _ = found
    ones, h = np.ones(ROWS), 1e-4
    expected = [
        (retrained(task, ones + h * e) - retrained(task, ones - h * e)) / (2 * h) for e in np.eye(ROWS)
    ]
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(result.value, retrained(task, ones), rtol=1e-10)


def test_scores_predict_what_leaving_an_example_out_does(found):
    result, task, wrong = found
    ones = np.ones(ROWS)
    effect = np.array([retrained(task, ones - e) - retrained(task, ones) for e in np.eye(ROWS)])
    assert np.corrcoef(-result.scores, effect)[0, 1] > 0.99
    off = np.abs(-result.scores - effect) / np.abs(effect).max()
    assert off.max() < 0.25  # by the leverage of an example
    assert result.scores[wrong].mean() > 0 > result.scores[~wrong].mean()


def test_conjugate_gradients_say_the_same(found, x64):
    task = found[1]
    again = influence(PROBLEM, SOLVER, {"decay": jnp.float64(DECAY)}, task, jax.random.key(0))
    np.testing.assert_allclose(again.scores, found[0].scores, rtol=1e-6, atol=1e-10)


def test_a_model_that_was_trained_before_needs_no_steps(found, x64):
    result, task, _ = found
    params = SOLVER.solve(PROBLEM, {"decay": DECAY}, task, jax.random.key(0)).params
    problem = bl.Problem(lambda meta, key: params, PROBLEM.inner_loss, PROBLEM.outer_loss)
    no_steps = bl.inner.Gradient(optax.sgd(1.0), num_steps=0)
    again = influence(problem, no_steps, {"decay": DECAY}, task, jax.random.key(0))
    np.testing.assert_allclose(again.scores, result.scores, rtol=1e-6, atol=1e-10)


def test_weights_of_one_change_nothing():
    task, _ = logistic()
    meta, key = {"decay": 0.3}, jax.random.key(0)
    params = {"w": jnp.array([1.0, 2.0, 3.0]), "b": jnp.float32(0.5)}
    weighted = weighted_rows(PROBLEM, meta)
    whole = PROBLEM.inner_loss(params, meta, task.support, key)
    np.testing.assert_allclose(
        weighted.inner_loss(params, jnp.ones(ROWS), task.support, key), whole, rtol=1e-5
    )
    np.testing.assert_allclose(
        weighted.outer_loss(params, jnp.zeros(30), task.query, key),
        PROBLEM.outer_loss(params, meta, task.query, key),
    )


def test_what_is_no_mean_over_rows_is_refused():
    task, _ = logistic()
    summed = bl.Problem(PROBLEM.init, lambda p, m, b, k: jnp.sum(losses(p, *b)), PROBLEM.outer_loss)
    with pytest.raises(ValueError, match=r"mean over the rows.*divide a sum by the number of rows"):
        influence(summed, bl.inner.Gradient(optax.sgd(1e-3), 1), None, task, jax.random.key(0))
    ragged = bl.Task((np.zeros((3, 2)), np.zeros(4)), None)
    with pytest.raises(
        ValueError, match=r"must share their leading axis; got leading sizes \[\(3,\), \(4,\)\]"
    ):
        influence(PROBLEM, SOLVER, None, ragged, jax.random.key(0))


def test_a_model_that_is_not_at_its_minimum_is_doubted():
    task, _ = logistic()
    few = bl.inner.Gradient(optax.sgd(0.1), num_steps=1)
    with pytest.warns(HypergradientWarning, match="inner_error|minimum|inner"):
        influence(
            PROBLEM, few, {"decay": jnp.float32(DECAY)}, task, jax.random.key(0), estimator=Implicit(cg(20))
        )


def test_precision_counts_the_most_harmful():
    assert precision_at([0.1, 0.4, 0.2, 0.3], [True, True, False, False], (1, 2, 4)) == {
        1: 1.0,
        2: 0.5,
        4: 0.5,
    }
