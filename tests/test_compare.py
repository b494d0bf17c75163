"""Runs compared on the same tasks: paired intervals, refusals, stored figures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import blobs_recipe
import numpy as np
import pytest
from blobs_recipe import Blobs

from bilevel.cli import main
from bilevel.recipes.comparison import _stored, compare_runs
from bilevel.recipes.evaluation import evaluate_run, read_trained
from bilevel.recipes.run import train_recipe
from bilevel.train.compare import paired, same_tasks, winner


def test_paired_interval_covers_and_is_narrower_where_runs_are_correlated():
    rng = np.random.default_rng(0)
    covered, narrower = 0, []
    for trial in range(300):
        difficulty = rng.normal(0.8, 0.1, 60)
        a, b = difficulty + rng.normal(0.02, 0.02, 60), difficulty + rng.normal(0, 0.02, 60)
        found = paired(a, b, seed=trial)
        covered += abs(found.difference - 0.02) <= found.ci95
        low, high = found.bootstrap
        assert low < found.difference < high
        narrower.append(found.ci95 / found.unpaired_ci95)
    assert 0.92 < covered / 300 <= 0.98  # 0.95 ± 2.4 standard errors
    # std 0.0283 of the differences against 0.144 of two separate sets of tasks
    assert 0.17 < np.mean(narrower) < 0.24
    # the bootstrap agrees with Student's t
    np.testing.assert_allclose((high - low) / 2, found.ci95, rtol=0.15)


def test_identical_runs_differ_by_exactly_nothing():
    a = np.random.default_rng(0).random(50)
    found = paired(a, a)
    assert (found.difference, found.ci95, found.bootstrap) == (0.0, 0.0, (0.0, 0.0))
    assert not found.decided and "equal on every one" in winner("A", "B", found, "accuracy")


def test_winner_in_words():
    rng = np.random.default_rng(0)
    base = rng.random(100)
    better = paired(base + 0.1 + 0.01 * rng.normal(size=100), base)
    assert better.decided
    assert winner("A", "B", better, "accuracy").startswith("A is better than B: accuracy 9.92 ± 0.19 points")
    assert winner("A", "B", better, "loss").startswith("B is better than A: loss 0.09921 ± 0.0019 lower")
    equal = paired(base, base + rng.normal(size=100))
    assert "no winner" in winner("A", "B", equal, "accuracy")


@pytest.mark.parametrize("wrong", ([1.0], [1.0, np.nan], [1.0, 2.0, 3.0]))
def test_figures_that_cannot_be_paired(wrong):
    with pytest.raises(ValueError, match=r"must be f"):
        paired(np.array(wrong), np.array([1.0, 2.0]))


def test_same_tasks_by_their_sketches():
    rng = np.random.default_rng(0)
    sketch = rng.normal(size=(6, 4, 2))
    assert same_tasks(sketch, sketch * (1 + 1e-6)) is None
    other = sketch.copy()
    other[3, 2, 0] += 0.1
    assert same_tasks(sketch, other) == 3 and same_tasks(sketch[:3], other) is None
    assert same_tasks(sketch, sketch[:, :2]) == 0


NAME = f"{Path(blobs_recipe.__file__)}:Blobs"


def variant(source, target, **fields):
    """A copy of a run that says it was trained with other fields; training it takes seconds."""
    shutil.copytree(source, target)
    for file in (target / "config.json", *target.glob("checkpoints/*/manifest.json")):
        content = json.loads(file.read_text())
        content["fields" if file.name == "config.json" else "fingerprint"] |= fields
        file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two runs with other inner rates, one with more shots, and one tested on other clouds."""
    folder = tmp_path_factory.mktemp("runs")
    train_recipe(NAME, Blobs(num_meta_steps=2), folder / "a", False, "bilevel train")
    for name, fields in {"b": {"rate": 0.5}, "shots": {"shots": 2}, "clouds": {"spread": 0.6}}.items():
        variant(folder / "a", folder / name, **fields)
    return folder


