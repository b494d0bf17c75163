"""PES and NRES: unbiased from short windows, where plain truncation is not; a life is what `solve` runs."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad import MultiStep
from bilevel.hypergrad.evolution.evolution_strategies import EvolutionStrategies
from bilevel.hypergrad.evolution.nres import NRES
from bilevel.hypergrad.evolution.pes import PES
from bilevel.testing import assert_close, assert_trees_close, gradient_by_differences
from bilevel.testing.toy_problems import (
    OnlineES,
    OnlineUnroll,
    influence_balancing,
    learning_rate_schedule,
    noisy_quadratic,
)

NO_TASK = bl.Task(None, None)
KEY = jax.random.key(0)
Z = 3.29  # 99.9% of a normal distribution lie within ±3.29
NUM_STEPS = 7


def linear(num_steps=NUM_STEPS, noise=0.0):
    """Gradient descent on a quadratic that θ moves: every φₖ is linear and F is quadratic in θ."""
    a = jnp.array([[1.0, 0.4], [0.4, 0.5]])

    def inner_loss(params, meta, batch, key):
        push = meta["push"] + noise * jax.random.normal(key, (2,))
        return 0.5 * params @ a @ params - params @ push

    problem = bl.Problem(
        init=lambda meta, key: meta["init"] + noise * jax.random.normal(key, (2,)),
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - 1.0) ** 2),
    )
    meta = {"init": jnp.array([0.5, -1.0]), "push": jnp.array([0.3, 0.8])}
    return problem, bl.inner.Gradient(optax.sgd(0.3), num_steps), meta


def exact(problem, solver, meta, key=KEY):
    """The gradient of the mean of the outer losses after each step."""
    return jax.jit(lambda m: MultiStep().estimate(problem, solver, m, NO_TASK, jnp.int32(0), key)[0])(meta)


def calls(estimator, problem, solver, meta, keys, state=None, task=NO_TASK):
    """One estimate after another, one a key: the last state, and leaves `[len(keys), ...]`."""

    @jax.jit
    def run(meta, keys, state):
        if state is None:
            state = estimator.init(problem, solver, meta, task, keys[0])

        def call(state, key):
            h, state = estimator.estimate(problem, solver, meta, task, state, key)
            return state, h

        return jax.lax.scan(call, state, keys)

    return run(meta, keys, state)


def lives(estimator, problem, solver, meta, times=1500):
    """Means of the estimates over whole lives: leaves `[times, ...]`."""
    windows = -(-solver.num_steps // estimator.truncation)

    @jax.jit
    def run(meta, keys):
        def life(key):
            h = calls(estimator, problem, solver, meta, jax.random.split(key, windows))[1]
            return jax.tree.map(lambda leaf: leaf.mean(0), h)

        return jax.lax.map(life, keys)

    return run(meta, jax.random.split(jax.random.key(1), times))


def z_scores(samples, expected):
    """How many standard errors the mean of samples `[R, ...]` is off, for all leaves in one vector."""
    samples = np.concatenate([np.asarray(s).reshape(len(s), -1) for s in jax.tree.leaves(samples)], axis=1)
    expected = np.concatenate([np.ravel(e) for e in jax.tree.leaves(expected)])
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    return np.abs(samples.mean(axis=0) - expected) / error


# Unbiased, where truncation is not


def test_the_reference_agrees_with_differences(x64):
    problem, solver, meta = linear()
    value, grad = gradient_by_differences(lambda m: exact(problem, solver, m).value, meta)
    got = exact(problem, solver, meta)
    assert_close("value", got.value, value, 1e-12)
    assert_trees_close("grad", got.grad, grad, 1e-7)


@pytest.mark.parametrize(
    ("kind", "truncation"), [(PES, 1), (PES, 2), (PES, 3), (PES, 7), (NRES, 1), (NRES, 3)]
)
def test_unbiased_for_every_truncation(x64, kind, truncation):
    problem, solver, meta = linear()
    h = lives(kind(0.3, 2, truncation), problem, solver, meta)
    expected = exact(problem, solver, meta)
    assert np.all(z_scores(h.grad, expected.grad) < Z)
    assert np.any(z_scores(h.grad, jax.tree.map(lambda g: 1.5 * g, expected.grad)) > Z)


@pytest.mark.parametrize("truncation", [1, 3])
def test_truncated_evolution_strategies_are_biased(x64, truncation):
    problem, solver, meta = linear()
    expected = exact(problem, solver, meta).grad
    h = lives(OnlineES(0.3, 2, truncation), problem, solver, meta)
    assert np.max(z_scores(h.grad, expected)) > 10
    # and so is truncated backpropagation, to the same wrong answer
    online = lives(OnlineUnroll(truncation), problem, solver, meta, times=1)
    wrong = jax.tree.map(lambda leaf: leaf[0], online.grad)
    assert np.all(z_scores(h.grad, wrong) < Z)


def test_online_unroll_over_one_window_is_exact(x64):
    problem, solver, meta = linear()
    online = lives(OnlineUnroll(NUM_STEPS), problem, solver, meta, times=1)
    assert_trees_close(
        "grad", jax.tree.map(lambda g: g[0], online.grad), exact(problem, solver, meta).grad, 1e-12
    )


@pytest.mark.parametrize("kind", [PES, NRES])
def test_one_step_is_evolution_strategies(x64, kind):
    problem, solver, meta = linear(num_steps=1)
    plain = calls(EvolutionStrategies(0.3, 9), problem, solver, meta, KEY[None])[1]
    h = calls(kind(0.3, 9, 1), problem, solver, meta, KEY[None])[1]
    assert_trees_close("grad", h.grad, plain.grad, 1e-12)
    assert_close("error", h.stats["standard_error"], plain.stats["standard_error"], 1e-9)


# A life


@pytest.mark.parametrize(("kind", "truncation"), [(PES, 1), (PES, 3), (PES, 7), (NRES, 3)])
def test_a_life_is_a_solve(x64, kind, truncation):
    """Noisy starts and gradients: step for step the loop that `solve` runs with the first call's key."""
    problem, solver, meta = linear(noise=1.0)
    estimator = kind(1e-9, 2, truncation)
    keys = jax.random.split(jax.random.key(5), estimator.num_windows(solver))
    state, h = calls(estimator, problem, solver, meta, keys)
    inner_key = jax.random.split(keys[0])[0]
    params = solver.solve(problem, meta, NO_TASK, inner_key).params
    assert_close("params", state.inner.params, np.broadcast_to(params, (2, 2, 2)), 1e-7)
    assert_close("steps", state.inner.step, np.full((2, 2), NUM_STEPS), 0)
    assert not np.any(state.window)
    reference = exact(problem, solver, meta, keys[0])
    assert_close("mean loss", h.value.mean(), reference.value, 1e-7)
    assert_close("windows", h.stats["window"], np.arange(len(keys)), 0)


