"""Implicit hypergradients: right where the inner problem is solved, and frank where it is not."""

import warnings
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import pytest

import bilevel as bl
from bilevel.hypergrad.implicit.implicit import Implicit
from bilevel.hypergrad.implicit.krylov import bicgstab, gmres
from bilevel.hypergrad.implicit.linear_solvers import cg, direct
from bilevel.hypergrad.implicit.neumann import fixed_point, neumann
from bilevel.hypergrad.implicit.nystrom import nystrom
from bilevel.hypergrad.implicit.one_step import OneStep
from bilevel.hypergrad.iterations.mixed import Mixed
from bilevel.hypergrad.iterations.unroll import Unroll
from bilevel.inner.converged import Converged
from bilevel.testing import assert_close, assert_derivative, assert_matches, assert_trees_close
from bilevel.testing.implicit_problems import IMPLICIT_PROBLEMS, implicit_quadratic, logistic

KEY = jax.random.key(0)
quiet = pytest.mark.filterwarnings(
    "ignore::bilevel.hypergrad.doubts.HypergradientWarning", "ignore::bilevel.FirstOrderWarning"
)
CG2, DIRECT = Implicit(cg(2)), Implicit(direct())
LINEAR_SOLVERS = {
    "cg": cg(30),
    "gmres": gmres(6),
    "bicgstab": bicgstab(60),
    "direct": direct(),
    "neumann": neumann(2000, 0.3),
    "nystrom": nystrom(4, 1e-13),
}


def floats(stats):
    return {name: float(value) for name, value in stats.items()}


def run(problem, solver, estimator, meta, task):
    return jax.jit(lambda m, t: bl.hypergradient(problem, solver, estimator, m, t, KEY))(meta, task)


def arrays(case):
    return jax.tree.map(jnp.asarray, (case.meta, case.task))


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


# Where it runs


@quiet
@pytest.mark.parametrize("estimator", [Implicit(cg(6)), Implicit(nystrom(3, 0.1))])
def test_vmap_scan_and_one_trace(x64, estimator):
    """Each task has a linear solve of its own: a batch gives what one by one gives."""
    case = implicit_quadratic()
    meta, _ = arrays(case)
    rng = np.random.default_rng(1)
    tasks = bl.Task(jnp.array(rng.normal(size=(3, 6))), jnp.array(rng.normal(size=(3, 6))))
    solver = bl.inner.Gradient(optax.sgd(0.2), 7)
    traces = []

    def one(task):
        traces.append(1)
        h = bl.hypergradient(case.problem, solver, estimator, meta, task, KEY)

        def value(meta):
            params = estimator.solve(case.problem, solver, meta, task, jax.random.split(KEY)[0])
            return case.problem.outer_loss(params, meta, task.query, KEY)

        return h.grad, jax.grad(value)(meta), jax.jacfwd(value)(meta)

    single = jax.jit(one)
    alone = [single(jax.tree.map(lambda leaf, i=i: leaf[i], tasks)) for i in range(3)]
    assert len(traces) == 1
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    assert_trees_close("vmap", jax.jit(jax.vmap(one))(tasks), expected, 1e-10)
    scanned = jax.jit(lambda tasks: jax.lax.scan(lambda c, task: (c, one(task)), 0, tasks)[1])(tasks)
    assert_trees_close("scan", scanned, expected, 1e-10)
    assert_trees_close("solve", expected[1], expected[0], 1e-9)


