"""Corrupted labels, weights of examples, and the recipes that learn them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad import MultiStep, Unroll
from bilevel.learners.learning_to_reweight import Reweight, learning_to_reweight
from bilevel.learners.meta_weight_net import example_weights, meta_weight_net
from bilevel.learners.weighted import Online, class_weights, equal_weights, plain_training, weighted_problem
from bilevel.tasks.corrupt import flip_noise, imbalanced_pair, long_tailed, uniform_noise
from bilevel.tasks.rows import Rows
from bilevel.testing import assert_derivative

LABELS = np.arange(2000) % 10


# Labels made wrong, classes made rare


def test_uniform_noise_replaces_an_exact_share_and_says_what_is_wrong():
    noisy = uniform_noise(LABELS, 0.3, seed=1, always_wrong=True)
    np.testing.assert_array_equal(noisy.wrong, noisy.labels != LABELS)
    assert noisy.wrong.sum() == 600 and noisy.labels.dtype == np.int32
    # Every other class is as likely: 600 / 90 of each pair, so no count is far from 67 of a class.
    offsets = np.bincount((noisy.labels - LABELS)[noisy.wrong] % 10, minlength=10)
    assert offsets[0] == 0 and offsets[1:].min() > 40 and offsets[1:].max() < 100
    either = uniform_noise(LABELS, 0.5, seed=1)
    assert 850 < either.wrong.sum() < 950  # nine in ten of the 1000 that were replaced


def test_noise_follows_from_the_seed():
    for corrupt in (uniform_noise, flip_noise):
        a, b, other = (corrupt(LABELS, 0.4, seed=s).labels for s in (3, 3, 4))
        np.testing.assert_array_equal(a, b)
        assert (a != other).any()
    assert not uniform_noise(LABELS, 0.0, seed=0).wrong.any()
    assert LABELS.max() == 9 and (np.arange(2000) % 10 == LABELS).all()  # the labels given are left alone


def test_flips_take_each_class_to_one_other():
    noisy = flip_noise(LABELS, 0.5, seed=2)
    assert noisy.wrong.sum() == 1000
    pairs = set(zip(LABELS[noisy.wrong].tolist(), noisy.labels[noisy.wrong].tolist(), strict=True))
    assert len(pairs) == 10 and len({b for _, b in pairs}) == 10
    to = [1, 0, 3, 2, 5, 4, 7, 6, 9, 8]
    given = flip_noise(LABELS, 1.0, seed=2, to=to)
    np.testing.assert_array_equal(given.labels, np.array(to)[LABELS])


def test_imbalance_draws_rows_of_each_class_once():
    rows = long_tailed(LABELS, 100.0, seed=0)
    counts = np.bincount(LABELS[rows])
    assert counts[0] == 200 and counts[9] == 2 and (np.diff(counts) < 0).all()
    assert len(set(rows.tolist())) == len(rows)
    pair = imbalanced_pair(LABELS, (4, 9), 200, 0.995, seed=0)
    assert np.bincount(LABELS[pair], minlength=10)[[4, 9]].tolist() == [1, 199]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: uniform_noise(LABELS, 1.5, 0), ValueError, r"share .* must lie in 0\.\.1, got 1.5"),
        (lambda: uniform_noise(LABELS * 1.0, 0.5, 0), TypeError, "labels must be integers, got float64"),
        (lambda: uniform_noise(LABELS[None], 0.5, 0), ValueError, r"shape \[n\]"),
        (lambda: uniform_noise(LABELS, 0.5, 0, num_classes=5), ValueError, r"got 0\.\.9 and 5 classes"),
        (lambda: flip_noise([0, 1, 2], 0.5, 0, to=[1, 1, 0]), ValueError, "another class"),
        (lambda: flip_noise([0, 1, 2], 0.5, 0, to=[1, 2, 3]), ValueError, "another class"),
        (lambda: long_tailed(LABELS, 0.5, 0), ValueError, "factor and a largest class of 1 or more"),
        (lambda: imbalanced_pair(LABELS, (4, 9), 5000, 0.9, 0), ValueError, "class 4 has 200 examples, 500"),
        (lambda: imbalanced_pair(LABELS, (4, 9), 10, 1.0, 0), ValueError, "0.5 <= share < 1"),
    ],
)
def test_what_cannot_be_corrupted_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_rows_are_those_of_the_data_set_and_follow_from_the_key():
    task = bl.Task((jnp.arange(8.0), jnp.arange(8)), (jnp.arange(4.0) + 100, jnp.arange(4)))
    sample = Rows(task, 50, 30)
    (x, y), (qx, _) = sample(jax.random.key(0))
    assert x.shape == (50,) and qx.shape == (30,)
    np.testing.assert_array_equal(x, y)  # the leaves of a row stay together
    assert set(x.tolist()) == set(range(8)) and set(qx.tolist()) == {100, 101, 102, 103}
    np.testing.assert_array_equal(sample(jax.random.key(0)).support[0], x)
    with pytest.raises(ValueError, match="1 or more, got 0, 3"):
        Rows(task, 0, 3)


# Weights of examples


def batches(wrong=0.0, rows=12, seed=0):
    """Three Gaussian classes in the plane: support with wrong labels, clean query."""
    rng = np.random.default_rng(seed)
    centers = np.array([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])

    def part(n):
        y = rng.integers(0, 3, n)
        return (centers[y] + 0.5 * rng.normal(size=(n, 2))), y.astype(np.int32)

    (x, y), query = part(rows), part(rows)
    noisy = uniform_noise(y, wrong, seed, num_classes=3, always_wrong=True)
    return bl.Task((x, noisy.labels), query), noisy.wrong


NET = bl.nets.mlp([2, 4, 3], jnp.tanh)
KEY = jax.random.key(0)


def estimated(learner, meta, task):
    """What one call of the learner's estimator answers."""

    @jax.jit
    def estimate(meta, task):
        parts = learner.problem, learner.solver, meta, task
        return learner.estimator.estimate(*parts, learner.estimator.init(*parts, KEY), KEY)[0]

    return estimate(meta, task)


