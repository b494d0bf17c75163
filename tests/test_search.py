"""`bilevel search` from its flags to its best trial: refused, run, resumed, promoted, with failing trials."""

import json
import signal
import threading
from pathlib import Path

import pytest
from optuna.trial import TrialState

from bilevel.recipes.run import read_config
from bilevel.search import commands
from bilevel.search.commands import run_search
from bilevel.search.spec import read_search, trial_folder
from bilevel.search.study import open_book
from bilevel.train.checkpoint import Checkpoints
from bilevel.train.metrics import read_metrics

RECIPE = str(Path(__file__).parent / "search_recipe.py") + ":Quadratic"
RATE = ["--space.rate", "log:1e-3..0.4"]


def run(*words, folder=None):
    return run_search([RECIPE, *words, *(["--folder", str(folder)] if folder else [])])


def book_of(folder):
    return open_book(read_search(folder))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished search of four trials."""
    folder = tmp_path_factory.mktemp("search") / "done"
    words = [*RATE, "--space.outer.rate", "0.05|0.3", "--num-trials", "4", "--size", "2"]
    assert run(*words, folder=folder) == 0
    return folder


def test_each_trial_is_a_run_with_its_values(done):
    for trial in book_of(done).trials():
        fields = read_config(trial_folder(done, trial.number))["fields"]
        assert (fields["rate"], fields["outer"]["rate"]) == (trial.params["rate"], trial.params["outer.rate"])
        assert fields["size"] == 2  # a flag of the recipe, for all
        rows = read_metrics(trial_folder(done, trial.number) / "metrics.jsonl")
        assert trial.value == rows[-1]["outer_loss"]
        assert trial.intermediate_values == {row["step"]: row["outer_loss"] for row in rows}
        assert trial.user_attrs["folder"] == f"trials/{trial.number:04d}"
        assert trial.user_attrs["steps"] == 8 and trial.user_attrs["seconds"] > 0


def test_a_trial_is_what_train_would_have_made(done, tmp_path, capsys):
    from bilevel.cli import main

    command = read_config(trial_folder(done, 1))["command"].split()
    command[command.index("--folder") + 1] = str(tmp_path / "alone")
    assert main(command[1:]) == 0
    alone, trial = (read_metrics(f / "metrics.jsonl") for f in (tmp_path / "alone", trial_folder(done, 1)))
    assert [row["outer_loss"] for row in alone] == [row["outer_loss"] for row in trial]


def test_a_finished_search_runs_nothing_again(done, capsys):
    before = (done / "journal.log").read_bytes()
    assert run("--resume", folder=done) == 0
    said = capsys.readouterr().out
    assert "0 of 4 trials to run" in said and "4 trials: 4 complete" in said and "promote" in said
    kept = [json.loads(line) for line in (done / "journal.log").read_bytes()[len(before) :].splitlines()]
    assert all("trial_id" not in each for each in kept)  # nothing of a trial was written


@pytest.mark.parametrize(
    "words, message",
    [
        (RATE, "is in use already; go on with --resume"),
        (["--resume", "--num-steps", "5"], "fields.num_steps is 2 there and 5 here"),
        (["--resume", "--space.rate", "log:1e-2..0.4"], "holds another search"),
        (["--resume", "--sampler", "random"], "sampler is tpe there and random here"),
        (["--resume", "--num-trials", "3"], "can only grow"),
    ],
)
def test_a_folder_keeps_its_search(done, words, message):
    with pytest.raises((ValueError, FileExistsError)) as caught:
        run(*words, folder=done)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "there is nothing to search"),
        (["--space.rates", "0..1"], "did you mean rate?"),
        ([*RATE, "--rate", "0.1"], "rate is searched and also set"),
        ([*RATE, "--num-trials", "0"], "--num-trials must be at least 1, got 0"),
        ([*RATE, "--objective", "grad_norm"], "add --direction"),
        ([*RATE, "--objective", "validation_loss"], "add --validation.every"),
        ([*RATE, "--objective", "a_loss", "--objective", "a_loss"], "named twice"),
        ([*RATE, "--objective", "query_loss", "--objective", "seconds", "--pruner", "asha"], "one objective"),
        ([*RATE, "--objective", "query_loss", "--objective", "seconds", "--sampler", "cmaes"], "knows one"),
        ([*RATE, "--direction", "minimize", "--direction", "maximize"], "1 objectives and 2"),
        ([*RATE, "--min-steps", "9"], "more than the 8 outer steps"),
        ([*RATE, "--sampler", "grid", "--num-trials", "9"], "the grid has 5 points"),
        ([*RATE, "--address", "auto"], "add --launcher ray"),
        ([*RATE, "--sampler", "annealing"], "--sampler"),
        ([*RATE, "--no-such-flag", "1"], "--help` lists the flags"),
        ([*RATE, "--resume"], "holds no search"),
        ([*RATE, "--storage", "nothing://there"], "no storage at"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, words, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        run(*words, folder=tmp_path / "search")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "search").exists()


def test_usage_and_help(capsys):
    assert run_search(["--help"]) == 0
    assert "bilevel search promote" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "--warm-start" in said and "--outer.rate" in said and "--space.FIELD" in said


def test_more_trials_go_on_from_those_there(done, tmp_path):
    import shutil

    folder = tmp_path / "more"
    shutil.copytree(done, folder)
    first = {t.number: (t.params, t.value, t.datetime_complete) for t in book_of(folder).trials()}
    assert run("--resume", "--num-trials", "5", folder=folder) == 0
    trials = book_of(folder).trials()
    assert len(trials) == 5
    assert {t.number: (t.params, t.value, t.datetime_complete) for t in trials[:4]} == first


def test_promote_goes_on_from_the_state_of_the_best_trial(done, capsys):
    best = book_of(done).study.best_trial
    before = sorted(path.name for path in trial_folder(done, best.number).rglob("*"))
    assert run_search(["promote", str(done), "--num-meta-steps", "12"]) == 0
    folder = done / "promoted" / f"{best.number:04d}-12"
    assert f"12 outer steps in {folder}; next: bilevel eval" in capsys.readouterr().out
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert rows[:4] == read_metrics(trial_folder(done, best.number) / "metrics.jsonl")
    assert rows[-1]["outer_loss"] < best.value  # it has learned on
    assert Checkpoints(folder / "checkpoints").latest() == 12
    assert read_config(folder)["fields"]["rate"] == best.params["rate"]
    assert sorted(path.name for path in trial_folder(done, best.number).rglob("*")) == before
    for words, message in (
        ([str(best.number), "--num-meta-steps", "12"], "in use already"),
        (["--num-meta-steps", "8", "--folder", "x"], "8 outer steps already"),
        (["9", "--num-meta-steps", "12"], "no trial 9"),
    ):
        with pytest.raises((ValueError, FileExistsError), match=message):
            run_search(["promote", str(done), *words])


def test_failing_trials_are_recorded_and_the_others_run(tmp_path, capsys):
    words = ["--sampler", "grid", "--space.fail", "never|nan|build", "--rate", "0.6"]
    assert run(*words, folder=tmp_path / "s") == 0
    said = capsys.readouterr().out
    assert "3 trials: 1 complete, 0 stopped early, 2 failed" in said
    assert "failed: OSError: no data at rate 0.6  fail=build" in said
    failed = book_of(tmp_path / "s").trials(TrialState.FAIL)
    errors = {trial.params["fail"]: trial.user_attrs["error"] for trial in failed}
    assert errors["build"] == "OSError: no data at rate 0.6"
    assert errors["nan"].startswith("HypergradientError: the hypergradient of outer step 0 is not finite")


def test_a_search_whose_every_trial_fails_alike_ends_and_says_so(tmp_path):
    words = ["--sampler", "random", "--fail", "build", "--space.rate", "0.6..0.9", "--num-trials", "30"]
    with pytest.raises(ValueError, match="all 5 trials failed with the same error: OSError: no data at rate"):
        run(*words, folder=tmp_path / "s")
    assert len(book_of(tmp_path / "s").trials(TrialState.WAITING)) == 25


def test_two_objectives_in_a_database_and_a_second_machine(tmp_path, capsys):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    words = [*RATE, "--objective", "query_loss", "--objective", "seconds", "--storage", url]
    words += ["--num-trials", "2"]
    assert run(*words, folder=tmp_path / "one") == 0
    book = book_of(tmp_path / "one")
    assert all(len(trial.values) == 2 for trial in book.trials())
    assert read_search(tmp_path / "one").sampler == "nsga2"
    assert "trial" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="holds a study Quadratic already; add --resume"):
        run(*words, folder=tmp_path / "two")
    with pytest.raises(ValueError, match=r"is of another search: fields\.size"):
        run(*words, "--resume", "--size", "9", folder=tmp_path / "two")
    assert run(*words, "--resume", folder=tmp_path / "two") == 0
    assert len(book_of(tmp_path / "two").trials()) == 2


def test_validation_is_the_objective_where_there_is_one(tmp_path):
    words = ["--space.rate", "0.1|0.2", "--sampler", "grid", "--validation.every", "4"]
    assert run(*words, "--average", "2", folder=tmp_path / "s") == 0
    search, book = read_search(tmp_path / "s"), book_of(tmp_path / "s")
    assert search.objectives == ("validation_loss",)
    assert "--validation.every 4" in read_config(trial_folder(tmp_path / "s", 0))["command"]
    for trial in book.trials():
        rows = read_metrics(trial_folder(tmp_path / "s", trial.number) / "metrics.jsonl")
        figures = [row["validation_loss"] for row in rows if "validation_loss" in row]
        assert len(figures) == 2 and trial.value == pytest.approx(sum(figures) / 2)


def test_a_warm_start_begins_where_the_nearest_trial_ended(tmp_path):
    folder = tmp_path / "s"
    words = ["--space.size", "3|4", "--space.outer.rate", "float:0.1..0.2", "--sampler", "random"]
    assert run(*words, "--warm-start", "--num-trials", "4", folder=folder) == 0
    trials = book_of(folder).trials()
    sizes = [trial.params["size"] for trial in trials]
    assert len(set(sizes)) == 2  # another size is another shape
    for trial in trials:
        origin = trial.user_attrs["warm_start"]
        before = [t for t in trials[: trial.number] if t.params["size"] == trial.params["size"]]
        if not before:
            assert origin is None
            continue
        rate = trial.params["outer.rate"]
        nearest = min(before, key=lambda t: abs(t.params["outer.rate"] - rate))
        assert origin == nearest.number
        first = read_metrics(trial_folder(folder, trial.number) / "metrics.jsonl")[0]
        last = read_metrics(trial_folder(folder, origin) / "metrics.jsonl")[-1]
        assert first["outer_loss"] < last["outer_loss"]  # it has not begun at zero


def test_an_interrupted_search_goes_on_with_the_same_result(tmp_path, capsys):
    """Ctrl-C in the middle of a trial, and in its last chunk, which training ends as if nothing were."""
    words = [*RATE, "--num-trials", "3", "--spin", "1000000", "--pruner", "median"]
    assert run(*words, folder=tmp_path / "whole") == 0
    whole = book_of(tmp_path / "whole").trials()
    for after in (0, 6):
        folder = tmp_path / f"cut-{after}"
        timer = threading.Thread(target=_interrupt_at, args=(folder / "trials" / "0001", after))
        timer.start()
        assert run(*words, folder=folder) == 130
        timer.join()
        assert "go on with: bilevel search" in capsys.readouterr().out
        assert len(book_of(folder).trials(TrialState.COMPLETE)) in (1, 2)
        assert run("--resume", folder=folder) == 0
        again = book_of(folder).trials()
        assert [(t.params, t.value, t.state) for t in again] == [(t.params, t.value, t.state) for t in whole]


def _interrupt_at(run, step):
    """Send SIGINT to this process when a run has written that step."""
    import os
    import time

    path = run / "metrics.jsonl"
    while not path.is_file() or (read_metrics(path) or [{"step": 0}])[-1]["step"] < step:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGINT)


def test_directions_follow_from_names():
    assert commands._directions(("validation_accuracy", "query_loss"), ()) == ("maximize", "minimize")
    assert commands._directions(("grad_norm",), ("minimize",)) == ("minimize",)
