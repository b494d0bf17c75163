"""Every checkpointing policy gives the values and gradients of the plain loop, and keeps what it says."""

from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad import Mixed, MultiStep, Unroll
from bilevel.inner.checkpointing import Every, Offload, Sqrt, Tree
from bilevel.testing import assert_close, assert_derivative, assert_trees_close

POLICIES = [
    Every(1),
    Every(3),
    Every(1, keep_gradients=True),
    Every(4, keep_gradients=True),
    Sqrt(),
    Tree(2),
    Tree(3),
    Offload(),
]
KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(6, 2))
Y = np.sin(X.sum(1))
TASK = bl.Task((X[:3], Y[:3]), (X[3:], Y[3:]))


def loss(params, meta, batch, key):
    x, y = batch
    error = jnp.tanh(x @ params["w"]) * params["v"] - y
    noise = jax.random.key_data(key) / 2.0**32  # of each step its own, and quick to compile
    return jnp.mean(error**2) + jnp.exp(meta["log_ridge"]) * jnp.sum((params["w"] + 0.1 * noise) ** 2)


PROBLEM = bl.Problem(lambda meta, key: meta["init"], loss, lambda p, m, b, k: loss(p, m, b, k) ** 2)


def point():
    init = {"w": jnp.array([0.3, -0.5]), "v": jnp.array(0.7)}
    return {"init": init, "log_ridge": jnp.array(-2.0), "log_rate": jnp.array(-3.0)}


def momentum(rate):
    return optax.sgd(rate, momentum=0.7)


def solver(num_steps, optimizer=momentum):
    return bl.inner.Gradient(lambda meta: optimizer(jnp.exp(meta["log_rate"])), num_steps)


@cache
def hypergradient(estimator, num_steps, optimizer=momentum):
    """One that was jitted; kept, since the plain ones are compared with many times."""
    with jax.enable_x64(True):
        descent = solver(num_steps, optimizer)
        run = jax.jit(lambda m: bl.hypergradient(PROBLEM, descent, estimator, m, TASK, KEY))
        return jax.tree.map(np.asarray, run(point()))


def assert_equal(got, expected):
    # To the last bit the loops agree only where the compiler fuses them alike.
    assert_close("value", got.value, expected.value, 1e-14)
    assert_trees_close("grad", got.grad, expected.grad, 1e-12)
    assert_trees_close("stats", got.stats, expected.stats, 1e-12)


@pytest.mark.parametrize("num_steps", [0, 1, 13])
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_policy_changes_nothing(policy, num_steps):
    expected, got = (hypergradient(Mixed(checkpoint=c), num_steps) for c in (None, policy))
    assert_equal(got, expected)


@pytest.mark.parametrize("policy", [Every(1, keep_gradients=True), Sqrt(), Tree(2)], ids=repr)
def test_a_policy_changes_nothing_in_plain_reverse(policy):
    expected, got = (hypergradient(Unroll(checkpoint=c), 13) for c in (None, policy))
    assert_equal(got, expected)
    assert_equal(hypergradient(Mixed(), 13), expected)


@pytest.mark.parametrize("policy", [Every(1, keep_gradients=True), Tree(3)], ids=repr)
def test_a_policy_changes_nothing_with_adam(policy):
    expected, got = (hypergradient(Mixed(checkpoint=c), 7, optax.adam) for c in (None, policy))
    assert_equal(got, expected)


def test_the_plain_gradient_is_right(x64):
    run = jax.jit(lambda m: bl.hypergradient(PROBLEM, solver(13), Mixed(), m, TASK, KEY).value)
    assert_derivative(run, hypergradient(Mixed(), 13).grad, point())


def test_a_number_is_every_so_many():
    for estimator in (Mixed, Unroll):
        a, b = (hypergradient(estimator(checkpoint=c), 7) for c in (3, Every(3)))
        assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.parametrize("adjoint", [Mixed(checkpoint=Tree(2)), Unroll(checkpoint=Every(1, True))], ids=repr)
def test_levels_above(x64, adjoint):
    """A Hessian-vector product in two modes, forward mode, and a batch of tasks."""

    def value(meta, batch=TASK.support):
        task = bl.Task(batch, TASK.query)
        params = adjoint.solve(PROBLEM, solver(5, optax.sgd), meta, task, KEY)
        return PROBLEM.outer_loss(params, meta, task.query, KEY)

    meta, vector = point(), jax.tree.map(jnp.cos, point())
    grad = jax.jit(jax.grad(value))(meta)
    assert_trees_close("forward", jax.jit(jax.jacfwd(value))(meta), grad, 1e-10)

    def along(meta):
        return optax.tree.vdot(jax.grad(value)(meta), vector)

    reverse = jax.jit(jax.grad(along))(meta)
    assert_derivative(jax.jit(along), reverse, meta)
    forward = jax.jit(lambda m: jax.jvp(jax.grad(value), (m,), (vector,))[1])(meta)
    assert_trees_close("forward over reverse", forward, reverse, 1e-9)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf + 0.1]), TASK.support)
    batched = jax.jit(jax.vmap(jax.grad(value), (None, 0)))(meta, several)
    assert_trees_close("batch", jax.tree.map(lambda leaf: leaf[0], batched), grad, 1e-12)


