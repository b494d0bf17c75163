"""How a timed process takes turns: it prints a JSON line when it is ready, and one for each line it reads."""

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import TextIO

SECONDS = 1.5  # of a turn


def repeats(milliseconds: float, most: int = 200) -> int:
    """How many steps make a turn, given the time of one."""
    return min(most, max(3, round(1e3 * SECONDS / milliseconds)))


def figures(walls: list[float], processor: float) -> dict:
    """The answer of a turn: median milliseconds of a step, and processor milliseconds of a step."""
    return {"ms": round(statistics.median(walls), 4), "processor_ms": round(processor, 4)}


def say(answer: dict, out: TextIO) -> None:
    """One JSON line."""
    print(json.dumps(answer), file=out, flush=True)


def asked() -> bool:
    """Waits for the next turn; False when there is none."""
    return bool(sys.stdin.readline())


def serve(step: Callable, count: int, out: TextIO) -> None:
    """Times `count` steps whenever asked, until the input ends."""
    while asked():
        walls, start = [], time.process_time()
        for _ in range(count):
            begin = time.perf_counter()
            step()
            walls.append(1e3 * (time.perf_counter() - begin))
        say(figures(walls, 1e3 * (time.process_time() - start) / count), out)
