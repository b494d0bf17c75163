"""The baselines: pretraining, a new head, the nearest centroid, training from scratch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.learners.baseline_pp import baseline_pp
from bilevel.learners.from_scratch import from_scratch
from bilevel.learners.nearest_centroid import nearest_centroid, pixels
from bilevel.learners.pretraining import cosine_head, pretraining
from bilevel.tasks.minibatch import Minibatch
from bilevel.testing import assert_close, assert_derivative, assert_trees_close

KEY = jax.random.key(0)
NET = bl.nets.mlp([3, 6, 4], jnp.tanh)
X = jax.random.normal(jax.random.key(1), (6, 3))
TASK = bl.Task((X, jnp.arange(6) % 3), (X + 0.3, jnp.arange(6) % 3))


def estimate(learner, meta, task):
    return bl.hypergradient(learner.problem, learner.solver, learner.estimator, meta, task, KEY)


def test_pretraining_is_the_gradient_of_a_classifier(x64):
    learner = pretraining(NET, cosine_head(4, 7, scale=5.0))
    meta = learner.init_meta(KEY)
    labels = jnp.array([6, 0, 3, 3, 1, 2])
    task = bl.Task((X[:1], labels[:1]), (X, labels))

    def by_hand(meta):
        z = NET.apply(meta["embed"], X)
        w = meta["head"]["w"]
        cosines = z @ w.T / jnp.linalg.norm(z, axis=1)[:, None] / jnp.linalg.norm(w, axis=1)
        return -jnp.mean(jax.nn.log_softmax(5 * cosines)[jnp.arange(6), labels])

    h = estimate(learner, meta, task)
    assert_close("value", h.value, by_hand(meta), 1e-12)
    assert_trees_close("gradient", h.grad, jax.grad(by_hand)(meta), 1e-10)


def test_trained_by_another_learner(x64):
    """A tested learner's gradient is that of pretraining; its adaptation is its own."""
    trained = pretraining(NET, cosine_head(4, 7))
    meta = trained.init_meta(KEY)
    batch = bl.Task((X[:1], jnp.array([5])), (X, jnp.array([6, 0, 3, 3, 1, 2])))
    for learner in (
        nearest_centroid(NET, 3, trained_by=trained),
        baseline_pp(NET, 3, 4, num_steps=2, trained_by=trained),
    ):
        assert_trees_close("meta", learner.init_meta(KEY), meta, 0.0)
        assert_trees_close(
            "gradient", estimate(learner, meta, batch).grad, estimate(trained, meta, batch).grad, 0.0
        )
        params = bl.adapt(learner, meta, TASK, KEY)
        assert learner.predict(params, meta, X).shape == (6, 3)


def test_new_head_by_hand(x64):
    learner = baseline_pp(NET, 3, 4, scale=5.0, optimizer=optax.sgd(0.1), num_steps=4)
    meta = learner.init_meta(KEY)
    x, y = TASK.support
    z = NET.apply(meta["embed"], x)
    z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
    start = bl.adapt(learner, meta, TASK, KEY, num_steps=0)["w"]

    def loss(w):
        logits = 5 * z @ (w / jnp.linalg.norm(w, axis=1, keepdims=True)).T
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(6), y])

    w = start
    for _ in range(4):
        w = w - 0.1 * jax.grad(loss)(w)
    assert_close("head", bl.adapt(learner, meta, TASK, KEY)["w"], w, 1e-10)
    run = jax.jit(lambda meta: estimate(learner, meta, TASK))  # it may also be learned through the steps
    assert_derivative(lambda meta: run(meta).value, run(meta).grad, meta)


def test_nearest_centroid_by_hand(x64):
    learner = nearest_centroid(pixels(), 3, scale=2.0)
    params = bl.adapt(learner, {"embed": {}}, TASK, KEY)
    z, q = (np.asarray(x) / np.linalg.norm(x, axis=1, keepdims=True) for x in (X, TASK.query[0]))
    means = np.stack([z[[c, c + 3]].mean(0) for c in range(3)])
    expected = -2 * ((q[:, None] - means) ** 2).sum(-1)
    assert_close("logits", learner.predict(params, {"embed": {}}, TASK.query[0]), expected, 1e-6)
    raw = nearest_centroid(pixels(), 3, normalize=False)
    params = bl.adapt(raw, {"embed": {}}, TASK, KEY)
    assert_close("centroid", params["prototypes"][1], (X[1] + X[4]) / 2, 1e-6)


def test_from_scratch_starts_anew_for_every_key():
    learner = from_scratch(NET, bl.learners.cross_entropy, optax.adam(1e-2), 3)
    a, b = (bl.adapt(learner, {}, TASK, jax.random.key(k), num_steps=0) for k in (0, 1))
    assert not np.array_equal(a["head"]["w"], b["head"]["w"])
    trained = bl.adapt(learner, {}, TASK, jax.random.key(0))
    before = learner.problem.inner_loss(a, {}, TASK.support, KEY)
    assert learner.problem.inner_loss(trained, {}, TASK.support, KEY) < before


def test_minibatch_labels_are_the_classes():
    """Pictures that carry their class and their turn: label = turn * classes + class."""
    images = np.zeros((6, 4, 4), np.uint8)
    images[:, 0, 0] = [10, 10, 20, 20, 30, 30]  # a class each, in one corner
    source = bl.tasks.FewShot(images, np.repeat(np.arange(3), 2), 2, 1, 1, rotations=True)
    sample = Minibatch(source, 64)
    assert sample.num_classes == 12
    x, y = jax.jit(lambda sample, key: sample(key))(sample, KEY).query
    corners = jnp.round(255 * jnp.stack([x[:, 0, 0, 0], x[:, -1, 0, 0], x[:, -1, -1, 0], x[:, 0, -1, 0]], 1))
    np.testing.assert_array_equal(
        corners.argmax(1), y // 3
    )  # rot90 takes the corner down, then right, then up
    np.testing.assert_array_equal(corners.max(1), 10 + 10 * (y % 3))
    assert len(set(y.tolist())) == 12


def test_minibatch_of_glyphs():
    def jaxpr(style):
        sample = Minibatch(bl.tasks.Glyphs(split="validation", size=8, style=style), 3)
        return str(jax.make_jaxpr(lambda key: sample(key).query[0])(KEY))

    sample = Minibatch(bl.tasks.Glyphs(split="validation", size=8), 3)
    x, y = jax.jit(sample)(KEY).query
    assert x.shape == (3, 8, 8, 1) and sample.num_classes == 1000 and y.max() < 1000
    assert jaxpr("strokes") != jaxpr("handwriting")  # drawn in the style of the source


def test_refused():
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        Minibatch(bl.tasks.Glyphs(), 0)
    with pytest.raises(TypeError, match="needs a FewShot or a Glyphs, got function"):
        Minibatch(lambda key: None, 3)(KEY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cosine_head needs width >= 1 and num_classes >= 2"):
        cosine_head(0, 3)
    with pytest.raises(ValueError, match=r"baseline_pp\.num_steps must be a whole number"):
        baseline_pp(NET, 3, 4, num_steps=0)
