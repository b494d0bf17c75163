"""Times an outer step of every few-shot learner against the fastest peer that has it: a Markdown table.

A learner at a time: bilevel and the peers each prepare in a process of their own, the peers by trying all
their ways, and then take turns. Ends with 1 where one fails, or where the outer losses are not bilevel's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from run import HERE, TOLERANCE, machine, ratio

sys.path.insert(0, str(HERE / "peers"))
import data

PATIENCE = 600.0  # seconds until a process that says nothing is given up
HEAD = (
    "| learner | bilevel ms | fastest peer | its ms | its time / bilevel's (over rounds) "
    "| processor ms, bilevel | peer |\n|---|---|---|---|---|---|---|"
)


class Contender:
    """A process that prints a JSON line when it is ready, and one for each turn."""

    def __init__(self, *command: str, patience: float):
        self.command, self.patience = command, patience
        self.errors = tempfile.TemporaryFile("a+")  # noqa: SIM115  closed on exit
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        try:
            self.process.communicate(timeout=30)  # its input ends, and so does it
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        self.errors.close()

    def listen(self) -> dict:
        """The next answer.

        Raises:
            RuntimeError: when the process has ended without one, with the last line it wrote.
        """
        late = threading.Event()
        timer = threading.Timer(self.patience, lambda: (late.set(), self.process.kill()))
        timer.start()
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            self.process.wait()
            why = f"no answer in {self.patience:g} s; raise --patience on a busy machine"
            why = why if late.is_set() else (self.said() or ["no output"])[-1]
            raise RuntimeError(f"{self.command[1]} ended: {why}")
        return json.loads(line)

    def turn(self) -> dict:
        """The figures of a turn."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.listen()

    def said(self) -> list[str]:
        """The lines that it wrote for people."""
        self.errors.seek(0)
        return self.errors.read().splitlines()


def disagreement(ours: dict, theirs: dict) -> str:
    """How far the outer losses are apart, where that is too far."""
    wrong = []
    for name, tolerance in (("value", TOLERANCE), ("third_value", 10 * TOLERANCE)):
        error = abs(theirs[name] / ours[name] - 1)
        if not error <= tolerance:
            wrong.append(f"{name} is off by {error:.1e}")
    return ", ".join(wrong)


def compare(name: str, args) -> tuple[str, str]:
    """A row of the table, and what is wrong with it."""
    more = ["--small"] if args.small else []
    threads = [f"--threads={args.threads}"] if args.threads else []
    ours = (sys.executable, str(HERE / "learner_works.py"), name, f"--devices={args.devices}", *more)
    peer = (args.peers_python, str(HERE / "peers" / "learners.py"), name, *more, *threads)
    with Contender(*ours, patience=args.patience) as us:
        mine = us.listen()  # the peers look for their fastest way on a machine that is free
        with Contender(*peer, patience=args.patience) as them:
            theirs = them.listen()
            tried = [line for line in them.said() if " ms  Setting" in line or line.startswith("left out")]
            print(f"{name}: {mine['way']}; {theirs['way']}", *tried, sep="\n", file=sys.stderr, flush=True)
            turns = [(us.turn(), them.turn()) for _ in range(args.rounds)]
    walls = [[each["ms"] for each in turn] for turn in zip(*turns, strict=True)]
    processor = [[each["processor_ms"] for each in turn] for turn in zip(*turns, strict=True)]
    ms, peer_ms, our_processor, peer_processor = map(statistics.median, (*walls, *processor))
    cells = (name, f"{ms:.3g}", theirs["way"], f"{peer_ms:.3g}", ratio(walls[1], walls[0]))
    row = f"| {' | '.join(cells)} | {our_processor:.3g} | {peer_processor:.3g} |"
    return row, disagreement(mine, theirs)


def main() -> None:
    """Prints the machine and the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--learners", nargs="*", choices=tuple(data.LEARNERS), default=[*data.LEARNERS])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--devices", type=int, default=2, help="that bilevel spreads tasks over")
    options.add_argument("--threads", type=int, help="of the peers; all cores when left out")
    options.add_argument("--small", action="store_true", help="few filters and tasks: do all agree?")
    options.add_argument("--patience", type=float, default=PATIENCE, help="seconds that a process may take")
    options.add_argument(
        "--peers-python", default=os.environ.get("BILEVEL_PEERS_PYTHON", ".venv-peers/bin/python")
    )
    args = options.parse_args()
    if not Path(args.peers_python).exists():
        sys.exit(f"{args.peers_python} does not exist: run `make bench-learner-steps` or pass --peers-python")
    print(f"Machine: {machine()}\n\n{HEAD}", flush=True)
    wrong = []
    for name in args.learners:
        try:
            row, error = compare(name, args)
        except (RuntimeError, OSError) as failure:
            row, error = f"| {name} | failed | | | | | |", str(failure)
            print(f"{name}: {error}", file=sys.stderr, flush=True)
        print(row, flush=True)
        wrong += [f"{name}: {error}"] if error else []
    if wrong:
        sys.exit("not comparable:\n" + "\n".join(wrong))


if __name__ == "__main__":
    main()
