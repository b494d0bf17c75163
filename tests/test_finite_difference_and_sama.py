"""Finite differences and SAMA: of second order in ε, exact in their approximation, frank about rounding."""

from dataclasses import replace
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
    ridge,
    weighted,
)
from first_order_tools import KEY, LONG, distance, run

import bilevel as bl
from bilevel.hypergrad.first_order.finite_difference import FiniteDifference
from bilevel.hypergrad.first_order.sama import Sama
from bilevel.testing import assert_trees_close

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.hypergrad.doubts.HypergradientWarning")
# Finite differences


def one_step(reference, rate, solver=LONG):
    """∂θ f − η (∂θ∇φ g)ᵀ ∂φ f by automatic differentiation."""
    meta, task = as_arrays(reference)
    problem = reference.problem
    inner_key, outer_key = jax.random.split(KEY)
    params = solver.solve(problem, meta, task, inner_key).params
    slope = jax.grad(problem.outer_loss)(params, meta, task.query, outer_key)

    def surrogate(meta):
        gradient = jax.grad(problem.inner_loss)(params, meta, task.support, None)
        moved = jax.tree.map(lambda s, g: jnp.vdot(s, g), slope, gradient)
        return problem.outer_loss(params, meta, task.query, None) - rate * sum(jax.tree.leaves(moved))

    return jax.grad(surrogate)(meta)


def bent(seed=0):
    """An inner loss whose mixed derivative curves in φ."""
    reference = ridge(seed)

    def inner_loss(params, meta, batch, key):
        scale = jnp.exp(meta["penalty"])
        return reference.problem.inner_loss(params, meta, batch, key) + 0.1 * jnp.sum(
            scale * jnp.sin(3 * params)
        )

    return reference._replace(problem=replace(reference.problem, inner_loss=inner_loss))


@pytest.mark.parametrize(
    "make", [lambda e: FiniteDifference(0.3, e), lambda e: Sama(e)], ids=["darts", "sama"]
)
def test_the_difference_is_of_second_order(x64, make):
    reference = bent()
    exact = one_step(reference, 0.3)
    errors = [distance(run(make(epsilon), reference).grad, exact) for epsilon in (0.4, 0.2, 0.1, 0.05)]
    assert errors[0] > 1e-3
    for a, b in pairwise(errors[1:]):
        assert 3.7 < a / b < 4.3
    assert distance(run(make(1e-4), reference).grad, exact) < 1e-7


@pytest.mark.parametrize("reference", ["quadratic", "ridge", "logistic", "weighted"])
def test_sama_on_plain_gradient_descent_is_darts(x64, reference):
    reference = REFERENCES[reference]()
    assert_trees_close("sgd", run(Sama(), reference).grad, run(FiniteDifference(0.3), reference).grad, 1e-10)


@pytest.mark.parametrize(
    "make", [lambda e: FiniteDifference(0.3, e), lambda e: Sama(e)], ids=["darts", "sama"]
)
def test_the_rounding_trap_of_float32_is_told(make):
    reference = bent()
    with jax.enable_x64(True):
        exact = one_step(reference, 0.3)
    h = run(make(0.01), reference, dtype=jnp.float32)
    assert distance(h.grad, exact) < 0.01 and make(0.01).doubts(floats(h.stats)) == []
    h = run(make(1e-7), reference, dtype=jnp.float32)
    assert distance(h.grad, exact) > 0.01
    assert any("raise epsilon if rounding" in sentence for sentence in make(1e-7).doubts(floats(h.stats)))
    h = run(make(1.0), reference, dtype=jnp.float32)
    assert distance(h.grad, exact) > 0.01
    assert any(
        "lower it if the inner loss curves" in sentence for sentence in make(1.0).doubts(floats(h.stats))
    )


@pytest.mark.parametrize("estimator", [FiniteDifference(0.3), Sama()], ids=["darts", "sama"])
def test_a_flat_outer_loss_gives_the_direct_gradient(x64, estimator):
    problem = replace(
        ridge().problem, outer_loss=lambda params, meta, batch, key: jnp.sum(meta["penalty"] ** 2)
    )
    h = run(estimator, ridge()._replace(problem=problem))
    assert h.stats["finite"] == 1 and h.stats["difference_error"] == 0
    assert_trees_close("direct", h.grad, {"penalty": 2 * ridge().meta["penalty"]}, 1e-12)


