"""Is the mean hypergradient of strengths of augmentation the slope of the mean validation loss?

The inner gradient of a network of ReLUs jumps where a unit switches. A derivative through the steps does not
see the jumps, but they do not cancel in the mean over random changes of the pictures. So the mean of exact
hypergradients need not be the derivative of the mean; with a smooth activation it is. Both are measured here
on one small problem: 500 pictures of MNIST of 7 x 7 pixels, 200 steps a training, each of the seven strengths
moved alone and all of them together. Prints a Markdown table, with standard errors over the trainings.

    BILEVEL_DATA=folder/of/mnist.npz python bench/augmentation_bias.py [--trainings 32] [--strengths 0.05]
"""

import argparse
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import run as bench

import bilevel as bl
from bilevel.problem import Learner, Task
from bilevel.recipes.augmentation_strength import STRENGTHS, change
from bilevel.recipes.digits import NUM_CLASSES, Digits, classifier, drawn

ACTIVATIONS: dict[str, Callable] = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "softplus": jax.nn.softplus}
WIDTH = 0.2  # of the differences to either side, in the logarithm; over narrower ones noise grows


def make_learner(activation: Callable, side: int, rate: float) -> Learner:
    """The inner problem of the recipe augmentation-strength, with any activation."""
    net = bl.nets.mlp([side * side, 32, NUM_CLASSES], activation)
    flat = bl.nets.Net(net.init, lambda params, x: net.apply(params, x.reshape(len(x), -1)))

    def inner_loss(params, meta, batch, key):
        draw_key, change_key = jax.random.split(key)
        x, y = drawn(batch, 32, draw_key)
        x = change(dict(zip(STRENGTHS, meta, strict=True)))(x, change_key)
        return bl.learners.cross_entropy(flat.apply(params, x), y)[0]

    problem, _ = classifier(flat, inner_loss)
    solver = bl.inner.Gradient(optax.sgd(rate, momentum=0.9), 200)
    return Learner(problem, solver, bl.hypergrad.Mixed(), lambda key: jnp.zeros(len(STRENGTHS)))


def mean(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1) / len(values) ** 0.5:.3f}"


def rows(name: str, strength: float, task: Task, side: int, rate: float, trainings: int) -> Iterator[str]:
    """Hypergradients and differences of the same trainings: one row a strength, and one for all together."""
    learner = make_learner(ACTIVATIONS[name], side, rate)
    problem, solver, estimator = learner.problem, learner.solver, learner.estimator
    keys = jax.random.split(jax.random.key(5), trainings)
    theta = jnp.full(len(STRENGTHS), jnp.log(strength))

    @jax.jit
    def slopes(theta):
        return jax.lax.map(lambda key: estimator.estimate(problem, solver, theta, task, (), key)[0], keys)

    @jax.jit
    def losses(theta):
        def one(key):  # the keys that the estimator gives to the training and to the outer loss
            inner_key, outer_key = jax.random.split(key)
            params = solver.solve(problem, theta, task, inner_key).params
            return problem.outer_loss(params, theta, task.query, outer_key)

        return jax.lax.map(one, keys)

    found = slopes(theta)
    gradients = np.asarray(found.grad)  # [trainings, strengths]
    for moved, direction in zip((*STRENGTHS, "all"), (*np.eye(len(STRENGTHS)), np.ones(len(STRENGTHS)))):
        along = gradients @ direction
        ahead, behind = (np.asarray(losses(theta + step * direction)) for step in (WIDTH, -WIDTH))
        cells = (name, f"{strength:g}", mean(np.asarray(found.value)), moved, mean(along))
        more = (f"{np.median(along):.3f}", f"{np.abs(along).max():.2f}", mean((ahead - behind) / (2 * WIDTH)))
        yield f"| {' | '.join(cells + more)} |"


def main() -> None:
    """Prints the table."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--strengths", nargs="*", type=float, default=[0.05])
    options.add_argument("--activations", nargs="*", choices=tuple(ACTIVATIONS), default=["relu", "gelu"])
    options.add_argument("--trainings", type=int, default=32)
    options.add_argument("--rate", type=float, default=0.1)
    args = options.parse_args()
    digits = Digits(num_validation=500, num_test=1, pool=4)
    parts = digits.read()
    task = jax.tree.map(jnp.asarray, Task(parts.support, parts.validation))
    print(f"Machine: {bench.machine()}\n")
    print(
        "| activation | strength | validation loss | moved | mean hypergradient | median | largest "
        "| slope of the mean |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in args.activations:
        for strength in args.strengths:
            for row in rows(name, strength, task, digits.side, args.rate, args.trainings):
                print(row, flush=True)


if __name__ == "__main__":
    main()
