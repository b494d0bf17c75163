"""From the files that people have to the stored format, once: what `bilevel convert` does.

Nothing is fetched: what is converted lies on the disk already, or in memory.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from bilevel.tasks import benchmarks, cifar, folders
from bilevel.tasks.found import ALIASES, Found, Splits, join, split
from bilevel.tasks.hugging_face import from_disk, hugging_face, is_hugging_face
from bilevel.tasks.pictures import Fit, as_array, check_layout, fit_size, with_channels
from bilevel.tasks.stored import Stored
from bilevel.tasks.storing import Examples, write_stored

Dataset = Literal["auto", "mini-imagenet", "tiered-imagenet", "cifar-fs", "fc100", "cub", "other"]


@dataclass(frozen=True)
class Layout:
    """The shape that all pictures get.

    Args:
        size: side in pixels; left out, they must be of one size already.
        fit: how one that is not square becomes so: "stretch" it, or "crop" its middle.
        channels: 1 for grey, 3 for colour; left out, as they are, and 3 where the benchmark has photographs.
    """

    size: int | None = None
    fit: Fit = "stretch"
    channels: int | None = None

    def __post_init__(self):
        check_layout(self.size, self.fit, self.channels)


def convert(
    source: Any,
    folder: str | os.PathLike,
    layout: Layout | None = None,
    *,
    dataset: Dataset = "auto",
    splits: Splits | None = None,
    label: str | None = None,
    partial: bool = False,
    replace: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Stored:
    """Store pictures of any common form in a folder that `stored`, `load` and `HostFewShot` read.

    A path may be: a folder of class folders, with or without splits above them; a folder with train.csv,
    val.csv and test.csv, or base.json, val.json and novel.json; CIFAR-FS with data/ and splits/;
    mini-imagenet-cache-*.pkl; *_images_png.pkl or *_images.npz of tiered-ImageNet; the pickles of CIFAR-FS
    and FC100; cifar-100-python, unpacked or not; CUB_200_2011; what `save_to_disk` of `datasets` left; an
    .npz with images and labels. Pickles are read by `read_pickle`, which runs nothing.

    Args:
        source: a path, a pair (images, labels) of arrays, a dict {split: pair}, or a Hugging Face `Dataset`
            or `DatasetDict`.
        folder: to be made.
        layout: the shape that all pictures get.
        dataset: which benchmark it is, where the files do not say; its size is compared with the published
            one. "other" compares nothing.
        splits: which class goes to which split: {split: names}, a JSON file, a folder of CSV or text files,
            or numbers as "64/16/20"; left out, as the source says.
        label: the column of labels of a Hugging Face data set that has several.
        partial: take a benchmark that is not complete.
        replace: put it in place of a stored set that is already there.
        on_progress: called now and then with the numbers of pictures stored and in all.

    Returns:
        The stored set, opened.

    Raises:
        FileNotFoundError: when there is no such file, or nothing in it is known.
        FileExistsError: when `folder` is there already.
        ValueError: when anything is damaged, does not fit together, or has another size than it should.
        ImportError: when Pillow or `datasets` is needed and missing.

    >>> import tempfile
    >>> images, labels = np.zeros((6, 8, 8), np.uint8), np.arange(6) // 2
    >>> with tempfile.TemporaryDirectory() as place:
    ...     convert((images, labels), place + "/set", splits={"train": ["0", "1"], "test": ["2"]}).counts()
    {'train': (2, 4), 'test': (1, 2)}
    """
    layout = layout or Layout()
    if dataset not in get_args(Dataset):
        raise ValueError(f"dataset must be one of {', '.join(get_args(Dataset))}, got {dataset!r}")
    _check_free(folder, replace)
    kind, found = find(source, dataset, splits, label)
    found = split(found, splits if not _lists_pictures(source, splits) else None)
    examples = _fitted(found, layout)
    if not partial:
        benchmarks.check_size(kind, _counts(examples))
    return write_stored(folder, examples, replace, on_progress)


def find(
    source: Any, dataset: Dataset = "auto", splits: Splits | None = None, label: str | None = None
) -> tuple[str, Found]:
    """What a source holds: the name of the benchmark, or "other", and its pictures as they are.

    Raises:
        FileNotFoundError, ValueError, ImportError: see `convert`.
    """
    if is_hugging_face(source):
        return _named(dataset), hugging_face(source, label)
    if isinstance(source, dict):
        unknown = [key for key in source if key not in ALIASES]
        if unknown or not source:
            raise ValueError(f"a split must be one of {', '.join(sorted(ALIASES))}, got {unknown}")
        pairs = {ALIASES[k]: _arrays(v[0], v[1]) for k, v in source.items()}
        return _named(dataset), join(pairs, "arrays")
    if isinstance(source, tuple | list):
        return _named(dataset), _arrays(*source)
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no file or folder {path}; give what you want to convert")
    if path.is_file():
        return _from_file(path, dataset)
    kind, found = _from_folder(path, dataset, splits, label)
    return (kind if dataset == "auto" else dataset), found


def _from_folder(path: Path, dataset: str, splits: Splits | None, label: str | None) -> tuple[str, Found]:
    """What a folder is, by what lies in it; the first form that fits is taken."""

    def has(*names: str) -> bool:
        return all((path / name).is_file() for name in names)

    if has("images.txt", "image_class_labels.txt"):
        return "cub", folders.cub(path)
    if of_splits := benchmarks.split_pickles(path):
        return of_splits[0], benchmarks.pickles(of_splits[1])
    if any(path.glob("*_images_png.pkl")) or any(path.glob("*_images.npz")):
        return "tiered-imagenet", benchmarks.tiered(path)
    if has("meta", "train", "test"):
        return dataset, cifar.cifar_100(path, dataset)
    if has("dataset_info.json") or has("dataset_dict.json"):
        return "other", hugging_face(from_disk(path), label)
    if _has_lists(path):
        return "other", folders.listed(path)
    if splits is not None and _lists_pictures(path, splits):
        return "other", folders.listed(path, Path(str(splits)).expanduser())
    if has("base.json", "novel.json"):
        return "other", folders.filelists(path)
    if (path / "data").is_dir() and (path / "splits" / "bertinetto").is_dir():
        return "cifar-fs", folders.cifar_fs(path, own_splits=splits is None)
    if any(p.is_dir() and not p.name.startswith(".") for p in path.iterdir()):
        return "other", folders.class_folders(path)
    raise FileNotFoundError(
        f"nothing in {path} is known: expected folders of classes, lists (train.csv, ...), pickles of a "
        "benchmark, CUB_200_2011, cifar-100-python or a saved Hugging Face data set; see docs/data.md"
    )


def _from_file(path: Path, dataset: Dataset) -> tuple[str, Found]:
    if path.name.startswith(cifar.NAME):
        return dataset, cifar.cifar_100(path, dataset)
    if path.suffix == ".npz":
        return _named(dataset), _npz(path)
    raise ValueError(
        f"{path} is not a file that can be converted: give an .npz with images and labels, "
        f"{cifar.NAME}.tar.gz, or the folder that the file is in"
    )


def _npz(path: Path) -> Found:
    names = benchmarks.npz_names(path)
    parts = {ALIASES[k]: k for k in ALIASES if {f"{k}_images", f"{k}_labels"} <= names}
    if not parts:
        arrays = benchmarks.read_npz(path, ("images", "labels"))
        return _arrays(arrays["images"], arrays["labels"])
    arrays = benchmarks.read_npz(path, [f"{k}_{w}" for k in parts.values() for w in ("images", "labels")])
    pairs = {s: _arrays(arrays[f"{k}_images"], arrays[f"{k}_labels"]) for s, k in parts.items()}
    return join(pairs, str(path))


def _arrays(images: Any, labels: Any) -> Found:
    images, labels = np.asarray(images), np.asarray(labels)
    if (
        labels.ndim != 1
        or len(images) != len(labels)
        or images.dtype != np.uint8
        or images.ndim not in (3, 4)
    ):
        raise ValueError(
            f"arrays must be images uint8 [N, H, W] or [N, H, W, C] and labels [N], got {images.dtype} "
            f"{list(images.shape)} and {labels.dtype} {list(labels.shape)}"
        )
    values, places = np.unique(labels, return_inverse=True)
    names = [str(value) for value in values.tolist()]
    return Found(places, names, [None] * len(names), lambda i: images[i], "arrays")


def _named(dataset: str) -> str:
    return "other" if dataset == "auto" else dataset


def _has_lists(path: Path) -> bool:
    return any((path / f"{alias}.csv").is_file() for alias in ALIASES)


def _lists_pictures(source: Any, splits: Any) -> bool:
    """Whether `splits` is a folder of CSV files that name the single pictures of a flat folder."""
    if not isinstance(source, str | os.PathLike) or not isinstance(splits, str | os.PathLike):
        return False
    path, lists = Path(source).expanduser(), Path(splits).expanduser()
    flat = path.is_dir() and ((path / "images").is_dir() or not any(p.is_dir() for p in path.iterdir()))
    return flat and lists.is_dir() and _has_lists(lists)


def _fitted(found: Found, layout: Layout) -> Examples:
    channels = layout.channels or found.channels

    def picture(i: int) -> np.ndarray:
        name = f"picture {i} (class {found.names[found.labels[i]]})"
        array = with_channels(as_array(found.picture(i), name), channels)
        return fit_size(array, layout.size, layout.fit)

    splits = [s for s in found.splits if s is not None]
    return Examples(found.labels, found.names, splits, picture, found.source, found.hashes)


def _counts(examples: Examples) -> dict[str, tuple[int, int]]:
    sizes = np.bincount(examples.labels, minlength=len(examples.names))
    counts: dict[str, tuple[int, int]] = {}
    for name, size in zip(examples.splits, sizes.tolist(), strict=True):
        classes, pictures = counts.get(name, (0, 0))
        counts[name] = (classes + 1, pictures + size)
    return counts


def _check_free(folder: str | os.PathLike, replace: bool) -> None:
    if Path(folder).expanduser().exists() and not replace:
        raise FileExistsError(
            f"{folder} exists already; take another folder, or pass replace=True (--replace)"
        )
