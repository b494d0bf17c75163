"""Pictures of a Hugging Face `datasets` object, in memory or saved to a folder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bilevel.tasks.found import ALIASES, Found, join


def is_hugging_face(data: Any) -> bool:
    """Whether it looks like a `datasets.Dataset` or `datasets.DatasetDict`."""
    return hasattr(data, "column_names") and not isinstance(data, np.ndarray)


def from_disk(folder: Path) -> Any:
    """What `save_to_disk` left in a folder.

    Raises:
        ImportError: when `datasets` is missing.
        ValueError: when the folder is damaged.
    """
    try:
        import datasets  # pyright: ignore[reportMissingImports]  (no extra brings it)
    except ImportError as error:
        raise ImportError(f"{folder} is a Hugging Face data set: pip install datasets") from error
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # Arrow has its own errors
        raise ValueError(f"{folder} is a damaged Hugging Face data set ({error}); save it again") from error


def hugging_face(data: Any, label: str | None = None) -> Found:
    """The pictures of a `Dataset`, or of a `DatasetDict`, whose keys are the splits.

    Args:
        data: with a column of pictures, and one of labels: `ClassLabel`, integers or text.
        label: the column of labels; needed when there are several, as in CIFAR-100.

    Raises:
        ValueError: when the columns cannot be told, or a key is no split.
    """
    if not isinstance(data, Mapping):
        return _one(data, label)
    parts = {}
    for key, part in data.items():
        if key not in ALIASES:
            raise ValueError(
                f"a split must be one of {', '.join(sorted(ALIASES))}, got {key!r}; take or concatenate "
                "the splits yourself and pass splits (--splits) by class"
            )
        parts[ALIASES[key]] = _one(part, label)
    return join(parts, "a Hugging Face data set")


def _one(data: Any, label: str | None) -> Found:
    features = data.features
    images = [c for c in data.column_names if type(features[c]).__name__ == "Image"]
    images = images or [c for c in data.column_names if c in ("image", "img")]
    labels = [c for c in data.column_names if type(features[c]).__name__ == "ClassLabel"]
    labels = labels or [c for c in data.column_names if c in ("label", "labels")]
    if label is not None:
        labels = [c for c in data.column_names if c == label]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"one column of pictures and one of labels are needed, got {images} and {labels} of "
            f"{list(data.column_names)}; pass label= (--label), or rename with rename_column"
        )
    values = list(data[labels[0]])
    if any(v is None or v == -1 for v in values):
        raise ValueError(f"column {labels[0]} has rows without a label; filter them out")
    unique = sorted(set(values))
    place = {value: i for i, value in enumerate(unique)}
    names = getattr(features[labels[0]], "names", None)
    return Found(
        np.array([place[v] for v in values], np.int64),
        [str(names[v]) if names else str(v) for v in unique],
        [None] * len(unique),
        lambda i: _picture(data[i][images[0]], i),
        "a Hugging Face data set",
    )


def _picture(value: Any, i: int) -> Any:
    if isinstance(value, dict):  # an undecoded row
        if value.get("bytes") is None:
            return Path(value["path"]).read_bytes()
        return value["bytes"]
    if value is None:
        raise ValueError(f"row {i} has no picture; filter it out")
    return np.asarray(value, np.uint8) if isinstance(value, list) else value
