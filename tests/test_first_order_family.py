"""Estimators from first derivatives only: what they approximate, to which order, and what they say of it."""

from dataclasses import dataclass, replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bilevel_references import (
    REFERENCES,
    as_arrays,
    floats,
    last,
    logistic,
    quadratic,
    repeat,
    ridge,
    weighted,
)
from first_order_tools import KEY, LONG, distance, flat, run

import bilevel as bl
from bilevel.hypergrad import FirstOrderWarning
from bilevel.hypergrad.first_order.bome import Bome
from bilevel.hypergrad.first_order.finite_difference import FiniteDifference
from bilevel.hypergrad.first_order.penalty import Penalty
from bilevel.hypergrad.first_order.reptile import Reptile
from bilevel.hypergrad.first_order.sama import Sama
from bilevel.hypergrad.residuals import cancellation, ratio
from bilevel.testing import assert_close, assert_trees_close
from bilevel.testing import quadratic as unrolled_quadratic

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.hypergrad.doubts.HypergradientWarning")
# Reptile


@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_reptile_on_a_quadratic_is_the_way_back(x64, num_steps):
    """φ₀ − φ_K = (I − (I − αA)^K)(φ₀ − φ*)."""
    reference = quadratic()
    solution = reference.solution(reference.meta)[0]["w"]
    start, task = as_arrays(reference)
    hessian = np.asarray(
        jax.hessian(lambda w: reference.problem.inner_loss({"w": w}, start, task.support, None))(jnp.ones(4))
    )
    meta = {**reference.meta, "start": np.random.default_rng(1).normal(size=(2,))}
    lift = np.random.default_rng(2).normal(size=(4, 2))
    problem = replace(reference.problem, init=lambda meta, key: {"w": jnp.tanh(lift @ meta["start"])})
    solver = bl.inner.Gradient(optax.sgd(0.2), num_steps)
    with pytest.warns(FirstOrderWarning, match=r"Reptile gives meta\['theta'\] .*exactly zero.*Mixed\(\)"):
        h = run(Reptile(), reference._replace(problem=problem), solver, jax.tree.map(jnp.asarray, meta))
    start = np.tanh(lift @ meta["start"])
    power = np.linalg.matrix_power(np.eye(4) - 0.2 * hessian, num_steps)
    way = (np.eye(4) - power) @ (start - solution)
    expected = {"start": lift.T @ ((1 - start**2) * way), "theta": np.zeros(3)}
    assert_trees_close("reptile", h.grad, expected, 1e-12)
    assert h.stats["zero_leaves"] == 1 and h.stats["finite"] == 1 and "inner_loss" in h.stats
    phi = start - way
    value = 0.5 * np.sum((phi - reference.task.query) ** 2) + 0.05 * np.sum(reference.meta["theta"] ** 2)
    assert_close("value", h.value, value, 1e-12)


def test_an_outer_step_of_reptile_moves_towards_the_mean_of_the_ends(x64):
    """θ + ε mean(φ_K − θ), whatever the queries are."""
    case = unrolled_quadratic(5)
    problem, solver = case.problem, bl.inner.Gradient(optax.adam(0.1, b1=0.0), 5)
    rng = np.random.default_rng(0)
    tasks = bl.Task(jnp.array(rng.normal(size=(3, 4))), jnp.array(rng.normal(size=(3, 4))))
    learner = bl.Learner(problem, solver, Reptile())
    meta = jax.tree.map(jnp.asarray, {**case.meta, "log_rate": 0.0})

    def step(tasks):
        state = bl.init_state(learner, optax.sgd(0.25), lambda key: tasks, KEY, meta=meta)
        return bl.meta_step(learner, optax.sgd(0.25), state, tasks)[0].meta["init"]

    with pytest.warns(FirstOrderWarning):
        moved = step(tasks)
        assert_close("query", step(tasks._replace(query=tasks.query + 7.0)), moved, 1e-12)
    ends = [
        solver.solve(problem, meta, jax.tree.map(lambda leaf, i=i: leaf[i], tasks), KEY).params
        for i in range(3)
    ]
    assert_close("moved", moved, meta["init"] + 0.25 * (np.mean(ends, 0) - meta["init"]), 1e-12)


