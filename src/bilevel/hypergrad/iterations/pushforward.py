"""A function whose derivative is taken by forward mode, also where reverse mode asks for it."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import Primitive
from jax.flatten_util import ravel_pytree
from jax.interpreters import ad, batching, mlir

from bilevel.hypergrad.parts import is_float


def by_forward_mode(function: Callable) -> Callable:
    """The same function; reverse mode through it works column by column, and stores nothing of its inside.

        JVP:  dx ↦ J dx,  one forward-mode derivative
        VJP:  v ↦ Jᵀv,  Jᵀv = (⟨J e₁, v⟩, ..., ⟨J eₘ, v⟩),  m of them

    The rule is a linear map with its transpose, so forward and reverse mode work to any order, under `vmap`,
    `jit` and `scan`, and through a while loop, which JAX itself cannot go through in reverse.

    Args:
        function: any traceable function of pytrees. Floats that it closes over are differentiated too.

    Returns:
        A function with the same values.

    >>> def halved(x):
    ...     return jax.lax.while_loop(lambda x: x > 1.0, lambda x: x / 2, x)
    >>> print(jax.grad(by_forward_mode(halved))(6.0))
    0.125
    """

    def wrapped(*args):
        leaves, tree = jax.tree.flatten(args)

        def flat(*leaves):
            return function(*jax.tree.unflatten(tree, leaves))

        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)

        # What the function closes over (an outer level's variable, say) becomes an operand like the rest.
        def of_operands(*operands):
            return eval_jaxpr(closed.jaxpr, operands[len(leaves) :], *operands[: len(leaves)])

        out = _call_p.bind(*leaves, *closed.consts, function=of_operands, levels=0)
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return wrapped


# Two primitives, because a `custom_jvp` has its rule dropped when a loop is differentiated, and JAX offers no
# function-level rule that has a transpose and a JVP and can be batched.
#   _call_p  the function of its operands
#   _push_p  its derivative, a linear map between the active operands and the float outputs:
#            transposed=False   tangents of the active operands ↦ tangents of the outputs
#            transposed=True    a vector over the outputs       ↦ its product with the active columns
# `levels` counts the leading axes that `vmap` has put in front of every argument.
_call_p = Primitive("forward_mode_function")
_push_p = Primitive("forward_mode_derivative")
_call_p.multiple_results = _push_p.multiple_results = True


def _call(*operands, function, levels):
    return list(_mapped(function, levels)(*operands))


def _push(*args, levels, **params):
    return list(_mapped(partial(_push_one, **params), levels)(*args))


def _mapped(function, levels):
    for _ in range(levels):
        function = jax.vmap(function)
    return function


def _push_one(*args, function, active, transposed, num_operands):
    operands, vectors = args[:num_operands], list(args[num_operands:])
    at = tuple(x for x, a in zip(operands, active, strict=True) if a)

    def of_active(*moved):
        rest = iter(moved)
        full = [next(rest) if a else x for x, a in zip(operands, active, strict=True)]
        return [x for x in function(*full) if is_float(x)]

    def push(*tangents):
        return jax.jvp(of_active, at, tangents)[1]

    if not transposed:
        return push(*vectors)
    flat, unravel = ravel_pytree(at)

    def column(i):
        tangents = unravel(jnp.zeros_like(flat).at[i].set(1))
        parts = [jnp.vdot(t, v) for t, v in zip(push(*tangents), vectors, strict=True)]
        return jnp.asarray(sum(parts), flat.dtype)

    return list(unravel(jax.vmap(column)(jnp.arange(flat.size))))


def _call_jvp(primals, tangents, *, function, levels):
    out = _call_p.bind(*primals, function=function, levels=levels)
    zeros = [_no_tangent(o) for o in out]
    row = iter(_tangents(primals, tangents, function, levels))
    return out, [next(row, zero) if is_float(o) else zero for o, zero in zip(out, zeros, strict=True)]


def _push_jvp(primals, tangents, *, levels, **params):
    out = _push_p.bind(*primals, levels=levels, **params)
    row = _tangents(primals, tangents, partial(_push_one, **params), levels)
    return out, row or [_no_tangent(o) for o in out]


def _tangents(primals, tangents, function, levels):
    active = tuple(type(t) is not ad.Zero and is_float(x) for x, t in zip(primals, tangents, strict=True))
    moving = [t for t, a in zip(tangents, active, strict=True) if a]
    if not moving:
        return []
    options = {"function": function, "active": active, "num_operands": len(primals)}
    return _push_p.bind(*primals, *moving, transposed=False, levels=levels, **options)


def _push_transpose(cotangents, *args, num_operands, transposed, **params):
    operands, vectors = args[:num_operands], args[num_operands:]
    # The result needs a full vector on the other side; absent cotangents are zeros.
    full = [ad.instantiate_zeros(c) for c in cotangents]
    out = _push_p.bind(*operands, *full, num_operands=num_operands, transposed=not transposed, **params)
    linear = [o if ad.is_undefined_primal(v) else None for o, v in zip(out, vectors, strict=True)]
    return [None] * num_operands + linear


def _batch(primitive, args, dims, *, levels, **params):
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    args = [
        jnp.broadcast_to(x, (size, *jnp.shape(x))) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args, dims, strict=True)
    ]
    out = primitive.bind(*args, levels=levels + 1, **params)
    return out, [0] * len(out)


def _no_tangent(x):
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def _avals(apply, *avals, **params):
    return jax.make_jaxpr(partial(apply, **params))(*avals).out_avals


for _primitive, _apply, _jvp in ((_call_p, _call, _call_jvp), (_push_p, _push, _push_jvp)):
    _primitive.def_impl(_apply)
    _primitive.def_abstract_eval(partial(_avals, _apply))
    ad.primitive_jvps[_primitive] = _jvp
    batching.primitive_batchers[_primitive] = partial(_batch, _primitive)
    mlir.register_lowering(_primitive, mlir.lower_fun(_apply, multiple_results=True))
ad.primitive_transposes[_push_p] = _push_transpose
