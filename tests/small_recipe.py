"""Small recipes for the tests of the loop and the command line; also an example of a user's own."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import optax

import bilevel as bl
from bilevel.recipes import Experiment


@dataclass(frozen=True)
class Small:
    """A sinusoid learner that compiles and runs in seconds."""

    num_meta_steps: int = 60
    seed: int = 0
    width: int = 8
    spin: int = 0
    """Rounds of useless work in each outer step; 200 000 take some thousandths of a second."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=4, checkpoint_every=8))

    def build(self) -> Experiment:
        net = bl.nets.mlp([1, self.width, 1])

        def slow_tasks(key):
            if self.spin:  # slow enough to be killed in the middle
                # Work in place of a pause: a program that calls back to Python is compiled anew each time.
                x = jax.lax.fori_loop(0, self.spin, lambda i, x: jnp.sin(x) + 0.1, jnp.float32(0.0))
                key = jax.random.fold_in(key, jnp.int32(x > 5))  # it never is
            return bl.tasks.batch(bl.tasks.sinusoid, 4)(key)

        return Experiment(
            learner=bl.maml(net, bl.learners.mean_squared_error, rates=bl.learners.PerParameter(0.01)),
            optimizer=optax.adam(1e-2),
            sample_tasks=slow_tasks,
            sample_test=bl.tasks.sinusoid,
            protocol="10 points of a new sinusoid",
            eval_steps=2,
            eval_tasks=20,
            pictures="regression",
        )


@dataclass(frozen=True)
class Diverging(Small):
    """Its outer learning rate makes the loss overflow."""

    def build(self) -> Experiment:
        return replace(super().build(), optimizer=optax.sgd(1e30))


@dataclass(frozen=True)
class Unused(Small):
    """One leaf of its meta does nothing."""

    def build(self) -> Experiment:
        experiment = super().build()
        init_meta = experiment.learner.init_meta

        def with_idle(key):
            return {**init_meta(key), "idle": jnp.ones(3)}

        return replace(experiment, learner=replace(experiment.learner, init_meta=with_idle))


not_a_recipe = 3
