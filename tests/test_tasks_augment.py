"""Random changes of pictures and tasks: what they do, what they leave alone, and their derivatives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

import bilevel as bl
from bilevel.tasks.augment import affine, compose, cutout, flip, intensity, noise, warp
from bilevel.tasks.sinusoid import sinusoid
from bilevel.tasks.task_augment import (
    augmented,
    changed,
    metamix,
    mislabeled,
    mixed_classes,
    relabeled,
    shifted_targets,
)
from bilevel.testing import assert_derivative

KEY = jax.random.key(0)
PICTURES = jax.random.uniform(jax.random.key(1), (6, 9, 7, 2))
OPERATIONS = {
    "affine": partial(affine, shift=0.1, rotation=0.3, scale=0.2, shear=0.2),
    "noise": partial(noise, strength=0.3),
    "intensity": partial(intensity, brightness=0.2, contrast=0.3),
    "cutout": partial(cutout, size=0.4),
    "flip": partial(flip, axis="vertical"),
}


def test_warp_is_the_interpolation_of_scipy(x64):
    image = jax.random.uniform(KEY, (9, 9, 2), float)
    matrix, shift = jnp.array([[0.9, -0.3], [0.25, 1.1]]), jnp.array([0.13, -0.21])
    centre = np.array([4.0, 4.0])
    offset = centre - matrix @ centre + 4.5 * shift  # the same map in pixels
    for channel in range(2):
        expected = ndimage.affine_transform(
            np.pad(image[..., channel], 3), matrix, offset + 3 - matrix @ np.full(2, 3.0), order=1
        )[3:-3, 3:-3]
        np.testing.assert_allclose(warp(image, matrix, shift)[..., channel], expected, atol=1e-12)


def test_what_comes_from_beyond_the_picture_is_zero():
    ones = jnp.ones((5, 6, 1))
    moved = warp(ones, jnp.eye(2), jnp.array([0.8, 0.0]))[..., 0]  # two pixels of five
    np.testing.assert_allclose(moved, np.repeat([[1, 1, 1, 0, 0]], 6, 0).T, atol=1e-6)
    assert (warp(ones, jnp.eye(2), jnp.array([50.0, -50.0])) == 0).all()
    assert (warp(ones, 100 * jnp.eye(2), jnp.zeros(2)) == 0).all()  # between pixels that far there is none


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_keyed_and_keep_shape_and_type(name):
    operation = jax.jit(OPERATIONS[name])
    a, b, c = (operation(PICTURES, jax.random.key(seed)) for seed in (1, 1, 2))
    assert a.shape == PICTURES.shape and a.dtype == PICTURES.dtype
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)
    assert len({float(change) for change in jnp.abs(a - PICTURES).sum((1, 2, 3))}) > 1  # each its own
    keys = jax.random.split(KEY, 2)
    batched = jax.vmap(operation)(jnp.stack([PICTURES, PICTURES[::-1]]), keys)
    np.testing.assert_allclose(batched[1], operation(PICTURES[::-1], keys[1]), atol=1e-6)


@pytest.mark.parametrize(
    ("operation", "strengths"),
    [
        (affine, ("shift", "rotation", "scale", "shear")),
        (noise, ("strength",)),
        (intensity, ("brightness", "contrast")),
        (cutout, ("size",)),
    ],
)
def test_strength_zero_changes_nothing_and_derivatives_are_exact(x64, operation, strengths):
    pictures, weights = jnp.asarray(PICTURES, float), jax.random.normal(KEY, PICTURES.shape, float)

    @jax.jit
    def change(strengths):
        return jnp.vdot(weights, operation(pictures, jax.random.key(3), **strengths))

    nothing = operation(pictures, KEY, **dict.fromkeys(strengths, 0.0))
    np.testing.assert_allclose(nothing, pictures, atol=1e-12)
    some = {name: jnp.asarray(0.1 + 0.03 * i, float) for i, name in enumerate(strengths)}
    grads = jax.jit(jax.grad(change))(some)
    assert all(g != 0 for g in grads.values())
    assert_derivative(change, grads, some)


def test_strengths_are_standard_deviations():
    x = jnp.ones((4000, 3, 3, 1))
    np.testing.assert_allclose(noise(x, KEY, strength=0.3).std(), 0.3, rtol=0.02)
    ramp = jnp.broadcast_to(jnp.arange(32.0)[None, :, None, None], (4000, 32, 32, 1)) / 32
    moved = affine(ramp, KEY, shift=0.05)[:, 16, 16, 0] - ramp[:, 16, 16, 0]
    np.testing.assert_allclose(moved.std(), 0.05, rtol=0.06)
    bright = intensity(ramp, KEY, brightness=0.2).mean((1, 2, 3)) - ramp.mean((1, 2, 3))
    np.testing.assert_allclose(bright.std(), 0.2, rtol=0.06)
    spread = jnp.log(intensity(ramp, KEY, contrast=0.2).std((1, 2, 3)) / ramp.std((1, 2, 3)))
    np.testing.assert_allclose(spread.std(), 0.2, rtol=0.06)


def test_cutout_covers_its_square_and_nothing_else():
    changed_by = cutout(jnp.ones((500, 20, 20, 1)), KEY, size=0.3, value=5.0) - 1
    assert changed_by.min() == 0 and changed_by.max() == 4
    area = changed_by.sum((1, 2, 3)) / 4
    assert area.max() == pytest.approx(36, abs=0.1)  # 6 x 6 of 20 x 20, less at the border
    assert area.min() > 8


def test_flip_mirrors_as_often_as_it_says():
    x = jnp.broadcast_to(PICTURES[:1], (4000, 9, 7, 2))
    flipped = flip(x, KEY, probability=0.3)
    mirrored = (flipped == PICTURES[0, :, ::-1]).all((1, 2, 3))
    assert ((flipped == PICTURES[0]).all((1, 2, 3)) | mirrored).all()
    assert abs(mirrored.mean() - 0.3) < 0.03
    down = flip(PICTURES, KEY, probability=1.0, axis="vertical")
    np.testing.assert_array_equal(down, PICTURES[:, ::-1])


def test_compose_is_one_after_the_other_with_keys_of_their_own():
    both = compose(OPERATIONS["noise"], OPERATIONS["noise"])
    np.testing.assert_allclose((both(PICTURES, KEY) - PICTURES).std(), 0.3 * 2**0.5, rtol=0.1)
    np.testing.assert_array_equal(compose()(PICTURES, KEY), PICTURES)


@pytest.mark.parametrize(("support", "query"), [(True, False), (False, True), (True, True)])
def test_augmented_changes_what_it_is_told_to(support, query):
    pictures = bl.tasks.FewShot(PICTURES, jnp.arange(6) % 2, 2, 2, 1)
    task = jax.jit(augmented(pictures, OPERATIONS["noise"], support=support, query=query))(KEY)
    plain = jax.jit(pictures)(jax.random.split(KEY)[0])
    assert (not np.array_equal(task.support[0], plain.support[0])) == support
    assert (not np.array_equal(task.query[0], plain.query[0])) == query
    np.testing.assert_array_equal(task.support[1], plain.support[1])


def test_data_stay_an_argument_of_the_program():
    images = np.zeros((100, 28, 28), np.uint8)
    sample = bl.tasks.FewShot(images, np.arange(100) % 10, 5, 1, 1)
    sample = bl.tasks.batch(augmented(sample, OPERATIONS["noise"]), 4)
    text = jax.jit(lambda sample, key: sample(key)).lower(sample, KEY).as_text()
    assert "tensor<100x28x28x1xui8>" in text[text.index("@main") :].partition("->")[0]


def fixed(y, qy, x=None):
    """A sampler of one task, whatever the key."""
    y, qy = jnp.array(y), jnp.array(qy)
    shape = (*y.shape, 1)
    return lambda key: bl.Task((jnp.ones(shape) if x is None else x, y), (jnp.ones((*qy.shape, 1)), qy))


def test_relabeled_renames_support_and_query_alike():
    sample = jax.jit(relabeled(fixed([0, 1, 2, -1], [2, 2, 0, -1]), 3))
    names = set()
    for seed in range(60):
        task = sample(jax.random.key(seed))
        y, qy = task.support[1].tolist(), task.query[1].tolist()
        assert sorted(y) == [-1, 0, 1, 2] and y[3] == qy[3] == -1
        assert qy[:3] == [y[2], y[2], y[0]]
        names.add(tuple(y))
    assert len(names) == 6


def test_mislabeled_changes_as_many_as_it_says_and_no_query():
    y = np.tile(np.arange(5), 2000)
    task = mislabeled(fixed([*y, -1], y), 5, 0.3)(KEY)
    found = np.asarray(task.support[1])
    assert found[-1] == -1 and found[:-1].min() == 0 and found.max() == 4
    wrong = found[:-1] != y
    assert abs(wrong.mean() - 0.3) < 0.02
    counts = np.bincount((found[:-1] - y)[wrong] % 5, minlength=5)
    assert counts[0] == 0 and counts[1:].min() > 0.85 * counts[1:].mean()
    np.testing.assert_array_equal(task.query[1], y)


def test_targets_are_shifted_together():
    plain, task = sinusoid(jax.random.split(KEY)[0]), shifted_targets(sinusoid, 3.0)(KEY)
    shift = task.support[1] - plain.support[1]
    np.testing.assert_allclose(shift, shift[0, 0], atol=1e-5)
    np.testing.assert_allclose(task.query[1] - plain.query[1], shift, atol=1e-5)
    assert abs(shift[0, 0]) > 0.01


def test_mixed_classes_mix_a_class_by_one_weight():
    images = np.zeros((40, 20))
    labels = np.arange(40) % 20
    images[np.arange(40), labels] = 1.0  # a vector says which classes are in it, and how much
    task = jax.jit(mixed_classes(bl.tasks.FewShot(images, labels, 5, 1, 1)))(KEY)
    np.testing.assert_allclose(task.support[0], task.query[0])  # one weight a class, in both parts
    np.testing.assert_allclose(task.support[0].sum(1), 1.0, rtol=1e-6)
    assert ((task.support[0] > 0).sum(1) <= 2).all()
    weights = np.asarray(task.support[0]).max(1)
    assert len(set(weights.round(4))) > 1
    clash = jax.jit(mixed_classes(lambda key: fixed(jax.random.permutation(key, 3), [0, 1, 2])(key)))
    assert any(jnp.isnan(clash(jax.random.key(seed)).support[0]).any() for seed in range(5))


def test_metamix_mixes_queries_with_the_support_and_says_so_in_the_labels():
    x = jnp.eye(3)[jnp.array([0, 1, 2, 0])]  # the picture is the label, and the last one is padding
    sample = lambda key: bl.Task((x, jnp.array([0, 1, 2, -1])), (x[:3], jnp.array([0, 1, -1])))  # noqa: E731
    mix, partners = jax.jit(metamix(sample, 3)), set()
    for seed in range(30):
        mixed, labels = mix(jax.random.key(seed)).query
        np.testing.assert_allclose(mixed[:2], labels[:2], atol=1e-6)
        np.testing.assert_allclose(labels.sum(1), [1, 1, 0], atol=1e-6)
        assert labels[0, 0] >= 0.5 and labels[1, 1] >= 0.5
        partners.add(int(np.argsort(np.asarray(labels[0]))[-2]) if labels[0, 0] < 1 else 0)
    assert partners == {0, 1, 2}
    loss, metrics = bl.learners.cross_entropy(jnp.log(jnp.maximum(labels, 1e-6)), labels)
    assert jnp.isfinite(loss) and metrics["accuracy"] == 1


def test_a_learner_trains_on_augmented_tasks():
    pictures = bl.tasks.FewShot(PICTURES[..., :1], jnp.arange(6) % 3, 3, 1, 1)
    sample = augmented(metamix(pictures, 3), partial(affine, shift=0.1))
    mlp = bl.nets.mlp([63, 4, 3])
    net = bl.nets.Net(mlp.init, lambda params, x: mlp.apply(params, x.reshape(len(x), -1)))
    learner = bl.maml(net, bl.learners.cross_entropy)
    estimate = partial(bl.hypergradient, learner.problem, learner.solver, learner.estimator)
    h = jax.jit(lambda meta: estimate(meta, sample(KEY), KEY))(learner.init_meta(KEY))
    assert h.stats["finite"] == 1 and h.stats["zero_leaves"] == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: affine(jnp.ones((3, 4)), KEY), ValueError, r"\[n, height, width, channels\], got \(3, 4\)"),
        (lambda: noise(jnp.ones((3, 4), int), KEY, strength=1.0), TypeError, "expects floats, got int"),
        (lambda: flip(PICTURES, KEY, probability=2.0), ValueError, "must lie in 0..1, got 2.0"),
        (lambda: flip(PICTURES, KEY, axis="x"), ValueError, "horizontal or vertical, got 'x'"),
        (
            lambda: jax.grad(lambda p: flip(PICTURES, KEY, probability=p).sum())(0.5),
            TypeError,
            "Python number",
        ),
        (lambda: compose(3), TypeError, r"must be a function \(x, key\) -> x, got int"),
        (lambda: augmented(sinusoid), ValueError, "nothing to do"),
        (lambda: augmented(sinusoid, noise, support=False), ValueError, "nothing to do"),
        (lambda: changed(3, lambda task, key: task), TypeError, "sample must be a function, got int"),
        (lambda: relabeled(sinusoid, 1), ValueError, "ways must be a whole number of at least 2, got 1"),
        (lambda: mislabeled(sinusoid, 5, -0.1), ValueError, "must lie in 0..1, got -0.1"),
        (lambda: mixed_classes(sinusoid, 0.0), ValueError, "alpha must be above 0, got 0.0"),
        (lambda: metamix(sinusoid, 5, -1.0), ValueError, "alpha must be above 0, got -1.0"),
    ],
)
def test_mistakes_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
