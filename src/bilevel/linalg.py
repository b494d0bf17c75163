"""Gradients of the inner loss, and the two ways to differentiate them.

`reverse_gradient` is plain reverse mode: differentiating it in reverse again keeps every
activation of the inner backward pass. `mixed_gradient` computes the same gradient and carries a
derivative rule that uses the symmetry of the Hessian, so that its vector-Jacobian product is a
forward-mode derivative of a gradient: nothing but the inner parameters is kept.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.core import eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive
from jax.extend.core.primitives import custom_vjp_call_p
from jax.interpreters import ad, batching, mlir

from bilevel.problem import Loss


def reverse_gradient(loss: Loss) -> Callable:
    """Value and gradient of `loss` in its first argument; differentiated reverse over reverse.

    Args:
        loss: `loss(params, *rest) -> scalar`.

    Returns:
        A function `(params, *rest) -> (value, gradient)`. The value is there to be watched and
        is not differentiated.

    >>> value, gradient = reverse_gradient(lambda params, meta: meta * params**2)(3.0, 2.0)
    >>> print(value, gradient)
    18.0 12.0
    """

    def value_and_gradient(params, *rest):
        value, gradient = jax.value_and_grad(loss)(params, *rest)
        return jax.lax.stop_gradient(value), gradient

    return value_and_gradient


def mixed_gradient(loss: Loss) -> Callable:
    """Value and gradient of `loss` in its first argument; differentiated forward over reverse.

    With G(φ, θ) = ∇φ g, for any tangent and cotangent

        JVP:  (dφ, dθ) ↦ ∂ε G(φ + ε dφ, θ + ε dθ)
        VJP:  v ↦ ∂ε ∇₍φ,θ₎ g(φ + ε v, θ)

    The second line holds because second derivatives commute. The rule is a linear map with its
    transpose, so forward mode, `vmap` and further levels of differentiation work on it too.

    Args:
        loss: `loss(params, *rest) -> scalar`. Every float it reads, in `rest` or from its closure,
            is differentiated.

    Returns:
        A function `(params, *rest) -> (value, gradient)`. The value is not differentiated.

    Raises:
        TypeError: if `loss` holds a `jax.custom_vjp`. Its reverse rule may be anything (clipping or
            reversal of a gradient), and where it is not the true derivative second derivatives do not
            commute: the transpose above would be silently wrong. A `jax.custom_jvp` is trusted.

    Reference: Kemaev et al., MixFlow-MG, 2025.

    >>> gradient = lambda params, meta: mixed_gradient(lambda p, m: m * p**2)(params, meta)[1]
    >>> print(jax.grad(gradient, argnums=(0, 1))(3.0, 2.0))
    (Array(4., dtype=float32, weak_type=True), Array(6., dtype=float32, weak_type=True))
    """

    def value_and_gradient(params, *rest):
        leaves, tree = jax.tree.flatten((params, *rest))
        params_tree = jax.tree.structure(params)

        def flat_loss(*leaves):
            return loss(*jax.tree.unflatten(tree, leaves))

        closed = jax.make_jaxpr(flat_loss)(*leaves)
        if _has_custom_vjp(closed.jaxpr):
            raise TypeError(
                "the inner loss holds a jax.custom_vjp, whose rule need not be the derivative of a function, "
                "as products with its Hessian assume (Mixed, Implicit, Soba, ...); use bl.hypergrad.Unroll()"
            )

        # What the loss closes over (an outer level's variable, say) becomes an operand like the rest.
        def of_operands(*operands):
            arguments, consts = operands[: len(leaves)], operands[len(leaves) :]
            return eval_jaxpr(closed.jaxpr, consts, *arguments)

        flat = _FlatLoss(of_operands, params_tree.num_leaves)
        value, *gradient = _gradient(flat, *leaves, *closed.consts)
        return jax.lax.stop_gradient(value), jax.tree.unflatten(params_tree, gradient)

    return value_and_gradient


def _has_custom_vjp(param) -> bool:
    if isinstance(param, ClosedJaxpr | Jaxpr):
        return any(
            eqn.primitive is custom_vjp_call_p or any(map(_has_custom_vjp, eqn.params.values()))
            for eqn in param.eqns
        )
    return isinstance(param, tuple) and any(map(_has_custom_vjp, param))


class _FlatLoss:
    """A scalar function of arrays, of which the first `num_params` are the parameters."""

    def __init__(self, function: Callable, num_params: int):
        self.function, self.num_params = function, num_params

    def __call__(self, *operands):
        (value,) = self.function(*operands)
        return value


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _gradient(loss, *operands):
    value, gradient = jax.value_and_grad(loss, argnums=tuple(range(loss.num_params)))(*operands)
    return value, *gradient


def _gradient_jvp(loss, operands, tangents):
    active = tuple(not isinstance(t, jax.custom_derivatives.SymbolicZero) for t in tangents)
    out = _gradient(loss, *operands)
    moving = [t for t, a in zip(tangents, active, strict=True) if a]
    if not moving:
        return out, tuple(jnp.zeros_like(o) for o in out)
    row = hessian_p.bind(
        *operands, *moving, loss=loss, active=active, transposed=False, num_operands=len(operands)
    )
    return out, (jnp.zeros_like(out[0]), *row)


_gradient.defjvp(_gradient_jvp, symbolic_zeros=True)


# The Hessian of the inner loss as a linear map between two groups of its operands, the active ones
# (whatever moves: parameters, meta, data) and the parameters:
#   transposed=False   tangents of the active operands ↦ tangent of ∇φ g
#   transposed=True    a vector over the parameters    ↦ its product with the active rows
# The two are each other's transpose. It is a primitive because JAX offers no function-level rule that
# has a transpose and a JVP and can be batched.
hessian_p = Primitive("inner_hessian")
hessian_p.multiple_results = True


def _apply(*args, loss, active, transposed, num_operands):
    operands, vectors = args[:num_operands], args[num_operands:]
    moving = tuple(range(loss.num_params)) if transposed else _positions(active)
    wanted = _positions(active) if transposed else tuple(range(loss.num_params))

    def gradient(*moved):
        full = list(operands)
        for position, value in zip(moving, moved, strict=True):
            full[position] = value
        return jax.grad(loss, argnums=wanted)(*full)

    return list(jax.jvp(gradient, tuple(operands[i] for i in moving), tuple(vectors))[1])


def _positions(mask):
    return tuple(i for i, m in enumerate(mask) if m)


def _jvp(primals, tangents, **params):
    n = params["num_operands"]
    out = hessian_p.bind(*primals, **params)
    total = [jnp.zeros_like(o) for o in out]
    if any(type(t) is not ad.Zero for t in tangents[n:]):  # linear part
        vectors = [ad.instantiate_zeros(t) for t in tangents[n:]]
        total = hessian_p.bind(*primals[:n], *vectors, **params)
    moving = [i for i in range(n) if type(tangents[i]) is not ad.Zero]
    if moving:  # third derivatives: a further level differentiates the Hessian itself

        def of_operands(*moved):
            full = list(primals)
            for i, value in zip(moving, moved, strict=True):
                full[i] = value
            return _apply(*full, **params)

        curved = jax.jvp(of_operands, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))[
            1
        ]
        total = [a + b for a, b in zip(total, curved, strict=True)]
    return out, total


def _transpose(cotangents, *args, loss, active, transposed, num_operands):
    operands, vectors = args[:num_operands], args[num_operands:]
    moving = tuple(range(loss.num_params)) if transposed else _positions(active)
    wanted = _positions(active) if transposed else tuple(range(loss.num_params))
    # The result needs a full vector on the other side; absent cotangents are zeros.
    cotangents = [
        jnp.zeros_like(operands[i]) if type(c) is ad.Zero else c
        for i, c in zip(wanted, cotangents, strict=True)
    ]
    out = hessian_p.bind(
        *operands,
        *cotangents,
        loss=loss,
        active=active,
        transposed=not transposed,
        num_operands=num_operands,
    )
    assert len(out) == len(moving)
    linear = [o if ad.is_undefined_primal(v) else None for o, v in zip(out, vectors, strict=True)]
    return [None] * num_operands + linear


def _batch(args, dims, *, loss, num_operands, **params):
    size = next(jnp.shape(a)[d] for a, d in zip(args, dims, strict=True) if d is not None)
    # The sum of independent losses has the block-diagonal Hessian that a batch of products needs.
    args = [
        jnp.broadcast_to(a, (size, *jnp.shape(a))) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args, dims, strict=True)
    ]
    summed = _FlatLoss(lambda *operands: [jnp.sum(jax.vmap(loss)(*operands))], loss.num_params)
    out = hessian_p.bind(*args, loss=summed, num_operands=num_operands, **params)
    return out, [0] * len(out)


def _abstract(*avals, loss, active, transposed, num_operands):
    wanted = _positions(active) if transposed else range(loss.num_params)
    return [avals[i] for i in wanted]


hessian_p.def_impl(_apply)
hessian_p.def_abstract_eval(_abstract)
ad.primitive_jvps[hessian_p] = _jvp
ad.primitive_transposes[hessian_p] = _transpose
batching.primitive_batchers[hessian_p] = _batch
mlir.register_lowering(hessian_p, mlir.lower_fun(_apply, multiple_results=True))
