"""Linear solvers over their whole option grid: the error falls with more iterations, or it is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bilevel as bl
from bilevel.hypergrad.implicit.implicit import Implicit
from bilevel.hypergrad.implicit.krylov import bicgstab, gmres
from bilevel.hypergrad.implicit.linear_solvers import cg, direct
from bilevel.hypergrad.implicit.neumann import fixed_point, neumann
from bilevel.hypergrad.implicit.nystrom import nystrom
from bilevel.inner.closed_form import ClosedForm
from bilevel.testing import assert_close
from bilevel.testing.implicit_problems import hessian_matrix

KEY = jax.random.key(0)
SIZE = 6
KINDS = ("dense", "diagonal", "ill-conditioned")


def matrix(kind):
    return hessian_matrix(kind, SIZE, np.random.default_rng(0))


def eigenvalues(kind):
    return np.linalg.eigvalsh(matrix(kind))[[0, -1]]


def errors(make, counts, kind="dense", b=None):
    """|q − A⁻¹b| / |A⁻¹b|, for each number of iterations."""
    a = jnp.asarray(matrix(kind))
    b = jnp.asarray(np.random.default_rng(1).normal(size=SIZE) if b is None else b)
    exact = jnp.linalg.solve(a, b)

    @jax.jit
    def run():
        answers = jnp.stack([make(count).solve(lambda v: a @ v, b, KEY)[0] for count in counts])
        return jnp.linalg.norm(answers - exact, axis=1) / jnp.linalg.norm(exact)

    return np.asarray(run())


# Each alone, against theory


@pytest.mark.parametrize("kind", KINDS)
def test_cg_converges_as_the_theory_says(x64, kind):
    """Monotone in the 2-norm, in the norm of A below the Chebyshev bound, exact after p steps."""
    a = jnp.asarray(matrix(kind))
    b = jnp.asarray(np.random.default_rng(1).normal(size=SIZE))
    exact = jnp.linalg.solve(a, b)
    answers = jax.jit(lambda: [cg(j).solve(lambda v: a @ v, b, KEY)[0] for j in range(1, 2 * SIZE)])()
    low, high = eigenvalues(kind)
    root = np.sqrt(high / low)
    off = [np.linalg.norm(q - exact) for q in answers]
    for j, q in enumerate(answers, start=1):
        energy = np.sqrt((q - exact) @ a @ (q - exact) / (exact @ a @ exact))
        assert energy <= 2 * ((root - 1) / (root + 1)) ** j + 1e-9
        assert j == 1 or off[j - 1] <= off[j - 2] * (1 + 1e-9) + 1e-9
    assert off[SIZE - 1] < 1e-7 * np.linalg.norm(exact)


def test_moskomule_hypergrad_stale_residual(x64):
    """That conjugate gradient (0.0.1) is off by 43% after 1 step and 110% after 12, as it reuses the old
    residual. On 12 dimensions every step here is a gain, and the twelfth the last."""
    rng = np.random.default_rng(0)
    a = jnp.asarray(hessian_matrix("dense", 12, rng))
    b = jnp.asarray(rng.normal(size=12))
    exact = jnp.linalg.solve(a, b)
    answers = jax.jit(lambda: [cg(j).solve(lambda v: a @ v, b, KEY)[0] for j in range(1, 13)])()
    off = [np.linalg.norm(q - exact) / np.linalg.norm(exact) for q in answers]
    assert np.all(np.diff(off) < 0) and off[-1] < 1e-8 < 1e-2 < off[0]


def test_betty_cg_alpha_scale(x64):
    """Betty's cg_alpha scales the answer (159% error at 3 iterations, 2460% at 24). There is no such knob
    here, and 24 iterations on a badly conditioned system, twice as many as it has dimensions, do not harm."""
    a = jnp.asarray(hessian_matrix("ill-conditioned", 12, np.random.default_rng(0)))
    b = jnp.ones(12)
    exact = jnp.linalg.solve(a, b)
    q3, q24, q200 = jax.jit(lambda: [cg(j).solve(lambda v: a @ v, b, KEY)[0] for j in (3, 24, 200)])()
    off = [float(np.linalg.norm(q - exact) / np.linalg.norm(exact)) for q in (q3, q24, q200)]
    assert off[0] < 1 and off[1] < 1e-6 and off[2] < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_neumann_is_the_truncated_series(x64, kind):
    _, high = eigenvalues(kind)
    counts, rate = (1, 2, 5, 20, 100), 1 / high
    off = errors(lambda j: neumann(j, rate), counts, kind)
    residuals = np.linalg.eigvalsh(np.eye(SIZE) - rate * matrix(kind))
    assert np.all(np.diff(off) < 0)
    assert np.all(off <= residuals.max() ** np.array(counts) * 1.0001)
    a, b = matrix(kind), np.ones(SIZE)
    terms = [np.linalg.matrix_power(np.eye(SIZE) - rate * a, i) @ b for i in range(7)]
    q, _ = neumann(7, rate).solve(lambda v: jnp.asarray(a) @ v, jnp.asarray(b), KEY)
    assert_close("series", q, rate * sum(terms), 1e-12)


@pytest.mark.parametrize("excess", [1.01, 1.5, 4.0])
def test_neumann_that_diverges_is_told_with_the_remedy(x64, excess):
    _, high = eigenvalues("dense")
    a, b = jnp.asarray(matrix("dense")), jnp.ones(SIZE)
    for count in (2, 50, 400, 5000):
        solver = neumann(count, excess * 2 / high)
        q, info = jax.jit(lambda solver=solver: solver.solve(lambda v: a @ v, b, KEY))()
        residual = np.linalg.norm(a @ q - b) / np.linalg.norm(b)
        said = solver.doubts({name: float(value) for name, value in info.items()})
        if count < 400:  # the steepest direction may not dominate yet; then the residual cannot be small
            assert said or residual > 0.02
            continue
        assert not residual <= 1
        assert "step_size < 2/L" in said[0] and f"{excess * 2 / high:g}" in said[0]
        assert 0.9 * high < info["largest_curvature"] <= high * (1 + 1e-9)


@pytest.mark.parametrize(
    ("kind", "restart"), [("dense", None), ("ill-conditioned", None), ("ill-conditioned", 2)]
)
def test_gmres(x64, kind, restart):
    counts = (1, 3, 6, 40)
    a, b = jnp.asarray(matrix(kind)), jnp.asarray(np.random.default_rng(1).normal(size=SIZE))
    answers = jax.jit(lambda: [gmres(j, restart).solve(lambda v: a @ v, b, KEY)[0] for j in counts])()
    residuals = np.array([np.linalg.norm(a @ q - b) for q in answers])
    assert np.all(np.diff(residuals) <= 1e-9 * np.linalg.norm(b))
    if restart is None:
        assert np.all(residuals[2:] < 1e-9)
        krylov = np.stack([np.linalg.matrix_power(a, i) @ b for i in range(3)], 1)
        best = np.linalg.lstsq(np.asarray(a) @ krylov, b, rcond=None)[0]
        assert_close("gmres(3) is optimal", answers[1], krylov @ best, 1e-7)


def test_systems_that_are_not_symmetric(x64):
    rng = np.random.default_rng(0)
    a = jnp.asarray(np.eye(SIZE) - 0.3 * rng.normal(size=(SIZE, SIZE)))
    b = jnp.asarray(rng.normal(size=SIZE))
    contraction = np.max(np.abs(np.linalg.eigvals(np.eye(SIZE) - a)))
    assert contraction < 1
    for solver in (gmres(SIZE), bicgstab(40), direct(), fixed_point(400)):
        q, _ = jax.jit(lambda solver=solver: solver.solve(lambda v: a @ v, b, KEY))()
        assert_close(str(solver), q, np.linalg.solve(a, b), 1e-8)


def test_gmres_and_direct_take_an_indefinite_system_and_cg_tells(x64):
    a = jnp.diag(jnp.array([2.0, 1.0, 0.5, -1.0, 3.0, 0.1]))
    b = jnp.ones(SIZE)
    for solver in (gmres(SIZE), direct(), bicgstab(60)):
        q, _ = solver.solve(lambda v: a @ v, b, KEY)
        assert_close(str(solver), q, b / jnp.diag(a), 1e-7)
    for count in (3, 6, 30):
        q, info = cg(count).solve(lambda v: a @ v, b, KEY)
        assert np.all(np.isfinite(q))
        said = cg(count).doubts({name: float(value) for name, value in info.items()})
        assert count == 3 or ("negative curvature" in said[0] and "Mixed()" in said[0])
    assert nystrom(SIZE, 1e-3).doubts({"smallest_curvature": -1.0, "largest_curvature": 3.0})
    _, info = nystrom(SIZE, 1e-3).solve(lambda v: a @ v, b, KEY)
    assert_close("smallest", info["smallest_curvature"], -1.0, 1e-9)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_singular_hessian_is_not_called_indefinite(x64, dtype):
    """More parameters than examples: rounding makes the smallest curvature about −1e-8, which is no fault."""
    x = np.random.default_rng(0).normal(size=(3, SIZE))
    a = jnp.asarray(x.T @ x, dtype)
    b = jnp.asarray(x.sum(0), dtype)
    for solver in (cg(20), nystrom(5, 1e-4)):
        q, info = solver.solve(lambda v: a @ v, b, KEY)
        assert solver.doubts({name: float(value) for name, value in info.items()}) == []
        assert np.linalg.norm(a @ q - b) < 1e-2 * np.linalg.norm(b)


@pytest.mark.parametrize("kind", KINDS)
def test_nystrom_with_all_columns_is_the_damped_inverse(x64, kind):
    a, b = matrix(kind), np.random.default_rng(1).normal(size=SIZE)
    for rho in (1.0, 1e-2, 1e-6):
        q, _ = nystrom(SIZE, rho).solve(lambda v: jnp.asarray(a) @ v, jnp.asarray(b), KEY)
        assert_close("damped", q, np.linalg.solve(a + rho * np.eye(SIZE), b), 1e-7)


def test_nystrom_is_exact_on_a_hessian_of_its_rank(x64):
    x = np.random.default_rng(0).normal(size=(3, SIZE))
    a = x.T @ x
    for key in jax.random.split(KEY, 3):  # whatever columns are drawn
        q, _ = nystrom(3, 0.1).solve(lambda v: jnp.asarray(a) @ v, jnp.ones(SIZE), key)
        assert_close("rank 3", q, np.linalg.solve(a + 0.1 * np.eye(SIZE), np.ones(SIZE)), 1e-9)
    q = [
        nystrom(2, 0.1).solve(lambda v: jnp.asarray(a) @ v, jnp.ones(SIZE), k)[0]
        for k in jax.random.split(KEY)
    ]
    assert np.any(np.abs(q[0] - q[1]) > 1e-3), "the columns must depend on the key"


@pytest.mark.parametrize(
    "solver",
    [cg(40), neumann(900, 0.2), direct(), gmres(6), bicgstab(20), nystrom(6, 1e-9), fixed_point(900)],
)
def test_trees_and_batches(x64, solver):
    """Nested trees, a zero right-hand side, NaN, and a batch in which each problem needs another effort."""
    a = np.stack([matrix("dense"), np.diag([1.0, 1, 2, 2, 3, 3]), np.eye(SIZE)]) / 2
    b = np.random.default_rng(1).normal(size=(3, SIZE))

    def tree(v):
        return {"x": (v[:2], [v[2:].reshape(2, 2)]), "none": None}

    def flat(t):
        return jnp.concatenate([t["x"][0], t["x"][1][0].ravel()])

    @jax.jit
    @jax.vmap
    def run(a, b):
        q, info = solver.solve(lambda t: tree(a @ flat(t)), tree(b), KEY)
        return flat(q), info

    q, _ = run(a, b)
    for i in range(3):
        assert_close(f"problem {i}", q[i], np.linalg.solve(a[i], b[i]), 1e-6)
    q, info = run(a, 0 * b)
    assert not np.any(q) and all(np.all(np.isfinite(value)) for value in info.values())
    q, _ = run(a, np.nan * b)
    assert not np.any(np.isfinite(q)), "a NaN must not turn into a zero"


@pytest.mark.parametrize("solver", [cg(6), neumann(3, 0.2), direct(), nystrom(3, 0.1), fixed_point(3)])
def test_each_leaf_keeps_its_dtype(x64, solver):
    b = {"a": jnp.ones(3, jnp.float32), "b": jnp.ones(3, jnp.float64)}
    q, _ = solver.solve(lambda t: jax.tree.map(lambda leaf: leaf * 2, t), b, KEY)
    assert {name: leaf.dtype for name, leaf in q.items()} == {"a": jnp.float32, "b": jnp.float64}


def test_float32_is_solved_to_its_precision():
    """A thousand steps of cg in float32, far beyond convergence, leave what four did."""
    a = jnp.asarray(matrix("dense"), jnp.float32)
    b = jnp.ones(SIZE, jnp.float32)
    for solver in (cg(12), cg(1000), gmres(6), gmres(60), bicgstab(12), bicgstab(200), direct()):
        q, info = solver.solve(lambda v: a @ v, b, KEY)
        assert np.linalg.norm(a @ q - b) < 1e-5, solver
        assert solver.doubts({name: float(value) for name, value in info.items()}) == []


# The whole grid


def _grid():
    _, high = eigenvalues("dense")
    counts = (1, 2, 4, 6, 9)
    many = (1, 4, 16, 64, 256)
    yield "cg", cg, counts
    yield "gmres", gmres, (1, 3, 6)
    yield "gmres-restart", lambda j: gmres(j, 2), (2, 8, 32)
    yield "bicgstab", bicgstab, counts
    for fraction in (0.1, 0.5, 0.99, 1.05, 3.0):
        yield f"neumann-{fraction}", lambda j, f=fraction: neumann(j, f * 2 / high), many
    for rho in (1.0, 1e-4):
        yield f"nystrom-{rho}", lambda r, rho=rho: nystrom(r, rho), (1, 3, 5, SIZE)
    yield "direct", lambda size: direct(size), (SIZE, 100)


GRID = {name: (make, counts) for name, make, counts in _grid()}


@pytest.mark.filterwarnings("ignore::bilevel.hypergrad.doubts.HypergradientWarning")
@pytest.mark.parametrize("name", GRID)
def test_error_bound_over_the_whole_grid(x64, name):
    """|error| ≤ |BᵀA⁻¹| (|φ − φ*| + |A q − ∂φf|), for every solver, effort, step size and inner accuracy.

    g = ½ φᵀAφ − φᵀBθ, f = ½|φ − c|²; the inner solver misses φ* by a given offset. And: where more effort
    does not lower the error, the doubts speak.
    """
    rng = np.random.default_rng(0)
    a, b = hessian_matrix("dense", SIZE, rng), rng.normal(size=(SIZE, 3))
    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(SIZE),
        inner_loss=lambda params, meta, batch, key: 0.5 * params @ a @ params - params @ (b @ meta),
        outer_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - batch) ** 2),
    )
    solver = ClosedForm(lambda meta, offset, key: jnp.linalg.solve(jnp.asarray(a), b @ meta) + offset)
    theta, c = jnp.asarray(rng.normal(size=3)), jnp.asarray(rng.normal(size=SIZE))
    # How far the inner solution is off: a random direction, shrunk.
    scales = np.array([0.0, 1e-8, 1e-4, 1e-2, 1.0])
    direction = rng.normal(size=SIZE)
    offsets = jnp.asarray(scales[:, None] * direction / np.linalg.norm(direction))
    phi = np.linalg.solve(a, b @ theta)
    exact = b.T @ np.linalg.solve(a, phi - c)
    constant = np.linalg.norm(np.linalg.solve(a, b), 2)

    make, counts = GRID[name]
    estimators = [Implicit(make(count)) for count in counts]

    @jax.jit
    @jax.vmap
    def run(offset):
        return [bl.hypergradient(problem, solver, e, theta, bl.Task(offset, c), KEY) for e in estimators]

    answers = run(offsets)
    off = np.array([[np.linalg.norm(g - exact) for g in np.asarray(h.grad)] for h in answers])
    left = np.array([h.stats["linear_residual"] for h in answers])
    size = np.linalg.norm(phi + np.asarray(offsets) - c, axis=1)
    bound = constant * (scales + left * size)
    assert np.all(off <= bound * (1 + 1e-9) + 1e-12), "the bound holds"
    finite = np.isfinite(off) & (bound > 1e-9)
    assert np.max(off[finite] / bound[finite]) > 0.1, "and is no empty one"
    for i, scale in enumerate(scales):
        floor = constant * scale + 1e-9 * np.linalg.norm(exact)
        for j, estimator in enumerate(estimators):
            stats = {key: float(value[i]) for key, value in answers[j].stats.items()}
            said = " ".join(estimator.doubts(stats))
            if scale == 1.0:
                assert "inner problem is not solved" in said, stats
            if scale <= 1e-4:
                assert "inner problem is not solved" not in said, stats
            if j and off[j, i] > off[j - 1, i] + 2 * floor:
                assert said, f"{estimator} is worse than {estimators[j - 1]} and says nothing: {stats}"
            # What is not doubted is right: within the tolerances, times the constants of the bound.
            if not said:
                assert off[j, i] <= 3 * constant * (0.01 * np.linalg.norm(phi) + 0.01 * size[i])
    if name in ("cg", "gmres", "direct", "neumann-0.5"):
        assert off[-1, 0] < 1e-6 * np.linalg.norm(exact), "with enough effort it is exact"


# Refusals


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: cg(0), "cg.num_steps must be a whole number of at least 1, got 0"),
        (lambda: cg(2.5), "cg.num_steps must be a whole number of at least 1, got 2.5"),
        (lambda: cg(True), "cg.num_steps must be a whole number"),
        (lambda: neumann(5, 0.0), "neumann.step_size must be a positive number, got 0"),
        (lambda: neumann(5, float("inf")), "neumann.step_size must be a positive number, got inf"),
        (lambda: neumann(5, float("nan")), "neumann.step_size must be a positive number, got nan"),
        (lambda: gmres(3, 0), "gmres.restart must be a whole number of at least 1, got 0"),
        (lambda: gmres(3, system="both"), 'gmres: system must be "gradient" or "update", got \'both\''),
        (lambda: bicgstab(-1), "bicgstab.num_steps must be"),
        (lambda: nystrom(0, 1.0), "nystrom.rank must be"),
        (lambda: nystrom(3, -1.0), "nystrom.rho must be a positive number, got -1"),
        (lambda: direct(0), "direct.max_size must be"),
        (lambda: fixed_point(0), "fixed_point.num_steps must be"),
    ],
)
def test_what_is_refused_at_construction(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_what_is_refused_when_the_size_is_known():
    b = jnp.ones(SIZE)
    with pytest.raises(ValueError, match=r"6 x 6 matrix, above its max_size of 5; use bl\.hypergrad\.cg"):
        direct(5).solve(lambda v: v, b, KEY)
    with pytest.raises(
        ValueError, match=r"rank must be at most dim params, 6, got 7; use bl\.hypergrad\.dir"
    ):
        nystrom(7, 0.1).solve(lambda v: v, b, KEY)
