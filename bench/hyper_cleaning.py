"""Hyper-data-cleaning on MNIST with every estimator that applies: accuracy, F1 of the found corruption, time.

    min over θ  CE(φ*(θ), 5000 clean examples)   with   φ*(θ) = argmin over φ of
                                   (1/n) Σ σ(θᵢ) CE(φ; xᵢ, yᵢ) + λ/2 |φ|²      over 5000 examples

Half of the 5000 training labels are replaced by random ones. θ has a weight for each training example;
φ is a linear softmax classifier, 784 to 10. An example counts as found corrupt where σ(θᵢ) < 1/2, and as
corrupt where its label is wrong. The accuracy is that of a classifier trained to the end on the weighted
examples, on the 10000 test images. Seeds fix the split and the corruption. Prints a Markdown table.

    BILEVEL_DATA=folder/of/mnist.npz python bench/hyper_cleaning.py [--quick] [--only implicit-cg soba]
"""

import argparse
import os
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import run as bench

import bilevel as bl
from bilevel.hypergrad import (
    PES,
    AmIGO,
    Bome,
    EvolutionStrategies,
    F2sa,
    FiniteDifference,
    FirstOrder,
    Forward,
    Implicit,
    MaSoba,
    Mixed,
    OneStep,
    Penalty,
    Saba,
    Sama,
    Soba,
    StocBiO,
    Truncated,
    Unroll,
    cg,
    neumann,
    nystrom,
)

NUM_TRAIN, NUM_CLEAN, CORRUPT, DECAY = 5000, 5000, 0.5, 1e-3
RATE = 0.1  # of the inner steps; the largest curvature of the inner loss is about 10


class Data(NamedTuple):
    train: tuple[np.ndarray, np.ndarray, np.ndarray]  # x [n, 784], labels [n], row numbers [n]
    clean: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    corrupt: np.ndarray  # bool [n]


def load(seed: int = 0) -> Data:
    """The split, with its corrupted labels."""
    folder = os.environ.get("BILEVEL_DATA")
    if not folder or not (Path(folder) / "mnist.npz").exists():
        sys.exit("set BILEVEL_DATA to the folder that holds mnist.npz")
    with np.load(Path(folder) / "mnist.npz") as file:
        images, labels, test_images, test_labels = (
            file[name] for name in ("train_images", "train_labels", "test_images", "test_labels")
        )
    rng = np.random.default_rng(seed)
    rows = rng.permutation(len(images))[: NUM_TRAIN + NUM_CLEAN]
    flat = lambda x: x.reshape(len(x), -1).astype(np.float32) / 255  # noqa: E731
    x, y = flat(images[rows]), labels[rows].astype(np.int32)
    replaced = rng.random(NUM_TRAIN) < CORRUPT
    noisy = np.where(replaced, rng.integers(0, 10, NUM_TRAIN), y[:NUM_TRAIN]).astype(np.int32)
    return Data(
        (x[:NUM_TRAIN], noisy, np.arange(NUM_TRAIN, dtype=np.int32)),
        (x[NUM_TRAIN:], y[NUM_TRAIN:]),
        (flat(test_images), test_labels.astype(np.int32)),
        noisy != y[:NUM_TRAIN],
    )


def cross_entropy(params, x, y):
    """Of each example `[n]`."""
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["w"] + params["b"], y)


def inner_loss(params, meta, batch, key):
    x, y, rows = batch
    weights = jax.nn.sigmoid(meta[rows])
    return jnp.mean(weights * cross_entropy(params, x, y)) + 0.5 * DECAY * optax.tree.norm(
        params, squared=True
    )


def outer_loss(params, meta, batch, key):
    return jnp.mean(cross_entropy(params, *batch))


PROBLEM = bl.Problem(
    init=lambda meta, key: {"w": jnp.zeros((784, 10)), "b": jnp.zeros(10)},
    inner_loss=inner_loss,
    outer_loss=outer_loss,
)


def descent(num_steps: int) -> bl.inner.Gradient:
    return bl.inner.Gradient(optax.sgd(RATE, momentum=0.9), num_steps)


ONE = bl.inner.Gradient(optax.sgd(RATE), 1)


class Way(NamedTuple):
    """How the problem is solved: outer steps of Adam at `rate`, fewer with --quick."""

    solver: bl.inner.Gradient
    estimator: bl.problem.Estimator
    num_meta_steps: int = 100
    rate: float = 0.1