@pytest.mark.parametrize(("kind", "truncation"), [(PES, 2), (PES, 3), (NRES, 3)])
def test_the_next_life_knows_nothing_of_the_last(x64, kind, truncation):
    problem, solver, meta = linear(noise=1.0)
    estimator = kind(0.3, 3, truncation)
    windows = estimator.num_windows(solver)
    keys = jax.random.split(jax.random.key(5), 2 * windows)
    twice = calls(estimator, problem, solver, meta, keys)[1]
    again = calls(estimator, problem, solver, meta, keys[windows:])[1]
    assert_trees_close("h", jax.tree.map(lambda leaf: leaf[windows:], twice), again, 1e-12)


def test_the_noise_of_a_life(x64):
    problem, solver, meta = linear(num_steps=6)
    keys = jax.random.split(KEY, 3)
    for kind, of_all in ((PES, lambda e: e.sum(0)), (NRES, lambda e: e[0])):
        estimator = kind(0.3, 400, 2)
        state = estimator.init(problem, solver, meta, NO_TASK, KEY)
        seen = []
        for key in keys:
            state = calls(estimator, problem, solver, meta, key[None], state)[0]
            seen.append(state.noise["push"])
        steps = np.diff(np.stack(seen), axis=0, prepend=0 * np.asarray(seen[:1]))
        assert_close("noise", seen[-1], of_all(steps), 1e-12)
        size = np.mean(np.square(seen[-1]))
        assert abs(size - (3 if kind is PES else 1)) < 0.4  # three windows of variance 1, or one


