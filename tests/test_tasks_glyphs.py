import jax
import numpy as np
import pytest

from bilevel.tasks import Glyphs, batch, glyph
from bilevel.tasks.glyphs import SPLITS

draw = jax.jit(glyph, static_argnames="size")


def test_splits_share_no_class():
    ranges = [set(range(*bounds)) for bounds in SPLITS.values()]
    assert len(set().union(*ranges)) == sum(map(len, ranges)) == 12_000
    assert Glyphs(split="test").num_classes == 1000


@pytest.mark.parametrize("split", ["train", "test"])
def test_tasks_show_ink_on_paper(split):
    tasks = jax.jit(batch(Glyphs(5, 2, 3, split), 8))(jax.random.key(0))
    x, y = tasks.query
    assert x.shape == (8, 15, 28, 28, 1) and x.dtype == np.float32
    assert y[0].tolist() == np.repeat(range(5), 3).tolist() and y.dtype == np.int32
    assert np.isfinite(x).all() and x.min() == 0 and x.max() == 1
    ink = np.asarray(x).mean(axis=(2, 3, 4))
    assert ink.min() > 0.01 and ink.max() < 0.5  # none blank, none a blot


def test_same_key_same_task():
    sample = jax.jit(Glyphs(ways=3))
    a, b, c = sample(jax.random.key(1)), sample(jax.random.key(1)), sample(jax.random.key(2))
    np.testing.assert_array_equal(a.support[0], b.support[0])
    assert not np.array_equal(a.support[0], c.support[0])


def test_drawings_of_a_class_are_alike_but_not_equal():
    task = jax.jit(batch(Glyphs(ways=5, shots=1, queries=5, split="test"), 100))(jax.random.key(0))
    support = np.asarray(task.support[0]).reshape(100, 1, 5, -1)
    query = np.asarray(task.query[0]).reshape(100, 25, 1, -1)
    distance = ((query - support) ** 2).sum(axis=-1)
    assert distance.min() > 1.0
    accuracy = np.mean(distance.argmin(axis=-1) == np.asarray(task.query[1]))
    assert 0.5 < accuracy < 0.9  # chance is 0.2; at 1.0 there would be nothing to learn


def test_a_class_is_fixed_by_its_number():
    key = jax.random.key(0)
    np.testing.assert_array_equal(draw(3, key), draw(3, key))
    assert np.abs(draw(3, key) - draw(4, key)).mean() > 0.05


def test_size_changes_the_resolution_and_not_the_drawing():
    small, large = (draw(11, jax.random.key(0), size=size) for size in (28, 56))
    shrunk = np.asarray(large).reshape(28, 2, 28, 2).mean(axis=(1, 3))
    assert np.abs(shrunk - np.asarray(small)[..., 0]).mean() < 0.02


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "valid"}, "split must be one of train, validation, test, got 'valid'"),
        ({"ways": 1}, "ways must be at least 2, got 1"),
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"queries": 0}, "queries must be at least 1, got 0"),
        ({"size": 4}, "size must be at least 8, got 4"),
        ({"split": "test", "ways": 1001}, "at most the 1000 test classes, got 1001"),
    ],
)
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        Glyphs(**change)


def test_float64_does_not_change_the_characters(x64):
    wide = draw(5, jax.random.key(1))
    assert wide.dtype == np.float32
    with jax.enable_x64(False):
        narrow = draw(5, jax.random.key(1))
    np.testing.assert_allclose(wide, narrow, atol=1e-3)
