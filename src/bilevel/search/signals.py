"""Ctrl-C and SIGTERM: what the driver of a search and its workers make of them."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def terminable() -> Iterator[None]:
    """Answer SIGTERM as Ctrl-C is answered."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def signalled() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or Ctrl-C has come; a second one acts as usual.

    The first is only noted: raised in the middle of a library or of a write to the storage it could come out
    as anything, or leave half of something. `bl.train` answers signals by itself, and in its last chunk ends
    as if none had come; so the bytes are read that Python writes for each signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    previous_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    previous, came = {}, False

    def note(number, frame):
        for each, handler in previous.items():
            signal.signal(each, handler)

    def asked() -> bool:
        nonlocal came
        with contextlib.suppress(BlockingIOError):
            came = came or bool({signal.SIGINT, signal.SIGTERM} & set(os.read(read, 4096)))
        return came

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(previous_fd)
        os.close(read)
        os.close(write)