def test_staggered_particles_see_all_windows_at_once(x64):
    problem, solver, meta = linear(num_steps=6)
    estimator = PES(0.3, 6, 2, staggered=True)
    state = jax.jit(lambda meta: estimator.init(problem, solver, meta, NO_TASK, KEY))(meta)
    assert sorted(np.asarray(state.end).tolist()) == [1, 1, 2, 2, 3, 3]
    state, _ = calls(estimator, problem, solver, meta, jax.random.split(KEY, 3), state)
    _, h = calls(estimator, problem, solver, meta, jax.random.split(jax.random.key(1), 5), state)
    assert_close("mean window", h.stats["window"], np.ones(5), 1e-12)

    @jax.jit
    def one_call(key):  # after the first lives every single call is unbiased
        keys = jax.random.split(key, 6)
        state, _ = calls(estimator, problem, solver, meta, keys)
        return estimator.estimate(problem, solver, meta, NO_TASK, state, key)[0]

    h = jax.jit(lambda keys: jax.lax.map(one_call, keys))(jax.random.split(jax.random.key(2), 1500))
    assert np.all(z_scores(h.grad, exact(problem, solver, meta).grad) < Z)


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_change_nothing(x64, chunk):
    problem, solver, meta = linear(noise=1.0)
    keys = jax.random.split(KEY, 5)
    states, hs = zip(*(calls(PES(0.3, 5, 3, chunk=c), problem, solver, meta, keys) for c in (None, chunk)))
    assert_trees_close("h", hs[1], hs[0], 1e-12)
    assert_close("params", states[1].inner.params, states[0].inner.params, 1e-12)


def test_an_adaptive_optimizer_keeps_its_moments(x64):
    problem, _, meta = linear()
    meta["log_rate"] = jnp.array(-2.0)
    solver = bl.inner.Gradient(lambda meta: optax.adam(jnp.exp(meta["log_rate"]), eps=0.1), NUM_STEPS)
    h = lives(PES(1e-3, 20, 2), problem, solver, meta, times=400)
    assert np.all(z_scores(h.grad, exact(problem, solver, meta).grad) < Z)


# Variance


def test_variance(x64):
    """Of losses that see their own window's θ alone, f(φₖ) = ⟨a, θ⟩: at call t (t d + 1) |a|² / N for PES,
    (d + 1) |a|² / N for NRES. In the mean of a life PES's calls average out, NRES's do not."""
    slope, windows = jnp.array([1.0, -2.0, 0.5]), 6
    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(3),
        inner_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - meta) ** 2),
        outer_loss=lambda params, meta, batch, key: params @ slope,
    )
    solver = bl.inner.Gradient(optax.sgd(1.0), windows)

    def measured(estimator):
        @jax.jit
        def run(keys):
            def life(key):
                return calls(estimator, problem, solver, jnp.zeros(3), jax.random.split(key, windows))[1].grad

            return jax.lax.map(life, keys)

        grads = run(jax.random.split(jax.random.key(1), 6000))  # [6000, windows, 3]
        return np.var(grads, axis=0).sum(-1), np.var(grads.mean(1), axis=0).sum()

    size, ages = float(jnp.sum(slope**2)), np.arange(1, windows + 1)
    for num_pairs in (1, 4):
        by_call, of_life = measured(PES(0.1, num_pairs, 1))
        assert_close("PES", by_call, (3 * ages + 1) * size / num_pairs, 0.12)
        assert_close("PES, life", of_life, np.mean(3 * ages + 1) / windows * size / num_pairs, 0.12)
        by_call, of_life = measured(NRES(0.1, num_pairs, 1))
        assert_close("NRES", by_call, np.full(windows, 4) * size / num_pairs, 0.12)
        assert_close("NRES, life", of_life, 4 * size / num_pairs, 0.12)


# The published toys


def test_influence_balancing_turns_its_sign(x64):
    def slope(num_steps):
        toy = influence_balancing(num_steps)
        return jax.grad(lambda theta: toy.solver.solve(toy.problem, theta, NO_TASK, KEY).params[0])(0.5)

    assert_close("slopes", [slope(1), slope(10), slope(300)], [1.0, 10.0, -6.0], 1e-9)
    assert slope(40) > 0 > slope(41)


def descend(toy, estimator, optimizer, num_meta_steps):
    """θ after some outer steps."""
    meta = jnp.asarray(toy.meta)

    @jax.jit
    def run(meta):
        def step(carry, key):
            meta, state, opt_state = carry
            h, state = estimator.estimate(toy.problem, toy.solver, meta, toy.task, state, key)
            updates, opt_state = optimizer.update(h.grad, opt_state, meta)
            return (optax.apply_updates(meta, updates), state, opt_state), None

        state = estimator.init(toy.problem, toy.solver, meta, toy.task, KEY)
        keys = jax.random.split(KEY, num_meta_steps)
        return jax.lax.scan(step, (meta, state, optimizer.init(meta)), keys)[0][0]

    return run(meta)


def test_influence_balancing(x64):
    toy = influence_balancing(3000)
    assert abs(descend(toy, PES(0.1, 200, 1), optax.sgd(1e-4), 3000) + 1 / 6) < 1e-3
    assert descend(toy, OnlineUnroll(1), optax.sgd(1e-4), 3000) > 2  # away from −1/6
    assert descend(toy, OnlineES(0.1, 100, 1), optax.sgd(1e-4), 3000) > 2


