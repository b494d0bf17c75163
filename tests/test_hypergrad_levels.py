"""Levels above the hypergradient: nesting, forward mode, Hessians, variables of an outer level."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad import Mixed, Unroll
from bilevel.testing import assert_close, assert_derivative, assert_trees_close

ADJOINTS = [Mixed(), Mixed(checkpoint=2), Unroll(), Unroll(checkpoint=2)]
KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(6, 2))
Y = np.sin(X.sum(1))
TASK = bl.Task((X[:3], Y[:3]), (X[3:], Y[3:]))
META = {"init": {"w": np.array([0.3, -0.5]), "v": np.array(0.7)}, "ridge": np.array(0.2)}


def inner_loss(params, meta, batch, key):
    x, y = batch
    error = jnp.tanh(x @ params["w"]) * params["v"] - y
    return jnp.mean(error**2) + meta["ridge"] * jnp.sum(params["w"] ** 2)


def outer_loss(params, meta, batch, key):
    return inner_loss(params, {"ridge": 0.0}, batch, key)


PROBLEM = bl.Problem(lambda meta, key: meta["init"], inner_loss, outer_loss)
SOLVERS = {
    "momentum": bl.inner.Gradient(optax.sgd(0.2, momentum=0.5), 3),
    "adam": bl.inner.Gradient(optax.adam(0.1), 3),
}


def objective(adjoint, solver):
    def value(meta):
        params = adjoint.solve(PROBLEM, solver, meta, TASK, KEY)
        return outer_loss(params, meta, TASK.query, KEY)

    return value


def as_float64(tree):
    return jax.tree.map(jnp.float64, tree)


def three_levels(adjoint):
    """Top: a penalty's scale. Middle: two steps on the penalty. Bottom: three steps on the weights."""
    bottom = bl.inner.Gradient(optax.sgd(0.2, momentum=0.5), 3)
    middle = bl.inner.Gradient(lambda meta: optax.sgd(jnp.exp(meta["log_rate"])), 2)

    def middle_loss(params, meta, batch, key):
        below = {"init": META["init"], "ridge": jnp.exp(params) * meta["scale"]}
        weights = adjoint.solve(PROBLEM, bottom, below, TASK, key)
        return outer_loss(weights, below, batch, key)

    upper = bl.Problem(lambda meta, key: jnp.float64(-1.0), middle_loss, middle_loss)
    task = bl.Task(TASK.query, TASK.support)

    def top(meta):
        params = adjoint.solve(upper, middle, meta, task, KEY)
        return middle_loss(params, meta, TASK.support, KEY)

    return top


def test_three_levels(x64):
    meta = as_float64({"scale": 1.3, "log_rate": -0.5})
    expected = jax.jit(jax.grad(three_levels(Unroll())))(meta)
    assert_derivative(jax.jit(three_levels(Unroll())), expected, meta)
    assert np.all(np.array(jax.tree.leaves(expected)))
    got = jax.jit(jax.grad(three_levels(Mixed())))(meta)
    assert_trees_close("grad", got, expected, 1e-10)


@pytest.mark.parametrize(
    ("adjoint", "name"),
    [*((adjoint, "momentum") for adjoint in ADJOINTS), (Mixed(), "adam"), (Unroll(), "adam")],
)
def test_forward_mode_equals_reverse(x64, adjoint, name):
    value, meta = objective(adjoint, SOLVERS[name]), as_float64(META)
    grad = jax.jit(jax.grad(value))(meta)
    forward = jax.jit(jax.jacfwd(value))(meta)
    assert_trees_close("grad", forward, grad, 1e-10)
    assert_derivative(jax.jit(objective(Unroll(), SOLVERS[name])), grad, meta)


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("forward over reverse", "momentum"),
        ("forward over reverse", "adam"),
        ("reverse over reverse", "momentum"),
        ("reverse over forward", "momentum"),
    ],
)
def test_hessian_vector_product(x64, mode, name):
    meta = as_float64(META)
    vector = as_float64({"init": {"w": np.array([1.0, -0.6]), "v": 0.4}, "ridge": 0.8})

    def product(adjoint):
        value = objective(adjoint, SOLVERS[name])

        def slope(meta):
            return jax.jvp(value, (meta,), (vector,))[1]

        def paired(meta):
            return sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (jax.grad(value)(meta), vector))))

        return {
            "forward over reverse": lambda m: jax.jvp(jax.grad(value), (m,), (vector,))[1],
            "reverse over reverse": jax.grad(paired),
            "reverse over forward": jax.grad(slope),
        }[mode]

    expected = jax.jit(product(Unroll()))(meta)
    assert_trees_close("product", jax.jit(product(Mixed()))(meta), expected, 1e-9)

    def slope(meta):
        return jax.jvp(objective(Unroll(), SOLVERS[name]), (meta,), (vector,))[1]

    assert_derivative(jax.jit(slope), expected, meta)


