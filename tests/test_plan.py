"""`bl.plan` predicts memory, takes the fastest that fits, and refuses with figures."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel as bl
from bilevel.analysis import parse_memory, plan
from bilevel.analysis.memory import compile_hypergradient, compiled_memory
from bilevel.inner.checkpointing import Sqrt


def learner(num_steps=64, width=256, estimator=None):
    net = bl.nets.mlp([width] * 3)
    return bl.maml(net, bl.learners.mean_squared_error, num_steps=num_steps, rates=0.01, estimator=estimator)


def batch(examples=64, width=256, tasks=2):
    x = jax.ShapeDtypeStruct((tasks, examples, width), jnp.float32)
    return bl.Task((x, x), (x, x))


def ask(memory, num_steps=64, **options):
    built = learner(num_steps)
    meta = jax.eval_shape(built.init_meta, jax.random.key(0))  # shapes are enough: nothing is run
    return plan(built.problem, built.solver, meta, batch(**options), memory)


def test_the_fastest_that_fits_is_taken():
    roomy = ask("1GiB")
    assert roomy.estimator == bl.hypergrad.Mixed() and roomy.task_chunk == 1 and len(roomy.attempts) == 1
    tight = ask(int(0.7 * roomy.memory.peak))
    assert tight.estimator != roomy.estimator and tight.estimator.checkpoint is not None
    assert tight.memory.peak < 0.7 * roomy.memory.peak
    assert tight.attempts[0].memory == roomy.memory and tight.attempts[-1].estimator == tight.estimator
    assert "too much" in str(tight) and "fits" in str(tight) and "task_chunk=1" in str(tight)


def test_what_does_not_fit_is_refused_with_figures():
    with pytest.raises(MemoryError, match=r"nothing fits in 1 MiB: the least is .* MiB with Mixed"):
        ask("1MiB")


def test_a_plan_can_be_used():
    built = learner(num_steps=4, width=8)
    meta = built.init_meta(jax.random.key(0))

    def sample(key):
        x = jax.random.normal(key, (2, 5, 8))
        return bl.Task((x, x), (x, x))

    chosen = plan(built.problem, built.solver, meta, sample(jax.random.key(1)), "1GiB")
    planned = bl.Learner(built.problem, built.solver, chosen.estimator, built.init_meta)
    state = bl.init_state(planned, optax.sgd(0.01), sample, jax.random.key(0))
    options = bl.Options(task_chunk=chosen.task_chunk)
    assert int(bl.train(planned, optax.sgd(0.01), sample, state, 2, options=options).step) == 2


def test_unroll_where_mixed_is_refused():
    @jax.custom_vjp
    def clip(x):
        return x

    clip.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))
    problem = bl.Problem(
        init=lambda meta, key: meta,
        inner_loss=lambda params, meta, batch, key: jnp.sum(clip(params - batch) ** 2),
        outer_loss=lambda params, meta, batch, key: jnp.sum((params - batch) ** 2),
    )
    solver = bl.inner.Gradient(optax.sgd(0.1), num_steps=3)
    tasks = bl.Task(jnp.zeros((2, 4)), jnp.ones((2, 4)))
    chosen = plan(problem, solver, jnp.zeros(4), tasks, "1GiB")
    assert chosen.estimator == bl.hypergrad.Unroll() and "custom_vjp" in chosen.attempts[0].refusal
    with pytest.raises(ValueError, match="no exact estimator takes"):
        plan(problem, object(), jnp.zeros(4), tasks)  # type: ignore


def test_checkpoints_take_less_as_predicted():
    built = learner()
    meta = jax.eval_shape(built.init_meta, jax.random.key(0))

    def peak(estimator, chunk=1):
        planned = bl.Learner(built.problem, built.solver, estimator)
        return compiled_memory(compile_hypergradient(planned, meta, batch(), chunk)).peak

    everything, root = peak(bl.hypergrad.Unroll()), peak(bl.hypergrad.Mixed(Sqrt()))
    mixed = peak(bl.hypergrad.Mixed())
    assert root < 0.8 * min(mixed, everything)
    assert peak(bl.hypergrad.Unroll(), chunk=2) > 1.3 * everything  # two tasks side by side


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("512MB", 512_000_000), ("1e9", 10**9), (7, 7), ("2 kib", 2048), ("3b", 3)],
)
def test_memory_is_read(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "8 gigs", "nan", "1.2.3MB"])
def test_memory_that_cannot_be_read(text):
    with pytest.raises(ValueError, match="memory must be like"):
        parse_memory(text)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure")
def test_the_prediction_is_what_is_measured():
    script = Path(__file__).parent.parent / "bench" / "plan_grid.py"
    done = subprocess.run([sys.executable, script, "--rows", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| Mixed() |" in done.stdout and "allowed 25%" in done.stdout
