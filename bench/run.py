"""Times bilevel against its peers on this machine, and prints Markdown tables.

The libraries take turns, each in a process of its own, for several rounds: what slows the machine
down for a while slows all of them, so the ratios hold where the milliseconds do not.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TOLERANCE = 1e-4  # of the outer losses, relative to ours
DOCUMENTED = "MetaSGD, one backward pass"  # how TorchOpt's documents write MAML


@dataclass(frozen=True)
class Work:
    """What is timed: a script's name, its inner steps, and the timed outer steps of each library."""

    script: str
    inner_steps: int
    our_repeats: int
    peer_repeats: int
    ours: tuple[str, ...]


WORKS = {
    "sinusoid-1": Work("sinusoid", 1, 300, 40, ("--estimator=unroll", "--task-chunk=25")),
    "sinusoid-5": Work("sinusoid", 5, 100, 20, ("--estimator=unroll", "--task-chunk=25")),
    "omniglot": Work("omniglot", 1, 7, 5, ("--task-chunk=1", "--chunk-size=5", "--chunks=3")),
}


@dataclass(frozen=True)
class Contender:
    """One row of a table: a name and the command that prints its JSON line."""

    name: str
    command: tuple[str, ...]


def call(command: tuple[str, ...], timeout: float | None = None) -> dict | list:
    """Runs a script that prints one JSON line; a failure ends the benchmark with its last line."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1]
        raise RuntimeError(f"{' '.join(command[1:])} failed: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def ours(work: Work, repeats: int, *more: str) -> tuple[str, ...]:
    """The command that times bilevel."""
    steps = f"--inner-steps={work.inner_steps}"
    script = str(HERE / "ours.py")
    return (sys.executable, script, work.script, steps, f"--repeats={repeats}", *work.ours, *more)


def tuned(work: Work, name: str, python: str, repeats: int, *fixed: str) -> Contender | None:
    """A peer at its fastest way and number of threads on this machine, or None where it cannot run."""
    peer = ("--peer", name, f"--inner-steps={work.inner_steps}")
    command = (python, str(HERE / "peers" / f"{work.script}.py"), *peer)
    try:
        if name == "torch_compile":  # needs a C++ compiler and minutes, and may not work at all
            call((*command, "--check"), timeout=120)
        best = call((*command, *fixed, "--repeats=2"))
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"left out: {name}: {error}", file=sys.stderr)
        return None
    chosen = (f"--way={best['way']}", f"--threads={best['threads']}", f"--repeats={repeats}")
    return Contender(name, (*command, *chosen))


def contenders(work: Work, args) -> list[Contender]:
    """Ours first, then every peer that runs."""
    repeats = (work.our_repeats, work.peer_repeats)
    our_repeats, peer_repeats = (max(3, n // 4) for n in repeats) if args.quick else repeats
    rows = [Contender("bilevel", ours(work, our_repeats, *extra)) for extra in ((), ("--devices=2",))]
    if work.script == "omniglot":
        rows.append(Contender("bilevel", ours(work, our_repeats, "--compute-dtype=bfloat16")))
    peers = [("torch_func",), ("torchopt",), ("torchopt", f"--way={DOCUMENTED}"), ("higher",)]
    peers += [("torch_compile",)] if args.compile else []
    found = [tuned(work, peer, args.peers_python, peer_repeats, *way) for peer, *way in peers]
    # The fastest way of a library may be the documented one, which is then timed once.
    return rows + list({peer.command: peer for peer in found if peer is not None}.values())


def compare(rows: list[Contender], rounds: int) -> list[list[dict]]:
    """`rounds` measurements of each row, taken in turns."""
    results = [[] for _ in rows]
    for i in range(rounds):
        for row, result in zip(rows, results, strict=True):
            result.append(call(row.command))
            print(f"round {i + 1}: {row.name}: {result[-1]['median_ms']} ms", file=sys.stderr)
    return results


def ratio(times: list[float], reference: list[float]) -> str:
    """Median, least and largest of the ratios of each round."""
    each = [a / b for a, b in zip(times, reference, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"


def table(results: list[list[dict]]) -> str:
    """The Markdown table of a work."""
    first = [each["median_ms"] for each in results[0]]
    lines = [
        f"### {results[0][0]['work']}",
        "",
        "| library | way | threads | ms an outer step | time / bilevel's (over rounds) |",
        "|---|---|---|---|---|",
    ]

    def line(name, way, threads, times):
        cells = (name, way, threads, f"{statistics.median(times):.3g}", ratio(times, first))
        lines.append(f"| {' | '.join(map(str, cells))} |")

    for result in results:
        last = result[-1]
        devices = last.get("devices", 1)
        if devices == 1:  # more of them are an option of bl.train
            times = [each["median_ms"] for each in result]
            line(last["peer"], last["way"], last.get("threads", "all"), times)
        if "chunk_ms" in last:
            chunked = [each["chunk_ms"] for each in result]
            spread = f", devices={devices}" if devices > 1 else ""
            line(last["peer"], f"{last['way']}, inside bl.train{spread}", "all", chunked)
    for last in (result[-1] for result in results):
        if "relative_error" in last:
            error = f"{100 * last['relative_error']:.2g}%"
            lines += ["", f"{last['way']}: its hypergradient differs from float32's by {error}."]
    return "\n".join(lines)


def disagreements(results: list[list[dict]]) -> list[str]:
    """The rows in float32 whose outer losses are not ours: they do not do the same work."""
    truth, wrong = results[0][0], []
    for result in results[1:]:
        for name, tolerance in (("value", TOLERANCE), ("third_value", 10 * TOLERANCE)):
            error = abs(result[0][name] / truth[name] - 1)
            if "relative_error" not in result[0] and error > tolerance:
                wrong.append(f"{result[0]['peer']}, {result[0]['way']}: {name} is off by {error:.1e}")
    return wrong


def machine() -> str:
    """The processor, its cores and how busy it is."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        pairs = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        model = {name.strip(): value.strip() for name, value in pairs}.get("model name", model)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = f", load {os.getloadavg()[0]:.1f} at the start" if hasattr(os, "getloadavg") else ""
    return f"{model}, {cores} cores{load}; {platform.system()}, Python {platform.python_version()}"


def main() -> None:
    """Prints the machine and every table; ends with 1 where a library computes something else."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="fewer timed steps")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--works", nargs="*", choices=tuple(WORKS), default=tuple(WORKS))
    options.add_argument("--peers-python", default=".venv-peers/bin/python")
    options.add_argument("--compile", action="store_true", help="torch.compile too, where it works")
    args = options.parse_args()
    if not Path(args.peers_python).exists():
        sys.exit(f"{args.peers_python} does not exist: run `make bench`, or pass --peers-python")
    print(f"Machine: {machine()}", flush=True)
    wrong = []
    for name in args.works:
        results = compare(contenders(WORKS[name], args), args.rounds)
        jax, torch = results[0][0]["jax"], results[-1][0].get("torch")
        print(f"\n{table(results)}\n\njax {jax}, torch {torch}; {args.rounds} rounds.", flush=True)
        wrong += [f"{name}: {each}" for each in disagreements(results)]
    if wrong:
        sys.exit("outer losses differ, so the rows are not comparable:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
