"""One data set as the only task, and what a run's meta-parameters say of themselves."""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.recipes import Experiment
from bilevel.recipes.evaluation import evaluate_run
from bilevel.recipes.learned import learned
from bilevel.recipes.run import train_recipe
from bilevel.recipes.splits import unseen
from bilevel.recipes.summary import summary
from bilevel.report import write_report
from bilevel.tasks import Fixed

RECIPE = f"{__file__}:Penalties"


@dataclass(frozen=True)
class Penalties:
    """One penalty a feature of a linear regression; only the first feature means anything."""

    num_meta_steps: int = 8
    seed: int = 0
    loop: bl.Options = field(default_factory=lambda: bl.Options(chunk_size=4, checkpoint_every=4))

    def build(self) -> Experiment:
        x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
        parts = [(x[i : i + 20], x[i : i + 20, 0]) for i in (0, 20, 40)]

        def inner(params, meta, batch, key):
            error = jnp.mean((batch[0] @ params - batch[1]) ** 2)
            return error + jnp.sum(jnp.exp(meta["log_penalty"]) * params**2)

        def outer(params, meta, batch, key):
            return jnp.mean((batch[0] @ params - batch[1]) ** 2)

        problem = bl.Problem(lambda meta, key: jnp.zeros(3), inner, outer)
        start = {"log_penalty": jnp.zeros(3)}
        learner = bl.Learner(
            problem, bl.inner.Gradient(optax.sgd(0.1), 10), bl.hypergrad.Unroll(), init_meta=lambda key: start
        )
        return Experiment(
            learner,
            optax.adam(0.1),
            sample_tasks=bl.tasks.batch(Fixed(bl.Task(parts[0], parts[1])), 1),
            sample_test=Fixed(bl.Task(parts[0], parts[2])),
            protocol="a line through noise",
            eval_steps=10,
            eval_tasks=2,
            meta_figures=lambda meta: {"mean log penalty": jnp.mean(meta["log_penalty"])},
            meta_lines=lambda meta: {"log penalty <of each>": meta["log_penalty"]},
            meta_pictures=lambda meta: {"penalties & more": jax.nn.sigmoid(meta["log_penalty"])[None, None]},
        )


def test_what_was_learned_is_evaluated_and_drawn(tmp_path):
    folder = tmp_path / "run"
    state = train_recipe(RECIPE, Penalties(), folder, False, "bilevel train")
    result = evaluate_run(folder)
    penalty = np.asarray(state.meta["log_penalty"])
    assert penalty[0] < 0  # the feature that says something is let free
    assert result["learned"]["figures"] == {"mean log penalty": pytest.approx(penalty.mean(), rel=1e-6)}
    np.testing.assert_allclose(result["learned"]["lines"]["log penalty <of each>"], penalty, rtol=1e-6)
    assert "mean log penalty:" in summary(result)
    # One test set, learned from without chance: no interval is claimed, and nothing "adapts".
    said = summary(result)
    assert "±" not in said.split("mean log penalty")[0] and "tasks" not in said.split("\n")[0]
    assert "inner step" in said and "adaptation step" not in said
    trained = {
        **result,
        "curves": {
            k: {**c, "mean": c["mean"][-1:], "ci95": [0.0], "steps": [0]} for k, c in result["curves"].items()
        },
    }
    assert "as trained" in summary(trained)
    uneven = {
        **result,
        "curves": {k: {**c, "ci95": [0.5] * len(c["ci95"])} for k, c in result["curves"].items()},
    }
    assert "± 0.5" in summary(uneven) and "over 2 tasks" in summary(uneven)
    page = write_report([folder], tmp_path / "page.html").read_text()
    lead = page.split("<h2")[1]  # the result: nor does the page claim one
    assert "±" not in lead and "of a single test set, which has no interval" in lead
    assert "mean log penalty" in page
    assert "log penalty &lt;of each&gt;" in page
    assert 'alt="penalties &amp; more"' in page


def test_the_examples_of_one_data_set_are_compared():
    experiment = Penalties().build()
    assert unseen(experiment) == (
        True,
        "unseen examples: none of the 20 of the test is one of the 40 trained on",
    )
    support = experiment.sample_test.task.support
    leaky = replace(experiment, sample_test=Fixed(bl.Task(support, support)))
    assert unseen(leaky) == (None, "20 of the 20 test examples are equal to one that was trained on")


@pytest.mark.parametrize(
    "field_name, value, words",
    [
        ("meta_figures", {"a": np.zeros(2)}, "must give numbers"),
        ("meta_lines", {"a": 1.0}, "must give arrays"),
    ],
)
def test_wrong_shapes_are_refused_by_name(field_name, value, words):
    experiment = replace(Penalties().build(), **{field_name: lambda meta: value})
    with pytest.raises(ValueError, match=f"{words}.*'a'"):
        learned(experiment, {"log_penalty": jnp.zeros(3)})


def test_a_recipe_without_example_tasks_is_not_asked_for_them(tmp_path):
    folder = tmp_path / "run"
    train_recipe(RECIPE, Penalties(num_meta_steps=4), folder, False, "bilevel train")
    evaluate_run(folder)
    assert "examples.npz" not in write_report([folder]).read_text()
