"""Validation while training: the best state is kept, patience stops, and a resume changes nothing."""

import json
import signal
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest
from blobs_recipe import Blobs

import bilevel as bl
from bilevel.cli import main
from bilevel.recipes.evaluation import read_trained
from bilevel.recipes.run import fingerprint, first_state, stopped_early, train_recipe
from bilevel.recipes.splits import validation_classes
from bilevel.train.checkpoint import Checkpoints
from bilevel.train.early_stopping import EarlyStopping, Validation, best, stopped_at
from bilevel.train.metrics import read_metrics

NAME = f"{sys.modules['blobs_recipe'].__file__}:Blobs"
# What a callback returns reaches the loop only where the loop says so.
ASKS = Validation(every=2, patience=2, num_tasks=4)
# The outer rate makes the meta-learned start worse from the beginning, so that patience runs out.
WORSE = Blobs(num_meta_steps=14, learning_rate=3.0)


def rows(folder):
    return [row for row in read_metrics(folder / "metrics.jsonl") if "validation_loss" in row]


def without_time(folder):
    return [
        {n: v for n, v in row.items() if n not in ("time", "steps_per_second")}
        for row in read_metrics(folder / "metrics.jsonl")
    ]


def test_the_best_is_the_first_of_equals_and_never_nan():
    assert best([(1, 0.5), (2, 0.9), (3, 0.9)], "validation_accuracy") == (2, 0.9)
    assert best([(1, np.nan), (2, 3.0), (3, 2.0)], "validation_loss") == (3, 2.0)


@pytest.mark.parametrize("wrong", [{"every": -1}, {"patience": 1}, {"num_tasks": 1, "every": 5}])
def test_wrong_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match="validation"):
        Validation(**wrong)


def test_patience_counts_validations_without_a_new_best(tmp_path):
    figures = [0.3, 0.5, 0.4, 0.5, None, 0.6]
    lines = []
    for i, figure in enumerate(figures, start=1):
        lines.append({"step": 5 * i, "time": i, "query_loss": 1.0})
        lines.append({"step": 10 * i, "time": i, "validation_loss": 1.0, "validation_accuracy": figure})
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    asked = Validation(every=10, patience=3)
    assert [stopped_at(tmp_path, asked, step) for step in (10, 30, 40)] == [None] * 3
    assert stopped_at(tmp_path, asked, 50) == (20, 0.5)  # 0.4, 0.5 again and not finite
    assert stopped_at(tmp_path, asked, 60) is None
    assert stopped_at(tmp_path, Validation(every=10), 50) is None
    assert stopped_at(tmp_path / "none", asked, 50) is None


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, train_recipe(NAME, WORSE, folder, False, "bilevel train", ASKS)


def test_validations_are_in_the_metrics_and_the_best_is_kept(whole):
    folder, state = whole
    found = rows(folder)
    assert [row["step"] for row in found] == list(range(2, int(state.step) + 1, 2))
    assert {"validation_accuracy", "validation_accuracy_ci95", "validation_loss"} <= set(found[0])
    top = max(found, key=lambda row: row["validation_accuracy"])
    assert Checkpoints(folder / "best").latest() == top["step"]
    run = read_trained(folder)
    assert run.meta_step == top["step"] and "best" in run.checkpoint
    assert read_trained(folder, "newest").meta_step == int(state.step)
    # The figure is the one that this state has on these tasks.
    experiment = WORSE.build()
    key = jax.random.fold_in(state.key, 0x5A11D)
    anew = bl.evaluate(
        experiment.learner, run.meta, validation_classes(experiment), key, num_tasks=4, num_steps=2
    )
    assert float(anew.curves["query_accuracy"].mean[-1]) == top["validation_accuracy"]


def test_validation_does_not_change_what_is_learned(whole, tmp_path):
    _, state = whole
    recipe = replace(WORSE, num_meta_steps=int(state.step))
    plain = train_recipe(NAME, recipe, tmp_path / "plain", False, "bilevel train")
    jax.tree.map(np.testing.assert_array_equal, plain.meta, state.meta)


def test_a_run_interrupted_between_validations_ends_the_same(whole, tmp_path):
    folder, state = whole
    experiment, calls = WORSE.build(), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)

    part = tmp_path / "part"
    run = bl.Run(part, fingerprint(NAME, WORSE))
    asked = replace(ASKS, num_steps=2)

    def watch():
        return EarlyStopping(experiment.learner, validation_classes(experiment), asked, run=run)

    def go_on(resume, callbacks):
        return bl.train(
            experiment.learner,
            experiment.optimizer,
            experiment.sample_tasks,
            first_state(experiment, 0),
            int(state.step),
            options=WORSE.loop,
            run=replace(run, resume=resume),
            on_chunk=callbacks,
        )

    assert int(go_on(False, [watch(), interrupt]).step) == 4
    resumed = watch()
    end = go_on(True, [resumed])
    jax.tree.map(np.testing.assert_array_equal, end.meta, state.meta)
    assert without_time(part) == without_time(folder)
    assert Checkpoints(part / "best").latest() == Checkpoints(folder / "best").latest()
    assert len(resumed.history) == len(rows(folder))


def test_patience_stops_the_run_and_a_resume_leaves_it(whole, capsys):
    folder, state = whole
    step, _ = stopped_early(folder)
    assert int(state.step) < WORSE.num_meta_steps and int(state.step) == step + 4
    again = train_recipe(NAME, WORSE, folder, True, "bilevel train", ASKS)
    assert int(again.step) == int(state.step)
    assert main(["train", NAME, "--folder", str(folder), "--resume"]) == 0  # keeps its validation
    assert f"at step {step}" in capsys.readouterr().out


def test_a_resume_with_another_validation_is_refused(whole, capsys):
    folder, state = whole
    words = ["train", NAME, "--folder", str(folder), "--resume", "--validation.patience", "10"]
    assert main(words) == 2
    assert "validation.patience is 2 there and 10 here; leave the flag out" in capsys.readouterr().err
    assert Checkpoints(folder / "checkpoints").latest() == int(state.step)


def test_the_callback_itself_asks_to_stop():
    experiment = WORSE.build()
    watch = EarlyStopping(experiment.learner, validation_classes(experiment), replace(ASKS, patience=1))
    state = first_state(experiment, 0)
    far = jax.tree.map(lambda leaf: leaf * np.nan, state.meta)
    answers = []
    for step, meta in ((1, state.meta), (2, state.meta), (3, far), (5, far)):
        values = {}
        answers.append(watch(state._replace(step=np.int32(step), meta=meta), values))
        assert bool(values) == (step in (2, 5))
    assert answers == [False, False, False, True] and len(watch.history) == 2


def test_a_recipe_without_validation_classes_is_refused_at_once(tmp_path, capsys):
    recipe = NAME.replace("blobs_recipe.py:Blobs", "small_recipe.py:Small")
    words = ["train", recipe, "--folder", str(tmp_path / "run"), "--validation.every", "4"]
    assert main(words) == 2
    assert "no validation classes" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
