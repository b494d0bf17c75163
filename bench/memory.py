"""What mixed mode saves: peak memory and time of `Unroll` and `Mixed`, with and without checkpoints.

A residual MLP of 16 layers is adapted to one batch by 8 steps of SGD, and the query loss
is differentiated in the initialization. The peak is the compiler's own figure for temporary buffers.
Prints one JSON line.
"""

import argparse
import json
import statistics
import time

import jax
import optax

import bilevel as bl

LAYERS, STEPS = 16, 8


def residual_mlp(width: int) -> bl.nets.Net:
    """x ← x + relu(x Wᵢ) Vᵢ / 16, for 16 layers."""

    def init(key):
        shape = (LAYERS, 2, width, width)
        return [tuple(layer) for layer in jax.random.normal(key, shape) * width**-0.5]

    def apply(params, x):
        for first, second in params:
            x = x + jax.nn.relu(x @ first) @ second / LAYERS
        return x

    return bl.nets.Net(init, apply)


def measure(estimator: bl.hypergrad.Unroll | bl.hypergrad.Mixed, args) -> dict:
    """Megabytes of temporary buffers, seconds, and the gradient's norm."""
    net = residual_mlp(args.width)
    learner = bl.maml(net, bl.learners.mean_squared_error, num_steps=STEPS, rates=30.0, estimator=estimator)
    meta_key, x_key, y_key, key = jax.random.split(jax.random.key(0), 4)
    meta = learner.init_meta(meta_key)
    x = jax.random.normal(x_key, (2, args.examples, args.width))
    y = jax.random.normal(y_key, (2, args.examples, args.width))
    task = bl.Task((x[0], y[0]), (x[1], y[1]))

    def hypergradient(meta, task):
        return bl.hypergradient(learner.problem, learner.solver, estimator, meta, task, key).grad

    compiled = jax.jit(hypergradient).lower(meta, task).compile()
    times = []
    for _ in range(1 + args.repeats):
        start = time.perf_counter()
        grad = jax.block_until_ready(compiled(meta, task))
        times.append(time.perf_counter() - start)
    return {
        "estimator": repr(estimator),
        "megabytes": round(compiled.memory_analysis().temp_size_in_bytes / 1e6, 1),
        "seconds": round(statistics.median(times[1:]), 3),
        "norm": float(optax.global_norm(grad)),
    }


def main() -> None:
    """Prints the JSON line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--width", type=int, default=256)
    options.add_argument("--examples", type=int, default=2048)
    options.add_argument("--repeats", type=int, default=3)
    args = options.parse_args()
    estimators = [
        kind(checkpoint=checkpoint)
        for checkpoint in (None, 1)
        for kind in (bl.hypergrad.Unroll, bl.hypergrad.Mixed)
    ]
    print(json.dumps([measure(estimator, args) for estimator in estimators]))


if __name__ == "__main__":
    main()
