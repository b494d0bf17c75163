"""Labelled pictures as they were found, and which class goes to which split."""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.tasks.stored import SPLITS

# What people call the splits.
ALIASES = {
    "train": "train",
    "training": "train",
    "base": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "novel": "test",
    "meta-train": "train",
    "meta-val": "validation",
    "meta-test": "test",
}
_SPLIT_SEED = 0

Splits = Mapping[str, Sequence[str]] | str | os.PathLike


@dataclass(frozen=True)
class Found:
    """Labelled pictures before they are scaled and, it may be, before they are split.

    Args:
        labels: int [N], the class of each.
        names: of the classes; the same name may come once in each split.
        splits: of the classes; None where nothing says.
        picture: picture i: an array uint8 [H, W] or [H, W, C], a Pillow image or a picture file's bytes.
        source: what was read, in words.
        hashes: SHA-256 of what was read, asked for after the pictures.
        channels: that pictures of this kind should have; None leaves them as they are.
    """

    labels: np.ndarray
    names: Sequence[str]
    splits: Sequence[str | None]
    picture: Callable[[int], Any]
    source: str
    hashes: Callable[[], dict[str, str]] = dict
    channels: int | None = None


class Files:
    """Picture files, read one at a time, whose content is hashed on the way.

    Args:
        root: what the names in the list of hashes are relative to.
        paths: the files.
    """

    def __init__(self, root: Path, paths: Sequence[Path]):
        self._root, self._paths = root, paths
        self._hashes: dict[int, str] = {}

    def read(self, i: int) -> Any:
        """Picture i as an array."""
        from bilevel.tasks.pictures import decode

        content = self._paths[i].read_bytes()
        self._hashes[i] = hashlib.sha256(content).hexdigest()
        return decode(content, str(self._paths[i]))

    def hashes(self) -> dict[str, str]:
        """One hash for all that were read: of the lines `hash  name`, sorted by name."""
        names = {self._paths[i].relative_to(self._root).as_posix(): h for i, h in self._hashes.items()}
        lines = "".join(f"{names[name]}  {name}\n" for name in sorted(names))
        return {f"{len(names)} files": hashlib.sha256(lines.encode()).hexdigest()}


def join(parts: Mapping[str, Found], source: str) -> Found:
    """Parts of one kind, by split, as one set; classes of one name stay apart."""
    ends = np.cumsum([len(part.labels) for part in parts.values()])
    offsets = np.cumsum([0, *(len(part.names) for part in parts.values())])
    each = list(parts.values())

    def picture(i: int) -> Any:
        at = int(np.searchsorted(ends, i, side="right"))
        return each[at].picture(i - (int(ends[at - 1]) if at else 0))

    return Found(
        labels=np.concatenate(
            [part.labels + offset for part, offset in zip(each, offsets[:-1], strict=True)]
        ),
        names=[name for part in each for name in part.names],
        splits=[split for split, part in parts.items() for _ in part.names],
        picture=picture,
        source=source,
        hashes=lambda: {f"{s}: {k}": v for s, part in parts.items() for k, v in part.hashes().items()},
        channels=each[0].channels,
    )


def split(found: Found, splits: Splits | None) -> Found:
    """The same, every class in one split.

    Args:
        found: pictures whose classes may be in no split, or in several.
        splits: which class goes where, see `read_splits`; classes that it does not name are left out. None
            keeps what the pictures came with.

    Raises:
        ValueError: when a class is in no split or in several, or `splits` names one that is not there.
    """
    if splits is not None:
        names = sorted(set(found.names))
        assigned = read_splits(splits, names)
        place = {name: i for i, name in enumerate(assigned)}
        if missing := sorted(set(assigned) - set(names)):
            raise ValueError(
                f"the splits name classes that are not in {found.source}: {_listed(missing)}; it has "
                f"{_listed(names)}"
            )
        moved = np.array([place.get(name, -1) for name in found.names])[found.labels]
        return _only(replace(found, names=list(assigned), splits=list(assigned.values())), moved)
    homeless = [name for name, s in zip(found.names, found.splits, strict=True) if s is None]
    if homeless:
        raise ValueError(
            f"nothing says which split the classes of {found.source} belong to ({_listed(homeless)}); pass "
            "splits (--splits): a folder with train.csv, val.csv and test.csv, a JSON file, or 64/16/20"
        )
    if len(set(found.names)) < len(found.names):
        double = sorted({name for name in found.names if list(found.names).count(name) > 1})
        raise ValueError(
            f"classes of {found.source} are in more than one split: {_listed(double)}; few-shot learning is "
            "tested on unseen classes, so pass splits (--splits) by class; if each split numbers its classes "
            "anew, give them names that differ"
        )
    return found


