"""Learners that compare embeddings: each against its formula by hand, finite differences, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bilevel as bl
from bilevel.inner.simplex_qp import simplex_qp
from bilevel.inner.svm import Svm
from bilevel.learners.embedding import ABSENT
from bilevel.learners.matching_net import matching_net
from bilevel.learners.metaoptnet import metaoptnet
from bilevel.learners.protonet import protonet
from bilevel.learners.r2d2 import r2d2
from bilevel.learners.relation_net import relation_error, relation_net
from bilevel.testing import assert_close, assert_derivative, assert_trees_close

KEY = jax.random.key(0)
NET = bl.nets.mlp([3, 6, 4], jnp.tanh)
RELATION = bl.nets.mlp([8, 5, 1], jnp.tanh)

LEARNERS = {
    "protonet": lambda ways: protonet(NET, ways, scale=0.7),
    "protonet-learned-scale": lambda ways: protonet(NET, ways, scale=0.7, learn_scale=True),
    "matching_net": lambda ways: matching_net(NET, ways, scale=3.0, learn_scale=True),
    "relation_net": lambda ways: relation_net(NET, RELATION, ways),
    "r2d2": lambda ways: r2d2(NET, ways, penalty=0.5, scale=2.0),
    "metaoptnet": lambda ways: metaoptnet(NET, ways, slack=0.3, smoothing=0.2, scale=2.0),
}


def imbalanced_task():
    """3 ways with 3, 1 and 2 support examples, in no order."""
    x = jax.random.normal(jax.random.key(1), (10, 3)) + jnp.eye(3)[jnp.arange(10) % 3]
    return bl.Task((x[:6], jnp.array([0, 2, 0, 1, 2, 0])), (x[6:], jnp.array([1, 2, 0, 1])))


def solved(learner, meta, task):
    return learner.solver.solve(learner.problem, meta, task, KEY)


def estimate(learner, meta, task):
    return bl.hypergradient(learner.problem, learner.solver, learner.estimator, meta, task, KEY)


def logits_of(learner, meta, task):
    return learner.predict(solved(learner, meta, task).params, meta, task.query[0])


@pytest.mark.parametrize("name", LEARNERS)
def test_hypergradient(x64, name):
    learner, task = LEARNERS[name](3), imbalanced_task()
    meta = learner.init_meta(KEY)
    run = jax.jit(lambda meta: estimate(learner, meta, task))
    h = run(meta)
    assert_derivative(lambda meta: run(meta).value, h.grad, meta)
    assert h.stats["finite"] == 1
    assert {"query_loss", "support_loss", "query_accuracy"} <= set(h.stats)
    assert_close("loss", h.stats["query_loss"], h.value, 1e-12)
    assert h.stats["inner_residual"] < 1e-7  # the formula minimizes the inner loss that is stated


def by_hand(name, meta, task):
    """The logits, from the papers' formulas, in loops."""
    (x, y), (q, _) = task
    z, u = np.asarray(NET.apply(meta["embed"], x)), np.asarray(NET.apply(meta["embed"], q))
    y = np.asarray(y)
    means = np.stack([np.mean([z[i] for i in range(len(z)) if y[i] == c], axis=0) for c in range(3)])
    if name.startswith("protonet"):
        return np.array([[-0.7 * np.sum((a - m) ** 2) for m in means] for a in u])
    if name == "matching_net":
        out = np.zeros((len(u), 3))
        for i, a in enumerate(u):
            weights = np.exp([3 * a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in z])
            for weight, label in zip(weights / weights.sum(), y, strict=True):
                out[i, label] += weight
        return np.log(out)
    if name == "relation_net":
        rows = [[RELATION.apply(meta["relation"], jnp.r_[m, a][None])[0, 0] for m in means] for a in u]
        return np.array(rows)
    codes = np.eye(3)[y]
    if name == "r2d2":
        return 2 * u @ np.linalg.solve(z.T @ z + 0.5 * np.eye(4), z.T @ codes)
    return 2 * u @ dense_svm(z, codes, 0.3, 0.2)


