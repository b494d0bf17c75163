"""What a search costs beside its trials: wall time of the workers against the trials' own time.

    python bench/search_overhead.py                  # 200 trials, 2 workers; some minutes
    python bench/search_overhead.py --quick          # 8 trials
    python bench/search_overhead.py --launcher ray

A trial is a real run: a sinusoid learner that is built, compiled, trained, checkpointed and reported.
Its own time is what `bilevel search` measures around all of that, the proposal included. Overhead is what the
workers spend besides: wall time x workers - sum of the trials' own times, in percent of that sum. The line
"all" begins when the command is typed: imports, start of the workers, the study, the end. The line "between
trials" begins with the first trial and ends with the last.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import optax

import bilevel as bl
from bilevel.recipes import Experiment
from bilevel.recipes.maml import Maml


@dataclass(frozen=True)
class Trial:
    """A sinusoid learner that takes about a second of a core, compilation included."""

    num_meta_steps: int = 1000
    seed: int = 0
    learning_rate: float = 1e-3
    maml: Maml = field(default_factory=lambda: Maml(num_steps=1, rate=0.01, estimator="unroll"))
    loop: bl.Options = field(
        default_factory=lambda: bl.Options(chunk_size=250, task_chunk=25, checkpoint_every=10_000)
    )

    def build(self) -> Experiment:
        """Put the experiment together."""
        net = bl.nets.mlp([1, 40, 40, 1])
        return Experiment(
            learner=self.maml.learner(net, bl.learners.mean_squared_error),
            optimizer=optax.adam(self.learning_rate),
            sample_tasks=bl.tasks.batch(bl.tasks.sinusoid, 25),
            sample_test=bl.tasks.sinusoid,
            protocol="sinusoids",
            eval_steps=1,
        )


def run(folder: Path, trials: int, workers: int, launcher: str, steps: int) -> float:
    """Seconds that the whole command took."""
    words = ["search", f"{Path(__file__).resolve()}:Trial", "--folder", str(folder)]
    words += ["--space.learning-rate", "log:1e-4..1e-2", "--space.maml.rate", "log:1e-3..1e-1"]
    words += ["--objective", "outer_loss", "--num-trials", str(trials), "--workers", str(workers)]
    words += ["--launcher", launcher, "--num-meta-steps", str(steps)]
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "bilevel", *words], capture_output=True, text=True)
    took = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(
            f"the search failed with {done.returncode}: {done.stdout[-500:]} {done.stderr[-2000:]}"
        )
    return took


def table(folder: Path, wall: float, workers: int) -> str:
    """The figures as Markdown."""
    from bilevel.search.spec import read_search
    from bilevel.search.study import open_book
    from bilevel.train.metrics import read_metrics

    trials = open_book(read_search(folder)).trials()
    assert all(trial.state.is_finished() for trial in trials)
    own = np.array([trial.user_attrs["seconds"] for trial in trials])
    loops = [
        read_metrics(folder / "trials" / f"{t.number:04d}" / "metrics.jsonl")[-1]["time"] for t in trials
    ]
    starts = [t.datetime_start.timestamp() for t in trials if t.datetime_start]
    ends = [t.datetime_complete.timestamp() for t in trials if t.datetime_complete]
    between = max(ends) - min(starts)

    def overhead(seconds: float) -> str:
        return f"{100 * (seconds * workers - own.sum()) / own.sum():.1f}"

    rows = [
        "| | wall time | x workers | overhead |",
        "|---|---|---|---|",
        f"| all | {wall:.1f} s | {wall * workers:.1f} s | {overhead(wall)} % |",
        f"| between trials | {between:.1f} s | {between * workers:.1f} s | {overhead(between)} % |",
        "",
        f"{len(trials)} trials on {workers} workers: {own.sum():.1f} s of their own (each "
        f"{np.median(own):.2f} s, {own.min():.2f} to {own.max():.2f}), of it "
        f"{100 * sum(loops) / own.sum():.0f} % in the training loop. Start and end: {wall - between:.1f} s "
        "of wall time.",
    ]
    return "\n".join(rows)


def main() -> None:
    """Prints the table."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--quick", action="store_true", help="8 trials")
    options.add_argument("--trials", type=int, default=200)
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--launcher", choices=("local", "ray"), default="local")
    options.add_argument("--steps", type=int, default=1000, help="outer steps of a trial")
    options.add_argument("--folder", type=Path, default=None, help="keep the search there")
    args = options.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    folder = args.folder or Path(tempfile.mkdtemp()) / "search"
    import run as bench  # here: the workers import this file from elsewhere

    print(f"Machine: {bench.machine()}\n", flush=True)
    wall = run(folder, 8 if args.quick else args.trials, args.workers, args.launcher, args.steps)
    print(table(folder, wall, args.workers))
    if args.folder is None:
        shutil.rmtree(folder.parent)


if __name__ == "__main__":
    main()
