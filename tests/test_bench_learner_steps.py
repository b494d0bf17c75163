"""The benchmark of the learners' outer steps: nobody is compared with other work, and nobody hangs it."""

import importlib
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "bench"
SAYS = "print('{{\"ms\": 1.5}}', flush=True); {then}"


@pytest.fixture(scope="module")
def tools():
    """The benchmark's modules, which are no package."""
    before, paths = set(sys.modules), list(sys.path)
    sys.path[:0] = [str(BENCH), str(BENCH / "peers")]
    try:
        yield {name: importlib.import_module(name) for name in ("learner_steps", "learner_works", "data")}
    finally:
        sys.path[:] = paths
        for name in set(sys.modules) - before:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(BENCH)):
                del sys.modules[name]


def contender(tools, then, patience=60.0):
    return tools["learner_steps"].Contender(sys.executable, "-c", SAYS.format(then=then), patience=patience)


def test_every_learner_has_both_sides(tools):
    assert list(tools["learner_works"].ROWS) == list(tools["data"].LEARNERS)


def test_other_losses_are_not_compared(tools):
    ours = {"value": 2.0, "third_value": 1.0}
    disagreement = tools["learner_steps"].disagreement
    assert disagreement(ours, {"value": 2.0001, "third_value": 1.0005}) == ""
    assert disagreement(ours, {"value": 2.001, "third_value": 1.0}) == "value is off by 5.0e-04"
    assert "third_value is off" in disagreement(ours, {"value": 2.0, "third_value": float("nan")})


def test_a_turn_is_answered(tools):
    with contender(tools, "input(); print('{\"ms\": 2}', flush=True); input()") as process:
        assert process.listen() == {"ms": 1.5}
        assert process.turn() == {"ms": 2}
    assert process.process.returncode is not None  # nothing stays behind


def test_a_process_that_fails_says_why(tools):
    with contender(tools, "raise SystemExit('no such learner')") as process:
        process.listen()
        with pytest.raises(RuntimeError, match="no such learner"):
            process.listen()


def test_a_process_that_says_nothing_is_given_up(tools):
    with (
        contender(tools, "import time; time.sleep(600)", patience=2.0) as process,
        pytest.raises(RuntimeError, match="no answer in 2 s; raise --patience"),
    ):
        process.listen()  # on a busy machine this one is late already
        process.listen()
