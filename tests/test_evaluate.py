"""The protocol's figures against what they must be: intervals, chunks, calibration, specialization."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from blobs_recipe import Blobs, blobs

import bilevel as bl
from bilevel.recipes.splits import seen_classes, unseen, validation_classes, with_shots
from bilevel.tasks.hold_out import hold_out
from bilevel.tasks.with_support import with_support
from bilevel.train.calibration import calibration, tally
from bilevel.train.evaluate import sketch
from bilevel.train.intervals import Curve, all_right, diverged, independent_difference, interval
from bilevel.train.specialization import specialization
from bilevel.train.transduction import in_words, transduction


@pytest.fixture(scope="module")
def classifier():
    experiment = Blobs().build()
    meta = experiment.learner.init_meta(jax.random.key(0))
    return experiment.learner, meta, experiment.sample_test


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    draws = rng.normal(3.0, 2.0, (100, 4000))  # 4000 evaluations of 100 tasks
    mean, half = interval(draws)
    assert abs((np.abs(mean - 3.0) <= half).mean() - 0.945) < 0.01  # 1.96 for t's 1.984
    mean, half = independent_difference(draws[:, :2000], rng.normal(3.0, 1.0, (50, 2000)))
    assert abs((np.abs(mean) <= half).mean() - 0.945) < 0.015
    assert abs(half.mean() - 1.96 * (4 / 100 + 1 / 50) ** 0.5) < 0.01


def test_all_tasks_right_is_not_certainty():
    assert interval(np.ones(600)).ci95 == 0
    assert "0.50 %" in all_right(np.ones(600))
    assert all_right(np.array([1.0, 0.8])) is None


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_an_inner_loop_that_diverges_is_told():
    learner = bl.maml(bl.nets.mlp([1, 4, 1]), bl.learners.mean_squared_error, rates=50.0, num_steps=6)
    meta, key = learner.init_meta(jax.random.key(0)), jax.random.key(1)
    losses = bl.evaluate(learner, meta, bl.tasks.sinusoid, key, num_tasks=8).per_task["query_loss"]
    assert re.fullmatch(r"the inner loop diverges on \d of 8 tasks, from step [1-6] on: .*", diverged(losses))
    assert diverged(losses[:, :1]) is None
    found = specialization(learner, meta, bl.tasks.sinusoid, key, num_tasks=8)
    assert found.reading().endswith("the inner loop diverges on some tasks")


def test_chunks_do_not_change_a_bit(classifier, optimized):
    key = jax.random.key(5)
    with optimized():
        results = [bl.evaluate(*classifier, key, num_tasks=11, num_steps=3, chunk_size=n) for n in (1, 4)]
    for other in results[1:]:
        for name, values in results[0].per_task.items():
            assert values.tobytes() == other.per_task[name].tobytes(), name
        assert results[0].sketch.tobytes() == other.sketch.tobytes()
        assert results[0].calibration.ece.tobytes() == other.calibration.ece.tobytes()
        assert results[0].calibration.confidence.tobytes() == other.calibration.confidence.tobytes()


def test_tasks_side_by_side_and_fewer_tasks_are_the_same_tasks(classifier):
    key = jax.random.key(5)
    one = bl.evaluate(*classifier, key, num_tasks=7)
    side = bl.evaluate(*classifier, key, num_tasks=5, task_chunk=3)
    np.testing.assert_allclose(side.sketch, one.sketch[:5], rtol=1e-5, atol=1e-6)
    for name, values in side.per_task.items():
        np.testing.assert_allclose(values, one.per_task[name][:5], rtol=1e-4, atol=1e-5)


def test_wrong_numbers_are_refused(classifier):
    for wrong in ({"num_tasks": 1}, {"task_chunk": 0}, {"chunk_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            bl.evaluate(*classifier, jax.random.key(0), **wrong)


def test_calibration_by_hand():
    odds = np.array([[0.95, 0.05], [0.55, 0.45], [0.3, 0.7], [0.2, 0.8], [0.9, 0.1]])
    labels = np.array([0, 1, 1, 1, -1])  # right, wrong, right, right, padding
    found = tally(jnp.log(jnp.array(odds)), jnp.array(labels), num_bins=5)
    # Bins of width 0.2: 0.55 in the third, 0.7 and 0.8 in the fourth (right ends belong to it), 0.95 above.
    expected = [[0, 0, 0], [0, 0, 0], [1, 0.55, 0], [2, 1.5, 2], [1, 0.95, 1]]
    np.testing.assert_allclose(found["bins"], expected, atol=1e-6)
    np.testing.assert_allclose(found["nll"], -np.log([0.95, 0.45, 0.7, 0.8]).mean(), rtol=1e-6)
    brier = [2 * 0.05**2, 2 * 0.55**2, 2 * 0.3**2, 2 * 0.2**2]
    np.testing.assert_allclose(found["brier"], np.mean(brier), rtol=1e-5)
    none = Curve(np.zeros(1), np.zeros(1))
    result = calibration(np.asarray(found["bins"])[None], none, none)
    np.testing.assert_allclose(result.ece, (0.55 + 0.5 + 0.05) / 4, rtol=1e-5)
    np.testing.assert_allclose(result.overconfidence, (3.0 - 3) / 4, atol=1e-6)
    assert result.num_examples == 4
    diagram = result.as_json()["before"]
    assert diagram["accuracy"][:3] == [None, None, 0.0] and diagram["count"] == [0, 0, 1, 2, 1]


def test_certain_answers_have_finite_scores():
    found = tally(jnp.array([[200.0, 0.0], [0.0, 200.0]]), jnp.array([0, 1]))
    assert found["nll"] == 0 and found["brier"] == 0 and found["bins"][-1].tolist() == [2, 2, 2]


def test_evaluation_calibrates_every_query_example(classifier):
    learner, meta, sample = classifier
    key = jax.random.key(3)
    result = bl.evaluate(learner, meta, sample, key, num_tasks=6)

    @jax.jit
    def answers(one):
        task_key, one = jax.random.split(one)
        task = sample(task_key)
        return learner.predict(bl.adapt(learner, meta, task, one), meta, task.query[0]), task.query[1]

    logits, labels = zip(*map(answers, jax.random.split(key, 6)))
    odds, labels = jax.nn.softmax(jnp.concatenate(logits)), np.concatenate(labels)
    confidence, right = np.asarray(odds.max(-1)), np.asarray(odds.argmax(-1)) == labels
    ece = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15)
        ece += abs(confidence[inside].sum() - right[inside].sum()) / len(labels)
    np.testing.assert_allclose(result.calibration.ece[-1], ece, rtol=1e-4)
    np.testing.assert_allclose(result.calibration.nll.mean, result.curves["query_loss"].mean, rtol=1e-4)
    assert result.calibration.num_examples == 6 * 12
    regression = bl.maml(bl.nets.mlp([1, 4, 1]), bl.learners.mean_squared_error, rates=0.01)
    other = bl.evaluate(
        regression, regression.init_meta(key), bl.tasks.sinusoid, key, num_tasks=2
    ).calibration
    assert other is None


def test_a_sketch_tells_tasks_apart_and_forgives_rounding():
    task = bl.tasks.sinusoid(jax.random.key(0))
    moved = jax.tree.map(lambda x: x * (1 + 1e-6), task)
    assert np.abs(sketch(task) - sketch(moved)).max() < 1e-4
    assert np.abs(sketch(task) - sketch(bl.tasks.sinusoid(jax.random.key(1)))).max() > 1e-2
    assert np.abs(sketch(task) - sketch(jax.tree.map(lambda x: x[::-1], task))).max() > 1e-2


def linear_learner(rate, num_steps=2):
    """φ is a dict of two parts; the inner loss is quadratic, so every figure has a closed form."""

    def loss(params, meta, batch, key):
        return 0.5 * jnp.sum((params["near"] - batch) ** 2) + 0.0 * jnp.sum(params["zero"])

    problem = bl.Problem(lambda meta, key: meta, loss, loss)
    solver = bl.inner.Gradient(optax.sgd(rate), num_steps)
    return bl.Learner(problem, solver, bl.hypergrad.FirstOrder())


def constant_task(key):
    return bl.Task(jnp.array([3.0, 5.0]), jnp.array([3.0, 5.0]))


def test_specialization_has_its_closed_form():
    meta = {"near": jnp.array([3.0, 4.0]), "zero": jnp.zeros(2)}
    found = specialization(
        linear_learner(0.5), meta, constant_task, jax.random.key(0), num_tasks=3, num_steps=2, beyond=1
    )
    np.testing.assert_allclose(found.query_loss.mean, 0.5 * 0.25 ** np.arange(4), rtol=1e-5)
    np.testing.assert_allclose(found.first_step, (0.5 - 0.125) / (0.5 - 0.03125), rtol=1e-5)
    np.testing.assert_allclose(found.moved["near"].mean, (1 - 0.5 ** np.arange(4)) / 5, rtol=1e-5)
    assert found.from_zero == ("zero",) and found.moved["zero"].mean.tolist() == [0] * 4
    np.testing.assert_allclose(found.beyond.mean, 0.5 * (0.25**3 - 0.25**2), rtol=1e-5)
    assert "80 % of the gain" in found.reading() and "1 step beyond it is better" in found.reading()


def test_over_specialization_is_named():
    meta = {"near": jnp.array([3.0, 4.0]), "zero": jnp.zeros(2)}
    # The first step lands near the target; with rate 2.5 each further one overshoots more.
    learner = linear_learner(2.5, num_steps=1)
    found = specialization(learner, meta, constant_task, jax.random.key(0), num_tasks=2, num_steps=1)
    assert np.isnan(found.first_step) and "no gain" in found.reading()
    assert "over-specialized" in found.reading()
    with pytest.raises(ValueError, match="num_steps"):
        specialization(learner, meta, constant_task, jax.random.key(0), num_steps=0)


def test_the_start_of_a_classifier_has_an_entropy(classifier):
    learner, meta, sample = classifier
    flat = jax.tree.map(jnp.zeros_like, meta)
    found = specialization(learner, flat, sample, jax.random.key(0), num_tasks=2)
    np.testing.assert_allclose(found.entropy, 1.0, rtol=1e-5)


def test_transduction_is_measured(classifier):
    learner, meta, sample = classifier
    assert transduction(learner, meta, sample, jax.random.key(0)) == 0.0

    def centred(params, meta, x):  # the simplest batch statistic
        return learner.predict(params, meta, x - x.mean(0))

    shared = bl.Learner(learner.problem, learner.solver, learner.estimator, learner.init_meta, centred)
    change = transduction(shared, meta, sample, jax.random.key(0))
    assert change > 0.01 and "transductive" in in_words(change)

    def by_support(params, meta, x):  # on the first half of the batch, where `with_support` puts the support
        return learner.predict(params, meta, x - x[: x.shape[0] // 2].mean(0))

    inductive = bl.Learner(learner.problem, learner.solver, learner.estimator, learner.init_meta, by_support)
    in_front = with_support(dataclasses.replace(sample, queries=sample.shots))
    assert transduction(inductive, meta, in_front, jax.random.key(0)) == 0.0
    assert transduction(shared, meta, in_front, jax.random.key(0)) > 0.01
    silent = bl.Learner(learner.problem, learner.solver, learner.estimator)
    assert transduction(silent, meta, sample, jax.random.key(0)) is None


def test_splits_of_an_experiment():
    experiment = Blobs().build()
    assert unseen(experiment)[0] is True and "none of the 20 test classes" in unseen(experiment)[1]
    known, words = unseen(Blobs(leak=True).build())
    assert known is False and words.startswith("SEEN CLASSES: 22 of the 30")
    assert with_shots(experiment, 5).shots == 5
    seen = seen_classes(experiment)
    assert seen.queries == 4 and seen.num_classes == 22
    assert validation_classes(experiment).num_classes == 8
    with pytest.raises(ValueError, match="class 100 has 12"):
        with_shots(experiment, 9)


def test_held_out_classes_depend_on_their_number_alone():
    rest, held = hold_out(blobs(range(30), 3, 1, 1), 8)
    kept, out = set(np.unique(rest.labels).tolist()), set(np.unique(held.labels).tolist())
    assert len(out) == 8 and kept | out == set(range(30)) and not kept & out
    _, fewer = hold_out(blobs([c for c in range(30) if c not in sorted(kept)[:5]], 3, 1, 1), 8)
    assert set(np.unique(fewer.labels).tolist()) == out
    assert set(np.unique(hold_out(blobs(range(30), 3, 1, 1), 8, seed=1)[1].labels).tolist()) != out
    with pytest.raises(ValueError, match="held-out classes"):
        hold_out(blobs(range(30), 3, 1, 1), 29)


def test_a_learner_of_one_step_is_judged_after_more():
    net = bl.nets.mlp([1, 4, 1])

    def loss(params, meta, batch, key):
        x, y = batch
        return jnp.mean((net.apply(params, x) - y) ** 2) + meta * optax.tree.norm(params, squared=True)

    problem = bl.Problem(lambda meta, key: net.init(key), loss, lambda *args: loss(args[0], 0.0, *args[2:]))
    learner = bl.Learner(problem, bl.inner.Gradient(optax.sgd(0.01), 1), bl.hypergrad.Soba(0.1))
    with pytest.raises(ValueError):  # to train with
        dataclasses.replace(learner, solver=bl.inner.Gradient(optax.sgd(0.01), 5))
    key = jax.random.key(0)
    curve = bl.evaluate(learner, jnp.zeros(()), bl.tasks.sinusoid, key, num_tasks=4, num_steps=5).curves
    assert curve["query_loss"].mean.shape == (6,)
