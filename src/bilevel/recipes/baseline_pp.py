"""Pretrained baselines on few-shot classification: Baseline++ (Chen et al., 2019) and nearest centroid."""

from dataclasses import dataclass, field
from typing import Literal

import bilevel as bl
from bilevel.learners.baseline_pp import baseline_pp
from bilevel.learners.nearest_centroid import nearest_centroid
from bilevel.learners.pretraining import cosine_head, pretraining
from bilevel.recipes.embedding import Embedding, experiment
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData
from bilevel.tasks.minibatch import Minibatch


@dataclass(frozen=True)
class BaselinePP:
    """Train an ordinary classifier over all training classes, then a new head or centroids for each task."""

    num_meta_steps: int = 12_000
    """Outer steps: minibatches."""
    seed: int = 0
    """All randomness of the run follows from it."""
    task: FewShotData = field(default_factory=FewShotData)
    """The tasks of the test; in training only the classes count."""
    embedding: Embedding = field(default_factory=Embedding)
    test: Literal["head", "centroid"] = "head"
    """What is made of the embedding in a test: a new cosine head (Baseline++), or the nearest centroid."""
    batch_size: int = 256
    """Examples of a minibatch."""
    scale: float = 10.0
    """Of the cosines."""
    num_steps: int = 100
    """Steps on the new head."""
    learning_rate: float = 2e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, checkpoint_every=1000))

    def build(self) -> Experiment:
        """Read the data and put the experiment together."""
        net, width = self.embedding.net(self.task), self.embedding.width(self.task)
        minibatch = Minibatch(self.task.sampler("train"), self.batch_size)
        trained = pretraining(net, cosine_head(width, minibatch.num_classes, scale=self.scale))
        if self.test == "head":
            learner = baseline_pp(
                net, self.task.ways, width, scale=self.scale, num_steps=self.num_steps, trained_by=trained
            )
        else:
            learner = nearest_centroid(net, self.task.ways, scale=self.scale, trained_by=trained)
        return experiment(
            self.task,
            self.embedding,
            learner,
            self.learning_rate,
            self.num_meta_steps,
            sample_tasks=bl.tasks.batch(minibatch, 1),
            eval_steps=self.num_steps,
            other_tests={},
        )
