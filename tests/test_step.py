"""One outer step: the mean over tasks, its chunks, and a state from which a run goes on exactly."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad import MultiStep
from bilevel.testing import assert_close, assert_trees_close
from bilevel.train.step import mean_hypergradient

KEY = jax.random.key(0)
NUM_TASKS = 6
SAMPLE = bl.tasks.batch(lambda key: bl.tasks.sinusoid(key, shots=4, queries=3), NUM_TASKS)
LEARNER = bl.maml(bl.nets.mlp([1, 5, 1]), bl.learners.mean_squared_error, num_steps=2, rates=0.01)


def noisy():
    """A problem whose losses draw from their key: who gets which key shows in the result."""
    problem = LEARNER.problem

    def loss(params, meta, batch, key):
        noise = jax.random.normal(key, (5,))
        return problem.inner_loss(params, meta, batch, key) + params["head"]["w"][:, 0] @ noise

    return replace(LEARNER, problem=replace(problem, inner_loss=loss, outer_loss=loss))


def start(learner, optimizer, key=KEY):
    return bl.init_state(learner, optimizer, SAMPLE, key)


@pytest.mark.parametrize("task_chunk", [1, 2, NUM_TASKS])
def test_mean_hypergradient_is_the_mean(x64, task_chunk):
    learner = replace(noisy(), estimator=MultiStep(num_annealing_steps=5))
    meta, tasks = learner.init_meta(KEY), SAMPLE(jax.random.key(1))
    counts = jnp.arange(NUM_TASKS, dtype=jnp.int32)  # each task slot has its own state
    h, states = jax.jit(lambda meta: mean_hypergradient(learner, meta, tasks, counts, KEY, task_chunk))(meta)

    def one(task, count, key):
        return learner.estimator.estimate(learner.problem, learner.solver, meta, task, count, key)[0]

    one = jax.jit(one)
    keys = jax.random.split(KEY, NUM_TASKS)
    single = [
        one(jax.tree.map(lambda leaf, i=i: leaf[i], tasks), counts[i], keys[i]) for i in range(NUM_TASKS)
    ]
    mean = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *single)
    assert_close("value", h.value, mean.value, 1e-12)
    assert_trees_close("grad", h.grad, mean.grad, 1e-12)
    assert_trees_close("stats", h.stats, mean.stats, 1e-12)
    np.testing.assert_array_equal(states, counts + 1)


@pytest.mark.parametrize("task_chunk", [0, -1, 4, 7])
def test_task_chunk_must_divide_the_tasks(task_chunk):
    meta = LEARNER.init_meta(KEY)
    with pytest.raises(ValueError, match=f"divide the 6 tasks of a batch, got {task_chunk}"):
        mean_hypergradient(LEARNER, meta, SAMPLE(KEY), (), KEY, task_chunk)


@pytest.mark.parametrize(
    "tasks",
    [
        bl.Task(jnp.ones((3, 1)), jnp.ones((2, 1))),
        bl.Task(jnp.ones((3, 1)), jnp.ones(())),
        bl.Task(jnp.ones(()), jnp.ones(())),
        bl.Task(None, None),
    ],
)
def test_tasks_must_share_a_leading_axis(tasks):
    with pytest.raises(ValueError, match=r"same leading \[num_tasks\] axis.*bl\.tasks\.batch"):
        mean_hypergradient(LEARNER, LEARNER.init_meta(KEY), tasks, (), KEY)


def test_meta_step_is_the_optimizer_on_the_mean():
    optimizer = optax.adam(1e-2)
    state, tasks = start(LEARNER, optimizer), SAMPLE(jax.random.key(1))
    after, metrics = jax.jit(lambda s, t: bl.meta_step(LEARNER, optimizer, s, t))(state, tasks)
    key = jax.random.fold_in(state.key, 0)
    h, _ = jax.jit(lambda meta: mean_hypergradient(LEARNER, meta, tasks, state.estimator_state, key))(
        state.meta
    )
    updates, _ = optimizer.update(h.grad, state.opt_state, state.meta)
    assert_trees_close("meta", after.meta, optax.apply_updates(state.meta, updates), 1e-4)
    assert_close("loss", metrics.scalars["outer_loss"], h.value, 1e-5)
    assert_close("norm", metrics.scalars["grad_norm"], optax.tree.norm(h.grad), 1e-5)
    assert after.step == 1 and metrics.nonzero.all() and metrics.finite.all()
    assert metrics.finite.shape == (len(jax.tree.leaves(state.meta)) + 1,)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [jnp.result_type(a) for a in jax.tree.leaves(after)] == [
        jnp.result_type(a) for a in jax.tree.leaves(state)
    ]


def compiled(learner, optimizer):
    return jax.jit(lambda s: bl.meta_step(learner, optimizer, s, SAMPLE(jax.random.fold_in(KEY, s.step))))


def run(state, step, num_steps):
    for _ in range(num_steps):
        state, _ = step(state)
    return state


def assert_same(a, b):
    a, b = (s._replace(key=jax.random.key_data(s.key)) for s in (a, b))
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_state_is_all_that_is_needed_to_go_on():
    learner, optimizer = replace(noisy(), estimator=MultiStep(num_annealing_steps=3)), optax.adam(1e-2)
    step = compiled(learner, optimizer)
    whole = run(start(learner, optimizer), step, 4)
    half = run(start(learner, optimizer), step, 2)
    # Through plain arrays, as from a file, and into a step compiled anew.
    data = jax.tree.map(np.asarray, half._replace(key=jax.random.key_data(half.key)))
    restored = jax.tree.map(jnp.asarray, data)
    restored = restored._replace(key=jax.random.wrap_key_data(restored.key))
    assert_same(run(restored, compiled(learner, optimizer), 2), whole)
    np.testing.assert_array_equal(whole.estimator_state, np.full(NUM_TASKS, 4))
    other = run(start(learner, optimizer, jax.random.key(9)), step, 1)
    first = run(start(learner, optimizer), step, 1)
    assert np.any(jax.tree.leaves(other.meta)[1] != jax.tree.leaves(first.meta)[1])


def test_randomness_moves_with_the_step():
    """The same tasks at another step draw other noise."""
    learner, optimizer = noisy(), optax.sgd(0.0)
    state, tasks = start(learner, optimizer), SAMPLE(jax.random.key(1))
    step = jax.jit(lambda s: bl.meta_step(learner, optimizer, s, tasks))
    after, first = step(state)
    _, second = step(after)
    _, again = step(state)
    assert first.scalars["outer_loss"] == again.scalars["outer_loss"]
    assert first.scalars["outer_loss"] != second.scalars["outer_loss"]


def test_metrics_show_what_is_zero_and_what_is_not_finite():
    problem = bl.Problem(
        init=lambda meta, key: meta["init"],
        inner_loss=lambda params, meta, batch, key: params * jnp.sum(batch),
        outer_loss=lambda params, meta, batch, key: params * jnp.log(meta["log"]),
    )
    learner = bl.Learner(problem, bl.inner.Gradient(optax.sgd(0.1), 1), bl.hypergrad.Mixed())
    meta = {"init": 1.0, "log": 0.0, "unused": jnp.ones(2)}
    tasks = bl.Task(jnp.ones((2, 1)), jnp.ones((2, 1)))
    optimizer = optax.sgd(0.1)
    state = bl.init_state(learner, optimizer, lambda key: tasks, KEY, meta)
    _, metrics = bl.meta_step(learner, optimizer, state, tasks)
    assert metrics.nonzero.tolist() == [True, True, False]
    assert metrics.finite.tolist() == [False, False, True, False]


def test_a_start_is_needed():
    learner = replace(LEARNER, init_meta=None)
    with pytest.raises(ValueError, match=r"no init_meta.*pass meta="):
        bl.init_state(learner, optax.sgd(0.1), SAMPLE, KEY)
    meta = LEARNER.init_meta(KEY)
    state = bl.init_state(learner, optax.sgd(0.1), SAMPLE, KEY, meta)
    assert_trees_close("meta", state.meta, meta, 0.0)


def test_a_start_of_python_numbers_is_compiled_once():
    problem = bl.Problem(
        lambda meta, key: jnp.zeros(2),
        lambda params, meta, batch, key: jnp.sum((params - jnp.exp(meta)) ** 2),
        lambda params, meta, batch, key: jnp.sum((params - 1) ** 2),
    )
    learner = bl.Learner(problem, bl.inner.Gradient(optax.sgd(0.1), 2), bl.hypergrad.Unroll())
    sample = bl.tasks.batch(bl.tasks.sinusoid, 2)
    state = bl.init_state(learner, optax.adam(0.1), sample, KEY, jnp.full(2, jnp.log(0.5)))  # a weak type
    traced = []

    @jax.jit
    def step(state, tasks):
        traced.append(None)
        return bl.meta_step(learner, optax.adam(0.1), state, tasks)[0]

    for _ in range(3):
        state = step(state, sample(KEY))
    assert len(traced) == 1


def test_a_meta_without_arrays_is_refused():
    problem = bl.Problem(lambda meta, key: jnp.zeros(2), *[lambda params, *rest: jnp.sum(params**2)] * 2)
    solver = bl.inner.Gradient(optax.sgd(0.1), 1)
    with pytest.raises(ValueError, match=r"meta has no arrays in it, so there is nothing to learn; got \{\}"):
        bl.hypergradient(problem, solver, bl.hypergrad.Mixed(), {}, bl.Task(None, None), jax.random.key(0))
