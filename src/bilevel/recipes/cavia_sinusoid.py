"""CAVIA on sinusoids: five context parameters tell which wave it is (Zintgraf et al., 2019)."""

from dataclasses import dataclass, field

import optax

import bilevel as bl
from bilevel.learners.cavia import InputContext, cavia
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.sinusoid import sinusoid_experiment


@dataclass(frozen=True)
class CaviaSinusoid:
    """Learn to fit y = a sin(x - b) from a few points by moving five context parameters only."""

    num_meta_steps: int = 70_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    shots: int = 10
    """Support points of a task."""
    queries: int = 10
    """Query points of a task in training."""
    num_tasks: int = 25
    """Tasks of an outer step."""
    hidden: tuple[int, ...] = (40, 40)
    """Widths of the hidden layers."""
    context_size: int = 5
    """Context parameters, beside the input."""
    num_steps: int = 1
    """Inner steps in training, K."""
    rate: float = 1.0
    """Inner learning rate."""
    learning_rate: float = 1e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    eval_steps: int = 10
    """Inner steps at evaluation."""
    eval_tasks: int = 1000
    """Test tasks."""
    loop: bl.Options = field(
        default_factory=lambda: bl.Options(chunk_size=1000, task_chunk=25, checkpoint_every=10_000)
    )

    def build(self) -> Experiment:
        """Put the experiment together."""
        learner = cavia(
            bl.nets.mlp([1 + self.context_size, *self.hidden, 1]),
            bl.learners.mean_squared_error,
            context=InputContext(self.context_size),
            num_steps=self.num_steps,
            rate=self.rate,
            estimator=bl.hypergrad.Unroll(),  # a network this small has nothing to save
        )
        return sinusoid_experiment(
            learner,
            optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.num_meta_steps, alpha=0.01)),
            shots=self.shots,
            queries=self.queries,
            num_tasks=self.num_tasks,
            eval_steps=self.eval_steps,
            eval_tasks=self.eval_tasks,
            hidden=self.hidden,
        )
