"""N-way K-shot classification tasks from any labelled set of pictures or vectors."""

from dataclasses import dataclass, field, fields
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_pytree_node_class
from jax.typing import ArrayLike

from bilevel.problem import Key, Task
from bilevel.tasks.sampling import choose, classification

_ARRAYS = ("images", "labels", "starts", "counts")


@register_pytree_node_class
@dataclass(frozen=True, eq=False)
class FewShot:
    """Draw tasks of `ways` classes with `shots` support and `queries` query examples of each.

    Classes are drawn without repeats, examples of a class too, so support and query share none.
    The data stay on the device, pictures of integers as uint8; a task is cut out of them there. Pictures in
    order of their classes, as those of a stored set are, go there without a copy on the host.
    It is a pytree: pass it to compiled functions as an argument and the data are not copied into
    the program.

    Args:
        images: [N, D] vectors, [N, H, W] or [N, H, W, C] pictures; integers in 0..255, which tasks
            show as 0..1, or floats, which they show as they are.
        labels: integers [N], the class of each; classes may have different numbers of examples.
        ways: number of classes in a task.
        shots: support examples of each class.
        queries: query examples of each class.
        rotations: let every class turned by 90, 180 and 270 degrees be a class of its own.

    Raises:
        TypeError: when labels are not integers, or images not numbers.
        ValueError: when shapes do not fit, values are out of range, or a class is too small.

    >>> images, labels = np.zeros((30, 28, 28), np.uint8), np.arange(30) % 3
    >>> task = FewShot(images, labels, ways=2, shots=1, queries=4)(jax.random.key(0))
    >>> task.support[0].shape, task.query[0].shape, task.support[1].tolist()
    ((2, 28, 28, 1), (8, 28, 28, 1), [0, 1])
    """

    images: np.ndarray | jax.Array = field(repr=False)  # kept sorted by class, on the device
    labels: np.ndarray | jax.Array = field(repr=False)
    ways: int
    shots: int
    queries: int
    rotations: bool = False
    starts: jax.Array = field(init=False, repr=False)  # [classes], where each begins in `images`
    counts: jax.Array = field(init=False, repr=False)  # [classes], how many examples it has

    def __post_init__(self):
        for name, least in (("ways", 2), ("shots", 1), ("queries", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        images, labels = _checked_images(self.images), _checked_labels(self.labels)
        if len(images) != len(labels):
            raise ValueError(f"images and labels must have one length, got {len(images)} and {len(labels)}")
        if self.rotations and (images.ndim == 2 or images.shape[1] != images.shape[2]):
            raise ValueError(
                f"rotations need square pictures [N, H, H, C], got images of shape {images.shape}"
            )
        images, labels = _in_order(images, labels)
        classes, starts, counts = np.unique(labels, return_index=True, return_counts=True)
        self._check_supply(classes, counts)
        arrays = (images, labels, starts, counts)
        for name, array in zip(_ARRAYS, arrays, strict=True):
            # `array` copies: what the caller writes to his own later must not reach the tasks.
            object.__setattr__(self, name, jnp.array(array, None if name == "images" else jnp.int32))

    def _check_supply(self, classes: np.ndarray, counts: np.ndarray):
        available = len(classes) * (4 if self.rotations else 1)
        if self.ways > available:
            raise ValueError(f"ways must be at most the {available} classes, got {self.ways}")
        fewest = int(np.argmin(counts))
        if self.shots + self.queries > counts[fewest]:
            raise ValueError(
                f"shots + queries must be at most the examples of every class, got "
                f"{self.shots} + {self.queries}, but class {classes[fewest]} has {counts[fewest]}"
            )

    @property
    def num_classes(self) -> int:
        """How many classes there are to draw from, rotated ones included."""
        return self.counts.shape[0] * (4 if self.rotations else 1)

    def __call__(self, key: Key) -> Task:
        """Draw a task: (x float32 [ways * n, ...], y int32 [ways * n]) twice."""
        class_key, example_key = jax.random.split(key)
        turns, classes = jnp.divmod(choose(class_key, self.num_classes, self.ways), self.counts.shape[0])
        keys = jax.random.split(example_key, self.ways)
        pick = jax.vmap(choose, (0, 0, None))
        picks = pick(keys, self.counts[classes], self.shots + self.queries)
        examples = self.images[self.starts[classes][:, None] + picks]  # [ways, n, ...]
        if self.rotations:
            examples = jax.vmap(_turn)(examples, turns)
        scale = 255 if examples.dtype == jnp.uint8 else 1
        return classification(examples.astype(jnp.float32) / scale, self.shots)

    def tree_flatten(self):
        settings = tuple(getattr(self, f.name) for f in fields(self) if f.name not in _ARRAYS)
        return tuple(getattr(self, name) for name in _ARRAYS), settings

    @classmethod
    def tree_unflatten(cls, settings, arrays):
        # Traced arrays cannot be checked again, so this goes around __post_init__.
        few_shot = object.__new__(cls)
        names = [f.name for f in fields(cls) if f.name not in _ARRAYS]
        for name, value in zip((*names, *_ARRAYS), (*settings, *arrays), strict=True):
            object.__setattr__(few_shot, name, value)
        return few_shot


def _turn(images: jax.Array, turns: jax.Array) -> jax.Array:
    """Rotate pictures [n, H, H, C] by `turns` right angles."""
    rotations = [partial(jnp.rot90, k=k, axes=(1, 2)) for k in range(4)]
    return jax.lax.switch(turns, rotations, images)


def _in_order(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted by class; the arrays themselves where they are, for they may be larger than the memory."""
    if (labels[1:] >= labels[:-1]).all():
        return images, labels
    order = np.argsort(labels, kind="stable")
    return images[order], labels[order]


def _checked_images(images: ArrayLike) -> np.ndarray:
    """Images as uint8 or float32, pictures with a channel axis."""
    images = np.asarray(images)
    if images.ndim not in (2, 3, 4) or images.size == 0:
        raise ValueError(
            f"images must be a filled array [N, D], [N, H, W] or [N, H, W, C], got {images.shape}"
        )
    if images.dtype == bool:
        images = images.astype(np.uint8) * np.uint8(255)
    if np.issubdtype(images.dtype, np.integer):
        if images.min() < 0 or images.max() > 255:
            raise ValueError(
                f"integer images must lie in 0..255, got {images.min()}..{images.max()}; "
                "convert them to float32"
            )
        images = images.astype(np.uint8, copy=False)
    elif jnp.issubdtype(images.dtype, jnp.floating):
        images = images.astype(np.float32, copy=False)
        if not np.isfinite(images).all():
            bad = int(np.argmin(np.isfinite(images).reshape(len(images), -1).all(axis=1)))
            raise ValueError(f"images must be finite in float32, but image {bad} is not")
    else:
        raise TypeError(f"images must be integers or floats, got {images.dtype}")
    return images[..., None] if images.ndim == 3 else images


def _checked_labels(labels: ArrayLike) -> np.ndarray:
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape [N], got {labels.shape}")
    largest = np.iinfo(np.int32).max
    if labels.size and (labels.min() < 0 or labels.max() > largest):
        raise ValueError(f"labels must lie in 0..{largest}, got {labels.min()}..{labels.max()}")
    return labels
