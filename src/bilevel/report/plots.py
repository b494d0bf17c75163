"""Curves as inline SVG with the colours of the page, so that dark mode needs no second plot.

No text from a file ever reaches matplotlib: names and legends are HTML, which leaves nothing for
mathtext to interpret.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)

MAX_POINTS = 2000  # above this a line is thinned
_HUGE = 1e100  # beyond it axis arithmetic overflows; no float32 loss gets there
THINNED_POINTS = 500  # about the pixels a panel has
SERIES = ("s0", "s1", "s2", "s3", "s4", "s5", "s6", "s7")
_INKS = (*SERIES, "ink", "muted", "rule", "paper")
# Matplotlib gets one placeholder colour for each of the page's variables.
_PLACEHOLDERS = {name: f"#0badc{index:01x}" for index, name in enumerate(_INKS)}
_RC: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bilevel",
    "svg.image_inline": True,
    "path.simplify": True,
    "path.simplify_threshold": 0.3,
    "font.size": 10.5,
    "axes.unicode_minus": True,
    "text.usetex": False,
}
_DASHES = {"solid": "-", "dashed": (0, (4, 2.5)), "dotted": (0, (1.2, 2)), "none": "none"}
_CSS_DASHES = {"solid": "", "dashed": "5 3", "dotted": "1.5 2.5", "none": ""}


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Args:
        x, y: `[n]`; values that are not finite leave a gap.
        half: `[n]` half-width of the band around `y`, or None.
        ink: a colour of the page: `s0`..`s7`, `ink` or `muted`.
        dash: `solid`, `dashed`, `dotted` or `none`.
        marker: a matplotlib marker, or "".
        width: line width in points.
        opacity: 0..1.
        tag: a short mark at the end of the line, such as a run's number.
    """

    x: np.ndarray
    y: np.ndarray
    half: np.ndarray | None = None
    ink: str = "s0"
    dash: str = "solid"
    marker: str = ""
    width: float = 1.8
    opacity: float = 1.0
    tag: str = ""


@dataclass(frozen=True)
class Frame:
    """What surrounds the lines.

    Args:
        label: what a screen reader says.
        xlabel: text under the horizontal axis.
        percent: whether values 0..1 are shown as percentages.
        whole: whether the horizontal axis counts.
        level: a dotted horizontal line, such as chance, or None.
        auto_log: whether a wide range of positive values gets a logarithmic axis.
    """

    label: str
    xlabel: str = ""
    percent: bool = False
    whole: bool = True
    level: float | None = None
    auto_log: bool = True


def thin(values: np.ndarray) -> np.ndarray:
    """A long line as the means of neighbours; a short one as it is.

    Half-widths are averaged too, not divided: the band keeps saying how sure one point is.

    >>> thin(np.arange(4.0)), thin(np.arange(50_000.0)).shape
    (array([0., 1., 2., 3.]), (500,))
    """
    values = np.where(np.isfinite(values), values, np.nan).astype(float)
    values = np.clip(values, -_HUGE, _HUGE)
    if len(values) <= MAX_POINTS:
        return values
    groups = [group[np.isfinite(group)] for group in np.array_split(values, THINNED_POINTS)]
    return np.array([group.mean() if len(group) else np.nan for group in groups])


def draw(lines: Sequence[Line], frame: Frame) -> str:
    """An `<svg>` element; the same lines give the same bytes."""
    with style.context("default"), matplotlib.rc_context(_RC):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        figure.patch.set_alpha(0.0)
        axes = figure.add_subplot()
        _dress(axes, frame)
        drawn = [_thinned(line) for line in lines]
        _limit(axes, drawn, frame)
        for line in drawn:
            _add(axes, line)
        if frame.level is not None and np.isfinite(frame.level):
            axes.axhline(frame.level, color=_PLACEHOLDERS["muted"], lw=1.1, ls=_DASHES["dotted"])
        _tag(axes, drawn)
        buffer = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    return _inline(buffer.getvalue(), frame.label)


def swatch(line: Line) -> str:
    """The key of a line for a legend written in HTML."""
    colour = f"var(--{line.ink})"
    parts = []
    if line.dash != "none":
        parts.append(
            f'<line x1="1" y1="6" x2="27" y2="6" stroke="{colour}" '
            f'stroke-width="{line.width + 0.4:g}" stroke-dasharray="{_CSS_DASHES[line.dash]}" '
            f'opacity="{line.opacity:g}"/>'
        )
    if line.marker == "s":
        parts.append(f'<rect x="11" y="3" width="6" height="6" fill="{colour}"/>')
    elif line.marker:
        parts.append(f'<circle cx="14" cy="6" r="3.4" fill="{colour}"/>')
    body = "".join(parts)
    return f'<svg class="swatch" viewBox="0 0 28 12" aria-hidden="true">{body}</svg>'


def _thinned(line: Line) -> Line:
    half = np.full(len(line.y), np.nan) if line.half is None else line.half
    return replace(line, x=thin(line.x), y=thin(line.y), half=thin(half))


