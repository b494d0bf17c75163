"""Pictures on disk in a form that is safe to open and is not read into memory: the stored format.

A folder with three files, none of them a pickle:

    images.npy     uint8 [N, H, W, C], sorted by split, then by class
    labels.npy     int32 [N], places in the list of classes
    classes.json   version, source, classes (name, split, count), SHA-256 of the two arrays

A split is one stretch of the file, so reading it maps it and copies nothing. `bilevel convert` makes the
folder; classes.json comes last and the whole appears by renaming, so there is no half of one.
"""

import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.tasks.download import hash_of
from bilevel.tasks.few_shot import FewShot

VERSION = 1
SPLITS = ("train", "validation", "test")
FILES = ("images.npy", "labels.npy", "classes.json")
_AGAIN = "make it again with `bilevel convert`"


@dataclass(frozen=True, eq=False)
class Stored:
    """A stored set of pictures, opened.

    Args:
        images: uint8 [N, H, W, C], mapped from the disk.
        labels: int32 [N], places in `names`.
        names: of the classes.
        splits: of the classes: "train", "validation" or "test".
        source: what the pictures were read from.
    """

    images: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    names: tuple[str, ...] = field(repr=False)
    splits: tuple[str, ...] = field(repr=False)
    source: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a picture."""
        return self.images.shape[1:]

    def counts(self) -> dict[str, tuple[int, int]]:
        """How many classes and pictures each split has."""
        per_class = np.bincount(self.labels, minlength=len(self.names))
        return {
            split: (
                self.splits.count(split),
                int(per_class[[s == split for s in self.splits]].sum()),
            )
            for split in SPLITS
            if split in self.splits
        }

    def summary(self) -> str:
        """A line a split."""
        shape = " x ".join(map(str, self.image_shape))
        return "\n".join(
            f"{split}: {classes} classes, {pictures} pictures of {shape}"
            for split, (classes, pictures) in self.counts().items()
        )

    def of(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """The pictures and labels of a split: views of the mapped file.

        Raises:
            ValueError: when there is no such split.
        """
        if split not in self.splits:
            raise ValueError(
                f"split must be one of {', '.join(s for s in SPLITS if s in self.splits)}, got {split!r}"
            )
        first = self.splits.index(split)
        last = first + self.splits.count(split) - 1
        begin, end = np.searchsorted(self.labels, [first, last + 1])
        return self.images[begin:end], self.labels[begin:end]


def open_stored(folder: str | os.PathLike, verify: bool = False) -> Stored:
    """Open a folder that `bilevel convert` made.

    Args:
        folder: with images.npy, labels.npy and classes.json.
        verify: read all pictures once and compare their SHA-256; the labels' is always compared.

    Raises:
        FileNotFoundError: when it is no such folder.
        ValueError: when a file is damaged, cut off, or does not fit the others.
    """
    folder = Path(folder).expanduser()
    about = _read_json(folder)
    images = _open_array(folder / "images.npy", "uint8 [N, H, W, C]", np.uint8, 4)
    labels = _open_array(folder / "labels.npy", "int32 [N]", np.int32, 1)
    for name in ("images", "labels") if verify else ("labels",):
        if hash_of(folder / f"{name}.npy") != about["sha256"].get(name):
            raise ValueError(f"{folder / name}.npy is not what was stored (SHA-256 differs); {_AGAIN}")
    labels = np.array(labels)
    names, splits, counts = (tuple(c[key] for c in about["classes"]) for key in ("name", "split", "count"))
    expected = np.repeat(np.arange(len(counts)), counts)
    if len(images) != len(labels) or not np.array_equal(labels, expected):
        raise ValueError(
            f"{folder} does not fit together: classes.json counts {len(expected)} pictures in order of their "
            f"classes, labels.npy has {len(labels)}, images.npy {len(images)}; {_AGAIN}"
        )
    if [s for s, _ in itertools.groupby(splits)] != [s for s in SPLITS if s in splits]:
        raise ValueError(f"{folder}/classes.json must list classes by split, {', '.join(SPLITS)}; {_AGAIN}")
    return Stored(images, labels, names, splits, about["source"])


def load(folder: str | os.PathLike, split: str, verify: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The pictures uint8 [n, H, W, C], mapped from the disk, and labels int32 [n] of a split.

    Raises:
        FileNotFoundError: when the folder is none that `bilevel convert` made.
        ValueError: when it is damaged, or has no such split.
    """
    return open_stored(folder, verify).of(split)


def stored(
    split: str,
    ways: int,
    shots: int,
    queries: int,
    folder: str | os.PathLike,
    rotations: bool = False,
) -> FewShot:
    """Draw few-shot tasks from a stored set that fits on the device.

    For one that does not there is `bilevel.tasks.prefetch.HostFewShot`.

    Args:
        split: "train", "validation" or "test".
        ways: number of classes in a task.
        shots: support examples of each class.
        queries: query examples of each class.
        folder: made by `bilevel convert`.
        rotations: let every class turned by 90, 180 and 270 degrees be a class of its own.

    Returns:
        A sampler of tasks: x float32 [ways * n, H, W, C] in 0..1, y int32 [ways * n].

    Raises:
        FileNotFoundError: when the folder is none that `bilevel convert` made.
        ValueError: when it is damaged, has no such split, or the task does not fit the data.

    >>> stored("train", 5, 1, 15, folder="mini-imagenet")  # doctest: +SKIP
    FewShot(ways=5, shots=1, queries=15, rotations=False)
    """
    images, labels = load(folder, split)
    return FewShot(images, labels, ways, shots, queries, rotations)


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "classes.json"
    if not path.is_file():
        what = (
            "has no classes.json: it is half-written or something else" if folder.is_dir() else "is no folder"
        )
        raise FileNotFoundError(f"no stored pictures at {folder}, which {what}; {_AGAIN}")
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        version = about["version"]
        if version == VERSION:
            classes = [
                (str(c["name"]), SPLITS.index(c["split"]), int(c["count"]) > 0) for c in about["classes"]
            ]
            if not isinstance(about["source"], str) or not isinstance(about["sha256"], dict):
                raise ValueError("no source or no sha256")
            if not classes or not all(filled for _, _, filled in classes):
                raise ValueError("a class without pictures")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is damaged or not of a stored set ({type(error).__name__}: {error}); {_AGAIN}"
        ) from error
    if version != VERSION:
        raise ValueError(f"{path} has version {version}, this bilevel reads {VERSION}; {_AGAIN}")
    return about


def _open_array(path: Path, expected: str, dtype: type, ndim: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no {path}, though classes.json is there; {_AGAIN}") from error
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged or cut off ({error}); {_AGAIN}") from error
    if not isinstance(array, np.ndarray) or array.dtype != dtype or array.ndim != ndim:
        got = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "no array"
        raise ValueError(f"{path} must hold {expected}, got {got}; {_AGAIN}")
    return array
