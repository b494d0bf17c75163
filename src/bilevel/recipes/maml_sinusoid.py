"""MAML on sinusoids: regression from ten points (Finn, Abbeel, Levine, 2017)."""

from dataclasses import dataclass, field
from functools import partial

import optax

import bilevel as bl
from bilevel.learners.maml import rate_figures
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.maml import Maml, clipped


@dataclass(frozen=True)
class MamlSinusoid:
    """Learn to fit y = a sin(x - b) from a few points: 70 000 outer steps, a minute or two on a laptop."""

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
    learning_rate: float = 1e-3
    """Of the outer Adam."""
    eval_steps: int = 10
    """Inner steps at evaluation."""
    eval_tasks: int = 1000
    """Test tasks."""
    # A network this small has nothing to save: plain reverse mode is the faster of the exact two.
    maml: Maml = field(default_factory=lambda: Maml(num_steps=1, rate=0.01, estimator="unroll"))
    loop: bl.Options = field(
        default_factory=lambda: bl.Options(chunk_size=1000, task_chunk=25, checkpoint_every=10_000)
    )

    def build(self) -> Experiment:
        """Put the experiment together."""
        net = bl.nets.mlp([1, *self.hidden, 1])
        loss = bl.learners.mean_squared_error
        sample = partial(bl.tasks.sinusoid, shots=self.shots, queries=self.queries)
        return Experiment(
            learner=self.maml.learner(net, loss),
            optimizer=clipped(optax.adam(self.learning_rate), self.maml.outer_clip),
            sample_tasks=bl.tasks.batch(sample, self.num_tasks),
            # Many query points measure the error over the whole interval, not at ten places.
            sample_test=partial(bl.tasks.sinusoid, shots=self.shots, queries=100),
            protocol=f"{self.shots} points of a new sinusoid, mean squared error at 100 others",
            eval_steps=self.eval_steps,
            eval_tasks=self.eval_tasks,
            scratch=bl.learners.from_scratch(net, loss, optax.adam(1e-2), 50),
            pictures="regression",
            meta_figures=rate_figures,
        )
