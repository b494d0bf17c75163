import jax
import numpy as np
import pytest

from bilevel.tasks import batch, choose, classification, sinusoid


@pytest.mark.parametrize(("total", "count"), [(1, 1), (6, 3), (6, 6), (100_000, 5)])
def test_choose_draws_different_integers_in_range(total, count):
    draws = jax.vmap(lambda key: choose(key, total, count))(jax.random.split(jax.random.key(0), 50))
    assert draws.shape == (50, count) and draws.dtype == np.int32
    assert draws.min() >= 0 and draws.max() < total
    assert all(len(set(row)) == count for row in draws.tolist())


def test_choose_makes_every_ordered_draw_equally_likely():
    num_draws = 60_000
    keys = jax.random.split(jax.random.key(1), num_draws)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: choose(key, 5, 3)))(keys))
    _, counts = np.unique(draws @ [25, 5, 1], return_counts=True)
    assert len(counts) == 5 * 4 * 3
    expected = num_draws / 60
    chi_square = np.sum((counts - expected) ** 2 / expected)
    assert chi_square < 110  # 59 degrees of freedom: exceeded once in 20 000 fair tries


def test_choose_takes_a_traced_total():
    traced = jax.jit(lambda key, total: choose(key, total, 4))
    key = jax.random.key(3)
    np.testing.assert_array_equal(traced(key, 9), choose(key, 9, 4))


def test_classification_labels_rows_and_keeps_the_order():
    examples = np.arange(2 * 3).reshape(2, 3, 1)
    task = classification(jax.numpy.asarray(examples), shots=1)
    assert task.support[0].ravel().tolist() == [0, 3] and task.support[1].tolist() == [0, 1]
    assert task.query[0].ravel().tolist() == [1, 2, 4, 5]
    assert task.query[1].tolist() == [0, 0, 1, 1]


def test_batch_stacks_different_tasks_and_passes_through_jit():
    sample_tasks = batch(sinusoid, 4)
    key = jax.random.key(0)
    tasks = jax.jit(lambda sample, key: sample(key))(sample_tasks, key)
    plain = sample_tasks(key)
    np.testing.assert_allclose(tasks.query[0], plain.query[0], rtol=1e-6)
    # Up to 5 in float32: near its zeros a sine has no more than these digits, in any two programs.
    np.testing.assert_allclose(tasks.query[1], plain.query[1], rtol=1e-6, atol=1e-6)
    assert len(np.unique(tasks.support[0][:, 0])) == 4


def test_batch_of_one_sampler_compiles_once():
    traces = []

    @jax.jit
    def first(sample, key):
        traces.append(1)
        return sample(key)

    for seed in range(3):
        first(batch(sinusoid, 2), jax.random.key(seed))
    assert len(traces) == 1


def test_batch_refuses_what_it_cannot_sample():
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        batch(sinusoid, 0)
    with pytest.raises(TypeError, match="function of a key, got int"):
        batch(3, 2)


def test_sinusoid_is_one_wave_of_the_stated_ranges():
    keys = jax.random.split(jax.random.key(0), 300)
    tasks = jax.vmap(lambda key: sinusoid(key, 20, 30))(keys)
    assert tasks.support[0].shape == (300, 20, 1) and tasks.query[1].shape == (300, 30, 1)
    amplitudes = []
    for i in range(300):
        x = np.concatenate([tasks.support[0][i, :, 0], tasks.query[0][i, :, 0]])
        y = np.concatenate([tasks.support[1][i, :, 0], tasks.query[1][i, :, 0]])
        assert np.abs(x).max() <= 5
        # a sin(x - phase) is linear in sin x and cos x
        basis = np.stack([np.sin(x), -np.cos(x)], axis=1).astype(np.float64)
        (c, s), *_ = np.linalg.lstsq(basis, y, rcond=None)
        np.testing.assert_allclose(basis @ [c, s], y, atol=1e-4)
        assert -1e-4 <= np.arctan2(s, c) <= np.pi + 1e-4
        amplitudes.append(np.hypot(c, s))
    assert 0.099 <= min(amplitudes) < 0.5 and 4.5 < max(amplitudes) <= 5.001


def test_sinusoid_refuses_empty_sets():
    with pytest.raises(ValueError, match="shots must be at least 1, got 0"):
        sinusoid(jax.random.key(0), shots=0)
    with pytest.raises(ValueError, match="queries must be at least 1, got 0"):
        sinusoid(jax.random.key(0), queries=0)
