"""Ways in which a hypergradient could be wrong in silence, each found once by trying: right now, or told."""

import warnings
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix
import pytest

import bilevel as bl
from bilevel.hypergrad import (
    AmIGO,
    EvolutionStrategies,
    FiniteDifference,
    FirstOrder,
    Forward,
    GuidedES,
    Implicit,
    Mixed,
    MultiStep,
    OneStep,
    Penalty,
    Sama,
    Soba,
    StocBiO,
    Truncated,
    Unroll,
    cg,
    direct,
    gmres,
)
from bilevel.hypergrad.evolution.score_function import mean_entropy
from bilevel.hypergrad.single_loop.minibatch import checksum

KEY, NO_TASK = jax.random.key(0), bl.Task(None, None)
quiet = pytest.mark.filterwarnings(
    "ignore::bilevel.HypergradientWarning", "ignore::bilevel.FirstOrderWarning"
)


def square(scale=1.0):
    """Inner ½|φ − θ|², outer |φ|² · scale: dF/dθ = 2 θ · scale at the minimum, which one step reaches."""
    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros_like(meta),
        inner_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - meta) ** 2),
        outer_loss=lambda params, meta, batch, key: jnp.sum(params**2) * jnp.asarray(scale, params.dtype),
    )
    return problem, bl.inner.Gradient(optax.sgd(1.0), 1)


def test_ridge_keeps_its_penalty_with_whole_numbered_features():
    ridge = bl.inner.Ridge(lambda meta, x: x, lambda meta: jnp.exp(meta))
    problem = bl.Problem(lambda meta, key: jnp.zeros(2), ridge.loss, ridge.error)
    x, y = np.array([[1, 2], [3, 1], [0, 2]]), np.array([1, 2, 3])

    def grad(x, y):
        return bl.hypergradient(problem, ridge, Unroll(), jnp.log(0.5), bl.Task((x, y), (x, y)), KEY).grad

    assert grad(x, y) == grad(x.astype(np.float32), y.astype(np.float32)) != 0


def test_forward_through_a_solver_that_did_not_converge_is_told():
    problem = bl.Problem(
        init=lambda meta, key: jnp.array([-1.5, 2.0]),
        inner_loss=lambda params, meta, batch, key: (
            100 * (params[1] - params[0] ** 2) ** 2 + (meta - params[0]) ** 2
        ),
        outer_loss=lambda params, meta, batch, key: jnp.sum(params**2),
    )
    for max_steps, said in ((3, ["stopped before it had converged"]), (2000, [])):
        solver = bl.inner.Converged(optimistix.BFGS(rtol=1e-4, atol=1e-4), max_steps=max_steps)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            bl.hypergradient(problem, solver, Forward(), jnp.float32(1.0), NO_TASK, KEY)
        found = [str(w.message) for w in seen if issubclass(w.category, bl.HypergradientWarning)]
        assert len(found) == len(said) and all(word in text for word, text in zip(said, found))


@quiet
@pytest.mark.parametrize(
    "estimator",
    [
        Implicit(direct()),
        OneStep(1.0),
        Truncated(1),
        FirstOrder(),
        Penalty(10.0),
        FiniteDifference(1.0),
        Sama(),
        EvolutionStrategies(0.1, 4),
    ],
)
def test_a_level_above_an_estimate_that_holds_something_fixed_is_refused(estimator):
    problem, solver = square()

    def grad(meta):
        return bl.hypergradient(problem, solver, estimator, meta, NO_TASK, KEY).grad

    for above in (jax.grad(lambda meta: grad(meta) ** 2), jax.jacfwd(grad)):
        with pytest.raises(TypeError, match=r"cannot be differentiated again.*Mixed\(\)"):
            above(jnp.float32(1.0))

    def closed_over(x):
        inner = replace(problem, outer_loss=lambda params, meta, batch, key: x * jnp.sum(params**2))
        return bl.hypergradient(inner, solver, estimator, jnp.float32(1.0), NO_TASK, KEY).grad

    if not isinstance(estimator, FirstOrder):  # which is zero here, whatever x
        with pytest.raises(TypeError, match="cannot be differentiated again"):
            jax.grad(closed_over)(1.0)


@pytest.mark.parametrize("estimator", [Mixed(), Unroll(), Forward()])
def test_a_level_above_an_exact_estimate_is_exact(x64, estimator):
    problem, solver = square()

    def grad(meta):
        return bl.hypergradient(problem, solver, estimator, meta, NO_TASK, KEY).grad

    np.testing.assert_allclose(jax.grad(lambda meta: grad(meta) ** 2)(3.0), 24.0)  # (2θ)² → 8θ


@quiet
@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_long_sums_in_bfloat16_do_not_stop_growing(chunk):
    problem, solver = square()
    meta = jnp.array([1.0, -1.0], jnp.bfloat16)
    h = bl.hypergradient(problem, solver, EvolutionStrategies(0.1, 4000, chunk=chunk), meta, NO_TASK, KEY)
    assert h.grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(h.grad.astype(np.float32), [2.0, -2.0], rtol=0.1)


def test_long_sums_over_tasks_in_bfloat16_do_not_stop_growing():
    problem, solver = square()
    learner = bl.Learner(problem, solver, Mixed())
    tasks = bl.Task(jnp.zeros(1000), jnp.zeros(1000))
    h, _ = bl.mean_hypergradient(learner, jnp.bfloat16(1.0), tasks, (), KEY)
    assert h.grad.dtype == jnp.bfloat16 and abs(float(h.grad) - 2.0) < 0.02


