"""Evolution strategies: unbiased for the smoothed loss, with the variance and the bias that theory gives."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evolution_tools import KEY, NO_TASK, Z, direct, once, repeat, z_scores

import bilevel as bl
from bilevel.hypergrad import Unroll
from bilevel.hypergrad.evolution.evolution_strategies import EvolutionStrategies
from bilevel.hypergrad.evolution.perturbation import sum_chunks
from bilevel.testing import assert_close, assert_trees_close, dead_relu, quadratic

# Unbiased, and for what


@pytest.mark.parametrize("num_steps", [1, 5, 20])
@pytest.mark.parametrize("sigma", [0.01, 1.0])
def test_unbiased_for_a_quadratic_loss(x64, num_steps, sigma):
    case = quadratic(num_steps)
    meta, task = jax.tree.map(jnp.asarray, (case.meta, case.task))
    solver = bl.inner.Gradient(optax.sgd(jnp.exp(meta.pop("log_rate"))), num_steps)
    h = repeat(EvolutionStrategies(sigma, 2), case.problem, solver, meta, task)
    got = np.concatenate([h.grad["init"], h.grad["theta"]], axis=1)
    exact = np.concatenate([case.exact.grad["init"], case.exact.grad["theta"]])
    # F is quadratic in what is left of meta: no smoothing bias at any σ.
    assert np.all(z_scores(got, exact) < Z)
    assert np.any(z_scores(got, 1.3 * exact) > Z), "this test could not fail"


def test_unbiased_for_the_smoothed_loss_and_not_for_the_other(x64):
    a, theta, sigma = jnp.array([1.0, -0.5]), jnp.array([0.3, 0.8]), 0.8
    problem, solver = direct(lambda theta: jnp.sum(a * theta**3))
    h = repeat(EvolutionStrategies(sigma, 4), problem, solver, theta, times=4000)
    assert np.all(z_scores(h.grad, 3 * a * (theta**2 + sigma**2)) < Z)
    assert np.all(z_scores(h.grad, 3 * a * theta**2) > 10)
    smoothed = jnp.sum(a * (theta**3 + 3 * theta * sigma**2))
    assert z_scores(h.value, smoothed) < Z


def test_the_bias_is_of_second_order_in_sigma(x64):
    a, theta = jnp.array([1.0, -0.5]), jnp.array([0.3, 0.8])
    problem, solver = direct(lambda theta: jnp.sum(a * theta**3))
    # The same key draws the same noise: of a cubic each estimate is a constant plus σ² times another.
    of = [
        once(EvolutionStrategies(sigma, 8), problem, solver, theta, NO_TASK, KEY).grad
        for sigma in (0.1, 0.2, 0.4)
    ]
    assert_close("ratio", (of[2] - of[1]) / (of[1] - of[0]), np.full(2, 4.0), 1e-9)


# Variance


@pytest.mark.parametrize(("dim", "num_pairs"), [(2, 1), (8, 1), (32, 1), (8, 4), (8, 16)])
def test_variance_grows_with_the_dimension_and_falls_with_the_pairs(x64, dim, num_pairs):
    slope = jax.random.normal(jax.random.key(3), (dim,))
    problem, solver = direct(lambda theta: slope @ theta)
    h = repeat(EvolutionStrategies(0.1, num_pairs), problem, solver, jnp.zeros(dim), times=6000)
    measured = jnp.mean(jnp.sum((h.grad - slope) ** 2, axis=1))
    predicted = (dim + 1) * jnp.sum(slope**2) / num_pairs
    assert abs(measured / predicted - 1) < 0.12
    if num_pairs > 1:  # what one call says of its own error
        claimed = jnp.mean(jnp.sum(h.grad**2, axis=1) * h.stats["standard_error"] ** 2)
        assert abs(claimed / predicted - 1) < 0.12
    else:
        assert "standard_error" not in h.stats


def test_both_sides_of_a_pair_share_their_randomness(x64):
    """Noise of size 1000 in the inner gradient and in the outer loss, none in the difference."""

    def noise(key):
        return 1000 * jax.random.normal(key, (2,))

    problem = bl.Problem(
        init=lambda meta, key: meta + noise(key),
        inner_loss=lambda params, meta, batch, key: params @ (meta + noise(key)),
        outer_loss=lambda params, meta, batch, key: jnp.sum(params) + jnp.sum(noise(key)),
    )
    solver = bl.inner.Gradient(optax.sgd(0.1), 3)
    meta = jnp.array([1.0, 2.0])
    exact = bl.hypergradient(problem, solver, Unroll(), meta, NO_TASK, KEY)
    h = repeat(EvolutionStrategies(0.1, 1), problem, solver, meta)
    assert np.all(np.std(h.grad, axis=0) < 3) and np.all(z_scores(h.grad, exact.grad) < Z)
    # And it is the randomness that Unroll sees at the same key.
    same = once(EvolutionStrategies(1e-9, 1), problem, solver, meta, NO_TASK, KEY)
    assert_close("value", same.value, exact.value, 1e-9)
    assert_close("inner_loss", same.stats["inner_loss"], exact.stats["inner_loss"], 1e-9)


# Chunks


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 100])
def test_chunks_change_nothing(x64, chunk):
    case = quadratic(5, optimizer="momentum")
    meta, task = jax.tree.map(jnp.asarray, (case.meta, case.task))

    def run(chunk):
        estimator = EvolutionStrategies(0.1, 7, chunk)
        return once(estimator, case.problem, case.solver, meta, task, KEY)

    assert_trees_close("h", run(chunk), run(None), 1e-12)


@pytest.mark.parametrize("chunk", [None, 1, 2, 5, 9])
@pytest.mark.parametrize("count", [1, 5, 6])
def test_sum_chunks(count, chunk):
    xs = jnp.arange(count * 2.0).reshape(count, 2)
    got = sum_chunks(lambda x: {"a": x, "b": jnp.sum(x)}, xs, chunk)
    assert_trees_close("sum", got, {"a": xs.sum(0), "b": xs.sum()}, 1e-7)


def test_a_chunk_bounds_the_memory():
    problem, solver = direct(lambda theta: jnp.sum(jnp.tanh(theta)))

    def peak(chunk):
        run = jax.jit(
            lambda meta: once(EvolutionStrategies(0.1, 64, chunk), problem, solver, meta, NO_TASK, KEY).grad
        )
        memory = run.lower(jnp.zeros(10_000)).compile().memory_analysis()
        if memory is None:
            pytest.skip("this backend does not report its memory")
        return memory.temp_size_in_bytes

    assert peak(4) < peak(None) / 4


# What has no derivative


@dataclass(frozen=True)
class Bisection:
    """Finds the root of params³ + params = θ by a `while_loop`, then rounds it to a grid of 1/64."""

    def solve(self, problem, meta, task, key):
        def halve(bounds):
            low, high = bounds
            middle = (low + high) / 2
            return jax.lax.cond(middle**3 + middle > meta, lambda: (low, middle), lambda: (middle, high))

        low, _ = jax.lax.while_loop(
            lambda bounds: bounds[1] - bounds[0] > 1e-9,
            halve,
            (jnp.full_like(meta, -9), jnp.full_like(meta, 9)),
        )
        return bl.Solution(jnp.round(low * 64) / 64, {})


@dataclass(frozen=True)
class Nearest:
    """The nearest to θ of 101 points, by argmin."""

    def solve(self, problem, meta, task, key):
        points = jnp.linspace(-5, 5, 101)
        return bl.Solution(points[jnp.argmin(jnp.abs(points - meta))], {})


@pytest.mark.parametrize(
    ("solver", "expected"), [(Bisection(), 2 * 1.0 / (3 * 1.0 + 1)), (Nearest(), 2 * 2.0)]
)
@pytest.mark.parametrize("chunk", [None, 1])
def test_solvers_without_a_derivative(x64, solver, expected, chunk):
    """d(φ²)/dθ at θ = 2: φ = 1 and dφ/dθ = 1/(3φ² + 1) for the root; φ = θ for the points."""
    problem = bl.Problem(
        init=lambda meta, key: meta,
        inner_loss=lambda params, meta, batch, key: params,
        outer_loss=lambda params, meta, batch, key: params**2,
    )
    estimator = EvolutionStrategies(0.3, 800, chunk)
    learner = bl.Learner(problem, solver, estimator)
    h = jax.jit(lambda meta: once(estimator, problem, learner.solver, meta, NO_TASK, KEY))(jnp.float64(2.0))
    # the noise, and a little for the rounding and the smoothing
    assert abs(h.grad - expected) < (Z * h.stats["standard_error"] + 0.02) * expected


def test_rounding_inside_the_loss(x64):
    """Unroll finds exactly zero where the outer loss is a staircase; the smoothed slope is there."""
    problem, solver = direct(lambda theta: jnp.sum(jnp.floor(10 * theta)))
    meta = jnp.array([0.123, -0.456])
    assert not np.any(bl.hypergradient(problem, solver, Unroll(), meta, NO_TASK, KEY).grad)
    h = repeat(EvolutionStrategies(0.5, 4), problem, solver, meta)
    assert np.all(z_scores(h.grad, np.full(2, 10.0)) < Z)


@pytest.mark.parametrize("optimizer", ["adam", "rates"])
def test_adaptive_optimizers(x64, optimizer):
    """At small σ and with many pairs the exact hypergradient, learned rates included."""
    case = dead_relu(5, optimizer=optimizer)
    meta, task = jax.tree.map(jnp.asarray, (case.meta, case.task))
    estimator = EvolutionStrategies(1e-4, 2000)
    h = jax.jit(lambda m: once(estimator, case.problem, case.solver, m, task, KEY))(meta)
    off = optax.tree.norm(optax.tree.sub(h.grad, jax.tree.map(jnp.asarray, case.exact.grad)))
    error = h.stats["standard_error"] * optax.tree.norm(h.grad)
    assert 0.7 * error < off < 1.3 * error


# The rest of the contract


def test_a_leaf_that_nothing_reads_gets_exactly_zero():
    problem, solver = direct(lambda theta: theta["read"] ** 2)
    problem = replace(problem, init=lambda meta, key: {"read": meta["read"] * 0.5})
    problem = replace(
        problem, inner_loss=lambda params, meta, batch, key: (params["read"] - meta["read"]) ** 2
    )
    meta = {"read": 1.0, "idle": jnp.ones(3)}
    h = once(EvolutionStrategies(0.1, 4), problem, solver, meta, NO_TASK, KEY)
    assert not np.any(h.grad["idle"]) and h.grad["read"] != 0 and h.stats["zero_leaves"] == 1


def test_dtypes_and_nesting():
    problem, solver = direct(
        lambda theta: sum(jnp.sum(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(theta))
    )
    meta = {"a": (jnp.ones(2, jnp.bfloat16), None), "b": [jnp.ones((2, 1))], "empty": {}}
    h = once(EvolutionStrategies(0.5, 300), problem, solver, meta, NO_TASK, KEY)
    assert jax.tree.structure(h.grad) == jax.tree.structure(meta)
    assert h.grad["a"][0].dtype == jnp.bfloat16 and h.grad["b"][0].dtype == jnp.float32
    assert_trees_close("grad", h.grad, jax.tree.map(jnp.ones_like, meta), 0.5)


def test_over_tasks_and_in_an_outer_step(x64):
    case = quadratic(3)
    meta = jax.tree.map(jnp.asarray, case.meta)
    rng = np.random.default_rng(1)
    tasks = bl.Task(jnp.array(rng.normal(size=(4, 4))), jnp.array(rng.normal(size=(4, 4))))
    estimator = EvolutionStrategies(0.01, 2000)

    def one(task, key):
        return once(estimator, case.problem, case.solver, meta, task, key)

    keys = jax.random.split(KEY, 4)
    together = jax.jit(jax.vmap(one))(tasks, keys)
    for i in range(4):
        single = jax.jit(one)(jax.tree.map(lambda leaf, i=i: leaf[i], tasks), keys[i])
        assert_trees_close("task", jax.tree.map(lambda leaf, i=i: leaf[i], together), single, 1e-12)

    learner = bl.Learner(case.problem, case.solver, estimator, init_meta=lambda key: meta)
    optimizer = optax.sgd(0.1)
    state = bl.init_state(learner, optimizer, lambda key: tasks, KEY)
    state, metrics = jax.jit(lambda s: bl.meta_step(learner, optimizer, s, tasks, task_chunk=2))(state)
    assert state.step == 1 and "standard_error" in metrics.scalars


def test_traces_once():
    problem, solver = direct(lambda theta: jnp.sum(theta**2))
    traces = []

    @jax.jit
    def run(meta, key):
        traces.append(1)
        return once(EvolutionStrategies(0.1, 3), problem, solver, meta, NO_TASK, key)

    for i in range(3):
        run(jnp.ones(2) * i, jax.random.key(i))
    assert len(traces) == 1


def test_noise_is_named():
    estimator = EvolutionStrategies(0.1, 8)
    assert estimator.doubts({"standard_error": 0.5}) == estimator.doubts({}) == []
    (sentence,) = estimator.doubts({"standard_error": 0.95})
    assert "mostly noise" in sentence and "95%" in sentence and "num_pairs=8" in sentence
    slope = jnp.ones(200)
    problem, solver = direct(lambda theta: slope @ theta)
    few, many = (
        float(
            jnp.mean(
                repeat(EvolutionStrategies(0.1, n), problem, solver, jnp.zeros(200), times=50).stats[
                    "standard_error"
                ]
            )
        )
        for n in (8, 1000)
    )
    assert estimator.doubts({"standard_error": few}) and not estimator.doubts({"standard_error": many})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sigma": 0.0, "num_pairs": 2}, "sigma must be a positive number"),
        ({"sigma": float("inf"), "num_pairs": 2}, "sigma must be a positive number"),
        ({"sigma": 0.1, "num_pairs": 0}, "num_pairs must be a whole number of at least 1"),
        ({"sigma": 0.1, "num_pairs": True}, "num_pairs must be a whole number of at least 1"),
        ({"sigma": 0.1, "num_pairs": 2, "chunk": 0}, "chunk must be None or a whole number of at least 1"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        EvolutionStrategies(**fields)


def test_refusals_name_the_fault_and_the_remedy():
    problem, solver = direct(lambda theta: jnp.sum(theta))
    estimator = EvolutionStrategies(0.1, 2)
    with pytest.raises(TypeError, match=r"needs a solver with solve.*use bl\.inner\.Gradient"):
        bl.Learner(problem, object(), estimator)
    with pytest.raises(TypeError, match=r"meta\['n'\] is int32.*make it a float"):
        once(estimator, problem, solver, {"n": jnp.int32(3)}, NO_TASK, KEY)
    vector = replace(problem, outer_loss=lambda params, meta, batch, key: params)
    with pytest.raises(ValueError, match="outer_loss must return a scalar"):
        once(estimator, vector, solver, jnp.ones(2), NO_TASK, KEY)
