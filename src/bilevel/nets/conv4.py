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
            the processor has such units. Each product then keeps two to three decimal digits, and a
            hypergradient may be off by a tenth of its norm (`make bench` prints by how much).

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
                "w": jax.random.normal(k, (filters, fan_in)) * (2 / fan_in) ** 0.5,
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
            x = _patches(x)
            n, h, w, k = x.shape
            x = jax.nn.relu(_normalized_product(x.reshape(n * h * w, k), params[name], compute_dtype))
            x = x.reshape(n, h, w, filters)
        return x.mean((1, 2)) @ params["head"]["w"] + params["head"]["b"]

    return Net(init, apply)


def _patches(x: jax.Array) -> jax.Array:
    """3x3 neighbourhoods at stride 2 with a border of one zero: `[n, h, w, c] -> [n, h/2, w/2, 9c]`."""
    height, width, channels = x.shape[1:]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    taps = [
        x[:, i : i + height : _STRIDE, j : j + width : _STRIDE, :]
        for i in range(_KERNEL)
        for j in range(_KERNEL)
    ]
    # The same memory as a concatenation of channels, written more than twice as fast on a CPU.
    stacked = jnp.stack(taps, axis=3)
    return stacked.reshape(*stacked.shape[:3], _KERNEL**2 * channels)


def _product(x: jax.Array, w: jax.Array, compute_dtype: str) -> jax.Array:
    """`x [rows, k], w [filters, k] -> x wᵀ`; with this layout no derivative transposes the large factor."""
    dims = (((1,), (1,)), ((), ()))
    if compute_dtype == "float32":
        return jax.lax.dot_general(x, w, dims)
    x, w, result = x.astype(compute_dtype), w.astype(compute_dtype), x.dtype
    return jax.lax.dot_general(x, w, dims, preferred_element_type=result)


def _normalized_product(x: jax.Array, block: dict, compute_dtype: str) -> jax.Array:
    """`batchnorm(x wᵀ)` over the rows: `x [rows, k] -> [rows, filters]`."""
    w, epsilon = block["w"], 1e-5
    if x.shape[1] < w.shape[0]:
        # Mean and variance of a linear map follow from the mean and covariance of its input. Where the
        # input is the narrower side (the first block), that spares every pass over the large output.
        mean = x.mean(0)
        centred = x - mean
        covariance = centred.T @ centred / x.shape[0]
        scale = block["scale"] * jax.lax.rsqrt(((w @ covariance) * w).sum(1) + epsilon)
        return _product(x, w * scale[:, None], compute_dtype) + (block["bias"] - (w @ mean) * scale)
    y = _product(x, w, compute_dtype)
    mean = y.mean(0)
    scale = block["scale"] * jax.lax.rsqrt(((y - mean) ** 2).mean(0) + epsilon)
    return y * scale + (block["bias"] - mean * scale)
