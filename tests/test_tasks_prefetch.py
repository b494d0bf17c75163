"""Tasks made on the host: the same bits whether they were made ahead of time, resumed or not."""

import re
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.tasks.prefetch import HostFewShot, HostTasks, hosted
from bilevel.tasks.storing import Examples, write_stored

SHOTS, QUERIES = 2, 3


def pictures():
    """24 square pictures of 4 classes of 6; the first pixel of each says which it is."""
    images = np.random.default_rng(0).integers(0, 256, (24, 5, 5, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(24)
    return images, np.repeat(np.arange(4), 6)


def few_shot(ways=3, rotations=False):
    return HostFewShot(*pictures(), ways, SHOTS, QUERIES, rotations)


def assert_equal(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_a_task_has_distinct_examples_of_distinct_classes():
    for seed in range(20):
        task = few_shot()(np.random.default_rng(seed))
        x = np.concatenate([task.support[0], task.query[0]])
        y = np.concatenate([task.support[1], task.query[1]])
        which = x[:, 0, 0, 0]
        assert len(set(which)) == len(which) == 3 * (SHOTS + QUERIES)
        for way in range(3):
            assert (y == way).sum() == SHOTS + QUERIES
            assert len({n // 6 for n in which[y == way]}) == 1
        assert len({n // 6 for n in which}) == 3
        images, _ = pictures()
        np.testing.assert_array_equal(x, images[which])


def test_every_class_and_example_is_drawn():
    rng, seen = np.random.default_rng(0), np.zeros(24, int)
    for _ in range(300):
        seen[few_shot()(rng).support[0][:, 0, 0, 0]] += 1
    expected = 300 * 3 * SHOTS / 24
    assert (abs(seen - expected) < 5 * expected**0.5).all()


def test_rotated_classes_are_classes_of_their_own():
    images, _ = pictures()
    turned = {np.rot90(image, k).tobytes(): (i // 6, k) for i, image in enumerate(images) for k in range(4)}
    task = few_shot(ways=16, rotations=True)(np.random.default_rng(0))
    classes = [{turned[x.tobytes()] for x in task.query[0][task.query[1] == way]} for way in range(16)]
    assert all(len(c) == 1 for c in classes) and len(set.union(*classes)) == 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 5}, "ways must be at most the 4 classes, got 5"),
        ({"shots": 4}, r"got 4 \+ 3, but class 0 has 6"),
        ({"queries": 0}, "queries must be at least 1"),
        ({"images": np.zeros((24, 5, 4, 1), np.uint8), "rotations": True}, "rotations need square pictures"),
        ({"labels": np.arange(24) % 4}, "labels must ascend"),
        ({"labels": np.arange(3)}, "labels"),
        ({"images": np.zeros((24, 5, 5, 1), np.float32)}, "images must be uint8, got float32"),
    ],
)
def test_wrong_settings_are_told(change, message):
    images, labels = pictures()
    fields = {"images": images, "labels": labels, "ways": 3, "shots": SHOTS, "queries": QUERIES} | change
    with pytest.raises((ValueError, TypeError), match=message):
        HostFewShot(**fields)


def test_batches_depend_on_the_key_alone():
    sample = HostTasks(few_shot(), num_tasks=4)
    key = jax.random.key(3)
    once, again = jax.jit(sample)(key), jax.jit(lambda key: sample(key))(key)
    assert once.support[0].shape == (4, 6, 5, 5, 1) and once.support[0].dtype == jnp.float32
    assert once.support[1].dtype == jnp.int32
    assert_equal(once, again)
    other = sample(jax.random.key(4))
    assert not np.array_equal(once.support[0], other.support[0])
    tasks = np.asarray(once.support[0])
    assert len({t.tobytes() for t in tasks}) == 4  # the tasks of a batch differ
    np.testing.assert_allclose(np.rint(255 * tasks) / 255, tasks, rtol=1e-6)
    rows = jnp.array([2, 0])
    assert_equal(jax.tree.map(lambda x: x[rows], once), jax.jit(sample.rows)(key, rows))


def test_vmapped_equals_looped():
    sample = HostTasks(few_shot())
    keys = jax.random.split(jax.random.key(0), 3)
    looped = jax.tree.map(lambda *x: jnp.stack(x), *map(sample, keys))
    assert_equal(jax.vmap(sample)(keys), looped)
    assert_equal(bl.tasks.batch(sample, 3)(jax.random.key(0)), looped)


def parts(sample):
    net = bl.nets.mlp([25, 8, 3])
    flat = bl.nets.Net(net.init, lambda params, x: net.apply(params, x.reshape(len(x), -1)))
    learner = bl.maml(flat, bl.learners.cross_entropy, rates=0.1, num_steps=1)
    optimizer = optax.adam(1e-2)
    return learner, optimizer, bl.init_state(learner, optimizer, sample, jax.random.key(0))


def test_training_ahead_of_time_and_resumed_is_bit_equal():
    pytest.importorskip("grain")
    sample, options = HostTasks(few_shot(), num_tasks=2), bl.Options(chunk_size=4)
    learner, optimizer, start = parts(sample)
    made = []

    def run(sampler, state, steps):
        watch = [lambda state, values: made.append(sample._coming._next)]
        return bl.train(learner, optimizer, sampler, state, steps, options=options, on_chunk=watch)

    waited = run(lambda key: sample(key), start, 11)  # nothing is expected of a plain function
    assert made[-1] == 0
    whole = run(sample, start, 11)
    assert made[-1] == 11  # all of them were made ahead
    resumed = run(sample, run(sample, start, 5), 11)
    assert made[-1] == 6
    assert_equal(whole, waited)
    assert_equal(resumed, whole)


def test_keys_that_were_not_expected_change_nothing():
    pytest.importorskip("grain")
    sample = HostTasks(few_shot(), num_tasks=2)
    keys = jax.random.split(jax.random.key(0), 6)
    plain = [sample(key) for key in keys]
    with sample.expecting(keys):
        for i in (0, 0, 1, 3, 2, 0, 3, 4, 5):  # repeated, out of order, and skipped
            assert_equal(sample(keys[i]), plain[i])


def test_batches_are_made_while_the_program_works():
    pytest.importorskip("grain")
    inner, made = few_shot(), []

    def slow(rng):
        made.append(threading.current_thread())
        time.sleep(0.02)
        return inner(rng)

    sample = HostTasks(slow, num_tasks=1, threads=2, ahead=3)
    keys = jax.random.split(jax.random.key(0), 30)
    with sample.expecting(keys):
        sample(keys[0])
        time.sleep(0.2)
        before = len(made)
        assert 3 <= before - 2 <= 7  # the first, and those that may wait
        begin = time.perf_counter()
        sample(keys[1])
        assert time.perf_counter() - begin < 0.02
    assert threading.main_thread() not in made[1:]  # the first is the one that told the shapes
    after = len(made)
    time.sleep(0.1)
    assert len(made) <= after + 3  # and it ends


def test_errors_of_draw_come_through():
    calls = []

    def draw(rng):
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("the disk is gone")
        return few_shot()(rng)

    with pytest.raises(Exception, match="the disk is gone"):
        HostTasks(draw, num_tasks=2)(jax.random.key(0))


@pytest.mark.parametrize(("num_tasks", "drawn"), [(None, [2, 3]), (2, [2, 3, 3]), (2, [2, 2, 3])])
def test_changing_shapes_are_told(num_tasks, drawn):
    sizes = iter(drawn)

    def draw(rng):
        x = np.zeros((next(sizes), 1), np.float32)
        return bl.Task((x, x), (x, x))

    with pytest.raises(Exception, match="draw must give the same shapes every time"):
        HostTasks(draw, num_tasks)(jax.random.key(0))


@pytest.mark.parametrize(("name", "value"), [("num_tasks", 0), ("threads", 0), ("ahead", 0)])
def test_wrong_numbers_are_told(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        HostTasks(few_shot(), **{name: value})


def test_the_example_of_the_documentation_runs():
    text = (Path(__file__).parent.parent / "docs" / "data.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1], names)
    assert names["sample"](jax.random.key(0)).query[0].shape == (8, 10, 3)


def test_evaluation_works(tmp_path):
    images, labels = pictures()
    examples = Examples(labels, list("abcd"), ["test"] * 4, lambda i: images[i], "a test")
    write_stored(tmp_path / "set", examples)
    sample = hosted("test", 3, SHOTS, QUERIES, tmp_path / "set")
    assert isinstance(sample.draw.images, np.memmap)  # type: ignore[attr-defined]
    learner, _, state = parts(hosted("test", 3, SHOTS, QUERIES, tmp_path / "set", num_tasks=2))
    result = bl.evaluate(learner, state.meta, sample, jax.random.key(1), num_tasks=4, num_steps=1)
    assert result.curves["query_loss"].mean.shape == (2,)
