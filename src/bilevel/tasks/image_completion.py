"""Pictures as functions from a place to an intensity: completing them is regression."""

from dataclasses import dataclass, field, fields
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_pytree_node_class

from bilevel.problem import Key, Task
from bilevel.tasks.glyphs import SPLITS, glyph
from bilevel.tasks.harmonics import require_counts
from bilevel.tasks.sampling import choose


@register_pytree_node_class
@dataclass(frozen=True, eq=False)
class ImageCompletion:
    """Draw regression tasks: some pixels of a picture are known, the others are asked for.

        x = (down, right) in [-1, 1]²   →   y = intensity [channels]

    The picture is one of `images`, or a newly drawn glyph when there are none. It is a pytree: pass it to
    compiled functions as an argument and the pictures are not copied into the program.

    Args:
        images: [N, H, W] or [N, H, W, C], integers in 0..255 or floats; None draws glyphs of 28 x 28.
        shots: how many random pixels the support has.
        query: "others", all pixels that are not in the support, or "all", as in the published tables.
        queries: how many of those, at random; all of them when left out.
        split: of the glyphs, "train", "validation" or "test".

    Raises:
        ValueError: when the numbers do not fit the pictures, or the pictures are none.
        TypeError: when `images` are no numbers.

    Reference: Garnelo et al., Conditional neural processes, 2018; Zintgraf et al., CAVIA, 2019.

    >>> task = jax.jit(ImageCompletion(shots=10))(jax.random.key(0))
    >>> task.support[0].shape, task.query[0].shape, task.query[1].shape
    ((10, 2), (774, 2), (774, 1))
    """

    images: np.ndarray | jax.Array | None = field(default=None, repr=False)
    shots: int = 10
    query: Literal["others", "all"] = "others"
    queries: int | None = None
    split: str = "train"

    def __post_init__(self):
        require_counts("ImageCompletion", shots=self.shots)
        if self.query not in ("others", "all"):
            raise ValueError(f"ImageCompletion: query must be others or all, got {self.query!r}")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
        if self.images is not None:
            object.__setattr__(self, "images", _pictures(self.images))
        height, width, _ = self.image_shape
        left = height * width - (self.shots if self.query == "others" else 0)
        if self.shots > height * width or left < 1:
            raise ValueError(
                f"ImageCompletion: shots must leave some of the {height * width} pixels, got {self.shots}"
            )
        if self.queries is not None:
            require_counts("ImageCompletion", queries=self.queries)
            if self.queries > left:
                raise ValueError(
                    f"ImageCompletion: queries must be at most the {left} pixels there are, "
                    f"got {self.queries}"
                )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        if self.images is None:
            return (28, 28, 1)
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def __call__(self, key: Key) -> Task:
        """Draw a task: (x float32 [n, 2], y float32 [n, channels]) twice."""
        which_key, draw_key, pixel_key = jax.random.split(key, 3)
        height, width, channels = self.image_shape
        if self.images is None:
            first, end = SPLITS[self.split]
            image = glyph(jax.random.randint(which_key, (), first, end), draw_key)
        else:
            image = jnp.asarray(self.images)[jax.random.randint(which_key, (), 0, len(self.images))]
            image = image.astype(jnp.float32) / (255 if self.images.dtype == jnp.uint8 else 1)
        down, right = (2 * (np.arange(side, dtype=np.float32) + 0.5) / side - 1 for side in (height, width))
        places = np.stack(np.meshgrid(down, right, indexing="ij"), axis=-1).reshape(-1, 2)
        known, asked = self._pixels(pixel_key, height * width)
        values = image.reshape(-1, channels)
        places = jnp.asarray(places)
        return Task((places[known], values[known]), (places[asked], values[asked]))

    def _pixels(self, key: Key, total: int) -> tuple[jax.Array, jax.Array]:
        """Which pixels are known, and which are asked for."""
        count = self.queries
        if self.query == "all":
            known_key, asked_key = jax.random.split(key)
            known = choose(known_key, total, self.shots)
            return known, jnp.arange(total) if count is None else choose(asked_key, total, count)
        if count is not None and self.shots + count < total // 4:  # a few of many: no shuffle of all
            both = choose(key, total, self.shots + count)
        else:
            both = jax.random.permutation(key, total)
        return both[: self.shots], both[self.shots :][: total if count is None else count]

    def tree_flatten(self):
        names = [f.name for f in fields(self) if f.name != "images"]
        return (self.images,), tuple(getattr(self, name) for name in names)

    @classmethod
    def tree_unflatten(cls, settings, arrays):
        # Traced arrays cannot be checked again, so this goes around __post_init__.
        completion = object.__new__(cls)
        for f, value in zip(fields(cls), (*arrays, *settings), strict=True):
            object.__setattr__(completion, f.name, value)
        return completion


def _pictures(images) -> jax.Array:
    """Pictures on the device, uint8 or float32, with a channel axis."""
    images = np.asarray(images)
    if images.ndim not in (3, 4) or images.size == 0:
        raise ValueError(f"images must be a filled array [N, H, W] or [N, H, W, C], got {images.shape}")
    if images.dtype == bool:
        images = images.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(images.dtype, np.integer):
        if images.min() < 0 or images.max() > 255:
            raise ValueError(f"integer images must lie in 0..255, got {images.min()}..{images.max()}")
        images = images.astype(np.uint8, copy=False)
    elif jnp.issubdtype(images.dtype, jnp.floating):
        images = images.astype(np.float32, copy=False)
        if not np.isfinite(images).all():
            raise ValueError("images must be finite in float32, but some pixel is not")
    else:
        raise TypeError(f"images must be integers or floats, got {images.dtype}")
    return jnp.asarray(images if images.ndim == 4 else images[..., None])
