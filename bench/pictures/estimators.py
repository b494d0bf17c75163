"""Error of each estimator against its own knob, in float64, on problems whose hypergradient is known.

The problem of most of them is a quadratic with curvatures from 0.05 to 1 in twelve directions:

    inner ½ φᵀAφ − φᵀBθ,   outer ½ |φ − c|²,   φ* = A⁻¹Bθ,   dF/dθ = BᵀA⁻¹(φ* − c)
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import optimistix
from style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, RED, SKY, save

import bilevel as bl
from bilevel import hypergrad as hg
from bilevel.testing import quadratic

KEY = jax.random.key(0)
SIZE, LOW = 12, 0.05
_rng = np.random.default_rng(0)
_basis = np.linalg.qr(_rng.normal(size=(SIZE, SIZE)))[0]
CURVATURES = np.geomspace(LOW, 1.0, SIZE)
A = _basis * CURVATURES @ _basis.T
B = _rng.normal(size=(SIZE, 3))
C = _rng.normal(size=SIZE)
THETA = _rng.normal(size=3)
EXACT = B.T @ np.linalg.solve(A, np.linalg.solve(A, B @ THETA) - C)
PROBLEM = bl.Problem(
    init=lambda meta, key: jnp.zeros(SIZE, meta.dtype),
    inner_loss=lambda params, meta, batch, key: 0.5 * params @ A @ params - params @ (B @ meta),
    outer_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - C) ** 2),
)


def error(estimator, num_steps: int = 2000, rate: float = 1.0, exact=EXACT, dtype: str = "float64") -> float:
    """|g − dF/dθ| / |dF/dθ| after gradient descent of `num_steps`."""
    solver = bl.inner.Gradient(optax.sgd(rate), num_steps)

    @jax.jit
    def run(meta):
        return bl.hypergradient(PROBLEM, solver, estimator, meta, bl.Task(None, None), KEY).grad

    with jax.enable_x64(dtype == "float64"):
        grad = np.asarray(run(jnp.asarray(THETA, dtype)))
    return float(np.linalg.norm(grad - exact) / np.linalg.norm(exact))


def of_steps(num_steps: int, rate: float) -> np.ndarray:
    """The hypergradient of so many steps from zero, by the eigenvalues of A alone."""
    left = _basis * ((1 - (1 - rate * CURVATURES) ** num_steps) / CURVATURES) @ _basis.T  # dφ_K / d(Bθ)
    return B.T @ left @ (left @ B @ THETA - C)


def iterations(folder: Path) -> None:
    """Truncation against its length; forward mode against its number of directions."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.7))
    total, rate = 200, 1.0
    exact = of_steps(total, rate)
    lengths = [1, 10, 30, 60, 100, 150]
    errors = [error(hg.Truncated(k), total, rate, exact) for k in lengths]
    left.semilogy(lengths, errors, "o-", color=BLUE, label="Truncated(k)")
    left.semilogy(lengths, (1 - rate * LOW) ** np.array(lengths), "--", color=GREY, label="(1 − ημ)ᵏ")
    names = {"Unroll()": hg.Unroll(), "Mixed()": hg.Mixed(), "Forward()": hg.Forward()}
    for (name, estimator), colour, mark in zip(
        names.items(), (INK, GREEN, ORANGE), ("s", "^", "D"), strict=True
    ):
        found = max(error(estimator, total, rate, exact), 1e-17)
        left.plot(total, found, mark, color=colour, label=f"{name}: {found:.0e}")
    left.set(title="200 steps of descent", xlabel="k, steps differentiated", ylabel="relative error")
    left.legend(loc="center left", bbox_to_anchor=(0, 0.35))
    tasks = 400
    counts = np.array([1, 4, 16, 64])
    for size, colour, mark in ((3, BLUE, "o"), (100, ORANGE, "s")):
        spread = [_directions(size, int(n), tasks) for n in counts]
        right.loglog(counts, spread, mark, color=colour, label=f"dim θ = {size}")
        right.loglog(counts, np.sqrt((size - 1) / counts), "--", color=colour, lw=1)
    right.plot([], [], "--", color=GREY, lw=1, label="√((m − 1) / n)")
    right.set(
        title="Forward(num_directions=n)", xlabel="n, random directions", ylabel="error of one call, rms"
    )
    right.legend()
    figure.tight_layout()
    save(figure, folder, "iterations")