@pytest.mark.parametrize(("meta", "sigma"), [(jnp.bfloat16(1.0), 1e-3), (jnp.float32(1000.0), 1e-5)])
def test_moves_below_the_resolution_of_meta_are_told(meta, sigma):
    problem, solver = square()
    for estimator in (EvolutionStrategies(sigma, 64), GuidedES(sigma, 64, FirstOrder())):
        with pytest.warns(bl.HypergradientWarning, match="the moves are rounded"), warnings.catch_warnings():
            warnings.simplefilter("ignore", bl.FirstOrderWarning)
            bl.hypergradient(problem, solver, estimator, meta, NO_TASK, KEY)


@quiet
@pytest.mark.parametrize("estimator", [Forward(), GuidedES(0.1, 8, Unroll()), Mixed()])
def test_gradients_have_the_types_of_meta(estimator):
    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(2),
        inner_loss=lambda params, meta, batch, key: jnp.sum((params - meta["a"]) ** 2) * meta["b"],
        outer_loss=lambda params, meta, batch, key: jnp.sum(params.astype(jnp.float32) ** 2),
    )
    meta = {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.float32(1.0)}
    h = bl.hypergradient(problem, bl.inner.Gradient(optax.sgd(0.1), 2), estimator, meta, NO_TASK, KEY)
    assert jax.tree.map(lambda g: g.dtype, h.grad) == jax.tree.map(lambda m: m.dtype, meta)


@pytest.mark.parametrize(
    ("solver", "dtype", "scale"),
    [
        (cg(2), jnp.float16, 1e-4),  # JAX has no factorization in float16 for the others
        (cg(2), jnp.float32, 1e-24),
        (gmres(2), jnp.float32, 1e-24),
        (direct(), jnp.float32, 1e-24),
    ],
)
def test_small_outer_slopes_do_not_vanish(solver, dtype, scale):
    problem, inner = square(scale)
    meta = jnp.array([1.0, 2.0], dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        h = bl.hypergradient(problem, inner, Implicit(solver), meta, NO_TASK, KEY)
    np.testing.assert_allclose(np.asarray(h.grad, np.float64) / scale, [2.0, 4.0], rtol=2e-2)


@quiet
@pytest.mark.parametrize("estimator", [StocBiO(0.1, num_neumann=4), AmIGO(0.1, linear_steps=3)])
def test_the_terms_of_a_series_draw_their_own_noise(estimator):
    """Where the inner loss uses its key, no term may share its noise with the last product."""
    problem, _ = square()
    seen = set()

    def inner_loss(params, meta, batch, key):
        jax.debug.callback(lambda data: seen.add(tuple(np.ravel(data))), jax.random.key_data(key))
        return problem.inner_loss(params, meta, batch, key)

    noisy, solver, meta = (
        replace(problem, inner_loss=inner_loss),
        bl.inner.Gradient(optax.sgd(0.1), 1),
        jnp.ones(2),
    )
    state = estimator.init(noisy, solver, meta, NO_TASK, KEY)
    jax.effects_barrier()
    seen.clear()
    jax.block_until_ready(estimator.estimate(noisy, solver, meta, NO_TASK, state, jax.random.key(5)))
    jax.effects_barrier()
    # The inner step, the three terms and the last product; the inner step has a key folded once more.
    assert len(seen) == 5


def test_a_permutation_inside_a_batch_is_another_task():
    x = jnp.arange(6.0)
    assert checksum(x) != checksum(x[::-1]) and checksum(x) == checksum(jnp.array(x))


def test_entropy_of_a_masked_choice():
    assert np.isclose(mean_entropy([jnp.array([0.0, 0.0, -jnp.inf])]), np.log(2))


def test_classes_in_place_of_values_and_wrong_adjoints_are_refused():
    problem, solver = square()
    with pytest.raises(TypeError, match=r"got the class Mixed; write Mixed\(\.\.\.\)"):
        bl.hypergradient(problem, solver, Mixed, 1.0, NO_TASK, KEY)
    with pytest.raises(TypeError, match=r"MultiStep\.adjoint must be .*got Truncated"):
        MultiStep(adjoint=Truncated(1))


def test_not_finite_is_told_by_the_one_call_door():
    problem, solver = square(jnp.nan)
    with pytest.warns(bl.HypergradientWarning, match="not finite"):
        bl.hypergradient(problem, solver, Mixed(), 1.0, NO_TASK, KEY)


def test_a_single_loop_is_checked_where_it_settles():
    problem, _ = square()
    solver = bl.inner.Gradient(optax.sgd(0.2), 1)
    tasks = bl.Task(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    report = bl.check(problem, solver, Soba(0.2), jnp.array([1.0, 2.0]), tasks, KEY)
    assert report.trust == "yes" and "after 1000 inner steps" in report.compared_with


def test_check_refuses_what_is_no_count_and_names_a_loss_that_is_no_scalar():
    problem, solver = square()
    tasks = bl.Task(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
    for name in ("num_tasks", "repeats"):
        with pytest.raises(ValueError, match=f"{name} must be a whole number"):
            bl.check(problem, solver, Mixed(), jnp.ones(2), tasks, KEY, **{name: 0})
    vector = replace(problem, inner_loss=lambda params, meta, batch, key: params - meta)
    report = bl.check(vector, solver, Mixed(), jnp.ones(2), tasks, KEY)
    assert "inner_loss must return a scalar, got shape (2,)" in report.verdict
    with pytest.raises(ValueError, match="inner_loss must return a scalar"):
        bl.advise(vector, solver, jnp.ones(2), tasks, KEY)
    broken = replace(problem, outer_loss=lambda params, meta, batch, key: jnp.nan * jnp.sum(params))
    with pytest.raises(ValueError, match="the outer loss itself is nan"):
        bl.advise(broken, solver, jnp.ones(2), tasks, KEY)
