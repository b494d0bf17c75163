"""Each option of MAML is the method it names: its hypergradients against central differences."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad import FirstOrder, Mixed, MultiStep
from bilevel.learners import Fixed, PerLayerPerStep, PerParameter, cross_entropy, mean_squared_error
from bilevel.recipes.maml import clipped
from bilevel.testing import assert_close, assert_derivative, assert_trees_close

KEY = jax.random.key(0)
NET = bl.nets.mlp([1, 4, 1], jnp.tanh)


def regression_task():
    x = jnp.linspace(-1, 1, 5)[:, None]
    return bl.Task((x, jnp.sin(3 * x)), (x + 0.1, jnp.sin(3 * x + 0.3)))


def estimate(learner, meta, task):
    return bl.hypergradient(learner.problem, learner.solver, learner.estimator, meta, task, KEY)


LEARNERS = {
    "maml": {"rates": 0.1},
    "meta-sgd": {"rates": PerParameter(0.1)},
    "per-layer-per-step": {"rates": PerLayerPerStep(0.1)},
    "meta-sgd-clipped": {"rates": PerParameter(0.1), "clip": 0.05},
    "anil": {"rates": 0.1, "adapt": "head"},
    "anil-meta-sgd": {"rates": PerParameter(0.1), "adapt": "head"},
    "anil-per-layer-per-step": {"rates": PerLayerPerStep(0.1), "adapt": "hidden_0"},
    "multi-step": {"rates": PerLayerPerStep(0.1), "estimator": MultiStep()},
}


def test_an_inner_gradient_is_clipped_before_the_rates():
    learner = bl.maml(NET, mean_squared_error, rates=PerParameter(0.5), clip=1e-3)
    meta = learner.init_meta(KEY)
    adapted = bl.adapt(learner, meta, regression_task(), KEY)
    moved = optax.tree.norm(jax.tree.map(lambda a, b: a - b, adapted, meta["init"]))
    np.testing.assert_allclose(moved, 0.5e-3, rtol=1e-4)
    with pytest.raises(ValueError, match="clip must be above 0, or None for no clipping, got 0"):
        bl.maml(NET, mean_squared_error, clip=0)


def test_the_hypergradient_is_clipped_where_it_is_asked_for():
    grad, meta = {"init": jnp.array([30.0, 40.0])}, {"init": jnp.zeros(2)}
    optimizer = clipped(optax.sgd(1.0), 5.0)
    np.testing.assert_allclose(optimizer.update(grad, optimizer.init(meta), meta)[0]["init"], [-3.0, -4.0])
    plain = optax.sgd(1.0)
    assert clipped(plain, None) is plain
    with pytest.raises(ValueError, match=r"--maml.outer-clip must be above 0, got -1"):
        clipped(plain, -1)


@pytest.mark.parametrize("name", LEARNERS)
def test_hypergradient(x64, name):
    learner = bl.maml(NET, mean_squared_error, num_steps=3, **LEARNERS[name])
    meta, task = learner.init_meta(KEY), regression_task()
    run = jax.jit(lambda meta: estimate(learner, meta, task))
    h = run(meta)
    assert_derivative(lambda meta: run(meta).value, h.grad, meta)
    assert h.stats["zero_leaves"] == 0 and h.stats["finite"] == 1
    assert {"query_loss", "support_loss"} <= set(h.stats)


def steps_by_hand(params, rates_at, task, num_steps):
    """φ ← φ − α ⊙ ∇loss, without the library."""
    x, y = task.support

    def loss(params):
        return jnp.mean((NET.apply(params, x) - y) ** 2)

    for k in range(num_steps):
        grads = jax.grad(loss)(params)
        params = jax.tree.map(lambda p, a, g: p - a * g, params, rates_at(k), grads)
    return params


@pytest.mark.parametrize("kind", [Fixed, PerParameter, PerLayerPerStep])
def test_inner_steps_by_hand(x64, kind):
    learner = bl.maml(NET, mean_squared_error, num_steps=3, rates=kind(0.1))
    meta, task = learner.init_meta(KEY), regression_task()
    if kind is Fixed:
        assert set(meta) == {"init"}
    else:  # rates that differ everywhere
        meta["rates"] = jax.tree.map(
            lambda leaf: leaf * (1 + jnp.arange(leaf.size).reshape(leaf.shape) / 7), meta["rates"]
        )
    if kind is PerLayerPerStep:
        assert {leaf.shape for leaf in jax.tree.leaves(meta["rates"])} == {(3,)}

    def rates_at(k):
        if kind is Fixed:
            return jax.tree.map(lambda leaf: 0.1, meta["init"])
        if kind is PerParameter:
            return meta["rates"]
        return jax.tree.map(lambda leaf: leaf[min(k, 2)], meta["rates"])

    for num_steps in (3, 5):  # beyond those learned, the last rate goes on
        solver = bl.inner.Gradient(learner.solver.optimizer, num_steps)
        params = solver.solve(learner.problem, meta, task, KEY).params
        expected = steps_by_hand(meta["init"], rates_at, task, num_steps)
        assert_trees_close("params", params, expected, 1e-10)
        answers = learner.predict(params, meta, task.query[0])
        assert_close("answers", answers, NET.apply(expected, task.query[0]), 1e-10)


def test_anil_adapts_the_head_and_learns_the_body(x64):
    learner = bl.maml(NET, mean_squared_error, num_steps=3, rates=0.1, adapt="head")
    meta, task = learner.init_meta(KEY), regression_task()
    params = learner.solver.solve(learner.problem, meta, task, KEY).params
    assert set(params) == {"head"}
    # By hand: only the head moves.
    rates = {"hidden_0": {"w": 0.0, "b": 0.0}, "head": {"w": 0.1, "b": 0.1}}
    expected = steps_by_hand(meta["init"], lambda k: rates, task, 3)
    assert_trees_close("body", expected["hidden_0"], meta["init"]["hidden_0"], 0.0)
    assert_trees_close("head", params["head"], expected["head"], 1e-10)
    answers = learner.predict(params, meta, task.query[0])
    assert_close("answers", answers, NET.apply(expected, task.query[0]), 1e-10)
    grad = estimate(learner, meta, task).grad
    assert all(np.all(leaf) for leaf in jax.tree.leaves(grad["init"]["hidden_0"]))


def test_fomaml_is_the_gradient_at_the_adapted_point(x64):
    learner = bl.maml(NET, mean_squared_error, num_steps=3, rates=0.1, estimator=FirstOrder())
    meta, task = learner.init_meta(KEY), regression_task()
    adapted = learner.solver.solve(learner.problem, meta, task, jax.random.split(KEY)[0]).params
    x, y = task.query
    expected = jax.grad(lambda params: jnp.mean((NET.apply(params, x) - y) ** 2))(adapted)
    assert_trees_close("grad", estimate(learner, meta, task).grad, {"init": expected}, 1e-10)


def test_fomaml_says_that_it_cannot_learn_rates():
    learner = bl.maml(NET, mean_squared_error, rates=PerParameter(0.1), estimator=FirstOrder())
    with pytest.warns(bl.FirstOrderWarning, match=r"meta\['rates'\]\['head'\]\['b'\]"):
        h = estimate(learner, learner.init_meta(KEY), regression_task())
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(h.grad["rates"]))


def test_mixed_is_the_default():
    assert bl.maml(NET, mean_squared_error).estimator == Mixed()


def test_classification_with_metrics(x64):
    net = bl.nets.mlp([2, 4, 3])
    learner = bl.maml(net, cross_entropy, num_steps=2, rates=0.3)
    meta = learner.init_meta(KEY)
    x, y = jax.random.normal(KEY, (6, 2)), jnp.arange(6) % 3
    task = bl.Task((x, y), (x + 0.1, y))
    run = jax.jit(lambda meta: estimate(learner, meta, task))
    h = run(meta)
    assert_derivative(lambda meta: run(meta).value, h.grad, meta)
    assert {"query_accuracy", "support_accuracy"} <= set(h.stats)
    assert_close("query_loss", h.stats["query_loss"], h.value, 1e-12)


def test_an_inner_loop_of_adam_beside_maml(x64):
    """The nouns are open: another solver with the same problem."""
    learner = bl.maml(NET, mean_squared_error)
    solver = bl.inner.Gradient(optax.adam(0.05), 3)
    meta, task = learner.init_meta(KEY), regression_task()
    # Away from the symmetry of odd data and no biases, where some gradients are rounding: there an
    # Adam update has the slope rate / ε, over a width that differences step across.
    meta = jax.tree.map(lambda leaf: leaf + 0.3 + 0.1 * jnp.arange(leaf.size).reshape(leaf.shape), meta)
    run = jax.jit(lambda m: bl.hypergradient(learner.problem, solver, Mixed(), m, task, KEY))
    assert_derivative(lambda meta: run(meta).value, run(meta).grad, meta)


@pytest.mark.parametrize("rates", ["0.1", None, True, [0.1], optax.sgd(0.1)])
def test_rates_of_another_type(rates):
    with pytest.raises(TypeError, match=r"rates must be a number, PerParameter\(rate\)"):
        bl.maml(NET, mean_squared_error, rates=rates)


def test_adapt_of_another_name():
    learner = bl.maml(NET, mean_squared_error, rates=PerParameter(0.1), adapt="body")
    with pytest.raises(KeyError, match=r"adapt='body'.*\['head', 'hidden_0'\]"):
        learner.init_meta(KEY)


def test_adapt_of_another_name_with_a_fixed_rate():
    learner = bl.maml(NET, mean_squared_error, rates=0.1, adapt="body")
    with pytest.raises(KeyError, match=r"adapt='body'.*\['head', 'hidden_0'\]"):
        learner.init_meta(KEY)


def test_losses():
    logits = jnp.array([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3]])
    loss, metrics = cross_entropy(logits, jnp.array([0, 1]))
    expected = -np.mean(
        [np.log(np.exp(2) / np.exp(logits[0]).sum()), np.log(np.exp(0.2) / np.exp(logits[1]).sum())]
    )
    assert_close("loss", loss, expected, 1e-6)
    assert metrics["accuracy"] == 0.5
    with pytest.raises(ValueError, match=r"same shape, got \(3, 1\) and \(3,\)"):
        mean_squared_error(jnp.ones((3, 1)), jnp.ones(3))
