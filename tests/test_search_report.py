"""The page of a search and of a population: self-contained, and sensible whatever there is to show."""

import dataclasses
import json
import math

import numpy as np
import optuna
import pytest
from population_recipe import NAME, Number
from test_report import EVIL, assert_self_contained

from bilevel.recipes.config import to_fields
from bilevel.report.search import render_search
from bilevel.report.search_data import Objective, Search, SearchTrial
from bilevel.report.search_population import PopulationStory, Stage, render_population
from bilevel.search import spec
from bilevel.search.population_spec import LINEAGE, Population, is_search, write_population
from bilevel.search.report import read_study, search_report
from bilevel.search.study import create_study


def trials(count, objectives=1):
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        params = {
            "maml.rate": float(10 ** rng.uniform(-3, 0)),
            "num_steps": int(rng.integers(1, 9)),
            "net": ["conv4", EVIL][number % 2],
        }
        value = float(abs(np.log10(params["maml.rate"]) + 1) + 0.1)
        curve = {step: value + 1 / step for step in (10, 20, 30)}
        seconds = float(rng.uniform(1, 9))
        kind = "failed" if number % 10 == 9 else "pruned" if number % 10 > 6 else "finished"
        values = (value, seconds)[:objectives] if kind == "finished" else ()
        curve = {} if kind == "failed" else {10: value} if kind == "pruned" else curve
        error = f"ValueError: {EVIL}" if kind == "failed" else ""
        made.append(
            SearchTrial(number, kind, params, values, curve, seconds, error, f"runs/s/trials/{number}")
        )
    return tuple(made)


def search(made, objectives=("query_loss",), **fields):
    return Search("mine", "maml-glyphs", tuple(map(Objective, objectives)), made, planned=200, **fields)


def test_page_of_a_search():
    found = search(
        trials(60),
        importances={"maml.rate": 0.7, "net": 0.2, "num_steps": 0.1},
        log_scale=frozenset({"maml.rate"}),
        facts=(("Sampler", "tpe"),),
        commands=(("Go on", f"bilevel search x {EVIL}"),),
    )
    text = render_search(found)
    page = assert_self_contained(text)
    best = min(t.values[0] for t in found.trials if t.values)
    for part in (f"{best:.3f}", "42 finished, 12 pruned, 6 failed of 200 planned", "70 %", "best so far",
                 "Pruned against finished", "the best 4", "runs/s/trials/9", "ValueError"):  # fmt: skip
        assert part in page.text, part
    assert "<script" not in text
    assert "prefers-color-scheme" in text
    assert page.text.count("ValueError") == 6 + 1  # in the table, and once in the summary


def test_best_first_in_the_table():
    found = search(trials(30))
    text = render_search(found)
    rows = text[text.index("All trials") :].split('<tr><th scope="row">')[1:]
    numbers = [int(row.split("<")[0]) for row in rows]
    assert numbers[:5] == [t.number for t in found.ranked()[:5]]
    assert sorted(numbers) == list(range(30))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_trials(count):
    page = assert_self_contained(render_search(search(trials(count))))
    assert ("No trial has begun yet" in page.text) == (count == 0)
    assert "What mattered" not in page.text


def test_nothing_but_failures():
    failed = [SearchTrial(i, "failed", {"rate": 0.1}, (), {}, 1.0, "OSError: no space") for i in range(4)]
    page = assert_self_contained(render_search(search(tuple(failed))))
    assert "There is no best trial: all trials failed" in page.text
    assert "trials 0, 1, 2 and 1 more: OSError: no space" in page.text


def test_values_that_are_no_numbers():
    values = [math.nan, 0.5, math.inf, 0.25]
    made = tuple(SearchTrial(i, "finished", {"rate": 0.1 * (i + 1)}, (v,)) for i, v in enumerate(values))
    page = assert_self_contained(render_search(search(made)))
    assert "0.250" in page.text and "2 values not finite" in page.text
    assert [t.number for t in search(made).ranked()] == [3, 1]


def test_a_thousand_trials():
    text = render_search(search(trials(1000)))
    assert len(text) < 2_000_000
    page = assert_self_contained(text)
    assert "of 700 finished trials are drawn" in page.text


def test_two_objectives():
    found = search(trials(40, 2), ("query_loss", "seconds"))
    page = assert_self_contained(render_search(found))
    assert "Trade-off" in page.text and "not dominated" in page.text
    best = {t.number for t in found.not_dominated()}
    for trial in found.of("finished"):
        beaten = any(
            o.values != trial.values and o.values[0] <= trial.values[0] and o.values[1] <= trial.values[1]
            for o in found.of("finished")
        )
        assert (trial.number in best) == (not beaten)


