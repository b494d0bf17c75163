"""What a run says while it trains: a live bar on a terminal, a plain line now and then elsewhere."""

import importlib.util
import math
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

PLAIN_SECONDS = 10.0


class Progress(Protocol):
    """What `progress` yields."""

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show that `step` outer steps are done, and the figures of the last chunk."""
        ...


@contextmanager
def progress(title: str, total: int, start: int = 0, enabled: bool | None = None) -> Iterator[Progress]:
    """Show how far a run is: steps, speed, time left, losses and accuracies.

    Args:
        title: what the run is called.
        total: outer steps in the whole run.
        start: outer steps done before, for a resumed run.
        enabled: True forces the live bar, False shows nothing; None shows the bar on a terminal, and
            elsewhere, or without rich, a plain line every ten seconds.

    >>> with progress("maml", total=200) as display:
    ...     display.update(100, {"query_loss": 0.5, "query_accuracy": 0.75})
    maml 100/200  query loss 0.5000 accuracy 75.0%
    """
    pace = _Pace(title, total, start)
    live = _has_cursor(sys.stdout) if enabled is None else enabled
    if enabled is False:
        yield _Nothing()
    elif live and importlib.util.find_spec("rich") is not None:
        with _Bar(pace, force=enabled is True) as bar:
            yield bar
    else:
        lines = _Lines(pace)
        try:
            yield lines
        finally:
            lines.last()


class _Pace:
    """Step, speed and figures at the last update."""

    def __init__(self, title: str, total: int, start: int):
        self.title, self.total, self.start, self.step = title, total, start, start
        self.values: Mapping[str, float] = {}
        # Only times of updates: what passes before the first one is mostly compilation.
        self._times: deque[tuple[float, int]] = deque(maxlen=20)

    def update(self, step: int, values: Mapping[str, float]) -> None:
        self.step, self.values = step, values
        self._times.append((time.monotonic(), step))

    def speed(self) -> str:
        rate = self._rate()
        return f"{rate:.{0 if rate >= 100 else 1 if rate >= 1 else 3}f} steps/s" if rate else ""

    def left(self) -> str:
        rate = self._rate()
        return f"{_duration((self.total - self.step) / rate)} left" if rate else ""

    def figures(self) -> str:
        """`query loss 0.5000 accuracy 75.0%  support loss ...`, of what is there."""
        groups = []
        for name in ("query", "support"):
            loss, accuracy = (self.values.get(f"{name}_{what}") for what in ("loss", "accuracy"))
            parts = [] if loss is None else [f"loss {_number(loss)}"]
            parts += [] if accuracy is None else [f"accuracy {100 * accuracy:.1f}%"]
            groups += [" ".join([name, *parts])] if parts else []
        return "  ".join(groups)

    def _rate(self) -> float:
        """Outer steps a second over the last updates, 0 where nothing is known yet."""
        if len(self._times) < 2:
            return 0.0
        (began, first), (ended, last) = self._times[0], self._times[-1]
        return (last - first) / max(ended - began, 1e-9)


class _Nothing:
    def update(self, step: int, values: Mapping[str, float]) -> None:
        pass


class _Lines:
    """Plain lines, without escape codes: the first, one every ten seconds, and the last."""

    def __init__(self, pace: _Pace):
        self._pace = pace
        self._shown_at = -math.inf
        self._shown_step = pace.start

    def update(self, step: int, values: Mapping[str, float]) -> None:
        self._pace.update(step, values)
        if time.monotonic() - self._shown_at >= PLAIN_SECONDS:
            self._show()

    def last(self) -> None:
        if self._pace.step != self._shown_step:
            self._show()

    def _show(self) -> None:
        pace = self._pace
        counted = f"{pace.title} {pace.step}/{pace.total}"
        parts = (counted, pace.speed(), pace.left(), pace.figures())
        print("  ".join(part for part in parts if part), flush=True)
        self._shown_at, self._shown_step = time.monotonic(), pace.step


class _Bar:
    """Two live lines: how far the run is, and the figures of the last chunk.

    What is printed meanwhile, warnings too, appears above them.
    """

    def __init__(self, pace: _Pace, force: bool):
        from rich.console import Console
        from rich.live import Live

        self._pace = pace
        self._live = Live(
            console=Console(force_terminal=True if force else None),
            get_renderable=self._render,
            refresh_per_second=4,
        )

    def __enter__(self) -> "_Bar":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()  # draws once more, and gives the cursor back

    def update(self, step: int, values: Mapping[str, float]) -> None:
        self._pace.update(step, values)

    def _render(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        pace = self._pace
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        row.add_column(no_wrap=True, max_width=24, overflow="ellipsis")
        row.add_column(ratio=1)
        row.add_column(no_wrap=True, justify="right")
        row.add_column(no_wrap=True, justify="right", style="cyan")
        row.add_column(no_wrap=True, justify="right")
        row.add_row(
            Text(pace.title, style="bold"),
            ProgressBar(total=max(pace.total, 1), completed=pace.step),
            f"{pace.step}/{pace.total}",
            pace.speed(),
            pace.left(),
        )
        waiting = "compiling ..." if pace.step == pace.start else ""
        return Group(row, Text(pace.figures() or waiting, no_wrap=True, overflow="ellipsis"))


def _has_cursor(stream: Any) -> bool:
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def _number(value: float) -> str:
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.3e}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
