"""The few-shot benchmarks in the files they are passed around in, and how large each of them is."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.tasks.download import hash_of
from bilevel.tasks.found import ALIASES, Found, join
from bilevel.tasks.pickles import read_pickle
from bilevel.tasks.stored import SPLITS

# Classes and pictures of train, validation and test; None where not every copy has the same number.
SIZES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "mini-imagenet": ((64, 38_400), (16, 9_600), (20, 12_000)),
    "tiered-imagenet": ((351, 448_695), (97, 124_261), (160, 206_209)),
    "cifar-fs": ((64, 38_400), (16, 9_600), (20, 12_000)),
    "fc100": ((60, 36_000), (20, 12_000), (20, 12_000)),
    "cub": ((100, None), (50, None), (50, None)),
}


def check_size(dataset: str, splits: Mapping[str, tuple[int, int]]) -> None:
    """Compare the classes and pictures of a set with those of the published benchmark.

    Args:
        dataset: a key of `SIZES`; others have no size to compare with.
        splits: classes and pictures of each split.

    Raises:
        ValueError: when they differ.
    """
    for name, expected in zip(SPLITS, SIZES.get(dataset, ()), strict=False):
        got = splits.get(name, (0, 0))
        if got[0] != expected[0] or expected[1] not in (None, got[1]):
            pictures = f" and {expected[1]} pictures" if expected[1] else ""
            raise ValueError(
                f"{dataset} has {expected[0]} classes{pictures} in {name}, got {got[0]} and {got[1]}; get "
                "the whole set, or pass partial=True (--partial) if a part of it is what you want"
            )


def pickles(files: Mapping[str, Path]) -> Found:
    """One pickle a split, of mini-ImageNet, CIFAR-FS, FC100 or anything else of the same kind.

    Args:
        files: by split. Each holds {"image_data": pictures, "class_dict": {class: places}} or
            {"data": pictures, "labels": classes}; pictures are uint8 [N, H, W, C], [N, 3072] as CIFAR has
            them, or a list of PNG or JPEG files.

    Raises:
        ValueError: when a file holds anything else, is damaged, or its parts do not fit together.
    """
    return join({name: _pickle(path, name) for name, path in files.items()}, _names(files))


def _pickle(path: Path, split: str) -> Found:
    data = read_pickle(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a dict, got {type(data).__name__}; see docs/data.md")
    if {"image_data", "class_dict"} <= set(data):
        pictures, names = data["image_data"], list(data["class_dict"])
        labels = np.full(len(pictures), -1)
        for label, places in enumerate(data["class_dict"].values()):
            places = np.asarray(places)
            bad = places.size and (places.min() < 0 or places.max() >= len(labels))
            if bad or (labels[places] >= 0).any():
                raise ValueError(
                    f"{path}: class {names[label]} has pictures that are not there or another's; get it again"
                )
            labels[places] = label
        if (labels < 0).any():
            raise ValueError(f"{path}: {(labels < 0).sum()} pictures are in no class; get it again")
        names = [str(name) for name in names]
    elif {"data", "labels"} <= set(data):
        pictures = data["data"]
        labels, names = numbered(data["labels"], split)
    else:
        raise ValueError(
            f"{path} must hold image_data and class_dict, or data and labels, got "
            f"{sorted(map(str, data))[:8]}"
        )
    return _part(path, pictures, labels, names, {path.name: path})


def numbered(labels: Any, split: str) -> tuple[np.ndarray, list[str]]:
    """Labels 0, 1, ... and names of classes that are known by a number only.

    Each file numbers its classes anew, so the name has the split in it.
    """
    values, places = np.unique(np.asarray(labels).reshape(-1), return_inverse=True)
    return places, [f"{split}/{value}" for value in values.tolist()]


def tiered(root: Path) -> Found:
    """tiered-ImageNet: {train,val,test}_images_png.pkl or _images.npz, and _labels.pkl.

    A split's pictures are read when the first of them is asked for, and dropped for those of the next.

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when one is damaged, or pictures and labels differ in number.
    """
    load = lru_cache(maxsize=1)(_tiered_pictures)  # one split in memory at a time
    shorts = dict(zip(SPLITS, ("train", "val", "test"), strict=True))
    parts = {name: _tiered_part(root, name, short, load) for name, short in shorts.items()}
    parts = {name: part for name, part in parts.items() if part is not None}
    if not parts:
        raise FileNotFoundError(f"no train_labels.pkl and train_images_png.pkl or train_images.npz in {root}")
    return join(parts, str(root))


def _tiered_part(root: Path, split: str, short: str, load: Callable[[Path], Any]) -> Found | None:
    kinds = [root / f"{short}_images_png.pkl", root / f"{short}_images.npz"]
    path, labels_path = next((k for k in kinds if k.is_file()), None), root / f"{short}_labels.pkl"
    if path is None and not labels_path.is_file():
        return None
    if path is None:
        raise FileNotFoundError(f"no {kinds[0]} and no {kinds[1]}, though {labels_path.name} is there")
    data = read_pickle(labels_path)
    data = data if isinstance(data, dict) else {"label_specific": data}
    if "label_specific" not in data:
        raise ValueError(f"{labels_path} must hold label_specific, got {sorted(map(str, data))[:8]}")
    labels, names = numbered(data["label_specific"], split)
    texts, values = data.get("label_specific_str"), np.unique(np.asarray(data["label_specific"]))
    if texts is not None and len(texts) > values.max():
        names = [str(texts[v]) for v in values]

    def pictures() -> Any:
        there = load(path)
        if len(there) != len(labels):
            raise ValueError(f"{path} has {len(there)} pictures and {len(labels)} labels; get both again")
        return there

    return _part(path, pictures, labels, names, {p.name: p for p in (path, labels_path)})


def _tiered_pictures(path: Path) -> Any:
    return read_npz(path, ("images",))["images"] if path.suffix == ".npz" else read_pickle(path)


def npz_names(path: Path) -> set[str]:
    """The names of the arrays of an .npz file.

    Raises:
        ValueError: when it is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return set(file.files)
    except Exception as error:  # zip, zlib and NumPy have each their own
        raise _damaged(path, error) from error


