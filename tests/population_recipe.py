"""A recipe for the tests of populations: one number that gradient descent brings to 3, in milliseconds."""

from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import bilevel as bl
from bilevel.recipes import Experiment
from bilevel.tasks.fixed import Fixed

NAME = f"{Path(__file__).resolve()}:Number"


@dataclass(frozen=True)
class Number:
    """Outer descent at a rate to be found; above 1 it diverges."""

    num_meta_steps: int = 40
    seed: int = 0
    rate: float = 0.01
    size: int = 1
    nothing: str = "a"
    broken: bool = False
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=5, checkpoint_every=5))

    def build(self) -> Experiment:
        if self.broken:
            raise ValueError("it is broken")

        def loss(params, meta, batch, key):
            return jnp.sum((params - batch) ** 2) / 2

        sample = Fixed(bl.Task(support=jnp.float32(3.0), query=jnp.float32(3.0)))
        problem = bl.Problem(lambda meta, key: meta, loss, loss)
        learner = bl.Learner(
            problem,
            bl.inner.Gradient(optax.sgd(0.0), 1),
            bl.hypergrad.Unroll(),
            lambda key: jax.random.normal(key, (self.size,)),
        )
        return Experiment(
            learner=learner,
            optimizer=optax.sgd(self.rate, momentum=0.5),
            sample_tasks=bl.tasks.batch(sample, 1),
            sample_test=sample,
            sample_validation=sample,
            protocol="one number",
            eval_steps=1,
            eval_tasks=2,
        )
