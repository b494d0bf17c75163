"""The tasks of an outer step spread over devices: the same run, but for the order of its sums."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.sharding import Shard, tasks_mesh
from bilevel.testing import assert_trees_close

OPTIMIZER = optax.adam(1e-2)
LEARNER = bl.maml(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, rates=0.05, num_steps=2)


@pytest.fixture(autouse=True)
def two_devices():
    assert len(jax.devices()) == 2, "tests/conftest.py asks for two devices on the CPU"


def task(key):
    """In the test's precision: the last bits of a float32 sine are not the same in any two programs."""
    a, key = jax.random.split(key)
    x = jax.random.uniform(key, (20, 1), minval=-5.0, maxval=5.0)
    y = jnp.sin(x + jax.random.uniform(a))
    return bl.Task((x[:10], y[:10]), (x[10:], y[10:]))


def run(devices, num_tasks, *, learner=LEARNER, steps=7, sample=None, folder=None, **options):
    sample = sample or bl.tasks.batch(task, num_tasks)
    state = bl.init_state(learner, OPTIMIZER, sample, jax.random.key(0))
    rows = []
    options = bl.Options(chunk_size=3, devices=devices, **options)
    where = None if folder is None else bl.Run(folder, {}, (folder / "checkpoints").exists())
    state = bl.train(
        learner, OPTIMIZER, sample, state, steps, options=options, run=where,
        on_chunk=[lambda state, values: rows.append(values)],
    )  # fmt: skip
    return state, rows


def plain(state):
    parts = (state.meta, state.opt_state, state.estimator_state, state.step)
    is_key = lambda leaf: jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf) if is_key(leaf) else leaf), parts)


@pytest.mark.parametrize(("num_tasks", "chunk"), [(4, 2), (5, 1), (5, 3)])
def test_two_devices_compute_what_one_does(x64, num_tasks, chunk):
    one, rows = run(1, num_tasks)
    two, spread_rows = run(2, num_tasks, task_chunk=chunk)
    assert_trees_close("state", plain(two), plain(one), 1e-9)
    assert (
        int(two.step) == 7 and jax.random.key_data(one.key).tolist() == jax.random.key_data(two.key).tolist()
    )
    for row, spread in zip(rows, spread_rows, strict=True):
        for name in set(row) - {"steps_per_second"}:
            assert np.isclose(row[name], spread[name], rtol=1e-9), name


def test_a_sampler_of_any_kind_gives_each_device_its_own_tasks(x64):
    def sample(key):  # no pytree, no rows
        return jax.vmap(task)(jax.random.split(key, 5))

    assert_trees_close("meta", run(2, 5, sample=sample)[0].meta, run(1, 5, sample=sample)[0].meta, 1e-9)


@pytest.mark.filterwarnings("ignore::bilevel.HypergradientWarning")
def test_the_state_of_an_estimator_stays_with_its_tasks(x64):
    solver = bl.inner.Gradient(optax.sgd(0.05), 4)
    estimator = bl.hypergrad.PES(sigma=0.1, num_pairs=2, truncation=2)
    learner = bl.Learner(LEARNER.problem, solver, estimator, LEARNER.init_meta)
    one, two = (run(devices, 4, learner=learner)[0] for devices in (1, 2))
    assert jax.tree.leaves(one.estimator_state)
    assert_trees_close("state", plain(two)[:3], plain(one)[:3], 1e-9)
    with pytest.raises(ValueError, match="devices=2 divides, got 5"):
        run(2, 5, learner=learner)


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    whole, _ = run(2, 5, steps=9)
    run(2, 5, steps=6, folder=tmp_path)
    resumed, _ = run(2, 5, steps=9, folder=tmp_path)
    for a, b in zip(jax.tree.leaves(plain(whole)), jax.tree.leaves(plain(resumed)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_comes_back_lies_on_one_device():
    state, _ = run(2, 4)
    assert {d for leaf in jax.tree.leaves(state) for d in leaf.devices()} == {jax.devices()[0]}


def test_a_step_that_is_not_finite_is_not_taken():
    def sample(key):
        task = jax.vmap(bl.tasks.sinusoid)(jax.random.split(key, 4))
        x, y = task.query
        return task._replace(query=(x, y.at[3].set(jnp.where(jax.random.uniform(key) < 0.2, jnp.nan, 1.0))))

    complaints = []
    for devices in (1, 2):
        with pytest.raises(bl.HypergradientError) as found:
            run(devices, 4, sample=sample, steps=100)
        complaints.append(str(found.value))
    assert complaints[0] == complaints[1] and "is not finite" in complaints[0]


def test_rows_cover_every_task_once():
    for devices, count in ((2, 5), (2, 4), (3, 7), (4, 5)):
        shard = Shard(devices, count)
        found, mask = jax.vmap(lambda _, s=shard: s.rows(), axis_name="tasks")(jnp.arange(devices))
        counted = found.ravel() if mask is None else found.ravel()[mask.ravel()]
        assert sorted(counted.tolist()) == list(range(count))


def test_too_many_devices_are_refused():
    with pytest.raises(ValueError, match=r"devices=3, but JAX sees 2 \(cpu\); call jax.config.update"):
        tasks_mesh(3)
    with pytest.raises(ValueError, match="devices must be at least 1"):
        bl.Options(devices=0)
    with pytest.raises(ValueError, match="devices=2 for the 1 tasks"):
        run(2, 1)


def test_a_batch_draws_single_rows_as_it_draws_all():
    sample = bl.tasks.batch(partial(bl.tasks.sinusoid, shots=3), 4)
    key, rows = jax.random.key(3), jnp.array([2, 0])
    some, whole = sample.rows(key, rows), sample(key)
    assert_trees_close("task", some, jax.tree.map(lambda leaf: leaf[rows], whole), 1e-7)