def dense_svm(z, codes, slack, smoothing):
    """The dual by projected gradient descent over the simplices, a long time: no Newton step in it."""
    matrix = z @ z.T + smoothing * np.eye(len(z))
    b = np.full(codes.shape, slack / codes.shape[1])
    rate = 1 / np.linalg.eigvalsh(matrix).max()
    for _ in range(4000):
        b = project_rows(b - rate * (matrix @ (b - slack * codes) + codes), slack)
    return z.T @ (slack * codes - b)


def project_rows(rows, total):
    """Euclidean projection on {b >= 0, sum b = total}, by bisection."""
    low, high = rows.min(1, keepdims=True) - total, rows.max(1, keepdims=True)
    for _ in range(100):
        middle = (low + high) / 2
        above = np.maximum(rows - middle, 0).sum(1, keepdims=True) > total
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.maximum(rows - low, 0)


@pytest.mark.parametrize("name", LEARNERS)
def test_formula(x64, name):
    learner, task = LEARNERS[name](3), imbalanced_task()
    meta = learner.init_meta(KEY)
    logits = jax.jit(logits_of, static_argnums=0)(learner, meta, task)
    assert_close("logits", logits, by_hand(name, meta, task), 1e-8)


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "protonet-learned-scale"])
def test_padding_and_absent_classes_count_nowhere(x64, name):
    """The same task with padded examples and two classes nobody has: answers, loss and gradient stay."""
    task = imbalanced_task()
    junk = 5.0 + jnp.arange(6.0).reshape(2, 3)
    pad = jnp.full(2, -1)
    padded = bl.Task(
        *((jnp.concatenate([x[:1], junk, x[1:]]), jnp.concatenate([y[:1], pad, y[1:]])) for x, y in task)
    )
    small, large = LEARNERS[name](3), LEARNERS[name](5)
    meta = small.init_meta(KEY)
    run = jax.jit(estimate, static_argnums=0)
    a, b = run(small, meta, task), run(large, meta, padded)
    tolerance = 1e-6 if name == "metaoptnet" else 1e-10  # absent classes have a high cost there, not infinite
    if name != "relation_net":  # its error is a mean over classes, absent ones too
        assert_close("loss", b.value, a.value, tolerance)
        assert_trees_close("gradient", b.grad, a.grad, tolerance)
    assert b.stats["query_accuracy"] == a.stats["query_accuracy"]
    answers = jax.jit(logits_of, static_argnums=0)
    wide = answers(large, meta, padded)
    real = jnp.array([0, 3, 4, 5])
    assert_close("logits", wide[real, :3], answers(small, meta, task), tolerance)
    assert np.all(np.asarray(wide[:, 3:]) <= ABSENT / 2)


@pytest.mark.parametrize("name", [name for name in LEARNERS if name != "protonet-learned-scale"])
def test_learns(name):
    """A few outer steps on tasks where one direction matters, and the others are noise."""

    def sample(key):
        keys = jax.random.split(key, 3)
        centres = 2 * jax.random.normal(keys[0], (3,))
        y = jnp.arange(12) % 3
        x = jnp.stack([centres[y], *(4 * jax.random.normal(k, (12,)) for k in keys[1:])], 1)
        return bl.Task((x[:6], y[:6]), (x[6:], y[6:]))

    learner, optimizer = LEARNERS[name](3), optax.adam(2e-2)
    state = bl.init_state(learner, optimizer, bl.tasks.batch(sample, 8), KEY)
    traced = []

    @jax.jit
    def step(state, key):
        traced.append(None)
        return bl.meta_step(learner, optimizer, state, bl.tasks.batch(sample, 8)(key), task_chunk=8)

    losses = []
    for i in range(120):
        state, metrics = step(state, jax.random.key(i))
        losses.append(metrics.scalars["outer_loss"])
    assert np.mean(losses[-20:]) < 0.85 * np.mean(losses[:5]), (np.mean(losses[:5]), np.mean(losses[-20:]))
    assert len(traced) == 1


