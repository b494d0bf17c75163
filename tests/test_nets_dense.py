"""The dense layer's product equals `@` in value and in every derivative, batched in every way."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.nets.dense import dense
from bilevel.testing import assert_trees_close

RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(5, 3)), RNG.normal(size=(3, 4))
DX, DW = RNG.normal(size=(5, 3)), RNG.normal(size=(3, 4))


def energy(product):
    """A scalar whose derivatives reach every rule of the product."""
    return lambda x, w: jnp.sum(jnp.sin(product(jnp.tanh(product(x, w)), w.T)))


def derivatives(product):
    f = energy(product)
    gradient = jax.grad(f, argnums=(0, 1))
    along = lambda f: lambda x, w: jax.jvp(f, (x, w), (DX, DW))[1]  # noqa: E731
    slope = lambda x, w: sum(jnp.vdot(a, b) for a, b in zip(gradient(x, w), (DX, DW)))  # noqa: E731
    return {
        "value": f,
        "reverse": gradient,
        "forward": along(f),
        "forward over reverse": along(gradient),
        "reverse over reverse": jax.grad(slope, argnums=(0, 1)),
        "reverse over forward": jax.grad(along(f), argnums=(0, 1)),
        "third": jax.grad(along(slope), argnums=(0, 1)),
    }


@pytest.mark.parametrize("compile", [jax.jit, lambda f: f])
@pytest.mark.parametrize("name", list(derivatives(dense)))
def test_derivatives(x64, name, compile):
    got, expected = compile(derivatives(dense)[name])(X, W), jax.jit(derivatives(jnp.matmul)[name])(X, W)
    assert_trees_close(name, got, expected, 1e-12)


@pytest.mark.parametrize("axes", [(0, 0), (0, None), (None, 0), (1, 2), (2, None), (None, 1)])
def test_batches(x64, axes):
    x = X if axes[0] is None else jnp.stack([X, X + 1], axes[0])
    w = W if axes[1] is None else jnp.stack([W, W - 1], axes[1])

    def batched(product):
        names = ("value", "reverse", "forward over reverse", "third")
        return jax.jit(jax.vmap(lambda x, w: {n: derivatives(product)[n](x, w) for n in names}, axes))(x, w)

    assert_trees_close("batched", batched(dense), batched(jnp.matmul), 1e-12)


def test_batches_of_batches(x64):
    xs, ws = jnp.stack([X, X + 1]), jnp.stack([W, W - 1, 2 * W])
    for outer, inner in itertools.product([(None, 0), (0, None)], repeat=2):
        if outer == inner:
            continue
        got, expected = (
            jax.jit(jax.vmap(jax.vmap(jax.grad(energy(p), argnums=(0, 1)), inner), outer))(xs, ws)
            for p in (dense, jnp.matmul)
        )
        assert_trees_close(f"{outer} {inner}", got, expected, 1e-12)


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3), (0, 3)])
def test_shapes_and_dtypes(shape):
    x = jnp.ones(shape, jnp.bfloat16)
    assert dense(x, W.astype(np.float32)).shape == (*shape[:-1], 4)
    assert dense(x, W.astype(np.float32)).dtype == jnp.float32
    assert dense(x, jnp.ones((3, 4), jnp.bfloat16)).dtype == jnp.bfloat16


def test_shapes_that_do_not_fit():
    with pytest.raises(TypeError, match=r"x of shape \[\.\.\., 3\].*got \(5, 2\) and \(3, 4\)"):
        dense(X[:, :2], W)
