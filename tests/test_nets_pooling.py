"""Pooling, normalization and dropout: against XLA's convolution, its windows and textbook statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.nets.conv4 import _pooled_block, _strided_block, conv4
from bilevel.nets.convolution import largest_of_quarters, max_pool, quarter_patches
from bilevel.nets.mlp import mlp
from bilevel.nets.net import Net
from bilevel.nets.noise import drop_block, dropout
from bilevel.nets.norms import GroupNorm, SupportNorm, as_norm
from bilevel.testing import assert_close, assert_derivative, assert_trees_close

KEY = jax.random.key(0)
NUM_SUPPORT = 2


def window_max(x):
    """XLA's own pooling."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def standardized(y, seen, axes):
    return (y - seen.mean(axes, keepdims=True)) / jnp.sqrt(seen.var(axes, keepdims=True) + 1e-5)


def textbook_norm(norm, y):
    """`y [n, h, w, c]`, without scale and bias."""
    if norm == "batch":
        return standardized(y, y, (0, 1, 2))
    if norm == "support":
        return standardized(y, y[:NUM_SUPPORT], (0, 1, 2))
    if norm == "layer":
        return standardized(y, y, (1, 2, 3))
    if norm == "group":
        groups = jnp.split(y, 2, axis=-1)
        return jnp.concatenate([standardized(g, g, (1, 2, 3)) for g in groups], -1)
    return y


def reference_block(block, x, downsample, norm):
    stride = 2 if downsample == "stride" else 1
    filters, channels = block["w"].shape[0], x.shape[-1]
    kernel = block["w"].reshape(filters, 3, 3, channels).transpose(1, 2, 3, 0)
    x = jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = jnp.maximum(textbook_norm(norm, x) * block["scale"] + block["bias"], 0)
    return window_max(x) if downsample == "pool" else x


def reference(params, x, downsample, norm):
    for i in range(4):
        x = reference_block(params[f"block_{i}"], x, downsample, norm)
    x = x.mean((1, 2)) if downsample == "stride" else x.reshape(len(x), -1)
    return x @ params["head"]["w"] + params["head"]["b"] if "head" in params else x


def moved_params(net):
    """Away from scale 1 and bias 0, where faults could hide."""
    params = net.init(KEY)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.3 * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(tree, [jnp.asarray(leaf + n, float) for leaf, n in zip(leaves, noise)])


def derivatives(apply, params, x):
    """Outputs, and gradients in both along a product with the Hessian."""
    vector = jax.tree.map(jnp.cos, params)

    def loss(params, x):
        return jnp.sum(jnp.sin(apply(params, x)))

    gradient = jax.grad(loss, argnums=(0, 1))
    return apply(params, x), jax.jvp(lambda params: gradient(params, x), (params,), (vector,))


def as_option(norm):
    return as_norm({"support": SupportNorm(NUM_SUPPORT), "group": GroupNorm(2)}.get(norm, norm), "conv4")


# An odd size drops a row that the statistics have seen; 2 channels are the wider side of 4 filters, 1 not.
@pytest.mark.parametrize(
    ("downsample", "norm", "shape"),
    [
        ("pool", "batch", (4, 6, 2)),
        ("pool", "batch", (5, 4, 1)),
        ("pool", "support", (4, 4, 1)),
        ("pool", "group", (5, 4, 1)),
        ("stride", "support", (5, 4, 2)),
        ("stride", "layer", (4, 4, 1)),
    ],
)
def test_block_and_its_derivatives(x64, downsample, norm, shape):
    block = {"pool": _pooled_block, "stride": _strided_block}[downsample]
    keys = jax.random.split(KEY, 4)
    params = {
        "w": jax.random.normal(keys[0], (4 if shape[-1] == 2 else 12, 9 * shape[-1])),
        "scale": 1 + 0.3 * jax.random.normal(keys[1], (4 if shape[-1] == 2 else 12,)),
        "bias": 0.3 * jax.random.normal(keys[2], (4 if shape[-1] == 2 else 12,)),
    }
    x = jax.random.normal(keys[3], (3, *shape))

    @jax.jit
    def both(params, x):
        ours = lambda p, x: block(x, p, as_option(norm), "float32")  # noqa: E731
        plain = lambda p, x: reference_block(p, x, downsample, norm)  # noqa: E731
        return derivatives(ours, params, x), derivatives(plain, params, x)

    got, expected = both(params, x)
    assert_trees_close("outputs, gradient, Hessian-vector product", got, expected, 1e-8)


