"""MAML++ is the algorithm it names: against the same loop by hand, and against central differences."""

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad import Mixed, MultiStep, Unroll
from bilevel.hypergrad.first_order.annealed import AnnealedOrder
from bilevel.learners import cross_entropy
from bilevel.learners.maml_plus_plus import maml_plus_plus, split_norms
from bilevel.nets import Net
from bilevel.recipes.few_shot import FewShotData
from bilevel.recipes.maml_plus_plus import MamlPlusPlus
from bilevel.tasks.with_support import with_support
from bilevel.testing import assert_close, assert_derivative, assert_trees_close

KEY = jax.random.key(0)
K = 2


def forward(params, x):
    y = x @ params["block"]["w"]
    y = (y - y.mean(0)) / jnp.sqrt(y.var(0) + 1e-5)
    return jnp.tanh(y * params["block"]["scale"] + params["block"]["bias"]) @ params["head"]["w"]


def init(key):
    one, two = jax.random.split(key)
    block = {"w": jax.random.normal(one, (3, 4)), "scale": jnp.ones(4), "bias": jnp.zeros(4)}
    return {"block": block, "head": {"w": jax.random.normal(two, (4, 2))}}


NET = Net(init, forward, transductive=True)


def task():
    x, y = jax.random.normal(KEY, (6, 3)), jnp.arange(6) % 2
    return bl.Task((x, y), (x + 0.3 * jnp.cos(7 * x), y))


def shaken(meta):
    """Every leaf different everywhere, so that a wrong row or rate is seen."""
    return jax.tree.map(
        lambda leaf: (
            leaf * (1 + jnp.sin(3.0 * jnp.arange(leaf.size)).reshape(leaf.shape) / 5)
            + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape)
        ),
        meta,
    )


def losses_by_hand(meta, task, num_steps, per_step_norm=True, learned_rates=True, constant=False):
    """The query losses of the iterates 1..num_steps, written out."""

    def loss(params, k, batch):
        x, y = batch
        block = dict(params["block"])
        if per_step_norm:
            block |= {name: meta["norm"]["block"][name][min(k, K)] for name in ("scale", "bias")}
        logits = forward({"block": block, "head": params["head"]}, x)
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(len(y)), y])

    params, losses = meta["init"], []
    for k in range(num_steps):
        grads = jax.grad(loss)(params, k, task.support)
        grads = jax.lax.stop_gradient(grads) if constant else grads
        if learned_rates:
            row = min(k, K - 1)
            rates = jax.tree.map(lambda leaf, row=row: leaf[row], meta["rates"])
        else:
            rates = jax.tree.map(lambda leaf: 0.1, params)
        params = jax.tree.map(lambda p, a, g: p - a * g, params, rates, grads)
        losses.append(loss(params, k + 1, task.query))
    return params, jnp.stack(losses)


def run(learner, meta, state=None, key=KEY):
    one = task()
    if state is None:
        state = learner.estimator.init(learner.problem, learner.solver, meta, one, key)
    return learner.estimator.estimate(learner.problem, learner.solver, meta, one, state, key)


