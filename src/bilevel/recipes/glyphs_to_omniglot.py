"""From drawn to real characters: a prototypical network that learns on glyphs and is tested on Omniglot."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import optax

import bilevel as bl
from bilevel.learners.protonet import protonet
from bilevel.recipes.experiment import Experiment
from bilevel.tasks import FewShot


@dataclass(frozen=True)
class GlyphsToOmniglot:
    """Learn on characters that a program draws; tell apart those that people wrote, unseen before."""

    num_meta_steps: int = 12_000
    """Outer steps."""
    seed: int = 0
    """All randomness of the run follows from it."""
    style: Literal["strokes", "handwriting"] = "handwriting"
    """Who draws the training characters; see bilevel.tasks.Glyphs."""
    ways: int = 5
    """Classes of a test task."""
    shots: int = 1
    """Support examples of a class."""
    train_ways: int = 20
    """Classes of a training task; more make the embedding finer."""
    queries: int = 2
    """Query examples of a class in training."""
    num_tasks: int = 1
    """Tasks of an outer step."""
    filters: int = 64
    """Width of each block of conv4; a picture has four times as many features."""
    learning_rate: float = 2e-3
    """Of the outer Adam, at the start; it falls to a hundredth along a cosine."""
    eval_queries: int = 15
    """Query examples of a class at evaluation."""
    eval_tasks: int = 1000
    """Test tasks."""
    data: Path | None = None
    """Omniglot: omniglot.npz, an official zip, or a folder with them; else BILEVEL_DATA and the cache."""
    download: bool = False
    """Get Omniglot's official archives into the cache folder when no data is found."""
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=100, checkpoint_every=1000))

    def build(self) -> Experiment:
        """Put the experiment together; Omniglot is read first, so that a run without a test never starts."""
        test, everyone = self._omniglot()
        net = bl.nets.conv4(None, self.filters, norm="layer")
        schedule = optax.cosine_decay_schedule(self.learning_rate, self.num_meta_steps, alpha=0.01)

        def glyphs(split: str, ways: int, queries: int):
            return bl.tasks.Glyphs(ways, self.shots, queries, split, style=self.style)

        return Experiment(
            # Tasks of fewer classes than it answers for are fine: a class without support is never answered.
            learner=protonet(net, max(self.ways, self.train_ways)),
            optimizer=optax.adam(schedule),
            sample_tasks=bl.tasks.batch(glyphs("train", self.train_ways, self.queries), self.num_tasks),
            sample_test=test,
            other_tests={
                "all 1623 characters of Omniglot": everyone,
                f"1000 unseen glyphs, {self.style}": glyphs("test", self.ways, self.eval_queries),
            },
            protocol=(
                f"trained on glyphs alone; Omniglot, 423 test classes, {self.ways}-way {self.shots}-shot, "
                f"{self.eval_queries} a class to tell, layer norm (not transductive)"
            ),
            eval_steps=0,
            eval_tasks=self.eval_tasks,
            chance={"accuracy": 1 / self.ways},
            pictures="classification",
        )

    def _omniglot(self) -> tuple[FewShot, FewShot]:
        """Tasks of the 423 test classes, and of all 1623: none of them was seen in training."""
        parts = [
            bl.tasks.omniglot(split, self.ways, self.shots, self.eval_queries, self.data, self.download)
            for split in ("test", "train")
        ]
        images = np.concatenate([np.asarray(part.images) for part in parts])
        labels = np.concatenate([np.asarray(part.labels) for part in parts])
        return parts[0], FewShot(images, labels, self.ways, self.shots, self.eval_queries)
