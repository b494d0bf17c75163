"""Workers of a search as processes of this machine, started again when they die."""

import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Protocol

from bilevel.search.worker import log_path, work

_POLL = 0.1
_GRACE = 60.0  # seconds; a worker that dies sooner, again and again, will never do anything
_DEATHS = 5


class Launcher(Protocol):
    """Where the workers of a search run."""

    def run(self, folder: Path, workers: int) -> None:
        """Start `bilevel.search.worker.work(folder, index)` so many times; return when all are done.

        A worker that dies is started again. A worker that returns is done.
        """
        ...


class LocalLauncher:
    """Processes of this machine; a single worker is this process itself.

    They are new interpreters, not forks: JAX does not survive a fork. Each has its share of the cores and a
    session of its own, so that Ctrl-C reaches only this process, which asks them once to finish their chunk.
    A worker whose launcher dies notices and does the same.
    """

    def run(self, folder: Path, workers: int) -> None:
        """See `Launcher`.

        Raises:
            ChildProcessError: when workers die again and again before they have done anything.
        """
        if workers == 1:
            work(folder, 0)
            return
        processes = {index: _start(folder, index, workers) for index in range(workers)}
        started = dict.fromkeys(processes, time.monotonic())
        early: deque[int] = deque(maxlen=_DEATHS)
        try:
            while processes:
                time.sleep(_POLL)
                for index, process in list(processes.items()):
                    if (status := process.poll()) is None:
                        continue
                    del processes[index]
                    if status == 0:
                        continue
                    if time.monotonic() - started[index] > _GRACE:
                        early.clear()
                    early.append(status)
                    if len(early) == _DEATHS:
                        raise ChildProcessError(_complaint(folder, index, status))
                    processes[index] = _start(folder, index, workers)
                    started[index] = time.monotonic()
        finally:
            _end(processes.values())


def _start(folder: Path, index: int, workers: int) -> subprocess.Popen:
    log = log_path(folder, index)
    log.parent.mkdir(parents=True, exist_ok=True)
    # On one GPU they share its memory; without this the first would take three quarters of it.
    share = {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / workers:.3f}"}
    words = [sys.executable, "-m", "bilevel.search.worker", str(folder), str(index), str(workers)]
    with log.open("ab") as out:
        return subprocess.Popen(
            [*words, str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=share | os.environ,
            start_new_session=True,
        )


def _end(processes) -> None:
    """Ask each once, and wait; a second Ctrl-C meanwhile kills them."""
    left = [process for process in processes if process.poll() is None]
    try:
        for process in left:
            process.terminate()
        for process in left:
            process.wait()
    except KeyboardInterrupt:
        for process in left:
            process.kill()


def _complaint(folder: Path, index: int, status: int) -> str:
    log = log_path(folder, index)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it says nothing")
    return f"workers of the search die at once (the last with status {status}): {last}; see {log}"
