"""A search that is killed, in whole or in part, ends as one that was not: nothing lost, nothing run twice."""

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState

from bilevel.search.commands import run_search
from bilevel.search.spec import read_search, trial_folder
from bilevel.search.study import FINISHED, has_study, open_book
from bilevel.train.metrics import read_metrics

RECIPE = str(Path(__file__).parent / "search_recipe.py") + ":Quadratic"
WORDS = [RECIPE, "--space.rate", "log:1e-3..0.4", "--spin", "1000000"]
# One process imports the libraries; those that are killed are forked from it before JAX has made a thread.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["bilevel.search.commands"])


def search_in_a_process(cache, *words):
    process = SERVER.Process(target=_search, args=(words, str(cache)))
    process.start()
    return process


def _search(words, cache):
    """Keeps what it compiles apart from other tests: what it was writing when it was killed stays broken."""
    import jax

    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache  # for workers that it starts
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sys.exit(run_search(list(words)))


def wait_for(condition, process=None, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.is_alive(), f"ended with {process.exitcode} before it came to that"
        assert time.monotonic() < end, "it did not come to that in time"
        time.sleep(0.01)


def step_of(folder, number):
    path = trial_folder(folder, number) / "metrics.jsonl"
    rows = read_metrics(path) if path.is_file() else []
    return rows[-1]["step"] if rows else 0


def trials_of(folder):
    return open_book(read_search(folder)).trials()


def finished(folder):
    """What of the finished trials must never change again."""
    search = read_search(folder)
    if not has_study(search.storage, search.name):  # killed between the journal and the study in it
        return {}
    done = [trial for trial in trials_of(folder) if trial.state in FINISHED]
    files = {t.number: (trial_folder(folder, t.number) / "metrics.jsonl").read_bytes() for t in done}
    return {t.number: (t.params, t.values, t.datetime_complete, files[t.number]) for t in done}


def endings(folder):
    """How often each trial was told as finished, as the journal has it."""
    lines = [json.loads(line) for line in (folder / "journal.log").read_text().splitlines()]
    told = [each["trial_id"] for each in lines if each["op_code"] == 6 and each["state"] in (1, 2, 3)]
    return {trial: told.count(trial) for trial in told}


def test_a_search_killed_at_any_moment_ends_as_the_one_that_was_not(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run_search([*WORDS, "--num-trials", "4", "--folder", str(whole)]) == 0
    words = [*WORDS, "--num-trials", "4", "--folder", str(cut)]
    moments = [
        lambda: (cut / "journal.log").exists(),  # while trials are put into the study
        lambda: (trial_folder(cut, 0) / "config.json").exists(),  # before the first checkpoint
        lambda: step_of(cut, 0) >= 4,  # within a trial
        lambda: trial_folder(cut, 1).exists(),  # about to build one
        lambda: step_of(cut, 2) >= 8,  # about to tell
    ]
    before = {}
    for i, moment in enumerate(moments):
        process = search_in_a_process(tmp_path / "programs", *words, *(["--resume"] if i else []))
        wait_for(moment, process)
        process.kill()
        process.join()
        now = finished(cut)
        assert {number: now[number] for number in before} == before
        before = now
    assert run_search([*words, "--resume"]) == 0
    assert {n: kept for n, kept in finished(cut).items() if n in before} == before
    outcome = [(t.number, t.params, t.values, t.state, t.intermediate_values) for t in trials_of(whole)]
    assert [(t.number, t.params, t.values, t.state, t.intermediate_values) for t in trials_of(cut)] == outcome
    assert sorted(endings(cut).values()) == [1] * 4
    for number in range(4):  # each run has every step once
        rows = read_metrics(trial_folder(cut, number) / "metrics.jsonl")
        assert [row["step"] for row in rows] == [2, 4, 6, 8]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
def test_a_killed_worker_is_replaced_and_workers_end_with_their_driver(tmp_path):
    folder = tmp_path / "s"
    words = [*WORDS, "--num-trials", "5", "--pruner", "asha", "--folder", str(folder)]
    driver = search_in_a_process(tmp_path / "programs", *words, "--workers", "2")
    wait_for(lambda: len(children(driver.pid)) == 2, driver)
    wait_for(lambda: any(step_of(folder, n) >= 2 for n in range(5)), driver)
    running = [t for t in trials_of(folder) if t.state == TrialState.RUNNING and "pid" in t.user_attrs]
    number, victim = running[0].number, running[0].user_attrs["pid"]
    assert victim in children(driver.pid)
    done = finished(folder)
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(children(driver.pid)) == 2 and victim not in children(driver.pid), driver)
    wait_for(lambda: trials_of(folder)[number].state in FINISHED, driver)  # somebody took it up
    left = children(driver.pid)
    driver.kill()
    driver.join()
    wait_for(lambda: not any(alive(pid) for pid in left), seconds=60)
    between = finished(folder)
    assert {n: between[n] for n in done} == done
    assert run_search([*words, "--resume"]) == 0
    after = finished(folder)
    assert {n: after[n] for n in between} == between and len(after) == 5
    assert len(trials_of(folder)) == 5 and sorted(endings(folder).values()) == [1] * 5
    assert all(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials_of(folder))


def children(pid):
    text = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in text.read_text().split()] if text.exists() else []


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
