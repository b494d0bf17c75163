"""What single-loop estimators tell and what they refuse, and how they draw their rows."""

import warnings
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bilevel_references import as_arrays, floats, last, quadratic, repeat, ridge, weighted
from single_loop_tools import FIVE, IMPLICIT, NAMES, ONE, STEPPING, settled

import bilevel as bl
from bilevel.hypergrad import FirstOrderWarning
from bilevel.hypergrad.single_loop.amigo import AmIGO
from bilevel.hypergrad.single_loop.f2sa import F2sa
from bilevel.hypergrad.single_loop.ma_soba import MaSoba
from bilevel.hypergrad.single_loop.minibatch import checksum, draw_task
from bilevel.hypergrad.single_loop.saba import Saba
from bilevel.hypergrad.single_loop.soba import Soba
from bilevel.hypergrad.single_loop.stocbio import StocBiO
from bilevel.hypergrad.single_loop.threefry import random_words

# A single call from a fresh state is doubted, as it should be: the tests that mean it look at `doubts`.
pytestmark = pytest.mark.filterwarnings("ignore::bilevel.hypergrad.doubts.HypergradientWarning")


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
        draw_task(ragged, 2, key)
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
    drawn = jax.vmap(lambda key: draw_task(bl.Task(batch, None), 3, key).support)(
        jax.random.split(jax.random.key(0), 3000)
    )
    assert np.array_equal(drawn["x"][..., 0], drawn["y"])
    counts = np.bincount(np.ravel(drawn["y"]), minlength=10)
    assert np.all(np.abs(counts - 900) < 4 * 900**0.5)


def test_the_words_are_those_of_jax_for_every_kind_of_key():
    """A change of the rounds or of the order would give another run after an upgrade."""
    for key in (jax.random.key(5), jax.random.PRNGKey(5), jax.random.key(5, impl="rbg")):
        expected = jax.random.bits(jax.random.fold_in(key, 9), (3, 7), jnp.uint32)
        assert np.array_equal(random_words(key, 9, (3, 7)), expected)


def test_checksum_sees_every_bit_and_its_place():
    x = jax.random.normal(jax.random.key(0), (100, 3))
    assert checksum(x) == checksum(jnp.array(x)) != checksum(x[::-1])
    assert checksum(x) != checksum(x.at[50, 1].multiply(1 + 2e-7))
    assert checksum((x, jnp.arange(3))) != checksum((x, jnp.arange(3) + 1))
    assert checksum(x.astype(jnp.bfloat16)).dtype == jnp.uint32
