"""Is a problem the same each time it is traced, and is it traced once?"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.analysis.objective import is_formula, params_like
from bilevel.problem import InnerSolver, Key, Learner, Meta, Problem, Task


def impure_functions(problem: Problem, solver: InnerSolver, meta: Meta, task: Task, key: Key) -> list[str]:
    """The functions of a problem whose traces differ though their arguments do not.

    Such a function reads something that changes between calls: NumPy's random numbers, a counter, a
    file. A compiled step keeps the value of its trace for ever.

    >>> import bilevel as bl, numpy as np, optax
    >>> problem = bl.Problem(init=lambda meta, key: meta,
    ...                      inner_loss=lambda params, meta, batch, key: params * np.random.normal(),
    ...                      outer_loss=lambda params, meta, batch, key: params)
    >>> solver = bl.inner.Gradient(optax.sgd(0.1), num_steps=1)
    >>> impure_functions(problem, solver, 1.0, bl.Task(None, None), jax.random.key(0))
    ['inner_loss']
    """
    params = params_like(problem, solver, meta, task, key)
    calls: dict[str, tuple[Callable, tuple]] = {
        "inner_loss": (problem.inner_loss, (params, meta, task.support, key)),
        "outer_loss": (problem.outer_loss, (params, meta, task.query, key)),
    }
    if not is_formula(solver):
        calls["init"] = (problem.init, (meta, key))
    found = []
    for name, (function, args) in calls.items():
        first, second = (_trace(function, args) for _ in range(2))
        if first[0] != second[0] or not _same(first[1], second[1]):
            found.append(name)
    return found


def _trace(function, args):
    closed = jax.make_jaxpr(lambda *args: function(*args))(*args)
    return re.sub(r"0x[0-9a-fA-F]+", "", str(closed.jaxpr)), closed.consts


def _same(a, b) -> bool:
    def equal(x, y):
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        return np.array_equal(np.asarray(x), np.asarray(y), equal_nan=np.asarray(x).dtype.kind == "f")

    return len(a) == len(b) and all(map(equal, a, b))


def count_traces(learner: Learner, meta: Meta, task: Task, key: Key) -> list[str]:
    """What makes a compiled outer step compile again, in words; empty where nothing does.

    The estimator is traced for `meta` and then for what an update makes of it, with the state it returned.

    Cost: three traces; nothing is run.
    """
    problems = [
        f"meta{jax.tree_util.keystr(path)} is weakly typed (a Python number): after the first update its "
        "type changes and everything compiles a second time; make it jnp.float32(...)"
        for path, leaf in jax.tree_util.tree_leaves_with_path(meta)
        if isinstance(leaf, float | int) or getattr(leaf, "weak_type", False)
    ]
    traces = 0

    def counted(params, meta, batch, key):
        nonlocal traces
        traces += 1
        return learner.problem.inner_loss(params, meta, batch, key)

    watched = replace(learner, problem=replace(learner.problem, inner_loss=counted))
    strong = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), meta)
    state = watched.estimator.init(watched.problem, watched.solver, strong, task, key)

    @jax.jit
    def call(meta, state):
        h, state = watched.estimator.estimate(watched.problem, watched.solver, meta, task, state, key)
        return jax.tree.map(lambda m, g: m - jnp.asarray(1e-3 * g, m.dtype), meta, h.grad), state

    after = jax.eval_shape(call, strong, state)
    once = traces
    again = jax.eval_shape(call, *after)
    if traces > once and _types(after) == _types((strong, state)):
        problems.append("the inner loss is traced again for arguments of the same shapes and types")
    if _types(again) != _types(after) or _types(after[1]) != _types(state):
        problems.append(
            f"{type(learner.estimator).__name__}'s state changes its shapes or types from one call to the "
            "next: every outer step would compile again"
        )
    return problems


def _types(tree: Any):
    return jax.tree.structure(tree), [
        (jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)
    ]
