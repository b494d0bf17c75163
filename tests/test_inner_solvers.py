"""Solvers that run until they are done, solvers that are a formula, and the proximal term."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import pytest

import bilevel as bl
from bilevel.hypergrad import Mixed, Unroll
from bilevel.hypergrad.implicit.implicit import Implicit
from bilevel.hypergrad.implicit.linear_solvers import cg, direct
from bilevel.inner.closed_form import ClosedForm, prototypes
from bilevel.inner.converged import Converged
from bilevel.inner.proximal import proximal
from bilevel.inner.ridge import Ridge
from bilevel.testing import assert_close, assert_derivative, assert_matches, assert_trees_close
from bilevel.testing.implicit_problems import IMPLICIT_PROBLEMS, logistic, ridge_penalties

KEY = jax.random.key(0)
TIGHT = {"rtol": 1e-11, "atol": 1e-11}
MINIMIZERS = {
    "bfgs": optimistix.BFGS(**TIGHT),
    "lbfgs": optimistix.LBFGS(**TIGHT),
    "nonlinear-cg": optimistix.NonlinearCG(**TIGHT),
    "newton": optimistix.Newton(**TIGHT),
}


# Converged


@pytest.mark.parametrize("name", MINIMIZERS)
def test_converged_reaches_the_minimum(x64, name):
    case = logistic()
    meta, task = jax.tree.map(jnp.asarray, (case.meta, case.task))
    solver = Converged(MINIMIZERS[name])
    found = jax.jit(lambda meta: solver.solve(case.problem, meta, task, KEY))(meta)
    expected = case.solver.solve(case.problem, meta, task, KEY)
    # The nonlinear conjugate gradients of optimistix stop on the change of the loss, at half the digits.
    accuracy = 1e-5 if name == "nonlinear-cg" else 1e-8
    assert_close("params", found.params, expected.params, accuracy)
    assert found.stats["converged"] == 1 and found.stats["inner_residual"] < accuracy
    assert 1 <= found.stats["num_steps"] < 1000
    assert_close("inner_loss", found.stats["inner_loss"], expected.stats["inner_loss"], 1e-10)
    h = jax.jit(lambda m: bl.hypergradient(case.problem, solver, Implicit(direct()), m, task, KEY))(meta)
    assert_trees_close("grad", h.grad, case.exact.grad, 10 * accuracy)
    assert Implicit(direct()).doubts({k: float(v) for k, v in h.stats.items()}) == []


@pytest.mark.filterwarnings("ignore::bilevel.hypergrad.doubts.HypergradientWarning")
@pytest.mark.parametrize("name", ["bfgs", "newton"])
def test_not_converging_is_told_and_never_raises(x64, name):
    case = logistic()
    meta, task = jax.tree.map(jnp.asarray, (case.meta, case.task))
    solver = Converged(MINIMIZERS[name], max_steps=2)
    estimator = Implicit(direct())
    h = jax.jit(lambda m: bl.hypergradient(case.problem, solver, estimator, m, task, KEY))(meta)
    assert h.stats["converged"] == 0 and h.stats["inner_residual"] > 1e-6
    said = estimator.doubts({k: float(v) for k, v in h.stats.items()})
    assert any("did not converge in 2 steps" in doubt and "max_steps" in doubt for doubt in said)

    def nothing(params, meta, batch, key):
        return jnp.sum(params) * jnp.nan

    problem = bl.Problem(lambda meta, key: jnp.zeros(2), nothing, lambda p, m, b, k: jnp.sum(p) * m)
    h = bl.hypergradient(problem, solver, estimator, 1.0, bl.Task(None, None), KEY)
    assert h.stats["converged"] == 0 and h.stats["finite"] == 0 and np.isnan(h.grad)


def test_converged_under_vmap(x64):
    case = logistic()
    meta, task = jax.tree.map(jnp.asarray, (case.meta, case.task))
    metas = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), meta)
    solver = Converged(MINIMIZERS["bfgs"])

    def run(meta):
        return bl.hypergradient(case.problem, solver, Implicit(direct()), meta, task, KEY).grad

    together = jax.jit(jax.vmap(run))(metas)
    first = jax.tree.map(lambda leaf: leaf[0], together)
    assert_trees_close("first", first, case.exact.grad, 1e-7)


def test_converged_refuses_nonsense():
    with pytest.raises(TypeError, match=r"minimizer or a root finder of optimistix.*BFGS.*got"):
        Converged(optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"max_steps must be a whole number of at least 1, got 0"):
        Converged(optimistix.BFGS(1e-6, 1e-6), max_steps=0)
    case = logistic()
    for estimator in (Unroll(), Mixed()):
        with pytest.raises(TypeError, match=r"Converged has no steps.*Implicit"):
            bl.Learner(case.problem, Converged(MINIMIZERS["bfgs"]), estimator)


# Closed forms


@pytest.mark.parametrize("name", ["implicit-quadratic", "ridge-penalties", "ridge-penalties-dual"])
@pytest.mark.parametrize("estimator", [Unroll(), Mixed()])
def test_closed_forms_are_differentiated_exactly(estimator, name):
    assert_matches(estimator, IMPLICIT_PROBLEMS[name]())


@pytest.mark.parametrize("num_examples", [3, 8])
@pytest.mark.parametrize("per_feature", [False, True])
@pytest.mark.parametrize("outputs", [None, 2])
def test_ridge_is_the_minimum_of_its_loss(x64, num_examples, per_feature, outputs):
    rng = np.random.default_rng(0)
    shape = (num_examples,) if outputs is None else (num_examples, outputs)
    x, y = rng.normal(size=(num_examples, 5)), rng.normal(size=shape)
    rho = rng.uniform(0.1, 1, size=5) if per_feature else np.array(0.3)
    ridge = Ridge(lambda meta, x: x @ meta["embed"], lambda meta: meta["rho"])
    problem = bl.Problem(lambda meta, key: jnp.zeros(5), ridge.loss, ridge.error)
    meta = {"embed": rng.normal(size=(5, 5)), "rho": rho}
    found = ridge.solve(problem, meta, bl.Task((x, y), None), KEY)
    features = x @ meta["embed"]
    a = features.T @ features / num_examples + np.diag(np.broadcast_to(rho, 5))
    assert_close("params", found.params, np.linalg.solve(a, features.T @ y / num_examples), 1e-10)
    assert found.stats["inner_residual"] < 1e-12
    # Gradient steps on the loss that it states lead to the same point.
    descent = bl.inner.Gradient(optax.sgd(0.9 / np.linalg.eigvalsh(a)[-1]), 3000)
    problem = bl.Problem(lambda meta, key: jnp.zeros_like(found.params), ridge.loss, ridge.error)
    slow = jax.jit(lambda: descent.solve(problem, meta, bl.Task((x, y), None), KEY))()
    assert_close("descent", slow.params, found.params, 1e-3)


@pytest.mark.parametrize("num_examples", [3, 8])
def test_ridge_to_second_order_and_through_an_embedding(x64, num_examples):
    case = ridge_penalties(num_examples)
    ridge = Ridge(lambda meta, x: jnp.tanh(x @ meta["embed"]), lambda meta: jnp.exp(meta["log"]))
    # Nothing reads the init of a formula, and it may have another shape.
    problem = bl.Problem(lambda meta, key: 0.0, ridge.loss, ridge.error)
    rng = np.random.default_rng(1)
    meta = {"embed": jnp.array(rng.normal(size=(5, 4))), "log": jnp.array(-1.0)}
    task = jax.tree.map(jnp.asarray, case.task)

    def value(meta):
        params = Unroll().solve(problem, ridge, meta, task, KEY)
        return ridge.error(params, meta, task.query, KEY)

    grad = jax.jit(jax.grad(value))
    assert_derivative(jax.jit(value), grad(meta), meta)
    slope = jax.jit(lambda m: jnp.sum(jnp.sin(grad(m)["embed"])))
    assert_derivative(slope, jax.jit(jax.grad(slope))(meta), meta)
    h = jax.jit(lambda m: bl.hypergradient(problem, ridge, Implicit(direct()), m, task, KEY))(meta)
    assert_trees_close("implicit", h.grad, grad(meta), 1e-9)


def test_ridge_with_one_hot_labels(x64):
    """R2-D2, in one line."""
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(6, 8)), np.arange(6) % 3
    ridge = Ridge(lambda meta, x: x, lambda meta: jnp.exp(meta), lambda labels: jax.nn.one_hot(labels, 3))
    problem = bl.Problem(lambda meta, key: jnp.zeros((8, 3)), ridge.loss, ridge.error)
    found = ridge.solve(problem, -1.0, bl.Task((x, labels), None), KEY)
    y = np.eye(3)[labels]
    assert_close(
        "params", found.params, x.T @ np.linalg.solve(x @ x.T + 6 * np.exp(-1) * np.eye(6), y), 1e-10
    )


@pytest.mark.parametrize("num_examples", [3, 8])
@pytest.mark.parametrize("rho", [-5.0, [-5.0, 1.0, 1.0, 1.0, 1.0]])
def test_a_negative_penalty_is_no_minimum(x64, num_examples, rho):
    rng = np.random.default_rng(0)
    task = bl.Task((rng.normal(size=(num_examples, 5)), rng.normal(size=num_examples)), None)
    ridge = Ridge(lambda meta, x: x, lambda meta: jnp.array(rho))
    problem = bl.Problem(lambda meta, key: jnp.zeros(5), ridge.loss, ridge.error)
    assert np.all(np.isnan(ridge.solve(problem, 0.0, task, KEY).params))


def test_ridge_of_features_in_bfloat16():
    x, y = np.array([[1.0, 0.5], [0.25, 1.0], [1.0, 1.0]]), np.array([1.0, 2.0, 3.0])
    ridge = Ridge(lambda meta, x: x.astype(jnp.bfloat16), lambda meta: jnp.bfloat16(0.5))
    problem = bl.Problem(lambda meta, key: jnp.zeros(2), ridge.loss, ridge.error)
    found = ridge.solve(problem, 0.0, bl.Task((x, y), None), KEY).params
    assert found.dtype == jnp.float32
    assert_close("params", found, np.linalg.solve(x.T @ x / 3 + 0.5 * np.eye(2), x.T @ y / 3), 1e-5)


def test_what_ridge_refuses():
    with pytest.raises(TypeError, match=r"Ridge\.penalty must be a function, got float"):
        Ridge(lambda meta, x: x, 0.1)
    x, y = jnp.ones((4, 3)), jnp.ones(4)
    problem = bl.Problem(lambda meta, key: 0.0, lambda *args: 0.0, lambda *args: 0.0)
    with pytest.raises(ValueError, match=r"one value for each of the 3 features, got shape \(2,\)"):
        Ridge(lambda meta, x: x, lambda meta: jnp.ones(2)).solve(problem, 0.0, bl.Task((x, y), None), KEY)
    with pytest.raises(ValueError, match=r"with the same n, got shapes \(4, 3\) and \(2,\)"):
        Ridge(lambda meta, x: x, lambda meta: 1.0).solve(problem, 0.0, bl.Task((x, y[:2]), None), KEY)


def test_prototypes(x64):
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(7, 3)), np.array([0, 1, 2, 0, 1, 1, 2])
    embed = lambda meta, x: jnp.tanh(x @ meta)  # noqa: E731
    solver = prototypes(embed, num_classes=3)

    def spread(params, meta, batch, key):
        return jnp.sum((embed(meta, batch[0]) - params[batch[1]]) ** 2)

    problem = bl.Problem(lambda meta, key: jnp.zeros((3, 2)), spread, spread)
    task = bl.Task((jnp.asarray(x), labels), (jnp.asarray(x[:3] + 1), labels[:3]))
    meta = jnp.array(rng.normal(size=(3, 2)))
    found = solver.solve(problem, meta, task, KEY)
    expected = [np.tanh(x @ meta)[labels == c].mean(0) for c in range(3)]
    assert_close("prototypes", found.params, expected, 1e-12)
    assert found.stats["inner_residual"] < 1e-12

    @jax.jit
    def value(meta):
        return spread(solver.solve(problem, meta, task, KEY).params, meta, task.query, KEY)

    for estimator in (Unroll(), Mixed(), Implicit(direct())):
        h = jax.jit(lambda meta, e=estimator: bl.hypergradient(problem, solver, e, meta, task, KEY))(meta)
        assert_derivative(value, h.grad, meta)
    # A class without an example has no prototype, and that is told.
    short = bl.Task((task.support[0][:2], labels[:2]), task.query)
    assert bl.hypergradient(problem, solver, Unroll(), meta, short, KEY).stats["finite"] == 0


def test_a_formula_of_another_problem_is_told(x64):
    """The formula minimizes something else than the stated inner loss: the residual says so."""
    case = IMPLICIT_PROBLEMS["implicit-quadratic"]()
    meta, task = jax.tree.map(jnp.asarray, (case.meta, case.task))
    wrong = ClosedForm(lambda meta, support, key: jax.tree.map(lambda leaf: leaf + 0.1, meta["init"]))
    h = bl.hypergradient(case.problem, wrong, Unroll(), meta, task, KEY)
    right = bl.hypergradient(case.problem, case.solver, Unroll(), meta, task, KEY)
    assert right.stats["inner_residual"] < 1e-12 < 1e-2 < h.stats["inner_residual"]


def test_what_closed_form_refuses():
    with pytest.raises(TypeError, match=r"ClosedForm\.function must be a function"):
        ClosedForm(3.0)
    with pytest.raises(ValueError, match="num_classes must be a whole number"):
        prototypes(lambda meta, x: x, 0)


# Proximal


@pytest.mark.parametrize("learned", [False, True])
def test_imaml_on_a_quadratic(x64, learned):
    """iMAML's closed form: φ* = (A + λI)⁻¹(b + λθ), dF/dθ = λ (A + λI)⁻¹ (φ* − c)."""
    rng = np.random.default_rng(0)
    a = rng.normal(size=(4, 4))
    a = a @ a.T / 4
    b, c, theta, strength = rng.normal(size=4), rng.normal(size=4), rng.normal(size=4), 2.0
    plain = bl.Problem(
        init=lambda meta, key: meta["init"],
        inner_loss=lambda params, meta, batch, key: 0.5 * params @ a @ params - params @ batch,
        outer_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - batch) ** 2),
    )
    problem = proximal(plain, (lambda meta: jnp.exp(meta["log"])) if learned else strength)
    meta = {"init": jnp.array(theta)} | ({"log": jnp.log(strength)} if learned else {})
    solver = bl.inner.Gradient(optax.sgd(0.3), 200)
    task = bl.Task(jnp.array(b), jnp.array(c))
    h = jax.jit(lambda m: bl.hypergradient(problem, solver, Implicit(cg(4)), m, task, KEY))(meta)
    regular = a + strength * np.eye(4)
    phi = np.linalg.solve(regular, b + strength * theta)
    q = np.linalg.solve(regular, phi - c)
    expected = {"init": strength * q} | ({"log": -strength * q @ (phi - theta)} if learned else {})
    assert_close("value", h.value, 0.5 * np.sum((phi - c) ** 2), 1e-12)
    assert_trees_close("grad", h.grad, expected, 1e-10)


def test_what_proximal_refuses():
    problem = logistic().problem
    with pytest.raises(ValueError, match="strength must be positive, got -1"):
        proximal(problem, -1.0)
    with pytest.raises(TypeError, match="strength must be a number or a function of meta, got str"):
        proximal(problem, "strong")
    random = proximal(bl.Problem(lambda meta, key: jax.random.normal(key), *[lambda *args: 0.0] * 2), 1.0)
    with pytest.raises(ValueError, match=r"init that does not use its key.*put the initialization into meta"):
        random.inner_loss(0.0, 0.0, None, KEY)
    compiled = proximal(bl.Problem(jax.jit(lambda meta, key: 2.0 * meta), *[lambda *args: 0.0] * 2), 1.0)
    assert_close("pull", compiled.inner_loss(5.0, 1.0, None, KEY), 4.5, 1e-6)
