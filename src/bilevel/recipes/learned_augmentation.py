"""Initialization, inner rates and augmentation strengths, meta-learned at once."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import optax

import bilevel as bl
from bilevel.learners.maml import rate_figures
from bilevel.learners.supervised import supervised
from bilevel.nets import Net
from bilevel.problem import Learner
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData
from bilevel.tasks.augment import affine, compose, intensity, noise

STRENGTHS = ("shift", "rotation", "scale", "shear", "contrast", "noise")


def learned_augmentation(
    net: Net,
    loss: Callable,
    *,
    num_steps: int = 3,
    rate: float = 0.2,
    strength: float = 0.05,
    copies: int = 1,
    learned: bool = True,
) -> Learner:
    """MAML whose inner loop sees changed copies of the support, changed as much as the outer loop finds best.

        φₖ₊₁ = φₖ − αₖ ⊙ ∇φ loss(φₖ, support and T_{e^s}(support, zₖ));   θ = (φ₀, α, s)

    T shifts, turns, scales, shears, changes the contrast and adds noise; each is a fixed random draw zₖ times
    its strength, so the outer loss, taken on untouched queries, has a derivative with respect to s through
    the inner loop. First-order estimators have none.

    Args:
        net: of pictures `[n, height, width, channels]`.
        loss: as in `maml`.
        num_steps: K, inner steps; each draws its own changes.
        rate: where the learned inner rates start, one for each leaf and step.
        strength: where each strength starts: a standard deviation in sides of the picture, radians,
            logarithms of size and contrast, and units of intensity.
        copies: changed copies beside the support itself; 0 is plain MAML with learned rates.
        learned: whether the strengths are; else they stay at `strength`.

    Returns:
        A `Learner`; meta is `{"init", "rates"}` and "log_strength", a scalar for each of `STRENGTHS`.

    Raises:
        ValueError: for a strength that is not positive, or a negative number of copies.

    Cost: that of MAML with a support `1 + copies` times as large. Exact for the draws made.

    Reference: Finn, Abbeel, Levine, 2017; Antoniou, Edwards, Storkey, 2019; Hataya et al., Meta approach to
    data augmentation optimization, 2022.

    >>> learner = learned_augmentation(bl.nets.conv4(5, 4), bl.learners.cross_entropy)
    >>> meta = learner.init_meta(jax.random.key(0))
    >>> round(float(jnp.exp(meta["log_strength"]["shift"])), 3)
    0.05
    """
    if not strength > 0 or copies < 0:
        raise ValueError(
            "learned_augmentation needs a positive strength and at least 0 copies, got "
            f"strength={strength}, copies={copies}"
        )
    rates = bl.learners.PerLayerPerStep(rate)
    start = {name: jnp.log(jnp.asarray(strength, float)) for name in STRENGTHS}

    def init_meta(key):
        init = net.init(key)
        meta = {"init": init, "rates": rates.init(init, num_steps)}
        return {**meta, "log_strength": start} if learned and copies else meta

    problem, predict = supervised(
        net, loss, init=lambda meta, key: meta["init"], assemble=lambda params, meta, x: (params, x)
    )

    def inner_loss(params, meta, batch, key):
        x, y = batch
        change = _changes(meta.get("log_strength", start))
        xs = [x, *(change(x, k) for k in jax.random.split(key, copies))]
        return problem.inner_loss(params, meta, (jnp.concatenate(xs), jnp.tile(y, 1 + copies)), key)

    def metrics(params, meta, batch, key):
        strengths = {f"strength_{name}": jnp.exp(s) for name, s in meta.get("log_strength", {}).items()}
        assert problem.metrics is not None
        return {**problem.metrics(params, meta, batch, key), **strengths}

    changed = replace(problem, inner_loss=inner_loss if copies else problem.inner_loss, metrics=metrics)
    solver = bl.inner.Gradient(lambda meta: rates.optimizer(meta["rates"]), num_steps)
    return Learner(changed, solver, bl.hypergrad.Mixed(), init_meta, predict)


def _changes(log_strength: dict[str, jax.Array]) -> Callable:
    s = {name: jnp.exp(value) for name, value in log_strength.items()}
    moved = {name: s[name] for name in ("shift", "rotation", "scale", "shear")}
    return compose(
        partial(affine, **moved),
        partial(intensity, contrast=s["contrast"]),
        partial(noise, strength=s["noise"]),
    )


@dataclass(frozen=True)
class LearnedAugmentation:
    """Meta-learn where to start, how fast to adapt, and how much to augment the support while adapting."""

    num_meta_steps: int = 5_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    num_steps: int = 3
    """Inner steps in training."""
    rate: float = 0.2
    """Where the learned inner rates start."""
    augmentation: Literal["learned", "fixed", "none"] = "learned"
    """Whether strengths are learned, stay where they start, or nothing is augmented: to compare."""
    strength: float = 0.05
    """Where each strength starts."""
    copies: int = 1
    """Changed copies of the support beside it."""
    learning_rate: float = 1e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    strength_learning_rate: float = 1e-2
    """The same of the logarithms of the strengths, which have further to go."""
    filters: int = 32
    """Width of conv4."""
    task: FewShotData = field(default_factory=lambda: FewShotData(dataset="glyphs", eval_queries=1))
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=50, checkpoint_every=500))

    def build(self) -> Experiment:
        """Put the experiment together."""
        net = bl.nets.conv4(self.task.ways, self.filters, image_shape=self.task.image_shape)
        loss = bl.learners.cross_entropy
        learner = learned_augmentation(
            net,
            loss,
            num_steps=self.num_steps,
            rate=self.rate,
            strength=self.strength,
            copies=0 if self.augmentation == "none" else self.copies,
            learned=self.augmentation == "learned",
        )

        def adam(rate):
            return optax.adam(optax.cosine_decay_schedule(rate, self.num_meta_steps, alpha=0.01))

        def labels(meta):
            return {name: "strength" if name == "log_strength" else "rest" for name in meta}

        return self.task.experiment(
            learner,
            optax.multi_transform(
                {"rest": adam(self.learning_rate), "strength": adam(self.strength_learning_rate)}, labels
            ),
            eval_steps=self.num_steps,
            scratch=bl.learners.from_scratch(net, loss, optax.adam(1e-2), 20),
            meta_figures=rate_figures,
        )