def test_a_map_of_maps_in_both_orders(x64):
    """vmap around grad, grad around vmap, an operand that is mapped twice, one that is not mapped."""
    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(2),
        inner_loss=lambda params, meta, batch, key: (
            0.5 * jnp.sum(jnp.exp(meta["log"]) * params**2) + 0.1 * jnp.sum(params**4) - params @ batch
        ),
        outer_loss=lambda params, meta, batch, key: jnp.sum(params),
    )
    solver = bl.inner.Gradient(optax.sgd(0.2), 300)
    supports = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2)))
    meta = {"log": jnp.array([0.1, 0.4])}

    def value(meta, support, adjoint=CG2):
        return jnp.sum(adjoint.solve(problem, solver, meta, bl.Task(support, None), KEY))

    def total(meta, adjoint=CG2):
        one = lambda support: value(meta, support, adjoint)  # noqa: E731
        return jnp.sum(jax.vmap(jax.vmap(one, in_axes=0), in_axes=1)(jnp.swapaxes(supports, 0, 1)) ** 2)

    expected = jax.jit(jax.grad(lambda m: total(m, Unroll())))(meta)
    assert_trees_close("grad of vmap", jax.jit(jax.grad(total))(meta), expected, 1e-8)
    assert_trees_close("jacfwd of vmap", jax.jit(jax.jacfwd(total))(meta), expected, 1e-8)
    each = jax.jit(jax.vmap(jax.vmap(jax.grad(value), (None, 0)), (None, 0)))(meta, supports)["log"]
    values = jax.jit(jax.vmap(jax.vmap(value, (None, 0)), (None, 0)))(meta, supports)
    assert_close("vmap of grad", jnp.sum(2 * values[..., None] * each, (0, 1)), expected["log"], 1e-8)
    hessian = jax.jit(jax.hessian(total))(meta)
    reference = jax.jit(jax.hessian(lambda m: total(m, Unroll())))(meta)
    assert_trees_close("hessian of vmap", hessian, reference, 1e-7)


@quiet
def test_it_trains():
    """iMAML through bl.train: the whole outer loop compiled, the stats averaged over the tasks."""

    def loss(params, meta, batch, key):
        x, y = batch
        return jnp.mean((x[:, 0] * params["slope"] + params["shift"] - y) ** 2)

    problem = bl.inner.proximal(bl.Problem(lambda meta, key: meta, loss, loss), 1.0)
    solver = bl.inner.Gradient(optax.sgd(0.2), 40)
    init_meta = lambda key: {"slope": jnp.float32(0.0), "shift": jnp.float32(0.0)}  # noqa: E731
    learner = bl.Learner(problem, solver, Implicit(cg(2)), init_meta)

    def sample(key):
        slope_key, x_key = jax.random.split(key)
        slope, x = jax.random.normal(slope_key) + 3, jax.random.normal(x_key, (8, 1))
        return bl.Task((x[:4], slope * x[:4, 0]), (x[4:], slope * x[4:, 0]))

    tasks = bl.tasks.batch(sample, 4)
    state = bl.init_state(learner, optax.adam(0.2), tasks, KEY)
    state, metrics = jax.jit(lambda s: bl.meta_step(learner, optax.adam(0.2), s, tasks(KEY)))(state)
    assert {"inner_residual", "inner_error", "linear_residual"} <= set(metrics.scalars)
    assert metrics.scalars["linear_residual"] < 1e-3
    state = bl.train(learner, optax.adam(0.2), tasks, state, num_meta_steps=60)
    assert abs(state.meta["slope"] - 3) < 0.5


@quiet
def test_trees_of_several_dtypes(x64):
    def inner(params, meta, batch, key):
        w, (b, _) = params["net"]
        x, labels = batch
        scale = params["scale"][0].astype(x.dtype)
        pull = 0.2 * (jnp.sum(w**2) + jnp.sum(b**2) + (scale - 1) ** 2)
        weight = jax.nn.sigmoid(meta["weights"])[labels]
        return jnp.mean(weight * bl.learners.cross_entropy((x @ w + b) * scale, labels)[0]) + pull

    rng = np.random.default_rng(0)
    x, labels = jnp.array(rng.normal(size=(6, 2))), jnp.array([0, 1, 2, 1, 0, 2], jnp.int32)
    task = bl.Task((x, labels), (x + 0.3, labels))
    start = {"net": (jnp.zeros((2, 3)), (jnp.zeros(3), None)), "scale": [jnp.ones((), jnp.float32)]}
    problem = bl.Problem(lambda meta, key: start, inner, inner)
    meta = {"weights": jnp.array([0.1, -0.4, 0.3], jnp.float32)}
    solver = bl.inner.Gradient(optax.sgd(0.5), 400)
    expected = run(problem, solver, Mixed(), meta, task)
    for linear_solver in (cg(10),):
        estimator = Implicit(linear_solver)
        h = run(problem, solver, estimator, meta, task)
        assert h.grad["weights"].dtype == jnp.float32
        assert_trees_close("grad", h.grad, expected.grad, 1e-4)
        value = lambda m, e=estimator: inner(e.solve(problem, solver, m, task, KEY), m, task.query, KEY)  # noqa: E731
        assert_trees_close("solve", jax.jit(jax.grad(value))(meta), expected.grad, 1e-4)