def test_maximized_objectives():
    made = tuple(SearchTrial(i, "finished", {"a": i}, (i / 10, 1.0)) for i in range(5))
    found = Search("x", "y", (Objective("query_accuracy", True), Objective("seconds")), made)
    assert found.ranked()[0].number == 4
    assert [t.number for t in found.not_dominated()] == [4]


def make_search(folder, **fields):
    """A search folder whose study has 30 finished trials, in which only `rate` matters."""
    made = spec.Search(
        NAME, to_fields(Number()), {"rate": "log:1e-3..0.3", "nothing": "a|b"}, ("outer_loss",),
        ("minimize",), 40, str(folder / spec.JOURNAL), "mine", **fields,
    )  # fmt: skip
    spec.write_search(folder, made)
    study = create_study(made).study
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    for _ in range(30):
        trial = study.ask()
        rate = trial.suggest_float("rate", 1e-3, 0.3, log=True)
        trial.suggest_categorical("nothing", ("a", "b"))
        study.tell(trial, (math.log(rate) + 3) ** 2)
    trial = study.ask()
    trial.set_user_attr("error", f"ValueError: {EVIL}")
    study.tell(trial, state=optuna.trial.TrialState.FAIL)
    return folder


def test_report_reads_a_study(tmp_path):
    folder = make_search(tmp_path / "mine")
    assert is_search(folder) and not is_search(tmp_path)
    out = search_report(folder)
    assert out == folder / "report.html"
    page = assert_self_contained(out.read_text(encoding="utf-8"))
    for part in ("30 finished, 1 failed of 40 planned", "Outer loss",
                 "optuna-dashboard", "--resume", "bilevel search promote"):  # fmt: skip
        assert part in page.text, part
    found = read_study(folder)
    assert found.log_scale == {"rate"}
    assert found.importances["rate"] > 0.8
    assert sum(found.importances.values()) == pytest.approx(1)


def test_report_of_what_is_no_search(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no search"):
        search_report(tmp_path)


def story():
    """Three members, three rounds: 2 copies 0 after the first round, 0 copies 2 after the second."""
    rates = ((0.1, 0.2, 0.9), (0.1, 0.2, 0.12), (0.144, 0.2, 0.12))
    values = ((1.0, 2.0, math.nan), (0.5, 1.9, 0.4), (0.3, 1.8, 0.2))
    copies = ((None, None, 0), (2, None, None), (None, None, None))
    stages = tuple(
        tuple(
            Stage(v, {"rate": r, "net": EVIL}, c, {"rate": (0.1, 0.12)} if c is not None else {}, error)
            for v, r, c, error in zip(vs, rs, cs, ("", "", EVIL if vs is values[0] else ""), strict=True)
        )
        for vs, rs, cs in zip(values, rates, copies, strict=True)
    )
    folders = ("p/members/00", "p/members/01", "p/members/02")
    return PopulationStory("mine", "maml", Objective("query_loss"), (10, 20, 30), stages, 4, folders)


def test_page_of_a_population():
    page = assert_self_contained(render_population(story()))
    for part in ("0.200", "member 2 at outer step 30", "3 of 4 rounds", "rate 0.1 → 0.12", "Lineage"):
        assert part in page.text, part


def test_ancestors_follow_the_copies():
    assert story().ancestors() == [0, 2, 2]
    early = dataclasses.replace(story(), stages=story().stages[:1], steps=(10,))
    assert early.best() == 0 and early.ancestors() == [0]
    assert_self_contained(render_population(early))


def test_report_reads_a_population(tmp_path):
    population = Population(
        NAME,
        to_fields(Number()),
        {"rate": "log:1e-3..0.3"},
        members=2,
        interval=20,
        command=f"bilevel {EVIL}",
    )
    write_population(tmp_path, population)
    assert "No round has ended yet" in search_report(tmp_path).read_text(encoding="utf-8")
    row = {"round": 0, "step": 20, "hyperparameters": {"rate": 0.1}, "explored": {}}
    rows = [
        row | {"member": 0, "value": None, "error": "ValueError: x", "copied_from": 1, "next": {"rate": 0.1}},
        row | {"member": 1, "value": 0.5, "error": "", "copied_from": None, "next": {"rate": 0.1}},
    ]
    (tmp_path / LINEAGE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = assert_self_contained(search_report(tmp_path).read_text(encoding="utf-8"))
    assert "1 of 2 rounds" in page.text and "member 1 at outer step 20" in page.text