def _directions(size: int, num_directions: int, calls: int) -> float:
    problem = bl.Problem(
        init=lambda meta, key: jnp.zeros(size),
        inner_loss=lambda params, meta, batch, key: 0.5 * jnp.sum((params - meta) ** 2),
        outer_loss=lambda params, meta, batch, key: jnp.sum(params * jnp.arange(1.0, size + 1)),
    )
    solver, estimator = bl.inner.Gradient(optax.sgd(0.5), 3), hg.Forward(num_directions=num_directions)

    def call(key):
        return bl.hypergradient(problem, solver, estimator, jnp.zeros(size), bl.Task(None, None), key).grad

    grads = jax.jit(lambda keys: jax.lax.map(call, keys))(jax.random.split(KEY, calls))
    exact = (1 - 0.5**3) * np.arange(1.0, size + 1)
    return float(np.sqrt(np.mean(np.sum((grads - exact) ** 2, -1))) / np.linalg.norm(exact))


def implicit(folder: Path) -> None:
    """Linear solvers against their number of products; an inexact inner solution against its steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
    counts = [1, 3, 6, 9, 12]
    makers = {
        "cg": hg.cg, "gmres": hg.gmres, "bicgstab": hg.bicgstab,
        "neumann, η = 1": lambda j: hg.neumann(j, 1.0), "fixed_point": hg.fixed_point,
        "nystrom(j, 0.01)": lambda j: hg.nystrom(j, 0.01),
    }  # fmt: skip
    looks = zip(makers, (BLUE, ORANGE, GREEN, RED, PURPLE, SKY), ("o", "s", "^", "D", "x", "v"), strict=True)
    for name, colour, mark in looks:
        errors = [
            max(error(hg.Implicit(makers[name](j))), 1e-16) for j in counts if name[0] != "n" or j <= 24
        ]
        left.semilogy(counts, errors, mark + "-", color=colour, label=name, lw=1.3)
    for name, linear, style in (
        ("direct", hg.Implicit(hg.direct()), "-"),
        ("OneStep(1)", hg.OneStep(1.0), ":"),
    ):
        left.axhline(max(error(linear), 1e-16), color=INK, lw=1, ls=style, label=name)
    left.set(
        title="The linear system, at the minimum",
        xlabel="j, steps or columns (bicgstab: two products a step)",
    )
    left.set(ylabel="relative error of the hypergradient")
    left.legend(ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    steps = [1, 10, 100, 300, 600]
    solver_error = [float((1 - LOW) ** k) for k in steps]
    for name, estimator, colour, mark in (
        ("Implicit(cg(12))", hg.Implicit(hg.cg(12)), BLUE, "o"),
        ("Implicit(cg(2))", hg.Implicit(hg.cg(2)), SKY, "^"),
        ("Mixed(), exact for the K steps", hg.Mixed(), INK, "s"),
    ):
        errors = [error(estimator, k) for k in steps]
        right.loglog(steps, errors, mark + "-", color=colour, label=name, lw=1.3)
    right.loglog(steps, solver_error, "--", color=GREY, label="(1 − ημ)ᴷ")
    right.set(title="The inner problem, stopped early", xlabel="K, inner steps")
    right.set(ylabel="error against the minimum's", ylim=(1e-15, 5))
    right.legend(ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.tight_layout()
    save(figure, folder, "implicit")


def first_order(folder: Path) -> None:
    """The penalty's bias and rounding against λ; what FirstOrder drops against K."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.7))
    multipliers = [1e0, 1e2, 1e4, 1e6]
    for dtype, colour, mark in (("float64", BLUE, "o"), ("float32", ORANGE, "s")):
        errors = [error(hg.Penalty(value), 1000, 0.5, dtype=dtype) for value in multipliers]
        left.loglog(multipliers, errors, mark + "-", color=colour, label=f"Penalty(λ), {dtype}")
    lines = (
        ("FiniteDifference(1)", hg.FiniteDifference(1.0), RED, "--"),
        ("Sama()", hg.Sama(), PURPLE, ":"),
    )
    for name, estimator, colour, style in lines:
        found = error(estimator, 200)
        left.axhline(found, color=colour, ls=style, lw=1.3, label=f"{name}: {found:.1g}")
    left.set(title="θ acts through the inner loss", xlabel="λ", ylabel="relative error")
    left.legend(loc="lower left")
    steps, rates = [1, 2, 5, 10, 20], (0.02, 0.2)
    for rate, colour, mark in zip(rates, (BLUE, ORANGE), ("o", "s"), strict=True):
        right.loglog(
            steps, [_dropped(k, rate) for k in steps], mark + "-", color=colour, label=f"rate {rate}"
        )
    right.set(title="FirstOrder(), θ is the initialization", xlabel="K, inner steps", ylabel="relative error")
    right.set_xticks(steps, steps)
    right.minorticks_off()
    right.legend()
    figure.tight_layout()
    save(figure, folder, "first_order")


