"""WarpGrad on few-shot classification (Flennerhag et al., 2020)."""

from dataclasses import dataclass, field

import optax

import bilevel as bl
from bilevel.learners.warp_grad import linear_warps, warp_grad
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData


@dataclass(frozen=True)
class WarpGrad:
    """Learn warps between the layers that make the gradients of a task point well, and an initialization."""

    num_meta_steps: int = 20_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    num_steps: int = 5
    """Inner steps in training."""
    rate: float = 0.1
    """Inner learning rate."""
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
        learner = warp_grad(linear_warps(net), loss, num_steps=self.num_steps, rate=self.rate)
        return self.task.experiment(
            learner,
            optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.num_meta_steps, alpha=0.01)),
            eval_steps=self.eval_steps,
            scratch=bl.learners.from_scratch(net, loss, optax.adam(1e-2), 20),
        )
