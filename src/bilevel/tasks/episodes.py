"""Tasks of varying way and shot from labelled arrays, padded to one shape."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import register_dataclass

from bilevel.problem import Key, Task
from bilevel.tasks.few_shot import FewShot
from bilevel.tasks.sampling import choose

Padding = Literal["repeat", "zeros"]


def _require_range(name: str, low: int, high: int, least: int) -> None:
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (low, high))
    if not whole or not least <= low <= high:
        raise ValueError(
            f"{name} must be whole numbers, {least} <= lowest <= highest, got {low!r} and {high!r}"
        )


class Shots(Protocol):
    """How many support examples each class of a task has: `most` at most, and how that is drawn."""

    @property
    def most(self) -> int: ...

    def draw(self, key: Key, used: jax.Array, available: jax.Array) -> jax.Array:
        """int32 [ways], 0 where `used` is False and else in 1..min(most, available)."""
        ...


@dataclass(frozen=True)
class EqualShots:
    """One number of shots for all classes of a task, uniform in low..high.

    Raises:
        ValueError: when this is no range of positive whole numbers.

    >>> shots = EqualShots(2, 4).draw(jax.random.key(0), jnp.array([True, True, False]), jnp.full(3, 9))
    >>> int(shots[0]) == int(shots[1]), int(shots[2])
    (True, 0)
    """

    low: int = 1
    high: int = 10

    def __post_init__(self):
        _require_range("EqualShots", self.low, self.high, least=1)

    @property
    def most(self) -> int:
        """The highest number."""
        return self.high

    def draw(self, key: Key, used: jax.Array, available: jax.Array) -> jax.Array:
        """The same for every class; fewer only where a class has no more."""
        shots = jax.random.randint(key, (), self.low, self.high + 1, jnp.int32)
        return jnp.where(used, jnp.minimum(shots, available), 0)


@dataclass(frozen=True)
class UnequalShots:
    """A class-imbalanced support: every class draws its own number, uniform in low..high.

    Raises:
        ValueError: when this is no range of positive whole numbers.

    >>> UnequalShots(1, 5).draw(jax.random.key(0), jnp.array([True, False]), jnp.full(2, 9)).shape
    (2,)
    """

    low: int = 1
    high: int = 10

    def __post_init__(self):
        _require_range("UnequalShots", self.low, self.high, least=1)

    @property
    def most(self) -> int:
        """The highest number."""
        return self.high

    def draw(self, key: Key, used: jax.Array, available: jax.Array) -> jax.Array:
        """Independent draws."""
        shots = jax.random.randint(key, used.shape, self.low, self.high + 1, jnp.int32)
        return jnp.where(used, jnp.minimum(shots, available), 0)


@dataclass(frozen=True)
class MetaDatasetShots:
    """The imbalanced shots of Meta-Dataset: a random size of the support, shared out by class size.

        β ~ U(0, 1],   |S| = min(total, Σ_c ⌈β min(most, n_c)⌉),   α_c ~ U(log ½, log 2)
        k_c = min(⌊ R_c (|S| − ways) ⌋ + 1, most, n_c),   R_c = e^{α_c} n_c / Σ e^{α} n

    n_c counts what a class has left beside its queries.

    Args:
        most: the largest number of shots of a class; 100 in the paper.
        total: the largest support, 500 in the paper.

    Raises:
        ValueError: when one of them is below 1.

    Reference: Triantafillou et al., Meta-Dataset, 2020, appendix A.

    >>> shots = MetaDatasetShots(20, 50).draw(jax.random.key(0), jnp.ones(5, bool), jnp.full(5, 15))
    >>> bool((shots >= 1).all()), int(shots.sum()) <= 50
    (True, True)
    """

    most: int = 100
    total: int = 500

    def __post_init__(self):
        _require_range("MetaDatasetShots", self.most, max(self.most, self.total), least=1)
        if self.total < 1:
            raise ValueError(f"MetaDatasetShots: total must be at least 1, got {self.total}")

    def draw(self, key: Key, used: jax.Array, available: jax.Array) -> jax.Array:
        """As the formula says."""
        size_key, share_key = jax.random.split(key)
        beta = 1 - jax.random.uniform(size_key, (), jnp.float32)  # in (0, 1]
        most = jnp.minimum(self.most, available)
        size = jnp.sum(jnp.where(used, jnp.ceil(beta * most), 0))
        size = jnp.minimum(size, self.total)
        log_half = jnp.log(0.5)
        alpha = jax.random.uniform(share_key, used.shape, jnp.float32, log_half, -log_half)
        weight = jnp.where(used, jnp.exp(alpha) * available, 0)
        share = weight / jnp.sum(weight)
        shots = jnp.floor(share * jnp.maximum(size - jnp.sum(used), 0)).astype(jnp.int32) + 1
        return jnp.where(used, jnp.minimum(shots, most), 0)


@register_dataclass
@dataclass(frozen=True)
class VaryingFewShot:
    """Draw tasks whose number of classes and of shots vary, in arrays of one shape.

    A task has a random number of classes, `ways[0]`..`ways[1]` uniformly, labelled 0..; each has shots as
    `shots` says and as many queries as `data` says. All tasks have the shape of the largest one: the
    examples that a task does not have are padding, with label −1, behind the real ones. `cross_entropy`,
    prototypes and everything else of this package that goes by labels leaves them out.

    A network that normalizes over its batch sees padding all the same. So padding repeats the task's own
    examples in turn ("repeat"): each stands for itself as often as every other, up to one, and statistics
    over the batch are those of the real examples, exactly so when the padded size is a multiple of the real
    one. With "zeros" they would drift with the amount of padding; a network that treats every example by
    itself does not care, and zeros show at once what is padding.

    Args:
        data: labelled arrays, for instance `bl.tasks.omniglot(...)`. Its `queries` and `rotations` hold;
            its `ways` and `shots` do not.
        ways: fewest and most classes of a task.
        shots: `EqualShots`, `UnequalShots`, `MetaDatasetShots`, or any `Shots`.
        padding: "repeat" or "zeros".

    Raises:
        ValueError: when `ways` is no range of 2..the classes there are, some class has too few examples
            for its queries and one shot, or padding is neither.

    Returns:
        Tasks: x float32 [n, ...], y int32 [n], with n = most ways × most shots in the support (at most
        `shots.total` where there is one) and most ways × queries in the query.

    Reference: Triantafillou et al., Meta-Dataset, 2020.

    >>> import numpy as np
    >>> data = FewShot(np.zeros((60, 28, 28), np.uint8), np.arange(60) % 6, ways=2, shots=1, queries=2)
    >>> sample = VaryingFewShot(data, ways=(2, 5), shots=UnequalShots(1, 3))
    >>> task = sample(jax.random.key(0))
    >>> task.support[0].shape, task.query[1].shape
    ((15, 28, 28, 1), (10,))
    """

    data: FewShot
    ways: tuple[int, int] = field(default=(5, 20), metadata={"static": True})
    shots: Shots = field(default=EqualShots(), metadata={"static": True})
    padding: Padding = field(default="repeat", metadata={"static": True})

    def __post_init__(self):
        if not isinstance(self.data, FewShot):
            raise TypeError(
                f"VaryingFewShot: data must be a FewShot, got {type(self.data).__name__}; "
                "make one with bl.tasks.FewShot(images, labels, ways, shots, queries)"
            )
        if not _is_concrete(self.data.counts):
            return  # rebuilt inside a compiled function; it was checked before
        _require_range("VaryingFewShot: ways", *self.ways, least=2)
        if self.ways[1] > self.data.num_classes:
            raise ValueError(
                f"VaryingFewShot: ways must be at most the {self.data.num_classes} classes, "
                f"got {self.ways[1]}"
            )
        if self.padding not in ("repeat", "zeros"):
            raise ValueError(f"VaryingFewShot: padding must be repeat or zeros, got {self.padding!r}")
        fewest = int(self.data.counts.min())
        if fewest < self.data.queries + 1:
            raise ValueError(
                f"VaryingFewShot: every class needs {self.data.queries} queries and a shot, but one has "
                f"{fewest} examples; take fewer queries"
            )

    def __call__(self, key: Key) -> Task:
        """Draw a task: (x [n, ...], y int32 [n], −1 where padded) twice."""
        way_key, class_key, shot_key, example_key = jax.random.split(key, 4)
        data, most = self.data, self.ways[1]
        ways = jax.random.randint(way_key, (), self.ways[0], most + 1, jnp.int32)
        used = jnp.arange(most) < ways
        chosen = choose(class_key, data.num_classes, most)
        turns, classes = jnp.divmod(chosen, data.counts.shape[0])
        counts = data.counts[classes]
        shots = self.shots.draw(shot_key, used, counts - data.queries)
        row = data.queries + self.shots.most
        picks = jax.vmap(_choose_first, (0, 0, None))(jax.random.split(example_key, most), counts, row)
        places = data.starts[classes][:, None] + picks  # [ways, queries + shots]
        column = jnp.arange(row)
        labels = jnp.broadcast_to(jnp.arange(most, dtype=jnp.int32)[:, None], picks.shape)
        asked = used[:, None] & (column < data.queries)
        given = used[:, None] & (column >= data.queries) & (column < data.queries + shots[:, None])

        def part(kept, length):
            order = jnp.argsort(~kept.ravel(), stable=True)[:length]  # the real ones first
            total = jnp.sum(kept)
            real = jnp.arange(length) < total
            again = order[jnp.arange(length) % total] if self.padding == "repeat" else order
            x = _pictures(data, places.ravel()[again], jnp.repeat(turns, row)[again])
            if self.padding == "zeros":
                x = jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x, 0)
            return x, jnp.where(real, labels.ravel()[again], -1)

        largest = min(most * self.shots.most, max(getattr(self.shots, "total", most * self.shots.most), most))
        return Task(part(given, largest), part(asked, most * data.queries))


def _choose_first(key: Key, total: jax.Array, count: int) -> jax.Array:
    """`count` integers whose first min(total, count) are different ones of 0..total-1, in random order."""
    picks = choose(key, jnp.maximum(total, count), count)
    # A class smaller than a row: those of its range come first, and the rest is never used.
    order = jnp.argsort(picks >= total, stable=True)
    return jnp.minimum(picks[order], total - 1)


def _pictures(data: FewShot, places: jax.Array, turns: jax.Array) -> jax.Array:
    """Examples as float32, turned where classes are turned."""
    x = data.images[places]
    if data.rotations:
        sideways = jnp.swapaxes(x, 1, 2)
        # By 90, 180 and 270 degrees counterclockwise, as jnp.rot90.
        views = (x, jnp.flip(sideways, 1), jnp.flip(x, (1, 2)), jnp.flip(sideways, 2))
        turns = turns.reshape(-1, 1, 1, 1)
        x = jnp.select([turns == k for k in range(4)], list(views))
    return x.astype(jnp.float32) / (255 if x.dtype == jnp.uint8 else 1)


def _is_concrete(x) -> bool:
    """Whether this is an array with values: pytrees are also rebuilt of tracers and of placeholders."""
    return isinstance(x, jax.Array) and not isinstance(x, Tracer)
