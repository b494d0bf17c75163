"""CAVIA on few-shot classification (Zintgraf et al., 2019)."""

from dataclasses import dataclass, field

import optax

import bilevel as bl
from bilevel.learners.cavia import FilmContext, cavia
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData


@dataclass(frozen=True)
class Cavia:
    """Learn a network that a hundred context parameters adapt, by scaling and shifting one of its layers."""

    num_meta_steps: int = 20_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    context_size: int = 100
    """Context parameters."""
    layer: str = "block_2"
    """The block that they modulate; the third is the published choice."""
    num_steps: int = 2
    """Inner steps in training."""
    rate: float = 1.0
    """Inner learning rate."""
    learning_rate: float = 1e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    eval_steps: int = 2
    """Inner steps at evaluation."""
    filters: int = 64
    """Width of conv4."""
    task: FewShotData = field(default_factory=FewShotData)
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, checkpoint_every=1000))

    def build(self) -> Experiment:
        """Read the data and put the experiment together."""
        net = bl.nets.conv4(self.task.ways, self.filters, image_shape=self.task.image_shape)
        loss = bl.learners.cross_entropy
        learner = cavia(
            net,
            loss,
            context=FilmContext(self.context_size, self.layer),
            num_steps=self.num_steps,
            rate=self.rate,
        )
        return self.task.experiment(
            learner,
            optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.num_meta_steps, alpha=0.01)),
            eval_steps=self.eval_steps,
            scratch=bl.learners.from_scratch(net, loss, optax.adam(1e-2), 20),
        )
