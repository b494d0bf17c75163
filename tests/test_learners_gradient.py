"""Learners that adapt weights are the methods they name: BOIL, Reptile, iMAML, CAVIA by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from learner_tools import (
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
from bilevel.learners import cross_entropy, mean_squared_error
from bilevel.learners.cavia import FilmContext, InputContext, cavia
from bilevel.learners.imaml import imaml
from bilevel.learners.maml import AllBut, boil
from bilevel.learners.reptile import minibatch, reptile
from bilevel.recipes.cavia import Cavia
from bilevel.recipes.few_shot import FewShotData
from bilevel.recipes.imaml import Imaml
from bilevel.recipes.meta_curvature import MetaCurvature
from bilevel.recipes.reptile import Reptile as ReptileRecipe
from bilevel.recipes.warp_grad import WarpGrad
from bilevel.testing import assert_close, assert_trees_close
from bilevel.train.step import meta_step

# BOIL


def test_boil_adapts_the_body_and_learns_the_head(x64):
    learner = boil(NET, mean_squared_error, num_steps=2, rates=0.1)
    meta, task = first_meta(learner), regression_task()
    body, head = {"hidden_0": meta["init"]["hidden_0"]}, {"head": meta["init"]["head"]}

    @jax.jit
    def step(body):
        grads = jax.grad(lambda body: squared_error(plain_perceptron, {**body, **head}, task.support))(body)
        return jax.tree.map(lambda p, g: p - 0.1 * g, body, grads)

    body = step(step(body))
    params = solve(learner, meta, task)
    assert_trees_close("body", params, body, 1e-10)
    x = task.query[0]
    assert_close("answers", learner.predict(params, meta, x), plain_perceptron({**body, **head}, x), 1e-10)
    exact(learner)


def test_all_but_an_entry_that_is_none():
    with pytest.raises(KeyError, match=r"AllBut\(name='neck'\).*\['head', 'hidden_0'\]"):
        boil(NET, mean_squared_error, head="neck").init_meta(KEY)
    with pytest.raises(TypeError, match='adapt must be "all"'):
        bl.maml(NET, mean_squared_error, adapt=("head",))  # type: ignore
    assert AllBut("head") == AllBut("head")


# Reptile


def test_reptile_is_the_way_of_adam_without_momentum(x64):
    learner = reptile(NET, mean_squared_error, num_steps=3, rate=0.05)
    meta, task = first_meta(learner), regression_task()
    params = meta["init"]
    second = jax.tree.map(jnp.zeros_like, params)
    slope = jax.jit(jax.grad(lambda params: squared_error(plain_perceptron, params, task.support)))
    for step in (1, 2, 3):
        grads = slope(params)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, second, grads)
        unbiased = jax.tree.map(lambda v: v / (1 - 0.999**step), second)  # noqa: B023
        params = jax.tree.map(lambda p, g, v: p - 0.05 * g / (jnp.sqrt(v) + 1e-8), params, grads, unbiased)
    expected = jax.tree.map(lambda a, b: a - b, meta["init"], params)
    h = estimate(learner, meta, task)
    assert_trees_close("grad", h.grad, {"init": expected}, 1e-8)
    # So gradient descent of rate 1 on meta ends where the inner loop does.
    moved = optax.apply_updates(meta, optax.sgd(1.0).update(h.grad, optax.sgd(1.0).init(meta))[0])
    assert_trees_close("moved", moved, {"init": params}, 1e-8)


def test_reptile_takes_another_minibatch_at_each_step():
    seen = []

    def loss(outputs, targets):
        jax.debug.callback(lambda y: seen.append(tuple(sorted(y.ravel().tolist()))), targets)
        return mean_squared_error(outputs, targets)

    x = jnp.arange(8.0)[:, None]
    task = bl.Task((x, x), (x[:1], x[:1] - 1))
    learner = reptile(NET, loss, num_steps=6, batch_size=3)
    solve(learner, learner.init_meta(KEY), task)
    jax.effects_barrier()
    assert len(seen) == 6 and len(set(seen)) > 1
    assert all(len(rows) == len(set(rows)) == 3 for rows in seen)


def test_minibatch():
    x = jnp.arange(4)
    assert minibatch((x, x), 4, KEY)[0] is x  # all there is, in order
    rows = np.asarray(jax.vmap(lambda key: minibatch(x, 2, key))(jax.random.split(KEY, 400)))
    assert np.all(rows[:, 0] != rows[:, 1])
    assert np.all(np.abs(np.bincount(rows.ravel()) - 200) < 5 * np.sqrt(100))


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_reptile_refuses_a_batch_size(size):
    with pytest.raises(ValueError, match="batch_size must be None or at least 1"):
        reptile(NET, mean_squared_error, batch_size=size)


# iMAML


def linear_net():
    return bl.nets.Net(lambda key: jax.random.normal(key, (3,)), lambda w, x: x @ w)


def test_imaml_on_ridge_regression(x64):
    """Everything has a formula: φ* = (2XᵀX/n + λ)⁻¹ (2Xᵀy/n + λθ)."""
    strength, keys = 0.7, jax.random.split(KEY, 4)
    x, y = jax.random.normal(keys[0], (6, 3)), jax.random.normal(keys[1], (6,))
    task = bl.Task((x, y), (jax.random.normal(keys[2], (5, 3)), jax.random.normal(keys[3], (5,))))
    learner = imaml(linear_net(), mean_squared_error, num_steps=400, rate=0.1, strength=strength)
    meta = learner.init_meta(KEY)
    system = 2 * x.T @ x / 6 + strength * jnp.eye(3)

    def query_loss(start):
        solution = jnp.linalg.solve(system, 2 * x.T @ y / 6 + strength * start)
        return jnp.mean((task.query[0] @ solution - task.query[1]) ** 2)

    value, grad = jax.value_and_grad(query_loss)(meta["init"])
    h = estimate(learner, meta, task)
    assert_close("value", h.value, value, 1e-8)
    assert_close("grad", h.grad["init"], grad, 1e-8)
    # The figure to watch is the loss of the task, without the pull.
    assert_close("query_loss", h.stats["query_loss"], value, 1e-8)


def test_imaml_tells_of_an_inner_problem_that_is_not_solved():
    learner = imaml(NET, mean_squared_error, num_steps=1, rate=1e-3)
    meta = learner.init_meta(KEY)
    with pytest.warns(bl.HypergradientWarning, match="the inner problem is not solved"):
        h = estimate(learner, meta, regression_task())
    assert h.stats["inner_error"] > 1e-2
    with pytest.raises(ValueError, match="strength must be positive"):
        imaml(NET, mean_squared_error, strength=0.0)


# CAVIA


def test_cavia_beside_the_inputs(x64):
    net = bl.nets.mlp([1 + 2, 4, 1], jnp.tanh)
    learner = cavia(net, mean_squared_error, context=InputContext(2), num_steps=2, rate=0.5)
    meta, task = first_meta(learner), regression_task()
    assert set(meta) == {"net"}

    def apply(context, x):
        return plain_perceptron(meta["net"], jnp.hstack([x, jnp.tile(context, (len(x), 1))]))

    context = jnp.zeros(2)
    slope = jax.jit(jax.grad(lambda context: squared_error(apply, context, task.support)))
    for _ in range(2):
        context = context - 0.5 * slope(context)
    params = solve(learner, meta, task)
    assert_close("context", params, context, 1e-10)
    x = task.query[0]
    assert_close("answers", learner.predict(params, meta, x), apply(context, x), 1e-10)
    exact(learner, meta)


def test_cavia_modulates_a_dense_layer(x64):
    learner = cavia(NET, mean_squared_error, context=FilmContext(3, "hidden_0"), num_steps=2, rate=0.5)
    meta, task = first_meta(learner), regression_task()
    film = meta["film"]
    assert film["u"].shape == film["v"].shape == (4, 3)

    def apply(context, x):
        h = x @ meta["net"]["hidden_0"]["w"] + meta["net"]["hidden_0"]["b"]
        h = jnp.tanh((1 + film["u"] @ context) * h + film["v"] @ context)
        return h @ meta["net"]["head"]["w"] + meta["net"]["head"]["b"]

    context = jnp.zeros(3)
    slope = jax.jit(jax.grad(lambda context: squared_error(apply, context, task.support)))
    for _ in range(2):
        context = context - 0.5 * slope(context)
    assert_close("context", solve(learner, meta, task), context, 1e-10)
    x = task.query[0]
    assert_close("answers", learner.predict(context, meta, x), apply(context, x), 1e-10)
    exact(learner, meta)


def test_cavia_modulates_a_normalized_layer(x64):
    def normalized(layer, x):
        h = x @ layer["w"]
        return layer["scale"] * (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5) + layer["bias"]

    net = bl.nets.Net(
        lambda key: {
            "block_0": {"w": jax.random.normal(key, (1, 4)), "scale": jnp.ones(4), "bias": jnp.zeros(4)}
        },
        lambda params, x: jnp.tanh(normalized(params["block_0"], x)).sum(1, keepdims=True),
    )
    learner = cavia(net, mean_squared_error, context=FilmContext(2, "block_0"))
    meta, x = first_meta(learner), regression_task().query[0]
    context = jnp.array([0.3, -0.7])
    factor, shift = 1 + meta["film"]["u"] @ context, meta["film"]["v"] @ context
    expected = jnp.tanh(factor * normalized(meta["net"]["block_0"], x) + shift).sum(1, keepdims=True)
    assert_close("answers", learner.predict(context, meta, x), expected, 1e-10)


def test_cavia_refuses():
    with pytest.raises(TypeError, match=r"InputContext\(size\) or FilmContext"):
        cavia(NET, mean_squared_error, context=3)  # type: ignore
    with pytest.raises(ValueError, match="size must be a whole number of at least 1, got 0"):
        InputContext(0)
    learner = cavia(NET, mean_squared_error, context=FilmContext(2, "block_2"))
    with pytest.raises(KeyError, match=r"layer='block_2'.*\['head', 'hidden_0'\]"):
        learner.init_meta(KEY)
    learner = cavia(bl.nets.conv4(5, 4), cross_entropy, context=InputContext(2))
    with pytest.raises(ValueError, match=r"inputs \[n, d\], got \(5, 28, 28, 1\)"):
        learner.predict(jnp.zeros(2), {"net": {}}, jnp.zeros((5, 28, 28, 1)))


# All of them


@pytest.mark.parametrize("make", [reptile, imaml, boil, bl.maml])
def test_noise_is_in_the_outer_loss_only(make):
    noisy = NET._replace(noisy=lambda params, x, key: NET.apply(params, x) + 3.0)
    learner = make(noisy, mean_squared_error)
    meta, task = learner.init_meta(KEY), regression_task()
    params = solve(learner, meta, task)
    batch = (task.query[0], learner.predict(params, meta, task.query[0]))
    assert_close("outer", learner.problem.outer_loss(params, meta, batch, KEY), 9.0, 1e-5)
    assert_close("loss", learner.problem.metrics(params, meta, batch, KEY)["loss"], 0.0, 1e-6)


@pytest.mark.parametrize("recipe", [Cavia, Imaml, MetaCurvature, ReptileRecipe, WarpGrad])
def test_recipes_trace(recipe):
    """Each builds, and its outer step fits its tasks and its optimizer; nothing is compiled."""
    experiment = recipe(filters=4, task=FewShotData("glyphs", num_tasks=2)).build()
    learner, optimizer, sample = experiment.learner, experiment.optimizer, experiment.sample_tasks
    state = jax.eval_shape(lambda key: bl.init_state(learner, optimizer, sample, key), KEY)
    step = jax.eval_shape(lambda s, k: meta_step(learner, optimizer, s, sample(k)), state, KEY)
    assert jax.tree.structure(step[0].meta) == jax.tree.structure(state.meta)
