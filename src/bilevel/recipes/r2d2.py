"""R2-D2 on few-shot classification (Bertinetto et al., 2019)."""

from dataclasses import dataclass, field

import bilevel as bl
from bilevel.learners.r2d2 import r2d2
from bilevel.recipes.embedding import Embedding, experiment, learner_ways
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData


@dataclass(frozen=True)
class R2D2:
    """Learn an embedding on which ridge regression tells the classes apart."""

    num_meta_steps: int = 12_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    task: FewShotData = field(
        default_factory=lambda: FewShotData(shots=1, queries=5, num_tasks=1, train_ways=60)
    )
    embedding: Embedding = field(default_factory=Embedding)
    penalty: float = 1.0
    """Of the regression, at the start; it is learned."""
    scale: float = 5.0
    """Of the logits, at the start; it is learned."""
    learning_rate: float = 2e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, checkpoint_every=1000))

    def build(self) -> Experiment:
        """Read the data and put the experiment together."""
        net = self.embedding.net(self.task)
        learner = r2d2(net, learner_ways(self.task), penalty=self.penalty, scale=self.scale)
        return experiment(self.task, self.embedding, learner, self.learning_rate, self.num_meta_steps)
