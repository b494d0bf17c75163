"""CIFAR-FS and FC100, cut out of the official CIFAR-100 for Python by the names of its classes."""

import hashlib
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.tasks.download import hash_of
from bilevel.tasks.found import Found
from bilevel.tasks.pickles import read_pickle

NAME = "cifar-100-python"
_MD5 = "eb9058c3a382ffc7106e4002c42a8d85"  # of the official .tar.gz
_FILES = ("meta", "train", "test")

# CIFAR-FS (Bertinetto et al., 2019) divides the 100 classes; the other 64 are for training.
_CIFAR_FS = {
    "validation": "beaver otter flatfish shark lamp television beetle butterfly sea camel cattle crab "
    "crocodile maple_tree motorcycle tractor",
    "test": "whale poppy rose sweet_pepper telephone bed table wardrobe leopard plain chimpanzee fox snail "
    "worm baby man woman bicycle pickup_truck rocket",
}
# FC100 (Oreshkin et al., 2018) divides the 20 superclasses; the other 12 are for training.
_FC100 = {
    "validation": "large_carnivores large_omnivores_and_herbivores non-insect_invertebrates small_mammals",
    "test": "aquatic_mammals insects medium_mammals people",
}


def cifar_100(path: Path, dataset: str) -> Found:
    """CIFAR-FS or FC100 cut out of the official CIFAR-100 for Python, 600 pictures a class.

    Args:
        path: cifar-100-python.tar.gz, whose MD5 is compared, or the folder it unpacks to.
        dataset: "cifar-fs" or "fc100".

    Raises:
        FileNotFoundError: when a file is missing.
        ValueError: when one is damaged, or `dataset` is another.
    """
    if dataset not in ("cifar-fs", "fc100"):
        raise ValueError(f"CIFAR-100 must become cifar-fs or fc100 (--dataset), got {dataset!r}")
    if path.is_dir():
        data = {name: read_pickle(path / name) for name in _FILES}
        hashes = {name: hash_of(path / name) for name in data}
    else:
        data, hashes = _unpack(path), {path.name: hash_of(path)}
    try:
        fine_names, coarse_names = data["meta"]["fine_label_names"], data["meta"]["coarse_label_names"]
        parts = [data["train"], data["test"]]
        pictures = [np.asarray(part["data"]).reshape(-1, 3, 32, 32) for part in parts]
        fine = np.concatenate([np.asarray(part["fine_labels"]) for part in parts])
        coarse = np.concatenate([np.asarray(part["coarse_labels"]) for part in parts])
        above = dict(zip(fine.tolist(), coarse.tolist(), strict=True))
        groups = {fine_names[f]: coarse_names[c] for f, c in above.items()}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is not CIFAR-100 for Python ({type(error).__name__}: {error}); get it again"
        ) from error
    values, labels = np.unique(fine, return_inverse=True)
    names = [fine_names[v] for v in values]
    if dataset == "cifar-fs":
        splits = [_split(name, _CIFAR_FS) for name in names]
    else:
        splits = [_split(groups[name], _FC100) for name in names]
    first = len(pictures[0])
    if first + len(pictures[1]) != len(labels):
        raise ValueError(
            f"{path} has {first + len(pictures[1])} pictures and {len(labels)} labels; get it again"
        )

    def picture(i: int) -> np.ndarray:
        planes = pictures[0][i] if i < first else pictures[1][i - first]
        return planes.transpose(1, 2, 0)

    return Found(labels, names, splits, picture, str(path), lambda: hashes)


def _split(name: str, lists: dict[str, str]) -> str:
    return next((split for split, members in lists.items() if name in members.split()), "train")


def _unpack(path: Path) -> dict[str, Any]:
    """The three files of the archive, through a folder that goes away; nothing else is unpacked."""
    with path.open("rb") as file:
        if hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest() != _MD5:
            raise ValueError(f"{path} is not the official file (its MD5 is not {_MD5}); get it again")
    with tempfile.TemporaryDirectory() as folder, tarfile.open(path) as archive:
        for name in _FILES:
            content = archive.extractfile(f"{NAME}/{name}")
            assert content is not None  # the hash says that it is there
            (Path(folder) / name).write_bytes(content.read())
        return {name: read_pickle(Path(folder) / name) for name in _FILES}
