"""A problem whose inner problem is itself bilevel, by every pair of adjoints."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad.implicit.implicit import Implicit
from bilevel.hypergrad.implicit.krylov import gmres
from bilevel.hypergrad.implicit.linear_solvers import cg, direct
from bilevel.hypergrad.implicit.neumann import fixed_point, neumann
from bilevel.hypergrad.implicit.one_step import OneStep
from bilevel.hypergrad.iterations.mixed import Mixed
from bilevel.hypergrad.iterations.unroll import Unroll
from bilevel.testing import assert_close, assert_derivative, assert_trees_close

KEY = jax.random.key(0)
SIZE = 3
_RNG = np.random.default_rng(0)
A = np.diag([1.0, 1.3, 1.6]) + 0.2
TARGET, CENTRE = _RNG.normal(size=SIZE), _RNG.normal(size=SIZE)
NO_TASK = bl.Task(None, None)
IMPLICIT = Implicit(cg(SIZE))
PAIRS = {
    "implicit in implicit": (IMPLICIT, IMPLICIT),
    "implicit in unrolled": (IMPLICIT, Unroll()),
    "implicit in mixed": (IMPLICIT, Mixed()),
    "implicit in checkpointed": (IMPLICIT, Mixed(checkpoint=10)),
    "unrolled in implicit": (Unroll(), IMPLICIT),
    "mixed in implicit": (Mixed(), IMPLICIT),
    "direct in gmres": (Implicit(direct()), Implicit(gmres(SIZE))),
    "neumann in mixed": (Implicit(neumann(120, 0.4)), Mixed()),
    "fixed point in implicit": (Implicit(fixed_point(120)), IMPLICIT),
}


def three_levels(bottom, middle, quartic, bottom_steps=120, middle_steps=150):
    """Top, a function of θ alone. `quartic` makes the bottom level nonlinear.

    bottom:  φ*(ψ) minimizes  ½ φᵀAφ + c Σ φ⁴ − φᵀψ
    middle:  ψ*(θ) minimizes  ½ |φ*(ψ) − t|² + ½ ρ |ψ − θ|²,  ρ = e^{θ'}
    top:     ½ |ψ*(θ) − c|²
    """
    below = bl.Problem(
        init=lambda meta, key: jnp.zeros(SIZE),
        inner_loss=lambda params, meta, batch, key: (
            0.5 * params @ A @ params + quartic * jnp.sum(params**4) - params @ meta
        ),
        outer_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - TARGET) ** 2),
    )
    bottom_solver = bl.inner.Gradient(optax.sgd(0.4), bottom_steps)

    def middle_loss(params, meta, batch, key):
        phi = bottom.solve(below, bottom_solver, params, NO_TASK, KEY)
        pull = jnp.exp(meta["log_rho"]) * jnp.sum((params - meta["theta"]) ** 2)
        return below.outer_loss(phi, params, None, KEY) + 0.5 * pull

    above = bl.Problem(lambda meta, key: jnp.zeros(SIZE), middle_loss, middle_loss)
    middle_solver = bl.inner.Gradient(optax.sgd(0.6), middle_steps)

    def top(meta):
        psi = middle.solve(above, middle_solver, meta, NO_TASK, KEY)
        return 0.5 * jnp.sum((psi - CENTRE) ** 2)

    return top


def start():
    return {"theta": jnp.asarray(np.array([0.5, -1.0, 0.3])), "log_rho": jnp.asarray(np.log(0.7))}


def linear_answer(meta):
    """(A⁻² + ρ I) ψ = A⁻¹ t + ρ θ, and its derivative, in NumPy."""
    inverse, rho = np.linalg.inv(A), np.exp(meta["log_rho"])
    matrix = inverse @ inverse + rho * np.eye(SIZE)
    psi = np.linalg.solve(matrix, inverse @ TARGET + rho * meta["theta"])
    q = np.linalg.solve(matrix, psi - CENTRE)
    return 0.5 * np.sum((psi - CENTRE) ** 2), {"theta": rho * q, "log_rho": rho * q @ (meta["theta"] - psi)}


@pytest.mark.parametrize("name", PAIRS)
def test_three_levels_with_a_closed_form(x64, name):
    bottom, middle = PAIRS[name]
    top = three_levels(bottom, middle, quartic=0.0)
    value, grad = jax.jit(jax.value_and_grad(top))(start())
    expected_value, expected = linear_answer(start())
    assert_close("value", value, expected_value, 1e-10)
    assert_trees_close("grad", grad, expected, 1e-8)


@pytest.mark.parametrize("name", ["implicit in implicit", "implicit in mixed", "mixed in implicit"])
def test_three_levels_that_are_not_quadratic(x64, name):
    """Third derivatives of the bottom loss: no closed form, so by differences of the values."""
    bottom, middle = PAIRS[name]
    top = three_levels(bottom, middle, quartic=0.1)
    grad = jax.jit(jax.grad(top))(start())
    assert_derivative(jax.jit(top), grad, start(), tolerance=1e-6)
    forward = jax.jit(jax.jacfwd(top))(start())
    assert_trees_close("forward", forward, grad, 1e-8)


def test_the_hessian_of_a_third_level(x64):
    """Fourth derivatives of the bottom loss."""
    top = three_levels(IMPLICIT, IMPLICIT, quartic=0.1)
    grad = jax.grad(top)
    direction = {"theta": jnp.array([1.0, 0.5, -0.3]), "log_rho": jnp.array(0.4)}
    product = jax.jit(lambda m: jax.jvp(grad, (m,), (direction,))[1])(start())
    step = 1e-5
    ahead, behind = (
        jax.jit(grad)(jax.tree.map(lambda x, d, s=s: x + s * step * d, start(), direction)) for s in (1, -1)
    )
    measured = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    assert_trees_close("product", product, measured, 1e-6)


def test_the_hypergradient_of_an_implicit_middle_level(x64):
    """The estimators themselves take a problem whose inner loss holds another level."""

    @dataclass(frozen=True)
    class Nothing:
        """The middle params as they are given, to be judged where the solution is known."""

        def solve(self, problem, meta, task, key):
            return bl.Solution(jnp.asarray(task.support), {})

    inverse = np.linalg.inv(A)
    meta = start()
    psi = np.linalg.solve(
        inverse @ inverse + 0.7 * np.eye(SIZE), inverse @ TARGET + 0.7 * np.asarray(meta["theta"])
    )
    below = bl.Problem(
        init=lambda meta, key: jnp.zeros(SIZE),
        inner_loss=lambda params, meta, batch, key: 0.5 * params @ A @ params - params @ meta,
        outer_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - TARGET) ** 2),
    )

    def middle_loss(params, meta, batch, key):
        phi = IMPLICIT.solve(below, bl.inner.Gradient(optax.sgd(0.4), 120), params, NO_TASK, KEY)
        pull = jnp.exp(meta["log_rho"]) * jnp.sum((params - meta["theta"]) ** 2)
        return below.outer_loss(phi, params, None, KEY) + 0.5 * pull

    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(SIZE),
        inner_loss=middle_loss,
        outer_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - CENTRE) ** 2),
    )
    task = bl.Task(jnp.asarray(psi), None)
    h = jax.jit(lambda m: bl.hypergradient(problem, Nothing(), IMPLICIT, m, task, KEY))(meta)
    assert_trees_close("grad", h.grad, linear_answer(meta)[1], 1e-9)
    assert h.stats["inner_error"] < 1e-10 and IMPLICIT.doubts({k: float(v) for k, v in h.stats.items()}) == []


def test_under_vmap_and_scan(x64):
    top = three_levels(IMPLICIT, IMPLICIT, quartic=0.1, bottom_steps=60, middle_steps=60)
    metas = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), start())
    batched = jax.jit(jax.vmap(jax.grad(top)))(metas)
    single = jax.jit(jax.grad(top))
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], metas)
        assert_trees_close("one", jax.tree.map(lambda leaf, i=i: leaf[i], batched), single(one), 1e-9)
    scanned = jax.jit(lambda ms: jax.lax.scan(lambda c, m: (c, jax.grad(top)(m)), 0, ms)[1])(metas)
    assert_trees_close("scan", scanned, batched, 1e-9)


def test_one_step_in_a_third_level(x64):
    """One-step at the bottom treats the Hessian as 1/η throughout: the closed form with A⁻¹ → η I there."""
    rate = 0.6
    top = three_levels(OneStep(rate), Unroll(), quartic=0.0, middle_steps=150)
    inverse = np.linalg.inv(A)
    meta = jax.tree.map(np.asarray, start())
    rho = np.exp(meta["log_rho"])
    psi = np.zeros(SIZE)
    for _ in range(150):  # the middle steps follow the biased hypergradient
        psi = psi - 0.6 * (rate * (inverse @ psi - TARGET) + rho * (psi - meta["theta"]))
    assert_close("value", jax.jit(top)(start()), 0.5 * np.sum((psi - CENTRE) ** 2), 1e-10)