def _dropped(num_steps: int, rate: float) -> float:
    """The relative error of FirstOrder in the initialization of the closed-form quadratic."""
    case = quadratic(num_steps)
    with jax.enable_x64(True):
        meta = jax.tree.map(jnp.asarray, case.meta | {"log_rate": np.log(np.asarray(rate))})
        both = [
            np.asarray(
                bl.hypergradient(case.problem, case.solver, estimator, meta, case.task, KEY).grad["init"]
            )
            for estimator in (hg.FirstOrder(), hg.Mixed())
        ]
    return float(np.linalg.norm(both[0] - both[1]) / np.linalg.norm(both[1]))


def exactness(folder: Path) -> None:
    """The exact estimators against the closed form of a recursion of 20 steps."""
    figure, axis = plt.subplots(figsize=(6.6, 3.3))
    names = {"Unroll": hg.Unroll(), "Mixed": hg.Mixed(), "Forward": hg.Forward(), "MultiStep": hg.MultiStep()}
    looks = {"sgd": (BLUE, "o", -0.15), "momentum": (ORANGE, "s", 0.0), "schedule": (GREEN, "^", 0.15)}
    for optimizer, (colour, mark, aside) in looks.items():
        found = [_off(estimator, 20, optimizer, name == "MultiStep") for name, estimator in names.items()]
        axis.semilogy(np.arange(4) + aside, found, mark, color=colour, label=f"{optimizer}, learned", ms=7)
    axis.axhline(1e-10, color=GREY, ls="--", lw=1)
    axis.text(-0.4, 1.5e-10, "allowed in the tests", color=INK, fontsize=8.5)
    axis.set(xticks=range(4), xticklabels=list(names), xlim=(-0.5, 3.5), ylim=(1e-17, 1e-8))
    axis.set(title="20 inner steps in float64", ylabel="largest relative error of a leaf")
    axis.grid(axis="x", visible=False)
    axis.legend(ncol=3, loc="upper right", bbox_to_anchor=(1, 0.75))
    save(figure, folder, "exactness")


def _off(estimator, num_steps: int, optimizer: str, every_step: bool) -> float:
    case = quadratic(num_steps, optimizer=optimizer)
    answer = case.every_step if every_step else case.exact
    assert answer is not None
    with jax.enable_x64(True):
        meta = jax.tree.map(jnp.asarray, case.meta)
        run = jax.jit(
            lambda meta: bl.hypergradient(case.problem, case.solver, estimator, meta, case.task, KEY)
        )
        grad = jax.tree.map(np.asarray, run(meta).grad)
    off = [np.max(np.abs(grad[name] - leaf)) / np.max(np.abs(leaf)) for name, leaf in answer.grad.items()]
    return max(*off, 1e-17)


