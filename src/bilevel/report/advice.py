"""The picture of an advice: error against cost, one page that opens anywhere."""

from html import escape
from pathlib import Path

import numpy as np

from bilevel.analysis.advise import Advice, Trial
from bilevel.report.plots import SERIES, Frame, Line, draw, swatch
from bilevel.report.style import CSS

_LEAST = 1e-6  # errors below it are rounding, and are drawn there
_MARKERS = ("o", "s", "^", "D")


def write_advice(advice: Advice, out: Path, title: str = "Estimators") -> Path:
    """Write error against time and against memory as one self-contained HTML page.

    Args:
        advice: what `bl.advise` returned.
        out: the file.

    Returns:
        The path written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render_advice(advice, title), encoding="utf-8", newline="\n")
    return out


def render_advice(advice: Advice, title: str) -> str:
    """The whole HTML document."""
    shown = [t for t in advice.trials if not t.failure and np.isfinite(t.error)]
    panels = [_panel("Error against time", "milliseconds for a batch of tasks", shown, _milliseconds)]
    if any(t.memory is not None for t in shown):
        panels.append(_panel("Error against memory", "MiB for a batch of tasks", shown, _mebibytes))
    legend = "".join(f"<li>{swatch(_line(i, 0.0, 1.0))}{escape(t.name)}</li>" for i, t in enumerate(shown))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)} · bilevel advice</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
        f'<header><p class="kicker">bilevel · Advice</p><h1>{escape(title)}</h1>'
        f'<p class="facts">{escape(advice.reason)}</p></header>\n<main>\n<section>\n'
        "<h2>Error against cost</h2>\n"
        '<p class="lead">√(bias² + noise²) of one call, relative to the true gradient, which is '
        f"{escape(advice.compared_with)}. Errors below {_LEAST:g} are drawn there.</p>\n"
        f'<ul class="legend">{legend}</ul>\n<div class="panels">{"".join(panels)}</div></section>\n'
        f"<section><h2>Figures</h2><pre>{escape(str(advice))}</pre></section>\n</main>\n</body>\n</html>\n"
    )


def _panel(name: str, xlabel: str, shown: list[Trial], cost) -> str:
    lines = [_line(i, cost(t), max(t.error, _LEAST)) for i, t in enumerate(shown) if np.isfinite(cost(t))]
    frame = Frame(label=name, xlabel=xlabel, whole=False)
    return f"<figure><figcaption><h3>{name}</h3></figcaption>{draw(lines, frame)}</figure>"


def _line(place: int, x: float, y: float) -> Line:
    """A point of its own colour and shape."""
    return Line(
        np.array([x]),
        np.array([y]),
        ink=SERIES[place % len(SERIES)],
        dash=("solid", "dashed", "dotted")[place // len(SERIES) % 3],
        marker=_MARKERS[place // len(SERIES) % len(_MARKERS)],
    )


def _milliseconds(trial: Trial) -> float:
    return 1e3 * trial.seconds


def _mebibytes(trial: Trial) -> float:
    return float("nan") if trial.memory is None else trial.memory.peak / 2**20
