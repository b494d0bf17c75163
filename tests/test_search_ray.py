"""A search on Ray: workers that are killed are started again, and errors say what to do."""

import importlib.util
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from optuna.trial import TrialState
from population_recipe import NAME, Number

from bilevel.recipes.config import to_fields
from bilevel.search import ray_workers, spec
from bilevel.search.ray_workers import RayLauncher
from bilevel.search.study import FINISHED, create_study
from bilevel.train.metrics import read_metrics

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='RAY IS NOT INSTALLED: pip install "bilevel[ray]"'
)
_TRIALS = 3  # two side by side, and one that begins when another has ended


@needs_ray
def test_a_killed_worker_is_replaced_and_no_trial_repeated(tmp_path, capfd, monkeypatch):
    """Kill the process that runs a trial in its middle, found by what it wrote into the study."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")  # what is being written there at the kill stays broken
    recipe = Number(num_meta_steps=12, pause=0.05)
    search = spec.Search(
        NAME, to_fields(recipe), {"rate": "log:1e-3..0.3"}, ("outer_loss",), ("minimize",), _TRIALS,
        str(tmp_path / spec.JOURNAL), "mine",
    )  # fmt: skip
    spec.write_search(tmp_path, search)
    book = create_study(search)
    before: dict[int, bytes] = {}
    victim: list[int] = []

    def kill():
        while not victim:
            time.sleep(0.02)
            done = book.trials(TrialState.COMPLETE)
            for trial in book.trials(TrialState.RUNNING) if done else ():
                rows = tmp_path / "trials" / f"{trial.number:04d}" / "metrics.jsonl"
                if rows.exists() and rows.read_text().count("\n") == 1:
                    before.update({t.number: _metrics(tmp_path, t.number) for t in done})
                    victim.append(trial.number)
                    os.kill(trial.user_attrs["pid"], signal.SIGKILL)
                    return

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    RayLauncher().run(tmp_path, 2)
    thread.join(timeout=10)
    assert victim and before, "nothing was killed"
    trials = book.trials()
    assert len(trials) == _TRIALS and all(trial.state == TrialState.COMPLETE for trial in trials)
    assert len({trial.params["rate"] for trial in trials}) == _TRIALS
    killed = next(trial for trial in trials if trial.number == victim[0])
    assert killed.user_attrs["deaths"], "it was not taken up again"
    assert all(not t.user_attrs.get("deaths") for t in trials if t.number != victim[0])
    for number, bytes_then in before.items():  # what had ended was left as it was
        assert _metrics(tmp_path, number) == bytes_then
    for trial in trials:
        steps = [row["step"] for row in read_metrics(_run(tmp_path, trial.number) / "metrics.jsonl")]
        assert steps == sorted(set(steps)) and steps[-1] == 12
    assert len(book.trials(*FINISHED)) == _TRIALS
    said = capfd.readouterr()
    assert "raylet" not in said.out + said.err, "Ray's own lines belong in its logs"


def _run(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number:04d}"


def _metrics(folder: Path, number: int) -> bytes:
    return (_run(folder, number) / "metrics.jsonl").read_bytes()


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "no-such-host.invalid:6379"])
def test_an_address_that_answers_nothing(tmp_path, address):
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"nothing answers at .*ray start --head"):
        RayLauncher(address).run(tmp_path, 1)
    assert time.monotonic() - began < 60


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_workers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "bilevel\[ray\]"'):
        RayLauncher().run(tmp_path, 1)


def test_numbers_below_zero_are_refused():
    with pytest.raises(ValueError, match="num_cpus of a worker must be at least 0"):
        RayLauncher(num_cpus=-1)
