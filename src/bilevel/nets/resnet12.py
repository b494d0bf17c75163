"""The residual network of the few-shot literature, with DropBlock."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from bilevel.nets.convolution import KERNEL, max_pool, patches, product
from bilevel.nets.net import Net
from bilevel.nets.noise import drop_block as drop_squares
from bilevel.nets.noise import dropout, require_rate
from bilevel.nets.norms import Norm, as_norm, needs_whole_batch

_SLOPE = 0.1  # of the leaky ReLU
_LAYERS = 3  # convolutions of a block


def resnet12(
    ways: int | None,
    widths: Sequence[int] = (64, 160, 320, 640),
    *,
    image_shape: tuple[int, int, int] = (84, 84, 3),
    compute_dtype: str = "float32",
    norm: str | Norm = "batch",
    drop_block: float = 0.0,
    block_size: int = 5,
) -> Net:
    """Residual blocks of three 3x3 convolutions, each ending in 2x2 max pooling; linear head.

        y ← norm(W₃ ∗ lrelu(norm(W₂ ∗ lrelu(norm(W₁ ∗ x)))));   x ← maxpool(lrelu(y + norm(S x)))

    with a leaky ReLU of slope 0.1; the features are the mean over the space that is left.

    Args:
        ways: number of classes; None leaves the head out, and the net embeds.
        widths: channels of the blocks; four of them make the twelve convolutions of the name. R2-D2 and
            others use (64, 128, 256, 512).
        image_shape: height, width and channels of the images.
        compute_dtype: as in `conv4`.
        norm: as in `conv4`. "batch" is on the current batch and transductive; the papers' networks train
            that way and evaluate with running statistics, which are not kept here: `SupportNorm` is the way
            that is not transductive.
        drop_block: share that `noisy` drops after each block: squares after the last two, single values after
            those before. Constant in time, where the paper lets it grow.
        block_size: side of the squares, at most what is left of the picture.

    Returns:
        A `Net`: `x [n, height, width, channels] -> logits [n, ways]`, or features `[n, widths[-1]]`. Its
        parameters are `{"block_0": {"conv_0": {"w", "scale", "bias"}, ..., "shortcut"}, ..., "head"}`.

    Raises:
        ValueError: for impossible sizes or an unknown option.

    Reference: Mishra et al., SNAIL, 2018; Oreshkin et al., TADAM, 2018; Lee et al., MetaOptNet, 2019; Ghiasi,
    Lin, Le, DropBlock, 2018.

    >>> net = resnet12(5, (2, 3), image_shape=(8, 8, 1), drop_block=0.1)
    >>> net.apply(net.init(jax.random.key(0)), jnp.ones((2, 8, 8, 1))).shape
    (2, 5)
    """
    widths = tuple(widths)
    _check(ways, widths, image_shape, compute_dtype, block_size)
    require_rate("resnet12", drop_block=drop_block)
    norm = as_norm(norm, "resnet12")
    for width in widths:
        norm.check(width)
    names = [f"block_{i}" for i in range(len(widths))]
    convs = [f"conv_{i}" for i in range(_LAYERS)]

    def init(key):
        keys = jax.random.split(key, len(names) + 1)
        params = {}
        channels = image_shape[-1]
        for name, k, width in zip(names, keys[:-1], widths, strict=True):
            *conv_keys, shortcut_key = jax.random.split(k, _LAYERS + 1)
            fans = [KERNEL**2 * channels] + [KERNEL**2 * width] * (_LAYERS - 1)
            params[name] = {
                conv: _init_layer(k, width, fan) for conv, k, fan in zip(convs, conv_keys, fans, strict=True)
            }
            params[name]["shortcut"] = _init_layer(shortcut_key, width, channels)
            channels = width
        if ways is not None:
            params["head"] = {
                "w": jax.random.normal(keys[-1], (channels, ways)) * channels**-0.5,
                "b": jnp.zeros(ways),
            }
        return params

    def normalized(x, layer):
        n, h, w, k = x.shape
        y = product(x.reshape(1, n, h * w, k), layer["w"], compute_dtype)
        return norm(y, layer["scale"], layer["bias"]).reshape(n, h, w, -1)

    def block(x, params):
        shortcut = normalized(x, params["shortcut"])
        for conv in convs:
            x = normalized(patches(x), params[conv])
            x = _lrelu(x if conv != convs[-1] else x + shortcut)
        return max_pool(x)

    def forward(params, x, key=None):
        if x.ndim != 4 or x.shape[1:] != tuple(image_shape):
            raise ValueError(
                f"resnet12 expects images [n, {', '.join(map(str, image_shape))}], got {x.shape}; "
                "pass image_shape=(height, width, channels) to resnet12"
            )
        for i, name in enumerate(names):
            x = block(x, params[name])
            if key is not None:
                k = jax.random.fold_in(key, i)
                squares = i >= len(names) - 2
                x = drop_squares(x, drop_block, block_size, k) if squares else dropout(x, drop_block, k)
        x = x.mean((1, 2))
        return x if ways is None else x @ params["head"]["w"] + params["head"]["b"]

    noisy = forward if drop_block else None
    whole = needs_whole_batch(norm)
    return Net(init, lambda params, x: forward(params, x), noisy, norm.transductive, whole)


def _check(ways, widths, image_shape, compute_dtype, block_size):
    if (ways is not None and ways < 2) or not widths or min(widths) < 1 or block_size < 1:
        raise ValueError(
            "resnet12 needs ways >= 2 (or None), at least one width, each at least 1, and block_size >= 1, "
            f"got ways={ways}, widths={widths}, block_size={block_size}"
        )
    least = 2 ** len(widths)
    if len(image_shape) != 3 or min(image_shape) < 1 or min(image_shape[:2]) < least:
        raise ValueError(
            f"resnet12 halves images {len(widths)} times, which needs image_shape (height, width, channels) "
            f"of at least {least}x{least}, got {image_shape}"
        )
    if compute_dtype not in ("float32", "bfloat16"):
        raise ValueError(f"resnet12.compute_dtype must be float32 or bfloat16, got {compute_dtype!r}")


def _init_layer(key: jax.Array, width: int, fan_in: int) -> dict[str, jax.Array]:
    return {
        "w": jax.random.normal(key, (width, fan_in)) * (2 / fan_in) ** 0.5,
        "scale": jnp.ones(width),
        "bias": jnp.zeros(width),
    }


def _lrelu(x: jax.Array) -> jax.Array:
    return jnp.where(x >= 0, x, _SLOPE * x)
