"""Population-based training: its rules, what it finds, and that a kill at any moment changes nothing."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import pytest
from population_recipe import NAME, Number

from bilevel.recipes.config import to_fields
from bilevel.recipes.evaluation import read_trained
from bilevel.recipes.run import saved_recipe
from bilevel.search import population_commands, population_member, worker
from bilevel.search.population import train_population
from bilevel.search.population_commands import run_population
from bilevel.search.population_member import member_folder, read_member
from bilevel.search.population_rules import Rules, decide, first_hyperparameters, perturb
from bilevel.search.population_spec import (
    LINEAGE,
    Population,
    check_space,
    outcome,
    read_lineage,
    read_population,
    write_population,
)
from bilevel.search.space import Choices, Numbers
from bilevel.train.metrics import read_metrics

SPACE = {
    "rate": Numbers(1e-3, 0.3, log=True),
    "width": Numbers(8, 64, whole=True, step=8),
    "count": Numbers(1, 9, whole=True),
    "net": Choices(("a", "b"), ("a", "b")),
}


def small(**fields):
    """Three members whose best rate is the largest: 0.25 brings the number to 3, 0.001 does not."""
    usual: dict[str, Any] = {"members": 3, "interval": 4, "seed": 1}
    usual |= {"space": {"rate": "log:1e-3..0.3"}, "fields": to_fields(Number(num_meta_steps=12, seed=1))}
    return Population(NAME, **usual | fields)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("population") / "undisturbed"
    write_population(folder, small())
    train_population(folder)
    return folder


def states(folder):
    """The last state of every member."""
    return [jax.tree.map(np.asarray, read_trained(member_folder(folder, i)).meta) for i in range(3)]


def assert_same(folder, other):
    assert (folder / LINEAGE).read_bytes() == (other / LINEAGE).read_bytes()
    for here, there in zip(states(folder), states(other), strict=True):
        np.testing.assert_array_equal(here, there)
    for i in range(3):
        rows = [read_metrics(member_folder(f, i) / "metrics.jsonl") for f in (folder, other)]
        losses = [[(row["step"], row["outer_loss"]) for row in each] for each in rows]
        assert losses[0] == losses[1]


# The rules


def test_the_worst_copy_the_best():
    held = first_hyperparameters(SPACE, 8, Rules())
    values = [float(i) for i in range(8)]
    made = decide(SPACE, held, values, False, 0, Rules())
    assert [d.copied_from is not None for d in made] == [False] * 6 + [True] * 2
    assert {d.copied_from for d in made} <= {None, 0, 1}
    upwards = decide(SPACE, held, values, True, 0, Rules())
    assert [d.copied_from is not None for d in upwards] == [True] * 2 + [False] * 6
    for member in range(6):
        assert made[member].hyperparameters == held[member] and not made[member].explored


def test_what_failed_copies_whatever_its_place():
    held = first_hyperparameters(SPACE, 8, Rules())
    values = [1.0, math.nan, 2.0, math.nan, math.inf, 3.0, math.nan, math.nan]
    made = decide(SPACE, held, values, False, 0, Rules())
    assert [m for m, d in enumerate(made) if d.copied_from is not None] == [1, 3, 4, 6, 7]
    assert {d.copied_from for d in made} <= {None, 0, 2}
    nobody = decide(SPACE, held, [math.nan] * 8, False, 0, Rules())
    assert all(d.copied_from is None for d in nobody)


def test_decisions_replay_and_depend_on_seed_and_round():
    held = first_hyperparameters(SPACE, 8, Rules())
    values = [float(i) for i in range(8)]
    first = decide(SPACE, held, values, False, 3, Rules())
    assert first == decide(SPACE, held, values, False, 3, Rules())
    assert first != decide(SPACE, held, values, False, 4, Rules())
    assert first != decide(SPACE, held, values, False, 3, Rules(seed=1))


def test_what_is_explored_stays_in_the_space():
    rules = Rules(resample=0.3, factors=(0.1, 0.8, 1.2, 10.0))
    held = first_hyperparameters(SPACE, 8, rules)
    for round_number in range(40):
        values = np.random.default_rng(round_number).random(8).tolist()
        made = decide(SPACE, held, values, False, round_number, rules)
        held = [d.hyperparameters for d in made]
        for each in held:
            assert 1e-3 <= each["rate"] <= 0.3
            assert isinstance(each["width"], int) and each["width"] % 8 == 0 and 8 <= each["width"] <= 64
            assert isinstance(each["count"], int) and 1 <= each["count"] <= 9
            assert each["net"] in ("a", "b")
        assert all(d.copied_from is None or d.explored for d in made), "a copy changes something"


def test_first_hyperparameters_cover_every_range():
    held = first_hyperparameters(SPACE, 8, Rules(seed=3))
    places = sorted(SPACE["rate"].place(each["rate"]) for each in held)
    assert [int(8 * place) for place in places] == list(range(8))
    assert sorted(each["width"] for each in held) == list(range(8, 65, 8))
    assert sorted(each["net"] for each in held) == ["a"] * 4 + ["b"] * 4


def test_perturbed_numbers_move():
    assert perturb(SPACE["count"], 1, 1.2) == 2 and perturb(SPACE["count"], 2, 0.8) == 1
    assert perturb(SPACE["width"], 16, 0.8) == 8 and perturb(SPACE["width"], 16, 1.2) == 24
    assert perturb(Numbers(-1.0, 1.0), -0.5, 1.2) == -0.6
    # At its end a value moves back: a copy that changes nothing would learn nothing new.
    assert perturb(SPACE["rate"], 0.3, 1.2) == 0.25 and perturb(SPACE["width"], 64, 1.2) == 56
    assert perturb(SPACE["count"], 1, 0.8) == 2
    assert perturb(SPACE["net"], "a", 1.2) == "a"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"quantile": 0.6}, "quantile"),
        ({"resample": 2.0}, "resample"),
        ({"factors": (0.0,)}, "factors"),
        ({"members": 1}, "2 members"),
        ({"interval": 13}, "interval"),
        ({"direction": "up"}, "direction"),
    ],
)
def test_numbers_out_of_range_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        small(**fields)


# What may be searched


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"size": "int:1..3"}, r"--space.size: .* at 3 the state has float32\[3\] at meta, not float32\[1\]"),
        ({"num_meta_steps": "int:1..3"}, "schedules follow"),
        ({"seed": "int:1..3"}, "same tasks"),
        ({"loop.chunk_size": "int:1..3"}, "does not decide"),
        ({"ratte": "log:1e-3..1"}, "did you mean rate"),
    ],
)
def test_fields_that_members_cannot_exchange_are_refused(space, said):
    with pytest.raises(ValueError, match=said):
        check_space(Population(NAME, to_fields(Number()), space, interval=4))


def test_fields_that_they_can_exchange_are_not():
    check_space(Population(NAME, to_fields(Number()), {"rate": "log:1e-3..1", "nothing": "a|b"}, interval=4))


# What comes out


def test_it_finds_a_better_rate(undisturbed):
    rows = read_lineage(undisturbed)
    assert len(rows) == 9 and outcome(undisturbed).complete
    first, last = rows[:3], rows[-3:]
    worst = max(first, key=lambda row: row["value"])
    assert worst["copied_from"] is not None
    assert worst["next"]["rate"] > 3 * worst["hyperparameters"]["rate"]
    # Left alone at its first rate, the worst member would not have come near.
    best = min(row["value"] for row in last)
    alone = worst["value"] * (1 - worst["hyperparameters"]["rate"]) ** 50
    assert last[worst["member"]]["value"] < alone / 10
    assert outcome(undisturbed).value == best


def test_a_copy_goes_on_where_the_donor_was(undisturbed):
    for row in read_lineage(undisturbed):
        if row["copied_from"] is None:
            continue
        assert row["copied_from"] != row["member"]
    # The history of a member's metrics is that of its parameters.
    rows = read_lineage(undisturbed)
    copy = next(row for row in rows if row["round"] == 1 and row["copied_from"] is not None)
    last = [read_metrics(member_folder(undisturbed, i) / "metrics.jsonl") for i in range(3)]
    mine, theirs = last[copy["member"]], last[copy["copied_from"]]
    upto = [[r["outer_loss"] for r in each if r["step"] <= copy["step"]] for each in (mine, theirs)]
    assert upto[0] == upto[1]
    assert mine[-1]["outer_loss"] != theirs[-1]["outer_loss"]


def test_members_are_ordinary_runs(undisturbed):
    rows = read_lineage(undisturbed)[-3:]
    for row in rows:
        run = member_folder(undisturbed, row["member"])
        assert saved_recipe(run).rate == row["hyperparameters"]["rate"]
        assert read_trained(run).meta_step == 12  # checks the fingerprint too
        assert read_metrics(run / "metrics.jsonl")[-1]["outer_loss"] == pytest.approx(row["value"])


def test_the_lineage_replays(undisturbed):
    """Every decision in the file is the one that the rules take from the values in it."""
    population, rows = read_population(undisturbed), read_lineage(undisturbed)
    space = population.build_space()
    assert [r["hyperparameters"] for r in rows[:3]] == first_hyperparameters(space, 3, population.rules)
    for number in range(2):
        ended, after = rows[3 * number : 3 * number + 3], rows[3 * number + 3 : 3 * number + 6]
        held, values = [r["hyperparameters"] for r in ended], [r["value"] for r in ended]
        made = decide(space, held, values, False, number, population.rules)
        assert [d.copied_from for d in made] == [r["copied_from"] for r in ended]
        assert [d.hyperparameters for d in made] == [r["next"] for r in ended]
        assert [r["next"] for r in ended] == [r["hyperparameters"] for r in after]


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def test_killed_at_many_moments(undisturbed, tmp_path, monkeypatch):
    """Every durable step ends in a rename: die before or after the next one, again and again."""
    write_population(tmp_path, small())
    replace, left = os.replace, [0]
    deaths = 0

    def dying(source, target):
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        replace(source, target)
        if left[0] == -1:
            raise Killed

    monkeypatch.setattr(os, "replace", dying)
    for life in range(60):
        left[0] = (5 + 3 * life) if life % 2 else 4 + 2 * life  # longer and longer lives
        try:
            train_population(tmp_path)
        except Killed:
            deaths += 1
            continue
        break
    assert deaths >= 4
    assert_same(tmp_path, undisturbed)


def test_killed_for_real(undisturbed, tmp_path, monkeypatch):
    """Two processes side by side, one of them killed while it trains; the other ends the work."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # what is being written there at the kill stays broken
    write_population(tmp_path, small())
    code = (
        "import os; os.environ['JAX_PLATFORMS'] = 'cpu'; from pathlib import Path;"
        "from bilevel.search.population import train_population as t;"
        f"t(Path({str(tmp_path)!r}))"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    try:
        trained = tmp_path / LINEAGE
        while not trained.exists() and all(worker.poll() is None for worker in workers):
            time.sleep(0.05)
        workers[0].send_signal(signal.SIGKILL)
        assert workers[1].wait(timeout=200) == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert outcome(tmp_path).complete
    assert_same(tmp_path, undisturbed)


def test_a_member_that_fails_is_replaced(tmp_path):
    """Above 2 the descent diverges at once."""
    write_population(tmp_path, small(space={"rate": "log:1e-3..1e38"}, interval=6, seed=0))
    train_population(tmp_path)
    rows = read_lineage(tmp_path)
    failed = [row for row in rows[:3] if row["error"]]
    assert failed and all(row["copied_from"] is not None and row["value"] is None for row in failed)
    assert outcome(tmp_path).complete and math.isfinite(outcome(tmp_path).value)


def test_all_failing_is_an_end(tmp_path):
    write_population(tmp_path, small(fields=to_fields(Number(num_meta_steps=12, broken="later")), members=2))
    train_population(tmp_path)
    assert not outcome(tmp_path).complete
    assert outcome(tmp_path).error == "ValueError: it breaks"
    assert "it breaks" in (member_folder(tmp_path, 0) / "train.log").read_text()


def test_judged_on_validation_tasks(tmp_path):
    write_population(tmp_path, small(objective="validation_loss", members=2, interval=12, validation_tasks=2))
    train_population(tmp_path)
    for row in read_lineage(tmp_path):
        meta = read_trained(member_folder(tmp_path, row["member"])).meta
        assert row["value"] == pytest.approx(float(np.sum((np.asarray(meta) - 3) ** 2) / 2), rel=1e-5)


def test_an_unknown_figure_is_named(tmp_path):
    write_population(tmp_path, small(objective="accuracy", interval=12, members=2))
    train_population(tmp_path)
    assert "no figure accuracy to judge by; there are" in outcome(tmp_path).error


def test_member_file_survives_what_is_no_number(tmp_path):
    population_member.write_member(
        tmp_path, population_member.Member(2, {"rate": 0.1}, math.nan, "OSError: x")
    )
    assert json.loads((tmp_path / "member.json").read_text())["value"] is None
    member = read_member(tmp_path)
    assert member is not None and member.error == "OSError: x"
    assert member.value is not None and math.isnan(member.value)


# The command


class Here:
    """A launcher whose one worker is this process."""

    def run(self, folder, workers):
        train_population(folder)


FLAGS = [
    "--num-meta-steps",
    "12",
    "--population",
    "3",
    "--interval",
    "4",
    "--seed",
    "1",
    "--space.rate",
    "log:1e-3..0.3",
]


def test_the_command_and_its_resumption(undisturbed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(population_commands, "LocalLauncher", Here)
    folder = tmp_path / "population"
    words = [NAME, "--method", "pbt", *FLAGS, "--folder", str(folder)]
    assert run_population(words) == 0
    said = capsys.readouterr().out
    assert "3 members, 3 rounds of 4 outer steps" in said and "round 3/3, outer step 12" in said
    best = outcome(folder).best
    assert best is not None and f"bilevel eval {member_folder(folder, best)}" in said
    assert (folder / LINEAGE).read_bytes() == (undisturbed / LINEAGE).read_bytes()
    with pytest.raises(FileExistsError, match="go on with --resume"):
        run_population(words)
    with pytest.raises(ValueError, match="interval is 4 there and 6 here"):
        run_population([NAME, "--folder", str(folder), "--resume", "--interval", "6"])
    assert run_population([NAME, "--folder", str(folder), "--resume"]) == 0
    assert "round" not in capsys.readouterr().out.replace("rounds", "")


def test_an_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    class Interrupted:
        def run(self, folder, workers):
            raise KeyboardInterrupt

    monkeypatch.setattr(population_commands, "LocalLauncher", Interrupted)
    assert run_population([NAME, *FLAGS, "--folder", str(tmp_path / "p")]) == 130
    said = capsys.readouterr().out
    assert f"go on with: bilevel search {NAME} --method pbt --folder {tmp_path / 'p'} --resume" in said


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["--space.rate", "log:1e-3..0.3", "--population", "1"], ValueError, "2 members"),
        (["--space.rate", "log:1e-3..0.3", "--workers", "0"], ValueError, "--workers"),
        (["--space.rate", "log:1e-3..0.3", "--address", "x:1"], ValueError, "--launcher ray"),
        (["--space.rate", "log:1e-3..0.3", "--objective", "beauty"], ValueError, "--direction"),
        (["--space.size", "int:1..2"], ValueError, "without --method pbt"),
        (["--space.rate", "0.3..0.1"], ValueError, "empty"),
        ([], ValueError, "nothing is searched"),
        (["--resume"], FileNotFoundError, "holds no population"),
    ],
)
def test_flags_that_make_no_sense_leave_nothing_behind(tmp_path, words, error, said):
    with pytest.raises(error, match=said):
        run_population([NAME, *words, "--folder", str(tmp_path / "p")])
    assert not (tmp_path / "p").exists()


def test_all_failing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(population_commands, "LocalLauncher", Here)
    with pytest.raises(ValueError, match="all 3 members failed: ValueError: it breaks"):
        run_population([NAME, *FLAGS, "--broken", "later", "--folder", str(tmp_path / "p")])


def test_workers_of_a_search_train_populations(undisturbed, tmp_path):
    write_population(tmp_path, small())
    worker.work(tmp_path, 0)
    assert_same(tmp_path, undisturbed)
