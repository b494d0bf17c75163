"""Test, validation and training classes of an experiment, cut into the same kind of task."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bilevel.problem import Key, Task
from bilevel.recipes.experiment import Experiment
from bilevel.tasks import Fixed
from bilevel.tasks.few_beside_many import FewBesideMany

Sampler = Callable[[Key], Task]
_SIZES = ("ways", "shots", "queries")
_SAME = 4  # pictures of a class that are compared
_UNTOLD = "whether the classes are unseen is not checked: the samplers do not say their classes"


def with_shots(experiment: Experiment, shots: int) -> Sampler:
    """The test tasks with another number of support examples of a class.

    Raises:
        ValueError: when the recipe says of no way to change it, or the classes have too few examples.

    >>> from bilevel.recipes import MamlGlyphs
    >>> with_shots(MamlGlyphs().build(), 5).shots
    5
    """
    if experiment.test_shots is not None:
        return experiment.test_shots(shots)
    sample = experiment.sample_test
    if not _has(sample, "shots"):
        raise ValueError(
            f"the shots of {type(sample).__name__} cannot be changed: give the recipe's Experiment "
            "test_shots=, a function of the number of shots that returns a sampler"
        )
    return dataclasses.replace(sample, shots=shots)  # type: ignore[type-var]


def validation_classes(experiment: Experiment) -> Sampler:
    """Tasks of classes that are neither trained on nor tested on.

    Raises:
        ValueError: when the recipe has none.

    >>> from bilevel.recipes import MamlGlyphs
    >>> validation_classes(MamlGlyphs().build()).split
    'validation'
    """
    if experiment.sample_validation is not None:
        return experiment.sample_validation
    sample = experiment.sample_test
    if _has(sample, "split"):
        try:
            return dataclasses.replace(sample, split="validation")  # type: ignore[type-var]
        except ValueError:
            pass  # a sampler without such a split
    raise ValueError(
        "this recipe has no validation classes (Omniglot has none officially): give its Experiment "
        "sample_validation=, for instance by bilevel.tasks.hold_out, or train without --validation.every"
    )


def seen_classes(experiment: Experiment) -> Sampler | None:
    """Tasks of the training classes, of the size of the test tasks; None when that cannot be told.

    >>> from bilevel.recipes import MamlGlyphs
    >>> sample = seen_classes(MamlGlyphs().build())
    >>> sample.split, sample.ways
    ('train', 5)
    """
    if experiment.sample_seen is not None:
        return experiment.sample_seen
    train, test = getattr(experiment.sample_tasks, "sample", None), experiment.sample_test
    if train is None or not all(_has(train, name) and _has(test, name) for name in _SIZES):
        return None
    return dataclasses.replace(train, **{name: getattr(test, name) for name in _SIZES})


def has_tasks(experiment: Experiment) -> bool:
    """Whether a learned start is adapted to tasks; else one data set is trained on, time and again.

    >>> from bilevel.recipes import MamlGlyphs
    >>> has_tasks(MamlGlyphs().build())
    True
    """
    return not isinstance(experiment.sample_test, Fixed | FewBesideMany)


def unseen(experiment: Experiment) -> tuple[bool | None, str]:
    """Whether the test classes are unseen in training, as far as the samplers tell, and why in words.

    >>> from bilevel.recipes import MamlGlyphs
    >>> unseen(MamlGlyphs().build())
    (True, 'unseen classes: test tasks are of split test, training tasks of split train')
    """
    train, test = seen_classes(experiment), experiment.sample_test
    if not isinstance(test, Fixed) and not _classifies(test):
        return None, "fresh tasks of the training distribution: there are no classes to be unseen"
    if isinstance(test, Fixed):
        return _unseen_examples(experiment, test)
    if train is None:
        return None, _UNTOLD
    if _has(train, "split") and _has(test, "split"):
        splits = f"test tasks are of split {test.split}, training tasks of split {train.split}"  # type: ignore
        if test.split != train.split:  # type: ignore[attr-defined]
            return True, f"unseen classes: {splits}"
        return False, f"SEEN CLASSES: {splits}"
    there, here = _first_pictures(train), _first_pictures(test)
    if there is None or here is None:
        return None, _UNTOLD
    shared = len(here & there)
    if shared:
        return False, f"SEEN CLASSES: {shared} of the {len(here)} test classes are training classes too"
    return True, f"unseen classes: none of the {len(here)} test classes is one of the {len(there)} trained on"


def _unseen_examples(experiment: Experiment, test: Fixed) -> tuple[bool | None, str]:
    """With one data set, whether test examples are among those that either loop is given."""
    train = getattr(experiment.sample_tasks, "sample", None)
    if not isinstance(train, Fixed):
        return None, "whether the test examples are unseen is not checked: the samplers do not say"
    given = _rows(train.task.support) | _rows(train.task.query)
    asked = _rows(test.task.query)
    if len(asked) < 2:
        return None, "whether the test examples are unseen is not checked: they are one row, such as one text"
    shared = len(given & asked)
    if shared:
        return None, f"{shared} of the {len(asked)} test examples are equal to one that was trained on"
    return (
        True,
        f"unseen examples: none of the {len(asked)} of the test is one of the {len(given)} trained on",
    )


def _rows(batch: Any) -> set[bytes]:
    """The examples of a batch, by the bytes of its first leaf."""
    leaf = np.ascontiguousarray(jax.device_get(jax.tree.leaves(batch)[0]))
    return {row.tobytes() for row in leaf}


def _classifies(sample: Sampler) -> bool:
    """Whether the targets are whole numbers."""
    query = jax.eval_shape(sample, jax.random.key(0)).query
    return isinstance(query, tuple) and len(query) == 2 and np.issubdtype(query[1].dtype, np.integer)


def _has(sample: Any, name: str) -> bool:
    return dataclasses.is_dataclass(sample) and any(f.name == name for f in dataclasses.fields(sample))


def _first_pictures(sample: Any) -> set[bytes] | None:
    """The first pictures of each class of a sampler that keeps them sorted by class."""
    if not all(hasattr(sample, name) for name in ("images", "starts", "counts")):
        return None
    starts, counts = np.asarray(sample.starts), np.asarray(sample.counts)
    places = starts[:, None] + np.minimum(np.arange(_SAME), counts[:, None] - 1)
    pictures = np.asarray(jax.device_get(sample.images[places]))
    return {np.ascontiguousarray(row).tobytes() for row in pictures}
