"""Small pictures, and the files of every form that tests store them in."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from bilevel.tasks.stored import load, open_stored

BY_SPLIT = {"train": ["ant", "bee"], "val": ["cat"], "test": ["dog", "eel"]}
COUNTS = {"train": (2, 6), "validation": (1, 3), "test": (2, 6)}
NAMES = ("ant", "bee", "cat", "dog", "eel")


def picture(name, i, shape=(8, 8, 3)):
    """Picture i of a class: no two are alike."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {i}".encode()).digest()[:4])
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def assert_holds(folder, classes=BY_SPLIT, shape=(8, 8, 3), named=True):
    """Every split has exactly the pictures of its classes, under their names."""
    opened = open_stored(folder, verify=True)
    split_of = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
    for split, names in classes.items():
        images, labels = load(folder, split_of[split])
        assert len(images) == 3 * len(names)
        for label, name in zip(np.unique(labels), names, strict=True):
            assert not named or opened.names[label] == name
            got = {p.tobytes() for p in images[labels == label]}
            assert got == {picture(name, i, shape).tobytes() for i in range(3)}
    return opened


def stacked(names, shape=(8, 8, 3)):
    return np.stack([picture(name, i, shape) for name in names for i in range(3)])


@pytest.fixture
def by_class(tmp_path):
    for name in NAMES:
        for i in range(3):
            save(tmp_path / "data" / name / f"{i}.png", picture(name, i))
    return tmp_path / "data"


@pytest.fixture
def by_split(tmp_path):
    for split, names in BY_SPLIT.items():
        for name in names:
            for i in range(3):
                save(tmp_path / "data" / split / name / f"{i}.png", picture(name, i))
    return tmp_path / "data"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"
