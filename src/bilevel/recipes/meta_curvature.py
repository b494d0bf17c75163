"""Meta-Curvature on few-shot classification (Park, Oliva, 2019)."""

from dataclasses import dataclass, field

import optax

import bilevel as bl
from bilevel.learners.meta_curvature import conv_modes, meta_curvature
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData


@dataclass(frozen=True)
class MetaCurvature:
    """Learn an initialization, and matrices that transform the inner gradients."""

    num_meta_steps: int = 20_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    num_steps: int = 1
    """Inner steps in training."""
    rate: float = 0.4
    """Inner learning rate, before the matrices."""
    learning_rate: float = 1e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    eval_steps: int = 5
    """Inner steps at evaluation."""
    filters: int = 64
    """Width of conv4."""
    task: FewShotData = field(default_factory=FewShotData)
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, checkpoint_every=1000))

    def build(self) -> Experiment:
        """Read the data and put the experiment together."""
        net = bl.nets.conv4(self.task.ways, self.filters, image_shape=self.task.image_shape)
        loss = bl.learners.cross_entropy
        learner = meta_curvature(net, loss, num_steps=self.num_steps, rate=self.rate, modes=conv_modes)
        return self.task.experiment(
            learner,
            optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.num_meta_steps, alpha=0.01)),
            eval_steps=self.eval_steps,
            scratch=bl.learners.from_scratch(net, loss, optax.adam(1e-2), 20),
        )
