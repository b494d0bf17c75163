"""Handwritten characters that nobody wrote: few-shot classification without a download.

A class is a random program of pen strokes, fixed by an integer; an example is one shaky drawing of
it. All drawings are made on the device while the task is sampled.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import register_static

from bilevel.problem import Key, Task
from bilevel.tasks import handwriting
from bilevel.tasks.sampling import choose, classification

# Class numbers of each split: first, and one past the last.
SPLITS = {"train": (0, 10_000), "validation": (10_000, 11_000), "test": (11_000, 12_000)}

MAX_STROKES = 4
_GRID = 4  # control points lie on a grid of 4 x 4
_DOTS = 40  # a stroke is drawn as so many dots of the pen
_EXTENT = 0.65  # a character fills -0.65..0.65 of a page that spans -1..1
# A uniform number below the first is a line, below the second a corner, above it a curve;
_KINDS = np.array([0.3, 0.45], np.float32)
# and a character of 2, of 3 and of 4 strokes.
_NUMBERS = np.array([0.5, 0.85], np.float32)
_PROGRAM_SEED = 1623  # what the class numbers mean; changing it changes every class


def _bases() -> np.ndarray:
    """Ways to lead a pen past 4 control points: [3, dots, 4] weights of line, corner and curve."""
    t = np.linspace(0.0, 1.0, _DOTS)[:, None]
    zero = np.zeros_like(t)
    line = np.concatenate([1 - t, zero, zero, t], axis=1)
    corner = np.concatenate(
        [np.maximum(1 - 2 * t, 0), 1 - np.abs(2 * t - 1), zero, np.maximum(2 * t - 1, 0)], axis=1
    )
    curve = np.concatenate(  # a cubic Bezier curve
        [(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], axis=1
    )
    return np.stack([line, corner, curve]).astype(np.float32)


_BASES = _bases()


def _program(class_id: int | jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The strokes of a class.

    Returns:
        Control points [strokes, 4, 2], bases [strokes, dots, 4], and ink [strokes], which is 0 for
        those of the MAX_STROKES strokes that the class does not have.
    """
    key = jax.random.fold_in(jax.random.key(_PROGRAM_SEED), class_id)
    sizes = [_GRID * _GRID, MAX_STROKES, MAX_STROKES, MAX_STROKES, 1]
    order, bend, join, kind, number = _parts(jax.random.uniform(key, (sum(sizes),), jnp.float32), sizes)

    # All control points differ, so strokes seldom cover one another.
    cells = jnp.argsort(order)[: 4 * MAX_STROKES].reshape(MAX_STROKES, 4)
    points = jnp.stack([cells % _GRID, cells // _GRID], axis=-1) - (_GRID - 1) / 2
    # Inner control points outside the grid make the curves round.
    points = points.at[:, 1:3].multiply(1 + bend[:, None, None])

    # Two strokes of three begin where the one before began or ended.
    for stroke in range(1, MAX_STROKES):
        before = points[stroke - 1]
        starts = jnp.stack([points[stroke, 0], before[0], before[3]])
        points = points.at[stroke, 0].set(starts[(3 * join[stroke]).astype(int)])

    bases = jnp.asarray(_BASES)[jnp.searchsorted(_KINDS, kind)]
    ink = jnp.arange(MAX_STROKES) < 2 + jnp.searchsorted(_NUMBERS, number)

    dots = bases @ points  # their box says how to stretch the character to fill the page
    low = jnp.min(dots, axis=(0, 1), where=ink[:, None, None], initial=jnp.inf)
    high = jnp.max(dots, axis=(0, 1), where=ink[:, None, None], initial=-jnp.inf)
    span = jnp.maximum(high - low, 0.6 * jnp.max(high - low))
    points = (points - (low + high) / 2) * (2 * _EXTENT / span)
    return points, bases, ink.astype(jnp.float32)


def _parts(values: jax.Array, sizes: list[int]) -> list[jax.Array]:
    """Cut a vector of random numbers: one draw compiles several times faster than many."""
    return jnp.split(values, np.cumsum(sizes[:-1]))


def _hand(turn, shear, stretch, shift) -> tuple[jax.Array, jax.Array]:
    """How a drawing is slanted, stretched and misplaced: a matrix [2, 2] and a shift [2].

    The arguments are standard normal vectors [1], [1], [2] and [2].
    """
    cos, sin = jnp.cos(0.1 * turn[0]), jnp.sin(0.1 * turn[0])
    rotation = jnp.array([[cos, -sin], [sin, cos]])
    slant = jnp.array([[1.0, 0.1 * shear[0]], [0.0, 1.0]])
    return rotation @ slant * jnp.exp(0.1 * stretch), 0.06 * shift


def glyph(class_id: int | jax.Array, key: Key, size: int = 28) -> jax.Array:
    """Draw one example of a class.

    The ink at a pixel is the density of the strokes blurred by a Gaussian pen, softly cut off. The
    blur separates into rows and columns, so the whole picture is a product of two matrices.

    Args:
        class_id: which character.
        key: decides everything in which two drawings of it differ.
        size: height and width in pixels.

    Returns:
        float32 [size, size, 1] in 0..1, ink = 1.

    >>> jax.jit(glyph)(7, jax.random.key(0)).shape
    (28, 28, 1)
    """
    points, bases, ink = _program(class_id)
    sizes = [points.size, 1, 1, 1, 2, 2]
    jitter, width, *hand = _parts(jax.random.normal(key, (sum(sizes),), jnp.float32), sizes)
    points = points + 0.05 * jitter.reshape(points.shape)
    transform, shift = _hand(*hand)
    dots = (bases @ points) @ transform.T + shift  # [strokes, dots, 2]
    # A dot stands for the length of pen path around it.
    steps = jnp.linalg.norm(jnp.diff(dots, axis=1), axis=-1)  # [strokes, dots - 1]
    length = jnp.pad(steps, ((0, 0), (0, 1))) + jnp.pad(steps, ((0, 0), (1, 0)))
    pen = 0.042 * jnp.exp(0.1 * width)  # standard deviation of the blur
    weight = ink[:, None] * length / 2 / (pen * jnp.sqrt(2 * jnp.pi))  # a long line has density 1

    pixels = (jnp.arange(size) + 0.5) * (2 / size) - 1
    across = jnp.exp(-0.5 * ((pixels[:, None, None] - dots[..., 0]) / pen) ** 2)
    down = jnp.exp(-0.5 * ((pixels[:, None, None] - dots[..., 1]) / pen) ** 2)
    density = (weight * down).reshape(size, -1) @ across.reshape(size, -1).T
    return jnp.clip(2 * density - 0.5, 0.0, 1.0)[..., None].astype(jnp.float32)


# Who draws: `(class_id, key, size) -> [size, size, 1]`.
STYLES = {"strokes": glyph, "handwriting": handwriting.drawing}


@register_static
@dataclass(frozen=True)
class Glyphs:
    """Few-shot classification of procedurally drawn characters.

    Args:
        ways: number of classes in a task.
        shots: support examples of each class.
        queries: query examples of each class.
        split: "train" (10 000 classes), "validation" or "test" (1 000 each); no class is in two.
        size: height and width of the pictures in pixels.
        style: "strokes", as `glyph` draws: quick, angular characters; or "handwriting", rounder ones drawn by
            an unsteady hand (`bilevel.tasks.handwriting`), which take three times as long and prepare a
            learner for real characters: docs/glyphs.md.

    Raises:
        ValueError: for an unknown split or style, or a number that is too small or too large.

    >>> task = jax.jit(Glyphs(ways=5, shots=1, queries=2))(jax.random.key(0))
    >>> task.support[0].shape, task.query[1].tolist()
    ((5, 28, 28, 1), [0, 0, 1, 1, 2, 2, 3, 3, 4, 4])
    """

    ways: int = 5
    shots: int = 1
    queries: int = 1
    split: str = "train"
    size: int = 28
    style: Literal["strokes", "handwriting"] = "strokes"

    def __post_init__(self):
        for name, known in (("split", SPLITS), ("style", STYLES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, least in (("ways", 2), ("shots", 1), ("queries", 1), ("size", 8)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.ways > self.num_classes:
            raise ValueError(
                f"ways must be at most the {self.num_classes} {self.split} classes, got {self.ways}"
            )

    @property
    def num_classes(self) -> int:
        """How many classes the split has."""
        first, end = SPLITS[self.split]
        return end - first

    def __call__(self, key: Key) -> Task:
        """Draw a task: (x float32 [ways * n, size, size, 1], y int32 [ways * n]) twice."""
        class_key, example_key = jax.random.split(key)
        classes = SPLITS[self.split][0] + choose(class_key, self.num_classes, self.ways)
        keys = jax.random.split(example_key, (self.ways, self.shots + self.queries))
        draw = jax.vmap(jax.vmap(lambda c, k: STYLES[self.style](c, k, self.size), (None, 0)))
        return classification(draw(classes, keys), self.shots)
