"""Times an outer step of a few-shot learner in the fastest way of all peers, when asked.

1-shot tasks of Omniglot's shape (data.py has the sizes of each learner), conv4 of 64 filters and stride 2
with batch norm by the current batch, one step of Adam at 1e-3; float32. The images are random and fixed.
Every way of every library is tried with both memory formats; the fastest answers. Prints a JSON line when it
has been found, then one for each line that it reads.
"""

import argparse
import contextlib
import os
import sys
import time
from collections import OrderedDict
from functools import partial

import data
import turns
from common import Setting, Work, flat_gradient, make_step, milliseconds, torch
from learner_ways import Film, PlusPlus, WithRates, inner_loop_ways
from omniglot import make_net
from other_ways import Embedding, other_ways

nn = torch.nn
NO_STEPS = ("iMAML", "ProtoNet", "MatchingNet", "R2-D2")
SLOWER = 1.5  # than the fastest so far: not tried further
DIFFERENT = 0.01  # a third outer loss that is further off is that of other work


def make_module(name: str, sizes: data.Sizes, vmapped: bool):
    """The network of a learner with all that is learned beside it."""
    layers = make_net(vmapped, conv_bias=False, filters=sizes.filters, ways=sizes.ways)
    net = nn.Sequential(OrderedDict(body=layers[:-1], head=layers[-1]))
    wraps = {
        "Meta-SGD": lambda net: WithRates(net, sizes.rate),
        "MAML++": lambda net: PlusPlus(net, sizes.rate, sizes.inner_steps),
        "CAVIA": lambda net: Film(net, sizes.filters),
        "ProtoNet": Embedding,
        "MatchingNet": Embedding,
        "R2-D2": lambda net: Embedding(net, penalty=1.0, scale=data.RIDGE_SCALE),
    }
    return wraps.get(name, lambda net: net)(net)


def make_work(name: str, sizes: data.Sizes) -> Work:
    """The work with its fixed batch."""
    support, query = (tuple(map(torch.from_numpy, part)) for part in data.batches(sizes))
    adam = partial(torch.optim.Adam, lr=1e-3, eps=data.EPSILON, fused=True)
    outer = partial(torch.optim.SGD, lr=1.0) if name == "Reptile" else adam
    make = partial(make_module, name, sizes)
    loss = nn.functional.cross_entropy
    return Work(name, make, loss, support, query, sizes.rate, sizes.inner_steps, outer)


def fastest(ways: dict, work: Work, threads: int) -> Setting:
    """The setting of least time; ways that are far behind, or compute something else, are given up."""
    least: dict[Setting, float] = {}
    truth = None
    for way in ways:
        for channels_last in (False, True):
            setting = Setting(way, threads, channels_last)
            losses, times = [], []
            try:
                step = make_step(ways, work, setting)
                for _ in range(3):
                    begin = time.perf_counter()
                    losses.append(step())
                    times.append(1e3 * (time.perf_counter() - begin))
                truth = losses[2] if truth is None else truth
                if not abs(losses[2] / truth - 1) < DIFFERENT:
                    raise RuntimeError(
                        f"the third outer loss is {losses[2]:.6g}, of the first way {truth:.6g}"
                    )
                if min(times) < SLOWER * min(least.values(), default=min(times)):
                    times += milliseconds(step, 3 if min(times) > 100 else 10)
            except (RuntimeError, NotImplementedError, TypeError) as error:  # of the library
                print(f"left out: {setting}: {str(error).splitlines()[0]}", file=sys.stderr)
                continue
            least[setting] = min(times)
            print(f"{least[setting]:9.2f} ms  {setting}", file=sys.stderr, flush=True)
    if not least:
        sys.exit(f"no peer can take the gradient of {work.name}")
    return min(least, key=lambda setting: least[setting])


def check(ways: dict, work: Work, threads: int) -> None:
    """Prints how far the gradient of each way is from the first one's; ends with 1 beyond 1e-3."""
    truth, bad = None, []
    for way in ways:
        for channels_last in (False, True):
            loss, gradient = flat_gradient(ways, work, Setting(way, threads, channels_last))
            truth = (loss, gradient) if truth is None else truth
            error = max(abs(loss / truth[0] - 1), ((gradient - truth[1]).norm() / truth[1].norm()).item())
            print(f"{work.name}: {error:.1e}  {way}{', channels last' if channels_last else ''}", flush=True)
            bad += [way] if not error < 1e-3 else []
    if bad:
        sys.exit(f"{work.name}: other gradients than the first way's: {', '.join(bad)}")


def main() -> None:
    """Serves until the input ends."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("learner", choices=tuple(data.LEARNERS))
    options.add_argument("--small", action="store_true", help="few filters and tasks, to try it out")
    options.add_argument("--threads", type=int, help="all cores when left out")
    options.add_argument("--check", action="store_true", help="compare the ways' gradients, time nothing")
    args = options.parse_args()
    name, out = args.learner, sys.stdout
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = args.threads or cores or 1
    work = make_work(name, data.sizes(name, args.small))
    ways = (other_ways if name in NO_STEPS else inner_loop_ways)(name)
    if args.check:
        return check(ways, work, threads)
    with contextlib.redirect_stdout(sys.stderr):
        setting = fastest(ways, work, threads)
        step = make_step(ways, work, setting)
        losses = [step() for _ in range(3)]
        count = turns.repeats(min(milliseconds(step, 2)))
        hello = {
            "value": losses[0],
            "third_value": losses[2],  # after two outer steps: a wrong gradient shows
            "way": setting.way + (", channels last" if setting.channels_last else ""),
            "torch": torch.__version__.split("+")[0],
        }
        turns.say(hello, out)
        turns.serve(step, count, out)
    return None


if __name__ == "__main__":
    main()
