"""Every estimator gives the answer it promises, and says clearly what it cannot do."""

import warnings
from dataclasses import dataclass, replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad import FirstOrder, Mixed, MultiStep, Unroll
from bilevel.testing import (
    ESTIMATORS,
    PROBLEMS,
    assert_close,
    assert_derivative,
    assert_matches,
    assert_trees_close,
    dead_relu,
    gradient_by_differences,
    quadratic,
)

EXACT = (Unroll(), Mixed())
NO_TASK = bl.Task(None, None)
KEY = jax.random.key(0)
case_of = cache(lambda name: PROBLEMS[name]())


def test_the_table_can_fail():
    case = case_of("quadratic-sgd-5")
    wrong = {**case.exact.grad, "theta": case.exact.grad["theta"] * (1 + 1e-8)}
    with pytest.raises(AssertionError, match=r"Mixed: grad\['theta'\] is off by 1e-08"):
        assert_matches(Mixed(), replace(case, exact=case.exact._replace(grad=wrong)))
    with pytest.raises(AssertionError, match="value"):
        assert_matches(Mixed(), replace(case, exact=case.exact._replace(value=1.0)))


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam", "rates"])
def test_dead_relu_is_dead(optimizer):
    grad = dead_relu(5, optimizer=optimizer).exact.grad
    assert not np.any(grad["init"]["unused"]) and not np.any(grad["init"]["hidden"][:, 2])
    assert np.all(grad["init"]["hidden"][:, [0, 1, 3]])


@pytest.mark.parametrize("num_steps", [1, 5, 20])
def test_adam_equals_a_plain_loop(x64, num_steps):
    a = jnp.array([[2.0, 0.3], [0.3, 1.0]])
    problem = bl.Problem(
        init=lambda meta, key: meta["init"],
        inner_loss=lambda params, meta, batch, key: 0.5 * params @ a @ params - params @ meta["theta"],
        outer_loss=lambda params, meta, batch, key: jnp.sum(jnp.sin(params)),
    )
    meta = {"init": jnp.array([1.0, -2.0]), "theta": jnp.array([0.4, 0.7]), "rate": jnp.array(0.1)}

    def plain(meta):
        optimizer = optax.adam(meta["rate"])
        params = meta["init"]
        state = optimizer.init(params)
        for _ in range(num_steps):
            grads = jax.grad(problem.inner_loss)(params, meta, None, None)
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return problem.outer_loss(params, meta, None, None)

    solver = bl.inner.Gradient(lambda meta: optax.adam(meta["rate"]), num_steps)
    value, grad = jax.value_and_grad(plain)(meta)
    for estimator in EXACT:
        run = jax.jit(lambda m, e=estimator: bl.hypergradient(problem, solver, e, m, NO_TASK, KEY))
        got = run(meta)
        assert_close("value", got.value, value, 1e-12)
        assert_trees_close("grad", got.grad, grad, 1e-10)
    assert_derivative(lambda m: run(m).value, grad, meta)


@pytest.mark.parametrize(
    "row", ["unroll", "mixed", "mixed-checkpoint-3", "mixed-tree", "forward", "first-order", "multi-step"]
)
def test_vmap_over_tasks_equals_one_by_one(x64, row):
    case, estimator = case_of("quadratic-momentum-20"), ESTIMATORS[row].estimator
    rng = np.random.default_rng(1)
    tasks = bl.Task(jnp.array(rng.normal(size=(3, 4))), jnp.array(rng.normal(size=(3, 4))))
    meta = jax.tree.map(jnp.asarray, case.meta)

    def one(task):
        return bl.hypergradient(case.problem, case.solver, estimator, meta, task, KEY)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.FirstOrderWarning)
        together = jax.jit(jax.vmap(one))(tasks)
        single = jax.jit(one)
        for i in range(3):
            expected = single(jax.tree.map(lambda leaf, i=i: leaf[i], tasks))
            got = jax.tree.map(lambda leaf, i=i: leaf[i], together)
            assert_trees_close("task", got.grad, expected.grad, 1e-12)


