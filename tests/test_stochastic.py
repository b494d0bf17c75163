"""Single-loop stochastic estimators: exact where they settle, unbiased, as noisy as theory predicts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bilevel_references import REFERENCES, as_arrays, floats, last, repeat, ridge, weighted
from single_loop_tools import FIVE, IMPLICIT, NAMES, ONE, STEPPING, settled

import bilevel as bl
from bilevel.hypergrad.first_order.bome import Bome
from bilevel.hypergrad.single_loop.amigo import AmIGO
from bilevel.hypergrad.single_loop.f2sa import F2sa
from bilevel.hypergrad.single_loop.ma_soba import MaSoba
from bilevel.hypergrad.single_loop.saba import Saba
from bilevel.hypergrad.single_loop.soba import Soba
from bilevel.hypergrad.single_loop.stocbio import StocBiO
from bilevel.testing import assert_close, assert_trees_close

# A single call from a fresh state is doubted, as it should be: the tests that mean it look at `doubts`.
pytestmark = pytest.mark.filterwarnings("ignore::bilevel.hypergrad.doubts.HypergradientWarning")


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        (name, reference)
        for name in IMPLICIT
        for reference in REFERENCES
        if name in NAMES or reference == "weighted"
    ],
)
def test_full_batches_settle_at_the_implicit_hypergradient(x64, name, reference):
    estimator, solver, calls = IMPLICIT[name]
    reference = REFERENCES[reference]()
    params, _, grad = reference.solution(reference.meta)
    h, _ = repeat(estimator, solver, reference, calls)
    end = last(h)
    assert_trees_close(name, end.grad, grad, 1e-8)
    meta, task = as_arrays(reference)
    value = reference.problem.outer_loss(jax.tree.map(jnp.asarray, params), meta, task.query, None)
    assert_close("value", end.value, value, 1e-8)
    assert end.stats["inner_residual"] < 1e-7 and end.stats["linear_residual"] < 1e-6
    # On the way there the error falls: it is not right by accident from the start.
    error = np.abs(jax.tree.leaves(h.grad)[0] - jax.tree.leaves(grad)[0]).max(-1)
    assert error[0] > 1e-2 * np.abs(jax.tree.leaves(grad)[0]).max()
    assert error[15] < 0.9 * error[0] and error[45] < max(0.9 * error[15], 1e-12)
    if solver.num_steps == 1:
        assert estimator.doubts(floats(jax.tree.map(lambda leaf: leaf[0], h.stats)))
    assert estimator.doubts(floats(end.stats)) == []


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("multiplier", [10.0, 1000.0])
def test_f2sa_settles_at_the_penalty_hypergradient(x64, reference, multiplier):
    reference = REFERENCES[reference]()
    h, state = repeat(F2sa(multiplier), ONE, reference, 800)
    assert_trees_close("f2sa", last(h).grad, reference.penalty(reference.meta, multiplier), 1e-7)
    assert state.count == 800 and F2sa(multiplier).doubts(floats(last(h.stats))) == []
    exact = reference.solution(reference.meta)[2]
    assert_trees_close("f2sa", last(h).grad, exact, 30 / multiplier)


def test_f2sa_with_a_growing_multiplier_loses_its_bias(x64):
    reference = ridge()
    h, _ = repeat(F2sa(10.0, growth=10.0), ONE, reference, 2000)
    exact = reference.solution(reference.meta)[2]["penalty"]
    error = np.abs(np.asarray(h.grad["penalty"]) - exact).max(-1)
    assert h.stats["multiplier"][-1] == 10.0 + 10.0 * 1999
    assert 5 < error[199] / error[1999] < 20  # ten times the multiplier, a tenth of the bias


def samples(estimator, solver, reference, state, count=2000):
    meta, task = as_arrays(reference)

    def one(key):
        h, _ = estimator.estimate(reference.problem, solver, meta, task, state, key)
        return h.grad["weight"]

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), count)))


STILL = bl.inner.Gradient(optax.sgd(1e-12), num_steps=1)  # φ* is kept where it is
UNBIASED = {
    "soba": lambda size: Soba(0.3, batch_size=size),
    "ma-soba": lambda size: MaSoba(0.3, batch_size=size),
    "amigo": lambda size: AmIGO(0.1, linear_steps=3, batch_size=size),
    "stocbio": lambda size: StocBiO(0.2, num_neumann=60, batch_size=size),
}


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.parametrize("name", UNBIASED)
def test_minibatches_are_unbiased_at_the_solution(x64, name, size):
    reference, estimator = weighted(), UNBIASED[name](size)
    state = settled(estimator, STILL, reference)
    grads = samples(estimator, STILL, reference, state)
    exact = reference.solution(reference.meta)[2]["weight"]
    error = np.abs(grads.mean(0) - exact) / (grads.std(0, ddof=1) / len(grads) ** 0.5)
    assert np.all(error < 3.6), error  # 99.9% for three of them together
    if name in ("soba", "ma-soba"):  # with a wrong q the same test fails
        warm = settled(Soba(0.3), STILL, reference)
        warm = warm._replace(q=0.5 * warm.q)
        grads = samples(Soba(0.3, batch_size=size), STILL, reference, warm)
        error = np.abs(grads.mean(0) - exact) / (grads.std(0, ddof=1) / len(grads) ** 0.5)
        assert np.any(error > 6)


def test_variance_falls_with_the_batch_size(x64):
    reference = weighted()
    variance = {}
    for size in (1, 4, 16):
        estimator = Soba(0.3, batch_size=size)
        grads = samples(estimator, STILL, reference, settled(estimator, STILL, reference))
        variance[size] = grads.var(0).sum()
    assert 0.85 < variance[1] / variance[4] / 4 < 1.15
    assert 0.85 < variance[4] / variance[16] / 4 < 1.15


def test_saba_is_exact_at_the_end_where_soba_fluctuates(x64):
    reference, solver = weighted(), bl.inner.Gradient(optax.sgd(0.1), num_steps=1)
    exact = reference.solution(reference.meta)[2]["weight"]
    saba, _ = repeat(Saba(0.1, batch_size=4), solver, reference, 4000)
    soba, _ = repeat(Soba(0.1, batch_size=4), solver, reference, 4000)
    saba_end, soba_end = saba.grad["weight"][-200:], soba.grad["weight"][-200:]
    assert_close("saba", saba_end, np.broadcast_to(exact, saba_end.shape), 1e-8)
    assert np.all(np.std(soba_end, 0) > 0.02 * np.abs(exact).max())
    assert Saba(0.1, batch_size=4).doubts(floats(last(saba.stats))) == []


def test_ma_soba_averages(x64):
    reference, count = weighted(), 300
    plain = Soba(0.1, batch_size=2)
    averaged = MaSoba(0.1, average_rate=0.1, batch_size=2)
    h, _ = repeat(plain, STILL, reference, count, state=settled(plain, STILL, reference))
    m, state = repeat(averaged, STILL, reference, count, state=settled(averaged, STILL, reference))
    d, a, w = np.asarray(h.grad["weight"]), np.zeros(3), 0.0
    expected = []
    for t in range(count):
        a, w = 0.9 * a + 0.1 * d[t], 0.9 * w + 0.1
        expected.append(a / w)
    assert_close("average", m.grad["weight"], expected, 1e-12)
    assert state.weight == pytest.approx(1.0)


@pytest.mark.parametrize("name", NAMES)
def test_two_tasks_under_vmap_equal_one_by_one(x64, name):
    estimator, solver, _ = IMPLICIT[name]
    estimator = replace(estimator, batch_size=4)
    first, second = weighted(0), weighted(1)
    meta = as_arrays(first)[0]
    tasks = jax.tree.map(lambda a, b: jnp.stack([a, b]), as_arrays(first)[1], as_arrays(second)[1])
    keys = jax.random.split(jax.random.key(5), 2)

    def init(task, key):
        return estimator.init(first.problem, solver, meta, task, key)

    def call(task, state, key):
        return estimator.estimate(first.problem, solver, meta, task, state, key)

    states = jax.jit(jax.vmap(init))(tasks, keys)
    both, single = jax.jit(jax.vmap(call)), jax.jit(call)
    for k in range(2):
        keys = jax.random.split(jax.random.key(k), 2)
        together, after = both(tasks, states, keys)
        for i in range(2):

            def pick(tree, i=i):
                return jax.tree.map(lambda leaf: leaf[i], tree)

            alone, alone_after = single(pick(tasks), pick(states), keys[i])
            assert_trees_close("grad", pick(together.grad), alone.grad, 1e-12)
            assert_trees_close("state", jax.tree.leaves(pick(after)), jax.tree.leaves(alone_after), 1e-12)
        states = after


@pytest.mark.parametrize("estimator", STEPPING, ids=lambda e: type(e).__name__)
def test_the_state_keeps_its_shape_and_types(estimator):
    reference = ridge()
    meta, task = as_arrays(reference)
    estimator, key = replace(estimator, batch_size=3), jax.random.key(0)
    state = jax.eval_shape(lambda: estimator.init(reference.problem, ONE, meta, task, key))
    h, after = jax.eval_shape(
        lambda state: estimator.estimate(reference.problem, ONE, meta, task, state, key), state
    )
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert [(s.shape, s.dtype) for s in jax.tree.leaves(after)] == [
        (s.shape, s.dtype) for s in jax.tree.leaves(state)
    ]
    assert {"inner_loss", "zero_leaves", "finite", "inner_residual", "linear_residual"} <= set(h.stats)
    assert all(s.shape == () for s in h.stats.values())


# The outer loop


def constant(reference):
    """The same single task at every outer step."""
    task = as_arrays(reference)[1]
    return lambda key: jax.tree.map(lambda leaf: leaf[None], task)


# Estimator, solver, outer rate, steps, and how small the exact hypergradient must become.
LOOPS = {
    "soba": (Soba(0.3), ONE, 1.0, 3000, 1e-6),
    "saba": (Saba(0.1, batch_size=8), bl.inner.Gradient(optax.sgd(0.1), 1), 0.5, 8000, 1e-6),
    "ma-soba": (MaSoba(0.3), ONE, 1.0, 3000, 1e-6),
    "amigo": (AmIGO(0.3, linear_steps=5), FIVE, 1.0, 3000, 1e-6),
    "stocbio": (StocBiO(0.3, num_neumann=60), FIVE, 1.0, 3000, 1e-6),
    "f2sa": (F2sa(100.0, growth=1.0), ONE, 0.3, 8000, 1e-4),
    "soba-minibatch": (Soba(0.1, batch_size=8), bl.inner.Gradient(optax.sgd(0.05), 1), 0.02, 12000, 3e-3),
    "bome": (Bome(0.02), bl.inner.Gradient(optax.sgd(0.5), 10), 0.2, 6000, 1e-3),
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_outer_loop_finds_the_optimum(x64, name):
    estimator, solver, rate, steps, tolerance = LOOPS[name]
    reference = ridge()
    learner = bl.Learner(reference.problem, solver, estimator)
    optimizer, sample = optax.sgd(rate), constant(reference)
    meta = as_arrays(reference)[0]
    state = bl.init_state(learner, optimizer, sample, jax.random.key(0), meta=meta)
    state = bl.train(learner, optimizer, sample, state, steps, options=bl.Options(chunk_size=steps // 2))
    before = np.abs(reference.solution(meta)[2]["penalty"]).max()
    after = np.abs(reference.solution(jax.tree.map(np.asarray, state.meta))[2]["penalty"]).max()
    assert before > 0.05 and after < tolerance, after


def test_a_chunk_of_one_step_is_not_stopped_by_an_empty_state():
    """With q = 0 the first hypergradient would be exactly zero here, and `train` would stop."""
    reference = weighted()
    learner, sample = bl.Learner(reference.problem, ONE, Soba(0.3)), constant(reference)
    meta = as_arrays(reference)[0]
    state = bl.init_state(learner, optax.sgd(0.1), sample, jax.random.key(0), meta=meta)
    state = bl.train(learner, optax.sgd(0.1), sample, state, 2, options=bl.Options(chunk_size=1))
    assert state.step == 2
