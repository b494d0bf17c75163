"""Where implicit hypergradients run: under vmap and scan, in training, with any tree; what they refuse."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from implicit_tools import KEY, arrays, quiet, run

import bilevel as bl
from bilevel.hypergrad.implicit.implicit import Implicit
from bilevel.hypergrad.implicit.linear_solvers import cg, direct
from bilevel.hypergrad.implicit.nystrom import nystrom
from bilevel.hypergrad.implicit.one_step import OneStep
from bilevel.hypergrad.iterations.mixed import Mixed
from bilevel.hypergrad.iterations.unroll import Unroll
from bilevel.testing import assert_close, assert_derivative, assert_trees_close
from bilevel.testing.implicit_problems import implicit_quadratic, logistic

CG2, DIRECT = Implicit(cg(2)), Implicit(direct())


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
    with pytest.raises(ValueError, match=r"Implicit\.inner_tolerance must be a positive number, got 0"):
        Implicit(inner_tolerance=0)
    with pytest.raises(ValueError, match=r"OneStep\.step_size must be a positive number, got -1"):
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
