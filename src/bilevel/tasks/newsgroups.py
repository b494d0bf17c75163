"""20 newsgroups: 18 846 messages of 20 groups as tf-idf vectors (Lang, 1995; the "bydate" version)."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.tasks.tabular import Tabular

FOLDERS = ("20news-bydate-train", "20news-bydate-test")  # of the official archive, unpacked
CACHE = "20news-bydate_py3.pkz"  # what scikit-learn keeps
_EXPECTED = f"{CACHE}, or with {FOLDERS[0]} and {FOLDERS[1]}"


def newsgroups(
    data: str | os.PathLike | None = None,
    download: bool = False,
    seed: int = 0,
    *,
    num_features: int = 5000,
    remove: tuple[str, ...] = (),
) -> Tabular:
    """The official training messages halved into support and validation, and the official test messages.

    The split of Grazzi et al.: 5657 messages each for support and validation, with the shares of the groups
    kept, and 7532 for the test. Words and their weights are those of the support alone.

    It is looked for at `data`, in the folder of the environment variable `BILEVEL_DATA` and in scikit-learn's
    own cache (`$SCIKIT_LEARN_DATA` or `~/scikit_learn_data`), in this order: as the file that scikit-learn
    keeps, or as the official archive unpacked (`20news-bydate-train/<group>/<message>`, and `-test`).

    Args:
        data: a folder.
        download: let scikit-learn get it (14 MB) into its cache when nothing is found.
        seed: of the split.
        num_features: the most frequent words that are kept; the arrays are dense, 4 bytes a word and message.
        remove: "headers", "footers", "quotes": without them the groups cannot be told by who writes.

    Returns:
        A `Tabular`: x float32 [n, num_features], rows of length 1; y int32 [n].

    Raises:
        FileNotFoundError: when there are no messages.
        ValueError: when there are other groups in the test, or too few messages.
        OSError: when the download fails or a file is damaged.
        ImportError: when scikit-learn is missing.

    Reference: Grazzi, Franceschi, Pontil, Salzo, On the iteration complexity of hypergradient computation,
    2020.

    >>> newsgroups(download=True).classes[:2]  # doctest: +SKIP
    ('alt.atheism', 'comp.graphics')
    """
    if num_features < 1:
        raise ValueError(f"num_features must be at least 1, got {num_features}")
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("20 newsgroups needs scikit-learn: pip install scikit-learn") from error
    train, test = _find(None if data is None else Path(data).expanduser(), download, remove)
    if list(train.target_names) != list(test.target_names):
        raise ValueError("training and test messages must be of the same groups; unpack the archive again")
    rows = np.arange(len(train.target))
    try:
        first, second = train_test_split(rows, train_size=0.5, stratify=train.target, random_state=seed)
    except ValueError as error:
        raise ValueError(f"{len(rows)} messages cannot be halved ({error}); unpack all of them") from error
    words = TfidfVectorizer(max_features=num_features, sublinear_tf=True)
    words.fit([train.data[row] for row in first])

    def part(bunch, rows):
        x = words.transform([bunch.data[row] for row in rows]).astype(np.float32).toarray()
        return x, np.asarray(bunch.target)[rows].astype(np.int32)

    everything = np.arange(len(test.target))
    names = tuple(map(str, words.get_feature_names_out()))
    groups = tuple(map(str, train.target_names))
    return Tabular(part(train, first), part(train, second), part(test, everything), names, groups)


def _find(data: Path | None, download: bool, remove: tuple[str, ...]) -> tuple[Any, Any]:
    """Training and test messages with their groups."""
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"no folder {data}; expected one with {_EXPECTED}")
    told = [Path(os.environ["BILEVEL_DATA"])] if os.environ.get("BILEVEL_DATA") else []
    cache = Path(os.environ.get("SCIKIT_LEARN_DATA") or "~/scikit_learn_data").expanduser()
    for folder in [data] if data is not None else [*told, cache]:
        if (folder / CACHE).is_file():
            return _cached(folder, False, remove)
        if all((folder / name).is_dir() for name in FOLDERS):
            return _unpacked(folder, remove)
    if download and data is None:
        return _cached(cache, True, remove)
    raise FileNotFoundError(
        f"no 20 newsgroups in {data or ' or '.join(map(str, [*told, cache]))}: pass download=True "
        f"(--download) to get it (14 MB), or data= a folder with {_EXPECTED}"
    )


def _cached(folder: Path, download: bool, remove: tuple[str, ...]) -> tuple[Any, Any]:
    """As scikit-learn keeps it."""
    from sklearn.datasets import fetch_20newsgroups

    def read(subset):
        return fetch_20newsgroups(
            data_home=folder, subset=subset, remove=remove, shuffle=False, download_if_missing=download
        )

    try:
        return read("train"), read("test")
    except Exception as error:  # what is damaged raises whatever unpickling meets
        doing = "could not be got" if download else "is damaged"
        raise OSError(f"20 newsgroups in {folder} {doing} ({error}); remove {CACHE} and try again") from error


def _unpacked(folder: Path, remove: tuple[str, ...]) -> tuple[Any, Any]:
    """Folders of messages, one for each group."""
    from sklearn.datasets import load_files

    if remove:
        raise ValueError(f"remove={remove} is for the file {CACHE} of scikit-learn, {folder} holds messages")
    train, test = (load_files(folder / name, encoding="latin1", shuffle=False) for name in FOLDERS)
    return train, test
