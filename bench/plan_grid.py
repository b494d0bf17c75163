"""How well `bl.plan` predicts: predicted and measured peak memory over a grid of problems.

Each row is a process of its own that compiles `bl.mean_hypergradient`, resets the kernel's high-water
mark, runs it once and reads by how much the resident memory grew at its highest. The arguments lie in
memory before. Prints a Markdown table and exits with 1 when a prediction is off by more than 25%. Needs
Linux.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

TOLERANCE = 0.25
# net, width, examples in a task, inner steps, tasks, task_chunk, estimator
GRID = [
    ("mlp", 512, 2048, 8, 2, 1, "Mixed()"),
    ("mlp", 512, 2048, 8, 2, 1, "Unroll()"),
    ("mlp", 512, 2048, 8, 2, 2, "Unroll()"),
    ("mlp", 512, 4096, 8, 4, 4, "Mixed()"),
    ("mlp", 512, 4096, 16, 2, 1, "Unroll(checkpoint=4)"),
    ("mlp", 512, 4096, 16, 2, 2, "Mixed(checkpoint=Every(1))"),
    ("mlp", 512, 4096, 16, 2, 2, "Mixed(checkpoint=Every(1, keep_gradients=True))"),
    ("mlp", 1024, 512, 16, 2, 1, "Mixed(checkpoint=Sqrt())"),
    ("mlp", 1024, 512, 30, 2, 1, "Mixed(checkpoint=Tree(6))"),
    ("mlp", 1024, 1024, 20, 2, 1, "Mixed()"),
    ("mlp", 1024, 1024, 20, 1, 1, "Unroll()"),
    ("conv4", 32, 200, 3, 4, 2, "Mixed()"),
    ("conv4", 32, 200, 3, 4, 1, "Unroll()"),
    ("conv4", 32, 200, 5, 4, 1, "Mixed(checkpoint=Sqrt())"),
]


def row(net, width, examples, steps, tasks, chunk, way) -> dict[str, float]:
    """Compile, predict, run, measure."""
    import jax
    import jax.numpy as jnp

    import bilevel as bl
    from bilevel.analysis.memory import compile_hypergradient, compiled_memory
    from bilevel.inner import checkpointing

    names = {name: getattr(checkpointing, name) for name in ("Every", "Sqrt", "Tree")}
    estimator: Any = eval(f"hypergrad.{way}", {"hypergrad": bl.hypergrad, **names})
    x_key, y_key, key = jax.random.split(jax.random.key(0), 3)
    if net == "mlp":
        model, loss = bl.nets.mlp([width] * 4), bl.learners.mean_squared_error
        x = jax.random.normal(x_key, (2, tasks, examples, width))
        y = jax.random.normal(y_key, (2, tasks, examples, width))
    else:
        model, loss = bl.nets.conv4(5, width), bl.learners.cross_entropy
        x = jax.random.normal(x_key, (2, tasks, examples, 28, 28, 1))
        y = jnp.zeros((2, tasks, examples), jnp.int32)
    learner = bl.maml(model, loss, num_steps=steps, rates=0.01, estimator=estimator)
    assert learner.init_meta is not None
    meta, batch = learner.init_meta(key), bl.Task((x[0], y[0]), (x[1], y[1]))
    compiled = compile_hypergradient(learner, meta, batch, chunk)
    memory = compiled_memory(compiled)
    jax.block_until_ready((meta, batch))
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again here
    jax.block_until_ready(compiled(meta, batch, (), key))
    return {"predicted": memory.temporary + memory.outputs, "measured": resident("VmHWM") - before}


def resident(field: str) -> int:
    """Bytes, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def main() -> int:
    """Prints the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--row", type=json.loads, help="measure one row and print JSON")
    options.add_argument("--rows", type=int, default=len(GRID), help="only the first so many")
    args = options.parse_args()
    if args.row is not None:
        print(json.dumps(row(*args.row)))
        return 0
    print("| net | width | examples | steps | tasks | chunk | estimator | predicted MB | measured MB | off |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for settings in GRID[: args.rows]:
        command = [sys.executable, __file__, "--row", json.dumps(settings)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(done.stderr, file=sys.stderr)
            return 1
        found = json.loads(done.stdout.splitlines()[-1])
        off = found["predicted"] / found["measured"] - 1
        worst = max(worst, abs(off))
        figures = f"{found['predicted'] / 1e6:.0f} | {found['measured'] / 1e6:.0f} | {100 * off:+.0f}%"
        print("|", " | ".join(map(str, settings)), "|", figures, "|", flush=True)
    print(f"\nlargest deviation {100 * worst:.0f}%, allowed {100 * TOLERANCE:.0f}%")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