@pytest.fixture(scope="module")
def evaluated(runs):
    """What `bilevel eval` found about the first one; it leaves the figures of each task there."""
    return evaluate_run(runs / "a", 30, shots=(2,))


def test_compare_uses_what_eval_stored_and_judges_the_rest_anew(runs, evaluated, tmp_path):
    result = compare_runs([runs / "a", runs / "b"], 20, out=tmp_path)
    assert [run["stored"] for run in result["runs"]] == [True, False]
    assert not (runs / "b" / "evaluation.json").exists()
    run = read_trained(runs / "a")
    for wrong in ((31, 2, 1), (20, 3, 1), (20, 2, 7)):  # too few tasks, other steps, another seed
        assert _stored(run, *wrong) is None
    assert _stored(replace(run, meta_step=9), 20, 2, 1) is None
    with np.load(runs / "a" / "per_task.npz") as stored:
        accuracy = stored["query_accuracy"]
        assert accuracy.shape == (30, 3)
        np.testing.assert_allclose(accuracy.mean(0), evaluated["curves"]["query_accuracy"]["mean"], rtol=1e-6)
        assert result["runs"][0]["mean"] == pytest.approx(accuracy[:20, -1].mean())
    pair = result["pairs"][0]
    assert pair["num_tasks"] == 20 and pair["difference"] == pytest.approx(
        result["runs"][0]["mean"] - result["runs"][1]["mean"]
    )
    assert json.loads((tmp_path / "compare.json").read_text())["seed"] == 1
    assert (tmp_path / "compare.md").read_text().splitlines()[2] == "| run | accuracy | steps |"


def test_stored_figures_that_are_damaged_are_judged_anew(runs, evaluated, tmp_path):
    shutil.copytree(runs / "a", tmp_path / "cut")
    path = tmp_path / "cut" / "per_task.npz"
    path.write_bytes(path.read_bytes()[:100])
    assert _stored(read_trained(tmp_path / "cut"), 5, 2, 1) is None


def test_one_test_set_names_no_winner():
    found = paired(np.full(2, 0.9011), np.full(2, 0.9010))
    assert not found.decided and "no winner is named" in winner("a", "b", found, "accuracy")


def test_a_run_against_its_copy_is_exactly_equal(runs, evaluated, tmp_path, capsys):
    shutil.copytree(runs / "a", tmp_path / "copy")
    (tmp_path / "copy" / "per_task.npz").unlink()  # judged anew, it gives the stored figures again
    words = ["compare", runs / "a", tmp_path / "copy", "--num-tasks", 5, "--out", tmp_path]
    assert main([str(word) for word in words]) == 0
    assert "equal on every one of the 5 tasks" in capsys.readouterr().out
    found = json.loads((tmp_path / "compare.json").read_text())
    assert found["pairs"][0]["difference"] == 0
    assert [run["stored"] for run in found["runs"]] == [True, False]


def test_other_tasks_are_refused_by_name(runs, evaluated, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"support.*\[3, 4\] for a and \[6, 4\] for shots"):
        compare_runs([runs / "a", runs / "shots"], 4, out=tmp_path)
    with pytest.raises(ValueError, match="task 0 differs"):  # of the same shapes and sampler
        compare_runs([runs / "a", runs / "clouds"], 4, out=tmp_path)
    assert main(["compare", str(runs / "a")]) == 2
    assert "two or more" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_evaluation_says_all_of_the_protocol(evaluated):
    assert evaluated["split"] == "test" and evaluated["unseen"].startswith("unseen classes")
    assert evaluated["shots"]["2"]["query_accuracy"]["mean"]
    assert {"support minus query accuracy", "seen minus unseen accuracy"} == set(evaluated["gaps"])
    assert evaluated["batch_statistics"].startswith("inductive")
    assert evaluated["calibration"]["num_examples"] == 30 * 12
    assert evaluated["specialization"]["num_steps"] == 2
