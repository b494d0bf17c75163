"""Writing pictures in the stored format, one at a time; `bilevel.tasks.stored` says what it is."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bilevel.tasks.download import hash_of
from bilevel.tasks.stored import FILES, SPLITS, VERSION, Stored, open_stored


@dataclass(frozen=True)
class Examples:
    """Labelled pictures to be stored, read one at a time.

    Args:
        labels: int [N], the class of each.
        names: of the classes.
        splits: of the classes: "train", "validation" or "test".
        picture: picture i as uint8 [H, W, C]; all of one shape.
        source: what they were read from, in words.
        hashes: SHA-256 of each file that was read, asked for at the end.
    """

    labels: np.ndarray
    names: Sequence[str]
    splits: Sequence[str]
    picture: Callable[[int], np.ndarray]
    source: str
    hashes: Callable[[], dict[str, str]] = dict


def write_stored(
    folder: str | os.PathLike,
    examples: Examples,
    replace: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Stored:
    """Store pictures, one at a time; the folder appears only when it is complete.

    Args:
        folder: to be made.
        examples: what to store. Classes are ordered by split and, within one, as they come.
        replace: put it in place of a stored set that is already there.
        on_progress: called now and then with the numbers of pictures stored and in all.

    Raises:
        FileExistsError: when the folder exists and is not to be, or may not be, replaced.
        ValueError: when there are no pictures, or their shapes differ.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and not (replace and _only_stored(folder)):
        raise FileExistsError(
            f"{folder} exists already; take another folder, or pass replace=True (--replace) if it is a "
            "stored set that you no longer want"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as work:
        new = Path(work) / "new"
        new.mkdir()
        _write(new, examples, on_progress or (lambda done, total: None))
        if folder.exists():
            os.rename(folder, Path(work) / "old")
        os.rename(new, folder)
    return open_stored(folder)


def _only_stored(folder: Path) -> bool:
    return folder.is_dir() and {path.name for path in folder.iterdir()} == set(FILES)


def _write(folder: Path, examples: Examples, on_progress: Callable[[int, int], None]) -> None:
    labels = np.asarray(examples.labels)
    counts = np.bincount(labels, minlength=len(examples.names))
    if not len(labels) or not counts.all():
        empty = [name for name, count in zip(examples.names, counts, strict=True) if not count]
        raise ValueError(f"every class must have pictures, got none for {empty[:6] or examples.source}")
    # Within a split and a class the order stays, so that a set is stored the same way every time.
    place = sorted(range(len(counts)), key=lambda c: SPLITS.index(examples.splits[c]))
    rank = np.argsort(place)
    order = np.argsort(rank[labels], kind="stable")
    np.save(folder / "labels.npy", rank[labels][order].astype(np.int32))
    _write_images(folder / "images.npy", examples, order, on_progress)
    about = {
        "version": VERSION,
        "source": examples.source,
        "classes": [
            {"name": str(examples.names[c]), "split": examples.splits[c], "count": int(counts[c])}
            for c in place
        ],
        "sha256": {name: hash_of(folder / f"{name}.npy") for name in ("images", "labels")},
        "read": examples.hashes(),
    }
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (folder / "classes.json").write_text(text + "\n", encoding="utf-8")


def _write_images(
    path: Path, examples: Examples, order: np.ndarray, on_progress: Callable[[int, int], None]
) -> None:
    # Written and not mapped: a full disk is then an error of the write, and not the end of the process.
    shape = None
    with path.open("wb") as file:
        for row, i in enumerate(order.tolist()):
            if row % 1000 == 0:
                on_progress(row, len(order))
            picture = examples.picture(i)
            name = f"a picture of class {examples.names[int(examples.labels[i])]}"
            if shape is None:
                if picture.dtype != np.uint8 or picture.ndim != 3:
                    raise ValueError(
                        f"{name} must be uint8 [H, W, C], got {picture.dtype} {list(picture.shape)}"
                    )
                shape = picture.shape
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(order), *shape)}
                np.lib.format.write_array_header_1_0(file, header)
            elif picture.shape != shape:
                raise ValueError(
                    f"all pictures must have one shape, got {list(shape)} and, for {name}, "
                    f"{list(picture.shape)}; give size and channels (--size 84 --channels 3)"
                )
            file.write(np.ascontiguousarray(picture).data)
