"""Reptile on sinusoids: plain training on one wave after another (Nichol, Achiam, Schulman, 2018)."""

from dataclasses import dataclass, field

import optax

import bilevel as bl
from bilevel.learners.reptile import reptile
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.sinusoid import sinusoid_experiment


@dataclass(frozen=True)
class ReptileSinusoid:
    """Learn to fit y = a sin(x - b) from a few points, by moving towards where training on waves ends."""

    num_meta_steps: int = 30_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    shots: int = 10
    """Support points of a test task."""
    train_shots: int = 10
    """Support points of a training task."""
    num_tasks: int = 5
    """Tasks of an outer step."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""
    num_steps: int = 32
    """Inner steps in training."""
    batch_size: int = 5
    """Points of an inner step."""
    rate: float = 0.005
    """Of the inner Adam."""
    learning_rate: float = 1.0
    """How far the initialization moves, at the start; it falls to 0 along a line."""
    eval_steps: int = 32
    """Inner steps at evaluation."""
    eval_tasks: int = 1000
    """Test tasks."""
    loop: bl.Options = field(
        default_factory=lambda: bl.Options(chunk_size=1000, task_chunk=5, checkpoint_every=10_000)
    )

    def build(self) -> Experiment:
        """Put the experiment together."""
        learner = reptile(
            bl.nets.mlp([1, *self.hidden, 1]),
            bl.learners.mean_squared_error,
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            rate=self.rate,
        )
        return sinusoid_experiment(
            learner,
            optax.sgd(optax.linear_schedule(self.learning_rate, 0.0, self.num_meta_steps)),
            shots=self.shots,
            train_shots=self.train_shots,
            queries=10,
            num_tasks=self.num_tasks,
            eval_steps=self.eval_steps,
            eval_tasks=self.eval_tasks,
            hidden=self.hidden,
        )
