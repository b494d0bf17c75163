"""MAML on Omniglot: few-shot recognition of real handwritten characters (Finn, Abbeel, Levine, 2017)."""

from dataclasses import dataclass, field
from typing import Literal

import optax

import bilevel as bl
from bilevel.learners.maml import rate_figures
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData
from bilevel.recipes.maml import Maml, outer_optimizer


@dataclass(frozen=True)
class MamlOmniglot:
    """Learn to tell apart handwritten characters never seen before from one example of each."""

    num_meta_steps: int = 20_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    task: FewShotData = field(default_factory=lambda: FewShotData("omniglot", eval_queries=1))
    """The tasks; as many queries at evaluation as in training, for batch norm sees them together."""
    filters: int = 64
    """Width of conv4."""
    learning_rate: float = 1e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    weight_decay: float = 0.0
    """Of the initialization, in the outer loop."""
    dropout: float = 0.0
    """Share of the features that the outer loss of training drops before the head."""
    eval_steps: int = 5
    """Inner steps at evaluation."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 multiplies faster where the processor can, with two to three digits; see conv4."""
    maml: Maml = field(default_factory=Maml)
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, checkpoint_every=1000))

    def build(self) -> Experiment:
        """Read the data and put the experiment together."""
        net = bl.nets.conv4(
            self.task.ways,
            self.filters,
            image_shape=self.task.image_shape,
            compute_dtype=self.compute_dtype,
            dropout=self.dropout,
        )
        loss = bl.learners.cross_entropy
        return self.task.experiment(
            self.maml.learner(net, loss),
            outer_optimizer(self.learning_rate, self.num_meta_steps, self.weight_decay, self.maml.outer_clip),
            eval_steps=self.eval_steps,
            scratch=bl.learners.from_scratch(net, loss, optax.adam(1e-2), 20),
            meta_figures=rate_figures,
        )
