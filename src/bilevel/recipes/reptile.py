"""Reptile on few-shot classification (Nichol, Achiam, Schulman, 2018)."""

from dataclasses import dataclass, field

import optax

import bilevel as bl
from bilevel.learners.reptile import reptile
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData


@dataclass(frozen=True)
class Reptile:
    """Learn an initialization by moving towards where plain training on a task ends."""

    num_meta_steps: int = 100_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    num_steps: int = 5
    """Inner steps in training; 10 for 20 ways."""
    train_shots: int = 10
    """Examples of a class in a training task: all that are given, for the query is not used."""
    batch_size: int = 10
    """Examples of an inner step; 20 for 20 ways."""
    rate: float = 1e-3
    """Of the inner Adam; 0.0005 for 20 ways."""
    learning_rate: float = 1.0
    """How far the initialization moves, at the start; it falls to 0 along a line."""
    eval_steps: int = 50
    """Inner steps at evaluation."""
    filters: int = 64
    """Width of conv4."""
    task: FewShotData = field(default_factory=lambda: FewShotData(num_tasks=5))
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, checkpoint_every=1000))

    def build(self) -> Experiment:
        """Read the data and put the experiment together."""
        net = bl.nets.conv4(self.task.ways, self.filters, image_shape=self.task.image_shape)
        loss = bl.learners.cross_entropy
        learner = reptile(net, loss, num_steps=self.num_steps, batch_size=self.batch_size, rate=self.rate)
        return self.task.experiment(
            learner,
            optax.sgd(optax.linear_schedule(self.learning_rate, 0.0, self.num_meta_steps)),
            eval_steps=self.eval_steps,
            scratch=bl.learners.from_scratch(net, loss, optax.adam(1e-2), 20),
            sample_tasks=bl.tasks.batch(
                self.task.sampler("train", ways=self.task.train_ways, shots=self.train_shots),
                self.task.num_tasks,
            ),
        )