WAYS: dict[str, Way] = {
    "unroll": Way(descent(50), Unroll()),
    "mixed": Way(descent(50), Mixed()),
    "truncated-10": Way(descent(50), Truncated(10)),
    "implicit-cg": Way(descent(100), Implicit(cg(20))),
    "implicit-neumann": Way(descent(100), Implicit(neumann(20, 0.1))),
    "implicit-nystrom": Way(descent(100), Implicit(nystrom(20, 0.1))),
    "one-step": Way(descent(100), OneStep(0.1)),
    "finite-difference": Way(descent(100), FiniteDifference(0.1)),
    "sama": Way(descent(100), Sama()),
    "penalty": Way(descent(100), Penalty(10.0)),
    "bome": Way(ONE, Bome(0.1), 1000, 0.02),
    "soba": Way(ONE, Soba(0.1, batch_size=500), 3000, 0.02),
    "saba": Way(ONE, Saba(0.1, batch_size=500), 3000, 0.02),
    "ma-soba": Way(ONE, MaSoba(0.1, batch_size=500), 3000, 0.02),
    "amigo": Way(
        bl.inner.Gradient(optax.sgd(RATE), 10), AmIGO(0.1, linear_steps=10, batch_size=500), 500, 0.05
    ),
    "stocbio": Way(bl.inner.Gradient(optax.sgd(RATE), 10), StocBiO(0.1, batch_size=500), 500, 0.05),
    "f2sa": Way(ONE, F2sa(10.0, batch_size=500), 3000, 0.02),
    "evolution": Way(descent(50), EvolutionStrategies(sigma=0.1, num_pairs=4, chunk=1), 50),
    "pes": Way(descent(50), PES(sigma=0.1, num_pairs=8, truncation=5, chunk=1), 200),
}
LEFT_OUT = {
    "first-order": (
        FirstOrder(),
        "θ acts only through the inner loop: its gradient is exactly zero, as it warns",
    ),
    "forward": (Forward(), "5000 columns of 7850 parameters and as many forward derivatives a step"),
}


def train(way: Way, data: Data, quick: bool) -> tuple[jax.Array, float, set[str]]:
    """θ, the seconds without compilation, and what the estimator warned of."""
    learner = bl.Learner(PROBLEM, way.solver, way.estimator)
    task = bl.Task(data.train, data.clean)
    sample = jax.tree_util.Partial(
        lambda task, key: task, jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], task)
    )
    optimizer = optax.adam(way.rate)
    steps = max(2, way.num_meta_steps // (10 if quick else 1))
    chunk = max(1, steps // 10)
    options = bl.Options(chunk_size=chunk, zero_leaves="allow")
    times = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        state = bl.init_state(learner, optimizer, sample, jax.random.key(0), jnp.zeros(NUM_TRAIN))
        note = lambda state, values: times.append(chunk / values["steps_per_second"])  # noqa: E731
        state = bl.train(learner, optimizer, sample, state, steps, options=options, on_chunk=[note])
    rest = times[1:] or times
    return state.meta, float(np.mean(rest)) * len(times), {str(w.message) for w in seen}


def judge(meta: jax.Array, data: Data) -> tuple[float, float]:
    """Test accuracy after training to the end with these weights, and F1 of the found corruption."""

    @jax.jit
    def test_accuracy(meta, task, test):
        params = descent(500).solve(PROBLEM, meta, task, jax.random.key(0)).params
        x, y = test
        return jnp.mean(jnp.argmax(x @ params["w"] + params["b"], 1) == y)

    found, true = np.asarray(meta) < 0, data.corrupt
    hits = np.sum(found & true)
    f1 = 2 * hits / max(1, np.sum(found) + np.sum(true))
    return 100 * float(test_accuracy(meta, bl.Task(data.train, data.clean), data.test)), 100 * f1


def main() -> None:
    """Prints the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--quick", action="store_true", help="a tenth of the outer steps")
    options.add_argument("--only", nargs="*", choices=tuple(WAYS), default=tuple(WAYS))
    args = options.parse_args()
    data = load()
    print(f"Machine: {bench.machine()}\n")
    print("| estimator | outer steps | seconds | test accuracy % | F1 of the found corruption % |")
    print("|---|---|---|---|---|")

    def row(name, steps, seconds, meta):
        accuracy, f1 = judge(meta, data)
        print(f"| {name} | {steps} | {seconds} | {accuracy:.2f} | {f1:.1f} |", flush=True)

    row("no cleaning (equal weights)", "", "", jnp.full(NUM_TRAIN, 1e-6))
    row("wrong labels known", "", "", jnp.where(jnp.asarray(data.corrupt), -20.0, 20.0))
    said: dict[str, set[str]] = {}
    for name in args.only:
        meta, seconds, said[name] = train(WAYS[name], data, args.quick)
        steps = max(2, WAYS[name].num_meta_steps // (10 if args.quick else 1))
        row(f"`{type(WAYS[name].estimator).__name__}` ({name})", steps, f"{seconds:.1f}", meta)
    print()
    for name, (estimator, reason) in LEFT_OUT.items():
        print(f"- left out, {name} (`{type(estimator).__name__}`): {reason}")
    for name, sentences in said.items():
        for sentence in sorted(sentences):
            print(f"- {name} warned: {sentence}")


if __name__ == "__main__":
    main()
