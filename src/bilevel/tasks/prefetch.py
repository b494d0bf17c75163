"""Tasks made on the host, ahead of time, for data that do not fit on the device."""

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevel.problem import Key, Task
from bilevel.tasks.stored import load

Draw = Callable[[np.random.Generator], Task]

_KEPT = 2  # batches that stay after they were taken: several devices ask for the same one


@dataclass(frozen=True, eq=False)
class HostFewShot:
    """`FewShot` in NumPy: draw tasks from pictures that stay where they are, for instance on the disk.

    It has the arguments of `FewShot` and draws from the same distribution, other tasks for the same key.

    Args:
        images: uint8 [N, H, W, C], for instance mapped; sorted by class, as `load` gives them.
        labels: integers [N], ascending.
        ways: number of classes in a task.
        shots: support examples of each class.
        queries: query examples of each class.
        rotations: let every class turned by 90, 180 and 270 degrees be a class of its own.

    Raises:
        TypeError: when the pictures are not uint8.
        ValueError: when shapes do not fit, labels do not ascend, or a class is too small.

    >>> images, labels = np.zeros((30, 28, 28, 1), np.uint8), np.arange(30) // 10
    >>> task = HostFewShot(images, labels, ways=2, shots=1, queries=4)(np.random.default_rng(0))
    >>> task.support[0].shape, task.query[0].shape, task.support[1].tolist()
    ((2, 28, 28, 1), (8, 28, 28, 1), [0, 1])
    """

    images: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    ways: int
    shots: int
    queries: int
    rotations: bool = False
    starts: np.ndarray = field(init=False, repr=False)
    counts: np.ndarray = field(init=False, repr=False)

    def __post_init__(self):
        for name, least in (("ways", 2), ("shots", 1), ("queries", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.images.dtype != np.uint8:
            raise TypeError(
                f"images must be uint8, got {self.images.dtype}; convert them with `bilevel convert`"
            )
        labels = np.asarray(self.labels)
        if self.images.ndim != 4 or labels.shape != self.images.shape[:1] or not len(labels):
            raise ValueError(
                f"images must be [N, H, W, C] and labels [N], got {self.images.shape} and {labels.shape}"
            )
        if (np.diff(labels) < 0).any():
            raise ValueError(
                "labels must ascend, so that a class is read in one place; sort, or convert first"
            )
        if self.rotations and self.images.shape[1] != self.images.shape[2]:
            raise ValueError(f"rotations need square pictures [N, H, H, C], got images {self.images.shape}")
        classes, starts, counts = np.unique(labels, return_index=True, return_counts=True)
        object.__setattr__(self, "starts", starts)
        object.__setattr__(self, "counts", counts)
        if self.ways > self.num_classes:
            raise ValueError(f"ways must be at most the {self.num_classes} classes, got {self.ways}")
        fewest = int(np.argmin(counts))
        if self.shots + self.queries > counts[fewest]:
            raise ValueError(
                f"shots + queries must be at most the examples of every class, got {self.shots} + "
                f"{self.queries}, but class {classes[fewest]} has {counts[fewest]}"
            )

    @property
    def num_classes(self) -> int:
        """How many classes there are to draw from, rotated ones included."""
        return len(self.counts) * (4 if self.rotations else 1)

    def __call__(self, rng: np.random.Generator) -> Task:
        """Draw a task: (x uint8 [ways * n, H, W, C], y int32 [ways * n]) twice."""
        turns, classes = np.divmod(rng.choice(self.num_classes, self.ways, replace=False), len(self.counts))
        total = self.shots + self.queries
        places = [self.starts[c] + rng.choice(self.counts[c], total, replace=False) for c in classes]
        support, query = np.split(np.stack(places), [self.shots], axis=1)
        return Task(self._examples(support, turns), self._examples(query, turns))

    def _examples(self, places: np.ndarray, turns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pictures [ways * n, H, W, C] at places [ways, n], and their labels."""
        images = np.asarray(self.images)[places]  # gathered once: a copy of it takes as long
        for way in np.flatnonzero(turns):
            images[way] = np.rot90(images[way], turns[way], axes=(1, 2))
        labels = np.repeat(np.arange(len(places), dtype=np.int32), places.shape[1])
        return images.reshape(-1, *images.shape[2:]), labels


@dataclass(frozen=True, eq=False)
class HostTasks:
    """A sampler like any other, `sample(key) -> Task`, whose tasks are drawn by NumPy on the host.

    Task t of the batch of a key depends on the key and t alone: it is drawn by a generator that is seeded
    with both. So a resumed run sees the batches that it would have seen, bit for bit, and whether a batch was
    made ahead of time changes nothing but the time. `expecting(keys)` has threads make the batches of the
    coming keys; a key that was not expected is drawn when it is asked for.

    Args:
        draw: `draw(rng) -> Task` of NumPy arrays, of the same shapes every time; called in several threads
            at once. uint8 arrays travel as they are and are shown as 0..1 on the device.
        num_tasks: of a batch; None for single tasks, without a leading axis, for evaluation.
        threads: that make batches ahead of time.
        ahead: how many batches may wait, which is also what they cost in host memory.

    Raises:
        TypeError: when `draw` cannot be called.
        ValueError: when a number is below 1, or later when shapes change from task to task.

    Cost: one call of the host a batch, and the way of its bytes to the device.

    >>> few_shot = HostFewShot(np.zeros((30, 8, 8, 1), np.uint8), np.arange(30) // 10, 2, 1, 4)
    >>> sample = HostTasks(few_shot, num_tasks=3)
    >>> sample(jax.random.key(0)).query[0].shape
    (3, 8, 8, 8, 1)
    """

    draw: Draw
    num_tasks: int | None = None
    threads: int = 2
    ahead: int = 4
    _like: Task = field(init=False, repr=False)
    _coming: "_Coming" = field(init=False, repr=False)

    def __post_init__(self):
        if not callable(self.draw):
            raise TypeError(f"draw must be a function of a generator, got {type(self.draw).__name__}")
        for name in ("num_tasks", "threads", "ahead"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        object.__setattr__(self, "_like", jax.tree.map(_struct, self.draw(np.random.default_rng(0))))
        object.__setattr__(self, "_coming", _Coming())

    def __call__(self, key: Key) -> Task:
        """The batch of a key, or its task."""
        return self._fetch(key, None)

    def rows(self, key: Key, rows: jax.Array) -> Task:
        """Those tasks of the batch alone, for a device that has no use for the others."""
        return self._fetch(key, rows)

    @contextmanager
    def expecting(self, keys: Any) -> Iterator[None]:
        """Make the batches of these keys ahead of time, in their order, while this context lasts.

        Args:
            keys: random keys [S], or their numbers [S, words].

        Warns:
            UserWarning: when `grain`, which does it, is missing: each batch is then waited for.
        """
        numbers = jax.random.key_data(keys) if jnp.issubdtype(keys.dtype, jax.dtypes.prng_key) else keys
        numbers = np.asarray(numbers)
        try:
            self._coming.begin(numbers, _ahead(self._batch, numbers, self.threads, self.ahead))
        except ImportError as error:
            warnings.warn(f"{error}; until then each batch is waited for", stacklevel=4)
        try:
            yield
        finally:
            self._coming.end()

    def _fetch(self, key: Key, rows: jax.Array | None) -> Task:
        count = self.num_tasks if rows is None else rows.shape[0]
        lead = () if count is None else (count,)
        like = jax.tree.map(lambda s: jax.ShapeDtypeStruct((*lead, *s.shape), s.dtype), self._like)
        arguments = (jax.random.key_data(key),) if rows is None else (jax.random.key_data(key), rows)
        # Pure: the same key always gives the same batch, so XLA may call as often as it likes.
        raw = jax.pure_callback(self._answer, like, *arguments, vmap_method="broadcast_all")
        return jax.tree.map(lambda x: x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x, raw)

    def _answer(self, numbers: Any, rows: Any = None) -> Task:
        """What the compiled program calls: numbers [..., words], with axes in front under `vmap`."""
        numbers = np.asarray(numbers)
        lead = numbers.shape[:-1]
        batches = []
        for i, number in enumerate(numbers.reshape(-1, numbers.shape[-1])):
            batch = self._coming.take(number)
            batch = self._batch(number) if batch is None else batch
            if rows is not None:
                wanted = np.asarray(rows).reshape(-1, np.shape(rows)[-1])[i]
                batch = jax.tree.map(lambda x, wanted=wanted: x[wanted], batch)
            batches.append(batch)
        if not lead:
            return batches[0]
        return jax.tree.map(lambda *x: np.stack(x).reshape(*lead, *x[0].shape), *batches)

    def _batch(self, number: np.ndarray) -> Task:
        """The batch of a key's number, leaves [num_tasks, n, ...]."""
        tasks = [self.draw(np.random.default_rng([*number.tolist(), t])) for t in range(self.num_tasks or 1)]
        one = self.num_tasks is None
        try:
            batch = tasks[0] if one else jax.tree.map(lambda *x: np.stack(x), *tasks)
            got = jax.tree.map(lambda x: _struct(x if one else x[0]), batch)
        except ValueError as error:  # NumPy's or JAX's: the tasks of a batch differ
            raise ValueError(f"draw must give the same shapes every time: {error}") from error
        if got != self._like:
            raise ValueError(f"draw must give the same shapes every time, got {got} after {self._like}")
        return jax.tree.map(lambda x, like: np.asarray(x, like.dtype), batch, self._like)


def hosted(
    split: str,
    ways: int,
    shots: int,
    queries: int,
    folder: str | os.PathLike,
    rotations: bool = False,
    num_tasks: int | None = None,
) -> HostTasks:
    """Draw few-shot tasks from a stored set that does not fit on the device.

    Args:
        split: "train", "validation" or "test".
        ways, shots, queries, rotations: see `HostFewShot`.
        folder: made by `bilevel convert`; its pictures stay on the disk.
        num_tasks: of a batch, for training; None for single tasks, for evaluation.

    Raises:
        FileNotFoundError: when the folder is none that `bilevel convert` made.
        ValueError: when it is damaged, has no such split, or the task does not fit the data.
    """
    return HostTasks(HostFewShot(*load(folder, split), ways, shots, queries, rotations), num_tasks)


def _struct(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.canonicalize_dtype(np.asarray(x).dtype))


def _ahead(
    make: Callable[[np.ndarray], Task], numbers: np.ndarray, threads: int, ahead: int
) -> Iterator[Task]:
    try:
        import grain
    except ImportError as error:
        raise ImportError("making tasks ahead of time needs grain: pip install bilevel[data]") from error
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, ahead))
    return iter(grain.MapDataset.source(list(numbers)).map(make).to_iter_dataset(options))


class _Coming:
    """Batches that are being made, in the order in which they will be asked for."""

    def __init__(self):
        self._lock = threading.Lock()
        self.end()

    def begin(self, numbers: np.ndarray, batches: Iterator[Task]) -> None:
        with self._lock:
            self._batches = batches
            self._next = 0
            self._place = {number.tobytes(): i for i, number in enumerate(numbers)}

    def end(self) -> None:
        with self._lock:
            self._batches, self._next, self._place = None, 0, {}
            self._kept: OrderedDict[bytes, Task] = OrderedDict()

    def take(self, number: np.ndarray) -> Task | None:
        """The batch of a key's number if it is the next one, or one of the last; else None."""
        name = number.tobytes()
        with self._lock:
            if name not in self._kept and self._batches is not None and self._place.get(name) == self._next:
                self._kept[name] = next(self._batches)
                self._next += 1
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return self._kept.get(name)
