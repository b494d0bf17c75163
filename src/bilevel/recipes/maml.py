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
    learning_rate: float, num_meta_steps: int, weight_decay: float = 0.0, clip: float | None = None
) -> optax.GradientTransformation:
    """Adam along a cosine to a hundredth; the decay, against meta-overfitting, is of the initialization.

    Args:
        clip: the largest norm of the hypergradient; a longer one is scaled to it.
    """
    schedule = optax.cosine_decay_schedule(learning_rate, num_meta_steps, alpha=0.01)
    mask = lambda meta: {name: name == "init" for name in meta}  # noqa: E731  rates are no weights
    adam = (
        optax.adamw(schedule, weight_decay=weight_decay, mask=mask) if weight_decay else optax.adam(schedule)
    )
    return clipped(adam, clip)


def clipped(optimizer: optax.GradientTransformation, clip: float | None) -> optax.GradientTransformation:
    """The optimizer after clipping by the global norm; itself for None.

    Raises:
        ValueError: when `clip` is not above 0.
    """
    if clip is None:
        return optimizer
    if not clip > 0:
        raise ValueError(f"--maml.outer-clip must be above 0, got {clip}; leave it out for no clipping")
    return optax.chain(optax.clip_by_global_norm(clip), optimizer)


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
    inner_clip: float | None = None
    """Largest norm of an inner gradient, in training and after; for learned rates over several steps."""
    outer_clip: float | None = None
    """Largest norm of the hypergradient; for Meta-SGD on real pictures, whose rates can jump."""
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
            clip=self.inner_clip,
            estimator=estimator,
        )
