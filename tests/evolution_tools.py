"""What the tests of evolution strategies share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl

NO_TASK = bl.Task(None, None)
KEY = jax.random.key(0)
Z = 3.29  # 99.9% of a normal distribution lie within ±3.29


def direct(loss):
    """A problem whose inner solution is θ itself, after one step, so that F(θ) = loss(θ)."""
    problem = bl.Problem(
        init=lambda meta, key: jax.tree.map(jnp.zeros_like, meta),
        inner_loss=lambda params, meta, batch, key: (
            0.5 * optax.tree.norm(optax.tree.sub(params, meta), squared=True)
        ),
        outer_loss=lambda params, meta, batch, key: loss(params),
    )
    return problem, bl.inner.Gradient(optax.sgd(1.0), 1)


def once(estimator, problem, solver, meta, task=NO_TASK, key=KEY):
    """`bl.hypergradient` without its warnings: most estimates here are noisy on purpose."""
    estimator.check(problem, solver)

    @jax.jit
    def run(meta, task, key):
        state = estimator.init(problem, solver, meta, task, key)
        return estimator.estimate(problem, solver, meta, task, state, key)[0]

    return run(meta, task, key)


def repeat(estimator, problem, solver, meta, task=NO_TASK, times=2000):
    """`times` independent estimates: leaves `[times, ...]`."""
    keys = jax.random.split(jax.random.key(1), times)

    run = jax.jit(
        lambda meta, keys: jax.lax.map(lambda key: once(estimator, problem, solver, meta, task, key), keys)
    )
    return run(meta, keys)


def z_scores(samples, expected):
    """How many standard errors the mean of samples `[R, ...]` is off."""
    samples = np.asarray(samples)
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    return np.abs(samples.mean(axis=0) - np.asarray(expected)) / error
