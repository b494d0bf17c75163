"""`bl.advise` measures what it says, and recommends what fits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_check import noisy, scaled

import bilevel as bl
from bilevel.analysis import advise
from bilevel.analysis.candidates import candidates, largest_curvature
from bilevel.hypergrad import FirstOrder, Mixed, Unroll
from bilevel.report.advice import write_advice
from bilevel.testing import quadratic

KEY = jax.random.key(0)
CHOICE = {
    "mixed": Mixed(),
    "first": FirstOrder(),
    "off": scaled(1.2),
    "noisy": noisy(1.0, 1.0),
    "broken": object(),
}


@pytest.fixture(scope="module")
def advice():
    """The five of `CHOICE` on the quadratic."""
    case = quadratic(num_steps=5)
    meta = jax.tree.map(jnp.float32, case.meta)
    tasks = jax.tree.map(lambda leaf: jnp.float32(leaf)[None], case.task)
    return case, advise(case.problem, case.solver, meta, tasks, KEY, estimators=CHOICE)


def test_bias_and_noise_are_those_of_the_estimators(advice):
    case, found = advice
    trials = {trial.name: trial for trial in found.trials}
    exact, first = (
        np.concatenate([np.ravel(answer.grad[k]) for k in sorted(answer.grad)])
        for answer in (case.exact, case.first_order)
    )
    size = np.linalg.norm(exact)
    assert trials["mixed"].error < 1e-6
    assert trials["first"].bias == pytest.approx(np.linalg.norm(first - exact) / size, rel=1e-5)
    assert trials["off"].bias == pytest.approx(0.2, rel=1e-5) and trials["off"].noise == 0
    assert trials["noisy"].noise == pytest.approx(np.sqrt(len(exact)) / size, rel=0.3)
    assert trials["noisy"].error >= trials["noisy"].noise
    assert all(t.seconds > 0 and t.memory.peak > 0 for t in found.trials if not t.failure)


def test_the_table_names_every_estimator_and_what_failed(advice):
    found = advice[1]
    assert found.recommended.name == "mixed" and "the fastest of those that are right" in found.reason
    text = str(found)
    assert all(name in text for name in CHOICE) and "AttributeError" in text
    assert found.trials[0].name == "mixed" and found.trials[-1].failure


def test_budgets_are_kept(advice):
    case, _ = advice
    meta = jax.tree.map(jnp.float32, case.meta)
    tasks = jax.tree.map(lambda leaf: jnp.float32(leaf)[None], case.task)

    def ask(**budget):
        return advise(case.problem, case.solver, meta, tasks, KEY, estimators={"mixed": Mixed()}, **budget)

    nothing = ask(memory=1000)
    assert nothing.recommended is None and "None fits in 0.977 KiB" in nothing.reason
    assert ask(seconds=1e-9).recommended is None
    assert ask(memory="1GiB", seconds=10.0).recommended.name == "mixed"
    with pytest.raises(ValueError, match='like "8GiB"'):
        ask(memory="eight")


def test_a_problem_that_cannot_run_is_refused():
    def broken(params, meta, batch, key):
        raise KeyError("no such leaf")

    case = quadratic(num_steps=1)
    problem = bl.Problem(case.problem.init, case.problem.inner_loss, broken)
    tasks = jax.tree.map(lambda leaf: jnp.float32(leaf)[None], case.task)
    with pytest.raises(ValueError, match="cannot run"):
        advise(problem, case.solver, case.meta, tasks, KEY, estimators={"mixed": Mixed()})


def test_candidates_take_the_problem():
    case = quadratic(num_steps=8)
    task = jax.tree.map(jnp.asarray, case.task)
    found = candidates(case.problem, case.solver, case.meta, task, KEY)
    assert {"Mixed", "Unroll", "FirstOrder", "Mixed, √K checkpoints"} <= set(found)
    assert found["Unroll"] == Unroll()
    for estimator in found.values():
        bl.Learner(case.problem, case.solver, estimator)


def test_curvature_sets_the_step_sizes(x64):
    case = quadratic(num_steps=3)
    hessian = jax.hessian(case.problem.inner_loss)(case.meta["init"], case.meta, case.task.support, KEY)
    largest = np.linalg.eigvalsh(hessian)[-1]
    found = largest_curvature(case.problem, case.solver, case.meta, case.task, KEY, num_iterations=200)
    assert found == pytest.approx(largest, rel=1e-6)


def test_the_picture_is_one_page(advice, tmp_path):
    page = write_advice(advice[1], tmp_path / "a" / "advice.html", "quad <ratic>").read_text()
    assert (
        page.count("<figure>") == 2
        and "quad &lt;ratic&gt;" in page
        and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    )
