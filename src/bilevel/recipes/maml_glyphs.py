"""MAML on glyphs: few-shot recognition of procedurally drawn characters, with nothing to download."""

from dataclasses import dataclass, field
from typing import Literal

import optax

import bilevel as bl
from bilevel.recipes.experiment import Experiment
from bilevel.recipes.maml import Maml, from_scratch


@dataclass(frozen=True)
class MamlGlyphs:
    """Learn to tell apart drawn characters never seen before from one example of each."""

    num_meta_steps: int = 2000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    ways: int = 5
    """Classes of a task."""
    shots: int = 1
    """Support examples of a class."""
    queries: int = 1
    """Query examples of a class in training."""
    num_tasks: int = 16
    """Tasks of an outer step."""
    filters: int = 32
    """Width of conv4."""
    learning_rate: float = 1e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    eval_queries: int = 1
    """Query examples of a class at evaluation; as many as in training, for batch norm sees them together."""
    eval_steps: int = 5
    """Inner steps at evaluation."""
    eval_tasks: int = 600
    """Test tasks."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 multiplies faster where the processor can, with two to three digits; see conv4."""
    maml: Maml = field(default_factory=Maml)
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=50, checkpoint_every=500))

    def build(self) -> Experiment:
        """Put the experiment together."""
        net = bl.nets.conv4(self.ways, self.filters, compute_dtype=self.compute_dtype)
        loss = bl.learners.cross_entropy
        schedule = optax.cosine_decay_schedule(self.learning_rate, self.num_meta_steps, alpha=0.01)

        def tasks(split: str, queries: int):
            return bl.tasks.Glyphs(self.ways, self.shots, queries, split)

        return Experiment(
            learner=self.maml.learner(net, loss),
            optimizer=optax.adam(schedule),
            sample_tasks=bl.tasks.batch(tasks("train", self.queries), self.num_tasks),
            sample_test=tasks("test", self.eval_queries),
            other_tests={"15 queries a class at once": tasks("test", 15)},
            protocol=(
                f"glyphs, {self.ways}-way {self.shots}-shot, {self.eval_queries} a class to tell, unseen "
                "classes, transductive batch norm"
            ),
            eval_steps=self.eval_steps,
            eval_tasks=self.eval_tasks,
            scratch=from_scratch(net, loss, optax.adam(1e-2), 20),
            chance={"accuracy": 1 / self.ways},
            pictures="classification",
        )
