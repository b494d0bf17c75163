"""Doubts of an estimator reach the user: at once, from compiled code, from the loop, each kind once."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad.doubts import Doubter, HypergradientWarning
from bilevel.hypergrad.first_order.annealed import AnnealedOrder
from bilevel.hypergrad.implicit.implicit import Implicit
from bilevel.hypergrad.implicit.linear_solvers import cg
from bilevel.learners.learning_to_reweight import Reweight
from bilevel.learners.warp_grad import WarpGradient
from bilevel.learners.weighted import Online

KEY = jax.random.key(0)
CURVATURES = jnp.array([1.0, 4.0, 9.0])


def inner_loss(params, meta, batch, key):
    return 0.5 * jnp.sum(CURVATURES * (params - meta) ** 2)


PROBLEM = bl.Problem(
    init=lambda meta, key: jnp.zeros(3),
    inner_loss=inner_loss,
    outer_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - batch) ** 2),
)
SOLVER = bl.inner.Gradient(optax.sgd(0.1), num_steps=200)
META = jnp.array([1.0, -2.0, 3.0])
TASK = bl.Task(jnp.zeros(1), jnp.zeros(3))


def call(estimator, meta=META):
    return bl.hypergradient(PROBLEM, SOLVER, estimator, meta, TASK, KEY).grad


def warned(function) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        jax.block_until_ready(function())
        jax.effects_barrier()
    return [str(w.message) for w in seen if issubclass(w.category, HypergradientWarning)]


def test_a_call_warns_at_once():
    with pytest.warns(HypergradientWarning, match=r"linear system.*residual.*num_steps") as record:
        call(Implicit(cg(1)))
    assert record[0].filename == __file__  # it points at the caller


def test_no_doubt_no_warning():
    assert warned(lambda: call(Implicit(cg(3)))) == []
    assert warned(lambda: call(bl.hypergrad.Mixed())) == []


def test_compiled_and_batched_calls_warn_once_of_each_kind():
    run = jax.jit(jax.vmap(lambda meta: call(Implicit(cg(1)), meta)))
    metas = jnp.stack([META, 2 * META, META + 1])
    assert len(warned(lambda: run(metas))) == 1
    assert warned(lambda: run(metas + 1)) == []  # the same program has said it


def test_training_warns_once_a_run():
    learner = bl.Learner(PROBLEM, SOLVER, Implicit(cg(1)))
    sample = bl.tasks.batch(lambda key: TASK, 2)
    state = bl.init_state(learner, optax.sgd(0.1), sample, KEY, META)
    options = bl.Options(chunk_size=2)
    messages = warned(lambda: bl.train(learner, optax.sgd(0.1), sample, state, 6, options=options).meta)
    assert len(messages) == 1 and "linear system" in messages[0]


def test_kinds_differ_by_words_not_by_figures():
    class Talkative:
        def doubts(self, stats):
            return [f"off by {stats['a']:.2g}", *(["not finite: nan"] if stats["a"] > 1 else [])]

    doubter = Doubter(Talkative())

    def ask():
        for a in (0.5, 1e-7, 2.0, 3.0):
            doubter({"a": jnp.array([a, a])})

    assert warned(ask) == ["off by 0.5", "not finite: nan"]


@pytest.mark.parametrize(
    "around",
    [
        Online,
        Reweight,
        WarpGradient,
        lambda inner: AnnealedOrder(inner, 3),
        lambda inner: bl.hypergrad.ScoreFunction(4, discrete=lambda name: "c" in name, adjoint=inner),
    ],
)
def test_whoever_wraps_an_estimator_passes_its_doubts_on(around):
    inner = Implicit(cg(1))
    stats = {"finite": 1.0, "inner_residual": 3.0, "inner_error": 0.5, "linear_residual": 0.4}
    said = inner.doubts(stats)
    assert said and all(sentence in around(inner).doubts(stats) for sentence in said)
    assert not around(bl.hypergrad.Mixed()).doubts(stats)


def test_where_some_tasks_diverge_the_remedy_is_that_of_divergence():
    nan = float("nan")
    stats = {"finite": 0.75, "inner_residual": nan, "inner_error": nan, "linear_residual": nan}
    said = Implicit(cg(2)).doubts(stats)
    assert "not finite in 25% of the tasks" in said[0] and "Lower its step size" in said[0]
    assert not any("Take more inner steps" in sentence for sentence in said)
