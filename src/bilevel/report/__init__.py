"""The run report: one HTML file that opens anywhere, without a network.

`runs` reads run folders, `plots` draws curves (the only importer of matplotlib), `pictures` shows
the few-shot tasks, `page` puts the sections together and `style` holds the CSS.
"""

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bilevel.report.page import render
from bilevel.report.runs import read_runs

__all__ = ["write_report"]


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write one self-contained HTML page about one run, or comparing several.

    Args:
        folders: run folders, each as `bilevel train` leaves it; what is missing in one is said on
            the page, with the command that makes it.
        out: where to write; a folder means `report.html` inside it. Default: `report.html` in the
            first run folder.

    Returns:
        The path written.

    Raises:
        FileNotFoundError: where a folder does not exist or is no run folder.
        PermissionError: where the page cannot be written.
        TypeError, ValueError: where `folders` is a single path or empty.

    >>> write_report([Path("no-such-run")])
    Traceback (most recent call last):
        ...
    FileNotFoundError: expected a run folder, got no-such-run, which does not exist; \
make one with `bilevel train RECIPE`
    """
    if isinstance(folders, str | os.PathLike):
        raise TypeError(f"expected a sequence of run folders, got {folders!r}; pass [{folders!r}]")
    if not folders:
        raise ValueError("expected at least one run folder, got none; pass [Path(RUN)]")
    runs = read_runs([Path(folder) for folder in folders])
    out = runs[0].folder if out is None else Path(out)
    out = out / "report.html" if out.is_dir() else out
    _replace(out, render(runs))
    return out


def _replace(out: Path, text: str) -> None:
    """Write beside the target and rename, so that no reader ever sees half a page."""
    # Not tempfile: its files are private (0600), and a report is meant to be passed on.
    draft = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8", newline="\n")
        draft.replace(out)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PermissionError(
                f"expected a folder to write the report in, got {out.parent}, which refuses it "
                f"({error.strerror}); pass another path with --out PATH"
            ) from error
        raise
    finally:
        # Where this fails too, the error that matters is already on its way.
        with suppress(OSError):
            draft.unlink(missing_ok=True)
