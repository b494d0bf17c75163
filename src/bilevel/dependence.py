"""Which leaves of a tree can a function's value depend on? Answered from its trace, without running it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, Literal
from jax.extend.core import primitives as p


def unused_leaves(function: Callable, tree: Any, *rest: Any) -> list[str]:
    """Names of the leaves of `tree` that `function(tree, *rest)` cannot depend on.

    >>> unused_leaves(lambda tree: 2 * tree["a"], {"a": 1.0, "b": 3.0})
    ["['b']"]
    """
    closed = jax.make_jaxpr(function)(tree, *rest)
    named = jax.tree_util.tree_leaves_with_path(tree)
    reached = _reached(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return [jax.tree_util.keystr(path) for (path, _), used in zip(named, reached, strict=False) if not used]


def _reached(jaxpr: Jaxpr, wanted: list[bool]) -> list[bool]:
    """Which inputs the wanted outputs depend on, walking backwards."""
    live = {v for v, w in zip(jaxpr.outvars, wanted, strict=True) if w and not isinstance(v, Literal)}
    for eqn in reversed(jaxpr.eqns):
        outputs = [v in live for v in eqn.outvars]
        if not any(outputs):
            continue
        if eqn.primitive is p.jit_p:
            inputs = _reached(eqn.params["jaxpr"].jaxpr, outputs)
        else:  # loops and the rest: any output may depend on any input
            inputs = [True] * len(eqn.invars)
        live |= {v for v, used in zip(eqn.invars, inputs, strict=True) if used and not isinstance(v, Literal)}
    return [v in live for v in jaxpr.invars]
