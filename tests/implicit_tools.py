"""What the tests of implicit hypergradients share."""

import jax
import jax.numpy as jnp
import pytest

import bilevel as bl

KEY = jax.random.key(0)
quiet = pytest.mark.filterwarnings(
    "ignore::bilevel.hypergrad.doubts.HypergradientWarning", "ignore::bilevel.FirstOrderWarning"
)


def floats(stats):
    return {name: float(value) for name, value in stats.items()}


def run(problem, solver, estimator, meta, task):
    return jax.jit(lambda m, t: bl.hypergradient(problem, solver, estimator, m, t, KEY))(meta, task)


def arrays(case):
    return jax.tree.map(jnp.asarray, (case.meta, case.task))
