"""The example tasks: few-shot images with the model's answers, or curves fitted to a few points."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from bilevel.report.plots import Frame, Line, draw, swatch
from bilevel.report.runs import Run

MAX_SUPPORT = 25
MAX_QUERY = 15
MAX_FITS = 4  # curves drawn between 0 and K adaptation steps, both included
_COLOURS = 10  # class colours that style.py defines; the number beside them is what identifies


def examples(run: Run, limit: int, level: int) -> str:
    """The first `limit` example tasks of a run under headings `h<level>`, or "" without any."""
    if "after" in run.examples:
        return _classification(run, limit, level)
    if "steps" in run.examples:
        return _regression(run, limit, level)
    return ""


def _classification(run: Run, limit: int, level: int) -> str:
    arrays = run.examples
    tasks = [
        _task(index, {name: array[index] for name, array in arrays.items()}, level)
        for index in range(min(limit, len(arrays["after"])))
    ]
    return "".join(tasks)


def _task(index: int, task: dict[str, np.ndarray], level: int) -> str:
    before, after, truth = task["before"], task["after"], task["query_y"]
    support = _spread(task["support_y"], MAX_SUPPORT)
    query = _spread(truth, MAX_QUERY)
    support_images = _unit(task["support_x"])
    query_images = _unit(task["query_x"])
    cards = "".join(_support(support_images[place], int(task["support_y"][place])) for place in support)
    answers = "".join(
        _query(query_images[place], int(truth[place]), before[place], after[place]) for place in query
    )
    right = [int((_answers(probabilities) == truth).sum()) for probabilities in (before, after)]
    return (
        f'<article class="task"><h{level}>Task {index + 1}</h{level}>'
        f'<p class="score">{right[0]} of {len(truth)} right before adaptation, '
        f"<strong>{right[1]} of {len(truth)}</strong> after</p>"
        f'<div class="shelf"><div><h{level + 1}>Support'
        f"{_of(len(support), len(task['support_y']))}</h{level + 1}>"
        f'<ul class="cards">{cards}</ul></div>'
        f"<div><h{level + 1}>Query{_of(len(query), len(truth))}</h{level + 1}>"
        f'<ul class="cards">{answers}</ul></div></div></article>'
    )


def _of(shown: int, total: int) -> str:
    return "" if shown == total else f" <span>{shown} of {total} shown</span>"


def _spread(labels: np.ndarray, limit: int) -> list[int]:
    """At most `limit` places, taken from the classes in turn and shown in their own order."""
    queues = [list(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    chosen: list[int] = []
    while len(chosen) < min(limit, len(labels)):
        for queue in queues:
            if queue and len(chosen) < limit:
                chosen.append(int(queue.pop(0)))
    return sorted(chosen)


def _answers(probabilities: np.ndarray) -> np.ndarray:
    """Most probable class, or -1 where the probabilities are not finite."""
    best = np.where(np.isfinite(probabilities), probabilities, -np.inf).argmax(-1)
    return np.where(np.isfinite(probabilities).all(-1), best, -1)


def _label(label: int) -> str:
    return f'<span class="label"><i class="c{label % _COLOURS}"></i>class {label}</span>'


def _support(image: np.ndarray, label: int) -> str:
    picture = _image(image, f"support image of class {label}")
    return f'<li class="card">{picture}{_label(label)}</li>'


def _query(image: np.ndarray, truth: int, before: np.ndarray, after: np.ndarray) -> str:
    right = int(_answers(after)) == truth
    verdict = "right" if right else "wrong"
    picture = _image(image, f"query image of class {truth}, answered {verdict} after adaptation")
    mark = "✓" if right else "✗"
    return (
        f'<li class="card {verdict}"><div class="frame">{picture}'
        f'<b class="mark" aria-hidden="true">{mark}</b></div>{_label(truth)}'
        f"{_answer('before', before, truth)}{_answer('after', after, truth)}</li>"
    )


def _answer(when: str, probabilities: np.ndarray, truth: int) -> str:
    best = int(_answers(probabilities))
    if best < 0:
        return f'<span class="answer {when}"><em>{when}</em> NaN ✗</span>'
    mark = "✓" if best == truth else "✗"
    return (
        f'<span class="answer {when}"><em>{when}</em> '
        f"<b>{best}</b> · {100 * probabilities[best]:.0f} % {mark}</span>"
    )


def _unit(images: np.ndarray) -> np.ndarray:
    """To 0..1; images outside of it are stretched together, so that they stay comparable."""
    images = np.nan_to_num(np.asarray(images, float), nan=0.0, posinf=1.0, neginf=0.0)
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        images = (images - low) / ((high - low) or 1.0)
    return images


def _image(image: np.ndarray, alt: str) -> str:
    """A PNG inside the page. Anything but 1 or 3 channels shows its first channel."""
    pixels = np.round(image * 255).astype(np.uint8)
    picture = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def _regression(run: Run, limit: int, level: int) -> str:
    arrays = run.examples
    points = len(arrays["steps"])
    numbers = [int(step) for step in arrays.get("shown", range(points))]  # older files hold every step
    last = numbers[-1]
    near = np.linspace(0, last, min(MAX_FITS, points))
    places = {int(np.abs(np.array(numbers) - part).argmin()) for part in near}
    if points > 2:
        places.add(1)  # the first step is where a good start shows
    shown = sorted(places)
    figures, legend = [], ""
    for index in range(min(limit, arrays["steps"].shape[1])):
        grid = np.asarray(arrays["grid"][index], float)
        lines = [_fit(numbers[p], last, grid, arrays["steps"][p, index]) for p in shown]
        keys = [f"after {numbers[p]} step{'' if numbers[p] == 1 else 's'}" for p in shown]
        if "truth" in arrays:
            lines.append(Line(grid, arrays["truth"][index], ink="ink", dash="dotted", width=1.6))
            keys.append("truth")
        x, y = arrays["support_x"][index, :, 0], arrays["support_y"][index, :, 0]
        lines.append(Line(x, y, ink="ink", dash="none", marker="o"))
        keys.append("support points")
        rows = zip(lines, keys, strict=True)
        legend = "".join(f"<li>{swatch(line)}{key}</li>" for line, key in rows)
        frame = Frame(
            label=f"Task {index + 1}: the curve after 0 to {last} adaptation steps, "
            f"with {len(x)} support points",
            whole=False,
            auto_log=False,
        )
        figures.append(
            f"<figure><figcaption><h{level}>Task {index + 1}</h{level}></figcaption>"
            f"{draw(lines, frame)}</figure>"
        )
    return f'<ul class="legend">{legend}</ul><div class="panels">{"".join(figures)}</div>'


def _fit(step: int, last: int, grid: np.ndarray, values: np.ndarray) -> Line:
    if step == 0:
        return Line(grid, values, ink="muted", dash="dashed", width=1.4)
    opacity = 1.0 if step == last else 0.35 + 0.4 * step / last
    return Line(grid, values, ink="s0", width=2.2 if step == last else 1.4, opacity=opacity)
