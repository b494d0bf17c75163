"""The study of a search, without training: who proposes, who stops, what is stored, who claims."""

import dataclasses
import importlib.util
import json
import math
import time

import optuna
import pytest
from optuna.trial import TrialState
from search_recipe import Quadratic

from bilevel.recipes.config import to_fields
from bilevel.search.spec import JOURNAL, Search, read_search, write_search
from bilevel.search.study import (
    best_trials,
    check_libraries,
    create_study,
    draw,
    grid_of,
    has_study,
    open_book,
    open_storage,
)
from bilevel.search.worker import _SILENCE, claim_trial

SPACE = {"rate": "log:1e-3..1", "num_steps": "int:1..9", "kind": "plain|shifted"}


@pytest.fixture
def make(tmp_path):
    """A search in a folder of its own, with fields of its own."""

    def build(folder="search", **fields) -> Search:
        values = {
            "recipe": "tests/search_recipe.py:Quadratic",
            "fields": to_fields(Quadratic()),
            "space": SPACE,
            "objectives": ("query_loss",),
            "directions": ("minimize",),
            "num_trials": 6,
            "storage": str((tmp_path / folder).resolve() / JOURNAL),
            "name": "study",
        }
        search = Search(**(values | fields))
        write_search(tmp_path / folder, search)
        create_study(search)
        return search

    return build


def height(values):
    """Least at rate 0.03, 4 steps, plain."""
    return (
        math.log10(values["rate"] / 0.03) ** 2
        + (values["num_steps"] - 4) ** 2 / 9
        + (values["kind"] != "plain")
    )


def play(search, tmp_path, steps=(), upto=None, folder="search"):
    """All trials of a search, told their height; the curve comes down to it over `steps`."""
    space, points = search.build_space(), []
    book = open_book(search)
    for _ in range(search.num_trials if upto is None else upto):
        claim = claim_trial(book, search, tmp_path / folder)
        assert claim is not None
        with claim.lock:
            values = draw(book, search, space, claim.trial)
            points.append((claim.trial.number, values))
            for step in steps:
                claim.trial.report(height(values) + 1 / step, step)
                if claim.trial.should_prune():
                    book.study.tell(claim.trial.number, state=TrialState.PRUNED)
                    break
            else:
                several = [height(values), float(values["num_steps"])][: len(search.objectives)]
                book.study.tell(claim.trial.number, several)
    return points


@pytest.mark.parametrize("sampler", ["random", "tpe", "cmaes", "nsga2", "gp"])
def test_a_sampler_proposes_the_same_whether_its_worker_was_replaced_or_not(make, tmp_path, sampler):
    if sampler == "gp" and importlib.util.find_spec("torch") is None:
        with pytest.raises(ImportError, match="--sampler gp needs torch: pip install torch"):
            check_libraries(make(sampler=sampler))
        pytest.skip("gp needs torch, which is not installed: its refusal was tested")
    trials = 16 if sampler == "tpe" else 9  # beyond the first ten, which tpe draws at random
    once = make("once", sampler=sampler, num_trials=trials, population=4)
    check_libraries(once)
    points = play(once, tmp_path, folder="once")
    assert len({json.dumps(values) for _, values in points}) > trials // 2
    again = make("again", sampler=sampler, num_trials=trials, population=4)
    pieces = [play(again, tmp_path, upto=n, folder="again") for n in (3, trials - 3)]  # a new study object
    assert pieces[0] + pieces[1] == points
    other = make("other", sampler=sampler, num_trials=3, seed=1, population=4)
    assert play(other, tmp_path, folder="other") != points[:3]


@pytest.mark.parametrize("written", range(1, len(SPACE)))
def test_a_trial_that_was_killed_between_two_of_its_values_gets_the_same(make, tmp_path, written):
    for sampler in ("random", "tpe"):
        search = make(f"{sampler}-{written}", sampler=sampler, num_trials=14)
        folder = tmp_path / f"{sampler}-{written}"
        play(search, tmp_path, upto=12, folder=folder.name)
        book, space = open_book(search), search.build_space()
        claim = claim_trial(book, search, folder)
        claim.lock.close()
        first = dict(list(space.items())[:written])
        part = draw(book, search, first, claim.trial)  # what was written before the kill
        taken = claim_trial(book, search, folder)
        assert taken.trial.number == claim.trial.number
        values = draw(book, search, space, taken.trial)
        taken.lock.close()
        assert part == {name: values[name] for name in part}
        twin = make(f"twin-{sampler}-{written}", sampler=sampler, num_trials=14)
        play(twin, tmp_path, upto=12, folder=f"twin-{sampler}-{written}")
        expected = play(twin, tmp_path, upto=1, folder=f"twin-{sampler}-{written}")[0][1]
        assert values == expected


@pytest.mark.parametrize("pruner", ["none", "median", "asha", "hyperband"])
def test_a_pruner_stops_trials_and_never_the_best(make, tmp_path, pruner):
    search = make(sampler="random", pruner=pruner, num_trials=24, fields=to_fields(Quadratic(27)))
    play(search, tmp_path, steps=range(1, 28))
    book = open_book(search)
    stopped = book.trials(TrialState.PRUNED)
    assert bool(stopped) == (pruner != "none")
    assert len(stopped) + len(book.trials(TrialState.COMPLETE)) == 24
    least = min(book.trials(), key=lambda trial: height(trial.params))
    assert best_trials(book, search)[0].number == least.number
    assert all(trial.last_step >= search.min_steps for trial in stopped)