def inner(folder: Path) -> None:
    """One ridge regression by every kind of inner solver: the hypergradient of the log-penalty."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(40, 8)) * np.geomspace(1, 0.2, 8)
    y = x @ rng.normal(size=8) + 0.3 * rng.normal(size=40)
    ridge = bl.inner.Ridge(lambda meta, x: x, lambda meta: jnp.exp(meta))
    problem = bl.Problem(lambda meta, key: jnp.zeros(8), ridge.loss, ridge.error)
    task = bl.Task((x[:20], y[:20]), (x[20:], y[20:]))
    figure, axis = plt.subplots(figsize=(6.6, 3.8))
    with jax.enable_x64(True):
        meta = jnp.log(jnp.asarray(0.05))
        exact = float(bl.hypergradient(problem, ridge, hg.Unroll(), meta, task, KEY).grad)
        optimizers = {
            "Gradient(sgd)": (optax.sgd(0.4), BLUE),
            "Gradient(momentum)": (optax.sgd(0.4, 0.8), ORANGE),
            "Gradient(adam)": (optax.adam(0.1), GREEN),
        }
        for name, (optimizer, colour) in optimizers.items():
            solver = bl.inner.Gradient(optimizer, 300)
            path = jax.jit(lambda meta, s=solver: hg.Forward().trajectory(problem, s, meta, task, KEY))(
                meta
            ).grad
            off = np.abs(np.asarray(path) - exact) / abs(exact)
            axis.loglog(np.arange(1, 301), np.maximum(off, 1e-16), color=colour, label=name)
        converged = bl.inner.Converged(optimistix.BFGS(rtol=1e-10, atol=1e-10))
        solution = converged.solve(problem, meta, task, KEY)
        found = float(bl.hypergradient(problem, converged, hg.Implicit(hg.cg(8)), meta, task, KEY).grad)
        took = int(solution.stats["num_steps"])
    axis.plot(
        took, max(abs(found - exact) / abs(exact), 1e-16), "D", color=RED, ms=7, label="Converged(BFGS)"
    )
    axis.plot(1, 1e-16, "*", color=INK, ms=11, label="Ridge: the formula, no step", clip_on=False)
    axis.set(title="Hypergradient of the log-penalty", xlabel="inner steps", ylim=(1e-16, 5))
    axis.set(ylabel="error relative to the formula's")
    axis.legend(loc="lower left", bbox_to_anchor=(0.02, 0.08))
    save(figure, folder, "inner")


def silent(folder: Path) -> None:
    """A conjugate gradient with the fault that a library shipped, beside the one here."""
    counts = [1, 2, 4, 6, 9, 12]
    b = B @ THETA
    exact = np.linalg.solve(A, b)
    with jax.enable_x64(True):
        found = jax.jit(lambda: [hg.cg(j).solve(lambda v: A @ v, jnp.asarray(b), KEY)[0] for j in counts])()
        found = [np.asarray(q) for q in found]
    q, residual, direction = np.zeros(SIZE), b, b
    stale = []
    for _ in range(12):
        step = residual @ residual / (direction @ A @ direction)
        q, after = q + step * direction, residual - step * (A @ direction)
        # The fault: the next direction begins with the residual from before the step.
        direction = residual + (after @ after) / (residual @ residual) * direction
        residual = after
        stale.append(np.linalg.norm(q - exact) / np.linalg.norm(exact))
    figure, axis = plt.subplots(figsize=(6, 3.4))
    axis.semilogy(range(1, 13), stale, "s-", color=RED, label="directions from the residual of one step ago")
    off = [np.linalg.norm(q - exact) / np.linalg.norm(exact) for q in found]
    axis.semilogy(counts, off, "o-", color=BLUE, label="bl.hypergrad.cg")
    axis.set(title="Conjugate gradient in twelve dimensions", xlabel="steps", ylabel="relative error")
    axis.legend()
    save(figure, folder, "silent")


PICTURES = {
    "iterations": iterations,
    "implicit": implicit,
    "first_order": first_order,
    "exactness": exactness,
    "inner": inner,
    "silent": silent,
}
