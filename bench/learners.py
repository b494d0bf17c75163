"""Every learner on glyphs: the time of an outer step, and how far it comes in a minute of processor time.

Prints one Markdown table: 5-way 1-shot, 15 queries a class at the test, conv4, unseen classes. A learner
that is not clearly above training from scratch is named, and the script ends with 1.
"""

import argparse
import sys
import time
from itertools import pairwise

import jax
import optax

import bilevel as bl
from bilevel.testing import LEARNERS, LearnerRow, Nets

WAYS, FILTERS, TASKS, CLASSES = 5, 16, 8, 200
CHUNK = 25


def nets() -> Nets:
    """conv4 with a head, and as an embedding whose features stay at their 2 x 2 places."""
    classifier = bl.nets.conv4(WAYS, FILTERS)
    return Nets(classifier, bl.nets.conv4(None, FILTERS), WAYS, 4 * FILTERS, CLASSES, pictures=True)


def sampler(row: LearnerRow):
    """Batches of tasks, or minibatches of all classes for learners that are trained on those."""
    if not row.pretrained:
        return bl.tasks.batch(bl.tasks.Glyphs(WAYS, row.train_shots, 5, "train"), TASKS)
    images, labels = jax.vmap(lambda c, k: (bl.tasks.glyph(c, k), c))(
        jax.numpy.arange(CLASSES).repeat(20), jax.random.split(jax.random.key(0), 20 * CLASSES)
    )
    source = bl.tasks.FewShot(jax.device_get(images), jax.device_get(labels), WAYS, 1, 1)
    return bl.tasks.batch(bl.tasks.Minibatch(source, 64), 1)


def accuracy(learner, meta, num_tasks: int) -> tuple[float, float]:
    """In percent, with the half-width of its 95% interval."""
    test = bl.tasks.Glyphs(WAYS, 1, 15, "test")
    steps = {"num_steps": 5} if hasattr(learner.solver, "num_steps") and learner.solver.num_steps < 5 else {}
    curve = bl.evaluate(learner, meta, test, jax.random.key(1), num_tasks=num_tasks, **steps).curves[
        "query_accuracy"
    ]
    return 100 * curve.mean[-1], 100 * curve.ci95[-1]


def measure(row: LearnerRow, seconds: float, num_tasks: int) -> tuple[float, int, float, float]:
    """Milliseconds of processor time of an outer step, steps done, accuracy and its half-width."""
    learner, sample, optimizer = row.make(nets()), sampler(row), row.optimizer(3e-3)
    state = bl.init_state(learner, optimizer, sample, jax.random.key(0))
    # Processor time, compilation included: it is the same on a machine that does other work.
    marks = [time.process_time()]

    def watch(state, values):
        marks.append(time.process_time())
        return marks[-1] - marks[0] > seconds  # True ends the training

    state = bl.train(
        learner, optimizer, sample, state, 100_000,
        options=bl.Options(chunk_size=CHUNK, zero_leaves="allow"), on_chunk=[watch],
    )  # fmt: skip
    took = 1e3 / CHUNK * min(later - earlier for earlier, later in pairwise(marks))
    return took, int(state.step), *accuracy(learner, state.meta, num_tasks)


def main() -> None:
    """Prints the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--seconds", type=float, default=60.0, help="of processor time to train each learner"
    )
    options.add_argument("--num-tasks", type=int, default=200)
    options.add_argument("--learners", nargs="*", choices=tuple(LEARNERS), default=tuple(LEARNERS))
    args = options.parse_args()
    scratch = bl.learners.from_scratch(nets().classifier, bl.learners.cross_entropy, optax.adam(1e-2), 20)
    floor, half = accuracy(scratch, {}, args.num_tasks)
    print("| learner | ms an outer step | outer steps | accuracy |\n|---|---|---|---|")
    print(f"| from scratch, 20 steps | | | {floor:.1f} ± {half:.1f} % |", flush=True)
    poor = []
    for name in args.learners:
        took, steps, mean, half = measure(LEARNERS[name], args.seconds, args.num_tasks)
        print(f"| {name} | {took:.1f} | {steps} | {mean:.1f} ± {half:.1f} % |", flush=True)
        poor += [name] if mean - half < floor + 5 else []
    if poor:
        sys.exit(f"not clearly above training from scratch: {', '.join(poor)}")


if __name__ == "__main__":
    main()
