"""What the tests of learners that take gradient steps share."""

import jax
import jax.numpy as jnp
import numpy as np

import bilevel as bl
from bilevel.testing import assert_derivative

KEY = jax.random.key(0)
NET = bl.nets.mlp([1, 4, 1], jnp.tanh)
DEEP = bl.nets.mlp([1, 3, 3, 3, 1], jnp.tanh)


def regression_task():
    x = jnp.linspace(-1, 1, 5)[:, None]
    return bl.Task((x, jnp.sin(3 * x)), (x + 0.1, jnp.sin(3 * x + 0.3)))


def first_meta(learner):
    """A first meta, away from zeros and identities, so that every leaf has a part to play."""
    noise = np.random.default_rng(0)
    meta = jax.jit(learner.init_meta)(KEY)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.2 * noise.normal(size=x.shape)), meta)


# Everything is compiled: op by op, these tests would take several times as long.
def estimate(learner, meta, task):
    return jax.jit(
        lambda meta: bl.hypergradient(learner.problem, learner.solver, learner.estimator, meta, task, KEY)
    )(meta)


def solve(learner, meta, task):
    return jax.jit(lambda meta: learner.solver.solve(learner.problem, meta, task, KEY).params)(meta)


def squared_error(apply, params, batch):
    x, y = batch
    return jnp.mean((apply(params, x) - y) ** 2)


def plain_perceptron(params, x):
    for name in sorted(params, key=lambda name: (name == "head", name)):
        x = x @ params[name]["w"] + params[name]["b"]
        x = x if name == "head" else jnp.tanh(x)
    return x


def exact(learner, meta=None):
    """Asserts that the learner's hypergradient is the slope of its value."""
    meta, task = first_meta(learner) if meta is None else meta, regression_task()
    run = jax.jit(lambda meta: estimate(learner, meta, task))
    h = run(meta)
    assert_derivative(lambda meta: run(meta).value, h.grad, meta)
    assert h.stats["zero_leaves"] == 0 and h.stats["finite"] == 1
    assert {"query_loss", "support_loss"} <= set(h.stats)