def test_a_short_horizon_points_the_wrong_way(x64):
    toy = noisy_quadratic(1000)
    assert exact(toy.problem, toy.solver, jnp.asarray(toy.meta)).grad < 0  # a larger rate is better
    assert descend(toy, PES(0.1, 10, 10), optax.adam(1e-2), 1000) > toy.meta + 0.3
    assert descend(toy, OnlineUnroll(10), optax.adam(1e-2), 1000) < toy.meta - 0.3


def test_the_schedule_is_worth_learning(x64):
    toy = learning_rate_schedule()
    values = [
        exact(toy.problem, toy.solver, jnp.array(at)).value
        for at in ((-4.6, -4.6), (0.14, -0.78), (2.78, -2.26))
    ]
    assert values[0] > values[1] > 4 * values[2]  # start, what truncation finds, what there is


# The rest of the contract


def test_over_tasks_in_outer_steps(x64):
    problem, solver, meta = linear()
    problem = replace(
        problem, outer_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - batch) ** 2)
    )
    learner = bl.Learner(problem, solver, PES(0.1, 4, 3), init_meta=lambda key: meta)

    def sample(key):  # new tasks at every step: the particles go on with them
        return bl.Task(jnp.zeros((2, 1)), jax.random.normal(key, (2, 2)))

    optimizer = optax.adam(1e-2)
    traces = []

    @jax.jit
    def step(state):
        traces.append(1)
        return bl.meta_step(learner, optimizer, state, sample(jax.random.fold_in(KEY, state.step)))

    state = bl.init_state(learner, optimizer, sample, KEY)
    shapes = jax.tree.map(jnp.shape, state)
    for windows_done in (1, 2, 0, 1):
        state, metrics = step(state)
        assert np.all(np.asarray(state.estimator_state.window) == windows_done)
        assert bool(metrics.finite.all())
    assert len(traces) == 1 and jax.tree.map(jnp.shape, state) == shapes


def test_a_leaf_that_nothing_reads_gets_exactly_zero():
    problem, solver, meta = linear()
    _, h = calls(PES(0.1, 3, 2), problem, solver, meta | {"idle": jnp.ones(2)}, KEY[None])
    assert not np.any(h.grad["idle"]) and h.stats["zero_leaves"] == 1


@pytest.mark.parametrize("kind", [PES, NRES])
def test_refusals_name_the_fault_and_the_remedy(kind):
    problem, solver, meta = linear()

    @dataclass(frozen=True)
    class ClosedForm:
        def solve(self, problem, meta, task, key):
            return bl.Solution(meta, {})

    with pytest.raises(TypeError, match=r"ClosedForm has no steps.*EvolutionStrategies.*bl\.inner\.Gradient"):
        bl.Learner(problem, ClosedForm(), kind(0.1, 2, 1))
    with pytest.raises(ValueError, match="truncation=8 is longer than the inner loop of num_steps=7"):
        bl.Learner(problem, solver, kind(0.1, 2, 8))
    for fields in ({"sigma": -1.0}, {"num_pairs": 0}, {"truncation": 0}, {"chunk": -2}):
        with pytest.raises(ValueError, match=f"{kind.__name__}.{next(iter(fields))} must be"):
            kind(**{"sigma": 0.1, "num_pairs": 2, "truncation": 1, **fields})
    with pytest.raises(TypeError, match=r"meta\['n'\] is int32"):
        bl.hypergradient(problem, solver, kind(0.1, 2, 1), meta | {"n": 3}, NO_TASK, KEY)
    assert kind(0.1, 2, 1).doubts({"standard_error": 0.9}) and not kind(0.1, 2, 1).doubts({})


@pytest.mark.parametrize("kind", [PES, NRES])
def test_a_first_window_alone_is_named(kind):
    problem, solver, meta = linear()
    estimator = kind(0.1, 200, 2)
    stats = calls(estimator, problem, solver, meta, jax.random.split(KEY, 4))[1].stats
    first, second = ({name: float(leaf[i]) for name, leaf in stats.items()} for i in (0, 1))
    (sentence,) = estimator.doubts(first)
    assert "the first of 4 windows alone, 2 inner steps" in sentence and "truncation=num_steps" in sentence
    assert not estimator.doubts(second)
    whole = kind(0.1, 200, NUM_STEPS)
    stats = calls(whole, problem, solver, meta, KEY[None])[1].stats
    assert not whole.doubts({name: float(leaf[0]) for name, leaf in stats.items()})
