"""Learners that shape the inner gradients: Meta-Curvature, WarpGrad and Leap against their formulas."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import optax
import pytest
from learner_tools import (
    DEEP,
    KEY,
    NET,
    estimate,
    exact,
    first_meta,
    plain_perceptron,
    regression_task,
    solve,
    squared_error,
)

import bilevel as bl
from bilevel.hypergrad import FirstOrder, Mixed, Reptile
from bilevel.learners import cross_entropy, mean_squared_error
from bilevel.learners.leap import Leap
from bilevel.learners.meta_curvature import conv_modes, meta_curvature, scale_by_curvature
from bilevel.learners.warp_grad import WarpGradient, linear_warps, warp_grad
from bilevel.testing import assert_close, assert_derivative, assert_trees_close

# Meta-Curvature


def test_meta_curvature_by_hand(x64):
    learner = meta_curvature(NET, mean_squared_error, num_steps=2, rate=0.1)
    meta, task = first_meta(learner), regression_task()

    @jax.jit
    def step(params):
        grads = jax.grad(lambda p: squared_error(plain_perceptron, p, task.support))(params)
        moved = {}
        for name in ("hidden_0", "head"):
            (m_in, m_out), (m_bias,) = (meta["curvature"][name][leaf] for leaf in ("w", "b"))
            moved[name] = {
                "w": params[name]["w"] - 0.1 * m_in @ grads[name]["w"] @ m_out.T,
                "b": params[name]["b"] - 0.1 * m_bias @ grads[name]["b"],
            }
        return moved

    params = step(step(meta["init"]))
    assert_trees_close("params", solve(learner, meta, task), params, 1e-10)
    exact(learner, meta)


def test_meta_curvature_starts_as_maml(x64):
    learner = meta_curvature(NET, mean_squared_error, num_steps=3, rate=0.1)
    plain = bl.maml(NET, mean_squared_error, num_steps=3, rates=0.1)
    meta, task = learner.init_meta(KEY), regression_task()
    grad = estimate(plain, {"init": meta["init"]}, task).grad["init"]
    assert_trees_close("grad", estimate(learner, meta, task).grad["init"], grad, 1e-10)


def test_curvature_of_a_convolution(x64):
    keys = jax.random.split(KEY, 4)
    g = jax.random.normal(keys[0], (3, 9 * 2))
    out, taps, channels = (jax.random.normal(k, (n, n)) for k, n in zip(keys[1:], (3, 9, 2), strict=True))
    found = scale_by_curvature([[out, taps, channels]]).update([g], optax.EmptyState())[0][0]
    expected = jnp.einsum("ao,bt,ci,oti->abc", out, taps, channels, g.reshape(3, 9, 2)).reshape(3, 18)
    assert_close("product", found, expected, 1e-10)
    learner = meta_curvature(bl.nets.conv4(5, 4), cross_entropy, modes=conv_modes)
    curvature = jax.eval_shape(learner.init_meta, KEY)["curvature"]
    assert [m.shape for m in curvature["block_1"]["w"]] == [(4, 4), (9, 9), (4, 4)]
    assert [m.shape for m in curvature["head"]["w"]] == [(4, 4), (5, 5)]


def test_meta_curvature_refuses():
    learner = meta_curvature(NET, mean_squared_error, modes=lambda path, shape: (2,))
    with pytest.raises(ValueError, match=r"keep the size of a leaf, got \(2,\) for head.b"):
        learner.init_meta(KEY)
    learner = meta_curvature(NET, mean_squared_error, estimator=FirstOrder())
    with pytest.warns(bl.FirstOrderWarning, match=r"meta\['curvature'\]\['head'\]\['b'\]"):
        estimate(learner, learner.init_meta(KEY), regression_task())


# WarpGrad and Leap


@pytest.mark.parametrize("start", [Mixed(), Reptile(), Leap()])
def test_warp_objective_by_hand(x64, start):
    """The gradient in ω is that of the mean loss one step after each φₖ, with the φₖ as constants."""
    learner = warp_grad(DEEP, mean_squared_error, warp=("hidden_1",), num_steps=3, rate=0.1, start=start)
    meta, task = first_meta(learner), regression_task()

    def loss(params, warp, batch):
        return squared_error(plain_perceptron, {**params, **warp}, batch)

    @jax.jit
    def step(params, warp):
        grads = jax.grad(loss)(params, warp, task.support)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    points = [meta["init"]]
    for _ in range(3):
        points.append(step(points[-1], meta["warp"]))

    @jax.jit
    def objective(warp):
        return sum(loss(step(params, warp), warp, task.query) for params in points[:3]) / 3

    h = estimate(learner, meta, task)
    assert_derivative(objective, h.grad["warp"], meta["warp"])
    assert_close("warp_loss", h.stats["warp_loss"], objective(meta["warp"]), 1e-10)
    assert_close("value", h.value, loss(points[3], meta["warp"], task.query), 1e-10)
    assert h.stats["zero_leaves"] == 0 and h.stats["finite"] == 1
    # The initialization gets what its estimator gives with the warps as they are.
    if isinstance(start, Reptile):
        expected = jax.tree.map(lambda a, b: a - b, points[0], points[3])
        assert_trees_close("init", h.grad["init"], expected, 1e-10)
    elif isinstance(start, Mixed):

        @jax.jit
        def after(init):
            for _ in range(3):
                init = step(init, meta["warp"])
            return loss(init, meta["warp"], task.query)

        assert_derivative(after, h.grad["init"], meta["init"])


def test_leap_shortens_the_way(x64):
    learner = bl.maml(NET, mean_squared_error, num_steps=3, rates=0.2, estimator=Leap())
    meta, task = first_meta(learner), regression_task()

    @jax.jit
    def loss(params):
        return squared_error(plain_perceptron, params, task.support)

    points, slope = [meta["init"]], jax.jit(jax.grad(loss))
    for _ in range(3):
        points.append(jax.tree.map(lambda p, g: p - 0.2 * g, points[-1], slope(points[-1])))
    assert all(loss(a) > loss(b) for a, b in pairwise(points))  # so the stabilizer has nothing to do

    def length(begin, end):
        """Of one piece of the way, with the far end held."""
        squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), begin, end)
        return jnp.sqrt(sum(jax.tree.leaves(squares)) + (loss(begin) - loss(end)) ** 2)

    pull = jax.jit(jax.grad(length))
    pulls = [pull(a, b) for a, b in pairwise(points)]
    expected = jax.tree.map(lambda *parts: sum(parts), *pulls)
    h = estimate(learner, meta, task)
    assert_trees_close("grad", h.grad, {"init": expected}, 1e-10)
    assert_close("value", h.value, squared_error(plain_perceptron, points[3], task.query), 1e-10)


def test_leap_at_a_minimum_has_no_direction():
    problem = bl.Problem(lambda meta, key: meta, lambda p, m, b, k: p**2, lambda p, m, b, k: p)
    solver = bl.inner.Gradient(optax.sgd(0.5), 2)
    h = bl.hypergradient(problem, solver, Leap(), 0.0, bl.Task(None, None), KEY)
    assert h.grad == 0 and h.stats["finite"] == 1


def test_linear_warps_are_layers(x64):
    net = linear_warps(NET)
    params = jax.tree.map(lambda x: x + 0.2 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), net.init(KEY))
    x, v = regression_task().query[0], params["warp"]["hidden_0"]
    hidden = jnp.tanh((x @ params["hidden_0"]["w"] + params["hidden_0"]["b"]) @ v.T)
    expected = hidden @ params["head"]["w"] + params["head"]["b"]
    assert_close("answers", net.apply(params, x), expected, 1e-10)
    start = net.init(KEY)
    plain = {name: start[name] for name in ("hidden_0", "head")}
    assert_close("identity", net.apply(start, x), NET.apply(plain, x), 1e-12)


def test_linear_warps_of_a_convolution():
    net, plain = linear_warps(bl.nets.conv4(3, 4)), bl.nets.conv4(3, 4)
    params, x = jax.jit(net.init)(KEY), jax.random.uniform(KEY, (3, 28, 28, 1))
    turned = {**params, "warp": {**params["warp"], "block_0": jnp.eye(4)[jnp.array([1, 0, 3, 2])]}}
    # Swapping features before normalization is swapping the rows of the weights.
    first = {**params["block_0"], "w": params["block_0"]["w"][jnp.array([1, 0, 3, 2])]}
    expected = jax.jit(plain.apply)({**{n: params[n] for n in params if n != "warp"}, "block_0": first}, x)
    assert_close("answers", jax.jit(net.apply)(turned, x), expected, 1e-5)


def test_warp_grad_refuses():
    with pytest.raises(KeyError, match="no 'warp'; linear_warps"):
        warp_grad(NET, mean_squared_error).init_meta(KEY)
    with pytest.raises(ValueError, match="layers to adapt and layers to warp"):
        warp_grad(NET, mean_squared_error, warp=()).init_meta(KEY)
    learner = warp_grad(linear_warps(NET), mean_squared_error)
    with pytest.raises(TypeError, match="not a function of meta"):
        WarpGradient().check(learner.problem, bl.inner.Gradient(lambda meta: optax.sgd(0.1), 1))
    with pytest.raises(ValueError, match="num_steps of at least 1, got 0"):
        warp_grad(linear_warps(NET), mean_squared_error, num_steps=0)
    with pytest.raises(KeyError, match="finds no layer"):
        linear_warps(bl.nets.Net(lambda key: {"head": jnp.ones(2)}, lambda params, x: x)).init(KEY)
