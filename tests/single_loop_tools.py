"""What the tests of single-loop estimators share."""

import jax
import jax.numpy as jnp
import optax
from bilevel_references import as_arrays

import bilevel as bl
from bilevel.hypergrad.single_loop.amigo import AmIGO
from bilevel.hypergrad.single_loop.f2sa import F2sa
from bilevel.hypergrad.single_loop.ma_soba import MaSoba
from bilevel.hypergrad.single_loop.saba import Saba
from bilevel.hypergrad.single_loop.soba import Soba
from bilevel.hypergrad.single_loop.stocbio import StocBiO

SGD, MOMENTUM = optax.sgd(0.3), optax.sgd(0.1, momentum=0.5)
ONE = bl.inner.Gradient(SGD, num_steps=1)
FIVE = bl.inner.Gradient(SGD, num_steps=5)
# Each with a solver it accepts and the calls it needs to settle.
IMPLICIT = {
    "soba": (Soba(0.3), ONE, 600),
    "soba-momentum": (Soba(0.3), bl.inner.Gradient(MOMENTUM, 1), 600),
    "saba": (Saba(0.3), ONE, 600),
    "ma-soba": (MaSoba(0.3, average_rate=0.2), ONE, 600),
    "amigo": (AmIGO(0.3, linear_steps=5), FIVE, 150),
    "amigo-one": (AmIGO(0.3, linear_steps=1), ONE, 600),
    "stocbio": (StocBiO(0.3, num_neumann=300), FIVE, 100),
}
NAMES = ("soba", "saba", "ma-soba", "amigo", "stocbio")
STEPPING = [*(IMPLICIT[name][0] for name in NAMES), F2sa(100.0)]


def settled(estimator, solver, reference):
    """The state at (φ*, q*)."""
    meta, task = as_arrays(reference)
    params, q, _ = jax.tree.map(jnp.asarray, reference.solution(reference.meta))
    state = estimator.init(reference.problem, solver, meta, task, jax.random.key(0))
    warm = getattr(state, "warm", state)
    warm = warm._replace(inner=warm.inner._replace(params=params), q=q)
    return state._replace(warm=warm) if hasattr(state, "warm") else warm
