"""Random changes of pictures, differentiable in their strengths.

An operation is `operation(x, key, *, strength=...) -> x` on pictures `[n, height, width, channels]`, every
one of which gets its own random change. Strengths may be numbers, or traced scalars of `meta`: a random
change is a fixed draw times its strength, so a derivative with respect to the strength exists and is exact
for that draw. `compose` chains operations; `task_augment.augmented` puts them on the tasks of a sampler.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from bilevel.problem import Key

Operation = Callable[[jax.Array, Key], jax.Array]


def warp(image: jax.Array, matrix: jax.Array, shift: jax.Array) -> jax.Array:
    """One picture moved by an affine map about its centre, read by bilinear interpolation.

        result[p] = image[matrix @ p + shift],   p = (down, right) in units of half the side

    Outside the picture there is zero. The derivatives with respect to the matrix and the shift are those of
    the interpolation: exact, but jumping where a sample crosses a pixel.

    Args:
        image: float [height, width, channels].
        matrix: [2, 2].
        shift: [2]; 1 is half a side.

    Returns:
        [height, width, channels].

    Cost: 4 reads a pixel.

    >>> picture = jnp.arange(9.0).reshape(3, 3, 1)
    >>> moved = warp(picture, jnp.eye(2), jnp.array([0.0, 2 / 3]))  # one pixel to the left
    >>> jnp.rint(moved)[..., 0].tolist()
    [[1.0, 2.0, 0.0], [4.0, 5.0, 0.0], [7.0, 8.0, 0.0]]
    """
    height, width, channels = image.shape
    half = jnp.array([height, width], image.dtype) / 2
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    pixels = jnp.stack([rows, columns], axis=-1).reshape(-1, 2).astype(image.dtype)
    centred = (pixels + 0.5) / half - 1
    places = (centred @ matrix.T + shift + 1) * half - 0.5
    # A border of two zero pixels: what is read beyond the picture is zero without a mask.
    padded = jnp.pad(image, ((2, 2), (2, 2), (0, 0))).reshape(-1, channels)
    places = jnp.clip(places, -1.5, jnp.array([height, width], image.dtype) + 0.5)
    low = jax.lax.stop_gradient(jnp.floor(places))
    part = places - low
    corner = (low.astype(jnp.int32) + 2) @ jnp.array([width + 4, 1])
    result = jnp.zeros((height * width, channels), image.dtype)
    for down in (0, 1):
        for right in (0, 1):
            weight = jnp.abs(1 - down - part[:, 0]) * jnp.abs(1 - right - part[:, 1])
            result = result + weight[:, None] * padded[corner + down * (width + 4) + right]
    return result.reshape(image.shape)


def affine(
    x: jax.Array,
    key: Key,
    *,
    shift: ArrayLike = 0.0,
    rotation: ArrayLike = 0.0,
    scale: ArrayLike = 0.0,
    shear: ArrayLike = 0.0,
) -> jax.Array:
    """Shift, turn, stretch and shear every picture at random.

        x[p] → x[R(rotation·z₁) (I + shear·z₂) e^{scale·z₃} p + shift·(z₄, z₅)],   z standard normal

    Args:
        x: float [n, height, width, channels].
        key: random key.
        shift: standard deviation of the shift, in sides of the picture.
        rotation: standard deviation of the angle, in radians.
        scale: standard deviation of the logarithm of the size.
        shear: standard deviation of the shear.

    Returns:
        [n, height, width, channels]; with all strengths zero it is `x` up to rounding.

    Raises:
        TypeError, ValueError: when `x` is no float array of pictures.

    Cost: 4 reads a pixel. Differentiable in `x` and in all strengths.

    >>> affine(jnp.ones((2, 8, 8, 1)), jax.random.key(0), shift=0.1, rotation=0.2).shape
    (2, 8, 8, 1)
    """
    require_pictures("affine", x)
    angle, size, slant, *moves = jax.random.normal(key, (5, len(x)), x.dtype)
    cos, sin = jnp.cos(rotation * angle), jnp.sin(rotation * angle)
    turn = jnp.stack([jnp.stack([cos, -sin], -1), jnp.stack([sin, cos], -1)], -2)  # [n, 2, 2]
    ones, zeros = jnp.ones(len(x), x.dtype), jnp.zeros(len(x), x.dtype)
    lean = jnp.stack([jnp.stack([ones, shear * slant], -1), jnp.stack([zeros, ones], -1)], -2)
    matrix = turn @ lean * jnp.exp(scale * size)[:, None, None]
    return jax.vmap(warp)(x, matrix, jnp.stack(moves, axis=-1) * jnp.asarray(2 * shift, x.dtype))


def noise(x: jax.Array, key: Key, *, strength: ArrayLike) -> jax.Array:
    """Add normal noise: x + strength · z. Pictures and vectors alike.

    Args:
        x: float [n, ...].
        key: random key.
        strength: its standard deviation.

    >>> noise(jnp.zeros((1, 2)), jax.random.key(0), strength=0.0).tolist()
    [[0.0, 0.0]]
    """
    _require_floats("noise", x)
    return x + strength * jax.random.normal(key, x.shape, x.dtype)


def intensity(x: jax.Array, key: Key, *, brightness: ArrayLike = 0.0, contrast: ArrayLike = 0.0) -> jax.Array:
    """Change brightness and contrast of every picture: mean + e^{contrast·z₁} (x − mean) + brightness·z₂.

    Args:
        x: float [n, height, width, channels].
        key: random key.
        brightness: standard deviation of what is added.
        contrast: standard deviation of the logarithm of the factor about the picture's mean.

    >>> intensity(jnp.ones((2, 4, 4, 1)), jax.random.key(0), contrast=0.5).tolist() == [[[[1.0]] * 4] * 4] * 2
    True
    """
    require_pictures("intensity", x)
    z = jax.random.normal(key, (2, len(x), 1, 1, 1), x.dtype)
    mean = x.mean((1, 2, 3), keepdims=True)
    return mean + jnp.exp(contrast * z[0]) * (x - mean) + brightness * z[1]


def cutout(x: jax.Array, key: Key, *, size: ArrayLike, value: ArrayLike = 0.0) -> jax.Array:
    """Cover a square of every picture, at a random place.

    The square's edge falls off over one pixel, which makes the result differentiable in `size`.

    Args:
        x: float [n, height, width, channels].
        key: random key.
        size: side of the square, in sides of the picture: 0 covers nothing.
        value: what covers it.

    Reference: DeVries, Taylor, Improved regularization of convolutional neural networks with cutout, 2017.

    >>> bool((cutout(jnp.ones((1, 8, 8, 1)), jax.random.key(0), size=0.5) == 0).any())
    True
    """
    require_pictures("cutout", x)
    centres = jax.random.uniform(key, (2, len(x), 1), x.dtype)
    side = jnp.asarray(size, x.dtype)

    def cover(length, centre):  # [n, length]: 1 inside, 0 outside, a slope of one pixel between
        distance = jnp.abs(jnp.arange(length) + 0.5 - centre * length)
        return jnp.clip(side * length / 2 - distance + 0.5, 0.0, 1.0) * (side > 0)

    covered = cover(x.shape[1], centres[0])[:, :, None] * cover(x.shape[2], centres[1])[:, None, :]
    return x + covered[..., None] * (value - x)


def flip(x: jax.Array, key: Key, *, probability: float = 0.5, axis: str = "horizontal") -> jax.Array:
    """Mirror pictures, each with a probability.

    Args:
        x: float [n, height, width, channels].
        key: random key.
        probability: a Python number. Which pictures are mirrored does not change smoothly with it, so a
            derivative would be zero and wrong: a traced one is refused.
        axis: "horizontal" (left and right change places) or "vertical".

    Raises:
        TypeError: for a traced probability.
        ValueError: for a probability outside 0..1 or another axis.

    >>> flip(jnp.arange(2.0).reshape(1, 1, 2, 1), jax.random.key(0), probability=1.0).ravel().tolist()
    [1.0, 0.0]
    """
    require_pictures("flip", x)
    require_probability("flip", probability)
    if axis not in ("horizontal", "vertical"):
        raise ValueError(f"flip: axis must be horizontal or vertical, got {axis!r}")
    mirrored = jnp.flip(x, 2 if axis == "horizontal" else 1)
    return jnp.where(jax.random.bernoulli(key, probability, (len(x), 1, 1, 1)), mirrored, x)


def compose(*operations: Operation) -> Operation:
    """One operation that applies several, in order, each with a key of its own.

    Raises:
        TypeError: when one of them cannot be called.

    >>> from functools import partial
    >>> both = compose(partial(noise, strength=0.1), partial(flip, probability=0.5))
    >>> both(jnp.ones((2, 4, 4, 1)), jax.random.key(0)).shape
    (2, 4, 4, 1)
    """
    for operation in operations:
        if not callable(operation):
            raise TypeError(
                f"compose: an operation must be a function (x, key) -> x, got {type(operation).__name__}"
            )

    def chain(x: jax.Array, key: Key) -> jax.Array:
        for operation, part in zip(operations, jax.random.split(key, len(operations)), strict=True):
            x = operation(x, part)
        return x

    return chain if operations else lambda x, key: x


def require_pictures(name: str, x: jax.Array) -> None:
    """Refuse what is no float array [n, height, width, channels]."""
    _require_floats(name, x)
    if jnp.ndim(x) != 4:
        raise ValueError(f"{name} expects pictures [n, height, width, channels], got {jnp.shape(x)}")


def _require_floats(name: str, x: jax.Array) -> None:
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(
            f"{name} expects floats, got {jnp.result_type(x)}; divide pictures of integers by 255"
        )


def require_probability(name: str, probability: float) -> None:
    """Refuse what is no Python number in 0..1."""
    if isinstance(probability, bool) or not isinstance(probability, int | float):
        raise TypeError(
            f"{name}: probability must be a Python number (no derivative reaches it), "
            f"got {type(probability).__name__}"
        )
    if not 0 <= probability <= 1:
        raise ValueError(f"{name}: probability must lie in 0..1, got {probability}")
