"""Handwriting that nobody wrote: characters of smooth, connected pen strokes, drawn by an unsteady hand.

A character is a program, fixed by its number: one to four strokes, each a chain of up to four segments that
are straight or arcs, joined smoothly or at a corner; a stroke begins on one before it or beside the first,
and sometimes repeats its shape. A drawing runs the program with other lengths, angles and joints, then
slants, stretches, bends and misplaces the whole: what differs between two drawings is what differs between
two hands, not the pixels. It is closer to real characters than `glyph`, and costs about three times as much.

S strokes of K segments; `[S, K]` arrays describe segments, and everything is a product with small constant
matrices: loops and searches would compile many times slower.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import Key

S, K = 4, 4
_DOTS = 192  # a character is drawn as so many dots of the pen
_OUTLINE = 96  # so many say how large it is
_SEED = 1624  # what the class numbers mean; changing it changes every class
_DEGREE = np.float32(np.pi / 180)

# What a character is made of: values, and how probable each is.
_STROKES = ((1, 2, 3, 4), (0.20, 0.32, 0.28, 0.20))
_SEGMENTS = ((1, 2, 3, 4), (0.36, 0.30, 0.20, 0.14))
_SEGMENTS_OF_ONE = ((1, 2, 3, 4), (0.03, 0.20, 0.37, 0.40))  # a character of one stroke has a longer one
_TURNS = ((0, 40, 90, 180, 270, 330), (0.42, 0.12, 0.17, 0.17, 0.08, 0.04))  # degrees along a segment
_CORNERS = ((0, 45, 90, 135), (0.34, 0.08, 0.42, 0.16))  # degrees before a segment
_HEADINGS = ((0, 90, 135, 45, 180, -45), (0.36, 0.40, 0.09, 0.09, 0.03, 0.03))  # 0 = right, 90 = down
_LENGTHS = ((0.12, 0.55, 1.0), (0.05, 0.40, 0.55))  # a dot, a short and a long stroke
_SAME_SENSE = 0.65  # strokes that turn one way throughout
_REPEATS, _ATTACHED, _ATTACHED_REPEATS = 0.18, 0.6, 0.1
_SIZES = (0.4, 0.76)  # half the longer side of a character, where half the page is 1

# What the hand adds: standard deviations.
_LENGTH, _TURN, _BEND, _CORNER, _HEADING = 0.15, 0.1, 0.1, 0.12, 0.08
_JOINT, _OFFSET, _GAP = 0.06, 0.08, 0.025
_ROTATION, _SHEAR, _STRETCH, _SHIFT, _WAVE = 0.1, 0.12, 0.14, 0.11, 0.05
_PEN, _PENS = 0.044, 0.22  # of the blur, and of its logarithm between drawings

_UP_TO = np.tril(np.ones((K, K), np.float32))  # sums over this segment and those before it
_BEFORE = _UP_TO - np.eye(K, dtype=np.float32)
_ALL_UP_TO = np.tril(np.ones((S * K, S * K), np.float32))
_LATER = np.arange(S) > 0  # strokes with one before them
_INNER = (np.arange(K) > 0).astype(np.float32)  # segments with one before them


class Program(NamedTuple):
    """A character. Angles in radians, lengths in units of a character before it is fitted to the page.

    Args:
        length: [S, K], 0 where there is no segment.
        turn: [S, K], by how much the pen turns along a segment.
        corner: [S, K], by how much it turns before one.
        heading: [S], of a stroke's begin.
        joint: [S, S, K], one-hot: on which segment of which stroke a stroke begins; or all zero.
        at: [S], how far along that segment.
        offset: [S, 2], where a stroke without a joint begins, from the first stroke's begin.
        scale: [], what fits the character to the page.
    """

    length: jax.Array
    turn: jax.Array
    corner: jax.Array
    heading: jax.Array
    joint: jax.Array
    at: jax.Array
    offset: jax.Array
    scale: jax.Array


def program(class_id: int | jax.Array) -> Program:
    """The program of a character.

    >>> bool((jax.jit(program)(7).length[0] > 0).any())
    True
    """
    key = jax.random.fold_in(jax.random.key(_SEED), class_id)
    of_segment, of_stroke, (number, size) = _draws(jax.random.uniform, key, 6, 11, 2)
    strokes = _pick(number, *_STROKES)
    segments = jnp.where(
        strokes == 1, _pick(of_stroke[0], *_SEGMENTS_OF_ONE), _pick(of_stroke[0], *_SEGMENTS)
    )
    exists = (np.arange(K) < segments[:, None]) & (np.arange(S) < strokes)[:, None]

    sense = jnp.where(of_segment[1] < 0.5, -1.0, 1.0)
    sense = jnp.where(of_stroke[1][:, None] < _SAME_SENSE, sense[:, :1], sense)
    turn = _pick(of_segment[2], *_TURNS) * _DEGREE * sense * (0.85 + 0.3 * of_segment[3])
    corner = _pick(of_segment[4], *_CORNERS) * _DEGREE * _INNER
    corner = corner * jnp.where(of_segment[5] < 0.7, sense, -sense)
    length = (0.35 + 0.65 * of_segment[0]) * (1 + jnp.abs(turn) / np.pi)  # a bow is longer, its loop as wide
    length = length * _pick(of_stroke[2], *_LENGTHS)[:, None]
    heading = _pick(of_stroke[3], *_HEADINGS) * _DEGREE + 0.25 * (of_stroke[4] - 0.5)

    repeats = (of_stroke[5] < _REPEATS) & _LATER
    rows = [jnp.eye(S)[0]]
    for stroke in range(1, S):
        rows.append(jnp.where(repeats[stroke], rows[-1], jnp.eye(S)[stroke]))
    shape_of = jnp.stack(rows)  # [S, S], one-hot: whose shape a stroke has
    length, turn, corner, heading, segments = (
        shape_of @ values for values in (length, turn, corner, heading, segments)
    )
    length = length * exists

    attached = (of_stroke[6] < jnp.where(repeats, _ATTACHED_REPEATS, _ATTACHED)) & _LATER
    parent = jnp.floor(of_stroke[7] * np.arange(S))[:, None] == np.arange(S)
    segment = jnp.floor(of_stroke[8] * (parent @ segments))[:, None] == np.arange(K)
    joint = (attached[:, None, None] & parent[:, :, None] & segment[:, None, :]).astype(jnp.float32)
    # Mostly at an end or in the middle of a segment.
    at = jnp.where(of_stroke[9] < 0.7, jnp.round(of_stroke[9] / 0.35) / 2, of_stroke[10])
    offset = jnp.stack([2.0 * (of_stroke[10] - 0.5), 1.7 * (of_stroke[5] - 0.5)], -1)
    offset = offset * (~attached & _LATER)[:, None]

    whole = Program(length, turn, corner, heading, joint, at, offset, jnp.float32(1))
    dots, _ = trace(whole, _OUTLINE)
    extent = jnp.maximum(jnp.max(dots.max(0) - dots.min(0)), 0.25)  # a mere dot stays small
    return whole._replace(scale=2 * (_SIZES[0] + (_SIZES[1] - _SIZES[0]) * size) / extent)


def drawing(class_id: int | jax.Array, key: Key, size: int = 28) -> jax.Array:
    """Draw one example of a character.

    Args:
        class_id: which character.
        key: decides everything in which two drawings of it differ.
        size: height and width in pixels.

    Returns:
        float32 [size, size, 1] in 0..1, ink = 1.

    >>> jax.jit(drawing)(7, jax.random.key(0)).shape
    (28, 28, 1)
    """
    character = program(class_id)
    of_segment, of_stroke, rest = _draws(jax.random.normal, key, 4, 6, 19)
    spread = (_OFFSET * jnp.stack(of_stroke[2:4], -1)) * (character.offset != 0)
    spread = spread + _GAP * jnp.stack(of_stroke[4:6], -1) * _LATER[:, None]
    shaken = character._replace(
        length=character.length * jnp.exp(_LENGTH * of_segment[0]),
        turn=character.turn * (1 + _TURN * of_segment[1]) + _BEND * of_segment[2],
        corner=character.corner + _CORNER * of_segment[3] * _INNER,
        heading=character.heading + _HEADING * of_stroke[0],
        at=jnp.clip(character.at + _JOINT * of_stroke[1], 0, 1),
        offset=character.offset + spread,
    )
    dots, path = trace(shaken, _DOTS)
    dots = (dots - (dots.max(0) + dots.min(0)) / 2) * character.scale
    dots = _misplace(dots, rest[:18])
    pen = _PEN * jnp.exp(_PENS * rest[18])
    # A dot stands for the length of pen path around it; a long line has density 1.
    weight = path * character.scale / _DOTS / (pen * np.sqrt(2 * np.pi))
    pixels = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    across = jnp.exp(-0.5 * ((pixels[:, None] - dots[:, 0]) / pen) ** 2)
    down = jnp.exp(-0.5 * ((pixels[:, None] - dots[:, 1]) / pen) ** 2)
    return jnp.clip(1.12 * weight * (down @ across.T) - 0.1, 0.0, 1.0)[..., None].astype(jnp.float32)


def _misplace(dots: jax.Array, z: jax.Array) -> jax.Array:
    """How a drawing `[n, 2]` is slanted, stretched, bent and shifted, by 18 standard normal numbers."""
    cos, sin = jnp.cos(_ROTATION * z[0]), jnp.sin(_ROTATION * z[0])
    turn = jnp.array([[cos, -sin], [sin, cos]])
    slant = jnp.array([[1.0, _SHEAR * z[1]], [0.0, 1.0]])
    dots = dots @ (turn @ slant * jnp.exp(_STRETCH * z[2:4])).T
    slow = jnp.sin(1.6 * dots @ z[6:10].reshape(2, 2) + 3 * z[10:12])
    fast = jnp.sin(3.0 * dots @ z[12:16].reshape(2, 2) + 3 * z[16:18])
    return dots + _WAVE * (slow + fast) + _SHIFT * z[4:6]


def trace(character: Program, count: int) -> tuple[jax.Array, jax.Array]:
    """Dots [count, 2] at even distances along all strokes, and the length of the whole path."""
    length, turn = character.length, character.turn
    heading = character.heading[:, None] + character.corner @ _UP_TO.T + turn @ _BEFORE.T
    starts = jnp.einsum("kj,sjd->skd", _BEFORE, _arc(1.0, length, turn, heading))  # from the stroke's begin
    # Where strokes begin. The joints of a stroke point to earlier ones: three hops reach the first.
    joint = character.joint
    there = [jnp.einsum("spk,pk->s", joint, values) for values in (length, turn, heading)]
    hop = _arc(character.at, *there) + jnp.einsum("spk,pkd->sd", joint, starts) + character.offset
    back = joint.sum(-1)
    begin = hop + back @ hop
    begin = begin + back @ (back @ begin)
    starts = (starts + begin[:, None]).reshape(S * K, 2)

    flat = length.reshape(-1)
    ends = _ALL_UP_TO @ flat
    places = (np.arange(count, dtype=np.float32) + 0.5) / count * ends[-1]
    done = (places[:, None] >= ends).astype(jnp.float32)
    here = jnp.concatenate([jnp.ones((count, 1)), done[:, :-1]], axis=1) - done  # [count, S K], one-hot
    columns = (flat, turn.reshape(-1), heading.reshape(-1), ends - flat)
    found = here @ jnp.concatenate([starts, jnp.stack(columns, -1)], axis=1)
    along = (places - found[:, 5]) / jnp.maximum(found[:, 2], 1e-6)
    return found[:, :2] + _arc(along, found[:, 2], found[:, 3], found[:, 4]), ends[-1]


def _arc(part, length: jax.Array, turn: jax.Array, heading: jax.Array) -> jax.Array:
    """Where a pen is that has gone `part` of an arc: its chord, [..., 2]."""
    half = turn * part / 2
    chord = length * part * jnp.sinc(half / np.pi)
    return chord[..., None] * jnp.stack([jnp.cos(heading + half), jnp.sin(heading + half)], axis=-1)


def _draws(draw, key: Key, per_segment: int, per_stroke: int, rest: int):
    """Random numbers in one draw, which compiles several times faster than many."""
    counts = [per_segment * S * K, per_stroke * S, rest]
    parts = jnp.split(draw(key, (sum(counts),), jnp.float32), np.cumsum(counts)[:-1])
    return parts[0].reshape(per_segment, S, K), parts[1].reshape(per_stroke, S), parts[2]


def _pick(u: jax.Array, values, probabilities) -> jax.Array:
    """The value that a uniform number stands for: a sum of steps."""
    edges = np.cumsum(probabilities)[:-1].astype(np.float32)
    steps = np.diff(np.asarray(values, np.float32))
    return values[0] + (u[..., None] > edges).astype(jnp.float32) @ steps
