import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.tasks import FewShot, batch
from bilevel.tasks.few_shot import _checked_images, _in_order


def coded(counts, shuffle=True):
    """Vectors [class, example], so that a task shows what it was made of."""
    rows = [(c, e) for c, count in enumerate(counts) for e in range(count)]
    vectors = np.array(rows, np.float32)
    order = np.random.default_rng(0).permutation(len(rows)) if shuffle else np.arange(len(rows))
    return vectors[order], vectors[order, 0].astype(int)


def draw(few_shot, num_tasks, seed=0):
    keys = jax.random.split(jax.random.key(seed), num_tasks)
    return jax.jit(lambda f, keys: jax.vmap(f)(keys))(few_shot, keys)


def test_pictures_in_order_of_their_classes_are_not_copied_on_the_host(tmp_path):
    np.save(tmp_path / "images.npy", np.arange(12 * 16, dtype=np.uint8).reshape(12, 4, 4, 1))
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    labels = np.arange(12) // 3
    assert np.shares_memory(_in_order(_checked_images(mapped), labels)[0], mapped)
    assert _in_order(mapped, labels[::-1])[0][:3].tolist() == mapped[9:].tolist()


def test_what_is_written_to_the_arrays_later_does_not_reach_the_tasks():
    images, labels = np.ones((4, 8, 8, 16), np.uint8), np.arange(4, dtype=np.int32) // 2
    few_shot = FewShot(images, labels, ways=2, shots=1, queries=1)
    images[:], labels[:] = 0, 0
    assert few_shot.images.min() == 1 and few_shot.labels.tolist() == [0, 0, 1, 1]


def test_support_and_query_are_disjoint_and_labelled_alike():
    tasks = draw(FewShot(*coded([9] * 12), ways=5, shots=3, queries=4), 200)
    (x, y), (qx, qy) = jax.tree.map(np.asarray, tasks)
    assert x.shape == (200, 15, 2) and qx.shape == (200, 20, 2)
    assert x.dtype == np.float32 and y.dtype == np.int32
    for i in range(200):
        assert y[i].tolist() == np.repeat(range(5), 3).tolist()
        assert qy[i].tolist() == np.repeat(range(5), 4).tolist()
        classes = [int(x[i, y[i] == label, 0][0]) for label in range(5)]
        assert len(set(classes)) == 5
        np.testing.assert_array_equal(x[i, :, 0], np.take(classes, y[i]))
        np.testing.assert_array_equal(qx[i, :, 0], np.take(classes, qy[i]))
        seen = {tuple(row) for row in np.concatenate([x[i], qx[i]])}
        assert len(seen) == 35  # no example twice, in either part or across


def test_classes_and_their_order_are_uniform():
    tasks = draw(FewShot(*coded([2] * 6), ways=3, shots=1, queries=1), 12_000)
    first, second = np.asarray(tasks.support[0][:, 0, 0]), np.asarray(tasks.support[0][:, 1, 0])
    pairs, counts = np.unique(6 * first + second, return_counts=True)
    assert len(pairs) == 30
    assert np.sum((counts - 400) ** 2 / 400) < 70  # 29 degrees of freedom


def test_only_real_examples_of_ragged_classes_are_drawn_each_equally_often():
    counts = [2, 7, 3, 11]
    tasks = draw(FewShot(*coded(counts), ways=2, shots=1, queries=1), 20_000)
    x = np.concatenate([np.asarray(tasks.support[0]), np.asarray(tasks.query[0])], axis=1)
    for c, count in enumerate(counts):
        examples, drawn = np.unique(x[x[..., 0] == c][:, 1], return_counts=True)
        assert examples.tolist() == list(range(count))
        assert drawn.min() > 0.85 * drawn.mean()


def test_same_key_same_task():
    few_shot = FewShot(*coded([5] * 30), ways=5, shots=1, queries=1)
    a, b, c = few_shot(jax.random.key(1)), few_shot(jax.random.key(1)), few_shot(jax.random.key(2))
    np.testing.assert_array_equal(a.support[0], b.support[0])
    assert not np.array_equal(a.support[0], c.support[0])