@pytest.mark.parametrize("adjoint", [Mixed(), Mixed(checkpoint=2), Unroll()])
def test_closure_over_a_variable_of_an_outer_level(x64, adjoint):
    """The inner loss reads `temperature` from its closure, not from meta."""
    solver = SOLVERS["momentum"]

    def value(temperature):
        def tempered(params, meta, batch, key):
            return inner_loss(params, meta, batch, key) * jnp.exp(temperature)

        problem = bl.Problem(PROBLEM.init, tempered, outer_loss)
        params = adjoint.solve(problem, solver, as_float64(META), TASK, KEY)
        return outer_loss(params, META, TASK.query, KEY)

    temperature = jnp.float64(0.3)
    grad = jax.jit(jax.grad(value))(temperature)
    assert_derivative(jax.jit(value), grad, temperature)
    # And for a batch of them, in both modes.
    several = jnp.array([0.3, 0.5])
    batched = jax.jit(jax.vmap(jax.grad(value)))(several)
    assert_close("first of a batch", batched[0], grad, 1e-12)
    assert_close("forward", jax.jit(jax.vmap(jax.jacfwd(value)))(several), batched, 1e-10)


@pytest.mark.parametrize("adjoint", [Mixed(), Unroll()])
def test_gradient_with_respect_to_the_data(x64, adjoint):
    """Dataset distillation: the support examples are what is learned."""

    def value(x):
        task = bl.Task((x, Y[:3]), TASK.query)
        params = adjoint.solve(PROBLEM, SOLVERS["adam"], as_float64(META), task, KEY)
        return outer_loss(params, META, TASK.query, KEY)

    x = jnp.asarray(X[:3])
    assert_derivative(jax.jit(value), jax.jit(jax.grad(value))(x), x)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_randomness_in_the_inner_loss(x64, adjoint):
    """Each step draws its own noise, the same in the forward pass and in what is recomputed."""

    def noisy(params, meta, batch, key):
        return inner_loss(params, meta, batch, key) + meta["ridge"] * params["w"] @ jax.random.normal(
            key, (2,)
        )

    problem = bl.Problem(PROBLEM.init, noisy, outer_loss)

    def value(meta):
        params = adjoint.solve(problem, SOLVERS["momentum"], meta, TASK, KEY)
        return outer_loss(params, meta, TASK.query, KEY)

    meta = as_float64(META)
    grad = jax.jit(jax.grad(value))(meta)
    assert_derivative(jax.jit(value), grad, meta)


@pytest.mark.parametrize("adjoint", [Mixed(), Unroll()])
def test_loops_branches_and_products_in_the_inner_loss(x64, adjoint):
    """The Hessian rule sees scan, cond, jit, custom_jvp and a nested gradient as it sees the rest."""

    @jax.custom_jvp
    def square(x):
        return x * x

    square.defjvps(lambda t, out, x: 2 * x * t)

    def loss(params, meta, batch, key):
        def body(carry, row):
            return jax.lax.cond(row.sum() > 0, jnp.sin, jax.jit(jnp.tanh), carry @ row) * carry, None

        w, _ = jax.lax.scan(body, params["w"], batch[0])
        proximal = jax.grad(lambda w: jnp.sum(jnp.cosh(w)) * meta["ridge"])(params["w"])
        return square(jnp.sum(w)) + proximal @ params["w"] + params["v"] ** 2

    problem = bl.Problem(PROBLEM.init, loss, outer_loss)

    def value(meta):
        params = adjoint.solve(problem, SOLVERS["momentum"], meta, TASK, KEY)
        return outer_loss(params, meta, TASK.query, KEY)

    meta = as_float64(META)
    assert_derivative(jax.jit(value), jax.jit(jax.grad(value))(meta), meta)
