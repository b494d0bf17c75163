"""The outer loop: exact resume however it ends, signals, and hypergradients that are not silent."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_recipe import Diverging, Small, Unused

import bilevel as bl
from bilevel.recipes.run import train_recipe
from bilevel.train.checkpoint import Checkpoints
from bilevel.train.metrics import read_metrics

RECIPE = f"{Path(__file__).parent / 'small_recipe.py'}:Small"
SLOW = Small(spin=400_000)
# One process imports the libraries; those that are killed are forked from it before JAX has made a thread.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["bilevel.search.commands"])


def parts(num_tasks=4):
    learner = bl.maml(bl.nets.mlp([1, 8, 1]), bl.learners.mean_squared_error, rates=0.01)
    optimizer = optax.adam(1e-2)
    sample = bl.tasks.batch(bl.tasks.sinusoid, num_tasks)
    return learner, optimizer, sample, bl.init_state(learner, optimizer, sample, jax.random.key(0))


def assert_bit_equal(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


def run_in(folder, recipe=None, resume=False):
    recipe = recipe or Small()
    return train_recipe(RECIPE, recipe, folder, resume, "bilevel train")


def final_state(folder, recipe):
    experiment = recipe.build()
    template = bl.init_state(
        experiment.learner, experiment.optimizer, experiment.sample_tasks, jax.random.key(recipe.seed)
    )
    fields = {k: v for k, v in vars(recipe).items() if k != "loop"}
    state, step = Checkpoints(folder / "checkpoints").restore(template, {"recipe": RECIPE, **fields})
    assert step == recipe.num_meta_steps
    return state


def test_chunks_do_not_change_the_result(optimized):
    *learner, state = parts()
    with optimized():
        ends = [bl.train(*learner, state, 10, options=bl.Options(chunk_size=n)) for n in (1, 3, 10, 64)]
    for end in ends[1:]:
        assert_bit_equal(ends[0], end)


def test_the_loop_equals_meta_steps_by_hand():
    learner, optimizer, sample, state = parts()
    seen = []
    end = bl.train(learner, optimizer, sample, state, 6, options=bl.Options(chunk_size=2),
                   on_chunk=[lambda state, values: seen.append((int(state.step), values))])  # fmt: skip
    step = jax.jit(lambda state, tasks: bl.meta_step(learner, optimizer, state, tasks))
    by_hand = state
    for i in range(6):
        key = jax.random.fold_in(jax.random.fold_in(state.key, 0x7A5C), i)
        by_hand, _ = step(by_hand, sample(key))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), end.meta, by_hand.meta)
    assert [s for s, _ in seen] == [2, 4, 6]
    assert {"outer_loss", "query_loss", "support_loss", "grad_norm"} <= set(seen[0][1])


def test_learning_happens():
    learner = bl.maml(bl.nets.mlp([1, 40, 40, 1]), bl.learners.mean_squared_error, rates=0.01)
    optimizer, sample = optax.adam(1e-3), bl.tasks.batch(bl.tasks.sinusoid, 16)
    state = bl.init_state(learner, optimizer, sample, jax.random.key(0))
    losses = []
    bl.train(learner, optimizer, sample, state, 1500, options=bl.Options(task_chunk=16),
             on_chunk=[lambda state, values: losses.append(values["query_loss"])])  # fmt: skip
    assert losses[-1] < 0.6 * losses[0]


def test_task_chunks_agree():
    *learner, state = parts()
    one, all_ = (bl.train(*learner, state, 5, options=bl.Options(task_chunk=size)).meta for size in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), one, all_)


@pytest.fixture(scope="module")
def never(tmp_path_factory):
    """A slow run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("never")
    return folder, run_in(folder, SLOW)


def _train(words, cache):
    """Keeps what it compiles apart from other tests: what it was writing when it was killed stays broken."""
    from bilevel.cli import main

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sys.exit(main(words))


def test_a_run_killed_ten_times_ends_bit_identical(never, tmp_path):
    """SIGKILL at random moments, some before the first step, most in the middle of the steps."""
    folder, chance = tmp_path / "killed", random.Random(0)
    command = ["train", RECIPE, "--folder", str(folder), "--spin", str(SLOW.spin)]
    command += ["--loop.checkpoint-every", "4"]
    kills, resume = 0, []
    for _ in range(40):
        process = SERVER.Process(target=_train, args=([*command, *resume], str(tmp_path / "programs")))
        process.start()
        # A kill before the first checkpoint repeats the start; waiting for the folder makes progress sure.
        _wait_for(folder / "config.json", process)
        resume = ["--resume"]
        before = _steps(folder)
        if kills < 10:
            _wait_until(lambda before=before: _steps(folder) > before, process)
            time.sleep(chance.uniform(0, 0.08))
            if process.is_alive():
                process.kill()
                kills += 1
                process.join()
                continue
        process.join(timeout=120)
        assert process.exitcode == 0
        break
    assert kills >= 5, "the run ended before it could be killed often enough"
    assert_bit_equal(never[1], final_state(folder, SLOW))
    rows = [read_metrics(each / "metrics.jsonl") for each in (never[0], folder)]
    timed = {"time", "steps_per_second"}
    clean = [[{k: v for k, v in row.items() if k not in timed} for row in table] for table in rows]
    assert clean[0] == clean[1]


def _steps(folder: Path) -> int:
    return max((int(p.name) for p in (folder / "checkpoints").glob("[0-9]*")), default=0)


def _wait_for(path: Path, process) -> None:
    _wait_until(path.exists, process)