@pytest.mark.parametrize("estimator", [Unroll(), Mixed(), MultiStep(adjoint=Mixed(checkpoint=3))])
def test_nested_trees_of_several_dtypes(x64, estimator):
    """Tuples, None, lists, an empty dict, integers in the batch; one parameter in float32."""

    def loss(params, meta, batch, key):
        (w, (b, nothing)), scale = params["net"], params["scale"][0]
        assert nothing is None
        x, labels = batch
        logits = (x @ w + b) * scale.astype(x.dtype)
        weight = jnp.exp(meta["weights"]["log"])[labels]
        return jnp.mean(weight * bl.learners.cross_entropy(logits, labels)[0]) + 0.1 * jnp.sum(w**2)

    problem = bl.Problem(lambda meta, key: meta["init"], loss, loss)
    rng = np.random.default_rng(0)
    init = {
        "net": (jnp.array(rng.normal(size=(2, 3))), (jnp.zeros(3), None)),
        "scale": [jnp.ones((), jnp.float32)],
        "empty": {},
    }
    meta = {"init": init, "weights": {"log": jnp.array([0.1, -0.2, 0.3])}}
    x, labels = jnp.array(rng.normal(size=(4, 2))), jnp.array([0, 1, 2, 1], jnp.int32)
    task = bl.Task((x, labels), (x + 0.1, labels))
    solver = bl.inner.Gradient(optax.sgd(0.1, momentum=0.5), 4)

    @jax.jit
    def run(meta):
        return bl.hypergradient(problem, solver, estimator, meta, task, KEY)

    got = run(meta)
    assert jax.tree.structure(got.grad) == jax.tree.structure(meta)
    dtypes = jax.tree.map(lambda leaf: leaf.dtype, got.grad)
    assert dtypes == jax.tree.map(lambda leaf: leaf.dtype, meta)
    # The float32 leaf limits the precision: differences with a large step.
    measured = gradient_by_differences(
        lambda m: run(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), m, meta)).value,
        meta,
        step=1e-3,
    )[1]
    assert_trees_close("grad", got.grad, measured, 2e-3)


def contract():
    """Learned initialization and learned rate on linear regression, as the README shows it."""

    def loss(params, meta, batch, key):
        x, y = batch
        return jnp.mean((x @ params["w"] - y) ** 2)

    problem = bl.Problem(lambda meta, key: meta["init"], loss, loss)
    solver = bl.inner.Gradient(lambda meta: optax.sgd(jnp.exp(meta["log_rate"])), num_steps=5)
    meta = {"init": {"w": jnp.array([0.5, -1.0, 2.0])}, "log_rate": jnp.log(0.1)}
    x = jax.random.normal(jax.random.key(1), (8, 3))
    task = bl.Task((x[:4], x[:4].sum(1)), (x[4:], x[4:].sum(1)))
    return problem, solver, meta, task


@pytest.mark.parametrize("estimator", EXACT)
def test_hypergradient_in_one_call(x64, estimator):
    problem, solver, meta, task = contract()

    @jax.jit
    def value(meta):
        params = solver.solve(problem, meta, task, KEY).params
        return problem.outer_loss(params, meta, task.query, KEY)

    h = bl.hypergradient(problem, solver, estimator, meta, task, KEY)
    assert_close("value", h.value, value(meta), 1e-12)
    assert_derivative(value, h.grad, meta)
    assert set(h.stats) == {"inner_loss", "zero_leaves", "finite"}


def test_traces_once_under_jit():
    problem, solver, meta, task = contract()
    for estimator in (Unroll(), Mixed(), Mixed(checkpoint=2), MultiStep()):
        traces = []

        @jax.jit
        def run(meta, task, key, estimator=estimator, traces=traces):
            traces.append(1)
            return bl.hypergradient(problem, solver, estimator, meta, task, key)

        for i in range(3):
            run(jax.tree.map(lambda leaf, i=i: leaf + i, meta), task, jax.random.key(i))
        assert len(traces) == 1, type(estimator).__name__


# First order


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_first_order_by_its_definition(x64, num_steps):
    def inner(params, meta, batch, key):
        return jnp.sum((params["w"] - meta["shift"]) ** 4) + meta["ridge"] * jnp.sum(params["w"] ** 2)

    def outer(params, meta, batch, key):
        return jnp.sum(jnp.cos(params["w"])) * meta["shift"]

    problem = bl.Problem(lambda meta, key: {"w": meta["scale"] * meta["base"]}, inner, outer)
    solver = bl.inner.Gradient(optax.sgd(0.05), num_steps)
    meta = {"base": jnp.array([0.3, -0.2]), "scale": 1.5, "shift": 0.4, "ridge": 0.1}
    with pytest.warns(bl.FirstOrderWarning, match=r"meta\['ridge'\]"):
        h = bl.hypergradient(problem, solver, FirstOrder(), meta, NO_TASK, KEY)

    w = meta["scale"] * meta["base"]
    for _ in range(num_steps):
        w = w - 0.05 * (4 * (w - meta["shift"]) ** 3 + 2 * meta["ridge"] * w)
    outer_grad = -jnp.sin(w) * meta["shift"]  # through the start as it depends on meta, and directly
    expected = {
        "base": outer_grad * meta["scale"],
        "scale": outer_grad @ meta["base"],
        "shift": jnp.sum(jnp.cos(w)),
        "ridge": 0.0,
    }
    assert_trees_close("grad", h.grad, expected, 1e-12)
    assert h.stats["zero_leaves"] == 1


