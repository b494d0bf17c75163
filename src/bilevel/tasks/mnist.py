"""MNIST (LeCun, Cortes, Burges, 1998): 70 000 handwritten digits of 28 x 28 pixels."""

import gzip
import hashlib
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bilevel.errors import DAMAGED_ZIP
from bilevel.tasks.download import download as fetch
from bilevel.tasks.download import places, temporary_beside

URL = "https://storage.googleapis.com/cvdf-datasets/mnist/"  # the authors' own page sends the files no more
PACKED = "mnist.npz"
# The four official archives and their SHA-256, in the order of `Mnist`.
ARCHIVES = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
SIDE, NUM_TRAIN, NUM_TEST = 28, 60_000, 10_000
_MAGIC = 0x0800  # of bytes; the lowest byte is the number of axes
_DAMAGE = (*DAMAGED_ZIP, OSError, ValueError, TypeError, KeyError)


class Mnist(NamedTuple):
    """All of MNIST, each part in an order that follows from the pictures alone and mixes the classes.

    Args:
        train_images: uint8 [60000, 28, 28], 255 = ink.
        train_labels: int32 [60000], 0..9.
        test_images: uint8 [10000, 28, 28].
        test_labels: int32 [10000].
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def mnist(data: str | os.PathLike | None = None, download: bool = False) -> Mnist:
    """Read MNIST, or get it.

    It is looked for at `data`, in the folder of the environment variable `BILEVEL_DATA` and in the cache
    folder (`$XDG_CACHE_HOME/bilevel` or `~/.cache/bilevel`), in this order. Copies of MNIST differ in the
    order of the digits, some sort them by class; here it is that of a hash of each, so that a seed draws the
    same examples from every copy.

    Args:
        data: `mnist.npz`, or a folder with that or with the four official `...-ubyte.gz` files.
        download: get the official files (12 MB, hashes checked) into the cache when nothing is found.

    Returns:
        Pictures uint8 [n, 28, 28] and labels int32 [n], of the training and of the test set.

    Raises:
        FileNotFoundError: when there are no digits.
        ValueError: when a file is damaged or something else.
        OSError: when the download fails.

    >>> mnist().train_images.shape  # doctest: +SKIP
    (60000, 28, 28)
    """
    if data is not None:
        path = Path(data).expanduser()
        found = _read_folder(path) if path.is_dir() else _read_packed(path)
        if found is None:
            raise FileNotFoundError(
                f"no MNIST in folder {path}: expected {PACKED}, or the four files {', '.join(ARCHIVES)}"
            )
        return found
    folders = places()
    for folder in folders:
        found = _read_folder(folder)
        if found is not None:
            return found
    if download:
        return _download(folders[-1])
    raise FileNotFoundError(
        f"no MNIST in {' or '.join(map(str, folders))}: pass download=True (--download) to get it "
        f"(12 MB), or data= (--data), or set BILEVEL_DATA to a folder with {PACKED}"
    )


def _read_folder(folder: Path) -> Mnist | None:
    if (folder / PACKED).is_file():
        return _read_packed(folder / PACKED)
    if all((folder / name).is_file() for name in ARCHIVES):
        return _checked(folder, [read_idx(folder / name) for name in ARCHIVES])
    return None


def _read_packed(path: Path) -> Mnist:
    if not path.is_file():
        raise FileNotFoundError(f"no MNIST at {path}: give {PACKED}, or a folder with the official files")
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = [file[name] for name in Mnist._fields]
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is damaged or no packed MNIST ({_first_line(error)}); delete it and get it again"
        ) from error
    return _checked(path, parts)


def read_idx(path: Path) -> np.ndarray:
    """Read one official file of bytes: a big-endian magic number, the size of each axis, then the bytes.

    Returns:
        uint8, of the shape that the file states.

    Raises:
        ValueError: when it is cut off, damaged, longer than it says, or no such file.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except _DAMAGE as error:
        raise ValueError(f"{path} is a damaged gzip ({_first_line(error)}); get it again") from error
    magic = int.from_bytes(content[:4], "big")
    axes = magic - _MAGIC
    if len(content) < 4 or axes not in (1, 3) or len(content) < 4 + 4 * axes:
        raise ValueError(
            f"{path} must begin with the magic number {_MAGIC + 1} (labels) or {_MAGIC + 3} (pictures), "
            f"got {magic}; get the official file"
        )
    shape = [int(size) for size in np.frombuffer(content, ">u4", axes, 4)]
    body = np.frombuffer(content, np.uint8, offset=4 + 4 * axes)
    expected = 1
    for size in shape:
        expected *= size
    if body.size != expected:
        raise ValueError(
            f"{path} says it holds {shape}, which is {expected} bytes, got {body.size}; get it again"
        )
    return body.reshape(shape)


def _checked(path: Path, parts: list[np.ndarray]) -> Mnist:
    """The four arrays, of the right shapes and values."""
    shapes = ((NUM_TRAIN, SIDE, SIDE), (NUM_TRAIN,), (NUM_TEST, SIDE, SIDE), (NUM_TEST,))
    for name, part, shape in zip(Mnist._fields, parts, shapes, strict=True):
        if part.shape != shape or not np.issubdtype(part.dtype, np.integer):
            raise ValueError(
                f"{path} must hold `{name}` as integers {list(shape)}, got {part.dtype} {list(part.shape)}; "
                "delete it and get it again"
            )
        most = 9 if "labels" in name else 255
        if part.min() < 0 or part.max() > most:
            raise ValueError(
                f"{path}: `{name}` must lie in 0..{most}, got {part.min()}..{part.max()}; get it again"
            )
    train_images, train_labels, test_images, test_labels = parts
    return Mnist(*_in_order(train_images, train_labels), *_in_order(test_images, test_labels))


def _in_order(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The digits by a hash of picture and label, as uint8 and int32."""
    images, labels = images.astype(np.uint8, copy=False), labels.astype(np.int32)
    hashes = (
        hashlib.blake2b(image.tobytes() + bytes([label]), digest_size=8).digest()
        for image, label in zip(images, labels, strict=True)
    )
    order = np.argsort(np.frombuffer(b"".join(hashes), ">u8"), kind="stable")
    return images[order], labels[order]


def _download(folder: Path) -> Mnist:
    """Fetch the official files and leave the packed one in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        for name, sha256 in ARCHIVES.items():
            fetch(URL + name, Path(unfinished) / name, sha256)
        found = _read_folder(Path(unfinished))
        assert found is not None, "each of them was fetched"
        with temporary_beside(folder / PACKED) as draft:
            with draft.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **found._asdict())
            os.replace(draft, folder / PACKED)
    return found


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
