"""The settings that all MAML recipes share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import optax

from bilevel import hypergrad
from bilevel.learners import Fixed, PerLayerPerStep, PerParameter, maml
from bilevel.learners.maml import AllBut
from bilevel.nets import Net
from bilevel.problem import Learner

_ESTIMATORS = {
    "mixed": hypergrad.Mixed,
    "unroll": hypergrad.Unroll,
    "first-order": hypergrad.FirstOrder,
}
_RATES = {"fixed": Fixed, "per-parameter": PerParameter, "per-layer-per-step": PerLayerPerStep}


def outer_optimizer(
    learning_rate: float, num_meta_steps: int, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """Adam along a cosine to a hundredth; the decay, against meta-overfitting, is of the initialization."""
    schedule = optax.cosine_decay_schedule(learning_rate, num_meta_steps, alpha=0.01)
    if not weight_decay:
        return optax.adam(schedule)
    mask = lambda meta: {name: name == "init" for name in meta}  # noqa: E731  rates are no weights
    return optax.adamw(schedule, weight_decay=weight_decay, mask=mask)


@dataclass(frozen=True)
class Maml:
    """How the inner loop adapts, and how it is differentiated."""

    num_steps: int = 1
    """Inner steps in training, K."""
    rate: float = 0.4
    """Inner learning rate, or where the learned ones start."""
    rates: Literal["fixed", "per-parameter", "per-layer-per-step"] = "fixed"
    """Which inner rates are learned: none, Meta-SGD's or MAML++'s."""
    adapt: Literal["all", "head", "body"] = "all"
    """What the inner loop adapts: everything, only the head (ANIL), or all but the head (BOIL)."""
    estimator: Literal["mixed", "unroll", "first-order", "multi-step"] = "mixed"
    """How the hypergradient is obtained: first-order is FOMAML, multi-step MAML++'s loss after every step."""
    annealing_steps: int = 1000
    """Outer steps over which the multi-step loss becomes that of the last step."""

    def learner(self, net: Net, loss: Callable) -> Learner:
        """The learner these settings say."""
        if self.estimator == "multi-step":
            estimator = hypergrad.MultiStep(self.annealing_steps)
        else:
            estimator = _ESTIMATORS[self.estimator]()
        return maml(
            net,
            loss,
            num_steps=self.num_steps,
            rates=_RATES[self.rates](self.rate),
            adapt=AllBut("head") if self.adapt == "body" else self.adapt,
            estimator=estimator,
        )
