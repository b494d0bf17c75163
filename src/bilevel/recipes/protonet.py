"""Prototypical networks on few-shot classification (Snell, Swersky, Zemel, 2017)."""

from dataclasses import dataclass, field

import bilevel as bl
from bilevel.learners.protonet import protonet
from bilevel.recipes.embedding import Embedding, experiment, learner_ways
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData


@dataclass(frozen=True)
class ProtoNet:
    """Learn an embedding in which a class lies around the mean of its examples."""

    num_meta_steps: int = 12_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    task: FewShotData = field(
        default_factory=lambda: FewShotData(shots=1, queries=5, num_tasks=1, train_ways=60)
    )
    embedding: Embedding = field(default_factory=Embedding)
    scale: float = 1.0
    """Of the squared distances."""
    learning_rate: float = 2e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, checkpoint_every=1000))

    def build(self) -> Experiment:
        """Read the data and put the experiment together."""
        ways = learner_ways(self.task)
        learner = protonet(self.embedding.net(self.task), ways, scale=self.scale)
        return experiment(
            self.task,
            self.embedding,
            learner,
            self.learning_rate,
            self.num_meta_steps,
        )
