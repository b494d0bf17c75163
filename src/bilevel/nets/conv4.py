"""The four-block convolutional network of the few-shot literature, built on matrix products."""

from typing import Literal

import jax
import jax.numpy as jnp

from bilevel.nets.convolution import KERNEL, largest_of_quarters, max_pool, patches, product, quarter_patches
from bilevel.nets.net import Net
from bilevel.nets.noise import dropout as drop
from bilevel.nets.noise import require_rate
from bilevel.nets.norms import BatchNorm, Norm, as_norm, needs_whole_batch

_BLOCKS = 4
_STRIDE = 2


def conv4(
    ways: int | None,
    filters: int = 64,
    *,
    image_shape: tuple[int, int, int] = (28, 28, 1),
    compute_dtype: str = "float32",
    downsample: Literal["stride", "pool"] = "stride",
    norm: str | Norm = "batch",
    dropout: float = 0.0,
) -> Net:
    """Four blocks of 3x3 convolution, normalization and ReLU, each halving the picture; linear head.

        x ← relu(γ (Wx − mean) / std + β), four times;   logits = features V + c

    With "stride" the convolutions step by 2, as in MAML on Omniglot, and the head reads the mean over space.
    With "pool" 2x2 max pooling follows each block, as in the rest of the literature, and the head reads all
    that is left. Without a head the features are all that is left: a prototypical network loses four points
    of accuracy on Omniglot by their mean over space, which forgets where a stroke was.

    Args:
        ways: number of classes; None leaves the head out, and the net embeds.
        filters: width of each block.
        image_shape: height, width and channels of the images.
        compute_dtype: "float32", or "bfloat16" to multiply in bfloat16 and add in float32: faster where
            the processor has such units. Each product then keeps two to three decimal digits, and a
            hypergradient may be off by a tenth of its norm (`make bench` prints by how much).
        downsample: "stride" or "pool". On a CPU the first is several times as fast.
        norm: "batch" (on the statistics of the batch it is given: transductive, the queries of a task share
            them), "group", "layer", "none", or a norm such as `GroupNorm(8)` or `SupportNorm(5)`.
        dropout: share of the features that `noisy` drops before the head.

    Returns:
        A `Net`: `x [n, height, width, channels] -> logits [n, ways]`, or features `[n, ⌈height/16⌉ ·
        ⌈width/16⌉ · filters]` when `ways` is None, rounded down with "pool". Its parameters are
        `{"block_0": {"w", "scale", "bias"}, ..., "head": {"w", "b"}}`.

    Raises:
        ValueError: for a width below 1, fewer than 2 ways, an unknown option, images too small to pool.

    Reference: Vinyals et al., Matching networks, 2016; Finn, Abbeel, Levine, 2017.

    >>> net = conv4(ways=5, filters=8)
    >>> net.apply(net.init(jax.random.key(0)), jnp.ones((10, 28, 28, 1))).shape
    (10, 5)
    """
    _check(ways, filters, image_shape, compute_dtype, downsample)
    require_rate("conv4", dropout=dropout)
    norm = as_norm(norm, "conv4")
    norm.check(filters)
    names = [f"block_{i}" for i in range(_BLOCKS)]
    averaged = downsample == "stride" and ways is not None
    width = filters * (1 if averaged else _places(image_shape, downsample))

    def init(key):
        keys = jax.random.split(key, len(names) + 1)
        params = {}
        channels = image_shape[-1]
        for name, k in zip(names, keys[:-1], strict=True):
            fan_in = KERNEL**2 * channels
            params[name] = {
                "w": jax.random.normal(k, (filters, fan_in)) * (2 / fan_in) ** 0.5,
                "scale": jnp.ones(filters),
                "bias": jnp.zeros(filters),
            }
            channels = filters
        if ways is not None:
            params["head"] = {
                "w": jax.random.normal(keys[-1], (width, ways)) * width**-0.5,
                "b": jnp.zeros(ways),
            }
        return params

    def forward(params, x, key=None):
        if x.ndim != 4 or x.shape[1:] != tuple(image_shape):
            raise ValueError(
                f"conv4 expects images [n, {', '.join(map(str, image_shape))}], got {x.shape}; "
                "pass image_shape=(height, width, channels) to conv4"
            )
        block = _strided_block if downsample == "stride" else _pooled_block
        for name in names:
            x = block(x, params[name], norm, compute_dtype)
        x = x.mean((1, 2)) if averaged else x.reshape(x.shape[0], width)
        if key is not None:
            x = drop(x, dropout, key)
        return x if ways is None else x @ params["head"]["w"] + params["head"]["b"]

    noisy = forward if dropout else None
    whole = needs_whole_batch(norm)
    return Net(init, lambda params, x: forward(params, x), noisy, norm.transductive, whole)


