"""The score function: unbiased against full enumeration, with baselines that lower the variance."""

from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad import Mixed, MultiStep, Unroll
from bilevel.hypergrad.evolution.score_function import LeaveOneOut, MovingAverage, ScoreFunction
from bilevel.testing import assert_close, assert_trees_close

KEY = jax.random.key(0)
TASK = bl.Task(jnp.array([0.3, -0.2]), jnp.array([1.0, 0.5]))
Z = 3.29  # 99.9% of a normal distribution lie within ±3.29


def is_choice(path):
    return "choice" in path


def mixture(continuous=True):
    """Which optimizer target and which of three penalties, two choices each; a start that is learned."""
    targets, strengths = jnp.array([[1.0, 2.0], [-1.0, 0.5]]), jnp.array([0.1, 0.5, 2.0])

    def inner_loss(params, meta, batch, key):
        target = meta["choice"]["target"] @ targets.sum(1)  # [2], a row of one-hots each
        strength = meta["choice"]["penalty"] @ strengths
        return 0.5 * jnp.sum((params - target - batch) ** 2) + strength * jnp.sum(params**2)

    def outer_loss(params, meta, batch, key):
        return 5.0 + jnp.sum((params - batch) ** 2)

    problem = bl.Problem(
        lambda meta, key: meta["start"] if continuous else jnp.zeros(2), inner_loss, outer_loss
    )
    meta = {
        "choice": {
            "target": jnp.array([[0.2, -0.3], [0.5, 0.1]]),
            "penalty": jnp.array([0.1, -0.4, 0.3]),
        },
    }
    if continuous:
        meta["start"] = jnp.array([0.7, -0.9])
    return problem, bl.inner.Gradient(optax.sgd(0.2), 3), meta


def enumerate_all(problem, solver, meta):
    """Value and gradient of the exact expectation: every combination with its probability."""

    def expectation(meta):
        total = 0.0
        for i, j, k in product(range(2), range(2), range(3)):
            chance = (
                jax.nn.softmax(meta["choice"]["target"])[0, i]
                * jax.nn.softmax(meta["choice"]["target"])[1, j]
                * jax.nn.softmax(meta["choice"]["penalty"])[k]
            )
            rows = jnp.stack([jax.nn.one_hot(i, 2), jax.nn.one_hot(j, 2)])
            at = meta | {"choice": {"target": rows, "penalty": jax.nn.one_hot(k, 3)}}
            params = solver.solve(problem, at, TASK, KEY).params
            total = total + chance * problem.outer_loss(params, at, TASK.query, KEY)
        return total

    return jax.jit(jax.value_and_grad(expectation))(meta)


def repeat(estimator, problem, solver, meta, times=3000):
    """`times` estimates, the state handed on: leaves `[times, ...]`."""

    @jax.jit
    def run(meta, keys):
        def call(state, key):
            h, state = estimator.estimate(problem, solver, meta, TASK, state, key)
            return state, h

        state = estimator.init(problem, solver, meta, TASK, KEY)
        return jax.lax.scan(call, state, keys)[1]

    return run(meta, jax.random.split(jax.random.key(1), times))


def z_scores(samples, expected):
    """How many standard errors the mean of samples `[R, ...]` is off, for all leaves in one vector."""
    samples = np.concatenate([np.asarray(s).reshape(len(s), -1) for s in jax.tree.leaves(samples)], axis=1)
    expected = np.concatenate([np.ravel(e) for e in jax.tree.leaves(expected)])
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    return np.abs(samples.mean(axis=0) - expected) / error


@pytest.mark.parametrize(
    "estimator",
    [
        ScoreFunction(2, is_choice, Mixed()),
        ScoreFunction(8, is_choice, Unroll()),
        ScoreFunction(1, is_choice, Mixed(), MovingAverage(0.9)),
        ScoreFunction(3, is_choice, Unroll(), MovingAverage(0.0)),
    ],
)
def test_unbiased_against_enumeration(x64, estimator):
    problem, solver, meta = mixture()
    value, grad = enumerate_all(problem, solver, meta)
    h = repeat(estimator, problem, solver, meta)
    assert np.all(z_scores(h.grad, grad) < Z)
    assert np.any(z_scores(h.grad, jax.tree.map(lambda g: 1.3 * g, grad)) > Z)
    assert np.all(z_scores(h.value, value) < Z)


def test_choices_alone_need_no_derivative(x64):
    problem, solver, meta = mixture(continuous=False)
    h = repeat(ScoreFunction(4), problem, solver, meta)
    assert np.all(z_scores(h.grad, enumerate_all(problem, solver, meta)[1]) < Z)
    stepped = bl.Problem(
        problem.init, problem.inner_loss, lambda params, meta, batch, key: jnp.round(jnp.sum(params))
    )
    h = repeat(ScoreFunction(4), stepped, solver, meta)
    assert np.all(z_scores(h.grad, enumerate_all(stepped, solver, meta)[1]) < Z)


def spread(estimator, problem, solver, meta):
    grads = repeat(estimator, problem, solver, meta).grad["choice"]
    return sum(float(np.var(leaf[100:], axis=0).sum()) for leaf in jax.tree.leaves(grads))


class NoBaseline(MovingAverage):
    """For comparison."""

    def advantages(self, losses, state):
        return losses, state