def cross_entropy(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(NET.apply(params, x), y)


def model_gradients(meta, batch):
    """∇φ CE of each example, a tree of [n, ...]."""
    one = lambda x, y: jax.grad(lambda p: cross_entropy(p, (x[None], y[None]))[0])(meta["model"])  # noqa: E731
    return jax.vmap(one)(*map(jnp.asarray, batch))


def test_reweighting_is_the_product_of_gradients(x64):
    learner, (task, _) = learning_to_reweight(NET, rate=0.3), batches(0.3)
    meta = learner.init_meta(KEY)
    each = model_gradients(meta, task.support)
    clean = jax.grad(lambda p: jnp.mean(cross_entropy(p, task.query)))(meta["model"])
    products = sum(
        e.reshape(len(e), -1) @ c.ravel()
        for e, c in zip(jax.tree.leaves(each), jax.tree.leaves(clean), strict=True)
    )
    # At ε = 0 the look ahead stands still: −∂F/∂εᵢ = rate ⟨∇CEᵢ, ∇F⟩.
    found = learner.estimator.weight_hypergradient(learner.problem, learner.solver, meta, task, KEY)
    np.testing.assert_allclose(-found.grad, 0.3 * products, rtol=1e-10)
    weights = np.maximum(products, 0) / np.maximum(products, 0).sum()
    assert 0 < (weights > 0).sum() < len(weights)
    h = estimated(learner, meta, task)
    expected = jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), each)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), h.grad["model"], expected)
    assert float(h.stats["used_share"]) == (weights > 0).mean()


def test_reweighting_agrees_with_finite_differences(x64):
    learner, (task, _) = learning_to_reweight(NET, rate=0.3), batches(0.3)
    model = learner.init_meta(KEY)["model"]

    def ahead(weights):
        loss = lambda p: jnp.sum(weights * cross_entropy(p, task.support))  # noqa: E731
        moved = jax.tree.map(lambda p, g: p - 0.3 * g, model, jax.grad(loss)(model))
        return jnp.mean(cross_entropy(moved, task.query))

    found = learner.estimator.weight_hypergradient(
        learner.problem, learner.solver, {"model": model}, task, KEY
    ).grad
    assert_derivative(ahead, found, at=jnp.zeros(12))


def test_weight_net_agrees_with_finite_differences(x64):
    learner, (task, _) = meta_weight_net(NET, rate=0.5, hidden=5), batches(0.3)
    meta = learner.init_meta(KEY)
    head = jnp.linspace(-1.0, 1.0, 5)[:, None]  # at zero, where it starts, the layer below gets nothing
    meta["weights"]["head"]["w"] = head
    weights = example_weights(meta, cross_entropy(meta["model"], task.support))

    def ahead(weights_of_net):
        weights = example_weights({"weights": weights_of_net}, losses)
        loss = lambda p: weights @ cross_entropy(p, task.support) / weights.sum()  # noqa: E731
        moved = jax.tree.map(lambda p, g: p - 0.5 * g, meta["model"], jax.grad(loss)(meta["model"]))
        return jnp.mean(cross_entropy(moved, task.query))

    losses = cross_entropy(meta["model"], task.support)
    h = estimated(learner, meta, task)
    assert_derivative(ahead, h.grad["weights"], at=meta["weights"])
    # The model moves by its own weighted loss, whose weights pass no gradient on.
    own = jax.grad(lambda p: weights @ cross_entropy(p, task.support) / weights.sum())(meta["model"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), h.grad["model"], own)


