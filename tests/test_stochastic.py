"""Single-loop stochastic estimators: exact where they settle, unbiased, as noisy as theory predicts."""

import warnings
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bilevel_references import REFERENCES, as_arrays, floats, last, quadratic, repeat, ridge, weighted

import bilevel as bl
from bilevel.hypergrad import FirstOrderWarning
from bilevel.hypergrad.first_order.bome import Bome
from bilevel.hypergrad.single_loop.amigo import AmIGO
from bilevel.hypergrad.single_loop.f2sa import F2sa
from bilevel.hypergrad.single_loop.ma_soba import MaSoba
from bilevel.hypergrad.single_loop.minibatch import checksum, draw
from bilevel.hypergrad.single_loop.saba import Saba
from bilevel.hypergrad.single_loop.soba import Soba
from bilevel.hypergrad.single_loop.stocbio import StocBiO
from bilevel.testing import assert_close, assert_trees_close

# A single call from a fresh state is doubted, as it should be: the tests that mean it look at `doubts`.
pytestmark = pytest.mark.filterwarnings("ignore::bilevel.hypergrad.doubts.HypergradientWarning")

SGD, MOMENTUM = optax.sgd(0.3), optax.sgd(0.1, momentum=0.5)
ONE = bl.inner.Gradient(SGD, num_steps=1)
FIVE = bl.inner.Gradient(SGD, num_steps=5)
# Each with a solver it accepts and the calls it needs to settle.
IMPLICIT = {
    "soba": (Soba(0.3), ONE, 600),
    "soba-momentum": (Soba(0.3), bl.inner.Gradient(MOMENTUM, 1), 600),
    "saba": (Saba(0.3), ONE, 600),
    "ma-soba": (MaSoba(0.3, average_rate=0.2), ONE, 600),
    "amigo": (AmIGO(0.3, linear_steps=5), FIVE, 150),
    "amigo-one": (AmIGO(0.3, linear_steps=1), ONE, 600),
    "stocbio": (StocBiO(0.3, num_neumann=300), FIVE, 100),
}
NAMES = ("soba", "saba", "ma-soba", "amigo", "stocbio")
STEPPING = [*(IMPLICIT[name][0] for name in NAMES), F2sa(100.0)]


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


def settled(estimator, solver, reference):
    """The state at (φ*, q*)."""
    meta, task = as_arrays(reference)
    params, q, _ = jax.tree.map(jnp.asarray, reference.solution(reference.meta))
    state = estimator.init(reference.problem, solver, meta, task, jax.random.key(0))
    warm = getattr(state, "warm", state)
    warm = warm._replace(inner=warm.inner._replace(params=params), q=q)
    return state._replace(warm=warm) if hasattr(state, "warm") else warm


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


# What is told


@pytest.mark.parametrize("name", NAMES)
def test_a_rate_too_large_for_the_linear_system_is_told(x64, name):
    estimator, solver, _ = IMPLICIT[name]
    rate = "neumann_rate" if name == "stocbio" else "linear_rate"
    estimator = replace(estimator, **{rate: 3.0})
    if name == "stocbio":
        estimator = replace(estimator, num_neumann=20)
    h, _ = repeat(estimator, solver, ridge(), 30)
    said = estimator.doubts(floats(last(h.stats)))
    assert any(f"{rate} = 3 makes the linear system diverge" in sentence for sentence in said), said
    assert any("linear_residual is" in sentence for sentence in said)
    h, _ = repeat(estimator, solver, ridge(), 3000)
    assert h.stats["finite"][-1] == 0 or name == "stocbio"
    assert estimator.doubts(floats(last(h.stats)))


@pytest.mark.parametrize("name", ["soba", "saba", "ma-soba"])
def test_one_call_is_not_enough_and_says_so(x64, name):
    estimator, solver, _ = IMPLICIT[name]
    reference = ridge()
    meta, task = as_arrays(reference)
    h = bl.hypergradient(reference.problem, solver, estimator, meta, task, jax.random.key(0))
    said = estimator.doubts(floats(h.stats))
    assert any("inner parameters have not settled" in sentence for sentence in said)


