"""How strongly to change training pictures, learned on others (Hataya et al., 2022)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.problem import Learner, Meta
from bilevel.recipes.digits import Digits, classifier, drawn
from bilevel.recipes.estimators import Name, Settings
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.layer_decay import network
from bilevel.tasks.augment import affine, compose, cutout, intensity, noise

STRENGTHS = ("shift", "rotation", "scale", "shear", "contrast", "noise", "erasing")


def change(log_strength: dict[str, jax.Array]) -> Callable:
    """The operation `(x, key) -> x` with these strengths, each a logarithm.

        a fixed draw times e^θ, for each of shift, rotation, scale, shear, contrast and noise;
        a square of side e^θ at a random place, for erasing

    >>> changed = jax.jit(change(dict.fromkeys(STRENGTHS, -3.0)))
    >>> changed(jnp.ones((2, 7, 7, 1)), jax.random.key(0)).shape
    (2, 7, 7, 1)
    """
    s = {name: jnp.exp(value) for name, value in log_strength.items()}
    moved = {name: s[name] for name in ("shift", "rotation", "scale", "shear")}
    return compose(
        partial(affine, **moved),
        partial(intensity, contrast=s["contrast"]),
        partial(noise, strength=s["noise"]),
        partial(cutout, size=s["erasing"]),
    )


@dataclass(frozen=True)
class AugmentationStrength:
    """Learn how far to shift, turn, stretch, blur with noise and cover 500 training pictures."""

    num_meta_steps: int = 100
    """Outer steps."""
    seed: int = 0
    """All randomness of the run but the split follows from it."""
    net: Literal["mlp", "conv4"] = "mlp"
    """An MLP, or the four blocks of convolutions with layer norm."""
    hidden: tuple[int, ...] = (64,)
    """Widths of the hidden layers of the MLP."""
    filters: int = 16
    """Width of conv4."""
    strength: float = 0.05
    """Where each strength starts: a standard deviation in sides of the picture, radians, logarithms of size
    and contrast, units of intensity; of erasing the side of a square, in sides of the picture."""
    num_steps: int = 300
    """Inner steps, each on a minibatch that is changed anew."""
    batch_size: int = 64
    """Pictures of an inner step."""
    rate: float = 0.1
    """Inner learning rate, with a momentum of 0.9."""
    estimator: Name = "mixed"
    """How the hypergradient is obtained; the implicit ones see one draw of changes of one minibatch."""
    settings: Settings = field(default_factory=Settings)
    learning_rate: float = 0.1
    """Of the outer Adam."""
    digits: Digits = field(default_factory=Digits)
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=5, checkpoint_every=50))

    def __post_init__(self):
        if not self.strength > 0:
            raise ValueError(f"strength must be positive, got {self.strength}; θ is its logarithm")

    def build(self) -> Experiment:
        """Read the pictures and put the experiment together."""
        net = network(self.net, self.digits.side, self.hidden, self.filters)

        def inner_loss(params, meta, batch, key):  # the key is that of the step
            draw_key, change_key = jax.random.split(key)
            x, y = drawn(batch, self.batch_size, draw_key)
            x = change(meta["log_strength"])(x, change_key)
            return bl.learners.cross_entropy(net.apply(params, x), y)[0]

        problem, predict = classifier(net, inner_loss)
        start = {name: jnp.log(jnp.asarray(self.strength, float)) for name in STRENGTHS}
        solver = bl.inner.Gradient(optax.sgd(self.rate, momentum=0.9), self.num_steps)
        estimator = self.settings.estimator(self.estimator)
        return self.digits.experiment(
            Learner(problem, solver, estimator, lambda key: {"log_strength": start}, predict),
            optax.adam(self.learning_rate),
            eval_steps=self.num_steps,
            meta_figures=_figures,
        )


def _figures(meta: Meta) -> dict[str, float]:
    return {f"strength of {name}": float(np.exp(value)) for name, value in meta["log_strength"].items()}