def test_plain_training_is_the_gradient_of_the_training_loss(x64):
    task, _ = batches()
    of_class = jnp.array([1.0, 2.0, 5.0])
    for weigh in (equal_weights, class_weights(of_class)):
        learner = plain_training(NET, weigh)
        meta = learner.init_meta(KEY)
        w = np.ones(12) if weigh is equal_weights else np.asarray(of_class)[task.support[1]]
        own = jax.grad(lambda p, w=w: w @ cross_entropy(p, task.support) / w.sum())(meta["model"])
        h = estimated(learner, meta, task)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), h.grad["model"], own)


def test_any_estimator_looks_ahead(x64):
    learner, (task, _) = meta_weight_net(NET, hidden=5), batches(0.3)
    meta = learner.init_meta(KEY)
    expected = estimated(learner, meta, task).grad
    for estimator in (Unroll(), MultiStep(5)):  # of one step; the second has a state
        other = dataclasses.replace(learner, estimator=Online(estimator))
        found = estimated(other, meta, task).grad
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), expected, found)


def test_a_meta_without_a_model_is_refused():
    for estimator in (Online(), Reweight()):
        with pytest.raises(TypeError, match=r'trains meta\["model"\].*got ArrayImpl.*init_meta'):
            estimator.init(None, None, jnp.zeros(3), None, KEY)
    with pytest.raises(ValueError, match=r"estimator must carry no state, and MultiStep carries one"):
        Reweight(MultiStep(5)).init(None, None, {"model": jnp.zeros(3)}, None, KEY)
    for make in (learning_to_reweight, meta_weight_net):
        with pytest.raises(ValueError, match=f"{make.__name__} needs a positive rate"):
            make(NET, 0.0)


def test_a_step_in_which_no_example_helps_leaves_the_model_as_it_is():
    learner = learning_to_reweight(bl.nets.mlp([1, 2]))
    meta = {"model": {"head": {"w": jnp.array([[1.0, -1.0]]), "b": jnp.zeros(2)}}}
    opposite = bl.Task((jnp.ones((3, 1)), jnp.array([1, 1, 1])), (jnp.ones((3, 1)), jnp.array([0, 0, 0])))
    h = estimated(learner, meta, opposite)
    assert float(optax.tree.norm(h.grad)) == 0 and float(h.stats["used_share"]) == 0


def test_weights_help_where_labels_are_wrong():
    net = bl.nets.mlp([2, 64, 3])
    task, _ = batches(0.5, rows=120)
    task = bl.Task(task.support, jax.tree.map(lambda leaf: leaf[:40], task.query))
    x, y = batches(rows=500, seed=5)[0].query

    def accuracy(learner):
        optimizer = optax.multi_transform(
            {"model": optax.sgd(0.05), "weights": optax.adam(3e-2)},
            lambda meta: {name: name for name in meta},
        )
        sample = bl.tasks.batch(Rows(task, 100, 40), 1)
        state = bl.init_state(learner, optimizer, sample, KEY)
        options = bl.Options(chunk_size=300, zero_leaves="allow")
        meta = bl.train(learner, optimizer, sample, state, 300, options=options).meta
        return float(jnp.mean(jnp.argmax(net.apply(meta["model"], x), -1) == y)), meta

    plain, _ = accuracy(plain_training(net))
    reweighted, _ = accuracy(learning_to_reweight(net))
    by_loss, meta = accuracy(meta_weight_net(net, 1.0, hidden=20))
    assert min(reweighted, by_loss) > plain + 0.05, (plain, reweighted, by_loss)
    # What the weight net learned: an example of a large loss counts less.
    curve = example_weights(meta, jnp.linspace(0, 5, 6))
    assert float(curve[-1]) < 0.5 * float(curve[0])


def test_weighted_problem_ignores_no_example_by_itself():
    problem, (task, _) = weighted_problem(NET, equal_weights), batches()
    params = NET.init(KEY)
    figures = problem.metrics(params, {}, task.query, KEY)
    assert float(figures["loss"]) == pytest.approx(
        float(jnp.mean(cross_entropy(params, task.query))), rel=1e-6
    )
    right = np.argmax(np.asarray(NET.apply(params, task.query[0])), 1) == task.query[1]
    assert float(figures["accuracy"]) == pytest.approx(right.mean())
