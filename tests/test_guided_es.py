"""Guided evolution strategies: exact in the span of the guides, shrunk outside, and less noisy there."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from evolution_tools import KEY, Z, direct, once, repeat, z_scores

import bilevel as bl
from bilevel.hypergrad import GuidedES, Unroll
from bilevel.hypergrad.evolution.evolution_strategies import EvolutionStrategies


@dataclass(frozen=True)
class Constant:
    """A guide that always says the same."""

    answer: tuple

    def check(self, problem, solver):
        pass

    def init(self, problem, solver, meta, task, key):
        return ()

    def estimate(self, problem, solver, meta, task, state, key):
        return bl.Hypergradient(jnp.zeros(()), {"x": jnp.array(self.answer)}, {}), state


SLOPE = np.array([1.0, -2.0, 0.5, 3.0, 0.0, 1.0])


def guided(guide, num_pairs=2, alpha=0.3, times=4000):
    problem, solver = direct(lambda params: params["x"] @ SLOPE)
    estimator = GuidedES(0.1, num_pairs, Constant(tuple(guide)), alpha=alpha)
    return np.asarray(repeat(estimator, problem, solver, {"x": jnp.zeros(6)}, times=times).grad["x"])


def test_guided_es_is_unbiased_in_the_span_and_shrunk_outside(x64):
    guide = np.array([1.0, -1.0, 0.0, 1.0, 0.0, 0.0])
    u = guide / np.linalg.norm(guide)
    inside = u * (u @ SLOPE)
    expected = inside + 0.3 / (0.3 + 0.7 * 6) * (SLOPE - inside)
    samples = guided(guide)
    assert np.all(z_scores(samples, expected) < Z)
    assert np.any(z_scores(samples, SLOPE) > Z), "it is biased, as it says"


def test_alpha_of_one_is_plain_evolution(x64):
    assert np.all(z_scores(guided(np.ones(6), alpha=1.0), SLOPE) < Z)


def test_a_good_guide_lowers_the_error(x64):
    def error(samples):
        return np.mean(np.sum((samples - SLOPE) ** 2, axis=1)) / np.sum(SLOPE**2)

    problem, solver = direct(lambda params: params["x"] @ SLOPE)
    plain = repeat(EvolutionStrategies(0.1, 2), problem, solver, {"x": jnp.zeros(6)}, times=2000).grad["x"]
    # Theory: (n + 1) / N = 3.5 against about (1 + 1) / N = 1 with a guide along the gradient.
    np.testing.assert_allclose(error(np.asarray(plain)), 3.5, rtol=0.15)
    assert error(guided(SLOPE, alpha=0.01, times=2000)) < 1.2


@pytest.mark.filterwarnings("ignore::bilevel.HypergradientWarning")
def test_guided_es_keeps_its_guides_and_trains():
    problem, solver = direct(lambda params: jnp.sum((params["x"] - 1.0) ** 2))
    estimator = GuidedES(0.05, 4, bl.hypergrad.FirstOrder(), num_guides=2)
    learner = bl.Learner(problem, solver, GuidedES(0.05, 4, Unroll(), num_guides=2))
    sample = bl.tasks.batch(lambda key: bl.Task(jnp.zeros(1), jnp.zeros(1)), 1)
    optimizer = optax.adam(0.1)
    state = bl.init_state(learner, optimizer, sample, KEY, {"x": jnp.zeros(6)})
    state = bl.train(learner, optimizer, sample, state, 200)
    assert state.estimator_state.guides.shape == (1, 2, 6)
    np.testing.assert_allclose(state.meta["x"], 1.0, atol=0.1)
    assert estimator.doubts({"standard_error": 2.0})[0].startswith(
        "GuidedES: the hypergradient is mostly noise"
    )


def test_what_guided_es_refuses():
    for fields, match in (
        ({"alpha": 0.0}, "alpha must be a positive number"),
        ({"alpha": 1.5}, "alpha must be at most 1"),
        ({"num_guides": 0}, "num_guides must be a whole number"),
    ):
        with pytest.raises(ValueError, match=match):
            GuidedES(0.1, 2, Unroll(), **fields)
    problem, solver = direct(lambda params: params["x"] @ SLOPE)
    with pytest.raises(ValueError, match="at most dim meta = 6, got 7"):
        once(GuidedES(0.1, 2, Unroll(), num_guides=7), problem, solver, {"x": jnp.zeros(6)})
    with pytest.raises(TypeError, match="Unroll"):
        bl.Learner(problem, NoSteps(), GuidedES(0.1, 2, Unroll()))


@dataclass(frozen=True)
class NoSteps:
    def solve(self, problem, meta, task, key):
        return bl.Solution(meta, {})
