"""The four-block convolutional network of the few-shot literature, built on matrix products.

XLA's own convolution is slow on a CPU when each task has its own weights, and its second derivatives
are slower still. Here a convolution is a copy of the 3x3 neighbourhoods (`_patches`) and one matrix
product, whose derivatives of any order are again copies and matrix products.
"""

import jax
import jax.numpy as jnp

from bilevel.nets.net import Net

_KERNEL, _STRIDE = 3, 2


def conv4(
    ways: int,
    filters: int = 64,
    *,
    image_shape: tuple[int, int, int] = (28, 28, 1),
    compute_dtype: str = "float32",
) -> Net:
    """Four blocks of 3x3 convolution with stride 2, batch norm and ReLU; mean over space; linear head.

        x ← relu(γ (Wx − mean) / std + β), four times;   logits = mean over space (x) V + c

    Batch norm always uses the statistics of the batch it is given ("transductive"): at evaluation the
    query examples of a task share them. Stride replaces pooling, as in MAML on Omniglot.

    Args:
        ways: number of classes.
        filters: width of each block.
        image_shape: height, width and channels of the images.
        compute_dtype: "float32", or "bfloat16" to multiply in bfloat16 and add in float32: faster where
            the processor has such units, at the cost of about three decimal digits in each product.

    Returns:
        A `Net`: `x [n, height, width, channels] -> logits [n, ways]`. Its parameters are
        `{"block_0": {"w", "scale", "bias"}, ..., "head": {"w", "b"}}`.

    Raises:
        ValueError: for a width below 1, fewer than 2 ways or an unknown compute_dtype.

    Reference: Vinyals et al., Matching networks, 2016; Finn, Abbeel, Levine, 2017.

    >>> net = conv4(ways=5, filters=8)
    >>> net.apply(net.init(jax.random.key(0)), jnp.ones((10, 28, 28, 1))).shape
    (10, 5)
    """
    if ways < 2 or filters < 1 or len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(
            "conv4 needs ways >= 2, filters >= 1 and image_shape (height, width, channels), "
            f"got ways={ways}, filters={filters}, image_shape={image_shape}"
        )
    if compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"conv4.compute_dtype must be float32 or bfloat16, got {compute_dtype!r}")
    names = [f"block_{i}" for i in range(4)]

    def init(key):
        keys = jax.random.split(key, len(names) + 1)
        params = {}
        channels = image_shape[-1]
        for name, k in zip(names, keys[:-1], strict=True):
            fan_in = _KERNEL**2 * channels
            params[name] = {
                "w": jax.random.normal(k, (fan_in, filters)) * (2 / fan_in) ** 0.5,
                "scale": jnp.ones(filters),
                "bias": jnp.zeros(filters),
            }
            channels = filters
        params["head"] = {
            "w": jax.random.normal(keys[-1], (filters, ways)) * filters**-0.5,
            "b": jnp.zeros(ways),
        }
        return params

    def apply(params, x):
        if x.ndim != 4 or x.shape[1:] != tuple(image_shape):
            raise ValueError(
                f"conv4 expects images [n, {', '.join(map(str, image_shape))}], got {x.shape}; "
                "pass image_shape=(height, width, channels) to conv4"
            )
        for name in names:
            block = params[name]
            x = _patches(x)
            n, h, w, k = x.shape
            x = _product(x.reshape(n * h * w, k), block["w"], compute_dtype)
            x = jax.nn.relu(_normalize(x, block["scale"], block["bias"]))
            x = x.reshape(n, h, w, filters)
        return x.mean((1, 2)) @ params["head"]["w"] + params["head"]["b"]

    return Net(init, apply)


def _patches(x: jax.Array) -> jax.Array:
    """3x3 neighbourhoods at stride 2 with a border of one zero: `[n, h, w, c] -> [n, h/2, w/2, 9c]`."""
    _, height, width, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return jnp.concatenate(
        [
            x[:, i : i + height : _STRIDE, j : j + width : _STRIDE, :]
            for i in range(_KERNEL)
            for j in range(_KERNEL)
        ],
        axis=-1,
    )


def _product(x: jax.Array, w: jax.Array, compute_dtype: str) -> jax.Array:
    if compute_dtype == "float32":
        return x @ w
    return jnp.matmul(x.astype(compute_dtype), w.astype(compute_dtype), preferred_element_type=x.dtype)


def _normalize(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """Batch norm over the rows of `x [rows, channels]`."""
    centred = x - x.mean(0)
    variance = (centred**2).mean(0)
    return centred * (jax.lax.rsqrt(variance + 1e-5) * scale) + bias
