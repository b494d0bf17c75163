"""Matching networks on few-shot classification (Vinyals et al., 2016)."""

from dataclasses import dataclass, field

import bilevel as bl
from bilevel.learners.matching_net import matching_net
from bilevel.recipes.embedding import Embedding, experiment, learner_ways
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData


@dataclass(frozen=True)
class MatchingNet:
    """Learn an embedding in which the nearest support examples, by angle, tell the class."""

    num_meta_steps: int = 12_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    task: FewShotData = field(
        default_factory=lambda: FewShotData(shots=1, queries=5, num_tasks=1, train_ways=20)
    )
    embedding: Embedding = field(default_factory=Embedding)
    scale: float = 10.0
    """Of the cosines, at the start; it is learned."""
    learning_rate: float = 2e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, checkpoint_every=1000))

    def build(self) -> Experiment:
        """Read the data and put the experiment together."""
        net = self.embedding.net(self.task)
        learner = matching_net(net, learner_ways(self.task), scale=self.scale, learn_scale=True)
        return experiment(self.task, self.embedding, learner, self.learning_rate, self.num_meta_steps)