def test_rotations_are_classes_of_their_own():
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4), np.uint8)
    images[:, 0, 0] = np.arange(12)  # says which picture it is, wherever the corner went
    images[:, 1:, :] |= 16
    images[:, :, 1:] |= 16
    few_shot = FewShot(images, np.arange(12) // 3, ways=16, shots=1, queries=2, rotations=True)
    assert few_shot.num_classes == 16
    task = jax.jit(few_shot)(jax.random.key(0))
    seen = set()
    for label in range(16):
        parts = [part[0][part[1] == label] for part in (task.support, task.query)]
        group = np.rint(255 * np.concatenate(parts)[..., 0]).astype(int)
        turns = set()
        for picture in group:
            back = [(k, np.rot90(picture, -k)) for k in range(4)]
            ((turn, original),) = [(k, p) for k, p in back if p[0, 0] < 16]
            np.testing.assert_array_equal(original, images[original[0, 0]])
            turns.add((original[0, 0] // 3, turn))
        assert len(turns) == 1  # one class, one rotation
        seen |= turns
    assert len(seen) == 16


def test_integer_pictures_stay_uint8_on_the_device_and_come_out_in_0_1():
    images = np.full((8, 5, 6), 255, np.int64)
    few_shot = FewShot(images, np.arange(8) % 2, ways=2, shots=1, queries=1)
    assert few_shot.images.dtype == jnp.uint8
    x = few_shot(jax.random.key(0)).support[0]
    assert x.shape == (2, 5, 6, 1) and x.dtype == jnp.float32 and (x == 1).all()


def test_channels_booleans_and_vectors_keep_their_meaning():
    labels = np.arange(8) % 2
    rgb = FewShot(np.ones((8, 4, 4, 3)), labels, 2, 1, 1)(jax.random.key(0)).support[0]
    assert rgb.shape == (2, 4, 4, 3) and (rgb == 1).all()
    bits = FewShot(np.ones((8, 4), bool), labels, 2, 1, 1)(jax.random.key(0)).support[0]
    assert bits.shape == (2, 4) and (bits == 1).all()


def test_data_are_an_input_of_the_program_and_not_a_constant_in_it():
    images = np.zeros((100, 28, 28), np.uint8)
    sample = batch(FewShot(images, np.arange(100) % 10, 5, 1, 1), 4)
    text = jax.jit(lambda sample, key: sample(key)).lower(sample, jax.random.key(0)).as_text()
    assert "tensor<100x28x28x1xui8>" in text[text.index("@main") :].partition("->")[0]  # an argument
    assert len(text) < 200_000


def test_it_can_be_changed_with_replace():
    few_shot = FewShot(*coded([5] * 4), ways=2, shots=1, queries=1)
    wider = dataclasses.replace(few_shot, ways=4, queries=3)
    assert wider(jax.random.key(0)).query[0].shape == (12, 2)
    np.testing.assert_array_equal(wider.images, few_shot.images)
    assert repr(wider) == "FewShot(ways=4, shots=1, queries=3, rotations=False)"


OK = np.zeros((8, 4, 4), np.uint8), np.arange(8) % 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ways": 1}, ValueError, "ways must be at least 2, got 1"),
        ({"shots": 0}, ValueError, "shots must be at least 1, got 0"),
        ({"queries": 0}, ValueError, "queries must be at least 1, got 0"),
        ({"ways": 3}, ValueError, "ways must be at most the 2 classes, got 3"),
        ({"ways": 9, "rotations": True}, ValueError, "at most the 8 classes, got 9"),
        ({"shots": 4}, ValueError, r"got 4 \+ 1, but class 0 has 4"),
        ({"labels": np.array([5] * 7 + [9])}, ValueError, "but class 9 has 1"),
        ({"labels": np.arange(7)}, ValueError, "must have one length, got 8 and 7"),
        ({"labels": np.zeros((8, 1), int)}, ValueError, r"shape \[N\], got \(8, 1\)"),
        ({"labels": np.arange(8.0)}, TypeError, "labels must be integers, got float64"),
        ({"labels": np.arange(8) - 1}, ValueError, "must lie in 0..2147483647, got -1..6"),
        ({"labels": np.arange(8) << 40}, ValueError, "must lie in 0..2147483647"),
        ({"images": np.zeros((0, 4, 4)), "labels": np.zeros(0, int)}, ValueError, "filled array"),
        ({"images": np.zeros(8)}, ValueError, r"\[N, H, W, C\], got \(8,\)"),
        ({"images": np.full((8, 4), 256)}, ValueError, "must lie in 0..255, got 256..256"),
        ({"images": np.array([["a"]] * 8)}, TypeError, "integers or floats, got <U1"),
        ({"images": np.diag([0] * 5 + [np.nan] + [0.0] * 2)}, ValueError, "but image 5 is not"),
        ({"images": np.full((8, 4), 1e300)}, ValueError, "finite in float32"),
        ({"images": np.zeros((8, 4, 5)), "rotations": True}, ValueError, "need square pictures"),
        ({"images": np.zeros((8, 4)), "rotations": True}, ValueError, "need square pictures"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_mistakes_are_named_in_one_line(change, error, message):
    arguments = {"images": OK[0], "labels": OK[1], "ways": 2, "shots": 1, "queries": 1} | change
    with pytest.raises(error, match=message) as caught:
        FewShot(**arguments)
    assert "\n" not in str(caught.value)
