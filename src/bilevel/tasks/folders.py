"""Pictures in folders: a folder a class, lists in CSV or JSON files, and the layouts of CUB and CIFAR-FS."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.tasks.found import ALIASES, Files, Found, join, read_csv, split
from bilevel.tasks.pictures import is_picture


def class_folders(root: Path) -> Found:
    """A folder a class, `root/class/*.png`, or the same within `root/train`, `root/val`, `root/test`.

    Args:
        root: the folder. Classes and files come in the order of their names; files that are no pictures
            are left out.

    Raises:
        FileNotFoundError: when there are no class folders.
        ValueError: when a class has no pictures, or splits and classes lie side by side.

    Warns:
        UserWarning: for files that are left out, hidden ones apart.
    """
    folders = _subfolders(root)
    parts = {ALIASES[f.name.lower()]: f for f in folders if f.name.lower() in ALIASES}
    if not parts:
        return _classes(root, root, folders)
    if len(parts) < len(folders):
        others = [f.name for f in folders if f.name.lower() not in ALIASES or f not in parts.values()]
        raise ValueError(
            f"{root} has folders of splits beside others: {', '.join(others[:6])}; move them away"
        )
    found = {name: _classes(root, folder, _subfolders(folder)) for name, folder in parts.items()}
    return join(found, str(root))


def _subfolders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; give the folder that holds the folders of the classes")
    return sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))


def _classes(root: Path, folder: Path, classes: list[Path]) -> Found:
    if not classes:
        raise FileNotFoundError(f"no folders of classes in {folder}; expected {folder}/CLASS/PICTURE.png")
    paths, labels, left_out = [], [], []
    for label, each in enumerate(classes):
        files = sorted(f for f in each.iterdir() if not f.name.startswith("."))
        pictures = [f for f in files if is_picture(f)]
        if not pictures:
            raise ValueError(f"class folder {each} has no pictures; put some there or remove it")
        paths += pictures
        labels += [label] * len(pictures)
        left_out += [f for f in files if f not in set(pictures)]
    if left_out:
        warnings.warn(f"left out {len(left_out)} files that are no pictures, as {left_out[0]}", stacklevel=2)
    return _found(root, paths, np.array(labels), [c.name for c in classes], [None] * len(classes))


def listed(root: Path, lists: Path | None = None) -> Found:
    """Pictures that train.csv, val.csv and test.csv list, in columns filename and label.

    Args:
        root: where the pictures are: `root/images/FILENAME`, `root/FILENAME`, `root/LABEL/FILENAME` or
            `root/images/LABEL/FILENAME`.
        lists: the folder of the CSV files; `root` when left out.

    Raises:
        FileNotFoundError: when there are no lists, or a picture that they name is missing.
        ValueError: when a list is damaged.
    """
    lists = lists or root
    csvs = {ALIASES[p.stem]: p for p in sorted(lists.glob("*.csv")) if p.stem in ALIASES}
    if not csvs:
        raise FileNotFoundError(f"no train.csv, val.csv or test.csv in {lists}; give the folder of the lists")
    parts = {}
    for name, path in csvs.items():
        rows = read_csv(path)
        names = sorted({label for _, label in rows})
        place = {label: i for i, label in enumerate(names)}
        paths = [_locate(root, filename, label, path) for filename, label in rows]
        labels = np.array([place[label] for _, label in rows])
        parts[name] = _found(root, paths, labels, names, [None] * len(names), channels=3)
    return join(parts, str(root))


def _locate(root: Path, filename: str, label: str, listed_in: Path) -> Path:
    for place in ("images", ".", label, f"images/{label}"):
        path = root / place / filename
        if path.is_file():
            return _inside(root, path, listed_in)
    raise FileNotFoundError(
        f"{listed_in} names {filename} of class {label}, which is not in {root}/images, {root} or "
        f"{root / label}; the lists and the pictures are of different sets"
    )


def filelists(root: Path) -> Found:
    """Pictures that base.json, val.json and novel.json list, as the code of Chen et al. (2019) writes them.

    Each holds "image_names", "image_labels" and "label_names". The names are paths on the machine that wrote
    them: a picture is looked for in `root` under ever shorter ends of its path.

    Raises:
        FileNotFoundError: when a picture is not there.
        ValueError: when a list is damaged.
    """
    parts = {}
    for path in sorted(root.glob("*.json")):
        if path.stem not in ALIASES:
            continue
        try:
            lists = json.loads(path.read_text(encoding="utf-8"))
            names, labels = [str(name) for name in lists["image_names"]], lists["image_labels"]
            values, places = np.unique(np.asarray(labels, np.int64), return_inverse=True)
            if not names or len(names) != len(places):
                raise ValueError(f"{len(names)} image_names and {len(places)} image_labels")
        except (ValueError, KeyError, TypeError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path} must hold image_names and image_labels ({why}); write it again"
            ) from error
        classes = _label_names(lists.get("label_names"), values)
        paths = [_end_within(root, name, path) for name in names]
        parts[ALIASES[path.stem]] = _found(root, paths, places, classes, [None] * len(classes), channels=3)
    return join(parts, str(root))


def _label_names(names: Any, values: np.ndarray) -> list[str]:
    """The lists name all classes, or those of their split in order, or none."""
    if isinstance(names, list) and len(names) > values.max():
        return [str(names[value]) for value in values]
    if isinstance(names, list) and len(names) == len(values):
        return [str(name) for name in names]
    return [str(value) for value in values]


def _end_within(root: Path, name: str, listed_in: Path) -> Path:
    parts = [part for part in Path(name).parts if part != Path(name).anchor]
    for start in range(len(parts)):
        path = root.joinpath(*parts[start:])
        if path.is_file():
            return _inside(root, path, listed_in)
    raise FileNotFoundError(
        f"{listed_in} names {name}, and no end of that path is in {root}; put the lists beside the pictures"
    )


def cifar_fs(root: Path, own_splits: bool = True) -> Found:
    """CIFAR-FS as Bertinetto et al. (2019) pack it: data/CLASS/x.png and splits/bertinetto/train.txt, ...

    Args:
        own_splits: whether its lists say which class goes where.

    Raises:
        FileNotFoundError, ValueError: see `class_folders` and `read_splits`.
    """
    found = class_folders(root / "data")
    return split(found, root / "splits" / "bertinetto") if own_splits else found


def cub(root: Path) -> Found:
    """Caltech-UCSD Birds 200-2011 as it is unpacked: images/ and lists of pictures, labels and classes.

    Its own train_test_split.txt divides pictures, not classes, and is not read. The split is the one that
    few-shot learning uses (Chen et al., "A closer look at few-shot classification", 2019): of the classes in
    order, numbered from 0, the even ones are for training (100), 1, 5, 9, ... for validation (50) and 3, 7,
    11, ... for testing (50).

    Raises:
        FileNotFoundError: when a list or a picture is missing.
        ValueError: when the lists do not fit together.
    """
    tables = {}
    for name in ("images", "image_class_labels", "classes"):
        path = root / f"{name}.txt"
        if not path.is_file():
            raise FileNotFoundError(f"no {path}; give the folder CUB_200_2011 as it is unpacked")
        rows = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines() if line]
        if any(len(row) != 2 for row in rows) or len({row[0] for row in rows}) < len(rows):
            raise ValueError(f"{path} must have lines of a number and a name, each number once")
        tables[name] = {row[0]: row[1].strip() for row in rows}
    pictures, classes = tables["images"], tables["classes"]
    labels = tables["image_class_labels"]
    if set(labels) != set(pictures) or not set(labels.values()) <= set(classes):
        raise ValueError(
            f"{root}: images.txt lists {len(pictures)} pictures, image_class_labels.txt {len(labels)} in "
            f"{len(set(labels.values()))} of {len(classes)} classes; unpack it again"
        )
    order = sorted(classes, key=lambda number: classes[number])
    place = {number: i for i, number in enumerate(order)}
    paths = [_inside(root, root / "images" / pictures[key], root / "images.txt") for key in pictures]
    return _found(
        root,
        paths,
        np.array([place[labels[key]] for key in pictures]),
        [classes[number] for number in order],
        [("train", "validation", "train", "test")[i % 4] for i in range(len(order))],
        channels=3,
    )


def _inside(root: Path, path: Path, listed_in: Path) -> Path:
    if ".." in path.relative_to(root).parts:
        raise ValueError(f"{listed_in} names {path}, outside of its folder; get the official list")
    return path


def _found(root, paths, labels, names, splits, channels=None) -> Found:
    files = Files(root, paths)
    return Found(labels, names, splits, files.read, str(root), files.hashes, channels)