def _wait_until(condition, process, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    running = process.is_alive if hasattr(process, "is_alive") else lambda: process.poll() is None
    while not condition() and running():
        assert time.monotonic() < end, "the run makes no progress"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_checkpoint_and_leave_cleanly(never, tmp_path, number):
    folder = tmp_path / "run"
    words = ["train", RECIPE, "--folder", str(folder), "--spin", str(SLOW.spin)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bilevel", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _wait_for(folder / "metrics.jsonl", process)
    _wait_until(lambda: read_metrics(folder / "metrics.jsonl"), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "checkpoint saved" in out and "--resume" in out
    assert "Traceback" not in err
    stopped = _steps(folder)
    assert 0 < stopped < 60
    assert_bit_equal(run_in(folder, SLOW, resume=True), never[1])


def test_a_diverging_run_stops_and_keeps_the_last_good_state(tmp_path):
    with pytest.raises(bl.HypergradientError, match=r"not finite: meta\['init'\].*not taken.*lower"):
        run_in(tmp_path / "run", Diverging())
    recipe = Diverging(num_meta_steps=_steps(tmp_path / "run"))
    assert recipe.num_meta_steps >= 1
    experiment = recipe.build()
    template = bl.init_state(
        experiment.learner, experiment.optimizer, experiment.sample_tasks, jax.random.key(0)
    )
    fields = {k: v for k, v in vars(Diverging()).items() if k != "loop"}
    state, _ = Checkpoints(tmp_path / "run" / "checkpoints").restore(template, {"recipe": RECIPE, **fields})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.meta))


def test_the_state_before_a_bad_step_is_that_of_a_run_which_ends_there():
    """In the middle of a chunk: its root falls below zero after a few steps."""
    problem = bl.Problem(
        lambda meta, key: meta,
        lambda params, meta, batch, key: 0.5 * (params - meta) ** 2,
        lambda params, meta, batch, key: jnp.sqrt(params),
    )
    learner = bl.Learner(problem, bl.inner.Gradient(optax.sgd(0.1), 1), bl.hypergrad.Mixed())
    optimizer, seen = optax.sgd(1.0), []

    def sample(key):
        return bl.Task(jnp.zeros((2, 1)), jnp.zeros((2, 1)))

    state = bl.init_state(learner, optimizer, sample, jax.random.key(0), jnp.float32(3.0))
    with pytest.raises(bl.HypergradientError, match="not finite: meta"):
        bl.train(learner, optimizer, sample, state, 20, options=bl.Options(chunk_size=20),
                 on_chunk=[lambda state, values: seen.append(state)])  # fmt: skip
    (last,) = seen
    assert 3 < int(last.step) < 20 and np.isfinite(last.meta)
    assert_bit_equal(last, bl.train(learner, optimizer, sample, state, int(last.step)))


def test_an_idle_leaf_stops_the_run_unless_it_is_meant():
    experiment = Unused().build()
    parts = experiment.learner, experiment.optimizer, experiment.sample_tasks
    state = bl.init_state(*parts, jax.random.key(0))
    with pytest.raises(bl.HypergradientError, match=r"exactly zero .* meta\['idle'\].*Take it out"):
        bl.train(*parts, state, 4)
    assert int(bl.train(*parts, state, 4, options=bl.Options(zero_leaves="allow")).step) == 4


def test_first_order_of_a_learned_rate_is_said_twice():
    learner = bl.maml(
        bl.nets.mlp([1, 8, 1]),
        bl.learners.mean_squared_error,
        rates=bl.learners.PerParameter(0.01),
        estimator=bl.hypergrad.FirstOrder(),
    )
    sample = bl.tasks.batch(bl.tasks.sinusoid, 4)
    state = bl.init_state(learner, optax.adam(1e-3), sample, jax.random.key(0))
    with (
        pytest.warns(bl.FirstOrderWarning, match="rates"),
        pytest.raises(bl.HypergradientError, match="rates"),
    ):
        bl.train(learner, optax.adam(1e-3), sample, state, 3)


@pytest.mark.parametrize(
    "wrong", [{"chunk_size": 0}, {"task_chunk": 0}, {"keep_checkpoints": 0}, {"zero_leaves": "ignore"}]
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        bl.Options(**wrong)


def test_evaluation_starts_at_the_meta_learned_model_and_has_honest_intervals():
    learner, _, _, state = parts()
    key = jax.random.key(3)
    result = bl.evaluate(learner, state.meta, bl.tasks.sinusoid, key, num_tasks=30, num_steps=4)
    curve = result.curves["query_loss"]
    assert curve.mean.shape == curve.ci95.shape == (5,) and result.num_steps == 4

    @jax.jit
    def loss(one):
        task_key, one = jax.random.split(one)
        task = bl.tasks.sinusoid(task_key)
        params = bl.adapt(learner, state.meta, task, one, num_steps=4)
        return learner.problem.outer_loss(params, state.meta, task.query, one)

    losses = [loss(one) for one in jax.random.split(key, 30)]
    np.testing.assert_allclose(curve.mean[-1], np.mean(losses), rtol=1e-4)
    np.testing.assert_allclose(curve.ci95[-1], 1.96 * np.std(losses, ddof=1) / 30**0.5, rtol=1e-4)
    with pytest.raises(ValueError, match="num_tasks"):
        bl.evaluate(learner, state.meta, bl.tasks.sinusoid, key, num_tasks=1)


def test_without_a_folder_nothing_is_written(tmp_path):
    *learner, state = parts()
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        bl.train(*learner, state, 2)
    finally:
        os.chdir(here)
    assert not list(tmp_path.iterdir())
