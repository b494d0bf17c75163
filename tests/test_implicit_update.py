"""Implicit hypergradients of an update, and of one step: other equations, other approximations."""

import warnings
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from implicit_tools import KEY, arrays, floats, quiet, run

import bilevel as bl
from bilevel.hypergrad.implicit.implicit import Implicit
from bilevel.hypergrad.implicit.krylov import gmres
from bilevel.hypergrad.implicit.linear_solvers import cg, direct
from bilevel.hypergrad.implicit.neumann import fixed_point, neumann
from bilevel.hypergrad.implicit.one_step import OneStep
from bilevel.hypergrad.iterations.mixed import Mixed
from bilevel.testing import assert_close, assert_trees_close
from bilevel.testing.implicit_problems import implicit_quadratic, logistic

# The system of the update


@quiet
@pytest.mark.parametrize(
    "linear_solver", [fixed_point(300), gmres(4, system="update"), direct(system="update")]
)
def test_a_fixed_point_that_is_no_minimum(x64, linear_solver):
    """Weight decay in the optimizer: the steps settle where ∇g = −λ φ. The update's own system is right
    there; that of the inner gradient is not, and says so."""
    case = logistic()
    meta, task = arrays(case)
    optimizer = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1.0))
    solver = bl.inner.Gradient(optimizer, 600)

    expected = run(case.problem, solver, Mixed(), meta, task).grad
    h = run(case.problem, solver, Implicit(linear_solver), meta, task)
    assert_trees_close("grad", h.grad, expected, 1e-8)
    assert h.stats["inner_error"] < 1e-10 and h.stats["inner_residual"] > 1e-3
    assert Implicit(linear_solver).doubts(floats(h.stats)) == []

    def value(meta):
        params = Implicit(linear_solver).solve(case.problem, solver, meta, task, KEY)
        return case.problem.outer_loss(params, meta, task.query, KEY)

    assert_trees_close("solve", jax.jit(jax.grad(value))(meta), expected, 1e-8)
    if linear_solver == fixed_point(300):
        assert_trees_close("forward", jax.jit(jax.jacfwd(value))(meta), expected, 1e-8)
        wrong = run(case.problem, solver, Implicit(cg(10)), meta, task)
        assert "inner problem is not solved" in Implicit(cg(10)).doubts(floats(wrong.stats))[0]
        with pytest.raises(AssertionError):
            assert_trees_close("grad", wrong.grad, expected, 1e-2)


@dataclass(frozen=True)
class Preconditioned:
    """φ ← φ − P(θ) ∇g with a matrix P that is not symmetric: neither is the Jacobian of the update."""

    num_steps: int

    def init(self, problem, meta, task, key):
        return bl.inner.GradientState(problem.init(meta, key), (), jnp.int32(0))

    def step(self, problem, meta, task, state, key, gradient=bl.linalg.reverse_gradient):
        loss, g = gradient(problem.inner_loss)(state.params, meta, task.support, key)
        matrix = jnp.array([[0.3, 0.1, 0], [-0.1, 0.3, 0], [0.05, 0, 0.2]]) * meta["rate"]
        return bl.inner.GradientState(state.params - matrix @ g, (), state.step + 1), loss

    def solve(self, problem, meta, task, key):
        state, losses = bl.inner.unroll(problem, self, meta, task, key)
        return bl.Solution(state.params, {"inner_loss": losses[-1]})


@quiet
def test_fixed_point_of_a_preconditioned_solver_of_ones_own(x64):
    a = jnp.asarray(np.diag([1.0, 2.0, 3.0]) + 0.3)
    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(3),
        inner_loss=lambda params, meta, batch, key: 0.5 * params @ a @ params - params @ meta["tie"],
        outer_loss=lambda params, meta, batch, key: jnp.sum((params - 1) ** 2),
    )
    meta = {"tie": jnp.array([1.0, -2.0, 0.5]), "rate": 1.0}
    expected = {"tie": np.linalg.solve(a, 2 * (np.linalg.solve(a, meta["tie"]) - 1)), "rate": 0.0}
    errors = []
    for count in (1, 10, 100):
        h = run(problem, Preconditioned(400), Implicit(fixed_point(count)), meta, bl.Task(None, None))
        errors.append(np.linalg.norm(h.grad["tie"] - expected["tie"]))
        doubted = bool(Implicit(fixed_point(count)).doubts(floats(h.stats)))
        assert doubted == (h.stats["linear_residual"] > 1e-2)
    assert np.all(np.diff(errors) < 0) and doubted is False
    assert_trees_close("grad", h.grad, expected, 1e-9)


