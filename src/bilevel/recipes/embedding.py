"""What the recipes that compare embeddings share: the network, its training, and the usual four tests."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import bilevel as bl
from bilevel.nets import Net
from bilevel.problem import Learner
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.few_shot import FewShotData

_TESTS = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways, shots


@dataclass(frozen=True)
class Embedding:
    """The network that embeds."""

    filters: int = 64
    """Width of conv4; features are four times as many with pictures of 28 x 28."""
    downsample: Literal["stride", "pool"] = "stride"
    """pool is that of the papers; stride takes a quarter of its time."""
    block: int | None = None
    """Pictures that go through the network at a time; 0 is all. Left out: 20 on a CPU, where more do not stay
    in the cache, and all on an accelerator."""
    norm: Literal["layer", "group", "batch", "none"] = "layer"
    """layer and group see each picture by itself; batch sees as many as there are at once: transductive."""

    def net(self, task: FewShotData) -> Net:
        """The network for the pictures of these tasks."""
        net = bl.nets.conv4(
            None,
            self.filters,
            image_shape=task.image_shape,
            downsample=self.downsample,
            norm=self.norm,
        )
        block = self.block
        if block is None:
            block = 20 if jax.default_backend() == "cpu" and not net.whole else 0
        return bl.nets.in_blocks(net, block) if block else net

    def width(self, task: FewShotData) -> int:
        """Features of a picture."""
        net, shape = self.net(task), (1, *task.image_shape)
        features = jax.eval_shape(lambda key: net.apply(net.init(key), jnp.zeros(shape)), jax.random.key(0))
        return features.shape[-1]

    @property
    def statistics(self) -> str:
        """What it normalizes with, for the protocol."""
        return "transductive batch norm" if self.norm == "batch" else f"{self.norm} norm, not transductive"


def learner_ways(task: FewShotData) -> int:
    """The most classes that a task of the run has; tasks of fewer leave the others without support."""
    return max(task.train_ways or 0, task.ways, *(ways for ways, _ in _TESTS))


def experiment(
    task: FewShotData,
    embedding: Embedding,
    learner: Learner,
    learning_rate: float,
    num_meta_steps: int,
    **more: Any,
) -> Experiment:
    """The experiment of a learner that compares embeddings, tested in 5 and 20 ways with 1 and 5 shots.

    Args:
        learner: one for `learner_ways(task)` classes.
        learning_rate: of the outer Adam, at the start; it falls to a hundredth along a cosine.
        more: further fields of `Experiment`.
    """
    test: Any = task.sampler("test", queries=task.eval_queries)
    others = {
        f"{ways}-way {shots}-shot": replace(test, ways=ways, shots=shots)
        for ways, shots in _TESTS
        if (ways, shots) != (task.ways, task.shots)
    }
    return task.experiment(
        learner,
        optax.adam(optax.cosine_decay_schedule(learning_rate, num_meta_steps, alpha=0.01)),
        **({"statistics": embedding.statistics, "other_tests": others} | more),
    )
