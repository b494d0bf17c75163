"""Timing, tuning and checking shared by the peers' scripts: one JSON line a measurement."""

import argparse
import contextlib
import importlib
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

INSTALL = "python3 -m venv .venv-peers && .venv-peers/bin/pip install -r bench/peers/requirements.txt"
WARM_UP = 3


def require(module: str):
    """Imports a peer, or ends the script with one line that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        sys.exit(f"bench/peers needs {module!r}, which failed to import ({error}); run: {INSTALL}")


torch = require("torch")


ADAM = partial(torch.optim.Adam, lr=1e-3, fused=True)


@dataclass(frozen=True)
class Work:
    """A meta-learning problem with fixed data, so that sampling is outside the timing.

    Args:
        name: what is timed, with its sizes.
        make_net: `make_net(vmapped)` builds the network, with the same initial weights each time.
        loss: `loss(predictions, targets) -> scalar`.
        support: pair of tensors with the tasks on the first axis.
        query: pair of tensors with the tasks on the first axis.
        inner_lr: rate of the inner SGD.
        inner_steps: number of inner SGD steps.
        optimizer: `optimizer(parameters) -> the outer optimizer`.
    """

    name: str
    make_net: Callable
    loss: Callable
    support: tuple
    query: tuple
    inner_lr: float
    inner_steps: int
    optimizer: Callable = ADAM

    @property
    def num_tasks(self) -> int:
        """The number of tasks of an outer step."""
        return self.support[0].shape[0]


@dataclass(frozen=True)
class Setting:
    """A way to run a peer: what is tuned before the timing, so that each peer runs at its best."""

    way: str
    threads: int
    channels_last: bool = False


def parser(doc: str, peers: tuple[str, ...]) -> argparse.ArgumentParser:
    """The options that both scripts share."""
    options = argparse.ArgumentParser(description=doc)
    options.add_argument("--peer", choices=peers, required=True)
    options.add_argument("--inner-steps", type=int, default=1)
    options.add_argument("--repeats", type=int, default=20, help="timed outer steps")
    options.add_argument("--threads", type=int, help="fix the threads in place of tuning them")
    options.add_argument("--way", help="fix the way of the peer in place of tuning it")
    options.add_argument("--check", action="store_true", help="compare gradients, time nothing")
    options.add_argument("--verbose", action="store_true", help="print the tuning to stderr")
    return options


def _formatted(work: Work, setting: Setting, vmapped: bool):
    """The network and the two sets of the work in the memory format of the setting."""
    net, support, query = work.make_net(vmapped), work.support, work.query
    if setting.channels_last:
        net = net.to(memory_format=torch.channels_last)
        # The tasks come first: each task alone is made channels-last.
        support, query = ((x.movedim(-3, -1).contiguous().movedim(-1, -3), y) for x, y in (support, query))
    return net, support, query


def make_gradient(ways: dict, work: Work, setting: Setting):
    """A network and `gradient() -> outer loss`, which leaves the outer gradient in `.grad`."""
    torch.set_num_threads(setting.threads)
    way = ways[setting.way]
    net, support, query = _formatted(work, setting, way.vmapped)
    return net, way.build(net, work, support, query)


def make_step(ways: dict, work: Work, setting: Setting) -> Callable[[], float]:
    net, gradient = make_gradient(ways, work, setting)
    outer = work.optimizer([p for p in net.parameters() if p.requires_grad])

    def step() -> float:
        outer.zero_grad()
        loss = gradient()
        outer.step()
        return loss.item()

    return step


def milliseconds(step: Callable, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def settings(args, ways: dict, images: bool) -> list[Setting]:
    """Every setting that the tuning tries."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # Small products may be faster on one thread; the convolutions take every core.
    tried = {cores or 1} if images else {1, cores or 1}
    threads = [args.threads] if args.threads else sorted(tried)
    if args.way and args.way not in ways:
        sys.exit(f"--way {args.way!r} is none of the ways of {args.peer}: {', '.join(ways)}")
    names = [args.way] if args.way else list(ways)
    formats = (False, True) if images else (False,)
    return [Setting(*each) for each in itertools.product(names, threads, formats)]


def tune(candidates: list[Setting], ways: dict, work: Work, verbose: bool) -> Setting:
    """The fastest setting: least time of a few steps each, after a warm-up."""
    if len(candidates) == 1:
        return candidates[0]
    least = {}
    for setting in candidates:
        step = make_step(ways, work, setting)
        # A short step is repeated more often, since its time is noisier.
        repeats = 2 if min(milliseconds(step, 2)) > 100 else 20
        least[setting] = min(milliseconds(step, repeats))
        if verbose:
            print(f"{least[setting]:9.2f} ms  {setting}", file=sys.stderr)
    return min(least, key=least.get)


def measure(args, ways: dict, work: Work, images: bool) -> dict:
    """Tunes the peer, then times its outer steps."""
    setting = tune(settings(args, ways, images), ways, work, args.verbose)
    step = make_step(ways, work, setting)
    losses = [step() for _ in range(WARM_UP)]
    times = milliseconds(step, args.repeats)
    return {
        "peer": args.peer,
        "work": work.name,
        "median_ms": round(statistics.median(times), 3),
        "min_ms": round(min(times), 3),
        "max_ms": round(max(times), 3),
        "repeats": args.repeats,
        "threads": setting.threads,
        "torch": torch.__version__.split("+")[0],
        "value": losses[0],
        "third_value": losses[2],  # after two outer steps: a wrong gradient shows
        "way": setting.way,
        "channels_last": setting.channels_last,
    }


def flat_gradient(ways: dict, work: Work, setting: Setting):
    """The outer loss and the outer gradient as one float64 vector."""
    net, gradient = make_gradient(ways, work, setting)
    loss = gradient().item()
    return loss, torch.cat([p.grad.reshape(-1) for p in net.parameters() if p.requires_grad]).double()


def check(args, ways: dict, plain: dict, work: Work, images: bool) -> dict:
    """Compares the gradient of each way of the peer with a plain loop of `torch.autograd.grad`."""
    cores = torch.get_num_threads()
    reference = Setting(next(iter(plain)), cores)
    loss, truth = flat_gradient(plain, work, reference)
    errors = {}
    for setting in settings(args, ways, images):
        other, gradient = flat_gradient(ways, work, setting)
        error = ((gradient - truth).norm() / truth.norm()).item()
        errors[setting] = max(error, abs(other - loss) / abs(loss))
    worst = max(errors.values())
    return {
        "peer": args.peer,
        "work": work.name,
        "value": loss,
        "relative_error": worst,
        "ok": worst < 1e-4,
        "ways": list(ways),
    }


def main(args, all_ways: dict, work: Work, images: bool) -> None:
    """Prints the JSON line of a measurement, or of a check."""
    ways = all_ways[args.peer]()
    # Warnings of the peers go to stderr; stdout holds the JSON line alone.
    with contextlib.redirect_stdout(sys.stderr):
        if args.check:
            result = check(args, ways, all_ways["torch_loop"](), work, images)
        else:
            result = measure(args, ways, work, images)
    print(json.dumps(result))
    if not result.get("ok", True):
        sys.exit(1)