def test_multi_step_takes_every_policy(x64):
    expected = hypergradient(MultiStep(), 7)
    for policy in (Sqrt(), Tree(2)):
        got = hypergradient(MultiStep(adjoint=Mixed(checkpoint=policy)), 7)
        assert_close("value", got.value, expected.value, 1e-14)
        assert_trees_close("grad", got.grad, expected.grad, 1e-12)


def temporary_bytes(estimator, num_steps):
    """What XLA sets aside for a wide inner problem; state 64 KiB, activations of a step many times that."""

    def wide(params, meta, batch, key):
        hidden = jnp.sin(batch @ jnp.sin(params))
        return jnp.mean((jnp.sin(hidden @ params) - batch) ** 2) + meta["ridge"] * jnp.sum(params**2)

    problem = bl.Problem(lambda meta, key: meta["init"], wide, wide)
    meta = {"init": jnp.ones((128, 128)), "ridge": jnp.float32(0.1)}
    task = bl.Task(jnp.ones((256, 128)), jnp.ones((256, 128)))
    descent = bl.inner.Gradient(optax.sgd(0.01), num_steps)
    run = jax.jit(lambda m: bl.hypergradient(problem, descent, estimator, m, task, KEY).grad)
    return run.lower(meta).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_as_promised():
    """Between 100 and 1600 steps: K for the plain loop, √K for Sqrt, less for Tree."""
    state = 128 * 128 * 4
    growth = {}
    for policy in (None, Sqrt(), Tree(4)):
        small, large = (temporary_bytes(Mixed(checkpoint=policy), k) for k in (100, 1600))
        growth[policy] = (large - small) / state
    assert 1500 <= growth[None] <= 1550
    assert 2 * 30 * 0.9 <= growth[Sqrt()] <= 2 * 30 * 1.6
    assert growth[Tree(4)] <= 20
    assert temporary_bytes(Unroll(), 100) > 4 * temporary_bytes(Mixed(), 100)


# What is refused


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Every(0), "Every.num_steps"),
        (lambda: Every(1.5), "Every.num_steps"),
        (lambda: Every(True), "Every.num_steps"),
        (lambda: Tree(1), "Tree.branching"),
        (lambda: Tree(2.0), "Tree.branching"),
    ],
)
def test_impossible_policies(make, name):
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least"):
        make()


@pytest.mark.parametrize("checkpoint", [0, True, 2.5, "sqrt", Sqrt])
@pytest.mark.parametrize("estimator", [Unroll, Mixed])
def test_other_checkpoints_are_refused(estimator, checkpoint):
    with pytest.raises(ValueError, match=rf"{estimator.__name__}\.checkpoint must be None or .*Tree\(\)"):
        estimator(checkpoint=checkpoint)


def test_offload_without_such_a_memory():
    policy = Offload(target="tape")
    with pytest.raises(ValueError, match=r"Offload needs memory of the kind 'tape'.*use bl\.inner\.Sqrt"):
        bl.hypergradient(PROBLEM, solver(2), Mixed(checkpoint=policy), point(), TASK, KEY)


# Solvers that have no steps


@dataclass(frozen=True)
class Halfway:
    """φ = (θ + support) / 2, in closed form."""

    closed_form = True

    def solve(self, problem, meta, task, key):
        return bl.Solution((meta + task.support) / 2, {"inner_loss": jnp.float32(0.25)})


SIMPLE = bl.Problem(
    init=lambda meta, key: meta,
    inner_loss=lambda params, meta, batch, key: (params - meta) ** 2 + (params - batch) ** 2,
    outer_loss=lambda params, meta, batch, key: (params - batch) ** 2,
)


@pytest.mark.parametrize("estimator", [Unroll(), Mixed(), Mixed(checkpoint=Sqrt())], ids=repr)
def test_a_closed_form_is_differentiated_as_it_stands(estimator):
    learner = bl.Learner(SIMPLE, Halfway(), estimator)
    h = bl.hypergradient(SIMPLE, learner.solver, estimator, 3.0, bl.Task(1.0, 5.0), KEY)
    assert (h.value, h.grad, h.stats["inner_loss"]) == (9.0, -3.0, 0.25)
    solved = jax.grad(lambda m: estimator.solve(SIMPLE, Halfway(), m, bl.Task(1.0, 5.0), KEY))
    assert solved(3.0) == 0.5


@pytest.mark.parametrize("estimator", [Unroll(), Mixed()])
def test_other_solvers_are_sent_to_implicit(estimator):
    @dataclass(frozen=True)
    class UntilConverged:
        def solve(self, problem, meta, task, key):
            return bl.Solution(meta, {})

    with pytest.raises(TypeError, match=r"UntilConverged has no steps.*bl\.hypergrad\.Implicit\("):
        bl.Learner(SIMPLE, UntilConverged(), estimator)
