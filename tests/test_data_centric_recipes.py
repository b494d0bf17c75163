"""The recipes of weighted examples, on a few made-up digits in the place of MNIST."""

import sys

import jax
import numpy as np
import pytest

import bilevel as bl
from bilevel.recipes.hyper_cleaning import HyperCleaning, found_corruption
from bilevel.recipes.influence import Influence
from bilevel.recipes.meta_weight_net import MetaWeightNet
from bilevel.recipes.reweight import Reweight
from bilevel.tasks.mnist import Mnist


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """mnist.npz of 1200 and 300 noisy copies of ten pictures, easy to tell apart."""
    rng = np.random.default_rng(0)
    shapes = rng.integers(0, 200, (10, 28, 28))

    def part(n):
        labels = np.arange(n) % 10
        return (shapes[labels] // 2 + rng.integers(0, 120, (n, 28, 28))).astype(np.uint8), labels

    path = tmp_path_factory.mktemp("digits") / "mnist.npz"
    np.savez(path, **dict(zip(Mnist._fields, (*part(1200), *part(300)), strict=True)))
    module = sys.modules["bilevel.tasks.mnist"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "NUM_TRAIN", 1200)
        patch.setattr(module, "NUM_TEST", 300)
        yield path


def run(recipe):
    """The experiment, its meta at the end, and the test accuracy."""
    experiment = recipe.build()
    optimizer, sample = experiment.optimizer, experiment.sample_tasks
    state = bl.init_state(experiment.learner, optimizer, sample, jax.random.key(recipe.seed))
    state = bl.train(experiment.learner, optimizer, sample, state, recipe.num_meta_steps, options=recipe.loop)
    result = bl.evaluate(
        experiment.learner,
        state.meta,
        experiment.sample_test,
        jax.random.key(1),
        num_tasks=experiment.eval_tasks,
        num_steps=experiment.eval_steps,
    )
    return experiment, state.meta, float(result.curves["query_accuracy"].mean[-1])


SMALL = {"num_train": 200, "num_clean": 100}


@pytest.mark.filterwarnings("ignore::bilevel.hypergrad.HypergradientWarning")  # 60 steps settle nothing
def test_cleaning_finds_the_wrong_labels(digits):
    recipe = HyperCleaning(
        data=digits,
        estimator="saba",
        num_meta_steps=300,
        learning_rate=0.1,
        batch_size=50,
        rate=0.02,
        eval_steps=100,
        **SMALL,
    )
    experiment, meta, accuracy = run(recipe)
    figures = experiment.meta_figures(meta)
    assert figures["F1 of the found corruption"] > 0.9 and accuracy > 0.95
    assert 0.4 < figures["share of wrong labels"] < 0.5


def test_figures_of_cleaning_are_counted():
    wrong = np.array([True, True, False, False, False])
    figures = found_corruption(wrong)(np.array([-1.0, 1.0, -1.0, 1.0, 2.0]))
    assert figures == {
        "F1 of the found corruption": 0.5,
        "precision": 0.5,
        "recall": 0.5,
        "share of wrong labels": 0.4,
    }
    assert found_corruption(wrong)(np.ones(5))["F1 of the found corruption"] == 0


def test_cleaning_refuses_more_examples_than_there_are(digits):
    with pytest.raises(ValueError, match="num_train \\+ num_clean must be at most 1200"):
        HyperCleaning(data=digits).build()


def test_the_most_harmful_examples_are_the_mislabelled_ones(digits):
    recipe = Influence(data=digits, share=0.2, num_steps=200, decay=0.1, **SMALL)
    experiment, meta, _ = run(recipe)
    figures = experiment.meta_figures(meta)
    assert figures["wrong labels among the 10 most harmful"] == 1.0
    assert figures["share of wrong labels"] < 0.2
    pictures = experiment.meta_pictures(meta)
    assert [array.shape for array in pictures.values()] == [(20, 28, 28)] * 2
    assert next(iter(pictures)).startswith("most harmful, labelled ")


def test_reweighting_learns_from_few_rare_examples(digits):
    small = {"num_train": 80, "share": 0.9, "batch_size": 40, "filters": 0, "num_meta_steps": 20}
    _, _, accuracy = run(Reweight(data=digits, **small))
    assert accuracy > 0.9
    rare = {}
    for weighting in ("plain", "proportion", "resample"):
        sample = Reweight(data=digits, weighting=weighting, **small).build().sample_tasks
        rare[weighting] = float(1 - np.asarray(sample(jax.random.key(0)).support[1]).mean())
    assert rare["plain"] == rare["proportion"] < 0.25 < rare["resample"]


def test_weight_net_has_a_curve(digits):
    small = {"num_meta_steps": 3, "num_train": 300, "num_clean": 100, "imbalance": 10.0, "hidden": (20,)}
    experiment, meta, _ = run(MetaWeightNet(data=digits, **small))
    ((name, curve),) = experiment.meta_lines(meta).items()
    assert name == "weight of an example by its loss, 0 to 10" and curve.shape == (101,)
    assert ((curve > 0) & (curve < 1)).all() and np.ptp(curve) > 0
    for bias, words in (("flip", "60 % of the labels replaced"), ("imbalance", "10 times the smallest")):
        assert words in MetaWeightNet(data=digits, bias=bias, **small).build().protocol


def test_clean_examples_are_balanced_and_apart(digits):
    experiment = MetaWeightNet(data=digits, num_train=1000, num_clean=100, share=0.0).build()
    rows = experiment.sample_tasks.sample.task
    assert np.bincount(rows.query[1]).tolist() == [10] * 10
    train = {row.tobytes() for row in rows.support[0]}
    assert not any(row.tobytes() in train for row in rows.query[0])
    with pytest.raises(ValueError, match="multiple of 10"):
        MetaWeightNet(data=digits, num_clean=15).build()
    with pytest.raises(ValueError, match="num_train must be at most 1100 beside the clean examples"):
        MetaWeightNet(data=digits, num_clean=100).build()