def _dress(axes: Axes, frame: Frame) -> None:
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_PLACEHOLDERS["rule"])
    axes.grid(axis="y", color=_PLACEHOLDERS["rule"], lw=0.7)
    axes.set_axisbelow(True)
    ink = _PLACEHOLDERS["muted"]
    axes.tick_params(axis="both", which="both", length=0, labelcolor=ink, pad=5)
    axes.set_xlabel(frame.xlabel, color=ink, labelpad=5, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=frame.whole))
    if frame.whole:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))


def _count(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


def _limit(axes: Axes, lines: Sequence[Line], frame: Frame) -> None:
    """Limits from the means, so that one wide interval cannot squash them."""
    values = [line.y[np.isfinite(line.y)] for line in lines]
    if frame.level is not None and np.isfinite(frame.level):
        values.append(np.array([frame.level]))
    flat = np.concatenate(values) if values else np.zeros(0)
    axes.margins(x=0.03)
    if not len(flat):
        axes.set_ylim(0, 1)
        axes.set_yticks([])
        note: Any = {"ha": "center", "va": "center", "color": _PLACEHOLDERS["muted"]}
        axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, **note)
        return
    low, high = float(flat.min()), float(flat.max())
    if frame.percent:
        axes.set_ylim(min(-0.02, low), max(1.03, high))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
        return
    if frame.auto_log and low > 0 and high / low > 30:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
        decades = np.log10(high / low)
        subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=7))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        return
    edges = [np.concatenate([line.y - line.half, line.y + line.half]) for line in lines
             if line.half is not None]  # fmt: skip
    band = np.concatenate([np.zeros(0), *edges])
    band = band[np.isfinite(band)]
    span = (high - low) or abs(high) or 1.0
    if len(band):
        low = max(min(low, float(band.min())), low - span)
        high = min(max(high, float(band.max())), high + span)
    axes.set_ylim(low - 0.06 * span, high + 0.06 * span)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _add(axes: Axes, line: Line) -> None:
    colour = _PLACEHOLDERS[line.ink]
    if line.half is not None and np.isfinite(line.half).any():
        low, high = line.y - line.half, line.y + line.half
        if axes.get_yscale() == "log":
            low = np.maximum(low, axes.get_ylim()[0] * 0.5)
        if len(line.x) == 1:  # a band needs two points
            gaps = np.vstack([line.y - low, high - line.y])
            axes.errorbar(
                line.x, line.y, yerr=np.nan_to_num(gaps), fmt="none", ecolor=colour, elinewidth=1.2,
                capsize=3, alpha=line.opacity,
            )  # fmt: skip
        axes.fill_between(line.x, low, high, color=colour, alpha=0.16 * line.opacity, lw=0)
    axes.plot(
        line.x,
        line.y,
        color=colour,
        lw=line.width if len(line.x) < 200 else 0.75 * line.width,
        ls=_DASHES[line.dash],
        alpha=line.opacity,
        marker=line.marker or ("." if len(line.x) == 1 else ""),
        ms=5.0,
        mew=0,
        solid_capstyle="round",
    )


def _tag(axes: Axes, lines: Sequence[Line]) -> None:
    """Marks at the ends of lines, pushed apart where they would cover each other."""
    ends = []
    for line in lines:
        finite = np.flatnonzero(np.isfinite(line.y))
        if line.tag and len(finite):
            x, y = line.x[finite[-1]], line.y[finite[-1]]
            ends.append([axes.transLimits.transform(axes.transScale.transform((x, y)))[1], line])
    ends.sort(key=lambda end: (end[0], end[1].tag))
    for before, after in pairwise(ends):
        after[0] = max(after[0], before[0] + 0.075)
    for height, line in ends:
        axes.text(
            1.0, height, line.tag, color=_PLACEHOLDERS[line.ink], transform=axes.transAxes,
            ha="left", va="center", fontweight="bold", parse_math=False,
        )  # fmt: skip


def _inline(svg: str, label: str) -> str:
    """From a file to an element: no prologue, namespaces, ids of its own or fixed size."""
    svg = svg[svg.index("<svg") :]
    noise = r"<metadata>.*?</metadata>|<style.*?</style>|<defs>\s*</defs>|<!--.*?-->"
    svg = re.sub(noise, "", svg, flags=re.S)
    box = re.search(r'viewBox="([^"]*)"', svg)
    body = svg[svg.index(">") + 1 :]
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href=", "href=")
    body = re.sub(r"font: (bold|700) ([\d.]+px) [^;\"]*", r"font-weight: 700; font-size: \2", body)
    body = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", body)
    for name, placeholder in _PLACEHOLDERS.items():
        body = body.replace(placeholder, f"var(--{name})")
    body = re.sub(r"\s*\n\s*", "\n", body).strip()
    view = box.group(1) if box else "0 0 403.2 230.4"
    return f'<svg class="plot" viewBox="{view}" role="img" aria-label="{escape(label)}">{body}'
