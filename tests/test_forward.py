"""Forward mode: exact whatever the solver, unbiased along random directions, constant in memory."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import bilevel as bl
from bilevel.hypergrad import Mixed, Unroll
from bilevel.hypergrad.iterations.forward import Forward
from bilevel.hypergrad.iterations.pushforward import by_forward_mode
from bilevel.testing import (
    PROBLEMS,
    assert_close,
    assert_derivative,
    assert_matches,
    assert_trees_close,
    quadratic,
)

KEY = jax.random.key(0)
EXACT = ["quadratic-sgd-1", "quadratic-momentum-5", "quadratic-schedule-20", "dead-relu-rates-5"]


@pytest.mark.parametrize("problem", EXACT)
def test_exact(problem):
    assert_matches(Forward(), PROBLEMS[problem]())


@pytest.mark.parametrize("chunk", [1, 3, 8, 100])
def test_exact_in_chunks(chunk):
    assert_matches(Forward(chunk=chunk), quadratic(5, optimizer="momentum"))


def test_no_steps():
    assert_matches(Forward(), quadratic(0))


def as_arrays(case):
    return jax.tree.map(jnp.asarray, (case.meta, case.task))


def test_stats(x64):
    case = quadratic(5)
    meta, task = as_arrays(case)
    h = bl.hypergradient(case.problem, case.solver, Forward(), meta, task, KEY)
    reverse = bl.hypergradient(case.problem, case.solver, Mixed(), meta, task, KEY)
    assert h.stats == {**reverse.stats, "meta_size": 8, "directions": 8}


# Random directions


def estimates(num_directions, num_samples=4000):
    case = quadratic(5)
    meta, task = as_arrays(case)
    estimator = Forward(num_directions=num_directions)

    def run(meta, key):
        h, _ = estimator.estimate(case.problem, case.solver, meta, task, (), key)
        return ravel_pytree(h.grad)[0], h.stats["standard_error"]

    keys = jax.random.split(jax.random.key(7), num_samples)
    return jax.jit(jax.vmap(run, (None, 0)))(meta, keys), case


@pytest.mark.parametrize("num_directions", [1, 4])
def test_random_directions_are_unbiased_with_the_variance_they_state(x64, num_directions):
    """With signs as directions the variance is (m − 1)/n |g|², m = dim θ."""
    (samples, errors), case = estimates(num_directions)
    exact = ravel_pytree(case.exact.grad)[0]
    variance = (exact.size - 1) / num_directions * jnp.sum(exact**2)
    off = jnp.sum((samples.mean(0) - exact) ** 2) / (variance / len(samples))
    assert off < 3  # a mean of chi-squares, 1 in expectation
    assert_close("variance", samples.var(0).sum(), variance, 0.05)
    assert_close("stated", jnp.mean(errors**2), variance, 0.05)


def test_more_directions_than_elements_still_average(x64):
    case = quadratic(5)
    meta, task = as_arrays(case)
    exact = ravel_pytree(case.exact.grad)[0]
    off = []
    for count in (64, 1024, 16384):
        estimator = Forward(num_directions=count, chunk=1024)
        run = jax.jit(lambda m, e=estimator: bl.hypergradient(case.problem, case.solver, e, m, task, KEY))
        h = run(meta)
        error = jnp.linalg.norm(ravel_pytree(h.grad)[0] - exact)
        assert error < 3 * h.stats["standard_error"]
        off.append(float(h.stats["standard_error"]))
    assert_close("rate", np.array(off[:-1]) / off[1:], [4.0, 4.0], 0.1)


def test_doubts():
    assert Forward().doubts({"meta_size": 50.0, "directions": 50.0}) == []
    (sentence,) = Forward().doubts({"meta_size": 5000.0, "directions": 5000.0})
    assert "5000 elements" in sentence and "bl.hypergrad.Mixed()" in sentence
    noisy = {"meta_size": 401.0, "directions": 4.0, "standard_error": 0.25}
    (sentence,) = Forward(num_directions=4).doubts(noisy)
    assert "10 times" in sentence and "0.25" in sentence and "Mixed()" in sentence
    assert Forward(num_directions=500).doubts({**noisy, "directions": 500.0}) == []


# As the steps come


@pytest.mark.parametrize(("optimizer", "chunk"), [("schedule", None), ("momentum", 3)])
def test_trajectory_is_every_prefix(x64, optimizer, chunk):
    case = quadratic(6, optimizer=optimizer)
    meta, task = as_arrays(case)
    h = jax.jit(lambda m: Forward(chunk=chunk).trajectory(case.problem, case.solver, m, task, KEY))(meta)
    for k in range(1, 7):
        exact = quadratic(k, optimizer=optimizer).exact
        assert_close("value", h.value[k - 1], exact.value, 1e-10)
        assert_trees_close("grad", jax.tree.map(lambda leaf, k=k: leaf[k - 1], h.grad), exact.grad, 1e-10)
    losses = bl.inner.unroll(case.problem, case.solver, meta, task, jax.random.split(KEY)[0])[1]
    assert_close("inner_loss", h.stats["inner_loss"], losses, 1e-12)


def test_trajectory_sees_meta_in_the_outer_loss_and_adam(x64):
    problem = bl.Problem(
        init=lambda meta, key: {"w": meta["w"] * jnp.ones(2)},
        inner_loss=lambda p, meta, batch, key: jnp.sum(jnp.cosh(p["w"] - meta["shift"])),
        outer_loss=lambda p, meta, batch, key: jnp.sum(p["w"] ** 2) * meta["shift"],
    )
    meta, task = {"w": jnp.array(0.3), "shift": jnp.array(0.8)}, bl.Task(None, None)
    solver = bl.inner.Gradient(optax.adam(0.1), 3)
    got = Forward().trajectory(problem, solver, meta, task, KEY)
    for k in (1, 3):
        shorter = replace(solver, num_steps=k)
        expected = bl.hypergradient(problem, shorter, Unroll(), meta, task, KEY)
        grad = jax.tree.map(lambda leaf, k=k: leaf[k - 1], got.grad)
        assert_trees_close("grad", grad, expected.grad, 1e-12)


def test_trajectory_needs_steps():
    with pytest.raises(TypeError, match=r"Forward differentiates through the steps.*Newton has no steps"):
        Forward().trajectory(WELL, Newton(), jnp.array(2.0), bl.Task(3.0, 1.0), KEY)


# Any solver: while loops, in both modes and to any order


@dataclass(frozen=True)
class Newton:
    """The minimum of ½φ⁴/2 − θ b φ by Newton's method in a while loop: φ* = (θ b)^(1/3)."""

    def solve(self, problem, meta, task, key):
        def residual(params):
            return jax.grad(problem.inner_loss)(params, meta, task.support, key)

        def step(carry):
            params, count = carry
            return params - residual(params) / jax.grad(residual)(params), count + 1

        params, count = jax.lax.while_loop(lambda c: c[1] < 40, step, (problem.init(meta, key), 0))
        return bl.Solution(params, {"num_steps": count})


