"""Matrix product of a dense layer, with derivatives that are as fast as the product itself.

The gradient of a weight, xᵀ ȳ, contracts over rows, and XLA's CPU backend takes almost three times as long
for that as for any other layout. Inside a meta-learning step most products are such gradients, of the
first or the second order, and a batch of per-task weights keeps them small. So the product is a
primitive that knows its derivatives as products of the same kind, and says how each is laid out.
"""

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def dense(x: jax.Array, w: jax.Array) -> jax.Array:
    """The product of a layer's inputs and its weights, as `x @ w`.

        y = x w,   x̄ = ȳ wᵀ,   w̄ = xᵀ ȳ

    Differentiable to any order, forward and reverse; batches.

    Args:
        x: `[..., fan_in]`.
        w: `[fan_in, fan_out]`.

    Returns:
        `[..., fan_out]`.

    Raises:
        TypeError: when the shapes do not fit.

    >>> dense(jnp.ones((10, 3)), jnp.ones((3, 2))).shape
    (10, 2)
    """
    if jnp.ndim(x) < 1 or jnp.ndim(w) != 2 or jnp.shape(x)[-1] != jnp.shape(w)[0]:
        raise TypeError(
            f"dense needs x of shape [..., {(jnp.shape(w) or ('fan_in',))[0]}] and w of shape "
            f"[fan_in, fan_out], got {jnp.shape(x)} and {jnp.shape(w)}"
        )
    dtype = jnp.result_type(x, w)
    rows = jnp.asarray(x, dtype).reshape(-1, w.shape[0])
    y = _product_p.bind(rows, jnp.asarray(w, dtype), flip_a=False, flip_b=False)
    return y.reshape(*x.shape[:-1], w.shape[1])


# op(a) op(b) with op the transpose where flipped; leading axes, the same in both, are a batch.
_product_p = Primitive("dense_product")


def _product(a, b, flip_a, flip_b):
    return _product_p.bind(a, b, flip_a=flip_a, flip_b=flip_b)


def _apply(a, b, *, flip_a, flip_b):
    return jnp.matmul(a.mT if flip_a else a, b.mT if flip_b else b)


def _apply_on_cpu(a, b, *, flip_a, flip_b):
    # The barrier keeps XLA from folding the transpose back into the product.
    return jnp.matmul(jax.lax.optimization_barrier(a.mT) if flip_a else a, b.mT if flip_b else b)


def _abstract(a, b, *, flip_a, flip_b):
    rows, columns = a.shape[-1 if flip_a else -2], b.shape[-2 if flip_b else -1]
    return ShapedArray((*a.shape[:-2], rows, columns), a.dtype)


def _transpose_a(cotangent, a, b, *, flip_a, flip_b):
    if flip_a:
        return _product(b, cotangent, flip_b, True)
    return _product(cotangent, b, False, not flip_b)


def _transpose_b(cotangent, a, b, *, flip_a, flip_b):
    if flip_b:
        return _product(cotangent, a, True, flip_a)
    return _product(a, cotangent, not flip_a, False)


def _batch(args, dims, *, flip_a, flip_b):
    a, b = args
    size = next(x.shape[d] for x, d in zip(args, dims, strict=True) if d is not None)
    if dims[1] is None and b.ndim == 2 and not flip_a:  # shared weights: one tall product
        a = jnp.moveaxis(a, dims[0], 0)
        y = _product(a.reshape(-1, a.shape[-1]), b, flip_a, flip_b)
        return y.reshape(*a.shape[:-1], -1), 0
    a, b = (
        jnp.broadcast_to(x, (size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(args, dims, strict=True)
    )
    return _product(a, b, flip_a, flip_b), 0


_product_p.def_impl(_apply)
_product_p.def_abstract_eval(_abstract)
ad.defbilinear(_product_p, _transpose_a, _transpose_b)
batching.primitive_batchers[_product_p] = _batch
mlir.register_lowering(_product_p, mlir.lower_fun(_apply, multiple_results=False))
mlir.register_lowering(_product_p, mlir.lower_fun(_apply_on_cpu, multiple_results=False), platform="cpu")
