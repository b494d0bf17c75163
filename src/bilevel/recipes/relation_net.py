"""Relation networks on few-shot classification (Sung et al., 2018)."""

from dataclasses import dataclass, field

import bilevel as bl
from bilevel.learners.relation_net import relation_net
from bilevel.recipes.embedding import Embedding, experiment, learner_ways
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData


@dataclass(frozen=True)
class RelationNet:
    """Learn an embedding, and a network that says how alike a query and a class are."""

    num_meta_steps: int = 12_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    task: FewShotData = field(
        default_factory=lambda: FewShotData(shots=1, queries=5, num_tasks=1, train_ways=20)
    )
    embedding: Embedding = field(default_factory=Embedding)
    hidden: int = 64
    """Width of the relation network."""
    learning_rate: float = 1e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, checkpoint_every=1000))

    def build(self) -> Experiment:
        """Read the data and put the experiment together."""
        net = self.embedding.net(self.task)
        relation = bl.nets.mlp([2 * self.embedding.width(self.task), self.hidden, 1])
        learner = relation_net(net, relation, learner_ways(self.task))
        return experiment(self.task, self.embedding, learner, self.learning_rate, self.num_meta_steps)