def test_noise_alone_is_not_doubted_and_a_lag_within_the_noise_is(x64):
    """On minibatches the residuals stay large; their drift tells whether there is anything but noise."""
    reference, solver = weighted(), bl.inner.Gradient(optax.sgd(0.05), 1)
    soba = Soba(0.05, batch_size=16)
    state = settled(soba, solver, reference)
    h, state = repeat(soba, solver, reference, 1000, state=state)
    mean = jax.tree.map(lambda leaf: float(np.mean(leaf)), h.stats)
    assert mean["linear_residual"] > 0.5 and mean["inner_residual_share"] > 0.15
    assert mean["linear_drift"] < 0.02 and soba.doubts(mean) == []

    stuck = replace(soba, linear_rate=1e-6)  # q stays where it is: at 0 and away from the solution
    zero = state._replace(q=jax.tree.map(jnp.zeros_like, state.q))
    h, _ = repeat(stuck, solver, reference, 1000, state=zero)
    mean = jax.tree.map(lambda leaf: float(np.mean(leaf)), h.stats)
    assert mean["linear_drift"] > 0.1
    assert any("q is not solved for, noise taken out" in sentence for sentence in stuck.doubts(mean))


def test_a_stale_state_is_told(x64):
    """θ moves too fast for φ and q to follow."""
    reference, estimator = quadratic(), Soba(0.3)
    _, state = repeat(estimator, ONE, reference, 300)
    moved = jax.tree.map(lambda leaf: leaf + 3.0, as_arrays(reference)[0])
    h, _ = repeat(estimator, ONE, reference, 1, meta=moved, state=state)
    assert "have not settled" in estimator.doubts(floats(last(h.stats)))[0]


def test_an_inner_loss_that_is_not_convex_is_told(x64):
    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(2),
        inner_loss=lambda params, meta, batch, key: 0.5 * (params[0] - meta) ** 2 - 0.1 * params[1] ** 2,
        outer_loss=lambda params, meta, batch, key: params[1] + params[0],
    )
    soba, task, key = Soba(0.3), bl.Task(None, None), jax.random.key(0)
    state = soba.init(problem, ONE, jnp.ones(()), task, key)
    for _ in range(30):
        h, state = soba.estimate(problem, ONE, jnp.ones(()), task, state, key)
    assert any("not convex along q" in sentence for sentence in soba.doubts(floats(h.stats)))


def test_saba_tells_that_its_task_has_changed(x64):
    reference, estimator = ridge(), Saba(0.1, batch_size=4)
    h, state = repeat(estimator, ONE, reference, 20)
    assert not np.any(h.stats["task_changed"])
    other = reference._replace(task=ridge(seed=3).task)
    h, _ = repeat(estimator, ONE, other, 20, state=state)
    assert np.all(h.stats["task_changed"] == 1)
    assert "Soba for a stream of tasks" in estimator.doubts(floats(last(h.stats)))[0]