OPTIONS = {
    "all": ({"adjoint": Unroll()}, lambda losses: losses.mean()),
    "last step": ({"adjoint": Mixed(), "multi_step_annealing": None}, lambda losses: losses[-1]),
    "plain": (
        {"adjoint": Unroll(), "per_step_norm": False, "learned_rates": False},
        lambda losses: losses.mean(),
    ),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_hypergradient_by_hand_and_by_differences(x64, name):
    options, combine = OPTIONS[name]
    learner = maml_plus_plus(NET, cross_entropy, num_steps=K, first_order_steps=0, **options)
    meta = shaken(learner.init_meta(KEY))
    plain = {n: options[n] for n in ("per_step_norm", "learned_rates") if n in options}
    learned = {"norm": plain.get("per_step_norm", True), "rates": plain.get("learned_rates", True)}
    assert set(meta) == {"init", *(part for part in learned if learned[part])}

    def by_hand(meta):
        return combine(losses_by_hand(meta, task(), K, **plain)[1])

    value, grad = jax.jit(jax.value_and_grad(by_hand))(meta)
    step = jax.jit(lambda meta: run(learner, meta)[0])
    h = step(meta)
    assert_close("value", h.value, value, 1e-10)
    assert_trees_close("gradient", h.grad, grad, 1e-9)
    assert_derivative(lambda meta: step(meta).value, h.grad, meta)
    assert h.stats["zero_leaves"] == 0 and h.stats["finite"] == 1


def test_more_steps_than_were_trained_use_the_last_rows(x64):
    learner = maml_plus_plus(NET, cross_entropy, num_steps=K)
    meta, one = shaken(learner.init_meta(KEY)), task()
    expected, losses = jax.jit(lambda meta: losses_by_hand(meta, one, K + 2))(meta)
    params = jax.jit(lambda meta: bl.adapt(learner, meta, one, KEY, num_steps=K + 2))(meta)
    assert params.pop("step") == K + 2
    assert_trees_close("params", params, expected, 1e-10)
    stepped = {**params, "step": jnp.float64(K + 2)}
    figures = learner.problem.metrics(stepped, meta, one.query, KEY)
    assert_close("loss", figures["loss"], losses[-1], 1e-10)
    block = expected["block"] | {name: meta["norm"]["block"][name][K] for name in ("scale", "bias")}
    answers = forward({"block": block, "head": expected["head"]}, one.query[0])
    assert_close("answers", learner.predict(stepped, meta, one.query[0]), answers, 1e-10)


def test_order_is_annealed(x64):
    """Two outer steps with constant inner gradients, whose rates learn all the same, then exact ones."""
    learner = maml_plus_plus(NET, cross_entropy, num_steps=K, first_order_steps=2)
    assert learner.estimator == AnnealedOrder(MultiStep(5_000, Mixed()), 2)
    meta = shaken(learner.init_meta(KEY))
    step = jax.jit(lambda meta, state: run(learner, meta, state))

    def by_hand(meta, count, constant):
        return MultiStep(5_000).weights(K, count) @ losses_by_hand(meta, task(), K, constant=constant)[1]

    expected = jax.jit(jax.value_and_grad(by_hand), static_argnums=2)
    state = learner.estimator.init(learner.problem, learner.solver, meta, task(), KEY)
    for count in range(3):
        value, grad = expected(meta, count, count < 2)
        h, state = step(meta, state)
        assert_close("value", h.value, value, 1e-9)
        assert_trees_close(f"outer step {count}", h.grad, grad, 1e-8)
        assert h.stats["zero_leaves"] == 0
    assert int(state[0]) == int(state[1]) == 3


def test_tasks_side_by_side_are_annealed_too(x64):
    learner = maml_plus_plus(
        NET, cross_entropy, num_steps=1, multi_step_annealing=None, first_order_steps=1, adjoint=Unroll()
    )
    meta = shaken(learner.init_meta(KEY))
    sample = bl.tasks.batch(lambda key: jax.tree.map(lambda leaf: leaf, task()), 2)
    ends = []
    for task_chunk in (1, 2):
        options = bl.Options(chunk_size=2, task_chunk=task_chunk)
        state = bl.init_state(learner, optax.sgd(0.1), sample, KEY, meta)
        ends.append(bl.train(learner, optax.sgd(0.1), sample, state, 3, options=options).meta)
    assert_trees_close("meta", ends[0], ends[1], 1e-10)


def test_training_learns():
    def sample(key):
        """Which of two directions a class is changes with the task."""
        direction, noise = jax.random.split(key)
        centre = jax.random.normal(direction, (3,))
        y = jnp.arange(12) % 2
        x = jnp.where(y[:, None] == 0, centre, -centre) + 0.3 * jax.random.normal(noise, (12, 3))
        return bl.Task((x[:6], y[:6]), (x[6:], y[6:]))

    learner = maml_plus_plus(
        NET, cross_entropy, num_steps=2, multi_step_annealing=50, first_order_steps=30, adjoint=Unroll()
    )
    batch, optimizer = bl.tasks.batch(sample, 8), optax.adam(1e-2)
    seen = []
    state = bl.init_state(learner, optimizer, batch, KEY)
    options = bl.Options(chunk_size=20)
    bl.train(learner, optimizer, batch, state, 200, options=options, on_chunk=[lambda s, m: seen.append(m)])
    assert seen[-1]["query_accuracy"] > 0.9 > seen[0]["query_accuracy"]
    assert seen[-1]["query_loss"] < 0.5 * seen[0]["query_loss"]


def test_noise_is_in_the_outer_loss_only(x64):
    """Half of the inputs are dropped there, none in the inner loop or in a figure."""
    keep = jnp.array([1.0, 1.0, 0.0])
    noisy = Net(init, forward, lambda params, x, key: forward(params, x * keep))
    learner, plain = (
        maml_plus_plus(net, cross_entropy, num_steps=1, first_order_steps=0, adjoint=Unroll())
        for net in (noisy, NET)
    )
    meta = shaken(plain.init_meta(KEY))
    h, clean = jax.jit(lambda meta: (run(learner, meta)[0], run(plain, meta)[0]))(meta)
    assert_close("metrics", h.stats["query_loss"], clean.value, 1e-10)
    _, (x, y) = task()
    moved = bl.Task(task().support, (x * keep, y))
    value = jax.jit(lambda meta: losses_by_hand(meta, moved, 1)[1][-1])(meta)
    assert_close("outer loss", h.value, value, 1e-10)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"found no normalization.*per_step_norm=False"):
        maml_plus_plus(bl.nets.mlp([3, 4, 2]), cross_entropy).init_meta(KEY)
    for params in ({"step": jnp.ones(2)}, [jnp.ones(2)]):
        with pytest.raises(ValueError, match="a dictionary without an entry 'step'"):
            other = Net(lambda key, params=params: params, forward)
            maml_plus_plus(other, cross_entropy, per_step_norm=False).init_meta(KEY)
    with pytest.raises(ValueError, match="num_steps of at least 1, got 0"):
        maml_plus_plus(NET, cross_entropy, num_steps=0)
    with pytest.raises(TypeError, match=r"must be an estimator such as Mixed\(\)"):
        AnnealedOrder(Mixed, 3)
    for wrong in (-1, 2.5, True):
        with pytest.raises(ValueError, match="num_steps must be a whole number of at least 0"):
            AnnealedOrder(Mixed(), wrong)
    ridge = bl.inner.Ridge(lambda meta, x: x, lambda meta: meta)
    problem = bl.Problem(lambda meta, key: jnp.zeros(1), ridge.loss, ridge.error)
    with pytest.raises(TypeError, match="AnnealedOrder differentiates through the steps"):
        bl.Learner(problem, ridge, AnnealedOrder(Mixed(), 3))