def test_baselines_lower_the_variance(x64):
    problem, solver, meta = mixture(continuous=False)
    none = spread(ScoreFunction(4, baseline=NoBaseline()), problem, solver, meta)
    assert spread(ScoreFunction(4), problem, solver, meta) < none / 3
    assert spread(ScoreFunction(4, baseline=MovingAverage()), problem, solver, meta) < none / 3


def test_variance_falls_with_the_samples(x64):
    problem, solver, meta = mixture(continuous=False)
    few, many = (
        spread(ScoreFunction(n, baseline=MovingAverage(0.99)), problem, solver, meta) for n in (2, 16)
    )
    assert abs(few / many / 8 - 1) < 0.15
    h = repeat(ScoreFunction(16), problem, solver, meta)
    squared = sum(jnp.sum(leaf**2, axis=tuple(range(1, leaf.ndim))) for leaf in jax.tree.leaves(h.grad))
    claimed = jnp.mean(squared * h.stats["standard_error"] ** 2)
    measured = sum(float(np.var(leaf, axis=0).sum()) for leaf in jax.tree.leaves(h.grad))
    assert abs(claimed / measured - 1) < 0.25


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_change_nothing(x64, chunk):
    problem, solver, meta = mixture()
    runs = [
        jax.jit(
            lambda meta, c=c: bl.hypergradient(
                problem, solver, ScoreFunction(5, is_choice, Mixed(), chunk=c), meta, TASK, KEY
            )
        )(meta)
        for c in (None, chunk)
    ]
    assert_trees_close("h", runs[1], runs[0], 1e-12)


def test_the_problem_sees_one_hot_choices():
    seen = []

    def init(meta, key):
        seen.append(jax.tree.map(jnp.shape, meta))
        return meta["choice"] @ jnp.arange(3.0)

    problem = bl.Problem(init, lambda p, m, b, k: 0.0 * p, lambda p, m, b, k: (p - 1.0) ** 2)
    h = bl.hypergradient(
        problem, bl.inner.Gradient(optax.sgd(0.1), 0), ScoreFunction(400), {"choice": jnp.zeros(3)}, TASK, KEY
    )
    assert seen[0] == {"choice": (3,)}
    assert_close("mean loss", h.value, 2 / 3, 0.1)  # (1 + 0 + 1) / 3
    assert_close("entropy", h.stats["entropy"], np.log(3), 1e-6)


def test_learns_the_best_choice(x64):
    problem, solver, meta = mixture(continuous=False)
    learner = bl.Learner(
        problem, solver, ScoreFunction(8, baseline=MovingAverage()), init_meta=lambda key: meta
    )
    tasks = jax.tree.map(lambda leaf: leaf[None], TASK)
    optimizer = optax.adam(0.1)
    state = bl.init_state(learner, optimizer, lambda key: tasks, KEY)
    state = jax.jit(
        lambda state: jax.lax.scan(
            lambda s, _: (bl.meta_step(learner, optimizer, s, tasks)[0], None), state, length=200
        )[0]
    )(state)
    costs = {}
    for i, j, k in product(range(2), range(2), range(3)):
        at = {
            "target": jnp.stack([jax.nn.one_hot(i, 2), jax.nn.one_hot(j, 2)]),
            "penalty": jax.nn.one_hot(k, 3),
        }
        params = solver.solve(problem, {"choice": at}, TASK, KEY).params
        costs[i, j, k] = float(problem.outer_loss(params, None, TASK.query, KEY))
    learned = state.meta["choice"]
    got = (*np.argmax(learned["target"], axis=1).tolist(), int(np.argmax(learned["penalty"])))
    assert got == min(costs, key=costs.get)


def test_refusals_name_the_fault_and_the_remedy():
    problem, solver, meta = mixture()

    def run(estimator, meta=meta):
        return bl.hypergradient(problem, solver, estimator, meta, TASK, KEY)

    with pytest.raises(
        TypeError, match=r"no hypergradient for meta\['start'\].*pass adjoint=bl\.hypergrad\.Mixed"
    ):
        run(ScoreFunction(2, is_choice))
    with pytest.raises(ValueError, match="selects no leaf of meta"):
        run(ScoreFunction(2, lambda path: False, Mixed()))
    with pytest.raises(ValueError, match=r"meta\['rate'\] is a scalar.*num_choices"):
        run(ScoreFunction(2), {"rate": 0.1})
    with pytest.raises(
        ValueError, match=r"adjoint must carry no state, and MultiStep carries one; use .*Mixed"
    ):
        run(ScoreFunction(2, is_choice, MultiStep()))
    with pytest.raises(TypeError, match="has no steps"):
        bl.Learner(problem, object(), ScoreFunction(2, is_choice, Mixed()))
    with pytest.raises(TypeError, match="needs a solver with solve"):
        bl.Learner(problem, object(), ScoreFunction(2))
    with pytest.raises(ValueError, match=r"num_samples must be at least 2 with LeaveOneOut.*MovingAverage"):
        ScoreFunction(1)
    with pytest.raises(ValueError, match="num_samples must be a whole number of at least 1"):
        ScoreFunction(0, baseline=MovingAverage())
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1"):
        MovingAverage(1.0)
    assert ScoreFunction(2).doubts({"standard_error": 0.9}) and not ScoreFunction(2).doubts({})
    assert ScoreFunction(2).baseline == LeaveOneOut()
