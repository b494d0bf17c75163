"""The part of an inner loss that no inner step changes, computed once instead of at every step."""

from dataclasses import replace

import jax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, Literal

from bilevel.problem import Key, Meta, Params, Problem, Task


def hoisted(problem: Problem, meta: Meta, task: Task, params: Params, key: Key) -> tuple[Problem, Task]:
    """The same inner problem, with what neither the parameters nor the key reach computed beforehand.

        g(φ, θ, support) = g₂(φ, g₁(θ, support)),   support ← g₁(θ, support),   inner_loss ← g₂

    The loss is traced once and its operations are told apart by what they read. Derivatives in θ go
    through the new support, and a backward pass through all steps goes through g₁ once.

    Args:
        params: of the shapes that the inner loop has; their values do not matter, nor those of `key`.

    Returns:
        A problem whose inner loss takes the new support in place of the old, and a task that has it. Only
        the inner loss may be used.

    Cost: memory for all that g₂ reads of g₁, over the whole inner loop.

    >>> import bilevel as bl, jax.numpy as jnp
    >>> loss = lambda params, meta, batch, key: jnp.sum((jnp.tanh(batch @ meta) @ params) ** 2)
    >>> problem = bl.Problem(lambda meta, key: jnp.ones(3), loss, loss)
    >>> task, meta, key = bl.Task(jnp.ones((4, 2)), None), jnp.ones((2, 3)), jax.random.key(0)
    >>> problem, task = hoisted(problem, meta, task, jnp.ones(3), key)
    >>> [leaf.shape for leaf in task.support]  # the features
    [(4, 3)]
    """
    leaves, tree = jax.tree.flatten((params, meta, task.support, key))
    steady = len(jax.tree.leaves((meta, task.support)))
    before = len(jax.tree.leaves(params))

    def flat_loss(*leaves):
        return problem.inner_loss(*jax.tree.unflatten(tree, leaves))

    closed = jax.make_jaxpr(flat_loss)(*leaves)
    jaxpr = closed.jaxpr
    changing = [*jaxpr.invars[:before], *jaxpr.invars[before + steady :]]  # parameters and key
    moving = set(changing)
    first, second = [], []
    for equation in jaxpr.eqns:
        moves = equation.effects or any(var in moving for var in _variables(equation.invars))
        moving.update(equation.outvars if moves else ())
        (second if moves else first).append(equation)
    read = [var for equation in second for var in _variables(equation.invars)]
    kept = list(dict.fromkeys(var for var in [*read, *_variables(jaxpr.outvars)] if var not in moving))

    names = jaxpr.debug_info.with_unknown_names()
    once = Jaxpr(jaxpr.constvars, jaxpr.invars, kept, first, frozenset(), names)
    support = tuple(eval_jaxpr(once, closed.consts, *leaves))
    each_step = Jaxpr([], [*changing, *kept], jaxpr.outvars, second, jaxpr.effects, names)

    def inner_loss(params, meta, support, key):
        (value,) = eval_jaxpr(each_step, (), *jax.tree.leaves((params, key)), *support)
        return value

    return replace(problem, inner_loss=inner_loss), task._replace(support=support)


def _variables(atoms):
    return [atom for atom in atoms if not isinstance(atom, Literal)]