# Penalty


@pytest.mark.parametrize("reference", REFERENCES)
def test_penalty_has_a_bias_of_one_over_the_multiplier(x64, reference):
    reference = REFERENCES[reference]()
    exact, errors = reference.solution(reference.meta)[2], []
    for multiplier in (1e2, 1e3, 1e4):
        h = run(Penalty(multiplier), reference)
        assert_trees_close("penalty", h.grad, reference.penalty(reference.meta, multiplier), 1e-7)
        assert Penalty(multiplier).doubts(floats(h.stats)) == []
        assert h.stats["inner_residual"] < 1e-8 and h.stats["multiplier"] == multiplier
        errors.append(distance(h.grad, exact))
    assert errors[0] > 1e-4
    assert 9 < errors[0] / errors[1] < 11 and 9.5 < errors[1] / errors[2] < 10.5


def test_early_stopped_penalties_keep_their_error_from_growing_with_the_multiplier(x64):
    """Both solves start at the same place, so what they leave undone cancels; it is told all the same."""
    reference, solver = weighted(), bl.inner.Gradient(optax.sgd(0.3), num_steps=8)
    exact, errors = reference.solution(reference.meta)[2], []
    for multiplier in (1e3, 1e5, 1e7):
        h = run(Penalty(multiplier), reference, solver)
        errors.append(distance(h.grad, exact))
        said = Penalty(multiplier).doubts(floats(h.stats))
        assert any("linear_residual is" in s and "num_steps" in s and "Mixed()" in s for s in said), said
    assert errors[0] > 0.01 and max(errors) < 1.2 * min(errors)
    longer = [
        distance(run(Penalty(1e7), reference, replace(solver, num_steps=k)).grad, exact)
        for k in (8, 16, 32, 64)
    ]
    assert all(b < 0.7 * a for a, b in pairwise(longer))


@pytest.mark.parametrize("name", ["ridge", "weighted"])
def test_penalty_tells_when_float32_has_eaten_the_difference(name):
    reference = REFERENCES[name]()
    good, bad = Penalty(100.0), Penalty(1e6)
    h = run(good, reference, dtype=jnp.float32)
    assert distance(h.grad, reference.penalty(reference.meta, 100.0)) < 0.01
    assert not any("rounding error" in sentence for sentence in good.doubts(floats(h.stats)))
    h = run(bad, reference, dtype=jnp.float32)
    assert distance(h.grad, reference.penalty(reference.meta, 1e6)) > 0.01
    assert any("lower the multiplier, or use float64" in sentence for sentence in bad.doubts(floats(h.stats)))


def test_penalty_grows_with_each_call(x64):
    reference, estimator = ridge(), Penalty(10.0, growth=5.0)
    h, state = repeat(estimator, LONG, reference, 3)
    assert state == 3 and list(np.asarray(h.stats["multiplier"])) == [10.0, 15.0, 20.0]
    assert_trees_close("grown", last(h).grad, reference.penalty(reference.meta, 20.0), 1e-7)


@dataclass(frozen=True)
class Loop:
    """Gradient descent in a while loop: no reverse mode goes through it."""

    def solve(self, problem, meta, task, key):
        init_key, step_key = jax.random.split(key)

        def gradient(params):
            return jax.grad(problem.inner_loss)(params, meta, task.support, step_key)

        def unsettled(carry):
            return (carry[1] < 5000) & (jnp.max(jnp.abs(gradient(carry[0]))) > 1e-10)

        params, _ = jax.lax.while_loop(
            unsettled,
            lambda carry: (carry[0] - 0.3 * gradient(carry[0]), carry[1] + 1),
            (problem.init(meta, init_key), 0),
        )
        return bl.Solution(params, {})


@pytest.mark.parametrize(
    "estimator", [Penalty(1e4), FiniteDifference(0.3)], ids=["penalty", "finite-difference"]
)
def test_solvers_that_cannot_be_differentiated_will_do(x64, estimator):
    reference = logistic()
    assert_trees_close("loop", run(estimator, reference, Loop()).grad, run(estimator, reference).grad, 1e-5)