@pytest.mark.parametrize("compile", [jax.jit, lambda function: function])
def test_first_order_warns_of_the_leaf_it_cannot_learn(compile):
    problem, solver, meta, task = contract()

    def run(meta):
        return bl.hypergradient(problem, solver, FirstOrder(), meta, task, KEY)

    with pytest.warns(bl.FirstOrderWarning, match=r"meta\['log_rate'\].*Mixed\(\)") as record:
        h = compile(run)(meta)
    assert len(record) == 1 and "init" not in str(record[0].message)
    assert h.grad["log_rate"] == 0 and np.all(h.grad["init"]["w"])


def test_first_order_does_not_warn_otherwise():
    problem, _, meta, task = contract()
    solver = bl.inner.Gradient(optax.sgd(0.1), 3)
    direct = replace(
        problem,
        outer_loss=lambda params, meta, batch, key: (
            problem.outer_loss(params, meta, batch, key) + meta["log_rate"] ** 2
        ),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bl.hypergradient(problem, solver, FirstOrder(), {"init": meta["init"]}, task, KEY)
        bl.hypergradient(direct, solver, FirstOrder(), meta, task, KEY)


def test_first_order_warns_once_per_trace():
    problem, solver, meta, task = contract()
    run = jax.jit(lambda meta: bl.hypergradient(problem, solver, FirstOrder(), meta, task, KEY))
    with pytest.warns(bl.FirstOrderWarning) as record:
        run(meta), run(meta)
    assert len(record) == 1


# Multi-step


def test_multi_step_is_the_weighted_sum_of_prefixes(x64):
    estimator = MultiStep(num_annealing_steps=10)
    case = case_of("quadratic-momentum-5")
    meta, task = jax.tree.map(jnp.asarray, (case.meta, case.task))
    prefixes = [quadratic(k, optimizer="momentum").exact for k in range(1, 6)]
    run = jax.jit(lambda count: estimator.estimate(case.problem, case.solver, meta, task, count, KEY))
    for count in (0, 4, 10, 25):
        h, after = run(jnp.int32(count))
        weights = np.full(5, (1 - min(count / 10, 1)) / 5)
        weights[-1] += min(count / 10, 1)
        expected = {
            name: sum(w * prefix.grad[name] for w, prefix in zip(weights, prefixes)) for name in case.meta
        }
        assert after == count + 1
        assert_trees_close("grad", h.grad, expected, 1e-10)
        value = sum(w * prefix.value for w, prefix in zip(weights, prefixes))
        assert_close("value", h.value, value, 1e-10)
        assert_close("last_outer_loss", h.stats["last_outer_loss"], case.exact.value, 1e-12)


def test_multi_step_weights():
    for count in (0, 3, 10, 99):
        assert_close("even", MultiStep().weights(4, jnp.int32(count)), np.full(4, 0.25), 1e-7)
    annealed = [MultiStep(num_annealing_steps=4).weights(2, jnp.int32(c)) for c in (0, 2, 4, 9)]
    assert_close("weights", annealed, [[0.5, 0.5], [0.25, 0.75], [0, 1], [0, 1]], 1e-6)


# No step, and what is refused


@pytest.mark.parametrize("estimator", [*EXACT, Unroll(checkpoint=2), Mixed(checkpoint=1)])
def test_no_steps(x64, estimator):
    case = quadratic(0)
    assert_matches(estimator, case)
    assert not np.any(case.exact.grad["theta"]) and np.all(case.exact.grad["init"])
    h = bl.hypergradient(case.problem, case.solver, estimator, case.meta, case.task, KEY)
    assert h.stats == {"zero_leaves": 2, "finite": 1}


def test_first_order_without_steps(x64):
    assert_matches(FirstOrder(), quadratic(0), "first_order")
    with pytest.raises(ValueError, match="num_steps of at least 1"):
        bl.Learner(quadratic(0).problem, quadratic(0).solver, MultiStep())


def test_a_checkpoint_longer_than_the_loop(x64):
    assert_matches(Mixed(checkpoint=50), case_of("quadratic-sgd-5"))


@pytest.mark.parametrize("checkpoint", [0, -1, 1.5, True])
@pytest.mark.parametrize("estimator", [Unroll, Mixed])
def test_checkpoint_must_be_positive(estimator, checkpoint):
    with pytest.raises(ValueError, match=f"{estimator.__name__}.checkpoint must be None or"):
        estimator(checkpoint=checkpoint)


@pytest.mark.filterwarnings("ignore::bilevel.FirstOrderWarning")
@pytest.mark.parametrize("estimator", [Unroll(), Mixed(), FirstOrder(), MultiStep()])
def test_refusals_name_the_fault_and_the_remedy(estimator):
    problem, solver, meta, task = contract()

    @dataclass(frozen=True)
    class ClosedForm:
        def solve(self, problem, meta, task, key):
            return bl.Solution(meta, {})

    with pytest.raises(TypeError, match=r"ClosedForm has no steps.*use bl\.inner\.Gradient"):
        bl.Learner(problem, ClosedForm(), estimator)
    with pytest.raises(TypeError, match=r"ClosedForm has no steps.*use bl\.inner\.Gradient"):
        bl.hypergradient(problem, ClosedForm(), estimator, meta, task, KEY)
    vector = replace(problem, outer_loss=lambda params, meta, batch, key: params["w"])
    with pytest.raises(ValueError, match=r"outer_loss must return a scalar, got shape \(3,\)"):
        bl.hypergradient(vector, solver, estimator, meta, task, KEY)
    with_int = {**meta, "options": {"depth": [jnp.int32(3)]}}
    with pytest.raises(TypeError, match=r"meta\['options'\]\['depth'\]\[0\] is int32"):
        bl.hypergradient(problem, solver, estimator, with_int, task, KEY)


def test_problem_must_be_made_of_functions():
    with pytest.raises(TypeError, match=r"Problem\.outer_loss must be a function, got int"):
        bl.Problem(lambda meta, key: meta, lambda *args: 0.0, 3)
    with pytest.raises(TypeError, match=r"Problem\.metrics must be a function or None, got dict"):
        bl.Problem(*[lambda *args: 0.0] * 3, metrics={})


@pytest.mark.parametrize("place", ["plain", "jit", "scan", "checkpoint", "vmap"])
def test_mixed_refuses_a_custom_vjp(place):
    """A reversed gradient has no symmetric Hessian: mixed mode would give the wrong sign."""

    @jax.custom_vjp
    def reverse(x):
        return x

    reverse.defvjp(lambda x: (x, None), lambda residual, g: (-g,))
    around = {
        "plain": reverse,
        "jit": jax.jit(reverse),
        "scan": lambda x: jax.lax.scan(lambda c, _: (reverse(c), None), x, length=1)[0],
        "checkpoint": jax.checkpoint(reverse),
        "vmap": lambda x: jax.vmap(reverse)(x[None])[0],
    }[place]
    problem = bl.Problem(
        init=lambda meta, key: meta["init"],
        inner_loss=lambda params, meta, batch, key: around(params) * meta["slope"],
        outer_loss=lambda params, meta, batch, key: params,
    )
    solver = bl.inner.Gradient(optax.sgd(0.1), 1)
    meta = {"init": 1.0, "slope": 2.0}
    h = bl.hypergradient(problem, solver, Unroll(), meta, NO_TASK, KEY)
    assert_trees_close("grad", h.grad, {"init": 1.0, "slope": 0.1}, 1e-6)
    with pytest.raises(TypeError, match=r"custom_vjp.*use bl\.hypergrad\.Unroll\(\)"):
        bl.hypergradient(problem, solver, Mixed(), meta, NO_TASK, KEY)


# Stats


@pytest.mark.parametrize("estimator", [*EXACT, FirstOrder(), MultiStep()])
def test_stats_count_zero_leaves_and_see_what_is_not_finite(estimator):
    problem = bl.Problem(
        init=lambda meta, key: meta["init"],
        inner_loss=lambda params, meta, batch, key: jnp.sum(params**2),
        outer_loss=lambda params, meta, batch, key: jnp.sum(jnp.log(params)) + meta["direct"],
        metrics=lambda params, meta, batch, key: {"size": jnp.sum(params)},
    )
    solver = bl.inner.Gradient(optax.sgd(0.25), 1)
    meta = {"init": jnp.array([2.0, 4.0]), "direct": 1.0, "none": jnp.zeros(2), "nor": 0.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bl.FirstOrderWarning)
        h = bl.hypergradient(problem, solver, estimator, meta, NO_TASK, KEY)
        assert h.stats["zero_leaves"] == 2 and h.stats["finite"] == 1
        assert h.stats["query_size"] == h.stats["support_size"] == 3.0
        bad = {**meta, "init": jnp.array([0.0, 4.0])}
        h = bl.hypergradient(problem, solver, estimator, bad, NO_TASK, KEY)
        assert h.stats["finite"] == 0


def test_inner_loss_is_the_one_where_the_last_step_began():
    problem, solver, meta, task = contract()
    h = bl.hypergradient(problem, solver, Mixed(), meta, task, KEY)
    before = replace(solver, num_steps=4).solve(problem, meta, task, jax.random.split(KEY)[0]).params
    expected = problem.inner_loss(before, meta, task.support, KEY)
    assert_close("inner_loss", h.stats["inner_loss"], expected, 1e-6)
