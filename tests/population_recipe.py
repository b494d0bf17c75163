"""A recipe for the tests of populations: one number that gradient descent brings to 3, in milliseconds."""

import time
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
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
    broken: str = "no"
    """later: it can be built, but not trained."""
    pause: float = 0.0
    """Seconds that an outer step takes."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=5, checkpoint_every=5))

    def build(self) -> Experiment:
        def loss(params, meta, batch, key):
            if self.broken == "later":  # `init_state`, which is all that is looked at before, needs no loss
                raise ValueError("it breaks")
            return jnp.sum((params - batch) ** 2) / 2

        def three():
            time.sleep(self.pause)
            return np.float32(3.0)

        def slowly(key):
            target = jax.pure_callback(three, jax.ShapeDtypeStruct((), jnp.float32), vmap_method="sequential")
            return bl.Task(support=target, query=target)

        quick = Fixed(bl.Task(support=jnp.float32(3.0), query=jnp.float32(3.0)))
        sample = slowly if self.pause else quick
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