def test_penalty_refuses_a_closed_form():
    @dataclass(frozen=True)
    class ClosedForm:
        closed_form = True

        def solve(self, problem, meta, task, key):
            return bl.Solution(meta, {})

    with pytest.raises(TypeError, match=r"ClosedForm solves a problem of its own; use bl\.hypergrad\.Mixed"):
        bl.Learner(ridge().problem, ClosedForm(), Penalty(10.0))


# BOME


@pytest.mark.parametrize("multiplier", [30.0, 300.0])
@pytest.mark.parametrize("seed", [0, 2])
def test_bome_settles_at_a_penalty_of_a_known_multiplier(x64, seed, multiplier):
    reference = quadratic(seed)
    params, _, grad = reference.solution(reference.meta)
    meta, task = as_arrays(reference)
    params = jax.tree.map(jnp.asarray, params)
    direct = jax.grad(reference.problem.outer_loss, 1)(params, meta, task.query, None)
    slope = flat(jax.grad(reference.problem.outer_loss)(params, meta, task.query, None))
    indirect = flat(grad) - flat(direct)
    # λ = η (‖∂φ f‖² + ‖c‖²) / ⟨c, dF/dθ⟩, solved for η
    barrier = multiplier * (indirect @ flat(grad)) / (slope @ slope + indirect @ indirect)
    assert barrier > 0
    estimator = Bome(rate=0.3 / multiplier, barrier=float(barrier))
    near = replace(reference.problem, init=lambda meta, key: jax.tree.map(lambda leaf: leaf + 1e-3, params))
    solver = replace(LONG, num_steps=60)
    h, _ = repeat(estimator, solver, reference._replace(problem=near), 3000)
    end = last(h)
    assert end.stats["linear_residual"] < 0.05 and end.stats["constraint"] >= 0
    assert abs(end.stats["multiplier"] / multiplier - 1) < 3 / multiplier + 0.05
    assert_trees_close("bome", end.grad, reference.penalty(reference.meta, end.stats["multiplier"]), 0.02)
    assert distance(end.grad, grad) < 20 / multiplier


def test_bome_tells_when_the_inner_steps_climb(x64):
    reference = quadratic()
    climbing = bl.inner.Gradient(optax.sgd(3.0), num_steps=5)
    h = run(Bome(0.1), reference, climbing)
    assert any("do not lower the inner loss" in sentence for sentence in Bome(0.1).doubts(floats(h.stats)))
    h = run(Bome(0.1), reference)
    assert [s for s in Bome(0.1).doubts(floats(h.stats)) if "climb" in s or "lower the inner loss" in s] == []


def test_bome_may_rest_in_training():
    """Below its constraint the direction of a leaf that acts through the inner loop alone is exactly 0."""
    problem = bl.Problem(
        init=lambda meta, key: jnp.float32(1.0),
        inner_loss=lambda params, meta, batch, key: 0.5 * (params - meta) ** 2,
        outer_loss=lambda params, meta, batch, key: 5.0 * params + 0.0 * meta,
    )
    learner = bl.Learner(problem, bl.inner.Gradient(optax.sgd(0.5), 3), Bome(1e-3))
    optimizer, sample = optax.sgd(0.1), lambda key: bl.Task(jnp.zeros(1), jnp.zeros(1))
    state = bl.init_state(learner, optimizer, sample, jax.random.key(0), jnp.float32(0.0))
    assert int(bl.train(learner, optimizer, sample, state, 3).step) == 3


def test_bome_at_the_inner_solution_is_the_direct_gradient(x64):
    """q and its gradient are 0 there, and 0/0 must not become NaN."""
    reference = quadratic()
    w = jnp.asarray(reference.solution(reference.meta)[0]["w"])

    @dataclass(frozen=True)
    class Exact:
        def solve(self, problem, meta, task, key):
            return bl.Solution(problem.init(meta, key), {})

    problem = replace(reference.problem, init=lambda meta, key: {"w": w})
    h = run(Bome(0.1), reference._replace(problem=problem), Exact())
    assert h.stats["finite"] == 1
    assert_trees_close("direct", h.grad, {"theta": 0.1 * reference.meta["theta"]}, 1e-10)


# All of them