@pytest.mark.parametrize(
    ("downsample", "norm", "image_shape", "ways"),
    [
        ("pool", "batch", (19, 16, 2), None),  # 19 -> 9 -> 4 -> 2 -> 1
        ("pool", "group", (16, 33, 1), 3),
        ("stride", "none", (7, 5, 2), 2),
    ],
)
def test_conv4_is_its_blocks(x64, downsample, norm, image_shape, ways):
    net = conv4(ways, 4, image_shape=image_shape, downsample=downsample, norm=as_option(norm))
    params, x = moved_params(net), jax.random.normal(jax.random.key(2), (3, *image_shape))
    assert ("head" in params) == (ways is not None)
    assert net.transductive == (norm == "batch") and net.noisy is None
    got = jax.jit(net.apply)(params, x)
    assert_close("outputs", got, jax.jit(lambda p, x: reference(p, x, downsample, norm))(params, x), 1e-9)


def test_pooling_places_and_ties(x64):
    y = jax.random.normal(KEY, (2, 6, 8, 3))
    assert_close("even", max_pool(y), window_max(y), 0)
    assert_close("odd", max_pool(y[:, :5, :7]), window_max(y[:, :5, :7]), 0)
    centre = quarter_patches(y)[..., 4 * 3 : 5 * 3]  # the middle of a neighbourhood is the pixel itself
    assert_close("quarters", largest_of_quarters(centre), window_max(y), 0)
    # Of equal values exactly one gets the slope.
    slope = jax.grad(lambda y: max_pool(y).sum())(jnp.ones((1, 4, 4, 1)))
    assert slope.sum() == 4 and set(np.unique(slope)) == {0.0, 1.0}


def test_compiled_slope_of_pooling_is_the_difference_quotient(x64):
    """A maximum that compares rounded copies of itself fails here."""
    net = conv4(3, 4, image_shape=(16, 16, 1), downsample="pool")
    params, x = moved_params(net), jax.random.normal(KEY, (2, 16, 16, 1))
    run = jax.jit(jax.value_and_grad(lambda params, x: jnp.mean(net.apply(params, x) ** 2)))
    assert_derivative(lambda params: run(params, x)[0], run(params, x)[1], params)


def test_which_norms_let_queries_see_one_another():
    y, scale, bias = jax.random.normal(KEY, (1, 6, 4, 4)), jnp.ones(4), jnp.zeros(4)
    for norm in ("batch", SupportNorm(2), "group", "layer", "none"):
        norm = as_norm(norm, "conv4")
        together, alone = norm(y, scale, bias)[:, 2], norm(y[:, :3], scale, bias)[:, 2]
        assert bool(jnp.allclose(together, alone, atol=1e-5)) == (not norm.transductive), norm


def test_embedding_width():
    x = jnp.ones((2, 28, 28, 1))
    for downsample, shape, width in (("stride", (28, 28, 1), 16), ("pool", (28, 28, 1), 4)):
        net = conv4(None, 4, image_shape=shape, downsample=downsample)
        assert jax.eval_shape(lambda x, net=net: net.apply(net.init(KEY), x), x).shape == (2, width)
    wide = conv4(3, 4, image_shape=(84, 84, 3), downsample="pool")
    assert jax.eval_shape(wide.init, KEY)["head"]["w"].shape == (5 * 5 * 4, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"downsample": "max"}, "downsample must be stride or pool, got 'max'"),
        ({"downsample": "pool", "image_shape": (15, 28, 1)}, "at least 16x16.*downsample='stride'"),
        ({"norm": "instance"}, "norm must be one of batch, group, layer, none, got 'instance'"),
        ({"norm": GroupNorm(3)}, r"GroupNorm\(3\) does not divide 64 channels"),
        ({"dropout": 1.0}, "conv4.dropout must be at least 0 and below 1"),
        ({"dropout": -0.1}, "conv4.dropout must be at least 0 and below 1"),
    ],
)
def test_conv4_refuses_other_options(options, message):
    with pytest.raises(ValueError, match=message):
        conv4(5, **options)


