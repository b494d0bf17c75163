from operator import itemgetter

import jax
import numpy as np
import pytest

from bilevel.tasks import Glyphs, batch, glyph
from bilevel.tasks.glyphs import SPLITS
from bilevel.tasks.handwriting import S, drawing, program, trace

draw = jax.jit(glyph, static_argnames="size")
write = jax.jit(drawing, static_argnames="size")


def test_splits_share_no_class():
    ranges = [set(range(*bounds)) for bounds in SPLITS.values()]
    assert len(set().union(*ranges)) == sum(map(len, ranges)) == 12_000
    assert Glyphs(split="test").num_classes == 1000


@pytest.mark.parametrize(("split", "style"), [("train", "strokes"), ("test", "handwriting")])
def test_tasks_show_ink_on_paper(split, style):
    tasks = jax.jit(batch(Glyphs(5, 2, 3, split, style=style), 8))(jax.random.key(0))
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


@pytest.mark.parametrize(("style", "low", "high"), [("strokes", 0.5, 0.9), ("handwriting", 0.35, 0.75)])
def test_drawings_of_a_class_are_alike_but_not_equal(style, low, high):
    sample = batch(Glyphs(ways=5, shots=1, queries=5, split="test", style=style), 100)
    task = jax.jit(sample)(jax.random.key(0))
    support = np.asarray(task.support[0]).reshape(100, 1, 5, -1)
    query = np.asarray(task.query[0]).reshape(100, 25, 1, -1)
    distance = ((query - support) ** 2).sum(axis=-1)
    assert distance.min() > 0.5
    accuracy = np.mean(distance.argmin(axis=-1) == np.asarray(task.query[1]))
    assert low < accuracy < high  # chance is 0.2; at 1.0 there would be nothing to learn


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
        ({"style": "bold"}, "style must be one of strokes, handwriting, got 'bold'"),
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


@pytest.mark.parametrize("render", [draw, write])
def test_float64_does_not_change_the_characters(x64, render):
    wide = render(5, jax.random.key(1))
    assert wide.dtype == np.float32
    with jax.enable_x64(False):
        narrow = render(5, jax.random.key(1))
    np.testing.assert_allclose(wide, narrow, atol=1e-3)


def by_hand(character):
    """Where a pen goes that follows a program, a thousandth of a segment at a time: [n, 2] a stroke."""
    c = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), character)
    paths = []
    for s in range(S):
        joint = np.argwhere(c.joint[s])
        place = c.offset[s].copy()
        if len(joint):
            ((parent, segment),) = joint
            place = paths[parent][1000 * segment + round(float(c.at[s]) * 1000) - (c.at[s] == 1)].copy()
        heading, path = c.heading[s], []
        for k in range(len(c.length[s])):
            heading += c.corner[s, k]
            for _ in range(1000):
                path.append(place.copy())
                middle = heading + c.turn[s, k] / 2000
                place += c.length[s, k] / 1000 * np.array([np.cos(middle), np.sin(middle)])
                heading += c.turn[s, k] / 1000
        paths.append(path)
    return [np.array(path) for path in paths]


def test_handwriting_follows_its_program():
    programs = jax.jit(jax.vmap(program))(jax.numpy.arange(40))
    dots_of = jax.jit(lambda p: trace(p, 192))
    attached = 0
    for i in range(40):
        character = jax.tree.map(itemgetter(i), programs)
        dots, length = dots_of(character)
        paths = by_hand(character)
        drawn = np.concatenate(
            [path[np.repeat(np.asarray(character.length[s]) > 0, 1000)] for s, path in enumerate(paths)]
        )
        gaps = np.linalg.norm(np.asarray(dots)[:, None] - drawn[None, ::5], axis=-1).min(1)
        assert gaps.max() < 0.01 * max(1, length)  # every dot lies on a stroke
        np.testing.assert_allclose(length, character.length.sum(), rtol=1e-5)
        attached += int(character.joint.sum())
    assert attached > 20


def test_characters_have_one_to_four_strokes_and_fit_the_page():
    programs = jax.jit(jax.vmap(program))(jax.numpy.arange(2000))
    strokes = np.asarray((programs.length > 0).any(-1).sum(-1))
    shares = np.bincount(strokes, minlength=5)[1:] / 2000
    np.testing.assert_allclose(shares, [0.20, 0.32, 0.28, 0.20], atol=0.04)
    joint = np.asarray(programs.joint)
    assert set(np.unique(joint)) == {0.0, 1.0} and joint.sum((2, 3)).max() == 1
    assert (joint.sum(-1) * np.triu(np.ones((S, S)))).sum() == 0  # only on strokes before
    keys = jax.random.split(jax.random.key(0), 500)
    pictures = np.asarray(jax.jit(jax.vmap(drawing))(np.arange(500), keys))
    ink = pictures.sum((1, 2, 3))
    assert np.isfinite(ink).all() and ink.min() > 2
    assert np.mean(pictures[:, [0, -1]].sum((1, 2, 3)) > 1) < 0.1  # few are cut off
