"""Harmonics, Gaussian processes and image completion: determinism, ranges and distributions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.tasks.gaussian_process import KERNELS, GaussianProcess, covariance
from bilevel.tasks.harmonics import harmonics
from bilevel.tasks.image_completion import ImageCompletion

KEY = jax.random.key(0)


def draw(sample, num_tasks, seed=0):
    return jax.tree.map(np.asarray, jax.jit(bl.tasks.batch(sample, num_tasks))(jax.random.key(seed)))


@pytest.mark.parametrize("sample", [harmonics, GaussianProcess(), ImageCompletion(shots=5, queries=9)])
def test_same_key_same_task(sample):
    sample = jax.jit(bl.tasks.batch(sample, 2))
    a, b, c = sample(jax.random.key(1)), sample(jax.random.key(1)), sample(jax.random.key(2))
    np.testing.assert_array_equal(a.support[1], b.support[1])
    assert not np.array_equal(a.support[1], c.support[1])
    assert a.support[0].dtype == a.query[1].dtype == np.float32


def test_a_harmonic_is_two_waves_one_twice_as_fast():
    tasks = draw(partial(harmonics, shots=30, queries=30, noise=0.0), 8)
    for x, y in zip(tasks.support[0], tasks.support[1], strict=True):
        errors = []
        for omega in np.linspace(5, 7, 801):  # least squares in the heights and phases
            waves = [f(k * omega * x[:, 0]) for k in (1, 2) for f in (np.sin, np.cos)]
            basis = np.stack(waves, 1).astype(np.float64)
            errors.append(np.abs(basis @ np.linalg.lstsq(basis, y[:, 0], rcond=None)[0] - y[:, 0]).max())
        assert min(errors) < 0.1 * np.median(errors)  # only its own frequency fits


def test_harmonics_have_the_published_moments():
    tasks = draw(partial(harmonics, shots=20, queries=20, noise=0.0), 4000)
    x, y = tasks.support
    centres = x.mean((1, 2))
    assert abs(centres.std() - np.sqrt(64 / 12 + 1 / 20)) < 0.1 and np.abs(centres).max() < 5.2
    np.testing.assert_allclose(x.std(1, ddof=1).mean(), 1.0, atol=0.05)
    np.testing.assert_allclose(np.var(y), 1.0, atol=0.08)  # E a1² / 2 + E a2² / 2
    noisy = draw(partial(harmonics, shots=20, queries=20, noise=0.3), 4000)
    np.testing.assert_allclose(np.std(noisy.support[1] - y), 0.3, atol=0.01)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_process_has_its_covariance(kernel):
    sample = GaussianProcess(kernel, 1, 1, (0.5, 0.5), (2.0, 2.0), (1.3, 1.3), noise=0.0)
    tasks = draw(sample, 40_000)
    a, b = tasks.support[0][:, 0, 0], tasks.query[0][:, 0, 0]
    product = tasks.support[1][:, 0, 0] * tasks.query[1][:, 0, 0]
    np.testing.assert_allclose(np.var(tasks.support[1]), 4.0, rtol=0.05)
    order = np.argsort(np.abs(a - b))
    for chosen in np.array_split(order, 20):
        r = np.abs(a - b)[chosen] / 0.5
        expected = {  # by hand
            "rbf": np.exp(-(r**2) / 2),
            "matern12": np.exp(-r),
            "matern32": (1 + np.sqrt(3) * r) * np.exp(-np.sqrt(3) * r),
            "matern52": (1 + np.sqrt(5) * r + 5 * r**2 / 3) * np.exp(-np.sqrt(5) * r),
            "periodic": np.exp(-2 * np.sin(np.pi * (a - b)[chosen] / 1.3) ** 2 / 0.5**2),
        }[kernel]
        assert abs(product[chosen].mean() - 4 * expected.mean()) < 0.65  # five standard errors


@pytest.mark.parametrize("kernel", KERNELS)
def test_draws_are_finite_in_float32_where_points_crowd(kernel):
    sample = GaussianProcess(kernel, 100, 100, (0.1, 3.0), noise=0.0)
    assert np.isfinite(draw(sample, 20).query[1]).all()


def test_distances_count_all_dimensions():
    a = jnp.array([[0.0, 0.0]])
    b = jnp.array([[3.0, 4.0]])
    np.testing.assert_allclose(covariance("matern12", a, b, jnp.float32(2.0)), np.exp(-2.5), rtol=1e-6)
    assert GaussianProcess(dimensions=3)(KEY).support[0].shape == (10, 3)


def test_noise_is_of_its_size_and_not_shared():
    calm = draw(GaussianProcess(noise=0.0), 2000)
    noisy = draw(GaussianProcess(noise=0.5), 2000)
    for part in ("support", "query"):
        noise = getattr(noisy, part)[1] - getattr(calm, part)[1]
        np.testing.assert_allclose(noise.std(), 0.5, atol=0.01)
        assert abs(np.mean(noise[:, 0] * noise[:, 1])) < 0.03


@pytest.mark.parametrize(("query", "queries"), [("others", None), ("others", 7), ("all", None), ("all", 7)])
def test_pixels_are_those_of_the_picture(query, queries):
    images = np.random.default_rng(0).permutation(6 * 5 * 4 * 1).reshape(6, 5, 4).astype(np.uint8)
    sample = ImageCompletion(images, shots=6, query=query, queries=queries)
    tasks = draw(sample, 60)
    assert tasks.query[0].shape[1] == (queries or (14 if query == "others" else 20))
    owner = {int(v): i for i, image in enumerate(images) for v in image.ravel()}
    for i in range(60):
        pictures, seen = set(), []
        for x, y in ((tasks.support[0][i], tasks.support[1][i]), (tasks.query[0][i], tasks.query[1][i])):
            values = np.rint(255 * y[:, 0]).astype(int)
            rows = np.rint((x[:, 0] + 1) / 2 * 5 - 0.5).astype(int)
            columns = np.rint((x[:, 1] + 1) / 2 * 4 - 0.5).astype(int)
            pictures |= {owner[v] for v in values}
            (picture,) = pictures
            np.testing.assert_array_equal(images[picture][rows, columns], values)
            assert len(set(values)) == len(values)  # no pixel twice
            seen.append(set(values))
        if query == "others":
            assert not seen[0] & seen[1]
        if query == "all" and queries is None:
            assert len(seen[1]) == 20


def test_every_pixel_and_picture_is_drawn_equally_often():
    images = np.arange(24, dtype=np.uint8).reshape(3, 4, 2)
    values = np.rint(255 * draw(ImageCompletion(images, shots=2, queries=1), 6000).support[1]).astype(int)
    counts = np.bincount(values.ravel(), minlength=24)
    assert np.sum((counts - 500) ** 2 / 500) < 50  # 23 degrees of freedom, p = 0.001


def test_glyphs_are_drawn_when_there_are_no_pictures():
    tasks = draw(ImageCompletion(shots=20, query="all"), 3)
    y = tasks.query[1]
    assert y.shape == (3, 784, 1) and y.min() == 0 and y.max() == 1


def test_pictures_are_an_argument_and_colours_stay():
    images = np.random.default_rng(0).random((10, 6, 6, 3)).astype(np.float32)
    sample = ImageCompletion(images, shots=4)
    text = jax.jit(lambda sample, key: sample(key)).lower(sample, KEY).as_text()
    assert "tensor<10x6x6x3xf32>" in text[text.index("@main") :].partition("->")[0]
    assert draw(sample, 2).query[1].shape == (2, 32, 3)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: harmonics(KEY, shots=0), ValueError, "shots must be a whole number of at least 1, got 0"),
        (lambda: harmonics(KEY, noise=-1.0), ValueError, "noise must be at least 0, got -1.0"),
        (lambda: harmonics(KEY, frequency=(7, 5)), ValueError, r"frequency must be .* got \(7, 5\)"),
        (lambda: GaussianProcess("rbf2"), ValueError, "kernel must be one of rbf, .* got 'rbf2'"),
        (lambda: GaussianProcess(queries=0), ValueError, "queries must be a whole number"),
        (lambda: GaussianProcess(length_scale=(0.0, 1.0)), ValueError, "length_scale must be"),
        (lambda: GaussianProcess(noise=-0.1), ValueError, "noise must be at least 0"),
        (lambda: ImageCompletion(shots=784), ValueError, "some of the 784 pixels, got 784"),
        (lambda: ImageCompletion(shots=700, queries=85), ValueError, "at most the 84 pixels"),
        (lambda: ImageCompletion(query="rest"), ValueError, "query must be others or all, got 'rest'"),
        (lambda: ImageCompletion(split="tests"), ValueError, "split must be one of"),
        (lambda: ImageCompletion(np.zeros((4, 4))), ValueError, r"\[N, H, W\] or \[N, H, W, C\]"),
        (lambda: ImageCompletion(np.full((1, 4, 4), np.nan)), ValueError, "finite"),
        (lambda: ImageCompletion(np.full((1, 4, 4), 300)), ValueError, "0..255, got 300..300"),
        (lambda: ImageCompletion(np.full((1, 4, 4), "a")), TypeError, "integers or floats"),
    ],
)
def test_mistakes_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