def read_npz(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Arrays of an .npz file, without pickles.

    Raises:
        ValueError: when it is damaged, or lacks one.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except KeyError as error:
        raise ValueError(f"{path} must hold {', '.join(names)}, but {error.args[0]}") from error
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} is damaged or no .npz of plain arrays ({error}); get it again")


def split_pickles(root: Path) -> tuple[str, dict[str, Path]] | None:
    """The benchmark whose pickles, one a split, are in a folder, and the pickles; None when there are none.

    Known names: mini-imagenet-cache-train.pkl, mini_imagenet_train.pickle, CIFAR_FS_train.pickle,
    FC100_train.pickle, miniImageNet_category_split_train_phase_train.pickle and those of the other splits.
    """
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(root.glob("*.p*k*l*")):
        for dataset, pattern in _PICKLES.items():
            if match := re.fullmatch(pattern, path.name, re.IGNORECASE):
                found.setdefault(dataset, {})[ALIASES[match[1].lower()]] = path
    if len(found) > 1:
        raise ValueError(f"{root} has pickles of {' and '.join(found)}; give each its own folder")
    return next(iter(found.items()), None)


# MetaOptNet's mini-ImageNet has further pictures of the training classes in ..._train_phase_val: not a split.
_PICKLES = {
    "mini-imagenet": (
        r"mini-?_?imagenet(?:-cache-|_|_category_split_(?:train_phase_(?=train))?)(train|val|test)\.(?:pkl|pickle)"
    ),
    "cifar-fs": r"cifar_?-?fs_(train|val|test)\.(?:pkl|pickle)",
    "fc100": r"fc100_(train|val|test)\.(?:pkl|pickle)",
}


def _part(path: Path, pictures: Any, labels: np.ndarray, names: list[str], files: dict[str, Path]) -> Found:
    """One split out of a list of pictures, or a function that gets it."""
    get = pictures if callable(pictures) else lambda: pictures
    if not callable(pictures) and len(pictures) != len(labels):
        raise ValueError(f"{path} has {len(pictures)} pictures and {len(labels)} labels; get it again")
    return Found(
        labels,
        names,
        [None] * len(names),
        _picture_from(get),
        str(path),
        lambda: {name: hash_of(file) for name, file in files.items()},
    )


_FILE_MARKS = (b"\x89PNG", b"\xff\xd8\xff")  # of PNG and JPEG, which may be as long as a row of CIFAR


def _picture_from(get: Callable[[], Any]) -> Callable[[int], Any]:
    def picture(i: int) -> Any:
        value = get()[i]
        if isinstance(value, str):  # of Python 2, see `read_pickle`
            return value.encode("latin1")
        if isinstance(value, np.ndarray) and (value.ndim == 1 or value.shape[1:] == (1,)):
            content = value.tobytes()
            if value.size == 3072 and not content.startswith(_FILE_MARKS):
                return value.reshape(3, 32, 32).transpose(1, 2, 0)  # a row of CIFAR
            return content  # a picture file, as OpenCV encodes it
        return value

    return picture


def _names(files: Mapping[str, Path]) -> str:
    return ", ".join(path.name for path in files.values())