@pytest.mark.filterwarnings("ignore::bilevel.FirstOrderWarning")
@pytest.mark.parametrize("estimator", STEPPING, ids=lambda e: type(e).__name__)
def test_leaves_out_of_sight_are_zero_and_named(x64, estimator):
    reference = ridge()
    meta, task = as_arrays(reference)
    meta = {**meta, "rate": jnp.array(0.3), "start": jnp.zeros(3)}
    problem = replace(reference.problem, init=lambda meta, key: meta["start"])
    solver = bl.inner.Gradient(lambda meta: optax.sgd(meta["rate"]), 1)
    with pytest.warns(FirstOrderWarning, match=r"gives meta\['rate'\], meta\['start'\] .*Mixed\(\)"):
        h = bl.hypergradient(problem, solver, estimator, meta, task, jax.random.key(0))
    assert h.stats["zero_leaves"] == 2 and not np.any(h.grad["start"]) and np.all(h.grad["penalty"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", FirstOrderWarning)
        bl.hypergradient(reference.problem, ONE, estimator, as_arrays(reference)[0], task, jax.random.key(0))


# What is refused


@pytest.mark.filterwarnings("ignore::bilevel.FirstOrderWarning")
@pytest.mark.parametrize("estimator", STEPPING, ids=lambda e: type(e).__name__)
def test_refusals_name_the_fault_and_the_remedy(estimator):
    reference = ridge()
    meta, task = as_arrays(reference)
    name, key = type(estimator).__name__, jax.random.key(0)

    @dataclass(frozen=True)
    class ClosedForm:
        def solve(self, problem, meta, task, key):
            return bl.Solution(meta, {})

    with pytest.raises(TypeError, match=rf"{name} .*ClosedForm has no steps.*use bl\.inner\.Gradient"):
        bl.Learner(reference.problem, ClosedForm(), estimator)
    if name not in ("AmIGO", "StocBiO"):
        with pytest.raises(ValueError, match=r"num_steps=5; use num_steps=1, or bl\.hypergrad\.AmIGO"):
            bl.Learner(reference.problem, FIVE, estimator)
    with pytest.raises(ValueError, match="num_steps of at least 1, got 0"):
        bl.Learner(reference.problem, replace(ONE, num_steps=0), estimator)
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"{name}.batch_size must be None"):
            replace(estimator, batch_size=bad)
    with pytest.raises(ValueError, match=r"at most the 24 rows of task\.\w+, got 25"):
        bl.hypergradient(reference.problem, ONE, replace(estimator, batch_size=25), meta, task, key)
    ragged = bl.Task((task.support[0], task.support[1][:5]), task.query)
    with pytest.raises(ValueError, match="must share their leading axis"):
        draw(ragged.support, 2, key)
    with pytest.raises(TypeError, match=r"meta\['steps'\] is int32"):
        bl.hypergradient(reference.problem, ONE, estimator, {**meta, "steps": jnp.int32(3)}, task, key)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf"), "0.1", True])
def test_rates_must_be_positive(rate):
    for make, field in ((Soba, "linear_rate"), (Saba, "linear_rate"), (AmIGO, "linear_rate")):
        with pytest.raises(ValueError, match=f"{make.__name__}.{field} must be a positive number"):
            make(rate)
    with pytest.raises(ValueError, match=r"StocBiO\.neumann_rate"):
        StocBiO(rate)
    with pytest.raises(ValueError, match=r"F2sa\.multiplier"):
        F2sa(rate)


def test_counts_must_be_positive():
    with pytest.raises(ValueError, match=r"AmIGO\.linear_steps"):
        AmIGO(0.1, linear_steps=0)
    with pytest.raises(ValueError, match=r"StocBiO\.num_neumann"):
        StocBiO(0.1, num_neumann=1.5)
    with pytest.raises(ValueError, match=r"MaSoba\.average_rate"):
        MaSoba(0.1, average_rate=0.0)


def test_saba_needs_batches_that_divide_the_rows():
    reference = ridge()
    meta, task = as_arrays(reference)
    with pytest.raises(ValueError, match=r"must divide the 24 rows.*got 5; use 4 or 6, or leave 4 rows out"):
        bl.hypergradient(reference.problem, ONE, Saba(0.1, batch_size=5), meta, task, jax.random.key(0))


# Rows


def test_rows_are_drawn_uniformly_and_together():
    batch = {"x": jnp.arange(10.0)[:, None], "y": jnp.arange(10)}
    drawn = jax.vmap(lambda key: draw(batch, 3, key))(jax.random.split(jax.random.key(0), 3000))
    assert np.array_equal(drawn["x"][..., 0], drawn["y"])
    counts = np.bincount(np.ravel(drawn["y"]), minlength=10)
    assert np.all(np.abs(counts - 900) < 4 * 900**0.5)


def test_checksum_sees_every_bit_and_its_place():
    x = jax.random.normal(jax.random.key(0), (100, 3))
    assert checksum(x) == checksum(jnp.array(x)) != checksum(x[::-1])
    assert checksum(x) != checksum(x.at[50, 1].multiply(1 + 2e-7))
    assert checksum((x, jnp.arange(3))) != checksum((x, jnp.arange(3) + 1))
    assert checksum(x.astype(jnp.bfloat16)).dtype == jnp.uint32
