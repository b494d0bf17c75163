"""The benchmark of stochastic methods: ours and the reference take the same steps; tables stay in place."""

import importlib
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bilevel.hypergrad.single_loop.minibatch import batch_numbers, row_numbers
from bilevel.hypergrad.single_loop.saba import Saba
from bilevel.testing import assert_close

numba = pytest.importorskip("numba")

NUM_STEPS, SIZE = 4, 8


@pytest.fixture(scope="module")
def tools():
    """The benchmark's modules; the reference is run by Python, as compiling it takes longer than running."""
    folder = str(Path(__file__).parent.parent / "bench")
    sys.path.insert(0, folder)
    before, numba.config.DISABLE_JIT = numba.config.DISABLE_JIT, True
    try:
        names = ("problems", "reference", "runs")
        yield tuple(importlib.import_module(f"stochastic_{name}") for name in names)
    finally:
        numba.config.DISABLE_JIT = before
        sys.path.remove(folder)


def logistic(problems):
    rng = np.random.default_rng(0)
    parts = [(rng.standard_normal((n, 5)), np.sign(rng.standard_normal(n))) for n in (40, 27)]
    return problems.logistic("small", *parts, SIZE, (0.1,), (0.5,), 1.0)


def cleaning(problems, reference):
    rng = np.random.default_rng(0)
    parts = [(rng.standard_normal((n, 6)), rng.integers(0, 3, n).astype(np.int32)) for n in (40, 24)]
    (x, y), query = parts
    task = problems.bl.Task(
        (jnp.asarray(x), jnp.asarray(y), jnp.arange(40)), tuple(jnp.asarray(leaf) for leaf in query)
    )
    problem = problems.bl.Problem(
        lambda meta, key: jnp.zeros((3, 6)), problems.weighted_loss, problems.clean_loss
    )
    value = problems.cleaning_value(*task)
    oracles, arrays = reference.cleaning(problems.DECAY), reference.Arrays(x, y, *query)
    meta = rng.standard_normal(40)
    return problems.Work("small", problem, task, meta, arrays, oracles, value, SIZE, (0.1,), (0.5,), 1.0)


def work_of(name, tools):
    problems, reference, _ = tools
    return logistic(problems) if name == "logistic" else cleaning(problems, reference)


def same_rows(work, keys, method):
    """The row numbers that the estimator draws, as the reference takes them."""
    if not method.draws:
        counts = tuple(len(part) // SIZE for part in (work.arrays.x, work.arrays.query_x))
        drawn = [batch_numbers(counts, key) for key in keys]
        return tuple(np.array(part) for part in zip(*drawn, strict=True))
    queries = 2 if method.draws == 2 else 1  # F2SA draws query rows for its direction too: f does not hold θ
    drawn = [row_numbers(work.task, SIZE, key, method.draws, queries) for key in keys]
    return np.array([each.support for each in drawn]), np.array([each.query for each in drawn])


@pytest.mark.parametrize("problem", ["logistic", "cleaning"])
@pytest.mark.parametrize("name", ["SOBA", "SABA", "MA-SOBA", "AmIGO", "stocBiO", "F2SA"])
def test_the_same_rows_give_the_same_steps_as_the_reference(x64, tools, name, problem):
    _, reference, runs = tools
    work = work_of(problem, tools)
    method = next(each for each in runs.METHODS if each.name == name)
    rate, outer, key = 0.1, 0.5, jax.random.key(7)
    steps = runs.compile_steps(work, method, rate, NUM_STEPS)
    meta, state = steps.go(steps.start(), NUM_STEPS, outer, key)

    theirs = reference.METHODS[name]
    expected = runs.first_state(work, name, rate)
    rows = same_rows(work, jax.random.split(key, NUM_STEPS), theirs)
    theirs.run(work.oracles, work.arrays, expected, *rows, rate, outer)
    assert np.abs(expected[0] - work.meta).max() > 1e-6  # θ has moved
    assert_close("θ", meta, expected[0], 1e-12)
    warm = getattr(state, "warm", state)
    inner = state.psi if name == "F2SA" else warm.inner
    assert_close("φ", inner.params, expected[1], 1e-12)
    if name == "F2SA":
        assert_close("the second φ", state.phi.params, expected[2], 1e-12)
    elif name != "stocBiO":
        assert_close("q", warm.q, expected[2], 1e-12)
    if name == "SABA":
        tables = (*state.support.rows, state.query.rows[0], *state.support.mean, state.query.mean[0])
        for mine, other in zip(tables, expected[3:], strict=True):
            assert_close("table", mine, other, 1e-12)


@pytest.mark.parametrize("problem", ["logistic", "cleaning"])
def test_the_value_function_is_solved_to_the_end(x64, tools, problem):
    work = work_of(problem, tools)
    params = jnp.zeros(tools[2].work_shape(work))
    direction = np.random.default_rng(1).standard_normal(work.meta.shape)
    _, slope, found = work.value(jnp.asarray(work.meta), params)
    above, below = (
        float(work.value(jnp.asarray(work.meta + step * direction), found)[0]) for step in (1e-3, -1e-3)
    )
    assert_close("dh", np.vdot(slope, direction), (above - below) / 2e-3, 1e-4)


def test_saga_tables_are_written_in_place(x64, tools):
    """A copy of a table at each step would cost more than the step: the compiled loop must hold none."""
    work = logistic(tools[0])
    saba, solver = Saba(0.1, batch_size=1), tools[0].bl.inner.Gradient(tools[2].optax.sgd(0.1), 1)
    count, meta = len(work.arrays.x), jnp.asarray(work.meta)

    def steps(task, state, keys):
        def body(state, key):
            h, state = saba.estimate(work.problem, solver, meta, task, state, key)
            return state, h.grad

        return jax.lax.scan(body, state, keys)

    state = saba.init(work.problem, solver, meta, work.task, jax.random.key(0))
    arguments = work.task, state, jax.random.split(jax.random.key(0), 3)
    text = str(jax.jit(steps, donate_argnums=1).lower(*arguments).compile().as_text())
    assert f"f64[{count},5]" in text and "dynamic-update-slice" in text
    assert not re.search(rf"f64\[{count},5\]\S* copy\(", text)