WELL = bl.Problem(
    init=lambda meta, key: jnp.ones_like(meta),
    inner_loss=lambda params, meta, batch, key: params**4 / 4 - meta * batch * params,
    outer_loss=lambda params, meta, batch, key: params * batch,
)
TASK = bl.Task(3.0, 5.0)


def test_while_loop(x64):
    meta = jnp.array(2.0)
    root = 6.0 ** (1 / 3)
    learner = bl.Learner(WELL, Newton(), Forward())
    h = jax.jit(lambda m: bl.hypergradient(WELL, learner.solver, Forward(), m, TASK, KEY))(meta)
    assert_close("value", h.value, 5 * root, 1e-12)
    assert_close("grad", h.grad, 5 * root / 6, 1e-12)  # dφ*/dθ = φ*/(3θ)


@pytest.mark.parametrize(
    "order", ["rev", "fwd", "rev-rev", "rev-fwd", "fwd-rev", "rev-rev-rev", "fwd-rev-rev"]
)
def test_solve_to_any_order_through_a_while_loop(x64, order):
    def solution(theta):
        return Forward().solve(WELL, Newton(), theta, TASK, KEY)

    function, exact, power = solution, 3.0 ** (1 / 3), 1 / 3
    for mode in order.split("-"):
        function = {"rev": jax.grad, "fwd": jax.jacfwd}[mode](function)
        exact, power = exact * power, power - 1
    assert_close("derivative", jax.jit(function)(jnp.array(2.0)), exact * 2.0**power, 1e-10)


def test_converged_and_closed_forms(x64):
    """Solvers of the package that have no steps, on ridge regression with a learned penalty."""
    optimistix = pytest.importorskip("optimistix")
    ridge = bl.inner.Ridge(lambda meta, x: x, jnp.exp)
    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(2),
        inner_loss=ridge.loss,
        outer_loss=lambda params, meta, batch, key: jnp.mean((batch[0] @ params - batch[1]) ** 2),
    )
    x = jnp.array(np.random.default_rng(0).normal(size=(8, 2)))
    task, meta = bl.Task((x[:4], x[:4, 0]), (x[4:], jnp.sin(x[4:, 1]))), jnp.array([0.3, -0.4])
    newton = bl.inner.Converged(optimistix.Newton(rtol=1e-12, atol=1e-12))
    expected = jax.jit(lambda m: bl.hypergradient(problem, ridge, Mixed(), m, task, KEY))(meta)
    assert_derivative(
        lambda m: problem.outer_loss(ridge.solve(problem, m, task, KEY).params, m, task.query, KEY),
        expected.grad,
        meta,
    )
    for solver in (ridge, newton):
        got = jax.jit(lambda m, s=solver: bl.hypergradient(problem, s, Forward(), m, task, KEY))(meta)
        assert_close("grad", got.grad, expected.grad, 1e-10)