ALL = [Penalty(100.0), Bome(0.1), FiniteDifference(0.3), Sama()]


@pytest.mark.filterwarnings("ignore::bilevel.FirstOrderWarning")
@pytest.mark.parametrize("estimator", [*ALL, Reptile()], ids=lambda e: type(e).__name__)
def test_leaves_out_of_sight_are_zero_and_named(x64, estimator):
    reference = ridge()
    meta = {**as_arrays(reference)[0], "rate": jnp.array(0.3), "start": jnp.ones(3)}
    problem = replace(reference.problem, init=lambda meta, key: meta["start"])
    solver = bl.inner.Gradient(lambda meta: optax.sgd(meta["rate"]), 3)
    zero = ("penalty", "rate") if isinstance(estimator, Reptile) else ("rate", "start")
    named = ", ".join(rf"meta\['{name}'\]" for name in zero)
    with pytest.warns(
        FirstOrderWarning, match=rf"{type(estimator).__name__} gives {named} .*Mixed\(\)"
    ) as said:
        h = run(estimator, reference._replace(problem=problem), solver, meta)
    assert len([w for w in said if w.category is FirstOrderWarning]) == 1
    assert h.stats["zero_leaves"] == 2 and not any(np.any(h.grad[name]) for name in zero)
    with pytest.raises(TypeError, match=r"meta\['steps'\] is int32"):
        run(estimator, reference._replace(problem=problem), solver, {**meta, "steps": jnp.int32(3)})


@pytest.mark.filterwarnings("ignore::bilevel.FirstOrderWarning")
@pytest.mark.parametrize("estimator", [*ALL, Reptile()], ids=lambda e: type(e).__name__)
def test_two_tasks_under_vmap_equal_one_by_one(x64, estimator):
    first, second, solver = weighted(0), weighted(1), bl.inner.Gradient(optax.sgd(0.3), 5)
    meta = {**as_arrays(first)[0], "start": jnp.ones(3)}
    problem = replace(first.problem, init=lambda meta, key: meta["start"])
    tasks = jax.tree.map(lambda a, b: jnp.stack([a, b]), as_arrays(first)[1], as_arrays(second)[1])

    def call(task):
        state = estimator.init(problem, solver, meta, task, KEY)
        return estimator.estimate(problem, solver, meta, task, state, KEY)

    together, single = jax.jit(jax.vmap(call))(tasks), jax.jit(call)
    for i in range(2):
        alone = single(jax.tree.map(lambda leaf, i=i: leaf[i], tasks))
        got = jax.tree.map(lambda leaf, i=i: leaf[i], together)
        assert_trees_close("call", jax.tree.leaves(got), jax.tree.leaves(alone), 1e-11)


def test_fields_are_refused_out_of_range():
    for make, field in (
        (lambda: Penalty(0.0), "Penalty.multiplier"),
        (lambda: Penalty(1.0, growth=-1.0), "Penalty.growth"),
        (lambda: Bome(-1.0), "Bome.rate"),
        (lambda: Bome(0.1, barrier=0.0), "Bome.barrier"),
        (lambda: FiniteDifference(float("nan")), "FiniteDifference.step_size"),
        (lambda: FiniteDifference(0.1, epsilon=0), "FiniteDifference.epsilon"),
        (lambda: Sama(epsilon=-0.01), "Sama.epsilon"),
    ):
        with pytest.raises(ValueError, match=field.replace(".", r"\.") + " must be a"):
            make()
    for estimator in (Reptile(), Sama()):
        with pytest.raises(TypeError, match=r"Loop has no steps.*use bl\.inner\.Gradient"):
            bl.Learner(ridge().problem, Loop(), estimator)
        with pytest.raises(ValueError, match="num_steps of at least 1, got 0"):
            bl.Learner(ridge().problem, replace(LONG, num_steps=0), estimator)


def test_ratios_of_nothing():
    zero, one = jnp.float32(0), jnp.float32(1)
    assert ratio(zero, zero) == 0 and ratio(one, zero) == jnp.inf and ratio(one, 2 * one) == 0.5
    assert cancellation({"a": one}, {"a": one}) == jnp.inf and cancellation({"a": zero}, {"a": zero}) == 0
