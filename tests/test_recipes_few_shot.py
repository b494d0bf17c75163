"""Which classes a few-shot recipe trains on, stops by and is tested on."""

import jax
import numpy as np
import pytest

import bilevel as bl
from bilevel.recipes.few_shot import FewShotData
from bilevel.recipes.maml_omniglot import MamlOmniglot

CLASSES = {"train": range(40), "test": range(40, 60)}


@pytest.fixture(autouse=True)
def small_omniglot(monkeypatch):
    """Omniglot with 40 training and 20 test classes, of pictures as dark as the class's number."""

    def omniglot(split, ways, shots, queries, data=None, download=False):
        labels = np.repeat(list(CLASSES[split]), 4)
        images = np.broadcast_to(labels[:, None, None].astype(np.uint8), (len(labels), 8, 8))
        return bl.tasks.FewShot(images, labels, ways, shots, queries, rotations=split == "train")

    monkeypatch.setattr(bl.tasks, "omniglot", omniglot)


def classes(sample):
    return set(np.asarray(sample.labels).tolist())


def test_validation_classes_are_apart_and_unturned():
    data = FewShotData("omniglot", validation_classes=8)
    train, held, test = map(data.sampler, ("train", "validation", "test"))
    assert len(classes(held)) == 8 and not held.rotations and train.rotations
    assert classes(train) | classes(held) == set(CLASSES["train"]) and not classes(train) & classes(held)
    assert classes(test) == set(CLASSES["test"])


def test_maml_takes_pictures_of_any_shape(monkeypatch):
    monkeypatch.setattr(FewShotData, "image_shape", (16, 20, 3))
    learner = MamlOmniglot(filters=2, task=FewShotData("omniglot", eval_queries=1)).build().learner
    meta = jax.eval_shape(learner.init_meta, jax.random.key(0))
    assert meta["init"]["block_0"]["w"].shape == (2, 27)


def test_few_training_classes_leave_the_validation_classes_alone():
    data = FewShotData("omniglot", validation_classes=8, train_classes=6)
    train, held = map(data.sampler, ("train", "validation"))
    assert len(classes(train)) == 6 and not train.rotations and not classes(train) & classes(held)
    assert classes(held) == classes(FewShotData("omniglot", validation_classes=8).sampler("validation"))


def test_training_classes_are_never_handed_out_as_validation_classes():
    for data in FewShotData("omniglot"), FewShotData("omniglot", train_classes=6):
        with pytest.raises(ValueError, match=r"no validation classes.*--task.validation-classes"):
            data.sampler("validation")
