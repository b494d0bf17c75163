"""Distilled images teach more than as many real ones, and their hypergradient is the slope of their value."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.recipes import distillation as module
from bilevel.recipes.distillation import Distillation, distillation, pictures
from bilevel.tasks.few_beside_many import few_beside_many
from bilevel.tasks.mnist import Mnist
from bilevel.testing import assert_derivative

KEY = jax.random.key(0)
CLASSES, SIDE = 3, 4


def blobs(count=300, seed=0):
    """Noisy pictures of three prototypes, so noisy that one real picture of each says little."""
    rng = np.random.default_rng(seed)
    prototypes = np.random.default_rng(7).uniform(size=(CLASSES, SIDE, SIDE))
    labels = np.arange(count) % CLASSES
    return (prototypes[labels] + rng.normal(size=(count, SIDE, SIDE))).astype(np.float32), labels


def network():
    net = bl.nets.mlp([SIDE**2, 6, CLASSES], jnp.tanh)
    return bl.nets.Net(net.init, lambda params, x: net.apply(params, x.reshape(len(x), -1)))


def learner(**options):
    net = network()
    start = partial(jax.random.normal, shape=(CLASSES, SIDE, SIDE))
    options = {"num_classes": CLASSES, "num_steps": 4, "rate": 0.1} | options
    return distillation(net, start, jnp.arange(CLASSES), **options)


def test_hypergradient_is_the_slope_of_the_value(x64):
    sample = few_beside_many(*blobs(30), shots=1, size=8)
    task, tested = sample(KEY), learner(soft_labels=True)
    meta = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), tested.init_meta(KEY))

    @jax.jit
    def run(meta):
        return bl.hypergradient(tested.problem, tested.solver, tested.estimator, meta, task, KEY)

    h = run(meta)
    assert_derivative(lambda meta: run(meta).value, h.grad, meta)
    assert h.stats["zero_leaves"] == 0  # each image, rate and label has a part in the answer


def accuracies(tested, meta, sample, count=20):
    """Before and after the inner loop, of many starts: `[count]` each."""

    @jax.jit
    @jax.vmap
    def run(key):
        task, start = sample(KEY), tested.problem.init(meta, key)
        params = bl.adapt(tested, meta, sample(key), key)
        return [tested.problem.metrics(at, meta, task.query, key)["accuracy"] for at in (start, params)]

    return map(np.asarray, run(jax.random.split(jax.random.key(1), count)))


def test_distilled_images_teach_more_than_real_ones():
    sample = few_beside_many(*blobs(), shots=1, size=64)
    test = few_beside_many(*blobs(), shots=1, test=blobs(300, seed=1))
    tested, optimizer = learner(num_steps=6), optax.adam(0.05)
    batches = bl.tasks.batch(sample, 2)
    state = bl.init_state(tested, optimizer, batches, KEY)
    state = bl.train(tested, optimizer, batches, state, 150)
    before, after = accuracies(tested, state.meta, test)
    real = bl.learners.from_scratch(network(), bl.learners.cross_entropy, optax.adam(0.03), 60)
    _, trained = accuracies(real, {}, test)
    assert after.mean() - 2 * after.std() / 20**0.5 > trained.mean() + 0.1
    assert before.mean() < 0.5  # the images are what teaches: nothing is known before the first step


def test_support_is_a_few_of_each_class_and_query_is_drawn_or_whole():
    images, labels = blobs(31)
    task = few_beside_many(images, labels, shots=2, size=5)(KEY)
    np.testing.assert_array_equal(task.support[1], np.repeat(np.arange(CLASSES), 2))
    there = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    for x, y in (task.support, task.query):  # every picture goes with its own label
        assert [there[np.asarray(image).tobytes()] for image in x] == y.tolist()
    assert len({np.asarray(image).tobytes() for image in task.support[0]}) == 2 * CLASSES
    whole = few_beside_many(images, labels, shots=1, test=blobs(7, seed=1))
    assert (whole(KEY).query[0] == whole(jax.random.key(1)).query[0]).all() and len(whole(KEY).query[1]) == 7
    counted = few_beside_many(np.full((3, 2, 2), 255, np.uint8), np.arange(3), shots=1, size=2)
    assert counted(KEY).query[0].max() == 1 and counted(KEY).query[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"shots": 0, "size": 1}, "shots must lie in 1..2"),
        ({"shots": 3, "size": 1}, "shots must lie in 1..2"),
        ({"shots": 1}, "the query is either"),
        ({"shots": 1, "size": 1, "labels": [0, 0, 1]}, "one length"),
        ({"shots": 1, "size": 1, "labels": [0, 0, 2, 2, 2, 0]}, "none left out"),
    ],
)
def test_what_cannot_be_drawn_is_refused(more, expected):
    more = {"images": np.zeros((6, 2, 2)), "labels": [0, 0, 1, 1, 2, 2]} | more
    with pytest.raises(ValueError, match=expected):
        few_beside_many(**more)


@pytest.mark.parametrize("more", [{"rate": 0.0}, {"num_steps": 0}, {"num_classes": 2}])
def test_what_cannot_be_distilled_is_refused(more):
    with pytest.raises(ValueError, match="distillation needs"):
        learner(**more)


def test_pictures_lie_in_the_unit_interval_and_keep_their_order():
    images = jnp.linspace(-3, 3, 40).reshape(10, 2, 2)
    shown = pictures(images, per_class=2)
    assert list(shown) == ["0", "1", "2", "3", "4"]
    flat = np.concatenate([rows.ravel() for rows in shown.values()])
    assert flat.min() == 0 and 0.9 < flat.max() <= 1 and (np.diff(flat) >= 0).all()


@pytest.fixture
def digits(monkeypatch):
    """Digits by a program in place of MNIST: 500 for training, 100 held out, 100 for the test."""
    rng, labels = np.random.default_rng(0), np.arange(700) % 10
    images = rng.integers(0, 255, (700, 28, 28), np.uint8)
    images[np.arange(700), labels] = 255
    found = Mnist(images[:600], labels[:600], images[600:], labels[600:])
    monkeypatch.setattr(module, "mnist", lambda data, download: found)
    monkeypatch.setattr(module, "NUM_TRAIN", 500)


def test_recipe_starts_where_it_says(digits):
    for init in ("random", "fixed"):
        recipe = Distillation(init=init, net="linear", num_steps=2, batch_size=32)
        experiment = recipe.build()
        first, second = (experiment.learner.problem.init(None, jax.random.key(i)) for i in range(2))
        same = bool((first["head"]["w"] == second["head"]["w"]).all())
        assert same == (init == "fixed")
    state = bl.init_state(experiment.learner, experiment.optimizer, experiment.sample_tasks, KEY)
    state = bl.train(experiment.learner, experiment.optimizer, experiment.sample_tasks, state, 3)
    assert (experiment.sample_validation(KEY).query[0] != experiment.sample_test(KEY).query[0]).any()
    assert experiment.meta_pictures(state.meta)["9"].shape == (1, 28, 28)
    assert experiment.meta_lines(state.meta)["inner rate"].shape == (2,)
