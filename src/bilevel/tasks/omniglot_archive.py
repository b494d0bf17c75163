"""Reading the drawings of Omniglot from the official archives or from one packed file.

Whatever they are read from, drawings come as the packed file stores them: 105 x 105 bits in 1379
bytes, 1 = paper and 0 = ink.
"""

import io
import os
import re
import stat
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from bilevel.errors import DAMAGED_ZIP
from bilevel.tasks.download import hash_of, temporary_beside

# Official archives and their SHA-256.
ARCHIVES = {
    "images_background.zip": "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
    "images_evaluation.zip": "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
    "images_background_small1.zip": ("f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4"),
}
PACKED = "omniglot.npz"

NUM_CLASSES = 1623
NUM_BACKGROUND = 964  # classes 1..964 are the background set, the others the evaluation set
NUM_DRAWERS = 20
SIDE = 105
_PACKED_BYTES = (SIDE * SIDE + 7) // 8
_LARGEST_MEMBER = 1 << 20  # bytes; real drawings have some hundred
_LARGEST_ARCHIVE = 1 << 27
_MEMBER = re.compile(r"(\d{4})_(\d{2})\.png")


class Drawings(NamedTuple):
    """Drawings of some classes, in the order of their official numbers.

    Args:
        numbers: int [classes], official global numbers in 1..1623.
        bits: uint8 [classes, 20, 1379], packed.
    """

    numbers: np.ndarray
    bits: np.ndarray


def read(path: Path) -> Drawings:
    """Read an archive or a packed file.

    Raises:
        FileNotFoundError: when there is none.
        ValueError: when it is damaged, hostile or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no Omniglot at {path}: give {PACKED}, an official zip, or a folder with them"
        )
    return read_packed(path) if path.suffix == ".npz" else read_zip(path)


def read_packed(path: Path) -> Drawings:
    """Read `omniglot.npz`, which has all classes."""
    shapes = {
        "background": (NUM_BACKGROUND, NUM_DRAWERS, _PACKED_BYTES),
        "evaluation": (NUM_CLASSES - NUM_BACKGROUND, NUM_DRAWERS, _PACKED_BYTES),
    }
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = [file[name] for name in shapes]
    except (*DAMAGED_ZIP, OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged or no packed Omniglot ({_first_line(error)}); delete it and get it again"
        ) from error
    for part, (name, shape) in zip(parts, shapes.items(), strict=True):
        if part.shape != shape or part.dtype != np.uint8:
            raise ValueError(
                f"{path} must hold `{name}` as uint8 {list(shape)}, got {part.dtype} "
                f"{list(part.shape)}; delete it and get it again"
            )
    return Drawings(np.arange(1, NUM_CLASSES + 1), np.concatenate(parts))


def write_packed(path: Path, drawings: Drawings) -> None:
    """Write all 1623 classes as `omniglot.npz`; the file appears only when it is complete."""
    background, evaluation = np.split(drawings.bits, [NUM_BACKGROUND])
    with temporary_beside(path) as unfinished:
        with unfinished.open("wb") as file:
            np.savez_compressed(file, background=background, evaluation=evaluation)
        os.replace(unfinished, path)


def read_zip(path: Path) -> Drawings:
    """Read an official archive, in memory: nothing of it is ever written to the disk.

    Raises:
        ValueError: when its hash is not the official one of that name, when a member would unpack
            outside its folder or is too large, or when a class does not have its 20 drawings.
        ImportError: when Pillow, which decodes the drawings, is missing.
    """
    if path.name in ARCHIVES and hash_of(path) != ARCHIVES[path.name]:
        raise ValueError(
            f"{path} is not the official file (SHA-256 differs); delete it and download it again"
        )
    pictures: dict[tuple[int, int], bytes] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            check_members(path, archive.infolist())
            for member in archive.infolist():
                name = _MEMBER.fullmatch(PurePosixPath(member.filename).name)
                if name:
                    pictures[int(name[1]), int(name[2])] = archive.read(member)
    except (*DAMAGED_ZIP, NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"{path} is a damaged zip ({_first_line(error)}); delete it and get it again"
        ) from error
    return _decode_classes(path, pictures)


def check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Refuse an archive with members that could leave their folder, or fill the memory.

    Raises:
        ValueError: for absolute names, drive letters, `..`, links, and members above 1 MiB or
            128 MiB in all.
    """
    problem = ""
    for member in members:
        name = member.filename.replace("\\", "/")
        leaves = name.startswith("/") or ":" in name or ".." in name.split("/")
        if leaves or stat.S_ISLNK(member.external_attr >> 16):
            problem = f"{member.filename!r} would unpack outside its folder"
        elif member.file_size > _LARGEST_MEMBER:
            problem = f"{member.filename!r} would unpack to {member.file_size} bytes"
    total = sum(member.file_size for member in members)
    if not problem and total > _LARGEST_ARCHIVE:
        problem = f"it would unpack to {total} bytes"
    if problem:
        raise ValueError(f"{path} is not safe to open: {problem}; get the official archive")


def _decode_classes(path: Path, pictures: dict[tuple[int, int], bytes]) -> Drawings:
    numbers = sorted({number for number, _ in pictures})
    expected = {(n, drawer) for n in numbers for drawer in range(1, NUM_DRAWERS + 1)}
    in_range = numbers and numbers[0] >= 1 and numbers[-1] <= NUM_CLASSES
    if not in_range or expected != set(pictures):
        raise ValueError(
            f"{path} must hold {NUM_DRAWERS} drawings of each class, named like 0001_01.png, got "
            f"{len(pictures)} of {len(numbers)} classes; get the official archive"
        )
    bits = [_decode(path, key, pictures[key]) for key in sorted(pictures)]
    return Drawings(np.array(numbers), np.stack(bits).reshape(len(numbers), NUM_DRAWERS, -1))


def _decode(path: Path, key: tuple[int, int], png: bytes) -> np.ndarray:
    """One drawing as packed bits [1379]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading Omniglot zips needs Pillow: pip install bilevel[cli]") from error
    name = f"{key[0]:04d}_{key[1]:02d}.png"
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.size != (SIDE, SIDE):
                raise ValueError(f"{image.size[0]} x {image.size[1]} pixels, not {SIDE} x {SIDE}")
            paper = np.asarray(image.convert("L")) > 127
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} has a damaged drawing {name} ({_first_line(error)}); get it again"
        ) from error
    return np.packbits(paper)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
