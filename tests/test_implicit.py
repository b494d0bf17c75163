"""Implicit hypergradients: right where the inner problem is solved, and frank where it is not."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import pytest
from implicit_tools import KEY, arrays, floats, quiet, run

import bilevel as bl
from bilevel.hypergrad.implicit.implicit import Implicit
from bilevel.hypergrad.implicit.krylov import bicgstab, gmres
from bilevel.hypergrad.implicit.linear_solvers import cg, direct
from bilevel.hypergrad.implicit.neumann import fixed_point, neumann
from bilevel.hypergrad.implicit.nystrom import nystrom
from bilevel.hypergrad.implicit.one_step import OneStep
from bilevel.hypergrad.iterations.unroll import Unroll
from bilevel.inner.converged import Converged
from bilevel.testing import assert_close, assert_derivative, assert_matches, assert_trees_close
from bilevel.testing.implicit_problems import IMPLICIT_PROBLEMS, implicit_quadratic, logistic

LINEAR_SOLVERS = {
    "cg": cg(30),
    "gmres": gmres(6),
    "bicgstab": bicgstab(60),
    "direct": direct(),
    "neumann": neumann(2000, 0.3),
    "nystrom": nystrom(4, 1e-13),
}


# Right answers


@quiet
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *(("cg", problem) for problem in IMPLICIT_PROBLEMS),
        *((name, "logistic") for name in ("direct", "bicgstab", "nystrom")),
        ("gmres", "implicit-quadratic-ill-conditioned"),
        ("neumann", "ridge-penalties"),
    ],
)
def test_table(name, problem):
    assert_matches(Implicit(LINEAR_SOLVERS[name]), IMPLICIT_PROBLEMS[problem]())


def test_the_table_can_fail():
    case = logistic()
    grad = {**case.exact.grad, "weights": case.exact.grad["weights"] * (1 + 1e-8)}
    with pytest.raises(AssertionError, match=r"grad\['weights'\] is off by 1e-08"):
        assert_matches(Implicit(direct()), replace(case, exact=case.exact._replace(grad=grad)))


def test_the_logistic_answer_agrees_with_differences(x64):
    case = logistic()
    _, task = arrays(case)

    def value(meta):
        params = case.solver.solve(case.problem, meta, task, KEY).params
        return case.problem.outer_loss(params, meta, task.query, KEY)

    assert_derivative(jax.jit(value), case.exact.grad, case.meta, tolerance=1e-8)


@quiet
@pytest.mark.parametrize("inner", ["momentum", "adam", "bfgs"])
def test_how_the_solution_was_found_does_not_matter(x64, inner):
    case = logistic()
    meta, task = arrays(case)
    tight = {"rtol": 1e-12, "atol": 1e-12}
    solver = {
        "momentum": bl.inner.Gradient(optax.sgd(1.0, momentum=0.8, nesterov=True), 1500),
        "adam": bl.inner.Gradient(optax.adam(optax.exponential_decay(0.1, 30, 0.8)), 1500),
        "bfgs": Converged(optimistix.BFGS(**tight)),
    }[inner]
    h = run(case.problem, solver, Implicit(cg(4)), meta, task)
    assert_trees_close("grad", h.grad, case.exact.grad, 1e-7)
    assert h.stats["inner_error"] < 1e-8 and h.stats["linear_residual"] < 1e-7
    assert Implicit(cg(4)).doubts(floats(h.stats)) == []


# The faults of others


@quiet
def test_optimistix_inexact_inner_solution_is_told(x64):
    """Optimistix gives 178% / 16% / 0.1% off after 5 / 20 / 100 inner steps, without a word. Here the
    estimated error is within a factor of three of the true one, and the doubt names it until it is small."""
    case = implicit_quadratic()
    meta, task = arrays(case)
    estimator = Implicit(cg(10))
    told = []
    for num_steps in (0, 5, 20, 100):
        solver = bl.inner.Gradient(optax.sgd(0.2), num_steps)
        h = run(case.problem, solver, estimator, meta, task)
        exact = case.solver.solve(case.problem, meta, task, KEY).params
        reached = solver.solve(case.problem, meta, task, jax.random.split(KEY)[0]).params
        scale = max(optax.tree.norm(reached), optax.tree.norm(optax.tree.sub(reached, meta["init"])))
        true = optax.tree.norm(optax.tree.sub(reached, exact)) / scale
        assert true / 3 < h.stats["inner_error"] < 3 * true
        gradient = jax.grad(case.problem.inner_loss)(reached, meta, task.support, KEY)
        assert_close("inner_residual", h.stats["inner_residual"], optax.tree.norm(gradient), 1e-10)
        said = estimator.doubts(floats(h.stats))
        told.append(bool(said))
        if said:
            assert "inner problem is not solved" in said[0] and "Mixed()" in said[0]
            assert f"{float(h.stats['inner_residual']):.3g}" in said[0]
            assert f"{float(h.stats['inner_error']):.2g}" in said[0]
    assert told == [True, True, True, False]


@quiet
def test_the_estimated_error_does_not_depend_on_scales(x64):
    case = implicit_quadratic()
    meta, task = arrays(case)
    solver = bl.inner.Gradient(optax.sgd(0.2), 5)
    plain = run(case.problem, solver, Implicit(cg(3)), meta, task).stats
    inner, outer = case.problem.inner_loss, case.problem.outer_loss
    scaled = replace(
        case.problem,
        inner_loss=lambda *args: 1e4 * inner(*args),
        outer_loss=lambda *args: 1e-3 * outer(*args),
    )
    slower = bl.inner.Gradient(optax.sgd(0.2e-4), 5)
    other = run(scaled, slower, Implicit(cg(3)), meta, task).stats
    assert_close("inner_error", other["inner_error"], plain["inner_error"], 1e-9)
    assert_close("linear_residual", other["linear_residual"], plain["linear_residual"], 1e-9)
    shrunk = replace(
        case.problem,  # the same with params in another unit
        init=lambda meta, key: jax.tree.map(lambda leaf: 1e-3 * leaf, meta["init"]),
        inner_loss=lambda params, *rest: inner(jax.tree.map(lambda leaf: 1e3 * leaf, params), *rest),
        outer_loss=lambda params, *rest: outer(jax.tree.map(lambda leaf: 1e3 * leaf, params), *rest),
    )
    slower = bl.inner.Gradient(optax.sgd(0.2e-6), 5)
    other = run(shrunk, slower, Implicit(cg(3)), meta, task).stats
    assert_close("inner_error", other["inner_error"], plain["inner_error"], 1e-9)


def _diverging():
    """x⁴ from 3 with a rate that is too large: NaN within a few steps."""
    problem = bl.Problem(
        init=lambda meta, key: jnp.full(2, 3.0),
        inner_loss=lambda params, meta, batch, key: jnp.sum(params**4) + meta["shift"] @ params,
        outer_loss=lambda params, meta, batch, key: jnp.sum(params**2),
    )
    return problem, {"shift": jnp.ones(2), "unused": jnp.ones(())}, bl.Task(None, None)


@quiet
@pytest.mark.parametrize("name", ["cg", "gmres", "direct", "nystrom", "fixed_point"])
def test_jaxopt_diverged_inner_solve_is_no_silent_zero(name):
    """JAXopt 0.8.5 returns a hypergradient of exactly 0 and no error."""
    problem, meta, task = _diverging()
    linear_solver = {**LINEAR_SOLVERS, "fixed_point": fixed_point(5), "nystrom": nystrom(2, 0.1)}[name]
    for num_steps in (3, 30) if name == "cg" else (30,):
        solver = bl.inner.Gradient(optax.sgd(0.1), num_steps)
        estimator = Implicit(linear_solver)
        h = run(problem, solver, estimator, meta, task)
        said = estimator.doubts(floats(h.stats))
        assert said, floats(h.stats)
        if num_steps == 30:
            assert h.stats["finite"] == 0 and "diverged" in said[0] and "step size" in said[0]
            assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(h.grad))

    if name not in ("cg", "gmres"):
        return

    def value(meta):
        params = estimator.solve(problem, solver, meta, task, KEY)
        return problem.outer_loss(params, meta, None, KEY)

    assert np.all(np.isnan(jax.jit(jax.grad(value))(meta)["shift"]))


@quiet
def test_a_divergence_into_a_flat_region_is_told():
    """Where the outer loss has saturated its gradient is exactly zero and nothing is left to solve for."""
    problem = bl.Problem(
        init=lambda meta, key: jnp.float32(3.0),
        inner_loss=lambda params, meta, batch, key: 0.5 * (params - meta) ** 2,
        outer_loss=lambda params, meta, batch, key: jax.nn.sigmoid(params),
    )
    solver = bl.inner.Gradient(optax.sgd(3.0), 20)  # |1 − 3| = 2: away from the minimum, but finite
    h = bl.hypergradient(problem, solver, Implicit(cg(2)), 1.0, bl.Task(None, None), KEY)
    assert h.grad == 0 and h.stats["finite"] == 1
    assert "inner problem is not solved" in Implicit(cg(2)).doubts(floats(h.stats))[0]


@pytest.mark.parametrize("name", ["cg", "direct", "gmres", "neumann"])
def test_jaxopt_jvp_and_hessian_through_the_solution(x64, name):
    """They fail through JAXopt's `custom_vjp`. Here forward, reverse and all four second derivatives agree
    with those through 400 unrolled steps."""
    a = jnp.asarray(np.diag([1.0, 1.5, 2.0, 2.5]) + 0.2)
    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(4),
        inner_loss=lambda params, meta, batch, key: (
            0.5 * params @ a @ params - params @ jnp.tanh(meta["tie"]) + 0.1 * jnp.sum(params**4)
        ),
        outer_loss=lambda params, meta, batch, key: jnp.sum(jnp.sin(params)) * meta["scale"],
    )
    meta = {"tie": jnp.array([0.3, -1.0, 0.5, 2.0]), "scale": jnp.array(1.5)}
    solver, task = bl.inner.Gradient(optax.sgd(0.3), 400), bl.Task(None, None)

    def value(adjoint):
        def of_meta(meta):
            params = adjoint.solve(problem, solver, meta, task, KEY)
            return problem.outer_loss(params, meta, None, KEY)

        return of_meta

    ours, reference = value(Implicit(LINEAR_SOLVERS[name])), value(Unroll())
    expected = jax.jit(jax.grad(reference))(meta)
    assert_trees_close("reverse", jax.jit(jax.grad(ours))(meta), expected, 1e-8)
    assert_trees_close("forward", jax.jit(jax.jacfwd(ours))(meta), expected, 1e-8)
    if name not in ("cg", "direct"):
        return
    expected = jax.jit(jax.hessian(reference))(meta)
    modes = {"forward over reverse": jax.jacfwd(jax.jacrev(ours))}
    if name == "cg":
        modes["reverse over reverse"] = jax.jacrev(jax.jacrev(ours))
        modes["reverse over forward"] = jax.jacrev(jax.jacfwd(ours))
        modes["forward over forward"] = jax.jacfwd(jax.jacfwd(ours))
    for mode, hessian in modes.items():
        assert_trees_close(mode, jax.jit(hessian)(meta), expected, 1e-8)


def test_third_derivatives_of_the_solution(x64):
    def third(adjoint, solver):
        problem = bl.Problem(
            init=lambda meta, key: jnp.zeros(()),
            inner_loss=lambda params, meta, batch, key: 0.5 * params**2 + 0.1 * params**4 - params * meta,
            outer_loss=lambda params, meta, batch, key: params,
        )
        solve = lambda meta: adjoint.solve(problem, solver, meta, bl.Task(None, None), KEY)  # noqa: E731
        return jax.jit(jax.grad(jax.jacfwd(jax.grad(solve))))(0.7)

    solver = bl.inner.Gradient(optax.sgd(0.4), 200)
    assert_close("third", third(Implicit(cg(1)), solver), third(Unroll(), solver), 1e-9)


@pytest.mark.parametrize("estimator", [Implicit(cg(5)), OneStep(0.2)])
def test_optimistix_zero_for_the_initial_point_is_told(estimator):
    """The gradient with respect to the initial point is exactly 0 through Optimistix, without a word."""
    problem = bl.Problem(
        init=lambda meta, key: meta["init"],
        inner_loss=lambda params, meta, batch, key: jnp.sum((params - meta["tie"]) ** 2) + meta["added"],
        outer_loss=lambda params, meta, batch, key: jnp.sum(params**2) + meta["outer"],
    )
    solver = bl.inner.Gradient(lambda meta: optax.sgd(meta["rate"]), 100)
    meta = {"init": jnp.ones(2), "tie": 2.0, "added": 1.0, "outer": 3.0, "rate": 0.3}
    names = (
        r"meta\['added'\], meta\['init'\], meta\['rate'\] a hypergradient of exactly zero.*proximal.*Mixed"
    )
    compiled = jax.jit(lambda m: bl.hypergradient(problem, solver, estimator, m, bl.Task(None, None), KEY))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.hypergrad.HypergradientWarning)
        with pytest.warns(bl.FirstOrderWarning, match=f"{type(estimator).__name__} gives {names}") as record:
            h = compiled(meta)
            compiled(meta)
    assert len([w for w in record if w.category is bl.FirstOrderWarning]) == 1
    assert h.grad["init"].sum() == h.grad["rate"] == h.grad["added"] == 0 and h.grad["tie"] != 0
    assert h.stats["zero_leaves"] == 3
    # The proximal term cures it for the start.
    tied = bl.inner.proximal(problem, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", bl.FirstOrderWarning)
        warnings.simplefilter("ignore", bl.hypergrad.HypergradientWarning)
        meta = {name: leaf for name, leaf in meta.items() if name != "rate"}
        tied = replace(tied, outer_loss=lambda params, meta, *rest: jnp.sum(params**2) * meta["added"])
        solver = bl.inner.Gradient(optax.sgd(0.2), 100)
        meta.pop("outer")
        h = run(tied, solver, estimator, meta, bl.Task(None, None))
    assert np.all(h.grad["init"])


@quiet
def test_negative_curvature_is_told(x64):
    """At a saddle the formula gives a number, of no minimum."""
    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(2),
        inner_loss=lambda params, meta, batch, key: params[0] ** 2 - params[1] ** 2 + params @ meta,
        outer_loss=lambda params, meta, batch, key: jnp.sum((params - batch) ** 2),
    )
    solver = Converged(optimistix.Newton(1e-8, 1e-8))

    def said(estimator, target):
        h = run(problem, solver, estimator, jnp.zeros(2), bl.Task(None, jnp.array(target)))
        return " ".join(estimator.doubts(floats(h.stats)))

    for estimator in (Implicit(cg(5)), Implicit(nystrom(2, 1e-3))):
        assert "negative curvature (-" in said(estimator, [1.0, 3.0])
        assert "no minimum of the inner loss" in said(estimator, [1.0, 3.0])
    # Along (1, 1) the curvature is exactly zero: cg cannot even begin.
    assert "no positive curvature" in said(Implicit(cg(5)), [1.0, 1.0])
