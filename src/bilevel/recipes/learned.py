"""What the meta-parameters of a run themselves say: figures, curves and pictures, for the report."""

from pathlib import Path
from typing import Any

import numpy as np

from bilevel.problem import Meta
from bilevel.recipes.experiment import Experiment

PICTURES = "learned.npz"


def learned(experiment: Experiment, meta: Meta) -> dict[str, dict[str, Any]]:
    """Figures and curves, as JSON values.

    Raises:
        ValueError: for a figure that is no number, or a line that is no [n].
    """
    figures = experiment.meta_figures(meta) if experiment.meta_figures is not None else {}
    lines = experiment.meta_lines(meta) if experiment.meta_lines is not None else {}
    for name, value in figures.items():
        if np.ndim(value):
            raise ValueError(f"meta_figures must give numbers, got {name!r} of shape {np.shape(value)}")
    for name, line in lines.items():
        if np.ndim(line) != 1:
            raise ValueError(f"meta_lines must give arrays [n], got {name!r} of shape {np.shape(line)}")
    return {
        "figures": {name: float(value) for name, value in figures.items()},
        "lines": {name: np.asarray(line, float).tolist() for name, line in lines.items()},
    }


def save_pictures(folder: Path, experiment: Experiment, meta: Meta) -> None:
    """Write learned.npz, one array [n, height, width] for each caption, where there are pictures.

    Raises:
        ValueError: for pictures of another shape.
    """
    if experiment.meta_pictures is None:
        return
    found = {name: np.asarray(array) for name, array in experiment.meta_pictures(meta).items()}
    for name, array in found.items():
        if array.ndim != 3:
            raise ValueError(f"meta_pictures must be [n, height, width], got {name!r} of {array.shape}")
    draft = folder / "learned.tmp.npz"  # savez adds the ending itself
    np.savez_compressed(
        draft,
        allow_pickle=False,
        captions=np.array(list(found)),
        **{f"pictures_{place}": array for place, array in enumerate(found.values())},
    )
    draft.replace(folder / PICTURES)