def test_the_grid_is_every_point_once(make, tmp_path):
    space = {"rate": "log:1e-2..1", "kind": "plain|shifted"}
    search = make(sampler="grid", space=space, num_trials=6, grid_points=3)
    assert len(grid_of(search)) == 6
    space = search.build_space()
    book, points = open_book(search), []
    for _ in range(6):
        claim = claim_trial(book, search, tmp_path / "search")
        points.append(draw(book, search, space, claim.trial))
        claim.lock.close()
        book.study.tell(claim.trial.number, 0.0)
    rates = sorted(point["rate"] for point in points if point["kind"] == "plain")
    assert rates == pytest.approx([1e-2, 1e-1, 1])
    assert sorted(point["rate"] for point in points if point["kind"] == "shifted") == rates
    assert claim_trial(book, search, tmp_path / "search") is None


def test_several_objectives_have_a_front(make, tmp_path):
    search = make(
        sampler="nsga2",
        num_trials=20,
        population=5,
        objectives=("query_loss", "seconds"),
        directions=("minimize", "minimize"),
    )
    play(search, tmp_path)
    front = best_trials(open_book(search), search)
    assert len(front) > 1
    for a in front:
        for b in front:
            assert not (a.values[0] < b.values[0] and a.values[1] < b.values[1])


def test_there_are_exactly_so_many_trials_however_often_it_is_made(make, tmp_path):
    search = make()
    create_study(search)
    book = create_study(dataclasses.replace(search, num_trials=8))  # more are asked for
    assert len(book.trials()) == 8
    assert sorted(n for n, _ in play(dataclasses.replace(search, num_trials=8), tmp_path)) == list(range(8))
    assert claim_trial(book, search, tmp_path / "search") is None
    assert len(book.trials()) == 8


def test_two_workers_never_have_one_trial(make, tmp_path):
    search = make()
    folder = tmp_path / "search"
    claims = [claim_trial(open_book(search), search, folder) for _ in range(6)]
    assert sorted(claim.trial.number for claim in claims) == list(range(6))
    assert claim_trial(open_book(search), search, folder) is None  # all run
    claims[2].lock.close()  # as the kernel does when the process ends
    again = claim_trial(open_book(search), search, folder)
    assert again.trial.number == 2
    assert claim_trial(open_book(search), search, folder) is None


def test_a_storage_of_many_machines_goes_by_heartbeats(make, tmp_path):
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    search = make("here", storage=url, num_trials=2)
    assert has_study(url, "study") and not has_study(url, "other")
    here = claim_trial(open_book(search), search, tmp_path / "here")
    write_search(tmp_path / "there", search)
    there = claim_trial(open_book(search), search, tmp_path / "there")
    assert {here.trial.number, there.trial.number} == {0, 1}
    assert claim_trial(open_book(search), search, tmp_path / "there") is None
    here.lock.close()
    assert claim_trial(open_book(search), search, tmp_path / "there") is None  # it may be alive
    open_book(search).set(here.trial.number, heartbeat=time.time() - 2 * _SILENCE)
    taken = claim_trial(open_book(search), search, tmp_path / "there")
    assert taken.trial.number == here.trial.number


def test_a_trial_that_kills_its_workers_fails(make, tmp_path):
    search, folder = make(num_trials=1), tmp_path / "search"
    book = open_book(search)
    (folder / "session").write_text("a")
    for _ in range(3):
        claim_trial(book, search, folder).lock.close()
    (folder / "session").write_text("b")  # the search was started again: it may have been the machine
    for _ in range(2):
        claim_trial(book, search, folder).lock.close()
    assert not book.trials(TrialState.FAIL)
    assert claim_trial(book, search, folder) is None
    (failed,) = book.trials(TrialState.FAIL)
    assert "its worker died 3 times before its first report" in failed.user_attrs["error"]


def test_half_a_line_of_a_killed_writer_is_cut_off(make, tmp_path):
    search = make()
    play(search, tmp_path, upto=2)
    journal = tmp_path / "search" / JOURNAL
    before = journal.read_bytes()
    journal.write_bytes(before + b'{"op_code": 6, "worker_id"')
    play(search, tmp_path, upto=2)
    assert journal.read_bytes().startswith(before)
    assert len(open_book(search).trials(TrialState.COMPLETE)) == 4
    for text in journal.read_text().splitlines():
        json.loads(text)


def test_a_search_folder_can_be_moved(make, tmp_path):
    search = make()
    play(search, tmp_path, upto=2)
    (tmp_path / "search").rename(tmp_path / "moved")
    moved = read_search(tmp_path / "moved")
    assert moved.storage == str(tmp_path.resolve() / "moved" / JOURNAL)
    assert len(open_book(moved).trials(TrialState.COMPLETE)) == 2
    (tmp_path / "moved" / "search.json").write_text("{")
    with pytest.raises(ValueError, match=r"search\.json is damaged"):
        read_search(tmp_path / "moved")


@pytest.mark.parametrize("url", ["nothing://there", "sqlite:////no/such/folder/x.db"])
def test_a_storage_that_is_not_there_is_refused_in_a_line(url):
    with pytest.raises(ValueError, match="no storage at"):
        open_storage(url)


def test_optuna_opens_the_journal_as_its_own(make, tmp_path):
    play(make(), tmp_path)
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "search" / JOURNAL))
    study = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(backend))
    assert len(study.trials) == 6 and study.metric_names == ["query_loss"]
