"""Varying way and shot: what is drawn, how often, and that padding changes nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.inner import prototypes
from bilevel.learners import cross_entropy
from bilevel.tasks.episodes import EqualShots, MetaDatasetShots, UnequalShots, VaryingFewShot
from bilevel.testing import assert_trees_close

KEY = jax.random.key(0)


def coded(counts, queries):
    """Vectors [class, example], so that a task shows what it was made of."""
    rows = np.array([(c, e) for c, count in enumerate(counts) for e in range(count)], np.float32)
    return bl.tasks.FewShot(rows, rows[:, 0].astype(int), ways=2, shots=1, queries=queries)


def draw(sample, num_tasks, seed=0):
    keys = jax.random.split(jax.random.key(seed), num_tasks)
    return jax.tree.map(np.asarray, jax.jit(lambda s, keys: jax.vmap(s)(keys))(sample, keys))


def shots_of(tasks, ways):
    y = tasks.support[1]
    return np.stack([(y == label).sum(1) for label in range(ways)], 1)  # [tasks, ways]


@pytest.mark.parametrize("padding", ["repeat", "zeros"])
def test_tasks_are_whole_and_padding_comes_last(padding):
    sample = VaryingFewShot(coded([12] * 9, queries=2), (2, 5), UnequalShots(1, 4), padding)
    tasks = draw(sample, 200)
    (x, y), (qx, qy) = tasks
    assert x.shape == (200, 20, 2) and qx.shape == (200, 10, 2) and y.dtype == np.int32
    for i in range(200):
        real, asked = y[i] >= 0, qy[i] >= 0
        ways = y[i].max() + 1
        assert 2 <= ways <= 5 and asked.sum() == 2 * ways
        assert (np.diff(real.astype(int)) <= 0).all() and (np.diff(asked.astype(int)) <= 0).all()
        drawn = np.concatenate([x[i][real], qx[i][asked]])
        labels = np.concatenate([y[i][real], qy[i][asked]])
        assert len({tuple(row) for row in drawn}) == len(drawn)  # no example twice, in either part or across
        pairs = {(int(c), int(label)) for c, label in zip(drawn[:, 0], labels, strict=True)}
        assert len(pairs) == ways == len({c for c, _ in pairs}) == len({label for _, label in pairs})
        if padding == "zeros":
            assert (x[i][~real] == 0).all() and (qx[i][~asked] == 0).all()
        else:
            n = real.sum()
            np.testing.assert_array_equal(x[i], x[i][np.arange(20) % n])


def test_ways_and_equal_shots_are_uniform():
    tasks = draw(VaryingFewShot(coded([9] * 8, queries=1), (2, 4), EqualShots(1, 3)), 9000)
    shots = shots_of(tasks, 4)
    ways = (shots > 0).sum(1)
    assert (shots.max(1, where=shots > 0, initial=0) == shots.min(1, where=shots > 0, initial=9)).all()
    table = np.zeros((3, 3))
    np.add.at(table, (ways - 2, shots[:, 0] - 1), 1)
    assert np.sum((table - 1000) ** 2 / 1000) < 26  # 8 degrees of freedom, p = 0.001


def test_unequal_shots_are_uniform_and_independent():
    tasks = draw(VaryingFewShot(coded([9] * 8, queries=1), (3, 3), UnequalShots(1, 4)), 8000)
    shots = shots_of(tasks, 3)
    table = np.zeros((4, 4))
    np.add.at(table, (shots[:, 0] - 1, shots[:, 2] - 1), 1)
    assert np.sum((table - 500) ** 2 / 500) < 38  # 15 degrees of freedom, p = 0.001


def test_every_class_and_example_is_drawn_equally_often():
    counts = [4, 7, 5]  # the first has fewer examples than a row of queries and shots
    tasks = draw(VaryingFewShot(coded(counts, queries=1), (2, 2), EqualShots(5, 5)), 9000)
    for x in (tasks.support[0][:, :10], tasks.query[0]):
        y = tasks.support[1] if x is not tasks.query[0] else tasks.query[1]
        real = x[y >= 0]
        for c, count in enumerate(counts):
            examples, drawn = np.unique(real[real[:, 0] == c][:, 1], return_counts=True)
            assert examples.tolist() == list(range(count))
            assert drawn.min() > 0.9 * drawn.mean()
    shots = shots_of(tasks, 2)
    assert set(np.unique(shots)) == {3, 4, 5}  # as many as a class has beside its query


def test_meta_dataset_shots_follow_the_formula():
    available = jnp.array([40, 10, 5, 90, 0])
    used = jnp.array([True, True, True, True, False])
    rule = MetaDatasetShots(most=30, total=60)
    shots = np.asarray(jax.vmap(lambda k: rule.draw(k, used, available))(jax.random.split(KEY, 20_000)))
    assert (shots[:, 4] == 0).all() and (shots[:, :4] >= 1).all()
    assert (shots <= np.minimum(30, available)).all() and (shots.sum(1) <= 60).all()
    # By hand, in numpy, with draws of its own.
    rng = np.random.default_rng(0)
    n = np.array([40, 10, 5, 90])
    beta, alpha = rng.uniform(size=(20_000, 1)), rng.uniform(np.log(0.5), np.log(2), (20_000, 4))
    size = np.minimum(60, np.ceil(beta * np.minimum(30, n)).sum(1, keepdims=True))
    share = np.exp(alpha) * n / (np.exp(alpha) * n).sum(1, keepdims=True)
    expected = np.minimum(np.floor(share * (size - 4)) + 1, np.minimum(30, n))
    np.testing.assert_allclose(shots[:, :4].mean(0), expected.mean(0), rtol=0.02)
    np.testing.assert_allclose(shots[:, :4].std(0), expected.std(0), rtol=0.03)


def test_a_bounded_support_is_as_long_as_its_bound():
    sample = VaryingFewShot(coded([30] * 6, queries=3), (3, 6), MetaDatasetShots(20, 40))
    tasks = draw(sample, 50)
    assert tasks.support[1].shape == (50, 40) and tasks.query[1].shape == (50, 18)
    assert ((tasks.support[1] >= 0).sum(1) >= 3).all()


def padded_and_plain(padding):
    """One task with padding and the same task without."""
    sample = VaryingFewShot(coded([12] * 9, queries=2), (3, 5), UnequalShots(1, 4), padding)
    task = jax.jit(sample)(KEY)
    (x, y), (qx, qy) = task
    assert (y < 0).any() and (qy < 0).any()
    plain = bl.Task((x[y >= 0], y[y >= 0]), (qx[qy >= 0], qy[qy >= 0]))
    return jax.tree.map(lambda leaf: leaf.astype(float) if leaf.dtype == jnp.float32 else leaf, (task, plain))


@pytest.mark.parametrize("padding", ["repeat", "zeros"])
def test_padding_changes_no_loss_accuracy_or_hypergradient(x64, padding):
    net = bl.nets.mlp([2, 6, 5], jnp.tanh)
    learner = bl.maml(net, cross_entropy, num_steps=3, rates=0.1)
    meta = learner.init_meta(KEY)
    estimate = jax.jit(
        lambda task: bl.hypergradient(learner.problem, learner.solver, learner.estimator, meta, task, KEY)
    )
    padded, plain = (estimate(task) for task in padded_and_plain(padding))
    assert_trees_close("grad", padded.grad, plain.grad, 1e-9)
    for name in ("query_loss", "query_accuracy", "support_loss", "support_accuracy"):
        np.testing.assert_allclose(padded.stats[name], plain.stats[name], rtol=1e-10, err_msg=name)


def test_padding_changes_no_prototype(x64):
    padded, plain = padded_and_plain("repeat")
    ways = int(plain.support[1].max()) + 1
    means = [prototypes(lambda meta, x: x, 5).function(None, task.support, KEY) for task in (padded, plain)]
    np.testing.assert_allclose(means[0][:ways], means[1][:ways], rtol=1e-12)
    by_hand = [np.asarray(plain.support[0])[np.asarray(plain.support[1]) == c].mean(0) for c in range(ways)]
    np.testing.assert_allclose(means[0][:ways], by_hand, rtol=1e-12)


def test_batch_statistics_are_those_of_the_real_examples_when_padding_repeats():
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    data = bl.tasks.FewShot(images, np.arange(60) % 6, ways=2, shots=1, queries=2)
    net = bl.nets.conv4(4, 4, image_shape=(8, 8, 1))  # batch norm
    params, apply = net.init(KEY), jax.jit(net.apply)
    errors = {}
    for padding in ("repeat", "zeros"):
        # Two ways in the room for four: the padded batch is exactly twice the real one.
        sample = VaryingFewShot(data, (2, 4), EqualShots(3, 3), padding)
        tasks = draw(sample, 30)
        (i, *_) = np.flatnonzero((tasks.support[1] >= 0).sum(1) == 6)
        x = tasks.support[0][i]
        errors[padding] = float(jnp.abs(apply(params, x)[:6] - apply(params, x[:6])).max())
    assert errors["repeat"] < 1e-4 < 0.01 < errors["zeros"]


def test_rotated_classes_are_turned_whole():
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4), np.uint8)
    images[:, 0, 0] = np.arange(12)  # says which picture it is, wherever the corner went
    images[:, 1:, :] |= 16
    images[:, :, 1:] |= 16
    data = bl.tasks.FewShot(images, np.arange(12) // 3, ways=2, shots=1, queries=1, rotations=True)
    task = jax.jit(VaryingFewShot(data, (16, 16), EqualShots(2, 2)))(KEY)
    seen = set()
    for label in range(16):
        parts = [part[0][part[1] == label] for part in (task.support, task.query)]
        for picture in np.rint(255 * np.concatenate(parts)[..., 0]).astype(int):
            ((turn, original),) = [
                (k, p) for k, p in ((k, np.rot90(picture, -k)) for k in range(4)) if p[0, 0] < 16
            ]
            np.testing.assert_array_equal(original, images[original[0, 0]])
            seen.add((label, original[0, 0] // 3, turn))
    assert len(seen) == 16 and len({pair[1:] for pair in seen}) == 16


def test_same_key_same_task_and_data_are_an_argument():
    images = np.zeros((100, 28, 28), np.uint8)
    data = bl.tasks.FewShot(images, np.arange(100) % 10, 5, 1, 1)
    sample = bl.tasks.batch(VaryingFewShot(data, (2, 5), EqualShots(1, 2)), 4)
    text = jax.jit(lambda sample, key: sample(key)).lower(sample, KEY).as_text()
    assert "tensor<100x28x28x1xui8>" in text[text.index("@main") :].partition("->")[0]
    a, b = draw(dataclasses.replace(sample), 2), draw(sample, 2)
    jax.tree.map(np.testing.assert_array_equal, a, b)


DATA = coded([6] * 5, queries=3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VaryingFewShot(DATA, (1, 3)), ValueError, "2 <= lowest <= highest, got 1 and 3"),
        (lambda: VaryingFewShot(DATA, (4, 3)), ValueError, "2 <= lowest <= highest, got 4 and 3"),
        (lambda: VaryingFewShot(DATA, (2, 6)), ValueError, "at most the 5 classes, got 6"),
        (lambda: VaryingFewShot(DATA, (2, 3), padding="ones"), ValueError, "repeat or zeros, got 'ones'"),
        (lambda: VaryingFewShot(bl.tasks.Glyphs(), (2, 3)), TypeError, "must be a FewShot, got Glyphs"),
        (lambda: EqualShots(0, 2), ValueError, "EqualShots must be whole numbers, 1 <= lowest"),
        (lambda: UnequalShots(3, 2), ValueError, "UnequalShots must be whole numbers"),
        (lambda: MetaDatasetShots(5, 0), ValueError, "total must be at least 1, got 0"),
    ],
)
def test_mistakes_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
