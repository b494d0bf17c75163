"""What the tests of estimators without second derivatives share."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bilevel_references import (
    as_arrays,
)

import bilevel as bl

pytestmark = pytest.mark.filterwarnings("ignore::bilevel.hypergrad.doubts.HypergradientWarning")
KEY = jax.random.key(0)
LONG = bl.inner.Gradient(optax.sgd(0.3), num_steps=1000)


def run(estimator, reference, solver=LONG, meta=None, dtype=None):
    """One jitted hypergradient of a reference problem."""
    start, task = as_arrays(reference)
    meta = start if meta is None else meta
    if dtype is not None:
        meta, task = jax.tree.map(
            lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
            (meta, task),
        )
    call = jax.jit(lambda meta, task: bl.hypergradient(reference.problem, solver, estimator, meta, task, KEY))
    return jax.tree.map(np.asarray, call(meta, task))


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def distance(a, b):
    return np.linalg.norm(flat(a) - flat(b)) / np.linalg.norm(flat(b))
