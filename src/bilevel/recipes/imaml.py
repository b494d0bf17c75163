"""iMAML on few-shot classification (Rajeswaran et al., 2019)."""

from dataclasses import dataclass, field
from typing import Literal

import optax

import bilevel as bl
from bilevel.learners.imaml import imaml
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData


@dataclass(frozen=True)
class Imaml:
    """Learn an initialization by implicit gradients of an inner problem that is tied to it."""

    num_meta_steps: int = 20_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    num_steps: int = 16
    """Inner steps."""
    rate: float = 0.1
    """Inner learning rate."""
    strength: float = 2.0
    """λ, how strongly the solution is tied to the initialization."""
    linear_solver: Literal["gmres", "cg"] = "gmres"
    """Of the implicit system; cg, as published, breaks down where the inner loss is not convex."""
    linear_steps: int = 5
    """Its Hessian-vector products."""
    learning_rate: float = 1e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    eval_steps: int = 16
    """Inner steps at evaluation."""
    filters: int = 64
    """Width of conv4."""
    task: FewShotData = field(default_factory=FewShotData)
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, checkpoint_every=1000))

    def build(self) -> Experiment:
        """Read the data and put the experiment together."""
        net = bl.nets.conv4(self.task.ways, self.filters, image_shape=self.task.image_shape)
        loss = bl.learners.cross_entropy
        solve = bl.hypergrad.gmres if self.linear_solver == "gmres" else bl.hypergrad.cg
        learner = imaml(
            net,
            loss,
            num_steps=self.num_steps,
            rate=self.rate,
            strength=self.strength,
            estimator=bl.hypergrad.Implicit(solve(self.linear_steps)),
        )
        return self.task.experiment(
            learner,
            optax.adam(optax.cosine_decay_schedule(self.learning_rate, self.num_meta_steps, alpha=0.01)),
            eval_steps=self.eval_steps,
            scratch=bl.learners.from_scratch(net, loss, optax.adam(1e-2), 20),
        )
