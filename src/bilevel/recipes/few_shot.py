"""Where the classes of a few-shot recipe come from, and how its tasks are cut out of them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import optax

import bilevel as bl
from bilevel.problem import Key, Learner, Task
from bilevel.recipes.experiment import Experiment

_MANY = 15  # query examples of a class, where there are so many


@dataclass(frozen=True)
class FewShotData:
    """The tasks of a few-shot recipe: N ways, K shots, unseen classes in the test."""

    dataset: Literal["glyphs", "omniglot", "stored"] = "omniglot"
    """glyphs are drawn by a program and need no file; omniglot is read from --task.data or BILEVEL_DATA;
    stored is a folder --task.data that `bilevel convert` made."""
    ways: int = 5
    """Classes of a test task, and of a training task unless --task.train-ways says otherwise."""
    shots: int = 1
    """Support examples of a class."""
    queries: int = 1
    """Query examples of a class in training."""
    num_tasks: int = 16
    """Tasks of an outer step."""
    train_ways: int | None = None
    """Classes of a training task, for learners that can be tested on another number of them."""
    eval_queries: int = 15
    """Query examples of a class at evaluation."""
    eval_tasks: int = 1000
    """Test tasks."""
    data: Path | None = None
    """A stored set; or omniglot.npz, an official zip, or a folder with them, else BILEVEL_DATA and the cache
    are tried."""
    download: bool = False
    """Get Omniglot's official archives into the cache folder when no data is found."""
    validation_classes: int = 0
    """Training classes of Omniglot kept apart for --validation.every; the other sets have their own."""
    train_classes: int | None = None
    """Of Omniglot's training classes, only this many and unturned, as where data are few."""
    rotations: bool = False
    """Of a stored set: let every training class turned by 90, 180 and 270 degrees be one of its own."""
    keep: Literal["device", "host"] = "device"
    """Where the pictures of a stored set are in training; the host holds more than the device."""

    def __post_init__(self):
        if self.dataset == "stored" and self.data is None:
            raise ValueError(
                "--task.dataset stored needs --task.data FOLDER, which `bilevel convert FILES FOLDER` makes"
            )
        if self.keep == "host" and self.dataset != "stored":
            raise ValueError(f"--task.keep host is for --task.dataset stored, got {self.dataset}")
        if self.train_classes is not None and self.dataset != "omniglot":
            raise ValueError(f"--task.train-classes is for --task.dataset omniglot, got {self.dataset}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of a picture."""
        return bl.tasks.open_stored(self._folder()).image_shape if self.dataset == "stored" else (28, 28, 1)

    def _folder(self) -> Path:
        assert self.data is not None, "__post_init__ asks for it"
        return self.data

    def sampler(
        self, split: str, *, ways: int | None = None, shots: int | None = None, queries: int | None = None
    ) -> Callable[[Key], Task]:
        """One task of the classes of a split, "train", "validation" or "test"."""
        sizes = (ways or self.ways, shots or self.shots, queries or self.queries)
        if self.dataset == "glyphs":
            return bl.tasks.Glyphs(*sizes, split)
        if self.dataset == "stored":
            turned = self.rotations and split == "train"
            return bl.tasks.stored(split, *sizes, self._folder(), turned)
        return self._omniglot(split, *sizes)

    def _omniglot(self, split: str, ways: int, shots: int, queries: int) -> Callable[[Key], Task]:
        sizes = (ways, shots, queries)
        if split == "test":
            return bl.tasks.omniglot("test", *sizes, self.data, self.download)
        rest = bl.tasks.omniglot("train", *sizes, self.data, self.download)
        if self.validation_classes:
            rest, held = bl.tasks.hold_out(rest, self.validation_classes)
            if split == "validation":
                return held
        elif split == "validation":
            raise ValueError("Omniglot has no validation classes: keep some with --task.validation-classes")
        return rest if self.train_classes is None else bl.tasks.hold_out(rest, self.train_classes)[1]

    def training(self) -> Callable[[Key], Task]:
        """Batches of training tasks."""
        if self.keep == "host":
            sizes = (self.train_ways or self.ways, self.shots, self.queries)
            return bl.tasks.hosted("train", *sizes, self._folder(), self.rotations, self.num_tasks)
        return bl.tasks.batch(self.sampler("train", ways=self.train_ways), self.num_tasks)

    def experiment(
        self,
        learner: Learner,
        optimizer: optax.GradientTransformation,
        *,
        eval_steps: int = 0,
        statistics: str = "transductive batch norm",
        scratch: Learner | None = None,
        **more: Any,
    ) -> Experiment:
        """The experiment of a learner on these tasks.

        Args:
            eval_steps: inner steps at evaluation.
            statistics: for the protocol, in words: what the network normalizes with.
            scratch: the baseline without meta-learning.
            more: further fields of `Experiment`, in place of what is said here.
        """
        test: Any = self.sampler("test", queries=1)  # read once: the other tests are the same pictures
        fewest = int(test.counts.min()) - self.shots if isinstance(test, bl.tasks.FewShot) else _MANY
        many = min(_MANY, fewest)
        others = {
            f"{count} {'query' if count == 1 else 'queries'} a class at once": replace(test, queries=count)
            for count in {1, many} - {self.eval_queries}
            if statistics.startswith("transductive")
        }
        fields = {
            "sample_tasks": self.training(),
            "sample_test": replace(test, queries=self.eval_queries),
            "sample_validation": self.validation(),
            "other_tests": others,
            "protocol": (
                f"{self._classes()}, {self.ways}-way {self.shots}-shot, {self.eval_queries} a class to tell, "
                f"{statistics}"
            ),
            "eval_steps": eval_steps,
            "eval_tasks": self.eval_tasks,
            "scratch": scratch,
            "chance": {"accuracy": 1 / self.ways},
            "pictures": "classification",
        }
        return Experiment(learner, optimizer, **(fields | more))

    def validation(self) -> Callable[[Key], Task] | None:
        """Tasks of classes that are neither trained on nor tested, where there are some."""
        if self.dataset == "omniglot" and not self.validation_classes:
            return None
        if self.dataset == "stored" and "validation" not in bl.tasks.open_stored(self._folder()).counts():
            return None
        return self.sampler("validation", queries=self.eval_queries)

    def _classes(self) -> str:
        """For the protocol: what is told apart."""
        if self.dataset == "glyphs":
            return "1000 unseen classes of glyphs"
        if self.dataset == "omniglot":
            trained = f"{1200 - self.validation_classes} with rotations"
            if self.train_classes is not None:
                trained = f"{self.train_classes}"
            return f"Omniglot, 423 unseen classes ({trained} in training)"
        stored = bl.tasks.open_stored(self._folder())
        return f"{stored.source}, {stored.counts()['test'][0]} unseen classes"
