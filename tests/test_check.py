"""`bl.check` trusts what is right, catches what is wrong, and says why."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.analysis import CheckReport, check, find_operations
from bilevel.analysis.agreement import agreement, student
from bilevel.analysis.differences import STEPS, slope
from bilevel.hypergrad import FirstOrder, Mixed, MultiStep, Unroll
from bilevel.testing import dead_relu, quadratic

KEY = jax.random.key(0)


@dataclass(frozen=True)
class Changed:
    """`Mixed`, with something done to its gradient."""

    change: object
    doubt: str = ""

    def check(self, problem, solver):
        Mixed().check(problem, solver)

    def init(self, problem, solver, meta, task, key):
        return ()

    def estimate(self, problem, solver, meta, task, state, key):
        h, state = Mixed().estimate(problem, solver, meta, task, state, key)
        return h._replace(grad=self.change(h.grad, key)), state

    def doubts(self, stats):
        return [self.doubt] if self.doubt else []


def scaled(factor):
    return Changed(lambda grad, key: jax.tree.map(lambda g: factor * g, grad))


def noisy(factor, noise):
    """A random estimator whose mean is `factor` times the gradient."""

    def change(grad, key):
        leaves, tree = jax.tree.flatten(grad)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(
            tree, [factor * g + noise * jax.random.normal(k, jnp.shape(g)) for k, g in zip(keys, leaves)]
        )

    return Changed(change)


def on_quadratic(estimator, num_steps=3, **options) -> CheckReport:
    case = quadratic(num_steps)
    meta = jax.tree.map(jnp.float32, case.meta)
    tasks = jax.tree.map(lambda leaf: jnp.float32(leaf)[None], case.task)
    return check(case.problem, case.solver, estimator, meta, tasks, KEY, **options)


SCALAR = {"init": jnp.float32(2.0), "rate": jnp.float32(0.3)}
ONE_TASK = bl.Task(jnp.array([0.5]), jnp.array([1.5]))


def scalar_problem(inner=lambda p: 0.5 * p**2, outer=lambda p: 0.5 * p**2):
    """One parameter, pulled to the support point, judged at the query point."""
    problem = bl.Problem(
        init=lambda meta, key: meta["init"],
        inner_loss=lambda params, meta, batch, key: inner(params - batch),
        outer_loss=lambda params, meta, batch, key: outer(params - batch),
    )
    return problem, bl.inner.Gradient(lambda meta: optax.sgd(meta["rate"]), num_steps=3)


@pytest.mark.parametrize("estimator", [Mixed(), Unroll(), Mixed(checkpoint=2)], ids=repr)
def test_a_right_estimator_is_trusted(estimator):
    report = on_quadratic(estimator)
    assert report.verdict == "Trust it.", str(report)
    assert report.cosine > 1 - 1e-9 and report.relative_error < 1e-6
    assert report.reliable == report.directions == 8  # every element of meta has its own
    assert report.float32_error < 1e-5
    assert [leaf.name for leaf in report.leaves] == ["meta['init']", "meta['log_rate']", "meta['theta']"]
    assert "Trust it." in str(report)


def test_the_values_of_the_report_are_the_closed_form():
    case = quadratic(num_steps=3)
    report = on_quadratic(FirstOrder())
    # The tasks are float32, so float64 sees them rounded.
    assert report.value == pytest.approx(case.exact.value, rel=1e-6)
    exact = np.concatenate([np.ravel(case.exact.grad[k]) for k in sorted(case.exact.grad)])
    first = np.concatenate([np.ravel(case.first_order.grad[k]) for k in sorted(case.exact.grad)])
    assert report.cosine == pytest.approx(exact @ first / np.linalg.norm(exact) / np.linalg.norm(first), 1e-5)
    assert report.relative_error == pytest.approx(np.linalg.norm(first - exact) / np.linalg.norm(exact), 1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda grad, key: jax.tree.map(lambda g: -g, grad), "points the wrong way"),
        (lambda grad, key: jax.tree.map(lambda g: 0.5 * g, grad), "0.5 times the length"),
        (lambda grad, key: jax.tree.map(jnp.zeros_like, grad), "exactly zero"),
        (lambda grad, key: jax.tree.map(lambda g: g * jnp.nan, grad), "not finite"),
        (lambda grad, key: {**grad, "log_rate": jnp.nan * grad["log_rate"]}, "meta['log_rate']"),
    ],
    ids=["sign", "half", "zero", "nan", "nan-leaf"],
)
def test_a_wrong_estimator_is_caught(change, says):
    report = on_quadratic(Changed(change))
    assert report.trust == "no" and says in report.verdict, str(report)


def test_a_small_error_is_a_condition():
    report = on_quadratic(scaled(1.05))
    assert report.trust == "if" and "an error of 5%" in report.verdict
    assert on_quadratic(scaled(1.05), tolerance=0.06).trust == "yes"
    # Wrong in one short leaf among long ones only.
    one_leaf = Changed(lambda grad, key: {**grad, "log_rate": -grad["log_rate"]})
    assert on_quadratic(one_leaf).trust != "yes"


def test_its_own_doubt_is_a_condition():
    report = on_quadratic(replace(scaled(1.0), doubt="the solve has a residual of 0.3."))
    assert report.trust == "if" and "a residual of 0.3" in report.verdict and report.doubts


def test_noise_without_bias_is_told_from_bias():
    fair = on_quadratic(noisy(1.0, 2.0))
    assert fair.trust == "if" and fair.repeats == 16 and "unbiased within" in fair.verdict, str(fair)
    assert abs(fair.bias) < 2 * fair.bias_ci95 and fair.noise > 0.5
    biased = on_quadratic(noisy(0.3, 0.05))
    assert biased.trust == "no" and biased.bias == pytest.approx(-0.7, abs=0.1), str(biased)
    assert abs(biased.bias) > biased.bias_ci95
    quiet = on_quadratic(noisy(1.0, 0.01))
    assert quiet.trust == "yes", str(quiet)


def test_the_interval_of_the_bias_holds_its_level():
    rng = np.random.default_rng(0)
    truth = np.array([[3.0, 1.0]])
    hits = [agreement(truth + rng.normal(size=(16, 2)), truth) for _ in range(2000)]
    assert np.mean([abs(a.bias) < a.bias_ci95 for a in hits]) == pytest.approx(0.95, abs=0.015)
    assert np.mean([a.biased for a in hits]) == pytest.approx(0.01, abs=0.007)
    for freedom, table in ((7, 2.365), (15, 2.131), (60, 2.000)):
        assert student(0.95, freedom) == pytest.approx(table, rel=0.01)


def test_a_learned_rate_under_first_order_says_why_it_is_zero():
    problem, solver = scalar_problem()
    report = check(problem, solver, FirstOrder(), SCALAR, ONE_TASK, KEY)
    init, rate = report.leaves
    assert report.trust == "no" and init.zero == ""
    assert "only through the inner loop (read by inner solver)" in rate.zero
    assert "Mixed()" in report.verdict and "meta['rate'] gets exactly zero" in report.verdict


def test_a_leaf_that_does_nothing_is_told_from_one_that_is_dropped():
    problem, solver = scalar_problem()
    meta = {**SCALAR, "unused": jnp.ones(2)}
    report = check(problem, solver, Mixed(), meta, ONE_TASK, KEY)
    assert "nothing reads it" in report.leaves[2].zero
    assert report.trust == "if" and "meta['unused'] is meant to have no effect" in report.verdict


def test_a_dead_unit_is_no_fault_of_the_estimator():
    case = dead_relu(num_steps=2, optimizer="adam")
    meta = jax.tree.map(jnp.float32, case.meta)
    tasks = jax.tree.map(lambda leaf: jnp.float32(leaf)[None], case.task)
    report = check(case.problem, case.solver, Mixed(), meta, tasks, KEY)
    by_name = {leaf.name: leaf for leaf in report.leaves}
    assert report.trust == "if" and report.relative_error < 1e-6, str(report)
    assert "its true derivative is zero" in by_name["meta['init']['unused']"].zero
    dead = check(*scalar_problem(outer=lambda p: jax.nn.relu(p - 100.0)), Mixed(), SCALAR, ONE_TASK, KEY)
    assert all("dead unit" in leaf.zero for leaf in dead.leaves), str(dead)


def test_a_kink_is_no_false_alarm():
    # The outer loss |φ_K − 1.5| has its kink exactly where φ_K is: rate 0 leaves φ at 1.5.
    problem, solver = scalar_problem(outer=lambda p: jax.nn.relu(p) + 0.1 * p)
    meta = {"init": jnp.float32(1.5), "rate": jnp.float32(0.0)}
    report = check(problem, solver, Mixed(), meta, ONE_TASK, KEY)
    assert report.trust == "yes", str(report)
    assert any("kink" in note for note in report.notes)
    wrong = check(problem, solver, scaled(-1.0), meta, ONE_TASK, KEY)
    assert wrong.trust == "no", str(wrong)


def test_relu_networks_are_compared_like_any_other():
    learner = bl.maml(bl.nets.mlp([1, 6, 1]), bl.learners.mean_squared_error, num_steps=2, rates=0.02)
    tasks = bl.tasks.batch(bl.tasks.sinusoid, 2)(KEY)
    meta = learner.init_meta(KEY)
    report = check(learner.problem, learner.solver, learner.estimator, meta, tasks, KEY)
    assert report.trust == "yes" and "exact unroll" in report.compared_with, str(report)


def test_differences_know_when_they_are_useless():
    at = np.array([0.0, *STEPS, *(-h for h in STEPS)])
    smooth = slope(np.exp(at))
    assert smooth.reliable and abs(smooth.value - 1) < 1e-8 and smooth.uncertainty < 1e-7
    assert slope(np.abs(at) + at).kink and slope(np.abs(at)).low == pytest.approx(-1)
    rng = np.random.default_rng(0)
    assert not slope(np.sin(at) + 1e-2 * rng.normal(size=at.shape)).reliable
    assert slope(np.zeros_like(at)).reliable and slope(np.zeros_like(at)).value == 0
    assert not slope(at * np.nan).reliable
    # Noise of float32 leaves the long steps usable.
    assert slope(np.sin(at) + 6e-8 * rng.normal(size=at.shape)).value == pytest.approx(1, abs=1e-2)


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


def test_a_custom_vjp_is_found_before_the_run():
    problem, solver = scalar_problem(inner=lambda p: 0.5 * clipped(p) ** 2)
    report = check(problem, solver, Mixed(), SCALAR, ONE_TASK, KEY)
    (found,) = report.operations
    assert found.function == "inner_loss" and found.kind == "own rule"
    assert "test_check.py" in found.where
    assert report.trust == "no" and "jax.custom_vjp" in report.verdict
    # In the outer loss the rule is used, and it is not the derivative.
    problem, solver = scalar_problem(outer=lambda p: 50 * clipped(p) ** 2)
    report = check(problem, solver, Unroll(), SCALAR, ONE_TASK, KEY)
    assert report.trust == "no", str(report)
    assert any("disagrees with the differences" in note for note in report.notes)


@pytest.mark.parametrize(
    ("loss", "operation", "kind"),
    [
        (lambda p: jnp.round(p) ** 2, "round", "zero derivative"),
        (lambda p: jax.lax.stop_gradient(p) * p, "stop_gradient", "zero derivative"),
        (lambda p: p * jnp.argmax(jnp.stack([p, -p])), "argmax", "zero derivative"),
        (lambda p: p * p.astype(jnp.int32), "cast to int32", "zero derivative"),
        (lambda p: p.astype(jnp.float16) ** 2, "cast from float32 to float16", "precision"),
        (lambda p: jax.pure_callback(lambda x: x, p, p) ** 2, "pure_callback", "no derivative"),
        (
            lambda p: jax.lax.while_loop(lambda x: x > 1, lambda x: x / 2, p) ** 2,
            "while_loop",
            "no derivative",
        ),
        (
            lambda p: jax.lax.scan(lambda c, _: ((c[1], jnp.floor(c[0])), None), (p, 2 * p), length=2)[0][0],
            "floor",
            "zero derivative",
        ),
        (lambda p: jax.lax.cond(p > 0, jnp.sign, jnp.sin, p), "sign", "zero derivative"),
    ],
    ids=["round", "stop", "argmax", "int", "half", "callback", "while", "scan", "cond"],
)
def test_operations_are_found_with_their_line(loss, operation, kind):
    problem, solver = scalar_problem(inner=loss)
    task = jax.tree.map(lambda leaf: leaf[0], ONE_TASK)
    found = [f for f in find_operations(problem, solver, SCALAR, task, KEY) if f.kind == kind]
    assert [(f.function, f.operation) for f in found] == [("inner_loss", operation)]
    assert found[0].where and "test_check.py" in found[0].where


def test_library_functions_and_constants_are_not_accused():
    def loss(p):
        key = jax.random.key(0)
        noise = jnp.round(jax.random.normal(key, (3,)))  # rounds nothing that is learned
        logits = p * noise
        return -jax.nn.log_softmax(logits)[0] + jax.nn.relu(p) + jnp.abs(p) + jax.nn.logsumexp(logits)

    problem, solver = scalar_problem(inner=loss, outer=loss)
    task = jax.tree.map(lambda leaf: leaf[0], ONE_TASK)
    assert find_operations(problem, solver, SCALAR, task, KEY) == ()


def test_a_problem_that_cannot_run_is_a_verdict():
    def broken(p):
        raise KeyError("no such leaf")

    report = check(*scalar_problem(outer=broken), Mixed(), SCALAR, ONE_TASK, KEY)
    assert report.trust == "no" and "the problem itself cannot run (KeyError" in report.verdict
    problem, _ = scalar_problem()
    report = check(problem, object(), Mixed(), SCALAR, ONE_TASK, KEY)
    assert report.trust == "no" and "refuses" in report.verdict
    problem, solver = scalar_problem(outer=lambda p: jnp.log(p - 100.0))
    assert "the outer loss itself is nan" in check(problem, solver, Mixed(), SCALAR, ONE_TASK, KEY).verdict
    assert check(problem, solver, Mixed(), {"init": 3, "rate": 0.1}, ONE_TASK, KEY).trust == "no"


def test_an_objective_of_its_own_is_said():
    report = on_quadratic(MultiStep())
    assert report.trust != "yes" and "its value is" in report.verdict


def test_impure_and_weakly_typed_problems_are_told():
    problem, solver = scalar_problem(inner=lambda p: 0.5 * p**2 * (1 + 0.1 * np.random.normal()))
    report = check(problem, solver, Mixed(), SCALAR, ONE_TASK, KEY)
    assert report.trust != "yes" and any("inner_loss is not the same" in fault for fault in report.traces)
    report = check(*scalar_problem(), Mixed(), {"init": 2.0, "rate": 0.3}, ONE_TASK, KEY)
    assert [fault for fault in report.traces if "meta['rate'] is weakly typed" in fault]
    assert not check(*scalar_problem(), Mixed(), SCALAR, ONE_TASK, KEY).traces


def test_a_problem_with_noise_of_its_own_is_compared_key_by_key():
    problem, solver = scalar_problem()
    noisy_problem = replace(
        problem,
        inner_loss=lambda params, meta, batch, key: (
            problem.inner_loss(params, meta, batch, key) + params * jax.random.normal(key)
        ),
    )
    report = check(noisy_problem, solver, Mixed(), SCALAR, ONE_TASK, KEY)
    assert report.trust == "yes" and report.relative_error < 1e-6, str(report)
    assert check(noisy_problem, solver, scaled(0.5), SCALAR, ONE_TASK, KEY).trust == "no"


def test_a_start_that_is_forgotten_is_no_fault_of_implicit_differentiation():
    from bilevel.hypergrad.implicit.implicit import Implicit
    from bilevel.hypergrad.implicit.linear_solvers import cg

    case = quadratic(num_steps=400)
    meta = jax.tree.map(jnp.float32, case.meta)
    tasks = jax.tree.map(lambda leaf: jnp.float32(leaf)[None], case.task)
    report = check(case.problem, case.solver, Implicit(cg(8)), meta, tasks, KEY)
    assert report.trust == "if" and report.relative_error < 1e-6, str(report)
    assert "an inner loop that has converged" in report.leaves[0].zero
    # After 3 steps the start is not forgotten at all.
    early = check(case.problem, replace(case.solver, num_steps=3), Implicit(cg(8)), meta, tasks, KEY)
    assert early.trust == "no" and early.leaves[0].dropped and early.doubts, str(early)
    assert "only through where the inner loop starts" in early.leaves[0].zero


def test_a_random_direction_is_caught():
    draw = Changed(lambda grad, key: {**grad, "init": jnp.array([1.0, -1.0, 1.0, -1.0]) * 50})
    assert on_quadratic(draw).trust == "no"


def test_a_formula_without_a_start_is_checked_too():
    """A prototypical network has no init: its prototypes are computed at once."""
    learner = bl.learners.protonet(bl.nets.mlp([2, 3], jnp.tanh), ways=2)
    x, y = jnp.array([[[0.0, 1.0], [1.0, 0.2], [0.3, 0.9]]]), jnp.array([[0, 1, 0]])
    report = bl.check(
        learner.problem,
        learner.solver,
        learner.estimator,
        learner.init_meta(KEY),
        bl.Task((x, y), (x + 0.3, y)),
        KEY,
    )
    assert "finite differences" in report.compared_with or report.trust == "yes", report
    assert not report.verdict.startswith("Do not trust it: the problem"), report
