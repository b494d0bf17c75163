"""Recipes that learn hyperparameters: exact in float64, and a search of the same θ agrees."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.cli import main
from bilevel.problem import Task
from bilevel.recipes.augmentation_strength import STRENGTHS, AugmentationStrength
from bilevel.recipes.digits import Digits, drawn, pooled
from bilevel.recipes.estimators import Settings
from bilevel.recipes.layer_decay import LayerDecay
from bilevel.recipes.logistic_l2 import LogisticL2, descent, penalized
from bilevel.recipes.schedules import Schedules, interpolated
from bilevel.tasks.mnist import Mnist
from bilevel.tasks.tabular import tabular
from bilevel.testing.finite_differences import assert_derivative

KEY = jax.random.key(0)
RECIPES = Path(__file__).parent.parent / "src" / "bilevel" / "recipes"


@pytest.fixture
def digits(monkeypatch):
    """Fewer digits, made up: a class is a bright row of its own among noise."""
    rng, parts = np.random.default_rng(0), []
    for count in (400, 60):
        labels = np.arange(count, dtype=np.int32) % 10
        images = rng.integers(0, 120, (count, 28, 28), dtype=np.uint8)
        images[np.arange(count), 2 * labels + 3] = 255
        parts += [images, labels]
    monkeypatch.setattr("bilevel.recipes.digits.mnist", lambda data, download: Mnist(*parts))
    return Digits(num_support=80, num_validation=100, num_test=50, pool=4)


def learner_of(recipe):
    experiment = recipe.build()
    task = jax.tree.map(lambda leaf: leaf[0], experiment.sample_tasks(KEY))
    return experiment.learner, experiment.learner.init_meta(KEY), task


def estimated(problem, solver, estimator, meta, task):
    """The hypergradient, compiled."""
    return jax.jit(lambda meta: estimator.estimate(problem, solver, meta, task, (), KEY)[0])(meta)


def outer(problem, solver, task):
    """F(θ) with the keys that estimators use, compiled."""
    inner_key, outer_key = jax.random.split(KEY)

    @jax.jit
    def loss(meta):
        params = solver.solve(problem, meta, task, inner_key).params
        return problem.outer_loss(params, meta, task.query, outer_key)

    return loss


def iris(penalties="per-parameter"):
    """Problem, first θ and task in float64."""
    data = tabular("iris")
    problem, _ = penalized(4, 3)
    shape = {"per-parameter": (5, 3), "per-feature": (5, 1), "one": (1, 1)}[penalties]
    theta = {"log_penalty": np.random.default_rng(1).uniform(-4, -1, shape)}
    part = lambda xy: (np.asarray(xy[0], np.float64), xy[1])  # noqa: E731
    return problem, theta, Task(part(data.support), part(data.validation))


@functools.cache
def newton(penalties):
    """The exact solution, outer loss there, and the implicit hypergradient by a direct solve, all dense."""
    problem, meta, task = iris(penalties)
    theta = meta["log_penalty"]
    inner = lambda p: problem.inner_loss(p.reshape(5, 3), meta, task.support, KEY)  # noqa: E731
    judged = lambda p: problem.outer_loss(p.reshape(5, 3), meta, task.query, KEY)  # noqa: E731
    local = jax.jit(lambda p: (jax.grad(inner)(p), jax.hessian(inner)(p), *jax.value_and_grad(judged)(p)))
    flat = jnp.zeros(15)
    for _ in range(20):
        gradient, hessian, _, _ = local(flat)
        flat = flat - jnp.linalg.solve(hessian, gradient)
    gradient, hessian, value, slope = local(flat)
    assert jnp.abs(gradient).max() < 1e-12
    # ∂θ∇φ g is diagonal: e^θ φ, summed where one θ is shared.
    grad = -np.exp(theta) * np.asarray(flat * jnp.linalg.solve(hessian, slope)).reshape(5, 3)
    for axis, size in enumerate(theta.shape):
        grad = grad.sum(axis, keepdims=True) if size == 1 else grad
    return np.asarray(flat).reshape(5, 3), float(value), grad


@pytest.mark.parametrize("penalties", ["per-parameter", "per-feature", "one"])
def test_the_penalties_of_logistic_regression_have_the_direct_implicit_hypergradient(x64, penalties):
    problem, theta, task = iris(penalties)
    params, value, grad = newton(penalties)
    solver = descent(0.3, 3000)
    h = estimated(problem, solver, Settings().estimator("implicit-direct"), theta, task)
    np.testing.assert_allclose(h.value, value, rtol=1e-12)
    np.testing.assert_allclose(h.grad["log_penalty"], grad, rtol=1e-9, atol=1e-14)
    solved = jax.jit(lambda meta: solver.solve(problem, meta, task, KEY).params)
    np.testing.assert_allclose(solved(theta), params, atol=1e-12)
    assert_derivative(outer(problem, solver, task), h.grad, theta, tolerance=1e-7)


EXACT = ("mixed", "unroll", "forward", "implicit-cg", "implicit-neumann", "implicit-nystrom")


@pytest.mark.parametrize("name", EXACT)
def test_every_estimator_agrees_on_a_solved_logistic_regression(x64, name):
    problem, theta, task = iris("per-feature")
    _, _, grad = newton("per-feature")
    # Fifteen columns or products are all there are; the series takes more.
    settings = Settings(linear_steps=2000 if name == "implicit-neumann" else 15, damping=1e-12, step_size=0.3)
    h = estimated(problem, descent(0.3, 1500), settings.estimator(name), theta, task)
    np.testing.assert_allclose(h.grad["log_penalty"], grad, rtol=1e-6, atol=1e-10)


def test_a_penalty_without_bound_does_not_make_the_descent_diverge():
    problem, _, task = iris()
    meta = {"log_penalty": jnp.full((5, 3), jnp.log(1e6))}
    params = jax.jit(lambda meta: descent(0.3, 100).solve(problem, meta, task, KEY).params)(meta)
    assert np.isfinite(params).all() and np.abs(params).max() < 1e-5


def test_l_bfgs_and_descent_find_the_same_penalties():
    grads = []
    for solver in ("converged", "gradient"):
        recipe = LogisticL2(data="iris", solver=solver, num_steps=400, estimator="implicit-direct")
        learner, meta, task = learner_of(recipe)
        h = estimated(learner.problem, learner.solver, learner.estimator, meta, task)
        grads.append(h.grad["log_penalty"])
    np.testing.assert_allclose(*grads, rtol=2e-2, atol=1e-4)


def test_knots_are_joined_by_lines_and_go_on_beyond_the_end():
    knots = jnp.array([1.0, 3.0, 2.0])
    found = interpolated(knots, jnp.array([0, 5, 10, 15, 20, 99]), 21)
    np.testing.assert_allclose(found, [1, 2, 3, 2.5, 2, 2])
    assert interpolated(knots[:1], jnp.int32(7), 21) == 1


def small(recipe, digits, **more):
    return recipe(digits=digits, hidden=(8,), num_steps=6, **more)


SMALL = [
    lambda digits: small(Schedules, digits, num_knots=3, batch_size=16, rate=0.2, settings=Settings()),
    lambda digits: small(LayerDecay, digits),
    lambda digits: small(AugmentationStrength, digits, batch_size=16),
]


@pytest.mark.parametrize("recipe", SMALL, ids=["schedules", "layer-decay", "augmentation-strength"])
def test_hypergradients_of_the_networks_agree_with_finite_differences(x64, digits, recipe):
    learner, meta, task = learner_of(recipe(digits))
    wide = lambda leaf: leaf.astype(float) if leaf.dtype == jnp.float32 else leaf  # noqa: E731
    meta, task = jax.tree.map(wide, (meta, task))
    h = estimated(learner.problem, learner.solver, learner.estimator, meta, task)
    loss = outer(learner.problem, learner.solver, task)
    np.testing.assert_allclose(loss(meta), h.value, rtol=1e-12)
    assert h.stats["zero_leaves"] == 0
    assert_derivative(loss, h.grad, meta, step=1e-6, tolerance=1e-5)


def test_the_schedule_is_what_the_steps_take(digits):
    recipe = small(Schedules, digits, num_knots=2, batch_size=16)
    learner, _, task = learner_of(recipe)
    meta = {"log_rate": jnp.log(jnp.array([0.1, 0.6])), "logit_momentum": jnp.array([-1.0, 1.0])}
    found = jax.jit(lambda task: learner.solver.solve(learner.problem, meta, task, KEY).params)(task)
    init_key, step_key = jax.random.split(KEY)
    params = learner.problem.init(meta, init_key)
    velocity = jax.tree.map(jnp.zeros_like, params)
    slope = jax.jit(jax.grad(lambda params, key: learner.problem.inner_loss(params, meta, task.support, key)))
    for k in range(6):
        gradient = slope(params, jax.random.fold_in(step_key, k))
        rate, momentum = 0.1 * 6 ** (k / 5), jax.nn.sigmoid(-1 + 2 * k / 5)
        velocity = jax.tree.map(lambda v, g, m=momentum: m * v + g, velocity, gradient)
        params = jax.tree.map(lambda p, v, r=rate: p - r * v, params, velocity)
    np.testing.assert_allclose(found["head"]["w"], params["head"]["w"], rtol=1e-4, atol=1e-6)


def test_the_memory_of_a_long_schedule_is_flat(digits):
    recipe = small(Schedules, digits, settings=Settings(checkpoint=30))
    learner, meta, task = learner_of(dataclasses.replace(recipe, num_steps=900))

    def run(meta, task):
        return learner.estimator.estimate(learner.problem, learner.solver, meta, task, (), KEY)[0].grad

    needed = jax.jit(run).lower(meta, task).compile().memory_analysis().temp_size_in_bytes
    params = jax.eval_shape(lambda: learner.problem.init(meta, KEY))
    state = 2 * 4 * sum(leaf.size for leaf in jax.tree.leaves(params))  # with the velocity, in bytes
    assert needed < 0.25 * 900 * state


def test_each_layer_and_each_strength_is_learned_by_itself(digits):
    learner, meta, _ = learner_of(small(LayerDecay, digits))
    assert sorted(meta["log_decay"]) == ["head", "hidden_0"]
    learner, meta, task = learner_of(small(AugmentationStrength, digits, batch_size=16))
    assert sorted(meta["log_strength"]) == sorted(STRENGTHS)
    weak = jax.tree.map(lambda leaf: jnp.full_like(leaf, -30.0), meta)
    params, key = learner.problem.init(meta, KEY), jax.random.key(7)
    loss = jax.jit(lambda meta: learner.problem.inner_loss(params, meta, task.support, key))

    @jax.jit
    def plain(params, meta):
        x, y = drawn(task.support, 16, jax.random.split(key)[0])
        return bl.learners.cross_entropy(learner.predict(params, meta, x), y)[0]

    expected = plain(params, meta)
    np.testing.assert_allclose(loss(weak), expected, rtol=1e-4)  # changes of no strength are none
    for name in STRENGTHS:
        # Of the very type that θ has: another would compile the loss anew.
        strong = jnp.full_like(weak["log_strength"][name], np.log(0.3))
        alone = {"log_strength": weak["log_strength"] | {name: strong}}
        assert abs(loss(alone) - expected) > 1e-4, name


def test_digits_are_cut_without_overlap(digits):
    parts = digits.read()
    assert [len(part[1]) for part in parts] == [80, 100, 50] and parts.support[0].shape[1:] == (7, 7, 1)
    pictures = np.concatenate([parts.support[0], parts.validation[0]]).reshape(180, -1)
    assert len(np.unique(pictures, axis=0)) == 180
    images = np.arange(16, dtype=np.uint8).reshape(1, 4, 4)
    np.testing.assert_allclose(pooled(images, 2)[0, :, :, 0] * 255, [[2.5, 4.5], [10.5, 12.5]])


def test_what_cannot_be_is_refused_with_the_remedy(digits):
    with pytest.raises(ValueError, match="MNIST has 60000 training pictures"):
        Digits(num_support=59_000)
    with pytest.raises(ValueError, match="at least 1 picture"):
        Digits(num_test=0)
    with pytest.raises(ValueError, match="take mixed, forward, truncated or pes"):
        Schedules(estimator="implicit-cg")
    with pytest.raises(ValueError, match="0 < momentum < 1"):
        Schedules(momentum=1.0)
    with pytest.raises(ValueError, match="diabetes is a regression"):
        LogisticL2(data="diabetes").build()
    with pytest.raises(ValueError, match="penalty must be positive"):
        LogisticL2(penalty=0)
    with pytest.raises(ValueError, match="estimator must be one of mixed"):
        Settings().estimator("newton")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="steps"):
        LogisticL2(data="iris", solver="converged", estimator="mixed").build()


def test_a_learned_penalty_beats_the_first_one_and_is_reported(tmp_path, capsys):
    run = tmp_path / "run"
    fields = ["--data", "iris", "--num-meta-steps", "30", "--num-steps", "60", "--learning-rate", "0.3"]
    main(["train", f"{RECIPES / 'logistic_l2.py'}:LogisticL2", "--folder", str(run), *fields])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["query_loss"] < rows[0]["query_loss"] - 0.01
    main(["eval", str(run)])
    assert "75 / 37 / 38 rows of support / validation / test" in capsys.readouterr().out
    said = json.loads((run / "evaluation.json").read_text())["learned"]
    assert said["figures"]["penalties"] == 15 and len(said["lines"]) == 2