def test_split_norms_keeps_other_biases():
    params = {
        "head": {"w": 1, "bias": 2},
        "a": {"b": {"w": 3, "scale": 4, "bias": 5}},
        "norm": {"scale": 6, "bias": 7},
    }
    rest, norms = split_norms(params)
    assert rest == {"head": {"w": 1, "bias": 2}, "a": {"b": {"w": 3}}}
    assert norms == {"a": {"b": {"scale": 4, "bias": 5}}, "norm": {"scale": 6, "bias": 7}}


def test_with_support_puts_the_support_in_front():
    plain = bl.tasks.FewShot(jax.random.normal(KEY, (6, 3)), jnp.arange(6) % 2, 2, 1, 2)
    task, both = jax.jit(plain)(KEY), jax.jit(with_support(plain))(KEY)
    assert_trees_close("support", both.support, task.support, 0)
    assert_close("x", both.query[0], jnp.concatenate([task.support[0], task.query[0]]), 0)
    assert both.query[1].tolist() == [-1, -1, 0, 0, 1, 1]
    images, labels = jnp.zeros((12, 4, 4), jnp.uint8), jnp.arange(12) % 3
    assert (
        len(jax.tree.leaves(with_support(bl.tasks.FewShot(images, labels, 2, 1, 1)))) == 4
    )  # still a pytree
    with pytest.raises(TypeError, match="must be a function, got int"):
        with_support(3)
    with pytest.raises(TypeError, match="whole-numbered labels, got float32"):
        with_support(bl.tasks.sinusoid)(KEY)


def test_support_norm_finds_the_support_in_front_of_every_query():
    data = FewShotData(dataset="glyphs", ways=2, shots=3, eval_queries=1)
    experiment = MamlPlusPlus(norm="support", filters=2, task=data).build()
    samplers = experiment.sample_test, experiment.sample_validation
    assert [jax.eval_shape(sample, KEY).query[0].shape[0] for sample in samplers] == [8, 8]


def test_the_first_order_phase_is_the_same_for_whoever_comes_after(x64):
    problem = bl.Problem(
        init=lambda meta, key: meta["init"],
        inner_loss=lambda params, meta, batch, key: 0.5 * params**2 + meta["tilt"] * params,
        outer_loss=lambda params, meta, batch, key: params,
    )
    solver, meta = bl.inner.Gradient(optax.sgd(0.5), 3), {"init": jnp.float64(8), "tilt": jnp.float64(1)}
    for then in (Mixed(), Unroll(), bl.hypergrad.Forward()):
        estimator = AnnealedOrder(then, 1)
        state = estimator.init(problem, solver, meta, bl.Task(None, None), KEY)
        first, state = estimator.estimate(problem, solver, meta, bl.Task(None, None), state, KEY)
        second, _ = estimator.estimate(problem, solver, meta, bl.Task(None, None), state, KEY)
        assert_trees_close("first", first.grad, {"init": 1.0, "tilt": 0.0}, 1e-12)
        assert_trees_close("second", second.grad, {"init": 0.125, "tilt": -0.875}, 1e-12)
