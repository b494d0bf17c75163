"""What no inner step changes is computed once, and nothing else changes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad import Forward, Mixed, MultiStep, Truncated, Unroll
from bilevel.inner.hoisting import hoisted
from bilevel.learners.cavia import FilmContext, cavia

KEY = jax.random.key(0)
loss = bl.learners.cross_entropy


def products(function, *args):
    """Matrix products in what a function computes."""
    return str(jax.make_jaxpr(function)(*args)).count("dot_general[")


def pictures(ways=3):
    x = jax.random.uniform(jax.random.key(1), (2, ways, 16, 16, 1))
    y = jnp.arange(ways)
    return bl.Task((x[0], y), (x[1], y))


def anil(estimator):
    return bl.maml(
        bl.nets.conv4(3, 4, image_shape=(16, 16, 1)),
        loss,
        num_steps=3,
        rates=bl.learners.PerParameter(0.1),
        adapt="head",
        estimator=estimator,
    )


def film(estimator):
    net = bl.nets.conv4(3, 4, image_shape=(16, 16, 1))
    return cavia(net, loss, context=FilmContext(4, "block_2"), rate=0.5, num_steps=3, estimator=estimator)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("make", [anil, film])
@pytest.mark.parametrize("estimator", [Mixed(), Unroll(), Forward(), Truncated(2), MultiStep(3)], ids=repr)
def test_the_hypergradient_is_that_of_the_loss_as_written(x64, make, estimator):
    learner, task = make(estimator), pictures()
    meta = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), learner.init_meta(KEY))
    assert learner.solver.hoist
    found, plain = (
        bl.hypergradient(learner.problem, solver, estimator, meta, task, KEY)
        for solver in (learner.solver, replace(learner.solver, hoist=False))
    )
    np.testing.assert_allclose(found.value, plain.value, rtol=1e-12)
    for one, other in zip(jax.tree.leaves(found.grad), jax.tree.leaves(plain.grad), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-14)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(plain.grad))


def test_only_the_head_is_left_of_anil():
    learner, task = anil(Mixed()), pictures()
    meta = learner.init_meta(KEY)
    params = learner.problem.init(meta, KEY)
    problem, once = hoisted(learner.problem, meta, task, params, KEY)
    assert products(learner.problem.inner_loss, params, meta, task.support, KEY) > 4
    assert products(problem.inner_loss, params, meta, once.support, KEY) == 1
    np.testing.assert_allclose(
        problem.inner_loss(params, None, once.support, KEY),
        learner.problem.inner_loss(params, meta, task.support, KEY),
        rtol=1e-6,
    )
    assert once.query is task.query


def problem_of(inner_loss):
    return bl.Problem(lambda meta, key: jnp.ones(3), inner_loss, inner_loss)


@pytest.mark.parametrize(
    "inner_loss",
    [
        pytest.param(lambda p, m, b, k: jnp.sum(p * m * jax.random.normal(k, (3,))) + b.sum(), id="noise"),
        pytest.param(lambda p, m, b, k: m * b.sum(), id="of meta alone"),
        pytest.param(lambda p, m, b, k: 0.0, id="a number"),
        pytest.param(
            lambda p, m, b, k: jax.nn.softplus(m) * jnp.sum(jax.nn.relu(p)), id="rules of their own"
        ),
    ],
)
def test_any_loss_keeps_its_values_and_derivatives(x64, inner_loss):
    params, meta, support = jnp.array([-1.0, 0.5, 2.0]), jnp.float64(0.3), jnp.arange(4.0)

    def value(hoist, params, meta, key):
        if not hoist:
            return inner_loss(params, meta, support, key) * 1.0
        problem, task = hoisted(problem_of(inner_loss), meta, bl.Task(support, None), jnp.zeros(3), KEY)
        return problem.inner_loss(params, meta, task.support, key) * 1.0

    for step in range(2):
        key = jax.random.fold_in(KEY, step)
        for derivative in (lambda f: f, jax.grad, lambda f: jax.grad(f, argnums=1)):
            here, plain = (derivative(lambda *a, h=h: value(h, *a))(params, meta, key) for h in (True, False))
            np.testing.assert_allclose(here, plain, rtol=1e-12)


def test_a_long_loop_has_no_product_of_the_body():
    problem = problem_of(lambda p, m, b, k: jnp.mean((jnp.tanh(b @ m) @ p - 1.0) ** 2))
    task, meta = bl.Task(jnp.ones((4, 2)), jnp.ones((4, 2))), jnp.full((2, 3), 0.1)
    solver = bl.inner.Gradient(optax.sgd(0.1), 20, hoist=True)
    plain = replace(solver, hoist=False)

    def in_the_loop(solver):
        traced = jax.make_jaxpr(lambda meta: solver.solve(problem, meta, task, KEY).params)(meta)
        (scan,) = (eqn for eqn in traced.jaxpr.eqns if eqn.primitive.name == "scan")
        return str(scan.params["jaxpr"]).count("dot_general[")

    assert (in_the_loop(solver), in_the_loop(plain)) == (2, 3)  # the head's output and its gradient; the body
    np.testing.assert_allclose(
        *(s.solve(problem, meta, task, KEY).params for s in (solver, plain)), rtol=1e-6
    )