# SAMA


OPTIMIZERS = {
    "momentum": optax.sgd(0.05, momentum=0.7),
    "nesterov": optax.sgd(0.05, momentum=0.7, nesterov=True),
    "adam": optax.adam(0.03),
    "adamw": optax.adamw(0.03, weight_decay=0.1),
    "rmsprop": optax.rmsprop(0.03),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.03)),
}


@pytest.mark.parametrize("num_steps", [1, 10])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sama_is_one_step_of_the_optimizer(x64, name, num_steps):
    """The derivative of f(φ_K + u(∇φ g(φ_K, θ))) with φ_K, the optimizer's state and ∂φ f(φ_K) held."""
    reference, optimizer = weighted(), OPTIMIZERS[name]
    problem, (meta, task) = reference.problem, as_arrays(reference)
    params = jnp.zeros(3)
    state = optimizer.init(params)
    for _ in range(num_steps):
        gradient = jax.grad(problem.inner_loss)(params, meta, task.support, None)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    slope = jax.grad(problem.outer_loss)(params, meta, task.query, None)

    def surrogate(meta):
        gradient = jax.grad(problem.inner_loss)(params, meta, task.support, None)
        return slope @ optimizer.update(gradient, state, params)[0]

    h = run(Sama(1e-3), reference, bl.inner.Gradient(optimizer, num_steps))
    assert_trees_close("sama", h.grad, jax.grad(surrogate)(meta), 1e-6)


def test_the_jacobian_of_adam_in_closed_form(x64):
    """∂u/∂g = −α (1−β₁)/c₁ (1/d − m̂ (1−β₂) g / (c₂ √v̂ d²) × c₁/(1−β₁)), elementwise, d = √v̂ + ε."""
    reference = weighted()
    problem, (meta, task) = reference.problem, as_arrays(reference)
    rate, b1, b2, eps, num_steps = 0.03, 0.9, 0.999, 1e-8, 4
    gradient = jax.jit(lambda phi, meta: jax.grad(problem.inner_loss)(phi, meta, task.support, None))
    phi, m, v = np.zeros(3), np.zeros(3), np.zeros(3)
    for t in range(1, num_steps + 2):
        g = np.asarray(gradient(jnp.asarray(phi), meta))
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        c1, c2 = 1 - b1**t, 1 - b2**t
        root = np.sqrt(v / c2)
        if t <= num_steps:
            phi = phi - rate * (m / c1) / (root + eps)
    jacobian = -rate * (
        (1 - b1) / c1 / (root + eps) - (m / c1) / (root + eps) ** 2 * (1 - b2) * g / (c2 * root)
    )
    slope = np.asarray(jax.grad(problem.outer_loss)(jnp.asarray(phi), meta, task.query, None))
    cross = np.asarray(jax.jacobian(lambda meta: gradient(jnp.asarray(phi), meta))(meta)["weight"])
    h = run(Sama(1e-3), reference, bl.inner.Gradient(optax.adam(rate), num_steps))
    assert_trees_close("adam", h.grad, {"weight": cross.T @ (jacobian * slope)}, 1e-7)


def test_sama_in_mixed_precision():
    """bfloat16 parameters: an ε below their resolution is told, one above it is near enough."""
    reference = weighted()
    solver = bl.inner.Gradient(optax.adam(0.03), 20)
    wide = run(Sama(0.5), reference, solver, dtype=jnp.float32)
    halved = replace(reference.problem, init=lambda meta, key: jnp.zeros(3, jnp.bfloat16))
    narrow = reference._replace(problem=halved)
    start = jax.tree.map(jnp.float32, reference.meta)
    h = run(Sama(0.5), narrow, solver, start)
    assert h.grad["weight"].dtype == np.float32 and h.stats["finite"] == 1
    assert distance(h.grad, wide.grad) < 0.1 and Sama(0.5, tolerance=0.1).doubts(floats(h.stats)) == []
    tiny = Sama(1e-4)
    assert any(
        "bfloat16" in sentence for sentence in tiny.doubts(floats(run(tiny, narrow, solver, start).stats))
    )