def test_norms_refuse_what_they_cannot_do():
    with pytest.raises(TypeError, match="or a norm such as"):
        as_norm(3, "conv4")
    with pytest.raises(TypeError, match=r"whole number, got 2\.5"):
        SupportNorm(2.5)
    net = conv4(2, 4, image_shape=(8, 8, 1), norm=SupportNorm(5))
    with pytest.raises(ValueError, match=r"batch of 3 examples.*with_support"):
        net.apply(net.init(KEY), jnp.ones((3, 8, 8, 1)))


def test_dropout_of_the_features():
    net = conv4(2, 16, image_shape=(8, 8, 1), dropout=0.5)
    assert isinstance(net, Net) and net.noisy is not None
    params, x = net.init(KEY), jax.random.normal(KEY, (4, 8, 8, 1))
    clean = jax.jit(net.apply)(params, x)
    draws = jax.jit(jax.vmap(net.noisy, (None, None, 0)))(params, x, jax.random.split(KEY, 1000))
    assert_close("mean over the noise", draws.mean(0), clean, 0.2)
    assert float(draws.std(0).min()) > 0


def test_dropout_of_hidden_layers():
    net = mlp([2, 5, 4, 3], jnp.tanh, dropout=0.4)
    assert net.noisy is not None and mlp([2, 3]).noisy is None
    params, x = moved_params(net), jax.random.normal(KEY, (7, 2))
    y = x
    for i, name in enumerate(("hidden_0", "hidden_1")):
        y = dropout(jnp.tanh(y @ params[name]["w"] + params[name]["b"]), 0.4, jax.random.fold_in(KEY, i))
    y = y @ params["head"]["w"] + params["head"]["b"]
    assert_close("noisy", net.noisy(params, x, KEY), y, 1e-5)
    assert_close("clean", net.apply(params, x), mlp([2, 5, 4, 3], jnp.tanh).apply(params, x), 0)
    with pytest.raises(ValueError, match=r"mlp\.dropout must be at least 0 and below 1"):
        mlp([2, 3, 1], dropout=1)


def test_dropout_keeps_the_mean():
    x = jax.random.normal(KEY, (200, 200))
    dropped = dropout(x, 0.3, KEY)
    assert abs(float((dropped == 0).mean()) - 0.3) < 0.01
    kept = dropped != 0
    assert_close("kept", dropped[kept], x[kept] / 0.7, 1e-6)


def test_drop_block_drops_squares():
    x = jnp.ones((64, 10, 10, 8))
    dropped = drop_block(x, 0.1, 3, KEY)
    share = float((dropped == 0).mean())
    assert 0.07 < share < 0.11  # overlapping squares make it a little less than the rate
    assert_close("sum", dropped.sum(), x.sum(), 1e-5)
    # Every dropped pixel lies in a dropped square of 3 x 3.
    gone = np.asarray(dropped[0, :, :, 0] == 0)
    for n in range(64):
        gone = np.asarray(dropped[n, :, :, 0] == 0)
        squares = np.zeros_like(gone)
        for i in range(8):
            for j in range(8):
                if gone[i : i + 3, j : j + 3].all():
                    squares[i : i + 3, j : j + 3] = True
        assert (squares == gone).all()


def test_drop_block_larger_than_the_picture_drops_channels():
    dropped = drop_block(jnp.ones((50, 2, 3, 40)), 0.5, 5, KEY)
    rows = np.asarray(dropped == 0)[:, :, :2].all((1, 2)) | np.asarray(dropped == 0)[:, :, 1:].all((1, 2))
    assert 0.3 < rows.mean() < 0.7