def test_the_update_must_be_a_function_of_params_alone():
    case = logistic()
    for optimizer in (optax.sgd(0.1, momentum=0.9), optax.adam(0.1)):
        solver = bl.inner.Gradient(optimizer, 3)
        with pytest.raises(TypeError, match=r"carries . arrays of floats.*without state.*hypergrad\.cg"):
            bl.hypergradient(case.problem, solver, Implicit(fixed_point(3)), *arrays(case), KEY)
    # A schedule counts its steps and no more.
    scheduled = bl.inner.Gradient(optax.sgd(optax.constant_schedule(0.1)), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bl.hypergradient(case.problem, scheduled, Implicit(fixed_point(3)), *arrays(case), KEY)
    for linear_solver in (fixed_point(3), gmres(3, system="update")):
        with pytest.raises(TypeError, match=r"Newton has no steps.*bl\.hypergrad\.cg"):
            bl.Learner(case.problem, case.solver, Implicit(linear_solver))


# One step


@quiet
def test_one_step_is_its_formula_and_tells_its_bias(x64):
    case = implicit_quadratic()
    meta, task = arrays(case)
    hessian, cross = _quadratic_parts(case)
    params = case.solver.solve(case.problem, meta, task, KEY).params
    outer = jax.jit(jax.grad(case.problem.outer_loss))(params, meta, task.query, KEY)
    flat = np.concatenate([outer["w"][0], outer["v"][0].ravel()])
    for rate in (0.01, 0.4):
        h = run(case.problem, case.solver, OneStep(rate), meta, task)
        assert_close("theta", h.grad["inner"]["theta"], rate * cross.T @ flat, 1e-10)
        residual = np.linalg.norm(rate * hessian @ flat - flat) / np.linalg.norm(flat)
        assert_close("linear_residual", h.stats["linear_residual"], residual, 1e-9)
        said = OneStep(rate).doubts(floats(h.stats))
        assert bool(said) == (residual > 0.5)
        assert not said or f"leaves {residual:.2g} of the linear system" in said[0]
        if rate == 0.01:
            continue
        # The same as one term of the Neumann series.
        other = run(case.problem, case.solver, Implicit(neumann(1, rate)), meta, task)
        assert_trees_close("neumann", other.grad, h.grad, 1e-12)

        def value(meta, rate=rate):
            params = OneStep(rate).solve(case.problem, case.solver, meta, task, KEY)
            return case.problem.outer_loss(params, meta, task.query, KEY)

        assert_trees_close("solve", jax.jit(jax.grad(value))(meta), h.grad, 1e-10)
        assert_trees_close("forward", jax.jit(jax.jacfwd(value))(meta), h.grad, 1e-10)


def _quadratic_parts(case):
    """A and B of `implicit_quadratic`, read off its inner loss."""
    _, task = arrays(case)

    def gradient(flat, theta):
        params = {"w": (flat[:4], None), "v": [flat[4:].reshape(2, 1)]}
        g = jax.grad(case.problem.inner_loss)(params, {"inner": {"theta": theta}}, task.support, KEY)
        return jnp.concatenate([g["w"][0], g["v"][0].ravel()])

    hessian, cross = jax.jit(jax.jacobian(gradient, (0, 1)))(jnp.zeros(6), jnp.zeros(3))
    return hessian, -cross


@quiet
def test_one_step_is_exact_where_the_hessian_is_one_over_its_rate(x64):
    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(3),
        inner_loss=lambda params, meta, batch, key: 2.0 * jnp.sum((params - jnp.sin(meta)) ** 2),
        outer_loss=lambda params, meta, batch, key: jnp.sum(params**3),
    )
    meta = jnp.array([0.3, 0.5, -0.2])
    solver = bl.inner.Gradient(optax.sgd(0.25), 1)
    h = run(problem, solver, OneStep(0.25), meta, bl.Task(None, None))
    assert_close("grad", h.grad, 3 * np.sin(meta) ** 2 * np.cos(meta), 1e-12)
    assert h.stats["linear_residual"] < 1e-12 and OneStep(0.25).doubts(floats(h.stats)) == []
