"""Truncation: exact from K steps on, with the bias that theory predicts, and honest where it misleads."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.hypergrad import FirstOrderWarning, Mixed, Unroll
from bilevel.hypergrad.iterations.truncated import Truncated
from bilevel.inner.checkpointing import Sqrt
from bilevel.testing import PROBLEMS, assert_close, assert_derivative, assert_matches, assert_trees_close

KEY = jax.random.key(0)
NO_TASK = bl.Task(None, None)
ADJOINTS = [Mixed(), Unroll(), Mixed(checkpoint=Sqrt()), Unroll(checkpoint=1)]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
def test_all_steps_are_exact(adjoint):
    for k in (5, 9):
        assert_matches(Truncated(k, adjoint), PROBLEMS["quadratic-momentum-5"]())
    assert_matches(Truncated(1, adjoint), PROBLEMS["quadratic-sgd-1"]())


def test_no_steps(x64):
    case = bl.testing.quadratic(0)
    assert_matches(Truncated(3), case)


# A quadratic whose truncated hypergradient has a closed form: the curvatures are a, the rate is η, and
#   dφ_K/dθ through the last k steps = Σ_{j<k} (1 − ηa)ʲ η  (for each coordinate)

CURVATURES = np.array([1.0, 0.5, 0.1])
RATE, K = 0.8, 60


def problem():
    return bl.Problem(
        init=lambda meta, key: meta["init"],
        inner_loss=lambda params, meta, batch, key: (
            0.5 * jnp.sum(CURVATURES * params**2) - params @ meta["theta"]
        ),
        outer_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - 1) ** 2) + meta["theta"][0],
    )


def meta():
    return {"theta": jnp.array([0.3, -0.2, 0.5]), "init": jnp.array([1.0, 2.0, 3.0])}


def truncated(k, num_steps=K, adjoint=None):
    solver = bl.inner.Gradient(optax.sgd(RATE), num_steps)
    estimator = Truncated(k) if adjoint is None else Truncated(k, adjoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return jax.jit(lambda m: bl.hypergradient(problem(), solver, estimator, m, NO_TASK, KEY))(meta())


def closed_form(k, num_steps=K):
    theta, phi = np.asarray(meta()["theta"]), np.asarray(meta()["init"])
    for _ in range(num_steps):
        phi = phi - RATE * (CURVATURES * phi - theta)
    shrink = 1 - RATE * CURVATURES
    moved = RATE * sum(shrink**j for j in range(k))
    first = np.array([1.0, 0.0, 0.0])  # θ enters the outer loss directly too
    share = np.linalg.norm(shrink**k * (phi - 1)) / np.linalg.norm(phi - 1)
    return moved * (phi - 1) + first, share


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("k", [1, 4])
def test_equals_the_closed_form(x64, k, adjoint):
    h = truncated(k, adjoint=adjoint)
    expected, share = closed_form(k)
    assert_close("grad", h.grad["theta"], expected, 1e-12)
    assert not np.any(h.grad["init"]) and h.stats["zero_leaves"] == 1
    assert_close("share", h.stats["adjoint_share"], share, 1e-12)
    assert h.stats["truncated_steps"] == K - k
    exact = bl.inner.unroll(problem(), bl.inner.Gradient(optax.sgd(RATE), K), meta(), NO_TASK, KEY)[1]
    assert_close("inner_loss", h.stats["inner_loss"], exact[-1], 1e-12)


def test_bias_falls_at_the_predicted_rate(x64):
    """Near the solution the error is dominated by the flattest direction: (1 − ημ)ᵏ."""
    ks = (10, 20, 30, 40)
    exact = truncated(K).grad["theta"]
    errors = np.array([float(jnp.linalg.norm(truncated(k).grad["theta"] - exact)) for k in ks])
    # What was cut off is the sum from k to K, hence the second term.
    predicted = np.array([(1 - RATE * 0.1) ** k - (1 - RATE * 0.1) ** K for k in ks])
    assert_close("ratios", errors[1:] / errors[:-1], predicted[1:] / predicted[:-1], 0.01)
    shares = [float(truncated(k).stats["adjoint_share"]) for k in ks]
    assert_close("shares", np.array(shares[1:]) / shares[:-1], np.full(3, 0.92**10), 0.01)


def test_a_short_horizon_points_the_wrong_way(x64):
    """Greedy steps like a small regularizer, the long run a large one, and truncation sees the first only.

    The influence of θ on two coordinates has opposite signs: at once through the steep one, and, much more
    strongly but slowly, through the flat one.
    """
    steep_and_flat = bl.Problem(
        init=lambda meta, key: jnp.zeros(2),
        inner_loss=lambda params, meta, batch, key: (
            0.5 * params[0] ** 2 + 0.005 * params[1] ** 2 - meta * (2 * params[0] - params[1])
        ),
        outer_loss=lambda params, meta, batch, key: params[0] + params[1],
    )
    solver = bl.inner.Gradient(optax.sgd(1.0), 1000)

    def run(k):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return bl.hypergradient(steep_and_flat, solver, Truncated(k), jnp.array(1.0), NO_TASK, KEY)

    exact = run(1000)
    assert_close("exact", exact.grad, 2 - 100 * (1 - 0.99**1000), 1e-9)
    short, long = run(1), run(400)
    assert short.grad * exact.grad < 0 < long.grad * exact.grad
    assert Truncated(1).doubts(numbers(short)) and not Truncated(400).doubts(numbers(long))


def numbers(h):
    return {name: float(value) for name, value in h.stats.items()}


def test_doubts_name_the_figures_and_the_remedy(x64):
    estimator = Truncated(2)
    (sentence,) = estimator.doubts(numbers(truncated(2)))
    share = closed_form(2)[1]
    for part in ("58 inner steps", f"{share:.3g}", "bl.hypergrad.Mixed(checkpoint=bl.inner.Tree())"):
        assert part in sentence
    assert not Truncated(K).doubts(numbers(truncated(K)))
    assert truncated(K).stats["adjoint_share"] == 0


def test_an_adjoint_in_the_memory_of_the_optimizer_counts(x64):
    """At the cut the adjoint of params is 0 here; that of the momentum moves it one step further back."""
    problem = bl.Problem(
        init=lambda meta, key: jnp.asarray(5.0),
        inner_loss=lambda params, meta, batch, key: 0.5 * (params - meta) ** 2,
        outer_loss=lambda params, meta, batch, key: params,
    )
    solver = bl.inner.Gradient(optax.sgd(1.0, momentum=0.9), 2)
    with pytest.warns(bl.HypergradientWarning, match="cut off 1 inner steps"):
        h = bl.hypergradient(problem, solver, Truncated(1), 2.0, NO_TASK, KEY)
    assert_close("truncated", h.grad, 1.0, 1e-12)  # exact: 1.9
    assert_close("share", h.stats["adjoint_share"], 0.9, 1e-12)


# Zeros by construction


def contract():
    rates = bl.Problem(
        init=lambda meta, key: meta["init"],
        inner_loss=lambda params, meta, batch, key: meta["ridge"] * jnp.sum((params - 1) ** 2),
        outer_loss=lambda params, meta, batch, key: jnp.sum(params**2),
    )
    solver = bl.inner.Gradient(lambda meta: optax.sgd(meta["rate"]), 4)
    return rates, solver, {"init": jnp.ones(2) / 2, "ridge": jnp.array(0.5), "rate": jnp.array(0.1)}


@pytest.mark.filterwarnings("ignore::bilevel.hypergrad.doubts.HypergradientWarning")
def test_warns_of_the_initialization_by_name():
    rates, solver, at = contract()
    with pytest.warns(FirstOrderWarning, match=r"Truncated gives meta\['init'\] a .*zero.*Mixed\(\)") as seen:
        h = jax.jit(lambda m: bl.hypergradient(rates, solver, Truncated(2), m, NO_TASK, KEY))(at)
    named = [str(w.message) for w in seen if w.category is FirstOrderWarning]
    assert len(named) == 1 and "ridge" not in named[0] and "rate'" not in named[0]
    assert not np.any(h.grad["init"]) and h.grad["ridge"] and h.grad["rate"]


def test_does_not_warn_otherwise():
    rates, solver, at = contract()
    fixed = replace(rates, init=lambda meta, key: jnp.ones(2) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FirstOrderWarning)
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", FirstOrderWarning)
        bl.hypergradient(rates, solver, Truncated(4), at, NO_TASK, KEY)
        bl.hypergradient(fixed, solver, Truncated(2), {k: at[k] for k in ("ridge", "rate")}, NO_TASK, KEY)


# Levels, batches, refusals


def test_solve_nests(x64):
    """The derivative of the truncated hypergradient, forward and reverse, is that of its closed form."""
    solver = bl.inner.Gradient(optax.sgd(RATE), 6)

    def value(theta):
        params = Truncated(2).solve(problem(), solver, {**meta(), "theta": theta}, NO_TASK, KEY)
        return jnp.sum(jnp.sin(params))

    theta = meta()["theta"]
    shrink = 1 - RATE * CURVATURES
    phi = np.asarray(meta()["init"])
    for _ in range(6):
        phi = phi - RATE * (CURVATURES * phi - theta)
    moved = RATE * (1 + shrink)
    assert_close("grad", jax.grad(value)(theta), moved * np.cos(phi), 1e-12)
    for mode in (jax.jacfwd, jax.jacrev):
        hessian = jax.jit(mode(jax.grad(value)))(theta)
        assert_close("Hessian", hessian, np.diag(-(moved**2) * np.sin(phi)), 1e-12)


def test_vmap_over_metas(x64):
    metas = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), meta())
    solver = bl.inner.Gradient(optax.adam(0.1), 5)

    def one(m):
        return Truncated(2).estimate(problem(), solver, m, NO_TASK, (), KEY)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        together = jax.jit(jax.vmap(one))(metas)
        single = jax.jit(one)(meta())
    assert_trees_close("first", jax.tree.map(lambda leaf: leaf[0], together.grad), single.grad, 1e-12)
    assert_close("share", together.stats["adjoint_share"][0], single.stats["adjoint_share"], 1e-12)


def test_exact_agrees_with_differences(x64):
    solver = bl.inner.Gradient(optax.adam(0.1), 5)
    run = jax.jit(lambda m: bl.hypergradient(problem(), solver, Truncated(5), m, NO_TASK, KEY))
    assert_derivative(lambda m: run(m).value, run(meta()).grad, meta())


@pytest.mark.parametrize("num_steps", [0, -1, 1.5, True])
def test_impossible_lengths(num_steps):
    with pytest.raises(ValueError, match=r"Truncated\.num_steps must be a whole number of at least 1"):
        Truncated(num_steps)


def test_refusals():
    with pytest.raises(TypeError, match=r"Truncated\.adjoint must be Mixed\(\) or Unroll\(\)"):
        Truncated(2, adjoint=5)
    closed = bl.inner.ClosedForm(lambda meta, support, key: meta)
    with pytest.raises(TypeError, match=r"Truncated .*ClosedForm has no steps.*Implicit\("):
        bl.Learner(problem(), closed, Truncated(2))
    solver = bl.inner.Gradient(optax.sgd(RATE), 3)
    with pytest.raises(TypeError, match=r"meta\['layers'\] is int32"):
        bl.hypergradient(problem(), solver, Truncated(2), {**meta(), "layers": 2}, NO_TASK, KEY)
