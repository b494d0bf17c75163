"""Keep some training classes apart, to validate on, where a data set has no validation classes."""

import hashlib
from dataclasses import replace

import numpy as np

from bilevel.tasks.few_shot import FewShot


def hold_out(sample: FewShot, num_classes: int, seed: int = 0) -> tuple[FewShot, FewShot]:
    """Split a sampler's classes into those to train on and those held out.

    Which classes are held out follows from each class's number and `seed` alone: a data set with some
    classes more or fewer keeps the others where they were. With 100 of the 1200 training classes of
    Omniglot this is the 1100/100/423 split of the MAML code, though of other classes: there is no
    official one.

    Args:
        sample: the training classes.
        num_classes: how many are held out.
        seed: another one holds out others.

    Returns:
        `(rest, held)`, samplers of the same tasks. `held` has no rotations: a rotated class is a training
        trick, and a test task has none.

    Raises:
        ValueError: when either side has fewer classes than a task.

    >>> images, labels = np.zeros((60, 8, 8), np.uint8), np.arange(60) % 20
    >>> rest, held = hold_out(FewShot(images, labels, ways=5, shots=1, queries=1, rotations=True), 6)
    >>> rest.num_classes, held.num_classes
    (56, 6)
    """
    labels = np.asarray(sample.labels)
    classes = np.unique(labels)
    if not sample.ways <= num_classes <= len(classes) - sample.ways:
        raise ValueError(
            f"held-out classes must be at least the {sample.ways} ways of a task and leave as many of the "
            f"{len(classes)} classes, got {num_classes}"
        )
    chosen = sorted(classes, key=lambda c: hashlib.blake2b(f"{seed}/{c}".encode()).digest())[:num_classes]
    inside = np.isin(labels, chosen)
    images = np.asarray(sample.images)
    rest = replace(sample, images=images[~inside], labels=labels[~inside])
    return rest, replace(sample, images=images[inside], labels=labels[inside], rotations=False)
