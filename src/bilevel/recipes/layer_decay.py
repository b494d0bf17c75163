"""A weight decay for each layer of a network with few training pictures (Lorraine, Vicol, Duvenaud, 2020)."""

from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevel as bl
from bilevel.problem import Learner, Meta, Params
from bilevel.recipes.digits import NUM_CLASSES, Digits, classifier, perceptron
from bilevel.recipes.estimators import Name, Settings
from bilevel.recipes.experiment import Experiment


def decay(params: Params, log_decay: dict[str, jax.Array]) -> jax.Array:
    """½ Σ over layers e^θₗ |wₗ|²; biases and the parameters of norms are left alone.

    >>> params = {"head": {"w": jnp.ones(4), "b": jnp.ones(2)}}
    >>> print(decay(params, {"head": jnp.log(0.5)}))
    1.0
    """
    parts = [jnp.exp(log_decay[name]) * jnp.sum(layer["w"] ** 2) for name, layer in params.items()]
    return 0.5 * jnp.sum(jnp.stack(parts))


@dataclass(frozen=True)
class LayerDecay:
    """Learn how strongly the weights of each layer decay, from 500 training pictures and 5000 others."""

    num_meta_steps: int = 100
    """Outer steps."""
    seed: int = 0
    """All randomness of the run but the split follows from it."""
    net: Literal["mlp", "conv4"] = "mlp"
    """An MLP, or the four blocks of convolutions with layer norm."""
    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers of the MLP."""
    filters: int = 16
    """Width of conv4."""
    decay: float = 1e-3
    """Where each decay starts."""
    num_steps: int = 200
    """Inner steps, each on all of the support."""
    rate: float = 0.1
    """Inner learning rate, with a momentum of 0.9."""
    estimator: Name = "mixed"
    """How the hypergradient is obtained."""
    settings: Settings = field(default_factory=Settings)
    learning_rate: float = 0.1
    """Of the outer Adam."""
    digits: Digits = field(default_factory=Digits)
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=5, checkpoint_every=50))

    def __post_init__(self):
        if not self.decay > 0:
            raise ValueError(f"decay must be positive, got {self.decay}; θ is its logarithm")

    def build(self) -> Experiment:
        """Read the pictures and put the experiment together."""
        net = network(self.net, self.digits.side, self.hidden, self.filters)

        def inner_loss(params, meta, batch, key):
            x, y = batch
            loss, _ = bl.learners.cross_entropy(net.apply(params, x), y)
            return loss + decay(params, meta["log_decay"])

        problem, predict = classifier(net, inner_loss)

        def init_meta(key):
            return {"log_decay": {name: jnp.log(jnp.asarray(self.decay, float)) for name in net.init(key)}}

        solver = bl.inner.Gradient(optax.sgd(self.rate, momentum=0.9), self.num_steps)
        estimator = self.settings.estimator(self.estimator)
        return self.digits.experiment(
            Learner(problem, solver, estimator, init_meta, predict),
            optax.adam(self.learning_rate),
            eval_steps=self.num_steps,
            meta_figures=_figures,
        )


def network(kind: str, side: int, hidden: tuple[int, ...], filters: int) -> bl.nets.Net:
    """An MLP or conv4 of pictures; conv4 with layer norm, so that no picture sees another.

    >>> network("mlp", 14, (8,), 4).init(jax.random.key(0))["head"]["w"].shape
    (8, 10)
    """
    if kind == "mlp":
        return perceptron(side, hidden)
    return bl.nets.conv4(NUM_CLASSES, filters, image_shape=(side, side, 1), norm="layer")


def _figures(meta: Meta) -> dict[str, float]:
    return {f"decay of {name}": float(np.exp(value)) for name, value in meta["log_decay"].items()}
