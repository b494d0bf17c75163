"""Schedules of learning rate and momentum over a whole training (Maclaurin, Duvenaud, Adams, 2015)."""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import optax

import bilevel as bl
from bilevel.problem import Learner, Meta
from bilevel.recipes.digits import Digits, classifier, drawn, perceptron
from bilevel.recipes.estimators import Name, Settings
from bilevel.recipes.experiment import Experiment


def interpolated(knots: jax.Array, step: jax.Array, num_steps: int) -> jax.Array:
    """A line through knots that lie evenly from the first inner step to the last; constant beyond.

    Args:
        knots: [num_knots].
        step: k, counted from 0.
        num_steps: K.

    >>> print(interpolated(jnp.array([0.0, 1.0, 4.0]), jnp.arange(5), 5))
    [0.  0.5 1.  2.5 4. ]
    """
    at = jnp.linspace(0, max(num_steps - 1, 1), len(knots))
    return jnp.interp(jnp.asarray(step, knots.dtype), at, knots)


def scheduled_sgd(meta: Meta, num_steps: int) -> optax.GradientTransformation:
    """SGD with momentum, both by the learned schedules.

        v ← μₖ v + ∇φ inner,   φ ← φ − ηₖ v;   log ηₖ and logit μₖ are interpolated between knots

    Args:
        meta: {"log_rate": [num_knots], "logit_momentum": [num_knots]}.
        num_steps: K.

    >>> optimizer = scheduled_sgd({"log_rate": jnp.zeros(2), "logit_momentum": jnp.zeros(2)}, 10)
    >>> print(optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)))[0])
    [-1.]
    """

    def rate(step):
        return jnp.exp(interpolated(meta["log_rate"], step, num_steps))

    def momentum(step):
        return jax.nn.sigmoid(interpolated(meta["logit_momentum"], step, num_steps))

    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=momentum)


@dataclass(frozen=True)
class Schedules:
    """Learn the learning rate and the momentum at every step of the training of an MLP on MNIST."""

    num_meta_steps: int = 30
    """Outer steps; of pes and nres, which see a window of the inner loop a step, take many more."""
    seed: int = 0
    """All randomness of the run but the split follows from it."""
    num_steps: int = 2000
    """Inner steps, each on a minibatch of its own."""
    num_knots: int = 5
    """Places along the training between which each schedule is a line."""
    batch_size: int = 64
    """Pictures of an inner step."""
    hidden: tuple[int, ...] = (64,)
    """Widths of the hidden layers."""
    rate: float = 0.02
    """Where the learning rate starts, the same at all knots."""
    momentum: float = 0.5
    """Where the momentum starts."""
    estimator: Name = "mixed"
    """How the hypergradient is obtained; the implicit ones say nothing of a schedule and are refused."""
    settings: Settings = field(default_factory=lambda: Settings(checkpoint=45, truncation=100))
    outer_batch: int = 0
    """Validation pictures that the outer loss draws, 0 for all; pes and nres ask at every inner step."""
    learning_rate: float = 0.25
    """Of the outer Adam, at the start; it falls to a tenth along a cosine."""
    digits: Digits = field(default_factory=lambda: Digits(num_support=10_000))
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=2, checkpoint_every=10))

    def __post_init__(self):
        if min(self.num_knots, self.batch_size, self.num_steps) < 1:
            raise ValueError(
                "num_knots, batch_size and num_steps must be at least 1, got "
                f"{self.num_knots}, {self.batch_size} and {self.num_steps}"
            )
        if not (self.rate > 0 and 0 < self.momentum < 1):
            raise ValueError(
                f"expected rate > 0 and 0 < momentum < 1, got {self.rate} and {self.momentum}; "
                "θ are their logarithm and logit"
            )
        if self.estimator.startswith(("implicit", "one-step", "finite")):
            raise ValueError(
                f"estimator {self.estimator} differentiates a solution, which does not depend on the "
                "schedule that led to it: its hypergradient is zero; take mixed, forward, truncated or pes"
            )

    def build(self) -> Experiment:
        """Read the pictures and put the experiment together."""
        net = perceptron(self.digits.side, self.hidden)

        def inner_loss(params, meta, batch, key):  # the key is that of the step
            x, y = drawn(batch, self.batch_size, key)
            return bl.learners.cross_entropy(net.apply(params, x), y)[0]

        problem, predict = classifier(net, inner_loss, self.outer_batch)
        odds = self.momentum / (1 - self.momentum)

        def init_meta(key):
            return {
                "log_rate": jnp.full(self.num_knots, math.log(self.rate), float),
                "logit_momentum": jnp.full(self.num_knots, math.log(odds), float),
            }

        solver = bl.inner.Gradient(lambda meta: scheduled_sgd(meta, self.num_steps), self.num_steps)
        estimator = self.settings.estimator(self.estimator)
        return self.digits.experiment(
            Learner(problem, solver, estimator, init_meta, predict),
            _outer(self.learning_rate, self.num_meta_steps),
            eval_steps=self.num_steps,
            meta_figures=self._figures,
            meta_lines=self._lines,
        )

    def _figures(self, meta: Meta) -> dict[str, float]:
        lines = self._lines(meta)
        rate, momentum = lines["learning rate"], lines["momentum"]
        return {
            "learning rate, first": float(rate[0]),
            "learning rate, largest": float(rate.max()),
            "learning rate, last": float(rate[-1]),
            "momentum, first": float(momentum[0]),
            "momentum, last": float(momentum[-1]),
        }

    def _lines(self, meta: Meta) -> dict[str, jax.Array]:
        steps = jnp.arange(self.num_steps)
        return {
            "learning rate": jnp.exp(interpolated(meta["log_rate"], steps, self.num_steps)),
            "momentum": jax.nn.sigmoid(interpolated(meta["logit_momentum"], steps, self.num_steps)),
        }


def _outer(learning_rate: float, num_meta_steps: int) -> optax.GradientTransformation:
    """Adam that stops where it should: beyond the largest stable rate the inner loop is chaotic.

    There a hypergradient is as long as it likes and points nowhere: it is clipped, and little momentum
    carries θ on. The rates start too small, so that the edge is reached late, with small steps.
    """
    rate = optax.cosine_decay_schedule(learning_rate, num_meta_steps, alpha=0.1)
    return optax.chain(optax.clip_by_global_norm(0.1), optax.adam(rate, b1=0.5))