def test_simplex_program_against_projected_gradient(x64):
    rng = np.random.default_rng(0)
    for n, m, scale in [(1, 2, 1.0), (6, 4, 1.0), (6, 4, 30.0), (6, 4, 0.01)]:
        z = scale * rng.normal(size=(n, n // 2 + 1))
        matrix, linear = z @ z.T + 0.1 * np.eye(n), scale * rng.normal(size=(n, m))
        b, multipliers = simplex_qp(jnp.asarray(matrix), jnp.asarray(linear))
        slope = matrix @ b + linear
        gap = np.sum(b * (slope - slope.min(1, keepdims=True)))  # zero at the minimum and nowhere else
        assert np.abs(b.sum(1) - 1).max() < 1e-12 and b.min() > 0 and multipliers.min() > 0
        assert gap < 1e-9 * max(scale**2, 1)


def test_simplex_program_has_two_derivatives_of_both_arguments(x64):
    rng = np.random.default_rng(1)
    z, linear = rng.normal(size=(5, 4)), jnp.asarray(rng.normal(size=(5, 3)))

    def value(at):
        b, _ = simplex_qp(at["z"] @ at["z"].T + 0.3 * jnp.eye(5), at["q"])
        return jnp.sum(jnp.sin(3 * b) * (1 + jnp.arange(3)))

    at = {"z": jnp.asarray(z), "q": linear}
    first = jax.jit(jax.grad(value))
    assert_derivative(jax.jit(value), first(at), at)
    turn = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=float)).reshape(leaf.shape), at)

    def along(at):
        return sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (first(at), turn)), strict=True))

    assert_derivative(jax.jit(along), jax.jit(jax.grad(along))(at), at)
    forward = jax.jvp(value, (at,), (turn,))[1]
    assert_close("forward", forward, along(at), 1e-9)


def test_simplex_program_of_an_indefinite_matrix_is_nan():
    assert np.isnan(simplex_qp(-jnp.eye(2), jnp.ones((2, 3)))[0]).all()


def test_svm_in_float32_and_under_vmap():
    svm = Svm(lambda meta, x: x, 5)
    problem = bl.Problem(lambda meta, key: jnp.zeros((16, 5)), svm.loss, svm.loss)
    labels = jnp.arange(25) % 5

    def solve(x):
        return svm.solve(problem, None, bl.Task((x, labels), None), KEY)

    x = 2 * jax.random.normal(KEY, (3, 25, 16))
    many = jax.jit(jax.vmap(solve))(x)
    with jax.enable_x64(True):
        exact = [jax.jit(solve)(jnp.asarray(row, jnp.float64)) for row in x]
    for i, one in enumerate(exact):
        assert_close("weights", many.params[i], one.params, 3e-5)
        assert one.stats["duality_gap"] < 1e-12 and one.stats["inner_residual"] < 1e-6
    assert np.all(many.stats["inner_residual"] < 1e-2) and np.all(many.stats["duality_gap"] < 1e-6)


def test_svm_hinge_becomes_the_usual_one(x64):
    """For a small smoothing the loss is ½|W|² + C Σ max(0, 1 + s_k − s_y)."""
    rng = np.random.default_rng(0)
    x, w, y = rng.normal(size=(7, 3)), rng.normal(size=(3, 4)), np.arange(7) % 4
    scores = x @ w
    margins = scores - scores[np.arange(7), y][:, None] + (np.arange(4) != y[:, None])
    expected = 0.5 * np.sum(w**2) + 0.3 * margins.max(1).sum()
    svm = Svm(lambda meta, x: x, 4, slack=0.3, smoothing=1e-9)
    loss = svm.loss(jnp.asarray(w), None, (jnp.asarray(x), jnp.asarray(y)), KEY)
    assert_close("loss", loss, expected, 1e-7)


