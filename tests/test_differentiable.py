"""Any optimizer inside the loop: the values of optax to the bit, and derivatives that are finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad import Mixed, Unroll
from bilevel.inner import differentiable
from bilevel.testing import assert_close, assert_derivative

NUM_STEPS = 6  # beyond the few that are written out: one step is compiled, as a loop
KEY, NO_TASK = jax.random.key(0), bl.Task(None, None)


def clipped(norm):
    return optax.chain(optax.clip_by_global_norm(norm), optax.sgd(0.05))


# The second group is finite without help: it is here to stay so.
OPTIMIZERS = {
    "adam": optax.adam(0.05),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
    "nadam": optax.nadam(0.05),
    "radam": optax.radam(0.05),
    "lamb": optax.lamb(0.05),
    "lars": optax.lars(0.05),
    "muon": optax.contrib.muon(0.05),
    "adafactor": optax.adafactor(0.05, min_dim_size_to_factor=2),
    "novograd": optax.novograd(0.05),
    "amsgrad": optax.amsgrad(0.05),
    "clip_by_global_norm": clipped(0.5),
    "clip_by_a_norm_never_reached": clipped(50.0),
    "rmsprop": optax.rmsprop(0.05),
    "rmsprop-centered": optax.rmsprop(0.05, centered=True, momentum=0.5),
    "adagrad": optax.adagrad(0.05),
    "lion": optax.lion(0.05),
    "yogi": optax.yogi(0.05),
    "adabelief": optax.adabelief(0.05),
    "adadelta": optax.adadelta(0.5),
    "adamax": optax.adamax(0.05),
    "adan": optax.adan(0.05),
    "sm3": optax.sm3(0.05),
    "sgd": optax.sgd(0.05),
    "momentum": optax.sgd(0.05, momentum=0.9),
    "nesterov": optax.sgd(0.05, momentum=0.9, nesterov=True),
    "adaptive_grad_clip": optax.chain(optax.adaptive_grad_clip(0.1), optax.sgd(0.05)),
    "schedule": optax.adam(optax.warmup_cosine_decay_schedule(0.0, 0.05, 2, 6)),
}


def inner_loss(params, meta, batch, key):
    """The unit dead[0] is off, so what it feeds, dead[1], has a gradient of 0 · scale at every step."""
    w = params["live"] @ jnp.array([[0.4, -0.3], [0.2, 0.9]])
    off = jax.nn.relu(params["dead"][0] - 9.0)
    return (jnp.mean(jnp.cosh(w - 0.3)) + off @ params["dead"][1]) * meta["scale"]


PROBLEM = bl.Problem(
    init=lambda meta, key: meta["init"],
    inner_loss=inner_loss,
    outer_loss=lambda params, meta, batch, key: (
        jnp.sum(jnp.sin(params["live"])) + 0.5 * jnp.sum(params["dead"] ** 2)
    ),
)


def start(dead):
    live = jnp.array([[0.7, -1.1], [1.3, 0.4], [-0.6, 0.9]])
    return {"init": {"live": live, "dead": jnp.array(dead) * jnp.ones((2, 2))}, "scale": jnp.array(1.7)}


def hypergradient(optimizer, meta, estimator):
    solver = bl.inner.Gradient(optimizer, NUM_STEPS)
    return bl.hypergradient(PROBLEM, solver, estimator, meta, NO_TASK, KEY)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hypergradient_with_a_dead_leaf(x64, name):
    """At 0 the dead leaf is the harder case: trust ratios and the like divide by its norm."""
    run = jax.jit(lambda meta: hypergradient(OPTIMIZERS[name], meta, Mixed()))
    for dead in (0.5, 0.0):
        meta = start(dead)
        h = run(meta)
        assert h.stats["finite"] == 1, h.grad
        live = {"live": meta["init"]["live"], "scale": meta["scale"]}

        def value(live, meta=meta):
            init = {**meta["init"], "live": live["live"]}
            return run({"init": init, "scale": live["scale"]}).value

        claimed = {"live": h.grad["init"]["live"], "scale": h.grad["scale"]}
        assert_derivative(value, claimed, live, num_directions=2, step=1e-6, tolerance=2e-6)
        assert np.any(claimed["live"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_optax_to_the_bit(name):
    optimizer = OPTIMIZERS[name]
    ours, theirs = jax.jit(differentiable(optimizer.update)), jax.jit(optimizer.update)
    meta = start(0.0)
    params, state = meta["init"], optimizer.init(meta["init"])
    for _ in range(NUM_STEPS):
        grads = jax.tree.map(jnp.sin, {**params, "dead": jnp.zeros((2, 2))})
        got, expected = ours(grads, state, params), theirs(grads, state, params)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        updates, state = got
        params = optax.apply_updates(params, updates)


def test_steps_run_eagerly_are_those_of_optax():
    """To rounding: eagerly, optax runs some of its parts compiled, which fuses operations."""
    for optimizer in (optax.adam(0.05), clipped(0.5), optax.rmsprop(0.05, centered=True)):
        params = start(0.5)["init"]
        state = optimizer.init(params)
        grads = jax.tree.map(jnp.cos, params)
        got = differentiable(optimizer.update)(grads, state, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=3e-7),
            got,
            optimizer.update(grads, state, params),
        )


@pytest.mark.parametrize("name", ["adam", "clip_by_global_norm"])
def test_the_fault_is_real(name):
    """Plain optax gives NaN on these very problems; were it not so, the tests here would say nothing."""
    optimizer, meta = OPTIMIZERS[name], start(0.5)
    if name == "clip_by_global_norm":  # every gradient zero: the norm is a root at zero
        meta["scale"] = jnp.array(0.0)

    @jax.jit
    @jax.grad
    def plain(meta):
        params, state = meta["init"], optimizer.init(meta["init"])
        for _ in range(2):
            grads = jax.grad(inner_loss)(params, meta, None, None)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return PROBLEM.outer_loss(params, meta, None, None)

    assert np.isnan(plain(meta)["scale"])
    for estimator in (Unroll(), Mixed()):
        h = hypergradient(optimizer, meta, estimator)
        assert h.stats["finite"] == 1
        # The unit that is off is never moved: its hypergradient is that of the outer loss.
        assert_close("off", h.grad["init"]["dead"][0], np.full(2, 0.5), 1e-6)


# The transformation itself


def root(x):
    return jnp.sqrt(x**2)


def through_scan(x):
    return jax.lax.scan(lambda c, _: (root(c), root(c)), x, length=2)[0]


def through_while(x):
    return jax.lax.while_loop(lambda c: c[1] < 2, lambda c: (root(c[0]), c[1] + 1), (x, 0))[0]


CONTROL_FLOW = {
    "plain": root,
    "jit": jax.jit(root),
    "jit in jit": jax.jit(lambda x: jax.jit(root)(x) + 0 * x),
    "scan": through_scan,
    "fori_loop": lambda x: jax.lax.fori_loop(0, 2, lambda _, c: root(c), x),
    "while": through_while,
    "cond": lambda x: jax.lax.cond(x > -1, root, lambda x: -x, x),
    "switch": lambda x: jax.lax.switch(1, [jnp.cos, root, jnp.sin], x),
    "checkpoint": jax.checkpoint(root),
    "scan in cond": lambda x: jax.lax.cond(x > -1, through_scan, lambda x: -x, x),
    "vmap": lambda x: jax.vmap(root)(x[None])[0],
    "vmap over division": lambda x: jax.vmap(lambda a, b: jnp.sum(a / b), (0, None))(
        root(x) * jnp.ones((2, 3)), jnp.array([3.0, 6.0, 12.0]) * 7 / 12
    )[1],
}


@pytest.mark.parametrize("name", CONTROL_FLOW)
def test_singular_operations_are_found_everywhere(x64, name):
    function = CONTROL_FLOW[name]
    safe = differentiable(function)
    slope = jax.jacfwd if name == "while" else jax.grad  # JAX has no reverse mode for it
    for x in (0.0, 2.0, -0.3):
        assert safe(x) == function(jnp.array(x))
        assert_close("value", jax.jit(safe)(x), abs(x), 1e-15)
        assert_close("slope", slope(safe)(jnp.array(x)), np.sign(x), 1e-12)
    assert np.isnan(slope(function)(jnp.array(0.0)))
    assert_close("second", jax.jacfwd(slope(safe))(jnp.array(2.0)), 0.0, 1e-12)
    assert np.isfinite(jax.jacfwd(slope(safe))(jnp.array(0.0)))


def test_a_rule_written_by_hand_is_left_alone():
    @jax.custom_jvp
    def forward(x):
        return jnp.sqrt(x)

    forward.defjvps(lambda t, out, x: 7.0 * t)

    @jax.custom_vjp
    def backward(x):
        return jnp.sqrt(x)

    backward.defvjp(lambda x: (jnp.sqrt(x), None), lambda residual, g: (5.0 * g,))
    safe = differentiable(lambda x: forward(x) + backward(x) + jnp.sqrt(x))
    assert jax.grad(safe)(0.0) == 12.0
    assert jax.grad(safe)(4.0) == 12.25


def test_second_derivatives_are_finite_and_right(x64):
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1))

    def moved(x):
        grads = {"a": x[:2] ** 3, "b": jnp.zeros(2) * x[2]}
        updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
        return jnp.sum(jnp.sin(updates["a"])) + jnp.sum(updates["b"])

    safe = differentiable(moved)
    hessian = jax.jit(jax.hessian(safe))
    for x in (jnp.array([0.5, -0.8, 0.3]), jnp.array([0.5, 0.0, 0.0]), jnp.zeros(3)):
        assert np.all(np.isfinite(hessian(x)))
    x, direction = jnp.array([0.5, -0.8, 0.3]), jnp.array([0.2, 1.0, -0.5])
    assert_derivative(
        jax.jit(lambda x: jax.grad(safe)(x) @ direction), hessian(x) @ direction, x, tolerance=1e-5
    )


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.grad])
@pytest.mark.parametrize("adjoint", [Unroll(), Mixed()])
def test_a_level_above_a_dead_leaf(x64, adjoint, outer):
    """The derivative of a hypergradient passes the loop twice."""
    solver = bl.inner.Gradient(optax.adam(0.05), 2)

    def value(scale):
        params = adjoint.solve(PROBLEM, solver, {**start(0.0), "scale": scale}, NO_TASK, KEY)
        return PROBLEM.outer_loss(params, None, None, None)

    slope = jax.jit(jax.grad(value))
    got = jax.jit(outer(jax.grad(value)))(1.7)
    assert_derivative(slope, got, 1.7, tolerance=1e-5)


def test_partial_derivatives_at_singular_points():
    def pair(function, *args):
        return [float(g) for g in jax.grad(differentiable(function), argnums=(0, 1))(*args)]

    assert pair(lambda x, y: x / y, 1.0, 0.0) == [0.0, 0.0]
    assert pair(lambda x, y: x / y, 3.0, 2.0) == [0.5, -0.75]
    assert pair(lambda x, y: x**y, 0.0, 0.5) == [0.0, 0.0]
    assert pair(jnp.arctan2, 0.0, 0.0) == [0.0, 0.0]
    # The selected branch is all that counts: the other one is a NaN by value.
    selected = differentiable(lambda x: jnp.where(x > 0, jnp.sqrt(x) * x, x))
    assert jax.grad(selected)(-1.0) == 1.0 and jax.grad(selected)(4.0) == 3.0
    assert jax.grad(differentiable(jnp.log))(0.0) == 0.0
    assert jax.grad(differentiable(lambda x: (1 + 0j) * x * (1 - 0j)), holomorphic=True)(1j) == 1


# What an inner loop cannot use


@pytest.mark.parametrize("optimizer", [optax.polyak_sgd(), optax.lbfgs()])
def test_optimizers_that_need_more_than_the_gradient(optimizer):
    with pytest.raises(TypeError, match=r"cannot drive an inner loop.*needs more than the gradient"):
        hypergradient(optimizer, start(0.5), Mixed())


def test_what_is_no_optimizer():
    with pytest.raises(TypeError, match=r"optimizer\(meta\) must return an optax optimizer, got float"):
        hypergradient(lambda meta: 0.1, start(0.5), Mixed())
    with pytest.raises(TypeError, match=r"must be an optax optimizer or a function of meta.*got float"):
        bl.inner.Gradient(0.1, 3)


@pytest.mark.parametrize("num_steps", [1.0, True, None, "3"])
def test_num_steps_must_be_an_int(num_steps):
    with pytest.raises(TypeError, match=r"num_steps must be an int"):
        bl.inner.Gradient(optax.sgd(0.1), num_steps)


def test_num_steps_must_not_be_negative():
    with pytest.raises(ValueError, match=r"num_steps must be at least 0, got -1"):
        bl.inner.Gradient(optax.sgd(0.1), -1)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_a_scalar_beside_an_array_batches(x64, axes):
    """As a learned rate of Adam, or its count of steps, beside a gradient."""
    step = differentiable(lambda rate, x: jnp.sum(jnp.sqrt(x**2 + rate**2) / rate * x))
    rates, xs = jnp.array([0.1, 0.2]), jnp.array([[0.0, 1.0, -2.0], [3.0, 0.0, 1.0]])
    rate, x = (rates if axes[0] == 0 else rates[0]), (xs if axes[1] == 0 else xs[0])
    for function in (step, jax.grad(step, argnums=(0, 1))):
        together = jax.vmap(function, axes)(rate, x)
        for i in range(2):
            alone = function(rates[i if axes[0] == 0 else 0], xs[i if axes[1] == 0 else 0])
            for got, expected in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
                np.testing.assert_allclose(got[i], expected, rtol=1e-14)


def test_rates_of_adam_batch(x64):
    problem = bl.Problem(
        init=lambda meta, key: {"w": jnp.ones(2), "b": jnp.ones(())},
        inner_loss=lambda params, meta, batch, key: jnp.sum(params["w"] ** 2) * params["b"] ** 2,
        outer_loss=lambda params, meta, batch, key: jnp.sum(params["w"]) + params["b"],
    )
    solver = bl.inner.Gradient(lambda meta: optax.adam(jnp.exp(meta)), 3)

    def one(meta):
        return bl.hypergradient(problem, solver, bl.hypergrad.Mixed(), meta, NO_TASK, KEY).grad

    metas = jnp.array([-2.0, -3.0])
    np.testing.assert_allclose(jax.vmap(one)(metas), [one(m) for m in metas], rtol=1e-12)
