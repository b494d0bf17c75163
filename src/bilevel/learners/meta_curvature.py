"""Meta-Curvature: inner gradients are transformed by learned matrices before each step."""

from collections.abc import Callable
from math import prod

import jax
import jax.numpy as jnp
import optax

from bilevel.hypergrad import Mixed
from bilevel.inner import Gradient
from bilevel.learners.supervised import supervised
from bilevel.nets import Net
from bilevel.problem import Estimator, Learner, Meta, Params

Modes = Callable[[tuple[str, ...], tuple[int, ...]], tuple[int, ...]]


def leaf_modes(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Each axis of a leaf is one mode: a weight `[in, out]` has two matrices, a bias one."""
    return shape


def conv_modes(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """As the paper: a 3x3 convolution of `nets.conv4`, `[out, 9 in]`, has the modes out, 9 and in.

    >>> conv_modes(("block_1", "w"), (64, 576)), conv_modes(("head", "w"), (64, 5))
    ((64, 9, 64), (64, 5))
    """
    if path[0].startswith("block") and len(shape) == 2 and shape[1] % 9 == 0:
        return (shape[0], 9, shape[1] // 9)
    return shape


def meta_curvature(
    net: Net,
    loss: Callable,
    *,
    num_steps: int = 5,
    rate: float = 0.01,
    modes: Modes = leaf_modes,
    estimator: Estimator | None = None,
) -> Learner:
    """MAML whose inner gradients are transformed, mode by mode, by learned matrices.

        φₖ₊₁ = φₖ − α MC(∇loss(φₖ, support)),   MC(G) = G ×₁ M₁ ×₂ M₂ ...   for each leaf, Mᵢ = I at the start

    For a weight `[in, out]` that is M₁ G M₂ᵀ: the curvature of a Kronecker product, learned so that the steps
    generalize, and not estimated from the loss. Meta-SGD is the diagonal case.

    Args:
        net: an init/apply pair.
        loss: `loss(outputs, targets) -> scalar` or `-> (scalar, {metric: scalar})`; batches are `(x, y)`.
        num_steps: K, inner steps in training.
        rate: α.
        modes: `modes(path, shape) -> shape`, how a leaf is seen: one matrix for each axis of the shape it
            returns. `conv_modes` splits the convolutions of `conv4` as the paper does; with `leaf_modes`
            their inputs and taps share one large matrix.
        estimator: `Mixed()` by default. `FirstOrder()` cannot learn the matrices, and says so.

    Returns:
        A `Learner` whose meta is `{"init": params, "curvature": a list of matrices for each leaf}`.

    Raises:
        ValueError: at `init_meta`, when `modes` returns a shape of another size.

    Cost: that of the estimator, and a small product for each mode of each leaf a step; Σ nᵢ² more elements in
    meta. Exact with `Mixed()`.

    Reference: Park, Oliva, Meta-Curvature, 2019.

    >>> import bilevel as bl
    >>> learner = meta_curvature(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error)
    >>> meta = learner.init_meta(jax.random.key(0))
    >>> [m.shape for m in meta["curvature"]["hidden_0"]["w"]]
    [(1, 1), (8, 8)]
    """

    def init_meta(key):
        init = net.init(key)
        return {"init": init, "curvature": identity_curvature(init, modes)}

    problem, predict = supervised(
        net, loss, lambda meta, key: meta["init"], lambda params, meta, x: (params, x)
    )

    def optimizer(meta: Meta) -> optax.GradientTransformation:
        return optax.chain(scale_by_curvature(meta["curvature"]), optax.sgd(rate))

    return Learner(problem, Gradient(optimizer, num_steps), estimator or Mixed(), init_meta, predict)


def identity_curvature(params: Params, modes: Modes = leaf_modes) -> Params:
    """For each leaf a list of identity matrices, one for each mode."""

    def matrices(path, leaf):
        names = tuple(str(getattr(entry, "key", getattr(entry, "idx", entry))) for entry in path)
        shape = tuple(modes(names, leaf.shape))
        if prod(shape) != leaf.size:
            raise ValueError(
                f"meta_curvature's modes must keep the size of a leaf, got {shape} for {'.'.join(names)}, "
                f"whose shape is {leaf.shape}"
            )
        return [jnp.eye(n, dtype=leaf.dtype) for n in shape]

    return jax.tree_util.tree_map_with_path(matrices, params)


def scale_by_curvature(curvature: Params) -> optax.GradientTransformation:
    """G ×₁ M₁ ×₂ M₂ ... for each leaf of the updates: an optax transformation, stateless.

    Args:
        curvature: for each leaf a list of matrices; their widths are the shape that the leaf is seen in.

    >>> swap = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    >>> transformation = scale_by_curvature([[swap]])
    >>> print(transformation.update([jnp.array([1.0, 2.0])], ())[0][0])
    [2. 1.]
    """

    def product(gradient, matrices):
        result = gradient.reshape([len(m) for m in matrices])
        for axis, matrix in enumerate(matrices):
            result = jnp.moveaxis(jnp.tensordot(matrix, result, axes=(1, axis)), 0, axis)
        return result.reshape(gradient.shape)

    def update(updates, state, params=None):
        return jax.tree.map(product, updates, curvature), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