def _places(image_shape: tuple[int, int, int], downsample: str) -> int:
    """Where the last block has features."""
    height, width, shrink = *image_shape[:2], 2**_BLOCKS
    if downsample == "pool":
        return (height // shrink) * (width // shrink)
    return -(-height // shrink) * -(-width // shrink)


def _check(ways, filters, image_shape, compute_dtype, downsample):
    if (ways is not None and ways < 2) or filters < 1 or len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(
            "conv4 needs ways >= 2 (or None), filters >= 1 and image_shape (height, width, channels), "
            f"got ways={ways}, filters={filters}, image_shape={image_shape}"
        )
    if compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"conv4.compute_dtype must be float32 or bfloat16, got {compute_dtype!r}")
    if downsample not in ("stride", "pool"):
        raise ValueError(f"conv4.downsample must be stride or pool, got {downsample!r}")
    if downsample == "pool" and min(image_shape[:2]) < 2**_BLOCKS:
        raise ValueError(
            f"conv4 pools four times, which needs images of at least 16x16, got image_shape={image_shape}; "
            "use downsample='stride'"
        )


def _strided_block(x: jax.Array, block: dict, norm: Norm, compute_dtype: str) -> jax.Array:
    """`[n, h, w, c] -> [n, ⌈h/2⌉, ⌈w/2⌉, filters]`."""
    x = patches(x, _STRIDE)
    n, h, w, k = x.shape
    if isinstance(norm, BatchNorm):
        x = jax.nn.relu(_normalized_product(x.reshape(n * h * w, k), block, compute_dtype))
    else:
        y = product(x.reshape(1, n, h * w, k), block["w"], compute_dtype)
        x = jax.nn.relu(norm(y, block["scale"], block["bias"]))
    return x.reshape(n, h, w, -1)


def _pooled_block(x: jax.Array, block: dict, norm: Norm, compute_dtype: str) -> jax.Array:
    """`[n, h, w, c] -> [n, h//2, w//2, filters]`; a norm sees also what an odd size drops."""
    even = x.shape[1] % 2 == 0 and x.shape[2] % 2 == 0
    x = quarter_patches(x) if even else patches(x)[None]
    parts, n, h, w, k = x.shape
    if isinstance(norm, BatchNorm):
        y = _normalized_product(x.reshape(-1, k), block, compute_dtype)
    else:
        y = product(x.reshape(parts, n, h * w, k), block["w"], compute_dtype)
        y = norm(y, block["scale"], block["bias"])
    y = y.reshape(parts, n, h, w, -1)
    return jax.nn.relu(largest_of_quarters(y) if even else max_pool(y[0]))


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
        return product(x, w * scale[:, None], compute_dtype) + (block["bias"] - (w @ mean) * scale)
    y = product(x, w, compute_dtype)
    mean = y.mean(0)
    scale = block["scale"] * jax.lax.rsqrt(((y - mean) ** 2).mean(0) + epsilon)
    return y * scale + (block["bias"] - mean * scale)
