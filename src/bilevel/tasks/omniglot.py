"""Omniglot (Lake et al., 2015): 1623 handwritten characters, 20 drawings of each."""

import os
import tempfile
from pathlib import Path

import numpy as np

from bilevel.tasks import omniglot_archive as archive
from bilevel.tasks.download import download as fetch
from bilevel.tasks.download import places
from bilevel.tasks.few_shot import FewShot

URL = "https://github.com/brendenlake/omniglot/raw/master/python/"
OFFICIAL = ("images_background.zip", "images_evaluation.zip")

SIZE = 28
NUM_TRAIN = 1200
_SPLIT_SEED = 0


def omniglot(
    split: str,
    ways: int,
    shots: int,
    queries: int,
    data: str | os.PathLike | None = None,
    download: bool = False,
) -> FewShot:
    """Draw few-shot tasks from Omniglot, by the usual protocol.

    Drawings are averaged over areas to 28 x 28, with ink = 1. The background and evaluation sets
    are merged; 1200 classes are for training and 423 for testing, split by a fixed seed. In
    training every class rotated by 90, 180 and 270 degrees is a class of its own, in testing not;
    `dataclasses.replace(sampler, rotations=False)` changes that.

    The drawings are looked for at `data`, in the folder of the environment variable `BILEVEL_DATA`
    and in the cache folder (`$XDG_CACHE_HOME/bilevel` or `~/.cache/bilevel`), in this order. `data`
    may name one official archive, which then gives those of the split's classes that it holds.

    Args:
        split: "train" or "test".
        ways: number of classes in a task.
        shots: support examples of each class.
        queries: query examples of each class; shots + queries is at most 20.
        data: `omniglot.npz`, an official zip, or a folder with that npz or both official zips.
        download: get the official archives into the cache folder when nothing is found.

    Returns:
        A sampler of tasks: x float32 [ways * n, 28, 28, 1] in 0..1, y int32 [ways * n].

    Raises:
        FileNotFoundError: when there are no drawings.
        ValueError: when a file is damaged, or the task does not fit the data.
        OSError: when the download fails.

    >>> omniglot("train", ways=5, shots=1, queries=15)  # doctest: +SKIP
    FewShot(ways=5, shots=1, queries=15, rotations=True)
    """
    members = split_classes(split)
    drawings = _find(data, download)
    kept = np.isin(drawings.numbers, members)
    images = shrink(drawings.bits[kept])
    labels = np.repeat(drawings.numbers[kept], archive.NUM_DRAWERS)
    images = images.reshape(-1, SIZE, SIZE)
    return FewShot(images, labels, ways, shots, queries, rotations=split == "train")


def split_classes(split: str) -> np.ndarray:
    """The official class numbers of a split, ascending: 1200 of 1..1623 for "train", else 423.

    >>> len(split_classes("train")), len(split_classes("test"))
    (1200, 423)
    """
    order = 1 + np.random.default_rng(_SPLIT_SEED).permutation(archive.NUM_CLASSES)
    parts = {"train": order[:NUM_TRAIN], "test": order[NUM_TRAIN:]}
    if split not in parts:
        raise ValueError(f"split must be one of {', '.join(parts)}, got {split!r}")
    return np.sort(parts[split])


def shrink(bits: np.ndarray) -> np.ndarray:
    """Packed drawings [..., 1379] as pictures uint8 [..., 28, 28], 255 = ink.

    A pixel is the mean ink over its square of 3.75 x 3.75 dots, which is R @ drawing @ R.T.
    """
    side = archive.SIDE
    edges = np.arange(SIZE + 1) * (side / SIZE)
    dots = np.arange(side)
    overlap = np.minimum(edges[1:, None], dots + 1) - np.maximum(edges[:-1, None], dots)
    R = (np.maximum(overlap, 0) * (SIZE / side)).astype(np.float32)  # [28, 105], rows sum to 1

    flat = bits.reshape(-1, bits.shape[-1])
    pictures = np.empty((len(flat), SIZE, SIZE), np.uint8)
    for start in range(0, len(flat), 1000):  # in parts, to keep the unpacked floats few
        paper = np.unpackbits(flat[start : start + 1000], axis=-1, count=side * side)
        ink = (1 - paper).astype(np.float32).reshape(-1, side, side)
        pictures[start : start + 1000] = np.rint(255 * (R @ (ink @ R.T)))
    return pictures.reshape(*bits.shape[:-1], SIZE, SIZE)


def _find(data: str | os.PathLike | None, download: bool) -> archive.Drawings:
    if data is not None:
        path = Path(data).expanduser()
        drawings = _read_folder(path) if path.is_dir() else archive.read(path)
        if drawings is None:
            raise FileNotFoundError(
                f"no Omniglot in folder {path}: expected {archive.PACKED}, or {OFFICIAL[0]} and {OFFICIAL[1]}"
            )
        return drawings
    folders = places()
    for folder in folders:
        drawings = _read_folder(folder)
        if drawings is not None:
            return drawings
    if download:
        return _download(folders[-1])
    raise FileNotFoundError(
        f"no Omniglot in {' or '.join(map(str, folders))}: pass download=True (--download) to get it "
        f"(16 MB), or data=, or set BILEVEL_DATA to a folder with {archive.PACKED}"
    )


def _read_folder(folder: Path) -> archive.Drawings | None:
    if (folder / archive.PACKED).is_file():
        return archive.read(folder / archive.PACKED)
    if all((folder / name).is_file() for name in OFFICIAL):
        return _merge(folder)
    return None


def _merge(folder: Path) -> archive.Drawings:
    """Both official archives as one set, background first."""
    parts = [archive.read(folder / name) for name in OFFICIAL]
    return archive.Drawings(*map(np.concatenate, zip(*parts, strict=True)))


def _download(folder: Path) -> archive.Drawings:
    """Fetch the official archives and leave the packed file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        for name in OFFICIAL:
            fetch(URL + name, Path(unfinished) / name, archive.ARCHIVES[name])
        drawings = _merge(Path(unfinished))
        archive.write_packed(folder / archive.PACKED, drawings)
    return drawings
