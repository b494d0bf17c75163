"""What the estimators that compare values share: noise, chunks, checks, and the error of a mean."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevel.dependence import unused_leaves
from bilevel.hypergrad.parts import is_float
from bilevel.problem import Key, Meta, Scalar

DOUBTFUL = math.sqrt(0.5)  # above it, more than half of the squared length of an estimate is noise


def draw(key: Key, meta: Meta, still: frozenset[str] = frozenset()) -> Meta:
    """Standard normal noise like `meta`; exactly zero in the leaves that are to keep `still`.

    >>> noise = draw(jax.random.key(0), {"a": jnp.ones(2), "b": jnp.ones(2)}, frozenset({"['b']"}))
    >>> print(noise["b"], bool(jnp.all(noise["a"])))
    [0. 0.] True
    """
    return at_rest(optax.tree.random_like(key, meta), still)


def at_rest(noise: Meta, still: frozenset[str]) -> Meta:
    """Noise, zero in the leaves that are to keep `still`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if jax.tree_util.keystr(path) in still else leaf, noise
    )


def unread(value: Callable[[Meta], Scalar], meta: Meta) -> frozenset[str]:
    """The leaves that `value` cannot depend on.

    Their gradient is zero. Noise put into them would come back as noise in their gradient, and the reader
    of `zero_leaves` would not learn that nothing reads them.
    """
    return frozenset(unused_leaves(value, meta))


def shift(meta: Meta, scale: float | Scalar, direction: Meta) -> Meta:
    """θ + scale · direction, each leaf in its own dtype."""
    return jax.tree.map(lambda m, d: (m + scale * d).astype(m.dtype), meta, direction)


def map_chunks(function: Callable, xs: Any, chunk: int | None) -> Any:
    """`function` over the leading axis of `xs`, `chunk` rows side by side; all of them for None.

    A chunk of 1 runs them in turn without `vmap`, for functions that do not batch.

    >>> print(map_chunks(lambda x: 2 * x, jnp.arange(5), 2))
    [0 2 4 6 8]
    """
    if chunk is None:
        return jax.vmap(function)(xs)
    return jax.lax.map(function, xs, batch_size=None if chunk == 1 else chunk)


def sum_chunks(function: Callable, xs: Any, chunk: int | None) -> Any:
    """The sum of `map_chunks`, in float32 or wider, with no more than `chunk` terms held at a time.

    >>> print(sum_chunks(lambda x: 2 * x, jnp.arange(5), 2))
    20
    """
    count = jax.tree.leaves(xs)[0].shape[0]

    def wide(leaf):  # thousands of terms do not add up in bfloat16
        return leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if is_float(leaf) else leaf

    def summed(part):
        if chunk == 1:
            return jax.tree.map(wide, function(jax.tree.map(lambda leaf: leaf[0], part)))
        return jax.tree.map(lambda leaf: wide(leaf).sum(0), jax.vmap(function)(part))

    if chunk is None or count <= chunk:
        return summed(xs)
    whole = count // chunk * chunk
    parts = jax.tree.map(lambda leaf: leaf[:whole].reshape(-1, chunk, *leaf.shape[1:]), xs)
    like = jax.eval_shape(summed, jax.tree.map(lambda leaf: leaf[0], parts))
    total, _ = jax.lax.scan(
        lambda total, part: (optax.tree.add(total, summed(part)), None),
        jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like),
        parts,
    )
    if whole < count:
        total = optax.tree.add(total, summed(jax.tree.map(lambda leaf: leaf[whole:], xs)))
    return total


def error_stats(sum_of_squares: Scalar, mean: Meta, count: int) -> dict[str, Scalar]:
    """`standard_error`: that of a mean of `count` gradients, as a multiple of the length of the mean.

        √( (Σ|gᵢ|² − N|ḡ|²) / (N (N − 1)) ) / |ḡ|

    One gradient tells nothing of its error: then there is no such figure.

    >>> gradients = jnp.array([[1.0, 0.0], [3.0, 0.0]])
    >>> error_stats(optax.tree.norm(gradients, squared=True), gradients.mean(0), 2)["standard_error"]
    Array(0.5, dtype=float32)
    """
    if count < 2:
        return {}
    length = optax.tree.norm(mean, squared=True)
    variance = jnp.maximum(sum_of_squares - count * length, 0.0) / (count * (count - 1))
    # A gradient of exactly zero has no relative error: nothing was found, with certainty or without.
    ratio = jnp.sqrt(variance) / jnp.where(length == 0, 1.0, jnp.sqrt(length))
    return {"standard_error": jnp.where(length == 0, 0.0, ratio)}


def resolution(meta: Meta, sigma: float) -> dict[str, Scalar]:
    """`resolution`: the spacing of the numbers near θ as a multiple of σ, of the leaf where it is coarsest.

    >>> print(round(float(resolution(jnp.bfloat16(1.0), 0.001)["resolution"]), 1))
    7.8
    """
    spacings = [
        float(jnp.finfo(leaf.dtype).eps) * jnp.sqrt(jnp.mean(jnp.square(leaf.astype(float)))) / sigma
        for leaf in jax.tree.leaves(meta)
        if leaf.size
    ]
    return {"resolution": jnp.max(jnp.stack(spacings))} if spacings else {}


def noise_doubts(estimator: Any, stats: Mapping[str, float], count: str, remedy: str) -> list[str]:
    """What to say when the estimate is mostly noise; `count` is the field that sets how many are drawn."""
    error, drawn, said = stats.get("standard_error"), getattr(estimator, count), []
    if stats.get("resolution", 0.0) > 0.1:
        said = [
            f"{type(estimator).__name__}: meta is moved by sigma={estimator.sigma:g}, and the spacing of "
            f"numbers of its size and type is {stats['resolution']:.2g} times that: the moves are rounded, "
            "and the hypergradient with them. Raise sigma, scale meta down, or give it a wider type"
        ]
    if error is None or error <= DOUBTFUL:
        return said
    return [
        *said,
        f"{type(estimator).__name__}: the hypergradient is mostly noise: its standard error is "
        f"{error:.0%} of its length with {count}={drawn} (more than {DOUBTFUL:.0%} is doubtful). The error "
        f"falls as 1/√{count}: {remedy}, or take smaller outer steps, which average over calls",
    ]
