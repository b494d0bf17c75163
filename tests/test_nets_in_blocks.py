"""Networks applied a few examples at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.nets import LayerNorm, Net, SupportNorm, conv4, in_blocks

KEY = jax.random.key(0)


@pytest.mark.parametrize("num_examples", [3, 4, 8, 11], ids="n{}".format)
def test_blocks_change_neither_values_nor_derivatives(x64, num_examples):
    net = bl.nets.mlp([3, 6, 2])
    cut = in_blocks(net, 4)
    params = jax.tree.map(lambda leaf: leaf.astype(float), net.init(KEY))
    x = jax.random.normal(jax.random.key(1), (num_examples, 3))
    direction = jax.tree.map(jnp.ones_like, params)

    def derivatives(net):
        def loss(params, x):
            return jnp.sum(jnp.tanh(net.apply(params, x)) ** 2)

        gradient = jax.grad(loss, argnums=(0, 1))
        second = jax.jvp(lambda params: gradient(params, x), (params,), (direction,))[1]
        return net.apply(params, x), gradient(params, x), second

    found, expected = jax.jit(lambda: (derivatives(cut), derivatives(net)))()
    for ours, whole in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-12, atol=1e-14)


def test_blocks_of_pictures_under_a_batch_of_weights():
    net = conv4(None, 3, norm=LayerNorm(), image_shape=(16, 16, 1))
    params = jax.vmap(net.init)(jax.random.split(KEY, 2))
    x = jax.random.uniform(KEY, (2, 5, 16, 16, 1))
    cut = jax.jit(jax.vmap(in_blocks(net, 2).apply))(params, x)
    np.testing.assert_allclose(cut, jax.jit(jax.vmap(net.apply))(params, x), rtol=2e-5, atol=2e-6)


def test_each_block_has_noise_of_its_own():
    noise = Net(lambda key: 0.0, lambda w, x: x, lambda w, x, key: x + jax.random.normal(key, x.shape))
    y = in_blocks(noise, 2).noisy(0.0, jnp.zeros((5, 1)), KEY)
    assert len(set(np.ravel(y).tolist())) == 5


@pytest.mark.parametrize(
    "net",
    [conv4(None, 8), conv4(None, 8, norm=SupportNorm(2)), Net(lambda key: 0, lambda w, x: x, None, True)],
    ids=["batch", "support", "transductive"],
)
def test_a_batch_that_must_stay_whole_is_not_cut(net):
    with pytest.raises(ValueError, match="leave the batch whole"):
        in_blocks(net, 4)


def test_a_block_has_an_example():
    with pytest.raises(ValueError, match="size of at least 1, got 0"):
        in_blocks(bl.nets.mlp([1, 2]), 0)
