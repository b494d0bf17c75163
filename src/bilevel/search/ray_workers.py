"""Workers of a search on Ray: this machine, or a cluster by its address."""

import contextlib
import importlib.util
import os
import socket
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bilevel.search.worker import log_path, work

_POLL = 0.5  # seconds between looks at Ctrl-C
_GRACE = 10.0  # seconds; a worker that dies sooner has done nothing
_DEATHS = 5
_ANSWER = 5.0  # seconds that an address has to answer
_LEAVE = 120.0  # seconds that workers have to finish their chunk and save it
_STORE = 80 * 2**20  # bytes, Ray's least: nothing is passed through it
# Machines may differ in their paths; what a worker's results depend on is the same for all.
_PASSED_ON = ("BILEVEL_DATA", "JAX_PLATFORMS", "JAX_ENABLE_X64", "XLA_FLAGS", "PYTHONPATH")

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
}


@dataclass(frozen=True)
class RayLauncher:
    """Workers as Ray tasks, on this machine or on a cluster.

    The search folder must be the same on all machines (a shared file system). A worker that dies, with its
    machine or alone, is started again wherever there is room, and takes its trial up at the newest
    checkpoint. Nothing outside the cluster is asked for: no telemetry, no dashboard, no download.

    Args:
        address: `host:port` of a cluster's head, `ray://host:port`, or "auto" for the cluster this machine
            belongs to. None starts Ray on this machine, and ends it afterwards.
        num_cpus: that Ray sets aside for a worker.
        num_gpus: the same; without any, a worker sees none.

    Raises:
        ValueError: for a negative number.

    >>> RayLauncher("head:6379").num_cpus
    1.0
    """

    address: str | None = None
    num_cpus: float = 1.0
    num_gpus: float = 0.0

    def __post_init__(self):
        for name in ("num_cpus", "num_gpus"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} of a worker must be at least 0, got {getattr(self, name)}")

    def run(self, folder: Path, workers: int) -> None:
        """Start so many workers on the search in `folder`; return when all are done.

        Raises:
            ImportError: when ray is not installed.
            ConnectionError: when the address answers nothing.
            ChildProcessError: when workers die again and again before they have done anything.
            KeyboardInterrupt: after Ctrl-C, when the workers have saved their trials.
        """
        ray = _import_ray()
        folder = Path(folder).resolve()
        with _connected(ray, self, workers):
            options: dict[str, Any] = {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus, "max_retries": 0}
            task = ray.remote(**options)(_work)
            running: dict[Any, tuple[int, float]] = {}

            def start(index: int) -> None:
                share = (index, workers) if self.address is None else None
                running[task.remote(str(folder), index, share)] = (index, time.monotonic())

            for index in range(workers):
                start(index)
            try:
                _watch(ray, running, start, folder)
            except KeyboardInterrupt:
                _leave(ray, list(running))
                raise


def _watch(ray: Any, running: dict[Any, tuple[int, float]], start: Any, folder: Path) -> None:
    """Until all workers have returned; the dead are started again."""
    early: deque[int] = deque(maxlen=_DEATHS)
    while running:
        done, _ = ray.wait(list(running), timeout=_POLL)
        for each in done:
            index, began = running.pop(each)
            try:
                ray.get(each)
            except ray.exceptions.RayTaskError as error:  # raised by the worker itself, on purpose
                raise error.cause from None
            except ray.exceptions.RayError as error:
                early.append(index) if time.monotonic() - began < _GRACE else early.clear()
                if len(early) == _DEATHS:
                    reason = " ".join(str(error).split())[:300]
                    raise ChildProcessError(
                        f"workers of the search die at once on Ray: {reason}; see {log_path(folder, index)}"
                    ) from None
                start(index)


def _leave(ray: Any, tasks: list[Any]) -> None:
    """Ask the workers once to finish their chunk and save it; a second Ctrl-C does not wait for them."""
    for task in tasks:
        ray.cancel(task, force=False)  # as Ctrl-C does in the process
    with contextlib.suppress(KeyboardInterrupt):
        ray.wait(tasks, num_returns=len(tasks), timeout=_LEAVE)


def _work(folder: str, index: int, share: tuple[int, int] | None) -> None:
    """What a worker's process does."""
    if share is not None and hasattr(os, "sched_setaffinity"):  # before JAX makes its threads
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[share[0] :: share[1]] or cores)
    work(Path(folder), index)


def _import_ray() -> Any:
    if importlib.util.find_spec("ray") is None:
        raise ImportError('--launcher ray needs Ray: pip install "bilevel[ray]", or take --launcher local')
    # Read at the import: no telemetry, no advice, and no line of its own where a worker dies.
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    return ray


@contextmanager
def _connected(ray: Any, launcher: RayLauncher, workers: int) -> Iterator[None]:
    """Ray, for as long as the search runs; a Ray that the caller has started stays."""
    if ray.is_initialized():
        yield
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    if launcher.address is None:
        # As many places as workers, whatever this machine has: the user said how many.
        places = max(1, round(workers * launcher.num_cpus + 0.5))
        with warnings.catch_warnings():  # of JAX, that a fork is unsafe: Ray's are followed by an exec
            warnings.simplefilter("ignore", RuntimeWarning)
            ray.init(address="local", num_cpus=places, object_store_memory=_STORE, **quiet)
    else:
        _check_answers(launcher.address)
        package = str(Path(__file__).parent.parent)  # the version that made the search
        try:
            ray.init(
                address=launcher.address,
                runtime_env={"env_vars": passed, "py_modules": [package]},
                log_to_driver=False,
                logging_level="ERROR",
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConnectionError(
                f"no Ray cluster lets us in at {launcher.address} ({reason}); start one with `ray start "
                "--head`, set RAY_AUTH_MODE=token where it wants a token, or leave --address out to use this "
                "machine"
            ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray waits minutes for an address that nobody listens at."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return  # "auto"
    try:
        socket.create_connection((host, int(port)), timeout=_ANSWER).close()
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"nothing answers at {address} ({error}); expected the host:port of a Ray cluster's head, as "
            "`ray start --head` prints it; leave --address out to use this machine"
        ) from None