def test_randomness_and_stats_are_those_of_the_other_estimators(x64):
    """An inner loss with noise: the solution, the value and the metrics are bit for bit those of Mixed."""
    case = logistic()
    meta, task = arrays(case)
    problem = replace(
        case.problem,
        inner_loss=lambda params, meta, batch, key: (
            case.problem.inner_loss(params, meta, batch, key) + 0.01 * params @ jax.random.normal(key, (4,))
        ),
        metrics=lambda params, meta, batch, key: {"size": jnp.sum(params**2)},
    )
    solver = bl.inner.Gradient(optax.sgd(0.5), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.hypergrad.HypergradientWarning)
        h = run(problem, solver, Implicit(cg(4)), meta, task)
    other = run(problem, solver, Mixed(), meta, task)
    assert_close("value", h.value, other.value, 1e-14)
    assert set(other.stats) < set(h.stats)
    for name in ("inner_loss", "query_size", "support_size"):
        assert_close(name, h.stats[name], other.stats[name], 1e-12)


@pytest.mark.parametrize("what", ["closure", "data"])
def test_derivatives_in_closures_and_in_the_data(x64, what):
    case = logistic()
    meta, task = arrays(case)

    def value(x, adjoint=DIRECT, solver=case.solver):
        inner, support = case.problem.inner_loss, task.support
        if what == "data":
            support = (x, support[1])
        else:
            inner = lambda params, *rest: case.problem.inner_loss(params * x[0, 0], *rest)  # noqa: E731
        problem = replace(case.problem, inner_loss=inner)
        params = adjoint.solve(problem, solver, meta, bl.Task(support, None), KEY)
        return case.problem.outer_loss(params, meta, task.query, KEY)

    x = task.support[0]
    grad = jax.jit(jax.grad(value))(x)
    assert np.any(grad)
    assert_derivative(jax.jit(value), grad, x, tolerance=1e-7)
    assert_close("forward", jax.jit(jax.jacfwd(value))(x), grad, 1e-9)


# Refusals


def test_refusals_name_the_fault_and_the_remedy():
    case = logistic()
    with pytest.raises(TypeError, match=r"linear_solver must be a linear solver such as bl\.hypergrad\.cg"):
        Implicit(10)
    with pytest.raises(ValueError, match="Implicit: inner_tolerance must be a positive number, got 0"):
        Implicit(inner_tolerance=0)
    with pytest.raises(ValueError, match="OneStep: step_size must be a positive number, got -1"):
        OneStep(-1.0)
    for estimator in (Implicit(), OneStep(0.1)):
        with pytest.raises(TypeError, match=r"needs an inner solver with a method solve.*got str"):
            bl.Learner(case.problem, "sgd", estimator)
        with pytest.raises(TypeError, match=r"meta\['depth'\] is int32"):
            meta = {"depth": jnp.int32(1), **case.meta}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                bl.hypergradient(case.problem, case.solver, estimator, meta, case.task, KEY)
        vector = replace(case.problem, outer_loss=lambda params, meta, batch, key: params)
        with pytest.raises(ValueError, match=r"outer_loss must return a scalar, got shape \(4,\)"):
            bl.hypergradient(vector, case.solver, estimator, case.meta, case.task, KEY)


def test_a_custom_vjp_in_the_inner_loss_is_refused():
    @jax.custom_vjp
    def reverse(x):
        return x

    reverse.defvjp(lambda x: (x, None), lambda residual, g: (-g,))
    problem = bl.Problem(
        init=lambda meta, key: jnp.float32(0.0),
        inner_loss=lambda params, meta, batch, key: reverse(params - meta) ** 2,
        outer_loss=lambda params, meta, batch, key: params,
    )
    solver = bl.inner.Gradient(optax.sgd(0.1), 2)
    with pytest.raises(TypeError, match="custom_vjp"):
        bl.hypergradient(problem, solver, Implicit(cg(1)), 1.0, bl.Task(None, None), KEY)
