"""The figures of a run, a row per logged point: metrics.jsonl, metrics.csv and TensorBoard.

metrics.jsonl is the record; metrics.csv is the same rows as a table, written anew from it where a
column is added. JSON has no NaN: what is not finite is null there and empty in the table.
"""

import csv
import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

Row = dict[str, Any]


class MetricsWriter:
    """Append rows to the files of one run folder; a context manager.

    Args:
        folder: the run folder; made if absent.
        resume_step: go on after this step: later rows, which the run will write again, and a
            half-written last line are dropped. None starts the files anew.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with MetricsWriter(folder) as writer:
    ...     writer.write(100, 1.5, {"query_loss": 0.25})
    >>> read_metrics(folder / "metrics.jsonl")
    [{'step': 100, 'time': 1.5, 'query_loss': 0.25}]
    """

    def __init__(self, folder: Path, resume_step: int | None = None):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._jsonl, self._csv = folder / "metrics.jsonl", folder / "metrics.csv"
        rows = []
        if resume_step is not None and self._jsonl.exists():
            rows = [row for row in read_metrics(self._jsonl) if row["step"] <= resume_step]
        _replace(self._jsonl, (_json_line(row) for row in rows))
        self._json_file = self._jsonl.open("a", encoding="utf-8", buffering=1)
        self._columns = _columns(rows)
        self._csv_file = self._rewrite_csv(rows)
        self._events = _event_writer(folder, 0 if resume_step is None else resume_step + 1)

    def write(self, step: int, seconds: float, values: Mapping[str, float]) -> None:
        """Append one row to every file; it is on disk, or in the kernel's hands, on return.

        Args:
            step: outer steps done.
            seconds: since the run began.
            values: figures by name; names may differ from row to row.

        Raises:
            ValueError: when a figure is called `step` or `time`.
        """
        if "step" in values or "time" in values:
            raise ValueError("a metric may not be called 'step' or 'time': rename it")
        row: Row = {"step": int(step), "time": round(float(seconds), 3)}
        row |= {name: _finite(value) for name, value in values.items()}
        self._json_file.write(_json_line(row))
        if row.keys() <= set(self._columns):
            self._csv_file.write(_csv_line(self._columns, row))
        else:
            rows = read_metrics(self._jsonl)
            self._columns = _columns(rows)
            self._csv_file.close()
            self._csv_file = self._rewrite_csv(rows)
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, float(value), int(step))
            self._events.flush()

    def close(self) -> None:
        """Close the files; `with` does it."""
        self._json_file.close()
        self._csv_file.close()
        if self._events is not None:
            self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _rewrite_csv(self, rows: list[Row]) -> TextIO:
        table = [dict(zip(self._columns, self._columns)), *rows] if rows else []
        _replace(self._csv, (_csv_line(self._columns, row) for row in table))
        return self._csv.open("a", encoding="utf-8", newline="", buffering=1)


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, without a last line that was cut off in the middle.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when another line than the last is no row.
    """
    lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
        elif number < len(lines):
            raise ValueError(
                f"{path}:{number} must be a JSON object with a 'step', got {line[:40]!r}: remove the line"
            )
    return rows


def _finite(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _columns(rows: Iterable[Row]) -> list[str]:
    """Names in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def _json_line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


class _Line:
    """A file that hands back what is written: `csv` quotes a line with it, nothing more."""

    def write(self, text: str) -> str:
        return text


def _csv_line(columns: list[str], row: Row) -> str:
    # None, the value of an absent name, is written as an empty field.
    return csv.writer(_Line(), lineterminator="\n").writerow([row.get(name) for name in columns])


def _replace(path: Path, lines: Iterable[str]) -> None:
    """Write a file anew: whoever reads it, or kills us, finds the old one or the new one whole."""
    temporary = path.with_name(path.name + ".unfinished")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        file.writelines(lines)
    os.replace(temporary, path)


def _event_writer(folder: Path, first_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        warnings.warn(
            "no TensorBoard files will be written, metrics.jsonl and metrics.csv will: "
            "for them, pip install 'bilevel[train]'",
            stacklevel=3,
        )
        return None
    # TensorBoard hides what an earlier, killed process wrote from this step on.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
