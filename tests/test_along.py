"""Adaptation is looked at after some of its steps, and every reader knows after which."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.recipes.summary import points
from bilevel.report.runs import curves_of
from bilevel.train.along import shown_steps
from bilevel.train.intervals import diverged
from bilevel.train.specialization import specialization

KEY = jax.random.key(0)


def towards(task_of=lambda key: bl.Task(jax.random.normal(key, (2,)), jnp.ones(2)), **fields):
    """Steps towards the support, judged by the distance from one; and its tasks."""

    def loss(params, meta, batch, key):
        return jnp.sum((params - batch) ** 2)

    fields = {"inner_loss": loss, "outer_loss": loss} | fields
    problem = bl.Problem(lambda meta, key: meta, **fields)
    solver = bl.inner.Gradient(optax.sgd(0.02, momentum=0.5), 40)
    return bl.Learner(problem, solver, bl.hypergrad.Mixed()), jnp.zeros(2), task_of


@pytest.mark.parametrize(
    ("steps", "every", "shown"),
    [
        (0, None, (0,)),
        (1, None, (0, 1)),
        (3, 5, (0, 1, 3)),
        (20, None, tuple(range(21))),
        (21, None, (0, 1, *range(2, 21, 2), 21)),
        (45, 20, (0, 1, 20, 40, 45)),
    ],
)
def test_the_steps_that_are_shown(steps, every, shown):
    assert shown_steps(steps, every) == shown


def test_points_are_those_of_a_look_after_every_step():
    learner, meta, sample = towards()
    whole = bl.evaluate(learner, meta, sample, KEY, num_tasks=3, every=1)
    some = bl.evaluate(learner, meta, sample, KEY, num_tasks=3, every=15)
    assert whole.steps == tuple(range(41)) and some.steps == (0, 1, 15, 30, 40)
    assert some.num_steps == whole.num_steps == 40
    np.testing.assert_allclose(
        some.per_task["query_loss"], whole.per_task["query_loss"][:, list(some.steps)], rtol=1e-5
    )
    assert some.as_json()["curves"]["query_loss"]["steps"] == [0, 1, 15, 30, 40]
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        bl.evaluate(learner, meta, sample, KEY, num_tasks=3, every=0)


def test_every_is_refused_where_there_are_no_steps():
    net = bl.nets.mlp([2, 4])
    with pytest.raises(ValueError, match="has no steps to judge every 2; leave every out"):
        bl.evaluate(bl.learners.protonet(net, 2), {}, lambda key: None, KEY, every=2)


def test_specialization_is_judged_without_dropout_noise_and_finds_its_horizon():
    def noisy(params, meta, batch, key):
        return jnp.sum((params - batch) ** 2) + 10 * jax.random.normal(key)

    def metrics(params, meta, batch, key):
        return {"loss": jnp.sum((params - batch) ** 2)}

    learner, meta, sample = towards(outer_loss=noisy, metrics=metrics)
    found = specialization(learner, meta, sample, KEY, num_tasks=3, beyond=25)
    assert found.steps[0] == 0 and found.steps[1] == 1 and {40, 65} <= set(found.steps)
    judged = bl.evaluate(learner, meta, sample, KEY, num_tasks=3, num_steps=65, every=1).curves["query_loss"]
    np.testing.assert_allclose(found.query_loss.mean, judged.mean[list(found.steps)], rtol=1e-4)
    np.testing.assert_allclose(found.beyond.mean, judged.mean[65] - judged.mean[40], rtol=1e-3)


def test_readers_take_the_steps_of_a_file_or_count_the_points_of_an_older_one():
    curve = {"mean": [0.2, 0.8, 0.9], "ci95": [0.1, 0.1, 0.1]}
    for steps, read in (
        (None, [0, 1, 2]),
        ([0, 1, 50], [0, 1, 50]),
        ([0, 7], [0, 1, 2]),
        (["x"] * 3, [0, 1, 2]),
    ):
        found = curves_of({"query_loss": curve | ({} if steps is None else {"steps": steps})})
        assert found["query_loss"].steps.tolist() == read
    assert points(curve) == [0, 1, 2] and points(curve | {"steps": [0, 1, 50]}) == [0, 1, 50]
    assert "from step 50 on" in str(diverged(np.array([[1.0, 1.0, np.nan]]), (0, 1, 50)))
