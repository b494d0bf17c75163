"""Where a benchmark writes: docs/ keeps what whole runs printed, and a quick one must not replace it."""

import argparse
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def add_folder(options: argparse.ArgumentParser) -> None:
    """Add the flag `--folder`."""
    options.add_argument(
        "--folder",
        type=Path,
        help="for pictures and tables; docs/, or with --quick a new one",
    )


def kept_in(args: argparse.Namespace) -> Path:
    """The folder of `--folder` and `--quick`; it exists."""
    folder = args.folder
    if folder is None:
        folder = Path(tempfile.mkdtemp(prefix="bilevel-bench-")) if args.quick else DOCS
        if args.quick:
            print(f"Pictures and tables of this quick run are in {folder}, not in docs/\n")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
