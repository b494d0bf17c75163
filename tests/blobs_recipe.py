"""A few-shot recipe on clouds of points, small enough to train and judge in seconds."""

from dataclasses import dataclass, field

import numpy as np
import optax

import bilevel as bl
from bilevel.recipes import Experiment
from bilevel.tasks.hold_out import hold_out


def blobs(classes, ways, shots, queries, spread=0.5):
    """12 examples a class of 4 numbers around a centre that the class number decides."""
    points = []
    for number in classes:
        rng = np.random.default_rng(number)
        points.append(rng.normal(size=4) + spread * rng.normal(size=(12, 4)))
    labels = np.repeat(np.asarray(classes), 12)
    return bl.tasks.FewShot(np.concatenate(points).astype(np.float32), labels, ways, shots, queries)


@dataclass(frozen=True)
class Blobs:
    """Tell clouds of points apart."""

    num_meta_steps: int = 8
    seed: int = 0
    shots: int = 1
    rate: float = 0.1
    leak: bool = False
    spread: float = 0.5
    learning_rate: float = 1e-2
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=2, checkpoint_every=4))

    def build(self) -> Experiment:
        net = bl.nets.mlp([4, 8, 3])
        train, validation = hold_out(blobs(range(30), 3, self.shots, 2, self.spread), 8)
        tested = range(30) if self.leak else range(100, 120)
        return Experiment(
            learner=bl.maml(net, bl.learners.cross_entropy, rates=self.rate),
            optimizer=optax.adam(self.learning_rate),
            sample_tasks=bl.tasks.batch(train, 2),
            sample_test=blobs(tested, 3, self.shots, 4, self.spread),
            sample_validation=validation,
            protocol="clouds of points",
            eval_steps=2,
            eval_tasks=20,
            chance={"accuracy": 1 / 3},
        )
