"""Times an outer step of bilevel's MAML on the work that bench/peers/ times: one JSON line.

The batch and the initial weights are those of bench/peers/data.py, so the outer loss of the first
step must be the peers'. Two figures: `median_ms` is a call of `bl.meta_step` under `jax.jit` an outer
step, as the peers are timed; `chunk_ms` is a step inside `bl.train`, where many steps are one call.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import data

WARM_UP = 3
ESTIMATORS = {"unroll": bl.hypergrad.Unroll, "mixed": bl.hypergrad.Mixed}


def sinusoid(args) -> tuple[str, bl.Learner, dict, bl.Task]:
    """25 tasks of 10 shots and 10 queries, an MLP 1-40-40-1, inner rate 0.01."""
    net = bl.nets.mlp([1, 40, 40, 1])
    weights = dict(zip(("hidden_0", "hidden_1", "head"), data.mlp_weights(), strict=True))
    meta = {"init": {name: {"w": w.T, "b": b} for name, (w, b) in weights.items()}}
    learner = bl.maml(
        net,
        bl.learners.mean_squared_error,
        num_steps=args.inner_steps,
        rates=0.01,
        estimator=ESTIMATORS[args.estimator](),
    )
    name = f"sinusoid MAML, 25 tasks, 10-shot, MLP 40-40, {args.inner_steps} inner step(s)"
    return name, learner, meta, bl.Task(*data.sinusoid())


def omniglot(args) -> tuple[str, bl.Learner, dict, bl.Task]:
    """32 tasks, 5-way 1-shot, 15 queries a class, conv4 of 64 filters, inner rate 0.4."""
    net = bl.nets.conv4(ways=5, filters=64, compute_dtype=args.compute_dtype)
    learner = bl.maml(
        net,
        bl.learners.cross_entropy,
        num_steps=args.inner_steps,
        rates=0.4,
        estimator=ESTIMATORS[args.estimator](),
    )
    name = f"Omniglot MAML, 32 tasks, 5-way 1-shot, conv4, {args.inner_steps} inner step(s)"
    channels_last = [(np.moveaxis(x, 2, -1), y.astype(np.int32)) for x, y in data.omniglot()]
    return name, learner, {"init": conv4_weights()}, bl.Task(*channels_last)


def conv4_weights(filters: int = 64, ways: int = 5) -> dict:
    """The peers' initial weights in conv4's layout."""
    blocks, (head, bias) = data.conv4_weights(filters, ways)
    # The bias of a convolution before batch norm has no effect: conv4 has none.
    init = {
        f"block_{i}": {
            "w": kernel.transpose(0, 2, 3, 1).reshape(len(kernel), -1),
            "scale": np.ones(len(kernel), np.float32),
            "bias": np.zeros(len(kernel), np.float32),
        }
        for i, (kernel, _) in enumerate(blocks)
    }
    return {**init, "head": {"w": head.T, "b": bias}}


def fixed(tasks: bl.Task):
    """A sampler that always draws the same tasks, which stay an operand of the compiled program.

    It copies them from one of two places, as the key says. Of tasks that no key has a say in XLA takes what
    depends on them alone out of the loop, and does it twice, for the loss and for the metrics: then it no
    longer sees that the rest of the two is the same forward pass. No loop that draws its tasks has that.
    """
    twice = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), tasks)
    return jax.tree_util.Partial(_either, twice)


def _either(twice: bl.Task, key: jax.Array) -> bl.Task:
    place = jax.random.bernoulli(key).astype(int)
    return jax.tree.map(lambda leaf: leaf[place], twice)


def by_step(learner: bl.Learner, meta, tasks: bl.Task, args) -> tuple[list[float], list[float]]:
    """The losses of the warm-up steps, and the milliseconds of `args.repeats` outer steps."""
    optimizer = optax.adam(1e-3)
    state = bl.init_state(learner, optimizer, fixed(tasks), jax.random.key(0), meta)

    @jax.jit
    def step(state, tasks):
        state, metrics = bl.meta_step(learner, optimizer, state, tasks, task_chunk=args.task_chunk)
        return state, metrics.scalars["outer_loss"]

    losses, times = [], []
    for i in range(WARM_UP + args.repeats):
        start = time.perf_counter()
        state, loss = jax.block_until_ready(step(state, tasks))
        if i < WARM_UP:
            losses.append(float(loss))
        else:
            times.append(1e3 * (time.perf_counter() - start))
    return losses, times


def by_chunk(learner: bl.Learner, meta, tasks: bl.Task, args) -> float:
    """Milliseconds of an outer step of `bl.train`: the median chunk, without the one that compiles."""
    each = -(-tasks.support[0].shape[0] // args.devices)  # tasks on a device
    optimizer = optax.adam(1e-3)
    state = bl.init_state(learner, optimizer, fixed(tasks), jax.random.key(0), meta)
    times = []
    bl.train(
        learner,
        optimizer,
        fixed(tasks),
        state,
        args.chunk_size * (1 + args.chunks),
        options=bl.Options(
            chunk_size=args.chunk_size, task_chunk=min(args.task_chunk, each), devices=args.devices
        ),
        on_chunk=[lambda state, values: times.append(1e3 / values["steps_per_second"])],
    )
    return statistics.median(times[1:])


def rounding(args, tasks: bl.Task, meta) -> float:
    """Relative difference of the hypergradient to that of float32."""

    def gradient(dtype):
        settings = argparse.Namespace(**{**vars(args), "compute_dtype": dtype})
        learner, keys = omniglot(settings)[1], jax.random.split(jax.random.key(0), 32)
        one = lambda task, key: bl.hypergradient(  # noqa: E731
            learner.problem, learner.solver, learner.estimator, meta, task, key
        )
        grads = jax.jit(lambda tasks: jax.lax.map(lambda t: one(*t).grad, (tasks, keys)))(tasks)
        return jnp.concatenate([leaf.mean(0).ravel() for leaf in jax.tree.leaves(grads)])

    exact = gradient("float32")
    difference = gradient(args.compute_dtype) - exact
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(exact))


def main() -> None:
    """Prints the JSON line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("work", choices=("sinusoid", "omniglot"))
    options.add_argument("--inner-steps", type=int, default=1)
    options.add_argument("--repeats", type=int, default=20, help="timed outer steps")
    options.add_argument("--estimator", choices=tuple(ESTIMATORS), default="mixed")
    options.add_argument("--task-chunk", type=int, default=1)
    options.add_argument("--compute-dtype", choices=("float32", "bfloat16"), default="float32")
    options.add_argument("--chunk-size", type=int, default=1000, help="outer steps a compiled call")
    options.add_argument("--chunks", type=int, default=5, help="timed calls; 0 leaves them out")
    options.add_argument(
        "--devices", type=int, default=1, help="that a step's tasks are spread over in bl.train"
    )
    args = options.parse_args()
    jax.config.update("jax_num_cpu_devices", args.devices)
    name, learner, meta, tasks = {"sinusoid": sinusoid, "omniglot": omniglot}[args.work](args)
    meta, tasks = jax.tree.map(jnp.asarray, (meta, tasks))
    losses, times = by_step(learner, meta, tasks, args)
    result = {
        "peer": "bilevel",
        "work": name,
        "median_ms": round(statistics.median(times), 3),
        "min_ms": round(min(times), 3),
        "max_ms": round(max(times), 3),
        "repeats": args.repeats,
        "jax": jax.__version__,
        "value": losses[0],
        "third_value": losses[2],
        "devices": args.devices,
        "way": f"{args.estimator}, task_chunk={args.task_chunk}, {args.compute_dtype}",
    }
    if args.chunks:
        result["chunk_ms"] = round(by_chunk(learner, meta, tasks, args), 4)
    if args.compute_dtype != "float32":
        result["relative_error"] = rounding(args, tasks, meta)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
