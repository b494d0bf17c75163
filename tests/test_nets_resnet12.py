"""ResNet-12 against XLA's convolution and pooling, in value and in its second derivatives."""

import jax
import jax.numpy as jnp
import pytest

from bilevel.nets.norms import SupportNorm
from bilevel.nets.resnet12 import resnet12
from bilevel.testing import assert_close, assert_trees_close

KEY = jax.random.key(0)


def convolution(x, w, size):
    kernel = w.reshape(w.shape[0], size, size, x.shape[-1]).transpose(1, 2, 3, 0)
    border = ((size // 2, size // 2),) * 2
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), border, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def batch_norm(x, layer):
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / jnp.sqrt(variance + 1e-5) * layer["scale"] + layer["bias"]


def reference(params, x):
    for name in sorted(name for name in params if name != "head"):
        block = params[name]
        shortcut = batch_norm(convolution(x, block["shortcut"]["w"], 1), block["shortcut"])
        for i in range(3):
            x = batch_norm(convolution(x, block[f"conv_{i}"]["w"], 3), block[f"conv_{i}"])
            x = jax.nn.leaky_relu(x + shortcut if i == 2 else x, 0.1)
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = x.mean((1, 2))
    return x @ params["head"]["w"] + params["head"]["b"] if "head" in params else x


def moved_params(net):
    """Away from scale 1 and bias 0, where faults could hide."""
    params = net.init(KEY)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [0.3 * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves)]
    return jax.tree.unflatten(tree, [jnp.asarray(leaf + n, float) for leaf, n in zip(leaves, noise)])


@pytest.mark.parametrize(("ways", "widths", "image_shape"), [(3, (2, 3), (4, 5, 2)), (None, (3,), (3, 2, 1))])
def test_values_and_derivatives(x64, ways, widths, image_shape):
    net = resnet12(ways, widths, image_shape=image_shape)
    params, x = moved_params(net), jax.random.normal(KEY, (3, *image_shape))
    vector = jax.tree.map(jnp.cos, params)

    @jax.jit
    def derivatives(params, x):
        def of(apply):
            def loss(params, x):
                return jnp.sum(jnp.sin(apply(params, x)))

            hvp = jax.jvp(lambda params: jax.grad(loss)(params, x), (params,), (vector,))[1]
            return apply(params, x), jax.grad(loss, argnums=(0, 1))(params, x), hvp

        return of(net.apply), of(reference)

    got, expected = derivatives(params, x)
    assert got[0].shape == (3, 3)
    for name, a, b in zip(("outputs", "gradient", "Hessian-vector product"), got, expected):
        assert_trees_close(name, a, b, 1e-8)


def test_twelve_convolutions_and_published_widths():
    net = resnet12(5)
    shapes = jax.eval_shape(net.init, KEY)
    assert shapes["block_3"]["conv_2"]["w"].shape == (640, 9 * 640)
    assert shapes["block_1"]["shortcut"]["w"].shape == (160, 64)
    assert sum(name.startswith("conv") for block in shapes.values() for name in block) == 12
    # 12.4 million without the head, as the literature says of it
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) - 641 * 5
    assert 12.4e6 < count < 12.5e6
    features = jax.eval_shape(resnet12(None).apply, shapes, jnp.zeros((2, 84, 84, 3)))
    assert features.shape == (2, 640)


def test_noise():
    # Dropout after the first block, squares that are dropped after the others.
    net = resnet12(None, (4, 4, 4), image_shape=(8, 8, 1), drop_block=0.2, block_size=2)
    params, x = net.init(KEY), jax.random.normal(KEY, (4, 8, 8, 1))
    assert net.noisy is not None and net.transductive
    one, two = jax.jit(jax.vmap(net.noisy, (None, None, 0)))(params, x, jax.random.split(KEY))
    assert bool(jnp.any(one != two)) and bool(jnp.isfinite(one).all())
    assert resnet12(None, (4,), image_shape=(2, 2, 1)).noisy is None


def test_support_norm_keeps_queries_apart():
    net = resnet12(None, (3,), image_shape=(4, 4, 1), norm=SupportNorm(2))
    params, x = net.init(KEY), jax.random.normal(KEY, (5, 4, 4, 1))
    assert not net.transductive
    assert_close("query", net.apply(params, x)[2], net.apply(params, x[:3])[2], 1e-5)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((1,), {}, "needs ways >= 2"),
        ((5, ()), {}, "at least one width"),
        ((5,), {"image_shape": (8, 84, 3)}, "at least 16x16"),
        ((5,), {"image_shape": (84, 84)}, "image_shape"),
        ((5,), {"drop_block": 1.5}, "resnet12.drop_block must be at least 0"),
        ((5,), {"compute_dtype": "float16"}, "float32 or bfloat16"),
        ((5,), {"norm": "instance"}, "resnet12.norm must be one of"),
        ((5,), {"block_size": 0}, "block_size >= 1"),
    ],
)
def test_what_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        resnet12(*arguments, **options)


def test_other_images():
    net = resnet12(2, (2,), image_shape=(4, 4, 1))
    with pytest.raises(ValueError, match=r"expects images \[n, 4, 4, 1\], got \(2, 4, 4, 3\)"):
        net.apply(net.init(KEY), jnp.ones((2, 4, 4, 3)))
