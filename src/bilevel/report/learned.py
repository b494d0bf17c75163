"""What was learned, drawn: figures, curves and pictures of the meta-parameters themselves."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from bilevel.errors import DAMAGED_ZIP
from bilevel.report.curves import MAX_PANELS, series
from bilevel.report.html import table
from bilevel.report.plots import Frame, Line, draw
from bilevel.report.runs import Run, number

MAX_PICTURES = 60  # of one caption
_PIXELS = 56  # width of a picture on the page


def learned(runs: Sequence[Run]) -> str:
    """Figures in a table, curves in panels, pictures in rows; "" where no run has any."""
    return _figures(runs) + _lines(runs) + "".join(_pictures(run, len(runs) > 1) for run in runs)


def _part(run: Run, name: str) -> dict[str, Any]:
    found = run.evaluation.get("learned")
    part = found.get(name) if isinstance(found, dict) else None
    return part if isinstance(part, dict) else {}


def _figures(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in _part(run, "figures")))
    if not names:
        return ""
    rows = []
    for name in names:
        values = [number(_part(run, "figures").get(name)) for run in runs]
        cells = [f"{value:.4g}" if np.isfinite(value) else "—" for value in values]
        rows.append([escape(str(name)), *cells])
    heads = [escape(run.name) for run in runs] if len(runs) > 1 else ["Value"]
    return table(["Figure", *heads], rows, "What was learned")


def _lines(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(name for run in runs for name in _part(run, "lines")))
    panels = []
    for name in names[:MAX_PANELS]:
        lines = []
        for place, run in enumerate(runs):
            values = _part(run, "lines").get(name)
            if isinstance(values, list) and values:
                y = np.array([number(value) for value in values])
                tag = str(place + 1) if len(runs) > 1 else ""
                lines.append(Line(np.arange(len(y)), y, ink=series(place), tag=tag))
        title = escape(str(name))
        if lines:
            plot = draw(lines, Frame(f"{name}, learned"))
            panels.append(f"<figure><figcaption><h3>{title}</h3></figcaption>{plot}</figure>")
    return f'<div class="panels">{"".join(panels)}</div>' if panels else ""


def _pictures(run: Run, named: bool) -> str:
    rows = []
    for caption, pictures in _read(run).items():
        images = "".join(_image(picture, caption) for picture in pictures[:MAX_PICTURES])
        more = len(pictures) - MAX_PICTURES
        note = f" <small>and {more} more</small>" if more > 0 else ""
        rows.append(f"<figure><figcaption>{escape(caption)}{note}</figcaption>{images}</figure>")
    title = f"<h3>{escape(run.name)}</h3>" if named and rows else ""
    # Side by side: a caption may have a single picture.
    row = '<div style="display:flex;flex-wrap:wrap;gap:0 1rem">'
    return f"{title}{row}{''.join(rows)}</div>" if rows else ""


def _read(run: Run) -> dict[str, np.ndarray]:
    """The arrays of learned.npz by caption; nothing where it is missing or damaged."""
    try:
        with np.load(run.folder / "learned.npz", allow_pickle=False) as file:
            captions = [str(caption) for caption in file["captions"]]
            found = {name: np.asarray(file[f"pictures_{i}"], float) for i, name in enumerate(captions)}
    except (*DAMAGED_ZIP, OSError, ValueError, KeyError):
        return {}
    return {name: array for name, array in found.items() if array.ndim == 3 and array.size}


def _image(picture: np.ndarray, caption: str) -> str:
    """A PNG inside the page; values are cut to 0..1."""
    pixels = np.round(255 * np.clip(np.nan_to_num(picture), 0, 1)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    style = f"width:{_PIXELS}px;image-rendering:pixelated;margin:2px"
    return f'<img src="data:image/png;base64,{data}" alt="{escape(caption)}" style="{style}">'
