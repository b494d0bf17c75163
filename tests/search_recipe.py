"""Recipes whose training takes milliseconds and whose best point is known, for the tests of the search."""

import os
import signal
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
    spin: int = 0
    """Rounds of useless work in each outer step; a million takes some hundredths of a second."""
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
            noise = jax.random.normal(key, (self.size,))
            # Work in place of a pause: a program that calls back to Python is compiled anew each time.
            noise = jax.lax.fori_loop(0, self.spin, lambda i, x: jnp.sin(x) + 0.1, noise)
            return bl.Task(support=1.0 + 0.0 * noise, query=1.0 + 0.0 * noise)

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
