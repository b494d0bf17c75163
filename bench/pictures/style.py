"""What all pictures share: colours, plain axes, small files, and the tables that figures are kept in."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = DOCS / "results"
# Okabe and Ito: told apart with any kind of colour vision. Markers and line styles tell them apart without.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, YELLOW, INK, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#222222", "#8A8A8A"
CYCLE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, INK, GREY)
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
_MEBI = {"B": 2.0**-20, "KiB": 2.0**-10, "MiB": 1.0, "GiB": 1024.0}

plt.rcParams.update(
    {
        "font.size": 9.5,
        "axes.titlesize": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "lines.linewidth": 1.7,
        "lines.markersize": 5,
        "figure.facecolor": "white",
    }
)


def table(name: str) -> list[dict[str, str]]:
    """Rows of docs/results/NAME.csv; the pages show the same cells."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(f"expected {path}, got nothing there; it is part of the repository")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def keep(name: str, rows: Iterable[dict[str, Any]]) -> None:
    """Write docs/results/NAME.csv, and print it as the Markdown of its page."""
    rows = list(rows)
    path = RESULTS / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")


def number(cell: str) -> float:
    """The first number of a cell, sizes in MiB: "1.11 GiB" is 1136.6; NaN where there is none.

    A time in milliseconds or seconds stays in the unit of its column.
    """
    parts = cell.split()
    try:
        value = float(parts[0])
    except (IndexError, ValueError):
        return float("nan")
    return value * _MEBI.get(parts[1], 1.0) if len(parts) > 1 else value


def pictures(axis, images: np.ndarray, gap: int = 2) -> None:
    """Grey pictures `[rows, columns, height, width]` of 0..1, ink dark, as one sheet without axes."""
    rows, columns, height, width = images.shape
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap), 0.12)
    for i, j in np.ndindex(rows, columns):
        sheet[i * (height + gap) :, j * (width + gap) :][:height, :width] = np.clip(images[i, j], 0, 1)
    axis.imshow(1 - sheet, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write folder/NAME.png in 128 colours: a third of the bytes, and rare colours kept."""
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    with Image.open(path) as image:
        few = image.convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size / 1024:.0f} KB")