def test_svm_by_another_solver(x64):
    """The same problem by gradient descent, and its hypergradient by the implicit function theorem."""
    net = bl.nets.mlp([3, 4])
    svm = Svm(lambda meta, x: net.apply(meta, x), 3, slack=0.3, smoothing=0.5)
    task, meta = imbalanced_task(), net.init(KEY)

    def outer(params, meta, batch, key):
        return bl.learners.cross_entropy(net.apply(meta, batch[0]) @ params, batch[1])[0]

    problem = bl.Problem(lambda meta, key: jnp.zeros((4, 3)), svm.loss, outer)
    run = jax.jit(bl.hypergradient, static_argnums=(0, 1, 2))
    exact = run(problem, svm, bl.hypergrad.Unroll(), meta, task, KEY)
    descent = bl.inner.Gradient(optax.sgd(0.1), 1000)
    implicit = bl.hypergrad.Implicit(bl.hypergrad.cg(50))
    other = run(problem, descent, implicit, meta, task, KEY)
    assert_close("value", other.value, exact.value, 1e-8)
    assert_trees_close("gradient", other.grad, exact.grad, 1e-6)


def test_relation_error():
    logits, labels = jnp.array([[0.3, -2.0], [1.0, 4.0], [9.0, 9.0]]), jnp.array([0, 0, -1])
    loss, metrics = relation_error(logits, labels)
    scores = 1 / (1 + np.exp(-np.asarray(logits)))
    expected = np.mean(
        [(scores[0, 0] - 1) ** 2, scores[0, 1] ** 2, (scores[1, 0] - 1) ** 2, scores[1, 1] ** 2]
    )
    assert_close("loss", loss, expected, 1e-6)
    assert metrics["accuracy"] == 0.5
    for wrong in ([0, 2, -1], [0, -2, 1], [-1, -1, -1]):  # never a loss that looks like one
        loss, metrics = relation_error(logits, jnp.array(wrong))
        assert jnp.isnan(loss) and jnp.isnan(metrics["accuracy"])


def test_noise_is_in_the_outer_loss_only():
    net = bl.nets.Net(NET.init, NET.apply, lambda params, x, key: NET.apply(params, x) + 100.0)
    learner, task = matching_net(net, 3), imbalanced_task()
    meta = learner.init_meta(KEY)
    params = solved(learner, meta, task).params
    quiet = matching_net(NET, 3)
    assert_trees_close("params", params, solved(quiet, meta, task).params, 0.0)
    clean = quiet.problem.outer_loss(params, meta, task.query, KEY)
    assert learner.problem.outer_loss(params, meta, task.query, KEY) != clean
    assert learner.problem.metrics(params, meta, task.query, KEY)["loss"] == clean


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: protonet(NET, 1), "ways must be a whole number of at least 2, got 1"),
        (lambda: r2d2(NET, 2.0), "ways must be a whole number"),
        (lambda: matching_net(NET, 3, scale=0), "matching_net.scale must be a positive number, got 0"),
        (lambda: r2d2(NET, 3, penalty=-1.0), "r2d2.penalty must be a positive number"),
        (lambda: metaoptnet(NET, 3, slack=0), "metaoptnet.slack must be a positive number"),
        (lambda: Svm(lambda meta, x: x, 1), "num_classes must be a whole number of at least 2"),
        (
            lambda: Svm(lambda meta, x: x, 3, smoothing=float("inf")),
            "Svm.smoothing must be a positive number",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refused_while_running():
    learner, task = protonet(NET, 3), imbalanced_task()
    with pytest.raises(ValueError, match="solves its inner problem by a formula and has no starting point"):
        learner.problem.init(None, KEY)
    learner = relation_net(NET, bl.nets.mlp([8, 2]), 3)
    meta = learner.init_meta(KEY)
    with pytest.raises(ValueError, match=r"one number a pair, \[12, 1\], got \(12, 2\)"):
        logits_of(learner, meta, task)
    with pytest.raises(TypeError, match=r"Svm\.features must be a function"):
        Svm(3, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"features \[n, d\] and labels \[n\]"):
        Svm(lambda meta, x: x, 3).loss(jnp.zeros((2, 3)), None, (jnp.ones((4, 2)), jnp.zeros(3)), KEY)