def _only(found: Found, labels: np.ndarray) -> Found:
    """With new labels, without the pictures whose label is -1."""
    kept = np.flatnonzero(labels >= 0)
    return replace(found, labels=labels[kept], picture=lambda i: found.picture(int(kept[i])))


def read_splits(splits: Splits, names: Sequence[str]) -> dict[str, str]:
    """Which class belongs to which split.

    Args:
        splits: a dict {split: class names}; a JSON file of one; a folder with train.csv, val.csv and test.csv
            (columns filename and label, of which the labels are read) or with train.txt, ... (a class name
            a line); or "64/16/20", so many classes for each, drawn by a fixed seed.
        names: of all classes, sorted.

    Raises:
        FileNotFoundError: when there is nothing of that kind.
        ValueError: when it is damaged, or a class is in two splits.

    >>> read_splits({"train": ["ant", "bee"], "test": ["cat"]}, ["ant", "bee", "cat"])
    {'ant': 'train', 'bee': 'train', 'cat': 'test'}
    >>> sorted(read_splits("1/1/1", ["ant", "bee", "cat"]).values())
    ['test', 'train', 'validation']
    """
    if isinstance(splits, Mapping):
        lists = dict(splits)
    elif str(splits).replace("/", "").isdigit() and str(splits).count("/") == 2:
        lists = _drawn(str(splits), names)
    else:
        lists = _split_file(Path(splits).expanduser())
    assigned: dict[str, str] = {}
    for alias, members in lists.items():
        if alias not in ALIASES:
            raise ValueError(f"a split must be one of {', '.join(SPLITS)}, got {alias!r}")
        if isinstance(members, str) or not all(isinstance(name, str) for name in members):
            raise ValueError(f"split {alias} must list the names of its classes, got {members!r:.80}")
        for name in members:
            if assigned.setdefault(name, ALIASES[alias]) != ALIASES[alias]:
                raise ValueError(f"class {name} is in two splits, {assigned[name]} and {ALIASES[alias]}")
    if not assigned:
        raise ValueError("the splits are empty; name classes for train, validation and test")
    return assigned


def _drawn(numbers: str, names: Sequence[str]) -> dict[str, list[str]]:
    counts = [int(n) for n in numbers.split("/")]
    if sum(counts) > len(names):
        raise ValueError(f"splits {numbers} need {sum(counts)} classes, got {len(names)}; ask for fewer")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(names))
    parts = np.split(order, np.cumsum(counts))[:3]
    return {
        name: [str(names[i]) for i in np.sort(part).tolist()]
        for name, part in zip(SPLITS, parts, strict=True)
    }


def _split_file(path: Path) -> dict[str, Any]:
    if path.is_file() and path.suffix == ".json":
        try:
            lists = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON ({error}); write {{split: [class names]}}") from error
        if not isinstance(lists, dict) or not all(isinstance(v, list) for v in lists.values()):
            raise ValueError(f"{path} must hold {{split: [class names]}}")
        return lists
    lists = {}
    if path.is_dir():
        for alias in ALIASES:
            if (path / f"{alias}.csv").is_file():
                rows = read_csv(path / f"{alias}.csv")
                lists[alias] = list(dict.fromkeys(label for _, label in rows))
            elif (path / f"{alias}.txt").is_file():
                lines = (path / f"{alias}.txt").read_text(encoding="utf-8").splitlines()
                lists[alias] = [line.strip() for line in lines if line.strip()]
    if not lists:
        raise FileNotFoundError(
            f"no splits at {path}: expected a JSON file, a folder with train.csv, val.csv and test.csv (or "
            ".txt), or numbers of classes like 64/16/20"
        )
    return lists


def read_csv(path: Path) -> list[tuple[str, str]]:
    """The rows (filename, label) of a split file as Ravi and Larochelle (2017) wrote them.

    Raises:
        ValueError: when the columns are others, or a row is cut off.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a mark
            rows = list(csv.DictReader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no CSV ({error}); write columns filename,label") from error
    if not rows or not {"filename", "label"} <= set(rows[0]):
        raise ValueError(f"{path} must have columns filename and label and a row, got {list(rows[:1])}")
    pairs = [(row["filename"], row["label"]) for row in rows]
    for line, pair in enumerate(pairs, 2):
        if not all(pair):
            raise ValueError(f"{path} line {line} must have a filename and a label, got {pair}")
    return pairs


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
