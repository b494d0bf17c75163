"""A solution as a differentiable function of what it depends on, by the implicit function theorem.

How the solution was found plays no part: only the equations that it solves are differentiated.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bilevel.hypergrad.implicit.linear_solvers import LinearSolver, solve_scaled
from bilevel.problem import Key


def frozen(function: Callable, *args: Any) -> Any:
    """`function(*args)`, with nothing to differentiate in it.

    `stop_gradient` on the arguments is not enough: the function may close over a variable of an outer
    level, and its loops would be differentiated for nothing, or refuse to be.

    >>> print(jax.grad(lambda x: frozen(lambda y: x * y, 2.0))(3.0))
    0.0
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    consts, leaves = jax.lax.stop_gradient((closed.consts, jax.tree.leaves(args)))
    # The outputs too: one that is an argument handed through is never computed.
    out = jax.lax.stop_gradient(eval_jaxpr(closed.jaxpr, consts, *leaves))
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


def implicit_function(
    root: Callable, solution: Any, operands: tuple, linear_solver: LinearSolver, key: Key
) -> Any:
    """`solution`, as the function of `operands` that `root(solution, *operands) = 0` makes it.

        dφ = −(∂φ R)⁻¹ ∂x R dx,      and in reverse     x̄ = −(∂x R)ᵀ (∂φ R)⁻ᵀ φ̄

    Both hold to any order, and what the root closes over is differentiated like an operand.

    Args:
        root: `root(solution, *operands) -> tree like solution`.
        solution: where the root is (nearly) zero; taken as given.
        operands: any trees; only their floats have derivatives.
        linear_solver: see `linear_solvers`; it solves for each derivative.
        key: its randomness.

    Cost: none in value; a linear solve for each tangent or cotangent.

    >>> from bilevel.hypergrad.implicit.linear_solvers import direct
    >>> def root_of(x):
    ...     y = jax.lax.stop_gradient(jnp.sqrt(x))
    ...     return implicit_function(lambda y, x: y * y - x, y, (x,), direct(), jax.random.key(0))
    >>> print(jax.grad(root_of)(4.0), jax.grad(jax.grad(root_of))(4.0))
    0.25 -0.03125
    """
    leaves, tree = jax.tree.flatten(jax.tree.map(jnp.asarray, (solution, *operands)))
    solution_tree = jax.tree.structure(solution)

    def flat_root(*leaves):
        return tuple(jax.tree.leaves(root(*jax.tree.unflatten(tree, leaves))))

    # What the root closes over becomes an operand like the rest.
    closed = jax.make_jaxpr(flat_root)(*leaves)
    num_leaves = len(leaves)

    def of_operands(solution, operands):
        rest = num_leaves - len(solution)
        return tuple(eval_jaxpr(closed.jaxpr, operands[rest:], *solution, *operands[:rest]))

    out = implicit_p.bind(
        *leaves,
        *closed.consts,
        key,
        root=of_operands,
        linear_solver=linear_solver,
        num_params=solution_tree.num_leaves,
        levels=(),
    )
    return jax.tree.unflatten(solution_tree, out)


# The identity on the solution, with the derivative of the theorem in its other operands. It is a primitive
# because the rule of a `custom_jvp` is dropped when a loop around it is differentiated twice. `levels` holds,
# for each `vmap` around it, the batch axis of every operand: the rule is then mapped, so that each problem
# of a batch has a linear solve of its own.
implicit_p = Primitive("implicit_solution")
implicit_p.multiple_results = True


def _apply(*args, num_params, **params):
    return list(args[:num_params])


def _jvp(primals, tangents, *, root, linear_solver, num_params, levels):
    out = implicit_p.bind(
        *primals, root=root, linear_solver=linear_solver, num_params=num_params, levels=levels
    )
    operands = primals[num_params:]
    moving = [
        i
        for i, t in enumerate(tangents[num_params:])
        if type(t) is not ad.Zero and jnp.issubdtype(jnp.result_type(operands[i]), jnp.inexact)
    ]
    if not moving:
        return out, [jnp.zeros_like(o) for o in out]

    def rule(solution, operands, dots):
        *operands, key = operands
        # `solution` is bound above, not an argument taken as given: a further level moves it.
        return _tangent(root, linear_solver, solution, operands, key, moving, dots)

    for level in levels:
        axes = level[num_params:]
        rule = jax.vmap(rule, in_axes=(0, axes, tuple(axes[i] for i in moving)))
    return out, list(rule(tuple(out), tuple(operands), tuple(tangents[num_params + i] for i in moving)))


def _tangent(root, linear_solver, solution, operands, key, moving, dots):
    def of_moving(*values):
        full = list(operands)
        for i, value in zip(moving, values, strict=True):
            full[i] = value
        return root(solution, full)

    def matvec(vector):
        return jax.jvp(lambda *s: root(s, operands), solution, vector)[1]

    def solve(matvec, b):
        return solve_scaled(linear_solver, matvec, b, key)[0]

    rate = jax.jvp(of_moving, tuple(operands[i] for i in moving), dots)[1]
    return jax.lax.custom_linear_solve(
        matvec,
        jax.tree.map(jnp.negative, rate),
        solve,
        transpose_solve=solve,
        symmetric=linear_solver.system == "gradient",
    )


def _batch(args, dims, *, num_params, levels, **params):
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    solution = [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args[:num_params], dims[:num_params], strict=True)
    ]
    level = (0,) * num_params + tuple(dims[num_params:])
    out = implicit_p.bind(
        *solution, *args[num_params:], num_params=num_params, levels=(*levels, level), **params
    )
    return out, [0] * num_params


implicit_p.def_impl(_apply)
implicit_p.def_abstract_eval(lambda *avals, num_params, **params: list(avals[:num_params]))
ad.primitive_jvps[implicit_p] = _jvp
batching.primitive_batchers[implicit_p] = _batch
mlir.register_lowering(implicit_p, mlir.lower_fun(_apply, multiple_results=True))