def test_solve_under_vmap_scan_and_closures(x64):
    """A batch of outer variables, a loop over thetas, and a variable of the outer level in the closure."""

    def summed(theta, scale):
        problem = replace(
            WELL, inner_loss=lambda p, m, b, k: WELL.inner_loss(p, m, b, k) + (scale - 1) * p**4 / 4
        )

        def body(total, factor):
            task = bl.Task(3.0 * factor, None)
            return total + Forward().solve(problem, Newton(), theta, task, KEY), None

        return jax.lax.scan(body, 0.0, jnp.array([1.0, 8.0]))[0]

    def closed(theta, scale):
        return (3 * theta / scale) ** (1 / 3) * 3  # 1 + 8^(1/3)

    at = (jnp.array([2.0, 0.7]), jnp.array([1.0, 1.3]))
    assert_close("value", jax.vmap(summed)(*at), closed(*at), 1e-10)
    for derivative in (jax.grad, jax.jacfwd):
        got, expected = (jax.jit(jax.vmap(derivative(f, argnums=(0, 1))))(*at) for f in (summed, closed))
        assert_trees_close("derivative", got, expected, 1e-10)
    got, expected = (jax.jit(jax.vmap(jax.hessian(f, argnums=(0, 1))))(*at) for f in (summed, closed))
    assert_trees_close("Hessian", got, expected, 1e-10)


def test_solve_of_steps_equals_the_adjoints(x64):
    case = quadratic(5, optimizer="momentum")
    meta, task = as_arrays(case)

    def value(meta, estimator):
        params = estimator.solve(case.problem, case.solver, meta, task, KEY)
        return case.problem.outer_loss(params, meta, task.query, KEY)

    grad = jax.jit(jax.grad(lambda m: value(m, Forward())))(meta)
    assert_trees_close("grad", grad, case.exact.grad, 1e-10)
    vector = jax.tree.map(jnp.cos, meta)
    twice = [
        jax.jit(jax.grad(lambda m, e=e: optax.tree.vdot(jax.grad(lambda n: value(n, e))(m), vector)))(meta)
        for e in (Forward(), Unroll())
    ]
    assert_trees_close("product", *twice, 1e-9)


def test_by_forward_mode_keeps_integers_and_several_outputs(x64):
    def function(x, n):
        return {"a": jnp.sin(x["u"]) * n, "count": n + 1, "b": x["v"] ** 3}

    wrapped = by_forward_mode(function)
    x = {"u": jnp.array([0.2, 0.4]), "v": jnp.float32(2.0)}
    assert jax.tree.all(jax.tree.map(np.array_equal, wrapped(x, 3), function(x, 3)))

    def scalar(f):
        return lambda x: jnp.sum(f(x, 3)["a"]) * f(x, 3)["b"]

    assert_trees_close("grad", jax.grad(scalar(wrapped))(x), jax.grad(scalar(function))(x), 1e-6)
    assert jax.grad(scalar(wrapped))(x)["v"].dtype == jnp.float32


# Memory, and what is refused


def test_memory_does_not_grow_with_the_steps():
    problem = bl.Problem(
        init=lambda meta, key: meta["base"] * jnp.ones((64, 64)),
        inner_loss=lambda params, meta, batch, key: jnp.mean(jnp.sin(params @ batch)) * jnp.exp(meta["log"]),
        outer_loss=lambda params, meta, batch, key: jnp.sum(params**2),
    )
    meta, task = {"base": 1.0, "log": 0.0}, bl.Task(jnp.ones((64, 64)), None)

    def temporary(estimator, num_steps):
        solver = bl.inner.Gradient(optax.sgd(0.1), num_steps)
        run = jax.jit(lambda m: bl.hypergradient(problem, solver, estimator, m, task, KEY).grad)
        return run.lower(meta).compile().memory_analysis().temp_size_in_bytes

    state = 64 * 64 * 4
    # The losses, one number a step, are all that is kept.
    assert temporary(Forward(), 1000) - temporary(Forward(), 50) < 0.3 * state
    assert temporary(Mixed(), 1000) > 10 * temporary(Mixed(), 50)


@pytest.mark.parametrize(
    "options", [{"num_directions": 0}, {"num_directions": True}, {"chunk": 0}, {"chunk": 1.5}]
)
def test_impossible_options(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"Forward.{name} must be None or a whole number of at least 1"):
        Forward(**options)


def test_refusals():
    case = quadratic(2)
    with pytest.raises(TypeError, match=r"meta\['layers'\] is int32"):
        bl.hypergradient(case.problem, case.solver, Forward(), {**case.meta, "layers": 3}, case.task, KEY)
    with pytest.raises(TypeError, match="Forward needs an inner solver with a method solve, got int"):
        bl.Learner(case.problem, 3, Forward())


def test_derivative_of_the_value(x64):
    case = quadratic(5)
    meta, task = as_arrays(case)
    run = jax.jit(lambda m: bl.hypergradient(case.problem, case.solver, Forward(), m, task, KEY))
    assert_derivative(lambda m: run(m).value, run(meta).grad, meta)
