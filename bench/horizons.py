"""How memory and time grow with the inner horizon K: plain reverse mode, mixed mode, and checkpointing.

Two inner problems, a perceptron and a small transformer, are trained for K steps of SGD; the query loss is
differentiated in the initialization, the log of the rate and the log of a ridge penalty. Each row is a
process of its own. Memory is the compiler's figure for temporary buffers, and the peak resident memory of
the process where the row is run. A row is run where that figure is below --limit; elsewhere its time is that
of the longest horizon that was run, times the ratio of the horizons. Prints Markdown.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import bilevel as bl
from bilevel.hypergrad import Mixed, Unroll
from bilevel.inner.checkpointing import Sqrt, Tree
from bilevel.nets.transformer import transformer

METHODS = {
    "Unroll()": Unroll(),
    "Mixed()": Mixed(),
    "Mixed(Sqrt())": Mixed(checkpoint=Sqrt()),
    "Mixed(Tree(22))": Mixed(checkpoint=Tree(22)),
}
WIDTH, EXAMPLES = 32, 5120
VOCABULARY, LENGTH, SEQUENCES = 32, 64, 5


def perceptron() -> tuple[bl.nets.Net, object, bl.Task]:
    """Four layers of 32 units, three of them tanh, on 5120 examples."""
    net = bl.nets.mlp([WIDTH] * 5, jnp.tanh)
    x = jax.random.normal(jax.random.key(1), (2, EXAMPLES, WIDTH))
    batches = [(part, jnp.sin(2 * jnp.roll(part, 1, axis=1))) for part in x]
    return net, bl.learners.mean_squared_error, bl.Task(*batches)


def language_model() -> tuple[bl.nets.Net, object, bl.Task]:
    """Two layers of width 32 and four heads, on 5 sequences of 64 tokens of a noisy counter."""
    net = transformer(VOCABULARY, width=32, num_layers=2, num_heads=4, max_length=LENGTH)

    def loss(logits, targets):
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def batch(key):
        steps = 1 + 2 * jax.random.bernoulli(key, 0.2, (SEQUENCES, LENGTH + 1))
        tokens = jnp.cumsum(steps, axis=1) % VOCABULARY
        return tokens[:, :-1], tokens[:, 1:]

    return net, loss, bl.Task(batch(jax.random.key(1)), batch(jax.random.key(2)))


NETS = {"MLP": perceptron, "transformer": language_model}
# The transformer's training is unstable from a rate of 0.01 on: rounding then grows exponentially with K.
RATES = {"MLP": 0.05, "transformer": 0.001}


def one_row(name: str, method: str, num_steps: int, limit: float, out: str) -> dict:
    """One process: the compiler's memory figure and, where it is below the limit, a timed run."""
    net, loss, task = NETS[name]()

    def inner_loss(params, meta, batch, key):
        x, y = batch
        squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
        return loss(net.apply(params, x), y) + jnp.exp(meta["log_ridge"]) * squares

    problem = bl.Problem(
        init=lambda meta, key: meta["init"],
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, batch, key: loss(net.apply(params, batch[0]), batch[1]),
    )
    meta = {
        "init": net.init(jax.random.key(0)),
        "log_rate": jnp.log(RATES[name]),
        "log_ridge": jnp.log(1e-4),
    }
    solver = bl.inner.Gradient(lambda meta: optax.sgd(jnp.exp(meta["log_rate"])), num_steps)

    def hypergradient(meta, task):
        return bl.hypergradient(problem, solver, METHODS[method], meta, task, jax.random.key(0)).grad

    start = time.perf_counter()
    compiled = jax.jit(hypergradient).lower(meta, task).compile()
    row = {"compile": time.perf_counter() - start, "bytes": compiled.memory_analysis().temp_size_in_bytes}
    if row["bytes"] < limit * 2**30:
        times = []
        for _ in range(3 if num_steps <= 100 else 1):  # the first of a short one only warms up
            start = time.perf_counter()
            grad = jax.block_until_ready(compiled(meta, task))
            times.append(time.perf_counter() - start)
        row["seconds"] = min(times)
        row["rss"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        np.save(out, np.asarray(ravel_pytree(grad)[0]))
    return row


@dataclass(frozen=True)
class Runner:
    """Runs rows in processes of their own, and keeps their gradients."""

    limit: float
    folder: str

    def __call__(self, name: str, method: str, num_steps: int) -> dict:
        out = str(Path(self.folder) / f"{name}-{method}-{num_steps}.npy")
        row = ("--row", name, method, str(num_steps), out, f"--limit={self.limit}")
        done = subprocess.run([sys.executable, __file__, *row], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}, {method}, K = {num_steps}: {done.stderr.strip().splitlines()[-1]}")
        result = json.loads(done.stdout.splitlines()[-1])
        result["grad"] = np.load(out).astype(np.float64) if "seconds" in result else None
        print(f"{name}, {method}, K = {num_steps}: {done.stdout.strip()}", file=sys.stderr, flush=True)
        return result


def compare(name: str, horizons: list[int], run: Runner) -> dict[tuple[str, int], dict]:
    """All rows of a net, with times extrapolated where there are none, and errors against the first row."""
    rows = {(method, k): run(name, method, k) for k in horizons for method in METHODS}
    for (method, k), row in rows.items():
        longest = max(j for j in horizons if rows[method, j]["grad"] is not None)
        row["time"] = row.get("seconds", rows[method, longest].get("seconds", 0.0) * k / longest)
        row["longest"] = longest
        there = [m for m in METHODS if rows[m, k]["grad"] is not None]
        row["reference"] = there[0]
        if row["grad"] is not None and method != there[0]:
            truth = rows[there[0], k]["grad"]
            row["error"] = np.linalg.norm(row["grad"] - truth) / np.linalg.norm(truth)
    return rows


def size(count: float) -> str:
    """Bytes as people write them.

    >>> size(3 * 2**30), size(5 * 2**20)
    ('3.00 GiB', '5.0 MiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def table(name: str, rows: dict[tuple[str, int], dict]) -> str:
    """The Markdown table of a net."""
    lines = [
        f"### {name}",
        "",
        "| K | estimator | temporary memory | peak of the process | time | ms a step | gradient differs by |",
        "|---|---|---|---|---|---|---|",
    ]
    for (method, k), row in rows.items():
        ran = "seconds" in row
        extra = "" if ran else f" (from K = {row['longest']})"
        error = f"{row['error']:.0e} from {row['reference']}" if "error" in row else "-"
        cells = (
            k,
            f"`{method}`",
            size(row["bytes"]),
            size(row["rss"]) if ran else "not run",
            f"{row['time']:.3g} s{extra}",
            f"{1000 * row['time'] / k:.3g}",
            error,
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def summary(rows: dict[tuple[str, int], dict], horizons: list[int]) -> str:
    """What the goals ask for, as ratios to plain reverse mode."""
    plain, mixed = (
        rows[method, rows["Unroll()", horizons[-1]]["longest"]] for method in ("Unroll()", "Mixed()")
    )
    lines = [
        f"- `Mixed()` at K = {plain['longest']}: {mixed['bytes'] / plain['bytes']:.3f} of plain reverse's "
        f"memory, {mixed['time'] / plain['time']:.2f} of its time."
    ]
    longest = horizons[-1]
    for method in list(METHODS)[2:]:
        row, whole = rows[method, longest], rows["Unroll()", longest]
        lines.append(
            f"- `{method}` at K = {longest}: {size(row['bytes'])} where plain reverse takes "
            f"{size(whole['bytes'])}, {row['time'] / whole['time']:.2f} of its time."
        )
    sqrt, tree = (rows[method, longest]["grad"] for method in list(METHODS)[2:])
    if sqrt is not None and tree is not None:
        error = np.linalg.norm(sqrt - tree) / np.linalg.norm(sqrt)
        lines.append(f"- Their two gradients at K = {longest} differ by {error:.0e}, relative.")
    return "\n".join(lines)


def main() -> None:
    """Prints a table for each net."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--quick", action="store_true", help="horizons 10, 100 and 1000 only")
    options.add_argument("--nets", nargs="*", choices=tuple(NETS), default=tuple(NETS))
    options.add_argument("--limit", type=float, default=2.0, help="GiB above which a row is not run")
    options.add_argument("--row", nargs=4, help=argparse.SUPPRESS)  # net, method, K, file
    args = options.parse_args()
    if args.row:
        name, method, num_steps, out = args.row
        print(json.dumps(one_row(name, method, int(num_steps), args.limit, out)))
        return
    horizons = [10, 100, 1000] if args.quick else [10, 100, 1000, 10_000]
    print(
        f"jax {jax.__version__}, {jax.default_backend()}, float32; rows above {args.limit:g} GiB are not run."
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in args.nets:
            rows = compare(name, horizons, Runner(args.limit, folder))
            print(f"\n{table(name, rows)}\n\n{summary(rows, horizons)}", flush=True)


if __name__ == "__main__":
    main()
