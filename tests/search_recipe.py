"""Recipes whose training takes milliseconds and whose best point is known, for the tests of the search."""

import os
import signal
import time
from dataclasses import dataclass, field
from typing import Literal

import jax
import jax.numpy as jnp
import optax

import bilevel as bl
from bilevel.recipes.experiment import Experiment


@dataclass(frozen=True)
class Outer:
    """The outer optimizer."""

    rate: float = 0.3


@dataclass(frozen=True)
class Quadratic:
    """Learn where |θ - 1|² is least; how small it gets depends on the rates and on the kind."""

    num_meta_steps: int = 8
    seed: int = 0
    rate: float = 0.1
    """Of the inner loop."""
    num_steps: int = 2
    size: int = 3
    kind: Literal["plain", "shifted"] = "plain"
    widths: tuple[int, ...] = (1,)
    limit: int | None = None
    bias: bool = True
    outer: Outer = field(default_factory=Outer)
    pause: float = 0.0
    """Seconds that each outer step takes."""
    fail: str = "never"
    """never, build, nan, or die: how a trial with rate above 0.5 ends."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=2, checkpoint_every=2))

    def build(self) -> Experiment:
        if self.rate > 0.5 and self.fail == "build":
            raise OSError(f"no data at rate {self.rate}")
        if self.rate > 0.5 and self.fail == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        shift = 1.0 if self.kind == "shifted" else 0.0
        scale = jnp.nan if self.rate > 0.5 and self.fail == "nan" else 1.0

        def loss(params, meta, batch, key):
            return scale * jnp.sum((params - batch) ** 2) + shift

        problem = bl.Problem(lambda meta, key: meta["start"], loss, loss)
        solver = bl.inner.Gradient(optax.sgd(self.rate), self.num_steps)

        def sample(key):
            if self.pause:
                data = jax.random.key_data(key)
                data = jax.pure_callback(_slowly(self.pause), data, data, vmap_method="sequential")
                key = jax.random.wrap_key_data(data)
            noise = 0.0 * jax.random.normal(key, (self.size,))
            return bl.Task(support=1.0 + noise, query=1.0 + noise)

        return Experiment(
            learner=bl.Learner(
                problem, solver, bl.hypergrad.Unroll(), lambda key: {"start": jnp.zeros(self.size)}
            ),
            optimizer=optax.sgd(self.outer.rate),
            sample_tasks=bl.tasks.batch(sample, 1),
            sample_test=sample,
            sample_validation=sample,
            protocol="a quadratic",
            eval_steps=self.num_steps,
            eval_tasks=2,
        )


def _slowly(seconds):
    def call(data):
        time.sleep(seconds)
        return data

    return call
