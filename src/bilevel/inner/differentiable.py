"""Make any optimizer step safe to differentiate, without changing its value.

An adaptive optimizer divides by the square root of a second moment. Where a gradient is exactly zero
(a dead ReLU, an unused row of an embedding, a whole leaf under `clip_by_global_norm`) the derivative
of that root is infinite, and infinity times the zero that multiplies it is NaN: the step is fine, its
derivative poisons the whole hypergradient.

The cure is the same for every optimizer, so it is applied to the traced step rather than to optimizers
one by one: each operation whose derivative can be infinite at a finite value gets the derivative 0
there. Everywhere else value and derivative are those of the original.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Primitive
from jax.extend.core import primitives as p
from jax.interpreters import ad, batching, mlir

# Elementwise operations with a singular derivative. They are all an optimizer can trip on: norms,
# moments, bias corrections and trust ratios are sums and products of these.
_SINGULAR = {
    p.sqrt_p, p.rsqrt_p, p.cbrt_p, p.div_p, p.pow_p, p.integer_pow_p, p.log_p, p.log1p_p,
    p.acos_p, p.asin_p, p.acosh_p, p.atanh_p, p.atan2_p, p.erf_inv_p,
}  # fmt: skip
# A value that is NaN in a branch that `where` did not select (the root of a negative number in the first
# steps of radam) reaches the derivative through the products it is a factor of.
_GUARDED = _SINGULAR | {p.mul_p}
# A rule that its author wrote by hand is left as it is.
_OWN_RULE = {p.custom_jvp_call_p, p.custom_vjp_call_p}


def differentiable(function: Callable) -> Callable:
    """The same function, with derivative 0 where an operation in it has an infinite one.

        d op(x)/dx := 0  where it is not finite,   op in {√, 1/√, /, pow, log, ...}

    Args:
        function: any traceable function of pytrees, for instance the `update` of an optax optimizer.

    Returns:
        A function with the same values, bit for bit where both are compiled.

    Cost: none in value; two comparisons and selects per singular operation in the derivative.

    >>> root_of_square = differentiable(lambda x: jnp.sqrt(x**2))
    >>> print(root_of_square(0.0), jax.grad(root_of_square)(0.0), jax.grad(root_of_square)(2.0))
    0.0 0.0 1.0
    """

    def safe(*args):
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        if not _has_singular(closed):  # plain gradient descent, with or without momentum
            return function(*args)
        out = _evaluate(closed, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), out)

    return safe


def _has_singular(param) -> bool:
    if isinstance(param, ClosedJaxpr | Jaxpr):
        return any(
            eqn.primitive in _SINGULAR or any(map(_has_singular, eqn.params.values())) for eqn in param.eqns
        )
    return isinstance(param, tuple) and any(map(_has_singular, param))


def _evaluate(closed: ClosedJaxpr, *args):
    """Run a traced function, operation by operation, with safe derivatives."""
    jaxpr = closed.jaxpr
    values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(v):
        return v.val if isinstance(v, Literal) else values[v]

    for eqn in jaxpr.eqns:
        inputs = [read(v) for v in eqn.invars]
        if eqn.primitive is p.jit_p:
            out = _evaluate(eqn.params["jaxpr"], *inputs)
        elif eqn.primitive is p.remat_p:
            body = eqn.params["jaxpr"]
            body = body if hasattr(body, "consts") else ClosedJaxpr(body, ())  # closed since jax 0.12
            options = {name: eqn.params[name] for name in ("prevent_cse", "policy")}
            out = jax.checkpoint(partial(_evaluate, body), **options)(*inputs)
        elif eqn.primitive in _GUARDED and _is_float(eqn.outvars[0].aval):
            out = [_safe_p.bind(*inputs, operation=eqn.primitive, **eqn.params)]
        else:
            params = eqn.params
            if eqn.primitive not in _OWN_RULE:
                params = {name: _rewrite(value) for name, value in params.items()}
            out = eqn.primitive.bind(*inputs, **eqn.primitive.get_bind_params(params))
            out = out if eqn.primitive.multiple_results else [out]
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _rewrite(param):
    """The bodies of loops and the branches of conditionals are rewritten too."""
    if isinstance(param, ClosedJaxpr):
        return jax.make_jaxpr(lambda *args: _evaluate(param, *args))(*param.in_avals)
    if isinstance(param, tuple):
        rewritten = [_rewrite(item) for item in param]
        return type(param)(*rewritten) if hasattr(param, "_fields") else tuple(rewritten)
    return param


# One elementwise operation with the safe derivative. It is a primitive because the rule of a `custom_jvp`
# is dropped when a loop is differentiated, and then the second derivative would be poisoned after all.
_safe_p = Primitive("finite_derivative")


def _apply(*xs, operation, **params):
    return operation.bind(*xs, **params)


def _jvp(xs, tangents, **params):
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero and _is_float(xs[i])]
    out = _safe_p.bind(*xs, **params)
    total = jnp.zeros_like(out)
    for i in moving:
        total = total + _partial(partial(_apply, **params), xs, i) * tangents[i]
    return out, total


def _batch(xs, dims, **params):
    size = next(x.shape[d] for x, d in zip(xs, dims, strict=True) if d is not None)
    # A scalar may stand beside an array, batched or not: all are aligned by the shape of one row.
    shapes = [
        jnp.shape(x) if d is None else x.shape[:d] + x.shape[d + 1 :] for x, d in zip(xs, dims, strict=True)
    ]
    row = max(shapes, key=len)

    def whole(x, d, shape):
        if d is None and not shape:
            return x  # a literal stays a scalar
        if d is not None:
            x = jnp.moveaxis(x, d, 0).reshape(size, *(shape or (1,) * len(row)))
        return jnp.broadcast_to(x, (size, *row))

    xs = [whole(x, d, shape) for x, d, shape in zip(xs, dims, shapes, strict=True)]
    return _safe_p.bind(*xs, **params), 0


_safe_p.def_impl(_apply)
_safe_p.def_abstract_eval(lambda *avals, operation, **params: operation.abstract_eval(*avals, **params)[0])
ad.primitive_jvps[_safe_p] = _jvp
batching.primitive_batchers[_safe_p] = _batch
mlir.register_lowering(_safe_p, mlir.lower_fun(_apply, multiple_results=False))


def _partial(raw, xs, i):
    """∂raw/∂xs[i], 0 where it is not finite, and differentiable again."""

    def slope(*xs):
        def in_one(x):
            return raw(*xs[:i], x, *xs[i + 1 :])

        return jax.jvp(in_one, (xs[i],), (jnp.ones_like(xs[i]),))[1]

    finite = jnp.isfinite(slope(*map(jax.lax.stop_gradient, xs)))
    # The inputs are replaced before, not only the result after: or the next derivative is NaN again.
    ones = [jnp.where(finite, x, jnp.ones_like(x)) if _is_float(x) else x for x in xs]
    return jnp.where(finite, slope(*ones), 0)


def _is_float(x) -> bool:
    return jnp.issubdtype(x.dtype if hasattr(x, "dtype") else jnp.result_type(x), jnp.inexact)
