"""Fetching a file of known content: all of it or nothing, and never a wrong one."""

import hashlib
import os
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path

_CHUNK = 1 << 18


def places() -> list[Path]:
    """The folders where data is looked for: the environment variable BILEVEL_DATA, then the cache."""
    named = [Path(os.environ["BILEVEL_DATA"])] if os.environ.get("BILEVEL_DATA") else []
    return [*named, Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bilevel"]


def download(url: str, path: Path, sha256: str) -> None:
    """Download `url` to `path`, which appears only when it is complete and has the right hash.

    Args:
        url: where the file is.
        path: where it shall be; its folder is made.
        sha256: the hash of the content, in hexadecimal.

    Raises:
        OSError: when the download fails; what was fetched is removed, so calling again starts anew.
        ValueError: when something else than the expected file came.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as unfinished:
        try:
            _stream(url, unfinished)
        except (OSError, HTTPException) as error:
            raise OSError(
                f"could not download {url}: {error}; try again, or put the file at {path} yourself"
            ) from error
        if hash_of(unfinished) != sha256:
            raise ValueError(
                f"{url} did not send the expected file (SHA-256 differs); try again, or get "
                f"{path.name} elsewhere and put it at {path}"
            )
        os.replace(unfinished, path)


def hash_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new empty file in the folder of `path`, removed at the end unless it was renamed."""
    handle, name = tempfile.mkstemp(prefix=path.name + ".", dir=path.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _stream(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=60) as response, path.open("wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        name, done = url.rsplit("/", 1)[-1], 0
        while chunk := response.read(_CHUNK):
            file.write(chunk)
            done += len(chunk)
            of_total = f" of {total / 1e6:.1f}" if total else ""
            print(f"\r{name}: {done / 1e6:.1f}{of_total} MB", end="", file=sys.stderr)
        print(file=sys.stderr)
    if done < total:
        raise OSError(f"the connection ended after {done} of {total} bytes")
