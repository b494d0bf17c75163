"""The networks compute what their formulas say, and so do their derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.nets import conv4, mlp
from bilevel.testing import assert_close, assert_trees_close

KEY = jax.random.key(0)


def reference_conv4(params, x):
    """The same network from XLA's convolution and a textbook batch norm."""
    for i in range(4):
        block = params[f"block_{i}"]
        filters, channels = block["w"].shape[0], x.shape[-1]
        kernel = block["w"].reshape(filters, 3, 3, channels).transpose(1, 2, 3, 0)
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        x = (x - mean) / jnp.sqrt(variance + 1e-5) * block["scale"] + block["bias"]
        x = jnp.maximum(x, 0)
    return x.mean((1, 2)) @ params["head"]["w"] + params["head"]["b"]


def moved_params(net):
    """Away from scale 1 and bias 0, where faults could hide."""
    params = net.init(KEY)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.3 * jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(tree, [leaf + n for leaf, n in zip(leaves, noise)])


# Both ways of the batch norm: input narrower than the filters, and wider.
@pytest.mark.parametrize(
    ("image_shape", "filters"), [((12, 12, 1), 11), ((9, 7, 3), 4), ((5, 16, 2), 3), ((1, 1, 1), 4)]
)
def test_conv4_is_convolution_and_batch_norm(x64, image_shape, filters):
    net = conv4(ways=3, filters=filters, image_shape=image_shape)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), moved_params(net))
    x = jax.random.normal(jax.random.key(2), (4, *image_shape))
    vector = jax.tree.map(jnp.cos, params)

    def derivatives(apply):
        def loss(params, x):
            return jnp.sum(jnp.sin(apply(params, x)))

        gradient = jax.grad(loss)
        hvp = jax.jvp(lambda params: gradient(params, x), (params,), (vector,))[1]
        return apply(params, x), jax.grad(loss, argnums=(0, 1))(params, x), hvp

    got = jax.jit(lambda: derivatives(net.apply))()
    expected = jax.jit(lambda: derivatives(reference_conv4))()
    assert got[0].shape == (4, 3)
    if image_shape == (1, 1, 1):  # the second block has one pixel and still 4 images
        assert_close("outputs", got[0], expected[0], 1e-6)
        return
    assert_close("outputs", got[0], expected[0], 1e-10)
    assert_trees_close("gradient", got[1], expected[1], 1e-8)
    assert_trees_close("Hessian-vector product", got[2], expected[2], 1e-7)


def test_conv4_in_bfloat16_is_close_to_float32():
    x = jax.random.normal(jax.random.key(2), (10, 28, 28, 1))
    full, half = (conv4(5, 8, compute_dtype=dtype) for dtype in ("float32", "bfloat16"))
    params = moved_params(full)

    def run(net):
        return jax.jit(jax.value_and_grad(lambda p: jnp.mean(net.apply(p, x) ** 2)))(params)

    (value, gradient), (half_value, half_gradient) = run(full), run(half)
    assert half_value.dtype == jnp.float32 and value != half_value
    assert_close("value", half_value, value, 0.02)
    assert jax.tree.map(lambda leaf: leaf.dtype, half_gradient) == jax.tree.map(
        lambda leaf: leaf.dtype, gradient
    )
    a, b = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(g)]) for g in (gradient, half_gradient))
    cosine = a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b)
    assert cosine > 0.99


def test_conv4_under_a_batch_of_weights():
    net = conv4(2, 3, image_shape=(6, 6, 1))
    params = jax.vmap(net.init)(jax.random.split(KEY, 2))
    x = jax.random.normal(KEY, (2, 5, 6, 6, 1))
    together = jax.jit(jax.vmap(net.apply))(params, x)
    one = jax.jit(net.apply)(jax.tree.map(lambda leaf: leaf[1], params), x[1])
    assert_close("second task", together[1], one, 1e-5)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_no_convolution_is_left_in_second_derivatives_of_tasks_side_by_side(platform):
    """Weights of each task's own would make it a grouped convolution, slow everywhere."""
    net = conv4(ways=5, filters=8)
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), moved_params(net))
    x = jnp.ones((2, 5, 28, 28, 1))

    def operations(apply):
        def after_a_step(params, x):
            slope = jax.grad(lambda params: jnp.mean(apply(params, x) ** 2))(params)
            return jnp.mean(apply(jax.tree.map(lambda p, g: p - g, params, slope), x) ** 2)

        batch = jax.jit(jax.vmap(jax.grad(after_a_step)))
        program = jax.export.export(batch, platforms=[platform])(params, x).mlir_module()
        return program.count("stablehlo.convolution"), program.count("stablehlo.dot_general")

    convolutions, products = operations(net.apply)
    assert convolutions == 0 and products > 0
    assert operations(reference_conv4)[0] > 0


@pytest.mark.parametrize("shape", [(4, 28, 28), (4, 28, 27, 1), (4, 28, 28, 3), (28, 28, 1)])
def test_conv4_refuses_other_images(shape):
    net = conv4(2, 2)
    with pytest.raises(ValueError, match=r"expects images \[n, 28, 28, 1\], got .*image_shape="):
        net.apply(net.init(KEY), jnp.ones(shape))


@pytest.mark.parametrize(
    "options",
    [
        {"ways": 1},
        {"ways": 5, "filters": 0},
        {"ways": 5, "image_shape": (28, 28)},
        {"ways": 5, "image_shape": (28, 0, 1)},
    ],
)
def test_conv4_refuses_impossible_sizes(options):
    with pytest.raises(ValueError, match="conv4 needs ways >= 2"):
        conv4(**options)


def test_conv4_refuses_another_dtype():
    with pytest.raises(ValueError, match="must be float32 or bfloat16, got 'float16'"):
        conv4(5, compute_dtype="float16")


@pytest.mark.parametrize("activation", [jax.nn.relu, jnp.tanh])
def test_mlp_is_products_and_activations(activation):
    net = mlp([2, 5, 4, 3], activation)
    params = moved_params(net)
    assert sorted(params) == ["head", "hidden_0", "hidden_1"]
    x = jax.random.normal(KEY, (7, 2))
    y = np.asarray(x)
    for name in ("hidden_0", "hidden_1"):
        y = np.asarray(activation(y @ np.asarray(params[name]["w"]) + np.asarray(params[name]["b"])))
    y = y @ np.asarray(params["head"]["w"]) + np.asarray(params["head"]["b"])
    assert_close("outputs", net.apply(params, x), y, 1e-5)


def test_mlp_without_a_hidden_layer_is_linear():
    net = mlp([2, 3])
    assert jax.tree.map(jnp.shape, net.init(KEY)) == {"head": {"w": (2, 3), "b": (3,)}}


def test_weights_start_he_normal():
    params = mlp([400, 300, 1]).init(KEY)
    assert abs(float(params["hidden_0"]["w"].std()) / (2 / 400) ** 0.5 - 1) < 0.02
    block = conv4(5, 64).init(KEY)["block_1"]
    assert abs(float(block["w"].std()) / (2 / (9 * 64)) ** 0.5 - 1) < 0.02


@pytest.mark.parametrize("sizes", [[], [3], [3, 0, 1]])
def test_mlp_refuses_impossible_sizes(sizes):
    with pytest.raises(ValueError, match="mlp needs at least an input and an output width"):
        mlp(sizes)
